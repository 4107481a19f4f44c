"""Question alignment: both stages' examples, the controls, the loss, programs that are read and not
run, what is measured, the arms, the claims, the look inside and the script end to end."""

import json
import math
import random
from dataclasses import replace
from itertools import islice

import pytest
import torch

from methods import question_alignment as paper
from methods import question_alignment_tasks as tasks
from methods.experiments import question_alignment as experiment
from methods.experiments.question_alignment import (
    ARMS,
    DEFAULT,
    FULL,
    JUDGED,
    ON_THE_WAY,
    Config,
    answers,
    base_model,
    both_stages,
    depends,
    exact_translations,
    exams,
    inside,
    make,
    stage_1,
    stage_2,
    steps,
)
from methods.experiments.question_alignment_claims import CLAIMS, figure
from methods.question_alignment import (
    alignment_score,
    copied,
    fine_tune,
    question_pairs,
    question_vectors,
    response_loss,
    solved,
    stage_1_rows,
    stage_2_rows,
    walk_through,
)
from methods.question_alignment_tasks import (
    parse,
    pretrain,
    pretraining_texts,
    problems,
    prompt,
    response,
    response_language,
    run_program,
    translation,
)
from methods.worlds.clones import (
    EOS,
    SOLVE,
    TRANSLATE,
    Choice,
    CloneWorld,
    Event,
    Problem,
    new_model,
)
from minilm import InputError
from minilm.claims import HOLDS, NOT_TESTED, Cell, View, as_metrics, decide, true_table
from minilm.data import generator
from minilm.generate import generate
from minilm.results import fingerprints, same_fingerprints
from minilm.transformer import Output
from minilm.weights import save_pretrained

WORLD = CloneWorld()
EVE = Problem("Eve", "coins", 7, (Event(1, "finds", 4, 7, 11), Event(-1, "sells", 2, 11, 9)))
TINY = Config(
    steps=4,
    align_steps=3,
    tune_steps=2,
    problems=6,
    pairs=200,
    batch=4,
    width=32,
    layers=2,
    small_width=16,
    small_layers=1,
)


def tiny(name="init", width=32, layers=2):
    return new_model(WORLD, width, layers, generator(0, name)).eval()


def weights(model):
    return torch.cat([p.flatten() for p in model.parameters()])


# --- the examples


def test_a_translation_pair_holds_the_question_twice_and_no_answer():
    ask, answer = translation(WORLD, "cot", EVE, "b", "en")
    asked = "<s> <tr> Eve has_b 7 coins_b . 4 finds_b . 2 sells_b . howmany_b coins_b ? <a>"
    assert WORLD.text(ask) == asked
    told = "Eve has 7 coins . finds 4 . sells 2 . howmany coins ? </s>"
    assert WORLD.text(answer) == told
    assert "9" not in (asked + told).split()


def test_translation_from_english_names_the_target_language():
    ask, answer = translation(WORLD, "cot", EVE, "en", "a")
    assert WORLD.gloss(ask)[2] == "answer" and WORLD.language_of[ask[2]] == "a"
    assert WORLD.text(answer).startswith("Eve has_a 7")


QUESTION = "<s> <q> Eve has_a 7 coins_a . finds_a 4 . sells_a 2 . howmany_a coins_a ?"
WORKED = "finds 4 so 7 + 4 = 11 . sells 2 so 11 - 2 = 9 . answer 9 </s>"
PROGRAM = "x = 7 . finds = 4 . x = x + finds . sells = 2 . x = x - sells . print x </s>"


@pytest.mark.parametrize(
    "task, mark, answered", [("cot", "<a>", WORKED), ("pot", "<code>", PROGRAM)]
)
def test_a_question_in_any_language_is_answered_in_english(task, mark, answered):
    assert WORLD.text(prompt(WORLD, task, EVE, "a")) == f"{QUESTION} {mark}"
    assert WORLD.text(response(WORLD, task, EVE)) == answered
    assert solved(WORLD, task, EVE, "a") == (
        prompt(WORLD, task, EVE, "a"),
        response(WORLD, task, EVE, "en"),
    )


