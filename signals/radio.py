"""Eleven modulations, pulse shaping, an analogue message and a radio channel: the labelled signals
that signals/mdm.py distills.

Letters: n signals, K symbols, L samples before the channel, N = 128 samples after it. The sampling
rate is 1, so frequencies are in cycles per sample. A signal is complex, z = I + jQ (in-phase and
quadrature), and becomes float32 [2, N] for the networks. The classes and their numbers (8 samples
per symbol, roll-off 0.35, modulation indices) are those of RadioML 2016.10a. Three of that set's
known faults are not repeated: its noise *amplitude* is 10^(-SNR/10), its AM-SSB is empty, and all
its signals come from one text and one podcast. Its three fading paths are the channel "fading";
the others, "free" among them, have none.

    python signals/radio.py                      # one page: constellation, waveform, spectrum
    python signals/radio.py --snr 0 --channel fading
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minilm import InputError
from minilm.results import COLORS, cli, destination, new_figure, save_figure

LINEAR = ("8PSK", "BPSK", "PAM4", "QAM16", "QAM64", "QPSK")  # one pulse, one rate: one spectrum
CLASSES = tuple(sorted((*LINEAR, "AM-DSB", "AM-SSB", "CPFSK", "GFSK", "WBFM")))  # place: label
SPS = 8  # samples per symbol
ROLL_OFF = 0.35
SPAN = 8  # the root-raised-cosine pulse reaches this many symbols to either side
N = 128  # samples of a finished signal
L = 192  # of a waveform before the channel
DROPPED = 16  # of them left out at the beginning
BAND = (0.0015, 0.03)  # of the analogue message: 300 Hz to 6 kHz at 200 kHz


class Signals(NamedTuple):
    """A labelled set."""

    x: np.ndarray  # float32 [n, 2, N], unit power each
    y: np.ndarray  # int64 [n]
    snr: np.ndarray  # int64 [n], in dB
    classes: tuple[str, ...]  # names of the labels


@dataclass(frozen=True)
class Channel:
    phase: float = np.pi  # the carrier phase is uniform within +- this (pi: unknown)
    offset: float = 0.0025  # carrier frequency offset in cycles per sample, uniform within +- this
    drift: float = 2.5e-4  # sample-rate offset, uniform within +- this share
    multipath: bool = False  # three Rician paths


CHANNELS = {
    "free": Channel(),
    "sync": Channel(phase=np.pi / 12, offset=5e-4),  # the receiver has nearly found the carrier
    "fading": Channel(multipath=True),  # free, and three paths, as in RadioML
}


def rng(seed: int, name: str) -> np.random.Generator:
    """A generator of its own for every purpose, numpy's counterpart of minilm.data.generator."""
    return np.random.default_rng([seed, *name.encode()])


# --- linear modulations


def constellation(name: str) -> np.ndarray:
    """All symbols of a linear modulation, complex [M], with mean power 1."""
    if name.endswith("PSK"):
        M = {"BPSK": 2, "QPSK": 4, "8PSK": 8}[name]
        first = 0.5 if name == "QPSK" else 0  # QPSK's four points lie on the diagonals
        return np.exp(2j * np.pi * (np.arange(M) + first) / M)
    levels = {"PAM4": 4, "QAM16": 4, "QAM64": 8}[name]
    axis = np.arange(1 - levels, levels, 2).astype(complex)  # -3, -1, 1, 3
    points = axis if name == "PAM4" else (axis[:, None] + 1j * axis).ravel()
    return points / np.sqrt(np.mean(np.abs(points) ** 2))


def rrc(sps: int = SPS, span: int = SPAN, b: float = ROLL_OFF) -> np.ndarray:
    """Root-raised-cosine pulse, 2 span sps + 1 taps with sum h^2 = 1. The receiver filters with the
    same pulse, and the two together are zero at every other symbol's instant. With t in symbols

        h(t) = [sin(pi t (1 - b)) + 4 b t cos(pi t (1 + b))] / [pi t (1 - (4 b t)^2)]

    and its limits at t = 0 and at t = +-1 / (4b), where this is 0/0."""
    t = np.arange(-span * sps, span * sps + 1) / sps
    at_zero = t == 0
    at_edge = np.isclose(np.abs(t), 1 / (4 * b))
    safe = np.where(at_zero | at_edge, 0.123, t)
    above = np.sin(np.pi * safe * (1 - b)) + 4 * b * safe * np.cos(np.pi * safe * (1 + b))
    below = np.pi * safe * (1 - (4 * b * safe) ** 2)
    h = np.where(at_zero, 1 - b + 4 * b / np.pi, above / below)
    angle = np.pi / (4 * b)
    limit = (1 + 2 / np.pi) * np.sin(angle) + (1 - 2 / np.pi) * np.cos(angle)
    h = np.where(at_edge, b / np.sqrt(2) * limit, h)
    return h / np.sqrt(np.sum(h**2))


