"""OCKR on the published files (https://github.com/NJUNLP/ID-OCKR), with a real checkpoint: LoRA as
in the paper, or all weights.

Beside every target stands its control in context: the same questions with the reference sentences
of both premises in front. A target at chance of a model that fails there too says nothing about
what it has learned: SmolLM2-135M, for one, says Yes to everything, with both facts in its prompt.

Run     python methods/real/ockr.py --stage check --data ID-OCKR
            # reads every file: counts, defects with row numbers
        python methods/real/ockr.py --checkpoint DIR --data ID-OCKR --task "A+A To R" --setting cot
            # paper: LLaMA2-13B-chat; --dtype bfloat16: 2 bytes a frozen weight, 26 GB, 7B 14 GB
        torchrun --nproc-per-node 8 methods/real/ockr.py --checkpoint DIR --data ID-OCKR \
            --dtype bfloat16 --activation-checkpointing    # as much on each of 8 GPUs, which split
            # the batch; with --fsdp an eighth (all of it while questions are answered)
        ... --lora-rank 0 --lr 4e-5 --batch 64 --fsdp      # all weights: 16 bytes a weight over 8
            # GPUs, 7B: 14 GB on each (28 GB more while questions are answered)
        python methods/real/ockr.py --stage build --out DIR
            # our own world at the published size, in the published format
Honest  - The authors' evaluation code is not released: the scorers of methods/ockr.py are the
          definition here.
        - Known defects of the files are reported and kept; --clean leaves them out.
        - `build` has the published counts. First paraphrases of questions and answers are the
          published ones; the other nine are ours, and so are hints and requests to translate
          ("Before you answer, name somebody ...", "Translate into Clone."). The published "not
          grandparents" probes of hard R+R are 200 pairs that are never trained, ours are trained.
        - AdamW has betas (.9, .95), the authors' trainer (.9, .999).
        - results/ockr_real.json: two runs with all weights of a checkpoint of 0.26M parameters
          (karpathy/tinyllamas' stories260K). A+A separate knows its premises (100%, 95%) and
          answers .49 [.44, .54] of 400 targets; with both premises in the prompt .49 as well. So
          its targets say nothing: it cannot compare two years. Nor can it do A+R in its prompt
          (.00), whose relations it has not learned either (Yes .01, No .98).
"""

import json
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from methods.ockr import answer_loss, is_right, parse, share
from methods.ockr_tasks import FIRST, PATTERNS, SECOND, SETTINGS, BirthYears, Row, Style, build
from minilm import InputError
from minilm.chat import load_chat_template, render_chat
from minilm.claims import wilson
from minilm.data import (
    IGNORE,
    batches,
    generator,
    prompt_masked,
    read_json,
    write_atomically,
    write_json,
)
from minilm.evaluate import continuation_logprobs
from minilm.generate import generate, stop_ids
from minilm.lora import add_lora, save_adapter
from minilm.results import ROOT, check_range, cli, commit, hardware, progress
from minilm.training import (
    autocast,
    my_parts,
    is_chief,
    join,
    make_optimizers,
    mean_over_processes,
    place,
    schedule,
    set_lr,
    share_out,
    this_world,
    together,
    update,
)
from minilm.weights import load_pretrained, save_pretrained


