"""What a tokenizer.json says: each part is recognised by its type and ALL of its settings, or
refused by name. The format belongs to the Rust library `tokenizers`; a text goes this way:

    added tokens   whole tokens, looked for first: some in the text as it is, then, in what is left
                   and after the normalizer, those marked `normalized`
    normalizer     byte-level: NFC or none; SentencePiece-type: "▁" in front and for every space
    pre_tokenizer  cuts the text into pieces (byte-level), or does what that normalizer does
    model          BPE: merges, inside a piece
    decoder        the way back; the post_processor is only asked whether it puts BOS in front"""

import itertools
from typing import NamedTuple

import regex

from minilm import InputError
from minilm.bpe import PATTERN

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# "Individual digits, then GPT2": a space stays outside the digit after it, so a run of spaces
# before a digit is one piece.
DIGITS_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# How a tokenizer_config.json names tokens by their role.
NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
LISTS = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Settings(NamedTuple):
    """What a kind of tokenizer is told by the parts around its model."""

    pattern: str = ""  # byte-level: the regular expression that cuts the text
    prefix_space: bool = False  # byte-level: a space is put in front of a text that has none
    nfc: bool = False  # byte-level: Unicode's composed form first
    prepend: str | None = None  # SentencePiece: when a "▁" is put in front; see `_prepends`
    strip: bool = False  # SentencePiece: decoding drops one space at the start of a text
    byte_tokens: bool = False  # SentencePiece: "<0x41>" decodes to that byte


class Added(NamedTuple):
    """A token that is found in a text as a whole."""

    content: str
    id: int
    special: bool  # never made from a user's text
    lstrip: bool  # swallows the white space before it
    rstrip: bool  # ... and behind it
    normalized: bool  # looked for, in its own normalised form, in the normalised text


def exactly(part: dict, type: str, **settings) -> bool:
    """Is `part` of this type, with these settings and no others? (None: any value will do.)"""
    if part.get("type") != type or not part.keys() <= {"type", *settings}:
        return False
    return all(value is None or part.get(key) == value for key, value in settings.items())


def parts_of(part: dict | None, name: str) -> list[dict]:
    """A component as a list: itself, or a Sequence's members (its field `name`); or nothing."""
    if part is None:
        return []
    return list(part[name]) if part.get("type") == "Sequence" else [part]


def refuse(what: str, parts: list[dict], reads: str) -> InputError:
    found = " + ".join(str(part.get("type")) for part in parts) or "none"
    return InputError(f"the {what} {found} is not read with these settings; minilm reads {reads}")


# --- the model

def read_model(spec: dict) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """-> vocabulary {token: id}, merges [(left, right)], checked as the library checks them."""
    model = spec["model"] if isinstance(spec.get("model"), dict) else {}
    vocab = model.get("vocab")
    if model.get("type") != "BPE" or not isinstance(vocab, dict):
        raise InputError(f"tokenizer model {model.get('type')!r} is not read; minilm reads BPE "
                         "(byte-level, or SentencePiece-type)")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise InputError(f"a BPE with {key} {model[key]!r} is not read")
    for key in ("fuse_unk", "byte_fallback", "ignore_merges"):
        if type(model.get(key, False)) is not bool:
            raise InputError(f"{key} {model[key]!r} must be true or false")
    known = {"type", "vocab", "merges", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges",
             "continuing_subword_prefix", "end_of_word_suffix", "dropout"}
    if unknown := model.keys() - known:
        raise InputError(f"a BPE with the field {min(unknown)!r} is not read")
    owner = {}
    for token, i in vocab.items():
        if type(i) is not int or not 0 <= i < 2**32:
            raise InputError(f"the token {token!r} has the id {i!r}: a whole number is needed")
        if owner.setdefault(i, token) != token:
            raise InputError(f"the tokens {owner[i]!r} and {token!r} have the same id {i}")
    merges = []
    for entry in model.get("merges") or []:
        pair = tuple(entry.split(" ")) if isinstance(entry, str) else tuple(entry)
        if len(pair) != 2:
            raise InputError(f"the merge {entry!r} must join two tokens")
        for token in (*pair, "".join(pair)):
            if token not in vocab:
                raise InputError(f"the merge {entry!r} needs the token {token!r}, which the "
                                 "vocabulary lacks: the file is damaged")
        merges.append(pair)
    return vocab, merges


# --- added tokens

def named(config: dict) -> dict[str, str]:
    """{"eos_token": "</s>", ...}: the tokens that a tokenizer_config.json names by their role."""
    return {key: text for key in NAMES if (text := content(config.get(key), key)) is not None}


