"""How much memory a companion (methods/real/) needs, in bytes a weight: measured on a small model,
computed for larger ones.

    python bench_memory.py            # a minute; writes results/bench_memory.json
    python bench_memory.py --quick    # smoke test: a tiny model, numbers without meaning, in runs/

Every row is what a process holds at most (the kernel's high-water mark) above what it held before
it read the first weight: the checkpoint (in bfloat16, as they are published) is loaded into
float32, then two steps are taken on a few tokens, or a few are read. One process, and each of two
processes that torchrun would start: with all of the weights (DDP), or with a share (--fsdp). So the
rows hold weights, gradients and optimizer state, and hardly any activation. What `table` (for the
README) gives beside them for models of 1.8, 7 and 13 billion weights is computed, not measured."""

import gc
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import _peak, conditions, merge, print_rows, row
from minilm.data import generator
from minilm.lora import add_lora
from minilm.ops import linear_cross_entropy
from minilm.results import ROOT, cli
from minilm.training import (
    join,
    leave_world,
    make_optimizers,
    my_parts,
    place,
    share_out,
    together,
    update,
)
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained

RANK = 16  # of the adapters
WAYS = {"one process": (1, False), "each of two, DDP": (2, False), "each of two, FSDP": (2, True)}
TASKS = ("load", "train every weight", "train an adapter", "answer")


@dataclass(frozen=True)
class Config:
    quick: bool = False  # smoke test: tiny shapes
    device: str = "cpu"  # the high-water mark is the kernel's
    out: str | None = None  # JSON file (default: results/bench_memory.json; --quick: in runs/)


@dataclass(frozen=True)
class Process:
    """What one of the measured processes is asked to do."""

    task: str
    fsdp: bool
    folder: str
    device: str = "cpu"


def text_loss(model, ids: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(model.hidden(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])


def perform(cfg: Process):
    """Loads the model, and what the task asks for; what it returns is still held."""
    device = join(cfg)
    model, _ = load_pretrained(cfg.folder, device="meta" if cfg.fsdp else device)
    if cfg.task == "train an adapter":
        add_lora(model, RANK, generator=generator(0, "lora"))
    model = place(model, device, cfg.fsdp)
    ids = torch.arange(2 * 9).view(2, 9)
    if cfg.task == "answer":
        share_out(model, ids, read_all(model))
    optimizers = []
    if cfg.task.startswith("train"):
        optimizers = make_optimizers(model, "adamw", 1e-4)
        step_loss = together(text_loss, model)
        for _ in range(2):
            for part, weight in my_parts(ids, 1):
                (step_loss(part) * len(part) / len(ids) * weight).backward()
            update(model, optimizers)
    return model, optimizers


def read_all(model) -> Callable:
    @torch.inference_mode()
    def read(rows):
        return model.hidden(rows).sum((1, 2)).tolist()

    return read


def prepare(cfg: Process, small: str) -> Callable:
    """Imports and first calls are paid for with a tiny model; then comes what is measured."""
    perform(Process(cfg.task, cfg.fsdp, small))
    gc.collect()
    return lambda: perform(cfg)


def measure(rank: int, size: int, port: int, fsdp: bool, folder: str, small: str) -> list[int]:
    """One of `size` processes: what torchrun would tell it, then the peak of every task."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    peaks = [_peak(1, prepare, Process(task, fsdp, folder), small) for task in TASKS]
    leave_world()
    return peaks


def peaks(size: int, *arguments) -> list[int]:
    """Of every task the largest of all processes. What they free goes back to the system at once,
    so that one task leaves the next nothing to use."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    with ProcessPoolExecutor(size, multiprocessing.get_context("spawn")) as pool:
        started = [pool.submit(measure, rank, size, port, *arguments) for rank in range(size)]
        return list(map(max, zip(*(process.result() for process in started))))


def shape(width: int, layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=8 * width,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        model_type="llama",
    )


def memory(cfg: Config) -> list[dict]:
    config = shape(64, 2) if cfg.quick else shape(512, 12)
    rows = []
    with tempfile.TemporaryDirectory() as root:
        small, folder = f"{root}/small", f"{root}/model"
        save_pretrained(Transformer(shape(64, 2), generator(0, "init")), small)
        model = Transformer(config, generator(0, "init"))
        save_pretrained(model, folder, dtype=torch.bfloat16)
        weights = sum(p.numel() for p in model.parameters())
        layer = model.embed.weight.numel() + model.lm_head.weight.numel()
        layer = max(layer, sum(p.numel() for p in model.layers[0].parameters()))
        told = f"{weights:,} weights, {layer:,} of them in the largest layer"
        for way, (size, fsdp) in WAYS.items():
            for task, peak in zip(TASKS, peaks(size, fsdp, folder, small)):
                limit = None
                if task == "load" and fsdp:  # 1.1 times its share, and the largest layer
                    limit = f"<= {4 * (1.1 * weights / size + layer) / weights:.2f}"
                name = f"{task}: {way}"
                rows.append(row(name, peak / weights, "bytes a weight", limit, told))
    return rows


NEEDED = {  # task -> bytes a weight of one process, of each of N without and with --fsdp
    "train every weight": (16, "16 / N"),  # float32: weight, gradient, AdamW's two averages
    "train an adapter": (4, "4 / N"),  # and 16 for each of the few weights of the adapter
    "answer": (4, "4 + 4 / N"),  # its share, and all weights put together
}
SIZES = (1.8, 7, 13)  # billions of weights
MANY = 8  # processes


def table(rows: list[dict]) -> str:
    """For the README: what was measured, and what follows from it for larger models."""
    value = {row["what"]: row["value"] for row in rows}
    ways = "".join(f" {way} |" for way in WAYS)
    larger = ", ".join(f"{size:g}B" for size in SIZES)
    lines = [
        f"| bytes a weight, measured |{ways} {larger} on one or each (DDP), computed "
        f"| on each of {MANY}, `--fsdp`, computed |",
        "|---" * (len(WAYS) + 3) + "|",
    ]
    for task, (one, share) in NEEDED.items():
        measured = "".join(f" {value[f'{task}: {way}']:.1f} |" for way in WAYS)
        each = one / MANY + (4 if task == "answer" else 0)
        computed = [in_gigabytes(one), in_gigabytes(each)]
        lines.append(f"| {task} |{measured} {computed[0]} ({one}) | {computed[1]} ({share}) |")
    return "\n".join(lines) + "\n"


def in_gigabytes(bytes_a_weight: float) -> str:
    return ", ".join(f"{size * bytes_a_weight:.0f}" for size in SIZES) + " GB"


def main(cfg: Config) -> list[dict]:
    folder = ROOT / ("runs" if cfg.quick else "results")
    path = Path(cfg.out) if cfg.out else folder / "bench_memory.json"
    rows = memory(cfg)
    print_rows("memory", rows)
    merge(path, "memory", rows, conditions(cfg))
    return rows


if __name__ == "__main__":
    cli(main, Config)
