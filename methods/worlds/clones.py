"""The shared synthetic world: one abstract problem, told in an English-like language and in its clones.

Somebody has some items, two or three things happen, how many are there now? A `Problem` is rendered as question, story, worked answer or
program in every language, so parallel text is exact. A clone has its own word for every English word, and a verb-final one says "4 finds"
for "finds 4"; names, numbers, signs and task marks are shared. Training and test problems differ in (start, signs, amounts), whatever the
verbs, names, items and language.

    world, rng = CloneWorld(), random.Random(0)
    p = world.sample(rng)  # a training problem; or world.sample(rng, "test")
    world.text([*world.question(p, "a"), ANSWER, *world.solution(p, "en")])  # Eve has_a 7 coins_a . finds_a 4 . ... <a> finds 4 so ...

`python -m methods.worlds.clones` prints a sample of each kind.
"""

import hashlib
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
PLACES = "forest river market kitchen garden school tower island".split()  # where items come from, one each
FUNCTION = "has now so howmany answer more less where from".split()
NAMES = "Ann Ben Cleo Dan Eve Finn Gus Hana".split()
LETTERS = "A B C".split()
MARKS = "<pad> <s> </s> <q> <tr> <a> <sep> <code>".split()
PAD, BOS, EOS, SOLVE, TRANSLATE, ANSWER, SEP, CODE = range(len(MARKS))  # ids; SOLVE, TRANSLATE are for the scripts' prompts


class Event(NamedTuple):
    sign: int  # +1 or -1
    verb: str
    amount: int
    before: int
    after: int

    def sum(self) -> list[str]:
        return [str(self.before), "+" if self.sign > 0 else "-", str(self.amount), "=", str(self.after), "."]


