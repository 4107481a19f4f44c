"""Mixture of Experts: a router sends each token to K of E ordinary MLPs and adds their outputs,
weighted.

    p = softmax(x W_r) over all E experts
    y = sum over the K largest p_e of  w_e MLP_e(x),     w = p, or p / sum(p) (`norm_topk_prob`)

    moe_model = upcycle(model, num_experts=4)  # a dense model becomes a mixture that is equal

`MoE.plain` is that sum as it stands; `MoE.forward` sorts the tokens by expert first, so that every
expert multiplies its own tokens only. Letters as in transformer.py: N = B*T tokens, E experts, K
experts per token, D model width, F width of one expert."""

import copy
import dataclasses
import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from minilm import InputError
from minilm.ops import can_group, grouped_linear

MATRICES = ("gate_proj", "up_proj", "down_proj")  # of one expert


class TopKRouter(nn.Module):
    """Chooses K experts per token. `weight` [E, D] has no bias, as in every family that the loader
    reads."""

    def __init__(self, D: int, num_experts: int, experts_per_token: int, norm_topk_prob: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, D))
        self.experts_per_token = experts_per_token
        self.norm_topk_prob = norm_topk_prob

    def forward(self, x):
        """x [N, D] -> logits [N, E], weights [N, K] and indices [N, K] of the chosen experts."""
        logits = F.linear(x, self.weight)
        # Softmax over ALL experts, then top-k. A softmax over the K chosen logits alone would give
        # the renormalised weights: wrong for checkpoints that do not renormalise.
        probs = logits.softmax(-1, dtype=torch.float32)
        weights, indices = probs.topk(self.experts_per_token, dim=-1)
        if self.norm_topk_prob:  # for K = 1 the weight is then 1, and no loss can move the router
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(x.dtype), indices


