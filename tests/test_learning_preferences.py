"""Learning preferences: the metric by hand, the conditions without which the experiment would be
trivially true, what each lesson reads, and the whole script."""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest
import torch

from methods import learning_preferences as paper
from methods.experiments import learning_preferences as lp
from methods.experiments.learning_preferences import (
    ARMS,
    CORE,
    EIGHT,
    Arm,
    Config,
    lesson_texts,
    test_texts as conflict_texts,
)
from methods.experiments.learning_preferences_claims import CLAIMS, RATIOS, seeds_for
from methods.learning_preferences import (
    believed,
    biography,
    choices,
    conflict,
    learned,
    look_inside,
    perplexities,
    preference,
    prefers,
    train,
)
from methods.worlds.learning_preferences import (
    ATTRIBUTES,
    ID,
    SOURCES,
    VERBS,
    WORDS,
    Person,
    all_values,
    make_people,
)
from minilm import InputError
from minilm.claims import NOT_TESTED, PerSeed, View, as_metrics, decide, true_table
from minilm.data import generator
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Output, Transformer

SMALL = Config(evidence=8, test=6, epochs=1, epochs2=3)
NEUTRAL, FORMAL, INFORMAL = (set(chain(*VERBS[style])) for style in ("neutral", "A", "B"))


def words(texts):
    return [[WORDS[i] for i in text] for text in texts]


def people_of(seed, cfg=SMALL, tokens=1):
    return make_people(seed, cfg.evidence, cfg.test, tokens)


def tiny():
    config = ModelConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        model_type="llama",
    )
    return Transformer(config, generator(0, "init"))