def test_a_multiple_choice_question_is_answered_by_its_letter():
    c = Choice("eggs", ("river", "tower", "market"), "B")
    asked = "<s> <q> where eggs ? A river B tower C market <a>"
    assert WORLD.text(prompt(WORLD, "mcq", c, "en")) == asked
    answer = response(WORLD, "mcq", c)
    assert WORLD.text(answer) == "B </s>" and parse(WORLD, "mcq", answer) == "B"
    assert parse(WORLD, "mcq", [EOS, WORLD.id["A"]]) is None  # nothing counts behind the end


def test_the_controls_of_stage_1_read_the_same_questions_in_the_same_order():
    rows = {}
    for name in ("qalign only", "copy only", "shuffled only"):
        pairs, rng = stage_1(TINY, WORLD, 5, ARMS[name])
        batches = islice(stage_1_rows(WORLD, pairs, rng, TINY.batch), 6)
        rows[name] = [row for batch in batches for row in batch]
    asked = [[ask for ask, _ in own] for own in rows.values()]
    assert asked[0] == asked[1] == asked[2]
    assert {WORLD.language_of[ask[3]] for ask in asked[0]} == {"a", "b"}
    assert all(answer[:-1] == ask[2:-1] for ask, answer in rows["copy only"])
    for name in ("qalign only", "shuffled only"):
        told = {WORLD.language_of[i] for _, answer in rows[name] for i in answer}
        assert told == {None, "en"}

    def right(name):  # the same amount at the start, in question and translation
        return [WORLD.tokens[ask[4]] == WORLD.tokens[answer[2]] for ask, answer in rows[name]]

    assert all(right("qalign only"))
    assert sum(right("shuffled only")) < len(right("shuffled only")) / 2


def test_a_share_of_the_pairs_is_the_first_part_of_all_pairs():
    every, _ = stage_1(TINY, WORLD, 5, ARMS["qalign only"])
    some, _ = stage_1(TINY, WORLD, 5, ARMS["pairs 10% only"])
    one, _ = stage_1(TINY, WORLD, 5, ARMS["pairs 1% only"])
    assert (len(every), len(some), len(one)) == (200, 20, 2)
    assert every[:20] == some and some[:2] == one


def test_stage_2_gives_every_arm_the_same_problems_and_teaches_the_languages_it_should():
    rows = {}
    for name in ("ralign", "translate-train", "english responses", "+en-x"):
        rng, row = stage_2(TINY, 5, ARMS[name])
        batches = islice(stage_2_rows(WORLD, rng, TINY.batch, row=row), 10)
        rows[name] = [row for batch in batches for row in batch]

    def languages(name, side):
        return {WORLD.language_of[i] for row in rows[name] for i in row[side]} - {None}

    def finals(name):
        return [WORLD.final_number(answer) for _, answer in rows[name]]

    assert languages("ralign", 0) == languages("ralign", 1) == {"en"}
    assert languages("translate-train", 0) == languages("translate-train", 1) == {"en", "a", "b"}
    assert languages("english responses", 0) == {"en", "a", "b"}
    assert languages("english responses", 1) == {"en"}
    assert finals("ralign") == finals("translate-train") == finals("english responses")
    same = [a == b for a, b in zip(rows["ralign"], rows["+en-x"])]
    assert 0.2 < sum(same) / len(same) < 0.8
    marks = [ask[1] for ask, _ in rows["+en-x"]]
    assert marks == [SOLVE if kept else TRANSLATE for kept in same]
    assert languages("+en-x", 1) == {"en", "a", "b"}


def test_joint_training_mixes_rows_of_both_stages_by_the_shares_of_their_steps():
    cfg = replace(TINY, align_steps=30, tune_steps=10)
    rows = [row for batch in islice(both_stages(cfg, WORLD, 5), 100) for row in batch]
    translated = [ask[1] == TRANSLATE for ask, _ in rows]
    assert sum(translated) / len(rows) == pytest.approx(0.75, abs=0.06)


