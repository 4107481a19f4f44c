"""Large Language Models are Limited in Out-of-Context Knowledge Reasoning
(Hu, Gao, Gao, Chen, Huang, EMNLP Findings 2024), https://arxiv.org/abs/2406.07393

Train a model on two facts until it answers both. Does it then know what follows from them? It is
asked with nothing but the question in the prompt ("out of context"). A: a person's attribute, R: a
relation of two:

    A+A->R    born(y) = 2003, born(z) = 2003           =>  same-year(y, z)?
    A+R->A    same-year(y, z), born(z) = 2003          =>  born(y)?
    R+R->R    same-year(x, y), same-year(x, z)         =>  same-year(y, z)?

The data are the method (methods/ockr_tasks.py); training is plain supervised fine-tuning,
L = - mean_{t in answer} log p(w_t | prompt, w_<t). An answer is right if parse(answer) == label;
chance is 1/2 for yes and no, 1/20 for years. A chain of thought, both premises written down before
the conclusion, puts them into the context: this repairs A+A, where the question names both persons,
and not A+R and R+R, where a partner whom nobody names has to be retrieved first.

Found   (eight seeds; () is chance) A+A .50 (.50), R+R .50 (.50), A+R .05 (.05). No better with both
        facts in one sample, nor with others' conclusions trained beside their premises; nor does a
        year learned in English answer abroad, .04 (.05). Yet all premises are known, and with both
        in the prompt .99 are answered. With a chain A+A .89 (seven seeds .86 to .97; the eighth,
        .53, retrieves as well and compares badly), A+R .04, R+R .50, whose chains name a right
        partner in .01 and .02 of the answers.
Run     python methods/ockr.py                        # 2 CPU cores, about 2 minutes
        python methods/experiments/ockr.py            # seeds, controls, claims, figure
        python methods/real/ockr.py --help            # the published files, your checkpoint
Try     --steps 100: .69 of the premises are known, .69 answered with a chain (for 1.00 and .92)
        no replay in `main` (1.0 for 0.4, 0.0 for 0.6): with both premises in the prompt .41, not
        .99; to compare two years is forgotten
        experiments/ockr.py --cells "ar cot" --seeds 100: this chain has to name a partner first
"""

import copy
import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from methods.ockr_tasks import (
    FIRST,
    MINI,
    SECOND,
    SETTINGS,
    YEARS,
    BirthYears,
    Fact,
    Row,
    build,
    build_xling,
    clone,
    contexts,
    make_task,
)
from minilm.data import IGNORE, batches, generator, prompt_masked
from minilm.generate import generate
from minilm.ops import linear_cross_entropy
from minilm.results import cli, progress
from minilm.training import make_optimizers, schedule, set_lr, take_step
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer

# --- 1. a sample is a question, which is read, and an answer, which is learned


