"""Hallu-PI and AMBER on a model of your own: ask it, score it, or score answers that exist.

    python vision_eval/hallu_pi_experiment.py --export exam     # questions and pictures as files
    python vision_eval/benchmark.py --model openai:NAME --base-url http://localhost:8000/v1 \\
        --data exam/data.jsonl --images exam --out runs/mine
    python vision_eval/benchmark.py --model openai:NAME --base-url http://localhost:8000/v1 \\
        --format amber --data query_all.json --images DIR \\
        --annotations annotations.json --associations relation.json --safe-words safe_words.txt
    python vision_eval/benchmark.py --score answers.json --data exam/data.jsonl
    python vision_eval/benchmark.py --model tiny:FOLDER --data exam/data.jsonl --images exam

Data   The published Hallu-PI archive cannot be read here: its layout is not documented, and it
       would have to be converted first. What can be read: AMBER's files as published, and JSONL,
       one question a line, with the fields of metrics.Item (`hallu_pi_experiment.py --export`
       writes such a file). Answers are read and written as [{"id": ..., "response": "..."}].
Runs   An interrupted run goes on where it stopped: every answer is in OUT/cache.jsonl as soon as it
       came. Hallu-PI asks about 11,000 questions, AMBER 15,220: try --limit 2 first. Yes/no
       questions of AMBER get an answer instruction, which its files lack; the run says so. A run
       without one answer has no scores and ends with status 2.
Models any callable `model(turns) -> str` (client.py) can be given to `evaluate` in Python; tiny:
       is a model that `hallu_pi_experiment.py --save FOLDER` wrote.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np

from minilm import InputError
from minilm.data import read_text, write_json
from minilm.results import check_range, check_unused, cli
from vision_eval import vlm
from vision_eval.client import ChatClient, Turn, ask_all, plain
from vision_eval.metrics import (FIELDS, Amber, Item, amber_score, check_ids, make_amber, score,
                                 vocabulary_of)
from vision_eval.perturb import read_picture
from vision_eval.scenes import SIZE, TEMPLATES


@dataclass(frozen=True)
class Config:
    model: str = ""  # openai:NAME (a chat endpoint) or tiny:FOLDER
    base_url: str = ""  # the endpoint, for example http://localhost:8000/v1
    key_env: str | None = None  # environment variable that holds the endpoint's key
    data: str = ""  # questions: a JSONL file, or AMBER's query file
    images: str = ""  # folder of their pictures
    format: Literal["hallu_pi", "amber"] = "hallu_pi"  # of data and answers, and which scorer
    scenarios: tuple[str, ...] = ()  # hallu_pi: these only ("none": the shared before)
    baseline: Literal["none", "reminder", "icl"] = "none"  # a warning, or demonstrations, before
    shots: int = 2  # icl: demonstrations of one scenario and field, never asked about
    limit: int = 0  # scenes per scenario, the same before and after it (0: all)
    seed: int = 0  # which pictures are demonstrations
    workers: int = 8  # questions at a time
    timeout: float = 120  # seconds to wait for one answer
    retries: int = 6  # further attempts after a failure
    patience: int = 20  # give up after so many failures in a row without one answer
    max_tokens: int = 256  # longest answer
    out: str = "runs/benchmark"  # folder for cache.jsonl, answers.json, scores.json
    score: str = ""  # score this answer file and ask nobody
    annotations: str = ""  # amber: annotations.json
    associations: str = ""  # amber: relation.json
    safe_words: str = ""  # amber: safe_words.txt
    similarity: str = ""  # amber: JSON list of [word, word, cosine] (without: equal words only)
    parser: Literal["first", "strict", "mme"] = "first"  # how yes and no are found in an answer
    aggregate: Literal["micro", "macro"] = "micro"  # how CHAIR, Cover, Cog run over responses
    positive: Literal["yes", "no"] = "yes"  # positive class of F1
    negation: bool = False  # do not count denied objects ("no circle"); published scorers do


# --- data


def read_json_file(path: str, flag: str):
    """The JSON value of a file, or the list of a JSONL file's lines. Errors name flag and file."""
    if not path or not Path(path).is_file():
        raise FileNotFoundError(f"--{flag} {path or '(nothing)'}: no such file")
    text = read_text(path)
    try:
        if path.endswith(".jsonl"):
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--{flag} {path} is not valid JSON ({error})") from None


