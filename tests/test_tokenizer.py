"""Tokenizers: our trainer by hand, and our readers against the `tokenizers` library on real
files and random text."""

import json
import random
from collections import Counter

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm import InputError
from minilm.bpe import BYTE_TO_CHAR, learn_merges, merge, spell
from minilm.tokenizer import (
    ByteLevelBPE,
    CharLevel,
    SentencePieceBPE,
    extend_tokenizer,
    load_tokenizer,
    train_bpe,
)

END = "<|endoftext|>"
TEXTS = [
    "the cat sat on the mat\n",
    "    def f(x):\n        return x + 1234567\n",
    "der Bär läuft 12,5 km",
    "漢字かな交じり文",
    "ภาษาไทยกำลัง",
    "नमस्ते दुनिया",
    "🙂🏽‍🚀 emoji",
    "a\r\n\r\nb\t\t c  ",
    "it's we'll I'M  don't",
    "x" * 300,
    "",
    " ",
    "\u3000\u00a0\u2028",
    "e\u0301 vs é",
]


def oracle(folder):
    """The `tokenizers` library on the same file, reading special tokens in a text as text
    (transformers: split_special_tokens=True)."""
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    return theirs


def agree(ours, theirs, text):
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids, text
    assert not ids or ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([t * 3 for t in TEXTS], 400, special=(END, "<|user|>"), eos=END).save(folder)
    return folder


# --- training, by hand

def test_the_most_frequent_pair_is_joined_first_and_ties_go_to_the_pair_that_sorts_first():
    # words: "ab" 3 times, "abc" twice, "bc" twice -> a-b 5, b-c 4;
    # after joining ab: ab-c 2, b-c 2 -> tie, (ab, c) sorts first; then (b, c)
    texts = ["ab\tab\tab\tabc\tabc\tbc\tbc"]
    assert learn_merges(texts, 9, pattern=r"[a-z]+") == [(b"a", b"b"), (b"ab", b"c"), (b"b", b"c")]


def test_incremental_counting_learns_the_same_merges_as_counting_everything_anew():
    rng = random.Random(0)
    texts = ["".join(rng.choice("aabbc ") for _ in range(600))]
    words = [[bytes([b]) for b in w.encode()] for w in texts[0].split()]
    expected, tokens = [], set()
    while len(expected) < 40:
        counts = Counter(
            pair for w in words for pair in zip(w, w[1:]) if pair[0] + pair[1] not in tokens
        )
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < 2:
            break
        expected.append(best)
        tokens.add(best[0] + best[1])
        rank = {best: 0}
        words = [merge(w, rank) for w in words]
    assert learn_merges(texts, 40, pattern=r"[a-z]+") == expected


def test_merging_joins_the_lowest_rank_first_and_equal_pairs_from_the_left():
    rank = {("a", "a"): 0, ("aa", "b"): 1, ("b", "c"): 2}
    # (aa)(a)b: the second pair has lost its first half
    assert merge(list("aaab"), rank) == [
        "aa",
        "a",
        "b",
    ]
    assert merge(list("aab"), rank) == ["aab"]
    assert merge(list("abc"), rank) == ["a", "bc"]
    assert merge([], rank) == []


def test_the_heap_joins_as_the_plain_loop_does():
    rng = random.Random(0)
    for _ in range(300):
        tokens, rank = list("abc"), {}
        for _ in range(rng.randrange(1, 8)):
            pair = rng.choice(tokens), rng.choice(tokens)
            rank.setdefault(pair, len(rank))
            tokens.append("".join(pair))
        word = symbols = rng.choices("abc", k=rng.randrange(14))
        while True:  # the pair of lowest rank, the leftmost of several, one at a time
            found = [
                (rank[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:])) if pair in rank
            ]
            if not found:
                break
            _, i = min(found)
            symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]
        assert merge(word, rank) == symbols


