"""A fork adds a method as README.md says ("Add a method"): what it must touch, and nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def fork(tmp_path):
    """A copy of what git tracks, as it is on disk."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def rules(fork: Path, *more: str) -> str:
    """Runs what the house rules, the README's test and more files say of my_method and of README.md
    in the fork; "" if they pass."""
    tests = ("tests/test_house_rules.py", "tests/test_readme.py", *more)
    about = "my_method or readme or row or table"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", about, *tests],
        cwd=fork,
        env=os.environ | {"PYTHONPATH": str(fork)},
        capture_output=True,
        text=True,
    )
    return run.stdout + run.stderr if run.returncode else ""


EXPERIMENT = '''"""My method, examined. Run: python methods/experiments/my_method.py"""

from dataclasses import dataclass

from methods.my_method import contrast
from minilm.claims import Claim, above, cells, judge

FINDING = "It works."


@dataclass(frozen=True)
class Config:
    seeds: tuple[int, ...] = (0, 1)  # repetitions


def mine_is_better(view):
    "The accuracy of mine is above the baseline's."
    return above(view("mine", "acc") - view("baseline", "acc"))


CLAIMS = [
    Claim("C1", mine_is_better, "more", cells(["mine"], ["acc"]), cells(["baseline"], ["acc"])),
]


def claims(metrics):
    return judge(CLAIMS, metrics)


def headline(view):
    return f"{view.mean('mine', 'acc'):.2f}, baseline {view.mean('baseline', 'acc'):.2f}."


def main(cfg: Config):
    print(contrast)
'''
ROW = (
    "| mine | ? | [read](methods/my_method.py), [doubt](methods/experiments/my_method.py) | ? | ? |"
)


def test_a_method_is_one_new_file_and_an_experiment_one_more_and_a_row(fork):
    method = (fork / "methods" / "skip_layer_cd.py").read_text(encoding="utf-8")
    mine = method.replace("heuristic_span", "my_span")
    (fork / "methods" / "my_method.py").write_text(mine, encoding="utf-8")
    assert rules(fork) == ""

    experiment = fork / "methods" / "experiments" / "my_method.py"
    experiment.write_text(EXPERIMENT, encoding="utf-8")
    readme = fork / "README.md"
    lines = readme.read_text(encoding="utf-8").split("\n")
    last = max(i for i, line in enumerate(lines) if "_experiment.py)" in line)
    readme.write_text("\n".join([*lines[: last + 1], ROW, *lines[last + 1 :]]), encoding="utf-8")
    subprocess.run(
        [sys.executable, "tests/test_readme.py"],
        cwd=fork,
        env=os.environ | {"PYTHONPATH": str(fork)},
        check=True,
    )
    filled = readme.read_text(encoding="utf-8")
    assert "| mine | It works. |" in filled and "| not run yet | - |" in filled
    assert rules(fork, "tests/test_claims.py") == ""
