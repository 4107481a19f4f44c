"""Hallu-PI and AMBER on a model of your own: ask it, score it, or score answers that exist.

    python vision_eval/benchmark.py --model openai:NAME --base-url http://localhost:8000/v1 --data data.jsonl --images DIR --out DIR
    python vision_eval/benchmark.py --model openai:NAME --base-url URL --format amber --data query_all.json --images DIR \\
        --annotations annotations.json --associations relation.json --safe-words safe_words.txt
    python vision_eval/benchmark.py --score answers.json --data data.jsonl
    python vision_eval/benchmark.py --model tiny:FOLDER --data exam/data.jsonl --images exam      # what hallu_pi.py --save, --export wrote

Data   JSONL, one question a line, with the fields of metrics.Item (`hallu_pi.py --export` writes such a file); for AMBER its query files.
       Answers are read and written as [{"id": ..., "response": "..."}].
Runs   An interrupted run goes on where it stopped: every answer is in OUT/cache.jsonl as soon as it came. Hallu-PI asks about 11,000
       questions, AMBER 15,220. Yes/no questions of AMBER get an answer instruction, which its files lack; the run says so.
Models any callable `model(turns) -> str` (client.py) can be given to `evaluate` in Python.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np

from minilm import InputError
from minilm.data import write_json
from minilm.results import cli
from vision_eval import vlm
from vision_eval.client import ChatClient, Turn, ask_all, plain
from vision_eval.metrics import FIELDS, Amber, Item, amber_score, make_amber, score
from vision_eval.scenes import SIZE, TEMPLATES


@dataclass(frozen=True)
class Config:
    model: str = ""  # openai:NAME (a chat endpoint) or tiny:FOLDER (saved by hallu_pi.py --save)
    base_url: str = ""  # the endpoint, for example http://localhost:8000/v1
    key_env: str | None = None  # environment variable that holds the endpoint's key
    data: str = ""  # questions: a JSONL file, or AMBER's query file
    images: str = ""  # folder of their pictures
    format: Literal["hallu_pi", "amber"] = "hallu_pi"  # of data and answers, and which scorer
    scenarios: tuple[str, ...] = ()  # hallu_pi: these only
    baseline: Literal["none", "reminder", "icl"] = "none"  # a warning before, or demonstrations before, every question
    shots: int = 2  # icl: demonstrations of the same scenario and field; their pictures are then not asked about
    limit: int = 0  # ask about the first so many pictures only (0: all), so that pairs stay whole
    seed: int = 0  # which pictures are demonstrations
    workers: int = 8  # questions at a time
    timeout: float = 120  # seconds to wait for one answer
    retries: int = 6  # further attempts after a failure
    max_tokens: int = 256  # longest answer
    out: str = "runs/benchmark"  # folder for cache.jsonl, answers.json, scores.json
    score: str = ""  # score this answer file and ask nobody
    annotations: str = ""  # amber: annotations.json
    associations: str = ""  # amber: relation.json
    safe_words: str = ""  # amber: safe_words.txt
    similarity: str = ""  # amber: JSON list of [word, word, cosine], in place of spaCy's vectors; without it equal words only
    parser: Literal["first", "strict", "mme"] = "first"  # how yes and no are found in an answer
    aggregate: Literal["micro", "macro"] = "micro"  # how CHAIR, Cover, Cog run over responses
    positive: Literal["yes", "no"] = "yes"  # positive class of F1
    negation: bool = False  # do not count objects that an answer denies ("no circle"); the published scorers do


# --- data

def read_rows(path: str, flag: str) -> list:
    """A JSON list, or the lines of a JSONL file."""
    if not path or not Path(path).is_file():
        raise FileNotFoundError(f"--{flag} {path or '(nothing)'}: no such file")
    text = Path(path).read_text(encoding="utf-8")
    try:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()] if path.endswith(".jsonl") else json.loads(text)
    except ValueError as error:
        raise InputError(f"--{flag} {path} is not valid JSON ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"--{flag} {path} must hold a list of at least one row")
    return rows


def read_items(path: str) -> list[Item]:
    items = []
    for number, row in enumerate(read_rows(path, "data"), 1):
        where = f"{path}, question {number}"
        if not isinstance(row, dict) or set(row) - set(Item._fields) or set(Item._fields[:9]) - set(row):
            odd = sorted(set(Item._fields[:9]) ^ set(row)) if isinstance(row, dict) else row
            raise InputError(f"{where}: needs the fields {', '.join(Item._fields)}; missing or unknown: {odd}")
        for name in ("truth", "hal"):
            if not isinstance(row.get(name, []), list) or not all(isinstance(word, str) for word in row.get(name, [])):
                raise InputError(f"{where}: {name} must be a list of words, not {json.dumps(row[name])[:40]}")
        if type(row.get("severity", 0)) is not int or not 0 <= row.get("severity", 0) <= 5:
            raise InputError(f"{where}: severity must be 0 to 5 (0: undamaged), not {json.dumps(row['severity'])[:40]}")
        item = Item(**{**row, "truth": tuple(row.get("truth", ())), "hal": tuple(row.get("hal", ()))})
        if item.task not in ("gen", "disc") or item.phase not in ("before", "after") or item.task == "disc" and item.field not in FIELDS:
            raise InputError(f"{where}: task gen or disc, phase before or after, field one of {', '.join(FIELDS)}; here {item.task}, "
                             f"{item.phase}, {item.field}")
        items.append(item)
    return items


def read_amber(cfg: Config) -> Amber:
    similar = None
    if cfg.similarity:
        table = {frozenset(row[:2]): float(row[2]) for row in read_rows(cfg.similarity, "similarity")}
        similar = lambda a, b: 1.0 if a == b else table.get(frozenset((a, b)), 0.0)
    for flag in ("associations", "safe_words"):
        if not Path(getattr(cfg, flag) or "(nothing)").is_file():
            raise FileNotFoundError(f"--{flag.replace('_', '-')} {getattr(cfg, flag) or '(nothing)'}: no such file; AMBER needs it")
    associations = json.loads(Path(cfg.associations).read_text(encoding="utf-8"))
    safe = Path(cfg.safe_words).read_text(encoding="utf-8").split("\n")
    return make_amber(read_rows(cfg.annotations, "annotations"), associations, [w.strip() for w in safe if w.strip()], similar)


def amber_items(path: str, amber: Amber) -> list[Item]:
    """AMBER's queries as items whose id is the number; a yes/no question gets the instruction that its file lacks."""
    items = []
    for row in read_rows(path, "data"):
        if set(row) < {"id", "image", "query"} or row["id"] not in amber.annotations:
            raise InputError(f"{path}: {row} is not one of AMBER's queries (id, image, query; the id in the annotations)")
        gen = amber.annotations[row["id"]]["type"] == "generative"
        items.append(Item(row["id"], row["image"], "amber", "before", "gen" if gen else "disc", "", "",
                          row["query"] + ("" if gen else TEMPLATES["instruction"]), ""))
    print(f"added {TEMPLATES['instruction'].strip()!r} to {sum(i.task == 'disc' for i in items)} questions")
    return items


