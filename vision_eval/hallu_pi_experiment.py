"""Hallu-PI: does it hold? (hallu_pi.py is the paper; claims and figure are in hallu_pi_claims.py)

A base model learns from undamaged pictures. The arms of a seed go on from it for equally many
steps, each on its own diet, and answer the same exam:

    clean               more of the same: the model under test
    robust              80% damaged by the four tested operations, 15% partial boards
    robust elsewhere    80% damaged by five other operations that no test picture has
    robust mosaics      80% mosaics of four scenes
    early               nothing more: the base at 60% of its steps
    hints 0.5 ... 1.0   70% of the questions begin with a hint that is right so often
    unreminded          damage of other kinds, hints always right, but on damaged pictures half of
                        the questions have one that is right half of the time
    reminded            the same, and those questions begin with the reminder
    unprimed            a base and a twin as robust, in a world in which no kinds go together

Run     python vision_eval/hallu_pi_experiment.py                # four seeds, 9 minutes
        python vision_eval/hallu_pi_experiment.py --more-seeds   # six for small effects, 18 minutes
        python vision_eval/hallu_pi_experiment.py --full         # every arm, 14 minutes
        python vision_eval/hallu_pi_experiment.py --save tiny --export exam   # model, questions
Honest
  - The model has 0.25M parameters and sees 48 x 48 pixels of six kinds of shapes: nothing here is
    a statement about large models. The wordings of the questions are ours.
  - Settings were chosen on seeds 100 to 102, the rules fixed before the run.
  - Lost resolution looks like hallucination: read the robust twin beside every drop. For concat
    this stays open: 160 steps on mosaics did not make a twin that reads them (R4: it
    loses 61 points of PI, clean 66).
  - Relation is not learned in so few steps (three times the questions, scenes made for it, places
    as evidence did not change that): its row says nothing about damage.
  - Fog is severe here: alone it is what R2 was on the mean of four operations in run 1.
  - Run 1 (seeds 0, 1 and 10, 11) had two seeds a run and rules on means. Its C8 was asked of
    clean, which never saw damage and has no reason to fall back on its prior: undecided. That the
    robust twin does was seen afterwards, and confirmed on seeds 20, 21; it is claimed here on
    seeds of its own. Its C7t failed in one file and held in the other.
  - "unprimed": where a kind's partner follows with probability 0.3 it is there as often as any
    other kind (0.32 of the pictures); at 0.5, as in the test scenes, it still is there more often
    (0.50 against 0.28), so that 0.5 would be no control.
  - Run 2 (seeds 50-55) has two words more than run 1, the reminder's control, so that its numbers
    are others. Six seeds decide C4 (a twin that saw other damage is worse before, +2, and better
    after, +6 points of PI) and C8: of what the robust twin invents, 19 points [15, 23] more than
    chance are what one would expect; scored with wrong pairs 3 [-4, 9] (R8a undecided), in a world
    without pairs 1 [-3, 5]. C7t stays undecided: a taught reminder gains 6 [-2, 14].
"""

import csv
import random
import time
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilm.claims import key, print_claims
from minilm.data import generator, write_atomically
from minilm.results import (
    Outcome,
    check_arms,
    check_range,
    cli,
    destination,
    print_metrics,
    progress,
    run_seeds,
    save_results,
)
from vision_eval import vlm
from vision_eval.exam import BEFORE, PLAIN, Block, Exam, ask, before, export
from vision_eval.hallu_pi import OPS, SCENARIOS, show_example
from vision_eval.hallu_pi_claims import (  # noqa: F401  (tests and README ask this file for them)
    CLAIMS,
    FINDING,
    HINTS,
    SHOWN,
    claims,
    figure,
    headline,
    shown_scene,
)
from vision_eval.metrics import FIELDS, Item, discriminative, mentions, pi_score, score
from vision_eval.scenes import KINDS, PARTNER
from vision_eval.vlm import Diet, TinyVLM

PAPER = "Hallu-PI, ACM MM 2024, arXiv 2408.01355"
UNSEEN = ("speckle_noise", "glass_blur", "gaussian_blur", "brightness", "jpeg")  # no test picture's


