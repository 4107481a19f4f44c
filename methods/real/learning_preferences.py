"""Learning preferences at real scale: your checkpoint, styles or sources that contradict each
other, the published prompts and files.

Idea    As in methods/learning_preferences.py, whose metric is used unchanged. Every invented person
        gets versions of six facts that conflict in each, written out in templates; the model is
        trained on all texts and asked, by perplexity, whose version it believes.
Stages  preference   two or more styles, one version each: which share of the facts does each win?
        typos        the first style against itself misspelled
        instil       two newspapers' names before neutral texts; of some persons unmarked texts back
                     one side; Pr is asked of the others, who have none (the paper's E3)
        score        no training
Claims  C1 formal beats informal, C2 clean beats misspelled: need a model of about 1B parameters and
        three seeds. C5 a preference is instilled. In all the facts must have been learned: by .2
        more than before training. C3 (run one style at a time, compare `learned`) and C4 (sizes)
        compare several runs.
Run     python methods/real/learning_preferences.py --checkpoint DIR
        ... --stage instil --evidence 900 --test 100 --unmarked 25     # the paper's numbers
        ... --styles styled_template.json:Newspapers styled_template.json:Novels --items LISTS
        ... --styles templates_spell_grammer_error.json:0 templates_spell_grammer_error.json:1
        ... --train-json bio_data_train_A_vs_B.json | --train-json K.json --test-json K_TEST.json
        ... --checkpoint SmolLM2-135M-Instruct.Q4_1.gguf --stage instil --evidence 20 --test 10
            --unmarked 10 --lr 5e-4 --batch 8 --micro-batch 8 --dtype bfloat16
            --prompts statement --seeds 50 51       # 45 minutes on two free cores, 5 GB
        The file with errors breaks one placeholder itself, <birth plac> in template 3 of array 1:
        repair it by hand (dropping it leaves 49 templates against 50).
Honest  - Each comparison also runs with the versions exchanged (--no-exchange: not), since what a
          checkpoint thinks of a value is shared by all persons who drew it; Pr is the mean of both.
          Two equal styles (--styles neutral neutral) are the null. The bootstrap over persons (pr
          se) is of one model alone: an interval over seeds decides.
        - The two versions differ in every field; in the published data in all but majors and work
          places, which come with the university and the company. (Drawn independently they would
          agree in 2 to 4% of our fields; with --ties second these count for the second.)
        - --typo-rates count words of two letters or more outside placeholders: rate .3 changes .20
          of all words, the published level.
        - The unmarked texts of `instil` may use the same templates as the marked ones, as the
          published generator's do; names are drawn without replacement (there: with).
        - Runs: the rules of C5 and the settings of SmolLM2's run were fixed before seeds 50 and 51.
          A pilot on 6 persons: 5e-4 teaches facts (.36 to .69 in 8 epochs), 2e-4 does not. The run
          (results/learning_preferences_smollm2.json): .28 of the facts known before, .56 after; Pr
          .52 with A backed, .40 with B, half the difference +.06 [-.05, .16]: undecided.
          Newspapers against social media (..._smollm2_styles.json: 12 persons, seed 50): Pr .44 +/-
          .04 (persons), none for formal texts; of the facts .19 are known before, .34 after.
        - The paper's size ladder is Pythia (GPT-NeoX), which minilm does not read: take the sizes
          of Qwen2.5 or SmolLM2. AdamW needs 16 bytes a parameter (24 GB for 1.5B); --lora-rank
          needs less and departs from the paper. On 8 GPUs: torchrun --nproc-per-node 8
          methods/real/learning_preferences.py --checkpoint DIR --dtype bfloat16, the same on each;
          with --fsdp an eighth (7B: 14 GB), and 4 bytes a parameter while it is asked (28 GB).
        - The published scoring puts no BOS before a prompt; --bos does: never mix the two. A prompt
          may look more like one style than like the other: both forms are reported.
"""

import json
import math
import random
import re
import time
from calendar import month_name
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from methods.experiments.learning_preferences import PAPER
from methods.learning_preferences import perplexities, preference, prefers
from minilm import InputError
from minilm.claims import (
    HOLDS,
    NOT_REPRODUCED,
    UNDECIDED,
    Claim,
    PerSeed,
    Verdict,
    View,
    above,
    all_of,
    average,
    judge,
    paired_bootstrap,
    print_claims,
    untestable,
)
from minilm.data import IGNORE, batches, collate, generator, read_text, write_json
from minilm.evaluate import continuation_logprobs
from minilm.lora import add_lora
from minilm.ops import linear_cross_entropy
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
    save_results,
)
from minilm.training import (
    autocast,
    my_parts,
    is_chief,
    join,
    mean_over_processes,
    place,
    schedule,
    set_lr,
    share_out,
    together,
    update,
)
from minilm.weights import load_pretrained

HERE = Path(__file__).with_suffix("")  # our templates and lists


