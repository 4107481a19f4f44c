"""Question alignment and proxy-tuning on your own checkpoint and data. The method is methods/question_alignment.py.

Run     python methods/real/question_alignment.py --checkpoint DIR --stage1 gsm_questions --stage2 train.jsonl --eval mgsm --langs de sw \\
            --save models                                          # base, RAlign, QAlign -> RAlign from one checkpoint, all measured
        python methods/real/question_alignment.py --checkpoint models/qalign --stage 2 --stage2 train.jsonl --save models
        python methods/real/question_alignment.py --checkpoint BIG --stage proxy --expert models/qalign-ralign --anti DIR --eval mgsm
        --stage1       pairs: a folder of {l}-en/train.{l} and {l}-en/train.en, line by line; or JSON Lines {"lang", "src", "tgt"}
        --stage2       English responses, JSON Lines or a JSON list: query, question or instruction; response, answer or output
        --eval         a folder with one file per language (mgsm_de.tsv; de.json, test_de.jsonl, ... in JSON Lines), for --task
                       mgsm       question<TAB>answer, or {"query", "response"};  msvamp  {"m_query", "response"}: m_query is what is asked
                       pot        as mgsm, answered by a program: arithmetic and print are read from its syntax tree, nothing is executed
                       xcsqa      {"question": {"stem", "choices"}, "answerKey"}: the first A-E that stands alone
Paper   the defaults: LLaMA-2, all weights, 3 epochs, lr 2e-5, batch 128, 512 tokens; 7B takes several GPUs of 80 GB (16 bytes a weight).
        --lora-rank R trains a low-rank difference instead: OUR addition, for smaller machines.
Shown   results/question_alignment_real.json (with its command): the path, not the claim. Files as published: folder gsm_questions of github
        NJUNLP/QAlign, GSM8K's train.jsonl, mGSM. A model of 0.17M weights, made in seconds (300 steps of train.py --layers 2 --width 64
        --heads 2 --block 192 --batch 4 --vocab-size 1024 on half a megabyte of GSM8K and questions in four languages), does not reason:
        0 of 20 in English, so no claim has a verdict. (C7 was tightened after the run: the mean over languages rose by Chinese alone.)
Honest  Numbers lose their sign and thousands commas, as in the paper's scorer; a response without a number is wrong (there: 0). Languages
        with a script of their own have a measured response language, Latin-script ones do not.
"""

import copy
import json
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Literal

import torch
from torch import nn

from methods.experiments.question_alignment import PAPER, ProxyTuned, alignment_score
from methods.question_alignment_tasks import run_program
from minilm import InputError
from minilm.data import IGNORE, batches, generator, pad, prompt_masked, read_text
from minilm.evaluate import last_number, masked_mean
from minilm.generate import generate, stop_ids
from minilm.lora import add_lora, merge_lora
from minilm.ops import linear_cross_entropy
from minilm.claims import NOT_TESTED, check, print_claims
from minilm.results import COLORS, ROOT, Outcome, bar_seeds, cli, new_figure, plot_seeds, print_metrics, progress, run_seeds, save_results
from minilm.training import autocast, make_optimizers, pick_device, schedule, set_lr
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained

NAMES = {"bn": "Bengali", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "ja": "Japanese", "ru": "Russian",
         "sw": "Swahili", "te": "Telugu", "th": "Thai", "zh": "Chinese", "ar": "Arabic", "hi": "Hindi", "it": "Italian", "vi": "Vietnamese"}
SCRIPTS = {"bn": "BENGALI", "ja": "HIRAGANA KATAKANA KATAKANA-HIRAGANA", "ru": "CYRILLIC", "te": "TELUGU", "th": "THAI", "zh": "CJK",
           "ar": "ARABIC", "hi": "DEVANAGARI"}  # languages whose responses can be told by their letters
TEMPLATE = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Response:")


