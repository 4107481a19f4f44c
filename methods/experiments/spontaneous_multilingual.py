"""Getting More from Less: Large Language Models are Good Spontaneous Multilingual Learners
(Shimao Zhang, Changjiang Gao, Wenhao Zhu, Jiajun Chen, Xin Huang, Xue Han, Junlan Feng, Chao Deng, Shujian Huang, EMNLP 2024),
https://arxiv.org/abs/2405.13816

Idea    Few texts in other languages are labelled, but a model that reads mostly English may need no labels: teach it only to translate the
        *questions* of a task from a few languages into English, never an answer,
            L = - sum_t log p(a_t | question in X, a_<t),    a = the same question in English, its answer slot opened,
        with LoRA on the query and value projections, and it answers better in these languages and, the paper finds, in languages that
        this tuning never saw.
Claims  C1 seen languages gain; C2 unseen languages gain, C2o on words that they share with nobody; C5 middle layers think of the English
        label; C6 states of unseen languages move along with English ones; C7 English is kept; R1 shuffled pairs give nothing. C3 another
        target language than English. G are gates on the base model, without which there is no verdict.
Run     python methods/experiments/spontaneous_multilingual.py             # 2 free CPU cores, ~5 min: table + figure; --full: 5 more arms, 7 min
        python methods/real/spontaneous_multilingual.py --help # the published tests and translations, your checkpoint
Honest  Not reproduced at this scale: six seeds, AUC of unseen languages .776 after tuning, .795 before, .774 to .780 in the controls; seen
        languages do not gain either. The states move towards English in five seeds of six, but further than in the controls in only four
        (C6). Tightened after the run: C5 and C6 must hold against the controls as well; R1 has no verdict where C2 does not hold.
        Tried on seed 100: clones of 3% to 5% of the texts, translations as half to all of their retellings, no cognates, no examples in
        the prompt, rates of 3e-4 to 1e-2 for 100 to 600 steps, adapters on all matrices, full tuning. Where the base was above chance in
        c or d, nothing raised its AUC: gentle tuning learns to translate beside the labels and leaves them alone (as they were to .02
        while the loss fell to .56), stronger tuning harms them, English included.
        The world is synthetic (methods/worlds/clones.py): Eve has 7 coins, finds 4, sells 2 - more or less than before? Six clones of English, three
        of them verb-final, 4% of the texts each; labels in English only. Half of the content words are cognates, one root for all clones:
        half of the test uses these only and half none, reported apart. Arms share the base, the questions and their order. No end of text
        follows the opened slot, nor does tuning's mark occur in pretraining. c, d served to choose settings; e, f are the test.
Try     --seeds 100 --arms base qt: base AUC .90 in e, f, English accuracy .97; qt .84, .93.  With --tune full: the translation is learned
        (loss .05 for .94), English falls to .55.  --tune-lr 0.01: to .54.  EOS behind the opened slot in translation_rows: the labels'
        probability falls from 1.00 to .00 in English, to .01 in e, f (accuracy, among the labels, to .74 and .60).
"""

import copy
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from minilm import InputError
from minilm.data import batches, collate, generator, pad, prompt_masked
from minilm.evaluate import masked_mean, pca
from minilm.lora import add_lora, merge_lora
from minilm.ops import linear_cross_entropy
from minilm.claims import claim, paired_diff, print_claims
from minilm.results import COLORS, Outcome, bar_seeds, cli, new_figure, plot_seeds, print_metrics, progress, run_seeds, save_results
from minilm.training import make_optimizers, schedule, set_lr, take_step
from minilm.transformer import Transformer
from methods.worlds.clones import ANSWER, BOS, SEP, TRANSLATE, Mix, Problem, CloneWorld, document, new_model

PAPER = "Spontaneous multilingual learners, EMNLP 2024, arXiv 2405.13816"


