"""A world of coloured shapes on a dark ground, in which everything about a picture is known: what
is there, how many, which colour, where.

A picture is 48 x 48 pixels, a 3 x 3 grid of cells (4 x 4 in `wide` scenes), each cell empty or with
one shape. A scene holds one to three kinds of shapes, one colour per kind, at most six shapes.
*Planted prior*: a kind has a partner, and training scenes show partners together more often than
test scenes do. A partner that is absent is the scene's Hal-object: the thing that one would expect
to be there. *Boards* have all nine cells filled, like a page of letters: a model can learn that the
answer to "how many" is nine without counting.

Every question is a text from TEMPLATES; its answer is one word of evidence and the verdict, "two
no", so that the verdict can follow from what was seen.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vision_eval.metrics import NUMBERS

KINDS = ("circle", "square", "triangle", "cross", "ring", "bar")
COLORS = {
    "red": (0.91, 0.26, 0.21),
    "green": (0.26, 0.73, 0.36),
    "blue": (0.25, 0.47, 0.95),
    "yellow": (0.98, 0.80, 0.18),
    "purple": (0.68, 0.35, 0.86),
    "white": (0.95, 0.95, 0.95),
}
PARTNER = {
    "circle": "ring",
    "ring": "circle",
    "square": "bar",
    "bar": "square",
    "triangle": "cross",
    "cross": "triangle",
}
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")  # the order in a mosaic, too
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
SIZE = 48
CROPS = ((2, 3), (3, 2), (2, 2), (1, 3), (3, 1))  # rows and columns of a board that are kept

TEMPLATES = {  # edit these to ask in other words; `place` is "image" or "top-left image"
    "existence": "Is there a {o} in the {place}?",
    "number": "{verb} there {n} {o} in the {place}?",
    "color": "Is the {o} in the {place} {c}?",
    "relation": "Is the {a} {relation} the {b} in the {place}?",
    "describe": "Please describe the existing objects in the {place}.",
    "name": "Name the {n} kinds of objects in the {place}.",
    "total": "How many shapes are there in the {place}?",
    "hint": "Maybe {verdict}. ",
    "reminder": "Note: this image may be noisy, blurred, cropped or stitched from several images. "
    "Look carefully and answer only from what is visible. ",
    "greeting": "Hello! Kindly look and answer. ",  # two words that say nothing: reminder's control
    "instruction": " Answer with 'Yes' or 'No'.",
}
PHRASE = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


class Shape(NamedTuple):
    kind: str
    color: str
    cell: int  # row by row
    x: float  # centre and radius in pixels of the 48 x 48 picture
    y: float
    r: float


class Scene(NamedTuple):
    background: tuple[float, float, float]
    grid: int
    shapes: tuple[Shape, ...]

    def within(self, place: str) -> list[Shape]:
        """The shapes in a quarter of the picture ("top-left" ...), or in all of it ("")."""
        if not place:
            return list(self.shapes)
        left, top = "left" in place, "top" in place
        half = SIZE / 2
        return [s for s in self.shapes if left == (s.x < half) and top == (s.y < half)]


class Question(NamedTuple):
    field: str
    text: str
    evidence: str  # what there is to see: a count, a colour, a relation
    verdict: str  # yes or no; empty for an open question, whose answer is the evidence alone

    @property
    def answer(self) -> str:
        return f"{self.evidence} {self.verdict}".strip()


# --- scenes

def draw_scene(rng: random.Random, prior: float, kind: str = "single") -> Scene:
    """`kind`: single (3 x 3 cells), sparse (two or three kinds, one shape each), wide (4 x 4
    smaller cells: every quarter has four) or board (nine cells, all filled). `prior`: the
    probability that a kind's partner is the next kind, if there is one; at 0.3 a kind's partner is
    there as often as any other kind."""
    wanted = rng.randint(2 if kind == "sparse" else 1, 3)
    families = rng.sample(("circle", "square", "triangle"), 3)  # one of each pair of partners
    kinds: list[str] = []
    for family in families:
        if len(kinds) < wanted:
            kinds.append(family if rng.random() < 0.5 else PARTNER[family])
            if len(kinds) < wanted and rng.random() < prior:
                kinds.append(PARTNER[kinds[-1]])
    colors = rng.sample(tuple(COLORS), len(kinds))
    if kind == "board":
        more = [rng.randrange(len(kinds)) for _ in range(9 - len(kinds))]
        names = [*range(len(kinds)), *more]
    elif kind == "sparse":
        names = [*range(len(kinds))]
    else:
        names = []
        for i in range(len(kinds)):
            names += [i] * (1 + (rng.random() < 0.45) + (rng.random() < 0.2))
        names = names[:6]
    grid = 4 if kind == "wide" else 3
    width = SIZE / grid
    shapes = []
    for i, cell in zip(names, rng.sample(range(grid * grid), len(names))):
        r = rng.uniform(5, 6.8) * width / 16
        jitter = width / 2 - r - 0.6
        x = (cell % grid + 0.5) * width + rng.uniform(-jitter, jitter)
        y = (cell // grid + 0.5) * width + rng.uniform(-jitter, jitter)
        shapes.append(Shape(kinds[i], colors[i], cell, x, y, r))
    background = tuple(rng.uniform(0.05, 0.3) for _ in range(3))
    return Scene(background, grid, tuple(shapes))


def kinds_of(shapes: Sequence[Shape]) -> list[str]:
    """The kinds that are there, in the fixed order of KINDS."""
    there = {s.kind for s in shapes}
    return [k for k in KINDS if k in there]


def hal_objects(shapes: Sequence[Shape]) -> list[str]:
    there = kinds_of(shapes)
    return [k for k in KINDS if k not in there and PARTNER[k] in there]


# --- pictures

def signed_distance(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Below 0 inside the shape of radius 1 at the origin, above 0 outside."""
    if kind == "circle":
        return np.hypot(u, v) - 1
    if kind == "square":
        return np.maximum(abs(u), abs(v)) - 0.86
    if kind == "triangle":
        return np.maximum(v - 0.8, 1.035 * abs(u) - 0.55 * (v + 1))
    if kind == "cross":
        return np.maximum(np.minimum(abs(u), abs(v)) - 0.33, np.maximum(abs(u), abs(v)) - 1)
    if kind == "ring":
        return abs(np.hypot(u, v) - 0.72) - 0.28
    return np.maximum(abs(v) - 0.4, abs(u) - 1)  # bar


