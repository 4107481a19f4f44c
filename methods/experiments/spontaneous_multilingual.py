"""Spontaneous multilingual learners: does it hold? The paper is in
methods/spontaneous_multilingual.py; claims and figure are in
experiments/spontaneous_multilingual_claims.py.

One world and one base model per seed: English, and six clones that the base has read as
retellings, mostly translated. Arms tune a copy of it on as many rows, of the same questions in the
same order, and are asked the same test questions in every language:

    base                  untuned
    qt                    the method: questions of a and b, translated into English
    shuffled              control: each into another question's translation
    mono                  control: the same questions in English, to be copied
    to clone              questions of English and b, translated into clone a: another target
    qt lora               the method with the paper's adapter, at a rate of its own
    base asked twice      the ceiling: the untuned base asked as its pretraining asks (<sep>), and
                          then for the label of what it said: what the base knows

Run     python methods/experiments/spontaneous_multilingual.py      # 2 free CPU cores, 11 min
Honest  - The world is synthetic: a clone is English in other words; b, d and f put the verb last.
          Half of the verbs, items and places are cognates: one root in all clones, not in English.
          T2 looks at the other verbs alone.
        - What the paper presupposes is built in: the base reads much translated text, so that it
          can translate every clone when asked as there (G2). Labels occur in English alone, and the
          mark that tuning uses (<tr>) in no text.
        - In the paper the label is read in one pass: C1 to C3. To let the model translate first,
          and to read the label behind that, is our reading: L1 to L3. Two prompts do as much
          without any tuning (base asked twice): tuning joins what is there.
        - The label needs a verb's sign only: a wrong translation can have the right label. So L1 to
          L3 count only where the translations themselves are there (T1).
        - `mono` never sees a clone and yet wakes a part of it; what it does differs much between
          runs. It is a control for being asked, not for reading a and b.
        - All weights are trained; the paper trains adapters (qt lora, at three times the rate and
          1.5 times the steps). No </s> follows the opened slot: with it the label's probability
          vanishes. The authors' rows go through a chat template; ours are bare.
        - English pretraining text is read beside the rows in every arm; the paper does without.
          Without it, in pilots, either nothing is learned in 150 steps or English is lost. With
          texts of all clones in its place the unseen ones are translated as well, but then tuning
          has read them: so it is English alone.
        - Settings were chosen on seeds 100 to 105, by G1 to G3 alone. With 1,500 steps, .08 of each
          clone and .8 of its retellings translated, the worst clone of seed 100 had .77 of its
          verbs right; with 1,600, .1 and .9 that of any seed has .88. After run 2 labelled texts
          became .6 (of .3) of the English ones that are no sums and no retellings; after run 3 the
          steps became 2,000: on seeds 100, 101 and 104 to 107 the worst clone then has .996.
Runs    - Run 1 (seeds 0 to 5) was in a world with 8 verbs a sign and 4% of each clone, whose base
          translated no question, before tuning or after it. C1 and C2 were given as not reproduced,
          and were not tested. Its gate let pass a model that always says the same.
        - Run 2, seeds 50 to 55: this world with .3 labelled texts. G2 and G3 held with room (worst
          clone .95 of its verbs, worst seen language .995); G1, which gated every claim, did not:
          with two examples English labels were right in .94, .87, .85, .79, .88, .98. So no claim
          had a verdict. e and f were translated in .99, after copied English in .55, after wrong
          pairs in 0; labels: in one pass .54, behind the own translation .87.
        - Run 3, seeds 60 to 65: more labelled English; G1 asks for .75 in place of .9, and T1 to T3
          and R1 rest on G2 and G3 alone, as a translation needs no label. The other rules are those
          of run 2; all were frozen before it. G1 and G3 hold (worst seeds .915 and .985), G2 does
          not: in seed 65 the base finds .78 of b's verbs (.81 of d's and f's), where .8 was asked;
          in the other five the worst clone has .965. So again no claim has a verdict. On these
          numbers the rules of T1 to T3, R1, L2, L3 and C7 would hold, those of C5, C6 and L1 be
          undecided, those of C1 to C3 fail, all as on run 2's.
        - Run 4, seeds 66 to 71: 2,000 steps of pretraining, all else as in run 3.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import torch

from methods.experiments.spontaneous_multilingual_claims import (
    CLAIMS,
    FINDING,
    claims,
    figure,
    headline,
)
from methods.spontaneous_multilingual import (
    LABELS,
    LANGUAGES,
    LONGEST,
    SEEN,
    TEXT,
    UNSEEN,
    WORLD,
    few_shot,
    label_masses,
    label_tokens,
    masses,
    pretrain,
    translate,
    translated,
    translation_rows,
    tune,
)
from methods.worlds.clones import (
    ANSWER,
    BOS,
    EOS,
    GAIN,
    LOSE,
    SEP,
    CloneWorld,
    Problem,
    document,
    new_model,
)
from minilm import InputError
from minilm.claims import key, print_claims
from minilm.data import generator, pad
from minilm.evaluate import masked_mean, pca
from minilm.generate import generate
from minilm.results import (
    Outcome,
    check_range,
    cli,
    print_metrics,
    run_seeds,
    save_results,
)
from minilm.transformer import Transformer

PAPER = "Spontaneous multilingual learners, EMNLP 2024, arXiv 2405.13816"
__all__ = ["CLAIMS", "FINDING", "Config", "claims", "depends", "figure", "headline", "main", "run"]


class Tuning(NamedTuple):
    pairs: tuple[tuple[str, str], ...] = (("a", "en"), ("b", "en"))  # asked in, translated into
    shuffled: bool = False  # the translation is another question's
    lora: bool = False  # the paper's adapter in place of all weights


ARMS = {
    "base": None,
    "qt": Tuning(),
    "shuffled": Tuning(shuffled=True),
    "mono": Tuning((("en", "en"), ("en", "en"))),
    "to clone": Tuning((("en", "a"), ("b", "a"))),
    "qt lora": Tuning(lora=True),
}


@dataclass(frozen=True)
class Config:
    arms: tuple[str, ...] = tuple(ARMS)  # to run, see ARMS
    seeds: tuple[int, ...] = (66, 67, 68, 69, 70, 71)  # one complete world, base and tuning each
    width: int = 64  # model width
    layers: int = 4  # blocks
    steps: int = 2000  # pretraining: optimizer steps
    batch: int = 32  # pretraining: documents per step
    lr: float = 3e-3  # pretraining: learning rate
    rows: int = 1000  # tuning: translated questions per seen language
    tune_steps: int = 200  # tuning: optimizer steps
    tune_batch: int = 32  # tuning: rows per step, and as many English texts
    tune_lr: float = 1e-3  # tuning: learning rate
    lora_rank: int = 8  # qt lora: rank
    lora_steps: int = 300  # qt lora: optimizer steps
    lora_lr: float = 3e-3  # qt lora: learning rate
    items: int = 200  # test questions per language
    quick: bool = False  # smoke run: a few steps, one seed
    workers: int | None = None  # seeds at a time (default: one per core)
    out: str | None = None  # folder for results in place of results/ or runs/


def tuned(cfg: Config, world: CloneWorld, seed: int, base: Transformer, arm: Tuning) -> Transformer:
    rows = translation_rows(world, seed, arm.pairs, cfg.rows, arm.shuffled)
    if arm.lora:
        steps, lr, rank = cfg.lora_steps, cfg.lora_lr, cfg.lora_rank
    else:
        steps, lr, rank = cfg.tune_steps, cfg.tune_lr, None
    return tune(base, world, rows, seed, steps, lr, cfg.tune_batch, rank)


# --- the exam


class Exam(NamedTuple):
    questions: list[Problem]  # of either label by turns: who always says the same is right in half
    shots: list[list[Problem]]  # two training problems for each, one of either label


def draw_exam(world: CloneWorld, seed: int, items: int) -> Exam:
    rng = random.Random(f"{seed}/exam")

    def draw(split: str, label: str) -> Problem:
        while True:
            p = world.sample(rng, split, labelled=True)
            if p.label == label:
                return p

    exam = Exam([], [])
    for i in range(items):
        exam.questions.append(draw("test", LABELS[i % 2]))
        exam.shots.append([draw("train", label) for label in rng.sample(LABELS, 2)])
    return exam


# --- measured: the label in one pass, as the paper reads it


def in_one_pass(model: Transformer, world: CloneWorld, exam: Exam, language: str) -> dict:
    """acc: share of right labels behind two examples, and behind none (0-shot). Of the former also
    auc, mass (the probability of both labels together) and the share of "more" that is found."""
    right = torch.tensor([LABELS.index(p.label) for p in exam.questions])
    more = right == 0
    tokens = label_tokens(world)
    alone = [few_shot(world, p, (), language) for p in exam.questions]
    bare = label_masses(model, alone, tokens).argmax(1)
    prompts = few_shot_prompts(world, exam, language)
    m = label_masses(model, prompts, tokens)
    found = m.argmax(1) == right
    return {
        ("acc", language): share(found),
        ("acc", "0-shot", language): share(bare == right),
        ("auc", language): auc(m[:, 0].log() - m[:, 1].log(), more),
        ("mass", language): m.sum(1).mean().item(),
        ("recall more", language): share(found[more]),
    }


def few_shot_prompts(world: CloneWorld, exam: Exam, language: str) -> list[list[int]]:
    return [few_shot(world, p, shots, language) for p, shots in zip(*exam)]


def share(hits: torch.Tensor) -> float:
    return hits.float().mean().item()


def auc(score: torch.Tensor, positive: torch.Tensor) -> float:
    """Probability that a positive scores above a negative (ties: half): no bias towards one label
    can raise or lower it."""
    a, b = score[positive][:, None], score[~positive]
    return ((a > b).double() + (a == b).double() / 2).mean().item()


# --- measured: translation, and the label behind it


def asked_to_translate(model, world: CloneWorld, exam: Exam, language: str, target: str) -> dict:
    """After <tr>. exact: word for word, the slot opened. verbs: the English verbs that are right,
    own: of these the verbs that no clone shares with another. label: the word in the slot that the
    model opened itself is right; opened: there is a slot."""
    said = translate(model, world, exam.questions, language)
    due = [translated(world, p, target) for p in exam.questions]
    labels = [p.label for p in exam.questions]
    found = verbs_found(world, exam.questions, [s.translation for s in said])
    own = [right for verb, right in found if verb not in world.roots]
    return {
        ("exact", language): fmean(s.translation == text for s, text in zip(said, due)),
        ("verbs", language): fmean(right for _, right in found),
        ("own verbs", language): fmean(own) if own else float("nan"),
        ("label", language): fmean(s.label == label for s, label in zip(said, labels)),
        ("opened", language): fmean(ANSWER in s.translation for s in said),
    }


def asked_twice(model, world: CloneWorld, exam: Exam, language: str) -> dict:
    """What the base knows, asked as pretraining asks: first to retell the question, then for the
    label of what it said. Measures as in `asked_to_translate`."""
    prompts = [[BOS, *world.statement(p, language), SEP] for p in exam.questions]
    texts = generate(model, prompts, LONGEST, eos_id=EOS)
    said = [ids[len(prompt) :] for prompt, ids in zip(prompts, texts)]
    due = [[*world.statement(p, "en"), EOS] for p in exam.questions]
    found = verbs_found(world, exam.questions, said)
    asked = [[BOS, *[i for i in ids if i != EOS], ANSWER] for ids in said]
    labels = label_masses(model, asked, label_tokens(world)).argmax(1).tolist()
    return {
        ("exact", language): fmean(ids == text for ids, text in zip(said, due)),
        ("verbs", language): fmean(right for _, right in found),
        ("label", language): fmean(LABELS[k] == p.label for k, p in zip(labels, exam.questions)),
    }


def verbs_found(world: CloneWorld, problems: Sequence[Problem], said) -> list[tuple[str, bool]]:
    """Every verb that is due, and whether the text's English verb in this place is it."""
    found = []
    for p, ids in zip(problems, said):
        words = [world.tokens[i] for i in ids]
        verbs = [word for word in words if word in GAIN or word in LOSE]
        verbs += [""] * len(p.events)
        found += [(e.verb, e.verb == verb) for e, verb in zip(p.events, verbs)]
    return found


