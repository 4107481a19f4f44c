"""The scorers: against slow oracles written from the published formulas and script, by hand with
all of their quirks, and what is refused."""

import json
import random
from functools import cache

import pytest

from minilm import InputError
from vision_eval.metrics import (
    FIELDS,
    ROWS,
    Item,
    amber_discriminative,
    amber_generative,
    amber_score,
    discriminative,
    generative,
    make_amber,
    mentions,
    parse_number,
    parse_yes_no,
    pi_score,
    score,
    vocabulary_of,
)

SHAPES = ("circle", "square", "box", "person", "traffic light", "light", "ring")


# --- free text


@pytest.mark.parametrize("text, first, strict, mme", [
    ("Yes", "yes", "yes", "yes"),
    ("no", "no", None, "no"),
    ("Yes.", "yes", None, "yes"),
    ("two yes", "yes", None, None),
    ("I know nothing", None, None, None),
    ("Note that yes", "yes", None, "no"),
    ("", None, None, None),
    (None, None, None, None),
    ("Not sure, but yes", "yes", None, "no"),
    (" No ", "no", None, "no"),
])
def test_three_parsers_read_yes_and_no_each_in_its_way(text, first, strict, mme):
    assert [parse_yes_no(text, mode) for mode in ("first", "strict", "mme")] == [first, strict, mme]


def test_numbers_are_one_answer_in_digits_and_in_words():
    texts = ["There are 6.", "six", "26 letters", "none", None, "often", "\N{SUPERSCRIPT TWO}"]
    numbers = [parse_number(text) for text in texts]
    assert numbers == ["six", "six", "26", None, None, None, None]


def test_plurals_and_names_of_several_words_are_recognised_and_repeats_are_kept():
    found = mentions("Two boxes, people and a Circle; circles!", SHAPES)
    assert found == ["box", "person", "circle", "circle"]
    assert mentions("A traffic light beside a light.", SHAPES) == ["traffic light", "light"]
    assert mentions("lights of traffic; foxes; encircled", SHAPES) == ["light"]


@pytest.mark.parametrize("text", [
    "the dog's tail", "the dog\N{RIGHT SINGLE QUOTATION MARK}s tail", "'dog'", "the dogs' tails",
    "\N{LEFT SINGLE QUOTATION MARK}dog\N{RIGHT SINGLE QUOTATION MARK}", "a dog-shaped cloud",
    "DOG", "a dog.", "(dogs)"])
def test_whatever_stands_beside_a_word_it_is_named(text):
    assert mentions(text, ["dog"]) == ["dog"]


def test_a_hyphen_is_a_space_in_the_answer_and_in_the_vocabulary():
    assert mentions("a traffic-light", ["traffic light", "light"]) == ["traffic light"]
    assert mentions("an e-book and an e book", ["e-book", "book"]) == ["e-book", "e-book"]


def test_negation_is_ignored_unless_asked_for():
    text = "There is no circle, but a square. It isn't a box."
    assert mentions(text, SHAPES) == ["circle", "square", "box"]
    assert mentions(text, SHAPES, negation=True) == ["square"]


# --- paper


def random_description(rng):
    if rng.random() < 0.1:
        return None
    names = ["a circle", "squares", "the box's", "people", "a traffic light", "rings", "nothing"]
    return " and ".join(rng.choice(names) for _ in range(rng.randrange(5)))


def slow_generative(rows):
    """Section 6 of the paper's metrics, response by response, in fractions of one."""
    plain = {"a circle": "circle", "squares": "square", "the box's": "box", "people": "person",
             "a traffic light": "traffic light", "rings": "ring"}
    wrong = named = covered = there = expected = bad = silent = count = 0
    for response, A, H in rows:
        if response is None:
            continue
        R = [plain[part] for part in response.split(" and ") if part in plain]
        count += 1
        in_A = 0
        for word in R:
            named += 1
            if word in A:
                in_A += 1
            if word in H:
                expected += 1
        wrong += len(R) - in_A
        for word in set(A):
            there += 1
            if word in R:
                covered += 1
        if R and 1 - in_A / len(R) != 0:
            bad += 1
        if not R:
            silent += 1
    return {
        "CHAIR": 100 * wrong / named if named else 0,
        "Cover": 100 * covered / there if there else 0,
        "Cog": 100 * expected / named if named else 0,
        "Hal": 100 * bad / count,
        "silent": 100 * silent / count,
        "described": count,
        "unanswered": len(rows) - count,
    }


