r"""SkipLayerCD on any checkpoint: prompts, stopping, answer reading and scoring of mGSM, GSM8K,
GSM-Plus and AQuA, and what every layer of it says. The method is methods/skip_layer_cd.py.

Run     python methods/real/skip_layer_cd.py --checkpoint DIR --prompt "Once upon a time" \
            --decoding sl-d
        python methods/real/skip_layer_cd.py --checkpoint DIR --data mgsm --langs en de sw \
            --shots mgsm/exemplars.json
        python methods/real/skip_layer_cd.py --checkpoint DIR --task gsm8k \
            --data gsm8k/test.jsonl --shots mgsm/exemplars.json
        python methods/real/skip_layer_cd.py --checkpoint DIR --stage analyze --data mgsm \
            --langs en es fr --limit 12
        python methods/real/skip_layer_cd.py --checkpoint DIR --stage score \
            --data runs/skip_layer_cd/skip_layer_cd_answers.jsonl

        --decoding  greedy; cd (with --amateur DIR: another model); dola, dola-static; sl-h, sl-d;
                    skip (with --skip 10 14)
        --data      mgsm: a folder with mgsm_en.tsv ... (question<TAB>answer); gsm8k, gsm-plus,
                    aqua: a JSON Lines file in the publisher's form
        --shots     {"en": [{"q", "a"}, ...], ...}; aqua: "aqua": [{"q", "options", "a", "correct"}]
        --stage     run: answer and score; analyze: what every layer and every decoder would say
                    next at each place of mGSM's questions; score: count a file of answers again
Paper   Mistral-7B, Llama-3-8B, Llama-2-13B, Baichuan2-7B, DeepSeek-7B (base models), all eleven
        languages, the defaults below: 14 GiB of weights in bfloat16 for 7B, about 0.4 million
        tokens per decoding. Skipping [10, 14) of 32 blocks costs 50/32 of greedy's blocks; DoLa
        costs a head per early exit (3.3 times a token at 49,000 tokens and 15 exits).
Honest  - The exemplars of gsm8k and gsm-plus are mGSM's English eight; the published code has eight
          of its own (trees, cars, Leah, Jason, Shawn, computers, golf, bagels). Their "The answer
          is 11." becomes the line "Final Answer: 11".
        - SL-H draws one span per question and keeps it for the second call.
        - analyze: a token is a language's if it is 20 times as frequent in this language's
          questions as in the English ones (and the other way round). One checkpoint decides nothing
          about others: every claim is undecided at best.
"""

import json
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Literal, NamedTuple

import torch
from torch import nn

from methods.experiments.skip_layer_cd import PAPER
from methods.skip_layer_cd import (
    SkipLayers,
    blocks_per_token,
    contrast,
    entropy_curve,
    entropy_span,
    heuristic_span,
    span_sizes,
    views,
)
from methods.skip_layer_cd_baselines import ContrastModels, DoLa, RepetitionPenalty, last_scores
from minilm import InputError
from minilm.claims import (
    Claim,
    PerSeed,
    Verdict,
    View,
    above,
    all_of,
    average,
    fact,
    judge,
    key,
    print_claims,
    untestable,
    within,
)
from minilm.data import read_text, write_atomically
from minilm.evaluate import last_number
from minilm.generate import stop_ids, stream
from minilm.results import (
    COLORS,
    ROOT,
    Outcome,
    check_range,
    check_unused,
    cli,
    new_figure,
    print_metrics,
    progress,
    save_results,
)
from minilm.tokenizer import Tokenizer
from minilm.training import pick_device
from minilm.transformer import Output
from minilm.weights import load_pretrained

Decoding = Literal["greedy", "cd", "dola", "dola-static", "sl-h", "sl-d", "skip"]


class Words(NamedTuple):
    question: str
    answer: str
    shots: int  # exemplars that the paper uses


