"""The chat client against a stub server on this machine that decodes the picture it got: faults,
giving up, resuming, secrets, refusals."""

import base64
import io
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from minilm import InputError
from vision_eval import benchmark
from vision_eval.client import (
    ChatClient,
    NoAnswer,
    ask_all,
    encode_png,
    plain,
    retry_after,
    to_messages,
)
from vision_eval.exam import export


class Stub:
    """Answers with the red value of the first pixel. `faults[n]` happens to the n-th request in
    place of an answer (None: it is answered), `always` to all."""

    def __init__(self):
        self.faults, self.always, self.later, self.requests, self.served, self.times, self.lock = (
            [],
            None,
            None,
            [],
            Counter(),
            [],
            threading.Lock(),
        )
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    stub.requests.append((self.path, dict(self.headers), body))
                    stub.times.append(time.monotonic())
                    fault = stub.always or (stub.faults.pop(0) if stub.faults else stub.later)
                if fault == "drop":
                    self.connection.close()
                elif isinstance(fault, tuple):
                    self.reply(*fault)
                else:
                    image, text = body["messages"][-1]["content"]
                    url = image["image_url"]["url"]
                    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))
                    with stub.lock:
                        stub.served[pixels.tobytes(), text["text"]] += 1
                    self.reply(
                        200,
                        json.dumps({"choices": [{"message": {"content": str(pixels[0, 0, 0])}}]}),
                    )

            def reply(self, status, text, headers=(), reason=None):
                self.send_response(status, reason)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def stub():
    stub = Stub()
    yield stub
    stub.server.shutdown()
    stub.server.server_close()


def picture(red: int) -> np.ndarray:
    image = np.random.default_rng(red).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    image[0, 0, 0] = red
    return image


def turns(red: int = 42, text: str = "How red?"):
    return [(picture(red), text, None)]


def client(stub, **changes):
    return ChatClient(stub.url, "stub", **{"pause": 0.001, "timeout": 5, "retries": 3, **changes})


def test_the_png_is_read_back_by_another_library_pixel_for_pixel():
    for shape in ((1, 1), (5, 7), (64, 33)):
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
        assert (np.array(Image.open(io.BytesIO(encode_png(image)))) == image).all()
    with pytest.raises(InputError, match="uint8"):
        encode_png(np.zeros((4, 4, 3)))


def test_the_picture_travels_and_the_request_is_what_the_protocol_says(stub):
    assert client(stub, max_tokens=16)(turns(42)) == "42"
    path, _, body = stub.requests[0]
    assert path == "/v1/chat/completions" and (
        body["model"],
        body["temperature"],
        body["max_tokens"],
    ) == ("stub", 0, 16)
    assert stub.served == {(picture(42).tobytes(), "How red?"): 1}


def test_demonstrations_are_earlier_turns():
    messages = to_messages([(picture(1), "first?", "Yes"), (None, "second?", None)])
    assert [m["role"] for m in messages] == ["user", "assistant", "user"] and messages[1][
        "content"
    ] == "Yes"
    assert [p["type"] for p in messages[0]["content"]] == ["image_url", "text"]
    assert messages[2]["content"] == [{"type": "text", "text": "second?"}]
    for wrong in ([], [(None, "x", "done")]):
        with pytest.raises(InputError, match="leave the answer open"):
            to_messages(wrong)


def test_no_answer_is_lost_or_asked_twice_under_every_fault_at_once(stub, tmp_path):
    bad = [
        (429, "slow down", [("Retry-After", "0")]),
        (500, "oops"),
        (200, "not json"),
        "drop",
        (503, ""),
        (200, '{"choices": []}'),
        (200, '{"choices": [{"message": {"content": null}}]}'),
        (200, "[1]"),
    ]
    stub.faults = bad * 3
    reds = [*range(30), *range(30)]  # every question twice: the second time it comes from the cache
    model = client(stub, cache=tmp_path / "answers.jsonl", retries=24, patience=100)
    assert ask_all(model, [lambda r=r: turns(r) for r in reds], workers=8) == [str(r) for r in reds]
    assert not stub.faults and len(stub.served) == 30 and set(stub.served.values()) == {1}
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 30