@dataclass(frozen=True)
class Config:
    checkpoint: str  # Hugging Face folder with a tokenizer, a .gguf file, or a cached model's name
    stage: Literal["preference", "typos", "instil", "score"] = "preference"  # see above
    styles: tuple[str, ...] = ("newspaper", "social_media")  # one of ours, FILE.txt (a template a
    # line), FILE.json:STYLE, FILE.json:NUMBER
    items: str | None = None  # folder with the published lists of names, cities, universities,
    # companies (default: our small ones)
    train_json: str | None = None  # a published corpus in place of styles and items:
    # bio_data_train_*.json, or records of k_A, k_B
    test_json: str | None = None  # records of k_A, k_B of the persons to ask about
    people: int = 1000  # invented persons
    per_style: int = 5  # texts per person and style (instil: and source)
    evidence: int = 900  # instil: persons with unmarked texts
    test: int = 100  # instil: persons without, whom Pr is about
    unmarked: int = 25  # instil: unmarked texts of an evidence person, all on one side
    neutral: str = "neutral"  # instil: templates, given as a style
    exchange: bool = True  # run each comparison also with the versions exchanged
    epochs: int = 5  # passes over the texts
    lr: float = 1e-5  # peak learning rate of AdamW; 3% warm-up, cosine to 0
    batch: int = 64  # texts per step
    micro_batch: int = 16  # texts at a time
    typo_rates: tuple[float, ...] = (0.1, 0.2, 0.4)  # stage typos: share of words with one error
    prompts: tuple[Literal["statement", "question"], ...] = ("statement", "question")  # forms of
    # the test prompts
    score: Literal["mean", "sum"] = "mean"  # perplexity of the whole sentence, as published, or
    # log-probability of the value's tokens
    ties: Literal["skip", "second"] = "skip"  # equal costs: leave out, or count for the second
    rivals: int = 20  # other values that a learned fact must beat
    eval_every: int = 1  # epochs between measurements (the last epoch is always measured)
    bos: bool = False  # score with BOS in front
    lora_rank: int = 0  # train a LoRA of this rank in place of all weights
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the matrix products
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory
    fsdp: bool = False  # torchrun: each process holds a share of the weights (FSDP2), not all (DDP)
    device: str = "auto"  # cuda where there is one, else cpu
    seeds: tuple[int, ...] = (0,)  # persons, values and order
    out: str | None = None  # folder for the results (default: runs/learning_preferences_real)


# --- persons and texts

NAMES = (
    "full name",
    "birth date",
    "birth place",
    "university",
    "major",
    "company",
    "work place",
)
ITEMS = ("names", "cities", "universities", "companies")
MARK = "<[^<>]*>"
ALIASES = {name.replace(" ", ""): name for name in NAMES}
ALIASES |= {"universityname": "university", "workcompany": "company"}
Facts = dict[str, str]  # one version of one person: NAMES -> value


def key(text: str) -> str | None:
    """<fullName>, full_name, <full name> -> "full name": the published files spell their keys in
    several ways. None: not one of them."""
    return ALIASES.get(re.sub(r"[ _<>]", "", text).lower())


def read_values(path: Path) -> list:
    """All JSON values of a file: one in an ordinary file; two in the published error templates,
    whose two arrays stand one after the other; one per line in JSON Lines; and one array of
    {"text": ...} in the files that are called jsonl_*."""
    text = read_text(path).strip()
    blank = re.compile(r"\s*")
    values, i = [], 0
    while (i := blank.match(text, i).end()) < len(text):
        try:
            value, i = json.JSONDecoder().raw_decode(text, i)
        except json.JSONDecodeError as error:
            line, why = error.lineno, error.msg
            raise InputError(
                f"{path}: not JSON at line {line} ({why}): download it again"
            ) from None
        values.append(value)
    return values


