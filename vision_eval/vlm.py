"""A tiny vision-language model on minilm, trained in minutes: a convolutional encoder turns a picture into 36 prefix embeddings, and
minilm's transformer reads them before the words.

    picture 48 x 48 -> encoder -> 6 x 6 patches = 36 tokens + learned row and column -> [patches | turn 1 | turn 2 | ...] -> words

Several questions about one picture share its prefix, in one sequence: a token sees all patches and the earlier tokens of its own turn,
nothing of other turns, and positions restart in every turn; so each answer is what it would be alone (tests/test_vision_vlm.py).

Two stages. 1: the encoder alone learns to name kind and colour of the shape in each patch, the stand-in for a pretrained vision tower.
2: the whole model learns to answer, loss on the answers only. An answer is the evidence and then the verdict ("two no"), so that the
verdict can follow from what was seen. What a model is fed is a `Diet`: clean pictures for the model under test, damaged ones for its
robust twins.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from minilm import InputError
from minilm.data import IGNORE, generator, read_json, write_atomically, write_json
from minilm.results import progress
from minilm.training import parameter_groups, schedule, set_lr, take_step
from minilm.transformer import Config, Transformer
from vision_eval import scenes
from vision_eval.perturb import apply
from vision_eval.scenes import COLORS, KINDS, NUMBERS, PLACES, SIZE, TEMPLATES

WORDS = ("<pad>", "<end>", "?", *KINDS, *COLORS, *NUMBERS, *PLACES, *scenes.OPPOSITE, "there", "describe", "name", "many", "shape", "maybe",
         "yes", "no", "note", "carefully")
IDS = {word: i for i, word in enumerate(WORDS)}
SKIP = frozenset("is are a an the in of image please existing object kind how look and this may be noisy blurred cropped or stitched from "
                 "several answer only what visible".split())  # words that carry nothing which the others do not
PATCHES = (SIZE // 8) ** 2
FREQUENCY = {"existence": 2, "number": 2, "color": 2, "relation": 6, "hal-object": 1, "total": 1}


@cache
def encode(text: str) -> tuple[int, ...]:
    """A prompt as ids, ended by "?": "Are there two circles in the top-left image?" -> there two circle top-left ?"""
    words = re.findall(r"[a-z]+(?:-[a-z]+)?", text.replace(TEMPLATES["instruction"], "").lower())
    words = [w if w in IDS or w in SKIP else w.removesuffix("s") if w.removesuffix("s") in {**IDS, **dict.fromkeys(SKIP)} else
             w.removesuffix("es") for w in words]
    if unknown := [w for w in words if w not in IDS and w not in SKIP]:
        raise InputError(f"the tiny model does not know the word {unknown[0]!r} of {text!r}: ask in the words of scenes.TEMPLATES")
    return (*(IDS[w] for w in words if w not in SKIP), IDS["?"])


def decode(ids: Iterable[int]) -> str:
    return " ".join(WORDS[i] for i in ids if i != IDS["<end>"])


# --- the model

class TinyVLM(nn.Module):
    def __init__(self, gen: torch.Generator, width: int = 64, layers: int = 3):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 5, 2, 2), nn.ReLU(), nn.GroupNorm(1, 32), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.GroupNorm(1, 64),
            nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.GroupNorm(1, 64), nn.Conv2d(64, width, 3, 1, 1), nn.GroupNorm(1, width))
        self.rows, self.columns = (nn.Parameter(torch.zeros(SIZE // 8, width)) for _ in range(2))
        self.lm = Transformer(Config(
            vocab_size=len(WORDS), hidden_size=width, intermediate_size=176 * width // 64, num_hidden_layers=layers, num_attention_heads=4,
            max_position_embeddings=256, initializer_range=0.08, tie_word_embeddings=True), gen)
        with torch.no_grad():
            self.rows.normal_(0, 0.2, generator=gen)
            self.columns.normal_(0, 0.2, generator=gen)
            for layer in self.encoder:
                if isinstance(layer, nn.Conv2d):
                    layer.weight.normal_(0, (2 / layer.weight[0].numel()) ** 0.5, generator=gen)
                    layer.bias.zero_()

    def patches(self, pictures: torch.Tensor) -> torch.Tensor:
        """[B, 3, 48, 48] in [0, 1] -> [B, 36, D], row by row."""
        return self.encoder(2 * pictures - 1).flatten(2).transpose(1, 2)

    def prefix(self, pictures: torch.Tensor) -> torch.Tensor:
        place = (self.rows[:, None] + self.columns).flatten(0, 1)  # (36, D): left of and above are then each one direction
        return 0.3 * self.patches(pictures) + place

    def hidden(self, pictures: torch.Tensor, ids: torch.Tensor, layout: "Layout", cache=None) -> torch.Tensor:
        """Final hidden states of the words ids [B, T]."""
        x = torch.cat([self.prefix(pictures), self.lm.embed(ids)], 1)
        return self.lm.hidden(embeds=x, cache=cache, attention_mask=layout.mask(), positions=layout.position)[:, PATCHES:]


class Layout(NamedTuple):
    """Which turn each token belongs to (-1: picture, -2: padding) and its position, both [B or 1, S]."""

    turn: torch.Tensor
    position: torch.Tensor

    def mask(self, last: int | None = None) -> torch.Tensor:
        """What the `last` tokens (all) may read: the picture, and what comes before them in their own turn. bool [B or 1, T, S]."""
        turn, position = (x if last is None else x[:, -last:] for x in self)
        same = (self.turn[:, None] == turn[..., None]) & (self.position[:, None] <= position[..., None])
        return (self.turn[:, None] == -1) | same

    def extend(self, turn: torch.Tensor, position: torch.Tensor) -> "Layout":
        return Layout(torch.cat([self.turn, turn], 1), torch.cat([self.position, position], 1))


def layout(slots: Sequence[int]) -> Layout:
    """Turns of at most `slots` tokens, one after the other, filled up on the right."""
    turn = [-1] * PATCHES + [k for k, n in enumerate(slots) for _ in range(n)]
    position = [*range(PATCHES), *(PATCHES + i for n in slots for i in range(n))]
    return Layout(torch.tensor([turn]), torch.tensor([position]))


def save_vlm(folder: Path, model: TinyVLM) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.contiguous() for name, t in model.state_dict().items() if name != "lm.lm_head.weight"}  # (it is the embedding)
    write_atomically(folder / "model.safetensors", lambda to: save_file(tensors, to))
    write_json(folder / "config.json", {"width": model.rows.shape[1], "layers": len(model.lm.layers), "words": WORDS})


def load_vlm(folder: Path) -> TinyVLM:
    made = read_json(folder / "config.json")
    if made.get("words") != [*WORDS]:
        raise InputError(f"{folder} was made with other words than this code's: train it again with hallu_pi.py --save {folder}")
    model = TinyVLM(generator(0, "to be overwritten"), made["width"], made["layers"])
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({**tensors, "lm.lm_head.weight": tensors["lm.embed.weight"]})
    return model


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 or float [B, H, W, 3] -> float [B, 3, H, W] in [0, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


# --- what it is fed

class Diet(NamedTuple):
    prior: float = 0.8  # how often partners come together
    wide: float = 0.2  # share of scenes with a 4 x 4 grid, where quarters are asked about
    boards: float = 0.12
    sparse: float = 0.25  # share of scenes with one shape of a kind, which can be asked how they lie
    crops: float = 0.0  # share of partial boards
    mosaics: float = 0.0  # share of mosaics
    corrupt: float = 0.0  # share of the other pictures that are damaged, by one of `ops` at any severity
    ops: tuple[str, ...] = ()
    hints: float = 0.15  # share of questions that begin with "maybe yes" or "maybe no"
    hint_acc: float = 0.8  # how often that is right
    reminders: float = 0.0  # share of questions, on damaged pictures, whose hint is right only half of the time: "reminded" ones
    words: bool = True  # those begin with the reminder (False: nothing tells them from others, the control)


def draw_views(diet: Diet, rng: random.Random) -> tuple[np.ndarray | scenes.Scene, list, bool]:
    """One picture (or the scene to render) and its views: what may be asked about, as (shapes, place); and whether it is a board."""
    u = rng.random()
    if u < diet.mosaics:
        four = [scenes.draw_scene(rng, diet.prior) for _ in range(4)]
        return scenes.mosaic(scenes.render(four)), [(s.shapes, place) for s, place in zip(four, PLACES)], False
    if u < diet.mosaics + diet.crops:
        board = scenes.draw_scene(rng, diet.prior, "board")
        picture, left = scenes.crop_board(board, scenes.render([board])[0], *rng.choice(scenes.CROPS), rng)
        return picture, [(left, "")], True
    u = rng.random()
    kinds = (("board", diet.boards), ("wide", diet.boards + diet.wide), ("sparse", diet.boards + diet.wide + diet.sparse))
    kind = next((kind for kind, below in kinds if u < below), "single")
    scene = scenes.draw_scene(rng, diet.prior, kind)
    quarters = [(scene.within(place), place) for place in PLACES] if kind == "wide" else []
    return scene, [(scene.shapes, ""), *quarters], kind == "board"


def draw_turns(views: list, board: bool, turns: int, diet: Diet, damaged: bool, rng: random.Random) -> list[tuple[str, str]]:
    """(prompt, answer) texts: first an open one, then `turns` yes/no questions."""
    shapes, place = rng.choice(views)
    u = rng.random()
    if board or not place and u < 0.15:
        opened = scenes.how_many(shapes)
    else:
        opened = scenes.name_kinds(shapes) if not place and u < 0.4 else scenes.describe(shapes, place)
    rows = [(opened.text, opened.answer)]
    for _ in range(turns):
        shapes, place = rng.choice(views)
        field = rng.choice(("total", "total", "existence", "color")) if board else rng.choices((*FREQUENCY,), FREQUENCY.values())[0]
        truth = rng.random() < 0.5
        question = (scenes.ask(field, truth, shapes, rng, place) or scenes.ask("existence", truth, shapes, rng, place)
                    or scenes.ask("existence", not truth, shapes, rng, place))
        reminded = damaged and rng.random() < diet.reminders
        before = TEMPLATES["reminder"] if reminded and diet.words else ""
        if rng.random() < diet.hints:
            right = rng.random() < (0.5 if reminded else diet.hint_acc)
            before += TEMPLATES["hint"].format(verdict=question.verdict if right else "no" if question.verdict == "yes" else "yes")
        rows.append((before + question.text, question.answer))
    return rows


def example(prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """(inputs, labels): the prompt is read, the answer is learned. Yes and no end an answer; an open one ends with <end>."""
    prompt, answer = encode(prompt), [IDS[w] for w in answer.split()]
    answer = answer if answer[-1] in (IDS["yes"], IDS["no"]) else [*answer, IDS["<end>"]]
    return [*prompt, *answer[:-1]], [*[IGNORE] * (len(prompt) - 1), *answer]


def make_batch(diet: Diet, n: int, turns: int, rng: random.Random, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Layout]:
    """pictures [n, 3, 48, 48], ids and labels [n, T], and how the turns lie in the T tokens. `seed` is that of the damage."""
    drawn = [draw_views(diet, rng) for _ in range(n)]
    plain = [i for i, (picture, _, _) in enumerate(drawn) if isinstance(picture, scenes.Scene)]
    pictures = np.empty((n, SIZE, SIZE, 3), np.float32)
    pictures[plain] = scenes.render([drawn[i][0] for i in plain])
    for i, (picture, _, _) in enumerate(drawn):
        if not isinstance(picture, scenes.Scene):
            pictures[i] = picture
    pictures, damaged = to_tensor(pictures), [rng.random() < diet.corrupt for _ in drawn]
    for i in range(n):
        if damaged[i]:
            op = rng.choice(diet.ops)
            pictures[i] = apply(pictures[i], op, rng.randint(1, 5), generator(seed, f"{op} {i}"))
    asked = [draw_turns(views, board, turns, diet, hurt, rng) for (_, views, board), hurt in zip(drawn, damaged)]
    rows = [[example(*turn) for turn in row] for row in asked]
    slots = [max(len(row[k][0]) for row in rows) for k in range(turns + 1)]
    ids = torch.tensor([[x for (inputs, _), slot in zip(row, slots) for x in inputs + [0] * (slot - len(inputs))] for row in rows])
    labels = torch.tensor([[x for (_, labels), slot in zip(row, slots) for x in labels + [IGNORE] * (slot - len(labels))] for row in rows])
    return pictures, ids, labels, layout(slots)


# --- train

def pretrain_encoder(model: TinyVLM, steps: int, seed: int, lr: float = 3e-3, batch: int = 48) -> None:
    """Stage 1: what kind (or none) and which colour is the shape whose centre lies in each patch? "None", the usual case, weighs 0.3."""
    gen, rng = generator(seed, "stage 1 heads"), random.Random(f"{seed}/stage 1")
    heads = nn.Linear(model.rows.shape[1], 2 + len(KINDS) + len(COLORS))
    with torch.no_grad():
        heads.weight.normal_(0, 0.1, generator=gen)
        heads.bias.zero_()
    both = nn.ModuleList([model.encoder, heads])
    optimizer = torch.optim.AdamW(parameter_groups(both, 0.02), lr, betas=(0.9, 0.98), fused=True)
    weights = [torch.tensor([0.3] + [1.0] * len(names)) for names in (KINDS, COLORS)]
    for step in progress(range(steps), "encoder"):
        drawn = [scenes.draw_scene(rng, 0.8, rng.choices(("single", "wide", "board"), (7, 2, 1))[0]) for _ in range(batch)]
        targets = torch.zeros(2, batch, PATCHES, dtype=torch.int64)
        for i, scene in enumerate(drawn):
            for s in scene.shapes:
                patch = int(s.y) // 8 * (SIZE // 8) + int(s.x) // 8
                targets[:, i, patch] = torch.tensor([1 + KINDS.index(s.kind), 1 + [*COLORS].index(s.color)])
        logits = heads(model.patches(to_tensor(scenes.render(drawn)))).split([1 + len(KINDS), 1 + len(COLORS)], -1)
        loss = sum(F.cross_entropy(x.flatten(0, 1), y.flatten(), w) for x, y, w in zip(logits, targets, weights))
        set_lr([optimizer], schedule(step, steps, "linear", 40, 0.05))
        take_step(loss, both, [optimizer])


def train(model: TinyVLM, diet: Diet, steps: int, lr: float, seed: int, name: str, batch: int = 48, turns: int = 7,
          encoder: float = 0.1, watch: Callable[[int, float], None] | None = None) -> None:
    """Stage 2 and every continuation: AdamW on the answers' tokens; the encoder learns at the share `encoder` of the rate."""
    rng = random.Random(f"{seed}/{name}")
    groups = [{**g, "lr": rate} for module, rate in ((model.encoder, lr * encoder), (model.lm, lr)) for g in parameter_groups(module, 0.02)]
    optimizer = torch.optim.AdamW([*groups, {"params": [model.rows, model.columns], "lr": lr}], lr, betas=(0.9, 0.98), fused=True)
    for step in progress(range(steps), name):
        pictures, ids, labels, lay = make_batch(diet, batch, turns, rng, rng.getrandbits(32))
        answered = labels != IGNORE
        loss = F.cross_entropy(model.lm.lm_head(model.hidden(pictures, ids, lay)[answered]), labels[answered])
        set_lr([optimizer], schedule(step, steps, "linear", min(40, steps // 4), 0.05))
        take_step(loss, model, [optimizer])
        if watch:
            watch(step, loss.item())


# --- answer

@torch.inference_mode()
def answer(model: TinyVLM, pictures: np.ndarray, prompts: Sequence[Sequence[str]], longest: int = 10, batch: int = 50) -> list[list[str]]:
    """Greedy answers to any number of prompts about each picture, uint8 [N, 48, 48, 3]; all prompts of a picture at once."""
    answers = []
    for at in range(0, len(prompts), batch):
        turns = [[encode(p) for p in row] for row in prompts[at : at + batch]]
        B, K, L = len(turns), max(map(len, turns)), max(len(t) for row in turns for t in row)
        ids, turn, length = torch.zeros(B, K, L, dtype=torch.int64), torch.full((B, K, L), -2), torch.ones(B, K, dtype=torch.int64)
        for i, row in enumerate(turns):
            for k, prompt in enumerate(row):
                ids[i, k, : len(prompt)], turn[i, k, : len(prompt)], length[i, k] = torch.tensor(prompt), k, len(prompt)
        position = (PATCHES + torch.arange(L)).expand(B, K, L)
        lay = Layout(*(x.expand(B, -1) for x in layout([]))).extend(turn.flatten(1), position.flatten(1))
        cache = model.lm.new_cache(B)
        h = model.hidden(to_tensor(pictures[at : at + batch]), ids.flatten(1), lay, cache).view(B, K, L, -1)
        h = h[torch.arange(B)[:, None], torch.arange(K), length - 1]  # (B, K, D): at every prompt's last token
        words, done = [], torch.tensor([[k >= len(row) for k in range(K)] for row in turns])
        for step in range(longest):
            new = model.lm.lm_head(h).argmax(-1)  # (B, K)
            words.append(torch.where(done, IDS["<end>"], new))
            done = done | (new == IDS["<end>"]) | (new == IDS["yes"]) | (new == IDS["no"])
            if done.all():
                break
            lay = lay.extend(torch.arange(K).expand(B, K), PATCHES + length + step)
            h = model.lm.hidden(embeds=model.lm.embed(new), cache=cache, attention_mask=lay.mask(K), positions=lay.position[:, -K:])
        words = torch.stack(words, -1).tolist()
        answers += [[decode(words[i][k]) for k in range(len(row))] for i, row in enumerate(turns)]
    return answers
