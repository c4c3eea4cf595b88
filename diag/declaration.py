"""What an instrument declares of itself: what it needs, its settings, when a watch runs it, and the steps that it
wants recorded before.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from diag.snapshot.glossary import Quantity

# What an instrument's `passes` counts in: forward passes over the data. A curvature product is two or three
# gradients and an algorithm's own vectors; by scripts/bench_estimates.py 5 to 14 passes, the self-test 20 to 60.
GRADIENT, PRODUCT, SELF_TEST = 3.0, 8.0, 40.0


class Kind(enum.Enum):
    """When a watch runs an instrument."""

    # Costs nothing or one look (at most one forward pass over the probe): at scheduled steps, always.
    CHECK = "check"
    MEASUREMENT = "measurement"  # expensive (curvature, per-example gradients): as the budget allows
    DESCRIPTION = "description"  # judges nothing: only by name or with instruments="all"


class BeforeTraining(enum.Enum):
    """Whether a preflight, which trains on one batch again and again, runs a check."""

    NEVER = "never"  # it judges what a whole training does: epochs, schedules, held-out data
    ALWAYS = "always"
    WITH_OPTIMIZER = "with optimizer"  # it judges the optimizer, so only where that is the user's


@runtime_checkable
class Measurable(Protocol):
    """What an instrument can be called on: a `Snapshot`, or anything that gives quantities by name."""

    def quantity(self, name: str) -> Any:
        """The value of a glossary quantity; raises MissingQuantity where it cannot be given."""

    def provenance(self) -> dict[str, Any]:
        """num_examples, data_fingerprint and seed, as far as they are known."""

    def explain(self, error: Exception | None = None) -> None:
        """Called after `error` broke something: raise a DiagError if the reason lies in what the user gave."""


@dataclass(frozen=True)
class Need:
    """One positional parameter: a quantity, and whether the instrument can do without it."""

    quantity: Quantity
    name: str
    optional: bool
    type: Any = Any


@dataclass(frozen=True)
class Setting:
    """One keyword-only parameter: a setting with its default and its type."""

    name: str
    default: Any
    type: Any


class StepRecording(Protocol):
    """A record of consecutive steps that is growing (see `StepWindow`)."""

    @property
    def num_steps(self) -> int:
        """Steps recorded, the first not counted."""

    @property
    def last_step(self) -> int:
        """The number of the last recorded step."""

    @property
    def losses(self) -> Any:
        """(T + 1, n): the losses so far."""

    def add(self, snapshot: Any, step: int) -> None:
        """Record another step; `snapshot` is of the same model and data after it."""

    def finish(self, snapshot: Any, same_examples: bool, loss_scale: float) -> Any:
        """The record, at the last recorded step. same_examples: whether every step was taken on one batch.
        loss_scale: training descends this multiple of the recorded mean loss; NaN where it is another loss."""


@dataclass(frozen=True)
class StepWindow:
    """Consecutive optimizer steps that a watched run records for an instrument before it measures.

    quantity: the parameter that takes the record. length(settings): how many steps, 0 for none.
    required(settings): whether it measures nothing without a record. least: fewer steps cannot be judged.
    begin(snapshot, step): starts a record. insist, shorten: how a user asks for a record in spite of a reason
    against it, and for a shorter one, for sentences.
    """

    quantity: str
    length: Callable[[Mapping[str, Any]], int]
    required: Callable[[Mapping[str, Any]], bool]
    least: int
    begin: Callable[[Any, int], StepRecording]
    insist: str
    shorten: str
