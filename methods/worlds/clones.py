"""A world of word problems, told in an English-like language and in its clones.

Somebody has some items, two or three things happen, how many are there now? A `Problem` is rendered
as question, story, worked answer or program in every language, so parallel text is exact. A clone
has its own word for every English word, and a verb-final one says "4 finds" for "finds 4"; names,
numbers, signs and task marks are shared. Training and test problems differ in (start, signs,
amounts), whatever the verbs, names, items and language.

    world, rng = CloneWorld(), random.Random(0)
    p = world.sample(rng)  # a training problem; or world.sample(rng, "test")
    ids = [*world.question(p, "a"), ANSWER, *world.solution(p, "en")]
    world.text(ids)  # Eve has_a 7 coins_a . finds_a 4 . ... <a> finds 4 so 7 + 4 = 11 . ...

Three papers share it, and their results rest on the order of its draws: what moves a stream makes
results stale. So a new share draws nothing where it is 0 (`chance`).

`python -m methods.worlds.clones` prints a sample of each kind.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product
from statistics import multimode
from typing import NamedTuple

import torch

from minilm import InputError
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer

GAIN = "finds buys gets wins picks grows earns borrows collects makes catches saves".split()
LOSE = "sells eats loses gives drops breaks burns throws lends spends wastes hides".split()
ITEMS = "coins books eggs pens shells stones cakes apples".split()
PLACES = "forest river market kitchen garden school tower island".split()  # an item comes from one
FUNCTION = "has now so howmany answer more less where from".split()
NAMES = "Ann Ben Cleo Dan Eve Finn Gus Hana".split()
LETTERS = "A B C".split()
SIGNS = "+ - = . ? x print".split()
MARKS = "<pad> <s> </s> <q> <tr> <a> <sep> <code>".split()
PAD, BOS, EOS, SOLVE, TRANSLATE, ANSWER, SEP, CODE = range(len(MARKS))  # ids; <q>, <tr> for prompts
CLONES = tuple("abcdef")  # the names that a clone can have
SPLITS = ("train", "dev", "test")
TRIES = 20_000  # draws for one problem, before the settings are said to allow none


class Event(NamedTuple):
    sign: int  # +1 or -1
    verb: str
    amount: int
    before: int
    after: int

    def sum(self) -> list[str]:
        sign = "+" if self.sign > 0 else "-"
        return [str(self.before), sign, str(self.amount), "=", str(self.after), "."]


class Problem(NamedTuple):
    name: str
    item: str
    start: int
    events: tuple[Event, ...]

    @property
    def final(self) -> int:
        return self.events[-1].after

    @property
    def label(self) -> str | None:
        """More or less than at the start; None: as many."""
        if self.final == self.start:
            return None
        return "more" if self.final > self.start else "less"


class Choice(NamedTuple):
    item: str
    places: tuple[str, ...]  # three; the world's facts say which is right
    letter: str  # the right one's


@dataclass(frozen=True)
class CloneWorld:
    seed: int = 0  # draws the split, the facts, and which words are cognates
    languages: tuple[str, ...] = ("en", "a", "b", "c", "d")  # en and its clones
    verb_final: tuple[str, ...] = ("b", "d", "f")  # clones that put the verb behind the amount
    verbs: int = 8  # of each sign, at most 12
    max_number: int = 20  # totals stay within 0 ... max_number; no wrap-around
    max_amount: int = 5
    events: tuple[int, ...] = (2, 3)  # how many, drawn uniformly: of (2, 3, 3) two thirds are 3
    cognates: float = 0.0  # share of verbs, items and places that the clones (not en) write as one
    # common root and their own ending

    def __post_init__(self):
        clones = self.languages[1:]
        names = f"clones are called {', '.join(CLONES)}, each once"
        if self.languages[:1] != ("en",):
            raise InputError(f"languages {self.languages}: a world's languages begin with en")
        if len(set(clones)) < len(clones) or not set(clones) <= set(CLONES):
            raise InputError(f"languages {self.languages}: {names}")
        if not set(self.verb_final) <= set(CLONES):
            raise InputError(f"verb_final {self.verb_final}: {names}")
        if not 1 <= self.verbs <= len(GAIN):
            raise InputError(f"verbs {self.verbs}: a world has 1 to {len(GAIN)} verbs of each sign")
        if self.max_number < 1 or self.max_amount < 1:
            raise InputError(
                f"max_number {self.max_number}, max_amount {self.max_amount}: give 1 or more"
            )
        if not self.events or min(self.events) < 1:
            raise InputError(f"events {self.events}: give how many things happen, each 1 or more")
        check_shares(self, "cognates")

    # --- words

    @cached_property
    def content(self) -> list[str]:
        return [*GAIN[: self.verbs], *LOSE[: self.verbs], *ITEMS, *PLACES]

    @cached_property
    def roots(self) -> list[str]:
        """The words that are cognates among the clones."""
        rng = random.Random(f"{self.seed}/cognates")
        return rng.sample(self.content, round(self.cognates * len(self.content)))

    @cached_property
    def tokens(self) -> list[str]:
        """Id -> text. English words stand as they are, a clone's is finds_a; a cognate is two
        tokens, finds_ and _a."""
        numbers = map(str, range(self.max_number + 1))
        tokens = [*MARKS, *SIGNS, *LETTERS, *numbers, *NAMES, *self.content, *FUNCTION]
        clones = self.languages[1:]
        for clone in clones:
            words = (*self.content, *FUNCTION)
            tokens += [f"{word}_{clone}" for word in words if word not in self.roots]
        if self.roots:
            tokens += [f"_{clone}" for clone in clones]
            tokens += [f"{root}_" for root in self.roots]
        return tokens

    @cached_property
    def id(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @cached_property
    def language_of(self) -> list[str | None]:
        """Of each id; None for what is shared, the root of a cognate included."""
        english = {*GAIN, *LOSE, *ITEMS, *PLACES, *FUNCTION}
        return ["en" if t in english else t.partition("_")[2] or None for t in self.tokens]

    def form(self, word: str, language: str) -> list[str]:
        """How a language writes an English word: its own word, a root and its ending, or (a name, a
        number, in English any word) as it is."""
        if f"{word}_{language}" in self.id:
            return [f"{word}_{language}"]
        if language != "en" and word in self.roots:
            return [f"{word}_", f"_{language}"]
        if word not in self.id:
            raise InputError(f"this world has no word {word!r}")
        return [word]

    def encode(self, words: Sequence[str], language: str = "en") -> list[int]:
        if language not in self.languages:
            known = ", ".join(self.languages)
            raise InputError(f"this world has no language {language}; its languages are {known}")
        return [self.id[token] for word in words for token in self.form(word, language)]

    def gloss(self, ids: Sequence[int]) -> list[str]:
        """A text of any language, word for word in English: encode(gloss(ids), "c") puts another
        language's words in their place."""
        roots = [self.tokens[i].partition("_")[0] for i in ids]
        return [word for word in roots if word]  # (the ending of a cognate has none)

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(self.tokens[i] for i in ids).replace("_ _", "_")

    # --- problems

    def split(self, p: Problem | Choice) -> str:
        """test (10%), dev (10%) or train, by a hash of what is asked."""
        if isinstance(p, Problem):
            key = (p.start, [(e.sign, e.amount) for e in p.events])
        else:
            key = (p.item, p.places)
        percent = int(hashlib.sha256(f"{self.seed}/{key}".encode()).hexdigest()[:8], 16) % 100
        return "test" if percent < 10 else "dev" if percent < 20 else "train"

    def sample(
        self,
        rng: random.Random,
        split: str = "train",
        gain: float = 0.5,
        zipf: float = 0.0,
        labelled: bool = False,
    ) -> Problem:
        """A random problem of the split. gain: share of + among the events tried; zipf: the k-th
        verb of a sign has weight 1 / k^zipf; labelled: only problems with a label."""
        check_split(split)
        for _ in range(TRIES):
            p = self.draw(rng, gain, zipf)
            in_range = all(0 <= e.after <= self.max_number for e in p.events)
            if in_range and (p.label or not labelled) and self.split(p) == split:
                return p
        raise InputError(
            f"{TRIES:,} draws found no {split} problem with max_number {self.max_number}, "
            f"max_amount {self.max_amount}, events {self.events}, gain {gain}, labelled {labelled}"
        )

    def draw(self, rng: random.Random, gain: float, zipf: float) -> Problem:
        """A problem whose totals may leave the number line."""
        start = rng.randint(self.max_number // 4, 4 * self.max_number // 5)
        weights = [k**-zipf for k in range(1, self.verbs + 1)]
        events = []
        total = start
        for _ in range(rng.choice(self.events)):
            sign = 1 if rng.random() < gain else -1
            amount = rng.randint(1, self.max_amount)
            verbs = GAIN if sign > 0 else LOSE
            verb = rng.choices(verbs[: self.verbs], weights)[0]
            events.append(Event(sign, verb, amount, total, total + sign * amount))
            total += sign * amount
        return Problem(rng.choice(NAMES), rng.choice(ITEMS), start, tuple(events))

    @cached_property
    def origin(self) -> dict[str, str]:
        """Item -> place: this world's facts."""
        places = random.Random(f"{self.seed}/facts").sample(PLACES, len(ITEMS))
        return dict(zip(ITEMS, places))

    def sample_choice(self, rng: random.Random, split: str = "train") -> Choice:
        """Where does an item come from? Three places to choose from."""
        check_split(split)
        while True:  # (336 choices an item: every split has some)
            item = rng.choice(ITEMS)
            right = self.origin[item]
            places = [right, *rng.sample([p for p in PLACES if p != right], len(LETTERS) - 1)]
            rng.shuffle(places)
            choice = Choice(item, tuple(places), LETTERS[places.index(right)])
            if self.split(choice) == split:
                return choice

    # --- renderers -> ids, without BOS, marks and EOS. What they say in English:

    def event(self, e: Event, language: str) -> list[int]:
        """finds 4"""
        words = [e.verb, str(e.amount)]
        return self.encode(words[::-1] if language in self.verb_final else words, language)

    def statement(self, p: Problem, language: str, tell: Callable | None = None) -> list[int]:
        """Eve has 7 coins . finds 4 . sells 2 .     tell(event): the words behind each event"""
        ids = self.encode([p.name, "has", str(p.start), p.item, "."], language)
        for e in p.events:
            behind = tell(e) if tell else ["."]
            ids += [*self.event(e, language), *self.encode(behind, language)]
        return ids

    def question(self, p: Problem, language: str) -> list[int]:
        """Eve has 7 coins . finds 4 . sells 2 . howmany coins ?"""
        return self.statement(p, language) + self.encode(["howmany", p.item, "?"], language)

    def story(self, p: Problem, language: str, explained: bool = False) -> list[int]:
        """Eve has 7 coins . finds 4 . now 11 . ...     explained: finds 4 . so 7 + 4 = 11 . ..."""

        def tell(e: Event) -> list[str]:
            return [".", "so", *e.sum()] if explained else [".", "now", str(e.after), "."]

        return self.statement(p, language, tell)

    def solution(self, p: Problem, language: str) -> list[int]:
        """finds 4 so 7 + 4 = 11 . sells 2 so 11 - 2 = 9 . answer 9"""
        ids = []
        for e in p.events:
            ids += [*self.event(e, language), *self.encode(["so", *e.sum()], language)]
        return ids + self.encode(["answer", str(p.final)], language)

    def program(self, p: Problem) -> list[int]:
        """x = 7 . finds = 4 . x = x + finds . print x    (Python, a full stop for a new line)"""
        lines = [f"x = {p.start} ."]
        lines += [f"{e.verb} = {e.amount} . x = x {e.sum()[1]} {e.verb} ." for e in p.events]
        return self.encode(" ".join([*lines, "print x"]).split())

    def drill(self, rng: random.Random, sums: int = 6) -> list[int]:
        """7 + 4 = 11 . 3 - 2 = 1 . ...    (any sums within range)"""
        every = []
        numbers = range(self.max_number + 1)
        for x, n, sign in product(numbers, range(1, self.max_amount + 1), (1, -1)):
            if 0 <= x + sign * n <= self.max_number:
                every.append(Event(sign, "", n, x, x + sign * n))
        return self.encode([word for e in rng.choices(every, k=sums) for word in e.sum()])

    def choices(self, c: Choice, language: str) -> list[int]:
        """where coins ? A forest B river C market"""
        places = [word for pair in zip(LETTERS, c.places) for word in pair]
        return self.encode(["where", c.item, "?", *places], language)

    # --- reading answers

    def final_number(self, ids: Sequence[int]) -> int | None:
        """The last number of an answer, up to its EOS."""
        ids = list(ids)
        if EOS in ids:
            ids = ids[: ids.index(EOS)]
        numbers = [int(self.tokens[i]) for i in ids if self.tokens[i].isdigit()]
        return numbers[-1] if numbers else None

    def verb_blind_accuracy(self, problems: Sequence[Problem]) -> float:
        """What one gets who reads every number and no verb: the likeliest total over all signs that
        keep totals in range."""
        hits = 0.0
        for p in problems:
            finals = []
            for signs in product((1, -1), repeat=len(p.events)):
                changes = [sign * e.amount for sign, e in zip(signs, p.events)]
                totals = list(accumulate(changes, initial=p.start))
                if min(totals) >= 0 and max(totals) <= self.max_number:
                    finals.append(totals[-1])
            best = multimode(finals)
            hits += (p.final in best) / len(best)
        return hits / len(problems)


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}: give one of {', '.join(SPLITS)}")


