"""OCKR on the published files (https://github.com/NJUNLP/ID-OCKR), with a real checkpoint: LoRA as in the paper, or all weights.

Run     python methods/real/ockr.py --stage check --data ID-OCKR                  # read every file: counts, defects with row numbers
        python methods/real/ockr.py --checkpoint DIR --data ID-OCKR --task "A+A To R" --setting separate    # paper: LLaMA2-13B-chat, one
                                                                       # 48 GB GPU in bfloat16; 7B: 24 GB (estimates), well under an hour
        python methods/real/ockr.py --stage build --out DIR               # our own world at the published size, in the published format
Honest  The authors' evaluation code is not released: the scorers of methods/ockr.py are the definition here. Known defects of the files are
        reported and kept; --clean leaves them out. `build` has the published counts and first paraphrases, the other nine are ours.
Shown   results/ockr_real.json: three runs on the published files, all weights of a checkpoint of 0.26M parameters, one seed. A+A separate:
        premises 99.5% and 95%, target .47 [.42, .52] of 400: the finding, on the real files. R+R and A+R separate learn too few of their
        premises in 1200 and 800 steps of 32 rows (R+R 27 to 78%; A+R answers every relation with No), so that their targets, .50 and .05,
        say nothing.
"""

import json
import re
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from methods.ockr import answer_loss, parse, share
from methods.ockr_tasks import FIRST, PATTERNS, SECOND, SETTINGS, Row, Style, BirthYears, build
from minilm import InputError
from minilm.chat import load_chat_template, render_chat
from minilm.data import IGNORE, batches, generator, prompt_masked, read_json, write_atomically, write_json
from minilm.evaluate import continuation_logprobs
from minilm.generate import generate, stop_ids
from minilm.lora import add_lora, save_adapter
from minilm.claims import wilson
from minilm.results import ROOT, cli, commit, hardware, progress
from minilm.training import autocast, make_optimizers, pick_device, schedule, set_lr, take_step
from minilm.weights import load_pretrained, save_pretrained


@dataclass(frozen=True)
class Config:
    stage: str = "train"  # check: read all files; train: fine-tune and test; build: write our own world in the published format
    data: str = ""  # folder of the published files (a part of them will do)
    checkpoint: str = ""  # Hugging Face folder
    task: str = "A+A To R"  # A+A To R, A+R To A, R+R To R or Cross-Lingual
    level: str = "simple"  # simple or hard
    setting: str = "separate"  # separate, adjacent, crd (complete reasoning data) or cot (chain of thought)
    lang: str = "DE"  # Cross-Lingual: AR DE FR HE IT JA PL RU ZH
    chat_template: str = "auto"  # auto: the checkpoint's own, plain if it has none; llama2: [INST] ... [/INST]; plain: a line end
    scoring: str = "generate"  # generate, or candidates (the more probable of the possible answers)
    clean: bool = False  # leave out the defective rows that `check` reports
    limit: int | None = None  # test only so many random rows of each kind
    lora_rank: int = 128  # 0: train all weights (the paper: --lr 4e-5 --batch 64)
    lora_alpha: float = 16.0  # scale of the adapters is alpha / rank
    lora_dropout: float = 0.05  # on the adapters' input
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")  # layers with an adapter
    lr: float = 4e-4  # peak, cosine, no warm-up (the paper: from 2e-4, 4e-4, 8e-4)
    steps: int = 300  # optimizer steps
    batch: int = 256  # rows per step
    micro_batch: int = 8  # rows at a time
    dtype: str = "float32"  # weights: float32 or bfloat16
    device: str = "auto"  # cuda, cpu, mps
    seed: int = 0  # order, adapters
    out: str | None = None  # folder for results (default runs/ockr_real; build needs one)


LANGUAGES = ("AR", "DE", "FR", "HE", "IT", "JA", "PL", "RU", "ZH")
TASKS = (*PATTERNS.values(), "Cross-Lingual")
FOLDERS = {"separate": ("Basic OCKR", "Separate"), "adjacent": ("Basic OCKR", "Adjacent"),
           "crd": ("Complete-Reason-Data", "CompleteReasonData"), "cot": ("Chain-of-Thought", "Cot")}
