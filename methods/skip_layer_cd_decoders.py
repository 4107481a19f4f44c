"""SkipLayerCD, the method: decoders that contrast an expert with an amateur. methods/skip_layer_cd.py is the experiment.

Every decoder is a module with `forward(ids, cache=...)` and `new_cache(B)`, so minilm.generate runs it like a model, on any checkpoint:

    model, tok = load_pretrained(folder)
    generate(SkipLayers(model, span=(8, 12)), prompts)      # blocks 8 to 11 are skipped by the amateur
    generate(DoLa(model, norm=True), prompts);  generate(ContrastModels(model, smaller), prompts)
"""

import math
import random
from collections.abc import Sequence

import torch
from torch import nn

from minilm import InputError
from minilm.transformer import LayerCache, Output, Transformer


def contrast(expert: torch.Tensor, amateur: torch.Tensor, alpha: float = 0.1, beta: float | None = 0.5) -> torch.Tensor:
    """Scores of the next token from two logits [..., V]; the choice is made by the expert, among what the expert finds plausible:

        V_head = {v : z_E(v) >= max_w z_E(w) + log alpha};    s(v) = (1 + beta) z_E(v) - beta z_A(v) in V_head, else -inf

    beta None: the limit of a large beta, s = log p_E - log p_A, if log-probabilities are given. Logits do as well as those for choosing
    or sampling (s changes by a constant), but not under a repetition penalty, which looks at the sign of s."""
    expert, amateur = expert.float(), amateur.float()
    scores = expert - amateur if beta is None else (1 + beta) * expert - beta * amateur  # Eq. (contrast)
    implausible = expert < expert.max(-1, keepdim=True).values + math.log(alpha)
    return scores.masked_fill(implausible, -torch.inf)  # last: what was -inf - -inf = NaN is masked too


def scores_everywhere(self, ids, *, cache=None, attention_mask=None) -> Output:
    """Every decoder's forward: `hidden` runs the blocks, `lm_head` contrasts. `generate` calls the two, to score the last position only."""
    return Output(self.lm_head(self.hidden(ids, cache=cache, attention_mask=attention_mask)))


class SkipLayers(nn.Module):
    """The paper's decoder: the amateur is the same model without blocks m ... n-1, for every token, those of the prompt included.

        h_0 = embed(x);  h_{i+1} = block_i(h_i)      expert:   z_E = head(norm(h_L))
        h'_n = h_m;      h'_{i+1} = block_i(h'_i)    amateur:  z_A = head(norm(h'_L))

    Up to block m both are the same pass: one computation and one cache. From block n on the amateur has keys and values of its own.
    So a token costs L + (L - n) block evaluations (2L - (n - m) without sharing). All rows of a batch skip the same span [m, n)."""

    def __init__(self, model: Transformer, span: tuple[int, int], alpha: float = 0.1, beta: float = 0.5, share_prefix: bool = True):
        super().__init__()
        check_contrast(alpha, beta)
        if not 0 <= span[0] < span[1] <= len(model.layers):
            raise InputError(f"span {span[0]},{span[1]}: blocks m to n-1 are skipped, with 0 <= m < n <= {len(model.layers)} in this model")
        self.model, self.span, self.alpha, self.beta, self.share_prefix = model, span, alpha, beta, share_prefix
        self.config = model.config

    def new_cache(self, B: int) -> list[list[LayerCache]]:
        return [self.model.new_cache(B), self.model.new_cache(B)]  # of the expert, of the amateur: where nothing is computed it stays empty

    def hidden(self, ids, *, cache=None, attention_mask=None):
        """[B, T, 2D]: the expert's last state and beside it the amateur's, both after the final norm."""
        model, (m, n), L, cache = self.model, self.span, len(self.model.layers), cache or (None, None)
        x = model.embed(ids)
        rotary, mask = model.prepare(x, cache[0], attention_mask)

        def blocks(h, first, last, cache):
            for i in range(first, last):
                h, _ = model.layers[i](h, rotary, mask, cache[i] if cache else None)
            return h

        h_m = blocks(x, 0, m, cache[0])
        expert = blocks(h_m, m, L, cache[0])
        amateur = blocks(h_m if self.share_prefix else blocks(x, 0, m, cache[1]), n, L, cache[1])
        return torch.cat((model.norm(expert), model.norm(amateur)), -1)

    def lm_head(self, states):
        expert, amateur = (self.model.lm_head(h) for h in states.chunk(2, -1))
        return contrast(expert, amateur, self.alpha, self.beta)

    forward = scores_everywhere


