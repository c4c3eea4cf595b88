"""A trial of a training before it begins: what became of one batch, and what the network's answers depend on.

`diag.preflight` makes a `Trial` on copies of the model; an instrument asks for it as `trial`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diag.errors import MissingQuantity

if TYPE_CHECKING:
    from diag.snapshot.snapshot import Snapshot


@dataclass(frozen=True)
class Attempt:
    """One attempt to fit the batch.

    optimizer: its name in a sentence. losses: before each step, (steps,). final: the loss after the last
    step, in training mode. stopped: what ended it early; empty: nothing did.
    """

    optimizer: str
    losses: tuple[float, ...]
    final: float
    stopped: str = ""

    @property
    def start(self) -> float:
        """The loss before the first step."""
        return self.losses[0] if self.losses else math.nan

    @property
    def fall(self) -> float:
        """Which share of the first loss has gone; negative where it rose, NaN where it is not finite."""
        if not (math.isfinite(self.start) and math.isfinite(self.final)) or self.start == 0:
            return math.nan
        return (self.start - self.final) / abs(self.start)


@dataclass(frozen=True)
class Trial:
    """What `diag.preflight` tried on copies of a model; numbers that are unavailable are NaN.

    examples: how many the batch holds. attempts: with the user's optimizer (`own`) or with Adam; the first
    attempt is the one that was watched. exchanged_loss: the mean loss, before training, where each example has the
    answer of another; fitted_exchanged_loss: the same after the best attempt. input_change, fitted_input_change:
    how far the outputs move when the inputs of the examples are exchanged, before and after it, over their size.
    train_loss, eval_loss: of the batch after the best attempt, in both modes, once the running
    statistics have seen the batch `SETTLING` times. unsure: why a number is unavailable, by its name.
    """

    examples: int
    attempts: tuple[Attempt, ...]
    own: bool
    exchanged_loss: float = math.nan
    fitted_exchanged_loss: float = math.nan
    input_change: float = math.nan
    fitted_input_change: float = math.nan
    train_loss: float = math.nan
    eval_loss: float = math.nan
    unsure: Mapping[str, str] = field(default_factory=dict)

    @property
    def first(self) -> Attempt:
        """The attempt that was watched: with the user's optimizer, where there is one."""
        return self.attempts[0]

    @property
    def best(self) -> Attempt:
        """The attempt whose loss fell furthest."""
        return max(self.attempts, key=lambda a: a.fall if math.isfinite(a.fall) else -math.inf)


def trial(snapshot: Snapshot) -> Trial:
    """What `diag.preflight` tried; a snapshot has none. Raises MissingQuantity."""
    raise MissingQuantity("only diag.preflight makes trials of a training; call it.")