@dataclass(frozen=True)
class Config:
    methods: tuple[str, ...] | None = None  # arms to run (default: those of the run)
    seeds: tuple[int, ...] | None = None  # a world, model and training each (default: the run's)
    scenes: int = 100  # test scenes
    encoder_steps: int = 240  # stage 1: training steps of the encoder alone
    steps: int = 450  # stage 2: training steps of the base model, on clean pictures
    lr: float = 3e-3  # stages 1 and 2: learning rate
    twin_steps: int = 160  # steps that arms about pictures go on for
    more_steps: int = 100  # steps that arms about prompts (hints, reminders) go on for
    more_lr: float = 1e-3  # learning rate of both, also the encoder's
    batch: int = 48  # pictures per step
    turns: int = 7  # yes/no questions about each of them, beside one open question
    save: str | None = None  # write the first arm of the first seed to this folder
    export: str | None = None  # write the first seed's questions and pictures to this folder, stop
    quick: bool = False  # smoke run: a few steps, one seed, no verdicts
    full: bool = False  # every arm
    more_seeds: bool = False  # six seeds of the arms that small effects are read from
    workers: int | None = None  # seeds at a time (default: one per core)
    out: str | None = None  # folder for results in place of results/ or runs/


# --- arms

# parts of the exam
PICTURES = (
    PLAIN,
    *map(Block, OPS),
    Block("concat"),
    before("crop"),
    Block("crop"),
    before("misleading"),
    Block("misleading"),
    Block("blank"),
    Block(phase=BEFORE, hint="misled"),
    *(Block(op, words=words) for op in OPS for words in ("reminder", "greeting")),
    *(Block(op, severity=severity) for op in OPS for severity in (1, 3, 5)),
)
FEW = (PLAIN, *map(Block, OPS))
WRONG_HINTS = (
    PLAIN,
    Block(phase=BEFORE, hint="misled"),
    Block("weather"),
    Block("weather", hint="misled"),
)
REMINDERS = (
    PLAIN,
    *(Block(op, hint=hint, words=words)
      for op in OPS for hint in ("", "misled") for words in ("", "reminder")),
)  # fmt: skip


class Arm(NamedTuple):
    diet: Diet | None  # what it is fed after its base (None: nothing more)
    blocks: tuple[Block, ...]  # what it is asked
    base: str = "base"  # which model it goes on from: base, early (60% of its steps) or unprimed


PAIRLESS = 0.3  # Diet.prior at which a kind's partner is there as often as any other kind
DAMAGED = Diet(corrupt=0.8, ops=OPS, crops=0.15)
ELSEWHERE = Diet(corrupt=0.8, ops=UNSEEN)
TAUGHT = ELSEWHERE._replace(hints=0.7, hint_acc=1.0, reminders=0.5)

ARMS = {
    "clean": Arm(Diet(), PICTURES),
    "robust": Arm(DAMAGED, PICTURES),
    **{f"hints {h}": Arm(Diet(hints=0.7, hint_acc=float(h)), WRONG_HINTS) for h in HINTS},
    "unreminded": Arm(TAUGHT._replace(words=False), REMINDERS),
    "reminded": Arm(TAUGHT, REMINDERS),
    "robust elsewhere": Arm(ELSEWHERE, FEW),
    "unprimed": Arm(DAMAGED._replace(prior=PAIRLESS), FEW, base="unprimed"),
    "robust mosaics": Arm(Diet(mosaics=0.8), PICTURES),
    "early": Arm(None, PICTURES, base="early"),
}
ABOUT_PROMPTS = (WRONG_HINTS, REMINDERS)  # arms that are asked these go on for more_steps
DEFAULT = ("clean", "robust", "hints 0.5", "hints 0.8", "hints 1.0")
SMALL_EFFECTS = ("clean", "robust", "robust elsewhere", "unprimed", "unreminded", "reminded")
WRONG_PAIRS = {  # kinds that do not go together in training, as if they did
    "circle": "square", "square": "circle", "ring": "triangle",
    "triangle": "ring", "bar": "cross", "cross": "bar",
}  # fmt: skip


# --- evaluate

KEPT = ("PI", "ACC+", "Hal", "ACC", "CHAIR", "Cover", "Cog", "yes rate", "invalid")
BRIEF = KEPT[:3]
MAIN = (PLAIN, *map(Block, SCENARIOS), before("crop"), before("misleading"), Block("blank"))


def evaluate(model: TinyVLM, exam: Exam, blocks: Sequence[Block]) -> dict[tuple, float]:
    """{(metric, *block): value} in percent. Block "four" is the mean of noise, blur, weather and
    digital; (`usual`, crop): share of cropped boards of which it is said that they have nine."""
    found: dict[tuple, float] = {}
    described: list[tuple[Item, str]] = []
    for block in progress(blocks, "exam"):
        asked = exam.block(block)
        answers = ask(model, asked)
        (row,) = score(asked.items, answers, KINDS).values()
        for metric in KEPT if block in MAIN else BRIEF:
            if metric in row:
                found[(metric, *block)] = row[metric]
        if block in MAIN:
            for field in FIELDS:
                if f"ACC+ {field}" in row:
                    found[("ACC+", field, *block)] = row[f"ACC+ {field}"]
        opened = [(item, answers[item.id]) for item in asked.items if item.task == "gen"]
        if block == Block("crop"):
            found[("usual", *block)] = 100 * np.mean([said == "nine" for _, said in opened])
        if block in map(Block, OPS):
            described += opened
    found |= four(found, blocks)
    if len(described) == len(OPS) * len(exam.scenes):  # all four were asked
        found |= inventions(described, PARTNER, "")
        found |= inventions(described, WRONG_PAIRS, "wrong pairs")
    return found


