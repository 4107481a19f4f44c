"""Why Not Transform Chat Large Language Models to Non-English? (TransLLM)
(Geng, Zhu, Li, ..., Yang, Huang, Frontiers of Computer Science 2025)
https://arxiv.org/abs/2405.13923

A chat model refuses, converses and knows things for which no public training data exists, in
English. To bring all of it to another language, let it think in English. Asked x_t, it writes a
translation chain of thought (TCOT): the query x_en and its answer y_en in English, then y_t,

    <EN> x_en <RESPONSE> y_en <T> y_t
    p(TCOT) = p(x_en | x_t) p(y_en | x_t, x_en) p(y_t | x_t, x_en, y_en)

Stage 1 reads text of the new language, stage 2 parallel text, L = - mean log p(s_t | s_<t); English
breaks off into the new language. Stage 3 teaches the chain and brings English back by recovery KD:
it learns answers that the untouched model theta0 gave itself, in English and in the chains,

    L3 = - mean log p(response token | prefix),      y_en from p(. | x_en; theta0), greedy here

One adapter (LoRA) and the new rows of embedding and head learn in all three stages (the authors
train these matrices whole). theta0 stays as it is: with the adapter at 0 and the new words left out
it is there again, bit for bit.

Found   (four seeds; chance .12) Thinking in English answers .88 of the facts that stage 3 never
        asked, answering at once .19. Stages 1 and 2 bring English from 1.00 to .09, own answers
        back to .95. The same facts in another teacher's words do so as well if the value still ends
        the sentence (.95), and not if it begins it (.49); nor do wrong values (.31). Whether own
        answers are better, as in the paper, is undecided.
Run     python methods/transllm.py                  # 2 CPU cores, 1-2 min: look inside the stages
        python methods/experiments/transllm.py      # seeds, controls, claims, figure
        python methods/real/transllm.py --help      # your chat model, texts and translations
Try     one arm of the experiment (right answers in English and in the new language)
        --methods no-rkd            .00 and .83: it translates English questions
        --methods "value first"     .49 and .34: a teacher who turns the sentence round
        --methods no-translation    .98 and .21: without stage 2 it thinks, and cannot say it
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from methods.worlds.transllm import (
    ALL_VALUES,
    BENIGN,
    BOS,
    DEEDS,
    EOS,
    HARMFUL,
    ID,
    NAMES,
    SAY,
    TAUGHT,
    VALUES,
    WORDS,
    ChatWorld,
    Pair,
    V,
    encode,
    is_target,
    prompt,
    show,
    translate,
)
from minilm import InputError
from minilm.data import generator, prompt_masked
from minilm.generate import generate
from minilm.lora import add_lora, extend_vocabulary
from minilm.ops import linear_cross_entropy
from minilm.results import check_range, cli, progress
from minilm.training import make_optimizers, schedule, set_lr, take_step
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer

# --- 1. think in English: the chain, and how it is cut


class Tags(NamedTuple):
    """Ids of the three tags. A tag opens a segment, which ends at the next tag or at EOS."""

    english: int
    response: int
    target: int


# Ids: 0 to WORDS - 1 padding and marks, V English words, V of the target language, three tags
TAGS = Tags(*range(WORDS + 2 * V, WORDS + 2 * V + 3))


def tcot(tags: Tags, query: Sequence[int], response: Sequence[int], answer: Sequence[int]) -> list:
    """What the assistant says to a query of the target language:

    <EN> the query in English <RESPONSE> the answer in English <T> the answer in the target language
    """
    return [tags.english, *query, tags.response, *response, tags.target, *answer]


class Chain(NamedTuple):
    english: list[int] | None  # None: the tag is missing
    response: list[int] | None
    answer: list[int] | None
    well_formed: bool  # begins with <EN>; each tag once and in this order; nothing was cut off


def parse_chain(ids: Sequence[int], tags: Tags, ended: bool = True) -> Chain:
    """Cuts newly generated ids (without EOS) at the tags. A tag's first occurrence counts. `ended`:
    whether the text ended by itself; what was cut off at a limit is no well-formed chain. (The
    official script crashes where a tag is missing; here such a chain counts as wrong.) By hand:
    test_the_chain_and_its_three_segments_by_hand."""
    stray = segment = []  # what comes before the first tag
    opened = []
    segments: dict[int, list[int]] = {}
    for token in ids:
        if token in tags:
            segment = []
            segments.setdefault(token, segment)
            opened.append(token)
        else:
            segment.append(token)
    well_formed = ended and not stray and opened == list(tags)
    return Chain(*(segments.get(tag) for tag in tags), well_formed)


class Answer(NamedTuple):
    ids: list[int]  # without EOS
    ended: bool  # by itself: no part of it was cut off at the limit
    helped: bool = False  # a tag was appended to it


def complete(model, prompts, eos: int | list[int], limit: int) -> list[Answer]:
    """Greedy answers of at most `limit` tokens. eos: an id, or several."""
    ends = {eos} if isinstance(eos, int) else set(eos)
    answers = []
    for read, row in zip(prompts, generate(model, prompts, limit, eos_id=eos)):
        new = row[len(read) :]
        ended = bool(new) and new[-1] in ends
        answers.append(Answer(new[:-1] if ended else new, ended))
    return answers


def respond(
    model,
    prompts: Sequence[list[int]],
    eos: int | list[int],
    needed: Sequence[int] = (),
    limit: int = 40,
) -> list[Answer]:
    """Greedy answers. Where a tag of `needed` is missing it is appended, and decoding goes on from
    there, once per tag (the authors: fewer than 5% of cases; they do so in the second turn only).
    `limit`: new tokens, and after each appended tag again."""
    answers = complete(model, prompts, eos, limit)
    for tag in needed:
        missing = [i for i, answer in enumerate(answers) if tag not in answer.ids]
        if not missing:
            continue
        begun = [[*prompts[i], *answers[i].ids, tag] for i in missing]
        for i, more in zip(missing, complete(model, begun, eos, limit)):
            ids, ended, _ = answers[i]
            answers[i] = Answer([*ids, tag, *more.ids], ended and more.ended, helped=True)
    return answers


# --- 2. recovery KD: what the untouched model says


def why_dropped(answer: Answer) -> str:
    """Why no training text can be made of an answer; "" if one can. A refusal is an answer like any
    other: it belongs to what is to be recovered."""
    if not answer.ended:
        return "cut off"
    return "" if answer.ids else "empty"


def make_rkd(model, prompts, eos: int | list[int], limit: int = 40) -> dict[int, list[int]]:
    """{number of the prompt: y_en ~ p(. | x_en; theta0)}, where `model` is theta0: the chat model
    before it has seen a word of the new language (afterwards one would distil the damage)."""
    answers = complete(model, prompts, eos, limit)
    return {i: answer.ids for i, answer in enumerate(answers) if not why_dropped(answer)}


# --- 3. one adapter through all stages


def extend(base: Transformer, rank: int, seed: int) -> Transformer:
    """A copy of the chat model with rows for the target's words and the tags, frozen but for an
    adapter, embedding and head (of which `train` leaves the old rows as they are)."""
    model = copy.deepcopy(base)
    extend_vocabulary(model, [[]] * (V + len(TAGS)))  # each the mean of all old rows
    add_lora(model, rank, 2 * rank, generator=generator(seed, "lora"))
    for module in (model.embed, model.lm_head):
        module.weight.requires_grad_(True)
    return model


def response_loss(model: Transformer, examples: Sequence[Pair]) -> torch.Tensor:
    """L3 = - mean over learned tokens of log p(token | all before it). So in stages 1 and 2: there
    BOS is read and all the rest is learned."""
    inputs, labels = (x.to(model.embed.weight.device) for x in prompt_masked(examples))
    return linear_cross_entropy(model.hidden(inputs), model.lm_head.weight, labels)


def train(
    model: Transformer,
    draw: Callable[[], Pair],
    steps: int,
    lr: float,
    *,
    batch: int = 32,
    frozen: int = 0,
    desc: str = "",
) -> None:
    """Trains what requires a gradient on examples from `draw`. The first `frozen` rows of embedding
    and head get no gradient and, without weight decay, stay as they are."""

    def keep(gradient):
        return torch.cat((torch.zeros_like(gradient[:frozen]), gradient[frozen:]))

    hooks = [m.weight.register_hook(keep) for m in (model.embed, model.lm_head)]
    optimizers = make_optimizers(model, "adamw", lr, weight_decay=0.0)
    for step in progress(range(steps), desc):
        set_lr(optimizers, schedule(step, steps, warmup=steps // 20))
        take_step(response_loss(model, [draw() for _ in range(batch)]), model, optimizers)
    for hook in hooks:
        hook.remove()


OLD_ROWS = WORDS + V  # rows of embedding and head that the chat model had


def pretrain(
    model: Transformer,
    world: ChatWorld,
    seed: int,
    *,
    mono_steps: int = 80,
    translation_steps: int = 1300,
    english: float = 0.2,
    lr: float = 2e-3,
    batch: int = 32,
    frozen: int = OLD_ROWS,
) -> Iterator[Transformer]:
    """Stages 1 and 2, in place. Yields the model after each. `english`: the share of stage 2's
    text that is English without its translation. Texts state values that are drawn at random: what
    the base knows of a person is neither repeated nor taught again."""
    rng = random.Random(f"{seed}/pretraining")

    def target_text() -> Pair:  # stage 1
        return [BOS], [*translate(world.sentence(rng)), EOS]

    def parallel_text() -> Pair:  # stage 2
        kind = rng.random()
        text = world.sentence(rng)
        if kind < english:
            return [BOS], [*text, EOS]
        if kind < (1 + english) / 2:
            return [BOS], [*translate(text), TAGS.english, *text, EOS]
        return [BOS], [*text, TAGS.target, *translate(text), EOS]

    stages = ((target_text, mono_steps, "stage 1"), (parallel_text, translation_steps, "stage 2"))
    for draw, steps, desc in stages:
        train(model, draw, steps, lr, batch=batch, frozen=frozen, desc=desc)
        yield model


def lessons(query: list[int], response: list[int], chain: bool = True) -> tuple[Pair, Pair]:
    """Stage 3's two examples of an English query and its answer, [what is read] what is learned:

    RKD     [<s> [user] x_en [assistant]] <RESPONSE> y_en </s>
    TCOT    [<s> [user] x_t [assistant]] <EN> x_en <RESPONSE> y_en <T> y_t </s>

    x_t and y_t by machine translation. chain False: x_t is answered at once, with <T> y_t </s>."""
    answer = translate(response)
    said = tcot(TAGS, query, response, answer) if chain else [TAGS.target, *answer]
    rkd = prompt(query), [TAGS.response, *response, EOS]
    return rkd, (prompt(translate(query)), [*said, EOS])


def transfer(
    model: Transformer,
    world: ChatWorld,
    taught: Sequence[Pair],
    seed: int,
    *,
    mix: tuple[float, float, float] = (0.4, 0.4, 0.2),
    chain: bool = True,
    steps: int = 200,
    lr: float = 2e-3,
    batch: int = 32,
    frozen: int = OLD_ROWS,
) -> Transformer:
    """Stage 3, in place: RKD, TCOT and translation in the shares of `mix`. taught: English queries
    with the answers that are to be learned. A translation is asked for by the bare sentence, in the
    place of a query: statements are translated, questions answered."""
    rng = random.Random(f"{seed}/transfer")
    examples = [lessons(query, response, chain) for query, response in taught]

    def draw() -> Pair:
        kind = rng.choices(("rkd", "tcot", "translation"), mix)[0]
        text = world.sentence(rng, TAUGHT)
        rkd, foreign = rng.choice(examples)
        if kind == "rkd":
            return rkd
        if kind == "tcot":
            return foreign
        if rng.random() < 0.5:
            return prompt(translate(text)), [TAGS.english, *text, EOS]
        return prompt(text), [TAGS.target, *translate(text), EOS]

    train(model, draw, steps, lr, batch=batch, frozen=frozen, desc="stage 3")
    return model.eval()


# --- 4. ask the model


def english_answers(model, prompts: Sequence[list[int]], limit: int = 40) -> list[list[int]]:
    """What the model says to English prompts, tags left out."""
    answers = respond(model, prompts, EOS, limit=limit)
    return [[i for i in answer.ids if i not in TAGS] for answer in answers]


class Foreign(NamedTuple):
    """What a model says to prompts in the target language."""

    answers: list[list[int]]  # back in English words (`translate`); [] where it is ill-formed
    chains: list[Chain]
    helped: float  # share of them to which a tag was appended


def target_answers(
    model, prompts: Sequence[list[int]], chain: bool = True, limit: int = 40
) -> Foreign:
    """Answers to prompts in the target language. chain False: <T> and an answer is all."""
    said = respond(model, prompts, EOS, TAGS[1:] if chain else (), limit)
    chains = [parse_chain(answer.ids, TAGS, answer.ended) for answer in said]
    answers = []
    for answer, parsed in zip(said, chains):
        valid = parsed.well_formed
        if not chain:  # <T> and the answer, nothing else
            valid = answer.ended and answer.ids == [TAGS.target, *(parsed.answer or [])]
        valid = valid and is_target(parsed.answer)
        answers.append(translate(parsed.answer) if valid else [])
    return Foreign(answers, chains, sum(answer.helped for answer in said) / len(said))


def right(world: ChatWorld, answers: list[list[int]]) -> float:
    """Share of right answers to questions for the held-out facts. Chance: 1/8."""
    hits = [names_value(world, fact, ids) for fact, ids in zip(world.held, answers)]
    return sum(hits) / len(world.held)


def names_value(world: ChatWorld, fact: tuple, answer: list[int]) -> bool:
    """Does the answer name the fact's value, once, and no other?"""
    values = {ID[v] for v in ALL_VALUES}
    return [i for i in answer if i in values] == [ID[world.facts[fact]]]


