"""Spontaneous multilingual learners at real scale: the published tests and question translations,
and a checkpoint of yours.

As in methods/spontaneous_multilingual.py, whose loss, adapter and label masses are used as they
are: tune on translations of task questions from a few languages, without any answer, and test in
all of them. Here a label is a word of several tokens, and S(w) in m(w) = sum of p_v over v in S(w)
are all the tokens that can begin it (`token_set`).

Run     python methods/real/spontaneous_multilingual.py --checkpoint DIR --data DATA --task snli \
            --train-langs zh                    # tune, then test
        ... --arms base                         # score the checkpoint as it is
        ... --arms base qt shuffled mono        # with controls: only then there is a verdict
        ... --target zh                         # translate into Chinese in place of English
        ... --labels local | irrelevant    --analysis lens | pca    --gold local
        ... --shots FILE.json    --dtype bfloat16
Files   DATA: the data of github Shimao-Zhang/LLM-Multilingual-Learner, one JSON array a file:
        ap_emotion/emotion_LL500_test.json, snli/snli_LL600_test.json, paws/paws_LL500_test.json,
        and TASK_LL10k_train_question.json (or without _train). Rows of all languages are aligned.
        Right labels come from the English file: the released Japanese, Bengali and Norwegian SNLI
        labels do not fit the released scorer, which gives a perfect reader 66.7%, 66.7% and 33.3%
        (--gold local keeps that). Examples are the first fitting rows of the test, which then does
        not ask them, or --shots (language -> rows as in the test, aligned, with English).
Honest  - The authors evaluate in 4 bits; here weights are as loaded.
        - They choose among tied labels by a coin; here the first label wins, and ties are counted.
        - Their trainer wraps each row in the model's chat template; here rows are plain text.
        - Only label words compete, so a model that would never answer gets an accuracy as well:
          where the labels hold less than 5% of the probability a line says so.
        - One checkpoint says nothing about others: claims are undecided at best, with an interval
          over questions. None is asked of a base that is not above the largest label's share in
          English, or that never gives one of the labels.
        - A 7B model takes 14 GB with --dtype bfloat16, before activations (--micro-batch,
          --activation-checkpointing): not run by us. On 8 GPUs, which split batch and questions:
          torchrun --nproc-per-node 8 methods/real/spontaneous_multilingual.py --checkpoint DIR \
              --data DATA --dtype bfloat16      # 14 GB on each; with --fsdp 2 while it learns
Shown   results/spontaneous_multilingual_real.json: karpathy/tinyllamas' stories260K on 40 SNLI
        questions in eight languages. The path runs; the scores are chance, as for so small a model
        they must be, and no label has more than 2% of the mass. SmolLM2-135M-Instruct reads English
        (emotion, two examples: .62) and none of the other languages: nothing is there to be woken.
"""

import json
import math
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
import torch

from methods.experiments.spontaneous_multilingual import PAPER, correlations, read_states
from methods.experiments.spontaneous_multilingual import lens as read_layers
from methods.spontaneous_multilingual import add_adapter, label_masses, translation_loss
from minilm import InputError
from minilm.claims import (
    UNDECIDED,
    Claim,
    Verdict,
    View,
    all_of,
    judge,
    key,
    paired_bootstrap,
    print_claims,
    untestable,
    wilson,
)
from minilm.data import batches, generator, read_text
from minilm.lora import save_adapter
from minilm.results import (
    COLORS,
    ROOT,
    Outcome,
    check_range,
    cli,
    new_figure,
    plot_seeds,
    print_metrics,
    progress,
    save_results,
)
from minilm.tokenizer import ByteLevelBPE, Tokenizer
from minilm.training import (
    autocast,
    join,
    my_parts,
    own_tensor,
    place,
    schedule,
    set_lr,
    share_out,
    together,
    update,
    whole,
)
from minilm.weights import load_pretrained

# per language: the prompts' words and the labels
WORDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
FOLDER = {
    "emotion": ("ap_emotion/emotion", 500),
    "snli": ("snli/snli", 600),
    "paws": ("paws/paws", 500),
}
FIELDS = {
    "emotion": ("input",),
    "snli": ("premise", "hypothesis"),
    "paws": ("sentence1", "sentence2"),
}
SHOTS = {  # labels of the examples in a prompt, in this order
    "emotion": (0, 1),
    "snli": (0, 1, 2, 0, 1, 2),
    "paws": (0, 1, 0, 1),
}
INTERVAL = ("mean", "low", "high")  # a lead, and its 95% over questions
SMALL_MASS = 0.05  # below this probability of all labels together a model does not answer


