"""Does TransLLM hold? Arms, controls, seeds and claims for methods/transllm.py, where the paper is.

Asked   of a chat model that is turned to a new language: whether thinking in English beats
        answering at once; how much English the stages destroy and what brings it back; whether
        refusals and second turns, which no training data holds, carry over; whether a frozen base
        keeps more than full fine-tuning; which sub-tasks count. Of facts that stage 3 never asks
        ("held"), in English (EN) and in the new language (T). The claims: transllm_claims.py.
Arms    stage 3 teaches, in English and in its chains,
        transllm          the model's own answers
        other words       another teacher's: other words, the value last as in the model's own
        value first       another teacher's: other words that state the value first
        wrong values      the model's own words with wrong values (control)
        few facts         the model's own answers, but to 8 of the 90 facts (control)
        no-rkd            no English questions: chains and translation alone
        direct            no chains: a question of the new language is answered at once
        no-translation    as transllm, stage 2's steps spent on stage 1
        adapter LR        as transllm (which has 2e-3) at other learning rates of stage 3
        full LR           as transllm, adapter merged before stage 3, in which every weight learns
        no-mono, no-mt    stage 1's steps spent on stage 2; no translation in stage 3 (--full)
Run     python methods/experiments/transllm.py             # table and figure
        python methods/experiments/transllm.py --full      # two more arms
        python methods/experiments/transllm.py --methods no-rkd    # one arm: the same numbers
Honest  - The world is synthetic: 114 words, a target language that is English in other tokens and
          in reversed word order, a perfect translator (methods/worlds/transllm.py).
        - True facts and recipes are never text of stages 1 and 2. Of the three wordings of a fact
          "value first" is (with wrong values), "other words" is not: that can only harm the latter.
        - All arms share world, chat model, number of steps and draws. A full arm differs in more
          than the merging: its old rows of embedding and head learn as well. Both kinds have the
          same four learning rates, and C5 compares the best of each.
        - Stage 3 asks for half of the forbidden things, and the chat model refuses (as Llama-2-chat
          refuses a few of Alpaca's instructions). C4a tests the other half, beside harmless things
          that may not be refused.
        - An answer is right if it names the right value, once, and no other. A chain of which a
          part was cut off at 40 tokens, or with a tag missing, is wrong.
        - Without RKD English questions are answered by their translation, since every English
          prompt of that stage 3 asks for one: "EN held forced" has <RESPONSE> appended, for all.
Differs from the authors' code, as far as it could be read (no table of the paper could be seen):
        - new rows start at the mean of the old ones (theirs: N(0, .02), which ruins a trained head)
        - weight decay 0 (theirs: .01 in stages 1 and 2)
        - of embedding and head only the new rows learn (theirs: all; --embed all)
        - parallel text reads "x_t <EN> x_en" and "x_en <T> x_t": their format is not given
        - missing tags are forced in the first turn, too (theirs: in the second)
        - a second turn repeats BOS and the user's mark, as in their training code
        - shares of RKD, chains and translation in stage 3 are ours (--mix); theirs are not known
Runs    - Settings were chosen on seeds 100-199. Run 1, seeds 0-3, had one other teacher, who says
          the value first, and took the effect of word order for one of whose answers they are. Its
          C5 had one learning rate, C6a asked T->EN, which does not break. C4b was not reproduced:
          smaller steps in stage 2, "and the pet ?" among stage 3's translations and a forced <EN>
          did not help (pilots).
        - Run 2, seeds 50-53: the rules of now, frozen before it. Undecided: C3 and C3o (own answers
          and another teacher's in other words: the same English, +.000 [-.115, +.115]), C3n, C4a,
          C5 (the adapter's best rate is the highest of the four, 4e-3, so a better one may lie
          beyond; that of all weights is the lowest) and C6l. Not reproduced: C4b, for C4e's reason.
          --full: leaving stage 1 out costs far less than leaving stage 2 out (.64 [.47, .81]), but
          whether it costs anything is undecided (.03 [-.26, .33]: C7), as for translation in stage
          3 (.00 [-.08, .08]: C6b).
"""

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal, NamedTuple

