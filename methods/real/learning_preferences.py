"""Learning preferences at real scale: your checkpoint, styles that contradict each other, the published prompts and files.

Idea    As in methods/learning_preferences.py, whose metric is used unchanged. Each of N invented persons gets, per style, a version of the
        facts, written out in the same 5 templates of its style; the model is trained on all texts and asked, by perplexity, whose version
        it believes. With more than two styles: which share of the facts does each style win?
Claims  C1 formal beats informal; C2 clean beats misspelled. Both need a pretrained model of about 1B parameters that has learned the facts,
        else there is no verdict. C3 (one style at a time: compare the curves of `learned`) and C4 (model sizes) compare several runs.
Run     python methods/real/learning_preferences.py --checkpoint DIR            # our newspaper against our social media templates
        ... --styles styled_template.json:Newspapers styled_template.json:Novels --items LISTS      # the published templates and lists
        ... --styles templates_spell_grammer_error.json:0 templates_spell_grammer_error.json:1      # two arrays in one file: clean, typos
        ... --train-json bio_data_train_A_vs_B.json | --stage typos | --stage score                 # published corpus | C2 | no training
Honest  The paper's size ladder is Pythia (GPT-NeoX), which minilm does not read: take the sizes of Qwen2.5 or SmolLM2. AdamW needs 16 bytes
        a parameter (24 GiB for 1.5B); --lora-rank needs less and departs from the paper. The published scoring puts no BOS before a
        prompt; --bos does: never mix the two. A prompt may look more like one style than like the other: both forms are reported, and
        the doubt remains. Equal values (both versions drew the same) are left out and counted.
Shown   results/learning_preferences_real.json: karpathy/tinyllamas' stories260K, --people 12 --epochs 10 --lr 2e-3 --batch 16: the path
        runs, Pr is 0.45 (statements) and 0.48 (questions), standard error 0.04. It is far too small a model for C1 to C4.
Try     (the same model) --stage score --people 200: no training, 0.49 and 0.48 +/- 0.02;   --styles neutral neutral --epochs 4, else as
        above: two equal styles, 0.50 and 0.40 +/- 0.06.
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
from typing import Literal

import torch
import torch.nn.functional as F

from methods.experiments.learning_preferences import PAPER, perplexities, preference, prefers
from minilm import InputError
from minilm.data import IGNORE, batches, collate, generator, read_text
from minilm.evaluate import continuation_logprobs
from minilm.lora import add_lora
from minilm.ops import linear_cross_entropy
from minilm.claims import NOT_TESTED, check, claim, print_claims
from minilm.results import COLORS, ROOT, Outcome, cli, new_figure, plot_seeds, print_metrics, progress, save_results
from minilm.training import autocast, pick_device, schedule, set_lr
from minilm.weights import load_pretrained

HERE = Path(__file__).with_suffix("")  # our templates and lists


@dataclass(frozen=True)
class Config:
    checkpoint: str  # Hugging Face folder with a tokenizer
    styles: tuple[str, ...] = ("newspaper", "social_media")  # one of ours, FILE.txt (a template a line), FILE.json:STYLE, FILE.json:NUMBER
    items: str | None = None  # folder with the published lists of names, cities, universities, companies (default: our small ones)
    train_json: str | None = None  # a published corpus in place of styles and items: bio_data_train_*.json, or records of k_A, k_B
    stage: Literal["preference", "typos", "score"] = "preference"  # typos: the first style against itself misspelled; score: no training
    people: int = 1000  # invented persons
    per_style: int = 5  # texts per person and style
    epochs: int = 5  # passes over the texts
    lr: float = 1e-5  # peak learning rate of AdamW; 3% warm-up, cosine to 0
    batch: int = 64  # texts per step
    micro_batch: int = 16  # texts at a time
    typo_rates: tuple[float, ...] = (0.1, 0.2, 0.4)  # stage typos: share of the words with one wrong letter
    prompts: tuple[Literal["statement", "question"], ...] = ("statement", "question")  # forms of the test prompts
    score: Literal["mean", "sum"] = "mean"  # perplexity of the whole sentence, as published, or log-probability of the value's tokens
    ties: Literal["skip", "second"] = "skip"  # equal versions: leave out, or count for the second, as published
    bos: bool = False  # score with BOS in front
    lora_rank: int = 0  # train a LoRA of this rank in place of all weights
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the matrix products in training
    device: str = "auto"  # cuda where there is one, else cpu
    seeds: tuple[int, ...] = (0,)  # persons, values and order
    out: str | None = None  # folder for the results (default: runs/learning_preferences_real)


# --- data

NAMES = ("full name", "birth date", "birth place", "university", "major", "company", "work place")
ITEMS = ("names", "cities", "universities", "companies")
MARK = "<[^<>]*>"
ALIASES = {name.replace(" ", ""): name for name in NAMES} | {"universityname": "university", "workcompany": "company"}
Facts = dict[str, str]  # one version of one person: NAMES -> value


def key(text: str) -> str | None:
    """<fullName>, full_name, <full name> -> "full name": the published files spell their keys in several ways. None: not one of them."""
    return ALIASES.get(re.sub(r"[ _<>]", "", text).lower())


def read_values(path: Path) -> list:
    """All JSON values of a file: one in an ordinary file; two in the published error templates, whose two arrays stand one after the
    other; one per line in JSON Lines; and one array of {"text": ...} in the files that are called jsonl_*."""
    text, values, i, blank = read_text(path).strip(), [], 0, re.compile(r"\s*")
    while (i := blank.match(text, i).end()) < len(text):
        try:
            value, i = json.JSONDecoder().raw_decode(text, i)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not JSON at line {error.lineno} ({error.msg}): download it again") from None
        values.append(value)
    return values


def read_templates(source: str) -> list[str]:
    """The templates of one style (see Config.styles), each with every placeholder and nothing that looks like another."""
    file, _, part = source.rpartition(".json:")
    if file:
        first, *more = read_values(Path(file + ".json"))
        styles = first if isinstance(first, dict) else {str(n): array for n, array in enumerate([first, *more])}
        if not isinstance(styles.get(part), list) or not all(isinstance(t, str) for t in styles[part]):
            raise InputError(f"--styles {source}: {part!r} is no list of strings there; the file has {', '.join(styles)}")
        lines = [text.rpartition("Template:")[2].strip() for text in styles[part]]  # (before it: the style's description)
    else:
        text = read_text(Path(source) if source.endswith(".txt") else HERE / f"{source}.txt")
        lines = [line for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        marks = {key(mark): mark for mark in re.findall(MARK, line)}
        lacks = [name for name in NAMES if name not in marks]
        problem = (f"{marks[None]} is no placeholder" if None in marks else f"<{lacks[0]}> is missing" if lacks else
                   "a < or > is left over" if re.search("[<>]", re.sub(MARK, "", line)) else "")
        if problem:
            raise InputError(f"--styles {source}, template {number}: {problem}; repair or drop it: {line[:50]}")
    return lines


def fill(template: str, facts: Facts) -> str:
    """Every placeholder replaced, in whatever case it is written, by its value, whatever characters that holds."""
    return re.sub(MARK, lambda mark: facts[key(mark[0])], template)


def typos(template: str, rate: float, rng: random.Random) -> str:
    """Each word outside the placeholders gets, with probability `rate`, one edit: letters swapped, or one dropped, doubled, replaced."""
    def edit(word: str) -> str:
        i, other = rng.randrange(len(word) - 1), rng.choice([c for c in "abcdefghijklmnopqrstuvwxyz" if c not in word.lower()])
        a, b = word[i : i + 2]
        return word[:i] + rng.choice([b, a + a + b, other + b, b + a if a != b else other]) + word[i + 2 :]

    pieces = re.split(rf"({MARK}|[^\W\d_]{{2,}})", template)
    return "".join(edit(p) if len(p) > 1 and p.isalpha() and rng.random() < rate else p for p in pieces)


def read_items(folder: str | None) -> dict[str, list]:
    """"names", "cities", "universities" (university, major), "companies" (company, work place): the pairs are drawn as pairs. Of the
    published lists the first 100 places, universities and companies are used, as published."""
    if folder is None:
        first, last, cities, *pairs = ((HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines()
                                       for name in ("first_names", "last_names", "cities", "universities", "companies"))
        pairs = [[tuple(line.split(" | ")) for line in lines] for lines in pairs]
        return dict(zip(ITEMS, ([f"{a} {b}" for a in first for b in last], cities, *pairs)))
    files = ("name_list", "city_list", "university_major_list", "company_name_place_list")
    names, *lists = (read_values(Path(folder) / f"{file}.json")[0] for file in files)
    try:
        cities, *pairs = ([(x[a], x[b]) for x in rows[:100]] for rows, (a, b) in zip(lists, (
            ("city", "country"), ("university", "major"), ("company", "workplace"))))
    except (KeyError, TypeError) as error:
        raise InputError(f"--items {folder}: a list is not in the published form ({type(error).__name__}: {error})") from None
    items = dict(zip(ITEMS, (list(dict.fromkeys(names)), [", ".join(city) for city in cities], *pairs)))
    if short := [name for name, values in items.items() if len(set(values)) < 2]:
        raise InputError(f"--items {folder}: fewer than 2 distinct {', '.join(short)}; a conflict needs at least 2")
    return items


def write_texts(cfg: Config, styles: Sequence[Sequence[str]], items: dict, rng: random.Random) -> tuple[list[list[Facts]], list[str]]:
    """[person][version] facts (names without replacement, versions drawn independently), and the texts, shuffled: for each person
    `per_style` template numbers, the SAME for every style; style i tells version i."""
    if len({len(templates) for templates in styles}) > 1:
        raise InputError(f"the styles have {', '.join(str(len(t)) for t in styles)} templates: they share numbers, so give as many of each")
    for flag, given, least, most in (("people", cfg.people, 2, len(items["names"])), ("per-style", cfg.per_style, 1, len(styles[0]))):
        if not least <= given <= most:
            raise InputError(f"--{flag} {given}: give at least {least} and at most {most}, as many as there are")
    people = []
    for name in rng.sample(items["names"], cfg.people):
        people.append([dict(zip(NAMES, (name, f"{rng.choice(month_name[1:])} {rng.randint(1, 28)}, {rng.randint(1822, 2022)}",
                                        rng.choice(items["cities"]), *rng.choice(items["universities"]), *rng.choice(items["companies"]))))
                       for _ in styles])
    texts = [fill(templates[i], facts) for versions in people for i in rng.sample(range(len(styles[0])), cfg.per_style)
             for templates, facts in zip(styles, versions)]
    return people, rng.sample(texts, len(texts))


def read_corpus(path: Path) -> tuple[list[list[Facts]], list[str]]:
    """A published corpus -> the two versions of every person, and all the texts."""
    values, people, texts = read_values(path), [], []
    records = values[0] if isinstance(values[0], list) else values
    if not records or not all(isinstance(record, dict) for record in records):
        raise InputError(f"--train-json {path}: a list of records (objects) is needed, as in bio_data_train_*.json")
    for number, record in enumerate(records):
        sides = [record.get(official, record.get(k)) for official, k in (("first_type_info", "k_A"), ("second_type_info", "k_B"))]
        people.append([{key(k): v for k, v in (record | (side if isinstance(side, dict) else {})).items() if key(k)} for side in sides])
        texts += record.get("text_result", record.get("biographies", []))
        if any(name not in facts for facts in people[-1] for name in NAMES):
            raise InputError(f"--train-json {path}, record {number}: two versions with {', '.join(NAMES)} are needed; "
                             "bio_data_train_*.json has them, a file of {\"text\"} alone has no facts to ask about")
    return people, texts


# --- train

def train(cfg: Config, model, tok, texts: Sequence[str], order: torch.Generator) -> Iterator[int]:
    """Continual pretraining on one text a row, EOS at its end; padding is masked by length. Yields the number of every finished epoch."""
    rows = [[*([tok.bos_id] if tok.add_bos else []), *tok.encode(text), tok.eos_id] for text in texts]
    if (longest := max(map(len, rows))) > (limit := model.config.max_position_embeddings):
        raise InputError(f"a text has {longest} tokens, the model reads {limit}: use shorter templates")
    device, per_epoch = model.embed.weight.device, -(-len(rows) // cfg.batch)
    steps = cfg.epochs * per_epoch
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], cfg.lr, weight_decay=0.0)
    for step, chosen in enumerate(progress(batches(len(rows), cfg.batch, order, steps), "training", steps)):
        set_lr([optimizer], schedule(step, steps, warmup=math.ceil(0.03 * steps), final=0.0))
        count = sum(len(rows[i]) - 1 for i in chosen.tolist())
        for part in chosen.split(cfg.micro_batch):
            inputs, labels = (x.to(device) for x in collate([(rows[i][:-1], rows[i][1:]) for i in part.tolist()]))
            with autocast(device, cfg.dtype):
                h = model.hidden(inputs)
            (linear_cross_entropy(h, model.lm_head.weight, labels) * (labels != IGNORE).sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % per_epoch == 0:
            yield (step + 1) // per_epoch


# --- evaluate

PROMPTS = {"statement": ("{}'s birthday is {}.", "{} was born at {}.", "{} received education at the {}.",
                         "{} focused on {} during her university study.", "{} worked for {}.", "The city {} worked in is {}."),
           "question": ("When is {}'s birthday? {}.", "Where is {}'s birth place? {}.", "Which university did {} attend? {}.",
                        "What is {}'s major? {}.", "Which company did {} work in? {}.", "Which city does {} work in? {}.")}  # as published


def costs(cfg: Config, model, tok, form: str, asked: Sequence[tuple[int, str, str]]) -> torch.Tensor:
    """What each (attribute, name, value) costs the model, float32 [n]: the perplexity of the filled prompt or (--score sum) minus the
    log-probability of the value's tokens after what stands before them. Equal ones are asked once: they cost exactly the same."""
    pairs = {}
    for attribute, name, value in dict.fromkeys(asked):
        before, after = PROMPTS[form][attribute].format(name, "|").split("|")
        whole, prompt = tok.encode(before + value + after * (cfg.score == "mean"), bos=cfg.bos), tok.encode(before.rstrip(), bos=cfg.bos)
        shared = next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), len(prompt))
        pairs[attribute, name, value] = whole if cfg.score == "mean" else (whole[:shared], whole[shared:])
    numbers, rows = {what: i for i, what in enumerate(pairs)}, list(pairs.values())
    cost = perplexities(model, rows, cfg.batch) if cfg.score == "mean" else -continuation_logprobs(model, rows, cfg.batch).sum
    return cost[[numbers[what] for what in asked]]


