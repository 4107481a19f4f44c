"""Getting More from Less: Large Language Models are Good Spontaneous Multilingual Learners
(Zhang, Gao, Zhu, Chen, Huang, Han, Feng, Deng, Huang, EMNLP 2024), https://arxiv.org/abs/2405.13816

A model that reads mostly English knows other languages better than its answers in them show. To
wake that knowledge the paper needs no labelled text in any of them: it tunes on translating a
task's *questions* from one to three languages into English, up to the open answer slot,

    L = - mean_t log p(a_t | question in X, a_<t),    a = the same question in English, slot opened

with low-rank adapters, W' = W + (alpha / r) B A. No answer stands in these rows. Then a label is
read without generating: of the label words w the one with most probability m(w) at the open slot.
The paper finds that tuned languages gain, and that languages which tuning never showed gain too.

Found   (six seeds) Has somebody more or less than at the start? X is a clone, English in other
        words, that the base can translate, but not behind the mark <tr> that tuning uses. Tuned on
        a and b (all weights; --rank: the adapter) it also translates e and f, which tuning never
        showed: .98 word for word; after copied English .61, after wrong pairs 0. Read at once, the
        label is as bad as before (.60; chance .5): not reproduced. The label that the model writes
        behind its own translation is right in .97; but so it is, in .99, if the untuned base is
        asked to retell and then for the label: tuning joins what was there.
Run     python methods/spontaneous_multilingual.py                   # 2 CPU cores, two minutes
        python methods/experiments/spontaneous_multilingual.py       # seeds, controls, claims
        python methods/real/spontaneous_multilingual.py --help       # your checkpoint
Try     in `main`, for e and f (the experiment's six seeds; .98 as it stands):
        shuffled=True in `translation_rows`, each question with another's translation: 0
        its argument pairs=(("en", "en"), ("en", "en")), English to be copied: .61
        --rank 8 --lr 3e-3 --tune-steps 300, the paper's adapter in place of all weights: .93
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import torch

from methods.worlds.clones import (
    ANSWER,
    BOS,
    EOS,
    SEP,
    TRANSLATE,
    CloneWorld,
    Mix,
    Problem,
    document,
    new_model,
)
from minilm.data import batches, collate, generator, pad, prompt_masked
from minilm.generate import generate
from minilm.lora import add_lora, merge_lora
from minilm.ops import linear_cross_entropy
from minilm.results import check_range, cli, progress
from minilm.training import make_optimizers, schedule, set_lr, take_step
from minilm.transformer import Transformer

SEEN = ("a", "b")  # the clones whose questions are translated in tuning; b, d, f put verbs last
DEV = ("c", "d")  # clones to choose settings by
UNSEEN = ("e", "f")  # clones that are reported, and that no tuning ever shows
LANGUAGES = ("en", *SEEN, *DEV, *UNSEEN)
LABELS = ("more", "less")  # than at the start: the answer to every question, in English only
Row = tuple[list[int], list[int]]  # ids of what is read, ids of the answer

# --- 1. question translation: a task's questions, and never an answer


def to_translate(world: CloneWorld, p: Problem, language: str) -> list[int]:
    """<s> Eve has_b 7 coins_b . 4 finds_b . 2 sells_b . <a> <tr>"""
    return [BOS, *world.statement(p, language), ANSWER, TRANSLATE]


def translated(world: CloneWorld, p: Problem, language: str = "en") -> list[int]:
    """Eve has 7 coins . finds 4 . sells 2 . <a>     It ends where the label would follow: the
    answer slot is open. No </s> stands behind it, or a small model would learn to end there."""
    return [*world.statement(p, language), ANSWER]


def translation_rows(
    world: CloneWorld,
    seed: int,
    pairs: Sequence[tuple[str, str]] = (("a", "en"), ("b", "en")),
    n: int = 1000,
    shuffled: bool = False,
) -> list[Row]:
    """n questions for each pair (asked in, translated into); the questions of the k-th pair are the
    same whatever its languages. shuffled: a control, each with another question's translation."""
    rows = []
    for k, (source, target) in enumerate(pairs):
        rng = random.Random(f"{seed}/questions {k}")
        asked = [world.sample(rng, labelled=True) for _ in range(n)]
        told = asked[1:] + asked[:1] if shuffled else asked
        for p, q in zip(asked, told):
            rows.append((to_translate(world, p, source), translated(world, q, target)))
    return rows


