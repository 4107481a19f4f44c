"""Pretrain a small language model on any text, and see what it learned.

    python train.py                        # about 2.5 minutes on 2 cores: Python's own library
    python train.py --data FILE_OR_FOLDER  # your UTF-8 text; --level char for a character model
    python train.py --resume               # goes on exactly where an interrupted run stopped
    python sample.py --prompt "def main("  # talk to the result
    torchrun --nproc-per-node 8 train.py --dtype bfloat16 --compile ...    # many GPUs (--fsdp: a
                                           # share of the weights on each, for what fits on none)

Writes to --out (default out/), at every evaluation: a checkpoint in Hugging Face layout, and
training.pt, from which --resume goes on to the same losses, bit for bit on a CPU. At the end:
loss.png and log.json. What an earlier run saved there is never overwritten unasked."""

import contextlib
import hashlib
import math
import shutil
import sysconfig
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from minilm import InputError
from minilm.data import (
    generator, make_folder, random_blocks, read_documents, read_text, read_tokens, reading,
    write_tokens)
from minilm.generate import generate
from minilm.moe import load_balancing_loss
from minilm.ops import linear_cross_entropy
from minilm.results import check_range, check_unused, cli, new_figure, save_figure, write_json
from minilm.tokenizer import CharLevel, load_tokenizer, train_bpe
from minilm.training import (
    Processes, autocast, chief_first, distribute, gather, gather_weights, leave_world, load_shards,
    load_state, make_optimizers, pick_device, save_shards, save_state, schedule, set_lr,
    start_world)
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained


def train(run: "Run") -> None:
    """The training loop: a batch, its loss, the gradients, one step of the optimizers."""
    cfg = run.cfg
    for step in run.bar:
        set_lr(run.optimizers, schedule(step, cfg.steps, cfg.schedule, cfg.warmup))
        total = 0.0
        for _ in range(run.accumulate):  # a batch that does not fit at once comes in parts
            batch = random_blocks(run.data.train, cfg.block, run.micro_batch, run.order)
            ids, labels = (x.to(run.device, non_blocking=True) for x in batch)
            with autocast(run.device, cfg.dtype):
                loss = run.step_loss(ids, labels) / run.accumulate  # parts add up to a mean
            loss.backward()
            total = total + loss.detach()
        nn.utils.clip_grad_norm_(run.model.parameters(), cfg.clip)  # one odd batch is no leap
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.losses.append(total)
        show_speed(run, step, total)
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            report(run, step + 1)
            save(run, step + 1)


@dataclass(frozen=True)
class Config:
    """The recipe, and why.

    muon     a gradient has a few strong directions and many weak ones; Muon gives all of them a
             step of one size, and a model of this size reaches a loss in fewer steps than by AdamW.
             It is made for matrices that map hidden states to hidden states: the embedding, the
             head, routers and norms keep AdamW. Both take the same --lr (see training.Muon).
    wsd      the rate stays at its peak for four fifths of the steps, where most is learned, and
             falls to a tenth in the last fifth, where the loss settles. Warm-up comes first, since
             the optimizers' averages over past gradients are still empty.
    split    a user's text is cut by position, and Python's library by whole files: were single
             sentences held out, their neighbours would tell the model much of them."""

    data: str | None = None  # UTF-8 text, or folder of .txt, .md, .py (default: Python's library)
    level: str = "bpe"  # tokens: bpe (byte-level, trained on the data) or char (single characters)
    vocab_size: int = 2048  # of the BPE
    checkpoint: str | None = None  # start from this Hugging Face folder's model and tokenizer
    out: str = "out"  # folder for everything that is written
    resume: bool = False  # go on with the run in --out (give the same flags again)
    layers: int = 4  # blocks
    width: int = 192  # model width
    heads: int = 3  # attention heads
    kv_heads: int | None = None  # key/value heads, fewer than heads for grouped-query attention
    num_experts: int = 0  # experts per block; 0: an ordinary MLP
    experts_per_token: int = 2  # experts that each token passes
    block: int = 256  # tokens per sequence
    batch: int = 8  # sequences per step, over all processes
    micro_batch: int | None = None  # sequences at once per process, if a batch does not fit
    steps: int = 400  # optimizer steps (the rates follow from it: fixed for the whole run)
    lr: float = 5e-3  # peak learning rate
    optimizer: str = "muon"  # muon (matrices; the rest AdamW) or adamw
    schedule: str = "wsd"  # wsd, cosine, linear or constant
    warmup: int = 20  # steps of linear warm-up
    weight_decay: float = 0.1  # decoupled, matrices only
    clip: float = 1.0  # gradient norm
    dtype: str = "float32"  # float32 or bfloat16 (mixed precision)
    compile: bool = False  # torch.compile
    activation_checkpointing: bool = False  # less memory, a third more time: blocks run twice
    fsdp: bool = False  # torchrun: each process holds a share of the weights (FSDP2), not all (DDP)
    device: str = "auto"  # auto (cuda, else cpu), cpu, cuda, mps
    seed: int = 1337  # of the weights and of the order of the data
    eval_every: int = 100  # steps between evaluations; the run is saved at each
    eval_batches: int = 24  # batches per evaluation, the same ones every time


