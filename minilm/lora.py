"""LoRA: train a low-rank difference instead of the weights (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    y = W x + s B A x       W [out, in] frozen, A [r, in], B [out, r],   s = alpha / r   (rsLoRA: alpha / sqrt(r), arXiv 2312.03732)

    add_lora(model, rank=8, alpha=16)      # in place; B = 0, so nothing changes before training, and only A and B learn
    merge_lora(model)                      # W <- W + s B A for fast inference; unmerge_lora(model) gives back the very same W
    save_adapter(model, "out/adapter");  load_adapter(model, "out/adapter")     # the files of the `peft` package, read and written
    extend_vocabulary(model, pieces)       # rows for the tokens that tokenizer.extend_tokenizer has added"""

import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from minilm import InputError
from minilm.data import read_json, reading, write_atomically, write_json
from minilm.ops import Linear
from minilm.weights import names_in, read_tensor, report, to_hf

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # never norms, never a router
PREFIX = "base_model.model."
MODULES = {"embed_tokens": "embed", "lm_head": "lm_head"}  # PEFT's modules_to_save that are read, and our names


class LoRALinear(nn.Module):
    """Stands in the place of a linear layer and keeps its `weight` and `bias` under their names. A and B are float32 whatever W is."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float, rslora: bool, generator: torch.Generator | None):
        super().__init__()
        if rank < 1:
            raise InputError(f"LoRA rank {rank}: give 1 or more")
        self.weight, self.bias = linear.weight, linear.bias
        out, in_ = linear.weight.shape
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        A = torch.empty(rank, in_).uniform_(-1 / math.sqrt(in_), 1 / math.sqrt(in_), generator=generator)
        self.lora_A = nn.Parameter(A.to(linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out, rank, device=linear.weight.device))
        self.original = None  # W before merging, on the CPU; not None: merged
        self.train(linear.training)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.original is not None:
            if self.training and torch.is_grad_enabled():
                raise ValueError("this LoRA layer is merged and cannot be trained: call unmerge_lora first")
            return y
        low = F.linear(F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype), self.lora_A)  # (..., r)
        return y + (self.scale * F.linear(low, self.lora_B)).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> float:
        """W <- W + s B A, computed in float32; returns the share of the difference that W's dtype rounds away."""
        self.original = self.weight.detach().cpu().clone()
        before, delta = self.original.to(self.weight.device, torch.float32), self.scale * self.lora_B @ self.lora_A
        self.weight.copy_(before + delta)
        return float((self.weight.float() - before - delta).norm() / delta.norm().clamp(min=1e-30))


def add_lora(model: nn.Module, rank: int = 8, alpha: float = 16, targets: Sequence[str] = TARGETS, dropout: float = 0.0,
             rslora: bool = False, generator: torch.Generator | None = None) -> None:
    """Freezes the model, then gives every linear layer whose name ends in one of `targets` an adapter, in place: rank r, scale alpha / r.
    `embed` and `lm_head` have no adapter: train them in full by switching their requires_grad on afterwards (PEFT's modules_to_save)."""
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already: merge_lora(model, keep=False) or start from a fresh model")
    found = {name: name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.split(".")[-1] in targets}
    if not found or not set(targets) <= {*found.values()}:
        raise InputError(f"no linear layer is called {', '.join(t for t in targets if t not in found.values())}: nothing there to adapt")
    model.requires_grad_(False)
    for name in found:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), rank, alpha, dropout, rslora, generator))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def merge_lora(model: nn.Module, keep: bool = True) -> None:
    """Adds every difference to its weight. keep: the layers stay and `unmerge_lora` can undo it; else they become ordinary linear layers,
    trainable again, and the checkpoint is an ordinary one. Warns when more than 5% of the differences is rounded away (bfloat16)."""
    layers = lora_layers(model)
    if not layers or any(m.original is not None for m in layers.values()):
        raise ValueError("there is nothing to merge: the model has no LoRA layers, or they are merged already")
    lost = max(m.merge() for m in layers.values())
    if lost > 0.05:
        warnings.warn(f"merging rounds away up to {lost:.0%} of the learned differences in {next(model.parameters()).dtype}: merge in "
                      "float32, or keep the adapter", stacklevel=2)
    for name, m in layers.items() if not keep else ():
        linear = Linear(m.weight.shape[1], m.weight.shape[0], bias=m.bias is not None, device="meta")
        linear.weight, linear.bias = m.weight.requires_grad_(), m.bias
        model.set_submodule(name, linear)
    if not keep:
        model.requires_grad_(True)


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Restores the weights from before `merge_lora`, bit for bit (subtracting would not: rounding is not undone)."""
    layers = lora_layers(model).values()
    if not layers or any(m.original is None for m in layers):
        raise ValueError("there is nothing to take back: the model has no LoRA layers, or they are not merged")
    for m in layers:
        m.weight.copy_(m.original)
        m.original = None


# --- a longer vocabulary

@torch.no_grad()
def extend_vocabulary(model: nn.Module, pieces: Sequence[Sequence[int]], first: int | None = None) -> None:
    """Adds a row to embedding and head, in place, for every new token: the mean of the rows of its old `pieces`, for [] of all old rows.
    The first has the id `first` (default: behind the last; a checkpoint may have spare rows). No old logit changes. And as the mean of
    all V head rows gives the mean logit, n such tokens get, by Jensen's inequality, a probability of at most n / (V + n) in any context."""
    at = len(model.embed.weight) if first is None else first
    if not 0 < at <= len(model.embed.weight):
        raise InputError(f"the first new token has the id {at}, but the model has {len(model.embed.weight)} rows only")
    for module in (model.embed, model.lm_head) if len(pieces) else ():
        old = module.weight.detach()
        rows = torch.stack([old[list(ids) if ids else slice(at)].float().mean(0) for ids in pieces]).to(old.dtype)
        module.weight = nn.Parameter(torch.cat((old[:at], rows, old[at + len(rows) :])), module.weight.requires_grad)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed.weight
    model.config.vocab_size = model.embed.num_embeddings = model.lm_head.out_features = len(model.embed.weight)


