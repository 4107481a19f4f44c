"""LoRA: the formula by hand, what training may change, and adapter files in both
directions with the `peft` package."""

import json
import math
import random

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minilm import InputError
from minilm.data import generator
from minilm.lora import (
    READ,
    SILENT,
    LoRALinear,
    add_lora,
    extend_vocabulary,
    load_adapter,
    lora_layers,
    merge_lora,
    save_adapter,
    unmerge_lora,
)
from minilm.transformer import Config, Transformer
from minilm.weights import load_pretrained, save_pretrained

IDS = torch.randint(64, (2, 9), generator=generator(0, "ids"))


def tiny(**changes):
    config = Config(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "model_type": "llama",
        }
        | changes
    )
    return Transformer(config, generator(0, "init"))


def adapted(model=None, **arguments):
    """A model with adapters whose B is no longer zero."""
    model = model or tiny()
    add_lora(model, **{"rank": 4, "alpha": 8, "generator": generator(0, "lora")} | arguments)
    for i, layer in enumerate(lora_layers(model).values()):
        torch.nn.init.normal_(layer.lora_B, std=0.3, generator=generator(i, "B"))
    return model


def linear_with(weight, rank=1, alpha=2.0, rslora=False):
    linear = torch.nn.Linear(len(weight[0]), len(weight), bias=False)
    linear.weight = torch.nn.Parameter(torch.tensor(weight), requires_grad=False)
    return LoRALinear(linear, rank, alpha, 0.0, rslora, None)


def test_the_formula_by_hand():
    # W = [[1 0 0] [0 1 0]], A = [1 2 3], B = [1, -1], alpha/r = 2, x = (1, 1, 1):
    # A x = 6, y = W x + 2 B 6 = (1, 1) + (12, -12)
    layer = linear_with([[1.0, 0, 0], [0, 1, 0]])
    layer.lora_A.data, layer.lora_B.data = torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0], [-1]])
    assert layer(torch.ones(3)).tolist() == [13, -11]
    layer.merge()
    assert layer.weight.tolist() == [[3, 4, 6], [-2, -3, -6]]


def test_rslora_divides_by_the_root_of_the_rank():
    assert linear_with([[1.0] * 9] * 9, rank=4, alpha=8).scale == 2
    assert linear_with([[1.0] * 9] * 9, rank=4, alpha=8, rslora=True).scale == 4


def test_before_training_nothing_has_changed_and_the_first_gradient_goes_to_b_alone():
    model = tiny()
    before = model(IDS).logits
    add_lora(model)
    assert torch.equal(model(IDS).logits, before)
    model(IDS).logits.square().mean().backward()
    for layer in lora_layers(model).values():
        assert layer.lora_B.grad.abs().max() > 0
        assert layer.lora_A.grad.abs().max() == 0


def test_training_moves_a_and_b_and_not_one_bit_of_anything_else():
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1
    )
    model(IDS).logits.square().mean().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (".lora_" not in name), name


def test_the_initial_a_is_uniform_as_in_the_reference():
    layer = linear_with([[0.0] * 400] * 2, rank=50)
    assert layer.lora_A.abs().max() <= 1 / math.sqrt(400)
    assert layer.lora_A.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.03)


def test_dropout_acts_in_training_only():
    model = adapted(dropout=0.5)
    assert not torch.equal(model.train()(IDS).logits, model(IDS).logits)
    assert torch.equal(model.eval()(IDS).logits, model(IDS).logits)


def test_an_adapter_takes_over_the_mode_of_its_model(tmp_path):
    save_adapter(adapted(dropout=0.5), tmp_path)
    model = tiny().eval()
    load_adapter(model, tmp_path)
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_merged_and_unmerged_models_agree_and_unmerging_restores_every_bit():
    model = adapted().eval()
    weights, logits = (
        {n: m.weight.clone() for n, m in lora_layers(model).items()},
        model(IDS).logits,
    )
    merge_lora(model)
    torch.testing.assert_close(model(IDS).logits, logits, atol=1e-5, rtol=0)
    for name, layer in lora_layers(model).items():
        assert torch.linalg.matrix_rank(layer.weight - weights[name], rtol=1e-4) <= 4
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(model)
    with pytest.raises(ValueError, match="unmerge_lora first"):
        model.train()(IDS)
    unmerge_lora(model.eval())
    assert all(torch.equal(m.weight, weights[n]) for n, m in lora_layers(model).items())
    assert torch.equal(model(IDS).logits, logits)