def check_shares(settings, *groups: str) -> None:
    """Each group: names of shares, which lie in [0, 1] and sum to at most 1."""
    for group in groups:
        values = []
        for name in group.split():
            value = getattr(settings, name)
            values += value if isinstance(value, tuple) else [value]
        if not all(0 <= x <= 1 for x in values) or sum(values) > 1 + 1e-9:
            raise InputError(
                f"{group} {', '.join(map(str, values))}: shares lie in [0, 1], at most 1 in all"
            )


# --- pretraining texts


@dataclass(frozen=True)
class Mix:
    """What pretraining text consists of; by default question_alignment's."""

    clones: tuple[float, ...] = (0.1, 0.1, 0.1, 0.1)  # share of each, after an English-only start
    english_first: float = 0.4  # share of the steps that are this start
    clone_retellings: float = 0.0  # share of a clone's documents that are retellings, whatever ...
    drills: float = 0.15  # ... share of all (other) documents
    retellings: float = 0.25  # share of all (other) documents: question <sep> question
    statements: float = 0.0  # share of retellings that tell the statement, without a question
    parallel: float = 0.2  # share of a clone's retellings that translate between it and en
    to_english: bool = False  # translations from clones to en only
    labelled: float = 0.0  # share of the remaining en documents: statement <a> more, or less
    knowledge: float = 0.0  # share of the remaining en documents: facts, or a choice <a> letter;
    # and of retellings: choices
    exercises: float = 0.25  # share of what then remains in en: question <a> solution, or a story
    clone_exercises: float = 0.0  # the same in clones, answered in the clone
    programs: float = 0.0  # share of en exercises that are question <code> program
    shots: int = 1  # labelled statements or exercises per document: 1 to this many, joined by <sep>
    explained: float = 0.6  # share of en stories that are explained
    clone_explained: float = 0.5
    switched: float = 0.05  # share of clone stories in which every word is the clone's or en's
    gain: float = 0.5  # as in CloneWorld.sample
    zipf: float = 0.0

    def __post_init__(self):
        check_shares(
            self,
            "clones",
            "drills retellings",
            "labelled knowledge",
            *"english_first clone_retellings statements parallel exercises clone_exercises".split(),
            *"programs explained clone_explained switched gain".split(),
        )
        if self.shots < 1 or not math.isfinite(self.zipf):
            raise InputError(f"shots {self.shots}, zipf {self.zipf}: give 1 or more, and a number")