def four(found: dict, blocks: Iterable[Block]) -> dict[tuple, float]:
    """Means over the four operations, where all of them were asked in the same way."""
    asked = set(blocks)
    means = {}
    for way in dict.fromkeys(block[1:] for block in blocks if block.scenario in OPS):
        if not asked.issuperset(Block(op, *way) for op in OPS):
            continue
        for metric in BRIEF:
            means[(metric, "four", *way)] = np.mean([found[(metric, op, *way)] for op in OPS])
    return means


def inventions(described: Sequence[tuple[Item, str]], pairs: dict[str, str], name: str) -> dict:
    """Of the kinds invented, the share that one would expect, since the kind that they go with is
    there (`expected`), beside that share of all kinds that are not there (`chance`); and how many
    were invented. `pairs`: which kind goes with which."""
    invented, absent = [], []
    for item, said in described:
        missing = [kind for kind in KINDS if kind not in item.truth]
        absent += [pairs[kind] in item.truth for kind in missing]
        wrong = [kind for kind in mentions(said, KINDS) if kind in missing]
        invented += [pairs[kind] in item.truth for kind in wrong]
    return {
        ("expected", name): 100 * np.mean(invented or [0]),
        ("chance", name): 100 * np.mean(absent),
        ("invented", name): len(invented),
    }


def controls(exam: Exam, seed: int) -> dict[str, dict[tuple, float]]:
    """What answers without looking score on the pairs: always yes, always no, a coin."""
    items = [item for item in exam.block(PLAIN).items if item.task == "disc"]
    rng = random.Random(f"{seed}/coin")
    said = {
        "always yes": ["yes"] * len(items),
        "always no": ["no"] * len(items),
        "coin": [rng.choice(("yes", "no")) for _ in items],
    }
    table = {}
    for name, answers in said.items():
        rows = [(answer, item.answer, item.pair_id) for answer, item in zip(answers, items)]
        row = discriminative(rows)
        table[name] = {(m, *PLAIN): row[m] for m in ("ACC", "ACC+", "F1", "yes rate")}
        table[name][("PI", *PLAIN)] = pi_score(0, row["ACC+"])  # (nothing described: Hal is 0)
    return table


# --- one seed


def train_base(cfg: Config, seed: int, prior: float) -> tuple[TinyVLM, TinyVLM]:
    """A model that learned from undamaged pictures only, and a copy of it at 60% of its steps."""
    model = TinyVLM(generator(seed, "init"))
    vlm.pretrain_encoder(model, cfg.encoder_steps, seed, cfg.lr, cfg.batch, prior)
    early, early_at = None, max(1, int(0.6 * cfg.steps))
    diet = Diet(prior=prior)
    for done in vlm.training(
        model, diet, cfg.steps, cfg.lr, seed, "stage 2", cfg.batch, cfg.turns
    ):
        if done == early_at:
            early = deepcopy(model)
    return model, early


def train_bases(cfg: Config, seed: int) -> dict[str, TinyVLM]:
    """The models that the arms go on from, as far as they are needed."""
    bases = {}
    bases["base"], bases["early"] = train_base(cfg, seed, Diet().prior)
    if "unprimed" in cfg.methods:
        bases["unprimed"], _ = train_base(cfg, seed, PAIRLESS)
    return bases


def go_on(base: TinyVLM, arm: Arm, cfg: Config, seed: int) -> TinyVLM:
    """The arm's model. One name for the streams of all arms: they see the same pictures and
    questions as far as their diets agree."""
    model = deepcopy(base)
    if arm.diet is not None:
        steps = cfg.more_steps if arm.blocks in ABOUT_PROMPTS else cfg.twin_steps
        vlm.train(model, arm.diet, steps, cfg.more_lr, seed, "going on", cfg.batch, cfg.turns,
                  encoder=1.0)  # fmt: skip
    return model


