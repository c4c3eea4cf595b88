"""Do training and evaluation mode agree on a batch that has been learned?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.external.trial import Trial

SOURCE = "arithmetic: the loss of one batch in both modes"
FALL_BEFORE_MODES = 0.5  # of the first loss gone


@dataclass(frozen=True, kw_only=True, eq=False)
class ModesAgree(Result):
    """The loss of the fitted batch in both modes."""

    train_loss: float = measured("mean loss in training mode, after fitting")
    eval_loss: float = measured("loss in evaluation mode, after fitting")
    start: float = measured("loss in training mode before fitting")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        found = (
            f"training mode gives a loss of {format_number(self.train_loss)} on the batch that was fitted (at "
            f"first {format_number(self.start)}), evaluation mode {format_number(self.eval_loss)}"
        )
        if self.eval_loss < self.start or self.eval_loss <= self.train_loss:
            return Verdict(Level.OK, f"The modes agree: {found}.", source=SOURCE, confidence=Confidence.ARITHMETIC)
        return Verdict(
            Level.WARNING,
            f"What training learns is not there in evaluation: {found}.",
            advice="Look at normalisation layers (momentum, statistics of tiny batches, shared between different "
            "inputs) and at whatever else asks for self.training.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="An evaluation loss near the training loss on the same batch.",
            value=self.eval_loss,
            threshold=self.start,
            threshold_source="the loss before fitting",
            cause=Cause.NORMALIZATION_STATISTICS_BAD,
        )

    def plot(self, ax: Any = None) -> Any:
        """The three losses."""
        ax.bar(["before", "training mode", "evaluation mode"], [self.start, self.train_loss, self.eval_loss])
        ax.set(xlabel="one batch", ylabel="loss")


@instrument(
    source=SOURCE,
    title="Agreement of the modes",
    kind=Kind.CHECK,
    why="A network that learned in training mode and forgets in evaluation mode scores badly for a reason "
    "that no further training removes.",
)
def modes_agree(trial: Trial) -> ModesAgree:
    """Whether what one batch taught in training mode is there in evaluation mode.

    trial: what `diag.preflight` tried; the running statistics have seen the batch 30 times without a step. A
    warning where the batch was learned and evaluation mode is worse than before. Raises nothing of its own.
    """
    start = trial.best.start
    learned = trial.train_loss <= (1 - FALL_BEFORE_MODES) * start
    known = math.isfinite(trial.eval_loss) or trial.eval_loss == math.inf
    why = trial.unsure.get("modes", "the loss in evaluation mode is not a number")
    return ModesAgree(
        train_loss=trial.train_loss,
        eval_loss=trial.eval_loss,
        start=start,
        preconditions=(
            Precondition("both losses", known, f"{why}."),
            Precondition("a batch that was learned", bool(learned), "the batch was not learned in training mode."),
        ),
    )
