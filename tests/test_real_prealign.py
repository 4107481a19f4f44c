"""PreAlign on a user's files: the formats, what is read in which language, the dictionary found in
aligned text, a checkpoint that stays as good as it was, and every refusal."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from methods.prealign import cut_words, lm_loss
from methods.real import prealign
from methods.real.prealign import (
    Config,
    Words,
    choose_words,
    deal,
    derive_dictionary,
    encode_entries,
    extend_vocabulary,
    make_claims,
    make_corpus,
    make_model,
    read_corpora,
    read_data,
    read_dictionary,
    steps_of_stage1,
)
from minilm import InputError
from minilm.claims import HOLDS, NOT_TESTED, View, as_metrics, decide, false_tables, true_table
from minilm.data import generator
from minilm.evaluate import perplexity
from minilm.tokenizer import train_bpe
from minilm.training import make_optimizers, take_step
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained

GERMAN = {
    "the": "die",
    "cat": "Katze",
    "dog": "Hündin",
    "sees": "sieht",
    "likes": "mag",
    "small": "kleine",
    "old": "alte",
    "tree": "Eiche",
}


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """en.txt and de.txt, line-aligned; en.jsonl says the same as en.txt."""
    monkeypatch.chdir(tmp_path)
    read_data.cache_clear()
    rng = random.Random(0)
    lines = []
    for _ in range(400):
        adjective, noun = rng.choice(("small", "old")), rng.choice(("cat", "dog"))
        lines.append(f"the {adjective} {noun} {rng.choice(('sees', 'likes'))} the tree")
    german = [" ".join(GERMAN[word] for word in line.split()) for line in lines]
    Path("en.txt").write_text("\n".join(lines) + "\n")
    Path("de.txt").write_text("\n".join(german) + "\n")
    Path("en.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    Path("dict.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in GERMAN.items()))


SMALL = Config(
    corpus=("en.txt", "de.txt"),
    dict=("dict.tsv",),
    vocab_size=320,
    quick=True,
    workers=1,
    batch=4,
    block=24,
    align_documents=2,
    seeds=(100,),
    device="cpu",
)
CLONE = replace(SMALL, corpus=("en.txt",), dict=(), clone=True)


# --- files


@pytest.mark.parametrize(
    "text, entries",
    [
        ("cat\tKatze\nold oak\talte Eiche\n", [["cat", "Katze"], ["old oak", "alte Eiche"]]),
        ("cat Katze\n\ndog Hund\n", [["cat", "Katze"], ["dog", "Hund"]]),
        ('{"src_text": "cat", "tgt_text": "Katze"}\n', [["cat", "Katze"]]),
        (
            '{"words": "bank $ Bank $ banque"}\n{"words": "bank $ Ufer"}\n',
            [["bank", "Bank", "banque", "Ufer"]],
        ),
        (
            "bank\tBank\ncat\tKatze\nbank\tUfer\nbank\tBank\n",
            [["bank", "Bank", "Ufer"], ["cat", "Katze"]],
        ),
        (
            '{"words": "bank $ Bank", "index": 1}\n{"words": "shore $ Ufer", "index": 1}\n',
            [["bank", "Bank", "shore", "Ufer"]],
        ),
    ],
)
def test_all_three_dictionary_formats_are_read(text, entries):
    Path("d").write_text(text)
    assert read_dictionary("d") == entries
    assert read_dictionary("d", "d") == entries  # a second file adds to the groups of the first


def test_a_group_of_three_words_is_trained_on_whole_and_examined_by_its_first_translation(tmp_path):
    rows = [f'{{"words": "{a} $ {b} $ {b}s"}}\n' for a, b in GERMAN.items()]
    Path("groups.json").write_text("".join(rows))
    cfg = replace(SMALL, dict=("groups.json",), dict_frac=0.6)
    words = choose_words(cfg, read_data(cfg), 100)
    assert {len(entry) for entry in words.seen} == {3}
    assert {len(entry) for part in words.exam["dictionary"] for entry in part} == {2}
    results = prealign.main(replace(cfg, out=str(tmp_path / "out")))
    assert 0 <= results["metrics"]["prealign"]["unseen dictionary"]["mean"] <= 1


def test_json_lines_and_plain_text_say_the_same_and_weights_come_from_the_file_name():
    plain, json_lines = (
        read_corpora(replace(SMALL, corpus=(file, "de.txt:0.5"))) for file in ("en.txt", "en.jsonl")
    )
    assert plain == json_lines
    assert {name: corpus.weight for name, corpus in plain.items()} == {"en": 1.0, "de": 0.5}


def test_aligned_lines_are_read_in_one_language_only_and_the_clone_takes_lines_of_its_own():
    cfg = replace(SMALL, aligned=True, clone=True, ratio=2)
    numbers = [str(i) for i in range(400)]
    corpora = {name: c._replace(lines=numbers) for name, c in read_corpora(cfg).items()}
    dealt = deal(cfg, corpora)
    read = [set(lines) for lines in dealt["read"].values()]
    assert sum(map(len, read)) == len(set.union(*read))
    assert 150 < len(dealt["read"]["en"]) < 230  # weights 1 : 1/2 : 1/2 of about 380
    assert dealt["held"]["en"] == dealt["held"]["de"] == dealt["held"]["clone"]
    assert not set(dealt["held"]["en"]) & set.union(*read)
    apart = deal(replace(cfg, aligned=False), corpora)["read"]
    assert not set(apart["en"]) & set(apart["clone"])
    assert len(apart["de"]) == sum(map(len, read))  # German has lines of its own, and keeps all


def test_the_dictionary_of_aligned_text_by_hand():
    # "cat" and "Katze" stand in the same 6 lines: Dice 12/12; "the" and "die" in all 12;
    # "dog"/"Hund" in 5: 10/11 with one line astray
    english = ["the cat"] * 6 + ["the dog"] * 6
    german = ["die Katze"] * 6 + ["die Hund"] * 5 + ["die"]
    found = derive_dictionary(english, german)
    assert found == [["cat", "Katze"], ["dog", "Hund"], ["the", "die"]]
    # two lines are too few for cat
    assert derive_dictionary(english[4:], german[4:]) == [["dog", "Hund"], ["the", "die"]]


def test_words_are_cut_where_a_token_begins_without_a_letter():
    text = "the cats, the dogs. 12 cats"
    Path("words.txt").write_text(text + "\n" + f"{text}\n" * 60)
    cfg = replace(CLONE, corpus=("words.txt",), vocab_size=300)
    read = read_data(cfg)
    ids = read.tokenizer.encode(" " + text)
    words = [read.tokenizer.decode(word) for word in cut_words(ids, read.starts)]
    assert words == [" the", " cats", ",", " the", " dogs", ".", " ", "12", " cats"]
    cloned = [i + read.offset for i in ids]
    assert len(list(cut_words(cloned, read.starts))) == len(words)


def test_an_entry_that_reads_the_same_on_both_sides_is_left_out():
    tok = train_bpe(["Paris cat"] * 3, 280)
    entries = [["Paris", "Paris"], ["cat", "Katze"], ["cat", "cat", "Kater"]]
    encoded = encode_entries(entries, lambda word: tok.encode(" " + word))
    assert [len(entry) for entry in encoded] == [2, 2]


def test_every_word_of_the_source_is_in_the_clones_dictionary_and_special_tokens_are_shared():
    cfg = replace(CLONE, dict_frac=1.0)
    text = read_data(cfg)
    words = choose_words(cfg, text, 100)
    V, end = text.offset, text.tokenizer.eos_id
    assert words.coverage == 1.0
    assert all(target == tuple(i + V for i in source) for source, target in words.seen)
    clone = text.read["clone"]
    assert ((clone >= V) | (clone == end)).all() and (clone == end).any()
    assert clone.dtype == torch.int32  # 4 bytes a token
    documents = make_corpus(cfg, text, 100, 5)
    assert {d.is_source for step in documents for d in step} == {True, False}
    assert all(d.is_source == (min(d.ids) < V and max(d.ids) < V) for s in documents for d in s)


def test_the_files_are_read_once_for_the_example_and_all_seeds_of_a_process(monkeypatch, tmp_path):
    read = []
    plain = prealign.read_corpora
    monkeypatch.setattr(prealign, "read_corpora", lambda cfg: read.append(1) or plain(cfg))
    prealign.main(replace(SMALL, methods=("joint",), out=str(tmp_path / "out")))
    assert read == [1]


def test_arms_without_stage_1_read_as_many_tokens_more_as_it_reads():
    # entries of 5 and of 3 tokens: a pair has 4 on average
    words = Words([((1, 2, 3), (4, 5)), ((6,), (7, 8))] * 8, {}, 1.0)
    cfg = replace(CLONE, align_steps=30, pairs=12)  # stage 2 reads 4 x 24 tokens a step
    assert steps_of_stage1(cfg, words) == 30 * (12 * 4 + 2 * 24) / (4 * 24)
    assert steps_of_stage1(replace(cfg, align_lm="none"), words) == 30 * 12 * 4 / (4 * 24)
    assert steps_of_stage1(replace(cfg, pairs=100), words) == 30 * (16 * 4 + 2 * 24) / (4 * 24)


# --- a checkpoint


def trained(tied: bool, steps: int = 60):
    """A small model that knows the English of en.txt, its tokenizer, and held-out rows."""
    lines = Path("en.txt").read_text().splitlines()
    tok = train_bpe(lines, 300, special=("</s>",), eos="</s>")
    config = ModelConfig(
        vocab_size=tok.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        model_type="llama",
    )
    model = Transformer(config, generator(0, "init"))
    rows = [[tok.eos_id, *tok.encode(" " + line), tok.eos_id] for line in lines]
    length = min(map(len, rows))
    ids = torch.tensor([row[:length] for row in rows])
    optimizers = make_optimizers(model, "adamw", 1e-2)
    for step in range(steps):
        batch = ids[step * 4 % 300 :][:32]
        take_step(lm_loss(model, batch, batch), model, optimizers)
    return model, tok, rows[-50:]


@pytest.mark.parametrize("tied", [False, True])
def test_a_clone_added_to_a_trained_model_leaves_its_english_as_it_was(tied):
    model, _, held_out = trained(tied)
    before = perplexity(model, held_out)
    assert before < 3
    V = model.config.vocab_size
    old = model.embed.weight.detach().clone()
    extend_vocabulary(model, V, generator(0, "init"))
    assert model.embed.weight.shape == model.lm_head.weight.shape == (2 * V, 32)
    assert (model.lm_head.weight is model.embed.weight) == tied
    assert torch.equal(model.embed.weight[:V], old)
    assert perplexity(model, held_out) == pytest.approx(before, rel=0.05)
    assert len({tuple(row) for row in model.embed.weight[V:].tolist()}) == V  # no two are equal


@pytest.mark.parametrize("style", ["mean rows", "random rows"])
def test_a_clone_added_to_a_real_checkpoint_leaves_its_english_as_it_was(shared, style):
    model, tok = load_pretrained(shared / "checkpoints" / "stories260K")
    story = "Once upon a time, there was a little girl named Lily. She loved to play in the park."
    rows = [tok.encode(story, bos=True)]
    before, V = perplexity(model, rows), model.config.vocab_size
    extend_vocabulary(model, V, generator(0, "init"))
    if style == "mean rows":
        assert perplexity(model, rows) == pytest.approx(before, rel=0.05)
    else:  # what new rows like a fresh model's do: the tied head gives them the probability
        with torch.no_grad():
            noise = torch.randn(V, model.config.hidden_size, generator=generator(0, "noise"))
            model.embed.weight[V:] = noise * model.embed.weight[:V].std()
        assert perplexity(model, rows) > 1.5 * before


def test_an_existing_checkpoint_is_continued_with_rates_of_fine_tuning(tmp_path, monkeypatch):
    model, tok, held_out = trained(tied=True)
    save_pretrained(model, tmp_path / "base", tok)
    cfg = replace(CLONE, checkpoint=str(tmp_path / "base"), vocab_size=Config.vocab_size)
    rates = []
    for name in ("align", "pretrain"):
        plain = getattr(prealign, name)

        def spy(*given, plain=plain, **named):
            rates.append(named["lr"])
            return plain(*given, **named)

        monkeypatch.setattr(prealign, name, spy)
    methods = ("prealign",)
    run = replace(cfg, methods=methods, out=str(tmp_path / "out"), save=str(tmp_path / "kept"))
    prealign.main(run)
    assert rates == [1e-4, 5e-5]
    kept, _ = load_pretrained(tmp_path / "kept" / "prealign-seed-100")
    assert kept.config.vocab_size == 2 * tok.vocab_size
    assert perplexity(kept, held_out) < 1.1 * perplexity(model, held_out)
    rates.clear()
    fresh = replace(CLONE, methods=methods, out=str(tmp_path / "out"))
    prealign.main(fresh)
    prealign.main(replace(fresh, lr=3e-4, align_lr=2e-4))
    assert rates == [1e-3, 2e-3, 2e-4, 3e-4]


def test_a_checkpoint_with_more_rows_than_tokens_keeps_them_for_itself(tmp_path):
    model, tok, _ = trained(tied=False, steps=1)
    extend_vocabulary(model, 20, generator(0, "rows"))  # as checkpoints pad theirs
    save_pretrained(model, tmp_path / "base", tok)
    cfg = replace(CLONE, checkpoint=str(tmp_path / "base"))
    text = read_data(cfg)
    assert text.offset == tok.vocab_size + 20
    made = make_model(cfg, text, 100)
    assert made.config.vocab_size == 2 * text.offset > max(map(max, text.read["clone"].tolist()))


# --- the run


@pytest.mark.parametrize("change", [{}, {"clone": True, "aligned": True, "dict": ()}])
def test_a_run_leaves_results_and_a_checkpoint_per_arm(tmp_path, capsys, change):
    out = str(tmp_path / "out")
    results = prealign.main(replace(SMALL, out=out, save=out, **change))
    printed = capsys.readouterr().out
    assert all(f"\n{row['id']}" in printed for row in results["claims"])
    assert "<-" in printed and "NOT REPRODUCED" not in printed
    assert (tmp_path / "out/prealign_real_text.png").exists()
    model, tokenizer = load_pretrained(tmp_path / "out/prealign-seed-100")
    assert model.config.vocab_size == tokenizer.vocab_size * (2 if change else 1)


def test_retrieval_counts_right_nearest_translations(monkeypatch):
    # two words whose vectors are their translations' own: both found
    model, entries = None, [((5,), (7,)), ((6,), (8,))]
    vectors = {5: 0, 7: 0, 6: 1, 8: 1}

    def word_vectors(model, ids, mask):
        return F.one_hot(torch.tensor([[vectors[i] for i in ids[:, 0].tolist()]]), 2).float()

    monkeypatch.setattr("methods.prealign.word_vectors", word_vectors)
    assert prealign.find_translations(model, entries) == [1.0]
    assert prealign.find_translations(model, [((5,), (8,)), ((6,), (7,))]) == [0.0]


# --- claims

METRICS = ["ppl en", "ppl de", "ppl clone", "coverage"]
for _dictionary in ("dictionary", "clone"):
    METRICS += [f"stage 1 {_dictionary}", f"retrieval {_dictionary}", f"unseen {_dictionary}"]
CLAIMS = make_claims(METRICS)


@pytest.mark.parametrize("claim", CLAIMS, ids=[claim.id for claim in CLAIMS])
def test_a_claim_holds_on_a_true_table_and_fails_on_every_false_one(claim):
    table = true_table(claim)
    assert claim.rule(View(as_metrics(table))).verdict == HOLDS
    for name, false in false_tables(claim, table).items():
        assert claim.rule(View(as_metrics(false))).verdict not in (HOLDS, NOT_TESTED), name


def test_where_stage_1_did_not_align_a_dictionary_its_claims_are_not_tested():
    gated = {claim.id for claim in CLAIMS if claim.gate}
    assert {c.id for c in CLAIMS} - gated == {"C1 en"}
    for claim in CLAIMS:
        table = true_table(claim)
        for found, expected in ((0.95, HOLDS), (0.3, NOT_TESTED)):
            metrics = as_metrics(table)
            for dictionary in ("dictionary", "clone"):
                reached = {"mean": found, "sd": 0.0, "values": [found] * 4}
                metrics.setdefault("prealign", {})[f"stage 1 {dictionary}"] = reached
            verdict, measured = decide(claim, View(metrics))
            assert verdict == (expected if claim.gate else HOLDS)
            assert ("stage 1 aligned 0.30" in measured) == (verdict == NOT_TESTED)


# --- refusals


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rho": 1.0}, "--rho 1.0"),
        ({"rho": -0.1}, "--rho"),
        ({"dict_frac": 0.0}, "--dict-frac 0.0"),
        ({"ratio": 0.0}, "--ratio 0.0"),
        ({"batch": 0}, "--batch 0"),
        ({"block": 0}, "--block 0"),
        ({"tau": 0.0}, "--tau 0.0"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"align_documents": 0}, "--align-documents 0"),
        ({"pairs": 1}, "--pairs 1"),
        ({"width": 30}, "--width 30"),
        ({"seeds": ()}, "--seeds"),
        ({"methods": ()}, "--methods"),
        ({"corpus": (), "clone": True}, "--corpus"),
        ({"corpus": ("en.txt",)}, "no second language"),
        ({"corpus": ("en.txt", "missing.txt")}, "missing.txt"),
        ({"corpus": ("en.txt", "empty.txt")}, "empty.txt is empty"),
        ({"corpus": ("en.txt", "de.txt:0")}, "de.txt:0"),
        ({"corpus": ("en.txt", "en.txt")}, "two languages are called 'en'"),
        ({"corpus": ("en.txt", "bad.jsonl")}, "bad.jsonl, line 2"),
        ({"dict": ("half.tsv",)}, "half.tsv, line 1.*no translation"),
        ({"dict": ("bad.json",)}, "bad.json, line 1"),
        ({"dict": ("number.json",)}, "number.json, line 1"),
        ({"dict": ("phrase.txt",)}, "phrase.txt, line 1: .* 4 words: put a tab"),
        ({"dict": ("same.tsv",)}, "dictionary is empty"),
        ({"dict": ()}, "dictionary is empty"),
        (
            {"corpus": ("en.txt", "short.txt"), "aligned": True},
            "same number of lines, got en 400, short 1",
        ),
        ({"checkpoint": "nowhere", "vocab_size": Config.vocab_size}, "nowhere"),
        ({"checkpoint": "base"}, "--vocab-size 320 has no effect with --checkpoint"),
        (
            {"checkpoint": "base", "vocab_size": Config.vocab_size, "tokenizer": "larger"},
            "larger: the tokenizer has 301 tokens, the checkpoint base reads 285",
        ),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(tmp_path, change, words):
    Path("empty.txt").write_text("\n")
    Path("short.txt").write_text("ein Satz\n")
    Path("bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    Path("half.tsv").write_text("cat\n")
    Path("phrase.txt").write_text("New York Nueva York\n")
    Path("bad.json").write_text('{"word": "cat"}\n')
    Path("number.json").write_text('{"src_text": 1, "tgt_text": 2}\n')
    Path("same.tsv").write_text("Paris\tParis\n")
    if "checkpoint" in change and change["checkpoint"] == "base":
        model, tok, _ = trained(tied=False, steps=1)
        save_pretrained(model, "base", tok)
        words_ = ["zoo keeper banana orange apple lemon cherry melon grape plum"] * 9
        train_bpe(words_, 330, special=("</s>",), eos="</s>").save("larger")
    with pytest.raises((InputError, FileNotFoundError), match=words) as error:
        prealign.main(replace(SMALL, out=str(tmp_path / "out"), **change))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_dictionary_that_covers_little_of_the_text_is_said_to(tmp_path, capsys):
    Path("rare.tsv").write_text("zebra\tZebra-Tier\n")
    cfg = replace(SMALL, dict=("rare.tsv",), dict_frac=1.0)
    text = read_data(cfg)
    words = choose_words(cfg, text, 100)
    assert words.coverage == 0
    prealign.show_example(cfg, text, words)
    printed = capsys.readouterr().out
    assert "cover 0% of the source's running words" in printed and "warning" in printed