def content(token: str | dict | None, key: str = "token") -> str | None:
    """A token's text; files write it as such, or as {"content": text}."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise InputError(f"{key} {token!r} must be a text")
    return text


def read_added(spec: dict, config: dict, vocab: dict[str, int]) -> list[Added]:
    """The added tokens of the file. `special` are those flagged so, and those that the
    configuration names (EOS is EOS, though its flag may be forgotten)."""
    lists = [config.get(key) or [] for key in LISTS]
    members = [t for many in lists for t in (many.values() if isinstance(many, dict) else many)]
    roles = {*named(config).values(), *map(content, members)}
    decoder = {int(i): t for i, t in (config.get("added_tokens_decoder") or {}).items()}
    tokens = []
    behind = len(vocab)  # the id that the library gives to the next new token
    first = {}  # of a token that stands there twice, its first id
    for entry in spec.get("added_tokens") or []:
        text, i = entry["content"], entry["id"]
        if type(text) is not str or type(i) is not int or i < 0:
            raise InputError(f"the added token {text!r} with the id {i!r} is of a kind that is not "
                             "read: a text and a whole number are needed")
        other = decoder.pop(i, {})
        flags = {flag: entry.get(flag, False) for flag in FLAGS}
        flags["normalized"] = entry.get("normalized", not flags["special"])
        for flag, value in flags.items():
            if type(value) is not bool:
                raise InputError(f"added token {text!r}: {flag} {value!r} must be true or false")
        said = {"content": text, **flags}
        if any(other.get(key, said[key]) != said[key] for key in said if key != "special"):
            raise InputError(f"tokenizer_config.json and tokenizer.json differ in the added token "
                             f"{text!r} (id {i}): save the tokenizer again")
        if flags.pop("single_word"):
            raise InputError(f"the added token {text!r} is marked single_word, which is not read")
        flags["special"] |= bool(other.get("special")) or text in roles
        if not text:  # (the library passes over it)
            continue
        expected = first.setdefault(text, vocab.get(text, behind))
        if i != expected:
            raise InputError(f"the added token {text!r} has the id {i}, but the library gives it "
                             f"{expected}: save the tokenizer again")
        behind = max(behind, i + 1)
        tokens.append(Added(text, i, **flags))
    if decoder:
        text = next(iter(decoder.values()))["content"]
        raise InputError(f"tokenizer_config.json has an added token {text!r}, tokenizer.json has "
                         "not: save the tokenizer again")
    known = {t.content for t in tokens}
    for text in sorted(roles - known):  # a token of the plain vocabulary that has a role
        if text not in vocab:
            raise InputError(f"tokenizer_config.json names the token {text!r}, which "
                             "tokenizer.json lacks: add it there, or take the name out")
        tokens.append(Added(text, vocab[text], True, False, False, False))
    return tokens


def starts_with(spec: dict) -> str | None:
    """The special token that the file's own post-processor puts in front of every text."""
    for part in parts_of(spec.get("post_processor"), "processors"):
        if part.get("type") == "TemplateProcessing" and part.get("single"):
            front = part["single"][0]
            if "SpecialToken" in front:
                return front["SpecialToken"]["id"]
    return None


# --- byte-level

def byte_level(spec: dict) -> Settings:
    """GPT-2's kind. InputError for a part or a setting that is not read exactly."""
    normalizers = parts_of(spec.get("normalizer"), "normalizers")
    if normalizers and not (len(normalizers) == 1 and exactly(normalizers[0], "NFC")):
        raise refuse("normalizer", normalizers, "NFC or none before a byte-level BPE")
    decoders = parts_of(spec.get("decoder"), "decoders")
    any_ = {"add_prefix_space": None, "trim_offsets": None, "use_regex": None}
    if len(decoders) != 1 or not exactly(decoders[0], "ByteLevel", **any_):
        raise refuse("decoder", decoders, "ByteLevel behind a byte-level BPE")
    pattern, prefix_space = _pattern(parts_of(spec["pre_tokenizer"], "pretokenizers"))
    return Settings(pattern=pattern, prefix_space=prefix_space, nfc=bool(normalizers))


def _pattern(parts: list[dict]) -> tuple[str, bool]:
    """The regular expression that cuts the text, and whether a space is put in front of it."""
    *before, last = parts
    prefix = last.get("add_prefix_space", True)
    gpt2 = last.get("use_regex", True)
    known = exactly(last, "ByteLevel", add_prefix_space=None, trim_offsets=None, use_regex=None)
    if known and type(prefix) is bool and type(gpt2) is bool:
        if not before and gpt2:
            return GPT2, prefix
        if len(before) == 1 and gpt2 and not prefix:
            if exactly(before[0], "Digits", individual_digits=True):
                return DIGITS_GPT2, False
        if len(before) == 1 and not gpt2 and not prefix:
            split = before[0]
            if exactly(split, "Split", pattern=None, behavior="Isolated", invert=False):
                if split["pattern"].keys() == {"Regex"}:
                    return covering(split["pattern"]["Regex"]), False
    raise refuse("pre-tokenizer", parts, "ByteLevel, Split(Regex, Isolated) + ByteLevel and "
                 "Digits + ByteLevel")