def render(scenes: Sequence[Scene], size: int = SIZE) -> np.ndarray:
    """float32 [n, size, size, 3] in [0, 1], edges smooth over 1.5 pixels. `size`: a multiple of 48,
    for a larger picture of the scene."""
    pictures = np.empty((len(scenes), size, size, 3), np.float32)
    zoom = size / SIZE
    for grid in {s.grid for s in scenes}:
        rows = [i for i, s in enumerate(scenes) if s.grid == grid]
        ground = np.array([scenes[i].background for i in rows], np.float32)  # (n, 3)
        c = size // grid  # pixels per cell
        alpha = np.zeros((len(rows), grid * grid, c, c), np.float32)
        paint = np.zeros((len(rows), grid * grid, 3), np.float32)
        for kind in KINDS:
            found = []
            for at, i in enumerate(rows):
                found += [(at, s) for s in scenes[i].shapes if s.kind == kind]
            if not found:
                continue
            at = np.array([a for a, _ in found])
            cells = np.array([s.cell for _, s in found])
            places = zoom * np.array([(s.x, s.y, s.r) for _, s in found], np.float32)  # (m, 3)
            x, y, r = places[:, :1], places[:, 1:2], places[:, 2:]
            pixel = np.arange(c, dtype=np.float32) + 0.5
            u = (cells[:, None] % grid * c + pixel - x) / r  # (m, c)
            v = (cells[:, None] // grid * c + pixel - y) / r
            distance = signed_distance(kind, u[:, None, :], v[:, :, None]) * r[:, :, None]
            alpha[at, cells] = np.clip(0.5 - distance / 1.5, 0, 1)
            paint[at, cells] = [COLORS[s.color] for _, s in found]
        contrast = (paint - ground[:, None])[:, :, None, None]
        whole = ground[:, None, None, None] + alpha[..., None] * contrast  # (n, cells, c, c, 3)
        whole = whole.reshape(-1, grid, grid, c, c, 3).transpose(0, 1, 3, 2, 4, 5)
        pictures[rows] = whole.reshape(-1, size, size, 3)
    return pictures


def to_uint8(pictures: np.ndarray) -> np.ndarray:
    return np.round(pictures * 255).clip(0, 255).astype(np.uint8)


# --- questions

def number(n: int) -> str:
    return NUMBERS[n]


def plural(word: str) -> str:
    return word + ("es" if word.endswith("s") else "s")


def where(place: str) -> str:
    return f"{place} image" if place else "image"


def ask(
    field: str, truth: bool, shapes: Sequence[Shape], rng: random.Random, place: str = ""
) -> Question | None:
    """One yes/no question about `shapes` whose truth is as asked; None where there is none
    (relation: it needs two kinds with one shape each and more than 8 pixels apart; hal-object, no:
    it needs an absent partner)."""
    there = kinds_of(shapes)
    verdict = "yes" if truth else "no"

    def question(template: str, evidence: str, **words: str) -> Question:
        text = TEMPLATES[template].format(place=where(place), **words)
        return Question(field, text, evidence, verdict)

    if field in ("existence", "hal-object"):
        hal = hal_objects(shapes)
        absent = [kind for kind in KINDS if kind not in there and kind not in hal]
        pool = there if truth else hal if field == "hal-object" else absent
        if not pool:
            return None
        o = rng.choice(pool)
        return question("existence", number(count(shapes, o)), o=o)
    if field == "total":
        n = len(shapes)
        near = [m for m in range(max(1, n - 3), 10) if m != n]
        asked = n if truth else rng.choice(near)
        return question("number", number(n), **counted(asked, "shape"))
    if not there:
        return None
    if field == "number":
        o = rng.choice(there)
        n = count(shapes, o)
        asked = n
        if not truth:
            asked = n + 1 if n == 1 or rng.random() < 0.5 else n - 1
        return question("number", number(n), **counted(asked, o))
    if field == "color":
        one = rng.choice(shapes)
        others = [c for c in COLORS if c != one.color]
        asked_color = one.color if truth else rng.choice(others)
        return question("color", one.color, o=one.kind, c=asked_color)
    pairs = related(shapes)
    if not pairs:
        return None
    a, b, relation = rng.choice(pairs)
    asked_relation = relation if truth else OPPOSITE[relation]
    return question("relation", relation, a=a.kind, relation=PHRASE[asked_relation], b=b.kind)


def count(shapes: Sequence[Shape], kind: str) -> int:
    return sum(shape.kind == kind for shape in shapes)


def counted(n: int, name: str) -> dict[str, str]:
    """The words of "Is there one circle", "Are there two circles"."""
    if n == 1:
        return {"verb": "Is", "n": number(n), "o": name}
    return {"verb": "Are", "n": number(n), "o": plural(name)}


def related(shapes: Sequence[Shape]) -> list[tuple[Shape, Shape, str]]:
    """(a, b, "left"): a lies left of b by more than 8 pixels, and there is one of each kind."""
    single = [shape for shape in shapes if count(shapes, shape.kind) == 1]
    pairs = []
    for a in single:
        for b in single:
            apart = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
            pairs += [(a, b, name) for name, distance in apart.items() if distance > 8]
    return pairs


def describe(shapes: Sequence[Shape], place: str = "") -> Question:
    """"two red circle one blue bar": every kind, in the order of KINDS; "zero" for nothing."""
    phrases = []
    for kind in kinds_of(shapes):
        color = next(shape.color for shape in shapes if shape.kind == kind)
        phrases.append(f"{number(count(shapes, kind))} {color} {kind}")
    text = TEMPLATES["describe"].format(place=where(place))
    return Question("describe", text, " ".join(phrases) or "zero", "")


def name_kinds(shapes: Sequence[Shape], asked: int | None = None) -> Question:
    """"Name the two kinds": `asked` more than there are is a false premise."""
    there = kinds_of(shapes)
    n = number(len(there) if asked is None else asked)
    return Question("name", TEMPLATES["name"].format(place="image", n=n), " ".join(there), "")


def how_many(shapes: Sequence[Shape]) -> Question:
    return Question("how many", TEMPLATES["total"].format(place="image"), number(len(shapes)), "")


# --- damage to the layout

def mosaic(four: np.ndarray) -> np.ndarray:
    """Four pictures [4, H, W, 3] (top-left, top-right, bottom-left, bottom-right) glued to one of
    2H x 2W, then area-averaged to H x W."""
    _, H, W, C = four.shape
    whole = four.reshape(2, 2, H, W, C).transpose(0, 2, 1, 3, 4).reshape(2 * H, 2 * W, C)
    whole = whole.astype(np.float32)
    return whole.reshape(H, 2, W, 2, C).mean((1, 3))


def crop_board(
    scene: Scene, picture: np.ndarray, rows: int, columns: int, rng: random.Random
) -> tuple[np.ndarray, list[Shape]]:
    """Keeps rows x columns whole cells of a board, stretched back to the whole picture; and the
    shapes that are left."""
    top, left = rng.randint(0, 3 - rows), rng.randint(0, 3 - columns)
    c = picture.shape[0] // 3
    part = picture[top * c : (top + rows) * c, left * c : (left + columns) * c].astype(np.float32)
    for axis, n in ((0, rows), (1, columns)):
        part = resize(part, 3 * c, axis) if n < 3 else part
    kept_rows, kept_columns = range(top, top + rows), range(left, left + columns)
    kept = [s for s in scene.shapes if s.cell // 3 in kept_rows and s.cell % 3 in kept_columns]
    return part, kept


def resize(x: np.ndarray, n: int, axis: int) -> np.ndarray:
    """Linear interpolation along one axis, pixel centres kept in place."""
    m = x.shape[axis]
    at = ((np.arange(n) + 0.5) * m / n - 0.5).clip(0, m - 1)
    low = np.floor(at).astype(int)
    along = [-1 if a == axis else 1 for a in range(x.ndim)]
    weight = (at - low).reshape(along).astype(np.float32)
    return x.take(low, axis) * (1 - weight) + x.take(np.minimum(low + 1, m - 1), axis) * weight
