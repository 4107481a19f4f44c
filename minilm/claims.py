"""Claims: what a run over several seeds shows, a sentence and a verdict each.

A rule is a small function: its name is the sentence, its docstring the rule in words, its body
reads the run's numbers through a View and compares intervals over seeds.

    def skipping_beats_a_mild_early_exit(view):
        "In every language SL-D's accuracy is above the mild exit's."
        leads = [view("sl-d", acc(lang)) - view("mild exit", acc(lang)) for lang in LANGUAGES]
        return all_of(above(lead, 0) for lead in leads)

    CLAIMS = [
        Claim("C4b", skipping_beats_a_mild_early_exit, "more",
              method=cells(["sl-d"], map(acc, LANGUAGES)),
              baseline=cells(["mild exit"], map(acc, LANGUAGES))),
    ]

`judge(CLAIMS, metrics)` makes the rows of the results file, `print_claims(rows)` the table. Since a
claim declares what it reads, one test (tests/test_claims.py) builds a table of numbers on which it
must hold, and from it tables on which it must not: `true_table` and `false_tables` at the end.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

HOLDS, UNDECIDED, NOT_REPRODUCED, NOT_TESTED = (
    "holds",
    "undecided",  # the interval over seeds covers the threshold
    "not reproduced",
    "not tested",  # a gate failed, the arm is not in this run, or it cannot be tested at this scale
)
STRENGTH = (HOLDS, UNDECIDED, NOT_REPRODUCED, NOT_TESTED)  # of two parts the later one decides
SMOKE = "smoke run"  # in the place of a verdict after --quick


# --- statistics


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1). One value has no deviation: nan."""
    values = np.asarray(values, dtype=float)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927): sensible also at 0 of n and n of n."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


