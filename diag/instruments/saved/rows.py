"""Rows: units of a checkpoint's weights that are zero throughout, or the same as another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diag.display import format_share
from diag.errors import named
from diag.instruments.causes import Cause
from diag.instruments.graded import graded
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.external.saved import SAVED_ENTRIES_AT_ONCE, Saved

SOURCE = "arithmetic of the file: units with equal weights compute the same"
FEW_ROWS = 4
SHARE, COUNT = 1 / 3, 2  # of the weights: copies throughout are how the network began, and no single branch
BIT_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedRows(Result):
    """A row is what makes one unit; looked at are weights of two or more axes and at least four rows."""

    zero: int = measured("rows that are zero throughout")
    repeated: int = measured("rows that are the same, bit for bit, as an earlier row that is not zero")
    rows: int = measured("rows that were looked at")
    with_zero: dict[str, int] = measured("the weights with rows of zeros, and how many each has")
    with_repeated: dict[str, int] = measured("the weights with repeated rows, and how many each has")
    uniform: tuple[str, ...] = measured("the weights all of whose rows are the same")
    looked_at: int = measured("weights that were looked at")

    def verdict(self) -> Verdict:
        """A warning where whole weights are copies; single rows are told and not judged."""
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        share = len(self.uniform) / self.looked_at
        verdict = graded(SOURCE, share, SHARE, confidence=Confidence.ARITHMETIC)
        if len(self.uniform) >= COUNT and share >= SHARE:
            return verdict(
                Level.WARNING,
                f"In {len(self.uniform):,} of {self.looked_at:,} weights ({format_share(share)}) all rows are the "
                f"same: {named(self.uniform)}; such units compute the same, and training keeps them alike.",
                advice="If this network has been trained, start its weights at random; if it has not, this "
                "is how it starts.",
                refutation="Two rows of such a weight that differ.",
                layers=self.uniform,
                cause=Cause.INITIALIZATION_CONSTANT,
                explained_by=(Cause.NOT_FINITE,),
            )
        if self.zero or self.repeated:
            return verdict(Level.DESCRIPTION, self._told(), layers=(*self.with_zero, *self.with_repeated))
        return verdict(Level.OK, f"No two of the {self.rows:,} rows are the same, and none is zero.")

    def _told(self) -> str:
        zero = f"{self.zero:,} are zero throughout (in {named(list(self.with_zero))})"
        repeated = f"{self.repeated:,} are the same as another (in {named(list(self.with_repeated))})"
        found = " and ".join(text for text, n in ((zero, self.zero), (repeated, self.repeated)) if n)
        return f"Of {self.rows:,} rows {found}."

    def plot(self, ax: Any = None) -> Any:
        """The weights with most such rows."""
        names = sorted({*self.with_zero, *self.with_repeated}, key=self._many, reverse=True)[:12]
        ax.barh(names or ["none"], [self._many(n) for n in names] or [0])
        ax.set(xlabel="rows that are zero or repeated", ylabel="weight")

    def _many(self, name: str) -> int:
        return self.with_zero.get(name, 0) + self.with_repeated.get(name, 0)


@instrument(
    source=SOURCE,
    title="Rows of the weights in the file",
    kind=Kind.CHECK,
    why="Rows that are zero or copies of each other are units that add nothing.",
)
def saved_rows(saved: Saved) -> SavedRows:
    """Rows of a checkpoint's weights that are zero throughout, or the same as another, bit for bit.

    saved: the checkpoint file. A warning where in at least two weights, and a third of all, every row is the same;
    single rows (padding of an embedding, pruned units, a branch that starts at zero) are told and not judged.
    Raises nothing of its own.
    """
    weights = {
        n: w.detach().flatten(1)
        for n, w in saved.weights().items()
        if w.ndim >= 2 and len(w) >= FEW_ROWS and w.numel() > len(w)
    }
    found = {name: zero_and_repeated(rows) for name, rows in weights.items()}
    zero = {n: z for n, (z, _) in found.items() if z}
    repeated = {n: r for n, (_, r) in found.items() if r}
    uniform = tuple(n for n, (z, r) in found.items() if z == len(weights[n]) or r == len(weights[n]) - 1)
    some = Precondition("weights", bool(weights), "the file has no weight of two axes and at least four rows.")
    return SavedRows(
        zero=sum(zero.values()),
        repeated=sum(repeated.values()),
        rows=sum(map(len, weights.values())),
        with_zero=zero,
        with_repeated=repeated,
        uniform=uniform,
        looked_at=len(weights),
        preconditions=(some,),
    )


def zero_and_repeated(rows: Tensor) -> tuple[int, int]:
    """How many rows of a matrix are zero, and how many others are the same as an earlier row; NaN is like
    nothing."""
    hashes, zero, finite = [], [], []
    step = max(1, SAVED_ENTRIES_AT_ONCE // rows.shape[1])
    factors = _odd_numbers(rows.shape[1])
    for part in rows.split(step):
        whole = part + 0.0 if part.itemsize > 1 else part  # minus zero becomes zero
        bits = whole.contiguous().view(BIT_TYPES[part.itemsize]).to(torch.int64)
        hashes.append((bits * factors).sum(1))  # wraps around, exactly
        zero.append((bits == 0).all(1))
        finite.append((part if part.itemsize > 1 else part.float()).isfinite().all(1))
    usable = torch.cat(finite) & ~torch.cat(zero)
    at = usable.nonzero().flatten()
    _, group, counts = torch.cat(hashes)[at].unique(return_inverse=True, return_counts=True)
    candidates = at[counts[group] > 1]
    return int(torch.cat(zero).sum()), _repeated(rows, candidates)


def _repeated(rows: Tensor, candidates: Tensor) -> int:
    """Rows with equal hashes are compared themselves."""
    return len(candidates) - len({(rows[i].double() + 0.0).numpy().tobytes() for i in candidates})


def _odd_numbers(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 1 << 62, (count,), generator=generator) * 2 + 1
