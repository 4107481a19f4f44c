"""The exam: Hallu-PI's questions about test scenes, before and after every damage, as blocks of
pictures and items; and as files."""

import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minilm.data import generator, write_atomically
from vision_eval import hallu_pi, scenes, vlm
from vision_eval.client import encode_png
from vision_eval.hallu_pi import OPS, SCENARIOS
from vision_eval.metrics import Item
from vision_eval.scenes import TEMPLATES

BEFORE = "before"


class Block(NamedTuple):
    """A part of the exam: what the pictures are, and how the questions are asked."""

    scenario: str = ""  # one of SCENARIOS, or blank (no picture at all); "": undamaged scenes
    phase: str = ""  # before: without the damage
    severity: int | str = ""  # of noise, blur, weather, digital; "": drawn for every picture
    hint: str = ""  # misled: every yes/no question begins with a hint at the wrong answer
    words: str = ""  # a text of TEMPLATES that stands before every question


PLAIN = Block(phase=BEFORE)  # the scenes as they are: the "before" of most scenarios


def before(scenario: str) -> Block:
    """What a scenario is compared with: crop and misleading have pictures or prompts of their own
    without the damage."""
    return Block(scenario, BEFORE) if scenario in ("crop", "misleading") else PLAIN


class Asked(NamedTuple):
    """Pictures uint8 [n, 48, 48, 3] and, for each, its items."""

    pictures: np.ndarray
    rows: list[list[Item]]

    @property
    def items(self) -> list[Item]:
        return [item for row in self.rows for item in row]


class Exam:
    """All questions of one seed, as blocks made when they are asked for. Every block asks the same
    about the same test scenes; only crop's are others, boards."""

    def __init__(self, count: int, seed: int):
        rng = random.Random(f"{seed}/test")
        self.seed = seed
        self.scenes = [scenes.draw_scene(rng, 0.5) for _ in range(count)]
        self.boards = [scenes.draw_scene(rng, 0.5, "board") for _ in range(count // 2)]
        self.pictures = scenes.to_uint8(scenes.render(self.scenes))
        self._damaged: dict[Block, np.ndarray] = {}  # the same for every arm

    def block(self, block: Block) -> Asked:
        return self._boards(block) if block.scenario == "crop" else self._scenes(block)

    def _severities(self, block: Block) -> list[int]:
        n = len(self.scenes)
        if block.scenario not in OPS:
            return [0] * n
        if block.severity:
            return [block.severity] * n
        gen = generator(self.seed, f"severity {block.scenario}")
        return torch.randint(1, 6, (n,), generator=gen).tolist()

    def _scenes(self, block: Block) -> Asked:
        severities = self._severities(block)
        damage = Block(block.scenario, severity=block.severity)
        if damage not in self._damaged:
            self._damaged[damage] = np.stack([
                hallu_pi.damage(self.pictures, i, block.scenario, severity, self.seed)
                for i, severity in enumerate(severities)
            ])  # fmt: skip
        misled = block.hint == "misled" or block == Block("misleading")
        rows = []
        for i, scene in enumerate(self.scenes):
            row = hallu_pi.questions(
                scene.shapes,
                image=f"scene{i}",
                scenario=block.scenario or "none",
                phase=block.phase or "after",
                seed=f"{self.seed}/{i}",
                place=hallu_pi.place_of(i) if block.scenario == "concat" else "",
                misled=misled,
                before=TEMPLATES[block.words] if block.words else "",
            )
            rows.append([i._replace(severity=severities[len(rows)], seed=self.seed) for i in row])
        return Asked(self._damaged[damage], rows)

    def _boards(self, block: Block) -> Asked:
        rng = random.Random(f"{self.seed}/crops")
        whole = scenes.render(self.boards)
        pictures, rows = [], []
        for i, (board, picture) in enumerate(zip(self.boards, whole)):
            cropped, left = scenes.crop_board(board, picture, *rng.choice(scenes.CROPS), rng)
            uncut = block.phase == BEFORE
            pictures.append(picture if uncut else cropped)
            rows.append(
                hallu_pi.questions(
                    board.shapes if uncut else left,
                    image=f"board{i}",
                    scenario="crop",
                    phase=block.phase or "after",
                    seed=f"{self.seed}/{i}",
                    board=True,
                )
            )
        return Asked(scenes.to_uint8(np.stack(pictures)), rows)


def ask(model: vlm.TinyVLM, asked: Asked) -> dict[str, str]:
    """The tiny model's answers {item id: text}; open and yes/no questions apart, since their
    answers differ in length."""
    answers = {}
    for task, longest in (("gen", 10), ("disc", 2)):
        rows = [[item for item in row if item.task == task] for row in asked.rows]
        prompts = [[item.question for item in row] for row in rows]
        said = vlm.answer(model, asked.pictures, prompts, longest)
        for row, texts in zip(rows, said):
            answers |= {item.id: text for item, text in zip(row, texts)}
    return answers


def export(count: int, seed: int, folder: Path) -> None:
    """The exam as a JSONL file of items and PNG pictures, for benchmark.py and any other model."""
    exam = Exam(count, seed)
    lines = []
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [PLAIN, *map(Block, SCENARIOS), before("crop"), before("misleading")]
    for block in blocks:
        name = "_".join(part for part in block[:2] if part)
        asked = exam.block(block)
        for picture, row in zip(asked.pictures, asked.rows):
            file = folder / f"{name}_{row[0].image}.png"
            file.write_bytes(encode_png(picture))
            lines += [json.dumps(item._replace(image=file.name)._asdict()) for item in row]

    def save(to: Path) -> None:
        to.write_text("\n".join(lines) + "\n", encoding="utf-8")

    write_atomically(folder / "data.jsonl", save)
    print(f"wrote {len(lines)} questions (data.jsonl) and their pictures to {folder}")
