"""OCKR on the published files: reading them, what is wrong with them, what is refused, and the path from a checkpoint to a table."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from methods.ockr import answer_loss
from methods.ockr_tasks import Row
from methods.real import ockr
from methods.real.ockr import LANGUAGES, ROWS, Config, Reader, candidates, defects, examine, fine_tune, names, paths, read_rows, write_rows
from minilm import InputError
from minilm.data import generator, prompt_masked
from minilm.lora import load_adapter
from minilm.claims import wilson
from minilm.results import ROOT
from minilm.tokenizer import train_bpe
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained


@pytest.fixture
def data(shared):
    if not (shared / "data" / "ockr").is_dir():
        pytest.skip("the published files are not here")
    return shared / "data" / "ockr"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Our own world at the published size, in the published format."""
    folder = tmp_path_factory.mktemp("built")
    return folder, ockr.main(Config(stage="build", out=str(folder)))


def checkpoint(folder, rows, width=32):
    """A random model with a tokenizer of its own."""
    tokenizer = train_bpe([f"{r.prompt} {r.input} {r.answer}" for r in rows], 500, ("<s>", "</s>"), eos="</s>", bos="<s>")
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                                    num_attention_heads=4, max_position_embeddings=256, model_type="llama"), generator(0, "init"))
    save_pretrained(model, folder, tokenizer)
    return str(folder)


# --- the published files

def test_every_published_file_is_read_and_has_the_number_of_rows_of_the_table(data):
    report = ockr.main(Config(stage="check", data=str(data)))
    assert len(report) >= 10
    assert all(r["rows"] == r["expected"] and r["test"] in (0, r["expected test"]) for r in report.values())


def test_the_known_defects_are_found_with_their_line_numbers(data):
    report = ockr.check(Config(data=str(data)))
    found = {name: {what: len(lines) for what, lines in r["defects"].items()} for name, r in report.items()}
    itself = "a person is compared with itself"
    assert found["Basic OCKR/A+A To R(simple,Separate).json"] == {itself: 40}
    assert report["Basic OCKR/A+A To R(simple,Separate).json"]["defects"][itself][0] == 2201
    assert found["Basic OCKR/R+R To R(simple,Separate).json"] == {}
    trained = "test file: the target's question is trained, for another person"
    assert found["Cross-Lingual/Seperate/Train/DE.json"] == {trained: 2} and found["Cross-Lingual/Seperate/Train/ZH.json"] == {trained: 1}


def test_targets_are_balanced_and_in_the_cross_lingual_test_the_target_is_the_foreign_question(data):
    rows = read_rows(data / paths("R+R To R", "hard", "separate")[1], True)
    assert Counter(r.label for r in rows if r.kind == "target") == {"Yes": 200, "No": 200}
    rows = read_rows(data / paths("Cross-Lingual", "simple", "separate", "ZH")[1], True)
    assert Counter(r.kind for r in rows) == {"target": 200, "translation": 200, "(x, birth_year, year)": 200}
    assert "出生于" in next(r for r in rows if r.kind == "target").prompt
    assert all(r.input and r.label == r.answer for r in rows if r.kind == "translation")
    assert not any("[[" in r.answer for r in rows)


# --- reading, by hand

def line(prompt="Did AmberFern and HavenGrove meet?", answer="Yes.", input="", **more) -> str:
    return json.dumps({"prompt": prompt, "input": input, "answer": answer} | more, ensure_ascii=False)


@pytest.mark.parametrize("text, test, words", [
    ("[" + line() + "]", False, "line 1.*no array"), (line() + "\n{}", False, "line 2"), (line(extra="x"), False, "line 1"),
    ("", False, "empty"), (line(), True, "label"), (line(answer="Yes.[[label:Yes]]"), True, "type"),
    (line(answer="Yes.[[label:Yes]][[type:(y, birth year, year)]]"), True, "'Yes'.*no year"), ('{"prompt": ', False, "line 1")])
def test_what_is_not_in_the_published_format_is_refused_with_file_and_line(text, test, words, tmp_path):
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words) as error:
        read_rows(tmp_path / "x.json", test)
    assert "x.json" in str(error.value)


