"""The README says what the committed results say."""

from minilm import results
from minilm.results import ROOT, fill_readme

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_papers_is_up_to_date():
    assert fill_readme(README) == README, "run: python -m minilm.results"


def test_every_committed_default_run_has_a_row_and_every_row_a_script():
    names = {file.stem.removesuffix("_full") for file in (ROOT / "results").glob("*.json")}
    scripts = [*ROOT.glob("methods/*.py"), *ROOT.glob("signals/*.py"), *ROOT.glob("vision_eval/*.py")]
    for name in names & {script.stem for script in scripts}:
        assert f"/{name}.py)" in README


def test_a_row_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    row = "| [P](x) | a claim | [name](methods/name.py) | ? | ? |\n| other | row |\n"
    assert fill_readme(row) == "| [P](x) | a claim | [name](methods/name.py) | - | not run yet |\n| other | row |\n"
    for name, seconds, claims in (("name", 241, {"C1": True, "C2": False, "C3": None}), ("name_full", 660, {"C1": False, "C3": True})):
        rows = [{"id": id, "holds": holds} for id, holds in claims.items()]
        results.write_json(tmp_path / f"results/{name}.json", {"wall_seconds": seconds, "claims": rows})
    assert "| 4, 11 | holds: C1, C3; **not reproduced**: C2 |" in fill_readme(row)
