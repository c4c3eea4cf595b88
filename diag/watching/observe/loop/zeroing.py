"""What happens to gradients between steps, seen on a few parameters: reset, kept, discarded, used again.

Autograd adds to a gradient in place and the optimizer leaves it alone, so a gradient that is the same object at the
same version at the start of a backward pass as after the step before was not reset. A gradient that is None, or
that a call of `zero_grad` touched, was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diag.distributed.placement import own_part

GLANCED = 8  # numbers of each parameter

Mark = tuple[int, int] | None


def mark_of(p: Tensor) -> Mark:
    """The gradient's identity and version."""
    gradient = p.grad
    return None if gradient is None else (id(gradient), gradient._version)


class Watched:
    """One parameter whose gradient is followed.

    fresh: backward passes that its gradient has in it since it was last reset; unused: those of them that no step
    has used. reached: passes since the last step of an optimizer that holds it. kept: it was not reset since then.
    thrown: passes since then that were reset away unused.
    stepper: the optimizer that stepped on it last."""

    __slots__ = (
        "fresh",
        "kept",
        "mark",
        "parameter",
        "reached",
        "stepper",
        "thrown",
        "unused",
        "version",
        "zeros",
    )

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.mark: Mark = mark_of(parameter)
        self.fresh = self.unused = self.reached = self.thrown = self.stepper = 0
        self.version = parameter._version
        self.kept = False
        self.zeros: list[Any] = []  # whether suspicious gradients held any number but zero; read when asked for

    def begin(self) -> None:
        """Attention begins, after a time in which nothing was seen."""
        self.mark, self.version = mark_of(self.parameter), self.parameter._version
        self.kept, self.fresh, self.unused, self.reached, self.thrown = False, 0, 0, 0, 0
        self.stepper = 0

    def look(self, zeroing: bool = False) -> None:
        """A backward pass begins, or `zero_grad` was called: has the gradient been reset since the last look?"""
        mark = mark_of(self.parameter)
        if mark is not None and mark == self.mark:
            if self.kept and self.fresh and len(self.zeros) < 3:
                self._suspect()
            return
        if mark is None or zeroing:
            # Where the parameters were moved in between, as SAM does, the gradient was used.
            if self.parameter._version == self.version:
                self.thrown += self.unused
            self.fresh = self.unused = 0
        self.kept = False
        self.mark = mark

    def passed(self) -> bool:
        """A backward pass has ended: whether it reached the parameter."""
        mark = mark_of(self.parameter)
        if mark == self.mark:
            return False
        self.mark, self.version = mark, self.parameter._version
        self.fresh += 1
        self.unused += 1
        self.reached += 1
        return True

    def wasted(self) -> bool:
        """Whether a gradient has just been reset with which nothing had moved the parameter."""
        reset = mark_of(self.parameter) != self.mark
        return bool(self.fresh) and reset and self.parameter._version == self.version

    def assigned(self) -> bool:
        """Whether the gradient is another object than the one that the last backward pass left."""
        mark = mark_of(self.parameter)
        return mark is not None and (self.mark is None or mark[0] != self.mark[0])

    def stepped(self, optimizer: int) -> None:
        """An optimizer that holds it has stepped."""
        self.mark, self.version = mark_of(self.parameter), self.parameter._version
        self.kept, self.reached, self.thrown, self.unused = True, 0, 0, 0
        self.stepper = optimizer

    def _suspect(self) -> None:
        """It seems not to have been reset; `.data.zero_()` leaves no trace but the zeros."""
        gradient = self.parameter.grad
        if gradient is not None:
            values = own_part(gradient)
            values = values.coalesce().values() if values.is_sparse else values
            self.zeros.append(values.ne(0).any())

    def was_zero(self, wait: bool = False) -> bool:
        """Whether a gradient that seemed not to have been reset was zero; False where only the device knows it and
        it is not to be waited for."""
        return any(not bool(z) for z in self.zeros if wait or z.is_cpu)


class Gradients:
    """The parameters that are followed: a few of the model's, the first and last among them, and some of each
    optimizer's."""

    MOST = 24

    def __init__(self, parameters: Sequence[nn.Parameter], some: int = 6) -> None:
        chosen = spread([p for p in parameters if p.requires_grad], some)
        self.watched = [Watched(p) for p in chosen]
        self.by_id = {id(w.parameter): w for w in self.watched}

    def of(self, parameters: Sequence[nn.Parameter]) -> list[Watched]:
        """Those of `parameters` that are followed; where none is, some are from now on."""
        found = [self.by_id[id(p)] for p in parameters if id(p) in self.by_id]
        if not found and len(self.watched) < self.MOST:
            with_gradient = [p for p in parameters if p.grad is not None] or list(parameters)
            found = [Watched(p) for p in spread(with_gradient, 2)]
            self.watched += found
            self.by_id |= {id(w.parameter): w for w in found}
        return found

    def glance(self) -> list[Tensor]:
        """The first few numbers of each, to see by whether they have been moved, also where that leaves no mark."""
        with torch.no_grad():
            return [own_part(w.parameter).detach().reshape(-1)[:GLANCED].clone() for w in self.watched]

    def same(self, before: Sequence[Tensor]) -> bool:
        """Whether they still begin with these numbers."""
        now = self.glance()
        return len(now) == len(before) and all(torch.equal(a, b) for a, b in zip(now, before, strict=True))

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Stop following these."""
        out = {id(p) for p in parameters}
        self.watched = [w for w in self.watched if id(w.parameter) not in out]
        self.by_id = {id(w.parameter): w for w in self.watched}


def spread(parameters: Sequence[nn.Parameter], some: int) -> list[nn.Parameter]:
    """At most `some` of them, evenly spaced, the first and the last among them."""
    if len(parameters) <= some:
        return list(parameters)
    last = len(parameters) - 1
    return [parameters[round(i * last / (some - 1))] for i in range(some)]