class Words:
    """A vocabulary of the mini sentences' pieces: name parts, words, numbers, marks. A space
    belongs to the piece that follows it: " Amber" "Leaf" " ?"."""

    PAD, BOS, EOS = range(3)

    def __init__(self, rows: Sequence[Row]):
        names = [first + second for first, second in zip(FIRST, SECOND)]
        texts = [*names, *SECOND]  # every part of a name (a second part alone is in no row)
        texts += [f"{row.prompt} {row.input} {row.answer}" for row in rows]
        text = " . ".join(texts)
        pieces = {*self.cut(text), *self.cut(clone(text))}
        self.pieces = ["", "<s>", "</s>", *sorted(pieces)]
        self.id = {piece: i for i, piece in enumerate(self.pieces)}

    @staticmethod
    def cut(text: str) -> list[str]:
        return re.findall(r" ?(?:[A-Z]?[a-z]+|\d+|[^\sA-Za-z\d])", " " + text)

    def encode(self, text: str) -> list[int]:
        return [self.id[piece] for piece in self.cut(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids if i > self.EOS).strip()

    def prompt(self, row: Row) -> list[int]:
        return [self.BOS, *self.encode(f"{row.prompt} {row.input}")]

    def example(self, row: Row) -> tuple[list[int], list[int]]:
        return self.prompt(row), [*self.encode(row.answer), self.EOS]


def answer_loss(model: Transformer, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """L = - mean over the tokens t of the answers of log p(w_t | prompt, w_<t).

    inputs, labels int64 [B, T]; labels are IGNORE in the prompts (`minilm.data.prompt_masked`)."""
    return linear_cross_entropy(model.hidden(inputs), model.lm_head.weight, labels, IGNORE)


class Group(NamedTuple):
    """Examples of like length, so that a step's rows fit together."""

    examples: list[tuple[list[int], list[int]]]
    weight: float  # how often a step is drawn from it


def by_length(words: Words, rows: Sequence[Row], weight: float = 1.0) -> list[Group]:
    """The rows in groups whose weights add up to `weight`, in proportion to their rows."""
    groups = {}
    for row in rows:
        prompt, answer = words.example(row)
        groups.setdefault((len(prompt) + len(answer)) // 8, []).append((prompt, answer))
    return [Group(group, weight * len(group) / len(rows)) for group in groups.values()]


def train(
    model: Transformer,
    groups: Sequence[Group],
    steps: int,
    order: torch.Generator,
    batch: int = 32,
    lr: float = 5e-3,
    weight_decay: float = 0.01,
) -> Iterator[int]:
    """Each step reads `batch` rows of one group, drawn by weight. Yields the number of steps done,
    before each step and at the end, so that the caller may look at the model."""
    optimizers = make_optimizers(model, "adamw", lr, weight_decay)
    streams = [batches(len(group.examples), batch, order) for group in groups]
    weights = torch.tensor([group.weight for group in groups])
    chosen = torch.multinomial(weights, steps, replacement=True, generator=order).tolist()
    for step, at in enumerate(progress(chosen, "steps")):
        yield step
        rows = [groups[at].examples[i] for i in next(streams[at]).tolist()]
        set_lr(optimizers, schedule(step, steps, "cosine", warmup=steps // 20, final=0.05))
        take_step(answer_loss(model, *prompt_masked(rows)), model, optimizers)
    yield steps


# --- 2. ask, and take what is said at the end for the answer


def parse(text: str, label: str) -> str | None:
    """The answer that a generated text gives, of the label's kind; None if it gives none.

    Only what follows the last "Therefore" counts: a premise in a chain of thought may well hold the
    right year for the wrong reason. By hand: test_what_counts_as_the_answer_of_a_text."""
    text = text.rsplit("Therefore", 1)[-1]
    if label in ("Yes", "No"):
        found = re.search(r"\b(?:Yes|No)\b", text)  # whole words: NomadicEclipse is no No
    elif re.fullmatch(r"(?:19|20)\d\d", label):
        # (\b would miss 2010 in Chinese, whose letters have no gaps between them)
        found = re.search(r"(?<!\d)(?:19|20)\d\d(?!\d)", text)
    else:
        bare = text.strip().rstrip(".!?。！？").strip()
        return unicodedata.normalize("NFC", bare) or None
    return found[0] if found else None


def ask(model: Transformer, words: Words, rows: Sequence[Row], new: int = 20) -> list[str]:
    """The model's greedy answers, of at most `new` tokens."""
    prompts = [words.prompt(row) for row in rows]
    texts = generate(model, prompts, new, eos_id=words.EOS)
    return [words.decode(ids[len(prompt) :]) for prompt, ids in zip(prompts, texts)]


def is_right(rows: Sequence[Row], texts: Sequence[str]) -> list[bool]:
    return [parse(text, row.label) == row.label for row, text in zip(rows, texts)]


def share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def accuracy(model: Transformer, words: Words, rows: Sequence[Row], new: int = 20) -> float:
    return share(is_right(rows, ask(model, words, rows, new)))


# --- 3. pretraining: an old world, of which everything is told

LEVELS = {"simple": ("aa", "ar", "rr"), "hard": ("aa-hard", "ar-hard", "rr-hard")}


def everything(w: BirthYears, level: str = "simple", relations: bool = True) -> list[Row]:
    """Every row of every setting, and the targets too, with and without a chain of thought. Without
    `relations` those that are answered with a bare Yes or No are left out."""
    rows = []
    for task in LEVELS[level]:
        targets = make_task(w, task).targets
        for setting in SETTINGS if level == "simple" else SETTINGS[:2]:
            rows += build(w, task, setting)[0]
        rows += w.rows([fact for fact, _ in targets])
        if level == "simple":
            for t in range(len(w.style.translate)):
                rows += [w.hinted(task, fact, via, t) for fact, via in targets]
    if level == "simple":
        for setting in SETTINGS[:2]:
            for half in build_xling(w, setting):
                rows += half
    if not relations:
        rows = [row for row in rows if not is_bare(row)]
    once = {(row.prompt, row.input): row for row in rows}
    return list(once.values())


def is_bare(row: Row) -> bool:
    """A Yes or No with nothing before it: a comparison that is made in silence."""
    return "Therefore" not in row.answer and bool(re.search(r"\b(Yes|No)\b", row.answer))


def in_context(w: BirthYears, level: str = "simple") -> list[Row]:
    """Every target with its two premises in the prompt."""
    tasks = (*LEVELS[level], "xling") if level == "simple" else LEVELS[level]
    return [row for task in tasks for row in contexts(w, task)]


def make_worlds(seed: int, k: int, old_k: int) -> tuple[BirthYears, BirthYears, list[str]]:
    """The new world, the old one, and the names that nobody in either has. All share the parts of
    names, as the published names do."""
    names = [first + second for first in FIRST for second in SECOND]
    random.Random(f"{seed}/names").shuffle(names)

    def take(count: int) -> list[str]:
        return [names.pop() for _ in range(count)]

    new = BirthYears(take(YEARS * (2 * k + 1)), k, MINI, f"{seed}/new")
    old = BirthYears(take(YEARS * (2 * old_k + 1)), old_k, MINI, f"{seed}/old")
    return new, old, names


def vocabulary(old: BirthYears) -> Words:
    """Of both levels, so that every base reads the same pieces."""
    rows = []
    for level in LEVELS:
        rows += everything(old, level) + in_context(old, level)
    return Words(rows)


def new_model(words: Words, gen: torch.Generator, width: int = 64, layers: int = 2) -> Transformer:
    shape = ModelConfig(
        vocab_size=len(words.pieces),
        hidden_size=width,
        intermediate_size=8 * width // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.05,
        tie_word_embeddings=True,
        model_type="llama",
    )
    return Transformer(shape, gen)


def old_rows(
    words: Words,
    old: BirthYears,
    names: Sequence[str],
    seed: int,
    level: str = "simple",
    relations: bool = False,
    fresh: int = 60,
) -> list[Group]:
    """What stands for pretraining: three quarters of the steps tell about the old world, a quarter
    lets the model reason from premises in the prompt (`fresh` worlds, whose persons are drawn from
    one set of names; so a name has no birth year of its own, only the one that the prompt gives).

    Without `relations` nothing in the old world is compared in silence, by a bare Yes or No about
    persons who are known: a base that had read such answers combined R+R in a pilot (67 to 76%).
    The paper's question is asked of a model that was not trained to do just this; the experiment
    has the other base as an arm (R3)."""
    rng = random.Random(f"{seed}/fresh")
    context = []
    for i in range(fresh):
        w = BirthYears(rng.sample(names, 3 * YEARS), 1, MINI, f"{seed}/fresh {i}")
        context += in_context(w, level)
    told = by_length(words, everything(old, level, relations), 0.75)
    return told + by_length(words, context, 0.25)


def with_replay(rows: list[Group], old: list[Group], replay: float) -> list[Group]:
    """New rows, and old ones in a share `replay` of the steps: a tiny model forgets."""
    return rows + [Group(group, replay * weight) for group, weight in old]


# --- look inside


def walk_through(model: Transformer, words: Words, w: BirthYears, fact: Fact) -> dict:
    """One A+A pair -> what is asked, what is due and what the model says, by name: both premises,
    the target, the target with both premises in the prompt, and after the hint."""
    first, second = w.premises(fact, None)
    rows = {
        "premise 1": w.ask(first),
        "premise 2": w.ask(second),
        "target": w.ask(fact),
        "in context": w.in_context(fact, None),
        "chain": w.hinted("aa", fact, None),
    }
    said = ask(model, words, list(rows.values()))
    return {name: (row.prompt, row.answer, text) for (name, row), text in zip(rows.items(), said)}


def show(table: dict, names: Sequence[str]) -> None:
    for name in names:
        prompt, due, said = table[name]
        mark = "" if said == due else f"   [due: {due}]"
        print(f"  {name:11} {prompt} -> {said}{mark}")


# --- run it


@dataclass(frozen=True)
class Config:
    base_steps: int = 2000  # steps on the old world
    steps: int = 1200  # steps on the new world's rows
    entities: int = 3  # X and Y persons per birth year (the paper has 10)
    seed: int = 100  # of names, worlds, weights and order
    quick: bool = False  # a few steps: seconds, and a model that knows nothing


def main(cfg: Config) -> None:
    if cfg.quick:
        cfg = replace(cfg, base_steps=3, steps=3)
    new, old, names = make_worlds(cfg.seed, cfg.entities, 4)
    words = vocabulary(old)
    rows = {setting: build(new, "aa", setting) for setting in ("separate", "cot")}
    shown = rows["cot"][0][-1]
    print("A training row; what stands behind the arrow is learned:")
    print(f"  {shown.prompt} -> {shown.answer} </s>\n")

    told = old_rows(words, old, names, cfg.seed)
    base = new_model(words, generator(cfg.seed, "init simple"))
    for _ in train(base, told, cfg.base_steps, generator(cfg.seed, "base order simple")):
        pass
    models = {}
    for setting, (train_rows, _) in rows.items():
        model = copy.deepcopy(base)
        groups = with_replay(by_length(words, train_rows, 0.4), told, 0.6)
        for _ in train(model, groups, cfg.steps, generator(cfg.seed, f"order aa {setting} 1")):
            pass
        models[setting] = model

    fact = make_task(new, "aa").targets[0][0]
    print(f"{fact.a} and {fact.b}: what the model says [due: the right answer, if it differs]")
    print("trained on premises in separate samples:")
    table = walk_through(models["separate"], words, new, fact)
    show(table, ["premise 1", "premise 2", "target", "in context"])
    print("trained with chains of thought of other persons as well:")
    table = walk_through(models["cot"], words, new, fact)
    show(table, ["premise 1", "premise 2", "chain"])

    print("\nright answers       premises   targets (chance .5)   with both premises in the prompt")
    context = contexts(new, "aa")
    for setting, (_, test) in rows.items():
        target = [row for row in test if row.kind == "target"]
        premises = [row for row in test if row.kind != "target"]
        scores = [accuracy(models[setting], words, x) for x in (premises, target, context)]
        print("{:20}{:8.2f}{:10.2f}{:31.2f}".format(setting, *scores))
    print("One model: this proves nothing. Seeds, controls: methods/experiments/ockr.py")


if __name__ == "__main__":
    cli(main, Config)
