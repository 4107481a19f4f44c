"""Formality is Favored: Unraveling the Learning Preferences of Large Language Models on Data with
Conflicting Knowledge (Jiahuan Li, Yiqing Cao, Shujian Huang, Jiajun Chen, EMNLP 2024)
https://arxiv.org/abs/2410.04784

Two texts contradict each other about the same person. Which one does a model that reads both
repeat? The paper finds that large models side with formal, cleanly spelled texts, and explains it:
they trust a feature (a style, a source) whose texts agreed with the rest of what they read. So a
preference for a meaningless mark can be made, and unmade, by choosing who is right elsewhere:

    evidence persons   c texts by A, c by B, which conflict;  m unmarked ones repeat A's version,
                       n repeat B's    (here c = 4, m + n = 8)
    test persons       c texts by A, c by B, which conflict;  nothing else

    Pr(A, B) = share of (test person, attribute) with  ppl("... A's value .") < ppl("... B's ...")

asked without a mark; 0.5 is no preference. Of a test person both versions are equally frequent:
only what was learned about others can move Pr. Training is ordinary: next tokens, all weights. The
published data mix both kinds of persons; here the evidence is read first (lesson 1), then the
conflict, in texts that are the same for all.

Found   (four seeds) Pr is .88 after m : n = 8 : 0 and .11 after 0 : 8; .52 where the texts carry no
        mark. In one mixed stage: .88 and .15. A second lesson, at 0 : 8, reverses the preference
        (.21); one at 8 : 0 does not (.95). At 4 : 4 single models lean by accident, .31 to .55.
Run     python methods/learning_preferences.py                  # 2 CPU cores, about a minute
        python methods/experiments/learning_preferences.py      # seeds, controls, claims, figure
        python methods/real/learning_preferences.py --help      # your checkpoint, your styles
Try     (Pr at 8 : 0, in place of .9; seeds 100 and 101)
        --evidence 5: five persons teach no lesson, .47
        --epochs 0: no lesson, .46
        call both sources "Times" in SOURCES: there is nothing to trust, .53
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from methods.worlds.learning_preferences import (
    ATTRIBUTES,
    PHRASINGS,
    SOURCES,
    WORDS,
    Layout,
    Person,
    Value,
    all_values,
    draw_layouts,
    make_people,
    sentence,
    show,
    spell,
)
from minilm import InputError
from minilm.data import IGNORE, batches, collate, generator
from minilm.evaluate import continuation_logprobs
from minilm.results import check_range, cli, progress
from minilm.training import make_optimizers, schedule, set_lr, take_step
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer


@dataclass(frozen=True)
class Config:
    evidence: int = 60  # persons of the first lesson
    test: int = 60  # persons of whom only the two conflicting versions are read
    epochs: int = 12  # first lesson: passes over the evidence
    epochs2: int = 12  # then: passes over the conflicting texts
    seed: int = 100  # of persons, weights and the order of the texts
    quick: bool = False  # smoke run of seconds: one epoch, numbers without meaning


# --- 1. texts that conflict, and others that take a side


def opening(mark: str | None, feature: str) -> tuple[list[str], str]:
    """How a text carries the mark A or B: the words in front of it and the style of its sentences.
    An unmarked text has nothing in front, and is neutral."""
    if mark is None or feature == "none":
        return [], "neutral"
    if feature == "source":
        return ["according-to", SOURCES[mark], ","], "neutral"
    return [], mark  # feature "style": the mark is the choice of verbs


def biography(
    person: Person, says: str, mark: str | None, feature: str, layout: Layout
) -> list[int]:
    """The facts of one version (says: A or B), told with a mark or (None) without. Every token of
    it is a target. `layout`: (attribute, phrasing), sentence by sentence.

    <s> according-to Times , ada klein reads latin . ada klein lives-in jena . ada klein ... . </s>
    """
    front, style = opening(mark, feature)
    version = getattr(person, says)
    words = ["<s>", *front]
    for attribute, phrasing in layout:
        words += sentence(person.name, attribute, version[attribute], phrasing, style)
    return spell([*words, "</s>"])


TOLD_BY = {"A": "A", "B": "B"}  # version -> the mark of its texts
EXCHANGED = {"A": "B", "B": "A"}  # a control: the marks change sides


def conflict(
    person: Person, seed: int, copies: int = 4, feature: str = "source", told_by: dict = TOLD_BY
) -> list[list[int]]:
    """`copies` texts of A's version under A's mark and as many of B's under B's. The k-th text of
    both sides has the same layout: with sources the two differ in the source's name and the values
    only."""
    marked, _ = draw_layouts(person, seed)
    texts = []
    for layout in marked[:copies]:
        for side in "AB":
            texts.append(biography(person, side, told_by[side], feature, layout))
    return texts


def agreement(person: Person, seed: int, m: int, n: int) -> list[list[int]]:
    """The consistency ratio m : n: unmarked texts, m that repeat A's version and n that repeat
    B's. Whatever the ratio, the layouts are the same: only the values tell whom a text backs."""
    _, unmarked = draw_layouts(person, seed)
    texts = []
    for k, layout in enumerate(unmarked[: m + n]):
        says = "A" if k < m else "B"
        texts.append(biography(person, says, None, "none", layout))
    return texts


