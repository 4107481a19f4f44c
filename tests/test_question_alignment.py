"""Question alignment: the two stages' examples, proxy-tuning's identities, what is measured, the claims, the script end to end."""

import json
import math
import random
from dataclasses import replace
from itertools import islice

import pytest
import torch

from methods.experiments import question_alignment as qa
from methods.experiments.question_alignment import (ARMS, QALIGN, RALIGN, Arm, Config, ProxyTuned, alignment_score, claims, evaluate, response_loss,
                                        stage_1_rows, stage_2_rows, step_accuracy, train, tune)
from methods.question_alignment_tasks import parse, problems, prompt, response, response_language, run_program, translation
from minilm.claims import held
from minilm import InputError
from minilm.data import generator
from minilm.generate import generate
from minilm.transformer import Output
from minilm.weights import save_pretrained
from methods.worlds.clones import ANSWER, BOS, EOS, SOLVE, TRANSLATE, Choice, Event, Problem, CloneWorld, new_model

WORLD = CloneWorld()
EVE = Problem("Eve", "coins", 7, (Event(1, "finds", 4, 7, 11), Event(-1, "sells", 2, 11, 9)))
TINY = Config(steps=3, align_steps=2, tune_steps=2, problems=6, pairs=200, batch=4, width=32, layers=2, small_width=16, small_layers=1)


def tiny(name="init", width=32, layers=2):
    return new_model(WORLD, width, layers, generator(0, name)).eval()


# --- the examples

def test_a_translation_pair_holds_the_question_twice_and_no_answer():
    ask, answer = translation(WORLD, "cot", EVE, "b", "en")
    assert WORLD.text(ask) == "<s> <tr> Eve has_b 7 coins_b . 4 finds_b . 2 sells_b . howmany_b coins_b ? <a>"
    assert WORLD.text(answer) == "Eve has 7 coins . finds 4 . sells 2 . howmany coins ? </s>"
    assert "9" not in WORLD.text(ask + answer).split()


def test_translation_from_english_names_the_target_language():
    ask, answer = translation(WORLD, "cot", EVE, "en", "a")
    assert WORLD.gloss(ask)[2] == "answer" and WORLD.language_of[ask[2]] == "a"
    assert WORLD.text(answer).startswith("Eve has_a 7")


@pytest.mark.parametrize("task, asked, answered", [
    ("cot", f"<s> <q> {'Eve has_a 7 coins_a . finds_a 4 . sells_a 2 . howmany_a coins_a ?'} <a>",
     "finds 4 so 7 + 4 = 11 . sells 2 so 11 - 2 = 9 . answer 9 </s>"),
    ("pot", f"<s> <q> {'Eve has_a 7 coins_a . finds_a 4 . sells_a 2 . howmany_a coins_a ?'} <code>",
     "x = 7 . finds = 4 . x = x + finds . sells = 2 . x = x - sells . print x </s>")])
def test_a_question_in_any_language_is_answered_in_english(task, asked, answered):
    assert WORLD.text(prompt(WORLD, task, EVE, "a")) == asked and WORLD.text(response(WORLD, task, EVE)) == answered


def test_a_multiple_choice_question_is_answered_by_its_letter():
    c = Choice("eggs", ("river", "tower", "market"), "B")
    assert WORLD.text(prompt(WORLD, "mcq", c, "en")) == "<s> <q> where eggs ? A river B tower C market <a>"
    assert WORLD.text(response(WORLD, "mcq", c)) == "B </s>" and parse(WORLD, "mcq", response(WORLD, "mcq", c)) == "B"