def test_the_generative_metrics_equal_the_papers_formulas_on_random_descriptions():
    rng = random.Random(0)
    for _ in range(200):
        rows = []
        for _ in range(rng.randint(1, 12)):
            objects = rng.sample(SHAPES, rng.randint(1, 4))
            rows.append((random_description(rng), objects[:-1], objects[-1:]))
        if all(response is None for response, _, _ in rows):
            continue
        assert generative(rows, SHAPES) == pytest.approx(slow_generative(rows))


def slow_discriminative(rows):
    """Over the answers that came: right ones, pairs that came whole, F1 of yes by its counts."""
    came = {(pair, truth): said for said, truth, pair in rows if said is not None}
    right = sum(said == truth for (_, truth), said in came.items())
    whole = [p for p in {pair for pair, _ in came} if (p, "yes") in came and (p, "no") in came]
    good = [p for p in whole if came[p, "yes"] == "yes" and came[p, "no"] == "no"]
    tp = sum(said == "yes" == truth for (_, truth), said in came.items())
    fp = sum(said == "yes" != truth for (_, truth), said in came.items())
    fn = sum(said != "yes" == truth for (_, truth), said in came.items())
    table = {"ACC": 100 * right / len(came), "F1": 200 * tp / (2 * tp + fp + fn) if tp else 0,
             "asked": len(came), "pairs": len(whole), "unanswered": len(rows) - len(came)}
    if whole:
        table["ACC+"] = 100 * len(good) / len(whole)
    return table


def test_the_yes_no_metrics_equal_the_papers_formulas_on_random_answers():
    rng = random.Random(1)
    for _ in range(300):
        pairs = range(rng.randint(1, 9))
        rows = [(rng.choice(["yes", "no", "no", "well", None]), truth, str(p))
                for p in pairs for truth in ("yes", "no")]
        rng.shuffle(rows)
        if any(said is not None for said, _, _ in rows):
            row, slow = discriminative(rows), slow_discriminative(rows)
            assert {name: row.get(name) for name in slow} == pytest.approx(slow)
            assert ("ACC+" in row) == ("ACC+" in slow)


def test_generative_metrics_by_hand():
    # 1: R = circle, circle, ring (ring is the Hal-object): 1 of 3 wrong, 1 of 2 objects covered
    # 2: silent.  3: R = square: right, 1 of 2 covered.
    rows = [
        ("a circle, a circle and a ring", ["circle", "square"], ["ring"]),
        ("nothing to see", ["circle"], []),
        ("a square", ["square", "box"], []),
    ]
    micro, macro = (generative(rows, SHAPES, aggregate) for aggregate in ("micro", "macro"))
    third = pytest.approx(100 / 3)
    assert micro == {"CHAIR": 25, "Cover": 40, "Hal": third, "Cog": 25, "silent": third,
                     "described": 3, "unanswered": 0}
    assert macro["CHAIR"] == pytest.approx(100 / 9) and macro["Cover"] == third
    assert macro["Hal"] == micro["Hal"]


def test_a_silent_model_never_hallucinates_and_covers_nothing():
    row = generative([("", ["circle"], ["ring"]), ("Well.", ["square"], [])], SHAPES)
    assert (row["CHAIR"], row["Hal"], row["Cover"], row["silent"]) == (0, 0, 0, 100)


def test_saying_yes_to_everything_gives_the_published_50_0_66_7():
    rows = [("Yes", truth, str(i)) for i in range(5) for truth in ("yes", "no")]
    row = discriminative(rows)
    assert (row["ACC"], row["ACC+"], round(row["F1"], 1), row["yes rate"]) == (50, 0, 66.7, 100)
    no = [("No", truth, pair) for _, truth, pair in rows]
    assert discriminative(no)["F1"] == 0  # nothing positive answered: 0, not NaN
    assert discriminative(no, positive="no")["F1"] == pytest.approx(66.67, abs=0.01)


