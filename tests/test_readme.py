"""The README says what the committed results say. `python tests/test_readme.py` rewrites the cells that follow from them."""

import json
import re
from pathlib import Path

from minilm.data import write_json

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def fill(text: str, folder: Path = ROOT / "results") -> str:
    """A README with the last two cells of every table row that links a script, [...](methods/NAME.py), filled from the results committed
    for it (minutes, and which claims hold), and the table of speed between its marks from bench.json."""
    text = re.sub(r"(<!-- bench -->\n).*?(<!-- /bench -->)", lambda marks: marks[1] + speed(folder) + marks[2], text, flags=re.DOTALL)
    return re.sub(r"^(\|.*\]\((?:methods/experiments|methods|signals|vision_eval)/(\w+?)(?:_experiment)?\.py\).*?\|)[^|]*\|[^|]*\|$",
                  lambda row: f"{row[1]} {' | '.join(cells(folder, row[2]))} |", text, flags=re.MULTILINE)


def cells(folder: Path, name: str) -> tuple[str, str]:
    files = [folder / f"{name}{end}.json" for end in ("", "_full")]
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    verdicts = {}  # the default run's, where it tests a claim; else the full run's
    for run in runs:
        verdicts |= {c["id"]: c["holds"] for c in run["claims"] if verdicts.get(c["id"]) is None}
    words = {True: "holds", False: "**not reproduced**", None: "not testable here"}
    found = "; ".join(f"{words[v]}: {', '.join(i for i, holds in verdicts.items() if holds is v)}" for v in words if v in verdicts.values())
    return ", ".join(f"{run['wall_seconds'] / 60:.0f}" for run in runs) or "-", found or "not run yet"


def speed(folder: Path) -> str:
    """bench.json as a table: what, measured, target."""
    if not (folder / "bench.json").exists():
        return ""
    benches = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    rows = [row for bench in benches.values() for row in bench["rows"] if row["target"]]
    shown = lambda row: "-" if row["value"] is None else f"{row['value']:.2f}{row['unit'] if row['unit'] == 'x' else ' ' + row['unit']}"
    lines = [f"| {row['what']} | {shown(row)} | {row['target']} | {'yes' if row['ok'] else '**no**'} |" for row in rows]
    return "\n".join(["| what | measured | target | met |", "|---|---|---|---|", *lines]) + "\n"


def test_the_tables_of_papers_and_of_speed_are_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert fill(text) == text, "run: python tests/test_readme.py"


def test_every_script_with_a_committed_run_has_a_row():
    for script in (*ROOT.glob("methods/experiments/*.py"), *ROOT.glob("*/*_experiment.py")):
        if (ROOT / "results" / f"{script.stem.removesuffix('_experiment')}.json").exists():
            assert f"/{script.stem}.py)" in README.read_text(encoding="utf-8")


def test_the_least_python_is_the_same_wherever_it_is_named():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = {"requires-python": re.findall(r'requires-python = ">=(3\.\d+)"', project),
             "ruff": [f"3.{minor}" for minor in re.findall(r'target-version = "py3(\d+)"', project)],
             **{file: re.findall(r"Python >= (3\.\d+)", (ROOT / file).read_text(encoding="utf-8")) for file in ("README.md", "Makefile")}}
    assert all(named.values()) and {version for versions in named.values() for version in versions} == {"3.11"}, named


def test_a_row_by_hand(tmp_path):
    row = "| [P](x) | a claim | [name](methods/name.py) | ? | ? |\n| other | row |\n"
    assert fill(row, tmp_path) == "| [P](x) | a claim | [name](methods/name.py) | - | not run yet |\n| other | row |\n"
    for name, seconds, claims in (("name", 241, {"C1": True, "C2": False, "C3": None}), ("name_full", 660, {"C1": False, "C3": True})):
        rows = [{"id": id, "holds": holds} for id, holds in claims.items()]
        write_json(tmp_path / f"{name}.json", {"wall_seconds": seconds, "claims": rows})
    assert "| 4, 11 | holds: C1, C3; **not reproduced**: C2 |" in fill(row, tmp_path)


if __name__ == "__main__":
    README.write_text(fill(README.read_text(encoding="utf-8")), encoding="utf-8")
