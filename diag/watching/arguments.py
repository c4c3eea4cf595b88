"""The arguments of a watch, checked at the door."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from diag.door import brought_to
from diag.errors import InvalidInput, type_of
from diag.ranges import Count, Threshold, WholeNumber
from diag.snapshot.batch import Batch
from diag.snapshot.reading.data import read_batches
from diag.snapshot.state.unmade import NO_VALUES, SCRIPTED
from diag.watching.measure.probe import Probe


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a watch was asked for (see `diag.watch`), each argument checked and brought into one form."""

    loss_fn: Callable[[Any, Any], Any] | None
    probe: Probe
    held_out: list[Batch] | None
    optimizer: Optimizer | None
    run: Path | None
    instruments: Mapping[str, Mapping[str, Any]]
    every: int | None
    budget: float
    resume: bool | int
    on_finding: Callable[[Any], object] | None = None


def checked_schedule(every: Any, budget: Any) -> tuple[int | None, float]:
    """Both as numbers; raises InvalidInput where they are none, or outside their ranges."""
    steps = brought_to(every, Count | None, f"every is {every!r}; expected a number of steps, 1 or more.")
    sentence = (
        f"budget is {budget!r}; expected a share of wall time from 0 to 1, such as 0.05, or math.inf to measure at "
        "every scheduled step."
    )
    share = brought_to(budget, Threshold, sentence)
    if 1 < share < math.inf:
        raise InvalidInput(sentence)
    return steps, share


def checked_record(run: Any, resume: Any) -> tuple[Path | None, bool | int]:
    """The folder of the record, and after which step of it to go on; raises InvalidInput where they are unfit."""
    if run is not None and not isinstance(run, (str, os.PathLike)):
        raise InvalidInput(f"run is {type_of(run)}; expected the path of a folder.")
    if run is not None and not os.fspath(run):
        raise InvalidInput("run is an empty text; expected the path of a folder.")
    sentence = f"resume is {resume!r}; expected True, False or the number of a step."
    after = brought_to(resume, WholeNumber | bool, sentence)
    if after is not False and run is None:
        raise InvalidInput(f"resume is {resume!r} and there is no run=; give the folder of the run that goes on.")
    return None if run is None else Path(os.path.abspath(run)), after  # the process may move to another folder


def check_callable(on_finding: Any) -> None:
    """Raise InvalidInput where it is no function."""
    if on_finding is not None and not callable(on_finding):
        raise InvalidInput(f"on_finding is {type_of(on_finding)}; expected a function of one finding.")


def watched_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name; raises InvalidInput where there is none, or one without a shape,
    and for TorchScript."""
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidInput(SCRIPTED.format("The model"))
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise InvalidInput("The model has no trainable parameter; set requires_grad on what should be watched.")
    for name, p in found.items():
        if torch.nn.parameter.is_lazy(p):
            raise InvalidInput(f"{name} has no shape yet; call the model once before it is watched.")
        if p.is_meta:
            raise InvalidInput(NO_VALUES.format(name))
    return found


def checked_optimizer(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> Optimizer | None:
    """The torch optimizer under whatever wraps it; raises InvalidInput where it does not train the parameters."""
    while optimizer is not None and not isinstance(optimizer, Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if optimizer is None:
        return None
    if not isinstance(optimizer, Optimizer):
        raise InvalidInput(f"optimizer is {type_of(optimizer)}; expected a torch.optim.Optimizer.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(id(p) for p in parameters.values()):
        raise InvalidInput("The optimizer holds no trainable parameter of the model; give the one that trains it.")
    return optimizer


def given_probe(model: nn.Module, probe: Any) -> Probe:
    """The user's probe set on the device of the model; an empty one, to be filled, where there is none."""
    result = Probe()
    if probe is not None:
        device = next(model.parameters()).device
        batches, _ = read_batches(probe, None, None, None, device, seed=0)
        result.batches = [batch.with_targets(model) for batch in batches]
        result.complete = True
    return result
