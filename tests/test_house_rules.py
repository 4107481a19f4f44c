"""The rules of this repository that a machine can check: which way imports point, what code never
does, that every documented command parses, and that every committed result follows from its own
numbers and rests on what the code gives today."""

import ast
import dataclasses
import importlib
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import tyro

from minilm.results import NEUTRAL, fingerprints, same_fingerprints

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train", "sample", "bench", "reproduce")
PACKAGES = ("minilm", "methods", "signals", "vision_eval")
PRODUCT = sorted(
    [
        *(f for p in PACKAGES for f in (ROOT / p).rglob("*.py")),
        *(f for f in ROOT.glob("*.py") if f.stem in SCRIPTS),
    ]
)
name = lambda file: file.relative_to(ROOT).as_posix()
every_file = pytest.mark.parametrize("file", PRODUCT, ids=name)


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(file: Path) -> set[str]:
    """Every module that a file imports, also inside functions: "a.b" for `import a.b`, for
    `from a.b import c`, and for `from a import b` where b is itself a module of ours."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{name(file)}:{node.lineno} imports relatively: write the whole name"
            )
            inner = {
                f"{node.module}.{a.name}"
                for a in node.names
                if (ROOT / node.module.replace(".", "/") / f"{a.name}.py").exists()
            }
            found |= inner or {node.module}
    return found


# --- imports

# Which of our modules a file may take, by its folder. X is the name of the paper; imports point
# down the shelves: experiments, real -> the paper's file -> its parts -> worlds -> minilm.
WORLDS = r"methods\.worlds\.\w+"
PAPER = r"methods\.{X}(_\w+)?"  # the paper's file and its parts
EXPERIMENT = r"methods\.experiments\.{X}(_\w+)?"  # the experiment, and its claims
SHELVES = {
    "minilm": [],
    "signals": [r"signals\.\w+"],
    "vision_eval": [r"vision_eval\.\w+"],
    "methods/worlds": [],
    "methods": [WORLDS, PAPER],
    "methods/experiments": [WORLDS, PAPER, EXPERIMENT],
    "methods/real": [WORLDS, PAPER, EXPERIMENT],
}
EXTRA = {  # proxy-tuning is a paper's file with no shelf of its own: question alignment's serve
    # both; DoLa and its kin contrast by SkipLayerCD's rule, and its file does without them
    "methods/skip_layer_cd_baselines.py": ["methods.skip_layer_cd"],
    "methods/proxy_tuning.py": ["methods.question_alignment_tasks"],
    "methods/experiments/question_alignment.py": ["methods.proxy_tuning"],
    "methods/experiments/question_alignment_claims.py": ["methods.proxy_tuning"],
    "methods/real/question_alignment.py": ["methods.proxy_tuning"],
}


def may_import(file: Path, module: str) -> bool:
    """Whether a file of ours may import that module of ours."""
    if module.split(".")[0] == "minilm" or module in EXTRA.get(name(file), []):
        return True
    folder = name(file.parent)
    paper = file.stem.removesuffix("_claims")
    return any(re.fullmatch(rule.format(X=paper), module) for rule in SHELVES[folder])


@every_file
def test_imports_point_down_the_shelves(file):
    for module in imports(file):
        top = module.split(".")[0]
        if name(file.parent) != "." and top in PACKAGES:
            assert may_import(file, module), f"{name(file)} imports {module}"
        if name(file.parent) != ".":
            assert top not in SCRIPTS, f"{name(file)} imports the script {module}"


def test_the_shelves_by_example():
    def allowed(file, module):
        return may_import(ROOT / file, module)

    assert allowed("methods/x.py", "methods.x_part") and allowed("methods/x.py", "methods.worlds.w")
    assert not allowed("methods/x.py", "methods.experiments.x") and not allowed(
        "methods/x.py", "methods.y"
    )
    assert allowed("methods/experiments/x_claims.py", "methods.x")
    assert not allowed("methods/experiments/x.py", "methods.real.x")
    assert allowed("methods/real/x.py", "methods.experiments.x_claims")
    assert not allowed("methods/worlds/w.py", "methods.x") and not allowed(
        "minilm/a.py", "methods.x"
    )


@every_file
def test_every_import_is_python_ours_or_a_declared_dependency(file):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = set(re.findall(r'(?m)^    "([\w-]+)[><=]', project)) | {
        "PIL"
    }  # Pillow, which matplotlib requires
    peers = {"transformers", "llama_cpp"}  # extras `bench` and `llama`
    declared |= peers if file.stem == "bench" else set()
    unknown = (
        {m.split(".")[0] for m in imports(file)}
        - declared
        - set(sys.stdlib_module_names)
        - set(PACKAGES)
        - set(SCRIPTS)
    )
    assert not unknown, (
        f"{name(file)} imports {sorted(unknown)}: declare it in pyproject.toml with its purpose, "
        "or do without"
    )


# --- what code never does


def calls(file):
    """(line, dotted name, keywords) of every call whose function is a plain or dotted name."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            yield (
                node.lineno,
                ast.unparse(node.func),
                {k.arg: ast.unparse(k.value) for k in node.keywords},
            )


