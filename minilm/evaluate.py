"""What several papers measure: log-probabilities of continuations, perplexity, the last number of
an answer, pooled states, PCA."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from minilm import InputError
from minilm.data import pad
from minilm.generate import check_context, has_hidden


def token_logprobs(
    model,
    ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    chunk_bytes: int = 2**28,
) -> torch.Tensor:
    """log p(ids[:, t + 1] | ids[:, :t + 1]) in float32, [B, T - 1]; at padding the value means
    nothing. A Transformer's logits are made and dropped in chunks of `chunk_bytes`; any other model
    (two contrasted ones, say) gives all its logits at once."""
    check_context(model, ids.shape[1], room=0)
    labels = ids[:, 1:]  # [B, T - 1]
    if not has_hidden(model):
        logits = model(ids, attention_mask=attention_mask).logits[:, :-1].float()
        return -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    h = model.hidden(ids, attention_mask=attention_mask)[:, :-1]  # [B, T - 1, D]
    rows = max(1, chunk_bytes // (4 * model.config.vocab_size))
    losses = []
    for x, y in zip(h.flatten(0, 1).split(rows), labels.flatten().split(rows)):
        losses.append(F.cross_entropy(model.lm_head(x).float(), y, reduction="none"))
    return -torch.cat(losses).view_as(labels)


class Scores(NamedTuple):
    """One value per (prompt, continuation), float32 [n]."""

    sum: torch.Tensor  # log p(continuation | prompt)
    mean: torch.Tensor  # ... divided by its number of tokens
    per_character: torch.Tensor | None  # ... by its number of characters, if these were given


@torch.no_grad()
def continuation_logprobs(
    model,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch: int = 64,
    characters: Sequence[int] | None = None,
) -> Scores:
    """Scores of the continuation ids given the prompt ids, of every pair. Rows are padded on the
    right, where causal attention never looks, so padding cannot enter a score. A prompt needs at
    least one token (BOS): without it nothing predicts the first token."""
    for prompt, continuation in pairs:
        if not len(prompt) or not len(continuation):
            raise InputError("a prompt and a continuation need at least one token each: "
                             "put BOS before an empty prompt")
    device = next(model.parameters()).device
    lengths = [len(prompt) + len(continuation) for prompt, continuation in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)  # rows of like length together
    total = torch.zeros(len(pairs))
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        ids, _ = pad([[*pairs[i][0], *pairs[i][1]] for i in chosen])
        counted = torch.zeros(ids.shape[0], ids.shape[1] - 1)
        for row, i in enumerate(chosen):
            prompt, continuation = pairs[i]
            first = len(prompt) - 1  # the prompt's last token predicts the continuation's first
            counted[row, first : first + len(continuation)] = 1
        logprobs = token_logprobs(model, ids.to(device)).cpu()
        total[chosen] = (logprobs * counted).sum(1)
    _refuse_nan(total)
    tokens = torch.tensor([float(len(continuation)) for _, continuation in pairs])
    per_character = None
    if characters is not None:
        per_character = total / torch.tensor(characters, dtype=torch.float32)
    return Scores(total, total / tokens, per_character)


@torch.no_grad()
def perplexity(model, rows: Sequence[Sequence[int]], batch: int = 64) -> float:
    """exp(mean negative log-probability per token) over all rows; the first token of a row is
    read, never scored."""
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise InputError("perplexity needs a row of at least two tokens")
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for at in range(0, len(rows), batch):
        ids, mask = pad(rows[at : at + batch])
        scored = mask[:, 1:]
        total += float((token_logprobs(model, ids.to(device)).cpu() * scored).sum())
        count += int(scored.sum())
    mean = torch.tensor(-total / count)
    _refuse_nan(mean)
    return float(mean.exp())


def _refuse_nan(scores: torch.Tensor) -> None:
    if scores.isnan().any():
        raise InputError("the model's log-probabilities hold NaN: its numbers are too large for "
                         "their type; use --dtype bfloat16 or float32")


def last_number(text: str) -> str | None:
    """The last number of a text, as the published scorers of MGSM read it; None if there is none.
    One pass from left to right takes the comma out between two digits, then the last digits with
    an optional .digits count. So signs are lost, and "1,2,3" ends in 3; digits of any script count.
    "so 1,200 + 34 = $1,234." -> "1234";  "it is -3.50" -> "3.50";  "2.5e3" -> "3"."""
    found = re.findall(r"\d+(?:\.\d+)?", re.sub(r"(\d),(\d)", r"\1\2", text))
    return found[-1] if found else None


def masked_mean(h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the real tokens: h [B, T, D], mask bool [B, T] -> [B, D]; zero for a row without
    any."""
    weights = mask.to(h.dtype)[..., None]
    return (h * weights).sum(1) / weights.sum(1).clamp(min=1)


def pca(x: torch.Tensor, k: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Projections [n, k] of x [n, D] on its k directions of largest variance (min(n, D) at most),
    and the share that each explains [k]. A direction's sign is arbitrary: it is chosen so that its
    largest coordinate is positive."""
    centred = (x - x.mean(0)).double()
    _, s, vt = torch.linalg.svd(centred, full_matrices=False)
    largest = vt[:k].gather(1, vt[:k].abs().argmax(1, keepdim=True))
    projected = centred @ (vt[:k] * largest.sign()).T
    share = s[:k] ** 2 / (s**2).sum()
    return projected.to(x.dtype), share.to(x.dtype)
