"""Damaged pictures: the corruptions of Hallu-PI and ImageNet-C (https://arxiv.org/abs/1903.12261) at severities 1 to 5, in torch.

    python vision_eval/perturb.py --images DIR --perturb noise,blur,fog,jpeg --out DIR      # a damaged copy of a folder, a contact sheet

Hallu-PI uses one operation of each family: gaussian noise, defocus blur, fog ("weather"), pixelate ("digital"); concatenation is
`concat`. Every picture has its own generator, made of (seed, index, operation, severity): results depend on no batch and no order.

x is [3, H, W] in [0, 1], every operation ends in a clip to [0, 1], and the tables hold one value per severity. Radii and shifts are pixels
of a picture of about 224 pixels; on smaller ones they shrink by `factor` = min(H, W) / 224 (scale=False: they do not, as in the original).
Deviations: frost is a synthetic texture, the original pastes photographs of ice; elastic is the variant without an affine warp.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minilm import InputError
from minilm.data import generator, write_atomically
from minilm.results import cli, progress

FAMILIES = {"noise": "gaussian_noise", "blur": "defocus_blur", "weather": "fog", "digital": "pixelate"}  # the paper's representatives


# --- parts

def uniform(shape, low, high, gen):
    return low + (high - low) * torch.rand(shape, generator=gen)


def correlate(x, kernel, border="reflect"):
    """Correlation of every channel with one odd kernel; `reflect` mirrors without repeating the edge."""
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
    return torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in x.shape[1:]), indexing="ij")


def centre_zoom(x, zoom):
    return sample(x, *((at - (n - 1) / 2) / zoom + (n - 1) / 2 for at, n in zip(pixels(x), x.shape[1:])))


def box(m, n):
    """[n, m]: averages m pixels to n, each weighted by its overlap with the new one."""
    edge, low = torch.arange(n + 1, dtype=torch.float64) * m / n, torch.arange(m, dtype=torch.float64)
    return ((torch.minimum(edge[1:, None], low + 1) - torch.maximum(edge[:-1, None], low)).clamp(min=0) * n / m).float()


def resize(x, H, W):
    """Area average (down, or up without smoothing)."""
    return box(x.shape[1], H) @ x @ box(x.shape[2], W).T


def streak(x, radius, sigma, degrees):
    """Motion: sum over taps i = 0 ... 2R of x shifted by i pixels along the angle, weights exp(-i^2 / 2 s^2) / their sum, edge repeated."""
    R = max(1, round(radius))
    weights = torch.exp(-(torch.arange(2 * R + 1) ** 2) / (2 * max(sigma, 0.3) ** 2))
    padded, (H, W), total = F.pad(x[None], (2 * R,) * 4, "replicate")[0], x.shape[1:], torch.zeros_like(x)
    for tap, weight in enumerate((weights / weights.sum()).tolist()):
        top, left = (2 * R + round(tap * turn(math.radians(degrees))) for turn in (math.sin, math.cos))
        total += weight * padded[:, top : top + H, left : left + W]
    return total


def plasma(H, W, decay, gen):
    """Diamond-square noise on a torus of power-of-two side, in [0, 1], cropped to [H, W]: at every level the centres of squares, then the
    middles of their sides, are the mean of their four neighbours plus a uniform value in +- amplitude^2; amplitude /= decay."""
    side = 2 ** math.ceil(math.log2(max(H, W, 2)))
    a, step, amplitude = torch.zeros(side, side), side, 100.0
    while step >= 2:
        half, corners = step // 2, a[::step, ::step]
        wobble = uniform((3, *corners.shape), -(amplitude**2), amplitude**2, gen)
        right, down = corners.roll(-1, 1), corners.roll(-1, 0)
        centres = (corners + right + down + down.roll(-1, 1)) / 4 + wobble[0]
        a[half::step, half::step] = centres
        a[::step, half::step] = (corners + right + centres + centres.roll(1, 0)) / 4 + wobble[1]
        a[half::step, ::step] = (corners + down + centres + centres.roll(1, 1)) / 4 + wobble[2]
        step, amplitude = half, amplitude / decay
    return ((a - a.min()) / (a.max() - a.min()))[:H, :W]


# --- operations: f(x, value of this severity, generator, factor)

def impulse_noise(x, p, gen, factor):
    u = torch.rand(x.shape, generator=gen)
    return torch.where(u < p, (u < p / 2).float(), x)


def defocus_blur(x, radius, gen, factor):
    """The disk of the radius, smoothed a little; a fractional radius is rasterised on a grid five times as fine."""
    alias, wide = (0.1 if radius == 3 else 0.5) * factor, 1 if radius <= 8 else 2
    r = min(radius * factor, min(x.shape[1:]) - 2 - wide)
    half, fine = math.ceil(r), 1 if r == int(r) else 5
    i = (torch.arange((2 * half + 1) * fine) + 0.5) / fine - 0.5 - half
    disk = ((i[:, None] ** 2 + i**2) <= r * r).float().view(2 * half + 1, fine, 2 * half + 1, fine).mean((1, 3))
    disk = F.pad(disk / disk.sum(), (wide,) * 4)
    kernel = correlate(disk[None], bell(alias, wide)[:, None] * bell(alias, wide), "constant")[0]
    return correlate(x, kernel / kernel.sum())


def zoom_blur(x, zooms, gen, factor):
    zooms = np.arange(1, zooms[0] + zooms[1] / 2, zooms[1])
    return (x + sum(centre_zoom(x, z) for z in zooms)) / (len(zooms) + 1)


def glass_blur(x, c, gen, factor):
    """Blur, then swap every pixel with a near one, one after the other, then blur."""
    sigma, shift, passes = c[0] * factor, max(1, round(c[1] * factor)), c[2]
    (H, W), x = x.shape[1:], smooth(x, sigma)
    order = [*range(H * W)]
    for _ in range(passes):
        moves = torch.randint(-shift, shift + 1, (2, H, W), generator=gen).tolist()
        for row in range(H - shift - 1, shift - 1, -1):
            for column in range(W - shift - 1, shift - 1, -1):
                here, there = row * W + column, (row + moves[0][row][column]) * W + column + moves[1][row][column]
                order[here], order[there] = order[there], order[here]
    return smooth(x.flatten(1)[:, order].view_as(x), sigma)


def fog(x, c, gen, factor):
    """(x + c P) m / (m + c), m = max(x), P = plasma: a constant picture of value v ends between v^2 / (v + c) and v."""
    m = x.max()
    return (x + c[0] * plasma(*x.shape[1:], c[1], gen)) * m / (m + c[0])


def frost(x, c, gen, factor):
    """a x + b texture; the texture: ridges of two plasmas, bluish white."""
    rough, fine = (1 - (2 * plasma(*x.shape[1:], decay, gen) - 1).abs() for decay in (1.7, 1.3))
    ridges = rough**2 * (0.5 + 0.5 * fine)
    return c[0] * x + c[1] * ridges * torch.tensor([0.85, 0.93, 1.0])[:, None, None]


def snow(x, c, gen, factor):
    mu, zoom, threshold, R, sigma, b = c
    flakes = centre_zoom(mu + 0.3 * torch.randn(1, *x.shape[1:], generator=gen), zoom)
    angle = uniform((), -135, -45, gen).item()
    flakes = streak(torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1), R * factor, sigma * factor, angle)
    gray = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    return b * x + (1 - b) * torch.maximum(x, 1.5 * gray + 0.5) + flakes + flakes.rot90(2, (1, 2))


def brightness(x, c, gen, factor):
    """HSV value + c: hue and saturation stay, all channels grow by one factor; black becomes grey."""
    value = x.amax(0, keepdim=True)
    return torch.where(value > 0, x * (value + c).clamp(max=1) / value.clamp(min=1e-6), x + c)


def jpeg(x, quality, gen, factor):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).float() / 255


def pixelate(x, f, gen, factor):
    """Box average to int(side f) pixels, each then shown as a block."""
    small = resize(x, *(int(n * f) for n in x.shape[1:]))  # (at least 2: `apply` refuses tiny pictures)
    rows, columns = (((torch.arange(n) + 0.5) * m / n).long() for n, m in zip(x.shape[1:], small.shape[1:]))
    return small[:, rows][:, :, columns]


def elastic(x, a, gen, factor):
    H, W = x.shape[1:]
    taps = [bell(0.01 * n, int(3 * 0.01 * n + 0.5)) for n in (H, W)]
    shift = correlate(correlate(uniform((2, H, W), -0.005 * H, 0.005 * H, gen), taps[0][:, None]), taps[1][None])
    return sample(x, *(at + a * factor * moved for at, moved in zip(pixels(x), shift)), "reflection")


OPS = {
    "gaussian_noise": (lambda x, s, gen, factor: x + s * torch.randn(x.shape, generator=gen), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (lambda x, c, gen, factor: torch.poisson(x * c, generator=gen) / c, (60, 25, 12, 5, 3)),
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": (lambda x, s, gen, factor: x + x * s * torch.randn(x.shape, generator=gen), (0.15, 0.2, 0.35, 0.45, 0.6)),
    "defocus_blur": (defocus_blur, (3, 4, 6, 8, 10)),
    "gaussian_blur": (lambda x, s, gen, factor: smooth(x, s * factor), (1, 2, 3, 4, 6)),
    "zoom_blur": (zoom_blur, ((1.1, 0.01), (1.15, 0.01), (1.2, 0.02), (1.24, 0.02), (1.3, 0.03))),
    "motion_blur": (lambda x, c, gen, factor: streak(x, c[0] * factor, c[1] * factor, uniform((), -45, 45, gen).item()),
                    ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "glass_blur": (glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "fog": (fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "frost": (frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "snow": (snow, ((0.1, 3, 0.5, 10, 4, 0.8), (0.2, 2, 0.5, 12, 4, 0.7), (0.55, 4, 0.9, 12, 8, 0.7), (0.55, 4.5, 0.85, 12, 8, 0.65),
                    (0.55, 2.5, 0.85, 12, 12, 0.55))),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (lambda x, k, gen, factor: x.mean((1, 2), keepdim=True).lerp(x, k), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "jpeg": (jpeg, (25, 18, 15, 10, 7)),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "elastic": (elastic, (12.5, 16.25, 21.25, 25, 30)),
}


# --- what others call

def apply(x: torch.Tensor, op: str, severity: int, gen: torch.Generator, scale: bool | None = None) -> torch.Tensor:
    """The operation on x [3, H, W] in [0, 1]. `scale`: shrink radii on small pictures (None: below 224 pixels)."""
    if (op := FAMILIES.get(op, op)) not in OPS:
        raise InputError(f"perturbation {op!r} is not known; give some of {', '.join((*FAMILIES, *OPS))}")
    if isinstance(severity, bool) or not isinstance(severity, (int, np.integer)) or not 1 <= severity <= 5:
        raise InputError(f"severity {severity!r} must be a whole number from 1 to 5")
    side = min(x.shape[1:])
    if side < 8:
        raise InputError(f"a picture of {x.shape[1]} x {x.shape[2]} pixels is too small to be damaged: give at least 8 x 8")
    factor, (f, values) = side / 224 if (side < 224 if scale is None else scale) else 1.0, OPS[op]
    return f(x, values[severity - 1], gen, factor).clamp(0, 1)


def perturb(image: np.ndarray, op: str, severity: int, seed: int = 0, index: int = 0, scale: bool | None = None) -> np.ndarray:
    """A damaged copy of an image [H, W, 3], uint8 or float in [0, 1]; `index` is its place in the set. The type stays the same."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or not (image.dtype == np.uint8 or np.issubdtype(image.dtype, np.floating)):
        raise InputError(f"an image must be [H, W, 3], uint8 or float in [0, 1]; this one is {image.dtype} {image.shape}")
    if image.dtype != np.uint8 and not (image.min() >= 0 and image.max() <= 1):  # (also refuses NaN)
        raise InputError(f"a float image must lie in [0, 1]; this one goes from {image.min():.3g} to {image.max():.3g}: divide by 255?")
    x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / (255 if image.dtype == np.uint8 else 1)
    y = apply(x, op, severity, generator(seed, f"{index} {FAMILIES.get(op, op)} {severity}"), scale).permute(1, 2, 0).numpy()
    return np.round(y * 255).astype(np.uint8) if image.dtype == np.uint8 else y.astype(image.dtype)