def test_merging_for_good_leaves_an_ordinary_checkpoint(tmp_path):
    model = adapted()
    logits = model(IDS).logits
    with pytest.raises(InputError, match="save_adapter"):
        save_pretrained(model, tmp_path)
    merge_lora(model, keep=False)
    assert not lora_layers(model)
    assert type(model.layers[0].mlp.up_proj) is type(tiny().layers[0].mlp.up_proj)
    assert all(p.requires_grad for p in model.parameters())
    save_pretrained(model, tmp_path)
    torch.testing.assert_close(load_pretrained(tmp_path)[0](IDS).logits, logits, atol=1e-5, rtol=0)


def test_merging_small_differences_into_bfloat16_warns_that_they_are_lost():
    model = adapted().to(torch.bfloat16)
    for layer in lora_layers(model).values():
        layer.lora_B.data *= 1e-3
    with pytest.warns(UserWarning, match="rounds away"):
        merge_lora(model)


def test_full_rank_reaches_any_target_and_rank_one_does_not():
    gen = generator(3, "target")
    target, x = torch.randn(4, 4, generator=gen), torch.randn(64, 4, generator=gen)
    errors = []
    for rank in (1, 4):
        layer = linear_with([[0.0] * 4] * 4, rank=rank, alpha=rank)
        optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], 0.05)
        for _ in range(400):
            loss = (layer(x) - x @ target.T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors.append(loss.item())
    assert errors[1] < 1e-3 < 0.1 < errors[0]


def test_adding_twice_and_adding_to_nothing_are_refused():
    with pytest.raises(ValueError, match="already"):
        add_lora(adapted())
    with pytest.raises(InputError, match="w_proj"):
        add_lora(tiny(), targets=("w_proj",))
    with pytest.raises(InputError, match="no linear layer is called vproj: "):
        add_lora(tiny(), targets=("q_proj", "vproj"))
    with pytest.raises(ValueError, match="nothing to take back"):
        unmerge_lora(tiny())
    with pytest.raises(InputError, match="LoRA rank 0"):
        add_lora(tiny(), rank=0)


# --- a longer vocabulary

def test_a_longer_vocabulary_changes_no_old_logit_and_its_rows_are_means_of_the_pieces():
    model = tiny()
    before, embed, head = (
        model(IDS).logits,
        model.embed.weight.detach().clone(),
        model.lm_head.weight.detach().clone(),
    )
    extend_vocabulary(model, [[3, 5], [7], []])
    assert torch.equal(model(IDS).logits[..., :64], before)
    for old, new in ((embed, model.embed.weight), (head, model.lm_head.weight)):
        assert torch.equal(new[:64], old)
        torch.testing.assert_close(
            new[64:], torch.stack([(old[3] + old[5]) / 2, old[7], old.mean(0)])
        )
    assert model.config.vocab_size == model.embed.num_embeddings == model.lm_head.out_features == 67


def test_mean_rows_get_at_most_n_of_v_plus_n_of_the_probability_whatever_the_context():
    model, n = tiny(initializer_range=0.5), 16
    extend_vocabulary(model, [[] for _ in range(n)])
    p = model(IDS).logits.softmax(-1)[..., 64:].sum(-1)
    assert 0 < p.max() <= n / (64 + n)
    model.lm_head.weight.data[64:] = (
        0  # what another initial value does: trained logits are mostly negative, so zero is a lot
    )
    model.lm_head.weight.data[:64] -= 30 * model.hidden(IDS)[0, 0].sign() / 32
    assert model(IDS).logits[0, 0].softmax(-1)[64:].sum() > n / (64 + n)


def test_a_tied_matrix_is_extended_once_and_the_checkpoint_loads_everywhere(tmp_path):
    model = tiny(tie_word_embeddings=True)
    extend_vocabulary(model, [[1, 2]] * 6)
    assert model.lm_head.weight is model.embed.weight
    save_pretrained(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
    assert theirs.config.vocab_size == load_pretrained(tmp_path)[0].config.vocab_size == 70


def test_no_new_token_changes_nothing_and_an_id_beyond_the_rows_is_refused():
    model = tiny()
    extend_vocabulary(model, [])
    assert model.config.vocab_size == len(model.lm_head.weight) == 64
    with pytest.raises(InputError, match="the id 65, but the model has 64 rows"):
        extend_vocabulary(model, [[1]], first=65)


def test_spare_rows_behind_the_tokenizers_last_token_are_used_first():
    model = tiny()
    old = model.embed.weight.detach().clone()
    extend_vocabulary(model, [[0], [1]], first=60)
    assert torch.equal(model.embed.weight, torch.cat((old[:60], old[:2], old[62:])))
    extend_vocabulary(model, [[0]] * 6, first=60)
    assert model.config.vocab_size == 66


def test_an_adapter_carries_the_longer_vocabulary_and_fits_no_shorter_one(tmp_path):
    model = tiny()
    extend_vocabulary(model, [[1, 2]] * 6)
    adapted(model).embed.weight.requires_grad_()
    save_adapter(model, tmp_path)
    with pytest.raises(InputError, match=r"shape \[70, 32\], \[64, 32\] is needed"):
        load_adapter(tiny(), tmp_path)
    longer = tiny()
    extend_vocabulary(longer, [[1, 2]] * 6)
    load_adapter(longer, tmp_path)
    assert torch.equal(longer(IDS).logits, model(IDS).logits)


# --- files

@pytest.mark.parametrize("arguments", [{}, {"rslora": True}, {"targets": ("q_proj", "v_proj")}])
@pytest.mark.parametrize("tied", [False, True])
def test_peft_reads_what_we_write(tmp_path, arguments, tied):
    model = tiny(tie_word_embeddings=tied)
    save_pretrained(model, tmp_path / "base")
    adapted(model, **arguments)
    model.embed.weight.requires_grad_()
    model.embed.weight.data += 0.1
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
    again, _ = load_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\.(self_attn|mlp)\.(k|up)_proj"},
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 9},
        },
        {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {
            "target_modules": ["o_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ],
)
def test_we_read_what_peft_writes(tmp_path, settings):
    save_pretrained(tiny(tie_word_embeddings="ensure_weight_tying" in settings), tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, task_type="CAUSAL_LM", init_lora_weights=False, **settings
    )
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours, _ = load_pretrained(tmp_path / "base")
    load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=0)


def test_an_adapter_written_by_hand_with_literal_names_loads(tmp_path):
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {
        name.format(i, x): torch.full((1, 32) if x == "A" else (32, 1), 0.1)
        for i in (0, 1)
        for x in "AB"
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}'
    )
    model = tiny()
    expected = model.layers[0].self_attn.q_proj.weight + 0.01  # s B A = 1 * 0.1 * 0.1 everywhere
    load_adapter(model, tmp_path)
    merge_lora(model.eval())
    torch.testing.assert_close(model.layers[0].self_attn.q_proj.weight, expected)


