"""Sizes and number formats: what a checkpoint's weights are made of, without a judgement."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diag.display import format_number, format_share
from diag.errors import named
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Result, Verdict, measured
from diag.snapshot.external.saved import Saved, square_sum

SOURCE = "arithmetic of the file"


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedWeights(Result):
    """The size of a weight is the root of the mean of its squared entries."""

    entries: int = measured("numbers in all weights")
    norm: float = measured("norm of all weights together")
    sizes: dict[str, float] = measured("size of each weight: root mean square of its entries")
    formats: dict[str, float] = measured("share of the numbers in each format", unit="share")
    uneven: tuple[str, ...] = measured("weights whose format differs from that of layers of the same kind")

    def verdict(self) -> Verdict:
        """A description: no size or format is wrong by itself."""
        about: dict[str, Any] = {"source": SOURCE, "confidence": Confidence.ARITHMETIC, "layers": self.uneven}
        if not self.sizes:
            return Verdict(Level.NOT_APPLICABLE, "No verdict: the file holds no floating-point numbers.", **about)
        order = sorted(self.sizes, key=self.sizes.__getitem__)
        count = f"{len(order):,} weights hold {self.entries:,} numbers"
        span = f"the root mean square runs from {self._size(order[0])} to {self._size(order[-1])}"
        return Verdict(Level.DESCRIPTION, f"{count}, {self._formats()}; {span}.{self._differing()}", **about)

    def _size(self, name: str) -> str:
        return f"{format_number(self.sizes[name])} ({name})"

    def _formats(self) -> str:
        if len(self.formats) == 1:
            return f"all in {next(iter(self.formats))}"
        ordered = sorted(self.formats.items(), key=lambda item: -item[1])
        return ", ".join(f"{format_share(share)} in {name}" for name, share in ordered)

    def _differing(self) -> str:
        if not self.uneven:
            return ""
        return f" Layers of one kind differ in their format: {named(self.uneven)}."

    def plot(self, ax: Any = None) -> Any:
        """The sizes in the order of the file."""
        values = [v for v in self.sizes.values() if v > 0 and math.isfinite(v)]
        ax.plot(range(len(values)), values, marker="o", markersize=3, linestyle="")
        ax.set(xlabel="weight, in the order of the file", ylabel="root mean square", yscale="log")


@instrument(
    source=SOURCE,
    title="Weights in the file",
    kind=Kind.CHECK,
    why="Sizes and number formats tell whether the file is what it should be, and what it takes to load it.",
)
def saved_weights(saved: Saved) -> SavedWeights:
    """How large a checkpoint's weights are, and in which number formats.

    saved: the checkpoint file. Weights are of one kind where their names differ in numbers only. It judges nothing.
    Raises nothing of its own.
    """
    weights = saved.weights()
    squares = {name: square_sum(value) for name, value in weights.items()}
    entries = sum(w.numel() for w in weights.values())
    formats: Counter[str] = Counter()
    for value in weights.values():
        formats[_format(value)] += value.numel()
    return SavedWeights(
        entries=entries,
        norm=math.sqrt(sum(squares.values())),
        sizes={n: math.sqrt(s / weights[n].numel()) for n, s in squares.items()},
        formats={n: c / entries for n, c in formats.items()},
        uneven=_uneven(weights),
    )


def _format(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _uneven(weights: dict[str, Tensor]) -> tuple[str, ...]:
    """Weights in another format than most of those whose names differ from theirs in numbers only."""
    kinds: dict[str, list[str]] = {}
    for name in weights:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    found = []
    for names in kinds.values():
        usual, _ = Counter(_format(weights[n]) for n in names).most_common(1)[0]
        found += [n for n in names if _format(weights[n]) != usual]
    return tuple(found)
