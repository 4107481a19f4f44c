"""What MDM is compared with: three ways to choose real signals, and gradient matching."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F


def herding(features: torch.Tensor, count: int) -> list[int]:
    """Greedily those rows of features [n, F] whose mean stays nearest to the mean of all; lowest
    index on ties, none twice."""
    mean = features.mean(0)
    total = torch.zeros_like(mean)
    chosen = []
    for t in range(count):
        distance = (mean - (total + features) / (t + 1)).norm(dim=1)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total = total + features[chosen[-1]]
    return chosen


def kcenter(features: torch.Tensor, count: int) -> list[int]:
    """The row nearest to the mean of all, then ever again the one farthest from all chosen."""
    chosen = [int((features - features.mean(0)).norm(dim=1).argmin())]
    while len(chosen) < count:
        distance = (features[:, None] - features[chosen]).norm(dim=2).min(1).values
        distance[chosen] = -torch.inf
        chosen.append(int(distance.argmax()))
    return chosen


def most_forgotten(forgotten: torch.Tensor, count: int) -> list[int]:
    """Those which a network, while it was trained on all, most often had right and then wrong again
    (Toneva et al. 2019)."""
    return forgotten.argsort(descending=True, stable=True)[:count].tolist()


def select(method: str, features: torch.Tensor, forgotten: torch.Tensor, count: int) -> list[int]:
    """Which `count` signals of one class a method picks; features [n, F] and forgotten [n] come
    from a network trained on the full set."""
    if method == "herding":
        return herding(features, count)
    if method == "kcenter":
        return kcenter(features, count)
    return most_forgotten(forgotten, count)


def gradient_distance(
    net: torch.nn.Module, real: Sequence[torch.Tensor], syn: Sequence[torch.Tensor]
) -> torch.Tensor:
    """DC (Zhao, Mopuri & Bilen 2021): the training gradients on the synthetic signals of a class
    should point where those on the real ones do: sum over classes, layers and output units of
    1 - cos. real, syn: one [B, 2, N] per class; differentiable in syn."""
    weights = [p for p in net.parameters() if p.dim() > 1]
    total = 0
    for c, (x, s) in enumerate(zip(real, syn)):
        label = torch.tensor(c, device=x.device)
        loss = F.cross_entropy(net(x), label.expand(len(x)))
        wanted = torch.autograd.grad(loss, weights)
        loss = F.cross_entropy(net(s), label.expand(len(s)))
        given = torch.autograd.grad(loss, weights, create_graph=True)
        cosines = [F.cosine_similarity(a.flatten(1), b.flatten(1)) for a, b in zip(wanted, given)]
        total = total + sum((1 - cosine).sum() for cosine in cosines)
    return total


def match_gradients(
    S: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    new_network: Callable,
    draw: Callable,
    C: int,
    inner: int = 10,
) -> None:
    """Trains the leaf S [C * SPC, 2, N]. Networks start afresh every `inner` steps and train on S
    in between."""
    y = torch.arange(C, device=S.device).repeat_interleave(len(S) // C)
    for step in steps:
        if step % inner == 0:
            net = new_network(step)
            sgd = torch.optim.SGD(net.parameters(), 0.01, momentum=0.5)
        optimizer.zero_grad()
        gradient_distance(net, draw().chunk(C), S.chunk(C)).backward()
        optimizer.step()
        sgd.zero_grad()
        F.cross_entropy(net(S.detach()), y).backward()
        sgd.step()
