"""SkipLayerCD on any checkpoint: prompts, stopping, answer reading and scoring of mGSM, GSM8K, GSM-Plus and AQuA. The decoders are those of
methods/skip_layer_cd.py.

Run     python methods/real/skip_layer_cd.py --checkpoint DIR --prompt "Once upon a time" --decoding sl-d
        python methods/real/skip_layer_cd.py --checkpoint DIR --data mgsm --shots mgsm/exemplars.json --langs en de sw
        python methods/real/skip_layer_cd.py --checkpoint DIR --task gsm8k --data gsm8k/test.jsonl --shots mgsm/exemplars.json
        python methods/real/skip_layer_cd.py --checkpoint DIR --stage analyze --shots mgsm/exemplars.json --langs en zh
        python methods/real/skip_layer_cd.py --checkpoint DIR --stage score --data runs/skip_layer_cd_real/answers.jsonl
        --decoding     greedy; cd (with --amateur DIR: another model); dola, dola-static; sl-h, sl-d; skip (with --skip 10 14)
        --data         mgsm: a folder with mgsm_en.tsv ... (question<TAB>answer); gsm8k, gsm-plus, aqua: a JSON Lines file in the
                       publisher's form. --shots: {"en": [{"q", "a"}, ...], ...}; aqua wants "aqua": [{"q", "options", "a", "correct"}].
        --stage        run: answer and score; analyze: what every layer says on the exemplars; score: count an answers.jsonl again.
Paper   Mistral-7B, Llama-3-8B, Llama-2-13B, Baichuan2-7B, DeepSeek-7B (base models), all eleven languages, the defaults below: 14 GiB of
        weights in bfloat16 for 7B, about 0.4 million tokens per decoding; skipping [10, 14) of 32 blocks costs 50/32 of greedy's blocks.
Shown   SHOWN
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

from methods.skip_layer_cd import (PAPER, ContrastModels, DoLa, RepetitionPenalty, SkipLayers, blocks_per_token, entropy_curve, entropy_span,
                                   heuristic_span, last_scores, views)
from minilm import InputError
from minilm.data import read_text, write_atomically
from minilm.generate import stream
from minilm.results import COLORS, ROOT, Outcome, check, claim, cli, new_figure, print_claims, print_metrics, progress, save_results
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
    data: str | None = None  # the task's folder or file; for --stage score, an answers.jsonl
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
    """One question with its gold answer: mgsm a number, gsm8k and gsm-plus a whole number, aqua a letter."""

    id: str
    lang: str
    prompt: str
    gold: str


def read_rows(path: str | None, fields: Sequence[str]) -> Iterator[tuple[int, dict]]:
    """The objects of a JSON Lines file, with line numbers."""
    if path is None:
        raise InputError("--data is missing: give the task's file (for mgsm: the folder)")
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                yield number, {field: row[field] for field in fields}
            except (json.JSONDecodeError, KeyError, TypeError):
                raise InputError(f"{path}, line {number}: a JSON object with the fields {', '.join(fields)} is needed") from None


def whole(text: str, where: str) -> str:
    if not re.fullmatch(r"-?\d+(\.\d+)?", text := str(text).strip().replace(",", "")):
        raise InputError(f"{where}: the gold answer {text[:30]!r} is not a number")
    return text


def read_task(cfg: Config) -> list[Item]:
    """Every question as a finished prompt."""
    if cfg.task == "mgsm":
        items = []
        for lang in cfg.langs:
            if lang not in WORDS:
                raise InputError(f"--langs {lang}: mgsm has the languages {', '.join(WORDS)}")
            if cfg.data is None:
                raise InputError("--data is missing: give the folder with mgsm_en.tsv and its siblings")
            file, prefix = Path(cfg.data) / f"mgsm_{lang}.tsv", exemplars(cfg, lang)
            for number, line in enumerate(read_text(file).rstrip("\n").split("\n"), 1):
                if line.count("\t") != 1:
                    raise InputError(f"{file}, line {number}: question<TAB>answer is needed, this line has {line.count(chr(9))} tabs")
                question, gold = line.split("\t")
                prompt = f"{prefix}{WORDS[lang][0]}{question}\n{WORDS[lang][1]}"
                items.append(Item(f"{lang}-{number}", lang, prompt, whole(gold, f"{file}, line {number}")))
    elif cfg.task == "aqua":
        items = [Item(f"aqua-{n}", "en", f"{exemplars(cfg, 'aqua')}Problem: {row['question']}\n{choices(row['options'])}Solution:",
                      str(row["correct"]).strip().lower()) for n, row in read_rows(cfg.data, ("question", "options", "correct"))]
    else:
        items = []
        for n, row in read_rows(cfg.data, ("question", "answer")):
            gold = str(row["answer"]).rpartition("#### ")[2].strip().replace(",", "")
            if cfg.task == "gsm8k" or gold.isdigit():  # gsm-plus: only rows whose answer is all digits
                prompt = f"{exemplars(cfg, 'en')}Problem: {row['question']}\nSolution:"
                items.append(Item(f"{cfg.task}-{n}", "en", prompt, whole(gold, f"{cfg.data}, line {n}")))
    by_lang = {lang: [item for item in items if item.lang == lang] for lang in dict.fromkeys(item.lang for item in items)}
    return [item for group in by_lang.values() for item in group[: cfg.limit]]


def choices(options: Sequence[str]) -> str:
    """["A)21", "B)21.5"] -> "Choices: (a) 21 (b) 21.5" and a new line."""
    return "Choices: " + " ".join(f"({o[0].lower()}) {o[2:].strip()}" for o in options) + "\n"


def exemplars(cfg: Config, lang: str) -> str:
    """The few-shot prefix, each exemplar followed by a blank line; "" with --num-shots 0."""
    if cfg.num_shots == 0:
        return ""
    if cfg.shots is None:
        raise InputError('--shots is missing: give a JSON file {"en": [{"q": ..., "a": ...}, ...]}, or --num-shots 0')
    try:
        shots = json.loads(read_text(cfg.shots))[lang]
        shots = shots[: cfg.num_shots or WORDS.get(lang, (0, 0, 4))[2]]
        if cfg.task == "mgsm":
            texts = [f"{s['q']}\n{s['a']}" for s in shots]
        elif lang == "aqua":
            texts = [f"Problem: {s['q']}\n{choices(s['options'])}Solution: {s['a']}\nFinal Answer: ({s['correct'].lower()})" for s in shots]
        else:
            question, solution = (re.compile("^" + re.escape(word.strip()) + r"\s*") for word in WORDS["en"][:2])
            texts = [f"Problem: {question.sub('', s['q'])}\nSolution: {re.sub(r' The answer is .*$', '', solution.sub('', s['a']))}\n"
                     f"Final Answer: {last_number(s['a'])}" for s in shots]
    except (json.JSONDecodeError, KeyError, TypeError, IndexError):
        raise InputError(f"{cfg.shots} holds no exemplars for {lang!r}: see --help for the form") from None
    return "".join(text + "\n\n" for text in texts)


def last_number(text: str) -> str | None:
    """The paper's reading of an answer: commas between two digits go, then the last digits with an optional .digits. Signs are lost."""
    found = re.findall(r"\d+(?:\.\d+)?", re.sub(r"(\d),(\d)", r"\1\2", text))
    return found[-1] if found else None


