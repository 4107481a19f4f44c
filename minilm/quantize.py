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
twin runs where there is no such product: on a GPU, which gains memory by it and no speed."""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from minilm import InputError
from minilm.transformer import MLP, Transformer
from minilm.weights import find_checkpoint, load_pretrained

GROUP = 32  # weights that share a scale and a zero
ROWS = 16  # torch's product of 4 bits takes rows in multiples of it
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
        if PRODUCT8 is None or not x.is_cpu:
            return self.plain(x)
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y = PRODUCT8(rows, self.q, self.scale)
        y = y.view(*x.shape[:-1], self.out_features).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def plain(self, x):
        y = F.linear(x, self.q.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias

    @staticmethod
    def concatenated(layers: list["Linear8"]) -> "Linear8":
        q = torch.cat([layer.q for layer in layers])
        scale = torch.cat([layer.scale for layer in layers])
        return Linear8(q, scale, _biases(layers))


class Linear4(nn.Module):
    """y = x W^T + bias with W = scale (q - 8) + zero in groups; q in 0..15 [out, in], scale and
    zero [out, in / GROUP]. `pack` puts q, two to a byte, into the order that torch's product wants
    on this CPU; before, and elsewhere, the plain twin runs."""

    def __init__(self, q, scale, zero, bias=None):
        super().__init__()
        self.out_features = len(q)
        self.packed = False
        self.register_buffer("q", q.to(torch.uint8))
        self.register_buffer("scale_zero", torch.stack((scale, zero), -1).bfloat16())
        self.bias = bias

    def forward(self, x):
        if not self.packed:
            return self.plain(x)
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y = PRODUCT4(rows, self.q, GROUP, self.scale_zero)
        y = y.view(*x.shape[:-1], self.out_features).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def plain(self, x):
        return F.linear(x, self.weights().to(x.dtype), self.bias)

    def weights(self):
        """W [out, in] in float32, of a layer that is not packed."""
        groups = self.q.view(len(self.q), -1, GROUP).float()
        scale, zero = self.scale_zero.float()[..., None, :].unbind(-1)  # (out, in / GROUP, 1)
        return ((groups - 8) * scale + zero).flatten(1)

    def pack(self):
        if PRODUCT4 is not None and self.q.is_cpu and not self.packed:
            self.q = torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.q.int(), 2)
            self.scale_zero = self.scale_zero.transpose(0, 1).contiguous()  # (in / GROUP, out, 2)
            self.packed = True
        return self

    @staticmethod
    def concatenated(layers: list["Linear4"]) -> "Linear4":
        q = torch.cat([layer.q for layer in layers])
        scale, zero = torch.cat([layer.scale_zero for layer in layers]).unbind(-1)
        return Linear4(q, scale, zero, _biases(layers))


def _biases(layers: list):
    return None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])


# --- from weights to integers


def round_to_8_bits(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w [out, in] -> q int8 [out, in], scale [out]; off by half a step, scale / 2, at most."""
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
