"""Variational latents: what the code of a row says of it, and how much its KL divergence weighs.

The divergence of a diagonal Gaussian from the standard one, (mean^2 + variance - 1 - log variance) / 2, is found
among the parts of the loss by its three parts and their weights, whether it is written with the log-variance or the
standard deviation, or comes from torch.distributions. The graph keeps its means and variances.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diag.snapshot.autograd_graph import kind_of, nodes_before, parents_of
from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.arithmetic import LatentFacts, LatentLook
from diag.watching.observe.loop.formula.chains import behind_views
from diag.watching.observe.loop.formula.parts import Summand, base_of, depends
from diag.watching.observe.loop.formula.reader import Reader
from diag.watching.observe.loop.moment import Moment

EQUAL_WEIGHTS = 1e-3
ROWS_NEEDED = 8
NODES_OF_A_DECODER = 2000
VIEWS_OF_ONE = ("Select", "Slice", "Index")


@dataclass(frozen=True)
class GaussianDivergence:
    """The parts of one divergence: the squared mean and those of the variance; weight: of the whole of it."""

    mean: Summand
    others: tuple[Summand, ...]
    means: Tensor
    variances: Tensor

    @property
    def weight(self) -> float:
        """The weight of the divergence of one latent of one row."""
        return 2 * self.mean.weight


class Latents(Reader[LatentLook]):
    """Reads the divergence of latents that each row of a batch has."""

    NAME, EVERY = "latents", 8

    def __init__(self, moment: Moment) -> None:
        super().__init__(moment)
        self._rows = 0

    def training_call(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The model was called in training."""
        self._rows = next((len(t) for t in tensors_in((args, dict(kwargs))) if t.ndim), 0)

    def _look(self, parts: list[Summand]) -> LatentLook | None:
        found = gaussian_divergence(parts)
        if found is None or found.means.ndim < 2 or len(found.means) != self._rows or self._rows < ROWS_NEEDED:
            return None
        return latent_look(self._moment.step, found, parts)

    def facts(self) -> LatentFacts:
        """As plain data."""
        return LatentFacts(tuple(self.looks))


def latent_look(step: int, found: GaussianDivergence, parts: list[Summand]) -> LatentLook:
    """What one backward pass says of the latents."""
    own = {id(p) for p in (found.mean, *found.others)}
    rest = [p for p in parts if id(p) not in own]
    means, variances = found.means.detach().double().flatten(1), found.variances.detach().double().flatten(1)
    spread, noise = means.var(0), variances.mean(0)
    told = spread / (spread + noise)
    nats = (means.square() + variances - 1 - variances.log()).sum(1).mean() / 2
    most = max(rest, key=lambda p: abs(p.entry_weight), default=None)
    return LatentLook(
        step=step,
        size=means.shape[1],
        told=float(told.max()),
        nats=float(nats),
        weight=found.weight / abs(most.entry_weight) if most is not None and most.entry_weight else math.nan,
        mean_used=_is_used(base_of(*_argument(found.mean))[0], rest) if rest else None,
        noise=noise_of(found, rest),
    )


def _is_used(mean: Any, rest: list[Summand]) -> bool | None:
    """Whether the other parts depend on the mean; None where they may by another view of what it is a view of."""
    used = depends(rest, mean._sequence_nr())
    if used is False and kind_of(mean) in VIEWS_OF_ONE:
        return None if depends(rest, behind_views(mean)._sequence_nr()) else False
    return used


