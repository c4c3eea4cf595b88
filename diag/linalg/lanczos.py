"""Lanczos runs: extreme eigenpairs of a symmetric operator, with bounds, from as few products as possible.

    pairs = eigenpairs(operator, largest=10, tolerance=1e-3, seed=0)
    pairs.values, pairs.bounds

`run_lanczos` is the loop that everything shares: extend the space, look whether what is wanted has
converged, restart thick when the memory is full, write a checkpoint every few products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diag.errors import InvalidInput
from diag.linalg.krylov import KrylovSpace
from diag.linalg.operator import LinearOperator
from diag.linalg.reductions import combine, norm, normal
from diag.linalg.resume import Stateful, file_of, load_run, save_run
from diag.linalg.ritz import Ritz, StoppingRule, Which, ritz

CHECKPOINT_EVERY = 10  # products
DEFAULT_BASIS = 100  # vectors kept before a thick restart, where nothing else is said


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues with how far they can be trusted.

    `values` (k,) float64, descending (by magnitude where that was asked for); `vectors` (k, size), one unit
    eigenvector in each row (this process's part of it, where processes share the vectors: `operator.spread`), on
    the operator's device, or None when not asked for; `residuals` (k,), the norms
    |A v - value v|: each interval value +- residual holds an eigenvalue; `bounds` (k,), min(residual,
    residual^2 / gap) plus the rounding of the products; `converged` (k,) bool; `num_products`; `rounding`,
    the error of the products as seen by the run; `seed` of the start vector.
    """

    values: Tensor
    vectors: Tensor | None
    residuals: Tensor
    bounds: Tensor
    converged: Tensor
    num_products: int
    rounding: float
    seed: int

    def subset(self, rows: slice) -> Eigenpairs:
        """Some of the pairs."""
        return self._mapped(lambda name: getattr(self, name)[rows])

    def joined(self, other: Eigenpairs) -> Eigenpairs:
        """These pairs and then the other's, of the same run."""
        return self._mapped(lambda name: torch.cat([getattr(self, name), getattr(other, name)]))

    def _mapped(self, column: Callable[[str], Tensor]) -> Eigenpairs:
        return replace(
            self,
            values=column("values"),
            vectors=None if self.vectors is None else column("vectors"),
            residuals=column("residuals"),
            bounds=column("bounds"),
            converged=column("converged"),
        )


@dataclass(frozen=True)
class LanczosRun:
    """A finished run: its Ritz pairs, the space they live in, and the tridiagonal T of its first cycle
    (before any restart; bordered), which is the quadrature rule of the start vector."""

    space: KrylovSpace
    ritz: Ritz
    first_cycle: Tensor
    satisfied: bool
    num_products: int
    rounding: float
    file: Path | None = None  # where the run was kept


def eigenpairs(
    operator: LinearOperator,
    *,
    largest: int = 0,
    smallest: int = 0,
    magnitude: int = 0,
    tolerance: float = 1e-3,
    criterion: Literal["residual", "bound"] = "residual",
    max_products: int = 1000,
    seed: int = 0,
    start: Tensor | None = None,
    vectors: bool = True,
    memory: int | None = None,
    checkpoint: str | Path | None = None,
) -> Eigenpairs:
    """The wanted extreme eigenpairs, by Lanczos with full reorthogonalisation, stopped when they converged.

    One start vector shows one copy of an eigenvalue that is exactly multiple, and the next one in the place of the
    other copies: where that matters, `refine.complete` looks for them.
    Args: how many `largest`, `smallest` (by value) or by `magnitude`; `tolerance`, relative, and the error
    that it is for, `criterion` (see `Which`); `start` (size,) or (p, size), earlier vectors to warm-start
    from; `memory`, a cap in bytes on the basis and the work vectors; `checkpoint`, a file from which a killed run
    resumes, or a folder for it.
    Raises InvalidInput when a product is not finite or the memory is too small.
    """
    which = Which(largest, smallest, magnitude, tolerance, criterion)
    if start is not None:
        start = warm_start(start, operator, torch.Generator().manual_seed(seed))
    run = run_lanczos(
        operator,
        which,
        max_products=max_products,
        seed=seed,
        start=start,
        memory=memory,
        checkpoint=checkpoint,
    )
    return extract(run, which, seed, vectors)


