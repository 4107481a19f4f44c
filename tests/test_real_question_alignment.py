"""Question alignment on a user's files: reading them as they lie, rows and scorer as published,
what the training loop does, one model in memory at a time, the whole run on a tiny checkpoint, bad
input."""

import gc
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from methods.real import question_alignment as real
from methods.real.question_alignment import (
    Config,
    Evaluated,
    claims,
    encode,
    encode_prompt,
    evaluate,
    leads,
    own_script,
    parse,
    read_pairs,
    read_responses,
    read_test,
    right,
    train,
)
from minilm import InputError
from minilm.claims import Cell, as_metrics
from minilm.data import IGNORE, generator
from minilm.results import ROOT
from minilm.tokenizer import train_bpe
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained

QUESTIONS = {
    "en": "Ann has {} eggs and finds {} more. How many?",
    "de": "Ann hat {} Eier und findet {} dazu. Wie viele?",
    "ru": "У Анны {} яиц, она находит ещё {}. Сколько?",
}


def ask(language, n):
    return [QUESTIONS[language].format(i, i + 1) for i in range(1, n + 1)]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two tiny checkpoints, pairs in the two-file form and as JSON Lines, responses, a test set."""
    folder = tmp_path_factory.mktemp("real")
    texts = [real.TEMPLATE, *ask("en", 60), *ask("de", 60)]
    tokenizer = train_bpe(texts, 420, special=("<|endoftext|>",), eos="<|endoftext|>")
    for name, width in (("base", 32), ("small", 16)):
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=width,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=320,
        )
        save_pretrained(Transformer(config, generator(0, name)), folder / name, tokenizer)
    rows = []
    for language in ("de", "ru"):
        for side in (language, "en"):
            write_lines(folder / "pairs" / f"{language}-en" / f"train.{side}", ask(side, 12))
        for q, e in zip(ask(language, 12), ask("en", 12)):
            rows.append(json.dumps({"lang": language, "src": q, "tgt": e}))
    write_lines(folder / "pairs.jsonl", rows)
    rows = [{"question": q, "answer": f"#### {2 * i + 1}"} for i, q in enumerate(ask("en", 12), 1)]
    write_lines(folder / "responses.jsonl", map(json.dumps, rows))
    for language in QUESTIONS:
        rows = [f"{q}\t{2 * i + 1}" for i, q in enumerate(ask(language, 5), 1)]
        write_lines(folder / "mgsm" / f"mgsm_{language}.tsv", rows)
    return folder


@pytest.fixture
def cfg(files, tmp_path):
    return Config(
        checkpoint=str(files / "base"),
        stage1=str(files / "pairs"),
        stage2=str(files / "responses.jsonl"),
        eval=str(files / "mgsm"),
        langs=("de", "ru"),
        epochs=1,
        batch=8,
        micro_batch=4,
        lr=1e-3,
        max_new_tokens=6,
        save=str(tmp_path / "models"),
        workers=1,
        out=str(tmp_path),
    )


# --- the exact scorer


@pytest.mark.parametrize(
    "text, number",
    [
        ("so 1,200 + 34 = 1,234 dollars", 1234.0),
        ("The answer is: -5", 5.0),
        ("#### 3.50", 3.5),
        ("no idea", None),
        ("", None),
        ("7. Then 8.", 8.0),
        ("in 2, 3 ways", 3.0),
        ("উত্তর ৪২", 42.0),
        ("คำตอบ ๑๒", 12.0),
        ("1,2,3", 3.0),  # the published pattern takes a comma with both of its digits
    ],
)
def test_the_last_number_counts_without_its_sign_and_with_thousands_commas_removed(text, number):
    assert parse("mgsm", text) == number


def test_an_answer_is_right_within_a_thousandth_and_none_is_wrong_even_when_gold_is_zero():
    assert right(3.0004, 3.0) and not right(3.01, 3.0) and not right(None, 0.0)
    assert right("B", "B") and not right("C", "B") and not right(None, "A")


@pytest.mark.parametrize(
    "task, text, answer",
    [
        ("xcsqa", "I choose (B) because A is wrong", "B"),
        ("xcsqa", "BAD CAB", None),
        ("mgsm", "<<48/2=24>>24\n#### 24", 24.0),
        ("pot", "Let us see.\n<llm-code>\nx = 6\nprint(x / 4)\n</llm-code>\n<out>9", 1.5),
        ("pot", "```python\nprint(2 - 9)\n```", 7),
        ("pot", "<llm-code>\nx = -3\nx += 1\nx\n</llm-code>", 2),
        ("pot", "print(4)", 4),
        ("pot", "the answer is 4", None),
        ("pot", "<llm-code>import os\nprint(3)</llm-code>", None),
        ("msvamp", "8.0", 8.0),
    ],
)
def test_each_task_parses_responses_in_its_way(task, text, answer):
    assert parse(task, text) == answer


def test_the_response_language_is_measured_for_languages_with_a_script_of_their_own():
    assert own_script("ответ 5 ok", "ru") is True and own_script("the answer", "ru") is False
    assert own_script("答案是", "zh") is True
    assert own_script("5 + 3", "th") is False and own_script("die Antwort", "de") is None
    # kanji are Japanese beside kana: 7 of 9 letters here; without any kana they are Chinese, and a
    # little kana in English is English
    assert own_script("合計金額は三千円です", "ja") is True
    assert own_script("バターとパン", "ja") is True
    assert own_script("合計金額", "ja") is False and own_script("the answer is です", "ja") is False


# --- files


def test_the_two_file_form_and_json_lines_give_the_same_pairs(cfg, files):
    pairs = read_pairs(cfg)
    lines = replace(cfg, stage1=str(files / "pairs.jsonl"))
    assert pairs == read_pairs(lines) and len(pairs) == 24
    instruction = "Translate the following sentences from German to English. "
    assert pairs[0] == (instruction + ask("de", 1)[0], ask("en", 1)[0])
    assert len(read_pairs(replace(cfg, limit=3))) == 6
    for source in (cfg, lines):  # --langs chooses in either form
        assert len(read_pairs(replace(source, langs=("ru", "sw")))) == 12


def test_responses_come_from_json_lines_or_a_list_under_any_of_the_published_names(cfg, tmp_path):
    expected = read_responses(cfg)
    assert expected[0] == (ask("en", 1)[0], "#### 3")
    for q, a in (("query", "response"), ("instruction", "output")):
        path = tmp_path / "list.json"
        path.write_text(json.dumps([{q: x, a: y, "other": 1} for x, y in expected]))
        assert read_responses(replace(cfg, stage2=str(path))) == expected


def test_each_published_test_format_is_read(cfg, tmp_path):
    assert read_test(cfg, "de")[1] == (ask("de", 2)[1], 5.0)
    file = tmp_path / "test_de.jsonl"
    row = {"query": "in English", "m_query": "auf Deutsch", "response": "8.0"}
    file.write_text(json.dumps(row))
    there = replace(cfg, eval=str(tmp_path), task="msvamp")
    assert read_test(there, "de") == [("auf Deutsch", 8.0)]
    assert read_test(replace(there, task="mgsm"), "de") == [("in English", 8.0)]
    lists = {"label": ["A", "B"], "text": ["tea", "sea"]}
    objects = [{"label": "A", "text": "tea"}, {"label": "B", "text": "sea"}]
    for choices in (lists, objects):
        row = {"id": 1, "question": {"stem": "Wo?", "choices": choices}, "answerKey": "B"}
        file.write_text(json.dumps(row))
        expected = [("Wo?\n(A) tea\n(B) sea", "B")]
        assert read_test(replace(there, task="xcsqa"), "de") == expected


def test_the_real_files_are_read_as_they_lie(shared, cfg):
    there = replace(
        cfg,
        stage1=str(shared / "data/gsm_questions"),
        stage2=str(shared / "data/gsm8k/train.jsonl"),
        eval=str(shared / "data/mgsm"),
        langs=("de", "sw", "th", "zh"),
    )
    pairs = read_pairs(there)
    assert len(pairs) == 7464 + 7469 + 7363
    assert pairs[0][0].startswith("Translate the following sentences from German to English. Nat")
    responses = read_responses(there)
    assert len(responses) == 7473 and parse("mgsm", responses[0][1]) == 72
    tests = [read_test(there, language) for language in ("en", "de", "sw", "th", "bn")]
    assert {len(items) for items in tests} == {250}
    golds = {tuple(gold for _, gold in items) for items in tests}
    assert len(golds) == 1 and min(golds.pop()) > 0


# --- rows as the published code makes them


def test_prompts_are_the_published_template_and_end_where_the_response_begins(files):
    _, tokenizer = load_pretrained(files / "base")
    prompt, response, prefix = encode(tokenizer, "How many?", "Three.")
    assert tokenizer.decode(prompt) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nHow many?\n\n### Response:"
    )
    assert prompt == encode_prompt(tokenizer, "How many?") and prefix
    assert tokenizer.decode(response[:-1]) == "Three." and response[-1] == tokenizer.eos_id
    row = encode(tokenizer, "a <|endoftext|> in the text", "and <|endoftext|>")
    assert (row.prompt + row.response).count(tokenizer.eos_id) == 1


def test_instruction_and_response_are_one_text_to_the_tokenizer(shared):
    """LLaMA-2's kind of tokenizer puts a blank before the start of every text: encoded by itself, a
    response would begin with another piece. `transformers` makes the row of the published code."""
    from transformers import AutoTokenizer

    folder = shared / "checkpoints" / "stories260K"
    theirs = AutoTokenizer.from_pretrained(folder)
    _, tokenizer = load_pretrained(folder)
    for answer in ("A robe takes 2 bolts.", "3 eggs", "\nSo it is 5."):
        row = encode(tokenizer, "How many?", answer)
        text = real.TEMPLATE.format(instruction="How many?")
        bos = [theirs.bos_token_id] if tokenizer.add_bos else []
        whole = bos + theirs.encode(text + answer, add_special_tokens=False)
        alone = bos + theirs.encode(text, add_special_tokens=False)
        assert row.prompt + row.response == [*whole, tokenizer.eos_id]
        assert len(row.prompt) == len(alone) and row.prefix
    assert tokenizer.encode("A robe")[0] != encode(tokenizer, "How many?", "A robe").response[0]


# --- the training loop


def recorded(monkeypatch, cfg, files, rows=12, **change):
    """What three steps hand to the loss and to the optimizer."""
    seen = {"labels": [], "ids": [], "factor": [], "norm": [], "optimizer": []}
    cfg = replace(cfg, **change)

    def note(name, original, pick):
        def call(*args, **named):
            seen[name].append(pick(*args, **named))
            return original(*args, **named)

        return call

    def norm(parameters, limit):
        grads = [p.grad.norm() for p in parameters]
        return torch.stack(grads).norm().item(), limit

    monkeypatch.setattr(
        real, "prompt_masked", note("ids", real.prompt_masked, lambda examples: examples)
    )
    monkeypatch.setattr(
        real,
        "linear_cross_entropy",
        note("labels", real.linear_cross_entropy, lambda h, w, labels, ignore: labels),
    )
    monkeypatch.setattr(real, "set_lr", note("factor", real.set_lr, lambda o, factor: factor))
    monkeypatch.setattr(
        real, "make_optimizers", note("optimizer", real.make_optimizers, lambda *a, **n: (a[2], n))
    )
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", note("norm", clip, norm))
    model, tokenizer = load_pretrained(files / "base")
    train(cfg, model, tokenizer, read_responses(cfg)[:rows], "stage II", 0)
    return seen, tokenizer


def test_each_step_learns_responses_only_with_the_published_optimizer(monkeypatch, cfg, files):
    seen, tokenizer = recorded(monkeypatch, cfg, files, epochs=2)
    assert seen["optimizer"] == [(1e-3, {"weight_decay": 0.0})]
    assert len(seen["factor"]) == 3  # 2 epochs of 12 rows, 8 a step
    assert seen["factor"][0] == 1.0 and seen["factor"][-1] == pytest.approx(0.0)
    assert len(seen["norm"]) == 3 and {limit for _, limit in seen["norm"]} == {1.0}
    sizes = [len(rows) for rows in seen["ids"]]
    assert sizes == [4, 4, 4, 4, 4]  # micro-batches of steps of 8, 4 and 8 rows
    for rows, labels in zip(seen["ids"], seen["labels"]):
        for (prompt, response), row in zip(rows, labels.tolist()):
            kept = [i for i in row if i != IGNORE]
            assert kept == response and response[-1] == tokenizer.eos_id
            assert row[: len(prompt) - 1] == [IGNORE] * (len(prompt) - 1)


def test_the_rate_warms_up_over_three_percent_of_the_steps(monkeypatch, cfg, files):
    seen, _ = recorded(monkeypatch, cfg, files, rows=2, epochs=70, batch=2, micro_batch=2)
    assert len(seen["factor"]) == 70  # of which two warm up
    assert seen["factor"][:3] == pytest.approx([1 / 3, 2 / 3, 1.0], abs=1e-3)


def test_a_batchs_loss_is_the_mean_over_its_response_tokens_whatever_the_micro_batch(cfg, files):
    states = []
    for micro in (1, 8):
        model, tokenizer = load_pretrained(files / "base")
        rows = read_responses(cfg)[:8]
        train(replace(cfg, micro_batch=micro), model, tokenizer, rows, "stage II", 0)
        states.append(model.state_dict())
    for name, w in states[0].items():
        torch.testing.assert_close(w, states[1][name], atol=1e-4, rtol=0)


def test_rows_whose_response_is_cut_away_are_dropped_and_counted(cfg, capsys):
    prompt = encode_prompt(load_pretrained(cfg.checkpoint)[1], ask("en", 12)[11])
    real.main(replace(cfg, stage="2", eval=None, max_len=len(prompt) + 1))
    assert "12 examples; 0 dropped, 12 cut" in capsys.readouterr().out
    with pytest.raises(InputError, match="no response fits"):
        real.main(replace(cfg, stage="2", eval=None, max_len=20))


# --- measures


def test_special_tokens_are_no_text_and_what_is_cut_is_counted(cfg, files, monkeypatch, capsys):
    model, tokenizer = load_pretrained(files / "base")
    end = tokenizer.eos_id
    ends = {"en": [end], "de": tokenizer.encode("7"), "ru": [*tokenizer.encode("3"), end]}
    tests = {language: read_test(cfg, language) for language in ("en", "de", "ru")}
    said = iter(ends.values())

    def fake(model, prompts, longest, eos_id):
        answer = next(said)
        return [[*prompt, *answer] for prompt in prompts]

    monkeypatch.setattr(real, "generate", fake)
    texts = []
    monkeypatch.setattr(real, "parse", lambda task, text: texts.append(text) or parse(task, text))
    found = evaluate(cfg, model, tokenizer, tests).metrics
    assert set(texts) == {"", "7", "3"}
    assert [found["cut", x] for x in ("en", "de", "ru")] == [0.0, 1.0, 0.0]
    assert "German: 5 of 5 responses were cut" in capsys.readouterr().out
    assert found["acc", "ru"] == 0.2 and found["acc", "de"] == 0.2  # golds 3, 5, 7, 9, 11
    assert found["average"] == pytest.approx((0.0 + 0.2 + 0.2) / 3)
    assert found["agreement", "ru"] == 0.0  # English says nothing


def test_two_that_say_nothing_do_not_agree_and_alignment_is_the_middle_layers(cfg, files):
    model, tokenizer = load_pretrained(files / "base")
    tests = {language: read_test(cfg, language) for language in ("en", "de")}
    cfg = replace(cfg, max_new_tokens=1, micro_batch=2)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # greedy: always id 0, which is no digit
    found = evaluate(cfg, model.eval(), tokenizer, tests)
    assert found.metrics["answered", "de"] == found.metrics["agreement", "de"] == 0.0
    layers, scores = found.series["alignment", "de"]
    assert len(layers) == 4 and found.metrics["alignment", "de"] == scores[1]
    assert found.metrics["alignment", "de"] != pytest.approx(scores[-1])
    prompts = [encode_prompt(tokenizer, question) for question, _ in tests["de"]]
    vectors = real.question_vectors(cfg, model, prompts)
    ids = torch.tensor([prompts[0]])
    alone = [h[0].mean(0) for h in model(ids, output_hidden_states=True).hidden_states]
    torch.testing.assert_close(vectors[:, 0], torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_a_lead_counts_a_problem_once_with_the_mean_of_its_languages():
    ours = {"en": [True] * 4, "de": [True, True, False, False], "ru": [True, False, True, False]}
    none = {language: [False] * 4 for language in ours}
    agrees = {language: row for language, row in ours.items() if language != "en"}
    same = {"de": none["de"], "ru": none["ru"]}
    found = leads(Evaluated({}, {}, ours, agrees), Evaluated({}, {}, none, same))
    assert found["lead", "acc", "non-en", ""] == 0.5 and found["problems"] == 4
    assert 0 <= found["lead", "acc", "non-en", "low"] < 0.5
    assert found["lead", "acc", "en", "low"] == found["lead", "acc", "en", "high"] == 1.0
    assert found["lead", "agreement", "non-en", ""] == 0.5


# --- the run


def test_the_whole_run_trains_both_stages_saves_them_and_measures_every_language(
    cfg, files, capsys
):
    results = real.main(cfg)
    printed = capsys.readouterr().out
    assert "German 12, Russian 12 pairs" in printed
    assert "stage II: 12 examples; 0 dropped, 0 cut" in printed and "peak memory" in printed
    assert set(results["metrics"]) == {"untuned", "ralign", "qalign", "qalign->ralign"}
    row = results["metrics"]["ralign"]
    measured = {"acc en", "acc de", "acc non-en", "average", "agreement de", "alignment ru"}
    assert measured | {"consistency ru", "cut en"} <= set(row)
    assert "acc en" not in results["metrics"]["qalign"]
    assert "alignment de" in results["metrics"]["qalign"]
    assert {claim["verdict"] for claim in results["claims"]} <= {"undecided", "not tested"}
    assert (Path(cfg.out) / "question_alignment_real.png").stat().st_size > 10_000
    folders = files / "base", Path(cfg.save) / "qalign", Path(cfg.save) / "qalign-ralign"
    base, one, both = (load_pretrained(folder)[0] for folder in folders)
    assert not torch.equal(base.embed.weight, one.embed.weight)
    assert not torch.equal(one.embed.weight, both.embed.weight)


def test_never_two_models_are_in_memory(cfg, monkeypatch):
    alive = []

    def counted(cfg, model, *rest, **named):
        gc.collect()
        alive.append(sum(isinstance(x, Transformer) for x in gc.get_objects()))
        return Evaluated({}, {}, {}, {})

    def loaded(folder, device):
        gc.collect()
        alive.append(1 + sum(isinstance(x, Transformer) for x in gc.get_objects()))
        return load_pretrained(folder, device=device)

    gc.collect()
    before = sum(isinstance(x, Transformer) for x in gc.get_objects())
    monkeypatch.setattr(real, "evaluate", counted)
    monkeypatch.setattr(real, "load_pretrained", loaded)
    monkeypatch.setattr(real, "leads", lambda ours, theirs: {})
    real.run(replace(cfg, save=None), 0)
    assert [n - before for n in alive] == [1] * 6  # read, untuned, ralign, read, qalign, both


def test_stage_2_on_stage_1s_folder_gives_the_model_of_the_run_in_one_go(cfg):
    real.main(replace(cfg, eval=None))
    models = Path(cfg.save)
    later = str(models / "later")
    aligned = str(models / "qalign")
    real.main(replace(cfg, stage="2", checkpoint=aligned, save=later, eval=None))
    folders = models / "qalign-ralign", models / "later" / "stage-II"
    a, b = (load_pretrained(folder)[0].state_dict() for folder in folders)
    assert all(torch.equal(w, b[name]) for name, w in a.items())


def test_low_rank_training_saves_an_ordinary_checkpoint_and_dtype_is_what_is_saved(cfg):
    real.main(replace(cfg, stage="1", eval=None, lora_rank=2))
    folder = Path(cfg.save) / "qalign"
    low = load_pretrained(folder)[0].state_dict()
    base = load_pretrained(cfg.checkpoint)[0].state_dict()
    changed = {name for name in base if not torch.equal(base[name], low[name])}
    assert low.keys() == base.keys() and changed and all("proj" in name for name in changed)
    real.main(replace(cfg, stage="1", eval=None, dtype="bfloat16"))
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_model_proxy_tuned_by_itself_answers_as_the_expert_does(cfg):
    real.main(replace(cfg, epochs=4, eval=None))
    expert = str(Path(cfg.save) / "qalign-ralign")
    results = real.main(
        replace(cfg, stage="proxy", stage1=None, expert=expert, anti=cfg.checkpoint)
    )
    assert set(results["metrics"]) == {"untuned", "expert", "proxy 1"}

    def numbers(arm):
        row = results["metrics"][arm]
        return {name: cell["values"] for name, cell in row.items() if "alignment" not in name}

    assert numbers("expert") == numbers("proxy 1")


# --- mistakes


@pytest.mark.parametrize(
    "change, words",
    [
        ({"eval_limit": 0}, "--eval-limit"),
        ({"limit": -1}, "--limit"),
        ({"langs": ()}, "--langs"),
        ({"micro_batch": 0}, "--micro-batch"),
        ({"epochs": 0.0}, "--epochs"),
        ({"epochs": -1.0}, "--epochs"),
        ({"lr": math.nan}, "--lr"),
        ({"lr": 0.0}, "--lr"),
        ({"lora_rank": 0}, "--lora-rank"),
        ({"alpha": math.inf}, "--alpha"),
        ({"alpha": 0.5}, "--alpha 0.5 has no effect"),
        ({"langs": ("xx",)}, "--langs xx"),
        ({"langs": ("en",)}, "--langs en"),
        ({"stage1": None}, "needs --stage1"),
        ({"stage": "proxy"}, "needs --expert and"),
        ({"eval": None, "save": None}, "nothing would be kept"),
        ({"langs": ("sw",)}, "holds no pairs|needs one file for sw"),
        ({"stage": "proxy", "expert": "nowhere", "anti": "x"}, "--expert nowhere: no such"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(cfg, change, words):
    with pytest.raises((InputError, FileNotFoundError), match=words):
        real.main(replace(cfg, **change))
    assert not Path(cfg.save).exists()


@pytest.mark.parametrize(
    "flag, content, words",
    [
        ("stage2", '{"query": "a", "response": ""}', "row 1: response or answer or output is miss"),
        ("stage2", '{"query": "a", "response": "b"}\n{"response": "b"}', "row 2: query or quest"),
        ("stage2", "plain text", "not JSON Lines"),
        ("stage2", "[1, 2]", "an object is needed"),
        ("stage1", '{"lang": "en", "src": "a", "tgt": "b"}', "lang 'en' must be one of"),
        ("stage1", '{"lang": "klingon", "src": "a", "tgt": "b"}', "'klingon'"),
        ("stage1", '{"lang": "de", "tgt": "b"}', "src is missing"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_named_before_a_model_is_loaded(
    cfg, tmp_path, flag, content, words, monkeypatch
):
    monkeypatch.setattr(real, "load_pretrained", None)  # calling it would be another error
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(InputError, match=words):
        real.main(replace(cfg, **{flag: str(tmp_path / "rows.jsonl")}))


def test_half_a_pair_of_files_is_refused(cfg, tmp_path):
    write_lines(tmp_path / "de-en" / "train.de", ["eins", "zwei"])
    write_lines(tmp_path / "de-en" / "train.en", ["one"])
    with pytest.raises(InputError, match="train.de has 2 lines, train.en 1"):
        real.main(replace(cfg, stage1=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        real.main(replace(cfg, stage1="nowhere"))


@pytest.mark.parametrize(
    "content, words",
    [
        ("a question without an answer", "line 1: one tab"),
        ("q\tten", "holds no number"),
        ("q\t1\nq\t1\t1", "line 2: one tab"),
    ],
)
def test_a_test_file_without_golds_is_refused(cfg, tmp_path, content, words):
    (tmp_path / "mgsm_en.tsv").write_text(content)
    with pytest.raises(InputError, match=words):
        real.main(replace(cfg, eval=str(tmp_path)))
    assert not Path(cfg.save).exists()


def test_a_question_longer_than_the_context_is_refused_and_so_is_another_vocabulary(
    cfg, files, tmp_path
):
    for language in QUESTIONS:
        write_lines(tmp_path / "test" / f"mgsm_{language}.tsv", ["how many? " * 100 + "\t3"])
    with pytest.raises(InputError, match="tokens, the model reads 320"):
        real.main(replace(cfg, eval=str(tmp_path / "test")))
    other = train_bpe([*ask("ru", 60)], 420, special=("<|endoftext|>",), eos="<|endoftext|>")
    save_pretrained(load_pretrained(files / "small")[0], tmp_path / "other", other)
    small = str(files / "small")
    with pytest.raises(InputError, match="another vocabulary"):
        real.main(replace(cfg, stage="proxy", expert=str(tmp_path / "other"), anti=small))


def test_a_negative_alpha_is_warned_about(cfg, files, capsys):
    small = str(files / "small")
    real.main(replace(cfg, stage="proxy", expert=small, anti=small, alpha=-1.0, langs=("de",)))
    assert "warning: --alpha -1.0" in capsys.readouterr().out


# --- claims


def made_up(english, lead, low, high):
    """Two arms of one checkpoint."""
    rows = {}
    for arm in ("ralign", "qalign", "qalign->ralign"):
        rows |= {Cell(arm, "acc en"): [english], Cell(arm, "alignment non-en"): [0.4]}
    for name, group in (("acc", "non-en"), ("acc", "en"), ("agreement", "non-en")):
        rows[Cell("qalign->ralign", f"{name} {group}")] = [english]
        numbers = {"": lead, " low": low, " high": high}
        for end, x in numbers.items():
            rows[Cell("qalign->ralign", f"lead {name} {group}{end}")] = [x]
    rows[Cell("qalign->ralign", "problems")] = [250.0]
    return as_metrics(rows)


def test_one_checkpoint_decides_nothing_and_says_where_its_interval_lies():
    for numbers, where in (((0.1, 0.05, 0.15), "above 0"), ((0.004, -0.01, 0.02), "on both sides")):
        found = {row["id"]: row for row in claims(made_up(0.5, *numbers))}
        assert {row["verdict"] for row in found.values()} == {"undecided"}
        assert where in found["C1"]["measured"] and "250 problems" in found["C1"]["measured"]
    poor = {row["id"]: row["verdict"] for row in claims(made_up(0.02, 0.1, 0.05, 0.15))}
    assert poor == {"C1": "not tested", "C2": "not tested", "C7": "undecided", "C8": "not tested"}
    two = {arm: {name: cell | {"values": cell["values"] * 2} for name, cell in row.items()}
           for arm, row in made_up(0.5, 0.1, 0.05, 0.15).items()}  # two orders of the examples
    assert {row["verdict"] for row in claims(two)} == {"undecided"}


def test_the_committed_run_follows_from_its_numbers():
    path = ROOT / "results" / "question_alignment_real.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not committed yet")
    results = json.loads(path.read_text(encoding="utf-8"))
    if "stale" in results:
        pytest.skip(f"stale: {results['stale']}")
    assert claims(results["metrics"]) == results["claims"] and real.figure(results).get_axes()
