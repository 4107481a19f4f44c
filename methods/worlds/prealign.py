"""The world of PreAlign: English documents about six topics and about persons who live in places,
and English-Clone, which says the same in tokens of its own. Each seed draws its own words,
meanings and facts.

    token id    0, 1, 2      PAD, BOS, EOS: both languages share them
                3 + i        English: i = 0 ... 69 a syllable that begins a word,
                             70 ... 139 one that goes on with a word, 140 ... 149 a function word
                153 + i      English-Clone: the same, HALF = 150 further on
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

SYLLABLES = [consonant + vowel for consonant in "bdfghklmnprstv" for vowel in "aeiou"]
FUNCTION = ["THE", "A", ".", "LIVES", "IN", "CAME", "FROM", "HOME", "OF", "IS"]
PAD, BOS, EOS, SHARED = 0, 1, 2, 3  # three tokens belong to both languages
HALF = 2 * len(SYLLABLES) + len(FUNCTION)  # tokens of one language
VOCABULARY = SHARED + 2 * HALF
TEMPLATES = ("{p} LIVES IN {c} .", "{p} CAME FROM {c} .", "HOME OF {p} IS {c} .")
TOPICS = 6
Word = tuple[int, ...]  # token ids


class Document(NamedTuple):
    ids: list[int]
    is_source: bool  # in the source language, English? only its words may be code-switched


# --- two languages


def english(ids: Sequence[int]) -> list[int]:
    """English -> English: the text as it is."""
    return list(ids)


def clone(ids: Sequence[int]) -> list[int]:
    """English -> English-Clone: the same text in other tokens."""
    return [i + HALF if i >= SHARED else i for i in ids]


def fold(ids: Sequence[int]) -> list[int]:
    """Either language -> English: undoes `clone`."""
    return [i - HALF if i >= SHARED + HALF else i for i in ids]


def unfolded(ids: Sequence[int]) -> list[int]:
    """Either language as it is: what every arm but the folded one reads."""
    return list(ids)


def is_start(token: int) -> bool:
    """Does this token begin a word?  (In a real tokenizer: does it begin with a space?)"""
    if token < SHARED:
        return True
    kind = (token - SHARED) % HALF // len(SYLLABLES)  # 0 begins a word, 1 goes on, 2 function word
    return kind != 1


def show(ids: Sequence[int]) -> str:
    """Readable text; clone words in CAPITALS."""
    text = ""
    for i in ids:
        kind, n = divmod((i - SHARED) % HALF, len(SYLLABLES))
        if i < SHARED:
            piece = ("<pad>", "<s>", "</s>")[i]
        else:
            piece = FUNCTION[n].lower() if kind == 2 else SYLLABLES[n]
        if is_start(i):
            text += " "
        text += piece.upper() if i >= SHARED + HALF else piece
    return text.strip()


# --- what is said in them


class TopicWorld:
    """Six topics with nouns, verbs and adjectives that go together, and persons who live in places.
    All of it is drawn from the seed."""

    def __init__(self, seed: int):
        rng = random.Random(f"{seed}/world")
        n = len(SYLLABLES)
        short = [(SHARED + s,) for s in range(n)]
        long = [(SHARED + s, SHARED + n + t) for s in range(n) for t in range(n)]
        spellings = rng.sample(rng.sample(short, n // 2) + rng.sample(long, 200), 235)

        def take(count: int) -> list[Word]:
            return [spellings.pop() for _ in range(count)]

        self.function = {word: (SHARED + 2 * n + i,) for i, word in enumerate(FUNCTION)}
        self.topics = [
            {"noun": take(10), "verb": take(6), "adjective": take(5)} for _ in range(TOPICS)
        ]
        self.places = take(8)
        self.persons = take(32)
        self.tested = self.persons[:24]  # English documents alone speak of them
        self.support = self.persons[24:]  # the clone's documents speak of these
        # each place is home to three tested persons and one supporting
        homes = rng.sample(self.places * 3, 24) + rng.sample(self.places, 8)
        self.home = dict(zip(self.persons, homes))

        # which nouns an adjective describes, which verbs a noun does, to which nouns one does them
        self.goes_with = {}
        for topic in self.topics:
            for first, second, many in (
                ("adjective", "noun", 3),
                ("noun", "verb", 2),
                ("verb", "noun", 2),
            ):
                for word in topic[first]:
                    self.goes_with[word, second] = rng.sample(topic[second], many)

        words = [w for topic in self.topics for group in topic.values() for w in group]
        words += self.places + self.persons
        self.content = [(w, tuple(clone(w))) for w in words]  # what retrieval@1 asks for
        self.dictionary = self.content + [(w, tuple(clone(w))) for w in self.function.values()]

    def spell(self, template: str, **words: Word) -> list[int]:
        """A template's token ids: `{name}` is the word given for name, the rest function words."""
        slots = {"{" + name + "}": word for name, word in words.items()} | self.function
        return [i for part in template.split() for i in slots[part]]

    def sentence(self, topic: int, rng: random.Random) -> list[int]:
        """THE adjective noun verb A noun . Each word restricts the next: this is the meaning that
        must carry over to the clone."""
        adjective = rng.choice(self.topics[topic]["adjective"])
        noun = rng.choice(self.goes_with[adjective, "noun"])
        verb = rng.choice(self.goes_with[noun, "verb"])
        other = rng.choice(self.goes_with[verb, "noun"])
        return self.spell("THE {a} {n} {v} A {o} .", a=adjective, n=noun, v=verb, o=other)

    def document(self, rng: random.Random, persons: list[Word]) -> list[int]:
        """BOS, two sentences of one topic and up to four facts in random order, EOS, for example

        <s> mika lives in dopa . the li roba ge a su . home of tefu is na . the li su ge a ro . </s>
        """
        topic = rng.randrange(TOPICS)
        parts = [self.sentence(topic, rng) for _ in range(2)]
        for person in rng.choices(persons, k=4):
            if rng.random() < 0.8:
                parts.append(self.spell(rng.choice(TEMPLATES), p=person, c=self.home[person]))
        rng.shuffle(parts)
        return [BOS, *(i for part in parts for i in part), EOS]