UP = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda t, c: t.pop(UP.format("B")), "lacks base_model.*mlp.up_proj.lora_B"),
        (
            lambda t, c: t.update({"base_model.model.extra": torch.zeros(1)}),
            "has unexpected base_model.model.extra",
        ),
        (
            lambda t, c: t.update({UP.format("A"): torch.zeros(4, 31)}),
            r"shape \[4, 31\], \[4, 32\]",
        ),
        (lambda t, c: t[UP.format("A")].fill_(float("nan")), "NaN"),
        (lambda t, c: c.update(r=5), r"shape \[4, 32\], \[5, 32\]"),
        (lambda t, c: c.update(use_dora=True), "use_dora True is not read"),
        (lambda t, c: c.update(bias="all"), "bias 'all' is not read"),
        (lambda t, c: c.update(peft_type="IA3"), "peft_type 'IA3' is not read"),
        (lambda t, c: c.update(init_lora_weights="pissa"), "init_lora_weights 'pissa' is not read"),
        (lambda t, c: c.update(target_parameters=["experts.gate_up_proj"]), "target_parameters"),
        (lambda t, c: c.update(trainable_token_indices=[1]), "trainable_token_indices"),
        (lambda t, c: c.update(modules_to_save=["score"]), "'score'"),
        (lambda t, c: c.update(target_modules=["c_attn"]), "names no linear layer"),
        (lambda t, c: c.update(r=0), "adapter_config.json: LoRA rank 0: give 1 or more"),
        *[
            (lambda t, c, key=key, bad=bad: c.update({key: bad}), f"adapter_config.json: .*{words}")
            for key, bad, words in (
                ("r", None, "rank None"),
                ("r", "8", "rank '8'"),
                ("r", True, "rank True"),
                ("lora_alpha", "x", "alpha 'x'"),
                ("lora_alpha", float("nan"), "alpha nan"),
                ("rank_pattern", 5, "rank_pattern 5"),
                ("alpha_pattern", {"q_proj": "1"}, "alpha '1'"),
                ("modules_to_save", True, "modules_to_save True"),
                ("target_modules", 1, "target_modules 1"),
                ("target_modules", None, "target_modules None"),
                ("use_rslora", "false", "use_rslora 'false' must be true or false"),
                *(("lora_dropout", x, "lora_dropout") for x in ("x", 3, -1, None)),
                ("future_formula", {"gamma": 2}, "future_formula {'gamma': 2} is not read"),
                ("megatron_config", {"a": 1}, "megatron_config"),
                ("peft_type", None, "peft_type None"),
                ("layers_to_transform", [0], "layers_to_transform"),
                ("exclude_modules", ["up_proj"], "exclude_modules"),
                ("kasa_config", {"a": 1}, "kasa_config"),
            )
        ],
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_leaves_the_model_as_it_was(
    tmp_path, damage, words
):
    save_adapter(adapted(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors, config = load_file(file), json.loads((tmp_path / "adapter_config.json").read_text())
    damage(tensors, config)
    save_file(tensors, file)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = tiny()
    with pytest.raises(InputError, match=words):
        load_adapter(model, tmp_path)
    assert not lora_layers(model)
    assert torch.equal(model(IDS).logits, tiny()(IDS).logits)


def test_a_vocabulary_of_another_size_is_refused(tmp_path):
    model = adapted()
    model.embed.weight.requires_grad_()
    save_adapter(model, tmp_path)
    with pytest.raises(
        InputError, match=r"embed_tokens.weight has shape \[64, 32\], \[80, 32\] is needed"
    ):
        load_adapter(tiny(vocab_size=80), tmp_path)


# --- the whole range of files, against PEFT

MIXTURES = {"mixtral": {}, "qwen3_moe": {"moe_intermediate_size": 24}, "olmoe": {}, "qwen2_moe": {
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}}
EXPERTS = ("gate_proj", "up_proj", "down_proj")
CHOICES = [
    ("q_proj", "v_proj"),
    EXPERTS,
    ("down_proj",),
    (*EXPERTS, "o_proj"),
    ("gate_proj", "up_proj"),
    ("gate_proj",),
    ("up_proj",),
    ("gate_proj", "down_proj"),
    ("up_proj", "down_proj", "q_proj"),
]


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("targets", CHOICES, ids="+".join)
def test_an_adapter_of_a_mixture_means_the_same_to_peft_or_is_not_written(
    family, targets, tmp_path
):
    model = tiny(model_type=family, num_experts=3, norm_topk_prob=True, **MIXTURES[family]).eval()
    save_pretrained(model, tmp_path / "base")
    experts = set(targets) & set(EXPERTS)
    if experts and (family == "qwen2_moe" or experts not in ({"down_proj"}, set(EXPERTS))):
        with pytest.warns(
            UserWarning,
            match="PEFT cannot read an adapter of the experts' .*: save_adapter will refuse it",
        ):
            adapted(model, targets=targets)
        with pytest.raises(
            InputError, match="PEFT would read an adapter of the experts' .* otherwise: merge_lora"
        ):
            save_adapter(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
        return
    adapted(model, targets=targets)
    save_adapter(model, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)


def random_adapter(rng):
    """Settings of a LoraConfig; about half of them are plain LoRA."""
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {
        "r": rng.choice([1, 3]),
        "lora_alpha": rng.choice([1, 5, 16]),
        "lora_dropout": rng.choice([0.0, 0.1]),
        "use_rslora": rng.random() < 0.3,
        "target_modules": rng.sample(layers, rng.randrange(1, 4)),
    }
    if rng.random() < 0.5:
        settings["rank_pattern"] = {
            rng.choice(
                [rf"layers.{rng.randrange(2)}.self_attn.q_proj", "up_proj", r".*\.1\..*down_proj"]
            ): 2
        }
    if rng.random() < 0.5:
        settings["alpha_pattern"] = {rng.choice(["v_proj", r"layers\.0\..*", "(q|k)_proj"]): 9}
    if rng.random() < 0.2:
        settings["modules_to_save"] = rng.choice(
            [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]]
        )
    if rng.random() < 0.4:
        settings |= rng.choice(
            [
                {"use_dora": True},
                {"bias": "all"},
                {"layers_to_transform": [1]},
                {"exclude_modules": ["q_proj"]},
                {"lora_bias": True},
                {"layer_replication": [[0, 2], [1, 2]]},
                {"trainable_token_indices": [1, 5]},
            ]
        )
    return settings


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_any_fields_gives_pefts_logits_or_is_refused(tied, tmp_path):
    save_pretrained(tiny(tie_word_embeddings=tied), tmp_path / "base")
    read = 0
    for seed in range(100):
        torch.manual_seed(seed)  # (PEFT's own draws)
        settings = random_adapter(random.Random(seed))
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        try:
            theirs = peft.get_peft_model(
                base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
            ).eval()
        except ValueError:  # (settings that PEFT itself does not take together)
            continue
        for p in theirs.parameters():
            if p.requires_grad:
                p.data += 0.05 * torch.randn(p.shape, generator=generator(seed, "trained"))
        theirs.save_pretrained(tmp_path / "adapter")
        ours, _ = load_pretrained(tmp_path / "base")
        plain = not set(settings) & {
            "use_dora",
            "bias",
            "layers_to_transform",
            "exclude_modules",
            "lora_bias",
            "layer_replication",
            "trainable_token_indices",
        }
        if not plain:
            with pytest.raises(InputError, match="is not read"):
                load_adapter(ours, tmp_path / "adapter")
            continue
        load_adapter(ours, tmp_path / "adapter")
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)
        if "modules_to_save" not in settings:
            # with its own ranks per layer it can be read again
            save_adapter(ours, tmp_path / "again")
            again, _ = load_pretrained(tmp_path / "base")
            load_adapter(again, tmp_path / "again")
            assert torch.equal(again(IDS).logits, ours(IDS).logits)
        read += 1
    assert read > 12


def test_every_field_of_pefts_configuration_is_known_or_refused(tmp_path):
    """A field that this release of PEFT does not have, switched on, may be a new formula."""
    save_adapter(adapted(), tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for field in (*vars(peft.LoraConfig()), "future_formula"):
        if field in READ | SILENT:
            continue
        for off in (None, False, [], {}):
            file.write_text(json.dumps(config | {field: off}))
            load_adapter(tiny(), tmp_path)
        for on in (True, {"a": 1}, [1], 3, "x"):
            file.write_text(json.dumps(config | {field: on}))
            with pytest.raises(InputError, match=field):
                load_adapter(tiny(), tmp_path)
