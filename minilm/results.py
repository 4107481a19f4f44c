"""Runs and results: what the ten papers' experiments share. Command line, seeds, the JSON file, the
figure's style. What a run shows, and the intervals that it rests on: minilm/claims.py.

An experiment hands in `run(cfg, seed) -> Outcome`, `claims(metrics) -> list[dict]` and
`figure(results) -> Figure`, and keeps every loop."""

import dataclasses
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import tyro
from tqdm import tqdm

import minilm
from minilm import InputError
from minilm.claims import SMOKE, key, mean_sd, pm
from minilm.data import write_atomically, write_json
from minilm.training import is_chief, leave_world

CODE = Path(minilm.__file__).resolve().parents[1]
# A checkout keeps its results; installed without one, runs go where they were started.
ROOT = CODE if (CODE / "pyproject.toml").exists() else Path.cwd()
COLORS = (  # Okabe & Ito: safe for the colour-blind
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999",
)  # fmt: skip


def cli(main: Callable, Config: type) -> None:
    """Builds a Config from the command line (each field's trailing comment is its --help) and calls
    main(cfg). A user's mistake (InputError) and what the machine refuses (OSError: no such file,
    disk full) are one line on stderr and exit status 2, Ctrl-C is one line and 130; any other
    exception keeps its traceback. A character that the terminal cannot show, or a byte from it that
    is no text, becomes a replacement character instead of ending the program.

    Of several processes (torchrun) the first speaks. What goes wrong in one of them ends all, with
    its message alone (see `_end`)."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # not what a test or a notebook puts in its place
            stream.reconfigure(errors="replace")
    if RANK > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    doc = sys.modules[main.__module__].__doc__
    paragraphs = re.sub(r"\n(?=[A-Z]\w+ {2,})", "\n\n", doc)  # --help keeps Found, Run, Try apart
    try:
        cfg = tyro.cli(Config, description=paragraphs)
    except SystemExit as refusal:  # (or --help)
        _end("", refusal.code)
    try:
        main(cfg)
        leave_world()
    except (InputError, OSError) as error:
        _end(f"error: {' '.join(str(error).split())}", 2)
    except torch.OutOfMemoryError as error:
        _end(f"error: {str(error).split('. ')[0]}: give a smaller --micro-batch, "
             "--activation-checkpointing or, with torchrun, --fsdp", 2)
    except KeyboardInterrupt as stop:
        # 130: what shells expect of a program ended by Ctrl-C
        _end(f"\nstopped: {str(stop) or 'by Ctrl-C'}", 130)
    except Exception:
        if PROCESSES == 1:
            raise
        time.sleep(PATIENCE)  # a process that loses another one fails, too: the other one speaks
        _end(traceback.format_exc(), 1)


RANK, PROCESSES = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
PATIENCE = 5  # seconds, in which torchrun ends all processes after one of them has ended


def _end(words: str, status: int) -> NoReturn:
    """The last words on stderr, and the exit status. Of several processes the first says at once
    what is wrong with all of them (a flag, a file), and torchrun ends the others while they wait;
    one that lives on after that has a trouble of its own to tell."""
    if RANK > 0:
        time.sleep(PATIENCE)
        words = f"{words} (process {RANK})"
    if words:
        print(words, file=sys.__stderr__ if RANK > 0 else sys.stderr, flush=True)
    if PROCESSES > 1:
        os._exit(status)  # without waiting for anybody
    sys.exit(status)


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


def check_arms(cfg, name: str, known: Iterable[str]) -> None:
    """Of an experiment: refuses arms (the flag `name`) that it does not have, a run of none, and
    two runs at once. Arms that were not given (None) are the run's own."""
    given = getattr(cfg, name)
    wrong = sorted(set(given or ()) - set(known))
    if wrong:
        raise InputError(
            f"--{name} {' '.join(wrong)} is not known; give some of {', '.join(known)}"
        )
    if given is not None and not given:
        raise InputError(f"--{name}: give at least one of {', '.join(known)}")
    if all(getattr(cfg, run, False) for run in RUNS):
        raise InputError("--full and --more-seeds are two runs: give one of them")


def check_width(cfg) -> None:
    """Of an experiment whose models have four heads: their width must be even."""
    if cfg.width < 16 or cfg.width % 8:
        raise InputError(f"--width {cfg.width}: give a multiple of 8, at least 16: 4 even heads")


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
    words = [f"--{name.replace('_', '-')}"]
    if isinstance(value, (tuple, list)):
        words += map(str, value)
    elif value is not True:
        words.append(str(value))
    return " ".join(words)


# --- seeds