class MoE(nn.Module):
    """Takes the place of a block's `mlp`; `experts` are modules [N, D] -> [N, D], `shared`
    (Qwen2-MoE) is one that every token passes.

    `grouped`: whether the experts run as one grouped matrix product (True), one after the other
    (False), or as one where that is fast: bfloat16 on a GPU of compute capability 9 (None, the
    default). All give the same values and gradients."""

    def __init__(
        self,
        D: int,
        experts: list[nn.Module],
        experts_per_token: int,
        norm_topk_prob: bool,
        shared: nn.Module | None = None,
    ):
        super().__init__()
        self.gate = TopKRouter(D, len(experts), experts_per_token, norm_topk_prob)
        self.experts = nn.ModuleList(experts)
        self.grouped: bool | None = None
        if shared is not None:
            self.shared_expert = shared
            self.shared_expert_gate = nn.Linear(D, 1, bias=False)

    def plain(self, x):
        """The definition, in five lines: each expert looks for its tokens. What `forward` must
        equal; on a GPU every expert waits here for the host to learn how many tokens it has."""
        x = x.reshape(-1, x.shape[-1])  # (N, D)
        _, weights, indices = self.gate(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(indices == e)  # the tokens that have e among their K
            y.index_add_(0, token, expert(x[token]) * weights[token, choice, None])
        return y

    def forward(self, x):
        """x [B, T, D] -> y [B, T, D], router logits [B, T, E].

        Example, K = 1: tokens 0 and 2 of three are sent to expert 2, token 1 to expert 0. Then
        `pair` is [1, 0, 2], `expert` [0, 2, 2], `ends` [1, 1, 3], and `place` (where is each pair?)
        [1, 0, 2]."""
        B, T, D = x.shape
        x = x.reshape(-1, D)  # (N, D)
        logits, weights, indices = self.gate(x)
        N, K = indices.shape

        # Sort the N*K (token, choice) pairs by expert: each expert's tokens then lie side by side.
        expert, pair = indices.flatten().sort(stable=True)
        every = torch.arange(len(self.experts), device=x.device)
        ends = torch.searchsorted(expert, every, right=True)  # where each expert's pairs end
        # F.embedding(i, x) is x[i]; on a CPU its backward pass alone adds in parallel and in order
        parts = F.embedding(pair // K, x)  # (N*K, D)
        run = self._run_grouped if self._use_grouped(x) else self._run_one_by_one
        y = run(parts, ends)

        # Back to the order of the tokens; a sum in fixed order, where index_add on a GPU has none.
        place = torch.empty_like(pair).scatter_(0, pair, torch.arange(N * K, device=x.device))
        y = F.embedding(place, y).view(N, K, D)
        y = (y * weights[..., None]).sum(1)  # (N, D)
        if hasattr(self, "shared_expert"):
            y = y + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y.view(B, T, D), logits.view(B, T, -1)

    def _run_one_by_one(self, parts, ends):
        """parts [N*K, D] sorted by expert, ends [E] -> the experts' outputs [N*K, D]."""
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()  # this layer's one wait for the GPU
        outputs = [expert(part) for expert, part in zip(self.experts, parts.split(counts))]
        return torch.cat(outputs)

    def _run_grouped(self, parts, ends):
        """The same with all experts' weights stacked [E, F, D]: three matrix products per layer and
        no wait."""
        dtype = _compute_dtype(parts)  # grouped_mm ignores autocast
        gate, up, down = (self._stacked(name).to(dtype) for name in MATRICES)
        parts, ends = parts.to(dtype), ends.int()
        h = F.silu(grouped_linear(parts, gate, ends)) * grouped_linear(parts, up, ends)
        return grouped_linear(h, down, ends)

    def _stacked(self, name):
        return torch.stack([getattr(expert, name).weight for expert in self.experts])

    def _use_grouped(self, x) -> bool:
        wanted = x.is_cuda if self.grouped is None else self.grouped
        if not wanted:
            return False
        linears = [getattr(expert, name, None) for expert in self.experts for name in MATRICES]
        # a LoRALinear is no nn.Linear: it computes more than its matrix
        if not all(isinstance(m, nn.Linear) and m.bias is None for m in linears):
            return False
        shapes = [m.weight.shape for m in linears]
        return self.grouped or can_group(x.device, _compute_dtype(x), shapes)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """In which a matrix product of x runs: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# --- losses and statistics

def load_balancing_loss(
    router_logits: list[torch.Tensor],
    experts_per_token: int,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over layers of  E/(K N) sum_e n_e P_e  (Fedus et al. 2021, Eq. 4, for K experts): n_e =
    tokens sent to expert e, P_e = its mean probability, N tokens. 1 when both are uniform (E/K when
    all tokens go to the same K experts with certainty).

    Hugging Face's `load_balancing_loss_func` lacks the 1/K, and pools the layers before it
    multiplies: one layer may hide another's imbalance.

    router_logits: per layer [B, T, E], before the softmax; mask: bool [B, T], True at the tokens
    that count."""
    losses = []
    for logits in router_logits:
        probs = _probs(logits, mask)
        N, E = probs.shape
        best = probs.topk(experts_per_token).indices
        chosen = torch.zeros_like(probs).scatter_(1, best, 1.0)
        agreement = (chosen.sum(0) * probs.sum(0)).sum()  # N sum_e n_e P_e
        losses.append(E / (experts_per_token * max(N, 1) ** 2) * agreement)
    return torch.stack(losses).mean()


class RouterStats(NamedTuple):
    """Per MoE layer and expert, float32 [layers, E], over the tokens that count."""

    score: torch.Tensor  # mean probability
    first: torch.Tensor  # share of the tokens that score this expert highest
    chosen: torch.Tensor  # share that has it among its K; sums to K, and times E / K it is the load


@torch.no_grad()
def router_stats(
    router_logits: list[torch.Tensor],
    experts_per_token: int,
    mask: torch.Tensor | None = None,
) -> RouterStats:
    """What the router does with these tokens; arguments as for `load_balancing_loss`. Of several
    batches, average by token count."""
    rows = []
    for logits in router_logits:
        probs = _probs(logits, mask)
        top = probs.topk(experts_per_token).indices  # (N, K), best first
        E = probs.shape[1]
        rows.append((probs.mean(0), _share(top[:, :1], E), _share(top, E)))
    return RouterStats(*map(torch.stack, zip(*rows)))


def _probs(logits, mask):
    """[B, T, E] -> [N, E], the masked tokens only, in float32."""
    counted = logits.flatten(0, 1) if mask is None else logits[mask]
    return counted.softmax(-1, dtype=torch.float32)


def _share(picked, E):
    """picked [N, k], expert numbers -> float32 [E], in how many of the N rows each stands, as a
    share."""
    return torch.bincount(picked.flatten(), minlength=E) / max(len(picked), 1)


# --- from dense to mixture

# the layout that can hold the result
MIXTURE_OF = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen2": "qwen2_moe",  # wants a shared expert: it gets a tiny zero
    "qwen3": "qwen3_moe",
}


@torch.no_grad()
def upcycle(
    model: nn.Module,
    num_experts: int,
    experts_per_token: int = 2,
    layers: list[int] | None = None,
    copies: bool = True,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A dense Transformer -> a new one whose MLPs (of `layers`; default all) are mixtures
    (Komatsuzaki et al. 2022, https://arxiv.org/abs/2212.05055). Expert 0 is the MLP, experts 1..E-1
    are copies of it (`copies=False`: random ones), the router is Xavier-normal. `model` is left as
    it is, and nothing shares memory with it.

    For K >= 2 the result computes exactly what `model` computes, whatever the router says: equal
    experts, weights that sum to 1. So the next-token loss gives the router no gradient at first;
    unequal gradients of the experts break the tie. For K = 1 the weight p is not renormalised (or
    the router would never learn), so the output is scaled by p < 1: a warning says so.

    Written to disk as Mixtral (from Llama, Mistral), Qwen3-MoE or Qwen2-MoE. Raises InputError for
    numbers that do not fit together, and for a model that no mixture layout can hold."""
    c = model.config
    every = range(c.num_hidden_layers)
    chosen = list(every if layers is None else layers)
    _check_upcycling(c, num_experts, experts_per_token, chosen)
    if experts_per_token == 1:
        warnings.warn(
            "experts_per_token=1: the upcycled model does not compute what the dense one does: "
            "each MLP's output is scaled by the router's probability; and as Mixtral, "
            "transformers reads another model: it renormalises",
            stacklevel=2,
        )
    model = copy.deepcopy(model)
    wants_shared = c.model_type == "qwen2"
    model.config = dataclasses.replace(
        c,
        model_type=MIXTURE_OF[c.model_type],
        num_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        norm_topk_prob=experts_per_token > 1,
        moe_intermediate_size=c.intermediate_size,
        shared_expert_intermediate_size=8 if wants_shared else 0,
        mlp_only_layers=sorted({*every} - {*chosen}),
        decoder_sparse_step=1,
    )

    def draw(p, std):
        """On the CPU: the same numbers on every device."""
        p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=generator))

    for i in chosen:
        mlp = model.layers[i].mlp
        others = [copy.deepcopy(mlp) for _ in range(num_experts - 1)]
        shared = None
        if wants_shared:
            shared = type(mlp)(c.hidden_size, model.config.shared_expert_intermediate_size)
        moe = MoE(c.hidden_size, [mlp, *others], experts_per_token, experts_per_token > 1, shared)
        like = mlp.gate_proj.weight  # its dtype and device (unless it was not read yet)
        moe.to(like.dtype) if like.is_meta else moe.to(like)
        draw(moe.gate.weight, math.sqrt(2 / (c.hidden_size + num_experts)))
        if shared is not None:
            for p in (*shared.parameters(), moe.shared_expert_gate.weight):
                p.zero_().requires_grad_(False)
        if not copies:
            depth = math.sqrt(2 * c.num_hidden_layers)  # as in Transformer.init_weights
            for expert in others:
                for name, p in expert.named_parameters():
                    draw(p, c.initializer_range / (depth if name.startswith("down_proj") else 1))
        model.layers[i].mlp = moe
    return model


def _check_upcycling(c, num_experts: int, experts_per_token: int, chosen: list[int]) -> None:
    if c.num_experts:
        raise InputError(f"the model is a mixture of {c.num_experts} experts already: "
                         "upcycle a dense one")
    if num_experts < 2 or not 1 <= experts_per_token <= num_experts:
        raise InputError(f"{num_experts} experts, {experts_per_token} per token: "
                         "give at least 2 experts, of which a token uses 1 to all")
    last = c.num_hidden_layers - 1
    if len(set(chosen)) < len(chosen) or not chosen or not set(chosen) <= {*range(last + 1)}:
        raise InputError(f"layers {chosen}: give each of the layers to upcycle once, "
                         f"from 0 to {last}")
    known = c.model_type in MIXTURE_OF
    if not known or c.mlp_bias or (c.attention_bias and MIXTURE_OF[c.model_type] == "mixtral"):
        biases = " with biases" if c.mlp_bias or c.attention_bias else ""
        raise InputError(f"a {c.model_type} model{biases} has no mixture layout to become; "
                         f"these have: {', '.join(MIXTURE_OF)}")
