"""OCKR: does it hold? The paper is methods/ockr.py, its tasks are in methods/ockr_tasks.py, the
claims and the figure in experiments/ockr_claims.py.

One base model per seed, which has read the old world only; every arm trains a copy of it on the
rows of one task in one setting, all of them equally long, and is asked for the premises and for
what follows from them.

    aa, ar, rr      separate, adjacent, crd, cot: the paper's (see ockr_tasks)
    rr random       crd whose conclusions are yes or no by lot: what is in the format alone
    xling           separate, adjacent: a year in English and a name in both languages => the year
                    in Clone; untranslated: without the names' translations
    (--full)        aa-hard, ar-hard, rr-hard: the hard level
                    oracle: half of the targets are trained
                    x3: three times the steps
                    compare: a base that has learned to compare persons in silence
    --more-seeds    eight seeds of the simple arms and of the oracles

Beside every target: both premises in the prompt (context), Yes and No apart, the more probable of
the possible answers (candidates); in chains whether the right facts are retrieved, and what is
answered when the first of them is put into the model's mouth (given).

Run     python methods/experiments/ockr.py                # 2 CPU cores, about 12 minutes
        python methods/experiments/ockr.py --more-seeds   # about 28
        python methods/experiments/ockr.py --full         # about 30
Honest  - A tiny model (0.11 million weights, all of them trained; no LoRA), three-word sentences,
          3 X and 3 Y a year (the paper: 10). AdamW with betas (.9, .95), not the Trainer's .999.
        - An "old world" of other persons stands for pretraining. It teaches formats, chains and
          reasoning from premises in the prompt, and is replayed, since a tiny model forgets.
        - The old world has no bare yes or no: in pilots on seed 100 a base that had them combined
          R+R (67 to 76%), and they were left out because of it. In run 4 they made no difference
          (R3: .53 against .48). All else was chosen for recall of premises, the control in context
          and A+A's chain.
        - All arms of a task take the same number of steps, so those with more rows read each of
          them less often. Arms of a seed share base, steps and replay; their rows differ.
        - "not grandparents" pairs of R+R hard are trained here; the published probes of them are
          200 pairs that are never trained.
        - Until run 4 the oracle's trained targets were asked in an order of names that half of them
          were not trained in.
        - Intervals are over seeds. A seed "has combined" if the 99.9% Wilson interval of its target
          lies above chance: a claim looks at up to 24 models, of which 95% would call one by luck.
Runs    run  seeds  held                  failed, and why
        1    0-3    C1 C2 C4 C6           C3 C5 G: R+R crd knew 92% of its premises, xling adjacent
                                          was asked about bare names, which its rows never show
        2    10-13  C1 C2 C5              C3: R+R crd combined in two seeds of four (.77, .83); G,
                                          C4: R+R cot knew 90%; C6, C4: one base could not compare
                                          two years in its prompt (.47)
        3    20-23  C4 C5 C6              C1 C2 C3: one seed of R+R separate knew 61%
        4    30-33  G C1 to C6, H1, R2    R1 R3. A quarter of the relation chains was false, cells
                                          stopped at different steps, intervals pooled questions
        5    50-53  C1 C4r C4a C5         true chains, equal steps, names abroad by lot. Frozen
                                          after seeds 100, 101: premises .996, context 1.00.
                                          C4, C6 undecided: seed 50 compares two years in its prompt
                                          in .90 of the cases (in .73 once trained on chains), so
                                          its A+A chain retrieves .93 and answers .53 (others .86 to
                                          .96). C5c: without the names' translations one model of
                                          four answers 9 of 60 years (chance 3), why is not known.
                                          C3r: rr random knows .97 of its premises
        5    50-57  C1 C2 C4a C5 C6       --more-seeds. C3, C3r, C4r, C4b, R1 not tested: in one
                                          seed R+R's crd, cot and oracle know .89, .64, .84 of their
                                          premises. C4 undecided: .89 [.77, 1.02], seed 50 alone.
                                          C5n undecided, C5c as before
        5    50-53  R2 R2x                --full. R3 not reproduced: a base that has compared in
                                          silence combines no relations. R2c undecided: with three
                                          times the steps complete reasoning data teach R+R in two
                                          seeds of four (.93, .66). H1a not tested (years of "older
                                          than" are compared in the prompt in .68), H1r not tested,
                                          H1t undecided
        What each run changed:
        1       entities 4, old_entities 3, base_steps 1500, steps 800, replay .4, lr 3e-3
        1 -> 2  steps of crd 800 -> 1200; xling adjacent is asked what its rows show
        2 -> 3  entities 4 -> 3, old_entities 3 -> 4, base_steps 1500 -> 2000, steps 800 -> 600
                (crd 1200 -> 600), each row read 14 times at least (R+R crd had been 16),
                replay .4 -> .6, lr 3e-3 -> 5e-3
        3 -> 4  rounds 1 -> 3: a cell trains again until it knows 98% of its premises
        4 -> 5  CHANGED in this file, which the script prints
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from methods.experiments.ockr_claims import CLAIMS, FINDING, claims, figure, headline
from methods.ockr import (
    Group,
    Words,
    accuracy,
    ask,
    by_length,
    everything,
    in_context,
    is_bare,
    is_right,
    make_worlds,
    new_model,
    old_rows,
    parse,
    share,
    train,
    vocabulary,
    with_replay,
)
from methods.ockr_tasks import (
    FIRST,
    MINI,
    PATTERNS,
    SECOND,
    SETTINGS,
    YEARS,
    BirthYears,
    Row,
    build,
    contexts,
    make_task,
)
from minilm import InputError
from minilm.claims import key, print_claims
from minilm.data import generator
from minilm.evaluate import continuation_logprobs
from minilm.results import (
    Outcome,
    check_arms,
    check_range,
    cli,
    print_metrics,
    run_seeds,
    save_results,
)
from minilm.transformer import Transformer

PAPER = "Out-of-context knowledge reasoning, Findings of EMNLP 2024, arXiv 2406.07393"
SEEDS = (50, 51, 52, 53)
MORE_SEEDS = (50, 51, 52, 53, 54, 55, 56, 57)
CHANCE = {"aa": 1 / 2, "ar": 1 / YEARS, "rr": 1 / 2, "xling": 1 / YEARS}

__all__ = ["CLAIMS", "FINDING", "Config", "claims", "depends", "figure", "headline", "main", "run"]


# --- arms


class Arm(NamedTuple):
    """A model: what it is trained on, from which base, how long."""

    task: str  # aa, ar, rr, xling, or aa-hard, ...
    setting: str  # separate, adjacent, crd, cot, or a control: oracle, random, untranslated
    change: str = ""  # x3, compare

    @property
    def pattern(self) -> str:
        return self.task.partition("-")[0]

    @property
    def level(self) -> str:
        return self.task.partition("-")[2] or "simple"

    @property
    def times(self) -> int:
        return 3 if self.change == "x3" else 1


PUBLISHED = [Arm(task, setting) for task in PATTERNS for setting in SETTINGS]
CORE = [
    *PUBLISHED,
    Arm("rr", "random"),
    Arm("xling", "separate"),
    Arm("xling", "adjacent"),
    Arm("xling", "untranslated"),
]
ORACLES = [Arm(task, "oracle") for task in PATTERNS]
REST = [
    *(Arm(f"{task}-hard", setting) for task in PATTERNS for setting in SETTINGS[:2]),
    *(Arm(task, "separate", "x3") for task in (*PATTERNS, "xling")),
    Arm("rr", "crd", "x3"),
    Arm("rr", "separate", "compare"),
]
ARMS = {key(arm): arm for arm in (*CORE, *ORACLES, *REST)}
DEFAULT = tuple(map(key, CORE))
MORE = tuple(map(key, (*CORE, *ORACLES)))


@dataclass(frozen=True)
class Config:
    cells: tuple[str, ...] = DEFAULT  # what to train, TASK SETTING: see ARMS
    seeds: tuple[int, ...] = SEEDS  # one world, base model and set of cells per seed
    entities: int = 3  # X and Y persons per birth year in the new world (the paper has 10)
    old_entities: int = 4  # the same, in the old world, which stands for pretraining
    base_steps: int = 2000  # steps on the old world
    steps: int = 1200  # steps of every cell, at least
    epochs: int = 20  # times that a task's largest cell reads each of its rows, at least
    batch: int = 32  # rows per step
    replay: float = 0.6  # share of a cell's rows that are drawn from the old world again
    lr: float = 5e-3  # peak learning rate
    weight_decay: float = 0.01  # AdamW
    width: int = 64  # model width
    layers: int = 2  # blocks
    points: int = 6  # measurements of the target along the way, for the figure
    quick: bool = False  # smoke run: a few steps, one seed
    full: bool = False  # every cell of ARMS: hard levels, controls, long runs
    more_seeds: bool = False  # eight seeds of the simple level and the oracles
    workers: int | None = None  # seeds at a time (default: one per core)
    out: str | None = None  # folder for results in place of results/ or runs/


CHANGED = {  # settings of run 4, to be held against the present ones
    "seeds": (30, 31, 32, 33),
    "entities": 3,
    "old_entities": 4,
    "base_steps": 2000,
    "steps": 600,
    "epochs": 14,
    "batch": 32,
    "replay": 0.6,
    "lr": 5e-3,
    "weight_decay": 0.01,
    "width": 64,
    "layers": 2,
    "points": 8,
}
REMADE = [  # and what has no setting
    "a cell stopped when it knew 98% of its premises (--rounds 3) -> all of a task train equally",
    "epochs counted a cell's own rows -> those of its task's largest cell",
    "a quarter of the relation chains was false -> none",
    "names abroad were spelled backwards -> their parts are drawn",
    "the base reads years abroad in context as well",
]


def changes(cfg: Config) -> list[str]:
    """Every setting that is not run 4's, old and new."""
    now = asdict(cfg)
    moved = [f"{name} {old} -> {now[name]}" for name, old in CHANGED.items() if now[name] != old]
    return moved + REMADE


