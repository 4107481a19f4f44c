"""Hallu-PI on the tiny model: the exam before and after, the claims fed with made-up numbers, the whole script; and the benchmark on a
model of the user's own: from files, with demonstrations, on AMBER, and what is refused."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from minilm.claims import held
from minilm import InputError
from vision_eval import scenes, vlm
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
        (row,) = score([i for r in block.rows for i in r], perfect(block), scenes.KINDS).values()
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


def test_the_arms_differ_in_their_diet_alone():
    assert set(Config().methods) <= set(hallu_pi.ARMS) and all(arm.asked in BLOCKS for arm in hallu_pi.ARMS.values())
    taught, control = hallu_pi.ARMS["reminded"].diet, hallu_pi.ARMS["unreminded"].diet
    assert taught._replace(words=False) == control
    assert not set(hallu_pi.UNSEEN) & {FAMILIES[op] for op in OPS} and len(SCENARIOS) == 7
    assert torch.tensor([hallu_pi.ARMS[f"hints {r}"].diet.hint_acc for r in HINTS]).tolist() == pytest.approx([0.5, 0.8, 0.95, 1.0])
