"""Hallu-PI: Evaluating Hallucination in Multi-modal Large Language Models within Perturbed Inputs
(Ding, Wu, Kuang, Ma, Cao, Cai, Chen, Chen, Huang, ACM MM 2024), https://arxiv.org/abs/2408.01355

Idea    Does a model that sees make things up when the picture is damaged (noise, blur, weather, digital, four pictures in one, cropped) or
        the prompt misleads? Ask the same questions before and after: describe the picture (Hal: share of the descriptions with an object
        that is not there) and pairs of yes/no questions, one true, one false (ACC+: share of the pairs with both answers right);
            PI-Score = ((100 - Hal) + ACC+) / 2
Claims  C1 damage raises hallucination in all six picture scenarios; C2 concatenation and cropping hurt more than noise, blur, digital; C3
        some fields (existence, number, color, relation, hal-object) suffer more; C4 the best on clean pictures is not the best on damaged
        ones; C5 a cropped page still "has" the usual count; C6 a false premise misleads, the more so the more hints were trusted; C7 a
        reminder helps (C7i: demonstrations); C8 what is invented is what one would expect. R1 to R4: it is not just lost information.
Run     python vision_eval/hallu_pi_experiment.py                              # 2 CPU cores, ~6 min: table + figure; --full ~7 min
        python vision_eval/hallu_pi_experiment.py --save tiny --export exam    # keeps the trained model, writes questions and pictures as files
        python vision_eval/benchmark.py --model openai:NAME --base-url http://localhost:8000/v1 --data exam/data.jsonl --images exam
Honest  The model has 0.25M parameters and sees 48 x 48 pixels of six kinds of shapes; nothing here is a statement about large models. All
        arms of a seed share the world, the base model and the questions, and go on from it on different diets. The wordings are ours.
        Lost resolution looks like hallucination: read the robust twin's row, trained on the same damage, beside every drop. For concat
        this stays open: 160 steps on mosaics did not make a twin that reads them (R4). Settings were chosen on seeds 100 to 102. Relation
        is not learned in so few steps (ACC+ 20 to 40 before any damage; three times the questions, scenes made for it, places as evidence
        did not change that): its row says nothing about damage. With two seeds a run, C8 is within noise: 5 points are 15 mentions.
        C7t was tightened after its run: it fails in the default run and holds in --full by one seed. Most of the reminder's gain is
        that training with it made wrong hints worse without it (ACC+ 54 and 56 against 62 and 65 untaught; with it 63 and 68).
Try     with --seeds 10 11 --methods clean: PI before 95, on the four operations 65; --methods early, a base stopped at 60% of its steps:
        86, 58; --methods "robust elsewhere", trained on damage of other kinds: 94, 71; --methods "robust mosaics": 86, and concat stays
        at 31 (clean: 29)
"""

import csv
import random
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilm import InputError
from minilm.data import generator, write_atomically
from minilm.claims import check, claim, print_claims
from minilm.results import (COLORS, Outcome, bar_seeds, cli, destination, new_figure, plot_seeds, print_metrics, progress, run_seeds,
                            save_results)
from vision_eval import scenes, vlm
from vision_eval.exam import OPS, SCENARIOS, Block, Exam, export
from vision_eval.metrics import FIELDS, Item, discriminative, mentions, pi_score, score
from vision_eval.scenes import KINDS
from vision_eval.vlm import Diet, TinyVLM

PAPER = "Hallu-PI, ACM MM 2024, arXiv 2408.01355"
UNSEEN = ("speckle_noise", "glass_blur", "gaussian_blur", "brightness", "jpeg")  # damage that no test picture has


