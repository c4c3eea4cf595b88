"""Whether the loss of a batch that is cut is still the same loss.

A model may compute over the batch what belongs to no example: the balance of a router's load, a contrastive term,
statistics. The value of such a loss can be nearly that of its parts, or exactly, where its gradient is not: so both
are compared, on the first examples of a batch, as one batch and as two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diag.errors import DiagError
from diag.snapshot.autograd_graph import nodes_before
from diag.snapshot.batch import Batch
from diag.snapshot.explain import CALL_ERRORS
from diag.snapshot.preserve import preserved
from diag.snapshot.reading.data import EXAMPLES_IN_PART
from diag.snapshot.snapshot import Snapshot

MOST_OF_GRAPH = 50_000  # of a loss's graph
ADDS_UP = 1e-4  # relative: of the loss of a batch and that of its parts, and of their gradients


@dataclass(frozen=True)
class _Descent:
    """A loss and its gradient by the parameters that it reaches."""

    value: float
    gradient: dict[str, Tensor]
    rounding: float


def couples_within(snapshot: Snapshot, counts: list[Tensor] | None, uncut: bool) -> bool:
    """Whether cutting a batch makes another objective of the loss.

    counts: what each example counts in it, a tensor a batch; None where all count alike. uncut: ask of the first
    batch where none was cut when the data were read.
    """
    batches, part, first = snapshot.batches, snapshot.cut.part, snapshot.cut.first
    if part is None and uncut:
        part, first = batches[0].few(EXAMPLES_IN_PART), 0
    if part is None or part.size < 2:
        return False
    known = counts or [torch.ones(batch.size, dtype=torch.float64) for batch in batches]
    weights = torch.cat(known[first : first + part.size])[: part.size].double()
    half = part.size // 2
    try:
        whole, *halves, again = _descents(snapshot, (part, part.slice(0, half), part.slice(half, part.size), part))
    except (DiagError, *CALL_ERRORS):
        return False  # which is said where all of it is called
    if not _is_combination(whole, [(again, 1.0)]):
        return False  # it draws random numbers or keeps something, which is said elsewhere
    return not _are_made_up(whole, halves, [float(weights[:half].sum()), float(weights[half:].sum())])


def rounding_of_parts(loss: Tensor) -> float:
    """Relative: how far apart a loss may be from the same by parts, by the coarsest numbers that it is made of."""
    nodes = nodes_before([loss.grad_fn], MOST_OF_GRAPH)
    kinds = {loss.dtype, *(made.dtype for node in nodes for made in getattr(node, "_input_metadata", ()))}
    return max([ADDS_UP, *(8 * torch.finfo(kind).eps for kind in kinds if kind.is_floating_point)])


def _descents(snapshot: Snapshot, batches: tuple[Batch, ...]) -> list[_Descent]:
    leaves = {n: p for n, p in snapshot.model.named_parameters() if p.requires_grad}
    found = []
    with preserved(snapshot.model), torch.enable_grad():
        for batch in batches:
            loss = snapshot.batch_loss(batch.forward(snapshot.model), batch.targets)
            parts = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            gradient = {n: _dense(g) for n, g in zip(leaves, parts, strict=True) if g is not None}
            found.append(_Descent(float(loss.detach().double().mean()), gradient, rounding_of_parts(loss)))
    return found


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _are_made_up(whole: _Descent, halves: list[_Descent], weights: list[float]) -> bool:
    """Whether the whole is the mean of the halves by these weights, or their sum (which is said elsewhere)."""
    counted = [(half, weight) for half, weight in zip(halves, weights, strict=True) if weight > 0]
    total = sum(weight for _, weight in counted)
    if total <= 0:
        return True
    by_mean = [(half, weight / total) for half, weight in counted]
    by_sum = [(half, 1.0) for half in halves]
    return any(_is_combination(whole, parts) for parts in (by_mean, by_sum))


def _is_combination(whole: _Descent, parts: list[tuple[_Descent, float]]) -> bool:
    size = max(abs(whole.value), *(abs(weight * part.value) for part, weight in parts))
    within = whole.rounding
    if abs(whole.value - sum(weight * part.value for part, weight in parts)) > within * size:
        return False
    difference, largest = 0.0, 0.0
    for name in dict.fromkeys([*whole.gradient, *(n for part, _ in parts for n in part.gradient)]):
        terms = [(weight, part.gradient.get(name)) for part, weight in parts]
        norms = [weight * float(g.norm()) for weight, g in terms if g is not None]
        rest = whole.gradient.get(name, 0.0) - sum(weight * g for weight, g in terms if g is not None)
        difference += float(torch.as_tensor(rest).abs().double().square().sum())
        largest += max([0.0, *norms]) ** 2
    return not difference > (within**2) * largest