def chance(rng: random.Random, share: float) -> bool:
    """True with that probability. A share of 0 draws nothing, so that it moves no other draw."""
    return share > 0 and rng.random() < share


def document(world: CloneWorld, mix: Mix, rng: random.Random, progress: float = 1.0) -> list[int]:
    """One pretraining text, BOS ... EOS, of training problems only; progress: share of the steps
    done so far."""
    if len(mix.clones) != len(world.languages) - 1:
        clones = ", ".join(world.languages[1:])
        raise InputError(f"Mix.clones {mix.clones}: a share for each of {clones} is needed")
    clones = mix.clones if progress >= mix.english_first else [0.0] * len(mix.clones)
    language = rng.choices(world.languages, [1 - sum(clones), *clones])[0]
    english = language == "en"
    kind = rng.random()
    which = rng.random()
    shots = rng.randint(1, mix.shots)
    if not english and chance(rng, mix.clone_retellings):
        texts = retelling(world, mix, rng, language)
    elif kind < mix.drills:
        texts = [world.drill(rng)]
    elif kind < mix.drills + mix.retellings:
        texts = retelling(world, mix, rng, language)
    elif english and which < mix.labelled:
        texts = [labelled_statement(world, mix, rng) for _ in range(shots)]
    elif english and which < mix.labelled + mix.knowledge:
        texts = [knowledge(world, rng)]
    elif rng.random() < (mix.exercises if english else mix.clone_exercises):
        in_code = english and rng.random() < mix.programs
        texts = [worked_exercise(world, mix, rng, language, in_code) for _ in range(shots)]
    else:
        texts = [told_story(world, mix, rng, language)]
    joined = texts[0]
    for text in texts[1:]:
        joined = [*joined, SEP, *text]
    return [BOS, *joined, EOS]


