"""What gradients say about symmetries: which weights can take up a linear map of a set of units, and which undo it.

A function that a one-parameter family of maps leaves alone has no derivative along it. For units with weights X
(units, rest) and the gradient G of any projection of the outputs, the family A acts on the weights by A X or by
-A^T X, so that sum_n e_n <A, G_n X_n^T> = 0, where e_n is 1, -1 or 0 (the weight writes the units, reads them, or
does not take part). These moments G X^T of every place, for a few random projections, come from as many backward
passes over one forward pass. What e solves the equation for all diagonal A (or all A, or all antisymmetric A) is a
null space. Source: the identities of Kunin et al. 2021 (arXiv:2012.04728, section 3), read backwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diag.connectivity.symmetries.linear_groups import Slot, complement_of_ones
from diag.connectivity.symmetries.tracing import Lifted, main_outputs, unfused
from diag.snapshot.batch import Batch
from diag.snapshot.call_at import call_at

NULL = 1e-8  # relative, float64: below it a combination of moments is zero
IDLE = 1e-12  # relative: below it a weight has no influence at all (a key's bias under softmax)
ROWS_TO_SPARE = 8
PAIRS = 4096  # entries of antisymmetric moments that are used at most


class OutputGradients:
    """The gradients of `count` random projections of the outputs at one state, by entry, float64."""

    def __init__(
        self, model: nn.Module, example: Batch, state: Mapping[str, Tensor], count: int, seed: int
    ) -> None:
        own = [n for n, _ in [*model.named_parameters(), *model.named_buffers()]]
        self.state = {n: state[n].detach().clone() for n in own if n in state}
        parameters = {n for n, _ in model.named_parameters()}
        leaves = {n: t.requires_grad_() for n, t in self.state.items() if n in parameters}
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode(False), torch.enable_grad(), unfused(), Lifted():
            outputs = main_outputs(call_at(model, self.state, example.args, example.kwargs))
            outputs = [t for t in outputs if t.is_floating_point() and t.requires_grad]
            self.by_projection = []
            for _ in range(count):
                weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) for t in outputs]
                total = torch.stack([(w * t).sum() for w, t in zip(weights, outputs, strict=True)]).sum()
                found = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
                self.by_projection.append(dict(zip(leaves, found, strict=True)))

    def pairs(self, slot: Slot) -> list[tuple[Tensor, Tensor]]:
        """(weights, gradient), each (*parents, units, rest), for each projection."""
        x = slot.rows(self.state)
        empty = torch.zeros_like(self.state[slot.entry])
        filled = ({slot.entry: empty if g[slot.entry] is None else g[slot.entry]} for g in self.by_projection)
        return [(x, slot.rows(g)) for g in filled]


def diagonal(gradients: OutputGradients, slots: Sequence[Slot]) -> Tensor:
    """(projections x units, slots): <G, X> of each unit."""
    columns = [torch.cat([(g * x).sum(-1).flatten() for x, g in gradients.pairs(s)]) for s in slots]
    return torch.stack(columns, 1)


def full(gradients: OutputGradients, slot: Slot) -> Tensor:
    """(projections, *parents, units, units): the moment G X^T of a place that A acts on, X G^T where its inverse
    does; with its sign.
    """
    products = [g @ x.transpose(-1, -2) for x, g in gradients.pairs(slot)]
    stacked = torch.stack(products)
    return stacked if slot.action == 1 else -stacked.transpose(-1, -2)


def antisymmetric(gradients: OutputGradients, slots: Sequence[Slot], centred: bool) -> Tensor:
    """(entries, slots): the antisymmetric part of G X^T, less what is along a vector of ones where `centred`."""
    columns = []
    for slot in slots:
        moment = full(gradients, slot)
        if centred:
            basis = complement_of_ones(moment.shape[-1])
            moment = basis.T @ moment @ basis
        columns.append((moment - moment.transpose(-1, -2)).flatten())
    rows = torch.stack(columns, 1)
    if len(rows) > PAIRS:  # a fixed choice of them is enough
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:PAIRS]]
    return rows


def null_vectors(rows: Tensor) -> tuple[list[list[int]], set[int]] | None:
    """The combinations of columns that vanish, reduced, as far as they are made of -1, 0 and 1; and the columns
    that vanish by themselves (idle). None where all do, or there are too few rows to tell.
    """
    norms = rows.norm(dim=0)
    idle = {j for j, n in enumerate(norms.tolist()) if not n > IDLE * float(norms.max())}
    busy = [j for j in range(rows.shape[1]) if j not in idle]
    if not busy or len(rows) < len(busy) + ROWS_TO_SPARE:
        return None
    scaled = rows[:, busy] / norms[busy]
    values, vectors = torch.linalg.svd(scaled, full_matrices=True)[1:]
    small = int((values < NULL * values[0]).sum())
    if not small:
        return [], idle
    basis = vectors[-small:] / norms[busy]  # back to the columns as they came
    found = []
    for row in _reduced(basis):
        whole = row.round()
        if float((row - whole).abs().max()) < 1e-4 and float(whole.abs().max()) == 1:
            vector = [0] * rows.shape[1]
            for j, value in zip(busy, whole.tolist(), strict=True):
                vector[j] = int(value)
            found.append(vector)
    return found, idle


def _reduced(basis: Tensor) -> Tensor:
    """Reduced row echelon form, each pivot the largest of its row that is left."""
    rows = basis.clone()
    for i in range(len(rows)):
        rest = rows[i:].abs()
        k, j = divmod(int(rest.argmax()), rows.shape[1])
        rows[[i, i + k]] = rows[[i + k, i]]
        rows[i] /= rows[i, j].clone()
        others = torch.arange(len(rows)) != i
        rows[others] -= rows[others, j][:, None] * rows[i]
    first = [int((row.abs() > 0.5).nonzero()[0]) if bool((row.abs() > 0.5).any()) else 0 for row in rows]
    signs = torch.tensor([1.0 if row[j] >= 0 else -1.0 for row, j in zip(rows, first, strict=True)])
    return rows * signs.to(rows)[:, None]