def main(cfg: Config) -> dict:
    check(cfg)
    run = prepare(cfg)
    if cfg.resume:
        resume(run)
    else:
        keep_earlier_run(run)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)  # what cannot be written shows before training
    run.started = time.time() - run.seconds
    run.bar = tqdm(range(run.saved, cfg.steps), initial=run.saved, total=cfg.steps, desc="training",
                   disable=not run.chief, dynamic_ncols=True)
    try:
        train(run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(what_is_kept(run)) from None
    except OSError as error:  # a full disk
        raise InputError(f"{error}. {what_is_kept(run)}") from None
    return finish(run)


# --- loss

class Loss(nn.Module):
    """The training objective as a module, because DDP and FSDP2 do their work around a module's
    forward: mean of -log p(next token) in nats; in training, plus the load-balancing loss for a
    mixture of experts."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, ids, labels):  # both int64 [B, T]
        config = self.model.config
        if self.training and config.num_experts:
            out = self.model(ids, output_router_logits=True)
            logits = out.logits.flatten(0, 1).float()  # [B*T, V]
            ce = nn.functional.cross_entropy(logits, labels.flatten())
            balance = load_balancing_loss(out.router_logits, config.num_experts_per_tok)
            return ce + config.router_aux_loss_coef * balance
        return linear_cross_entropy(self.model.hidden(ids), self.model.lm_head.weight, labels)


@torch.no_grad()
def evaluate(cfg: Config, loss_module, tokens, device) -> float:
    """Mean loss in nats per token over the same `eval_batches` batches every time, without the
    balancing loss (in every process: FSDP2 gathers weights for all)."""
    gen = generator(cfg.seed, "evaluation")
    total = 0.0
    loss_module.eval()
    for _ in range(cfg.eval_batches):
        ids, labels = (x.to(device) for x in random_blocks(tokens, cfg.block, cfg.batch, gen))
        with autocast(device, cfg.dtype):
            total += float(loss_module(ids, labels))
    loss_module.train()
    return total / cfg.eval_batches


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """What a byte of text costs: comparable between tokenizers, as a loss per token is not."""
    return nats_per_token / bytes_per_token / math.log(2)


# --- data

END = "<|endoftext|>"


class Data(NamedTuple):
    tokenizer: object
    train: np.ndarray  # tokens, memory-mapped
    val: np.ndarray
    bytes_per_token: float  # of the validation text
    key: str  # hash of text and tokenizer


def standard_library() -> tuple[list[str], list[str]]:
    """Python's own sources (a few MB, the same for one interpreter) -> training and validation
    documents. A twentieth of the files, chosen by a hash of their names, is held out. Tests and
    IDLE are left out: they are long and repetitive."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "turtledemo",
            "ensurepip", "__pycache__"}
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
        raise InputError(f"this Python has no library sources under {root}: give a text, --data")
    return train, val


