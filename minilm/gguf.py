"""GGUF, the one-file format of llama.cpp, Ollama and LM Studio, read as an ordinary minilm model.

    model, tokenizer = load_pretrained("SmolLM2-135M-Instruct.Q4_1.gguf")   # or any --checkpoint

What is in such a file, from its first byte to its last:

    "GGUF", version, counts
    metadata: key -> value            llama.block_count -> 30, tokenizer.ggml.tokens -> 49,152 texts
    list of tensors                   blk.0.attn_q.weight, [576, 576], type Q4_1, where it starts
    the tensors, rows of blocks       a Q4_1 block: 32 weights in 20 bytes (minilm/quantize.py)

Nothing is missing that a Hugging Face folder has: the `llama.` keys are config.json, the
`tokenizer.` keys are tokenizer and chat template. The package `gguf` reads the bytes and turns
blocks into numbers; this file is the dictionary between the two worlds: metadata -> Config, names,
the order of rows in queries and keys, the tokenizer. What it does not know is refused by name."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from minilm import InputError
from minilm.data import reading
from minilm.quantize import Linear4, fits
from minilm.rotary import inverse_frequencies
from minilm.tokenizer import ByteLevelBPE, SentencePieceBPE, Tokenizer
from minilm.transformer import Config, Transformer
from minilm.weights import report

try:
    import gguf
except ImportError:
    raise InputError("to read a .gguf file, install its package: pip install gguf") from None


# --- the file


class Reader(gguf.GGUFReader):
    """The package takes what the file still has; a file cut short must be an error instead."""

    def _get(self, offset, dtype, count=1, override_order=None):
        self.data = self.data.view(np.ndarray)  # slices of a np.memmap take three times as long
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise InputError(f"it is cut short at {len(self.data):,} bytes: download it again")
        return super()._get(offset, dtype, count, override_order)


def open_gguf(file: str | Path) -> tuple[Reader, dict]:
    """-> the reader (its `tensors` are memory-mapped) and the metadata {key: value}.

    Raises FileNotFoundError, and InputError for a file that is no GGUF file or not all of one."""
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    with reading(file):
        with open(file, "rb") as f:
            magic = f.read(4)
        if magic != b"GGUF":
            raise InputError(f"it starts with {magic!r}, a GGUF file with b'GGUF'")
        reader = Reader(file)
        if reader.byte_order == "S":
            raise InputError("its numbers are big-endian, which is not read: gguf-convert-endian")
        meta = {key: _value(field) for key, field in reader.fields.items()}
        if meta.get("split.count", 1) > 1:
            raise InputError("it is one part of several: join them with llama-gguf-split --merge")
        return reader, meta


def _value(field):
    """A number, text or list. float32 becomes the shortest decimal: 1e-05, not 9.99999974e-06."""
    value = field.contents()
    if field.types == [gguf.GGUFValueType.FLOAT32]:
        return float(str(np.float32(value)))
    return value


# --- metadata -> Config

FAMILIES = {
    "llama": "llama",  # a Mistral or Mixtral file says llama, too
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
}
FIELDS = {  # metadata key, without the architecture in front -> Config's field
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_weights_norm": "norm_topk_prob",
}
NEEDED = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
SCALING = {  # behind rope.scaling. -> the key in rope_scaling
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
CHECKED = (  # against a tensor's shape, or below
    "vocab_size",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.finetuned",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
)
ONLY = {  # what is read with this value alone
    "attention.causal": True,
    "expert_gating_func": 1,  # softmax
    "expert_weights_scale": 1.0,
}


def read_config(meta: dict, shapes: dict[str, tuple]) -> Config:
    """Metadata, and {tensor: its shape, as torch has it}, -> Config.

    A Mistral file stores no window, so it is a Llama here: the same model up to that length."""
    architecture = meta.get("general.architecture")
    if architecture not in FAMILIES:
        raise InputError(f"architecture {architecture!r} is not read; minilm reads "
                         f"{', '.join(FAMILIES)} (Mistral and Mixtral files say llama)")
    start = architecture + "."
    own = {key.removeprefix(start): v for key, v in meta.items() if key.startswith(start)}
    for key in NEEDED:
        if key not in own:
            raise InputError(f"the metadata {start}{key} is missing: the file is damaged")
    for key, value in own.items():
        scaling = key.removeprefix("rope.scaling.") in SCALING
        if not (key in FIELDS or key in CHECKED or scaling or ONLY.get(key) == value):
            raise InputError(f"the metadata {start}{key} = {value!r} is not read")
    mixtral = architecture == "llama" and own.get("expert_count", 0) > 0
    family = "mixtral" if mixtral else FAMILIES[architecture]
    values = {field: own[key] for key, field in FIELDS.items() if key in own}
    values.setdefault("norm_topk_prob", family != "qwen2_moe")  # llama.cpp's custom, if unsaid
    if values.get("num_experts"):
        values["num_experts"] = _size(shapes, "blk.0.ffn_gate_exps.weight", 0)
        values["moe_intermediate_size"] = _size(shapes, "blk.0.ffn_gate_exps.weight", 1)
    if family == "qwen2_moe":
        shared = _size(shapes, "blk.0.ffn_gate_shexp.weight", 0)
        values["shared_expert_intermediate_size"] = shared
    _size(shapes, f"blk.{own['block_count'] - 1}.attn_norm.weight", 0)  # there are that many
    optional_bias = not family.startswith("qwen2")  # which always has it
    config = Config(
        vocab_size=_size(shapes, "token_embd.weight", 0),
        model_type=family,
        attention_bias=optional_bias and "blk.0.attn_q.bias" in shapes,
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
        tie_word_embeddings="output.weight" not in shapes,
        rope_scaling=_rope_scaling(own),
        **values,
    )
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, config.head_dim) != config.head_dim:
            raise InputError(f"the metadata {start}{key} = {own[key]!r} is not read: minilm has "
                             "heads of one width, and turns all of it")
    inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)  # is it complete?
    return config


def _size(shapes: dict[str, tuple], name: str, axis: int) -> int:
    if name not in shapes:
        raise InputError(f"it lacks {name}: the file is damaged, or of another kind of model")
    return shapes[name][axis]


def _rope_scaling(own: dict) -> dict | None:
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise InputError(f"rope.scaling.type {kind!r} is not read; minilm reads none, linear, yarn")
    stored = {hf: own.get(f"rope.scaling.{key}") for key, hf in SCALING.items()}
    return {"rope_type": kind, **{key: value for key, value in stored.items() if value is not None}}


def _llama3_scaling(config: Config, factors: torch.Tensor) -> dict:
    """Files of Llama 3.1 and later store what its scaling comes to, not its parameters: by how much
    each of the Dh/2 frequencies is divided. The largest is the factor (8 or 32); the parameters
    published beside it are tried, and the tensor says whether they are the right ones."""
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, _ = inverse_frequencies(config.head_dim, config.rope_theta, None)
    scaled, _ = inverse_frequencies(config.head_dim, config.rope_theta, scaling)
    if factors.shape != plain.shape or not torch.allclose(plain / scaled, factors, rtol=1e-3):
        raise InputError("rope_freqs.weight is another scaling than Llama 3's, which is not read")
    return scaling


# --- names, and the order of rows

OUTER = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INNER = {  # ours, within layers.N. -> the file's, within blk.N.
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",  # the router
    "mlp.experts.gate_proj": "ffn_gate_exps",  # all experts in one tensor [E, F, D]
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}


def gguf_name(name: str) -> tuple[str, int | None]:
    """Our name of a parameter -> the file's name, and which expert of that tensor it is.

        layers.3.mlp.experts.1.up_proj.weight  ->  blk.3.ffn_up_exps.weight, 1"""
    if name in OUTER:
        return OUTER[name], None
    _, layer, part = name.split(".", 2)
    part, kind = part.rsplit(".", 1)  # kind: weight or bias
    expert = re.search(r"experts\.(\d+)\.", part)
    inner = INNER[re.sub(r"experts\.\d+\.", "experts.", part)]
    return f"blk.{layer}.{inner}.{kind}", int(expert[1]) if expert else None


def stored_rows(name: str, tensors: dict, config: Config) -> np.ndarray:
    """The rows of our parameter `name`, packed as in the file, in our order.

    Llama's queries and keys: a rotary embedding turns pairs of a head's coordinates, (i, i + Dh/2)
    here and at Hugging Face, (2i, 2i + 1) in llama.cpp. So its converter has put row i + Dh/2
    behind row i; here they part again. A row is packed by itself, and moves as it is."""
    theirs, expert = gguf_name(name)
    rows = tensors[theirs].data
    if expert is not None:
        rows = rows[expert]
    heads = 0
    if ".q_proj." in name:
        heads = config.num_attention_heads
    if ".k_proj." in name:
        heads = config.num_key_value_heads
    if heads and config.model_type in ("llama", "mixtral"):
        pairs = rows.reshape(heads, config.head_dim // 2, 2, -1)
        rows = pairs.swapaxes(1, 2).reshape(rows.shape)
    return rows


# --- loading


def load_gguf(file, dtype: torch.dtype = torch.float32, device="cpu", keep_four_bits: bool = False):
    """-> model in eval mode with plain weights of this type, tokenizer or None. `keep_four_bits`:
    linear layers whose blocks are Q4_0 or Q4_1 keep them, as Linear4.

    Matrices are unpacked a few megabytes at a time: the peak stays near the model's size. Every
    tensor of the file is used or refused; all damage is an InputError that names the file."""
    reader, meta = open_gguf(file)
    with reading(Path(file)):
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        config, factors = _config_of(meta, tensors)
        with torch.device("meta"):
            model = Transformer(config)
        wanted = model.state_dict()
        if config.tie_word_embeddings:
            del wanted["lm_head.weight"]
        used = {gguf_name(name)[0] for name in wanted}
        other = "the file is damaged, or of another kind of model"
        report("it", "lacks", sorted(used - tensors.keys()), other)
        report("it", "has unexpected", sorted(tensors.keys() - used - factors), other)
        state = {}
        for name, p in wanted.items():
            _check_shape(name, tuple(p.shape), tensors, config)
            rows = stored_rows(name, tensors, config)
            tensor = tensors[gguf_name(name)[0]]
            path = name.rpartition(".")[0]
            layer = model.get_submodule(path)
            four_bits = tensor.tensor_type in (Q4_0, Q4_1) and fits(*p.shape)
            if keep_four_bits and four_bits and isinstance(layer, torch.nn.Linear):
                q, *numbers = read_blocks(rows, tensor.tensor_type)
                if not all(part.isfinite().all() for part in numbers):
                    raise InputError(f"{tensor.name} holds NaN or infinite values: "
                                     "the file is damaged")
                parts = (part.to(device) for part in (q, *numbers))
                model.set_submodule(path, Linear4(*parts, layer.bias))
            else:
                state[name] = _unpack(rows, tensor, p.shape, dtype, device)
        if config.tie_word_embeddings:
            state["lm_head.weight"] = state["embed.weight"]
        kept = {name: t for name, t in model.state_dict().items() if not t.is_meta}  # a Linear4's
        model.load_state_dict(state | kept, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed.weight
        tokenizer = read_tokenizer(meta)
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise InputError(f"its tokenizer has {tokenizer.vocab_size} tokens, its embedding "
                             f"{config.vocab_size} rows: the file is damaged")
        model.generation_config = _generation_config(meta)
    return model.eval(), tokenizer


def _config_of(meta: dict, tensors: dict) -> tuple[Config, set[str]]:
    """-> Config, and the names of the tensors that went into it."""
    config = read_config(meta, {name: _shape(tensor) for name, tensor in tensors.items()})
    if "rope_freqs.weight" not in tensors:
        return config, set()
    factors = torch.tensor(tensors["rope_freqs.weight"].data)
    config.rope_scaling = _llama3_scaling(config, factors)
    return config, {"rope_freqs.weight"}


def _shape(tensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # the file has the columns first


def _check_shape(name: str, ours: tuple, tensors: dict, config: Config) -> None:
    theirs, expert = gguf_name(name)
    if expert is not None:
        ours = (config.num_experts, *ours)
    if name.endswith("shared_expert_gate.weight"):
        ours = ours[1:]  # one row, stored as a vector
    stored = _shape(tensors[theirs])
    if stored != ours:
        raise InputError(f"{theirs} has shape {list(stored)}, {list(ours)} is needed: "
                         "the file is damaged, or of another kind of model")


def _unpack(rows: np.ndarray, tensor, shape: tuple, dtype: torch.dtype, device) -> torch.Tensor:
    """Packed rows -> a tensor of this shape."""
    kind = tensor.tensor_type
    values = torch.empty(shape, dtype=dtype, device=device)
    target = values.view(len(rows), -1)
    at = 0
    for chunk in _chunks(rows):
        try:
            numbers = gguf.dequantize(np.ascontiguousarray(chunk), kind)
        except NotImplementedError:
            raise InputError(f"{tensor.name} is of type {kind.name}, which is not read") from None
        part = target[at : at + len(chunk)]
        part.copy_(torch.from_numpy(np.require(numbers, requirements="W")).view(part.shape))
        if not (part.sum(dtype=torch.float32).isfinite() or part.isfinite().all()):  # one pass
            too_large = dtype == torch.float16 and bool(np.isfinite(numbers).all())
            why = "too large for float16: use bfloat16" if too_large else "the file is damaged"
            raise InputError(f"{tensor.name} holds NaN or infinite values: {why}")
        at += len(chunk)
    return values


def _chunks(rows: np.ndarray, limit: int = 2**21) -> Iterator[np.ndarray]:
    """A few rows at a time: about `limit` bytes, up to eight times as many in float32."""
    count = max(1, limit * len(rows) // rows.nbytes)
    for at in range(0, len(rows), count):
        yield rows[at : at + count]


# --- blocks of 4 bits

Q4_0, Q4_1 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1


def read_blocks(rows: np.ndarray, kind) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed rows -> q uint8 in 0..15 [out, in], scale and zero [out, in / 32], so that a weight is
    scale (q - 8) + zero. A block of 32 weights: d and, in Q4_1, m in float16; 16 bytes whose low
    halves are the first 16 weights, the high halves the others. w = d (q - 8), or d q + m."""
    head = 2 if kind == Q4_0 else 4
    data = torch.from_numpy(np.array(rows))
    blocks = data.view(len(rows), -1, head + 16)  # (out, in / 32, bytes)
    d, *m = blocks[..., :head].contiguous().view(torch.float16).float().unbind(-1)
    q = blocks[..., head:]
    q = torch.cat((q & 15, q >> 4), -1).flatten(1)
    return q, d, m[0] + 8 * d if m else torch.zeros_like(d)


