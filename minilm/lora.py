"""LoRA: train a low-rank difference instead of the weights
(Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    y = W x + s B A x       W [out, in] frozen, A [r, in], B [out, r]
    s = alpha / r           (rsLoRA: alpha / sqrt(r), https://arxiv.org/abs/2312.03732)

    add_lora(model, rank=8, alpha=16)  # in place; B = 0: nothing changes before training
    merge_lora(model)                  # W <- W + s B A; unmerge_lora(model) gives back the same W
    save_adapter(model, folder)        # the files of the peft package, ...
    load_adapter(model, folder)        # ... from a fresh model on
    extend_vocabulary(model, pieces)   # rows for the tokens of tokenizer.extend_tokenizer"""

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from minilm import InputError
from minilm.data import read_json, reading, write_atomically, write_json
from minilm.ops import Linear
from minilm.training import from_chief, is_chief, is_sharded, own_rows, whole_tensor
from minilm.weights import names_in, read_tensor, report, to_hf

# Never norms, never a router.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."
MODULES = {"embed_tokens": "embed", "lm_head": "lm_head"}  # PEFT's modules_to_save -> our names


class LoRALinear(nn.Module):
    """Stands in the place of a linear layer and keeps its `weight` and `bias` under their names.
    A [r, in] and B [out, r] are float32 whatever W is."""

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float,
        rslora: bool,
        generator: torch.Generator | None,
    ):
        super().__init__()
        if rank < 1:
            raise InputError(f"LoRA rank {rank}: give 1 or more")
        self.weight, self.bias = linear.weight, linear.bias
        out, in_ = linear.weight.shape
        self.rank, self.alpha = rank, alpha
        self.rslora, self.dropout = rslora, dropout
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        # a matrix that was not read yet (see load_pretrained) is on "meta", its adapter never
        device = "cpu" if linear.weight.is_meta else linear.weight.device
        self.lora_A = nn.Parameter(self.draw((rank, in_), generator).to(device))
        self.lora_B = nn.Parameter(torch.zeros(out, rank, device=device))
        self.original = None  # W before merging, on the CPU; not None: merged
        self.train(linear.training)

    @staticmethod
    def draw(shape: tuple[int, int], generator: torch.Generator | None) -> torch.Tensor:
        """A [r, in] as it is before training."""
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.original is not None:
            if self.training and torch.is_grad_enabled():
                raise ValueError("this LoRA layer is merged and cannot be trained: "
                                 "call unmerge_lora first")
            return y
        x = F.dropout(x, self.dropout, self.training)
        low = F.linear(x.to(self.lora_A.dtype), self.lora_A)  # (..., r)
        return y + (self.scale * F.linear(low, self.lora_B)).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> float:
        """W <- W + s B A, computed in float32; returns the share of the difference that W's dtype
        rounds away."""
        self.original = self.weight.detach().cpu().clone()
        before = self.original.to(self.weight.device, torch.float32)
        delta = self.scale * self.lora_B @ self.lora_A
        self.weight.copy_(before + delta)
        lost = self.weight.float() - before - delta
        return float(lost.norm() / delta.norm().clamp(min=1e-30))

    @torch.no_grad()
    def absorb(self) -> None:
        """The same of a sharded layer, whose original is not kept; B <- 0, which adds nothing."""
        W, B = self.weight.to_local(), self.lora_B.to_local()
        W.copy_(W.float() + self.scale * B @ whole_tensor(self.lora_A))
        B.zero_()
        self.lora_A.requires_grad_(False)
        self.lora_B.requires_grad_(False)

    @torch.no_grad()
    def begin(self, generator: torch.Generator | None) -> None:
        """A sharded layer as it is before training, B being 0."""
        A = from_chief(self.draw(self.lora_A.shape, generator))
        first, last = own_rows(self.lora_A)
        self.lora_A.to_local().copy_(A[first:last])
        self.lora_A.requires_grad_(True)
        self.lora_B.requires_grad_(True)


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16,
    targets: Sequence[str] = TARGETS,
    dropout: float = 0.0,
    rslora: bool = False,
    generator: torch.Generator | None = None,
) -> None:
    """Freezes the model, then gives every linear layer whose name ends in one of `targets` an
    adapter, in place: rank r, scale alpha / r. `embed` and `lm_head` have no adapter: train them in
    full by switching their requires_grad on afterwards (PEFT's modules_to_save).

    A sharded model (training.place) has got its layers before it was sharded; those that
    `merge_lora` left behind begin anew."""
    if is_sharded(model) and lora_layers(model):
        model.requires_grad_(False)
        for m in lora_layers(model).values():
            if (m.rank, m.alpha) != (rank, alpha):
                raise ValueError("a sharded model's LoRA layers keep their rank and alpha")
            m.begin(generator)
        return
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already: merge_lora(model, keep=False) or "
                         "start from a fresh model")
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[-1] in targets:
            found[name] = name.split(".")[-1]
    missing = [t for t in targets if t not in found.values()]
    if missing or not found:
        raise InputError(f"no linear layer is called {', '.join(missing)}: nothing there to adapt")
    if unread := _unread_experts(found, model.config.model_type):
        warnings.warn(f"PEFT cannot read an adapter of {unread}: save_adapter will refuse it; "
                      "adapt down_proj or all three (in a qwen2_moe: none), or merge in the end",
                      stacklevel=2)
    model.requires_grad_(False)
    for name in found:
        linear = model.get_submodule(name)
        model.set_submodule(name, LoRALinear(linear, rank, alpha, dropout, rslora, generator))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def merge_lora(model: nn.Module, keep: bool = True) -> None:
    """Adds every difference to its weight. keep: the layers stay and `unmerge_lora` can undo it;
    else they become ordinary linear layers, trainable again, and the checkpoint is an ordinary one.
    Warns when more than 5% of the differences is rounded away (bfloat16).

    The layers of a sharded model cannot be exchanged: with keep=False they stay, adding zero, and
    `save_pretrained` leaves them out."""
    layers = lora_layers(model)
    if not layers or any(m.original is not None for m in layers.values()):
        raise ValueError("there is nothing to merge: the model has no LoRA layers, or they are "
                         "merged already")
    if is_sharded(model):
        if keep:
            raise ValueError("the weights of a sharded model are merged for good: keep=False")
        model.requires_grad_(True)
        for m in layers.values():
            m.absorb()
        return
    lost = max(m.merge() for m in layers.values())
    if lost > 0.05:
        dtype = next(model.parameters()).dtype
        warnings.warn(f"merging rounds away up to {lost:.0%} of the learned differences in "
                      f"{dtype}: merge in float32, or keep the adapter", stacklevel=2)
    if keep:
        return
    for name, m in layers.items():
        out, in_ = m.weight.shape
        linear = Linear(in_, out, bias=m.bias is not None, device="meta")
        linear.weight, linear.bias = m.weight, m.bias
        model.set_submodule(name, linear)
    model.requires_grad_(True)


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Restores the weights from before `merge_lora`, bit for bit (subtracting would not: rounding
    is not undone)."""
    layers = lora_layers(model).values()
    if not layers or any(m.original is None for m in layers):
        raise ValueError("there is nothing to take back: the model has no LoRA layers, or they are "
                         "not merged")
    for m in layers:
        m.weight.copy_(m.original)
        m.original = None


# --- a longer vocabulary

@torch.no_grad()
def extend_vocabulary(
    model: nn.Module,
    pieces: Sequence[Sequence[int]],
    first: int | None = None,
) -> None:
    """Adds a row to embedding and head, in place, for every new token: the mean of the rows of its
    old `pieces`, for [] of all old rows. The first has the id `first` (default: behind the last; a
    checkpoint may have spare rows). No old logit changes. And as the mean of all V head rows gives
    the mean logit, n such tokens get, by Jensen's inequality, a probability of at most n / (V + n)
    in any context."""
    at = len(model.embed.weight) if first is None else first
    if not 0 < at <= len(model.embed.weight):
        raise InputError(f"the first new token has the id {at}, but the model has "
                         f"{len(model.embed.weight)} rows only")
    for module in (model.embed, model.lm_head) if len(pieces) else ():
        old, rows = module.weight.detach(), []
        for ids in pieces:
            of = list(ids) if ids else slice(at)
            rows.append(old[of].float().mean(0))
        new = torch.stack(rows).to(old.dtype)
        longer = torch.cat((old[:at], new, old[at + len(new) :]))
        module.weight = nn.Parameter(longer, module.weight.requires_grad)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed.weight
    size = len(model.embed.weight)
    model.config.vocab_size = model.embed.num_embeddings = model.lm_head.out_features = size


# --- PEFT's files

def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """adapter_config.json and adapter_model.safetensors: A and B of every layer, and `embed` or
    `lm_head` in full if they were trained. InputError for one that PEFT would read otherwise. Of
    several processes all must call it; one writes."""
    layers, family = lora_layers(model), model.config.model_type
    if not layers:
        raise ValueError("the model has no LoRA layers to save")
    if unread := _unread_experts(layers, family):
        raise InputError(f"PEFT would read an adapter of {unread} otherwise: "
                         "merge_lora(model, keep=False) and save_pretrained")
    first = next(iter(layers.values()))
    full = [m for m, ours in MODULES.items() if getattr(model, ours).weight.requires_grad]
    hf = {to_hf(name, family): m for name, m in layers.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "target_modules": sorted({name.split(".")[-1] for name in hf}),
        "rank_pattern": {name: m.rank for name, m in hf.items() if m.rank != first.rank},
        "alpha_pattern": {name: m.alpha for name, m in hf.items() if m.alpha != first.alpha},
        "modules_to_save": full or None,
    }
    data = {}
    for name, tensor in _tensors(model, layers, full).items():
        data[name] = whole_tensor(tensor.detach()).cpu().contiguous().clone()
    if not is_chief():
        return
    file = Path(folder) / "adapter_model.safetensors"
    write_atomically(file, lambda path: save_file(data, path, {"format": "pt"}))
    write_json(file.with_name("adapter_config.json"), config)


def _unread_experts(layers: Iterable[str], family: str) -> str | None:
    """The experts' matrices whose adapter PEFT does not read, if there are any. It fuses gate and
    up: down alone or all three are read, others not; in a qwen2_moe none is."""
    experts = {name.split(".")[-1] for name in layers if ".experts." in name}
    read = [set(), {"down_proj"}, {"gate_proj", "up_proj", "down_proj"}]
    if experts in (read[:1] if family == "qwen2_moe" else read):
        return None
    return f"the experts' {', '.join(sorted(experts))} of a {family}"


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Adds LoRA layers as the folder's adapter_config.json says and fills them. What the file holds
    and what its configuration implies must agree exactly: InputError names the first missing,
    extra, misshapen or non-finite tensor, or the field of PEFT's that is not read.

    An adapter that trained the head or the embedding of a tied model without the other one unties
    them, as in PEFT."""
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already: load the adapter into a fresh model")
    file = Path(folder) / "adapter_model.safetensors"
    config = read_json(file.with_name("adapter_config.json"))
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: an adapter folder holds adapter_config.json "
                                "and adapter_model.safetensors")
    held = names_in(file)
    with reading(file.with_name("adapter_config.json")):
        _check(config)
        layers = _new_layers(model, config)
        full = [m.removeprefix("model.") for m in config.get("modules_to_save") or []]
        if odd := [m for m in full if m not in MODULES]:
            raise InputError(f"modules_to_save {odd[0]!r} is not read; "
                             "minilm reads embed_tokens and lm_head")
    tied = model.config.tie_word_embeddings
    if full and tied:  # (ensure_weight_tying: both are stored though one is named)
        stored = {name.removesuffix(".weight").split(".")[-1] for name in held}
        full = [m for m in MODULES if m in full or m in stored]
    wanted = _tensors(model, layers, full)
    remedy = "adapter_config.json and the weights do not belong together, or to this model"
    report(file, "lacks", [n for n in wanted if n not in held], remedy)
    report(file, "has unexpected", [n for n in held if n not in wanted], remedy)
    tensors = {}
    for name, p in wanted.items():
        tensors[name] = read_tensor(file, name, tuple(p.shape), p.dtype, p.device)
    model.requires_grad_(False)
    if full and tied:
        trained = [tensors[name] for name in list(wanted)[-len(full) :]]
        if len(full) == 1 or not torch.equal(*trained):
            model.lm_head.weight = nn.Parameter(model.embed.weight.detach().clone(), False)
            model.config.tie_word_embeddings = False
            wanted = _tensors(model, layers, full)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    for name, new in layers.items():
        model.set_submodule(name, new)
    for m in full:
        getattr(model, MODULES[m]).weight.requires_grad_(True)