def test_a_whole_benchmark_survives_the_faults_and_a_second_run_asks_nothing(
    stub, tmp_path, capsys
):
    export(8, 0, tmp_path / "exam")
    cfg = benchmark.Config(
        model="openai:stub",
        base_url=stub.url,
        data=str(tmp_path / "exam" / "data.jsonl"),
        retries=12,
        workers=8,
        images=str(tmp_path / "exam"),
        out=str(tmp_path / "out"),
        scenarios=("noise", "concat"),
    )
    stub.faults = [
        (429, "", [("Retry-After", "0")]),
        "drop",
        (200, "{"),
        (429, "", [("Retry-After", "0")]),
    ] * 2
    scores = benchmark.main(cfg)
    questions = [i for i in benchmark.read_items(cfg.data) if i.scenario in cfg.scenarios]
    different = {
        (i.image, i.question) for i in questions
    }  # existence and hal-object may ask the same: one answer serves both
    assert not stub.faults and sum(stub.served.values()) == len(stub.served) == len(
        different
    ) < len(questions)
    assert all(
        row["unanswered"] == 0 and row["invalid"] == 100 for row in scores["rows"]
    )  # it answered with numbers: all invalid
    count = len(stub.requests)
    assert benchmark.main(cfg)["rows"] == scores["rows"] and len(stub.requests) == count
    assert len(json.loads((tmp_path / "out" / "answers.json").read_text())) == len(questions)


def test_an_interrupted_run_goes_on_where_it_stopped(stub, tmp_path):
    path = tmp_path / "answers.jsonl"
    ask_all(client(stub, cache=path), [lambda r=r: turns(r) for r in range(5)])
    with open(path, "a") as f:
        f.write('{"key": "half a li')  # killed in the middle of a line
    answers = ask_all(client(stub, cache=path), [lambda r=r: turns(r) for r in range(8)])
    assert answers == [str(r) for r in range(8)] and len(stub.requests) == 8
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 8
    assert (
        client(stub, cache=path, max_tokens=7)(turns(0)) == "0" and len(stub.requests) == 9
    )  # another request: another key
    path.write_text('{"key": 1}\n')
    with pytest.raises(InputError, match="line 1, is not a cached answer"):
        client(stub, cache=path)


def test_an_answer_that_never_comes_is_none_is_reported_and_is_asked_again_next_time(
    stub, tmp_path, capsys
):
    model = client(stub, cache=tmp_path / "a.jsonl", retries=2)
    stub.faults = [(500, "broken")] * 3
    prompts = [lambda: turns(1), lambda: turns(2)]
    assert ask_all(model, prompts, workers=1) == [None, "2"] and len(stub.requests) == 4
    assert "1 of 2 questions have no answer" in capsys.readouterr().out
    stub.faults = [(500, "broken")] * 3
    with pytest.raises(NoAnswer, match="3 attempts, the last one: status 500: broken"):
        model(turns(1))
    assert ask_all(model, prompts, workers=1) == ["1", "2"] and len(stub.requests) == 8
    assert len(stub.served) == 2 and set(stub.served.values()) == {1}


def test_a_run_without_any_answer_is_an_error(stub):
    stub.always = (500, "broken")
    with pytest.raises(InputError, match="none of 2 questions was answered .*status 500: broken"):
        ask_all(client(stub, retries=0), [lambda: turns(1), lambda: turns(2)])


def test_after_a_run_of_failures_nobody_is_asked_any_more(stub):
    stub.always = (503, "the model is not loaded")
    prompts = [lambda r=r: turns(r) for r in range(200)]
    with pytest.raises(InputError, match="no answer 20 times in a row .status 503: the model is"):
        ask_all(client(stub), prompts, workers=8)
    assert 20 <= len(stub.requests) <= 20 + 16
    stub.requests.clear()
    stub.always = (429, "slow down", [("Retry-After", "0")])  # busy is not dead: five times as many
    with pytest.raises(InputError, match="no answer 20 times in a row .status 429: slow down"):
        ask_all(client(stub), prompts, workers=8)
    assert 98 <= len(stub.requests) <= 101 + 16


