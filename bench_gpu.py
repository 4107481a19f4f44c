"""One GPU: is everything right on it, and how fast is it? Needs no network and no package beside
the base set.

    make gpu                # at most eight minutes; writes results/bench_gpu.json
    make gpu DEVICE=cpu     # the same path, tiny shapes: numbers without meaning, in runs/

First the checks: every operation, the model, the mixture, the cache, Muon, LoRA, the loader,
torch.compile and a model sharded over one process, in float32 and bfloat16, against the same on the
CPU. A check that fails says so and the others go on. Then the rows, as in bench.py, with the share
of the card's own measured peak (never a data sheet's). """

import copy
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from bench import alternate, compare, conditions, merge, print_rows, ratio, row
from minilm import InputError
from minilm.data import generator
from minilm.generate import generate
from minilm.lora import add_lora, merge_lora
from minilm.moe import MoE, upcycle
from minilm.ops import (
    grouped_linear,
    grouped_linear_plain,
    linear_cross_entropy,
    newton_schulz,
    rms_norm,
)
from minilm.results import ROOT, check_range, cli
from minilm.training import autocast, make_optimizers, take_step
from minilm.transformer import MLP, Transformer
from minilm.transformer import Config as ModelConfig
from minilm.weights import load_pretrained, save_pretrained


@dataclass(frozen=True)
class Config:
    device: str = "cuda"  # cuda, or cpu: tiny shapes, to see that the commands run
    threads: int | None = None  # CPU threads (default: torch's, one per core)
    out: str | None = None  # JSON file (default: results/bench_gpu.json; on a CPU in runs/)

    @property
    def quick(self) -> bool:
        return self.device == "cpu"


# --- is it right?

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 5e-2}  # of the largest value; TF32 stays off


