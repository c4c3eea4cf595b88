"""Parameters that the model's forward pass uses and that are not registered: layers kept in a plain list or dict.

They are found in the graph between the model's outputs and its inputs, at its first two training calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diag.snapshot.autograd_graph import nodes_before
from diag.snapshot.batch import tensors_in
from diag.watching.observe.loop.moment import Moment
from diag.watching.observe.loop.optimizers import Optimizers

CALLS_LOOKED_AT = 2
NODES_SEARCHED = 20_000
LOOKS_WITH_GRADIENT = 2  # at which they had a gradient and no optimizer


class Strangers:
    """Follows parameters that are in the graph and not in the model. `names`: of the model's, by id."""

    def __init__(self, names: Mapping[int, str], moment: Moment) -> None:
        self._names, self._moment = names, moment
        self._calls = self._looks = 0
        self._found: list[weakref.ref[nn.Parameter]] = []
        self._alone: tuple[tuple[int, ...], ...] = ()

    def training_call(self, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        """The model was called in training."""
        if self._calls >= CALLS_LOOKED_AT:
            return
        self._calls += 1
        ends = {id(t.grad_fn) for t in tensors_in((args, dict(kwargs))) if t.grad_fn is not None}
        starts = [t.grad_fn for t in tensors_in(outputs) if t.grad_fn is not None]
        known = {id(found()) for found in self._found}
        inputs = {id(t) for t in tensors_in((args, dict(kwargs)))}
        for leaf in leaves(starts, ends):
            if isinstance(leaf, nn.Parameter) and id(leaf) not in self._names and id(leaf) not in known | inputs:
                self._found.append(weakref.ref(leaf))

    def sweep(self, optimizers: Optimizers) -> None:
        """An optimizer is about to step: which of them have a gradient and no optimizer?"""
        if not self._found:
            return
        alive = [p for found in self._found if (p := found()) is not None and p.grad is not None]
        optimizers.search()
        held = {id(p) for r in optimizers.records if r.reference() is not None for p in (*r.held, *r.foreign)}
        alone = [p for p in alive if id(p) not in held and id(p) not in self._names]
        self._looks = self._looks + 1 if alone else 0
        self._alone = tuple(tuple(p.shape) for p in alone)
        if self._looks == LOOKS_WITH_GRADIENT:
            self._moment.news("strangers", "strangers")

    def facts(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of those that had a gradient and no optimizer at the last looks."""
        return self._alone if self._looks >= LOOKS_WITH_GRADIENT else ()


def leaves(starts: list[Any], ends: set[int]) -> list[Tensor]:
    """The leaf tensors of the graph from these nodes back, not beyond the nodes whose ids are `ends`."""
    nodes = nodes_before(starts, NODES_SEARCHED, lambda node: id(node) in ends)
    return [leaf for node in nodes if isinstance(leaf := getattr(node, "variable", None), Tensor)]
