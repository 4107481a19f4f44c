"""Mixture of Experts: a router sends each token to K of E ordinary MLPs and adds their outputs, weighted.

    p = softmax(x W_r) over all E experts;   y = sum over the K largest p_e of  w_e MLP_e(x),   w = p, or p / sum(p) (`norm_topk_prob`)
"""

import torch
from torch import nn


class TopKRouter(nn.Module):
    """Chooses K experts per token. `weight` [E, D] has no bias, as in every family that the loader reads."""

    def __init__(self, D: int, num_experts: int, experts_per_token: int, norm_topk_prob: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, D))
        self.experts_per_token, self.norm_topk_prob = experts_per_token, norm_topk_prob

    def forward(self, x):
        """x [N, D] -> logits [N, E], weights [N, K] and indices [N, K] of the chosen experts."""
        logits = nn.functional.linear(x, self.weight)
        weights, indices = logits.softmax(-1, dtype=torch.float32).topk(self.experts_per_token, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(x.dtype), indices


class MoE(nn.Module):
    """Takes the place of a block's `mlp`; `experts` are modules [N, D] -> [N, D], `shared` (Qwen2-MoE) is one that every token passes."""

    def __init__(self, D: int, experts: list[nn.Module], experts_per_token: int, norm_topk_prob: bool, shared: nn.Module | None = None):
        super().__init__()
        self.gate = TopKRouter(D, len(experts), experts_per_token, norm_topk_prob)
        self.experts = nn.ModuleList(experts)
        if shared is not None:
            self.shared_expert, self.shared_expert_gate = shared, nn.Linear(D, 1, bias=False)

    def forward(self, x):
        """x [B, T, D] -> y [B, T, D], router logits [B, T, E]."""
        B, T, D = x.shape
        x = x.reshape(-1, D)  # (N, D)
        logits, weights, indices = self.gate(x)
        K = indices.shape[1]
        order = indices.flatten().argsort(stable=True)  # the N*K (token, expert) pairs, sorted by expert
        token = order // K
        counts = torch.bincount(indices.flatten(), minlength=len(self.experts)).tolist()  # the one wait for the GPU in this layer
        parts = x[token].split(counts)
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts)])  # (N*K, D)
        y = torch.zeros_like(x).index_add(0, token, y * weights.flatten()[order, None])
        if hasattr(self, "shared_expert"):
            y = y + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y.view(B, T, D), logits.view(B, T, -1)


def load_balancing_loss(router_logits: list[torch.Tensor], experts_per_token: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over layers of  E/(K N) sum_e n_e P_e  (Fedus et al. 2021, Eq. 4, for K experts): n_e = tokens sent to expert e, P_e = its mean
    probability, N tokens. 1 when both are uniform (E/K when all tokens go to the same K experts with certainty).
    Hugging Face's `load_balancing_loss_func` lacks the 1/K: it is K times this for one layer.

    router_logits: per layer [B, T, E] (before the softmax); mask: bool [B, T], True at the tokens that count."""
    losses = []
    for logits in router_logits:
        logits = logits.flatten(0, 1) if mask is None else logits[mask]  # (N, E)
        probs = logits.softmax(-1, dtype=torch.float32)
        N, E = probs.shape
        chosen = torch.zeros_like(probs).scatter_(1, probs.topk(experts_per_token).indices, 1.0)
        losses.append(E / (experts_per_token * N) * (chosen.sum(0) * probs.mean(0)).sum())
    return torch.stack(losses).mean()