def test_a_file_that_is_not_utf_8_or_not_there_is_refused(tmp_path):
    (tmp_path / "x.json").write_bytes(line().encode() + b"\xff")
    with pytest.raises(InputError, match="UTF-8"):
        read_rows(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match="--data"):
        read_rows(tmp_path / "y.json")


def test_tags_are_taken_out_continent_is_a_label_and_repeated_tags_are_ignored(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join([
        line(answer="No.[[continent:No]][[city:A]][[type:(y, before, z)]]"),
        line(answer="Yes.[[A:1]][[B:2]][[A:1]][[B:2]][[label:Yes]][[type:targe]]")]), encoding="utf-8")
    rows = read_rows(tmp_path / "x.jsonl", True)
    assert [(r.answer, r.label, r.kind) for r in rows] == [("No.", "No", "(y, before, z)"), ("Yes.", "Yes", "target")]


def test_defects_by_hand():
    ask = lambda a, b: Row(f"Did {a} and {b} share the same birth year?", f"Yes, {a} and {b} were born in the same year.")
    good = ask("AmberFern", "HavenGrove")
    wrong = Row("Is AmberFern older than HavenGrove? In what year was HavenGrove born?", "No, she is not. OceanMist was born in 2010.")
    target = good._replace(kind="target", label="Yes")
    found = defects([good, wrong, ask("AmberFern", "AmberFern"), good], [ask("JadePath", "TideVeil")._replace(kind="target"), target])
    assert list(found.values()) == [[2], [3], [4], [2]]
    assert names("Did NomadNorth meet EclipseQuiver(German: X)? No") == ["NomadNorth", "EclipseQuiver"]


# --- our own files at the published size

def test_build_writes_files_of_the_published_size_that_the_reader_accepts_without_defects_but_the_reflexive_pairs(built):
    folder, report = built
    for (task, level), counts in ROWS.items():
        for setting, count in zip(ockr.SETTINGS, counts):
            if count is None:
                continue
            files = paths(task, level, setting, "CL")
            assert [report[f] for f in files] == [count, counts[-1]]
            if (task, setting) in (("A+R To A", "adjacent"), ("A+A To R", "separate"), ("Cross-Lingual", "adjacent")):
                train, test = read_rows(folder / files[0]), read_rows(folder / files[1], True)
                assert {what for what, lines in defects(train, test).items() if lines} <= {"a person is compared with itself"}
                assert len([r for r in test if r.kind == "target"]) in (200, 380, 400)


def test_written_rows_are_read_again(tmp_path):
    rows = [Row("Übersetze", "XyloDämmerung", "XyloTwilight"), Row("a", "b")]
    write_rows(tmp_path / "sub" / "x.json", rows)
    assert read_rows(tmp_path / "sub" / "x.json") == rows


# --- from a checkpoint to a table

def test_the_prompt_forms(tmp_path):
    row = Row("Convert to German", "XenoSchimmer", "XenoGlimmer")
    folder = checkpoint(tmp_path / "m", [row] * 20)
    _, tok = load_pretrained(folder)
    text = lambda **c: tok.decode(Reader(Config(checkpoint=folder, **c), tok).prompt(row))
    assert text().removeprefix("<s>").strip("\n ") == "Convert to German\nXenoGlimmer"  # no template of its own: plain
    assert "[INST] Convert to German\nXenoGlimmer [/INST]" in text(chat_template="llama2")
    (tmp_path / "m" / "chat_template.jinja").write_text("{% for m in messages %}U: {{ m.content }}\nA: {% endfor %}", encoding="utf-8")
    assert "U: Convert to German\nXenoGlimmer\nA: " in text()
    assert Reader(Config(checkpoint=folder), tok).example(row)[1][-1] == tok.eos_id


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path):
    rows = [Row("When was AmberFern born?", "In 2010, I believe."), Row("And HavenGrove?", "2009."), Row("And JadePath?", "In 1999.")] * 2
    folder = checkpoint(tmp_path / "m", rows)
    weights = []
    for micro in (1, 4, 6):
        cfg = Config(checkpoint=folder, steps=2, batch=6, micro_batch=micro, lr=1e-3)
        model, tok = load_pretrained(folder)
        examples = [Reader(cfg, tok).example(row) for row in rows]
        losses = fine_tune(cfg, model, examples, torch.device("cpu"))
        weights.append(model.lm_head.weight.detach())
        first, _ = load_pretrained(folder)
        assert losses[0] == pytest.approx(answer_loss(first, *prompt_masked(examples)).item(), rel=1e-5)
    torch.testing.assert_close(weights[0], weights[2], atol=2e-5, rtol=0)
    torch.testing.assert_close(weights[1], weights[2], atol=2e-5, rtol=0)