def load_documents(cfg: Config) -> tuple[list[str], list[str]]:
    """Training and validation documents. A user's text is split by position: first 90% and last
    10%, as usual for tinyshakespeare."""
    if cfg.data is None:
        return standard_library()
    documents = read_documents(cfg.data)
    left = int(0.9 * sum(map(len, documents)))  # characters that still go to training
    train, val = [], []
    for text in documents:
        if left > 0:
            train.append(text[:left])
        if len(text) > left:
            val.append(text[left:])
        left = max(0, left - len(text))
    return train, val


def make_data(cfg: Config, tokenizer=None) -> Data:
    """Tokenizer (trained, unless one is given) and tokens are kept in .cache/KEY, so that a second
    run on the same text starts at once. The folder appears whole, by one rename: runs that start
    together each make it, and all use the first. One that is damaged is made again."""
    parts = dict(zip(("train", "val"), load_documents(cfg)))
    made_by = (tokenizer.spec, tokenizer.eos_id) if tokenizer else f"{cfg.level}/{cfg.vocab_size}"
    key = hashlib.sha256(repr((made_by, parts)).encode()).hexdigest()[:16]
    entry = Path(".cache") / key

    def make(folder):
        made = tokenizer or make_tokenizer(cfg, parts)
        if tokenizer is None:
            made.save(folder)
        for part, texts in parts.items():
            write_tokens(folder / f"{part}.npy", encode(made, texts), made.vocab_size)

    for attempts_left in (2, 1, 0):
        was_there = entry.exists()
        try:
            saved, train, val = tokenizer, *(read_tokens(entry / f"{part}.npy") for part in parts)
            if tokenizer is None:
                (entry / "tokenizer_config.json").stat()  # it names EOS, and may not be missing
                saved = load_tokenizer(entry)
            break
        except (InputError, OSError):  # absent, or damaged
            if not attempts_left:
                raise
            make_folder(entry, make, replace=was_there)
    for part, tokens in (("training", train), ("validation", val)):
        if len(tokens) <= cfg.block:
            raise InputError(f"{cfg.data or 'the standard library'}: its {part} part has "
                             f"{len(tokens)} tokens, one block needs {cfg.block + 1}: "
                             "give more text or a smaller --block")
    val_bytes = sum(len(text.encode()) for text in parts["val"])
    return Data(saved, train, val, val_bytes / len(val), key)


def make_tokenizer(cfg: Config, parts: dict[str, list[str]]):
    if cfg.level == "char":
        return CharLevel.train("".join(parts["train"] + parts["val"]))
    return train_bpe(parts["train"], cfg.vocab_size, special=(END,), eos=END)


