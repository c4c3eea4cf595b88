"""Tied weights: names that shared one tensor in the checkpoint before and do not any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diag.instruments.graded import graded
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.external.saved import Saved, entry_blocks, numbers_in

SOURCE = "arithmetic of the two files"


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedTies(Result):
    """Pairs of names; weights are tied where the file keeps one tensor under both."""

    earlier: str = measured("the file before this one")
    tied: tuple[str, ...] = measured("pairs of names that are one tensor in this file")
    broken: tuple[str, ...] = measured("pairs that were one tensor in the file before and hold other numbers now")
    layers: tuple[str, ...] = measured("the names in the broken pairs")

    def verdict(self) -> Verdict:
        """A warning for a tie that broke."""
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        found = float(len(self.broken))
        verdict = graded(SOURCE, found, 0.0, "any tie that broke", confidence=Confidence.ARITHMETIC)
        if not self.broken:
            return verdict(Level.OK, self._kept())
        return verdict(
            Level.WARNING,
            f"Weights that were one tensor in {self.earlier} now hold different numbers: {_listed(self.broken)}.",
            advice="Tie them again after the model is built or loaded; a model that was converted, copied "
            "part by part or wrapped may have lost it.",
            refutation="Both names hold the same numbers when the file is loaded again.",
            layers=self.layers,
        )

    def _kept(self) -> str:
        if not self.tied:
            return f"Weights that were one tensor in {self.earlier} still hold the same numbers."
        return f"Weights are tied, and no tie broke: {_listed(self.tied)}."

    def plot(self, ax: Any = None) -> Any:
        """How many pairs are tied and how many broke."""
        ax.bar(["tied", "broken"], [len(self.tied), len(self.broken)])
        ax.set(xlabel="pairs of weights", ylabel="number")


@instrument(
    source=SOURCE,
    title="Tied weights in the files",
    kind=Kind.CHECK,
    why="Weights that should be one and are not any more make the loaded network another one than the "
    "network that was trained.",
)
def saved_ties(saved: Saved) -> SavedTies:
    """Whether weights that shared one tensor in the checkpoint before still hold the same numbers.

    saved: the checkpoint file, with the state of the one before. Only a file that keeps the sharing (torch.save;
    not safetensors, which keeps one of the names) tells that weights are tied; copies that are equal by chance of
    the start (an average, a target network) are none. A tie that broke is a warning. Raises nothing of its own.
    """
    before, after = numbers_in(saved.previous or {}), saved.weights()
    now, then = _shared(after), _shared(before)
    both = [(a, b) for a, b in then if a in after and b in after]
    broken = [(a, b) for a, b in both if (a, b) not in now and not _equal(after[a], after[b])]
    some = bool(both) or bool(now and saved.previous is None)
    return SavedTies(
        earlier=saved.previous_name,
        tied=tuple(map(_pair, now)),
        broken=tuple(map(_pair, broken)),
        layers=tuple(dict.fromkeys(name for pair in broken for name in pair)),
        preconditions=(Precondition("tied weights", some, "no two names of the files share a tensor."),),
    )


def _listed(pairs: tuple[str, ...]) -> str:
    return "; ".join(pairs[:3])


def _pair(names: tuple[str, str]) -> str:
    return f"{names[0]} and {names[1]}"


def _shared(state: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The first name and each other name of every tensor that is there more than once."""
    first: dict[Any, str] = {}
    pairs = []
    for name, value in state.items():
        place = (value.data_ptr(), tuple(value.shape), tuple(value.stride()), value.dtype)
        if place in first:
            pairs.append((first[place], name))
        first.setdefault(place, name)
    return pairs


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and all(bool((x == y).all()) for x, y in entry_blocks(a, b))