def read_answers(path: str, number: bool = False) -> dict:
    """{id: response} of a list of {"id", "response"}."""
    answers = {}
    for row in read_rows(path, "score"):
        if not isinstance(row, dict) or "id" not in row or not isinstance(row.get("response", 0), str | None):
            raise InputError(f"{path}: an answer must be {{\"id\": ..., \"response\": \"...\"}}, this one is {json.dumps(row)[:80]}")
        id = int(row["id"]) if number else row["id"]
        if id in answers:
            raise InputError(f"{path}: id {id} is answered more than once")
        answers[id] = row["response"]
    return answers


def read_image(folder: str, name: str) -> np.ndarray:
    from PIL import Image

    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"--images {folder} lacks {name}, which a question is about")
    return np.array(Image.open(path).convert("RGB"))


# --- asking

def split_pool(items: Sequence[Item], shots: int, seed: int) -> tuple[list[Item], list[Item]]:
    """(items to ask, items to demonstrate): of every scenario and phase, `shots` pictures are set aside."""
    chosen = set()
    for key in dict.fromkeys((i.scenario, i.phase) for i in items):
        pictures = [*dict.fromkeys(i.image for i in items if (i.scenario, i.phase) == key)]
        if len(pictures) <= shots:
            raise InputError(f"scenario {key[0]} ({key[1]}) has {len(pictures)} pictures: --shots {shots} would leave none to ask about")
        chosen |= {(*key, image) for image in random.Random(f"{seed}/{key}").sample(pictures, shots)}
    aside = lambda i: (i.scenario, i.phase, i.image) in chosen
    return [i for i in items if not aside(i)], [i for i in items if aside(i)]


def right_answer(item: Item) -> str:
    return item.answer.capitalize() if item.task == "disc" else item.answer or ", ".join(item.truth) + "."


def make_turns(item: Item, baseline: str, pool: Sequence[Item], shots: int, seed: int, read: Callable[[str], np.ndarray]) -> list[Turn]:
    """reminder: a sentence before the prompt. icl: demonstrations with their right answers first, one per picture set aside, of the same
    scenario, task and, where there is one, field; the first says that the input is perturbed."""
    turns, text = [], item.question
    if baseline == "reminder":
        text = TEMPLATES["reminder"] + text
    if baseline == "icl":
        same = [d for d in pool if (d.scenario, d.phase, d.task) == (item.scenario, item.phase, item.task)]
        rng = random.Random(f"{seed}/{item.id}")
        for image in dict.fromkeys(d.image for d in same):
            of_image = [d for d in same if d.image == image]
            d = rng.choice([d for d in of_image if d.field == item.field] or of_image)
            note = "The images are perturbed. " if not turns else ""
            turns.append((read(d.image), note + d.question, right_answer(d)))
    return [*turns[:shots], (read(item.image), text, None)]


