"""The Hessian as an adaptive optimizer sees it: D^(-1/2) H D^(-1/2), with D read from the optimizer's state.

Adam divides its step by D = sqrt(v_hat) + eps; the stability of training at its learning rate is decided by the
eigenvalues of D^-1 H, which are those of the symmetric D^(-1/2) H D^(-1/2) (Cohen et al. 2022, arXiv:2207.14484).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diag.curvature.operators import CurvatureOperator
from diag.errors import InvalidInput, MissingQuantity, Unsupported
from diag.linalg.operator import LinearOperator

OptimizerTensors = Mapping[str, Any]


def preconditioned(operator: CurvatureOperator, optimizer: torch.optim.Optimizer) -> LinearOperator:
    """D^(-1/2) A D^(-1/2), with D the optimizer's per-parameter divisor; A itself for SGD, which has none.

    Raises what `divisor` raises.
    """
    scale = divisor(operator, optimizer).rsqrt()
    return operator if bool((scale == 1).all()) else operator.diagonally_scaled(scale)


def divisor(operator: CurvatureOperator, optimizer: torch.optim.Optimizer) -> Tensor:
    """D, shape (P,): what the optimizer divides its step by; infinite where it has never updated.

    Raises Unsupported for an optimizer without a known D, MissingQuantity before its first step, and
    InvalidInput where it does not hold the operator's parameters.
    """
    kind = type(optimizer).__name__
    if kind not in DIVISORS:
        raise Unsupported(
            f"The optimizer is {kind}, whose divisor is not known here; expected one of {', '.join(DIVISORS)}."
        )
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named = dict(operator.objective.model.named_parameters())
    pieces = []
    for name in operator.layout.names:
        parameter = named[name]
        if id(parameter) not in groups:
            raise InvalidInput(
                f"The optimizer does not hold parameter {name}; give the optimizer that trains this model."
            )
        state = optimizer.state.get(parameter, {})
        piece = DIVISORS[kind](state, groups[id(parameter)], parameter)
        pieces.append(piece.reshape(-1).to(operator.dtype))
    flat = torch.cat(pieces)
    if torch.isinf(flat).all():
        raise MissingQuantity(f"The {kind} optimizer has no state yet; take at least one step with it.")
    return flat


def _none(state: OptimizerTensors, group: OptimizerTensors, parameter: Tensor) -> Tensor:
    return torch.ones_like(parameter)


def _adam(state: OptimizerTensors, group: OptimizerTensors, parameter: Tensor) -> Tensor:
    if "exp_avg_sq" not in state:
        return torch.full_like(parameter, torch.inf)
    correction = 1 - float(group["betas"][1]) ** float(state["step"])
    second_moment = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    return (second_moment / correction).sqrt() + group["eps"]


def _rmsprop(state: OptimizerTensors, group: OptimizerTensors, parameter: Tensor) -> Tensor:
    if "square_avg" not in state:
        return torch.full_like(parameter, torch.inf)
    variance = state["square_avg"] - state["grad_avg"] ** 2 if group["centered"] else state["square_avg"]
    return variance.sqrt() + group["eps"]


def _adagrad(state: OptimizerTensors, group: OptimizerTensors, parameter: Tensor) -> Tensor:
    # Adagrad makes its state before the first step, so a step count tells whether it has moved.
    if not float(state.get("step", 0)):
        return torch.full_like(parameter, torch.inf)
    return state["sum"].sqrt() + group["eps"]


def _adamax(state: OptimizerTensors, group: OptimizerTensors, parameter: Tensor) -> Tensor:
    return state["exp_inf"].clone() if "exp_inf" in state else torch.full_like(parameter, torch.inf)


DIVISORS: dict[str, Callable[[OptimizerTensors, OptimizerTensors, Tensor], Tensor]] = {
    "SGD": _none,
    "Adam": _adam,
    "AdamW": _adam,
    "NAdam": _adam,
    "RMSprop": _rmsprop,
    "Adagrad": _adagrad,
    "Adamax": _adamax,
}
