"""Is chance where it belongs: new in each training batch, and none in an evaluation?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.errors import counted, layers_called
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, THRICE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level
from diag.snapshot.loop.facts import Loop

CLASSIFYING = ("cross_entropy", "nll_loss")


@dataclass(frozen=True, kw_only=True, eq=False)
class RepeatedChance(LoopCheck):
    """Random numbers that repeat in training, or that are drawn in an evaluation."""


@instrument(
    source=SOURCE,
    title="Chance in training and evaluation",
    kind="check",
    why="Chance that acts in an evaluation makes scores incomparable, and chance that repeats at every step "
    "is no regularisation.",
)
def repeated_chance(loop: Loop) -> RepeatedChance:
    """Whether dropout is off in evaluation, held-out rows stay the same, and training is not seeded at every step.

    Dropout in eval mode is told where random numbers are drawn in evaluation calls and the source of a module's
    forward calls dropout without its mode. Held-out rows are told where the first batch of an evaluation of a
    classifier has the labels of an earlier one and other inputs, and random numbers were drawn for them or the
    loader gave other ones.

    Raises nothing of its own.
    """
    fine = f"No seed was set again and again, in {counted(loop.step, 'step')}."
    return judged(RepeatedChance, loop.step, list(_findings(loop)), fine)


def _findings(loop: Loop) -> Iterator[LoopFinding]:
    c = loop.chance
    if c.drawn.times and c.always_dropping:
        yield LoopFinding(
            Level.ALARM,
            Cause.DROPOUT_ALWAYS_ON,
            f"Dropout acts in evaluation, too: {layers_called(c.always_dropping)} calls it without regard to the "
            f"mode, and random numbers are drawn in eval mode (before step {c.drawn.first:,}).",
            "Pass the mode, F.dropout(x, p, training=self.training), or use nn.Dropout as a module of its own.",
            "Two equal outputs for one input in eval mode.",
            step=c.drawn.first,
            layers=c.always_dropping,
        )
    classifier = any(f.function in CLASSIFYING for f in loop.losses)
    if classifier and c.differing.times:
        yield LoopFinding(
            Level.WARNING,
            Cause.AUGMENTATION_IN_EVALUATION,
            f"Held-out rows differ between evaluations: the first batch had the same labels and other inputs in "
            f"{c.differing.times + 1:,} evaluations.",
            "Give the held-out data its own transform, without what is random.",
            "Equal inputs for one held-out row in two evaluations.",
            step=c.differing.first,
        )
    if c.seeded.longest >= THRICE:
        same, times = loop.full_batch, c.seeded.times + 1
        follows = (
            "every step has seen the same batch: rows that are drawn at random are the same ones"
            if same
            else "what is drawn at random, as by dropout or augmentation, is the same in every batch"
        )
        yield LoopFinding(
            Level.WARNING,
            Cause.BATCH_REPEATED if same else Cause.AUGMENTATION_REPEATED,
            f"torch.manual_seed sets the same seed at every step, {times:,} times so far, and {follows}.",
            "Set the seed once, before the loop.",
            "Random numbers that differ between two steps.",
            step=c.seeded.first,
        )