@every_file
def test_nothing_is_unpickled_executed_or_loaded_loosely(file):
    for line, function, keywords in calls(file):
        bad = (
            function
            in (
                "pickle.load",
                "pickle.loads",
                "pickle.Unpickler",
                "eval",
                "exec",
                "os.system",
                "joblib.load",
            )
            or function == "torch.load"
            and keywords.get("weights_only") != "True"
            or keywords.get("allow_pickle") == "True"
            or keywords.get("strict") == "False"
            and function.endswith("load_state_dict")
            or keywords.get("shell") == "True"
            or function in ("warnings.filterwarnings", "warnings.simplefilter")
        )
        assert not bad, f"{name(file)}:{line}: {function}({keywords})"


@every_file
def test_no_path_edits_no_bare_except_no_star_import(file):
    for node in ast.walk(tree(file)):
        where = f"{name(file)}:{getattr(node, 'lineno', 0)}"
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"), (
            f"{where} touches sys.path"
        )
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), (
            f"{where} has a bare except"
        )
        assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == "*"), (
            f"{where} imports *"
        )


def test_a_file_is_named_for_what_it_does():
    assert not [name(file) for file in PRODUCT if file.stem.startswith("util")]


# --- documented commands


def commands(text: str) -> list[str]:
    """Lines that start one of our scripts; comment and trailing "..." removed, continued lines
    joined."""
    found = re.findall(
        r"(?m)(?:^|[`\s])((?:python3?|torchrun)[^\n`]*?\b[\w/]+\.py\b[^\n`]*)",
        re.sub(r"\\\n\s*", " ", text),
    )
    return [
        re.split(r"\s#|\s*\.\.\.|\s\(|\s&&", c)[0].strip()
        for c in found
        if not re.search(r"python3? -[mc]", c)
    ]


DOCUMENTED = [(name(f), c) for f in PRODUCT for c in commands(ast.get_docstring(tree(f)) or "")]
README = ROOT / "README.md"
DOCUMENTED += [
    ("README.md", c)
    for c in (commands(README.read_text(encoding="utf-8")) if README.exists() else [])
]


@pytest.mark.parametrize("where, command", DOCUMENTED)
def test_every_documented_command_parses(where, command, capsys):
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[at]).exists(), f"{where}: {command}: there is no {words[at]}"
    module = importlib.import_module(words[at].removesuffix(".py").replace("/", "."))
    if words[at].startswith("tests/"):  # a test file that can also be run takes no flags
        assert len(words) == at + 1
        return
    status = 0
    try:
        tyro.cli(module.Config, args=words[at + 1 :])
    except SystemExit as end:  # 0 for --help
        status = end.code
    assert status == 0, f"{where}: {command}\n{capsys.readouterr().err}"


def test_the_readme_names_every_experiment_and_links_only_to_files_that_exist():
    """A paper's file alone (a fork's, say) needs no row; with an experiment beside it, it does."""
    text = README.read_text(encoding="utf-8")
    experiments = [
        f for f in (ROOT / "methods" / "experiments").glob("*.py") if f.stem != "__init__"
    ]
    unnamed = [
        name(f) for f in experiments if name(f) not in text and not f.stem.endswith("_claims")
    ]
    assert not unnamed, f"README.md does not name {unnamed}"
    broken = [
        link
        for link in re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'src="([^"]+)"', text)
        if "://" not in link and not (ROOT / link).exists()
    ]
    assert not broken, f"README.md links to {broken}"


