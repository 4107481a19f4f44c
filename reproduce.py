"""The committed default runs once more: does this machine give the numbers in results/?

    python reproduce.py                        # every default run, all its seeds (an hour or more)
    python reproduce.py --seed first           # the first seed of each: a quarter of the time
    python reproduce.py --only mdm moe_lpr     # some of them

An experiment runs as the command that its results file names, with `--out runs/reproduce/...`:
nothing in results/ is touched, one that fails stops no other, and what it prints goes to a log
beside its files. A run that this commit has finished is not run again, so after an interruption the
same command goes on; in an edited tree everything is run anew.

Compared are the metrics and curves of every seed that was run, timings excepted.

- On the kind of CPU and with the version of torch that the committed file names, every number must
  be the same to the last digit.
- Elsewhere sums are taken in another order, and training makes a last digit grow. There a number
  agrees when it is not further from the committed one than SPREADS standard deviations over the
  committed seeds (or SHARE of the largest value, where that is more), and AGREE of all numbers
  must. What was measured in one seed only has no spread, and is left aside.

A result marked stale is named and not run: the present code would not give it. Nor are the --full
and --more-seeds runs, what was run on real models and files, and the benchmark: the end says which.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tqdm import tqdm

from minilm import InputError
from minilm.claims import mean_sd
from minilm.results import ROOT, cli, commit, hardware, name_of

TIMINGS = ("time",)  # metrics that no two runs share
SPREADS = 4  # on another kind of CPU: so many standard deviations over the committed seeds,
SHARE = 0.02  # or this share of the metric's largest value,
AGREE = 0.95  # hold of this share of all numbers


@dataclass(frozen=True)
class Config:
    seed: Literal["all", "first"] = "all"  # all committed seeds of each experiment, or its first
    only: tuple[str, ...] = ()  # some of them, by the names of their results files (default: all)
    out: str | None = None  # folder for the runs in place of runs/reproduce


# --- what there is to reproduce


def committed(folder: Path) -> tuple[dict[str, dict], list[str]]:
    """The default runs in a folder of results, by name, and the names of all its other files."""
    defaults, others = {}, []
    for file in sorted(folder.glob("*.json")):
        saved = json.loads(file.read_text(encoding="utf-8"))
        real = "/real/" in saved.get("script", "")  # it has no default run
        if "metrics" in saved and name_of(saved["script"]) == file.stem and not real:
            defaults[file.stem] = saved
        else:
            others.append(file.stem)
    return defaults, others


def not_covered(others: list[str]) -> str:
    full = [name for name in others if name.endswith("_full")]
    seeds = [name for name in others if name.endswith("_seeds")]
    rest = [name for name in others if name not in full + seeds]
    kinds = {"--full": full, "--more-seeds": seeds, "real models and files, speed": rest}
    lines = [f"  {kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
    return "\n".join(["not covered (the commands stand in the files):", *lines])


# --- running


class Failed(Exception):
    """An experiment that ended with an error."""


def run_again(name: str, saved: dict, cfg: Config) -> dict:
    """The results of one experiment, run once more unless this commit has done so already."""
    seeds = saved["seeds"][:1] if cfg.seed == "first" else saved["seeds"]
    folder = Path(cfg.out or ROOT / "runs" / "reproduce") / cfg.seed
    file = folder / f"{name}.json"
    if not finished(file, seeds):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, ROOT / saved["script"], "--out", folder]
        if cfg.seed == "first":
            command += ["--seeds", str(seeds[0])]
        own_code = os.environ | {"PYTHONPATH": str(ROOT)}  # whatever else is installed
        log = folder / f"{name}.log"
        with log.open("w", encoding="utf-8") as printed:
            run = subprocess.run(command, env=own_code, stdout=printed, stderr=subprocess.STDOUT)
        if run.returncode:
            raise Failed(f"failed with exit status {run.returncode}; what it printed: {log}")
    again = json.loads(file.read_text(encoding="utf-8"))
    if again["seeds"] != seeds:
        raise Failed(f"ran seeds {again['seeds']}, committed are {seeds}: other defaults by now")
    return again


def finished(file: Path, seeds: list[int]) -> bool:
    """Whether this commit, unedited, has written that file already, of these seeds. (Outside a git
    checkout nobody knows.)"""
    if not file.exists():
        return False
    saved = json.loads(file.read_text(encoding="utf-8"))
    known = saved["commit"] is not None and not saved["commit"].endswith("+")
    return known and saved["commit"] == commit() and saved["seeds"] == seeds


# --- comparing


class Number(NamedTuple):
    where: str  # arm, metric, seed
    committed: float | None  # None: not measured
    again: float | None
    spread: float | None  # standard deviation over the committed seeds, if there are several
    largest: float  # size of the largest value over the committed seeds


def pairs(saved: dict, again: dict) -> Iterator[Number]:
    """Every number of the seeds that both runs have, timings left aside."""
    for arm, metrics in saved["metrics"].items():
        for metric, cell in metrics.items():
            if metric not in TIMINGS:
                other = again["metrics"].get(arm, {}).get(metric, {"values": []})
                yield from of_seeds(f"{arm}, {metric}", cell["values"], other["values"], again)
    for arm, curves in saved["series"].items():
        for name, curve in curves.items():
            other = again["series"].get(arm, {}).get(name, {"x": [], "values": []})
            for i, x in enumerate(curve["x"]):
                values = [at(i, seed) for seed in curve["values"]]
                others = [at(i, seed) for seed in other["values"]] if x in other["x"] else []
                yield from of_seeds(f"{arm}, {name} at {x}", values, others, again)


def at(i: int, values: list) -> float | None:
    return values[i] if i < len(values) else None  # a curve that only some seeds have


def of_seeds(where: str, values: list, others: list, again: dict) -> Iterator[Number]:
    """One metric of all seeds, seed by seed. The first seeds of both runs are the same."""
    known = [v for v in values if v is not None]
    spread = mean_sd(known)[1] if len(known) > 1 else None
    largest = max(map(abs, known), default=0.0)
    for i, seed in enumerate(again["seeds"]):
        other = others[i] if i < len(others) else math.nan  # the arm or metric is gone
        yield Number(f"{where}, seed {seed}", values[i], other, spread, largest)


def agrees(n: Number) -> bool:
    """Whether a number from another kind of CPU is as near as may be expected."""
    if n.committed is None or n.again is None:
        return n.committed == n.again
    return abs(n.again - n.committed) <= max(SPREADS * n.spread, SHARE * n.largest)


def same_machine(saved: dict, again: dict) -> bool:
    cpus = {run["hardware"]["cpu"] for run in (saved, again)}
    versions = {run["versions"]["torch"] for run in (saved, again)}
    return len(cpus) == len(versions) == 1


def compare(saved: dict, again: dict) -> tuple[bool, str]:
    """Whether a run gives the committed numbers, and that in words."""
    numbers = list(pairs(saved, again))
    exact = same_machine(saved, again)
    if not exact:
        numbers = [n for n in numbers if n.spread is not None]
    wrong = [n for n in numbers if not (n.committed == n.again if exact else agrees(n))]
    how = "the same to the last digit" if exact else "within the tolerance of another CPU or torch"
    words = f"{len(numbers) - len(wrong):,} of {len(numbers):,} numbers are {how}"
    if wrong:
        worst = max(wrong, key=distance)
        words += f"; furthest: {worst.where}: {worst.again}, committed {worst.committed}"
    if wrong and exact:  # (two kinds of CPU may go by one name)
        near = [n for n in numbers if n.spread is not None]
        words += f"; {sum(map(agrees, near)):,} of {len(near):,} within another CPU's tolerance"
    changed = changed_verdicts(saved, again)
    if changed:
        words += f"; other verdicts: {', '.join(changed)}"
    return len(wrong) <= (0 if exact else (1 - AGREE) * len(numbers)), words


def distance(n: Number) -> float:
    """How far a number is from the committed one, as a share of the metric's largest value."""
    missing = n.committed is None or n.again is None or math.isnan(n.again)
    return math.inf if missing else abs(n.again - n.committed) / (n.largest or 1.0)


