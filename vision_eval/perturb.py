"""Damaged pictures: the corruptions of Hallu-PI and ImageNet-C (https://arxiv.org/abs/1903.12261)
at severities 1 to 5, in torch.

    python vision_eval/perturb.py --images DIR --perturb noise,blur,fog,jpeg --out DIR

writes a damaged copy of a folder of pictures, and a contact sheet.

Hallu-PI uses one operation of each family: gaussian noise, defocus blur, fog ("weather"), pixelate
("digital"); concatenation is `concat`. Every picture has its own generator, made of (seed, index,
operation, severity): results depend on no batch and no order.

x is [3, H, W] in [0, 1], every operation ends in a clip to [0, 1], and the tables hold one value
per severity. Radii and shifts are pixels of a picture of about 224 pixels; on smaller ones they
shrink by `factor` = min(H, W) / 224 (scale=False: they do not, as in the original). Deviations:
frost is a synthetic texture, the original pastes photographs of ice; elastic is the variant without
an affine warp.
"""

import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from minilm import InputError
from minilm.data import generator, write_atomically
from minilm.results import check_range, cli, progress

FAMILIES = {  # the paper's representative of each family
    "noise": "gaussian_noise",
    "blur": "defocus_blur",
    "weather": "fog",
    "digital": "pixelate",
}


# --- parts


def uniform(shape, low, high, gen):
    return low + (high - low) * torch.rand(shape, generator=gen)


def correlate(x, kernel, border="reflect"):
    """Correlation of every channel with one odd kernel; `reflect` mirrors, edge not repeated."""
    kh, kw = kernel.shape
    padded = F.pad(x[None], (kw // 2, kw // 2, kh // 2, kh // 2), border)
    return F.conv2d(padded.transpose(0, 1), kernel[None, None]).transpose(0, 1)[0]


def bell(sigma, radius):
    """Gaussian taps -radius ... radius, of sum 1; a single 1 for sigma 0."""
    taps = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * max(sigma, 1e-3) ** 2))
    return taps / taps.sum()


def smooth(x, sigma, truncate=4.0, border="replicate"):
    taps = bell(sigma, int(truncate * sigma + 0.5))
    return correlate(correlate(x, taps[:, None], border), taps[None], border)


def sample(x, rows, columns, border="border"):
    """x at fractional pixel coordinates [H', W'], bilinear."""
    H, W = x.shape[1:]
    grid = torch.stack([(2 * columns + 1) / W - 1, (2 * rows + 1) / H - 1], -1)[None]
    return F.grid_sample(x[None], grid, "bilinear", border, align_corners=False)[0]


def pixels(x):
    """Row and column of every pixel, float [H, W] each."""
    sides = (torch.arange(n, dtype=torch.float32) for n in x.shape[1:])
    return torch.meshgrid(*sides, indexing="ij")


def centre_zoom(x, zoom):
    H, W = x.shape[1:]
    rows, columns = pixels(x)
    rows = (rows - (H - 1) / 2) / zoom + (H - 1) / 2
    columns = (columns - (W - 1) / 2) / zoom + (W - 1) / 2
    return sample(x, rows, columns)


def box(m, n):
    """[n, m]: averages m pixels to n, each weighted by its overlap with the new one."""
    edge = torch.arange(n + 1, dtype=torch.float64) * m / n
    low = torch.arange(m, dtype=torch.float64)
    overlap = torch.minimum(edge[1:, None], low + 1) - torch.maximum(edge[:-1, None], low)
    return (overlap.clamp(min=0) * n / m).float()


def resize(x, H, W):
    """Area average (down, or up without smoothing)."""
    return box(x.shape[1], H) @ x @ box(x.shape[2], W).T


def streak(x, radius, sigma, degrees):
    """Motion: sum over taps i = 0 ... 2R of x shifted by i pixels along the angle, weights
    exp(-i^2 / 2 s^2) / their sum, edge repeated."""
    R = max(1, round(radius))
    H, W = x.shape[1:]
    weights = torch.exp(-(torch.arange(2 * R + 1) ** 2) / (2 * max(sigma, 0.3) ** 2))
    padded = F.pad(x[None], (2 * R,) * 4, "replicate")[0]
    down, across = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    total = torch.zeros_like(x)
    for tap, weight in enumerate((weights / weights.sum()).tolist()):
        top = 2 * R + round(tap * down)
        left = 2 * R + round(tap * across)
        total += weight * padded[:, top : top + H, left : left + W]
    return total


