"""The benchmark on a model of the user's own: from files, with demonstrations, on AMBER; against an
endpoint that misbehaves in ten ways; and what is refused."""

import json
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from minilm import InputError
from minilm.data import generator
from vision_eval import benchmark, scenes, vlm
from vision_eval.exam import Block, Exam, ask, before, export
from vision_eval.hallu_pi import SCENARIOS
from vision_eval.metrics import score, vocabulary_of


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exam")
    export(12, 3, folder)
    model = vlm.TinyVLM(generator(0, "init"), width=32, layers=1)
    vlm.save_vlm(folder / "tiny", model)
    return folder, model


def bench(folder, out, **changes):
    given = {"data": str(folder / "data.jsonl"), "images": str(folder), "out": str(out)}
    return benchmark.Config(**{**given, "workers": 1, **changes})


def test_the_model_on_exported_files_scores_what_it_scores_in_memory(files, tmp_path, capsys):
    folder, model = files
    tiny = f"tiny:{folder / 'tiny'}"
    scores = benchmark.main(bench(folder, tmp_path, model=tiny, scenarios=("noise", "crop")))
    rows = {(row["scenario"], row["phase"]): row for row in scores["rows"]}
    exam = Exam(12, 3)
    blocks = {
        ("noise", "after"): Block("noise"),
        ("crop", "after"): Block("crop"),
        ("crop", "before"): before("crop"),
    }
    for key, block in blocks.items():
        asked = exam.block(block)
        (row,) = score(asked.items, ask(model, asked), scenes.KINDS).values()
        assert {name: rows[key][name] for name in row} == row
    assert "scorer: paper (micro)" in capsys.readouterr().out
    again = bench(folder, tmp_path / "2", score=str(tmp_path / "answers.json"))
    other = benchmark.main(again)["rows"][0]
    assert other["unanswered"] > 0 and "PI" not in other  # the other scenarios have no answers
    assert "run the same command again" in capsys.readouterr().out


class Echo:
    """Right answers to everything, and what it was shown."""

    def __init__(self, items):
        self.right = {item.question: benchmark.right_answer(item) for item in items}
        self.seen = []

    def __call__(self, turns):
        self.seen.append(turns)
        return self.right[turns[-1][1]]


def test_reminder_and_demonstrations_come_before_the_question(files, tmp_path):
    folder, _ = files
    items = benchmark.read_items(str(folder / "data.jsonl"))
    items = [item for item in items if item.scenario == "noise"]
    cfg = bench(folder, tmp_path, baseline="icl")
    model = Echo(items)
    asked, answers = benchmark.evaluate(model, items, cfg)
    shown = {turns[-1][0].tobytes() for turns in model.seen}
    assert len({i.image for i in items}) - len({i.image for i in asked}) == 2
    assert None not in answers.values()
    for turns in model.seen:
        assert len(turns) == 3 and turns[0][1].startswith("The images are perturbed.")
        assert turns[0][2] and turns[1][2] and not turns[1][1].startswith("The images")
        for image, _, _ in turns[:2]:
            assert image.tobytes() not in shown  # set aside, never asked about

    def blank(name):
        return np.zeros((4, 4, 3), np.uint8)

    turns = benchmark.make_turns(items[0], replace(cfg, baseline="reminder"), [], blank)
    assert [t[1] for t in turns] == [scenes.TEMPLATES["reminder"] + items[0].question]
    with pytest.raises(InputError, match="not 3 turns"):
        benchmark.evaluate(benchmark.tiny_model(files[1]), items, cfg)


def test_a_run_says_how_many_questions_lack_demonstrations(files, tmp_path, capsys):
    folder, _ = files
    items = benchmark.read_items(str(folder / "data.jsonl"))
    items = [item for item in items if item.scenario == "noise"]
    cfg = bench(folder, tmp_path, baseline="icl")
    asked, pool = benchmark.split_pool(items, cfg.shots, cfg.seed)
    assert benchmark.badly_shown(asked, pool, cfg.shots) == 0
    described = [i for i in asked if i.task == "gen"]
    without = [i for i in pool if i.task == "disc"]  # nobody is shown how to describe
    assert benchmark.badly_shown(asked, without, cfg.shots) == len(described)

    set_aside = {item.image for item in pool}
    kept = [i for i in items if i.image not in set_aside or i.task == "disc"]
    benchmark.evaluate(Echo(items), kept, cfg)
    told = f"{len(described)} of {len(asked)} questions get fewer than 2 demonstrations"
    assert told in capsys.readouterr().out


