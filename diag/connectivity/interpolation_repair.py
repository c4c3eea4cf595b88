"""REPAIR: give every unit of an interpolated network the mean and spread interpolated between its endpoints.

Between two networks the pre-activations of the interpolated one lose variance, the more the deeper ("variance
collapse"). At each point the pre-activation of every unit is rescaled to mean (1-a) mu_0 + a mu_1 and standard
deviation (1-a) s_0 + a s_1. Source: Jordan et al. 2023 (arXiv:2211.08403, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diag.connectivity.interpolation import Interpolation, NetworkState, overwrite, straight
from diag.connectivity.interpolation_norms import norm_layers_in_training
from diag.errors import Unsupported
from diag.snapshot.preserve import preserved

EPSILON = 1e-5  # added to variances, as BatchNorm does
REPAIRED_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


@dataclass
class Statistics:
    """Mean and variance of every unit of every layer, float64 (units,), over examples and positions."""

    count: dict[str, int] = field(default_factory=dict)
    mean: dict[str, Tensor] = field(default_factory=dict)
    square: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, rows: Tensor) -> None:
        """Take rows (n, features) of a layer's outputs into the running means."""
        n, before = len(rows), self.count.get(name, 0)
        share = n / (n + before)
        for store, value in ((self.mean, rows.mean(0)), (self.square, rows.square().mean(0))):
            old = store.get(name, torch.zeros_like(value))
            store[name] = old + share * (value - old)
        self.count[name] = before + n

    def deviation(self, name: str) -> Tensor:
        """The standard deviation of each of a layer's features."""
        return (self.square[name] - self.mean[name].square()).clamp_min(0).sqrt()


class Repair:
    """The corrections along the segment from `interpolation.start` to `end`.

    Raises Unsupported where the model calls no linear or convolutional layer but its last.
    """

    def __init__(self, interpolation: Interpolation, end: NetworkState) -> None:
        self.interpolation, self.end = interpolation, end
        interpolation.refuse_shares("REPAIR")
        self.layers = self._hidden_layers()
        self.goals = [self._statistics(state) for state in (interpolation.start, end)]

    def goal(self, name: str, alpha: float) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation that the units of a layer should have at `alpha`."""
        first, last = self.goals
        mean = torch.lerp(first.mean[name], last.mean[name], alpha)
        return mean, torch.lerp(first.deviation(name), last.deviation(name), alpha)

    def variance_ratios(self, alpha: float = 0.5) -> dict[str, float]:
        """By layer: the mean over units of std at `alpha` / [(1-a) s_0 + a s_1], without correction.

        Below 1 and shrinking with depth is variance collapse. Units that never vary are left out.
        """
        found = self._statistics(None, alpha)
        ratios = {}
        for name in self.layers:
            goal = self.goal(name, alpha)[1]
            alive = goal > 1e-12
            ratios[name] = float((found.deviation(name)[alive] / goal[alive]).mean())
        return ratios

    @contextmanager
    def corrected(self, alpha: float) -> Iterator[None]:
        """Inside, the working copy's layers give repaired outputs. The statistics come from the training data."""
        seen = Statistics()
        with self._hooks(lambda name, y: self._normalised(seen, name, y, alpha)):
            self._run()
        maps = {name: self._affine(seen, name, alpha) for name in self.layers}
        with self._hooks(lambda name, y: _apply(y, *maps[name], self.layers[name])):
            yield

    def _normalised(self, seen: Statistics, name: str, output: Tensor, alpha: float) -> Tensor:
        # Layer by layer on the batch's own statistics, so that later layers see repaired inputs.
        rows = _rows(output, self.layers[name])
        seen.add(name, rows)
        batch = Statistics()
        batch.add(name, rows)
        return _apply(output, *self._affine(batch, name, alpha), self.layers[name])

    def _affine(self, found: Statistics, name: str, alpha: float) -> tuple[Tensor, Tensor]:
        mean, deviation = self.goal(name, alpha)
        scale = deviation / (found.deviation(name).square() + EPSILON * deviation.square().clamp_min(1e-30)).sqrt()
        return scale, mean - scale * found.mean[name]

    def _hidden_layers(self) -> dict[str, nn.Module]:
        """Linear and convolutional modules that run exactly once a pass, less the last: it gives the answer."""
        calls: list[str] = []
        model = self.interpolation.copy
        modules = {n: m for n, m in model.named_modules() if isinstance(m, REPAIRED_LAYERS)}
        hooks = [m.register_forward_hook(lambda *_, n=n: calls.append(n)) for n, m in modules.items()]
        try:
            with preserved(model), torch.no_grad():
                self.interpolation.snapshot.batches[0].forward(model)
        finally:
            for hook in hooks:
                hook.remove()
        found: dict[str, nn.Module] = {n: modules[n] for n in calls[:-1] if calls.count(n) == 1}
        if not found:
            raise Unsupported(
                "REPAIR found no hidden linear or convolutional layer that runs once a pass, so there is nothing "
                "to rescale; set repair=False."
            )
        return found

    def _statistics(self, state: NetworkState | None, alpha: float = 0.0) -> Statistics:
        seen = Statistics()
        model, interpolation = self.interpolation.copy, self.interpolation
        with preserved(model), torch.no_grad():
            if state is None:
                straight(interpolation.start, self.end)(model, alpha)
            else:
                overwrite(model, state)
            with self._hooks(lambda name, y: seen.add(name, _rows(y, self.layers[name]))):
                self._run(norm_reset=state is None)
        return seen

    def _run(self, norm_reset: bool = True) -> None:
        model = self.interpolation.copy
        norms = (
            norm_layers_in_training(model) if norm_reset and self.interpolation.has_batch_norm else nullcontext()
        )
        with norms:
            for batch in self.interpolation.snapshot.batches:
                if batch.size > 1:
                    batch.forward(model)

    @contextmanager
    def _hooks(self, function: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
        def hook(name: str) -> Callable[..., Any]:
            return lambda module, args, output: function(name, output)

        hooks = [m.register_forward_hook(hook(n)) for n, m in self.layers.items()]
        try:
            yield
        finally:
            for h in hooks:
                h.remove()


def _channel_axis(module: nn.Module, output: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return output.ndim - 1
    return output.ndim - len(module.kernel_size) - 1  # type: ignore[arg-type]


def _rows(output: Tensor, module: nn.Module) -> Tensor:
    return output.detach().movedim(_channel_axis(module, output), -1).flatten(0, -2).double()


def _apply(output: Tensor, scale: Tensor, shift: Tensor, module: nn.Module) -> Tensor:
    shape = [1] * output.ndim
    shape[_channel_axis(module, output)] = -1
    return output * scale.to(output.dtype).view(shape) + shift.to(output.dtype).view(shape)