def test_stage_1_controls_read_the_same_clone_questions_in_the_same_order_and_differ_in_the_target_only():
    rows = {kind: list(islice(stage_1_rows(TINY, WORLD, Arm(kind), 5), 6)) for kind in ("translate", "copy", "shuffled")}
    flat = {kind: [row for batch in batches for row in batch] for kind, batches in rows.items()}
    assert [ask for ask, _ in flat["translate"]] == [ask for ask, _ in flat["copy"]] == [ask for ask, _ in flat["shuffled"]]
    assert all(answer[:-1] == ask[2:-1] for ask, answer in flat["copy"])
    assert all({WORLD.language_of[i] for i in answer} <= {None, "en"} for kind in ("translate", "shuffled") for _, answer in flat[kind])
    starts = lambda kind: [(WORLD.tokens[ask[4]], WORLD.tokens[answer[2]]) for ask, answer in flat[kind]]
    assert all(a == b for a, b in starts("translate")) and sum(a == b for a, b in starts("shuffled")) < len(starts("shuffled")) / 2
    assert {WORLD.language_of[ask[3]] for ask, _ in flat["translate"]} == {"a", "b"}


def test_a_share_of_the_pairs_is_the_first_part_of_all_pairs():
    rows = lambda share: islice(stage_1_rows(TINY, WORLD, Arm("translate", pairs=share), 5), 60)
    asked = lambda share: {tuple(ask) for batch in rows(share) for ask, _ in batch}
    assert len(asked(0.02)) == 4 and asked(0.02) < asked(1.0) and len(asked(1.0)) > 100


def test_stage_2_gives_every_arm_the_same_problems_and_teaches_the_languages_it_should():
    rows = {name: [row for batch in islice(stage_2_rows(TINY, WORLD, arm, 5), 10) for row in batch]
            for name, arm in {"en": RALIGN, "own": Arm(None, "own"), "english": Arm(None, "english"),
                              "en-x": QALIGN._replace(en_x=True)}.items()}
    languages = lambda name, side: {WORLD.language_of[i] for row in rows[name] for i in row[side]} - {None}
    assert languages("en", 0) == languages("en", 1) == {"en"}
    assert languages("own", 0) == languages("own", 1) == languages("english", 0) == {"en", "a", "b"} and languages("english", 1) == {"en"}
    answers = lambda name: [WORLD.final_number(answer) for _, answer in rows[name]]
    assert answers("own") == answers("english") == answers("en")
    mixed = [a == b for a, b in zip(rows["en"], rows["en-x"])]
    assert 0.2 < sum(mixed) / len(mixed) < 0.8 and all(b[0][1] == (SOLVE if same else TRANSLATE) for same, (b) in zip(mixed, rows["en-x"]))


def test_no_stage_ever_asks_a_test_problem():
    for task in ("cot", "mcq"):
        tested = {str(p) for p in problems(WORLD, task, random.Random(0), 200, "test")}
        assert not tested & {str(p) for p in problems(WORLD, task, random.Random(1), 500)}
    assert all(WORLD.split(p) == "test" for p in problems(WORLD, "cot", random.Random(0), 50, "test"))


def test_the_loss_is_the_mean_over_response_tokens_end_of_sequence_included():
    model = tiny()
    rows = [translation(WORLD, "cot", EVE, "a", "en"), (prompt(WORLD, "cot", EVE, "en"), response(WORLD, "cot", EVE))]
    total, n = 0.0, 0
    for ask, answer in rows:
        logp = model(torch.tensor([ask + answer])).logits.log_softmax(-1)[0]
        total -= sum(logp[len(ask) - 1 + k, token].item() for k, token in enumerate(answer))
        n += len(answer)
    assert response_loss(model, rows).item() == pytest.approx(total / n, rel=1e-5)


# --- proxy-tuning

def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_proxy_tuning_a_model_by_itself_is_the_tuned_model_and_alpha_0_or_no_difference_is_the_untuned_one():
    ids = torch.tensor([[BOS, 9, 30, 12]])
    large, base, expert = tiny("large"), tiny("base", 16, 1), tiny("expert", 16, 1)
    same(ProxyTuned(base, expert, base)(ids).logits, expert(ids).logits)
    same(ProxyTuned(large, expert, base, alpha=0.0)(ids).logits, large(ids).logits)
    same(ProxyTuned(large, expert, expert, alpha=1.5)(ids).logits, large(ids).logits)
    same(ProxyTuned(large, expert, base, 0.5)(ids).logits, large(ids).logits + 0.5 * (expert(ids).logits - base(ids).logits))