# --- measured: inside the model (the paper's two analyses)


class States(NamedTuple):
    """What the blocks make of n prompts; [l] enters block l, [L] leaves the last, before the final
    norm."""

    last: torch.Tensor  # [L + 1, n, D] at the last token, where the label follows
    mean: torch.Tensor  # [L + 1, n, D] mean over all tokens
    lengths: torch.Tensor  # [n] tokens


@torch.no_grad()
def read_states(model: Transformer, prompts: Sequence[Sequence[int]], batch: int = 64) -> States:
    """Rows of like length together; padding on the right, where causal attention never looks."""
    device = model.embed.weight.device
    lengths = torch.tensor([len(p) for p in prompts])
    order = lengths.argsort(stable=True)
    lasts = []
    means = []
    for chosen in order.split(batch):
        ids, mask = (x.to(device) for x in pad([prompts[i] for i in chosen.tolist()]))
        rows = torch.arange(len(ids), device=device)
        ends = mask.sum(1) - 1
        h = model.embed(ids)
        rotary, masks = model.prepare(h)
        states = [h]
        for layer in model.layers:
            h, _ = layer(h, rotary, masks)
            states.append(h)  # (B, T, D)
        lasts.append(torch.stack([h[rows, ends] for h in states]).float().cpu())
        means.append(torch.stack([masked_mean(h, mask) for h in states]).float().cpu())
    back = order.argsort()
    return States(torch.cat(lasts, 1)[:, back], torch.cat(means, 1)[:, back], lengths)


