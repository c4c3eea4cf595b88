"""Cosines of the groups' mean gradients with their errors, from sums of products over parts of the examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diag.linalg.coherence import across_halves, noise_floor
from diag.linalg.student import factor


def mean_products(gram: Tensor, sizes: Tensor, left_out: int | None = None) -> Tensor:
    """(G, G): products of the groups' mean gradients, from sums over (group, block) parts."""
    groups, blocks = sizes.shape
    kept = torch.ones(blocks, dtype=torch.float64)
    if left_out is not None:
        kept[left_out] = 0
    products = torch.einsum("abcd,b,d->ac", gram.view(groups, blocks, groups, blocks), kept, kept)
    counts = sizes @ kept
    return products / (counts[:, None] * counts[None, :])


def cosines_of(products: Tensor) -> Tensor:
    """The cosines (G, G) from products of mean gradients; NaN where one of them vanishes."""
    lengths = products.diag().clamp_min(0).sqrt()
    sizes = lengths[:, None] * lengths[None, :]
    return torch.where(sizes > 0, products / sizes, math.nan)


def cosines_with_errors(gram: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines and their jackknife errors; a block that empties a group leaves the error unknown."""
    blocks = sizes.shape[1]
    left_out = torch.stack([cosines_of(mean_products(gram, sizes, b)) for b in range(blocks)])
    errors = ((blocks - 1) * (left_out - left_out.mean(0)).square().mean(0)).sqrt() * factor(blocks)
    return cosines_of(mean_products(gram, sizes)), errors


def corrected_cosine(gram: Tensor, sizes: Tensor, squares: Tensor, a: int, b: int) -> float:
    """The cosine with squared lengths from products of different examples; NaN where noise leaves no cosine."""
    products, counts = mean_products(gram, sizes), sizes.sum(1)
    own = (products.diag() * counts.square() - squares) / (counts * (counts - 1))
    size = float(own[a]) * float(own[b])
    found = float(products[a, b]) / math.sqrt(size) if float(own[a]) > 0 and float(own[b]) > 0 else math.nan
    return found if abs(found) <= 1 else math.nan


def length_kept(products: Tensor) -> float:
    """The length of the summed gradient over the sum of the lengths; NaN where all vanish."""
    total = float(products.diag().clamp_min(0).sqrt().sum())
    return max(float(products.sum()), 0.0) ** 0.5 / total if total > 0 else math.nan


def lowest_pair(cosines: Tensor) -> tuple[int, int]:
    """The two groups with the smallest cosine; the first two where none is known."""
    upper = torch.triu_indices(len(cosines), len(cosines), 1)
    worst = torch.nan_to_num(cosines[upper[0], upper[1]], nan=math.inf).argmin()
    a, b = upper[:, worst].tolist()
    return a, b


def conflict_by_layer(found: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """The fields of each layer, from its sums over parts and its mean products."""
    lowest, across, floors = {}, {}, {}
    for name, (gram, products) in found.items():
        cosines, halves = cosines_of(products), across_halves(gram, len(products))
        a, b = lowest_pair(cosines)
        lowest[name], across[name] = float(cosines[a, b]), float(halves[a, b])
        floors[name] = noise_floor(halves, a, b)
    return {
        "lowest_by_layer": lowest,
        "lowest_across_halves_by_layer": across,
        "noise_floor_by_layer": floors,
        "length_kept_by_layer": {name: length_kept(products) for name, (_, products) in found.items()},
    }
