"""What happens in a process that a watch hears of: the calls of torch that `hub` sees, each an event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch.optim.optimizer import Optimizer


class Listener(Protocol):
    """The events of the process, one method each. None of these may raise."""

    def loss_called(self, function: Callable[..., Any], args: Any, kwargs: Any, value: Any) -> None:
        """A loss function returned `value`, with a graph."""

    def further_loss_called(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """A loss function of several tensors or of alignments returned a value with a graph."""

    def backward_called(self, roots: Any, weight: Any, inputs: Any) -> None:
        """A backward pass from `roots` begins."""

    def backward_done(self) -> None:
        """It has ended."""

    def loss_scaled(self, losses: Any, scaled: Any) -> None:
        """A GradScaler multiplied `losses`, which gave `scaled`."""

    def zeroed(self, owner: Any) -> None:
        """`zero_grad` of an optimizer or a module begins."""

    def before_clip(self, parameters: Any, max_norm: Any, total_norm: Any) -> Any:
        """Gradients are about to be clipped; what is returned comes back in `after_clip`."""

    def after_clip(self, token: Any) -> None:
        """They have been clipped."""

    def unscaling(self, optimizer: Optimizer, scaler: Any) -> None:
        """A GradScaler is about to divide an optimizer's gradients by its scale."""

    def scaler_stepping(self, optimizer: Optimizer) -> None:
        """A GradScaler is about to step the optimizer, or to leave the step out."""

    def scaler_stepped(self, optimizer: Optimizer) -> None:
        """The step was made, or left out."""

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """An optimizer is about to step."""

    def after_step(self, optimizer: Optimizer) -> None:
        """It has stepped."""

    def loss_evaluated(self, function: Callable[..., Any], args: Any, kwargs: Any, value: Any) -> None:
        """A loss function was called without gradients and returned `value`."""

    def has_zeroed(self, owner: Any) -> None:
        """`zero_grad` has returned."""

    def scheduler_stepped(self, scheduler: Any) -> None:
        """A learning rate scheduler stepped."""

    def seeded(self, seed: Any) -> None:
        """torch's generator was seeded."""

    def loader_started(self, loader: Any) -> None:
        """A DataLoader begins to give batches."""

    def indices_drawn(self, iterator: Any, indices: Any) -> None:
        """A sampler gave these indices of the data."""

    def batch_fetched(self, batch: Any, iterator: Any) -> None:
        """It gave this batch."""

    def broke(self, error: Exception) -> None:
        """Passing on an event failed."""

    def close(self) -> None:
        """The process ends."""

    def abandon(self) -> None:
        """Stop without closing: this is a forked child."""