@torch.no_grad()
def lens(model: Transformer, last: torch.Tensor, token_sets: Sequence[Sequence[int]]) -> list:
    """Logit lens: states of every layer, last [L + 1, n, D], read as if they were the last ones,

        p = softmax(W_U norm(h)),   m(w) = sum of p_v over v in S(w)

    -> m of every layer, each [n, W]. The final norm is applied once."""
    found = []
    for h in last:
        parts = h.to(model.embed.weight).split(64)
        found.append(torch.cat([masses(model.lm_head(model.norm(x)), token_sets) for x in parts]))
    return found


def correlations(
    pooled: dict[str, torch.Tensor], lengths: dict[str, torch.Tensor]
) -> dict[str, tuple[float, float]]:
    """One joint principal component of all languages' pooled states [n, D] (first language:
    English) -> for every other language Pearson's r between its and English's coordinates over the
    n aligned examples, and the same with both prompt lengths regressed out: long prompts are long
    in every language, which alone makes r large."""
    joint = pca(torch.cat(list(pooled.values())), 1)[0].double()
    coordinates = dict(zip(pooled, joint.view(len(pooled), -1)))  # language -> (n,)
    english, *others = pooled
    found = {}
    for other in others:
        x, y = coordinates[english], coordinates[other]
        ones = torch.ones(len(x))
        known = torch.stack([ones, lengths[english], lengths[other]], 1).double()
        found[other] = (
            pearson(x, y),
            pearson(residual(x, known), residual(y, known)),
        )
    return found