def training_problem(world, mix, rng, labelled: bool = False) -> Problem:
    return world.sample(rng, "train", mix.gain, mix.zipf, labelled)


def retelling(world, mix, rng, language: str) -> list[list[int]]:
    """The same twice, in one language or (a translation) in a clone and en."""
    other = "en" if rng.random() < mix.parallel else language
    pair = (language, other)
    if chance(rng, mix.knowledge):
        tell, told = world.choices, world.sample_choice(rng)
    else:
        tell = world.statement if chance(rng, mix.statements) else world.question
        told = training_problem(world, mix, rng)
    if not mix.to_english and rng.random() >= 0.5:
        pair = pair[::-1]
    return [tell(told, language) for language in pair]


def labelled_statement(world, mix, rng) -> list[int]:
    p = training_problem(world, mix, rng, labelled=True)
    return [*world.statement(p, "en"), ANSWER, world.id[p.label]]


def knowledge(world, rng) -> list[int]:
    """Five facts, or a question about one with its answer."""
    facts = []
    for item in rng.sample(ITEMS, 5):
        facts += [item, "from", world.origin[item], "."]
    c = world.sample_choice(rng)
    if rng.random() < 0.5:
        return world.encode(facts)
    return [*world.choices(c, "en"), ANSWER, world.id[c.letter]]