# --- the tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LINES_AND_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA3 = rf"{CONTRACTION}|{WORDS}|\p{{N}}{{1,3}}|{MARKS}|{LINES_AND_BLANKS}"
QWEN2 = rf"{CONTRACTION}|{WORDS}|\p{{N}}|{MARKS}|{LINES_AND_BLANKS}"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
CASED = rf"{BEFORE}{UPPER}*{LOWER}+|{BEFORE}{UPPER}+{LOWER}*"
TEKKEN = rf"{CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{LINES_AND_BLANKS}"
RULES = {  # tokenizer.ggml.pre -> the expression that cuts a text before merging, or in words
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "smaug-bpe": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "tekken": TEKKEN,
    "gpt-2": "GPT-2's pattern",
    "olmo": "GPT-2's pattern",
    "smollm": "digits alone, then GPT-2's pattern",
    "starcoder": "digits alone, then GPT-2's pattern",
    "refact": "digits alone, then GPT-2's pattern",
}
WHOLE = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a piece that is a token needs no merges
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def read_tokenizer(meta: dict) -> Tokenizer | None:
    """Metadata -> what a folder's tokenizer.json and tokenizer_config.json would say, as Tokenizer.
    The chat template is in its `config`. None if the file holds no tokenizer."""
    kind = meta.get("tokenizer.ggml.model")
    if kind is None:
        return None
    if kind not in ("gpt2", "llama"):
        raise InputError(f"its tokenizer {kind!r} is not read; known are 'gpt2' (byte-level BPE) "
                         "and 'llama' (SentencePiece-type BPE)")
    texts = _listed(meta, "tokens", None)
    types = _listed(meta, "token_type", len(texts))
    vocab = {text: i for i, text in enumerate(texts) if types[i] != UNUSED}
    for i, text in enumerate(texts):
        if types[i] != UNUSED and vocab[text] != i:
            raise InputError(f"tokens {i} and {vocab[text]} are both {text!r}: the file is damaged")
    whole = (CONTROL, USER_DEFINED) if kind == "gpt2" else (CONTROL, USER_DEFINED, UNKNOWN)
    added = [
        {"id": i, "content": text, **FLAGS, "special": types[i] != USER_DEFINED}
        for text, i in vocab.items() if types[i] in whole
    ]
    config = _tokenizer_config(meta, texts)
    spec = {"version": "1.0", "added_tokens": added, "post_processor": None}
    if config["add_bos_token"]:
        spec["post_processor"] = _starts_with(config["bos_token"], vocab)
    if kind == "gpt2":
        return ByteLevelBPE(spec | _byte_level(meta, vocab), config)
    return SentencePieceBPE(spec | _sentencepiece(meta, vocab, types), config)


