"""Text <-> token ids: our own byte-level BPE, and exact readers of the tokenizer.json files that real checkpoints carry.

    tok = train_bpe(texts, vocab_size=4096, special=("<|endoftext|>",), eos="<|endoftext|>");  tok.save("out")
    tok = load_tokenizer("path/to/folder");  tok.encode("hello"), tok.decode(ids), tok.vocab_size, tok.bos_id, tok.eos_id, tok.special
    tok, pieces = extend_tokenizer(tok, german_texts, 2000)     # for another language; see lora.extend_vocabulary for the model's side

Every tokenizer here IS its tokenizer.json (`spec`) and tokenizer_config.json (`config`): saving writes the two back, and `transformers`
reads them. Byte-level files run on tiktoken; bpe.merge, the plain loop, serves the rest."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import regex
import tiktoken

from minilm import InputError
from minilm.bpe import CHAR_TO_BYTE, PATTERN, continue_merges, learn_merges, merge, spell
from minilm.data import read_json, read_text, reading, write_json

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Pre-tokenizer "individual digits, then GPT2": a space stays outside the digit after it, so a run of spaces before a digit is one piece.
DIGITS_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
EMPTY = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None}  # a new tokenizer.json


class Tokenizer:
    """What all kinds share: added tokens, BOS and EOS, saving. A kind gives `_encode(text, first) -> ids` (does the whole text start here?)
    and `token_bytes(id) -> bytes`; one with merges also the `_words(text)` inside which it merges, their `_letters`, `_word(word)`."""

    def __init__(self, spec: dict, config: dict | None = None):
        self.spec, self.config = spec, config or {}
        self.vocab, added = spec["model"]["vocab"], spec.get("added_tokens") or []
        if odd := [t["content"] for t in added if t.get("single_word")]:
            raise InputError(f"tokenizer.json: the added token {odd[0]!r} is marked single_word, which is not read")
        self.added = {t["content"]: t["id"] for t in added}
        self.special = {t["content"]: t["id"] for t in added if t.get("special")}  # never made from text, unless allow_special is set
        self._merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in spec["model"].get("merges") or []]
        normalizer = spec.get("normalizer") or {"normalizers": []}
        self._normalizers = [n.get("type") for n in normalizer.get("normalizers", [normalizer])]
        self.vocab_size = 1 + max([*self.vocab.values(), *self.added.values()])
        self.bos_id, self.eos_id = (self.token_id(self.config.get(k)) for k in ("bos_token", "eos_token"))
        self.add_bos = self.bos_id is not None and bool(self.config.get("add_bos_token", _template_starts_with_special(spec)))
        self._plain, self._all = (_splitter([t for t in added if keep(t)]) for keep in (lambda t: not t.get("special"), lambda t: True))
        self._names, self._added_bytes = {i: t for t, i in self.vocab.items()}, {i: t.encode() for t, i in self.added.items()}

    def token_id(self, token: str | dict | None) -> int | None:
        """Id of one whole token by its text (tokenizer_config.json may hold {"content": text}); None if there is no such token."""
        text = token.get("content") if isinstance(token, dict) else token
        return self.added.get(text, self.vocab.get(text))

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of a text. Special tokens written in it stay text, so a user cannot forge them. Equals transformers'
        encode(text, add_special_tokens=False, split_special_tokens=True)."""
        return [*([self.bos_id] if bos and self.bos_id is not None else []), *self._split(text, self._plain)]

    def encode_template(self, text: str, stand_for: dict[int, str]) -> list[int]:
        """Ids of a text of our own making, special tokens read as such. The characters `stand_for` {code: character} break up those which
        a user's part of the text holds; they are put back once the real ones are found (see chat.py)."""
        return self._split(text, self._all, stand_for)

    def _split(self, text: str, added: regex.Pattern | None, stand_for: dict[int, str] | None = None) -> list[int]:
        encode = lambda part, first: self._encode(part.translate(stand_for) if stand_for else part, first)
        ids, at = [], 0
        for found in added.finditer(text) if added else ():
            ids += [*encode(text[at : found.start()], at == 0), self.added[found[found.lastindex]]]
            at = found.end()
        return ids + encode(text[at:], at == 0)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids; half a character (bytes that are not UTF-8 yet) shows as U+FFFD, an id that is no token as nothing."""
        skip = set(self.special.values()) if skip_special else ()
        return b"".join(self._added_bytes[i] if i in self._added_bytes else self.token_bytes(i)
                        for i in map(int, ids) if i not in skip).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """tokenizer.json and tokenizer_config.json, each written under a temporary name and renamed."""
        write_json(Path(folder) / "tokenizer.json", self.spec)
        write_json(Path(folder) / "tokenizer_config.json", self.config)


class ByteLevelBPE(Tokenizer):
    """GPT-2's kind (Llama 3, Qwen, OLMoE, SmolLM2, ours): a regular expression cuts the text into pieces, whose UTF-8 bytes are merged.

    tiktoken merges whenever the joined bytes are a token, with the id as priority. That is the same as the file's list of pairs if ids
    grow along the list and every token comes from it: checked here; a file that fails, or lacks some bytes, goes through `merge`."""

    _letters = staticmethod(lambda word: spell(word.encode()))

    def __init__(self, spec: dict, config: dict | None = None):
        super().__init__(spec, config)
        self.pattern, self.prefix_space = _pattern(spec["pre_tokenizer"])
        if self._normalizers not in ([], ["NFC"]):
            raise InputError(f"the normalizer {', '.join(self._normalizers)} is not read; minilm reads NFC or none before a byte-level BPE")
        model, merges = spec["model"], self._merges
        self._tokens = {i: bytes(CHAR_TO_BYTE[c] for c in t) for t, i in self.vocab.items()
                        if t not in self.added and all(c in CHAR_TO_BYTE for c in t)}
        ids, single = [self.vocab.get(a + b, -1) for a, b in merges], {i for i, t in self._tokens.items() if len(t) == 1}
        ordered = all(x < y for x, y in zip(ids, ids[1:])) and -1 not in ids
        complete = len(single) == 256 and (model.get("ignore_merges") or set(self._tokens) - single <= set(ids))
        self._tiktoken = None
        if ordered and complete:
            ranks = {t: i for i, t in self._tokens.items()}
            self._tiktoken = tiktoken.Encoding("minilm", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})
        else:
            self._rank, self._unknown = {pair: i for i, pair in enumerate(merges)}, self.vocab.get(model.get("unk_token"))
        self._word = self._tiktoken.encode_ordinary if self._tiktoken else lru_cache(2**16)(self._merge_word)

    def _prepare(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text) if self._normalizers else text
        return " " + text if self.prefix_space and text and not text.startswith(" ") else text

    def _words(self, text, first=True):
        return regex.findall(self.pattern, self._prepare(text))

    def _encode(self, text, first=True):
        if self._tiktoken:
            return self._tiktoken.encode_ordinary(self._prepare(text))
        return [i for word in self._words(text) for i in self._word(word)]

    def _merge_word(self, word: str) -> list[int]:
        text = self._letters(word)
        if self.spec["model"].get("ignore_merges") and text in self.vocab:
            return [self.vocab[text]]
        known = [c for c in text if c in self.vocab or self._unknown is not None]  # tokenizers drops what it cannot spell
        return [self.vocab.get(s, self._unknown) for s in merge(known, self._rank)]

    def token_bytes(self, i):
        return self._tokens.get(i, b"")


class SentencePieceBPE(Tokenizer):
    """Llama 2's kind: characters are merged, "▁" stands for a space, a character without a token becomes its UTF-8 bytes <0xNN>."""

    _letters = staticmethod(str)

    def __init__(self, spec: dict, config: dict | None = None):
        super().__init__(spec, config)
        model, merges = spec["model"], self._merges
        if odd := [a + b for a, b in merges if a + b not in self.vocab]:
            raise InputError(f"the merges make {odd[0]!r}, which the vocabulary lacks: the file is damaged")
        self._rank, self._prepend = {pair: i for i, pair in enumerate(merges)}, _prepends(self._normalizers, spec.get("pre_tokenizer"))
        crossing = any("▁" in (a + b).lstrip("▁") for a, b in merges)  # else no merge ever joins a word to the space after it
        self._cut = regex.compile(r"(?s).+" if crossing else r"▁+[^▁]*|[^▁]+")
        self._unknown, self._fuse = self.vocab.get(model.get("unk_token")), model.get("fuse_unk")
        self._word = lru_cache(2**16)(self._merge_word)

    def _words(self, text, first=True):
        marked = text.replace(" ", "▁")
        missing = not marked.startswith("▁")
        if text and (self._prepend == "always" or missing and (self._prepend == "missing" or self._prepend == "first" and first)):
            marked = "▁" + marked
        return self._cut.findall(marked)

    def _encode(self, text, first=True):
        ids = [i for word in self._words(text, first) for i in self._word(word)]
        return [i for i, before in zip(ids, [None, *ids]) if not (self._fuse and i == before == self._unknown)]

    def _merge_word(self, word: str) -> list[int]:
        symbols = []
        for c in word:
            spelled = [f"<0x{b:02X}>" for b in c.encode("utf-8", errors="replace")]
            if c in self.vocab:
                symbols.append(c)
            elif self.spec["model"].get("byte_fallback") and all(s in self.vocab for s in spelled):
                symbols += spelled
            elif self._unknown is not None:
                symbols.append(self.spec["model"]["unk_token"])
        return [self.vocab[s] for s in merge(symbols, self._rank)]

    def token_bytes(self, i):
        name = self._names.get(i, "")
        return bytes.fromhex(name[3:5]) if regex.fullmatch(r"<0x[0-9A-F]{2}>", name) else name.replace("▁", " ").encode()

    def decode(self, ids, skip_special=False):
        text = super().decode(ids, skip_special)
        return text[1:] if self._prepend and text.startswith(" ") else text  # the space that encode put in front


