"""Spontaneous multilingual learners: the rows, tuning, the label read in two ways, what the base
has read, the exam, the analyses, the arms, the claims and the scripts end to end."""

import math
import random
from dataclasses import replace

import pytest
import torch

from methods import spontaneous_multilingual as paper
from methods.experiments import spontaneous_multilingual as experiment
from methods.experiments.spontaneous_multilingual import (
    ARMS,
    Config,
    Exam,
    asked_to_translate,
    asked_twice,
    auc,
    correlations,
    depends,
    draw_exam,
    few_shot_prompts,
    in_one_pass,
    inside,
    lens,
    read_states,
    verbs_found,
)
from methods.experiments.spontaneous_multilingual_claims import CLAIMS, figure
from methods.spontaneous_multilingual import (
    DEV,
    ENGLISH,
    LABELS,
    LANGUAGES,
    SEEN,
    TEXT,
    UNSEEN,
    WORLD,
    few_shot,
    label_masses,
    label_tokens,
    masses,
    to_translate,
    translate,
    translated,
    translation_loss,
    translation_rows,
    tune,
    walk_through,
)
from methods.worlds.clones import (
    ANSWER,
    EOS,
    SEP,
    TRANSLATE,
    Event,
    Problem,
    document,
    new_model,
)
from minilm import InputError
from minilm.claims import HOLDS, NOT_TESTED, Cell, View, as_metrics, decide, true_table
from minilm.data import generator
from minilm.results import fingerprints, same_fingerprints

HERE = replace(WORLD, seed=100)
EVE = Problem("Eve", "coins", 7, (Event(1, "finds", 4, 7, 11), Event(-1, "sells", 2, 11, 9)))
TINY = Config(
    steps=3, tune_steps=2, lora_steps=2, items=6, rows=12, batch=4, tune_batch=4, width=32, layers=2
)
CLAIM = {claim.id: claim for claim in CLAIMS}


def tiny(layers=2, name="init"):
    return new_model(HERE, 32, layers, generator(0, name)).eval()


def weights(model):
    return torch.cat([p.flatten() for p in model.parameters()])


def languages_in(ids):
    return {HERE.language_of[i] for i in ids} - {None}


def rows_of(name, n=12, seed=100):
    arm = ARMS[name]
    return translation_rows(HERE, seed, arm.pairs, n, arm.shuffled)


TUNED = [name for name, arm in ARMS.items() if arm]


# --- rows


def test_a_row_is_a_question_and_its_translation_both_up_to_the_open_slot():
    plain = replace(HERE, cognates=0.0)
    asked = "<s> Eve has_b 7 coins_b . 4 finds_b . 2 sells_b . <a> <tr>"
    assert plain.text(to_translate(plain, EVE, "b")) == asked
    assert plain.text(translated(plain, EVE)) == "Eve has 7 coins . finds 4 . sells 2 . <a>"


