"""Fitting one batch on a copy of the model, within a bounded number of steps and seconds."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from diag.errors import InvalidInput, first_line
from diag.snapshot.batch import Batch
from diag.snapshot.example_losses import LossFunction
from diag.snapshot.external.trial import Attempt

FITTED = 0.02  # of the first loss: there is no more to see


def twin_of(model: nn.Module, optimizer: Optimizer | None) -> tuple[nn.Module, Optimizer | None]:
    """A copy of the model, and one of the optimizer that holds the copy's parameters.

    Raises InvalidInput where they cannot be copied.
    """
    try:
        known: dict[int, Any] = {}  # so that the copied optimizer holds the copied parameters
        twin = copy.deepcopy(model, known)
        held = None if optimizer is None else _with_all(copy.deepcopy(optimizer, known), optimizer, known)
    except Exception as error:
        raise InvalidInput(
            f"{type(model).__name__} and its optimizer cannot be copied ({first_line(error)}), and preflight "
            "trains a copy; give a freshly built model that has not been called yet."
        ) from None
    return twin, held


def _with_all(twin: Optimizer, original: Optimizer, known: dict[int, Any]) -> Optimizer:
    """A copied optimizer with what copying leaves out (the parameter list of LBFGS), and without what refers to the
    original: the wrapper that a schedule puts around its step."""
    for name in vars(original).keys() - vars(twin).keys() - {"step"}:
        setattr(twin, name, {} if name.endswith("_hooks") else copy.deepcopy(vars(original)[name], known))
    twin.__dict__.pop("step", None)
    return twin


def fit(
    model: nn.Module,
    batch: Batch,
    batch_loss: LossFunction,
    optimizer: Optimizer,
    name: str,
    steps: int,
    seconds: float,
) -> Attempt:
    """Train `model` on `batch` until its loss is nearly zero, or `steps` or `seconds` are used up."""
    began, losses, stopped = time.perf_counter(), [], ""
    model.train()
    for _ in range(steps):
        loss = _loss(model, batch, batch_loss)
        losses.append(float(loss.detach()))
        if not loss.requires_grad:
            stopped = "the loss does not depend on the parameters"
        elif not math.isfinite(losses[-1]):
            stopped = "the loss is not finite"
        elif 0 <= losses[-1] <= FITTED * losses[0]:
            stopped = "it was fitted"
        elif time.perf_counter() - began > seconds:
            stopped = "the time was up"
        if stopped:
            break
        _step(model, batch, batch_loss, optimizer, loss)
    with torch.no_grad():
        return Attempt(name, tuple(losses), float(_loss(model, batch, batch_loss)), stopped)


def _loss(model: nn.Module, batch: Batch, batch_loss: LossFunction) -> Tensor:
    return batch_loss(batch.forward(model), batch.targets)


def _step(model: nn.Module, batch: Batch, batch_loss: LossFunction, optimizer: Optimizer, loss: Tensor) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        again = _loss(model, batch, batch_loss)
        again.backward()
        return again

    optimizer.zero_grad()
    loss.backward()
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        optimizer.step()
