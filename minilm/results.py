"""Runs and results: what the ten paper scripts share. Command line, seeds, statistics, the claims table, the JSON file, the figure's style.

A script hands in `run(cfg, seed) -> Outcome`, `claims(metrics) -> list[dict]` and `figure(results) -> Figure`, and keeps every loop."""

import dataclasses
import io
import math
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from tqdm import tqdm

import minilm
from minilm import InputError
from minilm.data import write_atomically, write_json

ROOT = Path(minilm.__file__).resolve().parents[1]
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # Okabe & Ito: safe for the colour-blind


def cli(main: Callable, Config: type) -> None:
    """Builds a Config from the command line (each field's trailing comment is its --help) and calls
    main(cfg). A user's mistake (InputError) and what the machine refuses (OSError: no such file,
    disk full) are one line on stderr and exit status 2, Ctrl-C is one line and 130; any other
    exception keeps its traceback. A character that the terminal cannot show, or a byte from it that
    is no text, becomes a replacement character instead of ending the program."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # not what a test or a notebook puts in its place
            stream.reconfigure(errors="replace")
    doc = sys.modules[main.__module__].__doc__
    paragraphs = re.sub(r"\n(?=[A-Z]\w+ {2,})", "\n\n", doc)  # so that --help keeps Idea, Claims and Run apart
    cfg = tyro.cli(Config, description=paragraphs)
    try:
        main(cfg)
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"\nstopped: {str(stop) or 'by Ctrl-C'}", file=sys.stderr)
        sys.exit(130)  # what shells expect of a program ended by Ctrl-C


def check_range(cfg, names: str, *, least: float = -math.inf, most: float = math.inf,
                above: float = -math.inf, below: float = math.inf) -> None:
    """Refuses numbers that no run can be made of, by the name of their flag; call it first in main.

        check_range(cfg, "layers batch", least=1)           # 1 or more
        check_range(cfg, "lr", above=0)                     # more than 0
        check_range(cfg, "top_p", above=0, most=1)

    NaN and infinity are never in a range. A flag that is None was not given; of a flag that takes
    several numbers, there is at least one and every one is checked."""
    bounds = {"of at least": least, "above": above, "of at most": most, "below": below}
    needed = " and ".join(f"{word} {n:g}" for word, n in bounds.items() if math.isfinite(n))
    for name in names.split():
        value = getattr(cfg, name)
        several = isinstance(value, (tuple, list))
        if several and not value:
            raise InputError(f"{flag(cfg, name)}: give at least one number")
        for number in value if several else () if value is None else (value,):
            fits = least <= number <= most and above < number < below and math.isfinite(number)
            if not fits:
                raise InputError(f"{flag(cfg, name)}: give a number {needed or 'that is finite'}")


def check_unused(cfg, names: str, where: str) -> None:
    """Refuses flags that would be ignored in silence. A flag counts as given if its value is not
    the default.

        if not cfg.chat:
            check_unused(cfg, "system", "without --chat")"""
    default = {field.name: field.default for field in dataclasses.fields(cfg)}
    for name in names.split():
        if getattr(cfg, name) != default[name]:
            raise InputError(f"{flag(cfg, name)} has no effect {where}: leave it out")


def flag(cfg, name: str) -> str:
    """A field as it is typed: "--top-k 5", "--seeds 1 2", "--quick"."""
    value = getattr(cfg, name)
    words = map(str, value if isinstance(value, (tuple, list)) else () if value is True else (value,))
    return " ".join((f"--{name.replace('_', '-')}", *words))


# --- seeds

class Outcome(NamedTuple):
    """What one seed measured."""

    metrics: dict[str, dict[str, float]]  # arm -> metric -> value
    series: dict[str, dict[str, tuple[Sequence, Sequence]]]  # arm -> name -> (x, values); x must be the same for every seed


def run_seeds(run: Callable, cfg, seeds: Sequence[int], workers: int | None = None) -> list[Outcome]:
    """[run(cfg, seed) for seed in seeds], each in a process of its own with one thread, `workers` (default: one per core) at a time.
    One thread also when nothing runs beside it: the number of threads changes the order of sums, and with it the last digits."""
    if not seeds or (workers or 1) < 1:
        raise InputError(f"--seeds {list(seeds)}, --workers {workers}: give at least one of each")
    workers = min(workers or os.cpu_count() or 1, len(seeds))
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return [run(cfg, seed) for seed in seeds]
        finally:
            torch.set_num_threads(threads)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _start_worker, (spawn.Value("i", 0),)) as pool:
        futures = [pool.submit(run, cfg, seed) for seed in seeds]
        return [f.result() for f in tqdm(futures, desc="seeds", position=0)]


_bar_row = 0  # the terminal row of this process's progress bar


def _start_worker(counter):
    global _bar_row
    torch.set_num_threads(1)
    with counter.get_lock():
        counter.value += 1
        _bar_row = counter.value


def progress(iterable, desc: str, total: int | None = None) -> tqdm:
    """A progress bar that keeps to its own row when several seeds run at once."""
    return tqdm(iterable, desc=desc, total=total, position=_bar_row, leave=False, dynamic_ncols=True)


def collect(outcomes: Sequence[Outcome]) -> tuple[dict, dict]:
    """Outcomes of all seeds -> metrics {arm: {metric: {"mean", "sd", "values"}}}, series {arm: {name: {"x", "values"}}}."""
    metrics, series = {}, {}
    for arm, names in outcomes[0].metrics.items():
        metrics[arm] = {}
        for name in names:
            values = [float(o.metrics[arm][name]) for o in outcomes]
            mean, sd = mean_sd(values)
            metrics[arm][name] = {"mean": mean, "sd": sd, "values": values}
    for arm, names in outcomes[0].series.items():
        series[arm] = {name: {"x": list(x), "values": [list(map(float, o.series[arm][name][1])) for o in outcomes]}
                       for name, (x, _) in names.items()}
    return metrics, series


# --- statistics

def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1; 0 for a single value)."""
    values = np.asarray(values, dtype=float)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927): sensible also at 0 of n and n of n."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101,
         2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # Student's t, two-sided 95%, 1 to 30 degrees