def test_every_row_holds_its_question_twice_in_the_arms_languages():
    for name in TUNED:
        pairs = ARMS[name].pairs
        for k, (question, answer) in enumerate(rows_of(name)):
            source, target = pairs[k // 12]
            assert languages_in(question) == {source} and languages_in(answer) == {target}
            assert answer[-1] == ANSWER and question[-2:] == [ANSWER, TRANSLATE]
            same = sorted(HERE.gloss(question[1:-2])) == sorted(HERE.gloss(answer[:-1]))
            assert same or name == "shuffled"


def test_no_row_holds_a_label_or_a_language_of_the_exam():
    labels = {i for word in LABELS for language in LANGUAGES for i in HERE.encode([word], language)}
    for name in TUNED:
        for question, answer in rows_of(name):
            assert not labels & {*question, *answer}
            assert not languages_in(question + answer) & {*DEV, *UNSEEN}


def test_arms_differ_from_the_method_in_one_thing():
    rows = {name: rows_of(name) for name in TUNED}
    assert ARMS["shuffled"] == ARMS["qt"]._replace(shuffled=True)
    assert ARMS["mono"] == ARMS["qt"]._replace(pairs=(("en", "en"), ("en", "en")))
    assert ARMS["qt lora"] == ARMS["qt"]._replace(lora=True) and rows["qt lora"] == rows["qt"]
    assert [q for q, _ in rows["shuffled"]] == [q for q, _ in rows["qt"]]
    assert sorted(a for _, a in rows["shuffled"]) == sorted(a for _, a in rows["qt"])
    assert not any(a == b for a, b in zip(rows["shuffled"], rows["qt"]))
    assert [a for _, a in rows["mono"]] == [a for _, a in rows["qt"]]
    assert all(q[1:-1] == a for q, a in rows["mono"])
    assert {len(r) for r in rows.values()} == {24}


def test_each_seed_and_each_language_has_questions_of_its_own():
    answers = [answer for _, answer in rows_of("qt", 40)]
    assert answers[:40] != answers[40:]
    assert rows_of("qt", 40) != rows_of("qt", 40, seed=101)


# --- what the base reads


def draw(n, mix=TEXT, progress=1.0):
    rng = random.Random("documents")
    return [document(HERE, mix, rng, progress) for _ in range(n)]


def test_the_base_reads_clones_only_as_retellings_and_labels_only_in_english():
    texts = draw(600)
    clones = [ids for ids in texts if languages_in(ids) & {*SEEN, *DEV, *UNSEEN}]
    assert 0.53 < len(clones) / len(texts) < 0.67
    assert all(ids.count(SEP) == 1 and ANSWER not in ids for ids in clones)
    labelled = [ids for ids in texts if ANSWER in ids]
    assert len(labelled) > 40 and all(languages_in(ids) == {"en"} for ids in labelled)
    assert not any(TRANSLATE in ids for ids in texts)  # tuning's mark is new to the base


def test_the_base_begins_with_english_alone_and_tuning_replays_nothing_else():
    for texts in (draw(80, progress=0.1), draw(80, ENGLISH)):
        assert all(languages_in(ids) <= {"en"} for ids in texts)


class Recorder:
    """Stands in for two functions of the paper's file, and notes what each step reads."""

    def __init__(self, monkeypatch):
        self.texts, self.rows, self.factors, self.starts = [], [], [], []
        text_loss, rows_loss, set_lr = paper.text_loss, paper.translation_loss, paper.set_lr

        def read(model, documents):
            self.texts.append(documents)
            if len(self.texts) == 1:
                self.starts.append(weights(model).clone())
            return text_loss(model, documents)

        def translated(model, rows):
            self.rows.append(rows)
            return rows_loss(model, rows)

        def rate(optimizers, factor):
            self.factors.append(factor)
            set_lr(optimizers, factor)

        monkeypatch.setattr(paper, "text_loss", read)
        monkeypatch.setattr(paper, "translation_loss", translated)
        monkeypatch.setattr(paper, "set_lr", rate)


def test_every_seed_starts_from_other_weights_and_reads_other_texts(monkeypatch):
    runs = []
    for seed in (100, 101, 100):
        with monkeypatch.context() as patch:
            seen = Recorder(patch)
            paper.pretrain(HERE, seed, steps=34, batch=1, width=16, layers=1)
            runs.append(seen)
    first, other, again = runs
    assert first.texts == again.texts and torch.equal(first.starts[0], again.starts[0])
    assert first.texts != other.texts and not torch.equal(first.starts[0], other.starts[0])
    start = [languages_in(texts[0]) for texts in first.texts[:5]]  # 15% of 34 steps
    assert all(found <= {"en"} for found in start)
    assert any(languages_in(texts[0]) & {*"abcdef"} for texts in first.texts[5:])
    assert max(first.factors) == 1.0 and first.factors[-1] == pytest.approx(0.05)


# --- tuning


def test_only_the_translation_is_learned_two_routes():
    model = tiny()
    rows = rows_of("qt")[:5]
    total, count = 0.0, 0
    for question, answer in rows:  # one at a time, from the definition
        logp = model(torch.tensor([[*question, *answer]])).logits[0].log_softmax(-1)
        total -= sum(logp[len(question) + t - 1, i].item() for t, i in enumerate(answer))
        count += len(answer)
    assert translation_loss(model, rows).item() == pytest.approx(total / count, rel=1e-5)


def test_arms_read_the_same_questions_in_the_same_order_beside_the_same_english_texts(monkeypatch):
    runs = {}
    for name, seed in (("qt", 100), ("shuffled", 100), ("mono", 100), ("qt", 101)):
        with monkeypatch.context() as patch:
            runs[name, seed] = Recorder(patch)
            tune(tiny(), HERE, rows_of(name), seed, steps=20, batch=4)
    qt, shuffled, mono, other = runs.values()
    assert qt.texts == shuffled.texts == mono.texts != other.texts
    assert all(languages_in(ids) <= {"en"} for texts in qt.texts for ids in texts)
    assert all(len(rows) == len(texts) == 4 for rows, texts in zip(qt.rows, qt.texts))
    asked = [[[q for q, _ in rows] for rows in run.rows] for run in (qt, shuffled, other)]
    assert asked[0] == asked[1] != asked[2]
    told = [[[a for _, a in rows] for rows in run.rows] for run in (qt, mono)]
    assert told[0] == told[1]
    assert len(qt.factors) == 20 and qt.factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert qt.factors[-1] == 0.0  # 10% warm-up, then cosine down to nothing


def test_both_losses_pull_and_clipping_is_on(monkeypatch):
    stepped = []
    monkeypatch.setattr(paper, "take_step", lambda loss, model, optimizers: stepped.append(loss))
    start = tiny()
    rows = rows_of("qt")
    with monkeypatch.context() as patch:
        seen = Recorder(patch)
        tune(start, HERE, rows, 100, steps=1, batch=4)
    both = translation_loss(start, seen.rows[0]) + paper.text_loss(start, seen.texts[0])
    assert stepped[0].item() == pytest.approx(both.item(), rel=1e-5)


def test_tuning_leaves_its_start_and_moves_all_weights_or_an_adapters_alone():
    start = tiny()
    before = weights(start).clone()
    every = tune(start, HERE, rows_of("qt"), 100, steps=3, batch=4)
    adapter = tune(start, HERE, rows_of("qt"), 100, steps=20, lr=1e-2, batch=4, rank=2)
    assert torch.equal(weights(start), before)
    old = dict(start.named_parameters())
    moved = {name for name, p in every.named_parameters() if not torch.equal(p, old[name])}
    assert moved == set(old)
    moved = {name for name, p in adapter.named_parameters() if not torch.equal(p, old[name])}
    assert moved == {f"layers.{i}.self_attn.{x}_proj.weight" for i in (0, 1) for x in "qv"}
    for name in moved:
        change = adapter.get_parameter(name) - old[name]
        assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2
    again = tune(start, HERE, rows_of("qt"), 100, steps=20, lr=1e-2, batch=4, rank=2)
    assert torch.equal(weights(adapter), weights(again))


def test_the_adapter_starts_as_no_change_and_scales_by_alpha_over_rank():
    model = tiny()
    ids = torch.tensor([translated(HERE, EVE)])
    before = model(ids).logits
    paper.add_adapter(model, 4, 12.0, generator(0, "lora"))
    assert torch.equal(model(ids).logits, before)
    layer = model.layers[0].self_attn.q_proj
    torch.nn.init.ones_(layer.lora_B)
    x = torch.randn(1, 32, generator=generator(0, "x"))
    change = 12 / 4 * (x @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + change, atol=1e-5, rtol=1e-4)


def test_the_look_inside_shows_another_thing_with_the_method_off():
    off = tiny()
    question, answer = to_translate(HERE, EVE, "f"), translated(HERE, EVE)
    on = tune(off, HERE, [(question, answer)] * 4, 100, steps=80, lr=1e-2, batch=2)
    models = {"off": off, "on": on}
    shown = {name: walk_through(model, HERE, EVE, "f") for name, model in models.items()}
    assert shown["on"].said.translation == answer != shown["off"].said.translation
    assert sum(shown["on"].behind) > 0 and sum(shown["off"].behind) == 0
    at_once = label_masses(on, [few_shot(HERE, EVE, (), "f")], label_tokens(HERE))[0]
    assert shown["on"].at_once == at_once.tolist()


# --- reading the label


def test_label_masses_by_hand():
    logits = torch.tensor([[math.log(1), math.log(2), math.log(3), math.log(4)], [0.0, 0, 0, 0]])
    found = masses(logits, [{0, 3}, {2}])
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.3], [0.5, 0.25]]))


