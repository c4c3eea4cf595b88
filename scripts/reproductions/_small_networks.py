"""Small networks on the 8 x 8 digits, trained in seconds, for the cards about the landscape between networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from reproducing import Lab
from torch import Tensor, nn
from torch.nn import functional as F

import diag
from diag import datasets
from diag.result import Result

TRAIN, BATCH = 1200, 64

R = TypeVar("R", bound=Result)


class Transformer(nn.Module):
    """The rows of a digit as eight tokens; two blocks of attention and ReLU under RMSNorm, the mean read out."""

    def __init__(self, width: int = 24, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.heads, self.embed = heads, nn.Linear(8, width)
        self.place = nn.Parameter(0.1 * torch.randn(8, width))
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nn.ModuleList(nn.Linear(width, width) for _ in range(depth)))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * depth + 1))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unflatten(1, (8, 8))) + self.place
        for i in range(len(self.up)):
            y = self.norms[2 * i](x)
            q, k, v = (
                f[i](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
            )
            x = x + self.out[i](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + self.down[i](F.relu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(self.norms[-1](x.mean(1)))


def mlp(width: int = 32, depth: int = 6) -> nn.Sequential:
    """64-w-...-w-10 with ReLU."""
    layers: list[nn.Module] = []
    for inputs in (64, *[width] * (depth - 2)):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def conv_net(channels: int = 12) -> nn.Sequential:
    """Five convolutions and a linear layer."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for inputs, stride in ((1, 1), (channels, 1), (channels, 2), (channels, 1), (channels, 2)):
        layers += [nn.Conv2d(inputs, channels, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * channels, 10))


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """1,200 digits to train on and 597 to test on, pixels between 0 and 1, flat."""
    train, rest = datasets.load_dataset("digits", seed=0).split(TRAIN)
    return (train.inputs.flatten(1), train.labels), (rest.inputs.flatten(1), rest.labels)


def trained(
    model: nn.Module, order: int, steps: int, *, keep: tuple[int, ...] = (), start: int = 0, rate: float = 3e-3
) -> dict[int, nn.Module]:
    """Adam on batches in the order `order`: copies of the network at the steps `keep` and at the end."""
    (x, y), _ = digits()
    optimizer = torch.optim.Adam(model.parameters(), rate)
    generator = torch.Generator().manual_seed(order)
    copies = {}
    for step in range(start, steps):
        if step in keep:
            copies[step] = copy.deepcopy(model)
        rows = torch.randint(TRAIN, (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return copies | {steps: model.eval()}


def independent(build: Callable[[], nn.Module], seed: int, steps: int) -> nn.Module:
    """A network of its own initialisation and order of batches."""
    torch.manual_seed(seed)
    model = build()
    return trained(model, seed, steps)[steps]


def between(
    lab: Lab, arm: str, pair: tuple[nn.Module, nn.Module], step: int, measure: Callable[[diag.Snapshot], R]
) -> R:
    """What an instrument measures of the first network with the second as `other`, recorded as an arm at `step`."""
    data, held_out = digits()
    snapshot = diag.Snapshot(pair[0], nn.CrossEntropyLoss(), data, held_out=held_out, other=pair[1].state_dict())
    result = measure(snapshot)
    with lab.recorder(arm, pair[0]) as record:
        record.append_outcome(step, result)
    return result
