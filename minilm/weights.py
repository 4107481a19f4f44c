"""The weight loader: a Hugging Face folder <-> a Transformer, which carries Hugging Face's names of
parameters and configuration fields.

    model, tokenizer = load_pretrained("path/to/folder", dtype=torch.bfloat16, device="cuda")
    save_pretrained(model, "out/model", tokenizer)  # AutoModelForCausalLM.from_pretrained reads it

Every field of config.json that changes what a model computes is read or refused by name; every
other one (ids of special tokens, who made it) is kept beside the model and written back."""

import contextlib
import dataclasses
import math
import os
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minilm import InputError
from minilm.data import find_checkpoint, read_json, reading, write_atomically, write_json
from minilm.generate import stop_ids, token_ids
from minilm.rotary import inverse_frequencies
from minilm.tokenizer import load_tokenizer
from minilm.training import is_chief, is_sharded, whole_tensor
from minilm.transformer import Config, Transformer

# Family -> Hugging Face's class.
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
ONE_WINDOW = ("mixtral", "qwen3_moe")  # files that cannot give a layer a window of its own
# What a config.json of a family means when it leaves a field out.
DEFAULTS = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "sliding_window": 4096,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "qwen2": {"max_position_embeddings": 32768},
    "qwen3": {"head_dim": 128, "max_position_embeddings": 32768},
    "mixtral": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
    },
    "qwen2_moe": {
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "max_position_embeddings": 32768,
    },
    "qwen3_moe": {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "max_position_embeddings": 32768,
    },
    "olmoe": {
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    },
}
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Fields that would change what is computed, and the one value with which they do not.
ONLY = {"hidden_act": "silu", "clip_qkv": None, "partial_rotary_factor": 1.0, "qkv_bias": True}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIELDS = {f.name: f.type for f in dataclasses.fields(Config)}
# Fields that `config_json` writes by itself, or that must not outlive a change of the model.
OURS = {*FIELDS, *ONLY, *IDS, "architectures", "torch_dtype", "dtype", "rope_parameters",
        "num_local_experts", "use_sliding_window", "max_window_layers",
        "original_max_position_embeddings"}


# --- configuration

def read_config(folder: str | Path) -> Config:
    """config.json -> Config. Raises InputError, naming the file and the field, for a family,
    activation or rope type that the model does not implement and for a value out of range."""
    file = Path(folder) / "config.json"
    raw = read_json(file)
    with reading(file):
        return to_config(raw)