# --- decoding

class Loaded(NamedTuple):
    model: nn.Module
    tokenizer: object
    amateur: nn.Module | None


def load(cfg: Config) -> Loaded:
    """Everything that the decodings asked for need; refuses what they lack before anything is computed."""
    if "cd" in cfg.decoding and cfg.amateur is None:
        raise InputError("--decoding cd needs a second, weaker model: give --amateur DIR")
    if "skip" in cfg.decoding and cfg.skip is None:
        raise InputError("--decoding skip needs the blocks to skip: give --skip M N")
    device, dtype = pick_device(cfg.device), getattr(torch, cfg.dtype)
    model, tokenizer = load_pretrained(cfg.checkpoint, dtype, device)
    if tokenizer is None:
        raise InputError(f"{cfg.checkpoint} has no tokenizer.json: copy the checkpoint's tokenizer into its folder")
    amateur = load_pretrained(cfg.amateur, dtype, device)[0] if cfg.amateur else None
    loaded = Loaded(model, tokenizer, amateur)
    for name in cfg.decoding:  # (a wrong setting shows here)
        make_decoder(cfg, name, loaded, choose_span(cfg, name, model, torch.tensor([[0, 0]], device=device), random.Random(0), quiet=True))
    return loaded


def make_decoder(cfg: Config, name: str, loaded: Loaded, span: tuple[int, int] | None) -> nn.Module:
    model = loaded.model

    def dola(exits):
        decoder = DoLa(model, exits, cfg.alpha, norm=cfg.dola_norm, jsd=cfg.jsd)
        return decoder if cfg.repetition_penalty == 1 else RepetitionPenalty(decoder, cfg.repetition_penalty)

    if name == "greedy":
        return model
    if name == "cd":
        return ContrastModels(model, loaded.amateur, cfg.alpha, cfg.beta, cfg.truncate_vocab)
    if name == "dola-static" and len(cfg.exits) != 1:
        raise InputError(f"--decoding dola-static has one early exit, --exits gives {len(cfg.exits)}: give for example --exits 2")
    return dola(cfg.exits or None) if span is None else SkipLayers(model, span, cfg.alpha, cfg.beta, cfg.share_prefix)