@dataclass(frozen=True)
class Config:
    arms: tuple[str, ...] = ("base", "qt", "shuffled", "mono", "to-clone")  # arms to run, see ARMS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)  # one complete world, base model and tuning per seed
    width: int = 64  # model width
    layers: int = 4  # blocks
    steps: int = 1200  # pretraining: optimizer steps
    batch: int = 32  # pretraining: documents per step
    lr: float = 3e-3  # pretraining: learning rate
    share: float = 0.04  # pretraining: share of each of the six clones, after an English-only start
    parallel: float = 0.8  # pretraining: share of a clone's retellings that translate between it and English
    cognates: float = 0.5  # share of the content words that all clones, but not English, write with one common root
    rows: int = 1000  # tuning: translated questions per seen language
    tune_steps: int = 150  # tuning: optimizer steps
    tune_batch: int = 16  # tuning: rows per step
    tune_lr: float = 1e-3  # tuning: learning rate
    tune: Literal["lora", "full"] = "lora"  # tuning: LoRA on the query and value projections, or all weights
    lora_rank: int = 8  # tuning: rank
    lora_alpha: float = 16  # tuning: scale = alpha / rank
    shots: int = 2  # labelled examples before a test question, in its language: 0 or 2
    items: int = 300  # test questions per language
    quick: bool = False  # smoke run: a few steps, one seed
    full: bool = False  # every arm of ARMS
    workers: int | None = None  # seeds at a time (default: one per core)
    out: str | None = None  # folder for results in place of results/ or runs/


# --- data

SEEN, DEV, TEST = ("a", "b"), ("c", "d"), ("e", "f")  # read in tuning; to choose settings by; reported once. b, d, f are verb-final
LANGUAGES = ("en", *SEEN, *DEV, *TEST)
LABELS = ("more", "less")
Row = tuple[list[int], list[int]]  # ids of what is read, ids of the answer


class Arm(NamedTuple):
    pairs: tuple[tuple[str, str], ...] = ()  # language of the question, language it is translated into
    shuffled: bool = False  # the translation is another question's
    labelled: bool = False  # the answer is the English label in place of a translation
    changes: dict = {}  # other Config values


QT = Arm((("a", "en"), ("b", "en")))
ARMS = {
    "base": Arm(), "qt": QT, "shuffled": QT._replace(shuffled=True),  # before tuning; question translation; of another question
    "mono": Arm((("en", "en"), ("en", "en"))), "to-clone": Arm((("en", "a"), ("b", "a"))),  # English copied; a target other than English
    "qt a": Arm((("a", "en"), ("a", "en"))),  # one seen language
    "labelled": Arm((("en", "en"), ("en", "en")), labelled=True),
    "qt long": QT._replace(changes={"tune_lr": 2e-3, "tune_steps": 600}),  # translation is learned well
    "mono long": Arm((("en", "en"), ("en", "en")), changes={"tune_lr": 2e-3, "tune_steps": 600}),
    "qt full": QT._replace(changes={"tune": "full", "tune_lr": 1e-4, "tune_steps": 300}),
}


def pretraining_mix(cfg: Config) -> Mix:
    """Mostly English. Only English questions are labelled; clones have stories, retellings and some translations of questions."""
    return Mix(clones=(cfg.share,) * 6, english_first=0.3, drills=0.1, retellings=0.3, parallel=cfg.parallel, labelled=0.25, exercises=0,
               shots=cfg.shots + 1, explained=0.5, clone_explained=0, switched=0)


def translation_rows(cfg: Config, world: CloneWorld, arm: Arm, seed: int) -> list[Row]:
    """Question translation: a question in its language, its answer slot opened -> the same in English. Never a label, and no end of
    text after the opened slot: a small model would learn to end there.

        <s> Eve has_b 7 coins_b . 4 finds_b . 2 sells_b . <a> <tr>     ->    Eve has 7 coins . finds 4 . sells 2 . <a>
    """
    rows = []
    for k, (source, target) in enumerate(arm.pairs):
        rng = random.Random(f"{seed}/questions {k}")
        asked = [world.sample(rng, labelled=True) for _ in range(cfg.rows)]
        for p, q in zip(asked, asked[1:] + asked[:1] if arm.shuffled else asked):
            question = [BOS, *world.statement(p, source), ANSWER]
            translated = [*question, TRANSLATE], [*world.statement(q, target), ANSWER]
            rows.append((question, [world.id[p.label]]) if arm.labelled else translated)
    return rows


