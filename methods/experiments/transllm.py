"""Why Not Transform Chat Large Language Models to Non-English? (TransLLM)
(Xiang Geng, Ming Zhu, Jiahuan Li, Shujian Huang et al., Frontiers of Computer Science 2025), https://arxiv.org/abs/2405.13923

Idea    A chat model refuses, holds a conversation and knows things for which no public training data exists, in English. To bring all of
        it to another language, let it think in English, in a translation chain of thought (TCOT):
            <EN> the query in English <RESPONSE> the answer in English <T> the answer in the target language
        An adapter learns the language (stage 1: its text; stage 2: parallel text), and that makes the model forget. Stage 3 fine-tunes on
        chains whose English half is *recovery KD*: answers that the untouched model itself generated,
            L3 = - mean log p(response token | prefix),     yhat ~ p(. | x_en; theta0),     so what is learned is what theta0 already does.
Claims  C1 the chain beats answering at once; C2 English is forgotten and recovered; C3 own answers recover more than another teacher's;
        C4a refusals, C4b second turns carry over; C5 a frozen base beats full fine-tuning; of the sub-tasks C6a stage 2, C6b stage 3's
        own translations, C7 stage 1 counts (C6b, C7: --full).
Run     python methods/experiments/transllm.py                     # 2 free CPU cores, ~4 min: table + figure; --full: all arms, 5 min
        python methods/real/transllm.py --help         # your chat model, texts and translations, stage by stage
Honest  The world is synthetic: 114 words, a target language that is English in other tokens and reversed order, a perfect translator. True
        facts and recipes are never text of stages 1 and 2. Arms share world, chat model, steps and draws, and differ in one thing, but for
        merge-full-ft: its adapter is merged, every weight learns, old rows of embedding and head as well, and at half the learning rate.
        Stage 3 never asks what the exam asks. It does ask for half of the forbidden things, and the chat model refuses (as Llama-2-chat
        refuses a few of Alpaca's instructions); C4a tests the other half, beside harmless things that it may not refuse. C4b is not
        reproduced: stage 2 destroys the second turn in English (.15) and stage 3 has nothing to restore it with; smaller steps in stage 2,
        "and the pet ?" among the translations of stage 3 and a forced <EN> did not help (pilots). For facts only stage 2 counts (T held
        .92): without it the way back, EN->T, fails (.02), while T->EN is learned in stage 3 as well (.94). C6b: without its translations
        stage 3 teaches facts no worse (.98), but .21 of the harmless things are refused, not .02. C7: the 80 steps of stage 1 are as well
        spent on stage 2 (.95), since parallel text holds the language's text. C6 read "every sub-task counts"; after the run it was split:
        C6a asks for more than C6 did, C6b is new.
Try     one arm alone (it gives the numbers of the whole run)  --methods no-rkd: English stays lost, EN held 0.00, yet the chain works
        (T held 0.85).  --methods gpt4-kd: other words for the same facts, 0.46 and 0.56.  --methods no-translation: 0.97 and 0.20.
"""

import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal, NamedTuple

import torch

from methods.worlds.transllm import (BENIGN, BOS, CANNOT, EOS, HARMFUL, ID, NAMES, TAUGHT, TEXT, VALUES, WORDS, Pair, V, ChatWorld, encode,
                                    is_target, prompt, show, translate)
from minilm import InputError
from minilm.data import generator, prompt_masked
from minilm.evaluate import continuation_logprobs
from minilm.generate import generate
from minilm.lora import add_lora, extend_vocabulary, merge_lora
from minilm.ops import linear_cross_entropy
from minilm.claims import check, print_claims
from minilm.results import COLORS, Outcome, bar_seeds, cli, new_figure, plot_seeds, print_metrics, progress, run_seeds, save_results
from minilm.training import make_optimizers, schedule, set_lr, take_step
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer

PAPER = "TransLLM, Frontiers of Computer Science 2025, arXiv 2405.13923"