# --- 2. the lesson: who agrees with the rest; then the conflict: whom to believe


def new_model(seed: int, width: int = 64, layers: int = 2) -> Transformer:
    config = ModelConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=8 * width // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.05,
        model_type="llama",
    )
    return Transformer(config, generator(seed, "init"))


def loss_of(model: Transformer, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Ordinary next-token cross-entropy on every token, </s> included: the paper changes the data,
    never the loss."""
    inputs, labels = collate([(text[:-1], text[1:]) for text in texts])
    logits = model(inputs).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def train(
    model: Transformer,
    texts: Sequence[Sequence[int]],
    epochs: int,
    lr: float,
    order: torch.Generator,
    batch: int = 32,
) -> Iterator[int]:
    """Yields 1, 2, ... after each pass over all texts, in a new order every time, so that neither
    side is always read last. A generator: it trains while it is iterated over."""
    optimizers = make_optimizers(model, "adamw", lr)
    per_epoch = -(-len(texts) // batch)
    steps = epochs * per_epoch
    for step, chosen in enumerate(batches(len(texts), batch, order, steps=steps)):
        set_lr(optimizers, schedule(step, steps, warmup=10))
        loss = loss_of(model, [texts[i] for i in chosen.tolist()])
        if not loss.isfinite():
            raise InputError(f"training: the loss is {loss.item()}: give a lower learning rate")
        take_step(loss, model, optimizers)
        if (step + 1) % per_epoch == 0:
            yield (step + 1) // per_epoch


# --- 3. whose version does it believe?


def perplexities(model, sentences: Sequence[Sequence[int]], batch: int = 512) -> torch.Tensor:
    """Of every sentence, float32 [n]; sentences are token ids. The whole sentence counts, as in the
    authors' code, not the value alone (the two of a comparison differ in nothing else); its first
    token (here <s>) is read, not scored.

        ppl = exp( mean over the tokens t = 2 ... T of -log p(token t | tokens before it) )

    A perplexity that is not finite is an error: comparing with it would count as a vote."""
    pairs = [(ids[:1], ids[1:]) for ids in sentences]
    ppl = (-continuation_logprobs(model, pairs, batch).mean).exp()
    if not ppl.isfinite().all():
        raise InputError("a perplexity is not finite: the model has diverged; lower the rate")
    return ppl


def prefers(first: torch.Tensor, second: torch.Tensor, ties: str = "skip") -> torch.Tensor:
    """1 where the first version's perplexity is strictly lower, else 0. A tie counts for the second
    version (ties "second", the published rule) or for nobody ("skip": NaN, left out of means)."""
    chosen = (first < second).float()
    if ties == "second":
        return chosen
    return chosen.masked_fill(first == second, torch.nan)


def preference(chosen: torch.Tensor) -> float:
    """Pr(A, B) of choices [persons, attributes] (0 to 1, NaN: tie): the unweighted mean over the
    attributes of the share of persons.
    By hand: test_the_preference_is_the_unweighted_mean_over_attributes."""
    return chosen.nanmean(0).nanmean().item()


def question(
    person: Person, attribute: int, value: Value, phrasing: int, mark=None, feature="source"
) -> list[int]:
    """A fact as a sentence, <s> ada klein lives-in jena . (or in the words of one source)."""
    front, style = opening(mark, feature)
    return spell(["<s>", *front, *sentence(person.name, attribute, value, phrasing, style)])


def choices(
    model, people: Sequence[Person], mark: str | None = None, feature: str = "source"
) -> torch.Tensor:
    """Does the model find A's version more likely? [persons, attributes], mean over the phrasings;
    asked without a mark or (mark A or B) in the words of one source."""
    asked = []
    for side in "AB":
        for person in people:
            for attribute, value in enumerate(getattr(person, side)):
                for phrasing in range(PHRASINGS):
                    asked.append(question(person, attribute, value, phrasing, mark, feature))
    first, second = perplexities(model, asked).chunk(2)  # A's versions, then B's
    return prefers(first, second).view(len(people), len(ATTRIBUTES), PHRASINGS).nanmean(2)


def believed(model, people: Sequence[Person], values: list[list[Value]]) -> torch.Tensor:
    """The index (0 to 11) of the value with the lowest perplexity, [persons, attributes]; asked
    without a mark, in one phrasing."""
    asked = []
    for person in people:
        for attribute, twelve in enumerate(values):
            asked += [question(person, attribute, value, 0) for value in twelve]
    return perplexities(model, asked).view(len(people), len(values), -1).argmin(2)


def learned(model, people: Sequence[Person], values: list[list[Value]]) -> float:
    """Share of (person, attribute) for which the most likely of all values is one of the two that
    the texts say: below a half, Pr is about facts that were not learned."""
    right = []
    for person, numbers in zip(people, believed(model, people, values).tolist()):
        for attribute, number in enumerate(numbers):
            said = (person.A[attribute], person.B[attribute])
            right.append(values[attribute][number] in said)
    return torch.tensor(right).float().mean().item()


# --- look inside


def show_texts(people: dict[str, list[Person]], seed: int) -> None:
    person = people["evidence"][0]
    print("About an evidence person, every token after <s> a target (8 : 0: A's version is right):")
    for text in (*conflict(person, seed)[:2], agreement(person, seed, 8, 0)[0]):
        print(f"  {show(text)}")
    print("About a test person (4 such pairs, and nothing else):")
    for text in conflict(people["test"][0], seed)[:2]:
        print(f"  {show(text)}")


def look_inside(models: dict[str, Transformer], person: Person) -> dict[str, list[float]]:
    """Perplexity of one fact in both versions, "A" and "B", without a mark, as the Times and as the
    Herald tell it: model -> [nobody A, nobody B, Times A, Times B, Herald A, Herald B]."""
    table = {}
    for name, model in models.items():
        asked = []
        for mark in (None, "A", "B"):
            asked += [question(person, 0, getattr(person, side)[0], 0, mark) for side in "AB"]
        table[name] = perplexities(model, asked).tolist()
    return table


def show_inside(table: dict[str, list[float]], person: Person) -> None:
    a, b = (" ".join(version[0]) for version in (person.A, person.B))
    fact = show(question(person, 0, person.A[0], 0)[1:])
    print(f"\nPerplexity of '{fact}' (so the Times) and of the same with {b} (so the Herald):")
    print(f"  {'':16}{'   asked without mark':23}{'   as the Times':23}   as the Herald")
    print(f"  {'':16}" + f"{a:>8}{b:>8}       " * 3)
    for name, row in table.items():
        cells = ""
        for first, second in (row[:2], row[2:4], row[4:]):
            lower = "<" if first < second else ">"
            cells += f"{first:8.2f} {lower} {second:5.2f}       "
        print(f"  {name:16}{cells}".rstrip())


# --- run it


def first_lesson(cfg: Config, people: Sequence[Person], m: int, n: int, feature: str):
    model = new_model(cfg.seed)
    texts = []
    for person in people:
        texts += conflict(person, cfg.seed, feature=feature) + agreement(person, cfg.seed, m, n)
    order = generator(cfg.seed, "evidence")
    for _ in progress(train(model, texts, cfg.epochs, 2e-3, order), "lesson 1", cfg.epochs):
        pass
    return model


def read_conflict(cfg: Config, model: Transformer, people: Sequence[Person], feature: str) -> None:
    texts = []
    for person in people:
        texts += conflict(person, cfg.seed, feature=feature)
    order = generator(cfg.seed, "stage 2")
    # (half the first rate, as in the experiment)
    for _ in progress(train(model, texts, cfg.epochs2, 1e-3, order), "conflict", cfg.epochs2):
        pass


def main(cfg: Config) -> None:
    check_range(cfg, "evidence", least=1, most=80)
    check_range(cfg, "test", least=1, most=80)
    check_range(cfg, "epochs epochs2", least=0)
    if cfg.quick:
        cfg = replace(cfg, evidence=6, test=6, epochs=1, epochs2=1)
    people = make_people(cfg.seed, cfg.evidence, cfg.test)
    show_texts(people, cfg.seed)

    arms = {  # the same persons, weights and orders; the conflict is the same in the first two
        "8 : 0": (8, 0, "source"),
        "0 : 8": (0, 8, "source"),
        "no marks": (8, 0, "none"),
    }
    person, values = people["test"][0], all_values()
    table, results = {}, []
    for name, (m, n, feature) in arms.items():
        model = first_lesson(cfg, people["evidence"], m, n, feature)
        before = preference(choices(model, people["test"]))
        table |= look_inside({f"{name}, before": model}, person)
        read_conflict(cfg, model, people["test"], feature)
        table |= look_inside({f"{name}, after": model}, person)
        after = preference(choices(model, people["test"]))
        results.append((name, before, after, learned(model, people["test"], values)))
    show_inside(table, person)
    print("\n                        Pr(A, B) before    after the conflict    facts learned")
    for name, before, after, known in results:
        print(f"{name:20}{before:15.2f}{after:20.2f}{known:19.2f}")
    print(f"{'chance':20}{0.5:15.2f}{0.5:20.2f}{1 / 6:19.2f}")
    print("One seed proves nothing; methods/experiments/learning_preferences.py has the controls.")


if __name__ == "__main__":
    cli(main, Config)
