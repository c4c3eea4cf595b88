"""The calls of the model between two backward passes: those without gradients, as of a policy that acts, then those
with, and the state of torch's random generator after the last of them. So it can be told whether actions were drawn
after the call whose log-probabilities the loss takes: the draw is repeated on a generator of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, first_arguments, kind_of
from diag.snapshot.batch import tensors_in

OUTPUTS_OF_POLICIES = 16  # that are kept
ACTIONS_BY_CHANCE = 20.0  # the least number of actions that another draw would give differently


class Rollout:
    """Follows the calls; what it keeps it forgets at each backward pass."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """A backward pass is over."""
        self.quiet_rows = self.widest = self.rows = 0  # widest: rows of the largest call without gradients
        self._began: Tensor | None = None  # the first row of the first call without gradients
        self._of_these = False
        self._state: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def quiet_call(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The model was called without gradients."""
        batch = next(iter(tensors_in((args, dict(kwargs)))), None)
        if batch is None or not batch.ndim:
            return
        self.quiet_rows += _rows_of(batch)
        self.widest = max(self.widest, _rows_of(batch))
        if self._began is None and batch.is_cpu and batch.numel():
            self._began = batch.detach().reshape(-1, batch.shape[-1])[0].clone()

    def training_call(self, args: Any, kwargs: Mapping[str, Any], outputs: Any) -> None:
        """The model was called in training."""
        batch = next(iter(tensors_in((args, dict(kwargs)))), None)
        if batch is None or not batch.ndim or not batch.is_cpu:
            return
        if not self.rows and self._began is not None and batch.shape[-1] == len(self._began) and batch.numel():
            self._of_these = torch.equal(batch.detach().reshape(-1, batch.shape[-1])[0], self._began)
        self.rows += _rows_of(batch)
        self._state = torch.get_rng_state()
        for t in tensors_in(outputs):
            if t.grad_fn is not None and t.is_cpu and len(self._outputs) < OUTPUTS_OF_POLICIES:
                self._outputs[t.grad_fn._sequence_nr()] = t.detach()

    @property
    def acted(self) -> bool:
        """Whether the model was called without gradients on fewer rows a call than in training, as to act."""
        return 0 < 2 * self.widest <= self.rows

    @property
    def replayed(self) -> bool:
        """Whether the rows of training are those that the model was called on without gradients just before."""
        return self._of_these and self.rows > 1 and self.quiet_rows >= self.rows

    def output_behind(self, node: Any) -> Tensor | None:
        """The output of the model that a node passes on."""
        return self._outputs.get(self.call_behind(node))

    def call_behind(self, node: Any) -> int:
        """The number of the node that made the output of the model which a node passes on; -1 where there is
        none."""
        for before in first_arguments(node, 8):
            if before._sequence_nr() in self._outputs:
                return int(before._sequence_nr())
            if kind_of(before) not in PASSING_ON:
                break
        return -1

    def others_than(self, call: int) -> dict[int, Tensor]:
        """The outputs of the other calls of the model with gradients, by the numbers of their nodes."""
        return {number: output for number, output in self._outputs.items() if number != call}

    def drawn_since(self, actions: Tensor, logits: Tensor) -> bool:
        """Whether these actions (..., 1) are what the generator gave first after the last call of the model, from
        the logits (..., K)."""
        if self._state is None or not actions.is_cpu or actions.numel() * logits.shape[-1] != logits.numel():
            return False
        shares = logits.detach().softmax(-1).reshape(-1, logits.shape[-1])
        by_chance = float(shares.double().square().sum())
        if len(shares) - by_chance < ACTIONS_BY_CHANCE:
            return False
        generator = torch.Generator()
        generator.set_state(self._state)
        drawn = torch.multinomial(shares, 1, True, generator=generator)
        return torch.equal(drawn.reshape(-1), actions.reshape(-1))


def _rows_of(batch: Tensor) -> int:
    return batch.numel() // max(batch.shape[-1], 1)
