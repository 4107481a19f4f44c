"""Spontaneous multilingual learners on the published files: their defects, the label scorer by hand, prompts, a whole run, bad input."""

import json
from dataclasses import replace

import pytest
import torch

from methods.real import spontaneous_multilingual as real
from methods.real.spontaneous_multilingual import (WORDS, Config, measure, prompt_ids, question, read_tests, scorer_labels, token_set,
                                                   token_sets, translation_texts)
from minilm.claims import held
from minilm import InputError
from minilm.data import generator
from minilm.lora import load_adapter, lora_layers
from minilm.tokenizer import SentencePieceBPE, load_tokenizer, train_bpe
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained

REVIEWS = {"en": ("a lovely song", "a dull book"), "zh": ("一首好歌", "一本坏书"), "de": ("ein schönes Lied", "ein ödes Buch")}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def files(tmp_path):
    """A tiny byte-level checkpoint and published-looking emotion files: 10 questions in three languages, 40 translations."""
    folder = tmp_path / "ap_emotion"
    for language, reviews in REVIEWS.items():
        labels = WORDS[language]["emotion"]["labels"]
        write(folder / f"emotion_{language}500_test.json", [{"input": f"{reviews[i % 2]} {i}", "answer": labels[i % 2]} for i in range(10)])
    for language in ("zh", "de"):
        ask = f"\nTranslate the input from {WORDS[language]['name']} to English:\n"
        write(folder / f"emotion_{language}10k_question.json",
              [{"input": question("emotion", language, [f"{REVIEWS[language][i % 2]} {i}"]) + ask,
                "answer": question("emotion", "en", [f"{REVIEWS['en'][i % 2]} {i}"])} for i in range(40)])
    texts = [*(text for pair in REVIEWS.values() for text in pair), "positive negative"]
    tokenizer = train_bpe(texts * 2, 300, special=("</s>",), eos="</s>")
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                    num_attention_heads=2, max_position_embeddings=400, model_type="llama"), generator(0, "init"))
    save_pretrained(model, tmp_path / "base", tokenizer)
    return tmp_path


@pytest.fixture
def cfg(files):
    return Config(checkpoint=str(files / "base"), data=str(files), train_langs=("zh",), epochs=2, lr=1e-2, eval_every=2, device="cpu",
                  out=str(files / "out"), save=str(files / "adapters"))


# --- the published files

@pytest.mark.parametrize("language, score", [("ja", 2 / 3), ("bn", 2 / 3), ("no", 1 / 3), ("zh", 1), ("de", 1), ("sw", 1), ("bg", 1)])
def test_a_reader_who_knows_the_english_answer_gets_the_score_that_the_released_scorer_gives(shared, language, score, capsys):
    cfg = Config("unused", str(shared / "data/spontaneous"), "snli", eval_langs=(language,), num_shots=0)
    oracle, official = (read_tests(replace(cfg, gold=gold)).gold[language] for gold in ("english", "local"))
    assert len(oracle) == 600
    assert sum(a == b for a, b in zip(oracle, official)) / 600 == pytest.approx(score)
    warned = "contradict the English file" in capsys.readouterr().out
    assert warned == (score < 1)


@pytest.mark.parametrize("task, count", [("emotion", 500), ("paws", 500)])
def test_the_labels_of_the_other_tasks_are_consistent_in_every_language(shared, task, count, capsys):
    cfg = Config("unused", str(shared / "data/spontaneous"), task, num_shots=0)
    tests = read_tests(cfg)
    assert list(tests.rows) == ["en", "zh", "de", "bg", "sw"]
    assert all(gold == tests.gold["en"] and len(gold) == count and gold.count(0) == count / 2 for gold in tests.gold.values())
    assert read_tests(replace(cfg, gold="local")).gold == tests.gold
    assert "warning" not in capsys.readouterr().out


