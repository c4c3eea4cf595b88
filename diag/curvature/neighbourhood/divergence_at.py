"""How far the model's own distribution moves with the parameters: distance in the space of functions.

Where the targets are classes the outputs are the logits of a categorical distribution, else the mean of a Gaussian
of unit variance. To second order in a step d the divergence is 1/2 d^T F d with the Fisher F of that distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diag.curvature.fisher import class_axis, counted_positions, likelihood_of
from diag.snapshot.batch import Batch
from diag.snapshot.call_at import call_at
from diag.snapshot.forward import output_tensor
from diag.snapshot.parameters import FlatLayout, flat_of, params
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot

ROUNDINGS = 100  # of the outputs: they must move by so many for their divergence to be a measurement (our choice)


class DivergenceAt:
    """E_x KL(p_theta(.|x) || p_point(.|x)) as a function of the trainable parameters, in nats.

    The mean is over the examples, or over all positions that have a label where each example has several.
    `center`: the model's own parameters theta, flat (P,), in `named_parameters()` order.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._values = params(snapshot)
        self._layout = FlatLayout.of({name: v.shape for name, v in self._values.items()})
        self.center = flat_of(self._values.values())

    def __call__(self, point: Tensor) -> float:
        """The mean divergence of the outputs at the flat parameters `point` (P,) from those at the centre."""
        values = self._layout.named_views(point)
        total = 0.0
        with torch.no_grad(), preserved(self._snapshot.model):
            for batch, before in zip(self._snapshot.batches, self._outputs_at_center, strict=True):
                after = self._outputs(values, batch)
                total += float(output_divergence(before, after, batch.targets)) * batch.size
        return total / self._snapshot.num_examples

    @cached_property
    def rounding(self) -> float:
        """The divergence of outputs that move by a hundred roundings of the largest: below it is no measurement."""
        moved = [ROUNDINGS * torch.finfo(z.dtype).eps * _largest(z) for z in self._outputs_at_center]
        return max(moved) ** 2 / 2

    @cached_property
    def _outputs_at_center(self) -> list[Tensor]:
        with torch.no_grad(), preserved(self._snapshot.model):
            return [self._outputs(self._values, batch).clone() for batch in self._snapshot.batches]

    def _outputs(self, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
        outputs = call_at(self._snapshot.model, values, batch.args, batch.kwargs)
        return output_tensor(outputs)


def output_divergence(before: Tensor, after: Tensor, targets: Any) -> Tensor:
    """The mean KL divergence of one batch's distributions with the outputs `before` and `after`, float64."""
    before, after = before.double(), after.double()  # the difference of two near distributions needs the digits
    if likelihood_of(targets) == "gaussian":
        return (after - before).square().sum() / (2 * len(before))
    axis = class_axis(before, targets)
    p, q = before.log_softmax(axis), after.log_softmax(axis)
    # A class that is masked out by a logit of minus infinity adds nothing.
    each = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(axis)
    counted = counted_positions(targets, before, axis)
    return each.mean() if counted is None else (each * counted).sum() / counted.sum()


def _largest(outputs: Tensor) -> float:
    finite = outputs[outputs.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def divergence_at(snapshot: Snapshot) -> DivergenceAt:
    """The divergence of the model's distribution from its own as a function of the parameters.

    Raises MissingQuantity without data or trainable parameters, or where the outputs hold no logits.
    """
    found = DivergenceAt(snapshot)
    _ = found.rounding
    return found