def test_every_text_comes_back_whole_and_training_is_deterministic(trained):
    tok = load_tokenizer(trained)
    assert all(tok.decode(tok.encode(text)) == text for text in TEXTS)
    assert (
        train_bpe([t * 3 for t in TEXTS], 400, special=(END, "<|user|>"), eos=END).spec == tok.spec
    )
    assert tok.vocab_size == 400
    assert tok.special == {END: 398, "<|user|>": 399}
    assert (tok.bos_id, tok.eos_id) == (None, 398)


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(InputError, match="257 is too small"):
        train_bpe(["abc"], 257, special=("a", "b"))
    with pytest.raises(InputError, match="'</s>' must be among the special tokens"):
        train_bpe(["abc"], 300, eos="</s>")


# --- files, against the library

def test_our_own_file_means_the_same_to_the_tokenizers_library_and_to_transformers(trained):
    tok, theirs = load_tokenizer(trained), oracle(trained)
    for text in TEXTS:
        agree(tok, theirs, text)
    hf = transformers.AutoTokenizer.from_pretrained(trained)
    assert hf.eos_token_id == tok.eos_id
    assert hf.encode(TEXTS[1], add_special_tokens=False) == tok.encode(TEXTS[1])


@settings(max_examples=1500, deadline=None)
@given(st.text(max_size=60))
def test_random_text_gets_the_ids_of_the_tokenizers_library(trained, text):
    if "both" not in CACHE:
        CACHE["both"] = load_tokenizer(trained), oracle(trained)
    agree(*CACHE["both"], text)


CACHE = {}


@pytest.mark.parametrize("name, kind, size", [("checkpoints/stories260K", SentencePieceBPE, 512),
                                              ("tokenizers/minimind", ByteLevelBPE, 6400)])
def test_real_tokenizers_give_the_ids_of_the_tokenizers_library(shared, name, kind, size):
    tok, theirs, rng = load_tokenizer(shared / name), oracle(shared / name), random.Random(0)
    assert type(tok) is kind
    assert tok.vocab_size == size
    texts = [*TEXTS, *tok.added, "a<think>b</think> <|im_end|><s></s><0x41>"]
    for language in ("de", "ja", "ru", "sw", "zh"):
        texts += (
            (shared / f"data/gsm_questions/{language}-en/train.{language}")
            .read_text(encoding="utf-8")
            .splitlines()[:100]
        )
    texts += [
        "".join(
            chr(rng.choice([rng.randrange(32, 0xD7FF), rng.randrange(0xE000, 0x10FFFF)]))
            for _ in range(rng.randrange(30))
        )
        for _ in range(1500)
    ]
    for text in texts:
        agree(tok, theirs, text)


def byte_level_file(folder, pre_tokenizer, **changes):
    """A tokenizer.json over bytes with a few merges; `changes` overwrite parts of it."""
    tok = train_bpe(["the 2023 cats  and 45 dogs don't\n" * 9], 300)
    spec = json.loads(json.dumps(tok.spec)) | {"pre_tokenizer": pre_tokenizer} | changes
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder


GPT2_PRE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS_PRE = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2_PRE],
}


@pytest.mark.parametrize("pre", [GPT2_PRE, GPT2_PRE | {"add_prefix_space": True}, DIGITS_PRE])
@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}])
def test_other_byte_level_layouts_are_read_exactly(tmp_path, pre, normalizer):
    folder = byte_level_file(tmp_path, pre, normalizer=normalizer)
    tok, theirs = load_tokenizer(folder), oracle(folder)
    rng = random.Random(1)
    for text in [
        *TEXTS,
        *("".join(rng.choice(" a1'st\n²Ⅷé,") for _ in range(12)) for _ in range(800)),
    ]:
        agree(tok, theirs, text)


@pytest.mark.parametrize("unk", [None, "<unk>"])
def test_a_vocabulary_that_lacks_single_bytes_drops_or_marks_them_as_the_library_does(
    tmp_path, unk
):
    folder = byte_level_file(tmp_path, DIGITS_PRE)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for byte in (ord("q"), 0xC3, 0xE6):
        del spec["model"]["vocab"][BYTE_TO_CHAR[byte]]
    if unk:
        spec["model"]["vocab"][unk], spec["model"]["unk_token"] = 900, unk
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    tok, theirs, rng = load_tokenizer(folder), oracle(folder), random.Random(2)
    for text in [
        *TEXTS,
        *("".join(rng.choice(" theqé漢cats12") for _ in range(12)) for _ in range(300)),
    ]:
        assert tok.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("scheme", ["always", "never", "first"])
