"""MoE-LPR on your own checkpoint and text. The method is methods/moe_lpr.py.

Run     python methods/real/moe_lpr.py --checkpoint DIR --new sw.jsonl ru.jsonl --old en.jsonl es.jsonl --ood fr.jsonl --save out
        python methods/real/moe_lpr.py --checkpoint out/stage-1 --stage 2 --methods lpr --new ru.jsonl --old en.jsonl    # the review alone
        python methods/real/moe_lpr.py --checkpoint out/lpr --stage eval --new ru.jsonl --old en.jsonl --eval exam.jsonl
        --new, --old, --ood   a file per language: JSON Lines {"text": ...}, or UTF-8 text with one document a line. The last twentieth of
                       each is held out. ood: old languages that no stage reads.
        --checkpoint   a Llama, Mistral, Qwen2 or Qwen3 folder; saved as Mixtral, Qwen2-MoE or Qwen3-MoE for `transformers`.
        --eval         multiple choice, JSON Lines {"context": "...", "choices": ["...", ...], "gold": 0}: acc, and acc_norm per character.
Paper   the defaults with --dtype bfloat16, 8 billion tokens per new language: Qwen1.5-1.8B becomes 5.9B weights, 4.1B of them trained.
        Memory then: 2 bytes for a frozen weight, 16 for a trained one, plus activations (--micro-batch, --activation-checkpointing).
Shown   results/moe_lpr_real_text.json (with its command): grade-school maths questions, folder gsm_questions of github NJUNLP/QAlign; old
        en, es; new sw, ru, zh. Its base (1.1M weights, 5 min): mkdir base; put() { split -l 1 -a 4 --additional-suffix .txt - base/$1; }
          for l in ru sw zh; do head -300 gsm_questions/$l-en/train.$l | put 1-$l-; done
          for l in en es; do head -7000 gsm_questions/es-en/train.$l | put 2-$l-; done
          python train.py --data base --out out/base --layers 4 --width 128 --heads 4 --block 128 --steps 1200
Honest  The base has read 300 questions in each new language. Settings were chosen on seed 100. A million weights and a few hundred
        thousand tokens show a direction, not the paper's numbers. C6 stays open: one rate of fine-tuning ran, not three.
"""

import copy
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from methods.experiments.moe_lpr import ARMS, PAPER, Arm, changed_tensors, claims, figure, next_token_loss, objective, pack, set_trainable
from minilm import InputError
from minilm.data import generator, read_text
from minilm.evaluate import continuation_logprobs
from minilm.moe import MoE, router_stats, upcycle
from minilm.claims import print_claims
from minilm.results import ROOT, Outcome, cli, print_metrics, progress, run_seeds, save_results
from minilm.training import autocast, make_optimizers, pick_device, schedule, set_lr
from minilm.transformer import Transformer
from minilm.weights import config_json, load_pretrained, save_pretrained
Method = Literal["stage 1", "review ntp", "lpr", "no copies", "one stage", "moe all", "ft 3e-4", "ft 1e-3", "ft 3e-3"]


@dataclass(frozen=True)
class Config:
    checkpoint: str  # Hugging Face folder with a tokenizer: a dense model, or for --stage 2 what stage 1 saved
    new: tuple[str, ...]  # text files, one per new language
    old: tuple[str, ...]  # text files, one per old language
    ood: tuple[str, ...] = ()  # text files of old languages that are only measured
    eval: tuple[str, ...] = ()  # multiple-choice files
    stage: Literal["all", "1", "2", "eval"] = "all"  # what to do: both stages, one of them, or measure only
    methods: tuple[Method, ...] = ("stage 1", "lpr")  # arms; see ARMS in methods/moe_lpr.py
    seeds: tuple[int, ...] = (0,)  # routers and order of the text
    num_experts: int = 6  # expert 0 is the frozen one
    experts_per_token: int = 2  # experts that each token passes
    moe_layers: tuple[int, ...] = ()  # layers to upcycle (default: all)
    alpha: float = 0.01  # stage 1: weight of the load-balancing loss
    lr: float = 5e-5  # stage 1: learning rate
    block: int = 1024  # tokens per block
    batch: int = 512  # stage 1: blocks per step
    limit: int | None = None  # documents to train on per file (default: all but the held-out ones)
    review_docs_old: int = 50_000  # review: documents per old language
    review_docs_new: int = 100_000  # review: documents per new language, out of those that stage 1 read
    review_lr: float = 5e-5  # review: learning rate
    review_batch: int = 512  # review: blocks per step
    gamma: float = 0.1  # review: weight of the routing loss
    lpr_form: Literal["paper", "double"] = "paper"  # double: the official code's second softmax
    micro_batch: int = 8  # blocks at once; the routing loss is averaged over each micro-batch's old tokens
    eval_blocks: int = 64  # held-out blocks per language
    activation_checkpointing: bool = False  # recompute layers in the backward pass: less memory
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: frozen matrices, all matrix products, and what is saved
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