@dataclass(frozen=True)
class Config:
    methods: tuple[str, ...] = (  # arms to run, see ARMS
        "clean", "robust", "hints 0.5", "hints 0.8", "hints 1.0", "unreminded", "reminded")
    seeds: tuple[int, ...] = (0, 1)  # one complete world, model and training per seed
    scenes: int = 100  # test scenes
    encoder_steps: int = 240  # stage 1: training steps of the encoder alone
    steps: int = 450  # stage 2: training steps of the base model, on clean pictures
    lr: float = 3e-3  # stages 1 and 2: learning rate
    twin_steps: int = 160  # steps that clean and the robust twins go on for, each on its own diet
    more_steps: int = 100  # steps that the arms about prompts (hints, reminders) go on for
    more_lr: float = 1e-3  # learning rate of both, also the encoder's
    batch: int = 48  # pictures per step
    turns: int = 7  # yes/no questions about each of them, beside one open question
    save: str | None = None  # write the first arm of the first seed to this folder, for benchmark.py --model tiny:FOLDER
    export: str | None = None  # write the first seed's questions and pictures to this folder (data.jsonl, *.png) and stop
    quick: bool = False  # smoke run: a few steps, one seed
    full: bool = False  # two new seeds, every arm of ARMS
    workers: int | None = None  # seeds at a time (default: one per core)
    out: str | None = None  # folder for results in place of results/ or runs/


class Arm(NamedTuple):
    diet: Diet  # what it is fed after the base model
    asked: str = "all"  # which blocks of the exam: all, hints or reminders


FULL_SEEDS = (10, 11)
HINTS = ("0.5", "0.8", "0.95", "1.0")  # how often a hint was right in training
ARMS = {
    "clean": Arm(Diet()), "robust": Arm(Diet(corrupt=0.8, ops=OPS, crops=0.15)),
    **{f"hints {right}": Arm(Diet(hints=0.7, hint_acc=float(right)), "hints") for right in HINTS},
    "unreminded": Arm(Diet(corrupt=0.8, ops=UNSEEN, hints=0.7, hint_acc=1.0, reminders=0.5, words=False), "reminders"),
    "reminded": Arm(Diet(corrupt=0.8, ops=UNSEEN, hints=0.7, hint_acc=1.0, reminders=0.5), "reminders"),
    "robust elsewhere": Arm(Diet(corrupt=0.8, ops=UNSEEN)), "robust mosaics": Arm(Diet(mosaics=0.8)),
    "early": Arm(Diet()),  # the base model at 60% of its steps, fed nothing more
}
BLOCKS = {  # the parts of the exam that an arm answers
    "all": ("before", *OPS, "concat", "crop before", "crop", "misleading before", "misleading", "blank",
            *(f"{op} reminder" for op in OPS), *(f"{op} {severity}" for op in OPS for severity in (1, 3, 5))),
    "hints": ("before", "before misled", "weather", "weather misled"),
    "reminders": ("before", *(f"{op}{words}" for op in OPS for words in ("", " reminder", " misled", " misled reminder"))),
}


# --- evaluate

def ask(model: TinyVLM, block: Block) -> dict[str, str]:
    """Answers {item id: text}; open and yes/no questions apart, since their answers differ in length."""
    answers = {}
    for task, longest in (("gen", 10), ("disc", 2)):
        rows = [[item for item in row if item.task == task] for row in block.rows]
        said = vlm.answer(model, block.pictures, [[item.question for item in row] for row in rows], longest)
        answers |= {item.id: text for row, texts in zip(rows, said) for item, text in zip(row, texts)}
    return answers


KEPT = ("PI", "ACC+", "Hal", "ACC", "CHAIR", "Cover", "Cog", "yes rate", "invalid")
MAIN = ("before", *SCENARIOS, "crop before", "misleading before", "blank")  # blocks of which all of these are kept; of others, three