def plasma(H, W, decay, gen):
    """Diamond-square noise on a torus of power-of-two side, in [0, 1], cropped to [H, W]: at every
    level the centres of squares, then the middles of their sides, are the mean of their four
    neighbours plus a uniform value in +- amplitude^2; amplitude /= decay."""
    side = 2 ** math.ceil(math.log2(max(H, W, 2)))
    a = torch.zeros(side, side)
    step = side
    amplitude = 100.0
    while step >= 2:
        half, corners = step // 2, a[::step, ::step]
        wobble = uniform((3, *corners.shape), -(amplitude**2), amplitude**2, gen)
        right, down = corners.roll(-1, 1), corners.roll(-1, 0)
        centres = (corners + right + down + down.roll(-1, 1)) / 4 + wobble[0]
        tops = (corners + right + centres + centres.roll(1, 0)) / 4 + wobble[1]
        lefts = (corners + down + centres + centres.roll(1, 1)) / 4 + wobble[2]
        a[half::step, half::step] = centres
        a[::step, half::step] = tops
        a[half::step, ::step] = lefts
        step, amplitude = half, amplitude / decay
    return ((a - a.min()) / (a.max() - a.min()))[:H, :W]


# --- operations: f(x, value of this severity, generator, factor)


def gaussian_noise(x, s, gen, factor):
    return x + s * torch.randn(x.shape, generator=gen)


def shot_noise(x, c, gen, factor):
    return torch.poisson(x * c, generator=gen) / c


def impulse_noise(x, p, gen, factor):
    u = torch.rand(x.shape, generator=gen)
    return torch.where(u < p, (u < p / 2).float(), x)


def speckle_noise(x, s, gen, factor):
    return x + x * s * torch.randn(x.shape, generator=gen)


def defocus_blur(x, radius, gen, factor):
    """The disk of the radius, smoothed a little; a fractional radius is rasterised on a grid five
    times as fine."""
    alias = (0.1 if radius == 3 else 0.5) * factor
    wide = 1 if radius <= 8 else 2
    r = min(radius * factor, min(x.shape[1:]) - 2 - wide)
    half = math.ceil(r)
    fine = 1 if r == int(r) else 5
    i = (torch.arange((2 * half + 1) * fine) + 0.5) / fine - 0.5 - half
    inside = (i[:, None] ** 2 + i**2) <= r * r
    disk = inside.float().view(2 * half + 1, fine, 2 * half + 1, fine).mean((1, 3))
    disk = F.pad(disk / disk.sum(), (wide,) * 4)
    taps = bell(alias, wide)
    kernel = correlate(disk[None], taps[:, None] * taps, "constant")[0]
    return correlate(x, kernel / kernel.sum())


def gaussian_blur(x, sigma, gen, factor):
    return smooth(x, sigma * factor)


def zoom_blur(x, zooms, gen, factor):
    largest, step = zooms
    zooms = np.arange(1, largest + step / 2, step)
    return (x + sum(centre_zoom(x, z) for z in zooms)) / (len(zooms) + 1)


def motion_blur(x, c, gen, factor):
    radius, sigma = c
    return streak(x, radius * factor, sigma * factor, uniform((), -45, 45, gen).item())


def glass_blur(x, c, gen, factor):
    """Blur, then swap every pixel with a near one, one after the other, then blur."""
    sigma, shift, passes = c
    sigma, shift = sigma * factor, max(1, round(shift * factor))
    H, W = x.shape[1:]
    x = smooth(x, sigma)
    order = [*range(H * W)]
    for _ in range(passes):
        down, across = torch.randint(-shift, shift + 1, (2, H, W), generator=gen).tolist()
        for row in range(H - shift - 1, shift - 1, -1):
            for column in range(W - shift - 1, shift - 1, -1):
                here = row * W + column
                there = (row + down[row][column]) * W + column + across[row][column]
                order[here], order[there] = order[there], order[here]
    return smooth(x.flatten(1)[:, order].view_as(x), sigma)


def fog(x, c, gen, factor):
    """(x + c P) m / (m + c), m = max(x), P = plasma: a constant picture of value v ends between
    v^2 / (v + c) and v."""
    strength, decay = c
    m = x.max()
    return (x + strength * plasma(*x.shape[1:], decay, gen)) * m / (m + strength)


