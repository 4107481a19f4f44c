"""`make reproduce`: the committed default runs once more, and what counts as the same number."""

import copy
import importlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tyro

import reproduce
from minilm import InputError
from minilm.data import write_json
from minilm.results import ROOT
from reproduce import Config, Number, agrees, compare, main, pairs

DEFAULTS, OTHERS = reproduce.committed(ROOT / "results")

TINY = '''"""An experiment that takes no time: what it measures is 1 / (1 + its seed)."""
import json, sys
from pathlib import Path

out = Path(sys.argv[sys.argv.index("--out") + 1])
seeds = [50, 51]
if "--seeds" in sys.argv:
    seeds = [int(word) for word in sys.argv[sys.argv.index("--seeds") + 1 :]]
if 13 in seeds:
    sys.exit("thirteen brings bad luck")
ran = out / "how often.txt"
ran.write_text(ran.read_text() + "." if ran.exists() else ".")
saved = json.loads((Path(__file__).parent / "results" / f"{Path(__file__).stem}.json").read_text())
values = [1 / (1 + seed) for seed in seeds]
saved["seeds"] = seeds
saved["metrics"] = {"arm": {"acc": {"values": values}, "time": {"values": [7.0] * len(seeds)}}}
saved["series"] = {"arm": {"loss": {"x": [0, 100], "values": [[v, v / 2] for v in values]}}}
(out / f"{Path(__file__).stem}.json").write_text(json.dumps(saved))
'''


