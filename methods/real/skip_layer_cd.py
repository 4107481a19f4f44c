"""SkipLayerCD on any checkpoint: prompts, stopping, answer reading and scoring of mGSM, GSM8K, GSM-Plus and AQuA. The decoders are those of
methods/skip_layer_cd.py.

Run     python methods/real/skip_layer_cd.py --checkpoint DIR --prompt "Once upon a time" --decoding sl-d
        python methods/real/skip_layer_cd.py --checkpoint DIR --data mgsm --shots mgsm/exemplars.json --langs en de sw
        python methods/real/skip_layer_cd.py --checkpoint DIR --task gsm8k --data gsm8k/test.jsonl --shots mgsm/exemplars.json
        python methods/real/skip_layer_cd.py --checkpoint DIR --stage analyze --shots mgsm/exemplars.json --langs en zh
        python methods/real/skip_layer_cd.py --checkpoint DIR --stage score --data runs/skip_layer_cd/skip_layer_cd_answers.jsonl
        --decoding     greedy; cd (with --amateur DIR: another model); dola, dola-static; sl-h, sl-d; skip (with --skip 10 14)
        --data         mgsm: a folder with mgsm_en.tsv ... (question<TAB>answer); gsm8k, gsm-plus, aqua: a JSON Lines file in the
                       publisher's form. --shots: {"en": [{"q", "a"}, ...], ...}; aqua wants "aqua": [{"q", "options", "a", "correct"}].
        --stage        run: answer and score; analyze: what every layer says on the exemplars; score: count such a file again.
Paper   Mistral-7B, Llama-3-8B, Llama-2-13B, Baichuan2-7B, DeepSeek-7B (base models), all eleven languages, the defaults below: 14 GiB of
        weights in bfloat16 for 7B, about 0.4 million tokens per decoding; skipping [10, 14) of 32 blocks costs 50/32 of greedy's blocks.
Shown   results/skip_layer_cd_real.json (with its command): mGSM in four languages on stories260K (github karpathy/tinyllamas), a Llama
        of 0.26 million weights that knows English stories. It solves nothing, so this shows that the decoders run, and what a token
        costs; the amateur of cd is the model itself, for its cost. Its entropy rises with depth, so SL-D finds no
        span, says so, and takes the middle of SL-H's range.
Honest  The classic exemplars' "The answer is 11." becomes the line "Final Answer: 11" for gsm8k and gsm-plus. SL-H draws one span per
        question and keeps it for the second call. The match of Latin-script languages (de, es, fr, sw) with English cannot be told from
        the script and is not measured.
"""

import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import regex
import torch
from torch import nn

from methods.experiments.skip_layer_cd import PAPER
from methods.skip_layer_cd import SkipLayers, blocks_per_token, entropy_curve, entropy_span, heuristic_span, span_sizes, views
from methods.skip_layer_cd_baselines import ContrastModels, DoLa, RepetitionPenalty, last_scores
from minilm import InputError
from minilm.data import read_text, write_atomically
from minilm.claims import check, claim, print_claims
from minilm.evaluate import last_number
from minilm.generate import stop_ids, stream
from minilm.results import COLORS, ROOT, Outcome, cli, new_figure, print_metrics, progress, save_results
from minilm.tokenizer import Tokenizer
from minilm.training import pick_device
from minilm.transformer import Output
from minilm.weights import load_pretrained

Decoding = Literal["greedy", "cd", "dola", "dola-static", "sl-h", "sl-d", "skip"]
WORDS = {  # question and answer word of mGSM's prompts, and the number of exemplars that the paper uses
    "en": ("Question: ", "Step-by-Step Answer:", 8), "de": ("Frage: ", "Schritt-für-Schritt-Antwort:", 8),
    "fr": ("Question : ", "Réponse étape par étape :", 8), "es": ("Pregunta: ", "Respuesta paso a paso:", 8),
    "ru": ("Задача: ", "Пошаговое решение:", 8), "zh": ("问题：", "逐步解答：", 8), "ja": ("問題：", "ステップごとの答え：", 8),
    "th": ("โจทย์: ", "คำตอบทีละขั้นตอน:", 4), "sw": ("Swali: ", "Jibu la Hatua kwa Hatua:", 8), "bn": ("প্রশ্ন: ", "ধাপে ধাপে উত্তর:", 4),
    "te": ("ప్రశ్న: ", "దశలవారీగా సమాధానం:", 2)}
