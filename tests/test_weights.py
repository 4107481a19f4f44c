"""The weight loader: the same logits as transformers in both directions, a real checkpoint word for word, every kind of damage refused."""

import json
import os
import random
import re
import subprocess
import sys
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilm import InputError
from minilm.data import generator
from minilm.generate import generate, stop_ids
from minilm.rotary import inverse_frequencies
from minilm.tokenizer import train_bpe
from minilm.transformer import Config, Transformer
from minilm.weights import FIELDS, config_json, load_pretrained, read_config, save_pretrained

SHAPE = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
rope = lambda kind, **values: {"rope_parameters": {"rope_theta": 1000.0, "rope_type": kind, **values}}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama, theta": ("Llama", rope("default")),
    "llama, linear": ("Llama", rope("linear", factor=2.0)),
    "llama, llama3": ("Llama", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)),
    "llama, yarn": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama, biases, wide heads, as many key heads": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16,
                                                              "num_key_value_heads": 4}),
    "mistral, window": ("Mistral", {"sliding_window": 5}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, window from layer 1": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}
IDS = torch.randint(99, (2, 24), generator=generator(0, "ids"))


@cache
def reference(family, tied=False):
    """A tiny model of transformers with random weights everywhere: biases and norms too."""
    import transformers

    kind, change = FAMILIES[family]
    config = getattr(transformers, kind + "Config")(**{**SHAPE, **change}, tie_word_embeddings=tied)
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    gen = generator(0, family)
    for p in model.parameters():
        p.data = (p.dim() == 1) + 0.2 * torch.randn(p.shape, generator=gen)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS.to(model.lm_head.weight.device)).logits.float()


close = lambda a, b, atol=1e-4: torch.testing.assert_close(a, b, atol=atol, rtol=0)


# --- parity with transformers

@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers_in_both_directions(family, tied, tmp_path):
    import transformers

    theirs = reference(family, tied)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if tied else "1GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == tied  # one route is sharded, the other is not
    ours, tokenizer = load_pretrained(tmp_path / "theirs")
    assert tokenizer is None and not ours.training
    close(logits(ours), logits(theirs))
    save_pretrained(ours, tmp_path / "ours", max_shard_bytes=10**9 if tied else 20_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() != tied
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())  # nothing missing, unexpected or misshapen
    assert torch.equal(logits(again), logits(theirs))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_is_read_into_any_type_and_written_as_it_is(dtype, tolerance, tmp_path):
    import transformers

    theirs = reference("qwen3")
    expected = logits(theirs)
    save_pretrained(load_from(theirs, tmp_path / "full", dtype), tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {dtype}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == dtype
    ours, _ = load_pretrained(tmp_path / "half", dtype)
    assert ours.lm_head.weight.dtype == dtype
    wide, _ = load_pretrained(tmp_path / "half")  # float32 unless told otherwise
    assert wide.lm_head.weight.dtype == torch.float32
    scale = expected.abs().max()
    for model in (ours, again, wide):
        close(logits(model) / scale, expected / scale, tolerance)


def load_from(theirs, folder, dtype=torch.float32):
    theirs.save_pretrained(folder)
    return load_pretrained(folder, dtype)[0]


def test_a_config_in_the_older_layout_means_the_same(tmp_path):
    """transformers 4 wrote rope_theta and rope_scaling at the top, older ones spell rope_type `type`; fields may be left out."""
    theirs = reference("llama, linear")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    for field in ("attention_bias", "mlp_bias", "head_dim", "tie_word_embeddings", "pad_token_id"):
        config.pop(field, None)
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": 1000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}))
    close(logits(load_pretrained(tmp_path)[0]), logits(theirs))


def test_windows_by_hand(tmp_path):
    def windows(**fields):
        sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8,
                 "num_key_value_heads": 8}
        (tmp_path / "config.json").write_text(json.dumps({**sizes, **fields}))
        return [read_config(tmp_path).window(layer) for layer in range(3)]

    assert windows(model_type="mistral", sliding_window=None) == [None] * 3  # null is not the same as left out
    assert windows(model_type="mistral") == [4096] * 3
    qwen = {"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1}
    assert windows(**qwen, use_sliding_window=True) == [None, 8, 8]
    assert windows(**qwen, use_sliding_window=False) == windows(**qwen) == [None] * 3
    assert windows(**{**qwen, "model_type": "qwen2_moe"}, use_sliding_window=True) == [8, None, None]  # every second layer before the 1st
    assert windows(**{**qwen, "model_type": "qwen3_moe"}, use_sliding_window=True) == [8] * 3
    assert windows(**qwen, use_sliding_window=True, layer_types=["sliding_attention"] * 3) == [8] * 3  # what is spelled out wins
    for blind in ("llama", "olmoe"):  # whose classes know no window, whatever the file says
        assert windows(model_type=blind, sliding_window=8) == [None] * 3


def test_no_number_of_key_heads_means_as_many_as_queries(tmp_path):
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 16}
    for given, read in (({}, 8), ({"num_key_value_heads": None}, 16)):  # left out: Mistral's 8
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", **sizes, **given}))
        assert read_config(tmp_path).num_key_value_heads == read


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_a_field_that_a_config_leaves_out_means_what_its_family_says(family, tmp_path):
    import transformers

    sizes = {"vocab_size": 60_000, "hidden_size": 4096, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **sizes}))
    theirs, ours = transformers.AutoConfig.from_pretrained(tmp_path), read_config(tmp_path)
    for field in ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window",
                  "max_position_embeddings", "num_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size",
                  "shared_expert_intermediate_size", "decoder_sparse_step"):
        said = getattr(theirs, field, None)
        if said is not None and (field != "sliding_window" or said):
            assert getattr(ours, field) == said, field
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_what_was_saved_comes_back_bit_for_bit_with_tokenizer_and_generation_config(tmp_path):
    tokenizer = train_bpe(["ab abc abcd"] * 3, 260)
    model = Transformer(Config(260, 16, 24, 1, 2, tie_word_embeddings=True), generator(0, "init"))
    model.generation_config = {"eos_token_id": [1, 2]}
    save_pretrained(model, tmp_path, tokenizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                                                          "tokenizer_config.json"]
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")  # a tied head is written once
    again, tokenizer_again = load_pretrained(tmp_path)
    assert again.config == model.config and again.generation_config == {"eos_token_id": [1, 2]}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
    assert again.lm_head.weight is again.embed.weight
    assert tokenizer_again.encode("abcd abc") == tokenizer.encode("abcd abc")