# --- look inside


def show_lessons(query: list[int], response: list[int]) -> None:
    print("Stage 3 teaches, [what is read] what is learned:")
    for read, learned in lessons(query, response):
        print(f"  [{show(read)}] {show(learned)}")


def show_english(models: dict[str, Transformer], world: ChatWorld, questions: int = 3) -> None:
    """English questions that stage 3 never asks, answered after each stage."""
    facts = world.held[:questions]
    queries = [world.question(fact) for fact in facts]
    print("\nEnglish questions that stage 3 never asks; (!): not the right value")
    print(f"  {'':22}" + "".join(f"{show(query):32}" for query in queries))
    for name, model in models.items():
        row = ""
        for fact, ids in zip(facts, english_answers(model, [prompt(q) for q in queries])):
            mark = "" if names_value(world, fact, ids) else " (!)"
            row += f"{show(ids)[:26] + mark:32}"
        print(f"  {name:22}{row}")


def segments(model, query: list[int], chain: bool = True) -> dict[str, str]:
    """One target-language query and what the model says to it, cut at the tags, in words."""
    said = respond(model, [prompt(query)], EOS, TAGS[1:] if chain else ())[0]
    rows = {"[user]": show(query)}
    for tag, part in zip(TAGS, parse_chain(said.ids, TAGS, said.ended)):
        if part is not None:
            rows[show([tag])] = show(part)
    return rows