def _listed(meta: dict, name: str, length: int | None) -> list:
    """A list with one entry per token."""
    found = meta.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not found or length not in (None, len(found)):
        size = len(found) if isinstance(found, list) else "no"
        needed = f", {length} are needed" if length else ""
        raise InputError(f"tokenizer.ggml.{name} has {size} entries{needed}: the file is damaged")
    return found


def _tokenizer_config(meta: dict, texts: list[str]) -> dict:
    """tokenizer_config.json: BOS, EOS and their kin by their texts, and the chat template."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        i = meta.get(f"tokenizer.ggml.{theirs}_token_id")
        if i is None:
            continue
        if not 0 <= i < len(texts):
            raise InputError(f"tokenizer.ggml.{theirs}_token_id {i} is not among the {len(texts)} "
                             "tokens: the file is damaged")
        config[f"{ours}_token"] = texts[i]
    unsaid = meta["tokenizer.ggml.model"] == "llama" or meta.get("tokenizer.ggml.pre") in WHOLE
    wanted = meta.get("tokenizer.ggml.add_bos_token", unsaid)
    config["add_bos_token"] = bool(wanted) and "bos_token" in config
    if meta.get("tokenizer.chat_template"):
        config["chat_template"] = meta["tokenizer.chat_template"]
    return config


def _starts_with(bos: str, vocab: dict) -> dict:
    """tokenizer.json's way to say that BOS comes first."""
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, other],
        "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
    }


