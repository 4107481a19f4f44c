"""MDM: both of its domains by hand, its loss by two routes, what may and may not move, the
baselines by hand, what each arm hands to the method, the whole script."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from minilm import InputError
from minilm.claims import View
from minilm.data import generator
from signals import mdm as paper
from signals import mdm_experiment as mdm
from signals import networks, radio
from signals.augment import Twist, augment, draw_twist
from signals.baselines import gradient_distance, herding, kcenter, most_forgotten, select
from signals.mdm import learn_signals, matching_loss, noise_added, spectral_error, spectrum
from signals.mdm_claims import CLAIMS, claims, figure, headline
from signals.mdm_experiment import (
    ARMS,
    Arm,
    Config,
    Task,
    confusions,
    distances,
    distill,
    first_signals,
    make_judges,
    make_set,
    moved_spectrum,
    optimizer_for,
    resolve,
    run,
    score,
    settings,
)
from signals.networks import correct, make_network, train_network

TINY = Config(
    train_per_class=20,
    test_per_class=4,
    batch=8,
    spc=2,
    steps=3,
    eval_nets=1,
    eval_steps=2,
    full_steps=2,
    encoder="conv2k3/8",
    eval_arch=("conv2k3/8", "conv3k3/8"),
    classes=("QPSK", "WBFM", "AM-SSB"),
    hold_out=0.25,
    workers=1,
    seeds=(100,),
)


@pytest.fixture(scope="module")
def task():
    return Task(TINY, 100)


def signals(n=6, length=32, seed=0):
    return torch.randn(n, 2, length, generator=generator(seed, "x"))


def network(name="conv2k3/8", seed=0, length=32):
    return make_network(name, 3, length, generator(seed, "net"))


# --- the second domain


def test_the_spectrum_of_a_cosine_is_two_lines_and_that_of_a_constant_is_one():
    # I = cos(2 pi 3 n / 32): |DFT| = 16 at k = 3 and k = 29; Q = 1: 32 at k = 0; orthonormal: both
    # divided by sqrt(32)
    n = torch.arange(32)
    x = torch.stack([torch.cos(2 * math.pi * 3 * n / 32), torch.ones(32)])[None]
    expected = torch.zeros(1, 2, 32)
    expected[0, 0, [3, 29]], expected[0, 1, 0] = 16.0, 32.0
    torch.testing.assert_close(spectrum(x, norm="none"), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(spectrum(x), expected / math.sqrt(32), atol=1e-5, rtol=0)


def test_the_spectrum_equals_the_equation_written_as_a_sum():
    x, k = signals(2, 16), np.arange(16)
    exponential = np.exp(-2j * np.pi * np.outer(k, k) / 16)
    np.testing.assert_allclose(
        spectrum(x, norm="none").numpy(), np.abs(x.numpy() @ exponential), rtol=1e-4
    )


def test_the_orthonormal_spectrum_has_the_signals_energy_in_every_view():
    x = signals()
    energy = x.square().sum((1, 2))
    torch.testing.assert_close(spectrum(x).square().sum((1, 2)), energy)
    torch.testing.assert_close(spectrum(x, "reim").square().sum((1, 2)), energy)
    torch.testing.assert_close(
        spectrum(x, "zmag").square().sum((1, 2)), 2 * energy
    )  # the same row twice


def test_what_each_view_does_not_see():
    x, zero = signals(), torch.zeros(1)
    shifted = augment(x, Twist(zero, torch.tensor([5]), torch.ones(1)))
    turned = augment(x, Twist(zero + 0.7, torch.zeros(1, dtype=torch.long), torch.ones(1)))
    same = lambda a, b: torch.allclose(a, b, atol=1e-4)
    assert same(spectrum(x), spectrum(shifted)) and not same(spectrum(x), spectrum(turned))
    assert same(spectrum(x, "zmag"), spectrum(shifted, "zmag")) and same(
        spectrum(x, "zmag"), spectrum(turned, "zmag")
    )
    assert not same(spectrum(x, "reim"), spectrum(shifted, "reim"))
    torch.testing.assert_close(
        spectrum(x)[..., 1:], spectrum(x)[..., 1:].flip(-1)
    )  # symmetric in k: one sideband like the other
    upper = torch.stack(
        [
            torch.cos(2 * math.pi * 3 * torch.arange(32) / 32),
            torch.sin(2 * math.pi * 3 * torch.arange(32) / 32),
        ]
    )[None]
    lower = upper * torch.tensor([1.0, -1])[:, None]
    assert same(spectrum(upper), spectrum(lower)) and not same(
        spectrum(upper, "zmag"), spectrum(lower, "zmag")
    )


def test_the_gradient_of_the_spectrum_is_finite_where_it_is_zero():
    x = torch.zeros(1, 2, 8, requires_grad=True)
    spectrum(x).sum().backward()
    assert torch.isfinite(x.grad).all()


# --- the loss


def test_the_loss_by_hand_when_the_features_are_the_samples_themselves():
    # class 0: real means (1, 2), synthetic (0, 0): 1 + 4; class 1: real mean (3, 0), synthetic
    # (1, 0): 4; summed over classes: 9
    real = torch.tensor([[0.0, 2], [2, 2], [3, 1], [3, -1]]).view(4, 2, 1)
    syn = torch.tensor([[0.0, 0], [1, 0]]).view(2, 2, 1)
    assert matching_loss(Samples(), real, syn, C=2).item() == 9


@pytest.mark.parametrize("name", ["conv2k3/8", "conv2k3-flatten/8", "alexnet/8"])
def test_all_classes_in_one_batch_give_the_loss_and_gradient_of_one_class_after_the_other(name):
    psi, real, syn = network(name), signals(12, seed=1), signals(6, seed=2)
    together, apart = syn.clone().requires_grad_(), syn.clone().requires_grad_()
    loss = matching_loss(psi, real, together, C=3)
    loop = sum(
        matching_loss(psi, real[4 * c : 4 * c + 4], apart[2 * c : 2 * c + 2], C=1) for c in range(3)
    )
    torch.testing.assert_close(loss, loop)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, x)[0] for value, x in ((loss, together), (loop, apart)))
    )


def test_the_unnormalised_spectrum_only_rescales_the_loss_by_n_for_a_network_of_relus():
    psi, real, syn = network(), signals(12, seed=1), signals(6, seed=2)
    ortho, plain = (
        matching_loss(psi, spectrum(real, norm=norm), spectrum(syn, norm=norm), C=3)
        for norm in ("ortho", "none")
    )
    torch.testing.assert_close(plain, 32 * ortho)


def test_equal_sets_have_no_distance_and_the_order_within_a_class_does_not_matter():
    psi, real = network(), signals(6, seed=1)
    assert matching_loss(psi, real, real, C=3) == 0
    swapped = real[[1, 0, 3, 2, 5, 4]]
    assert matching_loss(psi, real, swapped, C=3).item() < 1e-10
    exchanged = real[[2, 3, 0, 1, 4, 5]]  # but classes may not change places
    assert matching_loss(psi, real, exchanged, C=3) > 0.01


# --- learning S


class Samples:
    """psi(x) = x, flat."""

    def requires_grad_(self, _):
        return self

    def features(self, x):
        return x.flatten(1)


def learn(first, real, C, **changes):
    """A few steps towards always the same real signals, as the experiment's loop makes them."""
    steps, rate = range(changes.pop("steps", 3)), changes.pop("rate", 0.1)
    changes = {"new_encoder": lambda step: Samples(), "alpha": 0.0} | changes
    return learn_signals(
        first,
        C,
        draw_real=lambda: real,
        steps=steps,
        make_optimizer=lambda S: torch.optim.SGD([S], rate),
        **changes,
    )