def test_the_labels_probability_is_that_after_the_last_token_whatever_stands_beside():
    model = tiny()
    prompts = few_shot_prompts(HERE, draw_exam(HERE, 100, 9), "e")
    found = label_masses(model, prompts, [[5], [6, 7]], batch=4)
    for prompt, m in zip(prompts, found):
        p = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        torch.testing.assert_close(m, torch.stack([p[5], p[6] + p[7]]), atol=1e-6, rtol=1e-4)


def test_a_prompt_by_hand():
    plain = replace(HERE, cognates=0.0)
    less = Problem("Ann", "eggs", 9, (Event(-1, "eats", 1, 9, 8),))
    prompt = few_shot(plain, EVE, [less], "e")
    said = "<s> Ann has_e 9 eggs_e . eats_e 1 . <a> less <sep> Eve has_e 7 coins_e ."
    assert plain.text(prompt) == f"{said} finds_e 4 . sells_e 2 . <a>"
    assert plain.text(few_shot(plain, EVE, (), "en")).startswith("<s> Eve has 7 coins . finds")


class Says(torch.nn.Module):
    """Continues every prompt of a table as the table says, and ends all others."""

    def __init__(self, table):
        super().__init__()
        self.embed = torch.nn.Embedding(1, 1)
        self.lm_head = torch.nn.Identity()
        self.table = {tuple(prompt): said for prompt, said in table.items()}

    def new_cache(self, B):
        return [None] * B

    def due(self, seen):
        for k in range(len(seen), 0, -1):
            said = self.table.get(seen[:k], [])
            if len(said) > len(seen) - k:
                return said[len(seen) - k]
        return EOS

    def hidden(self, ids, cache=None, attention_mask=None):
        h = torch.zeros(*ids.shape, len(HERE.tokens))
        for i, row in enumerate(ids.tolist()):
            if cache is not None:
                row = cache[i] = [t for t in (cache[i] or []) + row if t]
            before = len(row) - ids.shape[1] if cache is not None else 0
            for t in range(ids.shape[1]):
                h[i, t, self.due(tuple(row[: max(before, 0) + t + 1]))] = 9.0
        return h


