"""Hallu-PI on the tiny model: the exam before and after, the claims fed with made-up numbers, the whole script; and the benchmark on a
model of the user's own: from files, with demonstrations, on AMBER, and what is refused."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from minilm.claims import held
from minilm import InputError
from minilm.data import generator
from vision_eval import benchmark, scenes, vlm
from vision_eval import hallu_pi_experiment as hallu_pi
from vision_eval.hallu_pi_experiment import BLOCKS, HINTS, OPS, SCENARIOS, Config, Exam, ask, claims, controls, evaluate, figure
from vision_eval.metrics import FIELDS, score
from vision_eval.perturb import FAMILIES

TINY = Config(scenes=12, encoder_steps=1, steps=2, twin_steps=1, more_steps=1, batch=4, turns=2, seeds=(100,), workers=1)


@pytest.fixture(scope="module")
def exam():
    return Exam(TINY.scenes, 3)


def perfect(block):
    return {i.id: i.answer or " ".join(i.truth) for row in block.rows for i in row}


# --- the exam

def test_right_answers_score_100_before_and_after_every_damage(exam):
    for name in dict.fromkeys(n for names in BLOCKS.values() for n in names):
        block = exam.block(name)
        (row,) = score([i for r in block.rows for i in r], perfect(block)).values()
        assert row["PI"] == row["ACC+"] == 100 and row["Hal"] == 0 and block.pictures.dtype == np.uint8, name


def test_damage_leaves_the_questions_alone_and_changes_the_pictures(exam):
    before = exam.block("before")
    for op in OPS:
        after = exam.block(op)
        assert [[i.question for i in row] for row in after.rows] == [[i.question for i in row] for row in before.rows]
        assert all((a != b).any() for a, b in zip(after.pictures, before.pictures))
        assert {row[0].severity for row in after.rows} <= {1, 2, 3, 4, 5} and len({row[0].severity for row in after.rows}) > 1
        assert {row[0].severity for row in exam.block(f"{op} 3").rows} == {3}
    assert (exam.block("noise misled").pictures == exam.block("noise").pictures).all()  # the same draw of damage


def test_a_mosaic_shows_the_scene_at_the_place_that_the_question_names(exam):
    block = exam.block("concat")
    for i, row in enumerate(block.rows):
        top, left = ("top" in row[0].region), ("left" in row[0].region)
        quarter = block.pictures[i][0 if top else 24 :, 0 if left else 24 :][:24, :24].astype(float)
        expected = exam.pictures[i].reshape(24, 2, 24, 2, 3).mean((1, 3))
        assert np.abs(quarter - expected).max() <= 1
        assert all(f"in the {scenes.PLACES[i % 4]} image" in item.question for item in row)


def test_a_crop_shows_fewer_shapes_and_asks_for_the_number_that_is_left(exam):
    whole, cropped = exam.block("crop before"), exam.block("crop")
    assert all(row[0].answer == "nine" for row in whole.rows)
    assert {row[0].answer for row in cropped.rows} <= {"three", "four", "six"}


def test_a_test_scene_is_no_training_scene_and_two_seeds_have_different_exams(exam):
    other = Exam(TINY.scenes, 4)
    assert not set(exam.scenes) & set(other.scenes) and Exam(TINY.scenes, 3).scenes == exam.scenes


def test_answers_without_looking_score_what_they_must(exam):
    table = controls(exam, 0)
    assert (table["always yes"]["ACC before"], table["always yes"]["ACC+ before"], table["always yes"]["PI before"]) == (50, 0, 50)
    assert table["always no"]["F1 before"] == 0 and 5 < table["coin"]["ACC+ before"] < 50


def test_evaluate_reports_what_the_model_invents(exam, monkeypatch):
    # a model that always describes a circle and a ring and says yes: the circle or the ring is invented wherever it is absent
    monkeypatch.setattr(vlm, "answer", lambda model, pictures, prompts, longest: [["circle ring yes"] * len(row) for row in prompts])
    found = evaluate(None, exam, (*OPS, "concat", "crop"))
    invented = [(kind, scenes.hal_objects(s.shapes)) for s in exam.scenes for kind in ("circle", "ring")
                if kind not in scenes.kinds_of(s.shapes)]
    assert found["invented"] == 5 * len(invented)
    assert found["expected"] == pytest.approx(100 * np.mean([kind in hal for kind, hal in invented]))
    assert found["ACC+ four"] == 0 and found["yes rate noise"] == 100 and found["usual crop"] == 0


# --- claims

def made_up(good: bool) -> dict:
    m = lambda v: {"mean": float(v), "sd": 0.0, "values": [float(v)] * 2}
    row = lambda drop: {
        "PI before": 95, "PI crop before": 100, "PI misleading before": 95,
        "PI crop": 5 if drop else 96, "PI concat": 40 if drop else 94,
        **{f"PI {op}": 70 if drop else 94 for op in (*OPS, "four")}, "ACC+ before": 95, "usual crop": 60 if drop else 12,
        "ACC+ four": 60, "ACC+ four reminder": 62 if drop else 60, "expected": 50 if drop else 36, "chance": 35, "invented": 200,
        **{f"ACC+ four {s}": 90 - (10 * s if drop else 0) for s in (1, 3, 5)},
        **{f"ACC+ {field} before": 95 for field in FIELDS},
        **{f"ACC+ {field} concat": 60 - (8 * i if drop else 0) for i, field in enumerate(FIELDS)}}
    hints = {f"hints {right}": {"ACC+ before": 95, "ACC+ before misled": 90, "ACC+ weather": 60,
                                "ACC+ weather misled": 58 - (10 * i if good else 0)} for i, right in enumerate(HINTS)}
    robust = {**row(False), "PI before": 90, "PI four": 85} if good else {**row(True), "PI before": 96}
    reminders = {arm: {"ACC+ four": 60, "ACC+ four reminder": 60, "ACC+ four misled": 50, "ACC+ four misled reminder": 50 + gain}
                 for arm, gain in (("unreminded", 0), ("reminded", 6 if good else 0))}
    elsewhere = {"PI before": 90, "PI four": 80 if good else 60}
    mosaics = {"PI before": 90, "PI concat": 70 if good else 25}
    arms = {"clean": row(good), "robust": robust, "robust elsewhere": elsewhere, "robust mosaics": mosaics, **hints, **reminders}
    return {arm: {name: m(v) for name, v in cells.items()} for arm, cells in arms.items()}


def test_claims_hold_on_made_up_numbers_that_show_them_and_fail_on_numbers_that_do_not():
    good, bad = ({c["id"]: held(c) for c in claims(made_up(kind))} for kind in (True, False))
    assert good.pop("C7i") is None and bad.pop("C7i") is None
    assert all(good.values()), good
    assert not any(bad.values()), bad


def test_a_reminder_that_only_mends_what_its_own_training_broke_does_not_count():
    metrics = made_up(True)
    for name, value in (("ACC+ four misled", 42.0), ("ACC+ four misled reminder", 51.0)):  # a gain of 9, but unreminded has 50 without
        metrics["reminded"][name] = {"mean": value, "sd": 0.0, "values": [value] * 2}
    assert {c["id"]: held(c) for c in claims(metrics)}["C7t"] is False


def test_claims_of_arms_that_did_not_run_are_not_tested():
    metrics = {arm: row for arm, row in made_up(True).items() if arm == "clean"}
    verdicts = {c["id"]: held(c) for c in claims(metrics)}
    assert verdicts["C1"] is True and verdicts["C4"] is None and verdicts["C6"] is None and verdicts["R3"] is None


# --- the whole script

def test_the_whole_script_runs_draws_and_writes_its_table(tmp_path, capsys):
    results = hallu_pi.main(replace(TINY, methods=("clean", "early", "hints 1.0"), out=str(tmp_path), save=str(tmp_path / "tiny")))
    printed = capsys.readouterr().out
    assert all(c["id"] in printed for c in results["claims"]) and "in capitals" in printed
    saved = json.loads((tmp_path / "hallu_pi.json").read_text())
    assert (tmp_path / "hallu_pi.png").stat().st_size > 20_000 and figure(saved).get_axes()
    rows = list(csv.DictReader(open(tmp_path / "hallu_pi.csv")))
    cell = next(r for r in rows if (r["arm"], r["metric"], r["asked"]) == ("always yes", "ACC", "before"))
    assert cell["mean"] == "50.00"
    assert vlm.load_vlm(tmp_path / "tiny").lm.config.num_hidden_layers == 3


def test_every_arm_of_a_seed_starts_from_the_same_model_and_a_run_can_be_repeated():
    cfg = replace(TINY, methods=("hints 0.5", "hints 1.0", "hints 0.5"))
    one, two = hallu_pi.run(cfg, 100), hallu_pi.run(replace(cfg, methods=("hints 0.5",)), 100)
    assert one.metrics["hints 0.5"] == two.metrics["hints 0.5"]  # another arm beside it moves no number


def test_wrong_arms_and_sizes_are_refused():
    with pytest.raises(InputError, match="not known; give some of clean"):
        hallu_pi.main(replace(TINY, methods=("blurry",)))
    with pytest.raises(InputError, match="must be at least 8"):
        hallu_pi.main(replace(TINY, scenes=3))


# --- a model of one's own

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exam")
    hallu_pi.main(replace(TINY, export=str(folder), seeds=(3,)))
    model = vlm.TinyVLM(generator(0, "init"), width=32, layers=1)
    vlm.save_vlm(folder / "tiny", model)
    return folder, model


def bench(folder, out, **changes):
    return benchmark.Config(**{"data": str(folder / "data.jsonl"), "images": str(folder), "out": str(out), "workers": 1, **changes})


def test_the_model_on_exported_files_scores_what_it_scores_in_memory(files, exam, tmp_path, capsys):
    folder, model = files
    scores = benchmark.main(bench(folder, tmp_path, model=f"tiny:{folder / 'tiny'}", scenarios=("noise", "crop")))
    rows = {(r["scenario"], r["phase"]): r for r in scores["rows"]}
    for name, key in (("noise", ("noise", "after")), ("crop", ("crop", "after")), ("crop before", ("crop", "before"))):
        block = exam.block(name)
        (row,) = score([i for r in block.rows for i in r], ask(model, block)).values()
        assert {k: v for k, v in rows[key].items() if k in row} == row
    assert "scorer: paper (micro)" in capsys.readouterr().out
    again = benchmark.main(bench(folder, tmp_path / "2", score=str(tmp_path / "answers.json")))
    assert again["rows"][0]["unanswered"] > 0  # the other scenarios have no answers: reported


class Echo:
    """Right answers to everything, and what it was shown."""

    def __init__(self, items):
        self.right, self.seen = {i.question: benchmark.right_answer(i) for i in items}, []

    def __call__(self, turns):
        self.seen.append(turns)
        return self.right[turns[-1][1]]


def test_reminder_and_demonstrations_come_before_the_question(files, tmp_path):
    folder, _ = files
    items = [i for i in benchmark.read_items(str(folder / "data.jsonl")) if i.scenario == "noise"]
    cfg = bench(folder, tmp_path, baseline="icl")
    model = Echo(items)
    asked, answers = benchmark.evaluate(model, items, cfg)
    shown = {turns[-1][0].tobytes() for turns in model.seen}
    assert len({i.image for i in items}) - len({i.image for i in asked}) == 2 and None not in answers.values()
    for turns in model.seen:
        assert len(turns) == 3 and turns[0][1].startswith("The images are perturbed.") and turns[0][2] and turns[1][2]
        assert turns[0][0].tobytes() not in shown and turns[1][0].tobytes() not in shown  # set aside, never asked about
    turns = benchmark.make_turns(items[0], "reminder", [], 0, 0, lambda name: np.zeros((4, 4, 3), np.uint8))
    assert len(turns) == 1 and turns[0][1] == scenes.TEMPLATES["reminder"] + items[0].question
    with pytest.raises(InputError, match="not 3 turns"):
        benchmark.evaluate(benchmark.tiny_model(files[1]), items, cfg)


def test_a_limit_keeps_pairs_whole(files, tmp_path):
    folder, _ = files
    items = benchmark.read_items(str(folder / "data.jsonl"))
    asked, answers = benchmark.evaluate(Echo(items), items, bench(folder, tmp_path, limit=2))
    assert len({i.image for i in asked}) == 2 and score(asked, answers)


@pytest.mark.parametrize("line, message", [
    ("{", "not valid JSON"), ('{"id": 1}', "missing or unknown"), ("", "at least one row"),
    ('{"id": "a", "image": "x", "scenario": "s", "phase": "after", "task": "chat", "field": "", "pair_id": "", "question": "?", '
     '"answer": ""}', "task gen or disc"),
    ('{"id": "a", "image": "x", "scenario": "s", "phase": "after", "task": "disc", "field": "taste", "pair_id": "", "question": "?", '
     '"answer": "yes"}', "field one of")])
def test_a_broken_data_file_is_refused_in_one_line(tmp_path, line, message):
    (tmp_path / "d.jsonl").write_text(line)
    with pytest.raises(InputError, match=message):
        benchmark.read_items(str(tmp_path / "d.jsonl"))


@pytest.mark.parametrize("change, message", [
    ({"truth": "circle"}, "truth must be a list of words"), ({"hal": [1]}, "hal must be a list of words"),
    ({"severity": 6}, "severity must be 0 to 5"), ({"severity": "3"}, "severity must be 0 to 5")])
def test_a_word_in_place_of_a_list_of_words_and_a_strange_severity_are_refused(tmp_path, change, message):
    row = {"id": "a", "image": "x", "scenario": "s", "phase": "after", "task": "gen", "field": "", "pair_id": "", "question": "?",
           "answer": "", "truth": ["circle"]}
    write = lambda row: (tmp_path / "d.jsonl").write_text(json.dumps(row))
    write(row)
    assert benchmark.read_items(str(tmp_path / "d.jsonl"))[0].truth == ("circle",)
    write(row | change)
    with pytest.raises(InputError, match=f"question 1: {message}"):
        benchmark.read_items(str(tmp_path / "d.jsonl"))


def test_missing_files_and_wrong_names_are_refused_and_nothing_is_written(files, tmp_path):
    folder, _ = files
    out = tmp_path / "out"
    for changes, message in (({"model": "gpt"}, "must be openai:NAME"), ({"model": "openai:m"}, "must begin with http"),
                             ({"data": "none.jsonl", "model": "x"}, "no such file"),
                             ({"model": f"tiny:{folder / 'tiny'}", "scenarios": ("mist",)}, "mist: the data has none, noise"),
                             ({"model": f"tiny:{folder / 'tiny'}", "images": str(tmp_path)}, "lacks .*png, which a question is about"),
                             ({"score": str(folder / "data.jsonl")}, "an answer must be"),
                             ({"format": "amber", "score": "x"}, "AMBER needs it")):
        with pytest.raises((InputError, FileNotFoundError), match=message):
            benchmark.main(bench(folder, out, **changes))
    assert not out.exists()


def test_amber_from_files_with_the_instruction_that_its_questions_lack(tmp_path, capsys):
    dump = lambda name, value: (tmp_path / name).write_text(json.dumps(value)) and str(tmp_path / name)
    flags = {
        "annotations": dump("a.json", [{"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["dog"]}, {"id": 2, "type": "relation",
                                                                                                          "truth": "no"}]),
        "associations": dump("r.json", {"sky": [], "dog": []}), "data": dump("q.json", [
            {"id": 1, "image": "A.png", "query": "Describe this image."}, {"id": 2, "image": "A.png", "query": "Is there contact?"}])}
    (tmp_path / "safe.txt").write_text("line\n")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "A.png")
    cfg = benchmark.Config(format="amber", safe_words=str(tmp_path / "safe.txt"), images=str(tmp_path), out=str(tmp_path), **flags)
    items = benchmark.amber_items(cfg.data, benchmark.read_amber(cfg))
    assert [i.question for i in items] == ["Describe this image.", "Is there contact? Answer with 'Yes' or 'No'."]
    assert "to 1 questions" in capsys.readouterr().out
    dump("answers.json", [{"id": 1, "response": "A dog in the sky"}, {"id": 2, "response": "No"}])
    scores = benchmark.main(replace(cfg, score=str(tmp_path / "answers.json")))
    assert scores["generative"] == {"CHAIR": 50.0, "Cover": 99.9, "Hal": 100.0, "Cog": 99.9}
    assert scores["discriminative"]["relation"]["Accuracy"] == 99.9 and scores["unanswered"] == 0


def test_the_arms_differ_in_their_diet_alone():
    assert set(Config().methods) <= set(hallu_pi.ARMS) and all(arm.asked in BLOCKS for arm in hallu_pi.ARMS.values())
    taught, control = hallu_pi.ARMS["reminded"].diet, hallu_pi.ARMS["unreminded"].diet
    assert taught._replace(words=False) == control
    assert not set(hallu_pi.UNSEEN) & {FAMILIES[op] for op in OPS} and len(SCENARIOS) == 7
    assert torch.tensor([hallu_pi.ARMS[f"hints {r}"].diet.hint_acc for r in HINTS]).tolist() == pytest.approx([0.5, 0.8, 0.95, 1.0])
