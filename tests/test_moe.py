"""The mixture of experts: its dispatch against the dense sum, its laws, its losses by hand,
upcycling, and the files of four families."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from minilm import InputError
from minilm.data import generator
from minilm.lora import add_lora, lora_layers
from minilm.moe import MoE, TopKRouter, load_balancing_loss, router_stats, upcycle
from minilm.ops import grouped_linear, grouped_linear_plain
from minilm.transformer import MLP, Config, Transformer
from minilm.weights import load_pretrained, save_pretrained


def mixture(D=12, width=20, E=4, K=2, norm=True, shared=None, seed=0):
    gen = generator(seed, "mixture")
    moe = MoE(D, [MLP(D, width) for _ in range(E)], K, norm, MLP(D, shared) if shared else None)
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(0.0, 0.5, generator=gen)
    return moe


def dense_all(moe, x):
    """The oracle: every expert reads every token, and weights that are zero elsewhere pick the
    chosen ones."""
    p = F.linear(x, moe.gate.weight).softmax(-1)
    kth = p.topk(moe.gate.experts_per_token).values[..., -1:]
    w = p * (p >= kth)
    if moe.gate.norm_topk_prob:
        w = w / w.sum(-1, keepdim=True)
    y = sum(w[..., e, None] * expert(x) for e, expert in enumerate(moe.experts))
    if hasattr(moe, "shared_expert"):
        y = y + torch.sigmoid(moe.shared_expert_gate(x)) * moe.shared_expert(x)
    return y


def value_and_gradients(function, moe, x, weight):
    moe.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    (y * weight).sum().backward()
    return [
        y,
        x.grad,
        *(p.grad if p.grad is not None else torch.zeros_like(p) for p in moe.parameters()),
    ]


def tiny(family="llama", **changes):
    values = dict(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        model_type=family,
        head_dim=8,
    )
    return Transformer(Config(**(values | changes)), generator(0, "init")).eval()


IDS = torch.randint(50, (2, 11), generator=generator(0, "ids"))

# --- dispatch


@pytest.mark.parametrize("norm", [True, False], ids=["renormalised", "as they are"])
@pytest.mark.parametrize("E, K, T", [(4, 2, 9), (4, 1, 9), (4, 4, 5), (7, 3, 1), (16, 2, 3)])
@pytest.mark.parametrize("grouped", [False, True], ids=["one by one", "grouped"])
def test_sending_tokens_to_experts_equals_all_experts_on_all_tokens_in_value_and_gradients(
    grouped, E, K, T, norm
):
    # 16 experts and 6 tokens: most experts get nothing; one token: all but K get nothing
    moe = mixture(E=E, K=K, norm=norm)
    moe.grouped = grouped
    x, weight = (
        torch.randn(2 if T > 1 else 1, T, 12, generator=generator(1, "x")),
        torch.randn(12, generator=generator(1, "w")),
    )
    for ours, oracle in zip(
        value_and_gradients(lambda x: moe(x)[0], moe, x, weight),
        value_and_gradients(lambda x: dense_all(moe, x), moe, x, weight),
    ):
        torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("E, K, T", [(4, 2, 9), (4, 1, 9), (4, 4, 5), (7, 3, 1), (16, 2, 3)])
def test_sorting_the_tokens_first_equals_the_plain_loop_over_the_experts(E, K, T):
    moe = mixture(E=E, K=K)
    x, weight = (
        torch.randn(1, T, 12, generator=generator(1, "x")),
        torch.randn(12, generator=generator(1, "w")),
    )
    for sorted_, plain in zip(
        value_and_gradients(lambda x: moe(x)[0][0], moe, x, weight),
        value_and_gradients(moe.plain, moe, x, weight),
    ):
        torch.testing.assert_close(sorted_, plain, rtol=1e-4, atol=1e-5)


def test_gradients_are_the_same_numbers_in_every_run_on_two_threads():
    # three experts add to a token's gradient: in another order the last bits differ
    moe = mixture(D=64, E=8, K=3, width=32)
    x = torch.randn(1, 600, 64, generator=generator(1, "x"))
    weight = torch.randn(64, generator=generator(1, "w"))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    runs = [value_and_gradients(lambda x: moe(x)[0], moe, x, weight) for _ in range(4)]
    torch.set_num_threads(threads)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again))


def test_odd_widths_that_the_grouped_kernel_refuses_take_the_plain_road():
    moe = mixture(D=7, width=11)
    moe.grouped = True
    x = torch.randn(1, 9, 7, generator=generator(1, "x"))
    for ours, oracle in zip(
        value_and_gradients(lambda x: moe(x)[0], moe, x, torch.ones(7)),
        value_and_gradients(lambda x: dense_all(moe, x), moe, x, torch.ones(7)),
    ):
        torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-5)


def test_grouped_linear_equals_a_loop_over_the_groups_also_when_some_are_empty():
    gen = generator(2, "grouped")
    x, weight = (
        torch.randn(10, 8, generator=gen, requires_grad=True),
        torch.randn(4, 12, 8, generator=gen, requires_grad=True),
    )
    ends = torch.tensor([3, 3, 10, 10], dtype=torch.int32)  # groups of 3, 0, 7 and 0 rows
    one, many = grouped_linear_plain(x, weight, ends), grouped_linear(x, weight, ends)
    torch.testing.assert_close(many, one)
    for a, b in zip(
        torch.autograd.grad((many**2).sum(), (x, weight)),
        torch.autograd.grad((one**2).sum(), (x, weight)),
    ):
        torch.testing.assert_close(a, b)
    assert grouped_linear(x[:0], weight, torch.zeros(4, dtype=torch.int32)).shape == (0, 12)


def test_bfloat16_mixtures_agree_on_both_roads_also_under_autocast():
    moe, x = mixture(D=16, width=24), torch.randn(2, 9, 16, generator=generator(1, "x"))
    with torch.autocast("cpu", torch.bfloat16):
        one, moe.grouped = moe(x)[0], True
        torch.testing.assert_close(moe(x)[0], one, rtol=0.03, atol=0.3)
    moe, x = moe.bfloat16(), x.bfloat16()
    many, moe.grouped = moe(x)[0], False
    torch.testing.assert_close(many, moe(x)[0], rtol=0.03, atol=0.3)


def test_a_shared_expert_reads_every_token_through_its_own_gate():
    moe, x = mixture(shared=28), torch.randn(2, 5, 12, generator=generator(1, "x"))
    torch.testing.assert_close(moe(x)[0], dense_all(moe, x), rtol=1e-4, atol=1e-4)


def test_permuting_experts_together_with_their_router_rows_changes_nothing():
    moe, x, turn = mixture(), torch.randn(2, 5, 12, generator=generator(1, "x")), [2, 0, 3, 1]
    y = moe(x)[0]
    moe.gate.weight.data = moe.gate.weight.data[turn]
    moe.experts = torch.nn.ModuleList(moe.experts[i] for i in turn)
    torch.testing.assert_close(moe(x)[0], y, rtol=1e-5, atol=1e-5)


def test_router_logits_come_back_before_the_softmax_and_nothing_is_left_on_the_module():
    model = upcycle(tiny(), 4)
    before = {id(v) for m in model.modules() for v in vars(m).values()}
    logits = model(IDS, output_router_logits=True).router_logits
    assert [tuple(l.shape) for l in logits] == [(2, 11, 4)] * 3
    assert model(IDS).router_logits is None
    assert {id(v) for m in model.modules() for v in vars(m).values()} == before
    attention = model.layers[0].self_attn  # the first layer's by hand
    states = model(IDS, output_hidden_states=True).hidden_states
    rotary, mask = model.prepare(states[0])
    x = states[0] + attention(model.layers[0].input_layernorm(states[0]), rotary, mask)
    torch.testing.assert_close(
        logits[0],
        F.linear(model.layers[0].post_attention_layernorm(x), model.layers[0].mlp.gate.weight),
    )


def test_the_router_by_hand():
    # logits (log 4, log 3, log 2, log 1): p = .4 .3 .2 .1;
    # the two best are .4 and .3, renormalised 4/7 and 3/7
    router = TopKRouter(1, 4, 2, norm_topk_prob=True)
    router.weight.data = torch.tensor([[4.0], [3], [2], [1]]).log()
    logits, weights, indices = router(torch.ones(1, 1))
    torch.testing.assert_close(weights, torch.tensor([[4 / 7, 3 / 7]]))
    assert indices.tolist() == [[0, 1]]
    torch.testing.assert_close(logits.softmax(-1), torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    router.norm_topk_prob = False
    torch.testing.assert_close(router(torch.ones(1, 1))[1], torch.tensor([[0.4, 0.3]]))


# --- losses and statistics


def logits_of(*rows):
    return torch.tensor(rows).log()[None]  # [1, N, E], one batch of these probabilities


def test_the_balancing_loss_is_1_when_balanced_and_E_over_K_when_collapsed():
    balanced = logits_of(
        [0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7]
    )
    assert load_balancing_loss([balanced], 1).item() == pytest.approx(1.0)
    tiny_ = 1e-9
    collapsed = logits_of(*[[0.5 - tiny_, 0.5 - tiny_, tiny_, tiny_]] * 5)
    assert load_balancing_loss([collapsed], 2).item() == pytest.approx(4 / 2, abs=1e-5)
    one = logits_of(*[[1 - 3 * tiny_, tiny_, tiny_, tiny_]] * 5)
    assert load_balancing_loss([one], 1).item() == pytest.approx(4.0, abs=1e-5)


def test_the_balancing_loss_by_hand_and_beside_hugging_faces():
    # K = 1: two tokens choose expert 0, one chooses 1. f = N/K * shares = 2 * (2/3, 1/3),
    # P = mean p = (.6, .4): 4/3 * .6 + 2/3 * .4
    logits = logits_of([0.8, 0.2], [0.7, 0.3], [0.3, 0.7])
    assert load_balancing_loss([logits], 1).item() == pytest.approx(4 / 3 * 0.6 + 2 / 3 * 0.4)
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    x = torch.randn(2, 7, 5, generator=generator(0, "logits"))
    for K in (1, 2, 3):
        theirs = load_balancing_loss_func((x.flatten(0, 1),), 5, K)
        torch.testing.assert_close(load_balancing_loss([x], K) * K, theirs)


def test_one_layers_imbalance_cannot_hide_anothers():
    left, right = logits_of([0.9, 0.1], [0.9, 0.1]), logits_of([0.1, 0.9], [0.1, 0.9])
    assert load_balancing_loss([left, right], 1).item() == pytest.approx(
        2 * 0.9
    )  # pooled over layers it would be a perfect 1


def test_masked_tokens_count_neither_in_the_loss_nor_in_the_statistics():
    x, mask = (
        torch.randn(2, 7, 5, generator=generator(0, "logits")),
        torch.zeros(2, 7, dtype=torch.bool),
    )
    mask[0, :3] = mask[1, 2:4] = True
    kept = x[mask][None]
    torch.testing.assert_close(load_balancing_loss([x], 2, mask), load_balancing_loss([kept], 2))
    for a, b in zip(router_stats([x], 2, mask), router_stats([kept], 2)):
        torch.testing.assert_close(a, b)
    nothing = torch.zeros(2, 7, dtype=torch.bool)
    loss = load_balancing_loss([x.requires_grad_()], 2, nothing)
    loss.backward()
    assert loss.item() == 0 and x.grad.abs().max() == 0


def test_router_statistics_by_hand():
    stats = router_stats(
        [logits_of([0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.6, 0.1, 0.3], [0.1, 0.3, 0.6])], 2
    )
    torch.testing.assert_close(stats.score, torch.tensor([[0.35, 0.35, 0.3]]))
    torch.testing.assert_close(stats.first, torch.tensor([[2 / 4, 1 / 4, 1 / 4]]))
    torch.testing.assert_close(
        stats.chosen, torch.tensor([[3 / 4, 3 / 4, 2 / 4]])
    )  # {0,1} {1,0} {0,2} {2,1}


# --- upcycling


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("E, K", [(2, 2), (4, 2), (6, 3)])
def test_an_upcycled_model_computes_the_same_function_and_leaves_the_dense_one_alone(family, E, K):
    model = tiny(family)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    for seed in range(2):
        mixed = upcycle(model, E, K, generator=generator(seed, "router"))
        torch.testing.assert_close(mixed(IDS).logits, model(IDS).logits, rtol=0, atol=1e-4)
    storage = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not storage & {p.untyped_storage().data_ptr() for p in mixed.parameters()}
    experts = [
        p.untyped_storage().data_ptr() for n, p in mixed.named_parameters() if "experts." in n
    ]
    assert len(set(experts)) == len(experts)  # the copies share nothing either
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_only_the_layers_asked_for_become_mixtures_and_the_config_says_so():
    model = upcycle(tiny("qwen3"), 4, layers=[1])
    assert [isinstance(block.mlp, MoE) for block in model.layers] == [False, True, False]
    assert [model.config.has_experts(i) for i in range(3)] == [False, True, False]
    assert len(model(IDS, output_router_logits=True).router_logits) == 1
    fresh = Transformer(model.config)
    assert {n: p.shape for n, p in fresh.state_dict().items()} == {
        n: p.shape for n, p in model.state_dict().items()
    }


def test_after_upcycling_the_loss_gives_the_router_no_gradient_for_K_2_but_does_for_K_1():
    def gradient(K):
        model = upcycle(tiny(), 4, K, generator=generator(0, "router"))
        F.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        return model.layers[0].mlp.gate.weight.grad.norm().item(), model.layers[0].mlp.experts[
            0
        ].up_proj.weight.grad.norm().item()

    router, expert = gradient(2)
    assert router < 1e-6 * expert
    with pytest.warns(UserWarning, match="experts_per_token=1"):
        router, expert = gradient(1)
    assert router > 1e-3 * expert


def test_k_1_warns_and_scales_the_output_by_the_routers_probability():
    model = tiny()
    with pytest.warns(UserWarning, match="experts_per_token=1"):
        mixed = upcycle(model, 4, 1)
    assert not mixed.config.norm_topk_prob and not mixed.layers[0].mlp.gate.norm_topk_prob
    x = torch.randn(1, 5, 32, generator=generator(0, "x"))
    y, logits = mixed.layers[0].mlp(x)
    torch.testing.assert_close(
        y, model.layers[0].mlp(x) * logits.softmax(-1).max(-1, keepdim=True).values
    )


def test_without_copies_the_new_experts_are_random_and_the_function_changes():
    model = tiny()
    mixed = upcycle(model, 4, copies=False, generator=generator(0, "router"))
    moe = mixed.layers[0].mlp
    assert torch.equal(moe.experts[0].up_proj.weight, model.layers[0].mlp.up_proj.weight)
    assert moe.experts[1].up_proj.weight.std().item() == pytest.approx(0.2, rel=0.1)
    assert moe.experts[1].down_proj.weight.std().item() == pytest.approx(
        0.2 / math.sqrt(6), rel=0.1
    )
    assert not torch.equal(moe.experts[1].up_proj.weight, moe.experts[2].up_proj.weight)
    assert (mixed(IDS).logits - model(IDS).logits).abs().max() > 0.01


def test_tied_heads_stay_tied():
    mixed = upcycle(tiny(tie_word_embeddings=True), 2)
    assert mixed.lm_head.weight is mixed.embed.weight


@pytest.mark.parametrize(
    "change, arguments, words",
    [
        ({}, (1,), "at least 2"),
        ({}, (4, 0), "1 to all"),
        ({}, (4, 5), "1 to all"),
        ({}, (4, 2, [0, 0]), "once"),
        ({}, (4, 2, [3]), "from 0 to 2"),
        ({}, (4, 2, []), "once"),
        ({"mlp_bias": True}, (4,), "with biases"),
        ({"attention_bias": True}, (4,), "with biases"),
        ({"model_type": "mixtral", "num_experts": 4}, (4,), "already"),
    ],
)
def test_what_cannot_be_upcycled_is_refused_by_name(change, arguments, words):
    with pytest.raises(InputError, match=words):
        upcycle(tiny(**change), *arguments)


# --- files

HF = {  # class, and what makes its details visible at a tiny size
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=6)),
    "qwen2_moe": (
        "Qwen2Moe",
        dict(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            norm_topk_prob=False,
            mlp_only_layers=[1],
        ),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(
            num_experts=5,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            head_dim=12,
            norm_topk_prob=True,
            decoder_sparse_step=2,
        ),
    ),
    "qwen2_moe, window": (
        "Qwen2Moe",
        dict(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            use_sliding_window=True,
            shared_expert_intermediate_size=40,
            sliding_window=6,
            max_window_layers=2,
        ),
    ),
    "qwen3_moe, window": (
        "Qwen3Moe",
        dict(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            head_dim=12,
            use_sliding_window=True,
            sliding_window=6,
        ),
    ),
    "olmoe": ("Olmoe", dict(num_experts=4, num_experts_per_tok=2, norm_topk_prob=False)),
}


def theirs(family, **changes):
    import transformers

    name, values = HF[family]
    common = dict(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**(common | values | changes))
    ).eval()
    with torch.no_grad():
        for p in model.parameters():  # norms and biases too, so that a forgotten one shows
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


def loaded_by_transformers(folder):
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("family", HF)
def test_every_familys_folder_gives_the_logits_of_transformers_and_is_written_back_for_it(
    family, tmp_path
):
    reference = theirs(family)
    reference.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = reference(IDS).logits
        model, _ = load_pretrained(tmp_path / "theirs")
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-4)
        save_pretrained(model, tmp_path / "ours")
        torch.testing.assert_close(
            loaded_by_transformers(tmp_path / "ours")(IDS).logits, expected, rtol=0, atol=1e-4
        )
        again, _ = load_pretrained(tmp_path / "ours")
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values())
    )


@pytest.mark.parametrize("family", HF)
def test_the_fused_names_of_newer_transformers_in_memory_are_read_as_well(family, tmp_path):
    reference = theirs(family)
    reference.save_pretrained(tmp_path)
    state = {n: t.contiguous().clone() for n, t in reference.state_dict().items()}
    assert any(n.endswith("experts.gate_up_proj") for n in state)
    save_file(state, tmp_path / "model.safetensors")
    model, _ = load_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("norm", [True, False])
def test_whether_weights_are_renormalised_is_read_from_the_file_also_for_one_expert_per_token(
    norm, tmp_path
):
    reference = theirs("qwen3_moe", norm_topk_prob=norm, num_experts_per_tok=1)
    reference.save_pretrained(tmp_path)
    model, _ = load_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=0, atol=1e-4)


def test_a_fused_tensor_of_another_number_of_experts_is_refused(tmp_path):
    reference = theirs("olmoe")
    reference.save_pretrained(tmp_path)
    state = {
        n: t[:3].contiguous() if "experts." in n else t.contiguous()
        for n, t in reference.state_dict().items()
    }
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"shape \[3, 96, 32\], \[4, 96, 32\] is needed"):
        load_pretrained(tmp_path)


def test_a_missing_expert_is_named(tmp_path):
    theirs("mixtral").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        InputError, match="lacks model.layers.1.block_sparse_moe.experts.2.w3.weight"
    ):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "family, layout, changes",
    [
        ("llama", "mixtral", {}),
        (
            "llama",
            "mixtral",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": True},
        ),
        ("mistral", "mixtral", {"sliding_window": 5}),
        ("qwen2", "qwen2_moe", {"tie_word_embeddings": True}),
        ("qwen3", "qwen3_moe", {}),
    ],
)
def test_an_upcycled_model_is_exported_in_a_layout_that_transformers_loads(
    family, layout, changes, tmp_path
):
    dense = tiny(family, **changes)
    with torch.no_grad():
        for p in dense.parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn(p.shape, generator=generator(0, "norms")))
    layers = None if layout == "mixtral" else [0, 2]
    model = upcycle(dense, 4, 2, layers, generator=generator(0, "router"))
    with torch.no_grad():
        for i, p in enumerate(
            p for n, p in model.named_parameters() if "mlp.experts." in n
        ):  # as after training: no two experts alike
            p.add_(0.05 * torch.randn(p.shape, generator=generator(i, "training")))
        save_pretrained(model, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == layout
        expected = model(IDS).logits
        torch.testing.assert_close(
            loaded_by_transformers(tmp_path)(IDS).logits, expected, rtol=0, atol=1e-4
        )
        torch.testing.assert_close(
            load_pretrained(tmp_path)[0](IDS).logits, expected, rtol=0, atol=1e-6
        )


def test_one_expert_per_token_comes_back_as_it_was_and_saving_it_as_mixtral_warns(tmp_path):
    with pytest.warns(UserWarning, match="transformers reads another model"):
        model = upcycle(tiny("llama"), 4, experts_per_token=1)
    with pytest.warns(UserWarning, match="read as such by minilm alone"):
        save_pretrained(model, tmp_path)
    again, _ = load_pretrained(tmp_path)
    assert not again.config.norm_topk_prob
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_experts_with_lora_run_one_by_one_even_if_grouping_was_asked_for():
    model = upcycle(tiny("qwen3"), 4, generator=generator(0, "router"))
    add_lora(model, generator=generator(0, "lora"))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, generator=generator(0, "B"))
    plain = model(IDS).logits
    for block in model.layers:
        block.mlp.grouped = True
    assert torch.equal(model(IDS).logits, plain)


def test_a_layout_that_cannot_say_which_layers_have_experts_is_refused_before_anything_is_written(
    tmp_path,
):
    with pytest.raises(
        InputError, match=r"a mixtral checkpoint cannot say mlp_only_layers \[1, 2\]"
    ):
        save_pretrained(upcycle(tiny("llama"), 4, layers=[0]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_upcycled_model_in_bfloat16_keeps_its_dtype_everywhere():
    model = upcycle(tiny("qwen2").bfloat16(), 3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(IDS).logits.dtype == torch.bfloat16


def test_a_mixture_learns_one_batch_and_all_its_experts_with_it():
    model = Transformer(
        Config(
            **(
                dataclasses.asdict(tiny("qwen3").config)
                | {"model_type": "qwen3_moe", "num_experts": 4}
            )
        ),
        generator(0, "init"),
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        out = model(IDS, output_router_logits=True)
        loss = F.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
        ) + 0.01 * load_balancing_loss(out.router_logits, 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert router_stats(out.router_logits, 2).chosen.min() > 0.05
