"""Does it hold? Arms, controls, seeds and claims for methods/learning_preferences.py, the paper.

Asked   whose version of a fact about a test person a model believes, Pr(A, B), after a lesson in
        which A's texts about other persons agreed with m unmarked texts and B's with n; how fast
        uncontested facts of either source are learned. The claims: learning_preferences_claims.py.
Arms    0:8 ... 8:0           the lesson's ratio m : n; then the same balanced texts for all
        no marks              as 8:0, but A's and B's texts cannot be told apart
        style 0:8, 8:0        verbs in place of source names, asked in a third style
        reverse, erase, again 8:0, then a second lesson about fresh persons at 0:8, 4:4, 8:0
        4:4 swapped           as 4:4 with the sources' names exchanged from the start
        8:0 exchanged         as 8:0 with the names exchanged in the conflicting texts alone
        mixed 0:8, 4:4, 8:0   one stage in place of two, as the published generator does
        A only, B only        no conflict: A's facts told by one source; also after 4:4
        4:4 +8, 8:0 +8        so many more texts of B per test person (--full: +2, +4, +28)
        d32, d128, two tokens, style 4:4                                (--full)
Run     python methods/experiments/learning_preferences.py         # 2 free CPU cores, ~5 min
        python methods/experiments/learning_preferences.py --full          # every arm, ~10 min
        python methods/experiments/learning_preferences.py --more-seeds    # seeds 50-57, ~7 min
Honest  - The model is trained from nothing on 60 + 60 invented persons: this is the paper's
          explanation, not its finding about real styles (C1 to C4 need a large pretrained model).
        - Two stages, first the lesson and then the conflict, are ours; the published generator
          mixes both: the `mixed` arms (C5m, C6m).
        - Every arm shares initial weights, persons, values, layouts and order. A and B are mirror
          images: one token differs.
        - Pr is asked without a mark, in three phrasings; the interval is over seeds (models).
        - At 4:4 single models lean to a side (Pr .57, .74, .68, .44 in run 1) and lean the same way
          when the names are exchanged (.47, .75, .66, .33): the draws or their order, not the name.
          So C6 is asked of the pair of both (C6b), and the lean is a finding of its own (C6c).
        - No arm reaches 90% in C8: the area under the curve decides.
Runs    - Settings were chosen on seeds 100 to 102. Run 1, seeds 0-3: rules on means; C6 ("4:4 and
          all ratios before the conflict within .1 of .5") failed at .61. Arms of one or two copies
          and 8:0 +2, +4 were read by no claim and went.
        - Run 2, seeds 50-53 (and 50-57, for the claims that --more-seeds decides): the rules of
          now, frozen before it. On four seeds C6, C6b, C6c, C6m, C7e and C8 were undecided; on
          eight C6b and C6m hold, and four stay open: C6 (4:4 at .42 +/- .08, 16 seeds needed), C6c
          (46), C7e (a balanced second lesson leaves .565 [.51, .62]) and C8 (.30 faster, but the
          control after 4:4 is within .055 of none, .05 asked). --full (50-53): C5t and F3 hold (32
          texts of B against 4 of A leave .81 [.54, 1.07]); C9c and F2 are undecided; C10 is not
          tested: at width 32 the facts are not learned (64 to 128: +.12 [.01, .22]).
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from methods.experiments.learning_preferences_claims import (
    CLAIMS,
    FINDING,
    RATIOS,
    claims,
    figure,
    headline,
)
from methods.learning_preferences import (
    EXCHANGED,
    TOLD_BY,
    agreement,
    believed,
    biography,
    choices,
    conflict,
    learned,
    new_model,
    preference,
    show_texts,
    train,
)
from methods.worlds.learning_preferences import (
    ATTRIBUTES,
    FIRST,
    LAST,
    Person,
    all_values,
    draw_layouts,
    make_people,
)
from minilm import InputError
from minilm.claims import print_claims
from minilm.data import generator
from minilm.results import (
    Outcome,
    check_arms,
    check_range,
    check_width,
    cli,
    print_metrics,
    progress,
    run_seeds,
    save_results,
)
from minilm.transformer import Transformer

__all__ = ["CLAIMS", "FINDING", "claims", "figure", "headline", "main"]

PAPER = "Formality is Favored, EMNLP 2024, arXiv 2410.04784"


class Arm(NamedTuple):
    ratio: tuple[int, int] = (8, 0)  # unmarked texts of an evidence person that repeat A : B
    feature: str = "source"  # what tells A's texts from B's: source, style or none
    then: tuple[int, int] | None = None  # a second lesson at this ratio, about fresh persons
    extra: int = 0  # conflict: so many more texts of B
    only: str | None = None  # no conflict: A's values, told by this source alone
    swapped: Literal["", "always", "in the conflict"] = ""  # B's source tells A's values, and
    # A's source B's: else the very same texts
    mixed: bool = False  # both stages in one, as the published generator does
    width: int | None = None  # of the model, if not Config's
    value_tokens: int = 1  # tokens of a value


ARMS = {
    # who agreed with the rest?
    "0:8": Arm((0, 8)),
    "2:6": Arm((2, 6)),
    "4:4": Arm((4, 4)),
    "6:2": Arm((6, 2)),
    "8:0": Arm((8, 0)),
    # nothing to tell them apart by; something else to tell them apart by
    "no marks": Arm((8, 0), feature="none"),
    "style 0:8": Arm((0, 8), feature="style"),
    "style 8:0": Arm((8, 0), feature="style"),
    # a second lesson
    "reverse": Arm((8, 0), then=(0, 8)),
    "erase": Arm((8, 0), then=(4, 4)),
    "again": Arm((8, 0), then=(8, 0)),
    # is it the name?
    "4:4 swapped": Arm((4, 4), swapped="always"),
    "8:0 exchanged": Arm((8, 0), swapped="in the conflict"),
    # the published protocol
    "mixed 0:8": Arm((0, 8), mixed=True),
    "mixed 4:4": Arm((4, 4), mixed=True),
    "mixed 8:0": Arm((8, 0), mixed=True),
    # how fast is a source believed?
    "A only": Arm((8, 0), only="A"),
    "B only": Arm((8, 0), only="B"),
    "4:4 A only": Arm((4, 4), only="A"),
    "4:4 B only": Arm((4, 4), only="B"),
    # does repetition outvote trust?
    "4:4 +8": Arm((4, 4), extra=8),
    "8:0 +8": Arm((8, 0), extra=8),
    # --full
    "4:4 +2": Arm((4, 4), extra=2),
    "4:4 +4": Arm((4, 4), extra=4),
    "4:4 +28": Arm((4, 4), extra=28),
    "8:0 +28": Arm((8, 0), extra=28),
    "style 4:4": Arm((4, 4), feature="style"),
    "d32 0:8": Arm((0, 8), width=32),
    "d32 8:0": Arm((8, 0), width=32),
    "d128 0:8": Arm((0, 8), width=128),
    "d128 8:0": Arm((8, 0), width=128),
    "two tokens": Arm((8, 0), value_tokens=2),
}
CORE = tuple(ARMS)[: tuple(ARMS).index("4:4 +2")]
EIGHT = (  # arms whose claims need eight seeds
    *RATIOS,
    *("4:4 swapped", "8:0 exchanged", "no marks", "mixed 4:4", "erase"),
    *("A only", "B only", "4:4 A only", "4:4 B only", "4:4 +8", "8:0 +8"),
)


@dataclass(frozen=True)
class Config:
    arms: tuple[str, ...] = CORE  # what to run, see ARMS
    seeds: tuple[int, ...] = (50, 51, 52, 53)  # one complete world, model and training per seed
    evidence: int = 60  # persons of the first lesson; as many others for a second one
    test: int = 60  # persons of whom no unmarked text is ever read
    copies: int = 4  # texts of A, and texts of B, per person
    epochs: int = 12  # a lesson: passes over its texts
    lr: float = 2e-3  # a lesson: learning rate
    epochs2: int = 12  # the conflict: passes over its texts
    lr2: float = 1e-3  # the conflict: learning rate
    batch: int = 32  # texts per step
    width: int = 64  # model width
    layers: int = 2  # blocks
    eval_every: int = 2  # the conflict: epochs between the points of the figure
    quick: bool = False  # smoke run: few persons, one epoch, one seed
    full: bool = False  # every arm of ARMS: more copies, widths, values of two tokens
    more_seeds: bool = False  # eight seeds (50-57) of the arms whose claims need them
    workers: int | None = None  # seeds at a time (default: one per core)
    out: str | None = None  # folder for results in place of results/ or runs/


# --- what an arm reads


def lesson_texts(cfg: Config, arm: Arm, people: Sequence[Person], ratio, seed: int) -> list:
    """Of every person the conflicting texts and the unmarked ones that take sides, m : n."""
    told_by = EXCHANGED if arm.swapped == "always" else TOLD_BY
    texts = []
    for person in people:
        texts += conflict(person, seed, cfg.copies, arm.feature, told_by)
        texts += agreement(person, seed, *ratio)
    return texts


def test_texts(cfg: Config, arm: Arm, people: Sequence[Person], seed: int) -> list:
    """Of every person the conflicting texts alone, as many of A as of B, but for arm.extra and
    arm.only. Whatever the ratio of the lesson, they are the same."""
    told_by = EXCHANGED if arm.swapped else TOLD_BY
    texts = []
    for person in people:
        marked, _ = draw_layouts(person, seed)
        if arm.only:  # one version, one source: nothing to disagree with
            for layout in marked[: cfg.copies]:
                texts.append(biography(person, "A", arm.only, arm.feature, layout))
            continue
        texts += conflict(person, seed, cfg.copies, arm.feature, told_by)
        for layout in marked[cfg.copies : cfg.copies + arm.extra]:
            texts.append(biography(person, "B", told_by["B"], arm.feature, layout))
    return texts


# --- one seed


def run(cfg: Config, seed: int) -> Outcome:
    """All arms of one seed: the same persons, layouts, order and initial weights for each."""
    outcome = Outcome({}, {})
    taught = {}  # lessons that several arms share
    for name in progress(cfg.arms, f"seed {seed}"):
        arm = ARMS[name]
        people = make_people(seed, cfg.evidence, cfg.test, arm.value_tokens)
        model = copy.deepcopy(teach(cfg, arm, people, seed, taught))
        if arm.mixed:
            metrics, series = measure(model, people["test"], arm), {}
        elif arm.only:
            metrics, series = learn_facts(cfg, arm, model, people["test"], seed)
        else:
            metrics, series = read_conflict(cfg, arm, model, people["test"], seed)
        outcome.metrics[name], outcome.series[name] = metrics, series
    return outcome


def teach(cfg: Config, arm: Arm, people: dict, seed: int, taught: dict) -> Transformer:
    """The model after the lesson at arm.ratio and, if arm.then, the second one, about other
    persons. `taught` remembers: arms with the same lessons go on from the same model."""
    always = "always" if arm.swapped == "always" else ""
    lesson = arm._replace(extra=0, only=None, swapped=always)  # what tells lessons apart
    if lesson in taught:
        return taught[lesson]
    if arm.then:
        group, ratio = "fresh", arm.then
        model = copy.deepcopy(teach(cfg, arm._replace(then=None), people, seed, taught))
    else:
        group, ratio = "evidence", arm.ratio
        model = new_model(seed, arm.width or cfg.width, cfg.layers)
    texts = lesson_texts(cfg, arm, people[group], ratio, seed)
    if arm.mixed:
        texts += test_texts(cfg, arm, people["test"], seed)
    order = generator(seed, group)
    for _ in train(model, texts, cfg.epochs, cfg.lr, order, cfg.batch):
        pass
    taught[lesson] = model
    return model


def read_conflict(cfg: Config, arm: Arm, model, test: Sequence[Person], seed: int):
    """The second stage on a model that has been taught -> metrics, series {name: (x, values)}."""
    texts = test_texts(cfg, arm, test, seed)
    before = preference(choices(model, test))
    points = [(0, before)]
    order = generator(seed, "stage 2")
    for epoch in train(model, texts, cfg.epochs2, cfg.lr2, order, cfg.batch):
        if epoch % cfg.eval_every == 0 or epoch == cfg.epochs2:
            points.append((epoch, preference(choices(model, test))))
    metrics = {"pr before": before} | measure(model, test, arm)
    return metrics, {"pr": tuple(zip(*points))}


def measure(model, people: Sequence[Person], arm: Arm) -> dict[str, float]:
    """Pr, asked without a mark; per attribute; asked in the words of each source; and whether the
    facts were learned at all."""
    chosen = choices(model, people)
    metrics = {"pr": preference(chosen), "ties": chosen.isnan().sum().item()}
    for attribute, name in enumerate(ATTRIBUTES):
        metrics[f"pr {name}"] = chosen[:, attribute].nanmean().item()
    if arm.feature != "none":
        for mark in "AB":
            marked = choices(model, people, mark, arm.feature)
            metrics[f"pr asked as {mark}"] = marked.nanmean().item()
    metrics["learned"] = learned(model, people, all_values(arm.value_tokens))
    return metrics


def learn_facts(cfg: Config, arm: Arm, model, test: Sequence[Person], seed: int):
    """Uncontested facts: the share that is known (top-1 of twelve) before and after each epoch, and
    the area under that curve (its mean after the first point)."""
    values = all_values(arm.value_tokens)
    truth = []
    for person in test:
        truth.append([twelve.index(value) for twelve, value in zip(values, person.A)])
    truth = torch.tensor(truth)

    def known() -> float:
        return (believed(model, test, values) == truth).float().mean().item()

    curve = [known()]
    order = generator(seed, "stage 2")
    for _ in train(model, test_texts(cfg, arm, test, seed), cfg.epochs2, cfg.lr2, order, cfg.batch):
        curve.append(known())
    area = sum(curve[1:]) / len(curve[1:])
    return {"area": area, "learned": curve[-1]}, {"top-1": (range(len(curve)), curve)}


def depends(cfg: Config, seed: int) -> dict:
    """What a seed's numbers rest on: its texts, its persons, its first weights."""
    people = make_people(seed, cfg.evidence, cfg.test)
    lesson = lesson_texts(cfg, ARMS["6:2"], people["evidence"][:10], (6, 2), seed)
    return {
        "text": lesson + test_texts(cfg, ARMS["8:0"], people["test"][:10], seed),
        "exam": people["test"],
        "weights": new_model(seed, cfg.width, cfg.layers),
    }