SCRIPTS = {"zh": r"\p{Han}", "ja": r"[\p{Han}\p{Hiragana}\p{Katakana}]", "ru": r"\p{Cyrillic}", "th": r"\p{Thai}", "bn": r"\p{Bengali}",
           "te": r"\p{Telugu}", "en": r"\p{Latin}"}


@dataclass(frozen=True)
class Config:
    checkpoint: str  # Hugging Face folder with a tokenizer
    stage: Literal["run", "analyze", "score"] = "run"  # what to do
    prompt: str | None = None  # continue this text in place of a task
    decoding: tuple[Decoding, ...] = ("greedy", "dola", "sl-h", "sl-d")  # ways to decode
    task: Literal["mgsm", "gsm8k", "gsm-plus", "aqua"] = "mgsm"  # what to answer
    data: str | None = None  # the task's folder or file; for --stage score, a file of answers
    shots: str | None = None  # JSON file of exemplars
    num_shots: int | None = None  # how many of them (default: the paper's 8; th, bn 4; te 2)
    langs: tuple[str, ...] = ("en",)  # languages of mgsm
    limit: int | None = None  # questions per language (default: all)
    amateur: str | None = None  # cd: folder of the weaker model
    truncate_vocab: bool = False  # cd: cut two vocabularies to the shorter one
    skip: tuple[int, int] | None = None  # skip: first block to skip, first block after them
    alpha: float = 0.1  # plausible tokens have at least this share of the best token's probability
    beta: float = 0.5  # strength of the contrast (cd, sl-h, sl-d, skip)
    share_prefix: bool = True  # compute the blocks before the skipped ones once for expert and amateur
    exits: tuple[int, ...] = ()  # dola: early exits to choose from (default: the lower half); dola-static: its one exit
    dola_norm: bool = False  # dola: final norm before the head (the authors' code has none)
    jsd: Literal["standard", "official"] = "standard"  # dola: divergence that chooses the exit
    repetition_penalty: float = 1.2  # dola: as its authors run it; 1 is none
    sld_threshold: float = 0.1  # sl-d: least fall of entropy, in nats per block
    min_start: int | None = None  # sl-h, sl-d: first block that may be skipped (default: 4; an eighth of a model under 16 blocks)
    max_new_tokens: int = 800  # longest answer
    seed: int = 2023  # sl-h: draws
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of weights and computation
    device: str = "auto"  # auto (cuda, else cpu), cpu, cuda, mps
    out: str | None = None  # folder for answers and results (default: runs/skip_layer_cd)


# --- the tasks' files

class Item(NamedTuple):
    """One question as a finished prompt, and its gold answer: a number, in aqua a letter."""

    id: str
    lang: str
    prompt: str
    gold: str


def read_rows(path: str, fields: Sequence[str]) -> Iterator[tuple[int, dict]]:
    """The objects of a JSON Lines file, with line numbers."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                yield number, {field: row[field] for field in fields}
            except (json.JSONDecodeError, KeyError, TypeError):
                raise InputError(f"{path}, line {number}: a JSON object with the fields {', '.join(fields)} is needed") from None


def number(text: str, where: str, whole: bool = False) -> str:
    """A gold answer; `whole`: as str(int(gold)), with which the paper's scorer compares digits, so that a negative one is never met."""
    text = str(text).strip().replace(",", "")
    if not re.fullmatch(r"-?\d+(\.0+)?" if whole else r"-?\d+(\.\d+)?", text):
        raise InputError(f"{where}: the gold answer {text[:30]!r} is not a {'whole ' * whole}number")
    return str(int(text.partition(".")[0])) if whole else text


def letter(row: dict, where: str) -> str:
    """The right choice of an AQuA row."""
    options, gold = row["options"], str(row["correct"]).strip().lower()
    letters = [str(o)[0].lower() for o in options if re.match(r"[A-Ea-e]\)", str(o))] if isinstance(options, list) else []
    if gold not in letters or len(letters) < len(options):
        raise InputError(f'{where}: options such as "A)21" are needed, and "correct" must be the letter of one of them')
    return gold


def read_mgsm(cfg: Config, lang: str) -> list[Item]:
    if lang not in WORDS:
        raise InputError(f"--langs {lang}: mgsm has the languages {', '.join(WORDS)}")
    (question, answer, _), file, items = WORDS[lang], Path(cfg.data) / f"mgsm_{lang}.tsv", []
    for n, line in enumerate(read_text(file).rstrip("\n").split("\n")[: cfg.limit], 1):
        if line.count("\t") != 1:
            raise InputError(f"{file}, line {n}: question<TAB>answer is needed, this line has {line.count(chr(9))} tabs")
        text, gold = line.split("\t")
        items.append(Item(f"{lang}-{n}", lang, f"{exemplars(cfg, lang)}{question}{text}\n{answer}", number(gold, f"{file}, line {n}")))
    return items


def read_task(cfg: Config) -> list[Item]:
    if cfg.task == "mgsm":
        return [item for lang in cfg.langs for item in read_mgsm(cfg, lang)]
    if cfg.task == "aqua":
        rows = [(n, row, letter(row, f"{cfg.data}, line {n}")) for n, row in read_rows(cfg.data, ("question", "options", "correct"))]
        return [Item(f"aqua-{n}", "aqua", f"{exemplars(cfg, 'aqua')}Problem: {row['question']}\n{choices(row['options'])}\nSolution:", gold)
                for n, row, gold in rows][: cfg.limit]
    golds = [(n, row["question"], str(row["answer"]).rpartition("#### ")[2]) for n, row in read_rows(cfg.data, ("question", "answer"))]
    golds = [(n, question, gold) for n, question, gold in golds if cfg.task == "gsm8k" or gold.strip().isdecimal()]  # gsm-plus: digits only
    return [Item(f"{cfg.task}-{n}", "en", f"{exemplars(cfg, 'en')}Problem: {question}\nSolution:",
                 number(gold, f"{cfg.data}, line {n}", whole=True)) for n, question, gold in golds][: cfg.limit]


def choices(options: Sequence[str]) -> str:
    """["A)21", "B)21.5"] -> "Choices: (a) 21 (b) 21.5"."""
    return "Choices: " + " ".join(f"({o[0].lower()}) {o[2:].strip()}" for o in options)


def exemplars(cfg: Config, lang: str) -> str:
    """The few-shot prefix, each exemplar followed by a blank line; "" with --num-shots 0."""
    if cfg.num_shots == 0:
        return ""
    if cfg.shots is None:
        raise InputError('--shots is missing: give a JSON file {"en": [{"q": ..., "a": ...}, ...]}, or --num-shots 0')
    try:
        shots = json.loads(read_text(cfg.shots))[lang][: cfg.num_shots or WORDS.get(lang, (0, 0, 4))[2]]
        if cfg.task == "mgsm":
            texts = [f"{s['q']}\n{s['a']}" for s in shots]
        elif lang == "aqua":
            texts = [f"Problem: {s['q']}\n{choices(s['options'])}\nSolution: {s['a']}\nFinal Answer: ({s['correct'].lower()})"
                     for s in shots]
        else:  # mgsm's English exemplars are the classic eight
            cut = re.compile(r"^Question: |^Step-by-Step Answer: | The answer is [^ ]*$")
            texts = [f"Problem: {cut.sub('', s['q'])}\nSolution: {cut.sub('', s['a'])}\nFinal Answer: {last_number(s['a'])}" for s in shots]
    except (json.JSONDecodeError, KeyError, TypeError, IndexError):
        raise InputError(f"{cfg.shots} holds no exemplars for {lang!r}: see --help for the form") from None
    return "".join(text + "\n\n" for text in texts)