def encode(tokenizer, documents: list[str]) -> list[int]:
    """Documents one after the other, each closed by the end-of-text token (if there is one)."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return [token for document in documents for token in (*tokenizer.encode(document), *end)]


# --- what a run consists of

@dataclass
class Run:
    """Everything that a run has beside its flags."""

    cfg: Config
    world: Processes
    device: torch.device
    data: Data
    model: Transformer
    loss_module: nn.Module  # Loss(model); with several processes DDP or FSDP2 around it
    step_loss: nn.Module  # the same, compiled with --compile
    optimizers: list[torch.optim.Optimizer]
    order: torch.Generator  # draws this process's batches
    micro_batch: int  # sequences at once
    accumulate: int  # parts of a batch
    bar: tqdm | None = None
    started: float = 0.0  # time.time(), as if the run had never been interrupted
    losses: list[torch.Tensor] = field(default_factory=list)  # of the steps since the last report
    log: dict = field(default_factory=lambda: {"step": [], "train": [], "val": []})
    saved: int = 0  # steps that training.pt holds
    seconds: float = 0.0  # that they took

    @property
    def out(self) -> Path:
        return Path(self.cfg.out)

    @property
    def chief(self) -> bool:
        return self.world.rank == 0

    def say(self, text: str) -> None:
        if self.chief:
            tqdm.write(text)


def prepare(cfg: Config) -> Run:
    """Reads text and checkpoint, makes the model and its optimizers."""
    device = pick_device(cfg.device)
    world = start_world(device)
    micro_batch = cfg.micro_batch or cfg.batch // world.size
    accumulate = check_processes(cfg, world, micro_batch)
    model, tokenizer = load_checkpoint(cfg) if cfg.checkpoint else (None, None)
    with chief_first(world):
        data = make_data(cfg, tokenizer)
    model = (model or make_model(cfg, data.tokenizer.vocab_size)).to(device).train()
    model.activation_checkpointing = cfg.activation_checkpointing
    loss_module = distribute(Loss(model), model.layers, world, device, cfg.fsdp)
    step_loss = torch.compile(loss_module) if cfg.compile else loss_module
    optimizers = make_optimizers(model, cfg.optimizer, cfg.lr, cfg.weight_decay)
    order = generator(cfg.seed, f"order of process {world.rank}")
    # (so several processes read other windows of the text than one does, in other batches)
    run = Run(cfg, world, device, data, model, loss_module, step_loss, optimizers, order,
              micro_batch, accumulate)
    run.say(f"{device}, {torch.get_num_threads()} threads, {world.size} process(es); "
            f"{sum(p.numel() for p in model.parameters()):,} parameters; "
            f"{len(data.train):,} training and {len(data.val):,} validation tokens "
            f"of {data.bytes_per_token:.2f} bytes")
    if cfg.warmup > cfg.steps > 0:
        run.say(f"note: {cfg.steps} steps end within the warm-up of {cfg.warmup}: "
                "the peak rate is never reached")
    return run


def make_model(cfg: Config, vocab_size: int) -> Transformer:
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=cfg.width,
        intermediate_size=-(-8 * cfg.width // 3 // 32) * 32,  # 8/3 of the width, in whole 32s
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        max_position_embeddings=max(1024, cfg.block),
        tie_word_embeddings=cfg.level == "bpe",  # two tables of characters cost little
        num_experts=cfg.num_experts,
        num_experts_per_tok=cfg.experts_per_token,
        model_type="qwen3_moe" if cfg.num_experts else "qwen3")
    return Transformer(config, generator(cfg.seed, "init"))


def load_checkpoint(cfg: Config):
    model, tokenizer = load_pretrained(cfg.checkpoint)
    if tokenizer is None:
        raise InputError(f"{cfg.checkpoint} has no tokenizer.json: --checkpoint needs one")
    context = model.config.max_position_embeddings
    if cfg.block > context:
        raise InputError(f"--block {cfg.block}: {cfg.checkpoint} reads {context} tokens at most")
    return model, tokenizer


# --- refusals

def check(cfg: Config) -> None:
    """Refuses what no run can be made of and what would be ignored, before anything is read."""
    check_range(cfg, "vocab_size layers width heads kv_heads experts_per_token", least=1)
    check_range(cfg, "block batch micro_batch eval_every eval_batches", least=1)
    check_range(cfg, "num_experts steps warmup weight_decay seed", least=0)
    check_range(cfg, "lr clip", above=0)
    if cfg.level not in ("bpe", "char"):
        raise InputError(f"--level {cfg.level}: use bpe or char")
    autocast(torch.device("cpu"), cfg.dtype)  # these two refuse a name that they do not know
    schedule(0, 1, cfg.schedule)
    if cfg.checkpoint:
        brought = "level vocab_size layers width heads kv_heads num_experts experts_per_token"
        check_unused(cfg, brought, "with --checkpoint, which brings its model and tokenizer")
    if cfg.level == "char":
        check_unused(cfg, "vocab_size", "with --level char")
    if not cfg.num_experts:
        check_unused(cfg, "experts_per_token", "without --num-experts")
    if cfg.warmup > cfg.steps and cfg.warmup != Config.warmup:
        raise InputError(f"--warmup {cfg.warmup} is longer than --steps {cfg.steps}: "
                         "the peak rate would never be reached; give a shorter warm-up")


def check_processes(cfg: Config, world: Processes, micro_batch: int) -> int:
    """-> parts in which each process reads its share of a batch."""
    if cfg.fsdp and (world.size == 1 or cfg.optimizer == "muon"):
        raise InputError("--fsdp shards every matrix over several processes: start with torchrun, "
                         "and give --optimizer adamw (Muon needs whole matrices)")
    if micro_batch == 0 or cfg.batch % (micro_batch * world.size):
        raise InputError(f"--batch {cfg.batch} must be a multiple of --micro-batch {micro_batch} "
                         f"times {world.size} processes")
    return cfg.batch // (micro_batch * world.size)


# --- saving and resuming

def fingerprint(run: Run) -> dict:
    """What a resumed run must share: the data's content, all flags but where to read and write."""
    free = ("resume", "out", "device", "data")
    flags = {name: value for name, value in asdict(run.cfg).items() if name not in free}
    return flags | {"processes": run.world.size, "data": run.data.key}