def test_a_metaspace_file_is_read_exactly(tmp_path, shared, scheme):
    spec = json.loads(
        (shared / "checkpoints/stories260K/tokenizer.json").read_text(encoding="utf-8")
    )
    spec |= {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": scheme,
            "split": False,
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    tok, theirs = load_tokenizer(tmp_path), oracle(tmp_path)
    for text in [*TEXTS, "  two spaces", "▁mark", "Once upon a time"]:
        assert tok.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


# --- another language

def test_an_extension_by_hand():
    # "ab" is token 256. New words: abc 3 times, abd twice: so (ab, c) is joined first, then
    # (ab, d); each stands for two old tokens
    old = train_bpe(["ab ab ab"], 257, pattern=r"[a-z]+")
    new, pieces = extend_tokenizer(old, ["abc abc abc abd abd"], 2, special=("<T>",))
    assert pieces == [[256, 99], [256, 100], []]
    assert (new.encode("abc"), new.encode("abd"), new.special, new.vocab_size) == (
        [257],
        [258],
        {"<T>": 259},
        260,
    )
    new, pieces = extend_tokenizer(old, ["abc abc abc abd abd"], 2, protect=["xabcx"])
    # (ab, c) would have changed "xabcx"
    assert (new.encode("abc"), new.encode("abd"), pieces) == (
        [256, 99],
        [257],
        [[256, 100]],
    )
    assert old.vocab_size == 257


def test_a_longer_new_token_stands_for_all_the_old_ones_inside_it():
    old = train_bpe(["ab ab ab"], 257, pattern=r"[a-z]+")
    new, pieces = extend_tokenizer(old, ["abcd " * 9], 50)
    assert new.encode("abcd") == [258]
    assert pieces == [[256, 99], [256, 99, 100]]


ENGLISH = [
    "the cat sat on the mat and the dog ran home",
    "she had 12 apples and gave some of them to her mother",
]
GERMAN = [
    "die Katze saß auf der Matte und der Hund lief nach Hause",
    "sie hatte 12 Äpfel und gab ihrer Mutter einige davon",
]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(" ".join(ENGLISH + GERMAN).split() + ["漢字", "123", "\n", "Ä"]),
        max_size=12,
    )
)
def test_an_extended_tokenizer_is_still_the_librarys_and_texts_of_protected_words_keep_their_ids(
    tmp_path_factory, words
):
    if "extended" not in CACHE:
        old = train_bpe(ENGLISH * 3, 330, special=(END,), eos=END)
        new, _ = extend_tokenizer(old, GERMAN * 3, 60, special=("<EN>", "<DE>"), protect=ENGLISH)
        new.save(folder := tmp_path_factory.mktemp("extended"))
        CACHE["extended"] = old, new, load_tokenizer(folder), oracle(folder)
    old, new, again, theirs = CACHE["extended"]
    text = " ".join(words)
    agree(again, theirs, text)
    assert new.encode(text) == again.encode(text)
    # (as they stand in ENGLISH: after a space)
    if set(words) <= set(" ".join(ENGLISH).split()) - {
        "the",
        "she",
    }:
        assert new.encode(" " + text) == old.encode(" " + text)
    for line in ENGLISH:
        assert new.encode(line) == old.encode(line)
    assert sum(len(new.encode(line)) for line in GERMAN) < 0.5 * sum(
        len(old.encode(line)) for line in GERMAN
    )


def test_the_tags_of_an_extended_tokenizer_are_one_token_each_and_text_cannot_forge_them(tmp_path):
    new, _ = extend_tokenizer(
        train_bpe(ENGLISH, 280, special=(END,), eos=END), GERMAN, 10, special=("<EN>", "<DE>")
    )
    new.save(tmp_path)
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (
        hf.encode("<DE>", add_special_tokens=False) == [new.special["<DE>"]] == [new.vocab_size - 1]
    )
    assert not set(new.encode("hello <DE>")) & set(new.special.values())
    assert new.eos_id == load_tokenizer(tmp_path).eos_id == hf.eos_token_id