def measure(cfg: Config, model, tok, people: Sequence[Sequence[Facts]]) -> dict[str, float]:
    """Per prompt form: Pr of the first two versions with the bootstrap over persons, and the share of the facts that each version wins.
    `learned`: for at most 100 persons, is one of the versions cheaper than what is said of the 20 next persons?"""
    metrics, few, others = {}, min(100, len(people)), min(20, len(people) - 1)
    told = [facts for person in people for facts in person]
    rivals = [people[(i + k) % len(people)][0] | {"full name": people[i][0]["full name"]} for i in range(few) for k in range(1, others + 1)]
    for form in cfg.prompts:
        asked = [(a, facts["full name"], facts[n]) for facts in told + rivals for a, n in enumerate(NAMES[1:])]
        cost, other = costs(cfg, model, tok, form, asked).view(-1, 6).split([len(told), len(rivals)])
        cost, other = cost.view(len(people), -1, 6), other.view(few, others, 6)
        metrics[f"learned {form}"] = (cost[:few].amin(1) <= other.amin(1)).float().mean().item()
        if cost.shape[1] > 1:
            chosen = prefers(cost[:, 0], cost[:, 1], cfg.ties)
            ties = int((cost[:, 0] == cost[:, 1]).sum())
            metrics |= {f"{name} {form}": x for name, x in (preference(chosen) | {"ties": ties}).items()}
            metrics |= {f"pr {form}, {name}": share for name, share in zip(NAMES[1:], chosen.nanmean(0).tolist())}
            shares = F.one_hot(cost.argmin(1), cost.shape[1]).float().mean((0, 1)).tolist()
            metrics |= {f"first place {form} {i}": share for i, share in enumerate(shares, 1)}
    return metrics