ROWS = {("A+A To R", "simple"): (3000, 7000, 8200, 10200, 620), ("A+A To R", "hard"): (2960, 6960, None, None, 600),
        ("A+R To A", "simple"): (4200, 8200, 10200, 6200, 620), ("A+R To A", "hard"): (4200, 8200, None, None, 620),
        ("R+R To R", "simple"): (8000, 12000, 12000, 12000, 1200), ("R+R To R", "hard"): (8000, 12000, None, None, 1200),
        ("Cross-Lingual", "simple"): (4200, 2200, None, None, 600)}  # separate, adjacent, crd, cot, test


# --- data

def paths(task: str, level: str, setting: str, lang: str = "") -> tuple[str, str]:
    """(training file, test file) below the data folder, as published ("Seperate" included)."""
    if task == "Cross-Lingual":
        return (f"Cross-Lingual/{'Seperate' if setting == 'separate' else 'Adjacent'}/Train/{lang}.json",
                f"Cross-Lingual/Seperate/Test/{lang}.jsonl")
    folder, name = FOLDERS[setting]
    return f"{folder}/{task}({level},{name}).json", f"Test/{task}({level},test{'Cot' if setting == 'cot' else ''}).jsonl"


def read_rows(file: Path, test: bool = False) -> list[Row]:
    """One JSON object per line with exactly the keys prompt, input, answer. In tests the tags [[label:...]][[type:...]] are taken out of
    the answer; `targe` (so spelled) is the target, but in the cross-lingual files the target is the question in the other language."""
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: --data must be the folder of the published files")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}): download it again") from None
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, dict) or {k: type(v) for k, v in value.items()} != dict.fromkeys(("prompt", "input", "answer"), str):
            raise InputError(f"{where}: a JSON object with the texts prompt, input and answer is needed (one a line, no array)")
        tags = dict(reversed(re.findall(r"\[\[([^:\]]*):([^\]]*)\]\]", value["answer"]))) if test else {}  # (the first of equal keys)
        gold, kind = tags.get("label", tags.get("continent", "")), tags.get("type", "")
        if test and not (gold and kind):
            raise InputError(f"{where}: a test row needs [[label:...]] (or continent) and [[type:...]] in its answer")
        if test and "birth" in kind and kind.rstrip(")").endswith("year") and not re.fullmatch(r"(19|20)\d\d", gold):
            raise InputError(f"{where}: the label {gold!r} of a question for a year is no year")
        if "Cross-Lingual" in file.parts:
            kind = "translation" if kind == "targe" else "target" if re.match(r"\(x[A-Z]{2},", kind) else kind
        kind = "target" if kind == "targe" else kind
        rows.append(Row(value["prompt"], re.sub(r"\[\[.*", "", value["answer"]), value["input"], gold, kind))
    if not rows:
        raise InputError(f"{file} is empty: download it again")
    return rows


def names(text: str) -> list[str]:
    return re.findall(r"(?:[A-Z][a-z]+){2,}", text)


def defects(train: list[Row], test: list[Row]) -> dict[str, list[int]]:
    """What is wrong with the published rows -> line numbers, from 1 (of the test file where it says so)."""
    questions = {(row.prompt, row.input): row.answer for row in train}
    seen, repeated = set(), []
    for number, row in enumerate(train, 1):
        repeated += [number] if row in seen else []
        seen.add(row)
    mismatched = [n for n, r in enumerate(train, 1) if not r.input and names(r.prompt) and set(names(r.prompt)) != set(names(r.answer))]
    reflexive = [n for n, r in enumerate(train, 1) if r.prompt.count("?") == 1 and len(set(names(r.prompt))) == 1 < len(names(r.prompt))
                 and "(" not in r.prompt]
    trained = [n for n, r in enumerate(test, 1) if r.kind == "target" and (r.prompt, r.input) in questions]
    return {"the answer speaks of another person than the question": mismatched, "a person is compared with itself": reflexive,
            "the row is a copy of an earlier one": repeated, "test file: the target's question is trained, for another person": trained}