def is_right(task: str, answered: str | None, gold: str) -> bool:
    if task == "mgsm":
        return answered is not None and abs(float(answered) - float(gold)) < 1e-3
    return answered == gold


# --- decoding

class Loaded(NamedTuple):
    model: nn.Module
    tokenizer: Tokenizer
    amateur: nn.Module | None

    def ids(self, text: str) -> torch.Tensor:
        return torch.tensor([self.tokenizer.encode(text, bos=self.tokenizer.add_bos)], device=self.model.embed.weight.device)


def load(cfg: Config) -> Loaded:
    if "cd" in cfg.decoding and cfg.amateur is None:
        raise InputError("--decoding cd needs a second, weaker model: give --amateur DIR")
    if "skip" in cfg.decoding and cfg.skip is None:
        raise InputError("--decoding skip needs the blocks to skip: give --skip M N")
    if "dola-static" in cfg.decoding and len(cfg.exits) != 1:
        raise InputError(f"--decoding dola-static has one early exit, --exits gives {len(cfg.exits)}: give for example --exits 2")
    device, dtype = pick_device(cfg.device), getattr(torch, cfg.dtype)
    model, tokenizer = load_pretrained(cfg.checkpoint, dtype, device)
    if tokenizer is None:
        raise InputError(f"{cfg.checkpoint} has no tokenizer.json: copy the checkpoint's tokenizer into its folder")
    return Loaded(model, tokenizer, load_pretrained(cfg.amateur, dtype, device)[0] if cfg.amateur else None)


def make_decoder(cfg: Config, name: str, loaded: Loaded, prefix: str, rng: random.Random) -> nn.Module:
    """sl-h draws a span at every call; sl-d finds it in the entropies of `prefix`, the exemplars."""
    model, L = loaded.model, len(loaded.model.layers)
    if name == "greedy":
        return model
    if name == "cd":
        return ContrastModels(model, loaded.amateur, cfg.alpha, cfg.beta, cfg.truncate_vocab)
    if name.startswith("dola"):
        decoder = DoLa(model, cfg.exits or None, cfg.alpha, norm=cfg.dola_norm, jsd=cfg.jsd)
        return decoder if cfg.repetition_penalty == 1 else RepetitionPenalty(decoder, cfg.repetition_penalty)
    if name == "sl-d":
        span = entropy_span(entropy_curve(model, loaded.ids(prefix)), cfg.sld_threshold, cfg.min_start)
    else:
        span = cfg.skip if name == "skip" else heuristic_span(L, rng, cfg.min_start)
    return SkipLayers(model, span, cfg.alpha, cfg.beta, cfg.share_prefix)


class Restricted(nn.Module):
    """A decoder that chooses among some tokens only; at a step where none of them is plausible it is free."""

    def __init__(self, decoder: nn.Module, allowed: Sequence[int]):
        super().__init__()
        self.decoder, self.config, self.new_cache, self.allowed = decoder, decoder.config, decoder.new_cache, list(allowed)

    def forward(self, ids, *, cache, attention_mask=None) -> Output:
        scores = last_scores(self.decoder, ids, cache, attention_mask)
        some = torch.full_like(scores, -torch.inf)
        some[..., self.allowed] = scores[..., self.allowed]
        return Output(torch.where(some.isinf().all(-1, keepdim=True), scores, some))