def evaluate(model: TinyVLM, exam: Exam, blocks: Sequence[str]) -> dict[str, float]:
    """{"metric block": value} in percent; block "four": the mean of noise, blur, weather, digital. `expected`: of the kinds invented on
    damaged pictures, the share that are Hal-objects; `chance`: of all absent kinds. `usual crop`: share of cropped boards "with nine"."""
    found, invented, absent = {}, [], []
    for name in progress(blocks, "exam"):
        block = exam.block(name)
        answers, items = ask(model, block), [item for row in block.rows for item in row]
        (row,) = score(items, answers).values()
        found |= {f"{metric} {name}": row[metric] for metric in (KEPT if name in MAIN else KEPT[:3]) if metric in row}
        if name in MAIN:
            found |= {f"ACC+ {field} {name}": row[f"ACC+ {field}"] for field in FIELDS if f"ACC+ {field}" in row}
        opened = [item for item in items if item.task == "gen"]
        if name == "crop":
            found["usual crop"] = 100 * np.mean([answers[item.id] == "nine" for item in opened])
        if name in (*OPS, "concat"):
            for item in opened:
                invented += [kind in item.hal for kind in mentions(answers[item.id], KINDS) if kind not in item.truth]
                absent += [kind in item.hal for kind in KINDS if kind not in item.truth]
    for end in sorted({name.partition(" ")[2] for name in blocks}):
        if {f"{op} {end}".strip() for op in OPS} <= set(blocks):
            found |= {f"{metric} four {end}".strip(): np.mean([found[f"{metric} {op} {end}".strip()] for op in OPS])
                      for metric in ("PI", "ACC+", "Hal")}
    if absent:
        found |= {"expected": 100 * np.mean(invented or [0]), "chance": 100 * np.mean(absent), "invented": len(invented)}
    return found


def controls(exam: Exam, seed: int) -> dict[str, dict[str, float]]:
    """What answers without looking score on the pairs: always yes, always no, a coin."""
    pairs = [(item.answer, item.pair_id) for row in exam.block("before").rows for item in row if item.task == "disc"]
    rng, table = random.Random(f"{seed}/coin"), {}
    for name, say in (("always yes", lambda: "yes"), ("always no", lambda: "no"), ("coin", lambda: rng.choice(("yes", "no")))):
        row = discriminative([(say(), truth, pair) for truth, pair in pairs])
        table[name] = {f"{metric} before": row[metric] for metric in ("ACC", "ACC+", "F1", "yes rate")}
        table[name]["PI before"] = pi_score(0, row["ACC+"])  # (with nothing described, Hal is 0)
    return table


# --- one seed

def run(cfg: Config, seed: int) -> Outcome:
    """A base model on clean pictures, from which the arms of a kind go on for equally many steps, each on its own diet."""
    exam, outcome = Exam(cfg.scenes, seed), Outcome({}, {})
    base, early = TinyVLM(generator(seed, "init")), None

    def watch(step, loss):
        nonlocal early
        if step + 1 == max(1, int(0.6 * cfg.steps)):
            early = deepcopy(base)

    vlm.pretrain_encoder(base, cfg.encoder_steps, seed, cfg.lr, cfg.batch)
    vlm.train(base, Diet(), cfg.steps, cfg.lr, seed, "stage 2", cfg.batch, cfg.turns, watch=watch)
    for name in cfg.methods:
        arm, model = ARMS[name], early if name == "early" else deepcopy(base)
        if name != "early":  # the same pictures and questions, as far as diets agree: one name for all arms
            steps = cfg.twin_steps if arm.asked == "all" else cfg.more_steps
            vlm.train(model, arm.diet, steps, cfg.more_lr, seed, "going on", cfg.batch, cfg.turns, encoder=1.0)
        found = outcome.metrics[name] = evaluate(model, exam, BLOCKS[arm.asked])
        if arm.asked == "all":
            outcome.series[name] = {f"ACC+ {op}": ((0, 1, 3, 5), [found["ACC+ before"], *(found[f"ACC+ {op} {s}"] for s in (1, 3, 5))])
                                    for op in OPS}
        if name == "clean":
            outcome.series[name] |= {f"says {block}": (range(10), say(model, exam, block)) for block in ("before", *SCENARIOS)}
        if cfg.save and seed == cfg.seeds[0] and name == cfg.methods[0]:
            vlm.save_vlm(Path(cfg.save), model)
    outcome.metrics.update(controls(exam, seed))
    return outcome