def changed_verdicts(saved: dict, again: dict) -> list[str]:
    """The claims that come out otherwise (a claim on a timing may); of fewer seeds nothing is
    said."""
    if saved["seeds"] != again["seeds"]:
        return []
    now = {row["id"]: row["verdict"] for row in again["claims"]}
    return [row["id"] for row in saved["claims"] if row["verdict"] != now.get(row["id"])]


# --- all of it


def main(cfg: Config, results: Path = ROOT / "results") -> None:
    """Runs, compares and prints; exit status 1 if a run failed or gives other numbers."""
    started = time.time()
    defaults, others = committed(results)
    unknown = sorted(set(cfg.only) - set(defaults))
    if unknown:
        raise InputError(f"--only {' '.join(unknown)}: give some of {', '.join(defaults)}")
    asked = {name: run for name, run in defaults.items() if name in (cfg.only or defaults)}
    todo = {name: run for name, run in asked.items() if "stale" not in run}
    minutes = sum(run["wall_seconds"] for run in todo.values()) / 60
    print(f"{hardware()['cpu']}, {os.cpu_count()} cores; {len(todo)} experiments, which took "
          f"{minutes:.0f} minutes with all their seeds when they were committed")
    # a run with all its seeds uses every core; runs of one seed go side by side
    at_once = os.cpu_count() if cfg.seed == "first" else 1
    spent, all_agree = 0.0, True
    pool = ThreadPoolExecutor(at_once)
    try:
        jobs = {pool.submit(run_again, name, run, cfg): name for name, run in todo.items()}
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="experiments"):
            name = jobs[job]
            try:
                again = job.result()
                spent += again["wall_seconds"] / 60
                agree, words = compare(todo[name], again)
            except Failed as failure:
                agree, words = False, str(failure)
            all_agree = all_agree and agree
            tqdm.write(f"{'yes' if agree else 'NO':4}{name:28}{words}")
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C those that wait do not begin
    elapsed = (time.time() - started) / 60
    print(f"the runs took {spent:.1f} minutes in sum, all of this {elapsed:.1f}")
    stale = [name for name in asked if name not in todo]
    if stale:
        print(f"stale, not run: {', '.join(stale)}")
    print(not_covered(others))
    if not all_agree:
        sys.exit(1)


if __name__ == "__main__":
    cli(main, Config)
