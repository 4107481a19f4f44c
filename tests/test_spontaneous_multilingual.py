"""Spontaneous multilingual learners: rows, label masses, AUC, correlation by hand; what keeps the experiment honest; the whole script."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from methods.experiments import spontaneous_multilingual as method
from methods.experiments.spontaneous_multilingual import (ARMS, DEV, LANGUAGES, QT, SEEN, TEST, Arm, Config, Exam, auc, claims, correlations, examine,
                                              label_masses, pretraining_mix, read_states, translation_loss, translation_rows, tune)
from minilm.claims import held
from minilm import InputError
from minilm.data import generator
from methods.worlds.clones import ANSWER, BOS, TRANSLATE, CloneWorld, document, new_model

QUICK = Config(quick=True, seeds=(100,), steps=2, tune_steps=4, items=20, rows=12, workers=1)


@pytest.fixture(scope="module")
def world():
    return CloneWorld(100, LANGUAGES, cognates=0.5)


@pytest.fixture
def model(world):
    return new_model(world, 32, 2, generator(0, "init"))


# --- rows

def test_a_row_asks_in_one_language_and_answers_with_the_same_question_in_english(world):
    rows = translation_rows(QUICK, world, QT, 100)
    assert len(rows) == 2 * QUICK.rows
    for number, (question, answer) in enumerate(rows):
        source = SEEN[number // QUICK.rows]
        assert question[0] == BOS and question[-2:] == [ANSWER, TRANSLATE] and answer[-1] == ANSWER  # both slots opened, nothing behind
        assert {world.language_of[i] for i in question} <= {None, source} and {world.language_of[i] for i in answer} <= {None, "en"}
        assert sorted(world.gloss(question[1:-2])) == sorted(world.gloss(answer[:-1]))
        if source == "a":  # (b is verb-final)
            assert world.gloss(question[1:-2]) == world.gloss(answer[:-1])


def test_no_translation_row_holds_a_label_and_no_tuned_row_a_language_of_the_test(world):
    labels = {i for word in method.LABELS for language in LANGUAGES for i in world.encode([word], language)}
    for name, arm in ARMS.items():
        for question, answer in translation_rows(QUICK, world, arm, 100):
            assert not labels & set(question) and (bool(labels & set(answer)) == arm.labelled), name
            assert not {world.language_of[i] for i in question + answer} & {*DEV, *TEST}, name


def test_arms_differ_in_one_thing(world):
    rows = {name: translation_rows(QUICK, world, arm, 100) for name, arm in ARMS.items()}
    assert Arm() == ARMS["base"] and rows["base"] == []
    assert QT == ARMS["shuffled"]._replace(shuffled=False) == ARMS["mono"]._replace(pairs=QT.pairs)
    assert [q for q, _ in rows["shuffled"]] == [q for q, _ in rows["qt"]]
    assert sorted(a for _, a in rows["shuffled"]) == sorted(a for _, a in rows["qt"])
    assert not any(a == b for a, b in zip(rows["shuffled"], rows["qt"]))
    assert [a for _, a in rows["mono"]] == [a for _, a in rows["qt"]] == [q[1:-1] for q, _ in rows["mono"]]
    assert {len(r) for name, r in rows.items() if name != "base"} == {2 * QUICK.rows}


def test_what_the_exam_asks_is_never_in_pretraining_in_tuning_or_among_the_examples(world):
    exam, rng = Exam(QUICK, world, 100), method.random.Random("documents")
    key = lambda p: (p.start, tuple((e.sign, e.amount) for e in p.events))
    asked = {key(p) for p in exam.questions}
    assert not asked & {key(p) for shots in exam.shots for p in shots}
    told = {tuple(world.statement(p, language)[2:]) for p in exam.questions for language in LANGUAGES}  # (from the first number on)
    holds = lambda text: any(tuple(text[i : i + len(t)]) == t for t in told for i in range(len(text)))
    assert holds([BOS, *next(iter(told))])
    assert not any(holds(document(world, pretraining_mix(QUICK), rng)) for _ in range(150))
    assert not any(holds(question + answer) for question, answer in translation_rows(QUICK, world, QT, 100))


def test_no_clone_text_is_labelled_and_the_template_of_tuning_never_occurs_in_pretraining(world):
    rng, labelled = method.random.Random("documents"), 0
    for _ in range(600):
        ids = document(world, pretraining_mix(QUICK), rng)
        assert TRANSLATE not in ids
        if ANSWER in ids:
            labelled += 1
            assert {world.language_of[i] for i in ids} <= {None, "en"}
    assert labelled > 50


def test_half_of_the_exam_shares_its_verbs_between_the_clones_and_half_shares_none(world):
    exam = Exam(QUICK, world, 100)
    assert exam.cognate.tolist() == [True, False] * 10
    for p, cognate in zip(exam.questions, exam.cognate.tolist()):
        verbs = [{i for event in p.events for i in world.encode([event.verb], language)} for language in ("a", "b", "e", "f")]
        shared = set.intersection(*verbs)
        assert bool(shared) == cognate
        assert not shared & {i for event in p.events for i in world.encode([event.verb], "en")}  # never with English
    assert Exam(replace(QUICK, cognates=0), CloneWorld(100, LANGUAGES), 100).cognate.sum() == 0


def test_a_prompt_holds_both_labels_and_ends_at_the_opened_slot(world):
    exam = Exam(QUICK, world, 100)
    for prompt in exam.prompts("f"):
        words = world.gloss(prompt)
        assert words.count("more") == words.count("less") == 1 and prompt[-1] == ANSWER and prompt[0] == BOS
        assert {world.language_of[i] for i in prompt} == {None, "f", "en"}  # en: the two labels
    assert [len(p) for p in exam.prompts("a")] == [len(p) for p in exam.prompts("e")]


# --- loss and training

def test_only_the_translation_is_learned_two_routes(world, model):
    rows = translation_rows(QUICK, world, QT, 100)[:5]
    total, count = 0.0, 0
    for question, answer in rows:  # one at a time, from the definition
        logp = model(torch.tensor([[*question, *answer]])).logits[0].log_softmax(-1)
        total -= sum(logp[len(question) + t - 1, token].item() for t, token in enumerate(answer))
        count += len(answer)
    assert translation_loss(model, rows).item() == pytest.approx(total / count, rel=1e-5)


def test_tuning_lowers_the_loss_and_moves_query_and_value_projections_by_rank_8_only(world, model):
    before, rows = copy.deepcopy(model), translation_rows(QUICK, world, QT, 100)
    losses = tune(replace(QUICK, tune_steps=20, tune_lr=1e-2), model, rows, 100)
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert moved == {f"layers.{i}.self_attn.{x}_proj.weight" for i in (0, 1) for x in "qv"}
    for name in moved:
        assert torch.linalg.matrix_rank(model.get_parameter(name) - before.get_parameter(name), rtol=1e-3) <= 8


# --- label masses, AUC, correlation

def test_label_masses_by_hand():
    # V = 4, D = 4, no blocks' help needed: norm and head are identities, so p = softmax(h)
    class Head:
        embed, norm, lm_head = torch.nn.Embedding(4, 4), torch.nn.Identity(), torch.nn.Identity()
    h = torch.tensor([[math.log(1.0), math.log(2.0), math.log(3.0), math.log(4.0)], [0.0, 0.0, 0.0, 0.0]])
    masses, entropy = label_masses(Head, h, [{0, 3}, {2}])
    torch.testing.assert_close(masses, torch.tensor([[0.5, 0.3], [0.5, 0.25]]))
    assert entropy[1].item() == pytest.approx(2.0)  # four equally likely tokens: two bits


def test_the_lens_at_the_last_layer_is_the_models_own_answer_and_padding_changes_nothing(world, model):
    prompts = Exam(QUICK, world, 100).prompts("e")
    states = read_states(model, prompts, batch=7)
    masses, _ = label_masses(model, states.last[-1], [[5], [6, 7]])
    for prompt, mass, pooled in zip(prompts, masses, states.mean[1]):
        out = model(torch.tensor([prompt]), output_hidden_states=True)
        p = out.logits[0, -1].softmax(-1)
        torch.testing.assert_close(mass, torch.stack([p[5], p[6] + p[7]]), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(pooled, out.hidden_states[1][0].mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("score, positive, expected", [
    ([3.0, 1.0, 2.0], [1, 0, 0], 1.0), ([1.0, 2.0, 3.0], [1, 0, 0], 0.0), ([2.0, 2.0, 1.0, 3.0], [1, 0, 0, 1], (0.5 + 1 + 1 + 1) / 4)])
def test_auc_by_hand(score, positive, expected):
    assert auc(torch.tensor(score), torch.tensor(positive).bool()) == pytest.approx(expected)
    assert auc(torch.tensor(score) * 5 + 100, torch.tensor(positive).bool()) == pytest.approx(expected)  # bias and scale change nothing


def test_prompt_length_makes_a_correlation_that_vanishes_when_it_is_regressed_out():
    gen = generator(0, "states")
    lengths = torch.randint(10, 40, (400,), generator=gen)
    noise = lambda: torch.randn(400, generator=gen)
    direction = torch.tensor([1.0, 0, 0])
    meaning = noise()
    only_length = {l: (lengths + noise())[:, None] * direction for l in ("en", "a")}
    r, partial = correlations(only_length, {"en": lengths, "a": lengths})["a"]
    assert r > 0.95 and abs(partial) < 0.15
    also_meaning = {l: (lengths + 3 * meaning + noise())[:, None] * direction for l in ("en", "a")}
    r, partial = correlations(also_meaning, {"en": lengths, "a": lengths})["a"]
    assert partial == pytest.approx(0.9, abs=0.05)  # 9 / (9 + 1)


def test_the_base_arm_is_the_base_and_an_arm_gives_the_same_numbers_alone():
    both = method.run(replace(QUICK, arms=("base", "qt")), 100)
    alone = method.run(replace(QUICK, arms=("base", "mono", "qt")), 100)
    assert both.metrics["qt"] == alone.metrics["qt"] and both.metrics["base"] == alone.metrics["base"]
    assert method.run(replace(QUICK, arms=("base",)), 101).metrics["base"] != both.metrics["base"]
    assert both.metrics["base"] != both.metrics["qt"]


def test_a_model_without_any_preference_scores_chance(world, model):
    torch.nn.init.zeros_(model.lm_head.weight)
    metrics, series = examine(replace(QUICK, layers=2, width=32), model, Exam(QUICK, world, 100))
    assert metrics["auc test"] == 0.5 and metrics["mass test"] == pytest.approx(2 / len(world.tokens), rel=1e-4)
    assert series["lens test"][1] == pytest.approx([1 / len(world.tokens)] * 3, rel=1e-4)


# --- the script

def table(**arms):
    """Made-up metrics: arm -> (seen, unseen, own words, English accuracy, lens, correlation)."""
    names = (("auc seen", "acc seen"), ("auc test", "acc test", "calibrated test", "auc cognate test"), ("auc own words test",),
             ("acc en", "auc en"), ("lens test",), ("r test", "partial r test"))
    cell = lambda v: {"mean": sum(v) / len(v), "sd": 0.0, "values": list(v)}
    spread = lambda v: v if isinstance(v, tuple) else (v,) * 5
    return {arm: {name: cell(spread(v)) for group, v in zip(names, row) for name in group} for arm, row in arms.items()}


BASE = (0.7, 0.7, 0.7, 0.95, 0.3, 0.5)


def test_claims_hold_on_numbers_like_the_papers_and_fail_on_the_opposite():
    verdicts = lambda **arms: {c["id"]: held(c) for c in claims(table(base=BASE, **arms))}
    good, poor = (0.85, 0.8, 0.8, 0.94, 0.4, 0.6), (0.6, 0.6, 0.6, 0.8, 0.2, 0.4)
    others = {"shuffled": poor, "mono": BASE}
    agree = verdicts(qt=good, **{"to-clone": good}, **others)
    assert agree == {"G": True, "C1": True, "C2": True, "C2o": True, "C3": True, "C4": None, "C5": True, "C6": True, "C7": True, "R1": True}
    oppose = verdicts(qt=poor, **{"to-clone": poor}, shuffled=good, mono=BASE)
    assert oppose == {"G": True, "C1": False, "C2": False, "C2o": False, "C3": False, "C4": None, "C5": False, "C6": False, "C7": False,
                      "R1": False}
    assert verdicts(qt=good, shuffled=poor)["C1"] is None  # without a control there is no verdict


def test_a_gain_that_a_control_shows_as_well_or_that_few_seeds_show_is_no_gain():
    verdicts = lambda qt, mono: {c["id"]: held(c) for c in claims(table(base=BASE, qt=qt, mono=mono, shuffled=BASE))}
    good = (0.85, 0.8, 0.8, 0.94, 0.4, 0.6)
    assert verdicts(good, good)["C2"] is False
    lucky = (0.85, (1.0, 1.0, 1.0, 0.69, 0.69), 0.8, 0.94, 0.4, 0.6)  # mean .876, but three seeds of five
    assert verdicts(lucky, BASE)["C2"] is False and verdicts(lucky, BASE)["C1"] is True


def test_states_and_middle_layers_must_move_further_than_in_the_controls():
    verdicts = lambda mono: {c["id"]: held(c) for c in claims(table(base=BASE, qt=(0.85, 0.8, 0.8, 0.94, 0.4, 0.6), mono=mono,
                                                                       shuffled=BASE))}
    two_of_five = (0.5, 0.5, 0.5, 0.65, 0.65)  # the control's correlation is above qt's .6 in two seeds: three of five are not 80%
    assert verdicts((0.7, 0.7, 0.7, 0.95, 0.3, two_of_five))["C6"] is False and verdicts(BASE)["C6"] is True
    assert verdicts((0.7, 0.7, 0.7, 0.95, 0.45, 0.5))["C5"] is False and verdicts(BASE)["C5"] is True


def test_where_true_pairs_give_nothing_shuffled_pairs_have_nothing_to_refute():
    refutation = lambda qt, shuffled: claims(table(base=BASE, qt=qt, mono=BASE, shuffled=shuffled))[-1]
    good = (0.85, 0.8, 0.8, 0.94, 0.4, 0.6)
    assert held(refutation(good, BASE)) is True and held(refutation(good, good)) is False
    nothing = refutation(BASE, BASE)
    assert held(nothing) is None and nothing["measured"].startswith("nothing to refute; auc test: shuffled")


def test_when_a_gate_fails_there_is_no_verdict():
    for base in ((0.7, 0.5, 0.7, 0.95, 0.3, 0.5), (0.7, 0.7, 0.7, 0.7, 0.3, 0.5), (0.7, 0.95, 0.7, 0.95, 0.3, 0.5)):
        rows = claims(table(base=base, qt=BASE, shuffled=BASE, mono=BASE))
        assert held(rows[0]) is False and all(held(c) is None for c in rows[1:])
        assert "gate failed" in rows[1]["measured"]


def test_the_whole_script_runs_writes_its_files_and_prints_every_claim(tmp_path, capsys):
    results = method.main(Config(quick=True, workers=1, out=str(tmp_path)))
    printed = capsys.readouterr().out
    assert (tmp_path / "spontaneous_multilingual.json").exists() and (tmp_path / "spontaneous_multilingual.png").stat().st_size > 10_000
    assert all(f"\n{c['id']} " in printed for c in results["claims"]) and "<a> <tr> ->" in printed
    assert set(results["metrics"]) == set(Config().arms)


@pytest.mark.parametrize("change, words", [
    ({"arms": ("base", "qtt")}, "--arms qtt"), ({"arms": ("base",)}, "must name base and qt"), ({"shots": 3}, "--shots 3"),
    ({"share": 0.2}, "--share 0.2"), ({"cognates": 1.5}, "--cognates 1.5")])
def test_wrong_settings_are_refused_in_one_line(change, words, tmp_path):
    with pytest.raises(InputError, match=words):
        method.main(replace(QUICK, out=str(tmp_path), **change))
    assert not list(tmp_path.iterdir())
