"""Invented persons of whom two sources say different things, in a language of some 110 words.

A person has a name and three attributes; a fact is a sentence, "ada klein reads latin .", in one of
three phrasings. A text is told by a source named in front of it, or in a style (its own verbs), or
by nobody in particular. Values are drawn independently of names, sources and each other, so nothing
but the texts tells which version is true.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

FIRST = "ada ben cora dan eva finn gina hugo ines jan kira leo mona nils olga paul".split()
LAST = (
    "adler baker costa doyle ekman ferro greco haas ivers jonas klein lopez moser novak otto perez"
).split()
ATTRIBUTES = {
    "city": "aachen bergen cadiz delft essen faro ghent havre izmir jena krakow lyon".split(),
    "subject": (
        "algebra botany chemistry drama ethics french geology history irish jurisprudence korean"
        " latin"
    ).split(),
    "firm": (
        "acme bolt corex dynamo exon flux globex hooli initech juno kappa lumen"
    ).split(),
}
HALVES = ["-north", "-south", "-east", "-west"]  # second tokens, for values of two: 3 x 4 = 12
VERBS = {  # style -> three phrasings of each attribute, in the order of ATTRIBUTES
    "neutral": [
        ["lives-in", "dwells-in", "is-from"],
        ["reads", "studies", "learns"],
        ["works-for", "serves", "is-with"],
    ],
    "A": [
        ["resides-in", "is-domiciled-in", "hails-from"],
        ["pursues", "specialises-in", "is-versed-in"],
        ["is-employed-by", "is-engaged-by", "is-retained-by"],
    ],
    "B": [
        ["crashes-in", "hangs-out-in", "calls-home"],
        ["geeks-out-on", "is-into", "crams"],
        ["slaves-for", "clocks-in-at", "gigs-at"],
    ],
}
PHRASINGS = 3
SOURCES = {"A": "Times", "B": "Herald"}

_flat_values = [value for values in ATTRIBUTES.values() for value in values]
_flat_verbs = [verb for style in VERBS.values() for verbs in style for verb in verbs]
WORDS = [
    *("<pad>", "<s>", "</s>", ".", ",", "according-to"),
    *SOURCES.values(),
    *FIRST,
    *LAST,
    *_flat_values,
    *HALVES,
    *_flat_verbs,
]
ID = {word: i for i, word in enumerate(WORDS)}

Value = tuple[str, ...]  # one word or two
Layout = Sequence[tuple[int, int]]  # of a text: (attribute, phrasing) of each of its sentences


def spell(words: Sequence[str]) -> list[int]:
    return [ID[word] for word in words]


def show(ids: Sequence[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


class Person(NamedTuple):
    name: tuple[str, str]
    A: tuple[Value, ...]  # the value of each attribute, according to source A
    B: tuple[Value, ...]  # ... according to source B: different in every attribute


def all_values(tokens: int = 1) -> list[list[Value]]:
    """The twelve values of each attribute, of one token or of two."""
    if tokens == 1:
        return [[(word,) for word in words] for words in ATTRIBUTES.values()]
    three = [words[:3] for words in ATTRIBUTES.values()]
    return [[(word, half) for word in words for half in HALVES] for words in three]


def make_people(seed: int, evidence: int, test: int, tokens: int = 1) -> dict[str, list[Person]]:
    """The "evidence" persons of the first lesson, as many "fresh" ones for a second, and the "test"
    persons. No full name occurs twice."""
    rng = random.Random(f"{seed}/people")
    names = [(first, last) for first in FIRST for last in LAST]
    people = []
    for name in rng.sample(names, 2 * evidence + test):
        drawn = [rng.sample(values, 2) for values in all_values(tokens)]  # two that differ, each
        people.append(Person(name, A=tuple(a for a, _ in drawn), B=tuple(b for _, b in drawn)))
    return {
        "evidence": people[:evidence],
        "fresh": people[evidence : 2 * evidence],
        "test": people[2 * evidence :],
    }


def draw_layouts(person: Person, seed: int) -> tuple[list[Layout], list[Layout]]:
    """32 layouts for the texts that a source tells about a person and 32 for those that nobody in
    particular tells. They depend on name and seed alone: every arm's texts have the same."""
    rng = random.Random(f"{seed}/layouts of {person.name}")
    n = len(ATTRIBUTES)
    layouts = []
    for _ in range(64):
        order = rng.sample(range(n), n)
        layouts.append([(attribute, rng.randrange(PHRASINGS)) for attribute in order])
    return layouts[:32], layouts[32:]


def sentence(
    name: Sequence[str], attribute: int, value: Value, phrasing: int, style: str = "neutral"
) -> list[str]:
    return [*name, VERBS[style][attribute][phrasing], *value, "."]
