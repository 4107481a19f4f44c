"""PreAlign on a user's files: the formats, what is read in which language, the dictionary found in aligned text, and every refusal."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from methods.real import prealign
from methods.real.prealign import Config, cut_words, deal, derive_dictionary, encode_entries, make_data, read_corpora, read_dictionary
from minilm.claims import held
from minilm import InputError
from minilm.data import generator
from minilm.tokenizer import train_bpe
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained

GERMAN = {"the": "die", "cat": "Katze", "dog": "Hündin", "sees": "sieht", "likes": "mag", "small": "kleine", "old": "alte", "tree": "Eiche"}


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """en.txt and de.txt, line-aligned; en.jsonl says the same as en.txt."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    pick = lambda *words: rng.choice(words)
    lines = [f"the {pick('small', 'old')} {pick('cat', 'dog')} {pick('sees', 'likes')} the tree" for _ in range(400)]
    Path("en.txt").write_text("\n".join(lines) + "\n")
    Path("de.txt").write_text("\n".join(" ".join(GERMAN[w] for w in line.split()) for line in lines) + "\n")
    Path("en.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    Path("dict.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in GERMAN.items()))


SMALL = Config(corpus=("en.txt", "de.txt"), dict=("dict.tsv",), vocab_size=320, quick=True, workers=1, batch=4, block=24, align_documents=2,
               seeds=(100,), device="cpu")


# --- files

@pytest.mark.parametrize("text, entries", [
    ("cat\tKatze\nold oak\talte Eiche\n", [["cat", "Katze"], ["old oak", "alte Eiche"]]),
    ("cat Katze\n\ndog Hund\n", [["cat", "Katze"], ["dog", "Hund"]]),
    ('{"src_text": "cat", "tgt_text": "Katze"}\n', [["cat", "Katze"]]),
    ('{"words": "bank $ Bank $ banque"}\n{"words": "bank $ Ufer"}\n', [["bank", "Bank", "banque", "Ufer"]]),
    ("bank\tBank\ncat\tKatze\nbank\tUfer\nbank\tBank\n", [["bank", "Bank", "Ufer"], ["cat", "Katze"]]),
    ('{"words": "bank $ Bank", "index": 1}\n{"words": "shore $ Ufer", "index": 1}\n', [["bank", "Bank", "shore", "Ufer"]])])
def test_all_three_dictionary_formats_are_read(text, entries):
    Path("d").write_text(text)
    assert read_dictionary("d") == entries
    assert read_dictionary("d", "d") == entries  # a second file adds to the groups of the first


def test_a_group_of_three_words_is_trained_on_whole_and_examined_by_its_first_translation(tmp_path):
    Path("groups.json").write_text("".join(f'{{"words": "{a} $ {b} $ {b}s"}}\n' for a, b in GERMAN.items()))
    cfg = replace(SMALL, dict=("groups.json",), dict_frac=0.6)
    data = make_data(cfg, 100)
    assert {len(entry) for entry in data.seen} == {3} and {len(entry) for part in data.exam["dictionary"] for entry in part} == {2}
    results = prealign.main(replace(cfg, out=str(tmp_path / "out")))
    assert 0 <= results["metrics"]["prealign"]["unseen dictionary"]["mean"] <= 1


def test_the_claims_fail_where_nothing_is_aligned_and_hold_where_unseen_words_are():
    row = lambda unseen: {"ppl en": 50, "ppl de": 90, "retrieval dictionary": 0.6, "unseen dictionary": unseen}
    table = lambda joint, prealign: {arm: {name: {"mean": v, "sd": 0.0, "values": [v]} for name, v in r.items()}
                                     for arm, r in (("joint", row(joint)), ("prealign", row(prealign)))}
    verdict = lambda *unseen: {c["id"]: held(c) for c in prealign.claims(table(*unseen))}["C7 dictionary"]
    assert verdict(0.05, 0.2) is True
    assert verdict(0.0, 0.0) is verdict(0.0, 0.09) is verdict(0.2, 0.3) is False


