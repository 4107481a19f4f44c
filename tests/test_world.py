"""The world of clones: what it says in every language, what it never says, and that its test
problems stay out of training."""

import math
import random
import re

import pytest
import torch

from methods import question_alignment_tasks, spontaneous_multilingual
from methods.skip_layer_cd import TEXT
from methods.skip_layer_cd import WORLD as SKIP_WORLD
from methods.worlds.clones import (
    ANSWER,
    BOS,
    CODE,
    EOS,
    ITEMS,
    LETTERS,
    PLACES,
    SEP,
    Choice,
    CloneWorld,
    Event,
    Mix,
    Problem,
    chance,
    document,
    new_model,
)
from minilm import InputError
from minilm.results import fingerprints

WORLD = CloneWorld()
# Eve has 7 coins, finds 4 (11), sells 2 (9): nine coins, more than before
EVE = Problem("Eve", "coins", 7, (Event(1, "finds", 4, 7, 11), Event(-1, "sells", 2, 11, 9)))
RICH = Mix(labelled=0.2, knowledge=0.2, programs=0.3, clone_exercises=0.3, switched=0.2, shots=3)


def draw(n, world=WORLD, mix=RICH, progress=1.0, seed=0):
    rng = random.Random(seed)
    return [document(world, mix, rng, progress) for _ in range(n)]


def parse(world, ids):
    """(start, signs, amounts) of every problem in a document, read from its words alone."""
    gain = set(world.tokens[world.id["finds"] : world.id["finds"] + world.verbs])
    text = " ".join(world.gloss(ids))
    found = []
    for part in re.split("<sep>|<a>|<code>|<s>|</s>", text):
        if head := re.match(r" \w+ has (\d+) \w+ \.", part):
            events = re.findall(
                r"\. (?:(\d+) ([a-z]+)|([a-z]+) (\d+))(?= \.)", part.replace(" . now", " .. now")
            )
            events = [
                (b or c, int(a or d))
                for a, b, c, d in events
                if (b or c) not in ("now", "so", "howmany")
            ]
            found.append((int(head[1]), [(1 if verb in gain else -1, n) for verb, n in events]))
    return found


# --- what it says


@pytest.mark.parametrize(
    "rendered, text",
    [
        (WORLD.question(EVE, "en"), "Eve has 7 coins . finds 4 . sells 2 . howmany coins ?"),
        (
            WORLD.question(EVE, "a"),
            "Eve has_a 7 coins_a . finds_a 4 . sells_a 2 . howmany_a coins_a ?",
        ),
        (
            WORLD.question(EVE, "b"),
            "Eve has_b 7 coins_b . 4 finds_b . 2 sells_b . howmany_b coins_b ?",
        ),
        (WORLD.statement(EVE, "c"), "Eve has_c 7 coins_c . finds_c 4 . sells_c 2 ."),
        (WORLD.story(EVE, "en"), "Eve has 7 coins . finds 4 . now 11 . sells 2 . now 9 ."),
        (
            WORLD.story(EVE, "d", explained=True),
            "Eve has_d 7 coins_d . 4 finds_d . so_d 7 + 4 = 11 . 2 sells_d . so_d 11 - 2 = 9 .",
        ),
        (WORLD.solution(EVE, "en"), "finds 4 so 7 + 4 = 11 . sells 2 so 11 - 2 = 9 . answer 9"),
        (
            WORLD.solution(EVE, "b"),
            "4 finds_b so_b 7 + 4 = 11 . 2 sells_b so_b 11 - 2 = 9 . answer_b 9",
        ),
        (
            WORLD.program(EVE),
            "x = 7 . finds = 4 . x = x + finds . sells = 2 . x = x - sells . print x",
        ),
        (
            WORLD.choices(Choice("eggs", ("river", "tower", "market"), "B"), "a"),
            "where_a eggs_a ? A river_a B tower_a C market_a",
        ),
    ],
)
def test_a_problem_is_rendered_word_for_word(rendered, text):
    assert WORLD.text(rendered) == text


def test_a_problem_knows_its_answer_and_its_label():
    assert (EVE.final, EVE.label) == (9, "more")
    assert EVE._replace(start=9).label is None and EVE._replace(start=12).label == "less"