def test_log_probabilities_give_the_same_choice_as_raw_logits():
    ids = torch.tensor([[BOS, 9, 30, 12]])
    models = tiny("large"), tiny("expert", 16, 1), tiny("base", 16, 1)
    z = ProxyTuned(*models)(ids).logits
    p = [m(ids).logits.log_softmax(-1) for m in models]
    same(z.softmax(-1), (p[0] + p[1] - p[2]).softmax(-1))


def test_three_caches_read_the_chosen_tokens_and_padding_changes_nothing():
    model = ProxyTuned(tiny("large"), tiny("expert", 16, 1), tiny("base", 16, 1)).eval()
    prompts = [prompt(WORLD, "cot", EVE, "a"), [BOS, SOLVE, 20, ANSWER]]
    together = generate(model, prompts, max_new_tokens=8)
    for ask, out in zip(prompts, together):
        row = list(ask)
        for _ in range(8):  # without any cache
            row.append(model(torch.tensor([row])).logits[0, -1].argmax().item())
        assert out == row


def test_ids_that_one_of_the_models_lacks_are_never_chosen():
    long = new_model(CloneWorld(languages=("en", *"abcde")), 16, 1, generator(0, "long"))
    assert ProxyTuned(tiny(), long, tiny("base", 16, 1))(torch.tensor([[BOS, 9]])).logits.shape[-1] == len(WORLD.tokens)


# --- measures, by hand

@pytest.mark.parametrize("source, shown", [
    ("x = 7\nfinds = 4\nx = x + finds\nprint(x)", 11), ("print(2 * 3 - 1 / 2)", 5.5), ("print(1)\nprint(2)", 2), ("x = 3", None),
    ("", None),
    ("print(y)", None), ("print(1 / 0)", None), ("x = = 3\nprint(x)", None), ("import os\nprint(1)", None), ("print(9 ** 9)", None),
    ("x = 9999999999\nx = x * x\nprint(x)", None), ("print(open('f'))", None), ("print(x := 3)", None), ("print('3')", None),
    ("for i in (1,):\n    print(i)", None), ("print(1, 2)", None), ("x.y = 3\nprint(3)", None), ("(" * 300 + "1" + ")" * 300, None)])
def test_programs_are_read_never_run(source, shown):
    assert run_program(source) == shown


def test_the_worlds_programs_compute_what_its_worked_answers_say():
    for p in problems(WORLD, "cot", random.Random(0), 40):
        assert parse(WORLD, "pot", response(WORLD, "pot", p)) == parse(WORLD, "cot", response(WORLD, "cot", p)) == p.final
    assert parse(WORLD, "pot", WORLD.encode("x = 7 . x = x + finds . print x".split())) is None
    assert parse(WORLD, "mcq", [EOS, WORLD.id["A"]]) is None


def test_a_responses_language_is_that_of_most_of_its_words():
    ids = lambda text: WORLD.encode(text.split())
    assert response_language(WORLD, ids("finds 4 so 7 + 4 = 11 .")) == "en"
    assert response_language(WORLD, ids("finds 4") + WORLD.encode(["so", "answer"], "a")) == "a"
    assert response_language(WORLD, ids("7 + 4 = 11 .")) is None


