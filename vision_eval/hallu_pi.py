"""Hallu-PI: Evaluating Hallucination in Multi-modal Large Language Models within Perturbed Inputs
(Ding, Wu, Kuang, Ma, Cao, Cai, Chen, Chen, Huang, ACM MM 2024), https://arxiv.org/abs/2408.01355

Does a model that sees make things up when the picture is damaged (noise, blur, weather: fog,
digital: large pixels, four pictures glued into one, a part cut out) or the prompt misleads? Ask the
same before and after. Describe the picture: R are the objects named, A those that are there, H
those that are not but that one would expect;

    CHAIR = 1 - |R and A| / |R|    Cover = |R and A| / |A|    Cog = |R and H| / |R|
    Hal   = share of descriptions with CHAIR > 0      (nothing named: 0, so read Cover beside it)

And yes/no questions in pairs, one whose true answer is yes and one whose is no: a model that always
says yes gets no pair right. ACC+ = share of pairs with both answers right. Together

    PI-Score = ((100 - Hal) + ACC+) / 2        (Hal and ACC+ in percent)

Found   (four seeds, severities 1 to 5) PI 96 before; 92 blurred, 77 in large pixels, 60 with noise,
        34 in fog, 30 as one of four pictures, 12 on cut pages of shapes, where "how many?" replaces
        the description and 69% of the answers are the nine of a whole page. A twin that trained on
        such damage has 80 on the first four kinds where this one has 66: the information was there.
        The twin trusts prompts more: misleading ones cost it 18 points, not 10. After 100 steps
        with hints in the questions ("Maybe yes.") a model whose hints were always right loses 28
        points of ACC+ to wrong ones, one whose hints were right half the time none. Not reproduced:
        in the paper misleading prompts hurt more than noise and, in mosaics, the number of things
        suffers most; here they hurt less, and number suffers least.
Run     python vision_eval/hallu_pi.py                    # 2 CPU cores, ~1 min: a tiny model
        python vision_eval/hallu_pi.py --picture p.jpg --objects dog tree --expected cat \\
            --base-url http://localhost:8000/v1 --model NAME          # your picture, your model
        python vision_eval/hallu_pi_experiment.py         # seeds, twins, controls, claims, figure
        python vision_eval/benchmark.py --help            # whole data files, AMBER's scorer
        python vision_eval/perturb.py --help              # damaged copies of a folder of pictures
Try     (PI, to a few points: the number of threads moves it)
        train on damage, `vlm.Diet(corrupt=0.8, ops=OPS)` in main: fog 55, not 38, but before 76,
        not 93, and things are seen where no picture is (blank 21, not 53)
        train on hints that are always right, `vlm.Diet(hints=0.7, hint_acc=1.0)`: misleading 37,
        not 82
        --severity 1: noise 80, not 58, blur and pixels cost little, but fog is still at 43
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from minilm import InputError
from minilm.data import generator
from minilm.results import check_range, check_unused, cli
from vision_eval import scenes, vlm
from vision_eval.client import ChatClient
from vision_eval.metrics import FIELDS, Item, mentions, parse_yes_no, pi_score, score
from vision_eval.perturb import FAMILIES, perturb, read_picture
from vision_eval.scenes import KINDS, PLACES, TEMPLATES, Shape, hal_objects, kinds_of

OPS = (*FAMILIES,)  # noise, blur, weather, digital: severities 1 to 5
SCENARIOS = (*OPS, "concat", "crop", "misleading")


@dataclass(frozen=True)
class Config:
    steps: int = 300  # training steps of the tiny model (the experiment's base has 450)
    scenes: int = 60  # test scenes
    severity: int = 3  # of noise, blur, fog and pixels; the paper draws 1 to 5 for each picture
    seed: int = 0
    picture: str = ""  # a picture of your own, to be asked about at an endpoint
    objects: tuple[str, ...] = ()  # --picture: what is on it
    expected: str = ""  # --picture: one thing that is not on it, and one would expect
    base_url: str = ""  # --picture: a chat endpoint, for example http://localhost:8000/v1
    model: str = ""  # --picture: its name there
    key_env: str | None = None  # --picture: environment variable that holds its key
    quick: bool = False  # smoke run of seconds: numbers without meaning


# --- 1. damage


def damage(
    pictures: np.ndarray, i: int, scenario: str, severity: int = 0, seed: int = 0
) -> np.ndarray:
    """Picture i of uint8 [n, H, W, 3] as the scenario shows it. Cropping needs a page of many
    shapes (scenes.crop_board): its picture, like that of misleading, comes back as it is."""
    if scenario in OPS:
        return perturb(pictures[i], scenario, severity, seed, i)
    if scenario == "concat":  # glued first, then shrunk: each keeps a quarter of its pixels
        at = PLACES.index(place_of(i))  # picture i is there, i + 1 to i + 3 in the next places
        four = [(i + (k - at) % 4) % len(pictures) for k in range(4)]
        return scenes.to_uint8(scenes.mosaic(pictures[four] / np.float32(255)))
    if scenario == "blank":
        return np.full_like(pictures[i], 45)  # the mean background: what is said without looking
    return pictures[i]


def place_of(i: int) -> str:
    """Where a mosaic has picture i; the others are the three that follow it."""
    return PLACES[i % 4]


# --- 2. ask


def questions(
    shapes: Sequence[Shape],
    image: str,
    scenario: str,
    phase: str,
    seed: str,
    place: str = "",
    board: bool = False,
    misled: bool = False,
    before: str = "",
) -> list[Item]:
    """An open question about one picture, then a pair (yes, no) for every field that it allows:
    existence, number, color, relation, hal-object. The same `seed` asks the same before and after.

    scenario, phase (before, after) and image name the items. place: the quarter of a mosaic that is
    meant. board: a page of shapes, of which only the number is asked. misled: every yes/no question
    hints at the wrong answer, and where kinds are to be named (scenario misleading) it asks for one
    more than there are. before: a text put first."""
    rng = random.Random(seed)
    id = f"{scenario}/{phase}/{image}"
    truth, hal, number = tuple(kinds_of(shapes)), tuple(hal_objects(shapes)), ""
    if board:
        opened = scenes.how_many(shapes)
        truth, hal, number = (), (), opened.evidence
    elif scenario == "misleading":
        opened = scenes.name_kinds(shapes, min(len(truth) + misled, len(KINDS)))
    else:
        opened = scenes.describe(shapes, place)
    text = before + opened.text
    common = Item(id, image, scenario, phase, "", "", "", "", "", region=place)
    items = [
        common._replace(
            id=f"{id}/open", task="gen", field=opened.field, question=text,
            answer=number, truth=truth, hal=hal,
        )
    ]  # fmt: skip
    for field in ("total",) if board else FIELDS:
        pair = [scenes.ask(field, verdict, shapes, rng, place) for verdict in (True, False)]
        if not all(pair):
            continue  # this picture has no such pair, for example no two shapes to relate
        for question in pair:
            wrong = "no" if question.verdict == "yes" else "yes"
            hint = TEMPLATES["hint"].format(verdict=wrong) if misled else ""
            item = common._replace(
                id=f"{id}/{field}/{question.verdict}",
                task="disc",
                field="number" if board else field,
                pair_id=f"{id}/{field}",
                question=before + hint + question.text + TEMPLATES["instruction"],
                answer=question.verdict,
            )
            items.append(item)
    return items


# --- 3. score (metrics.py adds these sums up over many pictures, and reads freer answers)


@dataclass(frozen=True)
class Description:
    """What one description said, R, against A and H. By hand: test_one_description_by_hand."""

    R: list[str]
    A: list[str]
    H: list[str]

    @property
    def chair(self) -> float:
        return 1 - sum(x in self.A for x in self.R) / len(self.R) if self.R else 0.0

    @property
    def cover(self) -> float:
        return sum(x in self.R for x in self.A) / len(self.A) if self.A else 0.0

    @property
    def cog(self) -> float:
        return sum(x in self.H for x in self.R) / len(self.R) if self.R else 0.0

    @property
    def hal(self) -> int:
        return int(self.chair > 0)  # one invented object is enough


# --- look inside

Say = Callable[[np.ndarray, str], str]  # picture uint8 [H, W, 3], prompt -> answer


def show_pairs(say: Say, picture: np.ndarray, pairs: Sequence[Sequence[Item]]) -> float:
    """Prints both questions of every pair with their answers -> ACC+ in percent."""
    right_pairs = 0
    for pair in pairs:
        answers = [say(picture, item.question) for item in pair]
        right = [parse_yes_no(said) == item.answer for said, item in zip(answers, pair)]
        right_pairs += all(right)
        told = []
        for item, said, ok in zip(pair, answers, right):
            question = item.question.removesuffix(TEMPLATES["instruction"])
            told.append(f"{question} {said} ({'right' if ok else 'wrong'})")
        print(f"    {'both right' if all(right) else '-':12}" + "   ".join(told))
    return 100 * right_pairs / len(pairs)


def show_picture(say: Say, name: str, picture, opened: Item, pairs, vocabulary) -> float:
    """Everything that is made of one picture: its description, its pairs, its PI-Score."""
    said = say(picture, opened.question)
    d = Description(mentions(said, vocabulary), [*opened.truth], [*opened.hal])
    print(f"\n{name}: it says {said!r}")
    print(f"    R = {d.R}   A = {d.A}   H = {d.H}")
    print(f"    CHAIR {d.chair:.2f}   Cover {d.cover:.2f}   Cog {d.cog:.2f}   Hal {d.hal}")
    acc_plus = show_pairs(say, picture, pairs)
    pi = pi_score(100 * d.hal, acc_plus)
    print(f"    PI = ((100 - {100 * d.hal}) + {acc_plus:.0f}) / 2 = {pi:.0f}")
    return pi


def pairs_of(items: Sequence[Item]) -> list[list[Item]]:
    pairs: dict[str, list[Item]] = {}
    for item in items:
        if item.task == "disc":
            pairs.setdefault(item.pair_id, []).append(item)
    return [*pairs.values()]


def worked_example(say: Say, test: Sequence[scenes.Scene], pictures, cfg: Config) -> None:
    """One scene before and in fog, from the answers to the score."""
    i = scene_with_three_kinds(test)
    opened, *rest = questions(test[i].shapes, f"scene{i}", "none", "before", f"{cfg.seed}/{i}")
    fogged = damage(pictures, i, "weather", cfg.severity, cfg.seed)
    show_picture(say, "before", pictures[i], opened, pairs_of(rest), KINDS)
    show_picture(say, f"fog {cfg.severity}", fogged, opened, pairs_of(rest), KINDS)


def scene_with_three_kinds(test: Sequence[scenes.Scene]) -> int:
    for i, scene in enumerate(test):
        if len(kinds_of(scene.shapes)) == 3:
            return i
    return 0


# --- a picture of your own


def own_questions(cfg: Config) -> tuple[Item, list[list[Item]]]:
    """A description and, for every object that is there, a pair: is it there, and is what one would
    expect?"""
    truth, hal = cfg.objects, (cfg.expected,)
    text = TEMPLATES["describe"].format(place="image")
    opened = Item("open", cfg.picture, "own", "before", "gen", "describe", "", text, "", truth, hal)
    pairs = []
    for there in truth:
        pair = []
        for o, answer in ((there, "yes"), (cfg.expected, "no")):
            text = TEMPLATES["existence"].format(o=o, place="image") + TEMPLATES["instruction"]
            id = f"{there}/{answer}"
            pair.append(opened._replace(id=id, task="disc", field="existence", pair_id=there,
                                        question=text, answer=answer))  # fmt: skip
        pairs.append(pair)
    return opened, pairs


def ask_about_own_picture(cfg: Config) -> None:
    if not (cfg.objects and cfg.expected and cfg.base_url and cfg.model):
        raise InputError("--picture needs --objects (what is on it), --expected (what is not, and "
                         "one would expect), --base-url and --model (who is asked)")
    client = ChatClient(cfg.base_url, cfg.model, key_env=cfg.key_env)

    def say(picture, prompt):
        return client([(picture, prompt, None)])

    picture = read_picture(cfg.picture)
    opened, pairs = own_questions(cfg)
    vocabulary = {*cfg.objects, cfg.expected}
    pi = {"before": show_picture(say, "before", picture, opened, pairs, vocabulary)}
    for op in OPS:
        damaged = perturb(picture, op, cfg.severity, cfg.seed)
        name = f"{op} {cfg.severity}"
        pi[name] = show_picture(say, name, damaged, opened, pairs, vocabulary)
    print("\nPI  " + "   ".join(f"{name} {value:.0f}" for name, value in pi.items()))
    print(f"R holds only the words {', '.join(sorted(vocabulary))}. One picture proves nothing: "
          "benchmark.py asks about many.")


# --- run it


def show_example(seed: int) -> None:
    """Prints one training picture's turns, the words that are learned in capitals."""
    rng = random.Random(f"{seed}/an example")
    diet = vlm.Diet()
    _, views, board = vlm.draw_views(diet._replace(boards=0.0, wide=0.0), rng)
    shown = scenes.describe(views[0][0]).answer
    print(f"A picture with {shown}; what is learned of its turns in capitals:")
    for prompt, answer in vlm.draw_turns(views, board, 5, diet, False, rng):
        print(f"  {prompt:60} {vlm.decode(vlm.encode(prompt))} {answer.upper()}")


