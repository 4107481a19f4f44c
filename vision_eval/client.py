"""A client for chat endpoints that speak OpenAI's protocol (vLLM, llama.cpp, hosted ones): pictures
and text in, text out. Standard library only.

    model = ChatClient("http://localhost:8000/v1", "llava", cache="answers.jsonl")
    model([(image, "Is there a dog? Answer with 'Yes' or 'No'.", None)])           # -> "Yes"

Every model here is a callable `model(turns) -> str`, turns = [(image uint8 [H, W, 3] or None, user
text, assistant text or None), ...], the last assistant text None: earlier turns are demonstrations.
`plain` makes one of a function f(image, prompt).

Every answer is appended to a JSONL file as soon as it is there, under sha256(model, messages,
max_tokens): a run that was interrupted goes on where it stopped, and nothing is asked twice. 429,
5xx, timeouts, dropped connections, empty and unreadable replies are tried again, after the pause
that the server asks for (Retry-After) or a doubling one; after `patience` failures in a row without
one answer the run ends, since no server is there to answer. Any other status ends it at once. What
the server said is told. The key is read from an environment variable, sent to the given host only
(redirects are not followed), and never written anywhere.
"""

import base64
import email.utils
import hashlib
import http.client
import json
import os
import re
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from minilm import InputError
from minilm.results import progress

Turn = tuple[np.ndarray | None, str, str | None]
LONGEST = 10_000_000  # bytes of a reply that are read
SECRET = 8  # letters; what is shorter is a word ("EMPTY") for a server that asks for no key
BUSY = 0.2  # a 429 comes from a server that is there: it counts as a fifth of a failure


class NoAnswer(RuntimeError):
    """The endpoint gave no usable answer, as often as it was asked."""


def plain(f: Callable[[np.ndarray | None, str], str]) -> Callable[[Sequence[Turn]], str]:
    """A model made of a function of one picture and one prompt; demonstrations are refused, since
    it cannot see them."""

    def model(turns: Sequence[Turn]) -> str:
        if len(turns) != 1:
            raise InputError("this model reads one picture and one prompt, "
                             f"not {len(turns)} turns: use --baseline none or reminder")
        return f(turns[0][0], turns[0][1])

    return model


