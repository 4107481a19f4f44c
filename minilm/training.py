"""Parts of training: device and precision, parameter groups, AdamW and Muon, schedules, several
processes, checkpoints to resume from.

No Trainer: the loop, the loss and the freezing stand in the script, where a reader sees them. A
fine-tuning script runs under torchrun by a few lines of the part "a loaded model on several
processes":

    device = join(cfg)                              # the processes meet
    model, tokenizer = load_pretrained(cfg.checkpoint, device="meta" if cfg.fsdp else device)
    model = place(model, device, cfg.fsdp)          # after add_lora, upcycle; --fsdp: shares
    step_loss = together(loss, model)               # DDP or FSDP2 around loss(model, ...)
    for part, weight in my_parts(rows, cfg.micro_batch):  # of one batch, this process's parts
        (step_loss(part) * share_of(part) * weight).backward()
    answers = share_out(model, questions, answer)   # each process its share, back in order"""

import contextlib
import datetime
import gc
import math
import os
import pickle
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from minilm import InputError
from minilm.data import write_atomically
from minilm.ops import newton_schulz


def pick_device(name: str = "auto") -> torch.device:
    """"auto" is cuda where there is one, else cpu; any other name is tried. Of several processes
    (torchrun) each has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: this machine (or this build of torch) has none; "
                         "use --device cpu or auto") from None


def autocast(device: torch.device, dtype: str):
    """Context in which matrix products run in bfloat16 while the parameters stay float32; nothing
    for float32."""
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype {dtype!r} is not known: use float32 or bfloat16")
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


# --- optimizers

def parameter_groups(model: nn.Module, weight_decay: float,
                     leave: Sequence[nn.Parameter] = ()) -> list[dict]:
    """Trainable parameters (but those to `leave`) in two groups: matrices with weight decay; norms
    and biases without."""
    left = {id(p) for p in leave}
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in left]
    groups = [{"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


class Muon(torch.optim.Optimizer):
    """MomentUm Orthogonalized by Newton-schulz (Keller Jordan 2024,
    https://kellerjordan.github.io/posts/muon/), for hidden matrices [m, n]:

        M <- beta M + (1 - beta) G
        W <- W - lr (0.2 sqrt(max(m, n)) NS((1 - beta) G + beta M) + weight_decay W)

    A gradient's few strong directions no longer drown the many weak ones: every singular value of
    the update is near 1. The factor 0.2 sqrt(max(m, n)) gives the update AdamW's usual size, so
    both share one learning rate (Liu et al. 2025, arXiv 2502.16982, Eq. 4)."""

    def __init__(self, params, lr: float = 3e-3, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape: dict[torch.Size, list] = {}  # matrices of one shape are one batch
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (m, n), params in by_shape.items():
                beta = group["momentum"]
                grads = [p.grad for p in params]
                for p in params:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - beta)
                mixed = torch._foreach_lerp(grads, buffers, beta)  # (1 - beta) G + beta M
                updates = newton_schulz(torch.stack(mixed))
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                size = -group["lr"] * 0.2 * math.sqrt(max(m, n))
                torch._foreach_add_(params, list(updates.unbind()), alpha=size)


def make_optimizers(model: nn.Module, name: str, lr: float,
                    weight_decay: float = 0.1) -> list[torch.optim.Optimizer]:
    """"adamw": one AdamW. "muon": Muon for the matrices of the blocks, AdamW for the rest
    (embedding, head, router, norms)."""
    if name not in ("adamw", "muon"):
        raise InputError(f"optimizer {name!r} is not known: use adamw or muon")
    hidden = []
    for n, p in model.named_parameters():
        is_router = n.endswith("gate.weight")
        if name == "muon" and p.requires_grad and p.dim() == 2 and "layers." in n and not is_router:
            hidden.append(p)
    optimizers = []
    if groups := parameter_groups(model, weight_decay, leave=hidden):
        optimizers.append(torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=True))
    if hidden:
        optimizers.append(Muon(hidden, lr, weight_decay=weight_decay))
    return optimizers


def schedule(step: int, steps: int, kind: str = "cosine", warmup: int = 0,
             final: float = 0.1) -> float:
    """Factor on the learning rate at `step` (0-based). All kinds rise linearly over `warmup` steps;
    then constant: 1.   linear, cosine: fall to `final` at the last step.
    wsd (warmup-stable-decay, Hu et al. 2024, arXiv 2404.06395): 1 until 80% of the steps, then fall
    linearly to `final`."""
    if kind not in ("constant", "linear", "cosine", "wsd"):
        raise InputError(f"schedule {kind!r} is not known: use cosine, wsd, linear or constant")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))  # 0 ... 1 over the rest
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1 - (1 - final) * done
    if kind == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
    return 1 - (1 - final) * max(0.0, (done - 0.8) / 0.2)  # wsd


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Every group's learning rate = the one it was made with times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def take_step(loss: torch.Tensor, model: nn.Module, optimizers: list[torch.optim.Optimizer],
              clip: float = 1.0) -> None:
    """Backward pass, then `update`."""
    loss.backward()
    update(model, optimizers, clip)


def update(model: nn.Module, optimizers: list[torch.optim.Optimizer], clip: float = 1.0) -> None:
    """Gradients clipped to the norm `clip`, one step of every optimizer, gradients cleared."""
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


# --- several processes (torchrun)

class Processes(NamedTuple):
    rank: int
    size: int


def this_world() -> Processes:
    """Which of the processes this one is; Processes(0, 1) before they have met, and alone."""
    if not dist.is_initialized():
        return Processes(0, 1)
    return Processes(dist.get_rank(), dist.get_world_size())


def is_chief() -> bool:
    """Of several processes one prints, writes and saves."""
    return this_world().rank == 0


def start_world(device: torch.device) -> Processes:
    """Joins the processes that torchrun started (nccl on GPUs, gloo on CPUs); Processes(0, 1) when
    there is only this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Processes(0, 1)
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # One may answer questions for an hour while the others wait: it is torchrun, not a clock,
        # that ends them when it dies.
        patience = datetime.timedelta(days=1)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return this_world()


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def leave_world() -> None:
    """Waits for the other processes, then closes the connections: a process that just ends can
    abort the one that still talks to it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        # A thread of torch's that lets go of its last tensor while the interpreter shuts down
        # aborts the process (pytorch issue 190489): time for it to do so before.
        gc.collect()
        time.sleep(0.2)


def distribute(module: nn.Module, layers: nn.ModuleList, world: Processes, device: torch.device,
               sharded: bool) -> nn.Module:
    """Wraps the module whose forward gives the loss: DDP (all weights in every process) or FSDP2
    (shares, gathered layer by layer)."""
    if world.size == 1:
        return module
    if not sharded:
        devices = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, devices)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.type, (world.size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


@contextlib.contextmanager
def chief_first(world: Processes):
    """Process 0 runs the block alone, then the others do: for files that one makes and all read."""
    if world.rank > 0:
        dist.barrier()
    yield
    if world.rank == 0 and world.size > 1:
        dist.barrier()


def gather(world: Processes, value) -> list:
    """Every process's value, in every process."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def gather_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state dictionary of a sharded model, on the CPU of process 0 (the others get an
    empty one). All processes must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


