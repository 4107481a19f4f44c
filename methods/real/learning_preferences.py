"""Learning preferences at real scale: your checkpoint, styles that contradict each other, the published prompts and files.

Idea    As in methods/learning_preferences.py, whose metric is used unchanged. Each of N invented persons gets, per style, a version of the
        facts, written out in the same 5 templates of its style; the model is trained on all texts, and is then asked, by perplexity,
        whose version it believes. With more than two styles: which share of the facts does each style win?
Claims  C1 formal beats informal; C2 clean beats misspelled (--stage typos). Both need a pretrained model of about 1B parameters that has
        learned the facts: else the table says so and gives no verdict. C3 (one style at a time: compare the curves of `learned`) and
        C4 (one run per model size) compare several runs.
Run     python methods/real/learning_preferences.py --checkpoint DIR            # our newspaper against our social media templates
        ... --styles styled_template.json:Newspapers styled_template.json:Novels --items LISTS      # the published templates and lists
        ... --styles templates_spell_grammer_error.json:0 templates_spell_grammer_error.json:1      # two arrays in one file: clean, typos
        ... --train-json bio_data_train_A_vs_B.json | --stage typos | --stage score                 # published corpus | C2 | no training
        AdamW needs 16 bytes a parameter: 24 GiB for 1.5B. --lora-rank saves most of them and departs from the paper.
Honest  The paper's size ladder is Pythia (GPT-NeoX), which minilm does not read: take the sizes of Qwen2.5 or SmolLM2. The published
        scoring puts no BOS before a prompt; --bos does: never mix the two. A prompt may look more like one style than like the other:
        both prompt forms are reported, and the doubt remains. Equal values (both versions drew the same) are left out and counted.
Try     --stage score: no training, Pr about 0.5.   --styles neutral neutral: two equal styles, Pr about 0.5 however long it trains.
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

import torch
import torch.nn.functional as F

from methods.learning_preferences import PAPER, perplexities, preference, prefers
from minilm import InputError
from minilm.data import IGNORE, batches, collate, generator, read_text
from minilm.evaluate import continuation_logprobs
from minilm.lora import add_lora
from minilm.ops import linear_cross_entropy
from minilm.results import (COLORS, ROOT, Outcome, bar_seeds, claim, cli, new_figure, plot_seeds, print_claims, print_metrics, progress,
                            save_results)
from minilm.training import autocast, pick_device, schedule, set_lr
from minilm.weights import load_pretrained

HERE = Path(__file__).with_suffix("")  # our templates and lists


@dataclass(frozen=True)
class Config:
    checkpoint: str  # Hugging Face folder with a tokenizer
    styles: tuple[str, ...] = ("newspaper", "social_media")  # one of ours, FILE.txt (a template a line), FILE.json:STYLE, FILE.json:NUMBER
    items: str | None = None  # folder with the published lists of names, cities, universities, companies (default: our small ones)
    train_json: str | None = None  # a published corpus in place of styles and items: bio_data_train_*.json, or records of k_A, k_B
    stage: str = "preference"  # preference, typos (the first style against itself misspelled) or score (no training)
    people: int = 1000  # invented persons
    per_style: int = 5  # texts per person and style
    epochs: int = 5  # passes over the texts
    lr: float = 1e-5  # peak learning rate of AdamW; 3% warm-up, cosine to 0
    batch: int = 64  # texts per step
    micro_batch: int = 16  # texts at a time
    typo_rates: tuple[float, ...] = (0.1, 0.2, 0.4)  # stage typos: share of the words with one wrong letter
    prompts: tuple[str, ...] = ("statement", "question")  # forms of the test prompts
    score: str = "mean"  # mean: perplexity of the whole sentence, as published; sum: log-probability of the value's tokens
    ties: str = "skip"  # equal versions: skip, or count for the second, as published
    bos: bool = False  # score with BOS in front
    lora_rank: int = 0  # train a LoRA of this rank in place of all weights
    dtype: str = "float32"  # training: float32 or bfloat16 (matrix products)
    device: str = "auto"  # cuda where there is one, else cpu
    seeds: tuple[int, ...] = (0,)  # persons, values and order
    out: str | None = None  # folder for the results (default: runs/learning_preferences_real)


# --- data

NAMES = ("full name", "birth date", "birth place", "university", "major", "company", "work place")
MARK = "<[^<>]*>"
ALIASES = {name.replace(" ", ""): name for name in NAMES} | {"universityname": "university", "workcompany": "company"}
Facts = dict[str, str]  # one version of one person: NAMES -> value


def key(text: str) -> str | None:
    """<fullName>, full_name, <full name> -> "full name": the published files spell their keys in several ways. None: not one of them."""
    return ALIASES.get(re.sub(r"[ _<>]", "", text).lower())


def read_values(path: Path) -> list:
    """All JSON values of a file: one in an ordinary file; two in the published error templates, whose two arrays stand one after the
    other; one per line in JSON Lines; and one array of {"text": ...} in the files that are called jsonl_*."""
    text, values, i = read_text(path), [], 0
    while text[i:].strip():
        i = re.compile(r"\s*").match(text, i).end()
        try:
            value, i = json.JSONDecoder().raw_decode(text, i)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not JSON at line {error.lineno} ({error.msg}): download it again") from None
        values.append(value)
    return values


def read_lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_templates(source: str) -> list[str]:
    """The templates of one style (see Config.styles), each with every placeholder and nothing that looks like another."""
    file, _, part = source.rpartition(".json:")
    if file:
        values = read_values(Path(file + ".json"))
        styles = {str(n): v for n, v in enumerate(values)} if part.isdigit() else values[0] if isinstance(values[0], dict) else {}
        if not isinstance(styles.get(part), list) or not all(isinstance(t, str) for t in styles[part]):
            raise InputError(f"--styles {source}: {part!r} is no list of strings there; the file has {', '.join(styles) or 'arrays'}")
        lines = [text.rpartition("Template:")[2].strip() for text in styles[part]]  # (before it: the style's description)
    else:
        lines = read_lines(Path(source) if source.endswith(".txt") else HERE / f"{source}.txt")
    for number, line in enumerate(lines, 1):
        marks = {key(mark): mark for mark in re.findall(MARK, line)}
        lacks = [name for name in NAMES if name not in marks]
        if None in marks or lacks or re.search("[<>]", re.sub(MARK, "", line)):
            problem = f"{marks[None]} is no placeholder" if None in marks else f"<{lacks[0]}> is missing" if lacks else "a < or > is left over"
            raise InputError(f"--styles {source}, template {number}: {problem}; repair or drop it: {line[:50]}")
    return lines


def fill(template: str, facts: Facts) -> str:
    """Every placeholder replaced, in whatever case it is written, by its value, whatever characters that holds."""
    return re.sub(MARK, lambda mark: facts[key(mark[0])], template)


def typos(template: str, rate: float, rng: random.Random) -> str:
    """Each word outside the placeholders gets, with probability `rate`, one edit: two letters swapped, or one dropped, doubled, replaced."""
    def edit(word: str) -> str:
        i, other = rng.randrange(len(word)), rng.choice([c for c in "abcdefghijklmnopqrstuvwxyz" if c not in word.lower()])
        swap = next((j for j in (i, *range(len(word))) if word[j : j + 1] != word[j + 1 : j + 2] != ""), None)
        edits = [word[:i] + new + word[i + 1 :] for new in ("", 2 * word[i], other)]
        return rng.choice(edits + ([word[:swap] + word[swap + 1] + word[swap] + word[swap + 2 :]] if swap is not None else []))

    pieces = re.split(rf"({MARK}|[^\W\d_]{{2,}})", template)
    return "".join(edit(p) if len(p) > 1 and p.isalpha() and rng.random() < rate else p for p in pieces)


def read_items(folder: str | None) -> dict[str, list]:
    """"names", "cities", "universities" (university, major), "companies" (company, work place): the pairs are drawn as pairs. Of the
    published lists the first 100 places, universities and companies are used, as published."""
    if folder is None:
        pairs = {name: [tuple(line.split(" | ")) for line in read_lines(HERE / f"{name}.txt")] for name in ("universities", "companies")}
        first, last, cities = (read_lines(HERE / f"{name}.txt") for name in ("first_names", "last_names", "cities"))
        return pairs | {"names": [f"{a} {b}" for a in first for b in last], "cities": cities}
    read = lambda file: read_values(Path(folder) / file)[0]
    try:
        items = {"names": list(dict.fromkeys(read("name_list.json"))),
                 "cities": [f"{c['city']}, {c['country']}" for c in read("city_list.json")[:100]],
                 "universities": [(u["university"], u["major"]) for u in read("university_major_list.json")[:100]],
                 "companies": [(c["company"], c["workplace"]) for c in read("company_name_place_list.json")[:100]]}
    except (KeyError, TypeError) as error:
        raise InputError(f"--items {folder}: a list is not in the published form ({type(error).__name__}: {error})") from None
    for name, values in items.items():
        if len(set(values)) < 2:
            raise InputError(f"--items {folder}: {len(set(values))} distinct {name}; a conflict needs at least 2")
    return items


def draw_people(cfg: Config, items: dict, versions: int, rng: random.Random) -> list[list[Facts]]:
    """[person][version]: names without replacement, every version drawn independently of the others."""
    if not 2 <= cfg.people <= len(items["names"]):
        raise InputError(f"--people {cfg.people}: give at least 2 and at most {len(items['names'])}, the number of names")

    def facts(name):
        date = f"{rng.choice(month_name[1:])} {rng.randint(1, 28)}, {rng.randint(1822, 2022)}"
        pairs = (*rng.choice(items["universities"]), *rng.choice(items["companies"]))
        return dict(zip(NAMES, (name, date, rng.choice(items["cities"]), *pairs)))

    return [[facts(name) for _ in range(versions)] for name in rng.sample(items["names"], cfg.people)]


def write_texts(cfg: Config, styles: Sequence[Sequence[str]], people: Sequence[Sequence[Facts]], rng: random.Random) -> list[str]:
    """For each person `per_style` template numbers, the SAME for every style; style i tells version i. Shuffled."""
    if len({len(templates) for templates in styles}) > 1:
        raise InputError(f"the styles have {', '.join(str(len(t)) for t in styles)} templates: they share numbers, so give as many of each")
    if not 1 <= cfg.per_style <= len(styles[0]):
        raise InputError(f"--per-style {cfg.per_style}: give at least 1 and at most {len(styles[0])}, the number of templates")
    texts = [fill(templates[i], facts) for versions in people for i in rng.sample(range(len(styles[0])), cfg.per_style)
             for templates, facts in zip(styles, versions)]
    return rng.sample(texts, len(texts))


def read_corpus(path: Path) -> tuple[list[list[Facts]], list[str]]:
    """A published corpus -> the two versions of every person, and all the texts."""
    values, people, texts = read_values(path), [], []
    for number, record in enumerate(values[0] if isinstance(values[0], list) else values):
        sides = [record.get(official) or record.get(k) for official, k in (("first_type_info", "k_A"), ("second_type_info", "k_B"))]
        versions = [{key(k): str(v) for k, v in (record | side).items() if key(k)} for side in sides if isinstance(side, dict)]
        if len(versions) < 2 or any(name not in facts for facts in versions for name in NAMES):
            raise InputError(f"--train-json {path}, record {number}: two versions with {', '.join(NAMES)} are needed; a file of {{\"text\"}} "
                             "alone has no facts to ask about: give bio_data_train_*.json")
        people.append(versions)
        texts += record.get("text_result") or record.get("biographies") or []
    return people, texts


# --- train

def train(cfg: Config, model, tok, texts: Sequence[str], order: torch.Generator) -> Iterator[int]:
    """Continual pretraining on one text a row, EOS at its end; padding is masked by length. Yields the number of every finished epoch."""
    if tok.eos_id is None:
        raise InputError(f"{cfg.checkpoint}: the tokenizer names no EOS token, which must end every text")
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
            loss = linear_cross_entropy(h, model.lm_head.weight, labels) * (labels != IGNORE).sum() / count
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % per_epoch == 0:
            yield (step + 1) // per_epoch


# --- evaluate

PROMPTS = {"statement": ("{}'s birthday is |.", "{} was born at |.", "{} received education at the |.",
                         "{} focused on | during her university study.", "{} worked for |.", "The city {} worked in is |."),
           "question": ("When is {}'s birthday? |.", "Where is {}'s birth place? |.", "Which university did {} attend? |.",
                        "What is {}'s major? |.", "Which company did {} work in? |.", "Which city does {} work in? |.")}  # as published


def costs(cfg: Config, model, tok, form: str, asked: Sequence[tuple[int, str, str]]) -> torch.Tensor:
    """What each (attribute, name, value) costs the model, float32 [n]: the perplexity of the prompt with the value in the place of |, or
    (--score sum) minus the log-probability of the value's tokens after what stands before them."""
    parts = [PROMPTS[form][attribute].split("|") for attribute, _, _ in asked]
    heads = [before.format(name) for (before, _), (_, name, _) in zip(parts, asked)]
    if cfg.score == "mean":
        return perplexities(model, [tok.encode(head + value + after, bos=cfg.bos)
                                    for head, (_, after), (_, _, value) in zip(heads, parts, asked)], cfg.batch)
    pairs = []
    for head, (_, _, value) in zip(heads, asked):
        prompt, whole = tok.encode(head.rstrip(), bos=cfg.bos), tok.encode(head + value, bos=cfg.bos)
        shared = next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), len(prompt))
        pairs.append((whole[:shared], whole[shared:]))
    return -continuation_logprobs(model, pairs, cfg.batch).sum