def complete(decoder, loaded: Loaded, prompt: str, longest: int, stop: str | None = None) -> str:
    """The continuation up to and with `stop` (or to EOS, or the end of the context). Prompt and output are decoded together, and the
    prompt's length cut off: some tokenizers would drop a space otherwise."""
    rows, text, stops = loaded.ids(prompt)[0].tolist(), "", stop_ids(loaded.model, loaded.tokenizer)
    start = len(loaded.tokenizer.decode(rows, skip_special=True))
    for tokens in stream(decoder, [rows], longest):
        rows.append(int(tokens[0]))
        text = loaded.tokenizer.decode(rows, skip_special=True)[start:]
        if rows[-1] in stops or stop and stop in text:
            break
    return text


def answer(cfg: Config, item: Item, decoder, expert, loaded: Loaded) -> tuple[str, str | None]:
    """The text and the answer read from it; but for mgsm a second call writes the answer, with `expert`, in digits or a letter only."""
    if cfg.task == "mgsm":
        text = complete(decoder, loaded, item.prompt, cfg.max_new_tokens, "\n\n").partition("\n\n")[0]
        return text, last_number(text)
    text = complete(decoder, loaded, item.prompt, cfg.max_new_tokens, "\n").partition("\n")[0]
    spelled = [loaded.tokenizer.token_bytes(i) for i in range(loaded.tokenizer.vocab_size)]
    if cfg.task == "aqua":
        letters = Restricted(expert, [i for i, b in enumerate(spelled) if len(b) == 1 and b in b"abcde"])
        return text, complete(letters, loaded, f"{item.prompt}{text}\nFinal Answer: (", 1)
    digits = Restricted(expert, [i for i, b in enumerate(spelled) if b == b"\n" or b.isdigit()])
    return text, complete(digits, loaded, f"{item.prompt}{text}\nFinal Answer: ", 20, "\n")[:-1].strip()


# --- what every layer says, what a token costs

def look(loaded: Loaded, lang: str, prefix: str) -> dict[str, dict[str, float]]:
    """On a language's exemplars: view -> entropy in nats; and, where the script tells it from English, own and base: of the positions
    with a letter of its script next, the share where the view's first choice is of its script, is Latin."""
    tokenizer, L, seen = loaded.tokenizer, len(loaded.model.layers), {}
    spans = [(m, min(L, m + span_sizes(L)[0])) for m in range(L)]
    ids = loaded.ids(prefix)[:, : loaded.model.config.max_position_embeddings]
    text = [tokenizer.token_bytes(i).decode("utf-8", errors="replace") for i in range(loaded.model.config.vocab_size)]
    script, latin = SCRIPTS.get(lang), torch.tensor([bool(regex.search(SCRIPTS["en"], t)) for t in text])
    own = torch.tensor([bool(script and regex.search(script, t) or lang != "en" and "\ufffd" in t) for t in text])  # (parts of characters)
    where = own[ids[0, 1:].cpu()]
    for name, logits in views(loaded.model, ids[:, :-1], spans):
        log_p = logits[0].float().log_softmax(-1).cpu()
        seen[name] = {f"entropy {lang}": -(log_p.exp() * log_p).sum(-1).mean().item()}
        if script and where.any():
            said = log_p.argmax(-1)[where]
            seen[name] |= {f"own {lang}": own[said].float().mean().item(), f"base {lang}": latin[said].float().mean().item()}
    return seen


def cost(cfg: Config, loaded: Loaded, decoder: nn.Module, prompt: str) -> dict[str, float]:
    """Tokens per second; time and block evaluations of a token over greedy decoding's (A B A B, medians; blocks counted in the caches)."""
    ids, times, found = loaded.ids(prompt), {"greedy": [], "this": []}, {}
    for _ in range(15):
        for name, one in (("greedy", loaded.model), ("this", decoder)):
            started = time.perf_counter()
            steps = sum(1 for _ in stream(one, ids, min(16, cfg.max_new_tokens)))
            times[name].append((time.perf_counter() - started) / steps)
    if isinstance(decoder, SkipLayers):
        cache, L, (m, n) = decoder.new_cache(1), len(loaded.model.layers), decoder.span
        with torch.inference_mode():
            decoder.hidden(ids, cache=cache)
        found = {"blocks": blocks_per_token(cache) / L, "formula": (2 * L - n + (0 if cfg.share_prefix else m)) / L, "m": m}
    return found | {"time": median(b / a for a, b in zip(*times.values())), "tokens per s": 1 / median(times["this"])}