def test_a_translation_row_of_the_published_file_is_what_we_would_have_written(shared):
    cfg = Config("unused", str(shared / "data/spontaneous"), "snli", train_langs=("zh",))
    published = json.loads((shared / "data/spontaneous/snli/snli_zh10k_train_question.json").read_text())
    rows = translation_texts(cfg, "qt")
    assert len(rows) == 10_000
    assert rows == [(row["input"], row["answer"]) for row in published]
    english = json.loads((shared / "data/spontaneous/snli/snli_en10k_train.json").read_text())
    assert [a for _, a in rows] == [question("snli", "en", [row["premise"], row["hypothesis"]]) for row in english]
    assert sum("answer" not in row for row in english) == 15  # rows without a label: no translation needs one
    mono, shuffled = translation_texts(cfg, "mono"), translation_texts(cfg, "shuffled")
    assert mono[0] == (rows[0][1] + "\nTranslate the input from English to English:\n", rows[0][1])
    assert shuffled[0] == (rows[0][0], rows[1][1])
    assert sum(a == b for a, b in zip(shuffled, rows)) < 50  # (a premise is often told twice, a whole question seldom)


def test_the_whole_path_runs_on_the_published_tests_and_a_real_checkpoint(shared, tmp_path, capsys):
    results = real.main(Config(str(shared / "checkpoints/stories260K"), str(shared / "data/spontaneous"), "snli", arms=("base",), limit=4,
                               num_shots=1, train_langs=("zh",), analysis="lens", out=str(tmp_path), device="cpu"))
    row = results["metrics"]["base"]
    assert {name[4:] for name in row if name.startswith("acc ")} >= {*"en zh de ja bg no sw bn seen unseen all".split()}
    assert all(0 <= row[f"mass {language}"]["mean"] <= 1 for language in ("en", "zh", "bn"))
    assert len(results["series"]["base"]["lens zh"]["x"]) == 6
    assert all(held(c) is None and "0.26 million" in c["measured"] for c in results["claims"])
    assert "Answer: \"" in capsys.readouterr().out


# --- the label scorer

def sentencepiece(*pieces):
    """A tokenizer of Llama 2's kind with these pieces and no merges."""
    normalizers = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return SentencePieceBPE({
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True},
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
    })


def test_the_tokens_of_a_label_by_hand():
    # vocabulary of SentencePiece's kind: every prefix counts with and without the space mark, upper case and inner pieces do not
    tok = sentencepiece("p", "▁p", "pos", "▁positive", "Pos", "os", "▁", "positives", "<0xE7>", "<0x70>", "积")
    assert token_set(tok, "positive") == {0, 1, 2, 3}
    assert token_set(tok, "积极") == {8, 10}  # the first byte of a word that begins outside ASCII counts too


def test_byte_level_vocabularies_add_the_first_token_of_every_prefix(shared):
    tok = load_tokenizer(shared / "tokenizers/minimind")
    assert token_set(tok, "negative") == {tok.vocab[u] for u in ("n", "ne", "neg", "negative") if u in tok.vocab} | {
        tok.encode("negative"[:n])[0] for n in range(1, 9)}
    assert {tok.encode("积极")[0]} <= token_set(tok, "积极")


def test_a_byte_that_begins_two_labels_counts_for_neither_and_a_letter_that_does_is_refused(shared):
    words = WORDS["ru"]["emotion"]["labels"]  # п and о begin with the same byte, D0
    assert token_sets(sentencepiece("<0xD0>", "п", "▁от"), words) == [{1}, {2}]
    with pytest.raises(InputError, match="no token of the vocabulary begins the label 'позитивный' alone"):
        token_sets(load_tokenizer(shared / "checkpoints/stories260K"), words)
    with pytest.raises(InputError, match="medföring.*' ?m'.*--labels english"):
        token_sets(load_tokenizer(shared / "checkpoints/stories260K"), WORDS["sv"]["snli"]["labels"])


def test_english_labels_of_every_task_have_disjoint_tokens(shared):
    for folder in ("checkpoints/stories260K", "tokenizers/minimind"):
        tok = load_tokenizer(shared / folder)
        for task in ("emotion", "snli", "paws"):
            sets = token_sets(tok, WORDS["en"][task]["labels"])
            assert all(sets) and not set.intersection(*sets)