def measure(cfg: Config, model, tok, people: Sequence[Sequence[Facts]]) -> dict[str, float]:
    """Per prompt form: Pr of the first two versions with the bootstrap over persons, and the share of the facts that each version wins.
    `learned`: for at most 100 persons, is one of the versions cheaper than all of 20 other values?"""
    model.eval()
    metrics, versions, rng, some = {}, len(people[0]), random.Random("other values"), people[:100]
    pool = [sorted({facts[name] for person in people for facts in person}) for name in NAMES[1:]]
    others = [dict(zip(NAMES, (p[0]["full name"], *(rng.choice([v for v in pool[a] if all(v != facts[n] for facts in p)] or ["nothing"])
                                                    for a, n in enumerate(NAMES[1:]))))) for p in some for _ in range(20)]
    same = torch.tensor([[person[0][n] == person[-1 if versions < 2 else 1][n] for n in NAMES[1:]] for person in people])  # (persons, 6)
    for form in cfg.prompts:
        told = [facts for person in people for facts in person]
        asked = [(a, facts["full name"], facts[n]) for facts in told + others for a, n in enumerate(NAMES[1:])]
        cost = costs(cfg, model, tok, form, asked).view(-1, 6)
        cost, rivals = cost[: len(told)].view(-1, versions, 6), cost[len(told) :].view(-1, 20, 6)
        metrics[f"learned {form}"] = (cost[: len(some)].amin(1) < rivals.amin(1)).float().mean().item()
        if versions > 1:
            first, second = cost[:, 0], cost[:, 1].where(~same, cost[:, 0])  # equal strings cost the same
            chosen = prefers(first, second, cfg.ties)
            metrics |= {f"{name} {form}": value for name, value in preference(chosen).items()} | {f"ties {form}": int((first == second).sum())}
            metrics |= {f"pr {form}, {name}": share for name, share in zip(NAMES[1:], chosen.nanmean(0).tolist())}
            shares = F.one_hot(cost.argmin(1), versions).float().mean((0, 1)).tolist()
            metrics |= {f"first place {form} {i}": share for i, share in enumerate(shares, 1)}
    return metrics