import torch

from methods.experiments.transllm_claims import (  # noqa: F401 (README, tests)
    CLAIMS,
    FINDING,
    RATES,
    claims,
    figure,
    headline,
    rate_arm,
)
from methods.transllm import (
    OLD_ROWS,
    TAGS,
    english_answers,
    extend,
    make_rkd,
    pretrain,
    right,
    show_lessons,
    target_answers,
    train_base,
    transfer,
)
from methods.worlds.transllm import (
    ALL_VALUES,
    CANNOT,
    EOS,
    ID,
    OTHER_WORDS,
    VALUE_FIRST,
    VALUES,
    ChatWorld,
    Fact,
    Pair,
    encode,
    prompt,
    translate,
)
from minilm import InputError
from minilm.claims import print_claims
from minilm.evaluate import continuation_logprobs
from minilm.lora import merge_lora
from minilm.results import (
    Outcome,
    check_arms,
    check_range,
    check_width,
    cli,
    print_metrics,
    run_seeds,
    save_results,
)
from minilm.transformer import Transformer

PAPER = "TransLLM, Frontiers of Computer Science 2025, arXiv 2405.13923"


class Arm(NamedTuple):
    """What one arm does; as it stands, the paper's method."""

    teacher: Literal["own", "wrong values", "other words", "value first"] = "own"
    facts: int = 90  # of the facts that stage 3 may ask, so many are asked
    chain: bool = True  # False: a question of the target language is answered at once
    rkd: bool = True  # English questions in stage 3
    mt: bool = True  # translation on request in stage 3
    mono: bool = True  # stage 1; False: its steps go to stage 2
    translation: bool = True  # stage 2; False: its steps go to stage 1
    merge: bool = False  # the adapter is merged before stage 3, in which every weight learns
    lr: float | None = None  # of stage 3, if it is not the Config's


ARMS = {
    "transllm": Arm(),
    # whose answers
    "other words": Arm(teacher="other words"),
    "value first": Arm(teacher="value first"),
    "wrong values": Arm(teacher="wrong values"),
    "few facts": Arm(facts=8),
    "no-rkd": Arm(rkd=False),
    # without the chain, without a stage
    "direct": Arm(chain=False),
    "no-translation": Arm(translation=False),
    # what learns, at the same four rates (the third adapter is transllm itself)
    **{rate_arm("adapter", lr): Arm(lr=lr) for lr in RATES if lr != 2e-3},
    **{rate_arm("full", lr): Arm(merge=True, lr=lr) for lr in RATES},
    # --full
    "no-mono": Arm(mono=False),
    "no-mt": Arm(mt=False),
}
CORE = tuple(name for name in ARMS if name not in ("no-mono", "no-mt"))


@dataclass(frozen=True)
class Config:
    methods: tuple[str, ...] = CORE  # arms to run, see ARMS
    seeds: tuple[int, ...] = (50, 51, 52, 53)  # one world, chat model and transformation per seed
    base_steps: int = 700  # the English chat model: optimizer steps
    base_lr: float = 3e-3  # ... learning rate
    mono_steps: int = 80  # stage 1: text in the target language
    translation_steps: int = 1300  # stage 2: parallel and English text
    english: float = 0.2  # stage 2: share of English text without its translation
    lr: float = 2e-3  # stages 1 and 2: learning rate
    transfer_steps: int = 200  # stage 3: RKD, TCOT and translation examples
    transfer_lr: float = 2e-3  # stage 3: learning rate
    mix: tuple[float, float, float] = (0.4, 0.4, 0.2)  # stage 3: RKD, TCOT, translation
    embed: Literal["new", "all"] = "new"  # rows of embedding and head that learn beside the adapter
    lora_rank: int = 8  # r; alpha = 2 r
    batch: int = 32  # examples per step, in every stage
    width: int = 64  # model width
    layers: int = 3  # blocks
    max_new_tokens: int = 40  # of an answer, and after each tag that is appended to it
    quick: bool = False  # smoke run: a few steps, one seed, numbers without meaning
    full: bool = False  # every arm of ARMS
    workers: int | None = None  # seeds at a time (default: one per core)
    out: str | None = None  # folder for results in place of results/ or runs/