# --- one seed


class Base(NamedTuple):
    model: Transformer
    told: list[Group]  # what it has read, to be replayed


def run(cfg: Config, seed: int) -> Outcome:
    """All cells of one seed start from the same base model, which has read the old world only."""
    new, old, names = make_worlds(seed, cfg.entities, cfg.old_entities)
    words = vocabulary(old)
    bases = {}
    metrics = {}
    series = {}
    for cell in cfg.cells:
        arm = ARMS[cell]
        kind = (arm.level, arm.change == "compare")
        if kind not in bases:
            bases[kind] = make_base(cfg, seed, words, old, names, *kind)
        rows, test = questions(new, arm)
        model, series[cell] = train_cell(cfg, seed, arm, bases[kind], words, new, rows, test)
        metrics[cell] = evaluate(model, words, new, test, arm.setting == "cot")
        metrics[cell]["chance"] = CHANCE[arm.pattern]
        metrics[cell]["context"] = accuracy(model, words, contexts(new, arm.task), 6)
        if arm.pattern == "xling":  # do the names follow from a rule that the base knows?
            asked = [row for row in test if "translation" in row.kind]
            metrics[cell]["base translation"] = accuracy(bases[kind].model, words, asked, 6)
    return Outcome(metrics, series)


def make_base(cfg: Config, seed: int, words, old, names, level: str, relations: bool) -> Base:
    model = new_model(words, generator(seed, f"init {level}"), cfg.width, cfg.layers)
    fresh = 2 if cfg.quick else 60
    told = old_rows(words, old, names, seed, level, relations, fresh)
    order = generator(seed, f"base order {level}")
    for _ in train(model, told, cfg.base_steps, order, cfg.batch, cfg.lr, cfg.weight_decay):
        pass
    return Base(model, told)


