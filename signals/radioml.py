"""Labelled signals from files: RadioML 2016.10a and b (pickles, read without running what they ask
for), RadioML 2018.01A (HDF5), .npz.

The paper's three sets, by the names that others report (its threshold of "high" was not verified):
RML2016.10a at high SNR is `--data rml2016a --snr-min 10`, RML2016.10b `--data rml2016b`; Sig2019-12
is its authors' own and not public: such arrays come as `--data npz`.

Nothing is downloaded. Every reader checks what it was given, keeps the asked classes and SNRs, and
scales each signal to unit power. (The 2016 files are scaled to sum_n |z[n]| = 1, a mean amplitude
of 0.0078, with which a network in its usual initialisation hardly trains.)

Known faults of RadioML 2016.10a that no reader can mend: the noise *amplitude* was set to
10^(-SNR/10) where 10^(-SNR/20) was meant, so the label is not the SNR in dB; AM-SSB was multiplied
by a sine of 0 Hz, so that class is noise alone; channels repeat; WBFM is often the silence between
words, and then looks like AM-DSB. The classes.txt shipped with 2018.01A has the wrong order: use
CLASSES_2018.
"""

import codecs
import json
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from minilm import InputError
from minilm.data import write_atomically
from signals.radio import Signals, rng

CLASSES_2018 = (
    "OOK", "4ASK", "8ASK", "BPSK", "QPSK", "8PSK", "16PSK", "32PSK",
    "16APSK", "32APSK", "64APSK", "128APSK", "16QAM", "32QAM", "64QAM", "128QAM", "256QAM",
    "AM-SSB-WC", "AM-SSB-SC", "AM-DSB-WC", "AM-DSB-SC", "FM", "GMSK", "OQPSK",
)  # fmt: skip


# --- the 2016 pickles


class Kind:
    """In numpy.dtype's place: a type of plain numbers or texts. (An array of objects would take the
    file's bytes for the addresses of objects.)"""

    def __init__(self, code: str, align: bool = False, copy: bool = True):
        self.type = np.dtype(code)
        if self.type.kind not in "biufcSU":
            raise pickle.UnpicklingError(f"it holds {self.type}, which is no type of number")

    def __setstate__(self, state: tuple):
        self.type = self.type.newbyteorder(state[1])


class Array(np.ndarray):
    """An array that takes its numbers from the file, and its type from a Kind alone."""

    def __setstate__(self, state: tuple):
        _, shape, kind, fortran, numbers = state
        super().__setstate__((1, shape, kind.type, fortran, numbers))


def empty(cls, shape: tuple, code: str) -> Array:
    """What numpy fills when it reads a pickle: an array of no matter which size."""
    return np.empty(0).view(Array)


def scalar(kind: Kind, number: bytes | str) -> np.generic:
    raw = number.encode("latin1") if isinstance(number, str) else number  # (str: from Python 2)
    return np.frombuffer(raw, kind.type, 1)[0]


def from_buffer(numbers: bytes, kind: Kind, shape: tuple, order: str, axes=None) -> np.ndarray:
    x = np.frombuffer(numbers, kind.type).reshape(shape, order=order).copy()
    return x if axes is None else x.transpose(axes)


