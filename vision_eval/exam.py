"""The exam: Hallu-PI's questions about test scenes, before and after every damage, as blocks of pictures and items; and as files."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minilm.data import generator, write_atomically
from vision_eval import scenes, vlm
from vision_eval.client import encode_png
from vision_eval.metrics import FIELDS, Item
from vision_eval.perturb import FAMILIES, perturb
from vision_eval.scenes import KINDS, TEMPLATES, Shape, describe, hal_objects, how_many, kinds_of, name_kinds

OPS = (*FAMILIES,)  # noise, blur, weather, digital
SCENARIOS = (*OPS, "concat", "crop", "misleading")


def make_items(shapes: Sequence[Shape], image: str, scenario: str, phase: str, seed: str, place: str = "", board: bool = False,
         misled: bool = False, before: str = "") -> list[Item]:
    """The Hallu-PI items of one picture: an open question, then a pair (yes, no) for every field that this picture allows. The same `seed`
    asks the same questions before and after the damage. `misled`: every yes/no question hints at the wrong answer, and one kind too many
    is to be named. `before`: a text put before every question."""
    rng, items, id = random.Random(seed), [], f"{scenario}/{phase}/{image}"
    if board:
        opened = how_many(shapes)
    elif scenario == "misleading":
        opened = name_kinds(shapes, min(len(kinds_of(shapes)) + misled, len(KINDS)))
    else:
        opened = describe(shapes, place)
    items.append(Item(f"{id}/open", image, scenario, phase, "gen", opened.field, "", before + opened.text, opened.evidence if board else "",
                      () if board else tuple(kinds_of(shapes)), () if board else tuple(hal_objects(shapes)), region=place))
    for field in ("total",) if board else FIELDS:
        pair = [scenes.ask(field, truth, shapes, rng, place) for truth in (True, False)]
        for question in pair if all(pair) else ():
            wrong = "no" if question.verdict == "yes" else "yes"
            text = before + (TEMPLATES["hint"].format(verdict=wrong) if misled else "") + question.text + TEMPLATES["instruction"]
            items.append(Item(f"{id}/{field}/{question.verdict}", image, scenario, phase, "disc", "number" if board else field,
                              f"{id}/{field}", text, question.verdict, region=place))
    return items


class Block(NamedTuple):
    """Pictures uint8 [n, 48, 48, 3] and, for each, its items."""

    pictures: np.ndarray
    rows: list[list[Item]]


class Exam:
    """All questions of one seed, as blocks made when they are asked for. Every block asks the same about the same test scenes:

    before; OP (severity drawn per picture); OP 1, 3, 5; concat; misleading; blank (no picture at all); ... reminder; ... misled
    (every yes/no question begins with a wrong hint). Boards are other pictures: crop before, crop."""

    def __init__(self, count: int, seed: int):
        rng = random.Random(f"{seed}/test")
        self.seed, self.scenes = seed, [scenes.draw_scene(rng, 0.5) for _ in range(count)]
        self.boards = [scenes.draw_scene(rng, 0.5, "board") for _ in range(count // 2)]
        self.pictures = scenes.to_uint8(scenes.render(self.scenes))
        self.made = {}  # damaged pictures, the same for every arm

    def damaged(self, op: str, severity: str) -> tuple[np.ndarray, list[int]]:
        if (op, severity) in self.made:
            return self.made[op, severity]
        drawn = torch.randint(1, 6, (len(self.scenes),), generator=generator(self.seed, f"severity {op}")).tolist()
        drawn = [int(severity)] * len(drawn) if severity else drawn
        pictures = np.stack([perturb(x, op, s, self.seed, i) for i, (x, s) in enumerate(zip(self.pictures, drawn))])
        self.made[op, severity] = pictures, drawn
        return pictures, drawn

    def block(self, name: str) -> Block:
        scenario, *words = name.split()
        phase = "before" if "before" in name else "after"
        if scenario == "crop":
            whole, rng = scenes.render(self.boards), random.Random(f"{self.seed}/crops")
            cropped = [scenes.crop_board(b, x, *rng.choice(scenes.CROPS), rng) for b, x in zip(self.boards, whole)]
            shown = [(x, board.shapes) for x, board in zip(whole, self.boards)] if phase == "before" else cropped
            rows = [make_items(shapes, f"board{i}", "crop", phase, f"{self.seed}/{i}", board=True) for i, (_, shapes) in enumerate(shown)]
            return Block(scenes.to_uint8(np.stack([x for x, _ in shown])), rows)
        pictures, n, places, severities = self.pictures, len(self.scenes), [""] * len(self.scenes), [0] * len(self.scenes)
        if scenario in OPS:
            pictures, severities = self.damaged(scenario, next((w for w in words if w.isdigit()), ""))
        elif scenario == "concat":  # scene i is at place i % 4, among the three that follow it
            places = [scenes.PLACES[i % 4] for i in range(n)]
            four = [[(i + (k - i) % 4) % n for k in range(4)] for i in range(n)]
            pictures = scenes.to_uint8(np.stack([scenes.mosaic(self.pictures[rows] / np.float32(255)) for rows in four]))
        elif scenario == "blank":
            pictures = np.full_like(pictures, 45)  # the mean background
        misled, before = "misled" in name or name == "misleading", TEMPLATES["reminder"] if "reminder" in words else ""
        label = "none" if scenario == "before" else scenario
        rows = [make_items(scene.shapes, f"scene{i}", label, phase, f"{self.seed}/{i}", places[i], misled=misled, before=before)
                for i, scene in enumerate(self.scenes)]
        return Block(pictures, [[item._replace(severity=s, seed=self.seed) for item in row] for row, s in zip(rows, severities)])


def ask(model, block: Block) -> dict[str, str]:
    """The tiny model's answers {item id: text}; open and yes/no questions apart, since their answers differ in length."""
    answers = {}
    for task, longest in (("gen", 10), ("disc", 2)):
        rows = [[item for item in row if item.task == task] for row in block.rows]
        said = vlm.answer(model, block.pictures, [[item.question for item in row] for row in rows], longest)
        answers |= {item.id: text for row, texts in zip(rows, said) for item, text in zip(row, texts)}
    return answers


def export(count: int, seed: int, folder: Path) -> None:
    """The exam as a JSONL file of items and PNG pictures, for benchmark.py and for any other model."""
    exam, lines = Exam(count, seed), []
    for name in ("before", *SCENARIOS, "crop before", "misleading before"):
        block = exam.block(name)
        for picture, row in zip(block.pictures, block.rows):
            file = folder / f"{name.replace(' ', '_')}_{row[0].image}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode_png(picture))
            lines += [json.dumps(item._replace(image=file.name)._asdict()) for item in row]
    write_atomically(folder / "data.jsonl", lambda to: to.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    print(f"wrote {len(lines)} questions (data.jsonl) and their pictures to {folder}")
