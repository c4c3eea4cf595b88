"""When does what is learned not carry over? Questions about a course of losses and right answers on training and
held-out examples, as `generalization` measures it at each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

ERRORS_OF_DIFFERENCE = 3.0  # standard errors of a difference, both measured on the same examples
WORSE = 0.2
LEARNED_ABOVE_CHANCE = 0.2  # accuracy above chance on the training examples
LOGGED_SHARE = 0.05  # of the examples: a logged accuracy that falls by less has not fallen
STEPS_BEFORE_GENERALIZATION = 100  # steps
# Standard errors: of a difference between gains, and of a gain that there may be.
SURE_ERRORS, ANY_ERRORS = 4.0, 2.0
GAP_IN_ACCURACY = 0.25  # by which the accuracy on training examples is above that on held-out ones
BY_HEART = 0.99  # of the training examples are answered right
MORE_RIGHT = 0.1  # of the training examples
FIRST_HALF = 0.5  # of the steps, in which the training loss fell by half and nothing came of it


def carries_nothing_over(series: Sequence[tuple[int, Any]]) -> bool:
    """Whether training examples are learned, and held-out ones were never answered better than by chance."""
    last = series[-1][1]
    chance, error = last.held_out_chance, _error_of_chance(last)
    never = all(r.held_out_accuracy <= chance + error for _, r in series)
    # What training's own most frequent class gives is not learned either, where classes are unequal there alone.
    guessed = chance if math.isnan(last.chance) else max(chance, last.chance)
    return never and last.accuracy >= guessed + max(LEARNED_ABOVE_CHANCE, 2 * error)


def never_gains(series: Sequence[tuple[int, Any]]) -> bool:
    """Whether training examples are answered better than without their inputs and held-out ones are not, which is
    no chance, and held-out ones were not at any time, by two standard errors."""
    step, last = series[-1]
    apart = last.gain - last.held_out_gain
    error = math.hypot(last.gain_standard_error, last.held_out_gain_standard_error)
    if (
        step < STEPS_BEFORE_GENERALIZATION
        or not last.gain > 0
        or not last.held_out_gain <= 0
        or not apart > SURE_ERRORS * error
    ):
        return False
    above = last.held_out_chance + _error_of_chance(last)
    answered = any(r.held_out_accuracy > above for _, r in series)
    return not answered and all(r.held_out_gain <= ANY_ERRORS * r.held_out_gain_standard_error for _, r in series)


def _error_of_chance(last: Any) -> float:
    """How far the share of right answers may be above chance on as many held-out examples; NaN without classes."""
    n, chance = max(last.held_out_examples, 1), last.held_out_chance
    return ERRORS_OF_DIFFERENCE * math.sqrt(max(chance * (1 - chance), 1 / n) / n)


def parted(series: Sequence[tuple[int, Any]]) -> tuple[int, Any] | None:
    """The best moment by the held-out loss, where that is past and far fewer held-out examples are answered right
    than training examples."""
    _, last = series[-1]
    step, best = min(series[:-1], key=lambda item: item[1].held_out_loss)
    lost, limit, _ = lost_since(best, last, by_accuracy=False)
    a, n = last.held_out_accuracy, max(last.held_out_examples, 1)
    apart = last.accuracy - a > max(GAP_IN_ACCURACY, ERRORS_OF_DIFFERENCE * math.sqrt(a * (1 - a) / n))
    return (step, best) if apart and lost > limit and last.loss < best.loss else None


def lost_since(best: Any, last: Any, by_accuracy: bool) -> tuple[float, float, str]:
    """(how much worse it has become, what counts as more than chance, of what)."""
    if by_accuracy:
        a, b, n = best.held_out_accuracy, last.held_out_accuracy, last.held_out_examples
        if not n:  # logged ones
            error = math.sqrt(2.0) * last.held_out_accuracy_standard_error
            return a - b, max(ERRORS_OF_DIFFERENCE * error, LOGGED_SHARE), "accuracy"
        return a - b, ERRORS_OF_DIFFERENCE * math.sqrt((a * (1 - a) + b * (1 - b)) / n), "accuracy"
    error = math.hypot(best.held_out_loss_standard_error, last.held_out_loss_standard_error)
    return (
        last.held_out_loss - best.held_out_loss,
        max(ERRORS_OF_DIFFERENCE * error, WORSE * abs(best.held_out_loss)),
        "loss",
    )


def stands_still(series: Sequence[tuple[int, Any]]) -> tuple[int, Any] | None:
    """The last moment in the first half of training, where since then training examples are fitted further,
    held-out ones are answered no better, by a standard error, and far worse than training examples are."""
    last_step, last = series[-1]
    before = [item for item in series if item[0] <= FIRST_HALF * last_step]
    if last_step < STEPS_BEFORE_GENERALIZATION or not before or not _is_fitted_further(before[-1][1], last):
        return None
    far, better = _of_classes(before, last) if not math.isnan(last.accuracy) else _of_numbers(before, last)
    return before[-1] if far and not better else None


def _is_fitted_further(before: Any, last: Any) -> bool:
    """Whether the training loss fell by half, or (with smoothed labels it cannot) more examples are right."""
    more = last.accuracy - before.accuracy >= MORE_RIGHT
    return bool(0 < last.loss <= FIRST_HALF * before.loss or (more and 0 < last.loss < before.loss))


def _of_classes(before: Sequence[tuple[int, Any]], last: Any) -> tuple[bool, bool]:
    """Whether training examples are known by heart and a quarter fewer of the held-out ones; whether more of these
    are answered right than at any time before."""
    a, n = last.held_out_accuracy, last.held_out_examples
    error = math.sqrt(a * (1 - a) / n) if n else math.nan
    far = last.accuracy >= BY_HEART and last.accuracy - a > max(GAP_IN_ACCURACY, ERRORS_OF_DIFFERENCE * error)
    return far and bool(n), a - max(r.held_out_accuracy for _, r in before) > error


def _of_numbers(before: Sequence[tuple[int, Any]], last: Any) -> tuple[bool, bool]:
    """The same of squared errors: held-out ones are larger by a quarter of those of answering with the mean."""
    trivial, error = last.gain + last.loss, last.held_out_loss_standard_error
    gap = last.held_out_loss - last.loss
    far = gap > max(GAP_IN_ACCURACY * trivial, ERRORS_OF_DIFFERENCE * error)  # not where the gain is not known
    return far, min(r.held_out_loss for _, r in before) - last.held_out_loss > error
