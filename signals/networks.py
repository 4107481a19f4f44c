"""One-dimensional ConvNet, AlexNet, VGG16 and ResNet18 for signals [B, 2, N], all with `features` (the embedding psi of dataset
distillation: everything but the last layer) and `forward` (logits).

A network is named by a short text:  KIND[-NORM][-flatten][/WIDTH]

    conv3k7            3 blocks of convolution (7 taps), ReLU, average pooling by 2; then the mean over time (GAP)
    conv3k3-instance-flatten/128    the usual network of dataset condensation: instance norm, no mean over time, 128 channels
    alexnet  vgg16  resnet18        their two-dimensional originals with one axis less; alexnet/32: the same, its first layer 32 wide

NORM: none, batch, instance (per signal and channel), layer (per signal). Without the word: none for conv and alexnet, batch for the others.

Inside, a signal is an image of height 1 in channels-last order: the same sums as one-dimensional layers, up to three times faster on a CPU.
"""

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minilm import InputError
from minilm.data import batches
from minilm.training import schedule, set_lr
from signals.augment import augment, draw_twist

NORMS = {
    "none": lambda width: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "instance": lambda width: nn.GroupNorm(width, width),
    "layer": lambda width: nn.GroupNorm(1, width),
}
WIDTHS = {"conv": 32, "alexnet": 128, "vgg16": 64, "resnet18": 64}  # channels of the first layer


