"""The optimizer's state in a checkpoint: whether it fits the weights beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diag.errors import named
from diag.instruments.graded import graded
from diag.registry import Kind, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.external.saved import Saved, entry_blocks, numbers_in

SOURCE = "arithmetic of the file: torch.optim.Optimizer.state_dict"
# Under these names torch's optimizers keep a tensor of the parameter's own shape.
OF_THE_SHAPE = frozenset(
    [
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "exp_inf",
        "momentum_buffer",
        "square_avg",
        "grad_avg",
        "acc_delta",
        "sum",
        "ax",
        "prev",
    ]
)
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf")


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedOptimizer(Result):
    """Counts over all optimizers in the file."""

    parameters: int = measured("parameters that the optimizers' groups list")
    states: int = measured("parameters of which a state is kept")
    unlisted: tuple[str, ...] = measured("states of parameters that no group lists")
    misfits: tuple[str, ...] = measured("states whose shape no weight in the file has")
    negative: tuple[str, ...] = measured("running means of squares that are negative")

    def verdict(self) -> Verdict:
        """An alarm for what cannot be, a warning for what does not fit the weights beside it."""
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        wrong = [text for text in (self._impossible(), self._unfit()) if text]
        verdict = graded(SOURCE, float(self._bad), 0.0, "any that does not fit", confidence=Confidence.ARITHMETIC)
        if not wrong:
            return verdict(
                Level.OK,
                f"The optimizer's state fits: it has a state of {self.states:,} of {self.parameters:,} parameters, "
                "and no shape contradicts the weights in the file.",
            )
        return verdict(
            Level.ALARM if self._impossible() else Level.WARNING,
            f"The optimizer's state does not fit: {'; '.join(wrong)}.",
            advice="Do not go on from this file with this optimizer: take weights and optimizer from one "
            "save, or begin with a new optimizer.",
            refutation="optimizer.load_state_dict and one step of it raise nothing, and the parameters are "
            "in the order in which they were saved.",
        )

    @property
    def _bad(self) -> int:
        return len(self.unlisted) + len(self.misfits) + len(self.negative)

    def _impossible(self) -> str:
        parts = [f"no group lists the parameters {named(self.unlisted)}"] if self.unlisted else []
        parts += [f"means of squares are negative ({named(self.negative)})"] if self.negative else []
        return "; ".join(parts)

    def _unfit(self) -> str:
        return f"no weight in the file has the shape of {named(self.misfits)}" if self.misfits else ""

    def plot(self, ax: Any = None) -> Any:
        """How many parameters have a state, and how many states do not fit."""
        ax.bar(["listed", "with a state", "do not fit"], [self.parameters, self.states, self._bad])
        ax.set(xlabel="parameters of the optimizers", ylabel="number")


@instrument(
    source=SOURCE,
    title="Optimizer's state in the file",
    kind=Kind.CHECK,
    why="A training that goes on from an optimizer's state that does not fit fails, or starts over without "
    "its moments.",
)
def saved_optimizer(saved: Saved) -> SavedOptimizer:
    """Whether the optimizer's state in a checkpoint fits the weights beside it.

    saved: the checkpoint file. A state of a parameter that no group lists, or a negative mean of squares, is an
    alarm; a moment whose shape no tensor in the file has is a warning, as it may belong to weights that were not
    saved. States that are flat or packed by design are not compared. Raises nothing of its own.
    """
    found = [_looked_at(name, value, saved.shapes) for name, value in saved.optimizers.items()]
    some = Precondition("an optimizer", bool(found), "the file holds no state of an optimizer.")
    return SavedOptimizer(
        parameters=sum(len(f.listed) for f in found),
        states=sum(f.states for f in found),
        unlisted=tuple(text for f in found for text in f.unlisted),
        misfits=tuple(text for f in found for text in f.misfits),
        negative=tuple(text for f in found for text in f.negative),
        preconditions=(some,),
    )


@dataclass(frozen=True)
class _Found:
    listed: frozenset[Any]
    states: int
    unlisted: tuple[str, ...]
    misfits: tuple[str, ...]
    negative: tuple[str, ...]


def _looked_at(name: str, optimizer: Mapping[str, Any], shapes: frozenset[tuple[int, ...]]) -> _Found:
    listed = frozenset(_listed(optimizer.get("param_groups")))
    states = optimizer.get("state")
    states = states if isinstance(states, Mapping) else {}
    entries = list(_moments(states))
    flat = entries and all(value.ndim == 1 for _, _, value in entries)  # a sharded optimizer may keep flat pieces
    return _Found(
        listed=listed,
        states=len(states),
        unlisted=tuple(str(key) for key in states if key not in listed),
        misfits=()
        if flat
        else tuple(
            f"{entry} of parameter {key} {tuple(v.shape)}" for key, entry, v in entries if _unfit(v, shapes)
        ),
        negative=tuple(f"{e} of parameter {key}" for key, e, v in entries if e in SQUARES and _negative(v)),
    )


def _unfit(value: Tensor, shapes: frozenset[tuple[int, ...]]) -> bool:
    return tuple(value.shape) not in shapes


def _listed(groups: Any) -> Iterator[Any]:
    for group in groups if isinstance(groups, (list, tuple)) else ():
        listed = group.get("params") if isinstance(group, Mapping) else None
        yield from listed if isinstance(listed, (list, tuple)) else ()


def _moments(states: Mapping[Any, Any]) -> Iterator[tuple[str, str, Tensor]]:
    """What is kept of each parameter in a tensor of its own shape: (parameter, name, tensor)."""
    for key, state in states.items():
        kept = numbers_in({str(k): v for k, v in state.items()}) if isinstance(state, Mapping) else {}
        yield from ((str(key), entry, value) for entry, value in kept.items() if entry in OF_THE_SHAPE)


def _negative(value: Tensor) -> bool:
    return any(bool((block < 0).any()) for (block,) in entry_blocks(value))
