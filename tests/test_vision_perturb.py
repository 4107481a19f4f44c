"""Damage to pictures: each operation by its formula or by a law, the traps (borders, tiny and even
pictures); files of every mode and orientation; the folder command."""

import numpy as np
import pytest
import torch
from PIL import Image

from minilm import InputError
from minilm.data import generator
from vision_eval import perturb as P
from vision_eval.perturb import FAMILIES, OPS, apply, concat, perturb

GEN = lambda: generator(0, "test")
picture = lambda H=40, W=56: torch.rand(3, H, W, generator=generator(1, "picture"))


def test_every_operation_keeps_shape_type_and_range_on_pictures_that_are_not_square():
    image = (picture(41, 33).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    for op in OPS:
        for severity in (1, 5):
            out = perturb(image, op, severity)
            assert out.shape == image.shape and out.dtype == np.uint8, op
        assert (out != image).any(), op
    out = perturb(image / 255.0, "fog", 3)
    assert out.dtype == np.float64 and out.min() >= 0 and out.max() <= 1


def test_every_operation_works_on_the_smallest_picture_and_at_full_strength_on_a_small_one():
    for op in OPS:
        for side, scale in ((8, None), (24, False)):
            assert apply(picture(side, side), op, 5, GEN(), scale).shape == (3, side, side), op


def test_a_pictures_damage_depends_on_seed_index_and_operation_alone():
    image = picture().permute(1, 2, 0).numpy()
    torch.manual_seed(3)
    first = perturb(image, "noise", 2, seed=5, index=7)
    torch.manual_seed(4)
    assert (perturb(image, "noise", 2, seed=5, index=7) == first).all()
    assert (
        perturb(image, "gaussian_noise", 2, seed=5, index=7) == first
    ).all()  # the family's representative
    assert (perturb(image, "noise", 2, seed=6, index=7) != first).any() and (
        perturb(image, "noise", 2, seed=5, index=8) != first
    ).any()


def test_noise_has_the_standard_deviation_of_its_severity_in_every_channel_alone():
    x = torch.full((3, 100, 100), 0.5)
    for severity, s in ((1, 0.08), (2, 0.12)):
        noise = apply(x, "gaussian_noise", severity, GEN()) - x
        assert (
            abs(noise.std().item() / s - 1) < 0.02
            and abs(torch.corrcoef(noise.flatten(1))[0, 1]) < 0.05
        )
    speckle = apply(x, "speckle_noise", 1, GEN()) - x
    assert abs(speckle.std().item() / (0.5 * 0.15) - 1) < 0.02


def test_shot_noise_leaves_black_black_and_keeps_the_mean():
    x = torch.full((3, 100, 100), 0.3)
    x[:, :, :50] = 0
    out = apply(x, "shot_noise", 3, GEN())
    assert (out[:, :, :50] == 0).all() and abs(out[:, :, 50:].mean().item() - 0.3) < 0.01
    assert (
        abs(out[:, :, 50:].var().item() / (0.3 / 12) - 1) < 0.1
    )  # Poisson(xc)/c has variance x/c; the clip to 1 takes a little


def test_impulses_are_black_and_white_in_equal_numbers():
    out = apply(torch.full((3, 100, 100), 0.5), "impulse_noise", 5, GEN())
    assert (
        abs((out == 1).float().mean() - 0.135) < 0.01
        and abs((out == 0).float().mean() - 0.135) < 0.01
    )


def test_an_even_grey_stays_the_same_grey_up_to_the_border():
    x = torch.full((3, 30, 44), 0.37)
    for op in (
        "defocus_blur",
        "gaussian_blur",
        "zoom_blur",
        "motion_blur",
        "glass_blur",
        "pixelate",
        "elastic",
        "contrast",
    ):
        for severity in (1, 5):
            torch.testing.assert_close(apply(x, op, severity, GEN()), x, atol=1e-5, rtol=0)


def test_defocus_turns_a_point_into_a_disk_of_its_radius():
    x = torch.zeros(3, 41, 41)
    x[:, 20, 20] = 1
    out = apply(x, "defocus_blur", 1, GEN(), scale=False)[
        0
    ]  # r = 3: 29 pixels have dx^2 + dy^2 <= 9
    d = (torch.arange(41) - 20) ** 2
    inside = d[:, None] + d <= 9
    torch.testing.assert_close(out, inside / 29, atol=1e-4, rtol=0)
    wide = apply(x, "defocus_blur", 5, GEN(), scale=False)[0]
    assert (
        wide.sum().item() == pytest.approx(1, abs=1e-4) and (wide > 1e-4).sum() > (out > 1e-4).sum()
    )


def test_a_smaller_picture_gets_a_smaller_blur_and_scale_false_the_original_one():
    x = torch.zeros(3, 56, 56)
    x[:, 28, 28] = 1
    spread = lambda y: (y[0] > 1e-3).sum().item()
    assert (
        spread(apply(x, "defocus_blur", 5, GEN()))
        < spread(apply(x, "defocus_blur", 5, GEN(), scale=False)) / 4
    )


def test_gaussian_blur_equals_the_sum_it_is():
    x = picture(20, 20)[:1].expand(3, -1, -1)
    taps = torch.exp(-(torch.arange(-4.0, 5) ** 2) / 2)
    taps = taps / taps.sum()
    padded, taps = np.pad(x[0].numpy(), 4, "edge"), taps.tolist()
    by_hand = sum(
        taps[i] * taps[j] * padded[i : i + 20, j : j + 20] for i in range(9) for j in range(9)
    )
    np.testing.assert_allclose(
        apply(x, "gaussian_blur", 1, GEN(), scale=False)[0], by_hand, atol=1e-5
    )


def test_motion_goes_one_way_only():
    x = torch.zeros(1, 21, 21)
    x[0, 10, 10] = 1
    out = P.streak(x, 3, 2.0, 0)[
        0
    ]  # a pixel collects what lies at its right: the point is drawn out to the left
    weights = torch.exp(-(torch.arange(7.0) ** 2) / 8)
    torch.testing.assert_close(out[10, 4:11].flip(0), weights / weights.sum())
    assert out[10, 11:].abs().max() < 1e-7 and out.sum().item() == pytest.approx(1, abs=1e-5)


def test_glass_only_moves_pixels():
    x = picture(20, 24)
    order = P.glass_blur(x, (0.0, 1, 2), GEN(), 1.0)
    assert torch.equal(
        order.flatten(1).sort().values, x.flatten(1).sort().values
    ) and not torch.equal(order, x)


def test_fog_on_an_even_picture_lands_between_its_bounds():
    for severity, c in ((1, 1.5), (5, 3)):
        for v in (0.2, 0.9):
            out = apply(torch.full((3, 48, 40), v), "fog", severity, GEN())
            assert out.min() >= v * v / (v + c) - 1e-6 and out.max() <= v + 1e-6
            assert (
                torch.equal(out[0], out[1]) and out.std() > 0.01
            )  # one channel of fog, and it is not even
    assert (apply(torch.zeros(3, 48, 40), "fog", 3, GEN()) == 0).all()


def test_plasma_fills_zero_to_one_and_wraps_around():
    p = P.plasma(64, 64, 2.0, GEN())
    assert p.min() == 0 and p.max() == 1 and p.shape == (64, 64)
    step = (p[1:] - p[:-1]).abs().mean()
    assert (p[0] - p[-1]).abs().mean() < 3 * step  # a torus: the first row continues the last
    rough, smooth = (
        P.plasma(64, 64, decay, GEN()).diff(dim=0).abs().mean() for decay in (1.4, 3.0)
    )
    assert rough > 2 * smooth  # the faster the amplitude falls from level to level
    assert torch.equal(P.plasma(30, 50, 2.0, GEN()), p[:30, :50])


def test_brightness_keeps_hue_and_makes_black_grey():
    x = torch.tensor([0.2, 0.1, 0.4])[:, None, None].expand(3, 10, 10).clone()
    x[:, :, 0] = 0
    out = apply(x, "brightness", 2, GEN())
    torch.testing.assert_close(
        out[:, 0, 5], torch.tensor([0.3, 0.15, 0.6])
    )  # value 0.4 -> 0.6: all channels times 1.5
    torch.testing.assert_close(out[:, 0, 0], torch.full((3,), 0.2))


def test_contrast_shrinks_every_channel_about_its_own_mean():
    x = picture()
    out = apply(x, "contrast", 1, GEN())
    torch.testing.assert_close(out.mean((1, 2)), x.mean((1, 2)))
    torch.testing.assert_close(out.std((1, 2)), 0.4 * x.std((1, 2)))


def test_pixelate_is_a_box_average_shown_as_blocks():
    x = picture(20, 20)
    out = P.pixelate(x, 0.5, None, 1.0)
    torch.testing.assert_close(
        out[:, 4:6, 6:8], x[:, 4:6, 6:8].mean((1, 2), keepdim=True).expand(3, 2, 2)
    )
    weights = P.box(5, 2)  # 2.5 pixels each: the middle one is shared
    torch.testing.assert_close(
        weights, torch.tensor([[0.4, 0.4, 0.2, 0, 0], [0, 0, 0.2, 0.4, 0.4]])
    )


def test_snow_falls_symmetrically_and_frost_brightens():
    x = torch.full((3, 48, 48), 0.3)
    snow, frost = apply(x, "snow", 3, GEN()), apply(x, "frost", 1, GEN())
    torch.testing.assert_close(snow, snow.rot90(2, (1, 2)))  # y + L + L turned by 180 degrees
    assert snow.mean() > 0.3 and (frost >= x - 1e-6).all() and frost.std() > 0.02


def test_a_mosaic_has_its_pictures_where_the_place_words_say_also_at_odd_sizes():
    tones = [
        torch.full((3, 9, 7), v) for v in (0.1, 0.2, 0.3, 0.4)
    ]  # top-left, top-right, bottom-left, bottom-right
    out = concat(tones)
    assert out.shape == (3, 9, 7)
    assert [round(out[0, r, c].item(), 3) for r, c in ((0, 0), (0, 6), (8, 0), (8, 6))] == [
        0.1,
        0.2,
        0.3,
        0.4,
    ]
    assert out.mean().item() == pytest.approx(0.25, abs=1e-6)
    x = [picture(8, 8)] * 4
    torch.testing.assert_close(
        concat(x)[:, :4, :4], x[0].unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2))
    )


