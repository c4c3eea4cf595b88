"""Are the tokens that a language model is asked for the next ones?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.facts import Loop

BATCHES_ALIGNED, ONE_AHEAD = 2, 1


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTargets(LoopCheck):
    """Targets that are tokens of the input, at another place than the next."""


@instrument(
    source=SOURCE,
    title="Targets of tokens",
    kind="check",
    why="A model whose targets are the tokens that it reads learns to copy, and one whose targets are two "
    "ahead learns another task; the loss curve looks fine in both.",
)
def token_targets(loop: Loop) -> TokenTargets:
    """Which of the input's tokens the targets are, where the model reads sequences of tokens.

    The targets of the first losses are compared with the inputs of the call before, position by position. Where all
    of them are the token one place on, the next one is asked for. Where all are the token at the same place, the
    answer stands in the input, as is meant in an autoencoder only; where they are some other number of places on,
    they are shifted. Where each row of targets is the next tokens of another row, their order was changed alone, an
    alarm. Targets that are not tokens of the input are not judged.

    Raises nothing of its own.
    """
    t = loop.targets
    seen = bool(t.shifts) or t.exchanged >= BATCHES_ALIGNED
    known = Precondition("tokens", seen, "the targets are not tokens of the model's input.")
    ahead, compared = t.shifts.get(ONE_AHEAD, 0), sum(t.shifts.values())
    fine = f"Targets were the token after the one at their place in {ahead:,} of {compared:,} batches of tokens."
    findings = list(_findings(loop)) if t.shifts else [_exchanged(loop)] if seen else []
    return judged(TokenTargets, loop.step, findings, fine, preconditions=(known,))


def _exchanged(loop: Loop) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.LABELS_SHUFFLED,
        f"Each row of targets is the next tokens of another row of the input, in {loop.targets.exchanged:,} of the "
        f"{loop.targets.aligned:,} batches that were compared: targets and inputs are not in the same order.",
        "Take inputs and targets from the same rows, and shuffle both with one order or neither.",
        "Rows whose targets are their own next tokens.",
        step=1,
    )


def _findings(loop: Loop) -> Iterator[LoopFinding]:
    t = loop.targets
    if ONE_AHEAD in t.shifts or sum(t.shifts.values()) < BATCHES_ALIGNED:
        return
    shift = max(t.shifts, key=lambda s: t.shifts[s])
    if shift == 0:
        yield LoopFinding(
            Level.WARNING,
            Cause.ANSWER_IN_INPUT,
            f"Each target is the token that the model is given at the same place, in the {t.aligned:,} batches "
            "that were compared: the answer can be copied from the input.",
            "Shift the targets by one: model(tokens[:, :-1]) is asked for tokens[:, 1:].",
            "An autoencoder, which is meant to give back its input.",
            step=1,
        )
        return
    where = f"{abs(shift)} places {'on' if shift > 0 else 'back'}" if abs(shift) > 1 else "one place back"
    yield LoopFinding(
        Level.WARNING,
        Cause.TARGETS_SHIFTED,
        f"Each target is the token {where} in the input, not the next one.",
        "Take inputs and targets from one window: tokens[:, :-1] and tokens[:, 1:].",
        f"A model that is meant to tell the token {where}.",
        step=1,
    )