@dataclass(frozen=True)
class Config:
    checkpoint: str  # Hugging Face folder with a tokenizer
    data: str  # the published data: folder with ap_emotion, snli, paws
    task: Literal["emotion", "snli", "paws"] = "emotion"  # what is tested
    arms: tuple[Literal["base", "qt", "shuffled", "mono"], ...] = ("base", "qt")  # as loaded;
    # question translation; its two controls
    train_langs: tuple[str, ...] = ("zh", "it")  # seen languages
    train_task: str | None = None  # task whose questions are translated (default: the tested one)
    target: Literal["en", "zh"] = "en"  # language that questions are translated into
    eval_langs: tuple[str, ...] = ("all",)  # tested languages; all: those whose file is there
    labels: Literal["english", "local", "irrelevant"] = "english"  # that compete: English ones, the
    # language's own, ox and horse
    gold: Literal["english", "local"] = "english"  # where the right labels come from; local: as the
    # released scorer reads them
    shots: str | None = None  # JSON file with the examples (default: rows of the test)
    num_shots: int | None = None  # examples per prompt (default: the paper's 2, 6 or 4)
    limit: int = 0  # test only so many questions (0: all)
    rows: int = 10_000  # translated questions per seen language
    lora_rank: int = 8  # of the adapter on the query and value projections
    lora_alpha: float = 16  # scale = alpha / rank
    lr: float = 5e-5  # peak learning rate of AdamW; 10% warm-up, cosine to 0
    epochs: int = 3  # passes over the rows
    batch: int = 16  # rows per step
    micro_batch: int = 4  # rows, or prompts, at a time
    cutoff: int = 2048  # longest row or prompt in tokens, if the model reads as many
    eval_every: int = 50  # steps between validations; the adapter with the least translation loss
    # on 5% of the rows is kept
    analysis: Literal["none", "lens", "pca"] = "none"  # labels by layer; correlation of pooled
    # states with English
    layer: int | None = None  # layer for pca (default: three quarters of the depth)
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory
    fsdp: bool = False  # torchrun: each process holds a share of the weights (FSDP2), not all (DDP)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; the adapter stays float32
    device: str = "auto"  # cuda where there is one, else cpu
    seeds: tuple[int, ...] = (0,)  # adapter and order
    save: str | None = None  # folder for the adapters (PEFT files)
    out: str | None = None  # folder for the results (default: runs/spontaneous_multilingual_real)


# --- data


def read_value(path: str | Path):
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not JSON (line {error.lineno}: {error.msg}): download it again"
        ) from None


def check_rows(path: str | Path, rows, keys: Sequence[str]) -> list[dict]:
    """Must be one array of objects that have these keys, all texts."""
    needed = ", ".join(keys)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} must hold a JSON array of rows with {needed}")
    for number, row in enumerate(rows):
        for name in keys:
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                raise InputError(f"{path}, row {number}: no text under {name!r}; it needs {needed}")
    return rows


class Questions(NamedTuple):
    """What is asked, aligned over the languages; a class is a place in
    WORDS[language][task]["labels"]."""

    rows: dict[str, list[dict]]  # language -> questions
    shots: dict[str, list[dict]]  # language -> examples
    shot_classes: list[int]
    gold: dict[str, list[int | None]]  # language -> right classes; None: the released scorer does
    # not know the word


def scorer_labels(task: str, language: str) -> list[str]:
    """The label words of the released scorer: the file's, but for SNLI in ja, bn and no."""
    return WORDS[language][task].get("scorer", WORDS[language][task]["labels"])


def test_file(cfg: Config, language: str) -> Path:
    stem, size = FOLDER[cfg.task]
    return Path(cfg.data) / f"{stem}_{language}{size}_test.json"


def read_tests(cfg: Config) -> Questions:
    """Every language's test beside the English one, whose labels are the right ones; warns where
    the local labels contradict them."""
    languages = list(dict.fromkeys(cfg.eval_langs))
    if cfg.eval_langs == ("all",):
        languages = [language for language in WORDS if test_file(cfg, language).exists()]
    if wrong := [language for language in languages if language not in WORDS]:
        raise InputError(f"--eval-langs {wrong[0]}: the paper's languages are {', '.join(WORDS)}")
    rows = {}
    for language in dict.fromkeys(["en", *languages]):
        path = test_file(cfg, language)
        rows[language] = check_rows(path, read_value(path), (*FIELDS[cfg.task], "answer"))
    english = test_file(cfg, "en")
    classes = english_classes(cfg.task, english, rows["en"])
    gold = {language: right_classes(cfg, language, rows[language], classes) for language in rows}
    wanted = list(SHOTS[cfg.task][: cfg.num_shots])
    taken = []
    if cfg.shots:
        shots = read_shots(cfg, rows, len(wanted))
        wanted = english_classes(cfg.task, cfg.shots, shots["en"])
    else:
        taken = first_rows(classes, wanted)
        shots = {language: [local[i] for i in taken] for language, local in rows.items()}
    asked = [i for i in range(len(classes)) if i not in taken][: cfg.limit or None]
    if not asked or not cfg.shots and len(taken) < len(wanted):
        raise InputError(
            f"{english} has {len(classes)} rows, too few for {len(wanted)} examples and a "
            "question: lower --num-shots"
        )

    def pick(table: dict) -> dict:
        return {language: [table[language][i] for i in asked] for language in languages}

    return Questions(pick(rows), shots, wanted, pick(gold))