# --- claims, figure, main

def claims(metrics: dict) -> list[dict]:
    skipping = [name for name in ("sl-h", "sl-d", "skip") if "blocks" in metrics.get(name, {})]
    dolas = [name for name in ("dola", "dola-static") if name in metrics]
    tasks = [k for k, cell in metrics.get("greedy", {}).items() if k.startswith("acc ") and cell["mean"] >= 0.05]
    c4 = "C4", "SkipLayerCD answers better than DoLa", "accuracy above DoLa's in every language that greedy decoding solves at 5% or more"
    c7 = "C7", "A token costs (2L - n)/L of greedy's block evaluations", "counted in the caches: equal; time within 15% of it"
    return [
        check(metrics, *c4, {task: [*skipping, *dolas] for task in tasks}, lambda m: all(
            m(a, task) > m(b, task) for a in skipping for b in dolas for task in tasks)) if tasks and skipping and dolas else
        claim(*c4, "not testable: greedy decoding solves fewer than 5%, or there are no two decodings to compare", None),
        check(metrics, *c7, {name: skipping for name in ("blocks", "formula", "time")}, lambda m: all(
            abs(m(s, "blocks") - m(s, "formula")) < 1e-9 and abs(m(s, "time") / m(s, "formula") - 1) <= 0.15
            for s in skipping)) if skipping else
        claim(*c7, "no decoding that skips was run", None)]


def figure(results: dict):
    """Left: entropy by depth, one line per language. Right: what a token costs in every decoding."""
    metrics, (fig, (left, right)) = results["metrics"], new_figure(1, 2)
    depth = [view for view in metrics if re.fullmatch(r"h\d+|expert", view)]
    for color, name in zip(COLORS, [key for key in metrics.get("h0", {}) if key.startswith("entropy ")]):
        left.plot(range(len(depth)), [metrics[view][name]["mean"] for view in depth], "o-", color=color, label=name.split()[1])
    left.set(xlabel="early exit (last: the whole model)", ylabel="entropy (nats)", title="Uncertainty by depth")
    names = [name for name in metrics if "time" in metrics[name]]
    for label, style in (("time", "o"), ("blocks", "D")):
        points = [(metrics[name][label]["mean"], y) for y, name in enumerate(names) if label in metrics[name]]
        right.plot([x for x, _ in points], [y for _, y in points], style, label=label, markersize=9, fillstyle="none")
    right.set(xlabel="a token's cost, greedy = 1", xlim=(0, None), title="Time and block evaluations")
    right.set_yticks(range(len(names)), names)
    for ax in (left, right):
        ax.legend()
    return fig