def test_the_alignment_score_is_1_for_equal_orthogonal_pairs_and_0_for_unrelated_ones():
    # two pairs, already centred: x = (1, -1), y = (1, -1) on one axis: parallel cosine 1, other cosine -1: 1 - -1 = 2
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert alignment_score(x, x).item() == pytest.approx(2.0) and alignment_score(x, x.flip(0)).item() == pytest.approx(-2.0)
    # a language's own offset does not count, and neither does the size of vectors
    assert alignment_score(x, 5 * x + torch.tensor([3.0, 7.0])).item() == pytest.approx(2.0)
    gen = generator(0, "vectors")
    x, y = torch.randn(3, 200, 32, generator=gen), torch.randn(3, 200, 32, generator=gen)
    assert alignment_score(x, y).shape == (3,) and alignment_score(x, y).abs().max() < 0.05
    n = 200  # centred vectors have mean cosine -1 / (n - 1) with the others
    assert alignment_score(x, x)[0].item() == pytest.approx(1 + 1 / (n - 1), abs=0.02)


class Oracle(torch.nn.Module):
    """Answers every question in the test from a table; says `wrong` for the verbs of languages in it."""

    def __init__(self, world, test, languages, answer_language="en"):
        super().__init__()
        self.p, self.world = torch.nn.Parameter(torch.zeros(1)), world
        self.table = {tuple(prompt(world, "cot", p, x)): response(world, "cot", p, answer_language) for p in test for x in languages}

    def new_cache(self, B):
        return [None] * B

    def forward(self, ids, cache=None, attention_mask=None):
        logits = torch.zeros(*ids.shape, len(self.world.tokens))
        for i, row in enumerate(ids.tolist()):
            if cache is not None:
                row = cache[i] = [t for t in (cache[i] or []) + row if t]
            for t in range(ids.shape[1]):
                seen = tuple(row[: len(row) - ids.shape[1] + t + 1]) if cache is not None else tuple(row[: t + 1])
                k = next((k for k in range(len(seen), 0, -1) if seen[:k] in self.table), None)
                said = self.table[seen[:k]] if k else []
                if k and len(seen) - k < len(said):
                    logits[i, t, said[len(seen) - k]] = 1.0
        return Output(logits)


def test_an_oracle_for_some_languages_is_right_in_these_and_the_measures_say_so():
    test = problems(WORLD, "cot", random.Random(0), 12, "test")
    metrics, _ = evaluate(replace(TINY, problems=12), Oracle(WORLD, test, ("en", "a")), WORLD, test, "cot")
    assert metrics["en"] == metrics["a"] == metrics["agreement a"] == metrics["kept a"] == 1 and metrics["b"] == metrics["agreement b"] == 0
    assert metrics["aligned"] == metrics["verb aligned"] == 0.5 and metrics["unseen"] == 0 and metrics["consistency a"] == 0
    for name in ("verb", "amount", "sign", "result"):
        assert metrics[f"{name} en"] == metrics[f"{name} a"] == 1
    metrics, _ = evaluate(TINY, Oracle(WORLD, test, ("a",), "a"), WORLD, test, "cot")
    assert metrics["a"] == metrics["consistency a"] == 1 and metrics["agreement a"] == 0 == metrics["kept a"]


def test_step_accuracy_looks_at_the_verb_amount_sign_and_result_of_every_event():
    row = WORLD.text(response(WORLD, "cot", EVE)).split()
    assert [row[9 * e + k] for e in (0, 1) for k in (0, 1, 4, 7)] == ["finds", "4", "+", "11", "sells", "2", "-", "9"]
    assert set(step_accuracy(tiny(), WORLD, [EVE], "a")) == {"verb", "amount", "sign", "result"}


# --- arms and training

def test_arms_differ_from_the_method_in_one_thing():
    q = ARMS["qalign->ralign"]
    assert ARMS["ralign"] == q._replace(stage_1=None) and ARMS["copy->ralign"] == q._replace(stage_1="copy")
    assert ARMS["shuffled->ralign"] == q._replace(stage_1="shuffled") and ARMS["qalign only"] == q._replace(stage_2=None)
    assert ARMS["+en-x"] == q._replace(en_x=True) and ARMS["joint"].order == "joint" and ARMS["base"] == Arm()