def test_acc_counts_questions_and_acc_plus_pairs_and_what_is_not_understood_is_wrong():
    rows = [("yes", "yes", "a"), ("no", "no", "a"), ("yes", "yes", "b"), ("well", "no", "b"),
            (None, "yes", "c"), ("no", "no", "c")]
    row = discriminative(rows)
    assert row["ACC"] == 80 and row["ACC+"] == 50  # the lost answer and its pair are left out
    assert (row["invalid"], row["unanswered"], row["yes rate"]) == (20, 1, 50)
    assert (row["asked"], row["pairs"]) == (5, 2)


def test_the_pi_score_is_the_published_one():
    assert pi_score(58.3, 49.0) == pytest.approx(45.35)  # CogVLM before concat, printed 45.4


def disc(pair, field, truth):
    return Item(f"{pair}{truth}", "0", "noise", "after", "disc", field, pair, "?", truth)


def items():
    return [
        disc("a", "color", "yes"),
        disc("a", "color", "no"),
        disc("b", "number", "yes"),
        disc("b", "number", "no"),
        Item("g", "0", "noise", "after", "gen", "describe", "", "?", "", ("circle",), ("ring",)),
        Item("h", "0", "crop", "after", "gen", "how many", "", "?", "six"),
    ]


RIGHT = {"ayes": "yes", "ano": "no", "byes": "yes", "bno": "no", "g": "a circle", "h": "six"}


def scored(answers, some=None):
    return score(items() if some is None else some, answers, SHAPES)


def test_a_whole_table_from_items_and_answers():
    table = scored({**RIGHT, "bno": "yes", "g": "a circle and a ring", "h": "9"})
    noise = table["noise", "after"]
    assert (noise["ACC+"], noise["ACC+ color"], noise["ACC+ number"]) == (50, 100, 0)
    assert (noise["Hal"], noise["PI"]) == (100, 25)
    assert table["crop", "after"]["Hal"] == 100  # a wrong number is a hallucination
    assert scored(RIGHT)["crop", "after"]["Hal"] == 0


def test_descriptions_and_numbers_of_one_scenario_share_its_hal():
    asked = [*items()[:5], items()[5]._replace(scenario="noise")]
    said = {**RIGHT, "g": "a ring"}  # one of two is wrong, the description
    assert scored(said, asked)["noise", "after"]["Hal"] == 50
    assert scored({**said, "h": "9"}, asked)["noise", "after"]["Hal"] == 100


@pytest.mark.parametrize("lost", [id for id in RIGHT if id != "h"])
def test_a_lost_answer_takes_the_pi_score_away_and_is_neither_right_nor_wrong(lost):
    whole = scored(RIGHT)["noise", "after"]
    row = scored({**RIGHT, lost: None})["noise", "after"]
    assert whole["PI"] == 100 and "PI" not in row and row["unanswered"] == 1
    assert row["asked"] + row["described"] == 4
    assert all(row[name] == whole[name] for name in ("ACC", "ACC+", "Hal") if name in row)
    assert ("Hal" in row) == (lost != "g")  # the only description: there is no Hal without it
    del_id = {id: text for id, text in RIGHT.items() if id != lost}  # not given at all: the same
    assert scored(del_id)["noise", "after"] == row


def test_no_lost_answer_ever_raises_a_pi_score_on_random_answers():
    rng = random.Random(2)
    for _ in range(200):
        answers = {id: rng.choice([text, "a ring yes no", None]) for id, text in RIGHT.items()}
        row = scored(answers)["noise", "after"]
        lost = [id for id, text in answers.items() if text is None and id != "h"]
        assert ("PI" in row) == (not lost) and row["unanswered"] == len(lost)


def test_what_an_answer_scores_does_not_depend_on_the_pictures_beside_it():
    dog = Item("1", "1", "noise", "after", "gen", "describe", "", "?", "", ("dog",))
    tree = Item("2", "2", "fog", "after", "gen", "describe", "", "?", "", ("tree",))
    said = {"1": "A dog under a tree.", "2": "A tree."}
    vocabulary = vocabulary_of([dog, tree])
    alone = score([dog], {"1": said["1"]}, vocabulary)["noise", "after"]
    beside = score([dog, tree], said, vocabulary)["noise", "after"]
    assert alone == beside and alone["Hal"] == 100


