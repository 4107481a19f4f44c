"""The signal generator against textbook formulas: pulses, symbol error rates, bandwidths, the
channel's noise. No file is needed."""

import math

import numpy as np
import pytest

from minilm import InputError
from signals import radio
from signals.radio import (
    BAND,
    CLASSES,
    ROLL_OFF,
    SPS,
    Channel,
    Config,
    add_noise,
    constellation,
    gaussian,
    make_signals,
    paths,
    pulse_matrix,
    resample,
    rng,
    rrc,
    transmit,
    waveforms,
)

LINEAR = ("BPSK", "QPSK", "8PSK", "PAM4", "QAM16", "QAM64")
FREQUENCY = ("CPFSK", "GFSK", "WBFM")


def Q(x):
    """Tail of the normal distribution."""
    return 0.5 * math.erfc(x / math.sqrt(2))


def spectrum(name, n=2000, length=192):
    """Mean power spectrum of a class before the channel, Hann window -> frequencies, shares of the
    power."""
    z = waveforms(name, n, rng(0, f"spectrum {name}"), length) * np.hanning(length)
    power = np.mean(np.abs(np.fft.fft(z)) ** 2, 0)
    return np.fft.fftfreq(length), power / power.sum()


# --- the pulse


def test_sender_and_receiver_pulse_together_are_zero_at_every_other_symbol():
    both = np.convolve(rrc(), rrc())
    middle = len(both) // 2
    assert both[middle] == pytest.approx(1, abs=1e-12)
    others = np.abs(both[middle + SPS :: SPS])
    assert (
        others[:5].max() < 1e-4 and others.max() < 2e-3
    )  # (the far ones see that the pulse was cut off after 8 symbols: -55 dB)
    assert rrc()[len(rrc()) // 2] == pytest.approx(0.38737, abs=1e-5)


def test_the_pulse_is_smooth_where_its_formula_is_zero_divided_by_zero():
    # roll-off 0.5 puts 1/(4b) = 0.5 symbols exactly on a tap of an even grid; the value must lie on
    # the curve through its neighbours
    h = rrc(sps=200, span=4, b=0.5)
    middle, edge = 800, 800 + 100
    for i in (middle, edge):
        assert h[i] == pytest.approx(
            (-h[i - 2] + 4 * h[i - 1] + 4 * h[i + 1] - h[i + 2]) / 6, rel=1e-5
        )


def test_the_pulse_keeps_its_energy_inside_the_band():
    frequency = np.fft.rfftfreq(8192)
    decibel = 20 * np.log10(np.abs(np.fft.rfft(rrc(), 8192)) / np.abs(rrc().sum()) + 1e-12)
    edge = (1 + ROLL_OFF) / (2 * SPS)
    assert edge == pytest.approx(0.0844, abs=1e-4)
    assert decibel[frequency > edge].max() < -30
    assert decibel[frequency > 0.1].max() < -45


def test_shaping_by_one_matrix_product_is_upsampling_and_convolution():
    a = rng(0, "symbols").standard_normal((3, 40))
    up = np.zeros((3, 40 * SPS))
    up[:, ::SPS] = a
    slow = math.sqrt(SPS) * np.stack([np.convolve(row, rrc()) for row in up])
    np.testing.assert_allclose(a @ pulse_matrix(40, 100), slow[:, 128:228], atol=1e-12)


# --- symbols


@pytest.mark.parametrize(
    "name, kurtosis",
    [("BPSK", 1), ("QPSK", 1), ("8PSK", 1), ("PAM4", 1.64), ("QAM16", 1.32), ("QAM64", 1.381)],
)
def test_constellations_have_unit_power_and_their_known_kurtosis(name, kurtosis):
    power = np.abs(constellation(name)) ** 2
    assert power.mean() == pytest.approx(1)
    assert np.mean(power**2) == pytest.approx(kurtosis, abs=5e-4)
    assert (
        len(set(np.round(constellation(name), 9)))
        == {"BPSK": 2, "QPSK": 4, "8PSK": 8, "PAM4": 4, "QAM16": 16, "QAM64": 64}[name]
    )


def error_rate(name, g):
    """Symbol error rate in white noise at Es/N0 = g, from the textbook."""
    if name == "BPSK":
        return Q(math.sqrt(2 * g))
    if name == "QPSK":
        return 2 * Q(math.sqrt(g)) - Q(math.sqrt(g)) ** 2
    if name == "PAM4":
        return 1.5 * Q(math.sqrt(0.4 * g))
    if name == "8PSK":
        return 2 * Q(math.sqrt(2 * g) * math.sin(math.pi / 8))
    M = int(name[3:])
    p = 2 * (1 - 1 / math.sqrt(M)) * Q(math.sqrt(3 * g / (M - 1)))
    return 1 - (1 - p) ** 2


@pytest.mark.parametrize(
    "name, decibel",
    [("BPSK", 6), ("QPSK", 10), ("PAM4", 10), ("8PSK", 10), ("QAM16", 10), ("QAM64", 10)],
)
def test_a_matched_filter_makes_as_many_symbol_errors_as_theory_says(name, decibel):
    n, draw, points = 100_000, rng(1, f"errors {name}"), constellation(name)
    sent = draw.integers(0, len(points), n)
    up = np.zeros(n * SPS, complex)
    up[::SPS] = points[sent]
    wave = math.sqrt(SPS) * np.fft.ifft(
        np.fft.fft(up) * np.fft.fft(rrc(), n * SPS)
    )  # circular: the last symbols wrap around
    wave = add_noise(wave[None], np.array([decibel - 10 * math.log10(SPS)]), draw)[
        0
    ]  # Es/N0 = SNR + 9.03 dB
    received = np.roll(np.fft.ifft(np.fft.fft(wave) * np.fft.fft(rrc(), n * SPS)), 1 - len(rrc()))[
        ::SPS
    ] / math.sqrt(SPS)
    nearest = np.concatenate(
        [np.abs(part[:, None] - points).argmin(1) for part in np.split(received, 20)]
    )
    theory, measured = error_rate(name, 10 ** (decibel / 10)), np.mean(nearest != sent)
    assert abs(measured - theory) < 3 * math.sqrt(theory * (1 - theory) / n) + 0.01 * theory


# --- waveforms


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_unit_power_before_the_channel(name):
    z = waveforms(name, 3000, rng(2, name))
    assert np.mean(np.abs(z) ** 2) == pytest.approx(1, rel=0.02)
    assert z.shape == (3000, 192)


@pytest.mark.parametrize("name", FREQUENCY)
def test_frequency_modulation_has_a_constant_envelope(name):
    assert np.abs(waveforms(name, 50, rng(3, name))).std() < 1e-12


def test_the_phase_of_cpfsk_steps_by_pi_over_16_at_every_sample_and_keeps_its_sign_for_a_symbol():
    z = waveforms("CPFSK", 50, rng(3, "CPFSK"))
    step = np.angle(z[:, 1:] * z[:, :-1].conj())
    np.testing.assert_allclose(np.abs(step), math.pi / 16, atol=1e-12)
    changes = np.nonzero(np.diff(np.sign(step[0])))[0]
    assert len(changes) > 3 and len(set(changes % SPS)) == 1


def test_gfsk_deviates_by_a_tenth_of_a_radian_after_a_long_run_of_equal_bits():
    assert gaussian().sum() == pytest.approx(1) and len(gaussian()) == 33
    z = waveforms("GFSK", 400, rng(3, "GFSK"))
    step = np.angle(z[:, 1:] * z[:, :-1].conj())
    assert np.abs(step).max() == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_only_real_valued_modulations_have_a_mean_square(name):
    z = waveforms(name, 2000, rng(4, name))
    square = abs(np.mean(z**2))
    assert (
        square == pytest.approx(1, abs=0.02)
        if name in ("BPSK", "PAM4", "AM-DSB")
        else square < 0.08
    )


@pytest.mark.parametrize(
    "name, low, high",
    [
        *[(name, 0.066, 0.080) for name in LINEAR],
        ("CPFSK", 0.070, 0.086),
        ("GFSK", 0.040, 0.052),
        ("AM-DSB", 0.026, 0.036),
        ("AM-SSB", 0.026, 0.036),
        ("WBFM", 0.19, 0.25),
    ],
)
def test_99_percent_of_the_power_lies_within_the_known_bandwidth(name, low, high):
    frequency, power = spectrum(name)
    order = np.argsort(np.abs(frequency))
    assert low < np.abs(frequency[order])[np.searchsorted(np.cumsum(power[order]), 0.99)] < high


def test_single_sideband_is_on_one_side_and_the_others_are_on_both():
    positive = {}
    for name in CLASSES:
        frequency, power = spectrum(name)
        positive[name] = power[frequency > 0].sum()
    assert positive.pop("AM-SSB") > 0.85
    assert positive.pop("AM-DSB") == pytest.approx(
        0.23, abs=0.04
    )  # its carrier sits at frequency zero
    assert all(0.3 < share < 0.52 for share in positive.values())


def test_the_message_lies_in_its_band():
    m = radio.message(20, rng(0, "message"), 192)
    frequency, power = np.fft.fftfreq(768), np.mean(np.abs(np.fft.fft(m)) ** 2, 0)
    assert power[(frequency < BAND[0]) | (frequency > BAND[1])].sum() < 1e-20 * power.sum()
    np.testing.assert_allclose(m.real.std(1), 1)


# --- channel


@pytest.mark.parametrize("snr", [-10, 0, 10, 18])
def test_the_measured_snr_is_the_label(snr):
    z = waveforms("QPSK", 400, rng(5, "snr"))
    noise = add_noise(z, np.full(400, snr), rng(5, "noise")) - z
    measured = 10 * np.log10(
        np.mean(np.abs(z) ** 2, 1).sum() / np.mean(np.abs(noise) ** 2, 1).sum()
    )
    assert measured == pytest.approx(snr, abs=0.2)
    assert noise.real.var() == pytest.approx(noise.imag.var(), rel=0.03)  # half of it on each axis


def test_resampling_a_straight_line_is_exact():
    line = np.arange(192.0)[None] * (1 + 2j)
    np.testing.assert_allclose(resample(line, np.array([0.9]))[0, :150], 0.9 * line[0, :150])


def test_a_perfect_channel_only_cuts():
    z = waveforms("CPFSK", 4, rng(6, "cut"))
    received = transmit(z, np.full(4, 300), rng(6, "channel"), Channel(phase=0, offset=0, drift=0))
    np.testing.assert_allclose(received, z[:, 16:144], atol=1e-9)


def test_the_carrier_offset_stays_within_its_bound():
    z = np.ones((200, 192), complex)
    received = transmit(z, np.full(200, 300), rng(7, "offset"), Channel())
    turn = np.angle(received[:, 1] / received[:, 0]) / (2 * math.pi)
    assert 0.002 < np.abs(turn).max() <= 0.0025 + 1e-9 and turn.min() < -0.002


def test_multipath_has_the_power_of_its_three_paths_and_strong_fading_has_no_mean():
    q = paths(20_000, rng(8, "paths"))
    assert q.shape == (20_000, 8)
    sinc = np.sinc(np.arange(8)[None] - 3 - np.array([0, 0.9, 1.7])[:, None])
    assert np.mean(np.sum(np.abs(q) ** 2, 1)) == pytest.approx(
        np.sum((np.array([1, 0.8, 0.3])[:, None] * sinc) ** 2), rel=0.03
    )
    envelope = lambda rician: np.abs(paths(20_000, rng(8, "fading"), rician)[:, 3])
    assert envelope(0).std() > 1.3 * envelope(50).std()


# --- sets


def test_a_set_is_balanced_float32_at_unit_power_and_its_own_seed_repeats_it():
    data = make_signals(10, [10, 18], seed=3, part="train")
    assert data.x.shape == (110, 2, 128) and data.x.dtype == np.float32
    np.testing.assert_allclose((data.x**2).sum(1).mean(1), 1, rtol=1e-5)
    assert (
        np.bincount(data.y).tolist() == [10] * 11
        and sorted(data.snr[data.y == 4].tolist()) == [10] * 5 + [18] * 5
    )
    assert np.array_equal(data.x, make_signals(10, [10, 18], 3, "train").x)
    assert not np.array_equal(data.x, make_signals(10, [10, 18], 3, "test").x)


def test_leaving_classes_out_does_not_move_the_others():
    both, one = (
        make_signals(5, [10], 0, "train"),
        make_signals(5, [10], 0, "train", classes=("QPSK",)),
    )
    assert np.array_equal(both.x[both.y == CLASSES.index("QPSK")], one.x)


def test_the_channel_fading_differs_from_free_in_its_paths_alone():
    free, fading = radio.CHANNELS["free"], radio.CHANNELS["fading"]
    assert fading == Channel(multipath=True) and free == Channel()
    x = make_signals(20, [18], 0, "train", fading, ("CPFSK",)).x
    same = make_signals(20, [18], 0, "train", free, ("CPFSK",)).x
    swing = [np.hypot(*part.transpose(1, 0, 2)).std(1).mean() for part in (x, same)]
    assert swing[0] > 1.3 * swing[1]  # paths that add up differently: no constant envelope


def test_the_six_linear_classes_share_one_spectrum_and_no_other_has_it():
    """Which is why the spectrum cannot tell them apart (claim T1 of the experiment)."""
    assert sorted(radio.LINEAR) == sorted(LINEAR)
    spectra = {name: spectrum(name)[1] for name in CLASSES}
    like = spectra["QPSK"]
    for name, power in spectra.items():
        overlap = np.minimum(power, like).sum()  # of two distributions of power
        assert (overlap > 0.95) == (name in LINEAR), (name, overlap)


def test_the_page_is_drawn_and_wrong_names_are_refused(tmp_path):
    radio.main(Config(classes=("QPSK", "AM-DSB"), channel="fading", out=str(tmp_path)))
    assert (tmp_path / "radio.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="QPSK"):
        radio.main(Config(classes=("OFDM",), out=str(tmp_path)))
    with pytest.raises(InputError, match="free"):
        radio.main(Config(channel="perfect", out=str(tmp_path)))
