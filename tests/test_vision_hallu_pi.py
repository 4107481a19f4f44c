"""Hallu-PI: the paper's file (damage a picture, ask, score), the exam before and after, what each
arm is fed and asked, the words of the figure, the whole script."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from minilm import InputError
from minilm.claims import SMOKE, NOT_TESTED, key
from vision_eval import hallu_pi, scenes, vlm
from vision_eval import hallu_pi_experiment as experiment
from vision_eval.exam import BEFORE, PLAIN, Asked, Block, Exam, ask, before
from vision_eval.hallu_pi import OPS, SCENARIOS, Description, damage, questions
from vision_eval.hallu_pi_claims import HINTS, WRONG, figure, judged_phrases
from vision_eval.hallu_pi_experiment import (
    ARMS,
    FEW,
    PICTURES,
    REMINDERS,
    UNSEEN,
    WRONG_HINTS,
    WRONG_PAIRS,
    Config,
    controls,
    evaluate,
    go_on,
    inventions,
    resolved,
    train_bases,
)
from vision_eval.metrics import Item, count_names, score
from vision_eval.perturb import FAMILIES
from vision_eval.scenes import KINDS, PARTNER, TEMPLATES
from vision_eval.vlm import Diet

TINY = Config(scenes=12, encoder_steps=1, steps=2, twin_steps=1, more_steps=1, batch=4, turns=2,
              seeds=(100,), workers=1)  # fmt: skip
ALL_BLOCKS = [*dict.fromkeys((*PICTURES, *WRONG_HINTS, *REMINDERS, *FEW))]


@pytest.fixture(scope="module")
def exam():
    return Exam(TINY.scenes, 3)


# --- the paper's file


def test_one_description_by_hand():
    # says circle twice and ring; circle and square are there, one would expect a ring
    d = Description(["circle", "circle", "ring"], ["circle", "square"], ["ring"])
    assert (d.chair, d.cover, d.cog, d.hal) == (pytest.approx(1 / 3), 0.5, pytest.approx(1 / 3), 1)
    silent = Description([], ["circle"], ["ring"])
    assert (silent.chair, silent.cover, silent.cog, silent.hal) == (0, 0, 0, 0)


def test_one_description_scores_what_the_benchmark_counts():
    rng = np.random.default_rng(0)
    for _ in range(100):
        R, A = rng.choice(KINDS, rng.integers(5)).tolist(), rng.choice(KINDS, 3, False).tolist()
        H = [PARTNER[kind] for kind in A if PARTNER[kind] not in A]
        d, counts = Description(R, A, H), count_names(" ".join(R), A, H, KINDS)
        assert d.cover == pytest.approx(counts.covered / counts.there)
        assert d.hal == (counts.wrong > 0)
        if R:
            assert d.chair == pytest.approx(counts.wrong / counts.named)
            assert d.cog == pytest.approx(counts.expected / counts.named)


class Seer:
    """Answers rightly about the pictures it knows, and "one red bar" or yes about any other."""

    def __init__(self, exam):
        self.right = {}
        for picture, row in zip(exam.pictures, exam.block(PLAIN).rows):
            for item in row:
                self.right[picture.tobytes(), item.question] = item.answer or " ".join(item.truth)

    def __call__(self, picture, prompt):
        blind = "one red bar" if "describe" in prompt else "yes"
        return self.right.get((picture.tobytes(), prompt), blind)


def example_scores(exam, capsys):
    cfg = hallu_pi.Config(seed=exam.seed)
    hallu_pi.worked_example(Seer(exam), exam.scenes, exam.pictures, cfg)
    printed = capsys.readouterr().out
    return [int(line.split("=")[-1]) for line in printed.splitlines() if "PI = " in line], printed


def test_the_worked_example_shows_the_damage_and_without_damage_shows_none(
    exam, capsys, monkeypatch
):
    (whole, fogged), printed = example_scores(exam, capsys)
    assert whole == 100 and fogged < 60 and "R = ['bar']" in printed and "(wrong)" in printed
    monkeypatch.setattr(hallu_pi, "perturb", lambda picture, *how: picture)  # switched off
    (whole, fogged), _ = example_scores(exam, capsys)
    assert whole == fogged == 100


def test_damage_by_scenario(exam):
    pictures = exam.pictures
    for op in OPS:
        assert (damage(pictures, 1, op, 3) != pictures[1]).any()
        assert (damage(pictures, 1, op, 3, seed=1) == damage(pictures, 1, op, 3, seed=1)).all()
    assert damage(pictures, 1, "blank").std() == 0
    for whole in ("", "misleading"):
        assert (damage(pictures, 1, whole) == pictures[1]).all()


def test_the_small_run_prints_the_mechanism_and_one_seeds_scores(capsys):
    hallu_pi.main(hallu_pi.Config(quick=True))
    printed = capsys.readouterr().out
    mechanism = ("in capitals", "CHAIR", "PI = ((100 - ", "misleading", "blank", "crop: of")
    for words in (*mechanism, "proves nothing"):
        assert words in printed
    for flags, message in (({"steps": 0}, "--steps 0"), ({"severity": 6}, "--severity 6"),
                           ({"objects": ("dog",)}, "--objects dog has no effect without"),
                           ({"picture": "p.png", "steps": 7}, "--steps 7 has no effect with"),
                           ({"picture": "p.png"}, "--picture needs --objects")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            hallu_pi.main(hallu_pi.Config(**flags))


def test_a_picture_of_ones_own_is_asked_about_before_and_after(tmp_path, capsys, monkeypatch):
    grey = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "dog.png")
    seen = []

    class Client:  # sees the dog in the picture as it is, and a cat in every other
        def __init__(self, url, model, key_env=None):
            assert (url, model) == ("http://localhost:1/v1", "m")

        def __call__(self, turns):
            ((picture, prompt, _),) = turns
            seen.append(picture.tobytes())
            whole = (picture == grey).all()
            if "describe" in prompt:
                return "A dog." if whole else "A cat."
            return "Yes" if ("dog" in prompt) == whole else "No"

    monkeypatch.setattr(hallu_pi, "ChatClient", Client)
    hallu_pi.main(hallu_pi.Config(picture=str(tmp_path / "dog.png"), objects=("dog",),
                                  expected="cat", base_url="http://localhost:1/v1",
                                  model="m"))  # fmt: skip
    last = capsys.readouterr().out.strip().splitlines()[-2]
    assert last.startswith("PI  before 100   noise 3 0") and len(set(seen)) == 5


# --- the exam


def perfect(asked: Asked):
    return {item.id: item.answer or " ".join(item.truth) for item in asked.items}


def test_right_answers_score_100_before_and_after_every_damage(exam):
    for block in ALL_BLOCKS:
        asked = exam.block(block)
        (row,) = score(asked.items, perfect(asked), KINDS).values()
        assert row["PI"] == row["ACC+"] == 100 and row["Hal"] == 0, block
        assert asked.pictures.dtype == np.uint8 and asked.pictures.shape[1:] == (48, 48, 3)


def test_every_block_shows_and_asks_what_its_name_says(exam):
    plain = exam.block(PLAIN)
    for block in ALL_BLOCKS:
        asked = exam.block(block)
        words = TEMPLATES[block.words] if block.words else ""
        for item in asked.items:
            assert item.question.startswith(words)
            rest = item.question.removeprefix(words)
            assert not rest.startswith(("Note", "Hello"))
            wrong = {"yes": "Maybe no. ", "no": "Maybe yes. "}.get(item.answer)
            if item.task == "disc":
                misled = block.hint == "misled" or block == Block("misleading")
                assert rest.startswith("Maybe") == misled and (not misled or rest.startswith(wrong))
            severities = (block.severity,) if block.severity else (1, 2, 3, 4, 5)
            assert item.severity in (severities if block.scenario in OPS else (0,))
        whole = block.scenario in ("", "misleading")
        if block.scenario == "blank":
            assert asked.pictures.std() == 0  # not a trace of the scene
        elif block.scenario != "crop":
            same = [(a == b).all() for a, b in zip(asked.pictures, plain.pictures)]
            assert all(same) if whole else not any(same), block


def test_damage_leaves_the_questions_alone_and_is_the_same_for_every_way_of_asking(exam):
    asked = [item.question for item in exam.block(PLAIN).items]
    for op in OPS:
        after = exam.block(Block(op))
        assert [item.question for item in after.items] == asked
        assert len({item.severity for item in after.items}) > 1  # drawn for every picture
        misled = exam.block(Block(op, hint="misled"))
        assert (misled.pictures == after.pictures).all()
        strong, weak = (exam.block(Block(op, severity=s)).pictures.astype(int) for s in (5, 1))
        distance = [abs(x - exam.pictures).mean() for x in (strong, weak)]
        assert distance[0] > distance[1]


def test_a_mosaic_shows_the_scene_at_the_place_that_the_question_names(exam):
    asked = exam.block(Block("concat"))
    for i, row in enumerate(asked.rows):
        top, left = ("top" in row[0].region), ("left" in row[0].region)
        rows, columns = (
            slice(0, 24) if top else slice(24, 48),
            slice(0, 24) if left else slice(24, 48),
        )
        expected = exam.pictures[i].reshape(24, 2, 24, 2, 3).mean((1, 3))
        assert np.abs(asked.pictures[i][rows, columns] - expected).max() <= 1
        assert all(f"in the {scenes.PLACES[i % 4]} image" in item.question for item in row)


def test_a_crop_shows_fewer_shapes_and_asks_for_the_number_that_is_left(exam):
    whole, cropped = exam.block(before("crop")), exam.block(Block("crop"))
    assert all(row[0].answer == "nine" for row in whole.rows)
    assert {row[0].answer for row in cropped.rows} <= {"three", "four", "six"}


def test_a_test_scene_is_no_training_scene_and_two_seeds_have_different_exams(exam):
    other = Exam(TINY.scenes, 4)
    assert not set(exam.scenes) & set(other.scenes)
    assert Exam(TINY.scenes, 3).scenes == exam.scenes


def test_answers_without_looking_score_what_they_must(exam):
    table = {
        arm: {key(name): x for name, x in row.items()} for arm, row in controls(exam, 0).items()
    }
    yes = table["always yes"]
    assert (yes["ACC before"], yes["ACC+ before"], yes["PI before"]) == (50, 0, 50)
    assert table["always no"]["F1 before"] == 0 and 5 < table["coin"]["ACC+ before"] < 50


# --- what is measured


def test_evaluate_reports_what_the_model_invents(exam, monkeypatch):
    # always describes a circle and a ring: the one or the other is invented wherever it is absent
    def parrot(model, pictures, prompts, longest):
        return [["circle ring yes"] * len(row) for row in prompts]

    monkeypatch.setattr(vlm, "answer", parrot)
    found = evaluate(None, exam, PICTURES)
    there = [scenes.kinds_of(scene.shapes) for scene in exam.scenes]
    invented = [(k, kinds) for kinds in there for k in ("circle", "ring") if k not in kinds]
    for pairs, name in ((PARTNER, ""), (WRONG_PAIRS, "wrong pairs")):
        expected = [pairs[kind] in kinds for kind, kinds in invented]
        assert found["invented", name] == 4 * len(invented)  # of the four operations alone
        assert found["expected", name] == pytest.approx(100 * np.mean(expected))
        absent = [pairs[k] in kinds for kinds in there for k in KINDS if k not in kinds]
        assert found["chance", name] == pytest.approx(100 * np.mean(absent))
    named = {key(name): value for name, value in found.items()}
    assert named["ACC+ four"] == 0 and named["yes rate noise"] == 100 and named["usual crop"] == 0
    assert "expected" not in {key(name) for name in evaluate(None, exam, WRONG_HINTS)}


def test_what_follows_a_prior_is_above_chance_and_with_wrong_pairs_it_is_not():
    rng = np.random.default_rng(0)
    described = []
    for _ in range(600):
        kind = rng.choice(KINDS)
        item = Item("", "", "", "", "gen", "", "", "", "", (str(kind),), (PARTNER[kind],))
        described.append((item, f"{kind} {PARTNER[kind]}"))  # what is there, and what goes with it
    right, wrong = inventions(described, PARTNER, ""), inventions(described, WRONG_PAIRS, "w")
    assert right["expected", ""] == 100 and right["chance", ""] == wrong["chance", "w"] == 20
    assert wrong["expected", "w"] == 0
    assert all(WRONG_PAIRS[b] == a and PARTNER[a] != b for a, b in WRONG_PAIRS.items())


def test_at_the_pairless_prior_a_kind_comes_with_every_other_equally_often():
    rng = scenes.random.Random(0)
    partner, other = [], []
    for _ in range(8000):
        kinds = scenes.kinds_of(scenes.draw_scene(rng, experiment.PAIRLESS).shapes)
        for kind in kinds if len(kinds) > 1 else ():
            partner.append(PARTNER[kind] in kinds)
            other.append((len(kinds) - 1 - partner[-1]) / 4)
    assert np.mean(partner) == pytest.approx(np.mean(other), abs=0.02)


# --- the arms


def test_the_arms_differ_in_their_diet_alone():
    clean, robust, elsewhere = (ARMS[name].diet for name in ("clean", "robust", "robust elsewhere"))
    assert clean == Diet() and set(robust.ops) == set(OPS)
    assert elsewhere == Diet(corrupt=0.8, ops=UNSEEN)
    assert not set(UNSEEN) & ({*OPS} | {FAMILIES[op] for op in OPS})
    assert ARMS["unprimed"].diet._replace(prior=Diet().prior) == robust
    assert ARMS["reminded"].diet._replace(words=False) == ARMS["unreminded"].diet
    assert [ARMS[f"hints {h}"].diet for h in HINTS] == [
        Diet(hints=0.7, hint_acc=share) for share in (0.5, 0.8, 0.95, 1.0)]  # fmt: skip
    assert ARMS["early"].diet is None and len(SCENARIOS) == 7


@pytest.fixture
def trained(monkeypatch):
    """Records every training: (diet, steps, name of its stream). A step adds 1 to model.rows."""
    calls = []

    def training(model, diet, steps, lr, seed, name, *more, **other):
        calls.append((diet, steps, name))
        for step in range(steps):
            with torch.no_grad():
                model.rows.add_(1)
            yield step + 1

    monkeypatch.setattr(vlm, "training", training)
    monkeypatch.setattr(vlm, "pretrain_encoder", lambda *how: calls.append(how[-1]))
    return calls


def test_every_arm_goes_on_from_its_base_on_its_own_diet_with_the_same_stream(trained):
    cfg = replace(TINY, steps=10, twin_steps=4, more_steps=3, methods=tuple(ARMS))
    bases = train_bases(cfg, 0)
    assert trained == [0.8, (Diet(), 10, "stage 2"), 0.3, (Diet(prior=0.3), 10, "stage 2")]
    start = vlm.TinyVLM(vlm.generator(0, "init")).rows
    done = {name: round((model.rows - start).mean().item()) for name, model in bases.items()}
    assert done == {"base": 10, "early": 6, "unprimed": 10}
    for name, arm in ARMS.items():
        trained.clear()
        model = go_on(bases[arm.base], arm, cfg, 0)
        steps = 3 if name.split()[0] in ("hints", "reminded", "unreminded") else 4
        assert trained == ([] if name == "early" else [(arm.diet, steps, "going on")]), name
        more = round((model.rows - bases[arm.base].rows).mean().item())
        assert more == (0 if name == "early" else steps)  # and the base is left as it was
    trained.clear()
    train_bases(replace(cfg, methods=("clean",)), 0)
    assert len(trained) == 2  # a base that no arm needs is not trained


def test_arms_of_different_diets_differ_after_one_step_and_arms_of_the_same_do_not():
    cfg = replace(TINY, methods=("clean",))
    base = train_bases(cfg, 0)["base"]
    weights = [go_on(base, ARMS[name], cfg, 0).encoder[0].weight
               for name in ("clean", "clean", "robust", "robust elsewhere")]  # fmt: skip
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2]) and not torch.equal(weights[2], weights[3])


def test_another_arm_beside_it_moves_no_number():
    cfg = replace(TINY, methods=("hints 0.5", "hints 1.0"))
    one = experiment.run(cfg, 100)
    two = experiment.run(replace(cfg, methods=("hints 1.0",)), 100)
    assert one.metrics["hints 1.0"] == two.metrics["hints 1.0"]


# --- the figure


def test_the_words_of_the_figure_are_judged_one_by_one():
    truth = "one white ring two red bar"
    told = judged_phrases("two white ring three blue cross".split(), truth)
    words = {word: color for phrase in told for word, color in phrase}
    wrong = [word for word, color in words.items() if color == WRONG]
    assert wrong == ["two", "three", "blue", "cross"]  # one ring is there, and no cross
    assert "[bar]" in words and words["white"] == words["ring"] != WRONG
    assert [w for p in judged_phrases(["nine"], "six") for w, _ in p] == ["nine", "[six]"]
    assert [c for p in judged_phrases(["ring", "cross"], "ring") for _, c in p][1] == WRONG


# --- the whole script


def test_the_whole_script_runs_draws_and_writes_its_table(tmp_path, capsys):
    cfg = replace(TINY, methods=("clean", "early", "hints 1.0"), out=str(tmp_path), quick=True,
                  save=str(tmp_path / "tiny"))  # fmt: skip
    results = experiment.main(cfg)
    printed = capsys.readouterr().out
    assert all(claim["id"] in printed for claim in results["claims"]) and "in capitals" in printed
    assert {claim["verdict"] for claim in results["claims"]} == {SMOKE}
    saved = json.loads((tmp_path / "hallu_pi.json").read_text())
    assert (tmp_path / "hallu_pi.png").stat().st_size > 20_000 and figure(saved).get_axes()
    assert set(saved["depends"]) == {"scenes", "questions", "turns", "weights"}
    rows = list(csv.DictReader(open(tmp_path / "hallu_pi.csv")))
    cell = next(r for r in rows if (r["arm"], r["metric"]) == ("always yes", "ACC before"))
    assert cell["mean"] == "50.00"
    assert vlm.load_vlm(tmp_path / "tiny").lm.config.num_hidden_layers == 3
    verdicts = {c["id"]: c["verdict"] for c in experiment.claims(saved["metrics"])}
    assert verdicts["C4"] == verdicts["C7"] == verdicts["C8"] == NOT_TESTED  # arms that did not run


def test_what_was_typed_is_obeyed():
    assert resolved(Config()).seeds == (50, 51, 52, 53)
    assert len(resolved(Config(more_seeds=True)).seeds) == 6
    assert resolved(Config(full=True)).methods == tuple(ARMS)
    for flags in ({"full": True}, {"more_seeds": True}, {}):
        typed = resolved(Config(seeds=(0, 1), methods=("early",), **flags))
        assert typed.seeds == (0, 1) and typed.methods == ("early",)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"methods": ("blurry",)}, "not known; give some of clean"),
        ({"scenes": 3}, "--scenes 3"),
        ({"steps": 0}, "--steps 0"),
        ({"lr": 0.0}, "--lr 0"),
        ({"workers": 0}, "--workers 0"),
        ({"full": True, "more_seeds": True}, "two runs"),
    ],
)
def test_wrong_arms_and_sizes_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        experiment.main(replace(TINY, **changes))


def test_the_exam_asks_the_tiny_model_as_it_is_asked_alone(exam):
    model = vlm.TinyVLM(vlm.generator(0, "init"), width=32, layers=1)
    asked = exam.block(Block(phase=BEFORE))
    answers = ask(model, asked)
    item = asked.rows[2][1]
    ((alone,),) = vlm.answer(model, asked.pictures[2:3], [[item.question]], 2)
    assert answers[item.id] == alone and len(answers) == len(asked.items)


def test_the_questions_of_one_picture_come_in_pairs(exam):
    items = questions(exam.scenes[0].shapes, "0", "none", "before", "0")
    assert items[0].task == "gen"
    for yes, no in zip(items[1::2], items[2::2]):
        assert (yes.answer, no.answer) == ("yes", "no") and yes.pair_id == no.pair_id
