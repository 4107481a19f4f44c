"""Reading RadioML files: hand-made streams of the published form, hostile ones, wrong shapes. No
real file is needed."""

import pickle
import sys
from collections import OrderedDict

import numpy as np
import pytest

from minilm import InputError
from signals.radioml import (
    CLASSES_2018,
    check_array,
    from_2018,
    from_npz,
    from_pickle,
    normalise,
    read_pickle,
    read_signals,
    split,
)


def latin(raw):
    """Bytes as Python 2 wrote a str in protocol 0."""
    return b"'" + b"".join(b"\\x%02x" % byte for byte in raw) + b"'"


def python2_stream(cells):
    """The text of a protocol-0 pickle as Python 2 and an old numpy wrote it:
    {(class, SNR): float32 [n, 2, N]}."""
    text = b"(dp0\n"
    for (name, snr), x in cells.items():
        shape = b"".join(b"I%d\n" % size for size in x.shape)
        text += b"(S'" + name.encode() + b"'\nI%d\nt" % snr
        text += (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n("
            + shape
            + b"t"
        )
        text += (
            b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS"
            + latin(x.tobytes())
            + b"\ntbs"
        )
    return text + b"."


@pytest.fixture
def cells():
    draw = np.random.default_rng(0)
    return {
        (name, snr): draw.standard_normal((2, 2, 8)).astype(np.float32)
        for name, snr in (("QPSK", 2), ("BPSK", -4))
    }


def test_a_python_2_pickle_is_read_and_comes_back_bit_for_bit(cells, tmp_path):
    path = tmp_path / "RML2016.10a_dict.pkl"
    path.write_bytes(python2_stream(cells))
    read = read_pickle(path)
    assert set(read) == set(cells)
    for key, x in cells.items():
        assert np.array_equal(read[key], x)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_any_protocol_and_either_kind_of_key_is_read(protocol, cells, tmp_path):
    path = tmp_path / "RML2016.10b.dat"
    path.write_bytes(
        pickle.dumps(
            {(name.encode(), np.int64(snr)): x for (name, snr), x in cells.items()}, protocol
        )
    )
    data = from_pickle(path, -20, 18)
    assert (
        data.classes == ("BPSK", "QPSK")
        and data.y.tolist() == [0, 0, 1, 1]
        and data.snr.tolist() == [-4, -4, 2, 2]
    )
    np.testing.assert_allclose((data.x**2).sum(1).mean(1), 1, rtol=1e-5)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_ordered_dictionary_of_arrays_is_as_harmless_as_a_plain_one(protocol, cells, tmp_path):
    path = tmp_path / "ordered.pkl"
    path.write_bytes(pickle.dumps(OrderedDict(cells), protocol))
    read = read_pickle(path)
    assert all(np.array_equal(read[key], x) for key, x in cells.items())


class Runs:
    """What an attacker puts into a pickle: a call that is made when the file is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function, argument",
    [(eval, "open('{}', 'w').close()"), (exec, "open('{}', 'w').close()"), (open, "{}")],
)
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(
    function, argument, tmp_path
):
    path, mark = tmp_path / "bad.pkl", tmp_path / "it_ran"
    arguments = [argument.format(mark)] + (["w"] if function is open else [])
    path.write_bytes(pickle.dumps({("QPSK", 2): Runs(function, *arguments)}))
    with pytest.raises(InputError, match="refused"):
        read_pickle(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "stream",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cposix\nsystem\n(S'true'\ntR.",
        b"cbuiltins\ngetattr\n(tR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'no such code'\ntR.",
        b"",
        b"hello",
        b"(dp0\n",
        b"\x80\x04\x95",
    ],
)
def test_raw_hostile_and_broken_streams_are_refused(stream, tmp_path):
    path = tmp_path / "bad.pkl"
    path.write_bytes(stream)
    with pytest.raises(InputError):
        read_pickle(path)


@pytest.mark.parametrize(
    "function, arguments",
    [
        (np.ndarray, ((1,), "O", b"A" * 8)),  # eight bytes of the file as the address of an object
        (np.dtype, ("O",)),
        (np.dtype, ([("a", "O")],)),
    ],
)
def test_no_bytes_of_a_pickle_become_addresses(function, arguments, tmp_path):
    """Whoever looks at such an array, as OrderedDict(array) would, ends the process."""
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps({("QPSK", 2): Runs(function, *arguments)}))
    with pytest.raises(InputError, match="refused"):
        read_pickle(path)


def test_what_a_pickled_type_says_of_its_own_making_is_not_believed(cells, tmp_path):
    """Flags 63: "these numbers are addresses of objects", as numpy would take them to be."""
    stream = python2_stream(cells)
    honest, lie = b"NNNI-1\nI-1\nI0\ntb", b"NNNI-1\nI-1\nI63\ntb"
    assert stream.count(honest) == len(cells)
    path = tmp_path / "lies.pkl"
    path.write_bytes(stream.replace(honest, lie))
    read = read_pickle(path)
    assert all(np.array_equal(read[key], x) for key, x in cells.items())


@pytest.mark.parametrize(
    "value, words",
    [
        ([1, 2], "list"),
        ({}, "dict"),
        ({"QPSK": np.ones((1, 2, 8))}, "pair"),
        ({("QPSK", 2): np.ones((3, 8, 2))}, "transpose"),
        ({("QPSK", 2): np.ones((2, 8))}, r"\[2, 8\]"),
        ({("QPSK", 2): np.ones((1, 2, 8), int)}, "int64"),
        ({("QPSK", 2): "no"}, "str"),
        ({("QPSK", 2): np.full((1, 2, 8), np.nan)}, "NaN"),
        ({("QPSK", 2): np.array([[["a"]]], dtype=object)}, "object"),
        ({("QPSK", 2): np.ones((1, 2, 8)), ("QPSK", 4): np.ones((1, 2, 9))}, "lengths"),
    ],
)
def test_a_pickle_of_something_else_is_refused_in_words(value, words, tmp_path):
    path = tmp_path / "other.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(InputError, match=words):
        read_pickle(path)


def test_an_empty_choice_names_what_there_is(cells, tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(cells))
    with pytest.raises(InputError, match="-4, 2"):
        from_pickle(path, 10, 18)
    with pytest.raises(InputError, match="BPSK, QPSK"):
        from_pickle(path, -20, 18, ("OFDM",))
    assert from_pickle(path, -20, 18, ("QPSK",)).classes == ("QPSK",)


def test_normalising_makes_unit_power_also_of_tiny_signals_and_refuses_silence():
    x = np.array([[[3e-30, 0], [0, 4e-30]], [[1, 1], [1, 1]]], np.float32)
    np.testing.assert_allclose((normalise(x, "x") ** 2).sum(1).mean(1), 1, rtol=1e-6)
    with pytest.raises(InputError, match="1 signals are zero"):
        normalise(x * np.array([1, 0], np.float32)[:, None, None], "x")
    with pytest.raises(InputError, match="float"):
        check_array(x + 1j, "x")


def file_2018():
    """A miniature of GOLD_XYZ_OSC.0001_1024.hdf5, its rows in an order of their own."""
    draw = np.random.default_rng(1)
    label, snr = draw.integers(0, 24, 500), draw.choice([-20, 0, 10, 30], 500)
    X = draw.standard_normal((500, 16, 2)).astype(np.float32)
    X[:, 0, 0] = 100 + label  # the largest sample tells the class
    return {"X": X, "Y": np.eye(24, dtype=np.int64)[label], "Z": snr[:, None]}


def test_2018_rows_keep_their_labels_whatever_their_order_in_the_file():
    file = file_2018()
    data = from_2018(file, 0, 10, ("QPSK", "OOK"))
    label, snr = file["Y"].argmax(1), file["Z"][:, 0]
    assert data.classes == ("QPSK", "OOK") and len(data.y) == np.sum(
        np.isin(label, [0, 4]) & np.isin(snr, [0, 10])
    )
    for x, y, level in zip(
        data.x, data.y, data.snr
    ):  # find each signal again, by its shape, in the file
        original = file["X"].transpose(0, 2, 1)
        scale = np.einsum("cn,rcn->r", x, original) / np.sqrt(
            (x**2).sum() * (original**2).sum((1, 2))
        )
        row = scale.argmax()
        assert (
            scale[row] > 0.99999
            and CLASSES_2018[label[row]] == data.classes[y]
            and snr[row] == level
        )
    assert (
        max(
            np.unique(np.stack([d.y, d.snr]), axis=1, return_counts=True)[1].max()
            for d in [from_2018(file, -20, 30, limit=2)]
        )
        == 2
    )
    with pytest.raises(InputError, match="-20, 0, 10, 30"):
        from_2018(file, 11, 12)
    with pytest.raises(InputError, match="24"):
        from_2018(file | {"Y": file["Y"][:, :5]}, 0, 10)


def test_hdf5_needs_h5py_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "gold.hdf5").write_bytes(b"x")
    with pytest.raises(InputError, match="pip install h5py"):
        read_signals("rml2018", str(tmp_path / "gold.hdf5"), 0, 10)


def test_a_real_hdf5_file_reads_like_the_arrays_in_it(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "gold.hdf5", "w") as f:
        for name, array in file_2018().items():
            f[name] = array
    read, direct = (
        read_signals("rml2018", str(tmp_path / "gold.hdf5"), 0, 30),
        from_2018(file_2018(), 0, 30),
    )
    assert np.array_equal(read.x, direct.x) and np.array_equal(read.y, direct.y)
    (tmp_path / "bad.hdf5").write_bytes(b"not hdf5")
    with pytest.raises(InputError, match="2018"):
        read_signals("rml2018", str(tmp_path / "bad.hdf5"), 0, 10)


def test_your_own_npz_is_read_with_and_without_names_and_snrs(tmp_path):
    x, y = np.random.default_rng(2).standard_normal((6, 2, 8)), np.array([0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / "plain.npz", x=x, y=y)
    plain = read_signals("npz", str(tmp_path / "plain.npz"), 10, 18)
    assert (
        plain.classes == ("0", "1", "2")
        and plain.snr.tolist() == [0] * 6
        and plain.x.dtype == np.float32
    )
    np.savez(tmp_path / "full.npz", x=x, y=y, snr=[10, 10, 20, 10, 10, 20], classes=["a", "b", "c"])
    full = from_npz(tmp_path / "full.npz", 10, 18, ("b", "a"))
    assert full.classes == ("b", "a") and full.y.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"x": np.ones((2, 2, 8))}, "lacks y"),
        ({"x": np.ones((2, 2, 8)), "y": [0.5, 1]}, "labels"),
        ({"x": np.ones((2, 2, 8)), "y": [0]}, "labels"),
        ({"x": np.ones((2, 8, 2)), "y": [0, 1]}, "transpose"),
        ({"x": np.ones((2, 2, 8)), "y": [0, 1], "classes": ["a"]}, "no name"),
        ({"x": np.ones((2, 2, 8)), "y": [0, 1], "snr": [1]}, "snr"),
        ({"x": np.ones((0, 2, 8)), "y": np.zeros(0, int)}, "no signals"),
        ({"x": np.ones((2, 2, 8)), "y": [0, 1], "classes": "a"}, "a list of names"),
        ({"x": np.ones((2, 2, 8)), "y": [0, 1], "classes": ["a", "a"]}, "a twice"),
        ({"x": np.ones((2, 2, 8)), "y": [0, 1], "snr": [1, np.nan]}, "finite"),
        ({"x": np.ones((2, 2, 8)), "y": [0, 1], "snr": ["1", "2"]}, "finite"),
    ],
)
def test_wrong_npz_files_are_refused_in_words(arrays, words, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=words):
        from_npz(tmp_path / "x.npz", 0, 10)


def test_an_npz_with_objects_or_no_zip_at_all_is_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", x=np.array([Runs(print, "x")], dtype=object), y=[0])
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "array", np.ones(3))  # an .npy under an .npz's name
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    squeezed = tmp_path / "squeezed.npz"
    np.savez_compressed(squeezed, x=np.random.default_rng(0).standard_normal((9, 2, 9)))
    data = bytearray(squeezed.read_bytes())
    start = 30 + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
    data[start] = 7  # the header's length, a name's, an extra field's: a block of no known kind
    squeezed.write_bytes(data)
    for name in ("objects.npz", "text.npz", "empty.npz", "array.npz", "squeezed.npz"):
        with pytest.raises(InputError, match="plain arrays"):
            from_npz(tmp_path / name, 0, 10)


def test_a_missing_path_is_said_in_one_line(tmp_path):
    with pytest.raises(InputError, match="--path"):
        read_signals("npz", None, 0, 10)
    with pytest.raises(FileNotFoundError, match="not shipped"):
        read_signals("rml2016a", str(tmp_path / "no.pkl"), 0, 10)
    with pytest.raises(FileNotFoundError) as error:  # a file of the user's own
        read_signals("npz", str(tmp_path / "no.npz"), 0, 10)
    assert "RadioML" not in str(error.value)


def test_a_class_without_a_signal_at_the_wanted_snrs_is_named(tmp_path):
    x, y = np.ones((4, 2, 8)), [0, 0, 1, 1]
    np.savez(tmp_path / "a.npz", x=x, y=y, snr=[0, 0, 10, 10], classes=["a", "b"])
    with pytest.raises(InputError, match="no signal of a from 5"):
        from_npz(tmp_path / "a.npz", 5, 10, ("a",))


def test_a_split_takes_its_share_of_every_class_and_snr():
    from signals.radio import make_signals

    data = make_signals(20, [10, 14], 0, "all", classes=("QPSK", "BPSK", "WBFM"))
    train, test = split(data, seed=0, share=0.8, name="test")
    assert (
        np.unique(np.stack([train.y, train.snr]), axis=1, return_counts=True)[1].tolist() == [8] * 6
    )
    assert (
        np.unique(np.stack([test.y, test.snr]), axis=1, return_counts=True)[1].tolist() == [2] * 6
    )
    together = np.concatenate([train.x, test.x])
    assert len(np.unique(together.reshape(60, -1), axis=0)) == 60
    assert np.array_equal(split(data, 0, 0.8, "test")[0].x, train.x) and not np.array_equal(
        split(data, 1, 0.8, "test")[0].x, train.x
    )
