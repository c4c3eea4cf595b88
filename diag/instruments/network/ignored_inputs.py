"""Inputs that a model is given and does not use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from diag.errors import named
from diag.instruments.causes import Cause
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.history import History
from diag.snapshot.inside.ignored import InputsTried

SOURCE = "arithmetic of a few forward passes"
STEPS_BEFORE_INPUTS = 30  # steps: paths that start at zero (gates, adapters) open in the first ones

MOST_USED = 0.5  # of the positions
NOT_THE_INPUT = (
    Cause.UNITS_DEAD, Cause.OUTPUT_CONSTANT, Cause.INPUTS_CONSTANT, Cause.NOT_FINITE, Cause.LEARNING_RATE_TOO_HIGH,
    Cause.TRAINING_DIVERGED, Cause.INITIALIZATION_CONSTANT, Cause.PARAMETER_FROZEN,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class IgnoredInputs(Result):
    """On at most 16 examples of the probe set, in the mode of training."""

    tried: tuple[str, ...] = measured("inputs that differ between examples")
    ignored: tuple[str, ...] = measured("those of them with which no output moves")
    examples: int = measured("examples whose inputs were exchanged")
    partly: str = measured("an input most of whose positions move no output", remark="empty: none", default="")
    positions: int = measured("positions of it at which examples differ", default=0)
    used: tuple[int, ...] = measured("those of them that move an output, from 0", default=())

    def _counting(self) -> str:
        by_place = not all(name.isidentifier() for name in self.ignored)
        return " (the inputs of the call are counted from 1)" if by_place else ""

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        if not self.ignored and self.partly:
            return self._in_part()
        if not self.ignored:
            return Verdict(
                Level.OK,
                f"The outputs depend on each of the {len(self.tried):,} inputs that differ between examples.",
                source=SOURCE,
                confidence=Confidence.ARITHMETIC,
            )
        return Verdict(
            Level.WARNING,
            f"The model is given {named(self.ignored)} and does not use "
            f"{'them' if len(self.ignored) > 1 else 'it'}: when {self.examples:,} examples exchange these values, "
            f"no output changes in a single bit{self._counting()}.",
            advice="Look for an input that is overwritten, multiplied by zero or left out on its way; take it out "
            "of the call where it is not meant to count.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="An output that moves when this input alone is changed.",
            cause=Cause.INPUT_IGNORED,
            explained_by=NOT_THE_INPUT,
            step=1,
        )

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """What was found last: an input that was used at first is one that something has cut off since."""
        verdict = series[-1][1].verdict()
        used = [step for step, found in series if found.tried and not found.ignored and not found.partly]
        return replace(verdict, step=used[-1] + 1) if used and verdict.level.is_finding else verdict

    def _in_part(self) -> Verdict:
        n = len(self.used)
        first, last = self.used[0], self.used[-1]
        which = f"one only (number {first + 1:,})" if n == 1 else f"at most {n:,} ({first + 1:,} to {last + 1:,})"
        return Verdict(
            Level.WARNING,
            f"Of the {self.positions:,} positions of {self.partly} the outputs depend on {which}: when "
            f"{self.examples:,} examples exchange what they hold at the others, no output changes in a single bit.",
            advice="Look at which position of a sequence goes on (the last output of a recurrent layer, the one of "
            "the class token), at masks, which may be inverted, and at slices.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            refutation="An output that moves when one of the other positions is changed.",
            cause=Cause.INPUT_IGNORED,
            explained_by=NOT_THE_INPUT,
            step=1,
        )

    def plot(self, ax: Any = None) -> Any:
        """Which inputs count."""
        ax.barh(list(self.tried) or ["no input"], [int(name not in self.ignored) for name in self.tried] or [0])
        ax.set(xlabel="an output moves (1) or not (0)", ylabel="input")


@instrument(
    source=SOURCE,
    title="Ignored inputs",
    kind=Kind.CHECK,
    why="What is given to a network and lost on the way cannot be learned from, and the rest may be learned well.",
)
def ignored_inputs(inputs_tried: InputsTried, history: History) -> IgnoredInputs:
    """Whether the outputs depend on each of the inputs, where a model takes several; `diag.input_used` asks before
    training whether they depend on the input at all.

    inputs_tried: which outputs stayed as they were, bit for bit, when examples exchanged the values of one input
    (`diag.snapshot.inside.ignored`). history: how many steps were taken; judged from step 30 on. An input that
    moves nothing is a warning: some are given on purpose (numbers of rows, lengths). So is a sequence of which half
    of the positions or more move nothing. Raises nothing of its own.
    """
    part = next((p for p in inputs_tried.positions if 0 < len(p.used) <= MOST_USED * p.varying), None)
    late = int(history.total_steps) >= STEPS_BEFORE_INPUTS
    return IgnoredInputs(
        tried=inputs_tried.names,
        ignored=inputs_tried.ignored,
        examples=inputs_tried.rows,
        partly=part.name if part else "",
        positions=part.varying if part else 0,
        used=part.used if part else (),
        preconditions=(
            Precondition("steps", late, f"fewer than {STEPS_BEFORE_INPUTS} steps were taken."),
            Precondition(
                "outputs that move",
                len(inputs_tried.ignored) < len(inputs_tried.names),
                "no output moves with any input: it is constant.",
            ),
        ),
    )
