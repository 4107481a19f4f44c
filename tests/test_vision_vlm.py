"""The tiny vision-language model: its words, who may read whom, that an answer depends on its own
question alone, that it learns."""

import random

import numpy as np
import pytest
import torch

from minilm import InputError
from minilm.data import IGNORE, generator
from vision_eval import scenes, vlm
from vision_eval.hallu_pi import questions as make_items
from vision_eval.vlm import (
    IDS,
    PATCHES,
    Diet,
    TinyVLM,
    answer,
    decode,
    encode,
    example,
    layout,
    make_batch,
)


@pytest.fixture(scope="module")
def model():
    model = TinyVLM(generator(0, "init"), width=32, layers=2)
    with torch.no_grad():
        for (
            name,
            p,
        ) in (
            model.lm.named_parameters()
        ):  # large weights: an untrained model then says different words at different places
            if "proj" in name:
                p.mul_(5)
    return model


def pictures(n=3):
    rng = random.Random(0)
    return scenes.to_uint8(scenes.render([scenes.draw_scene(rng, 0.8) for _ in range(n)]))


def test_a_prompt_keeps_the_words_that_carry_meaning():
    assert (
        decode(encode("Is there a circle in the image? Answer with 'Yes' or 'No'."))
        == "there circle ?"
    )
    assert (
        decode(encode("Maybe yes. Are there two crosses in the top-left image?"))
        == "maybe yes there two cross top-left ?"
    )
    assert (
        decode(encode(scenes.TEMPLATES["reminder"] + "How many shapes are there in the image?"))
        == "note carefully many shape there ?"
    )
    with pytest.raises(InputError, match="does not know the word 'dog'"):
        encode("Is there a dog in the image?")


def test_every_text_that_the_world_can_make_is_known():
    rng = random.Random(1)
    for kind in ("single", "wide", "board"):
        for _ in range(60):
            shapes = scenes.draw_scene(rng, 0.5, kind).shapes
            for misled in (False, True):
                for item in make_items(
                    shapes,
                    "0",
                    "misleading",
                    "after",
                    str(rng.random()),
                    "bottom-left",
                    kind == "board",
                    misled,
                ):
                    encode(item.question)
                    encode(
                        scenes.TEMPLATES["greeting"] + scenes.TEMPLATES["reminder"] + item.question
                    )
            assert all(w in IDS for w in scenes.describe(shapes).answer.split())


def test_only_the_answer_is_learned():
    inputs, labels = example("Is there a circle in the image?", "two yes")
    assert decode(inputs) == "there circle ? two" and labels == [
        IGNORE,
        IGNORE,
        IDS["two"],
        IDS["yes"],
    ]
    inputs, labels = example("Please describe the existing objects in the image.", "one red bar")
    assert decode(inputs) == "describe ? one red bar" and labels == [
        IGNORE,
        IDS["one"],
        IDS["red"],
        IDS["bar"],
        IDS["<end>"],
    ]


def test_a_token_reads_the_picture_and_its_own_turn_up_to_itself():
    mask = layout([2, 3]).mask()[0]
    assert mask.shape == (PATCHES + 5,) * 2
    words = mask[PATCHES:, PATCHES:].int().tolist()
    assert words == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert mask[:, :PATCHES].all() and not mask[:PATCHES, PATCHES:].any()
    assert layout([2, 3]).position[0, PATCHES:].tolist() == [
        PATCHES,
        PATCHES + 1,
        PATCHES,
        PATCHES + 1,
        PATCHES + 2,
    ]


def test_an_answer_is_the_same_alone_and_among_other_questions_and_pictures(model):
    x = pictures()
    prompts = [
        ["Is there a circle in the image?", "Please describe the existing objects in the image."],
        ["Is the bar in the image red?"],
        ["How many shapes are there in the image?", "Maybe no. Are there two rings in the image?"],
    ]
    together = answer(model, x, prompts)
    alone = [
        [answer(model, x[i : i + 1], [[p]])[0][0] for p in row] for i, row in enumerate(prompts)
    ]
    assert together == alone == answer(model, x, prompts, batch=1)


def test_cached_decoding_equals_reading_everything_again(model):
    x, prompt = pictures(1), "Please describe the existing objects in the image."
    ((said,),) = answer(model, x, [[prompt]], longest=6)
    ids = list(encode(prompt))
    with torch.no_grad():
        for _ in range(6):
            h = model.hidden(vlm.to_tensor(x), torch.tensor([ids]), layout([len(ids)]))
            ids.append(model.lm.lm_head(h[:, -1]).argmax(-1).item())
            if ids[-1] in (IDS["<end>"], IDS["yes"], IDS["no"]):
                break
    assert decode(ids[len(encode(prompt)) :]) == said


def test_training_and_answering_agree_on_the_first_word(model):
    images, ids, labels, lay = make_batch(Diet(), 4, 3, random.Random(2), 0)
    with torch.no_grad():
        h = model.hidden(images, ids, lay)
    first = [
        (row, at) for row in range(4) for at in range(ids.shape[1]) if ids[row, at] == IDS["?"]
    ]
    for row, at in first:
        start = at - int(lay.position[0, PATCHES + at] - PATCHES)
        with torch.no_grad():
            alone = model.hidden(
                images[row : row + 1], ids[row : row + 1, start : at + 1], layout([at + 1 - start])
            )
        torch.testing.assert_close(alone[0, -1], h[row, at], atol=1e-4, rtol=1e-4)
    assert len(first) == 16  # an open question and three others for each of four pictures