def test_no_stage_ever_asks_a_test_problem_and_the_exam_asks_nothing_else():
    for task, test in exams(replace(TINY, problems=100), WORLD, 5).items():
        assert all(WORLD.split(p) == "test" for p in test)
        taught = {str(p) for p in problems(WORLD, task, random.Random(1), 500)}
        assert not taught & {str(p) for p in test}
    pairs = question_pairs(WORLD, random.Random(0), 300)
    assert all(WORLD.split(pair.asked) == "train" for pair in pairs)


# --- loss and training


def test_the_loss_is_the_mean_over_response_tokens_end_of_sequence_included():
    model = tiny()
    rows = [translation(WORLD, "cot", EVE, "a", "en"), solved(WORLD, "cot", EVE)]
    total, n = 0.0, 0
    for ask, answer in rows:
        logp = model(torch.tensor([ask + answer])).logits.log_softmax(-1)[0]
        total -= sum(logp[len(ask) - 1 + k, token].item() for k, token in enumerate(answer))
        n += len(answer)
    assert response_loss(model, rows).item() == pytest.approx(total / n, rel=1e-5)


def test_a_stage_leaves_the_model_it_starts_from_and_moves_every_weight():
    start = tiny()
    before = start.state_dict()
    before = {name: w.clone() for name, w in before.items()}
    rows = stage_2_rows(WORLD, random.Random(0), 4)
    tuned = fine_tune(start, rows, 2, 1e-3, "stage II").state_dict()
    assert all(torch.equal(w, before[name]) for name, w in start.state_dict().items())
    assert not any(torch.equal(w, before[name]) for name, w in tuned.items())


def test_the_rate_rises_over_ten_steps_and_falls_to_a_twentieth(monkeypatch):
    factors = []
    set_lr = paper.set_lr

    def recorded(optimizers, factor):
        factors.append(factor)
        set_lr(optimizers, factor)

    monkeypatch.setattr(paper, "set_lr", recorded)
    fine_tune(tiny(), stage_2_rows(WORLD, random.Random(0), 2), 20, 1e-3, "stage II")
    assert factors[0] == pytest.approx(1 / 11) and factors[-1] == pytest.approx(0.05)
    assert max(factors) == factors[10] == 1.0


def test_stage_1_teaches_translation_and_a_batch_can_be_learnt_by_heart():
    """The look inside with the method switched off shows another thing: no translation."""
    base = tiny()
    pair = paper.Pair(EVE, "a", EVE)
    taught = paper.align_questions(base, WORLD, [pair], random.Random(0), 150, 3e-3, 2)
    rows = walk_through(WORLD, {"off": base, "on": taught}, EVE, "a")
    said = {(wanted, who): ids for wanted, who, ids in rows}
    assert said["translation", "on"] == said["translation", "due"]
    assert said["translation", "off"] != said["translation", "due"]
    assert said["answer", "due"] == response(WORLD, "cot", EVE)
    assert exact_translations(taught, WORLD, [EVE])["exact", "a"] == 1.0
    assert exact_translations(base, WORLD, [EVE])["exact", "a"] == 0.0

    wrong = [pair._replace(told=EVE._replace(name="Ann"))]
    shuffled = paper.align_questions(base, WORLD, wrong, random.Random(0), 150, 3e-3, 2)
    assert exact_translations(shuffled, WORLD, [EVE])["exact", "a"] == 0.0
    copying = paper.align_questions(base, WORLD, copied([pair]), random.Random(0), 150, 3e-3, 2)
    ask, _ = translation(WORLD, "cot", EVE, "a", "en")
    assert paper.respond(copying, [ask]) == [[*WORLD.question(EVE, "a"), EOS]]


def test_the_base_models_texts_come_in_batches_of_like_length_and_are_drawn_by_the_seed():
    first = list(pretraining_texts(WORLD, 0, 8, 6))
    assert len(first) == 8 and all(len(batch) == 6 for batch in first)
    for four in (first[:4], first[4:]):
        spans = sorted((len(batch[0]), len(batch[-1])) for batch in four)
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
    assert first == list(pretraining_texts(WORLD, 0, 8, 6))
    assert first != list(pretraining_texts(WORLD, 1, 8, 6))


