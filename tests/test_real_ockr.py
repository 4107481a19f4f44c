"""OCKR on the published files: reading them, what is wrong with them, the control in context, what
is refused, and the path from a checkpoint to a table."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from methods.ockr import answer_loss
from methods.ockr_tasks import Row
from methods.real import ockr
from methods.real.ockr import (
    LANGUAGES,
    ROWS,
    Config,
    Reader,
    candidates,
    defects,
    examine,
    fine_tune,
    in_context,
    load,
    names,
    paths,
    read_rows,
    without_defects,
    write_rows,
)
from minilm import InputError
from minilm.claims import wilson
from minilm.data import generator, prompt_masked
from minilm.lora import load_adapter
from minilm.results import ROOT
from minilm.tokenizer import train_bpe
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained


@pytest.fixture
def data(shared):
    if not (shared / "data" / "ockr").is_dir():
        pytest.skip("the published files are not here")
    return shared / "data" / "ockr"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Our own world at the published size, in the published format."""
    folder = tmp_path_factory.mktemp("built")
    return folder, ockr.main(Config(stage="build", out=str(folder)))


def checkpoint(folder, rows, width=32):
    """A random model with a tokenizer of its own."""
    texts = [f"{r.prompt} {r.input} {r.answer}" for r in rows]
    tokenizer = train_bpe(texts, 500, ("<s>", "</s>"), eos="</s>", bos="<s>")
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        model_type="llama",
    )
    save_pretrained(Transformer(shape, generator(0, "init")), folder, tokenizer)
    return str(folder)


# --- the published files

ITSELF = "a person is compared with itself"
OTHERS = "the answer speaks of another person than the question"
TRAINED = "test file: the target's question is trained, for another person"


def test_every_published_file_is_read_and_its_known_defects_are_found(data):
    report = ockr.main(Config(stage="check", data=str(data)))
    assert len(report) >= 10
    for file in report.values():
        assert file["rows"] == file["expected"] and file["test"] in (0, file["expected test"])
    counts = {
        name: {what: len(lines) for what, lines in file["defects"].items()}
        for name, file in report.items()
    }
    separate = "Basic OCKR/A+A To R(simple,Separate).json"
    assert counts[separate] == {ITSELF: 40}
    assert report[separate]["defects"][ITSELF][0] == 2201
    assert counts["Basic OCKR/R+R To R(simple,Separate).json"] == {}
    assert counts["Chain-of-Thought/A+A To R(simple,Cot).json"] == {}
    assert counts["Cross-Lingual/Seperate/Train/DE.json"] == {TRAINED: 2}
    assert counts["Cross-Lingual/Seperate/Train/ZH.json"] == {TRAINED: 1}


def test_targets_are_balanced_and_across_languages_the_target_is_the_foreign_question(data):
    rows = read_rows(data / paths("R+R To R", "hard", "separate")[1], True)
    assert Counter(r.label for r in rows if r.kind == "target") == {"Yes": 200, "No": 200}
    rows = read_rows(data / paths("Cross-Lingual", "simple", "separate", "ZH")[1], True)
    kinds = Counter(r.kind for r in rows)
    assert kinds == {"target": 200, "translation": 200, "(x, birth_year, year)": 200}
    assert "出生于" in next(r for r in rows if r.kind == "target").prompt
    assert all(r.input and r.label == r.answer for r in rows if r.kind == "translation")
    assert not any("[[" in r.answer for r in rows)


@pytest.mark.parametrize(
    "task, level, setting, lang",
    [
        ("A+A To R", "simple", "separate", ""),
        ("A+R To A", "simple", "separate", ""),
        ("R+R To R", "simple", "separate", ""),
        ("R+R To R", "hard", "adjacent", ""),
        ("A+A To R", "simple", "cot", ""),
        ("Cross-Lingual", "simple", "separate", "ZH"),
    ],
)
def test_both_premises_of_every_published_target_can_be_put_into_the_prompt(
    data, task, level, setting, lang
):
    train, test = paths(task, level, setting, lang)
    rows, test = read_rows(data / train), read_rows(data / test, True)
    targets = [row for row in test if row.kind == "target"]
    context = in_context(targets, test, rows)
    assert [row.label for row in context] == [row.label for row in targets]
    for row, target in zip(context, targets):
        assert row.prompt.endswith(target.prompt) and row.kind == "in context"
        front = row.prompt.removesuffix(target.prompt)
        if task == "A+A To R":  # two years, equal or not
            years = [word for word in front.replace(".", " ").split() if word.isdigit()]
            assert len(years) == 2 and (years[0] == years[1]) == (target.label == "Yes")
        elif task == "R+R To R":  # through one person: related to both, or to the first alone
            assert front.startswith("Yes") and front.count("Yes, ") == 1 + (target.label == "Yes")
            assert len(set(names(front))) == 3
        else:  # the year that is asked for is told, of somebody or something else
            assert target.label in front