class Outcome(NamedTuple):
    """What one seed measured. The names of arms and metrics are strings or tuples of parts, which
    `claims.key` makes into strings when they are written: ("acc", "a") becomes "acc a"."""

    metrics: dict[str | tuple, dict[str | tuple, float]]  # arm -> metric -> value
    series: dict[str | tuple, dict[str | tuple, tuple[Sequence, Sequence]]]  # arm -> name -> (x,
    # values); x must be the same for every seed


def run_seeds(run: Callable, cfg, seeds: Sequence[int], workers: int | None = None) -> list:
    """[run(cfg, seed) for seed in seeds], each an Outcome from a process of its own with a thread,
    `workers` (default: one per core) at a time; under torchrun in this one, one after the other.
    One thread also when nothing runs beside it: the number of threads changes the order of sums,
    and with it the last digits."""
    if not seeds or (workers or 1) < 1:
        raise InputError(f"--seeds {list(seeds)}, --workers {workers}: give at least one of each")
    workers = min(workers or os.cpu_count() or 1, len(seeds))
    if PROCESSES > 1:  # torchrun has started them: they train each seed's model together
        workers = 1
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
    row = {"position": _bar_row, "leave": False, "dynamic_ncols": True}
    return tqdm(iterable, desc=desc, total=total, **row)


def collect(outcomes: Sequence[Outcome]) -> tuple[dict, dict]:
    """Outcomes of all seeds -> metrics {arm: {metric: {"mean", "sd", "values"}}} and series
    {arm: {name: {"x", "values"}}}. A single seed has no deviation (nan)."""
    metrics, series = {}, {}
    for arm, names in outcomes[0].metrics.items():
        metrics[key(arm)] = {}
        for name in names:
            values = [float(o.metrics[arm][name]) for o in outcomes]
            mean, sd = mean_sd(values)
            metrics[key(arm)][key(name)] = {"mean": mean, "sd": sd, "values": values}
    for arm, names in outcomes[0].series.items():
        series[key(arm)] = {}
        for name, (x, _) in names.items():
            values = [list(map(float, o.series[arm][name][1])) for o in outcomes]
            series[key(arm)][key(name)] = {"x": list(x), "values": values}
    return metrics, series


# --- files

def print_metrics(metrics: dict, columns: Sequence[str], digits: int = 2) -> None:
    """One row per arm, "mean +/- sd" per column; a dash where the arm has no such metric."""
    table = [["", *columns]]
    for arm, row in metrics.items():
        table.append([arm, *(pm(row[c], digits) if c in row else "-" for c in columns)])
    first, *others = (max(map(len, column)) for column in zip(*table))
    print()
    for arm, *cells in table:
        shown = [cell.rjust(width + 3) for cell, width in zip(cells, others)]
        print(arm.ljust(first) + "".join(shown))


NEUTRAL = ("workers", "device", "out")  # fields that change no number
RUNS = {"full": "full", "more_seeds": "seeds"}  # flag -> ending of the file that its run writes


def name_of(script: str) -> str:
    """What a script's files are called: its own name, less _experiment (in methods/real/:
    NAME_real)."""
    name = Path(script).stem.removesuffix("_experiment")
    return f"{name}_real" if Path(script).parent.name == "real" else name


def destination(script: str, cfg) -> Path:
    """Where a run's files go, without their endings: `results/NAME` for the default Config,
    `results/NAME_full` for `--full` alone, `results/NAME_seeds` for `--more-seeds` alone, else
    `runs/NAME/NAME`. NAME is that of `name_of`."""
    name = name_of(script)
    if getattr(cfg, "out", None):
        return Path(cfg.out) / name
    default = type(cfg)()
    neutral = {k: v for k, v in dataclasses.asdict(default).items() if k in NEUTRAL}
    asked = dataclasses.replace(cfg, **neutral)
    if asked == default:
        return ROOT / "results" / name
    for flag, ending in RUNS.items():
        if hasattr(cfg, flag) and asked == dataclasses.replace(default, **{flag: True}):
            return ROOT / "results" / f"{name}_{ending}"
    return ROOT / "runs" / name / name


