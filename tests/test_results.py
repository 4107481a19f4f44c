"""What the ten scripts share: the command line, seeds in parallel, statistics worked out by hand, claims, and the files of a run."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from minilm import InputError, results
from minilm.data import generator
from minilm.results import (Outcome, bar_seeds, check, check_range, check_unused, claim, cli, collect, destination, mean_sd,
                            new_figure, paired_bootstrap, paired_diff, plot_seeds, print_claims, print_metrics, run_seeds, save_results,
                            wilson)


@dataclass(frozen=True)
class Config:
    seeds: tuple[int, ...] = (0, 1, 2)  # repetitions
    lr: float = 0.1  # learning rate, whose comment is its help
    quick: bool = False  # smoke run
    full: bool = False  # everything
    workers: int | None = None  # processes
    out: str | None = None  # folder


# --- command line

def command(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    cli(main, Config)


def show(cfg):
    print(cfg == Config(seeds=(5, 6), lr=3e-4, quick=True))


def test_flags_become_a_config_and_comments_become_the_help(monkeypatch, capsys):
    command(monkeypatch, show, "--lr", "3e-4", "--seeds", "5", "6", "--quick")
    assert capsys.readouterr().out == "True\n"
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, show, "--help")
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "whose comment is its help" in printed and "What the ten scripts share" in printed


def fail(cfg):
    raise {0.2: InputError("--lr 0.2: use a smaller\n  number"), 0.3: FileNotFoundError("data.txt: no such file"),
           0.4: KeyError("bug"), 0.5: FileExistsError(17, "File exists", "out"),
           0.6: PermissionError(13, "Permission denied", "out"),
           0.7: OSError(28, "No space left on device", "out/model.safetensors")}[cfg.lr]


@pytest.mark.parametrize("lr, line", [("0.2", "error: --lr 0.2: use a smaller number\n"), ("0.3", "error: data.txt: no such file\n"),
                                      ("0.5", "error: [Errno 17] File exists: 'out'\n"),
                                      ("0.6", "error: [Errno 13] Permission denied: 'out'\n"),
                                      ("0.7", "error: [Errno 28] No space left on device: 'out/model.safetensors'\n")])
def test_a_users_mistake_is_one_line_and_exit_status_2(monkeypatch, capsys, lr, line):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, fail, "--lr", lr)
    assert end.value.code == 2 and capsys.readouterr().err == line


def interrupted(cfg):
    raise KeyboardInterrupt("step 3 is saved") if cfg.quick else KeyboardInterrupt


@pytest.mark.parametrize("arguments, line", [([], "stopped: by Ctrl-C"), (["--quick"], "stopped: step 3 is saved")])
def test_ctrl_c_is_one_line_and_the_exit_status_that_shells_expect(monkeypatch, capsys, arguments, line):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, interrupted, *arguments)
    assert end.value.code == 130 and capsys.readouterr().err == f"\n{line}\n"


ECHO = """'''Repeats what it reads.'''
from dataclasses import dataclass
from minilm.results import cli

@dataclass(frozen=True)
class Config:
    quick: bool = False

def main(cfg):
    print("\\u4f60", input())