def differences(saved: dict, run: Run) -> list[str]:
    """In words, what a saved run was made with that this one is not."""
    found = []
    for name, value in fingerprint(run).items():
        before = saved.get(name)
        if before == value:
            continue
        if name == "data":
            found.append("other data")
        elif name == "processes":
            found.append(f"{before} processes (now {value})")
        else:
            found.append(f"--{name.replace('_', '-')} {before} (now {value})")
    return found


def read_state(run: Run, device) -> dict:
    file = run.out / "training.pt"
    state = load_state(file, device)
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise InputError(f"{file} is not a training state of train.py: remove it, "
                         "or give another --out")
    return state


def resume(run: Run) -> None:
    """Puts weights, optimizers, random numbers and log back to where training.pt has them."""
    state = read_state(run, run.device)
    if changed := differences(state["config"], run):
        advice = "give the same flags and data, or another --out without --resume"
        if any(words.startswith("--steps") for words in changed):
            advice += (". A run can be neither lengthened nor shortened, since its rates follow "
                       f"from --steps; what it has learned is in {run.out}/: "
                       f"--checkpoint {run.out} --out NEW trains that further")
        raise InputError(f"{run.out}/training.pt was made with {', '.join(changed)}: {advice}")
    with reading(run.out / "training.pt"):  # names it where an entry is missing
        if run.cfg.fsdp:
            load_shards(run.out / state["shards"], run.loss_module, run.optimizers)
        else:
            run.model.load_state_dict(state["model"])
            for optimizer, saved in zip(run.optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
        run.order.set_state(state["orders"][run.world.rank].cpu())
        run.log = state["log"]
        run.saved = state["step"]
        run.seconds = state["seconds"]


def keep_earlier_run(run: Run) -> None:
    """Refuses to overwrite what another run saved, or this one before it was interrupted. A run
    that would only repeat a finished one to the last bit may."""
    out = run.out
    elsewhere = "give another --out, or remove that folder first"
    if not (out / "training.pt").exists():
        if (out / "config.json").exists():
            raise InputError(f"{out}/ holds a checkpoint, which is not overwritten: {elsewhere}")
        return
    state = read_state(run, "meta")  # everything but the numbers in its tensors
    if changed := differences(state["config"], run):
        raise InputError(f"{out}/ holds another run, made with {', '.join(changed)}: {elsewhere}")
    if state["step"] < run.cfg.steps:
        raise InputError(f"{out}/ holds this run up to step {state['step']} of {run.cfg.steps}: "
                         f"go on with --resume, or {elsewhere}")


def save(run: Run, step: int) -> None:
    """training.pt appears whole or not at all, then the checkpoint of the same step. With --fsdp
    training.pt names the folder of this step's shards, which were complete before it."""
    state = {"config": fingerprint(run), "log": run.log, "step": step}
    state["seconds"] = time.time() - run.started
    state["orders"] = gather(run.world, run.order.get_state())
    if run.cfg.fsdp:
        state["shards"] = f"shards-{step}"
        save_shards(run.out / state["shards"], run.loss_module, run.optimizers)
    else:
        state["model"] = run.model.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer in run.optimizers]
    if run.chief:
        save_state(run.out / "training.pt", state)
        for old in run.out.glob("shards-*"):
            if old.name != state.get("shards"):
                shutil.rmtree(old)
    run.saved = step
    export(run)


