"""The scorers, by hand: free text, Hallu-PI's metrics, AMBER's with all of their quirks, and what is refused."""

import json

import pytest

from minilm import InputError
from vision_eval.metrics import (Item, amber_discriminative, amber_generative, amber_score, discriminative, generative, make_amber,
                                 mentions, parse_number, parse_yes_no, pi_score, score)

SHAPES = ("circle", "square", "box", "person", "traffic light", "light", "ring")


# --- free text

@pytest.mark.parametrize("text, first, strict, mme", [
    ("Yes", "yes", "yes", "yes"), ("no", "no", None, "no"), ("Yes.", "yes", None, "yes"), ("two yes", "yes", None, None),
    ("I know nothing", None, None, None), ("Note that yes", "yes", None, "no"), ("", None, None, None), (None, None, None, None),
    ("Not sure, but yes", "yes", None, "no"), (" No ", "no", None, "no")])
def test_three_parsers_read_yes_and_no_each_in_its_way(text, first, strict, mme):
    assert [parse_yes_no(text, mode) for mode in ("first", "strict", "mme")] == [first, strict, mme]


def test_numbers_are_one_answer_in_digits_and_in_words():
    assert [parse_number(t) for t in ("There are 6.", "six", "26 letters", "none", None, "often")] == ["six", "six", "26", None, None, None]


def test_plurals_and_names_of_several_words_are_recognised_and_repeats_are_kept():
    assert mentions("Two boxes, people and a Circle; circles!", SHAPES) == ["box", "person", "circle", "circle"]
    assert mentions("A traffic light beside a light.", SHAPES) == ["traffic light", "light"]
    assert mentions("lights of traffic; foxes; encircled", SHAPES) == ["light"]


def test_negation_is_ignored_unless_asked_for():
    text = "There is no circle, but a square. It isn't a box."
    assert mentions(text, SHAPES) == ["circle", "square", "box"] and mentions(text, SHAPES, negation=True) == ["square"]


# --- paper

def test_generative_metrics_by_hand():
    # 1: R = circle, circle, ring (ring is the Hal-object): 1 of 3 wrong, 1 of 2 objects covered.  2: silent.  3: R = square: right, 1 of 2.
    rows = [("a circle, a circle and a ring", ["circle", "square"], ["ring"]), ("nothing to see", ["circle"], []),
            ("a square", ["square", "box"], [])]
    micro, macro = (generative(rows, SHAPES, aggregate) for aggregate in ("micro", "macro"))
    assert micro == {"CHAIR": 25, "Cover": 40, "Hal": pytest.approx(100 / 3), "Cog": 25, "silent": pytest.approx(100 / 3), "unanswered": 0}
    assert macro["CHAIR"] == pytest.approx(100 / 9) and macro["Cover"] == pytest.approx(100 / 3) and macro["Hal"] == micro["Hal"]


def test_a_silent_model_never_hallucinates_and_covers_nothing():
    row = generative([("", ["circle"], ["ring"]), (None, ["square"], [])], SHAPES)
    assert (row["CHAIR"], row["Hal"], row["Cover"], row["silent"], row["unanswered"]) == (0, 0, 0, 100, 1)


def test_saying_yes_to_everything_gives_the_published_50_0_66_7():
    rows = [("Yes", truth, str(i)) for i in range(5) for truth in ("yes", "no")]
    row = discriminative(rows)
    assert (row["ACC"], row["ACC+"], round(row["F1"], 1), row["yes rate"]) == (50, 0, 66.7, 100)
    assert discriminative([("No", truth, pair) for _, truth, pair in rows])["F1"] == 0  # nothing positive answered: 0, not NaN
    assert discriminative([("No", truth, pair) for _, truth, pair in rows], positive="no")["F1"] == pytest.approx(66.67, abs=0.01)


def test_acc_counts_questions_and_acc_plus_pairs_and_what_is_not_understood_is_wrong():
    rows = [("yes", "yes", "a"), ("no", "no", "a"), ("yes", "yes", "b"), ("well", "no", "b"), (None, "yes", "c"), ("no", "no", "c")]
    row = discriminative(rows)
    assert (row["ACC"], row["ACC+"], row["invalid"], row["unanswered"], row["yes rate"]) == (
        pytest.approx(400 / 6), pytest.approx(100 / 3), pytest.approx(100 / 3), 1, 50)


def test_the_pi_score_is_the_published_one():
    assert pi_score(58.3, 49.0) == pytest.approx(45.35)  # CogVLM before concatenation, printed 45.4


def items():
    yes_no = lambda pair, field, truth: Item(f"{pair}{truth}", "0", "noise", "after", "disc", field, pair, "?", truth)
    return [yes_no("a", "color", "yes"), yes_no("a", "color", "no"), yes_no("b", "number", "yes"), yes_no("b", "number", "no"),
            Item("g", "0", "noise", "after", "gen", "describe", "", "?", "", ("circle",), ("ring",)),
            Item("h", "0", "crop", "after", "gen", "how many", "", "?", "six")]


def test_a_whole_table_from_items_and_answers():
    answers = {"ayes": "yes", "ano": "no", "byes": "yes", "bno": "yes", "g": "a circle and a ring", "h": "9"}
    table = score(items(), answers)
    noise = table["noise", "after"]
    assert (noise["ACC+"], noise["ACC+ color"], noise["ACC+ number"], noise["Hal"], noise["PI"]) == (50, 100, 0, 100, 25)
    assert table["crop", "after"] == {"Hal": 100, "unanswered": 0}  # a wrong number is a hallucination
    assert score(items(), {**answers, "h": "six"})["crop", "after"]["Hal"] == 0