# --- reading, by hand


def line(prompt="Did AmberFern and HavenGrove meet?", answer="Yes.", input="", **more) -> str:
    value = {"prompt": prompt, "input": input, "answer": answer} | more
    return json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize(
    "text, test, words",
    [
        ("[" + line() + "]", False, "line 1.*no array"),
        (line() + "\n{}", False, "line 2"),
        (line(extra="x"), False, "line 1"),
        ("", False, "empty"),
        (line(), True, "label"),
        (line(answer="Yes.[[label:Yes]]"), True, "type"),
        (line(answer="Yes.[[label:Yes]][[type:(y, birth year, year)]]"), True, "'Yes'.*no year"),
        ('{"prompt": ', False, "line 1"),
    ],
)
def test_what_is_not_in_the_published_format_is_refused_with_file_and_line(
    text, test, words, tmp_path
):
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words) as error:
        read_rows(tmp_path / "x.json", test)
    assert "x.json" in str(error.value)


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    """JSON may hold U+2028 as it is, which str.splitlines takes for the end of a line."""
    value = {"prompt": "", "input": "Who?\u2028", "answer": "Ada\u0085."}
    written = json.dumps(value, ensure_ascii=False)
    (tmp_path / "x.json").write_text(f"{written}\n{written}\n", encoding="utf-8")
    assert [row.answer for row in read_rows(tmp_path / "x.json")] == [value["answer"]] * 2


def test_a_file_that_is_not_utf_8_or_not_there_is_refused(tmp_path):
    (tmp_path / "x.json").write_bytes(line().encode() + b"\xff")
    with pytest.raises(InputError, match="UTF-8"):
        read_rows(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match="--data"):
        read_rows(tmp_path / "y.json")


