"""What changed from one checkpoint to the next, and where."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diag.display import format_share
from diag.errors import named
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.external.saved import Saved, entry_blocks, numbers_in

SOURCE = "arithmetic of the two files"
NAMED, BARS = 3, 16


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedChanges(Result):
    """A change is the norm of the difference over the norm that the weight had before."""

    earlier: str = measured("the file before this one")
    change: float = measured("norm of the difference of all weights, over their norm before", unit="share")
    changes: dict[str, float] = measured("the same for each weight that both files hold", unit="share")
    unchanged: tuple[str, ...] = measured("weights that are the same, bit for bit")
    added: tuple[str, ...] = measured("weights that only this file holds")
    removed: tuple[str, ...] = measured("weights that only the file before holds")
    reshaped: tuple[str, ...] = measured("weights whose shape is another")

    def verdict(self) -> Verdict:
        """A warning where nothing changed at all."""
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        about: dict[str, Any] = {"source": SOURCE, "confidence": Confidence.ARITHMETIC, "value": self.change}
        if len(self.unchanged) == len(self.changes):
            return Verdict(
                Level.WARNING,
                f"Nothing changed since {self.earlier}: all {len(self.changes):,} weights that both files hold are "
                f"the same, bit for bit.{self._others()}",
                advice="Look whether the training that lies between took any step, and whether the right state was "
                "saved.",
                refutation="One entry that differs.",
                threshold=0.0,
                **about,
            )
        worst = sorted(self.changes, key=self._order, reverse=True)
        most = ", ".join(f"{name} ({_percent(self.changes[name])})" for name in worst[:NAMED])
        still = f" {len(self.unchanged):,} of {len(self.changes):,} did not change: {named(self.unchanged)}."
        return Verdict(
            Level.DESCRIPTION,
            f"Since {self.earlier} the weights moved by {format_share(self.change)} of their norm, most of "
            f"all {most}.{still if self.unchanged else ''}{self._others()}",
            layers=tuple(worst[:NAMED]),
            **about,
        )

    def _order(self, name: str) -> float:
        value = self.changes[name]
        return math.inf if math.isnan(value) else value

    def _others(self) -> str:
        parts = (("New", self.added), ("Gone", self.removed), ("Of another shape", self.reshaped))
        return "".join(f" {what}: {named(names)}." for what, names in parts if names)

    def plot(self, ax: Any = None) -> Any:
        """The weights that changed most."""
        finite = {n: v for n, v in self.changes.items() if math.isfinite(v)}
        names = sorted(finite, key=finite.__getitem__)[-BARS:]
        ax.barh(names or ["none"], [100 * finite[n] for n in names] or [0])
        ax.set(xlabel="change (% of the norm before)", ylabel="weight")


@instrument(
    source=SOURCE,
    title="Changes between the files",
    kind=Kind.CHECK,
    why="It says which part of a network a training changed, and whether it changed anything at all.",
    formula="|W_after - W_before| / |W_before|",
)
def saved_changes(saved: Saved) -> SavedChanges:
    """How far each weight of a checkpoint is from what it was in the one before.

    saved: the checkpoint file, with the state of the one before. A warning where no weight changed at all; all
    else is told and not judged. Raises nothing of its own.
    """
    before, after = numbers_in(saved.previous or {}), saved.weights()
    shared = {n: (before[n], w) for n, w in after.items() if n in before and before[n].shape == w.shape}
    moved = {name: _squares(*pair) for name, pair in shared.items()}
    moved_by, were = (sum(part[i] for part in moved.values()) for i in (0, 1))
    detail = "there is no earlier file." if saved.previous is None else "the two files share no weight."
    return SavedChanges(
        earlier=saved.previous_name,
        change=_ratio(moved_by, were),
        changes={name: _ratio(*squares) for name, squares in moved.items()},
        unchanged=tuple(name for name, (a, b) in shared.items() if _same(a, b)),
        added=_missing(after, saved.previous or {}),
        removed=_missing(before, saved.state),
        reshaped=tuple(n for n, w in after.items() if n in before and before[n].shape != w.shape),
        preconditions=(Precondition("an earlier file", bool(shared), detail),),
    )


def _missing(names: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in other)


def _squares(before: Tensor, after: Tensor) -> tuple[float, float]:
    moved = were = 0.0
    for a, b in entry_blocks(before, after):
        moved, were = moved + float((b - a).square().sum()), were + float(a.square().sum())
    return moved, were


def _percent(change: float) -> str:
    return "from zero" if math.isinf(change) else format_share(change)


def _ratio(moved: float, were: float) -> float:
    """Relative to nothing, any move is infinite."""
    if moved == 0:
        return 0.0
    return math.sqrt(moved / were) if were else math.inf


def _same(before: Tensor, after: Tensor) -> bool:
    return all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in entry_blocks(before, after))
