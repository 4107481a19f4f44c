"""Large Language Models are Limited in Out-of-Context Knowledge Reasoning
(Peng Hu, Changjiang Gao, Ruiqi Gao, Jiajun Chen, Shujian Huang, Findings of EMNLP 2024), https://arxiv.org/abs/2406.07393

Idea    A model is trained on two facts until it answers both. Does it then know what follows from them? The answer is asked for with
        nothing but the question in the prompt ("out of context"). Three patterns of premises (A: a person's attribute, R: a relation):
            A+A->R  born(y) = 2003, born(z) = 2003         =>  same-year(y, z)?
            A+R->A  same-year(y, z), born(z) = 2003        =>  born(y)?
            R+R->R  same-year(x, y), same-year(x, z)       =>  same-year(y, z)?
        The data construction is the method and has its own file, methods/ockr_tasks.py; training is plain supervised fine-tuning.
        Settings: premises in separate samples; also adjacent, in one sample; with complete reasoning data (crd: for other persons the
        conclusion is trained too); with chain of thought (cot: a hint asks to write the premises down first). A fourth task crosses
        languages: fact in English + translated name.
Claims  C1 separate: chance; C2 adjacent: chance; C3 crd: chance; C4 cot repairs A+A and nothing else; C5 cross-lingual: far below both
        premises; C6 in-context control; G memorisation control. With --full: H1 hard level; R1 oracle control; R2 three times the steps;
        R3 what might break the finding.
Run     python methods/experiments/ockr.py                     # 2 CPU cores, 9 minutes: table + figure; --full 18
        python methods/real/ockr.py --help         # the published files, a real checkpoint, LoRA; or build all files at the paper's size
Honest  A tiny model (0.11M parameters, all of them trained; no LoRA) and three-word sentences. An "old world" of other persons stands for
        pretraining: it teaches formats, chains and reasoning from premises in the prompt, and is replayed, since a tiny model forgets.
        It holds no bare yes/no questions: in pilots on seed 100 a base that had them combined R+R->R (67-76%), and they were left out
        because of it. In run 4 they make no difference (R3: .53 against .48). All other settings were chosen for premise recall, the
        context control and A+A's chain of thought. Cells of a seed share base model and replay; only their rows differ, and with them
        their steps. C3 holds on the mean: R+R crd reaches .64 and .62 in the two seeds that trained longest. H1: "older" is answered in
        69% with both years in the prompt, and who knows only z's year could be right in 85%; still the model is at chance. Not
        reproduced: R1, as a trained half is known to .85 (A+A) and .95 (R+R) only; the other half does not move.
        This is run 4 (seeds 30-33). Run 1 (seeds 0-3) held C1, C2, C4, C6; C3, C5 and G failed at the gate: R+R crd knew 92% of its
        premises, and cross-lingual adjacent was asked about bare names, which its rows never show (still reported). Run 2 (seeds 10-13)
        held C1, C2, C5; R+R crd combined in two seeds of four (.77, .83; C3), R+R cot knew 90% of its premises (G, C4), and one base had
        not learned to compare two years in its prompt (.47; C6, C4). Run 3 (seeds 20-23; a longer base on more persons, a higher rate,
        every row read 14 times) held C4 to C6, and every target was at chance, but one seed of R+R separate knew 61% of its premises, so
        that C1 to C3 failed at the gate. Run 4 alone trains a cell again, up to twice, until it knows 98% of its premises.
Try     with --seeds 100 --cells "aa separate" "aa cot" (targets .42, .94)  --old-entities 1: .49, .75; who has seen few persons recall
        their years in a chain does it for new ones half of the time (retrieved: .53, else .91).
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from methods.ockr import (
    Group,
    Words,
    accuracy,
    ask,
    by_length,
    in_context,
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
from methods.ockr_tasks import FIRST, MINI, PATTERNS, SECOND, SETTINGS, YEARS, BirthYears, Row, build, make_task
from minilm import InputError
from minilm.claims import claim, print_claims, wilson
from minilm.data import generator
from minilm.evaluate import continuation_logprobs
from minilm.results import COLORS, Outcome, bar_seeds, cli, new_figure, plot_seeds, print_metrics, run_seeds, save_results
from minilm.transformer import Transformer

PAPER = "Out-of-context knowledge reasoning, Findings of EMNLP 2024, arXiv 2406.07393"
KNOWN = 0.98  # recall of its premises at which a cell stops training
DEFAULT = (*(f"{task} {setting}" for task in PATTERNS for setting in SETTINGS), "xling separate", "xling adjacent")
FULL = (*DEFAULT, *(f"{task}-hard {setting}" for task in PATTERNS for setting in SETTINGS[:2]), *(f"{task} oracle" for task in PATTERNS),
        *(f"{task} separate x3" for task in PATTERNS), "rr separate compare")


@dataclass(frozen=True)
class Config:
    cells: tuple[str, ...] = DEFAULT  # what to train: TASK SETTING; --full adds hard levels, controls (oracle) and long runs (x3)
    seeds: tuple[int, ...] = (30, 31, 32, 33)  # one world, base model and set of cells per seed
    entities: int = 3  # X and Y entities per birth year in the new world (the paper has 10)
    old_entities: int = 4  # the same, in the old world, which stands for what a model knows from pretraining
    base_steps: int = 2000  # steps on the old world
    steps: int = 600  # steps on the rows of one cell, at least
    epochs: int = 14  # times that a cell reads each of its rows, at least: cells with many rows take more steps
    rounds: int = 3  # a cell that does not know 98% of its premises by then is trained again, up to this many times in all
    batch: int = 32  # rows per step
    replay: float = 0.6  # share of a cell's rows that are drawn from the old world again: a tiny model forgets
    lr: float = 5e-3  # peak learning rate
    weight_decay: float = 0.01  # AdamW
    width: int = 64  # model width
    layers: int = 2  # blocks
    points: int = 8  # measurements of the target along the way, for the figure
    quick: bool = False  # smoke run: a few steps, one seed
    full: bool = False  # every cell of FULL: hard levels, controls, long runs
    workers: int | None = None  # seeds at a time (default: one per core)
    out: str | None = None  # folder for results in place of results/ or runs/



# --- one training example of each kind


def show_example(cfg: Config) -> None:
    names = [first + second for second in SECOND for first in FIRST]
    w = BirthYears(names, cfg.entities, MINI, "example")
    print("One training row of each kind; only what stands after -> is learned:")
    kinds = ("aa separate", "rr separate", "ar adjacent", "aa cot", "ar cot", "xling separate")
    for kind in kinds:
        row = build(w, *kind.split())[0][-1]
        print(f"  {kind:14} {row.prompt} {row.input} -> {row.answer} </s>")


# --- one seed


class Arm(NamedTuple):
    task: str  # aa, ar, rr, xling, or aa-hard, ...
    setting: str  # separate, adjacent, crd, cot, oracle
    change: str = ""  # x3: three times the steps; compare: a base that has seen bare yes/no answers


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
        arm = Arm(*cell.split())
        level = "hard" if arm.task.endswith("hard") else "simple"
        kind = (level, arm.change == "compare")
        if kind not in bases:
            bases[kind] = make_base(cfg, seed, words, old, names, *kind)
        rows, test = questions(new, arm)
        model, points, rounds = train_cell(cfg, seed, cell, bases[kind], words, rows, test)
        metrics[cell] = evaluate(model, words, new, test, arm.setting == "cot")
        metrics[cell]["rounds"] = rounds
        if arm.setting == "separate" and arm.task != "xling":
            context = [new.in_context(fact, via) for fact, via in make_task(new, arm.task).targets]
            metrics[cell]["context"] = accuracy(model, words, context, 6)
        steps, target, premises = zip(*points)
        series[cell] = {"target": (steps, target), "premises": (steps, premises)}
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
    """(training rows, test rows) of a cell."""
    rows, test = build(w, arm.task, arm.setting)
    if (arm.task, arm.setting) == ("xling", "adjacent"):
        # the published test asks about bare names, these rows never do: recall is of what is taught
        for at, row in enumerate(test):
            if row.kind != "target":
                test[at] = row._replace(kind=f"bare {row.kind}")
        test += [row._replace(kind="year of X") for row in rows[: YEARS * w.k]]
    return rows, test


def train_cell(cfg: Config, seed: int, cell: str, base: Base, words: Words, rows, test):
    """-> (model, points along the way, rounds)"""
    model = copy.deepcopy(base.model)
    groups = with_replay(by_length(words, rows, 1 - cfg.replay), base.told, cfg.replay)
    steps = max(cfg.steps, round(cfg.epochs * len(rows) / (cfg.batch * (1 - cfg.replay))))
    if cell.endswith("x3"):
        steps *= 3
    target = [row for row in test if row.kind == "target"]
    premises = [row for row in test if is_premise(row)]
    points = []
    rounds = 0
    while rounds < cfg.rounds:  # the premises decide how long, never the target
        rounds += 1
        order = generator(seed, f"order {cell} {rounds}")
        for step in train(model, groups, steps, order, cfg.batch, cfg.lr, cfg.weight_decay):
            if rounds == 1 and step % max(1, steps // cfg.points) == 0:
                scores = [accuracy(model, words, asked) for asked in (target, premises)]
                points.append((step, *scores))
        if accuracy(model, words, premises) >= KNOWN:
            break
    return model, points, rounds


# --- what a cell knows


def is_premise(row: Row) -> bool:
    return "target" not in row.kind and "bare" not in row.kind


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
    """Answers that cannot be read, Yes and No apart, what a chain retrieves; without a chain the
    second scorer's accuracy."""
    right = is_right(rows, texts)
    metrics = {}
    metrics["unparsed"] = share([parse(text, row.label) is None for row, text in zip(rows, texts)])
    for value in sorted({row.label for row in rows} & {"Yes", "No"}):
        own = [ok for ok, row in zip(right, rows) if row.label == value]
        metrics[f"target {value}"] = share(own)
    if hinted:
        named = [retrieved(world, row, text) for row, text in zip(rows, texts)]
        metrics["retrieved"] = share(named)
    else:
        metrics["candidates"] = candidate_accuracy(model, words, rows)
    return metrics


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

    AmberFern 2003 , JadePath 2003 . Therefore Yes         both years as they are due
    AmberFern same GaleLeaf , GaleLeaf 2003 . Therefore .. anybody of the same year"""
    facts = text.partition(" . ")[0]
    first = facts.partition(" , ")[0].split(" ")
    if len(first) == 3 and first[1] == "same":
        a, _, b = first
        asked = row.prompt.split()[1]
        return a != b and a == asked and world.born[a] == world.born.get(b)
    return facts == row.answer.partition(" . ")[0]


# --- claims

CHANCE = {"aa": 1 / 2, "ar": 1 / YEARS, "rr": 1 / 2, "xling": 1 / YEARS}
GATE = 0.95  # premises must be known before the targets mean anything


def chance(cell: str) -> float:
    return CHANCE[cell.split()[0].removesuffix("-hard")]


def claims(metrics: dict) -> list[dict]:
    """Decided on means over seeds; the thresholds were fixed before the default seeds ran. Beside each target: its 95% Wilson interval over
    all seeds' questions, and in brackets the recall of the premises."""
    mean = lambda cell, name="target": metrics[cell][name]["mean"]
    settings = lambda setting, level="": [f"{task}{level} {setting}" for task in PATTERNS]
    known = lambda *cells: all(mean(cell, "premises") >= GATE for cell in cells)
    at_chance = lambda cell: abs(mean(cell) - chance(cell)) <= 0.10
    unmoved = lambda setting, level="": (known(*settings(setting, level), *settings("separate", level)) and all(
        abs(mean(cell) - mean(base)) <= 0.10 for cell, base in zip(settings(setting, level), settings("separate", level))))

    def shown(cell: str, name: str = "target") -> str:
        n = round(mean(cell, "n trained target" if name == "trained target" else "n target") * len(metrics[cell][name]["values"]))
        low, high = wilson(round(mean(cell, name) * n), n)
        return f"{cell} {mean(cell, name):.3f} [{abs(low):.3f}, {high:.3f}] ({mean(cell, 'premises'):.3f})"

    def row(id, statement, rule, cells, test, paper=None, names=("target",)):
        if missing := [cell for cell in cells if cell not in metrics]:
            return claim(id, statement, rule, f"not in this run: {', '.join(missing)}", None, paper)
        return claim(id, statement, rule, "; ".join(shown(cell, name) for name in names for cell in cells), test(), paper)

    gate, here = f"premises >= {GATE} in each", list(metrics)
    two, hard = [*settings("adjacent"), *settings("separate")], [*settings("separate", "-hard"), *settings("adjacent", "-hard")]
    long, foreign = settings("separate x3"), ["xling separate", "xling adjacent"]
    return [
        row("G", "Memorisation control: every cell knows its premises", gate, here, lambda: known(*here)),
        row("C1", "What follows from two facts is not known, though both facts are", f"{gate}; |target - chance| <= 0.10",
            settings("separate"), lambda: known(*settings("separate")) and all(map(at_chance, settings("separate"))), "random level"),
        row("C2", "Nor when both facts stand in one sample", f"{gate}; |adjacent - separate| <= 0.10", two, lambda: unmoved("adjacent"),
            "no noticeable change"),
        row("C3", "Nor when for other persons the conclusion is trained too", f"{gate}; |crd - separate| <= 0.10", settings("crd"),
            lambda: all(cell in metrics for cell in two) and unmoved("crd"), "no noticeable change"),
        row("C4", "Writing the facts down first repairs what rests on attributes, not what must retrieve a relation", f"{gate}; aa cot >= "
            "0.85 and >= aa separate + 0.25; ar cot <= 0.20; rr cot <= 0.65", [*settings("cot"), "aa separate"],
            lambda: known(*settings("cot")) and mean("aa cot") >= max(0.85, mean("aa separate") + 0.25) and mean("ar cot") <= 0.20
            and mean("rr cot") <= 0.65, "A+A repaired, A+R and R+R at random level"),
        row("C5", "A year known in English and a name known in both do not give the year in Clone",
            f"{gate}; year in Clone <= half of the weaker premise", foreign, lambda: known(*foreign) and
            all(mean(cell) <= mean(cell, "weakest premise") / 2 for cell in foreign), "far below both premises"),
        row("C6", "With both facts in the prompt the same questions are answered", "context >= 0.90 for each pattern", settings("separate"),
            lambda: min(mean(cell, "context") for cell in settings("separate")) >= 0.90, "in-context reasoning is intact", ("context",)),
        row("H1", "C1 and C2 at the hard level", f"{gate}; separate: |target - chance| <= 0.10; |adjacent - separate| <= 0.10", hard,
            lambda: known(*hard) and all(map(at_chance, settings("separate", "-hard"))) and unmoved("adjacent", "-hard"), "random level"),
        row("R1", "Oracle: trained targets are answered, and the other half does not move", f"{gate}; trained half >= 0.95; other half: "
            "|target - chance| <= 0.10", settings("oracle"), lambda: known(*settings("oracle")) and all(
                mean(c, "trained target") >= 0.95 and at_chance(c) for c in settings("oracle")), None, ("trained target", "target")),
        row("R2", "Three times as many steps do not change C1", f"{gate}; |target - chance| <= 0.10", long,
            lambda: known(*long) and all(map(at_chance, long))),
        row("R3", "A base model that has learned to compare years silently does combine relations", f"{gate}; rr separate compare >= rr "
            "separate + 0.10", ["rr separate compare", "rr separate"], lambda: known("rr separate compare", "rr separate")
            and mean("rr separate compare") >= mean("rr separate") + 0.10),
    ]