def test_one_step_by_hand_goes_down_the_gradient_of_the_distance_of_means():
    # one class, real mean (1, 2), S (0, 0): the loss is 1 + 4, its gradient (-2, -4); rate .1
    real = torch.tensor([[0.0, 2], [2, 2]]).view(2, 2, 1)
    S = learn(torch.zeros(1, 2, 1), real, 1, steps=1)
    torch.testing.assert_close(S.flatten(), torch.tensor([0.2, 0.4]))


def test_both_domains_are_weighed_as_told():
    first, real = signals(2, seed=1), signals(6, seed=2)
    change = {}
    for weights in ((1, 0), (0, 1), (1, 1), (1, 3)):
        S = learn(first, real, 2, steps=1, time_weight=weights[0], alpha=weights[1])
        change[weights] = S - first
    torch.testing.assert_close(change[1, 1], change[1, 0] + change[0, 1])
    torch.testing.assert_close(change[1, 3], change[1, 0] + 3 * change[0, 1])
    assert change[0, 1].abs().max() > 0.01 and not torch.allclose(change[1, 0], change[0, 1])


@pytest.mark.parametrize("view", ["mag", "zmag", "reim"])
@pytest.mark.parametrize("norm", ["ortho", "none"])
def test_the_second_domain_is_the_view_that_was_asked_for(view, norm):
    first, real = signals(2, seed=1), signals(6, seed=2)
    S = learn(first, real, 2, steps=1, time_weight=0, alpha=1, view=view, norm=norm)
    by_hand = first.clone().requires_grad_()
    domains = (spectrum(x, view, norm) for x in (real, by_hand))
    matching_loss(Samples(), *domains, C=2).backward()
    torch.testing.assert_close(S, first - 0.1 * by_hand.grad)


def test_what_matches_already_stays_as_it_is_in_either_domain_and_under_any_augmentation():
    """The same twist meets real and learned signals: were it one side's alone, they'd differ."""
    first = signals(4)
    gen = generator(0, "twist")
    kinds = ("phase", "shift", "conj")
    for twist in (None, lambda: draw_twist(2, kinds, 32, gen)):
        S = learn(first, first, 2, time_weight=1, alpha=1, draw_twist=twist)
        torch.testing.assert_close(S, first)


