"""The barrier between two networks predicted from the two alone: loss, slope and curvature along the segment.

With phi(a) the loss at theta_0 + a D, D = theta_1 - theta_0, three predictions of its excess over the chord:

* second order: the quadratics about the two ends, blended with weights 1 - a and a (exact for a quadratic);
* cubic: the polynomial with the ends' losses and slopes (Hermite; exact for a cubic);
* quintic: with their curvatures too (exact up to the fifth degree).

One layer moved and the others held, the quadratic about the end that holds them is all that is known. How far a
prediction is off is measured; how far they differ from each other is known without measuring. Singh et al. 2024
(arXiv:2406.16300) predict barriers from the ends; their theorem was not at hand, and these formulas are our own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diag.connectivity.interpolation import Interpolation, NetworkState, overwrite
from diag.errors import Unsupported
from diag.snapshot.parameters import FlatLayout, trainable
from diag.snapshot.snapshot import Snapshot


@dataclass(frozen=True)
class Along:
    """At one end: the derivatives of the loss along D, or along the part of D in one layer."""

    slope: float
    curvature: float


@dataclass(frozen=True)
class End:
    """What is known at one end: the whole segment's derivatives, and by layer."""

    whole: Along
    layers: dict[str, Along]


def ends_of(path: Interpolation, end: NetworkState, layers: bool) -> tuple[End, End]:
    """The two ends of the segment from the path's start to `end`.

    One gradient and one curvature product an end, and one product a layer more where `layers`. Raises Unsupported
    with BatchNorm, in half precision, where something that is not trained differs, and where curvature cannot be
    measured.
    """
    if path.has_batch_norm:
        raise Unsupported(
            "With BatchNorm the loss between two networks depends on statistics that are measured again at each "
            "point, which no derivative at the ends knows; give networks without it."
        )
    step = _trained_step(path, end)
    second = copy.deepcopy(path.snapshot.model)
    with torch.no_grad():
        overwrite(second, end)
    snapshots = (path.snapshot, path.snapshot.replace(model=second, other=None, previous=None))
    first, last = (_end(s, step, layers) for s in snapshots)
    return first, last


def _trained_step(path: Interpolation, end: NetworkState) -> dict[str, Tensor]:
    trained = trainable(path.snapshot.model)
    others = [n for n, t in path.start.items() if n not in trained and t.is_floating_point()]
    coarse = [str(path.start[n].dtype).removeprefix("torch.") for n in trained if path.start[n].itemsize < 4]
    if coarse:
        raise Unsupported(
            f"The model's parameters are in {coarse[0]}, too coarse for losses and slopes that are compared at the "
            "two ends; measure copies, model.float()."
        )
    moved = [n for n in others if not torch.equal(path.start[n], end[n])]
    if moved:
        raise Unsupported(
            f"{moved[0]} differs between the two networks and is not trained, so no derivative at the ends is "
            "known along it; give two networks that differ in trained parameters only."
        )
    return {n: end[n] - path.start[n] for n in trained}


def _end(snapshot: Snapshot, step: Mapping[str, Tensor], layers: bool) -> End:
    gradient, hessian = snapshot.quantity("gradient"), snapshot.quantity("hessian")
    layout = FlatLayout.of({n: tuple(t.shape) for n, t in step.items()})
    direction = torch.cat([t.reshape(-1) for t in step.values()])
    slope = torch.cat([gradient[n].reshape(-1) for n in step]).double()

    def along(part: slice) -> Along:
        v = torch.zeros_like(direction)
        v[part] = direction[part]
        product = hessian.matvec(v).double().to(v.device)
        return Along(float(slope @ v.double()), float(product @ v.double()))

    whole = along(slice(0, len(direction)))
    return End(whole, {n: along(part) for n, part in layout.layers.items()} if layers else {})


# ---- predictions; losses (2,), a (k,) between 0 and 1, all excess over the chord


def second_order(a: Tensor, first: Along, last: Along) -> Tensor:
    """a (1 - a) [g_0 - g_1 + (a c_0 + (1 - a) c_1) / 2]."""
    bend = (a * first.curvature + (1 - a) * last.curvature) / 2
    return a * (1 - a) * (first.slope - last.slope + bend)


def cubic(a: Tensor, losses: tuple[float, float], first: Along, last: Along) -> Tensor:
    """a (1 - a) [(1 - a) (g_0 - d) - a (g_1 - d)], d = L_1 - L_0."""
    rise = losses[1] - losses[0]
    return a * (1 - a) * ((1 - a) * (first.slope - rise) - a * (last.slope - rise))


def quintic(a: Tensor, losses: tuple[float, float], first: Along, last: Along) -> Tensor:
    """The cubic, plus what the ends' curvatures are off it: a^2 (1 - a)^2 [(1 - a) r_0 + a r_1] / 2."""
    rise = losses[1] - losses[0]
    at_first = first.curvature - (6 * rise - 4 * first.slope - 2 * last.slope)
    at_last = last.curvature - (-6 * rise + 2 * first.slope + 4 * last.slope)
    more = a.square() * (1 - a).square() * ((1 - a) * at_first + a * at_last) / 2
    return cubic(a, losses, first, last) + more


def layer_excess(a: Tensor, losses: tuple[float, float], along: Along, back: bool) -> Tensor:
    """One layer at `a`, the others as in the first network (back: the second): its quadratic, over the chord."""
    chord = losses[0] + a * (losses[1] - losses[0])
    t = a - 1 if back else a
    return losses[int(back)] + t * along.slope + t.square() * along.curvature / 2 - chord