# --- a loaded model on several processes: split the batch, share the weights, spread the questions

def join(cfg) -> torch.device:
    """The device that --device names, after the processes that torchrun started have met."""
    device = pick_device(cfg.device)
    if start_world(device).size == 1 and cfg.fsdp:
        raise InputError("--fsdp shares the weights out over several processes: start with "
                         "torchrun --nproc-per-node N, or leave it out")
    return device


def place(model: nn.Module, device: torch.device, sharded: bool = False) -> nn.Module:
    """Moves a model to its device or, `sharded`, shares its weights out over all processes (FSDP2),
    in its final form: with the LoRA layers or experts that it was given. Of one that was loaded on
    "meta", whose blocks nobody has read, each process reads its rows of every matrix and no
    others."""
    if not sharded:
        return model.to(device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device.type, (this_world().size,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # embedding, final norm and head
    register_fsdp_forward_method(model, "hidden")  # a loss may call it in place of forward
    for prefix, module in model.named_modules():
        for name, p in [*module.named_parameters(recurse=False)]:
            if p.is_meta:
                values = model.unread.rows(f"{prefix}.{name}", *own_rows(p), p.dtype, device)
                setattr(module, name, _like(p, values))
    return model


def own_rows(p: torch.Tensor) -> tuple[int, int]:
    """The rows of a matrix (entries of a vector) that this process keeps."""
    each = -(-p.shape[0] // p.device_mesh.size())
    first = min(p.shape[0], this_world().rank * each)
    return first, min(p.shape[0], first + each)


def _like(p: torch.Tensor, rows: torch.Tensor) -> nn.Parameter:
    """A parameter shared out as p is, of which `rows` are this process's."""
    from torch.distributed.tensor import DTensor
    whole = DTensor.from_local(rows, p.device_mesh, p.placements, run_check=False,
                               shape=p.shape, stride=p.stride())
    return nn.Parameter(whole, p.requires_grad)


class Objective(nn.Module):
    """loss(model, ...) as a module, because DDP does its work around a module's forward."""

    def __init__(self, loss: Callable, model: nn.Module):
        super().__init__()
        self.loss = loss
        self.model = model

    def forward(self, *inputs, **settings):
        return self.loss(self.model, *inputs, **settings)


def together(loss: Callable, model: nn.Module, unused: bool = False) -> Callable:
    """loss(model, ...) -> a function of the rest whose backward pass leaves in every process the
    mean of all processes' gradients. Call it once the model is placed and what learns is chosen.
    `unused`: some of what learns may be no part of the loss."""
    objective = Objective(loss, model)
    rank, size = this_world()
    if rank > 0:
        torch.manual_seed(torch.initial_seed() + rank)  # dropout: no two processes drop the same
    if size == 1 or is_sharded(model):
        return objective
    return nn.parallel.DistributedDataParallel(
        objective, find_unused_parameters=unused, gradient_as_bucket_view=True)


def is_sharded(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule
    return isinstance(model, FSDPModule)


def my_parts(rows: Sequence, micro_batch: int) -> Iterator[tuple[Sequence, int]]:
    """One batch -> (part, weight), this process's parts of at most `micro_batch` rows. Every
    process holds the same batch and gets as many parts as the others, since they wait for one
    another in each; where none is left it gets the first again, with weight 0. The other weights
    are the number of processes, over which gradients are averaged: the sum over all processes of
    loss times weight is what one process adds up."""
    rank, size = this_world()
    if not len(rows):
        return
    rows_each = min(micro_batch, -(-len(rows) // size))
    parts = [rows[at : at + rows_each] for at in range(0, len(rows), rows_each)]
    for i in range(rank, -(-len(parts) // size) * size, size):
        yield (parts[i], size) if i < len(parts) else (parts[0], 0)


def mean_over_processes(value: float) -> float:
    values = gather(this_world(), value)
    return sum(values) / len(values)


def from_chief(value):
    """Process 0's value, in every process."""
    values = [value]
    if this_world().size > 1:
        dist.broadcast_object_list(values)
    return values[0]


@contextlib.contextmanager
def whole(model: nn.Module):
    """Within the block each process has all weights of a sharded model, so that they may run it in
    steps of their own, as answers of different lengths do. (Weights alone, without gradients or
    optimizer state: but these must fit on every device.)"""
    if not is_sharded(model):
        yield
        return
    from torch.distributed.fsdp import FSDPModule
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    model.set_reshard_after_forward(False)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def share_out(model: nn.Module, items: Sequence, answer: Callable[[Sequence], Sequence]) -> list:
    """answer(items) -> one answer an item, where each process answers its share; all answers, in
    the order of the items, in every process."""
    rank, size = this_world()
    mine = items[rank::size]
    with whole(model):
        answers = list(answer(mine)) if len(mine) else []
    found = [None] * len(items)
    for i, part in enumerate(gather(this_world(), answers)):
        found[i::size] = part
    return found


def own_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor of a sharded model; any other as it is."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a sharded model put together, in every process; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_rows(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Every process's x (all of one shape) side by side, for a loss that compares all rows of a
    batch. Gradients flow through this process's own: computed from the whole in each, they add up
    over the processes to those of one."""
    rank, size = this_world()
    if size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x.detach().contiguous())
    parts[rank] = x
    return torch.cat(parts, dim)


def freeze_rows(p: nn.Parameter, rows: int) -> None:
    """The first rows of a matrix that is trained get no gradient."""

    def clear(p):
        first = own_rows(p)[0] if hasattr(p, "device_mesh") else 0
        own_tensor(p.grad)[: max(0, rows - first)] = 0

    p.register_post_accumulate_grad_hook(clear)


# --- checkpoints to resume from

def save_shards(folder: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Every process writes its share of weights and optimizer states
    (torch.distributed.checkpoint)."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict
    state = dict(zip(("model", "optimizers"), get_state_dict(module, optimizers)))
    checkpoint.save(state, checkpoint_id=folder)


def load_shards(folder: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    set_lr(optimizers, 1.0)  # notes every group's initial_lr, so that it is among what is loaded
    state = dict(zip(("model", "optimizers"), get_state_dict(module, optimizers)))
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(module, optimizers, model_state_dict=state["model"],
                   optim_state_dict=state["optimizers"])


def save_state(path: Path, state: dict) -> None:
    """One file with everything a run needs to go on; a process killed at any moment leaves the last
    complete one."""
    def save(temporary):
        with open(temporary, "wb") as f:  # (given a name, torch.save writes it into the file)
            torch.save(state, f)
    write_atomically(path, save)


def load_state(path: Path, device: torch.device | str = "cpu") -> dict:
    """Reads `save_state`'s file; only tensors and plain values are ever loaded (weights_only)."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: there is no run to resume; "
                                "start one without --resume")
    refusal = f"{path} is not a training state that can be resumed; remove it and start afresh"
    if not zipfile.is_zipfile(path):  # as torch.save's is; a bare pickle or a cut file is not
        raise InputError(refusal)
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        why = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{refusal} ({why[0]})") from None
