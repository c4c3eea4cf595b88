"""What the torch optimizer is and how it is set, and the update between two states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch import optim as torch_optim

from diag.errors import InvalidInput, MissingQuantity, type_of
from diag.snapshot.parameters import params, values_of
from diag.snapshot.snapshot import Snapshot

HYPERPARAMETERS = (
    "lr",
    "momentum",
    "dampening",
    "nesterov",
    "betas",
    "alpha",
    "eps",
    "weight_decay",
    "maximize",
    "initial_lr",  # what a scheduler began from
)


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer as data: its class name and, for each parameter group, its hyperparameters.

    `groups` holds plain numbers. `torch_optimizer` is the live object, for what needs its moments.
    """

    kind: str
    groups: tuple[dict[str, Any], ...]
    torch_optimizer: torch_optim.Optimizer

    @property
    def learning_rate(self) -> float | None:
        """The learning rate, None where the parameter groups differ in it."""
        rates = {group["lr"] for group in self.groups if "lr" in group}
        return rates.pop() if len(rates) == 1 else None


def described_optimizer(torch_optimizer: torch_optim.Optimizer) -> OptimizerState:
    """Read kind and hyperparameters from a torch optimizer."""
    groups = tuple(
        {k: _number(group[k]) for k in HYPERPARAMETERS if k in group} for group in torch_optimizer.param_groups
    )
    return OptimizerState(type(torch_optimizer).__name__, groups, torch_optimizer)


def optimizer(snapshot: Snapshot) -> OptimizerState:
    """The optimizer's kind and hyperparameters."""
    if snapshot.optimizer is None:
        raise MissingQuantity("the snapshot has no optimizer; give it optimizer=.")
    if not hasattr(snapshot.optimizer, "param_groups"):
        raise InvalidInput(f"optimizer is {type_of(snapshot.optimizer)}; expected a torch.optim.Optimizer.")
    return described_optimizer(snapshot.optimizer)


def update(snapshot: Snapshot) -> dict[str, Tensor]:
    """The parameters now minus those of the snapshot's `previous` state, by name."""
    before = values_of(snapshot, snapshot.previous, "previous")
    return {name: value - before[name] for name, value in params(snapshot).items()}


def _number(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_number(v) for v in value)
    return value.item() if isinstance(value, Tensor) else value
