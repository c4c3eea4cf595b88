"""Is every parameter that gets a gradient in exactly one optimizer that steps?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.errors import counted, named
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, LoopCheck, LoopFinding, judged, parameters_named
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import ParameterFacts
from diag.snapshot.parameters import layer_of

LOOKS_UNHELD = 2  # at which a parameter had a gradient and no optimizer
STEPS_BEFORE_UNHELD = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class ParametersHeld(LoopCheck):
    """Parameters that no optimizer holds, or that are not the ones that it holds."""


@instrument(
    source=SOURCE,
    title="Parameters in the optimizers",
    kind="check",
    before_training="with optimizer",
    why="A parameter that no optimizer holds is never updated: a part of the network stays random.",
)
def parameters_held(loop: Loop) -> ParametersHeld:
    """Whether every trainable parameter that gets a gradient is in an optimizer that steps.

    Parameters without a gradient (a teacher, an unused head) are not counted. Where an optimizer holds tensors that
    are not the model's, get no gradient and have the shapes of the parameters left out, it was made for an earlier
    copy of them. A body that is left out as a whole, while the last layers are trained, may be meant.

    Raises nothing of its own.
    """
    steps = max((o.steps for o in loop.optimizers), default=0)
    seen = Precondition("an optimizer step", steps > 0, "no optimizer step was seen.")
    findings = list(_findings(loop, steps)) if steps else []
    return judged(ParametersHeld, loop.step, findings, _fine(loop), preconditions=(seen,))


def _fine(loop: Loop) -> str:
    reached = [p for p in loop.parameters if p.gradient]
    held = sum(p.optimizers > 0 for p in reached)
    if held == len(reached):
        return f"All {counted(held, 'parameter')} that got a gradient are in an optimizer that steps."
    return (
        f"Of {counted(len(reached), 'parameter')} that got a gradient {held:,} are in an optimizer that steps; "
        "that the others are in none may be meant, or is still to be seen."
    )


def _findings(loop: Loop, steps: int) -> Iterator[LoopFinding]:
    if loop.strangers:
        yield _unknown(loop)
    left_out = [p for p in loop.parameters if p.trainable and p.ungathered >= LOOKS_UNHELD]
    if not left_out:
        return
    stale = {name for o in loop.optimizers if o.steps for name in o.stale}
    if any(p.name in stale for p in left_out):
        yield _stale([p for p in left_out if p.name in stale], not loop.training)
    elif loop.training:
        yield _left_out(left_out, loop)
    elif steps >= STEPS_BEFORE_UNHELD:
        yield _foreign(left_out)


def _stale(left_out: list[ParameterFacts], all_of_it: bool) -> LoopFinding:
    names = [p.name for p in left_out]
    replaced = max((p.replaced for p in left_out), default=0)
    what = "the model's parameters" if all_of_it else named(names)
    since = f" since step {replaced:,}" if replaced else ""
    return LoopFinding(
        Level.ALARM,
        Cause.OPTIMIZER_HOLDS_STALE_PARAMETERS,
        f"The optimizer updates tensors that are not, or no longer, the model's: {what} get gradients and are in "
        f"no optimizer{since}, while it holds tensors of their shapes without gradients.",
        "Make the optimizer of this model's parameters, after the last change of its layers (or add the new ones: "
        "optimizer.add_param_group).",
        "The parameters' ids in optimizer.param_groups.",
        step=replaced or None,
        layers=tuple(names),
    )


def _left_out(left_out: list[ParameterFacts], loop: Loop) -> LoopFinding:
    names = [p.name for p in left_out]
    whole_body = is_body(names, [p.name for p in loop.parameters if p.trainable])
    share = sum(_size(p) for p in left_out) / max(sum(_size(p) for p in loop.parameters if p.trainable), 1)
    meant = (
        " If only the last layers are meant to train, set requires_grad_(False) on the rest." if whole_body else ""
    )
    held = "get gradients and no optimizer holds them, so they stay as they are"
    if len(names) == 1:
        held = "gets gradients and no optimizer holds it, so it stays as it is"
    return LoopFinding(
        Level.WARNING if whole_body else Level.ALARM,
        Cause.PARAMETER_IN_NO_OPTIMIZER,
        f"{parameters_named(names)} {held}: "
        f"{counted(len(names), 'parameter')}, {share:.1%} of the trainable numbers.",
        f"Give the optimizer all of model.parameters(), or freeze what is not to be trained.{meant}",
        "The parameters' ids in the param_groups of an optimizer that steps.",
        layers=tuple(names),
    )


def _unknown(loop: Loop) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.PARAMETER_IN_NO_OPTIMIZER,
        f"The model uses {counted(len(loop.strangers), 'parameter')} that it does not know and no optimizer holds, "
        f"so they stay as they are: of the shapes {named([str(shape) for shape in loop.strangers])}.",
        "Keep layers in nn.ModuleList, parameters in nn.ParameterList, not in a plain list or dict.",
        "The parameters in model.named_parameters().",
    )


def _foreign(left_out: list[ParameterFacts]) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.PARAMETER_IN_NO_OPTIMIZER,
        f"The optimizer that steps holds none of the model's parameters: {named([p.name for p in left_out])} get "
        "gradients and stay as they are.",
        "Make the optimizer from this model's parameters().",
        "The parameters' ids in optimizer.param_groups.",
        layers=tuple(p.name for p in left_out),
    )


def is_body(left_out: list[str], all_names: list[str]) -> bool:
    """Whether what is left out is all of the model but its last layer or layers (in the order of the model)."""
    layers = list(dict.fromkeys(layer_of(name) for name in all_names))
    out = {layer_of(name) for name in left_out}
    kept = [i for i, layer in enumerate(layers) if layer not in out]
    return bool(kept) and kept == list(range(kept[0], len(layers))) and len(kept) <= max(len(layers) // 2, 1)


def _size(p: ParameterFacts) -> int:
    size = 1
    for axis in p.shape:
        size *= axis
    return size