def concat(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Four pictures [3, H, W], top-left, top-right, bottom-left, bottom-right -> one 2 x 2 mosaic of the first one's size: each is brought
    to that size, all are glued, the whole is area-averaged back. What makes it hard is the size: each keeps a quarter of its pixels."""
    if len(images) != 4:
        raise InputError(f"a mosaic needs four pictures, got {len(images)}")
    H, W = images[0].shape[1:]
    a, b, c, d = (resize(image, H, W) for image in images)
    return resize(torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1), H, W)


# --- a folder

@dataclass(frozen=True)
class Config:
    images: str  # folder of .png, .jpg pictures
    out: str  # folder for OPERATION/NAME.png and contact.png
    perturb: str = "noise,blur,weather,digital"  # operations or families, with commas; concat is known too
    severity: int = 0  # 1 to 5; 0: a random one for each picture
    seed: int = 0  # of all draws
    scale: bool = True  # shrink radii on pictures below 224 pixels


def main(cfg: Config) -> None:
    from PIL import Image

    files = sorted(f for f in Path(cfg.images).glob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise FileNotFoundError(f"--images {cfg.images} holds no .png or .jpg picture")
    ops = [FAMILIES.get(op, op) for op in cfg.perturb.split(",")]
    if wrong := sorted(set(ops) - {*OPS, "concat"}):
        raise InputError(f"--perturb {','.join(wrong)} is not known; give some of {', '.join((*FAMILIES, *OPS, 'concat'))}")
    def save(path, image):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda to: Image.fromarray(image).save(to, "PNG"))

    read = lambda i: np.array(Image.open(files[i % len(files)]).convert("RGB"))
    rows = []
    for index, file in enumerate(progress(files, "pictures")):
        row = [read(index)]
        for op in ops:
            if op == "concat":
                four = [torch.from_numpy(read(index + k)).permute(2, 0, 1).float() / 255 for k in range(4)]
                row.append(np.round(concat(four).permute(1, 2, 0).numpy() * 255).astype(np.uint8))
            else:
                drawn = int(torch.randint(1, 6, (), generator=generator(cfg.seed, f"{index} {op} severity")))
                row.append(perturb(row[0], op, cfg.severity or drawn, cfg.seed, index, None if cfg.scale else False))
            save(Path(cfg.out) / op / f"{file.stem}.png", row[-1])
        if len(rows) < 12:
            rows.append(np.hstack([np.array(Image.fromarray(image).resize((160, 160))) for image in row]))
    save(Path(cfg.out) / "contact.png", np.vstack(rows))
    print(f"wrote {len(files)} x {len(ops)} pictures and contact.png ({', '.join(['original', *ops])}) to {cfg.out}")


if __name__ == "__main__":
    cli(main, Config)