def main(cfg: Config) -> dict:
    started, asked = time.time(), cfg
    check_arms(cfg, "arms", ARMS)
    check_range(cfg, "seeds", least=0)
    check_range(cfg, "lr lr2", above=0)
    check_range(cfg, "epochs", least=0)
    check_range(cfg, "evidence epochs2 batch layers eval_every", least=1)
    check_range(cfg, "test", least=2)
    check_width(cfg)
    names, needed = len(FIRST) * len(LAST), 2 * cfg.evidence + cfg.test
    if needed > names:
        raise InputError(
            f"--evidence {cfg.evidence} --test {cfg.test} need {needed} names (twice the evidence "
            f"and the test persons), there are {names}"
        )
    if cfg.full:
        cfg = replace(cfg, arms=tuple(ARMS))
    if cfg.more_seeds:
        typed = cfg.seeds != Config.seeds
        cfg = replace(cfg, arms=EIGHT, seeds=cfg.seeds if typed else tuple(range(50, 58)))
    layouts = 32  # of a person's marked texts
    check_range(cfg, "copies", least=1, most=layouts - max(ARMS[name].extra for name in cfg.arms))
    if cfg.quick:
        cfg = replace(cfg, seeds=cfg.seeds[:1], evidence=6, test=6, epochs=1, epochs2=3)
    show_texts(make_people(cfg.seeds[0], cfg.evidence, cfg.test), cfg.seeds[0])
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    results = save_results(
        __file__,
        PAPER,
        asked,
        outcomes,
        claims,
        figure,
        started,
        cfg.seeds,
        depends=depends(cfg, cfg.seeds[0]),
    )
    print_metrics(results["metrics"], COLUMNS)
    print_claims(results["claims"])
    return results


COLUMNS = ["pr before", "pr", "pr asked as A", "pr asked as B", "learned", "area"]

if __name__ == "__main__":
    cli(main, Config)