MGSM = {
    "en": Words("Question: ", "Step-by-Step Answer:", 8),
    "de": Words("Frage: ", "Schritt-für-Schritt-Antwort:", 8),
    "fr": Words("Question : ", "Réponse étape par étape :", 8),
    "es": Words("Pregunta: ", "Respuesta paso a paso:", 8),
    "ru": Words("Задача: ", "Пошаговое решение:", 8),
    "zh": Words("问题：", "逐步解答：", 8),
    "ja": Words("問題：", "ステップごとの答え：", 8),
    "th": Words("โจทย์: ", "คำตอบทีละขั้นตอน:", 4),
    "sw": Words("Swali: ", "Jibu la Hatua kwa Hatua:", 8),
    "bn": Words("প্রশ্ন: ", "ধাপে ধাপে উত্তর:", 4),
    "te": Words("ప్రశ్న: ", "దశలవారీగా సమాధానం:", 2),
}


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
    alpha: float = 0.1  # plausible tokens have at least this share of the best one's probability
    beta: float = 0.5  # strength of the contrast (cd, sl-h, sl-d, skip)
    share_prefix: bool = True  # compute the blocks before the skipped ones once for both
    exits: tuple[int, ...] = ()  # dola: exits to choose from (default: lower half); -static: one
    dola_norm: bool = False  # dola: final norm before the head (the authors' code has none)
    jsd: Literal["standard", "official"] = "standard"  # dola: divergence that chooses the exit
    repetition_penalty: float = 1.2  # dola: as its authors run it; 1 is none
    sld_threshold: float = 0.1  # sl-d: least fall of entropy, in nats per block
    min_start: int | None = None  # sl-h, sl-d: first block that may be skipped (default: 4; an
    # eighth of a model under 16 blocks)
    max_new_tokens: int = 800  # longest answer
    timing: bool = False  # also measure what a token costs in every decoding (3 rounds)
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
                needed = ", ".join(fields)
                raise InputError(
                    f"{path}, line {number}: a JSON object with the fields {needed} is needed"
                ) from None


def number(text: str, where: str, whole: bool = False) -> str:
    """A gold answer. `whole`: as str(int(gold)), with which the paper's scorer compares digits, so
    that a negative one is never met."""
    text = str(text).strip().replace(",", "")
    if not re.fullmatch(r"-?\d+(\.0+)?" if whole else r"-?\d+(\.\d+)?", text):
        kind = "whole number" if whole else "number"
        raise InputError(f"{where}: the gold answer {text[:30]!r} is not a {kind}")
    return str(int(text.partition(".")[0])) if whole else text


def letter(row: dict, where: str) -> str:
    """The right choice of an AQuA row."""
    options = row["options"]
    gold = str(row["correct"]).strip().lower()
    letters = []
    if isinstance(options, list):
        letters = [str(o)[0].lower() for o in options if re.match(r"[A-Ea-e]\)", str(o))]
    if gold not in letters or len(letters) < len(options):
        raise InputError(
            f'{where}: options such as "A)21" are needed, and "correct" must be the letter of one'
        )
    return gold


def read_questions(cfg: Config, lang: str) -> list[tuple[str, str]]:
    """(question, gold) of a language's mGSM file."""
    if lang not in MGSM:
        raise InputError(f"--langs {lang}: mgsm has the languages {', '.join(MGSM)}")
    file = Path(cfg.data) / f"mgsm_{lang}.tsv"
    rows = []
    for n, line in enumerate(read_text(file).rstrip("\n").split("\n"), 1):
        if line.count("\t") != 1:
            tabs = line.count("\t")
            raise InputError(
                f"{file}, line {n}: question<TAB>answer is needed, this line has {tabs} tabs"
            )
        question, gold = line.split("\t")
        rows.append((question, number(gold, f"{file}, line {n}")))
    return rows


def read_mgsm(cfg: Config, lang: str) -> list[Item]:
    items = []
    for n, (question, gold) in enumerate(read_questions(cfg, lang)[: cfg.limit], 1):
        words = MGSM[lang]
        prompt = f"{exemplars(cfg, lang)}{words.question}{question}\n{words.answer}"
        items.append(Item(f"{lang}-{n}", lang, prompt, gold))
    return items


def read_aqua(cfg: Config) -> list[Item]:
    items = []
    for n, row in read_rows(cfg.data, ("question", "options", "correct")):
        gold = letter(row, f"{cfg.data}, line {n}")
        question = f"Problem: {row['question']}\n{choices(row['options'])}\nSolution:"
        items.append(Item(f"aqua-{n}", "aqua", exemplars(cfg, "aqua") + question, gold))
    return items[: cfg.limit]