@dataclass(frozen=True)
class Config:
    stage: str = "train"  # check: read all files; train: fine-tune and test; build: write our own
    data: str = ""  # folder of the published files (a part of them will do)
    checkpoint: str = ""  # Hugging Face folder
    task: str = "A+A To R"  # A+A To R, A+R To A, R+R To R or Cross-Lingual
    level: str = "simple"  # simple or hard
    setting: str = "separate"  # separate, adjacent, crd (complete reasoning data) or cot (chains)
    lang: str = "DE"  # Cross-Lingual: AR DE FR HE IT JA PL RU ZH
    chat_template: str = "auto"  # the checkpoint's own, else plain; llama2: [INST] ..; plain: \n
    scoring: str = "generate"  # generate, or candidates (the more probable of the possible answers)
    clean: bool = False  # leave out the defective rows that `check` reports
    limit: int | None = None  # test only so many random rows of each kind
    before: bool = True  # test the checkpoint before it is trained, too
    save: bool = True  # write the adapter, or (--lora-rank 0) the model
    lora_rank: int = 128  # 0: train all weights (the paper: --lr 4e-5 --batch 64)
    lora_alpha: float = 16.0  # scale of the adapters is alpha / rank
    lora_dropout: float = 0.05  # on the adapters' input
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")  # layers with an adapter
    lr: float = 4e-4  # peak, cosine, no warm-up (the paper: from 2e-4, 4e-4, 8e-4)
    steps: int = 300  # optimizer steps
    batch: int = 256  # rows per step
    micro_batch: int = 8  # rows at a time
    dtype: str = "float32"  # float32 or bfloat16: of frozen weights and of the arithmetic
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory
    fsdp: bool = False  # torchrun: each process holds a share of the weights (FSDP2), not all (DDP)
    device: str = "auto"  # cuda, cpu, mps
    seed: int = 0  # order, adapters
    out: str | None = None  # folder for results (default runs/ockr_real; build needs one)


LANGUAGES = ("AR", "DE", "FR", "HE", "IT", "JA", "PL", "RU", "ZH")
TASKS = (*PATTERNS.values(), "Cross-Lingual")
FOLDERS = {
    "separate": ("Basic OCKR", "Separate"),
    "adjacent": ("Basic OCKR", "Adjacent"),
    "crd": ("Complete-Reason-Data", "CompleteReasonData"),
    "cot": ("Chain-of-Thought", "Cot"),
}
ROWS = {  # in separate, adjacent, crd, cot, test
    ("A+A To R", "simple"): (3000, 7000, 8200, 10200, 620),
    ("A+A To R", "hard"): (2960, 6960, None, None, 600),
    ("A+R To A", "simple"): (4200, 8200, 10200, 6200, 620),
    ("A+R To A", "hard"): (4200, 8200, None, None, 620),
    ("R+R To R", "simple"): (8000, 12000, 12000, 12000, 1200),
    ("R+R To R", "hard"): (8000, 12000, None, None, 1200),
    ("Cross-Lingual", "simple"): (4200, 2200, None, None, 600),
}


# --- data


def paths(task: str, level: str, setting: str, lang: str = "") -> tuple[str, str]:
    """(training file, test file) below the data folder, as published ("Seperate" included)."""
    if task == "Cross-Lingual":
        folder = "Seperate" if setting == "separate" else "Adjacent"
        train = f"Cross-Lingual/{folder}/Train/{lang}.json"
        return train, f"Cross-Lingual/Seperate/Test/{lang}.jsonl"
    folder, name = FOLDERS[setting]
    test = "testCot" if setting == "cot" else "test"
    return f"{folder}/{task}({level},{name}).json", f"Test/{task}({level},{test}).jsonl"


def read_rows(file: Path, test: bool = False) -> list[Row]:
    """One JSON object per line with exactly the keys prompt, input, answer. In tests the tags
    [[label:...]][[type:...]] are taken out of the answer."""
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: --data must be the published files' folder")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not UTF-8 text (byte {error.start}): download it again"
        ) from None
    rows = []
    lines = text.removesuffix("\n").split("\n") if text else []  # (not at U+2028, as splitlines)
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
        value = read_line(line, where)
        if test:
            rows.append(test_row(value, where, foreign="Cross-Lingual" in file.parts))
        else:
            rows.append(Row(value["prompt"], value["answer"], value["input"]))
    if not rows:
        raise InputError(f"{file} is empty: download it again")
    return rows


def read_line(line: str, where: str) -> dict:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        value = None
    kinds = {k: type(v) for k, v in value.items()} if isinstance(value, dict) else {}
    if kinds != dict.fromkeys(("prompt", "input", "answer"), str):
        raise InputError(
            f"{where}: a JSON object with the texts prompt, input and answer is needed (one a "
            "line, no array)"
        )
    return value


