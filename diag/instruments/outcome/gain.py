"""What a network gains over an answer that does not look at the inputs: the class frequencies, or one number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diag.linalg.student import error_of_mean

# Losses between numbers whose best constant answer is the mean of the targets, or near it.
LOSSES_OF_NUMBERS: dict[str, Callable[..., Tensor]] = {
    "mse_loss": F.mse_loss, "smooth_l1_loss": F.smooth_l1_loss, "huber_loss": F.huber_loss,
}  # fmt: skip


class Answered(NamedTuple):
    """What is known of n examples: their losses (n,), logits (n, classes) with labels (n,), or targets (n, ...)."""

    losses: Tensor | None
    logits: Tensor | None
    labels: Tensor | None
    targets: Tensor | None


def gain(examples: Answered, training: Answered, loop: Any) -> tuple[float, float]:
    """How far the examples' losses are below those of the answer without inputs that training's labels (else
    targets) give, and the standard error of that; NaN where it cannot be known."""
    if training.labels is not None:
        return gain_of_classes(examples.logits, examples.labels, training.labels)
    return gain_of_numbers(examples.losses, examples.targets, training.targets, loss_of_numbers(loop))


def loss_of_numbers(loop: Any) -> str:
    """The loss function, where the loop's loss is the mean of one of these and nothing else; "" otherwise."""
    losses = () if loop is None else loop.losses
    names = {f.function for f in losses}
    plain = all(f.reduction == "mean" and f.root and f.factor == 1 for f in losses)
    return names.pop() if plain and len(names) == 1 and names <= set(LOSSES_OF_NUMBERS) else ""


def gain_of_classes(logits: Tensor | None, labels: Tensor | None, known: Tensor | None) -> tuple[float, float]:
    """How far the cross-entropy is below that of the class frequencies of the `known` labels (each counted once
    more than it occurs), and the standard error of that; NaN where it cannot be known."""
    if known is None or len(known) < 2 or logits is None or labels is None or len(logits) != len(labels):
        return math.nan, math.nan
    counts = torch.bincount(known, minlength=logits.shape[1]).double() + 1.0
    own = F.cross_entropy(logits.double(), labels, reduction="none")
    return _mean_and_error(-(counts / counts.sum()).log()[labels] - own)


def gain_of_numbers(
    losses: Tensor | None, targets: Tensor | None, known: Tensor | None, function: str
) -> tuple[float, float]:
    """How far the losses are below those of the mean of the `known` targets, and the standard error of that; NaN
    where it cannot be known."""
    if not function or known is None or losses is None or targets is None or len(known) < 2:
        return math.nan, math.nan
    if len(targets) != len(losses):
        return math.nan, math.nan
    mean = known.double().mean(0).expand_as(targets)
    theirs = LOSSES_OF_NUMBERS[function](mean, targets.double(), reduction="none")
    return _mean_and_error(theirs.reshape(len(targets), -1).mean(1) - losses.double())


def _mean_and_error(differences: Tensor) -> tuple[float, float]:
    return float(differences.mean()), error_of_mean(differences)


def share_of_most_frequent(labels: Tensor | None) -> float:
    """The share of the most frequent class; NaN without labels."""
    return math.nan if labels is None else float(labels.bincount().max() / len(labels))


def share_right(logits: Tensor | None, labels: Tensor | None) -> float:
    """The share of the examples whose label has the largest logit; NaN without classes."""
    if logits is None or labels is None or len(logits) != len(labels):
        return math.nan
    return float((logits.argmax(1) == labels.to(logits.device)).double().mean())