# --- a real checkpoint

def test_a_real_checkpoint_tells_its_story_token_for_token(shared):
    folder = shared / "checkpoints" / "stories260K"
    expected = json.loads((folder / "expected.json").read_text())
    model, tokenizer = load_pretrained(folder)
    prompt = tokenizer.encode(expected["prompt"], bos=tokenizer.add_bos)
    assert prompt == expected["prompt_ids"]
    close(model(torch.tensor([prompt])).logits[0, -1], torch.tensor(expected["last_prompt_logits"]))
    ids = generate(model, [prompt], max_new_tokens=len(expected["greedy_ids"]) - len(prompt))[0]
    assert ids == expected["greedy_ids"]
    assert tokenizer.decode(ids, skip_special=True) == expected["text"]


# --- damage: each is one line that names the file, the value and what to do

def change_config(folder, **change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**config, **change}.items() if v != "drop"}))


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def shard(folder, damage):
    save_pretrained(load_pretrained(folder)[0], folder, max_shard_bytes=4000)
    damage(folder, sorted(folder.glob("model-*.safetensors"))[1])


def cut(file, keep=0.5):
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])


def point(folder, elsewhere):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = elsewhere
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def nan(state):
    state["model.norm.weight"][3] = torch.nan


def overflow(state):
    state["model.norm.weight"][3] = -torch.inf


