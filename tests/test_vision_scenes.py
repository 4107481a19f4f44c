"""The world of shapes: what is drawn is what is said, the planted prior, questions whose truth a
reader can check, damage to the layout."""

import random
from collections import Counter

import numpy as np
import pytest

from vision_eval import scenes as S
from vision_eval.hallu_pi import questions as make_items
from vision_eval.metrics import FIELDS, parse_number
from vision_eval.scenes import PARTNER, PLACES, Scene, Shape, ask, draw_scene, render

RED_CIRCLE, BLUE_BAR = Shape("circle", "red", 0, 8, 8, 6), Shape("bar", "blue", 8, 40, 40, 6)
TWO = Scene((0.1, 0.1, 0.1), 3, (RED_CIRCLE, BLUE_BAR, Shape("bar", "blue", 2, 40, 8, 6)))


def many(n=300, kind="single", prior=0.8, seed=0):
    rng = random.Random(seed)
    return [draw_scene(rng, prior, kind) for _ in range(n)]


def test_a_drawn_shape_has_its_colour_inside_and_the_background_outside():
    x = render([TWO])[0]
    np.testing.assert_allclose(x[8, 8], S.COLORS["red"], atol=1e-6)
    np.testing.assert_allclose(x[40, 40], S.COLORS["blue"], atol=1e-6)
    np.testing.assert_allclose(x[24, 24], TWO.background, atol=1e-6)
    assert x.min() >= 0 and x.max() <= 1 and x.dtype == np.float32


def test_a_ring_has_a_hole_and_a_bar_is_wider_than_high():
    alone = lambda kind: Scene((0.1, 0.1, 0.1), 3, (Shape(kind, "white", 4, 24, 24, 6.5),))
    ring, bar, cross = render([alone(k) for k in ("ring", "bar", "cross")])[..., 0] > 0.5
    assert (
        not ring[24, 24]
        and ring[24, 19]
        and bar[24].sum() > 2 * bar[:, 24].sum()
        and cross[24, 19]
        and not cross[19, 19]
    )


def test_a_larger_picture_shows_the_same_scene():
    scenes = many(6) + many(3, "wide")
    large = render(scenes, 192).reshape(-1, 48, 4, 48, 4, 3).mean((2, 4))
    assert np.abs(large - render(scenes)).mean() < 0.01


def test_every_shape_stays_inside_its_cell_and_cells_hold_one_each():
    for scene in many() + many(100, "wide") + many(50, "board"):
        width = 48 / scene.grid
        assert len({s.cell for s in scene.shapes}) == len(scene.shapes)
        for s in scene.shapes:
            left, top = s.cell % scene.grid * width, s.cell // scene.grid * width
            assert (
                left <= s.x - s.r
                and s.x + s.r <= left + width
                and top <= s.y - s.r
                and s.y + s.r <= top + width
            )


def test_scenes_have_the_sizes_that_are_documented():
    assert all(
        1 <= len(s.shapes) <= 6 and len(S.kinds_of(s.shapes)) <= 3
        for s in many() + many(100, "wide")
    )
    assert all(len(s.shapes) == 9 for s in many(50, "board"))
    for scene in many():
        colors = {s.kind: s.color for s in scene.shapes}
        assert all(colors[s.kind] == s.color for s in scene.shapes)  # one colour per kind


@pytest.mark.parametrize("prior", [0.8, 0.5])
def test_partners_come_together_as_often_as_the_prior_says(prior):
    # two kinds: the second is the first one's partner with probability `prior`
    two = [S.kinds_of(s.shapes) for s in many(3000, prior=prior) if len(S.kinds_of(s.shapes)) == 2]
    assert abs(np.mean([PARTNER[a] == b for a, b in two]) - prior) < 0.05


def test_a_hal_object_is_an_absent_partner():
    assert S.hal_objects(TWO.shapes) == ["square", "ring"]  # bar's and circle's
    assert S.hal_objects(()) == []


def test_the_quarters_of_a_wide_scene_share_out_its_shapes():
    for scene in many(50, "wide"):
        parts = [scene.within(place) for place in PLACES]
        assert sorted(s.cell for part in parts for s in part) == sorted(
            s.cell for s in scene.shapes
        )
        assert all(s.x < 24 and s.y < 24 for s in parts[0]) and all(
            s.x > 24 and s.y > 24 for s in parts[3]
        )