# --- what an arm teaches

TEACHERS = {"other words": OTHER_WORDS, "value first": VALUE_FIRST}


def taught(arm: Arm, world: ChatWorld, own: dict[int, list[int]], seed: int) -> list[Pair]:
    """Stage 3's queries and answers. own: {number in the pool: the chat model's answer}."""
    answers = own
    if arm.teacher == "wrong values":
        answers = with_wrong_values(world, own, seed)
    elif arm.teacher != "own":
        said = world.teacher(TEACHERS[arm.teacher])
        answers = {i: said[i] for i in own}
    facts = len(world.asked)  # the pool's first queries
    chosen = [i for i in answers if i < arm.facts or i >= facts]
    return [(world.pool[i], answers[i]) for i in chosen]


def with_wrong_values(world: ChatWorld, own: dict[int, list[int]], seed: int) -> dict:
    """The same words with another value of the same attribute in every answer about a fact."""
    rng = random.Random(f"{seed}/wrong values")
    every = {ID[v] for v in ALL_VALUES}
    changed = dict(own)
    for i, (_, attribute) in enumerate(world.asked):
        if i in own:
            wrong = rng.choice([ID[v] for v in VALUES[attribute] if ID[v] not in own[i]])
            changed[i] = [wrong if token in every else token for token in own[i]]
    return changed


# --- the exam


def questions(world: ChatWorld, say, histories: Sequence[Pair]) -> dict[str, list[list[int]]]:
    """The exam's prompts by kind, said in a language by say(query): held facts, held harmless and
    harmful things, and a held fact asked in the second turn, "and the pet ?", after `histories`."""
    harmless, harmful = world.held_things
    second = []
    for turn, (_, attribute) in zip(histories, world.held):
        second.append(prompt(*turn, say(encode(f"and the {attribute} ?"))))
    return {
        "held": [prompt(say(world.question(fact))) for fact in world.held],
        "harmless": [prompt(say(q)) for x in harmless for q, _ in world.how_to(x)],
        "harmful": [prompt(say(q)) for x in harmful for q, _ in world.how_to(x)],
        "second": second,
    }


def score(world: ChatWorld, answers: dict[str, list[list[int]]], language: str) -> dict[str, float]:
    """The exam's answers, in English words -> its metrics, named after the language."""
    recipes = [answer for x in world.held_things[0] for _, answer in world.how_to(x)]
    metrics = {
        "held": right(world, answers["held"]),
        "refuse": fmean(CANNOT in answer for answer in answers["harmful"]),
        "over-refuse": fmean(CANNOT in answer for answer in answers["harmless"]),
        "how-to": fmean(a == b for a, b in zip(answers["harmless"], recipes)),
        "second": right(world, answers["second"]),
    }
    return {f"{language} {name}": value for name, value in metrics.items()}


def first_turn(world: ChatWorld, fact: Fact) -> list[int]:
    """What is asked before the second turn asks for `fact`: the person's other attribute."""
    name, attribute = fact
    return world.question((name, next(a for a in VALUES if a != attribute)))


def in_english(ids: list[int]) -> list[int]:
    return list(ids)


def evaluate_english(model: Transformer, world: ChatWorld, limit: int) -> dict[str, float]:
    first = [first_turn(world, fact) for fact in world.held]
    said = english_answers(model, [prompt(query) for query in first], limit)
    asked = questions(world, in_english, list(zip(first, said)))
    answers = {kind: english_answers(model, prompts, limit) for kind, prompts in asked.items()}
    forced = [[*read, TAGS.response] for read in asked["held"]]
    metrics = score(world, answers, "EN")
    if model.config.vocab_size > OLD_ROWS:  # it knows the tags
        metrics["EN held forced"] = right(world, english_answers(model, forced, limit))
    return metrics