def read_gsm(cfg: Config) -> list[Item]:
    """GSM8K, or GSM-Plus, of which only rows with an answer in digits count."""
    items = []
    for n, row in read_rows(cfg.data, ("question", "answer")):
        gold = str(row["answer"]).rpartition("#### ")[2]
        if cfg.task == "gsm-plus" and not gold.strip().isdecimal():
            continue
        gold = number(gold, f"{cfg.data}, line {n}", whole=True)
        question = f"Problem: {row['question']}\nSolution:"
        items.append(Item(f"{cfg.task}-{n}", "en", exemplars(cfg, "en") + question, gold))
    return items[: cfg.limit]


def read_task(cfg: Config) -> list[Item]:
    if cfg.task == "mgsm":
        return [item for lang in cfg.langs for item in read_mgsm(cfg, lang)]
    return read_aqua(cfg) if cfg.task == "aqua" else read_gsm(cfg)


def choices(options: Sequence[str]) -> str:
    """["A)21", "B)21.5"] -> "Choices: (a) 21 (b) 21.5", with what stands behind a bracket."""
    return "Choices: " + " ".join(f"({o[0].lower()}) {o[2:]}" for o in options)


def exemplars(cfg: Config, lang: str) -> str:
    """The few-shot prefix, each exemplar followed by a blank line; "" with --num-shots 0."""
    if cfg.num_shots == 0:
        return ""
    if cfg.shots is None:
        raise InputError(
            '--shots is missing: give a JSON file {"en": [{"q": ..., "a": ...}, ...]}, '
            "or --num-shots 0"
        )
    usual = MGSM[lang].shots if lang in MGSM else 4
    try:
        shots = json.loads(read_text(cfg.shots))[lang][: cfg.num_shots or usual]
        texts = [exemplar(cfg.task, lang, shot) for shot in shots]
    except (json.JSONDecodeError, KeyError, TypeError, IndexError):
        raise InputError(f"{cfg.shots} holds no exemplars for {lang!r}: see --help") from None
    return "".join(text + "\n\n" for text in texts)


def exemplar(task: str, lang: str, shot: dict) -> str:
    if task == "mgsm":
        return f"{shot['q']}\n{shot['a']}"
    if lang == "aqua":
        answered = f"{shot['a']}\nFinal Answer: ({shot['correct'].lower()})"
        return f"Problem: {shot['q']}\n{choices(shot['options'])}\nSolution: {answered}"
    cut = re.compile(r"^Question: |^Step-by-Step Answer: | The answer is [^ ]*$")
    question = cut.sub("", shot["q"])
    steps = cut.sub("", shot["a"])
    return f"Problem: {question}\nSolution: {steps}\nFinal Answer: {last_number(shot['a'])}"


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
        ids = self.tokenizer.encode(text, bos=self.tokenizer.add_bos)
        return torch.tensor([ids], device=self.model.embed.weight.device)


def load(cfg: Config) -> Loaded:
    device = pick_device(cfg.device)
    dtype = getattr(torch, cfg.dtype)
    model, tokenizer = load_pretrained(cfg.checkpoint, dtype, device)
    if tokenizer is None:
        raise InputError(
            f"{cfg.checkpoint} has no tokenizer.json: copy the checkpoint's tokenizer there"
        )
    amateur = load_pretrained(cfg.amateur, dtype, device)[0] if cfg.amateur else None
    return Loaded(model, tokenizer, amateur)


def make_decoder(cfg: Config, name: str, loaded: Loaded, text: str, rng: random.Random):
    """sl-h draws a span at every call; sl-d finds it in the entropies of `text`."""
    model = loaded.model
    if name == "greedy":
        return model
    if name == "cd":
        return ContrastModels(model, loaded.amateur, cfg.alpha, cfg.beta, cfg.truncate_vocab)
    if name.startswith("dola"):
        decoder = DoLa(model, cfg.exits or None, cfg.alpha, norm=cfg.dola_norm, jsd=cfg.jsd)
        if cfg.repetition_penalty == 1:
            return decoder
        return RepetitionPenalty(decoder, cfg.repetition_penalty)
    if name == "sl-d":
        curve = entropy_curve(model, loaded.ids(text.rstrip("\n")))
        span = entropy_span(curve, cfg.sld_threshold, cfg.min_start)
    elif name == "sl-h":
        span = heuristic_span(len(model.layers), rng, cfg.min_start)
    else:
        span = cfg.skip
    return SkipLayers(model, span, cfg.alpha, cfg.beta, cfg.share_prefix)