def paired_diff(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a - b over seeds, with its 95% interval by Student's t. One pair has no interval: (d, -inf, inf)."""
    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    mean, sd = mean_sd(d)
    if len(d) < 2:
        return mean, -math.inf, math.inf
    half = (_T975[len(d) - 2] if len(d) <= 31 else 1.96) * sd / math.sqrt(len(d))
    return mean, mean - half, mean + half


def paired_bootstrap(a: Sequence[float], b: Sequence[float], seed: int = 0, samples: int = 10_000) -> tuple[float, float, float]:
    """Mean of a - b over items (persons, problems), with the 95% percentile interval of `samples` resamplings of the items."""
    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    rng = np.random.default_rng(seed)
    sizes = [min(500, samples - at) for at in range(0, samples, 500)]
    means = np.concatenate([d[rng.integers(0, len(d), (k, len(d)))].mean(1) for k in sizes])
    return float(d.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


# --- claims and files

def claim(id: str, statement: str, rule: str, measured: str, holds: bool | None, paper: str | None = None) -> dict:
    """One row of the claims table. `holds` None: not testable at this scale or not in this run, with the reason in `measured`."""
    return {"id": id, "statement": statement, "paper": paper, "rule": rule, "measured": measured,
            "holds": None if holds is None else bool(holds)}


def check(metrics: dict, id: str, statement: str, rule: str, evidence: dict[str, Sequence[str]], test: Callable[[Callable], bool],
          paper: str | None = None, digits: int = 2) -> dict:
    """A claim decided on means over seeds: `test(mean)` with mean(arm, metric) -> float; `evidence` {metric: arms} is what it rests on and
    what is shown as measured. An arm that this run lacks makes the claim "not tested"."""
    missing = sorted({arm for name, arms in evidence.items() for arm in arms if name not in metrics.get(arm, {})})
    if missing:
        return claim(id, statement, rule, f"not in this run: {', '.join(missing)}", None, paper)
    measured = "; ".join(f"{name}: " + ", ".join(f"{arm} {pm(metrics[arm][name], digits)}" for arm in arms)
                         for name, arms in evidence.items())
    return claim(id, statement, rule, measured, test(lambda arm, name: metrics[arm][name]["mean"]), paper)


VERDICT = {True: "holds", False: "NOT REPRODUCED", None: "not tested"}


def print_claims(claims: list[dict]) -> None:
    for c in claims:
        print(f"\n{c['id']:4} {VERDICT[c['holds']]}")
        for label, text in (("claim", c["statement"]), ("rule", c["rule"]), ("here", c["measured"])):
            print(textwrap.fill(text, 116, initial_indent=f"     {label:6}", subsequent_indent=" " * 11))


def pm(cell: dict, digits: int = 2) -> str:
    """{"mean", "sd"} -> "0.75 +/- 0.03"."""
    return f"{cell['mean']:.{digits}f} +/- {cell['sd']:.{digits}f}"


def print_metrics(metrics: dict, columns: Sequence[str], digits: int = 2) -> None:
    """One row per arm, "mean +/- sd" per column; a dash where the arm has no such metric."""
    table = [["", *columns], *([arm, *(pm(row[c], digits) if c in row else "-" for c in columns)] for arm, row in metrics.items())]
    widths = [max(map(len, column)) for column in zip(*table)]
    print()
    for arm, *cells in table:
        print(arm.ljust(widths[0]) + "".join(cell.rjust(width + 3) for cell, width in zip(cells, widths[1:])))


def destination(script: str, cfg) -> Path:
    """Where a run's files go, without their endings: `results/NAME` for the default Config, `results/NAME_full` for `--full` alone, else
    `runs/NAME/NAME`; NAME is the script's, less _experiment (in methods/real/: NAME_real). `workers` and `device` change no number and do not count."""
    name = Path(script).stem.removesuffix("_experiment") + ("_real" if Path(script).parent.name == "real" else "")
    if getattr(cfg, "out", None):
        return Path(cfg.out) / name
    neutral = {k: v for k, v in dataclasses.asdict(type(cfg)()).items() if k in ("workers", "device", "out")}
    if dataclasses.replace(cfg, **neutral) == type(cfg)():
        return ROOT / "results" / name
    if getattr(cfg, "full", False) and dataclasses.replace(cfg, **neutral) == type(cfg)(full=True):
        return ROOT / "results" / f"{name}_full"
    return ROOT / "runs" / name / name


def save_results(script: str, paper: str, cfg, outcomes: Sequence[Outcome], claims: Callable, figure: Callable, started: float,
                 seeds: Sequence[int] | None = None, path: Path | None = None) -> dict:
    """Collects the outcomes, computes the claims, writes PATH.json and PATH.png, prints where; returns the results dictionary.
    `started` is time.time() at the start of the run; `claims(metrics)` and `figure(results)` are the script's pure functions."""
    path = path or destination(script, cfg)
    metrics, series = collect(outcomes)
    results = {
        "script": str(Path(script).resolve().relative_to(ROOT)) if Path(script).resolve().is_relative_to(ROOT) else Path(script).name,
        "paper": paper, "command": shlex.join(["python", *_relative_argv()]), "config": _plain(dataclasses.asdict(cfg)),
        "quick": bool(getattr(cfg, "quick", False)), "seeds": list(seeds if seeds is not None else cfg.seeds), "metrics": metrics,
        "series": series, "claims": claims(metrics), "wall_seconds": round(time.time() - started, 1), "hardware": hardware(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "minilm": minilm.__version__}, "commit": commit()}
    results = _plain(results)
    write_json(path.with_suffix(".json"), results)
    save_figure(figure(results), path.with_suffix(".png"))
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    print(f"\nwrote {shown}.json and {shown}.png after {results['wall_seconds']:.0f} s")
    return results


def _relative_argv() -> list[str]:
    """The command line without this machine's folders, also in --flag=PATH."""
    def shown(path: str) -> str:
        full = Path(path).resolve()
        inside = str(full.relative_to(ROOT)) if full.is_relative_to(ROOT) else full.name
        return inside if Path(path).is_absolute() else path
    return ["=".join(map(shown, word.split("=", 1))) if word.startswith("--") else shown(word) for word in sys.argv]


def _plain(x):
    """Values that JSON has: tuples become lists, numpy numbers Python's, NaN and infinities None."""
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(v) for v in x]
    if isinstance(x, np.generic):
        x = x.item()
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x if isinstance(x, (str, int, float, bool, type(None))) else str(x)


def hardware() -> dict:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo", encoding="utf-8") if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "threads": 1}


def commit() -> str | None:
    """The repository's commit, with "+" when tracked files differ from it; None outside a git checkout."""
    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# --- figures

def new_figure(rows: int = 1, columns: int = 1, width: float = 11.0, height: float = 3.8):
    """A figure in the house style, readable when shown 800 pixels wide -> (figure, axes as plt.subplots returns them)."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    with rc_context({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 13, "legend.frameon": False,
                     "legend.fontsize": 10.5, "lines.linewidth": 2.0, "axes.grid": True, "grid.alpha": 0.25, "figure.dpi": 110}):
        fig = Figure(figsize=(width, height), layout="constrained")
        return fig, fig.subplots(rows, columns)


def plot_seeds(ax, x, values, label: str, color: str, **style) -> None:
    """Mean over seeds as a line, every seed as a thin line under it. values: [seed][x]; None (not measured) leaves a gap."""
    values = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    for row in values:
        ax.plot(x, row, color=color, alpha=0.25, linewidth=0.8)
    ax.plot(x, values.mean(0), color=color, label=label, **style)


def bar_seeds(ax, x: float, values, color: str, width: float = 0.8, label: str | None = None) -> None:
    """A bar at the mean over seeds, with every seed as a dot on it."""
    ax.bar(x, np.mean(values), width, color=color, alpha=0.55, label=label)
    ax.plot([x] * len(values), values, "o", color=color, markersize=4, markeredgecolor="white", markeredgewidth=0.5)


def save_figure(fig, path: Path) -> None:
    write_atomically(path, lambda temporary: fig.savefig(temporary, format="png", dpi=150, metadata={"Software": None}))
