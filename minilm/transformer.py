"""A decoder-only transformer: the one model under all ten papers, and the same model that real
checkpoints load into.

    h = embed(ids)
    for each block:  h = h + Attention(RMSNorm(h));  h = h + MLP(RMSNorm(h))
    logits = lm_head(RMSNorm(h))

Shapes, here and in every file: B batch, T tokens per sequence, S tokens a query can see (cached +
T), V vocabulary, D model width, L layers, H query heads, G key/value heads, Dh head width, F
feed-forward width, E experts, K experts per token, N = B*T tokens flattened.

Parameter names and configuration fields are Hugging Face's (without the prefix `model.`, and
`embed` for `embed_tokens`), so that `weights.py` needs almost no table. The `if`s below follow
fields of a checkpoint's config.json, nothing else. From top to bottom: configuration, cache, norm,
attention, MLP, block, model."""

import math
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minilm import InputError
from minilm.moe import MoE
from minilm.ops import Linear, rms_norm
from minilm.rotary import Rotary, rotate


@dataclass
class Config:
    """Shape of a model; the fields are the keys of a Hugging Face config.json. `model_type` names
    the family and with it the four details that families do not spell out: which projections have a
    bias, whether queries and keys are normalised, what the mixture's files call its parts, which
    layers look through a sliding window."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 688
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None  # fewer: grouped-query attention; None: as many
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    model_type: str = "qwen3"
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None  # a query reads itself and this many - 1 before it
    layer_types: list[str] | None = None  # per layer full_ or sliding_attention; None: alike
    initializer_range: float = 0.02
    num_experts: int = 0  # 0: every layer has one ordinary MLP
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True  # divide the K chosen router probabilities by their sum
    moe_intermediate_size: int | None = None  # width of one expert; None: intermediate_size
    shared_expert_intermediate_size: int = 0  # > 0: an expert for every token (Qwen2-MoE)
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] = field(default_factory=list)
    router_aux_loss_coef: float = 0.001

    def __post_init__(self):
        self._check_numbers()
        H = self.num_attention_heads
        types = self.layer_types
        if types is not None:
            L = self.num_hidden_layers
            if len(types) != L or not set(types) <= {"full_attention", "sliding_attention"}:
                raise InputError(f"layer_types {types}: give each of the {L} layers "
                                 "full_attention or sliding_attention")
        self.num_key_value_heads = self.num_key_value_heads or H
        if self.head_dim is None and self.hidden_size % H:
            raise InputError(f"hidden_size {self.hidden_size} is not divisible by "
                             f"num_attention_heads {H}: change one, or set head_dim")
        self.head_dim = self.head_dim or self.hidden_size // H
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} must be even: "
                             "rotary embedding turns pairs of coordinates")
        if H % self.num_key_value_heads:
            raise InputError(f"num_attention_heads {H} must be a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.num_experts:
            self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
            if self.num_experts_per_tok > self.num_experts:
                raise InputError(f"num_experts_per_tok {self.num_experts_per_tok} must lie between "
                                 f"1 and num_experts {self.num_experts}")

    def _check_numbers(self):
        may_be_zero = ("num_experts", "shared_expert_intermediate_size")
        for f in fields(self):
            value = getattr(self, f.name)
            whole = f.type in (int, int | None)
            if value is None or not (whole or f.type is float):
                continue
            least = 1 if whole and f.name not in may_be_zero else 0
            if not isinstance(value, int if whole else (int, float)) or value < least:
                kind = "whole number" if whole else "number"
                raise InputError(f"{f.name} {value!r} must be a {kind} of at least {least}")

    @property
    def qk_norm(self) -> str | None:
        """"head": each head's queries and keys are normalised alone; "all": over all heads
        together; None: not at all."""
        return {"qwen3": "head", "qwen3_moe": "head", "olmoe": "all"}.get(self.model_type)

    def window(self, layer: int) -> int | None:
        if self.layer_types and self.layer_types[layer] != "sliding_attention":
            return None
        return self.sliding_window

    def has_experts(self, layer: int) -> bool:
        if self.num_experts == 0 or layer in self.mlp_only_layers:
            return False
        return (layer + 1) % self.decoder_sparse_step == 0


class Output(NamedTuple):
    logits: torch.Tensor  # [B, T, V]
    # L + 1 tensors [B, T, D]: [i] enters block i, [L] leaves the last one, before the norm
    hidden_states: list[torch.Tensor] | None = None
    # per MoE layer [B, T, E], before the softmax
    router_logits: list[torch.Tensor] | None = None


class LayerCache:
    """Keys and values that one layer has computed so far, in a buffer that doubles when it is full.
    For inference (no gradients); a cache that was begun under inference_mode is continued under
    it."""

    def __init__(self):
        self.length = 0
        self.keys = self.values = None  # [B, G, capacity, Dh]

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds k, v [B, G, T, Dh]; returns all keys and values so far [B, G, S, Dh]."""
        start, end = self.length, self.length + k.shape[2]
        if self.keys is None or end > self.keys.shape[2]:
            self.keys = self._grown(self.keys, k, end)
            self.values = self._grown(self.values, v, end)
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grown(self, old, new, end):
        B, G, _, Dh = new.shape
        buffer = new.new_empty(B, G, max(64, 2 * end), Dh)
        if self.length:
            buffer[:, :, : self.length] = old[:, :, : self.length]
        return buffer


