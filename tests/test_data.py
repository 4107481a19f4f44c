"""From text to batches: what each function makes of a few tokens that one can follow by
eye, and how it refuses what it cannot use."""

import errno
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from minilm import InputError
from minilm import data
from minilm.data import (
    IGNORE,
    batches,
    collate,
    generator,
    make_folder,
    pack,
    pad,
    prompt_masked,
    random_blocks,
    read_documents,
    read_json,
    read_json_lines,
    read_text,
    read_tokens,
    temporary_name,
    write_atomically,
    write_tokens,
)


def test_a_generator_belongs_to_a_seed_and_a_name():
    draw = lambda seed, name: torch.rand(3, generator=generator(seed, name)).tolist()
    assert draw(0, "init") == draw(0, "init")
    assert len({tuple(draw(seed, name)) for seed in (0, 1) for name in ("init", "order")}) == 4
    # a number to hold every machine to
    assert draw(0, "init")[0] == pytest.approx(0.09622, abs=1e-5)


# --- text

def test_a_folder_is_read_in_sorted_order_and_other_endings_are_left_alone(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("first: é", encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "picture.png").write_bytes(b"\xff\xfe")
    assert read_documents(tmp_path) == ["first: é", "second"]
    assert read_documents(tmp_path / "b.txt") == ["second"]
    (tmp_path / "blank.txt").write_text("\n \n")
    assert "second" in read_documents(tmp_path)  # one blank file does not stop a corpus


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty: give a file with text"),
        (b" \n\t", "is empty"),
        (b"caf\xe9", "is not UTF-8 text .byte 3 is 0xe9, line 1.: convert it"),
    ],
)
def test_a_file_without_readable_text_is_refused_by_name(tmp_path, content, words):
    (tmp_path / "story.txt").write_bytes(content)
    with pytest.raises(InputError, match=f"story.txt {words}"):
        read_text(tmp_path / "story.txt")


def test_a_missing_file_and_a_folder_without_text_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt: no such file"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match="holds no text: no file that ends in .txt, .md, .py"):
        read_documents(tmp_path)


def test_json_lines_come_with_their_places_and_blank_lines_are_left_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n\n{"a": "\u00e9\u2028"}\n', encoding="utf-8")  # U+2028 ends no line
    assert read_json_lines(file) == [
        (f"{file}, line 1", {"a": 1}),
        (f"{file}, line 3", {"a": "\u00e9\u2028"}),
    ]


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"a": "\\ud83d"}', "line 2 holds half a character"),
        (b'{"a": 1', "line 2 is not valid JSON"),
        (b"[1]", "line 2 holds a list"),
        (b"[" * 100_000, "line 2 is not valid JSON"),
        (b'"caf\xe9"', "is not UTF-8 text .byte 13 is 0xe9, line 2"),
    ],
)
def test_a_line_that_is_no_record_is_named_with_its_number(tmp_path, line, words):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(InputError, match=f"rows.jsonl,? {words}"):
        read_json_lines(tmp_path / "rows.jsonl")


def test_json_nested_beyond_measure_is_refused_like_any_other_damage(tmp_path):
    (tmp_path / "deep.json").write_text('{"a":' * 100_000)
    with pytest.raises(InputError, match="deep.json is not valid JSON"):
        read_json(tmp_path / "deep.json")


# --- whole files

def save_text(text):
    return lambda path: path.write_text(text)


def test_of_two_that_write_one_file_at_once_each_leaves_it_whole(tmp_path):
    file = tmp_path / "file"

    def slow(path):  # while it writes, another comes, writes the same file and leaves
        path.write_text("half of")
        write_atomically(file, save_text("theirs"))
        assert file.read_text() == "theirs"
        path.write_text("mine")

    write_atomically(file, slow)
    assert file.read_text() == "mine" and os.listdir(tmp_path) == ["file"]


