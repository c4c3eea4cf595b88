"""Can one batch be learned? A network and a loop that are sound learn a few examples by heart in some hundred
steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.display import format_number
from diag.instruments.causes import Cause, Theme
from diag.registry import Kind, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.external.trial import Attempt, Trial

SOURCE = "Karpathy, A Recipe for Training Neural Networks (2019): overfit one batch"
LEARNED_FALL, NOT_LEARNED_FALL = 0.5, 0.1  # of the first loss gone
CLEARLY = 0.5  # of what another optimizer takes away of the loss
LEAPS = 2.0  # times the first loss: a step went too far, wherever the loss is in the end
KNOWS = 1.5  # times the loss with exchanged answers: the network has learned already
EXPLAINED_BY = tuple(
    c
    for c in Cause
    if (
        c.theme in (Theme.LOOP, Theme.LOSS, Theme.DATA, Theme.NETWORK, Theme.NUMERICS)
        and c != Cause.VECTOR_UNTRAINED
    )
    or c in (Cause.LEARNING_RATE_TOO_LOW, Cause.LEARNING_RATE_TOO_HIGH, Cause.INPUT_IGNORED)
)
# What keeps a part of the network, or the whole, from learning as it could, whatever the optimizer.
SLOWED_BY = (
    Cause.GRAPH_CUT, Cause.PARAMETER_FROZEN, Cause.PARAMETER_IN_NO_OPTIMIZER, Cause.DOUBLE_SOFTMAX,
    Cause.DOUBLE_SIGMOID, Cause.UNITS_DEAD, Cause.UNITS_SATURATED, Cause.GRADIENTS_VANISH, Cause.GRADIENTS_EXPLODE,
    Cause.INITIALIZATION_SCALE, Cause.INITIALIZATION_CONSTANT, Cause.INPUTS_NOT_NORMALIZED, Cause.INPUTS_TOO_SMALL,
    Cause.TARGETS_NOT_NORMALIZED, Cause.WEIGHT_DECAY_TOO_STRONG, Cause.CLIPPING_TOO_TIGHT, Cause.MOMENTUM_TOO_HIGH,
    Cause.ADAM_EPSILON_TOO_LARGE,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class OneBatch(Result):
    """What became of the loss of one batch."""

    fall: float = measured("share of the first loss that has gone in the first attempt")
    best_fall: float = measured("share of it that has gone in the best attempt")
    start: float = measured("loss before the first step")
    final: float = measured("loss after the last step of the first attempt")
    best_final: float = measured("loss after the last step of the best attempt")
    exchanged: float = measured("mean loss before training where each example has another's answer")
    steps: int = measured("steps of the first attempt")
    examples: int = measured("examples of the batch")
    first: str = measured("what the first attempt was made with")
    best: str = measured("what the best attempt was made with")
    highest: float = measured("highest loss of the first attempt", remark="infinite where one was no number")
    stopped: str = measured("what ended the first attempt early", remark="empty: nothing did")
    own: bool = measured("whether the first attempt was made with the user's optimizer")
    losses: NDArray[Any] = measured("losses before each step of the first attempt", shape="steps")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        if self.fall >= LEARNED_FALL or self._knows:
            return self._fine()
        if self.best_fall >= LEARNED_FALL and self.fall < CLEARLY * self.best_fall:
            return self._optimizer_at_fault()
        return self._undecided() if self.best_fall >= NOT_LEARNED_FALL else self._not_learned()

    @property
    def _knows(self) -> bool:
        """Whether the network knew the batch before: the right answers fit far better than another's."""
        return self.exchanged > KNOWS * self.start > 0

    @property
    def _course(self) -> str:
        return (
            f"the loss of one batch of {self.examples:,} examples went from {format_number(self.start)} to "
            f"{_number(self.final)} in {self.steps:,} steps"
        )

    def _fine(self) -> Verdict:
        return Verdict(
            Level.OK,
            f"One batch can be learned: {self._course} with {self.first}.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            value=self.fall,
            threshold=LEARNED_FALL,
            threshold_source=OUR_CHOICE,
        )

    def _undecided(self) -> Verdict:
        return Verdict(
            Level.UNKNOWN,
            f"With {self.first} {self._course}; whether it would go on falling was not seen.",
            source=SOURCE,
            value=self.best_fall,
            threshold=LEARNED_FALL,
            threshold_source=OUR_CHOICE,
        )

    def _optimizer_at_fault(self) -> Verdict:
        too_high = self.highest > LEAPS * self.start or self.final > self.start
        return Verdict(
            Level.ALARM if self.fall < NOT_LEARNED_FALL or too_high else Level.WARNING,
            f"With {self.first} {self._course}; {self.best} takes it to {format_number(self.best_final)} in as "
            "many steps at most, so the network and the loss are able to learn.",
            advice=f"Look at the optimizer's settings first: its learning rate is probably too "
            f"{'large' if too_high else 'small'} for this network.",
            source=SOURCE,
            confidence=Confidence.STRONG_EMPIRICAL,
            refutation="The same optimizer fits one batch when it is given some more steps.",
            value=self.fall,
            threshold=LEARNED_FALL,
            threshold_source=OUR_CHOICE,
            cause=Cause.LEARNING_RATE_TOO_HIGH if too_high else Cause.LEARNING_RATE_TOO_LOW,
            explained_by=SLOWED_BY,
        )

    def _not_learned(self) -> Verdict:
        return Verdict(
            Level.ALARM,
            f"One batch cannot be learned: {self._course} with {self.first}"
            + (f", and {self.best} took it to {format_number(self.best_final)}" if self.best != self.first else "")
            + (f" ({self.stopped})" if self.stopped else "")
            + ".",
            advice="Follow one example by hand from the input to the loss: is the answer in what the "
            "network sees, does the loss compare it with the right output, does every layer get a gradient?",
            source=SOURCE,
            confidence=Confidence.STRONG_EMPIRICAL,
            refutation="Another optimizer that fits this batch.",
            value=self.best_fall,
            threshold=NOT_LEARNED_FALL,
            threshold_source=OUR_CHOICE,
            cause=Cause.BATCH_NOT_LEARNED,
            explained_by=EXPLAINED_BY,
        )

    def plot(self, ax: Any = None) -> Any:
        """The loss of the batch over the steps of the first attempt."""
        ax.plot(numpy.arange(len(self.losses)), self.losses)
        ax.set(xlabel="step on the same batch", ylabel="loss")