def run(cfg: Config, loaded: Loaded, items: list[Item], folder: Path) -> dict[str, dict[str, float]]:
    """Diagnostics per language, then every decoding over every question; the texts go to skip_layer_cd_answers.jsonl."""
    langs, lines, table = list(dict.fromkeys(item.lang for item in items)) or list(cfg.langs), [], {}
    prefix = {lang: exemplars(cfg, lang) for lang in langs}
    for lang in langs if all(prefix.values()) else ():
        for view, values in look(loaded, lang, prefix[lang]).items():
            table.setdefault(view, {}).update(values)
    first = {(name, lang): make_decoder(cfg, name, loaded, prefix[lang] or items[0].prompt, random.Random(cfg.seed))
             for name in cfg.decoding for lang in langs if items}  # (a wrong setting shows here, before any answer)
    for name in cfg.decoding if items else ():
        rng, right = random.Random(cfg.seed), {lang: [] for lang in langs}
        for item in progress(items, name):
            decoder = make_decoder(cfg, name, loaded, "", rng) if name == "sl-h" else first[name, item.lang]  # one draw per question
            text, answered = answer(cfg, item, decoder, loaded.model if name == "cd" else decoder, loaded)
            right[item.lang].append(is_right(cfg.task, answered, item.gold))
            lines.append({"id": item.id, "task": cfg.task, "lang": item.lang, "decoding": name, "span": getattr(decoder, "span", None),
                          "text": text, "answer": answered, "gold": item.gold})
        accuracy = {f"acc {lang}": sum(hits) / len(hits) for lang, hits in right.items()}
        table[name] = accuracy | {"acc": sum(accuracy.values()) / len(langs)} | cost(cfg, loaded, first[name, langs[0]], items[0].prompt)
    if lines:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "skip_layer_cd_answers.jsonl", lambda path: path.write_text(text, encoding="utf-8"))
    return table


def score(path: str) -> dict[str, dict[str, float]]:
    """Decoding -> accuracy per language, from the texts (mgsm) or answers of a file that `run` wrote."""
    right = {}
    for n, row in read_rows(path, ("task", "lang", "decoding", "text", "answer", "gold")):
        task, answered, gold = row["task"], row["answer"], row["gold"]
        if task == "mgsm":
            answered, gold = last_number(str(row["text"])), number(gold, f"{path}, line {n}")
        right.setdefault(row["decoding"], {}).setdefault(row["lang"], []).append(is_right(task, answered, gold))
    return {name: {lang: sum(hits) / len(hits) for lang, hits in row.items()} for name, row in right.items()}


def main(cfg: Config) -> dict:
    started, folder = time.time(), Path(cfg.out) if cfg.out else ROOT / "runs" / "skip_layer_cd"
    if min(cfg.max_new_tokens, len(cfg.langs), len(cfg.decoding), 1 if cfg.limit is None else cfg.limit) < 1 or (cfg.num_shots or 0) < 0:
        raise InputError(f"--limit {cfg.limit}, --max-new-tokens {cfg.max_new_tokens}, --langs, --decoding need at least 1, --num-shots 0")
    if cfg.data is None and (cfg.stage == "score" or cfg.stage == "run" and not cfg.prompt):
        raise InputError("--data is missing: give the task's file (for mgsm: the folder with mgsm_en.tsv and its siblings)")
    if cfg.stage == "score":
        table = score(cfg.data)
        print("\n".join(f"{name}: " + ", ".join(f"{lang} {value:.3f}" for lang, value in row.items()) for name, row in table.items()))
        return table
    items, texts = [] if cfg.stage == "analyze" or cfg.prompt else read_task(cfg), {}
    loaded = load(cfg)
    if cfg.prompt:
        for name in cfg.decoding:
            decoder = make_decoder(cfg, name, loaded, cfg.prompt, random.Random(cfg.seed))
            texts[name] = complete(decoder, loaded, cfg.prompt, cfg.max_new_tokens)
            print(f"\n{name}{' skips [{},{})'.format(*decoder.span) if hasattr(decoder, 'span') else ''}: {cfg.prompt}{texts[name]}")
        return texts
    outcome = Outcome(run(cfg, loaded, items, folder), {})
    results = save_results(__file__, PAPER, cfg, [outcome], claims, figure, started, [cfg.seed], folder / "skip_layer_cd_real")
    layers = {name: row for name, row in results["metrics"].items() if "acc" not in row}
    print_metrics(layers, [f"{key} {lang}" for lang in cfg.langs for key in ("entropy", "own", "base")])
    decodings = {name: row for name, row in results["metrics"].items() if name not in layers}
    print_metrics(decodings, ["acc", "tokens per s", "time", "blocks", "formula"])
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