def choose_span(cfg: Config, name: str, model, prefix: torch.Tensor, rng: random.Random, quiet: bool = False) -> tuple[int, int] | None:
    """The blocks that a decoding skips: sl-h draws anew at every call, sl-d looks at the few-shot prefix [1, T]."""
    if name == "sl-h" or name == "sl-d" and quiet:
        return heuristic_span(len(model.layers), rng, cfg.min_start)
    if name == "sl-d":
        return entropy_span(entropy_curve(model, prefix), cfg.sld_threshold, cfg.min_start)
    return cfg.skip if name == "skip" else None


class Restricted(nn.Module):
    """A decoder that chooses among some tokens only; at a step where none of them is plausible it is free."""

    def __init__(self, decoder: nn.Module, allowed: Sequence[int]):
        super().__init__()
        self.decoder, self.config, self.allowed = decoder, decoder.config, list(allowed)

    def new_cache(self, B):
        return self.decoder.new_cache(B)

    def forward(self, ids, *, cache, attention_mask=None) -> Output:
        scores = last_scores(self.decoder, ids, cache, attention_mask)
        some = torch.full_like(scores, -torch.inf)
        some[..., self.allowed] = scores[..., self.allowed]
        return Output(torch.where(some.isinf().all(-1, keepdim=True), scores, some))


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, bos=tokenizer.add_bos)


def complete(decoder, tokenizer, prompt: str, longest: int, stop: Sequence[str] = ()) -> tuple[str, int]:
    """The continuation up to and with the first stop (or EOS, or the end of the context), and its number of tokens. Prompt and output
    are decoded together: some tokenizers would drop a space between them otherwise."""
    ids = encode(tokenizer, prompt)
    start, rows, text = len(tokenizer.decode(ids, skip_special=True)), list(ids), ""
    for tokens in stream(decoder, [ids], longest):
        rows.append(int(tokens[0]))
        text = tokenizer.decode(rows, skip_special=True)[start:]
        if rows[-1] == tokenizer.eos_id or any(s in text for s in stop):
            break
    return text, len(rows) - len(ids)