def test_a_limit_asks_the_same_scenes_before_and_after_in_every_scenario(files, tmp_path):
    folder, _ = files
    items = benchmark.read_items(str(folder / "data.jsonl"))
    asked, answers = benchmark.evaluate(Echo(items), items, bench(folder, tmp_path, limit=2))
    table = score(asked, answers, vocabulary_of(items))  # (refuses half a pair)
    assert set(table) >= {(name, "after") for name in SCENARIOS} | {("none", "before")}
    scenes_of = {
        key: {i.id.split("/")[2] for i in asked if (i.scenario, i.phase) == key} for key in table
    }
    for key, names in scenes_of.items():
        kind = "board" if key[0] == "crop" else "scene"
        assert names == {f"{kind}0", f"{kind}1"}, key


def test_a_picture_scores_the_same_with_and_without_a_limit(files, tmp_path):
    folder, _ = files
    items = benchmark.read_items(str(folder / "data.jsonl"))
    said = {item.id: "a circle, a bar and a ring" for item in items}
    (tmp_path / "all.json").write_text(
        json.dumps([{"id": id, "response": text} for id, text in said.items()])
    )
    whole = vocabulary_of(items)
    assert whole == set(scenes.KINDS)
    first = benchmark.first_scenes(items, 1)
    answers = {item.id: said[item.id] for item in first}
    alone = score(first, answers, whole)["noise", "after"]
    (item,) = [i for i in first if (i.scenario, i.task) == ("noise", "gen")]
    assert alone["Hal"] == 100 * bool({"circle", "bar", "ring"} - set(item.truth))


# --- an endpoint that misbehaves


def good(text):
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


class Bad(BaseHTTPRequestHandler):
    """Replies as the server's `how` says."""

    replies = {
        "an error inside a 200": (200, b'{"error": {"message": "no such model"}}'),
        "broken JSON": (200, b'{"choices": ['),
        "null": (200, good(None)),
        "an empty answer": (200, good("")),
        "an empty body": (200, b""),
        "500": (500, b"out of memory"),
        "429": (429, b"slow down"),
        "302": (302, b""),
        "401": (401, b"no key"),
    }

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.how == "hang":
            self.server.over.wait(20)
            return
        status, body = self.replies.get(self.server.how, (200, good("Yes")))
        self.send_response(status)
        self.send_header("Retry-After", "0")
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        cut = 7 if self.server.how == "a cut body" else 0
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])
        if self.server.how == "dropped":
            self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def bad():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bad)
    server.daemon_threads, server.how, server.over = True, "good", threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def endpoint(files, out, port, **changes):
    url = f"http://127.0.0.1:{port}/v1"
    given = {"model": "openai:m", "base_url": url, "limit": 1, "retries": 0, "workers": 4}
    return bench(files[0], out, **{**given, **changes})


@pytest.mark.parametrize(
    "how, told",
    [
        ("an error inside a 200", "no such model"),
        ("broken JSON", "not JSON"),
        ("null", "null"),
        ("an empty answer", "empty"),
        ("an empty body", "not JSON"),
        ("500", "out of memory"),
        ("429", "slow down"),
        ("302", "redirects to http://127.0.0.1:1/elsewhere"),
        ("401", "no key"),
        ("a cut body", "not JSON"),
        ("hang", "timed out"),
    ],
)
def test_a_run_without_answers_has_no_scores_and_says_why(files, bad, tmp_path, capsys, how, told):
    bad.how = how
    cfg = endpoint(files, tmp_path, bad.server_port, timeout=0.3 if how == "hang" else 20)
    with pytest.raises(InputError, match=told) as error:
        benchmark.main(cfg)
    assert "\n" not in str(error.value)
    assert "PI" not in capsys.readouterr().out
    assert not (tmp_path / "scores.json").exists() and not (tmp_path / "answers.json").exists()


