"""Padding of sequences: one number that fills the ends of rows and stands nowhere else."""

from __future__ import annotations

from torch import Tensor


def padding_of(rows: Tensor) -> tuple[int, float] | None:
    """The number that fills the ends of the sequences `rows` (n, length), to different lengths, and stands nowhere
    else; and the share of all that it is. None where there is none, at the ends or the beginnings."""
    return _filling(rows) or _filling(rows.flip(1))


def _filling(rows: Tensor) -> tuple[int, float] | None:
    value = rows[:, -1].mode().values
    alike = rows == value
    lengths = alike.flip(1).long().cumprod(1).sum(1)
    filled = int(lengths.sum())
    long_enough = int((lengths >= 2).sum()) * 4 >= len(rows)
    if filled != int(alike.sum()) or not long_enough or len(lengths.unique()) < 2:
        return None
    return int(value), filled / rows.numel()