# --- programs are read, never run


@pytest.mark.parametrize(
    "source, shown",
    [
        ("x = 7\nfinds = 4\nx = x + finds\nprint(x)", 11),
        ("print(2 * 3 - 1 / 2)", 5.5),
        ("print(1)\nprint(2)", 2),
        ("x = -3\nprint(-x + +1)", 4),
        ("print(7 // 2 * 10 + 7 % 4)", 33),
        ("print(2 ** 10)", 1024),
        ("x = 3\nx += 4\nx *= 2\nprint(x)", 14),
        ("a, b = 1, 2\na, b = b, a\nprint(a * 10 + b)", 21),
        ("x: int = 3\nprint(x)", 3),
        ("print(round(2 / 3, 2), int(7.9), abs(-2), max(1, 5))", 5),
        ("print(round(2 / 3, 2))", 0.67),
        ('print("ans", 5)', 5),
        ('print("it costs $1,200.50 in all")', 1200.5),
        ('x = 1234.5\nprint(f"so {x:,.2f} dollars")', 1234.5),
        ('x = 3\nprint(f"{x} eggs and {x + 1}")', 4),
        ("x = 6\nx / 4", 1.5),  # as a notebook shows it
        ('"""doc 7"""\nx = 6\nprint(x)  # 8', 6),
        ("print(5)\nx = 9", 5),
        # what is no number, and mistakes
        ("x = 3", None),
        ("", None),
        ('"7"', None),
        ("print(True)", None),
        ("print(True + 1)", None),
        ('print("none")', None),
        ("print(y)", None),
        ("print(1 / 0)", None),
        ("print((-8) ** 0.5)", None),
        ("x = = 3\nprint(x)", None),
        ("x = 9999999999\nx = x * x\nprint(x)", None),
        ("print(9 ** 9 ** 9)", None),
        ("(" * 300 + "1" + ")" * 300, None),
        # what is not read
        ("import os\nprint(1)", None),
        ("print(open('f'))", None),
        ("print(x := 3)", None),
        ("for i in (1,):\n    print(i)", None),
        ("x.y = 3\nprint(3)", None),
        ("print(1, end='')", None),
        ("x = 3\nprint(f'{x:9999999999}')", None),
        ("x = 3\nprint(f'{x!r}')", None),
    ],
)
def test_programs_are_read_never_run(source, shown):
    assert run_program(source) == shown


def test_what_is_read_is_what_python_prints():
    import io
    from contextlib import redirect_stdout

    from minilm.evaluate import last_number

    source = "a = 7\nb = a * 3 - 2\nb -= 4 % 3\nc = round(b / 7, 3)\nprint(f'{a} {c:.2f}')"
    written = io.StringIO()
    with redirect_stdout(written):
        exec(source, {})  # ours, not a model's
    assert run_program(source) == float(last_number(written.getvalue()))


def test_the_worlds_programs_compute_what_its_worked_answers_say():
    for p in problems(WORLD, "cot", random.Random(0), 40):
        program, worked = response(WORLD, "pot", p), response(WORLD, "cot", p)
        assert parse(WORLD, "pot", program) == parse(WORLD, "cot", worked) == p.final
    assert parse(WORLD, "pot", WORLD.encode("x = 7 . x = x + finds . print x".split())) is None


# --- measures


def test_a_responses_language_is_that_of_most_of_its_words():
    def ids(text):
        return WORLD.encode(text.split())

    assert response_language(WORLD, ids("finds 4 so 7 + 4 = 11 .")) == "en"
    mixed = ids("finds 4") + WORLD.encode(["so", "answer"], "a")
    assert response_language(WORLD, mixed) == "a"
    assert response_language(WORLD, ids("7 + 4 = 11 .")) is None