def test_one_answer_in_between_and_it_goes_on(stub):
    stub.faults = [(500, "")] * 19 + [None] + [(500, "")] * 19
    model = client(stub, retries=30, pause=0)
    assert ask_all(model, [lambda r=r: turns(r) for r in range(3)], workers=1) == ["0", "1", "2"]


def test_who_waits_for_a_dead_server_is_woken_when_the_run_ends(stub):
    stub.faults = [(503, "", [("Retry-After", "600")])] * 3  # three workers wait for ten minutes
    stub.later = (500, "")
    model = client(stub, patience=4, retries=1)
    prompts = [lambda r=r: turns(r) for r in range(9)]
    with pytest.raises(InputError, match="in a row"):
        ask_all(model, prompts, workers=4)  # the fourth meets the end, and wakes them


@pytest.mark.parametrize(
    "reply, told",
    [
        (
            (200, '{"error": {"message": "quota exceeded for llava"}}'),
            "server said: quota exceeded",
        ),
        ((200, '{"error": "no such model"}'), "the server said: no such model"),
        ((200, "<html>gateway</html>"), "not JSON.*gateway"),
        ((200, "[" * 100_000), "not JSON"),
        ((200, ""), "not JSON"),
        ((200, '{"choices": []}'), "holds no answer"),
        ((200, '{"choices": [{"message": {"content": null}}]}'), "the answer is null, not a text"),
        ((200, '{"choices": [{"message": {"content": [1]}}]}'), "not a text"),
        ((200, '{"choices": [{"message": {"content": "  "}}]}'), "the answer is empty"),
    ],
)
def test_what_the_server_said_is_told(stub, reply, told):
    stub.always = reply
    with pytest.raises(NoAnswer, match=told):
        client(stub, retries=0)(turns())


def test_half_a_character_in_an_answer_does_not_end_the_run(stub, tmp_path):
    stub.always = (200, '{"choices": [{"message": {"content": "a \\ud800 dog"}}]}')
    answer = client(stub, cache=tmp_path / "a.jsonl")(turns())
    assert answer == "a ? dog" == client(stub, cache=tmp_path / "a.jsonl")(turns())


def test_the_pause_is_the_servers_or_doubles(stub):
    stub.faults = [(429, "", [("Retry-After", "0.2")])]
    client(stub)(turns())
    assert 0.2 <= stub.times[1] - stub.times[0] < 1
    stub.times.clear()
    stub.faults = [(500, "")] * 3
    client(stub, pause=0.02)(turns())
    gaps = np.diff(stub.times)
    assert gaps[0] >= 0.02 and gaps[1] >= 0.04 and gaps[2] >= 0.08
    assert (
        retry_after("7", 1) == 7
        and retry_after(None, 1) == 1
        and retry_after("soon", 1) == 1
        and retry_after("Wed, 99999999999 Oct 2015 07:28:00 GMT", 1) == 1
        and retry_after("nan", 1) == 1
    )
    assert (
        retry_after("9999", 1) == 600
        and retry_after("-3", 1) == 0
        and retry_after("Wed, 21 Oct 2015 07:28:00 GMT", 1) == 0
    )


def test_a_silent_server_times_out(stub):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:  # accepts, never replies
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(NoAnswer, match="imed"):
            ChatClient(url, "m", timeout=0.1, retries=1, pause=0.001)(turns())


