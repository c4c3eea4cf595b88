"""Finite numbers: whether weights or an optimizer's state in a checkpoint hold NaN or infinity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diag.errors import named
from diag.instruments.causes import Cause
from diag.instruments.graded import graded
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Result, Verdict, measured
from diag.snapshot.external.saved import Saved, entry_blocks, numbers_in

SOURCE = "arithmetic of the file"


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedFinite(Result):
    """Entries that are NaN or infinite. A tensor of zeros and minus infinities is an attention mask and not
    counted."""

    entries: int = measured("entries of the weights that are NaN or infinite")
    tensors: tuple[str, ...] = measured("the weights that hold such entries")
    optimizer_entries: int = measured("the same in the state of the optimizer")
    looked_at: int = measured("weights that were looked at")

    def verdict(self) -> Verdict:
        """An alarm for any such entry."""
        all_entries = self.entries + self.optimizer_entries
        verdict = graded(SOURCE, float(all_entries), 0.0, "any entry at all", confidence=Confidence.ARITHMETIC)
        if not all_entries:
            return verdict(Level.OK, f"All numbers in {self.looked_at:,} weights are finite.")
        where = named(self.tensors)
        weights = f"{self.entries:,} entries in {len(self.tensors):,} of {self.looked_at:,} weights ({where})"
        states = f"{self.optimizer_entries:,} entries of the optimizer's state"
        found = " and ".join(text for text, n in ((weights, self.entries), (states, self.optimizer_entries)) if n)
        return verdict(
            Level.ALARM,
            f"The file holds NaN or infinity: {found}.",
            advice="Go back to an earlier file; look for the first loss or gradient that was not finite.",
            refutation="The same tensors, loaded again, hold finite numbers only.",
            layers=self.tensors,
            cause=Cause.NOT_FINITE,
        )

    def plot(self, ax: Any = None) -> Any:
        """How many weights hold such entries."""
        ax.bar(["not finite", "finite"], [len(self.tensors), self.looked_at - len(self.tensors)])
        ax.set(xlabel="the file's tensors", ylabel="weights")


@instrument(
    source=SOURCE,
    title="Finite numbers in the file",
    kind=Kind.CHECK,
    why="A checkpoint with a NaN gives NaN wherever it is used; it is better to know before the older ones "
    "are deleted.",
)
def saved_finite(saved: Saved) -> SavedFinite:
    """Whether weights or an optimizer's state in a checkpoint hold NaN or infinity.

    saved: the checkpoint file. A tensor that holds zeros and minus infinities only is a mask, and left alone. Any
    other such entry is an alarm. Raises nothing of its own.
    """
    weights = saved.weights()
    counts = {name: _broken(value) for name, value in weights.items()}
    return SavedFinite(
        entries=sum(counts.values()),
        tensors=tuple(name for name, count in counts.items() if count),
        optimizer_entries=sum(_broken(t) for o in saved.optimizers.values() for t in moments(o)),
        looked_at=len(weights),
    )


def moments(optimizer: Any) -> Iterable[Tensor]:
    """Every tensor of floating-point numbers in an optimizer's state."""
    states = optimizer.get("state")
    for state in states.values() if isinstance(states, Mapping) else ():
        if isinstance(state, Mapping):
            yield from numbers_in({str(k): v for k, v in state.items()}).values()


def _broken(value: Tensor) -> int:
    bad = masked = others = 0
    for (block,) in entry_blocks(value):
        finite = block.isfinite()
        bad += int((~finite).sum())
        masked += int((block == -torch.inf).sum())
        others += int((block[finite] != 0).sum())
    return 0 if bad == masked and not others else bad