class Unigram(torch.nn.Module):
    """A "model" whose next-token probabilities never change: perplexities can be worked out."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, ids, attention_mask=None):
        return Output(self.logits.expand(*ids.shape, -1))


def believer(person, side):
    """Finds the values of one version a hundred times as likely as any other word."""
    probabilities = torch.full((len(WORDS),), 1e-3)
    for value in getattr(person, side):
        probabilities[ID[value[0]]] = 0.1
    return Unigram((probabilities / probabilities.sum()).tolist())


# --- the metric


def test_perplexity_is_the_geometric_mean_over_all_tokens_but_the_first():
    model = Unigram([0.5, 0.25, 0.125, 0.125])
    # [2, 0, 1]: tokens 2..T have p = 1/2, 1/4: exp(mean(-log)) = sqrt(2 * 4); the first (p = 1/8)
    # is not scored.  [3, 2]: 8
    expected = torch.tensor([math.sqrt(8), 8.0])
    torch.testing.assert_close(perplexities(model, [[2, 0, 1], [3, 2]]), expected)


def test_padding_beside_a_longer_sentence_never_enters_the_mean():
    model, short, long = tiny(), [1, 9, 10], [1, 9, 10, 11, 12, 13, 14]
    alone = perplexities(model, [short])[0]
    torch.testing.assert_close(perplexities(model, [short, long])[0], alone)


def test_perplexity_by_hand_equals_the_models_own_probabilities():
    model, ids = tiny(), [1, 9, 30, 40, 3]
    logp = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    expected = math.exp(-sum(logp[t, ids[t + 1]].item() for t in range(4)) / 4)
    assert perplexities(model, [ids]).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("probabilities", [[math.nan, 0.5, 0.5], [0.0, 0.5, 0.5]])
def test_a_model_that_has_diverged_is_refused_and_does_not_vote_for_B(probabilities):
    # nan < nan is False, which would read as "B's version is the more likely"
    with pytest.raises(InputError, match="NaN|not finite"):
        perplexities(Unigram(probabilities), [[1, 0, 2]])


def test_a_loss_that_is_not_finite_ends_the_training():
    model, people = tiny(), people_of(1)["test"]
    model.lm_head.weight.data.fill_(math.nan)
    texts = conflict(people[0], 1)
    with pytest.raises(InputError, match="the loss is nan: give a lower learning rate"):
        list(train(model, texts, 1, 1e-3, generator(0, "order")))


def test_a_tie_is_skipped_or_counts_for_the_second_version():
    first, second = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 1.0])
    assert prefers(first, second, "second").tolist() == [1, 0, 0]
    skipped = prefers(first, second)
    assert skipped[0] == 1 and skipped[1].isnan() and skipped[2] == 0
    assert skipped.nanmean() == 0.5  # of the two that can be decided
    mirrored = prefers(second, first)[[0, 2]]
    assert torch.equal(mirrored, 1 - skipped[[0, 2]])  # Pr(B, A) = 1 - Pr(A, B) without ties


def test_the_preference_is_the_unweighted_mean_over_attributes():
    nan = torch.nan
    # attribute 1: 2 of 2 for A (two ties); attribute 2: 1 of 4: (1 + 0.25) / 2, not 3 / 6
    chosen = torch.tensor([[1.0, 1], [1, 0], [nan, 0], [nan, 0]])
    assert preference(chosen) == pytest.approx(0.625)


def test_a_model_that_believes_a_version_chooses_it_and_either_version_counts_as_learned():
    person = people_of(5)["test"][0]
    for side, vote in (("A", 1), ("B", 0)):
        model = believer(person, side)
        assert choices(model, [person]).tolist() == [[vote] * 3]
        numbers = believed(model, [person], all_values())[0].tolist()
        best = [twelve[i] for twelve, i in zip(all_values(), numbers)]
        assert tuple(best) == getattr(person, side)
        assert learned(model, [person], all_values()) == 1
    stranger = people_of(5)["test"][1]
    known = believer(stranger, "A")  # knows another person's values
    shared = sum(stranger.A[a] in (person.A[a], person.B[a]) for a in range(3)) / 3
    assert learned(known, [person], all_values()) == pytest.approx(shared)


# --- what keeps the experiment honest ("trivially true if ...")

BALANCED = [name for name in ARMS if ARMS[name].only is None and not ARMS[name].extra]


@pytest.mark.parametrize("name", BALANCED)
def test_both_sides_are_equally_frequent_and_no_unmarked_text_speaks_of_a_test_person(name):
    arm = ARMS[name]
    for person in people_of(3, tokens=arm.value_tokens)["test"]:
        texts = words(conflict_texts(SMALL, arm, [person], 3))
        assert len(texts) == 2 * SMALL.copies
        for a in range(3):
            counts = {}
            for side in "AB":
                value = list(getattr(person, side)[a])
                n = len(value)
                places = [text[i : i + n] for text in texts for i in range(len(text))]
                counts[side] = places.count(value)
            assert counts == {"A": SMALL.copies, "B": SMALL.copies}
        if arm.feature == "source":
            told = Counter(text[2] for text in texts)
            assert told == {SOURCES["A"]: SMALL.copies, SOURCES["B"]: SMALL.copies}
        if arm.feature == "style":
            assert not NEUTRAL & set(chain(*texts))


def test_the_groups_share_no_name_and_the_two_versions_differ_in_every_attribute():
    for tokens in (1, 2):
        groups = make_people(0, 60, 60, tokens).values()
        people = list(chain(*groups))
        assert len(people) == 180 == len({p.name for p in people})
        assert all(a != b for p in people for a, b in zip(p.A, p.B))


def test_the_conflict_is_the_same_for_every_ratio_and_A_and_B_texts_are_mirror_images():
    test = people_of(1)["test"]
    read = {ratio: conflict_texts(SMALL, ARMS[ratio], test, 1) for ratio in RATIOS}
    assert all(texts == read["4:4"] for texts in read.values())
    values = set(chain(*ATTRIBUTES.values()))

    def blank(text):
        kinds = {"value": values, "source": set(SOURCES.values())}
        return [next((k for k, known in kinds.items() if w in known), w) for w in text]

    texts = words(read["8:0"])
    assert all(text[1] == "according-to" and text[2] in SOURCES.values() for text in texts)
    for first, second in zip(texts[::2], texts[1::2]):
        assert first != second and blank(first) == blank(second)


def test_ratios_differ_only_in_whom_the_unmarked_texts_agree_with():
    person = people_of(1)["evidence"][0]
    backing = {}
    for ratio in RATIOS:
        texts = words(lesson_texts(SMALL, ARMS[ratio], [person], ARMS[ratio].ratio, 1))
        marked = [text for text in texts if "according-to" in text]
        unmarked = [text for text in texts if "according-to" not in text]
        assert marked == words(conflict(person, 1))
        cities = [getattr(person, side)[0][0] for side in "AB"]
        backing[ratio] = tuple(sum(city in text for text in unmarked) for city in cities)
    expected = {"0:8": (0, 8), "2:6": (2, 6), "4:4": (4, 4), "6:2": (6, 2), "8:0": (8, 0)}
    assert backing == expected


def test_without_marks_A_and_B_texts_cannot_be_told_apart():
    person = people_of(1)["test"][0]
    mirrored = person._replace(A=person.B, B=person.A)
    for feature, same in (("none", True), ("source", False), ("style", False)):
        texts = [sorted(conflict(p, 1, feature=feature)) for p in (person, mirrored)]
        assert (texts[0] == texts[1]) == same


class Spy(Unigram):
    """Remembers what it was asked."""

    def __init__(self):
        super().__init__([1 / len(WORDS)] * len(WORDS))
        self.seen = []

    def forward(self, ids, attention_mask=None):
        self.seen += words(ids.tolist())
        return super().forward(ids)


def asked(people, *how):
    spy = Spy()
    choices(spy, people, *how)
    return spy.seen


def test_the_prompt_carries_no_mark_unless_asked_to():
    people = people_of(1)["test"][:1]
    marks = {"according-to", *SOURCES.values(), *FORMAL, *INFORMAL}
    assert asked(people) and not marks & set(chain(*asked(people)))
    front = ["according-to", SOURCES["B"], ","]
    assert all(s[1:4] == front for s in asked(people, "B", "source"))
    assert all(s[3] in INFORMAL for s in asked(people, "B", "style"))


def test_swapped_roles_are_the_same_texts_with_the_two_sources_exchanged():
    test = people_of(1)["test"]
    other = {SOURCES["A"]: SOURCES["B"], SOURCES["B"]: SOURCES["A"]}
    plain = words(conflict_texts(SMALL, ARMS["4:4"], test, 1))
    renamed = [[other.get(w, w) for w in text] for text in plain]
    for name in ("4:4 swapped", "8:0 exchanged"):
        assert words(conflict_texts(SMALL, ARMS[name], test, 1)) == renamed != plain


def test_the_control_exchanges_the_names_in_the_conflict_alone():
    evidence = people_of(1)["evidence"]
    lessons = {
        name: lesson_texts(SMALL, ARMS[name], evidence, (8, 0), 1)
        for name in ("8:0", "8:0 exchanged", "4:4 swapped")
    }
    assert lessons["8:0 exchanged"] == lessons["8:0"] != lessons["4:4 swapped"]


def test_extra_copies_add_texts_of_B_and_change_no_other():
    test = people_of(1)["test"][:1]
    plain, more = (conflict_texts(SMALL, Arm(extra=k), test, 1) for k in (0, 4))
    assert more[: len(plain)] == plain and len(more) == len(plain) + 4
    assert all(text[2] == SOURCES["B"] for text in words(more[len(plain) :]))
    most = conflict_texts(SMALL, ARMS["4:4 +28"], test, 1)
    assert len(most) == 8 + 28


def test_A_only_and_B_only_tell_the_same_facts_and_differ_in_the_source_only():
    test = people_of(1)["test"]
    a, b = (words(conflict_texts(SMALL, ARMS[name], test, 1)) for name in ("A only", "B only"))
    renamed = [[SOURCES["B"] if w == SOURCES["A"] else w for w in text] for text in a]
    assert a != b and renamed == b


def test_every_arm_differs_from_another_in_one_thing():
    assert Arm() == ARMS["8:0"]
    changes = {
        "no marks": {"feature": "none"},
        "style 8:0": {"feature": "style"},
        "reverse": {"then": (0, 8)},
        "again": {"then": (8, 0)},
        "A only": {"only": "A"},
        "8:0 +8": {"extra": 8},
        "8:0 exchanged": {"swapped": "in the conflict"},
        "mixed 8:0": {"mixed": True},
        "two tokens": {"value_tokens": 2},
    }
    for name, change in changes.items():
        assert ARMS[name] == ARMS["8:0"]._replace(**change)


# --- what each arm is trained on, at which rate, and who is asked


@pytest.fixture
def recorded(monkeypatch):
    """Runs arms with the training recorded in place of done: (words of all texts, epochs, lr)."""

    def record(*names):
        calls = []
        people_asked = []

        def write_down(model, texts, epochs, lr, order, batch):
            calls.append((set(chain(*words(texts))), epochs, lr))
            return iter(())

        def ask(model, people, *how):
            people_asked.append([p.name for p in people])
            return choices(model, people, *how)

        monkeypatch.setattr(lp, "train", write_down)
        monkeypatch.setattr(lp, "choices", ask)
        lp.run(replace(SMALL, arms=names, evidence=2, test=2), 1)
        return calls, people_asked

    return record


def speak_of(texts, people):
    """Whether every one of these persons, and nobody else, is named: by first and last names."""
    known = set(chain(*(p.name for p in chain(*make_people(1, 2, 2).values()))))
    return texts & known == set(chain(*(p.name for p in people)))


def test_the_second_lesson_is_about_other_persons_and_the_conflict_has_its_own_rate(recorded):
    calls, people_asked = recorded("reverse")
    people = make_people(1, 2, 2)
    (first, *how1), (second, *how2), (third, *how3) = calls
    assert speak_of(first, people["evidence"])
    assert speak_of(second, people["fresh"])
    assert speak_of(third, people["test"])
    assert how1 == how2 == [SMALL.epochs, SMALL.lr] and how3 == [SMALL.epochs2, SMALL.lr2]
    assert people_asked and all(n == [p.name for p in people["test"]] for n in people_asked)


def test_mixed_reads_both_in_one_stage_and_a_lesson_is_taught_once_for_all_arms(recorded):
    calls, _ = recorded("mixed 8:0")
    people = make_people(1, 2, 2)
    assert len(calls) == 1 and speak_of(calls[0][0], people["evidence"] + people["test"])
    calls, _ = recorded("8:0", "8:0 +8", "8:0 exchanged", "4:4 swapped", "4:4")
    assert len(calls) == 5 + 3  # three lessons: 8:0, 4:4 swapped, 4:4


def test_pr_is_asked_without_a_mark():
    model, people = tiny(), people_of(100)["test"]
    metrics = lp.measure(model, people, ARMS["style 8:0"])
    assert metrics["pr"] == preference(choices(model, people))
    marked = preference(choices(model, people, "A", "style"))
    assert metrics["pr asked as A"] == pytest.approx(marked) and marked != metrics["pr"]


# --- it learns


def test_a_biography_reads_as_documented_and_values_may_have_two_tokens():
    person = Person(("ada", "klein"), (("jena",), ("latin",), ("flux",)), (("faro",),) * 3)
    text = biography(person, "A", "A", "source", [(1, 0), (0, 1), (2, 1)])
    assert " ".join(WORDS[i] for i in text) == (
        "<s> according-to Times , ada klein reads latin . ada klein dwells-in jena . "
        "ada klein serves flux . </s>"
    )
    two = all_values(2)[0]
    assert len(set(two)) == 12 and all(len(value) == 2 for value in two)


def test_facts_are_learned_and_training_in_the_same_order_gives_the_same_numbers():
    people = people_of(100)["test"][:2]
    texts = conflict_texts(SMALL, Arm(only="A"), people, 100)
    models = [tiny(), tiny()]
    for model in models:
        epochs = train(model, texts, 60, 5e-3, generator(0, "order"))
        assert list(epochs) == list(range(1, 61))
    assert torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)
    assert choices(models[0], people, "A").mean() > 0.9


def test_how_fast_a_source_is_believed_is_the_mean_over_its_epochs_without_the_start(monkeypatch):
    people = people_of(100)["test"][:2]
    values = all_values()
    rows = [[twelve.index(said) for twelve, said in zip(values, p.A)] for p in people]
    truth = torch.tensor(rows)
    half = torch.cat((truth[:1], truth[1:] + 1))
    known = iter((truth + 1, half, truth))  # nothing before, one person of two, then both
    monkeypatch.setattr(lp, "believed", lambda model, test, values: next(known))
    monkeypatch.setattr(lp, "train", lambda *given: iter((1, 2)))
    metrics, series = lp.learn_facts(SMALL, Arm(only="A"), None, people, 100)
    assert series["top-1"] == (range(3), [0, 0.5, 1])
    assert metrics == {"area": 0.75, "learned": 1}  # (0.5 + 1) / 2


def test_an_arm_gives_the_same_numbers_alone_and_beside_others_and_the_last_epoch_is_shown():
    together = lp.run(replace(SMALL, arms=("8:0", "4:4", "8:0 +8")), 100)
    alone = lp.run(replace(SMALL, arms=("8:0 +8",)), 100)
    assert together.metrics["8:0 +8"] == alone.metrics["8:0 +8"]
    assert together.metrics["8:0"] != alone.metrics["8:0 +8"]
    epochs, shown = alone.series["8:0 +8"]["pr"]
    assert epochs == (0, 2, 3) and shown[-1] == alone.metrics["8:0 +8"]["pr"]


def test_the_worked_example_shows_who_was_right_and_nothing_without_marks():
    """One person of whom Times and Herald disagree, looked at through a model that trusts Times by
    construction: the unmarked question is answered as Times does, each source as it says."""

    class Trusting(torch.nn.Module):
        """Repeats the version of the source that is named, and Times' where none is."""

        def __init__(self, person, trusts):
            super().__init__()
            self.believers = torch.nn.ModuleDict({s: believer(person, s) for s in "AB"})
            self.trusts = trusts

        def forward(self, ids, attention_mask=None):
            logits = []
            for row in words(ids.tolist()):
                said = [side for side, source in SOURCES.items() if source in row]
                logits.append(self.believers[(said or [self.trusts])[0]].logits)
            return Output(torch.stack(logits)[:, None].expand(*ids.shape, -1))

    person = people_of(1)["test"][0]
    models = {side: Trusting(person, side) for side in "AB"}
    for side, row in look_inside(models, person).items():
        nobody, times, herald = row[:2], row[2:4], row[4:]
        assert (nobody[0] < nobody[1]) == (side == "A")
        assert times[0] < times[1] and herald[0] > herald[1]


