"""Question alignment's three tasks in the world of clones: worked answers (cot), programs (pot),
multiple choice (mcq). How a question becomes a prompt, what the response is, how an answer is read
from it; and the base model, which has read much English and a little of four clones.
methods/question_alignment.py is the method.
"""

import ast
import operator
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from methods.worlds.clones import (
    ANSWER,
    BOS,
    CODE,
    EOS,
    SOLVE,
    TRANSLATE,
    CloneWorld,
    Mix,
    document,
    new_model,
)
from minilm.data import IGNORE, generator, pad
from minilm.evaluate import last_number
from minilm.ops import linear_cross_entropy
from minilm.results import progress
from minilm.training import make_optimizers, schedule, set_lr, take_step
from minilm.transformer import Transformer

Example = tuple[list[int], list[int]]  # prompt, response


def prompt(world: CloneWorld, task: str, p, language: str) -> list[int]:
    """T(question), the instruction template: <q> asks to solve, <a> (in pot <code>) opens the
    response."""
    ask = world.choices if task == "mcq" else world.question
    return [BOS, SOLVE, *ask(p, language), CODE if task == "pot" else ANSWER]


def response(world: CloneWorld, task: str, p, language: str = "en") -> list[int]:
    """What is learned: a worked answer (cot), a program (pot) or a letter (mcq), then </s>."""
    if task == "cot":
        answer = world.solution(p, language)
    elif task == "pot":
        answer = world.program(p)
    else:
        answer = world.encode([p.letter])
    return [*answer, EOS]


def translation(world: CloneWorld, task: str, p, source: str, target: str, told=None) -> Example:
    """<s> <tr> question in one language <a> -> the same question in another (`told`: another
    question, for a control).

    Into English nothing names the target, as it is always English. From English something must: the
    target's own word for "answer" stands behind <tr>."""
    ask = world.choices if task == "mcq" else world.question
    named = world.encode(["answer"], target) if source == "en" else []
    told = p if told is None else told
    return [BOS, TRANSLATE, *named, *ask(p, source), ANSWER], [*ask(told, target), EOS]


def problems(world: CloneWorld, task: str, rng: random.Random, n: int, split="train") -> list:
    sample = world.sample_choice if task == "mcq" else world.sample
    return [sample(rng, split) for _ in range(n)]


# --- the base model

WORLD = CloneWorld(events=(2, 3, 3))  # two thirds of the problems have three events
TEXT = Mix(  # shares of kinds of text: methods/worlds/clones.py
    clones=(0.1, 0.1, 0.1, 0.1),
    english_first=0.25,
    drills=0.1,
    parallel=0.4,
    switched=0.05,
    exercises=0.25,  # in English alone: no text shows an answer to a clone's question
    programs=0.15,
    knowledge=0.1,
)


def pretraining_texts(
    world: CloneWorld, seed: int, steps: int, batch: int, text: Mix = TEXT
) -> Iterator[list[list[int]]]:
    """`steps` batches of documents, token ids. Four batches at a time are drawn and sorted by
    length, so that less is spent on padding: a fifth of the work."""
    rng = random.Random(f"{seed}/pretraining")
    for step in range(0, steps, 4):
        drawn = [document(world, text, rng, step / steps) for _ in range(4 * batch)]
        drawn = sorted(drawn, key=len)
        for k in rng.sample(range(0, len(drawn), batch), 4):
            yield drawn[k : k + batch]


def pretrain(
    world: CloneWorld,
    seed: int,
    steps: int = 1600,
    batch: int = 32,
    lr: float = 3e-3,
    layers: int = 4,
    width: int = 64,
    text: Mix = TEXT,
    name: str = "large",  # proxy-tuning has a small model, too
) -> Transformer:
    """Next-token training on whole documents. `name`: models of other names start from other
    weights, and read the same texts."""
    model = new_model(world, width, layers, generator(seed, f"init {name}"))
    optimizers = make_optimizers(model, "adamw", lr, weight_decay=0.01)
    texts = pretraining_texts(world, seed, steps, batch, text)
    for step, rows in zip(progress(range(steps), f"pretrain {name}"), texts):
        ids, real = pad(rows)
        labels = ids[:, 1:].masked_fill(~real[:, 1:], IGNORE)
        loss = linear_cross_entropy(model.hidden(ids[:, :-1]), model.lm_head.weight, labels, IGNORE)
        set_lr(optimizers, schedule(step, steps, "cosine", warmup=30, final=0.05))
        take_step(loss, model, optimizers)
    return model.eval()


# --- reading answers