def english_classes(task: str, file, rows: Sequence[dict]) -> list[int]:
    labels = WORDS["en"][task]["labels"]
    for number, row in enumerate(rows):
        if row["answer"] not in labels:
            known = ", ".join(labels)
            raise InputError(f"{file}, row {number}: label {row['answer']!r} is none of {known}")
    return [labels.index(row["answer"]) for row in rows]


def right_classes(cfg: Config, language: str, rows: Sequence[dict], classes: list[int]) -> list:
    """Those of the English file, or with --gold local the released scorer's reading."""
    path = test_file(cfg, language)
    if len(rows) != len(classes):
        raise InputError(
            f"{path} has {len(rows)} rows, the English file {len(classes)}: they must be aligned"
        )
    known = scorer_labels(cfg.task, language)
    official = [known.index(row["answer"]) if row["answer"] in known else None for row in rows]
    if odd := sum(a != b for a, b in zip(official, classes)):
        print(
            f"warning: {path.name}: read by the released scorer's words ({', '.join(known)}), {odd}"
            f" of {len(classes)} labels contradict the English file; --gold {cfg.gold} is used"
        )
    return official if cfg.gold == "local" else classes


def read_shots(cfg: Config, rows: dict, needed: int) -> dict[str, list[dict]]:
    given = read_value(cfg.shots)
    shots = {}
    for language in rows:
        own = given.get(language, ()) if isinstance(given, dict) else ()
        if len(own) < needed:
            raise InputError(
                f"{cfg.shots} has fewer than {needed} examples for {language}: each tested "
                "language and en need them"
            )
        shots[language] = check_rows(cfg.shots, own, (*FIELDS[cfg.task], "answer"))[:needed]
    return shots


