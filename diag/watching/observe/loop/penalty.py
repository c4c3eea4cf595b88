"""A penalty on the weights that is added to the loss: how large it is beside the loss function's value.

A term of what backward() is called on is a penalty where its graph holds parameters and none of the outputs.
Its value is what the loss function's value, times its factor, leaves of the whole.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.data import PenaltyFacts
from diag.watching.observe.loop.moment import Moment, due
from diag.watching.observe.terms import product, reaches, terms_of

PENALTY_LOOKS = 24  # looks that are kept


class Penalty:
    """Looks at a few backward passes: the first three, the 10th, the 30th, the 100th, ..."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._outputs: set[int] = set()
        self._losses: dict[int, Tensor] = {}
        self._scaled: dict[int, Tensor] = {}
        self._passes = 0
        self._looks: list[tuple[int, Any, Any]] = []

    @property
    def _looking(self) -> bool:
        return due(self._passes + 1) and len(self._looks) < PENALTY_LOOKS

    def training_call(self, outputs: Any) -> None:
        """The model was called in training."""
        if self._looking:
            found = [outputs] if isinstance(outputs, Tensor) else tensors_in(outputs)
            self._outputs |= {t.grad_fn._sequence_nr() for t in found if t.grad_fn is not None}

    def loss_called(self, value: Any) -> None:
        """A loss function returned a value that has a graph."""
        if self._looking and isinstance(value, Tensor) and value.numel() == 1 and value.grad_fn is not None:
            self._losses[value.grad_fn._sequence_nr()] = value.detach().clone()

    def loss_scaled(self, losses: Any, scaled: Any) -> None:
        """A GradScaler made `scaled` of `losses`."""
        if (
            self._looking
            and isinstance(losses, Tensor)
            and isinstance(scaled, Tensor)
            and scaled.grad_fn is not None
        ):
            self._scaled = {scaled.grad_fn._sequence_nr(): losses}

    def backward_called(self, roots: Any) -> None:
        """A backward pass begins."""
        looking = self._looking
        self._passes += 1
        outputs, losses, scaled = self._outputs, self._losses, self._scaled
        self._outputs, self._losses, self._scaled = set(), {}, {}
        if not looking or not isinstance(roots, Tensor) or roots.numel() != 1 or roots.grad_fn is None:
            return
        self._look(scaled.get(roots.grad_fn._sequence_nr(), roots), outputs, losses)

    def _look(self, root: Tensor, outputs: set[int], losses: dict[int, Tensor]) -> None:
        if root.grad_fn is None:
            return
        terms = terms_of(root, losses)
        known, others = [t for t in terms if t.known], [t for t in terms if not t.known]
        if not known or not others or any(reaches([t.node], outputs, ()) is not False for t in others):
            return
        loss: Any = sum(losses[t.number].reshape(()) * product(t.factors) for t in known)
        self._looks.append((self._moment.step, root.detach().reshape(()) - loss, loss))

    def facts(self) -> PenaltyFacts:
        """The looks as plain data; what is on a device is read now."""
        self._looks = [(step, float(penalty), float(loss)) for step, penalty, loss in self._looks]
        steps, penalties, losses = zip(*self._looks, strict=True) if self._looks else ((), (), ())
        return PenaltyFacts(steps, penalties, losses)
