"""Games of two networks (GANs): whether they oppose each other, and whether the generator can get where it
should."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, THRICE, LoopCheck, LoopFinding, judged
from diag.ranges import Share, Times
from diag.registry import instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.games import GameLook

TIMES_AS_LARGE, LARGE = 100.0, 10.0  # the other rows, and their root mean square
NUMBERS_OUT_OF_REACH = 0.05  # share of numbers
FLAT_LOOKS, FLAT_SLOPE = 5, 1e-5  # in a row; over the largest slope seen


@dataclass(frozen=True, kw_only=True, eq=False)
class AdversarialLosses(LoopCheck):
    """Two networks that do not oppose each other as the sides of a game should."""


@instrument(
    source=SOURCE,
    title="Sides of a game",
    kind="check",
    why="The losses of two networks that train against each other do not show whether they do: each may fall, and "
    "neither says how good what is generated is.",
)
def adversarial_losses(
    loop: Loop, *, times: Times = TIMES_AS_LARGE, out_of_reach: Share = NUMBERS_OUT_OF_REACH
) -> AdversarialLosses:
    """Whether a generator and the network that judges its rows train against each other.

    loop: the facts of the loop, with what either asks of the judge's output. Findings, each at all of at least
    three looks at which generated rows could be told from the others: the generator asks for the very answer that
    the judge learns for rows like these; the judge is asked for one answer on all rows; the other rows are more
    than `times` as large as generated ones, and large; more than `out_of_reach` of their numbers lie beyond what
    the generator's last function can give.
    Besides: all generated rows are one at each of three looks or more; the generator's optimizer holds the judge,
    too; at five looks in a row the generator's loss is flat.
    Raises nothing of its own.
    """
    looks = loop.games.looks
    known = Precondition("a game", len(looks) > 0, "no two networks that train against each other were seen.")
    opposed = sum(look.asked_for != look.alike for look in looks if look.alike and look.asked_for)
    fine = f"The two sides were seen to oppose each other at {opposed:,} of {len(looks):,} rounds looked at."
    findings = list(_findings(loop, times, out_of_reach))
    return judged(AdversarialLosses, loop.step, findings, fine, preconditions=(known,))


def _findings(loop: Loop, times: float, out_of_reach: float) -> Iterator[LoopFinding]:
    told = [look for look in loop.games.looks if look.alike and look.asked_for]
    if len(told) >= THRICE and all(look.alike == look.asked_for for look in told):
        yield _cooperate(told)
        return
    if len(loop.games.looks) >= THRICE and all(look.one_row for look in loop.games.looks):
        yield _one_row(loop.games.looks)
    same = [look for look in loop.games.looks if look.one_answer]
    if len(same) >= THRICE and not told:
        yield _one_answer(same)
        return
    if len(told) < THRICE:
        yield from _flat(loop.games.looks)
        return
    opposed = all(look.alike != look.asked_for for look in told)
    shared = _shared(loop)
    if opposed and shared:
        yield _one_step_for_both(told, shared)
    if all(look.others > max(LARGE, times * look.generated) for look in told[:THRICE]):
        yield _other_scale(told)
    if all(look.outside > out_of_reach for look in told):
        yield _beyond_reach(told)
    yield from _flat(loop.games.looks)


def _one_answer(same: list[GameLook]) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.NETWORKS_COOPERATE,
        "The discriminator is asked for one answer whatever it sees: at all "
        f"{len(same):,} rounds at which the two kinds of rows could be told apart its loss moves its output in the "
        "same direction on generated rows and on the others, so that it learns nothing of the difference.",
        "Give generated rows one label and the data the other one in the discriminator's step.",
        "Two directions in which the discriminator's loss moves its outputs.",
        step=same[0].step,
    )


def _shared(loop: Loop) -> int:
    """How many of the judge's parameters the generator's optimizer holds, where the judge has one of its own."""
    judge, generator = set(loop.games.judge), set(loop.games.generator)
    held = [set(o.held) for o in loop.optimizers if o.steps and not o.nested]
    own = any(h & judge and not h & generator for h in held)
    return max((len(h & judge) for h in held if h & generator), default=0) if own else 0


def _cooperate(told: list[GameLook]) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.NETWORKS_COOPERATE,
        "The generator is asked for the very answer that the discriminator learns to give to generated data: at "
        f"all {len(told):,} rounds at which the two kinds of rows could be told apart both losses move the "
        "discriminator's output on them in the same direction, so that nothing makes what is generated like the "
        "data.",
        "Give generated rows one label in the discriminator's step and the other label in the generator's.",
        "A generator's loss that moves the output on its rows against the discriminator's.",
        step=told[0].step,
    )


def _one_step_for_both(told: list[GameLook], shared: int) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.PARAMETER_IN_TWO_OPTIMIZERS,
        "The generator's step moves the discriminator, too: the optimizer that holds the generator holds "
        f"{shared:,} of the discriminator's parameters, which have an optimizer of their own, and on generated "
        "rows the two losses want opposite answers of it.",
        "Give each optimizer the parameters of its own network: generator.parameters() and "
        "discriminator.parameters().",
        "An optimizer of the generator that holds nothing of the discriminator.",
        step=told[0].step,
    )


def _other_scale(told: list[GameLook]) -> LoopFinding:
    first = told[0]
    return LoopFinding(
        Level.WARNING,
        Cause.INPUTS_NOT_NORMALIZED,
        f"The data are far larger than what the generator makes: their root mean squares are "
        f"{format_number(first.others)} and {format_number(first.generated)} at step {first.step:,}, so that it "
        "must grow that far before the discriminator has anything else to tell the two apart by.",
        "Bring the data to unit scale, or to the range of the generator's last function.",
        "Data of unit scale do no better.",
        step=first.step,
        confidence=Confidence.WEAK_EMPIRICAL,
        threshold_source=OUR_CHOICE,
    )


def _beyond_reach(told: list[GameLook]) -> LoopFinding:
    last = told[-1]
    return LoopFinding(
        Level.WARNING,
        Cause.OUTPUT_RANGE,
        f"The generator cannot reach the data: it ends in {last.bounded}, and {format_share(last.outside)} of the "
        f"data's numbers at step {last.step:,} lie beyond what that can give.",
        f"Bring the data into the range of {last.bounded}, or end the generator in a linear layer.",
        "Data that lie within that range.",
        step=told[0].step,
        threshold_source=OUR_CHOICE,
    )


def _one_row(looks: tuple[GameLook, ...]) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.MODE_COLLAPSE,
        f"The generator makes one row: at each of {len(looks):,} rounds from step {looks[0].step:,} on all rows of "
        "its batch were the same but for rounding. Its input is the same for all of them, or does not come "
        "through.",
        "Give it fresh noise for each row and each step, torch.randn(rows, size), and look at what becomes of it "
        "in the first layers.",
        "Generated rows of one batch that differ.",
        step=looks[0].step,
    )


def _flat(looks: tuple[GameLook, ...]) -> Iterator[LoopFinding]:
    """A generator's loss without slope at several looks in a row, where it has had one."""
    steepest, run = max((look.slope for look in looks), default=0.0), list[GameLook]()
    for look in looks:
        run = [*run, look] if 0 < look.slope < FLAT_SLOPE * steepest else []
        if len(run) == FLAT_LOOKS:
            yield LoopFinding(
                Level.WARNING,
                Cause.LOSS_FLAT,
                "The generator's loss is flat where the discriminator puts its rows, so that it learns next to "
                f"nothing: from step {run[0].step:,} to step {look.step:,} the slope at the discriminator's output "
                f"was {format_number(look.slope)} or thereabouts, and {format_number(steepest)} at the steepest.",
                "Where the loss is log(1 - D(G(z))), use -log D(G(z)), which does not saturate, and train the "
                "discriminator less. Where it is that already, the discriminator takes generated rows for data: "
                "look at the labels of its own step.",
                "A generator that gets better at such a slope.",
                step=run[0].step,
                threshold_source=OUR_CHOICE,
            )
            return
