"""Does MDM hold? (signals/mdm.py tells the method.) Arms, seeds, controls, claims and figure.

Run     python signals/mdm_experiment.py                           # 2 CPU cores, ~3 min
        python signals/mdm_experiment.py --data rml2016a --path RML2016.10a_dict.pkl
        add --methods mdm --save set.npz to keep the learned set, --eval-only set.npz to evaluate it
"""

import time
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from minilm import InputError
from minilm.data import generator
from minilm.results import Outcome, cli, print_claims, print_metrics, progress, run_seeds, save_results
from minilm.training import pick_device
from signals import radio, radioml
from signals.augment import draw_twist
from signals.baselines import match_gradients, select
from signals.mdm import draw_per_class, learn_signals, show_signal, spectrum
from signals.mdm_claims import SHOWN, claims, figure
from signals.networks import correct, embed, make_network, train_network

PAPER = "MDM, arXiv 2408.02714"


class Arm(NamedTuple):
    """How one set S is made and tried. None: as the command line says."""

    method: str  # full, random, herding, kcenter, forgetting, dc, dm, fd, mdm or saved
    spc: int | None = None  # signals per class
    encoder: str | None = None  # psi
    alpha: float | None = None  # weight of the frequency domain
    fd_view: str | None = None  # what the frequency domain is
    init: str | None = None  # what S starts from
    lr: float | None = None  # learning rate of S
    augment: tuple[str, ...] | None = None  # in learning S and in training on it
    eval_arch: tuple[str, ...] | None = None  # networks trained on S
    eval_nets: int | None = None  # so many of each
    once: tuple[str, ...] = ()  # with --full: further networks trained on S, one of each


USUAL = ("conv3k7",)
FLAT = ("conv3k7-flatten",)
TURNED = ("phase", "shift")
UNRELATED = ("alexnet/32", "resnet18/16")

# fmt: off
ARMS = {
    # five signals per class; three networks like psi and three unseen ones (conv4k3) are trained on each set
    "full": Arm("full"),
    "random": Arm("random", once=UNRELATED),
    "herding": Arm("herding"),
    "dm": Arm("dm", once=UNRELATED),
    "fd": Arm("fd"),  # the frequency domain alone
    "mdm": Arm("mdm", once=UNRELATED),
    "shallow dm": Arm("dm", encoder="conv2k3"),
    "shallow mdm": Arm("mdm", encoder="conv2k3", alpha=0.1),
    # fewer and more signals per class; here and below two networks are trained on each set
    "random spc 1": Arm("random", spc=1, eval_arch=USUAL, eval_nets=2),
    "herding spc 1": Arm("herding", spc=1, eval_arch=USUAL, eval_nets=2),
    "dm spc 1": Arm("dm", spc=1, eval_arch=USUAL, eval_nets=2),
    "mdm spc 1": Arm("mdm", spc=1, eval_arch=USUAL, eval_nets=2),
    "random spc 20": Arm("random", spc=20, eval_arch=USUAL, eval_nets=2),
    "herding spc 20": Arm("herding", spc=20, eval_arch=USUAL, eval_nets=2),
    "dm spc 20": Arm("dm", spc=20, eval_arch=USUAL, eval_nets=2),
    "mdm spc 20": Arm("mdm", spc=20, eval_arch=USUAL, eval_nets=2),
    # other ways to choose or to learn
    "kcenter": Arm("kcenter", eval_arch=USUAL, eval_nets=2),
    "forgetting": Arm("forgetting", eval_arch=USUAL, eval_nets=2),
    "dc": Arm("dc", eval_arch=USUAL, eval_nets=2),
    # mdm with one thing changed
    "alpha 0.1": Arm("mdm", alpha=0.1, eval_arch=USUAL, eval_nets=2),
    "alpha 10": Arm("mdm", alpha=10, eval_arch=USUAL, eval_nets=2),
    "alpha 100": Arm("mdm", alpha=100, eval_arch=USUAL, eval_nets=2),
    "view zmag": Arm("mdm", fd_view="zmag", eval_arch=USUAL, eval_nets=2),
    "view reim": Arm("mdm", fd_view="reim", eval_arch=USUAL, eval_nets=2),
    "dm from noise": Arm("dm", init="noise", lr=0.05, eval_arch=USUAL, eval_nets=2),
    "mdm from noise": Arm("mdm", init="noise", lr=0.05, eval_arch=USUAL, eval_nets=2),
    # networks and encoders that keep the place of a feature: flat heads, AlexNet
    "random flat": Arm("random", encoder=FLAT[0], eval_arch=FLAT, eval_nets=2),
    "random flat augmented": Arm("random", encoder=FLAT[0], augment=TURNED, eval_arch=FLAT, eval_nets=2),
    "dm flat augmented": Arm("dm", encoder=FLAT[0], augment=TURNED, eval_arch=FLAT, eval_nets=2),
    "mdm flat augmented": Arm("mdm", encoder=FLAT[0], augment=TURNED, eval_arch=FLAT, eval_nets=2),
    "alexnet mdm": Arm("mdm", encoder="alexnet/32", once=UNRELATED[:1]),
    "saved": Arm("saved"),
}
# fmt: on