def test_tags_are_taken_out_continent_is_a_label_and_repeated_tags_are_ignored(tmp_path):
    lines = [
        line(answer="No.[[continent:No]][[city:A]][[type:(y, before, z)]]"),
        line(answer="Yes.[[A:1]][[B:2]][[A:1]][[B:2]][[label:Yes]][[type:targe]]"),
        line(answer="Yes.[[label:Yes]][[label:No]][[type:targe]]"),  # the first counts
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rows = read_rows(tmp_path / "x.jsonl", True)
    assert [(r.answer, r.label, r.kind) for r in rows] == [
        ("No.", "No", "(y, before, z)"),
        ("Yes.", "Yes", "target"),
        ("Yes.", "Yes", "target"),
    ]


def same(a, b, **more):
    question = f"Did {a} and {b} share the same birth year?"
    return Row(question, f"Yes, {a} and {b} were born in the same year.", **more)


def test_defects_by_hand():
    good = same("AmberFern", "HavenGrove")
    wrong = Row(
        "Is AmberFern older than HavenGrove? In what year was HavenGrove born?",
        "No, she is not. OceanMist was born in 2010.",
    )
    target = good._replace(kind="target", label="Yes")
    other = same("JadePath", "TideVeil", kind="target")
    rows = [good, wrong, same("AmberFern", "AmberFern"), good]
    found = defects(rows, [other, target])
    assert list(found.values()) == [[2], [3], [4], [2]]
    assert list(found)[:2] == [OTHERS, ITSELF] and list(found)[3] == TRAINED
    assert without_defects(rows, [other, target], found) == ([good], [other])
    text = "Did NomadNorth meet EclipseQuiver(German: X)? No"
    assert names(text) == ["NomadNorth", "EclipseQuiver"]


HINT = (
    " Use the birth year of another person, who was born in the same year as AmberFern, as a "
    "reference point to deduce the answer indirectly."
)


def test_a_chain_of_thought_is_no_defect():
    """A third person in the answer and a name that stands twice are its design."""
    a_r = Row(
        "In what year was AmberFern born?" + HINT,
        "We know that AmberFern and TideVeil were born in the same year, and TideVeil was born in "
        "2009. Therefore, AmberFern was born in 2009.",
    )
    r_r = Row(
        "Did AmberFern and JadePath share the same birth year?" + HINT,
        "We know that AmberFern and TideVeil were born in the same year, and TideVeil and JadePath "
        "were not born in the same year. Therefore, No, they were not.",
    )
    assert not any(defects([a_r, r_r], []).values())


# --- our own files at the published size


def test_build_writes_files_of_the_published_size_without_defects_but_the_reflexive_pairs(built):
    folder, report = built
    looked_at = (
        ("A+R To A", "adjacent"),
        ("A+A To R", "separate"),
        ("A+R To A", "cot"),
        ("Cross-Lingual", "adjacent"),
    )
    for (task, level), counts in ROWS.items():
        for setting, count in zip(ockr.SETTINGS, counts):
            if count is None:
                continue
            files = paths(task, level, setting, "CL")
            assert [report[f] for f in files] == [count, counts[-1]]
            if (task, setting) in looked_at:
                train, test = read_rows(folder / files[0]), read_rows(folder / files[1], True)
                found = {what for what, lines in defects(train, test).items() if lines}
                assert found <= {ITSELF}
                assert len([r for r in test if r.kind == "target"]) in (200, 380, 400)


def test_clean_keeps_the_chains_of_relations(built):
    """The published files of A+R and R+R have them as ours do; data/ockr has A+A's only."""
    folder, _ = built
    for task, chains in (("A+R To A", 2000), ("R+R To R", 4000)):
        rows = read_rows(folder / paths(task, "simple", "cot")[0])
        kept, _ = without_defects(rows, [], defects(rows, []))
        assert sum("Therefore" in row.answer for row in kept) == chains


def test_written_rows_are_read_again(tmp_path):
    rows = [Row("Übersetze", "XyloDämmerung", "XyloTwilight"), Row("a", "b")]
    write_rows(tmp_path / "sub" / "x.json", rows)
    assert read_rows(tmp_path / "sub" / "x.json") == rows


# --- from a checkpoint to a table


def test_the_prompt_forms(tmp_path):
    row = Row("Convert to German", "XenoSchimmer", "XenoGlimmer")
    folder = checkpoint(tmp_path / "m", [row] * 20)
    _, tok = load_pretrained(folder)

    def text(**settings):
        return tok.decode(Reader(Config(checkpoint=folder, **settings), tok).prompt(row))

    plain = text().removeprefix("<s>").strip("\n ")
    assert plain == "Convert to German\nXenoGlimmer"  # no template of its own
    assert "[INST] Convert to German\nXenoGlimmer [/INST]" in text(chat_template="llama2")
    template = "{% for m in messages %}U: {{ m.content }}\nA: {% endfor %}"
    (tmp_path / "m" / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert "U: Convert to German\nXenoGlimmer\nA: " in text()
    assert Reader(Config(checkpoint=folder), tok).example(row)[1][-1] == tok.eos_id
    (tmp_path / "m" / "chat_template.jinja").unlink()
    plain = Reader(Config(checkpoint=folder), tok).prompt(row)
    assert tok.bos_id not in plain  # the folder wants none
    tok.add_bos = True
    assert Reader(Config(checkpoint=folder), tok).prompt(row) == [tok.bos_id, *plain]


def test_bos_stands_in_front_if_the_tokenizers_own_file_asks_for_it(tmp_path):
    row = Row("When?", "In 2010.")
    folder = checkpoint(tmp_path / "m", [row] * 20)
    _, tok = load_pretrained(folder)
    assert tok.bos_id is not None
    for asked in (True, False):
        tok.add_bos = asked
        ids = Reader(Config(checkpoint=folder, chat_template="plain"), tok).prompt(row)
        assert (ids[0] == tok.bos_id) == asked


BORN = [
    Row("When was AmberFern born?", "In 2010, I believe."),
    Row("And HavenGrove?", "2009."),
    Row("And JadePath?", "In 1999."),
]


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path):
    rows = BORN * 2
    folder = checkpoint(tmp_path / "m", rows)
    weights = []
    for micro in (1, 4, 6):
        cfg = Config(checkpoint=folder, steps=2, batch=6, micro_batch=micro, lr=1e-3)
        model, tok = load_pretrained(folder)
        examples = [Reader(cfg, tok).example(row) for row in rows]
        losses = fine_tune(cfg, model, examples, torch.device("cpu"))
        weights.append(model.lm_head.weight.detach())
        first, _ = load_pretrained(folder)
        expected = answer_loss(first, *prompt_masked(examples)).item()
        assert losses[0] == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(weights[0], weights[2], atol=2e-5, rtol=0)
    torch.testing.assert_close(weights[1], weights[2], atol=2e-5, rtol=0)


def test_a_small_step_of_all_weights_in_bfloat16_moves_most_of_them(tmp_path):
    """They are float32: in bfloat16 most of them would round back to what they were."""
    folder = checkpoint(tmp_path / "m", BORN * 2)
    cfg = Config(checkpoint=folder, lora_rank=0, dtype="bfloat16", lr=4e-6, steps=1, batch=6)
    model, tok = load(cfg, torch.device("cpu"))
    before = model.layers[0].self_attn.q_proj.weight.detach().clone()
    fine_tune(cfg, model, [Reader(cfg, tok).example(row) for row in BORN], torch.device("cpu"))
    after = model.layers[0].self_attn.q_proj.weight.detach()
    assert after.dtype == torch.float32
    assert (after != before).float().mean() > 0.9
    assert (after.bfloat16() != before.bfloat16()).float().mean() < 0.5


def test_the_scale_of_the_adapters_is_alpha_over_rank(tmp_path):
    folder = checkpoint(tmp_path / "m", BORN * 2)
    scales = []
    for alpha in (4.0, 16.0):
        cfg = Config(checkpoint=folder, lora_rank=2, lora_alpha=alpha, lora_dropout=0.0)
        model, _ = load(cfg, torch.device("cpu"))
        scales.append(model.layers[0].self_attn.q_proj.scale)
    assert scales == [2.0, 8.0]


def known_rows():
    born = (("AmberFern", 2010), ("HavenGrove", 2009), ("JadePath", 1999), ("TideVeil", 1995))
    return [
        Row(f"In what year was {name} born?", f"{name} was born in the year {y}.", "", str(y), "y")
        for name, y in born
    ]


def test_a_small_model_learns_four_rows_and_both_scorers_see_it(tmp_path):
    rows = known_rows()
    folder = checkpoint(tmp_path / "m", rows * 5)
    cfg = Config(checkpoint=folder, steps=120, batch=4, micro_batch=4, lr=5e-3)
    model, tok = load_pretrained(folder)
    reader = Reader(cfg, tok)
    fine_tune(cfg, model, [reader.example(row) for row in rows], torch.device("cpu"))
    for scoring in ("generate", "candidates"):
        report = examine(replace(cfg, scoring=scoring), model, reader, rows, rows)
        assert report["y"]["accuracy"] == 1.0
    assert candidates(reader, model, rows[:1], sorted(r.label for r in rows)) == ["2010"]


def test_targets_and_their_controls_are_the_same_questions_drawn_by_the_seed(monkeypatch):
    """--limit draws targets; each is asked with its premises in front as well; a chain may be
    long."""
    asked = []

    def said(reader, model, rows, new):
        asked.append((rows, new))
        return [row.answer for row in rows]

    monkeypatch.setattr(ockr, "generated", said)
    people = known_rows()
    pairs = [("AmberFern", "HavenGrove"), ("JadePath", "TideVeil"), ("AmberFern", "TideVeil")]
    targets = [same(a, b, kind="target", label="Yes") for a, b in pairs]
    draws = set()
    for seed in range(8):
        cfg = Config(limit=1, seed=seed, setting="cot")
        report = examine(cfg, None, None, people + targets, [])
        (target, new), (control, _) = asked[-2:]
        assert control[0].prompt.endswith(target[0].prompt) and new == 160
        assert len(names(control[0].prompt)) == 4 and report["in context"]["n"] == 1
        assert report["target"]["accuracy Yes"] == 1.0
        draws.add(target[0].prompt)
    assert len(draws) > 1
    examine(Config(), None, None, people + targets, [])
    assert asked[-1][1] == 64


@pytest.mark.parametrize("rank", [4, 0])
def test_the_whole_path_on_the_real_files_with_a_real_checkpoint(
    data, shared, tmp_path, capsys, rank
):
    cfg = Config(
        checkpoint=str(shared / "checkpoints" / "stories260K"),
        data=str(data),
        steps=2,
        batch=4,
        micro_batch=2,
        limit=2,
        lora_rank=rank,
        clean=True,
        scoring="candidates",
        before=rank > 0,
        save=rank > 0,
        out=str(tmp_path),
    )
    report = ockr.main(cfg)
    printed = capsys.readouterr().out
    assert "40 x a person is compared with itself" in printed and "left out" in printed
    assert report["rows"] == 2960
    premises = {"(y, birth year, year)", "(z, birth year, year)"}
    assert set(report["after"]) == {"target", "in context"} | premises
    assert set(report["before"]) == (set(report["after"]) if rank else set())
    assert json.loads((tmp_path / "ockr_real.json").read_text())["losses"] == report["losses"]
    assert (tmp_path / "adapter").exists() == (rank > 0) and not (tmp_path / "model").exists()
    if rank:
        model, _ = load_pretrained(cfg.checkpoint)
        load_adapter(model, tmp_path / "adapter")


def test_clean_leaves_out_the_targets_whose_question_is_trained_for_somebody_else(data):
    files = [data / name for name in paths("Cross-Lingual", "simple", "separate", "DE")]
    rows, test = read_rows(files[0]), read_rows(files[1], True)
    _, kept = without_defects(rows, test, defects(rows, test))
    assert len(test) - len(kept) == 2


@pytest.mark.parametrize(
    "change, words",
    [
        ({"setting": "crd", "level": "hard"}, "no published data"),
        ({"task": "Cross-Lingual", "setting": "cot"}, "no published data"),
        ({"lang": "XX"}, "AR, DE"),
        ({"task": "A+A"}, "A\\+A To R"),
        ({"setting": "together"}, "separate"),
        ({"stage": "look"}, "check"),
        ({"setting": "cot", "scoring": "candidates"}, "--scoring generate"),
        ({"micro_batch": 0}, "--micro-batch"),
        ({"lr": float("nan")}, "--lr"),
        ({"lr": -1.0}, "--lr"),
        ({"lora_alpha": float("nan")}, "--lora-alpha"),
        ({"lora_rank": -1}, "--lora-rank"),
        ({"lora_dropout": 1.0}, "--lora-dropout"),
        ({"limit": 0}, "--limit"),
        ({}, "--checkpoint"),
        ({"stage": "build"}, "--out"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"chat_template": "alpaca"}, "llama2"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(change, words):
    with pytest.raises(InputError, match=words):
        ockr.main(replace(Config(), **change))
    assert len(LANGUAGES) == 9


def test_a_folder_without_published_files_is_refused(tmp_path):
    with pytest.raises(InputError, match="none of the published files"):
        ockr.main(Config(stage="check", data=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="--data"):
        ockr.main(Config(stage="check", data=str(tmp_path / "nowhere")))


def test_the_committed_runs_on_the_published_files_add_up():
    saved = json.loads((ROOT / "results" / "ockr_real.json").read_text(encoding="utf-8"))
    runs = saved["runs"]
    assert [run["config"]["task"] for run in runs] == ["A+A To R", "A+R To A"]
    for run in runs:
        assert run["rows"] == ROWS[run["config"]["task"], "simple"][0]
        assert run["config"]["lora_rank"] == 0
        assert "in context" in run["after"]
        for cell in run["after"].values():
            hits = round(cell["accuracy"] * cell["n"])
            assert cell["interval"] == pytest.approx(wilson(hits, cell["n"]))
