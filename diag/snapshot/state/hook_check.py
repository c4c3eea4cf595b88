"""Whether a network gives the same without the hooks and modes that are silent while measuring.

Only what could change what it gives is tried (see `doubtful_hooks`), once, on the first few examples and in
both modes; what they write meanwhile is put back. Where the outputs differ, what would be measured is another
network than the one that is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import Unsupported, named
from diag.snapshot.batch import Batch, tensors_in
from diag.snapshot.preserve import preserved
from diag.snapshot.state.doubtful_hooks import doubtful_hooks
from diag.snapshot.state.hooks import firing
from diag.snapshot.state.modes import doubtful_modes, seen_again
from diag.snapshot.state.python import kept_state
from diag.snapshot.state.tensors import own_tensors, same_bits

EXAMPLES_TRIED = 8  # examples (our choice)
CLOSE = 1e-5  # relative: the same to rounding, where a kernel does not repeat its own bits
HOOKS_CHANGE_OUTPUTS = (
    "Hooks that are not diag's do not fire while measuring, and without {} the model gives something else; move "
    "what such a hook does into the module's forward."
)
MODES_CHANGE_OUTPUTS = (
    "Modes that see every operation are not active while measuring, and without {} the model gives something else; "
    "measure outside of it, or move what it does into the model's forward."
)
OF_THE_PROGRAM = "the program"


class HookCheck:
    """Remembers which hooks have been tried on a model."""

    def __init__(self) -> None:
        self._tried: list[tuple[list[Callable[..., Any]], str]] = []
        self.lost = ""  # what a measurement changed and could not put back, as a sentence

    def refuse(self, model: nn.Module, batches: Callable[[], Sequence[Batch]]) -> None:
        """Raises Unsupported where silent hooks change the outputs on the first of `batches()`."""
        if self.lost:
            raise Unsupported(self.lost)
        doubtful = [*doubtful_hooks(model), *((OF_THE_PROGRAM, mode) for mode in doubtful_modes())]
        if not doubtful:
            return
        hooks = [hook for _, hook in doubtful]
        known = next((reason for tried, reason in self._tried if _are(tried, hooks)), None)
        if known is None:
            with own_tensors(model, values=True), kept_state(model, *hooks):
                same = _same_without(model, batches()[0])
            known = "" if same else _refusal(doubtful)
            self._tried.append((hooks, known))
        if known:
            raise Unsupported(known)


def _are(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(x == y for x, y in zip(a, b, strict=True))


def _refusal(doubtful: Sequence[tuple[str, Callable[..., Any]]]) -> str:
    modes = [hook for owner, hook in doubtful if owner is OF_THE_PROGRAM]
    if len(modes) == len(doubtful):
        return MODES_CHANGE_OUTPUTS.format(named([type(mode).__name__ for mode in modes]))
    return HOOKS_CHANGE_OUTPUTS.format(_listed(doubtful))


def _listed(hooks: Sequence[tuple[str, Callable[..., Any]]]) -> str:
    names = [f"{_name(hook)} of {owner or 'the model'}" for owner, hook in hooks]
    return named(names)


def _name(hook: Callable[..., Any]) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__).split("<locals>.")[-1]


def _same_without(model: nn.Module, batch: Batch) -> bool:
    few = batch.few(EXAMPLES_TRIED)
    for mode in ("eval", "train"):
        for examples in (few, batch):  # a model may be written for one batch size
            without = _outputs(model, examples, mode, fire=False)
            there = _outputs(model, examples, mode, fire=True)
            if there is not None:
                break
        if there is not None and not _same(there, without):
            return False
    return True


def _outputs(model: nn.Module, batch: Batch, mode: str, fire: bool) -> list[Tensor] | None:
    """The tensors that the model gives, None where it raises."""
    try:
        with torch.no_grad():
            if fire:
                with firing(), seen_again(), preserved(model, mode=mode):
                    return tensors_in(batch.forward(model))
            with preserved(model, mode=mode):
                return tensors_in(batch.forward(model))
    except Exception:
        return None


def _same(a: Sequence[Tensor], b: Sequence[Tensor] | None) -> bool:
    if b is None or len(a) != len(b):
        return False
    return all(same_bits(x, y) or _close(x, y) for x, y in zip(a, b, strict=True))


def _close(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or not x.is_floating_point():
        return False
    return torch.allclose(x, y, rtol=CLOSE, atol=CLOSE * float(x.abs().max()) if x.numel() else 0.0, equal_nan=True)
