"""Do the weights change by the steps that are taken?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy

from diag.display import format_share
from diag.errors import counted
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import NO_STEP, SOURCE, LoopCheck, LoopFinding, judged, parameters_named
from diag.registry import instrument
from diag.result import Level
from diag.snapshot.history import CELLS, History, parts
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import ParameterFacts

STEPS_OF_A_COPY = 100  # steps of a training after which a copy should have followed
MOVED_ALL_ALONG, BEHIND = 0.75, 0.02  # of the looks; of the network's way
STEPS_IN_A_ROW = 3  # measured in a row
ROUNDING_OF_NORM = 1e-6
CONVERGED = 1e-2  # of the usual gradient, or that of the start: below it a step may well round to nothing
AT_THE_START = 5  # measurements
HALF_PRECISION_TYPES = ("float16", "bfloat16")


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightsMove(LoopCheck):
    """Parameters that steps with a gradient and a learning rate do not change."""


@instrument(
    source=SOURCE,
    title="Weights move",
    kind="check",
    before_training="with optimizer",
    why="A parameter that does not move does not learn, although its gradient says that it should.",
)
def weights_move(history: History, loop: Loop) -> WeightsMove:
    """Whether each step changes every parameter that has a gradient and a learning rate.

    The change of each parameter is measured exactly at some steps; a change of zero at the last three of them, with
    a gradient that is not zero, needs a reason: a learning rate of zero, or numbers too coarse for the update. When
    training has ended, after a hundred steps or more, an AveragedModel of the network that was never updated is
    named, and a copy that moved all along and has gone less than a fiftieth of the network's way.

    Raises nothing of its own.
    """
    about = {} if loop.training else {"preconditions": (NO_STEP,)}
    fine = f"No parameter was found that the steps should move and do not, in {counted(loop.step, 'step')}."
    findings = [*_findings(history, loop), *_copies(loop)] if loop.training else []
    return judged(WeightsMove, loop.step, findings, fine, **about)


def _findings(history: History, loop: Loop) -> Iterator[LoopFinding]:
    rows = numpy.flatnonzero(~history.skipped)
    facts = {p.name: p for p in loop.parameters}
    still: dict[Cause, list[str]] = {}
    began: dict[Cause, int] = {}
    for column, update, gradient in _once_still(history, rows):
        name = history.layers[column]
        p = facts.get(name)
        seen = numpy.flatnonzero(numpy.isfinite(update) & (gradient > 0))
        if len(seen) and gradient[seen[-STEPS_IN_A_ROW:]].max() < CONVERGED * _usual(gradient[seen]):
            continue
        if (
            p is None
            or not p.optimizers
            or len(seen) < STEPS_IN_A_ROW
            or (update[seen[-STEPS_IN_A_ROW:]] != 0).any()
        ):
            continue
        last = rows[seen[-STEPS_IN_A_ROW:]]
        rate = _rate_at(history, last, p, loop)
        if p.dtype not in HALF_PRECISION_TYPES and rate != 0 and _rounds(history, last, column, rate):
            continue
        moved = numpy.flatnonzero(update[seen] != 0)
        if len(moved) and _stops_by_itself(name, loop):
            continue
        since = int(history.steps[rows[seen[moved[-1] + 1 if len(moved) else 0]]])
        cause = _cause(p, rate, bool(len(moved)), _came_down(history, loop))
        still.setdefault(cause, []).append(name)
        began[cause] = min(began.get(cause, since), since)
    for cause, names in still.items():
        yield _finding(cause, names, began[cause], len(names) == len(history.layers))


def _copies(loop: Loop) -> Iterator[LoopFinding]:
    """Copies that are to follow the network, and are still what it began with."""
    for copy in loop.copies if loop.step >= STEPS_OF_A_COPY and not loop.resumed else ():
        if copy.updates == 0 and not copy.changes:
            yield _copy_finding(
                f"An AveragedModel of this network was never updated in {counted(loop.step, 'step')}: its weights "
                "are those that it was made with.",
                "Call averaged.update_parameters(model) after optimizer.step(), before the average is used.",
                "An average that is meant to begin later.",
            )
        elif (
            copy.changes >= MOVED_ALL_ALONG * copy.looks and copy.changes >= STEPS_IN_A_ROW and copy.moved < BEHIND
        ):
            yield _copy_finding(
                f"A copy of this network follows it too slowly: after {counted(loop.step, 'step')} it has gone "
                f"{format_share(copy.moved)} of the way from the weights that training began with to those of now.",
                "Where this average (EMA) is evaluated or saved, lower its decay: averaging over n steps takes "
                "1 - 1 / n, with n a tenth of the training or less.",
                "A training that is meant to go on many times as long.",
            )


def _copy_finding(sentence: str, advice: str, refutation: str) -> LoopFinding:
    return LoopFinding(Level.WARNING, Cause.COPY_NOT_FOLLOWING, sentence, advice, refutation, step=1)


def _stops_by_itself(name: str, loop: Loop) -> bool:
    """Whether the parameter is moved by L-BFGS, which takes no step where the last one brought too little."""
    return any(o.kind == "LBFGS" and name in o.held for o in loop.training)


def _usual(gradient: Any) -> float:
    """The norm that is usual over the run, or was at its start: a run that converges ends far below both."""
    return float(max(numpy.median(gradient), numpy.median(gradient[:AT_THE_START])))


def _rate_at(history: History, last: Any, p: ParameterFacts, loop: Loop) -> float:
    """The parameter's learning rate at the steps `last`. What its group has now is that of a step to come where a
    schedule has set the rates of all groups to zero since."""
    at_steps = float(numpy.nan_to_num(history.learning_rate[last]).max())
    groups = [g for o in loop.training for g in o.groups]
    since = p.rate == 0 and all(g.get("lr") == 0 and g.get("initial_lr") != 0 for g in groups)
    return at_steps if p.rate is None or since else p.rate


def _cause(p: ParameterFacts, rate: float, moved: bool, came_down: bool) -> Cause:
    if p.rate is not None and rate == 0 and (moved or not came_down):
        return Cause.SCHEDULE_ENDED_EARLY if moved else Cause.LEARNING_RATE_ZERO
    return Cause.UPDATES_ROUND_TO_NOTHING if p.dtype in HALF_PRECISION_TYPES else Cause.WEIGHTS_UNCHANGED


def _came_down(history: History, loop: Loop) -> bool:
    """Whether a learning rate of zero may be the end of a schedule, above which it was before: then it is no reason
    for weights that never moved."""
    rates = history.learning_rate[numpy.isfinite(history.learning_rate)]
    if len(rates) and not rates.any():
        return False
    stopped = [g for o in loop.training for g in o.groups if g.get("lr") == 0]
    if any("initial_lr" in g for g in stopped):  # a scheduler holds them
        return all(g.get("initial_lr") != 0 for g in stopped)
    return bool(len(rates) and rates[-1] == 0 and rates.max() > 0)


def _once_still(history: History, rows: Any) -> Iterator[tuple[int, Any, Any]]:
    """The layers that some step left as they were: column, norms of the steps in `rows`, norms of the gradients."""
    still = [(part.update_norm == 0).any(0) for part in parts(history)]
    columns = numpy.flatnonzero(numpy.logical_or.reduce(still))
    width = 1 + CELLS // max(1, len(rows))
    for some in (columns[i : i + width] for i in range(0, len(columns), width)):
        update, gradient = (
            numpy.concatenate([getattr(part, name)[:, some] for part in parts(history)])[rows]
            for name in ("update_norm", "gradient_norm")
        )
        yield from zip(some.tolist(), update.T, gradient.T, strict=True)


def _rounds(history: History, last: Any, column: int, rate: float) -> bool:
    """Whether the learning rate times the gradient is below what float32 keeps of the parameter: a bias in front
    of a normalisation has such a gradient, made of rounding. So may the learning rate itself be, for each entry,
    which is Adam's step whatever the gradient is."""
    step, size = rate * history.gradient_norm[last, column], numpy.nan_to_num(history.parameter_norm[last, column])
    step = numpy.minimum(step, rate * numpy.sqrt(history.sizes[column]))
    return bool((step <= ROUNDING_OF_NORM * size).all())