def test_a_twist_is_drawn_for_each_step_and_changes_what_is_learned():
    drawn = []

    def draw():
        drawn.append(draw_twist(2, ("phase",), 32, generator(len(drawn), "t")))
        return drawn[-1]

    first, real = signals(2, seed=1), signals(4, seed=2)
    flat = {"new_encoder": lambda step: network("conv2k3-flatten/8")}
    S = learn(first, real, 2, draw_twist=draw, **flat)
    assert len(drawn) == 3
    assert not torch.allclose(S, learn(first, real, 2, **flat))


def test_wrong_spectra_are_those_of_the_class_before():
    """Refuted by hand: with real == S nothing moves, with the spectra moved on everything does, and
    a set that holds the class before in each place has nothing to learn."""
    real = signals(6)
    before = real.roll(2, 0)  # three classes of two signals
    still = learn(before, real, 3, time_weight=0, alpha=1, moved=1)
    torch.testing.assert_close(still, before)
    moved = learn(real, real, 3, time_weight=0, alpha=1, moved=1)
    assert not torch.allclose(moved, real)


# --- making S, on a task


def test_only_s_is_trained_and_psi_is_another_one_at_every_step(monkeypatch, task):
    made = {}
    keep = task.network

    def record(arch, name):
        made[name] = keep(arch, name)
        return made[name]

    monkeypatch.setattr(task, "network", record)
    S = distill(TINY, task, 1, 1)
    assert list(made) == ["encoder 0", "encoder 1", "encoder 2"]
    assert S.shape == (6, 2, 128) and not S.requires_grad
    for net in made.values():
        assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    first, second = (made[name].body[0].weight for name in ("encoder 0", "encoder 1"))
    assert not torch.equal(first, second)
    assert torch.equal(first, keep(TINY.encoder, "encoder 0").body[0].weight)
    assert not torch.equal(S, first_signals(TINY, task))


def test_alpha_zero_is_dm_and_every_method_starts_from_the_same_signals(task):
    dm, mdm_set = (make_set(TINY, task, Arm(method)) for method in ("dm", "mdm"))
    assert torch.equal(dm, make_set(replace(TINY, alpha=0.0), task, Arm("mdm")))
    assert not torch.equal(dm, mdm_set)
    frozen = replace(TINY, lr=0.0)
    for method in ("dm", "fd", "mdm", "dc"):
        S = make_set(frozen, task, Arm(method))
        assert torch.equal(S, first_signals(TINY, task)), method


def test_each_method_weighs_the_domains_as_its_name_says(monkeypatch, task):
    asked, given = [], []

    def learn(*args, **weights):
        asked.append(args)
        given.append(weights)
        return args[0]

    monkeypatch.setattr(mdm, "learn_signals", learn)
    cfg = replace(TINY, alpha=0.3, fd_view="zmag", fd_norm="none")
    for method in ("dm", "fd", "mdm"):
        make_set(cfg, task, Arm(method, moved=2))
    assert [(k["time_weight"], k["alpha"]) for k in given] == [(1, 0), (0, 0.3), (1, 0.3)]
    assert [k["moved"] for k in given] == [0, 0, 2]
    assert all(k["view"] == "zmag" and k["norm"] == "none" for k in given)
    assert all(k["draw_twist"] is None for k in given)
    make_set(replace(cfg, augment=("shift",)), task, Arm("dm"))
    twist = given[-1]["draw_twist"]()
    assert len(twist.shift) == 3 and twist.shift.any() and not twist.phase.any()
    assert asked[-1][2]().shape == (3 * TINY.batch, 2, 128)


def test_an_arm_is_made_with_the_encoder_that_its_name_says(monkeypatch, task):
    """Names that say nothing are made with the command line's."""
    asked = set()
    keep = task.network
    monkeypatch.setattr(task, "network", lambda arch, name: asked.add(arch) or keep(arch, name))
    named = {"alexnet": "alexnet/32", "flat": "conv3k7-flatten", "shallow": "conv2k3"}
    for name, arm in ARMS.items():
        if arm.method in ("dm", "mdm"):
            asked.clear()
            cfg = replace(settings(TINY, arm), spc=1, steps=1, batch=2)
            make_set(cfg, task, arm)
            wanted = [arch for word, arch in named.items() if word in name.split()]
            wanted = TINY.encoder if "long" in name and arm.eval_steps else (wanted or [None])[0]
            assert asked == {wanted or TINY.encoder}, name


def test_s_is_learned_at_the_rate_and_momentum_that_are_documented():
    S = torch.zeros(2, requires_grad=True)
    sgd = optimizer_for(Config(optimizer="sgd", lr=0.3), S)
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == 0.5
    adam = optimizer_for(Config(lr=0.3), S)
    assert isinstance(adam, torch.optim.Adam)
    assert sgd.defaults["lr"] == adam.defaults["lr"] == 0.3