class ContrastModels(nn.Module):
    """Vanilla contrastive decoding (Li et al. 2023): the amateur is another model, smaller or trained less, with the same vocabulary."""

    def __init__(self, expert: nn.Module, amateur: nn.Module, alpha: float = 0.1, beta: float = 0.5, truncate_vocab: bool = False):
        super().__init__()
        check_contrast(alpha, beta)
        sizes = expert.config.vocab_size, amateur.config.vocab_size
        if sizes[0] != sizes[1] and not truncate_vocab:
            raise InputError(f"the expert has {sizes[0]} tokens, the amateur {sizes[1]}: they need one vocabulary; if the longer one only "
                             "adds tokens at its end, pass --truncate-vocab")
        self.expert, self.amateur, self.alpha, self.beta, self.vocab_size = expert, amateur, alpha, beta, min(sizes)
        self.config = expert.config

    def new_cache(self, B):
        return [self.expert.new_cache(B), self.amateur.new_cache(B)]

    def forward(self, ids, *, cache=(None, None), attention_mask=None) -> Output:
        both = zip((self.expert, self.amateur), cache)
        z = [model(ids, cache=c, attention_mask=attention_mask).logits[..., : self.vocab_size] for model, c in both]
        return Output(contrast(*z, self.alpha, self.beta))