class CharLevel(Tokenizer):
    """One token per distinct character. In tokenizer.json: a BPE without merges."""

    @classmethod
    def train(cls, text: str) -> "CharLevel":
        model = {"type": "BPE", "vocab": {c: i for i, c in enumerate(sorted(set(text)))}, "merges": []}
        return cls(EMPTY | {"decoder": {"type": "Fuse"}, "model": model}, {"tokenizer_class": "PreTrainedTokenizerFast"})

    def _encode(self, text, first=True):
        """Raises InputError, naming the first character that the alphabet lacks, and its place."""
        ids = [self.vocab.get(c) for c in text]
        if None in ids:
            at = ids.index(None)
            raise InputError(f"character {text[at]!r} at position {at} is not among the {len(self.vocab)} characters that this "
                             "character-level tokenizer knows: remove it, or train with --level bpe")
        return ids

    def token_bytes(self, i):
        return self._names.get(i, "").encode()


# --- training

def train_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str] = (), eos: str | None = None, bos: str | None = None,
              pattern: str = PATTERN) -> ByteLevelBPE:
    """A byte-level BPE of our own: ids 0-255 are the bytes, then one per merge (fewer if no pair occurs twice), the special tokens last."""
    count = vocab_size - 256 - len(special)
    if missing := {bos, eos} - {None, *special}:
        raise InputError(f"bos or eos {missing.pop()!r} must be among the special tokens {list(special)}")
    if count < 0:
        raise InputError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(special)} special tokens need {256 + len(special)}")
    merges = learn_merges(texts, count, pattern)
    tokens = [*(bytes([b]) for b in range(256)), *(a + b for a, b in merges)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "vocab": {spell(t): i for i, t in enumerate(tokens)}, "merges": [[spell(a), spell(b)] for a, b in merges]}
    spec = EMPTY | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}, "model": model,
                    "decoder": byte_level | {"use_regex": True}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "add_bos_token": False}
    return _longer(ByteLevelBPE(spec, {k: v for k, v in config.items() if v is not None}), special=special)


