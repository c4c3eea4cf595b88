"""The losses of the same examples at consecutive optimizer steps, and how near the edge of stability they are.

A watched run records them (`Recording`); with such losses at hand, make a `LossRecord` of them. Only where the
sharpness is near the optimizer's own threshold do losses oscillate along the sharpest direction, so a record knows
both at its two ends. Where they do oscillate, the iterates jump across a valley and the sharpness at each is below
that of the valley's floor (measured: 0.78 to 0.95 of the threshold at iterates, 1.02 to 1.06 halfway between two),
so it is measured halfway between two consecutive iterates. Source: Rosenfeld and Risteski, ICLR 2024,
arXiv:2311.04163; the thresholds: see `optimizer_stability`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor, nn

from diag.curvature.stability.optimizer import linear_stability
from diag.display import format_number
from diag.errors import InvalidInput, MissingQuantity
from diag.linalg.lanczos import eigenpairs
from diag.result import Precondition
from diag.snapshot.parameters import trainable
from diag.snapshot.snapshot import Snapshot

LEAST_STEPS = 4
EDGE = (0.95, 1.5)  # of sharpness over threshold: learning rate times sharpness in [1.9, 3] for gradient descent
SHARPNESS_TOLERANCE = 1e-2  # relative, of the sharpness


@dataclass(frozen=True)
class Edge:
    """`sharpness`: the largest eigenvalue that decides an optimizer's stability; `threshold`: where it is lost.

    rule: the threshold written out. unknown: why there is none (it is then NaN), in a clause.
    """

    sharpness: float
    threshold: float = nan
    rule: str = ""
    unknown: str = ""

    @property
    def ratio(self) -> float:
        """The sharpness over the optimizer's threshold."""
        return self.sharpness / self.threshold