Q = "model.layers.0.self_attn.q_proj.weight"
BAD_CONFIG = {
    "config.json is missing: give a folder in Hugging Face layout": lambda f: (f / "config.json").unlink(),
    "config.json is not valid JSON .*: download or save it again": lambda f: cut(f / "config.json"),
    "config.json holds a list, a JSON object is needed": lambda f: (f / "config.json").write_text("[]"),
    "config.json: model_type 'gpt2' is not read; minilm reads llama, mistral, qwen2": lambda f: change_config(f, model_type="gpt2"),
    "config.json: model_type None is not read": lambda f: change_config(f, model_type="drop"),
    "config.json: the field 'hidden_size' is missing: is it .* of a qwen3 model": lambda f: change_config(f, hidden_size="drop"),
    "config.json: hidden_size '16' must be a whole number of at least 1": lambda f: change_config(f, hidden_size="16"),
    "config.json: num_attention_heads 0 must be a whole number": lambda f: change_config(f, num_attention_heads=0),
    "config.json: num_attention_heads 2 must be a multiple of num_key_value_heads 3": lambda f: change_config(f, num_key_value_heads=3),
    "config.json: rope type 'longrope' is not read; minilm reads default, linear": lambda f: change_config(
        f, rope_scaling={"rope_type": "longrope"}),
    "config.json: rope_scaling of type 'yarn' needs the field 'factor'": lambda f: change_config(f, rope_scaling={"type": "yarn"}),
    "config.json: hidden_act 'gelu' is not read; minilm reads 'silu' only": lambda f: change_config(f, hidden_act="gelu"),
}
BAD_CONFIG |= {f"config.json.* {key} {re.escape(repr(bad))} must be a {kind}": lambda f, key=key, bad=bad: change_config(f, **{key: bad})
               for key, bad, kind in (("rms_norm_eps", "x", "number"), ("rope_theta", [], "number"),
                                      ("decoder_sparse_step", 0, "whole number"), ("hidden_size", 16.0, "whole number"))}
BAD_CONFIG |= {f"config.json(: | holds).*{words}": lambda f, change=change: change_config(f, **change) for words, change in (
    ("unhashable type: 'list'", {"model_type": ["qwen3"]}), (r"rope_scaling \['x'\] must be a JSON object", {"rope_scaling": ["x"]}),
    ("rope_scaling of type 'linear' needs the field 'factor'", {"rope_scaling": {"rope_type": "linear", "factor": None}}),
    ("layer_types .* each of the 1 layers", {"layer_types": ["full_attention"] * 2, "use_sliding_window": True}),
    *((f"{key} {bad!r} must be", {key: bad}) for key, bad in (
        ("hidden_size", True), ("norm_topk_prob", "false"), ("tie_word_embeddings", "false"), ("rope_theta", 0),
        ("rms_norm_eps", float("inf")),
        ("mlp_only_layers", 3), ("use_sliding_window", 1))),
    ("num_hidden_layers 1000000000 is too large", {"num_hidden_layers": 10**9}),
    *((f"factor {bad} .*must be a number above 0", {"rope_scaling": {"type": "linear", "factor": bad}}) for bad in (0, -2, float("inf"))),
    ("'factor', but no rope_type: say which", {"rope_scaling": {"factor": 8.0}}),
    ("'factor', but no rope_type: say which", {"rope_scaling": {"type": None, "factor": 8.0}}),
    ("differs by type of layer .'full_attention'.", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
    ("has a key 'beta', which is not read", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 1.0}}),
    ("has a key 'factor', which is not read", {"rope_parameters": {"rope_type": "default", "factor": 2.0}}),
    ("partial_rotary_factor 0.5 is not read", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    *((f"the weights are quantised .{method}.*give the checkpoint", {"quantization_config": {"quant_method": method, "bits": 4}})
      for method in ("gptq", "awq", "fp8", "bitsandbytes")),
    ("sliding_window '8' must be a whole number", {"sliding_window": "8", "use_sliding_window": True}))}