def test_half_a_pair_strange_repeated_and_empty_answers_are_refused():
    with pytest.raises(InputError, match="pair b has one question only"):
        scored({"ayes": "yes"}, [i for i in items() if i.id != "bno"])
    with pytest.raises(InputError, match="no question with that id"):
        scored({"zzz": "yes"})
    with pytest.raises(InputError, match="no answers"):
        scored({})
    with pytest.raises(InputError, match="id g occurs more than once"):
        scored({"g": "x"}, [*items(), items()[4]])
    with pytest.raises(InputError, match="a second or unknown 'yes'"):
        discriminative([("yes", "yes", "a"), ("yes", "yes", "a")])


# --- amber

ASSOCIATIONS = {"sky": [], "grass": ["ground"], "ground": ["floor"], "man": ["person"], "dog": [],
                "car": ["wheel"], "line": []}
ATTRIBUTE = "discriminative-attribute"


def amber(similar=None):
    rows = [
        {"id": 1, "type": "generative", "truth": ["grass", "ground", "man"],
         "hallu": ["dog", "car"]},
        {"id": 2, "type": f"{ATTRIBUTE}-state", "truth": "yes"},
        {"id": 3, "type": f"{ATTRIBUTE}-state", "truth": "no"},
        {"id": 4, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 5, "type": "relation", "truth": "no"},
        {"id": 6, "type": "discriminative-relation", "truth": "yes"},
    ]
    return make_amber(rows, ASSOCIATIONS, ["line"], similar)


def test_amber_generative_by_hand():
    # kept nouns: ground (an associated word credits its *first* owner: grass), person (man), line
    # (safe: only in the denominator), wheel (marks car), sky (neither)
    # -> 2 of 5 are hallucinated, 2 of 3 covered, 1 of 2 of the Hal-list
    said = "The ground, a person, lines, a wheel, the sky, a unicorn."
    row = amber_generative(amber(), {1: said})
    assert row == {"CHAIR": 40.0, "Cover": 66.6, "Hal": 100.0, "Cog": 50.0}  # (0.001 is visible)


def test_amber_similarity_credits_after_it_marks():
    def near(a, b):
        return 0.9 if {a, b} in ({"sky", "dog"}, {"sky", "man"}) else float(a == b)

    # near a bad and a good word: the bad one is marked, then the good one credited
    row = amber_generative(amber(near), {1: "sky"})
    assert (row["CHAIR"], row["Cover"], row["Cog"]) == (0.0, 33.3, 50.0)
    at_the_threshold = amber(lambda a, b: 0.8)
    assert amber_generative(at_the_threshold, {1: "sky"})["CHAIR"] == 99.9  # strictly above 0.8


def test_amber_questions_take_only_the_exact_words_and_no_is_the_positive_class():
    table = amber_discriminative(amber(), {2: "No", 3: "No", 4: "no", 5: "No.", 6: "Yes"})
    assert table["state"] == {"Accuracy": 50.0, "Precision": 50.0, "Recall": 99.9, "F1": 66.6}
    assert table["existence"] == {"Accuracy": 0.0, "Precision": 0.0, "Recall": 0.0, "F1": 0.0}
    assert table["relation"]["Accuracy"] == 50.0  # `relation`, `discriminative-relation` are one
    assert table["all"]["Accuracy"] == 40.0


def test_amber_reports_what_is_missing_and_refuses_what_does_not_fit():
    result = amber_score(amber(), {1: "grass", 3: "No"})
    assert (result["answered"], result["unanswered"], result["lost"]) == (2, 4, 0)
    assert result["AMBER score"] == (100 - 0 + result["discriminative"]["all"]["F1"]) / 2
    lost = amber_score(amber(), {1: "grass", 2: None, 3: "No"})
    assert "AMBER score" not in lost and lost["lost"] == 1
    assert lost["discriminative"] == result["discriminative"]
    with pytest.raises(InputError, match="no question with that id"):
        amber_score(amber(), {99: "Yes"})