def test_the_first_signals_are_real_ones_of_their_class_and_fewer_are_part_of_more(task):
    S = first_signals(TINY, task)
    for signal, label in zip(S, task.labels(S)):
        row = (task.train.x == signal).all(2).all(1).nonzero()
        assert len(row) == 1 and task.train.y[row.item()] == label
    assert torch.equal(first_signals(replace(TINY, spc=1), task), S[::2])
    noise = first_signals(replace(TINY, init="noise"), task)
    torch.testing.assert_close(noise.square().sum(1).mean(1), torch.ones(6))


def test_training_held_out_and_test_signals_have_none_in_common(task):
    rows = torch.cat([task.train.x, task.held_out.x, task.test.x])
    assert len(torch.unique(rows.flatten(1), dim=0)) == len(rows) == 3 * 24
    assert len(task.train.y) == 45 and len(task.held_out.y) == 15


@pytest.mark.parametrize("channel", ["free", "sync", "fading"])
def test_signals_come_from_the_parts_and_the_channel_that_were_asked_for(monkeypatch, channel):
    asked = []
    keep = radio.make_signals
    monkeypatch.setattr(radio, "make_signals", lambda *a: asked.append(a) or keep(*a))
    Task(replace(TINY, channel=channel, snr_min=0, snr_max=4), 100)
    (train, test) = asked
    assert (train[0], train[3]) == (20, "train") and (test[0], test[3]) == (4, "test")
    for call in asked:
        assert list(call[1]) == [0, 2, 4] and call[2] == 100
        assert call[4] == radio.CHANNELS[channel] and call[5] == TINY.classes
    assert radio.CHANNELS["fading"].multipath and not radio.CHANNELS["free"].multipath


def test_judges_are_networks_that_made_no_set(task):
    makers = [task.network("conv3k7", f"encoder {step}") for step in range(100)]
    for judge in make_judges(task, "conv3k7", 2):
        weight = judge.psi.body[0].weight
        assert not any(torch.equal(weight, maker.body[0].weight) for maker in makers)
        assert judge.time.shape == judge.frequency.shape == (3, 32)


@pytest.mark.parametrize("weights, first, second", [((1, 0), 0, 1), ((0, 1), 1, 0)])
def test_it_learns_each_domain_matches_itself_and_both_together_match_both(weights, first, second):
    cfg = replace(TINY, train_per_class=60, batch=32, steps=60, lr=0.03, encoder="conv3k7/16")
    task = Task(cfg, 100)
    begin = distances(task, "conv3k7", first_signals(cfg, task))  # time, frequency
    one = distances(task, "conv3k7", distill(cfg, task, *weights))
    both = distances(task, "conv3k7", distill(cfg, task, 1, 1))
    assert one[first] < begin[first] / 2
    share = one[first] / begin[first]
    assert one[second] > 0.5 * share * begin[second]  # the other domain lags behind
    assert both[0] < begin[0] / 2 and both[1] < begin[1] / 2


# --- judging S


def test_networks_are_trained_on_the_set_with_the_arms_own_augmentation(monkeypatch, task):
    given = []
    monkeypatch.setattr(mdm, "train_network", lambda *a: given.append(a))
    cfg = replace(TINY, augment=("phase",), eval_nets=2)
    S = first_signals(cfg, task)
    nets = mdm.train_networks(cfg, task, S, once=("conv1k3/8",))
    assert {arch: len(group) for arch, group in nets.items()} == {
        "conv2k3/8": 2,
        "conv3k3/8": 2,
        "conv1k3/8": 1,
    }
    for _, x, y, steps, lr, _, kinds in given:
        assert x is S and y.tolist() == [0, 0, 1, 1, 2, 2]
        assert (steps, lr, kinds) == (TINY.eval_steps, TINY.eval_lr, ("phase",))
    assert len({id(net) for net, *_ in given}) == 5
    task.trained = {}
    given.clear()
    task.train_on_all(cfg, "conv2k3/8")
    assert given[0][1] is task.train.x and given[0][-1] == ("phase",)
    task.trained = {}


def test_a_set_is_brought_to_unit_power_where_the_arm_says_so(monkeypatch, task):
    seen = []
    monkeypatch.setattr(mdm, "train_networks", lambda cfg, task, S, once: seen.append(S) or {})
    S = 3 * first_signals(TINY, task)
    for arm in (Arm("dm"), Arm("dm", unit_power=True)):
        metrics, _ = mdm.try_set(TINY, arm, task, S, ())
        assert metrics["rms"] == pytest.approx(3, rel=1e-4)  # of the set as it was made
    assert seen[0] is S
    torch.testing.assert_close(seen[1].square().sum(1).mean(1), torch.ones(6))
    assert ARMS["alexnet mdm unit power"].unit_power and ARMS["alexnet dm unit power"].unit_power


