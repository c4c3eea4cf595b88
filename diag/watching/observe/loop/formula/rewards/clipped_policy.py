"""The clipped objective of proximal policy optimization (Schulman et al. 2017) as parts of a loss: the smaller of
the ratio times the advantage and the clipped ratio times the advantage, entry by entry.

Its derivative by the log-probability of an action is the ratio times the advantage wherever it is not clipped,
which is what it is taken to be everywhere: of the sign, and of the better and worse actions, that tells the same.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, constant_of, first_arguments, kind_of, parents_of
from diag.watching.observe.loop.formula.parts import Summand, base_of, given_shape

SMALLER_OR_LARGER = ("Minimum", "Maximum")  # the larger of two costs is the same with signs exchanged


def log_probabilities_clipped(p: Summand) -> Summand:
    """The log-probabilities behind a part that is such an objective, with what they are multiplied by to first
    order; any other part as it is."""
    if p.kind not in SMALLER_OR_LARGER:
        return p
    for side in p.node.next_functions:
        found = _of_ratio(p, *base_of(*side)) if side[0] is not None else None
        if found is not None:
            return found
    return p


def _of_ratio(p: Summand, product: Any, index: int, sign: float) -> Summand | None:
    """The log-probabilities, where a product is that of a ratio and constants of its shape."""
    if kind_of(product) != "Mul" or len(parents_of(product)) != 1:
        return None
    constants, ratio = constant_of(product), _made_by(parents_of(product)[0])
    if kind_of(ratio) != "Exp" or not isinstance(constants, Tensor) or not constants.is_cpu:
        return None
    kept = ratio._saved_result
    taken, place, _ = base_of(*ratio.next_functions[0])
    difference = _made_by(taken)
    if kind_of(difference) == "Sub":  # less the log-probabilities of the rollout, which have no graph
        side = difference.next_functions[0]
        taken, place = (_made_by(side[0]), side[1]) if side[0] is not None else (None, 0)
    weights = constants.detach() * kept.detach()
    if taken is None or weights.shape != kept.shape or p.shape != tuple(kept.shape):
        return None
    node = _made_by(taken)
    shape = given_shape(node, place)  # a gather has an axis more
    for factor in p.factors:
        weights = weights * factor
    if shape is None or math.prod(shape) != weights.numel():
        return None
    return replace(p, node=node, index=place, number=p.number * sign, factors=(weights.reshape(shape),))


def _made_by(node: Any) -> Any:
    return next((n for n in first_arguments(node, 8) if kind_of(n) not in PASSING_ON), node)