def to_config(raw: dict) -> Config:
    """The fields of a config.json -> Config; `raw` is left as it is."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"model_type {family!r} is not read; minilm reads {', '.join(FAMILIES)}")
    if quantised := raw.get("quantization_config") or raw.get("compression_config"):
        method = quantised.get("quant_method") or "an unnamed method"
        raise InputError(f"the weights are quantised ({method}), which is not read: give the "
                         "checkpoint that was not quantised (float32, bfloat16 or float16)")
    if missing := [k for k in REQUIRED if raw.get(k) is None]:
        raise InputError(f"the field {missing[0]!r} is missing: "
                         f"is it the config.json of a {family} model?")
    values = dict(DEFAULTS[family])
    for key, value in raw.items():
        # null is left out, but for these: no window; as many key heads as query heads
        if value is not None or key in ("sliding_window", "num_key_value_heads"):
            values[key] = value
    for key, only in ONLY.items():
        if values.get(key, only) != only:
            raise InputError(f"{key} {values[key]!r} is not read; minilm reads {only!r} only")
    if family == "mixtral" or (family == "qwen3_moe" and "num_local_experts" in raw):
        values["num_experts"] = values["num_local_experts"]  # new Qwen3 files use Mixtral's word
    if family not in MIXTURES:
        values["num_experts"] = 0
    values["rope_theta"], values["rope_scaling"] = _rope(values)
    _check(values)
    values |= _windows(family, values)
    config = Config(**{name: values[name] for name in FIELDS if name in values})
    # refuses a scaling that rotary.py does not know
    inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return config


# What a field must be, if it is given and not null, beside what Config itself asks for.
BOOLS = [name for name, kind in FIELDS.items() if kind is bool] + ["use_sliding_window"]
WHOLE = [name for name, kind in FIELDS.items() if kind in (int, int | None)]
MOST = {"num_hidden_layers": 10**4, "num_experts": 10**4}  # more would never finish


def _check(values: dict) -> None:
    """Raises InputError for a field of the wrong JSON type, or out of any model's range."""
    for name in BOOLS:
        if type(values.get(name, False)) is not bool:
            raise InputError(f"{name} {values[name]!r} must be true or false")
    for name in (*WHOLE, "max_window_layers"):
        value = values.get(name)
        if type(value) not in (int, type(None)):
            raise InputError(f"{name} {value!r} must be a whole number of at least 1")
        if value and value > MOST.get(name, 10**9):
            raise InputError(f"{name} {value} is too large: {MOST.get(name, 10**9)} is the limit")
    for name in ("rms_norm_eps", "initializer_range", "router_aux_loss_coef", "rope_theta"):
        value = values.get(name, 1.0)
        if not _is_number(value) or value < 0 or (name == "rope_theta" and value == 0):
            raise InputError(f"{name} {value!r} must be a number of at least 0 (rope_theta: above)")
    layers = values.get("mlp_only_layers", [])
    if type(layers) is not list or any(type(i) is not int or i < 0 for i in layers):
        raise InputError(f"mlp_only_layers {layers!r} must be a list of layers' numbers")
    types, L = values.get("layer_types"), values["num_hidden_layers"]
    words = ("full_attention", "sliding_attention")
    if types is not None:
        if type(types) is not list or len(types) != L or any(t not in words for t in types):
            raise InputError(f"layer_types {types}: give each of the {L} layers "
                             f"{' or '.join(words)}")


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# Rope type -> the keys that it needs, and those that it may have.
ROPE = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings",),
    ),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
         "mscale", "mscale_all_dim", "truncate", "finetuned"),  # (`finetuned` changes nothing)
    ),
}