class Oracle:
    """Says for every signal what stands in its first sample."""

    def __call__(self, x):
        return torch.nn.functional.one_hot(x[:, 0, 0].long(), 3).float()


def test_accuracy_by_snr_and_pooled_by_hand():
    # guesses 0 1 2 0 for labels 0 1 1 1: right, right, wrong, wrong; the first and third at 10 dB
    x = torch.zeros(4, 2, 8)
    x[:, 0, 0] = torch.tensor([0.0, 1, 2, 0])
    y = torch.tensor([0, 1, 1, 1])
    test = radio.Signals(x, y, np.array([10, 12, 10, 12]), ("a", "b", "c"))
    held_out = test._replace(x=x[:1], y=y[:1])
    metrics, series = score({"one": [Oracle()], "two": [Oracle()]}, test, held_out)
    assert metrics == {"acc": 0.5, "held out": 1.0, "unseen": 0.5}
    snrs, values = series["acc by SNR"]
    assert snrs.tolist() == [10, 12] and values == [0.5, 0.5]
    test = test._replace(snr=np.array([10, 10, 12, 12]))
    assert score({"one": [Oracle()]}, test, held_out)[1]["acc by SNR"][1] == [1.0, 0.0]


def test_confusions_within_the_six_by_hand():
    # BPSK taken for QPSK (inside), QPSK right, WBFM taken for BPSK (outside), GFSK right
    names = ("BPSK", "QPSK", "WBFM", "GFSK")
    y, guess = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 1, 0, 3])
    assert confusions(guess, y, names) == {
        "within six": 0.5,  # of the two that are inside
        "six as one": 0.75,  # all but the third
        "errors within six": 0.5,  # one of two errors
    }


def test_the_spectral_error_and_the_added_noise_by_hand():
    x = signals(4)
    rows = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    whole = paper.class_spectra(x, rows)  # (2, 2, 32)
    assert spectral_error(x, whole) < 1e-12
    assert spectral_error(3 * x, whole) == pytest.approx(4)  # (3 - 1)^2 of its energy
    torch.testing.assert_close(noise_added(x, whole), torch.zeros(2), atol=1e-5, rtol=0)
    louder = noise_added(torch.cat([2 * x[:2], x[2:]]), whole)
    torch.testing.assert_close(louder, torch.tensor([20 * math.log10(2), 0.0]))
    for line in (3, 7, 8):  # of 32: frequencies below a quarter of the sampling rate, and the first
        tone = torch.cos(2 * math.pi * line * torch.arange(32) / 32).expand(4, 2, 32)
        heard = noise_added(x + tone, whole).abs().max() > 1e-3
        assert heard == (line >= 8)  # of the upper half of all frequencies, which is the noise's


def test_an_encoder_that_averages_over_all_frequencies_sees_no_move(monkeypatch):
    task = Task(replace(TINY, train_per_class=40, classes=("QPSK", "WBFM", "AM-SSB")), 100)

    class Mean(Samples):
        def features(self, x):
            return x.mean(2)

    monkeypatch.setattr(task, "network", lambda arch, name: Mean())
    assert moved_spectrum(TINY, task) < 1e-6
    monkeypatch.setattr(task, "network", lambda arch, name: Samples())
    assert moved_spectrum(TINY, task) > 1


def test_augmentation_turns_shifts_and_mirrors_as_one_rotation_of_complex_numbers():
    x = signals(4)
    z = torch.complex(x[:, 0], x[:, 1])
    twist = Twist(torch.tensor([0.3, 1.1]), torch.tensor([3, 0]), torch.tensor([1.0, -1]))
    out = augment(x, twist)
    expected = [torch.roll(z[i] * complex(math.cos(0.3), math.sin(0.3)), 3) for i in (0, 1)]
    expected += [z[i].conj() * complex(math.cos(1.1), math.sin(1.1)) for i in (2, 3)]
    torch.testing.assert_close(torch.complex(out[:, 0], out[:, 1]), torch.stack(expected))
    none = draw_twist(3, (), 32, generator(0, "t"))
    assert torch.equal(augment(signals(3), none), signals(3))
    drawn = draw_twist(500, ("phase", "shift", "conj"), 32, generator(0, "t"))
    assert (
        drawn.shift.min() == 0
        and drawn.shift.max() == 31
        and 0.4 < (drawn.conj < 0).float().mean() < 0.6
        and drawn.phase.max() > 6
    )


# --- baselines


def test_herding_by_hand():
    # mean 2. Nearest to 2 is 2 (row 1); then (2 + x) / 2 nearest to 2 without row 1: x = 1 (1.5)
    # ties with x = 3 (2.5): lowest index
    features = torch.tensor([[1.0], [2], [3], [0], [4]])
    assert herding(features, 3) == [1, 0, 2]
    assert sorted(herding(features, 5)) == [0, 1, 2, 3, 4]