@pytest.mark.parametrize("rows, message", [
    ([{"id": 1, "type": "generative", "truth": ["unicorn"], "hallu": []}], "lacks the word"),
    ([{"id": 1, "type": "relation", "truth": "no"}] * 2, "occurs more than once"),
    ([{"id": 1, "type": "generative", "truth": ["sky"]}], "annotation 1 needs"),
    ([{"id": "abc", "type": "relation", "truth": "no"}], "needs an id"),
    ([{"id": None, "type": "relation", "truth": "no"}], "needs an id"),
    ([{"id": [1], "type": "relation", "truth": "no"}], "needs an id"),
    ([7, 8], "annotation 7 needs an id"),
    ([{"id": 1, "type": "relation", "truth": "maybe"}], "must be yes or no"),
    ([{"id": 1, "type": "generative", "truth": "sky", "hallu": []}], "lists of words"),
])
def test_annotations_that_cannot_be_scored_are_refused_in_one_line(rows, message):
    with pytest.raises(InputError, match=message):
        make_amber(rows, ASSOCIATIONS, [])
    for broken in ([], {"sky": "ground"}, {"sky": [1]}):
        with pytest.raises(InputError, match="association file must be"):
            make_amber([], broken, [])


@cache
def read_amber(folder):
    def read(name):
        return (folder / name).read_text(encoding="utf-8")

    annotations = json.loads(read("annotations.json"))
    associations = json.loads(read("relation.json"))
    counters = dict(line.split("=") for line in read("metrics.txt").split())
    start = {name: float(value) for name, value in counters.items()}
    return make_amber(annotations, associations, read("safe_words.txt").split()), start


@pytest.fixture
def real(shared):
    """AMBER's public files, and the counters with which its script starts."""
    return read_amber(shared / "data" / "amber")


def script_discriminative(amber, responses, start):
    """The published script's loop and prints: counters by name, percent rounded at every step."""
    m = dict(start)
    short = {
        f"{ATTRIBUTE}-state": "as_",
        f"{ATTRIBUTE}-number": "an_",
        f"{ATTRIBUTE}-action": "aa_",
        "discriminative-hallucination": "ha_",
    }
    for id, response in responses.items():
        kind, truth = amber.annotations[id]["type"], amber.annotations[id]["truth"]
        for part in ("", short.get(kind, "asso_")):
            m[part + "qa_correct_num"] += 1
            if (truth, response) in (("yes", "Yes"), ("no", "No")):
                m[part + "qa_correct_score"] += 1
            if truth == "no":
                m[part + "qa_no_num"] += 1
                if response == "No":
                    m[part + "qa_no_score"] += 1
            if response == "No":
                m[part + "qa_ans_no_num"] += 1
                if truth == "no":
                    m[part + "qa_ans_no_score"] += 1
    table = {}
    for row, parts, epsilon in (("all", [""], 0.0001), ("existence", ["ha_"], 0.001),
                                ("attribute", ["as_", "an_", "aa_"], 0.0001),
                                ("state", ["as_"], 0.0001), ("number", ["an_"], 0.0001),
                                ("action", ["aa_"], 0.0001), ("relation", ["asso_"], 0.0001)):
        def ratio(name, parts=parts):
            score = sum(m[f"{part}qa_{name}_score"] for part in parts)
            return round(score / sum(m[f"{part}qa_{name}_num"] for part in parts) * 100, 1)

        P, R = ratio("ans_no"), ratio("no")
        F1 = round(2 * (P / 100) * (R / 100) / ((P / 100) + (R / 100) + epsilon) * 100, 1)
        table[row] = {"Accuracy": ratio("correct"), "Precision": P, "Recall": R, "F1": F1}
    return table


def test_ambers_seven_rows_equal_the_scripts_on_random_answers_to_the_public_questions(real):
    amber, start = real
    rng = random.Random(3)
    asked = [id for id, row in amber.annotations.items() if row["type"] != "generative"]
    attribute = [id for id in asked if "attribute" in amber.annotations[id]["type"]]
    for trial in range(300):
        ids = rng.sample(asked, rng.choice([1, 3, 10, 40, 200]))
        if trial % 3 == 0:
            ids = rng.sample(attribute, rng.randint(1, 8))  # where three counters show
        if trial < 3:
            ids = asked
        said = [rng.choice(["Yes", "No", "no", "Yes.", "I think so"][: rng.choice([2, 5])])
                for _ in ids]
        responses = dict(zip(ids, said))
        ours = amber_discriminative(amber, responses)
        theirs = script_discriminative(amber, responses, start)
        assert set(ours) <= set(theirs) == set(ROWS)
        for name, row in ours.items():
            assert row == theirs[name], (trial, name)