def test_json_lines_and_plain_text_say_the_same_and_weights_come_from_the_file_name():
    plain, json_lines = (read_corpora(replace(SMALL, corpus=(file, "de.txt:0.5"))) for file in ("en.txt", "en.jsonl"))
    assert plain == json_lines
    assert {name: weight for name, (_, weight) in plain.items()} == {"en": 1.0, "de": 0.5}


def test_aligned_lines_are_read_in_one_language_only_and_the_clone_takes_lines_of_its_own():
    cfg = replace(SMALL, aligned=True, clone=True, ratio=2)
    corpora = read_corpora(cfg)
    numbered = {name: ([f"{i}" for i in range(400)], weight) for name, (_, weight) in corpora.items()}
    numbered["clone"] = numbered["en"][0], numbered["clone"][1]
    dealt = deal(cfg, numbered)
    read = [set(lines) for lines in dealt["read"].values()]
    assert sum(map(len, read)) == len(set.union(*read))
    assert 150 < len(dealt["read"]["en"]) < 230  # weights 1 : 1/2 : 1/2 of about 380
    assert dealt["held"]["en"] == dealt["held"]["de"] == dealt["held"]["clone"]
    assert not set(dealt["held"]["en"]) & set.union(*read)
    apart = deal(replace(cfg, aligned=False), numbered)["read"]
    assert not set(apart["en"]) & set(apart["clone"])
    assert len(apart["de"]) == len(dealt["read"]["en"]) + len(dealt["read"]["de"]) + len(dealt["read"]["clone"])


def test_the_dictionary_of_aligned_text_by_hand():
    # "cat" and "Katze" stand in the same 6 lines: Dice 12/12; "the" and "die" in all 12; "dog"/"Hund" in 5: 10/11 with one line astray
    english = ["the cat"] * 6 + ["the dog"] * 6
    german = ["die Katze"] * 6 + ["die Hund"] * 5 + ["die"]
    assert derive_dictionary(english, german) == [["cat", "Katze"], ["dog", "Hund"], ["the", "die"]]
    assert derive_dictionary(english[4:], german[4:]) == [["dog", "Hund"], ["the", "die"]]  # two lines are too few for cat


def test_words_are_cut_where_a_token_begins_without_a_letter():
    tok = train_bpe(["the cats, the dogs. 12 cats"] * 5, 300)
    text = [tok.token_bytes(i).decode(errors="replace") for i in range(tok.vocab_size)]
    starts = lambda i: not text[i][0].isalpha()
    assert [tok.decode(w) for w in cut_words(tok.encode(" the dogs, cats."), starts)] == [" the", " dogs", ",", " cats", "."]


def test_an_entry_that_reads_the_same_on_both_sides_is_left_out():
    tok = train_bpe(["Paris cat"] * 3, 280)
    entries = encode_entries([["Paris", "Paris"], ["cat", "Katze"], ["cat", "cat", "Kater"]], lambda w: tok.encode(" " + w))
    assert [len(entry) for entry in entries] == [2, 2]


def test_every_word_of_the_source_is_in_the_clone_s_dictionary_and_special_tokens_are_shared():
    data = make_data(replace(SMALL, corpus=("en.txt",), dict=(), clone=True, dict_frac=1.0), 100)
    V = data.tokenizer.vocab_size
    assert data.coverage == 1.0
    assert all(target == tuple(i + V for i in source) for source, target in data.seen)
    end = data.tokenizer.eos_id
    assert all(i >= V or i == end for block in data.read["clone"] for i in block)
    assert end in data.read["clone"][0]


# --- the run