def test_a_clone_has_one_word_for_each_english_word_and_translates_back():
    rng = random.Random(0)
    for _ in range(50):
        p = WORLD.sample(rng)
        for clone in "abcd":
            assert WORLD.encode(WORLD.gloss(WORLD.solution(p, clone)), clone) == WORLD.solution(
                p, clone
            )
        for same_order in "ac":
            assert WORLD.gloss(WORLD.question(p, same_order)) == WORLD.gloss(
                WORLD.question(p, "en")
            )
        assert sorted(WORLD.gloss(WORLD.question(p, "b"))) == sorted(
            WORLD.gloss(WORLD.question(p, "en"))
        )
        assert (
            WORLD.gloss(WORLD.question(p, "b"))
            == WORLD.gloss(WORLD.question(p, "d"))
            != WORLD.gloss(WORLD.question(p, "a"))
        )


def test_every_token_has_exactly_one_language_or_is_shared():
    assert len(set(WORLD.tokens)) == len(WORLD.tokens) == len(WORLD.language_of)
    languages = {
        language: sum(x == language for x in WORLD.language_of)
        for language in (None, "en", *"abcd")
    }
    assert (
        languages["en"] == languages["a"] == languages["d"] == 2 * 8 + len(ITEMS) + len(PLACES) + 9
    )
    assert sum(languages.values()) == len(WORLD.tokens)
    assert {WORLD.language_of[i] for i in WORLD.question(EVE, "b")} == {None, "b"}
    assert {WORLD.language_of[i] for i in WORLD.drill(random.Random(0))} == {None}


def test_cognates_share_a_root_among_clones_that_english_does_not_have():
    world = CloneWorld(cognates=0.5, languages=("en", "a", "b", "e"))
    roots = [t for t in world.tokens if t.endswith("_")]
    assert len(roots) == 16 and {world.language_of[world.id[t]] for t in roots} == {None}
    word = roots[0].rstrip("_")
    a, e, en = (world.encode([word], language) for language in ("a", "e", "en"))
    assert (
        a[0] == e[0] and a[1] != e[1] and en == [world.id[word]] and world.language_of[a[1]] == "a"
    )
    assert world.text(a) == f"{word}_a" and world.gloss(a) == [word]
    assert "_a" not in WORLD.id


def test_sums_are_right_and_stay_on_the_number_line():
    rng = random.Random(0)
    for _ in range(300):
        p = WORLD.sample(rng)
        total = p.start
        for e in p.events:
            assert e.before == total and e.after == total + e.sign * e.amount and 1 <= e.amount <= 5
            total = e.after
            assert 0 <= total <= 20
        assert 5 <= p.start <= 16 and p.final == total
    for left, sign, right, result in re.findall(
        r"(\d+) ([+-]) (\d+) = (\d+)", WORLD.text(WORLD.drill(rng, 200))
    ):
        assert (
            int(left) + (int(right) if sign == "+" else -int(right)) == int(result)
            and 0 <= int(result) <= 20
        )


# --- what it never says


def test_the_split_looks_at_numbers_and_signs_only():
    other = EVE._replace(
        name="Dan",
        item="eggs",
        events=tuple(e._replace(verb=v) for e, v in zip(EVE.events, ("buys", "loses"))),
    )
    assert WORLD.split(other) == WORLD.split(EVE)
    rng = random.Random(0)
    shares = [
        WORLD.split(
            EVE._replace(
                start=s, events=tuple(e._replace(amount=rng.randint(1, 500)) for e in EVE.events)
            )
        )
        for s in range(5000)
    ]
    assert (
        abs(shares.count("test") / 5000 - 0.1) < 0.02
        and abs(shares.count("dev") / 5000 - 0.1) < 0.02
    )
    assert {CloneWorld(seed).split(EVE) for seed in range(60)} == {"train", "dev", "test"}
    assert all(
        WORLD.split(WORLD.sample(rng, split)) == split
        for split in ("train", "dev", "test")
        for _ in range(20)
    )
    assert all(
        WORLD.split(WORLD.sample_choice(rng, split)) == split
        for split in ("train", "dev", "test")
        for _ in range(20)
    )