def show_segments(rows: dict[str, str], title: str) -> None:
    print(f"\n{title}")
    for tag, text in rows.items():
        print(f"  {tag:12}{text}")


# --- run it


def train_base(
    world: ChatWorld,
    seed: int,
    *,
    steps: int = 700,
    lr: float = 3e-3,
    batch: int = 32,
    width: int = 64,
    layers: int = 3,
) -> Transformer:
    """The English chat model theta0: facts, recipes, refusals and saying in one turn; facts also in
    a second turn."""
    rng = random.Random(f"{seed}/base")
    skill = [pair for thing in BENIGN + HARMFUL for pair in world.how_to(thing)]

    def draw() -> Pair:  # .1 plain text, .1 sayings, .15 recipes and refusals, .3 facts, and
        kind = rng.random()  # .35 facts with a second turn
        name = rng.choice(NAMES)
        a, b = rng.sample(list(VALUES), 2)
        said = world.sentence(rng, SAY)
        first = world.question((name, a)), world.answer((name, a))
        if kind < 0.1:
            return [BOS], [*world.sentence(rng, DEEDS), EOS]
        if kind >= 0.65:
            second = world.answer((name, b))
            return prompt(*first, encode(f"and the {b} ?")), [*second, EOS]
        if kind < 0.2:
            query, answer = said, said[1:]
        else:
            query, answer = rng.choice(skill) if kind < 0.35 else first
        return prompt(query), [*answer, EOS]

    config = ModelConfig(
        vocab_size=WORDS + V,
        hidden_size=width,
        intermediate_size=8 * width // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.05,
        model_type="llama",
    )
    model = Transformer(config, generator(seed, "init"))
    train(model, draw, steps, lr, batch=batch, desc="chat model")
    return model.eval()