def extend_tokenizer(tok: Tokenizer, texts: Sequence[str], tokens: int, special: Sequence[str] = (),
                     protect: Iterable[str] = ()) -> tuple[Tokenizer, list[list[int]]]:
    """-> a tokenizer with up to `tokens` more tokens, learned from `texts` in a new language, and the `special` ones behind them; and for
    each new token the old ids that it stands for ([] for a special one): lora.extend_vocabulary makes its rows from them.

    Training goes on where the old merges ended: every new pair comes after all old ones and no old id changes (appended merges of another
    tokenizer would change old texts). And no pair is joined that would change a text of `protect`, the old language's."""
    if not hasattr(tok, "_word"):
        raise InputError("a character-level tokenizer has no merges to go on from: extend one that was trained with --level bpe")
    if twice := [s for s in special if tok.token_id(s) is not None]:
        raise InputError(f"the tokenizer has a token {twice[0]!r} already: it was extended before, or choose another name")
    count = lambda texts: Counter(word for text in texts for word in tok._words(text))
    words, kept, first = count(texts), count(protect), tok.vocab_size
    seen = Counter(c for word, times in words.items() for c in tok._letters(word) * times)
    taken = set(tok.vocab).union(*map(tok._letters, kept))
    letters = [c for c, times in seen.most_common() if times > 1 and c not in taken][:tokens]  # SentencePiece: so far bytes only
    pieces, tok = [tok._word(c) for c in letters], _longer(tok, letters)
    split = lambda word: [tok._names[i] for i in tok._word(word)]
    for parts in map(split, kept):
        taken |= {"".join(parts), *map("".join, zip(parts, parts[1:]))}
    known = [word for word in words if tok.vocab.keys() >= set(tok._letters(word))]
    merges = continue_merges([split(word) for word in known], [words[word] for word in known], tokens - len(letters), taken)
    tok = _longer(tok, [a + b for a, b in merges], merges, special)
    old = lambda name: [i] if (i := tok.vocab[name]) < first else pieces[i - first]
    for a, b in merges:
        pieces.append(old(a) + old(b))
    return tok, pieces + [[] for _ in special]