def test_a_refused_request_ends_the_run_at_once_with_the_servers_words_and_without_the_key(
    stub, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("STUB_KEY", "sk-very-secret")
    stub.always = (401, '{"error": "wrong key sk-very-secret"}')
    model = client(stub, key_env="STUB_KEY", cache=tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="refused the request .status 401.*wrong key") as error:
        ask_all(model, [lambda: turns(1)])
    assert (
        len(stub.requests) == 1 and stub.requests[0][1]["Authorization"] == "Bearer sk-very-secret"
    )
    stub.always = (401, "", (), "wrong key sk-very-secret")  # in the status line
    with pytest.raises(InputError, match="wrong key .key.") as third:
        client(stub, key_env="STUB_KEY")(turns(2))
    stub.always = (200, "sk-very-secret is not json")
    with pytest.raises(NoAnswer) as other:
        model(turns(2))
    stub.always = None
    model(turns(3))
    written = (
        "".join(f.read_text() for f in tmp_path.iterdir())
        + str(error.value)
        + str(other.value)
        + str(third.value)
        + "".join(capsys.readouterr())
    )
    assert "secret" not in written
    monkeypatch.setenv("STUB_KEY", "")
    with pytest.raises(InputError, match="STUB_KEY is empty"):
        client(stub, key_env="STUB_KEY")


@pytest.mark.parametrize("key", ["no", "o", "EMPTY"])
def test_a_word_in_the_keys_place_is_not_cut_out_of_the_answers(stub, monkeypatch, key):
    """Servers that ask for no key are given any: a yes/no question would be lost."""
    monkeypatch.setenv("STUB_KEY", key)
    stub.always = (200, json.dumps({"choices": [{"message": {"content": f"{key}, not a dog"}}]}))
    assert client(stub, key_env="STUB_KEY")(turns()) == f"{key}, not a dog"


def test_the_key_does_not_follow_a_redirect(stub, monkeypatch):
    monkeypatch.setenv("STUB_KEY", "sk-very-secret")
    other = Stub()
    stub.always = (302, "", [("Location", other.url + "/chat/completions")])
    with pytest.raises(InputError, match=f"status 302: it redirects to {other.url}"):
        client(stub, key_env="STUB_KEY")(turns())
    assert not other.requests
    other.server.shutdown()
    other.server.server_close()


def test_only_http_addresses_are_asked():
    for url in ("file:///etc/passwd", "localhost:8000", ""):
        with pytest.raises(InputError, match="must begin with http"):
            ChatClient(url, "m")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:abc/v1",
        "http://local host/v1",
        "http://localhost:99999/v1",
        "http://",
        "http:///v1",
        "http://localhost:0/v1",
        "http://[::1/v1",
        "http://localhost/v1?key=1",
        "http://localhost/v1#a",
        "http://me:secret@localhost/v1",
        "http://a..b/v1",
        "http://a\nb/v1",
        "http://ex\N{LATIN SMALL LETTER A WITH DIAERESIS}mple/v1",
        "http://" + "a" * 70 + "/v1",
    ],
)
def test_an_address_that_no_server_can_have_is_refused_at_once(url):
    with pytest.raises(InputError, match="^--base-url .*http://localhost:8000/v1") as error:
        ChatClient(url, "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hunter2@localhost/v1",
        "http://me:hunter2 @localhost/v1",
        "me:hunter2@localhost",
        "http://localhost/v1?key=hunter2",
        "http://localhost/v1#\nhunter2",
    ],
)
def test_a_password_or_key_in_the_address_is_not_repeated(url):
    with pytest.raises(InputError, match="^--base-url .*localhost") as error:
        ChatClient(url, "m")
    assert "hunter2" not in str(error.value)


def test_the_key_itself_in_place_of_its_variable_is_not_repeated():
    with pytest.raises(InputError, match="the name of a variable, not the key") as error:
        ChatClient("http://localhost/v1", "m", key_env="sk-very-secret")
    assert "secret" not in str(error.value)


def test_good_addresses_pass():
    for url in ("http://localhost:8000/v1/", "https://[::1]:8000/v1", "http://my-host_1/v1"):
        assert ChatClient(url, "m").base_url == url.rstrip("/")


@pytest.mark.parametrize(
    "key", ["", " ", "two words", "line\nbreak", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"]
)
def test_a_key_that_no_server_takes_is_refused_without_being_shown(monkeypatch, key):
    monkeypatch.setenv("STUB_KEY", key)
    with pytest.raises(InputError, match="environment variable STUB_KEY") as error:
        ChatClient("http://localhost/v1", "m", key_env="STUB_KEY")
    assert not key.strip() or key not in str(error.value)


def test_nothing_asked_is_nothing_answered():
    assert ask_all(plain(lambda image, prompt: "never"), []) == []


def test_any_function_of_a_picture_and_a_prompt_is_a_model():
    model = plain(lambda image, prompt: f"{prompt} {image[0, 0, 0]}")
    assert model(turns(9, "red:")) == "red: 9"
    with pytest.raises(InputError, match="not 2 turns"):
        model([*turns(), *turns()])