def shown_scene(exam: Exam, block: str) -> int:
    """The picture of the figure: the first scene with three kinds (misleading, where one is added: two), or the first board."""
    wanted = 2 if block == "misleading" else 3
    return 0 if block == "crop" else next((i for i, scene in enumerate(exam.scenes) if len(scenes.kinds_of(scene.shapes)) == wanted), 0)


def say(model: TinyVLM, exam: Exam, block: str) -> list[int]:
    """The model's open answer about the figure's picture, as ten ids."""
    pictures, rows = exam.block(block)
    i = shown_scene(exam, block)
    words = vlm.answer(model, pictures[i : i + 1], [[rows[i][0].question]])[0][0].split()
    return ([vlm.IDS[w] for w in words] + [0] * 10)[:10]


# --- claims

def lost(m, arm: str, scenario: str) -> float:
    """PI lost to a scenario; crop and misleading have pictures or prompts of their own before."""
    return m(arm, f"PI {scenario} before" if scenario in ("crop", "misleading") else "PI before") - m(arm, f"PI {scenario}")


def claims(metrics: dict) -> list[dict]:
    """The paper's claims at this scale, on means over seeds. Rules were fixed before the runs, but see Honest."""
    damages, mild = SCENARIOS[:-1], ("noise", "blur", "digital")
    before_after = ("before", *OPS, "concat", "crop before", "crop")
    field_drop = lambda m: [m("clean", f"ACC+ {field} before") - m("clean", f"ACC+ {field} concat") for field in FIELDS
                            if m("clean", f"ACC+ {field} before") >= 50]
    trust = lambda m, right: np.mean([m(f"hints {right}", f"ACC+ {b}") - m(f"hints {right}", f"ACC+ {b} misled")
                                      for b in ("before", "weather")])
    doses = [right for right in HINTS if f"hints {right}" in metrics or right != "0.95"]  # (0.95 only with --full)
    helped = lambda m, arm: m(arm, "ACC+ four misled reminder") - m(arm, "ACC+ four misled")
    return [
        check(metrics, "C1", "Damage raises hallucination", "PI falls in all six picture scenarios, in at least four by 10 points",
              {f"PI {b}": ("clean",) for b in before_after}, lambda m: min(lost(m, "clean", s) for s in damages) > 0
              and sum(lost(m, "clean", s) >= 10 for s in damages) >= 4,
              "PI falls for 11 of 12 models (concat), 10 of 12 (crop); ACC+ in 33 of 36 corruption cells", 1),
        check(metrics, "C2", "Concatenation and cropping hurt most", "PI lost to concat, and to crop, above the mean lost to noise, blur "
              "and digital (weather is left out: fog is severe here)", {f"PI {b}": ("clean",) for b in before_after},
              lambda m: min(lost(m, "clean", "concat"), lost(m, "clean", "crop")) > np.mean([lost(m, "clean", s) for s in mild]),
              "concat, crop and misleading prompts hurt most", 1),
        check(metrics, "C3", "Some fields suffer more than others", "concat: the largest and the smallest drop of ACC+ differ by 10 points "
              "(fields that were learned: 50 or more before)",
              {f"ACC+ {field} {b}": ("clean",) for field in FIELDS for b in ("before", "concat")},
              lambda m: max(field_drop(m), default=0) - min(field_drop(m), default=0) >= 10,
              "number drops most, relation is lowest after", 1),
        check(metrics, "C4", "The best on clean pictures is not the best on damaged ones", "PI of the robust twin: below clean's before, "
              "above it on noise, blur, weather, digital (mean)", {f"PI {b}": ("clean", "robust") for b in ("before", "four")},
              lambda m: m("robust", "PI before") < m("clean", "PI before") and m("robust", "PI four") > m("clean", "PI four"),
              "scores on clean inputs do not predict those on perturbed ones", 1),
        check(metrics, "C5", "A cropped page still has the usual count", "cropped boards said to have nine shapes >= 3 x 1/9 of them",
              {"usual crop": ("clean", "robust")}, lambda m: m("clean", "usual crop") >= 100 / 3, "\"26 letters\" in any crop", 1),
        check(metrics, "C6", "A false premise misleads, the more hints were trusted", "ACC+ lost to wrong hints (mean of clean and "
              "fogged pictures): 10 points more where hints were always right than where half were, falling by at most 3 in between",
              {f"ACC+ {b}": [f"hints {right}" for right in doses] for b in ("before", "before misled", "weather", "weather misled")},
              lambda m: trust(m, "1.0") - trust(m, "0.5") >= 10
              and all(trust(m, b) >= trust(m, a) - 3 for a, b in zip(doses, doses[1:])), "PI falls for 12 of 12 models", 1),
        check(metrics, "C7", "A reminder before the prompt helps, though these words were never trained", "ACC+, mean of the four "
              "operations, rises by 1 point or more", {f"ACC+ four{end}": ("clean",) for end in ("", " reminder")},
              lambda m: m("clean", "ACC+ four reminder") >= m("clean", "ACC+ four") + 1, "GPT-4V, one run: ACC+ rises in all scenarios", 1),
        check(metrics, "C7t", "A reminder that was taught helps against wrong hints", "its gain of ACC+ (mean of the four operations, "
              "wrong hints): 2 points or more when taught (reminded), more than when not (unreminded), and to 2 above unreminded's without",
              {f"ACC+ four{end}": ("unreminded", "reminded") for end in ("", " reminder", " misled", " misled reminder")},
              lambda m: helped(m, "reminded") >= max(2, helped(m, "unreminded"))
              and m("reminded", "ACC+ four misled reminder") >= m("unreminded", "ACC+ four misled") + 2, None, 1),
        claim("C7i", "Demonstrations (ICL) raise ACC+", "ACC+ with two demonstrations above ACC+ without", "the tiny model reads one "
              "picture at a time; benchmark.py --baseline icl asks a real model so", None, "GPT-4V, one run: ACC+ rises, Hal not always"),
        check(metrics, "C8", "What is invented is what one would expect", "Hal-objects among invented kinds: 5 points above their share "
              "of the absent kinds", {name: ("clean",) for name in ("expected", "chance", "invented")},
              lambda m: m("clean", "expected") >= m("clean", "chance") + 5, "Cog rises from 8.0 to 14.1 (concat)", 1),
        check(metrics, "R1", "The information is still there", "PI lost by the robust twin: at most 2/3 of clean's on the mean of the four "
              "operations, at most half for crop", {f"PI {b}": ("clean", "robust") for b in ("before", "four", "crop before", "crop")},
              lambda m: lost(m, "robust", "four") <= 2 / 3 * lost(m, "clean", "four")
              and lost(m, "robust", "crop") <= lost(m, "clean", "crop") / 2, None, 1),
        check(metrics, "R2", "Mild damage hurts already, and more hurts more", "ACC+, mean of the four operations: none > severity 1 > 3 "
              "> 5",
              {f"ACC+ {b}": ("clean",) for b in ("before", "four 1", "four 3", "four 5")},
              lambda m: m("clean", "ACC+ before") > m("clean", "ACC+ four 1") > m("clean", "ACC+ four 3") > m("clean", "ACC+ four 5"),
              None, 1),
        check(metrics, "R3", "A twin that saw other damage is more robust as well", "PI, mean of the four operations: above clean",
              {f"PI {b}": ("clean", "robust", "robust elsewhere") for b in ("before", "four")},
              lambda m: m("robust elsewhere", "PI four") > m("clean", "PI four"), None, 1),
        check(metrics, "R4", "Also in mosaics", "PI lost to concat by a twin trained on mosaics: at most 2/3 of clean's",
              {f"PI {b}": ("clean", "robust mosaics") for b in ("before", "concat")},
              lambda m: lost(m, "robust mosaics", "concat") <= 2 / 3 * lost(m, "clean", "concat"), None, 1),
    ]