def test_no_training_text_holds_a_test_problem():
    parsed = [p for ids in draw(3000) for p in parse(WORLD, ids)]
    assert len(parsed) > 2500 and {len(events) for _, events in parsed} == {2, 3}
    made = [
        EVE._replace(start=start, events=tuple(Event(s, "", n, 0, 0) for s, n in events))
        for start, events in parsed
    ]
    assert {WORLD.split(p) for p in made} == {"train"}


def test_a_text_speaks_one_language_unless_it_translates_or_is_switched():
    own = [
        {WORLD.language_of[i] for i in ids} - {None}
        for ids in draw(2000, mix=Mix(parallel=0.0, switched=0.0))
    ]
    assert max(map(len, own)) == 1 and {x for langs in own for x in langs} == {"en", *"abcd"}
    both = [
        {WORLD.language_of[i] for i in ids} - {None}
        for ids in draw(2000, mix=Mix(parallel=1.0, switched=0.0))
    ]
    assert {frozenset(x) for x in both if len(x) > 1} == {
        frozenset(("en", clone)) for clone in "abcd"
    }


# --- pretraining texts


def test_the_mix_gives_each_kind_its_share():
    texts = [WORLD.text(ids).replace("_", "") for ids in draw(4000, mix=Mix())]
    share = lambda pattern: sum(bool(re.search(pattern, text)) for text in texts) / len(texts)
    assert abs(share(r"^<s> \d") - 0.15) < 0.02 and abs(share("<sep>") - 0.25) < 0.02
    assert abs(share("<a>") - 0.25 * 0.6 * 0.6) < 0.02 and not share(
        "<code>|where|less"
    )  # exercises in English only
    clones = [{WORLD.language_of[i] for i in ids} & set("abcd") for ids in draw(2000, mix=Mix())]
    assert abs(sum(map(bool, clones)) / 2000 - 0.4 * 0.85) < 0.03
    assert all(
        {WORLD.language_of[i] for i in ids} <= {None, "en"} for ids in draw(500, progress=0.39)
    )
    to_english = [
        WORLD.gloss(ids)
        for ids in draw(300, mix=Mix(retellings=0.85, parallel=1.0, to_english=True))
    ]
    assert len(to_english) == 300
    for ids in draw(300, mix=Mix(retellings=0.85, parallel=1.0, to_english=True)):
        if SEP in ids:
            assert {WORLD.language_of[i] for i in ids[ids.index(SEP) :]} <= {None, "en"}


def test_rarer_kinds_are_told_when_asked_for():
    texts = draw(2000)
    words = [WORLD.text(ids) for ids in texts]
    assert all(ids[0] == BOS and ids[-1] == EOS and EOS not in ids[:-1] for ids in texts)
    assert any(CODE in ids for ids in texts) and any(
        t.count(" less") + t.count(" more") > 1 for t in words
    )
    assert any(re.fullmatch(r"<s> (\w+ from \w+ \. ){5}</s>", t) for t in words)
    facts = [m for t in words for m in re.findall(r"(\w+) from (\w+) \.", t)]
    assert {(item, place) for item, place in facts} == set(WORLD.origin.items())
    asked = [re.search(r"where (\w+) \? A (\w+) B (\w+) C (\w+) <a> (\w)", t) for t in words]
    answers = [(m[1], m["ABC".index(m[5]) + 2]) for m in asked if m]
    assert answers and all(WORLD.origin[item] == place for item, place in answers)
    assert any(
        WORLD.language_of[ids[2]] == "b" and ANSWER in ids and SEP in ids for ids in texts
    )  # several exercises of a clone


def test_skewed_training_draws_rare_verbs_and_losses_less_often():
    rng, verbs = random.Random(0), []
    for _ in range(1500):
        verbs += [e.verb for e in WORLD.sample(rng, gain=0.7, zipf=1.0).events]
    assert verbs.count("finds") > 3 * verbs.count("earns") > 0
    gains = sum(
        verb in WORLD.tokens[WORLD.id["finds"] : WORLD.id["finds"] + 8] for verb in verbs
    ) / len(verbs)
    assert 0.6 < gains < 0.75