def make_documents(
    world: TopicWorld, seed: int, count: int, ratio: float, clone_documents: int
) -> list[Document]:
    """`count` documents in reading order: fresh English ones and, at 1 : ratio, documents of a
    fixed clone corpus of `clone_documents`, drawn again and again. The clone's documents are other
    documents: nothing is ever said in both languages."""
    rng = random.Random(f"{seed}/documents")
    few = [clone(world.document(rng, world.support)) for _ in range(clone_documents)]
    documents = []
    for _ in range(count):
        if rng.random() < 1 / (ratio + 1):
            documents.append(Document(rng.choice(few), is_source=False))
        else:
            documents.append(Document(world.document(rng, world.persons), is_source=True))
    return documents


def split_dictionary(
    world: TopicWorld, seed: int, share: float, hold_out: str
) -> tuple[list, list]:
    """The entries that training sees, `share` of them, and the content words held out.

    hold_out "words": words at random. "tokens": tokens at random; every entry that has a token in
    common with the held-out words is left out as well, so that none profits from others' pieces.
    """
    rng = random.Random(f"{seed}/held out")
    if hold_out == "words":
        held = rng.sample(world.content, round((1 - share) * len(world.content)))
        return [entry for entry in world.dictionary if entry not in held], held
    tokens = sorted({i for source, _ in world.content for i in source})
    unseen = set(rng.sample(tokens, round((1 - share) * len(tokens))))
    seen = [entry for entry in world.dictionary if not unseen & set(entry[0])]
    held = [entry for entry in world.content if set(entry[0]) <= unseen]
    return seen, held