def test_each_arm_gives_the_same_model_alone_and_beside_others_and_shared_stages_are_not_changed_by_later_ones():
    weights = lambda model: torch.cat([p.flatten() for p in model.parameters()])
    models = {}
    for name in ("base", "ralign", "qalign->ralign", "+en-x", "ralign->qalign", "joint"):
        tune(TINY, WORLD, 5, ARMS[name], models)
    for name in ("base", "qalign only", "+en-x", "ralign->qalign"):
        assert torch.equal(weights(models[ARMS[name]]), weights(tune(TINY, WORLD, 5, ARMS[name], {})))
    assert len({weights(m).sum().item() for m in models.values()}) == len(models)


def test_proxy_arms_take_the_untuned_or_tuned_large_model_and_the_right_small_ones():
    models = {}
    proxy = tune(TINY, WORLD, 5, ARMS["proxy 1.5"], models)
    assert proxy.model is models[ARMS["base"]] and proxy.expert is models[ARMS["small qalign->ralign"]]
    assert proxy.anti is models[ARMS["small base"]] and proxy.alpha == 1.5
    second = tune(TINY, WORLD, 5, ARMS["ralign + proxy"], models)
    assert second.model is models[ARMS["ralign"]] and second.anti is models[ARMS["small ralign"]] and second.expert is proxy.expert


def test_stage_1_teaches_translation_and_a_batch_can_be_learnt_by_heart():
    model, rows = tiny(), next(stage_1_rows(TINY, WORLD, Arm("translate"), 0))
    before = response_loss(model, rows).item()
    train(model, iter([rows] * 160), 160, 3e-3, "by heart")
    assert response_loss(model, rows).item() < 0.1 < before
    ask, answer = rows[0]
    assert generate(model, [ask], 30, eos_id=EOS)[0] == ask + answer