def pearson(x: torch.Tensor, y: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack((x, y)))[0, 1].item()


def residual(x: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """What a linear regression of x [n] on the columns of known [n, k] leaves."""
    return x - known @ torch.linalg.pinv(known) @ x


def inside(model: Transformer, world: CloneWorld, exam: Exam) -> tuple[dict, dict]:
    """lens: the largest probability of the right English label below the last block, of the same
    prompts as `in_one_pass`. r, partial r: at three quarters of the depth. Series: the lens by
    layer."""
    states = {x: read_states(model, few_shot_prompts(world, exam, x)) for x in LANGUAGES}
    right = torch.tensor([[LABELS.index(p.label)] for p in exam.questions])
    metrics = {}
    series = {}
    for language, state in states.items():
        layers = lens(model, state.last, label_tokens(world))
        by_layer = [m.gather(1, right).mean().item() for m in layers]
        metrics["lens", language] = max(by_layer[1:-1], default=0.0)
        series["lens", language] = (range(len(by_layer)), by_layer)
    layer = round(0.75 * len(model.layers))
    pooled = {language: state.mean[layer] for language, state in states.items()}
    lengths = {language: state.lengths for language, state in states.items()}
    for language, (r, partial) in correlations(pooled, lengths).items():
        metrics["r", language] = r
        metrics["partial r", language] = partial
    return metrics, series


# --- one seed


def run(cfg: Config, seed: int) -> Outcome:
    """One base model, all arms."""
    world = replace(WORLD, seed=seed)
    exam = draw_exam(world, seed, cfg.items)
    base = pretrain(world, seed, cfg.steps, cfg.batch, cfg.lr, cfg.width, cfg.layers)
    outcome = Outcome({}, {})
    for name in cfg.arms:
        arm = ARMS[name]
        model = base if arm is None else tuned(cfg, world, seed, base, arm)
        target = "en" if arm is None else arm.pairs[0][1]
        metrics, series = inside(model, world, exam)
        for language in LANGUAGES:
            metrics |= in_one_pass(model, world, exam, language)
            metrics |= asked_to_translate(model, world, exam, language, target)
        outcome.metrics[name] = metrics
        outcome.series[name] = series
    outcome.metrics["base asked twice"] = {}
    for language in LANGUAGES:
        outcome.metrics["base asked twice"] |= asked_twice(base, world, exam, language)
    return outcome


def depends(cfg: Config, seed: int) -> dict:
    """What the numbers of a seed rest on."""
    world = replace(WORLD, seed=seed)
    rng = random.Random(f"{seed}/text")
    texts = [document(world, TEXT, rng, i / 200) for i in range(200)]
    exam = draw_exam(world, seed, 20)
    return {
        "text": texts,
        "rows": translation_rows(world, seed, n=50),
        "exam": [few_shot_prompts(world, exam, language) for language in "ef"],
        "weights": new_model(world, cfg.width, cfg.layers, generator(seed, "init")),
    }


def main(cfg: Config) -> dict:
    started = time.time()
    asked = cfg
    check(cfg)
    if cfg.quick:
        cfg = replace(
            cfg, seeds=cfg.seeds[:1], steps=4, tune_steps=2, lora_steps=2, items=4, rows=8
        )
    world = replace(WORLD, seed=cfg.seeds[0])
    question, answer = translation_rows(world, cfg.seeds[0], n=1)[-1]
    print("A row to tune on; the loss counts what stands in brackets:")
    print(f"  {world.text(question)} [{world.text(answer)}]")
    prompt = few_shot_prompts(world, draw_exam(world, cfg.seeds[0], 2), "e")[1]
    print(f"A test prompt, to be answered at once:\n  {world.text(prompt)}")

    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    found = depends(cfg, cfg.seeds[0])
    results = save_results(
        __file__, PAPER, asked, outcomes, claims, figure, started, cfg.seeds, depends=found
    )
    tables = {
        "the label in one pass: accuracy, AUC": ("acc", "auc"),
        "asked to translate: exact, and the label behind it": ("exact", "label"),
        "both labels' probability; slots opened": ("mass", "opened"),
    }
    for title, names in tables.items():
        columns = [key((name, x)) for name in names for x in ("en", *SEEN, *UNSEEN)]
        print(f"\n{title}")
        print_metrics(results["metrics"], columns)
    print_claims(results["claims"])
    return results


def check(cfg: Config) -> None:
    if wrong := set(cfg.arms) - set(ARMS):
        known = ", ".join(ARMS)
        raise InputError(f"--arms {' '.join(sorted(wrong))} is not known; give some of {known}")
    if not cfg.arms:
        raise InputError("--arms: give at least one name")
    check_range(cfg, "width layers steps batch tune_steps tune_batch lora_rank lora_steps", least=1)
    check_range(cfg, "rows items", least=2)
    check_range(cfg, "lr tune_lr lora_lr", above=0)


if __name__ == "__main__":
    cli(main, Config)