def parse(world: CloneWorld, task: str, ids: Sequence[int]):
    """What a response answers: its last number, what its program prints, or its first letter; None
    if there is no answer."""
    if task == "cot":
        return world.final_number(ids)
    ids = list(ids)
    if EOS in ids:
        ids = ids[: ids.index(EOS)]
    words = [world.tokens[i] for i in ids]
    if task == "pot":
        lines = " ".join(words).replace(" . ", "\n")  # the world's full stop ends a line
        return run_program(lines.replace("print x", "print(x)"))
    letters = [word for word in words if word in ("A", "B", "C")]
    return letters[0] if letters else None


def response_language(world: CloneWorld, ids: Sequence[int]) -> str | None:
    """The language of most of its language-specific words, exactly."""
    counts = Counter(world.language_of[i] for i in ids if world.language_of[i])
    return counts.most_common(1)[0][0] if counts else None


# --- programs, read and not executed

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
FUNCTIONS = {"abs": abs, "float": float, "int": int, "max": max, "min": min, "round": round}
FORMAT = re.compile(r"[,_]?(\.\d{1,2})?[dfg]?")  # of f"{x:,.2f}"
LARGEST = 1e15


def run_program(source: str) -> float | None:
    """The last number that a program shows: by its last print, or, as in a notebook, by a bare
    expression at its end.

    Nothing is executed: the syntax tree is read. It may hold arithmetic (+ - * / // % **, abs, int,
    float, round, min, max) with numbers and names, assignments (x = ..., a, b = ..., x: int = ...,
    x += ...), print of numbers, texts and f-strings. Everything else (imports, conditions, loops,
    functions, lists), any mistake, a value that is not a number, and numbers beyond 1e15
    give None."""
    names = {}
    shown = None
    try:
        lines = ast.parse(source).body
        for line in lines:
            match line:
                case ast.Expr(value=ast.Call(func=ast.Name(id="print"), args=args, keywords=[])):
                    shown = [shown_by(names, node) for node in args]
                case ast.Expr(value=node):
                    said = [shown_by(names, node)]
                    shown = said if line is lines[-1] and not is_text(node) else shown
                case _:
                    assign(names, line)
    except (
        ArithmeticError,
        KeyError,
        MemoryError,
        RecursionError,
        SyntaxError,
        TypeError,
        ValueError,
    ):
        return None
    numbers = [x for x in shown or [] if x is not None]
    return numbers[-1] if numbers else None


def assign(names: dict, line: ast.stmt) -> None:
    match line:
        case ast.Assign(targets=[ast.Name(id=name)], value=node):
            names[name] = value_of(names, node)
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=nodes)):
            values = [value_of(names, node) for node in nodes]  # all before any is assigned
            for target, value in zip(targets, values, strict=True):
                match target:
                    case ast.Name(id=name):
                        names[name] = value
                    case _:
                        raise ValueError("not a name")
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as node):
            names[name] = value_of(names, node)
        case ast.AugAssign(target=ast.Name(id=name), op=op, value=node):
            names[name] = compute(op, names[name], value_of(names, node))
        case _:
            raise ValueError("not read")


def value_of(names: dict, node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.Name(id=name):
            return names[name]
        case ast.UnaryOp(op=op, operand=operand):
            return compute(op, value_of(names, operand))
        case ast.BinOp(left=left, op=op, right=right):
            return compute(op, value_of(names, left), value_of(names, right))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            return bounded(FUNCTIONS[name](*(value_of(names, arg) for arg in args)))
    raise ValueError("not arithmetic")


def compute(op: ast.operator | ast.unaryop, *values: float) -> float:
    if isinstance(op, ast.Pow) and abs(values[1]) > 64:
        raise ValueError("too large to be worth computing")
    return bounded(OPERATORS[type(op)](*values))


def bounded(number) -> float:
    if not isinstance(number, int | float) or not abs(number) <= LARGEST:  # complex, NaN, too large
        raise ValueError("no number")
    return number


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def shown_by(names: dict, node: ast.expr) -> float | None:
    """The number that an argument of print shows: its value, or the last one in a text (without its
    sign, as the scorers read it). None: a text without any."""
    match node:
        case ast.Constant(value=str() as text):
            found = last_number(text)
        case ast.JoinedStr(values=parts):
            found = last_number("".join(formatted(names, part) for part in parts))
        case _:
            return value_of(names, node)
    return None if found is None else float(found)


def formatted(names: dict, part: ast.expr) -> str:
    """A piece of an f-string as Python writes it."""
    match part:
        case ast.Constant(value=str() as text):
            return text
        case ast.FormattedValue(value=node, conversion=-1, format_spec=None):
            return str(value_of(names, node))
        case ast.FormattedValue(
            value=node,
            conversion=-1,
            format_spec=ast.JoinedStr(values=[ast.Constant(value=str() as spec)]),
        ) if FORMAT.fullmatch(spec):
            return format(value_of(names, node), spec)
    raise ValueError("not read")
