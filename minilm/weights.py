"""The weight loader: a Hugging Face folder <-> a Transformer, which carries Hugging Face's parameter names and configuration fields.

    model, tokenizer = load_pretrained("path/to/folder", dtype=torch.bfloat16, device="cuda")
    save_pretrained(model, "out/model", tokenizer)        # transformers.AutoModelForCausalLM.from_pretrained("out/model") loads it"""

import dataclasses
import os
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minilm import InputError
from minilm.data import read_json, reading, write_atomically, write_json
from minilm.rotary import inverse_frequencies
from minilm.tokenizer import load_tokenizer
from minilm.transformer import Config, Transformer

# Family -> Hugging Face's class, and the values that a config.json of this family means when it leaves a field out.
FAMILIES = {
    "llama": ("LlamaForCausalLM", {"max_position_embeddings": 2048}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072}),
    "qwen2": ("Qwen2ForCausalLM", {"max_position_embeddings": 32768}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 128, "max_position_embeddings": 32768}),
    "mixtral": ("MixtralForCausalLM", {
        "num_local_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "num_key_value_heads": 8, "rope_theta": 1e6,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {
        "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False, "num_key_value_heads": 16, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "max_position_embeddings": 32768}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False, "num_key_value_heads": 4, "moe_intermediate_size": 768,
        "max_position_embeddings": 32768}),
    "olmoe": ("OlmoeForCausalLM", {
        "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096})}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
ONE_WINDOW = ("mixtral", "qwen3_moe")  # files that cannot give a layer a window of its own
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# --- configuration

def read_config(folder: str | Path) -> Config:
    """config.json -> Config. Raises InputError for a family, activation or rope type that the model does not implement."""
    file = Path(folder) / "config.json"
    raw = read_json(file)
    with reading(file):
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise InputError(f"model_type {family!r} is not read; minilm reads {', '.join(FAMILIES)}")
        if missing := [k for k in REQUIRED if raw.get(k) is None]:
            raise InputError(f"the field {missing[0]!r} is missing: is it the config.json of a {family} model?")
        nullable = ("sliding_window", "num_key_value_heads")  # null is not the same as left out: no window, as many as heads
        values = {**FAMILIES[family][1], **{k: v for k, v in raw.items() if v is not None or k in nullable}}
        for key, only in {"hidden_act": "silu", "clip_qkv": None, "partial_rotary_factor": 1.0, "qkv_bias": True}.items():
            if values.get(key, only) != only:
                raise InputError(f"{key} {values[key]!r} is not read; minilm reads {only!r} only")
        rope = values.get("rope_parameters") or {}  # how transformers 5 stores rope_theta and rope_scaling
        if rope:
            values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
            values["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        if family == "mixtral" or (family == "qwen3_moe" and "num_local_experts" in raw):  # new Qwen3 files use Mixtral's word
            values["num_experts"] = values["num_local_experts"]
        if family not in MIXTURES:
            values["num_experts"] = 0
        values |= _windows(family, values)
        config = Config(**{f.name: values[f.name] for f in dataclasses.fields(Config) if f.name in values})
        inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)  # refuses a scaling that is not read
        return config


def _windows(family: str, values: dict) -> dict:
    """Which layers slide a window, if the file has one (and, for Qwen, `use_sliding_window`): none in Llama and OLMoE, all in Mistral,
    Mixtral and Qwen3-MoE, those from `max_window_layers` on in Qwen2 and Qwen3, every second one before it in Qwen2-MoE."""
    if family in ("llama", "olmoe") or family.startswith("qwen") and not values.get("use_sliding_window"):
        return {"sliding_window": None, "layer_types": None}
    if family in ONE_WINDOW:
        return {"layer_types": None}
    if family == "mistral" or values.get("layer_types"):
        return {}
    first = values.get("max_window_layers", 28)
    slides = (lambda i: i % 2 == 0 and i < first) if family == "qwen2_moe" else (lambda i: i >= first)
    return {"layer_types": ["sliding_attention" if slides(i) else "full_attention" for i in range(values["num_hidden_layers"])]}


def config_json(config: Config, dtype: torch.dtype) -> dict:
    """The config.json that Hugging Face's class of this family reads as the same model. InputError where it would read another."""
    family, windows = config.model_type, [config.window(i) for i in range(config.num_hidden_layers)]
    if family not in FAMILIES:
        raise InputError(f"model_type {family!r} cannot be saved; minilm writes {', '.join(FAMILIES)}")
    if dtype not in DTYPES.values():
        raise InputError(f"weights of {dtype} cannot be saved: convert the model to {', '.join(DTYPES)} first")
    dense_layers = config.mlp_only_layers or config.decoder_sparse_step != 1
    for field, unsaid in {
            "num_experts": (config.num_experts > 0) != (family in MIXTURES),
            "sliding_window": family in ("llama", "olmoe") and any(windows), "layer_types": family in ONE_WINDOW and len(set(windows)) > 1,
            "mlp_only_layers": family in ("mixtral", "olmoe") and dense_layers, "mlp_bias": config.mlp_bias and family != "llama",
            "attention_bias": config.attention_bias and family in ("mistral", "mixtral"),
            "moe_intermediate_size": family in ("mixtral", "olmoe") and config.moe_intermediate_size != config.intermediate_size,
            "shared_expert_intermediate_size": config.shared_expert_intermediate_size and family != "qwen2_moe"}.items():
        if unsaid:
            raise InputError(f"a {family} checkpoint cannot say {field} {getattr(config, field)}: its class in transformers has no such "
                             "form; choose another model_type (minilm.moe.upcycle gives a mixture the right one)")
    if family == "mixtral" and not config.norm_topk_prob:
        warnings.warn("a mixtral checkpoint that does not renormalise its router's weights is read as such by minilm alone: transformers "
                      "always renormalises", stacklevel=3)
    values = {"architectures": [FAMILIES[family][0]], **dataclasses.asdict(config), "hidden_act": "silu",
              "torch_dtype": next(name for name, d in DTYPES.items() if d == dtype)}
    if family == "mixtral":
        values |= {"num_local_experts": values.pop("num_experts"), "sliding_window": windows[0]}
    if family.startswith("qwen"):
        values["use_sliding_window"] = any(windows)
        if family != "qwen3_moe":
            values["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    return {k: v for k, v in values.items() if v is not None or k == "sliding_window"}


# --- names

def to_hf(name: str, family: str) -> str:
    """Our parameter name -> Hugging Face's, e.g. layers.0.self_attn.q_proj.weight -> model.layers.0.self_attn.q_proj.weight."""
    name = re.sub(r"^embed\.", "embed_tokens.", name)
    if family == "mixtral":
        name = re.sub(r"\.mlp\.", ".block_sparse_moe.", name)
        for ours, theirs in _MIXTRAL.items():
            name = re.sub(rf"(experts\.\d+)\.{ours}\b", rf"\1.{theirs}", name)
    return name if name.startswith("lm_head.") else "model." + name


_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _stored(name: str, where) -> tuple[str, tuple[int, str] | None]:
    """Hugging Face's name on disk -> the name that these files use, and which part (expert, gate | up | down) of that tensor it is: a
    state_dict() of newer transformers has `mlp.experts.gate_up_proj` [E, 2F, D] (gate rows first) and `mlp.experts.down_proj` [E, D, F]."""
    if name in where:
        return name, None
    fused = name.replace(".block_sparse_moe.", ".mlp.")
    match = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight", fused)
    if not match:
        return (fused if fused in where else name), None
    part = {"w1": "gate", "w2": "down", "w3": "up"}.get(match[3], match[3].removesuffix("_proj"))
    fused = f"{match[1]}.{'down_proj' if part == 'down' else 'gate_up_proj'}"
    return (fused, (int(match[2]), part)) if fused in where else (name, None)


# --- loading

def find_checkpoint(name: str | Path) -> Path:
    """A folder, a FILE.gguf, or a name such as Qwen/Qwen3-0.6B -> what is on this disk: the path as it
    is, or that model's folder in Hugging Face's cache (its one .gguf file, if it holds no folder of
    weights). Nothing is downloaded; FileNotFoundError names the command that does."""
    path = Path(name)
    if path.is_dir() or path.suffix == ".gguf":
        return path
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise FileNotFoundError(
            f"{name}: no such folder; --checkpoint takes a Hugging Face folder (config.json, "
            "model.safetensors), a .gguf file, or the name of a model in Hugging Face's cache")
    model = cache / ("models--" + str(name).replace("/", "--"))
    current = model / "refs" / "main"
    snapshot = model / "snapshots" / (current.read_text().strip() if current.is_file() else "")
    if not current.is_file() or not snapshot.is_dir():
        raise FileNotFoundError(f"{name}: no such folder, and not in Hugging Face's cache ({cache}): "
                                f"fetch it with: hf download {name}")
    files = list(snapshot.glob("*.gguf"))
    return files[0] if len(files) == 1 and not (snapshot / "config.json").exists() else snapshot


def load_pretrained(folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
    """-> (model in eval mode, tokenizer or None if the folder has none). The model keeps the folder's generation_config as a dictionary.
    Tensors are memory-mapped and converted one by one: the peak stays near the weights in the target dtype. Everything in the file is
    used or refused: InputError names the first missing, unexpected, misshapen or non-finite tensors, and a file that is cut short."""
    folder = find_checkpoint(folder)
    if folder.suffix == ".gguf":
        from minilm.gguf import load_gguf  # needs the extra `gguf`

        return load_gguf(folder, dtype, device)
    config = read_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    our_name = {to_hf(name, config.model_type): name for name in model.state_dict()}  # "model.norm.weight" -> "norm.weight"
    file_of = _find_tensors(folder)
    if config.tie_word_embeddings:
        head, embed = our_name.pop("lm_head.weight"), "model.embed_tokens.weight"
        other = file_of.pop(head, None)  # stored nevertheless
        if other and embed in file_of and not torch.equal(_map(other, head), _map(file_of[embed], embed)):
            raise InputError(f"{other}: config.json ties {head} to {embed}, but they differ: set tie_word_embeddings to false")
    stored_as = {n: _stored(n, file_of) for n in our_name}  # -> name in the files, and which part, as (3, "up"), of it
    used = {name for name, _ in stored_as.values()}
    unused = [n for n in file_of if n not in used and not n.endswith("rotary_emb.inv_freq")]
    missing = [n for n, (name, _) in stored_as.items() if name not in file_of]
    report(folder, "lacks", missing, "the download may be incomplete, or config.json is of another model")
    report(folder, "has unexpected", unused, "config.json may be of another model")
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    state = {}
    for theirs, ours in our_name.items():
        name, part = stored_as[theirs]
        state[ours] = read_tensor(file_of[name], name, shapes[ours], dtype, device, part and (*part, config.num_experts))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed.weight
    generation = folder / "generation_config.json"
    model.generation_config = read_json(generation) if generation.exists() else {}
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary is {config.vocab_size}: "
                         "they do not belong together")
    return model.eval(), tokenizer


def _find_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, from model.safetensors or the index of a sharded checkpoint."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return dict.fromkeys(names_in(single), single)
    if not index.exists():
        old = " (pytorch_model.bin is a pickle, which is never loaded: convert it to safetensors)" if any(folder.glob("*.bin")) else ""
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json{old}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(re.fullmatch(r"[\w.-]+\.safetensors", str(f)) for f in weight_map.values()):
        raise InputError(f"{index} lacks the field 'weight_map' with a .safetensors file of this folder for every tensor: download or save "
                         "it again")
    where = {name: folder / file for name, file in weight_map.items()}
    for file in sorted(set(where.values())):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing, but {index.name} needs it: complete the download")
        absent = {n for n, f in where.items() if f == file} - set(names_in(file))
        report(file, "lacks", sorted(absent), "the index and the shard do not belong together")
    return where


def names_in(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as f:
            return list(f.keys())
    except SafetensorError as error:
        raise InputError(f"{file} is not a complete safetensors file ({error}): download or save it again") from None


def read_tensor(file: Path, name: str, shape: tuple, dtype: torch.dtype, device, part: tuple[int, str, int] | None = None) -> torch.Tensor:
    """`part`: (expert, gate | up | down, number of experts) of a fused tensor."""
    tensor = _map(file, name, shape, part)
    if tuple(tensor.shape) != shape:
        raise InputError(f"{file}: {name} has shape {list(tensor.shape)}, {list(shape)} is needed: the "
                         f"{'adapter' if 'adapter' in file.name else 'checkpoint'} is of another model (or its vocabulary was extended)")
    if not tensor.dtype.is_floating_point:
        raise InputError(f"{file}: {name} has dtype {tensor.dtype}: quantised checkpoints are not read")
    rows = max(1, 2**24 * len(tensor) // max(1, tensor.nbytes))  # 16 MB at a time: the peak stays near the target's size
    if tensor.dtype == dtype:
        tensor = tensor.to(device)
    else:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        for start in range(0, len(tensor), rows):  # each in a mapping of its own: what was converted need not stay mapped
            tensor[start : start + rows] = _map(file, name, shape, part)[start : start + rows]
    if not all(chunk.sum(dtype=torch.float32).isfinite() or chunk.isfinite().all() for chunk in tensor.split(rows)):  # one pass is the rule
        raise InputError(f"{file}: {name} holds NaN or infinite values in {dtype}: the checkpoint is damaged"
                         + (", or its numbers are too large for this type: use bfloat16" if dtype == torch.float16 else ""))
    return tensor


def _map(file: Path, name: str, shape: tuple = (), part: tuple[int, str, int] | None = None) -> torch.Tensor:
    with safe_open(file, "pt") as f:
        if part is None:
            return f.get_tensor(name)
        expert, which, num_experts = part
        whole, rows = f.get_slice(name), shape[0]
        fused = [num_experts, shape[0] * (1 if which == "down" else 2), shape[1]]
        if whole.get_shape() != fused:
            raise InputError(f"{file}: {name} has shape {whole.get_shape()}, {fused} is needed: it is of another model")
        return whole[expert, rows : 2 * rows] if which == "up" else whole[expert, :rows]


def report(where: Path, verb: str, names: list[str], remedy: str) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(f"{where} {verb} {', '.join(names[:3])}{more}: {remedy}")


# --- saving

def save_pretrained(model: Transformer, folder: str | Path, tokenizer=None, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes config.json, the weights (in shards above `max_shard_bytes`) and the tokenizer. A tied head is written once.
    Each file is written under a temporary name, flushed and renamed, shards become visible by their index only: a process killed at any
    moment leaves the last complete weights. Give a model of another shape or tokenizer a folder of its own: a kill between two files would
    leave the fields of the old one beside the weights of the new."""
    folder = Path(folder)
    if any(".lora_" in name for name in model.state_dict()):
        raise InputError("the model has LoRA layers: save_adapter(model, folder), or merge_lora(model, keep=False) and then save it")
    if any(name.endswith(".q") for name in model.state_dict()):  # a Linear4 or Linear8 of minilm.quantize
        raise InputError("the model is quantised for inference and cannot be saved: save it before quantize")
    state = {to_hf(n, model.config.model_type): t.detach() for n, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    dtype = next(iter(state.values())).dtype
    config = config_json(model.config, dtype)
    shards = _shards(state, max_shard_bytes)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    on_cpu = lambda shard: {name: tensor.cpu().contiguous() for name, tensor in shard.items()}
    files = []
    if len(shards) == 1:
        write_atomically(single, lambda path: save_file(on_cpu(shards[0]), path, {"format": "pt"}))
        index.unlink(missing_ok=True)
    else:
        generation = os.urandom(4).hex()  # new names: the shards of the last checkpoint stay whole until the index is renamed
        files = [f"model-{generation}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        for file, shard in zip(files, shards):
            write_atomically(folder / file, lambda path, shard=shard: save_file(on_cpu(shard), path, {"format": "pt"}))
        total = sum(t.numel() * t.element_size() for t in state.values())
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
        single.unlink(missing_ok=True)
    for old in {*folder.glob("model-*-of-*.safetensors")} - {folder / file for file in files}:
        old.unlink()
    write_json(folder / "config.json", config)
    if getattr(model, "generation_config", None):
        write_json(folder / "generation_config.json", model.generation_config)
    if tokenizer is not None:
        tokenizer.save(folder)


def _shards(state: dict, limit: int) -> list[dict]:
    shards, size = [{}], 0
    for name, tensor in state.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if shards[-1] and size + bytes_ > limit:
            shards, size = [*shards, {}], 0
        shards[-1][name], size = tensor, size + bytes_
    return shards