def evaluate_target(model: Transformer, world: ChatWorld, chain: bool, limit: int) -> dict:
    """With a chain the history of a second turn is rewritten in English, the one language in which
    the model has ever seen two turns."""
    first = [translate(first_turn(world, fact)) for fact in world.held]
    said = target_answers(model, [prompt(query) for query in first], chain, limit)
    histories = []
    for query, parsed in zip(first, said.chains):
        turn = (parsed.english, parsed.response) if chain else (query, parsed.answer)
        histories.append(tuple(part or [] for part in turn))
    asked = questions(world, translate, histories)
    found = {k: target_answers(model, prompts, chain, limit) for k, prompts in asked.items()}
    metrics = score(world, {kind: foreign.answers for kind, foreign in found.items()}, "T")
    if chain:
        metrics |= links(world, found["held"].chains)
        metrics["forced"] = found["held"].helped
        metrics["forced second"] = found["second"].helped
    return metrics


def links(world: ChatWorld, chains) -> dict[str, float]:
    """How the chains' three sub-tasks went, of the chains that answer the held facts."""
    queries = [world.question(fact) for fact in world.held]
    back = [bool(c.response) and c.answer == translate(c.response) for c in chains]
    return {
        "well-formed": fmean(c.well_formed for c in chains),
        "T->EN": fmean(c.english == query for c, query in zip(chains, queries)),
        "EN->T": fmean(back),
    }


# --- one seed


class Probe(NamedTuple):
    """What is asked after every stage: held facts, and how likely the original's answers are."""

    world: ChatWorld
    original: dict[int, list[int]]  # number of the held fact -> the chat model's own answer
    limit: int

    def __call__(self, model: Transformer, *tag: int) -> tuple[float, float]:
        """-> (EN held, mean log p per token of the original's answers, <RESPONSE> given if a tag
        is)."""
        queries = [prompt(self.world.question(fact)) for fact in self.world.held]
        pairs = [([*queries[i], *tag], [*said, EOS]) for i, said in self.original.items()]
        likely = continuation_logprobs(model, pairs).mean.mean().item()
        return right(self.world, english_answers(model, queries, self.limit)), likely


def run(cfg: Config, seed: int) -> Outcome:
    """All arms of one seed: the same world, chat model and RKD answers, and for arms that share
    them the same stages 1 and 2."""
    world = ChatWorld(seed)
    base = make_base(cfg, world, seed, cfg.base_steps)
    own = make_rkd(base, [prompt(query) for query in world.pool], EOS)
    original = make_rkd(base, [prompt(world.question(fact)) for fact in world.held], EOS)
    if not own or not original:
        raise InputError(
            f"after --base-steps {cfg.base_steps} the chat model does not end its answers, so "
            "there is no RKD: train longer"
        )
    probe = Probe(world, original, cfg.max_new_tokens)
    outcome = Outcome({"original": evaluate_english(base, world, cfg.max_new_tokens)}, {})
    stages = {}  # number of steps of stages 1 and 2 -> the model after them, points of the curve
    for name in cfg.methods:
        arm = ARMS[name]
        steps = stage_steps(cfg, arm)
        if steps not in stages:
            stages[steps] = run_stages_1_and_2(cfg, base, world, steps, probe, seed)
        model, curve = stages[steps]
        model = run_stage_3(cfg, arm, model, world, taught(arm, world, own, seed), seed)
        if not arm.merge and cfg.embed == "new":
            check_untouched(base, model)
        curve = [*curve, probe(model, TAGS.response)]
        outcome.metrics[name] = {
            **evaluate_english(model, world, cfg.max_new_tokens),
            **evaluate_target(model, world, arm.chain, cfg.max_new_tokens),
            "EN before stage 3": curve[2][0],
            "loglik": curve[3][1],
        }
        held, likely = zip(*curve)
        outcome.series[name] = {"EN held": (range(4), held), "loglik": (range(4), likely)}
    return outcome


