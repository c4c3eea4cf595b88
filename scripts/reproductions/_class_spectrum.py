"""What the two Hessian cards share: a small network on some of the digits, and the spectrum of its loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from reproducing import Lab
from torch import Tensor, nn

import diag
from diag import datasets
from diag.display import format_number
from diag.instruments.hessian_spectrum.instrument import HessianSpectrum
from diag.linalg.lanczos import eigenpairs

EPOCHS, DROPS, BATCH = 40, (20, 30), 64
NEAR_ZERO = 1e-3  # of the largest eigenvalue


def trained(classes: int, hidden: int, seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """An MLP 64-hidden-classes after 40 epochs of SGD on the digits 0 to classes - 1, in float64, and its data."""
    digits = datasets.load_dataset("digits", seed=seed)
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
    """Of the Hessian of the loss over all the data, without decay: the instrument's result, and two checks of it.

    gauss_newton: the Gauss-Newton share of each of the result's eigenvalues. dense: all eigenvalues of the matrix
    written out, ascending.
    """

    result: HessianSpectrum
    gauss_newton: Tensor
    dense: Tensor

    @property
    def near_zero(self) -> float:
        """The share of eigenvalues below a thousandth of the largest."""
        return float((self.dense.abs() < NEAR_ZERO * self.dense[-1]).double().mean())

    @property
    def error_over_residual(self) -> float:
        """The largest error of an eigenvalue against the dense ones, over the residual that is stated for it."""
        expected = self.dense.flip(0)[: len(self.result.eigenvalues)].numpy()
        # A residual may be rounding of rounding; no eigenvalue is held to better than 1e-14 of the largest.
        stated = numpy.maximum(self.result.residuals, 1e-14 * expected[0])
        return float((abs(self.result.eigenvalues - expected) / stated).max())


def class_spectrum(lab: Lab, arm: str, model: nn.Module, data: tuple[Tensor, Tensor], count: int) -> ClassSpectrum:
    """The `count` largest eigenvalues and all else that the instrument gives, recorded as a run."""
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), data)
    result: HessianSpectrum = diag.hessian_spectrum(snapshot, num_eigenvalues=count)
    with lab.recorder(arm, model, optimizer="SGD, momentum 0.9, decay 5e-4") as record:
        record.append_outcome(EPOCHS * -(-len(data[1]) // BATCH), result)
    hessian, gauss_newton = snapshot.quantity("hessian"), snapshot.quantity("gauss_newton")
    pairs = eigenpairs(hessian, largest=count, tolerance=1e-6, seed=0)
    assert pairs.vectors is not None
    parts = torch.stack([v @ (gauss_newton @ v) for v in pairs.vectors]) / pairs.values
    overlaps = " ".join(format_number(float(v), 2) for v in result.overlaps)
    top = " ".join(format_number(float(v), 3) for v in result.eigenvalues)
    lab.say(f"  {arm}: largest {top}; overlaps {overlaps}")
    return ClassSpectrum(result, parts, torch.linalg.eigvalsh(hessian.to_dense()))
