"""The loss of each example alone, from a loss function that averages over a batch.

`loss_fn(outputs, targets)` is called on batches of one, with `vmap` where it can be and in a loop where it
cannot. The mean of what comes out must be the loss of the whole batch: where it is not, the loss is a sum,
weighs its examples, or compares them with each other, and "the gradient of one example" means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diag.errors import InvalidInput, Unsupported, named
from diag.snapshot.state.host import as_the_program

LossFunction = Callable[[Any, Any], Tensor]


def batch_loss(loss_fn: LossFunction, outputs: Any, targets: Any) -> Tensor:
    """The loss of the whole batch, a scalar.

    Raises InvalidInput where `loss_fn` returns anything else.
    """
    with as_the_program():
        loss = loss_fn(outputs, targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InvalidInput(
            f"The loss function returned {found}; expected one number, the mean over the batch: "
            'use reduction="mean".'
        )
    return loss.reshape(())


def example_losses(loss_fn: LossFunction, outputs: Any, targets: Any, n: int) -> Tensor:
    """(n,): the loss of each example alone, differentiable with respect to the outputs.

    Tensors in `outputs` and `targets` whose first axis is a multiple of n are cut into examples.
    """
    pieces: list[Tensor] = []
    outputs = _cut(outputs, n, pieces)
    templates = (outputs, _cut(targets, n, pieces)) if pieces else ()
    if not pieces:
        raise Unsupported(
            f"No tensor in the model's outputs has the {n} examples along its first axis, so the loss cannot be "
            "taken example by example; return outputs with the batch first, and give loss_fn=."
        )

    def one(*values: Tensor) -> Tensor:
        return batch_loss(loss_fn, *(_fill(template, values) for template in templates))

    try:
        return torch.func.vmap(one, randomness="error")(*pieces)
    except (RuntimeError, ValueError, NotImplementedError):
        # unbind, not indexing: the backward pass of n separate indexings costs n full-size tensors.
        return torch.stack([one(*row) for row in zip(*(p.unbind(0) for p in pieces), strict=True)])


class _Slot(int):
    """Stands in a structure for the tensor with this number in the list of pieces."""


def _cut(value: Any, n: int, pieces: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] == 0 or value.shape[0] % n:
            return value
        pieces.append(value.unflatten(0, (n, -1)))
        return _Slot(len(pieces) - 1)
    return _rebuilt(value, lambda item: _cut(item, n, pieces))


def _fill(template: Any, values: tuple[Tensor, ...]) -> Any:
    if isinstance(template, _Slot):
        return values[template]
    return _rebuilt(template, lambda item: _fill(item, values))


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        items = {key: change(item) for key, item in value.items()}
        try:  # the outputs of a Hugging Face model are a mapping with attributes
            return type(value)(**items)
        except TypeError:
            return items
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(change(item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(change(item) for item in value)
    return value


def check_mean(loss: Tensor, losses: Tensor) -> None:
    """Refuse a batch loss that is not the mean of its examples' losses.

    Raises InvalidInput, in one sentence that names what was found.
    """
    n, mean = len(losses), float(losses.double().mean())
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-4}.get(losses.dtype, 5e-2)
    scale = float(losses.double().abs().mean())
    gap = abs(float(loss) - mean)
    if not gap > tolerance * max(scale, abs(float(loss))):
        return
    found = f"the loss of a batch of {n} is {float(loss):.6g} and the mean of its examples' losses is {mean:.6g}"
    if n > 1 and abs(float(loss) - n * mean) <= tolerance * n * scale:
        raise InvalidInput(f'The loss is a sum, not a mean ({found}); use reduction="mean".')
    raise InvalidInput(
        f"The loss is not the mean of its examples' losses ({found}): it weighs examples, compares them with each "
        "other, or adds a term that belongs to none; give a loss that averages over examples."
    )


def check_finite(losses: Tensor, first_row: int) -> None:
    """Raises InvalidInput that names the rows whose loss is not finite."""
    rows = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if rows:
        raise InvalidInput(
            f"The loss of {len(rows)} example(s) is NaN or infinite (rows "
            f"{named([first_row + r for r in rows], 10)}); look at these rows, then "
            "remove or repair them."
        )