def read_rows(path: str, flag: str) -> list:
    rows = read_json_file(path, flag)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"--{flag} {path} must hold a list of at least one row")
    return rows


def shown(value) -> str:
    return json.dumps(value)[:60]


def read_items(path: str) -> list[Item]:
    rows = read_rows(path, "data")
    return [read_item(row, f"{path}, question {number}") for number, row in enumerate(rows, 1)]


def is_text(value) -> bool:
    """Whether it is a string that can be written again: JSON can hold half a character."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


WORDS = ("id", "image", "scenario", "phase", "task", "field", "pair_id", "question", "answer")


def read_item(row, where: str) -> Item:
    if not isinstance(row, dict):
        raise InputError(f"{where}: must be an object with {', '.join(WORDS)}, not {shown(row)}")
    odd = sorted((set(WORDS) - set(row)) | (set(row) - set(Item._fields)))
    if odd:
        raise InputError(f"{where}: needs the fields {', '.join(Item._fields)}; "
                         f"missing or unknown: {', '.join(odd)}")
    for name in (*WORDS, "region"):
        if not is_text(row.get(name, "")):
            raise InputError(f"{where}: {name} must be a text, not {shown(row[name])}")
    for name in ("truth", "hal"):
        words = row.get(name, [])
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise InputError(f"{where}: {name} must be a list of words, not {shown(words)}")
    severity = row.get("severity", 0)
    seed = row.get("seed", 0)
    if type(severity) is not int or not 0 <= severity <= 5:
        raise InputError(f"{where}: severity must be 0 to 5 (0: undamaged), not {shown(severity)}")
    if type(seed) is not int:
        raise InputError(f"{where}: seed must be a whole number, not {shown(seed)}")
    truth, hal = tuple(row.get("truth", ())), tuple(row.get("hal", ()))
    item = Item(**{**row, "truth": truth, "hal": hal})
    fits = item.task in ("gen", "disc") and item.phase in ("before", "after")
    if not fits or item.task == "disc" and item.field not in FIELDS:
        raise InputError(f"{where}: task gen or disc, phase before or after, field one of "
                         f"{', '.join(FIELDS)}; here {item.task}, {item.phase}, {item.field}")
    return item


def read_similarity(path: str) -> Callable[[str, str], float]:
    """[[word, word, cosine], ...] -> a function of two words; equal words have 1, others 0."""
    table = {}
    for row in read_rows(path, "similarity"):
        if not isinstance(row, list) or [type(x) for x in row[:2]] != [str, str] or len(row) != 3:
            raise InputError(f"--similarity {path}: a row must be [word, word, cosine], "
                             f"not {shown(row)}")
        if type(row[2]) not in (int, float):
            raise InputError(f"--similarity {path}: {shown(row)} has no number as its cosine")
        table[frozenset(row[:2])] = float(row[2])

    def similar(a: str, b: str) -> float:
        return 1.0 if a == b else table.get(frozenset((a, b)), 0.0)

    return similar


def read_amber(cfg: Config) -> Amber:
    for flag in ("annotations", "associations", "safe_words"):
        path = getattr(cfg, flag)
        if not Path(path or "(nothing)").is_file():
            raise FileNotFoundError(f"--{flag.replace('_', '-')} {path or '(nothing)'}: "
                                    "no such file; AMBER needs it")
    safe = [line.strip() for line in read_text(cfg.safe_words).splitlines()]
    return make_amber(
        read_rows(cfg.annotations, "annotations"),
        read_json_file(cfg.associations, "associations"),
        [word for word in safe if word],
        read_similarity(cfg.similarity) if cfg.similarity else None,
    )


def amber_items(path: str, amber: Amber) -> list[Item]:
    """AMBER's queries as items whose id is the number; a yes/no question gets the instruction that
    its file lacks."""
    items = []
    instruction = TEMPLATES["instruction"]
    for row in read_rows(path, "data"):
        fits = isinstance(row, dict) and type(row.get("id")) is int
        if not fits or row["id"] not in amber.annotations:
            raise InputError(f"{path}: {shown(row)} is not one of AMBER's queries "
                             "(id, image, query; the id in the annotations)")
        if not isinstance(row.get("image"), str) or not isinstance(row.get("query"), str):
            raise InputError(f"{path}: {shown(row)} needs an image and a query, both texts")
        gen = amber.annotations[row["id"]]["type"] == "generative"
        question = row["query"] + ("" if gen else instruction)
        task = "gen" if gen else "disc"
        items.append(Item(row["id"], row["image"], "amber", "before", task, "", "", question, ""))
    added = sum(item.task == "disc" for item in items)
    print(f"added {instruction.strip()!r} to {added} questions")
    return items


def read_answers(path: str, number: bool = False) -> dict:
    """{id: response} of a list of {"id", "response"}; a response of null is a lost one."""
    answers = {}
    for row in read_rows(path, "score"):
        fits = isinstance(row, dict) and isinstance(row.get("response", 0), str | None)
        if not fits or type(row.get("id")) not in (int, str):
            raise InputError(f'{path}: an answer must be {{"id": ..., "response": "..."}}, '
                             f"this one is {shown(row)}")
        id = row["id"]
        if number:
            if not str(id).strip().isdecimal():
                raise InputError(f"{path}: AMBER's ids are numbers, this one is {shown(id)}")
            id = int(id)
        if id in answers:
            raise InputError(f"{path}: id {id} is answered more than once")
        answers[id] = row["response"]
    if all(text is None for text in answers.values()):
        raise InputError(f"{path} holds no answer: every response is null")
    return answers


# --- asking


def within(items: Iterable[Item], scenarios: Sequence[str]) -> list[Item]:
    """The items of these scenarios."""
    items = list(items)
    known = dict.fromkeys(item.scenario for item in items)
    unknown = sorted(set(scenarios) - set(known))
    if unknown:
        raise InputError(f"--scenarios {' '.join(unknown)}: the data has {', '.join(known)}")
    return [item for item in items if item.scenario in scenarios]


def scene_of(item: Item) -> str:
    """What stays the same before and after: the id without scenario, phase and question if it is
    SCENARIO/PHASE/SCENE/..., as --export writes it; else the picture."""
    parts = item.id.split("/") if isinstance(item.id, str) else []
    return parts[2] if parts[:2] == [item.scenario, item.phase] and len(parts) > 3 else item.image


def first_scenes(items: Sequence[Item], limit: int) -> list[Item]:
    """The first `limit` scenes of every scenario and phase, so that what is compared is asked of
    the same scenes; pairs stay whole."""
    scenes: dict[tuple[str, str], dict[str, None]] = {}
    for item in items:
        scenes.setdefault((item.scenario, item.phase), {})[scene_of(item)] = None
    kept = {key: {*list(names)[:limit]} for key, names in scenes.items()}
    return [item for item in items if scene_of(item) in kept[item.scenario, item.phase]]


def split_pool(items: Sequence[Item], shots: int, seed: int) -> tuple[list[Item], list[Item]]:
    """(items to ask, items to demonstrate): of every scenario and phase, `shots` pictures are set
    aside."""
    pictures: dict[tuple[str, str], list[str]] = {}
    for item in items:
        names = pictures.setdefault((item.scenario, item.phase), [])
        if item.image not in names:
            names.append(item.image)
    aside = set()
    for key, names in pictures.items():
        if len(names) <= shots:
            raise InputError(f"scenario {key[0]} ({key[1]}) has {len(names)} pictures: "
                             f"--shots {shots} would leave none to ask about")
        aside |= {(*key, name) for name in random.Random(f"{seed}/{key}").sample(names, shots)}
    asked, pool = [], []
    for item in items:
        shown_before = (item.scenario, item.phase, item.image) in aside
        (pool if shown_before else asked).append(item)
    return asked, pool


def right_answer(item: Item) -> str:
    if item.task == "disc":
        return item.answer.capitalize()
    return item.answer or ", ".join(item.truth) + "."


def demonstrations(item: Item, pool: Sequence[Item], shots: int, seed: int, read) -> list[Turn]:
    """Questions about pictures set aside, one a picture, with their right answers: of the same
    scenario, phase and task and, where there is one, field. The first says that the input is
    perturbed."""
    kind = (item.scenario, item.phase, item.task)
    same = [d for d in pool if (d.scenario, d.phase, d.task) == kind]
    rng = random.Random(f"{seed}/{item.id}")
    turns: list[Turn] = []
    for image in dict.fromkeys(d.image for d in same):
        of_image = [d for d in same if d.image == image]
        d = rng.choice([d for d in of_image if d.field == item.field] or of_image)
        note = "" if turns else "The images are perturbed. "
        turns.append((read(d.image), note + d.question, right_answer(d)))
    return turns[:shots]


def badly_shown(items: Sequence[Item], pool: Sequence[Item], shots: int) -> int:
    """How many questions get fewer demonstrations than `shots`, as the pictures set aside for their
    scenario have no question of their task."""
    pictures: dict[tuple[str, str, str], set[str]] = {}
    for item in pool:
        pictures.setdefault((item.scenario, item.phase, item.task), set()).add(item.image)
    counts = [len(pictures.get((i.scenario, i.phase, i.task), ())) for i in items]
    return sum(count < shots for count in counts)


def make_turns(item: Item, cfg: Config, pool: Sequence[Item], read) -> list[Turn]:
    """What the model is shown: perhaps demonstrations, then the picture and the question, before
    which the reminder may stand."""
    turns = []
    text = item.question
    if cfg.baseline == "reminder":
        text = TEMPLATES["reminder"] + text
    if cfg.baseline == "icl":
        turns = demonstrations(item, pool, cfg.shots, cfg.seed, read)
    return [*turns, (read(item.image), text, None)]


def open_model(cfg: Config) -> Callable[[Sequence[Turn]], str]:
    kind, _, name = cfg.model.partition(":")
    if kind == "openai" and name:
        return ChatClient(
            cfg.base_url, name, Path(cfg.out) / "cache.jsonl", cfg.key_env, cfg.timeout,
            cfg.retries, max_tokens=cfg.max_tokens, patience=cfg.patience,
        )  # fmt: skip
    if kind == "tiny" and name:
        return tiny_model(vlm.load_vlm(Path(name)))
    raise InputError(f"--model {cfg.model!r} must be openai:NAME or tiny:FOLDER "
                     "(or give --score FILE)")


def tiny_model(model: vlm.TinyVLM) -> Callable[[Sequence[Turn]], str]:
    def say(image: np.ndarray | None, prompt: str) -> str:
        if image is None or image.shape != (SIZE, SIZE, 3):
            given = None if image is None else image.shape
            raise InputError(f"the tiny model reads a picture of {SIZE} x {SIZE} pixels, "
                             f"not {given}")
        return vlm.answer(model, image[None], [[prompt]])[0][0]

    return plain(say)


def evaluate(
    model: Callable[[Sequence[Turn]], str], items: Sequence[Item], cfg: Config
) -> tuple[list[Item], dict]:
    """Asks the model -> (items asked, {id: answer or None})."""
    items = list(items)
    pool = []
    if cfg.scenarios:
        items = within(items, cfg.scenarios)
    if cfg.baseline == "icl":
        items, pool = split_pool(items, cfg.shots, cfg.seed)
    if cfg.limit:
        items = first_scenes(items, cfg.limit)
    if cfg.baseline == "icl" and (few := badly_shown(items, pool, cfg.shots)):
        print(f"{few} of {len(items)} questions get fewer than {cfg.shots} demonstrations: the "
              "pictures set aside have no question of their task")
    read = partial(read_image, cfg.images)
    if len({item.image for item in items}) < 2000:
        read = cache(read)
    turns = [partial(make_turns, item, cfg, pool, read) for item in items]
    answers = ask_all(model, turns, cfg.workers)
    return items, {item.id: answer for item, answer in zip(items, answers)}


def read_image(folder: str, name: str) -> np.ndarray:
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"--images {folder} lacks {name}, which a question is about")
    return read_picture(path)


# --- report

COLUMNS = ("PI", "ACC+", "pairs", "ACC", "F1", "yes rate", "invalid", "CHAIR", "Cover", "Hal",
           "described", "Cog", "unanswered")  # fmt: skip
COUNTS = ("pairs", "described", "unanswered")


def report(cfg: Config, items: Sequence[Item], answers: dict, vocabulary: Iterable[str]) -> dict:
    """Scores and prints: one row per scenario and phase."""
    table = score(items, answers, vocabulary, cfg.parser, cfg.aggregate, cfg.positive, cfg.negation)
    print(f"scorer: paper ({cfg.aggregate}); yes and no: {cfg.parser}; positive class of F1: "
          f"{cfg.positive}; negation {'understood' if cfg.negation else 'ignored'}")
    print(f"{'scenario':22}" + "".join(f"{column:>11}" for column in COLUMNS))
    for (scenario, phase), row in table.items():
        line = f"{scenario + ' ' + phase:22}"
        for column in COLUMNS:
            digits = 0 if column in COUNTS else 1
            line += f"{row[column]:11.{digits}f}" if column in row else f"{'-':>11}"
        print(line)
    if any(row["unanswered"] for row in table.values()):
        print("lost answers are left out of every share, and there is no PI without them: run the "
              "same command again to ask only these")
    rows = [{"scenario": s, "phase": p, **row} for (s, p), row in table.items()]
    return {"scorer": "paper", "rows": rows}


def check_flags(cfg: Config) -> None:
    check_range(cfg, "limit retries", least=0)
    check_range(cfg, "shots workers max_tokens patience", least=1)
    check_range(cfg, "timeout", above=0, most=1e6)  # a socket waits no longer than years
    if cfg.score:
        check_unused(cfg, "model base_url key_env scenarios baseline limit", "with --score")
    if cfg.format == "amber":
        ours = "scenarios parser aggregate positive negation"
        check_unused(cfg, ours, "with --format amber: its scorer is as published")
        if cfg.baseline == "icl":
            raise InputError("--baseline icl needs right answers in --data, which AMBER's query "
                             "files do not hold: use none or reminder")
    else:
        theirs = "annotations associations safe_words similarity"
        check_unused(cfg, theirs, "without --format amber")


def main(cfg: Config) -> dict:
    check_flags(cfg)
    amber = read_amber(cfg) if cfg.format == "amber" else None
    items = [] if amber and cfg.score else None
    if items is None:
        items = amber_items(cfg.data, amber) if amber else read_items(cfg.data)
    ids = [item.id for item in items]
    if ids:
        check_ids(ids, ids)  # thousands of questions are asked before `score` looks at them
    vocabulary = vocabulary_of(items)  # of the whole file, whichever part of it is asked
    out = Path(cfg.out)
    if cfg.score:
        answers = read_answers(cfg.score, number=amber is not None)
        known = amber.annotations if amber else {item.id for item in items}
        strange = [id for id in answers if id not in known]
        if strange:
            file = cfg.annotations if amber else cfg.data
            raise InputError(f"{cfg.score}: {file} has no question with the id {strange[0]!r} "
                             f"({len(strange)} such answers)")
    else:
        items, answers = evaluate(open_model(cfg), items, cfg)
        rows = [{"id": id, "response": text} for id, text in answers.items()]
        write_json(out / "answers.json", rows)
    if amber:
        scores = amber_score(amber, answers)
        print(json.dumps(scores, indent=1))
    else:
        scores = report(cfg, items, answers, vocabulary)
    settings = {name: value for name, value in vars(cfg).items() if name != "key_env"}
    write_json(out / "scores.json", {"settings": settings, **scores})
    print(f"wrote {out}/scores.json")
    return scores


if __name__ == "__main__":
    cli(main, Config)
