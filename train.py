"""Pretrain a small language model on any text, and see what it learned.

    python train.py                                        # about 2.5 minutes on 2 cores: learns Python from Python's own standard library
    python train.py --data FILE_OR_FOLDER                  # your UTF-8 text; --level char for a character model
    python train.py --resume                               # goes on exactly where an interrupted run stopped
    python sample.py --prompt "def main("                  # talk to the result
    torchrun --nproc-per-node 8 train.py --dtype bfloat16 --compile ...     # one machine, many GPUs (--fsdp for models that do not fit)

Writes to --out (default out/): a checkpoint in Hugging Face layout (config.json, model.safetensors, tokenizer.json), loss.png,
log.json, and training.pt, from which --resume continues to the same losses, bit for bit on a CPU.
"""

import contextlib
import hashlib
import math
import shutil
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from minilm import InputError
from minilm.data import generator, random_blocks, read_documents, read_text, read_tokens, write_tokens
from minilm.generate import generate
from minilm.moe import load_balancing_loss
from minilm.ops import linear_cross_entropy
from minilm.results import cli, new_figure, save_figure, write_json
from minilm.tokenizer import CharLevel, load_tokenizer, train_bpe
from minilm.training import (autocast, chief_first, distribute, gather, gather_weights, leave_world, load_shards, load_state,
                             make_optimizers, pick_device, save_shards, save_state, schedule, set_lr, start_world)
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained

END = "<|endoftext|>"


@dataclass(frozen=True)
class Config:
    data: str | None = None  # UTF-8 text file, or folder of .txt, .md and .py files; default: the Python standard library's sources
    level: str = "bpe"  # tokens: bpe (byte-level, trained on the data) or char (one per distinct character)
    vocab_size: int = 2048  # of the BPE
    checkpoint: str | None = None  # continue from this Hugging Face folder (its model and tokenizer) instead of a fresh model
    out: str = "out"  # folder for everything that is written
    resume: bool = False  # continue the run whose training.pt lies in --out (give the same flags again)
    layers: int = 4  # blocks
    width: int = 192  # model width
    heads: int = 3  # attention heads
    kv_heads: int | None = None  # key/value heads, fewer than heads for grouped-query attention
    num_experts: int = 0  # experts per block; 0: an ordinary MLP
    experts_per_token: int = 2  # experts that each token passes
    block: int = 256  # tokens per sequence
    batch: int = 8  # sequences per step, over all processes
    micro_batch: int | None = None  # sequences at once per process; smaller than the batch: gradients are accumulated
    steps: int = 400  # optimizer steps
    lr: float = 5e-3  # peak learning rate
    optimizer: str = "muon"  # muon (matrices; the rest AdamW) or adamw
    schedule: str = "wsd"  # wsd, cosine, linear or constant
    warmup: int = 20  # steps of linear warm-up
    weight_decay: float = 0.1  # decoupled, matrices only
    clip: float = 1.0  # gradient norm
    dtype: str = "float32"  # float32 or bfloat16 (mixed precision)
    compile: bool = False  # torch.compile
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time
    fsdp: bool = False  # torchrun: shard the weights over the processes (FSDP2) instead of copying them (DDP)
    device: str = "auto"  # auto (cuda, else cpu), cpu, cuda, mps
    seed: int = 1337  # of the weights and of the order of the data
    eval_every: int = 100  # steps between evaluations; a training.pt is saved at each
    eval_batches: int = 24  # batches per evaluation, the same ones every time


# --- data

def standard_library() -> tuple[list[str], list[str]]:
    """Python's own sources (a few MB, the same for one interpreter) -> training and validation documents. A twentieth of the files,
    chosen by a hash of their names, is held out. Tests and IDLE are left out: they are long and repetitive."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "turtledemo", "ensurepip", "__pycache__"}
    train, val = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if skip & set(name.parts) or path.stat().st_size == 0:
            continue
        with contextlib.suppress(InputError):  # a few library files are deliberately not UTF-8
            text = f"# {name.as_posix()}\n{read_text(path)}"
            held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] % 20 == 0
            (val if held_out else train).append(text)
    if not train or not val:
        raise InputError(f"this Python has no library sources under {root}: give your own text with --data")
    return train, val


def load_documents(cfg: Config) -> tuple[list[str], list[str]]:
    """Training and validation documents. A user's text is split by position: first 90% and last 10%, as usual for tinyshakespeare."""
    if cfg.data is None:
        return standard_library()
    documents = read_documents(cfg.data)
    left, train, val = int(0.9 * sum(map(len, documents))), [], []
    for text in documents:
        train += [text[:left]] if left > 0 else []
        val += [text[left:]] if len(text) > left else []
        left = max(0, left - len(text))
    return train, val