# --- 2. tuning


def translation_loss(model: Transformer, rows: Sequence[Row]) -> torch.Tensor:
    """L = - mean_t log p(a_t | question in X, a_<t): the question is read, its translation a is
    learned."""
    inputs, labels = (x.to(model.embed.weight.device) for x in prompt_masked(rows))
    return linear_cross_entropy(model.hidden(inputs), model.lm_head.weight, labels)


def text_loss(model: Transformer, documents: Sequence[list[int]]) -> torch.Tensor:
    """- mean_t log p(x_t | x_<t) of whole texts."""
    pairs = collate([(ids[:-1], ids[1:]) for ids in documents])
    inputs, labels = (x.to(model.embed.weight.device) for x in pairs)
    return linear_cross_entropy(model.hidden(inputs), model.lm_head.weight, labels)


def add_adapter(
    model: Transformer, rank: int, alpha: float, gen: torch.Generator | None = None
) -> None:
    """The paper trains W' = W + (alpha / r) B A on the query and value projections, A [r, in],
    B [out, r], and nothing else."""
    add_lora(model, rank, alpha, ("q_proj", "v_proj"), generator=gen)


def tune(
    start: Transformer,
    world: CloneWorld,
    rows: Sequence[Row],
    seed: int,
    steps: int = 200,
    lr: float = 1e-3,
    batch: int = 32,
    rank: int | None = None,
) -> Transformer:
    """A new model: `start`, tuned on translation rows. Beside them it reads as many English
    pretraining texts, some of them labelled, in every arm, or English would be forgotten (the paper
    does without). rank: of the paper's adapter; None trains all weights."""
    model = copy.deepcopy(start).train()
    if rank is not None:
        add_adapter(model, rank, 2 * rank, generator(seed, "lora"))
    optimizers = make_optimizers(model, "adamw", lr, weight_decay=0.0)
    texts = random.Random(f"{seed}/replay")
    order = batches(len(rows), batch, generator(seed, "order"), steps)
    for step, chosen in enumerate(progress(order, "tune", steps)):
        read = [document(world, ENGLISH, texts) for _ in range(batch)]
        translations = [rows[i] for i in chosen.tolist()]
        loss = translation_loss(model, translations) + text_loss(model, read)
        set_lr(optimizers, schedule(step, steps, "cosine", warmup=steps // 10, final=0.0))
        take_step(loss, model, optimizers)
    if rank is not None:
        merge_lora(model, keep=False)
    return model.eval()


# --- 3. reading the label: only the label words compete


def masses(logits: torch.Tensor, token_sets: Sequence[Sequence[int]]) -> torch.Tensor:
    """p = softmax(logits),  m(w) = sum of p_v over v in S(w)     for every label word w

    S(w): the tokens that w can begin with: one in our world, prefixes and bytes in real
    vocabularies (methods/real). logits [n, V] -> m [n, W], float32 on the CPU."""
    p = logits.float().softmax(-1).cpu()
    return torch.stack([p[:, sorted(tokens)].sum(-1) for tokens in token_sets], -1)


@torch.no_grad()
def label_masses(model, prompts: Sequence[list[int]], token_sets, batch: int = 64) -> torch.Tensor:
    """m at the end of every prompt, [n, W]; the prediction is argmax m. Rows of like length are
    read together; padding stands on the right, where causal attention never looks."""
    found = torch.empty(len(prompts), len(token_sets))
    lengths = torch.tensor([len(p) for p in prompts])
    for chosen in lengths.argsort(stable=True).split(batch):
        ids, mask = pad([prompts[i] for i in chosen.tolist()])
        ends = mask.sum(1) - 1
        h = model.hidden(ids.to(model.embed.weight.device))[torch.arange(len(ids)), ends]
        found[chosen] = masses(model.lm_head(h), token_sets)
    return found


def label_tokens(world: CloneWorld) -> list[list[int]]:
    return [[world.id[label]] for label in LABELS]


def few_shot(world: CloneWorld, p: Problem, shots: Sequence[Problem], language: str) -> list[int]:
    """<s> question <a> more <sep> question <a> less <sep> question <a>     all questions in one
    language, the labels in English ("English output")"""
    ids = [BOS]
    for shot in shots:
        ids += [*world.statement(shot, language), ANSWER, world.id[shot.label], SEP]
    return [*ids, *world.statement(p, language), ANSWER]


LONGEST = 26  # tokens: the longest translation has 21 (a clone's cognates are two each), a label 1


class Said(NamedTuple):
    translation: list[int]  # up to the answer slot, which is its last token if it was opened at all
    label: str | None  # the word that the model puts into the slot


def translate(model, world: CloneWorld, problems: Sequence[Problem], language: str) -> list[Said]:
    """Greedy translations, and the word that the model adds behind the answer slot that it opened.
    Tuning ended at the open slot: nothing taught that word."""
    prompts = [to_translate(world, p, language) for p in problems]
    texts = generate(model, prompts, LONGEST, eos_id=EOS)
    said = []
    for prompt, ids in zip(prompts, texts):
        ids = ids[len(prompt) :]
        end = ids.index(ANSWER) + 1 if ANSWER in ids else len(ids)
        behind = ids[end:][:1]
        said.append(Said(ids[:end], world.tokens[behind[0]] if behind else None))
    return said


def retold(model, world: CloneWorld, problems: Sequence[Problem], language: str) -> list[list[int]]:
    """What the base can do without tuning: translations in the format of its pretraining texts,
    <s> a statement in `language` <sep> the same in English </s>; ids behind <sep>."""
    prompts = [[BOS, *world.statement(p, language), SEP] for p in problems]
    texts = generate(model, prompts, LONGEST, eos_id=EOS)
    return [ids[len(prompt) :] for prompt, ids in zip(prompts, texts)]


# --- the base model: English and six clones. Clones occur only as retellings, nine in ten of them
# translations from or into English; after the first 15% of the steps they are .6 of the documents

WORLD = CloneWorld(languages=LANGUAGES, verbs=4, cognates=0.5)
TEXT = Mix(
    clones=(0.1,) * 6,
    english_first=0.15,
    clone_retellings=1.0,  # no clone is ever labelled, and no clone tells a story
    drills=0.05,
    retellings=0.15,
    statements=0.5,
    parallel=0.9,
    labelled=0.6,
    exercises=0.0,
    shots=3,
    explained=0.5,
    clone_explained=0.0,
    switched=0.0,
)
ENGLISH = replace(TEXT, clones=(0.0,) * 6)


def pretrain(
    world: CloneWorld,
    seed: int,
    steps: int = 2000,
    batch: int = 32,
    lr: float = 3e-3,
    width: int = 64,
    layers: int = 4,
) -> Transformer:
    """Next-token training on whole documents."""
    model = new_model(world, width, layers, generator(seed, "init"))
    optimizers = make_optimizers(model, "adamw", lr, weight_decay=0.01)
    rng = random.Random(f"{seed}/text")
    for step in progress(range(steps), f"seed {seed}, pretrain"):
        read = [document(world, TEXT, rng, step / steps) for _ in range(batch)]
        set_lr(optimizers, schedule(step, steps, "cosine", warmup=30, final=0.05))
        take_step(text_loss(model, read), model, optimizers)
    return model.eval()


# --- look inside


class Reading(NamedTuple):
    """What one model makes of one question."""

    said: Said  # asked to translate
    at_once: list[float]  # probability of each label, asked in the question's language
    behind: list[float]  # the same, in the slot that it opened itself; zeros if it opened none


def walk_through(model, world: CloneWorld, p: Problem, language: str) -> Reading:
    """Asked in `language`: to translate p, and for its label, without examples."""
    tokens = label_tokens(world)
    (said,) = translate(model, world, [p], language)
    behind = [0.0] * len(LABELS)
    if said.translation[-1:] == [ANSWER]:
        opened = [*to_translate(world, p, language), *said.translation]
        behind = label_masses(model, [opened], tokens)[0].tolist()
    at_once = label_masses(model, [few_shot(world, p, (), language)], tokens)[0].tolist()
    return Reading(said, at_once, behind)


def show(world: CloneWorld, p: Problem, name: str, reading: Reading) -> None:
    """A translation word by word, [wrong words in brackets], and both readings of the label."""
    due = [world.text([i]) for i in translated(world, p)]
    words = [world.text([i]) for i in reading.said.translation]
    due += [""] * len(words)
    shown = [word if word == right else f"[{word}]" for word, right in zip(words, due)]
    print(f"  {name:6}", *shown, reading.said.label or "")
    for when, found in (("at once", reading.at_once), ("behind this", reading.behind)):
        shown = ", ".join(f"{label} {m:.2f}" for label, m in zip(LABELS, found))
        print(f"{'':9}the label {when}: {shown}")


# --- run it


@dataclass(frozen=True)
class Config:
    steps: int = 2000  # pretraining of the base model: optimizer steps
    tune_steps: int = 200  # tuning: optimizer steps
    rank: int | None = None  # tuning: rank of the paper's adapter (default: train all weights)
    lr: float = 1e-3  # tuning: learning rate; the adapter needs 3e-3
    problems: int = 100  # test questions, asked in every language
    seed: int = 100  # of the world, the weights, the texts and the questions
    quick: bool = False  # smoke run of seconds: a few steps, numbers without meaning


def main(cfg: Config) -> None:
    check_range(cfg, "steps tune_steps problems rank", least=1)
    check_range(cfg, "lr", above=0)
    if cfg.quick:
        cfg = replace(cfg, steps=4, tune_steps=2, problems=4)
    world = replace(WORLD, seed=cfg.seed)
    rows = translation_rows(world, cfg.seed)
    question, answer = rows[-1]
    print("A row to tune on; the loss counts what stands in brackets:")
    print(f"  {world.text(question)} [{world.text(answer)}]")

    base = pretrain(world, cfg.seed, cfg.steps)
    tuned = tune(base, world, rows, cfg.seed, cfg.tune_steps, cfg.lr, rank=cfg.rank)
    models = {"base": base, "tuned": tuned}

    rng = random.Random(f"{cfg.seed}/test")
    problems = [world.sample(rng, "test", labelled=True) for _ in range(cfg.problems)]
    p = problems[0]
    language = UNSEEN[-1]
    asked = world.text(to_translate(world, p, language))
    print(f"\nA question in clone {language}, which tuning never shows; {p.label} is right:")
    print(f"  {asked}")
    for name, model in models.items():
        show(world, p, name, walk_through(model, world, p, language))

    print(f"\nshare of {cfg.problems} questions             en    seen a, b    unseen e, f")
    known = [exactly_retold(base, world, problems, group) for group in (("en",), SEEN, UNSEEN)]
    print("  base   asked as texts are ", *(f"{x:11.2f}" for x in known))
    for name, model in models.items():
        measures = {"translated exactly": [], "label behind it": [], "label at once": []}
        for group in (("en",), SEEN, UNSEEN):
            scores = [score(model, world, problems, language) for language in group]
            for values, column in zip(measures.values(), zip(*scores)):
                values.append(fmean(column))
        for measure, values in measures.items():
            print(f"  {name:6} {measure:20}", *(f"{x:11.2f}" for x in values))
    labels = [p.label for p in problems]
    most = max(labels.count(label) for label in LABELS) / len(labels)
    print(f"Always the same label is right in {most:.2f}. One seed: this proves nothing; seeds,")
    print("controls and claims: methods/experiments/spontaneous_multilingual.py")


def exactly_retold(model, world: CloneWorld, problems: Sequence[Problem], languages) -> float:
    """Share of questions that the base translates exactly in the format of its texts."""
    hits = []
    for language in languages:
        for p, ids in zip(problems, retold(model, world, problems, language)):
            hits.append(ids == [*world.statement(p, "en"), EOS])
    return fmean(hits)


def score(model, world: CloneWorld, problems: Sequence[Problem], language: str) -> tuple:
    """Shares: translated exactly; right the label that is written behind the translation (any token
    may come there); right the label at once (only the label words compete, which is easier)."""
    said = translate(model, world, problems, language)
    prompts = [few_shot(world, p, (), language) for p in problems]
    at_once = label_masses(model, prompts, label_tokens(world)).argmax(1).tolist()
    return (
        fmean(s.translation == translated(world, p) for s, p in zip(said, problems)),
        fmean(s.label == p.label for s, p in zip(said, problems)),
        fmean(LABELS[k] == p.label for k, p in zip(at_once, problems)),
    )


if __name__ == "__main__":
    cli(main, Config)
