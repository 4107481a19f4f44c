"""Weights of 8 and 4 bits, for inference: a layer keeps small integers and multiplies by them.

    model, tokenizer = load_quantized("FILE.gguf", bits=4)      # or a folder: rounded here
    model = quantize(model, bits=8)                             # any Transformer, in place

Decoding one token reads every weight once and does two operations with it, so it takes as long as
the reading: a weight of 4 bits in place of 32 takes an eighth. What stands for a weight w:

    8 bits   w = s q           q in -127..127   a scale s per row: its largest |w| / 127
    4 bits   w = s (q-8) + z   q in 0..15       a scale s and a zero z per 32 neighbours in a row

The first form is symmetric: q = 0 is w = 0. With 16 steps that would waste those on the side where
a group has no weights, so the zero z moves them: s (0-8) + z is the group's smallest weight,
s (15-8) + z its largest. Scale and zero, 16 bits each for 32 weights, are one more bit a weight.
The blocks of a GGUF file are of this form (minilm/gguf.py), and are used as they are.

The products are torch's own, which torchao and gpt-fast use: for CPUs, fast with bfloat16 inputs.
Their names begin with an underscore, so a plain twin stands beside each: unpack, then multiply. The
twin takes over where there is no such product (on a GPU, which gains memory by it and no speed),
and for the many rows of a prompt, where it is faster."""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from minilm import InputError
from minilm.data import find_checkpoint
from minilm.transformer import MLP, Transformer
from minilm.weights import load_pretrained

GROUP = 32  # weights that share a scale and a zero
ROWS = 16  # torch's product of 4 bits takes rows in multiples of it
MANY8, MANY4 = 16, 64  # rows from which on unpacking and multiplying plainly is faster
PRODUCT8 = getattr(torch.ops.aten, "_weight_int8pack_mm", None)
PRODUCT4 = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)


# --- layers


class Linear8(nn.Module):
    """y = x W^T + bias with W = scale q; q int8 [out, in], scale [out]."""

    def __init__(self, q, scale, bias=None):
        super().__init__()
        self.out_features = len(q)
        self.register_buffer("q", q)
        self.register_buffer("scale", scale.bfloat16())
        self.bias = bias

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        if PRODUCT8 is None or not x.is_cpu:
            y = self.plain(rows)
        elif len(rows) < MANY8:
            y = PRODUCT8(rows.bfloat16(), self.q, self.scale)
        else:
            y = self.plain(rows.bfloat16())
        y = y.view(*x.shape[:-1], self.out_features).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def plain(self, rows):
        return F.linear(rows, self.q.to(rows.dtype)) * self.scale.to(rows.dtype)

    @staticmethod
    def concatenated(layers: list["Linear8"]) -> "Linear8":
        q = torch.cat([layer.q for layer in layers])
        scale = torch.cat([layer.scale for layer in layers])
        return Linear8(q, scale, _biases(layers))


class Linear4(nn.Module):
    """y = x W^T + bias with W = scale (q - 8) + zero in groups; q in 0..15 [out, in], scale and
    zero [out, in / GROUP]. Two q are a byte: the first half of a group low, the second high.

    `pack` adds a copy of q in the order that torch's product wants on this CPU. So a weight takes 9
    bits, and decoding reads 5 of them; a prompt's many rows are worth unpacking the other 5 for."""

    def __init__(self, q, scale, zero, bias=None):
        super().__init__()
        self.out_features = len(q)
        halves = q.to(torch.uint8).view(len(q), -1, 2, GROUP // 2)  # (out, groups, 2, GROUP / 2)
        first, second = halves.unbind(2)
        self.register_buffer("q", first | second << 4)  # (out, in / GROUP, GROUP / 2)
        pairs = torch.stack((scale.T, zero.T), -1)  # (in / GROUP, out, 2), as torch wants it
        self.register_buffer("scale_zero", pairs.bfloat16().contiguous())
        self.packed = None
        self.bias = bias

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        if self.packed is None:
            y = self.plain(rows)
        elif len(rows) < MANY4:
            y = PRODUCT4(rows.bfloat16(), self.packed, GROUP, self.scale_zero)
        else:
            y = self.plain(rows.bfloat16())
        y = y.view(*x.shape[:-1], self.out_features).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def plain(self, rows):
        return F.linear(rows, self.weights(rows.dtype))

    def weights(self, dtype=torch.float32):
        """W [out, in]."""
        pairs = self.scale_zero.transpose(0, 1)[..., None, :]  # (out, in / GROUP, 1, 2)
        scale, zero = pairs.float().unbind(-1)
        start = zero - 8 * scale  # of q = 0; (out, in / GROUP, 1)
        q = self.integers().to(dtype)
        return q.mul_(scale.to(dtype)).add_(start.to(dtype)).flatten(1)

    def integers(self):
        return torch.cat((self.q & 15, self.q >> 4), -1)  # (out, in / GROUP, GROUP)

    def pack(self):
        if PRODUCT4 is not None and self.q.is_cpu:
            q = self.integers().flatten(1).int()
            self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 2)
        return self

    @staticmethod
    def concatenated(layers: list["Linear4"]) -> "Linear4":
        q = torch.cat([layer.integers().flatten(1) for layer in layers])
        pairs = torch.cat([layer.scale_zero for layer in layers], 1)
        scale, zero = pairs.transpose(0, 1).unbind(-1)
        return Linear4(q, scale, zero, _biases(layers))


