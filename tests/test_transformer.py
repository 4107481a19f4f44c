"""The transformer: its equations written out by hand, the law of causality, its masks, and what a
method that looks inside may rely on."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from minilm import InputError
from minilm.data import generator
from minilm.lora import add_lora
from minilm.rotary import rotate
from minilm.transformer import Config, RMSNorm, Transformer
from minilm.weights import save_pretrained

close = lambda a, b: torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def tiny(**change):
    """Two blocks, 4 query heads that share 2 key/value heads; weights large enough for attention to
    matter."""
    values = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "max_position_embeddings": 64,
        **change,
    }
    return Transformer(Config(**values), generator(0, "init")).eval()


def some_ids(B=2, T=9):
    return torch.randint(50, (B, T), generator=generator(0, "ids"))


# --- the equations, written out


def test_rmsnorm_is_x_over_the_root_of_its_mean_square():
    norm = RMSNorm(3, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 1.0, 10.0])
    # mean of 1, 4, 4 is 3
    close(norm(torch.tensor([1.0, 2.0, -2.0])), torch.tensor([1.0, 2.0, -20.0]) / math.sqrt(3))
    large = torch.tensor(
        [300.0, 600.0, -600.0]
    ).half()  # squares that float16 cannot hold: the mean is taken in float32
    close(
        norm.half()(large).float(), torch.tensor([1.0, 2.0, -20.0]).div(math.sqrt(3)).half().float()
    )


def test_attention_is_softmax_of_scaled_scores_with_key_heads_shared_by_groups():
    model = tiny(model_type="llama")
    attention, x = model.layers[0].self_attn, torch.randn(1, 7, 32, generator=generator(1, "x"))
    rotary, mask = model.prepare(x)
    q, k, v = (
        p(x).view(7, -1, 8).transpose(0, 1)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )  # (heads, T, Dh)
    q, k = rotate(q[None], rotary)[0], rotate(k[None], rotary)[0]
    heads = []
    for h in range(4):
        scores = (
            q[h] @ k[h // 2].T / math.sqrt(8)
        )  # query heads 0 and 1 read key head 0; 2 and 3 read 1
        scores[torch.ones(7, 7).triu(1).bool()] = -math.inf
        heads.append(scores.softmax(-1) @ v[h // 2])
    close(attention(x, rotary, mask)[0], attention.o_proj(torch.cat(heads, -1)))


def test_a_block_adds_attention_and_mlp_to_the_stream_and_the_head_reads_its_norm():
    model, ids = tiny(), some_ids()
    h = model.embed(ids)
    rotary, mask = model.prepare(h)
    for block in model.layers:
        h = h + block.self_attn(block.input_layernorm(h), rotary, mask)
        x = block.post_attention_layernorm(h)
        h = h + block.mlp.down_proj(F.silu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x))
    close(model(ids).logits, F.linear(model.norm(h), model.lm_head.weight))


def test_queries_and_keys_are_normalised_in_qwen3_so_their_scale_does_not_matter():
    ids = some_ids()
    for family, matters in (("qwen3", False), ("llama", True)):
        model = tiny(model_type=family)
        before = model(ids).logits
        for block in model.layers:
            block.self_attn.q_proj.weight.data *= 7
        assert torch.allclose(model(ids).logits, before, atol=1e-3) != matters


@pytest.mark.parametrize(
    "family, biases", [("llama", 0), ("mistral", 0), ("qwen3", 0), ("qwen2", 3)]
)
def test_only_qwen2_has_a_bias_on_queries_keys_and_values(family, biases):
    assert (
        sum(
            name.endswith("bias")
            for name, _ in tiny(model_type=family).layers[0].named_parameters()
        )
        == biases
    )


# --- causality and masks


@pytest.mark.parametrize(
    "change", [{}, {"sliding_window": 3}, {"model_type": "llama", "attention_bias": True}]
)
def test_a_later_token_never_changes_an_earlier_logit(change):
    model, ids = tiny(**change), some_ids(1, 12)
    before = model(ids).logits
    for t in range(1, 12):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 50
        after = model(changed).logits
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])  # and the token itself does matter


def test_padding_on_either_side_changes_nothing_for_the_real_tokens():
    model, ids = tiny(), some_ids(1, 6)
    alone = model(ids).logits
    junk = torch.tensor([[3, 3, 3]])
    left = torch.tensor([[False] * 3 + [True] * 6])
    close(model(torch.cat((junk, ids), 1), attention_mask=left).logits[:, 3:], alone)
    close(model(torch.cat((ids, junk), 1), attention_mask=left.flip(1)).logits[:, :6], alone)
    close(model(torch.cat((ids, junk), 1)).logits[:, :6], alone)  # on the right causality is enough


def test_a_token_that_the_mask_leaves_out_might_as_well_not_be_there():
    model, ids = tiny(), some_ids(1, 7)
    real = torch.tensor([[True, True, False, False, True, True, True]])
    close(
        model(ids, attention_mask=real).logits[real], model(ids[real][None]).logits[0]
    )  # positions count real tokens only


def test_a_query_that_may_read_nothing_reads_itself():
    model, ids = tiny(), some_ids(1, 4)
    logits = model(ids, attention_mask=torch.zeros(1, 4, dtype=torch.bool)).logits
    close(
        logits[0], model(ids.T).logits[:, 0]
    )  # each token as if alone; a softmax over nothing would be NaN


def test_a_mask_of_three_axes_is_exactly_what_each_query_reads():
    model, ids = tiny(), some_ids(2, 8)
    causal = torch.ones(8, 8).tril().bool().expand(2, 8, 8)
    close(model(ids, attention_mask=causal).logits, model(ids).logits)
    everything = torch.ones(
        2, 8, 8, dtype=torch.bool
    )  # bidirectional: now the last token reaches the first logit
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    assert not torch.allclose(
        model(ids, attention_mask=everything).logits[:, 0],
        model(changed, attention_mask=everything).logits[:, 0],
    )
    blocks = torch.zeros(
        1, 8, 8, dtype=torch.bool
    )  # two documents in one row, each with its own positions: as if alone
    blocks[:, :5, :5], blocks[:, 5:, 5:] = (
        torch.ones(5, 5).tril().bool(),
        torch.ones(3, 3).tril().bool(),
    )
    packed = model(
        ids[:1], attention_mask=blocks, positions=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    ).logits
    close(packed[:, 5:], model(ids[:1, 5:]).logits)


def test_a_sliding_window_shows_a_query_itself_and_the_tokens_just_before_it():
    model, ids = tiny(sliding_window=3), some_ids(1, 10)
    band = torch.ones(10, 10).tril().bool() & ~torch.ones(10, 10).tril(-3).bool()
    assert band.sum(1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]
    close(model(ids).logits, tiny()(ids, attention_mask=band[None]).logits)
    mixed = tiny(sliding_window=3, layer_types=["full_attention", "sliding_attention"])
    assert [block.self_attn.window for block in mixed.layers] == [None, 3]
    assert not torch.allclose(mixed(ids).logits, model(ids).logits)


@pytest.mark.parametrize("mask", [torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 9)])
def test_a_mask_of_another_length_or_type_is_refused(mask):
    with pytest.raises(ValueError, match="attention_mask must be bool with last axis 9"):
        tiny()(some_ids(), attention_mask=mask)


# --- what a method may rely on


def test_hidden_states_enter_the_blocks_and_the_logit_lens_works_at_every_one():
    model, ids = tiny(), some_ids()
    out = model(ids, output_hidden_states=True)
    states = out.hidden_states
    assert len(states) == 3
    assert torch.equal(states[0], model.embed(ids))
    rotary, mask = model.prepare(states[0])
    for i, block in enumerate(model.layers):
        assert torch.equal(block(states[i], rotary, mask)[0], states[i + 1])
    assert torch.equal(model.lm_head(model.norm(states[2])), out.logits)
    assert torch.equal(model.lm_head(model.hidden(ids)), out.logits)
    assert (
        model(ids).hidden_states is None
        and model(ids, output_router_logits=True).router_logits == []
    )


def test_embeddings_may_be_given_in_place_of_ids():
    model, ids = tiny(), some_ids()
    assert torch.equal(model(embeds=model.embed(ids)).logits, model(ids).logits)


def test_only_the_distance_of_two_tokens_matters_so_shifted_positions_change_nothing():
    model, ids = tiny(), some_ids()
    close(model(ids, positions=torch.arange(9)[None] + 30).logits, model(ids).logits)
    assert not torch.allclose(
        model(ids, positions=torch.arange(9)[None] * 2).logits, model(ids).logits, atol=1e-2
    )


def test_activation_checkpointing_gives_the_same_gradients_and_does_not_disturb_the_cache():
    model, ids = tiny().train(), some_ids()
    frugal = copy.deepcopy(model)
    frugal.activation_checkpointing = True
    for m in (model, frugal):
        F.cross_entropy(m(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for p, q in zip(model.parameters(), frugal.parameters()):
        assert torch.equal(p.grad, q.grad)
    with torch.no_grad():
        cache = frugal.new_cache(2)
        frugal(ids[:, :5], cache=cache)
        close(frugal(ids[:, 5:], cache=cache).logits, model(ids).logits[:, 5:])


def test_the_same_generator_makes_the_same_model_and_the_global_seed_has_no_say():
    torch.manual_seed(1)
    first = tiny()
    torch.manual_seed(2)
    second = tiny()
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))
    other = Transformer(first.config, generator(1, "init"))
    assert not torch.equal(first.embed.weight, other.embed.weight)


def test_matrices_that_write_into_the_stream_start_smaller_by_the_root_of_twice_the_depth():
    model = tiny(
        hidden_size=128, intermediate_size=256, num_hidden_layers=8, initializer_range=0.02
    )
    block = model.layers[3]
    assert block.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(
        0.02 / 4, rel=0.05
    )  # sqrt(2 * 8) = 4
    assert torch.equal(block.input_layernorm.weight, torch.ones(128))


def test_a_tied_head_is_the_embedding_itself():
    model = tiny(tie_word_embeddings=True)
    assert model.lm_head.weight is model.embed.weight
    assert (
        sum(p.numel() for p in tiny().parameters()) - sum(p.numel() for p in model.parameters())
        == 50 * 32
    )


FUSED = [
    {"model_type": "llama"},
    {"model_type": "qwen2"},
    {"model_type": "qwen3"},
    {"sliding_window": 3},
    {"model_type": "olmoe", "num_experts": 3},
    {"model_type": "mixtral", "num_experts": 3},
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
]


@pytest.mark.parametrize("change", FUSED, ids=str)
@torch.inference_mode()
def test_a_fused_model_computes_the_same_in_one_pass_token_by_token_and_with_padding(change):
    model, ids = tiny(**change), some_ids()
    noise = generator(3, "noise")
    for p in model.parameters():  # the norms too, so that one head's weights at another would show
        p.add_(0.1 * torch.randn(p.shape, generator=noise))
    real = torch.tensor([[True] * 9, [False] * 4 + [True] * 5])
    fused = copy.deepcopy(model).fuse()
    close(fused(ids).logits, model(ids).logits)
    close(
        fused(ids, attention_mask=real).logits[real], model(ids, attention_mask=real).logits[real]
    )
    cache = fused.new_cache(1)
    steps = [fused(part, cache=cache).logits for part in ids[:1].split([3, 1, 1, 1, 2, 1], dim=1)]
    close(torch.cat(steps, 1), model(ids[:1]).logits)


def test_a_fused_model_has_as_many_numbers_in_fewer_matrices_and_asks_for_no_gradient():
    model = tiny(model_type="llama")
    fused = copy.deepcopy(model).fuse()
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(fused) == count(model)
    assert len(list(model.parameters())) - len(list(fused.parameters())) == 2 * (
        3 - 1 + 2 - 1
    )  # two blocks
    assert not any(p.requires_grad for p in fused.parameters())


def test_a_fused_model_is_neither_saved_nor_adapted_under_names_that_no_reader_knows(tmp_path):
    fused = tiny(model_type="llama").fuse()
    with pytest.raises(InputError, match="save it before Transformer.fuse"):
        save_pretrained(fused, tmp_path)
    with pytest.raises(InputError, match="no linear layer is called q_proj"):
        add_lora(fused)
    assert not list(tmp_path.iterdir())


def test_it_learns_one_batch_by_heart():
    model, ids = tiny(initializer_range=0.05), some_ids(4, 12)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 < math.log(50)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_size": 30}, "hidden_size 30 is not divisible by num_attention_heads 4"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 must be a whole number of at least 1"),
        ({"sliding_window": 0}, "sliding_window 0 must be a whole number of at least 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step 0 must be a whole number"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps 'x' must be a number of at least 0"),
        (
            {"layer_types": ["full_attention"]},
            "give each of the 2 layers full_attention or sliding",
        ),
        ({"layer_types": ["linear_attention"] * 2}, "layer_types .'linear_attention'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value"),
        (
            {"num_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok 3 must lie between 1 and",
        ),
    ],
)
def test_an_impossible_shape_is_refused_with_its_numbers(change, words):
    with pytest.raises(InputError, match=words):
        tiny(**change)
