"""Spikes of the loss: where it rose far above its course for some steps and came back, and how much that undid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.graded import graded
from diag.instruments.optimization.course import Floats, finite_losses, median
from diag.ranges import Share
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.history import History
from diag.snapshot.loop.facts import Loop

SOURCE = (
    "Team OLMo et al. 2024 (OLMo 2), arXiv:2501.00656: a loss many standard deviations above its recent course; "
    "here by medians, and by what it undoes"
)
COURSE_LOSSES, NOISE_LOSSES = 16, 64  # losses before it that make the course, and that tell the noise
DEVIATIONS = 10.0  # robust standard deviations of that noise
OF_NORMAL_NOISE = 1.4826  # its standard deviation over its median size
FACTORS = 5.0  # of those of the logarithms
CLEAR_FALL, FALLEN = 3.0, 0.2  # from the first losses to the course: of those deviations, and of the first loss
STANDS_OUT = 2.0  # times the highest single loss elsewhere, above its course
UNDONE, ALL_UNDONE = 0.25, 0.95
SPIKE_STEPS = 3  # a batch alone is no spike
LONGEST = 0.5  # of the steps before it: what lasts longer is another course, as of harder data
MOST_LOSSES = 4096  # longer records are read by medians of consecutive losses
CHANGED_RATE = 1.5
EXPLAINED_BY = (
    Cause.LEARNING_RATE_TOO_HIGH, Cause.SECOND_MOMENT_STALE, Cause.BATCHES_POISONED, Cause.CLASSES_SORTED,
    Cause.SCHEDULE_JUMPED, Cause.TRAINING_DIVERGED, Cause.NOT_FINITE, Cause.DATA_NOT_FINITE,
    Cause.MOMENTUM_TOO_HIGH, Cause.WARMUP_MISSING, Cause.GRADIENTS_NOT_ZEROED, Cause.OPTIMIZER_RECREATED,
    Cause.GRADIENTS_STILL_SCALED, Cause.GRADIENTS_EXPLODE, Cause.ATTENTION_LOGITS_GROW, Cause.STALE_GRADIENT,
    Cause.GRADIENT_NOISE,
    Cause.EPOCHS_NOT_RESHUFFLED, Cause.BATCH_REPEATED, Cause.ACCUMULATION_NOT_DIVIDED, Cause.LOSS_SUMMED,
    Cause.LOSS_ASCENDED, Cause.LOSS_UNBOUNDED, Cause.UNITS_DEAD,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class LossSpikes(Result):
    """The spikes in order; where none was found, the arrays are empty."""

    undone: float = measured("of the fall of the loss until then, what the highest spike undid", unit="share")
    starts: NDArray[numpy.int64] = measured("the first step of each spike", shape="(spikes,)")
    ends: NDArray[numpy.int64] = measured("the step at which it was back", shape="(spikes,)")
    peaks: NDArray[numpy.float64] = measured("the highest loss of each", shape="(spikes,)")
    courses: NDArray[numpy.float64] = measured("the median loss before each", shape="(spikes,)")
    shares: NDArray[numpy.float64] = measured("what each undid of the fall until then", shape="(spikes,)")
    rates: NDArray[numpy.float64] = measured("learning rate before and in each spike", shape="(spikes, 2)")
    steps: NDArray[numpy.int64] = measured("the steps shown", shape="(steps,)")
    losses: NDArray[numpy.float64] = measured("their losses", shape="(steps,)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        verdict = graded(SOURCE, self.undone, self.setting("warn_above"))
        if not len(self.starts):
            return verdict(Level.OK, "No rise of the loss for three steps or more stands out from its scatter.")
        return verdict(
            Level.WARNING,
            self._sentence(int(numpy.argmax(self.shares))),
            advice="Look at the batches of the steps before it. Clip the gradient, warm the learning rate up or "
            "lower it; with Adam, a second beta of 0.95 forgets old gradients sooner.",
            confidence=Confidence.ARITHMETIC,
            refutation="A change of the data or of the loss that was meant, at that step.",
            cause=Cause.LOSS_SPIKE,
            explained_by=EXPLAINED_BY,
            step=int(self.starts[0]),
        )

    def _sentence(self, k: int) -> str:
        start, end = int(self.starts[k]), int(self.ends[k])
        before, during = self.rates[k]
        rate = (
            f" as the learning rate went from {format_number(before)} to {format_number(during)}"
            if during > CHANGED_RATE * before
            else ""
        )
        others = len(self.starts) - 1
        undone = "all that" if self.shares[k] > ALL_UNDONE else f"{format_share(self.shares[k])} of what"
        more = f" It did so {others + 1:,} times; this was the highest." if others else ""
        return (
            f"The loss jumped at step {start:,}{rate}: from {format_number(self.courses[k])} to "
            f"{format_number(self.peaks[k])}, which undid {undone} training had gained until then, and was back at "
            f"step {end:,}.{more}"
        )

    def plot(self, ax: Any = None) -> Any:
        """The loss over the steps, with the spikes marked."""
        ax.plot(self.steps, self.losses)
        for start, end in zip(self.starts, self.ends, strict=True):
            ax.axvspan(start, end, color="tab:red", alpha=0.2, linewidth=0)
        ax.set(xlabel="step", ylabel="loss")


@instrument(
    source=SOURCE,
    title="Loss spikes",
    kind=Kind.CHECK,
    why="A spike throws away steps that were paid for; later ones are often higher, and the last does not "
    "come back.",
    formula="(highest loss - median before it) / (first loss - median before it)",
)
def loss_spikes(history: History, loop: Loop | None = None, *, warn_above: Share = UNDONE) -> LossSpikes:
    """Where the loss rose far above its course for three steps or more, and came back.

    history: the record of a watched run, or of an imported log; loop: whether several optimizers descend losses of
    their own (the sides of a game), steps descend different loss functions, or the loss is that of a policy, or
    for targets that training makes and that come to lie farther apart, whose course says nothing. A spike begins
    where a loss lies above the median
    of the 16 before it by ten robust standard deviations of the noise, and undoes more than `warn_above` of the
    fall from the first five losses to that median; it ends where a loss is back within a tenth of the way. What
    lasts fewer than three steps is a batch, and no spike; what is not back, or lasted half as long as all before
    it, is another course, as of harder data. Losses of a policy, or for targets that move, scatter by
    factors and in bursts: a spike must also stand five deviations of the logarithms above (where all losses are
    positive) and twice as high as any single loss elsewhere. Raises nothing of its own.
    """
    losses, steps = _shortened(*finite_losses(history))
    enough, one = len(losses) > COURSE_LOSSES, loop is None or not (loop.sides or loop.losses_in_turn)
    measures = loop is None or not (loop.policy.looks or any(f.moving for f in loop.asked))
    found = _spikes(losses, steps, warn_above) if enough and one and measures else []
    rates = [_rates(history, spike.start, spike.end) for spike in found]
    thin = slice(None, None, max(1, len(losses) // 512))
    shares = numpy.array([spike.share for spike in found])
    return LossSpikes(
        undone=float(shares.max(initial=0.0)),
        starts=numpy.array([spike.start for spike in found], numpy.int64),
        ends=numpy.array([spike.end for spike in found], numpy.int64),
        peaks=numpy.array([spike.peak for spike in found], float),
        courses=numpy.array([spike.course for spike in found], float),
        shares=shares,
        rates=numpy.array(rates, float).reshape(-1, 2),
        steps=steps[thin],
        losses=losses[thin],
        preconditions=(
            Precondition("losses", enough, f"fewer than {COURSE_LOSSES + 1} losses were recorded."),
            Precondition(
                "one loss",
                one,
                "several optimizers descend losses of their own, as the sides of a game, or steps different ones.",
            ),
            Precondition(
                "a loss that measures what was gained",
                measures,
                "it is that of a policy, or its targets have spread in the course of training.",
            ),
        ),
    )


def _shortened(losses: Floats, steps: NDArray[Any]) -> tuple[Floats, NDArray[Any]]:
    """At most about `MOST_LOSSES` of them: medians of consecutive losses, with the first step of each."""
    of = -(-len(losses) // MOST_LOSSES)
    if of <= 1:
        return losses, steps
    whole = len(losses) // of * of
    return median(losses[:whole].reshape(-1, of), axis=1), steps[:whole:of]


class _Spike(NamedTuple):
    """The first step and the one at which it was back, the highest loss, the course before it, the share undone."""

    start: int
    end: int
    peak: float
    course: float
    share: float


def _spikes(losses: Floats, steps: NDArray[Any], undone: float) -> list[_Spike]:
    course, deviation = _courses(losses)
    gained = median(losses[:5]) - course
    least = numpy.maximum(DEVIATIONS * deviation, undone * gained)
    fallen = (gained > CLEAR_FALL * deviation) & (gained > FALLEN * median(losses[:5]))
    begins = fallen & (losses - course > least)
    if (losses > 0).all():
        relative, of_relative = _courses(numpy.log(losses))
        begins &= numpy.log(losses) - relative > FACTORS * of_relative
    above = numpy.flatnonzero(begins)
    found, back_at = [], 0
    elsewhere = numpy.where(numpy.isfinite(deviation), losses - course, 0.0)
    for i in above.tolist():
        if i < back_at:
            continue
        peak, back_at = _course_of_spike(losses, i, course[i])
        if back_at == len(losses):
            break
        lasted, before = int(steps[back_at] - steps[i]), int(steps[i] - steps[0])
        if SPIKE_STEPS <= lasted <= LONGEST * before:
            share = (peak - course[i]) / gained[i]
            found.append(_Spike(int(steps[i]), int(steps[back_at]), peak, float(course[i]), share))
            elsewhere[i:back_at] = 0
    usual = STANDS_OUT * elsewhere.max()
    return [spike for spike in found if spike.peak - spike.course > usual]


def _course_of_spike(losses: Floats, start: int, course: float) -> tuple[float, int]:
    """The highest loss from `start` on, and where it was back within a tenth of the way; the length if never."""
    highest = numpy.maximum.accumulate(losses[start:])
    back = numpy.flatnonzero(losses[start:] <= course + 0.1 * (highest - course))
    length = int(back[0]) if len(back) else len(highest)
    return float(highest[length - 1]), start + length


def _courses(losses: Floats) -> tuple[Floats, Floats]:
    """The median of the 16 losses before each, and the robust standard deviation of the noise; infinite where there
    are fewer. It is the larger of their deviation from a straight line, since a steep course is no noise, and of
    what the differences of the 64 before say."""
    course, deviation = numpy.zeros(len(losses)), numpy.full(len(losses), math.inf)
    recent = numpy.lib.stride_tricks.sliding_window_view(losses[:-1], COURSE_LOSSES)
    course[COURSE_LOSSES:] = numpy.median(recent, axis=1)
    half = COURSE_LOSSES // 2
    slope = (numpy.median(recent[:, half:], axis=1) - numpy.median(recent[:, :half], axis=1)) / half
    line = course[COURSE_LOSSES:, None] + slope[:, None] * (numpy.arange(COURSE_LOSSES) - (COURSE_LOSSES - 1) / 2)
    near = numpy.median(numpy.abs(recent - line), axis=1)
    changes = numpy.abs(numpy.diff(losses, prepend=losses[0]))
    past = numpy.concatenate([numpy.full(NOISE_LOSSES - COURSE_LOSSES, numpy.nan), changes[:-1]])
    past = numpy.lib.stride_tricks.sliding_window_view(past, NOISE_LOSSES)
    deviation[COURSE_LOSSES:] = OF_NORMAL_NOISE * numpy.maximum(near, median(past, axis=1) / math.sqrt(2))
    return course, deviation


def _rates(history: History, start: int, end: int) -> tuple[float, float]:
    """The median learning rate of the steps before the spike, and the highest up to its end."""
    steps, rates = history.steps, numpy.asarray(history.learning_rate, float)
    before = rates[steps < start][-NOISE_LOSSES:]
    during = rates[(steps >= start - SPIKE_STEPS) & (steps < end)]
    known = during[~numpy.isnan(during)]
    return float(median(before)), float(known.max()) if len(known) else math.nan