def word(text):
    return HERE.id[text]


def test_the_label_behind_a_translation_is_the_word_in_the_slot_that_the_model_opened():
    other = EVE._replace(name="Ann")
    closed = EVE._replace(name="Dan")
    table = {
        tuple(to_translate(HERE, EVE, "e")): [*translated(HERE, EVE), word("more")],
        tuple(to_translate(HERE, other, "e")): [*translated(HERE, EVE), word("less")],
        tuple(to_translate(HERE, closed, "e")): translated(HERE, closed)[:-1],
    }
    problems = [EVE, other, closed]
    first, second, third = translate(Says(table), HERE, problems, "e")
    assert first == (translated(HERE, EVE), "more") and second.label == "less"
    assert third == ([*translated(HERE, closed)[:-1], EOS], None)
    exam = Exam(problems, [[EVE, EVE]] * 3)
    found = asked_to_translate(Says(table), HERE, exam, "e", "en")
    assert found["exact", "e"] == pytest.approx(1 / 3)  # Ann's was told as Eve's
    assert found["opened", "e"] == pytest.approx(2 / 3)
    assert found["label", "e"] == pytest.approx(1 / 3) and found["verbs", "e"] == 1.0
    own = [verb in HERE.roots for verb in ("finds", "sells")]
    assert all(own) == math.isnan(found["own verbs", "e"])


def test_verbs_are_found_in_their_place():
    said = HERE.encode("Eve has 7 coins . finds 4 . eats 2 .".split())
    assert verbs_found(HERE, [EVE], [said]) == [("finds", True), ("sells", False)]
    swapped = HERE.encode("Eve has 7 coins . sells 4 . finds 2 .".split())
    assert verbs_found(HERE, [EVE], [swapped]) == [("finds", False), ("sells", False)]
    foreign = HERE.encode("Eve has 7 coins . finds 4 .".split(), "e")
    assert verbs_found(HERE, [EVE], [foreign]) == [("finds", False), ("sells", False)]