def frost(x, c, gen, factor):
    """a x + b texture; the texture: ridges of two plasmas, bluish white."""
    a, b = c

    def ridge(decay):  # 1 where the plasma crosses its middle
        return 1 - (2 * plasma(*x.shape[1:], decay, gen) - 1).abs()

    rough, fine = ridge(1.7), ridge(1.3)
    ridges = rough**2 * (0.5 + 0.5 * fine)
    return a * x + b * ridges * torch.tensor([0.85, 0.93, 1.0])[:, None, None]


def snow(x, c, gen, factor):
    mu, zoom, threshold, R, sigma, b = c
    flakes = centre_zoom(mu + 0.3 * torch.randn(1, *x.shape[1:], generator=gen), zoom)
    angle = uniform((), -135, -45, gen).item()
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    flakes = streak(flakes, R * factor, sigma * factor, angle)
    gray = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    pale = torch.maximum(x, 1.5 * gray + 0.5)
    return b * x + (1 - b) * pale + flakes + flakes.rot90(2, (1, 2))


def brightness(x, c, gen, factor):
    """HSV value + c: hue and saturation stay, all channels grow by one factor; black: grey."""
    value = x.amax(0, keepdim=True)
    brighter = x * (value + c).clamp(max=1) / value.clamp(min=1e-6)
    return torch.where(value > 0, brighter, x + c)


def contrast(x, k, gen, factor):
    return x.mean((1, 2), keepdim=True).lerp(x, k)


def jpeg(x, quality, gen, factor):
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy())
    image.save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).float() / 255


def pixelate(x, f, gen, factor):
    """Box average to int(side f) pixels, each then shown as a block."""
    H, W = x.shape[1:]
    small = resize(x, int(H * f), int(W * f))  # (at least 2: `apply` refuses tiny pictures)
    h, w = small.shape[1:]
    rows = ((torch.arange(H) + 0.5) * h / H).long()
    columns = ((torch.arange(W) + 0.5) * w / W).long()
    return small[:, rows][:, :, columns]


def elastic(x, a, gen, factor):
    H, W = x.shape[1:]
    down, across = (bell(0.01 * n, int(3 * 0.01 * n + 0.5)) for n in (H, W))
    shift = uniform((2, H, W), -0.005 * H, 0.005 * H, gen)
    shift = correlate(correlate(shift, down[:, None]), across[None])
    rows, columns = pixels(x)
    return sample(x, rows + a * factor * shift[0], columns + a * factor * shift[1], "reflection")


class Operation(NamedTuple):
    f: Callable
    values: tuple  # of severities 1 to 5