def extract(run: LanczosRun, which: Which, seed: int, vectors: bool = True) -> Eigenpairs:
    """The wanted pairs of a run."""
    chosen = which.select(run.ritz.values)
    values = run.ritz.values[chosen]
    used = run.space.basis[: run.space.steps]
    return Eigenpairs(
        values=values,
        vectors=combine(run.ritz.weights[chosen], used, run.space.operator.dtype) if vectors else None,
        residuals=run.ritz.residuals[chosen],
        bounds=run.ritz.bounds[chosen] + run.rounding,
        converged=which.converged(values, which.error(run.ritz)[chosen] + run.rounding),
        num_products=run.num_products,
        rounding=run.rounding,
        seed=seed,
    )


def run_lanczos(
    operator: LinearOperator,
    which: Which | None,
    *,
    max_products: int,
    min_products: int = 0,
    seed: int = 0,
    start: Tensor | None = None,
    memory: int | None = None,
    stopping_rule: StoppingRule | None = None,
    checkpoint: str | Path | None = None,
) -> LanczosRun:
    """Extends a Krylov space until the wanted pairs have converged (after `min_products` at the earliest), or
    until `max_products` are spent or the space is exhausted.

    The basis holds the `min_products` without a restart, which would end the quadrature rule, where the memory
    does. `stopping_rule`: another than `StoppingRule(which)`. Raises InvalidInput where no product is allowed, one
    is not finite, or the memory is too small.
    """
    if max_products < 1:
        raise InvalidInput(f"max_products is {max_products}; expected at least 1.")
    capacity = basis_capacity(operator, which, max_products, memory, min_products)
    space = KrylovSpace(operator, capacity, torch.Generator().manual_seed(seed))
    progress = LanczosProgress(which, max_products, min_products, stopping_rule)
    if checkpoint is not None and not operator.spread.alone:
        raise InvalidInput(
            "A run of several processes cannot be kept on disk; leave checkpoint= out, or use one process."
        )
    identity = _identity(space, progress, seed) if checkpoint is not None else {}
    file = None if checkpoint is None else file_of(Path(checkpoint), identity)
    parts: dict[str, Stateful] = {"space": space, "progress": progress}
    if file is None or not load_run(file, identity, parts, space.basis.device):
        space.start(start)
    with operator.many_products():
        while not progress.finished(space):
            space.extend()
            progress.advance(space)
            if file is not None and (progress.products % CHECKPOINT_EVERY == 0 or progress.finished(space)):
                save_run(file, identity, parts)
    return replace(progress.result(space), file=file)


def _identity(space: KrylovSpace, progress: LanczosProgress, seed: int) -> dict[str, Any]:
    """What a run was asked for, as far as its numbers depend on it."""
    return {
        "operator": space.operator.identity,
        "capacity": space.capacity,
        "seed": seed,
        "choice of eigenvalues": str(progress.which),
    }