# --- figure

def picture_words(ax, ids: Sequence[float], item: Item) -> None:
    """The answer under a picture: one phrase a line, invented kinds (or a wrong number) orange, missed ones grey and in brackets."""
    words, truth = [vlm.WORDS[int(i)] for i in ids if i], item.truth or (item.answer,)
    lines, start = [], 0
    for at, word in enumerate(words):
        if word in KINDS or at == len(words) - 1:
            lines.append((" ".join(words[start : at + 1]), COLORS[6] if word in truth else COLORS[1]))
            start = at + 1
    lines += [(f"[{word}]", COLORS[7]) for word in truth if word not in words]
    for row, (line, color) in enumerate(lines[:7]):
        text = ax.text(0.5, -0.06 - 0.15 * row, line[:26], transform=ax.transAxes, ha="center", va="top", fontsize=9, color=color)
        text.set_in_layout(False)


def figure(results: dict):
    """Above: one scene (and a board) before and after, with what the model says. Below: PI before and after; what wrong hints cost; ACC+
    lost by field."""
    metrics, says = results["metrics"], results["series"].get("clean", {})
    exam = Exam(results["config"]["scenes"], results["seeds"][0])
    fig, axes = new_figure(3, 8, width=13, height=8.4)
    grid = axes[0, 0].get_gridspec()
    grid.set_height_ratios([1, 0.55, 2])  # pictures, words, panels
    for ax in axes[1:].flat:
        ax.remove()
    for ax, block in zip(axes[0], ("before", *SCENARIOS)):
        pictures, rows = exam.block(block)
        i = shown_scene(exam, block)
        ax.imshow(pictures[i])
        ax.set(xticks=[], yticks=[])
        ax.set_title(block + (f" ({rows[i][0].severity})" if rows[i][0].severity else ""), fontsize=12)
        if f"says {block}" in says:
            picture_words(ax, says[f"says {block}"]["values"][0], rows[i][0])
    fig.text(0.5, 0.985, "What the model says: orange is not there, [grey] is missed (severity in brackets)", ha="center", va="top")
    axes[0, 0].set_title("\n\nbefore", fontsize=12)
    left, middle, right = fig.add_subplot(grid[2, :4]), fig.add_subplot(grid[2, 4:6]), fig.add_subplot(grid[2, 6:])
    for k, (arm, phase) in enumerate((("clean", "before"), ("clean", "after"), ("robust", "after"))):
        for x, scenario in enumerate(SCENARIOS):
            own = f"PI {scenario} before" if scenario in ("crop", "misleading") else "PI before"
            name = own if phase == "before" else f"PI {scenario}"
            if name in metrics.get(arm, {}):
                label = (phase if arm == "clean" else "after, robust twin") if x == 0 else None
                bar_seeds(left, x + 0.27 * (k - 1), metrics[arm][name]["values"], COLORS[k], 0.25, label)
    if "PI blank" in metrics.get("clean", {}):
        left.axhline(metrics["clean"]["PI blank"]["mean"], color=COLORS[6], linestyle="--", linewidth=1, label="blank picture")
    left.set_xticks(range(len(SCENARIOS)), SCENARIOS, rotation=35, ha="right")
    left.set(ylabel="PI-Score (points; dots: seeds)", ylim=(0, 118), title="Before and after (the twin's before is not shown)")
    if left.get_legend_handles_labels()[0]:
        left.legend(loc="upper center", ncols=4, fontsize=9.5, columnspacing=1, frameon=False)
    hints = [right for right in HINTS if f"hints {right}" in metrics]
    for block, label, color in (("before", "clean", COLORS[0]), ("weather", "fogged", COLORS[4])):
        costs = [np.subtract(*(metrics[f"hints {h}"][f"ACC+ {b}"]["values"] for b in (block, f"{block} misled"))) for h in hints]
        if costs:
            plot_seeds(middle, [100 * float(h) for h in hints], np.array(costs).T, f"{label} pictures", color, marker="o")
            middle.legend(fontsize=9.5, frameon=False)
    middle.set(xlabel="hints right in training (%)", ylabel="ACC+ lost to wrong hints (points)", title="A false premise")
    shown = [s for s in SCENARIOS if s != "crop"]
    mean = lambda name: metrics.get("clean", {}).get(name, {"mean": np.nan})["mean"]
    drop = np.array([[mean(f"ACC+ {field} before") - mean(f"ACC+ {field} {s}") for s in shown] for field in FIELDS])
    right.imshow(drop, cmap="cividis_r", vmin=0, vmax=100, aspect="auto")
    for row, column in np.ndindex(drop.shape):
        right.text(column, row, f"{drop[row, column]:.0f}", ha="center", va="center", color="white" if drop[row, column] > 50 else "black")
    right.set_xticks(range(len(shown)), shown, rotation=35, ha="right")
    right.set_yticks(range(len(FIELDS)), [f"{field}\n({mean(f'ACC+ {field} before'):.0f} before)" for field in FIELDS])
    right.set_title("ACC+ lost (points)\n(without crop: numbers only)", fontsize=12)
    return fig