def open_model(cfg: Config) -> Callable[[Sequence[Turn]], str]:
    kind, _, name = cfg.model.partition(":")
    if kind == "openai" and name:
        return ChatClient(cfg.base_url, name, Path(cfg.out) / "cache.jsonl", cfg.key_env, cfg.timeout, cfg.retries, 1.0, cfg.max_tokens)
    if kind == "tiny" and name:
        return tiny_model(vlm.load_vlm(Path(name)))
    raise InputError(f"--model {cfg.model!r} must be openai:NAME or tiny:FOLDER (or give --score FILE)")


def tiny_model(model: vlm.TinyVLM) -> Callable[[Sequence[Turn]], str]:
    def say(image: np.ndarray | None, prompt: str) -> str:
        if image is None or image.shape != (SIZE, SIZE, 3):
            raise InputError(f"the tiny model reads a picture of {SIZE} x {SIZE} pixels, not {None if image is None else image.shape}")
        return vlm.answer(model, image[None], [[prompt]])[0][0]

    return plain(say)


def evaluate(model: Callable[[Sequence[Turn]], str], items: Sequence[Item], cfg: Config) -> tuple[list[Item], dict]:
    """Asks the model -> (items asked, {id: answer or None})."""
    if cfg.scenarios:
        if unknown := set(cfg.scenarios) - {i.scenario for i in items}:
            raise InputError(f"--scenarios {' '.join(sorted(unknown))}: the data has {', '.join(dict.fromkeys(i.scenario for i in items))}")
        items = [i for i in items if i.scenario in cfg.scenarios]
    items, pool = split_pool(items, cfg.shots, cfg.seed) if cfg.baseline == "icl" else (list(items), [])
    if cfg.limit:
        pictures = set([*dict.fromkeys(i.image for i in items)][: cfg.limit])
        items = [i for i in items if i.image in pictures]
    read = cache(partial(read_image, cfg.images)) if len({i.image for i in items}) < 2000 else partial(read_image, cfg.images)
    turns = lambda item: make_turns(item, cfg.baseline, pool, cfg.shots, cfg.seed, read)
    answers = ask_all(model, [partial(turns, item) for item in items], cfg.workers)
    return items, {item.id: answer for item, answer in zip(items, answers)}


# --- report

def report(cfg: Config, items: Sequence[Item], answers: dict) -> dict:
    """Scores and prints: one row per scenario and phase."""
    table = score(items, answers, cfg.parser, cfg.aggregate, cfg.positive, cfg.negation)
    print(f"scorer: paper ({cfg.aggregate}); yes and no: {cfg.parser}; positive class of F1: {cfg.positive}; negation "
          f"{'understood' if cfg.negation else 'ignored'}; a missing answer counts as wrong")
    columns = ("PI", "ACC+", "ACC", "F1", "yes rate", "invalid", "CHAIR", "Cover", "Hal", "Cog", "unanswered")
    print(f"{'scenario':22}" + "".join(f"{c:>11}" for c in columns))
    for (scenario, phase), row in table.items():
        print(f"{scenario + ' ' + phase:22}" + "".join(f"{row[c]:11.1f}" if c in row else f"{'-':>11}" for c in columns))
    return {"scorer": "paper", "rows": [{"scenario": s, "phase": p, **row} for (s, p), row in table.items()]}


def main(cfg: Config) -> dict:
    amber = read_amber(cfg) if cfg.format == "amber" else None
    if cfg.score:
        answers = read_answers(cfg.score, number=amber is not None)
        items = [] if amber else read_items(cfg.data)
    else:
        items = amber_items(cfg.data, amber) if amber else read_items(cfg.data)
        items, answers = evaluate(open_model(cfg), items, cfg)
        write_json(Path(cfg.out) / "answers.json", [{"id": id, "response": text} for id, text in answers.items()])
    if amber:
        scores = amber_score(amber, {id: text for id, text in answers.items() if text is not None})
        print(json.dumps(scores, indent=1))
    else:
        scores = report(cfg, items, answers)
    write_json(Path(cfg.out) / "scores.json", {"settings": {k: v for k, v in vars(cfg).items() if k != "key_env"}, **scores})
    print(f"wrote {cfg.out}/scores.json")
    return scores


if __name__ == "__main__":
    cli(main, Config)