@dataclass(frozen=True)
class Config:
    methods: tuple[str, ...] = ("transllm", "direct", "gpt4-kd", "no-rkd", "merge-full-ft", "no-translation")  # see ARMS
    seeds: tuple[int, ...] = (0, 1, 2, 3)  # one complete world, chat model and transformation per seed
    base_steps: int = 700  # the English chat model: optimizer steps
    base_lr: float = 3e-3  # ... learning rate
    mono_steps: int = 80  # stage 1: text in the target language
    translation_steps: int = 1300  # stage 2: parallel and English text
    english: float = 0.2  # stage 2: share of English text without its translation
    lr: float = 2e-3  # stages 1 and 2: learning rate
    transfer_steps: int = 200  # stage 3: RKD, TCOT and translation examples
    transfer_lr: float = 2e-3  # stage 3: learning rate
    full_lr: float = 1e-3  # stage 3: learning rate when every weight learns
    mix: tuple[float, float, float] = (0.4, 0.4, 0.2)  # stage 3: shares of RKD, TCOT and translation examples
    embed: Literal["new", "all"] = "new"  # rows of embedding and head that learn in the adapter's stages (the paper: all)
    lora_rank: int = 8  # r; alpha = 2 r
    batch: int = 32  # examples per step, in every stage
    width: int = 64  # model width
    layers: int = 3  # blocks
    quick: bool = False  # smoke run: a few steps, one seed
    full: bool = False  # every arm of ARMS
    workers: int | None = None  # seeds at a time (default: one per core)
    out: str | None = None  # folder for results in place of results/ or runs/


class Arm(NamedTuple):
    chain: bool = True  # TCOT; False: a target-language question is answered at once
    teacher: str = "self"  # who words stage 3's English answers: the chat model itself, or "another" (the paper: GPT-4)
    rkd: bool = True  # English questions in stage 3
    mt: bool = True  # translation on request in stage 3
    mono: bool = True  # stage 1; False: its steps go to stage 2
    translation: bool = True  # stage 2; False: its steps go to stage 1
    merge: bool = False  # the adapter is merged after stage 2, and in stage 3 every weight learns


ARMS = {"transllm": Arm(), "direct": Arm(chain=False), "gpt4-kd": Arm(teacher="another"), "no-rkd": Arm(rkd=False),
        "merge-full-ft": Arm(merge=True), "no-translation": Arm(translation=False), "no-mono": Arm(mono=False), "no-mt": Arm(mt=False)}

# --- data

# methods/worlds/transllm.py: a ChatWorld's `pool` is what stage 3 may ask, [(query, another teacher's answer)], `held` and `held_things` what the exam
# asks. The model reads prompt(query), "<s> [user] what is the pet of mia ? [assistant]", and learns what comes after it.


# --- the method

class Tags(NamedTuple):
    """Ids of the three tags. A tag opens a segment, which ends at the next tag or at EOS."""

    english: int
    response: int
    target: int


TAGS = Tags(*range(WORDS + 2 * V, WORDS + 2 * V + 3))


def tcot(tags: Tags, query: Sequence[int], response: Sequence[int], answer: Sequence[int]) -> list[int]:
    """What the assistant says to a target-language query: <EN> query in English <RESPONSE> answer in English <T> answer in the target
    language. p(TCOT) = p(x_en | x_t) p(yhat | x_t, x_en) p(y_t | x_t, x_en, yhat)"""
    return [tags.english, *query, tags.response, *response, tags.target, *answer]


class Chain(NamedTuple):
    english: list[int] | None  # None: the tag is missing
    response: list[int] | None
    answer: list[int] | None
    well_formed: bool  # begins with <EN>; all three tags, each once and in this order


def parse_chain(ids: Sequence[int], tags: Tags) -> Chain:
    """Cuts newly generated ids (without EOS) at the tags: a segment runs from the first occurrence of its tag to the next tag."""
    ids = list(ids)
    at = [i for i, token in enumerate(ids) if token in tags] + [len(ids)]
    segments = {ids[a]: ids[a + 1 : b] for a, b in reversed(list(zip(at, at[1:])))}  # reversed: the first occurrence wins
    return Chain(*(segments.get(tag) for tag in tags), at[0] == 0 and [ids[a] for a in at[:-1]] == list(tags))


