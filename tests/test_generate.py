"""Generation: the cache, padding and the laws of sampling, each against a slower or plainer way to
the same tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm import InputError
from minilm.data import generator
from minilm.evaluate import token_logprobs
from minilm.generate import choose, generate, stream
from minilm.transformer import Config, Output, Transformer

FAMILIES = {
    "llama": {"model_type": "llama"},
    "qwen3": {"num_key_value_heads": 2},
    "window": {"model_type": "mistral", "sliding_window": 4},
    "yarn": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}


def tiny(family="llama", context=64):
    values = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
        "max_position_embeddings": context,
        **FAMILIES[family],
    }
    return Transformer(Config(**values), generator(0, "init")).eval()


def greedy_without_cache(model, prompt, steps):
    """The plainest loop there is: run everything again for every token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


# --- the cache


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_and_uncached_logits_agree_at_every_step_and_for_every_chunking(family):
    model, ids = tiny(family), torch.randint(50, (2, 20), generator=generator(0, "ids"))
    expected = model(ids).logits
    for chunks in (
        [1] * 20,
        [7, 1, 1, 5, 6],
        [3, 17],
        [20],
    ):  # token by token; a prompt, then tokens, then more prompt; all at once
        cache, parts = model.new_cache(2), []
        for chunk in ids.split(chunks, dim=1):
            parts.append(model(chunk, cache=cache).logits)
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)
        assert [layer.length for layer in cache] == [20, 20]


@torch.no_grad()
def test_a_cache_that_outgrows_its_buffer_keeps_what_it_holds():
    model, ids = tiny(context=300), torch.randint(50, (1, 200), generator=generator(1, "ids"))
    cache = model.new_cache(1)
    logits = [
        model(part, cache=cache).logits for part in ids.split([60, 3, 2, 70, 65], dim=1)
    ]  # 64 places, then twice what is needed
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_the_plain_loop(family):
    model = tiny(family)
    assert generate(model, [[1, 2, 3]], max_new_tokens=15) == [
        greedy_without_cache(model, [1, 2, 3], 15)
    ]


# --- batches


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_different_lengths_continue_as_if_alone(family):
    model, prompts = tiny(family), [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    assert generate(model, prompts, max_new_tokens=12) == [
        greedy_without_cache(model, p, 12) for p in prompts
    ]


def test_a_tensor_of_prompts_is_a_list_of_its_rows():
    model, prompts = tiny(), torch.tensor([[1, 2], [3, 4]])
    assert generate(model, prompts, 5) == generate(model, prompts.tolist(), 5)


def test_each_row_is_cut_after_its_own_eos_and_all_stop_when_the_last_has_ended():
    model, prompts = tiny(), [[1, 2, 3], [8]]
    full = generate(model, prompts, max_new_tokens=20)
    eos = full[0][5]  # the third new token of row 0
    end = lambda row, start: next(
        (i + 1 for i in range(start, len(row)) if row[i] == eos), len(row)
    )
    expected = [full[0][: end(full[0], 3)], full[1][: end(full[1], 1)]]
    assert generate(model, prompts, max_new_tokens=20, eos_id=eos) == expected
    assert expected[0][-1] == eos and len(expected[0]) <= 6
    assert generate(model, [[1, 2, 3]], max_new_tokens=20, eos_id=[eos, 49]) == [
        expected[0]
    ]  # a list of ids, as in generation_config
    prompt_with_eos = generate(model, [[eos, 1, 2]], max_new_tokens=3, eos_id=eos)[0]
    assert len(prompt_with_eos) > 3  # an EOS within the prompt ends nothing


# --- sampling


def test_the_same_seed_gives_the_same_samples_and_another_seed_others():
    sample = lambda seed: generate(tiny(), [[1, 2], [3]], 12, temperature=1.0, seed=seed)
    torch.manual_seed(5)  # has no say
    first = sample(0)
    torch.manual_seed(6)
    assert sample(0) == first != sample(1)


def test_temperature_zero_is_greedy_and_ties_go_to_the_lowest_id():
    assert choose(torch.tensor([[0.0, 3, 3, 1], [2, 2, 2, 2]])).tolist() == [1, 0]
    cold = choose(
        torch.tensor([[0.0, 3, 2.9, 1]]).expand(100, 4), temperature=0.01, gen=generator(0, "draws")
    )
    assert cold.eq(1).all()


def test_samples_follow_the_softmax_of_logits_over_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = choose(logits.expand(40_000, 4), temperature=2.0, gen=generator(0, "draws"))
    share = torch.bincount(drawn, minlength=4) / 40_000
    torch.testing.assert_close(share, (logits / 2).softmax(-1), atol=0.01, rtol=0)


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    allowed = lambda **cut: set(
        choose(logits.expand(4000, 4), 1.0, gen=generator(0, "draws"), **cut).tolist()
    )
    assert allowed() == {0, 1, 2, 3}
    assert (
        allowed(top_k=1) == {0}
        and allowed(top_k=3) == {0, 1, 2}
        and allowed(top_k=99) == {0, 1, 2, 3}
    )
    # the smallest set that reaches p: 0.5 needs one token, 0.6 two, 0.94 three, 0.96 all
    assert [len(allowed(top_p=p)) for p in (0.01, 0.49, 0.6, 0.94, 0.96, 1.0)] == [1, 1, 2, 3, 4, 4]
    # first the cut to k, then p of what is left: 0.3 / 0.8 would be the second token's share
    assert allowed(top_k=2, top_p=0.6) == {0} and allowed(top_k=2, top_p=0.7) == {0, 1}


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-8, 8), min_size=1, max_size=20),
    k=st.integers(1, 25),
    p=st.floats(0.01, 1.0),
    seed=st.integers(0, 99),
)
def test_a_draw_always_lies_within_the_k_largest_and_within_the_nucleus(values, k, p, seed):
    logits = torch.tensor(values)
    token = int(choose(logits[None], 0.7, k, p, generator(seed, "draws")))
    assert (logits > logits[token]).sum() < k
    ahead = (
        (logits / 0.7).softmax(-1)[logits > logits[token]].sum()
    )  # what is more probable does not reach p by itself
    assert ahead < p + 1e-4


