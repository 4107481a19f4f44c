"""From text to batches: memory-mapped token files, packing, prompt-masked examples, and the random generators that order them."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from minilm import InputError

IGNORE = -100  # a label that no loss counts (torch's own default)


def generator(seed: int, name: str) -> torch.Generator:
    """A random generator of its own for every purpose ("init", "order"): one more draw, or one more arm, moves no other number."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


def read_text(path: str | Path) -> str:
    """The text of one UTF-8 file. Raises InputError, naming the file, when it is empty or not UTF-8."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; give an existing UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}): "
                         "convert it, for example with iconv") from None
    if not text.strip():
        raise InputError(f"{path} is empty: give a file with text")
    return text


def read_documents(path: str | Path, endings: Sequence[str] = (".txt", ".md", ".py")) -> list[str]:
    """A file is one document; a folder is all its files with one of the endings that are not blank, in sorted order."""
    path = Path(path)
    if not path.is_dir():
        return [read_text(path)]
    files = sorted(p for p in path.rglob("*") if p.suffix in endings and p.is_file() and p.read_bytes().strip())
    if not files:
        raise InputError(f"{path} holds no text: no file that ends in {', '.join(endings)}")
    return [read_text(p) for p in files]


def read_json(file: Path) -> dict:
    """The JSON object in a file. Raises FileNotFoundError or InputError, naming the file."""
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: give a folder in Hugging Face layout (config.json, model.safetensors, tokenizer.json)")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} is not valid JSON ({error}): download or save it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{file} holds a {type(value).__name__}, a JSON object is needed")
    return value


@contextlib.contextmanager
def reading(file: Path):
    """Around code that takes a file's values for what they should be; where they are not, an InputError names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise error if str(error).startswith(str(file.parent)) else InputError(f"{file}: {error}") from None
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{file} holds a value of a kind that is not read ({why}): download or save it again") from error


def write_json(file: Path, value) -> None:
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, save: Callable[[Path], object]) -> None:
    """save(temporary path), flush to disk, rename: a process killed at any moment leaves the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.touch()
    mode = temporary.stat().st_mode  # as the user's umask has it; safetensors makes files that only their owner can read
    save(temporary)
    with open(temporary, "rb+") as f:
        os.fchmod(f.fileno(), mode)
        os.fsync(f.fileno())
    os.replace(temporary, path)


# --- token files

def write_tokens(path: Path, tokens: Iterable[int], vocab_size: int) -> None:
    """One flat .npy array, uint16 if the vocabulary fits (else uint32), that `np.load(mmap_mode="r")` maps. Renamed into place."""
    array = np.fromiter(tokens, dtype=np.uint16 if vocab_size <= 2**16 else np.uint32)

    def save(temporary):
        with open(temporary, "wb") as f:  # (given a name, np.save would add an ending to it)
            np.save(f, array)
    write_atomically(path, save)


def read_tokens(path: Path) -> np.ndarray:
    """The tokens of `write_tokens`, memory-mapped: any part is read from disk when it is used."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def random_blocks(tokens: np.ndarray, block: int, batch: int, gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`batch` windows at random places -> inputs, labels, both int64 [batch, block]; labels are the inputs' next tokens."""
    if len(tokens) <= block:
        raise InputError(f"the text has {len(tokens)} tokens, one block needs {block + 1}: give more text or a smaller block")
    starts = torch.randint(len(tokens) - block, (batch,), generator=gen).tolist()
    rows = torch.from_numpy(np.stack([tokens[s : s + block + 1] for s in starts]).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def pack(documents: Iterable[Sequence[int]], block: int, end: int) -> torch.Tensor:
    """Documents, each followed by the token `end`, one after the other and cut into rows -> int64 [rows, block]; the rest is dropped."""
    stream = [token for document in documents for token in (*document, end)]
    if len(stream) < block:
        raise InputError(f"the documents have {len(stream)} tokens, one block needs {block}: give more text or a smaller block")
    return torch.tensor(stream[: len(stream) // block * block]).view(-1, block)


# --- examples

def pad(rows: Sequence[Sequence[int]], value: int = 0, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids -> ids int64 [B, T], filled up with `value` on the right (or left), and mask bool [B, T], True at real tokens."""
    T = max(map(len, rows))
    ids, mask = torch.full((len(rows), T), value), torch.zeros(len(rows), T, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(T - len(row), T) if left else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.int64), True
    return ids, mask


def collate(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, labels) lists of ids -> two tensors [B, T], padded on the right; padding is never a target."""
    return pad([inputs for inputs, _ in rows], pad_id)[0], pad([labels for _, labels in rows], IGNORE)[0]


def prompt_masked(examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt, answer) pairs of ids -> inputs, labels [B, T]: the prompt is read, only the answer is learned.

        prompt = [5, 6], answer = [7, 8]  ->  inputs [5, 6, 7], labels [IGNORE, 7, 8]"""
    for i, (prompt, _) in enumerate(examples):
        if not len(prompt):
            raise InputError(f"example {i} has an empty prompt: put BOS before the answer, or nothing predicts its first token")
    return collate([([*prompt, *answer][:-1], [*[IGNORE] * (len(prompt) - 1), *answer]) for prompt, answer in examples])


def batches(n: int, batch: int, gen: torch.Generator, steps: int | None = None) -> Iterator[torch.Tensor]:
    """Index tensors [<= batch] that visit 0..n-1 in a fresh random order every epoch; endless, or `steps` of them."""
    if n == 0:
        raise InputError("there are no examples to draw batches from")
    done = 0
    while True:
        for indices in torch.randperm(n, generator=gen).split(batch):
            if steps is not None and done == steps:
                return
            done += 1
            yield indices
