"""Finite steps: the first step at which a loss or a gradient was not a finite number, and where that came from.

A loss that is not finite comes from the batch, the network or the computation of the loss; a gradient that is not
finite where the loss is comes from the backward pass, at or after the last layer that got it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy

from diag.errors import counted
from diag.instruments.causes import LOSES_THE_LOSS, Cause
from diag.instruments.optimization.second_moment import WITH_SECOND_MOMENT
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.history import History
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import OriginFacts

SOURCE = "arithmetic of the recorded steps"
ROUNDS_TO_ZERO = 2.0**-25  # in float16
EXPLAINED_BY = (
    *LOSES_THE_LOSS, Cause.TRAINING_DIVERGED, Cause.TARGETS_NOT_NORMALIZED, Cause.WARMUP_MISSING,
    Cause.ACCUMULATION_NOT_DIVIDED,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class FiniteSteps(Result):
    """Steps that a GradScaler left out are not counted."""

    loss_step: int = measured("the first step whose loss was not finite", remark="0 for none")
    gradient_step: int = measured("the first step taken with a gradient that was not finite", remark="0 for none")
    layers: tuple[str, ...] = measured("tensors whose gradient was not finite at that step")
    tensors: int = measured("tensors whose gradient was seen")
    optimizer: str = measured("the optimizer's kind", default="")
    epsilon_lost: float = measured(
        "Adam's epsilon, where it is zero in the numbers of float16 parameters", remark="0: not so", default=0.0
    )
    batch_finite: bool | None = measured("whether the batch of that loss was finite", remark="None: not known")
    outputs_finite: bool | None = measured("whether the model's outputs were", remark="None: not known")
    operation: str = measured(
        "what the computation of the loss took, where that left the numbers", remark="empty: not known"
    )

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        if not self.loss_step and not self.gradient_step:
            return Verdict(
                Level.OK,
                "All losses and applied gradients were finite.",
                source=SOURCE,
                confidence=Confidence.ARITHMETIC,
            )
        if self.loss_step and (not self.gradient_step or self.loss_step <= self.gradient_step):
            return self._from_the_loss()
        return self._from_the_backward_pass()

    def _from_the_loss(self) -> Verdict:
        step = f"At step {self.loss_step:,} the loss was not finite for the first time"
        if self.batch_finite is False:
            return self._alarm(
                f"{step}: the batch itself holds values that are not finite.",
                "Look for NaN and infinity in what the data set returns, and for divisions by a standard deviation "
                "of zero.",
                Cause.DATA_NOT_FINITE,
                (),
            )
        if self.outputs_finite and self.operation:
            return self._alarm(
                f"{step}: the model's outputs were finite, and the computation of the loss took {self.operation}.",
                "Use the function of torch that does it in one (cross_entropy or log_softmax for log(softmax), "
                "binary_cross_entropy_with_logits for log(sigmoid)), or clamp the argument away from zero.",
                Cause.NOT_FINITE,
                EXPLAINED_BY,
            )
        if self.epsilon_lost:
            return self._of_half_precision(step)
        where = {
            True: ", though the model's outputs were finite",
            False: ": the model's outputs were not finite either",
        }
        known = {False: where[False], True: where[True], None: ""}[self.outputs_finite]
        batch = ", though the batch was" if self.batch_finite and self.outputs_finite is False else ""
        before = "; the gradients of all steps before were finite" if self.loss_step > 1 else ""
        return self._alarm(
            f"{step}{known}{batch}{before}.",
            "Go back to a state before that step; look at its batch, lower the learning rate or clip the gradient, "
            "and look at logarithms, divisions and roots in the loss.",
            Cause.NOT_FINITE,
            # The network gave it: where in it is told by the look at its layers.
            (*EXPLAINED_BY, Cause.NOT_FINITE) if self.outputs_finite is False else EXPLAINED_BY,
        )

    def _of_half_precision(self, step: str) -> Verdict:
        """Adam has divided by zero before."""
        return self._alarm(
            f"{step}, after steps of {self.optimizer} on parameters of float16, in which its epsilon "
            f"({self.epsilon_lost:g}) is zero: where a squared gradient rounds to zero, too (below 2e-4), the "
            "step is a division by zero.",
            "Keep the parameters in float32 and run the model under torch.autocast with a GradScaler; or use "
            "bfloat16, or an epsilon of 1e-4.",
            Cause.GRADIENT_UNDERFLOW,
            (Cause.DATA_NOT_FINITE, Cause.LOGITS_INTO_PROBABILITY_LOSS),
        )

    def _from_the_backward_pass(self) -> Verdict:
        everywhere = len(self.layers) == self.tensors
        where = (
            f"of all {counted(self.tensors, 'tensor')}, so it arises in the loss or at the model's end"
            if everywhere
            else f"of {len(self.layers):,} of {counted(self.tensors, 'tensor')}, so it arises at or after "
            f"{self.layers[-1]}"
        )
        return self._alarm(
            f"At step {self.gradient_step:,} the loss was finite and its gradient was not: {where}.",
            "Look there for a root or a norm of zero, whose gradient is infinite, for a product of zero and "
            "infinity behind torch.where, and under float16 for a gradient that overflows.",
            Cause.NOT_FINITE,
            EXPLAINED_BY,
        )

    def _alarm(self, sentence: str, advice: str, cause: Cause, explained_by: tuple[Cause, ...]) -> Verdict:
        step = min(s for s in (self.loss_step, self.gradient_step) if s)
        return Verdict(
            Level.ALARM,
            sentence,
            advice=advice,
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="The same step, computed again in float64, is finite: then the number format is too narrow.",
            value=float(step),
            layers=self.layers[-5:],
            cause=cause,
            explained_by=explained_by,
            step=step,
        )

    def plot(self, ax: Any = None) -> Any:
        """The first steps that were not finite."""
        ax.bar(["loss", "gradient"], [self.loss_step, self.gradient_step])
        ax.set(xlabel="what was not finite", ylabel="first step (0: none)")


@instrument(
    source=SOURCE,
    title="Finite steps",
    kind=Kind.CHECK,
    why="After one update with a NaN the weights are lost; the step and the place where it began tell what "
    "to change.",
)
def finite_steps(history: History, loop: Loop | None = None) -> FiniteSteps:
    """At which step a loss or a gradient was first not a finite number, and where that came from.

    history: the record of a watched run. loop: the facts of its loop, which say whether the batch and the outputs
    of the first such loss were finite, and which operation before the loss left the numbers. Steps that a
    GradScaler left out are how it finds its scale. Raises nothing of its own.
    """
    taken = ~numpy.asarray(history.skipped, bool)
    bad_gradients = ~numpy.asarray(history.gradient_finite, bool) & taken[:, None]
    bad_losses = (~numpy.asarray(history.loss_finite, bool) | numpy.isinf(history.loss)) & taken
    first = int(numpy.argmax(bad_gradients.any(1))) if bad_gradients.any() else -1
    loss_step = int(history.steps[int(numpy.argmax(bad_losses))]) if bad_losses.any() else 0
    names = numpy.asarray(history.layers)
    origin = _origin(loop, loss_step)
    seen = numpy.isfinite(history.gradient_norm).any(0) | ~numpy.asarray(history.gradient_finite, bool).all(0)
    return FiniteSteps(
        loss_step=loss_step,
        gradient_step=int(history.steps[first]) if first >= 0 else 0,
        layers=tuple(names[bad_gradients[first]].tolist()) if first >= 0 else (),
        tensors=int(seen.sum()),
        optimizer=str(history.optimizer.get("kind", "")),
        epsilon_lost=_epsilon_lost(history, loop) if max(loss_step, first + 1) > 1 else 0.0,
        batch_finite=origin.batch_finite,
        outputs_finite=origin.outputs_finite,
        operation=origin.operation,
        preconditions=(Precondition("steps", len(history.steps) > 0, "no step was recorded."),),
    )


def _epsilon_lost(history: History, loop: Loop | None) -> float:
    """Adam's epsilon, where parameters that it trains are of float16 and hold no number as small."""
    half = loop is not None and any(p.dtype == "float16" and p.trainable and p.optimizers for p in loop.parameters)
    epsilon = float(history.optimizer.get("eps") or 0.0) if half else 0.0
    adaptive = history.optimizer.get("kind") in WITH_SECOND_MOMENT
    return epsilon if adaptive and 0 < epsilon <= ROUNDS_TO_ZERO else 0.0


def _origin(loop: Loop | None, step: int) -> OriginFacts:
    """What is known of the loss of that step."""
    known = loop.origin if loop is not None else None
    return known if known is not None and known.step == step else OriginFacts(step, None, None)