@pytest.mark.parametrize("change", [{}, {"clone": True, "aligned": True, "dict": ()}])
def test_a_run_leaves_results_and_a_checkpoint_per_arm(tmp_path, capsys, change):
    results = prealign.main(replace(SMALL, out=str(tmp_path / "out"), save=str(tmp_path / "out"), **change))
    printed = capsys.readouterr().out
    assert all(f"\n{c['id']}" in printed for c in results["claims"])
    assert "<-" in printed
    assert (tmp_path / "out/prealign_real_text.png").exists()
    model, tokenizer = load_pretrained(tmp_path / "out/prealign-seed-100")
    assert model.config.vocab_size == tokenizer.vocab_size * (2 if change else 1)


@pytest.mark.parametrize("tied", [False, True])
def test_an_existing_checkpoint_is_continued_and_its_vocabulary_doubled_for_a_clone(tmp_path, tied):
    tok = train_bpe([Path("en.txt").read_text()], 300, special=("</s>",), eos="</s>")
    config = ModelConfig(vocab_size=tok.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                         tie_word_embeddings=tied, model_type="llama")
    model = Transformer(config, generator(0, "init"))
    save_pretrained(model, tmp_path / "base", tok)
    cfg = replace(SMALL, corpus=("en.txt",), dict=(), clone=True, checkpoint=str(tmp_path / "base"))
    made = prealign.make_model(cfg, make_data(cfg, 100), 100)
    assert made.embed.weight.shape == made.lm_head.weight.shape == (2 * tok.vocab_size, 32)
    assert (made.lm_head.weight is made.embed.weight) == tied
    assert (made.embed.weight[: tok.vocab_size] == model.embed.weight).all()
    prealign.main(replace(cfg, methods=("prealign",), out=str(tmp_path / "out")))


# --- refusals

@pytest.mark.parametrize("change, words", [
    ({"rho": 1.0}, "--rho 1.0"), ({"rho": -0.1}, "--rho"), ({"dict_frac": 0.0}, "--dict-frac 0.0"), ({"ratio": 0.0}, "--ratio 0.0"),
    ({"corpus": ("en.txt",)}, "no second language"), ({"corpus": ("en.txt", "missing.txt")}, "missing.txt"),
    ({"corpus": ("en.txt", "empty.txt")}, "empty.txt is empty"), ({"corpus": ("en.txt", "en.txt")}, "two languages are called 'en'"),
    ({"corpus": ("en.txt", "bad.jsonl")}, "bad.jsonl, line 2"), ({"dict": ("half.tsv",)}, "half.tsv, line 1.*no translation"),
    ({"dict": ("bad.json",)}, "bad.json, line 1"), ({"dict": ("phrase.txt",)}, "phrase.txt, line 1: .* 4 words: put a tab"),
    ({"dict": ("same.tsv",)}, "dictionary is empty"), ({"dict": ()}, "dictionary is empty"),
    ({"corpus": ("en.txt", "short.txt"), "aligned": True}, "same number of lines, got en 400, short 1"),
    ({"checkpoint": "nowhere"}, "nowhere")])
def test_what_cannot_be_used_is_named_in_one_line(tmp_path, change, words):
    Path("empty.txt").write_text("\n")
    Path("short.txt").write_text("ein Satz\n")
    Path("bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    Path("half.tsv").write_text("cat\n")
    Path("phrase.txt").write_text("New York Nueva York\n")
    Path("bad.json").write_text('{"word": "cat"}\n')
    Path("same.tsv").write_text("Paris\tParis\n")
    with pytest.raises((InputError, FileNotFoundError), match=words) as error:
        prealign.main(replace(SMALL, out=str(tmp_path / "out"), **change))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_dictionary_that_covers_little_of_the_text_is_said_to(capsys):
    Path("rare.tsv").write_text("zebra\tZebra-Tier\n")
    assert make_data(replace(SMALL, dict=("rare.tsv",), dict_frac=1.0), 100).coverage == 0
    assert "warning: only 0% of the source text's words" in capsys.readouterr().out
