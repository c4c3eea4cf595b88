"""The coordinate check: whether the sizes of layers' outputs, and of their first changes, depend on the width.

Under the maximal update parametrisation both stay as they are when a network gets wider, in every layer, so that a
learning rate that suits a narrow network suits a wide one. Networks of several widths are built, trained for a few
steps on one batch, and the slope of log size over log width is fitted for each layer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from diag.build import called_safely
from diag.conversion import converted
from diag.display import format_number
from diag.door import at_the_door
from diag.errors import InvalidInput, type_of
from diag.linalg.student import STANDARD_ERRORS, factor
from diag.ranges import Count, Seed
from diag.snapshot.inside import apart
from diag.snapshot.preserve import random_states
from diag.snapshot.snapshot import Snapshot

WIDTHS = (64, 128, 256, 512)
Built = nn.Module | tuple[nn.Module, Optimizer]
ADAMS_RATE = 1e-3  # of Adam, where the factory gives no optimizer


@dataclass(frozen=True)
class CoordinateCheck:
    """Slopes of log size over log width, of each layer's outputs at the start and of their change after the steps.

    layers: of the forward pass, in order. widths: the widths tried. slopes, change_slopes (layers,): 0 where the
    size does not depend on the width; slope_errors, change_slope_errors: their standard errors, of which two on
    either side make a 95 % interval. NaN where a layer does not move.
    """

    layers: tuple[str, ...]
    widths: tuple[int, ...]
    slopes: NDArray[numpy.float64]
    slope_errors: NDArray[numpy.float64]
    change_slopes: NDArray[numpy.float64]
    change_slope_errors: NDArray[numpy.float64]

    def growing(self) -> tuple[str, ...]:
        """The layers whose outputs, or their changes, grow with the width beyond the error."""
        outputs = self.slopes > STANDARD_ERRORS * self.slope_errors
        changes = self.change_slopes > STANDARD_ERRORS * self.change_slope_errors
        return tuple(name for name, grows in zip(self.layers, outputs | changes, strict=True) if grows)

    def sentence(self) -> str:
        """What was found, in one sentence."""
        growing = self.growing()
        known = self.change_slopes[numpy.isfinite(self.change_slopes)]
        steepest = (
            f"the steepest change has a slope of {format_number(known.max())}" if len(known) else "none moves"
        )
        if growing:
            return (
                f"{len(growing)} of {len(self.layers)} layers grow with the width, {growing[0]} first; {steepest}."
            )
        return f"None of {len(self.layers)} layers grows with the width beyond the error; {steepest}."


@at_the_door
def coordinate_check(
    build: Callable[[int], Built],
    loss_fn: Callable[[Any, Any], Tensor],
    data: Any,
    *,
    widths: Sequence[int] = WIDTHS,
    draws: Count = 3,
    steps: Count = 3,
    seed: Seed = 0,
) -> CoordinateCheck:
    """Slopes of the sizes of layers over the width: `diag.coordinate_check(build, loss_fn, data)`.

    build(width): a fresh model of this width, or (model, optimizer); without one, Adam at a rate of 1e-3. It is
    called `draws` times a width, each with another seed. data: as for `Snapshot`; the first batch is trained on
    `steps` times, with dropout off. The size is the root mean square of the outputs of a leaf module, its change
    that of the difference from the start. Costs `draws` x (2 forward passes and `steps` gradients) a width.

    Raises InvalidInput for fewer than two widths, fewer than three networks, no step, or models whose layers differ
    between widths. Source: Yang et al. 2022, arXiv:2203.03466 (muP), as in the authors' coordinate check.
    """
    widths = [converted(width, Count, inspect.Parameter.empty, "coordinate_check.widths") for width in widths]
    if len(set(widths)) < 2 or len(widths) * draws < 3:
        raise InvalidInput(
            f"coordinate_check got {len(set(widths))} widths and {draws} draws; give two widths or more, and three "
            "networks in all."
        )
    starts: dict[int, list[dict[str, float]]] = {}
    changes: dict[int, list[dict[str, float]]] = {}
    with random_states():
        for width in widths:
            for draw in range(draws):
                torch.manual_seed(seed + draw)
                start, change = _sizes(_built(build, width), loss_fn, data, steps)
                starts.setdefault(width, []).append(start)
                changes.setdefault(width, []).append(change)
    layers = _same_layers([found for drawn in starts.values() for found in drawn])
    slopes, errors = _fitted(starts, layers)
    moved, moved_errors = _fitted(changes, layers)
    return CoordinateCheck(layers, tuple(widths), slopes, errors, moved, moved_errors)


def _built(build: Callable[[int], Built], width: int) -> Built:
    built = called_safely(lambda: build(width), f"build({width})")
    model = built[0] if isinstance(built, tuple) and built else built
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"build({width}) gave {type_of(model)}; expected a module, or (module, optimizer).")
    return built  # type: ignore[no-any-return]


def _sizes(
    built: Built, loss_fn: Callable[[Any, Any], Tensor], data: Any, steps: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Of each layer the size of its outputs before training, and of their change after the steps."""
    model, optimizer = built if isinstance(built, tuple) else (built, None)
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=ADAMS_RATE)
    snapshot = Snapshot(model, loss_fn, data)
    batch = snapshot.batches[0]
    with apart.in_mode(model, "eval"):
        before = _outputs(model, batch)
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.enable_grad():
                snapshot.batch_loss(batch.forward(model), batch.targets).backward()
            optimizer.step()
        after = _outputs(model, batch)
    same = {name: z for name, z in before.items() if name in after and after[name].shape == z.shape}
    return ({n: _size(z) for n, z in same.items()}, {n: _size(after[n] - z) for n, z in same.items()})


def _outputs(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """What each leaf module returns, where it is one tensor of floats."""
    found: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            found[name] = output.detach().double()

    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
    hooks = [m.register_forward_hook(lambda m, a, out, n=n: keep(n, out)) for n, m in leaves]
    try:
        with torch.no_grad():
            batch.forward(model)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _size(z: Tensor) -> float:
    return float(z.square().mean().sqrt())


def _same_layers(found: Sequence[dict[str, float]]) -> tuple[str, ...]:
    layers = tuple(found[0])
    if any(tuple(other) != layers for other in found):
        raise InvalidInput("The models of different widths call different layers; build one architecture.")
    return layers


def _fitted(
    sizes: dict[int, list[dict[str, float]]], layers: tuple[str, ...]
) -> tuple[NDArray[numpy.float64], NDArray[numpy.float64]]:
    """Slopes and standard errors (layers,), widened for the few networks; NaN where a size is zero."""
    table = {
        w: [numpy.array([d[name] or math.nan for name in layers]) for d in drawn] for w, drawn in sizes.items()
    }
    slopes, errors = width_slopes(table)
    return slopes, errors * factor(sum(map(len, table.values())) - 1)


def width_slopes(
    sizes: Mapping[int, Sequence[NDArray[numpy.float64]]],
) -> tuple[NDArray[numpy.float64], NDArray[numpy.float64]]:
    """Slope of log size over log width for each layer, and its standard error, (layers,) each.

    sizes: for each of two or more widths the sizes of the layers, one array (layers,) a draw of the weights; three
    or more in all.
    """
    x = numpy.log([float(width) for width, draws in sizes.items() for _ in draws])
    y = numpy.log([values for draws in sizes.values() for values in draws])
    x = x - x.mean()
    slope = x @ (y - y.mean(0)) / (x @ x)
    rest = y - y.mean(0) - numpy.outer(x, slope)
    return slope, numpy.sqrt((rest**2).sum(0) / (len(x) - 2) / (x @ x))
