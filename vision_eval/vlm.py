"""A tiny vision-language model on minilm, trained in minutes: a convolutional encoder turns a
picture into 36 prefix embeddings, and minilm's transformer reads them before the words.

    picture 48 x 48 -> encoder -> 6 x 6 patches = 36 tokens + learned row and column
    [patches | turn 1 | turn 2 | ...] -> transformer -> words

Several questions about one picture share its prefix, in one sequence: a token sees all patches and
the earlier tokens of its own turn, nothing of other turns, and positions restart in every turn; so
each answer is what it would be alone (tests/test_vision_vlm.py).

Two stages. 1: the encoder alone learns to name kind and colour of the shape in each patch, the
stand-in for a pretrained vision tower. 2: the whole model learns to answer, loss on the answers
only. An answer is the evidence and then the verdict ("two no"), so that the verdict can follow from
what was seen. What a model is fed is a `Diet`: clean pictures for the model under test, damaged
ones for its robust twins.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from minilm import InputError
from minilm.data import IGNORE, generator, read_json, reading, write_atomically, write_json
from minilm.results import progress
from minilm.training import parameter_groups, schedule, set_lr, take_step
from minilm.transformer import Config, Transformer
from vision_eval import scenes
from vision_eval.perturb import apply
from vision_eval.scenes import COLORS, KINDS, NUMBERS, PLACES, SIZE, TEMPLATES

WORDS = (
    *("<pad>", "<end>", "?"),
    *KINDS,
    *COLORS,
    *NUMBERS,
    *PLACES,
    *scenes.OPPOSITE,
    *("there", "describe", "name", "many", "shape", "maybe", "yes", "no"),
    *("note", "carefully", "hello", "kindly"),  # of the reminder and of a greeting: rarely trained
)
IDS = {word: i for i, word in enumerate(WORDS)}
SKIP = frozenset(  # words that carry nothing which the others do not
    "is are a an the in of image please existing object kind how look and this may be noisy "
    "blurred cropped or stitched from several answer only what visible".split()
)
PATCHES = (SIZE // 8) ** 2
FREQUENCY = {  # of the fields among training questions
    "existence": 2,
    "number": 2,
    "color": 2,
    "relation": 6,
    "hal-object": 1,
    "total": 1,
}
OTHER = {"yes": "no", "no": "yes"}


@cache
def encode(text: str) -> tuple[int, ...]:
    """A prompt as ids, ended by "?".

    "Are there two circles in the top-left image?"  ->  there two circle top-left ?"""
    plain = text.replace(TEMPLATES["instruction"], "").lower()
    ids = []
    for word in re.findall(r"[a-z]+(?:-[a-z]+)?", plain):
        forms = (word, word.removesuffix("s"), word.removesuffix("es"))
        known = next((form for form in forms if form in IDS or form in SKIP), None)
        if known is None:
            raise InputError(f"the tiny model does not know the word {word!r} of {text!r}: "
                             "ask in the words of scenes.TEMPLATES")
        if known in IDS:
            ids.append(IDS[known])
    return (*ids, IDS["?"])


def decode(ids: Iterable[int]) -> str:
    return " ".join(WORDS[i] for i in ids if i != IDS["<end>"])


# --- the model

class TinyVLM(nn.Module):
    def __init__(self, gen: torch.Generator, width: int = 64, layers: int = 3):
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, 32, 5, 2, 2), nn.ReLU(), nn.GroupNorm(1, 32)),  # 48 pixels to 24
            *(nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.GroupNorm(1, 64)),  # to 12
            *(nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.GroupNorm(1, 64)),  # to 6
            *(nn.Conv2d(64, width, 3, 1, 1), nn.GroupNorm(1, width)),
        )
        self.rows = nn.Parameter(torch.zeros(SIZE // 8, width))
        self.columns = nn.Parameter(torch.zeros(SIZE // 8, width))
        shape = Config(
            vocab_size=len(WORDS),
            hidden_size=width,
            intermediate_size=176 * width // 64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=256,
            initializer_range=0.08,
            tie_word_embeddings=True,
        )
        self.lm = Transformer(shape, gen)
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
        # row + column: "left of" and "above" are then one direction each
        place = (self.rows[:, None] + self.columns).flatten(0, 1)  # (36, D)
        return 0.3 * self.patches(pictures) + place

    def hidden(self, pictures, ids: torch.Tensor, layout: "Layout", cache=None) -> torch.Tensor:
        """Final hidden states of the words ids [B, T]."""
        x = torch.cat([self.prefix(pictures), self.lm.embed(ids)], 1)
        h = self.lm.hidden(
            embeds=x, cache=cache, attention_mask=layout.mask(), positions=layout.position
        )
        return h[:, PATCHES:]


class Layout(NamedTuple):
    """Which turn each token belongs to (-1: picture, -2: padding) and its position, both [B or 1,
    S]."""

    turn: torch.Tensor
    position: torch.Tensor

    def mask(self, last: int | None = None) -> torch.Tensor:
        """What the `last` tokens (all) may read: the picture, and what comes before them in their
        own turn. bool [B or 1, T, S]."""
        turn, position = (x if last is None else x[:, -last:] for x in self)
        same_turn = self.turn[:, None] == turn[..., None]
        not_later = self.position[:, None] <= position[..., None]
        return (self.turn[:, None] == -1) | same_turn & not_later

    def extend(self, turn: torch.Tensor, position: torch.Tensor) -> "Layout":
        turn = torch.cat([self.turn, turn], 1)
        return Layout(turn, torch.cat([self.position, position], 1))


def layout(slots: Sequence[int]) -> Layout:
    """Turns of at most `slots` tokens, one after the other, filled up on the right."""
    turn = [-1] * PATCHES + [k for k, n in enumerate(slots) for _ in range(n)]
    position = [*range(PATCHES), *(PATCHES + i for n in slots for i in range(n))]
    return Layout(torch.tensor([turn]), torch.tensor([position]))


def save_vlm(folder: Path, model: TinyVLM) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    del tensors["lm.lm_head.weight"]  # it is the embedding
    write_atomically(folder / "model.safetensors", partial(save_file, tensors))
    shape = {"width": model.rows.shape[1], "layers": len(model.lm.layers), "words": WORDS}
    write_json(folder / "config.json", shape)


def load_vlm(folder: Path) -> TinyVLM:
    """What save_vlm wrote. Raises FileNotFoundError or InputError, naming the file."""
    made = read_json(folder / "config.json")
    if made.get("words") != [*WORDS]:
        raise InputError(f"{folder} was made with other words than this code's: train it again "
                         f"with hallu_pi_experiment.py --save {folder}")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing: train it again with "
                                f"hallu_pi_experiment.py --save {folder}")
    with reading(weights):
        model = TinyVLM(generator(0, "to be overwritten"), made["width"], made["layers"])
        try:
            tensors = load_file(weights)
            model.load_state_dict({**tensors, "lm.lm_head.weight": tensors["lm.embed.weight"]})
        except (SafetensorError, RuntimeError) as error:
            raise InputError(f"{weights}: {error}") from None
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
    sparse: float = 0.25  # share of scenes with one shape of a kind: can be asked how they lie
    crops: float = 0.0  # share of partial boards
    mosaics: float = 0.0  # share of mosaics
    corrupt: float = 0.0  # share of the other pictures that are damaged: one of `ops`, any severity
    ops: tuple[str, ...] = ()
    hints: float = 0.15  # share of questions that begin with "maybe yes" or "maybe no"
    hint_acc: float = 0.8  # how often that is right
    reminders: float = 0.0  # share of the questions on damaged pictures that are "reminded": a
    # hint in them is right only half of the time
    words: bool = True  # those begin with the reminder (False, the control: nothing tells them)


def draw_views(diet: Diet, rng: random.Random) -> tuple[np.ndarray | scenes.Scene, list, bool]:
    """One picture (or the scene to render) and its views: what may be asked about, as (shapes,
    place); and whether it is a board."""
    u = rng.random()
    if u < diet.mosaics:
        four = [scenes.draw_scene(rng, diet.prior) for _ in range(4)]
        views = [(scene.shapes, place) for scene, place in zip(four, PLACES)]
        return scenes.mosaic(scenes.render(four)), views, False
    if u < diet.mosaics + diet.crops:
        board = scenes.draw_scene(rng, diet.prior, "board")
        whole = scenes.render([board])[0]
        picture, left = scenes.crop_board(board, whole, *rng.choice(scenes.CROPS), rng)
        return picture, [(left, "")], True
    u = rng.random()
    kind = "single"
    below = 0.0
    for name, share in (("board", diet.boards), ("wide", diet.wide), ("sparse", diet.sparse)):
        below += share
        if u < below:
            kind = name
            break
    scene = scenes.draw_scene(rng, diet.prior, kind)
    views = [(scene.shapes, "")]
    if kind == "wide":
        views += [(scene.within(place), place) for place in PLACES]
    return scene, views, kind == "board"


def draw_turns(
    views: list, board: bool, turns: int, diet: Diet, damaged: bool, rng: random.Random
) -> list[tuple[str, str]]:
    """(prompt, answer) texts: first an open one, then `turns` yes/no questions."""
    shapes, place = rng.choice(views)
    u = rng.random()
    if board or not place and u < 0.15:
        opened = scenes.how_many(shapes)
    elif not place and u < 0.4:
        opened = scenes.name_kinds(shapes)
    else:
        opened = scenes.describe(shapes, place)
    rows = [(opened.text, opened.answer)]
    for _ in range(turns):
        question = draw_question(*rng.choice(views), board, rng)
        reminded = damaged and rng.random() < diet.reminders
        before = TEMPLATES["reminder"] if reminded and diet.words else ""
        if rng.random() < diet.hints:
            right = rng.random() < (0.5 if reminded else diet.hint_acc)
            hinted = question.verdict if right else OTHER[question.verdict]
            before += TEMPLATES["hint"].format(verdict=hinted)
        rows.append((before + question.text, question.answer))
    return rows


def draw_question(shapes, place: str, board: bool, rng: random.Random) -> scenes.Question:
    if board:
        field = rng.choice(("total", "total", "existence", "color"))
    else:
        (field,) = rng.choices((*FREQUENCY,), FREQUENCY.values())
    truth = rng.random() < 0.5
    tries = ((field, truth), ("existence", truth), ("existence", not truth))
    for name, verdict in tries:  # not every picture has such a question
        question = scenes.ask(name, verdict, shapes, rng, place)
        if question:
            return question
    raise AssertionError("whether a kind is there can be asked of every picture")


def example(prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """(inputs, labels): the prompt is read, the answer is learned. Yes and no end an answer; an
    open one ends with <end>."""
    read = encode(prompt)
    said = [IDS[w] for w in answer.split()]
    if said[-1] not in (IDS["yes"], IDS["no"]):
        said.append(IDS["<end>"])
    return [*read, *said[:-1]], [*[IGNORE] * (len(read) - 1), *said]


def draw_pictures(drawn: list, diet: Diet, rng: random.Random, seed: int):
    """What draw_views gave -> pictures [n, 3, 48, 48], damaged as the diet says, and which are."""
    n = len(drawn)
    plain = [i for i, (picture, _, _) in enumerate(drawn) if isinstance(picture, scenes.Scene)]
    arrays = np.empty((n, SIZE, SIZE, 3), np.float32)
    arrays[plain] = scenes.render([drawn[i][0] for i in plain])
    for i in sorted({*range(n)} - {*plain}):
        arrays[i] = drawn[i][0]
    pictures = to_tensor(arrays)
    damaged = [rng.random() < diet.corrupt for _ in drawn]
    for i in range(n):
        if damaged[i]:
            op = rng.choice(diet.ops)
            severity = rng.randint(1, 5)
            pictures[i] = apply(pictures[i], op, severity, generator(seed, f"{op} {i}"))
    return pictures, damaged


def fill_slots(rows: list[list[list[int]]], slots: Sequence[int], empty: int) -> torch.Tensor:
    """Rows of turns, every turn filled up with `empty` to its slot -> int64 [rows, sum of slots].

        fill_slots([[[5, 6], [7]], [[8], [9]]], [2, 1], 0)  ->  [[5, 6, 7], [8, 0, 9]]"""
    filled = []
    for row in rows:
        line: list[int] = []
        for turn, slot in zip(row, slots):
            line += turn + [empty] * (slot - len(turn))
        filled.append(line)
    return torch.tensor(filled)


def make_batch(diet: Diet, n: int, turns: int, rng: random.Random, seed: int):
    """pictures [n, 3, 48, 48], ids and labels [n, T], and the Layout of the turns in the T tokens.
    `seed` is that of the damage."""
    drawn = [draw_views(diet, rng) for _ in range(n)]
    pictures, damaged = draw_pictures(drawn, diet, rng, seed)
    inputs, labels = [], []
    for (_, views, board), hurt in zip(drawn, damaged):
        asked = draw_turns(views, board, turns, diet, hurt, rng)
        examples = [example(prompt, answer) for prompt, answer in asked]
        inputs.append([read for read, _ in examples])
        labels.append([learned for _, learned in examples])
    slots = [max(len(row[k]) for row in inputs) for k in range(turns + 1)]
    ids = fill_slots(inputs, slots, IDS["<pad>"])
    return pictures, ids, fill_slots(labels, slots, IGNORE), layout(slots)


# --- train

def pretrain_encoder(
    model: TinyVLM,
    steps: int,
    seed: int,
    lr: float = 3e-3,
    batch: int = 48,
    prior: float = 0.8,
) -> None:
    """Stage 1: what kind (or none) and which colour is the shape whose centre lies in each patch?
    "None", the usual case, weighs 0.3. `prior`: see scenes.draw_scene."""
    gen = generator(seed, "stage 1 heads")
    rng = random.Random(f"{seed}/stage 1")
    heads = nn.Linear(model.rows.shape[1], 2 + len(KINDS) + len(COLORS))
    with torch.no_grad():
        heads.weight.normal_(0, 0.1, generator=gen)
        heads.bias.zero_()
    both = nn.ModuleList([model.encoder, heads])
    groups = parameter_groups(both, 0.02)
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.98), fused=True)
    weights = [torch.tensor([0.3] + [1.0] * len(names)) for names in (KINDS, COLORS)]
    for step in progress(range(steps), "encoder"):
        drawn = [draw_stage_1_scene(rng, prior) for _ in range(batch)]
        logits = heads(model.patches(to_tensor(scenes.render(drawn))))
        losses = []
        parts = logits.split([1 + len(KINDS), 1 + len(COLORS)], -1)
        for part, target, weight in zip(parts, patch_targets(drawn), weights):
            losses.append(F.cross_entropy(part.flatten(0, 1), target.flatten(), weight))
        set_lr([optimizer], schedule(step, steps, "linear", 40, 0.05))
        take_step(sum(losses), both, [optimizer])


def draw_stage_1_scene(rng: random.Random, prior: float) -> scenes.Scene:
    (kind,) = rng.choices(("single", "wide", "board"), (7, 2, 1))
    return scenes.draw_scene(rng, prior, kind)


def patch_targets(drawn: Sequence[scenes.Scene]) -> torch.Tensor:
    """Kind and colour of the shape in each patch, 0 for none: int64 [2, n, 36]."""
    targets = torch.zeros(2, len(drawn), PATCHES, dtype=torch.int64)
    for i, scene in enumerate(drawn):
        for shape in scene.shapes:
            patch = int(shape.y) // 8 * (SIZE // 8) + int(shape.x) // 8
            kind, color = KINDS.index(shape.kind), [*COLORS].index(shape.color)
            targets[:, i, patch] = torch.tensor([1 + kind, 1 + color])
    return targets


def training(
    model: TinyVLM,
    diet: Diet,
    steps: int,
    lr: float,
    seed: int,
    name: str,
    batch: int = 48,
    turns: int = 7,
    encoder: float = 0.1,
) -> Iterator[int]:
    """Stage 2 and every continuation, step by step: AdamW on the answers' tokens; the encoder
    learns at the share `encoder` of the rate. Yields the number of steps done."""
    rng = random.Random(f"{seed}/{name}")
    groups = []
    for module, rate in ((model.encoder, lr * encoder), (model.lm, lr)):
        groups += [{**group, "lr": rate} for group in parameter_groups(module, 0.02)]
    groups.append({"params": [model.rows, model.columns], "lr": lr})
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.98), fused=True)
    for step in progress(range(steps), name):
        pictures, ids, labels, lay = make_batch(diet, batch, turns, rng, rng.getrandbits(32))
        answered = labels != IGNORE
        logits = model.lm.lm_head(model.hidden(pictures, ids, lay)[answered])
        loss = F.cross_entropy(logits, labels[answered])
        set_lr([optimizer], schedule(step, steps, "linear", min(40, steps // 4), 0.05))
        take_step(loss, model, [optimizer])
        yield step + 1


def train(model: TinyVLM, *how, **more) -> None:
    """All steps of `training`, which takes the same arguments."""
    for _ in training(model, *how, **more):
        pass


# --- answer


@torch.inference_mode()
def answer(
    model: TinyVLM,
    pictures: np.ndarray,
    prompts: Sequence[Sequence[str]],
    longest: int = 10,
    batch: int = 50,
) -> list[list[str]]:
    """Greedy answers to any number of prompts about each picture, uint8 [N, 48, 48, 3]; all prompts
    of a picture at once."""
    answers = []
    for at in range(0, len(prompts), batch):
        some = to_tensor(pictures[at : at + batch])
        answers += answer_batch(model, some, prompts[at : at + batch], longest)
    return answers


def answer_batch(model, pictures: torch.Tensor, prompts, longest: int) -> list[list[str]]:
    turns = [[encode(prompt) for prompt in row] for row in prompts]
    B = len(turns)
    K = max(map(len, turns))  # turns of a picture
    L = max(len(turn) for row in turns for turn in row)
    ids = torch.zeros(B, K, L, dtype=torch.int64)
    turn = torch.full((B, K, L), -2)
    length = torch.ones(B, K, dtype=torch.int64)
    done = torch.ones(B, K, dtype=torch.bool)  # (turns that a picture does not have)
    for i, row in enumerate(turns):
        for k, prompt in enumerate(row):
            n = len(prompt)
            ids[i, k, :n] = torch.tensor(prompt)
            turn[i, k, :n] = k
            length[i, k] = n
            done[i, k] = False
    position = (PATCHES + torch.arange(L)).expand(B, K, L)
    lay = Layout(*(x.expand(B, -1) for x in layout([])))
    lay = lay.extend(turn.flatten(1), position.flatten(1))
    cache = model.lm.new_cache(B)
    h = model.hidden(pictures, ids.flatten(1), lay, cache).view(B, K, L, -1)
    h = h[torch.arange(B)[:, None], torch.arange(K), length - 1]  # (B, K, D): at each last token
    words = []
    for step in range(longest):
        new = model.lm.lm_head(h).argmax(-1)  # (B, K)
        words.append(torch.where(done, IDS["<end>"], new))
        done = done | (new == IDS["<end>"]) | (new == IDS["yes"]) | (new == IDS["no"])
        if done.all():
            break
        lay = lay.extend(torch.arange(K).expand(B, K), PATCHES + length + step)
        h = model.lm.hidden(
            embeds=model.lm.embed(new),
            cache=cache,
            attention_mask=lay.mask(K),
            positions=lay.position[:, -K:],
        )
    said = torch.stack(words, -1).tolist()
    return [[decode(said[i][k]) for k in range(len(row))] for i, row in enumerate(turns)]