def respond(model, prompts: Sequence[list[int]], eos: int | list[int], needed: Sequence[int] = (),
            limit: int = 40) -> tuple[list[list[int]], float]:
    """Greedy answers without EOS (an id, or several). Where a tag of `needed` is missing, it is appended and decoding goes on from
    there, once per tag. -> answers, share of them that were helped in this way."""
    ends = {eos} if isinstance(eos, int) else set(eos)

    def go_on(rows):
        return [[i for i in longer[len(row) :] if i not in ends] for row, longer in zip(rows, generate(model, rows, limit, eos_id=eos))]

    answers, helped = go_on(prompts), set()
    for tag in needed:
        missing = [i for i, answer in enumerate(answers) if tag not in answer]
        helped |= set(missing)
        for i, more in zip(missing, go_on([[*prompts[i], *answers[i], tag] for i in missing]) if missing else ()):
            answers[i] += [tag, *more]
    return answers, len(helped) / len(answers)


def make_rkd(model, prompts: Sequence[Sequence[int]], eos: int | list[int], limit: int = 40) -> dict[int, list[int]]:
    """Recovery KD: {number of the prompt: answer yhat ~ p(. | x_en; theta0) of the untouched chat model}. An answer that is empty or cut
    off (no EOS within `limit`) is dropped; a refusal is an answer like any other."""
    rows = [row[len(p) :] for row, p in zip(generate(model, prompts, limit, eos_id=eos), prompts)]
    ends = {eos} if isinstance(eos, int) else set(eos)
    return {i: row[:-1] for i, row in enumerate(rows) if len(row) > 1 and row[-1] in ends}


def extend(cfg: Config, base: Transformer, seed: int) -> Transformer:
    """A copy of the chat model with rows for the target's words and the tags, frozen but for an adapter, embedding and head. One adapter
    goes through all three stages: theta0 is never touched, so the original function stays within reach (at adapter 0)."""
    model = copy.deepcopy(base)
    extend_vocabulary(model, [[]] * (V + len(TAGS)))
    add_lora(model, cfg.lora_rank, 2 * cfg.lora_rank, generator=generator(seed, "lora"))
    for module in (model.embed, model.lm_head):
        module.weight.requires_grad_(True)
    return model


# --- loss

def response_loss(model: Transformer, examples: Sequence[Pair]) -> torch.Tensor:
    """L3 = - mean over learned tokens of log p(token | all tokens before it); with nothing but BOS as what is read it is L1."""
    inputs, labels = (x.to(model.embed.weight.device) for x in prompt_masked(examples))
    return linear_cross_entropy(model.hidden(inputs), model.lm_head.weight, labels)


# --- train

