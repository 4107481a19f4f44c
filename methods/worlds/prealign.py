"""The world of methods/prealign.py: English documents of six topics and of persons who live in places, and English-Clone, which says the
same in tokens of its own. Each seed draws its own words, meanings and facts.
"""

import random
from collections.abc import Sequence

SYLLABLES = [c + v for c in "bdfghklmnprstv" for v in "aeiou"]
FUNCTION = ["THE", "A", ".", "LIVES", "IN", "CAME", "FROM", "HOME", "OF", "IS"]
PAD, BOS, EOS, SHARED = 0, 1, 2, 3  # three tokens belong to both languages; then come the English ones, then the clone's
HALF = 2 * len(SYLLABLES) + len(FUNCTION)  # tokens per language: word-initial syllables, word-internal syllables, function words
TEMPLATES = ("{p} LIVES IN {c} .", "{p} CAME FROM {c} .", "HOME OF {p} IS {c} .")
Word = tuple[int, ...]  # token ids


def clone(ids: Sequence[int]) -> list[int]:
    """English -> English-Clone: the same text in other tokens."""
    return [i + HALF if i >= SHARED else i for i in ids]


def is_start(token: int) -> bool:
    """Does this token begin a word?  (In a real tokenizer: does it begin with a space?)"""
    return token < SHARED or not len(SYLLABLES) <= (token - SHARED) % HALF < 2 * len(SYLLABLES)


def show(ids: Sequence[int]) -> str:
    """Readable text; clone words in CAPITALS."""
    text = ""
    for i in ids:
        kind, n = divmod((i - SHARED) % HALF, len(SYLLABLES))
        piece = ("<pad>", "<s>", "</s>")[i] if i < SHARED else FUNCTION[n].lower() if kind == 2 else SYLLABLES[n]
        text += (" " if is_start(i) else "") + (piece.upper() if i >= SHARED + HALF else piece)
    return text.strip()


class TopicWorld:
    """Six topics with nouns, verbs and adjectives that go together, and persons who live in places. All of it is drawn from the seed."""

    def __init__(self, seed: int):
        rng, n = random.Random(f"{seed}/world"), len(SYLLABLES)
        short, long = [(SHARED + s,) for s in range(n)], [(SHARED + s, SHARED + n + t) for s in range(n) for t in range(n)]
        spellings = rng.sample(rng.sample(short, n // 2) + rng.sample(long, 200), 235)
        take = lambda count: [spellings.pop() for _ in range(count)]
        self.function = {word: (SHARED + 2 * n + i,) for i, word in enumerate(FUNCTION)}
        self.topics = [{"noun": take(10), "verb": take(6), "adjective": take(5)} for _ in range(6)]
        self.places, self.persons = take(8), take(32)
        self.tested, self.support = self.persons[:24], self.persons[24:]  # clone documents speak of the supporting persons only
        home = [self.places[i % 8] for i in range(32)]  # each place: three tested persons and one supporting
        self.home = dict(zip(self.persons, rng.sample(home[:24], 24) + rng.sample(home[24:], 8)))
        self.goes_with = {}  # which nouns an adjective describes, which verbs a noun does, which nouns a verb is done to
        for topic in self.topics:
            for first, second, many in (("adjective", "noun", 3), ("noun", "verb", 2), ("verb", "noun", 2)):
                for word in topic[first]:
                    self.goes_with[word, second] = rng.sample(topic[second], many)
        words = [w for topic in self.topics for words in topic.values() for w in words] + self.places + self.persons
        self.content = [(w, tuple(clone(w))) for w in words]  # what retrieval@1 asks for
        self.dictionary = self.content + [(w, tuple(clone(w))) for w in self.function.values()]

    def spell(self, template: str, **words: Word) -> list[int]:
        slots = {"{" + name + "}": word for name, word in words.items()} | self.function
        return [i for part in template.split() for i in slots[part]]

    def sentence(self, topic: int, rng: random.Random) -> list[int]:
        """THE adj noun verb A noun .  - each word restricts the next: this is the meaning that must carry over to the clone."""
        adjective = rng.choice(self.topics[topic]["adjective"])
        noun = rng.choice(self.goes_with[adjective, "noun"])
        verb = rng.choice(self.goes_with[noun, "verb"])
        return self.spell("THE {a} {n} {v} A {o} .", a=adjective, n=noun, v=verb, o=rng.choice(self.goes_with[verb, "noun"]))

    def document(self, rng: random.Random, persons: list[Word]) -> list[int]:
        """BOS, two sentences of one topic and up to four facts in random order, EOS, for example (in translation)

        <s> mika lives in dopa . the li roba ge a su . home of tefu is na . the li su ge a roba . </s>
        """
        topic = rng.randrange(6)
        parts = [self.sentence(topic, rng) for _ in range(2)]
        parts += [self.spell(rng.choice(TEMPLATES), p=p, c=self.home[p]) for p in rng.choices(persons, k=4) if rng.random() < 0.8]
        rng.shuffle(parts)
        return [BOS, *(i for part in parts for i in part), EOS]


Document = tuple[list[int], bool]  # token ids; may its words be switched? (is it in the source language?)


def make_documents(cfg, world: TopicWorld, seed: int, steps: int) -> list[Document]:
    """The pretraining corpus in reading order, cfg.batch documents per step: fresh English ones, and at 1 : ratio documents of a small
    fixed clone corpus, drawn again and again. The clone's documents are other documents: nothing is ever said in both languages."""
    rng = random.Random(f"{seed}/documents")
    few = [clone(world.document(rng, world.support)) for _ in range(cfg.steps * cfg.batch // (cfg.ratio + 1))]
    return [(rng.choice(few), False) if rng.random() < 1 / (cfg.ratio + 1) else (world.document(rng, world.persons), True)
            for _ in range(steps * cfg.batch)]


def split_dictionary(cfg, world: TopicWorld, seed: int) -> tuple[list, list]:
    """Entries that training sees, and the content words held out. hold_out tokens: every entry that has a token in common with the
    held-out ones is left out as well, so that a held-out word cannot profit from the pieces of others."""
    rng, share = random.Random(f"{seed}/held out"), 1 - cfg.dict_frac
    if cfg.hold_out == "words":
        held = rng.sample(world.content, round(share * len(world.content)))
        return [entry for entry in world.dictionary if entry not in held], held
    tokens = sorted({i for source, _ in world.content for i in source})
    unseen = set(rng.sample(tokens, round(share * len(tokens))))
    return [e for e in world.dictionary if not unseen & set(e[0])], [e for e in world.content if set(e[0]) <= unseen]