BAD_WEIGHTS = {
    "holds neither model.safetensors nor model.safetensors.index.json": lambda f: (f / "model.safetensors").unlink(),
    "pytorch_model.bin is a pickle, which is never loaded: convert it": lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
    "model.safetensors is not a complete safetensors file .*: download or save it again": lambda f: cut(f / "model.safetensors"),
    "model.safetensors is not a complete safetensors file": lambda f: cut(f / "model.safetensors", 0),
    f"lacks {Q}: the download may be incomplete": lambda f: change_weights(f, lambda s: s.pop(Q)),
    "lacks model.embed_tokens.weight, model.layers.0.* and 11 more": lambda f: change_weights(f, dict.clear),
    "has unexpected model.layers.9.mlp.up_proj.weight: config.json may be of another model": lambda f: change_weights(
        f, lambda s: s.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)})),
    Q + r" has shape \[4, 16\], \[16, 16\] is needed": lambda f: change_weights(f, lambda s: s.update({Q: torch.zeros(4, 16)})),
    "model.norm.weight holds NaN or infinite values in torch.float32: the checkpoint is damaged": lambda f: change_weights(f, nan),
    "model.norm.weight holds NaN or infinite": lambda f: change_weights(f, overflow),
    f"{Q} has dtype torch.int8: quantised checkpoints are not read": lambda f: change_weights(f, lambda s: s.update({Q: s[Q].char()})),
    "safetensors is missing, but model.safetensors.index.json needs it: complete the download": lambda f: shard(f, lambda f, s: s.unlink()),
    "-of-.* is not a complete safetensors file": lambda f: shard(f, lambda f, s: cut(s)),
    "-of-.* lacks model.* the index and the shard do not belong together": lambda f: shard(f, lambda f, s: save_file({}, s)),
    "index.json is not valid JSON": lambda f: shard(f, lambda f, s: cut(f / "model.safetensors.index.json")),
    "index.json lacks the field 'weight_map'": lambda f: shard(f, lambda f, s: (f / "model.safetensors.index.json").write_text("{}")),
    "index.json lacks .* with a .safetensors file of this folder": lambda f: shard(f, lambda f, s: point(f, "../model.safetensors")),
    "lacks the field 'weight_map' with a .safetensors file": lambda f: shard(f, lambda f, s: point(f, 3)),
    "ties lm_head.weight to model.embed_tokens.weight, but they differ": lambda f: change_config(f, tie_word_embeddings=True),
    "the tokenizer has 258 tokens, the model's vocabulary is 50": lambda f: train_bpe(["abab"], 258, special=("<end>",)).save(f),
    "generation_config.json is not valid JSON": lambda f: (f / "generation_config.json").write_text("{"),
}
BAD_WEIGHTS |= {f"generation_config.json: eos_token_id {re.escape(repr(bad))} must be a whole number": lambda f, bad=bad: (
    f / "generation_config.json").write_text(json.dumps({"eos_token_id": bad})) for bad in ({}, [[1]], "5", True)}


@pytest.mark.parametrize("words", [*BAD_CONFIG, *BAD_WEIGHTS])
def test_a_damaged_folder_is_refused_in_one_line_that_names_it(words, tmp_path):
    folder = tmp_path / "checkpoint"
    save_pretrained(Transformer(Config(50, 16, 24, 1, 2), generator(0, "init")), folder)
    load_pretrained(folder)  # whole
    {**BAD_CONFIG, **BAD_WEIGHTS}[words](folder)
    with pytest.raises((InputError, FileNotFoundError), match=words) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_numbers_too_large_for_float16_are_refused_rather_than_made_infinite(tmp_path):
    model = Transformer(Config(50, 16, 24, 1, 2))
    model.norm.weight.data[0] = 70_000
    save_pretrained(model, tmp_path)
    assert load_pretrained(tmp_path, torch.bfloat16)[0].norm.weight[0].item() == 70_144  # the nearest bfloat16
    with pytest.raises(InputError, match="model.norm.weight .* too large for this type: use bfloat16"):
        load_pretrained(tmp_path, torch.float16)


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; --checkpoint takes a Hugging Face folder"):
        load_pretrained("nowhere")


@pytest.mark.parametrize("change, words", [({"model_type": "llama", "sliding_window": 4}, "a llama checkpoint cannot say sliding_window 4"),
                                           ({"num_experts": 2}, "a qwen3 checkpoint cannot say num_experts 2"),
                                           ({"model_type": "mini"}, "model_type 'mini' cannot be saved; minilm writes llama")])