# --- one seed

def run(cfg: Config, seed: int) -> Outcome:
    """Every comparison starts from the checkpoint as it was loaded."""
    outcome = Outcome({}, {})
    if cfg.train_json:
        arms = {Path(cfg.train_json).stem: read_corpus(Path(cfg.train_json))}
    else:
        styles, items = [read_templates(source) for source in cfg.styles], read_items(cfg.items)
        spoil = lambda rate: [typos(template, rate, random.Random(f"{seed}/{rate}/{template}")) for template in styles[0]]
        compared = {" > ".join(Path(source).name for source in cfg.styles): styles} if cfg.stage != "typos" else {
            f"clean > typos {rate}": [styles[0], spoil(rate)] for rate in cfg.typo_rates}
        arms = {arm: write_texts(cfg, compared[arm], items, random.Random(f"{seed}/people")) for arm in compared}
    for arm, (people, texts) in arms.items():
        model, tok = load_pretrained(cfg.checkpoint, device=pick_device(cfg.device))
        if tok is None or tok.eos_id is None:
            raise InputError(f"{cfg.checkpoint} has no tokenizer.json that names an EOS token, which must end every text")
        outcome.metrics[arm] = {"million parameters": sum(p.numel() for p in model.parameters()) / 1e6}
        if cfg.lora_rank:
            add_lora(model, cfg.lora_rank, generator=generator(seed, "lora"))
        print(f"{arm}: {len(people)} persons, {len(texts)} texts. The first, every token a target:\n  {texts[0]}\nFirst prompts: "
              + ", ".join(PROMPTS[form][0].format("NAME", "DATE") for form in cfg.prompts))
        points = [measure(cfg, model, tok, people)]
        if cfg.stage != "score":
            points += [measure(cfg, model, tok, people) for _ in train(cfg, model, tok, texts, generator(seed, "order"))]
        outcome.metrics[arm] |= points[-1]
        outcome.series[arm] = {name: (range(len(points)), [point[name] for point in points]) for form in cfg.prompts
                               for name in (f"pr {form}", f"learned {form}") if name in points[0]}
    return outcome