def _byte_level(meta: dict, vocab: dict) -> dict:
    """GPT-2's kind: the file names the rule that cuts a text, and lists the merges."""
    pre = meta.get("tokenizer.ggml.pre")
    if pre not in RULES:
        raise InputError(f"tokenizer.ggml.pre {pre!r} is not read; known are {', '.join(RULES)}")
    merges = [merge.split(" ", 1) for merge in _listed(meta, "merges", None)]
    rule = RULES[pre]
    gpt2 = rule.endswith("GPT-2's pattern")
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": gpt2}
    if rule.startswith("digits"):
        first = {"type": "Digits", "individual_digits": True}
    else:
        first = {"type": "Split", "pattern": {"Regex": rule}}
        first |= {"behavior": "Isolated", "invert": False}
    alone = rule.startswith("GPT-2")
    sequence = {"type": "Sequence", "pretokenizers": [first, last]}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": pre in WHOLE}
    return {
        "normalizer": {"type": "NFC"} if rule == QWEN2 else None,  # Qwen's own; not in llama.cpp
        "pre_tokenizer": last if alone else sequence,
        "decoder": last | {"use_regex": True},
        "model": model,
    }


def _sentencepiece(meta: dict, vocab: dict, types: list[int]) -> dict:
    """Llama 2's kind lists no merges: of all neighbours whose joint text is a token, those with the
    best score are joined. The list that says the same: each way to cut a token into two tokens,
    in the order of the whole's score."""
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if meta.get(f"tokenizer.ggml.{key}"):
            raise InputError(f"a tokenizer that rewrites the text first ({key}) is not read")
    scores = _listed(meta, "scores", len(types))
    words = {text: i for text, i in vocab.items() if types[i] == NORMAL}
    ranked = []
    for text, i in words.items():
        for at in range(1, len(text)):
            a, b = text[:at], text[at:]
            if a in words and b in words:
                ranked.append((-scores[i], words[a], words[b], [a, b]))
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": [pair for *_, pair in sorted(ranked)],
        "byte_fallback": BYTE in types,  # a character without a token becomes its bytes' tokens
        "fuse_unk": True,
        "unk_token": next((text for text, i in vocab.items() if types[i] == UNKNOWN), None),
    }
    prepend = [{"type": "Prepend", "prepend": "▁"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    if not meta.get("tokenizer.ggml.add_space_prefix", True):
        prepend = strip = []
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    blank = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [blank, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, mark]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _generation_config(meta: dict) -> dict:
    """generation_config.json: where to stop (the end of a text, of a turn, of a call), BOS, PAD."""
    ids = {key: meta.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")}
    stops = sorted({i for i in ids.values() if i is not None})
    config = {
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in config.items() if value is not None}