def _biases(layers: list):
    return None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])


# --- from weights to integers


def round_to_8_bits(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w [out, in] -> q int8 [out, in], scale [out]; off by half a step, scale / 2, at most."""
    largest = w.float().abs().amax(1).clamp(min=1e-12)  # (out,)
    scale = (largest / 127).bfloat16().float()  # as it is kept
    q = (w / scale[:, None]).round().clamp(-127, 127)
    return q.to(torch.int8), scale


def round_to_4_bits(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w [out, in] -> q uint8 in 0..15 [out, in], scale and zero [out, in / GROUP]."""
    groups = w.float().view(len(w), -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-12).bfloat16().float()  # as they are kept
    zero = (low + 8 * scale).bfloat16().float()
    steps = (groups - zero[..., None]) / scale[..., None]
    q = (steps + 8).round().clamp(0, 15)
    return q.to(torch.uint8).flatten(1), scale, zero


def fits(out: int, in_: int) -> bool:
    return out % ROWS == 0 and in_ % GROUP == 0


@torch.no_grad()
def quantize(model: Transformer, bits: int, head_bits: int = 8) -> Transformer:
    """Replaces the model's linear layers, in place, by layers of 4 or 8 bits a weight, and fuses
    them (see Transformer.fuse). The head, whose errors go straight to the logits, keeps 8. The
    embedding, norms, routers, and matrices whose sides do not fit (rows of 16, columns of 32), stay
    as they are. For inference only: nothing can be trained or saved any more. Returns the model."""
    if bits not in (4, 8) or head_bits not in (4, 8):
        raise InputError(f"{bits} bits, {head_bits} in the head: give 4 or 8")
    if not model.embed.weight.is_cpu:
        warnings.warn("weights of few bits are unpacked for every product here: this saves memory, "
                      "but no time", stacklevel=2)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and fits(*layer.weight.shape):
                n = head_bits if name == "lm_head" else bits
                setattr(parent, name, _rounded(layer, n))
    for layer in model.layers:
        heads = layer.self_attn
        if _alike(heads.q_proj, heads.k_proj, heads.v_proj):
            heads.fuse()
        if isinstance(layer.mlp, MLP) and _alike(layer.mlp.gate_proj, layer.mlp.up_proj):
            layer.mlp.fuse()
    for layer in model.modules():
        if isinstance(layer, Linear4):
            layer.pack()
    return model.eval().requires_grad_(False)


def _rounded(layer: nn.Linear, bits: int) -> nn.Module:
    if bits == 8:
        return Linear8(*round_to_8_bits(layer.weight), layer.bias)
    return Linear4(*round_to_4_bits(layer.weight), layer.bias)


def _alike(*layers: nn.Module) -> bool:
    return len({type(layer) for layer in layers}) == 1


def load_quantized(checkpoint: str | Path, bits: int, dtype=torch.bfloat16, device="cpu"):
    """load_pretrained, then `quantize`; with 4 bits, a .gguf file's own blocks of 4 bits are kept.
    `dtype` is that of everything else: embedding, norms, activations, cache."""
    path = find_checkpoint(checkpoint)
    if bits == 4 and path.suffix == ".gguf":
        from minilm.gguf import load_gguf  # needs the extra `gguf`

        model, tokenizer = load_gguf(path, dtype, device, keep_four_bits=True)
    else:
        model, tokenizer = load_pretrained(path, dtype, device)
    return quantize(model, bits), tokenizer
