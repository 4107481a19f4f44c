"""Generation: one loop for every model and for every way to combine models.

`model` is any nn.Module with parameters (they say on which device it is), `new_cache(B)` and
`forward(ids, cache=..., attention_mask=...) -> Output` (the mask is passed only for prompts of
different lengths). A decoding method is one, twenty lines in its script, and generates through this
file."""

from collections.abc import Iterator, Sequence
from numbers import Integral

import torch

from minilm import InputError
from minilm.data import pad


def token_ids(values: dict, key: str) -> list[int]:
    """`eos_token_id` and its kin as a list: files give a number, a list of numbers, or null."""
    value = values.get(key)
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if any(type(i) is not int for i in ids):
        raise InputError(f"{key} {value!r} must be a whole number, a list of them, or null")
    return ids


def stop_ids(model, tokenizer=None) -> list[int]:
    """The ids after which an answer ends, as the model's folder says: those of its
    generation_config.json (alone, if there is one: transformers' rule), else of its config.json;
    and the tokenizer's EOS, which transformers would not add."""
    said = getattr(model, "generation_config", None) or getattr(model, "other_fields", {})
    ids = token_ids(said, "eos_token_id")
    end = None if tokenizer is None else tokenizer.eos_id
    return [*ids] if end is None or end in ids else [*ids, end]


def choose(
    logits: torch.Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    gen: torch.Generator | None = None,
) -> torch.Tensor:
    """Next tokens [B] from logits [B, V]: the largest at temperature 0 (ties: the lowest id), else
    a draw from softmax(logits / temperature), cut to the `top_k` most probable (and what equals the
    last of them) and to the smallest set that reaches `top_p` (Holtzman et al. 2020).
    InputError where the largest logit is NaN or infinite."""
    best = logits.argmax(-1, keepdim=True)  # (B, 1); a NaN counts as the largest
    if not logits.gather(-1, best).isfinite().all():
        raise InputError(f"the model's logits hold NaN or infinity in {logits.dtype}: its numbers "
                         "are too large for this type; use --dtype bfloat16 or float32")
    if temperature == 0:
        return best[:, 0]
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(descending=True)
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p  # what the more probable ones reach: the first token always stays
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, index, ordered)
    probs = logits.softmax(-1).cpu()  # the generator lives there
    return torch.multinomial(probs, 1, generator=gen).to(logits.device)[:, 0]


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises InputError for settings that `choose` cannot draw with."""
    if not (temperature == 0 or temperature >= 1e-6):
        raise InputError(f"temperature {temperature}: give 0 (most probable), or 1e-6 or more")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k {top_k}: give 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p {top_p}: give a probability above 0 and up to 1")


def context_length(model) -> int | None:
    """How many tokens the model reads, None if it does not tell: max_position_embeddings, or what
    its rope scaling stretches the original context to (files write either, or both)."""
    config = getattr(model, "config", None)
    context = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_scaling", None)
    if context is None or not rope:
        return context
    original = rope.get("original_max_position_embeddings", context)
    return max(context, int(rope.get("factor", 1) * original))


def check_context(model, longest: int, room: int = 1) -> int | None:
    """The model's context length (None if it tells none). Raises InputError when a text leaves no
    `room` in it for new tokens."""
    context = context_length(model)
    if context is not None and longest + room > context:
        raise InputError(f"the prompt has {longest} tokens, the model reads {context}: "
                         f"shorten the prompt to at most {context - room}")
    return context


def has_hidden(model) -> bool:
    """Whether `lm_head(hidden(ids))` is what its forward gives: not for a subclass with a forward
    of its own and an inherited `hidden`. (The first class in the order of inheritance that defines
    either must define `hidden`.)"""
    for cls in type(model).__mro__:
        if {"hidden", "forward"} & vars(cls).keys():
            return "hidden" in vars(cls)
    return False


@torch.inference_mode()
def stream(
    model,
    prompts: Sequence[Sequence[int]] | torch.Tensor,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[torch.Tensor]:
    """Yields the next token of every prompt, int64 [B] on the CPU, until `max_new_tokens` or until
    every row is as long as the context; what a row yields beyond it is to be dropped. Prompts of
    different lengths are padded on the left: every row then ends where the next token goes."""
    check_sampling(temperature, top_k, top_p)
    rows = [list(map(int, p)) for p in prompts]
    if not rows or not all(rows):
        raise InputError("a prompt is empty: give at least one token "
                         "(BOS, if the tokenizer has one)")
    context = check_context(model, max(map(len, rows)))
    device = next(model.parameters()).device
    ids, mask = (x.to(device) for x in pad(rows, left=True))
    padded = not bool(mask.all())
    if context is not None:
        max_new_tokens = min(max_new_tokens, context - min(map(len, rows)))
    cache = model.new_cache(len(rows))
    gen = torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        arguments = {"cache": cache}
        if padded:
            arguments["attention_mask"] = mask
        if has_hidden(model):  # the last position only: a long prompt need not build [B, T, V]
            logits = model.lm_head(model.hidden(ids, **arguments)[:, -1])
        else:
            logits = model(ids, **arguments).logits[:, -1]
        ids = choose(logits, temperature, top_k, top_p, gen)[:, None]  # (B, 1): the rest is cached
        if padded:
            mask = torch.cat((mask, mask.new_ones(len(rows), 1)), 1)
        yield ids[:, 0].cpu()


def generate(
    model,
    prompts: Sequence[Sequence[int]] | torch.Tensor,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | Sequence[int] | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Continues every prompt (lists of ids, or int64 [B, T]) -> lists of ids, prompt included, cut
    after the first EOS (`eos_id`: an id or several, see `stop_ids`) and at the end of the context.
    Greedy at temperature 0. The same seed gives the same samples. Stops early when every row has
    ended."""
    rows = [list(map(int, p)) for p in prompts]
    if eos_id is None:
        stops = set()
    else:
        stops = {int(eos_id)} if isinstance(eos_id, Integral) else set(map(int, eos_id))
    context = context_length(model)
    done = [False] * len(rows)
    for tokens in stream(model, rows, max_new_tokens, temperature, top_k, top_p, seed):
        for i, token in enumerate(tokens.tolist()):
            if not done[i]:
                rows[i].append(token)
                done[i] = token in stops or len(rows[i]) == context
        if all(done):
            break
    return rows