class Restricted(nn.Module):
    """A decoder that chooses among some tokens only; where none of them is plausible it is free."""

    def __init__(self, decoder: nn.Module, allowed: Sequence[int]):
        super().__init__()
        self.decoder = decoder
        self.config = decoder.config
        self.new_cache = decoder.new_cache
        self.allowed = list(allowed)

    def forward(self, ids, *, cache, attention_mask=None) -> Output:
        scores = last_scores(self.decoder, ids, cache, attention_mask)
        some = torch.full_like(scores, -torch.inf)
        some[..., self.allowed] = scores[..., self.allowed]
        none = some.isinf().all(-1, keepdim=True)
        return Output(torch.where(none, scores, some))


def complete(decoder, loaded: Loaded, prompt: str, longest: int, stop: str | None = None) -> str:
    """The continuation up to and with `stop` (or to EOS, or the end of the context). Prompt and
    output are decoded together, and the prompt's length cut off: some tokenizers would drop a space
    otherwise."""
    rows = loaded.ids(prompt)[0].tolist()
    start = len(loaded.tokenizer.decode(rows, skip_special=True))
    ends = stop_ids(loaded.model, loaded.tokenizer)
    text = ""
    for tokens in stream(decoder, [rows], longest):
        rows.append(int(tokens[0]))
        text = loaded.tokenizer.decode(rows, skip_special=True)[start:]
        if rows[-1] in ends or (stop and stop in text):
            break
    return text


def answer(cfg: Config, item: Item, decoder, expert, loaded: Loaded) -> tuple[str, str | None]:
    """The text and the answer read from it; but for mgsm a second call writes the answer, with
    `expert`, in digits or a letter only."""
    if cfg.task == "mgsm":
        text = complete(decoder, loaded, item.prompt, cfg.max_new_tokens, "\n\n")
        text = text.partition("\n\n")[0]
        return text, last_number(text)
    text = complete(decoder, loaded, item.prompt, cfg.max_new_tokens, "\n").partition("\n")[0]
    spelled = [loaded.tokenizer.token_bytes(i) for i in range(loaded.tokenizer.vocab_size)]
    if cfg.task == "aqua":
        allowed = [i for i, b in enumerate(spelled) if len(b) == 1 and b in b"abcde"]
        prompt = f"{item.prompt}{text}\nFinal Answer: ("
        return text, complete(Restricted(expert, allowed), loaded, prompt, 1)
    allowed = [i for i, b in enumerate(spelled) if b == b"\n" or b.isdigit()]
    prompt = f"{item.prompt}{text}\nFinal Answer: "
    written = complete(Restricted(expert, allowed), loaded, prompt, 20, "\n")
    return text, written[:-1].strip()


# --- stage run: answers and what they cost


def run(cfg: Config, loaded: Loaded, items: list[Item], folder: Path) -> dict[str, dict]:
    """Every decoding over every question; the texts go to skip_layer_cd_answers.jsonl."""
    langs = list(dict.fromkeys(item.lang for item in items))
    first = {}  # a decoder for each language; a wrong setting shows here, before any answer
    for name in cfg.decoding:
        for lang in langs:
            prompt = next(item.prompt for item in items if item.lang == lang)
            text = exemplars(cfg, lang) or prompt
            first[name, lang] = make_decoder(cfg, name, loaded, text, random.Random(cfg.seed))
    table = {}
    lines = []
    for name in cfg.decoding:
        rng = random.Random(cfg.seed)
        right = {lang: [] for lang in langs}
        for item in progress(items, name):
            decoder = first[name, item.lang]
            if name == "sl-h":
                decoder = make_decoder(cfg, name, loaded, "", rng)  # a draw for each question
            expert = loaded.model if name == "cd" else decoder
            text, answered = answer(cfg, item, decoder, expert, loaded)
            right[item.lang].append(is_right(cfg.task, answered, item.gold))
            lines.append(
                {
                    "id": item.id,
                    "task": cfg.task,
                    "lang": item.lang,
                    "decoding": name,
                    "span": getattr(decoder, "span", None),
                    "text": text,
                    "answer": answered,
                    "gold": item.gold,
                }
            )
        table[name] = {("acc", lang): fmean(hits) for lang, hits in right.items()}
        table[name]["acc"] = fmean(table[name].values())
        table[name] |= cost(cfg, loaded, first[name, langs[0]], items[0].prompt)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    folder.mkdir(parents=True, exist_ok=True)

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    write_atomically(folder / "skip_layer_cd_answers.jsonl", write)
    return table