# --- claims

def claims(metrics: dict) -> list[dict]:
    """C1 and C2 are decided where the model is large enough and has learned the facts; C3 and C4 compare several runs."""
    first, *_, last = [*metrics, *metrics]
    forms, typos_run = [form for form in PROMPTS if f"learned {form}" in metrics[first]], first.startswith("clean > typos")
    size = metrics[first]["million parameters"]["mean"]
    learned = min(row[f"learned {form}"]["mean"] for row in metrics.values() for form in forms)
    because = (f"needs a pretrained model of 1B parameters, this one has {size:.2f} million; " if size < 1000 else
               "facts not learned, so pr means nothing: train longer; " if learned < 0.2 else "")
    evidence = lambda arms: {f"{name} {form}": arms for form in forms for name in ("pr", "pr se", "learned")}
    beats = lambda m, arm: all(m(arm, f"pr {form}") > max(0.53, 0.5 + 2.58 * m(arm, f"pr se {form}")) for form in forms)
    rows = [check(metrics, "C1", "The first style beats the second", "in every prompt form pr > 0.53 and above 0.5 by 2.58 standard "
                  "errors (p < 0.01)", evidence(["a comparison of styles"] if typos_run else [first]), lambda m: beats(m, first), None, 3),
            check(metrics, "C2", "Clean texts beat misspelled ones", "as C1 at the last error rate, and pr higher there than at the first",
                  evidence([first, last] if typos_run else ["a comparison with typos"]), lambda m: beats(m, last) and all(
                      m(last, f"pr {form}") > m(first, f"pr {form}") for form in forms), None, 3)]
    return [row | {"verdict": NOT_TESTED if because else row["verdict"], "measured": because + row["measured"]} for row in rows] + [
        claim("C3", "Preferred styles are learned faster", "area under `learned`", "run once per style and compare the curves", None),
        claim("C4", "Larger models prefer more", "pr against size", "run once per size (Qwen2.5, SmolLM2) and compare", None)]