@pytest.mark.parametrize(
    "name, language",
    [
        ("tokenizers/minimind", "de"),
        ("tokenizers/minimind", "ru"),
        ("checkpoints/stories260K", "de"),
        ("checkpoints/stories260K", "ja"),
    ],
)
def test_real_tokenizers_are_extended_and_english_keeps_every_id(shared, tmp_path, name, language):
    read = lambda end: (
        (shared / f"data/gsm_questions/{language}-en/train.{end}")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    foreign, english, old = read(language), read("en"), load_tokenizer(shared / name)
    new, pieces = extend_tokenizer(
        old, foreign[:400], 300, special=("<T>",), protect=english[:2000]
    )
    new.save(tmp_path)
    theirs, held_out = oracle(tmp_path), foreign[400:600]
    for text in [*TEXTS, *held_out, *english[:100]]:
        agree(new, theirs, text)
    assert all(new.encode(line) == old.encode(line) for line in english[:2000])
    before, after = ([i for line in held_out for i in tok.encode(line)] for tok in (old, new))
    assert len(after) < 0.85 * len(before)
    fresh = range(old.vocab_size, new.vocab_size - 1)
    assert len(pieces) == len(fresh) + 1 and len(set(after) & set(fresh)) > 0.7 * len(fresh)
    for i, ids in zip(fresh, pieces):
        assert b"".join(map(old.token_bytes, ids)) == new.token_bytes(i)


def test_what_cannot_be_extended_is_refused():
    old = train_bpe(ENGLISH, 280, special=(END,))
    with pytest.raises(InputError, match="a token '<.endoftext.>' already"):
        extend_tokenizer(old, GERMAN, 5, special=(END,))
    with pytest.raises(InputError, match="character-level"):
        extend_tokenizer(CharLevel.train("hello"), GERMAN, 5)


# --- special tokens, characters, refusals

def test_special_tokens_in_a_text_stay_text(trained):
    tok = load_tokenizer(trained)
    forged = f"hello {END}"
    assert not set(tok.encode(forged)) & set(tok.special.values())
    assert tok.decode(tok.encode(forged)) == forged
    assert tok.encode_template(forged, {})[-1] == tok.eos_id
    assert tok.decode([*tok.encode("a"), tok.eos_id], skip_special=True) == "a"


def test_bos_is_added_on_request_and_known_from_the_folder(shared):
    tok = load_tokenizer(shared / "checkpoints/stories260K")
    assert tok.encode("Once", bos=True) == [tok.bos_id, *tok.encode("Once")]
    assert tok.add_bos


def test_a_character_tokenizer_round_trips_through_its_file_and_names_what_it_does_not_know(
    tmp_path,
):
    CharLevel.train("hello\n").save(tmp_path)
    tok = load_tokenizer(tmp_path)
    assert tok.encode("hole") == [tok.vocab[c] for c in "hole"]
    assert (
        tok.decode(tok.encode("hello\n"))
        == "hello\n"
        == oracle(tmp_path).decode(tok.encode("hello\n"))
    )
    with pytest.raises(
        InputError, match=r"character 'z' at position 2 is not among the 5 characters"
    ):
        tok.encode("hez")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "'WordPiece' is not read"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase is not read"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Punctuation"}, GPT2_PRE],
                }
            },
            "Punctuation . ByteLevel",
        ),
        (
            {
                "added_tokens": [
                    {"id": 300, "content": "<x>", "single_word": True, "special": False}
                ]
            },
            "<x>.*single_word",
        ),
        (
            {"added_tokens": [{"id": "x", "content": "<x>"}]},
            "added token '<x>' with the id 'x' is of a kind that is not read",
        ),
        (
            {"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}},
            "token 'a' has the id 'x': a whole number",
        ),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}},
            r"the merge \['a'\] must join two tokens",
        ),
        *[
            (change, "tokenizer.json holds a value of a kind that is not read")
            for change in (
                {"added_tokens": 5},
                {"added_tokens": [{}]},
                {"normalizer": "NFC"},
                {"pre_tokenizer": "ByteLevel"},
            )
        ],
    ],
)
def test_kinds_that_are_not_read_exactly_are_refused_by_name(tmp_path, change, words):
    folder = byte_level_file(tmp_path, **{"pre_tokenizer": GPT2_PRE} | change)
    with pytest.raises(InputError, match=words) as error:
        load_tokenizer(folder)
    assert str(folder / "tokenizer.json") in str(error.value)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(InputError, match="not valid JSON"):
        load_tokenizer(tmp_path)