def test_the_winner_is_the_label_whose_first_tokens_have_most_probability_by_hand(files, cfg):
    model, tok = load_pretrained(cfg.checkpoint)
    tests = read_tests(replace(cfg, eval_langs=("de",)))
    prompts, _ = prompt_ids(cfg, tok, tests, "de", ["positive", "negative"], 400)
    p = torch.stack([model(torch.tensor([prompt])).logits[0, -1].softmax(-1) for prompt in prompts])  # one at a time, no padding
    masses = torch.stack([p[:, sorted(s)].sum(1) for s in token_sets(tok, ["positive", "negative"])], 1)
    metrics, _ = measure(cfg, model, tok, tests)
    assert metrics["acc de"] == pytest.approx((masses.argmax(1) == torch.tensor(tests.gold["de"])).float().mean().item())
    assert metrics["mass de"] == pytest.approx(masses.sum(1).mean().item(), rel=1e-4)


# --- prompts

def test_a_prompt_by_hand_and_shots_are_never_asked(files, cfg):
    tok, tests = load_tokenizer(files / "base"), read_tests(cfg)
    text = tok.decode(prompt_ids(cfg, tok, tests, "zh", ["positive", "negative"], 400)[0][0])
    assert text == '一首好歌 0\n情感: "positive"\n一本坏书 1\n情感: "negative"\n一首好歌 2\n情感: "'
    assert [row["input"][-1] for row in tests.rows["en"]] == list("23456789")
    assert question("snli", "zh", ["a", "b"]) == '前提: a\n假设: b\n答案: "'
    assert question("paws", "de", ["a", "b"]) == 'Satz 1: a\nSatz 2: b\nAntwort: "'


def test_a_common_beginning_of_the_labels_stands_in_the_prompt(files, cfg):
    tok, tests = load_tokenizer(files / "base"), read_tests(cfg)
    words = WORDS["th"]["emotion"]["labels"]
    text = tok.decode(prompt_ids(replace(cfg, num_shots=0), tok, tests._replace(shot_classes=[]), "en", words, 400, "เชิง")[0][0])
    assert text == 'a lovely song 2\nEmotion: "เชิง'
    assert token_sets(sentencepiece("เ", "บ", "ล", "ก"), words) == [{1}, {2}]


def test_a_long_review_is_cut_in_the_review_and_counted(files, cfg):
    tok, tests = load_tokenizer(files / "base"), read_tests(cfg)
    tests.rows["en"][0]["input"] = "word " * 500
    prompts, cut = prompt_ids(cfg, tok, tests, "en", ["positive", "negative"], 200)
    assert cut == 1 and 195 <= len(prompts[0]) <= 200
    assert tok.decode(prompts[0]).endswith('\nEmotion: "')
    with pytest.raises(InputError, match="lower --num-shots"):
        prompt_ids(cfg, tok, tests, "en", ["positive", "negative"], 20)


def test_chinese_as_the_target_combines_the_aligned_files(files, cfg):
    rows = translation_texts(replace(cfg, train_langs=("de", "en"), target="zh"), "qt")
    assert rows[0] == ('ein schönes Lied 0\nEmotion: "\nTranslate the input from German to Chinese:\n', '一首好歌 0\n情感: "')
    assert rows[40] == ('a lovely song 0\nEmotion: "\nTranslate the input from English to Chinese:\n', '一首好歌 0\n情感: "')


# --- the run

def test_every_arm_starts_from_the_checkpoint_and_only_the_adapter_learns(files, cfg, capsys):
    results = real.main(replace(cfg, arms=("base", "qt", "shuffled", "mono"), analysis="pca"))
    printed = capsys.readouterr().out
    assert "[a lovely song 0\nEmotion: \"]" in printed and all(f"\n{c['id']} " in printed for c in results["claims"])
    assert (files / "out/spontaneous_multilingual_real.png").stat().st_size > 5000
    losses = results["series"]["qt"]["validation loss"]["values"][0]
    assert losses[-1] < losses[0]
    assert -1 <= results["metrics"]["qt"]["partial r zh"]["mean"] <= 1
    model, _ = load_pretrained(files / "base")
    load_adapter(model, files / "adapters/qt-seed-0")
    assert {name.split(".")[-1] for name in lora_layers(model)} == {"q_proj", "v_proj"}
    alone = real.main(replace(cfg, arms=("qt",), out=str(files / "alone")))
    assert alone["metrics"]["qt"]["acc all"] == results["metrics"]["qt"]["acc all"]