class LanczosProgress:
    """Where a run stands: products done, when to look next, and what was seen when it last looked."""

    def __init__(
        self, which: Which | None, max_products: int, min_products: int, stopping_rule: StoppingRule | None = None
    ):
        self.which = which
        self.max_products = max_products
        self.min_products = min_products
        self.stopping_rule = stopping_rule or (StoppingRule(which) if which else None)
        self.products = 0
        self.next_look = 1 + max(min_products, which.count) if which else 4
        self.satisfied = False
        self.first_cycle: Tensor | None = None

    def finished(self, space: KrylovSpace) -> bool:
        """Whether no further product is needed, possible or allowed."""
        return self.satisfied or space.exhausted or self.products >= self.max_products

    def advance(self, space: KrylovSpace) -> None:
        """After each product: repairs a breakdown, looks when it is time to, restarts when memory is full."""
        self.products += 1
        due = self.products >= self.next_look
        full = space.steps == space.capacity or space.exhausted
        if not (due or full or looks_every_step(space.basis.device)):
            return
        bordered = space.settle()
        if due:
            self._look(space, bordered)
        if space.steps == space.capacity and not self.finished(space):
            self._restart(space, bordered)

    def _look(self, space: KrylovSpace, bordered: Tensor) -> None:
        """Asks whether what is wanted has converged, and plans when to ask again."""
        sparing = (
            self.products // 32 if self.stopping_rule else 1
        )  # without a question only breakdowns are looked for
        self.next_look = self.products + max(1, sparing) * (1 if looks_every_step(space.basis.device) else 4)
        if self.stopping_rule:
            pairs = ritz(bordered)
            self.satisfied = self.stopping_rule.satisfied(
                self.products, pairs, bordered, space.blocks, space.exhausted
            )

    def _restart(self, space: KrylovSpace, bordered: Tensor) -> None:
        if self.first_cycle is None:
            self.first_cycle = bordered
        pairs = ritz(bordered)
        space.compress(pairs.weights[restart_set(pairs.values, self.which, space.capacity)])

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, as plain data and tensors."""
        stopping_rule = self.stopping_rule and (self.stopping_rule.values, self.stopping_rule.since)
        return {
            "products": self.products,
            "next_look": self.next_look,
            "satisfied": self.satisfied,
            "first_cycle": self.first_cycle,
            "stopping_rule": stopping_rule,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.products, self.next_look = state["products"], state["next_look"]
        self.satisfied = state["satisfied"]
        self.first_cycle = _on_host(state["first_cycle"])
        if self.stopping_rule:
            self.stopping_rule.values, self.stopping_rule.since = (
                _on_host(state["stopping_rule"][0]),
                state["stopping_rule"][1],
            )

    def result(self, space: KrylovSpace) -> LanczosRun:
        """What the run has found so far."""
        bordered = space.settle()
        rounding = rounding_of(space, bordered)
        return LanczosRun(
            space=space,
            ritz=ritz(bordered),
            first_cycle=bordered if self.first_cycle is None else self.first_cycle,
            satisfied=self.satisfied or space.exhausted,
            num_products=self.products,
            rounding=rounding,
        )


def _on_host(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def looks_every_step(device: torch.device) -> bool:
    """Whether reading T costs no synchronisation. Elsewhere a breakdown is noticed some steps late, and the run
    goes back to it."""
    return device.type == "cpu"


def rounding_of(space: KrylovSpace, bordered: Tensor) -> float:
    """How far rounding and asymmetry of the products can have moved a Ritz value: what the basis saw of
    them, and one unit of rounding of the largest entry."""
    unit = torch.finfo(space.operator.dtype).eps
    return space.drift.item() + unit * bordered.abs().max().item()


def restart_set(values: Tensor, which: Which | None, capacity: int) -> Tensor:
    """The Ritz pairs that a thick restart keeps: the wanted, and half of the room that is left."""
    which = which or Which(magnitude=1)
    extra = (capacity - which.count) // 2
    ends = [which.largest > 0, which.smallest > 0, which.magnitude > 0]
    share = extra // sum(ends)
    counts = [
        n + share * end for n, end in zip((which.largest, which.smallest, which.magnitude), ends, strict=True)
    ]
    return Which(largest=counts[0], smallest=counts[1], magnitude=counts[2]).select(values)


def basis_capacity(
    operator: LinearOperator,
    which: Which | None,
    max_products: int,
    memory: int | None,
    min_products: int = 0,
) -> int:
    """How many basis vectors to hold: all that a run of fixed length needs, otherwise DEFAULT_BASIS, four times the
    wanted or `min_products`; fewer where `memory` (bytes) is given, of which four vectors go to the work space."""
    count = which.count if which else 1
    capacity = min(max_products, max(DEFAULT_BASIS, 4 * count, min_products)) if which else max_products
    if memory is not None:
        work = 4 * operator.size * operator.dtype.itemsize
        vector = operator.part_size * operator.dtype.itemsize
        fits = (memory - work) // vector - 1
        if fits < min(count + 3, operator.size):
            raise InvalidInput(
                f"{memory} bytes hold {max(fits, 0)} basis vectors of size {operator.size}, and {count} "
                f"eigenpairs need {count + 3}; give at least {work + (count + 4) * vector} bytes or ask for fewer."
            )
        capacity = min(capacity, fits)
    return capacity


def warm_start(start: Tensor, operator: LinearOperator, generator: torch.Generator) -> Tensor:
    """One start vector from earlier eigenvectors, (size,) or (p, size): their sum, with a little of
    everything else so that a direction that has arisen since can be found. In and out go parts."""
    rows, spread = torch.atleast_2d(start), operator.spread
    total = sum(row * (1 / norm(row, spread)) for row in rows)
    assert isinstance(total, Tensor)
    noise = spread.drawn(operator.size, normal(generator)).to(total)
    return total * (1 / norm(total, spread)) + 0.1 * noise * (1 / norm(noise, spread))
