"""One-dimensional ConvNet, AlexNet, VGG16 and ResNet18 for signals [B, 2, N], all with `features`
(psi of dataset distillation: everything but the last layer) and `forward` (logits).

A network is named by a short text:  KIND[-NORM][-flatten][/WIDTH]

    conv3k7     3 blocks of convolution (7 taps), ReLU, average pooling; then the mean over time
    conv3k3-instance-flatten/128    the usual network of dataset condensation: instance norm, no
                                    mean over time, 128 channels
    alexnet  vgg16  resnet18        their two-dimensional originals with one axis less
    alexnet/32                      the same, its first layer 32 wide

NORM: none, batch, instance (per signal and channel), layer (per signal). Without the word: none for
conv and alexnet, batch for the others.

Inside, a signal is an image of height 1 in channels-last order: the same sums as one-dimensional
layers, up to three times faster on a CPU.
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

NAME = re.compile(
    r"(conv([1-9])k([1-9])|alexnet|vgg16|resnet18)"
    r"(?:-(none|batch|instance|layer))?(-flatten)?(?:/([1-9]\d*))?"
)
WIDTHS = {"conv": 32, "alexnet": 128, "vgg16": 64, "resnet18": 64}  # channels of the first layer


def norm_layer(kind: str, width: int) -> nn.Module:
    match kind:
        case "batch":
            return nn.BatchNorm2d(width)
        case "instance":
            return nn.GroupNorm(width, width)
        case "layer":
            return nn.GroupNorm(1, width)
    return nn.Identity()


class Network(nn.Module):
    """body [B, 2, 1, N] -> [B, width, 1, n], then the mean over time (or all of it, flat), then one
    linear layer."""

    def __init__(self, body: nn.Module, classes: int, length: int, flatten: bool):
        super().__init__()
        self.body = body.to(memory_format=torch.channels_last)
        self.flatten = flatten
        with torch.no_grad():
            body.eval()
            size = self.features(torch.zeros(1, 2, length)).shape[1]
            body.train()
        self.head = nn.Linear(size, classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        image = x[:, :, None].contiguous(memory_format=torch.channels_last)  # (B, 2, 1, N)
        h = self.body(image)  # (B, width, 1, n)
        return h.flatten(1) if self.flatten else h.mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


def conv(inputs: int, outputs: int, taps: int, norm: str, stride: int = 1) -> list[nn.Module]:
    """Convolution that keeps the length (up to the stride), norm, ReLU."""
    return [
        nn.Conv2d(inputs, outputs, (1, taps), (1, stride), (0, taps // 2)),
        norm_layer(norm, outputs),
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
    layers = []
    inputs = 2
    for times, count in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(count):
            layers += conv(inputs, width * times, 3, norm)
            inputs = width * times
        layers.append(nn.MaxPool2d((1, 2)))
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """relu(x + F(x)) with two convolutions in F; where the shape changes, x goes through a
    convolution of one tap."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str):
        super().__init__()
        first = conv(inputs, outputs, 3, norm, stride)
        second = conv(outputs, outputs, 3, norm)[:-1]  # its ReLU comes after the sum
        self.path = nn.Sequential(*first, *second)
        self.skip = nn.Identity()
        if stride > 1 or inputs != outputs:
            narrow = nn.Conv2d(inputs, outputs, 1, (1, stride))
            self.skip = nn.Sequential(narrow, norm_layer(norm, outputs))

    def forward(self, x):
        return F.relu(self.path(x) + self.skip(x))


def resnet18(width: int, norm: str) -> nn.Module:
    layers = conv(2, width, 3, norm)
    inputs = width
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Residual(inputs, outputs, stride, norm), Residual(outputs, outputs, 1, norm)]
        inputs = outputs
    return nn.Sequential(*layers)


def make_network(name: str, classes: int, length: int, gen: torch.Generator) -> Network:
    """The named network with weights drawn from `gen`: convolutions N(0, 2 / fan-in) (Kaiming:
    without a norm torch's default would shrink the features from layer to layer), last layer
    N(0, 1 / fan-in), biases 0. InputError for a name that is not known."""
    parts = NAME.fullmatch(name)
    if parts is None:
        raise InputError(
            f"network {name} is not known: give conv3k7 (3 blocks, 7 taps), alexnet, vgg16 or "
            "resnet18, then perhaps -none, -batch, -instance or -layer, then perhaps -flatten, "
            "then perhaps /WIDTH"
        )
    kind, depth, taps, norm, flatten, width = parts.groups()
    kind = "conv" if depth else kind
    if depth and int(taps) % 2 == 0:
        raise InputError(f"network {name} has an even number of taps: give an odd one")
    halvings = {"conv": int(depth or 0), "alexnet": 3, "vgg16": 5, "resnet18": 0}[kind]
    if length < 2**halvings:
        raise InputError(
            f"network {name} halves the signal {halvings} times and needs {2**halvings} samples, "
            f"got {length}"
        )
    width = int(width or WIDTHS[kind])
    norm = norm or ("batch" if kind in ("vgg16", "resnet18") else "none")
    if kind == "conv":
        body = convnet(int(depth), int(taps), width, norm)
    else:
        make_body = {"alexnet": alexnet, "vgg16": vgg16, "resnet18": resnet18}[kind]
        body = make_body(width, norm)
    network = Network(body, classes, length, bool(flatten) or kind in ("alexnet", "vgg16"))
    draw_weights(network, gen)
    return network


@torch.no_grad()
def draw_weights(network: Network, gen: torch.Generator) -> None:
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            deviation = math.sqrt(2 / layer.weight[0].numel())
            weight = torch.empty(layer.weight.shape).normal_(0, deviation, generator=gen)
            layer.weight.copy_(weight)  # (which keeps its memory format)
            layer.bias.zero_()
    network.head.weight.normal_(0, 1 / math.sqrt(network.head.in_features), generator=gen)
    network.head.bias.zero_()


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
    """Adam, cosine to 0, batches of 256 (or all), augmented by `kinds`. Returns [n]: how often each
    signal was right and then, when next seen, wrong."""
    optimizer = torch.optim.Adam(net.parameters(), lr, weight_decay=5e-4)
    right = torch.zeros(len(y), dtype=torch.bool)
    forgotten = torch.zeros(len(y))
    net.train()
    for step, rows in enumerate(batches(len(y), 256, gen, steps)):
        set_lr([optimizer], schedule(step, steps, "cosine", final=0.0))
        signals = x[rows.to(x.device)]
        target = y[rows.to(x.device)]
        if kinds:
            twist = draw_twist(len(rows), kinds, x.shape[2], gen)
            signals = augment(signals, twist)
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