def test_a_save_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    file = tmp_path / "file"
    write_atomically(file, save_text("old"))
    for error in (RuntimeError("a library's own words"), KeyboardInterrupt()):
        def fail(path, error=error):
            path.write_text("half")
            raise error

        with pytest.raises(type(error)):
            write_atomically(file, fail)
        assert file.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_said_with_the_file_s_name(tmp_path):
    def fill(path):
        with open("/dev/full", "w") as f:
            f.write("x" * 10**6)

    with pytest.raises(OSError, match="No space left on device: .*training.pt'$") as error:
        write_atomically(tmp_path / "training.pt", fill)
    assert error.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


def test_a_full_disk_is_said_also_where_a_library_says_something_else(tmp_path, monkeypatch):
    def fail(path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    with pytest.raises(RuntimeError, match="inline_container"):
        write_atomically(tmp_path / "training.pt", fail)  # there is room: not the disk's fault
    monkeypatch.setattr(
        data.shutil, "disk_usage", lambda path: data.shutil._ntuple_diskusage(10**9, 10**9, 0)
    )
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(tmp_path / "training.pt", fail)


def test_the_next_save_removes_what_a_killed_one_left_but_not_what_another_still_writes(tmp_path):
    file, gone = tmp_path / "file", subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    running, elsewhere, other = (
        temporary_name(file),
        temporary_name(file),
        temporary_name(tmp_path / "file2"),
    )
    killed = running.with_name(running.name.replace(f".{os.getpid()}@", f".{gone.pid}@"))
    # of another machine: it cannot be asked
    elsewhere = elsewhere.with_name(elsewhere.name.replace("@", "@another-"))
    for path in (running, killed, elsewhere, other):
        path.touch()
    write_atomically(file, save_text("new"))
    assert set(tmp_path.iterdir()) == {file, running, elsewhere, other}
    os.utime(elsewhere, (time.time() - 4000,) * 2)
    write_atomically(file, save_text("new"))
    assert set(tmp_path.iterdir()) == {file, running, other}


def test_a_file_that_a_reader_has_mapped_is_moved_aside_where_it_cannot_be_replaced(
    tmp_path, monkeypatch
):
    file, replace = tmp_path / "file", os.replace
    write_atomically(file, save_text("old"))

    def windows(source, target):
        if Path(target).exists():
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(data.os, "replace", windows)
    write_atomically(file, save_text("new"))
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_a_file_is_saved_without_the_calls_that_windows_lacks(tmp_path, monkeypatch):
    for name in ("fchmod", "fchown", "geteuid", "getuid", "fork", "statvfs", "uname"):
        monkeypatch.delattr(os, name, raising=False)
    write_atomically(tmp_path / "file", save_text("new"))
    assert (tmp_path / "file").read_text() == "new"


def test_a_folder_appears_whole_or_not_at_all_and_the_first_of_two_stays(tmp_path):
    folder = tmp_path / "folder"

    def fail(path):
        write_atomically(path / "one", save_text("1"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_folder(folder, fail)
    assert os.listdir(tmp_path) == []
    for content, replace, expected in (
        ("first", False, "first"),
        ("second", False, "first"),
        ("third", True, "third"),
    ):
        make_folder(
            folder,
            lambda path, content=content: write_atomically(path / "one", save_text(content)),
            replace,
        )
        assert (folder / "one").read_text() == expected and os.listdir(tmp_path) == ["folder"]


# --- token files

def test_a_token_file_that_is_empty_cut_or_no_token_file_is_named(tmp_path):
    write_tokens(tmp_path / "t.npy", range(100), 100)
    np.savez(tmp_path / "t.npz", np.zeros(3))
    whole, archive = ((tmp_path / name).read_bytes() for name in ("t.npy", "t.npz"))
    for content in (b"", b"hello", whole[:-9], archive):
        (tmp_path / "t.npy").write_bytes(content)
        with pytest.raises(InputError, match="t.npy (is damaged|holds no tokens)"):
            read_tokens(tmp_path / "t.npy")


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_tokens_come_back_memory_mapped_in_the_smallest_type_that_holds_the_vocabulary(
    tmp_path, vocab_size, dtype
):
    write_tokens(
        tmp_path / "folder" / "t.npy", (i % vocab_size for i in (0, 1, vocab_size - 1)), vocab_size
    )
    tokens = read_tokens(tmp_path / "folder" / "t.npy")
    assert isinstance(tokens, np.memmap) and tokens.dtype == dtype
    assert tokens.tolist() == [0, 1, vocab_size - 1]
    # no temporary file is left
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["t.npy"]


def test_random_blocks_are_windows_whose_labels_are_the_next_tokens_and_every_window_is_drawn():
    ids, labels = random_blocks(
        np.arange(10, dtype=np.uint16), block=4, batch=500, gen=generator(0, "order")
    )
    assert ids.dtype == labels.dtype == torch.int64 and ids.shape == (500, 4)
    assert torch.equal(labels, ids + 1)
    assert set(ids[:, 0].tolist()) == {0, 1, 2, 3, 4, 5} and labels.max() == 9
    with pytest.raises(InputError, match="the text has 4 tokens, one block needs 5"):
        random_blocks(np.arange(4), block=4, batch=1, gen=generator(0, "order"))


def test_packing_by_hand():
    rows = pack([[1, 2, 3], [4], [5, 6]], block=4, end=0)
    assert rows.tolist() == [[1, 2, 3, 0], [4, 0, 5, 6]]  # the last 0 fills no row
    with pytest.raises(InputError, match="have 2 tokens, one block needs 4"):
        pack([[1]], block=4, end=0)


# --- examples

def test_padding_by_hand():
    ids, mask = pad([[7, 8, 9], [5]], value=1)
    assert ids.tolist() == [[7, 8, 9], [5, 1, 1]] and mask.tolist() == [
        [True] * 3,
        [True, False, False],
    ]
    ids, mask = pad([[7, 8, 9], [5]], left=True)
    assert ids.tolist() == [[7, 8, 9], [0, 0, 5]] and mask.tolist() == [
        [True] * 3,
        [False, False, True],
    ]


def test_the_prompt_is_read_and_only_the_answer_is_learned():
    inputs, labels = prompt_masked([([5, 6], [7, 8]), ([1], [2]), ([3, 4], [])])
    assert inputs.tolist() == [[5, 6, 7], [1, 0, 0], [3, 0, 0]]
    assert labels.tolist() == [[IGNORE, 7, 8], [2, IGNORE, IGNORE], [IGNORE] * 3]


def test_an_empty_prompt_is_refused_because_nothing_would_predict_the_first_answer_token():
    with pytest.raises(
        InputError, match="example 1 has an empty prompt: put BOS before the answer"
    ):
        prompt_masked([([1], [2]), ([], [7, 8])])


def test_collate_pads_inputs_with_the_pad_token_and_labels_with_ignore():
    inputs, labels = collate([([1, 2], [2, 3]), ([4], [5])], pad_id=9)
    assert inputs.tolist() == [[1, 2], [4, 9]] and labels.tolist() == [[2, 3], [5, IGNORE]]


def test_every_epoch_visits_every_example_once_in_a_fresh_order():
    drawn = [b.tolist() for b in batches(10, 4, generator(0, "order"), steps=6)]
    assert [len(b) for b in drawn] == [4, 4, 2, 4, 4, 2]
    first, second = (list(itertools.chain(*part)) for part in (drawn[:3], drawn[3:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    # endless when no number of steps is given
    again = itertools.islice(batches(10, 4, generator(0, "order")), 6)
    assert [b.tolist() for b in again] == drawn
    with pytest.raises(InputError, match="no examples"):
        next(batches(0, 4, generator(0, "order")))


def test_a_file_gets_the_permissions_of_the_users_umask_whoever_writes_it(tmp_path):
    for umask in (0o022, 0o077):
        old = os.umask(umask)
        write_tokens(tmp_path / f"new{umask}" / "tokens.npy", [1, 2], 10)
        # as safetensors leaves its files
        write_atomically(tmp_path / "private", lambda path: path.chmod(0o600))
        os.umask(old)
        assert (tmp_path / f"new{umask}" / "tokens.npy").stat().st_mode & 0o777 == 0o666 & ~umask
        assert (tmp_path / "private").stat().st_mode & 0o777 == 0o666 & ~umask
