"""Mixture of Experts: a router sends each token to K of E ordinary MLPs and adds their outputs, weighted.

    p = softmax(x W_r) over all E experts;   y = sum over the K largest p_e of  w_e MLP_e(x),   w = p, or p / sum(p) (`norm_topk_prob`)

    moe_model = upcycle(model, num_experts=4, experts_per_token=2)     # a dense model becomes a mixture that computes the same function

Letters as in transformer.py: N = B*T tokens, E experts, K experts per token, D model width, F width of one expert."""

import copy
import dataclasses
import math
import warnings
from typing import NamedTuple

import torch
from torch import nn

from minilm import InputError
from minilm.ops import can_group, grouped_linear


class TopKRouter(nn.Module):
    """Chooses K experts per token. `weight` [E, D] has no bias, as in every family that the loader reads."""

    def __init__(self, D: int, num_experts: int, experts_per_token: int, norm_topk_prob: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, D))
        self.experts_per_token, self.norm_topk_prob = experts_per_token, norm_topk_prob

    def forward(self, x):
        """x [N, D] -> logits [N, E], weights [N, K] and indices [N, K] of the chosen experts.

        Softmax over ALL experts, then top-k, then (if the checkpoint says so) renormalise. A softmax over the K chosen logits alone would
        give the renormalised weights, wrong for checkpoints that do not. K = 1 renormalised is weight 1: no loss can move the router."""
        logits = nn.functional.linear(x, self.weight)
        weights, indices = logits.softmax(-1, dtype=torch.float32).topk(self.experts_per_token, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(x.dtype), indices


class MoE(nn.Module):
    """Takes the place of a block's `mlp`; `experts` are modules [N, D] -> [N, D], `shared` (Qwen2-MoE) is one that every token passes.
    `grouped`: whether the experts run as one grouped matrix product (True), one after the other (False), or as one where that is fast:
    bfloat16 on a GPU of compute capability 9 (None, the default). Both give the same values and gradients."""

    def __init__(self, D: int, experts: list[nn.Module], experts_per_token: int, norm_topk_prob: bool, shared: nn.Module | None = None):
        super().__init__()
        self.gate = TopKRouter(D, len(experts), experts_per_token, norm_topk_prob)
        self.experts = nn.ModuleList(experts)
        self.grouped: bool | None = None
        if shared is not None:
            self.shared_expert, self.shared_expert_gate = shared, nn.Linear(D, 1, bias=False)

    def forward(self, x):
        """x [B, T, D] -> y [B, T, D], router logits [B, T, E]. Example, K = 1: tokens 0 and 2 of three are sent to expert 2, token 1 to
        expert 0. Then `pair` is [1, 0, 2], `expert` [0, 2, 2], `ends` [1, 1, 3], and `place` (where is each pair?) [1, 0, 2]."""
        B, T, D = x.shape
        x = x.reshape(-1, D)  # (N, D)
        logits, weights, indices = self.gate(x)
        N, K = indices.shape
        expert, pair = indices.flatten().sort(stable=True)  # the N*K (token, choice) pairs, sorted by expert
        ends = torch.searchsorted(expert, torch.arange(len(self.experts), device=x.device), right=True)  # where each expert's pairs end
        parts = x[pair // K]  # (N*K, D), each expert's tokens side by side
        y = self._run_grouped(parts, ends) if self._use_grouped(x) else self._run_one_by_one(parts, ends)
        place = torch.empty_like(pair).scatter_(0, pair, torch.arange(N * K, device=x.device))  # the inverse of `pair`
        y = (y[place].view(N, K, D) * weights[..., None]).sum(1)  # (N, D); a sum in fixed order, where index_add on a GPU has none
        if hasattr(self, "shared_expert"):
            y = y + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y.view(B, T, D), logits.view(B, T, -1)

    def _run_one_by_one(self, parts, ends):
        """parts [N*K, D] sorted by expert, ends [E] -> the experts' outputs [N*K, D]."""
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()  # the one wait for the GPU in this layer
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts.split(counts))])

    def _run_grouped(self, parts, ends):
        """The same with all experts' weights stacked [E, F, D]: three matrix products per layer and no wait."""
        device = parts.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parts.dtype  # grouped_mm ignores autocast
        gate, up, down = (torch.stack([getattr(expert, name).weight for expert in self.experts]).to(dtype)
                          for name in ("gate_proj", "up_proj", "down_proj"))
        parts, ends = parts.to(dtype), ends.int()
        h = nn.functional.silu(grouped_linear(parts, gate, ends)) * grouped_linear(parts, up, ends)
        return grouped_linear(h, down, ends)

    def _use_grouped(self, x) -> bool:
        if not (x.is_cuda if self.grouped is None else self.grouped):
            return False
        linears = [getattr(expert, name, None) for expert in self.experts for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(isinstance(m, nn.Linear) and m.bias is None for m in linears):  # a LoRALinear is none: it computes more
            return False
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        return self.grouped or can_group(x.device, dtype, [m.weight.shape for m in linears])


# --- losses and statistics

def load_balancing_loss(router_logits: list[torch.Tensor], experts_per_token: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over layers of  E/(K N) sum_e n_e P_e  (Fedus et al. 2021, Eq. 4, for K experts): n_e = tokens sent to expert e, P_e = its mean
    probability, N tokens. 1 when both are uniform (E/K when all tokens go to the same K experts with certainty).
    Hugging Face's `load_balancing_loss_func` lacks the 1/K, and pools the layers before it multiplies: one may hide another's imbalance.

    router_logits: per layer [B, T, E] (before the softmax); mask: bool [B, T], True at the tokens that count."""
    losses = []
    for logits in router_logits:
        probs = _probs(logits, mask)
        N, E = probs.shape
        chosen = torch.zeros_like(probs).scatter_(1, probs.topk(experts_per_token).indices, 1.0)
        losses.append(E / (experts_per_token * max(N, 1) ** 2) * (chosen.sum(0) * probs.sum(0)).sum())
    return torch.stack(losses).mean()


class RouterStats(NamedTuple):
    """Per MoE layer and expert, float32 [layers, E], over the tokens that count."""

    score: torch.Tensor  # mean probability
    first: torch.Tensor  # share of the tokens that score this expert highest
    chosen: torch.Tensor  # share of the tokens that have it among their K; sums to K, and chosen * E / K is its load (1 = balanced)


@torch.no_grad()
def router_stats(router_logits: list[torch.Tensor], experts_per_token: int, mask: torch.Tensor | None = None) -> RouterStats:
    """What the router does with these tokens; arguments as for `load_balancing_loss`. Of several batches, average by token count."""
    rows = []
    for logits in router_logits:
        probs = _probs(logits, mask)
        top = probs.topk(experts_per_token).indices  # (N, K), best first
        share = lambda picked, E=probs.shape[1]: torch.bincount(picked.flatten(), minlength=E) / max(len(picked), 1)
        rows.append((probs.mean(0), share(top[:, :1]), share(top)))
    return RouterStats(*map(torch.stack, zip(*rows)))


def _probs(logits, mask):
    """[B, T, E] -> [N, E], the masked tokens only, in float32."""
    return (logits.flatten(0, 1) if mask is None else logits[mask]).softmax(-1, dtype=torch.float32)


# --- from dense to mixture

MIXTURE_OF = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}  # the layout that can hold the result


@torch.no_grad()
def upcycle(model: nn.Module, num_experts: int, experts_per_token: int = 2, layers: list[int] | None = None, copies: bool = True,
            generator: torch.Generator | None = None) -> nn.Module:
    """A dense Transformer -> a new one whose MLPs (of `layers`; default all) are mixtures (Komatsuzaki et al. 2022,
    https://arxiv.org/abs/2212.05055). Expert 0 is the MLP, experts 1..E-1 are copies of it (`copies=False`: random ones), the router is
    Xavier-normal. `model` is left as it is, and nothing shares memory with it.
    For K >= 2 the result computes exactly what `model` computes, whatever the router says: equal experts, weights that sum to 1. So the
    next-token loss gives the router no gradient at first; unequal gradients of the experts break the tie. For K = 1 the weight p is not
    renormalised (or the router would never learn), so the output is scaled by p < 1: a warning says so.

    Written to disk as Mixtral (from Llama, Mistral), Qwen3-MoE or Qwen2-MoE, which gets the shared expert that it wants: a tiny zero."""
    c, every = model.config, range(model.config.num_hidden_layers)
    chosen = list(every if layers is None else layers)
    if c.num_experts:
        raise InputError(f"the model is a mixture of {c.num_experts} experts already: upcycle a dense one")
    if num_experts < 2 or not 1 <= experts_per_token <= num_experts:
        raise InputError(f"{num_experts} experts, {experts_per_token} per token: give at least 2 experts, of which a token uses 1 to all")
    if len(set(chosen)) < len(chosen) or not chosen or not set(chosen) <= {*every}:
        raise InputError(f"layers {chosen}: give each of the layers to upcycle once, from 0 to {c.num_hidden_layers - 1}")
    if c.model_type not in MIXTURE_OF or c.mlp_bias or (c.attention_bias and MIXTURE_OF[c.model_type] == "mixtral"):
        biases = " with biases" if c.mlp_bias or c.attention_bias else ""
        raise InputError(f"a {c.model_type} model{biases} has no mixture layout to become; these have: {', '.join(MIXTURE_OF)}")
    if experts_per_token == 1:
        warnings.warn("experts_per_token=1: the upcycled model does not compute what the dense one does: each MLP's output is scaled by "
                      "the router's probability; and as Mixtral, transformers reads another model: it renormalises", stacklevel=2)
    model = copy.deepcopy(model)
    model.config = dataclasses.replace(
        c, model_type=MIXTURE_OF[c.model_type], num_experts=num_experts, num_experts_per_tok=experts_per_token, decoder_sparse_step=1,
        norm_topk_prob=experts_per_token > 1, moe_intermediate_size=c.intermediate_size, mlp_only_layers=sorted({*every} - {*chosen}),
        shared_expert_intermediate_size=8 if c.model_type == "qwen2" else 0)
    random = lambda p, std: p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=generator))  # drawn on the CPU: the same everywhere
    for i in chosen:
        mlp = model.layers[i].mlp
        others = [copy.deepcopy(mlp) for _ in range(num_experts - 1)]
        shared = type(mlp)(c.hidden_size, model.config.shared_expert_intermediate_size) if c.model_type == "qwen2" else None
        moe = MoE(c.hidden_size, [mlp, *others], experts_per_token, experts_per_token > 1, shared).to(mlp.gate_proj.weight)
        random(moe.gate.weight, math.sqrt(2 / (c.hidden_size + num_experts)))
        if shared is not None:
            for p in (*shared.parameters(), moe.shared_expert_gate.weight):
                p.zero_().requires_grad_(False)
        if not copies:
            for name, p in ((n, p) for expert in others for n, p in expert.named_parameters()):
                random(p, c.initializer_range / (math.sqrt(2 * c.num_hidden_layers) if name.startswith("down_proj") else 1))
        model.layers[i].mlp = moe
    return model
