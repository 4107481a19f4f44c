"""Question alignment and proxy-tuning on your own checkpoint and data. The methods are
methods/question_alignment.py and methods/proxy_tuning.py.

Run     python methods/real/question_alignment.py --checkpoint DIR --stage1 gsm_questions \
            --stage2 train.jsonl --eval mgsm --langs de sw --save models
                        # base, RAlign, QAlign -> RAlign from one checkpoint, all measured
        python methods/real/question_alignment.py --checkpoint models/qalign --stage 2 \
            --stage2 train.jsonl --save models
        python methods/real/question_alignment.py --checkpoint BIG --stage proxy \
            --expert models/qalign-ralign --anti DIR --eval mgsm

        --stage1   pairs: a folder of {l}-en/train.{l} and {l}-en/train.en, line by line; or JSON
                   Lines {"lang", "src", "tgt"}
        --stage2   English responses, JSON Lines or a JSON list: query, question or instruction;
                   response, answer or output
        --eval     a folder with one file per language (mgsm_de.tsv; de.json, test_de.jsonl, ... in
                   JSON Lines), for --task
                   mgsm    question<TAB>answer, or {"query", "response"}
                   msvamp  {"m_query", "response"}: m_query is what is asked
                   pot     as mgsm, answered by a program. Nothing is executed: arithmetic, names
                           and print are read from the syntax tree; an answer with an import, a
                           condition, a loop, a function or a list counts as wrong
                   xcsqa   {"question": {"stem", "choices"}, "answerKey"}: the first A-E that stands
                           alone
Paper   the defaults: LLaMA-2, all weights, 3 epochs, lr 2e-5, batch 128, 512 tokens:
        torchrun --nproc-per-node 8 methods/real/question_alignment.py --fsdp --dtype bfloat16 \
            --activation-checkpointing --checkpoint LLaMA-2-7B ...
        One model at a time. On one device it takes 16.5 bytes a weight (measured from 4M to 38M
        weights, all four arms; weights, gradients and AdamW in float32 are 16), so 116 GB for 7B,
        and activations; the run prints its peak. torchrun splits the batch and the questions over
        the processes; with --fsdp each holds a share (of 8: 14 GB for 7B), and while it answers
        all weights beside it (28 GB). --lora-rank R trains a low-rank difference instead: OUR
        addition, for smaller machines.
Shown   results/question_alignment_real.json (with its command): the path alone, on a model of 0.2M
        weights that does not reason: no claim is tested. Files as published: gsm_questions of
        github NJUNLP/QAlign, GSM8K's train.jsonl, mGSM. The model was made in half a minute by
          python train.py --data base --out out/base --layers 2 --width 64 --heads 4 \
              --vocab-size 1024 --block 512 --batch 4 --steps 200 --lr 0.003
        from gsm_questions' train.de, .sw, .zh and .en.
Honest  - Scored as published: the last number, without its sign and thousands commas. A response
          without a number is wrong (there: 0); one that reaches --max-new-tokens or the end of the
          context is scored as it stands, and counted (cut).
        - Instruction and response are tokenised together, as published: "### Response:" and the
          response's first letter may be one piece. A row in which the instruction's own pieces are
          other ones in front of a response is counted.
        - The loss is the mean over the batch's response tokens; the authors' trainer takes the mean
          of each two rows, and then the mean of those.
        - GSM8K's train.jsonl holds calculator marks (<<48/2=24>>): they are learned as they stand.
        - Languages with a script of their own have a measured response language, Latin-script ones
          do not.
        - Intervals are over problems of one checkpoint, which decides nothing about others: every
          claim is undecided at best.
"""

import json
import re
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import torch
from torch import nn

