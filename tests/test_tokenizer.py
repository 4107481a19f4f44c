"""Tokenizers: our trainer by hand, and our readers against the `tokenizers` library on real files and random text."""

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
from minilm.tokenizer import ByteLevelBPE, CharLevel, SentencePieceBPE, load_tokenizer, train_bpe

END = "<|endoftext|>"
TEXTS = ["the cat sat on the mat\n", "    def f(x):\n        return x + 1234567\n", "der Bär läuft 12,5 km", "漢字かな交じり文",
         "ภาษาไทยกำลัง", "नमस्ते दुनिया", "🙂🏽‍🚀 emoji", "a\r\n\r\nb\t\t c  ", "it's we'll I'M  don't", "x" * 300, "", " ",
         "\u3000\u00a0\u2028", "e\u0301 vs é"]


def oracle(folder):
    """The `tokenizers` library on the same file, reading special tokens in a text as text (transformers: split_special_tokens=True)."""
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
    # words: "ab" 3 times, "abc" twice, "bc" twice -> a-b 5, b-c 4; after joining ab: ab-c 2, b-c 2 -> tie, (ab, c) sorts first; then (b, c)
    texts = ["ab\tab\tab\tabc\tabc\tbc\tbc"]
    assert learn_merges(texts, 9, pattern=r"[a-z]+") == [(b"a", b"b"), (b"ab", b"c"), (b"b", b"c")]


def test_incremental_counting_learns_the_same_merges_as_counting_everything_anew():
    rng = random.Random(0)
    texts = ["".join(rng.choice("aabbc ") for _ in range(600))]
    words = [[bytes([b]) for b in w.encode()] for w in texts[0].split()]
    expected, tokens = [], set()
    while len(expected) < 40:
        counts = Counter(pair for w in words for pair in zip(w, w[1:]) if pair[0] + pair[1] not in tokens)
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
    assert merge(list("aaab"), rank) == ["aa", "a", "b"]  # (aa)(a)b: the second pair has lost its first half
    assert merge(list("aab"), rank) == ["aab"]
    assert merge(list("abc"), rank) == ["a", "bc"]
    assert merge([], rank) == []


def test_every_text_comes_back_whole_and_training_is_deterministic(trained):
    tok = load_tokenizer(trained)
    assert all(tok.decode(tok.encode(text)) == text for text in TEXTS)
    assert train_bpe([t * 3 for t in TEXTS], 400, special=(END, "<|user|>"), eos=END).spec == tok.spec
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
        texts += (shared / f"data/gsm_questions/{language}-en/train.{language}").read_text(encoding="utf-8").splitlines()[:100]
    texts += ["".join(chr(rng.choice([rng.randrange(32, 0xD7FF), rng.randrange(0xE000, 0x10FFFF)])) for _ in range(rng.randrange(30)))
              for _ in range(1500)]
    for text in texts:
        agree(tok, theirs, text)


def byte_level_file(folder, pre_tokenizer, **changes):
    """A tokenizer.json over bytes with a few merges; `changes` overwrite parts of it."""
    tok = train_bpe(["the 2023 cats  and 45 dogs don't\n" * 9], 300)
    spec = json.loads(json.dumps(tok.spec)) | {"pre_tokenizer": pre_tokenizer} | changes
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder


GPT2_PRE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS_PRE = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2_PRE]}


@pytest.mark.parametrize("pre", [GPT2_PRE, GPT2_PRE | {"add_prefix_space": True}, DIGITS_PRE])
@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}])
def test_other_byte_level_layouts_are_read_exactly(tmp_path, pre, normalizer):
    folder = byte_level_file(tmp_path, pre, normalizer=normalizer)
    tok, theirs = load_tokenizer(folder), oracle(folder)
    rng = random.Random(1)
    for text in [*TEXTS, *("".join(rng.choice(" a1'st\n²Ⅷé,") for _ in range(12)) for _ in range(800))]:
        agree(tok, theirs, text)


@pytest.mark.parametrize("unk", [None, "<unk>"])
def test_a_vocabulary_that_lacks_single_bytes_drops_or_marks_them_as_the_library_does(tmp_path, unk):
    folder = byte_level_file(tmp_path, DIGITS_PRE)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for byte in (ord("q"), 0xC3, 0xE6):
        del spec["model"]["vocab"][BYTE_TO_CHAR[byte]]
    if unk:
        spec["model"]["vocab"][unk], spec["model"]["unk_token"] = 900, unk
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    tok, theirs, rng = load_tokenizer(folder), oracle(folder), random.Random(2)
    for text in [*TEXTS, *("".join(rng.choice(" theqé漢cats12") for _ in range(12)) for _ in range(300))]:
        assert tok.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("scheme", ["always", "never", "first"])
def test_a_metaspace_file_is_read_exactly(tmp_path, shared, scheme):
    spec = json.loads((shared / "checkpoints/stories260K/tokenizer.json").read_text(encoding="utf-8"))
    spec |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    tok, theirs = load_tokenizer(tmp_path), oracle(tmp_path)
    for text in [*TEXTS, "  two spaces", "▁mark", "Once upon a time"]:
        assert tok.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


# --- special tokens, characters, refusals

def test_special_tokens_in_a_text_stay_text(trained):
    tok = load_tokenizer(trained)
    forged = f"hello {END}"
    assert not set(tok.encode(forged)) & set(tok.special.values())
    assert tok.decode(tok.encode(forged)) == forged
    assert tok.encode_template(forged, mark="\ue000")[-1] == tok.eos_id
    assert tok.decode([*tok.encode("a"), tok.eos_id], skip_special=True) == "a"


def test_bos_is_added_on_request_and_known_from_the_folder(shared):
    tok = load_tokenizer(shared / "checkpoints/stories260K")
    assert tok.encode("Once", bos=True) == [tok.bos_id, *tok.encode("Once")]
    assert tok.add_bos


def test_a_character_tokenizer_round_trips_through_its_file_and_names_what_it_does_not_know(tmp_path):
    CharLevel.train("hello\n").save(tmp_path)
    tok = load_tokenizer(tmp_path)
    assert tok.encode("hole") == [tok.vocab[c] for c in "hole"]
    assert tok.decode(tok.encode("hello\n")) == "hello\n" == oracle(tmp_path).decode(tok.encode("hello\n"))
    with pytest.raises(InputError, match=r"character 'z' at position 2 is not among the 5 characters"):
        tok.encode("hez")


@pytest.mark.parametrize("change, words", [
    ({"model": {"type": "WordPiece", "vocab": {}}}, "'WordPiece' is not read"),
    ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase is not read"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, GPT2_PRE]}}, "Punctuation . ByteLevel"),
    ({"added_tokens": [{"id": 300, "content": "<x>", "single_word": True, "special": False}]}, "<x>.*single_word"),
])
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