def same(ours: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> str:
    """Raises AssertionError where two tensors differ by more than the dtype allows; how far they
    are, in words."""
    a, b = ours.detach().float().cpu(), reference.detach().float().cpu()
    worst = float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
    assert worst <= TOLERANCE[dtype], f"differs by {worst:.2g} of the largest value"
    return f"{worst:.1e}"


def random(*shape: int, name: str) -> torch.Tensor:
    return torch.randn(shape, generator=generator(0, name))


def tiny(**change) -> Transformer:
    """Two blocks with grouped key heads; weights large enough for attention to matter."""
    change = {"num_key_value_heads": 2, "initializer_range": 0.1} | change
    return Transformer(ModelConfig(512, 128, 256, 2, 4, **change), generator(0, "init")).eval()


IDS = torch.randint(512, (2, 24), generator=generator(0, "ids"))


def check_norm(device, dtype):
    x, weight = random(64, 256, name="x"), random(256, name="weight")
    ours = rms_norm(x.to(device, dtype), weight.to(device, dtype), 1e-6)
    return same(ours, rms_norm(x, weight, 1e-6), dtype)


def check_loss(device, dtype):
    h, weight = random(96, 64, name="h") / 8, random(300, 64, name="weight")
    labels = torch.randint(300, (96,), generator=generator(0, "labels"))
    grads = []
    for place, kind in (("cpu", torch.float32), (device, dtype)):
        leaves = [t.to(place, kind).requires_grad_() for t in (h, weight)]
        loss = linear_cross_entropy(*leaves, labels.to(place), chunk_bytes=40_000)
        grads.append(torch.autograd.grad(loss, leaves)[1])
    return same(grads[1], grads[0], dtype)


def check_newton_schulz(device, dtype):
    G = random(96, 64, name="G")
    X = newton_schulz(G.to(device, dtype)).float()
    values = torch.linalg.svdvals(X)
    told = f"singular values {values.min():.2f} to {values.max():.2f}"
    assert 0.5 < values.min() and values.max() < 1.4, told
    return told


def check_grouped_products(device, dtype):
    x = random(40, 64, name="x").to(device, dtype)
    weight = random(4, 96, 64, name="weight").to(device, dtype)
    ends = torch.tensor([7, 7, 30, 40], dtype=torch.int32, device=device)
    expected = grouped_linear_plain(x.float().cpu(), weight.float().cpu(), ends.cpu())
    return same(grouped_linear(x, weight, ends), expected, dtype)


def check_model(device, dtype):
    model = tiny()
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[1, :7] = False
    expected = model(IDS, attention_mask=mask).logits[mask]
    model.to(device, dtype)
    logits = model(IDS.to(device), attention_mask=mask.to(device)).logits
    return same(logits.cpu()[mask], expected, dtype)


def check_gradients(device, dtype):
    """Of a training step, bfloat16 by autocast as train.py runs it."""
    model = tiny().train()
    grads = []
    for place, kind in (("cpu", "float32"), (device, str(dtype).removeprefix("torch."))):
        model.to(place).zero_grad()
        ids = IDS.to(place)
        with autocast(torch.device(place), kind):
            loss = linear_cross_entropy(model.hidden(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])
        loss.backward()
        grads.append(model.layers[0].mlp.gate_proj.weight.grad.clone())
    return same(grads[1], grads[0], dtype)


def check_mixture(device, dtype):
    """One product after the other and all as one."""
    model = upcycle(tiny(model_type="qwen3"), 4, copies=False, generator=generator(1, "experts"))
    moe = model.layers[0].mlp
    x = random(1, 32, 128, name="x")
    expected = moe(x)[0]
    moe.to(device, dtype)
    told = []
    for grouped in (False, True):
        moe.grouped = grouped
        told.append(same(moe(x.to(device, dtype))[0], expected, dtype))
    return ", ".join(told)


def check_cache(device, dtype):
    """Token by token, fused and not, equals all at once; and with a cache of fixed size."""
    model = tiny().to(device, dtype)
    ids = IDS[:1].to(device)
    with torch.inference_mode():
        whole = model(ids).logits
        told = []
        for net in (model, copy.deepcopy(model).fuse()):
            cache = net.new_cache(1)
            steps = [net(part, cache=cache).logits for part in ids.split([10, *[1] * 14], dim=1)]
            told.append(same(torch.cat(steps, 1), whole, dtype))
    if dtype == torch.float32:  # bfloat16 has ties
        fixed = FixedStep(model, ids, 64, record=torch.device(device).type == "cuda").generate(12)
        assert fixed == generate(model, ids, max_new_tokens=12)[0], "fixed cache: other tokens"
    return ", ".join(told)


def check_muon(device, dtype):
    """Three steps of Muon and AdamW end where they end on the CPU."""
    weights = []
    for place in ("cpu", device):
        model = tiny().train().to(place)
        optimizers = make_optimizers(model, "muon", 1e-2)
        ids = IDS.to(place)
        for _ in range(3):
            h = model.hidden(ids[:, :-1])
            take_step(linear_cross_entropy(h, model.lm_head.weight, ids[:, 1:]), model, optimizers)
        weights.append(model.layers[1].mlp.up_proj.weight)
    return same(weights[1], weights[0], torch.bfloat16)  # Newton-Schulz runs in bfloat16 on a GPU


def check_lora(device, dtype):
    """With adapters that do something, and with them merged."""
    model = tiny()
    add_lora(model, rank=4, generator=generator(2, "lora"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.normal_(0.0, 0.05, generator=generator(3, name))
    expected = model(IDS).logits
    model.to(device, dtype)
    apart = same(model(IDS.to(device)).logits, expected, dtype)
    merge_lora(model, keep=False)
    return f"{apart}, merged {same(model(IDS.to(device)).logits, expected, dtype)}"


def check_loader(device, dtype):
    with tempfile.TemporaryDirectory() as folder:
        model = tiny()
        save_pretrained(model, folder)
        loaded = load_pretrained(folder, dtype=dtype, device=device)[0]
        return same(loaded(IDS.to(device)).logits, model(IDS).logits, dtype)


def check_compile(device, dtype):
    model = tiny().to(device, dtype)
    cuda = torch.device(device).type == "cuda"
    compiled = torch.compile(model.hidden, backend="inductor" if cuda else "aot_eager")
    return same(compiled(IDS.to(device)), model.hidden(IDS.to(device)), dtype)


def check_sharded(device, dtype):
    """FSDP2 with a single process: the same loss as without."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny().to(device, dtype)
    ids = IDS.to(device)
    expected = model(ids).logits
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
        dist.init_process_group(backend, f"file://{folder}/store", rank=0, world_size=1)
        try:
            mesh = init_device_mesh(torch.device(device).type, (1,))
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            return same(fully_shard(model, mesh=mesh)(ids).logits, expected, dtype)
        finally:
            dist.destroy_process_group()


CHECKS: dict[str, Callable] = {
    "norm": check_norm,
    "linear + cross-entropy": check_loss,
    "Newton-Schulz": check_newton_schulz,
    "grouped products": check_grouped_products,
    "model with padding": check_model,
    "gradients of a step": check_gradients,
    "mixture, one by one and grouped": check_mixture,
    "cache, fused matrices, fixed cache": check_cache,
    "Muon": check_muon,
    "LoRA": check_lora,
    "loader": check_loader,
    "torch.compile": check_compile,
    "FSDP2 with one process": check_sharded,
}


def run_checks(device: str) -> list[dict]:
    rows = []
    for name, check in CHECKS.items():
        for dtype in (torch.float32, torch.bfloat16):
            start = time.perf_counter()
            try:
                told, ok = check(device, dtype), True
            except Exception as error:  # whatever it is: the other checks are worth their time
                told, ok = f"{type(error).__name__}: {error}".splitlines()[0], False
            what = f"{name}, {str(dtype).removeprefix('torch.')}"
            rows.append({"what": what, "ok": ok, "told": told})
            seconds = time.perf_counter() - start
            verdict = "ok" if ok else "FAILED"
            print(f"  {verdict:6} {what:48} {told}  ({seconds:.1f} s)", flush=True)
    return rows


# --- a step that a CUDA graph can record

class FixedCache:
    """Keys and values of one layer in a buffer of fixed size, written at a place that is itself a
    tensor: every step then has the same shapes and addresses, and can be recorded once and
    replayed. What lies behind the place is masked."""

    def __init__(self, shape: tuple, place: torch.Tensor, like: torch.Tensor):
        self.keys = like.new_zeros(shape)  # (B, G, capacity, Dh)
        self.values = like.new_zeros(shape)
        self.place = place  # int64 [1]

    def append(self, k, v):
        self.keys.index_copy_(2, self.place, k)
        self.values.index_copy_(2, self.place, v)
        return self.keys, self.values


class FixedStep:
    """Greedy decoding of one prompt, one token a call. A method's own forward, in the six lines
    that `layers`, `rotary` and a cache of another kind allow. The prompt goes through it token by
    token: only the speed after it is measured."""

    @torch.inference_mode()
    def __init__(self, model: Transformer, prompt: torch.Tensor, capacity: int, record=False):
        c, weight = model.config, model.embed.weight
        self.model, self.prompt = model, prompt
        self.token = prompt[:, :1].clone()  # (1, 1), read and overwritten by a step
        self.place = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self.keys = torch.arange(capacity, device=weight.device)
        shape = (1, c.num_key_value_heads, capacity, c.head_dim)
        self.cache = [FixedCache(shape, self.place, weight) for _ in model.layers]
        self.graph = None
        if record:
            self.step()  # allocates what the recording may not
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()

    def step(self):
        h = self.model.embed(self.token)
        rotary = self.model.rotary(self.place[None], h.dtype)
        seen = (self.keys <= self.place)[None, None, None]  # (1, 1, 1, capacity)
        for layer, cache in zip(self.model.layers, self.cache):
            h, _ = layer(h, rotary, {layer.self_attn.window: seen}, cache)
        self.token.copy_(self.model.lm_head(self.model.norm(h)).argmax(-1))
        self.place += 1

    @torch.inference_mode()
    def generate(self, new: int) -> list[int]:
        """The prompt and `new` tokens. Slots behind `place` hold an older text: masked, then
        overwritten."""
        self.place.zero_()
        written = self.prompt[0].tolist()
        told = []
        for i in range(len(written) + new - 1):
            if i < len(written):
                self.token.copy_(self.prompt[:, i : i + 1])
            self.graph.replay() if self.graph else self.step()
            told.append(self.token[0, 0].clone())
        return written + torch.stack(told[-new:]).tolist()


# --- how fast is it?

def peak_flops(device: str, quick: bool) -> float:
    """Operations per second of a large square product in bfloat16: the best of ten."""
    side = 128 if quick else 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = alternate({"product": lambda: a @ b}, 10, "peak")
    return 2 * side**3 / min(times["product"])


def train_rows(cfg: Config) -> list[dict]:
    """124M parameters, GPT-2's shape, in bfloat16 by autocast."""
    config = ModelConfig(50304, 768, 2048, 12, 12, tie_word_embeddings=True)
    batch, block, rounds = 16, 1024, 10
    if cfg.quick:
        config, batch, block, rounds = ModelConfig(512, 64, 128, 1, 2), 2, 32, 2
    device = torch.device(cfg.device)
    model = Transformer(config, generator(0, "init")).to(device).train()
    optimizers = make_optimizers(model, "adamw", 1e-4)
    tokens = torch.randint(config.vocab_size, (batch, block + 1), generator=generator(0, "tokens"))
    ids = tokens.to(device)

    def loss():
        return linear_cross_entropy(model.hidden(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])

    def stepper(function):
        def step():
            with autocast(device, "bfloat16"):
                value = function()
            take_step(value, model, optimizers)
        return step

    with FlopCounterMode(display=False) as counter, autocast(device, "bfloat16"):
        loss().backward()
    flops = counter.get_total_flops()
    run = {"eager": stepper(loss)}
    if not cfg.quick:
        run["compiled"] = stepper(torch.compile(loss))
    times = alternate(run, rounds, "training")
    peak = peak_flops(cfg.device, cfg.quick)
    rows = []
    for name in run:
        seconds = sorted(times[name])[len(times[name]) // 2]
        told = f"{batch * block / seconds:,.0f} tokens/s; the peak: {peak / 1e12:.1f} TFLOP/s"
        target = ">= 0.5" if name == "compiled" else None
        what = f"training step, 124M, bfloat16, {name}: share of the measured peak"
        rows.append(row(what, flops / seconds / peak, "of 1", target, told))
    return rows


def moe_rows(cfg: Config) -> list[dict]:
    """A mixture layer beside one dense MLP of the same active size, forward and backward,
    bfloat16."""
    T, D, width, E, K = (64, 16, 24, 4, 2) if cfg.quick else (16384, 1024, 1408, 8, 2)
    gen = generator(0, "moe")
    experts = [MLP(D, width) for _ in range(E)]
    layers = {"mixture": MoE(D, experts, K, norm_topk_prob=True), "dense": MLP(D, K * width)}
    x = torch.randn(1, T, D, generator=gen).to(cfg.device, torch.bfloat16).requires_grad_()
    for layer in layers.values():
        for p in layer.parameters():
            torch.nn.init.normal_(p, 0.0, 0.05, generator=gen)
        layer.to(cfg.device, torch.bfloat16)

    def stepper(layer):
        def step():
            layer.zero_grad()
            y = layer(x)
            (y[0] if isinstance(y, tuple) else y).sum().backward()
        return step
    run = {name: stepper(layer) for name, layer in layers.items()}
    times = alternate(run, 2 if cfg.quick else 20, "mixture")
    what = f"mixture layer, {E} experts of width {width}: time over a dense MLP as active"
    told = f"{T} tokens, d {D}, {K} per token, bfloat16"
    return [compare(what, times, "mixture", "dense", "x", "<= 1.3", told)]


def decode_rows(cfg: Config) -> list[dict]:
    """110M parameters, bfloat16, batch 1: what launching small kernels costs, and what recording
    them saves."""
    config = ModelConfig(32000, 768, 2048, 12, 12, tie_word_embeddings=True)
    new, rounds = (4, 2) if cfg.quick else (128, 7)
    if cfg.quick:
        config = ModelConfig(512, 64, 128, 1, 2)
    model = Transformer(config, generator(0, "init")).to(cfg.device, torch.bfloat16).eval()
    prompt = torch.randint(config.vocab_size, (1, 8), generator=generator(0, "prompt"))
    prompt = prompt.to(cfg.device)
    fused = copy.deepcopy(model).fuse()
    run = {
        "eager": lambda: generate(model, prompt, max_new_tokens=new),
        "fused": lambda: generate(fused, prompt, max_new_tokens=new),
    }
    if not cfg.quick:
        recorded = FixedStep(fused, prompt, 256, record=True)
        run["CUDA graph"] = lambda: recorded.generate(new)
    times = alternate(run, rounds, "decoding")
    size = 2 * sum(p.numel() for p in model.parameters())
    rows = []
    for name in run:
        seconds = sorted(times[name])[len(times[name]) // 2] / new
        told = f"{1 / seconds:.0f} tokens/s, {size / seconds / 1e9:.0f} GB/s of weights"
        what = f"greedy decoding, 110M, bfloat16, {name}: over eager"
        rows.append(row(what, ratio(times, "eager", name), "x", None, told))
    return rows


BENCHMARKS: dict[str, Callable] = {"train": train_rows, "moe": moe_rows, "decode": decode_rows}


def main(cfg: Config) -> dict:
    """Checks and rows of every benchmark; what is left when the eight minutes are over is left
    out."""
    check_range(cfg, "threads", least=1)
    if cfg.device not in ("cuda", "cpu"):
        raise InputError(f"--device {cfg.device}: give cuda or cpu")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is found: try make gpu DEVICE=cpu, "
                         "which shows that the commands run")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    started = time.perf_counter()
    folder = ROOT / ("runs" if cfg.quick else "results")
    path = Path(cfg.out) if cfg.out else folder / "bench_gpu.json"
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    checks = run_checks(cfg.device)
    merge(path, "checks", checks, conditions(cfg))
    measured = {"checks": checks}
    for name, benchmark in BENCHMARKS.items():
        if time.perf_counter() - started > 6 * 60:
            print(f"{name}: left out, six minutes are over")
            continue
        rows = benchmark(cfg)
        measured[name] = [{**r, "ok": None} for r in rows] if cfg.quick else rows
        print_rows(name, measured[name])
        merge(path, name, measured[name], conditions(cfg))
    failed = [c["what"] for c in checks if not c["ok"]]
    told = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"\n{len(checks) - len(failed)} of {len(checks)} checks hold{told}")
    print(f"wrote {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return measured


if __name__ == "__main__":
    cli(main, Config)