def _new_layers(model: nn.Module, config: dict) -> dict[str, LoRALinear]:
    """The layers that target_modules means, each with its rank and alpha."""
    layers, targets = {}, config.get("target_modules")
    for name, module in model.named_modules():
        hf = to_hf(name, model.config.model_type)
        if not isinstance(module, nn.Linear) or name == "lm_head" or not _is_target(hf, targets):
            continue
        rank = _override(config, "rank_pattern", "r", hf)
        alpha = _override(config, "alpha_pattern", "lora_alpha", hf)
        dropout, rslora = config.get("lora_dropout", 0.0), config.get("use_rslora", False)
        layers[name] = LoRALinear(module, rank, alpha, dropout, rslora, None)
    if not layers:
        raise InputError(f"target_modules {targets!r} names no linear layer of this model")
    return layers


def _tensors(
    model: nn.Module,
    layers: dict[str, LoRALinear],
    full: Sequence[str],
) -> dict[str, nn.Parameter]:
    """What an adapter file holds under which names. (A tied matrix is written twice, as PEFT wants
    it.)"""
    family, tensors = model.config.model_type, {}
    for name, m in layers.items():
        tensors[f"{PREFIX}{to_hf(name, family)}.lora_A.weight"] = m.lora_A
        tensors[f"{PREFIX}{to_hf(name, family)}.lora_B.weight"] = m.lora_B
    for m in full:
        name = to_hf(MODULES[m] + ".weight", family)
        tensors[PREFIX + name] = getattr(model, MODULES[m]).weight
    return tensors


