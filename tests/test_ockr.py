"""OCKR: the data construction against the paper's table, the laws that keep it honest, the scorers by hand, and the whole script."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from methods.experiments import ockr
from methods.experiments.ockr import FULL, GATE, Config, candidate_accuracy, chance, claims, retrieved
from methods.ockr import LEVELS, Words, accuracy, by_length, everything, in_context, parse, train
from methods.ockr_tasks import FIRST, MINI, SECOND, SETTINGS, YEARS, Fact, BirthYears, build, clone, label, make_task
from minilm.claims import held
from minilm import InputError
from minilm.data import IGNORE, generator, prompt_masked
from minilm.results import ROOT
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer

TASKS = (*LEVELS["simple"], *LEVELS["hard"])
TEN = MINI._replace(forms={form: [MINI.forms[form][0]] * 10 for form in MINI.forms}, translate=["translate"] * 10)  # ten "paraphrases"


def names(seed=0):
    every = [a + b for a in FIRST for b in SECOND]
    random.Random(seed).shuffle(every)
    return every


def world(k=4, style=MINI, seed=0):
    return BirthYears(names(seed), k, style, str(seed))


# --- the data construction

PUBLISHED = {  # training rows and test rows per setting
    "aa": ((3000, 7000, 8200, 10200), 620), "aa-hard": ((2960, 6960), 600), "ar": ((4200, 8200, 10200, 6200), 620),
    "ar-hard": ((4200, 8200), 620), "rr": ((8000, 12000, 12000, 12000), 1200),
    "rr-hard": ((8000, 12000), 1200), "xling": ((4200, 2200), 600)}


@pytest.mark.parametrize("task", PUBLISHED)
def test_at_the_papers_size_every_file_has_the_published_number_of_rows(task):
    counts, tests = PUBLISHED[task]
    for setting, count in zip(SETTINGS, counts):
        rows, test = build(world(10, TEN), task, setting)
        assert (len(rows), len(test)) == (count, tests)
        targets = [row.label for row in test if row.kind == "target"]
        if task in ("aa", "rr", "rr-hard"):
            assert Counter(targets) == {"Yes": 200, "No": 200}
        elif task == "aa-hard":
            assert Counter(targets) == {"Yes": 190, "No": 190}
        else:
            assert len(targets) == 200 and set(Counter(targets).values()) == {10}


def truth(w: BirthYears, fact: Fact) -> bool | int:
    """The answer by looking years up; the generations of the R+R hard world are its group numbers."""
    a, b = w.born.get(fact.a), w.born.get(fact.b)
    return {"year": a, "same": a == b, "older": b is not None and a < b, "parent": a == b, "grandparent": a == b}[fact.form]


@pytest.mark.parametrize("task", ["aa", "aa-hard", "ar", "rr", "rr-hard"])
def test_every_fact_is_true_in_the_world_and_every_target_follows_from_its_two_premises(task):
    w = world()
    T = make_task(w, task)
    facts = [f for group in T.premises.values() for f in group] + T.format + T.conclusions + T.shown
    facts += [f for f, _ in T.targets + T.chains] + [p for f, via in T.targets + T.chains for p in w.premises(f, via)]
    for fact in facts + [f for pair in T.adjacent for f in pair]:
        assert fact.value == truth(w, fact), fact


def test_in_the_hard_level_of_a_r_everybody_is_born_one_year_before_their_anchor():
    w = world()
    T = make_task(w, "ar-hard")
    assert {f.value for f, _ in T.targets} == set(range(1990, 2010))
    for fact, z in T.targets:
        assert fact.value == w.born[z] - 1 and w.premises(fact, z) == (Fact("before", fact.a, z, True), w.year(z))
    assert all(f.value is (w.born[f.a] == w.born[f.b]) for f in T.premises["Y and Z"] + T.premises["Y and not Z"])


@pytest.mark.parametrize("task", TASKS)
def test_both_premises_of_every_target_are_trained_and_the_target_is_not(task):
    w = world()
    T = make_task(w, task)
    trained = {f for group in T.premises.values() for f in group}
    either_way = lambda f: {f, f._replace(a=f.b, b=f.a)} if f.form == "same" else {f}
    for fact, via in T.targets:
        assert all(either_way(p) & trained for p in w.premises(fact, via)), fact
    for setting in SETTINGS[: 2 if "hard" in task else 4]:
        rows, test = build(w, task, setting)
        questions = {row.prompt for row in rows}
        for fact, _ in T.targets:
            for t in range(3):
                assert not {w.question(f, t) for f in either_way(fact)} & questions
        assert all(row.label in row.answer for row in test)


def test_the_target_carries_no_marginal_cue_each_y_and_each_z_is_as_often_right_as_wrong():
    w = world()
    for task in ("aa", "rr", "rr-hard"):
        for which in ("a", "b"):
            tally = Counter((getattr(f, which), f.value) for f, _ in make_task(w, task).targets)
            assert all(tally[name, True] == tally[name, False] for name, _ in tally)


def test_adjacent_adds_samples_of_two_questions_and_two_answers_in_the_same_order():
    w = world()
    separate, adjacent = (build(w, "ar", s)[0] for s in ("separate", "adjacent"))
    assert adjacent[: len(separate)] == separate
    for row in adjacent[len(separate) :]:
        first_is_year = row.prompt.split()[0] in ("when", "born", "dated")
        assert row.prompt.count("?") == 2 and (row.answer.split()[0] not in ("Yes", "No")) == first_is_year
    assert len({r.prompt.split()[0] in ("when", "born", "dated") for r in adjacent[len(separate) :]}) == 2  # both orders occur


def test_chain_of_thought_years_of_x_occur_inside_chains_only_and_years_of_y_as_plain_facts_only():
    w = world()
    rows, _ = build(w, "aa", "cot")
    x, y = {n for g in w.X for n in g}, {n for g in w.Y for n in g}
    chained = {n for row in rows if "Therefore" in row.answer for n in row.prompt.split()}
    plain = {row.prompt.split()[1] for row in rows if row.prompt.split()[0] in ("when", "born", "dated")}
    assert x <= chained and not y & chained and y <= plain and not x & plain


def test_the_oracle_trains_every_second_y_and_asks_for_the_others():
    w = world()
    rows, test = build(w, "aa", "oracle")
    trained, asked = ({row.prompt.split()[1] for row in test if row.kind == kind} for kind in ("trained target", "target"))
    assert not trained & asked and len(trained) == len(asked) == YEARS * w.k // 2
    assert not any(name in row.prompt for row in rows for name in asked if row.label in ("Yes", "No"))


def test_the_in_context_control_holds_both_premises_and_the_old_world_no_bare_yes_or_no():
    w = world()
    fact, via = make_task(w, "rr").targets[0]
    row = w.in_context(fact, via)
    assert all(w.state(p) in row.prompt for p in w.premises(fact, via)) and row.prompt.endswith(w.question(fact))
    assert {row.answer for row in everything(w, "simple", False)}.isdisjoint({"Yes", "No"})
    assert {"Yes", "No"} < {row.answer for row in everything(w, "simple", True)}
    years = lambda relations: {r for r in everything(w, "simple", relations) if r.prompt[:4] == "when" and r.prompt.count("?") == 1}
    assert years(False) == years(True) and any("Nomad" in row.prompt for row in years(True))  # (Nomad... is no No)


def test_a_world_is_the_same_for_the_same_seed_and_clone_is_its_own_inverse():
    assert build(world(seed=3), "rr", "adjacent") == build(world(seed=3), "rr", "adjacent") != build(world(seed=4), "rr", "adjacent")
    assert clone("when AmberFern ?") == "nehw RebmaNref ?"
    assert all(clone(clone(name)) == name for name in names())
    assert not {*FIRST, *SECOND} & {clone(part) for part in (*FIRST, *SECOND)}


# --- the scorers

@pytest.mark.parametrize("text, gold, given", [
    ("Yes, they were.", "No", "Yes"), ("NomadicEclipse? Yes", "Yes", "Yes"),  # a name that begins with No is no No
    ("Nothing", "No", None), ("no", "No", None), ("", "Yes", None),
    ("A 2003 , B 2004 . Therefore No", "No", "No"), ("Yes. Therefore, No. Therefore, Yes", "No", "Yes"),  # the last one counts
    ("X was born in the year 1999.", "2010", "1999"), ("A same B , B 2003 .", "2003", "2003"),
    ("A same B , B 2003 . Therefore A", "2003", None),  # the right year in a premise is not an answer
    ("12010", "2010", None), ("1890", "2010", None), ("异域闪耀出生于2010年。", "2010", "2010"),  # (no word boundary in Chinese)
    (" XyloDa\u0308mmerung. ", "XyloDämmerung", "XyloDämmerung"), ("异域闪耀。", "异域闪耀", "异域闪耀")])
def test_answers_are_parsed_as_the_sheet_defines(text, gold, given):
    assert parse(text, gold) == given


def model_for(words):
    return Transformer(ModelConfig(vocab_size=len(words.pieces), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                   num_attention_heads=2, tie_word_embeddings=True, model_type="llama"), generator(0, "init"))


def test_generation_and_candidate_scoring_agree_on_a_model_that_knows_its_answers():
    w = world(k=2)
    words = Words(everything(w, "simple"))
    rows = [w.ask(f, 0, "target") for f in (w.year(w.Z[g]) for g in range(4))]
    model = model_for(words)
    for _ in train(model, by_length(words, rows), 120, generator(0, "order"), batch=4, lr=1e-2):
        pass
    assert accuracy(model, words, rows) == candidate_accuracy(model, words, rows) == 1.0
    wrong = [row._replace(label=other.label) for row, other in zip(rows, rows[1:] + rows[:1])]
    assert accuracy(model, words, wrong) == 0.0


def test_an_untrained_model_prefers_candidates_at_random_and_always_yes_scores_one_half():
    w = world(k=2)
    words = Words(everything(w, "simple"))
    targets = [row for row in build(w, "aa", "separate")[1] if row.kind == "target"]
    assert sum(row.label == "Yes" for row in targets) / len(targets) == chance("aa separate") == 0.5
    assert 0.3 < candidate_accuracy(model_for(words), words, targets) < 0.7


def test_only_the_answer_is_learned():
    w = world(k=2)
    words = Words(everything(w, "simple"))
    row = w.adjacent(w.year(w.Z[0]), w.year(w.Y[0][0]), 0)
    inputs, labels = prompt_masked([words.example(row)])
    assert words.decode([i for i in labels[0].tolist() if i != IGNORE]) == row.answer  # both answers
    assert words.decode(inputs[0].tolist()) == f"{row.prompt} {row.answer}"


def test_every_sentence_of_both_levels_survives_encoding():
    w = world(k=2)
    words = Words([r for level in LEVELS for r in everything(w, level) + in_context(w, level)])
    for row in everything(world(k=2, seed=1), "simple") + in_context(world(k=2, seed=1), "hard"):
        assert words.decode(words.encode(row.prompt)) == row.prompt and words.decode(words.encode(row.answer)) == row.answer


def test_retrieved_means_both_years_right_or_a_partner_of_the_same_year():
    w = world()
    y, z, z2 = w.Y[3][0], w.Z[3], w.Z[4]
    row = w.hinted("aa", Fact("same", y, z2, False), None)
    assert retrieved(w, row, f"{y} 2007 , {z2} 2006 . Therefore Yes") and not retrieved(w, row, f"{y} 2006 , {z2} 2006 . Therefore No")
    row = w.hinted("ar", w.year(y), z)
    assert retrieved(w, row, f"{y} same {w.X[3][1]} , whatever") and not retrieved(w, row, f"{y} same {z2} , {z2} 2006")
    assert not retrieved(w, row, f"{y} same {y} , {y} 2007") and not retrieved(w, row, "")
    assert label(Fact("same", y, z, True)) == "Yes"


# --- the script

def made_up(**changes) -> dict:
    cell = lambda value: {"mean": value, "sd": 0.0, "values": [value] * 4}
    table = {}
    for name in FULL:
        row = {"premises": 0.99, "weakest premise": 0.98, "target": chance(name), "context": 0.97, "trained target": 0.99, "n target": 160,
               "n trained target": 80}
        table[name] = row | {"target": {"aa cot": 0.9, "rr separate compare": 0.7}.get(name, chance(name))}
    for name, row in changes.items():
        table[name.replace("_", " ")] |= row
    return {name: {metric: cell(value) for metric, value in row.items()} for name, row in table.items()}


def test_the_claims_hold_on_numbers_that_agree_with_the_paper():
    assert {c["id"]: held(c) for c in claims(made_up())} == dict.fromkeys("G C1 C2 C3 C4 C5 C6 H1 R1 R2 R3".split(), True)


@pytest.mark.parametrize("failing, cell, numbers", [
    ("G C5", "xling adjacent", {"premises": GATE - 0.01}), ("G C1 C2 C3 R3", "rr separate", {"premises": 0.9}),
    ("C1 C2 C3", "ar separate", {"target": 0.2}), ("C2", "rr adjacent", {"target": 0.65}), ("C3", "rr crd", {"target": 0.67}),
    ("C4", "aa cot", {"target": 0.8}), ("C4", "ar cot", {"target": 0.25}), ("C4", "rr cot", {"target": 0.7}),
    ("C5", "xling separate", {"target": 0.5}), ("C6", "aa separate", {"context": 0.85}), ("R1", "aa oracle", {"trained target": 0.9}),
    ("R1", "aa oracle", {"target": 0.7}), ("R2", "aa separate x3", {"target": 0.65}), ("R3", "rr separate compare", {"target": 0.52})])
def test_each_claim_fails_on_numbers_that_contradict_it(failing, cell, numbers):
    verdicts = {c["id"]: held(c) for c in claims(made_up(**{cell: numbers}))}
    assert [id for id, holds in verdicts.items() if not holds] == failing.split()


def test_claims_about_cells_that_were_not_run_are_not_tested():
    few = {name: row for name, row in made_up().items() if name == "aa separate"}
    assert {c["id"]: held(c) for c in claims(few)} == {"G": True} | dict.fromkeys("C1 C2 C3 C4 C5 C6 H1 R1 R2 R3".split())


def test_the_whole_script_runs_writes_its_files_and_prints_every_claim(tmp_path, capsys):
    results = ockr.main(Config(quick=True, workers=1, out=str(tmp_path)))
    printed = capsys.readouterr().out
    assert (tmp_path / "ockr.json").exists() and (tmp_path / "ockr.png").stat().st_size > 10_000
    assert all(f"\n{c['id']:4} " in printed for c in results["claims"])
    assert results["quick"] and set(results["metrics"]) == set(Config().cells)


def test_recall_counts_what_the_rows_teach_not_the_bare_names_of_the_cross_lingual_test():
    cell = "xling adjacent"
    metrics = ockr.run(Config(quick=True, cells=(cell,), base_steps=2, steps=2, epochs=0, rounds=1, points=1), 100).metrics[cell]
    assert metrics["premises"] == metrics["weakest premise"] == metrics["year of X"]
    assert {"bare year of X", "bare translation", "target"} <= metrics.keys() and metrics["n year of X"] == metrics["n target"]


def test_a_cell_gives_the_same_numbers_alone_and_beside_others_and_every_kind_of_cell_runs():
    cfg = Config(quick=True, base_steps=2, steps=2, epochs=0, rounds=1, points=1)
    kinds = ("aa-hard separate", "rr oracle", "ar separate x3", "rr separate compare")
    together = ockr.run(replace(cfg, cells=kinds), 100)
    assert ockr.run(replace(cfg, cells=kinds[1:2]), 100).metrics["rr oracle"] == together.metrics["rr oracle"]
    assert len(together.series["ar separate x3"]["target"][0]) == len(together.series["rr oracle"]["target"][0])


def test_a_small_old_world_leaves_no_part_of_a_new_name_unknown():
    cfg = Config(quick=True, cells=("aa separate",), entities=8, old_entities=1, base_steps=2, steps=2, epochs=0, rounds=1, points=1)
    assert ockr.run(cfg, 100).metrics["aa separate"]["n target"] == 2 * YEARS * 8


@pytest.mark.parametrize("change, words", [({"cells": ("aa-hard cot",)}, "hard level"), ({"cells": ("aa",)}, "TASK SETTING"),
                                           ({"replay": 1.0}, "--replay"), ({"entities": 10}, "--entities"), ({"old_entities": 0}, "--old")])
def test_wrong_settings_are_refused_in_one_line(change, words, tmp_path):
    with pytest.raises(InputError, match=words):
        ockr.main(replace(Config(quick=True, workers=1, out=str(tmp_path)), **change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ockr", "ockr_full"])
def test_the_committed_results_give_the_committed_claims_and_figure(name):
    file = ROOT / "results" / f"{name}.json"
    if not file.exists():
        pytest.skip(f"{file.name} is not there")
    results = json.loads(file.read_text(encoding="utf-8"))
    assert claims(results["metrics"]) == results["claims"]
    assert ockr.figure(results).axes
    assert torch.tensor(results["metrics"]["aa separate"]["target"]["values"]).mean() == pytest.approx(
        results["metrics"]["aa separate"]["target"]["mean"])


