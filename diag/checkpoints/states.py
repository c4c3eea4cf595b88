"""Which of the dicts in a checkpoint are the state of a model, and which an optimizer's.

Each dict is looked at once, so that one that holds itself, or the same one in a thousand places, costs no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from diag.errors import CheckpointError

DEEPEST = 60
# How a file that many programs write names what holds the model's state; in order of preference.
STATE_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights")


class StateDicts:
    """The state dicts among the nested dicts of `contents`.

    Raises CheckpointError where these are nested too deeply.
    """

    def __init__(self, contents: Any, path: Path) -> None:
        self._contents, self._path = contents, path
        self._known: dict[int, bool] = {}
        self._look_into(contents, 0)

    def is_one(self, value: Any) -> bool:
        """Whether it maps names to tensors (few other entries may be among them) and holds no other such dict."""
        return isinstance(value, Mapping) and self._known.get(id(value), False)

    def holds_one(self, value: Any) -> bool:
        """Whether it is a state dict, or has one under a usual name."""
        return self.is_one(value) or self._usual(value, self.is_one) is not None

    def wrapper(self, value: Any) -> str | None:
        """The usual name under which a dict holds a state dict, directly or one level deeper."""
        return self._usual(value, self.holds_one)

    @staticmethod
    def _usual(value: Any, test: Callable[[Any], bool]) -> str | None:
        return next((w for w in STATE_KEYS if test(value.get(w))), None) if isinstance(value, Mapping) else None

    def names(self) -> tuple[list[str], list[str]]:
        """Where the state dicts are, with dots between the keys, and where optimizers' states are."""
        seen: set[int] = set()
        states: list[str] = []
        optimizers: list[str] = []
        for name, value in self._walk(self._contents, "", seen):
            (optimizers if is_optimizer(value) else states).append(name)
        return states, optimizers

    def optimizers(self) -> dict[str, Any]:
        """The optimizers' states by where they are."""
        return dict(_optimizers(self._contents, "", set()))

    def shapes(self) -> frozenset[tuple[int, ...]]:
        """The shapes of all tensors that are no part of an optimizer's state."""
        return frozenset(_shapes(self._contents, set()))

    def _walk(self, value: Mapping[Any, Any], above: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
        if id(value) in seen:
            return
        seen.add(id(value))
        if is_optimizer(value):
            yield above.rstrip(".") or "the file", value
            return
        for key, inner in value.items():
            if self.is_one(inner):
                yield f"{above}{key}"[:200], inner
            elif isinstance(inner, Mapping):
                yield from self._walk(inner, f"{above}{key}."[:200], seen)

    def _look_into(self, value: Any, depth: int) -> bool:
        if not isinstance(value, Mapping):
            return False
        if id(value) not in self._known:
            if depth > DEEPEST:
                raise CheckpointError(
                    f"{self._path} holds dicts nested more than {DEEPEST} deep; save the weights alone."
                )
            self._known[id(value)] = False  # while it is looked into, and for good where it holds itself
            inside = [self._look_into(inner, depth + 1) for inner in value.values()]
            tensors = any(isinstance(v, Tensor) and isinstance(k, str) for k, v in value.items())
            self._known[id(value)] = tensors and not any(inside) and not is_optimizer(value)
        return self._known[id(value)]


def _optimizers(value: Any, above: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Optimizers' states in dicts, lists and tuples, by the keys that lead there."""
    if is_optimizer(value):
        yield above.rstrip(".") or "the file", value
    elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen and above.count(".") <= DEEPEST:
        seen.add(id(value))
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _optimizers(inner, f"{above}{str(key)[:80]}.", seen)


def _shapes(value: Any, seen: set[int]) -> Iterator[tuple[int, ...]]:
    if isinstance(value, Tensor):
        if not (is_lazy(value) or value.is_nested):  # these have no shape
            yield tuple(value.shape)
    elif isinstance(value, Mapping) and id(value) not in seen and not is_optimizer(value):
        seen.add(id(value))
        for inner in value.values():
            yield from _shapes(inner, seen)


def is_optimizer(value: Any) -> bool:
    """Whether it is what `optimizer.state_dict()` gives."""
    return isinstance(value, Mapping) and "param_groups" in value and "state" in value