def test_a_model_that_no_family_describes_is_not_saved_and_nothing_is_half_written(change, words, tmp_path):
    with pytest.raises(InputError, match=words):
        save_pretrained(Transformer(Config(50, 16, 24, 1, 2, **change)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_head_that_is_stored_as_well_is_read_if_it_is_the_same(tmp_path):
    model = Transformer(Config(50, 16, 24, 1, 2, tie_word_embeddings=True), generator(0, "init"))
    save_pretrained(model, tmp_path)
    change_weights(tmp_path, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    assert torch.equal(logits_of(load_pretrained(tmp_path)[0]), logits_of(model))


logits_of = lambda model: model(IDS % 50).logits


def test_saving_removes_old_shards_and_nothing_that_an_old_index_names_elsewhere(tmp_path):
    model, folder = Transformer(Config(50, 16, 24, 1, 2), generator(0, "init")), tmp_path / "out"
    save_pretrained(model, folder, max_shard_bytes=4000)
    mine = [tmp_path / "mine.txt", tmp_path / "beside.safetensors", folder / "notes.txt"]
    for file in mine:
        file.write_text("mine")
    point(folder, str(mine[0]))
    for elsewhere in ("../beside.safetensors", "notes.txt", 7):
        point(folder, elsewhere)
    save_pretrained(model, folder)
    assert all(file.exists() for file in mine)
    assert not list(folder.glob("model-*")) and load_pretrained(folder)


PLAIN = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "initializer_range": 0.3}
HALF = ["full_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize("change", [
    {"model_type": "qwen2_moe", "sliding_window": 4}, {"model_type": "qwen2_moe", "sliding_window": 4, "layer_types": HALF},
    {"model_type": "qwen3_moe", "sliding_window": 4}, {"model_type": "qwen3_moe", "sliding_window": 4, "layer_types": HALF[:1] * 3},
    {"model_type": "mixtral", "sliding_window": 4, "layer_types": HALF[:1] * 3}], ids=str)
def test_transformers_slides_the_window_over_the_layers_of_a_saved_mixture_that_we_do(change, tmp_path):
    import transformers

    model = Transformer(Config(**PLAIN, num_experts=4, **change), generator(0, "init")).eval()
    save_pretrained(model, tmp_path)
    with torch.no_grad():
        expected = model(IDS % 50).logits
        close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(IDS % 50).logits, expected)
        assert torch.equal(load_pretrained(tmp_path)[0](IDS % 50).logits, expected)


@pytest.mark.parametrize("words, change", [
    ("a mixtral checkpoint cannot say layer_types", {"model_type": "mixtral", "num_experts": 4, "sliding_window": 4, "layer_types": HALF}),
    ("a mixtral checkpoint cannot say moe_intermediate_size 24", {"model_type": "mixtral", "num_experts": 4, "moe_intermediate_size": 24}),
    ("a mistral checkpoint cannot say attention_bias True", {"model_type": "mistral", "attention_bias": True}),
    ("a qwen3 checkpoint cannot say mlp_bias True", {"mlp_bias": True}),
    ("a qwen3_moe checkpoint cannot say shared_expert_inter", {"model_type": "qwen3_moe", "num_experts": 4,
                                                               "shared_expert_intermediate_size": 8})])
def test_what_transformers_would_read_as_another_model_is_not_saved(words, change, tmp_path):
    with pytest.raises(InputError, match=words):
        save_pretrained(Transformer(Config(**PLAIN, **change)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_in_double_precision_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="weights of torch.float64 cannot be saved: convert the model to float32"):
        save_pretrained(Transformer(Config(**PLAIN)).double(), tmp_path)


def test_large_numbers_are_not_taken_for_damage_though_their_sum_overflows(tmp_path):
    model = Transformer(Config(**PLAIN))
    model.norm.weight.data.fill_(3e38)
    save_pretrained(model, tmp_path)
    assert load_pretrained(tmp_path)[0].norm.weight[0] == model.norm.weight[0]


def test_sums_that_overflow_float16_are_no_damage_either(tmp_path):
    model = Transformer(Config(50, 16, 24, 1, 2))
    model.norm.weight.data.fill_(60_000)  # 16 of them: 960,000, and float16 ends at 65,504
    save_pretrained(model, tmp_path)
    weight = load_pretrained(tmp_path, torch.float16)[0].norm.weight
    assert weight.isfinite().all() and not weight.sum().isfinite()


def test_loading_draws_no_first_weights(tmp_path, monkeypatch):
    save_pretrained(Transformer(Config(50, 16, 24, 1, 2), generator(0, "init")), tmp_path)
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda *_, **__: pytest.fail("drawn"))
    load_pretrained(tmp_path)


# --- kill -9