# --- reading answers, the untrained model, mistakes


def test_the_last_number_before_the_end_is_the_answer():
    ids = WORLD.encode("finds 4 so 7 + 4 = 11 .".split())
    assert WORLD.final_number(ids) == 11 and WORLD.final_number([*ids, EOS, WORLD.id["3"]]) == 11
    assert WORLD.final_number([]) is None and WORLD.final_number([EOS, WORLD.id["3"]]) is None


def test_the_verb_blind_guess_by_hand():
    # from 7 with 4 and 2: 13, 9, 5 and 1, each in one way: the guess is right one time in four
    assert WORLD.verb_blind_accuracy([EVE]) == 0.25
    # from 19 with 5 and 4: up is out of range, 19 - 5 + 4 = 18 and 19 - 5 - 4 = 10 remain
    steep = Problem(
        "Eve", "coins", 19, (Event(-1, "sells", 5, 19, 14), Event(1, "finds", 4, 14, 18))
    )
    assert WORLD.verb_blind_accuracy([steep]) == 0.5
    # from 10 with 2, 2, 1: 15 13 11 9 | 11 9 7 5: 11 and 9 in two ways each
    tied = Problem(
        "Eve",
        "coins",
        10,
        (Event(1, "finds", 2, 10, 12), Event(-1, "sells", 2, 12, 10), Event(1, "finds", 1, 10, 11)),
    )
    assert (
        WORLD.verb_blind_accuracy([tied]) == 0.5 and WORLD.verb_blind_accuracy([EVE, tied]) == 0.375
    )


def test_an_untrained_model_fits_its_world_and_has_separate_embeddings():
    model = new_model(WORLD, 64, 2, torch.Generator().manual_seed(0))
    assert model.embed.weight.shape == model.lm_head.weight.shape == (len(WORLD.tokens), 64)
    assert model.embed.weight is not model.lm_head.weight
    assert (
        abs(model.embed.weight.std().item() - 0.5) < 0.02
        and abs(model.lm_head.weight.std().item() - 0.075) < 0.005
    )


def test_positions_turn_fast_enough_for_texts_of_a_hundred_tokens():
    # the longest text is far shorter than the waves of rope_theta 10,000: half would stand still
    assert new_model(WORLD, 64, 1, torch.Generator().manual_seed(0)).config.rope_theta == 100


MISTAKES = [
    ({"languages": ("a", "en")}, "begin with en"),
    ({"languages": ("en", "a", "a")}, "each once"),
    ({"languages": ("en", "German")}, "clones are called a, b"),
    ({"verb_final": ("zz",)}, "clones are called a, b"),
    ({"verbs": 13}, "1 to 12 verbs"),
    ({"verbs": 0}, "1 to 12 verbs"),
    ({"max_number": 0}, "max_number 0"),
    ({"max_amount": 0}, "max_amount 0"),
    ({"events": ()}, "events"),
    ({"events": (0,)}, "events"),
    ({"cognates": 2.0}, "cognates 2.0"),
    ({"cognates": math.nan}, "cognates nan"),
]


@pytest.mark.parametrize("settings, words", MISTAKES)
def test_a_world_that_cannot_be_is_refused_when_it_is_made(settings, words):
    with pytest.raises(InputError, match=words):
        CloneWorld(**settings)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"clones": (-0.1, 0.1, 0.1, 0.1)}, "clones"),
        ({"clones": (0.5, 0.5, 0.5, 0.5)}, "clones"),
        ({"drills": 0.9, "retellings": 0.9}, "drills retellings 0.9, 0.9"),
        ({"labelled": 0.6, "knowledge": 0.6}, "labelled knowledge"),
        ({"clone_retellings": 1.1}, "clone_retellings"),
        ({"gain": math.nan}, "gain nan"),
        ({"zipf": math.inf}, "zipf inf"),
        ({"shots": 0}, "shots 0"),
    ],
)
def test_shares_that_are_none_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        Mix(**settings)