def test_the_alignment_score_by_hand():
    # two pairs, already centred, on one axis: parallel cosine 1, other cosine -1: 1 - -1 = 2
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert alignment_score(x, x).item() == pytest.approx(2.0)
    assert alignment_score(x, x.flip(0)).item() == pytest.approx(-2.0)
    # a language's own offset does not count, and neither does the size of vectors
    moved = 5 * x + torch.tensor([3.0, 7.0])
    assert alignment_score(x, moved).item() == pytest.approx(2.0)
    x, y = torch.randn(2, 3, 200, 32, generator=generator(0, "vectors"))
    assert alignment_score(x, y).shape == (3,) and alignment_score(x, y).abs().max() < 0.05
    n = 200  # centred vectors have mean cosine -1 / (n - 1) with the others
    assert alignment_score(x, x)[0].item() == pytest.approx(1 + 1 / (n - 1), abs=0.02)


def test_a_questions_vector_is_the_mean_over_its_prompt_whatever_stands_beside_it():
    model = tiny()
    longer = EVE._replace(events=EVE.events * 2)
    vectors = question_vectors(model, WORLD, [EVE, longer], "b")
    ids = torch.tensor([prompt(WORLD, "cot", EVE, "b")])
    states = model(ids, output_hidden_states=True).hidden_states
    alone = torch.stack([h[0].mean(0) for h in states])
    torch.testing.assert_close(vectors[:, 0], alone, atol=1e-5, rtol=1e-5)


def test_the_alignment_that_claims_read_is_the_middle_layers():
    model = tiny(layers=3)
    test = problems(WORLD, "cot", random.Random(0), 12, "test")
    metrics, series = inside(model, WORLD, test)
    english, other = (question_vectors(model, WORLD, test, x) for x in ("en", "c"))
    scores = alignment_score(english, other)
    assert metrics["alignment", "c"] == pytest.approx(scores[1].item())
    assert scores[1].item() != pytest.approx(scores[-1].item())
    assert len(series["pca", 0][1]) == 3 * 12


class Oracle(torch.nn.Module):
    """Answers the test's questions in some languages from a table; says nothing to the others."""

    def __init__(self, world, test, languages, answer_language="en"):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(1))
        self.world = world
        self.table = {}
        for p in test:
            for language in languages:
                answer = response(world, "cot", p, answer_language)
                self.table[tuple(prompt(world, "cot", p, language))] = answer

    def new_cache(self, B):
        return [None] * B

    def due(self, seen):
        """What stands behind the longest known prompt that `seen` begins with."""
        for k in range(len(seen), 0, -1):
            said = self.table.get(seen[:k], [])
            if len(seen) - k < len(said):
                return said[len(seen) - k]
        return EOS

    def forward(self, ids, cache=None, attention_mask=None):
        B, T = ids.shape
        logits = torch.zeros(B, T, len(self.world.tokens))
        for i, row in enumerate(ids.tolist()):
            if cache is not None:
                row = cache[i] = [t for t in (cache[i] or []) + row if t]
            for t in range(T):
                seen = tuple(row[: len(row) - T + t + 1]) if cache else tuple(row[: t + 1])
                logits[i, t, self.due(seen)] = 1.0
        return Output(logits)


def test_an_oracle_for_some_languages_is_right_in_these_and_the_measures_say_so():
    test = problems(WORLD, "cot", random.Random(0), 12, "test")
    found = answers(Oracle(WORLD, test, ("en", "a")), WORLD, test, "cot")
    assert found["acc", "en"] == found["acc", "a"] == found["agreement", "a"] == 1
    assert found["kept", "a"] == 1 and found["consistency", "a"] == 0
    assert found["acc", "b"] == found["agreement", "b"] == found["kept", "b"] == 0
    own = answers(Oracle(WORLD, test, ("a",), "a"), WORLD, test, "cot")
    assert own["acc", "a"] == own["consistency", "a"] == 1
    assert own["agreement", "a"] == own["kept", "a"] == 0
    assert own["agreement", "b"] == 0  # two that say nothing do not agree