def test_a_diet_holds_what_it_says():
    rng = random.Random(0)
    diet = Diet(mosaics=0.3, crops=0.3, boards=0.0, wide=0.0)
    drawn = [vlm.draw_views(diet, rng) for _ in range(300)]
    shares = [
        np.mean([len(views) == 4 for _, views, _ in drawn]),
        np.mean([board for _, _, board in drawn]),
    ]
    assert np.allclose(shares, 0.3, atol=0.08)
    hints = [
        prompt
        for _ in range(200)
        for prompt, _ in vlm.draw_turns(
            [(scenes.draw_scene(rng, 0.8).shapes, "")],
            False,
            5,
            Diet(hints=0.5, hint_acc=1.0),
            False,
            rng,
        )[1:]
    ]
    assert abs(np.mean([p.startswith("Maybe") for p in hints]) - 0.5) < 0.06


def test_hints_are_right_as_often_as_they_should_be_and_reminded_ones_half_the_time():
    rng, shapes = random.Random(0), scenes.draw_scene(random.Random(4), 0.8).shapes

    def right(diet, damaged):
        rows = [
            row
            for _ in range(200)
            for row in vlm.draw_turns([(shapes, "")], False, 5, diet, damaged, rng)[1:]
        ]
        return np.mean([f"Maybe {a.split()[-1]}." in p for p, a in rows]), np.mean(
            [p.startswith("Note") for p, _ in rows]
        )

    for diet, damaged, expected, reminded in (
        (Diet(hints=1.0), False, 0.8, 0.0),
        (Diet(hints=1.0, reminders=1.0), False, 0.8, 0.0),
        (Diet(hints=1.0, reminders=1.0), True, 0.5, 1.0),
        (Diet(hints=1.0, reminders=1.0, words=False), True, 0.5, 0.0),
    ):
        share, words = right(diet, damaged)
        assert abs(share - expected) < 0.06 and words == reminded


def test_damaged_training_pictures_have_every_operation_at_every_severity(monkeypatch):
    damage = []

    def record(x, op, severity, gen):
        damage.append((op, severity))
        return x

    monkeypatch.setattr(vlm, "apply", record)
    diet, rng = Diet(corrupt=0.5, ops=("noise", "fog", "jpeg")), random.Random(0)
    make_batch(diet, 600, 1, rng, 0)
    assert 250 < len(damage) < 350
    for op in diet.ops:
        counts = [damage.count((op, severity)) for severity in (1, 2, 3, 4, 5)]
        assert min(counts) > 8 and sum(counts) > 60


def test_turns_are_filled_up_to_their_slots():
    filled = vlm.fill_slots([[[5, 6], [7]], [[8], [9]]], [2, 1], 0)
    assert filled.tolist() == [[5, 6, 7], [8, 0, 9]]


def test_a_broken_model_folder_is_refused_by_name(tmp_path):
    vlm.save_vlm(tmp_path, TinyVLM(generator(0, "init"), width=32, layers=1))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(InputError, match="model.safetensors"):
        vlm.load_vlm(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        vlm.load_vlm(tmp_path)


def test_training_stops_where_it_is_left():
    model = TinyVLM(generator(0, "init"), width=32, layers=1)
    steps = vlm.training(model, Diet(), 3, 1e-3, 0, "stage 2", batch=2, turns=1)
    before = model.rows.clone()
    assert next(steps) == 1 and next(steps) == 2 and not torch.equal(before, model.rows)
    steps.close()


def test_the_encoder_learns_in_stage_one_and_the_whole_model_overfits_one_batch():
    torch.manual_seed(0)
    model = TinyVLM(generator(1, "init"), width=32, layers=2)
    before = model.encoder[0].weight.clone()
    vlm.pretrain_encoder(model, 3, 0, batch=8)
    assert not torch.equal(model.encoder[0].weight, before)
    images, ids, labels, lay = make_batch(Diet(), 4, 3, random.Random(2), 0)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(
            model.lm.lm_head(model.hidden(images, ids, lay)).transpose(1, 2), labels
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


def test_the_same_seed_trains_the_same_model_and_a_saved_one_answers_the_same(tmp_path):
    def trained():
        model = TinyVLM(generator(0, "init"), width=32, layers=1)
        vlm.train(
            model, Diet(corrupt=0.5, ops=("noise", "fog")), 2, 1e-3, 5, "stage 2", batch=4, turns=2
        )
        return model

    torch.manual_seed(1)
    one = trained()
    torch.manual_seed(2)
    two = trained()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    vlm.save_vlm(tmp_path / "tiny", one)
    prompts = [["How many shapes are there in the image?"]] * 3
    assert answer(vlm.load_vlm(tmp_path / "tiny"), pictures(), prompts) == answer(
        one, pictures(), prompts
    )
    (tmp_path / "tiny" / "config.json").write_text('{"words": ["other"]}')
    with pytest.raises(InputError, match="other words"):
        vlm.load_vlm(tmp_path / "tiny")