def script_generative(amber, responses, start):
    """The published script's loop over the nouns, as the paper's sheet has it."""
    known = {*amber.associations} | {w for ws in amber.associations.values() for w in ws}
    m = dict(start)
    for id, nouns in responses.items():
        row = amber.annotations[id]
        safe, safe_at, bad, bad_at = [], [], [], []
        for words, at, key in ((safe, safe_at, "truth"), (bad, bad_at, "hallu")):
            for i, word in enumerate(row[key]):
                words += amber.associations[word]
                at += [i] * len(amber.associations[word])
            words += row[key]
            at += [*range(len(row[key]))]
        kept = [noun for noun in nouns if noun in known]
        covered, marked, errors = [0] * len(row["truth"]), [0] * len(row["hallu"]), 0
        for noun in kept:
            if noun in amber.safe_words:
                continue
            if noun in safe:
                covered[safe_at[safe.index(noun)]] = 1
                continue
            if noun in bad:
                marked[bad_at[bad.index(noun)]] = 1
            for word, at in zip(bad, bad_at):
                if amber.similar(noun, word) > 0.8:
                    marked[at] = 1
                    break
            for word, at in zip(safe, safe_at):
                if amber.similar(noun, word) > 0.8:
                    covered[at] = 1
                    break
            else:
                errors += 1
        m["chair_score"] += errors
        m["chair_num"] += len(kept)
        m["safe_cover_score"] += sum(covered)
        m["safe_cover_num"] += len(covered)
        m["hallu_cover_score"] += sum(marked)
        m["hallu_cover_num"] += len(marked)
        m["non_hallu_score"] += errors == 0
        m["non_hallu_num"] += 1
    shares = {name: round(m[f"{part}_score"] / m[f"{part}_num"] * 100, 1) for name, part in
              (("CHAIR", "chair"), ("Cover", "safe_cover"), ("Cog", "hallu_cover"))}
    return {**shares, "Hal": round(100 - m["non_hallu_score"] / m["non_hallu_num"] * 100, 1)}


def test_ambers_generative_row_equals_the_scripts_on_random_descriptions(real):
    amber, start = real
    rng = random.Random(4)
    near = {frozenset(rng.sample([*amber.associations], 2)) for _ in range(3000)}
    amber = amber._replace(similar=lambda a, b: float(a == b or {a, b} in near))
    pictures = [id for id, row in amber.annotations.items() if row["type"] == "generative"]
    words = [*amber.associations, "unicorn"]
    for _ in range(60):
        responses = {}
        for id in rng.sample(pictures, rng.choice([1, 5, 20])):
            row = amber.annotations[id]
            pool = [*row["truth"], *row["hallu"], *rng.sample(words, 6), *amber.safe_words]
            responses[id] = rng.choices(pool, k=rng.randrange(9))
        texts = {id: ", ".join(nouns) for id, nouns in responses.items()}
        ours = amber_generative(amber, texts, nouns=lambda text: text.split(", "))
        assert ours == script_generative(amber, responses, start)


def test_the_true_objects_of_all_1004_pictures_cover_93_3_percent_of_themselves(real):
    amber, _ = real
    gen = {id: ", ".join(row["truth"]) for id, row in amber.annotations.items()
           if row["type"] == "generative"}
    covered = {"CHAIR": 0.0, "Cover": 93.3, "Hal": 0.0, "Cog": 0.0}
    assert len(gen) == 1004 and amber_generative(amber, gen) == covered
    result = amber_score(amber, {**{id: "No" for id in amber.annotations}, **gen})
    table = result["discriminative"]
    assert result["unanswered"] == 0 and table["existence"]["Accuracy"] == 100.0
    assert table["attribute"]["Accuracy"] == 50.0  # balanced
    assert table["relation"]["Accuracy"] == 41.4  # 689 of 1664


def test_the_fields_are_the_papers_five():
    assert FIELDS == ("existence", "number", "color", "relation", "hal-object")
