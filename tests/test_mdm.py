"""MDM: both of its domains by hand, its loss by two routes, what may and may not move, the baselines by hand, the whole script."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minilm.claims import held
from minilm import InputError
from minilm.data import generator
from signals import mdm_experiment as mdm
from signals import radio, radioml
from signals.augment import Twist, augment, draw_twist
from signals.baselines import gradient_distance, herding, kcenter, most_forgotten, select
from signals.mdm_experiment import ARMS, Arm, Config, Task, claims, distances, distill, figure, make_set, matching_loss, run, spectrum, start
from signals.networks import correct, make_network, train_network

TINY = Config(train_per_class=20, test_per_class=4, batch=8, spc=2, steps=3, eval_nets=1, eval_steps=2, full_steps=2, encoder="conv2k3/8",
              eval_arch=("conv2k3/8", "conv3k3/8"), classes=("QPSK", "WBFM", "AM-SSB"), hold_out=0.25, workers=1, seeds=(100,))


def signals(n=6, length=32, seed=0):
    return torch.randn(n, 2, length, generator=generator(seed, "x"))


def network(name="conv2k3/8", seed=0, length=32):
    return make_network(name, 3, length, generator(seed, "net"))


# --- the second domain

def test_the_spectrum_of_a_cosine_is_two_lines_and_that_of_a_constant_is_one():
    # I = cos(2 pi 3 n / 32): |DFT| = 16 at k = 3 and k = 29; Q = 1: 32 at k = 0; orthonormal: both divided by sqrt(32)
    n = torch.arange(32)
    x = torch.stack([torch.cos(2 * math.pi * 3 * n / 32), torch.ones(32)])[None]
    expected = torch.zeros(1, 2, 32)
    expected[0, 0, [3, 29]], expected[0, 1, 0] = 16.0, 32.0
    torch.testing.assert_close(spectrum(x, norm="none"), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(spectrum(x), expected / math.sqrt(32), atol=1e-5, rtol=0)


def test_the_spectrum_equals_the_equation_written_as_a_sum():
    x, k = signals(2, 16), np.arange(16)
    exponential = np.exp(-2j * np.pi * np.outer(k, k) / 16)
    np.testing.assert_allclose(spectrum(x, norm="none").numpy(), np.abs(x.numpy() @ exponential), rtol=1e-4)


def test_the_orthonormal_spectrum_has_the_signals_energy_in_every_view():
    x = signals()
    energy = x.square().sum((1, 2))
    torch.testing.assert_close(spectrum(x).square().sum((1, 2)), energy)
    torch.testing.assert_close(spectrum(x, "reim").square().sum((1, 2)), energy)
    torch.testing.assert_close(spectrum(x, "zmag").square().sum((1, 2)), 2 * energy)  # the same row twice


def test_what_each_view_does_not_see():
    x, zero = signals(), torch.zeros(1)
    shifted = augment(x, Twist(zero, torch.tensor([5]), torch.ones(1)))
    turned = augment(x, Twist(zero + 0.7, torch.zeros(1, dtype=torch.long), torch.ones(1)))
    same = lambda a, b: torch.allclose(a, b, atol=1e-4)
    assert same(spectrum(x), spectrum(shifted)) and not same(spectrum(x), spectrum(turned))
    assert same(spectrum(x, "zmag"), spectrum(shifted, "zmag")) and same(spectrum(x, "zmag"), spectrum(turned, "zmag"))
    assert not same(spectrum(x, "reim"), spectrum(shifted, "reim"))
    torch.testing.assert_close(spectrum(x)[..., 1:], spectrum(x)[..., 1:].flip(-1))  # symmetric in k: one sideband like the other
    upper = torch.stack([torch.cos(2 * math.pi * 3 * torch.arange(32) / 32), torch.sin(2 * math.pi * 3 * torch.arange(32) / 32)])[None]
    lower = upper * torch.tensor([1.0, -1])[:, None]
    assert same(spectrum(upper), spectrum(lower)) and not same(spectrum(upper, "zmag"), spectrum(lower, "zmag"))


def test_the_gradient_of_the_spectrum_is_finite_where_it_is_zero():
    x = torch.zeros(1, 2, 8, requires_grad=True)
    spectrum(x).sum().backward()
    assert torch.isfinite(x.grad).all()


# --- the loss

def test_the_loss_by_hand_when_the_features_are_the_samples_themselves():
    class Samples:  # psi(x) = x, flat
        features = staticmethod(lambda x: x.flatten(1))

    # class 0: real means (1, 2), synthetic (0, 0): 1 + 4; class 1: real mean (3, 0), synthetic (1, 0): 4; summed over classes: 9
    real = torch.tensor([[0.0, 2], [2, 2], [3, 1], [3, -1]]).view(4, 2, 1)
    syn = torch.tensor([[0.0, 0], [1, 0]]).view(2, 2, 1)
    assert matching_loss(Samples, real, syn, C=2).item() == 9


@pytest.mark.parametrize("name", ["conv2k3/8", "conv2k3-flatten/8", "alexnet/8"])
def test_all_classes_in_one_batch_give_the_loss_and_gradient_of_one_class_after_the_other(name):
    psi, real, syn = network(name), signals(12, seed=1), signals(6, seed=2)
    together, apart = syn.clone().requires_grad_(), syn.clone().requires_grad_()
    loss = matching_loss(psi, real, together, C=3)
    loop = sum(matching_loss(psi, real[4 * c : 4 * c + 4], apart[2 * c : 2 * c + 2], C=1) for c in range(3))
    torch.testing.assert_close(loss, loop)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value, x in ((loss, together), (loop, apart))))


def test_the_unnormalised_spectrum_only_rescales_the_loss_by_n_for_a_network_of_relus():
    psi, real, syn = network(), signals(12, seed=1), signals(6, seed=2)
    ortho, plain = (matching_loss(psi, spectrum(real, norm=norm), spectrum(syn, norm=norm), C=3) for norm in ("ortho", "none"))
    torch.testing.assert_close(plain, 32 * ortho)


def test_equal_sets_have_no_distance_and_the_order_within_a_class_does_not_matter():
    psi, real = network(), signals(6, seed=1)
    assert matching_loss(psi, real, real, C=3) == 0
    swapped = real[[1, 0, 3, 2, 5, 4]]
    assert matching_loss(psi, real, swapped, C=3).item() < 1e-10
    assert matching_loss(psi, real, real[[2, 3, 0, 1, 4, 5]], C=3) > 0.01  # but classes may not change places


# --- making S

def test_only_s_is_trained_and_psi_is_another_one_at_every_step(monkeypatch):
    task, made = Task(TINY, 100), []
    keep = task.network
    monkeypatch.setattr(task, "network", lambda *a: made.append(keep(*a)) or made[-1])
    before = [None]
    S = distill(TINY, task, 1, 1)
    assert len(made) == TINY.steps and S.shape == (6, 2, 128) and not S.requires_grad
    assert all(p.grad is None and not p.requires_grad for net in made for p in net.parameters())
    assert not torch.equal(made[0].body[0].weight, made[1].body[0].weight)
    assert torch.equal(made[0].body[0].weight, keep(TINY.encoder, "encoder 0").body[0].weight), before
    assert not torch.equal(S, start(TINY, task))


def test_alpha_zero_is_dm_and_every_method_starts_from_the_same_signals():
    task = Task(TINY, 100)
    assert torch.equal(distill(TINY, task, 1, 0), make_set(replace(TINY, alpha=0.0), task, "mdm"))
    assert torch.equal(make_set(TINY, task, "dm"), distill(TINY, task, 1, 0))
    assert not torch.equal(make_set(TINY, task, "mdm"), make_set(TINY, task, "dm"))
    frozen = replace(TINY, lr=0.0)
    for method in ("dm", "fd", "mdm", "dc"):
        assert torch.equal(make_set(frozen, task, method), make_set(frozen, task, "random")), method


def test_the_first_signals_are_training_signals_of_the_right_class_and_fewer_are_part_of_more():
    task = Task(TINY, 100)
    S = start(TINY, task)
    for signal, label in zip(S, task.labels(2)):
        row = (task.train.x == signal).all(2).all(1).nonzero()
        assert len(row) == 1 and task.train.y[row.item()] == label
    assert torch.equal(start(replace(TINY, spc=1), task), S[::2])
    noise = start(replace(TINY, init="noise"), task)
    torch.testing.assert_close(noise.square().sum(1).mean(1), torch.ones(6))


def test_training_held_out_and_test_signals_have_none_in_common():
    task = Task(TINY, 100)
    rows = torch.cat([task.train.x, task.held_out.x, task.test.x])
    assert len(torch.unique(rows.flatten(1), dim=0)) == len(rows) == 3 * 24
    assert len(task.train.y) == 45 and len(task.held_out.y) == 15


@pytest.mark.parametrize("method, first, second", [((1, 0), "TD", "FD"), ((0, 1), "FD", "TD")])
def test_it_learns_each_domain_matches_itself_and_both_together_match_both(method, first, second):
    cfg = replace(TINY, train_per_class=60, batch=32, steps=60, lr=0.03, encoder="conv3k7/16")
    task = Task(cfg, 100)
    measure = lambda S: dict(zip(("TD", "FD"), distances(task, S, judges=3)))
    begin, one, both = measure(start(cfg, task)), measure(distill(cfg, task, *method)), measure(distill(cfg, task, 1, 1))
    assert one[first] < begin[first] / 2
    assert one[second] > 0.5 * one[first] / begin[first] * begin[second]  # the other domain lags behind
    assert both["TD"] < begin["TD"] / 2 and both["FD"] < begin["FD"] / 2


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
    assert drawn.shift.min() == 0 and drawn.shift.max() == 31 and 0.4 < (drawn.conj < 0).float().mean() < 0.6 and drawn.phase.max() > 6


# --- baselines

def test_herding_by_hand():
    # mean 2. Nearest to 2 is 2 (row 1); then (2 + x) / 2 nearest to 2 without row 1: x = 1 (1.5) ties with x = 3 (2.5): lowest index
    features = torch.tensor([[1.0], [2], [3], [0], [4]])
    assert herding(features, 3) == [1, 0, 2]
    assert sorted(herding(features, 5)) == [0, 1, 2, 3, 4]


def test_kcenter_by_hand_and_forgetting_breaks_ties_by_index():
    features = torch.tensor([[0.0], [1], [10], [11], [4]])  # mean 5.2: start at 4, then 11 (distance 7), then 0 (4)
    assert kcenter(features, 3) == [4, 3, 0]
    assert len(set(kcenter(torch.zeros(4, 1), 4))) == 4
    assert most_forgotten(torch.tensor([0.0, 2, 1, 2]), 3) == [1, 3, 2] == select("forgetting", None, torch.tensor([0.0, 2, 1, 2]), 3)


def test_gradient_distance_is_zero_for_the_same_signals_and_moves_the_others():
    net, x = network(), signals(6)
    assert gradient_distance(net, x.chunk(3), x.chunk(3)).item() == pytest.approx(0, abs=1e-4)
    other = signals(6, seed=5).requires_grad_()
    distance = gradient_distance(net, x.chunk(3), other.chunk(3))
    assert distance > 0.5 and torch.autograd.grad(distance, other)[0].abs().max() > 0


def test_chosen_signals_are_real_ones_of_their_class():
    task = Task(TINY, 100)
    for method in ("herding", "kcenter", "forgetting"):
        for signal, label in zip(make_set(TINY, task, method), task.labels(2)):
            row = (task.train.x == signal).all(2).all(1).nonzero()
            assert len(row) == 1 and task.train.y[row.item()] == label, method


# --- networks

@pytest.mark.parametrize("name, features", [("conv3k7", 32), ("conv3k3-instance-flatten/16", 16 * 16), ("conv4k3-layer/8", 8),
                                            ("alexnet", 192 * 16), ("vgg16/8", 64 * 4), ("resnet18/8", 64), ("resnet18-none/8", 64)])
def test_networks_have_their_published_feature_sizes_at_128_samples(name, features):
    net = make_network(name, 11, 128, generator(0, "n"))
    assert net.features(signals(2, 128)).shape == (2, features) and net(signals(2, 128)).shape == (2, 11)


def test_the_height_one_image_convolution_is_the_one_dimensional_one():
    net, x = network("conv1k5/8"), signals(2)
    layer = net.body[0]
    h = torch.nn.functional.conv1d(x, layer.weight[:, :, 0], layer.bias, padding=2).relu()
    torch.testing.assert_close(net.features(x), torch.nn.functional.avg_pool1d(h, 2).mean(2))


def test_vgg_and_alexnet_have_the_depth_of_their_originals():
    count = lambda name: sum(isinstance(m, torch.nn.Conv2d) for m in network(name, length=128).modules())
    assert (count("vgg16/8"), count("alexnet/8"), count("resnet18/8")) == (13, 5, 17 + 3)


def test_weights_follow_their_generator_and_keep_the_scale_of_the_features():
    same = [make_network("conv4k3", 11, 128, generator(seed, "n")) for seed in (0, 0, 1)]
    assert torch.equal(same[0].body[0].weight, same[1].body[0].weight) and not torch.equal(same[0].body[0].weight, same[2].body[0].weight)
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


@pytest.mark.parametrize("name, words", [("conv3", "conv3k7"), ("conv3k4", "odd"), ("resnet50", "resnet18"), ("conv3k7/0", "WIDTH"),
                                         ("conv3k7-group", "instance"), ("vgg16", "32 samples")])
def test_unknown_and_unfitting_networks_are_refused(name, words):
    with pytest.raises(InputError, match=words):
        make_network(name, 3, 16, generator(0, "n"))


# --- the script

def test_a_method_gives_the_same_numbers_alone_and_beside_others_and_other_ones_for_another_seed():
    together = run(replace(TINY, methods=("full", "random", "dm", "mdm")), 100)
    alone = run(replace(TINY, methods=("mdm",)), 100)
    assert together.metrics["mdm"] == alone.metrics["mdm"]
    assert run(replace(TINY, methods=("mdm",)), 101).metrics != alone.metrics


def made_up(**changes):
    """Metrics that agree with the paper, four seeds with a little spread; `changes` replaces means: {"arm/metric": mean}."""
    table = {arm: {"acc": 0.5, "unseen": 0.48, "held out": 0.5, "loss TD": 0.13, "loss FD": 0.014} for arm in ARMS if arm != "saved"}
    table["random"] |= {"acc": 0.42, "unseen": 0.41, "loss TD": 1.2, "loss FD": 0.12, "alexnet/32": 0.2, "resnet18/16": 0.3}
    table["mdm"] |= {"alexnet/32": 0.25, "resnet18/16": 0.35}
    table["herding"]["acc"] = table["fd"]["acc"] = table["alpha 100"]["acc"] = 0.44
    table["dm"] |= {"acc": 0.49, "loss FD": 0.10}
    table["shallow dm"]["acc"], table["full"]["acc"] = 0.48, 0.7
    table["mdm spc 1"]["acc"], table["mdm spc 20"]["acc"] = 0.27, 0.58
    for place, value in changes.items():
        arm, name = place.split("/", 1)
        table[arm][name] = value
    noise = lambda arm, n: [0.001 * ((7 * i + len(arm)) % 5 - 2) for i in range(n)]
    cells = lambda n: {arm: {name: {"mean": mean, "sd": 0.0, "values": [mean + e for e in noise(arm, n)]} for name, mean in row.items()}
                       for arm, row in table.items()}
    return cells


def test_the_claims_hold_on_numbers_that_agree_with_the_paper():
    verdicts = {c["id"]: held(c) for c in claims(made_up()(8))}
    assert verdicts == dict.fromkeys(("C1", "C2a", "C2b", "C3", "C3b", "C4", "C5", "C6"), True)


@pytest.mark.parametrize("id, change", [
    ("C1", {"mdm/acc": 0.44}), ("C1", {"herding/acc": 0.495}), ("C2a", {"mdm/acc": 0.49}), ("C2a", {"mdm/acc": 0.46}),
    ("C2b", {"shallow mdm/acc": 0.47}), ("C3", {"mdm/unseen": 0.41}), ("C3b", {"mdm/resnet18/16": 0.28}), ("C3b", {"mdm/alexnet/32": 0.2}),
    ("C4", {"mdm/loss FD": 0.05}), ("C4", {"mdm/loss TD": 0.2}),
    ("C4", {"random/loss TD": 0.3}), ("C5", {"fd/acc": 0.5}), ("C5", {"mdm spc 20/acc": 0.45}), ("C5", {"full/acc": 0.55}),
    ("C6", {"alpha 100/acc": 0.6})])
def test_each_claim_fails_on_numbers_that_contradict_it(id, change):
    assert {c["id"]: held(c) for c in claims(made_up(**change)(8))}[id] is False


def test_the_comparison_with_dm_is_left_open_with_few_seeds_and_says_in_words_what_the_interval_says():
    measured = lambda n, **change: {c["id"]: c for c in claims(made_up(**change)(n))}["C2a"]
    assert held(measured(4)) is None and "8 seeds" in measured(4)["measured"]
    assert "MDM is better" in measured(8)["measured"] and "MDM is worse" in measured(8, **{"mdm/acc": 0.46})["measured"]
    assert "a tie" in measured(8, **{"mdm/acc": 0.4901})["measured"]
    assert {held(c) for c in claims({"random": made_up()(4)["random"]})} == {None}


def test_the_whole_script_runs_writes_its_files_and_prints_every_claim(tmp_path, capsys):
    results = mdm.main(Config(quick=True, workers=1, out=str(tmp_path)))
    printed = capsys.readouterr().out
    assert (tmp_path / "mdm.png").stat().st_size > 20_000
    again = claims(json.loads((tmp_path / "mdm.json").read_text(encoding="utf-8"))["metrics"])
    assert results["claims"] == [row | {"verdict": "smoke run"} for row in again]
    for c in results["claims"]:
        assert f"\n{c['id']} " in printed
    assert "x~" in printed and set(results["metrics"]) == set(Config().methods)


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
    cfg = replace(TINY, data="npz", path=str(tmp_path / "mine.npz"), classes=(), methods=("random", "mdm"), augment=("phase",),
                  fd_view="zmag", optimizer="sgd", out=str(tmp_path))
    assert set(mdm.main(cfg)["metrics"]) == {"random", "mdm"}
    with pytest.raises(InputError, match="10, 12"):
        mdm.main(replace(cfg, snr_min=30, snr_max=40))


@pytest.mark.parametrize("change, words", [
    ({"methods": ("mdn",)}, "mdn"), ({"data": "rml"}, "rml2016a"), ({"channel": "wire"}, "--channel"), ({"init": "zero"}, "--init"),
    ({"optimizer": "lbfgs"}, "--optimizer"), ({"fd_view": "db"}, "--fd-view"), ({"fd_norm": "l2"}, "--fd-norm"),
    ({"augment": ("crop",)}, "--augment"), ({"spc": 0}, "--spc 0"), ({"alpha": -1.0}, "--alpha -1"), ({"hold_out": 0.0}, "--hold-out"),
    ({"alpha": 0.0, "methods": ("fd",)}, "fd"), ({"spc": 50}, "QPSK has 15"),
    ({"hold_out": 0.01}, "0 held-out"), ({"batch": 16}, "QPSK has 15"),
    ({"data": "npz"}, "--path"), ({"methods": ("dm", "mdm"), "save": "x.npz"}, "--save"), ({"encoder": "mlp"}, "conv3k7"),
    ({"snr_min": 20, "snr_max": 10}, "--snr-min"), ({"classes": ("OFDM",)}, "OFDM"), ({"eval_arch": ("mlp",)}, "conv3k7")])
def test_wrong_settings_are_refused_in_one_line_and_write_nothing(change, words, tmp_path):
    with pytest.raises(InputError, match=words) as error:
        mdm.main(replace(TINY, out=str(tmp_path), **change))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_every_arm_differs_from_mdm_in_its_method_or_in_the_settings_it_names():
    assert ARMS["mdm"].method == "mdm" and not ARMS["mdm"].changes
    assert {ARMS[name] .changes["alpha"] for name in ARMS if name.startswith("alpha ")} == {0.1, 10, 100}
    assert ARMS["shallow mdm"].changes == ARMS["shallow dm"].changes | {"alpha": 0.1} and ARMS["saved"] == Arm("saved")
    assert set(Config().methods) < set(ARMS)


@pytest.mark.parametrize("name", ["mdm", "mdm_full"])
def test_the_committed_claims_and_figure_follow_from_the_committed_numbers(name):
    path = Path(mdm.__file__).parents[1] / "results" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not in this checkout")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert claims(results["metrics"]) == results["claims"]
    assert len(figure(results).axes) >= 14
    assert radioml.CLASSES_2018 and len(results["seeds"]) >= 4


def test_the_benchmark_compares_three_ways_to_the_same_gradient():
    import bench

    psi, real, S = network("conv3k7/8").requires_grad_(False), signals(12, seed=1), signals(6, seed=2).requires_grad_()
    batch, loop = bench.distill_step(psi, real, S, 3), bench.distill_step(psi, real, S, 1, 3)
    torch.testing.assert_close(batch, loop)
    torch.testing.assert_close(batch, bench.distill_step(bench.OneDimensional(psi), real, S, 1, 3))