def questions(w: BirthYears, arm: Arm) -> tuple[list[Row], list[Row]]:
    """(training rows, test rows) of an arm. What is asked beside the target is what its rows teach:
    in place of the published questions that they never show, what they do show."""
    rows, test = build(w, arm.task, arm.setting)
    if arm.pattern == "xling" and arm.setting != "separate":
        # adjacent never shows bare names, untranslated no translations
        untaught = ("year of X", "translation") if arm.setting == "adjacent" else ("translation",)
        for at, row in enumerate(test):
            if row.kind in untaught:
                test[at] = row._replace(kind=f"bare {row.kind}")
        if arm.setting == "adjacent":
            test += [row._replace(kind="year of X") for row in rows[: len(w.x)]]
    if arm.pattern == "aa":
        test += format_rows(w, arm, rows, test)
    return rows, test


def format_rows(w: BirthYears, arm: Arm, rows: Sequence[Row], test: Sequence[Row]) -> list[Row]:
    """A+A's target is a yes/no question, its premises are none: is it known how such a question is
    answered? Those that are trained, in the first paraphrase, Yes and No apart."""
    form = make_task(w, arm.task).targets[0][0].form
    asked = {row.prompt for row in test}  # the oracle's trained targets
    found = []
    for row in rows:
        first = row.prompt.split()[0] == form and row.prompt.count("?") == 1
        if first and is_bare(row) and row.prompt not in asked:
            found.append(row._replace(kind=f"format {row.label}"))
    return found