@pytest.mark.parametrize("severity", [0, 6, 2.5, "3", True, None])
def test_a_severity_outside_one_to_five_is_refused(severity):
    with pytest.raises(InputError, match="whole number from 1 to 5"):
        apply(picture(), "fog", severity, GEN())


def test_unknown_operations_and_wrong_pictures_are_refused_in_one_line():
    image = np.zeros((20, 20, 3), np.uint8)
    for wrong, message in (
        ((image, "mist"), "not known; give some of noise"),
        ((image[..., 0], "fog"), r"\[H, W, 3\]"),
        ((image.astype(np.int64), "fog"), "uint8 or float"),
        ((np.full((20, 20, 3), 7.0), "fog"), "divide by 255"),
        ((np.full((20, 20, 3), np.nan), "fog"), "divide by 255"),
        ((image[:4], "fog"), "too small"),
    ):
        with pytest.raises(InputError, match=message) as error:
            perturb(*wrong, 1)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="needs four"):
        concat([picture()] * 3)


# --- files


def save(path, size=(30, 20), **how):
    """A random picture of `size` (height, width) as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = (picture(*size).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    Image.fromarray(image).save(path, **how)
    return image


def command(tmp_path, **changes):
    given = {"images": str(tmp_path / "in"), "out": str(tmp_path / "out"), **changes}
    return P.main(P.Config(**given))


def written(tmp_path, *ops):
    return {op: sorted(f.name for f in (tmp_path / "out" / op).iterdir()) for op in ops}


def test_a_folder_of_pictures_becomes_damaged_folders_and_a_contact_sheet(tmp_path):
    save(tmp_path / "in" / "p0.png")
    save(tmp_path / "in" / "p1.png", (24, 24))
    command(tmp_path, perturb="noise,blur,weather,digital,concat,jpeg")
    for op in (*FAMILIES.values(), "concat", "jpeg"):
        assert Image.open(tmp_path / "out" / op / "p0.png").size == (20, 30)
    sheet = np.array(Image.open(tmp_path / "out" / "contact.png"))
    assert sheet.shape == (20 + 2 * 160, 120 + 7 * 160, 3)  # names above and at the left
    for column in range(7):
        assert (sheet[:20, 120 + column * 160 :][:, :160] < 128).any()  # every column has a name
    first = (tmp_path / "out" / "gaussian_noise" / "p1.png").read_bytes()
    command(tmp_path, perturb="noise")
    assert (tmp_path / "out" / "gaussian_noise" / "p1.png").read_bytes() == first


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"perturb": "mist"}, "not known"),
        ({"images": "none"}, "holds no picture"),
        ({"severity": 6}, "--severity 6"),
        ({"severity": -1}, "--severity -1"),
    ],
)
def test_a_wrong_flag_writes_nothing(tmp_path, changes, message):
    save(tmp_path / "in" / "p0.png")
    with pytest.raises((InputError, FileNotFoundError), match=message):
        command(tmp_path, **changes)
    assert not (tmp_path / "out").exists()


def test_operations_may_be_written_with_spaces_and_twice():
    found = P.find_operations("noise, blur ,gaussian_noise, concat")
    assert found == ["gaussian_noise", "defocus_blur", "concat"]


def test_every_input_has_an_output_of_its_own(tmp_path):
    names = ("a.png", "a.jpg", "b.webp", "c.PNG", "a.b.png")
    for name in names:
        save(tmp_path / "in" / name)
    command(tmp_path, perturb="fog")
    assert written(tmp_path, "fog")["fog"] == [
        "a.b.png",
        "a.jpg.png",
        "a.png.png",
        "b.png",
        "c.png",
    ]
    save(tmp_path / "in" / "a.jpg.gif")  # a third one that would become a.jpg.png
    with pytest.raises(InputError, match="a.jpg, a.jpg.gif would all become a.jpg.png"):
        command(tmp_path, perturb="fog")


def test_outputs_never_land_among_the_inputs(tmp_path):
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "out" / "fog" / "b.png")
    for images, out in (("in", "in"), ("out/fog", "out")):
        with pytest.raises(InputError, match="would write among the pictures"):
            command(tmp_path, images=str(tmp_path / images), out=str(tmp_path / out), perturb="fog")
    assert [f.name for f in (tmp_path / "in").iterdir()] == ["a.png"]


def test_where_no_picture_can_be_read_nothing_is_said_to_be_written(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "text.jpg").write_text("not a picture")
    with pytest.raises(InputError, match="no picture .*text.jpg is not a picture"):
        command(tmp_path, perturb="fog")
    assert "wrote" not in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_a_picture_that_cannot_be_read_is_named_and_the_others_are_done(tmp_path):
    save(tmp_path / "in" / "good.png")
    whole = (tmp_path / "in" / "good.png").read_bytes()
    (tmp_path / "in" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "text.jpg").write_text("not a picture")
    (tmp_path / "in" / "empty.png").write_bytes(b"")
    save(tmp_path / "in" / "tiny.png", (4, 4))
    with pytest.raises(InputError, match="4 pictures were left out") as error:
        command(tmp_path, perturb="fog,concat")
    assert all(name in str(error.value) for name in ("cut", "text", "empty", "tiny"))
    assert written(tmp_path, "fog", "concat") == {"fog": ["good.png"], "concat": ["good.png"]}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_a_viewer_turns_it(tmp_path, orientation):
    # what a viewer should show: 3 high, 2 wide, every pixel another grey
    shown = np.arange(6, dtype=np.uint8).reshape(3, 2) * 40
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.T,
        6: shown.T[::-1],
        7: shown.T[::-1, ::-1],
        8: shown.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "p.png", exif=exif)
    read = P.read_picture(tmp_path / "p.png")
    assert (read == shown[..., None]).all() and read.shape == (3, 2, 3)


GREY = np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5)
RED = Image.fromarray(np.dstack([GREY, GREY * 0, GREY * 0]))


def clear(image, alpha):
    image = image.copy()
    image.putalpha(Image.fromarray(alpha))
    return image


@pytest.mark.parametrize(
    "image, ending, shown",
    [
        (Image.fromarray(GREY), "png", np.dstack([GREY] * 3)),
        (RED, "png", np.array(RED)),
        (RED.convert("P"), "png", np.array(RED.convert("P").convert("RGB"))),
        (Image.fromarray(GREY > 100), "png", np.dstack([(GREY > 100) * 255] * 3)),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "png", np.dstack([GREY] * 3)),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "tif", np.dstack([GREY] * 3)),
        (clear(RED, np.zeros_like(GREY)), "png", np.full((5, 5, 3), 255)),
        (clear(Image.fromarray(GREY), np.zeros_like(GREY)), "png", np.full((5, 5, 3), 255)),
        (clear(RED, np.full_like(GREY, 255)), "webp", None),
        (Image.new("CMYK", (5, 5), (0, 255, 255, 0)), "tif", np.full((5, 5, 3), (255, 0, 0))),
    ],
    ids=["L", "RGB", "P", "1", "16 bits", "16-bit tif", "RGBA", "LA", "webp", "CMYK"],
)
def test_every_mode_is_read_as_it_looks(tmp_path, image, ending, shown):
    image.save(tmp_path / f"p.{ending}")
    read = P.read_picture(tmp_path / f"p.{ending}")
    assert read.dtype == np.uint8 and read.shape == (5, 5, 3)
    assert shown is None or (read == shown).all()


def test_a_transparent_colour_of_a_palette_is_white_and_half_transparent_is_half_white(tmp_path):
    palette = RED.convert("P")
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))
    assert (P.read_picture(tmp_path / "p.png")[0, 0] == 255).all()
    clear(RED, np.full_like(GREY, 128)).save(tmp_path / "h.png")
    half = P.read_picture(tmp_path / "h.png").astype(int)
    assert abs(half - (np.array(RED).astype(int) + 255) / 2).max() <= 1


def test_a_mode_without_one_way_to_be_shown_is_refused_by_name(tmp_path):
    Image.fromarray(np.ones((5, 5), np.float32)).save(tmp_path / "p.tif")
    with pytest.raises(InputError, match="mode F"):
        P.read_picture(tmp_path / "p.tif")