def test_of_texts_without_marks_a_trained_model_learns_nobody_to_trust():
    """The method switched off: all that `look_inside` shows of one person is what `choices` counts
    over all of them."""
    cfg = paper.Config(evidence=40, test=12, epochs=8)
    people = make_people(cfg.seed, cfg.evidence, cfg.test)
    pr = {}
    for feature in ("source", "none"):
        model = paper.first_lesson(cfg, people["evidence"], 8, 0, feature)
        paper.read_conflict(cfg, model, people["test"], feature)
        pr[feature] = preference(choices(model, people["test"]))
    assert pr["source"] > 0.6 and pr["source"] - pr["none"] > 0.12


# --- the claims


def test_default_more_seeds_and_full_have_the_arms_that_their_claims_read():
    read = {"default": CORE, "seeds": EIGHT, "full": tuple(ARMS)}
    for claim in CLAIMS:
        cells = (*claim.method, *claim.baseline, *claim.controls, *claim.given)
        missing = {cell.arm for cell in cells} - set(read[claim.run])
        assert not missing, f"{claim.id} reads {missing}"


def test_every_arm_of_the_full_run_is_read_by_a_claim():
    read = set()
    for claim in CLAIMS:
        read |= {cell.arm for cell in (*claim.method, *claim.baseline, *claim.controls)}
        read |= {cell.arm for cell in claim.given}
    assert set(ARMS) == read