def _finding(cause: Cause, names: list[str], since: int, everything: bool) -> LoopFinding:
    what = (
        "No parameter was" if everything else f"{parameters_named(names)} {'were' if len(names) > 1 else 'was'} not"
    )
    why, advice = WHY_NOTHING_MOVES[cause]
    return LoopFinding(
        Level.ALARM,
        cause,
        f"{what} changed by any step that was looked at since step {since:,}, though gradients are not zero: "
        f"{why}.",
        advice,
        "A parameter that differs before and after a step.",
        step=since,
        layers=tuple(names),
        explained_by=(Cause.CLIPPING_TOO_TIGHT,) if cause is Cause.WEIGHTS_UNCHANGED else (),
    )


WHY_NOTHING_MOVES = {
    Cause.UPDATES_ROUND_TO_NOTHING: (
        "the updates are smaller than the spacing of its half-precision numbers",
        "Keep the weights in float32 (autocast computes in half precision), or use stochastic rounding.",
    ),
    Cause.WEIGHTS_UNCHANGED: (
        "the learning rate was not zero either",
        "Look for an optimizer step that is replaced or masked, or for weights that are written back after it.",
    ),
    Cause.SCHEDULE_ENDED_EARLY: (
        "the learning rate has come down to zero",
        "Let the schedule last as long as the training: its number of steps must be that of all optimizer steps.",
    ),
    Cause.LEARNING_RATE_ZERO: (
        "their learning rate is zero",
        "Give the parameter group a learning rate, or freeze its parameters with requires_grad_(False).",
    ),
}
