"""PreAlign on your own text: languages, dictionaries, tokenizer and (if you like) a checkpoint.
The method is methods/prealign.py.

Run     python methods/real/prealign.py --corpus en.txt de.txt --dict en-de.tsv --save out
        python methods/real/prealign.py --corpus en.jsonl --clone       # no second language needed
        python methods/real/prealign.py --corpus train.en train.de --aligned --out results
        python methods/real/prealign.py --corpus en.jsonl zh.jsonl:0.05 --dict muse.txt \\
            --checkpoint DIR --device cuda --dtype bfloat16

        --corpus       UTF-8 text, one document a line, or JSON Lines {"text": ...}; FILE:WEIGHT
                       sets its share of the documents read. The first is the source language: its
                       words are switched, its documents are what the others profit from.
        --dict         "word<TAB>translation" (or one space); JSON Lines {"src_text", "tgt_text"};
                       or {"words": "bank $ Bank $ banque"}. The first word is the source word; all
                       that is given for it, in any line or file, is one group of translations.
        --clone        a language with the source's own sentences in other tokens (id + V, special
                       tokens shared): every word is in its dictionary, so it shows the method at
                       its best.
        --aligned      line i of every corpus says the same. Then line i is read in ONE language
                       only, chosen by a hash, and without --dict a dictionary is derived: words e,
                       f with 2 n(e, f) / (n(e) + n(f)) >= 0.35 (n: lines with it, at least 5 in
                       common), each the other's best (Dice's coefficient).
        --checkpoint   go on from a trained model, with fine-tuning's rates. Useful, but not the
                       paper's setting, which aligns before pretraining starts. For a clone its
                       vocabulary is doubled; what it computes on the old one stays as it was.
Shown   results/prealign_real_text.json, the third command on English and German questions of
        grade-school maths (7,464 aligned lines, folder gsm_questions of github NJUNLP/QAlign), four
        fresh models of 3 blocks: stage 1 aligns German (after block 1 .99 of the seen words find
        their translation), and 400 steps of stage 2 undo most of it (.20; joint .05). So at the end
        German gains nothing: perplexity 168, joint 166, ratio 1.01 [.99, 1.04]; English pays 3%. At
        equal steps prealign is ahead (the figure); joint then reads on for as many tokens as stage
        1 had. An earlier run, with --clone beside German, said the same for another reason: its
        stage 1 spent nine of ten entries on the clone and had aligned a quarter of German.
Honest  - It measures perplexity and the retrieval of translations, neither zero-shot transfer nor
          knowledge (methods/experiments/prealign.py does).
        - A verdict on a dictionary needs a treatment: where, after stage 1, fewer than .8 of the
          dictionary's seen words find their translation, its claims are "not tested".
        - A word begins where a token does not begin with a letter: a source language needs spaces.
        - A few hundred thousand tokens show a direction, not the paper's numbers: 1.3B parameters
          need 21 GB (weights, gradients, AdamW) and days of a GPU. On 8 GPUs: torchrun
          --nproc-per-node 8 methods/real/prealign.py --corpus ..., the same on each, which split
          the batch and the dictionary's words; with --fsdp an eighth, 2.6 GB, and 5 GB more while
          perplexity is read (every process reads all of it). A fresh model is drawn whole by each.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import regex
import torch
from torch import nn

from methods.experiments.prealign import PAPER
from methods.prealign import (
    LAYERS,
    Entry,
    alignment_loss,
    code_switch,
    cut_words,
    lm_loss,
    make_table,
    retrieval,
    word_batches,
    word_vectors,
)
from methods.worlds.prealign import Document, unfolded
from minilm import InputError
from minilm.claims import Claim, at_least, at_most, below, cells, judge, print_claims
from minilm.data import IGNORE, collate, generator, pack, read_text
from minilm.evaluate import perplexity
from minilm.results import (
    COLORS,
    ROOT,
    Outcome,
    check_range,
    check_unused,
    cli,
    new_figure,
    plot_seeds,
    print_metrics,
    progress,
    run_seeds,
    save_results,
)
from minilm.tokenizer import Tokenizer, load_tokenizer, train_bpe
from minilm.training import (
    autocast,
    gather_rows,
    join,
    make_optimizers,
    my_parts,
    place,
    schedule,
    set_lr,
    this_world,
    together,
    update,
    whole,
)
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, read_config, save_pretrained

ARMS = {  # arm -> (stage 1?, switching in stage 2)
    "joint": (False, None),
    "cs-only": (False, "input"),
    "align-only": (True, None),
    "prealign": (True, "input"),
    "vanilla-cs": (True, "vanilla"),
}
END = "</s>"  # ends a document, when the tokenizer is our own
Method = Literal["joint", "cs-only", "align-only", "prealign", "vanilla-cs"]


@dataclass(frozen=True)
class Config:
    corpus: tuple[str, ...]  # text files, source language first; FILE:WEIGHT for a share (default:
    # 1 / ratio for the others)
    dict: tuple[str, ...] = ()  # dictionary files from the source language
    clone: bool = False  # add a clone of the source language
    aligned: bool = False  # the corpora are line-aligned translations
    methods: tuple[Method, ...] = ("joint", "cs-only", "prealign")  # arms to run
    seeds: tuple[int, ...] = (50, 51, 52, 53)  # model, order and unseen words of each run
    checkpoint: str | None = None  # start from this Hugging Face folder, not from a fresh model
    tokenizer: str | None = None  # folder with a tokenizer.json (default: the checkpoint's, else a
    # BPE trained on the corpora)
    vocab_size: int = 3000  # of that BPE
    dict_frac: float = 0.8  # share of the dictionary that training sees; the rest are unseen words
    ratio: float = 8  # source documents for every document of each other language
    align_steps: int = 100  # stage 1: optimizer steps
    pairs: int = 256  # stage 1: dictionary entries per step
    tau: float = 0.1  # stage 1: temperature
    alpha: float = 1.0  # stage 1: weight of the alignment loss
    align_lr: float | None = None  # stage 1: learning rate (default: 1e-3; of a checkpoint 1e-4)
    align_layers: Literal["all", "embed", "top"] = "all"  # stage 1: where words are aligned
    align_lm: Literal["text", "words", "none"] = "text"  # stage 1: language-model loss
    align_documents: int = 8  # stage 1: blocks of text per step
    steps: int = 400  # stage 2: optimizer steps
    batch: int = 24  # stage 2: blocks per step
    micro_batch: int | None = None  # stage 2: blocks at a time (default: all of a step's)
    block: int = 96  # tokens per block
    lr: float | None = None  # stage 2: learning rate (default: 2e-3; of a checkpoint 5e-5)
    rho: float = 0.05  # stage 2: share of the source words that are switched
    width: int = 128  # of a fresh model
    layers: int = 3  # of a fresh model
    eval_every: int = 50  # stage 2: steps between the points of the figure
    eval_blocks: int = 400  # held-out blocks of each language that the last perplexity reads
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory
    fsdp: bool = False  # torchrun: each process holds a share of the weights (FSDP2), not all (DDP)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the matrix products
    device: str = "auto"  # auto (cuda, else cpu), cpu, cuda, mps
    workers: int | None = None  # seeds at a time (default: one per core)
    quick: bool = False  # smoke run
    save: str | None = None  # folder for every arm's checkpoint (default: none is kept)
    out: str | None = None  # folder for the results (default: runs/prealign_real_text)


# --- the user's files


def read_lines(path: str) -> list[str]:
    """The documents of one corpus file. Empty lines stay, so that aligned files stay aligned."""
    text = read_text(path).rstrip("\n")
    lines = text.split("\n")  # (splitlines would also cut at characters inside a line)
    if not lines[0].lstrip().startswith("{"):
        return lines
    documents = []
    for number, line in enumerate(lines, 1):
        try:
            documents.append(json.loads(line)["text"].replace("\n", " "))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"{path}, line {number}: not a JSON object with a text: "
                '{"text": "..."} is needed'
            ) from None
    return documents


class Corpus(NamedTuple):
    lines: list[str]
    weight: float  # documents read for every one of the source language
    is_clone: bool = False


def read_corpora(cfg: Config) -> dict[str, Corpus]:
    """Language name (the file's) -> its lines and weight; the source first, the clone last."""
    corpora = {}
    for i, given in enumerate(cfg.corpus):
        path, weight = given, 1.0 if i == 0 else 1 / cfg.ratio
        if regex.search(r":\d+(\.\d+)?$", given):
            path, _, number = given.rpartition(":")
            weight = float(number)
            if weight == 0:
                raise InputError(f"--corpus {given}: give a weight above 0, or leave the file out")
        file = Path(path)
        # parallel corpora are called train.en, train.de
        name = file.suffix.lstrip(".") if file.stem == "train" else file.stem
        if name in corpora or name == "clone":
            raise InputError(f"two languages are called {name!r}: rename {path}")
        corpora[name] = Corpus(read_lines(path), weight)
    lengths = {name: len(corpus.lines) for name, corpus in corpora.items()}
    if cfg.aligned and len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise InputError(f"--aligned needs files with the same number of lines, got {counts}")
    if cfg.clone:
        source = next(iter(corpora.values()))
        corpora["clone"] = Corpus(source.lines, 1 / cfg.ratio, is_clone=True)
    if len(corpora) < 2:
        raise InputError("one corpus alone has no second language: give two files, or --clone")
    return corpora


def read_dictionary(*paths: str) -> list[list[str]]:
    """[source word, translation, ...] per source word, from any of the three formats. One group per
    source word, or its second translation would be a negative of it."""
    by_key: dict[object, list[str]] = {}
    for path in paths:
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if line.strip():
                key, words = read_entry(line, path, number)
                by_key.setdefault(key, []).extend(words)
    groups: dict[str, list[str]] = {}
    for words in by_key.values():
        groups.setdefault(words[0], []).extend(words)
    return [list(dict.fromkeys(words)) for words in groups.values()]


def read_entry(line: str, path: str, number: int) -> tuple[object, list[str]]:
    """One line of a dictionary -> which group it belongs to (its source word, or its file and the
    "index" given there), and its words."""
    where = f"{path}, line {number}"
    index = None
    if line.lstrip().startswith("{"):
        try:
            row = json.loads(line)
            if "words" in row:
                words, index = row["words"].split(" $ "), row.get("index")
            else:
                words = [row["src_text"] + "", row["tgt_text"] + ""]  # (+ "": they must be texts)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            needed = '{"src_text", "tgt_text"} or {"words": "a $ b"}'
            raise InputError(f"{where}: {needed} is needed") from None
    else:
        words = line.split("\t") if "\t" in line else line.split()
        if "\t" not in line and len(words) > 2:
            shown = f"{line.strip()[:40]!r} has {len(words)} words"
            raise InputError(f"{where}: {shown}: put a tab before the translation")
    words = [word.strip() for word in words]
    if len(words) < 2 or not all(words):
        shown = f"{line.strip()[:40]!r} has no translation"
        raise InputError(f"{where}: {shown}: a word and its translation are needed")
    return (words[0] if index is None else (path, index)), words


def derive_dictionary(
    source: Sequence[str], target: Sequence[str], least: float = 0.35, common: int = 5
) -> list[list[str]]:
    """Pairs of words of line-aligned texts that occur in the same lines: each the other's best by
    Dice's coefficient, 2 n(a, b) / (n(a) + n(b))."""
    in_source, in_target, in_both = Counter(), Counter(), Counter()
    for pair in zip(source, target):
        words, others = (set(regex.findall(r"[\p{L}\p{M}]+", line)) for line in pair)
        in_source.update(words)
        in_target.update(others)
        in_both.update((a, b) for a in words for b in others)
    dice = {}
    for (a, b), n in in_both.items():
        if n >= common:
            dice[a, b] = 2 * n / (in_source[a] + in_target[b])
    best_of_source, best_of_target = {}, {}
    for (a, b), value in dice.items():
        best_of_source[a] = max(best_of_source.get(a, (0, "")), (value, b))
        best_of_target[b] = max(best_of_target.get(b, (0, "")), (value, a))
    found = []
    for (a, b), value in dice.items():
        if value >= least and best_of_source[a][1] == b and best_of_target[b][1] == a:
            found.append([a, b])
    return sorted(found)


# --- data


class Text(NamedTuple):
    """The user's files, tokenised: what every seed shares. Blocks are int32 [rows, block]."""

    tokenizer: Tokenizer
    offset: int  # a clone token is its source's id + offset
    names: list[str]  # languages, the source first, "clone" last
    weights: list[float]  # shares of the documents read
    read: dict[str, torch.Tensor]  # blocks to train on
    held: dict[str, torch.Tensor]  # blocks for perplexity
    starts: Callable[[int], bool]  # does this token begin a word?
    running: Counter  # the source text's words, as token ids
    entries: dict[str, list[Entry]]  # "dictionary", "clone" -> their entries


class Words(NamedTuple):
    """The dictionary of one seed."""

    seen: list[Entry]  # entries for training
    exam: dict[str, tuple[list[Entry], list[Entry]]]  # per dictionary (word, first translation)
    # for retrieval: seen in training, unseen
    coverage: float  # share of the source text's words that training's dictionary holds


def deal(cfg: Config, corpora: dict[str, Corpus]) -> dict[str, dict[str, list[str]]]:
    """{"read", "held"} -> language -> lines. Nothing is read in two languages: the clone takes
    lines of its own from the source, and with --aligned each line number belongs to one language. A
    twentieth of the line numbers is held out, in every language."""
    source = next(iter(corpora))
    dealt = {part: {name: [] for name in corpora} for part in ("read", "held")}
    for name, corpus in corpora.items():
        rivals = [name]  # the languages of which one gets a line of this corpus
        if cfg.aligned:
            rivals = list(corpora)
        elif name == source or corpus.is_clone:
            rivals = [n for n in corpora if n == source or corpora[n].is_clone]
        weights = [corpora[n].weight for n in rivals]
        for number, line in enumerate(corpus.lines):
            rng = random.Random(f"line {number}")
            if rng.random() < 0.05:
                dealt["held"][name].append(line)
            elif rng.choices(rivals, weights)[0] == name:
                dealt["read"][name].append(line)
    return dealt


def encode_entries(
    entries: Sequence[list[str]], encode: Callable[[str], list[int]]
) -> list[Entry]:
    """Words as they look inside running text (after a space); an entry whose sides are the same
    tokens teaches nothing and is dropped."""
    spelled = [tuple(dict.fromkeys(tuple(encode(word)) for word in words)) for words in entries]
    return [entry for entry in spelled if len(entry) > 1]


def choose_tokenizer(cfg: Config, texts: dict[str, list[str]]) -> tuple[Tokenizer, int]:
    """The tokenizer, and how many ids the old vocabulary has: a checkpoint may have more rows than
    its tokenizer has tokens, never fewer."""
    folder = cfg.tokenizer or cfg.checkpoint
    if folder is None:
        lines = [line for lines in texts.values() for line in lines]
        tokenizer = train_bpe(lines, cfg.vocab_size, special=(END,), eos=END)
    else:
        tokenizer = load_tokenizer(folder)
    if cfg.checkpoint is None:
        return tokenizer, tokenizer.vocab_size
    rows = read_config(cfg.checkpoint).vocab_size
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} tokens, the checkpoint "
            f"{cfg.checkpoint} reads {rows:,}: give the checkpoint's own"
        )
    return tokenizer, rows


