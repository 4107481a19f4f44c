"""Layers of 8 and 4 bits: the packed products equal their plain twins, and a file's own blocks
stay."""

import copy

import gguf
import pytest
import torch

from minilm import InputError
from minilm.data import generator
from minilm.generate import generate
from minilm.gguf import read_blocks
from minilm.moe import upcycle
from minilm.quantize import GROUP, Linear4, Linear8, load_quantized, quantize
from minilm.quantize import round_to_4_bits, round_to_8_bits
from minilm.transformer import Config, Transformer
from minilm.weights import load_pretrained, save_pretrained
from tests.test_gguf import logits, random_model, write

gen = generator(0, "weights")
W = torch.randn(48, 96, generator=gen)
X = torch.randn(3, 5, 96, generator=gen).bfloat16()  # so that no input is rounded


def close(a, b, relative):
    """Up to this share of the largest number."""
    assert (a - b).abs().max() <= relative * b.abs().max()


# --- a layer

def test_eight_bits_by_hand():
    q, scale = round_to_8_bits(torch.tensor([[-2.54, 0.0, 1.281, 0.0101], [0.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(scale[0], torch.tensor(0.02), atol=0, rtol=2**-8)  # 2.54 / 127
    assert q.tolist() == [[-127, 0, 64, 1], [0, 0, 0, 0]]  # 64.05 and 0.505 are rounded


def test_four_bits_by_hand():
    row = torch.zeros(1, GROUP)
    row[0, :3] = torch.tensor([-0.5, 1.0, 0.26])
    q, scale, zero = round_to_4_bits(row)
    rounded = {"atol": 0, "rtol": 2**-8}  # to bfloat16
    torch.testing.assert_close(scale, torch.tensor([[0.1]]), **rounded)  # 15 steps from -0.5 to 1
    torch.testing.assert_close(zero, torch.tensor([[0.3]]), **rounded)  # where q = 8 is
    assert q[0, :4].tolist() == [0, 15, 8, 5]  # 7.6 is rounded; 0 is -0.5 + 5 steps


def test_no_weight_moves_by_more_than_about_half_a_step():
    """Half, and what rounding the scale to bfloat16 takes from a group's largest."""
    q, scale = round_to_8_bits(W)
    assert ((q * scale[:, None] - W).abs() <= 0.75 * scale[:, None]).all()  # the largest, rounded
    q, scale, zero = round_to_4_bits(W)
    groups = (q.view(48, -1, GROUP).float() - 8) * scale[..., None] + zero[..., None]
    assert ((groups - W.view(48, -1, GROUP)).abs() <= 0.6 * scale[..., None]).all()


def test_the_products_of_torch_equal_their_plain_twins():
    eight = Linear8(*round_to_8_bits(W))
    rows = X[:, :2].reshape(6, 96).float()
    close(eight(rows), eight.plain(rows), 2**-8)  # bfloat16 has 8 bits
    four = Linear4(*round_to_4_bits(W))
    close(four.weights(), W, 0.06)
    plain = four(rows)
    assert four.packed is None and torch.equal(plain, four.plain(rows))
    close(four.pack()(rows), plain, 2**-7)  # its weights are rounded to bfloat16 as well
    assert four.q.nbytes == four.packed.nbytes == W.numel() // 2  # two to a byte


def test_many_rows_at_once_equal_the_same_rows_one_by_one():
    rows = torch.randn(200, 96, generator=gen)
    for layer in (Linear8(*round_to_8_bits(W)), Linear4(*round_to_4_bits(W)).pack()):
        close(layer(rows), torch.cat([layer(row[None]) for row in rows]), 2**-7)


def test_the_twins_take_over_where_torch_lacks_a_product(monkeypatch):
    model = random_model("llama", vocab_size=128)
    expected = {bits: logits(quantize(copy.deepcopy(model), bits)) for bits in (4, 8)}
    monkeypatch.setattr("minilm.quantize.PRODUCT4", None)
    monkeypatch.setattr("minilm.quantize.PRODUCT8", None)
    for bits in (4, 8):
        plain = quantize(copy.deepcopy(model), bits)
        assert bits == 8 or plain.layers[0].mlp.down_proj.packed is None
        close(logits(plain), expected[bits], 0.03)


def test_layers_take_any_number_of_rows_a_bias_and_either_type():
    bias = torch.randn(48, generator=gen)
    four = Linear4(*round_to_4_bits(W), bias)
    for layer in (Linear8(*round_to_8_bits(W), bias), copy.deepcopy(four), four.pack()):
        close(layer(X.float()), X.float() @ W.T + bias, 0.1)
        assert layer(X[:0].float()).shape == (0, 5, 48)
        assert layer(X.float()).dtype == torch.float32
        layer.bias = bias.bfloat16()
        assert layer(X).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
def test_fused_layers_equal_the_layers_side_by_side(bits):
    """And a fused model's outputs are those of the unfused one, to the last bit."""
    rows = 8 * torch.rand(96, 1, generator=gen) * torch.randn(96, 96, generator=gen)
    kind, to_bits = {4: (Linear4, round_to_4_bits), 8: (Linear8, round_to_8_bits)}[bits]
    parts = [kind(*to_bits(part)) for part in rows.split((32, 48, 16))]
    one = kind.concatenated(parts)
    assert one.out_features == 96
    assert torch.equal(one(X), torch.cat([part(X) for part in parts], -1))


# --- a model

@pytest.mark.parametrize("bits, share", [(8, 0.05), (4, 0.6)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral", "qwen2_moe"])
def test_a_quantised_model_is_close_to_what_it_was_and_generates(family, bits, share):
    model = random_model(family, vocab_size=128)
    expected = logits(model)
    small = quantize(copy.deepcopy(model), bits)
    error = (logits(small) - expected).pow(2).mean().sqrt() / expected.std()
    assert 0 < error < share  # unrelated logits: 1.4; a mixture also routes some tokens elsewhere
    assert isinstance(small.lm_head, Linear8)  # also with 4 bits elsewhere
    kinds = {type(m).__name__ for m in small.layers.modules() if "Linear" in type(m).__name__}
    left = {"Linear"} if family == "qwen2_moe" else set()  # its gate of one row does not fit
    assert kinds == {f"Linear{bits}"} | left
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    alone = [generate(small, [prompt], max_new_tokens=4)[0] for prompt in prompts]
    assert generate(small, prompts, max_new_tokens=4) == alone


def test_a_mixture_s_routers_stay_and_an_idle_expert_does_no_harm():
    model = Transformer(Config(64, 32, 64, 1, 2, model_type="llama"), generator(0, "init"))
    mixture = upcycle(model, 8, 2, generator=generator(0, "router"))
    before = mixture.layers[0].mlp.gate.weight.clone()
    quantize(mixture, 4)
    with torch.no_grad():
        one = mixture(torch.tensor([[3]])).logits  # six experts have no token
    assert one.isfinite().all() and torch.equal(mixture.layers[0].mlp.gate.weight, before)


def test_a_quantised_model_is_not_saved_nor_trained(tmp_path):
    model = quantize(random_model("qwen3", vocab_size=128), 8)
    with pytest.raises(InputError, match="quantised"):
        save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(InputError, match="give 4 or 8"):
        quantize(model, 3)


# --- a file's own blocks

@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_a_file_s_blocks_are_the_numbers_that_the_package_unpacks(kind):
    type_ = gguf.GGMLQuantizationType[kind]
    rows = gguf.quantize(W.numpy(), type_)
    q, scale, zero = read_blocks(rows, type_)
    ours = (q.view(48, -1, 32) - 8.0) * scale[..., None] + zero[..., None]
    expected = torch.from_numpy(gguf.dequantize(rows, type_)).view_as(ours)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    layer = Linear4(q, scale, zero)
    close(layer.weights(), expected.flatten(1), 2**-8)  # scale and zero are rounded to bfloat16


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_a_file_s_four_bits_are_used_as_they_are(family, kind, tmp_path):
    """So the model is nearer to the unpacked file than one whose weights are rounded twice."""
    file = write(random_model(family, vocab_size=128), tmp_path / "model.gguf", kind)
    model, _ = load_quantized(file, 4, torch.float32)
    plain, _ = load_pretrained(file)
    fused = model.layers[0].self_attn.qkv_proj
    assert isinstance(fused, Linear4) and fused.packed is not None
    unpacked = fused(torch.eye(64)).T - (0 if fused.bias is None else fused.bias[:, None])
    own = kind != "Q8_0"
    heads = plain.layers[0].self_attn
    expected = torch.cat([heads.q_proj.weight, heads.k_proj.weight, heads.v_proj.weight])
    close(unpacked, expected, 0.012 if own else 0.07)
    expected = logits(plain)
    error = (logits(model) - expected).pow(2).mean().sqrt() / expected.std()
    assert error < (0.05 if own else 0.6)
    eight, _ = load_quantized(file, 8)
    assert isinstance(eight.layers[0].self_attn.qkv_proj, Linear8)