# --- what is sent


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> an RGB PNG: signature, header, the rows (each after a 0: "not filtered")
    deflated, end."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError("a picture to send must be uint8 [H, W, 3], "
                         f"this one is {image.dtype} {image.shape}")
    H, W = image.shape[:2]

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0)  # 8 bits, RGB
    rows = np.concatenate([np.zeros((H, 1), np.uint8), image.reshape(H, 3 * W)], 1)
    body = chunk(b"IDAT", zlib.compress(rows.tobytes(), 6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def to_messages(turns: Sequence[Turn]) -> list[dict]:
    if not turns or turns[-1][2] is not None:
        raise InputError("a prompt needs at least one turn, and its last one must leave the answer "
                         "open (None)")
    messages = []
    for image, text, reply in turns:
        content: list[dict] = [{"type": "text", "text": text}]
        if image is not None:
            url = "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        messages.append({"role": "user", "content": content})
        if reply is not None:
            messages.append({"role": "assistant", "content": reply})
    return messages


# --- where to


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None  # the reply then counts as an error: the key must not travel to another host


def check_url(url: str) -> str:
    """The address without a last "/". Raises InputError for one that no server can have; what may
    be a password or a key in it is not repeated."""
    shown = re.sub(r"(?s)^.*@|[?#].*", "(...)", url)
    example = "for example http://localhost:8000/v1"
    if not url.startswith(("http://", "https://")):
        raise InputError(f"--base-url {shown!r} must begin with http:// or https://, {example}")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(f"--base-url {shown!r} holds a space or a character that addresses do not "
                         f"have, {example}")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError as error:
        raise InputError(f"--base-url {shown!r}: {error}, {example}") from None
    if not parts.hostname or port == 0:
        raise InputError(f"--base-url {shown!r} names no host or no port, {example}")
    if parts.username is not None or parts.query or parts.fragment:
        raise InputError(f"--base-url {shown!r} must be the address alone, without user, ? or #, "
                         f"{example}; a key goes into the variable that --key-env names")
    return url.rstrip("/")


def read_key(name: str | None) -> str | None:
    """The endpoint's key from the environment variable `name`."""
    if name is None:
        return None
    if name not in os.environ:  # it is not repeated: it may be the key
        raise InputError("--key-env names no environment variable that is set: give the name of a "
                         "variable, not the key, and put the key there")
    key = os.environ[name].strip()
    if not key:
        raise InputError(f"the environment variable {name} is empty: put the endpoint's key there, "
                         "or name another one")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"the environment variable {name} holds a space, a line break or another "
                         "character that no key has: put the key alone there")
    return key


def read_answer(body: bytes) -> str:
    """The text in an endpoint's reply. Raises ValueError, with what the reply says, if none."""
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        said = body[:200].decode("utf-8", "replace")
        raise ValueError(f"the reply is not JSON: {said!r}") from None
    if isinstance(reply, dict) and reply.get("error"):
        error = reply["error"]
        said = error.get("message", error) if isinstance(error, dict) else error
        raise ValueError(f"the server said: {said}")
    try:
        answer = reply["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        raise ValueError(f"the reply holds no answer: {json.dumps(reply)[:200]}") from None
    if not isinstance(answer, str):
        raise ValueError(f"the answer is {json.dumps(answer)[:80]}, not a text")
    if not answer.strip():
        raise ValueError("the answer is empty")
    return answer.encode("utf-8", "replace").decode("utf-8")  # (JSON can hold half a character)


# --- the client


class ChatClient:
    def __init__(
        self,
        base_url: str,
        model: str,
        cache: str | Path | None = None,
        key_env: str | None = None,
        timeout: float = 120,
        retries: int = 6,
        pause: float = 1.0,
        max_tokens: int = 256,
        patience: int = 20,
    ):
        self.base_url = check_url(base_url)
        self.model = model
        self.max_tokens = max_tokens
        self.timeout = timeout
        self.retries = retries
        self.pause = pause
        self.patience = patience
        self.failures = 0.0  # since the last answer
        self.cache = Path(cache) if cache else None
        self._key = read_key(key_env)
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._lock = threading.Lock()
        self._answers = self._read_cache()
        self._busy: dict[str, threading.Lock] = {}  # questions on their way
        self._over = threading.Event()  # the run has ended: nobody waits any longer

    def __call__(self, turns: Sequence[Turn]) -> str:
        """The answer, from the cache or the endpoint. Two threads with one question send it once.
        Raises NoAnswer, or InputError where asking on is of no use."""
        body = {
            "model": self.model,
            "messages": to_messages(turns),
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self._lock:
            one_at_a_time = self._busy.setdefault(key, threading.Lock())
        with one_at_a_time:
            if key not in self._answers:
                answer = self._request(json.dumps(body).encode())
                with self._lock:
                    self._write_cache(key, answer)
                    self._answers[key] = answer
        return self._answers[key]

    def _request(self, body: bytes) -> str:
        for attempt in range(self.retries + 1):
            wait = min(60.0, self.pause * 2**attempt)
            problem = ""
            weight = 1.0
            try:
                answer = self._send(body)
                self.failures = 0.0
                self._over.clear()
                return answer
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {self._said(error)}"
                if error.code != 429 and error.code < 500:
                    self._over.set()
                    raise InputError(f"the endpoint refused the request ({problem})") from None
                wait = retry_after(error.headers.get("Retry-After"), wait)
                weight = BUSY if error.code == 429 else 1.0
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = getattr(error, "reason", error)  # dropped, late or unreadable
                problem = " ".join(str(reason).split()) or type(reason).__name__
            self._count_failure(problem, weight)
            if attempt < self.retries:
                self._over.wait(wait)
        raise NoAnswer(f"no answer after {self.retries + 1} attempts, the last one: {problem}")

    def _send(self, body: bytes) -> str:
        request = urllib.request.Request(self.base_url + "/chat/completions", body)
        request.add_header("Content-Type", "application/json")
        if self._key:
            request.add_header("Authorization", f"Bearer {self._key}")
        with self._opener.open(request, timeout=self.timeout) as reply:
            return read_answer(self._without_key(reply.read(LONGEST)))

    def _without_key(self, said: bytes) -> bytes:
        secret = self._key is not None and len(self._key) >= SECRET
        return said.replace(self._key.encode(), b"(key)") if secret else said

    def _count_failure(self, problem: str, weight: float) -> None:
        with self._lock:
            self.failures += weight
            if self._over.is_set():
                raise NoAnswer(f"the run has ended; the last attempt: {problem}")
            if self.failures < self.patience:
                return
            self._over.set()
        raise InputError(
            f"no answer {self.failures:.0f} times in a row ({problem}): is the server at "
            f"{self.base_url} running? Answers that came are kept; run the same command again to "
            "ask the rest, with a larger --patience if the server is only slow to wake up")

    def _said(self, error: urllib.error.HTTPError) -> str:
        """The body of an error, as far as it can be read, else its status in words; of a redirect,
        where to."""
        place = error.headers.get("Location")
        try:
            with error:
                said = error.read(LONGEST)
        except (OSError, http.client.HTTPException):
            said = b""
        if place:
            said = f"it redirects to {place}; give that address if it is the right one".encode()
        said = said if said.strip() else str(error.reason).encode()
        return " ".join(self._without_key(said).decode("utf-8", "replace").split())[:500]

    def _read_cache(self) -> dict[str, str]:
        """{key: answer}. A last line that a killed run left half-written is cut off; a broken line
        elsewhere is an error."""
        if not self.cache or not self.cache.exists():
            return {}
        data = self.cache.read_bytes()
        answers = {}
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with open(self.cache, "rb+") as f:
                f.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                answers[row["key"]] = row["answer"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{self.cache}, line {number}, is not a cached answer: remove the "
                                 "line or name another file") from None
        return answers

    def _write_cache(self, key: str, answer: str) -> None:
        if self.cache:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with open(self.cache, "a", encoding="utf-8") as f:
                f.write(json.dumps({"key": key, "answer": answer}) + "\n")
                f.flush()
                os.fsync(f.fileno())


def retry_after(header: str | None, default: float) -> float:
    """Seconds to wait by a Retry-After header (seconds, or a date), at most ten minutes; `default`
    without a readable one."""
    if not header:
        return default
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return default
    return min(600.0, max(0.0, seconds)) if seconds == seconds else default


def ask_all(
    model: Callable[[Sequence[Turn]], str],
    prompts: Sequence[Callable[[], Sequence[Turn]]],
    workers: int = 8,
) -> list[str | None]:
    """Answers in the order of the prompts (functions that make their turns when needed, so that not
    all pictures are in memory at once). None where no answer came; how many, and the last reason,
    is printed. Raises InputError where none came at all, or where the client gives up; what came
    before is cached."""
    answers: list[str | None] = [None] * len(prompts)
    reasons: list[str] = []
    ended = threading.Event()  # by an error that ends the run: nobody asks any more

    def ask(make: Callable[[], Sequence[Turn]]) -> str:
        if ended.is_set():
            raise NoAnswer("the run has ended")
        try:
            return model(make())
        except InputError:
            ended.set()
            raise

    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(ask, make): i for i, make in enumerate(prompts)}
        for future in progress(as_completed(futures), "questions", len(futures)):
            try:
                answers[futures[future]] = future.result()
            except NoAnswer as error:
                reasons.append(str(error))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if reasons and len(reasons) == len(prompts):
        raise InputError(f"none of {len(prompts)} questions was answered ({reasons[-1]})")
    if reasons:
        print(f"{len(reasons)} of {len(prompts)} questions have no answer ({reasons[-1]}); "
              "run the same command again to ask only these")
    return answers