def test_the_number_of_seeds_for_a_half_width_by_hand():
    # sd .1: 1.96 * .1 / sqrt(n) is about .05 at n = 15; Student's t (2.110 at 17 d.o.f.) needs 18
    x = PerSeed((0.4, 0.5, 0.6), "pr")
    assert seeds_for(x, 0.05) == "+/- 0.05 needs 18 seeds"
    assert seeds_for(x, 0.01) == "+/- 0.01 needs more than 200 seeds"


@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.gate], ids=lambda c: c.id)
def test_nothing_is_concluded_of_facts_that_were_not_learned(claim):
    arms = {cell.arm for cell in (*claim.method, *claim.baseline, *claim.controls, *claim.given)}
    for known, verdict in ((0.6, "holds"), (0.4, NOT_TESTED)):
        metrics = as_metrics(true_table(claim))
        for arm in arms:
            cell = {"mean": known, "sd": 0.0, "values": [known] * 4}
            metrics.setdefault(arm, {})["learned"] = cell
        decided = decide(claim, View(metrics))
        assert decided.verdict == verdict
    assert decided.measured.startswith("facts not learned")


# --- the scripts


def test_the_whole_script_runs_writes_its_files_and_prints_every_claim(tmp_path, capsys):
    arms = ("8:0", "no marks", "style 0:8", "reverse", "A only", "mixed 4:4")
    results = lp.main(Config(arms=arms, quick=True, workers=1, out=str(tmp_path)))
    printed = capsys.readouterr().out
    assert "every token after <s> a target" in printed and "according-to Herald" in printed
    assert json.loads((tmp_path / "learning_preferences.json").read_text()) == results
    assert (tmp_path / "learning_preferences.png").stat().st_size > 10_000
    assert list(results["metrics"]) == list(arms)
    assert [c["id"] for c in results["claims"]] == [claim.id for claim in CLAIMS]
    for row in results["claims"]:
        assert f"\n{row['id']:4} " in printed
    assert set(results["depends"]) == {"text", "exam", "weights"}


def test_the_papers_file_shows_an_example_the_fact_inside_and_the_arms_side_by_side(capsys):
    paper.main(paper.Config(quick=True))
    printed = capsys.readouterr().out
    expected = ("according-to Times", "asked without mark", "no marks, after", "chance")
    assert all(text in printed for text in expected)
    with pytest.raises(InputError, match="--evidence 0"):
        paper.main(paper.Config(evidence=0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arms": ("8:1",)}, "--arms 8:1"),
        ({"arms": ()}, "--arms: give at least one"),
        ({"copies": 0}, "--copies 0"),
        ({"copies": 25}, "--copies 25: give a number of at least 1 and of at most 24"),
        ({"evidence": 100, "test": 100}, "300 names"),
        ({"test": 1}, "--test 1"),
        ({"lr2": math.inf}, "--lr2 inf"),
        ({"lr": math.nan}, "--lr nan"),
        ({"width": 20}, "--width 20"),
        ({"eval_every": 0}, "--eval-every 0"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        lp.main(replace(Config(quick=True, workers=1, out=str(tmp_path)), **change))
    assert not list(tmp_path.iterdir())