@lru_cache(maxsize=1)  # (the example and the seeds of one process read the files once)
def read_data(cfg: Config) -> Text:
    """Reads, deals out and tokenises the user's files."""
    corpora = read_corpora(cfg)
    texts = {name: c.lines for name, c in corpora.items() if not c.is_clone}
    source = next(iter(texts))
    tokenizer, offset = choose_tokenizer(cfg, texts)
    shared = set(tokenizer.special.values())
    # A word inside running text follows a space; a SentencePiece tokenizer puts that space before
    # a text by itself.
    space = "" if tokenizer.encode("a") == tokenizer.encode(" a")[-1:] else " "
    text_of = [
        tokenizer.token_bytes(i).decode("utf-8", errors="replace")
        for i in range(tokenizer.vocab_size)
    ]
    goes_on = [bool(regex.match(r"[\p{L}\p{M}\ufffd]", text)) for text in text_of]

    def encode(text):
        return tokenizer.encode(space + text)

    def clone(ids):
        return [i if i in shared else i + offset for i in ids]

    def starts(token):  # a token that begins with a letter goes on with its word
        return not goes_on[token % offset]

    blocks = {}
    for part, dealt in deal(cfg, corpora).items():
        blocks[part] = {}
        for name, lines in dealt.items():
            say = clone if corpora[name].is_clone else unfolded
            documents = (say(encode(line)) for line in lines if line.strip())
            packed = pack(documents, cfg.block, tokenizer.eos_id or 0)
            blocks[part][name] = packed.to(torch.int32)

    running = Counter()
    for block in blocks["read"][source]:
        for word in cut_words(block.tolist(), starts):
            if regex.search(r"\p{L}", text_of[word[0]]):
                running[word] += 1
    pairs = read_dictionary(*cfg.dict)
    if cfg.aligned and not cfg.dict:
        for name in texts:
            if name != source:
                pairs += derive_dictionary(texts[source], texts[name])
    entries = {"dictionary": encode_entries(pairs, encode)}
    if cfg.clone:
        entries["clone"] = [(word, tuple(clone(word))) for word in sorted(running)]
    return Text(
        tokenizer,
        offset,
        list(corpora),
        [corpus.weight for corpus in corpora.values()],
        blocks["read"],
        blocks["held"],
        starts,
        running,
        entries,
    )


