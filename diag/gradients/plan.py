"""How each parameter's per-example gradients are computed for one model: the decision, and what it is made on.

`diag.gradients.planning` makes the plan, by a recorded forward pass of a few examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import Unsupported
from diag.gradients.capture import Capture, Use
from diag.gradients.methods import Method
from diag.gradients.rules.layout import ExampleLayout
from diag.gradients.sources import ArgumentPlace
from diag.snapshot.batch import Batch, map_tensors
from diag.snapshot.example_losses import LossFunction, batch_loss
from diag.snapshot.picking import picked

PROBE_SIZES = (3, 16, 128)  # examples in a probe, and in the next where something looked dead in it


class NotFinite(Exception):
    """A loss in the probe is not finite; the caller, who has all rows, says which."""


@dataclass
class Plan:
    """Layouts of the calls to read, by index, and which of their arguments; each parameter's method."""

    layouts: dict[int, ExampleLayout]
    places: dict[int, list[ArgumentPlace]]
    graph_parameters: set[str]
    signature: tuple[tuple[Any, ...], ...]
    methods: dict[str, Method] = field(default_factory=dict)
    unresolved: set[int] = field(default_factory=set)  # calls whose gradient was zero on the probe
    late: set[int] = field(default_factory=set)  # calls to read only after the backward pass
    first: set[int] | None = None  # calls upstream of all others, once they have been looked for
    overwrites_inputs: bool = False  # the model changes its inputs in place: it gets a copy

    def give_up(self, calls: set[int], uses: list[Use]) -> None:
        """Differentiate the parameters of these calls through the graph; their layout was never seen."""
        self.unresolved -= calls
        self.graph_parameters |= {n for i in calls for source in uses[i].slots.values() for n in source.names}

    def fits(self, uses: list[Use], n: int) -> bool:
        """False where this forward pass made other calls than the one that the plan was made on."""
        same = self.signature == tuple(use.signature for use in uses)
        return same and all(layout.fits(uses[i].shape, n) for i, layout in self.layouts.items())


@dataclass
class Forward:
    """One recorded forward pass."""

    capture: Capture
    outputs: Any
    loss: Tensor

    @property
    def uses(self) -> list[Use]:
        """The calls in which parameters took part, in order."""
        return self.capture.uses


def forward(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    parameters: dict[str, nn.Parameter],
    unroll: bool = True,
) -> Forward:
    """Run the model on a batch under a capture; the loss is the batch's mean."""
    capture = Capture(model, parameters, unroll)
    with torch.enable_grad():
        with capture:
            outputs = batch.forward(model)
        loss = batch_loss(loss_fn, outputs, batch.targets)
    if not loss.requires_grad:
        raise Unsupported(
            "The loss does not depend on any trainable parameter through the graph; check requires_grad, and that "
            "the model does not run under no_grad."
        )
    return Forward(capture, outputs, loss)


def probe_of(batch: Batch, size: int, losses: Callable[[], Tensor]) -> Batch:
    """A few examples: the first ones; of more than 3, half are those with the largest losses.

    A fitted network gives most examples no gradient at all, and from those nothing can be seen. A single example
    is doubled, so that there are two to tell apart.
    """
    if batch.size == 1:
        return batch.take([0, 0])
    if size <= PROBE_SIZES[0] or batch.size <= PROBE_SIZES[0]:
        return batch.slice(0, min(PROBE_SIZES[0], batch.size))
    hardest = losses().argsort(descending=True)[: size // 2].tolist()
    rest = min(size - size // 2, batch.size)
    spaced = torch.linspace(0, batch.size - 1, rest, dtype=torch.float64).round().int().tolist()
    return picked([batch], sorted({*hardest, *spaced}))[0]


def copied(batch: Batch) -> Batch:
    """The batch with inputs of its own."""
    args, kwargs = map_tensors(torch.clone, (batch.args, batch.kwargs))
    return replace(batch, args=args, kwargs=kwargs)
