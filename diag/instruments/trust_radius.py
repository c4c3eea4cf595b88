"""Trust radius: how far along the gradient, and along the last update, the linearised gradient can be believed.

Gradient-normalised smoothness is the largest radius r within which the gradient differs from its linearisation by
at most |g| |h| / r. Along one direction it is found by bisection, and bounds that of all directions from above. A
Newton step regularised by |g| / r is what the paper makes of it; what a radius says of a run is not known, so it
describes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diag.display import format_number
from diag.errors import Unsupported
from diag.ranges import Count
from diag.registry import GRADIENT, PRODUCT, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured

SOURCE = "Semenov, Jaggi, Doikov 2025, arXiv:2506.13710"
REACH = 10.0  # in lengths of the parameters: beyond it nothing is looked for
RADII_TRIED, RADIUS_FACTOR, BISECTIONS = 12, 4.0, 10
NEWTON_PRODUCTS = 20
COARSE = (
    "The model's gradients are in {}, too coarse to be compared at points that are close to each other; measure a "
    "copy, model.float()."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrustRadius(Result):
    """Radii are lengths in parameter space; infinite where none was found within ten lengths of the parameters."""

    radius: float = measured("upper bound of the radius: the smaller of those below")
    along_gradient: float = measured("radius along the gradient, both ways")
    along_update: float = measured("radius along the last update, both ways", remark="NaN: no update known")
    update_length: float = measured("length of the last update", remark="NaN: not known")
    gradient_norm: float = measured("length of the gradient")
    parameter_norm: float = measured("length of the parameters")
    regularization: float = measured("|g| / radius: what the regularised Newton step adds to the curvature")
    newton_length: float = measured(
        "length of the step (H + |g| / r)^-1 g", remark="NaN: not solved or not positive"
    )
    newton_cosine: float = measured("its cosine with the gradient")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        share = format_number(self.radius / self.parameter_norm) if self.parameter_norm else "an unknown number of"
        step = ""
        if not math.isnan(self.update_length):
            step = f"; the last update was {format_number(self.update_length / self.radius)} of it long"
        where = (
            f"The gradient changes as its curvature says up to a radius of at most {format_number(self.radius)} "
            f"({share} lengths of the parameters)"
            if math.isfinite(self.radius)
            else "The gradient changes as its curvature says as far as was looked, ten lengths of the parameters"
        )
        return Verdict(
            Level.DESCRIPTION,
            f"{where}{step}; the number only describes.",
            advice="Curvature at one point says little about steps that are longer than the radius.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            value=self.radius,
        )

    def plot(self, ax: Any = None) -> Any:
        """The radii beside the last update."""
        rows = {"along the gradient": self.along_gradient, "along the update": self.along_update}
        rows["last update"] = self.update_length
        finite = {name: value for name, value in rows.items() if math.isfinite(value)}
        ax.barh(list(finite), list(finite.values()), height=0.5)
        ax.set(xlabel="length in parameter space", ylabel="radius or step")


@instrument(
    source=SOURCE,
    title="Trust radius",
    kind="description",
    passes=lambda settings: 2 * 50 * GRADIENT + (2 + settings["newton_products"]) * PRODUCT,
    why="Beyond this radius the gradient says nothing reliable about the loss: longer steps are a gamble.",
    formula="smallest t with |g(w + t d) - g(w) - t H d| >= |g(w)|",
)
def trust_radius(
    losses_at: Any,
    hessian: Any,
    update: Mapping[str, Tensor] | None = None,
    *,
    newton_products: Count = NEWTON_PRODUCTS,
) -> TrustRadius:
    """How far along the gradient and the last update the gradient's linearisation holds, relative to its length.

    losses_at: per-example losses and their mean gradient g as a function of the parameters; hessian: H there;
    update: the last step, by parameter name. Along a unit direction d, on both sides, the radius is the smallest t
    with |g(theta + t d) - g - t H d| t >= |g| t, found on a grid of factors of 4 and by ten bisections: exact for a
    deviation that grows with t, and an upper bound of the radius over all directions. One product and about 45
    gradients a direction; `newton_products` more products solve for the regularised Newton step.

    Raises Unsupported for a model in half precision. Source: Semenov, Jaggi, Doikov 2025, arXiv:2506.13710 (its
    definition as others quote it; the paper itself was not read).
    """
    center = losses_at.center
    g = losses_at.step(center)[1]
    if g.dtype != hessian.dtype:
        raise Unsupported(COARSE.format(str(g.dtype).removeprefix("torch.")))
    size, length = float(g.norm()), float(center.norm())
    known = math.isfinite(size) and size > 0
    reach = REACH * (length or 1.0)

    def radius(direction: Tensor) -> float:
        return _radius(lambda p: losses_at.step(p)[1], hessian.matvec, center, g, direction, reach)

    along = radius(g) if known else math.nan
    step = torch.cat([u.reshape(-1) for u in update.values()]).to(g) if update is not None else None
    moved = float(step.norm()) if step is not None else math.nan
    other = radius(step) if known and step is not None and moved > 0 else math.nan
    least = along if math.isnan(other) else min(along, other)
    newton = _newton(hessian.matvec, g, size / least, newton_products) if known and newton_products else None
    return TrustRadius(
        radius=least,
        along_gradient=along,
        along_update=other,
        update_length=moved,
        gradient_norm=size,
        parameter_norm=length,
        regularization=size / least if known else math.nan,
        newton_length=float(newton.norm()) if newton is not None else math.nan,
        newton_cosine=float(newton @ g / newton.norm() / g.norm()) if newton is not None else math.nan,
        preconditions=(
            Precondition("a gradient that is finite and not zero", known, "the gradient is zero or not finite."),
        ),
    )


def _radius(
    gradient: Callable[[Tensor], Tensor],
    product: Callable[[Tensor], Tensor],
    center: Tensor,
    g: Tensor,
    direction: Tensor,
    reach: float,
) -> float:
    """The smallest t up to `reach` at which the gradient is off its linearisation by |g|, on either side."""
    d = direction / direction.norm()
    linear, limit = product(d), float(g.norm())

    def off(t: float) -> bool:
        deviations = [float((gradient(center + s * d) - g - s * linear).norm()) for s in (t, -t)]
        return not max(deviations) < limit

    low, high = 0.0, reach / RADIUS_FACTOR**RADII_TRIED
    while high <= reach and not off(high):
        low, high = high, high * RADIUS_FACTOR
    if high > reach:
        return math.inf
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high) if low > 0 else high / 2
        low, high = (low, middle) if off(middle) else (middle, high)
    return math.sqrt(low * high) if low > 0 else high


def _newton(product: Callable[[Tensor], Tensor], g: Tensor, shift: float, steps: int) -> Tensor | None:
    """(H + shift)^-1 g by conjugate gradients; None where a direction of negative curvature is met."""
    x, r = torch.zeros_like(g), g.clone()
    p, square = r.clone(), r @ r
    for _ in range(steps):
        image = product(p) + shift * p
        curvature = p @ image
        if float(curvature) <= 0:
            return None
        x, r = x + square / curvature * p, r - square / curvature * image
        before, square = square, r @ r
        if float(square) <= 1e-10 * float(g @ g):
            break
        p = r + square / before * p
    return x