def make_data(cfg: Config, tokenizer=None):
    """-> (tokenizer, training tokens, validation tokens, bytes per validation token, key). Tokenizer and memory-mapped token files are kept
    in a cache folder named by `key`, a hash of text and tokenizer, so that a second run starts at once."""
    if cfg.level not in ("bpe", "char"):
        raise InputError(f"--level {cfg.level}: use bpe or char")
    documents = dict(zip(("train", "val"), load_documents(cfg)))
    made_by = f"{cfg.level}/{cfg.vocab_size}" if tokenizer is None else (tokenizer.spec, tokenizer.eos_id)
    key = hashlib.sha256(repr((made_by, documents)).encode()).hexdigest()[:16]
    cache = Path(".cache") / key
    if tokenizer is None:
        if not (cache / "tokenizer.json").exists():
            made = (CharLevel.train("".join(documents["train"] + documents["val"])) if cfg.level == "char"
                    else train_bpe(documents["train"], cfg.vocab_size, special=(END,), eos=END))
            made.save(cache)
        tokenizer = load_tokenizer(cache)
    tokens = {}
    for part, texts in documents.items():
        if not (cache / f"{part}.npy").exists():
            write_tokens(cache / f"{part}.npy", encode(tokenizer, texts), tokenizer.vocab_size)
        tokens[part] = read_tokens(cache / f"{part}.npy")
        if len(tokens[part]) <= cfg.block:
            raise InputError(f"the {part} text has {len(tokens[part])} tokens, one block needs {cfg.block + 1}: "
                             "give more text or a smaller --block")
    return tokenizer, tokens["train"], tokens["val"], sum(len(text.encode()) for text in documents["val"]) / len(tokens["val"]), key


def encode(tokenizer, documents: list[str]) -> list[int]:
    """Documents one after the other, each closed by the end-of-text token (if the tokenizer has one)."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return [token for document in documents for token in (*tokenizer.encode(document), *end)]


# --- loss

class Loss(nn.Module):
    """The training objective as a module, because DDP and FSDP2 do their work around a module's forward: mean of
    -log p(next token) in nats; in training, plus the load-balancing loss for a mixture of experts."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, ids, labels):
        if self.training and self.model.config.num_experts:
            out = self.model(ids, output_router_logits=True)
            ce = nn.functional.cross_entropy(out.logits.flatten(0, 1).float(), labels.flatten())
            balance = load_balancing_loss(out.router_logits, self.model.config.num_experts_per_tok)
            return ce + self.model.config.router_aux_loss_coef * balance
        return linear_cross_entropy(self.model.hidden(ids), self.model.lm_head.weight, labels)


@torch.no_grad()
def evaluate(cfg: Config, loss_module, tokens, device) -> float:
    """Mean loss in nats per token over the same `eval_batches` batches every time (in every process: FSDP2 gathers weights for all)."""
    gen = generator(cfg.seed, "evaluation")
    total = 0.0
    loss_module.eval()
    for _ in range(cfg.eval_batches):
        ids, labels = (x.to(device) for x in random_blocks(tokens, cfg.block, cfg.batch, gen))
        with autocast(device, cfg.dtype):
            total += float(loss_module(ids, labels))
    loss_module.train()
    return total / cfg.eval_batches


# --- the run