def test_an_answer_that_never_came_is_reported_not_dropped():
    row = score(items(), {"ayes": "yes"})["noise", "after"]
    assert row["unanswered"] == 4 and row["ACC"] == 25


def test_half_a_pair_strange_repeated_and_empty_answers_are_refused():
    with pytest.raises(InputError, match="pair b has one question only"):
        score([i for i in items() if i.id != "bno"], {"ayes": "yes"})
    with pytest.raises(InputError, match="no question with that id"):
        score(items(), {"zzz": "yes"})
    with pytest.raises(InputError, match="no answers"):
        score(items(), {})
    with pytest.raises(InputError, match="id g occurs more than once"):
        score([*items(), items()[4]], {"g": "x"})
    with pytest.raises(InputError, match="a second or unknown 'yes'"):
        discriminative([("yes", "yes", "a"), ("yes", "yes", "a")])


# --- amber

ASSOCIATIONS = {"sky": [], "grass": ["ground"], "ground": ["floor"], "man": ["person"], "dog": [], "car": ["wheel"], "line": []}


def amber(similar=None):
    rows = [{"id": 1, "type": "generative", "truth": ["grass", "ground", "man"], "hallu": ["dog", "car"]},
            {"id": 2, "type": "discriminative-attribute-state", "truth": "yes"},
            {"id": 3, "type": "discriminative-attribute-state", "truth": "no"},
            {"id": 4, "type": "discriminative-hallucination", "truth": "no"}, {"id": 5, "type": "relation", "truth": "no"},
            {"id": 6, "type": "discriminative-relation", "truth": "yes"}]
    return make_amber(rows, ASSOCIATIONS, ["line"], similar)


def test_amber_generative_by_hand():
    # kept nouns: ground (an associated word credits its *first* owner: grass), person (man), line (safe: only in the denominator),
    # wheel (marks car), sky (neither) -> 2 of 5 are hallucinated, 2 of 3 covered, 1 of 2 of the Hal-list
    row = amber_generative(amber(), {1: "The ground, a person, lines, a wheel, the sky, a unicorn."})
    assert row == {"CHAIR": 40.0, "Cover": 66.6, "Hal": 100.0, "Cog": 50.0}  # the 0.001 in every denominator shows in the last digit


def test_amber_similarity_credits_after_it_marks():
    near = lambda a, b: 0.9 if {a, b} in ({"sky", "dog"}, {"sky", "man"}) else float(a == b)
    row = amber_generative(amber(near), {1: "sky"})  # near a bad and a good word: the bad one is marked, then the good one credited
    assert (row["CHAIR"], row["Cover"], row["Cog"]) == (0.0, 33.3, 50.0)
    assert amber_generative(amber(lambda a, b: 0.8), {1: "sky"})["CHAIR"] == 99.9  # strictly above 0.8


def test_amber_questions_take_only_the_exact_words_and_no_is_the_positive_class():
    table = amber_discriminative(amber(), {2: "No", 3: "No", 4: "no", 5: "No.", 6: "Yes"})
    assert table["state"] == {"Accuracy": 50.0, "Precision": 50.0, "Recall": 99.9, "F1": 66.6}
    assert table["existence"] == {"Accuracy": 0.0, "Precision": 0.0, "Recall": 0.0, "F1": 0.0}
    assert table["relation"]["Accuracy"] == 50.0 and table["all"]["Accuracy"] == 40.0  # `relation` and `discriminative-relation` are one


def test_amber_reports_what_is_missing_and_refuses_what_does_not_fit():
    result = amber_score(amber(), {1: "grass", 3: "No"})
    assert (result["answered"], result["unanswered"]) == (2, 4)
    assert result["AMBER score"] == (100 - 0 + result["discriminative"]["all"]["F1"]) / 2
    with pytest.raises(InputError, match="no question with that id"):
        amber_score(amber(), {99: "Yes"})
    with pytest.raises(InputError, match="lacks the word 'unicorn'"):
        make_amber([{"id": 1, "type": "generative", "truth": ["unicorn"], "hallu": []}], ASSOCIATIONS, [])
    with pytest.raises(InputError, match="occurs more than once"):
        make_amber([{"id": 1, "type": "relation", "truth": "no"}] * 2, ASSOCIATIONS, [])
    with pytest.raises(InputError, match=r"lacks id, type or truth, or \(generative\) hallu"):
        make_amber([{"id": 1, "type": "generative", "truth": ["sky"]}], ASSOCIATIONS, [])


def test_the_true_objects_of_all_1004_pictures_cover_93_3_percent_of_themselves(shared):
    folder = shared / "amber" if (shared / "amber").exists() else shared / "data" / "amber"
    read = lambda name: json.loads((folder / name).read_text(encoding="utf-8"))
    real = make_amber(read("annotations.json"), read("relation.json"), (folder / "safe_words.txt").read_text(encoding="utf-8").split())
    gen = {id: ", ".join(row["truth"]) for id, row in real.annotations.items() if row["type"] == "generative"}
    assert amber_generative(real, gen) == {"CHAIR": 0.0, "Cover": 93.3, "Hal": 0.0, "Cog": 0.0}
    result = amber_score(real, {**gen, **{id: "No" for id in real.annotations if id not in gen}})
    assert result["unanswered"] == 0 and result["discriminative"]["existence"]["Accuracy"] == 100.0
    assert result["discriminative"]["attribute"]["Accuracy"] == 50.0  # balanced
    assert result["discriminative"]["relation"]["Accuracy"] == 41.4  # 689 of 1664
