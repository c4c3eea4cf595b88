"""Copies of the network in the same process (an average of its weights, a slow teacher): do they follow it?

They are searched once, after a few steps, among the instances of the model's own class and of AveragedModel. Some
numbers of each are kept at the steps at which everything is looked at, and compared when the watch closes.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from diag.distributed.placement import own_part
from diag.snapshot.loop.network import CopyFacts
from diag.watching.hooks.model_hook import instances_of
from diag.watching.observe.loop.zeroing import spread

MOST_COPIES = 4
PARAMETERS_OF_A_COPY, NUMBERS_OF_A_COPY = 8, 64  # that are compared, and of each
LOOKS_KEPT = 16


@dataclass
class _Copy:
    """One copy: itself, the average that it is the inside of, and what it held at each look."""

    module: weakref.ref[nn.Module]
    average: weakref.ref[AveragedModel] | None
    looks: list[Tensor] = field(default_factory=list)


class Copies:
    """Follows copies of `model`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._shapes = shapes_of(model)
        self._start = some_numbers(model)
        self._copies: list[_Copy] = []

    def search(self) -> None:
        """Look once for modules with parameters of the same names and shapes."""
        model = self._model()
        if model is None or not self._shapes:
            return
        inside = {id(m) for m in model.modules()}
        alike = (m for m in instances_of(type(model), exactly=True) if id(m) not in inside)
        same = [m for m in alike if shapes_of(m) == self._shapes]
        averages = {id(a.module): weakref.ref(a) for a in (instances_of(AveragedModel) if same else ())}
        self._copies = [_Copy(weakref.ref(m), averages.get(id(m))) for m in same[:MOST_COPIES]]
        self.look()

    def modules(self) -> list[nn.Module | None]:
        """The copies that were found, those that are gone as None."""
        return [copy.module() for copy in self._copies]

    def look(self) -> None:
        """Keep some numbers of each copy as it is now."""
        for copy in self._copies:
            module = copy.module()
            if module is not None and len(copy.looks) < LOOKS_KEPT:
                copy.looks.append(some_numbers(module))

    def facts(self, ended: bool) -> tuple[CopyFacts, ...]:
        """As plain data, once the watch closes: what is on a device is waited for."""
        model = self._model()
        if not ended or model is None:
            return ()
        self.look()
        now = some_numbers(model)
        told = (self._told(number, copy, now) for number, copy in enumerate(self._copies))
        return tuple(facts for facts in told if facts is not None)

    def _told(self, number: int, copy: _Copy, now: Tensor) -> CopyFacts | None:
        average = None if copy.average is None else copy.average()
        looks = [look for look in copy.looks if look.shape == self._start.shape == now.shape]
        if copy.module() is None or len(looks) < 2:
            return None
        way = float((now - self._start).double().norm())
        moved = float((looks[-1] - self._start).double().norm())
        changes = sum(not torch.equal(a, b) for a, b in itertools.pairwise(looks))
        updates = getattr(average, "n_averaged", None)
        return CopyFacts(
            kind="AveragedModel" if average is not None else "copy",
            updates=int(updates) if isinstance(updates, Tensor) else None,
            moved=moved / way if way else 0.0,
            changes=changes,
            looks=len(looks) - 1,
            number=number,
        )


def shapes_of(model: nn.Module) -> dict[str, Any]:
    """The shapes of its parameters by name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def some_numbers(model: nn.Module) -> Tensor:
    """Some entries of some parameters, in one row, where they are."""
    with torch.no_grad():
        chosen = [own_part(p).detach().reshape(-1) for p in spread(list(model.parameters()), PARAMETERS_OF_A_COPY)]
        parts = [p[:: max(len(p) // NUMBERS_OF_A_COPY, 1)][:NUMBERS_OF_A_COPY].float() for p in chosen]
        device = parts[0].device if parts else torch.device("cpu")
        return torch.cat([p.to(device) for p in parts]) if parts else torch.zeros(0)