def test_what_no_draw_can_find_is_said_in_one_line_and_never_searched_for_without_end():
    rng = random.Random(0)
    for draw_one in (WORLD.sample, WORLD.sample_choice):
        with pytest.raises(InputError, match="no split 'tets'"):
            draw_one(rng, "tets")
    crowded = CloneWorld(max_number=1, events=(9,))  # nine events of 1 on a line from 0 to 1
    with pytest.raises(InputError, match="found no dev problem with max_number 1"):
        crowded.sample(rng, "dev", gain=1.0)


def test_words_and_languages_that_a_world_does_not_have_are_named():
    for language in ("en", "a"):
        with pytest.raises(InputError, match="no word 'nope'"):
            WORLD.encode(["nope"], language)
    with pytest.raises(InputError, match="no language zz"):
        WORLD.question(EVE, "zz")
    with pytest.raises(InputError, match="a share for each"):
        document(WORLD, Mix(clones=(0.1,)), random.Random(0))


# --- streams of random numbers


def test_a_share_of_0_draws_nothing_and_a_share_of_1_always_happens():
    rng = random.Random(0)
    before = rng.getstate()
    assert not chance(rng, 0.0) and rng.getstate() == before
    assert all(chance(rng, 1.0) for _ in range(20)) and rng.getstate() != before


# Every mix whose results are committed, and a hash of its first 500 documents. If one of these
# changes, so do all results that it leads to: run them again, or mark them stale.
STREAMS = {
    "results/skip_layer_cd*.json": (SKIP_WORLD, TEXT, "f991d2e22c3c9529"),
    "results/question_alignment*.json": (
        question_alignment_tasks.WORLD,
        question_alignment_tasks.TEXT,
        "b14a0092463cfbb9",
    ),
    "results/spontaneous_multilingual*.json": (
        spontaneous_multilingual.WORLD,
        spontaneous_multilingual.TEXT,
        "acb4d56b03b28aa6",
    ),
}


@pytest.mark.parametrize("stale", STREAMS)
def test_the_texts_are_those_that_committed_results_were_made_from(stale):
    world, mix, known = STREAMS[stale]
    rng = random.Random("golden")
    documents = [document(world, mix, rng, step / 500) for step in range(500)]
    found = fingerprints({"text": documents})["text"]
    assert found == known, f"{stale}: its texts have changed (hash {found})"


def test_clones_that_occur_in_retellings_only_are_never_told_alone_and_mostly_translated():
    clones = Mix(
        clones=(0.12,) * 4, clone_retellings=1.0, statements=0.5, parallel=0.8, labelled=0.3
    )
    texts = draw(2000, mix=clones)
    told = [ids for ids in texts if {WORLD.language_of[i] for i in ids} & set("abcd")]
    assert 0.43 < len(told) / len(texts) < 0.53
    assert all(ids.count(SEP) == 1 and ANSWER not in ids for ids in told)
    translated = [ids for ids in told if "en" in {WORLD.language_of[i] for i in ids}]
    assert 0.76 < len(translated) / len(told) < 0.84
    asked = [ids for ids in told if "howmany" in WORLD.gloss(ids)]
    assert 0.44 < len(asked) / len(told) < 0.56
    rest = [ids for ids in texts if ids not in told]
    assert {WORLD.language_of[i] for ids in rest for i in ids} == {None, "en"}


# --- nothing is the same where it should be drawn anew


def test_facts_and_cognates_are_drawn_from_the_seed():
    assert CloneWorld(1).origin != CloneWorld(2).origin
    assert CloneWorld(1, cognates=0.5).roots != CloneWorld(2, cognates=0.5).roots


def test_the_right_letter_is_any_of_three():
    rng = random.Random(0)
    letters = [WORLD.sample_choice(rng).letter for _ in range(300)]
    assert all(70 < letters.count(letter) < 130 for letter in LETTERS)


def test_several_exercises_of_a_document_are_different_ones():
    mix = Mix(clones=(0.0,) * 4, drills=0.0, retellings=0.0, exercises=1.0, shots=3)
    several = [ids for ids in draw(60, mix=mix) if ids.count(SEP) == 2]
    assert several
    for ids in several:
        first, second, third = parse(WORLD, ids)
        assert not first == second == third