# What three dialects (Python's, Rust's, Oniguruma's) read alike. Not: sets in sets, && and other
# operations on sets, ^ and $, and escapes beyond these.
SAFE = r"\\[pP]\{\^?\w+\}|\\[sSdDwWrnt]|\\[^\w\s]"
SET = rf"\[\^?(?:{SAFE}|(?!&&|\|\||--|~~)[^\[\]\\])+\]"
GROUP = r"\(\?(?:i?:|<?[=!]|>)|\((?!\?)|\{\d*,?\d*\}"
COMMON = regex.compile(rf"(?:{SAFE}|{SET}|{GROUP}|[^\\\[\]^${{}}(])*")


def covering(pattern: str) -> str:
    """A Split(Isolated) keeps the text between matches as pieces of their own. So does the pattern
    with one more alternative: the longest stretch in which no match begins."""
    if not COMMON.fullmatch(pattern):
        raise InputError(f"the regular expression {pattern!r} of the pre-tokenizer is not read: "
                         "dialects differ in its nested sets, anchors or escapes")
    if pattern not in (GPT2, DIGITS_GPT2, PATTERN):  # (which leave nothing out)
        pattern = rf"{pattern}|(?:(?!{pattern})[\s\S])+"
    letters = {*"aZ1 \n\t.'-é漢\u0301", *pattern}
    cut = regex.compile(pattern)
    for text in map("".join, itertools.product(letters, repeat=2)):
        pieces = [match[0] for match in cut.finditer(text)]  # (findall: of a group, if it has one)
        if "" in pieces or "".join(pieces) != text:
            raise InputError(f"the regular expression {pattern!r} of the pre-tokenizer has matches "
                             "without a character, which is not read")
    return pattern


# --- SentencePiece-type

def sentencepiece(spec: dict) -> Settings:
    """Llama 2's kind. InputError for a part or a setting that is not read exactly."""
    if spec["model"].get("ignore_merges"):
        raise InputError("ignore_merges is not read in a SentencePiece-type BPE")
    decoders = parts_of(spec.get("decoder"), "decoders")
    left = [part for part in decoders if part.get("type") != "ByteFallback"]
    back = {"pattern": {"String": "▁"}, "content": " "}
    one_space = {"content": " ", "start": 1, "stop": 0}
    fits = len(left) in (2, 3) and exactly(left[0], "Replace", **back) and exactly(left[1], "Fuse")
    fits = fits and (len(left) == 2 or exactly(left[2], "Strip", **one_space))
    byte_tokens = len(decoders) > len(left)
    if byte_tokens:  # between the two
        fits = fits and len(decoders) == len(left) + 1 and exactly(decoders[1], "ByteFallback")
    if not fits:
        raise refuse("decoder", decoders, "Replace + ByteFallback + Fuse (+ Strip) behind a "
                     "SentencePiece-type BPE")
    prepend = _prepends(parts_of(spec.get("normalizer"), "normalizers"), spec.get("pre_tokenizer"))
    return Settings(prepend=prepend, strip=len(left) == 3, byte_tokens=byte_tokens)


def _prepends(normalizers: list[dict], pre: dict | None) -> str | None:
    """When a "▁" is put in front of a text. By a normalizer: "always", or not at all (None). By
    Metaspace: where it is "missing", where it is missing and the text is not behind an added token
    ("first"), or "never"."""
    spaces = {"pattern": {"String": " "}, "content": "▁"}
    if normalizers and pre is None and exactly(normalizers[-1], "Replace", **spaces):
        if len(normalizers) == 1:
            return None
        if len(normalizers) == 2 and exactly(normalizers[0], "Prepend", prepend="▁"):
            return "always"
    if not normalizers and pre is not None:
        scheme = pre.get("prepend_scheme", "always")
        settings = {"prepend_scheme": None, "add_prefix_space": None, "replacement": "▁"}
        if exactly(pre, "Metaspace", split=False, **settings):
            agree = pre.get("add_prefix_space", scheme != "never") == (scheme != "never")
            if agree and scheme in ("always", "first", "never"):
                return "missing" if scheme == "always" else scheme
    raise refuse("normalizer and pre-tokenizer", [*normalizers, *([pre] if pre else [])],
                 "byte-level BPE, and SentencePiece-type BPE with Prepend + Replace or Metaspace")
