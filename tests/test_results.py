"""What the ten experiments share: the command line, seeds in parallel, and the files of a run."""

import io
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
from minilm.claims import HOLDS
from minilm.results import (
    Outcome,
    bar_seeds,
    check_arms,
    check_range,
    check_unused,
    check_width,
    cli,
    collect,
    destination,
    fingerprints,
    new_figure,
    plot_seeds,
    print_metrics,
    run_seeds,
    same_fingerprints,
    save_results,
)


@dataclass(frozen=True)
class Config:
    seeds: tuple[int, ...] = (0, 1, 2)  # repetitions
    lr: float = 0.1  # learning rate, whose comment is its help
    quick: bool = False  # smoke run
    full: bool = False  # everything
    more_seeds: bool = False  # eight seeds of a few arms
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
    assert (
        end.value.code == 0
        and "whose comment is its help" in printed
        and "What the ten experiments share" in printed
    )


def fail(cfg):
    raise {
        0.2: InputError("--lr 0.2: use a smaller\n  number"),
        0.3: FileNotFoundError("data.txt: no such file"),
        0.4: KeyError("bug"),
        0.5: FileExistsError(17, "File exists", "out"),
        0.6: PermissionError(13, "Permission denied", "out"),
        0.7: OSError(28, "No space left on device", "out/model.safetensors"),
    }[cfg.lr]


@pytest.mark.parametrize(
    "lr, line",
    [
        ("0.2", "error: --lr 0.2: use a smaller number\n"),
        ("0.3", "error: data.txt: no such file\n"),
        ("0.5", "error: [Errno 17] File exists: 'out'\n"),
        ("0.6", "error: [Errno 13] Permission denied: 'out'\n"),
        ("0.7", "error: [Errno 28] No space left on device: 'out/model.safetensors'\n"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_status_2(monkeypatch, capsys, lr, line):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, fail, "--lr", lr)
    assert end.value.code == 2 and capsys.readouterr().err == line


def interrupted(cfg):
    raise KeyboardInterrupt("step 3 is saved") if cfg.quick else KeyboardInterrupt


@pytest.mark.parametrize(
    "arguments, line", [([], "stopped: by Ctrl-C"), (["--quick"], "stopped: step 3 is saved")]
)
def test_ctrl_c_is_one_line_and_the_exit_status_that_shells_expect(
    monkeypatch, capsys, arguments, line
):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, interrupted, *arguments)
    assert end.value.code == 130 and capsys.readouterr().err == f"\n{line}\n"


def broken_link(cfg):
    raise RuntimeError("Connection closed by peer")


class Ended(Exception):
    """In place of the end of a process."""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("main, status", [(fail, 2), (interrupted, 130), (broken_link, 1)])
def test_of_several_processes_the_first_speaks_at_once_and_one_that_lives_on_says_who_it_is(
    monkeypatch, capsys, rank, main, status
):
    """All wait but the first with a mistake of the user's, which all of them meet; and it waits,
    too, with what is likely to come of another one's end. torchrun ends those who wait."""
    said, waits = io.StringIO(), []

    def end(status):
        raise Ended(status)

    monkeypatch.setattr(results, "RANK", rank)
    monkeypatch.setattr(results, "PROCESSES", 2)
    monkeypatch.setattr(results.os, "_exit", end)
    monkeypatch.setattr(results.time, "sleep", waits.append)
    for stream in ("stdout", "stderr", "__stderr__"):  # (the second process closes two of them)
        monkeypatch.setattr(sys, stream, said)
    with pytest.raises(Ended, match=str(status)):
        command(monkeypatch, main, "--lr", "0.3")
    at_once = rank == 0 and main is not broken_link
    assert at_once == (waits == [])
    words = {2: "error: data.txt: no such file", 130: "stopped: by Ctrl-C", 1: "closed by peer"}
    assert words[status] in said.getvalue()
    assert said.getvalue().endswith("(process 1)\n") == (rank == 1)


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


@pytest.mark.parametrize(
    "encoding, shown", [("cp1252", "? caf\u00e9 \u0153"), ("utf-8", "\u4f60 caf\ufffd \ufffd")]
)
def test_a_terminal_of_another_encoding_gets_and_gives_replacements_and_ends_nothing(
    tmp_path, encoding, shown
):
    (tmp_path / "echo.py").write_text(ECHO, encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONIOENCODING": encoding,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    typed = "caf\u00e9 \u0153\n".encode("cp1252")  # the bytes of a terminal that knows no UTF-8
    done = subprocess.run(
        [sys.executable, tmp_path / "echo.py"], input=typed, capture_output=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).strip() == shown


def test_a_programmers_mistake_keeps_its_traceback(monkeypatch):
    with pytest.raises(KeyError):
        command(monkeypatch, fail, "--lr", "0.4")


@pytest.mark.parametrize("arguments", [["--lr", "abc"], ["--lrr", "1"], ["train"]])
def test_an_unknown_flag_or_a_wrong_type_is_a_message_and_exit_status_2(
    monkeypatch, capsys, arguments
):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, show, *arguments)
    printed = capsys.readouterr().err
    assert (
        end.value.code == 2 and arguments[-1].strip("-") in printed and "Traceback" not in printed
    )


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
        (
            {"top_p": 1.5},
            {"above": 0, "most": 1},
            "--top-p 1.5: give a number above 0 and of at most 1",
        ),
        ({"top_p": 1.0}, {"below": 1}, "--top-p 1.0: give a number below 1"),
        ({"lr": math.nan}, {}, "--lr nan: give a number that is finite"),
        ({"lr": math.inf}, {"least": 0}, "--lr inf: give a number of at least 0"),
        ({"seeds": (3, -4)}, {"least": 0}, "--seeds 3 -4: give a number of at least 0"),
        ({"seeds": ()}, {"least": 0}, "--seeds: give at least one number"),
    ):
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