def answer(cfg: Config, item: Item, decoder, expert, tokenizer) -> tuple[str, str | None, int]:
    """The text, the answer read from it, the number of tokens of the text."""
    if cfg.task == "mgsm":
        text, count = complete(decoder, tokenizer, item.prompt, cfg.max_new_tokens, ["\n\n"])
        text = text.partition("\n\n")[0]
        return text, last_number(text), count
    text, count = complete(decoder, tokenizer, item.prompt, cfg.max_new_tokens, ["\n"])
    text = text.partition("\n")[0]
    spelled = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    if cfg.task == "aqua":
        limited = Restricted(expert, [i for i, b in spelled.items() if b in (b"a", b"b", b"c", b"d", b"e")])
        return text, complete(limited, tokenizer, f"{item.prompt}{text}\nFinal Answer: (", 1)[0], count
    limited = Restricted(expert, [i for i, b in spelled.items() if b == b"\n" or b and set(b) <= set(b"0123456789")])
    return text, complete(limited, tokenizer, f"{item.prompt}{text}\nFinal Answer: ", 20, ["\n"])[0][:-1].strip(), count


def is_right(task: str, answered: str | None, gold: str) -> bool:
    if task == "mgsm":
        return answered is not None and abs(float(answered) - float(gold)) < 1e-3
    return answered == gold


# --- what every layer says

def look(cfg: Config, loaded: Loaded, lang: str) -> dict[str, dict[str, float]]:
    """On the exemplars of a language: view -> entropy in nats and, where the script tells the language from English, own and base: share of
    the positions with a letter of its script next where the view's first choice is of its script, is Latin."""
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = torch.tensor([encode(tokenizer, exemplars(cfg, lang))[: model.config.max_position_embeddings]], device=model.embed.weight.device)
    text = [tokenizer.token_bytes(i).decode("utf-8", errors="replace") for i in range(tokenizer.vocab_size)]
    writes = lambda script, parts: torch.tensor([bool(regex.search(script, t)) or parts and "\ufffd" in t for t in text], device=ids.device)
    L, seen = len(model.layers), {}
    spans = dict.fromkeys([heuristic_span(L, random.Random(0), m) for m in range(L)])
    for name, logits in views(model, ids[:, :-1], list(spans)):
        choice, log_p = logits[0].argmax(-1), logits[0].float().log_softmax(-1)
        seen[name] = {f"entropy {lang}": -(log_p.exp() * log_p).sum(-1).mean().item()}
        if lang in SCRIPTS:
            own, latin = writes(SCRIPTS[lang], lang != "en"), writes(SCRIPTS["en"], False)
            where = own[ids[0, 1:]]
            if where.any():
                seen[name] |= {f"{key} {lang}": table[choice.clamp(max=len(text) - 1)][where].float().mean().item()
                               for key, table in (("own", own), ("base", latin))}
    return seen


def cost(cfg: Config, loaded: Loaded, decoders: dict[str, nn.Module], prompt: str) -> dict[str, dict[str, float]]:
    """Time of a token and block evaluations per token, over greedy decoding's (A B A B, medians; blocks counted in the caches)."""
    ids, times, L = encode(loaded.tokenizer, prompt), {name: [] for name in ["greedy", *decoders]}, len(loaded.model.layers)
    for _ in range(5):
        for name, decoder in ({"greedy": loaded.model} | decoders).items():
            started = time.perf_counter()
            steps = sum(1 for _ in stream(decoder, [ids], min(64, cfg.max_new_tokens)))
            times[name].append((time.perf_counter() - started) / steps)
    found = {name: {"time": median(times[name]) / median(times["greedy"]), "tokens per s": 1 / median(times[name])} for name in decoders}
    for name, decoder in decoders.items():
        if isinstance(decoder, SkipLayers):
            cache = decoder.new_cache(1)
            with torch.inference_mode():
                decoder.hidden(torch.tensor([ids], device=loaded.model.embed.weight.device), cache=cache)
            found[name] |= {"blocks": blocks_per_token(cache) / L, "m": decoder.span[0],
                            "formula": (2 * L - decoder.span[1] + (0 if cfg.share_prefix else decoder.span[0])) / L}
    return found