def check(cfg: Config) -> dict:
    """Reads every published file that is there: counts against the table, and defects."""
    root, report = Path(cfg.data), {}
    if not cfg.data or not root.is_dir():
        raise FileNotFoundError(f"--data {cfg.data or '(none)'}: no such folder; give the folder of the published files")
    for (task, level), counts in ROWS.items():
        for setting, count in zip(SETTINGS, counts):
            for lang in LANGUAGES if task == "Cross-Lingual" else ("",):
                train_file, test_file = (root / p for p in paths(task, level, setting, lang))
                if count is None or not train_file.exists():
                    continue
                train, test = read_rows(train_file), read_rows(test_file, True) if test_file.exists() else []
                found = {what: numbers for what, numbers in defects(train, test).items() if numbers}
                report[paths(task, level, setting, lang)[0]] = {
                    "rows": len(train), "expected": count, "test": len(test), "expected test": counts[-1],
                    "kinds": dict(Counter(row.kind for row in test)), "defects": found}
                note = "" if len(train) == count and len(test) in (0, counts[-1]) else f"  EXPECTED {count} and {counts[-1]}"
                print(f"{train_file.relative_to(root)}: {len(train)} rows, test {len(test) or 'file not here'}{note}")
                for what, numbers in found.items():
                    print(f"    {len(numbers)} x {what}: lines {', '.join(map(str, numbers[:8]))}{' ...' if len(numbers) > 8 else ''}")
    if not report:
        raise InputError(f"{root} holds none of the published files (for example {paths('A+A To R', 'simple', 'separate')[0]})")
    return report


# --- build: the paper's size

def write_rows(file: Path, rows: list[Row]) -> None:
    text = "".join(json.dumps({"prompt": r.prompt, "input": r.input, "answer": r.answer}, ensure_ascii=False) + "\n" for r in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))


def write_files(cfg: Config) -> dict:
    """All seven tasks with 10 X and 10 Y for each of 20 years, ten paraphrases; the second language is Clone, its file CL."""
    if not cfg.out:
        raise InputError("--stage build needs --out, a folder for the files")
    every = [a + b for a in FIRST for b in SECOND]
    order = torch.randperm(len(every), generator=generator(cfg.seed, "names")).tolist()
    style = Style(**read_json(Path(__file__).with_name("ockr_sentences.json")))
    world, report = BirthYears([every[i] for i in order], 10, style, str(cfg.seed)), {}
    for (task, level), counts in ROWS.items():
        code = "xling" if task == "Cross-Lingual" else {v: k for k, v in PATTERNS.items()}[task] + ("-hard" if level == "hard" else "")
        for setting, count in zip(SETTINGS, counts):
            if count is None:
                continue
            train, test = build(world, code, setting)
            kinds = {"target": "(xCL, birth_year, year)", "translation": "targe"} if code == "xling" else {"target": "targe"}
            test = [row._replace(answer=f"{row.answer}[[label:{row.label}]][[type:{kinds.get(row.kind, row.kind)}]]") for row in test]
            for name, rows in zip(paths(task, level, setting, "CL"), (train, test)):
                write_rows(Path(cfg.out) / name, rows)
                report[name] = len(rows)
                print(f"{len(rows):6} rows (published: {count if rows is train else counts[-1]:6})  {name}")
    return report


# --- train and evaluate

class Reader:
    """Prompts and answers as ids, in the checkpoint's own form of conversation."""

    def __init__(self, cfg: Config, tokenizer):
        self.tok, own = tokenizer, load_chat_template(cfg.checkpoint) if cfg.chat_template == "auto" else None
        self.template, self.llama2 = own, cfg.chat_template == "llama2"
        self.bos = [tokenizer.bos_id] if tokenizer.add_bos else []

    def prompt(self, row: Row) -> list[int]:
        text = row.prompt + ("\n" + row.input if row.input else "")
        if self.template:
            return render_chat(self.template, [{"role": "user", "content": text}], self.tok)
        return self.bos + self.tok.encode(f"[INST] {text} [/INST]" if self.llama2 else text + "\n")

    def example(self, row: Row) -> tuple[list[int], list[int]]:
        return self.prompt(row), [*self.tok.encode(row.answer), self.tok.eos_id]