OPS = {
    "gaussian_noise": Operation(gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),  # s
    "shot_noise": Operation(shot_noise, (60, 25, 12, 5, 3)),  # photons per unit of light
    "impulse_noise": Operation(impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),  # share of values
    "speckle_noise": Operation(speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),  # s
    "defocus_blur": Operation(defocus_blur, (3, 4, 6, 8, 10)),  # radius
    "gaussian_blur": Operation(gaussian_blur, (1, 2, 3, 4, 6)),  # sigma
    "zoom_blur": Operation(  # largest zoom, step
        zoom_blur, ((1.1, 0.01), (1.15, 0.01), (1.2, 0.02), (1.24, 0.02), (1.3, 0.03))
    ),
    "motion_blur": Operation(motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),  # R, s
    "glass_blur": Operation(  # sigma, largest shift, passes
        glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
    ),
    "fog": Operation(fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),  # c, decay
    "frost": Operation(frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),  # a, b
    "snow": Operation(  # mean, zoom, threshold, R, s, share of the picture that stays
        snow,
        (
            (0.1, 3, 0.5, 10, 4, 0.8),
            (0.2, 2, 0.5, 12, 4, 0.7),
            (0.55, 4, 0.9, 12, 8, 0.7),
            (0.55, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "brightness": Operation(brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),  # added value
    "contrast": Operation(contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),  # share that stays
    "jpeg": Operation(jpeg, (25, 18, 15, 10, 7)),  # quality
    "pixelate": Operation(pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),  # share of the sides
    "elastic": Operation(elastic, (12.5, 16.25, 21.25, 25, 30)),  # strength
}


# --- what others call


def apply(x, op: str, severity: int, gen: torch.Generator, scale: bool | None = None):
    """The operation on x [3, H, W] in [0, 1]. `scale`: shrink radii on small pictures (None: on
    those below 224 pixels). Raises InputError for an operation or a severity that is not known."""
    op = FAMILIES.get(op, op)
    if op not in OPS:
        known = ", ".join((*FAMILIES, *OPS))
        raise InputError(f"perturbation {op!r} is not known; give some of {known}")
    whole = isinstance(severity, (int, np.integer)) and not isinstance(severity, bool)
    if not whole or not 1 <= severity <= 5:
        raise InputError(f"severity {severity!r} must be a whole number from 1 to 5")
    H, W = x.shape[1:]
    side = min(H, W)
    if side < 8:
        raise InputError(f"a picture of {H} x {W} pixels is too small to be damaged: "
                         "give at least 8 x 8")
    shrink = side < 224 if scale is None else scale
    f, values = OPS[op]
    return f(x, values[severity - 1], gen, side / 224 if shrink else 1.0).clamp(0, 1)


def perturb(
    image: np.ndarray,
    op: str,
    severity: int,
    seed: int = 0,
    index: int = 0,
    scale: bool | None = None,
) -> np.ndarray:
    """A damaged copy of an image [H, W, 3], uint8 or float in [0, 1], of the same type; `index` is
    its place in the set."""
    image = np.asarray(image)
    bytes_ = image.dtype == np.uint8
    if image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"an image must be [H, W, 3]; this one is {image.dtype} {image.shape}")
    if not bytes_ and not np.issubdtype(image.dtype, np.floating):
        raise InputError(f"an image must be uint8 or float in [0, 1], not {image.dtype}")
    if not bytes_ and not (image.min() >= 0 and image.max() <= 1):  # (also refuses NaN)
        raise InputError(f"a float image must lie in [0, 1]; this one goes from {image.min():.3g} "
                         f"to {image.max():.3g}: divide by 255?")
    x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()
    gen = generator(seed, f"{index} {FAMILIES.get(op, op)} {severity}")
    x = x / 255 if bytes_ else x
    y = apply(x, op, severity, gen, scale).permute(1, 2, 0).numpy()
    return np.round(y * 255).astype(np.uint8) if bytes_ else y.astype(image.dtype)


def concat(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Four pictures [3, H, W], top-left, top-right, bottom-left, bottom-right -> one 2 x 2 mosaic
    of the first one's size: each is brought to that size, all are glued, the whole is area-averaged
    back. What makes it hard is the size: each keeps a quarter of its pixels."""
    if len(images) != 4:
        raise InputError(f"a mosaic needs four pictures, got {len(images)}")
    H, W = images[0].shape[1:]
    a, b, c, d = (resize(image, H, W) for image in images)
    top, bottom = torch.cat([a, b], 2), torch.cat([c, d], 2)  # side by side
    return resize(torch.cat([top, bottom], 1), H, W)


# --- files

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "La", "CMYK", "YCbCr", "HSV")


def read_picture(path: str | Path) -> np.ndarray:
    """A picture file as a viewer shows it, uint8 [H, W, 3]: turned as its EXIF orientation says,
    transparent parts on white, 16-bit grey brought to 8 bits; of a film the first frame. Colour
    profiles are not read. Raises InputError, naming the file, for one that cannot be shown."""
    from PIL import Image, ImageOps

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such picture")
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a picture that can be read ({error})") from None
    if image.mode.startswith("I;16"):
        gray = (np.asarray(image) / 257).round().astype(np.uint8)  # 65535 is 255 * 257
        return np.repeat(gray[..., None], 3, 2)
    if image.mode not in MODES:
        raise InputError(f"{path} has pixels of mode {image.mode}, which viewers show differently: "
                         "save it as an 8-bit PNG")
    if image.mode in ("CMYK", "YCbCr", "HSV"):
        return np.array(image.convert("RGB"))
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


# --- a folder


@dataclass(frozen=True)
class Config:
    images: str  # folder of pictures (.png, .jpg, .webp, ...)
    out: str  # folder for OPERATION/NAME.png and contact.png
    perturb: str = "noise,blur,weather,digital"  # operations or families; concat is known too
    severity: int = 0  # 1 to 5; 0: a random one for each picture
    seed: int = 0  # of all draws
    scale: bool = True  # shrink radii on pictures below 224 pixels


def find_operations(text: str) -> list[str]:
    """"noise, fog" -> ["gaussian_noise", "fog"], every operation once."""
    names = [name.strip() for name in text.split(",")]
    ops = [*dict.fromkeys(FAMILIES.get(name, name) for name in names)]
    wrong = sorted(set(ops) - {*OPS, "concat"})
    if wrong:
        known = ", ".join((*FAMILIES, *OPS, "concat"))
        raise InputError(f"--perturb {','.join(wrong)} is not known; give some of {known}")
    return ops


def find_pictures(folder: Path) -> tuple[list[Path], list[str]]:
    """The pictures of a folder that can be read and damaged, and why others cannot."""
    files = sorted(f for f in folder.glob("*") if f.suffix.lower() in ENDINGS and f.is_file())
    if not files:
        raise FileNotFoundError(f"--images {folder} holds no picture ({', '.join(ENDINGS)})")
    readable, refused = [], []
    for file in progress(files, "reading"):
        try:
            H, W, _ = read_picture(file).shape
        except InputError as error:
            refused.append(str(error))
            continue
        if min(H, W) < 8:
            refused.append(f"{file} is too small ({H} x {W} pixels; at least 8 x 8)")
        else:
            readable.append(file)
    return readable, refused


def output_names(files: Sequence[Path]) -> dict[Path, str]:
    """a.png -> a.png; where a.png and a.jpg would be one file: a.png.png and a.jpg.png."""
    stems = Counter(file.stem for file in files)
    names = {}
    for file in files:
        names[file] = f"{file.stem if stems[file.stem] == 1 else file.name}.png"
    for name, count in Counter(names.values()).items():
        if count > 1:
            same = ", ".join(file.name for file in files if names[file] == name)
            raise InputError(f"{same} would all become {name}: rename one of them")
    return names


def contact_sheet(columns: Sequence[str], rows: Sequence[list[np.ndarray]], names) -> np.ndarray:
    """Small pictures in a grid, the columns' names above them, the rows' names at the left."""
    from PIL import Image, ImageDraw, ImageOps

    cell = 160
    left = 120
    top = 20
    size = (left + cell * len(columns), top + cell * len(rows))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        draw.text((left + column * cell + 4, 4), name, "black")
    for row, images in enumerate(rows):
        draw.text((4, top + row * cell + cell // 2), names[row][:18], "black")
        for column, image in enumerate(images):
            small = ImageOps.pad(Image.fromarray(image), (cell, cell), color="white")
            sheet.paste(small, (left + column * cell, top + row * cell))
    return np.array(sheet)


def save_png(path: Path, image: np.ndarray) -> None:
    from PIL import Image

    def save(to):
        Image.fromarray(image).save(to, "PNG")

    write_atomically(path, save)


def main(cfg: Config) -> None:
    check_range(cfg, "severity", least=0, most=5)
    ops = find_operations(cfg.perturb)
    folder = Path(cfg.images)
    out = Path(cfg.out)
    if folder.resolve() in [path.resolve() for path in (out, *(out / op for op in ops))]:
        raise InputError(f"--out {out} would write among the pictures of --images {folder}: "
                         "give another folder")
    files, refused = find_pictures(folder)
    if not files:
        raise InputError(f"--images {folder} holds no picture that can be damaged: "
                         f"{'; '.join(refused)}")
    names = output_names(files)
    rows = []
    for index, file in enumerate(progress(files, "pictures")):
        row = [read_picture(file)]
        for op in ops:
            if op == "concat":
                next_three = [files[(index + k) % len(files)] for k in (1, 2, 3)]
                four = [row[0], *map(read_picture, next_three)]
                mosaic = concat([to_tensor(image) for image in four]).permute(1, 2, 0).numpy()
                row.append(np.round(mosaic * 255).astype(np.uint8))
            else:
                gen = generator(cfg.seed, f"{index} {op} severity")
                severity = cfg.severity or int(torch.randint(1, 6, (), generator=gen))
                scale = None if cfg.scale else False
                row.append(perturb(row[0], op, severity, cfg.seed, index, scale))
            save_png(out / op / names[file], row[-1])
        if len(rows) < 12:
            rows.append(row)
    sheet = contact_sheet(["original", *ops], rows, [file.name for file in files])
    save_png(out / "contact.png", sheet)
    print(f"wrote {len(files)} x {len(ops)} pictures and contact.png to {out}")
    if refused:
        raise InputError(f"{len(refused)} pictures were left out: {'; '.join(refused)}")


if __name__ == "__main__":
    cli(main, Config)