def worked_exercise(world, mix, rng, language: str, in_code: bool) -> list[int]:
    p = training_problem(world, mix, rng)
    if in_code:
        return [*world.question(p, language), CODE, *world.program(p)]
    return [*world.question(p, language), ANSWER, *world.solution(p, language)]


def told_story(world, mix, rng, language: str) -> list[int]:
    english = language == "en"
    p = training_problem(world, mix, rng)
    explained = rng.random() < (mix.explained if english else mix.clone_explained)
    story = world.story(p, language, explained)
    if english or rng.random() >= mix.switched:
        return story
    switched = []
    for word in world.gloss(story):
        switched += world.encode([word], rng.choice((language, "en")))
    return switched


# --- the model that reads it


def new_model(world: CloneWorld, width: int, layers: int, generator) -> Transformer:
    """An untrained model; input and output embeddings are separate (tied ones keep the clones
    apart), the former drawn large."""
    config = ModelConfig(
        vocab_size=len(world.tokens),
        hidden_size=width,
        intermediate_size=22 * width // 64 * 8,
        num_hidden_layers=layers,
        rope_theta=100.0,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.6 * width**-0.5,
        model_type="llama",
    )
    model = Transformer(config, generator)
    with torch.no_grad():
        model.embed.weight.mul_(0.5 / model.config.initializer_range)
    return model


if __name__ == "__main__":
    world = CloneWorld()
    rng = random.Random(0)
    p = world.sample(rng)
    shown = [world.question(p, language) for language in ("en", "a", "b")]
    shown += [world.story(p, "a"), world.story(p, "en", explained=True), world.solution(p, "en")]
    shown += [world.program(p), world.drill(rng), world.choices(world.sample_choice(rng), "a")]
    mix = Mix(programs=0.2, knowledge=0.2, labelled=0.2)
    shown += [document(world, mix, rng) for _ in range(8)]
    for ids in shown:
        print(world.text(ids))