def make_model(cfg: Config, vocab_size: int) -> Transformer:
    config = ModelConfig(
        vocab_size=vocab_size, hidden_size=cfg.width, intermediate_size=-(-8 * cfg.width // 3 // 32) * 32, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, max_position_embeddings=max(1024, cfg.block),
        tie_word_embeddings=cfg.level == "bpe", num_experts=cfg.num_experts, num_experts_per_tok=cfg.experts_per_token,
        model_type="qwen3_moe" if cfg.num_experts else "qwen3")
    return Transformer(config, generator(cfg.seed, "init"))


def check(cfg: Config) -> None:
    """Refuses numbers that no run can be made of, before anything is read."""
    least = dict.fromkeys(("layers", "width", "heads", "kv_heads", "experts_per_token", "block", "batch", "micro_batch", "eval_every",
                           "eval_batches"), 1) | dict.fromkeys(("num_experts", "steps", "warmup", "weight_decay"), 0)
    for name, value in asdict(cfg).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if value is not None and name in least and not value >= least[name]:
            raise InputError(f"{flag}: give {least[name]} or more")
        if name in ("lr", "clip") and not 0 < value < math.inf:
            raise InputError(f"{flag}: give a number above 0")


def main(cfg: Config) -> dict:
    check(cfg)
    device = pick_device(cfg.device)
    world = start_world(device)
    chief = world.rank == 0
    micro = cfg.micro_batch or cfg.batch // world.size
    if cfg.batch % (micro * world.size):
        raise InputError(f"--batch {cfg.batch} must be a multiple of --micro-batch {micro} times {world.size} processes")
    accumulate = cfg.batch // (micro * world.size)
    if cfg.fsdp and (world.size == 1 or cfg.optimizer == "muon"):
        raise InputError("--fsdp shards every matrix over several processes: start with torchrun, and give --optimizer adamw (Muon needs "
                         "whole matrices)")

    model, tokenizer = load_pretrained(cfg.checkpoint) if cfg.checkpoint else (None, None)
    if cfg.checkpoint and tokenizer is None:
        raise InputError(f"{cfg.checkpoint} has no tokenizer.json: --checkpoint needs a folder with one")
    if model and cfg.block > model.config.max_position_embeddings:
        raise InputError(f"--block {cfg.block}: {cfg.checkpoint} reads {model.config.max_position_embeddings} tokens at most")
    with chief_first(world):
        tokenizer, train_tokens, val_tokens, bytes_per_token, data_key = make_data(cfg, tokenizer)
    model = (model or make_model(cfg, tokenizer.vocab_size)).to(device).train()
    model.activation_checkpointing = cfg.activation_checkpointing
    print_once = tqdm.write if chief else lambda text: None
    print_once(f"{device}, {torch.get_num_threads()} threads, {world.size} process(es); "
               f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(train_tokens):,} training and "
               f"{len(val_tokens):,} validation tokens of {bytes_per_token:.2f} bytes")

    loss_module = distribute(Loss(model), model.layers, world, device, cfg.fsdp)
    step_loss = torch.compile(loss_module) if cfg.compile else loss_module
    optimizers = make_optimizers(model, cfg.optimizer, cfg.lr, cfg.weight_decay)
    order = generator(cfg.seed, f"order of process {world.rank}")
    out, log, first, trained_seconds = Path(cfg.out), {"step": [], "train": [], "val": []}, 0, 0.0
    fingerprint = resumable(cfg, world) | {"data": data_key}
    if cfg.resume:
        state = load_state(out / "training.pt", device)
        if not isinstance(state, dict) or state.get("config") != fingerprint:
            raise InputError(f"{out}/training.pt was made with other flags or other data; resume with the same ones, or start afresh "
                             "without --resume")
        if cfg.fsdp:
            load_shards(out / state["shards"], loss_module, optimizers)
        else:
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
        order.set_state(state["orders"][world.rank].cpu())
        log, first, trained_seconds = state["log"], state["step"], state["seconds"]

    autocast(device, cfg.dtype), schedule(0, cfg.steps, cfg.schedule)  # a name that is not known is refused before anything is written,
    out.mkdir(parents=True, exist_ok=True)  # and what cannot be written before the training
    started, running = time.time() - trained_seconds, []
    bar = tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, desc="training", disable=not chief, dynamic_ncols=True)
    for step in bar:
        set_lr(optimizers, schedule(step, cfg.steps, cfg.schedule, cfg.warmup))
        total = 0.0
        for _ in range(accumulate):
            ids, labels = (x.to(device, non_blocking=True) for x in random_blocks(train_tokens, cfg.block, micro, order))
            with autocast(device, cfg.dtype):
                loss = step_loss(ids, labels) / accumulate
            loss.backward()
            total = total + loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running.append(total)
        if step % 10 == 9:  # reading a number waits for the GPU: not at every step
            speed = cfg.batch * cfg.block * (step + 1) / (time.time() - started)
            bar.set_postfix_str(f"loss {float(total):.3f}, {speed:,.0f} tokens/s")
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            val = evaluate(cfg, loss_module, val_tokens, device)
            if not math.isfinite(val):
                raise InputError(f"the loss is {val} at step {step + 1}: use a smaller --lr, or a longer --warmup. The last "
                                 f"{out}/training.pt is left as it was")
            log["step"].append(step + 1)
            log["train"].append(float(torch.stack(running).mean()))
            log["val"].append(val)
            running = []
            print_once(f"step {step + 1:5}: train {log['train'][-1]:.4f}, val {val:.4f} nats/token = "
                       f"{val / bytes_per_token / math.log(2):.4f} bits/byte")
            state = {"config": fingerprint, "orders": gather(world, order.get_state()), "log": log, "step": step + 1,
                     "seconds": time.time() - started}
            save_training(cfg, out, state, model, loss_module, optimizers, chief)
    return finish(cfg, out, model, tokenizer, val_tokens, log, bytes_per_token, time.time() - started, chief)


