"""Does a gradient come to every parameter that the optimizer is to train?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.errors import counted
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import NO_STEP, SOURCE, LoopCheck, LoopFinding, judged, parameters_named
from diag.instruments.loop.frozen import between, idle, layers_named, never_trained, stopped, untrained
from diag.registry import instrument
from diag.result import Level
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import ParameterFacts
from diag.snapshot.parameters import layer_of

LOOKS_CALLED, LOOKS_UNUSED = 3, 4  # in a row without a gradient: of a module that is called, of one that is not


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
    left out. Frozen layers are reported where they are few and lie between trained ones of their kind, where an
    optimizer that steps holds nothing else, and where their numbers are still those of an initialisation: a body
    that is frozen on purpose has been trained before.

    Raises nothing of its own.
    """
    about = {} if loop.training else {"preconditions": (NO_STEP,)}
    findings = list(_findings(loop)) if loop.training else []
    return judged(GradientsReach, loop.step, findings, _fine(loop), **about)


def _fine(loop: Loop) -> str:
    within = counted(loop.step, "step")
    trainable = [p for p in loop.parameters if p.trainable]
    reached = sum(p.gradient > 0 for p in trainable)
    if reached == len(trainable):
        return f"Every trainable parameter got a gradient within {within}."
    return (
        f"Of {counted(len(trainable), 'trainable parameter')} {reached:,} got a gradient within {within}; that the "
        "others get none may be meant, or is still to be seen."
    )


def _findings(loop: Loop) -> Iterator[LoopFinding]:
    held = {name for o in loop.training for name in o.held}
    silent = [
        p
        for p in loop.parameters
        if p.trainable and not p.gradient and p.missing >= LOOKS_CALLED and p.name in held
    ]
    trained = [p for p in loop.parameters if p.gradient]
    equal = {name for pair in loop.layers.start_equal for name in pair}
    started = None if loop.resumed else equal
    silent = [p for p in silent if not is_copy(p, silent, trained, started)]
    if silent and not trained and not loop.backwards:
        yield _nothing(silent, loop)
    elif trained and not any(o.lost.times for o in loop.training):  # else gradients that come are zeroed before use
        yield from _parts(silent, loop)
    yield from idle(loop)
    yield from stopped(loop, held)
    untouched = never_trained(loop)
    fresh = [p for p in untouched if not is_copy(p, untouched, trained, started)]
    yield from untrained(fresh, loop)
    yield from between(loop, {p.name for p in fresh})


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
    beside = [p for p in unknown if layer_of(p.name) in reached]
    unknown = [p for p in unknown if layer_of(p.name) not in reached]
    if cut:
        without = all(p.with_graph is False for p in cut)
        several = len({layer_of(p.name) for p in cut}) > 1
        run, them = ("run", "them") if several else ("runs", "it")
        reach = "their outputs do" if several else "its output does"
        how = f"{run} without a graph" if without else f"{run}, and {reach} not reach the loss"
        yield LoopFinding(
            Level.ALARM,
            Cause.GRAPH_CUT,
            f"{layers_named(cut)} {how}, so no gradient has come to {them} in {counted(loop.step, 'step')}.",
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
    if single or beside:
        how = "no gradient, while other parameters of the same module do"
        yield _unchanged(single + beside, loop, Cause.GRADIENT_ABSENT, ("gets", "get"), how, whole_layers=False)


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
    weights_trained = any(p.gradient and not _is_vector(p) for p in loop.parameters)
    if cause == Cause.GRADIENT_ABSENT and weights_trained and all(map(_is_vector, parameters)):
        cause = Cause.VECTOR_UNTRAINED
    whom = list(dict.fromkeys(map(layer_of, names) if whole_layers else names))
    verb, have, them = (verbs[1], "they have", "them") if len(whom) > 1 else (verbs[0], "it has", "it")
    return LoopFinding(
        Level.WARNING,
        cause,
        f"{layers_named(parameters) if whole_layers else parameters_named(names)} {verb} {how}, so {have} "
        f"not changed in {counted(loop.step, 'step')}.",
        _what_to_do(them, all(p.called is None for p in parameters)),
        f"A gradient of {them} that is not None after backward().",
        step=1 if _never(parameters) else None,
        layers=names,
    )


def _what_to_do(them: str, unknown: bool) -> str:
    """unknown: whether they are used is not known, as of a part of the model that is called by itself."""
    use = f"use {them} in forward(), or take {them} out of the model."
    if not unknown:
        return use.capitalize()
    takes_part = "they take" if them == "them" else "it takes"
    return f"Where {takes_part} part, look for detach(), torch.no_grad() or an argmax behind {them}; else {use}"


def _is_vector(p: ParameterFacts) -> bool:
    """Whether all numbers of a parameter lie along one axis: a bias, a gain, a temperature."""
    return sum(length > 1 for length in p.shape) <= 1


def _never(parameters: list[ParameterFacts]) -> bool:
    """Whether they were there from the start and never had a gradient."""
    return not any(p.gradient or p.since or p.replaced for p in parameters)


def is_copy(
    p: ParameterFacts, silent: list[ParameterFacts], trained: list[ParameterFacts], equal: set[str] | None = None
) -> bool:
    """Whether the top-level part that `p` lies in has a trained part beside it with the same parameters inside: a
    teacher, a target network. Two heads of one size are no copies: what runs with a graph, as a copy need not, must
    have begun `equal` to the trained part, where the names of those that did are known."""
    top = p.name.partition(".")[0]
    inside = {q.name.partition(".")[2]: q.shape for q in silent if q.name.partition(".")[0] == top}
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for q in trained:
        part, _, rest = q.name.partition(".")
        parts.setdefault(part, {})[rest] = q.shape
    of_one_kind = not top.isdigit() and any(
        part != top and not part.isdigit() and all(there.get(rest) == shape for rest, shape in inside.items())
        for part, there in parts.items()
    )
    apart = equal is not None and not any(name.partition(".")[0] == top for name in equal)
    return of_one_kind and not (apart and p.with_graph is True)