# --- the edges


def test_generation_stops_at_the_end_of_the_context():
    model = tiny(context=10)
    assert len(generate(model, [[1, 2, 3]], max_new_tokens=100)[0]) == 10
    assert generate(model, [[1, 2, 3]], max_new_tokens=0) == [[1, 2, 3]]


@pytest.mark.parametrize(
    "prompts, words",
    [
        (
            [[1] * 10],
            "the prompt has 10 tokens, the model reads 10: shorten the prompt to at most 9",
        ),
        ([[1], []], "a prompt is empty: give at least one token"),
        ([], "a prompt is empty"),
    ],
)
def test_a_prompt_that_is_empty_or_longer_than_the_context_is_refused(prompts, words):
    with pytest.raises(InputError, match=words):
        generate(tiny(context=10), prompts)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": 1e-40}, "temperature 1e-40: give 0"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 0.0}, "top_p 0.0"),
    ],
)
def test_settings_that_nothing_can_be_drawn_with_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        generate(tiny(), [[1]], 3, **{"temperature": 1.0} | settings)


def test_streaming_yields_the_tokens_that_generate_returns():
    model = tiny()
    streamed = [tokens.tolist() for tokens in stream(model, [[1, 2], [3]], 6)]
    assert [[row[i] for row in streamed] for i in range(2)] == [
        out[-6:] for out in generate(model, [[1, 2], [3]], 6)
    ]


def test_anything_with_a_cache_and_a_forward_generates():
    class Counter(torch.nn.Module):
        """Says n + 1 after n."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def new_cache(self, B):
            return []

        def forward(self, ids, cache=None, attention_mask=None):
            return Output(torch.nn.functional.one_hot((ids + 1) % 7, 7).float())

    assert generate(Counter(), [[5], [2, 3]], max_new_tokens=4) == [
        [5, 6, 0, 1, 2],
        [2, 3, 4, 5, 6, 0],
    ]


def test_a_subclass_with_a_forward_of_its_own_generates_and_is_scored_by_it():
    class Opposite(Transformer):
        """The least probable token first. It inherits `hidden`, which knows nothing of this
        forward."""

        def forward(self, ids, **arguments):
            return Output(-super().forward(ids, **arguments).logits)

    model = Opposite(tiny().config, generator(0, "init")).eval()
    assert generate(model, [[1, 2]], 1)[0][-1] == int(
        tiny()(torch.tensor([[1, 2]])).logits[0, -1].argmin()
    )
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(
        token_logprobs(model, ids)[0, 0], (-tiny()(ids).logits[0, 0]).log_softmax(-1)[2]
    )


# --- overflow, stopping, the context


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_overflow_are_an_error_that_names_the_flag_and_not_token_0(bad, temperature):
    model = tiny()
    model.lm_head.weight.data[7] = bad
    with pytest.raises(
        InputError, match="logits hold NaN or infinity in torch.float32: .* use --dtype bfloat16"
    ):
        generate(model, [[1, 2]], 3, temperature=temperature)
    assert choose(torch.tensor([[0.0, -torch.inf]])).tolist() == [
        0
    ]  # a token that is ruled out is no overflow


def test_every_id_of_a_list_ends_a_row_and_an_id_may_be_of_any_kind_of_whole_number():
    model = tiny()
    full = generate(model, [[1, 2, 3]], max_new_tokens=20)[0]
    eos = full[5]
    cut = full[: full.index(eos, 3) + 1]
    for ids in (eos, [eos], [49, eos], [eos, 49], np.int64(eos), {eos}, torch.tensor([49, eos])):
        assert generate(model, [[1, 2, 3]], max_new_tokens=20, eos_id=ids) == [cut]
    assert generate(model, [[1, 2, 3]], max_new_tokens=20, eos_id=[]) == [full]


def test_the_nucleus_is_cut_after_the_temperature():
    logits = torch.tensor(
        [2.0, 1.0, 0.0]
    )  # p 0.67, 0.24, 0.09; at temperature 4: 0.42, 0.33, 0.26, so 0.7 needs two and 0.8 three
    allowed = lambda p: set(
        choose(logits.expand(2000, 3), 4.0, top_p=p, gen=generator(0, "draws")).tolist()
    )
    assert (allowed(0.4), allowed(0.7), allowed(0.8)) == ({0}, {0, 1}, {0, 1, 2})


def test_how_long_a_row_grows_does_not_depend_on_its_neighbours():
    model, short, long = tiny(context=16), [1, 2], list(range(14))
    alone = [generate(model, [prompt], 10)[0] for prompt in (short, long)]
    assert [len(row) for row in alone] == [12, 16]
    assert generate(model, [short, long], 10) == alone


@pytest.mark.parametrize(
    "scaling, context",
    [
        (None, 32),
        ({"rope_type": "linear", "factor": 4.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}, 32),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 2,
            },
            32,
        ),
    ],
)
def test_the_context_is_what_config_and_rope_scaling_allow_together(scaling, context):
    model = Transformer(
        Config(50, 16, 24, 1, 2, max_position_embeddings=32, rope_scaling=scaling),
        generator(0, "init"),
    )
    assert len(generate(model, [[1] * (context - 2)], 10)[0]) == context
    with pytest.raises(
        InputError, match=f"has {context} tokens, the model reads {context}: shorten"
    ):
        generate(model, [[1] * context])