def test_row(value: dict, where: str, foreign: bool) -> Row:
    """`targe` (so spelled) is the target, but in the cross-lingual files it marks translations, and
    the target is the question in the other language."""
    found = re.findall(r"\[\[([^:\]]*):([^\]]*)\]\]", value["answer"])
    tags = {}
    for name, content in found:  # (200 rows of R+R's testCot repeat [[A:..]][[B:..]])
        tags.setdefault(name, content)
    gold = tags.get("label", tags.get("continent", ""))
    kind = tags.get("type", "")
    if not (gold and kind):
        raise InputError(
            f"{where}: a test row needs [[label:...]] (or continent) and [[type:...]] in its answer"
        )
    year = "birth" in kind and kind.rstrip(")").endswith("year")
    if year and not re.fullmatch(r"(19|20)\d\d", gold):
        raise InputError(f"{where}: the label {gold!r} of a question for a year is no year")
    if foreign:
        abroad = re.match(r"\(x[A-Z]{2},", kind)
        kind = "translation" if kind == "targe" else "target" if abroad else kind
    elif kind == "targe":
        kind = "target"
    return Row(value["prompt"], re.sub(r"\[\[.*", "", value["answer"]), value["input"], gold, kind)


def names(text: str) -> list[str]:
    """Names of persons, which have two or more parts: "Did EclipseQuiver ..." -> [EclipseQuiver]"""
    return re.findall(r"(?:[A-Z][a-z]+){2,}", text)


def speaks_of_others(row: Row) -> bool:
    """Is AmberFern older than ..? When was HavenGrove born? -> ... OceanMist was born in 2010.

    Not a chain of thought: its answer names a third person by design."""
    if row.input or "Therefore" in row.answer or not names(row.prompt):
        return False
    return set(names(row.prompt)) != set(names(row.answer))


def compares_with_itself(row: Row) -> bool:
    """Did AmberFern and AmberFern share the same birth year?

    Not a chain, whose hint repeats a name: Did AmberFern and JadePath share ..? Use the birth year
    of somebody who was born in the same year as AmberFern. Nor AmberFern(German: ...)."""
    if row.prompt.count("?") != 1 or "(" in row.prompt or "Therefore" in row.answer:
        return False
    return len(names(row.prompt)) > 1 == len(set(names(row.prompt)))


def defects(train: list[Row], test: list[Row]) -> dict[str, list[int]]:
    """What is wrong with the published rows -> line numbers, from 1 (of the test file where it says
    so)."""
    trained = {(row.prompt, row.input) for row in train}
    seen = set()
    repeated = []
    for number, row in enumerate(train, 1):
        if row in seen:
            repeated.append(number)
        seen.add(row)
    others = list(map(speaks_of_others, train))
    itself = list(map(compares_with_itself, train))
    asked = [row.kind == "target" and (row.prompt, row.input) in trained for row in test]
    return {
        "the answer speaks of another person than the question": where(others),
        "a person is compared with itself": where(itself),
        "the row is a copy of an earlier one": repeated,
        "test file: the target's question is trained, for another person": where(asked),
    }


def where(flags) -> list[int]:
    return [number for number, flag in enumerate(flags, 1) if flag]


def without_defects(train: list[Row], test: list[Row], found: dict) -> tuple[list[Row], list[Row]]:
    bad = {"train": set(), "test": set()}
    for what, numbers in found.items():
        bad["test" if what.startswith("test") else "train"].update(numbers)
    kept = [row for n, row in enumerate(train, 1) if n not in bad["train"]]
    return kept, [row for n, row in enumerate(test, 1) if n not in bad["test"]]


# --- the control: both premises in the prompt


def in_context(targets: Sequence[Row], test: Sequence[Row], train: Sequence[Row]) -> list[Row]:
    """The same questions with the reference sentences of both premises in front, as the test has
    them, else as they are trained (R+R hard does not ask for who is no grandparent)."""
    premises = [row for row in test if row.kind != "target"]
    for row in train:
        if row.prompt.count("?") == 1 and "Therefore" not in row.answer:
            premises.append(row._replace(label=parse(row.answer, "Yes") or row.label))
    about = {}  # persons -> the first premise that names them and nobody else
    for row in premises:
        about.setdefault(frozenset(names(row.prompt)), row)
    translations = [row for row in test if row.kind == "translation"]
    rows = []
    for target in targets:
        pair = premises_of(target, about)
        if translations:
            pair = premises_abroad(target, about, translations)
        if pair:
            prompt = " ".join([*pair, target.prompt])
            rows.append(target._replace(prompt=prompt, kind="in context"))
    return rows