def choose_words(cfg: Config, text: Text, seed: int) -> Words:
    """Which entries training sees, and which words are asked for."""
    rng = random.Random(f"{seed}/dictionary")
    seen, exam = [], {}
    for name, entries in text.entries.items():
        entries = rng.sample(entries, len(entries))
        cut = round(cfg.dict_frac * len(entries))
        seen += entries[:cut]
        if entries:
            asked = [entry[:2] for entry in entries]
            exam[name] = asked[:cut][:500], asked[cut:][:500]
    if not seen:
        raise InputError(
            "the dictionary is empty: give --dict with a word and its translation, --aligned, "
            "or --clone"
        )
    table = make_table(seen)
    known = sum(n for word, n in text.running.items() if word in table)
    return Words(seen, exam, known / max(1, text.running.total()))


def make_corpus(cfg: Config, text: Text, seed: int, steps: int) -> list[list[Document]]:
    """`steps` batches of blocks, languages drawn by weight."""
    rng = random.Random(f"{seed}/order")
    names = rng.choices(text.names, text.weights, k=steps * cfg.batch)
    documents = []
    for name in names:
        blocks = text.read[name]
        block = blocks[rng.randrange(len(blocks))].tolist()
        documents.append(Document(block, is_source=name == text.names[0]))
    return [documents[i : i + cfg.batch] for i in range(0, len(documents), cfg.batch)]


