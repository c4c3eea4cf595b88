"""Exact per-example gradients where no closed form is known.

First choice: run the recorded call again for each example alone, `vmap` over its vector-Jacobian product, or
a loop where an operation has no batching rule. Where the call itself cannot be replayed (custom autograd functions,
scripted modules), the losses are differentiated one by one through the whole graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diag.gradients.capture import Use
from diag.gradients.rules.blocks import Block, Lazy
from diag.gradients.rules.call import Call, NoClosedForm, call_with
from diag.gradients.sources import ArgumentPlace, Source
from diag.linalg.deadline import NEVER, Deadline


def replayed_block(call: Call, place: ArgumentPlace, deadline: Deadline = NEVER) -> Block:
    """The recorded call's vector-Jacobian product, one example at a time.

    Arguments whose first axis is the output's are taken to be cut along it; the self-test of the plan refuses a
    call for which that is wrong. Raises NoClosedForm where the examples do not lie along the first axis.
    """
    use, n = call.use, call.n
    total = use.shape[call.layout.axis] if use.shape else 0
    if call.layout.axis != 0 or call.layout.inner is not None:
        raise NoClosedForm("the examples do not lie along the first axis")
    weight = use.argument(place).detach()
    delta = call.delta.to(weight.dtype).unflatten(0, (n, -1))
    cut = {
        other: tensor.detach().unflatten(0, (n, -1))
        for other in use.versions
        if other != place and (tensor := _intact(use, other)).ndim and tensor.shape[0] in (n, total)
    }

    def pulled(w: Tensor, pieces: dict[ArgumentPlace, Tensor], d: Tensor) -> Tensor:
        _, pull = torch.func.vjp(lambda w: call_with(use, {**pieces, place: w}), w)[:2]
        return pull(d)[0]

    batched: list[Callable[..., Tensor] | None] = [torch.func.vmap(pulled, (None, 0, 0), randomness="error")]

    def compute(examples: slice) -> Tensor:
        pieces = {other: tensor[examples] for other, tensor in cut.items()}
        if batched[0] is not None:
            try:
                with _without_slow_path_warnings():
                    return batched[0](weight, pieces, delta[examples])
            except RuntimeError:
                batched[0] = None  # no batching rule for something inside: a loop does the same
        rows = []
        for i in range(*examples.indices(n)):
            deadline.check()
            rows.append(pulled(weight, {other: t[i] for other, t in cut.items()}, delta[i]))
        return torch.stack(rows)

    return Lazy(n, weight, compute)


def _intact(use: Use, place: ArgumentPlace) -> Tensor:
    if use.overwritten(place):
        raise NoClosedForm(f"an argument of {use.name} was overwritten in place")
    return use.argument(place)


def pulled_back(
    block: Block, source: Source, parameters: dict[str, nn.Parameter], deadline: Deadline = NEVER
) -> dict[str, Block]:
    """Gradients of a derived tensor carried to the parameters it was computed from.

    The map is linear in the gradient, so it is one vector-Jacobian product per example, in a batch.
    """
    assert source.edge is not None
    edge = source.edge

    def through(name: str) -> Callable[[slice], Tensor]:
        return lambda examples: _batched_gradient(edge, parameters[name], block.dense(examples), deadline)

    return {name: Lazy(block.n, parameters[name], through(name)) for name in source.names}


def through_graph(losses: Tensor, parameter: nn.Parameter, deadline: Deadline = NEVER) -> Block:
    """Rows of the Jacobian of the (n,) losses with respect to one parameter; the graph must be kept."""
    rows = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    return Lazy(
        len(losses), parameter, lambda examples: _batched_gradient(losses, parameter, rows[examples], deadline)
    )


def _batched_gradient(output: Any, parameter: nn.Parameter, rows: Tensor, deadline: Deadline) -> Tensor:
    def gradient(row: Tensor, batched: bool) -> Sequence[Tensor | None]:
        deadline.check()
        return torch.autograd.grad(
            [output], [parameter], [row], retain_graph=True, is_grads_batched=batched, allow_unused=True
        )

    try:
        with _without_slow_path_warnings():
            found = gradient(rows, True)[0]
        return parameter.new_zeros(len(rows), *parameter.shape) if found is None else found.to_dense()
    except (RuntimeError, NotImplementedError):
        each = [gradient(row, False)[0] for row in rows]
        return torch.stack([torch.zeros_like(parameter) if g is None else g.to_dense() for g in each])


@contextmanager
def _without_slow_path_warnings() -> Iterator[None]:
    """Silence vmap where it loops over an operation without a batching rule, which is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield
