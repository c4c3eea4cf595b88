"""Whether two sets of variables depend on each other, from pairs of examples: the Hilbert-Schmidt criterion.

HSIC is the mean product of two kernels, both centred: zero for independent variables, and with a Gaussian kernel on
either side only for them. Its distribution without dependence is that over permutations of one side (Gretton et al.
2008, "A kernel statistical test of independence", NIPS 20).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from diag.snapshot.batch import tensors_in

PERMUTATIONS = 199
MOST_COMPARED = 256  # pairs
FEWEST_WITH_AN_EQUAL = 0.05  # of all pairs of rows of whole numbers
WIDEST = 1024  # columns of the inputs that are compared
NUMBERS = 16  # columns of the targets
PLACES = 128  # of a sequence of tokens


def independence_p_value(inputs: Tensor | Sequence[Tensor], answers: Tensor, seed: int = 0) -> float:
    """How often shuffled answers are as far from the usual fit as the real ones: the p-value of the test.

    Two-sided, as answers may follow from the inputs and be less similar for similar inputs (sums of two numbers
    modulo a third are).

    inputs (n, ...), numbers or whole numbers (tokens), or several of them, whose kernels are added; answers (n,)
    class numbers or (n, ...) numbers. At least 1 / 100.
    """
    several = [inputs] if isinstance(inputs, Tensor) else inputs
    kernel = _centred(torch.stack([_kernel(t) for t in several]).sum(0))
    columns = _columns(answers).to(kernel)
    generator = torch.Generator().manual_seed(seed)
    n, k = columns.shape
    orders = [torch.arange(n), *(torch.randperm(n, generator=generator) for _ in range(PERMUTATIONS))]
    shuffled = torch.cat([columns[order.to(columns.device)] for order in orders], 1)
    found = (shuffled * (kernel @ shuffled)).sum(0).reshape(len(orders), k).sum(1)
    near = 1e-9 * found.abs().max()
    sides = (found >= found[0] - near), (found <= found[0] + near)
    return min(1.0, 2 * min(float(side.double().mean()) for side in sides))


def feature_p_value(inputs: Any, answers: Tensor) -> float:
    """The p-value of the strongest correlation between a feature of the inputs and an answer, as of so many tried
    (Bonferroni): what a kernel over all features does not see among many that say nothing.

    inputs: rows of numbers (n, d), else the value is 1; answers as above, (n, ...), of all rows.
    """
    rows = tensors_by_row(inputs)
    if len(rows) != 1 or rows[0].ndim != 2 or not rows[0].is_floating_point() or len(rows[0]) != len(answers):
        return 1.0
    features, columns = _standard(rows[0].detach().double()), _standard(_columns(answers))
    n = len(features)
    strongest = float((features.T @ columns.to(features) / n).abs().nan_to_num(0.0).max().clamp(max=1 - 1e-12))
    t = strongest * math.sqrt((n - 2) / (1 - strongest**2))
    return min(1.0, 2 * float(stats.t.sf(t, n - 2)) * features.shape[1] * columns.shape[1])


def _standard(columns: Tensor) -> Tensor:
    return (columns - columns.mean(0)) / columns.std(0, correction=0).clamp_min(1e-12)


def tensors_by_row(inputs: Any) -> tuple[Tensor, ...]:
    """What a model is given, as tensors with the examples along the first axis: of one tensor that one, of batches
    of arguments (as `diag.snapshot.forward.inputs` has them) each argument put together. Empty where the batches
    differ in more than their number of examples."""
    if isinstance(inputs, Tensor):
        return (inputs,)
    batches = [tensors_in(batch) for batch in inputs] if isinstance(inputs, tuple) else []
    forms = {tuple((t.shape[1:], t.dtype) for t in batch) for batch in batches}
    whole = all(t.ndim and len(t) == len(batch[0]) and not t.is_complex() for batch in batches for t in batch)
    if len(forms) != 1 or not batches[0] or not whole:
        return ()
    return tuple(torch.cat([t.detach() for t in column]) for column in zip(*batches, strict=True))


def rows_compared(inputs: Any, answers: Tensor) -> tuple[Tensor, ...]:
    """The first 256 rows of what a model is given; empty where there is not one for each answer, where numbers that
    are compared are not finite, or where they are the same in all rows. Empty, too, for whole numbers of which
    hardly two rows share one, as of ids: such rows have nothing in common by which a test could tell."""
    rows = tensors_by_row(inputs)
    if any(len(t) != len(answers) for t in rows):
        return ()
    rows = tuple(t[:MOST_COMPARED] for t in rows)
    some = [columns_compared(t) for t in rows]
    if not any(t.is_floating_point() for t in some) and _share_with_an_equal(some) < FEWEST_WITH_AN_EQUAL:
        return ()
    finite = all(bool(t.isfinite().all()) for t in some)
    return rows if finite and any(bool((t != t[:1]).any()) for t in some) else ()


def _share_with_an_equal(columns: Sequence[Tensor]) -> float:
    """The share of all pairs of rows that have the same whole number at some place."""
    equal = torch.stack([column[:, None] == column for t in columns for column in t.T]).any(0)
    n = len(equal)
    return float((equal.sum() - n) / max(n * (n - 1), 1))


def columns_compared(inputs: Tensor) -> Tensor:
    """The inputs flat (n, d), of wide ones evenly spaced columns."""
    flat = inputs.detach().reshape(len(inputs), -1)
    return flat[:, :: max(1, flat.shape[1] // WIDEST)]


def _kernel(inputs: Tensor) -> Tensor:
    """For numbers a Gaussian of their distance, as wide as the median one; for whole numbers (tokens) the share of
    equal places plus the similarity of how often each token occurs."""
    flat = columns_compared(inputs)
    if not flat.is_floating_point():
        return _token_similarity(flat)
    flat = flat.double()
    if inputs.ndim == 2:
        flat = (flat - flat.mean(0)) / flat.std(0).clamp_min(1e-12)
    squared = torch.cdist(flat, flat).square()
    return torch.exp(-squared / squared[squared > 0].median().clamp_min(1e-12))


def _token_similarity(tokens: Tensor) -> Tensor:
    tokens = tokens[:, :: max(1, tokens.shape[1] // PLACES)]
    equal = torch.stack([column[:, None] == column for column in tokens.T]).double().mean(0)
    _, numbers = tokens.unique(return_inverse=True)
    counts = torch.zeros(len(tokens), WIDEST, dtype=torch.double, device=tokens.device)
    counts.scatter_add_(1, numbers % WIDEST, torch.ones_like(numbers, dtype=torch.double))
    counts = torch.nn.functional.normalize(counts)
    return equal + counts @ counts.T


def _columns(answers: Tensor) -> Tensor:
    """Columns whose products are the kernel of the answers: for classes one each, for numbers themselves and their
    squares."""
    if not answers.is_floating_point():
        return torch.nn.functional.one_hot(answers.unique(return_inverse=True)[1]).double()
    flat = answers.detach().double().reshape(len(answers), -1)[:, :NUMBERS]
    flat = (flat - flat.mean(0)) / flat.std(0).clamp_min(1e-12)
    return torch.cat([flat, flat.square() - 1], 1)


def _centred(kernel: Tensor) -> Tensor:
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
