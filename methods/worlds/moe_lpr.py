"""The world of MoE-LPR: five invented languages, letter by letter. Old: A and B, which the review
reads again, and O, which it never does. New: C and D. Old and new are written in two scripts that
share eight letters, so that the letters tell a router much about the language, but not all."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from minilm import InputError
from minilm.data import batches, generator

CONSONANTS = "bcdfghjklmnpqrstvwxz" + "бвгджзйклмнптфцчшщђћ"  # 20 of each script
VOWELS = "aeiouy" + "ыэюя"
END = 0  # closes a document
LETTERS = "\n" + CONSONANTS + VOWELS + " ."  # a token id is a place in this string
GROUPS = {  # ood: old, but no stage of the method ever reads it
    "old": ("A", "B"),
    "ood": ("O",),
    "new": ("C", "D"),
}
SCRIPTS = {  # the letters that a language may draw from
    "old": (CONSONANTS[:23], VOWELS[:6]),
    "new": (CONSONANTS[17:], VOWELS[4:]),
    "one": (CONSONANTS[:15], VOWELS[:5]),  # the same for old and new languages
}
WORDS = 60  # of a language


class Document(NamedTuple):
    ids: list[int]
    old: bool  # in an old language?


class Language:
    """60 words of one to three syllables, and which words like to follow which; all drawn from the
    seed and the name."""

    def __init__(self, seed: int, name: str, scripts: str):
        rng = random.Random(f"{seed}/language {name}")
        group = "new" if name in GROUPS["new"] else "old"
        consonants, vowels = SCRIPTS["one" if scripts == "one" else group]
        letters = {"C": rng.sample(consonants, 9), "V": rng.sample(vowels, 4)}
        templates = rng.choice([("CV", "CVC"), ("CV", "VC"), ("CVC", "V"), ("CV", "CCV")])
        words: list[str] = []
        while len(words) < WORDS:
            word = ""
            for _ in range(rng.randint(1, 3)):
                for kind in rng.choice(templates):
                    word += rng.choice(letters[kind])
            if word not in words:
                words.append(word)
        self.words = words
        self.follow = [rng.sample(range(WORDS), 5) for _ in words]

    def document(self, rng: random.Random) -> list[int]:
        """Six sentences of about eight words; the next word is one of the word's five followers
        (weights 1, 1/2, ... 1/5), or any word (10%).

        "moc tade ril moc. sif tade moc ril fu tade. ...\\n" """
        text = ""
        for _ in range(6):
            at = rng.randrange(WORDS)
            sentence: list[str] = []
            while len(sentence) < 4 or rng.random() > 0.25:
                sentence.append(self.words[at])
                if rng.random() < 0.1:
                    at = rng.randrange(WORDS)
                else:
                    at = rng.choices(self.follow[at], [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])[0]
            text += " ".join(sentence) + ". "
        return [LETTERS.index(c) for c in text.strip()]


def show(ids: Sequence[int]) -> str:
    """Ids as letters, # where a document ends."""
    return "".join(LETTERS[i] if i != END else "#" for i in ids)


def pack(
    documents: Sequence[Document], block: int, end: int = END
) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents, each closed by `end`, one after the other, cut into rows: ids int64 [R, block] and
    old bool [R, block]. Every token carries its document's label, the end included; one row may
    hold the end of an old document and the start of a new one. The last tokens that fill no row are
    left out."""
    ids, labels = [], []
    for document, old in documents:
        ids += [*document, end]
        labels += [old] * (len(document) + 1)
    whole = len(ids) // block * block
    rows = torch.tensor(ids[:whole], dtype=torch.int64).view(-1, block)
    return rows, torch.tensor(labels[:whole], dtype=torch.bool).view(-1, block)


def count(documents: Sequence[Document]) -> int:
    """Tokens, the ends included."""
    return sum(len(ids) + 1 for ids, _ in documents)


class Texts:
    """All text of one seed, as shuffled documents: `base` (old languages and a little of the new),
    `new` (stage 1), `replay` (the review's old text) and `review_new` (its new text, twice as many
    documents, out of those that stage 1 read); and `held_out`, {language: ids [R, block]}, none of
    whose documents is read by anybody. Sizes are blocks of text; `share` is how many tokens the
    replay has to one of stage 1."""

    def __init__(
        self,
        seed: int,
        *,
        scripts: str = "two",
        block: int = 64,
        base_blocks: int = 11_200,  # 700 steps of 16
        new_blocks: int = 6_400,  # 400 steps of 16
        replay_blocks: int = 62,
        eval_blocks: int = 40,  # of each language
    ):
        self.seed = seed
        self.block = block
        self.languages = {
            name: Language(seed, name, scripts) for names in GROUPS.values() for name in names
        }
        old, new, ood = GROUPS["old"], GROUPS["new"], GROUPS["ood"]
        self.base = self._write("base", old + ood, int(0.23 * base_blocks))
        self.base += self._write("base, a little", new, int(0.023 * base_blocks))
        self.new = self._write("new", new, new_blocks // len(new))
        self.replay = self._write("replay", old, replay_blocks // len(old))
        self.review_new = self.new[: 2 * len(self.replay)]
        self.share = count(self.replay) / count(self.new)
        read = {tuple(ids) for ids, _ in self.base + self.new + self.replay}
        self.held_out = {}
        for name in self.languages:
            documents = self._write("held out", [name], eval_blocks)
            unread = [d for d in documents if tuple(d.ids) not in read]
            self.held_out[name] = pack(unread, block)[0]
            if not len(self.held_out[name]):
                raise InputError(
                    f"{eval_blocks} blocks of {block} letters hold no unread document "
                    f"of language {name}: give more blocks to evaluate on"
                )

    def _write(self, purpose: str, names: Sequence[str], blocks: int) -> list[Document]:
        """Shuffled documents, at most `blocks` of text in each language."""
        documents = []
        for name in names:
            rng = random.Random(f"{self.seed}/{purpose} {name}")
            room = blocks * self.block
            while True:
                ids = self.languages[name].document(rng)
                room -= len(ids) + 1
                if room < 0:
                    break
                documents.append(Document(ids, name not in GROUPS["new"]))
        return random.Random(f"{self.seed}/{purpose}").sample(documents, len(documents))

    def batches(
        self, documents: Sequence[Document], batch: int, purpose: str, steps: int | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(ids, old) [batch, block] of every step: `steps` of them, or one pass."""
        rng = random.Random(f"{self.seed}/order {purpose}")
        ids, old = pack(rng.sample(list(documents), len(documents)), self.block)
        gen = generator(self.seed, f"batches {purpose}")
        steps = steps or len(ids) // batch
        if not steps:
            raise InputError(
                f"{purpose}: {len(ids)} blocks of {self.block} letters fill no batch "
                f"of {batch}: give more text or a smaller batch"
            )
        chosen = batches(len(ids), batch, gen, steps)
        return [(ids[rows], old[rows]) for rows in chosen]
