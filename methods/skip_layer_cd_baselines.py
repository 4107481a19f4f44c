"""What SkipLayerCD is compared with: vanilla contrastive decoding, DoLa with an early exit, and the
repetition penalty that DoLa's authors put on top. methods/skip_layer_cd.py is the paper; it needs
nothing of this file, and these decoders contrast by its rule.

    generate(DoLa(model, norm=True), prompts)
    generate(ContrastModels(model, smaller), prompts)
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from methods.skip_layer_cd import check_contrast, contrast, scores_everywhere
from minilm import InputError
from minilm.transformer import Output, Transformer


class ContrastModels(nn.Module):
    """Vanilla contrastive decoding (Li et al. 2023): the amateur is another model, smaller or
    trained less, with the same vocabulary."""

    def __init__(self, expert, amateur, alpha=0.1, beta=0.5, truncate_vocab=False):
        super().__init__()
        check_contrast(alpha, beta)
        sizes = expert.config.vocab_size, amateur.config.vocab_size
        if sizes[0] != sizes[1] and not truncate_vocab:
            raise InputError(
                f"the expert has {sizes[0]} tokens, the amateur {sizes[1]}: they need one "
                "vocabulary; if the longer one only adds tokens at its end, pass --truncate-vocab"
            )
        self.expert = expert
        self.amateur = amateur
        self.alpha = alpha
        self.beta = beta
        self.vocab_size = min(sizes)
        self.config = expert.config

    def new_cache(self, B):
        return [self.expert.new_cache(B), self.amateur.new_cache(B)]

    def forward(self, ids, *, cache=(None, None), attention_mask=None) -> Output:
        z = []
        for model, own in zip((self.expert, self.amateur), cache):
            logits = model(ids, cache=own, attention_mask=attention_mask).logits
            z.append(logits[..., : self.vocab_size])
        return Output(contrast(*z, self.alpha, self.beta))


class DoLa(nn.Module):
    """Decoding by Contrasting Layers (Chuang et al. 2024, arXiv 2309.03883): the amateur is an
    early exit, the head applied to h_j for some j of `layers`. At every step it is the one that
    diverges most from the last layer (one layer only: static). s = log p_L - log p_j: `beta` None.

    The authors' code does not apply the final norm to h_j (`norm` False), and it averages
    KL(M || p) where the Jensen-Shannon divergence has KL(p || M) (`jsd` "official"); the two can
    choose different layers."""

    def __init__(
        self,
        model: Transformer,
        layers: Sequence[int] | None = None,  # default: the lower half
        alpha: float = 0.1,
        beta: float | None = None,
        norm: bool = False,
        jsd: str = "standard",
    ):
        super().__init__()
        L = len(model.layers)
        if layers is None:
            first = 1 if model.config.tie_word_embeddings else 0  # a tied head says h_0's own token
            layers = range(first, max(L // 2, first + 1))
        check_contrast(alpha, beta or 0.0)
        if not layers or not all(0 <= j < L for j in layers):
            raise InputError(
                f"early exits {list(layers)}: this model has the exits 0 (embedding) to {L - 1}; "
                "give at least one"
            )
        self.model = model
        self.layers = tuple(layers)
        self.alpha = alpha
        self.beta = beta
        self.norm = norm
        self.jsd = jsd
        self.config = model.config

    def new_cache(self, B):
        return self.model.new_cache(B)

    def hidden(self, ids, *, cache=None, attention_mask=None):
        """[B, T, (1 + exits) D]: the last layer's state, then the exits', side by side."""
        model = self.model
        exits = []
        h = model.embed(ids)
        rotary, mask = model.prepare(h, cache, attention_mask)
        for i, layer in enumerate(model.layers):
            if i in self.layers:
                exits.append(model.norm(h) if self.norm else h)
            h, _ = layer(h, rotary, mask, cache[i] if cache else None)
        return torch.cat((model.norm(h), *exits), -1)

    def lm_head(self, states):
        log_p = []
        for h in states.split(self.config.hidden_size, -1):
            log_p.append(self.model.lm_head(h).float().log_softmax(-1))
        final, *exits = log_p
        exits = torch.stack(exits)  # (exits, ..., V)
        chosen = divergence(final, exits, self.jsd).argmax(0)[None, ..., None]
        amateur = exits.take_along_dim(chosen, 0)[0]
        return contrast(final, amateur, self.alpha, self.beta)

    forward = scores_everywhere


def divergence(p: torch.Tensor, q: torch.Tensor, kind: str = "standard") -> torch.Tensor:
    """Of log-probabilities [..., V] -> [...], with M = (p + q)/2:

    standard   1/2 KL(p || M) + 1/2 KL(q || M), at most log 2
    official   1/2 KL(M || p) + 1/2 KL(M || q), without a bound
    """
    p = p.clamp(min=-100)  # e^-100 is still a float32: no 0 * inf
    q = q.clamp(min=-100)
    log_m = torch.logaddexp(p, q) - math.log(2)
    if kind == "standard":
        return (p.exp() * (p - log_m) + q.exp() * (q - log_m)).sum(-1) / 2
    return (log_m.exp() * (2 * log_m - p - q)).sum(-1) / 2  # both KLs are sums over M: add them


class RepetitionPenalty(nn.Module):
    """What DoLa's authors put on top (theta = 1.2): s / theta where s > 0, s theta where s < 0, for
    every token that the prompt or the output holds. Of log-ratios the sign is arbitrary, and the
    question's numbers are punished as well. Gives the last position only."""

    def __init__(self, decoder: nn.Module, theta: float):
        super().__init__()
        if not 1 <= theta < math.inf:
            raise InputError(
                f"--repetition-penalty {theta} rewards repetition: give 1 (none) or more"
            )
        self.decoder = decoder
        self.theta = theta
        self.config = decoder.config

    def new_cache(self, B):
        device = next(self.parameters()).device
        seen = torch.zeros(B, self.config.vocab_size, dtype=torch.int64, device=device)
        return self.decoder.new_cache(B), seen

    def forward(self, ids, *, cache, attention_mask=None) -> Output:
        inner, seen = cache
        real = torch.ones_like(ids)
        if attention_mask is not None:  # padding was not said
            real = attention_mask[:, -ids.shape[1] :].long()
        seen.scatter_add_(1, ids, real)
        s = last_scores(self.decoder, ids, inner, attention_mask)
        punished = torch.where(s > 0, s / self.theta, s * self.theta)
        return Output(torch.where(seen[:, None] > 0, punished, s))


def last_scores(decoder: nn.Module, ids, cache, attention_mask=None) -> torch.Tensor:
    """[B, 1, V] of any decoder, at the last position."""
    if hasattr(decoder, "hidden"):
        states = decoder.hidden(ids, cache=cache, attention_mask=attention_mask)
        return decoder.lm_head(states[:, -1:])
    return decoder(ids, cache=cache, attention_mask=attention_mask).logits[:, -1:]