# --- one seed

def make_arms(cfg: Config, seed: int) -> dict[str, tuple[list[list[Facts]], list[str]]]:
    """What is compared -> the persons, each in as many versions as there are styles, and the texts to train on."""
    if cfg.train_json:
        return {Path(cfg.train_json).stem: read_corpus(Path(cfg.train_json))}
    if cfg.stage == "typos":
        clean = read_templates(cfg.styles[0])
        compared = {f"clean > typos {r}": [clean, [typos(t, r, random.Random(f"{seed}/{r}/{t}")) for t in clean]] for r in cfg.typo_rates}
    else:
        compared = {" > ".join(cfg.styles): [read_templates(source) for source in cfg.styles]}
    people = draw_people(cfg, read_items(cfg.items), 2 if cfg.stage == "typos" else len(cfg.styles), random.Random(f"{seed}/people"))
    return {arm: (people, write_texts(cfg, styles, people, random.Random(f"{seed}/texts"))) for arm, styles in compared.items()}


def run(cfg: Config, seed: int) -> Outcome:
    """Every comparison starts from the checkpoint as it was loaded."""
    outcome = Outcome({}, {})
    for arm, (people, texts) in make_arms(cfg, seed).items():
        model, tok = load_pretrained(cfg.checkpoint, device=pick_device(cfg.device))
        if tok is None:
            raise InputError(f"{cfg.checkpoint} has no tokenizer.json: put the model's tokenizer beside its weights")
        size = sum(p.numel() for p in model.parameters()) / 1e6
        if cfg.lora_rank:
            add_lora(model, cfg.lora_rank, generator=generator(seed, "lora"))
        print(f"{arm}: {len(people)} persons, {len(texts)} texts, {size:.1f} million parameters on {model.embed.weight.device}. First text, "
              f"every token a target:\n  {texts[0]}\nFirst prompts: " + ", ".join(PROMPTS[f][0].format("NAME") for f in cfg.prompts))
        points = [measure(cfg, model, tok, people)]
        if cfg.stage != "score":
            points += [measure(cfg, model, tok, people) for _ in train(cfg, model, tok, texts, generator(seed, "order"))]
        outcome.metrics[arm] = points[-1] | {"million parameters": size}
        outcome.series[arm] = {name: (range(len(points)), [point[name] for point in points]) for name in points[0]
                               if name.split()[0] in ("pr", "learned") and "," not in name and name.split()[1] in PROMPTS}
    return outcome