def exam_row(
    model, test, pictures, scenario: str, cfg: Config, misled: bool = False
) -> dict[str, float]:
    """Damages, asks and scores every test scene -> the metrics of metrics.score."""
    shown, rows = [], []
    for i, scene in enumerate(test):
        place = place_of(i) if scenario == "concat" else ""
        shown.append(damage(pictures, i, scenario, cfg.severity, cfg.seed))
        rows.append(questions(scene.shapes, f"scene{i}", scenario, "after", f"{cfg.seed}/{i}",
                              place, misled=misled))  # fmt: skip
    said = vlm.answer(model, np.stack(shown), [[item.question for item in row] for row in rows])
    answers = {}
    for row, texts in zip(rows, said):
        answers |= {item.id: text for item, text in zip(row, texts)}
    (metrics,) = score([item for row in rows for item in row], answers, KINDS).values()
    return metrics


def show_crops(model, cfg: Config) -> None:
    """Pages of nine shapes, cut: is what is left counted, or is it what a page usually has?"""
    rng = random.Random(f"{cfg.seed}/crops")
    boards = [scenes.draw_scene(rng, 0.5, "board") for _ in range(cfg.scenes // 2)]
    shown, left = [], []
    for board, picture in zip(boards, scenes.render(boards)):
        part, shapes = scenes.crop_board(board, picture, *rng.choice(scenes.CROPS), rng)
        shown.append(part)
        left.append(scenes.number(len(shapes)))
    prompt = scenes.how_many(boards[0].shapes).text
    said = vlm.answer(model, scenes.to_uint8(np.stack(shown)), [[prompt]] * len(shown))
    right = np.mean([row[0] == number for row, number in zip(said, left)])
    nine = np.mean([row[0] == "nine" for row in said])
    print(f"crop: of {len(boards)} pages of nine shapes, cut to 3, 4 or 6, it counts {right:.0%} "
          f"rightly and says \"nine\" of {nine:.0%}.")


def main(cfg: Config) -> None:
    check_range(cfg, "steps", least=1)
    check_range(cfg, "scenes", least=8)
    check_range(cfg, "severity", least=1, most=5)
    if cfg.picture:
        check_unused(cfg, "steps scenes quick", "with --picture")
        ask_about_own_picture(cfg)
        return
    check_unused(cfg, "objects expected base_url model key_env", "without --picture")
    if cfg.quick:
        cfg = replace(cfg, steps=2, scenes=8)
    show_example(cfg.seed)

    # a model that learns from undamaged pictures only: its encoder first, then all of it
    model = vlm.TinyVLM(generator(cfg.seed, "init"))
    vlm.pretrain_encoder(model, 2 if cfg.quick else 240, cfg.seed)
    vlm.train(model, vlm.Diet(), cfg.steps, 3e-3, cfg.seed, "stage 2")

    rng = random.Random(f"{cfg.seed}/test")
    test = [scenes.draw_scene(rng, 0.5) for _ in range(cfg.scenes)]
    pictures = scenes.to_uint8(scenes.render(test))

    def say(picture, prompt):
        return vlm.answer(model, picture[None], [[prompt]])[0][0]

    worked_example(say, test, pictures, cfg)

    print(f"\n{cfg.scenes} test scenes, severity {cfg.severity}, one model: this proves nothing,")
    print("vision_eval/hallu_pi_experiment.py has seeds, twins and controls.")
    print("              PI   ACC+    Hal  CHAIR  Cover")
    rows = {name: exam_row(model, test, pictures, name, cfg) for name in ("before", *OPS, "concat")}
    # "name the n kinds" in place of a description, with the right n and with one more, and hints
    rows["named"] = exam_row(model, test, pictures, "misleading", cfg)
    rows["misleading"] = exam_row(model, test, pictures, "misleading", cfg, misled=True)
    rows["blank"] = exam_row(model, test, pictures, "blank", cfg)
    for name, row in rows.items():
        numbers = [row[metric] for metric in ("PI", "ACC+", "Hal", "CHAIR", "Cover")]
        print(f"{name:10}" + "".join(f"{x:7.1f}" for x in numbers))
    print("weather: fog; digital: large pixels; concat: one of four pictures in one. named: before")
    print("of misleading, which asks for the kinds by their right number, without hints.")
    print("blank: no picture at all; who describes nothing has Hal 0, and PI above 50.")
    show_crops(model, cfg)


if __name__ == "__main__":
    cli(main, Config)
