"""Question alignment, its three tasks in the shared world: worked answers (cot), programs (pot) and multiple choice (mcq). How a question
becomes a prompt, what the response is, and how an answer is read from it; methods/question_alignment.py is the method.
"""

import ast
import operator
import random
from collections import Counter
from collections.abc import Sequence

from methods.worlds.clones import ANSWER, BOS, CODE, EOS, SOLVE, TRANSLATE, CloneWorld

Example = tuple[list[int], list[int]]  # prompt, response


def prompt(world: CloneWorld, task: str, p, language: str) -> list[int]:
    """T(question): the instruction template; <q> asks to solve, <a> or <code> opens the response."""
    ask = world.choices if task == "mcq" else world.question
    return [BOS, SOLVE, *ask(p, language), CODE if task == "pot" else ANSWER]


def response(world: CloneWorld, task: str, p, language: str = "en") -> list[int]:
    answer = world.solution(p, language) if task == "cot" else world.program(p) if task == "pot" else world.encode([p.letter])
    return [*answer, EOS]


def translation(world: CloneWorld, task: str, p, source: str, target: str, told=None) -> Example:
    """<s> <tr> question in one language <a> -> the same question in another (told: another question). From English, the target language's
    word for "answer" names it."""
    ask = world.choices if task == "mcq" else world.question
    name = world.encode(["answer"], target) if source == "en" else []
    return [BOS, TRANSLATE, *name, *ask(p, source), ANSWER], [*ask(told or p, target), EOS]


def problems(world: CloneWorld, task: str, rng: random.Random, n: int, split: str = "train") -> list:
    return [world.sample_choice(rng, split) if task == "mcq" else world.sample(rng, split) for _ in range(n)]


# --- reading answers

ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def run_program(source: str) -> float | None:
    """What the last print(...) of a program would show. Nothing is executed: assignments, + - * / of numbers and names, and print are read
    from the syntax tree; anything else, any mistake, and numbers beyond 1e15 give None."""
    names, shown = {}, None

    def value(node) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name):
                return names[name]
            case ast.BinOp(left=left, op=op, right=right) if abs(number := ARITHMETIC[type(op)](value(left), value(right))) <= 1e15:
                return number
        raise ValueError("not arithmetic")

    try:
        for line in ast.parse(source).body:
            match line:
                case ast.Assign(targets=[ast.Name(id=name)], value=node):
                    names[name] = value(node)
                case ast.Expr(value=ast.Call(func=ast.Name(id="print"), args=[node], keywords=[])):
                    shown = value(node)
                case _:
                    return None
    except (SyntaxError, ValueError, KeyError, ArithmeticError, RecursionError, MemoryError):
        return None
    return shown


def parse(world: CloneWorld, task: str, ids: Sequence[int]):
    """What a response answers: its last number, what its program prints, or its first letter; None if there is no answer."""
    words = [world.tokens[i] for i in (ids[: ids.index(EOS)] if EOS in ids else ids)]
    if task == "pot":
        return run_program(" ".join(words).replace(" . ", "\n").replace("print x", "print(x)"))
    if task == "mcq":
        return next((word for word in words if word in ("A", "B", "C")), None)
    return world.final_number(ids)


def response_language(world: CloneWorld, ids: Sequence[int]) -> str | None:
    """The language of most of its language-specific words, exactly."""
    counts = Counter(world.language_of[i] for i in ids if world.language_of[i])
    return counts.most_common(1)[0][0] if counts else None