ALLOWED = {  # all that arrays in plain containers need, and what takes its place
    ("numpy._core.multiarray", "_reconstruct"): empty,
    ("numpy._core.multiarray", "scalar"): scalar,
    ("numpy._core.numeric", "_frombuffer"): from_buffer,
    ("numpy", "ndarray"): "ndarray",  # only ever handed to _reconstruct
    ("numpy", "dtype"): Kind,
    ("_codecs", "encode"): codecs.encode,
    ("collections", "OrderedDict"): OrderedDict,
}
BROKEN = (  # what the unpickler raises at streams that are damaged or none
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


class ArrayUnpickler(pickle.Unpickler):
    """A pickle names functions and has them called when it is read. This reader knows the few that
    rebuild arrays and plain containers, by name, and refuses the file at any other. In place of
    numpy's own, which trust the file (one that lies to them ends the process), it calls ours."""

    def find_class(self, module, name):
        known = module.replace("numpy.core.", "numpy._core.")  # numpy 2 renamed it
        if (known, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return ALLOWED[known, name]


def read_pickle(path: Path) -> dict[tuple[str, int], np.ndarray]:
    """RML2016.10a_dict.pkl or RML2016.10b.dat -> {(class, SNR): [n, 2, N]}, checked. (latin1: they
    were written by Python 2.)"""
    try:
        with open(path, "rb") as f:
            cells = ArrayUnpickler(f, encoding="latin1").load()
    except BROKEN as error:
        raise InputError(
            f"{path} was refused: {error or type(error).__name__}; give an original RML2016.10a "
            "or 10b file"
        ) from None
    if not isinstance(cells, dict) or not cells:
        raise InputError(
            f"{path} holds a {type(cells).__name__}; RML2016 files hold a dictionary of arrays"
        )
    checked = {}
    for key, array in cells.items():
        name, snr = check_key(key, path)
        checked[name, snr] = check_array(array, f"{path}, {name} at {snr} dB")
    if len({array.shape[2] for array in checked.values()}) > 1:
        raise InputError(
            f"{path}: signals of different lengths; all must have the same number of samples"
        )
    return checked


def check_key(key, path: Path) -> tuple[str, int]:
    if isinstance(key, tuple) and len(key) == 2:
        name, snr = key
        if isinstance(name, (str, bytes)) and isinstance(snr, (int, np.integer)):
            return name.decode("latin1") if isinstance(name, bytes) else name, int(snr)
    raise InputError(f"{path}: key {key!r} is not a pair (class, SNR)")


# --- checks that all readers share


def check_array(x, where: str) -> np.ndarray:
    """x as float32 [n, 2, N], or an InputError that says what is wrong with it."""
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
        kind = getattr(x, "dtype", type(x).__name__)
        raise InputError(f"{where}: need real floating-point signals, got {kind}")
    if x.ndim != 3 or x.shape[1] != 2:
        turned = x.ndim == 3 and x.shape[2] == 2
        hint = "; this is [n, N, 2]: give x.transpose(0, 2, 1)" if turned else ""
        raise InputError(
            f"{where}: need signals [n, 2, N] (rows I and Q), got {list(x.shape)}{hint}"
        )
    bad = int((~np.isfinite(x)).any((1, 2)).sum())
    if bad:
        raise InputError(f"{where}: {bad} signals hold NaN or infinity: leave them out")
    return np.asarray(x, np.float32)


def normalise(x: np.ndarray, where: str) -> np.ndarray:
    """Every signal to unit power, mean_n (I^2 + Q^2) = 1. (Scaled by its largest sample first: tiny
    signals would square to zero.)"""
    peak = np.abs(x).max((1, 2), keepdims=True)
    silent = int((peak == 0).sum())
    if silent:
        raise InputError(
            f"{where}: {silent} signals are zero everywhere and have no modulation: leave them out"
        )
    x = x / peak
    return x / np.sqrt((x**2).sum(1, keepdims=True).mean(2, keepdims=True))


def choose(given: Sequence, present: Sequence, what: str, where: str) -> tuple:
    """The wanted values; none given: all that are present."""
    if wrong := [str(value) for value in given if value not in present]:
        known = ", ".join(map(str, present))
        raise InputError(f"{where} has no {what} {', '.join(wrong)}; it has {known}")
    return tuple(given or present)


def snr_range(present: Sequence[int], low: int, high: int, where: str) -> list[int]:
    """The SNRs of the file from low to high."""
    chosen = [snr for snr in sorted(present) if low <= snr <= high]
    if not chosen:
        known = ", ".join(map(str, sorted(present)))
        raise InputError(f"{where} has no signal from {low} to {high} dB; it has the SNRs {known}")
    return chosen


# --- readers


def from_pickle(path: Path, low: int, high: int, classes: Sequence[str] = ()) -> Signals:
    cells = read_pickle(path)
    names = choose(classes, sorted({name for name, _ in cells}), "class", str(path))
    snrs = snr_range({snr for _, snr in cells}, low, high, str(path))
    x, y, snr_of = [], [], []
    for label, name in enumerate(names):
        for snr in snrs:
            if (name, snr) in cells:
                count = len(cells[name, snr])
                x.append(cells[name, snr])
                y += [label] * count
                snr_of += [snr] * count
    signals = normalise(np.concatenate(x), str(path))
    return Signals(signals, np.array(y), np.array(snr_of), names)


def from_2018(
    file: Mapping,
    low: int,
    high: int,
    classes: Sequence[str] = (),
    limit: int = 0,
    where: str = "the file",
) -> Signals:
    """RadioML 2018.01A from an open HDF5 file, or anything like it: X [n, N, 2] (channel last), Y
    one-hot [n, 24], Z SNR [n, 1]. Labels are read in slices, then only the chosen signals, `limit`
    (0: all) of every class and SNR."""
    X, Y, Z = file["X"], file["Y"], file["Z"]
    n = len(X)
    signals_fit = len(X.shape) == 3 and X.shape[2] == 2
    if not signals_fit or Y.shape != (n, len(CLASSES_2018)) or len(Z) != n:
        raise InputError(
            f"{where}: need X [n, N, 2], Y [n, 24], Z [n, 1] as in RadioML 2018.01A, got "
            f"{X.shape}, {Y.shape}, {Z.shape}"
        )
    names = choose(classes, CLASSES_2018, "class", where)
    slices = [slice(start, start + 2**16) for start in range(0, n, 2**16)]
    label = np.concatenate([np.asarray(Y[part]).argmax(1) for part in slices])
    snr = np.concatenate([np.asarray(Z[part]).reshape(-1) for part in slices]).astype(np.int64)
    rows, y = [], []
    for new, name in enumerate(names):
        for value in snr_range(set(snr.tolist()), low, high, where):
            fits = (label == CLASSES_2018.index(name)) & (snr == value)
            found = np.flatnonzero(fits)[: limit or None]
            rows.append(found)
            y.append(np.full(len(found), new))
    if not any(len(found) for found in rows):
        raise InputError(f"{where} has no signal of {', '.join(names)} from {low} to {high} dB")
    x = np.concatenate([np.asarray(X[found]) for found in rows if len(found)])  # (n, N, 2)
    x = check_array(np.ascontiguousarray(x.transpose(0, 2, 1)), where)
    return Signals(normalise(x, where), np.concatenate(y), snr[np.concatenate(rows)], names)


NO_NPZ = (  # what numpy and zipfile raise at files that are damaged or none
    EOFError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


def from_npz(path: Path, low: int, high: int, classes: Sequence[str] = ()) -> Signals:
    """Your own data: x float [n, 2, N], y int [n], optionally snr [n] and classes (names, in the
    order of the labels)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except NO_NPZ as error:
        raise InputError(f"{path} is not an .npz file of plain arrays ({error})") from None
    if missing := {"x", "y"} - set(arrays):
        present = ", ".join(arrays) or "nothing"
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}; it has {present}")
    x, y = check_array(arrays["x"], str(path)), arrays["y"]
    if y.shape != (len(x),) or y.dtype.kind not in "iu" or (len(y) and y.min() < 0):
        raise InputError(
            f"{path}: y must hold {len(x)} labels 0, 1, 2, ..., got {y.dtype} {list(y.shape)}"
        )
    if not len(x):
        raise InputError(f"{path} holds no signals")
    present = class_names(arrays, int(y.max()), path)
    names = choose(classes, present, "class", str(path))
    keep = np.isin(y, [present.index(name) for name in names])
    snr = np.zeros(len(x), np.int64)
    if "snr" in arrays:
        snr = check_snr(arrays["snr"], len(x), path)
        keep &= np.isin(snr, snr_range(set(snr.tolist()), low, high, str(path)))
    if not keep.any():
        raise InputError(f"{path} has no signal of {', '.join(names)} from {low} to {high} dB")
    number = np.array([names.index(name) if name in names else -1 for name in present])
    return Signals(normalise(x[keep], str(path)), number[y[keep]], snr[keep], names)


def class_names(arrays: Mapping, last: int, path: Path) -> list[str]:
    """Of the labels 0 to `last`: those that the file names, else the numbers."""
    if "classes" not in arrays:
        return [str(label) for label in range(last + 1)]
    if arrays["classes"].ndim != 1:
        shape = list(arrays["classes"].shape)
        raise InputError(f"{path}: classes must be a list of names, got an array {shape}")
    names = [str(name) for name in arrays["classes"]]
    if len(names) <= last:
        raise InputError(f"{path}: label {last} has no name: classes holds {len(names)}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path}: classes names {', '.join(twice)} twice: give each its own")
    return names


def check_snr(snr: np.ndarray, count: int, path: Path) -> np.ndarray:
    if snr.shape != (count,):
        raise InputError(f"{path}: snr must hold {count} values, got {list(snr.shape)}")
    if snr.dtype.kind not in "iuf" or not np.isfinite(snr).all():
        raise InputError(f"{path}: snr must hold finite numbers in dB")
    return np.rint(snr).astype(np.int64)


def read_signals(
    kind: str, path: str | None, low: int, high: int, classes: Sequence[str] = (), limit: int = 0
) -> Signals:
    """kind rml2016a, rml2016b, rml2018 or npz."""
    if path is None:
        raise InputError(f"--data {kind} needs --path FILE; only --data gen makes its own signals")
    if not Path(path).is_file():
        hint = "" if kind == "npz" else "; RadioML files are not shipped, ask their authors"
        raise FileNotFoundError(f"{path}: no such file{hint}")
    if kind in ("rml2016a", "rml2016b"):
        return from_pickle(Path(path), low, high, classes)
    if kind == "npz":
        return from_npz(Path(path), low, high, classes)
    try:
        import h5py
    except ImportError:
        raise InputError("RadioML 2018.01A is an HDF5 file: pip install h5py") from None
    try:
        with h5py.File(path, "r") as file:
            return from_2018(file, low, high, classes, limit, str(path))
    except (OSError, KeyError) as error:
        raise InputError(f"{path} is not RadioML 2018.01A ({error})") from None


def write_set(
    path: str, x: np.ndarray, y: np.ndarray, classes: Sequence[str], config: dict
) -> None:
    """A learned set as an .npz that `from_npz` reads, with the configuration as JSON; whole, or not
    at all."""

    def save(temporary: Path) -> None:
        with open(temporary, "wb") as f:
            np.savez(f, x=x, y=y, classes=np.array(classes), config=json.dumps(config))

    write_atomically(Path(path), save)


def read_set(path: str, classes: Sequence[str], length: int) -> np.ndarray:
    """x [C * SPC, 2, N] of a written set, as it is (not normalised), if it fits the data: these
    classes, class by class, this length."""
    data = read_signals("npz", path, 0, 0)
    counts = np.bincount(data.y, minlength=len(classes))
    in_order = data.y.tolist() == sorted(data.y) and len(set(counts)) == 1
    if data.classes != tuple(classes) or data.x.shape[2] != length or not in_order:
        raise InputError(
            f"{path} holds {len(data.x)} signals of {data.x.shape[2]} samples, classes "
            f"{', '.join(data.classes)}; the data has {length} samples, classes "
            f"{', '.join(classes)}: give the options with which the set was made"
        )
    with np.load(path) as file:
        return file["x"].astype(np.float32, copy=False)


def split(data: Signals, seed: int, share: float, name: str) -> tuple[Signals, Signals]:
    """Two parts at random, `share` of every (class, SNR) cell in the first; both keep the file's
    order."""
    order = rng(seed, name).permutation(len(data.y))
    first = np.zeros(len(data.y), bool)
    cell = np.stack([data.y, data.snr], 1)[order]
    for one in np.unique(cell, axis=0):
        members = order[(cell == one).all(1)]
        first[members[: round(share * len(members))]] = True
    parts = []
    for part in (first, ~first):
        parts.append(Signals(data.x[part], data.y[part], data.snr[part], data.classes))
    return tuple(parts)
