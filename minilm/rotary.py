"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) and the scalings
that stretch it to longer texts.

Coordinate pair (i, i + Dh/2) of a query or key at position p is turned by the angle p * w_i, with
w_i = theta^(-2i/Dh), so a score q.k depends on the distance of two tokens only. Long-context
checkpoints change the frequencies w_i ("rope scaling"): `linear` slows all of them, `llama3` only
the slow ones, `yarn` (https://arxiv.org/abs/2309.00071) blends the two and sharpens the
attention."""

import math

import torch

from minilm import InputError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def inverse_frequencies(
    head_dim: int, theta: float, scaling: dict | None
) -> tuple[torch.Tensor, float]:
    """w_i in float32 [Dh/2], and the factor that multiplies cos and sin (1 except for yarn).

    `scaling` is the checkpoint's `rope_scaling` dictionary, with Hugging Face's keys. Raises
    InputError for a type that is not read."""
    scaling = scaling or {"rope_type": "default"}
    w = 1.0 / theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise InputError(f"rope type {kind!r} is not read; minilm reads {known}")
    try:
        if kind == "linear":
            return w / scaling["factor"], 1.0
        if kind == "llama3":
            return _llama3(w, scaling), 1.0
        if kind == "yarn":
            return _yarn(w, head_dim, theta, scaling)
    except KeyError as missing:
        message = f"rope_scaling of type {kind!r} needs the field {missing}"
        raise InputError(message) from None
    return w, 1.0


def _llama3(w: torch.Tensor, scaling: dict) -> torch.Tensor:
    """Wavelengths below L/high stay, above L/low are stretched by `factor`, in between a linear
    blend (L = the original context length)."""
    length = scaling["original_max_position_embeddings"]
    turns = length * w / (2 * math.pi)  # full turns within the original context
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return w * keep + w / scaling["factor"] * (1 - keep)


def _yarn(
    w: torch.Tensor, head_dim: int, theta: float, scaling: dict
) -> tuple[torch.Tensor, float]:
    """Dimensions that turn often (> beta_fast times) in the original context stay, those that turn
    rarely (< beta_slow) are stretched by `factor`."""
    factor = scaling["factor"]
    length = scaling["original_max_position_embeddings"]

    def dimension(turns):
        """The i whose w_i makes so many turns in the original context."""
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = dimension(scaling.get("beta_fast") or 32)
    last = dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, head_dim - 1)
    i = torch.arange(head_dim // 2, device="cpu").float()
    stretch = ((i - first) / max(last - first, 0.001)).clamp(0, 1)
    w = w * (1 - stretch) + w / factor * stretch

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale = scaling.get("mscale")
        mscale_all = scaling.get("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = _sharpness(factor, mscale) / _sharpness(factor, mscale_all)
        else:
            attention_factor = _sharpness(factor)
    return w, attention_factor


def _sharpness(factor: float, mscale: float = 1.0) -> float:
    """How much a text `factor` times as long sharpens the attention (yarn, Eq. 22: 0.1 ln(factor) +
    1)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class Rotary:
    """Makes the (cos, sin) tables of a set of positions. Holds no parameters and no buffers: its
    float32 frequencies must survive `model.to(torch.bfloat16)`, in which neighbouring positions
    would become equal."""

    def __init__(self, head_dim: int, theta: float, scaling: dict | None):
        self.frequencies, self.factor = inverse_frequencies(head_dim, theta, scaling)

    def __call__(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [B or 1, T] -> cos, sin, each [B or 1, 1, T, Dh]; the first half of sin is
        negated for `rotate`."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions[:, None, :, None].float() * self.frequencies  # (B, 1, T, Dh/2)
        cos = angles.cos() * self.factor
        sin = angles.sin() * self.factor
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns x [B, H, T, Dh] (Eq. 34, paired as in Llama). With h = Dh/2:

    y[i]   = x[i]   cos - x[i+h] sin
    y[i+h] = x[i+h] cos + x[i]   sin"""
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