def cost(cfg: Config, loaded: Loaded, decoder: nn.Module, prompt: str) -> dict[str, float]:
    """Block evaluations of a token over greedy decoding's, counted in the cache; with --timing also
    milliseconds for the prompt, tokens per second behind it, and that over greedy decoding's."""
    found = {}
    ids = loaded.ids(prompt)
    if isinstance(decoder, SkipLayers):
        L = len(loaded.model.layers)
        m, n = decoder.span
        cache = decoder.new_cache(1)
        with torch.inference_mode():
            decoder.hidden(ids, cache=cache)
        unshared = 0 if cfg.share_prefix else m
        found = {"blocks": blocks_per_token(cache) / L, "formula": (2 * L - n + unshared) / L}
    if not cfg.timing:
        return found
    ratios, prompts, speeds = [], [], []
    for _ in range(3):  # in turns
        greedy = time_of(loaded.model, ids)
        this = time_of(decoder, ids)
        ratios.append(this[1] / greedy[1])
        prompts.append(1000 * this[0])
        speeds.append(1 / this[1])
    found["time"] = median(ratios)
    found["ms for the prompt"] = median(prompts)
    return found | {"tokens per s": median(speeds)}


def time_of(decoder: nn.Module, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds until the first token, and for each of the 15 that follow."""
    started = time.perf_counter()
    moments = []
    for _ in stream(decoder, ids, 16):
        moments.append(time.perf_counter())
    return moments[0] - started, (moments[-1] - moments[0]) / max(1, len(moments) - 1)


def score(path: str) -> dict[str, dict[str, float]]:
    """Decoding -> accuracy per language, from the texts (mgsm) or answers of a file of `run`."""
    right = {}
    for n, row in read_rows(path, ("task", "lang", "decoding", "text", "answer", "gold")):
        answered = row["answer"]
        gold = row["gold"]
        if row["task"] == "mgsm":
            answered = last_number(str(row["text"]))
            gold = number(gold, f"{path}, line {n}")
        hits = right.setdefault(row["decoding"], {}).setdefault(row["lang"], [])
        hits.append(is_right(row["task"], answered, gold))
    return {name: {lang: fmean(hits) for lang, hits in row.items()} for name, row in right.items()}


# --- stage analyze: what every layer and every decoder would say next


def own_tokens(loaded: Loaded, texts: list[str], others: list[str]) -> torch.Tensor:
    """bool [V]: the tokens that are at least 20 times as frequent in `texts` as in `others`."""
    counts = []
    for some in (texts, others):
        counts.append(Counter(i for text in some for i in loaded.tokenizer.encode(text)))
    here, there = counts
    own = torch.zeros(loaded.model.config.vocab_size, dtype=torch.bool)
    for token, count in here.items():
        share = count / here.total()
        other_share = max(there[token], 0.5) / max(1, there.total())
        own[token] = share >= 20 * other_share
    return own


def amateur_spans(L: int) -> list[tuple[int, int]]:
    """From block 2 (0 in a model under 16 blocks) upwards, an eighth of the blocks at a time."""
    n_skip, _ = span_sizes(L)
    first = 2 if L >= 16 else 0
    return [(m, m + n_skip) for m in range(first, L - n_skip + 1, n_skip)]


def analyze(cfg: Config, loaded: Loaded) -> dict[str, dict]:
    """Over mGSM's questions in each language: what is said at the places where a token of this
    language is next. Of every view: own, base (share of first choices that are this language's
    tokens, English ones), right (the next token itself), entropy (nats); of decoders: right."""
    questions = {lang: [q for q, _ in read_questions(cfg, lang)] for lang in ("en", *cfg.langs)}
    model = loaded.model
    spans = amateur_spans(len(model.layers))
    decoders = {
        "dola": DoLa(model, None, cfg.alpha, jsd=cfg.jsd),
        "dola norm": DoLa(model, None, cfg.alpha, norm=True, jsd=cfg.jsd),
        "mild exit": DoLa(model, None, cfg.alpha, cfg.beta, norm=True, jsd=cfg.jsd),
    }
    table = defaultdict(dict)
    other = next((lang for lang in cfg.langs if lang != "en"), "en")
    for lang in cfg.langs:
        contrary = "en" if lang != "en" else other
        own = own_tokens(loaded, questions[lang], questions[contrary])
        english = own_tokens(loaded, questions["en"], questions[lang if lang != "en" else other])
        sums = defaultdict(Counter)
        places = 0
        for question in progress(questions[lang][: cfg.limit], f"analyze {lang}"):
            ids = loaded.ids(question)[:, : model.config.max_position_embeddings]
            due = ids[0, 1:].cpu()
            where = own[due]
            places += int(where.sum())
            if not where.any():
                continue
            for name, logits in all_views(cfg, model, decoders, ids[:, :-1], spans):
                z = logits[0].float().cpu()[where]
                choice = z.argmax(-1)
                sums[name]["own"] += own[choice].sum().item()
                sums[name]["base"] += english[choice].sum().item()
                sums[name]["right"] += (choice == due[where]).sum().item()
                if z.isfinite().all():  # not of a contrast, which rules tokens out
                    log_p = z.log_softmax(-1)
                    sums[name]["entropy"] -= (log_p.exp() * log_p).sum().item()
        if not places:
            raise InputError(f"--langs {lang}: no token of its questions tells it from {contrary}")
        for name, found in sums.items():
            for metric, total in found.items():
                table[name][metric, lang] = total / places
        table["text"]["places", lang] = places
    return table


@torch.no_grad()
def all_views(cfg: Config, model, decoders, ids: torch.Tensor, spans):
    """Yields (name, logits or scores [1, T, V]) of every view, of SL with every span, of DoLa."""
    expert = None
    for name, logits in views(model, ids, spans):
        yield name, logits
        if name == "expert":
            expert = logits
        elif expert is not None:
            yield f"sl {name}", contrast(expert, logits, cfg.alpha, cfg.beta)
    for name, decoder in decoders.items():
        yield name, decoder(ids).logits


# --- claims


class Found:
    """What a run measured: its languages, depth, and amateurs, told by asking for their names."""

    def __init__(self, view: View):
        self.view = view
        rows = view.metrics
        expert = rows.get("expert", {})
        self.languages = [lang for lang in MGSM if key(("own", lang)) in expert and lang != "en"]
        self.L = next((i for i in range(1000) if f"h{i}" not in rows), 0)
        self.lower = [f"h{i}" for i in range(1, max(2, self.L // 2 + 1))]
        spans = amateur_spans(self.L) if self.L else []
        self.middle = [f"[{m},{n})" for m, n in spans if n <= self.L // 2 + 2]
        self.last = "[{},{})".format(*spans[-1]) if spans else ""

    def mean(self, names: Sequence[str], metric: str, label: str) -> PerSeed:
        cells = [self.view(name, (metric, lang)) for name in names for lang in self.languages]
        return average(cells, label)


def analyzed(rule):
    """A rule about layers, which only --stage analyze measures."""

    def judged(view: View) -> Verdict:
        found = Found(view)
        if not found.languages:
            return untestable("layers were not asked: --stage analyze with a language beside en")
        return rule(found)

    judged.__name__ = rule.__name__
    judged.__doc__ = rule.__doc__
    return judged


@analyzed
def early_exits_do_not_speak_the_language_of_the_text(found: Found) -> Verdict:
    """Exits of the lower half: tokens of the text's language less often than the whole model, by
    more than 0.3 (means over exits and languages)."""
    whole = found.mean(["expert"], "own", "expert own")
    english = found.mean(found.lower, "base", "exits: English")
    exits = found.mean(found.lower, "own", "exits own")
    return all_of([above(whole - exits, 0.3), fact(True, f"{exits}; {english}")])


@analyzed
def the_amateur_speaks_the_right_language(found: Found) -> Verdict:
    """Without an eighth of the blocks of the lower half the share of own tokens is within 0.05 of
    the whole model's (mean over spans and languages), without the last ones below by 0.2."""
    whole = found.mean(["expert"], "own", "expert own")
    middle = found.mean(found.middle, "own", "amateurs own")
    last = found.mean([found.last], "own", f"{found.last} own")
    return all_of([within(middle - whole, 0.05), above(whole - last, 0.2)])


@analyzed
def the_amateur_predicts_worse(found: Found) -> Verdict:
    """The same amateurs: the next token itself less often right than the whole model's first
    choice, by more than 0.01."""
    whole = found.mean(["expert"], "right", "expert right")
    return above(whole - found.mean(found.middle, "right", "amateurs right"), 0.01)


@analyzed
def DoLa_harms(found: Found) -> Verdict:
    """The next token less often right than greedy decoding's, in both lenses."""
    greedy = found.mean(["expert"], "right", "greedy")
    return all_of(above(greedy - found.mean([x], "right", x)) for x in ("dola", "dola norm"))


@analyzed
def skipping_beats_early_exits(found: Found) -> Verdict:
    """SL (mean over its spans) more often right than DoLa in both lenses, and than the early exit
    in SL's own form."""
    ours = found.mean([f"sl {span}" for span in found.middle], "right", "SL")
    rivals = ("dola", "dola norm", "mild exit")
    return all_of(above(ours - found.mean([x], "right", x)) for x in rivals)


@analyzed
def skipping_beats_greedy_decoding(found: Found) -> Verdict:
    """SL (mean over its spans) more often right than greedy decoding."""
    ours = found.mean([f"sl {span}" for span in found.middle], "right", "SL")
    return above(ours - found.mean(["expert"], "right", "greedy"))


def skipping_answers_better_than_DoLa(view: View) -> Verdict:
    """Accuracy above DoLa's, where greedy decoding solves 5% or more."""
    if "greedy" not in view or view.mean("greedy", "acc") < 0.05:
        return untestable("greedy decoding solves fewer than 5%, or did not run")
    ours = [name for name in ("sl-h", "sl-d", "skip") if name in view]
    dolas = [name for name in ("dola", "dola-static") if name in view]
    if not ours or not dolas:
        return untestable("there are no two decodings to compare")
    return all_of(above(view(a, "acc") - view(b, "acc")) for a in ours for b in dolas)


def a_token_costs_2L_minus_n_block_evaluations(view: View) -> Verdict:
    """Over greedy's L, counted in the caches: equal to (2L - n)/L."""
    skipping = [name for name in ("sl-h", "sl-d", "skip") if name in view]
    if not skipping:
        return untestable("no decoding that skips was run")
    counts = [(view.mean(name, "blocks"), view.mean(name, "formula")) for name in skipping]
    shown = ", ".join(f"{name} {blocks:.3f}" for name, (blocks, _) in zip(skipping, counts))
    return fact(all(abs(a - b) < 1e-9 for a, b in counts), shown)


CLAIMS = [
    Claim("C1", early_exits_do_not_speak_the_language_of_the_text, "more", paper="they do not"),
    Claim("C2", the_amateur_speaks_the_right_language, "equal", paper="it does"),
    Claim("C3", DoLa_harms, "more", paper="outside English it does"),
    Claim("C4", skipping_beats_early_exits, "more", paper="it beats DoLa"),
    Claim("C4a", skipping_answers_better_than_DoLa, "more", paper="on mGSM, 11 languages"),
    Claim("C5", skipping_beats_greedy_decoding, "more", paper="on average it does"),
    Claim("C6", the_amateur_predicts_worse, "more", paper="it reasons worse"),
    Claim("C7", a_token_costs_2L_minus_n_block_evaluations, "equal"),
]


def claims(metrics: dict) -> list[dict]:
    return judge(CLAIMS, metrics)


# --- figure, main


def figure(results: dict):
    """Per language: which tokens each exit and each amateur prefers. Of a run of answers: blocks
    and, if measured, time of a token."""
    view = View(results["metrics"])
    found = Found(view)
    panels = max(1, len(found.languages))
    fig, axes = new_figure(1, panels, width=5.5 * max(2, panels))
    if not found.languages:
        draw_cost(axes, view)
        return fig
    exits = [*(f"h{i}" for i in range(found.L)), "expert"]
    axes = axes if len(found.languages) > 1 else [axes]
    for ax, lang in zip(axes, found.languages):
        for color, metric, label in (
            (COLORS[0], "own", f"tokens of {lang}"),
            (COLORS[1], "base", "English tokens"),
            (COLORS[2], "right", "the next token itself"),
        ):
            shares = [view.mean(name, (metric, lang)) for name in exits]
            ax.plot(range(found.L + 1), shares, color=color, label=label)
            for m, n in amateur_spans(found.L):
                share = view.mean(f"[{m},{n})", (metric, lang))
                ax.plot([m, n], [share, share], color=color, linewidth=4, alpha=0.5)
        ax.set(xlabel="early exit (line) / blocks skipped (bars)", ylabel="share of places")
        ax.set(title=f"A text in {lang}", ylim=(-0.03, 1))
        ax.legend()
    return fig


def draw_cost(ax, view: View) -> None:
    names = list(view.metrics)
    for label, style in (("time", "o"), ("blocks", "D")):
        for y, name in enumerate(names):
            if label in view.metrics[name]:
                ax.plot(view.mean(name, label), y, style, color=COLORS[label == "time"])
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="a token's cost, greedy = 1", xlim=(0, None), title="Blocks (and time)")


