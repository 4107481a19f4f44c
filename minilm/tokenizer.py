"""Text <-> token ids: our own byte-level BPE, and exact readers of real checkpoints' tokenizers.

    tok = train_bpe(texts, vocab_size=4096, special=("<|end|>",), eos="<|end|>");  tok.save("out")
    tok = load_tokenizer("path/to/folder")
    tok.encode("hello"), tok.decode(ids), tok.vocab_size, tok.bos_id, tok.eos_id, tok.special
    tok, pieces = extend_tokenizer(tok, german_texts, 2000)  # see lora.extend_vocabulary as well

Every tokenizer here IS its tokenizer.json (`spec`; tokenizer_json.py says what its parts mean) and
tokenizer_config.json (`config`): saving writes the two back, and `transformers` reads them.
Byte-level files run on tiktoken; bpe.merge, the plain loop, serves the rest."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import regex
import tiktoken

from minilm import InputError
from minilm.bpe import CHAR_TO_BYTE, PATTERN, continue_merges, learn_merges, merge, spell
from minilm.data import find_checkpoint, read_json, read_text, reading, write_json
from minilm.tokenizer_json import (LISTS, NAMES, Added, Settings, byte_level, content, read_added,
                                   read_model, sentencepiece, starts_with)

SPACE = regex.compile(r"\s")
# A new tokenizer.json.
EMPTY = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
}


class Tokenizer:
    """What all kinds share: added tokens, BOS and EOS, saving.

    A kind gives `_fold(text)`, its normalizer but for a mark in front (applying it twice changes
    nothing); `_encode(folded, first) -> ids` (does the whole text start here?); `token_bytes(id)`;
    one with merges also the `_words` inside which it merges, their `_letters` and `_word(word)`.

    `add_bos`: does the folder want BOS in front of a text? `add_bos_token` of its configuration
    says it, else its post-processor (transformers 4's rule; 5 reads the post-processor alone)."""

    def __init__(self, spec: dict, config: dict | None = None):
        self.spec = spec
        self.config = config or {}
        self.vocab, self._merges = read_model(spec)
        self.settings = self._read_settings(spec)
        added = read_added(spec, self.config, self.vocab)
        self.added = {t.content: t.id for t in added}
        self.special = {t.content: t.id for t in added if t.special}  # never made from text
        self.vocab_size = 1 + max([*self.vocab.values(), *self.added.values()])
        self.bos_id = self.token_id(self.config.get("bos_token"))
        self.eos_id = self.token_id(self.config.get("eos_token"))
        wants_bos = self.config.get("add_bos_token")
        if wants_bos is None:
            front = starts_with(spec)
            wants_bos = front is not None and self.token_id(front) == self.bos_id
        self.add_bos = self.bos_id is not None and bool(wants_bos)
        raw = {t.content: t for t in added if not t.normalized}
        normal = {}
        self._added_names = {t.id: name for name, t in raw.items()}
        for t in (t for t in added if t.normalized):
            name = self._added_names[t.id] = self._normalize(t.content)
            normal.setdefault(name, t)  # of two with the same form the first is found
        self._raw, self._normal = Finder(raw), Finder(normal)
        self._names = {i: name for name, i in self.vocab.items()}

    def _read_settings(self, spec: dict) -> Settings:
        return Settings()

    def token_id(self, token: str | dict | None) -> int | None:
        """Id of one whole token by its text (or {"content": text}); None if there is none."""
        text = content(token)
        return self.added.get(text, self.vocab.get(text))

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of a text. Special tokens written in it stay text, so a user cannot forge them.
        Equals the tokenizers library's encode(text, add_special_tokens=False) with
        encode_special_tokens set; half a surrogate pair is read as U+FFFD."""
        front = [self.bos_id] if bos and self.bos_id is not None else []
        return front + self._split(_whole(text))

    def encode_template(self, text: str, stand_for: dict[int, str]) -> list[int]:
        """Ids of a text of our own making, special tokens read as such. The characters `stand_for`
        {code: character} break up those which a user's part of the text holds; they are put back
        once the real ones are found (see chat.py)."""
        return self._split(_whole(text), special=True, stand_for=stand_for)

    def _split(self, text: str, special: bool = False, stand_for: dict | None = None) -> list[int]:
        """Added tokens are found in the text as it is, then in each normalised rest."""
        ids = []
        for at, token, rest in self._raw.cut(text, special):
            if token is not None:
                ids.append(token.id)
                continue
            for inside, token, piece in self._normal.cut(self._normalize(rest), special):
                if token is not None:
                    ids.append(token.id)
                    continue
                if stand_for:
                    piece = self._fold(piece.translate(stand_for))
                ids += self._encode(piece, first=at == inside == 0)
        return ids

    def _normalize(self, text: str) -> str:
        mark = "▁" if text and self.settings.prepend == "always" else ""
        return mark + self._fold(text)

    def _fold(self, text: str) -> str:
        return text

    def _spelled(self, name: str) -> bytes:
        """The bytes that the decoder makes of a token's name."""
        return name.encode()

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids; half a character (bytes that are not UTF-8 yet) shows as U+FFFD, an id that
        is no token as nothing."""
        skip = set(self.special.values()) if skip_special else ()
        pieces = []
        for i in map(int, ids):
            name = self._added_names.get(i, self._names.get(i))
            if name is not None and i not in skip:
                pieces.append(self._spelled(name))
        return b"".join(pieces).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """tokenizer.json, tokenizer_config.json, written under a temporary name and renamed."""
        write_json(Path(folder) / "tokenizer.json", self.spec)
        write_json(Path(folder) / "tokenizer_config.json", self.config)


class Finder:
    """Finds added tokens in a text: the leftmost, of several there the longest."""

    def __init__(self, tokens: dict[str, Added]):
        self.tokens = tokens
        longest_first = sorted(tokens, key=len, reverse=True)
        self.pattern = regex.compile("|".join(map(regex.escape, longest_first)))

    def cut(self, text: str, special: bool) -> Iterator[tuple[int, Added | None, str]]:
        """(place, token, its text), or (place, None, text between two). Without `special`, a
        special token stays text; no other token is found inside it even so, as in the library."""
        done = 0
        for match in self.pattern.finditer(text) if self.tokens else ():
            token = self.tokens[match[0]]
            if token.special and not special:
                continue
            start, stop = match.span()
            if token.lstrip:
                while start > done and SPACE.match(text[start - 1]):
                    start -= 1
                start = max(start, done)
            if token.rstrip:
                while stop < len(text) and SPACE.match(text[stop]):
                    stop += 1
            if done < start:
                yield done, None, text[done:start]
            yield start, token, match[0]
            done = stop
        if done < len(text):
            yield done, None, text[done:]


def _whole(text: str) -> str:
    """The text with its surrogates (JSON and terminals let half a pair through) put together."""
    if not text.isascii() and regex.search(r"[\ud800-\udfff]", text):
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class ByteLevelBPE(Tokenizer):
    """GPT-2's kind (Llama 3, Qwen, OLMoE, SmolLM2, ours): a regular expression cuts the text into
    pieces, whose UTF-8 bytes are merged.

    tiktoken merges whenever the joined bytes are a token, with the id as priority. That is the
    same as the file's list of pairs if ids grow along the list and every token comes from it:
    checked here; a file that fails, or lacks some bytes, goes through `merge`."""

    def __init__(self, spec: dict, config: dict | None = None):
        super().__init__(spec, config)
        self.pattern = self.settings.pattern
        model = spec["model"]
        made = [self.vocab[a + b] for a, b in self._merges]  # ids, in the order of the merges
        products = set(made)
        self._tokens = {}
        for name, i in self.vocab.items():
            own = name not in self.added or i in products or len(name) == 1
            if own and all(c in CHAR_TO_BYTE for c in name):
                self._tokens[i] = self._spelled(name)
        single = {i for i, token in self._tokens.items() if len(token) == 1}
        ordered = all(x < y for x, y in zip(made, made[1:]))
        from_list = self._tokens.keys() - single <= products
        self._tiktoken = None
        if ordered and len(single) == 256 and from_list:
            ranks = {token: i for i, token in self._tokens.items()}
            self._tiktoken = tiktoken.Encoding(
                "minilm", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})
            self._word = self._tiktoken.encode_ordinary
        else:
            if model.get("byte_fallback"):
                raise InputError("byte_fallback is not read in a byte-level BPE that lacks bytes")
            self._rank = {pair: i for i, pair in enumerate(self._merges)}
            self._unknown = self.vocab.get(model.get("unk_token"))
            self._word = lru_cache(2**16)(self._merge_word)

    def _read_settings(self, spec):
        return byte_level(spec)

    def _fold(self, text):
        return unicodedata.normalize("NFC", text) if self.settings.nfc else text

    def _prefixed(self, text: str) -> str:
        lacks = self.settings.prefix_space and not text.startswith(" ")
        return " " + text if lacks and text else text

    def _words(self, text, first=True):
        return [match[0] for match in regex.finditer(self.pattern, self._prefixed(text))]

    def _encode(self, text, first=True):
        if self._tiktoken:
            return self._tiktoken.encode_ordinary(self._prefixed(text))
        return [i for word in self._words(text) for i in self._word(word)]

    @staticmethod
    def _letters(word: str) -> str:
        return spell(word.encode())

    def _merge_word(self, word: str) -> list[int]:
        model = self.spec["model"]
        text = self._letters(word)
        if model.get("ignore_merges") and text in self.vocab:
            return [self.vocab[text]]
        if self._unknown is None:  # tokenizers drops what it cannot spell
            text = [c for c in text if c in self.vocab]
        ids = [self.vocab.get(s, self._unknown) for s in merge(list(text), self._rank)]
        return _fused(ids, self._unknown) if model.get("fuse_unk") else ids

    def token_bytes(self, i):
        return b"" if i in self._added_names else self._tokens.get(i, b"")

    def _spelled(self, name):
        if all(c in CHAR_TO_BYTE for c in name):
            return bytes(CHAR_TO_BYTE[c] for c in name)
        return name.encode()


def _fused(ids: list[int], unknown: int | None) -> list[int]:
    """Neighbouring unknown tokens become one."""
    return [i for i, before in zip(ids, [None, *ids]) if not i == before == unknown]


class SentencePieceBPE(Tokenizer):
    """Llama 2's kind: characters are merged, "▁" stands for a space, a character without a token
    becomes its UTF-8 bytes <0xNN>."""

    def __init__(self, spec: dict, config: dict | None = None):
        super().__init__(spec, config)
        model = spec["model"]
        merges = self._merges
        self._rank = {pair: i for i, pair in enumerate(merges)}
        # does a merge ever join a word to the space after it? Else words are merged one by one
        crossing = any("▁" in (a + b).lstrip("▁") for a, b in merges)
        self._cut = regex.compile(r"(?s).+" if crossing else r"▁+[^▁]*|[^▁]+")
        self._unknown = self.vocab.get(model.get("unk_token"))
        if model.get("unk_token") is not None and self._unknown is None:
            raise InputError(f"unk_token {model['unk_token']!r} is not in the vocabulary")
        self._word = lru_cache(2**16)(self._merge_word)

    def _read_settings(self, spec):
        return sentencepiece(spec)

    def _fold(self, text):
        by_normalizer = self.settings.prepend in (None, "always")
        return text.replace(" ", "▁") if by_normalizer else text

    def _words(self, text, first=True):
        marked = text.replace(" ", "▁")
        prepend = self.settings.prepend
        if marked and not marked.startswith("▁"):
            if prepend == "missing" or (prepend == "first" and first):
                marked = "▁" + marked
        return self._cut.findall(marked)

    def _encode(self, text, first=True):
        ids = [i for word in self._words(text, first) for i in self._word(word)]
        return _fused(ids, self._unknown) if self.spec["model"].get("fuse_unk") else ids

    @staticmethod
    def _letters(word: str) -> str:
        return word

    def _merge_word(self, word: str) -> list[int]:
        model = self.spec["model"]
        symbols = []
        for c in word:
            spelled = [f"<0x{b:02X}>" for b in c.encode()]
            if c in self.vocab:
                symbols.append(c)
            elif model.get("byte_fallback") and all(s in self.vocab for s in spelled):
                symbols += spelled
            elif self._unknown is not None:
                symbols.append(model["unk_token"])
        return [self.vocab[s] for s in merge(symbols, self._rank)]

    def token_bytes(self, i):
        return self._spelled(self._names.get(i, ""))

    def _spelled(self, name):
        if self.settings.byte_tokens and regex.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name):
            return bytes.fromhex(name[3:5])
        return name.replace("▁", " ").encode()

    def decode(self, ids, skip_special=False):
        text = super().decode(ids, skip_special)
        return text.removeprefix(" ") if self.settings.strip else text


class CharLevel(Tokenizer):
    """One token per distinct character. In tokenizer.json: a BPE without merges."""

    @classmethod
    def train(cls, text: str) -> "CharLevel":
        vocab = {c: i for i, c in enumerate(sorted(set(text)))}
        model = {"type": "BPE", "vocab": vocab, "merges": []}
        spec = EMPTY | {"decoder": {"type": "Fuse"}, "model": model}
        return cls(spec, {"tokenizer_class": "PreTrainedTokenizerFast"})

    def _read_settings(self, spec):
        if spec.get("decoder") != {"type": "Fuse"}:
            raise InputError(f"the decoder {spec.get('decoder')} is not read; minilm reads Fuse "
                             "behind characters")
        return Settings()

    def _encode(self, text, first=True):
        """InputError, naming the first character that the alphabet lacks, and its place."""
        ids = [self.vocab.get(c) for c in text]
        if None in ids:
            at = ids.index(None)
            raise InputError(f"character {text[at]!r} at position {at} is not among the "
                             f"{len(self.vocab)} characters that this character-level tokenizer "
                             "knows: remove it, or train with --level bpe")
        return ids

    def token_bytes(self, i):
        return self._names.get(i, "").encode()


# --- training

def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special: Sequence[str] = (),
    eos: str | None = None,
    bos: str | None = None,
    pattern: str = PATTERN,
) -> ByteLevelBPE:
    """A byte-level BPE of our own: ids 0-255 are the bytes, then one per merge (fewer if no pair
    occurs twice), the special tokens last."""
    count = vocab_size - 256 - len(special)
    if missing := {bos, eos} - {None, *special}:
        raise InputError(f"bos or eos {missing.pop()!r} must be among the special tokens "
                         f"{list(special)}")
    if count < 0:
        raise InputError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(special)} "
                         f"special tokens need {256 + len(special)}")
    merges = learn_merges(texts, count, pattern)
    tokens = [*(bytes([b]) for b in range(256)), *(a + b for a, b in merges)]
    model = {
        "type": "BPE",
        "vocab": {spell(token): i for i, token in enumerate(tokens)},
        "merges": [[spell(a), spell(b)] for a, b in merges],
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    bytes_ = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    spec = EMPTY | {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "model": model,
        "decoder": bytes_ | {"use_regex": True},
    }
    spec["added_tokens"] = _added_entries(special, len(tokens))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if bos is not None:
        config["bos_token"] = bos
    if eos is not None:
        config["eos_token"] = eos
    return ByteLevelBPE(spec, config | {"add_bos_token": False})


def extend_tokenizer(
    tok: Tokenizer,
    texts: Sequence[str],
    tokens: int,
    special: Sequence[str] = (),
    protect: Iterable[str] = (),
) -> tuple[Tokenizer, list[list[int]]]:
    """-> a tokenizer with up to `tokens` more tokens, learned from `texts` in a new language, and
    the `special` ones behind them; and for each new token the old ids that it stands for ([] for a
    special one): lora.extend_vocabulary makes its rows from them.

    Training goes on where the old merges ended: every new pair comes after all old ones and no old
    id changes (appended merges of another tokenizer would change old texts). And no pair is joined
    that would change a text of `protect`, the old language's."""
    if not hasattr(tok, "_word"):
        raise InputError("a character-level tokenizer has no merges to go on from: "
                         "extend one that was trained with --level bpe")
    if twice := [s for s in special if tok.token_id(s) is not None]:
        raise InputError(f"the tokenizer has a token {twice[0]!r} already: it was extended before, "
                         "or choose another name")
    words = _count_words(tok, texts)
    kept = _count_words(tok, protect)
    first = tok.vocab_size
    seen = Counter()
    for word, times in words.items():
        for letter in tok._letters(word):
            seen[letter] += times
    taken = set(tok.vocab).union(*map(tok._letters, kept))
    # SentencePiece: letters that so far were bytes only
    letters = [c for c, times in seen.most_common() if times > 1 and c not in taken][:tokens]
    pieces = [tok._word(c) for c in letters]
    tok = _longer(tok, letters)
    for word in kept:
        parts = _parts(tok, word)
        taken |= {"".join(parts), *map("".join, zip(parts, parts[1:]))}
    known = [word for word in words if tok.vocab.keys() >= set(tok._letters(word))]
    parts = [_parts(tok, word) for word in known]
    times = [words[word] for word in known]
    merges = continue_merges(parts, times, tokens - len(letters), taken)
    tok = _longer(tok, [a + b for a, b in merges], merges, special)
    for pair in merges:
        ids = [tok.vocab[name] for name in pair]
        pieces.append([old for i in ids for old in ([i] if i < first else pieces[i - first])])
    return tok, pieces + [[] for _ in special]


def _count_words(tok: Tokenizer, texts: Iterable[str]) -> Counter:
    return Counter(word for text in texts for word in tok._words(tok._normalize(text)))


def _parts(tok: Tokenizer, word: str) -> list[str]:
    """A word as the names of its tokens."""
    return [tok._names[i] for i in tok._word(word)]


def _longer(
    tok: Tokenizer,
    names: Sequence[str] = (),
    merges: Sequence[tuple] = (),
    special: Sequence[str] = (),
) -> Tokenizer:
    """The tokenizer with these tokens, the merges that make them, special tokens behind them."""
    spec = dict(tok.spec)
    model = dict(tok.spec["model"])
    behind = tok.vocab_size + len(names)
    # (the library gives an added token that is not in the vocabulary the id behind its last)
    model["vocab"] = tok.vocab | tok.added | dict(zip(names, range(tok.vocab_size, behind)))
    model["merges"] = [list(pair) for pair in (*tok._merges, *merges)]
    entries = list(spec.get("added_tokens") or []) + _added_entries(special, behind)
    return type(tok)(spec | {"model": model, "added_tokens": entries}, tok.config)


def _added_entries(special: Sequence[str], first: int) -> list[dict]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [{"id": i, "content": text, **flags, "special": True}
            for i, text in enumerate(special, first)]


# --- reading a folder

def load_tokenizer(folder: str | Path) -> Tokenizer:
    """A folder's tokenizer.json, with what tokenizer_config.json, special_tokens_map.json (which
    wins), the ids of config.json and chat_template.jinja say beside it. InputError for a kind or a
    setting that is not read exactly, and for a token that the files disagree about. `folder` may
    be whatever load_pretrained takes."""
    folder = find_checkpoint(folder)
    if folder.suffix == ".gguf":
        from minilm.gguf import open_gguf, read_tokenizer  # needs the extra `gguf`

        with reading(folder):
            found = read_tokenizer(open_gguf(folder)[1])
            if found is None:
                raise InputError("it holds no tokenizer: give a file or folder that does")
        return found
    file = folder / "tokenizer.json"
    spec = read_json(file)
    config = _optional(file, "tokenizer_config.json")
    with reading(file):
        for key, value in _optional(file, "special_tokens_map.json").items():
            if key in (*NAMES, *LISTS) and value is not None:
                config[key] = value
        vocab, _ = read_model(spec)
        ids = vocab | {t["content"]: t["id"] for t in spec.get("added_tokens") or []}
        for text, i in _optional(file, "added_tokens.json").items():
            if ids.get(text) != i:
                raise InputError(f"added_tokens.json gives {text!r} the id {i}, tokenizer.json "
                                 f"{ids.get(text)}: save the tokenizer again")
        names = {i: text for text, i in ids.items()}
        for other in ("generation_config.json", "config.json"):  # some name BOS and EOS by id only
            values = _optional(file, other)
            for key in ("bos_token", "eos_token"):
                i = values.get(key + "_id")
                i = i[0] if isinstance(i, list) and i else i
                if key not in config and type(i) is int and i in names:
                    config[key] = names[i]
        if file.with_name("chat_template.jinja").exists():
            config["chat_template"] = read_text(file.with_name("chat_template.jinja"))
        return _kind(spec)(spec, config)


def _optional(file: Path, name: str) -> dict:
    return read_json(file.with_name(name)) if file.with_name(name).exists() else {}


def _kind(spec: dict) -> type[Tokenizer]:
    pre = spec.get("pre_tokenizer")
    model = spec["model"]
    if '"ByteLevel"' in json.dumps(pre):
        return ByteLevelBPE
    characters = not (model.get("merges") or model.get("unk_token") or model.get("byte_fallback"))
    if characters and not pre and not spec.get("normalizer"):
        return CharLevel
    return SentencePieceBPE
