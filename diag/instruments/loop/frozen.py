"""Layers that are not trained: frozen since some step, between trained ones, or with the numbers they were drawn
with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from diag.errors import counted, named
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import LoopFinding, parameters_named
from diag.result import Level
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import ZEROS, ParameterFacts
from diag.snapshot.parameters import layer_of

STEPS_IDLE = 5  # of an optimizer that holds frozen parameters only
MOST_FROZEN = 0.25  # of the layers; where more are frozen it is meant


def idle(loop: Loop) -> Iterator[LoopFinding]:
    """Optimizers that step and hold nothing that may be trained."""
    trainable = {p.name for p in loop.parameters if p.trainable or p.since or p.gradient}
    for o in loop.training:
        if o.steps >= STEPS_IDLE and not o.foreign and not trainable & set(o.held):
            yield LoopFinding(
                Level.ALARM,
                Cause.PARAMETER_FROZEN,
                f"{o.kind} trains nothing: all {counted(len(o.held), 'parameter')} that it holds "
                f"({named(o.held)}) have requires_grad=False, so its {counted(o.steps, 'step')} changed nothing.",
                "Set requires_grad_(True) there, or leave this optimizer out.",
                "requires_grad of these parameters.",
                step=1,
                layers=o.held,
            )


def stopped(loop: Loop, held: set[str]) -> Iterator[LoopFinding]:
    """Layers that had gradients and are frozen since."""
    stopped = [p for p in loop.parameters if not p.trainable and p.since and p.gradient and p.name in held]
    if stopped:
        first = min(p.since for p in stopped)
        yield LoopFinding(
            Level.WARNING,
            Cause.PARAMETER_FROZEN,
            f"{layers_named(stopped)} no longer train: requires_grad was set to False by step {first:,}.",
            "Set requires_grad_(True) again, if the freezing was meant for something else (a discriminator's turn, "
            "an evaluation).",
            "requires_grad of these parameters.",
            step=first,
            layers=tuple(p.name for p in stopped),
        )


def between(loop: Loop, told: set[str]) -> Iterator[LoopFinding]:
    """One layer, or few of many, that never trained and stand between trained layers of their kind; those that have
    been `told` are left out."""
    weights = [p for p in loop.parameters if p.name.endswith("weight")]
    frozen = [i for i, p in enumerate(weights) if not p.trainable and not p.since]
    trained = [i for i, p in enumerate(weights) if p.trainable and p.gradient]
    if not frozen or not trained or len(frozen) > max(MOST_FROZEN * len(weights), 1):
        return
    inside = [weights[i] for i in frozen if trained[0] < i < trained[-1]]
    inside = [
        p for p in inside if p.name not in told and any(len(weights[i].shape) == len(p.shape) for i in trained)
    ]
    if inside:
        one = len({layer_of(p.name) for p in inside}) == 1
        yield LoopFinding(
            Level.WARNING,
            Cause.PARAMETER_FROZEN,
            f"{layers_named(inside)} {'has' if one else 'have'} requires_grad=False and "
            f"{'stands' if one else 'stand'} between trained layers, so "
            f"{'it keeps its' if one else 'they keep their'} first values.",
            "Set requires_grad_(True) there, unless that part is frozen on purpose.",
            "requires_grad of these parameters.",
            layers=tuple(p.name for p in inside),
        )


def never_trained(loop: Loop) -> list[ParameterFacts]:
    """Weights of layers that run in training, that nothing trains, and that look as they were initialised."""
    return [p for p in loop.parameters if p.fresh and p.called and not p.gradient and not p.since]


def untrained(fresh: Sequence[ParameterFacts], loop: Loop) -> Iterator[LoopFinding]:
    """Those weights: drawn at random, or zero."""
    if not fresh or not loop.training:
        return
    zeros = [p for p in fresh if p.fresh == ZEROS]
    some = zeros or list(fresh)
    several = len({layer_of(p.name) for p in some}) > 1
    numbers = sum(_size(p) for p in some)
    what = "zero everywhere" if zeros else "as drawn at random by an initialisation"
    frozen = all(not p.trainable for p in some)
    how = "requires_grad is False" if frozen else "no gradient comes there and no optimizer holds them"
    yield LoopFinding(
        Level.WARNING,
        Cause.PARAMETER_FROZEN,
        f"{layers_named(some)} {'run' if several else 'runs'} in training with weights that are {what} and are not "
        f"trained ({how}): after {counted(loop.step, 'step')} {counted(numbers, 'number')} are still what they "
        "began with.",
        "Train them (requires_grad_(True), no torch.no_grad() around them, and give them to the optimizer), or "
        "load the trained weights that were meant: compare what load_state_dict(strict=True) says. Leave it where "
        "random features are meant.",
        "Weights there that differ from a new instance's in distribution, as trained ones do.",
        step=1,
        layers=tuple(p.name for p in some),
    )


def _size(p: ParameterFacts) -> int:
    return math.prod(p.shape)


def layers_named(parameters: Sequence[ParameterFacts]) -> str:
    """The layers that these parameters are in, each once, as a sentence begins with them; a parameter of the model
    itself goes by its own name."""
    names = list(dict.fromkeys(layer_of(p.name) for p in parameters))
    own = [layer_of(p.name) == p.name for p in parameters]
    if all(own):
        return parameters_named(names)
    return f"{'Layers and parameters' if any(own) else 'Layers' if len(names) > 1 else 'Layer'} {named(names)}"