def check_flags(cfg: Config) -> None:
    check_range(cfg, "limit num_shots max_new_tokens", least=0)
    check_range(cfg, "limit max_new_tokens", least=1)
    check_range(cfg, "alpha", above=0, most=1)
    check_range(cfg, "beta min_start", least=0)
    check_range(cfg, "repetition_penalty", least=1)
    if not cfg.langs or not cfg.decoding:
        raise InputError("--langs and --decoding need at least one value each")
    if cfg.prompt is not None and not cfg.prompt:
        raise InputError("--prompt is empty: give the text to continue")
    if cfg.prompt is None and cfg.data is None:
        raise InputError(
            "--data is missing: give the task's file "
            "(for mgsm: the folder with mgsm_en.tsv and its siblings), or --prompt"
        )
    if cfg.prompt is not None:
        check_unused(cfg, "data shots num_shots limit stage timing", "with --prompt")
    if cfg.stage == "analyze":
        check_unused(cfg, "shots num_shots decoding amateur skip timing", "with --stage analyze")
        if cfg.task != "mgsm":
            raise InputError("--stage analyze reads the questions of --task mgsm")
    if "cd" in cfg.decoding and cfg.amateur is None:
        raise InputError("--decoding cd needs a second, weaker model: give --amateur DIR")
    if "skip" in cfg.decoding and cfg.skip is None:
        raise InputError("--decoding skip needs the blocks to skip: give --skip M N")
    if "dola-static" in cfg.decoding and len(cfg.exits) != 1:
        raise InputError(
            f"--decoding dola-static has one early exit, --exits gives {len(cfg.exits)}: "
            "give for example --exits 2"
        )