def _is_target(hf: str, targets: str | list[str]) -> bool:
    """Does target_modules, a list of names or of their ends, or a regular expression, mean the
    layer that Hugging Face calls `hf`?"""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, hf) is not None
    return any(hf == t or hf.endswith("." + t) for t in targets)


def _override(config: dict, pattern: str, key: str, hf: str) -> float:
    """The layer's own rank or alpha (`pattern`: regular expressions for the ends of names), else
    the one of all layers."""
    for name, value in (config.get(pattern) or {}).items():
        if re.fullmatch(rf"(.*\.)?({name})", hf):
            return value
    return config.get(key, 8)


# Fields of adapter_config.json that say nothing of what an adapter computes: who made it, how it
# was started, how a feature that is switched off would work.
SILENT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "ensure_weight_tying", "layers_pattern", "megatron_core", "runtime_config",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
}
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules",
        "rank_pattern", "alpha_pattern", "modules_to_save", "init_lora_weights", "bias"}
STARTS = (True, False, "gaussian", "eva", "orthogonal")  # the others change the base's weights


def _check(config: dict) -> None:
    """Every field has its type and range; one that is neither known nor switched off is refused:
    it may change the formula, or the base's weights."""
    for key, value in config.items():
        off = value is None or value is False or value in ([], {})
        if key not in SILENT | READ and not off:
            raise InputError(f"{key} {value!r} is not read: plain LoRA has no such field, or has "
                             "it switched off")
    only = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": STARTS}
    for key, plain in only.items():
        value = config.get(key, None if key == "peft_type" else plain[0])
        if value not in plain:
            raise InputError(f"{key} {value!r} is not read; plain LoRA has {key} {plain[0]!r}")
    for rank in (config.get("r", 8), *_pattern(config, "rank_pattern")):
        if type(rank) is not int:
            raise InputError(f"rank {rank!r} (r, rank_pattern) must be a whole number")
    for alpha in (config.get("lora_alpha", 8), *_pattern(config, "alpha_pattern")):
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise InputError(f"alpha {alpha!r} (lora_alpha, alpha_pattern) must be a number")
    dropout, rslora = config.get("lora_dropout", 0.0), config.get("use_rslora", False)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise InputError(f"lora_dropout {dropout!r} must be a number from 0 to below 1")
    if type(rslora) is not bool:
        raise InputError(f"use_rslora {rslora!r} must be true or false")
    targets, full = config.get("target_modules"), config.get("modules_to_save")
    if type(targets) is not str and not _is_names(targets):
        raise InputError(f"target_modules {targets!r} must be a text or a list of names")
    if full is not None and not _is_names(full):
        raise InputError(f"modules_to_save {full!r} must be a list of names")


def _pattern(config: dict, key: str) -> list:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise InputError(f"{key} {pattern!r} must be an object of names and numbers")
    return [*pattern.values()]


def _is_names(value) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