def write_table(metrics: dict, path: Path) -> None:
    """Every number of the run, one a line: arm, metric, what was asked, mean, sd, one column per seed."""
    names = sorted(KEPT, key=len, reverse=True)

    def save(to):
        with open(to, "w", newline="", encoding="utf-8") as f:
            rows = csv.writer(f)
            rows.writerow(["arm", "metric", "asked", "mean", "sd", "seeds"])
            for arm, cells in metrics.items():
                for name, cell in cells.items():
                    metric = next((n for n in names if name.startswith(n + " ")), name)
                    rows.writerow([arm, metric, name[len(metric) + 1 :], *(f"{cell[k]:.2f}" for k in ("mean", "sd")),
                                   *(f"{v:.2f}" for v in cell["values"])])

    write_atomically(path, save)


def show_example(seed: int) -> None:
    """Prints one training picture's turns, the words that are learned in capitals."""
    rng = random.Random(f"{seed}/an example")
    _, views, board = vlm.draw_views(Diet(boards=0.0, wide=0.0), rng)
    print(f"A picture with {scenes.describe(views[0][0]).answer}; what is learned of its turns in capitals:")
    for prompt, answer in vlm.draw_turns(views, board, 5, Diet(), False, rng):
        print(f"  {prompt:60} {vlm.decode(vlm.encode(prompt))} {answer.upper()}")