def test_the_printable_alphabet_is_a_bijection_on_the_256_bytes():
    assert len(set(BYTE_TO_CHAR.values())) == 256
    assert spell(" é".encode()) == "ĠÃ©"


# --- files of every setting, against the library

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = (
    LLAMA3,
    r"\d+",
    r"[a-z]+|\s+",
    r"\p{L}+",
    r" ?\w+",
    r"x(?!b)|\d{1,2}",
    r"[a-c[x-z]]+|[^a-c[x-z]]+",
    r"\h+",
    r"[a-z&&[^b]]+",
    r"\d*",
    "(?=b)",
    "^a",
)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
CONTENTS = (
    "<X>",
    "<X>y",
    "ab",
    "  ",
    "caf\u00e9",
    "cafe\u0301",
    "the",
    "\u00e9",
    " x",
    "\n",
    " ▁",
    "b<",
    "<0x41>",
    "",
)
BITS = (
    *CONTENTS[:6],
    " ",
    "x",
    "\n",
    "y",
    " ▁",
    "b<",
    "\u0301",
    "12",
    "123 it's",
    "qz",
    "漢",
    "🙂",
    "\t",
    "A",
    "\u00a0",
    "the cat",
    "<|end|>",
    "<s>",
)
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
BACK = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


def sequence(field, *parts):
    return {"type": "Sequence", field: [*parts]}


def byte_level_spec(rng):
    spec = json.loads(
        json.dumps(train_bpe(["the cats and caf\u00e9 123 it's ab qz xy\n" * 9], 300).spec)
    )
    bytes_ = {
        "type": "ByteLevel",
        "add_prefix_space": rng.random() < 0.1,
        "trim_offsets": True,
        "use_regex": rng.random() < 0.1,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": rng.choice(PATTERNS)},
        "behavior": rng.choice(["Isolated"] * 4 + ["Removed"]),
        "invert": rng.random() < 0.05,
    }
    spec["pre_tokenizer"] = rng.choice([GPT2_PRE, GPT2_PRE | {"add_prefix_space": True}, DIGITS_PRE,
                                        *[sequence("pretokenizers", split, bytes_)] * 5])
    nfc = {"type": "NFC"}
    spec["normalizer"] = rng.choice(
        [None, None, nfc, nfc, sequence("normalizers", nfc), {"type": "NFKC"}]
    )
    spec["decoder"] = rng.choice([bytes_] * 5 + [None, {"type": "Fuse"}])
    model = spec["model"]
    model["ignore_merges"] = rng.random() < 0.3
    damage = rng.random()
    if damage < 0.3:  # without these bytes: our own loop
        for c in "qz\u00c3":
            del model["vocab"][c]
        model["merges"] = [m for m in model["merges"] if not set("qz\u00c3") & set("".join(m))]
        model["vocab"] = {
            t: i for i, t in enumerate(t for t in model["vocab"] if not set("qz\u00c3") & set(t))
        }
        if rng.random() < 0.5:
            model["vocab"]["<unk>"] = len(model["vocab"])
            model["unk_token"], model["fuse_unk"] = "<unk>", rng.random() < 0.5
    elif damage < 0.4:
        model["merges"] = rng.choice([model["merges"][5:], model["merges"][::-1]])
    elif damage < 0.5:
        del model["vocab"]["".join(model["merges"][3])]  # the file is damaged
    return spec