def _rope(values: dict) -> tuple[float, dict | None]:
    """-> rope_theta, and the scaling with its type and keys (None: no scaling).

    Files give both in a dictionary `rope_scaling` (which wins) or `rope_parameters` (transformers
    5), or the base beside it. The original context of llama3 and yarn may stand beside it too,
    where it wins; left out, it is max_position_embeddings. All as transformers reads it, but
    for a key that it would pass over: that is an InputError here."""
    where = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    given = values.get(where) or {}
    if type(given) is not dict:
        raise InputError(f"{where} {given!r} must be a JSON object")
    rope = {key: value for key, value in given.items() if value is not None}
    if nested := [key for key, value in rope.items() if type(value) is dict]:
        raise InputError(f"{where} differs by type of layer ({nested[0]!r}), which is not read")
    theta = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
    if (share := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError(f"partial_rotary_factor {share!r} is not read; minilm reads 1.0 only")
    older = rope.pop("type", None)
    kind = rope.pop("rope_type", older)
    if kind is None:
        if rope:
            raise InputError(f"{where} has {next(iter(rope))!r}, but no rope_type: say which "
                             f"scaling is meant ({', '.join(ROPE)})")
        return theta, None
    if kind not in ROPE:
        raise InputError(f"rope type {kind!r} is not read; minilm reads {', '.join(ROPE)}")
    needed, optional = ROPE[kind]
    if missing := [key for key in needed if key not in rope]:
        raise InputError(f"rope_scaling of type {kind!r} needs the field {missing[0]!r}")
    for key, value in rope.items():
        if key not in (*needed, *optional):
            raise InputError(f"{where} of type {kind!r} has a key {key!r}, which is not read")
        if key in ("truncate", "finetuned"):
            fits = type(value) is bool
        else:
            fits = _is_number(value) and value > 0
        if not fits:
            raise InputError(f"{where}: {key} {value!r} must be "
                             + ("true or false" if key == "truncate" else "a number above 0"))
    if "original_max_position_embeddings" in optional:
        length = rope.get("original_max_position_embeddings", values["max_position_embeddings"])
        length = values.get("original_max_position_embeddings", length)
        if type(length) is not int or length < 1:
            raise InputError(f"original_max_position_embeddings {length!r} must be a whole number")
        rope["original_max_position_embeddings"] = length
    return theta, None if kind == "default" else {"rope_type": kind, **rope}


def _windows(family: str, values: dict) -> dict:
    """Which layers slide a window, if the file has one (and, for Qwen, `use_sliding_window`): none
    in Llama and OLMoE, all in Mistral, Mixtral and Qwen3-MoE, those from `max_window_layers` on in
    Qwen2 and Qwen3, every second one before it in Qwen2-MoE."""
    unused = family.startswith("qwen") and not values.get("use_sliding_window")
    if unused or family in ("llama", "olmoe"):
        return {"sliding_window": None, "layer_types": None}
    if family in ONE_WINDOW:
        return {"layer_types": None}
    if family == "mistral" or values.get("layer_types"):
        return {}
    first, types = values.get("max_window_layers", 28), []
    for i in range(values["num_hidden_layers"]):
        slides = i % 2 == 0 and i < first if family == "qwen2_moe" else i >= first
        types.append("sliding_attention" if slides else "full_attention")
    return {"layer_types": types}


def config_json(config: Config, dtype: torch.dtype, others: dict | None = None) -> dict:
    """The config.json that Hugging Face's class of this family reads as the same model, with the
    `others`, fields that say nothing of what is computed. InputError where it would be another."""
    family = config.model_type
    if family not in FAMILIES:
        raise InputError(f"model_type {family!r} cannot be saved; "
                         f"minilm writes {', '.join(FAMILIES)}")
    names = {d: name for name, d in DTYPES.items()}
    if dtype not in names:
        raise InputError(f"weights of {dtype} cannot be saved: "
                         f"convert the model to {', '.join(DTYPES)} first")
    if unsaid := _cannot_say(config):
        raise InputError(f"a {family} checkpoint cannot say {unsaid} {getattr(config, unsaid)}: "
                         "its class in transformers has no such form; choose another model_type "
                         "(minilm.moe.upcycle gives a mixture the right one)")
    if family == "mixtral" and not config.norm_topk_prob:
        warnings.warn("a mixtral checkpoint that does not renormalise its router's weights is read "
                      "as such by minilm alone: transformers always renormalises", stacklevel=3)
    windows = [config.window(i) for i in range(config.num_hidden_layers)]
    values = {key: value for key, value in (others or {}).items() if key not in OURS}
    values["architectures"] = [FAMILIES[family]]
    values |= dataclasses.asdict(config)
    values |= {"hidden_act": "silu", "torch_dtype": names[dtype]}
    if family == "mixtral":
        values["num_local_experts"] = values.pop("num_experts")
        values["sliding_window"] = windows[0]
    if family.startswith("qwen"):
        values["use_sliding_window"] = any(windows)
        if family != "qwen3_moe":
            types = ["sliding_attention" if w else "full_attention" for w in windows]
            values["layer_types"] = types
    return {k: v for k, v in values.items() if v is not None or k == "sliding_window"}


def _cannot_say(config: Config) -> str | None:
    """The first field of a model that a config.json of its family has no word for."""
    family = config.model_type
    windows = [config.window(i) for i in range(config.num_hidden_layers)]
    dense_layers = config.mlp_only_layers or config.decoder_sparse_step != 1
    wider = config.moe_intermediate_size != config.intermediate_size
    all_alike = family in ("mixtral", "olmoe")  # every layer a mixture, experts as wide as the MLP
    unsaid = {
        "num_experts": (config.num_experts > 0) != (family in MIXTURES),
        "sliding_window": family in ("llama", "olmoe") and any(windows),
        "layer_types": family in ONE_WINDOW and len(set(windows)) > 1,
        "mlp_only_layers": all_alike and dense_layers,
        "mlp_bias": config.mlp_bias and family != "llama",
        "attention_bias": config.attention_bias and family in ("mistral", "mixtral"),
        "moe_intermediate_size": all_alike and wider,
        "shared_expert_intermediate_size":
            config.shared_expert_intermediate_size and family != "qwen2_moe",
    }
    return next((field for field, is_so in unsaid.items() if is_so), None)


# --- names

MIXTRAL_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def to_hf(name: str, family: str) -> str:
    """Our parameter name -> Hugging Face's:
    layers.0.self_attn.q_proj.weight -> model.layers.0.self_attn.q_proj.weight."""
    name = re.sub(r"^embed\.", "embed_tokens.", name)
    if family == "mixtral":
        name = re.sub(r"\.mlp\.", ".block_sparse_moe.", name)
        for ours, theirs in MIXTRAL_NAMES.items():
            name = re.sub(rf"(experts\.\d+)\.{ours}\b", rf"\1.{theirs}", name)
    return name if name.startswith("lm_head.") else "model." + name


def _stored(name: str, where) -> tuple[str, tuple[int, str] | None]:
    """Hugging Face's name on disk -> the name that these files use, and which part (expert, gate |
    up | down) of that tensor it is: a state_dict() of newer transformers has, in `mlp.experts`, a
    `gate_up_proj` [E, 2F, D] (gate rows first) and a `down_proj` [E, D, F]."""
    if name in where:
        return name, None
    plain = name.replace(".block_sparse_moe.", ".mlp.")
    match = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight", plain)
    if not match:
        return (plain if plain in where else name), None
    experts, number, matrix = match.groups()
    part = {"w1": "gate", "w2": "down", "w3": "up"}.get(matrix, matrix.removesuffix("_proj"))
    fused = f"{experts}.{'down_proj' if part == 'down' else 'gate_up_proj'}"
    return (fused, (int(number), part)) if fused in where else (name, None)


# --- loading

def load_pretrained(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
):
    """-> (model in eval mode, tokenizer or None if the folder has none).

    The model keeps, as dictionaries, the folder's `generation_config` and config.json's
    `other_fields`. Tensors are memory-mapped and converted one by one: the peak stays near the
    weights in the target dtype. Everything in the file is used or refused: InputError names the
    first missing, unexpected, misshapen or non-finite tensors, and a file that is cut short.

    device "meta": embedding, final norm and head are read, onto the CPU; the blocks are not, until
    `training.place` shares them out over several processes."""
    folder = find_checkpoint(folder)
    if folder.suffix == ".gguf":
        if str(device) == "meta":
            raise InputError(f"{folder}: --fsdp reads safetensors alone: convert it, or leave "
                             "--fsdp out")
        from minilm.gguf import load_gguf  # needs the extra `gguf`

        return load_gguf(folder, dtype, device)
    config = read_config(folder)
    model = _load_weights(folder, config, dtype, device)
    model.other_fields = _read_ids(folder / "config.json")
    generation = folder / "generation_config.json"
    model.generation_config = _read_ids(generation) if generation.exists() else {}
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    if tokenizer is not None:
        _check_vocabulary(folder, tokenizer, config.vocab_size)
    return model.eval(), tokenizer


def _read_ids(file: Path) -> dict:
    """A JSON object whose ids of special tokens are what they must be."""
    values = read_json(file)
    with reading(file):
        for key in IDS:
            token_ids(values, key)
    return values


def _check_vocabulary(folder: Path, tokenizer, rows: int) -> None:
    """A token without a row is passed over, with a warning, if no text can become it (a [PAD] that
    was added to a finished model); else tokenizer and model do not belong together."""
    ids = {**tokenizer.vocab, **tokenizer.added}
    beyond = [name for name, i in ids.items() if i >= rows]
    if not set(beyond) <= tokenizer.special.keys():
        raise InputError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's "
                         f"vocabulary is {rows}: they do not belong together")
    if beyond:
        warnings.warn(f"{folder}: the model has {rows} rows, none for {', '.join(beyond[:3])}: it "
                      "can neither read nor say that", stacklevel=3)