@dataclass(frozen=True)
class Config:
    checkpoint: str  # Hugging Face folder with a tokenizer: the untuned model, or for --stage 2 what stage I saved
    stage1: str | None = None  # question pairs
    stage2: str | None = None  # English questions and responses
    eval: str | None = None  # test questions in every language
    task: Literal["mgsm", "msvamp", "xcsqa", "pot"] = "mgsm"  # how they are read and scored
    langs: tuple[str, ...] = ("bn", "de", "es", "fr", "ja", "ru", "sw", "th", "zh")  # languages beside English: stage I takes those it has
    stage: Literal["all", "1", "2", "eval", "proxy"] = "all"  # what to do: base, RAlign and QAlign -> RAlign; one stage; measure only
    expert: str | None = None  # proxy: the small tuned model
    anti: str | None = None  # proxy: the small model before tuning
    alpha: float = 1.0  # proxy: strength
    epochs: float = 3.0  # passes over each stage's data
    lr: float = 2e-5  # peak learning rate of both stages
    batch: int = 128  # examples per step
    micro_batch: int = 8  # examples at once
    max_len: int = 512  # tokens per example; what is longer is cut, and dropped when nothing of its response is left
    limit: int | None = None  # pairs per language, and responses, to train on
    eval_limit: int | None = None  # test questions per language
    eval_batch: int = 32  # questions answered at once
    max_new_tokens: int = 600  # of a response
    lora_rank: int | None = None  # train a low-rank difference instead of all weights (not in the paper)
    seeds: tuple[int, ...] = (0,)  # order of the examples
    activation_checkpointing: bool = False  # recompute layers in the backward pass: less memory
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: matrix products, and what is saved
    device: str = "auto"  # auto (cuda, else cpu), cpu, cuda, mps
    workers: int | None = None  # seeds at a time (default: one per core)
    save: str | None = None  # folder for the trained checkpoints (default: none is kept)
    out: str | None = None  # folder for the results (default: runs/question_alignment_real)


# --- data

