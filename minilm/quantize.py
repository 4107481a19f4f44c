"""Weights of 8 and 4 bits, for inference: a layer keeps small integers and multiplies by them.

    model, tokenizer = load_quantized("FILE.gguf", bits=4)      # or a folder: quantised here
    model = quantize(model, bits=8)                             # any model, in place

Decoding one token reads every weight once and does two operations with it, so it takes as long as the
reading: a weight of 4 bits instead of 32 is an eighth of the time. What stands for a weight w:

    8 bits  w = s q         q in -127..127   one scale s per row: the row's largest |w| / 127
    4 bits  w = s (q-8) + z q in 0..15       scale s and zero z per group of 32 neighbours in a row

The 8-bit form is symmetric: q = 0 is w = 0. With 16 steps only, that would waste those on the side
where a group has no weights; the zero z moves the steps to where they are (s (0-8) + z is the group's
smallest weight, s (15-8) + z its largest). A scale and a zero of 16 bits for 32 weights are one more
bit a weight. The blocks of a GGUF file are of this form: Q4_0 is w = d (q-8), so s = d, z = 0; Q4_1 is
w = d q + m, so s = d, z = m + 8 d: such a file's integers are used as they are (minilm/gguf.py).

The products are torch's own, which torchao and gpt-fast use. They exist on CPUs and take bfloat16.
Their names begin with an underscore, so a plain twin stands beside each (unpack, then multiply); it
runs where they do not: on a GPU."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from minilm import InputError
from minilm.weights import find_checkpoint, load_pretrained

GROUP = 32  # weights that share a scale and a zero
ROWS = 16  # torch's products take rows in multiples of it


class Linear8(nn.Module):
    """y = x W^T + bias with W = scale q, q int8 [out, in], scale [out]."""

    def __init__(self, q, scale, bias=None):
        super().__init__()
        self.register_buffer("q", q)
        self.register_buffer("scale", scale.bfloat16())
        self.bias = bias

    def forward(self, x):
        if x.is_cuda:
            y = self.plain(x)
        else:
            rows = x.reshape(-1, x.shape[-1]).bfloat16()
            y = torch.ops.aten._weight_int8pack_mm(rows, self.q, self.scale)
            y = y.view(*x.shape[:-1], len(self.q)).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def plain(self, x):
        return F.linear(x, self.q.to(x.dtype)) * self.scale.to(x.dtype)


class Linear4(nn.Module):
    """y = x W^T + bias with W = scale (q - 8) + zero per group, q in 0..15 [out, in], scale and zero
    [out, in / GROUP]. Kept as torch packs it on this kind of CPU, else two to a byte."""

    def __init__(self, q, scale, zero, bias=None, packed: bool = True):
        super().__init__()
        self.out = len(q)
        self.packed = packed and q.device.type == "cpu"
        if self.packed:
            q = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 2)
        else:
            q = (q[:, 0::2] | q[:, 1::2] << 4).to(torch.uint8)
        self.register_buffer("q", q)
        pairs = torch.stack((scale.T, zero.T), -1)  # (in / GROUP, out, 2)
        self.register_buffer("scale_and_zero", pairs.bfloat16().contiguous())
        self.bias = bias

    def forward(self, x):
        if self.packed:
            rows = x.reshape(-1, x.shape[-1]).bfloat16()
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.q, GROUP, self.scale_and_zero)
            y = y.view(*x.shape[:-1], self.out).to(x.dtype)
        else:
            y = F.linear(x, self.unpack().to(x.dtype))
        return y if self.bias is None else y + self.bias

    def unpack(self):
        """The weights [out, in] in float32."""
        q = torch.stack((self.q & 15, self.q >> 4), -1)  # (out, in / 2, 2)
        scale, zero = self.scale_and_zero.float().transpose(0, 1)[..., None].unbind(2)
        groups = q.view(len(q), -1, GROUP).float()  # (out, in / GROUP, GROUP)
        return ((groups - 8) * scale + zero).flatten(1)


# --- from weights to integers


def round_to_8_bits(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w [out, in] -> q int8 [out, in], scale [out]. The error is at most half a step, scale / 2."""
    scale = w.float().abs().amax(1).clamp(min=1e-12) / 127
    return (w / scale[:, None]).round().to(torch.int8), scale


def round_to_4_bits(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w [out, in] -> q uint8 in 0..15 [out, in], scale and zero [out, in / GROUP]."""
    groups = w.float().view(len(w), -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-12)
    q = ((groups - low[..., None]) / scale[..., None]).round()
    return q.to(torch.uint8).flatten(1), scale, low + 8 * scale


def fits(out: int, in_: int) -> bool:
    return out % ROWS == 0 and in_ % GROUP == 0


@torch.no_grad()
def quantize(model: nn.Module, bits: int, head_bits: int = 8) -> nn.Module:
    """Replaces the model's linear layers, in place, by layers of 4 or 8 bits a weight; the head, whose
    errors go straight to the logits, has 8. Embedding, norms and routers stay, and so does a matrix
    whose sides do not fit (rows of 16, columns of 32). For inference only: nothing can be trained, and
    save_pretrained refuses the result. Returns the model."""
    if bits not in (4, 8) or head_bits not in (4, 8):
        raise InputError(f"{bits} bits, {head_bits} in the head: give 4 or 8")
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and fits(*layer.weight.shape):
                n = head_bits if name == "lm_head" else bits
                new = Linear8(*round_to_8_bits(layer.weight), layer.bias) if n == 8 else (
                    Linear4(*round_to_4_bits(layer.weight), layer.bias))
                setattr(parent, name, new)
    return model.eval().requires_grad_(False)


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