def test_a_server_that_is_not_there_is_one_line_and_status_2(files, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    cfg = endpoint(files, tmp_path, port)
    words = [sys.executable, benchmark.__file__]
    for name in ("model", "base_url", "data", "images", "limit", "out"):
        words += [f"--{name.replace('_', '-')}", str(getattr(cfg, name))]
    run = subprocess.run([*words, "--retries", "0"], capture_output=True, text=True)
    assert run.returncode == 2 and "PI" not in run.stdout
    last = run.stderr.strip().splitlines()[-1]
    assert "refused" in last and "Traceback" not in run.stderr
    assert not (tmp_path / "scores.json").exists()


def test_answers_before_the_trouble_are_kept_and_not_asked_again(files, bad, tmp_path):
    bad.how = "good"
    benchmark.main(endpoint(files, tmp_path, bad.server_port, scenarios=("noise",)))
    kept = (tmp_path / "cache.jsonl").read_text()
    bad.how = "500"
    scores = benchmark.main(endpoint(files, tmp_path, bad.server_port, scenarios=("noise",)))
    assert scores["rows"][0]["unanswered"] == 0
    with pytest.raises(InputError, match="in a row"):
        benchmark.main(endpoint(files, tmp_path, bad.server_port))
    assert (tmp_path / "cache.jsonl").read_text() == kept and kept


# --- what is refused

QUESTION = {
    "id": "a", "image": "x", "scenario": "s", "phase": "after", "task": "gen", "field": "",
    "pair_id": "", "question": "?", "answer": "", "truth": ["circle"],
}  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"truth": "circle"}, "truth must be a list of words"),
        ({"hal": [1]}, "hal must be a list of words"),
        ({"severity": 6}, "severity must be 0 to 5"),
        ({"severity": "3"}, "severity must be 0 to 5"),
        ({"seed": None}, "seed must be a whole number"),
        ({"scenario": ["noise"]}, "scenario must be a text"),
        ({"id": [1]}, "id must be a text"),
        ({"image": None}, "image must be a text"),
        ({"question": 7}, "question must be a text"),
        ({"region": 7}, "region must be a text"),
        ({"question": "\ud800"}, "question must be a text"),
        ({"task": "chat"}, "task gen or disc"),
        ({"task": "disc", "field": "taste"}, "field one of"),
        ({"taste": "sour"}, "missing or unknown: taste"),
    ],
)
def test_a_question_with_a_wrong_field_is_refused_by_its_name(tmp_path, change, message):
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(QUESTION))
    assert benchmark.read_items(str(file))[0].truth == ("circle",)
    file.write_text(json.dumps(QUESTION | change))
    with pytest.raises(InputError, match=f"question 1: .*{message}"):
        benchmark.read_items(str(file))


