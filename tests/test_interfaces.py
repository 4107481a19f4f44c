"""Four ten-line methods, one for each door that the core leaves open: read them before writing your
own.

A method that skips layers and shares a cache; one that swaps an MLP; one that contrasts two models
inside `generate`; one that feeds prefix embeddings with its own mask. None of them changes a line
of minilm."""

import torch
import torch.nn.functional as F
from torch import nn

from minilm.data import generator
from minilm.generate import generate
from minilm.moe import MoE
from minilm.transformer import MLP, Config, Output, Transformer

close = lambda a, b: torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def tiny(layers=4, seed=0):
    return Transformer(
        Config(
            50,
            32,
            48,
            layers,
            4,
            num_key_value_heads=2,
            initializer_range=0.3,
            max_position_embeddings=64,
        ),
        generator(seed, "init"),
    ).eval()


IDS = torch.randint(50, (2, 10), generator=generator(0, "ids"))


# --- 1. skip layers; two passes share the first layers' cache


class SkipContrast(nn.Module):
    """logits of all layers minus `beta` times those of a pass that leaves out layers first..last-1.
    Both passes are the same up to `first`, so those layers are computed, and cached, once."""

    def __init__(self, model, first, last, beta):
        super().__init__()
        self.model, self.first, self.last, self.beta = model, first, last, beta

    def new_cache(self, B):
        return (
            self.model.new_cache(B) + self.model.new_cache(B)[self.last :]
        )  # the whole pass, then the tail of the other

    def forward(self, ids, cache=None, attention_mask=None):
        h, layers, L = self.model.embed(ids), self.model.layers, len(self.model.layers)
        rotary, mask = self.model.prepare(h, cache, attention_mask)
        run = lambda h, i, c: layers[i](h, rotary, mask, cache[c] if cache else None)[0]
        for i in range(self.first):
            h = run(h, i, i)
        full = skipped = h
        for i in range(self.first, L):
            full = run(full, i, i)
        for i in range(self.last, L):
            skipped = run(skipped, i, L + i - self.last)
        lens = lambda h: self.model.lm_head(self.model.norm(h))
        return Output(lens(full) - self.beta * lens(skipped))


def test_a_method_skips_layers_and_its_two_passes_share_a_cache():
    model = tiny()
    method = SkipContrast(model, first=1, last=3, beta=0.5)
    short = tiny()
    del short.layers[1:3]  # the same model without these layers, run on its own
    expected = model(IDS).logits - 0.5 * short(IDS).logits
    close(method(IDS).logits, expected)
    cache = method.new_cache(2)
    steps = [method(part, cache=cache).logits for part in IDS.split([6, 1, 1, 1, 1], dim=1)]
    close(torch.cat(steps, 1), expected)
    assert [layer.length for layer in cache] == [
        10
    ] * 5  # 4 layers + 1 of the skipping pass, layer 0 only once


def test_a_method_that_skips_nothing_and_subtracts_nothing_is_the_model():
    model = tiny()
    prompts = [[1, 2, 3], [4]]  # of different lengths: padding works through a method too
    assert generate(SkipContrast(model, 2, 2, beta=0.0), prompts, 12) == generate(
        model, prompts, 12
    )
    assert generate(SkipContrast(model, 1, 3, beta=2.0), prompts, 12) != generate(
        model, prompts, 12
    )


# --- 2. swap a block's MLP


class TwoMLPs(nn.Module):
    """Half of an old MLP and half of a new one. A block takes any module [B, T, D] -> [B, T, D] as
    its `mlp`."""

    def __init__(self, old, new):
        super().__init__()
        self.old, self.new = old, new

    def forward(self, x):
        return (self.old(x) + self.new(x)) / 2


def test_a_block_takes_any_mlp_and_only_the_new_one_is_trained():
    model = tiny(2)
    before = model(IDS).logits
    block = model.layers[1]
    new = MLP(32, 48)
    new.load_state_dict(block.mlp.state_dict())
    model.requires_grad_(False)
    block.mlp = TwoMLPs(block.mlp, new)
    close(model(IDS).logits, before)  # two halves of the same
    F.cross_entropy(model(IDS[:, :-1]).logits.flatten(0, 1), IDS[:, 1:].flatten()).backward()
    assert (
        all(p.grad is not None for p in new.parameters())
        and sum(p.grad is not None for p in model.parameters()) == 3
    )