@dataclass(frozen=True)
class Config:
    base_steps: int = 700  # the English chat model: optimizer steps
    mono_steps: int = 80  # stage 1: text in the target language
    translation_steps: int = 1300  # stage 2: parallel text
    transfer_steps: int = 200  # stage 3
    mix: tuple[float, float, float] = (0.4, 0.4, 0.2)  # stage 3: RKD, TCOT, translation
    lora_rank: int = 8  # of the adapter
    seed: int = 100  # of world, weights and texts
    quick: bool = False  # smoke run of seconds: a few steps, numbers without meaning


def main(cfg: Config) -> None:
    check_range(cfg, "base_steps mono_steps translation_steps transfer_steps lora_rank", least=1)
    check_range(cfg, "mix", least=0)
    if sum(cfg.mix) == 0:
        raise InputError(f"--mix {cfg.mix}: give at least one share above 0")
    if cfg.quick:
        cfg = replace(cfg, base_steps=3, mono_steps=2, translation_steps=3, transfer_steps=2)
    world = ChatWorld(cfg.seed)  # 120 facts: stage 3 asks 90, and never the other 30 (world.held)
    fact = world.asked[0]
    show_lessons(world.question(fact), world.answer(fact))

    base = train_base(world, cfg.seed, steps=cfg.base_steps)
    own = make_rkd(base, [prompt(query) for query in world.pool], EOS)
    if not own:
        raise InputError("the chat model does not end its answers: give more --base-steps")
    taught = [(world.pool[i], response) for i, response in own.items()]

    model = extend(base, cfg.lora_rank, cfg.seed)
    steps = {"mono_steps": cfg.mono_steps, "translation_steps": cfg.translation_steps}
    for _ in pretrain(model, world, cfg.seed, **steps):
        pass  # stages 1 and 2, in place
    arms = {  # name -> (shares, chain)
        "without recovery KD": ((0.0, *cfg.mix[1:]), True),
        "answered at once": (cfg.mix, False),
        "TransLLM": (cfg.mix, True),
    }
    transferred = {}
    for name, (mix, chain) in arms.items():
        copied = copy.deepcopy(model)
        transferred[name] = transfer(
            copied, world, taught, cfg.seed, mix=mix, chain=chain, steps=cfg.transfer_steps
        )

    after = {"chat model": base, "after stage 2": model, "after stage 3": transferred["TransLLM"]}
    after["stage 3, no RKD"] = transferred["without recovery KD"]  # it only translates
    show_english(after, world)
    query = translate(world.question(world.held[0]))
    show_segments(segments(transferred["TransLLM"], query), "The chain, in its segments")
    at_once = segments(transferred["answered at once"], query, chain=False)
    show_segments(at_once, "Answered at once, after the same stages 1 and 2")

    print("\nheld-out facts, right answers   asked in English   in the new language")
    questions = [world.question(f) for f in world.held]
    for name, asked in {"chat model": base, "after stage 2": model, **transferred}.items():
        english = right(world, english_answers(asked, [prompt(q) for q in questions]))
        row = f"{name:32}{english:16.2f}"
        if name in arms:
            foreign = [prompt(translate(q)) for q in questions]
            row += f"{right(world, target_answers(asked, foreign, arms[name][1]).answers):22.2f}"
        print(row)
    print(f"{'chance':32}{1 / 8:16.2f}{1 / 8:22.2f}")
    print("One model: this proves nothing. Seeds and controls: methods/experiments/transllm.py")


if __name__ == "__main__":
    cli(main, Config)