KILL = """
import os, signal, sys, torch
from minilm.transformer import Config, Transformer
from minilm.weights import load_pretrained, save_pretrained

torch.set_num_threads(1)
model = Transformer(Config(50, 16, 24, 1, 2))

def save(value, shards):
    for p in model.parameters():
        torch.nn.init.constant_(p, value)
    save_pretrained(model, "checkpoint", max_shard_bytes=9000 if shards else 10**9)

def kill_myself_before_file_operation(n):
    seen = []
    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and "checkpoint" in str(arguments[0]):
            seen.append(event)
            if len(seen) == n:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for before, after in ((False, False), (False, True), (True, True), (True, False)):  # one file or shards
    n, killed = 0, True
    while killed:
        n += 1
        save(1.0, before)
        child = os.fork()
        if child == 0:
            kill_myself_before_file_operation(n)
            save(2.0, after)
            os._exit(0)
        killed = os.waitpid(child, 0)[1] == signal.SIGKILL
        found = {float(v) for p in load_pretrained("checkpoint")[0].state_dict().values() for v in (p.min(), p.max())}
        assert found == {2.0} or killed and found == {1.0}, (before, after, n, found)
    print(before, after, n - 1)
"""


def test_a_process_killed_at_any_point_of_saving_leaves_a_complete_checkpoint(tmp_path):
    """A child is killed (-9) before its first file operation, then another before its second, ... until one lives to the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", KILL], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [int(line.split()[-1]) > 5 for line in run.stdout.splitlines()] == [True] * 4, run.stdout


# --- what makers publish: one field of a file changed, and transformers on the same folder

def random_rope(rng):
    """Rope fields in one of the places where they are published, complete or not, of every type."""
    kind = rng.choice(["default", "linear", "llama3", "yarn", "yarn"])
    rope = {"default": {}, "linear": {"factor": 4.0}, "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "yarn": {"factor": 4.0}}[kind]
    if kind in ("llama3", "yarn") and rng.random() < 0.6:
        rope["original_max_position_embeddings"] = rng.choice([16, 32])
    if kind == "yarn":
        extra = {"attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False}
        rope |= dict(rng.sample(sorted(extra.items()), rng.randrange(4)))
    if rng.random() < 0.4:
        rope["rope_theta"] = 500_000.0
    if kind != "default" or rng.random() < 0.5:
        rope |= {rng.choice(["type", "rope_type"]): kind}
    fields = {rng.choice(["rope_scaling", "rope_parameters"]): rope}
    if rng.random() < 0.3:
        fields = {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}} | fields
    if rng.random() < 0.4:
        fields["rope_theta"] = 300.0
    if rng.random() < 0.2:
        fields["original_max_position_embeddings"] = 24
    return fields


def frequencies(folder):
    """What transformers turns by: w_i and the factor of cos and sin, for the folder's config.json."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
    return rotary.inv_freq, rotary.attention_scaling


def test_rope_fields_turn_as_in_transformers_wherever_they_are_published(tmp_path):
    read = 0
    for seed in range(200):
        fields, family = random_rope(random.Random(seed)), random.Random(seed).choice(["llama", "mistral", "qwen3", "olmoe"])
        sizes = {"model_type": family, **SHAPE, "head_dim": 8, "use_sliding_window": False}
        (tmp_path / "config.json").write_text(json.dumps(sizes | fields))
        config = read_config(tmp_path)
        w, factor = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        expected, scaling = frequencies(tmp_path)
        torch.testing.assert_close(w, expected, rtol=1e-5, atol=0, msg=lambda m, fields=fields: f"{fields}: {m}")
        assert factor == pytest.approx(scaling), fields
        (tmp_path / "config.json").write_text(json.dumps(config_json(config, torch.float32)))
        again, scaling = frequencies(tmp_path)  # what we write turns so again
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=0)
        assert factor == pytest.approx(scaling), fields
        read += config.rope_scaling is not None
    assert read > 100


CHANGED = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: 1.7 * x + 0.1, str: lambda x: x + "x",
           list: lambda x: [*x, 1], dict: lambda x: x | {"1": 1}}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_every_field_of_a_config_is_read_or_refused_or_says_nothing(family, tmp_path):
    """Each field that transformers' class knows is changed in the file: the same logits, or an InputError, as a rule that names it."""
    import transformers

    sizes = SHAPE | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
                     "shared_expert_intermediate_size": 8, "head_dim": 8, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    known = transformers.AutoConfig.for_model(family).to_dict()
    config = transformers.AutoConfig.for_model(family, **{field: size for field, size in sizes.items() if field in known})
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    original = json.loads((tmp_path / "config.json").read_text())
    read, refused, outsiders = 0, 0, set()
    for field, value in original.items():
        changed = CHANGED[type(value)](value) if value is not None else 3
        (tmp_path / "config.json").write_text(json.dumps(original | {field: changed}))
        try:
            ours = load_pretrained(tmp_path)[0]
        except InputError:
            refused += 1
            continue
        try:
            expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        except Exception:  # what transformers cannot read, we need not refuse, if it says nothing to us
            outsiders.add(field)
            continue
        assert torch.allclose(logits(ours), logits(expected.float()), atol=1e-4), f"{field} {changed!r}"
        read += 1
    assert read > 10 and refused > 5 and not outsiders & FIELDS.keys()