def test_an_id_that_comes_twice_is_refused_before_anything_is_asked(tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text((json.dumps(QUESTION) + "\n") * 2)
    monkeypatch.setattr(benchmark, "open_model", pytest.fail)
    with pytest.raises(InputError, match="occurs more than once among the questions"):
        benchmark.main(bench(tmp_path, tmp_path / "out", model="openai:m"))


def test_a_line_of_the_data_ends_at_a_line_feed_alone(tmp_path):
    """JSON may hold U+2028 and U+0085 as they are, which str.splitlines takes for ends of lines."""
    question = QUESTION | {"question": "Is there\u2028a circle?\u0085"}
    (tmp_path / "d.jsonl").write_text(json.dumps(question, ensure_ascii=False), encoding="utf-8")
    assert benchmark.read_items(str(tmp_path / "d.jsonl"))[0].question == question["question"]


@pytest.mark.parametrize(
    "text, message",
    [
        (b"{", "not valid JSON"),
        (b'{"id": 1}', "missing or unknown"),
        (b"7", "must be an object"),
        (b"", "is empty"),
        (b'{"id": "caf\xe9"}', "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_data_file_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "d.jsonl").write_bytes(text)
    with pytest.raises(InputError, match=message):
        benchmark.read_items(str(tmp_path / "d.jsonl"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "gpt"}, "must be openai:NAME"),
        ({"model": "openai:m"}, "must begin with http"),
        ({"data": "none.jsonl", "model": "x"}, "no such file"),
        ({"scenarios": ("mist",)}, "mist: the data has none, noise"),
        ({"images": "/nowhere"}, "lacks .*png, which a question is about"),
        ({"score": "DATA"}, "an answer must be"),
        ({"score": "LOST"}, "every response is null"),
        ({"score": "STRANGE"}, "strange.json: .*data.jsonl has no question with the id 'q1'"),
        ({"format": "amber", "score": "x"}, "AMBER needs it"),
        ({"score": "x", "limit": 2}, "--limit 2 has no effect with --score"),
        ({"safe_words": "x"}, "--safe-words x has no effect without --format amber"),
        ({"format": "amber", "parser": "mme"}, "--parser mme has no effect"),
        ({"format": "amber", "baseline": "icl"}, "--baseline icl needs right answers"),
        ({"workers": 0}, "--workers 0"),
        ({"retries": -1}, "--retries -1"),
        ({"timeout": 0}, "--timeout 0"),
        ({"timeout": -1}, "--timeout -1"),
        ({"timeout": 1e12}, "--timeout 1000000000000.0: give a number .* of at most 1e.06"),
        ({"limit": -1}, "--limit -1"),
        ({"shots": 0}, "--shots 0"),
        ({"patience": 0}, "--patience 0"),
        ({"max_tokens": 0}, "--max-tokens 0"),
    ],
)
def test_wrong_flags_and_files_are_refused_and_nothing_is_written(
    files, tmp_path, changes, message
):
    folder, _ = files
    (tmp_path / "strange.json").write_text('[{"id": "q1", "response": "Yes"}]')
    (tmp_path / "lost.json").write_text('[{"id": "a", "response": null}]')
    named = {"DATA": str(folder / "data.jsonl"), "LOST": str(tmp_path / "lost.json")}
    named["STRANGE"] = str(tmp_path / "strange.json")
    if changes.get("score") in named:
        changes = {"score": named[changes["score"]]}
    given = changes if "score" in changes else {"model": f"tiny:{folder / 'tiny'}", **changes}
    with pytest.raises((InputError, FileNotFoundError), match=message) as error:
        benchmark.main(bench(folder, tmp_path / "out", **given))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_corrupt_picture_is_one_line(files, tmp_path):
    folder, _ = files
    item = benchmark.read_items(str(folder / "data.jsonl"))[0]
    whole = (folder / item.image).read_bytes()
    (tmp_path / item.image).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a picture that can be read"):
        benchmark.read_image(str(tmp_path), item.image)


# --- AMBER


@pytest.fixture
def amber_files(tmp_path):
    def dump(name, value):
        (tmp_path / name).write_text(json.dumps(value))
        return str(tmp_path / name)

    annotations = [
        {"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["dog"]},
        {"id": 2, "type": "relation", "truth": "no"},
    ]
    queries = [
        {"id": 1, "image": "A.png", "query": "Describe this image."},
        {"id": 2, "image": "A.png", "query": "Is there contact?"},
    ]
    (tmp_path / "safe.txt").write_text("line\n")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "A.png")
    cfg = benchmark.Config(
        format="amber",
        annotations=dump("a.json", annotations),
        associations=dump("r.json", {"sky": [], "dog": []}),
        data=dump("q.json", queries),
        safe_words=str(tmp_path / "safe.txt"),
        images=str(tmp_path),
        out=str(tmp_path / "out"),
    )
    return cfg, dump


def test_amber_from_files_with_the_instruction_that_its_questions_lack(amber_files, capsys):
    cfg, dump = amber_files
    items = benchmark.amber_items(cfg.data, benchmark.read_amber(cfg))
    questions = ["Describe this image.", "Is there contact? Answer with 'Yes' or 'No'."]
    assert [item.question for item in items] == questions
    assert "to 1 questions" in capsys.readouterr().out
    said = [{"id": 1, "response": "A dog in the sky"}, {"id": "2", "response": "No"}]
    scores = benchmark.main(replace(cfg, score=dump("answers.json", said)))
    assert scores["generative"] == {"CHAIR": 50.0, "Cover": 99.9, "Hal": 100.0, "Cog": 99.9}
    assert scores["discriminative"]["relation"]["Accuracy"] == 99.9 and scores["unanswered"] == 0


def test_amber_is_asked_at_an_endpoint(amber_files, bad, tmp_path):
    cfg, _ = amber_files
    bad.how = "good"
    url = f"http://127.0.0.1:{bad.server_port}/v1"
    scores = benchmark.main(replace(cfg, model="openai:m", base_url=url))
    assert scores["answered"] == 2 and scores["discriminative"]["relation"]["Accuracy"] == 0


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("associations", "{", "--associations .* is not valid JSON"),
        ("associations", "[1]", "association file must be"),
        ("annotations", "[1, 2]", "annotation 1 needs an id"),
        ("annotations", '{"id": 1}', "must hold a list"),
        ("data", "[7]", "7 is not one of AMBER's queries"),
        ("data", '[{"id": [1], "image": "A", "query": "?"}]', "is not one of AMBER's queries"),
        ("data", '[{"id": 1, "image": 7, "query": "?"}]', "both texts"),
        ("similarity", '[["a", "b"]]', r"must be \[word, word, cosine\]"),
        ("similarity", '[["a", "b", "c"]]', "no number as its cosine"),
        ("similarity", "[7]", r"must be \[word, word, cosine\]"),
        ("score", '[{"id": "abc", "response": "No"}]', "AMBER's ids are numbers"),
        ("score", '[{"id": null, "response": "No"}]', "an answer must be"),
        ("score", '[{"id": [1], "response": "No"}]', "an answer must be"),
    ],
)
def test_broken_amber_files_are_refused_by_name(amber_files, tmp_path, name, value, message):
    cfg, _ = amber_files
    (tmp_path / "broken.json").write_text(value)
    cfg = replace(cfg, **{name: str(tmp_path / "broken.json")})
    with pytest.raises(InputError, match=message) as error:
        benchmark.main(cfg)
    assert "\n" not in str(error.value)