def test_claims_hold_and_fail_on_made_up_numbers_and_a_small_model_decides_nothing():
    cell = lambda mean: {"mean": mean, "sd": 0.0, "values": [mean]}
    row = lambda en, seen, unseen, size=7000: {name: cell(v) for name, v in {"million parameters": size, "acc en": en, "acc seen": seen,
                                                                            "acc unseen": unseen}.items()}
    verdict = lambda table: [held(c) for c in real.claims(table)]
    assert verdict({"base": row(0.9, 0.6, 0.6), "qt": row(0.9, 0.7, 0.7)}) == [True, True, True]
    assert verdict({"base": row(0.9, 0.6, 0.6), "qt": row(0.8, 0.6, 0.7), "mono": row(0.9, 0.6, 0.7)}) == [False, False, False]
    assert verdict({"base": row(0.9, 0.6, 0.6, 0.3), "qt": row(0.9, 0.7, 0.7, 0.3)}) == [None, None, None]


# --- bad input

def lose_key(rows):
    del rows[3]["input"]
    return rows


@pytest.mark.parametrize("file, change, words", [
    ("emotion_zh500_test", lose_key, "emotion_zh500_test.json, row 3: no text under 'input'"),
    ("emotion_zh500_test", lambda rows: rows[:-1], "has 9 rows, the English file 10"),
    ("emotion_en500_test", lambda rows: [*rows[:-1], rows[-1] | {"answer": "meh"}], "row 9: label 'meh' is none of positive, negative"),
    ("emotion_zh500_test", lambda rows: {"rows": rows}, "must hold a JSON array"),
    ("emotion_en500_test", lambda rows: rows[::2], "emotion_zh500_test.json has 10 rows, the English file 5"),
    ("emotion_zh10k_question", lambda rows: [{**rows[0], "answer": rows[0]["answer"] + 'positive"'}, *rows[1:]], "row 0.*would leak"),
    ("emotion_zh10k_question", lambda rows: rows[:15], "only 15 of 15 rows fit")])
def test_a_file_that_cannot_be_used_is_named_in_one_line(files, cfg, file, change, words):
    path = files / "ap_emotion" / f"{file}.json"
    write(path, change(json.loads(path.read_text())))
    with pytest.raises(InputError, match=words) as error:
        real.main(cfg)
    assert "\n" not in str(error.value)
    assert not (files / "out").exists()


@pytest.mark.parametrize("change, words", [
    ({"train_langs": ("it",)}, "emotion_it10k_train_question.json"), ({"train_langs": ("en",)}, "--train-langs en"),
    ({"eval_langs": ("xx",)}, "--eval-langs xx"), ({"shots": "shots.json"}, "fewer than 2 examples for zh"),
    ({"shots": "empty.json"}, "fewer than 2 examples for en"), ({"num_shots": 3}, "--num-shots 3"),
    ({"layer": 7, "analysis": "pca"}, "--layer 7"), ({"data": "nowhere"}, "nowhere"), ({"checkpoint": "nowhere"}, "nowhere"),
    ({"epochs": 0}, "--epochs"), ({"arms": ()}, "--arms"), ({"eval_langs": ()}, "--eval-langs"),
    ({"train_task": "poetry"}, "--train-task poetry")])
def test_wrong_settings_are_refused(files, cfg, change, words):
    write(files / "empty.json", [])
    write(files / "shots.json", {"en": [{"input": "fine", "answer": "positive"}, {"input": "poor", "answer": "negative"}]})
    change = {k: str(files / v) if k == "shots" else v for k, v in change.items()}
    with pytest.raises((InputError, FileNotFoundError), match=words):
        real.main(replace(cfg, **change))
    assert not (files / "out").exists()


def test_three_labels_have_no_irrelevant_words(cfg):
    assert real.competing(replace(cfg, labels="irrelevant"), "zh") == ["ox", "horse"]
    assert real.competing(replace(cfg, labels="local"), "zh") == scorer_labels("emotion", "zh")
    with pytest.raises(InputError, match="snli has 3 labels"):
        real.competing(replace(cfg, task="snli", labels="irrelevant"), "zh")
