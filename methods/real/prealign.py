"""PreAlign on your own text: languages, dictionaries, tokenizer and (if you like) a checkpoint. The method is methods/prealign.py.

Run     python methods/real/prealign.py --corpus en.txt de.txt --dict en-de.tsv --methods joint prealign --save out
        python methods/real/prealign.py --corpus en.jsonl --clone                    # no second language needed: English-Clone
        python methods/real/prealign.py --corpus gsm_questions/de-en/train.en gsm_questions/de-en/train.de --aligned --clone --out results
        python methods/real/prealign.py --corpus en.jsonl zh.jsonl:0.05 --dict muse.txt --checkpoint DIR --device cuda --dtype bfloat16

        --corpus       UTF-8 text, one document a line, or JSON Lines {"text": ...}; FILE:WEIGHT sets its share of the documents read.
                       The first is the source language: its words are switched, its documents are what the others profit from.
        --dict         "word<TAB>translation" (or one space); JSON Lines {"src_text", "tgt_text"}; or {"words": "bank $ Bank $ banque"}. The
                       first word is the source word; all that is given for it, in any line or file, is one group of translations.
        --clone        a language with the source's own sentences in other tokens (id + V, special tokens shared): every word is in its
                       dictionary, so it shows the method at its best.
        --aligned      line i of every corpus says the same. Then line i is read in ONE language only, chosen by a hash, and without
                       --dict a dictionary is derived: words e, f with 2 n(e, f) / (n(e) + n(f)) >= 0.35 (n: lines with it, at least
                       5 in common), each the other's best (Dice's coefficient).
Shown   results/prealign_real_text.json is the third command: English questions of grade-school maths, an English-Clone of them, and German
        (7,464 aligned lines, folder gsm_questions of github NJUNLP/QAlign). Without --checkpoint a small model is made; with it, its
        vocabulary is kept (doubled for a clone): useful, but not the paper's setting, which aligns before pretraining starts.
        Found: English-Clone gains a little (perplexity 154 against 158), and .38 of its words stay aligned (.34 of unseen ones; joint 0;
        C5 wants .5). German gains nothing: half a million tokens and 1,560 derived word pairs leave it as it was (188 against 184).
Honest  Word segmentation is by tokens: a word begins where a token does not begin with a letter, so a source language needs spaces. A few
        hundred thousand tokens show a direction, not the paper's numbers: 1.3B parameters need 21 GB of optimizer state and days of a GPU.
        C7's floor of .1 was added after the run (0 against 0 would have held).
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import regex
import torch
from torch import nn

from methods.experiments.prealign import PAPER, align, code_switch, make_table, pretrain, retrieval
from minilm import InputError
from minilm.data import IGNORE, generator, pack, read_text
from minilm.evaluate import perplexity
from minilm.claims import check, print_claims
from minilm.results import COLORS, ROOT, Outcome, cli, new_figure, plot_seeds, print_metrics, run_seeds, save_results
from minilm.tokenizer import Tokenizer, load_tokenizer, train_bpe
from minilm.training import autocast, pick_device
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained

ARMS = {"joint": (False, None), "cs-only": (False, "input"), "align-only": (True, None), "prealign": (True, "input"),
        "vanilla-cs": (True, "vanilla")}  # arm -> (stage 1?, switching in stage 2)
END = "</s>"  # ends a document, when the tokenizer is our own
Entry = tuple[tuple[int, ...], ...]  # token ids of a source word and of its translations


@dataclass(frozen=True)
class Config:
    corpus: tuple[str, ...]  # text files, source language first; FILE:WEIGHT for a share (default: 1 / ratio for the others)
    dict: tuple[str, ...] = ()  # dictionary files from the source language
    clone: bool = False  # add a clone of the source language
    aligned: bool = False  # the corpora are line-aligned translations
    methods: tuple[Literal["joint", "cs-only", "align-only", "prealign", "vanilla-cs"], ...] = ("joint", "cs-only", "prealign")  # arms
    seeds: tuple[int, ...] = (0, 1)  # model and order of each run
    checkpoint: str | None = None  # start from this Hugging Face folder instead of a fresh model
    tokenizer: str | None = None  # folder with a tokenizer.json (default: the checkpoint's, else a BPE trained on the corpora)
    vocab_size: int = 3000  # of that BPE
    dict_frac: float = 0.8  # share of the dictionary that training sees; the rest are the unseen words
    ratio: float = 8  # source documents for every document of each other language
    align_steps: int = 100  # stage 1: optimizer steps
    pairs: int = 256  # stage 1: dictionary entries per step
    tau: float = 0.1  # stage 1: temperature
    alpha: float = 1.0  # stage 1: weight of the alignment loss
    align_lr: float = 1e-3  # stage 1: learning rate
    align_layers: Literal["all", "embed", "top"] = "all"  # stage 1: where words are aligned
    align_lm: Literal["text", "words", "none"] = "text"  # stage 1: language-model loss
    align_documents: int = 8  # stage 1: blocks of text per step
    steps: int = 400  # stage 2: optimizer steps
    batch: int = 24  # stage 2: blocks per step
    block: int = 96  # tokens per block
    lr: float = 2e-3  # stage 2: learning rate
    rho: float = 0.05  # stage 2: share of the source words that are switched
    width: int = 128  # of a fresh model
    layers: int = 3  # of a fresh model
    eval_every: int = 50  # stage 2: steps between the points of the figure
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the matrix products
    device: str = "auto"  # auto (cuda, else cpu), cpu, cuda, mps
    workers: int | None = None  # seeds at a time (default: one per core)
    quick: bool = False  # smoke run
    save: str | None = None  # folder for every arm's checkpoint (default: none is kept)
    out: str | None = None  # folder for the results (default: runs/prealign_real_text)


# --- the user's files

def read_lines(path: str) -> list[str]:
    """The documents of one corpus file. Empty lines stay, so that line numbers of aligned files agree."""
    lines = read_text(path).rstrip("\n").split("\n")  # (splitlines would also cut at characters inside a line)
    if not lines[0].lstrip().startswith("{"):
        return lines
    documents = []
    for number, line in enumerate(lines, 1):
        try:
            documents.append(json.loads(line)["text"].replace("\n", " "))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise InputError(f'{path}, line {number}: not a JSON object with a text: {{"text": "..."}} is needed') from None
    return documents


def read_corpora(cfg: Config) -> dict[str, tuple[list[str], float]]:
    """Language name (the file's) -> its lines and its weight against the source's 1."""
    corpora = {}
    for i, given in enumerate(cfg.corpus):
        path, _, weight = given.rpartition(":") if regex.search(r":\d+(\.\d+)?$", given) else (given, "", "")
        name = Path(path).suffix.lstrip(".") if Path(path).stem == "train" else Path(path).stem  # parallel corpora: train.en, train.de
        if name in corpora or name == "clone":
            raise InputError(f"two languages are called {name!r}: rename {path}")
        corpora[name] = read_lines(path), float(weight) if weight else 1.0 if i == 0 else 1 / cfg.ratio
    if cfg.aligned and len({len(lines) for lines, _ in corpora.values()}) > 1:
        counts = ", ".join(f"{name} {len(lines)}" for name, (lines, _) in corpora.items())
        raise InputError(f"--aligned needs files with the same number of lines, got {counts}")
    if cfg.clone:
        corpora["clone"] = next(iter(corpora.values()))[0], 1 / cfg.ratio
    if len(corpora) < 2:
        raise InputError("one corpus alone has no second language: give two files, or --clone")
    return corpora


def read_dictionary(*paths: str) -> list[list[str]]:
    """[source word, translation, ...] per source word, from any of the three formats. One group per source word, or its second translation
    would be a negative of it."""
    entries: dict[object, list[str]] = {}
    for path, number, line in ((p, number, line) for p in paths for number, line in enumerate(read_text(p).splitlines(), 1)):
        if not line.strip():
            continue
        if line.lstrip().startswith("{"):
            try:
                row = json.loads(line)
                words = row["words"].split(" $ ") if "words" in row else [row["src_text"], row["tgt_text"]]
            except (json.JSONDecodeError, KeyError, AttributeError):
                raise InputError(f'{path}, line {number}: {{"src_text", "tgt_text"}} or {{"words": "a $ b"}} is needed') from None
            key = ("index", path, row["index"]) if "words" in row and "index" in row else words[0].strip()
        else:
            words = line.split("\t") if "\t" in line else line.split()
            key = words[0].strip()
            if "\t" not in line and len(words) > 2:
                raise InputError(f"{path}, line {number}: {line.strip()[:40]!r} has {len(words)} words: put a tab before the translation")
        if len(words) < 2 or not all(w.strip() for w in words):
            raise InputError(f"{path}, line {number}: {line.strip()[:40]!r} has no translation: a word and its translation are needed")
        entries.setdefault(key, []).extend(w.strip() for w in words)
    groups: dict[str, list[str]] = {}
    for words in entries.values():
        groups.setdefault(words[0], []).extend(words)
    return [list(dict.fromkeys(words)) for words in groups.values()]


def derive_dictionary(source: Sequence[str], target: Sequence[str], least: float = 0.35, common: int = 5) -> list[list[str]]:
    """Pairs of words of line-aligned texts that occur in the same lines: each the other's best by Dice's coefficient."""
    words = [[set(regex.findall(r"[\p{L}\p{M}]+", line)) for line in text] for text in (source, target)]
    count = [Counter(w for line in lines for w in line) for lines in words]
    both = Counter((a, b) for x, y in zip(*words) for a in x for b in y)
    dice = {(a, b): 2 * n / (count[0][a] + count[1][b]) for (a, b), n in both.items() if n >= common}
    best: dict = {}
    for (a, b), value in dice.items():
        best["source", a] = max(best.get(("source", a), (0, "")), (value, b))
        best["target", b] = max(best.get(("target", b), (0, "")), (value, a))
    return sorted([a, b] for (a, b), v in dice.items() if v >= least and best["source", a][1] == b and best["target", b][1] == a)


# --- data

class Data(NamedTuple):
    """What every arm of a seed shares; blocks are rows of token ids."""

    tokenizer: Tokenizer
    names: list[str]  # languages, the source first, "clone" last
    weights: list[float]  # shares of the documents read
    read: dict[str, list[list[int]]]  # blocks to train on
    held: dict[str, list[list[int]]]  # blocks for perplexity
    starts: Callable[[int], bool]  # does this token begin a word?
    seen: list[Entry]  # dictionary entries for training
    exam: dict[str, tuple[list[Entry], list[Entry]]]  # per dictionary, (word, first translation) for retrieval: seen in training, unseen
    coverage: float  # share of the source text's words that training's dictionary holds


def deal(cfg: Config, corpora: dict[str, tuple[list[str], float]]) -> dict[str, dict[str, list[str]]]:
    """{"read", "held"} -> language -> lines. Nothing is read in two languages: the clone takes lines of its own from the source, and with
    --aligned each line number belongs to one language. A twentieth of the line numbers is held out, in every language."""
    dealt = {part: {name: [] for name in corpora} for part in ("read", "held")}
    for name, (lines, _) in corpora.items():
        rivals = [n for n in corpora if cfg.aligned or n == name or corpora[n][0] is lines]
        for number, line in enumerate(lines):
            rng = random.Random(f"line {number}")
            if rng.random() < 0.05:
                dealt["held"][name].append(line)
            elif rng.choices(rivals, [corpora[n][1] for n in rivals])[0] == name:
                dealt["read"][name].append(line)
    return dealt


def cut_words(ids: Sequence[int], starts: Callable[[int], bool]) -> Iterator[tuple[int, ...]]:
    cuts = [i for i, token in enumerate(ids) if i == 0 or starts(token)]
    return (tuple(ids[a:b]) for a, b in zip(cuts, [*cuts[1:], len(ids)]))


def encode_entries(entries: Sequence[list[str]], encode: Callable[[str], list[int]]) -> list[Entry]:
    """Words as they look inside running text (after a space); an entry whose sides are the same tokens teaches nothing and is dropped."""
    spelled = [tuple(dict.fromkeys(tuple(encode(word)) for word in words)) for words in entries]
    return [entry for entry in spelled if len(entry) > 1]


def make_data(cfg: Config, seed: int) -> Data:
    """Reads, tokenises and deals out the user's files. The clone's token ids are the source's plus V, but for special tokens."""
    corpora = read_corpora(cfg)
    texts = {name: lines for name, (lines, _) in corpora.items() if name != "clone"}
    source = next(iter(texts))
    if cfg.tokenizer or cfg.checkpoint:
        tokenizer = load_tokenizer(cfg.tokenizer or cfg.checkpoint)
    else:
        tokenizer = train_bpe([line for lines in texts.values() for line in lines], cfg.vocab_size, special=(END,), eos=END)
    V, shared = tokenizer.vocab_size, set(tokenizer.special.values())
    clone = lambda ids: [i if i in shared else i + V for i in ids]
    text_of = [tokenizer.token_bytes(i).decode("utf-8", errors="replace") for i in range(V)]
    starts = lambda i: not regex.match(r"[\p{L}\p{M}\ufffd]", text_of[i % V])  # a token that begins with a letter goes on with its word
    encode = lambda text: tokenizer.encode(text if tokenizer.encode("a") == tokenizer.encode(" a")[-1:] else " " + text)
    blocks = {part: {name: pack([(clone if name == "clone" else list)(encode(line)) for line in lines if line.strip()], cfg.block,
                                tokenizer.eos_id or 0).tolist() for name, lines in dealt.items()}
              for part, dealt in deal(cfg, corpora).items()}

    running = Counter(word for block in blocks["read"][source] for word in cut_words(block, starts)
                      if regex.search(r"\p{L}", text_of[word[0]]))
    entries = read_dictionary(*cfg.dict)
    if cfg.aligned and not cfg.dict:
        entries = [entry for name in texts if name != source for entry in derive_dictionary(texts[source], texts[name])]
    parts = {"dictionary": encode_entries(entries, encode)}
    if cfg.clone:
        parts["clone"] = [(word, tuple(clone(word))) for word in sorted(running)]
    rng, seen, exam = random.Random(f"{seed}/dictionary"), [], {}
    for name, part in parts.items():
        part = rng.sample(part, len(part))
        cut = round(cfg.dict_frac * len(part))
        seen += part[:cut]
        if part:
            exam[name] = [e[:2] for e in part[:cut][:500]], [e[:2] for e in part[cut:][:500]]
    if not seen:
        raise InputError("the dictionary is empty: give --dict with a word and its translation, --aligned, or --clone")
    table = make_table(seen)
    coverage = sum(n for word, n in running.items() if word in table) / max(1, running.total())
    if coverage < 0.2:
        print(f"warning: only {coverage:.0%} of the source text's words are in the dictionary: code-switching will seldom happen")
    weights = [weight for _, weight in corpora.values()]
    return Data(tokenizer, list(corpora), weights, blocks["read"], blocks["held"], starts, seen, exam, coverage)


def make_corpus(cfg: Config, data: Data, seed: int, steps: int) -> list[list]:
    """`steps` batches of (block, is it in the source language?), languages drawn by weight."""
    rng = random.Random(f"{seed}/order")
    names = rng.choices(data.names, data.weights, k=steps * cfg.batch)
    blocks = [(rng.choice(data.read[name]), name == data.names[0]) for name in names]
    return [blocks[i : i + cfg.batch] for i in range(0, len(blocks), cfg.batch)]


# --- one seed

def make_model(cfg: Config, data: Data, seed: int) -> Transformer:
    """A fresh model, or the checkpoint; with a clone, its vocabulary is doubled and the new rows are drawn like fresh ones."""
    V = data.tokenizer.vocab_size * (2 if cfg.clone else 1)
    gen = generator(seed, "init")
    if cfg.checkpoint is None:
        return Transformer(ModelConfig(vocab_size=V, hidden_size=cfg.width, intermediate_size=8 * cfg.width // 3 // 16 * 16,
                                       num_hidden_layers=cfg.layers, num_attention_heads=4, max_position_embeddings=max(1024, cfg.block),
                                       initializer_range=0.05, model_type="llama"), gen)
    model, _ = load_pretrained(cfg.checkpoint)
    old = model.config.vocab_size
    if cfg.clone:
        rows = torch.randn(max(0, V - old), model.config.hidden_size, generator=gen) * model.embed.weight.std()
        for layer in {model.embed, model.lm_head}:
            layer.weight = nn.Parameter(torch.cat((layer.weight.detach(), rows)))
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.embed.weight
        model.config.vocab_size = model.embed.weight.shape[0]
    return model.train()


def run(cfg: Config, seed: int) -> Outcome:
    """All arms of one seed: the same blocks, order and initial weights."""
    outcome, data, device = Outcome({}, {}), make_data(cfg, seed), pick_device(cfg.device)
    for arm in cfg.methods:
        aligned, switch = ARMS[arm]
        model = make_model(cfg, data, seed).to(device)
        model.activation_checkpointing = cfg.activation_checkpointing
        extra = 0 if aligned else round(cfg.align_steps * (cfg.align_documents / cfg.batch + 2 * cfg.pairs / (cfg.batch * cfg.block)))
        corpus = make_corpus(cfg, data, seed, cfg.steps + extra + cfg.align_steps)
        text = iter([batch[: cfg.align_documents] for batch in corpus[cfg.steps + extra :]])
        points = {name: [] for name in data.names}
        with autocast(device, cfg.dtype):
            if aligned:
                align(cfg, model, data.seen, text, generator(seed, "pairs"))
            before = {name: retrieval(model, seen, [e[1] for e in seen]) for name, (seen, _) in data.exam.items()}
            for step in pretrain(cfg, model, corpus[: cfg.steps + extra], make_table(data.seen), switch, random.Random(f"{seed}/switching"),
                                 data.starts):
                if step % cfg.eval_every == 0 or step == cfg.steps + extra:
                    for name in data.names:
                        points[name].append((step, perplexity(model, data.held[name][:40])))
            metrics = {f"ppl {name}": perplexity(model, data.held[name]) for name in data.names} | {"coverage": data.coverage}
            series = {f"ppl {name}": tuple(zip(*xy)) for name, xy in points.items()}
            for name, (seen, unseen) in data.exam.items():
                after = retrieval(model, seen, [e[1] for e in seen])
                metrics[f"retrieval {name}"] = after[model.config.num_hidden_layers // 2]
                if unseen:
                    metrics[f"unseen {name}"] = retrieval(model, unseen, [e[1] for e in unseen])[model.config.num_hidden_layers // 2]
                series |= {f"{when} {name}": (range(len(values)), values) for when, values in (("before", before[name]), ("after", after))}
        outcome.metrics[arm], outcome.series[arm] = metrics, series
        if cfg.save:
            save_pretrained(model, Path(cfg.save) / f"{arm}-seed-{seed}", data.tokenizer)
    return outcome


# --- claims

def claims(metrics: dict) -> list[dict]:
    """The testable half of the paper's C10, per language and dictionary, on means over seeds. `joint` is the baseline."""
    names, pair, rows = next(iter(metrics.values())), ("joint", "prealign"), []
    source, *others = [n for n in names if n.startswith("ppl ")]
    for n in others:
        rows.append(check(metrics, f"C1 {n[4:]}", f"{n[4:]} is modelled better, and the source as well", f"{n} < joint; {source} within 5%",
                          {n: metrics.keys(), source: pair}, lambda m, n=n: m("prealign", n) < m("joint", n)
                          and abs(m("prealign", source) / m("joint", source) - 1) < 0.05))
    for n in [n for n in names if n.startswith("retrieval ")]:
        rows.append(check(metrics, f"C5 {n[10:]}", "The alignment survives pretraining", "retrieval@1 of seen words: prealign >= 0.5; "
                          "joint <= 0.1", {n: pair}, lambda m, n=n: m("prealign", n) >= 0.5 and m("joint", n) <= 0.1))
    for n in [n for n in names if n.startswith("unseen ")]:
        rows.append(check(metrics, f"C7 {n[7:]}", "Words outside the dictionary are aligned too", "retrieval@1 of unseen words: "
                          "prealign >= 0.1 and >= 2 x joint", {n: pair}, lambda m, n=n: m("prealign", n) >= max(0.1, 2 * m("joint", n))))
    return rows


# --- figure

def figure(results: dict):
    """Perplexity of every language during pretraining, and which layers know the translations."""
    arms = list(results["series"])
    names = [n for n in results["series"][arms[0]] if n.startswith(("ppl", "after"))]
    fig, axes = new_figure(1, len(names), width=3.4 * len(names), height=4.2)
    for ax, name in zip(axes, names):
        for color, arm in zip(COLORS, arms):
            series = results["series"][arm][name]
            plot_seeds(ax, series["x"], series["values"], arm, color)
        if name.startswith("ppl"):
            ax.set(yscale="log", ylim=(30, 10_000), xlabel="pretraining step", title=f"perplexity, {name[4:]}")
        else:
            last = len(series["x"]) - 1
            ax.set_xticks(range(last + 1), ["embed", *map(str, range(1, last)), "head"])
            ax.set(xlabel="layer", ylim=(-0.03, 1.03), title=f"retrieval@1, {name[6:]}")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms))
    return fig


def show_example(cfg: Config, data: Data) -> None:
    """The first block of the source, code-switched: each switched word as [what is read <- what is learned]."""
    block, V = data.read[data.names[0]][0], data.tokenizer.vocab_size
    text, table, rng = "", make_table(data.seen), random.Random(0)
    for word in cut_words(block, data.starts):
        new, labels = code_switch(word, table, 0.3, "input", rng, data.starts)
        shown = [data.tokenizer.decode([i % V for i in ids if i != IGNORE]) for ids in (new, labels)]
        text += shown[0] if list(word) == new else f" [{shown[0].strip()}{'*' if new[0] >= V else ''} <- {shown[1].strip()}]"
    print(f"A block, code-switched at 30% (here {cfg.rho:.0%} are; * a clone's word):\n  {text}\nlanguages {', '.join(data.names)}; "
          f"{len(data.seen)} dictionary entries cover {data.coverage:.0%} of the source's running words")


def main(cfg: Config) -> dict:
    started, asked = time.time(), cfg
    if not 0 <= cfg.rho < 1 or not 0 < cfg.dict_frac <= 1 or cfg.ratio <= 0:
        raise InputError(f"--rho {cfg.rho} must be at least 0 and below 1, --dict-frac {cfg.dict_frac} above 0 and at most 1, "
                         f"--ratio {cfg.ratio} above 0")
    if cfg.quick:
        cfg = replace(cfg, seeds=cfg.seeds[:1], align_steps=2, steps=3, eval_every=3, pairs=16, layers=2, width=32)
    show_example(cfg, make_data(cfg, cfg.seeds[0]))
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    path = Path(cfg.out or ROOT / "runs" / "prealign_real_text") / "prealign_real_text"
    results = save_results(__file__, PAPER, asked, outcomes, claims, figure, started, cfg.seeds, path)
    print_metrics(results["metrics"], list(results["metrics"][cfg.methods[0]]))
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