def first_rows(classes: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The first rows with the wanted labels, in this order."""
    taken = []
    for label in wanted:
        fitting = [i for i, c in enumerate(classes) if c == label and i not in taken]
        taken += fitting[:1]
    return taken


def question(task: str, language: str, texts: Sequence[str]) -> str:
    """The task's question, up to the opening quote of its answer.
    Premise: ..\\nHypothesis: ..\\nAnswer: \""""
    words = WORDS[language][task]
    lines = list(texts)
    if "fields" in words:
        lines = [f"{name}: {text}" for name, text in zip(words["fields"], texts)]
    return "\n".join([*lines, f'{words["slot"]}: "'])


class Prompts(NamedTuple):
    ids: list[list[int]]
    cut: int  # questions that were cut short to fit


def prompt_ids(
    cfg: Config,
    tok: Tokenizer,
    tests: Questions,
    language: str,
    words: Sequence[str],
    room: int,
    common: str = "",
) -> Prompts:
    """Few-shot prompts in one language, labels from `words`. What is too long for `room` is cut in
    the question's own texts, never at the end. `common`: a beginning of all the words, which
    decides nothing, behind the quote."""
    fields = FIELDS[cfg.task]
    shown = ""
    for shot, label in zip(tests.shots[language], tests.shot_classes):
        texts = [shot[field] for field in fields]
        shown += f'{question(cfg.task, language, texts)}{words[label]}"\n'

    def encode(row: dict, characters: int | None = None, label: str = "") -> list[int]:
        texts = [row[field][:characters] for field in fields]
        asked = question(cfg.task, language, texts)
        return tok.encode(shown + asked + common + label, bos=tok.add_bos)

    first = encode(tests.rows[language][0])
    for word in words:
        answered = encode(tests.rows[language][0], None, word.removeprefix(common) + '"')
        if answered[: len(first)] != first:
            raise InputError(
                f"the tokenizer joins the quote and the label {word!r}: its first token cannot be "
                "scored after a quote"
            )
    prompts = []
    cut = 0
    for row in tests.rows[language]:
        ids = encode(row)
        if len(ids) > room:
            ids = encode(row, longest_that_fits(encode, row, fields, room, language))
            cut += 1
        prompts.append(ids)
    return Prompts(prompts, cut)


def longest_that_fits(encode, row: dict, fields: Sequence[str], room: int, language: str) -> int:
    """How many characters of each text the prompt can hold: found by halving."""
    longest = max(len(row[field]) for field in fields)
    fitting = bisect_right(range(longest), room, key=lambda n: len(encode(row, n)))
    if not fitting:
        raise InputError(
            f"{language}: the examples alone leave no room for a question in {room} tokens: lower "
            "--num-shots"
        )
    return fitting - 1


# --- question translations


def translation_texts(cfg: Config, arm: str) -> list[tuple[str, str]]:
    """(input, answer) of every row. The published files translate into English; into Chinese the
    aligned files are combined, as in the released en2zh, ja2zh ones. shuffled: each answer is the
    next row's. mono: the target language to itself."""
    if cfg.train_task is not None and cfg.train_task not in FOLDER:
        raise InputError(f"--train-task {cfg.train_task}: give one of {', '.join(FOLDER)}")
    for language in cfg.train_langs:
        if language not in WORDS or language == cfg.target:
            raise InputError(
                f"--train-langs {language}: give languages of the paper other than --target "
                f"{cfg.target}"
            )
    answers = questions_in(cfg, cfg.target)
    told = answers[1:] + answers[:1] if arm == "shuffled" else answers
    pairs = []
    for language in cfg.train_langs:
        source = cfg.target if arm == "mono" else language
        asked = questions_in(cfg, source)
        if len(asked) != len(answers):
            raise InputError(
                f"the translation files of {source} and {cfg.target} have {len(asked)} and "
                f"{len(answers)} rows: not aligned"
            )
        names = WORDS[source]["name"], WORDS[cfg.target]["name"]
        ask = "\nTranslate the input from {} to {}:\n".format(*names)
        pairs += [(q + ask, a) for q, a in zip(asked, told)]
    return pairs


def questions_in(cfg: Config, language: str) -> list[str]:
    """Up to the opening quote, in the order of the files."""
    if language == "en":  # English ones are the answers of any language's file
        others = [x for x in (*cfg.train_langs, cfg.target) if x != "en"]
        return [row["answer"] for row in translation_file(cfg, others[0] if others else "en")]
    texts = [row["input"] for row in translation_file(cfg, language)]
    return [text.rstrip("\n").rpartition("\n")[0] for text in texts]  # less the last line


def translation_file(cfg: Config, language: str) -> list[dict]:
    task = cfg.train_task or cfg.task
    stem = f"{Path(cfg.data) / FOLDER[task][0]}_{language}10k"
    for path in (Path(f"{stem}_train_question.json"), Path(f"{stem}_question.json")):
        if path.exists():
            return read_translations(path, task)[: cfg.rows]
    raise FileNotFoundError(
        f"{stem}_train_question.json is missing (or without _train): --train-langs {language} "
        "needs it"
    )


def read_translations(path: Path, task: str) -> list[dict]:
    """The published rows {input, answer}. An answer must end in an opened answer slot: what stands
    behind the quote would be a label."""
    rows = check_rows(path, read_value(path), ("input", "answer"))
    slots = {words[task]["slot"] for words in WORDS.values()}
    for number, row in enumerate(rows):
        last = row["answer"].rpartition("\n")[2]
        opened = last.endswith(': "') and last[:-3] in slots
        if not opened or "Translate the input from" not in row["input"]:
            raise InputError(
                f"{path}, row {number}: the answer must be a question that ends at its opening "
                "quote (a label behind it would leak), the input must ask to translate; it ends "
                f"in {last[-30:]!r}"
            )
    return rows


# --- the label scorer


def token_set(tok: Tokenizer, word: str) -> set[int]:
    """S(w): the tokens that w can begin with. A token that is a prefix u of w, or "\u2581" + u
    (SentencePiece's space mark); the byte token <0xHH> of w's first byte if w begins outside ASCII;
    for byte-level vocabularies also the first token of every encoded prefix. Case counts.

    With the vocabulary p, \u2581p, pos, Pos, os: S("positive") = {p, \u2581p, pos}."""
    prefixes = [word[:n] for n in range(1, len(word) + 1)]
    pieces = [*prefixes, *("\u2581" + u for u in prefixes)]
    if word and not word[0].isascii():
        pieces.append(f"<0x{word.encode()[0]:02X}>")
    found = {tok.vocab[piece] for piece in pieces if piece in tok.vocab}
    if isinstance(tok, ByteLevelBPE):
        found |= {tok.encode(u)[0] for u in prefixes}
    return found


def token_sets(tok: Tokenizer, words: list[str]) -> list[set[int]]:
    """S(w) of every label, behind the beginning that all of them share. A piece of a character that
    begins several labels tells nothing and counts for none (the first byte of two Russian words).
    A whole character that does (the n of negative and neutral), or a label without tokens, is an
    InputError."""
    sets = [token_set(tok, word.removeprefix(commonprefix(words))) for word in words]
    counts = Counter(i for tokens in sets for i in tokens)
    several = {i for i, n in counts.items() if n > 1}
    for i in sorted(several):
        text = tok.token_bytes(i).decode("utf-8", errors="replace")
        if "\ufffd" not in text:
            raise InputError(
                f"labels {', '.join(words)}: more than one can begin with the token {text!r}; use "
                "--labels english"
            )
    for word, tokens in zip(words, sets):
        if not tokens - several:
            raise InputError(
                f"no token of the vocabulary begins the label {word!r} alone; use --labels english"
            )
    return [tokens - several for tokens in sets]


# --- train


def train(
    cfg: Config, model, tok: Tokenizer, texts: Sequence[tuple[str, str]], seed: int
) -> list[tuple[int, float]]:
    """LoRA on the translations, EOS behind each; 5% of the rows are held out, and the adapter with
    the least loss on them is kept (task accuracy is never looked at) -> (step, validation loss)."""
    held, rest = split_rows(cfg, model, tok, texts, seed)
    device = model.embed.weight.device
    add_adapter(model, cfg.lora_rank, cfg.lora_alpha, generator(seed, "lora"))
    learned = [p for p in model.parameters() if p.requires_grad]
    step_loss = together(translation_loss, model)
    optimizer = torch.optim.AdamW(learned, cfg.lr, weight_decay=0.0)
    steps = cfg.epochs * -(-len(rest) // cfg.batch)
    order = batches(len(rest), cfg.batch, generator(seed, "order"), steps)
    history = []
    least = math.inf
    for step, chosen in enumerate(progress(order, "tuning", steps), 1):
        set_lr([optimizer], schedule(step - 1, steps, warmup=steps // 10, final=0.0))
        group = [rest[i] for i in chosen.tolist()]
        for part, weight in my_parts(group, cfg.micro_batch):
            share = answer_tokens(part) / answer_tokens(group) * weight
            with autocast(device, cfg.dtype):
                (step_loss(part) * share).backward()
        update(model, [optimizer])
        if step % cfg.eval_every == 0 or step == steps:
            loss = loss_on(cfg, model, held)
            history.append((step, loss))
            if loss < least:
                least = loss
                best = [own_tensor(p).cpu().clone() for p in learned]
    with torch.no_grad():
        for p, kept in zip(learned, best):
            own_tensor(p).copy_(kept)
    return history


def split_rows(cfg: Config, model, tok: Tokenizer, texts, seed: int) -> tuple[list, list]:
    """The rows that fit, as ids: 5% held out, and the rest."""
    if tok.eos_id is None:
        raise InputError(
            f"{cfg.checkpoint}: the tokenizer names no EOS token, which must end every answer"
        )
    room = min(cfg.cutoff, model.config.max_position_embeddings)
    rows = []
    for q, a in texts:
        rows.append((tok.encode(q, bos=tok.add_bos), [*tok.encode(a), tok.eos_id]))
    short = [(q, a) for q, a in rows if len(q) + len(a) <= room]
    if len(short) < 20:
        raise InputError(
            f"only {len(short)} of {len(rows)} rows fit into {room} tokens, at least 20 are "
            "needed: raise --cutoff or --rows"
        )
    order = torch.randperm(len(short), generator=generator(seed, "held out")).tolist()
    shuffled = [short[i] for i in order]
    held, rest = shuffled[: len(short) // 20], shuffled[len(short) // 20 :]
    print(
        f"{len(rest)} rows to train on, {len(held)} held out, {len(rows) - len(short)} longer than "
        f"{room} tokens. The first (what is in brackets is learned):\n{texts[0][0]}[{texts[0][1]}]"
    )
    return held, rest


def parts_of(rows: Sequence, size: int) -> list:
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def answer_tokens(rows: Sequence) -> int:
    """What the loss is a mean over: rows of a batch weigh by these, and not all alike."""
    return sum(len(answer) for _, answer in rows)


@torch.no_grad()
def loss_on(cfg: Config, model, rows: Sequence) -> float:
    """Mean loss per answer token."""

    def add_up(parts: list) -> list[float]:
        with autocast(model.embed.weight.device, cfg.dtype):
            return [translation_loss(model, part).item() * answer_tokens(part) for part in parts]

    total = 0.0
    for loss in share_out(model, parts_of(rows, cfg.micro_batch), add_up):
        total += loss
    return total / answer_tokens(rows)


# --- evaluate


class Measured(NamedTuple):
    metrics: dict
    series: dict
    right: dict[str, list[bool]]  # language -> of every question


def competing(cfg: Config, language: str) -> list[str]:
    labels = WORDS["en"][cfg.task]["labels"]
    if cfg.labels == "english":
        return labels
    if cfg.labels == "local":
        return scorer_labels(cfg.task, language)
    if len(labels) != 2:
        raise InputError(
            f"--labels irrelevant has two words, ox and horse; {cfg.task} has {len(labels)} labels"
        )
    return ["ox", "horse"]


def measure(cfg: Config, model, tok: Tokenizer, tests: Questions) -> Measured:
    """Per language: accuracy, the probability of all labels together (mass), recall of every label,
    ties; means over groups of languages. `largest` is the share of the commonest label."""
    layer = round(0.75 * len(model.layers)) if cfg.layer is None else cfg.layer
    if not 0 <= layer <= len(model.layers):
        raise InputError(f"--layer {layer}: the model has layers 0 to {len(model.layers)}")
    room = min(cfg.cutoff, model.config.max_position_embeddings)
    found = Measured({}, {}, {})
    pooled = {}
    lengths = {}
    for language in progress(tests.rows, "languages"):
        words = competing(cfg, language)
        prompts = prompt_ids(cfg, tok, tests, language, words, room, commonprefix(words))
        sets = token_sets(tok, words)

        def ask(mine: list, sets=sets) -> torch.Tensor:
            return label_masses(model, mine, sets, cfg.micro_batch)

        m = torch.stack(share_out(model, prompts.ids, ask))
        found.metrics["cut", language] = prompts.cut
        score(cfg, m, tests.gold[language], language, found)
        if cfg.analysis == "none":
            continue
        local = prompt_ids(cfg, tok, tests, language, scorer_labels(cfg.task, language), room)
        with whole(model):
            states = read_states(model, local.ids, cfg.micro_batch)
            pooled[language] = states.mean[layer]
            lengths[language] = states.lengths
            if cfg.analysis == "lens" and language != "en":
                kept, line = lens(model, tok, states.last, tests.gold[language], cfg.task, language)
                found.metrics["lens kept", language] = kept
                found.series["lens", language] = line
    for group, languages in groups_of(cfg, tests.rows).items():
        values = [found.metrics["acc", language] for language in languages]
        found.metrics["acc", group] = fmean(values)
    if cfg.analysis == "pca" and "en" in pooled:
        pooled = {"en": pooled["en"], **pooled}  # English first
        for language, (r, partial) in correlations(pooled, lengths).items():
            found.metrics["r", language] = r
            found.metrics["partial r", language] = partial
    return found


def score(cfg: Config, m: torch.Tensor, gold: Sequence, language: str, found: Measured) -> None:
    """m [n, W]: label masses of the questions."""
    answers = m.argmax(1).tolist()  # ties go to the first label
    right = [a == b for a, b in zip(answers, gold)]
    highest = m.max(1, keepdim=True).values
    counts = Counter(gold)
    found.right[language] = right
    found.metrics["acc", language] = fmean(right)
    found.metrics["mass", language] = m.sum(1).mean().item()
    found.metrics["ties", language] = ((m == highest).sum(1) > 1).sum().item()
    found.metrics["largest", language] = max(counts.values()) / len(gold)
    for c, label in enumerate(WORDS["en"][cfg.task]["labels"]):
        hits = sum(hit for hit, g in zip(right, gold) if g == c)
        found.metrics["recall", language, label] = hits / max(1, counts[c])


def groups_of(cfg: Config, tested: Sequence[str]) -> dict[str, list[str]]:
    """seen: read in tuning. English is neither seen nor unseen: it is the language of the answers,
    and what a gain is carried over from."""
    taught = {*cfg.train_langs, cfg.target}
    groups = {
        "seen": [x for x in tested if x in taught and x != "en"],
        "unseen": [x for x in tested if x not in taught and x != "en"],
        "all": list(tested),
        "high-resource": [x for x in tested if WORDS[x]["resource"] == "high"],
        "low-resource": [x for x in tested if WORDS[x]["resource"] == "low"],
    }
    return {name: languages for name, languages in groups.items() if languages}


def lens(model, tok: Tokenizer, last, gold: Sequence, task: str, language: str) -> tuple:
    """By layer, the mean mass of the right label's English word, over the questions whose English
    and local tokens differ -> how many these are, (x, y)."""
    english = [token_set(tok, word) for word in WORDS["en"][task]["labels"]]
    local = [token_set(tok, word) for word in scorer_labels(task, language)]
    apart = [bool(a and b) and not a & b for a, b in zip(english, local)]
    kept = [i for i, c in enumerate(gold) if c is not None and apart[c]]
    if not kept:
        return 0, ((), ())
    right = torch.tensor([[gold[i]] for i in kept])
    layers = read_layers(model, last[:, kept], english)
    values = [m.gather(1, right).mean().item() for m in layers]
    return len(kept), (range(len(values)), values)


# --- one seed


def load(cfg: Config, learns: bool):
    device = join(cfg)
    where = "meta" if cfg.fsdp else device
    model, tok = load_pretrained(cfg.checkpoint, getattr(torch, cfg.dtype), where)
    if tok is None:
        raise InputError(
            f"{cfg.checkpoint} has no tokenizer.json, which is needed to find a label's tokens"
        )
    if cfg.fsdp and learns:  # before the model is sharded (see add_lora)
        add_adapter(model, cfg.lora_rank, cfg.lora_alpha, generator(0, "lora"))
    return place(model, device, cfg.fsdp), tok


def run(cfg: Config, seed: int) -> Outcome:
    """Every arm starts from the checkpoint as it was loaded."""
    tests = read_tests(cfg)
    texts = {arm: translation_texts(cfg, arm) for arm in cfg.arms if arm != "base"}
    outcome = Outcome({}, {})
    measured = {}
    for arm in cfg.arms:
        model, tok = load(cfg, learns=arm in texts)
        history = []
        if arm in texts:
            model.activation_checkpointing = cfg.activation_checkpointing
            history = train(cfg, model.train(), tok, texts[arm], seed)
            if cfg.save:
                save_adapter(model, Path(cfg.save) / f"{arm}-seed-{seed}")
            model.eval()
        else:
            show_prompt(cfg, model, tok, tests)
        found = measure(cfg, model, tok, tests)
        warn_of_small_mass(found.metrics, arm, tests.rows)
        measured[arm] = found
        outcome.series[arm] = found.series
        if history:
            outcome.series[arm]["validation loss"] = tuple(zip(*history))
        outcome.metrics[arm] = {
            "million parameters": sum(p.numel() for p in model.parameters()) / 1e6,
            "questions": len(next(iter(found.right.values()))),
            **found.metrics,
        }
    for arm in measured.keys() - {"qt"}:
        if "qt" in measured:
            found = leads(cfg, measured["qt"], measured[arm], tests.rows, arm)
            outcome.metrics["qt"] |= found
    return outcome


def show_prompt(cfg: Config, model, tok: Tokenizer, tests: Questions) -> None:
    first = next(iter(tests.rows))
    room = model.config.max_position_embeddings
    prompts = prompt_ids(cfg, tok, tests, first, competing(cfg, first), room)
    print(f"{len(tests.rows[first])} questions in {', '.join(tests.rows)}. The first prompt:")
    print(tok.decode(prompts.ids[0]))


def warn_of_small_mass(metrics: dict, arm: str, languages: Sequence[str]) -> None:
    small = {x: metrics["mass", x] for x in languages if metrics["mass", x] < SMALL_MASS}
    if small:
        shown = ", ".join(f"{x} {mass:.3f}" for x, mass in small.items())
        print(
            f"warning: {arm}: all labels together have less than {SMALL_MASS} of the probability "
            f"({shown}): the model would not answer so, and these accuracies say little"
        )


def leads(cfg: Config, qt: Measured, other: Measured, tested: Sequence[str], name: str) -> dict:
    """qt minus another arm on the same questions, mean over a group's languages, and its 95%
    interval over questions."""
    groups = groups_of(cfg, tested)
    groups["en"] = [x for x in tested if x == "en"]
    found = {}
    for group in ("seen", "unseen", "en"):
        languages = groups.get(group)
        if not languages:
            continue
        ours, theirs = (per_question(arm.right, languages) for arm in (qt, other))
        for at, x in zip(INTERVAL, paired_bootstrap(ours, theirs)):
            found["lead", name, group, at] = x
    return found


def per_question(right: dict[str, list[bool]], languages: Sequence[str]) -> list[float]:
    """The languages ask the same questions in the same order."""
    return [fmean(hits) for hits in zip(*(right[language] for language in languages))]


# --- claims: one checkpoint decides nothing about others, so each is undecided at best

COMPARED = ("base", "shuffled", "mono")


def cannot_tell(view: View) -> str:
    """A base that does not answer, or is at chance in English, has nothing to carry over."""
    for arm in (*COMPARED, "qt"):
        view(arm, "questions")  # not in this run: not tested
    recalls = [name for name in view.metrics["base"] if name.startswith("recall en ")]
    if not recalls:
        return "English was not tested: add en to --eval-langs"
    n = round(view.mean("base", "questions"))
    acc = view.mean("base", ("acc", "en"))
    largest = view.mean("base", ("largest", "en"))
    mass = view.mean("base", ("mass", "en"))
    low, _ = wilson(round(acc * n), n)
    if mass < SMALL_MASS:
        return f"base does not answer: in English all labels have {mass:.3f} of the probability"
    if low <= largest:
        return (
            f"base is at chance in English: {acc:.3f} (at least {low:.3f}), always the same label "
            f"{largest:.3f}"
        )
    for name in recalls:
        if view.mean("base", name) == 0:
            return f"base never gives a label: {name} 0"
    return ""


def over_questions(view: View, group: str) -> Verdict:
    parts = []
    for other in COMPARED:
        if key(("lead", other, group, "mean")) not in view.metrics.get("qt", {}):
            needed = f"base, shuffled and mono beside qt, and {group} languages"
            return untestable(f"needed: {needed}")
        mean, low, high = (view.mean("qt", ("lead", other, group, at)) for at in INTERVAL)
        where = "above 0" if low > 0 else "below 0" if high < 0 else "on both sides of 0"
        shown = f"qt - {other}, {group}: {mean:+.3f} [{low:+.3f}, {high:+.3f}], {where}"
        parts.append(Verdict(UNDECIDED, shown))
    return all_of(parts)


def languages_whose_questions_were_translated_gain(view: View) -> Verdict:
    """Mean accuracy of seen languages: qt minus base, shuffled and mono, with 95% intervals over
    questions."""
    return over_questions(view, "seen")


def languages_never_seen_in_tuning_gain_as_well(view: View) -> Verdict:
    """Mean accuracy of unseen languages: qt minus base, shuffled and mono, with 95% intervals over
    questions."""
    return over_questions(view, "unseen")


def English_is_kept(view: View) -> Verdict:
    """Accuracy in English: qt minus base, shuffled and mono, with 95% intervals over questions."""
    return over_questions(view, "en")


CLAIMS = [
    Claim(
        "C1",
        languages_whose_questions_were_translated_gain,
        "more",
        gate=cannot_tell,
        paper="clear gains",
    ),
    Claim(
        "C2",
        languages_never_seen_in_tuning_gain_as_well,
        "more",
        gate=cannot_tell,
        paper="gains in a wide range of languages",
    ),
    Claim("C7", English_is_kept, "no worse", gate=cannot_tell),
]


def claims(metrics: dict) -> list[dict]:
    return judge(CLAIMS, metrics)


# --- figure


def figure(results: dict):
    """Accuracy of every language and arm with 95% intervals; with --analysis lens the right label's
    English mass by layer."""
    arms = results["metrics"]
    first = next(iter(arms.values()))
    languages = [x for x in WORDS if key(("mass", x)) in first]
    lines = {arm: lens_lines(series, languages) for arm, series in results["series"].items()}
    shown = any(lines.values())
    fig, axes = new_figure(1, 1 + shown, width=11, height=4.4)
    left = axes[0] if shown else axes
    for k, (color, (arm, row)) in enumerate(zip(COLORS, arms.items())):
        n = round(row["questions"]["mean"])
        shares = np.array([row[key(("acc", x))]["mean"] for x in languages])
        low, high = np.array([wilson(round(p * n), n) for p in shares]).T
        x = np.arange(len(shares)) + 0.16 * (k - (len(arms) - 1) / 2)
        bars = [(shares - low).clip(0), (high - shares).clip(0)]
        left.errorbar(x, shares, bars, fmt="o", color=color, label=arm)
        if lines[arm]:
            values = [line["values"][0] for line in lines[arm]]
            plot_seeds(axes[1], lines[arm][0]["x"], values, arm, color)
    largest = first[key(("largest", languages[0]))]["mean"]
    left.axhline(largest, color="#666666", linewidth=1, linestyle=":")
    left.set_xticks(range(len(languages)), languages)
    left.set(ylabel="accuracy (bars: 95%)", title="Dotted: always the same label", ylim=(0, 1))
    left.legend()
    if shown:
        axes[1].set(xlabel="layer", ylabel="probability (thin: each language)")
        axes[1].set_title("Right label in English, read by layer")
    return fig


def lens_lines(series: dict, languages: Sequence[str]) -> list[dict]:
    found = [series.get(key(("lens", language))) for language in languages]
    return [line for line in found if line and line["x"]]


def main(cfg: Config) -> dict:
    started = time.time()
    check(cfg)
    outcomes = [run(cfg, seed) for seed in cfg.seeds]
    folder = Path(cfg.out or ROOT / "runs" / "spontaneous_multilingual_real")
    path = folder / "spontaneous_multilingual_real"
    results = save_results(
        __file__, PAPER, cfg, outcomes, claims, figure, started, cfg.seeds, path
    )
    first = next(iter(results["metrics"].values()))
    columns = [name for name in first if name.startswith(("acc", "mass", "partial"))]
    for part in parts_of(columns, 8):
        print_metrics(results["metrics"], part, digits=3)
    print_claims(results["claims"])
    return results


def check(cfg: Config) -> None:
    if not cfg.arms or not cfg.eval_langs or not cfg.train_langs:
        raise InputError("--arms, --eval-langs and --train-langs need at least one value each")
    check_range(cfg, "epochs batch micro_batch rows eval_every lora_rank cutoff", least=1)
    check_range(cfg, "limit num_shots", least=0)
    check_range(cfg, "lr lora_alpha", above=0)
    most = len(SHOTS[cfg.task])
    if (cfg.num_shots or 0) > most:
        raise InputError(
            f"--num-shots {cfg.num_shots}: the paper's prompts for {cfg.task} have {most}"
        )


if __name__ == "__main__":
    cli(main, Config)