def pulse_matrix(symbols: int, length: int) -> np.ndarray:
    """[K, length] with which symbols @ matrix = s,  s[i] = sqrt(sps) sum_k a_k h[i - k sps],
    counted from where the first symbol's pulse has ended: every sample sees all symbols that reach
    it."""
    h = rrc()
    last = len(h) - 1
    tap = np.arange(length)[None, :] + last - SPS * np.arange(symbols)[:, None]  # (K, length)
    reached = (tap >= 0) & (tap <= last)
    return np.sqrt(SPS) * np.where(reached, h[np.clip(tap, 0, last)], 0)


def start_anywhere(
    s: np.ndarray, rng: np.random.Generator, length: int, last: int | None = None
) -> np.ndarray:
    """A window of `length` samples from every row, starting at a random one of the places 0..last
    (default: wherever it fits)."""
    last = s.shape[1] - length if last is None else last
    start = rng.integers(0, last + 1, len(s))
    return np.take_along_axis(s, start[:, None] + np.arange(length), 1)


def linear(name: str, n: int, rng: np.random.Generator, length: int) -> np.ndarray:
    """Independent uniform symbols, shaped by the pulse; the receiver does not know where a symbol
    begins."""
    K = -(-(length + SPS) // SPS) + 2 * SPAN
    a = rng.choice(constellation(name), (n, K))
    s = a @ pulse_matrix(K, length + SPS - 1)
    return start_anywhere(s, rng, length)


# --- frequency modulations


def frequency_shift(
    n: int, rng: np.random.Generator, length: int, index: float, pulse: np.ndarray | None = None
) -> np.ndarray:
    """phi[n] = phi[n-1] + pi h d[n] / sps,  s = exp(j phi):  bits d = +-1 held for a symbol,
    optionally smoothed (GFSK)."""
    d = np.repeat(rng.choice((-1.0, 1.0), (n, length // SPS + 7)), SPS, axis=1)
    if pulse is not None:
        kept = d.shape[1] - len(pulse) + 1
        d = sum(g * d[:, i : kept + i] for i, g in enumerate(pulse))
    phi = np.cumsum(np.pi * index * d / SPS, 1)
    return start_anywhere(np.exp(1j * phi), rng, length, SPS - 1)


def gaussian(bt: float = 0.35, span: int = 2) -> np.ndarray:
    """g(t) ~ exp(-2 pi^2 BT^2 t^2 / ln 2), t in symbols; the taps sum to 1."""
    t = np.arange(-span * SPS, span * SPS + 1) / SPS
    g = np.exp(-2 * (np.pi * bt * t) ** 2 / np.log(2))
    return g / g.sum()


# --- analogue modulations


def message(n: int, rng: np.random.Generator, length: int) -> np.ndarray:
    """A stand-in for audio as its analytic signal m + j H(m), [n, 4 length]: white Gaussian noise
    in BAND; the real part has variance 1. (The analytic signal keeps the positive half of the
    spectrum, doubled.)"""
    f = np.fft.fftfreq(4 * length)
    in_band = (f >= BAND[0]) & (f <= BAND[1])
    white = np.fft.fft(rng.standard_normal((n, 4 * length)))
    m = np.fft.ifft(white * 2 * in_band)
    return m / m.real.std(1, keepdims=True)


def waveforms(name: str, n: int, rng: np.random.Generator, length: int = L) -> np.ndarray:
    """n random signals of one class before the channel, complex [n, length], mean power 1."""
    if name in LINEAR:
        return linear(name, n, rng, length)
    if name == "CPFSK":
        return frequency_shift(n, rng, length, index=0.5)
    if name == "GFSK":
        return frequency_shift(n, rng, length, index=0.8 / np.pi, pulse=gaussian())
    if name not in CLASSES:
        raise InputError(f"there is no modulation {name}: choose among {', '.join(CLASSES)}")
    m = start_anywhere(message(n, rng, length), rng, length)
    if name == "AM-DSB":
        return (1 + 0.5 * m.real) / np.sqrt(1.25) + 0j  # with carrier: power 1 + 0.5^2
    if name == "AM-SSB":
        return m / np.sqrt(2)  # upper sideband, no carrier
    # WBFM: 75 kHz of deviation at 220.5 kHz, as broadcast radio has it. The factor .25 is ours: the
    # noise peaks at three deviations, and without it the signal would fold over the whole band.
    phase = np.cumsum(np.clip(m.real, -3, 3), 1)
    return np.exp(2j * np.pi * 75 / 220.5 * 0.25 * phase)


# --- channel


def resample(z: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """z at the times n * rate [n signals], by linear interpolation."""
    t = np.minimum(np.arange(z.shape[1]) * rate[:, None], z.shape[1] - 1.000001)
    i = t.astype(int)
    part = t - i
    return (1 - part) * np.take_along_axis(z, i, 1) + part * np.take_along_axis(z, i + 1, 1)


def paths(n: int, rng: np.random.Generator, rician: float = 4.0) -> np.ndarray:
    """Impulse responses of three paths, complex [n, 8]:  q[n] = sum_i A_i g_i sinc(n - 3 - tau_i).

    g_i is a fixed part of random phase plus a scattered Gaussian part with a power ratio
    K = rician (0: Rayleigh fading). They stand still within one signal."""
    delay = np.array([0, 0.9, 1.7])
    amplitude = np.array([1, 0.8, 0.3])
    scattered = (rng.standard_normal((n, 3)) + 1j * rng.standard_normal((n, 3))) / np.sqrt(2)
    fixed = np.exp(2j * np.pi * rng.random((n, 3)))
    g = np.sqrt(rician / (rician + 1)) * fixed + np.sqrt(1 / (rician + 1)) * scattered
    taps = np.sinc(np.arange(8)[None, :] - 3 - delay[:, None])  # (3, 8)
    return (amplitude * g) @ taps


def add_noise(z: np.ndarray, snr: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White Gaussian noise of the power P 10^(-SNR/10), P the measured power of each signal, half
    of it on each axis."""
    signal = np.mean(np.abs(z) ** 2, 1, keepdims=True)  # P, [n, 1]
    power = signal * 10 ** (-np.asarray(snr)[:, None] / 10)
    noise = rng.standard_normal(z.shape) + 1j * rng.standard_normal(z.shape)
    return z + np.sqrt(power / 2) * noise


def transmit(
    z: np.ndarray, snr: np.ndarray, rng: np.random.Generator, channel: Channel
) -> np.ndarray:
    """Waveforms [n, L] -> what the receiver records, complex [n, N], unit power. In this order:
    sample-rate offset, multipath, cut, carrier offset and phase, noise, normalisation."""
    n = len(z)
    z = resample(z, 1 + channel.drift * rng.uniform(-1, 1, n))
    if channel.multipath:
        length = z.shape[1] + 7
        response = np.fft.fft(paths(n, rng), length)
        z = np.fft.ifft(np.fft.fft(z, length) * response)[:, : z.shape[1]]
    z = z[:, DROPPED : DROPPED + N]
    offset = channel.offset * rng.uniform(-1, 1, n)[:, None]
    phase = channel.phase * rng.uniform(-1, 1, n)[:, None]
    turn = 2 * np.pi * offset * np.arange(N) + phase
    z = add_noise(z * np.exp(1j * turn), snr, rng)
    return z / np.sqrt(np.mean(np.abs(z) ** 2, 1, keepdims=True))


def to_channels(z: np.ndarray) -> np.ndarray:
    """complex [n, N] -> float32 [n, 2, N], rows I and Q."""
    return np.stack([z.real, z.imag], 1).astype(np.float32)


def make_signals(
    per_class: int,
    snrs: Sequence[int],
    seed: int,
    part: str,
    channel: Channel | None = None,
    classes: Sequence[str] = CLASSES,
) -> Signals:
    """A balanced set: per_class signals of each class, the SNRs in turn. Every (seed, part, class)
    has a generator of its own."""
    channel = channel or CHANNELS["free"]
    snr = np.resize(np.asarray(snrs, dtype=np.int64), per_class)
    x, y = [], []
    for label, name in enumerate(classes):
        draw = rng(seed, f"{part}/{name}")
        sent = waveforms(name, per_class, draw)
        x.append(to_channels(transmit(sent, snr, draw, channel)))
        y.append(np.full(per_class, label))
    return Signals(np.concatenate(x), np.concatenate(y), np.tile(snr, len(classes)), tuple(classes))


# --- the page


@dataclass(frozen=True)
class Config:
    snr: int = 18  # in dB, of the drawn signals
    channel: str = "sync"  # sync (constellations stand still), free (any carrier phase) or fading
    seed: int = 0  # of everything drawn
    classes: tuple[str, ...] = CLASSES  # which to draw
    out: str | None = None  # folder for the page, in place of results/ or runs/


def symbols_of(name: str, snr: int, draw: np.random.Generator) -> np.ndarray:
    """What a receiver with the right carrier sees after its matched filter; of a modulation that is
    not linear, the samples."""
    z = add_noise(waveforms(name, 20, draw, 512), np.full(20, snr), draw)
    if name not in LINEAR:
        return z.ravel()
    z = np.stack([np.convolve(row, rrc(), "valid") for row in z]) / np.sqrt(SPS)
    found = []
    for row in z:
        power = [np.mean(np.abs(row[k::SPS]) ** 2) for k in range(SPS)]
        found.append(row[np.argmax(power) :: SPS])  # power is largest at the symbols
    return np.concatenate(found)


def draw_class(row, cfg: Config, name: str, x: np.ndarray) -> None:
    """One row of the page; x [n, 2, N], received signals."""
    cloud = symbols_of(name, cfg.snr, rng(cfg.seed, f"constellation/{name}"))
    reach = max(2, np.abs(cloud.real).max(), np.abs(cloud.imag).max())
    row[0].plot(cloud.real, cloud.imag, ".", color=COLORS[0], markersize=1.5, alpha=0.5)
    row[0].set(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
    row[0].set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    row[1].plot(x[0, 0], color=COLORS[0], linewidth=1.4)
    row[1].plot(x[0, 1], color=COLORS[1], linewidth=1.4)
    row[1].set(ylim=(-2.5, 2.5), xticks=(0, 64, 127), yticks=(-2, 0, 2))
    window = np.hanning(N)
    spectra = np.fft.fft((x[:, 0] + 1j * x[:, 1]) * window)
    power = np.mean(np.abs(spectra) ** 2, 0) / np.sum(window**2)
    frequency = np.fft.fftshift(np.fft.fftfreq(N))
    decibel = 10 * np.log10(np.fft.fftshift(power))
    row[2].plot(frequency, decibel, color=COLORS[2], linewidth=1.4)
    row[2].set(ylim=(-30, 20), yticks=(-20, 0, 20), xticks=(-0.4, -0.2, 0, 0.2, 0.4))


def main(cfg: Config) -> None:
    """Left: symbols. Middle: one signal over time. Right: mean power spectrum of the class."""
    if cfg.channel not in CHANNELS:
        raise InputError(f"--channel {cfg.channel} is not known; give {', '.join(CHANNELS)}")
    if not cfg.classes:
        raise InputError("--classes: give at least one")
    data = make_signals(200, [cfg.snr], cfg.seed, "page", CHANNELS[cfg.channel], cfg.classes)
    fig, axes = new_figure(len(cfg.classes), 3, width=10.0, height=len(cfg.classes) + 0.8)
    axes = axes.reshape(-1, 3)
    for name, row, x in zip(cfg.classes, axes, np.split(data.x, len(cfg.classes))):
        draw_class(row, cfg, name, x)
        if name != cfg.classes[-1]:
            for ax in row:
                ax.set_xticklabels([])
    titles = ("symbols (or samples)", "one signal (blue I, orange Q)", "mean power spectrum (dB)")
    units = ("I (vertical: Q)", "sample", "cycles per sample")
    for column in range(3):
        axes[0, column].set_title(titles[column])
        axes[-1, column].set_xlabel(units[column])
    path = destination(__file__, cfg).with_suffix(".png")
    save_figure(fig, path)
    print(f"wrote {path.name}: {len(cfg.classes)} classes at {cfg.snr} dB")


if __name__ == "__main__":
    cli(main, Config)