def test_the_base_is_asked_twice_for_a_retelling_and_for_the_label_of_what_it_said():
    retold = [paper.BOS, *HERE.statement(EVE, "f"), SEP]
    asked = [paper.BOS, *HERE.statement(EVE, "en"), ANSWER]
    model = Says({tuple(retold): HERE.statement(EVE, "en"), tuple(asked): [word("more")]})
    found = asked_twice(model, HERE, Exam([EVE], [[EVE, EVE]]), "f")
    assert found == {("exact", "f"): 1.0, ("verbs", "f"): 1.0, ("label", "f"): 1.0}
    silent = asked_twice(Says({}), HERE, Exam([EVE], [[EVE, EVE]]), "f")
    assert silent["exact", "f"] == silent["verbs", "f"] == 0.0


def test_asked_twice_it_labels_its_own_retelling_and_not_the_question_that_was_meant():
    retold = [paper.BOS, *HERE.statement(EVE, "f"), SEP]
    wrong = HERE.encode("Eve has 7 coins . sells 4 . finds 2 .".split())  # fewer, not more
    labels = {
        (paper.BOS, *wrong, ANSWER): [word("less")],
        (paper.BOS, *HERE.statement(EVE, "en"), ANSWER): [word("more")],
    }
    found = asked_twice(Says({tuple(retold): wrong} | labels), HERE, Exam([EVE], [[EVE, EVE]]), "f")
    assert EVE.label == "more" and found["label", "f"] == 0.0


@pytest.mark.parametrize(
    "score, positive, expected",
    [
        ([3.0, 1.0, 2.0], [1, 0, 0], 1.0),
        ([1.0, 2.0, 3.0], [1, 0, 0], 0.0),
        ([2.0, 2.0, 1.0, 3.0], [1, 0, 0, 1], (0.5 + 1 + 1 + 1) / 4),
    ],
)
def test_auc_by_hand(score, positive, expected):
    positive = torch.tensor(positive).bool()
    assert auc(torch.tensor(score), positive) == pytest.approx(expected)
    assert auc(torch.tensor(score) * 5 + 100, positive) == pytest.approx(expected)


# --- the exam


def test_the_exam_asks_as_many_of_either_label_and_shows_one_of_each():
    exam = draw_exam(HERE, 100, 40)
    assert [p.label for p in exam.questions] == ["more", "less"] * 20
    assert all(HERE.split(p) == "test" for p in exam.questions)
    for shots in exam.shots:
        assert sorted(p.label for p in shots) == ["less", "more"]
        assert all(HERE.split(p) == "train" for p in shots)
    first = [shots[0].label for shots in exam.shots]
    assert 5 < first.count("more") < 35  # either comes first
    assert exam != draw_exam(HERE, 101, 40)


def test_what_the_exam_asks_is_never_in_pretraining_or_in_tuning():
    exam = draw_exam(HERE, 100, 20)
    told = [HERE.statement(p, x)[2:] for p in exam.questions for x in LANGUAGES]
    told = {tuple(ids) for ids in told}  # from the first number on

    def holds(text):
        spans = {len(ids) for ids in told}
        return any(tuple(text[i : i + n]) in told for i in range(len(text)) for n in spans)

    assert holds([1, *next(iter(told))])
    assert not any(holds(ids) for ids in draw(150))
    assert not any(holds(question + answer) for question, answer in rows_of("qt", 100))


def test_whoever_says_always_the_same_is_right_in_half_and_fails_the_gate():
    exam = draw_exam(HERE, 100, 8)
    table = {tuple(p): [word("less")] for p in few_shot_prompts(HERE, exam, "en")}
    found = in_one_pass(Says(table), HERE, exam, "en")
    assert found["acc", "en"] == 0.5 and found["recall more", "en"] == 0.0
    assert found["auc", "en"] == 0.5
    claim = CLAIM["G1"]
    always = {cell: [0.95, 0.5] for cell in claim.method}  # in one seed of two
    assert decide(claim, View(as_metrics(always))).verdict != HOLDS


# --- inside