cli(main, Config)
"""


@pytest.mark.parametrize("encoding, shown", [("cp1252", "? caf\u00e9 \u0153"), ("utf-8", "\u4f60 caf\ufffd \ufffd")])
def test_a_terminal_of_another_encoding_gets_and_gives_replacements_and_ends_nothing(tmp_path, encoding, shown):
    (tmp_path / "echo.py").write_text(ECHO, encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    typed = "caf\u00e9 \u0153\n".encode("cp1252")  # the bytes of a terminal that knows no UTF-8
    done = subprocess.run([sys.executable, tmp_path / "echo.py"], input=typed, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).strip() == shown


def test_a_programmers_mistake_keeps_its_traceback(monkeypatch):
    with pytest.raises(KeyError):
        command(monkeypatch, fail, "--lr", "0.4")


@pytest.mark.parametrize("arguments", [["--lr", "abc"], ["--lrr", "1"], ["train"]])
def test_an_unknown_flag_or_a_wrong_type_is_a_message_and_exit_status_2(monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, show, *arguments)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and arguments[-1].strip("-") in printed and "Traceback" not in printed


# --- flags

@dataclass(frozen=True)
class Flags:
    steps: int = 10
    lr: float = 0.1
    top_p: float | None = None
    seeds: tuple[int, ...] = (0, 1)
    chat: bool = False


def test_a_number_in_its_range_passes_and_one_at_or_beyond_an_open_end_is_named_with_its_range():
    for good in (Flags(), Flags(steps=0, lr=1e-9, top_p=1.0, seeds=(0,))):
        check_range(good, "steps seeds", least=0)
        check_range(good, "lr", above=0)
        check_range(good, "top_p", above=0, most=1)
    for flags, limits, line in (
            ({"steps": -1}, {"least": 0}, "--steps -1: give a number of at least 0"),
            ({"lr": 0.0}, {"above": 0}, "--lr 0.0: give a number above 0"),
            ({"top_p": 1.5}, {"above": 0, "most": 1}, "--top-p 1.5: give a number above 0 and of at most 1"),
            ({"top_p": 1.0}, {"below": 1}, "--top-p 1.0: give a number below 1"),
            ({"lr": math.nan}, {}, "--lr nan: give a number that is finite"),
            ({"lr": math.inf}, {"least": 0}, "--lr inf: give a number of at least 0"),
            ({"seeds": (3, -4)}, {"least": 0}, "--seeds 3 -4: give a number of at least 0"),
            ({"seeds": ()}, {"least": 0}, "--seeds: give at least one number")):
        with pytest.raises(InputError) as error:
            check_range(Flags(**flags), *flags, **limits)
        assert str(error.value) == line


def test_a_flag_that_would_be_ignored_is_refused_only_where_it_was_given():
    check_unused(Flags(), "top_p chat", "here")
    with pytest.raises(InputError, match="^--chat has no effect here: leave it out$"):
        check_unused(Flags(chat=True), "top_p chat", "here")
    with pytest.raises(AttributeError):
        check_unused(Flags(), "top_pp", "here")  # a misspelt name is our own mistake
    with pytest.raises(InputError, match="^--top-p 0.5 has no effect at temperature 0"):
        check_unused(Flags(top_p=0.5), "top_p", "at temperature 0")


# --- seeds

def measure(cfg, seed):
    """A measurement whose last digits depend on the number of threads."""
    x = torch.randn(300, 300, generator=generator(seed, "x"))
    return Outcome({"arm": {"sum": float((x @ x).sum()), "threads": torch.get_num_threads()}},
                   {"arm": {"row": (range(3), x[0, :3].tolist())}})


def test_seeds_give_the_same_numbers_one_after_the_other_and_side_by_side():
    alone = run_seeds(measure, Config(), (3, 4, 5), workers=1)
    assert alone == run_seeds(measure, Config(), (3, 4, 5), workers=2)  # in the order of the seeds
    assert len({o.metrics["arm"]["sum"] for o in alone}) == 3 and {o.metrics["arm"]["threads"] for o in alone} == {1}


def fail_in_a_worker(cfg, seed):
    raise InputError(f"--lr {cfg.lr}: too small for seed {seed}")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mistake_found_in_a_worker_reaches_the_command_line_as_it_is(workers):
    with pytest.raises(InputError, match=r"^--lr 0.1: too small for seed 0$"):
        run_seeds(fail_in_a_worker, Config(), (0, 1), workers)


@pytest.mark.parametrize("seeds, workers", [((), None), ((1,), -1)])
def test_no_seed_or_no_worker_is_refused(seeds, workers):
    with pytest.raises(InputError, match="give at least one of each"):
        run_seeds(measure, None, seeds, workers)


def test_one_thread_is_used_and_the_callers_number_is_restored():
    torch.set_num_threads(2)
    try:
        assert run_seeds(measure, Config(), (0,))[0].metrics["arm"]["threads"] == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_collecting_by_hand():
    outcomes = [Outcome({"a": {"m": m}}, {"a": {"curve": ([0, 10], [m, 2 * m])}}) for m in (1, 2, 6)]
    metrics, series = collect(outcomes)
    assert metrics == {"a": {"m": {"mean": 3.0, "sd": pytest.approx(math.sqrt(7)), "values": [1, 2, 6]}}}  # (4 + 1 + 9) / 2 = 7
    assert series == {"a": {"curve": {"x": [0, 10], "values": [[1, 2], [2, 4], [6, 12]]}}}


# --- statistics

def test_mean_and_deviation_by_hand():
    assert mean_sd([2, 4]) == (3.0, pytest.approx(math.sqrt(2)))
    assert mean_sd([5]) == (5.0, 0.0)


def test_the_wilson_interval_by_hand():
    # 0 of n: from 0 to z^2 / (n + z^2); n of n is its mirror image; nothing seen says nothing
    assert wilson(0, 10) == pytest.approx((0, 1.96**2 / (10 + 1.96**2)))
    assert wilson(10, 10) == pytest.approx((1 - 0.27753, 1), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    for p in wilson(30, 100):  # its ends are where the distance to 0.3 is exactly z standard errors
        assert abs(0.3 - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 100))


def test_the_paired_difference_by_hand():
    # differences 1, 2, 3: mean 2, sd 1, two degrees of freedom: 4.303 / sqrt(3) = 2.484
    assert paired_diff([2, 4, 6], [1, 2, 3]) == pytest.approx((2, 2 - 2.4843, 2 + 2.4843), abs=1e-3)
    assert paired_diff([5], [3]) == (2.0, -math.inf, math.inf)
    assert paired_diff([1, 2], [1, 2]) == (0.0, 0.0, 0.0)


def test_the_t_interval_of_seeds_covers_the_truth_95_times_in_100():
    rng = np.random.default_rng(0)
    intervals = [paired_diff(rng.normal(1, 1, n), np.zeros(n))[1:] for n in (4, 31) for _ in range(1500)]
    assert np.mean([low < 1 < high for low, high in intervals]) == pytest.approx(0.95, abs=0.015)


def test_the_paired_bootstrap_agrees_with_the_normal_interval_and_repeats():
    rng = np.random.default_rng(1)
    a, b = rng.normal(1, 1, 400), rng.normal(0, 1, 400)
    mean, low, high = paired_bootstrap(a, b)
    half = 1.96 * (a - b).std() / 20
    assert mean == pytest.approx((a - b).mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.08 * half)
    assert (mean, low, high) == paired_bootstrap(a, b) != paired_bootstrap(a, b, seed=1)
    assert paired_bootstrap([1, 1, 0], [1, 1, 0], samples=100) == (0.0, 0.0, 0.0)


def test_as_many_resamplings_are_drawn_as_were_asked_for(monkeypatch):
    drawn, quantile = [], np.quantile
    monkeypatch.setattr(np, "quantile", lambda means, q: drawn.append(len(means)) or quantile(means, q))
    for samples in (3, 500, 700, 10_000):
        paired_bootstrap([1.0, 2, 3], [0.0, 1, 1], samples=samples)
    assert drawn == [3, 3, 500, 500, 700, 700, 10_000, 10_000]  # one quantile at each end


# --- claims

METRICS = {"method": {"acc": {"mean": 0.9, "sd": 0.01, "values": [0.89, 0.91]}},
           "base": {"acc": {"mean": 0.5, "sd": 0.0, "values": [0.5, 0.5]}}}


def verdict(arms, bound):
    a, b = arms
    return check(METRICS, "C1", "a is better", f"a > b + {bound}", {"acc": arms}, lambda mean: mean(a, "acc") > mean(b, "acc") + bound)



def test_a_claim_is_decided_by_its_rule_on_the_means_and_shows_what_was_measured():
    held, failed = verdict(["method", "base"], 0.3), verdict(["method", "base"], 0.5)
    assert held["holds"] is True and failed["holds"] is False
    assert held["measured"] == "acc: method 0.90 +/- 0.01, base 0.50 +/- 0.00"
    missing = verdict(["method", "other"], 0.0)
    assert missing["holds"] is None and missing["measured"] == "not in this run: other"
    assert claim("C2", "s", "r", "m", np.bool_(True))["holds"] is True  # numpy's truth has no JSON


def test_claims_and_metrics_are_printed_whole(capsys):
    print_claims([claim("C1", "it works " * 30, "r", "m", True), claim("C2", "s", "r", "m", False), claim("C3", "s", "r", "m", None)])
    print_metrics({**METRICS, "third": {}}, ["acc"])
    printed = capsys.readouterr().out
    assert "C1   holds" in printed and "C2   NOT REPRODUCED" in printed and "C3   not tested" in printed
    assert printed.count("works") == 30 and max(map(len, printed.splitlines())) <= 120
    assert printed.splitlines()[-3:] == ["method   0.90 +/- 0.01", "base     0.50 +/- 0.00", "third                -"]


# --- files

def test_only_the_default_run_and_the_full_run_write_to_results():
    place = lambda **change: destination("folder/name.py", Config(**change)).relative_to(results.ROOT).as_posix()
    assert place() == place(workers=1) == "results/name"
    assert place(full=True) == place(full=True, workers=2) == "results/name_full"
    assert place(lr=0.2) == place(quick=True) == place(full=True, lr=0.2) == place(seeds=(0,)) == "runs/name/name"
    assert destination("folder/name.py", Config(out="there", lr=0.2)) == Path("there/name")


def figure(saved):
    fig, (left, right) = new_figure(columns=2)
    plot_seeds(left, **saved["series"]["arm"]["row"], label="row", color=results.COLORS[0])
    bar_seeds(right, 0, saved["metrics"]["arm"]["sum"]["values"], results.COLORS[1])
    return fig


def test_a_run_leaves_one_json_with_everything_needed_and_one_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(results.ROOT / "methods" / "name.py"), "--checkpoint", "/somewhere/private/model"])
    outcomes = [Outcome({"arm": {"sum": np.float32(s), "bad": math.nan}}, {"arm": {"row": (np.arange(3), [s, None or 2.0, math.nan])}})
                for s in (1, 2)]
    cfg = Config(out=str(tmp_path / "new"), quick=True)
    claims = lambda metrics: [claim("C1", "s", "r", f"{metrics['arm']['sum']['mean']}", metrics["arm"]["sum"]["mean"] > 1)]
    returned = save_results(str(results.ROOT / "methods" / "name.py"), "a paper", cfg, outcomes, claims, figure, started=0.0, seeds=(7, 8))
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["name.json", "name.png"]  # no temporary file is left
    text = (tmp_path / "new" / "name.json").read_text(encoding="utf-8")
    saved = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert saved == returned
    assert list(saved) == ["script", "paper", "command", "config", "quick", "seeds", "metrics", "series", "claims", "wall_seconds",
                           "hardware", "versions", "commit"]
    assert saved["script"] == "methods/name.py" and saved["command"] == "python methods/name.py --checkpoint model"
    assert saved["quick"] is True and saved["seeds"] == [7, 8] and saved["config"]["lr"] == 0.1
    assert saved["metrics"]["arm"] == {"sum": {"mean": 1.5, "sd": pytest.approx(0.7071, abs=1e-4), "values": [1, 2]},
                                       "bad": {"mean": None, "sd": None, "values": [None, None]}}
    assert saved["series"]["arm"]["row"] == {"x": [0, 1, 2], "values": [[1, 2, None], [2, 2, None]]}  # not measured: a gap in the figure
    assert saved["claims"] == [{"id": "C1", "statement": "s", "paper": None, "rule": "r", "measured": "1.5", "holds": True}]
    assert set(saved["hardware"]) == {"cpu", "cores", "gpu", "threads"} and set(saved["versions"]) == {"python", "torch", "minilm"}
    assert (tmp_path / "new" / "name.png").read_bytes().startswith(b"\x89PNG")
    assert figure(saved) is not None  # it can be drawn again from the file alone
    assert "name.json and " in capsys.readouterr().out