def test_every_test_that_a_docstring_sends_its_reader_to_exists():
    tests = set()
    for file in (ROOT / "tests").glob("test_*.py"):
        tests |= {node.name for node in tree(file).body if isinstance(node, ast.FunctionDef)}
    for file in PRODUCT:
        named = re.findall(r"[Bb]y hand:\s+(test_\w+)", file.read_text(encoding="utf-8"))
        assert set(named) <= tests, f"{name(file)} names {sorted(set(named) - tests)}"


# --- committed results


def load(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


RESULTS = [f for f in sorted((ROOT / "results").glob("*.json")) if "claims" in load(f)]
FRESH = [f for f in RESULTS if "stale" not in load(f)]  # README.md says which ones are not


def script_of(saved: dict):
    return importlib.import_module(saved["script"].removesuffix(".py").replace("/", "."))


@pytest.mark.parametrize("file", FRESH, ids=name)
def test_the_claims_of_a_committed_result_follow_from_its_numbers_and_its_figure_can_be_drawn_again(
    file,
):
    saved = load(file)
    module = script_of(saved)
    assert json.loads(json.dumps(module.claims(saved["metrics"]))) == saved["claims"]
    assert module.figure(saved).get_axes()
    assert file.with_suffix(".png").exists() and not saved["quick"]
    for row in (m for arm in saved["metrics"].values() for m in arm.values()):
        assert len(row["values"]) == len(saved["seeds"])


@pytest.mark.parametrize("file", FRESH, ids=name)
def test_a_committed_result_was_made_with_the_scripts_present_defaults(file):
    saved = load(file)
    module = script_of(saved)
    if (
        "/real/" in saved["script"]
    ):  # it has no default run: the command that is noted must give the settings that are noted
        made = tyro.cli(module.Config, args=shlex.split(saved["command"])[2:])
    else:
        flag = {"full": "full", "seeds": "more_seeds"}.get(file.stem.rsplit("_", 1)[-1])
        made = module.Config(**({flag: True} if flag else {}))
    defaults = json.loads(json.dumps(dataclasses.asdict(made)))
    changed = {
        k: (saved["config"].get(k), v)
        for k, v in defaults.items()
        if k not in NEUTRAL and k in saved["config"] and saved["config"][k] != v
    }
    assert not changed, f"{name(file)} was made with other settings (saved, now): {changed}"


@pytest.mark.parametrize("file", FRESH, ids=name)
def test_a_committed_result_rests_on_what_the_code_gives_today(file):
    """Its text, its exam and its first weights are made again and compared. If they differ the
    result is stale: run it again, or write into the file why it is, "stale": "..."."""
    saved = load(file)
    module = script_of(saved)
    if not hasattr(module, "depends"):
        assert not saved.get("depends")
        pytest.skip("says nothing of what it rests on")
    cfg = module.Config(**restored(module.Config, saved["config"]))
    now = fingerprints(module.depends(cfg, saved["seeds"][0]))
    assert same_fingerprints(saved.get("depends", {}), now), (
        f"{name(file)} is not what the code gives today. It rests on {saved.get('depends')}, "
        f"today that is {now}: run it again, or mark it stale"
    )


def restored(Config, saved: dict) -> dict:
    """The settings of a results file as arguments of its Config: lists become tuples again."""
    known = {field.name for field in dataclasses.fields(Config)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in known}


# --- nothing of one machine


def test_no_file_holds_a_path_of_somebodys_machine_or_a_private_package_index():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    files = [ROOT / f for f in tracked if f] or [
        f for f in ROOT.rglob("*") if ".venv" not in f.parts
    ]  # outside git: whatever is here
    private = re.compile(
        r"(?<![\w.-])/(home|Users|root|work)/\w+|--(extra-)?index-url|PIP_(EXTRA_)?INDEX|artifactory[./]"
    )
    for file in files:
        if file.suffix in (".py", ".md", ".json", ".toml", ".txt", ".yml", "") and file.is_file():
            found = private.search(file.read_text(encoding="utf-8", errors="ignore"))
            assert not found, f"{name(file)} holds {found[0]!r}"