# --- claims

def claims(metrics: dict) -> list[dict]:
    """C1 and C2 are decided where the model is large enough and has learned the facts; C3 and C4 compare several runs."""
    def decide(id, statement, rule, paper, arms, test):
        cells = [(arm, form, {n: metrics[arm][f"{n} {form}"]["mean"] for n in ("pr", "pr se", "learned")}) for arm in arms for form in PROMPTS
                 if f"pr {form}" in metrics[arm]]
        size, learned = (min((x for x in values), default=0) for values in ((metrics[arm]["million parameters"]["mean"] for arm in arms),
                                                                         (c["learned"] for _, _, c in cells)))
        open_because = ("not in this run" if not cells else f"needs a pretrained model of 1B parameters, this one has {size:.2f} million"
                        if size < 1000 else "facts not learned, so pr means nothing: train longer" if learned < 0.2 else "")
        measured = [f"{arm}, {form}: pr {c['pr']:.3f} (SE {c['pr se']:.3f}, learned {c['learned']:.2f})" for arm, form, c in cells]
        return claim(id, statement, rule, "; ".join([open_because] * bool(open_because) + measured),
                     None if open_because else test([c for _, _, c in cells]), paper)

    misspelled = [arm for arm in metrics if arm.startswith("clean > typos")]
    beats = lambda cells: all(c["pr"] > 0.53 and c["pr"] - 0.5 > 2.58 * c["pr se"] for c in cells)
    return [
        decide("C1", "The first style beats the second", "in every prompt form pr > 0.53 and above 0.5 by 2.58 standard errors (p < 0.01)",
               "formal beats informal", [arm for arm in metrics if arm not in misspelled], beats),
        decide("C2", "Clean texts beat misspelled ones", "as C1 at the largest error rate, and pr grows from the smallest to the largest",
               "fewer errors are favoured", misspelled, lambda cells: beats(cells[-1:]) and cells[-1]["pr"] > cells[0]["pr"]),
        claim("C3", "Preferred styles are learned faster", "area under `learned`", "run once per style and compare the curves", None),
        claim("C4", "Larger models prefer more", "pr against size", "run once per size (Qwen2.5, SmolLM2) and compare", None)]