def premises_of(target: Row, about: dict[frozenset, Row]) -> list[str]:
    """Two sentences, or none: the years of both persons (A+A), or somebody related to the first
    who leads on to a year (A+R) or to the second person (R+R)."""
    asked = list(dict.fromkeys(names(target.prompt)))
    years = [about.get(frozenset([name])) for name in asked]
    if len(asked) == 2 and all(years):
        return [row.answer for row in years]
    for pair, row in about.items():
        if len(pair) == 2 and row.label == "Yes" and asked and asked[0] in pair:
            onward = about.get((pair - {asked[0]}) | set(asked[1:]))
            if onward:
                return [row.answer, onward.answer]
    return []


def premises_abroad(target: Row, about: dict, translations: Sequence[Row]) -> list[str]:
    """Cross-lingual: the English year of the person whose translated name is asked for, and the
    translation, as its question and answer. (Some persons share one: the year tells them apart.)"""
    for row in translations:
        year = about.get(frozenset([row.input]))
        if row.label in target.prompt and year and target.label in year.answer:
            return [year.answer, f"{row.prompt} {row.input} {row.answer}"]
    return []


# --- check: read every file


def check(cfg: Config) -> dict:
    """Reads every published file that is there: counts against the table, and defects."""
    root = Path(cfg.data)
    if not cfg.data or not root.is_dir():
        raise FileNotFoundError(
            f"--data {cfg.data or '(none)'}: no such folder; give the folder of the published files"
        )
    report = {}
    for (task, level), counts in ROWS.items():
        for setting, count in zip(SETTINGS, counts):
            for lang in LANGUAGES if task == "Cross-Lingual" else ("",):
                train_name, test_name = paths(task, level, setting, lang)
                if count is not None and (root / train_name).exists():
                    found = check_pair(root, train_name, test_name, count, counts[-1])
                    report[train_name] = found
    if not report:
        example = paths("A+A To R", "simple", "separate")[0]
        raise InputError(f"{root} holds none of the published files (for example {example})")
    return report


def check_pair(root: Path, train_name: str, test_name: str, count: int, test_count: int) -> dict:
    train = read_rows(root / train_name)
    test = read_rows(root / test_name, True) if (root / test_name).exists() else []
    found = {what: lines for what, lines in defects(train, test).items() if lines}
    as_published = len(train) == count and len(test) in (0, test_count)
    note = "" if as_published else f"  EXPECTED {count} and {test_count}"
    print(f"{train_name}: {len(train)} rows, test {len(test) or 'file not here'}{note}")
    for what, numbers in found.items():
        shown = ", ".join(map(str, numbers[:8]))
        print(f"    {len(numbers)} x {what}: lines {shown}{' ...' if len(numbers) > 8 else ''}")
    return {
        "rows": len(train),
        "expected": count,
        "test": len(test),
        "expected test": test_count,
        "kinds": dict(Counter(row.kind for row in test)),
        "defects": found,
    }


# --- build: the paper's size