_T975 = (  # Student's t, two-sided 95%, for 1 to 30 degrees of freedom
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def half_width(sd: float, n: int) -> float:
    """Half the 95% interval of a mean of n seeds, by Student's t. One seed has none: infinite."""
    if n < 2:
        return math.inf
    return (_T975[n - 2] if n <= 31 else 1.96) * sd / math.sqrt(n)


def paired_diff(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a - b over seeds and its 95% interval. One pair has no interval: (d, -inf, inf)."""
    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    mean, sd = mean_sd(d)
    half = half_width(sd, len(d))
    return mean, mean - half, mean + half


def paired_bootstrap(a, b, seed: int = 0, samples: int = 10_000) -> tuple[float, float, float]:
    """Mean of a - b over items (persons, problems) of ONE model, with the 95% percentile interval
    of `samples` resamplings of the items. Of other models it says nothing: claims rest on seeds."""
    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    rng = np.random.default_rng(seed)
    sizes = [min(500, samples - at) for at in range(0, samples, 500)]
    means = np.concatenate([d[rng.integers(0, len(d), (k, len(d)))].mean(1) for k in sizes])
    return float(d.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


# --- the view: what a rule may ask of a run


def key(parts) -> str:
    """The one place where a name in the results file is composed: key(("acc", "a")) == "acc a".

    `parts` is a string, or a (named) tuple whose empty parts are left out. Nothing takes a name
    apart again: whoever needs the parts keeps the tuple."""
    if isinstance(parts, str):
        return parts
    return " ".join(str(part) for part in parts if part not in ("", None))


class Cell(NamedTuple):
    arm: str
    metric: str


def cells(arms: Iterable, metrics: Iterable) -> list[Cell]:
    """Every arm with every metric: what a claim praises, or holds that against."""
    metrics = [key(metric) for metric in metrics]
    return [Cell(key(arm), metric) for arm in arms for metric in metrics]


class NotInThisRun(LookupError):
    """A run without the arm that a claim asks for: the claim is "not tested"."""


@dataclass(frozen=True)
class PerSeed:
    """One number per seed. Differences and ratios are paired: seed by seed, then averaged."""

    values: tuple[float, ...]
    name: str = ""
    signed: bool = False  # a difference is printed with its sign

    @property
    def mean(self) -> float:
        return mean_sd(self.values)[0]

    @property
    def low(self) -> float:  # the 95% interval over seeds, by Student's t
        return self.mean - half_width(mean_sd(self.values)[1], len(self.values))

    @property
    def high(self) -> float:
        return self.mean + half_width(mean_sd(self.values)[1], len(self.values))

    def __sub__(self, other: "PerSeed | float") -> "PerSeed":
        if not isinstance(other, PerSeed):
            other = PerSeed((other,) * len(self.values), f"{other:g}")
        pairs = zip(self.values, other.values, strict=True)
        return PerSeed(tuple(a - b for a, b in pairs), f"{self.name} - {other.name}", signed=True)

    def __truediv__(self, other: "PerSeed") -> "PerSeed":
        pairs = zip(self.values, other.values, strict=True)
        return PerSeed(tuple(a / b for a, b in pairs), f"{self.name} / {other.name}")

    def called(self, name: str) -> "PerSeed":
        return replace(self, name=name)

    def __str__(self) -> str:
        form = "{:+.3f}" if self.signed else "{:.3f}"
        shown = f"{self.name} {form.format(self.mean)}"
        if len(self.values) > 1:
            shown += f" [{form}, {form}]".format(self.low, self.high)
        return shown


def average(items: Iterable[PerSeed], name: str) -> PerSeed:
    """The mean over languages, spans, ... of each seed: still one number per seed."""
    items = list(items)
    rows = zip(*(item.values for item in items), strict=True)
    means = tuple(float(np.mean(row)) for row in rows)
    return PerSeed(means, name, signed=items[0].signed)


class View:
    """The metrics of a run as rules see them: view("sl-d", ("acc", "a")) is a PerSeed.

    An arm that the run lacks raises NotInThisRun ("not tested"). A metric that a present arm lacks
    is a misspelling: KeyError."""

    def __init__(self, metrics: dict):
        self.metrics = metrics

    def __contains__(self, arm) -> bool:
        return key(arm) in self.metrics

    def __call__(self, arm, metric) -> PerSeed:
        arm, metric = key(arm), key(metric)
        if arm not in self.metrics:
            raise NotInThisRun(f"not in this run: {arm}")
        if metric not in self.metrics[arm]:
            known = ", ".join(self.metrics[arm]) or "none"
            raise KeyError(f"{arm} has no metric {metric!r}; its metrics are {known}")
        values = self.metrics[arm][metric]["values"]
        if any(value is None or math.isnan(value) for value in values):
            raise NotInThisRun(f"{arm} {metric} was not measured in every seed")
        return PerSeed(tuple(map(float, values)), f"{arm} {metric}")

    def mean(self, arm, metric) -> float:
        return self(arm, metric).mean

    @property
    def seeds(self) -> int:
        arms = self.metrics.values()
        return max((len(cell["values"]) for arm in arms for cell in arm.values()), default=0)


# --- rules: an interval over seeds against a threshold


class Verdict(NamedTuple):
    verdict: str
    measured: str  # the numbers it rests on, in words


def above(x: PerSeed, threshold: float = 0.0) -> Verdict:
    """Holds if the whole interval lies above the threshold, fails if none of it does."""
    if x.low > threshold:
        return Verdict(HOLDS, str(x))
    return _not_there(x, threshold, failed=x.high <= threshold)


def at_least(x: PerSeed, threshold: float) -> Verdict:
    """As `above`, and an interval that ends exactly at the threshold holds: 1.00 is at least 1."""
    if x.low >= threshold:
        return Verdict(HOLDS, str(x))
    return _not_there(x, threshold, failed=x.high < threshold)


def below(x: PerSeed, threshold: float = 0.0) -> Verdict:
    if x.high < threshold:
        return Verdict(HOLDS, str(x))
    return _not_there(x, threshold, failed=x.low >= threshold)


def at_most(x: PerSeed, threshold: float) -> Verdict:
    if x.high <= threshold:
        return Verdict(HOLDS, str(x))
    return _not_there(x, threshold, failed=x.low > threshold)


def within(x: PerSeed, margin: float) -> Verdict:
    """Two things are equal: the whole interval of their difference lies in [-margin, margin]."""
    return Verdict(all_of((at_least(x, -margin), at_most(x, margin))).verdict, str(x))


def fact(holds: bool, measured: str) -> Verdict:
    """For what is counted, not estimated, such as an equation that must hold exactly."""
    return Verdict(HOLDS if holds else NOT_REPRODUCED, measured)


def untestable(reason: str) -> Verdict:
    return Verdict(NOT_TESTED, reason)


def all_of(parts: Iterable[Verdict]) -> Verdict:
    """Every part must hold: "not tested" beats a no, a no beats undecided, that beats holds."""
    parts = list(parts)
    worst = max(parts, key=lambda part: STRENGTH.index(part.verdict))
    measured = dict.fromkeys(part.measured for part in parts if part.measured)  # each once
    return Verdict(worst.verdict, "; ".join(measured))


def _not_there(x: PerSeed, threshold: float, failed: bool) -> Verdict:
    if failed:
        return Verdict(NOT_REPRODUCED, str(x))
    needed = seeds_to_decide(x.values, threshold)
    return Verdict(UNDECIDED, f"{x} ({needed})")


def seeds_to_decide(values: Sequence[float], threshold: float) -> str:
    """How many seeds would bring the interval off the threshold if mean and deviation stay."""
    mean, sd = mean_sd(values)
    if len(values) < 2:
        return "one seed decides nothing"
    for n in range(len(values) + 1, 101):
        if half_width(sd, n) < abs(mean - threshold):
            return f"about {n} seeds would decide"
    return "more than 100 seeds would be needed"


# --- claims

KINDS = ("more", "order", "equal", "no worse", "level", "open")


@dataclass(frozen=True)
class Claim:
    """A rule, and what the shared test must know to refute it.

    kind  more      every method cell beats the baseline's (by `margin`, if the rule asks for it)
          order     the method's cells rise, first to last
          equal     method and baseline differ by less than `margin`
          no worse  the method is at most `margin` behind the baseline
          level     the method's cells reach `bound`
          open      cannot be tested at this scale: the rule says why

    Method and baseline are lists of cells: of equal length they are pairs; otherwise a cell is held
    against those of the same metric, or else against the first."""

    id: str
    rule: Callable[[View], Verdict]
    kind: str
    method: Sequence[Cell] = ()  # what is praised
    baseline: Sequence[Cell] = ()  # what it is held against
    controls: Sequence[Cell] = ()  # arms that must not do as well as the method
    margin: float = 0.0
    bound: float | None = None
    smaller_is_better: bool = False  # what is praised is to be small: perplexity, steps
    given: dict[Cell, float] = field(default_factory=dict)  # other cells that the rule reads, or
    # cells whose default in `true_table` does not fit, with a value under which the claim can hold
    gate: Callable[[View], str] | None = None  # why nothing can be said in this run; "" if it can
    paper: str | None = None  # what the paper reports
    run: str = "default"  # whose numbers decide: default, full or seeds (--more-seeds)
    sentence: str = ""  # where the rule's name is not enough

    @property
    def statement(self) -> str:
        name = self.sentence or self.rule.__name__.replace("_", " ")
        return name[0].upper() + name[1:]

    @property
    def rule_in_words(self) -> str:
        return " ".join((self.rule.__doc__ or "").split())


def judge(claims: Sequence[Claim], metrics: dict) -> list[dict]:
    """The rows of a results file, from its numbers alone."""
    view = View(metrics)
    rows = []
    for claim in claims:
        verdict, measured = decide(claim, view)
        rows.append(
            {
                "id": claim.id,
                "statement": claim.statement,
                "paper": claim.paper,
                "rule": claim.rule_in_words,
                "measured": measured,
                "verdict": verdict,
                "run": claim.run,
            }
        )
    return rows


def decide(claim: Claim, view: View) -> Verdict:
    try:
        verdict, measured = claim.rule(view)
        refused = claim.gate(view) if claim.gate else ""
    except NotInThisRun as missing:
        return Verdict(NOT_TESTED, str(missing))
    if refused:
        return Verdict(NOT_TESTED, f"{refused} ({measured})")
    if view.seeds < 2 and verdict != NOT_TESTED:  # one model says nothing about others
        return Verdict(UNDECIDED, measured)
    return Verdict(verdict, measured)


def print_claims(rows: list[dict]) -> None:
    """Every claim with the paper's number beside ours. After --quick: numbers, and no verdict."""
    for row in rows:
        verdict = row["verdict"]
        print(f"\n{row['id']:4} {verdict.upper() if verdict == NOT_REPRODUCED else verdict}")
        lines = {
            "claim": row["statement"],
            "rule": row["rule"],
            "paper": row["paper"] or "says nothing of it",
            "here": row["measured"],
        }
        if row.get("run", "default") != "default":
            lines["run"] = {"full": "--full", "seeds": "--more-seeds"}[row["run"]] + " decides"
        for label, text in lines.items():
            start = f"     {label:6}"
            print(textwrap.fill(text, 116, initial_indent=start, subsequent_indent=" " * 11))


def pm(cell: dict, digits: int = 2) -> str:
    """{"mean", "sd"} -> "0.75 +/- 0.03"; of a single seed "0.75"; a dash if it was not measured."""
    if cell["mean"] is None or math.isnan(cell["mean"]):
        return "-"
    shown = f"{cell['mean']:.{digits}f}"
    if cell["sd"] is None or math.isnan(cell["sd"]):
        return shown
    return f"{shown} +/- {cell['sd']:.{digits}f}"


# --- tables of numbers on which a claim must hold, and must not

Table = dict[Cell, list[float]]  # the seeds' values of everything a claim declares


def as_metrics(table: Table) -> dict:
    """In the form of a results file."""
    metrics = {}
    for (arm, metric), values in table.items():
        mean, sd = mean_sd(values)
        metrics.setdefault(arm, {})[metric] = {"mean": mean, "sd": sd, "values": list(values)}
    return metrics


def partner(cell: Cell, cells: Sequence[Cell], others: Sequence[Cell]) -> Cell:
    """Which of `others` a cell of `cells` is held against (or takes its values from)."""
    if len(cells) == len(others):
        return others[list(cells).index(cell)]
    same = [other for other in others if other.metric == cell.metric]
    return (same or list(others))[0]


def true_table(claim: Claim, seeds: int = 4) -> Table:
    """Numbers on which the claim holds: baselines at .5, the method better by `margin` and .2."""
    noise = [0.01 * (1 if i % 2 else -1) for i in range(seeds)]  # of a seed, the same in every arm
    sign = -1 if claim.smaller_is_better else 1
    table = {}
    for cell in (*claim.baseline, *claim.controls):
        table[cell] = [0.5 + x for x in noise]
    for cell, value in claim.given.items():
        table[cell] = [float(value)] * seeds
    for i, cell in enumerate(claim.method):
        if cell in claim.given:
            continue
        if claim.kind == "level":
            centre = [claim.bound + sign * 0.1 * (abs(claim.bound) or 1)] * seeds
        elif claim.kind == "order":
            centre = [0.3 + x + sign * i * (claim.margin + 0.1) for x in noise]
        else:
            lead = sign * (claim.margin + 0.2) if claim.kind == "more" else 0.0
            centre = [x + lead for x in table[partner(cell, claim.method, claim.baseline)]]
        table[cell] = centre
    return table


def false_tables(claim: Claim, table: Table) -> dict[str, Table]:
    """What must refute the claim, by name: the table with some of its numbers moved."""
    sign = -1 if claim.smaller_is_better else 1
    method, baseline = list(claim.method), list(claim.baseline)
    against = {cell: partner(cell, method, baseline) for cell in method} if baseline else {}
    backed = {cell: partner(cell, baseline, method) for cell in baseline}
    equal_low = {cell: table[other] for cell, other in against.items()}
    equal_high = {cell: table[other] for cell, other in backed.items()}
    moved = {}
    if claim.kind == "more":
        moved["all equal, at the baseline's values"] = equal_low
        moved["all equal, at the method's values"] = equal_high
        moved["exchanged"] = equal_low | equal_high
        moved["a lead of a tenth of the seeds' deviation"] = {
            cell: _small_lead(table[cell], table[other], sign) for cell, other in against.items()
        }
    elif claim.kind == "order":
        flat = np.mean([table[cell] for cell in method], axis=0).tolist()
        moved["flat"] = {cell: flat for cell in method}
        moved["reversed"] = {cell: table[other] for cell, other in zip(method, method[::-1])}
    elif claim.kind in ("equal", "no worse"):
        directions = (-sign, sign) if claim.kind == "equal" else (-sign,)
        for direction in directions:
            side = "above" if direction > 0 else "below"
            moved[f"twice the margin {side} the baseline"] = {
                cell: [x + direction * 2 * claim.margin for x in values]
                for cell, values in equal_low.items()
            }
    elif claim.kind == "level":
        past = {}
        for cell in method:
            distance = max(abs(x - claim.bound) for x in table[cell])
            other_side = claim.bound - sign * max(distance, 0.05 * (abs(claim.bound) or 1))
            past[cell] = [other_side] * len(table[cell])
        moved["past the bound"] = past
    for arm in dict.fromkeys(cell.arm for cell in claim.controls):
        own = [cell for cell in claim.controls if cell.arm == arm]
        as_good = {cell: table[partner(cell, own, method)] for cell in own}
        moved[f"the control {arm} as good as the method"] = as_good
    return {name: table | change for name, change in moved.items()}


def _small_lead(method, baseline, sign) -> list[float]:
    n = len(baseline)
    deviation = np.nanmax([mean_sd(x)[1] for x in (method, baseline)] + [0.01])
    spread = np.linspace(-1, 1, n)
    spread = spread / spread.std(ddof=1)
    return [b + deviation * (0.1 * sign + float(s)) for b, s in zip(baseline, spread)]
