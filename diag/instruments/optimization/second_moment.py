"""Adam's second moment: whether the gradients outgrew it, so that steps were far larger than the learning rate.

Adam divides by the root of a running mean of squared gradients. Where gradients grow tenfold within few steps, that
mean still holds the small ones, and for about 1 / (1 - beta2) steps the division is by too little. The ratio of a
tensor's gradient to the root of its second moment is computed again from the recorded norms; noise keeps it near
one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from diag.display import format_number
from diag.instruments.causes import Cause
from diag.instruments.graded import graded
from diag.instruments.optimization.course import SMALL, median
from diag.ranges import Threshold
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.history import History
from diag.snapshot.loop.facts import Loop

SOURCE = "Molybog et al. 2023, arXiv:2304.13013 (spikes follow where the second moment is out of date)"
STALE = 5.0
# Times the gradients of before, in the five steps after and in each fifteen that follow, and of the first five:
# neither one odd batch nor a stretch of them counts, nor a spike that passes.
STAYED, KEPT_UP = 2.0, 0.05
BEFORE, AFTER, LONGER, STRETCH_AFTER = 20, 5, 20, 205  # steps
CANDIDATE, MOST_CANDIDATES = 2.0, 64  # ratios that are looked at more closely, and how many of them
WITH_SECOND_MOMENT = ("Adam", "AdamW", "NAdam", "RAdam")
EXPLAINED_BY = (
    Cause.LEARNING_RATE_TOO_HIGH, Cause.DATA_NOT_FINITE, Cause.BATCHES_POISONED, Cause.GRADIENTS_NOT_ZEROED,
    Cause.NOT_FINITE, Cause.LOSS_ASCENDED, Cause.LOSS_UNBOUNDED, Cause.INPUTS_NOT_NORMALIZED, Cause.WARMUP_MISSING,
    Cause.WEIGHTS_CHANGED_OUTSIDE, Cause.TRAINING_IN_EVAL_MODE, Cause.SCHEDULE_JUMPED,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class SecondMoment(Result):
    """Ratios are medians over the tensors of at least 64 entries."""

    largest: float = measured(
        "gradient over the root of the second moment, the largest of all steps that stayed up"
    )
    at: int = measured("the step of that", remark="0 where there is none")
    growth: float = measured("gradients of the five steps from there over those of the twenty before")
    lasted: int = measured("how many steps, from there, they were seen to stay so", unit="steps")
    beta2: float = measured("how much of the second moment a step keeps")
    steps: NDArray[numpy.int64] = measured("the steps", shape="(steps,)")
    ratios: NDArray[numpy.float64] = measured("the ratio at each", shape="(steps,)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        limit = self.setting("stale")
        verdict = graded(SOURCE, self.largest, limit)
        if not self.largest > limit:
            return verdict(
                Level.OK,
                "Adam's second moment kept up with the gradients.",
            )
        return verdict(
            Level.WARNING,
            f"Adam's second moment was out of date from step {self.at:,}: gradients became "
            f"{format_number(self.growth)} times as large for {self.lasted:,} steps at least, and the step was "
            f"made as if for gradients {format_number(self.largest)} times as small (beta2 = {self.beta2:g}).",
            advice="Look at what changed at that step (the loss's scale, the data, what is trained); lower beta2 "
            "(0.95 to 0.99), clip the gradient, or warm the learning rate up again there.",
            confidence=Confidence.STRONG_EMPIRICAL,
            refutation="The same change does no harm with beta2 = 0.9.",
            cause=Cause.SECOND_MOMENT_STALE,
            explained_by=EXPLAINED_BY,
            step=self.at,
        )

    def plot(self, ax: Any = None) -> Any:
        """The ratio at every step."""
        ax.semilogy(self.steps, self.ratios)
        ax.axhline(self.setting("stale"), color="black", linewidth=0.8, linestyle=":")
        ax.set(xlabel="step", ylabel="gradient over the root of the second moment")


@instrument(
    source=SOURCE,
    title="Second moment",
    kind=Kind.CHECK,
    why="Adam divides by what gradients used to be: where they suddenly grow, the step is many times larger "
    "than intended, which is how many loss spikes begin.",
    formula="|g_t| / sqrt(v_t), v_t = (1 - beta2) sum_s beta2^(t - s) |g_s|^2 / (1 - beta2^t)",
)
def second_moment(history: History, loop: Loop | None = None, *, stale: Threshold = STALE) -> SecondMoment:
    """Whether gradients outgrew Adam's second moment, so that steps were far larger than usual.

    history: the record of a watched run, of which the steps of the last optimizer count. The second moment of each
    tensor is the running mean of its squared
    gradient norms with the optimizer's beta2, corrected for its start, gradients as they were after clipping; a
    tensor counts from its first gradient on. A median ratio above `stale` is a warning where the gradients of the
    five steps from there, and of each fifteen of the two hundred after them, are at least twice those of the twenty
    before, and do not fall to a twentieth again (a stretch of odd batches is none, nor is a spike), and the loss of
    these steps, where it is known, is higher than before: gradients that grow as the loss falls are a training
    that takes off. loop: whether targets that are numbers, as values that training itself learns, came to lie
    farther apart, of which gradients grow, too; then it is not judged. For other optimizers, and before step 40,
    it is not judged. Raises nothing of its own.
    """
    history = _of_the_last_optimizer(history, loop)
    beta2, known = _beta2(history), len(history.steps) >= BEFORE + LONGER
    usable = beta2 is not None and known
    gradients = _applied(history) if usable else numpy.zeros((0, 0))
    ratios = _ratios(gradients, history.steps, beta2 or 0.0) if usable else numpy.zeros(0)
    largest, place, growth, lasted = _largest(ratios, gradients, history.loss)
    return SecondMoment(
        largest=largest,
        at=int(history.steps[place]) if place >= 0 else 0,
        growth=growth,
        lasted=lasted,
        beta2=beta2 if beta2 is not None else math.nan,
        steps=numpy.asarray(history.steps[-len(ratios) :][-512:]) if usable else numpy.zeros(0, numpy.int64),
        ratios=ratios[-512:],
        preconditions=(
            Precondition("Adam", beta2 is not None, "the optimizer keeps no second moment that is known here."),
            Precondition(
                "targets that stay as they are",
                loop is None or not any(f.moving for f in loop.asked),
                "the targets have spread in the course of training, and gradients with them.",
            ),
            Precondition("steps", known, f"fewer than {BEFORE + LONGER} steps were recorded."),
        ),
    )


def _of_the_last_optimizer(history: History, loop: Loop | None) -> History:
    """The steps since an optimizer took over from all others: its moments know nothing of the gradients before."""
    training = () if loop is None else loop.training
    began = [o.first_step for o in training if all(p is o or p.last_step < o.first_step for p in training)]
    return history if max(began, default=0) <= 1 else history.rows(history.steps >= max(began))


def _beta2(history: History) -> float | None:
    about = history.optimizer
    betas = about.get("betas")
    return float(betas[1]) if about.get("kind") in WITH_SECOND_MOMENT and betas else None


def _applied(history: History) -> NDArray[numpy.float64]:
    """The gradient norms (steps, tensors) of the large tensors as the optimizer used them."""
    norms = numpy.asarray(history.gradient_norm, float)
    total = numpy.sqrt(numpy.nansum(norms**2, axis=1))
    with numpy.errstate(divide="ignore", invalid="ignore"):
        factor = numpy.asarray(history.applied_gradient_norm, float) / total
    factor[~numpy.isfinite(factor)] = 1.0
    norms = norms * factor[:, None]
    norms[numpy.asarray(history.skipped, bool)] = numpy.nan
    norms[~(norms > 0) | ~numpy.isfinite(norms)] = numpy.nan
    return numpy.asarray(norms[:, numpy.asarray(history.sizes) >= SMALL])


def _ratios(gradients: NDArray[numpy.float64], steps: Any, beta2: float) -> NDArray[numpy.float64]:
    """The median over tensors of gradient over the root of its corrected second moment, NaN where none was seen."""
    moment, weight = numpy.zeros(gradients.shape[1]), numpy.zeros(gradients.shape[1])
    moments, weights = numpy.zeros(gradients.shape), numpy.zeros(gradients.shape)
    before = int(steps[0]) - 1
    squares = numpy.nan_to_num(gradients) ** 2  # a gradient of zero, once there was one, counts as such
    for i, step in enumerate(steps):
        kept = beta2 ** (int(step) - before)  # a row may stand for several steps
        before = int(step)
        counted = (squares[i] > 0) | (weight > 0)
        moment = kept * moment + (1 - kept) * squares[i]
        weight = kept * weight + (1 - kept) * counted
        moments[i], weights[i] = moment, weight
    with numpy.errstate(divide="ignore", invalid="ignore"):
        found = gradients / numpy.sqrt(moments / weights)
    return numpy.asarray(median(found, axis=1)) if found.size else numpy.zeros(len(gradients))


def _largest(
    ratios: NDArray[numpy.float64], gradients: NDArray[numpy.float64], losses: NDArray[numpy.float64]
) -> tuple[float, int, float, int]:
    """The largest ratio from which on gradients stayed up, its place, how much they grew, and for how many steps
    that was seen; (0, -1, 1, 0) for none."""
    size = numpy.asarray(median(gradients, axis=1)) if gradients.size else numpy.zeros(len(ratios))
    inside = numpy.arange(BEFORE, len(ratios) - LONGER + 1)
    candidates = inside[numpy.nan_to_num(ratios[inside]) > CANDIDATE]
    for i in candidates[numpy.argsort(-ratios[candidates])][:MOST_CANDIDATES]:
        after, before = float(median(size[i : i + AFTER])), float(median(size[i - BEFORE : i]))
        later = size[i + AFTER : i + STRETCH_AFTER]
        later = later[: len(later) // (LONGER - AFTER) * (LONGER - AFTER)]
        lowest = float(numpy.min(median(later.reshape(-1, LONGER - AFTER), axis=1)))
        harmed = not median(losses[i : i + LONGER]) <= median(losses[i - BEFORE : i])  # or not known
        if after > STAYED * before > 0 and lowest > max(STAYED * before, KEPT_UP * after) and harmed:
            return float(ratios[i]), int(i), after / before, AFTER + len(later)
    return 0.0, -1, 1.0, 0