@dataclass(frozen=True)
class Experiment:
    methods: tuple[str, ...] | None = ("lpr",)
    width: int = 64
    full: bool = False
    more_seeds: bool = False


def test_an_experiment_runs_arms_that_it_has_at_least_one_of_them_and_one_run_at_a_time():
    known = {"lpr": 1, "stage 1": 2}
    for good in (Experiment(), Experiment(methods=None, full=True), Experiment(more_seeds=True)):
        check_arms(good, "methods", known)
    check_arms(Flags(), "seeds", (0, 1, 2))  # an experiment without --full and --more-seeds
    for flags, line in (
        ({"methods": ("lpr", "lprr", "a")}, "--methods a lprr is not known; give some of lpr, st"),
        ({"methods": ()}, "--methods: give at least one of lpr, stage 1"),
        ({"full": True, "more_seeds": True}, "--full and --more-seeds are two runs: give one"),
    ):
        with pytest.raises(InputError) as error:
            check_arms(Experiment(**flags), "methods", known)
        assert str(error.value).startswith(line)


def test_a_width_that_four_even_heads_cannot_share_is_refused():
    check_width(Experiment(width=24))
    for width in (8, 20, 0):
        with pytest.raises(InputError, match=f"^--width {width}: give a multiple of 8, at least"):
            check_width(Experiment(width=width))


# --- seeds

def measure(cfg, seed):
    """A measurement whose last digits depend on the number of threads."""
    x = torch.randn(300, 300, generator=generator(seed, "x"))
    return Outcome({"arm": {"sum": float((x @ x).sum()), "threads": torch.get_num_threads()}},
                   {"arm": {"row": (range(3), x[0, :3].tolist())}})


def test_seeds_give_the_same_numbers_one_after_the_other_and_side_by_side():
    alone = run_seeds(measure, Config(), (3, 4, 5), workers=1)
    assert alone == run_seeds(measure, Config(), (3, 4, 5), workers=2)  # in the order of the seeds
    assert len({o.metrics["arm"]["sum"] for o in alone}) == 3 and {
        o.metrics["arm"]["threads"] for o in alone
    } == {1}


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
    outcomes = [
        Outcome({"a": {"m": m}}, {"a": {"curve": ([0, 10], [m, 2 * m])}}) for m in (1, 2, 6)
    ]
    metrics, series = collect(outcomes)
    # (4 + 1 + 9) / 2 = 7
    assert metrics == {
        "a": {"m": {"mean": 3.0, "sd": pytest.approx(math.sqrt(7)), "values": [1, 2, 6]}}
    }
    assert series == {"a": {"curve": {"x": [0, 10], "values": [[1, 2], [2, 4], [6, 12]]}}}


def test_one_seed_has_no_deviation():
    metrics, _ = collect([Outcome({"a": {"m": 3}}, {})])
    assert metrics["a"]["m"]["mean"] == 3 and math.isnan(metrics["a"]["m"]["sd"])


def test_names_given_in_parts_are_composed_when_they_are_written():
    metrics, series = collect(
        [Outcome({("sl", 3): {("acc", "a"): 1}}, {("sl", 3): {"x": ([0], [1])}})]
    )
    assert list(metrics) == list(series) == ["sl 3"] and list(metrics["sl 3"]) == ["acc a"]


METRICS = {"method": {"acc": {"mean": 0.9, "sd": 0.01, "values": [0.89, 0.91]}},
           "base": {"acc": {"mean": 0.5, "sd": 0.0, "values": [0.5, 0.5]}}}