def fine_tune(cfg: Config, model, examples: list, device: torch.device) -> list[float]:
    """cfg.steps steps of cfg.batch rows -> losses; each is the mean over the answer tokens of the whole batch."""
    optimizers, losses = make_optimizers(model, "adamw", cfg.lr, 0.0), []
    model.train()
    torch.manual_seed(cfg.seed)  # (dropout draws from the global generator)
    bar = progress(batches(len(examples), min(cfg.batch, len(examples)), generator(cfg.seed, "order"), cfg.steps), "fine-tune", cfg.steps)
    for step, chosen in enumerate(bar):
        set_lr(optimizers, schedule(step, cfg.steps, "cosine", final=0.0))
        rows, total = [examples[i] for i in chosen.tolist()], 0.0
        answers = sum(len(answer) for _, answer in rows)
        parts = [prompt_masked(rows[i : i + cfg.micro_batch]) for i in range(0, len(rows), cfg.micro_batch)]
        for i, (inputs, labels) in enumerate(parts):
            with autocast(device, cfg.dtype):
                loss = answer_loss(model, inputs.to(device), labels.to(device)) * (labels != IGNORE).sum().item() / answers
            total += loss.item()
            if i + 1 < len(parts):
                loss.backward()
        take_step(loss, model, optimizers)  # the last part's backward pass, then the step
        losses.append(total)
    model.eval()
    return losses


def candidates(reader: Reader, model, rows: list[Row], options: list[str]) -> list[str]:
    """The label whose answer is most probable: the reference up to and including its label, with each possible label in its place."""
    starts = [row.answer[: row.answer.index(row.label)] for row in rows]
    pairs = [(reader.prompt(row), reader.tok.encode(start + option)) for row, start in zip(rows, starts) for option in options]
    return [options[i] for i in continuation_logprobs(model, pairs).sum.view(len(rows), -1).argmax(1).tolist()]


def examine(cfg: Config, model, reader: Reader, test: list[Row]) -> dict[str, dict]:
    """Accuracy, Wilson interval, share without an answer, per kind of question."""
    report = {}
    for kind in dict.fromkeys(row.kind for row in test):
        rows = [row for row in test if row.kind == kind]
        options = sorted({row.label for row in rows})
        rows = [rows[i] for i in torch.randperm(len(rows), generator=generator(cfg.seed, f"limit {kind}")).tolist()[: cfg.limit]]
        if cfg.scoring == "candidates" and kind == "translation":
            continue
        if cfg.scoring == "candidates":
            answers = candidates(reader, model, rows, options)
        else:
            answers, new = [], 160 if cfg.setting == "cot" else 64
            for i in range(0, len(rows), 64):
                prompts = [reader.prompt(row) for row in rows[i : i + 64]]
                stops = stop_ids(model, reader.tok)
                texts = generate(model, prompts, new, eos_id=stops)
                answers += [parse(reader.tok.decode([t for t in ids[len(p) :] if t not in stops]), row.label)
                            for row, p, ids in zip(rows[i : i + 64], prompts, texts)]
        right = [answer == row.label for answer, row in zip(answers, rows)]
        report[kind] = {"accuracy": share(right), "interval": wilson(sum(right), len(rows)), "n": len(rows),
                        "unparsed": share([answer is None for answer in answers])}
        report[kind] |= {f"accuracy {value}": share([ok for ok, row in zip(right, rows) if row.label == value])
                         for value in ("Yes", "No") if any(row.label == value for row in rows)}
    return report