def test_an_mlp_that_is_a_mixture_hands_out_its_router_logits():
    model = tiny(2)
    model.layers[1].mlp = MoE(
        32, [MLP(32, 48) for _ in range(3)], experts_per_token=2, norm_topk_prob=True
    )
    nn.init.normal_(model.layers[1].mlp.gate.weight)
    out = model(IDS, output_router_logits=True)
    assert [tuple(r.shape) for r in out.router_logits] == [
        (2, 10, 3)
    ]  # one layer of two is a mixture
    assert model(IDS).router_logits is None
    prompts = [[1, 2, 3], [4]]
    assert generate(model, prompts, 8) == [generate(model, [p], 8)[0] for p in prompts]


# --- 3. contrast two models inside generate


class Contrast(nn.Module):
    """log p of an expert minus `beta` times that of an amateur; `generate` needs no more than these
    two methods."""

    def __init__(self, expert, amateur, beta):
        super().__init__()
        self.expert, self.amateur, self.beta = expert, amateur, beta

    def new_cache(self, B):
        return [self.expert.new_cache(B), self.amateur.new_cache(B)]

    def forward(self, ids, cache=(None, None), attention_mask=None):
        expert, amateur = (
            m(ids, cache=c, attention_mask=attention_mask).logits
            for m, c in zip((self.expert, self.amateur), cache)
        )
        return Output(expert.log_softmax(-1) - self.beta * amateur.log_softmax(-1))


def test_two_models_are_contrasted_inside_generate():
    expert, amateur, prompts = tiny(4), tiny(1, seed=1), [[1, 2, 3], [4]]
    outs = generate(Contrast(expert, amateur, 0.5), prompts, max_new_tokens=10)
    for prompt, out in zip(
        prompts, outs
    ):  # the slow way: both models run anew on everything, for every token
        ids = list(prompt)
        for _ in range(10):
            scores = [
                m(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for m in (expert, amateur)
            ]
            ids.append(int((scores[0] - 0.5 * scores[1]).argmax()))
        assert out == ids
    assert generate(Contrast(expert, amateur, 0.0), prompts, 10) == generate(expert, prompts, 10)


# --- 4. prefix embeddings with their own mask


def prefix_mask(prefix, T):
    """bool [1, S, S]: prefix vectors (of an image, or learned) see one another in both directions;
    tokens see them and what came before."""
    S = prefix + T
    mask = torch.ones(S, S, dtype=torch.bool).tril()
    mask[:prefix, :prefix] = True
    return mask[None]


def test_prefix_embeddings_see_one_another_and_tokens_follow_causally():
    model, prefix = tiny(), torch.randn(2, 4, 32, generator=generator(0, "prefix"))
    forward = lambda prefix, ids: (
        model(
            embeds=torch.cat((prefix, model.embed(ids)), 1),
            attention_mask=prefix_mask(4, ids.shape[1]),
        ).logits
    )
    logits = forward(prefix, IDS)
    other = prefix.clone()
    other[:, 3] += 1
    assert not torch.allclose(
        forward(other, IDS)[:, 0], logits[:, 0]
    )  # the last prefix vector reaches the first
    close(
        forward(prefix, IDS[:, :5]), logits[:, :9]
    )  # but later tokens reach neither the prefix nor the tokens before them


def test_after_the_prefix_generation_goes_on_through_the_cache():
    model, prefix = tiny(), torch.randn(2, 4, 32, generator=generator(0, "prefix"))
    x = torch.cat((prefix, model.embed(IDS)), 1)
    expected = model(embeds=x, attention_mask=prefix_mask(4, 10)).logits
    cache = model.new_cache(2)
    first = model(embeds=x[:, :6], cache=cache, attention_mask=prefix_mask(4, 2)).logits
    rest = [
        model(embeds=x[:, t : t + 1], cache=cache).logits for t in range(6, 14)
    ]  # a single token sees all that is cached
    close(torch.cat((first, *rest), 1), expected)


def test_a_learned_prefix_receives_the_gradient_of_a_frozen_model():
    model, prefix = tiny().requires_grad_(False), nn.Parameter(torch.zeros(1, 4, 32))
    x = torch.cat((prefix.expand(2, -1, -1), model.embed(IDS)), 1)
    F.cross_entropy(model(embeds=x).logits[:, 4:-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    assert prefix.grad.abs().sum() > 0