def test_states_are_those_of_the_model_and_the_lens_of_the_last_is_its_own_answer():
    model = tiny(3)
    prompts = few_shot_prompts(HERE, draw_exam(HERE, 100, 9), "e")
    states = read_states(model, prompts, batch=4)
    assert states.lengths.tolist() == [len(p) for p in prompts]
    layers = lens(model, states.last, [[5], [6, 7]])
    own = label_masses(model, prompts, [[5], [6, 7]])
    torch.testing.assert_close(layers[-1], own, atol=1e-6, rtol=1e-4)
    for i, prompt in enumerate(prompts):
        out = model(torch.tensor([prompt]), output_hidden_states=True)
        for layer, h in enumerate(out.hidden_states):
            torch.testing.assert_close(states.mean[layer, i], h[0].mean(0), atol=1e-5, rtol=1e-4)
            p = model.lm_head(model.norm(h[0, -1])).softmax(-1)
            seen = torch.stack([p[5], p[6] + p[7]])
            torch.testing.assert_close(layers[layer][i], seen, atol=1e-6, rtol=1e-4)


def test_the_lens_that_claims_read_leaves_out_embedding_and_last_block(monkeypatch):
    model = tiny(4)
    exam = draw_exam(HERE, 100, 8)  # "more" and "less" by turns
    by_layer = [0.9, 0.1, 0.3, 0.2, 0.8]  # of the right label, embedding first
    right = torch.tensor([LABELS.index(p.label) for p in exam.questions])

    def made_up(model, last, token_sets):
        assert token_sets == label_tokens(HERE)
        both = [torch.full((8, 2), 0.05) for _ in by_layer]
        for m, value in zip(both, by_layer):
            m[torch.arange(8), right] = value
        return both

    monkeypatch.setattr(experiment, "lens", made_up)
    metrics, series = inside(model, HERE, exam)
    assert series["lens", "f"][1] == pytest.approx(by_layer)
    assert metrics["lens", "f"] == pytest.approx(0.3)


def test_the_correlation_that_claims_read_is_that_at_three_quarters_of_the_depth():
    model = tiny(4)
    exam = draw_exam(HERE, 100, 8)
    metrics, _ = inside(model, HERE, exam)
    states = {x: read_states(model, few_shot_prompts(HERE, exam, x)) for x in LANGUAGES}
    lengths = {x: s.lengths for x, s in states.items()}
    at = [correlations({x: s.mean[i] for x, s in states.items()}, lengths) for i in range(5)]
    for language in UNSEEN:
        r, partial = at[3][language]
        assert (metrics["r", language], metrics["partial r", language]) == (r, partial)
        assert r not in [at[i][language][0] for i in (0, 1, 2, 4)]


def test_prompt_length_makes_a_correlation_that_vanishes_when_it_is_regressed_out():
    gen = generator(0, "states")
    lengths = torch.randint(10, 40, (400,), generator=gen)
    direction = torch.tensor([1.0, 0, 0])

    def noise():
        return torch.randn(400, generator=gen)

    meaning = noise()
    both = {"en": lengths, "a": lengths}
    only_length = {x: (lengths + noise())[:, None] * direction for x in both}
    r, partial = correlations(only_length, both)["a"]
    assert r > 0.95 and abs(partial) < 0.15
    also_meaning = {x: (lengths + 3 * meaning + noise())[:, None] * direction for x in both}
    r, partial = correlations(also_meaning, both)["a"]
    assert partial == pytest.approx(0.9, abs=0.05)  # 9 / (9 + 1)


# --- one seed


def test_an_arm_gives_the_same_numbers_alone_and_every_seed_others():
    both = experiment.run(replace(TINY, arms=("base", "mono", "qt")), 100)
    alone = experiment.run(replace(TINY, arms=("qt",)), 100)
    other = experiment.run(replace(TINY, arms=("qt",)), 101)
    assert alone.metrics["qt"] == both.metrics["qt"] != both.metrics["base"]
    assert alone.metrics["base asked twice"] == both.metrics["base asked twice"]
    assert other.metrics["qt"] != alone.metrics["qt"]