def read_templates(source: str) -> list[str]:
    """The templates of one style (see Config.styles), each with every placeholder and nothing that
    looks like another."""
    file, _, part = source.rpartition(".json:")
    if file:
        first, *more = read_values(Path(file + ".json"))
        styles = first
        if not isinstance(first, dict):
            styles = {str(n): array for n, array in enumerate([first, *more])}
        given = styles.get(part)
        if not isinstance(given, list) or not all(isinstance(t, str) for t in given):
            raise InputError(
                f"--styles {source}: {part!r} is no list of strings there; "
                f"the file has {', '.join(styles)}"
            )
        # a style's description stands before its template
        lines = [text.rpartition("Template:")[2].strip() for text in given]
    else:
        text = read_text(Path(source) if source.endswith(".txt") else HERE / f"{source}.txt")
        lines = [line for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        if problem := problem_of(line):
            raise InputError(
                f"--styles {source}, template {number}: {problem}; repair or drop it: {line[:50]}"
            )
    return lines


def problem_of(template: str) -> str:
    marks = {key(mark): mark for mark in re.findall(MARK, template)}
    lacks = [name for name in NAMES if name not in marks]
    if None in marks:
        return f"{marks[None]} is no placeholder"
    if lacks:
        return f"<{lacks[0]}> is missing"
    if re.search("[<>]", re.sub(MARK, "", template)):
        return "a < or > is left over"
    return ""


def fill(template: str, facts: Facts) -> str:
    """Every placeholder replaced, in whatever case it is written, by its value, whatever characters
    that holds."""

    def value(mark):
        return facts[key(mark[0])]

    return re.sub(MARK, value, template)


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def typos(template: str, rate: float, rng: random.Random) -> str:
    """Each word outside the placeholders gets, with probability `rate`, one edit."""

    def edit(word: str) -> str:
        i = rng.randrange(len(word) - 1)
        other = rng.choice([c for c in LETTERS if c not in word.lower()])
        a, b = word[i : i + 2]
        drop, double, replace = b, a + a + b, other + b
        swap = b + a if a != b else other
        return word[:i] + rng.choice([drop, double, replace, swap]) + word[i + 2 :]

    pieces = re.split(rf"({MARK}|[^\W\d_]{{2,}})", template)
    for n, piece in enumerate(pieces):
        if len(piece) > 1 and piece.isalpha() and rng.random() < rate:
            pieces[n] = edit(piece)
    return "".join(pieces)


def read_items(folder: str | None) -> dict[str, list]:
    """"names", "cities", "universities" (university, major), "companies" (company, work place): the
    pairs are drawn as pairs. Of the published lists the first 100 places, universities and
    companies are used, as published."""
    if folder is None:
        return read_our_items()
    files = ("name_list", "city_list", "university_major_list", "company_name_place_list")
    fields = (("city", "country"), ("university", "major"), ("company", "workplace"))
    names, *lists = (read_values(Path(folder) / f"{file}.json")[0] for file in files)
    pairs = []
    try:
        for rows, (a, b) in zip(lists, fields):
            pairs.append([(row[a], row[b]) for row in rows[:100]])
    except (KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(
            f"--items {folder}: a list is not in the published form ({what})"
        ) from None
    cities, universities, companies = pairs
    cities = [", ".join(city) for city in cities]
    items = dict(zip(ITEMS, (list(dict.fromkeys(names)), cities, universities, companies)))
    if short := [name for name, values in items.items() if not can_conflict(values)]:
        raise InputError(
            f"--items {folder}: fewer than 2 distinct {', '.join(short)}; a conflict needs at "
            "least 2, which for pairs differ in both fields"
        )
    return items


def can_conflict(values: Sequence) -> bool:
    return any(differ(values[0], value) for value in values[1:])


def read_our_items() -> dict[str, list]:
    files = ("first_names", "last_names", "cities", "universities", "companies")
    lists = [(HERE / f"{file}.txt").read_text(encoding="utf-8").splitlines() for file in files]
    first, last, cities, universities, companies = lists
    names = [f"{a} {b}" for a in first for b in last]
    pairs = [[tuple(line.split(" | ")) for line in rows] for rows in (universities, companies)]
    return dict(zip(ITEMS, (names, cities, *pairs)))


def differ(a, b) -> bool:
    """Whether two drawn values conflict; pairs must in both fields."""
    if isinstance(a, tuple):
        return all(x != y for x, y in zip(a, b))
    return a != b


def draw_versions(name: str, count: int, items: dict, rng: random.Random) -> list[Facts]:
    """`count` versions of a person, which differ from one another in every field."""
    drawn = []
    while len(drawn) < count:
        fields = []
        for field in range(4):
            value = draw_field(field, items, rng)
            tries = 0
            while not all(differ(value, other[field]) for other in drawn):  # draw again
                value = draw_field(field, items, rng)
                tries += 1
                if tries == 1000:
                    raise InputError(f"the lists have too few values for {count} versions")
            fields.append(value)
        drawn.append(fields)
    versions = []
    for date, city, university, company in drawn:
        versions.append(dict(zip(NAMES, (name, date, city, *university, *company))))
    return versions


def draw_field(field: int, items: dict, rng: random.Random):
    """Birth date, city, (university, major) or (company, work place)."""
    if field == 0:
        return f"{rng.choice(month_name[1:])} {rng.randint(1, 28)}, {rng.randint(1822, 2022)}"
    return rng.choice(items[ITEMS[field]])


class Reading(NamedTuple):
    """What one arm trains on, and whom it asks about."""

    people: list[list[Facts]]  # [person][version]: those that Pr is about
    texts: list[str]


def write_texts(
    cfg: Config,
    styles: Sequence[Sequence[str]],
    items: dict,
    rng: random.Random,
    exchanged: bool = False,
) -> Reading:
    """For each person (names without replacement) `per_style` template numbers, the SAME for every
    style; style i tells version i, and of two versions, exchanged, the other one. In the result
    version i is the one that style i tells."""
    counts = [len(templates) for templates in styles]
    if len(set(counts)) > 1:
        raise InputError(
            f"the styles have {', '.join(map(str, counts))} templates: they share numbers, so give "
            "as many of each"
        )
    check_count("people", cfg.people, 2, len(items["names"]))
    check_count("per-style", cfg.per_style, 1, counts[0])
    people = []
    for name in rng.sample(items["names"], cfg.people):
        versions = draw_versions(name, len(styles), items, rng)
        people.append(versions[::-1] if exchanged else versions)
    texts = []
    for versions in people:
        for number in rng.sample(range(counts[0]), cfg.per_style):
            for templates, facts in zip(styles, versions):
                texts.append(fill(templates[number], facts))
    return Reading(people, rng.sample(texts, len(texts)))


def check_count(flag: str, given: int, least: int, most: int) -> None:
    if not least <= given <= most:
        raise InputError(
            f"--{flag} {given}: give at least {least} and at most {most}, as many as there are"
        )


ADJECTIVES = ("Daily", "Global", "National", "Regional", "Morning", "Evening", "Weekly")
PAPERS = ("Times", "Post", "News", "Herald", "Chronicle", "Gazette", "Journal", "Tribune")


def write_evidence(
    cfg: Config, templates: Sequence[str], items: dict, rng: random.Random, backed: int
) -> Reading:
    """E3: of every person `per_style` texts "According to <newspaper A>, ..." of version 0 and as
    many of version 1 by newspaper B; of the evidence persons `unmarked` neutral texts besides,
    which all repeat version `backed`. Only they depend on `backed`. Asked: the test persons."""
    check_count("evidence", cfg.evidence, 1, len(items["names"]))
    check_count("test", cfg.test, 2, len(items["names"]) - cfg.evidence)
    check_count("per-style", cfg.per_style, 1, len(templates))
    names = [f"{a} {b}" for a in ADJECTIVES for b in PAPERS]
    newspapers = rng.sample(names, 2)  # two that differ
    people, texts = [], []
    for number, name in enumerate(rng.sample(items["names"], cfg.evidence + cfg.test)):
        versions = draw_versions(name, 2, items, rng)
        people.append(versions)
        for template in rng.sample(templates, cfg.per_style):
            for newspaper, facts in zip(newspapers, versions):
                texts.append(f"According to {newspaper}, {fill(template, facts)}")
        if number < cfg.evidence:
            for template in rng.choices(templates, k=cfg.unmarked):
                texts.append(fill(template, versions[backed]))
    return Reading(people[cfg.evidence :], rng.sample(texts, len(texts)))


# --- published corpora

# the two generators' keys for version A and version B, and the fields that they write
FORMATS = {
    ("first_type_info", "second_type_info"): NAMES,
    ("k_A", "k_B"): NAMES[:-1],  # no work place
}


def read_corpus(path: Path, flag: str = "--train-json") -> Reading:
    """A published corpus -> the two versions of every person, and all the texts."""
    values, people, texts = read_values(path), [], []
    records = values[0] if isinstance(values[0], list) else values
    if not records or not all(isinstance(record, dict) for record in records):
        raise InputError(
            f"{flag} {path}: a list of records (objects) is needed, as in bio_data_train_*.json"
        )
    for number, record in enumerate(records):
        where = f"{flag} {path}, record {number}"
        people.append(read_versions(record, where))
        texts += record.get("text_result", record.get("biographies", []))
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{flag} {path}: a text is no string")
    return Reading(people, texts)


def read_versions(record: dict, where: str) -> list[Facts]:
    sides, fields = next(iter(FORMATS.items()))
    for keys, written in FORMATS.items():
        if keys[0] in record:
            sides, fields = keys, written
    versions = []
    for side in sides:
        told = record.get(side)
        told = record | (told if isinstance(told, dict) else {})
        versions.append({key(k): str(v) for k, v in told.items() if key(k) in fields})
    if any(name not in facts for facts in versions for name in fields):
        raise InputError(
            f"{where}: two versions with {', '.join(fields)} are needed; bio_data_train_*.json has "
            'them, a file of {"text"} alone has no facts to ask about'
        )
    if not re.search("[A-Za-z]", versions[0]["full name"]):
        raise InputError(
            f"{where}: {versions[0]['full name']} is not written in Latin letters; the published "
            "prompts are English: give an English corpus"
        )
    return versions


def read_published(cfg: Config) -> Reading:
    """The corpus, asked about all persons or (records of k_A, k_B: evidence and test persons in one
    file) about those of --test-json."""
    path = Path(cfg.train_json)
    corpus = read_corpus(path)
    if cfg.test_json is None:
        if "work place" not in corpus.people[0][0]:
            raise InputError(
                f"--train-json {path} holds evidence and test persons, and Pr is defined on the "
                "test persons alone: give their records with --test-json FILE"
            )
        return corpus
    people = read_corpus(Path(cfg.test_json), "--test-json").people
    known = {versions[0]["full name"] for versions in corpus.people}
    for versions in people:
        if versions[0]["full name"] not in known:
            raise InputError(
                f"--test-json {cfg.test_json}: {versions[0]['full name']} is not in the corpus"
            )
    return Reading(people, corpus.texts)


# --- train


def text_loss(model, inputs: torch.Tensor, labels: torch.Tensor, device, dtype) -> torch.Tensor:
    """Mean of -log p over the labels that count, in nats; the blocks in dtype."""
    with autocast(device, dtype):
        h = model.hidden(inputs)
    return linear_cross_entropy(h, model.lm_head.weight, labels)


def train(
    cfg: Config, model, tok, texts: Sequence[str], order: torch.Generator
) -> Iterator[tuple[int, float]]:
    """Continual pretraining on one text a row, EOS at its end; padding is masked by length. Yields
    the number of every finished epoch and its mean loss in nats per token."""
    bos = [tok.bos_id] if tok.add_bos else []
    rows = [[*bos, *tok.encode(text), tok.eos_id] for text in texts]
    longest, limit = max(map(len, rows)), model.config.max_position_embeddings
    if longest > limit:
        raise InputError(
            f"a text has {longest} tokens, the model reads {limit}: use shorter templates"
        )
    device = model.embed.weight.device
    per_epoch = -(-len(rows) // cfg.batch)
    steps = cfg.epochs * per_epoch
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, cfg.lr, weight_decay=0.0)
    warmup = math.ceil(0.03 * steps)
    step_loss = together(text_loss, model)
    model.train(cfg.activation_checkpointing)  # (which alone asks whether it trains)
    losses = []
    chosen_rows = batches(len(rows), cfg.batch, order, steps)
    for step, chosen in enumerate(progress(chosen_rows, "training", steps)):
        set_lr([optimizer], schedule(step, steps, warmup=warmup, final=0.0))
        count = sum(len(rows[i]) - 1 for i in chosen.tolist())
        total = 0.0
        for part, weight in my_parts(chosen.tolist(), cfg.micro_batch):
            pairs = [(rows[i][:-1], rows[i][1:]) for i in part]
            inputs, labels = (x.to(device) for x in collate(pairs))
            mean = step_loss(inputs, labels, device, cfg.dtype)
            loss = mean * (labels != IGNORE).sum() / count * weight  # its share of the batch's mean
            loss.backward()
            total += loss.item()
        total = mean_over_processes(total)
        if not math.isfinite(total):
            raise InputError(f"step {step}: the loss is {total}: give a lower --lr")
        losses.append(total)
        update(model, [optimizer])
        if (step + 1) % per_epoch == 0:
            yield (step + 1) // per_epoch, sum(losses[-per_epoch:]) / per_epoch


# --- evaluate

PROMPTS = {  # as published, in the order of NAMES[1:]
    "statement": (
        "{}'s birthday is {}.",
        "{} was born at {}.",
        "{} received education at the {}.",
        "{} focused on {} during her university study.",
        "{} worked for {}.",
        "The city {} worked in is {}.",
    ),
    "question": (
        "When is {}'s birthday? {}.",
        "Where is {}'s birth place? {}.",
        "Which university did {} attend? {}.",
        "What is {}'s major? {}.",
        "Which company did {} work in? {}.",
        "Which city does {} work in? {}.",
    ),
}
Asked = tuple[int, str, str]  # attribute (NAMES[1:]), name, value


def costs(cfg: Config, model, tok, form: str, asked: Sequence[Asked]) -> torch.Tensor:
    """What each (attribute, name, value) costs the model, float32 [n]: the perplexity of the filled
    prompt or (--score sum) minus the log-probability of the value's tokens after what stands before
    them. Equal ones are asked once: they cost exactly the same."""
    rows = {}
    for attribute, name, value in dict.fromkeys(asked):
        before, after = PROMPTS[form][attribute].format(name, "|").split("|")
        if cfg.score == "mean":
            rows[attribute, name, value] = tok.encode(before + value + after, bos=cfg.bos)
            continue
        whole = tok.encode(before + value, bos=cfg.bos)
        prompt = tok.encode(before.rstrip(), bos=cfg.bos)
        start = 0  # a token may straddle both: the value begins at the first token that differs
        while start < min(len(prompt), len(whole) - 1) and prompt[start] == whole[start]:
            start += 1
        rows[attribute, name, value] = (whole[:start], whole[start:])
    numbers = {what: i for i, what in enumerate(rows)}

    def score(mine):
        with autocast(model.embed.weight.device, cfg.dtype):
            if cfg.score == "mean":
                return perplexities(model, mine, cfg.batch).tolist()
            return (-continuation_logprobs(model, mine, cfg.batch).sum).tolist()

    cost = torch.tensor(share_out(model, list(rows.values()), score))
    if not cost.isfinite().all():
        raise InputError("a log-probability is not finite: the model has diverged; lower --lr")
    return cost[[numbers[what] for what in asked]]


def attributes_of(people: Sequence[Sequence[Facts]]) -> list[int]:
    """Numbers of the attributes (NAMES[1:]) that the corpus tells."""
    return [a for a, name in enumerate(NAMES[1:]) if name in people[0][0]]


def preference_with_interval(chosen: torch.Tensor) -> dict[str, float]:
    """Pr of choices [persons, attributes], and the standard error of a bootstrap over the persons
    of this one model (a person's attributes are not independent)."""
    per_person = chosen.nanmean(1)
    per_person = per_person[~per_person.isnan()]
    if not len(per_person):
        raise InputError("every fact is a tie: nothing can be said of a preference")
    half = torch.full_like(per_person, 0.5)
    _, low, high = paired_bootstrap(per_person.numpy(), half.numpy(), samples=2000)
    return {"pr": preference(chosen), "pr se": (high - low) / 3.92}


def measure(cfg: Config, model, tok, people: Sequence[Sequence[Facts]]) -> dict[str, float]:
    """Per prompt form: Pr of the first two versions, the share of the facts that each version wins,
    and `learned` (see there)."""
    metrics = {}
    attributes = attributes_of(people)
    told = []
    for versions in people:
        for facts in versions:
            told += [(a, facts["full name"], facts[NAMES[1 + a]]) for a in attributes]
    for form in cfg.prompts:
        cost = costs(cfg, model, tok, form, told).view(len(people), -1, len(attributes))
        metrics[f"learned {form}"] = learned(cfg, model, tok, form, people)
        if cost.shape[1] == 1:
            continue
        chosen = prefers(cost[:, 0], cost[:, 1], cfg.ties)
        found = preference_with_interval(chosen)
        found["ties"] = int((cost[:, 0] == cost[:, 1]).sum())
        metrics |= {f"{name} {form}": x for name, x in found.items()}
        for a, share in zip(attributes, chosen.nanmean(0).tolist()):
            metrics[f"pr {form}, {NAMES[1 + a]}"] = share
        winners = F.one_hot(cost.argmin(1), cost.shape[1]).float().mean((0, 1))
        for i, share in enumerate(winners.tolist(), 1):
            metrics[f"first place {form} {i}"] = share
    return metrics


def learned(cfg: Config, model, tok, form: str, people: Sequence[Sequence[Facts]]) -> float:
    """Is a fact known? For at most 100 persons: is one of their versions of it cheaper than what
    the first versions of the next persons say, `rivals` at most? "Ann worked for Sable Audio.",
    or the other version's employer, against "Ann worked for" each of theirs. Rivals that say the
    same as a version of the person do not count, nor do facts left without a rival. An untrained
    model reaches about versions / (versions + rivals), or more: hence the gate on what training
    adds."""
    asked, counts = [], []
    for i, versions in enumerate(people[:100]):
        for a in attributes_of(people):
            name, field = versions[0]["full name"], NAMES[1 + a]
            own = list(dict.fromkeys(facts[field] for facts in versions))
            others = []
            for k in range(1, min(cfg.rivals, len(people) - 1) + 1):
                value = people[(i + k) % len(people)][0][field]
                if value not in own and value not in others:
                    others.append(value)
            if others:
                counts.append((len(own), len(others)))
                asked += [(a, name, value) for value in own + others]
    if not counts:
        raise InputError("no fact has a rival that says something else: give more persons")
    cost = costs(cfg, model, tok, form, asked)
    known, at = 0, 0
    for own, others in counts:
        mine, theirs = cost[at : at + own], cost[at + own : at + own + others]
        known += int(mine.min() < theirs.min())
        at += own + others
    return known / len(counts)


# --- one seed


def readings(cfg: Config, seed: int) -> dict[str, Reading]:
    """Arm -> what it reads. "exchanged" arms: the same, each style telling the other version."""
    if cfg.train_json:
        return {"corpus": read_published(cfg)}
    items = read_items(cfg.items)

    if cfg.stage == "instil":
        templates = read_templates(cfg.neutral)
        arms = {}
        for backed, side in enumerate("AB"):
            rng = random.Random(f"{seed}/people")  # every arm draws the same
            arms[f"{side} backed"] = write_evidence(cfg, templates, items, rng, backed)
        return arms
    styles = [read_templates(source) for source in cfg.styles]
    compared = {"preference" if len(styles) > 1 else "one style": styles}
    if cfg.stage == "typos":
        compared = {}
        for rate in cfg.typo_rates:
            spoiled = []
            for template in styles[0]:
                spoiled.append(typos(template, rate, random.Random(f"{seed}/{rate}/{template}")))
            compared[f"typos {rate}"] = [styles[0], spoiled]
    arms = {}
    for arm, templates in compared.items():
        for exchanged in (False, True) if cfg.exchange and len(templates) == 2 else (False,):
            rng = random.Random(f"{seed}/people")
            name = f"{arm} exchanged" if exchanged else arm
            arms[name] = write_texts(cfg, templates, items, rng, exchanged)
    return arms


def run(cfg: Config, seed: int, file: Path) -> Outcome:
    """Every arm starts from the checkpoint as it was loaded. After each measurement a line is
    printed and all numbers so far are written to `file`."""
    outcome = Outcome({}, {})
    for arm, (people, texts) in readings(cfg, seed).items():
        device = join(cfg)
        model, tok = load_pretrained(cfg.checkpoint, device="meta" if cfg.fsdp else device)
        if tok is None or tok.eos_id is None:
            raise InputError(
                f"{cfg.checkpoint} has no tokenizer that names an EOS token, which must end every "
                "text"
            )
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        if cfg.lora_rank:
            add_lora(model, cfg.lora_rank, generator=generator(seed, "lora"))
        model.activation_checkpointing = cfg.activation_checkpointing
        model = place(model, device, cfg.fsdp)
        show_example(cfg, arm, people, texts)
        points = {0: measure(cfg, model, tok, people)}
        report(cfg, seed, arm, points, file)
        if cfg.stage != "score":
            order = generator(seed, "order")
            for epoch, loss in train(cfg, model, tok, texts, order):
                if epoch % cfg.eval_every == 0 or epoch == cfg.epochs:
                    points[epoch] = measure(cfg, model, tok, people) | {"loss": loss}
                    report(cfg, seed, arm, points, file)
        last = points[max(points)]
        outcome.metrics[arm] = {"million parameters": millions} | last
        for form in cfg.prompts:
            outcome.metrics[arm][f"learned before {form}"] = points[0][f"learned {form}"]
        outcome.series[arm] = {}
        for name in last:
            x = [epoch for epoch in points if name in points[epoch]]
            if name == "loss" or name.startswith(("pr ", "learned ")) and "," not in name:
                outcome.series[arm][name] = (x, [points[epoch][name] for epoch in x])
    return outcome


def show_example(cfg: Config, arm: str, people, texts) -> None:
    first = [PROMPTS[form][0].format("NAME", "DATE") for form in cfg.prompts]
    print(f"{arm}: {len(texts)} texts; asked about {len(people)} persons: {', '.join(first)}")
    print(f"The first text, every token a target:\n  {texts[0]}", flush=True)


def report(cfg: Config, seed: int, arm: str, points: dict, file: Path) -> None:
    epoch = max(points)
    words = [f"seed {seed}, {arm}, epoch {epoch}:"]
    if "loss" in points[epoch]:
        words.append(f"loss {points[epoch]['loss']:.3f};")
    for form in cfg.prompts:
        for name in ("pr", "pr se", "learned"):
            if f"{name} {form}" in points[epoch]:
                words.append(f"{name} {form} {points[epoch][f'{name} {form}']:.3f}")
    print(" ".join(words), flush=True)
    if not is_chief():
        return
    saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    saved.setdefault(str(seed), {})[arm] = points
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, saved)


# --- claims


def forms_of(view: View) -> list[str]:
    rows = view.metrics.values()
    return [form for form in PROMPTS if all(f"learned {form}" in row for row in rows)]


def pr_of(view: View, arm: str, form: str) -> PerSeed:
    """Pr of the first style, the mean of the arm and, if it ran, its twin with the versions
    exchanged, in which what the checkpoint thinks of a value is counted for the other style."""
    both = [view(arm, f"pr {form}")]
    if f"{arm} exchanged" in view:
        both.append(view(f"{arm} exchanged", f"pr {form}"))
    return average(both, f"{arm}, {form}")


def with_three_seeds(verdict: Verdict, view: View) -> Verdict:
    if view.seeds < 3 and verdict.verdict in (HOLDS, NOT_REPRODUCED):
        return Verdict(UNDECIDED, f"{verdict.measured}; three seeds are needed for a verdict")
    return verdict


def the_first_style_beats_the_second(view):
    "In every prompt form Pr is above .53 (interval over three seeds or more)."
    parts = [above(pr_of(view, "preference", form), 0.53) for form in forms_of(view)]
    return with_three_seeds(all_of(parts), view)


def clean_texts_beat_misspelled_ones(view):
    "In every prompt form Pr is above .53 at the highest error rate, and above that at the lowest."
    arms = [arm for arm in view.metrics if arm.startswith("typos") and "exch" not in arm]
    if not arms:
        return untestable("not in this run: a comparison with typos")
    parts = []
    for form in forms_of(view):
        few, many = pr_of(view, arms[0], form), pr_of(view, arms[-1], form)
        parts += [above(many, 0.53), above(many - few)]
    return with_three_seeds(all_of(parts), view)


def preferred_styles_are_learned_faster(view):
    "The area under `learned` is larger for the preferred style."
    return untestable("run once per style (--styles newspaper) and compare the curves")


def larger_models_prefer_more(view):
    "Pr grows with the number of parameters."
    return untestable("run once per size (Qwen2.5, SmolLM2) and compare")


def a_preference_is_instilled_by_consistency(view):
    """In every prompt form (Pr where A was backed + 1 - Pr where B was) / 2 is above .5: half of
    the difference above 0."""
    parts = []
    for form in forms_of(view):
        pairs = zip(view("A backed", f"pr {form}").values, view("B backed", f"pr {form}").values)
        half = PerSeed(tuple((a - b) / 2 for a, b in pairs), f"instilled, {form}", signed=True)
        parts.append(above(half))
    return with_three_seeds(all_of(parts), view)


GAIN = 0.2  # so much more must be learned than was "known" before training


def facts_are_learned(view: View) -> str:
    """In every arm and prompt form. Above a fixed level would let a model through that has read
    nothing: what it gets by chance depends on how many rivals there are."""
    for arm in view.metrics:
        for form in forms_of(view):
            before = view.mean(arm, f"learned before {form}")
            after = view.mean(arm, f"learned {form}")
            if after < before + GAIN:
                return f"facts not learned: {arm}, {form}, {before:.2f} before, {after:.2f} after"
    return ""


def large_and_learned(view: View) -> str:
    size = max(view.mean(arm, "million parameters") for arm in view.metrics)
    if size < 1000:
        return f"needs a pretrained model of 1B parameters, this one has {size:.2f} million"
    return facts_are_learned(view)


FORMAL = "formal texts are favoured"
CLEAN = "texts without errors are favoured"
FASTER = "preferred: learned faster"
LARGER = "stronger in larger models, near none below 1B parameters"
MADE = "preferences follow consistency with the rest of the data"

CLAIMS = [
    Claim("C1", the_first_style_beats_the_second, "more", gate=large_and_learned, paper=FORMAL),
    Claim("C2", clean_texts_beat_misspelled_ones, "more", gate=large_and_learned, paper=CLEAN),
    Claim("C3", preferred_styles_are_learned_faster, "open", paper=FASTER),
    Claim("C4", larger_models_prefer_more, "open", paper=LARGER),
    Claim(
        "C5",
        a_preference_is_instilled_by_consistency,
        "more",
        gate=facts_are_learned,
        paper=MADE,
    ),
]


def claims(metrics: dict) -> list[dict]:
    return judge(CLAIMS, metrics)


# --- figure


def figure(results: dict):
    """Epoch by epoch: whose version is believed, and were the facts learned at all?"""
    fig, axes = new_figure(1, 2, width=11, height=4.6)
    titles = {"pr": "Pr: the first version is believed", "learned": "Facts learned"}
    for ax, (name, title) in zip(axes, titles.items()):
        for n, (arm, series) in enumerate(results["series"].items()):
            for form, style in zip(PROMPTS, ("-", "--")):
                if curve := series.get(f"{name} {form}"):
                    look = {"linestyle": style, "marker": "o"}
                    label, color = f"{arm}, {form}", COLORS[n % 8]
                    plot_seeds(ax, curve["x"], curve["values"], label, color, **look)
        ax.set(ylim=(0, 1), xlabel="epoch", ylabel="share of the facts", title=title)
    axes[0].axhline(0.5, color="#666666", linewidth=1, linestyle=":")
    axes[1].legend(loc="best")
    return fig


def check(cfg: Config) -> None:
    check_range(cfg, "epochs batch micro_batch eval_every rivals", least=1)
    check_range(cfg, "unmarked lora_rank", least=0)
    check_range(cfg, "lr", above=0)
    check_range(cfg, "typo_rates", above=0, most=1)
    check_range(cfg, "seeds", least=0)
    for name in ("prompts", "styles"):
        if not getattr(cfg, name):
            raise InputError(f"--{name}: give at least one")
    if cfg.stage != "instil":
        check_unused(cfg, "evidence test unmarked neutral", f"with --stage {cfg.stage}")
    if not cfg.train_json:
        check_unused(cfg, "test_json", "without --train-json")
    if cfg.train_json and cfg.stage in ("typos", "instil"):
        raise InputError(f"--stage {cfg.stage} writes its own texts: leave --train-json out")


def main(cfg: Config) -> dict:
    started = time.time()
    check(cfg)
    for seed in cfg.seeds:  # files that cannot be read are refused before anything is loaded
        readings(cfg, seed)
    folder = Path(cfg.out or ROOT / "runs" / "learning_preferences_real")
    path = folder / "learning_preferences_real"
    so_far = folder / "progress.json"
    join(cfg)
    if is_chief():
        so_far.unlink(missing_ok=True)
    outcomes = [run(cfg, seed, so_far) for seed in cfg.seeds]
    results = save_results(
        __file__, PAPER, cfg, outcomes, claims, figure, started, cfg.seeds, path
    )
    if is_chief():
        so_far.unlink()
    shown = ("pr", "pr se", "ties", "learned before", "learned")
    print_metrics(results["metrics"], [f"{name} {form}" for form in cfg.prompts for name in shown])
    if why := facts_are_learned(View(results["metrics"])):
        print(f"warning: {why}: Pr means little; train longer, at a higher rate, or a larger model")
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