def train(cfg: Config) -> dict:
    started, root, device = time.time(), Path(cfg.data), pick_device(cfg.device)
    if not cfg.data or not cfg.checkpoint:
        raise InputError("--stage train needs --data (the published files) and --checkpoint (a Hugging Face folder)")
    train_file, test_file = (root / p for p in paths(cfg.task, cfg.level, cfg.setting, cfg.lang))
    rows, test = read_rows(train_file), read_rows(test_file, True)
    found = {what: numbers for what, numbers in defects(rows, test).items() if numbers}
    for what, numbers in found.items():
        print(f"{len(numbers)} x {what}: lines {', '.join(map(str, numbers[:5]))} ... ({'left out' if cfg.clean else 'kept; see --clean'})")
    if cfg.clean:
        bad = {n for what, numbers in found.items() if not what.startswith("test") for n in numbers}
        bad_tests = {n for what, numbers in found.items() if what.startswith("test") for n in numbers}
        rows, test = ([r for n, r in enumerate(part, 1) if n not in drop] for part, drop in ((rows, bad), (test, bad_tests)))
    model, tokenizer = load_pretrained(cfg.checkpoint, dtype=getattr(torch, cfg.dtype), device=device)
    if tokenizer is None or tokenizer.eos_id is None:
        raise InputError(f"{cfg.checkpoint} has no tokenizer with an end-of-text token: give a folder with tokenizer.json")
    reader = Reader(cfg, tokenizer)
    examples = [reader.example(row) for row in rows]
    print(f"{len(rows)} training rows; the first, of which only what follows -> is learned:\n  "
          f"{tokenizer.decode(examples[0][0])!r} -> {tokenizer.decode(examples[0][1])!r}")
    if cfg.lora_rank:
        add_lora(model, rank=cfg.lora_rank, alpha=cfg.lora_alpha, dropout=cfg.lora_dropout, targets=cfg.lora_targets,
                 generator=generator(cfg.seed, "lora"))
    before = examine(cfg, model.eval(), reader, test)
    losses = fine_tune(cfg, model, examples, device)
    report = {"command": shlex.join(["python", *sys.argv]), "config": asdict(cfg), "rows": len(rows),
              "defects": {k: len(v) for k, v in found.items()}, "losses": losses, "before": before,
              "after": examine(cfg, model, reader, test), "wall_seconds": round(time.time() - started, 1), "hardware": hardware(),
              "commit": commit()}
    for kind, m in report["after"].items():
        print(f"{kind:32} {before[kind]['accuracy']:.3f} -> {m['accuracy']:.3f} [{m['interval'][0]:.3f}, {m['interval'][1]:.3f}]  "
              f"n {m['n']}, without an answer {m['unparsed']:.3f}")
    out = Path(cfg.out) if cfg.out else ROOT / "runs" / "ockr_real"
    (save_adapter(model, out / "adapter") if cfg.lora_rank else save_pretrained(model, out / "model", tokenizer))
    write_json(out / "ockr_real.json", json.loads(json.dumps(report)))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; wrote {out.name}/ockr_real.json")
    return report


def main(cfg: Config) -> dict:
    allowed = {"stage": ("check", "train", "build"), "task": TASKS, "level": ("simple", "hard"), "setting": SETTINGS, "lang": LANGUAGES,
               "scoring": ("generate", "candidates"), "chat_template": ("auto", "llama2", "plain"), "dtype": ("float32", "bfloat16")}
    for flag, values in allowed.items():
        if getattr(cfg, flag) not in values:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(cfg, flag)!r} is not known: give {', '.join(values)}")
    if (cfg.task, cfg.level) not in ROWS or ROWS[cfg.task, cfg.level][SETTINGS.index(cfg.setting)] is None:
        raise InputError(f"--task {cfg.task!r} has no published data for --setting {cfg.setting} at --level {cfg.level}")
    if cfg.scoring == "candidates" and cfg.setting == "cot":
        raise InputError("--scoring candidates has no chain of thought to score: use --scoring generate with --setting cot")
    if cfg.steps < 1 or cfg.batch < 1 or cfg.micro_batch < 1:
        raise InputError(f"--steps {cfg.steps}, --batch {cfg.batch} and --micro-batch {cfg.micro_batch} must be at least 1")
    return {"check": check, "train": train, "build": write_files}[cfg.stage](cfg)


if __name__ == "__main__":
    cli(main, Config)