def read_documents(path: str) -> Iterator[str]:
    """Streams the documents of a file, JSON Lines or one a line; empty lines are skipped."""
    is_json = False
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8").strip()
                is_json = is_json or (number == 1 and text.startswith("{"))
                text = json.loads(text)["text"].strip() if is_json and text else text
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(f'{path}, line {number}: {{"text": "..."}} in UTF-8 is needed, or plain UTF-8 text throughout') from None
            if text:
                yield text


def read_corpus(cfg: Config, path: str, group: str, tokenizer) -> Corpus:
    """Token ids go to disk as they are made: the text is never in memory as a whole."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; give JSON Lines or a text with one document a line")
    ends, size = [0], 0
    with tempfile.NamedTemporaryFile(suffix=".uint32") as file:
        for text in read_documents(path):
            file.write(np.array(ids := tokenizer.encode(text), np.uint32).tobytes())
            ends.append(ends[-1] + len(ids))
            size += len(text.encode()) + 1
        file.flush()
        if (n := len(ends) - 1) < 20:
            raise InputError(f"{path} holds {n} documents, at least 20 are needed (one a line)")
        tokens = np.memmap(file.name, np.uint32, "r")
    name = Path(path).suffix.lstrip(".") if Path(path).stem == "train" else Path(path).stem  # parallel corpora: train.en, train.sw
    held_out = range(n - n // 20, n)
    return Corpus(name, group, tokens, np.array(ends), min(held_out.start, cfg.limit or n), held_out, size / (ends[-1] + n))


class Texts:
    """All languages of a run. A selection of documents is an array [n, 2]: which corpus, which of its documents."""

    def __init__(self, cfg: Config, tokenizer, seed: int):
        self.block, self.end, self.seed = cfg.block, tokenizer.eos_id, seed
        self.corpora = [read_corpus(cfg, path, group, tokenizer) for group in ("old", "ood", "new") for path in getattr(cfg, group)]
        if len({c.name for c in self.corpora}) < len(self.corpora):
            raise InputError(f"two languages have one name, out of {', '.join(c.name for c in self.corpora)}: rename a file")

    def choose(self, group: str, most: int | None = None) -> np.ndarray:
        """Up to `most` random documents of each language of the group; a smaller choice is the first part of a larger one."""
        order = lambda c: torch.randperm(c.read, generator=generator(self.seed, c.name))[:most].tolist()
        return np.array([(i, d) for i, c in enumerate(self.corpora) if c.group == group for d in order(c)], int).reshape(-1, 2)

    def tokens(self, documents: np.ndarray) -> int:
        return int(sum(self.corpora[i].ends[d + 1] - self.corpora[i].ends[d] + 1 for i, d in documents))

    def blocks(self, documents: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(ids, old) [block] one after the other, a thousand documents packed at a time (so up to one block per thousand is lost)."""
        for part in np.split(documents, range(1000, len(documents), 1000)):
            rows = [(c.tokens[c.ends[d] : c.ends[d + 1]].tolist(), c.group != "new") for c, d in ((self.corpora[i], d) for i, d in part)]
            yield from zip(*pack(rows, self.block, self.end))


# --- train

