"""The mean loss over all the data as a function of the parameters, in the precision asked for.

A batch of n_b of the n examples counts n_b / n, so a ragged last batch weighs what it should. The model is
called through `call_at` with detached leaves: no hook of the user's parameters runs and no `.grad` is
touched. In another precision than the model's own the call uses converted copies of all parameters, buffers
and floating inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diag.curvature import guards
from diag.errors import InvalidInput, type_of
from diag.linalg.reductions import length
from diag.snapshot.batch import Batch, map_tensors
from diag.snapshot.call_at import call_at
from diag.snapshot.parameters import FlatLayout
from diag.snapshot.state.host import as_the_program

LossFn = Callable[[Any, Any], Tensor]

# name -> dtype of parameters, vectors and arithmetic
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Objective:
    """L(theta) = sum_b (n_b / n) loss_fn(model(theta; inputs_b), targets_b).

    Parameters are given as a list of tensors in the order of `layout`; see `parameters`.
    """

    model: nn.Module
    loss_fn: LossFn
    batches: tuple[Batch, ...]
    layout: FlatLayout
    precision: str = "float32"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters, vectors and arithmetic."""
        return PRECISIONS[self.precision]

    @cached_property
    def num_examples(self) -> int:
        """The number of examples, n."""
        return sum(batch.size for batch in self.batches)

    @cached_property
    def device(self) -> torch.device:
        """The device of the first trainable parameter."""
        return dict(self.model.named_parameters())[self.layout.names[0]].device

    def weight(self, batch: Batch) -> float:
        """n_b / n."""
        return batch.size / self.num_examples

    def on(self, batches: Sequence[Batch]) -> Objective:
        """The mean loss over other batches."""
        return replace(self, batches=tuple(batches))

    def at_precision(self, precision: str) -> Objective:
        """The same function in another precision (a key of PRECISIONS)."""
        return replace(self, precision=precision)

    # -- evaluation; the caller is inside guards.measured_model ------------------------------------------

    def measured(self, shorter: bool = True) -> AbstractContextManager[None]:
        """The context that every evaluation needs."""
        return guards.measured_model(self.model, shorter)

    def replayed(self) -> AbstractContextManager[None]:
        """The cheaper context for backward passes over a graph that was kept, each inside `plain_kernels`."""
        return guards.replayed_model(self.model)

    def plain_kernels(self) -> AbstractContextManager[Any]:
        """What each of these passes is inside of."""
        return guards.PlainKernels()

    def parameters(self) -> list[Tensor]:
        """The model's values as leaves to differentiate by; copies only where the precision differs."""
        return [p.to(self.dtype).detach().requires_grad_() for p in self.layout.values(self.model)]

    def shifted(self, parameters: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> list[Tensor]:
        """theta + step * direction, as leaves."""
        with torch.no_grad():
            moved = [torch.add(p, d, alpha=step) for p, d in zip(parameters, direction, strict=True)]
        return [p.requires_grad_() for p in moved]

    def outputs(self, parameters: Sequence[Tensor], batch: Batch) -> Any:
        """The model's outputs at `parameters`."""
        batch = self._prepared(batch)
        tensors = {**self.constants, **dict(zip(self.layout.names, parameters, strict=True))}
        return call_at(self.model, tensors, batch.args, batch.kwargs)

    def loss_of(self, outputs: Any, batch: Batch) -> Tensor:
        """The mean loss of one batch from its outputs, a scalar; a vector of losses is averaged."""
        loss_fn, targets = self.loss_fn, self._prepared(batch).targets
        converted = _converted_state(loss_fn, self.dtype) if isinstance(loss_fn, nn.Module) else {}
        if isinstance(loss_fn, nn.Module) and converted:
            loss = call_at(loss_fn, converted, (outputs, targets))
        else:
            with as_the_program():
                loss = loss_fn(outputs, targets)
        return _scalar(loss)

    def loss(self, parameters: Sequence[Tensor], batch: Batch) -> Tensor:
        """The mean loss of one batch, a scalar with a graph."""
        return self.loss_of(self.outputs(parameters, batch), batch)

    def value(self, parameters: Sequence[Tensor]) -> float:
        """The loss L(theta) over all the data."""
        # With gradients on: a model may differentiate by its inputs on the way (forces from an energy).
        return sum(self.weight(b) * float(self.loss(parameters, b).detach()) for b in self.batches)

    def gradient(self, parameters: Sequence[Tensor]) -> Tensor:
        """grad L(theta), flat, without a graph; zeros where a parameter is not used."""
        total = torch.zeros(self.layout.size, dtype=self.dtype, device=self.device)
        for batch in self.batches:
            loss = self.loss(parameters, batch)
            grads = gradients(loss, parameters, create_graph=False)
            total.add_(self.layout.flatten(grads, total), alpha=self.weight(batch))
        return total

    # -- vectors of the parameters; where ranks hold parts of them, over all parts -----------------------

    def totals(self, numbers: Tensor) -> Tensor:
        """Sums over the parts of a float64 tensor."""
        return numbers

    def everywhere(self, holds: bool) -> bool:
        """Whether it holds wherever there are parts."""
        return holds

    def own_row(self, parameter: int, row: int) -> int | None:
        """Where a row of a parameter lies in its part here; None where it is elsewhere."""
        return row

    def length(self, vectors: Tensor | Sequence[Tensor]) -> float:
        """The Euclidean length of a vector of the parameters, flat or in pieces."""
        return float(self.lengths([vectors])[0])

    def lengths(self, vectors: Sequence[Tensor | Sequence[Tensor]]) -> Tensor:
        """Of several, float64 on the host."""
        return self.totals(torch.tensor([length(v) ** 2 for v in vectors], dtype=torch.float64)).sqrt()

    def inner(self, a: Tensor, b: Tensor) -> float:
        """The inner product of two flat vectors."""
        return float(self.totals((a.double() @ b.double())[None].cpu())[0])

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """Buffers, and frozen parameters where their dtype differs: converted copies where it does.

        Given in each call, a buffer that the forward pass binds again is the old one in the next call.
        """
        state = {**dict(self.model.named_buffers()), **_converted_state(self.model, self.dtype)}
        return {name: tensor for name, tensor in state.items() if name not in set(self.layout.names)}

    def _prepared(self, batch: Batch) -> Batch:
        def convert(t: Tensor) -> Tensor:
            return t.to(self.device, self.dtype) if t.is_floating_point() else t.to(self.device)

        args, kwargs, targets = (map_tensors(convert, x) for x in (batch.args, batch.kwargs, batch.targets))
        return replace(batch, args=args, kwargs=kwargs, targets=targets)


def native_precision(model: nn.Module) -> str:
    """float64 for a float64 model, float32 for every other (half-precision weights are measured in float32)."""
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    return "float64" if dtypes == {torch.float64} else "float32"


def gradients(output: Tensor, inputs: Sequence[Tensor], create_graph: bool) -> Sequence[Tensor | None]:
    """d output / d inputs; None for each where there is no dependence at all."""
    if not output.requires_grad:
        return [None] * len(inputs)
    return torch.autograd.grad(output, inputs, create_graph=create_graph, allow_unused=True)


def output_tensors(outputs: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The differentiable tensors in a model's outputs, and a function that puts others in their place."""
    leaves, spec = pytree.tree_flatten(outputs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]

    def rebuilt(tensors: Sequence[Tensor]) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return pytree.tree_unflatten(filled, spec)

    return [leaves[i] for i in places], rebuilt


def _converted_state(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """All floating parameters and buffers whose dtype differs, converted."""
    state = [*module.named_parameters(), *module.named_buffers()]
    return {n: t.detach().to(dtype) for n, t in state if t.is_floating_point() and t.dtype != dtype}


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        found = f"a tensor of {loss.dtype}" if isinstance(loss, Tensor) else type_of(loss)
        raise InvalidInput(
            f"loss_fn returned {found}; expected a floating-point tensor: the mean loss of the batch."
        )
    return loss if loss.ndim == 0 else loss.mean()
