"""What one measurement of curvature leaves for the next on the same model, so that a watched run pays less.

    carry = Carry()                                     # owned by the caller that measures repeatedly
    Snapshot(model, loss_fn, data, carry=carry)         # at every measurement

Two things are carried: the record of the operator's self-test, which says whether products with this model are
right and does not depend on the values of its parameters, and start vectors for Lanczos. Both are renewed, by a
test in full and a cold start, at the first measurement, at every fourth after it, and whenever something has
changed on which they rest (see `construction`): so what only the values bring about, such as a branch that a
parameter switches, or an eigenvalue that a warm start has missed, does not last. Without a carry every measurement
stands by itself and is repeatable to the bit.

What it saves (scripts/bench_warm_start.py): the self-test, worth six to eight products, and up to a sixth of the
products for the largest eigenvalue where the last measurement is one step old; hardly any after 25 steps.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diag.curvature.record import SelfTest
from diag.linalg.lanczos import Eigenpairs, eigenpairs
from diag.linalg.operator import LinearOperator
from diag.linalg.refine import complete
from diag.linalg.ritz import Which
from diag.linalg.warm import Earlier, warm_eigenpairs
from diag.snapshot.batch import tensors_in
from diag.snapshot.snapshot import Snapshot

RENEW_EVERY = 4  # measurements; our choice


@dataclass
class Carried:
    """What is carried for one kind of operator. `moment` counts its measurements from zero."""

    construction: Hashable
    moment: int = 0
    self_test: SelfTest | None = None
    # (name, number of pairs) -> the moment at which they were found, and what a run leaves for the next: two bytes
    # for each parameter.
    earlier: dict[tuple[str, int], tuple[int, Earlier]] = field(default_factory=dict)

    @property
    def renewing(self) -> bool:
        """Whether this measurement tests in full and starts cold."""
        return self.moment % RENEW_EVERY == 0

    def eigenpairs(self, operator: LinearOperator, name: str, largest: int, **settings: Any) -> Eigenpairs:
        """`largest` eigenpairs of `operator`, started from those that were last found under `name`."""
        found, earlier = self.earlier.get((name, largest), (-1, None))
        unchanged = found == self.moment
        if earlier is not None and ((self.renewing and not unchanged) or len(earlier.direction) != operator.size):
            earlier = None
        pairs, left = warm_eigenpairs(operator, earlier, largest=largest, unchanged=unchanged, **settings)
        self.earlier[name, largest] = (self.moment, left)
        return pairs


class Carry:
    """What is carried from one measurement of a model to the next; empty at first."""

    def __init__(self) -> None:
        self._kinds: dict[str, Carried] = {}

    def next(self, kind: str, snapshot: Snapshot) -> Carried:
        """What is carried for operators of this kind, as a new measurement begins."""
        known, now = self._kinds.get(kind), construction(snapshot)
        if known is None or known.construction != now:
            known = self._kinds[kind] = Carried(now)
        else:
            known.moment += 1
        if known.renewing:
            known.self_test = None
        return known


def carried_eigenpairs(
    operator: LinearOperator,
    name: str,
    *,
    largest: int,
    tolerance: float = 1e-3,
    max_products: int = 1000,
    seed: int = 0,
) -> Eigenpairs:
    """The `largest` eigenpairs of `operator`, as by `eigenpairs`; in a watched run started from the last ones.

    Several are completed by a search from another start vector, as one vector shows one copy of a multiple
    eigenvalue. Args: name, for what the operator is, under which its vectors are kept. Where the operator is not
    one of a snapshot with a carry, nothing is carried.
    """
    settings: dict[str, Any] = {"tolerance": tolerance, "max_products": max_products, "seed": seed}
    carried: Carried | None = getattr(operator, "carried", None)
    if carried is None:
        pairs = eigenpairs(operator, largest=largest, **settings)
    else:
        pairs = carried.eigenpairs(operator, name, largest, **settings)
    if largest == 1 or not bool(pairs.converged.all()) or len(pairs.values) == operator.size:
        return pairs
    return complete(operator, pairs, Which(largest=largest, tolerance=tolerance))


def construction(snapshot: Snapshot) -> Hashable:
    """All that decides whether a product is right, but for the values, as far as it can be seen from outside.

    The modules with their types, modes, hooks and plain settings (so a changed dropout rate, flag or wrapped layer
    counts), the shapes, dtypes, devices and requires_grad of parameters and buffers, the loss, the data's shapes.
    """
    loss = snapshot.loss_fn
    parts = [snapshot.model, *([loss] if isinstance(loss, nn.Module) else [])]
    tensors = tensors_in([(b.args, b.kwargs, b.targets) for b in snapshot.batches])
    return (
        tuple(_module(name, module) for part in parts for name, module in part.named_modules()),
        tuple((n, _kind(p), p.requires_grad) for n, p in snapshot.model.named_parameters(remove_duplicate=False)),
        tuple((n, _kind(b)) for n, b in snapshot.model.named_buffers(remove_duplicate=False)),
        _Same(loss),
        tuple(_kind(t) for t in tensors),
    )


def _module(name: str, module: nn.Module) -> Hashable:
    plain = ((k, v) for k, v in vars(module).items() if isinstance(v, bool | int | float | str | None))
    hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
    return name, type(module), hooks, tuple(plain)


def _kind(tensor: Any) -> Hashable:
    return tuple(tensor.shape), tensor.dtype, tensor.device


@dataclass(frozen=True)
class _Same:
    """Equal for the same object alone, which it keeps alive."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
