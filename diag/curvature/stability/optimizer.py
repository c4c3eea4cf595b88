"""How sharp a quadratic an optimizer can descend: the operator whose largest eigenvalue decides, and the threshold.

Near a point an optimizer's step is linear in the position, and along an eigenvector of curvature s the position
grows without bound where a root of its recurrence leaves the unit circle. With growing s that first happens at the
root -1, which gives a threshold in closed form. Source: Cohen et al. 2021, arXiv:2103.00065, appendix B; for Adam,
whose curvature is preconditioned, Cohen et al. 2022, arXiv:2207.14484, equation 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor

from diag.curvature.operators import CurvatureOperator
from diag.curvature.stability.preconditioner import divisor
from diag.errors import DiagError, Unsupported
from diag.linalg.operator import FunctionOperator, LinearOperator
from diag.snapshot.optimizer import OptimizerState

BIAS_CORRECTION_GONE = 0.05  # beta1^t below which Adam's bias correction no longer matters (our choice)

ParameterGroup = Mapping[str, Any]


@dataclass(frozen=True)
class LinearStability:
    """`operator`: its largest eigenvalue is to be compared with `threshold`, which `rule` writes out.

    learning_rate: the largest of the groups. unknown: why there is no threshold (which is then NaN), in a clause;
    the operator is then the Hessian itself. notes: what was taken into account.
    plain: whether the step is the gradient times one rate, without momentum.
    """

    operator: LinearOperator
    threshold: float = nan
    rule: str = ""
    learning_rate: float = nan
    unknown: str = ""
    notes: tuple[str, ...] = ()
    plain: bool = False


@dataclass(frozen=True)
class StabilityRule:
    """threshold(group) of one optimizer for its learning rate; `preconditioned` where it divides its steps."""

    text: str
    threshold: Callable[[ParameterGroup], float]
    preconditioned: bool = False
    plain: bool = False  # the step is the gradient times the rate


def linear_stability(hessian: LinearOperator, optimizer: OptimizerState) -> LinearStability:
    """What decides the linear stability of `optimizer` on the loss whose Hessian is given.

    Weight decay that is added to the gradient shifts the curvature by its amount. Learning rates that differ
    between groups scale it: x <- x - diag(eta) H x has the eigenvalues of diag(eta)^(1/2) H diag(eta)^(1/2).
    """
    groups = _groups(optimizer)
    rule, unknown = _rule(optimizer, groups)
    rate = max((group["lr"] for group in groups if "lr" in group), default=nan)
    if rule is None:
        return LinearStability(hessian, learning_rate=rate, unknown=unknown)
    reference = dict(groups[0]) | {"lr": rate, "weight_decay": max(g.get("weight_decay", 0) for g in groups)}
    try:
        operator, notes = _operator(hessian, optimizer, groups, rule, rate)
    except DiagError as error:
        return LinearStability(hessian, learning_rate=rate, unknown=str(error).rstrip("."))
    return LinearStability(operator, rule.threshold(reference), rule.text, rate, notes=notes, plain=rule.plain)


def _rule(optimizer: OptimizerState, groups: Sequence[ParameterGroup]) -> tuple[StabilityRule | None, str]:
    """The optimizer's rule, or why it has none."""
    kind = type(optimizer.torch_optimizer)
    find = STABILITY_RULES.get(kind)
    if find is None:
        return None, f"the threshold of {kind.__name__} is not known here (known: {', '.join(_known())})"
    if any(group.get("maximize") for group in groups):
        return None, "the optimizer maximises, and stability is known here for minimising alone"
    for name in ("momentum", "dampening", "nesterov", "betas", "decoupled_weight_decay"):
        if len({group.get(name) for group in groups}) > 1:
            return None, f"the parameter groups differ in {name}, and no one threshold holds for all"
    if not any(group["lr"] > 0 for group in groups):
        return None, "the learning rate is zero"
    steps = [float(s["step"]) for s in optimizer.torch_optimizer.state.values() if "step" in s]
    beta = groups[0].get("betas", (0.0,))[0]
    if steps and beta ** min(steps) > BIAS_CORRECTION_GONE:
        return None, f"after {min(steps):.0f} steps the bias correction still changes the step length"
    return find(groups[0]), ""


