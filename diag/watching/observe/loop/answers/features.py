"""Rows of inputs and of targets as a bounded number of columns, so that rows can be compared with one another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from diag.linalg.geometry.pairing import centred, similarity
from diag.watching.observe.loop.modes import is_dense

FEATURE_COLUMNS = 128  # of a row that are kept
BAGS = 256  # into which whole numbers are counted
PLACED = 16  # whole numbers of a row up to which each place counts by itself
WIDEST_TARGET = 64  # numbers of a target
TARGET_COLUMNS = 16


def readable(t: Tensor, rows: int) -> bool:
    """Whether the tensor lies on the host with so many rows, of numbers that can be compared."""
    there = t.is_cpu and is_dense(t) and t.ndim > 0 and len(t) == rows and t.numel() > 0
    return there and not t.is_complex() and not t.requires_grad


def row_features(t: Tensor) -> Tensor:
    """The rows (n, d) of a tensor of inputs: numbers as they are, evenly spaced ones of many; whole numbers
    counted, where they are few for each place by itself."""
    flat = t.detach().reshape(len(t), -1)
    if flat.is_floating_point():
        return flat[:, :: max(1, math.ceil(flat.shape[1] / FEATURE_COLUMNS))].float().clone()
    return _bags(flat.long())


def _bags(tokens: Tensor) -> Tensor:
    if tokens.shape[1] <= PLACED:
        tokens = tokens * PLACED + torch.arange(tokens.shape[1])
    counts = torch.zeros(len(tokens), BAGS)
    return counts.scatter_add_(1, (tokens * 2654435761 % 1000003) % BAGS, torch.ones(tokens.shape))


def target_numbers(target: Tensor, rows: int) -> Tensor | None:
    """The targets as (n, k) floating numbers or (n, 1) class numbers or (n, length) tokens; None where there is not
    a small number of them a row, or none differ."""
    if target.numel() % rows or not is_dense(target) or not target.is_cpu or target.is_complex():
        return None
    flat = target.detach().reshape(rows, -1)
    fits = flat.shape[1] <= WIDEST_TARGET and (len(target) == rows or not flat.is_floating_point())
    if not fits or not bool((flat != flat[:1]).any()) or not bool(flat.isfinite().all()):
        return None
    if torch.equal(flat[:, 0], torch.arange(rows).to(flat)):
        return None  # which example of the batch is meant, as in contrastive learning
    return flat.float().clone() if flat.is_floating_point() else flat.long().clone()


def standardised(rows: Tensor) -> Tensor:
    """The rows (n, d) in float64, each column of mean 0 and deviation 1, or 0."""
    wide = rows.double()
    return (wide - wide.mean(0)) / wide.std(0).clamp_min(1e-12)


def kernel_of(inputs: Sequence[Tensor], whole: Sequence[bool]) -> Tensor:
    """The similarity of rows over several tensors of features (n, d), centred, each of one size; float64, made
    from distances in float32."""
    kernels = []
    for features, counted in zip(inputs, whole, strict=True):
        directions = normalize(features) if counted else None
        alike = similarity(standardised(features).float()) if directions is None else directions @ directions.T
        own = centred(alike)
        kernels.append(own.div_(own.norm().clamp_min(1e-300)))
    return torch.stack(kernels).sum(0) if len(kernels) > 1 else kernels[0]


def target_columns(targets: Tensor) -> Tensor:
    """Columns whose products are the similarity of targets, at most 16: of classes one each, of numbers themselves
    and their squares, of sequences how often each token occurs."""
    if targets.is_floating_point():
        flat = standardised(targets)
        columns = torch.cat([flat, flat.square() - 1], 1) if flat.shape[1] <= TARGET_COLUMNS // 2 else flat
    elif targets.shape[1] == 1:
        classes = targets[:, 0].unique(return_inverse=True)[1]
        columns = one_hot(classes, int(classes.max()) + 1).double()
    else:
        columns = normalize(_bags(targets).double())
    if columns.shape[1] > TARGET_COLUMNS:
        generator = torch.Generator().manual_seed(0)
        mixed = torch.randn(columns.shape[1], TARGET_COLUMNS, generator=generator, dtype=torch.float64)
        columns = columns @ mixed
    return columns


def told_apart(prediction: Tensor, targets: Tensor) -> float:
    """How well outputs (n, ...) say the targets: the squared correlation of numbers, or the accuracy over that of
    the most frequent class; NaN where that is not known."""
    n = len(targets)
    if targets.is_floating_point():
        if prediction.numel() != targets.numel():
            return math.nan
        out, expected = prediction.detach().double().reshape(n, -1), targets.double()
        out, expected = out - out.mean(0), expected - expected.mean(0)
        sizes = float(out.norm() * expected.norm())
        return (float((out * expected).sum()) / sizes) ** 2 if sizes > 0 else 0.0
    if targets.shape[1] != 1 or prediction.ndim != 2 or len(prediction) != n:
        return math.nan
    labels = targets[:, 0]
    most = float(labels.unique(return_counts=True)[1].max()) / n
    right = float((prediction.detach().argmax(1) == labels).double().mean())
    return (right - most) / (1 - most)
