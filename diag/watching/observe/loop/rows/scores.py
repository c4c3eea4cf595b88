"""One number a row from a call of a loss function with classes: the margin of its label.

The margin is the logit of the label less the largest other one, whatever the loss function does besides (smoothing,
weights). On the host it is computed by NumPy on the tensors' own memory; elsewhere it stays on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from diag.snapshot.objective.loss_spy import input_and_target

OF_SEVERAL_CLASSES = ("cross_entropy", "nll_loss")
OF_TWO_CLASSES = ("binary_cross_entropy_with_logits",)
ENTRIES = 1 << 16  # logits of a batch that are looked at; of a larger one every second, third, ... row
LARGEST_MARGIN = 1e4  # margins beyond are cut


@dataclass(frozen=True)
class RowScores:
    """Of some rows of a batch (`rows`, a slice): margin, label and the largest other class, each (m,); NaN where
    the label is none of the classes. Arrays on the host, else tensors."""

    rows: slice
    margin: Any
    label: Any
    answer: Any

    @property
    def on_host(self) -> bool:
        """Whether they can be read without waiting."""
        return isinstance(self.margin, numpy.ndarray)

    def scores(self) -> RowScores:
        """These."""
        return self


@dataclass(frozen=True)
class RowLogits:
    """Copies on the host of what scores are computed from: logits (m, classes) and labels (m,) of `rows`. They are
    taken at once, as the loop may change its tensors, and computed with together with those of other batches."""

    rows: slice
    logits: Any
    label: Any
    on_host = True

    def scores(self) -> RowScores:
        """The scores of these rows."""
        return _on_host(self.logits, self.label, self.rows)


def scores_of(name: str, args: Any, kwargs: Mapping[str, Any], size: int) -> RowScores | RowLogits | None:
    """The scores of a batch of `size` rows, by the loss function called `name`; None where it is not one of these
    with one target a row."""
    prediction, target = input_and_target(args, kwargs)
    if not (isinstance(prediction, Tensor) and isinstance(target, Tensor) and prediction.is_floating_point()):
        return None
    if not prediction.ndim or not target.ndim or len(prediction) != size or len(target) != size or not size:
        return None
    if name in OF_SEVERAL_CLASSES and prediction.ndim == 2 and target.ndim == 1 and not target.is_floating_point():
        return _of_classes(prediction.detach(), target.detach())
    if name in OF_TWO_CLASSES and prediction.numel() == size and target.numel() == size:
        return _of_two(prediction.detach().reshape(-1), target.detach().reshape(-1))
    return None


def _some(rows: int, each: int) -> slice:
    return slice(0, rows, max(1, -(-rows * each // ENTRIES)))


def _of_classes(z: Tensor, y: Tensor) -> RowScores | RowLogits:
    rows = _some(*z.shape)
    if rows.step > 1:
        z, y = z[rows], y[rows]
    z = z if z.dtype in (torch.float32, torch.float64) else z.float()
    if z.is_cpu and y.is_cpu:
        return RowLogits(rows, z.numpy().copy(), y.numpy().copy())
    return _on_device(z, y, rows)


def _on_device(z: Tensor, y: Tensor, rows: slice) -> RowScores:
    inside = y.long().clamp(0, z.shape[1] - 1)[:, None]
    own = z.gather(1, inside)[:, 0]
    other, answer = z.scatter(1, inside, -torch.inf).max(1)
    margin = torch.where(inside[:, 0] == y, own - other, torch.nan).clamp(-LARGEST_MARGIN, LARGEST_MARGIN)
    return RowScores(rows, margin, y.clone(), answer)


def _on_host(z: Any, y: Any, rows: slice) -> RowScores:
    at = numpy.arange(len(z))
    none = None
    if y.min() < 0 or y.max() >= z.shape[1]:
        none = (y < 0) | (y >= z.shape[1])
    inside = y if none is None else numpy.where(none, 0, y)
    own = z[at, inside]
    z[at, inside] = -numpy.inf  # it is a copy
    answer = z.argmax(1)
    with numpy.errstate(invalid="ignore", over="ignore"):
        margin = (own - z[at, answer]).clip(-LARGEST_MARGIN, LARGEST_MARGIN)
    if none is not None:
        margin[none] = numpy.nan
    return RowScores(rows, margin, y, answer)


def _of_two(z: Tensor, y: Tensor) -> RowScores:
    """One logit for two classes; targets that are neither 0 nor 1 are no classes."""
    rows = _some(len(z), 1)
    z, y = z[rows].float(), y[rows].float()
    margin = torch.where((y == 0) | (y == 1), (2 * y - 1) * z, torch.nan).clamp(-LARGEST_MARGIN, LARGEST_MARGIN)
    label = y.round().long()
    found = (margin, label, 1 - label)
    return RowScores(rows, *(t.numpy() if z.is_cpu else t for t in found))