CORE = tuple(ARMS)[:16]
PICTURED = ("full", "random", "dm", "mdm")  # whose signals and spectra the figure can show


@dataclass(frozen=True)
class Config:
    methods: tuple[str, ...] = CORE  # arms to run, see ARMS
    seeds: tuple[int, ...] = (0, 1, 2, 3)  # one complete data set, distillation and evaluation per seed
    data: str = "gen"  # gen (signals/radio.py), rml2016a, rml2016b, rml2018 or npz (arrays x [n, 2, N], y, perhaps snr and classes)
    path: str | None = None  # the file, for all data but gen
    classes: tuple[str, ...] = ()  # these classes only
    snr_min: int = 10  # signals from this SNR (dB)
    snr_max: int = 18  # up to this one
    limit: int = 0  # rml2018: at most so many signals per class and SNR (0: all)
    channel: str = "free"  # gen: free (any carrier phase) or sync
    train_per_class: int = 500  # gen: training signals per class
    test_per_class: int = 200  # gen: test signals per class
    hold_out: float = 0.1  # share of the training signals that no method sees, to choose settings on
    spc: int = 5  # signals per class in S
    init: str = "real"  # S starts as random real signals, or as noise
    steps: int = 100  # distillation steps, the same for all methods
    batch: int = 32  # real signals per class and step
    lr: float = 0.02  # learning rate of S
    optimizer: str = "adam"  # of S: adam, or sgd with momentum 0.5
    encoder: str = "conv3k7"  # psi, see signals/networks.py
    alpha: float = 1.0  # weight of the frequency domain
    fd_view: str = "mag"  # what the frequency domain is: mag |DFT I|, |DFT Q| (the paper); zmag |DFT z| twice; reim Re, Im of DFT z
    fd_norm: str = "ortho"  # DFT divided by sqrt(N), or none
    augment: tuple[str, ...] = ()  # phase, shift, conj: in distillation (same draw for T and S; not dc) and in evaluation
    eval_arch: tuple[str, ...] = ("conv3k7", "conv4k3")  # trained on S: first the usual network, then an unseen one; others: --full
    eval_nets: int = 3  # networks trained on each S
    eval_steps: int = 100  # their training steps (whole S, or 256 signals of it, at a step)
    eval_lr: float = 5e-3  # their learning rate
    full_steps: int = 400  # training steps on the full set
    save: str | None = None  # write the learned set of the first seed to this .npz (needs exactly one method)
    eval_only: str | None = None  # evaluate such an .npz in place of learning one
    device: str = "auto"  # auto, cpu or cuda
    quick: bool = False  # smoke run: a few steps, one seed
    full: bool = False  # every arm of ARMS, eight seeds
    workers: int | None = None  # seeds at a time (default: one per core)
    out: str | None = None  # folder for results in place of results/ or runs/