def run(cfg: Config, seed: int) -> Outcome:
    exam = Exam(cfg.scenes, seed)
    outcome = Outcome({}, {})
    bases = train_bases(cfg, seed)
    for name in cfg.methods:
        arm = ARMS[name]
        model = go_on(bases[arm.base], arm, cfg, seed)
        outcome.metrics[name] = evaluate(model, exam, arm.blocks)
        if arm.blocks == PICTURES:
            outcome.series[name] = by_severity(outcome.metrics[name])
        if name == "clean":
            says = {("says", *block): (range(10), say(model, exam, block)) for block in SHOWN}
            outcome.series[name] |= says
        if cfg.save and seed == cfg.seeds[0] and name == cfg.methods[0]:
            vlm.save_vlm(Path(cfg.save), model)
    outcome.metrics.update(controls(exam, seed))
    return outcome


def by_severity(found: dict[tuple, float]) -> dict[tuple, tuple]:
    """ACC+ of undamaged pictures and at severities 1, 3, 5 of every operation."""
    series = {}
    for op in OPS:
        damaged = [found[("ACC+", *Block(op, severity=s))] for s in (1, 3, 5)]
        series["ACC+", op] = ((0, 1, 3, 5), [found[("ACC+", *PLAIN)], *damaged])
    return series


def say(model: TinyVLM, exam: Exam, block: Block) -> list[int]:
    """The model's open answer about the figure's picture, as ten ids."""
    asked = exam.block(block)
    i = shown_scene(exam, block)
    ((said,),) = vlm.answer(model, asked.pictures[i : i + 1], [[asked.rows[i][0].question]])
    return ([vlm.IDS[word] for word in said.split()] + [0] * 10)[:10]


def depends(cfg: Config, seed: int) -> dict:
    """What the numbers of a seed rest on: test scenes and questions, first turns that are learned,
    first weights."""
    exam = Exam(cfg.scenes, seed)
    _, ids, _, _ = vlm.make_batch(Diet(), 4, cfg.turns, random.Random(f"{seed}/stage 2"), 0)
    return {
        "scenes": exam.scenes,
        "questions": [item.question for item in exam.block(PLAIN).items],
        "turns": ids.tolist(),
        "weights": TinyVLM(generator(seed, "init")),
    }


# --- run it


def resolved(cfg: Config) -> Config:
    """The run's arms and seeds, where none were typed."""
    methods, seeds = DEFAULT, (50, 51, 52, 53)
    if cfg.full:
        methods = tuple(ARMS)
    if cfg.more_seeds:
        methods, seeds = SMALL_EFFECTS, (50, 51, 52, 53, 54, 55)
    cfg = replace(cfg, methods=cfg.methods or methods, seeds=cfg.seeds or seeds)
    if cfg.quick:
        cfg = replace(cfg, seeds=cfg.seeds[:1], scenes=12, encoder_steps=2, steps=3, twin_steps=1,
                      more_steps=1, batch=4, turns=2)  # fmt: skip
    return cfg


def write_table(metrics: dict, path: Path) -> None:
    """Every number of the run, one a line: arm, metric with block, mean, sd, a column a seed."""

    def save(to):
        with open(to, "w", newline="", encoding="utf-8") as f:
            rows = csv.writer(f)
            rows.writerow(["arm", "metric", "mean", "sd", "seeds"])
            for arm, cells in metrics.items():
                for name, cell in cells.items():
                    numbers = [cell["mean"], cell["sd"], *cell["values"]]
                    shown = ["" if x is None else f"{x:.2f}" for x in numbers]
                    rows.writerow([arm, name, *shown])

    write_atomically(path, save)


def main(cfg: Config) -> dict:
    started, asked = time.time(), cfg
    check_arms(cfg, "methods", ARMS)
    check_range(cfg, "scenes", least=8)
    check_range(cfg, "steps encoder_steps twin_steps more_steps batch turns", least=1)
    check_range(cfg, "lr more_lr", above=0)
    check_range(cfg, "workers", least=1)
    cfg = resolved(cfg)
    if cfg.export:
        export(cfg.scenes, cfg.seeds[0], Path(cfg.export))
        return {}
    show_example(cfg.seeds[0])
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    results = save_results(
        __file__, PAPER, replace(asked, scenes=cfg.scenes), outcomes, claims, figure, started,
        cfg.seeds, depends=depends(cfg, cfg.seeds[0]),
    )  # fmt: skip
    write_table(results["metrics"], destination(__file__, asked).with_suffix(".csv"))
    columns = [key(("PI", *block)) for block in MAIN if block.scenario != "blank"]
    shown = {arm: row for arm, row in results["metrics"].items() if "PI noise" in row}
    print_metrics(shown, columns, digits=1)
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