def sentencepiece_spec(rng, original):
    spec = json.loads(json.dumps(original))
    if rng.random() < 0.6:
        spec["normalizer"] = rng.choice(
            [
                spec["normalizer"],
                spec["normalizer"],
                REPLACE,
                sequence("normalizers", REPLACE),
                sequence(
                    "normalizers",
                    {"type": "Prepend", "prepend": rng.choice("▁_")},
                    REPLACE
                    | {"pattern": rng.choice([{"String": " "}, {"Regex": " +"}, {"String": "\t"}])},
                ),
            ]
        )
    else:
        meta = {"type": "Metaspace", "replacement": rng.choice("▁▁▁_"), "split": rng.random() < 0.1,
                "prepend_scheme": rng.choice(["always", "first", "never"])}
        spec |= {
            "normalizer": None,
            "pre_tokenizer": meta | rng.choice([{}, {}, {"add_prefix_space": True}]),
        }
    spec["decoder"] = rng.choice(
        [
            *[spec["decoder"]] * 3,
            sequence("decoders", *BACK[:3]),
            sequence("decoders", BACK[0], *BACK[2:]),
            sequence("decoders", *BACK[:2]),
            BACK[2],
            None,
        ]
    )
    spec["model"] |= {
        "unk_token": rng.choice(["<unk>", "<unk>", None]),
        "byte_fallback": rng.random() < 0.7,
        "fuse_unk": rng.random() < 0.7,
        "ignore_merges": rng.random() < 0.05,
    }
    return spec


def with_added_tokens(rng, spec):
    i = 1 + max([*spec["model"]["vocab"].values(), *(t["id"] for t in spec["added_tokens"])])
    for content in rng.sample(CONTENTS, rng.randrange(6)):
        if content not in spec["model"]["vocab"]:
            flags = {
                flag: rng.random() < (0.02 if flag == "single_word" else 0.4) for flag in FLAGS
            }
            spec["added_tokens"].append({"id": i, "content": content} | flags)
            i += content != ""
    return spec


def test_a_byte_level_file_of_any_settings_gives_what_the_library_gives_or_is_refused(tmp_path):
    compare_files(byte_level_spec, tmp_path)


def test_a_sentencepiece_file_of_any_settings_gives_what_the_library_gives_or_is_refused(
    shared, tmp_path
):
    original = json.loads((shared / SP / "tokenizer.json").read_text(encoding="utf-8"))
    compare_files(lambda rng: sentencepiece_spec(rng, original), tmp_path)


def compare_files(make, tmp_path):
    read = 0
    for seed in range(200):
        rng = random.Random(seed)
        spec = with_added_tokens(rng, make(rng))
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
        try:
            tok = load_tokenizer(tmp_path)
        except InputError:
            continue
        theirs, read = oracle(tmp_path), read + 1  # what the library refuses, we refuse
        for _ in range(10):
            text = "".join(rng.choice(BITS) for _ in range(rng.randrange(8)))
            agree(tok, theirs, text)
            theirs.encode_special_tokens = False
            assert (
                tok.encode_template(text, {}) == theirs.encode(text, add_special_tokens=False).ids
            ), text
            theirs.encode_special_tokens = True
    assert read > 40


def changed(folder, shared, name, **changes):
    spec = json.loads((shared / name / "tokenizer.json").read_text(encoding="utf-8"))
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(spec.get(key), dict) and "type" not in value:
            spec[key] |= value
        else:
            spec[key] = spec[key] + value if key == "added_tokens" else value
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder


def extra(i, content, **flags):
    return {"id": i, "content": content} | dict.fromkeys(FLAGS, False) | flags


MM, SP = "tokenizers/minimind", "checkpoints/stories260K"


def test_no_character_between_two_matches_of_a_split_is_lost(shared, tmp_path):
    split = {"type": "Split", "pattern": {"Regex": r"\d+"}, "behavior": "Isolated", "invert": False}
    pre = sequence("pretokenizers", split, GPT2_PRE | {"use_regex": False})
    tok = load_tokenizer(changed(tmp_path, shared, MM, pre_tokenizer=pre))
    assert tok.encode("plain words only") == [992, 740, 3354, 2706]
    assert tok.encode("hello world 123 it's") == [6170, 1707, 256, 6318, 563, 628]