def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(row number, object) of a JSON Lines file or of a JSON list."""
    text = read_text(path)
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise InputError(f"{path} is not JSON Lines, nor a JSON list ({error}): mend or convert it") from None
    if bad := [n for n, row in enumerate(rows, 1) if not isinstance(row, dict)]:
        raise InputError(f"{path}, row {bad[0]}: an object is needed")
    return enumerate(rows, 1)


def field(path: Path, number: int, row: dict, *names: str) -> str:
    """The first of the names that the row has, as text that is not empty."""
    value = next((str(row[name]).strip() for name in names if row.get(name) is not None), "")
    if not value:
        raise InputError(f"{path}, row {number}: {' or '.join(names)} is missing or empty; it has {', '.join(row) or 'nothing'}")
    return value


def read_pairs(cfg: Config) -> list[tuple[str, str]]:
    """Stage I -> (instruction, English question)."""
    path, pairs = Path(cfg.stage1), {}
    if path.is_file():
        for number, row in read_rows(path):
            language = field(path, number, row, "lang")
            if language not in NAMES or language == "en":
                raise InputError(f"{path}, row {number}: lang {language!r} must be one of {', '.join(NAMES)}, other than en")
            pairs.setdefault(language, []).append((field(path, number, row, "src"), field(path, number, row, "tgt")))
    elif not path.is_dir():
        raise FileNotFoundError(f"--stage1 {path}: no such file or folder; give JSON Lines, or a folder of de-en/train.de and .en")
    for language in cfg.langs if path.is_dir() else ():
        if (folder := path / f"{language}-en").is_dir():
            sides = [read_text(folder / f"train.{side}").rstrip("\n").split("\n") for side in (language, "en")]
            if len(sides[0]) != len(sides[1]):
                raise InputError(f"{folder}: train.{language} has {len(sides[0])} lines, train.en {len(sides[1])}: they must match")
            pairs[language] = [(x.strip(), y.strip()) for x, y in zip(*sides) if x.strip() and y.strip()]
    wanted = {language: rows[: cfg.limit] for language, rows in pairs.items() if language in cfg.langs}
    if not any(wanted.values()):
        raise InputError(f"--stage1 {path} holds no pairs in {', '.join(cfg.langs)}: give --langs that it has")
    print("stage I:", ", ".join(f"{NAMES[language]} {len(rows)}" for language, rows in wanted.items()), "pairs")
    return [(f"Translate the following sentences from {NAMES[language]} to English. {source}", target)
            for language, rows in wanted.items() for source, target in rows]


def read_responses(cfg: Config) -> list[tuple[str, str]]:
    """Stage II -> (question, response)."""
    rows = read_rows(path := Path(cfg.stage2))
    return [(field(path, n, row, "query", "question", "instruction"), field(path, n, row, "response", "answer", "output"))
            for n, row in rows][: cfg.limit]


def read_test(cfg: Config, language: str) -> list[tuple[str, float | str]]:
    """(question, gold) of one language."""
    folder = Path(cfg.eval)
    found = sorted(f for f in folder.glob("*") if re.split(r"[._-]", f.stem)[-1] == language and f.suffix in (".tsv", ".json", ".jsonl"))
    if len(found) != 1:
        raise FileNotFoundError(f"--eval {folder} needs one file for {language} (such as {cfg.task}_{language}.tsv), it has {len(found)}")
    path, items = found[0], []
    lines = read_text(path).rstrip("\n").split("\n") if path.suffix == ".tsv" else []
    if bad := [n for n, line in enumerate(lines, 1) if line.count("\t") != 1]:
        raise InputError(f"{path}, line {bad[0]}: one tab is needed, between question and answer")
    for n, row in enumerate((dict(zip(("query", "response"), x.split("\t"))) for x in lines), 1) if lines else read_rows(path):
        if cfg.task == "xcsqa":
            try:
                asked, choices = row["question"], row["question"]["choices"]  # either lists of labels and texts, or a list of both
                pairs = zip(choices["label"], choices["text"]) if isinstance(choices, dict) else ((c["label"], c["text"]) for c in choices)
                question = "\n".join([asked["stem"], *(f"({label}) {text}" for label, text in pairs)])
            except (KeyError, TypeError):
                raise InputError(f"{path}, row {n}: a question with stem and choices (label, text) is needed") from None
            items.append((question, field(path, n, row, "answerKey")))
        else:
            gold = last_number(field(path, n, row, "response", "answer"))
            if gold is None:
                raise InputError(f"{path}, row {n}: the answer holds no number")
            gold = float(gold)
            items.append((field(path, n, row, *(["m_query"] if cfg.task == "msvamp" else ["query", "question"])), gold))
    if not items:
        raise InputError(f"{path} holds no question")
    return items[: cfg.eval_limit]


def encode(tokenizer, instruction: str, response: str | None = None) -> tuple[list[int], list[int]]:
    """Prompt and response ids, each encoded by itself: where one ends and the other begins cannot shift. The response follows the colon."""
    prompt = tokenizer.encode(TEMPLATE.format(instruction=instruction), bos=tokenizer.add_bos)
    return prompt, [] if response is None else [*tokenizer.encode(response), tokenizer.eos_id]


# --- train

def train(cfg: Config, model: Transformer, tokenizer, rows: Sequence[tuple[str, str]], stage: str, seed: int) -> Transformer:
    """One stage: a new optimizer, a cosine to 0, the loss a mean over the batch's response tokens."""
    pairs = [(prompt, response[: max(0, cfg.max_len - len(prompt))]) for prompt, response in (encode(tokenizer, *row) for row in rows)]
    examples = [(prompt, response) for prompt, response in pairs if response]
    cut = sum(response[-1] != tokenizer.eos_id for _, response in examples)
    print(f"{stage}: {len(examples)} examples; {len(pairs) - len(examples)} dropped, {cut} cut at --max-len {cfg.max_len}")
    if not examples:
        raise InputError(f"{stage}: no response fits into --max-len {cfg.max_len}: raise it")
    model, device = copy.deepcopy(model), model.embed.weight.device
    if cfg.lora_rank:
        add_lora(model, rank=cfg.lora_rank, alpha=2 * cfg.lora_rank)
    model.activation_checkpointing = cfg.activation_checkpointing
    steps = max(1, round(cfg.epochs * len(examples) / cfg.batch))
    optimizers = make_optimizers(model, "adamw", cfg.lr, weight_decay=0.0)
    model.train()
    for step, chosen in enumerate(progress(batches(len(examples), cfg.batch, generator(seed, stage), steps), stage, steps)):
        set_lr(optimizers, schedule(step, steps, "cosine", warmup=round(0.03 * steps), final=0.0))
        total = sum(len(examples[i][1]) for i in chosen.tolist())
        for micro in chosen.split(cfg.micro_batch):
            inputs, labels = (x.to(device) for x in prompt_masked([examples[i] for i in micro.tolist()]))
            with autocast(device, cfg.dtype):
                loss = linear_cross_entropy(model.hidden(inputs), model.lm_head.weight, labels, IGNORE)
            (loss * (labels != IGNORE).sum() / total).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if cfg.lora_rank:
        merge_lora(model, keep=False)
    return model.eval()


