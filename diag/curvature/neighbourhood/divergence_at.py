"""How far the model's own distribution moves with the parameters: distance in the space of functions.

Where the loss compares classes, what enters it are the logits of a categorical distribution, else the outputs are
the mean of a Gaussian of unit variance. To second order in a step d the divergence is 1/2 d^T F d with the Fisher F
of that distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from diag.curvature.fisher import likelihood_of
from diag.snapshot.batch import Batch
from diag.snapshot.call_at import call_at
from diag.snapshot.forward import comparisons, look_at
from diag.snapshot.objective.comparison import output_tensor
from diag.snapshot.objective.loss_spy import LossSpy
from diag.snapshot.parameters import FlatLayout, flat_of, params
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot

# Of the outputs: they must move by so many for their divergence to be a measurement (our choice).
OUTPUT_ROUNDINGS = 100


class DivergenceAt:
    """E_x KL(p_theta(.|x) || p_point(.|x)) as a function of the trainable parameters, in nats.

    The mean is over the examples, or over all positions whose label the loss counts where each example has
    several, by the weights that they have in it. `center`: the model's own parameters theta, flat (P,), in
    `named_parameters()` order.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._categorical = likelihood_of(snapshot.batches[0].targets) == "categorical"
        self._values = params(snapshot)
        self._layout = FlatLayout.of({name: v.shape for name, v in self._values.items()})
        self.center = flat_of(self._values.values())

    def __call__(self, point: Tensor) -> float:
        """The mean divergence of the outputs at the flat parameters `point` (P,) from those at the centre."""
        values = self._layout.named_views(point)
        total = counted = 0.0
        with torch.no_grad(), preserved(self._snapshot.model):
            for batch, (before, weights) in zip(self._snapshot.batches, self._at_center, strict=True):
                after, _ = self._compared(values, batch)
                each = _categorical(before, after) if self._categorical else _gaussian(before, after)
                total += float((each * weights).sum())
                counted += float(weights.sum())
        return total / counted

    @cached_property
    def rounding(self) -> float:
        """The divergence of outputs that move by a hundred roundings of the largest: what is below it is noise."""
        moved = [OUTPUT_ROUNDINGS * torch.finfo(z.dtype).eps * _largest(z) for z, _ in self._at_center]
        return max(moved) ** 2 / 2

    @cached_property
    def _at_center(self) -> list[tuple[Tensor, Tensor]]:
        with torch.no_grad(), preserved(self._snapshot.model):
            return [self._compared(self._values, batch) for batch in self._snapshot.batches]

    def _compared(self, values: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """The rows of outputs whose distributions are compared, and what each of them weighs."""
        spy = LossSpy()
        with spy:
            outputs = call_at(self._snapshot.model, values, batch.args, batch.kwargs)
        if not self._categorical:
            z = output_tensor(outputs).clone()
            return z, z.new_ones(len(z), dtype=torch.float64)
        found = look_at(self._snapshot, outputs, batch.targets, spy).compared()
        weights = found.counted.double() if found.weights is None else found.weights
        return found.logits[found.counted].clone(), weights[found.counted]


def _gaussian(before: Tensor, after: Tensor) -> Tensor:
    """The divergence of each example, of unit variance."""
    return (after.double() - before.double()).reshape(len(before), -1).square().sum(1) / 2


def _categorical(before: Tensor, after: Tensor) -> Tensor:
    """The divergence of each row of logits."""
    before, after = before.double(), after.double()  # the difference of two near distributions needs the digits
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    # A class that is masked out by a logit of minus infinity adds nothing.
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)


def _largest(outputs: Tensor) -> float:
    finite = outputs[outputs.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def divergence_at(snapshot: Snapshot) -> DivergenceAt:
    """The divergence of the model's distribution from its own as a function of the parameters.

    Raises MissingQuantity without data or trainable parameters, or where the outputs hold no logits.
    """
    found = DivergenceAt(snapshot)
    if found._categorical:
        comparisons(snapshot)
    _ = found.rounding
    return found