# --- the model


def make_model(cfg: Config, text: Text, seed: int) -> Transformer:
    """A fresh model, or the checkpoint; for a clone, with a doubled vocabulary."""
    gen = generator(seed, "init")
    if cfg.checkpoint is None:
        config = ModelConfig(
            vocab_size=text.offset * (2 if cfg.clone else 1),
            hidden_size=cfg.width,
            intermediate_size=8 * cfg.width // 3 // 16 * 16,
            num_hidden_layers=cfg.layers,
            num_attention_heads=4,
            max_position_embeddings=max(1024, cfg.block),
            initializer_range=0.05,
            model_type="llama",
        )
        return Transformer(config, gen)
    model, _ = load_pretrained(cfg.checkpoint, device="meta" if cfg.fsdp else "cpu")
    if cfg.clone:
        extend_vocabulary(model, text.offset, gen)
    return model.train()


def extend_vocabulary(model: Transformer, rows: int, gen: torch.Generator) -> None:
    """Gives a trained model `rows` new tokens. What it computes on its old ones stays nearly as it
    was: a new row is the mean of the old rows and a tenth of their deviation in noise.

    The rows of a trained embedding share a large mean, and where the head is tied they are output
    rows too. Random ones have none of it, and take the probability: drawn from N(0, std) they
    brought SmolLM2-135M's English perplexity from 25.0 to 1,334 before any training."""
    tied = model.config.tie_word_embeddings
    for layer in [model.embed] if tied else [model.embed, model.lm_head]:
        old = layer.weight.detach()
        noise = torch.randn(rows, old.shape[1], generator=gen)
        new = old.mean(0) + 0.1 * old.std(0) * noise
        layer.weight = nn.Parameter(torch.cat((old, new)))
    if tied:
        model.lm_head.weight = model.embed.weight
    model.config.vocab_size = model.embed.weight.shape[0]