def steps_of(cfg: Config, w: BirthYears, arm: Arm) -> int:
    """The same number for every setting of a task: as many as its largest one needs to be read
    `epochs` times."""
    settings = SETTINGS
    if arm.level == "hard" or arm.pattern == "xling":
        settings = SETTINGS[:2]
    largest = max(len(build(w, arm.task, setting)[0]) for setting in settings)
    steps = round(cfg.epochs * largest / (cfg.batch * (1 - cfg.replay)))
    return arm.times * max(cfg.steps, steps)


def train_cell(cfg: Config, seed: int, arm: Arm, base: Base, words: Words, new, rows, test):
    """-> (model, its series: accuracy of target and premises along the way)"""
    model = copy.deepcopy(base.model)
    groups = with_replay(by_length(words, rows, 1 - cfg.replay), base.told, cfg.replay)
    steps = steps_of(cfg, new, arm)
    target = [row for row in test if row.kind == "target"]
    premises = [row for row in test if is_premise(row)]
    long = 20 if arm.setting == "cot" else 6  # tokens of an answer, at most
    points = []
    order = generator(seed, f"order {key(arm)}")
    for step in train(model, groups, steps, order, cfg.batch, cfg.lr, cfg.weight_decay):
        if step % max(1, steps // cfg.points) == 0:
            known = accuracy(model, words, premises, 10 if arm.setting == "adjacent" else 6)
            points.append((step, accuracy(model, words, target, long), known))
    at, targets, known = zip(*points)
    return model, {"target": (at, targets), "premises": (at, known)}


# --- what a cell knows


def is_premise(row: Row) -> bool:
    """Whether a test row asks for a premise: not for a target (the oracle's trained ones are known
    or not by a claim of their own), nor for bare names that no row shows, nor for the format."""
    return not any(word in row.kind for word in ("target", "bare", "format"))


def evaluate(model, words: Words, world: BirthYears, test: Sequence[Row], hinted: bool) -> dict:
    """Accuracy per kind of question, and what is said of the targets."""
    metrics = {}
    kinds = dict.fromkeys(row.kind for row in test)
    for kind in kinds:
        rows = [row for row in test if row.kind == kind]
        long = (hinted and kind == "target") or "(" in rows[0].answer
        texts = ask(model, words, rows, 20 if long else 6)
        metrics[kind] = share(is_right(rows, texts))
        metrics[f"n {kind}"] = len(rows)
        if kind == "target":
            metrics |= of_targets(model, words, world, rows, texts, hinted)
    premises = [row for row in test if is_premise(row)]
    metrics["premises"] = sum(metrics[row.kind] for row in premises) / len(premises)
    metrics["weakest premise"] = min(metrics[row.kind] for row in premises)
    return metrics


def of_targets(model, words: Words, world: BirthYears, rows, texts, hinted: bool) -> dict:
    """Answers that cannot be read; Yes and No apart; of chains, what they retrieve and what follows
    when the first fact is given; without a chain, the second scorer's accuracy."""
    right = is_right(rows, texts)
    metrics = {}
    metrics["unparsed"] = share([parse(text, row.label) is None for row, text in zip(rows, texts)])
    for value in sorted({row.label for row in rows} & {"Yes", "No"}):
        own = [ok for ok, row in zip(right, rows) if row.label == value]
        metrics[f"target {value}"] = share(own)
    if hinted:
        named = [retrieved(world, row, text) for row, text in zip(rows, texts)]
        metrics["retrieved"] = share(named)
        metrics["given"] = accuracy(model, words, [with_first_fact(row) for row in rows])
    else:
        metrics["candidates"] = candidate_accuracy(model, words, rows)
    return metrics


def with_first_fact(row: Row) -> Row:
    """The question of a chain, and the first fact of the answer said already:

    same AmberLeaf JadePath ? name AmberLeaf same GaleLeaf , -> GaleLeaf same JadePath . ..."""
    first, _, rest = row.answer.partition(" , ")
    return row._replace(prompt=f"{row.prompt} {first} ,", answer=rest)


def candidate_accuracy(model: Transformer, words: Words, rows: Sequence[Row]) -> float:
    """The second scorer: which of the possible answers (2, or 20 years) is the most probable?
    Nothing to parse, the same chance."""
    options = sorted({row.label for row in rows})
    pairs = []
    for row in rows:
        for option in options:
            answer = words.encode(row.answer.replace(row.label, option))
            pairs.append((words.prompt(row), [*answer, words.EOS]))
    scores = continuation_logprobs(model, pairs, batch=512).sum.view(len(rows), -1)
    best = [options[i] for i in scores.argmax(1).tolist()]
    return share([option == row.label for option, row in zip(best, rows)])


def retrieved(world: BirthYears, row: Row, text: str) -> bool:
    """Does a chain begin with the right facts?

    AmberLeaf 2003 , JadePath 2003 . Therefore Yes         both years as they are due
    AmberLeaf same GaleLeaf , GaleLeaf 2003 . Therefore .. anybody of the same year"""
    facts = text.partition(" . ")[0]
    first = facts.partition(" , ")[0].split(" ")
    if len(first) == 3 and first[1] == "same":
        a, _, b = first
        asked = row.prompt.split()[1]
        return a != b and a == asked and world.born[a] == world.born.get(b)
    return facts == row.answer.partition(" . ")[0]


# --- main


def depends(cfg: Config, seed: int) -> dict:
    """What the numbers of a seed rest on."""
    new, old, _ = make_worlds(seed, cfg.entities, cfg.old_entities)
    words = vocabulary(old)
    built = [build(new, arm.task, arm.setting) for arm in (*CORE, *ORACLES)]
    return {
        "text": everything(old) + in_context(old),
        "training": [rows[:: len(rows) // 40] for rows, _ in built],
        "exam": [test[:: len(test) // 40] for _, test in built],
        "weights": new_model(words, generator(seed, "init simple"), cfg.width, cfg.layers),
    }


def show_examples(cfg: Config) -> None:
    names = [first + second for second in SECOND for first in FIRST]
    w = BirthYears(names, cfg.entities, MINI, "example")
    print("One training row of each kind; only what stands after -> is learned:")
    kinds = ("aa separate", "rr separate", "ar adjacent", "aa cot", "ar cot", "rr cot")
    for kind in (*kinds, "xling separate"):
        row = build(w, *kind.split())[0][-1]
        print(f"  {kind:14} {row.prompt} {row.input} -> {row.answer} </s>")


def main(cfg: Config) -> dict:
    started = time.time()
    asked = cfg
    check(cfg)
    if cfg.full:
        cfg = replace(cfg, cells=tuple(ARMS))
    if cfg.more_seeds:
        cfg = replace(cfg, cells=MORE, seeds=MORE_SEEDS if cfg.seeds == SEEDS else cfg.seeds)
    if cfg.quick:
        cfg = replace(cfg, seeds=cfg.seeds[:1], base_steps=2, steps=2, epochs=0, points=1)
    show_examples(cfg)
    print("Changed since run 4:", *changes(asked), sep="\n  ")
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    results = save_results(
        __file__,
        PAPER,
        asked,
        outcomes,
        claims,
        figure,
        started,
        cfg.seeds,
        depends=depends(cfg, cfg.seeds[0]),
    )
    columns = ["premises", "weakest premise", "target", "chance", "candidates", "context"]
    print_metrics(results["metrics"], [*columns, "unparsed", "retrieved", "given"])
    print_claims(results["claims"])
    return results


def check(cfg: Config) -> None:
    check_arms(cfg, "cells", ARMS)  # (no published data have crd or cot at the hard level)
    check_range(cfg, "base_steps steps batch width layers points old_entities", least=1)
    check_range(cfg, "entities", least=2)
    check_range(cfg, "epochs weight_decay", least=0)
    check_range(cfg, "lr", above=0)
    check_range(cfg, "replay", least=0, below=1)
    persons = cfg.entities + cfg.old_entities
    if persons > 11:
        raise InputError(f"--entities {cfg.entities} and --old-entities {cfg.old_entities} are "
                         f"{persons} together, at most 11 fit: {len(FIRST) * len(SECOND)} names")


if __name__ == "__main__":
    cli(main, Config)
