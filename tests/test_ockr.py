"""OCKR: the data construction against the paper's table, every built row against its world, the
scorers by hand, what is trained and asked, and the scripts."""

import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from methods import ockr as paper
from methods.experiments import ockr
from methods.experiments.ockr import (
    ARMS,
    CHANGED,
    CHANCE,
    DEFAULT,
    Arm,
    Config,
    candidate_accuracy,
    changes,
    evaluate,
    is_premise,
    questions,
    retrieved,
    steps_of,
    with_first_fact,
)
from methods.experiments.ockr_claims import combined, figure, known
from methods.ockr import (
    LEVELS,
    Words,
    accuracy,
    by_length,
    everything,
    in_context,
    make_worlds,
    old_rows,
    parse,
    train,
    vocabulary,
    walk_through,
)
from methods.ockr_tasks import (
    FIRST,
    MINI,
    SECOND,
    SETTINGS,
    YEARS,
    BirthYears,
    Fact,
    build,
    clone,
    contexts,
    label,
    make_task,
)
from minilm import InputError
from minilm.claims import Cell, View, as_metrics
from minilm.data import IGNORE, generator, prompt_masked
from minilm.results import ROOT
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer

TASKS = (*LEVELS["simple"], *LEVELS["hard"])
TEN = MINI._replace(  # ten "paraphrases", as published
    forms={form: [MINI.forms[form][0]] * 10 for form in MINI.forms}, translate=["translate"] * 10
)


def world(k=4, style=MINI, seed=0):
    names = [first + second for first in FIRST for second in SECOND]
    random.Random(seed).shuffle(names)
    return BirthYears(names, k, style, str(seed))


def settings_of(task: str) -> tuple[str, ...]:
    if task == "xling":
        return "separate", "adjacent", "untranslated"
    return (*SETTINGS[:2], "oracle") if "hard" in task else (*SETTINGS, "oracle")


# --- the data construction