class Network(nn.Module):
    """body [B, 2, 1, N] -> [B, width, 1, n], then the mean over time (or all of it, flat), then one linear layer."""

    def __init__(self, body: nn.Module, classes: int, length: int, flatten: bool):
        super().__init__()
        self.body, self.flatten = body.to(memory_format=torch.channels_last), flatten
        with torch.no_grad():
            body.eval()
            size = self.features(torch.zeros(1, 2, length)).shape[1]
            body.train()
        self.head = nn.Linear(size, classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(
            x[:, :, None].contiguous(memory_format=torch.channels_last)
        )  # (B, width, 1, n)
        return h.flatten(1) if self.flatten else h.mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def conv(inputs: int, outputs: int, taps: int, norm: str, stride: int = 1) -> list[nn.Module]:
    """Convolution that keeps the length (up to the stride), norm, ReLU."""
    return [
        nn.Conv2d(inputs, outputs, (1, taps), (1, stride), (0, taps // 2)),
        NORMS[norm](outputs),
        nn.ReLU(inplace=True),
    ]


def convnet(depth: int, taps: int, width: int, norm: str) -> nn.Module:
    layers = []
    for block in range(depth):
        layers += [*conv(2 if block == 0 else width, width, taps, norm), nn.AvgPool2d((1, 2))]
    return nn.Sequential(*layers)


def alexnet(width: int, norm: str) -> nn.Module:
    w1, w2, w3 = width, width * 3 // 2, width * 2
    return nn.Sequential(
        *conv(2, w1, 5, norm),
        nn.MaxPool2d((1, 2)),
        *conv(w1, w2, 5, norm),
        nn.MaxPool2d((1, 2)),
        *conv(w2, w3, 3, norm),
        *conv(w3, w2, 3, norm),
        *conv(w2, w2, 3, norm),
        nn.MaxPool2d((1, 2)),
    )


def vgg16(width: int, norm: str) -> nn.Module:
    layers, inputs = [], 2
    for times, count in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(count):
            layers += conv(inputs, width * times, 3, norm)
            inputs = width * times
        layers.append(nn.MaxPool2d((1, 2)))
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """relu(x + F(x)) with two convolutions in F; where the shape changes, x goes through a convolution of one tap."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str):
        super().__init__()
        self.path = nn.Sequential(
            *conv(inputs, outputs, 3, norm, stride), *conv(outputs, outputs, 3, norm)[:-1]
        )
        self.skip = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, (1, stride)), NORMS[norm](outputs)
            )

    def forward(self, x):
        return F.relu(self.path(x) + self.skip(x))


def resnet18(width: int, norm: str) -> nn.Module:
    layers, inputs = conv(2, width, 3, norm), width
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Residual(inputs, outputs, stride, norm), Residual(outputs, outputs, 1, norm)]
        inputs = outputs
    return nn.Sequential(*layers)


def make_network(name: str, classes: int, length: int, gen: torch.Generator) -> Network:
    """The named network with weights drawn from `gen`: convolutions N(0, 2 / fan-in) (Kaiming: without a norm torch's default would
    shrink the features from layer to layer), last layer N(0, 1 / fan-in), biases 0."""
    parts = re.fullmatch(
        r"(conv([1-9])k([1-9])|alexnet|vgg16|resnet18)(?:-(none|batch|instance|layer))?(-flatten)?(?:/([1-9]\d*))?",
        name,
    )
    if parts is None:
        raise InputError(
            f"network {name} is not known: give conv3k7 (3 blocks, 7 taps), alexnet, vgg16 or resnet18, then perhaps -none, "
            "-batch, -instance or -layer, then perhaps -flatten, then perhaps /WIDTH"
        )
    kind, depth, taps, norm, flatten, width = parts.groups()
    kind = "conv" if depth else kind
    if depth and int(taps) % 2 == 0:
        raise InputError(f"network {name} has an even number of taps: give an odd one")
    halvings = {"conv": int(depth or 0), "alexnet": 3, "vgg16": 5, "resnet18": 0}[kind]
    if length < 2**halvings:
        raise InputError(
            f"network {name} halves the signal {halvings} times and needs {2**halvings} samples, got {length}"
        )
    width, norm = (
        int(width or WIDTHS[kind]),
        norm or ("batch" if kind in ("vgg16", "resnet18") else "none"),
    )
    make = {
        "conv": lambda *rest: convnet(int(depth), int(taps), *rest),
        "alexnet": alexnet,
        "vgg16": vgg16,
        "resnet18": resnet18,
    }[kind]
    network = Network(
        make(width, norm), classes, length, bool(flatten) or kind in ("alexnet", "vgg16")
    )
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                weight = torch.empty(layer.weight.shape).normal_(
                    0, math.sqrt(2 / layer.weight[0].numel()), generator=gen
                )
                layer.weight.copy_(weight)
                layer.bias.zero_()
        network.head.weight.normal_(0, 1 / math.sqrt(network.head.in_features), generator=gen)
        network.head.bias.zero_()
    return network


# --- training and testing them


def train_network(
    net: Network,
    x: torch.Tensor,
    y: torch.Tensor,
    steps: int,
    lr: float,
    gen: torch.Generator,
    kinds: Sequence[str] = (),
) -> torch.Tensor:
    """Adam, cosine to 0, batches of 256 (or all), augmented by `kinds`. Returns [n]: how often each signal was right and then, when next
    seen, wrong."""
    optimizer = torch.optim.Adam(net.parameters(), lr, weight_decay=5e-4)
    right, forgotten = torch.zeros(len(y), dtype=torch.bool), torch.zeros(len(y))
    net.train()
    for step, rows in enumerate(batches(len(y), 256, gen, steps)):
        set_lr([optimizer], schedule(step, steps, "cosine", final=0.0))
        signals, target = x[rows.to(x.device)], y[rows.to(x.device)]
        if kinds:
            signals = augment(signals, draw_twist(len(rows), kinds, x.shape[2], gen))
        logits = net(signals)
        optimizer.zero_grad()
        F.cross_entropy(logits, target).backward()
        optimizer.step()
        now = (logits.argmax(1) == target).cpu()
        forgotten[rows] += right[rows] & ~now
        right[rows] = now
    net.eval()
    return forgotten


@torch.no_grad()
def embed(net: Network, x: torch.Tensor) -> torch.Tensor:
    """net.features of many signals, [n, F]."""
    return torch.cat([net.features(part) for part in x.split(1024)])


@torch.no_grad()
def predict(net: Network, x: torch.Tensor) -> torch.Tensor:
    """int64 [n], the most probable class of each signal (the first one on ties)."""
    return torch.cat([net(part).argmax(1) for part in x.split(1024)])


def correct(net: Network, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """bool [n]: is the prediction right?"""
    return (predict(net, x) == y).cpu().numpy()