def concatenated(linears: list[Linear]) -> Linear:
    """One layer for several that read the same input: its output is theirs side by side."""
    first = linears[0]
    if not isinstance(first, Linear):  # of integers, see quantize.py
        return first.concatenated(linears)
    weight = torch.cat([m.weight for m in linears])
    with torch.device("meta"):  # the weights come below
        one = Linear(first.in_features, len(weight), bias=first.bias is not None)
    one.weight = nn.Parameter(weight, requires_grad=False)
    if first.bias is not None:
        one.bias = nn.Parameter(torch.cat([m.bias for m in linears]), requires_grad=False)
    return one


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang & Sennrich 2019,
    https://arxiv.org/abs/1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(Dh)) v with rotary positions; G <= H key/value heads are shared by
    groups of H/G query heads."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.head_dim = c.head_dim
        self.qk_norm = c.qk_norm
        self.window = c.window(layer)
        self.qkv_proj = None  # `fuse` puts one matrix here
        D, Dh = c.hidden_size, c.head_dim
        queries, keys = c.num_attention_heads * Dh, c.num_key_value_heads * Dh
        # Qwen2: always a bias on q, k and v, never on the output
        qwen2 = c.model_type in ("qwen2", "qwen2_moe")
        qkv_bias = qwen2 or c.attention_bias
        self.q_proj = Linear(D, queries, bias=qkv_bias)
        self.k_proj = Linear(D, keys, bias=qkv_bias)
        self.v_proj = Linear(D, keys, bias=qkv_bias)
        self.o_proj = Linear(queries, D, bias=c.attention_bias and not qwen2)
        if c.qk_norm:
            per_head = c.qk_norm == "head"
            self.q_norm = RMSNorm(Dh if per_head else queries, c.rms_norm_eps)
            self.k_norm = RMSNorm(Dh if per_head else keys, c.rms_norm_eps)

    def heads(self, x, rotary):
        """x [B, T, D] -> queries [B, H, T, Dh], keys and values [B, G, T, Dh]; queries and keys
        turned."""
        B, T, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in (q, k, v))  # (B, T, H or G, Dh)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H or G, T, Dh)
        return rotate(q, rotary), rotate(k, rotary), v

    def fuse(self):
        """For inference: one matrix [(H + 2 G) Dh, D] in place of three. See Transformer.fuse."""
        self.qkv_proj = concatenated([self.q_proj, self.k_proj, self.v_proj])
        H, G = (p.out_features // self.head_dim for p in (self.q_proj, self.k_proj))
        self.heads_of = H, G
        del self.q_proj, self.k_proj, self.v_proj
        if self.qk_norm == "head":
            weight = (self.q_norm.weight.expand(H, -1), self.k_norm.weight.expand(G, -1))
            self.qk_norm_weight = nn.Parameter(torch.cat(weight))  # (H + G, Dh)

    def fused_heads(self, x, rotary):
        """The same as `heads` with what is alike done at once: one product; one norm and one
        rotation of queries and keys together, as of H + G heads."""
        B, T, _ = x.shape
        H, G = self.heads_of
        y = self.qkv_proj(x).view(B, T, H + 2 * G, self.head_dim)
        qk, v = y.split((H + G, G), dim=2)
        if self.qk_norm == "head":
            qk = rms_norm(qk, self.qk_norm_weight, self.q_norm.eps)
        elif self.qk_norm == "all":
            q, k = qk.flatten(2).split((H * self.head_dim, G * self.head_dim), -1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), -1).view(qk.shape)
        qk = rotate(qk.transpose(1, 2), rotary)
        q, k = qk.split((H, G), dim=1)
        return q, k, v.transpose(1, 2)

    def forward(self, x, rotary, mask, cache: LayerCache | None = None):
        B, T, _ = x.shape
        q, k, v = self.heads(x, rotary) if self.qkv_proj is None else self.fused_heads(x, rotary)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, G, S, Dh)

        allowed = mask[self.window]
        # No mask means causal. With one query and a cache `is_causal` must stay off: it would show
        # that query the first key only.
        causal = allowed is None and T > 1
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=causal, enable_gqa=grouped
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, D: int, F: int, bias: bool = False):
        super().__init__()
        self.gate_proj = Linear(D, F, bias)
        self.up_proj = Linear(D, F, bias)
        self.down_proj = Linear(F, D, bias)
        self.gate_up_proj = None  # `fuse` puts one matrix here

    def forward(self, x):
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)

    def fuse(self):
        """For inference: one matrix [2 F, D] in place of two. See Transformer.fuse."""
        self.gate_up_proj = concatenated([self.gate_proj, self.up_proj])
        del self.gate_proj, self.up_proj


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        D = c.hidden_size
        self.input_layernorm = RMSNorm(D, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(D, c.rms_norm_eps)
        if c.has_experts(layer):
            experts = [MLP(D, c.moe_intermediate_size) for _ in range(c.num_experts)]
            width = c.shared_expert_intermediate_size
            shared = MLP(D, width) if width else None
            self.mlp = MoE(D, experts, c.num_experts_per_tok, c.norm_topk_prob, shared)
        else:
            self.mlp = MLP(D, c.intermediate_size, c.mlp_bias)

    def forward(self, h, rotary, mask, cache: LayerCache | None = None):
        """h [B, T, D] -> h [B, T, D], and the router's logits [B, T, E] if `mlp` is a mixture (else
        None)."""
        h = h + self.self_attn(self.input_layernorm(h), rotary, mask, cache)
        y = self.mlp(self.post_attention_layernorm(h))
        y, router_logits = y if isinstance(y, tuple) else (y, None)
        return h + y, router_logits


class Transformer(nn.Module):
    """`embed`, `layers`, `norm` and `lm_head` are public: a method that skips, repeats or contrasts
    layers writes its own forward with them, `prepare` and a loop of six lines
    (tests/test_interfaces.py shows four such methods)."""

    def __init__(self, config: Config, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling)
        # True: recompute each block in the backward pass, for less memory
        self.activation_checkpointing = False
        if not self.embed.weight.is_meta:
            self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None):
        """Matrices ~ N(0, initializer_range^2); those that write into the residual stream (o_proj,
        down_proj) are divided by sqrt(2L), so that the stream's variance does not grow with depth
        (GPT-2); biases 0; norms 1."""
        std = self.config.initializer_range
        depth = math.sqrt(2 * self.config.num_hidden_layers)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                p.normal_(0.0, std / depth if residual else std, generator=generator)
            elif name.endswith("bias"):
                p.zero_()

    @torch.no_grad()
    def fuse(self):
        """Makes this model one for inference only, and returns it: where several matrices read the
        same input (queries, keys and values; gate and up) one takes their place. Same function,
        fewer and larger products: at batch 1 they cost as much as they read, and a call beside
        them. The dense MLPs and every attention; a mixture's experts stay as they are. Parameter
        names are no checkpoint's any more: save before."""
        for layer in self.layers:
            layer.self_attn.fuse()
            if isinstance(layer.mlp, MLP):
                layer.mlp.fuse()
        return self.requires_grad_(False)

    def new_cache(self, B: int) -> list[LayerCache]:
        """One independent cache per layer, for B sequences; each knows its own `length`, so two
        passes may share the first few."""
        return [LayerCache() for _ in self.layers]

    def prepare(self, h, cache=None, attention_mask=None, positions=None):
        """What every block needs beside h [B, T, D]: the rotary tables, and `mask`: {window: None
        (causal) or bool [B or 1, 1, T, S]}.

        attention_mask: bool [B, S], True at real tokens (causality is added; positions count real
        tokens only), or bool [B, T, S]: exactly what each query reads, in place of causality and of
        the sliding window. A query with nothing to read reads itself. positions: int64 [B or 1, T];
        by default they follow the cached ones."""
        T = h.shape[1]
        start = cache[0].length if cache else 0
        S = start + T
        if attention_mask is not None:
            if attention_mask.dtype != torch.bool or attention_mask.shape[-1] != S:
                raise ValueError(f"attention_mask must be bool with last axis {S} "
                                 f"(cached {start} + new {T}), "
                                 f"got {attention_mask.dtype} {tuple(attention_mask.shape)}")
        if positions is None:
            if attention_mask is not None and attention_mask.dim() == 2:
                positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, start:]
            else:
                positions = torch.arange(start, S, device=h.device)[None]
        rotary = self.rotary(positions, h.dtype)
        windows = {block.self_attn.window for block in self.layers}
        mask = {w: self._mask(w, start, T, attention_mask, h.device) for w in windows}
        return rotary, mask

    @staticmethod
    def _mask(window, start, T, attention_mask, device):
        """bool [B or 1, 1, T, S], or None where causality is all that there is to it."""
        S = start + T
        in_window = window is None or S <= window
        if attention_mask is None and in_window and (T == 1 or start == 0):
            return None
        query = torch.arange(start, S, device=device)[:, None]
        key = torch.arange(S, device=device)[None]
        if attention_mask is not None and attention_mask.dim() == 3:
            allowed = attention_mask[:, None]  # (B, 1, T, S)
        else:
            allowed = (key <= query)[None, None]
            if window is not None:
                allowed = allowed & (key > query - window)
            if attention_mask is not None:
                allowed = allowed & attention_mask[:, None, None]
        if attention_mask is None:
            return allowed
        # A query of padding may read nothing: let it read itself; a softmax over nothing is NaN.
        nothing = ~allowed.any(-1, keepdim=True)
        return allowed | (nothing & (key == query))

    def _run(self, ids, embeds, cache, attention_mask, positions, keep_states=False):
        """Embedding and all blocks -> h [B, T, D] before the final norm, the L + 1 hidden states if
        kept, the router logits."""
        h = self.embed(ids) if embeds is None else embeds
        rotary, mask = self.prepare(h, cache, attention_mask, positions)
        states = [h]
        routers = []
        for i, layer in enumerate(self.layers):
            if self.activation_checkpointing and self.training and not cache:
                h, router_logits = checkpoint(layer, h, rotary, mask, use_reentrant=False)
            else:
                h, router_logits = layer(h, rotary, mask, cache[i] if cache else None)
            if keep_states:
                states.append(h)
            if router_logits is not None:
                routers.append(router_logits)
        return h, states, routers

    def hidden(self, ids=None, *, embeds=None, cache=None, attention_mask=None, positions=None):
        """[B, T, D] after the final norm: `lm_head` of it are the logits. For losses and prompts
        that need not build [B, T, V]."""
        h, _, _ = self._run(ids, embeds, cache, attention_mask, positions)
        return self.norm(h)

    def forward(
        self,
        ids=None,
        *,
        embeds=None,
        cache=None,
        attention_mask=None,
        positions=None,
        output_hidden_states=False,
        output_router_logits=False,
    ) -> Output:
        """ids int64 [B, T] (or embeds [B, T, D] in their place) -> Output. See `prepare` for the
        masks, `new_cache` for the cache."""
        h, states, routers = self._run(
            ids, embeds, cache, attention_mask, positions, keep_states=output_hidden_states
        )
        return Output(
            logits=self.lm_head(self.norm(h)),
            hidden_states=states if output_hidden_states else None,
            router_logits=routers if output_router_logits else None,
        )
