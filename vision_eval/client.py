"""A client for chat endpoints that speak OpenAI's protocol (vLLM, llama.cpp, hosted ones): pictures and text in, text out. Standard
library only.

    model = ChatClient("http://localhost:8000/v1", "llava", cache="answers.jsonl")
    model([(image, "Is there a dog? Answer with 'Yes' or 'No'.", None)])           # -> "Yes"

Every model here is a callable `model(turns) -> str`, turns = [(image uint8 [H, W, 3] or None, user text, assistant text or None), ...], the
last assistant text None: earlier turns are demonstrations. `plain` makes one of a function f(image, prompt).

Every answer is appended to a JSONL file as soon as it is there, under sha256(model, messages, max_tokens): a run that was interrupted
goes on where it stopped, and nothing is asked twice. 429, 5xx, timeouts, dropped connections and unreadable replies are tried again, after
the pause that the server asks for (Retry-After) or a doubling one; any other 4xx ends the run with the server's message. The key is read
from an environment variable, sent to the given host only (redirects are not followed), and never written anywhere.
"""

import base64
import email.utils
import hashlib
import http.client
import json
import os
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from minilm import InputError
from minilm.results import progress

Turn = tuple[np.ndarray | None, str, str | None]


class NoAnswer(RuntimeError):
    """The endpoint gave no usable answer, as often as it was asked."""


def plain(f: Callable[[np.ndarray | None, str], str]) -> Callable[[Sequence[Turn]], str]:
    """A model made of a function of one picture and one prompt; demonstrations are refused, since it cannot see them."""
    def model(turns: Sequence[Turn]) -> str:
        if len(turns) != 1:
            raise InputError(f"this model reads one picture and one prompt, not {len(turns)} turns: use --baseline none or reminder")
        return f(turns[0][0], turns[0][1])

    return model


# --- what is sent

def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> an RGB PNG: signature, header, the rows (each after a 0: "not filtered") deflated, end."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"a picture to send must be uint8 [H, W, 3], this one is {image.dtype} {image.shape}")
    H, W = image.shape[:2]
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = np.concatenate([np.zeros((H, 1), np.uint8), image.reshape(H, 3 * W)], 1).tobytes()
    header = struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0)  # 8 bits, RGB
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 6)) + chunk(b"IEND", b"")


def to_messages(turns: Sequence[Turn]) -> list[dict]:
    if not turns or turns[-1][2] is not None:
        raise InputError("a prompt needs at least one turn, and its last one must leave the answer open (None)")
    messages = []
    for image, text, reply in turns:
        content = [{"type": "text", "text": text}]
        if image is not None:
            url = "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        messages.append({"role": "user", "content": content})
        if reply is not None:
            messages.append({"role": "assistant", "content": reply})
    return messages


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None  # the reply then counts as an error: the key must not travel to another host


# --- the client

class ChatClient:
    def __init__(self, base_url: str, model: str, cache: str | Path | None = None, key_env: str | None = None, timeout: float = 120,
                 retries: int = 6, pause: float = 1.0, max_tokens: int = 256):
        if not base_url.startswith(("http://", "https://")):
            raise InputError(f"--base-url {base_url!r} must begin with http:// or https://, for example http://localhost:8000/v1")
        if key_env and not os.environ.get(key_env):
            raise InputError(f"the environment variable {key_env} is empty: put the endpoint's key there, or name another one")
        self.url, self.model, self.max_tokens = base_url.rstrip("/") + "/chat/completions", model, max_tokens
        self.timeout, self.retries, self.pause, self.cache = timeout, retries, pause, Path(cache) if cache else None
        self._key = os.environ[key_env] if key_env else None
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._lock, self._answers, self._busy = threading.Lock(), self._read_cache(), {}

    def __call__(self, turns: Sequence[Turn]) -> str:
        """The answer, from the cache or the endpoint. Two threads with one question send it once. Raises NoAnswer, or InputError for a
        request that the server refuses."""
        body = {"model": self.model, "messages": to_messages(turns), "temperature": 0, "max_tokens": self.max_tokens}
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
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self._key}"} if self._key else {})}
        for attempt in range(self.retries + 1):
            wait = min(60.0, self.pause * 2**attempt)
            try:
                with self._opener.open(urllib.request.Request(self.url, body, headers), timeout=self.timeout) as reply:
                    answer = json.loads(reply.read())["choices"][0]["message"]["content"]
                if not isinstance(answer, str):
                    raise TypeError(f"the content is a {type(answer).__name__}")
                return answer
            except urllib.error.HTTPError as error:
                with error:
                    said = self._hide(error.read(2000).decode("utf-8", "replace"))
                if error.code != 429 and error.code < 500:
                    raise InputError(f"the endpoint refused the request ({error.code}): {said or error.reason}") from None
                problem, wait = f"status {error.code}", retry_after(error.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:  # dropped, late, unreadable
                problem = self._hide(f"{type(error).__name__}: {error}")
            if attempt < self.retries:
                time.sleep(wait)
        raise NoAnswer(f"no answer after {self.retries + 1} attempts, the last one: {problem}")

    def _hide(self, text: str) -> str:
        text = " ".join(text.split())
        return text.replace(self._key, "(key)") if self._key else text

    def _read_cache(self) -> dict[str, str]:
        """{key: answer}. A last line that a killed run left half-written is cut off; a broken line elsewhere is an error."""
        if not self.cache or not self.cache.exists():
            return {}
        data, answers = self.cache.read_bytes(), {}
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with open(self.cache, "rb+") as f:
                f.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                answers[row["key"]] = row["answer"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{self.cache}, line {number}, is not a cached answer: remove the line or name another file") from None
        return answers

    def _write_cache(self, key: str, answer: str) -> None:
        if self.cache:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with open(self.cache, "a", encoding="utf-8") as f:
                f.write(json.dumps({"key": key, "answer": answer}) + "\n")
                f.flush()
                os.fsync(f.fileno())


def retry_after(header: str | None, default: float) -> float:
    """Seconds to wait by a Retry-After header (seconds, or a date), at most ten minutes; `default` without a readable one."""
    if not header:
        return default
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return default
    return min(600.0, max(0.0, seconds)) if seconds == seconds else default


def ask_all(model: Callable[[Sequence[Turn]], str], prompts: Sequence[Callable[[], Sequence[Turn]]], workers: int = 8) -> list[str | None]:
    """Answers in the order of the prompts (functions that make their turns when needed, so that not all pictures are in memory at once).
    None where no answer came; how many, and the last reason, is printed. A refused request ends the run; what came before is cached."""
    answers: list[str | None] = [None] * len(prompts)
    failures = []
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(lambda make=make: model(make())): i for i, make in enumerate(prompts)}
        for future in progress(as_completed(futures), "questions", len(futures)):
            try:
                answers[futures[future]] = future.result()
            except NoAnswer as error:
                failures.append(str(error))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if failures:
        print(f"{len(failures)} of {len(prompts)} questions have no answer ({failures[-1]}); run the same command again to ask only these")
    return answers