def test_every_arm_gets_its_steps_its_rate_and_its_adapter(monkeypatch):
    called = []

    def tune(base, world, rows, seed, steps, lr, batch, rank):
        called.append((steps, lr, batch, rank))

    monkeypatch.setattr(experiment, "tune", tune)
    cfg = replace(TINY, tune_steps=5, tune_lr=0.1, lora_steps=7, lora_lr=0.2, lora_rank=3)
    for name in ("qt", "qt lora"):
        experiment.tuned(cfg, HERE, 100, tiny(), ARMS[name])
    assert called == [(5, 0.1, 4, None), (7, 0.2, 4, 3)]


def test_what_the_numbers_rest_on_differs_between_seeds_and_is_the_same_again():
    first, again, other = (fingerprints(depends(TINY, seed)) for seed in (50, 50, 51))
    assert same_fingerprints(first, again)
    assert all(first[name] != other[name] for name in ("text", "rows", "exam", "weights"))


# --- claims


def judged(claim_id, **changes):
    """The verdict on the claim's true table beside gates that hold, some arms' cells changed."""
    table = {}
    for name in ("G1", "G2", "G3", "T1", claim_id):
        table |= true_table(CLAIM[name])
    for change, value in changes.items():
        cell = {
            "known": Cell("base asked twice", "verbs f"),
            "taught": Cell("qt", "exact b"),
            "english": Cell("base", "acc en"),
            "spread": Cell("qt", "exact e"),
        }[change]
        table[cell] = [*table[cell][1:], value]  # in one seed
    return decide(CLAIM[claim_id], View(as_metrics(table)))


GATED = [claim.id for claim in CLAIMS if claim.gate]


@pytest.mark.parametrize("name", GATED)
def test_a_claim_is_not_tested_where_a_gate_fails_in_one_seed_and_the_gate_is_named(name):
    assert judged(name).verdict == HOLDS
    for change, gate in (("known", "G2"), ("taught", "G3"), ("english", "G1")):
        verdict, measured = judged(name, **{change: 0.5})
        if gate == "G1" and name[0] in "TR":  # a translation needs no label
            assert verdict == HOLDS
        else:
            assert verdict == NOT_TESTED and measured.startswith(f"gate failed: {gate}")


@pytest.mark.parametrize("name", ["L1", "L2", "L3"])
def test_the_label_behind_a_translation_counts_only_where_the_translation_is_there(name):
    verdict, measured = judged(name, spread=-3.0)
    assert verdict == NOT_TESTED and measured.startswith("gate failed: T1")


def test_the_figure_is_drawn_from_any_arms():
    outcome = experiment.run(replace(TINY, arms=("base", "qt")), 100)
    from minilm.results import collect

    metrics, series = collect([outcome])
    figure({"metrics": metrics, "series": series, "seeds": [100]})


# --- the scripts


def test_the_papers_file_prints_a_row_the_look_inside_and_both_models(capsys):
    paper.main(paper.Config(quick=True))
    printed = capsys.readouterr().out
    assert "<a> <tr> [" in printed and "A question in clone f" in printed
    assert printed.count("translated exactly") == 2 and "the label at once: more 0." in printed
    with pytest.raises(InputError, match="--rank 0"):
        paper.main(paper.Config(rank=0))


def test_the_experiment_writes_its_files_and_prints_every_claim(tmp_path, capsys):
    small = {"width": 16, "layers": 2, "out": str(tmp_path)}
    results = experiment.main(Config(quick=True, workers=1, **small))
    printed = capsys.readouterr().out
    assert (tmp_path / "spontaneous_multilingual.json").exists()
    assert (tmp_path / "spontaneous_multilingual.png").stat().st_size > 10_000
    assert all(f"\n{c['id']} " in printed for c in results["claims"]) and "<a> <tr> [" in printed
    assert set(results["metrics"]) == {*ARMS, "base asked twice"}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"arms": ("base", "qtt")}, "--arms qtt"),
        ({"arms": ()}, "--arms: give at least one"),
        ({"tune_lr": 0.0}, "--tune-lr 0"),
        ({"items": 1}, "--items 1"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(change, words, tmp_path):
    with pytest.raises(InputError, match=words):
        experiment.main(replace(TINY, quick=True, out=str(tmp_path), **change))
    assert not list(tmp_path.iterdir())
