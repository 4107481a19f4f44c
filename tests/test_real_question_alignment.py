"""Question alignment on a user's files: reading them as they lie, the exact scorer, the whole run on a tiny checkpoint, bad input."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from methods.real import question_alignment as real
from methods.real.question_alignment import (Config, claims, encode, own_script, parse, read_pairs, read_responses, read_test,
                                             right)
from minilm.claims import held
from minilm import InputError
from minilm.data import generator
from minilm.results import ROOT
from minilm.tokenizer import train_bpe
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained

QUESTIONS = {"en": "Ann has {} eggs and finds {} more. How many?", "de": "Ann hat {} Eier und findet {} dazu. Wie viele?",
             "ru": "У Анны {} яиц, она находит ещё {}. Сколько?"}


def ask(language, n):
    return [QUESTIONS[language].format(i, i + 1) for i in range(1, n + 1)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny checkpoint, pairs in the two-file form and as JSON Lines, responses, and a test set."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = train_bpe([real.TEMPLATE, *ask("en", 60), *ask("de", 60)], 420, special=("<|endoftext|>",), eos="<|endoftext|>")
    for name, width in (("base", 32), ("small", 16)):
        model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=width, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=2, max_position_embeddings=320), generator(0, name))
        save_pretrained(model, folder / name, tokenizer)
    for language in ("de", "ru"):
        (folder / "pairs" / f"{language}-en").mkdir(parents=True)
        for side in (language, "en"):
            (folder / "pairs" / f"{language}-en" / f"train.{side}").write_text("\n".join(ask(side, 12)) + "\n", encoding="utf-8")
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({"lang": language, "src": q, "tgt": e}) for language in ("de", "ru")
                                                  for q, e in zip(ask(language, 12), ask("en", 12))), encoding="utf-8")
    (folder / "responses.jsonl").write_text("\n".join(json.dumps({"question": q, "answer": f"#### {2 * i + 1}"})
                                                      for i, q in enumerate(ask("en", 12), 1)), encoding="utf-8")
    (folder / "mgsm").mkdir()
    for language in QUESTIONS:
        (folder / "mgsm" / f"mgsm_{language}.tsv").write_text("".join(f"{q}\t{2 * i + 1}\n" for i, q in enumerate(ask(language, 5), 1)),
                                                              encoding="utf-8")
    return folder


@pytest.fixture
def cfg(files, tmp_path):
    return Config(checkpoint=str(files / "base"), stage1=str(files / "pairs"), stage2=str(files / "responses.jsonl"),
                  eval=str(files / "mgsm"), langs=("de", "ru"), epochs=1, batch=8, micro_batch=4, lr=1e-3, max_new_tokens=6,
                  save=str(tmp_path / "models"), workers=1,
                  out=str(tmp_path))


# --- the exact scorer

@pytest.mark.parametrize("text, number", [
    ("so 1,200 + 34 = 1,234 dollars", 1234.0), ("The answer is: -5", 5.0), ("#### 3.50", 3.5), ("no idea", None), ("", None),
    ("7. Then 8.", 8.0), ("in 2, 3 ways", 3.0), ("উত্তর ৪২", 42.0), ("คำตอบ ๑๒", 12.0), ("1,2,3", 3.0)])
def test_the_last_number_counts_without_its_sign_and_with_commas_between_digits_removed(text, number):
    assert parse("mgsm", text) == number


def test_an_answer_is_right_within_a_thousandth_and_none_is_wrong_even_when_gold_is_zero():
    assert right(3.0004, 3.0) and not right(3.01, 3.0) and not right(None, 0.0)
    assert right("B", "B") and not right("C", "B") and not right(None, "A")


@pytest.mark.parametrize("task, text, answer", [
    ("xcsqa", "I choose (B) because A is wrong", "B"), ("xcsqa", "BAD CAB", None), ("mgsm", "<<48/2=24>>24\n#### 24", 24.0),
    ("pot", "Let us see.\n<llm-code>\nx = 6\nprint(x / 4)\n</llm-code>\n<llm-code-output>9", 1.5),
    ("pot", "```python\nprint(2 - 9)\n```", 7), ("pot", "print(4)", 4), ("pot", "the answer is 4", None),
    ("pot", "<llm-code>import os\nprint(3)</llm-code>", None), ("msvamp", "8.0", 8.0)])
def test_each_task_parses_responses_in_its_way(task, text, answer):
    assert parse(task, text) == answer


def test_the_response_language_is_measured_for_languages_with_a_script_of_their_own():
    assert own_script("ответ 5 ok", "ru") is True and own_script("the answer", "ru") is False and own_script("答案是", "zh") is True
    assert own_script("5 + 3", "th") is False and own_script("die Antwort", "de") is None
    # kanji are Japanese beside kana: 7 of 9 letters here; without any kana they are Chinese, and a little kana in English is English
    assert own_script("合計金額は三千円です", "ja") is True and own_script("バターとパン", "ja") is True
    assert own_script("合計金額", "ja") is False and own_script("the answer is です", "ja") is False


# --- files

def test_the_two_file_form_and_json_lines_give_the_same_pairs(cfg, files):
    pairs = read_pairs(cfg)
    assert pairs == read_pairs(replace(cfg, stage1=str(files / "pairs.jsonl"))) and len(pairs) == 24
    assert pairs[0] == ("Translate the following sentences from German to English. " + ask("de", 1)[0], ask("en", 1)[0])
    assert [len(read_pairs(replace(cfg, limit=3))), len(read_pairs(replace(cfg, langs=("ru", "sw"))))] == [6, 12]


def test_responses_come_from_json_lines_or_a_list_under_any_of_the_published_names(cfg, tmp_path):
    expected = read_responses(cfg)
    assert expected[0] == (ask("en", 1)[0], "#### 3")
    for q, a in (("query", "response"), ("instruction", "output")):
        path = tmp_path / "list.json"
        path.write_text(json.dumps([{q: x, a: y, "other": 1} for x, y in expected]))
        assert read_responses(replace(cfg, stage2=str(path))) == expected


def test_each_published_test_format_is_read(cfg, tmp_path):
    assert read_test(cfg, "de")[1] == (ask("de", 2)[1], 5.0)
    put = lambda name, *rows: (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    put("test_de.jsonl", {"query": "in English", "m_query": "auf Deutsch", "response": "8.0"})
    there = replace(cfg, eval=str(tmp_path), task="msvamp")
    assert read_test(there, "de") == [("auf Deutsch", 8.0)] and read_test(replace(there, task="mgsm"), "de") == [("in English", 8.0)]
    lists = {"label": ["A", "B"], "text": ["tea", "sea"]}
    for choices in (lists, [{"label": "A", "text": "tea"}, {"label": "B", "text": "sea"}]):
        put("test_de.jsonl", {"id": 1, "lang": "de", "question": {"stem": "Wo?", "choices": choices}, "answerKey": "B"})
        assert read_test(replace(there, task="xcsqa"), "de") == [("Wo?\n(A) tea\n(B) sea", "B")]


def test_the_real_files_are_read_as_they_lie(shared, cfg):
    there = replace(cfg, stage1=str(shared / "data/gsm_questions"), stage2=str(shared / "data/gsm8k/train.jsonl"),
                    eval=str(shared / "data/mgsm"), langs=("de", "sw", "th", "zh"))
    pairs, responses = read_pairs(there), read_responses(there)
    assert len(pairs) == 7464 + 7469 + 7363 and pairs[0][0].startswith("Translate the following sentences from German to English. Natalia")
    assert len(responses) == 7473 and responses[0][1].endswith("#### 72") and parse("mgsm", responses[0][1]) == 72
    tests = {language: read_test(there, language) for language in ("en", "de", "sw", "th", "bn")}
    assert {len(items) for items in tests.values()} == {250}
    assert len({tuple(gold for _, gold in items) for items in tests.values()}) == 1 and min(gold for _, gold in tests["en"]) > 0


def test_prompts_are_the_published_template_and_end_where_the_response_begins(files):
    _, tokenizer = load_pretrained(files / "base")
    prompt, response = encode(tokenizer, "How many?", "Three.")
    assert tokenizer.decode(prompt) == ("Below is an instruction that describes a task. Write a response that appropriately completes the "
                                        "request.\n\n### Instruction:\nHow many?\n\n### Response:")
    assert tokenizer.decode(response[:-1]) == "Three." and response[-1] == tokenizer.eos_id
    assert tokenizer.eos_id not in encode(tokenizer, "a <|endoftext|> in the text", "and <|endoftext|>")[0]


# --- the run

def test_the_whole_run_trains_both_stages_saves_them_and_measures_every_language(cfg, files, capsys):
    results = real.main(cfg)
    printed = capsys.readouterr().out
    assert "German 12, Russian 12 pairs" in printed and "stage II: 12 examples; 0 dropped, 0 cut" in printed
    assert set(results["metrics"]) == {"untuned", "ralign", "qalign", "qalign->ralign"}
    assert {"en", "de", "ru", "non-en", "average", "agreement de", "alignment ru", "consistency ru"} <= set(results["metrics"]["ralign"])
    assert "en" not in results["metrics"]["qalign"] and "alignment de" in results["metrics"]["qalign"]
    assert (Path(cfg.out) / "question_alignment_real.png").stat().st_size > 10_000
    folders = files / "base", Path(cfg.save) / "qalign", Path(cfg.save) / "qalign-ralign"
    base, one, both = (load_pretrained(folder)[0] for folder in folders)
    assert not torch.equal(base.embed.weight, one.embed.weight) and not torch.equal(one.embed.weight, both.embed.weight)


def test_stage_2_on_stage_1s_folder_gives_the_model_of_the_run_in_one_go(cfg):
    real.main(cfg)
    models = Path(cfg.save)
    real.main(replace(cfg, stage="2", checkpoint=str(models / "qalign"), save=str(models / "later"), eval=None))
    a, b = (load_pretrained(folder)[0] for folder in (models / "qalign-ralign", models / "later" / "stage-II"))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_micro_batches_change_nothing_but_rounding_and_low_rank_training_saves_an_ordinary_checkpoint(cfg):
    for size, folder in ((4, "a"), (8, "b")):
        real.main(replace(cfg, stage="1", eval=None, micro_batch=size, save=cfg.save + folder))
    a, b = (load_pretrained(Path(cfg.save + folder) / "qalign")[0].state_dict() for folder in "ab")
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    real.main(replace(cfg, stage="1", eval=None, lora_rank=2))
    low = load_pretrained(Path(cfg.save) / "qalign")[0].state_dict()
    base = load_pretrained(cfg.checkpoint)[0].state_dict()
    changed = {name for name in base if not torch.equal(base[name], low[name])}
    assert low.keys() == base.keys() and changed and all("proj" in name for name in changed)


def test_a_model_proxy_tuned_by_itself_answers_as_the_expert_does(cfg):
    real.main(replace(cfg, epochs=4))
    expert = str(Path(cfg.save) / "qalign-ralign")
    results = real.main(replace(cfg, stage="proxy", expert=expert, anti=cfg.checkpoint))
    assert set(results["metrics"]) == {"untuned", "expert", "proxy 1"}
    same = lambda arm: {k: v["values"] for k, v in results["metrics"][arm].items() if "alignment" not in k}
    assert same("expert") == same("proxy 1")


def test_rows_whose_response_is_cut_away_are_dropped_and_counted(cfg, capsys):
    prompt = encode(load_pretrained(cfg.checkpoint)[1], ask("en", 12)[11])[0]
    real.main(replace(cfg, stage="2", eval=None, max_len=len(prompt) + 1))
    assert "12 examples; 0 dropped, 12 cut" in capsys.readouterr().out
    with pytest.raises(InputError, match="no response fits"):
        real.main(replace(cfg, stage="2", eval=None, max_len=20))


# --- mistakes

@pytest.mark.parametrize("change, words", [
    ({"eval_limit": 0}, "--eval-limit"), ({"eval_limit": -1}, "--eval-limit"), ({"limit": 0}, "--limit"), ({"langs": ()}, "--langs"),
    ({"micro_batch": 0}, "--micro-batch"),
    ({"langs": ("xx",)}, "--langs xx"), ({"langs": ("en",)}, "--langs en"), ({"stage1": None}, "needs --stage1"),
    ({"stage": "proxy"}, "needs --expert and"), ({"eval": None, "save": None}, "nothing would be kept"),
    ({"langs": ("sw",)}, "holds no pairs|needs one file for sw")])
def test_wrong_settings_are_refused_in_one_line(cfg, change, words):
    with pytest.raises((InputError, FileNotFoundError), match=words):
        real.main(replace(cfg, **change))
    assert not Path(cfg.save).exists()


@pytest.mark.parametrize("flag, name, content, words", [
    ("stage2", "r.jsonl", '{"query": "a", "response": ""}', "row 1: response or answer or output is missing or empty"),
    ("stage2", "r.jsonl", '{"query": "a", "response": "b"}\n{"response": "b"}', "row 2: query or question"),
    ("stage2", "r.jsonl", "plain text", "not JSON Lines"), ("stage2", "r.jsonl", "[1, 2]", "an object is needed"),
    ("stage1", "p.jsonl", '{"lang": "en", "src": "a", "tgt": "b"}', "lang 'en' must be one of"),
    ("stage1", "p.jsonl", '{"lang": "klingon", "src": "a", "tgt": "b"}', "'klingon'"),
    ("stage1", "p.jsonl", '{"lang": "de", "tgt": "b"}', "src is missing")])
def test_files_that_are_not_what_they_should_be_are_named_with_the_row(cfg, tmp_path, flag, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=words):
        real.main(replace(cfg, **{flag: str(tmp_path / name)}))


def test_half_a_pair_of_files_is_refused(cfg, tmp_path):
    (tmp_path / "de-en").mkdir()
    (tmp_path / "de-en" / "train.de").write_text("eins\nzwei\n")
    (tmp_path / "de-en" / "train.en").write_text("one\n")
    with pytest.raises(InputError, match="train.de has 2 lines, train.en 1"):
        real.main(replace(cfg, stage1=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        real.main(replace(cfg, stage1="nowhere"))


@pytest.mark.parametrize("content, words", [("a question without an answer", "line 1: one tab"), ("q\tten", "holds no number"),
                                            ("q\t1\nq\t1\t1", "line 2: one tab")])
def test_a_test_file_without_golds_is_refused_before_anything_is_trained(cfg, files, tmp_path, content, words):
    (tmp_path / "mgsm_en.tsv").write_text(content)
    with pytest.raises(InputError, match=words):
        real.main(replace(cfg, eval=str(tmp_path)))
    assert not Path(cfg.save).exists()


def test_a_question_longer_than_the_context_is_refused_and_so_is_another_vocabulary(cfg, files, tmp_path):
    (tmp_path / "test").mkdir()
    for language in QUESTIONS:
        (tmp_path / "test" / f"mgsm_{language}.tsv").write_text("how many? " * 100 + "\t3")
    with pytest.raises(InputError, match="more than the model reads .its max_position_embeddings is 320"):
        real.main(replace(cfg, eval=str(tmp_path / "test")))
    other = train_bpe([*ask("ru", 60)], 420, special=("<|endoftext|>",), eos="<|endoftext|>")
    save_pretrained(load_pretrained(files / "small")[0], tmp_path / "other", other)
    with pytest.raises(InputError, match="another vocabulary"):
        real.main(replace(cfg, stage="proxy", expert=str(tmp_path / "other"), anti=str(files / "small")))


def test_a_negative_alpha_is_warned_about(cfg, files, capsys):
    real.main(replace(cfg, stage="proxy", expert=str(files / "small"), anti=str(files / "small"), alpha=-1.0))
    assert "warning: --alpha -1.0" in capsys.readouterr().out


def test_claims_have_no_verdict_where_english_does_not_reason():
    cell = lambda x: {"mean": x, "sd": 0.0, "values": [x]}
    row = lambda en, other, alignment: {name: cell(x) for name, x in (("en", en), ("non-en", other), ("alignment non-en", alignment),
                                                                       ("agreement non-en", other))}
    verdicts = lambda *rows: {c["id"]: held(c) for c in claims(dict(zip(("ralign", "qalign", "qalign->ralign"), rows)))}
    assert verdicts(row(0.5, 0.2, 0.3), row(0, 0, 0.6), row(0.5, 0.4, 0.5)) == {"C1": True, "C2": True, "C7": True, "C8": True}
    assert verdicts(row(0.5, 0.4, 0.5), row(0, 0, 0.4), row(0.3, 0.3, 0.4)) == {"C1": False, "C2": False, "C7": False, "C8": False}
    assert set(verdicts(row(0.02, 0.0, 0.3), row(0, 0, 0.6), row(0.02, 0.1, 0.5)).values()) == {None}
    # the mean alignment rises, .3 to .6 and .5, but by one language alone
    per_language = lambda mean, de, zh: row(0.5, 0.2, mean) | {"alignment de": cell(de), "alignment zh": cell(zh)}
    assert verdicts(per_language(0.3, 0.3, 0.3), per_language(0.6, 0.25, 0.95), per_language(0.5, 0.28, 0.72))["C7"] is False
    assert verdicts(per_language(0.3, 0.3, 0.3), per_language(0.6, 0.35, 0.85), per_language(0.5, 0.31, 0.69))["C7"] is True


def test_the_committed_run_follows_from_its_numbers():
    path = ROOT / "results" / "question_alignment_real.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not committed yet")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert claims(results["metrics"]) == results["claims"] and real.figure(results).get_axes()