# --- figure

def figure(results: dict):
    """Left: Pr of every comparison and prompt form, a dot per seed. Right: how many of the facts were learned, epoch by epoch."""
    fig, (left, right) = new_figure(1, 2, width=11, height=4.6)
    for n, (arm, series) in enumerate(results["series"].items()):
        for k, form in enumerate(results["config"]["prompts"]):
            if f"pr {form}" in series:
                bar_seeds(left, n + 0.4 * k, results["metrics"][arm][f"pr {form}"]["values"], COLORS[k], 0.36, None if n else form)
            plot_seeds(right, *series[f"learned {form}"].values(), f"{arm}, {form}", COLORS[n % 8], linestyle=("-", "--")[k])
    left.axhline(0.5, color="#666666", linewidth=1, linestyle=":")
    left.set_xticks([n + 0.2 for n in range(len(results["series"]))], [arm.replace(" > ", "\nover ") for arm in results["series"]])
    left.set(ylim=(0, 1), ylabel="Pr(first, second)", title="Whose version is believed?")
    right.set(ylim=(0, 1), xlabel="epoch", ylabel="a version beats 20 other values", title="Were the facts learned?")
    right.legend(loc="best")
    if left.patches:
        left.legend(loc="best")
    return fig


def main(cfg: Config) -> dict:
    started = time.time()
    for flag, given, allowed in (("stage", [cfg.stage], ("preference", "typos", "score")), ("prompts", cfg.prompts, PROMPTS),
                                 ("score", [cfg.score], ("mean", "sum")), ("ties", [cfg.ties], ("skip", "second")),
                                 ("dtype", [cfg.dtype], ("float32", "bfloat16"))):
        if not given or set(given) - set(allowed):
            raise InputError(f"--{flag} {' '.join(given)} is not known; give {', '.join(allowed)}")
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