def settings(cfg: Config, arm: Arm) -> Config:
    """What the command line says, and what the arm says otherwise."""
    changes = arm._asdict()
    for name in ("method", "once"):
        del changes[name]
    return replace(cfg, **{name: value for name, value in changes.items() if value is not None})


# --- data


def make_data(cfg: Config, seed: int) -> tuple[radio.Signals, radio.Signals]:
    """Training signals, of which a part will be held out, and test signals."""
    if cfg.data != "gen":
        data = radioml.read_signals(
            cfg.data, cfg.path, cfg.snr_min, cfg.snr_max, cfg.classes, cfg.limit
        )
        return radioml.split(data, 0, 0.8, "test")
    snrs = range(cfg.snr_min, cfg.snr_max + 1, 2)
    channel = radio.CHANNELS[cfg.channel]
    names = cfg.classes or radio.CLASSES
    train = radio.make_signals(cfg.train_per_class, snrs, seed, "train", channel, names)
    test = radio.make_signals(cfg.test_per_class, snrs, seed, "test", channel, names)
    return train, test


class Task:
    """What all arms of a seed share: training signals, held-out ones, test signals, and the
    networks that were trained on all."""

    def __init__(self, cfg: Config, seed: int):
        self.seed = seed
        self.device = pick_device(cfg.device)
        train, test = make_data(cfg, seed)
        self.names = train.classes
        self.length = train.x.shape[2]
        train, held_out = radioml.split(train, seed, 1 - cfg.hold_out, "hold out")
        check_counts(cfg, train, held_out, test)
        self.train = self.to_device(train)
        self.held_out = self.to_device(held_out)
        self.test = self.to_device(test)
        labels = range(len(self.names))
        self.rows = [torch.from_numpy(np.flatnonzero(train.y == c)) for c in labels]
        self.trained = {}  # network name -> the network, how often it forgot each signal

    def to_device(self, part: radio.Signals) -> radio.Signals:
        x = torch.from_numpy(part.x).to(self.device)
        y = torch.from_numpy(part.y).to(self.device)
        return part._replace(x=x, y=y)

    def network(self, arch: str, name: str):
        """A fresh network; the same name, the same weights."""
        net = make_network(arch, len(self.names), self.length, generator(self.seed, name))
        return net.to(self.device)

    def train_on_all(self, cfg: Config, arch: str) -> tuple:
        """(network, how often it forgot each signal) after training on all; once per seed."""
        if arch not in self.trained:
            net = self.network(arch, "full")
            order = generator(self.seed, "full order")
            forgotten = train_network(
                net, self.train.x, self.train.y, cfg.full_steps, cfg.eval_lr, order, cfg.augment
            )
            self.trained[arch] = net, forgotten
        return self.trained[arch]

    def draw(self, count: int, gen: torch.Generator) -> torch.Tensor:
        return draw_per_class(self.train.x, self.rows, count, gen)

    def labels(self, S: torch.Tensor) -> torch.Tensor:
        """Of a set that holds its classes one after the other, equally many signals of each."""
        C = len(self.names)
        return torch.arange(C, device=self.device).repeat_interleave(len(S) // C)


def check_counts(cfg: Config, train, held_out, test) -> None:
    needed = max(cfg.spc, cfg.batch)
    for name, count in zip(train.classes, np.bincount(train.y, minlength=len(train.classes))):
        if count < needed:
            raise InputError(
                f"class {name} has {count} training signals: give more, or less than "
                f"--spc {cfg.spc}, --batch {cfg.batch}"
            )
    if not len(held_out.y) or not len(test.y):
        raise InputError(
            f"--hold-out {cfg.hold_out} leaves {len(held_out.y)} held-out, {len(test.y)} test "
            "signals: give more signals"
        )


# --- making S


def first_signals(cfg: Config, task: Task) -> torch.Tensor:
    """The initial S, the same for all methods: random real signals (the arm `random` stays there),
    or noise at unit power."""
    S = task.draw(cfg.spc, generator(task.seed, "first signals"))
    if cfg.init == "noise":
        S = torch.randn(S.shape, generator=generator(task.seed, "noise")).to(task.device)
        S = S / S.square().sum(1, keepdim=True).mean(2, keepdim=True).sqrt()
    return S


def optimizer_for(cfg: Config, S: torch.Tensor) -> torch.optim.Optimizer:
    if cfg.optimizer == "adam":
        return torch.optim.Adam([S], cfg.lr)
    return torch.optim.SGD([S], cfg.lr, momentum=0.5)


def distill(cfg: Config, task: Task, time_weight: float, alpha: float) -> torch.Tensor:
    """DM (1, 0), the spectrum alone (0, 1) and MDM (1, alpha), on this task's signals."""
    C = len(task.names)
    draws = generator(task.seed, "real signals")
    twists = generator(task.seed, "augmentation")

    def new_twist():
        return draw_twist(C, cfg.augment, task.length, twists)

    return learn_signals(
        first_signals(cfg, task),
        C,
        draw_real=lambda: task.draw(cfg.batch, draws),
        new_encoder=lambda step: task.network(cfg.encoder, f"encoder {step}"),
        steps=progress(range(cfg.steps), "distilling"),
        make_optimizer=lambda S: optimizer_for(cfg, S),
        time_weight=time_weight,
        alpha=alpha,
        view=cfg.fd_view,
        norm=cfg.fd_norm,
        draw_twist=new_twist if cfg.augment else None,
    )


def choose(cfg: Config, task: Task, method: str) -> torch.Tensor:
    """Real signals, class by class, chosen with the help of a network that was trained on all."""
    net, forgotten = task.train_on_all(cfg, cfg.eval_arch[0])
    chosen = []
    for own in task.rows:
        features = embed(net, task.train.x[own])
        chosen.append(own[select(method, features, forgotten[own], cfg.spc)])
    return task.train.x[torch.cat(chosen)]


def match_all_gradients(cfg: Config, task: Task) -> torch.Tensor:
    S = first_signals(cfg, task).clone().requires_grad_()
    draws = generator(task.seed, "real signals")
    match_gradients(
        S,
        optimizer_for(cfg, S),
        progress(range(cfg.steps), "gradients"),
        lambda step: task.network(cfg.encoder, f"encoder {step}"),
        lambda: task.draw(cfg.batch, draws),
        len(task.names),
    )
    return S.detach()


def make_set(cfg: Config, task: Task, method: str) -> torch.Tensor:
    """S [C * SPC, 2, N], class by class."""
    match method:
        case "random":
            return first_signals(cfg, task)
        case "herding" | "kcenter" | "forgetting":
            return choose(cfg, task, method)
        case "dc":
            return match_all_gradients(cfg, task)
        case "dm":
            return distill(cfg, task, time_weight=1, alpha=0)
        case "fd":
            return distill(cfg, task, time_weight=0, alpha=cfg.alpha)
        case "mdm":
            return distill(cfg, task, time_weight=1, alpha=cfg.alpha)
    saved = radioml.read_set(cfg.eval_only, task.names, task.length)
    return torch.from_numpy(saved).to(task.device)


# --- judging S


class Judge(NamedTuple):
    """A fresh network that made no set, and what it sees of the *whole* training classes."""

    psi: torch.nn.Module
    time: torch.Tensor  # [C, F], the classes' mean features
    frequency: torch.Tensor  # [C, F], those of their spectra


def make_judges(task: Task, count: int = 6) -> list[Judge]:
    judges = []
    for number in range(count):
        psi = task.network("conv3k7", f"judge {number}")
        classes = [task.train.x[own] for own in task.rows]
        time_means = torch.stack([embed(psi, x).mean(0) for x in classes])
        frequency_means = torch.stack([embed(psi, spectrum(x)).mean(0) for x in classes])
        judges.append(Judge(psi, time_means, frequency_means))
    return judges


def distances(judges: list[Judge], S: torch.Tensor) -> tuple[float, float]:
    """L_TD and L_FD (mag, ortho) of the finished S, mean over the judges."""
    time_total, frequency_total = 0.0, 0.0
    for judge in judges:
        C = len(judge.time)
        given = embed(judge.psi, S).unflatten(0, (C, -1)).mean(1)
        given_f = embed(judge.psi, spectrum(S)).unflatten(0, (C, -1)).mean(1)
        time_total += (judge.time - given).square().sum().item() / len(judges)
        frequency_total += (judge.frequency - given_f).square().sum().item() / len(judges)
    return time_total, frequency_total


def train_networks(cfg: Config, task: Task, S: torch.Tensor, once: tuple[str, ...]) -> dict:
    """{name: networks trained on S}: --eval-nets of each of --eval-arch, and one of each `once`."""
    nets = {}
    for arch in cfg.eval_arch + once:
        count = 1 if arch in once else cfg.eval_nets
        nets[arch] = [task.network(arch, f"evaluation {i}") for i in range(count)]
        for i, net in enumerate(nets[arch]):
            order = generator(task.seed, f"evaluation order {i}")
            labels = task.labels(S)
            train_network(net, S, labels, cfg.eval_steps, cfg.eval_lr, order, cfg.augment)
    return nets


def score(nets: dict, task: Task) -> tuple[dict, dict]:
    """Accuracies, the first network's under "acc", the second's under "unseen", others under their
    names; the first's by SNR as a series."""
    metrics, series = {}, {}
    for place, (arch, group) in enumerate(nets.items()):
        name = ("acc", "unseen")[place] if place < 2 else arch
        hits = np.mean([correct(net, task.test.x, task.test.y) for net in group], 0)  # [n]
        metrics[name] = hits.mean()
        if place == 0:
            held_out = [correct(net, task.held_out.x, task.held_out.y) for net in group]
            metrics["held out"] = np.mean(held_out)
            snrs = np.unique(task.test.snr)
            series["acc by SNR"] = (snrs, [hits[task.test.snr == snr].mean() for snr in snrs])
    return metrics, series


def pictures(task: Task, S: torch.Tensor, y: torch.Tensor, drawn: bool) -> dict:
    """For the figure: the mean spectrum of each class that is shown, and its first signal. Empty
    where they are not drawn."""
    series = {}
    half = task.length // 2 + 1
    for name in SHOWN:
        if name not in task.names:
            continue
        x = S[y == task.names.index(name)]  # (signals of the class, 2, N)
        mean = spectrum(x).mean((0, 1))[:half]
        series[f"{name} spectrum"] = (range(half), rounded(mean, drawn))
        for axis, row in zip("IQ", x[0]):
            series[f"{name} {axis}"] = (range(task.length), rounded(row, drawn))
    return series


def rounded(values: torch.Tensor, drawn: bool) -> list[float]:
    return [round(value, 3) for value in values.tolist()] if drawn else []


# --- one seed


def run_arm(cfg: Config, name: str, task: Task, judges: list[Judge]) -> tuple[dict, dict]:
    """One arm of one seed -> its metrics, its series {name: (x, values)}."""
    arm = ARMS[name]
    drawn = task.seed == cfg.seeds[0]
    once = arm.once if cfg.full else ()
    cfg = settings(cfg, arm)
    metrics = {}
    if arm.method == "full":
        S, y = task.train.x, task.train.y
        nets = {arch: [task.train_on_all(cfg, arch)[0]] for arch in cfg.eval_arch + once}
    else:
        S = make_set(cfg, task, arm.method)
        y = task.labels(S)
        nets = train_networks(cfg, task, S, once)
        metrics["loss TD"], metrics["loss FD"] = distances(judges, S)
        metrics["rms"] = S.square().sum(1).mean().sqrt().item()
    accuracies, series = score(nets, task)
    if name in PICTURED:
        series |= pictures(task, S, y, drawn)
    if cfg.save and drawn:
        radioml.write_set(cfg.save, S.cpu().numpy(), y.cpu().numpy(), task.names, asdict(cfg))
    return metrics | accuracies, series


def run(cfg: Config, seed: int) -> Outcome:
    """All arms of one seed: the same signals, first S, encoders and evaluation networks for each."""
    task = Task(cfg, seed)
    judges = make_judges(task)
    outcome = Outcome({}, {})
    for name in progress(cfg.methods, f"seed {seed}"):
        outcome.metrics[name], outcome.series[name] = run_arm(cfg, name, task, judges)
    return outcome


# --- main


def show_example(task: Task) -> None:
    """Prints one training signal as text: its two domains and its label."""
    name, snr = task.names[task.train.y[0]], task.train.snr[0]
    print(f"One of {len(task.train.y)} training signals: {name}, {snr} dB, {task.length} samples")
    show_signal(task.train.x[0].cpu())


def main(cfg: Config) -> dict:
    started, asked = time.time(), cfg
    for flag, given, allowed in (
            ("methods", cfg.methods, ARMS), ("data", [cfg.data], ("gen", "rml2016a", "rml2016b", "rml2018", "npz")),
            ("channel", [cfg.channel], radio.CHANNELS), ("init", [cfg.init], ("real", "noise")),
            ("optimizer", [cfg.optimizer], ("adam", "sgd")), ("fd-view", [cfg.fd_view], ("mag", "zmag", "reim")),
            ("fd-norm", [cfg.fd_norm], ("ortho", "none")), ("augment", cfg.augment, ("phase", "shift", "conj"))):
        if wrong := sorted(set(given) - set(allowed)):
            raise InputError(f"--{flag} {' '.join(wrong)} is not known; give {', '.join(allowed)}")
    if cfg.spc < 1 or cfg.batch < 1 or not 0 < cfg.hold_out < 1 or not 0 <= cfg.alpha < float("inf") or cfg.snr_min > cfg.snr_max:
        raise InputError(f"--spc {cfg.spc} and --batch {cfg.batch} must be at least 1, --hold-out {cfg.hold_out} between 0 and 1, "
                         f"--alpha {cfg.alpha} at least 0, --snr-min {cfg.snr_min} not above --snr-max {cfg.snr_max}")
    if cfg.alpha == 0 and "fd" in cfg.methods:
        raise InputError("--alpha 0 leaves method fd nothing to match: give a positive --alpha, or method dm")
    if cfg.eval_only:
        cfg = replace(cfg, methods=("saved",))
    if cfg.full:
        cfg = replace(cfg, methods=tuple(ARMS)[:-1], seeds=tuple(range(10, 18)) if cfg.seeds == Config().seeds else cfg.seeds)
    if cfg.save and len(cfg.methods) != 1:
        raise InputError(f"--save writes one learned set, but there are {len(cfg.methods)} methods: give one, for example --methods mdm")
    if cfg.quick:
        cfg = replace(cfg, seeds=cfg.seeds[:1], train_per_class=40, test_per_class=10, steps=2, eval_nets=1, eval_steps=2, full_steps=2)
    show_example(Task(cfg, cfg.seeds[0]))
    outcomes = run_seeds(run, cfg, cfg.seeds, cfg.workers)
    results = save_results(__file__, PAPER, asked, outcomes, claims, figure, started, cfg.seeds)
    print_metrics(results["metrics"], ["acc", "unseen", "held out", "loss TD", "loss FD", *(UNRELATED if cfg.full else ())], digits=3)
    print_claims(results["claims"])
    return results


if __name__ == "__main__":
    cli(main, Config)