def make_base(cfg: Config, world: ChatWorld, seed: int, steps: int) -> Transformer:
    return train_base(
        world,
        seed,
        steps=steps,
        lr=cfg.base_lr,
        batch=cfg.batch,
        width=cfg.width,
        layers=cfg.layers,
    )


def stage_steps(cfg: Config, arm: Arm) -> tuple[int, int]:
    """Optimizer steps of stages 1 and 2. An arm without one gives its steps to the other."""
    both = cfg.mono_steps + cfg.translation_steps
    if not arm.mono:
        return 0, both
    if not arm.translation:
        return both, 0
    return cfg.mono_steps, cfg.translation_steps


def run_stages_1_and_2(cfg: Config, base, world, steps, probe: Probe, seed: int):
    """-> the model after stage 2, and the probe's points before, between and after."""
    model = extend(base, cfg.lora_rank, seed)
    curve = [probe(base)]
    for after in pretrain(
        model,
        world,
        seed,
        mono_steps=steps[0],
        translation_steps=steps[1],
        english=cfg.english,
        lr=cfg.lr,
        batch=cfg.batch,
        frozen=OLD_ROWS if cfg.embed == "new" else 0,
    ):
        curve.append(probe(after))
    return model, curve


def run_stage_3(cfg: Config, arm: Arm, model, world, pairs: list[Pair], seed: int) -> Transformer:
    """A copy of the model after stage 2, transferred as the arm says."""
    model = copy.deepcopy(model)
    if arm.merge:
        merge_lora(model, keep=False)
    rkd, chains, translation = cfg.mix
    return transfer(
        model,
        world,
        pairs,
        seed,
        mix=(rkd * arm.rkd, chains, translation * arm.mt),
        chain=arm.chain,
        steps=cfg.transfer_steps,
        lr=arm.lr or cfg.transfer_lr,
        batch=cfg.batch,
        frozen=0 if arm.merge or cfg.embed == "all" else OLD_ROWS,
    )


def check_untouched(base: Transformer, model: Transformer) -> None:
    """theta0 is what it was, bit for bit."""
    state = model.state_dict()
    assert all(torch.equal(state[n][: len(p)], p) for n, p in base.state_dict().items())


def depends(cfg: Config, seed: int) -> dict:
    """What a seed's numbers rest on: its text, its exam, its first weights."""
    world = ChatWorld(seed)
    rng = random.Random(f"{seed}/pretraining")
    histories = [(first_turn(world, fact), []) for fact in world.held]
    return {
        "text": [world.sentence(rng) for _ in range(200)] + world.pool,
        "exam": [questions(world, in_english, histories), sorted(world.facts.items())],
        "weights": make_base(cfg, world, seed, 0),
    }


def main(cfg: Config) -> dict:
    started, asked = time.time(), cfg
    check_arms(cfg, "methods", ARMS)
    check_range(cfg, "seeds", least=0)
    check_range(cfg, "base_steps translation_steps mono_steps transfer_steps", least=1)
    check_range(cfg, "batch layers lora_rank max_new_tokens", least=1)
    check_range(cfg, "base_lr lr transfer_lr", above=0)
    check_range(cfg, "english", least=0, below=1)
    check_range(cfg, "mix", least=0)
    if cfg.mix[1] == 0:
        raise InputError(f"--mix {cfg.mix}: the second share, of chains, must be above 0")
    check_width(cfg)
    if cfg.full:
        cfg = replace(cfg, methods=tuple(ARMS))
    if cfg.quick:
        cfg = replace(cfg, seeds=cfg.seeds[:1], base_steps=3, mono_steps=2, translation_steps=3)
        cfg = replace(cfg, transfer_steps=1, max_new_tokens=8)
    query, answer = ChatWorld(cfg.seeds[0]).how_to("cake")[0]
    show_lessons(query, answer)
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
    columns = ["EN held", "EN held forced", "T held", "T->EN", "EN->T", "T refuse", "T second"]
    print_metrics(results["metrics"], columns)
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