def test_questions_by_hand():
    rng = random.Random(0)
    question = lambda field, truth: ask(field, truth, TWO.shapes, rng)
    for _ in range(20):
        yes, no = question("number", True), question("number", False)
        assert yes.text in ("Is there one circle in the image?", "Are there two bars in the image?")
        assert no.text in (
            "Are there two circles in the image?",
            "Is there one bar in the image?",
            "Are there three bars in the image?",
        )
        assert question("color", True).text in (
            "Is the circle in the image red?",
            "Is the bar in the image blue?",
        )
        assert no.evidence == ("one" if "circle" in no.text else "two")
        assert question("existence", False).text in (
            "Is there a triangle in the image?",
            "Is there a cross in the image?",
        )
        assert question("hal-object", False).text in (
            "Is there a square in the image?",
            "Is there a ring in the image?",
        )
        assert question("hal-object", False).answer == "zero no"
        assert ask("total", True, TWO.shapes, rng).text == "Are there three shapes in the image?"
    assert question("relation", True) is None  # two bars: "the bar" would be ambiguous
    one = ask("relation", True, TWO.shapes[:2], random.Random(1), "top-left")
    assert one.text in (
        "Is the circle left of the bar in the top-left image?",
        "Is the circle above the bar in the top-left image?",
        "Is the bar right of the circle in the top-left image?",
        "Is the bar below the circle in the top-left image?",
    )
    false = ask("relation", False, TWO.shapes[:2], random.Random(1), "top-left")
    assert false.text != one.text and false.evidence == one.evidence and one.evidence in one.text


def test_a_wrong_number_is_one_more_or_one_less_by_turns_and_never_none():
    rng = random.Random(0)
    asked = Counter(ask("number", False, TWO.shapes, rng).text for _ in range(400))
    one_less, one_more = "Is there one bar in the image?", "Are there three bars in the image?"
    assert set(asked) == {one_less, one_more, "Are there two circles in the image?"}
    assert 0.4 < asked[one_less] / (asked[one_less] + asked[one_more]) < 0.6


def test_open_questions_by_hand():
    assert (
        S.describe(TWO.shapes).answer == "one red circle two blue bar"
        and S.describe(()).answer == "zero"
    )
    assert S.name_kinds(TWO.shapes).text == "Name the two kinds of objects in the image."
    assert S.name_kinds(TWO.shapes, 3).text == "Name the three kinds of objects in the image."
    assert (
        S.name_kinds(TWO.shapes, 3).answer == "circle bar"
        and S.how_many(TWO.shapes).answer == "three"
    )


def test_the_exam_asks_in_pairs_and_the_same_before_and_after():
    for i, scene in enumerate(many(40, prior=0.5)):
        before, after = (
            make_items(scene.shapes, str(i), name, "after", f"7/{i}", place)
            for name, place in (("none", ""), ("concat", "top-right"))
        )
        assert [(a.field, a.answer) for a in before] == [(b.field, b.answer) for b in after]
        assert [b.question.replace("top-right image", "image") for b in after] == [
            a.question for a in before
        ]
        pairs = {}
        for item in before[1:]:
            pairs.setdefault(item.pair_id, []).append(item.answer)
            assert item.question.endswith("Answer with 'Yes' or 'No'.") and item.field in FIELDS
        assert all(answers == ["yes", "no"] for answers in pairs.values()) and len(pairs) >= 3
        assert not set(before[0].truth) & set(before[0].hal) and before[0].task == "gen"


def test_a_misled_exam_hints_at_the_wrong_answer_and_asks_for_a_kind_too_many():
    first, *rest = make_items(TWO.shapes, "0", "misleading", "after", "0", misled=True)
    assert first.question == "Name the three kinds of objects in the image." and first.truth == (
        "circle",
        "bar",
    )
    assert all(
        item.question.startswith("Maybe no. " if item.answer == "yes" else "Maybe yes. ")
        for item in rest
    )
    assert not any(
        item.question.startswith("Maybe")
        for item in make_items(TWO.shapes, "0", "misleading", "before", "0")
    )


def test_a_board_is_asked_for_its_number():
    (board,) = many(1, "board")
    opened, yes, no = make_items(board.shapes, "0", "crop", "before", "0", board=True)
    assert (
        opened.question == "How many shapes are there in the image?"
        and opened.answer == "nine"
        and opened.truth == ()
    )
    assert (
        "nine" in yes.question
        and parse_number(no.question) != "nine"
        and {yes.field, no.field} == {"number"}
    )


def test_a_mosaic_holds_each_picture_at_half_its_size():
    four = render(many(4))
    whole = S.mosaic(four)
    np.testing.assert_allclose(
        whole[:24, 24:], four[1].reshape(24, 2, 24, 2, 3).mean((1, 3)), atol=1e-6
    )
    np.testing.assert_allclose(
        whole[24:, :24], four[2].reshape(24, 2, 24, 2, 3).mean((1, 3)), atol=1e-6
    )


def test_a_cropped_board_keeps_whole_shapes_and_counts_what_is_left():
    (board,) = many(1, "board")
    picture, rng = render([board])[0], random.Random(0)
    for rows, columns in S.CROPS:
        part, left = S.crop_board(board, picture, rows, columns, rng)
        assert part.shape == picture.shape and len(left) == rows * columns
    part, left = S.crop_board(board, picture, 3, 3, rng)
    np.testing.assert_array_equal(part, picture)
    np.testing.assert_allclose(S.resize(np.array([[0.0], [1.0]]), 4, 0)[:, 0], [0, 0.25, 0.75, 1])
