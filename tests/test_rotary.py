"""Rotary embedding: a rotation whose scores depend on distance only; its scalings by hand and
against transformers."""

import math

import pytest
import torch

from minilm import InputError
from minilm.data import generator
from minilm.rotary import Rotary, inverse_frequencies, rotate

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def test_two_coordinates_are_turned_by_position_times_frequency():
    # Dh = 2 has the single frequency 1: at position p the vector (1, 0) becomes (cos p, sin p)
    tables = Rotary(2, 10000.0, None)(torch.arange(5)[None], torch.float32)
    turned = rotate(torch.tensor([1.0, 0.0]).expand(1, 1, 5, 2), tables)[0, 0]
    torch.testing.assert_close(
        turned, torch.stack((torch.arange(5.0).cos(), torch.arange(5.0).sin()), -1)
    )


def test_pairs_are_coordinates_i_and_i_plus_half_as_complex_numbers():
    x, p = torch.randn(8, generator=generator(0, "x")), 3
    z = torch.complex(x[:4], x[4:]) * torch.polar(
        torch.ones(4), p * 100.0 ** (-torch.arange(4) / 4)
    )  # theta = 100, w_i = theta^(-2i/8)
    turned = rotate(x.view(1, 1, 1, 8), Rotary(8, 100.0, None)(torch.tensor([[p]]), torch.float32))[
        0, 0, 0
    ]
    torch.testing.assert_close(turned, torch.cat((z.real, z.imag)))


def test_turning_keeps_the_length_and_scores_depend_on_the_distance_only():
    rotary, (q, k) = (
        Rotary(16, 10000.0, None),
        torch.randn(2, 1, 1, 1, 16, generator=generator(1, "qk")),
    )
    at = lambda x, p: rotate(x, rotary(torch.tensor([[p]]), torch.float32)).flatten()
    torch.testing.assert_close(at(q, 11).norm(), q.norm())
    torch.testing.assert_close(at(q, 11) @ at(k, 4), at(q, 107) @ at(k, 100), atol=1e-4, rtol=1e-4)
    assert abs(at(q, 11) @ at(k, 4) - at(q, 11) @ at(k, 9)) > 0.1


def test_frequencies_stay_in_float32_so_that_far_positions_differ_in_bfloat16_too():
    rotary = Rotary(8, 10000.0, None)
    cos, _ = rotary(
        torch.tensor([[4000, 4001]]), torch.bfloat16
    )  # 4001 itself has no bfloat16: it would be 4000
    assert cos.dtype == torch.bfloat16
    assert cos[0, 0, 1, 0].item() == pytest.approx(math.cos(4001), abs=0.004)
    assert rotary.frequencies.dtype == torch.float32


def test_linear_scaling_reads_position_p_as_p_over_factor():
    plain, slow = (
        Rotary(8, 10000.0, None),
        Rotary(8, 10000.0, {"rope_type": "linear", "factor": 4.0}),
    )
    for a, b in zip(
        slow(torch.tensor([[40, 80]]), torch.float32),
        plain(torch.tensor([[10, 20]]), torch.float32),
    ):
        torch.testing.assert_close(a, b)


def test_llama3_keeps_fast_frequencies_divides_slow_ones_and_blends_between():
    w, _ = inverse_frequencies(64, 10000.0, None)
    scaled, factor = inverse_frequencies(64, 10000.0, LLAMA3)
    turns = 64 * w / (2 * math.pi)  # full turns in the original 64 tokens
    assert factor == 1.0
    torch.testing.assert_close(scaled[turns > 4], w[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], w[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any() and ((scaled < w) & (scaled > w / 8))[between].all()


def test_yarn_keeps_fast_frequencies_divides_slow_ones_and_sharpens_by_a_tenth_of_log_factor():
    w, _ = inverse_frequencies(64, 10000.0, None)
    scaled, factor = inverse_frequencies(64, 10000.0, YARN | {"beta_fast": 4, "beta_slow": 0.5})
    turns = 64 * w / (2 * math.pi)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
    torch.testing.assert_close(scaled[turns > 4], w[turns > 4])
    torch.testing.assert_close(
        scaled[turns < 0.3], w[turns < 0.3] / 4
    )  # "truncate" rounds the borders outwards by up to one dimension
    assert ((scaled <= w) & (scaled >= w / 4 * 0.9999)).all()


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 3.0},
        LLAMA3,
        YARN,
        YARN | {"beta_fast": 8, "beta_slow": 2},
        YARN | {"attention_factor": 0.7},
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        YARN | {"truncate": False},
    ],
    ids=str,
)
def test_every_scaling_equals_transformers(scaling):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 5000.0, **scaling},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    ours, our_factor = inverse_frequencies(32, 5000.0, scaling)
    torch.testing.assert_close(ours, expected)
    assert our_factor == pytest.approx(factor)


def test_the_old_key_type_means_the_same_as_rope_type():
    new, old = ({key: "linear", "factor": 2.0} for key in ("rope_type", "type"))
    assert torch.equal(inverse_frequencies(8, 1e4, new)[0], inverse_frequencies(8, 1e4, old)[0])


@pytest.mark.parametrize(
    "scaling, words",
    [
        (
            {"rope_type": "longrope"},
            "rope type 'longrope' is not read; minilm reads default, linear, ",
        ),
        ({"type": "dynamic", "factor": 2.0}, "rope type 'dynamic'"),
        ({"rope_type": "linear"}, "rope_scaling of type 'linear' needs the field 'factor'"),
    ],
)
def test_a_scaling_that_is_not_read_is_refused_by_name(scaling, words):
    with pytest.raises(InputError, match=words):
        inverse_frequencies(8, 1e4, scaling)
