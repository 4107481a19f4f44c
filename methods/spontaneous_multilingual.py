"""Getting More from Less: Large Language Models are Good Spontaneous Multilingual Learners
(Shimao Zhang, Changjiang Gao, Wenhao Zhu, Jiajun Chen, Xin Huang, Xue Han, Junlan Feng, Chao Deng, Shujian Huang, EMNLP 2024),
https://arxiv.org/abs/2405.13816

TODO
"""

import copy
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import nn

from minilm import InputError
from minilm.data import batches, collate, generator, pad, prompt_masked
from minilm.evaluate import masked_mean, pca
from minilm.lora import add_lora, merge_lora
from minilm.ops import linear_cross_entropy
from minilm.results import (COLORS, Outcome, claim, cli, new_figure, paired_diff, plot_seeds, print_claims, print_metrics, progress, run_seeds,
                            save_results)
from minilm.training import make_optimizers, schedule, set_lr, take_step
from minilm.transformer import Transformer
from minilm.world import ANSWER, BOS, SEP, TRANSLATE, Mix, Problem, World, document, new_model

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
    share: float = 0.05  # pretraining: share of each of the six clones, after an English-only start
    parallel: float = 0.5  # pretraining: share of a clone's retellings that translate between it and English
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
    "base": Arm(), "qt": QT, "shuffled": QT._replace(shuffled=True), "mono": Arm((("en", "en"), ("en", "en"))),
    "to-clone": Arm((("en", "a"), ("b", "a"))),
    "qt a": Arm((("a", "en"), ("a", "en"))), "qt b": Arm((("b", "en"), ("b", "en"))),
    "labelled": Arm((("en", "en"), ("en", "en")), labelled=True),
    "qt full": QT._replace(changes={"tune": "full"}),
}


def pretraining_mix(cfg: Config) -> Mix:
    """Mostly English. Only English questions are labelled; clones have stories, retellings and some translations of questions."""
    return Mix(clones=(cfg.share,) * 6, english_first=0.3, drills=0.1, retellings=0.3, parallel=cfg.parallel, labelled=0.25, exercises=0,
               shots=cfg.shots + 1, explained=0.5, clone_explained=0, switched=0)


def translation_rows(cfg: Config, world: World, arm: Arm, seed: int) -> list[Row]:
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
            rows.append((question, [world.id[p.label]]) if arm.labelled else ([*question, TRANSLATE], [*world.statement(q, target), ANSWER]))
    return rows


class Exam:
    """Index-aligned test questions in every language. Half of them use cognate verbs only, the other half verbs of the language's own."""

    def __init__(self, cfg: Config, world: World, seed: int):
        rng, cognate = random.Random(f"{seed}/exam"), lambda p: {f"{e.verb}_" in world.id for e in p.events}
        draw = lambda split, fits: next(p for p in iter(lambda: world.sample(rng, split, labelled=True), None) if fits(p))
        kinds = [{True}, {False}] if 0 < cfg.cognates < 1 else [{cfg.cognates == 1}]
        self.world, self.questions = world, [draw("test", lambda p: cognate(p) == kinds[i % len(kinds)]) for i in range(cfg.items)]
        self.cognate = torch.tensor([cognate(p) == {True} for p in self.questions])
        self.gold = torch.tensor([LABELS.index(p.label) for p in self.questions])
        self.shots = [[draw("train", lambda p: p.label == label) for label in rng.sample(LABELS, cfg.shots)] for _ in self.questions]

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

def pretrain(cfg: Config, world: World, seed: int) -> Transformer:
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
        h, ends = model.embed(ids), mask.sum(1) - 1
        rotary, masks = model.prepare(h)
        states = [h] + [h := layer(h, rotary, masks)[0] for layer in model.layers]  # L + 1 times (B, T, D)
        parts.append([torch.stack(x).float().cpu() for x in zip(*((h[torch.arange(len(h)), ends], masked_mean(h, mask)) for h in states))])
    last, mean = (torch.cat(x, 1)[:, order.argsort()] for x in zip(*parts))
    return States(last, mean, lengths)


@torch.no_grad()
def label_masses(model: Transformer, h: torch.Tensor, token_sets: Sequence[Sequence[int]], batch: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
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
    outcome, world = Outcome({}, {}), World(seed, LANGUAGES, cognates=cfg.cognates)
    exam, base = Exam(cfg, world, seed), pretrain(cfg, world, seed)
    for name in cfg.arms:
        arm, model, losses = ARMS[name], copy.deepcopy(base), []
        if arm.pairs:
            losses = tune(replace(cfg, **arm.changes), model, translation_rows(cfg, world, arm, seed), seed)
        outcome.metrics[name], outcome.series[name] = examine(cfg, model, exam)
        if losses:
            outcome.metrics[name]["loss"] = sum(losses[-20:]) / len(losses[-20:])
    return outcome
