"""From text to batches: whole files, memory-mapped token files, packing, prompt-masked examples,
and the random generators that order them."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from minilm import InputError

IGNORE = -100  # a label that no loss counts (torch's own default)


def generator(seed: int, name: str) -> torch.Generator:
    """A random generator of its own for every purpose ("init", "order"): one more draw, or one more
    arm, moves no other number."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


def find_checkpoint(name: str | Path) -> Path:
    """A folder, a FILE.gguf, or a name such as Qwen/Qwen3-0.6B -> what is on this disk: the path as
    it is, or that model's folder in Hugging Face's cache (its one .gguf file, if it holds nothing
    else). Nothing is downloaded; FileNotFoundError names the command that does."""
    path = Path(name)
    if path.is_dir() or path.suffix == ".gguf":
        return path
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise FileNotFoundError(
            f"{name}: no such folder; --checkpoint takes a Hugging Face folder (config.json, "
            "model.safetensors), a .gguf file, or the name of a model in Hugging Face's cache")
    model = cache / ("models--" + str(name).replace("/", "--"))
    current = model / "refs" / "main"
    snapshot = model / "snapshots" / (current.read_text().strip() if current.is_file() else "")
    if not current.is_file() or not snapshot.is_dir():
        raise FileNotFoundError(f"{name}: no such folder, and not in Hugging Face's cache "
                                f"({cache}): fetch it with: hf download {name}")
    files = list(snapshot.glob("*.gguf"))
    alone = len(files) == 1 and not (snapshot / "config.json").exists()
    return files[0] if alone else snapshot


def read_text(path: str | Path) -> str:
    """The text of one UTF-8 file. Raises InputError, naming the file, when it is empty or not
    UTF-8."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; give an existing UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path} is not UTF-8 text (byte {error.start} is 0x{byte:02x}, "
                         f"line {line}): convert it, for example with iconv") from None
    if not text.strip():
        raise InputError(f"{path} is empty: give a file with text")
    return text


def read_documents(path: str | Path, endings: Sequence[str] = (".txt", ".md", ".py")) -> list[str]:
    """A file is one document; a folder is all its files with one of the endings that are not blank,
    in sorted order."""
    path = Path(path)
    if not path.is_dir():
        return [read_text(path)]
    files = [p for p in sorted(path.rglob("*")) if p.suffix in endings and p.is_file()]
    files = [p for p in files if p.read_bytes().strip()]
    if not files:
        raise InputError(f"{path} holds no text: no file that ends in {', '.join(endings)}")
    return [read_text(p) for p in files]


def read_json(file: Path) -> dict:
    """The JSON object in a file. Raises FileNotFoundError or InputError, naming the file."""
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: give a folder in Hugging Face layout "
                                "(config.json, model.safetensors, tokenizer.json)")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON ({error}): download or save it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{file} holds a {type(value).__name__}, a JSON object is needed")
    return value


def read_json_lines(file: str | Path) -> list[tuple[str, dict]]:
    """The JSON objects of a .jsonl file, one a line (blank lines are left out), each with its place
    "FILE, line 3", for whoever finds fault with its fields. Raises InputError, naming file and
    line, for what is no JSON object and for half a character (JSON can spell one: "\\ud800")."""
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"{where} holds half a character (a lone surrogate): "
                             "correct it") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{where} is not valid JSON ({error}): correct it") from None
        if not isinstance(row, dict):
            raise InputError(f"{where} holds a {type(row).__name__}, a JSON object is needed")
        rows.append((where, row))
    return rows


@contextlib.contextmanager
def reading(file: Path):
    """Around code that takes a file's values for what they should be; where they are not, an
    InputError names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            named = str(error).startswith(str(file.parent))
            raise error if named else InputError(f"{file}: {error}") from None
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{file} holds a value of a kind that is not read ({why}): "
                         "download or save it again") from error


def write_json(file: Path, value) -> None:
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))


# --- files and folders that are whole or not there

def write_atomically(path: Path, save: Callable[[Path], object]) -> None:
    """save(temporary path), flush to disk, rename: a process killed at any moment leaves the old
    file or the new one, never half of it; of several that write it at once, the last one's stays.
    A save that fails takes its temporary file with it; one that was killed leaves it to the next
    save of that file. Raises OSError with the file's name, also where a library that writes has
    other words for a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = temporary_name(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user's umask has it: safetensors makes its files
        save(temporary)                  # readable for their owner only
        temporary.chmod(mode)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        _replace(temporary, path)
    except Exception as error:
        full = shutil.disk_usage(path.parent).free < 2**16
        number = errno.ENOSPC if full else getattr(error, "errno", None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    try:
        os.replace(temporary, path)
    except PermissionError:  # Windows, where a file that is mapped can be moved but not replaced
        if not path.is_file():
            raise
        aside = temporary_name(path)
        os.replace(path, aside)
        os.replace(temporary, path)
        with contextlib.suppress(PermissionError):
            aside.unlink()


def make_folder(path: Path, fill: Callable[[Path], object], replace: bool = False) -> None:
    """fill(temporary folder), rename: the folder is complete or absent. One that is there already,
    since another process was faster, stays, or makes room with `replace`."""
    remove_leftovers(path)
    temporary, aside = temporary_name(path), temporary_name(path)
    try:
        fill(temporary)
        if replace:
            with contextlib.suppress(OSError):  # another process was faster to remove it
                path.rename(aside)
        temporary.rename(path)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process takes, here or on another machine, and no other
    call."""
    unique = f"{os.getpid()}@{platform.node()}.{os.urandom(4).hex()}"
    return path.with_name(f"{path.name}.{unique}.tmp")