def test_metrics_are_printed_whole(capsys):
    print_metrics({**METRICS, "third": {}}, ["acc"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "method   0.90 +/- 0.01",
        "base     0.50 +/- 0.00",
        "third                -",
    ]


# --- files

def test_only_the_default_the_full_and_the_more_seeds_run_write_to_results():
    place = lambda **change: (
        destination("folder/name.py", Config(**change)).relative_to(results.ROOT).as_posix()
    )
    assert place() == place(workers=1) == "results/name"
    assert place(full=True) == place(full=True, workers=2) == "results/name_full"
    assert place(more_seeds=True) == "results/name_seeds"
    assert place(full=True, more_seeds=True) == "runs/name/name"
    assert (
        place(lr=0.2)
        == place(quick=True)
        == place(full=True, lr=0.2)
        == place(seeds=(0,))
        == "runs/name/name"
    )
    assert destination("folder/name.py", Config(out="there", lr=0.2)) == Path("there/name")


def figure(saved):
    fig, (left, right) = new_figure(columns=2)
    plot_seeds(left, **saved["series"]["arm"]["row"], label="row", color=results.COLORS[0])
    bar_seeds(right, 0, saved["metrics"]["arm"]["sum"]["values"], results.COLORS[1])
    return fig


def claim_on(measured) -> dict:
    return {
        "id": "C1",
        "statement": "s",
        "paper": None,
        "rule": "r",
        "measured": f"{measured}",
        "verdict": HOLDS,
    }


def test_a_run_leaves_one_json_with_everything_needed_and_one_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        [str(results.ROOT / "methods" / "name.py"), "--checkpoint", "/somewhere/private/model"],
    )
    outcomes = [
        Outcome(
            {"arm": {"sum": np.float32(s), "bad": math.nan}},
            {"arm": {"row": (np.arange(3), [s, None or 2.0, math.nan])}},
        )
        for s in (1, 2)
    ]
    cfg = Config(out=str(tmp_path / "new"), quick=True)
    claims = lambda metrics: [claim_on(metrics["arm"]["sum"]["mean"])]
    returned = save_results(
        str(results.ROOT / "methods" / "name.py"),
        "a paper",
        cfg,
        outcomes,
        claims,
        figure,
        started=0.0,
        seeds=(7, 8),
        depends={"text": [[1, 2], [3]]},
    )
    # no temporary file is left
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "name.json",
        "name.png",
    ]
    text = (tmp_path / "new" / "name.json").read_text(encoding="utf-8")
    saved = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert saved == returned
    assert list(saved) == [
        "script",
        "paper",
        "command",
        "config",
        "quick",
        "seeds",
        "metrics",
        "series",
        "claims",
        "depends",
        "wall_seconds",
        "hardware",
        "versions",
        "commit",
    ]
    assert (
        saved["script"] == "methods/name.py"
        and saved["command"] == "python methods/name.py --checkpoint model"
    )
    assert saved["quick"] is True and saved["seeds"] == [7, 8] and saved["config"]["lr"] == 0.1
    assert saved["metrics"]["arm"] == {
        "sum": {"mean": 1.5, "sd": pytest.approx(0.7071, abs=1e-4), "values": [1, 2]},
        "bad": {"mean": None, "sd": None, "values": [None, None]},
    }
    # not measured: a gap in the figure
    assert saved["series"]["arm"]["row"] == {
        "x": [0, 1, 2],
        "values": [[1, 2, None], [2, 2, None]],
    }
    assert saved["claims"] == [claim_on(1.5) | {"verdict": "smoke run"}]
    assert saved["depends"] == fingerprints({"text": [(1, 2), (3,)]})
    assert set(saved["hardware"]) == {"cpu", "cores", "gpu", "threads"} and set(
        saved["versions"]
    ) == {"python", "torch", "minilm"}
    assert (tmp_path / "new" / "name.png").read_bytes().startswith(b"\x89PNG")
    assert figure(saved) is not None  # it can be drawn again from the file alone
    assert "name.json and " in capsys.readouterr().out


def test_a_fingerprint_changes_with_one_token_and_with_one_weight_but_not_with_its_last_bits():
    def of(text, shift=0.0):
        model = torch.nn.Linear(3, 3)
        with torch.no_grad():
            model.weight.copy_(torch.arange(9.0).view(3, 3) + shift)
            model.bias.zero_()
        return fingerprints({"text": text, "weights": model})

    saved = json.loads(json.dumps(of([[1, 2], [3]])))
    assert saved["weights"] == [0, 1, 8, 0, 0, 0]
    assert same_fingerprints(saved, of([(1, 2), (3,)], shift=1e-6))
    assert not same_fingerprints(saved, of([[1, 2], [4]]))
    assert not same_fingerprints(saved, of([[1, 2], [3]], shift=1e-3))
    assert not same_fingerprints({}, saved)


def test_a_smoke_run_gives_numbers_and_no_verdict(tmp_path):
    def claims(metrics):
        return [claim_on(1.5)]

    for quick, verdict in ((True, "smoke run"), (False, "holds")):
        cfg = Config(out=str(tmp_path), quick=quick)
        outcome = Outcome({"arm": {"sum": 1.0}}, {"arm": {"row": (range(3), [1, 2, 3])}})
        row = save_results("name.py", "a paper", cfg, [outcome], claims, figure, 0.0)["claims"][0]
        assert row["verdict"] == verdict and row["measured"] == "1.5"