def test_each_step_of_an_answer_is_looked_at_in_its_place():
    row = WORLD.text(response(WORLD, "cot", EVE)).split()
    places = [[row[9 * event + at] for at in experiment.AT.values()] for event in (0, 1)]
    assert places == [["finds", "4", "+", "11"], ["sells", "2", "-", "9"]]
    test = problems(WORLD, "cot", random.Random(0), 12, "test")
    found = steps(Oracle(WORLD, test, ("en", "a")), WORLD, test)
    for name in ("verb", "amount", "sign", "result"):
        assert found[name, "en"] == found[name, "a"] == 1 and found[name, "b"] == 0


# --- arms


def test_arms_differ_from_the_method_in_one_thing():
    assert ARMS["ralign"] == ARMS["qalign->ralign"]._replace(start="base")
    assert ARMS["copy->ralign"] == ARMS["qalign->ralign"]._replace(start="copy only")
    assert ARMS["copy only"] == ARMS["qalign only"]._replace(told="copied")
    assert ARMS["shuffled only"] == ARMS["qalign only"]._replace(told="shuffled")
    assert ARMS["+en-x"] == ARMS["qalign->ralign"]._replace(taught="en-x")
    assert {*DEFAULT, *JUDGED} <= set(FULL) and set(FULL) | set(ON_THE_WAY) == set(ARMS)


def test_each_arm_gives_the_same_model_alone_and_beside_others_and_leaves_its_start():
    models = {}
    for name in ("base", "ralign", "qalign->ralign", "+en-x", "ralign->qalign", "joint"):
        make(TINY, WORLD, 5, name, models)
    for name in ("base", "qalign only", "+en-x", "ralign->qalign"):
        alone = make(TINY, WORLD, 5, name, {})
        assert torch.equal(weights(models[name]), weights(alone))
    assert len({weights(m).sum().item() for m in models.values()}) == len(models)


def test_proxy_arms_take_the_untuned_or_tuned_large_model_and_the_right_small_ones():
    models = {}
    first = make(TINY, WORLD, 5, "proxy", models)
    assert first.model is models["base"] and first.expert is models["small qalign->ralign"]
    assert first.anti is models["small base"] and first.alpha == 1.0
    second = make(TINY, WORLD, 5, "ralign + proxy", models)
    assert second.model is models["ralign"] and second.anti is models["small ralign"]
    assert second.expert is first.expert


def test_every_stage_gets_its_own_steps_rate_and_size(monkeypatch):
    cfg = replace(TINY, lr=1e-2, small_lr=2e-2, align_lr=3e-2, tune_lr=4e-2, steps=12)
    called = {}

    def recorder(name, original):
        def call(*args, **named):
            called.setdefault(name, []).append((args, named))
            return original(*args, **named)

        return call

    for name in ("pretrain", "align_questions", "align_responses", "fine_tune"):
        monkeypatch.setattr(experiment, name, recorder(name, getattr(experiment, name)))
    monkeypatch.setattr(tasks, "pretraining_texts", recorder("texts", pretraining_texts))
    models = {}
    for name in ("qalign->ralign", "joint", "small base"):
        make(cfg, WORLD, 5, name, models)
    large, small = [args[1:] for args, _ in called["pretrain"]]
    assert large == (5, 12, 4, 1e-2, 2, 32) and small == (5, 12, 4, 2e-2, 1, 16)
    assert [args[1:4] for args, _ in called["texts"]] == [(5, 12, 4)] * 2
    assert called["align_questions"][0][0][4:] == (3, 3e-2, 4, "cot")
    assert called["align_responses"][0][0][3:6] == (2, 4e-2, 4)
    assert called["fine_tune"][0][0][2:4] == (5, 3e-2)  # joint: the steps of both stages


def test_another_seed_is_another_world_with_other_texts_weights_pairs_and_problems(monkeypatch):
    seen = []

    def look(model, world, test, task):
        seen.append((world.seed, str(test), weights(model)))
        return {("acc", "en"): 0.0}, {}

    monkeypatch.setattr(experiment, "evaluate", look)
    for seed in (5, 6):
        experiment.run(replace(TINY, arms=("base",)), seed)
    (one, first, a), (two, second, b) = seen
    assert (one, two) == (5, 6) and first != second and not torch.equal(a, b)
    one, two = (pretrain(WORLD, seed, 4, 2, layers=1, width=16) for seed in (5, 6))
    assert not torch.equal(weights(one), weights(two))
    one, two = (fingerprints(depends(TINY, seed)) for seed in (5, 6))
    assert all(one[name] != two[name] for name in ("text", "pairs", "exam", "weights"))
    assert same_fingerprints(one, fingerprints(depends(TINY, 5)))