def main(cfg: Config) -> dict:
    started, asked = time.time(), cfg
    if wrong := set(cfg.methods) - set(ARMS):
        raise InputError(f"--methods {' '.join(sorted(wrong))} is not known; give some of {', '.join(ARMS)}")
    if min(cfg.batch, cfg.turns, cfg.steps, cfg.twin_steps, cfg.more_steps) < 1 or cfg.scenes < 8:
        raise InputError(f"--scenes {cfg.scenes} must be at least 8; --steps, --twin-steps, --more-steps, --batch, --turns at least 1")
    if cfg.full:
        cfg = replace(cfg, methods=tuple(ARMS), seeds=FULL_SEEDS if cfg.seeds == Config().seeds else cfg.seeds)
    if cfg.quick:
        cfg = replace(cfg, seeds=cfg.seeds[:1], scenes=12, encoder_steps=2, steps=3, twin_steps=1, more_steps=1, batch=4, turns=2)
    if cfg.export:
        export(cfg.scenes, cfg.seeds[0], Path(cfg.export))
        return {}
    show_example(cfg.seeds[0])
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    results = save_results(__file__, PAPER, replace(asked, scenes=cfg.scenes), outcomes, claims, figure, started, cfg.seeds)
    write_table(results["metrics"], destination(__file__, asked).with_suffix(".csv"))
    print_metrics({arm: row for arm, row in results["metrics"].items() if "PI noise" in row},
                  [f"PI {name}" for name in ("before", *OPS, "concat", "crop before", "crop", "misleading before", "misleading")], digits=1)
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
