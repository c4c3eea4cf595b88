"""How a batch is cut into examples: which of the inputs belong to them, found by calling the model on a part.

That a tensor's first axis is as long as the batch does not say that it holds the examples: a mask (T, T) may have
as many positions as there are sequences, and a graph's nodes, time steps or a table of all rows cannot be taken
apart. So the model is called on all of a batch and on its second half, cut in one way after the other, until the
outputs of the rows are the same. Where they never are, the batch stays whole, with the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from diag.errors import DiagError, InvalidInput
from diag.snapshot.batch import Batch, map_tensors, tensors_in
from diag.snapshot.objective.shares import plain_targets
from diag.snapshot.preserve import preserved

MOST_WAYS = 16
EXAMPLES_TIED = (
    "The outputs for an example depend on the others of its batch, so examples influence each other and have no "
)
EXAMPLES_TIED += "gradients of their own: {}."
TIME_MAJOR = (
    "The examples lie along the second axis of the inputs and the targets (time first); wrap the model so that it "
    "takes and gives batches with the examples first."
)
WITHOUT_EXAMPLES = (
    "no axis of the inputs holds the examples first (time may come first, or one input serve all); give the model "
    "and the data with the examples along the first axis"
)
MANY_TARGETS = (
    "the targets do not hold one entry for each example along their first axis; give them so that they do"
)
BY_STATISTICS = "{} normalises by the statistics of the batch; use running statistics, or another norm"
BY_ITSELF = (
    "a mean, attention or sorting over the batch, one graph or one mask for all ties them; measure what needs no "
    "single examples"
)


class Cutting:
    """How the batches of one model are cut: tried once for batches of one form."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[frozenset[int], str]] = {}

    def settled(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with what is to be known for cutting it; as it is where that cannot be tried.

        Raises InvalidInput where the examples are seen to lie along the second axis.
        """
        if batch.size < 2 or batch.coupled:
            return batch
        targets = [t for t in tensors_in(plain_targets(batch.targets)) if t.ndim]
        if targets and not any(_is_row(t, batch.size) for t in targets):
            return replace(batch, coupled=True, why=EXAMPLES_TIED.format(MANY_TARGETS))
        form = _form(batch)
        if form not in self._known:
            self._known[form] = _tried(model, batch)
        shared, why = self._known[form]
        return replace(batch, shared=shared, coupled=bool(why), why=why)


def what_ties(model: nn.Module) -> str:
    """What of the model ties the examples of a batch, and what to do, in a clause."""
    norms = (
        f"{name} ({type(m).__name__})"
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None)
    )
    found = next(norms, None)
    return BY_STATISTICS.format(found) if found else BY_ITSELF


def _form(batch: Batch) -> Hashable:
    of_rows = [_is_row(t, batch.size) for t in tensors_in((batch.args, batch.kwargs))]
    square = [
        t.ndim > 1 and t.shape[1] == batch.size for t in tensors_in((batch.args, batch.kwargs, batch.targets))
    ]
    return tuple(of_rows), tuple(square), tuple(batch.kwargs)


def _is_row(t: Tensor, size: int) -> bool:
    return t.ndim > 0 and t.shape[0] == size


def _tried(model: nn.Module, batch: Batch) -> tuple[frozenset[int], str]:
    """The shared inputs, and why the batch must stay whole if it must."""
    with preserved(model), torch.no_grad():
        together = _outputs(model, batch)
        if together is None or not any(_is_row(t, batch.size) for t in together):
            return frozenset(), ""
        for shared in _ways(batch):
            part = replace(batch, shared=shared).slice(batch.size // 2, batch.size)
            if _agree(together, _outputs(model, part), batch.size):
                return shared, ""
        if not _agree(together, _outputs(model, batch), batch.size, 0):
            return frozenset(), ""  # the model draws random numbers, which tells nothing
        if _is_time_major(model, batch, together):
            raise InvalidInput(TIME_MAJOR)
        found = any(_is_row(t, batch.size) for t in tensors_in((batch.args, batch.kwargs)))
        return frozenset(), EXAMPLES_TIED.format(what_ties(model) if found else WITHOUT_EXAMPLES)


def _ways(batch: Batch) -> Iterator[frozenset[int]]:
    """Sets of inputs to leave whole, the smallest first."""
    rows = [i for i, t in enumerate(tensors_in((batch.args, batch.kwargs))) if _is_row(t, batch.size)]
    sets = itertools.chain.from_iterable(itertools.combinations(rows, k) for k in range(max(len(rows), 1)))
    return (frozenset(chosen) for chosen in itertools.islice(sets, MOST_WAYS))


def _outputs(model: nn.Module, batch: Batch) -> list[Tensor] | None:
    """The floating tensors that the model gives; None where it raises."""
    try:
        found = batch.forward_on_copies(model)
    except DiagError:
        raise
    except Exception:
        return None
    return [t for t in tensors_in(found) if t.is_floating_point() or t.is_complex()]


def _agree(together: list[Tensor], part: list[Tensor] | None, size: int, start: int | None = None) -> bool:
    """Whether the outputs of the rows from `start` on are the same in both."""
    start = size // 2 if start is None else start
    if part is None or len(part) != len(together):
        return False
    pairs = [(a[start:], b) for a, b in zip(together, part, strict=True) if _is_row(a, size)]
    return all(a.shape == b.shape and _close(a, b) for a, b in pairs)


def _close(a: Tensor, b: Tensor) -> bool:
    within = {torch.float64: 1e-6, torch.complex128: 1e-6, torch.float32: 1e-3, torch.complex64: 1e-3}
    tolerance = within.get(a.dtype, 5e-2)
    return torch.allclose(a, b, rtol=0, atol=tolerance * _size(a), equal_nan=True)


def _size(a: Tensor) -> float:
    finite = a[torch.isfinite(a)]
    return max(float(finite.abs().max()), 1e-30) if finite.numel() else 1.0


def _is_time_major(model: nn.Module, batch: Batch, together: list[Tensor]) -> bool:
    """Whether cutting inputs and outputs along their second axis leaves what the model gives as it is."""
    inputs = tensors_in((batch.args, batch.kwargs))
    width = {t.shape[1] for t in tensors_in(batch.targets) if t.ndim > 1}
    if len(width) != 1 or not inputs or (n := width.pop()) < 2:
        return False
    cut = lambda t: t[:, n // 2 :] if t.ndim > 1 and t.shape[1] == n else t  # noqa: E731
    args, kwargs = map_tensors(cut, (batch.args, batch.kwargs))
    part = _outputs(model, replace(batch, args=args, kwargs=kwargs))
    if part is None or len(part) != len(together):
        return False
    pairs = [(cut(a), b) for a, b in zip(together, part, strict=True)]
    some = any(t.ndim > 1 and t.shape[1] == n for t in together)
    return some and all(a.shape == b.shape and _close(a, b) for a, b in pairs)