def train(cfg: Config, model: Transformer, draw: Callable[[], Pair], steps: int, lr: float, desc: str, first: int = 0) -> None:
    """Examples come from `draw`. Rows of embedding and head before `first` get no gradient and, without weight decay, stay as they are."""
    keep = lambda grad: torch.cat((torch.zeros_like(grad[:first]), grad[first:]))
    hooks = [module.weight.register_hook(keep) for module in (model.embed, model.lm_head)]
    optimizers = make_optimizers(model, "adamw", lr, weight_decay=0.0)
    for step in progress(range(steps), desc):
        set_lr(optimizers, schedule(step, steps, warmup=steps // 20))
        take_step(response_loss(model, [draw() for _ in range(cfg.batch)]), model, optimizers)
    for hook in hooks:
        hook.remove()


def train_base(cfg: Config, world: ChatWorld, seed: int) -> Transformer:
    """The English chat model: facts, recipes, refusals and saying in one turn; facts also in a second."""
    rng = random.Random(f"{seed}/base")
    skill = [pair for thing in BENIGN + HARMFUL for pair in world.how_to(thing)]

    def draw():
        kind, name, (a, b), said = rng.random(), rng.choice(NAMES), rng.sample(list(VALUES), 2), world.sentence(rng, TEXT[2:3])
        first = world.question((name, a)), world.answer((name, a))
        if kind < 0.1:
            return [BOS], [*world.sentence(rng, TEXT[:2]), EOS]
        if kind < 0.65:
            query, answer = (said, said[1:]) if kind < 0.2 else rng.choice(skill) if kind < 0.35 else first
            return prompt(query), [*answer, EOS]
        return prompt(*first, encode(f"and the {b} ?")), [*world.answer((name, b)), EOS]

    model = Transformer(ModelConfig(
        vocab_size=WORDS + V, hidden_size=cfg.width, intermediate_size=8 * cfg.width // 3 // 16 * 16, num_hidden_layers=cfg.layers,
        num_attention_heads=4, max_position_embeddings=256, initializer_range=0.05, model_type="llama"), generator(seed, "init"))
    train(cfg, model, draw, cfg.base_steps, cfg.base_lr, "chat model")
    return model.eval()


def pretrain(cfg: Config, arm: Arm, model: Transformer, world: ChatWorld, seed: int) -> list[Transformer]:
    """Stages 1 and 2 -> the model after each. Both are plain next-token prediction; an arm without one gives its steps to the other."""
    rng, stages = random.Random(f"{seed}/pretraining"), []
    mono = lambda: ([BOS], [*translate(world.sentence(rng)), EOS])

    def translation():
        kind, english = rng.random(), world.sentence(rng)
        if kind < cfg.english:
            return [BOS], [*english, EOS]
        if kind < (1 + cfg.english) / 2:
            return [BOS], [*translate(english), TAGS.english, *english, EOS]
        return [BOS], [*english, TAGS.target, *translate(english), EOS]

    mono_steps = cfg.mono_steps * arm.mono + cfg.translation_steps * (not arm.translation)
    for draw, steps, desc in ((mono, mono_steps, "stage 1"), (translation, cfg.mono_steps + cfg.translation_steps - mono_steps, "stage 2")):
        train(cfg, model, draw, steps, cfg.lr, desc, WORDS + V if cfg.embed == "new" else 0)
        stages.append(copy.deepcopy(model))
    return stages


def transfer(cfg: Config, arm: Arm, model: Transformer, world: ChatWorld, rkd: dict[int, list[int]], seed: int) -> Transformer:
    """Stage 3, on a copy of the model: RKD, TCOT made from it by translating both sides, and translation on request."""
    rng, model, examples = random.Random(f"{seed}/transfer"), copy.deepcopy(model), []
    if arm.merge:
        merge_lora(model, keep=False)
    for i, response in rkd.items():
        query, response = world.pool[i][0], response if arm.teacher == "self" else world.pool[i][1]
        answer = translate(response)
        foreign = tcot(TAGS, query, response, answer) if arm.chain else [TAGS.target, *answer]
        examples.append(((prompt(query), [TAGS.response, *response, EOS]), (prompt(translate(query)), [*foreign, EOS])))

    def draw():
        kind = rng.choices(("rkd", "tcot", "mt"), [share * on for share, on in zip(cfg.mix, (arm.rkd, True, arm.mt))])[0]
        text, (rkd_example, tcot_example) = world.sentence(rng, TAUGHT), rng.choice(examples)
        if kind != "mt":
            return rkd_example if kind == "rkd" else tcot_example
        if rng.random() < 0.5:
            return prompt(translate(text)), [TAGS.english, *text, EOS]
        return prompt(text), [TAGS.target, *translate(text), EOS]

    train(cfg, model, draw, cfg.transfer_steps, cfg.full_lr if arm.merge else cfg.transfer_lr, "stage 3",
          WORDS + V if cfg.embed == "new" and not arm.merge else 0)
    return model.eval()


# --- evaluate

def exam(world: ChatWorld, ask: Callable, say: Callable, histories: Sequence[Pair]) -> dict[str, float]:
    """ask(prompts) -> answers in English words; say(query) -> the query in the language of the exam. Held facts (does the answer hold the
    right value and no other?), held-out things, and a held fact asked for in the second turn, "and the pet ?"."""
    all_values = {ID[v] for values in VALUES.values() for v in values}
    right = lambda answers: fmean(all_values & set(a) == {ID[world.facts[f]]} for a, f in zip(answers, world.held))
    benign, harmful = ([pair for x in things for pair in world.how_to(x)] for things in world.held_things)
    made, refused = (ask([prompt(say(q)) for q, _ in pairs]) for pairs in (benign, harmful))
    return {"held": right(ask([prompt(say(world.question(f))) for f in world.held])), "refuse": fmean(CANNOT in a for a in refused),
            "over-refuse": fmean(CANNOT in a for a in made), "how-to": fmean(a == y for a, (_, y) in zip(made, benign)),
            "second": right(ask([prompt(*turn, say(encode(f"and the {a} ?"))) for turn, (_, a) in zip(histories, world.held)]))}


def evaluate(model: Transformer, world: ChatWorld, arm: Arm | None = None) -> dict[str, float]:
    """The exam in English and, with the arm of a transformed model, in the target language."""
    def english(prompts):
        return [[i for i in answer if i not in TAGS] for answer in respond(model, prompts, EOS)[0]]

    def target(prompts):
        answers, forced = respond(model, prompts, EOS, TAGS[1:] if arm.chain else ())
        chains = [parse_chain(answer, TAGS) for answer in answers]
        log.append((chains, forced))
        valid = [c.well_formed if arm.chain else answer == [TAGS.target, *(c.answer or [])] for c, answer in zip(chains, answers)]
        return [translate(c.answer) if ok and is_target(c.answer) else [] for ok, c in zip(valid, chains)]  # ill-formed: nothing is right

    before = [world.question((name, next(b for b in VALUES if b != a))) for name, a in world.held]  # the first turn, before "and the pet ?"
    metrics = {f"EN {name}": v for name, v in exam(world, english, list, list(zip(before, english([prompt(q) for q in before])))).items()}
    if arm is None:
        return metrics
    log: list = []
    target([prompt(translate(q)) for q in before])
    # With a chain the history is rewritten in English, the one language in which the model has ever seen two turns.
    histories = [(c.english or [], c.response or []) if arm.chain else (translate(q), c.answer or []) for (c, q) in zip(log[0][0], before)]
    metrics |= {f"T {name}": v for name, v in exam(world, target, translate, histories).items()}
    if arm.chain:
        chains, forced = log[3]  # after the first turns and the two kinds of things: the held facts
        metrics |= {"well-formed": fmean(c.well_formed for c in chains), "forced": forced, "forced second": log[4][1],
                    "T->EN": fmean(c.english == world.question(f) for c, f in zip(chains, world.held)),
                    "EN->T": fmean(bool(c.response) and c.answer == translate(c.response) for c in chains)}
    return metrics


# --- one seed

def run(cfg: Config, seed: int) -> Outcome:
    """All arms of one seed: the same world, chat model, RKD answers, and (arms that share them) stages 1 and 2."""
    world, outcome, stages = ChatWorld(seed), Outcome({}, {}), {}
    base, questions = train_base(cfg, world, seed), [prompt(world.question(f)) for f in world.held]
    outcome.metrics["original"] = evaluate(base, world)
    rkd, own = (make_rkd(base, prompts, EOS) for prompts in ([prompt(q) for q, _ in world.pool], questions))
    if not rkd or not own:
        raise InputError(f"after --base-steps {cfg.base_steps} the chat model does not end its answers, so there is no RKD: train longer")

    def point(model, *tag):
        """English accuracy on the held facts, and the mean log-probability per token of the original's own answers to them."""
        scores = continuation_logprobs(model, [([*questions[i], *tag], [*answer, EOS]) for i, answer in own.items()])
        return evaluate(model, world)["EN held"], scores.mean.mean().item()

    for name in cfg.methods:
        arm = ARMS[name]
        if (key := (arm.mono, arm.translation)) not in stages:
            models = pretrain(cfg, arm, extend(cfg, base, seed), world, seed)
            stages[key] = models[-1], [point(m) for m in (base, *models)]
        model = transfer(cfg, arm, stages[key][0], world, rkd, seed)
        curve = [*stages[key][1], point(model, TAGS.response)]
        outcome.metrics[name] = evaluate(model, world, arm) | {"EN before stage 3": curve[2][0], "loglik": curve[3][1]}
        outcome.series[name] = {"EN held": (range(4), [p[0] for p in curve]), "loglik": (range(4), [p[1] for p in curve])}
        if not arm.merge and cfg.embed == "new":  # theta0 is what it was, bit for bit
            state = model.state_dict()
            assert all(torch.equal(state[n][: len(p)], p) for n, p in base.state_dict().items())
    return outcome


# --- claims

def claims(metrics: dict) -> list[dict]:
    """The paper's directional claims, decided on means over seeds. The rules were fixed before the default seeds ran."""
    def row(id, statement, rule, evidence, test, paper):
        """`test` gets f(metric, arm="transllm") -> mean."""
        evidence = {name: arms.split() for name, arms in evidence.items()}
        return check(metrics, id, statement, rule, evidence, lambda m: test(lambda name, arm="transllm": m(arm, name)), paper)

    return [
        row("C1", "Thinking in English beats answering at once", "T held: transllm >= direct + 0.30", {"T held": "transllm direct"},
            lambda f: f("T held") >= f("T held", "direct") + 0.30, "beats strong baselines"),
        row("C2", "Learning the language makes English forgotten; recovery KD restores it, also for questions it never asks",
            "EN held falls by >= 0.30 until stage 3, which recovers at least half of the fall",
            {"EN held": "original transllm no-rkd", "EN before stage 3": "transllm"},
            lambda f: (fall := f("EN held", "original") - f("EN before stage 3")) >= 0.30
            and f("EN held") - f("EN before stage 3") >= 0.5 * fall, "recovery KD against catastrophic forgetting"),
        row("C3", "The model's own answers recover more than another teacher's", "EN held and T held: transllm > gpt4-kd",
            {name: "transllm gpt4-kd" for name in ("EN held", "T held")},
            lambda f: all(f(name) > f(name, "gpt4-kd") for name in ("EN held", "T held")), "contrast with earlier distillation"),
        row("C4a", "Refusals carry over without safety data", "T refuse (of things that stage 3 never asks for) >= 0.5 x the original's EN "
            "refuse, and T refuse - T over-refuse > 0 and > direct's",
            {"EN refuse": "original transllm"} | {f"T {name}": "transllm direct" for name in ("refuse", "over-refuse", "how-to")},
            lambda f: f("T refuse") >= 0.5 * f("EN refuse", "original") and f("T refuse") - f("T over-refuse") > max(
                0, f("T refuse", "direct") - f("T over-refuse", "direct")), "rejects more harmful queries than ChatGPT and GPT-4"),
        row("C4b", "The second turn carries over from single-turn data", "T second >= 0.5 x the original's EN second, and > direct",
            {"EN second": "original transllm", "T second": "transllm direct"}, lambda f: f("T second") >= 0.5 * f("EN second", "original")
            and f("T second") > f("T second", "direct"), "multi-turn ability from single-turn data"),
        row("C5", "A frozen base with an adapter keeps more than merging and full fine-tuning", "EN held: transllm > merge-full-ft",
            {name: "transllm merge-full-ft" for name in ("EN held", "T held")},
            lambda f: f("EN held") > f("EN held", "merge-full-ft"), "LoRA and recovery KD are complementary"),
        row("C6a", "The chain is as good as its three links, and without stage 2 a link breaks", "T held is within 0.15 of T->EN x EN held "
            "x EN->T; without stage 2, T->EN is lower and T held lower by 0.30", {"EN held": "transllm", "EN->T": "transllm"}
            | dict.fromkeys(("T->EN", "T held"), "transllm no-translation"),
            lambda f: abs(f("T held") - f("T->EN") * f("EN held") * f("EN->T")) <= 0.15
            and f("T->EN", "no-translation") < f("T->EN") and f("T held", "no-translation") <= f("T held") - 0.30, "all sub-tasks matter"),
        row("C6b", "Translation on request in stage 3 counts as well", "T held: no-mt < transllm",
            {name: "transllm no-mt" for name in ("T held", "T->EN", "T over-refuse")},
            lambda f: f("T held", "no-mt") < f("T held"), "all sub-tasks matter"),
        row("C7", "Stage 1 counts as well, but less", "T held: no-translation < no-mono < transllm",
            {name: "transllm no-mono no-translation" for name in ("T held", "T->EN")},
            lambda f: f("T held", "no-translation") < f("T held", "no-mono") < f("T held"), "all sub-tasks matter"),
    ]


# --- figure

def figure(results: dict):
    """Left: English over the stages, on questions that stage 3 never asks. Right: what each arm can do in the target language."""
    fig, (left, right) = new_figure(1, 2, width=13, height=4.8)
    for color, arm, style in zip(COLORS, ("transllm", "gpt4-kd", "no-rkd", "merge-full-ft"), ("-", "--", ":", "-.")):
        if arm in results["series"]:
            plot_seeds(left, **results["series"][arm]["EN held"], label=arm, color=color, linestyle=style)
    left.set_xticks(range(4), ["chat model", "+ its text\n(stage 1)", "+ translation\n(stage 2)", "+ transfer\n(stage 3)"])
    left.set(ylabel="accuracy", ylim=(-0.03, 1.05), title="English questions that stage 3 never asks")
    left.legend(loc="center left", bbox_to_anchor=(0, 0.45))
    arms = [arm for arm in results["metrics"] if arm != "original"]
    shown = {"T held": "facts", "T refuse": "harmful: refused", "T over-refuse": "harmless: refused (bad)", "T second": "second turn"}
    for k, (name, label) in enumerate(shown.items()):
        for i, arm in enumerate(arms):
            bar_seeds(right, i + 0.2 * (k - 1.5), results["metrics"][arm][name]["values"], COLORS[k], 0.19, label if i == 0 else None)
    right.axhline(results["metrics"]["original"]["EN held"]["mean"], color="#666666", linestyle="--", linewidth=1.2)
    right.set_xticks(range(len(arms)), [arm.replace("-", "-\n", 1) for arm in arms], fontsize=10)
    right.set(ylabel="share of answers", ylim=(-0.03, 1.35), title="Target language (dashed: chat model, perfect translators)")
    right.legend(loc="upper right", ncols=2)
    return fig


def main(cfg: Config) -> dict:
    started, asked = time.time(), cfg
    if wrong := set(cfg.methods) - set(ARMS):
        raise InputError(f"--methods {' '.join(sorted(wrong))} is not known; give some of {', '.join(ARMS)}")
    if min(cfg.mix) < 0 or cfg.mix[1] <= 0 or not 0 <= cfg.english < 1:
        raise InputError(f"--mix {cfg.mix}: no share below 0, the second above 0; --english {cfg.english}: from 0 to below 1")
    cfg = replace(cfg, methods=tuple(ARMS)) if cfg.full else cfg
    if cfg.quick:
        cfg = replace(cfg, seeds=cfg.seeds[:1], base_steps=3, mono_steps=2, translation_steps=3, transfer_steps=2)
    query, answer = ChatWorld(cfg.seeds[0]).how_to("cake")[0]
    print("Stage 3, [what is read] what is learned:")
    for read, learned in ((query, [TAGS.response, *answer]), (translate(query), tcot(TAGS, query, answer, translate(answer)))):
        print(f"  [{show(prompt(read))}] {show([*learned, EOS])}")
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    results = save_results(__file__, PAPER, asked, outcomes, claims, figure, started, cfg.seeds)
    print_metrics(results["metrics"], ["EN held", "T held", "T->EN", "EN->T", "T refuse", "T over-refuse", "T how-to", "T second"])
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