class Exam:
    """Index-aligned test questions in every language. Half of them use cognate verbs only, the other half verbs of the language's own."""

    def __init__(self, cfg: Config, world: CloneWorld, seed: int):
        rng, cognate = random.Random(f"{seed}/exam"), lambda p: {f"{e.verb}_" in world.id for e in p.events}

        def draw(split: str, kind, value) -> Problem:
            return next(p for p in iter(lambda: world.sample(rng, split, labelled=True), None) if kind(p) == value)

        kinds = [{True}, {False}] if 0 < cfg.cognates < 1 else [{cfg.cognates == 1}]
        self.world, self.questions = world, [draw("test", cognate, kinds[i % len(kinds)]) for i in range(cfg.items)]
        self.cognate = torch.tensor([cognate(p) == {True} for p in self.questions])
        self.gold = torch.tensor([LABELS.index(p.label) for p in self.questions])
        self.shots = [[draw("train", lambda p: p.label, label) for label in rng.sample(LABELS, cfg.shots)] for _ in self.questions]

    def prompts(self, language: str) -> list[list[int]]:
        """<s> question <a> label <sep> question <a> label <sep> question <a>     labels are English in every language ("English output")"""
        told = lambda p: [*self.world.statement(p, language), ANSWER]
        return [[BOS, *(i for shot in shots for i in (*told(shot), self.world.id[shot.label], SEP)), *told(p)]
                for p, shots in zip(self.questions, self.shots)]


# --- the method

def add_adapter(cfg, model: Transformer, gen: torch.Generator) -> None:
    """W' = W + (alpha / r) B A on the query and value projections; all else is frozen."""
    add_lora(model, cfg.lora_rank, cfg.lora_alpha, ("q_proj", "v_proj"), generator=gen)


# --- loss

def translation_loss(model: Transformer, rows: Sequence[Row]) -> torch.Tensor:
    """L = - mean_t log p(a_t | question, a_<t): the question is read, only its translation is learned."""
    inputs, labels = (x.to(model.embed.weight.device) for x in prompt_masked(rows))
    return linear_cross_entropy(model.hidden(inputs), model.lm_head.weight, labels)


# --- train

def pretrain(cfg: Config, world: CloneWorld, seed: int) -> Transformer:
    """The English-centred base model that all arms of a seed start from."""
    model, rng, mix = new_model(world, cfg.width, cfg.layers, generator(seed, "init")), random.Random(f"{seed}/text"), pretraining_mix(cfg)
    optimizers = make_optimizers(model, "adamw", cfg.lr, weight_decay=0.01)
    for step in progress(range(cfg.steps), f"seed {seed}, pretraining"):
        documents = [document(world, mix, rng, step / cfg.steps) for _ in range(cfg.batch)]
        inputs, labels = collate([(d[:-1], d[1:]) for d in documents])
        set_lr(optimizers, schedule(step, cfg.steps, "cosine", warmup=30, final=0.05))
        take_step(linear_cross_entropy(model.hidden(inputs), model.lm_head.weight, labels), model, optimizers)
    return model