def _load_weights(folder: Path, config: Config, dtype: torch.dtype, device) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
    tied = config.tie_word_embeddings
    # "model.norm.weight" -> "norm.weight"
    our_name = {to_hf(name, config.model_type): name for name in model.state_dict()}
    file_of = _find_tensors(folder)
    if tied:
        head, embed = our_name.pop("lm_head.weight"), "model.embed_tokens.weight"
        other = file_of.pop(head, None)  # stored nevertheless
        if other and embed in file_of:
            if not torch.equal(_map(other, head), _map(file_of[embed], embed)):
                raise InputError(f"{other}: config.json ties {head} to {embed}, but they differ: "
                                 "set tie_word_embeddings to false")
    stored_as = {name: _stored(name, file_of) for name in our_name}
    used = {name for name, _ in stored_as.values()}
    missing = [name for name, (stored, _) in stored_as.items() if stored not in file_of]
    unused = [name for name in file_of if name not in used]
    unused = [name for name in unused if not name.endswith("rotary_emb.inv_freq")]
    other_model = "config.json is of another model"
    report(folder, "lacks", missing, f"the download may be incomplete, or {other_model}")
    report(folder, "has unexpected", unused, other_model.replace("is", "may be", 1))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    state = {}
    places = {}  # our name -> file, name there, part of it
    for theirs, ours in our_name.items():
        name, part = stored_as[theirs]
        if part is not None:
            part = (*part, config.num_experts)
        places[ours] = (file_of[name], name, shapes[ours], part)
    if str(device) == "meta":
        model.unread = Unread(places)
        model.to(dtype)
        blocks = [name for name in places if name.startswith("layers.")]
        state = {name: model.get_parameter(name) for name in blocks}
        places = {name: place for name, place in places.items() if name not in state}
        device = "cpu"
    # A tensor used as it is stored stays a part of the mapped file: one mapping for all of them.
    opened = {}
    if torch.device(device).type == "cpu":
        opened = {file: safe_open(file, "pt") for file in set(file_of.values())}
    for ours, (file, name, shape, part) in places.items():
        state[ours] = read_tensor(file, name, shape, dtype, device, part, opened.get(file))
    if tied:
        state["lm_head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    if tied:
        model.lm_head.weight = model.embed.weight
    return model


class Unread:
    """Where the blocks of a model that was loaded on "meta" are stored."""

    def __init__(self, places: dict):
        self.places = places  # our name -> file, name there, shape, part of it

    def rows(self, name: str, first: int, last: int, dtype: torch.dtype, device) -> torch.Tensor:
        """Rows first to last of a matrix, and nothing else, from disk. An expert that `upcycle`
        made is read where its MLP is."""
        if name not in self.places:
            name = re.sub(r"\.experts\.\d+\.", ".", name)
        file, stored, shape, part = self.places[name]
        return read_tensor(file, stored, shape, dtype, device, part, rows=(first, last))


def _find_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> its file, from model.safetensors or the index of a sharded checkpoint."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return dict.fromkeys(names_in(single), single)
    if not index.exists():
        old = ""
        if any(folder.glob("*.bin")):
            old = (" (pytorch_model.bin is a pickle, which is never loaded: "
                   "convert it to safetensors)")
        raise FileNotFoundError(f"{folder} holds neither {single.name} nor {index.name}{old}")
    weight_map = read_json(index).get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(re.fullmatch(r"[\w.-]+\.safetensors", str(file)) for file in files):
        raise InputError(f"{index} lacks the field 'weight_map' with a .safetensors file of this "
                         "folder for every tensor: download or save it again")
    where = {name: folder / file for name, file in weight_map.items()}
    for file in sorted(set(where.values())):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing, but {index.name} needs it: "
                                    "complete the download")
        absent = {name for name, f in where.items() if f == file} - set(names_in(file))
        report(file, "lacks", sorted(absent), "the index and the shard do not belong together")
    return where