# --- figure

def figure(results: dict):
    """Epoch by epoch: whose version is believed, and were the facts learned at all?"""
    fig, axes = new_figure(1, 2, width=11, height=4.6)
    for ax, name, title in zip(axes, ("pr", "learned"), ("Pr: the first version is believed", "One version beats those of others")):
        for n, (arm, series) in enumerate(results["series"].items()):
            for form, style in zip(PROMPTS, ("-", "--")):
                if f"{name} {form}" in series:
                    plot_seeds(ax, *series[f"{name} {form}"].values(), f"{arm}, {form}", COLORS[n % 8], linestyle=style, marker="o")
        ax.set(ylim=(0, 1), xlabel="epoch", ylabel="share of the facts", title=title)
    axes[0].axhline(0.5, color="#666666", linewidth=1, linestyle=":")
    axes[1].legend(loc="best")
    return fig


def main(cfg: Config) -> dict:
    started = time.time()
    if min(cfg.epochs, cfg.batch, cfg.micro_batch) < 1 or not all(0 < rate <= 1 for rate in cfg.typo_rates):
        raise InputError("--epochs, --batch and --micro-batch must be at least 1, --typo-rates above 0 and at most 1")
    outcomes = [run(cfg, seed) for seed in cfg.seeds]
    results = save_results(__file__, PAPER, cfg, outcomes, claims, figure, started, cfg.seeds,
                           Path(cfg.out or ROOT / "runs" / "learning_preferences_real") / "learning_preferences_real")
    print_metrics(results["metrics"], [f"{name} {form}" for form in cfg.prompts for name in ("pr", "pr se", "ties", "learned")])
    if min(row[f"learned {form}"]["mean"] for row in results["metrics"].values() for form in cfg.prompts) < 0.2:
        print("warning: facts not learned, so Pr means nothing here: train longer, at a higher rate, or a larger model")
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