def test_a_base_is_saved_read_again_and_refused_when_its_shape_differs(tmp_path):
    cfg = replace(TINY, base=str(tmp_path / "bases"))
    first, again = (tune(cfg, WORLD, 5, Arm(), {}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    with pytest.raises(InputError, match="another shape"):
        tune(replace(cfg, width=64), WORLD, 5, Arm(), {})
    save_pretrained(new_model(CloneWorld(verbs=9), 32, 2, generator(0, "x")), tmp_path / "bases" / "seed-6-large")
    with pytest.raises(InputError, match="another shape or vocabulary"):
        tune(cfg, WORLD, 6, Arm(), {})


# --- the script

def made_up(**rows):
    """metrics for every arm: a paper's dream, changed by rows {arm: {metric: mean}}."""
    good = {"en": 0.97, "a": 0.7, "b": 0.7, "aligned": 0.7, "unseen": 0.2, "consistency aligned": 0.0, "alignment aligned": 0.8,
            "agreement aligned": 0.7, "verb aligned": 0.8, "verb-blind": 0.3}
    poor = good | {"a": 0.2, "b": 0.2, "aligned": 0.2, "alignment aligned": 0.3, "agreement aligned": 0.2, "verb aligned": 0.1}
    table = dict.fromkeys(ARMS, poor) | {name: good for name in ("qalign->ralign", "pot qalign->ralign", "mcq qalign->ralign", "joint")}
    table |= {
        "base": poor | {"en": 0.1}, "qalign only": poor | {"en": 0.0, "aligned": 0.0, "alignment aligned": 0.9},
        "ralign->qalign": poor | {"en": 0.1, "aligned": 0.0}, "+en-x": good | {"consistency aligned": 0.5, "aligned": 0.5},
        "small qalign->ralign": good | {"aligned": 0.5},
        "proxy 1": good | {"aligned": 0.6}, "pairs 1%": good | {"aligned": 0.4}, "pairs 10%": good | {"aligned": 0.6}}
    table = {arm: row | rows.get(arm.replace("->", "_").replace(" ", "_"), {}) for arm, row in table.items()}
    return {arm: {name: {"mean": value, "sd": 0.0, "values": [value] * 4} for name, value in row.items()} for arm, row in table.items()}


def verdicts(metrics):
    return {c["id"]: held(c) for c in claims(metrics)}


def test_the_claims_hold_on_numbers_that_agree_with_the_paper():
    assert set(verdicts(made_up()).values()) == {True}


def test_the_claims_fail_on_numbers_that_contradict_it():
    flat = {"a": 0.3, "b": 0.3, "aligned": 0.3, "alignment aligned": 0.3, "agreement aligned": 0.3, "verb aligned": 0.3}
    even = dict.fromkeys(("ralign", "qalign_ralign", "copy_ralign", "qalign_only", "ralign_qalign", "small_ralign", "small_qalign_ralign",
                          "proxy_1", "pairs_1%", "pairs_10%", "pot_ralign", "pot_qalign_ralign", "mcq_ralign",
                          "mcq_qalign_ralign"), flat)
    even |= {"shuffled_ralign": flat | {"aligned": 0.4}, "translate-train": {"aligned": 0.5}, "ralign": flat | {"en": 0.87},
             "+en-x": {"aligned": 0.4, "consistency aligned": 0.1}}
    assert set(verdicts(made_up(**even)).values()) == {False}


def test_one_seed_against_the_rule_is_enough_to_fail_a_rule_on_every_seed():
    metrics = made_up()
    metrics["qalign->ralign"]["aligned"]["values"] = [0.9, 0.9, 0.9, 0.1]
    assert verdicts(metrics)["C1"] is False and verdicts(metrics)["R1"] is False and verdicts(metrics)["C3"] is True


def test_multiple_choice_that_rises_to_its_chance_has_gained_nothing():
    risen = made_up(mcq_ralign={"aligned": 0.28}, mcq_qalign_ralign={"aligned": 0.34})
    assert verdicts(risen)["C10"] is False and verdicts(made_up(mcq_qalign_ralign={"aligned": 0.39}))["C10"] is True


def test_an_arm_that_fails_in_english_leaves_its_claims_without_a_verdict():
    metrics = made_up()
    metrics["ralign"]["en"]["values"] = [0.97, 0.97, 0.97, 0.6]
    found = {c["id"]: c for c in claims(metrics)}
    assert held(found["C1"]) is None and "ralign 0.60" in found["C1"]["measured"] and held(found["C3"]) is True
    assert verdicts({arm: row for arm, row in made_up().items() if arm in Config().arms})["C5"] is None


def test_the_whole_script_runs_writes_its_files_and_prints_every_claim(tmp_path, capsys):
    results = qa.main(Config(quick=True, workers=1, out=str(tmp_path)))
    printed = capsys.readouterr().out
    assert (tmp_path / "question_alignment.png").stat().st_size > 10_000
    saved = json.loads((tmp_path / "question_alignment.json").read_text())
    assert saved["claims"] == [row | {"verdict": "smoke run"} for row in json.loads(json.dumps(claims(saved["metrics"])))] and set(saved["metrics"]) == set(Config().arms)
    assert "[finds" in printed or "] " not in printed.splitlines()[0]
    for c in results["claims"]:
        assert f"\n{c['id']} " in printed


def test_every_arm_of_the_full_run_can_be_made_and_measured():
    outcome = qa.run(replace(TINY, arms=tuple(ARMS)), 100)
    assert set(outcome.metrics) == set(ARMS) and all(math.isfinite(v) for row in outcome.metrics.values() for v in row.values())
    assert "verb aligned" in outcome.metrics["proxy 1"] and "verb aligned" not in outcome.metrics["mcq ralign"]


@pytest.mark.parametrize("change, words", [
    ({"arms": ("qalign",)}, "qalign is not known"), ({"arms": ()}, "--arms"), ({"problems": 0}, "--problems"), ({"steps": 0}, "--steps")])
def test_wrong_settings_are_refused_in_one_line(change, words, tmp_path):
    with pytest.raises(InputError, match=words):
        qa.main(replace(Config(quick=True, workers=1, out=str(tmp_path)), **change))
    assert not list(tmp_path.iterdir())