def names_in(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as f:
            return list(f.keys())
    except SafetensorError as error:
        raise InputError(f"{file} is not a complete safetensors file ({error}): "
                         "download or save it again") from None


def read_tensor(
    file: Path,
    name: str,
    shape: tuple,
    dtype: torch.dtype,
    device,
    part: tuple[int, str, int] | None = None,
    opened=None,
    rows: tuple[int, int] | None = None,
) -> torch.Tensor:
    """One tensor, converted. `part`: (expert, gate | up | down, number of experts) of a fused one;
    `opened`: the file, where many tensors are read of it; `rows`: these alone, in memory of their
    own. InputError for another shape, for integers, and for NaN or infinite values."""
    tensor = _map(file, name, shape, part, opened)
    if tuple(tensor.shape) != shape:
        whose = "adapter" if "adapter" in file.name else "checkpoint"
        raise InputError(f"{file}: {name} has shape {list(tensor.shape)}, {list(shape)} is needed: "
                         f"the {whose} is of another model (or its vocabulary was extended)")
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise InputError(f"{file}: {name} has dtype {tensor.dtype}: "
                         "quantised checkpoints are not read")
    # 8 MB at a time: the peak stays near the target's size
    step = max(1, 2**23 * len(tensor) // max(1, tensor.nbytes))
    if tensor.dtype == dtype and rows is None:
        tensor = tensor.to(device)
    else:
        first, last = rows or (0, len(tensor))
        tensor = torch.empty((last - first, *shape[1:]), dtype=dtype, device=device)
        for start in range(0, len(tensor), step):
            chunk = slice(start, start + step)
            # each in a mapping of its own: what was converted need not stay mapped
            tensor[chunk] = _map(file, name, shape, part)[first:last][chunk]
    if not all(_is_finite(chunk) for chunk in tensor.split(step)):
        too_large = ""
        if dtype == torch.float16:
            too_large = ", or its numbers are too large for this type: use bfloat16"
        raise InputError(f"{file}: {name} holds NaN or infinite values in {dtype}: "
                         f"the checkpoint is damaged{too_large}")
    return tensor


def _is_finite(x: torch.Tensor) -> bool:
    """One pass is the rule: a finite sum (in float32 inside; asking for it would make a copy). But
    a sum of large numbers may overflow."""
    return math.isfinite(x.sum()) or bool(x.isfinite().all())


def _map(
    file: Path,
    name: str,
    shape: tuple = (),
    part: tuple[int, str, int] | None = None,
    opened=None,
) -> torch.Tensor:
    with contextlib.nullcontext(opened) if opened else safe_open(file, "pt") as f:
        if part is None:
            return f.get_tensor(name)
        expert, which, num_experts = part
        whole, rows = f.get_slice(name), shape[0]
        fused = [num_experts, rows * (1 if which == "down" else 2), shape[1]]
        if whole.get_shape() != fused:
            raise InputError(f"{file}: {name} has shape {whole.get_shape()}, {fused} is needed: "
                             "it is of another model")
        return whole[expert, rows : 2 * rows] if which == "up" else whole[expert, :rows]


def report(where: Path, verb: str, names: list[str], remedy: str) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(f"{where} {verb} {', '.join(names[:3])}{more}: {remedy}")


# --- saving

def save_pretrained(
    model: Transformer,
    folder: str | Path,
    tokenizer=None,
    max_shard_bytes: int = 5 * 10**9,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes config.json, the weights (in shards above `max_shard_bytes`), where generation stops
    (generation_config.json) and the tokenizer. A tied head is written once. The numbers are
    written in `dtype` (default: the one they have). Of several processes all must call it; one
    writes, and of a sharded model it never has more than one of these shards.

    Each file is written under a temporary name, flushed and renamed, shards become visible by
    their index only: a process killed at any moment leaves the last complete weights. Give a model
    of another shape or tokenizer a folder of its own: a kill between two files would leave the
    fields of the old one beside the weights of the new."""
    folder = Path(folder)
    state = model.state_dict()
    if is_sharded(model) and not any(
        whole_tensor(t).any() for name, t in state.items() if name.endswith(".lora_B")
    ):  # what merge_lora left of them
        state = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    if any(".lora_" in name for name in state):
        raise InputError("the model has LoRA layers: save_adapter(model, folder), or "
                         "merge_lora(model, keep=False) and then save it")
    if any(name.endswith(".q") for name in state):  # a Linear4 or Linear8
        raise InputError("the model is quantised for inference and cannot be saved: "
                         "save it before it is quantised")
    if any(".qkv_proj." in name for name in state):
        raise InputError("the model is fused for inference: save it before Transformer.fuse")
    family = model.config.model_type
    state = {to_hf(name, family): t.detach() for name, t in state.items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    others = getattr(model, "other_fields", {})
    config = config_json(model.config, dtype or next(iter(state.values())).dtype, others)
    ids, generation = _ids_to_write(model, tokenizer)
    _write_weights(state, folder, max_shard_bytes, dtype)
    if not is_chief():
        return
    write_json(folder / "config.json", config | ids)
    if generation:
        write_json(folder / "generation_config.json", generation)
    else:
        (folder / "generation_config.json").unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save(folder)


def _ids_to_write(model: Transformer, tokenizer) -> tuple[dict, dict]:
    """-> bos, eos and pad ids for config.json (null is said: left out, a class has numbers of its
    own), and generation_config.json, whose EOS is all that `stop_ids` stops at."""
    others = getattr(model, "other_fields", {})
    generation = dict(getattr(model, "generation_config", {}))
    stops = stop_ids(model, tokenizer)
    eos = stops[0] if len(stops) == 1 else stops or None
    own = {"eos_token_id": eos}
    if tokenizer is not None:
        own["bos_token_id"] = tokenizer.bos_id
        own["pad_token_id"] = tokenizer.token_id(tokenizer.config.get("pad_token"))
    ids = {key: others.get(key, own.get(key)) for key in IDS}
    if not generation:  # transformers would take all three from config.json; a file is taken alone
        generation = {key: i for key, i in ids.items() if i is not None}
    if stops != token_ids(generation, "eos_token_id"):
        generation["eos_token_id"] = eos
    return ids, generation if stops or getattr(model, "generation_config", {}) else {}


def _write_weights(state: dict, folder: Path, max_shard_bytes: int, dtype) -> None:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    shards, files = _shards(state, max_shard_bytes, dtype), []
    if len(shards) == 1:
        _write_shard(single, state, dtype)
    else:
        run = os.urandom(4).hex()  # new names: the last checkpoint's shards stay until the index
        for i, shard in enumerate(shards, 1):
            files.append(f"model-{run}-{i:05d}-of-{len(shards):05d}.safetensors")
            _write_shard(folder / files[-1], shard, dtype)
    if not is_chief():
        return
    if len(shards) == 1:
        index.unlink(missing_ok=True)
    else:
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        total = sum(_nbytes(t, dtype) for t in state.values())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
        single.unlink(missing_ok=True)
    for old in {*folder.glob("model-*-of-*.safetensors")} - {folder / file for file in files}:
        old.unlink()


def _write_shard(file: Path, shard: dict, dtype) -> None:
    on_cpu = {}
    for name, tensor in shard.items():
        tensor = whole_tensor(tensor)  # of a sharded model: by all processes together
        if is_chief():
            on_cpu[name] = tensor.to(dtype or tensor.dtype).cpu().contiguous()
    if on_cpu:
        write_atomically(file, lambda path: save_file(on_cpu, path, {"format": "pt"}))


def _nbytes(tensor: torch.Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def _shards(state: dict, limit: int, dtype: torch.dtype | None) -> list[dict]:
    shards, size = [{}], 0
    for name, tensor in state.items():
        nbytes = _nbytes(tensor, dtype)
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes
    return shards