# --- train


def words_loss(model, cfg: Config, ids, mask, group, word, texts) -> torch.Tensor:
    """Stage 1's loss, of which this process reads a share of the words and of the texts. Each word
    is compared with all words of the step, whoever read them."""
    rank, size = this_world()
    each = -(-len(ids) // size)
    mine = torch.arange(rank * each, (rank + 1) * each).clamp(max=len(ids) - 1)  # as many for all
    vectors = word_vectors(model, ids[mine], mask[mine])[LAYERS[cfg.align_layers]]
    z = gather_rows(vectors, dim=1)[:, : len(ids)]
    loss = cfg.alpha * alignment_loss(z, group, word, cfg.tau) * size
    rows = []
    if cfg.align_lm == "text":
        rows = [(document.ids, document.ids) for document in texts]
    elif cfg.align_lm == "words":
        rows = [(i[m].tolist(), i[m].tolist()) for i, m in zip(ids, mask)]
    for part, weight in my_parts(rows, len(rows)):
        share = counted(part) / counted(rows) * weight
        loss = loss + lm_loss(model, *collate(part)) * share
    return loss


def counted(rows: Sequence[tuple[list[int], list[int]]]) -> int:
    """Labels that the loss counts: each but the first, which nothing predicts."""
    return sum(label != IGNORE for _, labels in rows for label in labels[1:])


def align(cfg: Config, model, dictionary, texts, gen: torch.Generator, lr: float) -> None:
    """Stage 1, as methods.prealign.align."""
    optimizers = make_optimizers(model, "adamw", lr)
    step_loss = together(words_loss, model, unused=cfg.align_lm == "none")
    batch = word_batches(dictionary, cfg.pairs, gen)
    for step in progress(range(cfg.align_steps), "stage 1: align"):
        set_lr(optimizers, schedule(step, cfg.align_steps, "cosine", cfg.align_steps // 20))
        documents = next(texts) if cfg.align_lm == "text" else []
        step_loss(cfg, *next(batch), documents).backward()
        update(model, optimizers)


def pretrain(cfg: Config, model, corpus, table, rng, mode, starts, lr: float) -> Iterator[int]:
    """Stage 2, as methods.prealign.pretrain: yields the number of steps done. (Warm-up: the
    authors' 5%.)"""
    optimizers = make_optimizers(model, "adamw", lr)
    step_loss = together(lm_loss, model)
    warmup = max(1, len(corpus) // 20)
    for step, documents in enumerate(progress(corpus, "stage 2: pretrain")):
        yield step
        set_lr(optimizers, schedule(step, len(corpus), "cosine", warmup))
        rows = []
        for ids, is_source in documents:
            if mode and is_source:
                rows.append(code_switch(ids, table, cfg.rho, mode, rng, starts))
            else:
                rows.append((ids, ids))
        for part, weight in my_parts(rows, cfg.micro_batch or len(rows)):
            share = counted(part) / counted(rows) * weight
            (step_loss(*collate(part)) * share).backward()
        update(model, optimizers)
    yield len(corpus)


# --- one seed


def run(cfg: Config, seed: int) -> Outcome:
    """All arms of one seed: the same blocks, order, dictionary and initial weights."""
    outcome = Outcome({}, {})
    text = read_data(cfg)
    words = choose_words(cfg, text, seed)
    for arm in cfg.methods:
        model = place(make_model(cfg, text, seed), join(cfg), cfg.fsdp)
        metrics, series = run_arm(cfg, arm, model, text, words, seed)
        outcome.metrics[arm], outcome.series[arm] = metrics, series
        if cfg.save:
            save_pretrained(model, Path(cfg.save) / f"{arm}-seed-{seed}", text.tokenizer)
    return outcome


def run_arm(cfg: Config, arm: str, model, text: Text, words: Words, seed: int):
    """Trains and examines a model -> its metrics, its series {name: (x, values)}."""
    aligned, switch = ARMS[arm]
    model.activation_checkpointing = cfg.activation_checkpointing
    fresh = cfg.checkpoint is None
    steps = cfg.steps + (0 if aligned else steps_of_stage1(cfg, words))
    corpus = make_corpus(cfg, text, seed, steps + cfg.align_steps)
    texts = iter([batch[: cfg.align_documents] for batch in corpus[steps:]])
    middle = model.config.num_hidden_layers // 2
    points = {name: [] for name in text.names}
    metrics, series = {"coverage": words.coverage}, {}

    with autocast(model.embed.weight.device, cfg.dtype):
        if aligned:
            lr = cfg.align_lr or (1e-3 if fresh else 1e-4)
            align(cfg, model, words.seen, texts, generator(seed, "pairs"), lr=lr)
        for name, (seen, _) in words.exam.items():
            found = find_translations(model, seen)
            metrics[f"stage 1 {name}"] = found[middle]
            series[f"before {name}"] = (range(len(found)), found)

        table, rng = make_table(words.seen), random.Random(f"{seed}/switching")
        lr = cfg.lr or (2e-3 if fresh else 5e-5)
        for step in pretrain(cfg, model, corpus[:steps], table, rng, switch, text.starts, lr=lr):
            if step % cfg.eval_every == 0 or step == steps:
                for name in text.names:
                    held = text.held[name][:40].tolist()
                    points[name].append((step, read_perplexity(model, held)))

        for name in text.names:
            held = text.held[name][: cfg.eval_blocks].tolist()
            metrics[f"ppl {name}"] = read_perplexity(model, held)
            series[f"ppl {name}"] = tuple(zip(*points[name]))
        for name, (seen, unseen) in words.exam.items():
            found = find_translations(model, seen)
            metrics[f"retrieval {name}"] = found[middle]
            series[f"after {name}"] = (range(len(found)), found)
            if unseen:
                metrics[f"unseen {name}"] = find_translations(model, unseen)[middle]
    return metrics, series


def read_perplexity(model, rows: list[list[int]]) -> float:
    with whole(model):
        return perplexity(model, rows)


def find_translations(model, entries: list[Entry]) -> list[float]:
    with whole(model):
        return retrieval(model, entries, [target for _, target in entries])


def steps_of_stage1(cfg: Config, words: Words) -> int:
    """How many steps of stage 2 read as many tokens as stage 1 does, its words counted."""
    per_entry = sum(len(word) for entry in words.seen for word in entry) / len(words.seen)
    pairs = min(cfg.pairs, len(words.seen))
    per_step = pairs * per_entry
    if cfg.align_lm == "text":
        per_step += cfg.align_documents * cfg.block
    return round(cfg.align_steps * per_step / (cfg.batch * cfg.block))


# --- claims: the testable part of the paper's C10, per language and dictionary


def dictionary_of(language: str) -> str:
    return "clone" if language == "clone" else "dictionary"


def make_claims(names: Sequence[str]) -> list[Claim]:
    """The claims of a run with these metrics: three rows a language, two a dictionary."""
    source, *others = [name.removeprefix("ppl ") for name in names if name.startswith("ppl ")]
    dictionaries = [name.removeprefix("retrieval ") for name in names if "retrieval" in name]
    table = []
    for language in others:
        ppl = f"ppl {language}"
        table.append(better(f"C1 {language}", ppl, "joint", language))
        table.append(better(f"C1b {language}", ppl, "cs-only", language))
    table.append(source_as_good(f"C1 {source}", f"ppl {source}"))
    for name in dictionaries:
        table.append(survives(f"C5 {name}", name))
        if f"unseen {name}" in names:
            table.append(unseen_too(f"C7 {name}", name))
    return table


def was_aligned(dictionary: str) -> Callable:
    """A gate: without the treatment there is nothing to say of its effect."""

    def gate(view):
        found = view.mean("prealign", f"stage 1 {dictionary}")
        if found >= 0.8:
            return ""
        return f"stage 1 aligned {found:.2f} of the dictionary's seen words, .8 are needed"

    return gate


def better(id: str, ppl: str, baseline: str, language: str) -> Claim:
    def rule(view):
        return below(view("prealign", ppl) / view(baseline, ppl), 0.95)

    rule.__doc__ = f"Perplexity is more than 5% below {baseline}'s."
    return Claim(
        id,
        rule,
        "more",
        cells(["prealign"], [ppl]),
        cells([baseline], [ppl]),
        smaller_is_better=True,
        gate=was_aligned(dictionary_of(language)),
        paper="lower perplexity in German, Chinese, Arabic, Russian",
        sentence=f"{language} is modelled better than by {baseline}",
    )


def source_as_good(id: str, ppl: str) -> Claim:
    def rule(view):
        return at_most(view("prealign", ppl) / view("joint", ppl), 1.05)

    rule.__doc__ = "Perplexity is at most 5% above joint's."
    return Claim(
        id,
        rule,
        "no worse",
        cells(["prealign"], [ppl]),
        cells(["joint"], [ppl]),
        margin=0.05,
        smaller_is_better=True,
        sentence="the source language pays nothing for it",
    )


def survives(id: str, dictionary: str) -> Claim:
    metric = f"retrieval {dictionary}"

    def rule(view):
        "Retrieval@1 of seen words, after the middle block, is at least .5 above joint's."
        return at_least(view("prealign", metric) - view("joint", metric), 0.5)

    return Claim(
        id,
        rule,
        "more",
        cells(["prealign"], [metric]),
        cells(["joint"], [metric]),
        margin=0.5,
        gate=was_aligned(dictionary),
        sentence=f"the alignment survives pretraining ({dictionary})",
    )


def unseen_too(id: str, dictionary: str) -> Claim:
    metric = f"unseen {dictionary}"

    def rule(view):
        "Retrieval@1 of unseen words is at least .1 above joint's."
        return at_least(view("prealign", metric) - view("joint", metric), 0.1)

    return Claim(
        id,
        rule,
        "more",
        cells(["prealign"], [metric]),
        cells(["joint"], [metric]),
        margin=0.1,
        gate=was_aligned(dictionary),
        sentence=f"words outside the dictionary are aligned too ({dictionary})",
    )


def claims(metrics: dict) -> list[dict]:
    return judge(make_claims(list(next(iter(metrics.values())))), metrics)


# --- figure


def figure(results: dict):
    """Perplexity of every language during pretraining, and which layers know the translations, as
    stage 1 leaves them (dotted) and at the end."""
    arms = list(results["series"])
    names = [n for n in results["series"][arms[0]] if n.startswith(("ppl", "after"))]
    names.sort(key=lambda name: not name.startswith("ppl"))
    fig, axes = new_figure(1, len(names), width=3.4 * len(names), height=4.2)
    for ax, name in zip(axes, names):
        for color, arm in zip(COLORS, arms):
            series = results["series"][arm]
            plot_seeds(ax, series[name]["x"], series[name]["values"], arm, color)
            if name.startswith("after") and arm == "prealign":
                before = series[name.replace("after", "before")]
                plot_seeds(ax, before["x"], before["values"], None, color, linestyle=":")
        if name.startswith("ppl"):
            title = f"perplexity, {name.removeprefix('ppl ')}"
            ax.set(yscale="log", xlabel="pretraining step", title=title)
        else:
            last = len(series[name]["x"]) - 1
            ax.set_xticks(range(last + 1), ["embed", *map(str, range(1, last)), "head"])
            title = f"retrieval@1, {name.removeprefix('after ')} (dotted: after stage 1)"
            ax.set(xlabel="layer", ylim=(-0.03, 1.03), title=title)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms))
    return fig


def show_example(cfg: Config, text: Text, words: Words) -> None:
    """The first block of the source, switched: [what is read <- what is learned]."""
    table, rng = make_table(words.seen), random.Random(0)
    shown = ""
    for word in cut_words(text.read[text.names[0]][0].tolist(), text.starts):
        new, labels = code_switch(word, table, 0.3, "input", rng, text.starts)
        read = text.tokenizer.decode([i % text.offset for i in new])
        if tuple(new) == word:
            shown += read
            continue
        learned = text.tokenizer.decode([i for i in labels if i != IGNORE])
        mark = "*" if new[0] >= text.offset else ""
        shown += f" [{read.strip()}{mark} <- {learned.strip()}]"
    print(f"A block, switched at 30% (here {cfg.rho:.0%} are; * a clone's word):\n  {shown}")
    print(
        f"languages {', '.join(text.names)}; {len(words.seen)} dictionary entries cover "
        f"{words.coverage:.0%} of the source's running words"
    )
    if words.coverage < 0.2:
        print("warning: that is little: code-switching will seldom happen")


def main(cfg: Config) -> dict:
    started, asked = time.time(), cfg
    check_range(cfg, "seeds", least=0)
    check_range(cfg, "rho", least=0, below=1)
    check_range(cfg, "dict_frac", above=0, most=1)
    check_range(cfg, "ratio tau align_lr lr", above=0)
    check_range(cfg, "alpha", least=0)
    check_range(cfg, "align_steps align_documents steps batch layers", least=1)
    check_range(cfg, "micro_batch eval_every eval_blocks", least=1)
    check_range(cfg, "pairs block", least=2)
    if cfg.checkpoint:
        check_unused(cfg, "width layers vocab_size", "with --checkpoint")
    if cfg.width < 16 or cfg.width % 8:
        raise InputError(f"--width {cfg.width}: give a multiple of 8, at least 16: 4 even heads")
    if not cfg.methods:
        raise InputError(f"--methods: give at least one of {', '.join(ARMS)}")
    if not cfg.corpus:
        raise InputError("--corpus: give at least one file, the source language first")
    if cfg.quick:
        cfg = replace(cfg, seeds=cfg.seeds[:1], align_steps=2, steps=3, eval_every=3)
        cfg = replace(cfg, pairs=16, layers=2, width=32)
    text = read_data(cfg)
    show_example(cfg, text, choose_words(cfg, text, cfg.seeds[0]))
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    path = Path(cfg.out or ROOT / "runs" / "prealign_real_text") / "prealign_real_text"
    results = save_results(
        __file__, PAPER, asked, outcomes, claims, figure, started, cfg.seeds, path
    )
    print_metrics(results["metrics"], list(results["metrics"][cfg.methods[0]]))
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