def saved_run(script: Path, seeds=(50, 51)) -> dict:
    """What TINY gives, as a committed file."""
    values = [1 / (1 + seed) for seed in seeds]
    return {
        "script": str(script),
        "seeds": list(seeds),
        "metrics": {"arm": {"acc": {"values": values}, "time": {"values": [1.0] * len(seeds)}}},
        "series": {"arm": {"loss": {"x": [0, 100], "values": [[v, v / 2] for v in values]}}},
        "claims": [{"id": "C1", "verdict": "holds"}],
        "wall_seconds": 60.0,
        "hardware": {"cpu": "one kind"},
        "versions": {"torch": "2"},
        "commit": "abc",
    }


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder with two tiny experiments, `a` and `b`, and their committed results."""
    monkeypatch.setattr(reproduce, "commit", lambda: "abc")
    for name in "ab":
        script = tmp_path / f"{name}.py"
        script.write_text(TINY)
        write_json(tmp_path / "results" / f"{name}.json", saved_run(script))
    return tmp_path


def change(tree, name, **fields):
    file = tree / "results" / f"{name}.json"
    write_json(file, json.loads(file.read_text()) | fields)


def reproduced(tree, capsys, **config) -> tuple[int, str]:
    """Exit status, and what was printed."""
    status = 0
    try:
        main(Config(out=str(tree / "runs"), **config), tree / "results")
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out


# --- the whole command


@pytest.mark.parametrize("seed, numbers", [("all", 6), ("first", 3)])
def test_every_number_of_the_seeds_that_were_run_is_compared_and_timings_are_not(
    tree, capsys, seed, numbers
):
    status, printed = reproduced(tree, capsys, seed=seed)
    assert status == 0
    # of a seed: one metric and two points of a curve; "time" is 7 here and 1 in the file
    assert printed.count(f"{numbers} of {numbers} numbers are the same to the last digit") == 2
    assert "the runs took 2.0 minutes in sum" in printed


def test_one_number_that_differs_in_its_last_digit_is_found_and_named(tree, capsys):
    run = saved_run(tree / "b.py")
    run["metrics"]["arm"]["acc"]["values"][1] += 1e-15
    change(tree, "b", metrics=run["metrics"])
    status, printed = reproduced(tree, capsys)
    assert status == 1 and "5 of 6 numbers" in printed and "arm, acc, seed 51" in printed
    assert "yes a" in printed and "NO  b" in printed
    assert "6 of 6 within another CPU's tolerance" in printed  # two machines of one name?
    assert reproduced(tree, capsys, seed="first")[0] == 0  # seed 50 is as it was


def test_an_experiment_that_fails_stops_no_other_and_its_log_is_named(tree, capsys):
    change(tree, "a", seeds=[13, 14])
    status, printed = reproduced(tree, capsys, seed="first")
    assert status == 1 and "failed with exit status 1" in printed and "yes b" in printed
    assert "thirteen" in (tree / "runs" / "first" / "a.log").read_text()


def test_a_run_of_other_seeds_than_the_committed_ones_is_no_reproduction(tree, capsys):
    change(tree, "a", seeds=[60, 61])
    status, printed = reproduced(tree, capsys)
    assert status == 1 and "ran seeds [50, 51], committed are [60, 61]" in printed


def test_what_this_commit_has_run_is_not_run_again_and_in_an_edited_tree_it_is(
    tree, capsys, monkeypatch
):
    count = tree / "runs" / "all" / "how often.txt"
    reproduced(tree, capsys, only=("a",))
    reproduced(tree, capsys, only=("a",))
    assert count.read_text() == "."
    for other in ("def", "abc+"):
        monkeypatch.setattr(reproduce, "commit", lambda other=other: other)
        change(tree, "a", commit=other)
        reproduced(tree, capsys, only=("a",))
        reproduced(tree, capsys, only=("a",))
    assert count.read_text() == "." + "." + ".."


def test_outside_a_git_checkout_nobody_knows_which_code_has_run_so_everything_is_run(
    tree, capsys, monkeypatch
):
    monkeypatch.setattr(reproduce, "commit", lambda: None)
    change(tree, "a", commit=None)
    reproduced(tree, capsys, only=("a",))
    reproduced(tree, capsys, only=("a",))
    assert (tree / "runs" / "all" / "how often.txt").read_text() == ".."


def test_ctrl_c_starts_no_further_experiment(tree, monkeypatch):
    """It reaches the one that runs, too, and ends it; those that wait must not begin."""
    began = []
    stopped = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            stopped.set()
            super().shutdown(wait)

    def run_again(name, saved, cfg):
        began.append(name)
        if name == "b":
            stopped.wait(60)  # until the main thread is on its way out
        return saved

    def compare(saved, again):
        raise KeyboardInterrupt

    for name in "cde":
        write_json(tree / "results" / f"{name}.json", saved_run(tree / f"{name}.py"))
    monkeypatch.setattr(reproduce, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(reproduce, "run_again", run_again)
    monkeypatch.setattr(reproduce, "compare", compare)
    with pytest.raises(KeyboardInterrupt):
        main(Config(), tree / "results")
    assert began in (["a"], ["a", "b"])


def test_a_stale_result_is_named_and_not_run_and_so_is_what_is_no_default_run(tree, capsys):
    change(tree, "a", stale="other text")
    write_json(tree / "results" / "a_full.json", {"metrics": {}, "script": "a.py"})
    write_json(tree / "results" / "bench.json", {"decode": {}})
    status, printed = reproduced(tree, capsys)
    assert status == 0 and "stale, not run: a" in printed and "1 experiments" in printed
    assert "--full: a_full" in printed and "real models and files, speed: bench" in printed


def test_a_name_without_a_default_run_is_refused_with_those_that_have_one(tree):
    with pytest.raises(InputError, match="^--only radio: give some of a, b$"):
        main(Config(only=("radio",)), tree / "results")


# --- what counts as the same


def test_on_another_kind_of_cpu_a_number_may_differ_by_some_of_the_spread_over_seeds():
    def number(again, committed=0.80, spread=0.01, largest=0.82):
        return Number("", committed, again, spread, largest)

    assert agrees(number(0.839)) and agrees(number(0.761))  # 4 standard deviations are .04
    assert not agrees(number(0.85)) and not agrees(number(0.75))
    assert agrees(number(0.816, spread=0.0))  # 2% of .82 are .0164
    assert not agrees(number(0.817, spread=0.0))
    assert agrees(number(None, committed=None)) and not agrees(number(0.8, committed=None))
    assert not agrees(number(float("nan")))  # the arm or metric is gone


def test_another_cpu_is_told_from_the_file_and_one_number_in_twenty_may_lie_outside():
    seeds = tuple(range(50, 60))
    saved = saved_run(Path("a.py"), seeds)
    again = copy.deepcopy(saved)
    again["hardware"]["cpu"] = "another kind"
    values = again["metrics"]["arm"]["acc"]["values"]
    values[0] += 1.0  # 1 of 10 + 20 numbers
    agree, words = compare(saved, again)
    assert agree and "29 of 30 numbers are within the tolerance of another CPU or torch" in words
    values[1] += 1.0
    assert not compare(saved, again)[0]


def test_a_curve_of_one_seed_is_compared_to_the_digit_and_left_aside_on_another_cpu():
    saved = saved_run(Path("a.py"))
    curve = {"x": [0, 1, 2], "values": [[0.5, 0.6, 0.7], []]}
    saved["series"] = {"arm": {"signal": curve}}
    again = copy.deepcopy(saved)
    again["series"]["arm"]["signal"]["values"][0][1] = 0.9
    agree, words = compare(saved, again)
    assert not agree and "arm, signal at 1, seed 50: 0.9, committed 0.6" in words
    again["hardware"]["cpu"] = "another kind"
    assert compare(saved, again)[0]


def test_an_arm_that_is_gone_is_a_difference():
    saved = saved_run(Path("a.py"))
    again = saved | {"metrics": {}}
    assert not compare(saved, again)[0]
    again = saved | {"series": {}}
    assert not compare(saved, again)[0]


def test_other_verdicts_are_named_where_all_seeds_were_run():
    saved = saved_run(Path("a.py"))
    again = saved | {"claims": [{"id": "C1", "verdict": "undecided"}]}
    assert "other verdicts: C1" in compare(saved, again)[1]
    assert "verdicts" not in compare(saved, again | {"seeds": [50]})[1]


# --- the files of this repository


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_committed_run_agrees_with_itself_number_by_number(name):
    saved = DEFAULTS[name]
    assert compare(saved, saved)[0]
    numbers = sum(
        len(row["values"])
        for metrics in saved["metrics"].values()
        for metric, row in metrics.items()
        if metric != "time"
    )
    assert len(list(pairs(saved, saved | {"series": {}}))) >= numbers > 0


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_command_that_runs_one_seed_again_is_one_that_the_experiment_reads(name):
    module = importlib.import_module(DEFAULTS[name]["script"].removesuffix(".py").replace("/", "."))
    seed = DEFAULTS[name]["seeds"][0]
    cfg = tyro.cli(module.Config, args=["--out", "there", "--seeds", str(seed)])
    assert tuple(cfg.seeds) == (seed,) and cfg.out == "there"


def test_every_experiment_with_a_committed_default_run_is_covered():
    scripts = [*ROOT.glob("methods/experiments/*.py"), *ROOT.glob("*/*_experiment.py")]
    names = {reproduce.name_of(str(script)) for script in scripts}
    assert names & {file.stem for file in (ROOT / "results").glob("*.json")} == set(DEFAULTS)
    assert {"bench", "prealign_full", "moe_lpr_smollm2"} <= set(OTHERS)
