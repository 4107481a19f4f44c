"""A fork adds a method as README.md says ("Add a method"): what it must touch, and nothing else.
And `pip install .` brings all of the packages to where the checkout is not."""

import os
import shutil
import subprocess
import sys
import zipfile
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


BUILD = "from setuptools.build_meta import build_wheel; build_wheel('dist')"  # as pip does it
PACKAGES = ("minilm", "methods", "signals", "vision_eval")
ELSEWHERE = """
from methods.real import learning_preferences, ockr, transllm
from minilm.results import CODE, ROOT
print(CODE, ROOT, (learning_preferences.HERE / "novel.txt").is_file())
"""


def test_what_pip_installs_is_every_file_of_the_packages_and_runs_go_where_they_are_started(
    fork, tmp_path_factory
):
    pytest.importorskip("setuptools")  # (pip fetches it for itself)
    subprocess.run([sys.executable, "-c", BUILD], cwd=fork, check=True, capture_output=True)
    (wheel,) = (fork / "dist").glob("*.whl")
    site, elsewhere = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
        names = {name for name in packed.namelist() if ".dist-info/" not in name}
    tracked = {path.relative_to(fork).as_posix() for path in fork.rglob("*") if path.is_file()}
    assert names == {name for name in tracked if name.split("/")[0] in PACKAGES}
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == [str(site), str(elsewhere), "True"], run.stderr