@pytest.mark.parametrize("pattern", [r"(\d)+|(cats|dogs)", r"(\w+|\s+)"])
def test_a_pattern_with_groups_cuts_where_it_cuts_without_them(pattern, tmp_path):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}
    pre = sequence("pretokenizers", split, GPT2_PRE | {"use_regex": False})
    folder = byte_level_file(tmp_path, pre)
    for text in ("the 2023 cats and dogs!", "12, 3", ""):
        agree(load_tokenizer(folder), oracle(folder), text)
    learned = train_bpe([TEXTS[0] * 9], 300, pattern=pattern)
    plain = train_bpe([TEXTS[0] * 9], 300, pattern=pattern.replace("(", "(?:"))
    assert learned.spec["model"] == plain.spec["model"]


def test_an_added_token_that_stands_there_twice_has_one_id(tmp_path):
    """The library gives the second entry the first one's id."""
    folder = byte_level_file(tmp_path, GPT2_PRE)
    first = load_tokenizer(folder).vocab_size
    twice = [extra(first, "<X>"), extra(first + 1, "<X>")]
    folder = byte_level_file(tmp_path, GPT2_PRE, added_tokens=twice)
    assert oracle(folder).token_to_id("<X>") == first
    with pytest.raises(InputError, match=f"'<X>' has the id {first + 1}, .* gives it {first}"):
        load_tokenizer(folder)


def test_added_tokens_are_looked_for_in_the_normalised_text_if_they_say_so(shared, tmp_path):
    tok = load_tokenizer(
        changed(tmp_path, shared, SP, added_tokens=[extra(512, "<X>", normalized=True)])
    )
    assert tok.encode("a <X> b") == [261, 512, 268]  # "▁<X>" is what is found
    assert tok.encode("a<X>b") == [261, 504, 478, 505, 430]
    cafe = extra(6400, "caf\u00e9", normalized=True)
    tok = load_tokenizer(
        changed(tmp_path, shared, MM, normalizer={"type": "NFC"}, added_tokens=[cafe])
    )
    assert tok.encode("cafe\u0301 x") == [6400, 1390]


def test_the_longest_of_several_added_tokens_is_found_and_an_empty_one_never(shared, tmp_path):
    tok = load_tokenizer(
        changed(
            tmp_path,
            shared,
            MM,
            added_tokens=[extra(6400, "<X"), extra(6401, "<X>y"), extra(6402, "")],
        )
    )
    assert tok.encode("<X>y<X>") == [6401, 6400, 65]
    assert tok.encode("ab") == [572]


def test_a_mark_is_put_before_the_first_piece_of_a_text_only(shared, tmp_path):
    pre = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    folder = changed(
        tmp_path, shared, SP, normalizer=None, pre_tokenizer=pre, added_tokens=[extra(512, "<X>")]
    )
    tok, theirs = load_tokenizer(folder), oracle(folder)
    ids = tok.encode("once<X>once")
    assert ids == theirs.encode("once<X>once", add_special_tokens=False).ids
    at = ids.index(512)
    assert ids[:at] != ids[at + 1 :] and ids[:at] == tok.encode("once")


def test_whole_words_are_looked_up_first_where_merges_are_ignored(tmp_path):
    # "abc" is a token that the merges (a b) alone never make
    spec = json.loads(json.dumps(train_bpe(["ab ab"], 257, pattern=r"[a-z]+").spec))
    spec["model"]["vocab"]["abc"] = 257
    for ignore, ids in ((True, [257]), (False, [256, 99])):
        spec["model"]["ignore_merges"] = ignore
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        assert load_tokenizer(tmp_path).encode("abc") == ids == oracle(tmp_path).encode("abc").ids