def _longer(tok: Tokenizer, names: Sequence[str] = (), merges: Sequence[tuple] = (), special: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer with these tokens, the merges that make them, and special tokens behind them."""
    spec, ids = tok.spec | {"model": dict(tok.spec["model"])}, range(tok.vocab_size, tok.vocab_size + len(names) + len(special))
    spec["model"] |= {"vocab": tok.vocab | tok.added | dict(zip(names, ids)), "merges": [list(pair) for pair in (*tok._merges, *merges)]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] = (spec.get("added_tokens") or []) + [{"id": i, "content": s} | flags for i, s in zip(ids[len(names) :], special)]
    return type(tok)(spec, tok.config)


# --- reading tokenizer.json

def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads a folder's tokenizer.json, tokenizer_config.json and chat_template.jinja. InputError for a kind that is not read exactly."""
    file = Path(folder) / "tokenizer.json"
    read = lambda name: read_json(file.with_name(name)) if file.with_name(name).exists() else {}
    spec, config = read_json(file), read("tokenizer_config.json")
    with reading(file):
        names = {t["id"]: t["content"] for t in spec.get("added_tokens") or []}
        for other in (read("generation_config.json"), read("config.json")):  # some folders name BOS and EOS by id only
            for key in ("bos_token", "eos_token"):
                if key not in config and isinstance(other.get(key + "_id"), int):
                    config[key] = names.get(other[key + "_id"])
        if file.with_name("chat_template.jinja").exists():
            config["chat_template"] = read_text(file.with_name("chat_template.jinja"))
        model = spec["model"] if isinstance(spec.get("model"), dict) else {}
        if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
            raise InputError(f"tokenizer model {model.get('type')!r} is not read; minilm reads BPE (byte-level, or SentencePiece-type)")
        if odd := [k for k in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(k)]:
            raise InputError(f"a BPE with {odd[0]} {model[odd[0]]!r} is not read")
        plain = not (model.get("merges") or spec.get("pre_tokenizer") or spec.get("normalizer"))
        kind = ByteLevelBPE if "ByteLevel" in json.dumps(spec.get("pre_tokenizer")) else CharLevel if plain else SentencePieceBPE
        return kind(spec, config)


def _splitter(added: list[dict]) -> regex.Pattern | None:
    """Finds added tokens in a text, the longest first; lstrip and rstrip swallow the white space beside a token."""
    parts = [(r"\s*" if t.get("lstrip") else "") + f"({regex.escape(t['content'])})" + (r"\s*" if t.get("rstrip") else "")
             for t in sorted(added, key=lambda t: -len(t["content"]))]
    return regex.compile("|".join(parts)) if parts else None


def _template_starts_with_special(spec: dict) -> bool:
    """Does the file's own post-processor put a special token in front of every text?"""
    processor = spec.get("post_processor") or {}
    return any(part.get("type") == "TemplateProcessing" and part.get("single") and "SpecialToken" in part["single"][0]
               for part in (processor, *(processor.get("processors") or [])))


def _pattern(pre: dict) -> tuple[str, bool]:
    """The regular expression that cuts the text, and whether a space is put in front of the text."""
    parts = pre.get("pretokenizers", [pre])
    kinds, first, last = [p["type"] for p in parts], parts[0], parts[-1]
    gpt2, prefix = last.get("use_regex", True), bool(last.get("add_prefix_space", True))
    if kinds == ["ByteLevel"] and gpt2:
        return GPT2, prefix
    if kinds == ["Digits", "ByteLevel"] and first.get("individual_digits") and gpt2 and not prefix:
        return DIGITS_GPT2, False
    plain = not (gpt2 or prefix or first.get("invert")) and first.get("behavior") == "Isolated"
    if kinds == ["Split", "ByteLevel"] and plain and "Regex" in first["pattern"]:
        return first["pattern"]["Regex"], False
    raise InputError(f"the pre-tokenizer {' + '.join(kinds)} with these settings is not read; minilm reads ByteLevel, "
                     "Split(Regex) + ByteLevel and Digits + ByteLevel")


def _prepends(kinds: list[str], pre: dict | None) -> str | None:
    """When a "▁" is put in front: "always"; where it is "missing"; the same, but only "first" in a text with added tokens; never (None)."""
    if kinds in (["Prepend", "Replace"], ["Replace"]) and pre is None:
        return "always" if kinds[0] == "Prepend" else None
    if not kinds and pre and pre.get("type") == "Metaspace" and not pre.get("split", True) and pre.get("replacement") == "▁":
        return {"always": "missing", "first": "first", "never": None}[pre.get("prepend_scheme", "always")]
    found = ", ".join(filter(None, [*kinds, (pre or {}).get("type")])) or "none"
    raise InputError(f"normalizer and pre-tokenizer ({found}) are not read; minilm reads byte-level BPE, and SentencePiece-type BPE with "
                     "Prepend + Replace or Metaspace")