def write_rows(file: Path, rows: list[Row]) -> None:
    lines = []
    for row in rows:
        value = {"prompt": row.prompt, "input": row.input, "answer": row.answer}
        lines.append(json.dumps(value, ensure_ascii=False) + "\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda path: path.write_text("".join(lines), encoding="utf-8"))


def write_files(cfg: Config) -> dict:
    """All seven tasks with 10 X and 10 Y for each of 20 years, ten paraphrases; the second language
    is Clone, its file CL."""
    if not cfg.out:
        raise InputError("--stage build needs --out, a folder for the files")
    every = [first + second for first in FIRST for second in SECOND]
    order = torch.randperm(len(every), generator=generator(cfg.seed, "names")).tolist()
    style = Style(**read_json(Path(__file__).with_name("ockr_sentences.json")))
    world = BirthYears([every[i] for i in order], 10, style, str(cfg.seed))
    codes = {published: code for code, published in PATTERNS.items()}
    report = {}
    for (task, level), counts in ROWS.items():
        code = codes.get(task, "xling") + ("-hard" if level == "hard" else "")
        for setting, count in zip(SETTINGS, counts):
            if count is None:
                continue
            train, test = build(world, code, setting)
            tagged = [with_tags(row, code) for row in test]
            wanted = (count, counts[-1])
            both = zip(paths(task, level, setting, "CL"), (train, tagged), wanted)
            for name, rows, published in both:
                write_rows(Path(cfg.out) / name, rows)
                report[name] = len(rows)
                print(f"{len(rows):6} rows (published: {published:6})  {name}")
    return report


def with_tags(row: Row, code: str) -> Row:
    """A test row in the published spelling: targets are `targe`, but across languages it is the
    translations that are."""
    kinds = {"target": "targe"}
    if code == "xling":
        kinds = {"target": "(xCL, birth_year, year)", "translation": "targe"}
    kind = kinds.get(row.kind, row.kind)
    return row._replace(answer=f"{row.answer}[[label:{row.label}]][[type:{kind}]]")


# --- train


class Reader:
    """Prompts and answers as ids, in the checkpoint's own form of conversation."""

    def __init__(self, cfg: Config, tokenizer):
        self.tok = tokenizer
        own = cfg.chat_template == "auto"
        self.template = load_chat_template(cfg.checkpoint) if own else None
        self.llama2 = cfg.chat_template == "llama2"
        self.bos = [tokenizer.bos_id] if tokenizer.add_bos else []  # as its own file asks for

    def prompt(self, row: Row) -> list[int]:
        text = f"{row.prompt}\n{row.input}" if row.input else row.prompt
        if self.template:
            return render_chat(self.template, [{"role": "user", "content": text}], self.tok)
        return self.bos + self.tok.encode(f"[INST] {text} [/INST]" if self.llama2 else f"{text}\n")

    def example(self, row: Row) -> tuple[list[int], list[int]]:
        return self.prompt(row), [*self.tok.encode(row.answer), self.tok.eos_id]


def load(cfg: Config, device: torch.device):
    """-> (model, tokenizer). Weights that are trained are float32: bfloat16 has no room for a small
    update (at --lr 4e-5 nine weights in ten keep their bits). Frozen ones have --dtype."""
    dtype = getattr(torch, cfg.dtype) if cfg.lora_rank else torch.float32
    where = "meta" if cfg.fsdp else device
    model, tokenizer = load_pretrained(cfg.checkpoint, dtype=dtype, device=where)
    if tokenizer is None or tokenizer.eos_id is None:
        raise InputError(
            f"{cfg.checkpoint} has no tokenizer with an end-of-text token: give a folder with "
            "tokenizer.json"
        )
    if cfg.lora_rank:
        add_lora(
            model,
            rank=cfg.lora_rank,
            alpha=cfg.lora_alpha,
            dropout=cfg.lora_dropout,
            targets=cfg.lora_targets,
            generator=generator(cfg.seed, "lora"),
        )
    model.activation_checkpointing = cfg.activation_checkpointing
    return place(model, device, cfg.fsdp), tokenizer


def fine_tune(cfg: Config, model, examples: list, device: torch.device) -> list[float]:
    """cfg.steps steps of cfg.batch rows -> losses; each is the mean over the answer tokens of the
    whole batch."""
    optimizers = make_optimizers(model, "adamw", cfg.lr, 0.0)
    step_loss = together(answer_loss, model)
    model.train()
    torch.manual_seed(cfg.seed + this_world().rank)  # (dropout draws from the global generator)
    size = min(cfg.batch, len(examples))
    order = batches(len(examples), size, generator(cfg.seed, "order"), cfg.steps)
    bar = progress(order, "fine-tune", cfg.steps)
    losses = []
    for step, chosen in enumerate(bar):
        set_lr(optimizers, schedule(step, cfg.steps, "cosine", final=0.0))
        rows = [examples[i] for i in chosen.tolist()]
        answers = sum(len(answer) for _, answer in rows)
        total = 0.0
        for part, weight in my_parts(rows, cfg.micro_batch):
            inputs, labels = prompt_masked(part)
            counted = (labels != IGNORE).sum().item() / answers  # of the batch's answer tokens
            with autocast(device, cfg.dtype):
                loss = step_loss(inputs.to(device), labels.to(device)) * counted * weight
            total += loss.item()
            loss.backward()
        update(model, optimizers)
        total = mean_over_processes(total)
        losses.append(total)
        if is_chief() and step % max(1, cfg.steps // 10) == 0:
            bar.write(f"step {step}: loss {total:.3f}")
    model.eval()
    return losses


# --- test


def candidates(reader: Reader, model, rows: list[Row], options: list[str]) -> list[str]:
    """The label whose answer is most probable: the reference up to and including its label, with
    each possible label in its place."""
    pairs = []
    for row in rows:
        start = row.answer[: row.answer.index(row.label)]
        pairs += [(reader.prompt(row), reader.tok.encode(start + option)) for option in options]

    def score(pairs):
        return continuation_logprobs(model, pairs).sum.tolist()

    scores = torch.tensor(share_out(model, pairs, score)).view(len(rows), -1)
    return [options[i] for i in scores.argmax(1).tolist()]


def generated(reader: Reader, model, rows: list[Row], new: int) -> list[str]:
    """Greedy answers of at most `new` tokens, 64 rows at a time."""
    stops = stop_ids(model, reader.tok)

    def answer(mine):
        texts = []
        for at in progress(range(0, len(mine), 64), "answers"):
            prompts = [reader.prompt(row) for row in mine[at : at + 64]]
            for prompt, ids in zip(prompts, generate(model, prompts, new, eos_id=stops)):
                texts.append(reader.tok.decode([t for t in ids[len(prompt) :] if t not in stops]))
        return texts

    return share_out(model, rows, answer)


def examine(cfg: Config, model, reader: Reader, test: list[Row], train: list[Row]) -> dict:
    """Kind of question -> accuracy, Yes and No apart, Wilson interval, share without an answer;
    beside "target" the same questions "in context"."""
    report = {}
    for kind in dict.fromkeys(row.kind for row in test):
        if cfg.scoring == "candidates" and kind == "translation":
            continue
        rows = [row for row in test if row.kind == kind]
        options = sorted({row.label for row in rows})
        order = torch.randperm(len(rows), generator=generator(cfg.seed, f"limit {kind}"))
        rows = [rows[i] for i in order.tolist()[: cfg.limit]]
        report[kind] = score(cfg, model, reader, rows, options)
        context = in_context(rows, test, train) if kind == "target" else []
        if context:
            report["in context"] = score(cfg, model, reader, context, options)
    return report


def score(cfg: Config, model, reader: Reader, rows: list[Row], options: list[str]) -> dict:
    if cfg.scoring == "candidates":
        answers = candidates(reader, model, rows, options)
        right = [answer == row.label for answer, row in zip(answers, rows)]
    else:
        texts = generated(reader, model, rows, 160 if cfg.setting == "cot" else 64)
        answers = [parse(text, row.label) for text, row in zip(texts, rows)]
        right = is_right(rows, texts)
    found = {
        "accuracy": share(right),
        "interval": wilson(sum(right), len(rows)),
        "n": len(rows),
        "unparsed": share([answer is None for answer in answers]),
    }
    for value in ("Yes", "No"):
        own = [ok for ok, row in zip(right, rows) if row.label == value]
        if own:
            found[f"accuracy {value}"] = share(own)
    return found


def show_report(report: dict) -> None:
    """A line a kind: "target   0.470 [0.422, 0.519] (before 0.500)  n 400  Yes 0.165  No 0.775"."""
    for kind, m in report["after"].items():
        words = f"{kind:32} {m['accuracy']:.3f} " + "[{:.3f}, {:.3f}]".format(*m["interval"])
        if report["before"]:
            words += f" (before {report['before'][kind]['accuracy']:.3f})"
        words += f"  n {m['n']}, without an answer {m['unparsed']:.3f}"
        for value in ("Yes", "No"):
            if f"accuracy {value}" in m:
                words += f"  {value} {m[f'accuracy {value}']:.3f}"
        print(words)
    able = report["after"].get("in context")
    if able and able["accuracy"] < 0.9:
        print("With both facts in the prompt the questions are not answered either (.9 needed): "
              "the targets say nothing about what was learned.")


def train(cfg: Config) -> dict:
    started = time.time()
    if not cfg.data or not cfg.checkpoint:
        raise InputError(
            "--stage train needs --data (the published files) and --checkpoint (a Hugging Face "
            "folder)"
        )
    root = Path(cfg.data)
    device = join(cfg)
    train_name, test_name = paths(cfg.task, cfg.level, cfg.setting, cfg.lang)
    rows = read_rows(root / train_name)
    test = read_rows(root / test_name, True)
    found = {what: numbers for what, numbers in defects(rows, test).items() if numbers}
    fate = "left out" if cfg.clean else "kept; see --clean"
    for what, numbers in found.items():
        print(f"{len(numbers)} x {what}: lines {', '.join(map(str, numbers[:5]))} ... ({fate})")
    if cfg.clean:
        rows, test = without_defects(rows, test, found)

    model, tokenizer = load(cfg, device)
    reader = Reader(cfg, tokenizer)
    examples = [reader.example(row) for row in rows]
    prompt, answer = map(tokenizer.decode, examples[0])
    print(f"{len(rows)} training rows; the first, of which only what follows -> is learned:")
    print(f"  {prompt!r} -> {answer!r}")
    before = examine(cfg, model.eval(), reader, test, rows) if cfg.before else {}
    losses = fine_tune(cfg, model, examples, device)
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "config": asdict(cfg),
        "rows": len(rows),
        "defects": {what: len(numbers) for what, numbers in found.items()},
        "losses": losses,
        "before": before,
        "after": examine(cfg, model, reader, test, rows),
        "wall_seconds": round(time.time() - started, 1),
        "hardware": hardware(),
        "commit": commit(),
    }
    show_report(report)
    out = Path(cfg.out) if cfg.out else ROOT / "runs" / "ockr_real"
    if cfg.save and cfg.lora_rank:
        save_adapter(model, out / "adapter")
    elif cfg.save:
        save_pretrained(model, out / "model", tokenizer)
    if is_chief():
        write_json(out / "ockr_real.json", json.loads(json.dumps(report)))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; wrote {out.name}/ockr_real.json")
    return report


# --- main

ALLOWED = {
    "stage": ("check", "train", "build"),
    "task": TASKS,
    "level": ("simple", "hard"),
    "setting": SETTINGS,
    "lang": LANGUAGES,
    "scoring": ("generate", "candidates"),
    "chat_template": ("auto", "llama2", "plain"),
    "dtype": ("float32", "bfloat16"),
}


def main(cfg: Config) -> dict:
    for name, values in ALLOWED.items():
        value = getattr(cfg, name)
        if value not in values:
            typed = name.replace("_", "-")
            raise InputError(f"--{typed} {value!r} is not known: give {', '.join(values)}")
    published = ROWS.get((cfg.task, cfg.level))
    if not published or published[SETTINGS.index(cfg.setting)] is None:
        raise InputError(
            f"--task {cfg.task!r} has no published data for --setting {cfg.setting} at --level "
            f"{cfg.level}: give another setting, or --level simple"
        )
    if cfg.scoring == "candidates" and cfg.setting == "cot":
        raise InputError(
            "--scoring candidates has no chain of thought to score: use --scoring generate with "
            "--setting cot"
        )
    check_range(cfg, "steps batch micro_batch limit", least=1)
    check_range(cfg, "lora_rank seed", least=0)
    check_range(cfg, "lr lora_alpha", above=0)
    check_range(cfg, "lora_dropout", least=0, below=1)
    return {"check": check, "train": train, "build": write_files}[cfg.stage](cfg)


if __name__ == "__main__":
    cli(main, Config)