def save_results(
    script: str,
    paper: str,
    cfg,
    outcomes: Sequence[Outcome],
    claims: Callable,
    figure: Callable,
    started: float,
    seeds: Sequence[int] | None = None,
    path: Path | None = None,
    depends: dict | None = None,
) -> dict:
    """Collects the outcomes, computes the claims, writes PATH.json and PATH.png, prints where;
    returns the results dictionary. `started` is time.time() at the start of the run;
    `claims(metrics)` and `figure(results)` are the experiment's pure functions; `depends` is what
    the numbers rest on (see `fingerprints`), of the first seed."""
    path = path or destination(script, cfg)
    metrics, series = collect(outcomes)
    rows = claims(metrics)
    quick = bool(getattr(cfg, "quick", False))
    if quick:  # numbers of an untrained model: no verdict
        rows = [row | {"verdict": SMOKE} for row in rows]
    file = Path(script).resolve()
    inside = file.is_relative_to(CODE)
    results = {
        "script": str(file.relative_to(CODE)) if inside else file.name,
        "paper": paper,
        "command": shlex.join(["python", *_relative_argv()]),
        "config": dataclasses.asdict(cfg),
        "quick": quick,
        "seeds": list(seeds if seeds is not None else cfg.seeds),
        "metrics": metrics,
        "series": series,
        "claims": rows,
        "depends": fingerprints(depends or {}),
        "wall_seconds": round(time.time() - started, 1),
        "hardware": hardware(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "minilm": minilm.__version__,
        },
        "commit": commit(),
    }
    results = _plain(results)
    if not is_chief():
        return results
    write_json(path.with_suffix(".json"), results)
    save_figure(figure(results), path.with_suffix(".png"))
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    print(f"\nwrote {shown}.json and {shown}.png after {results['wall_seconds']:.0f} s")
    return results


def fingerprints(depends: dict) -> dict:
    """What a result rests on, small enough to be stored: of a model a few of its weights, of
    anything else (documents, an exam) a hash of how it is written.

        fingerprints({"text": documents[:200], "exam": questions, "weights": untrained_model})

    A test makes them anew and compares (`same_fingerprints`): a change that moves a stream of
    random numbers names the results that it makes stale."""
    found = {}
    for name, value in depends.items():
        if isinstance(value, torch.nn.Module):
            tensors = [p.detach().flatten() for p in value.parameters()]
            found[name] = [float(p[at]) for p in (tensors[0], tensors[-1]) for at in (0, 1, -1)]
        else:
            written = json.dumps(_plain(value)).encode()
            found[name] = hashlib.sha256(written).hexdigest()[:16]
    return found


def same_fingerprints(saved: dict, now: dict) -> bool:
    """Hashes are equal, weights equal to 1e-5 (kinds of CPU differ in the last bits)."""

    def same(a, b):
        return a == b if isinstance(a, str) else np.allclose(a, b, rtol=1e-5, atol=1e-5)

    return saved.keys() == now.keys() and all(same(saved[name], now[name]) for name in saved)


def _relative_argv() -> list[str]:
    """The command line without this machine's folders, also in --flag=PATH."""

    def shown(path: str) -> str:
        full = Path(path).resolve()
        inside = str(full.relative_to(ROOT)) if full.is_relative_to(ROOT) else full.name
        return inside if Path(path).is_absolute() else path

    words = []
    for word in sys.argv:
        parts = word.split("=", 1) if word.startswith("--") else [word]
        words.append("=".join(map(shown, parts)))
    return words


def _plain(x):
    """Values that JSON has: lists of tuples, Python's numbers of numpy's, None of NaN, infinity."""
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
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "threads": 1}


def commit() -> str | None:
    """The repository's commit, with "+" when tracked files differ from it; None outside a git
    checkout."""

    def git(*args):
        run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# --- figures

def new_figure(rows: int = 1, columns: int = 1, width: float = 11.0, height: float = 3.8):
    """A figure in the house style, readable when shown 800 pixels wide -> (figure, axes as
    plt.subplots returns them)."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "font.size": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 13,
        "legend.frameon": False,
        "legend.fontsize": 10.5,
        "lines.linewidth": 2.0,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "figure.dpi": 110,
    }
    with rc_context(style):
        fig = Figure(figsize=(width, height), layout="constrained")
        return fig, fig.subplots(rows, columns)


def plot_seeds(ax, x, values, label: str, color: str, **style) -> None:
    """Mean over seeds as a line, every seed as a thin line under it. values: [seed][x]; None (not
    measured) leaves a gap."""
    values = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    for row in values:
        ax.plot(x, row, color=color, alpha=0.25, linewidth=0.8)
    ax.plot(x, values.mean(0), color=color, label=label, **style)


def bar_seeds(ax, x: float, values, color: str, width: float = 0.8, label=None) -> None:
    """A bar at the mean over seeds, with every seed as a dot on it."""
    ax.bar(x, np.mean(values), width, color=color, alpha=0.55, label=label)
    dots = {"markersize": 4, "markeredgecolor": "white", "markeredgewidth": 0.5}
    ax.plot([x] * len(values), values, "o", color=color, **dots)


def save_figure(fig, path: Path) -> None:
    def write(temporary: Path) -> None:
        fig.savefig(temporary, format="png", dpi=150, metadata={"Software": None})

    write_atomically(path, write)