def tune(cfg: Config, model: Transformer, rows: Sequence[Row], seed: int) -> list[float]:
    """Trains the adapter (or everything) on the rows, merges it -> the loss of every step."""
    if cfg.tune == "lora":
        add_adapter(cfg, model, generator(seed, "lora"))
    optimizers, losses = make_optimizers(model, "adamw", cfg.tune_lr, weight_decay=0.0), []
    for step, chosen in enumerate(batches(len(rows), cfg.tune_batch, generator(seed, "order"), cfg.tune_steps)):
        set_lr(optimizers, schedule(step, cfg.tune_steps, "cosine", warmup=cfg.tune_steps // 10, final=0.0))
        loss = translation_loss(model, [rows[i] for i in chosen.tolist()])
        take_step(loss, model, optimizers)
        losses.append(loss.item())
    if cfg.tune == "lora":
        merge_lora(model, keep=False)
    return losses


# --- evaluate

class States(NamedTuple):
    """What the blocks make of n prompts; [l] enters block l, [L] leaves the last, before the final norm."""

    last: torch.Tensor  # [L + 1, n, D] at the last token, where the label follows
    mean: torch.Tensor  # [L + 1, n, D] mean over all tokens
    lengths: torch.Tensor  # [n] tokens


@torch.no_grad()
def read_states(model: Transformer, prompts: Sequence[Sequence[int]], batch: int = 64) -> States:
    """Rows of like length together; padding stands on the right, where causal attention never looks."""
    device, lengths = model.embed.weight.device, torch.tensor([len(p) for p in prompts])
    order, parts = lengths.argsort(stable=True), []
    for chosen in order.split(batch):
        ids, mask = (x.to(device) for x in pad([prompts[i] for i in chosen.tolist()]))
        h, end = model.embed(ids), (torch.arange(len(ids), device=device), mask.sum(1) - 1)
        rotary, masks = model.prepare(h)
        states = [h] + [h := layer(h, rotary, masks)[0] for layer in model.layers]  # L + 1 times (B, T, D)
        parts.append([torch.stack(x).float().cpu() for x in zip(*((h[end], masked_mean(h, mask)) for h in states))])
    last, mean = (torch.cat(x, 1)[:, order.argsort()] for x in zip(*parts))
    return States(last, mean, lengths)


@torch.no_grad()
def label_masses(model: Transformer, h: torch.Tensor, token_sets: Sequence[Sequence[int]],
                 batch: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Logit lens: states h [n, D] of any layer, before the final norm, read as if they were the last ones,

        p = softmax(W_U norm(h)),   m(w) = sum of p_v over v in S(w)   for every label word w

    -> m [n, W], entropy of p in bits [n]. At the last layer it is the model's own answer: prediction = argmax of m. S(w) are the
    tokens that a label's first token can be: one per label in our world, prefixes and bytes in real vocabularies (real/)."""
    masses, entropies = [], []
    for part in h.split(batch):
        logp = model.lm_head(model.norm(part.to(model.embed.weight))).float().log_softmax(-1).cpu()  # (n, V)
        p = logp.exp()
        masses.append(torch.stack([p[:, list(tokens)].sum(-1) for tokens in token_sets], -1))
        entropies.append(-(p * logp).sum(-1) / math.log(2))
    return torch.cat(masses), torch.cat(entropies)


def auc(score: torch.Tensor, positive: torch.Tensor) -> float:
    """Probability that a positive scores above a negative (ties: half): no bias towards one label can raise or lower it."""
    a, b = score[positive][:, None], score[~positive]
    return ((a > b).double() + (a == b).double() / 2).mean().item()


def correlations(pooled: dict[str, torch.Tensor], lengths: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """One joint principal component of all languages' pooled states [n, D] (first language: English) -> for every other language
    Pearson's r between its and English's coordinates over the n aligned examples, and the same with both prompt lengths regressed
    out: long prompts are long in every language, which alone makes r large."""
    coordinates = pca(torch.cat(list(pooled.values())), 1)[0].double().view(len(pooled), -1)  # (languages, n)
    english, *others = pooled
    rows = dict(zip(pooled, coordinates))
    pearson = lambda x, y: torch.corrcoef(torch.stack((x, y)))[0, 1].item()

    def without_length(x, language):
        known = torch.stack([torch.ones(len(x)), lengths[english], lengths[language]], 1).double()
        return x - known @ torch.linalg.pinv(known) @ x

    return {other: (pearson(rows[english], rows[other]), pearson(*(without_length(rows[l], other) for l in (english, other))))
            for other in others}


GROUPS = {"en": ("en",), "seen": SEEN, "dev": DEV, "test": TEST}


def examine(cfg: Config, model: Transformer, exam: Exam) -> tuple[dict, dict]:
    """Few-shot label accuracy in every language, and the two analyses -> metrics (means over a group's languages), series."""
    labels = [[exam.world.id[label]] for label in LABELS]
    states = {language: read_states(model, exam.prompts(language)) for language in LANGUAGES}
    layer, by_language, lens = round(0.75 * cfg.layers), {}, {}
    r = correlations({l: s.mean[layer] for l, s in states.items()}, {l: s.lengths for l, s in states.items()})
    for language, state in states.items():
        readings = [label_masses(model, h, labels) for h in state.last]  # per layer: masses [n, 2], entropy [n]
        masses, more = readings[-1][0], exam.gold == 0
        score = masses[:, 0].log() - masses[:, 1].log()
        right = masses.argmax(1) == exam.gold
        own = {"acc": right.float().mean().item(), "auc": auc(score, more), "mass": masses.sum(1).mean().item(),
               "calibrated": ((score > score.median()) == more).float().mean().item(), "recall more": right[more].float().mean().item()}
        own |= {f"auc {kind}": auc(score[k], more[k]) for kind, k in (("cognate", exam.cognate), ("own words", ~exam.cognate)) if k.any()}
        lens[language] = [m.gather(1, exam.gold[:, None]).mean().item() for m, _ in readings]  # the right English label, by layer
        own["lens"] = max(lens[language][1:-1], default=0.0)
        by_language[language] = own | dict(zip(("r", "partial r"), r.get(language, (1.0, 1.0))))
    mean = lambda name, languages: sum(by_language[l][name] for l in languages) / len(languages)
    metrics = {f"{name} {group}": mean(name, languages) for group, languages in GROUPS.items() for name in by_language["en"]
               if group != "en" or name not in ("r", "partial r")}
    series = {name: (LANGUAGES, [by_language[l][name] for l in LANGUAGES]) for name in ("acc", "auc")}
    return metrics, series | {f"lens {group}": (range(cfg.layers + 1), [sum(x) / len(x) for x in zip(*(lens[l] for l in languages))])
                              for group, languages in GROUPS.items()}


# --- one seed

def run(cfg: Config, seed: int) -> Outcome:
    """One base model; every arm tunes a copy of it on as many rows, in the same order."""
    outcome, world = Outcome({}, {}), CloneWorld(seed, LANGUAGES, cognates=cfg.cognates)
    exam, base = Exam(cfg, world, seed), pretrain(cfg, world, seed)
    for name in cfg.arms:
        arm, model, losses = ARMS[name], copy.deepcopy(base), []
        if arm.pairs:
            changed = replace(cfg, **arm.changes | ({"tune_steps": cfg.tune_steps} if cfg.quick else {}))
            losses = tune(changed, model, translation_rows(cfg, world, arm, seed), seed)
        outcome.metrics[name], outcome.series[name] = examine(cfg, model, exam)
        if losses:
            outcome.metrics[name]["loss"] = sum(losses[-20:]) / len(losses[-20:])
    return outcome


# --- claims

CONTROLS = ("base", "shuffled", "mono")
ENOUGH = 0.8  # share of the seeds in which a difference must show


def claims(metrics: dict) -> list[dict]:
    """Rules on AUC, which no label bias can move; accuracy, the paper's metric, is shown beside it. Fixed before the default seeds ran.
    Gains are paired over seeds, with their 95% interval."""
    values, mean = lambda arm, name: metrics[arm][name]["values"], lambda arm, name: metrics[arm][name]["mean"]
    gate = all(mean("base", f"acc {g}") >= low for g, low in (("en", 0.9), ("test", 0.55))) and mean("base", "auc test") <= 0.92

    def row(id, statement, rule, arms, names, test, paper=None, gain=None):
        missing = [arm for arm in arms if arm not in metrics]
        shown = "; ".join(f"{name}: " + ", ".join(f"{arm} {mean(arm, name):.3f}" for arm in arms) for name in names if not missing)
        if gain and not missing:
            first, *others = arms
            diffs = [(arm, *paired_diff(values(first, gain), values(arm, gain))) for arm in others]
            shown = f"{gain}: " + ", ".join(f"{d:+.3f} [{a:+.3f}, {b:+.3f}] over {arm}" for arm, d, a, b in diffs) + f"; {shown}"
        untested = missing or not gate and id != "G"
        holds = None if untested else test()
        why = "gate failed; " if untested else "nothing to refute; " if holds is None else ""
        return claim(id, statement, rule, f"not in this run: {', '.join(missing)}" if missing else why + shown, holds, paper)

    def above(name, others, arm="qt"):  # above all the others, in enough seeds
        wins = [first > max(rest) for first, *rest in zip(*(values(x, name) for x in (arm, *others)))]
        return sum(wins) >= ENOUGH * len(wins)

    rises = "{}: mean gain over base, shuffled and mono >= {} each, and above all three in 80% of the seeds"
    gains = lambda name, by, arm="qt": (all(mean(arm, name) - mean(b, name) >= by for b in CONTROLS) and above(name, CONTROLS, arm))
    return [
        row("G", "Gates: the base answers in English; unseen languages are neither at chance nor solved", "base: acc en >= 0.90, "
            "acc test >= 0.55, auc test <= 0.92", ("base",), ("acc en", "acc test", "auc test"), lambda: gate),
        row("C1", "Languages whose questions were translated gain", rises.format("auc seen", 0.08), ("qt", *CONTROLS),
            ("auc seen", "acc seen"), lambda: gains("auc seen", 0.08), "mean accuracy rises clearly", "auc seen"),
        row("C2", "Languages never seen in tuning gain as well", rises.format("auc test", 0.04), ("qt", *CONTROLS),
            ("auc test", "acc test", "calibrated test"), lambda: gains("auc test", 0.04), "rises in a wide range of languages", "auc test"),
        row("C2o", "... also on words that no other language shares", rises.format("auc own words test", 0.04), ("qt", *CONTROLS),
            ("auc own words test", "auc cognate test"), lambda: gains("auc own words test", 0.04), None, "auc own words test"),
        row("C3", "Translating into another language than English does it, too", "auc test: to-clone, as C2", ("to-clone", *CONTROLS),
            ("auc test",), lambda: gains("auc test", 0.04, "to-clone"), "the same with Chinese as the target (from a summary)", "auc test"),
        claim("C4", "Questions of one task help another task", "accuracy on another task", "this world has one classification task; "
              "methods/real/spontaneous_multilingual.py --train-task", None, "another task's questions help as well (from a summary)"),
        row("C5", "Middle layers think of the English label more", "largest mass of the right English label below the last block, unseen "
            "languages: qt above base, shuffled and mono in 80% of the seeds", ("qt", *CONTROLS), ("lens test",),
            lambda: above("lens test", CONTROLS), "latent English grows (from a summary)", "lens test"),
        row("C6", "Unseen languages are aligned better with English", "correlation of the first principal component with English's, as is "
            "and without prompt length: qt above base, shuffled and mono in 80% of the seeds", ("qt", *CONTROLS),
            ("r test", "partial r test"), lambda: above("r test", CONTROLS) and above("partial r test", CONTROLS),
            "rises in low-resource languages (from a summary)", "partial r test"),
        row("C7", "English is kept", "acc en: qt at least base - 0.03", ("qt", "base"), ("acc en", "auc en"),
            lambda: mean("qt", "acc en") >= mean("base", "acc en") - 0.03),
        # a gain of shuffled pairs refutes, whatever else happened; without C2 there is nothing that they could refute
        row("R1", "Refutation: shuffled pairs give unseen languages nothing", "auc test: shuffled <= base + 0.02; no verdict where "
            "true pairs give nothing either (C2)", ("shuffled", "base", "mono", "qt"), ("auc test",), lambda: (
                mean("shuffled", "auc test") <= mean("base", "auc test") + 0.02 and (gains("auc test", 0.04) or None))),
    ]


# --- figure

def figure(results: dict):
    """Left: per language from base to qt. Middle: unseen languages, every arm against the base. Right: the English label by layer."""
    fig, (left, middle, right) = new_figure(1, 3, width=12, height=4.6)
    series, metrics, colors = results["series"], results["metrics"], dict(zip(GROUPS, (COLORS[7], COLORS[0], COLORS[4], COLORS[1])))
    names = series["base"]["auc"]["x"]
    for x, language in enumerate(names):
        color = next(colors[group] for group, languages in GROUPS.items() if language in languages)
        base, tuned = ([row[x] for row in series[arm]["auc"]["values"]] for arm in ("base", "qt"))
        for k, (a, b) in enumerate([*zip(base, tuned), (sum(base) / len(base), sum(tuned) / len(tuned))]):
            size, alpha = (9, 1.0) if k == len(base) else (4, 0.35)  # last: the mean
            left.plot([x - 0.2, x + 0.2], [a, b], color=color, alpha=alpha, linewidth=size / 3)
            left.plot(x - 0.2, a, "o", color=color, alpha=alpha, markersize=size, markerfacecolor="white")
            left.plot(x + 0.2, b, "o", color=color, alpha=alpha, markersize=size)
    left.axhline(0.5, color="#666666", linewidth=1, linestyle=":")
    left.set_ylim(min(0.48, *(v for arm in ("base", "qt") for row in series[arm]["auc"]["values"] for v in row)) - 0.02, 1.02)
    left.set_xticks(range(len(names)), [l if l == "en" else f"{l}\n{next(g for g, ls in GROUPS.items() if l in ls)}" for l in names])
    left.set(ylabel="AUC (dotted: chance; thin: each seed)", title="From base (open) to qt (filled)")
    arms = [arm for arm in metrics if arm != "base"]
    kinds = [kind for kind in ("cognate", "own words") if f"auc {kind} test" in metrics["base"]]
    for kind, offset, color in zip(kinds, (-0.2, 0.2), (COLORS[2], COLORS[3])):
        for x, arm in enumerate(arms):
            gains = [a - b for a, b in zip(*(metrics[m][f"auc {kind} test"]["values"] for m in (arm, "base")))]
            bar_seeds(middle, x + offset, gains, color, 0.36, kind if x == 0 else None)
    middle.axhline(0, color="#000000", linewidth=1)
    middle.set_xticks(range(len(arms)), arms, rotation=90 if len(arms) > 5 else 20)
    middle.set(ylabel="AUC minus the base's", title="Unseen languages e, f")
    middle.legend()
    for arm, color in (("base", COLORS[7]), ("qt", COLORS[1]), ("mono", COLORS[5])):
        if arm in series:
            plot_seeds(right, series[arm]["lens test"]["x"], series[arm]["lens test"]["values"], arm, color)
    last = len(series["base"]["lens test"]["x"]) - 1
    right.set_xticks(range(last + 1), ["embed", *map(str, range(1, last)), "last"])
    right.set(xlabel="after block", ylabel="probability of the right English label", title="Logit lens, unseen languages")
    right.legend()
    return fig


def main(cfg: Config) -> dict:
    started, asked = time.time(), cfg
    if wrong := set(cfg.arms) - set(ARMS):
        raise InputError(f"--arms {' '.join(sorted(wrong))} is not known; give some of {', '.join(ARMS)}")
    if not {"base", "qt"} <= set(cfg.arms):
        raise InputError("--arms must name base and qt, which everything is compared with")
    if cfg.shots not in (0, 2) or not 0 <= cfg.share <= 1 / 6 or not 0 <= cfg.cognates <= 1:
        raise InputError(f"--shots {cfg.shots} must be 0 or 2, --share {cfg.share} between 0 and 1/6, --cognates {cfg.cognates} between 0 "
                         "and 1")
    if cfg.full:
        cfg = replace(cfg, arms=tuple(ARMS))
    if cfg.quick:
        cfg = replace(cfg, seeds=cfg.seeds[:1], steps=8, tune_steps=4, items=40, rows=20)
    world = CloneWorld(cfg.seeds[0], LANGUAGES, cognates=cfg.cognates)
    question, answer = translation_rows(replace(cfg, rows=1), world, QT, cfg.seeds[0])[-1]
    print(f"A row to tune on; the part behind -> is learned:\n  {world.text(question)} -> {world.text(answer)}\nA test prompt:\n  "
          + world.text(Exam(replace(cfg, items=2), world, cfg.seeds[0]).prompts("e")[1]))
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    results = save_results(__file__, PAPER, asked, outcomes, claims, figure, started, cfg.seeds)
    for name in ("acc", "auc"):
        print_metrics(results["metrics"], [f"{name} {group}" for group in GROUPS] + [f"{name} own words test"] * (name == "auc"), digits=3)
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