def export(run: Run) -> Transformer:
    """Writes the model as it is now in Hugging Face layout, so that it can be used at any time."""
    model = whole_model(run) if run.cfg.fsdp else run.model
    if run.chief:
        save_pretrained(model, run.out, run.data.tokenizer)
    return model


def whole_model(run: Run) -> Transformer:
    """The sharded model put together, in process 0 (elsewhere without numbers)."""
    weights = gather_weights(run.model)
    with torch.device("meta"):
        model = Transformer(run.model.config)
    model.load_state_dict(weights if run.chief else model.state_dict(), assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed.weight
    return model


def what_is_kept(run: Run) -> str:
    if not run.saved:
        return f"Nothing is saved yet: the first save is at step {run.cfg.eval_every}, --eval-every"
    kept = (f"{run.out}/ holds step {run.saved} of {run.cfg.steps}: "
            "go on with the same flags and --resume")
    if (run.out / "config.json").exists():  # written after training.pt
        kept += f", or try it as it is: python sample.py --checkpoint {run.out}"
    return kept


# --- what a run tells

def show_speed(run: Run, step: int, loss: torch.Tensor) -> None:
    if step % 10 == 9:  # reading a number waits for the GPU: not at every step
        speed = run.cfg.batch * run.cfg.block * (step + 1) / (time.time() - run.started)
        run.bar.set_postfix_str(f"loss {float(loss):.3f}, {speed:,.0f} tokens/s")


def report(run: Run, step: int) -> None:
    """Logs the mean training loss since the last report, over all processes, and the validation
    loss."""
    val = evaluate(run.cfg, run.loss_module, run.data.val, run.device)
    if not math.isfinite(val):
        raise InputError(f"the loss is {val} at step {step}: use a smaller --lr, or a longer "
                         f"--warmup. The last {run.out}/training.pt is left as it was")
    means = gather(run.world, float(torch.stack(run.losses).mean()))
    run.log["step"].append(step)
    run.log["train"].append(sum(means) / len(means))
    run.log["val"].append(val)
    run.losses.clear()
    run.say(f"step {step:5}: train {run.log['train'][-1]:.4f}, val {val:.4f} nats/token = "
            f"{bits_per_byte(val, run.data.bytes_per_token):.4f} bits/byte")


def finish(run: Run) -> dict:
    """Writes log and loss curve beside the checkpoint, and shows a sample."""
    cfg, log, data = run.cfg, run.log, run.data
    seconds = time.time() - run.started
    summary = {"config": asdict(cfg), "log": log, "bytes_per_token": data.bytes_per_token,
               "seconds": round(seconds, 1), "val_bits_per_byte": None}
    if log["val"]:
        summary["val_bits_per_byte"] = bits_per_byte(log["val"][-1], data.bytes_per_token)
    model = export(run)
    if not run.chief:
        return summary
    write_json(run.out / "log.json", summary)
    save_figure(loss_figure(log, data.bytes_per_token), run.out / "loss.png")
    prompt = [int(i) for i in data.val[:8]]  # how the held-out text begins
    ids = generate(model.eval(), [prompt], max_new_tokens=200, temperature=0.7, top_k=50)[0]
    words = "import" if cfg.data is None else "The"
    print(f"\n--- a sample ---\n{data.tokenizer.decode(ids)}\n---")
    print(f"wrote {run.out}/ after {seconds:.0f} s of training; "
          f'try: python sample.py --checkpoint {run.out} --prompt "{words}"')
    return summary


def loss_figure(log: dict, bytes_per_token: float):
    bits = bits_per_byte(1.0, bytes_per_token)  # per nat
    fig, ax = new_figure(width=7.5, height=4.2)
    ax.plot(log["step"], log["train"], color="#999999", label="training")
    ax.plot(log["step"], log["val"], color="#0072B2", label="validation")
    ax.set(xlabel="step", ylabel="loss (nats per token)", title="Learning curve")

    def to_bits(nats):
        return nats * bits

    def to_nats(x):
        return x / bits

    right = ax.secondary_yaxis("right", functions=(to_bits, to_nats))
    right.set_ylabel("bits per byte")
    ax.legend()
    return fig


if __name__ == "__main__":
    cli(main, Config)
    leave_world()
