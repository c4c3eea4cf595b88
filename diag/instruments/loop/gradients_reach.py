"""Does a gradient come to every parameter that the optimizer is to train?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.errors import counted, named
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import NO_STEP, SOURCE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import ParameterFacts
from diag.snapshot.parameters import layer_of

STEPS_IDLE = 5  # of an optimizer that holds frozen parameters only
LOOKS_CALLED, LOOKS_UNUSED = 3, 4  # in a row without a gradient: of a module that is called, of one that is not
MOST_FROZEN = 0.25  # of the layers; where more are frozen it is meant


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientsReach(LoopCheck):
    """Parameters to which no gradient comes, and layers frozen between trained ones."""


@instrument(
    source=SOURCE,
    title="Gradients reach the parameters",
    kind="check",
    before_training="always",
    why="A parameter that gets no gradient stays as it was initialised: a part of the network is random for good.",
)
def gradients_reach(loop: Loop) -> GradientsReach:
    """Whether backward() gives every trainable parameter of a stepping optimizer a gradient.

    A module without one is followed in one training call: if it ran, its output is cut off from the loss (detach,
    no_grad, .item(), argmax); if it did not, it is unused. Parts that are copies of trained parts (a teacher) are
    left out. Frozen layers are reported where they are few and lie between trained ones of their kind, and where an
    optimizer that steps holds nothing else.

    Raises nothing of its own.
    """
    about = {} if loop.training else {"preconditions": (NO_STEP,)}
    fine = f"Every trainable parameter got a gradient within {counted(loop.step, 'step')}."
    return judged(GradientsReach, loop.step, list(_findings(loop)) if loop.training else [], fine, **about)


def _findings(loop: Loop) -> Iterator[LoopFinding]:
    held = {name for o in loop.training for name in o.held}
    silent = [
        p
        for p in loop.parameters
        if p.trainable and not p.gradient and p.missing >= LOOKS_CALLED and p.name in held
    ]
    trained = [p for p in loop.parameters if p.gradient]
    silent = [p for p in silent if not is_copy(p.name, silent, trained)]
    if silent and not trained and not loop.backwards:
        yield _nothing(silent, loop)
    elif trained:  # else gradients come, and are zeroed before they are used
        yield from _parts(silent, loop)
    yield from _idle(loop)
    yield from _stopped(loop, held)
    yield from _frozen(loop)


def _nothing(silent: list[ParameterFacts], loop: Loop) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.GRAPH_CUT,
        f"No parameter gets a gradient: {counted(max(o.steps for o in loop.training), 'step')} changed nothing.",
        "Call backward() on the loss itself: torch.tensor(loss), .item(), .detach() and .data cut its graph.",
        "A gradient that is not None after backward().",
        step=1,
    )


def _parts(silent: list[ParameterFacts], loop: Loop) -> Iterator[LoopFinding]:
    # Of a module whose other parameters get gradients the output does reach the loss.
    reached = {layer_of(p.name) for p in loop.parameters if p.gradient}
    cut = [p for p in silent if p.called and layer_of(p.name) not in reached]
    single = [p for p in silent if p.called and layer_of(p.name) in reached and p.missing >= LOOKS_UNUSED]
    unused = [p for p in silent if p.called is False and (p.forgotten or p.missing >= LOOKS_UNUSED)]
    unknown = [p for p in silent if p.called is None and p.missing >= LOOKS_UNUSED]
    if cut:
        without = all(p.with_graph is False for p in cut)
        several = len({layer_of(p.name) for p in cut}) > 1
        run, them = ("run", "them") if several else ("runs", "it")
        reach = "their outputs do" if several else "its output does"
        how = f"{run} without a graph" if without else f"{run}, and {reach} not reach the loss"
        yield LoopFinding(
            Level.ALARM,
            Cause.GRAPH_CUT,
            f"{_layers(cut)} {how}, so no gradient has come to {them} in {counted(loop.step, 'step')}.",
            "Look for detach(), torch.no_grad(), .data, .item(), argmax or a rounding after them; freeze them with "
            "requires_grad_(False) if they are not to be trained.",
            "A gradient of these parameters that is not None after backward().",
            step=1 if _never(cut) else None,
            layers=tuple(p.name for p in cut),
        )
    if unused:
        yield _unchanged(unused, loop, Cause.MODULE_UNUSED, ("is", "are"), "not called in training")
    if unknown:
        yield _unchanged(unknown, loop, Cause.GRADIENT_ABSENT, ("gets", "get"), "no gradient")
    if single:
        how = "no gradient, while other parameters of the same module do"
        yield _unchanged(single, loop, Cause.GRADIENT_ABSENT, ("gets", "get"), how, whole_layers=False)


def _unchanged(
    parameters: list[ParameterFacts],
    loop: Loop,
    cause: Cause,
    verbs: tuple[str, str],
    how: str,
    *,
    whole_layers: bool = True,
) -> LoopFinding:
    names = tuple(p.name for p in parameters)
    whom = list(dict.fromkeys(map(layer_of, names) if whole_layers else names))
    verb, have, them = (verbs[1], "they have", "them") if len(whom) > 1 else (verbs[0], "it has", "it")
    return LoopFinding(
        Level.WARNING,
        cause,
        f"{named(whom)} {verb} {how}, so {have} not changed in {counted(loop.step, 'step')}.",
        f"Use {them} in forward(), or take {them} out of the model.",
        f"A gradient of {them} that is not None after backward().",
        step=1 if _never(parameters) else None,
        layers=names,
    )


def _never(parameters: list[ParameterFacts]) -> bool:
    """Whether they were there from the start and never had a gradient."""
    return not any(p.gradient or p.since or p.replaced for p in parameters)


def _layers(parameters: list[ParameterFacts]) -> str:
    return named(list(dict.fromkeys(layer_of(p.name) for p in parameters)))


def is_copy(name: str, silent: list[ParameterFacts], trained: list[ParameterFacts]) -> bool:
    """Whether the top-level part that `name` lies in has a trained part beside it with the same parameters inside:
    a teacher, a target network."""
    top, _, _ = name.partition(".")
    inside = {p.name.partition(".")[2]: p.shape for p in silent if p.name.partition(".")[0] == top}
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for p in trained:
        part, _, rest = p.name.partition(".")
        parts.setdefault(part, {})[rest] = p.shape
    return not top.isdigit() and any(
        part != top and not part.isdigit() and all(there.get(rest) == shape for rest, shape in inside.items())
        for part, there in parts.items()
    )


def _idle(loop: Loop) -> Iterator[LoopFinding]:
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


def _stopped(loop: Loop, held: set[str]) -> Iterator[LoopFinding]:
    """Layers that had gradients and are frozen since."""
    stopped = [p for p in loop.parameters if not p.trainable and p.since and p.gradient and p.name in held]
    if stopped:
        first = min(p.since for p in stopped)
        yield LoopFinding(
            Level.WARNING,
            Cause.PARAMETER_FROZEN,
            f"{_layers(stopped)} no longer train: requires_grad was set to False by step {first:,}.",
            "Set requires_grad_(True) again, if the freezing was meant for something else (a discriminator's turn, "
            "an evaluation).",
            "requires_grad of these parameters.",
            step=first,
            layers=tuple(p.name for p in stopped),
        )


def _frozen(loop: Loop) -> Iterator[LoopFinding]:
    """One layer, or few of many, that never trained and stand between trained layers of their kind."""
    weights = [p for p in loop.parameters if p.name.endswith("weight")]
    frozen = [i for i, p in enumerate(weights) if not p.trainable and not p.since]
    trained = [i for i, p in enumerate(weights) if p.trainable and p.gradient]
    if not frozen or not trained or len(frozen) > max(MOST_FROZEN * len(weights), 1):
        return
    between = [weights[i] for i in frozen if trained[0] < i < trained[-1]]
    between = [p for p in between if any(len(weights[i].shape) == len(p.shape) for i in trained)]
    if between:
        one = len({layer_of(p.name) for p in between}) == 1
        yield LoopFinding(
            Level.WARNING,
            Cause.PARAMETER_FROZEN,
            f"{_layers(between)} {'has' if one else 'have'} requires_grad=False and {'stands' if one else 'stand'} "
            f"between trained layers, so {'it keeps its' if one else 'they keep their'} first values.",
            "Set requires_grad_(True) there, unless that part is frozen on purpose.",
            "requires_grad of these parameters.",
            layers=tuple(p.name for p in between),
        )