class DoLa(nn.Module):
    """Decoding by Contrasting Layers (Chuang et al. 2024): the amateur is an early exit, the head applied to some h_j of `layers`. At
    every step it is the one that diverges most from the last layer (one layer only: static). s = log p_L - log p_j: `beta` is None.

    The authors' code does not apply the final norm to h_j (`norm` False), and averages KL(M || p) where the Jensen-Shannon divergence
    has KL(p || M) (`jsd` "official"); the two can choose different layers."""

    def __init__(self, model: Transformer, layers: Sequence[int] | None = None, alpha: float = 0.1, beta: float | None = None,
                 norm: bool = False, jsd: str = "standard"):
        super().__init__()
        L = len(model.layers)
        if layers is None:  # the lower half; a tied head reads h_0 as the token itself
            layers = range(int(model.config.tie_word_embeddings), max(L // 2, 1 + int(model.config.tie_word_embeddings)))
        check_contrast(alpha, beta or 0.0)
        if not layers or not all(0 <= j < L for j in layers):
            raise InputError(f"early exits {list(layers)}: this model has the exits 0 (embedding) to {L - 1}; give at least one")
        self.model, self.layers, self.alpha, self.beta, self.norm, self.jsd = model, tuple(layers), alpha, beta, norm, jsd
        self.config = model.config

    def new_cache(self, B):
        return self.model.new_cache(B)

    def hidden(self, ids, *, cache=None, attention_mask=None):
        """[B, T, (1 + exits) D]: the last layer's state, then the exits'."""
        model, exits = self.model, []
        h = model.embed(ids)
        rotary, mask = model.prepare(h, cache, attention_mask)
        for i, layer in enumerate(model.layers):
            if i in self.layers:
                exits.append(model.norm(h) if self.norm else h)
            h, _ = layer(h, rotary, mask, cache[i] if cache else None)
        return torch.cat((model.norm(h), *exits), -1)

    def lm_head(self, states):
        logits = [self.model.lm_head(h) for h in states.split(self.config.hidden_size, -1)]
        final, *exits = (z.float().log_softmax(-1) for z in logits)
        exits = torch.stack(exits)  # (exits, ..., V)
        chosen = divergence(final, exits, self.jsd).argmax(0)[None, ..., None]
        return contrast(final, exits.take_along_dim(chosen, 0)[0], self.alpha, self.beta)

    forward = scores_everywhere


def divergence(p: torch.Tensor, q: torch.Tensor, kind: str = "standard") -> torch.Tensor:
    """Of log-probabilities [..., V] -> [...], with M = (p + q)/2:

        standard: 1/2 KL(p || M) + 1/2 KL(q || M), at most log 2;    official: 1/2 KL(M || p) + 1/2 KL(M || q), without a bound"""
    p, q = p.clamp(min=-100), q.clamp(min=-100)  # e^-100 is still a float32: no 0 * inf
    log_m = torch.logaddexp(p, q) - math.log(2)
    if kind == "standard":
        return (p.exp() * (p - log_m) + q.exp() * (q - log_m)).sum(-1) / 2
    return (log_m.exp() * (2 * log_m - p - q)).sum(-1) / 2


class RepetitionPenalty(nn.Module):
    """What DoLa's authors put on top (theta = 1.2): s/theta where s > 0, s theta where s < 0, for every token that the prompt or the
    output holds. Of log-ratios, whose sign is arbitrary; the question's numbers are punished as well. Gives the last position only."""

    def __init__(self, decoder: nn.Module, theta: float):
        super().__init__()
        if theta < 1:
            raise InputError(f"--repetition-penalty {theta} rewards repetition: give 1 (none) or more")
        self.decoder, self.theta, self.config = decoder, theta, decoder.config

    def new_cache(self, B):
        seen = torch.zeros(B, self.config.vocab_size, dtype=torch.int64, device=next(self.parameters()).device)
        return self.decoder.new_cache(B), seen

    def forward(self, ids, *, cache, attention_mask=None) -> Output:
        inner, seen = cache
        real = torch.ones_like(ids) if attention_mask is None else attention_mask[:, -ids.shape[1] :].long()
        seen.scatter_add_(1, ids, real)
        s = last_scores(self.decoder, ids, inner, attention_mask)
        return Output(torch.where(seen[:, None] > 0, torch.where(s > 0, s / self.theta, s * self.theta), s))


def last_scores(decoder: nn.Module, ids, cache, attention_mask=None) -> torch.Tensor:
    """[B, 1, V] of any decoder, at the last position."""
    if hasattr(decoder, "hidden"):
        return decoder.lm_head(decoder.hidden(ids, cache=cache, attention_mask=attention_mask)[:, -1:])
    return decoder(ids, cache=cache, attention_mask=attention_mask).logits[:, -1:]


def check_contrast(alpha: float, beta: float) -> None:
    if not 0 < alpha <= 1:
        raise InputError(f"--alpha {alpha} must be above 0 and at most 1 (1 leaves the expert's best token only)")
    if beta < 0:
        raise InputError(f"--beta {beta} must not be negative (0 is greedy decoding)")


# --- which blocks to skip

def span_sizes(L: int, min_start: int | None = None) -> tuple[int, int]:
    """How many blocks to skip (an eighth, at least one) and the first that may be: 4, in models under 16 blocks an eighth of them."""
    eighth = max(1, round(L / 8))
    return eighth, min_start if min_start is not None else 4 if L >= 16 else eighth


def heuristic_span(L: int, rng: random.Random, min_start: int | None = None) -> tuple[int, int]:
    """SL-H: a random start in the lower middle, one draw per example: m from {4, ..., L/2 - 1}."""
    n_skip, first = span_sizes(L, min_start)
    m = rng.randint(first, max(first, L // 2 - 1))
    if m >= L:
        raise InputError(f"--min-start {first}: the model has the blocks 0 to {L - 1}")
    return m, min(L, m + n_skip)


@torch.no_grad()
def entropy_curve(model: Transformer, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[float]:
    """H_i, i = 0 ... L-1: entropy in nats of softmax(head(norm(h_i))), a mean over the positions of ids [B, T] but each row's last.
    mask: bool [B, T], True at real tokens (padding on the right)."""
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    counted, curve = mask[:, 1:], []
    for h in model(ids, output_hidden_states=True).hidden_states[:-1]:
        log_p = model.lm_head(model.norm(h[:, :-1][counted])).float().log_softmax(-1)
        curve.append(-(log_p.exp() * log_p).sum(-1).mean().item())
    return curve


def entropy_span(H: Sequence[float], threshold: float = 0.1, min_start: int | None = None) -> tuple[int, int]:
    """SL-D: the blocks just before the entropy begins to fall for good. With e_i = (H_i - H_{i+2})/2, n = i + 2, m = n - n_skip, it is
    the first i >= n_skip + 4 for which e_i > threshold and H_n > H_j for all j > n. A curve without one: the middle of SL-H's range."""
    L = len(H)
    n_skip, first = span_sizes(L, min_start)
    for i in range(n_skip + first, L - 2):
        n = i + 2
        if (H[i] - H[n]) / 2 > threshold and all(H[n] > later for later in H[n + 1 :]):
            return n - n_skip, n
    m = (first + L // 2) // 2
    print(f"warning: SL-D finds no lasting fall above {threshold} in the entropies {', '.join(f'{x:.2f}' for x in H)}: skipping from "
          f"block {m}, the middle of SL-H's range")
    return m, min(L, m + n_skip)


def blocks_per_token(cache: list[list[LayerCache]]) -> float:
    """What a decoder's cache tells about its cost: every entry was one evaluation of one block."""
    return sum(layer.length for part in cache for layer in part) / cache[0][0].length