from methods.experiments.question_alignment import PAPER
from methods.proxy_tuning import ProxyTuned
from methods.question_alignment import alignment_score
from methods.question_alignment_tasks import run_program
from minilm import InputError
from minilm.claims import (
    UNDECIDED,
    Claim,
    Verdict,
    View,
    judge,
    key,
    paired_bootstrap,
    print_claims,
)
from minilm.data import IGNORE, batches, generator, pad, prompt_masked, read_text
from minilm.evaluate import last_number, masked_mean
from minilm.generate import context_length, generate, stop_ids
from minilm.lora import add_lora, merge_lora
from minilm.ops import linear_cross_entropy
from minilm.results import (
    COLORS,
    ROOT,
    Outcome,
    bar_seeds,
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
from minilm.training import (
    autocast,
    my_parts,
    join,
    make_optimizers,
    place,
    schedule,
    set_lr,
    share_out,
    together,
    update,
)
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained

NAMES = {
    "bn": "Bengali",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "ja": "Japanese",
    "ru": "Russian",
    "sw": "Swahili",
    "te": "Telugu",
    "th": "Thai",
    "zh": "Chinese",
    "ar": "Arabic",
    "hi": "Hindi",
    "it": "Italian",
    "vi": "Vietnamese",
}
SCRIPTS = {  # languages whose responses can be told by their letters: what Unicode calls these
    "bn": ("BENGALI",),
    "ja": ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"),
    "ru": ("CYRILLIC",),
    "te": ("TELUGU",),
    "th": ("THAI",),
    "zh": ("CJK",),
    "ar": ("ARABIC",),
    "hi": ("DEVANAGARI",),
}
TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
NEW_TOKENS = {"msvamp": 300}  # the published limits; of the other tasks 600
R, Q = "ralign", "qalign->ralign"


@dataclass(frozen=True)
class Config:
    checkpoint: str  # Hugging Face folder with a tokenizer: the untuned model, or for --stage 2
    # what stage I saved
    stage1: str | None = None  # question pairs
    stage2: str | None = None  # English questions and responses
    eval: str | None = None  # test questions in every language
    task: Literal["mgsm", "msvamp", "xcsqa", "pot"] = "mgsm"  # how they are read and scored
    langs: tuple[str, ...] = ("bn", "de", "es", "fr", "ja", "ru", "sw", "th", "zh")  # languages
    # beside English: stage I takes those it has
    stage: Literal["all", "1", "2", "eval", "proxy"] = "all"  # what to do: base, RAlign and
    # QAlign -> RAlign; one stage; measure only; measure a model tuned by proxy
    expert: str | None = None  # proxy: the small tuned model
    anti: str | None = None  # proxy: the small model before tuning
    alpha: float = 1.0  # proxy: strength
    epochs: float = 3.0  # passes over each stage's data
    lr: float = 2e-5  # peak learning rate of both stages
    batch: int = 128  # examples per step
    micro_batch: int = 8  # examples at once
    max_len: int = 512  # tokens per example; what is longer is cut, and dropped when nothing of its
    # response is left
    limit: int | None = None  # pairs per language, and responses, to train on
    eval_limit: int | None = None  # test questions per language
    eval_batch: int = 32  # questions answered at once
    max_new_tokens: int | None = None  # of a response (default: 600, msvamp 300)
    lora_rank: int | None = None  # train a low-rank difference instead of all weights
    seeds: tuple[int, ...] = (0,)  # order of the examples
    activation_checkpointing: bool = False  # recompute layers in the backward pass: less memory
    fsdp: bool = False  # torchrun: each process holds a share of the weights (FSDP2), not all (DDP)
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: matrix products, what is saved
    device: str = "auto"  # auto (cuda, else cpu), cpu, cuda, mps
    workers: int | None = None  # seeds at a time (default: one per core)
    save: str | None = None  # folder for the trained checkpoints (default: none is kept)
    out: str | None = None  # folder for the results (default: runs/question_alignment_real)


# --- data

Item = tuple[str, float | str]  # question, gold


class Data(NamedTuple):
    pairs: list[tuple[str, str]]  # stage I: instruction, English question
    responses: list[tuple[str, str]]  # stage II: question, response
    tests: dict[str, list[Item]]


def read_data(cfg: Config) -> Data:
    """All files that the stage needs, before anything large is loaded."""
    languages = ("en", *cfg.langs)
    tests = {language: read_test(cfg, language) for language in languages} if cfg.eval else {}
    pairs = read_pairs(cfg) if cfg.stage in ("all", "1") else []
    responses = read_responses(cfg) if cfg.stage in ("all", "2") else []
    return Data(pairs, responses, tests)


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(row number, object) of a JSON Lines file or of a JSON list."""
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise InputError(
            f"{path} is not JSON Lines, nor a JSON list ({error}): mend or convert it"
        ) from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number}: an object is needed")
    return enumerate(rows, 1)


def field(path: Path, number: int, row: dict, *names: str) -> str:
    """The first of the names that the row has, as text that is not empty."""
    present = [row[name] for name in names if row.get(name) is not None]
    value = str(present[0]).strip() if present else ""
    if not value:
        has = ", ".join(row) or "nothing"
        raise InputError(
            f"{path}, row {number}: {' or '.join(names)} is missing or empty; it has {has}"
        )
    return value


def read_pairs(cfg: Config) -> list[tuple[str, str]]:
    path = Path(cfg.stage1)
    if path.is_file():
        found = pairs_of_file(path)
    elif path.is_dir():
        found = pairs_of_folder(path, cfg.langs)
    else:
        raise FileNotFoundError(
            f"--stage1 {path}: no such file or folder; give JSON Lines, or a folder of "
            "de-en/train.de and .en"
        )
    wanted = {language: rows[: cfg.limit] for language, rows in found.items()}
    wanted = {language: rows for language, rows in wanted.items() if language in cfg.langs}
    if not any(wanted.values()):
        languages = ", ".join(cfg.langs)
        raise InputError(f"--stage1 {path} holds no pairs in {languages}: give --langs that it has")
    counts = ", ".join(f"{NAMES[language]} {len(rows)}" for language, rows in wanted.items())
    print(f"stage I: {counts} pairs")
    pairs = []
    for language, rows in wanted.items():
        ask = f"Translate the following sentences from {NAMES[language]} to English."
        pairs += [(f"{ask} {source}", target) for source, target in rows]
    return pairs


def pairs_of_file(path: Path) -> dict[str, list[tuple[str, str]]]:
    found = {}
    for number, row in read_rows(path):
        language = field(path, number, row, "lang")
        if language not in NAMES or language == "en":
            known = ", ".join(NAMES)
            raise InputError(
                f"{path}, row {number}: lang {language!r} must be one of {known}, other than en"
            )
        pair = (field(path, number, row, "src"), field(path, number, row, "tgt"))
        found.setdefault(language, []).append(pair)
    return found


def pairs_of_folder(path: Path, languages: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    found = {}
    for language in languages:
        folder = path / f"{language}-en"
        if not folder.is_dir():
            continue
        files = [folder / f"train.{side}" for side in (language, "en")]
        own, english = (read_text(file).rstrip("\n").split("\n") for file in files)
        if len(own) != len(english):
            raise InputError(
                f"{folder}: train.{language} has {len(own)} lines, train.en {len(english)}: they "
                "must match"
            )
        pairs = [(x.strip(), y.strip()) for x, y in zip(own, english)]
        found[language] = [pair for pair in pairs if all(pair)]  # blank lines are left out
    return found


def read_responses(cfg: Config) -> list[tuple[str, str]]:
    path = Path(cfg.stage2)
    rows = []
    for number, row in read_rows(path):
        question = field(path, number, row, "query", "question", "instruction")
        rows.append((question, field(path, number, row, "response", "answer", "output")))
    return rows[: cfg.limit]


def read_test(cfg: Config, language: str) -> list[Item]:
    """(question, gold) of one language."""
    folder = Path(cfg.eval)
    found = []
    for file in sorted(folder.glob("*")):
        named = re.split(r"[._-]", file.stem)[-1] == language
        if named and file.suffix in (".tsv", ".json", ".jsonl"):
            found.append(file)
    if len(found) != 1:
        raise FileNotFoundError(
            f"--eval {folder} needs one file for {language} (such as {cfg.task}_{language}.tsv), "
            f"it has {len(found)}"
        )
    path = found[0]
    rows = rows_of_tsv(path) if path.suffix == ".tsv" else read_rows(path)
    read = read_choice if cfg.task == "xcsqa" else read_number
    items = [read(cfg, path, number, row) for number, row in rows]
    if not items:
        raise InputError(f"{path} holds no question")
    return items[: cfg.eval_limit]


def rows_of_tsv(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(read_text(path).rstrip("\n").split("\n"), 1):
        if line.count("\t") != 1:
            raise InputError(
                f"{path}, line {number}: one tab is needed, between question and answer"
            )
        question, answer = line.split("\t")
        yield number, {"query": question, "response": answer}


def read_choice(cfg: Config, path: Path, number: int, row: dict) -> Item:
    try:
        asked = row["question"]
        choices = asked["choices"]
        if isinstance(choices, dict):  # a list of labels and one of texts, or a list of both
            pairs = list(zip(choices["label"], choices["text"]))
        else:
            pairs = [(choice["label"], choice["text"]) for choice in choices]
        lines = [asked["stem"], *(f"({label}) {text}" for label, text in pairs)]
    except (KeyError, TypeError):
        raise InputError(
            f"{path}, row {number}: a question with stem and choices (label, text) is needed"
        ) from None
    return "\n".join(lines), field(path, number, row, "answerKey")


def read_number(cfg: Config, path: Path, number: int, row: dict) -> Item:
    gold = last_number(field(path, number, row, "response", "answer"))
    if gold is None:
        raise InputError(f"{path}, row {number}: the answer holds no number")
    names = ["m_query"] if cfg.task == "msvamp" else ["query", "question"]
    return field(path, number, row, *names), float(gold)


# --- train


def encode_prompt(tokenizer, instruction: str) -> list[int]:
    return tokenizer.encode(TEMPLATE.format(instruction=instruction), bos=tokenizer.add_bos)


class Row(NamedTuple):
    prompt: list[int]
    response: list[int]  # its end included
    prefix: bool  # are the instruction's own ids the row's first ones?


def encode(tokenizer, instruction: str, response: str) -> Row:
    """Both together, cut where the instruction alone ends: the response follows the colon, and what
    is read there may be another piece than at the start of a text ("A", not "_A")."""
    prompt = encode_prompt(tokenizer, instruction)
    text = TEMPLATE.format(instruction=instruction) + response
    ids = [*tokenizer.encode(text, bos=tokenizer.add_bos), tokenizer.eos_id]
    n = len(prompt)
    return Row(ids[:n], ids[n:], ids[:n] == prompt)


def make_examples(cfg: Config, tokenizer, rows, stage: str, room: int) -> list[tuple]:
    """(prompt, response) of at most `room` tokens; prints how many were cut or dropped."""
    encoded = [encode(tokenizer, *row) for row in rows]
    pairs = [(row.prompt, row.response[: max(0, room - len(row.prompt))]) for row in encoded]
    examples = [(prompt, response) for prompt, response in pairs if response]
    dropped = len(pairs) - len(examples)
    cut = sum(response[-1] != tokenizer.eos_id for _, response in examples)
    print(f"{stage}: {len(examples)} examples; {dropped} dropped, {cut} cut at {room} tokens")
    if shifted := sum(not row.prefix for row in encoded):
        print(f"{stage}: in {shifted} rows the response changes the pieces of its instruction")
    if not examples:
        raise InputError(f"{stage}: no response fits into --max-len {cfg.max_len}: raise it")
    return examples


def response_loss(model: Transformer, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of -log p over the labels that count, in nats."""
    return linear_cross_entropy(model.hidden(inputs), model.lm_head.weight, labels, IGNORE)


def train(cfg: Config, model: Transformer, tokenizer, rows, stage: str, seed: int) -> Transformer:
    """One stage, in place: a new optimizer, a cosine to 0, the loss a mean over the batch's
    response tokens."""
    room = min(cfg.max_len, context_length(model))
    examples = make_examples(cfg, tokenizer, rows, stage, room)
    device = model.embed.weight.device
    if cfg.lora_rank:
        add_lora(model, rank=cfg.lora_rank, alpha=2 * cfg.lora_rank)
    model.activation_checkpointing = cfg.activation_checkpointing
    steps = max(1, round(cfg.epochs * len(examples) / cfg.batch))
    warmup = round(0.03 * steps)
    optimizers = make_optimizers(model, "adamw", cfg.lr, weight_decay=0.0)
    step_loss = together(response_loss, model)
    model.train()
    order = batches(len(examples), cfg.batch, generator(seed, stage), steps)
    for step, chosen in enumerate(progress(order, stage, steps)):
        set_lr(optimizers, schedule(step, steps, "cosine", warmup=warmup, final=0.0))
        total = sum(len(examples[i][1]) for i in chosen.tolist())
        for micro, weight in my_parts(chosen.tolist(), cfg.micro_batch):
            inputs, labels = prompt_masked([examples[i] for i in micro])
            inputs, labels = inputs.to(device), labels.to(device)
            with autocast(device, cfg.dtype):
                loss = step_loss(inputs, labels)
            (loss * (labels != IGNORE).sum() / total * weight).backward()
        update(model, optimizers)
    if cfg.lora_rank:
        merge_lora(model, keep=False)
    return model.eval()


# --- evaluate


def parse(task: str, text: str) -> float | str | None:
    """What a response answers: its last number, the number that its program shows, or its first
    choice letter."""
    if task == "xcsqa":
        letters = re.findall(r"(?<![A-Za-z])[A-E](?![A-Za-z])", text)
        return letters[0] if letters else None
    if task == "pot":
        fences = r"(?s)<llm-code>(.*?)(?:</llm-code>|$)|```(?:python)?\n(.*?)(?:```|$)"
        code = re.search(fences, text)
        value = run_program((code[1] or code[2] or "").strip() if code else text.strip())
        return None if value is None else abs(value)
    found = last_number(text)
    return None if found is None else float(found)


def right(answer: float | str | None, gold: float | str) -> bool:
    if isinstance(gold, str):
        return answer == gold
    return answer is not None and abs(answer - gold) < 1e-3


def own_script(text: str, language: str) -> bool | None:
    """Are most letters of the response in the language's own script? None for languages that share
    theirs."""
    if language not in SCRIPTS:
        return None
    kinds = Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    own = [*SCRIPTS[language]]
    if language == "ja" and any(kinds[kind] for kind in own):
        own.append("CJK")  # kanji, if any kana stands beside them: without, it is Chinese
    return sum(kinds[kind] for kind in own) > sum(kinds.values()) / 2


@torch.no_grad()
def question_vectors(cfg: Config, model: Transformer, prompts: Sequence) -> torch.Tensor:
    """[L + 1, n, D] float32: each layer's mean state over the real tokens of a templated question
    (the official script divides by the padded length)."""
    device = model.embed.weight.device

    def read(mine: Sequence) -> torch.Tensor:
        parts = []
        for k in range(0, len(mine), cfg.micro_batch):
            ids, mask = (x.to(device) for x in pad(mine[k : k + cfg.micro_batch]))
            states = model(ids, output_hidden_states=True).hidden_states
            parts.append(torch.stack([masked_mean(h.float(), mask).cpu() for h in states]))
        return torch.cat(parts, 1).transpose(0, 1)  # (n, L + 1, D)

    return torch.stack(share_out(model, prompts, read), 1)


class Said(NamedTuple):
    texts: list[str]
    cut: list[bool]  # ended by --max-new-tokens or by the context, not by the model


def respond(cfg: Config, model, tokenizer, prompts: Sequence[list[int]], name: str) -> Said:
    """Greedy responses; questions of like length are one batch, for less padding."""
    device = next(model.parameters()).device
    large = model.model if isinstance(model, ProxyTuned) else model
    stops = stop_ids(large, tokenizer)  # its folder says where an answer ends
    longest = cfg.max_new_tokens or NEW_TOKENS.get(cfg.task, 600)

    def answer(mine: Sequence[list[int]]) -> list[tuple[str, bool]]:
        said = [("", False)] * len(mine)

        def length(i: int) -> int:
            return len(mine[i])

        order = sorted(range(len(mine)), key=length)
        for k in progress(range(0, len(order), cfg.eval_batch), name):
            chosen = order[k : k + cfg.eval_batch]
            with autocast(device, cfg.dtype):
                outs = generate(model, [mine[i] for i in chosen], longest, eos_id=stops)
            for i, out in zip(chosen, outs):
                text = tokenizer.decode(out[len(mine[i]) :], skip_special=True)
                said[i] = (text, out[-1] not in stops)
        return said

    texts, cut = zip(*share_out(model, prompts, answer))
    return Said(list(texts), list(cut))


class Evaluated(NamedTuple):
    metrics: dict
    series: dict
    right: dict[str, list[bool]]  # language -> of every problem
    agrees: dict[str, list[bool]]  # language -> of every problem: the answer is the English one


def evaluate(cfg: Config, model, tokenizer, tests: dict, answering: bool = True) -> Evaluated:
    """Answers in every language, and how the languages' questions agree inside the model."""
    found = Evaluated({}, {}, {}, {})
    prompts = {}
    for language, items in tests.items():
        prompts[language] = [encode_prompt(tokenizer, question) for question, _ in items]
    if answering:
        score_answers(cfg, model, tokenizer, tests, prompts, found)
    if isinstance(model, Transformer):
        score_alignment(cfg, model, prompts, found)
    others = [language for language in tests if language != "en"]
    for name in ("acc", "agreement", "alignment"):
        if (name, others[0]) in found.metrics:
            own = [found.metrics[name, language] for language in others]
            found.metrics[name, "non-en"] = fmean(own)
    if answering:
        found.metrics["average"] = fmean(found.metrics["acc", language] for language in tests)
    return found


def score_answers(cfg: Config, model, tokenizer, tests, prompts, found: Evaluated) -> None:
    english = []
    for language, items in tests.items():  # English comes first
        said = respond(cfg, model, tokenizer, prompts[language], f"answers {language}")
        answers = [parse(cfg.task, text) for text in said.texts]
        if language == "en":
            english = answers
        else:
            both = zip(answers, english)
            found.agrees[language] = [a is not None and a == b for a, b in both]
            found.metrics["agreement", language] = fmean(found.agrees[language])
        hits = [right(answer, gold) for answer, (_, gold) in zip(answers, items)]
        found.right[language] = hits
        found.metrics["acc", language] = fmean(hits)
        found.metrics["answered", language] = fmean(answer is not None for answer in answers)
        found.metrics["cut", language] = fmean(said.cut)
        if any(said.cut):
            n = len(items)
            print(f"{NAMES[language]}: {sum(said.cut)} of {n} responses were cut before their end")
        if language in SCRIPTS:
            own = [own_script(text, language) for text in said.texts]
            found.metrics["consistency", language] = fmean(own)


def score_alignment(cfg: Config, model: Transformer, prompts: dict, found: Evaluated) -> None:
    english = question_vectors(cfg, model, prompts["en"])
    for language in prompts:
        if language == "en":
            continue
        other = question_vectors(cfg, model, prompts[language])
        n = min(english.shape[1], other.shape[1])
        scores = alignment_score(english[:, :n], other[:, :n]).tolist()
        found.metrics["alignment", language] = scores[len(model.layers) // 2]
        found.series["alignment", language] = (range(len(scores)), scores)


def leads(ours: Evaluated, theirs: Evaluated) -> dict:
    """What one arm has more than another, of the same problems: mean, and the ends of the 95%
    interval over problems (a problem counts once, with the mean over its languages)."""
    found = {}
    for name in ("acc", "agreement"):
        mine, other = (one.right if name == "acc" else one.agrees for one in (ours, theirs))
        groups = {"non-en": [language for language in mine if language != "en"]}
        if name == "acc":
            groups["en"] = ["en"]
        for group, languages in groups.items():
            a = per_problem(mine, languages)
            b = per_problem(other, languages)
            numbers = paired_bootstrap(a, b)
            found |= {("lead", name, group, at): x for at, x in zip(("", "low", "high"), numbers)}
    found["problems"] = len(a)
    return found


def per_problem(hits: dict[str, list[bool]], languages: Sequence[str]) -> list[float]:
    """The files tell the same problems in the same order; of unequal ones, those that all have."""
    return [fmean(row) for row in zip(*(hits[language] for language in languages))]


# --- one seed


def load(cfg: Config, folder: str, flag: str):
    device = join(cfg)
    model, tokenizer = load_pretrained(folder, device="meta" if cfg.fsdp else device)
    if tokenizer is None or tokenizer.eos_id is None:
        raise InputError(f"{flag} {folder} has no tokenizer.json with an end-of-text token")
    if cfg.fsdp and cfg.lora_rank:  # before the model is sharded (see add_lora)
        add_lora(model, cfg.lora_rank, 2 * cfg.lora_rank, generator=generator(0, "lora"))
    return place(model, device, cfg.fsdp).eval(), tokenizer


def check_vocabularies(first, second, folder: str) -> None:
    """Two tokenizers must agree on every id that both have."""
    one, two = ({i: text for text, i in {**t.vocab, **t.added}.items()} for t in (first, second))
    if differ := [i for i in one.keys() & two.keys() if one[i] != two[i]]:
        i = differ[0]
        raise InputError(f"{folder} has another vocabulary: id {i} is {two[i]!r}, not {one[i]!r}")


def check_questions(cfg: Config, model, tokenizer, tests: dict) -> None:
    """Every question must leave room for an answer."""
    context = context_length(model)
    for language, items in tests.items():
        longest = max(len(encode_prompt(tokenizer, question)) for question, _ in items)
        if context is not None and longest >= context:
            raise InputError(
                f"--eval: a question in {NAMES[language]} takes {longest} tokens, the model reads "
                f"{context}: leave the language out of --langs"
            )


def arms(cfg: Config, data: Data, seed: int) -> Iterator[tuple[str, nn.Module, object]]:
    """(name, model, tokenizer) one after the other. A model is tuned in place and the checkpoint
    read again where it is needed again, so that never two are in memory."""
    model, tokenizer = load(cfg, cfg.checkpoint, "--checkpoint")
    check_questions(cfg, model, tokenizer, data.tests)
    if cfg.stage == "eval":
        yield "checkpoint", model, tokenizer
    elif cfg.stage == "proxy":
        small = []
        for flag, folder in (("--expert", cfg.expert), ("--anti", cfg.anti)):
            other, own = load(cfg, folder, flag)
            check_vocabularies(tokenizer, own, folder)
            check_questions(cfg, other, tokenizer, data.tests)
            small.append(other)
        yield "untuned", model, tokenizer
        yield "expert", small[0], tokenizer
        yield f"proxy {cfg.alpha:g}", ProxyTuned(model, *small, cfg.alpha).eval(), tokenizer
    elif cfg.stage == "1":
        yield "qalign", train(cfg, model, tokenizer, data.pairs, "stage I", seed), tokenizer
    elif cfg.stage == "2":
        yield "stage II", train(cfg, model, tokenizer, data.responses, "stage II", seed), tokenizer
    else:
        yield "untuned", model, tokenizer
        yield R, train(cfg, model, tokenizer, data.responses, "stage II", seed), tokenizer
        del model
        model, _ = load(cfg, cfg.checkpoint, "--checkpoint")
        yield "qalign", train(cfg, model, tokenizer, data.pairs, "stage I", seed), tokenizer
        yield Q, train(cfg, model, tokenizer, data.responses, "stage II", seed), tokenizer


def run(cfg: Config, seed: int) -> Outcome:
    data = read_data(cfg)
    outcome = Outcome({}, {})
    compared = {}
    weights = 0
    for name, model, tokenizer in arms(cfg, data, seed):
        weights = max(weights, sum(p.numel() for p in model.parameters()))
        trained = cfg.stage in ("all", "1", "2") and name != "untuned"
        if cfg.save and trained:
            save(cfg, model, tokenizer, name, seed)
        if data.tests:
            found = evaluate(cfg, model, tokenizer, data.tests, answering=name != "qalign")
            outcome.metrics[name] = found.metrics
            outcome.series[name] = found.series
            compared[name] = found
        device = next(model.parameters()).device
        del model  # before the next one is read
    if R in compared and Q in compared:
        outcome.metrics[Q] |= leads(compared[Q], compared[R])
    if peak := peak_memory(device):
        print(f"peak memory {peak / 2**30:.2f} GiB, {peak / weights:.0f} bytes a weight")
    return outcome


def save(cfg: Config, model: Transformer, tokenizer, name: str, seed: int) -> None:
    """In --dtype; the model itself stays as it is."""
    folder = name.replace("->", "-").replace(" ", "-")
    if len(cfg.seeds) > 1:
        folder += f"-seed-{seed}"
    dtype = getattr(torch, cfg.dtype)
    save_pretrained(model, Path(cfg.save) / folder, tokenizer, dtype=dtype)


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of the device, or (on the CPU, where the system tells) of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- claims: one checkpoint decides nothing about others, so each is undecided at best


def english_is_answered(view: View) -> str:
    """What answers fewer than a tenth of the English questions has nothing to carry over."""
    worst = min(min(view(arm, ("acc", "en")).values) for arm in (R, Q))
    return "" if worst >= 0.10 else f"English {worst:.3f} < 0.10: no reasoning to carry over"


def over_problems(view: View, name: str, group: str) -> Verdict:
    mean, low, high = (view.mean(Q, ("lead", name, group, at)) for at in ("", "low", "high"))
    where = "above 0" if low > 0 else "below 0" if high < 0 else "on both sides of 0"
    own = view.mean(Q, (name, group))
    problems = round(view.mean(Q, "problems"))
    return Verdict(
        UNDECIDED,
        f"{name} {group} {own:.3f}, {mean:+.3f} [{low:+.3f}, {high:+.3f}] over {problems} problems "
        f"of one checkpoint: {where}",
    )


def other_languages_gain_from_question_translation(view: View) -> Verdict:
    """Accuracy, mean of the other languages: qalign->ralign minus ralign, with the 95% interval
    over problems."""
    return over_problems(view, "acc", "non-en")


def English_stays_what_it_is(view: View) -> Verdict:
    """Accuracy in English: qalign->ralign minus ralign, with the 95% interval over problems (the
    paper's models move by at most 0.03)."""
    return over_problems(view, "acc", "en")


def parallel_questions_come_together_in_the_middle_layer(view: View) -> Verdict:
    """Alignment score, mean of the other languages: ralign, after stage I, after both; numbers of
    one checkpoint."""
    values = [(arm, view.mean(arm, ("alignment", "non-en"))) for arm in (R, "qalign", Q)]
    return Verdict(UNDECIDED, ", ".join(f"{arm} {value:.3f}" for arm, value in values))


def other_languages_give_the_answer_that_English_gives(view: View) -> Verdict:
    """Share of answers that equal the English one, mean of the other languages: qalign->ralign
    minus ralign, with the 95% interval over problems."""
    return over_problems(view, "agreement", "non-en")


CLAIMS = [
    Claim(
        "C1",
        other_languages_gain_from_question_translation,
        "more",
        gate=english_is_answered,
        paper="mGSM, LLaMA-2 7B, average of ten languages: 49.6 against 38.4",
    ),
    Claim(
        "C2",
        English_stays_what_it_is,
        "equal",
        gate=english_is_answered,
        paper="mGSM, LLaMA-2 7B: 68.0 against 65.5",
    ),
    Claim("C7", parallel_questions_come_together_in_the_middle_layer, "more"),
    Claim(
        "C8",
        other_languages_give_the_answer_that_English_gives,
        "more",
        gate=english_is_answered,
    ),
]


def claims(metrics: dict) -> list[dict]:
    return judge(CLAIMS, metrics)


# --- figure


def figure(results: dict):
    """Left: exact answers per language. Right: the alignment score of every layer, mean over
    languages."""
    fig, (left, layers) = new_figure(1, 2, width=12, height=4.4)
    view = View(results["metrics"])
    languages = []
    for i, (arm, row) in enumerate(results["metrics"].items()):
        own = [language for language in NAMES if key(("acc", language)) in row]
        languages = languages or own
        for j, language in enumerate(own):
            x = j + (i - (len(view.metrics) - 1) / 2) * 0.2
            values = view(arm, ("acc", language)).values
            bar_seeds(left, x, values, COLORS[i], 0.19, None if j else arm)
        draw_alignment(layers, results["series"].get(arm, {}), arm, COLORS[i])
    left.set_xticks(range(len(languages)), languages)
    left.set_ylim(0, max(0.2, left.get_ylim()[1]))
    seeds = len(results["seeds"])
    left.set(ylabel="exact answers", title=f"Test questions, orders of training: {seeds}")
    left.legend()
    layers.set_ylim(min(0, layers.get_ylim()[0]), None)
    layers.set(xlabel="layer (0: embedding)", ylabel="alignment score")
    layers.set_title("Parallel questions inside the model")
    if layers.lines:
        layers.legend()
    return fig


def draw_alignment(ax, series: dict, arm: str, color: str) -> None:
    curves = [row for name, row in series.items() if name.startswith("alignment")]
    if not curves:
        return
    x = curves[0]["x"]
    by_seed = zip(*(row["values"] for row in curves))
    values = [[fmean(column) for column in zip(*of_languages)] for of_languages in by_seed]
    plot_seeds(ax, x, values, arm, color)
    ax.set_xticks(x)


# --- the run

NEEDS = {
    "all": ("stage1", "stage2"),
    "1": ("stage1",),
    "2": ("stage2",),
    "eval": ("eval",),
    "proxy": ("expert", "anti", "eval"),
}


def check(cfg: Config) -> None:
    sizes = "batch micro_batch eval_batch max_new_tokens max_len limit eval_limit lora_rank workers"
    check_range(cfg, sizes, least=1)
    check_range(cfg, "lr epochs", above=0)
    check_range(cfg, "alpha")
    if not cfg.langs:
        raise InputError("--langs must name a language beside English")
    if wrong := [x for x in cfg.langs if x not in NAMES or x == "en"]:
        known = ", ".join(x for x in NAMES if x != "en")
        given = " ".join(wrong)
        raise InputError(f"--langs {given}: give some of {known}; English is always there")
    needs = NEEDS[cfg.stage]
    if missing := [f"--{name}" for name in needs if not getattr(cfg, name)]:
        raise InputError(f"--stage {cfg.stage} needs {' and '.join(missing)}")
    if not cfg.eval and not cfg.save:
        raise InputError("nothing would be kept: give --eval to measure, or --save")
    if cfg.stage != "proxy":
        check_unused(cfg, "expert anti alpha", "without --stage proxy")
    for name in ("checkpoint", "expert", "anti"):  # before the first one is read
        folder = getattr(cfg, name)
        if folder and not Path(folder).exists():
            raise FileNotFoundError(f"--{name} {folder}: no such file or folder")
    if cfg.stage == "proxy" and cfg.fsdp:
        raise InputError("--stage proxy trains nothing: leave --fsdp out")
    if cfg.alpha < 0:
        print(f"warning: --alpha {cfg.alpha} pushes the large model away from what tuning taught")


def main(cfg: Config) -> dict | None:
    started = time.time()
    check(cfg)
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    if not cfg.eval:
        return None
    path = Path(cfg.out or ROOT / "runs" / "question_alignment_real") / "question_alignment_real"
    results = save_results(
        __file__, PAPER, cfg, outcomes, claims, figure, started, cfg.seeds, path
    )
    columns = [("acc", language) for language in ("en", *cfg.langs, "non-en")]
    columns += [("agreement", "non-en"), ("alignment", "non-en"), "average"]
    print_metrics(results["metrics"], [key(column) for column in columns], 3)
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