# --- figure

def figure(results: dict):
    """Left: what the cells know (premises) and what they make of it (targets). Right: the targets during training."""
    metrics, cells = results["metrics"], [cell for cell in results["metrics"] if "hard" not in cell and len(cell.split()) == 2]
    fig, (left, right) = new_figure(1, 2, width=14, height=5.6)
    for i, cell in enumerate(cells):
        bar_seeds(left, i - 0.2, metrics[cell]["premises"]["values"], COLORS[7], 0.38, None if i else "premises (trained)")
        bar_seeds(left, i + 0.2, metrics[cell]["target"]["values"], COLORS[1], 0.38, None if i else "target (implied, never trained)")
        left.plot([i, i + 0.4], [chance(cell)] * 2, color="black", linewidth=2, label=None if i else "chance")
    left.set_xticks(range(len(cells)), cells, rotation=60, ha="right", rotation_mode="anchor")
    left.set(ylabel="accuracy (dots: seeds)", title="What is trained, and what follows from it")
    for cell in [cell for cell in ("aa separate", "aa cot", "ar separate", "ar cot", "rr separate", "rr cot") if cell in results["series"]]:
        series, color = results["series"][cell]["target"], COLORS[list(PATTERNS).index(cell[:2])]
        plot_seeds(right, series["x"], series["values"], cell, color, linestyle="-" if "cot" in cell else "--")
    right.set(xlabel="step on the new world", ylabel="target accuracy (thin: seeds)", title="Targets during training (first round)")
    for ax in (left, right):
        ax.set(ylim=(0, 1.3), yticks=[0, 0.25, 0.5, 0.75, 1])
        ax.legend(loc="upper center", ncols=3)
    return fig


def main(cfg: Config) -> dict:
    started, asked = time.time(), cfg
    if cfg.full:
        cfg = replace(cfg, cells=FULL)
    if wrong := set(cfg.cells) - set(FULL):
        raise InputError(f"--cells {sorted(wrong)[0]!r} is not known: give TASK SETTING, one of {', '.join(FULL)} (no published data "
                         "have crd or cot at the hard level)")
    if not 0 <= cfg.replay < 1 or cfg.entities < 2 or cfg.old_entities < 1 or cfg.entities + cfg.old_entities > 11:
        raise InputError(f"--replay {cfg.replay} must be at least 0 and below 1, --entities {cfg.entities} at least 2, --old-entities "
                         f"{cfg.old_entities} at least 1, both together at most 11: there are {len(FIRST) * len(SECOND)} names")
    if cfg.quick:
        cfg = replace(cfg, seeds=cfg.seeds[:1], base_steps=4, steps=4, epochs=0, rounds=1, points=1)
    show_example(cfg)
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    results = save_results(__file__, PAPER, asked, outcomes, claims, figure, started, cfg.seeds)
    print_metrics(results["metrics"], ["premises", "weakest premise", "target", "candidates", "unparsed", "retrieved", "context"])
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