def resumable(cfg: Config, world) -> dict:
    """The flags that a resumed run must share, beside the data's content; only where it reads and writes may change."""
    return {k: v for k, v in asdict(cfg).items() if k not in ("resume", "out", "device", "data")} | {"processes": world.size}


def save_training(cfg, out, state, model, loss_module, optimizers, chief) -> None:
    """training.pt appears whole or not at all. With --fsdp it names the folder of this step's shards, which were complete before it."""
    if cfg.fsdp:
        state["shards"] = f"shards-{state['step']}"
        save_shards(out / state["shards"], loss_module, optimizers)
    else:
        state |= {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    if chief:
        save_state(out / "training.pt", state)
        for old in out.glob("shards-*"):
            if old.name != state.get("shards"):
                shutil.rmtree(old)


def finish(cfg, out, model, tokenizer, val_tokens, log, bytes_per_token, seconds, chief) -> dict:
    """Saves the checkpoint, the log and the loss curve, and shows a sample."""
    summary = {"config": asdict(cfg), "log": log, "bytes_per_token": bytes_per_token, "seconds": round(seconds, 1),
               "val_bits_per_byte": log["val"][-1] / bytes_per_token / math.log(2) if log["val"] else None}
    if cfg.fsdp:
        weights, config = gather_weights(model), model.config
        with torch.device("meta"):
            model = Transformer(config)
        model.load_state_dict(weights if chief else model.state_dict(), assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed.weight
    if not chief:
        return summary
    save_pretrained(model, out, tokenizer)
    write_json(out / "log.json", summary)
    save_figure(loss_figure(log, bytes_per_token), out / "loss.png")
    prompt = [int(i) for i in val_tokens[:8]]  # how the held-out text begins
    ids = generate(model.eval(), [prompt], max_new_tokens=200, temperature=0.7, top_k=50)[0]
    print(f"\n--- a sample ---\n{tokenizer.decode(ids)}\n---\nwrote {out}/ after {seconds:.0f} s of training; "
          f'try: python sample.py --checkpoint {out} --prompt "{"import" if cfg.data is None else "The"}"')
    return summary


def loss_figure(log: dict, bytes_per_token: float):
    fig, ax = new_figure(width=7.5, height=4.2)
    ax.plot(log["step"], log["train"], color="#999999", label="training")
    ax.plot(log["step"], log["val"], color="#0072B2", label="validation")
    ax.set(xlabel="step", ylabel="loss (nats per token)", title="Learning curve")
    bits = 1 / bytes_per_token / math.log(2)
    right = ax.secondary_yaxis("right", functions=(lambda nats: nats * bits, lambda x: x / bits))
    right.set_ylabel("bits per byte")
    ax.legend()
    return fig


if __name__ == "__main__":
    cli(main, Config)
    leave_world()
