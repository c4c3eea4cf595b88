"""What the two Hessian cards share: a small network on some of the digits, and the spectrum of its loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import diag
from diag import datasets
from diag.linalg.lanczos import eigenpairs
from diag.quantities.curvature import GaussNewton, Hessian
from diag.quantities.curvature_examples import class_directions

EPOCHS, DROPS, BATCH = 40, (20, 30), 64
OVERLAP = 0.5  # a vector counts as a class direction from here on
NEAR_ZERO = 1e-3  # of the largest eigenvalue


def trained(classes: int, hidden: int, seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """An MLP 64-hidden-classes after 40 epochs of SGD on the digits 0 to classes - 1, in float64, and its data."""
    digits = datasets.load("digits", seed=seed)
    chosen = digits.labels < classes
    x, y = digits.inputs[chosen].flatten(1), digits.labels[chosen]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, DROPS, gamma=0.1)
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y), generator=order).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
    return model.double(), (x.double(), y)


@dataclass(frozen=True)
class ClassSpectrum:
    """Of the Hessian of the loss over all the data, without decay.

    top: the largest eigenvalues by Lanczos. overlaps: each one's eigenvector with the span of the class
    directions, squared. leading: how many lie there before the first that does not. gauss_newton: the share of
    each that is the Gauss-Newton part. dense: all eigenvalues of the matrix written out, ascending.
    """

    top: Tensor
    overlaps: Tensor
    leading: int
    gauss_newton: Tensor
    dense: Tensor

    @property
    def near_zero(self) -> float:
        """The share of eigenvalues below a thousandth of the largest."""
        return float((self.dense.abs() < NEAR_ZERO * self.dense[-1]).double().mean())

    @property
    def lanczos_error(self) -> float:
        """The largest error of the Lanczos eigenvalues against the dense ones, relative to the largest."""
        expected = self.dense.flip(0)[: len(self.top)]
        return float((self.top - expected).abs().max() / self.dense[-1])


def class_spectrum(model: nn.Module, data: tuple[Tensor, Tensor], count: int) -> ClassSpectrum:
    """The `count` largest eigenpairs, beside the dense spectrum."""
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), data)
    hessian: Hessian = snapshot.quantity("hessian")
    gauss_newton: GaussNewton = snapshot.quantity("gauss_newton")
    pairs = eigenpairs(hessian, largest=count, tolerance=1e-6, seed=0)
    assert pairs.vectors is not None
    basis, _ = torch.linalg.qr(class_directions(hessian).T)
    overlaps = (pairs.vectors @ basis).square().sum(1)
    inside = (overlaps > OVERLAP).tolist()
    parts = torch.stack([v @ (gauss_newton @ v) for v in pairs.vectors]) / pairs.values
    dense = torch.linalg.eigvalsh(hessian.to_dense())
    return ClassSpectrum(pairs.values, overlaps, [*inside, False].index(False), parts, dense)