def _operator(
    hessian: LinearOperator,
    optimizer: OptimizerState,
    groups: Sequence[ParameterGroup],
    rule: StabilityRule,
    rate: float,
) -> tuple[LinearOperator, tuple[str, ...]]:
    """The Hessian with the weight decay added, in the optimizer's own coordinates."""
    notes = []
    decays = [0.0 if g.get("decoupled_weight_decay") else g.get("weight_decay", 0.0) for g in groups]
    rates = [group["lr"] / rate for group in groups]
    if isinstance(hessian, CurvatureOperator):
        _each(hessian, optimizer, decays)  # all parameters must be the optimizer's
    operator = hessian
    if len(set(decays)) > 1:
        added = _each(hessian, optimizer, decays)
        operator = hessian + FunctionOperator(added.mul, hessian.size, hessian.dtype, hessian.device)
    elif decays[0]:
        operator = hessian.shifted(decays[0])
    if any(decays):
        notes.append(f"The weight decay {' and '.join(f'{d:g}' for d in sorted(set(decays)))} is in the curvature.")
    scale = None
    if rule.preconditioned:
        if not isinstance(hessian, CurvatureOperator):
            raise _needs_model(f"{type(optimizer.torch_optimizer).__name__} divides each parameter's step")
        scale = divisor(hessian, optimizer.torch_optimizer).rsqrt()
    if len(set(rates)) > 1:
        roots = _each(hessian, optimizer, rates).sqrt()
        scale = roots if scale is None else scale * roots
        notes.append(f"The learning rates of the groups differ: curvature is scaled to the largest, {rate:g}.")
    return (operator if scale is None else operator.diagonally_scaled(scale)), tuple(notes)


def _each(hessian: LinearOperator, optimizer: OptimizerState, values: Sequence[float]) -> Tensor:
    """One value for each entry of the flat vectors (P,), from one for each parameter group."""
    if not isinstance(hessian, CurvatureOperator):
        raise _needs_model("The parameter groups differ")
    owner = {
        id(p): v for g, v in zip(optimizer.torch_optimizer.param_groups, values, strict=True) for p in g["params"]
    }
    named = dict(hessian.objective.model.named_parameters())
    foreign = [name for name in hessian.layout.names if id(named[name]) not in owner]
    if foreign:
        raise Unsupported(
            f"The optimizer does not hold parameter {foreign[0]}; give the one that trains this model."
        )
    pieces = [torch.full((named[name].numel(),), owner[id(named[name])]) for name in hessian.layout.names]
    return torch.cat(pieces).to(dtype=hessian.dtype, device=hessian.device)


def _needs_model(why: str) -> Unsupported:
    return Unsupported(f"{why}, which a bare matrix does not show; measure on a Snapshot with optimizer=.")


def _groups(optimizer: OptimizerState) -> list[dict[str, Any]]:
    raw = optimizer.torch_optimizer.param_groups
    extra = [{"decoupled_weight_decay": bool(g.get("decoupled_weight_decay", False))} for g in raw]
    return [dict(group) | more for group, more in zip(optimizer.groups, extra, strict=True)]


# The rules: s is the largest curvature that is stable at learning rate eta.


def _sgd(group: ParameterGroup) -> StabilityRule:
    if group.get("nesterov"):
        return StabilityRule(
            "(2 + 2 momentum) / ((1 + 2 momentum) learning rate)",
            lambda g: (2 + 2 * g["momentum"]) / ((1 + 2 * g["momentum"]) * g["lr"]),
        )
    if not group["momentum"]:
        return StabilityRule("2 / learning rate", lambda g: 2 / g["lr"], plain=True)
    if group["dampening"]:
        return StabilityRule(
            "(2 + 2 momentum) / ((1 - dampening) learning rate)",
            lambda g: (2 + 2 * g["momentum"]) / ((1 - g["dampening"]) * g["lr"]),
        )
    return StabilityRule("(2 + 2 momentum) / learning rate", lambda g: (2 + 2 * g["momentum"]) / g["lr"])


def _adam(group: ParameterGroup) -> StabilityRule:
    if group["decoupled_weight_decay"]:
        return StabilityRule(
            "(1 + beta1) / (1 - beta1) (2 / learning rate - weight decay)",
            lambda g: (1 + g["betas"][0]) / (1 - g["betas"][0]) * (2 / g["lr"] - g["weight_decay"]),
            preconditioned=True,
        )
    return StabilityRule(
        "(2 + 2 beta1) / ((1 - beta1) learning rate)",
        lambda g: (2 + 2 * g["betas"][0]) / ((1 - g["betas"][0]) * g["lr"]),
        preconditioned=True,
    )


def _rmsprop(group: ParameterGroup) -> StabilityRule:
    if group["momentum"]:
        return StabilityRule("(2 + 2 momentum) / learning rate", lambda g: (2 + 2 * g["momentum"]) / g["lr"], True)
    return StabilityRule("2 / learning rate", lambda g: 2 / g["lr"], True)


STABILITY_RULES: dict[type, Callable[[ParameterGroup], StabilityRule]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.RMSprop: _rmsprop,
}


def _known() -> list[str]:
    return [kind.__name__ for kind in STABILITY_RULES]
