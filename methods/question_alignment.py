"""The Power of Question Translation Training in Multilingual Reasoning: Broadened Scope and
Deepened Insights (Zhu, Huang, Yuan, Chen, Chen, Birch, 2024), https://arxiv.org/abs/2405.01345

A model that reasons well in English reasons badly in languages of which it has read little. To
translate worked answers costs much, and formulas break on the way. So translate the questions
alone, and tune twice, all weights, with the usual loss of the response y after instruction x:

    L = - mean_t log p(y_t | x, y_<t),   y ending in </s>

    stage I   QAlign, question alignment   x: "translate" and a question in X   y: it in English
    stage II  RAlign, response alignment   x: a question in English             y: its answer

Asked in X, the model then answers in English: it has learned the way there in stage I, and the
answering in stage II. RAlign alone is the baseline. The control `copied` writes the same questions
down untranslated in stage I. (In the paper two stages lead by 11 to 14 points.)

Found   (eight seeds; [] are 95% intervals) Clones are English in words of their own; b also puts
        the verb last. Of questions in a and b RAlign answers .35, QAlign and RAlign .50: it gains,
        +.15 [.06, .23]. Over `copied`, .43, it leads by .06 [-.01, .13]: whether translating or
        re-reading brings the gain is not shown. After stage II it translates no more: it answers,
        whatever it is asked. One stage of questions in en, a and b, with English answers, gets 1.00
        right, and .90 in two clones that it never showed.
Run     python methods/question_alignment.py                    # 2 CPU cores, under two minutes
        python methods/experiments/question_alignment.py        # seeds, controls, claims, figure
        python methods/real/question_alignment.py --help        # your checkpoint, pairs, answers
Try     in the experiment, --seeds 104 --tune-steps 160 (RAlign .13, QAlign .59, copied .40):
        --tune-lr 5e-4: QAlign .60, the size of stage II's steps matters little
        SOLVE (<q>) for TRANSLATE (<tr>) in `translation` (question_alignment_tasks): .57, the mark
        matters little too
        a base that knows the dictionary (--steps 1400; verbs=4 in WORLD, parallel=.8 and
        retellings=.35 in TEXT): RAlign .26, QAlign .63, copied .69: re-reading is then enough
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F

from methods.question_alignment_tasks import (
    WORLD,
    Example,
    parse,
    pretrain,
    problems,
    prompt,
    response,
    translation,
)
from methods.worlds.clones import EOS, Choice, CloneWorld, Problem
from minilm.data import IGNORE, pad, prompt_masked
from minilm.evaluate import masked_mean
from minilm.generate import generate
from minilm.ops import linear_cross_entropy
from minilm.results import check_range, cli, progress
from minilm.training import make_optimizers, schedule, set_lr, take_step
from minilm.transformer import Transformer

ALIGNED = ("a", "b")  # the clones whose questions stage I translates; b puts verbs last
UNSEEN = ("c", "d")  # clones that neither stage shows (pretraining does, a little); d: verb last
# `task`, below: "cot", a worked answer (the run here); "pot", a program; "mcq", a choice of A, B, C

# --- 1. the loss, the same in both stages


def response_loss(model: Transformer, rows: Sequence[Example]) -> torch.Tensor:
    """L, a mean over the response tokens of the batch, the end of the text among them. (The
    authors' trainer takes the mean over each micro-batch of two rows first, then that of these.)"""
    inputs, labels = prompt_masked(rows)  # labels are IGNORE at the prompt
    return linear_cross_entropy(model.hidden(inputs), model.lm_head.weight, labels, IGNORE)


def fine_tune(
    start: Transformer, rows: Iterator[list[Example]], steps: int, lr: float, name: str
) -> Transformer:
    """A new model, tuned from `start`: all weights, an optimizer and a schedule of its own."""
    model = copy.deepcopy(start).train()
    optimizers = make_optimizers(model, "adamw", lr, weight_decay=0.01)
    for step, batch in zip(progress(range(steps), name), rows):
        set_lr(optimizers, schedule(step, steps, "cosine", warmup=10, final=0.05))
        take_step(response_loss(model, batch), model, optimizers)
    return model.eval()


# --- 2. stage I: questions, translated into English; no answer is ever shown


class Pair(NamedTuple):
    """In b:  Finn has_b 12 cakes_b . 1 eats_b . howmany_b cakes_b ?
    told in English:  Finn has 12 cakes . eats 1 . howmany cakes ?"""

    asked: Problem | Choice
    language: str  # in which it is asked
    told: Problem | Choice  # the same (another one in the experiment's shuffled control)
    target: str = "en"  # in which it is told


def question_pairs(world: CloneWorld, rng: random.Random, n: int, task="cot") -> list[Pair]:
    """A fixed set of n questions, each in one of the aligned languages, with its translation."""
    asked = problems(world, task, rng, n)
    return [Pair(p, language, p) for p, language in zip(asked, cycle(ALIGNED))]


def copied(pairs: Sequence[Pair]) -> list[Pair]:
    """Control: the same questions in the same languages, to be written down as they are."""
    return [pair._replace(target=pair.language) for pair in pairs]


def stage_1_rows(
    world: CloneWorld, pairs: Sequence[Pair], rng: random.Random, batch: int, task: str = "cot"
) -> Iterator[list[Example]]:
    """Endless batches from the pairs."""
    while True:
        chosen = rng.choices(pairs, k=batch)
        yield [translation(world, task, p.asked, p.language, p.target, p.told) for p in chosen]


def align_questions(
    start: Transformer,
    world: CloneWorld,
    pairs: Sequence[Pair],
    rng: random.Random,
    steps: int = 300,
    lr: float = 1e-3,
    batch: int = 32,
    task: str = "cot",
) -> Transformer:
    """QAlign, stage I."""
    return fine_tune(start, stage_1_rows(world, pairs, rng, batch, task), steps, lr, "stage I")


# --- 3. stage II: English questions, English answers; no translation any more


def solved(world: CloneWorld, task: str, p, asked: str = "en", answered: str = "en") -> Example:
    """<s> <q> question <a> -> worked answer </s>"""
    return prompt(world, task, p, asked), response(world, task, p, answered)


def stage_2_rows(
    world: CloneWorld, rng: random.Random, batch: int, task: str = "cot", row: Callable = solved
) -> Iterator[list[Example]]:
    """Endless batches of new problems, each made into an example by `row`: other baselines ask, or
    answer, in other languages."""
    while True:
        yield [row(world, task, p) for p in problems(world, task, rng, batch)]


def align_responses(
    start: Transformer,
    world: CloneWorld,
    rng: random.Random,
    steps: int = 320,
    lr: float = 1e-3,
    batch: int = 32,
    task: str = "cot",
    row: Callable = solved,
) -> Transformer:
    """RAlign, stage II: started from the base it is the baseline, after stage I the method."""
    return fine_tune(start, stage_2_rows(world, rng, batch, task, row), steps, lr, "stage II")


# --- look inside


@torch.no_grad()
def question_vectors(model: Transformer, world: CloneWorld, test, language: str) -> torch.Tensor:
    """[L + 1, n, D]: each layer's mean state over the templated prompt of n questions, real tokens
    only (the authors' code divides by the padded length). Layer 0 is the embedding."""
    ids, mask = pad([prompt(world, "cot", p, language) for p in test])
    states = model(ids, output_hidden_states=True).hidden_states
    return torch.stack([masked_mean(h, mask) for h in states])


def alignment_score(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How much closer parallel questions are than others: mean cosine of the pairs (x_i, y_i) minus
    that of all (x_i, y_j), i != j, after each language's mean vector is taken away.

    x, y [..., n, D] -> [...]: 0 if nothing is aligned, about 1 if a pair is one vector. By hand:
    test_the_alignment_score_by_hand."""
    x = F.normalize(x - x.mean(-2, keepdim=True), dim=-1)
    y = F.normalize(y - y.mean(-2, keepdim=True), dim=-1)
    n = x.shape[-2]
    cosines = x @ y.mT  # (..., n, n)
    parallel = cosines.diagonal(dim1=-2, dim2=-1).sum(-1)
    others = cosines.sum((-2, -1)) - parallel
    return parallel / n - others / (n * (n - 1))


def respond(model, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Greedy responses, ids; 40 tokens are enough for the longest question or answer."""
    texts = generate(model, prompts, 40, eos_id=EOS)
    return [ids[len(ask) :] for ask, ids in zip(prompts, texts)]


def walk_through(world: CloneWorld, models: dict, p: Problem, language: str) -> list[tuple]:
    """One question in `language` -> rows (what is asked for, who answers, ids): its translation,
    and its answer, as they are due, and by each of the models (name -> model)."""
    ask, question = translation(world, "cot", p, language, "en")
    rows = [("translation", "due", question)]
    rows += [("translation", name, respond(model, [ask])[0]) for name, model in models.items()]
    ask, answer = solved(world, "cot", p, language)
    rows += [("answer", "due", answer)]
    rows += [("answer", name, respond(model, [ask])[0]) for name, model in models.items()]
    return rows


def show(world: CloneWorld, rows: list[tuple]) -> None:
    """The walk-through, a line each; in [brackets] words that differ from those that are due."""
    for wanted, who, ids in rows:
        words = [world.text([i]) for i in ids if i != EOS]
        if who == "due":
            due = words
            print(f"  {wanted}")
        expected = [*due, *[""] * len(words)]
        words += ["(ends)"] if len(words) < len(due) else []
        shown = [word if word == right else f"[{word}]" for word, right in zip(words, expected)]
        print(f"    {who:15}", *shown)


# --- run it


def accuracy(model, world: CloneWorld, test: Sequence[Problem], language: str) -> float:
    """Share of the problems whose final number is right, asked in `language`, answered as the model
    likes."""
    answers = respond(model, [prompt(world, "cot", p, language) for p in test])
    return fmean(parse(world, "cot", ids) == p.final for p, ids in zip(test, answers))


@dataclass(frozen=True)
class Config:
    steps: int = 1600  # pretraining of the base model: optimizer steps, all as in the experiment
    align_steps: int = 300  # stage I: optimizer steps
    tune_steps: int = 320  # stage II: optimizer steps
    pairs: int = 4000  # stage I: translated questions
    copied: bool = False  # also the control: stage I copies questions, then stage II
    problems: int = 100  # test problems, asked in every language
    seed: int = 100  # of the world, the weights, the texts and the problems
    quick: bool = False  # smoke run of seconds: a few steps, numbers without meaning


def main(cfg: Config) -> None:
    check_range(cfg, "steps align_steps tune_steps", least=1)
    check_range(cfg, "pairs problems", least=2)
    if cfg.quick:
        cfg = replace(cfg, steps=4, align_steps=2, tune_steps=2, problems=4)
    world = replace(WORLD, seed=cfg.seed)
    test = problems(world, "cot", random.Random(f"{cfg.seed}/test"), cfg.problems, "test")
    example = problems(world, "cot", random.Random("an example"), 1)[0]
    print("A row of each stage; the loss counts what stands in brackets:")
    rows = (translation(world, "cot", example, "a", "en"), solved(world, "cot", example))
    for ask, answer in rows:
        print(f"  {world.text(ask)} [{world.text(answer)}]")

    base = pretrain(world, cfg.seed, cfg.steps)
    pairs = question_pairs(world, random.Random(f"{cfg.seed}/pairs"), cfg.pairs)

    def questions(start, pairs):
        order = random.Random(f"{cfg.seed}/stage I")
        return align_questions(start, world, pairs, order, cfg.align_steps)

    def answers(start):
        return align_responses(start, world, random.Random(f"{cfg.seed}/stage II"), cfg.tune_steps)

    aligned = questions(base, pairs)
    models = {"RAlign": answers(base), "QAlign, RAlign": answers(aligned)}
    if cfg.copied:
        models["copied, RAlign"] = answers(questions(base, copied(pairs)))

    p = test[0]
    print(f"\nAsked in clone b: {world.text(world.question(p, 'b'))}")
    show(world, walk_through(world, {"stage I": aligned} | models, p, "b"))
    print("(stage I cannot answer; after stage II a model answers even when it shall translate)")

    print(f"\nright answers of {cfg.problems}     en    a    b   unseen c, d   alignment of a, b")
    for name, model in models.items():
        right = {x: accuracy(model, world, test, x) for x in world.languages}
        english = question_vectors(model, world, test, "en")
        middle = len(model.layers) // 2
        scores = []
        for language in ALIGNED:
            other = question_vectors(model, world, test, language)
            scores.append(alignment_score(english, other)[middle].item())
        seen = " ".join(f"{right[x]:4.2f}" for x in ("en", *ALIGNED))
        unseen = fmean(right[x] for x in UNSEEN)
        print(f"{name:22} {seen} {unseen:10.2f} {fmean(scores):16.2f}")
    guess = world.verb_blind_accuracy(test)
    print(f"reading numbers, no verbs, is right in {guess:.2f}. (alignment: parallel questions'")
    print("cosine in the middle layer, minus that of others.) One seed: this proves nothing;")
    print("seeds, controls and claims: methods/experiments/question_alignment.py")


if __name__ == "__main__":
    cli(main, Config)