def test_bos_is_put_in_front_if_the_post_processor_does_so(shared, tmp_path):
    single = [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    front = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
        },
    }
    for processor, bos, said, add in (
        (front, "<|im_start|>", {}, True),
        (sequence("processors", front), "<|im_start|>", {}, True),
        (front, "<|im_end|>", {}, False),
        (None, "<|im_start|>", {}, False),
        (front, "<|im_start|>", {"add_bos_token": False}, False),
        (front, "<|im_start|>", {"add_bos_token": None}, True),
    ):
        changed(tmp_path, shared, MM, post_processor=processor)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos} | said))
        assert load_tokenizer(tmp_path).add_bos == add


@pytest.mark.parametrize(
    "config, others, words",
    [
        ({"eos_token": "<E>"}, {}, "names the token '<E>', which tokenizer.json lacks"),
        ({"pad_token": {"content": "<pad>"}}, {}, "names the token '<pad>', which"),
        (
            {},
            {"added_tokens.json": {"<N>": 6400}},
            "added_tokens.json gives '<N>' the id 6400, tokenizer.json None",
        ),
        (
            {"added_tokens_decoder": {"6400": {"content": "<N>"}}},
            {},
            "has an added token '<N>', tokenizer.json has not",
        ),
        (
            {"added_tokens_decoder": {"25": {"content": "<think>", "lstrip": True}}},
            {},
            "differ in the added token '<think>' .id 25.",
        ),
        ({"eos_token": 5}, {}, "eos_token 5 must be a text"),
    ],
)
def test_files_that_disagree_about_a_token_are_refused(config, others, words, shared, tmp_path):
    changed(tmp_path, shared, MM)
    for name, value in (others | {"tokenizer_config.json": config}).items():
        (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(InputError, match=words):
        load_tokenizer(tmp_path)


def test_a_token_that_a_configuration_names_is_special_wherever_it_is_named(shared, tmp_path):
    changed(tmp_path, shared, MM, added_tokens=[extra(6400, "<E>")])
    assert load_tokenizer(tmp_path).encode("a <E>")[-1] == 6400
    for name, value in (
        ("tokenizer_config.json", {"eos_token": "<E>"}),
        ("special_tokens_map.json", {"eos_token": {"content": "<E>"}}),
        ("config.json", {"eos_token_id": [6400, 2]}),
        ("generation_config.json", {"eos_token_id": 6400}),
    ):
        (tmp_path / name).write_text(json.dumps(value))
        tok = load_tokenizer(tmp_path)
        assert tok.eos_id == 6400 not in tok.encode("a <E>") and tok.special["<E>"] == 6400
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    # the map wins
    assert (
        load_tokenizer(tmp_path).eos_id
        == 0
        == transformers.AutoTokenizer.from_pretrained(tmp_path).eos_token_id
    )


@pytest.mark.parametrize("change, words", [
    (lambda m: m["vocab"].pop("Ġthe"), "needs the token 'Ġthe', which the vocabulary lacks"),
    (lambda m: m["vocab"].update({"he": 270.5}), "the token 'he' has the id 270.5"),
    (lambda m: m["vocab"].update({"he": -3}), "the token 'he' has the id -3"),
    (lambda m: m["vocab"].update({"he": m["vocab"]["Ġdog"]}), "have the same id"),
    (lambda m: m["merges"].append("t h e"), "the merge 't h e' must join two tokens"),
    (lambda m: m.update(fuse_unk="false"), "fuse_unk 'false' must be true or false"),
    (lambda m: m.update(new_field=1), "a BPE with the field 'new_field' is not read")])
def test_a_model_that_the_library_would_refuse_is_refused(change, words, tmp_path):
    spec = json.loads(json.dumps(train_bpe(["the dog he the dog he the dog"] * 5, 280).spec))
    assert "Ġthe" in spec["model"]["vocab"] and "Ġdog" in spec["model"]["vocab"]
    change(spec["model"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match=words):
        load_tokenizer(tmp_path)


def test_half_a_surrogate_pair_is_read_the_same_way_by_every_kind(shared, trained):
    for tok in (load_tokenizer(trained), load_tokenizer(shared / SP), load_tokenizer(shared / MM)):
        assert tok.encode("a\ud800b") == tok.encode("a\ufffdb")
        assert tok.encode("\ud83d\ude42") == tok.encode("🙂")
