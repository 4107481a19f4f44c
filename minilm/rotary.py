"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) and the scalings that stretch it to longer texts.

Coordinate pair (i, i + Dh/2) of a query or key at position p is turned by the angle p * w_i, w_i = theta^(-2i/Dh), so a score q.k
depends on the distance of two tokens only. Long-context checkpoints change the frequencies w_i ("rope scaling"): `linear` slows all of
them, `llama3` only the slow ones, `yarn` (https://arxiv.org/abs/2309.00071) blends the two and sharpens the attention."""

import math

import torch

from minilm import InputError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def inverse_frequencies(head_dim: int, theta: float, scaling: dict | None) -> tuple[torch.Tensor, float]:
    """w_i in float32 [Dh/2], and the factor that multiplies cos and sin (1 except for yarn).

    `scaling` is the checkpoint's `rope_scaling` dictionary, with Hugging Face's keys. Raises InputError for a type that is not read."""
    w = 1.0 / theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    scaling = scaling or {"rope_type": "default"}
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind not in ROPE_TYPES:
        raise InputError(f"rope type {kind!r} is not read; minilm reads {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return w, 1.0
    try:
        return {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[kind](w, head_dim, theta, scaling)
    except KeyError as missing:
        raise InputError(f"rope_scaling of type {kind!r} needs the field {missing}") from None


def _linear(w, head_dim, theta, scaling):
    return w / scaling["factor"], 1.0


def _llama3(w, head_dim, theta, scaling):
    """Wavelengths below L/high stay, above L/low are stretched by `factor`, in between a linear blend (L = the original context length)."""
    turns = scaling["original_max_position_embeddings"] * w / (2 * math.pi)  # full turns within the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return w * keep + w / scaling["factor"] * (1 - keep), 1.0


def _yarn(w, head_dim, theta, scaling):
    """Dimensions that turn often (> beta_fast times) in the original context stay, those that turn rarely (< beta_slow) are stretched."""
    factor, length = scaling["factor"], scaling["original_max_position_embeddings"]
    dimension = lambda turns: head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))  # the i whose w_i turns so often
    first, last = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    stretch = ((torch.arange(head_dim // 2, device="cpu").float() - first) / max(last - first, 0.001)).clamp(0, 1)
    sharpen = lambda mscale=1.0: 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = sharpen(mscale) / sharpen(mscale_all) if mscale and mscale_all else sharpen()
    return w * (1 - stretch) + w / factor * stretch, attention_factor


class Rotary:
    """Makes the (cos, sin) tables of a set of positions. Holds no parameters and no buffers: its float32 frequencies must survive
    `model.to(torch.bfloat16)`, in which neighbouring positions would become equal."""

    def __init__(self, head_dim: int, theta: float, scaling: dict | None):
        self.frequencies, self.factor = inverse_frequencies(head_dim, theta, scaling)

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [B or 1, T] -> cos, sin, each [B or 1, 1, T, Dh]; the first half of sin is negated for `rotate`."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions[:, None, :, None].float() * self.frequencies  # [B, 1, T, Dh/2]
        cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns x [B, H, T, Dh]. With h = Dh/2: y[i] = x[i] cos - x[i+h] sin, y[i+h] = x[i+h] cos + x[i] sin (Eq. 34, paired as in Llama)."""
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