@dataclass(frozen=True, eq=False)
class LossRecord:
    """losses (T + 1, n): of the same n examples after T + 1 consecutive optimizer steps, kept as float64.

    steps (T + 1): their numbers. first, last: the edge of stability at both ends. same_examples: whether every
    step was taken on one and the same batch, so that no batch noise is in the differences. loss_scale: training
    descends this multiple of the losses' mean, so that its sharpness is as many times larger; NaN where it
    descends something else.

    Raises InvalidInput for losses of another shape or kind, or of fewer than four steps, or not finite.
    """

    losses: Tensor
    first: Edge
    last: Edge
    steps: tuple[int, ...] = ()
    same_examples: bool = True
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        recorded = self.losses
        if recorded.ndim != 2 or len(recorded) <= LEAST_STEPS or not recorded.is_floating_point():
            raise InvalidInput(
                f"The record of losses has the shape {tuple(recorded.shape)}; expected (T + 1, n), floating, "
                f"with at "
                "least four steps."
            )
        if not bool(torch.isfinite(recorded).all()):
            raise InvalidInput("The record of losses is not finite; look for the step at which training broke.")
        steps = self.steps or tuple(range(len(recorded)))
        if len(steps) != len(recorded):
            raise InvalidInput(
                f"The record has {len(recorded)} rows of losses and {len(steps)} steps; give one each."
            )
        object.__setattr__(self, "losses", recorded.detach().cpu().double().clone())
        object.__setattr__(self, "steps", tuple(int(step) for step in steps))

    @property
    def num_examples(self) -> int:
        """How many examples the losses are of."""
        return self.losses.shape[1]

    def preconditions(self, edge: tuple[float, float] = EDGE) -> tuple[Precondition, ...]:
        """What must hold for a verdict on the record's oscillation; `edge`: of sharpness over threshold."""
        return (
            Precondition(
                "a known threshold of stability",
                not self.unknown,
                f"how sharp a loss the optimizer can descend is not known ({self.unknown}), and so is whether "
                "it is at the edge of stability.",
            ),
            Precondition(
                "the edge of stability",
                bool(self.unknown) or all(edge[0] <= ratio <= edge[1] for ratio in self.ratios),
                f"the sharpness is {format_number(self.ratios[0])} of its threshold at step {self.steps[0]:,} "
                f"and {format_number(self.ratios[1])} of it at step {self.steps[-1]:,}, outside {edge[0]:g} to "
                f"{edge[1]:g}, where losses oscillate along the sharpest direction.",
            ),
            Precondition(
                "the same examples at every step",
                self.same_examples,
                "the steps were taken on different mini-batches, whose noise is in the changes of the losses.",
            ),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Caveats to what the record shows."""
        if self.loss_scale == 1.0 or math.isnan(self.loss_scale):
            return ()
        scale = format_number(self.loss_scale)
        return (f"Training descends {scale} times the recorded loss, which the ratio to the threshold counts in.",)

    @property
    def unknown(self) -> str:
        """Why the threshold is not known at one of the ends; empty where it is."""
        other = "" if math.isfinite(self.loss_scale) else "training descends another loss than the one recorded"
        return self.first.unknown or self.last.unknown or other

    @property
    def ratios(self) -> tuple[float, float]:
        """Sharpness of what training descends over its threshold, at the first and at the last step."""
        return self.loss_scale * self.first.ratio, self.loss_scale * self.last.ratio


def edge_of(snapshot: Snapshot) -> Edge:
    """The sharpness of the snapshot's loss and its optimizer's threshold; the latter may be unknown.

    Raises MissingQuantity without a loss_fn or data.
    """
    hessian = snapshot.quantity("hessian")
    try:
        stability = linear_stability(hessian, snapshot.quantity("optimizer"))
        operator, threshold, rule = stability.operator, stability.threshold, stability.rule
        unknown = stability.unknown
    except MissingQuantity:
        operator, threshold, rule, unknown = hessian, nan, "", "the optimizer is not known"
    values = eigenpairs(
        operator, largest=1, tolerance=SHARPNESS_TOLERANCE, seed=snapshot.seed, vectors=False
    ).values
    return Edge(float(values[0]), threshold, rule, unknown)


class Recording:
    """A record that is growing: `Recording(snapshot, step)`, `add` after each further step, `finish` at the last.

    Each snapshot is of the same model and data. It keeps two copies of the trainable parameters.
    """

    def __init__(self, snapshot: Snapshot, step: int) -> None:
        self._first: Edge | None = None
        self._losses, self._steps = [snapshot.quantity("losses").detach().cpu()], [step]
        self._now = self._before = _copies(snapshot)

    @property
    def num_steps(self) -> int:
        """Steps recorded, the first not counted."""
        return len(self._steps) - 1

    @property
    def last_step(self) -> int:
        """The last step that was recorded."""
        return self._steps[-1]

    @property
    def losses(self) -> Tensor:
        """(T + 1, n): the losses so far."""
        return torch.stack(self._losses)

    def add(self, snapshot: Snapshot, step: int) -> None:
        """The losses after another step; one forward pass, and at the first of them the sharpness."""
        self._losses.append(snapshot.quantity("losses").detach().cpu())
        self._steps.append(step)
        self._before, self._now = self._now, _copies(snapshot)
        if self._first is None:
            self._first = _edge_between(snapshot, self._before)

    def finish(self, snapshot: Snapshot, same_examples: bool = True, loss_scale: float = 1.0) -> LossRecord:
        """The record; `snapshot` is of the last recorded step, up to which the sharpness is measured here.

        Raises InvalidInput where the parameters are not those of the last recorded step, or for too few steps.
        """
        now = trainable(snapshot.model).values()
        if not all(torch.equal(p, kept) for p, kept in zip(now, self._now, strict=True)):
            raise InvalidInput(
                "The model's parameters have changed since the last recorded step; finish the record before "
                "the next."
            )
        last = _edge_between(snapshot, self._before)
        return LossRecord(self.losses, self._first or last, last, tuple(self._steps), same_examples, loss_scale)


def _copies(snapshot: Snapshot) -> list[Tensor]:
    return [p.detach().clone() for p in trainable(snapshot.model).values()]


def _edge_between(snapshot: Snapshot, before: Sequence[Tensor]) -> Edge:
    """The edge halfway between earlier parameters and the model's own."""
    now = list(trainable(snapshot.model).values())
    middle = [torch.lerp(b, p.detach(), 0.5) for b, p in zip(before, now, strict=True)]
    with _moved(now, middle):
        return edge_of(snapshot.replace())


@contextmanager
def _moved(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the parameters hold `values`; afterwards the very tensors that they held before."""
    own = [p.data for p in parameters]
    try:
        for p, value in zip(parameters, values, strict=True):
            p.data = value  # not written into: neither the training's memory nor its version counters may change
        yield
    finally:
        for p, value in zip(parameters, own, strict=True):
            p.data = value