def continue_prompt(cfg: Config) -> dict[str, str]:
    loaded = load(cfg)
    texts = {}
    for name in cfg.decoding:
        decoder = make_decoder(cfg, name, loaded, cfg.prompt, random.Random(cfg.seed))
        texts[name] = complete(decoder, loaded, cfg.prompt, cfg.max_new_tokens)
        skipped = " skips [{},{})".format(*decoder.span) if hasattr(decoder, "span") else ""
        print(f"\n{name}{skipped}: {cfg.prompt}{texts[name]}")
    return texts


def main(cfg: Config) -> dict:
    started = time.time()
    check_flags(cfg)
    folder = Path(cfg.out) if cfg.out else ROOT / "runs" / "skip_layer_cd"
    if cfg.prompt is not None:
        return continue_prompt(cfg)
    if cfg.stage == "score":
        table = score(cfg.data)
        for name, row in table.items():
            print(f"{name}: " + ", ".join(f"{lang} {value:.3f}" for lang, value in row.items()))
        return table
    if cfg.stage == "analyze":
        table = analyze(cfg, load(cfg))
        columns = [key((m, lang)) for lang in cfg.langs for m in ("own", "base", "right")]
    else:
        items = read_task(cfg)
        table = run(cfg, load(cfg), items, folder)
        columns = ["acc", "blocks", "formula", "time", "ms for the prompt", "tokens per s"]
    path = folder / "skip_layer_cd_real"
    results = save_results(
        __file__, PAPER, cfg, [Outcome(table, {})], claims, figure, started, [cfg.seed], path
    )
    print_metrics(results["metrics"], columns)
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
