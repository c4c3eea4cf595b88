"""A standard form of a network under its linear symmetries, in which what is left to match is orthogonal.

Of all networks that scales and invertible maps make of one, take the one whose writers and readers are balanced: of
each ReLU unit the weights into and out of it have one length, of each head's query and key (value and output) one
Gram matrix, which is where the sum of their squares is smallest. Gains of norms are put into what reads them. Two
networks that differ by these maps have standard forms that differ by a rotation, a permutation and signs only.

Source: the balanced factorisation of a product, as for Du, Hu & Lee 2018 (arXiv:1806.00900); gains as in Ashkboos
et al. 2024 (arXiv:2401.15024, section 3.2).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from diag.connectivity.symmetries.linear_groups import SQUARE, LinearGroup, LinearSymmetries, Move

SWEEPS = 100
SETTLED = 1e-12  # relative change of every map in a sweep
LEAST_NORM_GAIN = 1e-3  # of the largest of its norm: a smaller one would blow up what reads it
WELL_CONDITIONED = 1e-10  # smallest eigenvalue of a Gram matrix over the largest


def usable_gains(linear: LinearSymmetries, *states: Mapping[str, Tensor]) -> set[str]:
    """The groups of gains that no state has a gain near zero in."""
    found = set()
    for group in linear.groups.values():
        if group.gain is not None:
            sizes = [group.gain.rows(s).abs() for s in states]
            if all(float(x.min()) > LEAST_NORM_GAIN * float(x.max()) for x in sizes):
                found.add(group.name)
    return found


def standard_form(linear: LinearSymmetries, state: Mapping[str, Tensor], gains: Collection[str]) -> list[Move]:
    """The moves that bring `state` (float64) into its standard form. gains: the groups whose gains become one."""
    moves = linear.unit_gains(state, [n for n in linear.groups if n in gains])
    now = linear.apply(moves, state)
    free = [g for g in linear.of_kind("scale", "invertible", "plane") if g.gain is None]
    for _ in range(SWEEPS):
        largest = 0.0
        for group in free:
            map_ = _balancing(group, now)
            still = torch.eye(group.size, dtype=map_.dtype) if group.kind in SQUARE else torch.ones(())
            largest = max(largest, float((map_ - still).abs().max()))
            now = linear.apply([(group.name, map_)], now)
            moves.append((group.name, map_))
        if largest < SETTLED:
            break
    return moves


def undone(linear: LinearSymmetries, moves: Sequence[Move]) -> list[Move]:
    """The moves that take these back."""
    square = {n for n, g in linear.groups.items() if g.kind in SQUARE}
    return [(n, torch.linalg.inv(m) if n in square else 1 / m) for n, m in reversed(moves)]


def _balancing(group: LinearGroup, state: Mapping[str, Tensor]) -> Tensor:
    sides = [[s.rows(state) for s in group.slots if s.action == action] for action in (1, -1)]
    if group.kind == "plane":  # both units of a plane alike
        ratio = _balanced(*(torch.cat([r.flatten(-2) for r in side], -1) for side in sides))
        return ratio[..., None, None] * torch.eye(2, dtype=ratio.dtype)
    if not all(sides):  # nothing reads the length of these weights (a direction): it is made one
        return 1 / torch.cat(sides[0] or sides[1], -1).norm(dim=-1)
    writers, readers = (torch.cat(side, -1) for side in sides)
    if group.kind == "scale":
        return _balanced(writers, readers)
    grams = [w @ w.transpose(-1, -2) for w in (writers, readers)]
    return _between(*grams)


def _balanced(writers: Tensor, readers: Tensor) -> Tensor:
    ratio = readers.norm(dim=-1) / writers.norm(dim=-1)
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0).sqrt()


def _between(writers: Tensor, readers: Tensor) -> Tensor:
    """The symmetric G with G C_w G = G^-1 C_r G^-1: the root of the geometric mean of C_w^-1 and C_r."""
    values = [torch.linalg.eigvalsh(c) for c in (writers, readers)]
    if not all(bool((v[..., 0] > WELL_CONDITIONED * v[..., -1]).all()) for v in values):
        return torch.eye(writers.shape[-1], dtype=writers.dtype).expand_as(writers).clone()
    root = _power(writers, 0.5)
    inverse = _power(writers, -0.5)
    return _power(inverse @ _power(root @ readers @ root, 0.5) @ inverse, 0.5)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.transpose(-1, -2)) / 2)
    return (vectors * values.clamp_min(0).pow(exponent)[..., None, :]) @ vectors.transpose(-1, -2)