def train(cfg: Config, model: Transformer, texts: Texts, documents: np.ndarray, stage: str, alpha: float, gamma: float) -> None:
    """One pass over the documents, packed in random order, of whatever set_trainable left open."""
    batch, lr = (cfg.review_batch, cfg.review_lr) if stage == "review" else (cfg.batch, cfg.lr)
    documents = documents[torch.randperm(len(documents), generator=generator(texts.seed, stage)).numpy()]
    steps, device = (texts.tokens(documents) // cfg.block - len(documents) // 1000) // batch, model.embed.weight.device
    if steps < 1:
        raise InputError(f"{stage}: {len(documents)} documents do not fill {batch} blocks of {cfg.block} tokens: give more text or a "
                         "smaller --block, --batch, --review-batch")
    for module in model.layers.modules() if cfg.dtype == "bfloat16" else []:  # frozen matrices take two bytes a weight
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.to(torch.bfloat16)
    (optimizer,), rows = make_optimizers(model, "adamw", lr, weight_decay=0.0), texts.blocks(documents)
    model.train()
    for step in progress(range(steps), stage):
        set_lr([optimizer], schedule(step, steps, "cosine", warmup=steps // 20))
        ids, old = (torch.stack(x) for x in zip(*(next(rows) for _ in range(batch))))
        for x, labels in zip(ids.split(cfg.micro_batch), old.split(cfg.micro_batch)):
            with autocast(device, cfg.dtype):
                loss = objective(model, x.to(device), labels.to(device), alpha, gamma, cfg.lpr_form)
            (loss * len(x) / batch).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# --- evaluate

@torch.no_grad()
def evaluate(cfg: Config, model: Transformer, texts: Texts, tokenizer) -> tuple[dict, dict]:
    """Held-out bits per byte of every language and group (the unweighted mean of its languages), the frozen expert's mean score G0 per
    group, the multiple-choice files; and G0 per layer. No language label is used."""
    device, metrics, scores = model.embed.weight.device, {}, {}
    for i, c in enumerate(texts.corpora):
        losses, per_layer = [], []
        for ids, _ in itertools.islice(texts.blocks(np.array([(i, d) for d in c.held_out])), cfg.eval_blocks):
            with autocast(device, cfg.dtype):
                out = model(ids[None].to(device), output_router_logits=True)
            losses.append(next_token_loss(out.logits, ids[None].to(device)).item())
            if out.router_logits:
                per_layer.append(router_stats(out.router_logits, model.config.num_experts_per_tok).score[:, 0].cpu())
        if not losses:
            raise InputError(f"{c.name}: the held-out twentieth fills no block of {cfg.block} tokens: give more text or a smaller --block")
        metrics[c.name] = sum(losses) / len(losses) / c.bytes_per_token / math.log(2)
        scores.setdefault(c.group, []).extend([torch.stack(per_layer).mean(0)] if per_layer else [])
    for group in scores:
        metrics[group] = np.mean([metrics[c.name] for c in texts.corpora if c.group == group]).item()
    series = {f"G0 {group}": torch.stack(rows).mean(0).tolist() for group, rows in scores.items() if rows}
    metrics |= {name: sum(values) / len(values) for name, values in series.items()}
    metrics |= {name: value for path in cfg.eval for name, value in multiple_choice(model, tokenizer, path).items()}
    return metrics, {name: (range(1, len(values) + 1), values) for name, values in series.items()}


def multiple_choice(model: Transformer, tokenizer, path: str) -> dict[str, float]:
    """acc: share of items whose gold choice has the largest sum of log-probabilities; acc_norm: ... divided by its characters. Of equal
    scores the first wins. A choice is read after its context and a space."""
    hits = []
    for number, line in enumerate(read_text(path).strip().splitlines(), 1):
        try:
            row = json.loads(line)
            prompt, choices = tokenizer.encode(row["context"], bos=tokenizer.add_bos), row["choices"]
            if type(choices) is not list or len(choices) < 2 or row["gold"] not in range(len(choices)):
                raise ValueError
            pairs = [(prompt, tokenizer.encode(f" {choice}")) for choice in choices]
            scores = continuation_logprobs(model, pairs, characters=[len(choice) for choice in choices])
            hits.append([choices[max(range(len(choices)), key=values.tolist().__getitem__)] == choices[row["gold"]]
                         for values in (scores.sum, scores.per_character)])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise InputError(f'{path}, line {number}: {{"context": "...", "choices": ["...", "..."], "gold": 0}} is needed, with two '
                             "choices or more and gold counted from 0") from None
    return dict(zip((f"acc {Path(path).stem}", f"acc_norm {Path(path).stem}"), np.mean(hits, 0).tolist()))


# --- one seed

def stage_1(cfg: Config, arm: Arm, base: Transformer, texts: Texts) -> Transformer:
    """Upcycles the base (or copies it, for ft) and trains it on the new languages; arms with replay read the review's old text as well."""
    model = copy.deepcopy(base) if arm.start == "dense" else upcycle(base, cfg.num_experts, cfg.experts_per_token, list(cfg.moe_layers)
                                                                     or None, arm.start == "upcycled", generator(texts.seed, "router"))
    config_json(model.config, torch.float32)  # refuses now what could not be saved after hours of training
    model.activation_checkpointing = cfg.activation_checkpointing
    set_trainable(model, arm.trains)
    documents, replay = texts.choose("new"), texts.choose("old", cfg.review_docs_old)
    size, weights = lambda parameters: sum(p.numel() for p in parameters), list(model.parameters())
    idle = sum(size(m.experts[cfg.experts_per_token :].parameters()) for m in model.modules() if isinstance(m, MoE))
    share = texts.tokens(replay) / texts.tokens(documents)
    print(f"{size(weights):,} weights, {size(weights) - idle:,} active, {size(p for p in weights if p.requires_grad):,} trained in "
          f"stage 1; the review's old text is {share:.2%} of stage 1's{' (warning: the paper stays below 1%)' if share >= 0.01 else ''}")
    train(cfg, model, texts, np.concatenate([documents, replay]) if arm.replay else documents, "stage 1",
          0.0 if arm.lpr else cfg.alpha, cfg.gamma if arm.lpr else 0.0)
    return model


def review(cfg: Config, arm: Arm, model: Transformer, texts: Texts) -> Transformer:
    """Stage 2: trains the routers of what stage 1 left."""
    found = {(len(m.experts), m.gate.experts_per_token) for m in model.modules() if isinstance(m, MoE)}
    if found != {(cfg.num_experts, cfg.experts_per_token)}:
        raise InputError(f"the review needs a model of {cfg.num_experts} experts, {cfg.experts_per_token} per token, {cfg.checkpoint} has "
                         f"{found or 'none'}: give stage 1's folder and its --num-experts, --experts-per-token")
    model = copy.deepcopy(model)
    set_trainable(model, "routers")
    documents = np.concatenate([texts.choose("old", cfg.review_docs_old), texts.choose("new", cfg.review_docs_new)])
    train(cfg, model, texts, documents, "review", 0.0, cfg.gamma if arm.review == "lpr" else 0.0)
    return model


def run(cfg: Config, seed: int) -> Outcome:
    """All methods of one seed, from the same checkpoint; those that differ in the review alone share stage 1."""
    base, tokenizer = load_pretrained(cfg.checkpoint, device=pick_device(cfg.device))
    if tokenizer is None or tokenizer.eos_id is None:
        raise InputError(f"{cfg.checkpoint} has no tokenizer.json with an end-of-text token: the texts cannot be packed")
    texts, outcome, stages = Texts(cfg, tokenizer, seed), Outcome({}, {}), {}
    at_base, outcome.series["base"] = evaluate(cfg, base, texts, tokenizer)
    outcome.metrics["base"] = at_base
    for name in [m for m in cfg.methods if cfg.stage != "eval" and (cfg.stage != "2" or ARMS[m].review)]:
        arm, c = ARMS[name], replace(cfg, **ARMS[name].changes)  # ft's three learning rates
        if (key := repr(arm._replace(review=None))) not in stages:
            model = base if cfg.stage == "2" else stage_1(c, arm, base, texts)
            stages[key] = model, evaluate(c, model, texts, tokenizer)[0]
        model, at_stage_1 = stages[key]
        model = review(c, arm, model, texts) if arm.review and cfg.stage != "1" else model
        metrics, outcome.series[name] = evaluate(cfg, model, texts, tokenizer)
        if arm.review and cfg.stage == "all":
            metrics["replay share"] = texts.tokens(texts.choose("old", cfg.review_docs_old)) / texts.tokens(texts.choose("new"))
            metrics["recovery"] = (at_stage_1["old"] - metrics["old"]) / (at_stage_1["old"] - at_base["old"])
            metrics["new cost"] = (metrics["new"] - at_stage_1["new"]) / (at_base["new"] - at_stage_1["new"])
        if arm.start != "dense" and cfg.stage != "2" and cfg.dtype == "float32":
            metrics["changed"] = changed_tensors(model, base)
        outcome.metrics[name] = metrics
        if cfg.save:
            folder = Path(cfg.save) / (name.replace(" ", "-") + (f"-seed-{seed}" if len(cfg.seeds) > 1 else ""))
            save_pretrained(copy.deepcopy(model).to(getattr(torch, cfg.dtype)), folder, tokenizer)
    return outcome


# --- the run

def main(cfg: Config) -> dict:
    started = time.time()
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    path = Path(cfg.out or ROOT / "runs" / "moe_lpr_real_text") / "moe_lpr_real_text"
    results = save_results(__file__, PAPER, cfg, outcomes, claims, partial(figure, unit="bits/byte"), started, cfg.seeds, path)
    print_metrics(results["metrics"], list(dict.fromkeys(name for row in results["metrics"].values() for name in row)), 3)
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