def test_kcenter_by_hand_and_forgetting_breaks_ties_by_index():
    features = torch.tensor(
        [[0.0], [1], [10], [11], [4]]
    )  # mean 5.2: start at 4, then 11 (distance 7), then 0 (4)
    assert kcenter(features, 3) == [4, 3, 0]
    # start at 0, then 10; 5 is 5 from the nearest of these two, -4.5 only 4.5 (if 14.5 from 10)
    assert kcenter(torch.tensor([[0.0], [10], [-4], [-4.5], [5]]), 3) == [0, 1, 4]
    assert len(set(kcenter(torch.zeros(4, 1), 4))) == 4
    assert (
        most_forgotten(torch.tensor([0.0, 2, 1, 2]), 3)
        == [1, 3, 2]
        == select("forgetting", None, torch.tensor([0.0, 2, 1, 2]), 3)
    )


def test_gradient_distance_is_zero_for_the_same_signals_and_moves_the_others():
    net, x = network(), signals(6)
    assert gradient_distance(net, x.chunk(3), x.chunk(3)).item() == pytest.approx(0, abs=1e-4)
    other = signals(6, seed=5).requires_grad_()
    distance = gradient_distance(net, x.chunk(3), other.chunk(3))
    assert distance > 0.5 and torch.autograd.grad(distance, other)[0].abs().max() > 0


def test_chosen_signals_are_real_ones_of_their_class(task):
    for method in ("herding", "kcenter", "forgetting"):
        S = make_set(TINY, task, Arm(method))
        for signal, label in zip(S, task.labels(S)):
            row = (task.train.x == signal).all(2).all(1).nonzero()
            assert len(row) == 1 and task.train.y[row.item()] == label, method


# --- networks


@pytest.mark.parametrize(
    "name, features",
    [
        ("conv3k7", 32),
        ("conv3k3-instance-flatten/16", 16 * 16),
        ("conv4k3-layer/8", 8),
        ("alexnet", 192 * 16),
        ("vgg16/8", 64 * 4),
        ("resnet18/8", 64),
        ("resnet18-none/8", 64),
    ],
)
def test_networks_have_their_published_feature_sizes_at_128_samples(name, features):
    net = make_network(name, 11, 128, generator(0, "n"))
    assert net.features(signals(2, 128)).shape == (2, features) and net(signals(2, 128)).shape == (
        2,
        11,
    )


def test_the_height_one_image_convolution_is_the_one_dimensional_one():
    net, x = network("conv1k5/8"), signals(2)
    layer = net.body[0]
    h = torch.nn.functional.conv1d(x, layer.weight[:, :, 0], layer.bias, padding=2).relu()
    torch.testing.assert_close(net.features(x), torch.nn.functional.avg_pool1d(h, 2).mean(2))


def test_vgg_and_alexnet_have_the_depth_of_their_originals():
    count = lambda name: sum(
        isinstance(m, torch.nn.Conv2d) for m in network(name, length=128).modules()
    )
    assert (count("vgg16/8"), count("alexnet/8"), count("resnet18/8")) == (13, 5, 17 + 3)


def test_weights_follow_their_generator_and_keep_the_scale_of_the_features():
    same = [make_network("conv4k3", 11, 128, generator(seed, "n")) for seed in (0, 0, 1)]
    assert torch.equal(same[0].body[0].weight, same[1].body[0].weight) and not torch.equal(
        same[0].body[0].weight, same[2].body[0].weight
    )
    h = same[0].body[:9](signals(64, 128)[:, :, None])  # before the last pooling and averaging
    assert 0.2 < h.square().mean() < 3


def test_relu_networks_without_bias_are_homogeneous():
    net, x = network(), signals()
    torch.testing.assert_close(net.features(3 * x), 3 * net.features(x))


def test_a_network_overfits_a_few_signals_and_counts_what_it_forgot():
    x, y = signals(12), torch.arange(12) % 3
    net = network("conv2k3/16")
    forgotten = train_network(net, x, y, 150, 1e-2, generator(0, "order"))
    assert correct(net, x, y).all() and forgotten.shape == (12,) and 0 < forgotten.max() < 75


@pytest.mark.parametrize(
    "name, words",
    [
        ("conv3", "conv3k7"),
        ("conv3k4", "odd"),
        ("resnet50", "resnet18"),
        ("conv3k7/0", "WIDTH"),
        ("conv3k7-group", "instance"),
        ("vgg16", "32 samples"),
    ],
)
def test_unknown_and_unfitting_networks_are_refused(name, words):
    with pytest.raises(InputError, match=words):
        make_network(name, 3, 16, generator(0, "n"))


def test_the_rate_falls_to_zero_and_weights_decay(monkeypatch):
    """Silence gives the first layer no gradient: what moves its weights is decay alone."""
    rates = []
    keep = networks.set_lr
    monkeypatch.setattr(networks, "set_lr", lambda o, rate: rates.append(rate) or keep(o, rate))
    net = network("conv2k3/8")
    before = net.body[0].weight.detach().abs().sum()
    train_network(net, torch.zeros(6, 2, 32), torch.arange(6) % 3, 20, 1e-3, generator(0, "order"))
    assert net.body[0].weight.abs().sum() < before
    assert rates == sorted(rates, reverse=True) and rates[0] == 1 and rates[-1] < 0.02