# --- where an answer stops

def test_a_saved_folder_says_where_to_stop_to_transformers_as_well(tmp_path):
    import transformers

    tokenizer = train_bpe(["hello world " * 50], 300, special=("<|end|>",), eos="<|end|>")
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        model = Transformer(Config(300, 16, 24, 1, 2, model_type=family)).eval()
        model.lm_head.weight.data[:], model.norm.weight.data[:] = 0, 0
        says = torch.zeros(300, 16)
        says[tokenizer.eos_id] = 1
        model.lm_head.weight.data, model.embed.weight.data = says, torch.ones(300, 16)
        model.norm.weight.data[:] = 1
        save_pretrained(model, tmp_path, tokenizer)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eos_id
        assert theirs.config.bos_token_id is theirs.config.pad_token_id is None  # no number of a class's own
        assert theirs.generate(torch.tensor([[1, 2]]), max_new_tokens=5, do_sample=False).shape[1] == 3
        again, tok = load_pretrained(tmp_path)
        assert generate(again, [[1, 2]], 5, eos_id=stop_ids(again, tok)) == [[1, 2, tokenizer.eos_id]]


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": [2, 0], "top_p": 0.9}, {"eos_token_id": 4}])
@pytest.mark.parametrize("eos", [None, 3, [3, 5]])
def test_what_a_folder_says_beside_the_weights_survives_loading_and_saving(eos, generation, tmp_path):
    import transformers

    save_pretrained(Transformer(Config(**PLAIN, model_type="llama")), tmp_path / "a")
    others = {"eos_token_id": eos, "bos_token_id": 5, "pad_token_id": 3, "made_by": "somebody", "attention_dropout": 0.25}
    change_config(tmp_path / "a", **others)
    if generation is not None:
        (tmp_path / "a/generation_config.json").write_text(json.dumps(generation))
    save_pretrained(load_pretrained(tmp_path / "a")[0], tmp_path / "b")
    first, second = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in "ab")
    for field in others:
        assert getattr(second.config, field) == getattr(first.config, field) == others[field]
    if generation != {}:  # (an empty file says nothing: transformers stops nowhere, we where config.json says)
        for field in ("eos_token_id", "bos_token_id", "pad_token_id", "top_p"):
            assert getattr(second.generation_config, field) == getattr(first.generation_config, field), field


@pytest.mark.parametrize("generation, config, stops", [
    ([2, 0], None, [2, 0]), (0, None, [0, 2]), ([0], 1, [0, 2]), (None, [2, 0], [2, 0]), (None, 0, [0, 2]), (None, None, [2])])
def test_one_rule_says_where_an_answer_stops(generation, config, stops, tmp_path):
    # generation_config.json alone, else config.json; a number or a list; and the tokenizer's EOS, which is 2 here
    tokenizer = train_bpe(["ab"], 258, special=("<a>", "<b>"), eos="<b>")
    model = Transformer(Config(260, 16, 24, 1, 2))
    model.generation_config = {} if generation is None else {"eos_token_id": generation}
    model.other_fields = {"eos_token_id": config}
    tokenizer.eos_id = 2
    assert stop_ids(model, tokenizer) == stops
    save_pretrained(model, tmp_path, tokenizer)  # what is saved says it all
    assert stop_ids(load_pretrained(tmp_path)[0]) == stops


def test_a_token_behind_the_models_last_row_is_passed_over_if_no_text_can_become_it(tmp_path):
    model = Transformer(Config(257, 16, 24, 1, 2), generator(0, "init"))
    save_pretrained(model, tmp_path, train_bpe(["ab"], 258, special=("<a>", "[PAD]")))
    with pytest.warns(UserWarning, match=r"the model has 257 rows, none for \[PAD\]"):
        assert load_pretrained(tmp_path)[1].vocab_size == 258
