"""Augmentations of a signal z = I + jQ that leave its modulation as it is:

z -> roll(z or conj z, shift) exp(j phase)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Twist(NamedTuple):
    """One augmentation for each group of signals."""

    phase: torch.Tensor  # [groups], radian
    shift: torch.Tensor  # [groups], samples
    conj: torch.Tensor  # [groups], +1 or -1


def draw_twist(groups: int, kinds: Sequence[str], length: int, gen: torch.Generator) -> Twist:
    """One for each of so many groups. kinds: phase (any carrier phase), shift (circular), conj
    (Q -> -Q with probability 1/2: upper and lower sideband change places)."""
    phase, shift, conj = torch.rand(3, groups, generator=gen)
    return Twist(
        2 * torch.pi * phase * ("phase" in kinds),
        (length * shift * ("shift" in kinds)).long(),
        1 - 2.0 * ((conj < 0.5) & ("conj" in kinds)),
    )


def augment(x: torch.Tensor, twist: Twist) -> torch.Tensor:
    """x [groups * B, 2, N], group by group."""
    each = len(x) // len(twist.phase)  # signals of a group
    phase, shift, conj = (t.repeat_interleave(each).to(x.device) for t in twist)
    i = x[:, 0]
    q = x[:, 1] * conj[:, None]
    cos = phase.cos()[:, None]
    sin = phase.sin()[:, None]
    x = torch.stack([i * cos - q * sin, i * sin + q * cos], 1)  # (B, 2, N)
    place = torch.arange(x.shape[2], device=x.device)
    index = (place - shift[:, None]) % x.shape[2]
    return x.gather(2, index[:, None].expand_as(x))