# --- PEFT's files

def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """adapter_config.json and adapter_model.safetensors: A and B of every layer, and `embed` or `lm_head` in full if they were trained."""
    layers, family, file = lora_layers(model), model.config.model_type, Path(folder) / "adapter_model.safetensors"
    if not layers:
        raise ValueError("the model has no LoRA layers to save")
    first, full = next(iter(layers.values())), [m for m, ours in MODULES.items() if getattr(model, ours).weight.requires_grad]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True, "bias": "none",
              "r": first.rank, "lora_alpha": first.alpha, "lora_dropout": first.dropout, "use_rslora": first.rslora,
              "target_modules": sorted({to_hf(name, family).split(".")[-1] for name in layers}),
              "rank_pattern": {to_hf(n, family): m.rank for n, m in layers.items() if m.rank != first.rank},
              "alpha_pattern": {to_hf(n, family): m.alpha for n, m in layers.items() if m.alpha != first.alpha},
              "modules_to_save": full or None}
    data = {name: t.detach().cpu().contiguous().clone() for name, t in _tensors(model, layers, full).items()}
    write_atomically(file, lambda path: save_file(data, path, {"format": "pt"}))
    write_json(file.with_name("adapter_config.json"), config)


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Adds LoRA layers as the folder's adapter_config.json says and fills them. What the file holds and what its configuration implies
    must agree exactly: InputError names the first missing, extra, misshapen or non-finite tensor, or the PEFT feature that is not read."""
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already: load the adapter into a fresh model")
    file, full, layers = Path(folder) / "adapter_model.safetensors", [], {}
    config = read_json(file.with_name("adapter_config.json"))
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: an adapter folder holds adapter_config.json and adapter_model.safetensors")
    with reading(file.with_name("adapter_config.json")):
        _refuse(config)
        full = [m.removeprefix("model.") for m in config.get("modules_to_save") or []]
        if odd := [m for m in full if m not in MODULES]:
            raise InputError(f"modules_to_save {odd[0]!r} is not read; minilm reads embed_tokens and lm_head")
        full = list(MODULES) if full and model.config.tie_word_embeddings else full
        for name, module in model.named_modules():
            hf = to_hf(name, model.config.model_type)
            if isinstance(module, nn.Linear) and name != "lm_head" and _is_target(hf, config.get("target_modules")):
                rank, alpha = (_override(config, *keys, hf) for keys in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")))
                layers[name] = LoRALinear(module, rank, alpha, config.get("lora_dropout", 0.0), bool(config.get("use_rslora")), None)
        if not layers:
            raise InputError(f"target_modules {config.get('target_modules')!r} names no linear layer of this model")
    held, wanted = names_in(file), _tensors(model, layers, full)
    remedy = "adapter_config.json and the weights do not belong together, or to this model"
    report(file, "lacks", [n for n in wanted if n not in held], remedy)
    report(file, "has unexpected", [n for n in held if n not in wanted], remedy)
    tensors = {name: read_tensor(file, name, tuple(p.shape), p.dtype, p.device) for name, p in wanted.items()}
    if full and model.config.tie_word_embeddings and not torch.equal(*(tensors[n] for n in list(wanted)[-2:])):
        raise InputError(f"{file}: lm_head and embed_tokens differ, but this model ties them: the adapter was trained on an untied model")
    model.requires_grad_(False)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    for name, new in layers.items():
        model.set_submodule(name, new)
    for m in full:
        getattr(model, MODULES[m]).weight.requires_grad_(True)


def _tensors(model: nn.Module, layers: dict[str, LoRALinear], full: Sequence[str]) -> dict[str, nn.Parameter]:
    """What an adapter file holds under which names. (A tied matrix is written twice, as PEFT wants it.)"""
    hf = lambda name: PREFIX + to_hf(name, model.config.model_type)
    adapters = {f"{hf(name)}.lora_{x}.weight": getattr(m, "lora_" + x) for name, m in layers.items() for x in "AB"}
    return adapters | {hf(MODULES[m] + ".weight"): getattr(model, MODULES[m]).weight for m in full}


def _is_target(hf: str, targets: str | list[str] | None) -> bool:
    """Does target_modules, a list of names or of their ends, or a regular expression, mean the layer that Hugging Face calls `hf`?"""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, hf) is not None
    return any(hf == t or hf.endswith("." + t) for t in targets or ())


def _override(config: dict, pattern: str, key: str, hf: str) -> float:
    """The layer's own rank or alpha (`pattern`: regular expressions for the ends of names), else the one of all layers."""
    own = [v for k, v in (config.get(pattern) or {}).items() if re.fullmatch(rf"(.*\.)?({k})", hf)]
    return own[0] if own else config.get(key, 8)


def _refuse(config: dict) -> None:
    """PEFT's variants change the formula or the base weights: each is named, none is passed over."""
    plain = {"peft_type": "LORA", "bias": "none", "lora_bias": False, "layer_replication": None, "target_parameters": None,
             "fan_in_fan_out": False, "trainable_token_indices": None, "layers_to_transform": None, "exclude_modules": None}
    plain |= {key: False for key in config if key.startswith("use_") and key != "use_rslora"} | {"init_lora_weights": True}
    for key, value in plain.items():
        if config.get(key) not in (value, None, [], {}, False) and (key, config[key]) != ("init_lora_weights", "gaussian"):
            raise InputError(f"{key} {config[key]!r} is not read; plain LoRA has {key} {value!r}")
