"""Learning preferences: the metric by hand, the conditions without which the experiment would be trivially true, and the whole script."""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest
import torch

from methods.experiments import learning_preferences as lp
from methods.experiments.learning_preferences import (ARMS, ID, RATIOS, SOURCE, WORDS, Arm, Config, at, believed, biography, choices,
                                          claims, make_people, make_texts, perplexities, preference, prefers, speed, stage1)
from minilm.claims import held
from minilm import InputError
from minilm.data import generator
from minilm.results import ROOT
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Output, Transformer

SMALL = Config(evidence=8, test=6, epochs=1, epochs2=3)
words = lambda texts: [[WORDS[i] for i in text] for text in texts]


def tiny():
    return Transformer(ModelConfig(vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                                   model_type="llama"), generator(0, "init"))


class Unigram(torch.nn.Module):
    """A "model" whose next-token probabilities never change: perplexities can be worked out by hand."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, ids, attention_mask=None):
        return Output(self.logits.expand(*ids.shape, -1))


# --- the metric

def test_perplexity_is_the_geometric_mean_over_all_tokens_but_the_first():
    model = Unigram([0.5, 0.25, 0.125, 0.125])
    # [2, 0, 1]: tokens 2..T have p = 1/2, 1/4: exp(mean(-log)) = sqrt(2 * 4); the first token (p = 1/8) is not scored.  [3, 2]: 8
    torch.testing.assert_close(perplexities(model, [[2, 0, 1], [3, 2]]), torch.tensor([math.sqrt(8), 8.0]))


def test_padding_beside_a_longer_sentence_never_enters_the_mean():
    model, short, long = tiny(), [1, 9, 10], [1, 9, 10, 11, 12, 13, 14]
    torch.testing.assert_close(perplexities(model, [short, long])[0], perplexities(model, [short])[0])


def test_perplexity_by_hand_equals_the_models_own_probabilities():
    model, ids = tiny(), [1, 9, 30, 40, 3]
    logp = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    expected = math.exp(-sum(logp[t, ids[t + 1]].item() for t in range(4)) / 4)
    assert perplexities(model, [ids]).item() == pytest.approx(expected, rel=1e-5)


def test_a_tie_is_skipped_or_counts_for_the_second_version():
    first, second = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 1.0])
    assert prefers(first, second, "second").tolist() == [1, 0, 0]
    skipped = prefers(first, second)
    assert skipped[0] == 1 and skipped[1].isnan() and skipped[2] == 0
    assert skipped.nanmean() == 0.5  # of the two that can be decided
    assert torch.equal(prefers(second, first)[[0, 2]], 1 - skipped[[0, 2]])  # Pr(B, A) = 1 - Pr(A, B) without ties


def test_the_preference_is_the_unweighted_mean_over_attributes():
    nan = torch.nan
    # attribute 1: 2 of 2 for A (two ties); attribute 2: 1 of 4: (1 + 0.25) / 2, not 3 / 6
    assert preference(torch.tensor([[1.0, 1], [1, 0], [nan, 0], [nan, 0]]))["pr"] == pytest.approx(0.625)


def test_the_bootstrap_resamples_persons_because_one_persons_attributes_go_together():
    together = preference((torch.arange(100) % 2).float()[:, None].expand(100, 3))  # each person answers all three alike
    apart = preference((torch.arange(300) * 7919 % 2).float()[torch.randperm(300, generator=generator(0, "mix"))].view(100, 3))
    assert together["pr se"] == pytest.approx(0.05, abs=0.006)  # sqrt(0.25 / 100)
    assert apart["pr se"] < 0.7 * together["pr se"]
    assert together["pr low"] < together["pr"] < together["pr high"]


def test_speed_by_hand():
    assert speed([0.2, 0.95, 0.8]) == {"area": pytest.approx(0.65), "epochs to 90%": 2}
    assert speed([0.2, 0.3])["epochs to 90%"] == 3  # never: one more than there are


def test_a_model_that_knows_the_facts_gets_every_one_and_one_that_believes_A_chooses_A():
    cfg, person = SMALL, make_people(SMALL, 5)["test"][0]
    probabilities = torch.full((len(WORDS),), 1e-3)
    for a in range(3):
        probabilities[ID[lp.value_words(cfg, a, person.A[a])[0]]] = 0.1
    model = Unigram((probabilities / probabilities.sum()).tolist())
    assert choices(cfg, model, [person]).tolist() == [[1, 1, 1]]
    assert tuple(believed(cfg, model, [person])[0].tolist()) == person.A


# --- what keeps the experiment honest (sheet: "trivially true if ...")

@pytest.mark.parametrize("name", [name for name in ARMS if ARMS[name].only is None and not ARMS[name].extra])
def test_in_stage_2_both_sides_are_equally_frequent_and_no_unmarked_text_speaks_of_a_test_person(name):
    arm = ARMS[name]
    cfg = replace(SMALL, **arm.changes)
    for person in make_people(cfg, 3)["test"]:
        texts = words(make_texts(cfg, [person], arm, None, 3))
        assert len(texts) == 2 * cfg.copies
        for a in range(3):
            says = {side: lp.value_words(cfg, a, getattr(person, side)[a]) for side in "AB"}
            counts = {side: sum(value == text[i : i + len(value)] for text in texts for i in range(len(text)))
                      for side, value in says.items()}
            assert counts == {"A": cfg.copies, "B": cfg.copies}
        if arm.feature == "source":
            assert Counter(text[2] for text in texts) == {SOURCE["A"]: cfg.copies, SOURCE["B"]: cfg.copies}
        if arm.feature == "style":
            neutral = set(chain(*lp.RELATIONS["neutral"]))
            assert not neutral & set(chain(*texts))


def test_the_three_groups_of_persons_share_no_name_and_the_two_versions_differ_in_every_attribute():
    people = make_people(Config(), 0)
    names = [p.name for group in people.values() for p in group]
    assert len(names) == len(set(names)) == 180
    assert all(a != b for group in people.values() for p in group for a, b in zip(p.A, p.B))


def test_stage_2_is_the_same_for_every_ratio_and_A_and_B_texts_are_mirror_images():
    test = make_people(SMALL, 1)["test"]
    stage2 = {r: make_texts(SMALL, test, ARMS[r], None, 1) for r in RATIOS}
    assert all(texts == stage2["4:4"] for texts in stage2.values())
    for text in words(stage2["8:0"]):
        assert text[1] == "according-to" and text[2] in SOURCE.values()
    values = set(chain(*lp.VALUES.values()))
    blank = lambda text: ["value" if w in values else "source" if w in SOURCE.values() else w for w in text]
    for first, second in zip(words(stage2["8:0"])[::2], words(stage2["8:0"])[1::2]):
        assert first != second and blank(first) == blank(second)


def test_ratios_differ_only_in_whom_the_unmarked_texts_agree_with():
    person = make_people(SMALL, 1)["evidence"][:1]
    backing = {}
    for r in RATIOS:
        texts = words(make_texts(SMALL, person, ARMS[r], ARMS[r].ratio, 1))
        neutral = [t for t in texts if "according-to" not in t]
        city = {side: lp.value_words(SMALL, 0, getattr(person[0], side)[0])[0] for side in "AB"}
        backing[r] = tuple(sum(city[side] in t for t in neutral) for side in "AB")
        assert [t for t in texts if "according-to" in t] == words(make_texts(SMALL, person, ARMS[r], None, 1))
    assert backing == {"0:8": (0, 8), "2:6": (2, 6), "4:4": (4, 4), "6:2": (6, 2), "8:0": (8, 0)}


def test_without_marks_A_and_B_texts_cannot_be_told_apart():
    person = make_people(SMALL, 1)["test"][0]
    swapped = person._replace(A=person.B, B=person.A)
    texts, mirrored = (sorted(make_texts(SMALL, [p], ARMS["no marks"], None, 1)) for p in (person, swapped))
    assert texts == mirrored
    assert sorted(make_texts(SMALL, [person], ARMS["8:0"], None, 1)) != sorted(make_texts(SMALL, [swapped], ARMS["8:0"], None, 1))


def test_the_prompt_carries_no_mark_unless_asked_to():
    seen = []

    class Spy(Unigram):
        def forward(self, ids, attention_mask=None):
            seen.extend(words(ids.tolist()))
            return super().forward(ids)

    model, people = Spy([1 / len(WORDS)] * len(WORDS)), make_people(SMALL, 1)["test"][:1]
    marks = {"according-to", *SOURCE.values(), *chain(*lp.RELATIONS["A"]), *chain(*lp.RELATIONS["B"])}
    choices(SMALL, model, people)
    assert seen and not marks & set(chain(*seen))
    seen.clear()
    choices(SMALL, model, people, "B", "source")
    assert all(s[1:4] == ["according-to", SOURCE["B"], ","] for s in seen)
    seen.clear()
    choices(SMALL, model, people, "B", "style")
    assert all(s[3] in set(chain(*lp.RELATIONS["B"])) for s in seen)


def test_swapped_roles_are_the_same_texts_with_the_two_sources_exchanged():
    test = make_people(SMALL, 1)["test"]
    plain, swapped = (words(make_texts(SMALL, test, ARMS[name], None, 1)) for name in ("4:4", "4:4 swapped"))
    other = {SOURCE["A"]: SOURCE["B"], SOURCE["B"]: SOURCE["A"]}
    assert plain != swapped and [[other.get(w, w) for w in text] for text in plain] == swapped


def test_extra_copies_add_texts_of_B_and_change_no_other():
    test = make_people(SMALL, 1)["test"][:1]
    plain, more = (make_texts(SMALL, test, Arm(extra=k), None, 1) for k in (0, 4))
    assert more[: len(plain)] == plain and len(more) == len(plain) + 4
    assert all(t[2] == SOURCE["B"] for t in words(more[len(plain) :]))


def test_A_only_and_B_only_tell_the_same_facts_and_differ_in_the_source_only():
    test = make_people(SMALL, 1)["test"]
    a, b = (words(make_texts(SMALL, test, ARMS[name], None, 1)) for name in ("A only", "B only"))
    rename = lambda text: [SOURCE["B"] if w == SOURCE["A"] else w for w in text]
    assert a != b and [rename(t) for t in a] == b


def test_every_arm_differs_from_another_in_one_thing():
    assert Arm() == ARMS["8:0"] == at("8:0")
    for name, change in (("no marks", {"feature": "none"}), ("style 8:0", {"feature": "style"}), ("reverse", {"then": (0, 8)}),
                         ("A only", {"only": "A"}), ("8:0 +4", {"extra": 4}), ("mixed 8:0", {"mixed": True})):
        assert ARMS[name] == ARMS["8:0"]._replace(**change)


# --- it learns

def test_a_biography_reads_as_documented_and_values_may_have_two_tokens():
    person = lp.Person(("ada", "klein"), (9, 10, 5), (0, 0, 0))
    text = biography(Config(), person, "A", "A", "source", [(1, 0), (0, 1), (2, 1)])
    assert " ".join(WORDS[i] for i in text) == ("<s> according-to Times , ada klein reads korean . ada klein dwells-in jena . "
                                                "ada klein serves flux . </s>")
    two = {tuple(lp.value_words(Config(value_tokens=2), 0, v)) for v in range(12)}
    assert len(two) == 12 and all(len(v) == 2 for v in two)


def test_the_facts_of_two_persons_are_learned_and_training_in_the_same_order_gives_the_same_numbers():
    cfg = replace(SMALL, width=32, layers=1)
    people = make_people(cfg, 100)["test"][:2]
    texts = make_texts(cfg, people, Arm(only="A"), None, 100)
    models = [tiny(), tiny()]
    for model in models:
        assert list(lp.train(cfg, model, texts, 60, 5e-3, generator(0, "order"))) == list(range(1, 61))
    assert torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)
    chosen = choices(cfg, models[0], people, "A")
    assert chosen.mean() > 0.9


def test_an_arm_gives_the_same_numbers_alone_and_beside_other_arms():
    together = lp.run(replace(SMALL, arms=("8:0", "8:0 +4", "no marks")), 100)
    alone = lp.run(replace(SMALL, arms=("8:0 +4",)), 100)
    assert together.metrics["8:0 +4"] == alone.metrics["8:0 +4"]
    assert together.metrics["8:0"] != alone.metrics["8:0 +4"]


def test_arms_with_the_same_first_stage_start_from_the_same_model():
    people = make_people(SMALL, 100)
    alone = stage1(SMALL, ARMS["8:0 +4"], people, 100, {})
    trained = {}
    models = [stage1(SMALL, ARMS[name], people, 100, trained) for name in ("8:0", "reverse", "8:0 +4")]
    assert len(trained) == 2  # the lesson 8:0, and what `reverse` added to it
    assert torch.equal(models[0].lm_head.weight, alone.lm_head.weight) and torch.equal(models[2].lm_head.weight, alone.lm_head.weight)
    assert not torch.equal(models[1].lm_head.weight, alone.lm_head.weight)


# --- the script

def cells(table):
    return {arm: {name: {"mean": value, "sd": 0.0, "values": [value] * 4} for name, value in row.items()} for arm, row in table.items()}


def good():
    """Made-up means that agree with every claim."""
    row = lambda pr: {"pr": pr, "pr se": 0.03, "pr before": 0.5, "pr before se": 0.03, "learned": 0.95}
    table = {"0:8": row(0.1), "2:6": row(0.3), "4:4": row(0.5), "6:2": row(0.7), "8:0": row(0.9), "no marks": row(0.51),
             "reverse": row(0.2), "style 0:8": row(0.1), "style 8:0": row(0.9), "d32 0:8": row(0.3), "d32 8:0": row(0.7),
             "d128 0:8": row(0.05), "d128 8:0": row(0.95)}
    table |= {"8:0 +8": row(0.8), "4:4 +8": row(0.3)}
    speeds = lambda epochs: {"epochs to 90%": epochs, "area": 1 / epochs, "top-1": 1.0}
    return table | {"A only": speeds(3), "B only": speeds(6)}


def verdicts(table):
    return {c["id"]: held(c) for c in claims(cells(table))}


def test_the_claims_hold_on_made_up_numbers_that_agree_with_them_and_are_open_without_their_arms():
    untestable = dict.fromkeys(("C1", "C2", "C3", "C4"))
    assert verdicts(good()) == untestable | dict.fromkeys(("C5", "C6", "C7", "C8", "C9", "C10", "R1", "F1"), True)
    assert all(c["measured"].startswith("needs a pretrained model of 1B") for c in claims(cells(good()))[:4])
    few = verdicts({"8:0": good()["8:0"]})
    assert set(few.values()) == {None}


@pytest.mark.parametrize("id, arm, change", [
    ("C5", "8:0", {"pr": 0.6}), ("C5", "2:6", {"pr": 0.55}), ("C5", "0:8", {"pr": 0.4}), ("C5", "8:0", {"learned": 0.2}),
    ("C6", "4:4", {"pr": 0.56}), ("C6", "0:8", {"pr before": 0.44}), ("C7", "reverse", {"pr": 0.48}), ("C7", "8:0", {"pr": 0.5}),
    ("C8", "A only", {"epochs to 90%": 7}), ("C8", "A only", {"area": 0.2}), ("C9", "style 8:0", {"pr": 0.5}),
    ("C9", "style 0:8", {"pr": 0.5}), ("C10", "d128 8:0", {"pr": 0.6}), ("R1", "no marks", {"pr": 0.9}), ("F1", "8:0 +8", {"pr": 0.4}),
    ("F1", "4:4 +8", {"pr": 0.5}), ("F1", "8:0 +8", {"pr": 0.65})])
def test_a_claim_fails_on_made_up_numbers_that_contradict_it(id, arm, change):
    table = good()
    table[arm] = table[arm] | change
    assert verdicts(table)[id] is False


def test_a_spread_over_seeds_does_not_excuse_a_lean_of_more_than_a_tenth():
    table = cells(good())
    for mean, holds in ((0.59, True), (0.61, False)):
        table["4:4"]["pr"] = {"mean": mean, "sd": 0.13, "values": [mean] * 4}
        assert {c["id"]: held(c) for c in claims(table)}["C6"] is holds


def test_widths_are_not_compared_where_one_has_not_learned_the_facts():
    table = good()
    table["d32 8:0"]["learned"] = 0.47
    assert verdicts(table)["C10"] is None and "facts not learned" in {c["id"]: c for c in claims(cells(table))}["C10"]["measured"]


def test_the_whole_script_runs_writes_its_files_and_prints_every_claim(tmp_path, capsys):
    results = lp.main(Config(quick=True, workers=1, out=str(tmp_path)))
    printed = capsys.readouterr().out
    assert "every token after <s> a target" in printed and "according-to Herald" in printed
    assert json.loads((tmp_path / "learning_preferences.json").read_text()) == results
    assert (tmp_path / "learning_preferences.png").stat().st_size > 10_000
    assert [c["id"] for c in results["claims"]] == ["C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9", "C10", "R1", "F1"]
    for c in results["claims"]:
        assert f"\n{c['id']:4} " in printed


@pytest.mark.parametrize("change, message", [
    ({"arms": ("8:1",)}, "8:1"), ({"value_tokens": 3}, "--value-tokens"), ({"copies": 0}, "--copies"), ({"copies": 17}, "--copies"),
    ({"evidence": 100, "test": 100}, "300 names"), ({"test": 1}, "--test 1")])
def test_wrong_settings_are_refused_in_one_line(change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        lp.main(replace(Config(quick=True, workers=1, out=str(tmp_path)), **change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["learning_preferences", "learning_preferences_full"])
def test_the_committed_claims_and_figure_follow_from_the_committed_numbers(name):
    path = ROOT / "results" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"results/{name}.json is not committed")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert claims(results["metrics"]) == results["claims"]
    assert len(lp.figure(results).axes) == 4