@instrument(
    source=SOURCE,
    title="One batch",
    kind=Kind.CHECK,
    why="A network that cannot learn one batch by heart cannot learn the data: a bug in the loop, the loss "
    "or the network costs minutes now or days later.",
)
def one_batch(trial: Trial) -> OneBatch:
    """Whether the network learns one batch by heart.

    trial: what `diag.preflight` tried. Where half of the loss has gone it is learned; where a tenth has not, with
    the user's optimizer nor with Adam at 1e-3, 1e-2 and 1e-4, it is not, unless the network knew the batch before.
    Raises nothing of its own.
    """
    first, best = trial.first, trial.best
    return OneBatch(
        fall=_known(first),
        best_fall=_known(best),
        start=first.start,
        final=first.final,
        best_final=best.final,
        exchanged=trial.exchanged_loss,
        steps=len(first.losses),
        examples=trial.examples,
        first=first.optimizer,
        best=best.optimizer,
        highest=_highest(first),
        stopped=first.stopped,
        own=trial.own,
        losses=numpy.array(first.losses),
        preconditions=(
            Precondition("a loss", bool(first.losses), "no step was made."),
            Precondition(
                "a positive loss",
                not first.start <= 0,
                "the loss is not positive, so that a share of it says nothing.",
            ),
        ),
    )


def _number(value: float) -> str:
    return format_number(value) if math.isfinite(value) else "a value that is not a number"


def _highest(attempt: Attempt) -> float:
    losses = (*attempt.losses, attempt.final)
    return max(losses) if all(math.isfinite(loss) for loss in losses) else math.inf


def _known(attempt: Attempt) -> float:
    """The fall; minus infinity where the loss ended or began as no number."""
    return attempt.fall if math.isfinite(attempt.fall) else -math.inf