class Problem(NamedTuple):
    name: str
    item: str
    start: int
    events: tuple[Event, ...]

    @property
    def final(self) -> int:
        return self.events[-1].after

    @property
    def label(self) -> str | None:  # more or less than at the start; None: as many
        return {1: "more", -1: "less"}.get((self.final > self.start) - (self.final < self.start))


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
    events: tuple[int, ...] = (2, 3)  # how many, drawn uniformly: (2, 3, 3) has two thirds of threes
    cognates: float = 0.0  # share of verbs, items and places that the clones (not en) write as one common root and their own ending

    @cached_property
    def tokens(self) -> list[str]:
        """Id -> text. English words stand as they are, a clone's is finds_a; a cognate is two tokens, finds_ and _a."""
        if self.languages[0] != "en" or not 1 <= self.verbs <= len(GAIN):
            raise InputError(f"a world's languages begin with en, and it has 1 to {len(GAIN)} verbs; got {self.languages}, {self.verbs}")
        shared = [*MARKS, *"+ - = . ? x print".split(), *LETTERS, *map(str, range(self.max_number + 1)), *NAMES]
        content, clones = [*GAIN[: self.verbs], *LOSE[: self.verbs], *ITEMS, *PLACES], self.languages[1:]
        roots = random.Random(f"{self.seed}/cognates").sample(content, round(self.cognates * len(content)))
        own = [f"{word}_{clone}" for clone in clones for word in (*content, *FUNCTION) if word not in roots]
        return [*shared, *content, *FUNCTION, *own, *(f"_{clone}" for clone in clones if roots), *(f"{root}_" for root in roots)]

    @cached_property
    def id(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @cached_property
    def language_of(self) -> list[str | None]:  # of each id; None for what is shared, the root of a cognate included
        english = {*GAIN, *LOSE, *ITEMS, *PLACES, *FUNCTION}
        return ["en" if token in english else token.partition("_")[2] or None for token in self.tokens]

    def encode(self, words: Sequence[str], language: str = "en") -> list[int]:
        if language == "en":
            return [self.id[word] for word in words]
        if language not in self.languages:
            raise InputError(f"this world has no language {language}; its languages are {', '.join(self.languages)}")
        forms = [next(f for f in ([f"{w}_{language}"], [f"{w}_", f"_{language}"], [w]) if f[0] in self.id) for w in words]
        return [self.id[token] for form in forms for token in form]

    def gloss(self, ids: Sequence[int]) -> list[str]:
        """A text of any language, word for word in English: encode(gloss(ids), "c") puts another language's words in their place."""
        return [word for i in ids if (word := self.tokens[i].partition("_")[0])]

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(self.tokens[i] for i in ids).replace("_ _", "_")

    def split(self, p: Problem | Choice) -> str:
        """test (10%), dev (10%) or train, by a hash of what is asked."""
        key = (p.start, [(e.sign, e.amount) for e in p.events]) if isinstance(p, Problem) else (p.item, p.places)
        percent = int(hashlib.sha256(f"{self.seed}/{key}".encode()).hexdigest()[:8], 16) % 100
        return "test" if percent < 10 else "dev" if percent < 20 else "train"

    def sample(self, rng: random.Random, split: str = "train", gain: float = 0.5, zipf: float = 0.0, labelled: bool = False) -> Problem:
        """A random problem of the split. gain: share of + among the events tried; zipf: the k-th verb of a sign has weight 1 / k^zipf;
        labelled: only problems with a label."""
        while True:
            total = start = rng.randint(self.max_number // 4, 4 * self.max_number // 5)
            events = []
            for _ in range(rng.choice(self.events)):
                sign, amount = 1 if rng.random() < gain else -1, rng.randint(1, self.max_amount)
                verb = rng.choices((GAIN if sign > 0 else LOSE)[: self.verbs], [k**-zipf for k in range(1, self.verbs + 1)])[0]
                events.append(Event(sign, verb, amount, total, total := total + sign * amount))
            p = Problem(rng.choice(NAMES), rng.choice(ITEMS), start, tuple(events))
            if all(0 <= e.after <= self.max_number for e in events) and (p.label or not labelled) and self.split(p) == split:
                return p

    @cached_property
    def origin(self) -> dict[str, str]:  # item -> place: this world's facts
        return dict(zip(ITEMS, random.Random(f"{self.seed}/facts").sample(PLACES, len(ITEMS))))

    def sample_choice(self, rng: random.Random, split: str = "train") -> Choice:
        while True:
            item = rng.choice(ITEMS)
            places = [self.origin[item], *rng.sample([p for p in PLACES if p != self.origin[item]], len(LETTERS) - 1)]
            rng.shuffle(places)
            if self.split(c := Choice(item, tuple(places), LETTERS[places.index(self.origin[item])])) == split:
                return c

    # --- renderers -> ids, without BOS, marks and EOS; on the right, what they say in English

    def event(self, e: Event, language: str) -> list[int]:  # finds 4
        return self.encode([str(e.amount), e.verb] if language in self.verb_final else [e.verb, str(e.amount)], language)
    def statement(self, p: Problem, language: str, tell: Callable = lambda e: ["."]) -> list[int]:  # Eve has 7 coins . finds 4 . sells 2 .
        ids = self.encode([p.name, "has", str(p.start), p.item, "."], language)
        return ids + [i for e in p.events for i in (*self.event(e, language), *self.encode(tell(e), language))]
    def question(self, p: Problem, language: str) -> list[int]:  # Eve has 7 coins . finds 4 . sells 2 . howmany coins ?
        return self.statement(p, language) + self.encode(["howmany", p.item, "?"], language)
    def story(self, p: Problem, language: str, explained: bool = False) -> list[int]:  # Eve has 7 coins . finds 4 . now 11 . ...
        return self.statement(p, language, lambda e: [".", "so", *e.sum()] if explained else [".", "now", str(e.after), "."])
    def solution(self, p: Problem, language: str) -> list[int]:  # finds 4 so 7 + 4 = 11 . sells 2 so 11 - 2 = 9 . answer 9
        steps = [i for e in p.events for i in (*self.event(e, language), *self.encode(["so", *e.sum()], language))]
        return steps + self.encode(["answer", str(p.final)], language)
    def program(self, p: Problem) -> list[int]:  # x = 7 . finds = 4 . x = x + finds . print x    (Python, with a full stop for a new line)
        lines = [f"{e.verb} = {e.amount} . x = x {e.sum()[1]} {e.verb} ." for e in p.events]
        return self.encode(f"x = {p.start} . {' '.join(lines)} print x".split())
    def drill(self, rng: random.Random, sums: int = 6) -> list[int]:  # 7 + 4 = 11 . 3 - 2 = 1 . ...    (any sums within range)
        every = [Event(sign, "", n, x, x + sign * n) for x in range(self.max_number + 1) for n in range(1, self.max_amount + 1)
                 for sign in (1, -1) if 0 <= x + sign * n <= self.max_number]
        return self.encode([word for e in rng.choices(every, k=sums) for word in e.sum()])
    def choices(self, c: Choice, language: str) -> list[int]:  # where coins ? A forest B river C market
        return self.encode(["where", c.item, "?", *(word for pair in zip(LETTERS, c.places) for word in pair)], language)

    def final_number(self, ids: Sequence[int]) -> int | None:
        """The last number of an answer, up to its EOS."""
        words = [self.tokens[i] for i in ids]
        return next((int(word) for word in reversed(words[: [*words, "</s>"].index("</s>")]) if word.isdigit()), None)

    def verb_blind_accuracy(self, problems: Sequence[Problem]) -> float:
        """What one gets who reads every number and no verb: the likeliest total over all signs that keep totals in range."""
        hits = 0.0
        for p in problems:
            ways = [list(accumulate((e.amount * s for e, s in zip(p.events, signs)), initial=p.start))
                    for signs in product((1, -1), repeat=len(p.events))]
            best = multimode(totals[-1] for totals in ways if min(totals) >= 0 and max(totals) <= self.max_number)
            hits += (p.final in best) / len(best)
        return hits / len(problems)


@dataclass(frozen=True)
class Mix:
    """What pretraining text consists of; by default question_alignment's."""

    clones: tuple[float, ...] = (0.1, 0.1, 0.1, 0.1)  # share of each clone, after an English-only start
    english_first: float = 0.4  # share of the steps that are this start
    drills: float = 0.15  # share of all documents
    retellings: float = 0.25  # share of all documents: question <sep> question
    parallel: float = 0.2  # share of a clone's retellings that translate between it and en
    to_english: bool = False  # translations from clones to en only
    labelled: float = 0.0  # share of the remaining en documents: statement <a> more, or less
    knowledge: float = 0.0  # share of the remaining en documents: facts, or a choice <a> letter; and of retellings: choices
    exercises: float = 0.25  # share of what then remains in en: question <a> solution (else: stories)
    clone_exercises: float = 0.0  # the same in clones, answered in the clone
    programs: float = 0.0  # share of en exercises that are question <code> program
    shots: int = 1  # labelled statements or exercises per document: 1 to this many, joined by <sep>
    explained: float = 0.6  # share of en stories that are explained
    clone_explained: float = 0.5
    switched: float = 0.05  # share of clone stories in which every word is the clone's or en's by chance
    gain: float = 0.5  # as in CloneWorld.sample
    zipf: float = 0.0


def document(world: CloneWorld, mix: Mix, rng: random.Random, progress: float = 1.0) -> list[int]:
    """One pretraining text, BOS ... EOS, of training problems only; progress: share of the steps done so far."""
    if len(mix.clones) != len(world.languages) - 1 or sum(mix.clones) > 1:
        raise InputError(f"Mix.clones needs a share for each of {world.languages[1:]}, at most 1 in all; it got {mix.clones}")
    clones = mix.clones if progress >= mix.english_first else [0.0] * len(mix.clones)
    language, kind, which = rng.choices(world.languages, [1 - sum(clones), *clones])[0], rng.random(), rng.random()
    english, problem = language == "en", lambda labelled=False: world.sample(rng, "train", mix.gain, mix.zipf, labelled)
    shots = range(rng.randint(1, mix.shots))
    if kind < mix.drills:
        texts = [world.drill(rng)]
    elif kind < mix.drills + mix.retellings:
        pair, chosen = (language, "en" if rng.random() < mix.parallel else language), rng.random() < mix.knowledge
        tell, p = (world.choices, world.sample_choice(rng)) if chosen else (world.question, problem())
        texts = [tell(p, told) for told in (pair if mix.to_english or rng.random() < 0.5 else pair[::-1])]
    elif english and which < mix.labelled:
        texts = [[*world.statement(p, "en"), ANSWER, world.id[p.label]] for p in (problem(labelled=True) for _ in shots)]
    elif english and which < mix.labelled + mix.knowledge:
        facts, c = [w for item in rng.sample(ITEMS, 5) for w in (item, "from", world.origin[item], ".")], world.sample_choice(rng)
        texts = [world.encode(facts) if rng.random() < 0.5 else [*world.choices(c, "en"), ANSWER, world.id[c.letter]]]
    elif rng.random() < (mix.exercises if english else mix.clone_exercises):
        answer = (lambda p: [CODE, *world.program(p)]) if english and rng.random() < mix.programs else (
            lambda p: [ANSWER, *world.solution(p, language)])
        texts = [world.question(p, language) + answer(p) for p in (problem() for _ in shots)]
    else:
        texts = [world.story(problem(), language, rng.random() < (mix.explained if english else mix.clone_explained))]
        if not english and rng.random() < mix.switched:
            texts = [[i for word in world.gloss(texts[0]) for i in world.encode([word], rng.choice((language, "en")))]]
    return [BOS, *texts[0], *(i for text in texts[1:] for i in (SEP, *text)), EOS]


def new_model(world: CloneWorld, width: int, layers: int, generator: torch.Generator) -> Transformer:
    """An untrained model; input and output embeddings are separate (tied ones keep the clones apart), the former drawn large."""
    model = Transformer(ModelConfig(
        vocab_size=len(world.tokens), hidden_size=width, intermediate_size=22 * width // 64 * 8, num_hidden_layers=layers, rope_theta=100.0,
        num_attention_heads=4, max_position_embeddings=256, initializer_range=0.6 * width**-0.5, model_type="llama"), generator)
    with torch.no_grad():
        model.embed.weight.mul_(0.5 / model.config.initializer_range)
    return model


if __name__ == "__main__":
    world, rng = CloneWorld(), random.Random(0)
    p, c = world.sample(rng), world.sample_choice(rng)
    for ids in (world.question(p, "en"), world.question(p, "a"), world.question(p, "b"), world.story(p, "a"), world.story(p, "en", True),
                world.solution(p, "en"), world.program(p), world.drill(rng), world.choices(c, "a"),
                *(document(world, Mix(programs=0.2, knowledge=0.2, labelled=0.2), rng) for _ in range(8))):
        print(world.text(ids))