def test_a_base_is_saved_read_again_and_refused_when_its_shape_differs(tmp_path):
    cfg = replace(TINY, base=str(tmp_path / "bases"))
    first, again = (base_model(cfg, WORLD, 5, "large") for _ in range(2))
    assert torch.equal(weights(first), weights(again))
    with pytest.raises(InputError, match="another shape"):
        base_model(replace(cfg, width=64), WORLD, 5, "large")
    other = new_model(CloneWorld(verbs=9), 32, 2, generator(0, "x"))
    save_pretrained(other, tmp_path / "bases" / "seed-6-large")
    with pytest.raises(InputError, match="another shape or vocabulary"):
        base_model(cfg, WORLD, 6, "large")


# --- claims and figure


def verdict(id, change=None):
    claim = {claim.id: claim for claim in CLAIMS}[id]
    table = true_table(claim, seeds=8)
    for arm in FULL:
        table.setdefault(Cell(arm, "acc en"), [0.99] * 8)
    return decide(claim, View(as_metrics(table | (change or {}))))


@pytest.mark.parametrize("id, arm", [("C1", "qalign->ralign"), ("C4", "small qalign->ralign")])
def test_one_rule_asks_for_a_lead_of_a_tenth_and_for_more_than_a_guess(id, arm):
    assert verdict(id).verdict == HOLDS
    steady = {Cell(arm, f"acc {x}"): [0.55] * 8 for x in "ab"}  # ralign has .5: a lead of .05
    assert verdict(id, steady).verdict == "not reproduced"
    assert verdict(id, {Cell("verb-blind", "acc"): [0.85] * 8}).verdict == "not reproduced"


def test_one_rule_means_that_equal_numbers_give_equal_verdicts():
    lead = [0.0, 0.4, 0.1, 0.5, 0.3, -0.1, 0.4, 0.3]
    values = [0.5 + x for x in lead]
    change = {}
    for arm in ("qalign->ralign", "small qalign->ralign"):
        for metric in ("acc", "agreement"):
            change |= {Cell(arm, f"{metric} {x}"): values for x in "ab"}
    assert {verdict(id, change).verdict for id in ("C1", "C4", "C8", "R1")} == {HOLDS}
    change = {cell: [0.5 + 0.3 * x for x in lead] for cell in change}
    found = {verdict(id, change).verdict for id in ("C1", "C4", "C8", "R1")}
    assert len(found) == 1 and found != {HOLDS}


@pytest.mark.parametrize(
    "id, arms",
    [
        ("C1", ["ralign", "qalign->ralign"]),
        ("C3", ["translate-train"]),
        ("C4", ["small ralign", "small qalign->ralign"]),
        ("C5", ["proxy", "small qalign->ralign"]),
        ("C5r", ["ralign + proxy"]),
        ("C6", ["+en-x"]),
        ("C10", ["mcq ralign", "pot qalign->ralign"]),
        ("R1", ["copy->ralign"]),
        ("R2", ["shuffled->ralign"]),
        ("E1", ["english responses"]),
    ],
)
def test_every_arm_that_a_claim_compares_must_solve_english_in_the_worst_seed(id, arms):
    for arm in arms:
        row = verdict(id, {Cell(arm, "acc en"): [0.99] * 7 + [0.6]})
        assert row.verdict == NOT_TESTED and f"{arm} 0.60" in row.measured


def test_multiple_choice_that_rises_to_its_chance_has_gained_nothing():
    risen = {Cell("mcq ralign", f"acc {x}"): [0.2] * 8 for x in "ab"}
    risen |= {Cell("mcq qalign->ralign", f"acc {x}"): [0.34] * 8 for x in "ab"}
    assert verdict("C10").verdict == HOLDS and verdict("C10", risen).verdict == "not reproduced"