PUBLISHED = {  # training rows in separate, adjacent, crd, cot; test rows
    "aa": ((3000, 7000, 8200, 10200), 620),
    "aa-hard": ((2960, 6960), 600),
    "ar": ((4200, 8200, 10200, 6200), 620),
    "ar-hard": ((4200, 8200), 620),
    "rr": ((8000, 12000, 12000, 12000), 1200),
    "rr-hard": ((8000, 12000), 1200),
    "xling": ((4200, 2200), 600),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_at_the_papers_size_every_file_has_the_published_number_of_rows(task):
    counts, tests = PUBLISHED[task]
    w = world(10, TEN)
    for setting, count in zip(SETTINGS, counts):
        rows, test = build(w, task, setting)
        assert (len(rows), len(test)) == (count, tests)
        targets = Counter(row.label for row in test if row.kind == "target")
        if task in ("aa", "rr", "rr-hard"):
            assert targets == {"Yes": 200, "No": 200}
        elif task == "aa-hard":
            assert targets == {"Yes": 190, "No": 190}
        else:
            assert targets.total() == 200 and set(targets.values()) == {10}


# --- every row that is built says what is true in its world

FORM = {forms[t][0].split()[0]: name for name, forms in MINI.forms.items() for t in range(3)}


def year_of(w, task, name):
    """In A+R's hard world the Y are born one year before their group."""
    return w.born[name] - (task == "ar-hard" and name in w.y)


def holds(w, task, relation, a, b) -> bool:
    a, b = (year_of(w, task, name) for name in (a, b))
    if relation == "older":
        return a < b
    if relation == "before":
        return a == b - 1
    return a == b  # same; and a generation is a group


def true_statement(w, task, text: str) -> bool:
    """AmberFern 2003; AmberFern same JadePath; AmberFern unsame JadePath"""
    words = text.split()
    if len(words) == 2:
        return year_of(w, task, words[0]) == int(words[1])
    a, relation, b = words
    denied = relation.startswith("un")
    return holds(w, task, relation.removeprefix("un"), a, b) != denied


def true_row(w, task, prompt: str, answer: str) -> bool:
    """Looks up every statement of a chain, and every answer to every question."""
    facts, chained, conclusion = answer.rpartition(" . Therefore ")
    told = facts.split(" , ") if chained else []
    asked = re.findall(r"(\w+) (\w+)(?: (\w+))? \?", prompt)
    given = re.findall(r"\b(?:Yes|No)\b|\w+ \d{4}", conclusion)
    assert len(asked) == len(given) > 0, (prompt, answer)
    right = [true_statement(w, task, statement) for statement in told]
    for (word, a, b), said in zip(asked, given):
        if FORM[word] == "year":
            right.append(said.split()[0] == a and true_statement(w, task, said))
        else:
            right.append(said == ("Yes" if holds(w, task, FORM[word], a, b) else "No"))
    return all(right)


@pytest.mark.parametrize("task", TASKS)
def test_every_row_of_every_setting_is_true_in_its_world(task):
    w = world(3)
    for setting in settings_of(task):
        train_rows, test = build(w, task, setting)
        for row in train_rows + test:
            assert true_row(w, task, row.prompt, row.answer), (setting, row)
    for row in contexts(w, task):
        *given, question = row.prompt.split(" . ")
        assert all(true_statement(w, task, statement) for statement in given)
        assert true_row(w, task, question, row.answer)


def test_a_relation_chain_whose_question_is_turned_around_would_be_false():
    """The hint asks for a partner of the one who is named first."""
    w = world(3)
    turned = []
    for fact, via in make_task(w, "rr").chains:
        row = w.hinted("rr", fact._replace(a=fact.b, b=fact.a), via)
        turned.append(true_row(w, "rr", row.prompt, row.answer))
    assert 0 < sum(turned) < len(turned)
    for row in build(w, "rr", "cot")[0]:
        if "Therefore" in row.answer:
            assert row.answer.startswith(row.prompt.split()[1] + " same ")


@pytest.mark.parametrize("setting", ["separate", "adjacent", "untranslated"])
def test_every_row_across_languages_is_true_and_no_rule_gives_a_name_abroad(setting):
    w = world(3)
    home = {w.abroad(name): name for name in w.born}
    assert len(home) == len(w.born)
    ruled = [w.abroad(name) == clone(name) for name in w.born]
    assert sum(ruled) <= 5  # by chance one in all
    rows, test = build(w, "xling", setting)
    for row in rows + test + contexts(w, "xling"):
        if row.input:
            assert row.answer == w.abroad(row.input)
            continue
        *given, question = row.prompt.split(" . ")
        for name, abroad in re.findall(r"(\w+)\(Clone: (\w+)\)", question):
            assert w.abroad(name) == abroad
        said = re.search(r"(\w+?)(?:\(Clone: \w+\))? (\d{4})$", row.answer)
        name = home.get(said[1], said[1])
        assert w.born[name] == int(said[2]) and said[1] in question
        for statement in given:
            first, second = statement.split()
            assert w.born[first] == int(second) if second.isdigit() else w.abroad(first) == second


def test_without_translations_nothing_ties_a_person_to_the_name_abroad():
    w = world(3)
    rows, test = build(w, "xling", "untranslated")
    abroad = {w.abroad(x) for x in w.x}
    assert not any(name in f"{row.prompt} {row.answer}" for row in rows for name in abroad)
    assert test == build(w, "xling", "separate")[1]


def test_random_conclusions_are_those_of_complete_reasoning_data_with_half_of_the_labels_turned():
    w = world(5)
    true_rows, by_lot = (build(w, "rr", setting)[0] for setting in ("crd", "random"))
    premises = len(build(w, "rr", "separate")[0])
    assert true_rows[:premises] == by_lot[:premises] and len(true_rows) == len(by_lot)
    for row in by_lot[premises:]:  # in all paraphrases the same
        assert row.label in ("Yes", "No")
    right = [true_row(w, "rr", row.prompt, row.answer) for row in by_lot[premises:]]
    assert 0.4 < sum(right) / len(right) < 0.6


@pytest.mark.parametrize("task", TASKS)
def test_both_premises_of_every_target_are_trained_and_the_target_is_not(task):
    def either_way(fact):
        turned = {fact._replace(a=fact.b, b=fact.a)} if fact.form == "same" else set()
        return {fact} | turned

    w = world()
    T = make_task(w, task)
    trained = {fact for group in T.premises.values() for fact in group}
    for fact, via in T.targets:
        assert all(either_way(premise) & trained for premise in w.premises(fact, via)), fact
    for setting in settings_of(task)[:-1]:
        rows, test = build(w, task, setting)
        asked = {row.prompt for row in rows}
        for fact, _ in T.targets:
            for t in range(3):
                assert not {w.question(f, t) for f in either_way(fact)} & asked
        assert all(row.label in row.answer for row in test)


@pytest.mark.parametrize("task", ["aa", "rr", "rr-hard"])
def test_no_marginal_cue_each_y_and_each_z_is_as_often_right_as_wrong(task):
    for which in ("a", "b"):
        targets = [fact for fact, _ in make_task(world(), task).targets]
        tally = Counter((getattr(fact, which), fact.value) for fact in targets)
        assert all(tally[name, True] == tally[name, False] for name, _ in tally)


def test_adjacent_adds_samples_of_two_questions_and_two_answers_in_the_same_order():
    w = world()
    separate, adjacent = (build(w, "ar", setting)[0] for setting in ("separate", "adjacent"))
    assert adjacent[: len(separate)] == separate
    added = adjacent[len(separate) :]
    years_first = [FORM[row.prompt.split()[0]] == "year" for row in added]
    for row, year_first in zip(added, years_first):
        assert row.prompt.count("?") == 2
        assert (row.answer.split()[0] not in ("Yes", "No")) == year_first
    assert 0.4 < sum(years_first) / len(added) < 0.6


@pytest.mark.parametrize("task", TASKS)
def test_two_premises_that_stand_side_by_side_belong_together(task):
    w = world()
    T = make_task(w, task)
    targets = {fact[1:3] for fact, _ in T.targets}
    premises = {fact for facts in T.premises.values() for fact in facts}
    assert premises >= {first for first, _ in T.adjacent}
    for first, second in T.adjacent:
        if task.startswith("rr"):  # x and y, x and z: through one and the same x
            assert first.a == second.a
        elif task.startswith("ar"):  # y and z, and z's year
            assert first.b == second.a
        elif task == "aa":  # the years of two who are compared
            assert (first.a, second.a) in targets


def test_chains_hold_the_years_of_x_and_plain_rows_those_of_y():
    w = world()
    rows, _ = build(w, "aa", "cot")
    chained = {name for row in rows if "Therefore" in row.answer for name in row.prompt.split()}
    plain = {row.prompt.split()[1] for row in rows if FORM[row.prompt.split()[0]] == "year"}
    assert set(w.x) <= chained and not set(w.y) & chained
    assert set(w.y) <= plain and not set(w.x) & plain


def test_the_oracle_trains_every_second_y_and_asks_for_the_others():
    w = world()
    rows, test = build(w, "aa", "oracle")
    told = {name for row in test if row.kind == "trained target" for name in row.prompt.split()}
    told &= set(w.y)  # (trained, and so asked, in either order)
    asked = {row.prompt.split()[1] for row in test if row.kind == "target"}
    assert not told & asked and len(told) == len(asked) == YEARS * w.k // 2
    compared = [row.prompt for row in rows if row.label in ("Yes", "No")]
    assert not any(name in prompt for prompt in compared for name in asked)


def test_a_world_is_the_same_for_the_same_seed_and_clone_is_its_own_inverse():
    again, other = (build(world(seed=seed), "rr", "adjacent") for seed in (3, 4))
    assert build(world(seed=3), "rr", "adjacent") == again != other
    assert clone("when AmberFern ?") == "nehw RebmaNref ?"
    assert all(clone(clone(name)) == name for name in world().born)
    assert not {*FIRST, *SECOND} & {clone(part) for part in (*FIRST, *SECOND)}


# --- the old world


def decoded(words, groups):
    for group in groups:
        for prompt, answer in group.examples:
            yield words.decode(prompt), words.decode(answer)


def test_the_old_world_has_no_bare_yes_or_no_but_in_context_unless_it_is_asked_for():
    _, old, names = make_worlds(100, 2, 1)
    words = vocabulary(old)
    for relations in (False, True):
        groups = old_rows(words, old, names, 100, relations=relations, fresh=1)
        bare = [prompt for prompt, answer in decoded(words, groups) if answer in ("Yes", "No")]
        silent = [prompt for prompt in bare if " . " not in prompt]  # no premise in the prompt
        assert bool(silent) == relations and len(bare) > len(silent)


def test_a_quarter_of_the_base_steps_reason_in_context_about_names_that_mean_nothing_else():
    new, old, names = make_worlds(100, 2, 1)
    words = vocabulary(old)
    groups = old_rows(words, old, names, 100, fresh=3)
    given = [text for text in decoded(words, groups) if " . " in text[0]]
    one = in_context(BirthYears(names[: 3 * YEARS], 1, MINI, "one"))
    assert len(given) == 3 * len(one)
    persons = {*new.born, *old.born}
    assert not any(person in prompt for prompt, _ in given for person in persons)
    assert sum(group.weight for group in groups) == pytest.approx(1)
    weight = sum(g.weight for g in groups if " . " in words.decode(g.examples[0][0]))
    assert weight == pytest.approx(0.25)


def test_no_person_of_the_old_world_lives_in_the_new_one_but_parts_of_names_are_shared():
    new, old, names = make_worlds(7, 3, 4)
    assert not {*new.born} & {*old.born} and not {*names} & {*new.born, *old.born}
    words = vocabulary(old)
    for row in everything(new) + in_context(new, "hard"):
        assert words.decode(words.encode(row.prompt)) == row.prompt
        assert words.decode(words.encode(row.answer)) == row.answer


# --- the scorers


@pytest.mark.parametrize(
    "text, gold, given",
    [
        ("Yes, they were.", "No", "Yes"),
        ("NomadicEclipse? Yes", "Yes", "Yes"),  # a name that begins with No is no No
        ("Nothing", "No", None),
        ("no", "No", None),
        ("", "Yes", None),
        ("A 2003 , B 2004 . Therefore No", "No", "No"),
        ("Yes. Therefore, No. Therefore, Yes", "No", "Yes"),  # the last one counts
        ("X was born in the year 1999.", "2010", "1999"),
        ("A same B , B 2003 .", "2003", "2003"),
        ("A same B , B 2003 . Therefore A", "2003", None),  # a premise is no answer
        ("12010", "2010", None),
        ("1890", "2010", None),
        ("异域闪耀出生于2010年。", "2010", "2010"),  # (no word boundary in Chinese)
        (" XyloDa\u0308mmerung. ", "XyloDämmerung", "XyloDämmerung"),
        ("异域闪耀。", "异域闪耀", "异域闪耀"),
    ],
)
def test_what_counts_as_the_answer_of_a_text(text, gold, given):
    assert parse(text, gold) == given


def model_for(words):
    shape = ModelConfig(
        vocab_size=len(words.pieces),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        model_type="llama",
    )
    return Transformer(shape, generator(0, "init"))


def learn(words, rows, steps):
    model = model_for(words)
    for _ in train(model, by_length(words, rows), steps, generator(0, "order"), batch=4, lr=1e-2):
        pass
    return model


def test_generation_and_candidate_scoring_agree_on_a_model_that_knows_its_answers():
    w = world(k=2)
    words = Words(everything(w))
    rows = [w.ask(w.year(w.Z[g]), 0, "target") for g in range(4)]
    model = learn(words, rows, 120)
    assert accuracy(model, words, rows) == candidate_accuracy(model, words, rows) == 1.0
    turned = rows[1:] + rows[:1]
    wrong = [row._replace(label=other.label) for row, other in zip(rows, turned)]
    assert accuracy(model, words, wrong) == 0.0


def test_the_worked_example_shows_what_was_trained_and_nothing_else():
    """One A+A pair of different years, trained on both premises, on the chain alone, on all."""
    w = world(k=2)
    words = Words(everything(w))
    fact = make_task(w, "aa").targets[-1][0]
    premises = {"premise 1", "premise 2"}
    one, other = (w.ask(premise) for premise in w.premises(fact, None))
    chain = w.hinted("aa", fact, None)
    assert one.label != other.label and chain.label == "No"

    def shown_right(*rows):
        table = walk_through(learn(words, rows, 100), words, w, fact)
        return {name for name, (_, due, said) in table.items() if due == said}

    assert shown_right(one, other) == premises  # the target does not follow
    assert "chain" in shown_right(chain) and not premises <= shown_right(chain)
    assert shown_right(one, other, chain) >= {*premises, "chain"}


def test_an_untrained_model_prefers_candidates_at_random_and_always_yes_scores_one_half():
    w = world(k=2)
    words = Words(everything(w))
    targets = [row for row in build(w, "aa", "separate")[1] if row.kind == "target"]
    assert sum(row.label == "Yes" for row in targets) / len(targets) == CHANCE["aa"] == 0.5
    assert 0.3 < candidate_accuracy(model_for(words), words, targets) < 0.7


def test_only_the_answer_is_learned():
    w = world(k=2)
    words = Words(everything(w))
    row = w.adjacent(w.year(w.Z[0]), w.year(w.Y[0][0]), 0)
    inputs, labels = prompt_masked([words.example(row)])
    assert words.decode([i for i in labels[0].tolist() if i != IGNORE]) == row.answer
    assert words.decode(inputs[0].tolist()) == f"{row.prompt} {row.answer}"


def test_retrieved_means_both_years_right_or_a_partner_of_the_same_year():
    w = world()
    y, x, z, z2 = w.Y[3][0], w.X[3][1], w.Z[3], w.Z[4]
    row = w.hinted("aa", Fact("same", y, z2, False), None)
    assert retrieved(w, row, f"{y} 2007 , {z2} 2006 . Therefore Yes")
    assert not retrieved(w, row, f"{y} 2006 , {z2} 2006 . Therefore No")
    row = w.hinted("ar", w.year(y), z)
    assert retrieved(w, row, f"{y} same {x} , whatever")
    assert not retrieved(w, row, f"{y} same {z2} , {z2} 2006")
    assert not retrieved(w, row, f"{y} same {y} , {y} 2007") and not retrieved(w, row, "")
    assert label(Fact("same", y, z, True)) == "Yes"


def test_the_first_fact_of_a_chain_can_be_given_and_the_rest_is_asked_for():
    w = world()
    row = w.hinted("ar", w.year(w.Y[3][0]), w.Z[3])
    given = with_first_fact(row)
    assert given.prompt.endswith(f"name {w.Y[3][0]} same {w.Z[3]} ,")
    assert given.answer == f"{w.Z[3]} 2007 . Therefore {w.Y[3][0]} 2007"
    words = Words(everything(w))
    whole = words.prompt(row) + words.encode(row.answer)
    assert words.prompt(given) + words.encode(given.answer) == whole


# --- what is trained, how long, and what is asked


@pytest.mark.parametrize("cell", ARMS)
def test_what_a_cell_must_know_is_what_its_rows_teach(cell):
    rows, test = questions(world(3), ARMS[cell])
    trained = {(row.prompt, row.input): row.answer for row in rows}
    untold = [row for row in test if row.kind == "target" or "bare" in row.kind]
    taught = [row for row in test if row not in untold]
    assert all(trained[row.prompt, row.input] == row.answer for row in taught)
    assert any(is_premise(row) for row in taught) and not any(map(is_premise, untold))
    assert not any(is_premise(row) for row in test if "trained" in row.kind)
    assert untold and not any((row.prompt, row.input) in trained for row in untold)
    kinds = {row.kind for row in test}
    assert ("format Yes" in kinds) == ("format No" in kinds) == cell.startswith("aa")


def test_every_setting_of_a_task_trains_equally_long_and_x3_three_times_as_long():
    w = world(3)
    cfg = Config()
    for task in (*TASKS, "xling"):
        arms = [arm for arm in ARMS.values() if arm.task == task and arm.change != "x3"]
        assert len({steps_of(cfg, w, arm) for arm in arms}) == 1
    for arm in ARMS.values():
        if arm.change == "x3":
            for c in (cfg, replace(cfg, steps=9000)):  # also where the least number decides
                assert steps_of(c, w, arm) == 3 * steps_of(c, w, arm._replace(change=""))
    largest = len(build(w, "rr", "crd")[0])
    assert steps_of(cfg, w, Arm("rr", "separate")) * cfg.batch * 0.4 >= cfg.epochs * largest - 32


def tiny(**changes) -> Config:
    return replace(Config(quick=True, base_steps=1, steps=1, epochs=0, points=1), **changes)


def test_a_run_trains_its_steps_and_asks_in_context_about_the_new_world(monkeypatch):
    asked, bases, steps = [], [], []

    def recorded_contexts(w, task):
        asked.append(w.seed)
        return contexts(w, task)[:4]

    def recorded_base(cfg, seed, words, old, names, level, relations):
        bases.append((level, relations))
        return make_base(cfg, seed, words, old, names, level, relations)

    def recorded_train(model, groups, count, *rest):
        steps.append(count)
        return train(model, groups, count, *rest)

    make_base = ockr.make_base
    monkeypatch.setattr(ockr, "contexts", recorded_contexts)
    monkeypatch.setattr(ockr, "make_base", recorded_base)
    monkeypatch.setattr(ockr, "train", recorded_train)
    cells = ("rr separate compare", "xling untranslated", "ar separate x3")
    together = ockr.run(tiny(cells=cells, entities=2, old_entities=1), 100).metrics
    assert asked == ["100/new"] * 3
    assert bases == [("simple", True), ("simple", False)]
    assert steps == [1, 1, 1, 1, 3]  # base, cell, base, cell, cell
    alone = ockr.run(tiny(cells=cells[1:2], entities=2, old_entities=1), 100).metrics
    assert alone[cells[1]] == together[cells[1]]
    assert together["xling untranslated"]["chance"] == 1 / YEARS


def test_a_base_reads_sixty_worlds_in_context_and_no_silent_comparison(monkeypatch):
    counts = []

    def recorded(words, old, names, seed, level, relations, fresh):
        counts.append((level, relations, fresh))
        return by_length(words, [old.ask(old.year(old.Z[0]))])

    monkeypatch.setattr(ockr, "old_rows", recorded)
    _, old, names = make_worlds(100, 2, 1)
    ockr.make_base(tiny(quick=False), 100, vocabulary(old), old, names, "simple", False)
    assert counts == [("simple", False, 60)]


def test_metrics_of_a_cell_by_hand(monkeypatch):
    """A model that knows the years of Z, not those of Y, and answers chains with a wrong fact."""
    w = world(2)
    _, test = questions(w, Arm("aa", "cot"))

    def said(model, words, rows, new=20):
        wrong = "A 1999 , B 1999 . Therefore Yes" if rows[0].kind == "target" else "A 1999"
        return [row.answer if row.kind == "year of Z" else wrong for row in rows]

    monkeypatch.setattr(ockr, "ask", said)
    monkeypatch.setattr(ockr, "accuracy", lambda model, words, rows, new=20: 0.25)
    found = evaluate(None, None, w, test, hinted=True)
    # 40 years of Y, two of which are really 1999; 20 of Z
    right = 2 / 40
    assert found["year of Z"] == 1 and found["year of Y"] == right
    assert found["weakest premise"] == right and found["premises"] == pytest.approx(22 / 60)
    assert found["target"] == 0.5 and (found["target Yes"], found["target No"]) == (1, 0)
    assert found["retrieved"] == 0 and found["given"] == 0.25 and found["unparsed"] == 0
    assert found["n target"] == 80


# --- claims (that every one of them has teeth: tests/test_claims.py)


def table(arm, **values):
    cells = {Cell(arm, name.replace("_", " ")): row for name, row in values.items()}
    return View(as_metrics(cells))


def test_a_seed_has_combined_if_its_target_lies_far_above_chance():
    # of 120 questions .65 are 3.3 standard errors above .5, .60 are 2.2: 99.9% needs 3.29
    n, half = [120.0] * 3, [0.5] * 3
    view = table("rr crd", target=[0.5, 0.6, 0.7], n_target=n, chance=half)
    assert combined(view, ["rr crd"]).measured.endswith("rr crd 1 of 3")
    assert combined(view, ["rr crd"]).verdict == "not reproduced"
    view = table("rr crd", target=[0.5, 0.6, 0.3], n_target=n, chance=half)
    assert combined(view, ["rr crd"]).verdict == "holds"


def test_a_gate_needs_every_seed_to_know_its_premises_and_the_form_of_a_comparison():
    fine = {"premises": [0.99] * 4, "format_Yes": [0.95] * 4, "format_No": [0.95] * 4}
    assert known("aa crd")(table("aa crd", **fine)) == ""
    one_low = table("aa crd", **fine | {"premises": [1.0, 1.0, 1.0, 0.85]})
    assert "0.850" in known("aa crd")(one_low)
    unread = table("aa crd", **fine | {"format_No": [0.6] * 4})
    assert "format No" in known("aa crd")(unread)


# --- the scripts


def test_every_setting_that_changed_since_the_run_before_is_named_with_its_old_value():
    saved = json.loads((ROOT / "results" / "ockr.json").read_text(encoding="utf-8"))
    if "stale" in saved:  # the run before this one
        for name, value in CHANGED.items():
            assert saved["config"][name] == (list(value) if name == "seeds" else value)
    listed = changes(Config())
    for name, old in CHANGED.items():
        now = getattr(Config(), name)
        assert (f"{name} {old} -> {now}" in listed) == (now != old)


def test_the_papers_script_shows_a_row_a_pair_and_both_trainings(capsys):
    paper.main(paper.Config(quick=True, entities=2))
    printed = capsys.readouterr().out
    for words in ("premise 1", "target", "in context", "chain", "separate", "proves nothing"):
        assert words in printed


def test_the_whole_script_runs_writes_its_files_and_prints_every_claim(tmp_path, capsys):
    cells = ("aa separate", "rr cot", "xling adjacent")
    results = ockr.main(Config(quick=True, workers=1, out=str(tmp_path), cells=cells))
    printed = capsys.readouterr().out
    assert (tmp_path / "ockr.json").exists()
    assert (tmp_path / "ockr.png").stat().st_size > 10_000
    assert all(f"\n{row['id']:4} " in printed for row in results["claims"])
    assert "steps 600 -> " in printed and "smoke run" in printed
    assert list(results["metrics"]) == list(cells) and set(cells) < set(DEFAULT)
    assert figure(results).get_axes()
    assert {"text", "training", "exam", "weights"} == set(results["depends"])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"cells": ("aa-hard cot",)}, "aa-hard cot is not known"),
        ({"cells": ("aa",)}, "give some of"),
        ({"replay": 1.0}, "--replay"),
        ({"entities": 10}, "--entities"),
        ({"old_entities": 0}, "--old"),
        ({"lr": float("nan")}, "--lr"),
        ({"points": 0}, "--points"),
        ({"full": True, "more_seeds": True}, "two runs"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(change, words, tmp_path):
    with pytest.raises(InputError, match=words):
        ockr.main(replace(Config(quick=True, workers=1, out=str(tmp_path)), **change))
    assert not list(tmp_path.iterdir())
