"""What enters each batch normalisation in evaluation mode, beside the running statistics that it is divided by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import MissingQuantity
from diag.snapshot.forward import heard
from diag.snapshot.inside.blocks import example_blocks
from diag.snapshot.inside.listener import PassListener
from diag.snapshot.snapshot import Snapshot


@dataclass(frozen=True)
class RunningStatistics:
    """One batch normalisation with running statistics, over all examples.

    factor: by how much the variance of what enters differs from the running one, as a factor above one, the median
    channel. shift: distance of the means over the running standard deviation, the median channel. momentum: of the
    running statistics, 0 where they are plain averages; batches: how many they have seen. unseen: the share of them
    that is still what they began with, (1 - momentum)^batches. unmoved: they are mean 0 and variance 1, to the bit.
    """

    name: str
    factor: float
    shift: float
    momentum: float
    batches: int
    unmoved: bool = False

    @property
    def unseen(self) -> float:
        """The share of the initial values that is left in the running statistics."""
        if self.unmoved:
            return 1.0
        return (1 - self.momentum) ** self.batches if self.momentum else float(self.batches == 0)


class _Entering:
    """Adds up what enters one module, in float64."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.count = 0
        self.total: Any = 0.0
        self.squares: Any = 0.0

    def __call__(self, module: nn.Module, args: Any) -> None:
        x = args[0].detach()
        x = x if x.ndim > 1 else x[:, None]
        others = [axis for axis in range(x.ndim) if axis != 1]
        self.count += x.numel() // x.shape[1]
        for part in example_blocks(x):
            wide = part.to(torch.float32 if x.device.type == "mps" else torch.float64)
            self.total = self.total + wide.sum(others)
            self.squares = self.squares + wide.square().sum(others)

    def statistics(self, name: str) -> RunningStatistics:
        m, total, squares = self.module, torch.as_tensor(self.total), torch.as_tensor(self.squares)
        mean = total / self.count
        variance = (squares / self.count - mean.square()).clamp_min(0) + m.eps
        running: Tensor = m.running_var.to(mean) + m.eps
        return RunningStatistics(
            name,
            float((variance / running).log().abs().median().exp()),
            float(((mean - m.running_mean.to(mean)).abs() / running.sqrt()).median()),
            float(m.momentum or 0.0),
            int(m.num_batches_tracked) if m.num_batches_tracked is not None else 0,
            bool((m.running_mean == 0).all() and (m.running_var == 1).all()),
        )


def running_statistics(snapshot: Snapshot) -> tuple[RunningStatistics, ...]:
    """Each batch normalisation of the model that the data reaches, in the order of `named_modules()`.

    The model is in evaluation mode. Raises MissingQuantity for a model that has none with running statistics.
    """
    found = heard(snapshot, "running_statistics", StatisticsListener).found
    if not found:
        raise MissingQuantity("the model has no batch normalisation with running statistics.")
    return tuple(e.statistics(name) for name, e in found.items() if e.count)


class StatisticsListener(PassListener):
    """Hears what enters each batch normalisation that has running statistics."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.found = {
            name: _Entering(m)
            for name, m in model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is not None
        }
        self.enough = not self.found

    @contextmanager
    def throughout(self) -> Iterator[None]:
        """Hooks on these modules."""
        hooks = [entering.module.register_forward_pre_hook(entering) for entering in self.found.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