def noise_of(found: GaussianDivergence, rest: list[Summand]) -> str:
    """What the rest of the loss multiplies noise by: the "deviation" that the divergence is of, the "variance", the
    "logarithm" of one, "nothing" where it does not depend on the variance; empty where that is not known."""
    square = found.others[0]
    node, index, factor = base_of(*_argument(square))
    exponent = square.kind == "Exp"
    nodes = list(nodes_before([p.node for p in rest], NODES_OF_A_DECODER))
    if len(nodes) >= NODES_OF_A_DECODER or not rest:
        return ""
    users = [(n, p, i) for n in nodes for p, i in n.next_functions if p is node and i == index]
    if not users:
        maker = behind_views(node)
        mean = base_of(*_argument(found.mean))[0]
        others = [
            n for n in nodes for p, _ in n.next_functions if p is maker and n is not mean and maker is not node
        ]
        return "" if others or (mean is node and kind_of(node) in VIEWS_OF_ONE) else "nothing"
    for n in nodes:
        if kind_of(n) == "Mul" and len(parents_of(n)) == 1 and _constant_shape(n) == found.means.shape:
            said = _multiplied(n, node, index, factor, exponent)
            if said:
                return said
    return ""


def _constant_shape(node: Any) -> tuple[int, ...]:
    other = node._saved_other if node.next_functions[0][0] is not None else node._saved_self
    return tuple(other.shape) if isinstance(other, Tensor) else ()


def _multiplied(product: Any, node: Any, index: int, factor: float, exponent: bool) -> str:
    """What of the scale (this output of `node`) the constant is multiplied by in `product`."""
    side = next((s for s in product.next_functions if s[0] is not None), (None, 0))
    inner, place, _ = base_of(*side)
    if inner is node and place == index:
        return "logarithm" if exponent else "deviation"
    if exponent and inner is not None and kind_of(inner) == "Exp":
        base, at, own = base_of(*inner.next_functions[0])
        if base is node and at == index:
            return {0.5: "deviation", 1.0: "variance"}.get(round(own / factor, 6), "")
    return ""


def gaussian_divergence(parts: list[Summand]) -> GaussianDivergence | None:
    """The divergence that is among these parts; the first of several, None where there is none."""
    squares, logs = [p for p in parts if p.is_square], [p for p in parts if p.kind == "Log"]
    for variance in parts:
        if variance.kind == "Exp":
            others = _log_variance(variance, parts)
        else:
            others = _log_deviation(variance, logs) if variance.is_square else []
        alike = (p for p in squares if others and p is not variance and _alike(p, variance))
        mean = next(alike, None)
        if mean is not None and kind_of(base_of(*_argument(mean))[0]) != "AccumulateGrad":
            return _divergence(mean, variance, others)
    return None


def _divergence(mean: Summand, variance: Summand, others: list[Summand]) -> GaussianDivergence | None:
    means = getattr(mean.node, "_saved_self", None)
    exp = variance.kind == "Exp"
    kept = getattr(variance.node, "_saved_result" if exp else "_saved_self", None)
    if (
        not isinstance(means, Tensor)
        or not isinstance(kept, Tensor)
        or not means.is_cpu
        or means.shape != kept.shape
    ):
        return None
    return GaussianDivergence(mean, (variance, *others), means, kept if exp else kept.detach().square())


def _log_variance(variance: Summand, parts: list[Summand]) -> list[Summand]:
    """The parts that are the argument of an exponential, with the opposite weight."""
    node, index, factor = base_of(*_argument(variance))
    same = [p for p in parts if p.node is node and p.index == index and not p.factors]
    return same if same and _close(sum(p.weight for p in same), -variance.weight * factor) else []


def _log_deviation(square: Summand, logs: list[Summand]) -> list[Summand]:
    """The logarithm of a square with the opposite weight, or of what is squared with twice that."""
    argument = base_of(*_argument(square))[0]
    for p in (p for p in logs if p.shape == square.shape):
        node = _argument(p)[0]
        if node is square.node and _close(p.weight, -square.weight):
            return [p]
        if base_of(*_argument(p))[0] is argument and _close(p.weight, -2 * square.weight):
            return [p]
    return []


def _argument(p: Summand) -> tuple[Any, int]:
    return p.node.next_functions[0]


def _alike(a: Summand, b: Summand) -> bool:
    return a.shape == b.shape and _close(a.weight, b.weight) and not a.factors and not b.factors


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=EQUAL_WEIGHTS) and a != 0