def remove_leftovers(path: Path) -> None:
    """Removes what processes that are gone left under temporary names of this file or folder; where
    that cannot be asked (another machine, Windows), what was not touched for an hour."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*@*.tmp"):
        process, _, rest = left.name.removeprefix(f"{path.name}.").partition("@")
        here = rest.startswith(f"{platform.node()}.") and os.name == "posix"
        with contextlib.suppress(OSError, ValueError):  # somebody else was faster; no name of ours
            gone = not _runs(int(process)) if here else time.time() - left.stat().st_mtime > 3600
            if gone and left.is_dir():
                shutil.rmtree(left)
            elif gone:
                left.unlink()


def _runs(process: int) -> bool:
    """Is there a process of this number? (Signal 0 only asks; on Windows it would end it.)"""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


# --- token files

def write_tokens(path: Path, tokens: Iterable[int], vocab_size: int) -> None:
    """One flat .npy array, uint16 if the vocabulary fits (else uint32), that
    `np.load(mmap_mode="r")` maps. Renamed into place."""
    array = np.fromiter(tokens, dtype=np.uint16 if vocab_size <= 2**16 else np.uint32)

    def save(temporary):
        with open(temporary, "wb") as f:  # (given a name, np.save would add an ending to it)
            np.save(f, array)
    write_atomically(path, save)


def read_tokens(path: Path) -> np.ndarray:
    """The tokens of `write_tokens`, memory-mapped: any part is read from disk when it is used.
    Raises InputError, naming the file, when it is empty, cut, or no such file of numbers."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it, and it is made again") from None
    if not isinstance(tokens, np.memmap) or tokens.ndim != 1:
        raise InputError(f"{path} holds no tokens: remove it, and it is made again")
    return tokens


def random_blocks(tokens: np.ndarray, block: int, batch: int,
                  gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`batch` windows at random places -> inputs, labels, both int64 [batch, block]; labels are the
    inputs' next tokens."""
    if len(tokens) <= block:
        raise InputError(f"the text has {len(tokens)} tokens, one block needs {block + 1}: "
                         "give more text or a smaller block")
    starts = torch.randint(len(tokens) - block, (batch,), generator=gen).tolist()
    rows = np.stack([tokens[s : s + block + 1] for s in starts]).astype(np.int64)
    rows = torch.from_numpy(rows)
    return rows[:, :-1], rows[:, 1:]


def pack(documents: Iterable[Sequence[int]], block: int, end: int) -> torch.Tensor:
    """Documents, each followed by the token `end`, one after the other and cut into rows -> int64
    [rows, block]; the rest is dropped."""
    stream = [token for document in documents for token in (*document, end)]
    if len(stream) < block:
        raise InputError(f"the documents have {len(stream)} tokens, one block needs {block}: "
                         "give more text or a smaller block")
    return torch.tensor(stream[: len(stream) // block * block]).view(-1, block)


# --- examples

def pad(rows: Sequence[Sequence[int]], value: int = 0,
        left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids -> ids int64 [B, T], filled up with `value` on the right (or left), and mask
    bool [B, T], True at real tokens."""
    T = max(map(len, rows))
    ids = torch.full((len(rows), T), value)
    mask = torch.zeros(len(rows), T, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(T - len(row), T) if left else slice(len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.int64)
        mask[i, place] = True
    return ids, mask


def collate(rows: Sequence[tuple[Sequence[int], Sequence[int]]],
            pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, labels) lists of ids -> two tensors [B, T], padded on the right; padding is never a
    target."""
    inputs, _ = pad([inputs for inputs, _ in rows], pad_id)
    labels, _ = pad([labels for _, labels in rows], IGNORE)
    return inputs, labels


def prompt_masked(examples: Sequence[tuple[Sequence[int], Sequence[int]]]
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt, answer) pairs of ids -> inputs, labels [B, T]: the prompt is read, only the answer
    is learned.

        prompt = [5, 6], answer = [7, 8]  ->  inputs [5, 6, 7], labels [IGNORE, 7, 8]"""
    rows = []
    for i, (prompt, answer) in enumerate(examples):
        if not len(prompt):
            raise InputError(f"example {i} has an empty prompt: put BOS before the answer, "
                             "or nothing predicts its first token")
        inputs = [*prompt, *answer][:-1]
        labels = [*[IGNORE] * (len(prompt) - 1), *answer]
        rows.append((inputs, labels))
    return collate(rows)


def batches(n: int, batch: int, gen: torch.Generator,
            steps: int | None = None) -> Iterator[torch.Tensor]:
    """Index tensors [<= batch] that visit 0..n-1 in a fresh random order every epoch; endless, or
    `steps` of them."""
    if n == 0:
        raise InputError("there are no examples to draw batches from")
    done = 0
    while True:
        for indices in torch.randperm(n, generator=gen).split(batch):
            if steps is not None and done == steps:
                return
            done += 1
            yield indices