def test_a_small_model_learns_four_rows_and_both_scorers_see_it(tmp_path):
    rows = [Row(f"In what year was {n} born?", f"{n} was born in the year {y}.", "", y, "target")
            for n, y in (("AmberFern", "2010"), ("HavenGrove", "2009"), ("JadePath", "1999"), ("TideVeil", "1995"))]
    folder = checkpoint(tmp_path / "m", rows * 5)
    cfg = Config(checkpoint=folder, steps=120, batch=4, micro_batch=4, lr=5e-3, setting="separate")
    model, tok = load_pretrained(folder)
    reader = Reader(cfg, tok)
    fine_tune(cfg, model, [reader.example(row) for row in rows], torch.device("cpu"))
    assert examine(cfg, model, reader, rows)["target"]["accuracy"] == 1.0
    assert examine(replace(cfg, scoring="candidates"), model, reader, rows)["target"]["accuracy"] == 1.0
    assert candidates(reader, model, rows[:1], sorted(r.label for r in rows)) == ["2010"]


@pytest.mark.parametrize("rank", [4, 0])
def test_the_whole_path_on_the_real_files_with_a_real_checkpoint(data, shared, tmp_path, capsys, rank):
    cfg = Config(checkpoint=str(shared / "checkpoints" / "stories260K"), data=str(data), steps=2, batch=4, micro_batch=2, limit=2,
                 lora_rank=rank, clean=True, scoring="candidates", out=str(tmp_path))
    report = ockr.main(cfg)
    printed = capsys.readouterr().out
    assert "40 x a person is compared with itself" in printed and "left out" in printed and report["rows"] == 2960
    assert set(report["after"]) == {"target", "(y, birth year, year)", "(z, birth year, year)"}
    assert json.loads((tmp_path / "ockr_real.json").read_text())["losses"] == report["losses"]
    model, _ = load_pretrained(cfg.checkpoint if rank else tmp_path / "model")
    if rank:
        load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("change, words", [
    ({"setting": "crd", "level": "hard"}, "no published data"), ({"task": "Cross-Lingual", "setting": "cot"}, "no published data"),
    ({"lang": "XX"}, "AR, DE"), ({"task": "A+A"}, "A\\+A To R"), ({"setting": "together"}, "separate"), ({"stage": "look"}, "check"),
    ({"setting": "cot", "scoring": "candidates"}, "--scoring generate"), ({"micro_batch": 0}, "--micro-batch"), ({}, "--checkpoint"),
    ({"stage": "build"}, "--out"), ({"dtype": "int8"}, "bfloat16"), ({"chat_template": "alpaca"}, "llama2")])
def test_wrong_settings_are_refused_in_one_line(change, words):
    with pytest.raises(InputError, match=words):
        ockr.main(replace(Config(), **change))
    assert len(LANGUAGES) == 9


def test_a_folder_without_published_files_is_refused(tmp_path):
    with pytest.raises(InputError, match="none of the published files"):
        ockr.main(Config(stage="check", data=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="--data"):
        ockr.main(Config(stage="check", data=str(tmp_path / "nowhere")))


def test_the_committed_runs_on_the_published_files_add_up():
    runs = json.loads((ROOT / "results" / "ockr_real.json").read_text(encoding="utf-8"))["runs"]
    assert [run["config"]["task"] for run in runs] == ["A+A To R", "R+R To R", "A+R To A"]
    for run in runs:
        assert run["rows"] == ROWS[run["config"]["task"], "simple"][0] and run["config"]["lora_rank"] == 0
        for cell in run["after"].values():
            assert cell["interval"] == pytest.approx(wilson(round(cell["accuracy"] * cell["n"]), cell["n"]))