# --- evaluate

def parse(task: str, text: str) -> float | str | None:
    """What a response answers: its last number, the number that its program prints, or its first choice letter."""
    if task == "xcsqa":
        return next(iter(re.findall(r"(?<![A-Za-z])[A-E](?![A-Za-z])", text)), None)
    if task == "pot":
        code = re.search(r"(?s)<llm-code>(.*?)(?:</llm-code>|$)|```(?:python)?\n(.*?)(?:```|$)", text)
        value = run_program((code[1] or code[2] or "").strip() if code else text.strip())
        return None if value is None else abs(value)
    found = last_number(text)  # the paper's scorer
    return None if found is None else float(found)


def right(answer: float | str | None, gold: float | str) -> bool:
    return answer == gold if isinstance(gold, str) else answer is not None and abs(answer - gold) < 1e-3


def own_script(text: str, language: str) -> bool | None:
    """Are most letters of the response in the language's own script? None for languages that share theirs."""
    kinds, own = Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()), SCRIPTS.get(language, "").split()
    if language == "ja" and any(kinds[kind] for kind in own):
        own.append("CJK")  # kanji, if any kana stands beside them: without, it is Chinese
    return sum(kinds[kind] for kind in own) > sum(kinds.values()) / 2 if own else None


@torch.no_grad()
def question_vectors(cfg: Config, model: Transformer, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[L + 1, n, D] float32: each layer's mean state over the real tokens of a templated question (the official script divides by the
    padded length)."""
    parts, device = [], model.embed.weight.device
    for k in range(0, len(prompts), cfg.micro_batch):
        ids, mask = (x.to(device) for x in pad(prompts[k : k + cfg.micro_batch]))
        parts.append(torch.stack([masked_mean(h.float(), mask).cpu() for h in model(ids, output_hidden_states=True).hidden_states]))
    return torch.cat(parts, 1)


def evaluate(cfg: Config, model: nn.Module, tokenizer, tests: dict, answering: bool = True) -> tuple[dict, dict]:
    """Greedy answers in every language, and how the languages' questions agree inside the model."""
    metrics, series, answers, vectors = {}, {}, {}, {}
    device = next(model.parameters()).device
    for language, items in tests.items():
        prompts = [encode(tokenizer, question)[0] for question, _ in items]
        if answering:
            texts, order = [""] * len(prompts), sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
            for k in progress(range(0, len(order), cfg.eval_batch), f"answers {language}"):
                chosen = order[k : k + cfg.eval_batch]
                with autocast(device, cfg.dtype):
                    outs = generate(model, [prompts[i] for i in chosen], cfg.max_new_tokens, eos_id=stop_ids(model, tokenizer))
                for i, out in zip(chosen, outs):
                    texts[i] = tokenizer.decode(out[len(prompts[i]) :], skip_special=True)
            answers[language] = [parse(cfg.task, text) for text in texts]
            metrics[language] = mean(right(answer, gold) for answer, (_, gold) in zip(answers[language], items))
            metrics[f"answered {language}"] = mean(answer is not None for answer in answers[language])
            if language in SCRIPTS:
                metrics[f"consistency {language}"] = mean(own_script(text, language) for text in texts)
        if isinstance(model, Transformer):
            vectors[language] = question_vectors(cfg, model, prompts)
    for language in [x for x in answers if x != "en"]:
        pairs = list(zip(answers[language], answers["en"]))
        metrics[f"agreement {language}"] = mean(a is not None and a == b for a, b in pairs)
    for language in [x for x in vectors if x != "en"]:
        n = min(len(vectors["en"][0]), len(vectors[language][0]))
        scores = alignment_score(vectors["en"][:, :n], vectors[language][:, :n]).tolist()
        metrics[f"alignment {language}"], series[f"alignment {language}"] = scores[len(scores) // 2], (range(len(scores)), scores)
    others = [x for x in tests if x != "en"]
    for name in ("", "agreement ", "alignment "):
        if name + others[0] in metrics:
            metrics[name + "non-en"] = mean(metrics[name + x] for x in others)
    if answering:
        metrics["average"] = mean(metrics[x] for x in tests)
    return metrics, series


# --- one seed

def load(cfg: Config, folder: str, flag: str):
    model, tokenizer = load_pretrained(folder, device=pick_device(cfg.device))
    if tokenizer is None or tokenizer.eos_id is None:
        raise InputError(f"{flag} {folder} has no tokenizer.json with an end-of-text token")
    return model.eval(), tokenizer


def check_vocabularies(first, second, folder: str) -> None:
    """Two tokenizers must agree on every id that both have."""
    one, two = ({i: text for text, i in {**t.vocab, **t.added}.items()} for t in (first, second))
    if differ := [i for i in one.keys() & two.keys() if one[i] != two[i]]:
        raise InputError(f"{folder} has another vocabulary: id {differ[0]} is {two[differ[0]]!r}, not {one[differ[0]]!r}")


def run(cfg: Config, seed: int) -> Outcome:
    model, tokenizer = load(cfg, cfg.checkpoint, "--checkpoint")
    tests = {language: read_test(cfg, language) for language in ("en", *cfg.langs)} if cfg.eval else {}
    for language, items in tests.items():
        longest = max(len(encode(tokenizer, question)[0]) for question, _ in items)
        if longest >= model.config.max_position_embeddings:
            raise InputError(f"--eval: a question in {NAMES[language]} takes {longest} tokens, more than the model reads (its "
                             f"max_position_embeddings is {model.config.max_position_embeddings}): leave the language out of --langs")
    pairs, responses = read_pairs(cfg) if cfg.stage in ("all", "1") else [], read_responses(cfg) if cfg.stage in ("all", "2") else []
    outcome, models = Outcome({}, {}), {"untuned" if cfg.stage in ("all", "proxy") else "checkpoint": model}
    first = lambda start: train(cfg, start, tokenizer, pairs, "stage I", seed)
    second = lambda start: train(cfg, start, tokenizer, responses, "stage II", seed)
    if cfg.stage == "all":
        models |= {"ralign": second(model), "qalign": (aligned := first(model)), "qalign->ralign": second(aligned)}
    elif cfg.stage in ("1", "2"):
        models = {"qalign": first(model)} if cfg.stage == "1" else {"stage II": second(model)}
    elif cfg.stage == "proxy":
        (expert, own), (anti, other) = load(cfg, cfg.expert, "--expert"), load(cfg, cfg.anti, "--anti")
        check_vocabularies(tokenizer, own, cfg.expert)
        check_vocabularies(tokenizer, other, cfg.anti)
        models |= {"expert": expert, f"proxy {cfg.alpha:g}": ProxyTuned(model, expert, anti, cfg.alpha).eval()}
    for name, made in models.items():
        if cfg.save and cfg.stage not in ("eval", "proxy") and name not in ("untuned", "checkpoint"):
            folder = Path(cfg.save) / (name.replace("->", "-").replace(" ", "-") + (f"-seed-{seed}" if len(cfg.seeds) > 1 else ""))
            save_pretrained(copy.deepcopy(made).to(getattr(torch, cfg.dtype)), folder, tokenizer)
        if tests:
            outcome.metrics[name], outcome.series[name] = evaluate(cfg, made, tokenizer, tests, answering=name != "qalign")
    return outcome


# --- claims

def claims(metrics: dict) -> list[dict]:
    """The paper's main claims. A model that answers fewer than a tenth of the English questions decides none of them."""
    r, q = "ralign", "qalign->ralign"
    english = [min(metrics[arm]["en"]["values"]) for arm in (r, q) if "en" in metrics.get(arm, {})]
    aligned = [name for name in metrics.get(r, {}) if name.startswith("alignment ")] or ["alignment non-en"]

    def row(id: str, statement: str, rule: str, evidence: dict, test, paper: str | None = None) -> dict:
        made = check(metrics, id, statement, rule, evidence, test, paper, digits=3)
        no_verdict = {"verdict": NOT_TESTED, "measured": f"English below 0.10: there is no reasoning to carry over ({made['measured']})"}
        return made | no_verdict if made["verdict"] != NOT_TESTED and min(english) < 0.10 else made

    return [
        row("C1", "Other languages gain from question translation", "non-en: above ralign", {"non-en": (r, q)},
            lambda m: m(q, "non-en") > m(r, "non-en"), "mGSM, LLaMA-2 7B, average of ten languages: 49.6 against 38.4"),
        row("C2", "English stays what it is", "en: differs by at most 0.03", {"en": (r, q)},
            lambda m: abs(m(q, "en") - m(r, "en")) <= 0.03),
        row("C7", "Parallel questions come together in the middle layer, and stay so", "alignment score of every language: after stage I "
            "and after both above ralign", {name: (r, "qalign", q) for name in aligned},
            lambda m: all(m(arm, name) > m(r, name) for arm in ("qalign", q) for name in aligned)),
        row("C8", "Other languages give the answer that English gives", "agreement: above ralign", {"agreement non-en": (r, q)},
            lambda m: m(q, "agreement non-en") > m(r, "agreement non-en"))]


# --- figure

def figure(results: dict):
    """Left: exact answers per language. Right: the alignment score of every layer, mean over languages."""
    fig, (left, right_) = new_figure(1, 2, width=12, height=4.4)
    arms = [arm for arm, row in results["metrics"].items()]
    languages = [x for x in NAMES if any(x in results["metrics"][arm] for arm in arms)]
    for i, arm in enumerate(arms):
        for j, language in enumerate(x for x in languages if x in results["metrics"][arm]):
            bar_seeds(left, j + (i - (len(arms) - 1) / 2) * 0.2, results["metrics"][arm][language]["values"], COLORS[i], 0.19,
                      arm if j == 0 else None)
        if layers := [series for name, series in results["series"].get(arm, {}).items() if name.startswith("alignment")]:
            values = [[mean(column) for column in zip(*seeds)] for seeds in zip(*(series["values"] for series in layers))]
            plot_seeds(right_, layers[0]["x"], values, arm, COLORS[i])
            right_.set_xticks(layers[0]["x"])
    left.set_xticks(range(len(languages)), languages)
    left.set_ylim(0, max(0.2, left.get_ylim()[1]))
    left.set(ylabel="exact answers", title=f"Test questions ({len(results['seeds'])} seed{'s' * (len(results['seeds']) > 1)})")
    right_.set_ylim(min(0, right_.get_ylim()[0]), None)
    right_.set(xlabel="layer (0: embedding)", ylabel="alignment score", title="Parallel questions inside the model")
    fig.legend(*right_.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


# --- the run

def main(cfg: Config) -> dict | None:
    started = time.time()
    sizes = (cfg.batch, cfg.micro_batch, cfg.eval_batch, cfg.max_new_tokens, cfg.max_len, cfg.limit, cfg.eval_limit)
    if min(size for size in sizes if size is not None) < 1 or not cfg.langs:
        raise InputError("--batch, --micro-batch, --eval-batch, --max-new-tokens, --max-len, --limit and --eval-limit must be at least 1; "
                         "--langs must name a language beside English")
    if wrong := [x for x in cfg.langs if x not in NAMES or x == "en"]:
        raise InputError(f"--langs {' '.join(wrong)}: give some of {', '.join(x for x in NAMES if x != 'en')}; English is always there")
    needs = {"all": "stage1 stage2", "1": "stage1", "2": "stage2", "eval": "eval", "proxy": "expert anti eval"}[cfg.stage]
    if missing := [f"--{name}" for name in needs.split() if not getattr(cfg, name)]:
        raise InputError(f"--stage {cfg.stage} needs {' and '.join(missing)}")
    if not cfg.eval and not cfg.save:
        raise InputError("nothing would be kept: give --eval to measure, or --save for the checkpoints")
    if cfg.alpha < 0:
        print(f"warning: --alpha {cfg.alpha} pushes the large model away from what tuning taught the small one")
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    if not cfg.eval:
        return None
    path = Path(cfg.out or ROOT / "runs" / "question_alignment_real") / "question_alignment_real"
    results = save_results(__file__, PAPER, cfg, outcomes, claims, figure, started, cfg.seeds, path)
    print_metrics(results["metrics"], ["en", *cfg.langs, "non-en", "average", "agreement non-en", "alignment non-en"], 3)
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