# --- the paper's file


def test_the_worked_example_shows_what_the_second_domain_does(capsys):
    """With the spectrum switched off (alpha 0) MDM's rows are DM's."""
    cfg = paper.Config(quick=True, encoders=("conv2k3-flatten/8",), steps=2)
    on, off = paper.main(cfg), paper.main(replace(cfg, alpha=0.0))
    dm, mdm_set = "DM, psi = conv2k3-flatten/8", "MDM, psi = conv2k3-flatten/8"
    assert off[dm] == off[mdm_set] == on[dm] and on[mdm_set] != on[dm]
    printed = capsys.readouterr().out
    assert "all real signals" in printed and "chance 0.091" in printed
    rows = [line for line in printed.splitlines() if line.endswith(" dB") and "psi" in line]
    shown = {line[:35]: line[35:] for line in rows[:2]}  # of the first call
    assert len(shown) == 2 and len(set(shown.values())) == 2


def test_blocks_are_eight_heights():
    assert paper.blocks(torch.tensor([-1.0, 0, 0.5, 0.99, 2]), 0, 1) == "▁▁▅██"


# --- the script


def test_a_method_gives_the_same_numbers_alone_and_beside_others_and_other_ones_for_another_seed():
    together = run(replace(TINY, methods=("full", "random", "dm", "mdm")), 100)
    alone = run(replace(TINY, methods=("mdm",)), 100)
    assert together.metrics["mdm"] == alone.metrics["mdm"]
    assert run(replace(TINY, methods=("mdm",)), 101).metrics != alone.metrics


def test_arms_and_seeds_that_are_typed_are_obeyed_also_with_full():
    assert resolve(Config()).seeds == (50, 51, 52, 53)
    assert resolve(Config(more_seeds=True)).seeds == tuple(range(50, 58))
    full = resolve(Config(full=True))
    assert set(full.methods) == set(ARMS) - {"saved"} and full.seeds == (50, 51, 52, 53)
    asked = resolve(Config(full=True, seeds=(50, 51), methods=("dm",)))
    assert asked.seeds == (50, 51) and asked.methods == ("dm",)


def test_every_arm_is_read_by_a_claim_and_every_claim_is_tested_by_the_run_that_it_names():
    arms_of = {"default": mdm.DEFAULT, "full": mdm.FULL, "seeds": mdm.MORE_SEEDS}
    read = set()
    for claim in CLAIMS:
        cells = (*claim.method, *claim.baseline, *claim.controls, *claim.given)
        arms = {cell.arm for cell in cells}
        assert arms <= set(arms_of[claim.run]), claim.id
        read |= arms
    assert read == set(mdm.FULL)


def test_the_whole_script_runs_writes_its_files_and_prints_every_claim(tmp_path, capsys):
    results = mdm.main(Config(quick=True, workers=1, out=str(tmp_path)))
    printed = capsys.readouterr().out
    assert (tmp_path / "mdm.png").stat().st_size > 20_000
    saved = json.loads((tmp_path / "mdm.json").read_text(encoding="utf-8"))
    again = claims(saved["metrics"])
    assert results["claims"] == [row | {"verdict": "smoke run"} for row in again]
    for row in results["claims"]:
        assert f"\n{row['id']} " in printed
    assert "x~" in printed and set(results["metrics"]) == set(mdm.DEFAULT)
    assert len(figure(saved).axes) == 9 and "%" in headline(View(saved["metrics"]))


def test_a_saved_set_is_evaluated_again_with_the_same_accuracy(tmp_path):
    file = tmp_path / "set.npz"
    made = mdm.main(replace(TINY, methods=("mdm",), save=str(file), out=str(tmp_path)))
    again = mdm.main(replace(TINY, eval_only=str(file), out=str(tmp_path)))
    assert made["metrics"]["mdm"] == again["metrics"]["saved"]
    with np.load(file, allow_pickle=False) as saved:
        assert saved["x"].shape == (6, 2, 128) and saved["classes"].tolist() == list(TINY.classes)
        assert json.loads(str(saved["config"]))["spc"] == 2
    with pytest.raises(InputError, match="QPSK, WBFM, AM-SSB"):
        mdm.main(replace(TINY, eval_only=str(file), classes=("QPSK", "WBFM"), out=str(tmp_path)))