# --- claims, figure, main

def claims(metrics: dict) -> list[dict]:
    langs = [name.removeprefix("own ") for name in metrics.get("expert", {}) if name.startswith("own ") and name != "own en"]
    langs = [lang for lang in langs if metrics["expert"][f"own {lang}"]["mean"] >= 0.5]
    skipping = [name for name in ("sl-h", "sl-d", "skip") if "blocks" in metrics.get(name, {})]
    exits = [f"h{i}" for i in range(1, len([view for view in metrics if re.fullmatch(r"h\d+", view)]) // 2)]
    tasks = [name.removeprefix("acc ") for name in metrics.get("greedy", {}) if name.startswith("acc ") and metrics["greedy"][name]["mean"] >= 0.05]
    both = [(sl, dola) for sl in skipping for dola in ("dola", "dola-static") if dola in metrics]
    c1 = "Early exits speak English", "lower-half exits: more English than own, in every language whose script tells"
    c4 = "SkipLayerCD answers better than DoLa", "accuracy of sl-h, sl-d, skip above dola's in every language"
    return [
        check(metrics, "C1", *c1, {f"{k} {lang}": exits for lang in langs for k in ("own", "base")}, lambda m: all(
            m(h, f"base {lang}") > m(h, f"own {lang}") for h in exits for lang in langs)) if langs else
        claim("C1", *c1, "not testable: in no language of another script does the model's last layer write that script", None),
        check(metrics, "C4", *c4, {f"acc {t}": sorted({*sum(both, ())}) for t in tasks}, lambda m: all(
            m(a, f"acc {t}") > m(b, f"acc {t}") for a, b in both for t in tasks)) if tasks and both else
        claim("C4", *c4, "not testable: the model solves fewer than 5% of the questions, or no two methods to compare ran", None),
        check(metrics, "C7", "A token costs (2L - n)/L block evaluations", "counted blocks equal the formula; time within 15% of it",
              {name: skipping for name in ("blocks", "formula", "time")}, lambda m: bool(skipping) and all(
                  m(s, "blocks") == m(s, "formula") and abs(m(s, "time") / m(s, "formula") - 1) <= 0.15 for s in skipping)),
    ]


def figure(results: dict):
    """Left: entropy by depth, one line per language. Right: accuracy and cost of every decoding."""
    fig, (left, right) = new_figure(1, 2)
    metrics = results["metrics"]
    L = len([view for view in metrics if re.fullmatch(r"h\d+", view)])
    for color, name in zip(COLORS, [n for n in metrics.get("h0", {}) if n.startswith("entropy ")]):
        left.plot(range(L + 1), [metrics[f"h{i}" if i < L else "expert"][name]["mean"] for i in range(L + 1)], "o-", color=color,
                  label=name.removeprefix("entropy "))
    left.set(xlabel="early exit (last: the whole model)", ylabel="entropy (nats)", title="What every layer is sure of")
    names = [name for name in metrics if "time" in metrics[name]]
    right.barh(range(len(names)), [metrics[n]["time"]["mean"] for n in names], color=COLORS[0], alpha=0.55, label="time of a token")
    counted = [(i, metrics[n]["blocks"]["mean"]) for i, n in enumerate(names) if "blocks" in metrics[n]]
    right.plot([x for _, x in counted], [i for i, _ in counted], "D", color=COLORS[1], label="block evaluations")
    right.set(xlabel="over greedy decoding", title="What a token costs")
    right.set_yticks(range(len(names)), names)
    for ax in (left, right):
        ax.legend()
    return fig


def run(cfg: Config, loaded: Loaded, items: list[Item], folder: Path) -> Outcome:
    """Diagnostics per language, then every decoding over every question; answers.jsonl keeps each text."""
    langs, lines, table = list(dict.fromkeys(item.lang for item in items)) or list(cfg.langs), [], {}
    prefix = {lang: exemplars(cfg, lang if cfg.task != "aqua" else "aqua") for lang in langs}
    for lang in langs if cfg.shots and cfg.num_shots != 0 else ():
        for view, values in look(cfg, loaded, lang).items():
            table.setdefault(view, {}).update(values)
    device = loaded.model.embed.weight.device
    for name in cfg.decoding if items else ():
        rng, spans, right, decoders = random.Random(cfg.seed), {}, {lang: [] for lang in langs}, []
        for item in progress(items, name):
            if name == "sl-h" or item.lang not in spans:
                ids = torch.tensor([encode(loaded.tokenizer, prefix[item.lang] or item.prompt)], device=device)
                spans[item.lang] = choose_span(cfg, name, loaded.model, ids, rng)
            decoders.append(make_decoder(cfg, name, loaded, spans[item.lang]))
            text, answered, _ = answer(cfg, item, decoders[-1], loaded.model if name == "cd" else decoders[-1], loaded.tokenizer)
            right[item.lang].append(is_right(cfg.task, answered, item.gold))
            lines.append({"id": item.id, "task": cfg.task, "lang": item.lang, "decoding": name, "span": spans[item.lang], "text": text,
                          "answer": answered, "gold": item.gold})
        accuracy = {f"acc {lang}": sum(hits) / len(hits) for lang, hits in right.items()}
        table[name] = accuracy | {"acc": sum(accuracy.values()) / len(accuracy)} | cost(cfg, loaded, {name: decoders[0]}, items[0].prompt)[name]
    if lines:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "skip_layer_cd_answers.jsonl", lambda path: path.write_text(text, encoding="utf-8"))
    return Outcome(table, {})


def score(path: str | None) -> dict[str, dict[str, float]]:
    """Decoding -> accuracy per language, from the texts (mgsm) or answers of an answers.jsonl."""
    right = {}
    for _, row in read_rows(path, ("task", "lang", "decoding", "text", "answer", "gold")):
        answered = last_number(row["text"]) if row["task"] == "mgsm" else row["answer"]
        right.setdefault(row["decoding"], {}).setdefault(f"acc {row['lang']}", []).append(is_right(row["task"], answered, row["gold"]))
    return {name: {lang: sum(hits) / len(hits) for lang, hits in row.items()} for name, row in right.items()}


def main(cfg: Config) -> dict:
    started, folder = time.time(), Path(cfg.out) if cfg.out else ROOT / "runs" / "skip_layer_cd"
    if cfg.stage == "score":
        table = score(cfg.data)
        print("\n".join(f"{name}: " + ", ".join(f"{lang} {value:.3f}" for lang, value in row.items()) for name, row in table.items()))
        return table
    items = [] if cfg.stage == "analyze" or cfg.prompt else read_task(cfg)
    loaded = load(cfg)
    if cfg.prompt:
        ids = torch.tensor([encode(loaded.tokenizer, cfg.prompt)], device=loaded.model.embed.weight.device)
        texts = {}
        for name in cfg.decoding:
            span = choose_span(cfg, name, loaded.model, ids, random.Random(cfg.seed))
            texts[name], _ = complete(make_decoder(cfg, name, loaded, span), loaded.tokenizer, cfg.prompt, cfg.max_new_tokens)
            print(f"\n{name}{f' [{span[0]},{span[1]})' if span else ''}: {cfg.prompt}{texts[name]}")
        return texts
    outcome = run(cfg, loaded, items, folder)
    results = save_results(__file__, PAPER, cfg, [outcome], claims, figure, started, [cfg.seed], folder / "skip_layer_cd_real")
    print_metrics({view: row for view, row in results["metrics"].items() if "acc" not in row}, [f"entropy {lang}" for lang in cfg.langs])
    print_metrics({n: row for n, row in results["metrics"].items() if "acc" in row}, ["acc", "tokens per s", "time", "blocks", "formula"])
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