def test_english_that_moves_either_way_has_moved():
    for x, expected in ((0.90, "not reproduced"), (0.96, HOLDS), (1.0, "not reproduced")):
        change = {Cell("ralign", "acc en"): [0.95] * 8, Cell("qalign->ralign", "acc en"): [x] * 8}
        assert verdict("C2", change).verdict == expected


def test_the_figure_shows_the_arms_that_ran_and_the_layer_before_and_after_stage_1():
    row = {f"acc {x}": {"mean": 0.5, "sd": 0.1, "values": [0.4, 0.6]} for x in ("en", *"abcd")}
    metrics = {"base": row, "qalign only": row, "ralign": row}
    metrics["verb-blind"] = {"acc": {"mean": 0.25, "sd": 0.0, "values": [0.25, 0.25]}}
    series = {}
    for arm, height in (("base", 1.0), ("qalign only", 2.0)):
        points = {"x": list(range(6)), "values": [[height] * 6, [9.0] * 6]}
        series[arm] = {"pca 0": points, "pca 1": points}
    fig = figure({"metrics": metrics, "series": series, "seeds": [7, 8]})
    bars, before, after = fig.get_axes()
    assert len(bars.patches) == 2 * 5  # untuned and RAlign, in five languages
    assert {y for line in before.lines for y in line.get_ydata()} == {1.0}
    assert {y for line in after.lines for y in line.get_ydata()} == {2.0}
    assert "seed 7" in before.get_title()


# --- the scripts


def test_the_papers_file_shows_both_stages_the_look_inside_and_the_result(capsys):
    paper.main(paper.Config(quick=True, copied=True))
    printed = capsys.readouterr().out
    for words in ("<tr>", "translation", "stage I", "QAlign, RAlign", "copied, RAlign", "no verbs"):
        assert words in printed


def test_the_whole_script_runs_writes_its_files_and_prints_every_claim(tmp_path, capsys):
    results = experiment.main(Config(quick=True, workers=1, out=str(tmp_path)))
    printed = capsys.readouterr().out
    assert (tmp_path / "question_alignment.png").stat().st_size > 10_000
    saved = json.loads((tmp_path / "question_alignment.json").read_text())
    assert {row["verdict"] for row in saved["claims"]} == {"smoke run"}
    assert set(saved["metrics"]) == {*DEFAULT, "verb-blind"}
    assert "<s> <tr> " in printed and "<a> [" in printed
    for row in results["claims"]:
        assert f"\n{row['id']} " in printed


def test_every_arm_of_the_full_run_can_be_made_and_measured_and_every_claim_read():
    outcome = experiment.run(replace(TINY, arms=FULL), 100)
    assert set(outcome.metrics) == {*FULL, "verb-blind"}
    numbers = [v for row in outcome.metrics.values() for v in row.values()]
    assert all(math.isfinite(v) for v in numbers)
    table = {}
    for arm, row in outcome.metrics.items():
        table |= {Cell(arm, " ".join(name) if isinstance(name, tuple) else name): [v, v]
                  for name, v in row.items()}
    rows = experiment.claims(as_metrics(table))
    assert not [row for row in rows if "not in this run" in row["measured"]]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"arms": ("qalign",)}, "qalign is not known"),
        ({"arms": ()}, "--arms"),
        ({"problems": 0}, "--problems"),
        ({"steps": 0}, "--steps"),
        ({"lr": math.nan}, "--lr"),
        ({"en_x": 2.0}, "--en-x"),
        ({"full": True, "more_seeds": True}, "give one of them"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(change, words, tmp_path):
    with pytest.raises(InputError, match=words):
        experiment.main(replace(Config(quick=True, workers=1, out=str(tmp_path)), **change))
    assert not list(tmp_path.iterdir())


def test_generation_stops_where_a_response_ends():
    out = generate(Oracle(WORLD, [EVE], ("en",)), [prompt(WORLD, "cot", EVE, "en")], 60, eos_id=EOS)
    assert out[0][-1] == EOS and out[0].count(EOS) == 1
