"""The directions in parameter space that tell one class from the others; the Hessian's outliers follow them.

d_c = mean over examples i of class c and classes c' != c of sqrt(p_ic') (grad z_ic' - sum_k p_ik grad z_ik):
the class means of the factor of the Gauss-Newton matrix (Papyan 2019, arXiv:1901.08244). As one sum it is
J^T w with w_i = (1 / (n_c (C - 1))) sum_(c' != c) sqrt(p_ic') (e_c' - p_i), so one backward pass a class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diag.errors import MissingQuantity
from diag.snapshot.forward import look
from diag.snapshot.parameters import trainable
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot

MOST_DIRECTIONS = 100  # one backward pass and one vector of the parameters' size each


def class_directions(snapshot: Snapshot) -> Tensor:
    """d_c for each class that is present, (classes, P), in `named_parameters()` order.

    Where an example has several labels, each of its positions counts. Raises MissingQuantity where the loss
    compares no classes, or there are more than 100.
    """
    present = snapshot.quantity("labels").unique(return_counts=True)
    if len(present[0]) > MOST_DIRECTIONS:
        raise MissingQuantity(
            f"the data hold {len(present[0])} classes; class directions are for up to {MOST_DIRECTIONS}."
        )
    leaves = list(trainable(snapshot.model).values())
    totals = [torch.zeros_like(p) for _ in present[0] for p in leaves]
    with preserved(snapshot.model), torch.enable_grad():
        for batch in snapshot.batches:
            found = look(snapshot, snapshot.model, batch).compared()
            for row, (c, count) in enumerate(zip(*present, strict=True)):
                chosen = found.counted & (found.labels == c)
                weights = torch.where(chosen[:, None], _weights(found.logits.detach(), int(c)) / count, 0)
                parts = torch.autograd.grad(found.logits, leaves, weights, retain_graph=True, allow_unused=True)
                for total, part in zip(totals[row * len(leaves) :], parts, strict=False):
                    if part is not None:
                        total.add_(part.to_dense() if part.is_sparse else part)
    flat = [t.reshape(-1) for t in totals]
    return torch.stack([torch.cat(flat[i : i + len(leaves)]) for i in range(0, len(flat), len(leaves))])


def _weights(logits: Tensor, c: int) -> Tensor:
    """w_i for examples of class c, without the 1 / n_c: (n, K)."""
    p = logits.softmax(1)
    roots = p.sqrt().index_fill(1, torch.tensor(c, device=p.device), 0)
    return (roots - roots.sum(1, keepdim=True) * p) / max(p.shape[1] - 1, 1)