def test_a_file_of_ones_own_signals_goes_through_the_same_run(tmp_path):
    data = radio.make_signals(30, [10, 12], 0, "mine", classes=("BPSK", "GFSK"))
    np.savez(tmp_path / "mine.npz", x=data.x, y=data.y, snr=data.snr, classes=data.classes)
    cfg = replace(
        TINY,
        data="npz",
        path=str(tmp_path / "mine.npz"),
        train_per_class=500,
        test_per_class=200,
        classes=(),
        methods=("random", "mdm"),
        augment=("phase",),
        fd_view="zmag",
        optimizer="sgd",
        eval_arch=("conv2k3/8",),
        out=str(tmp_path),
    )
    results = mdm.main(cfg)
    assert set(results["metrics"]) == {"random", "mdm"}
    verdicts = {row["id"]: row["verdict"] for row in results["claims"]}
    assert verdicts["C3"] == "not tested" and set(verdicts.values()) == {"not tested"}
    with pytest.raises(InputError, match="10, 12"):
        mdm.main(replace(cfg, snr_min=30, snr_max=40))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"methods": ("mdn",)}, "mdn"),
        ({"methods": ("mdm", "dm", "mdm")}, "each once"),
        ({"methods": ()}, "at least one"),
        ({"methods": ("saved",)}, "--eval-only FILE"),
        ({"data": "rml"}, "rml2016a"),
        ({"channel": "wire"}, "--channel"),
        ({"init": "zero"}, "--init"),
        ({"optimizer": "lbfgs"}, "--optimizer"),
        ({"fd_view": "db"}, "--fd-view"),
        ({"fd_norm": "l2"}, "--fd-norm"),
        ({"augment": ("crop",)}, "--augment"),
        ({"augment": ("phase", "phase")}, "each once"),
        ({"spc": 0}, "--spc 0"),
        ({"steps": -5}, "--steps -5"),
        ({"eval_nets": 0}, "--eval-nets 0"),
        ({"eval_steps": 0}, "--eval-steps 0"),
        ({"lr": math.nan}, "--lr nan"),
        ({"alpha": -1.0}, "--alpha -1"),
        ({"alpha": 1e30}, "--alpha 1e"),
        ({"hold_out": 0.0}, "--hold-out"),
        ({"seeds": ()}, "--seeds"),
        ({"workers": 0}, "--workers 0"),
        ({"alpha": 0.0, "methods": ("fd",)}, "fd"),
        ({"spc": 50}, "QPSK has 15"),
        ({"hold_out": 0.01}, "0 held-out"),
        ({"batch": 16}, "QPSK has 15"),
        ({"data": "npz"}, "--train-per-class"),
        ({"data": "npz", "train_per_class": 500, "test_per_class": 200}, "--path"),
        ({"path": "x.npz"}, "--path"),
        ({"limit": 3}, "--limit"),
        ({"methods": ("dm", "mdm"), "save": "x.npz"}, "--save"),
        ({"eval_only": "x.npz", "methods": ("dm",)}, "--methods dm"),
        ({"eval_only": "x.npz", "full": True}, "--full"),
        ({"more_seeds": True, "full": True}, "--more-seeds"),
        ({"encoder": "mlp"}, "conv3k7"),
        ({"snr_min": 20, "snr_max": 10}, "--snr-min"),
        ({"classes": ("OFDM", "QPSK")}, "OFDM"),
        ({"classes": ("QPSK",)}, "at least two"),
        ({"classes": ("QPSK", "QPSK")}, "each once"),
        ({"eval_arch": ("mlp",)}, "conv3k7"),
        ({"eval_arch": ()}, "--eval-arch"),
    ],
)
def test_wrong_settings_are_refused_in_one_line_and_write_nothing(change, words, tmp_path):
    with pytest.raises(InputError, match=words) as error:
        mdm.main(replace(TINY, out=str(tmp_path), **change))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_an_arm_changes_nothing_but_what_it_names():
    assert settings(Config(), ARMS["mdm"]) == Config() and ARMS["mdm"] == Arm(
        "mdm", once=mdm.UNRELATED
    )
    assert settings(Config(), Arm("mdm", alpha=0.1, spc=1)) == Config(alpha=0.1, spc=1)
    for word in ("dm", "mdm"):
        arm = ARMS[f"alexnet {word}"]
        assert arm._replace(once=()) == Arm(word, encoder="alexnet/32")
    assert ARMS["alexnet wrong spectra"] == Arm("mdm", encoder="alexnet/32", moved=1)
    assert ARMS["mdm flat augmented"] == ARMS["dm flat augmented"]._replace(method="mdm")
    assert ARMS["shallow mdm"] == ARMS["shallow dm"]._replace(method="mdm", alpha=0.1)


def test_the_benchmark_compares_three_ways_to_the_same_gradient():
    import bench

    psi = network("conv3k7/8").requires_grad_(False)
    real, S = signals(12, seed=1), signals(6, seed=2).requires_grad_()
    batch, loop = bench.distill_step(psi, real, S, 3), bench.distill_step(psi, real, S, 1, 3)
    torch.testing.assert_close(batch, loop)
    torch.testing.assert_close(batch, bench.distill_step(bench.OneDimensional(psi), real, S, 1, 3))
