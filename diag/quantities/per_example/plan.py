"""How each parameter's per-example gradients are computed for one model, decided and tested once.

`make_plan` runs a few examples through the model. It finds where the examples lie in every recorded call,
chooses a method for each parameter, and tests the choice: the w-weighted sum of the per-example
gradients must equal the ordinary gradient of sum_i w_i l_i for random weights w. A parameter that fails gets a
slower, exact method; what has none is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import Unsupported
from diag.quantities.batch import Batch, map_tensors
from diag.quantities.per_example import fallback
from diag.quantities.per_example.blocks import Block, Dense, Outer, Placed, combine
from diag.quantities.per_example.capture import Capture, Place, Source, Use, unexplained
from diag.quantities.per_example.closed_forms import FORMS, Call, NoClosedForm, _outer
from diag.quantities.per_example.layout import Layout, find_layout
from diag.quantities.per_example.losses import LossFunction, batch_loss, check_finite, example_losses

PROBE = 3  # examples in the probe: enough to tell an example's axis from others by the weights


@dataclass
class Plan:
    """Layouts of the calls to read, by index, and which of their arguments; each parameter's method."""

    layouts: dict[int, Layout]
    places: dict[int, list[Place]]
    graph_parameters: set[str]
    signature: tuple[str, ...]
    methods: dict[str, str] = field(default_factory=dict)
    unresolved: set[int] = field(default_factory=set)  # calls whose gradient was zero on the probe


@dataclass
class Forward:
    """One recorded forward pass."""

    capture: Capture
    outputs: Any
    loss: Tensor

    @property
    def uses(self) -> list[Use]:
        return self.capture.uses


def forward(model: nn.Module, loss_fn: LossFunction, batch: Batch, parameters: dict[str, nn.Parameter]) -> Forward:
    """Run the model on a batch under a capture; the loss is the batch's mean."""
    capture = Capture(model, parameters)
    with torch.enable_grad():
        with capture:
            outputs = batch.forward(model)
        loss = batch_loss(loss_fn, outputs, batch.targets)
    if not loss.requires_grad:
        raise Unsupported(
            "The loss does not depend on any trainable parameter through the graph; check requires_grad, and that "
            "the model does not run under no_grad."
        )
    return Forward(capture, outputs, loss)


def make_plan(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    parameters: dict[str, nn.Parameter],
    whole: bool = False,
) -> Plan:
    """The plan for batches like this one, from its first examples (`whole`: from all of them).

    Raises Unsupported where the model or the loss ties examples together.
    """
    probe = batch if whole and batch.size > 1 else probe_of(batch)
    run = forward(model, loss_fn, probe, parameters)
    losses = example_losses(loss_fn, run.outputs, probe.targets, probe.size)
    check_finite(losses.detach(), 0)
    weights = 1.0 + torch.arange(probe.size, dtype=losses.dtype, device=losses.device) * 0.618
    edges = [use.edge for use in run.uses]
    plain = torch.autograd.grad(losses.sum(), edges, retain_graph=True, allow_unused=True)
    names = list(parameters)
    inputs: list[Any] = [*edges, *parameters.values()]
    found = torch.autograd.grad((weights * losses).sum(), inputs, retain_graph=True, allow_unused=True)
    weighted, expected = found[: len(edges)], dict(zip(names, found[len(edges) :], strict=True))
    plan = _read_calls(run.uses, plain, weighted, weights)
    plan.graph_parameters |= unexplained(run.capture, [torch.autograd.graph.get_gradient_edge(losses)], parameters)
    deltas = {i: plain[i] for i in plan.layouts}
    blocks = blocks_of(plan, run.uses, deltas, losses, probe.size, parameters)
    dense = {name: None if g is None else g.detach().to_dense().double() for name, g in expected.items()}
    total = sum(float(g.square().sum()) for g in dense.values() if g is not None) ** 0.5
    for name, gradient in dense.items():
        if name not in plan.graph_parameters and not _agrees(blocks.get(name), weights, gradient, total):
            plan.graph_parameters.add(name)
    for name in plan.graph_parameters:
        plan.methods[name] = "through the whole graph, one example at a time"
    return plan


def probe_of(batch: Batch) -> Batch:
    """The first few examples; a single example is doubled, so that there are two to tell apart."""
    if batch.size > 1:
        return batch.slice(0, min(PROBE, batch.size))

    def doubled(t: Tensor) -> Tensor:
        return torch.cat([t, t]) if t.ndim and t.shape[0] == 1 else t

    args, kwargs, targets = (map_tensors(doubled, x) for x in (batch.args, batch.kwargs, batch.targets))
    return Batch(args, kwargs, targets, 2)


def matches(plan: Plan, uses: list[Use]) -> bool:
    """False where this forward pass made other calls than the one that the plan was made on."""
    return plan.signature == _signature(uses)


def _signature(uses: list[Use]) -> tuple[str, ...]:
    return tuple(f"{use.name} {sorted(map(str, use.slots))}" for use in uses)


def _read_calls(uses: list[Use], plain: Any, weighted: Any, weights: Tensor) -> Plan:
    """Find where the examples lie in each call, and so which calls to read."""
    plan = Plan({}, {}, set(), _signature(uses))
    read: set[int] = set()  # calls that are read; what came through one of them must not be read again
    for use, first, second in zip(uses, plain, weighted, strict=True):
        places = [place for place, source in use.slots.items() if not source.made_by & read]
        if not places or first is None:  # None: no way from here to the loss
            continue
        try:
            layout = find_layout(first, second, weights)
        except ValueError:
            plan.unresolved.add(use.index)
            read.add(use.index)
            continue
        if layout is not None and (use.with_data or use.name in FORMS):
            plan.layouts[use.index], plan.places[use.index] = layout, places
            read.add(use.index)
        elif use.with_data:  # examples share these elements: differentiate their losses one by one instead
            plan.graph_parameters |= {name for place in places for name in use.slots[place].names}
    return plan


def blocks_of(
    plan: Plan,
    uses: list[Use],
    deltas: dict[int, Tensor],
    losses: Tensor | None,
    n: int,
    parameters: dict[str, nn.Parameter],
) -> dict[str, Block]:
    """Every parameter's block, by name; parameters that no example moves are left out.

    `losses` (n,), with the graph kept, are needed for the plan's graph parameters only.
    """
    parts: dict[str, list[Block]] = {}
    for index, layout in plan.layouts.items():
        if index not in deltas:
            continue
        call = Call(uses[index], _at_least_single(deltas[index]), layout, n)
        for place in plan.places[index]:
            source = uses[index].slots[place]
            if set(source.names) <= plan.graph_parameters:
                continue
            try:
                block = _block(plan, call, place)
            except NoClosedForm:
                plan.graph_parameters |= set(source.names)
                continue
            for name, part in _to_parameters(block, source, parameters).items():
                parts.setdefault(name, []).append(part)
    blocks = {name: combine(b) for name, b in parts.items() if name not in plan.graph_parameters}
    for name in plan.graph_parameters:
        assert losses is not None
        blocks[name] = _one_axis(fallback.through_graph(losses, parameters[name]))
    return blocks


def _block(plan: Plan, call: Call, place: Any) -> Block:
    names = call.use.slots[place].names
    try:
        block = FORMS[call.use.name](call, place)
        plan.methods.update(dict.fromkeys(names, call.use.name))
    except (KeyError, NoClosedForm):
        block = fallback.replayed(call, place)
        try:
            block.dense(slice(0, 1))  # fails here, if at all, where another method can still be chosen
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise NoClosedForm(str(error)) from error
        plan.methods.update(dict.fromkeys(names, f"{call.use.name}, replayed for each example"))
    return block


def _to_parameters(block: Block, source: Source, parameters: dict[str, nn.Parameter]) -> dict[str, Block]:
    if source.edge is not None:
        return {n: _one_axis(b) for n, b in fallback.pulled_back(block, source, parameters).items()}
    name = source.names[0]
    if source.positions is None:
        return {name: _one_axis(block)}
    return {name: _one_axis(_placed(block, source.positions, parameters[name].shape))}


def _placed(block: Block, positions: Tensor, shape: torch.Size) -> Block:
    order = torch.arange(shape.numel(), device=positions.device)
    if positions.numel() == shape.numel() and torch.equal(positions.flatten(), order):
        return _reshaped(block, shape)
    plain = type(block) is Outer and block.groups == 1 and positions.shape == shape[::-1]
    if plain and torch.equal(positions.T.flatten(), order):
        assert isinstance(block, Outer)
        return _outer(block.b[:, 0], block.a[:, 0], shape)
    return Placed(block, positions, shape)


def _reshaped(block: Block, shape: torch.Size) -> Block:
    if tuple(shape) == block.shape:
        return block
    if type(block) is Dense:
        return Dense(block.values.reshape(block.n, *shape))
    return Placed(block, torch.arange(shape.numel(), device=_device(block)), shape)


def _device(block: Block) -> torch.device:
    return block.dense(slice(0, 1)).device


def _one_axis(block: Block) -> Block:
    """Scalars become vectors of length one, so that every block has a first axis."""
    return block if block.shape else Dense(block.dense(slice(None)).reshape(block.n, 1))


def _at_least_single(delta: Tensor) -> Tensor:
    return delta.float() if delta.dtype in (torch.float16, torch.bfloat16) else delta


def _agrees(block: Block | None, weights: Tensor, expected: Tensor | None, total: float) -> bool:
    """The self-test: sum_i w_i g_i equals the ordinary gradient of sum_i w_i l_i.

    `total` is the norm of the whole gradient: a gradient that is zero but for rounding has no relative error.
    """
    if block is None or expected is None:
        held = None if block is None else block.dense(slice(None))
        return all(x is None or not bool(x.any()) for x in (expected, held))
    found = torch.stack([w * block.dense(slice(i, i + 1))[0].double() for i, w in enumerate(weights)]).sum(0)
    error = torch.linalg.vector_norm(found.reshape(expected.shape) - expected)
    return bool(error <= 1e-3 * torch.linalg.vector_norm(expected) + 1e-6 * total)


def check_independent(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    losses: Tensor,
    run_alone: Callable[[Batch], Tensor] | None = None,
) -> None:
    """Refuse a model in which other examples in the batch change an example's loss.

    Compares the losses in this batch with those of the first examples in smaller batches. That sees batch
    statistics, sorting, attention across examples and the like, whatever their class is called.
    """
    alone = run_alone or (lambda part: _losses(model, loss_fn, part))
    for size in sorted({1, min(2, batch.size - 1), min(PROBE, batch.size - 1)} - {0}):
        part = batch.slice(0, size)
        try:
            alone(part)
        except ValueError:  # BatchNorm on batch statistics cannot take one value per channel
            if size == 1 and batch.size > 2:
                continue
            raise
        _compare(losses[:size], alone(part), lambda part=part: alone(part), size, batch.size)  # type: ignore[misc]


def _compare(together: Tensor, alone: Tensor, again: Callable[[], Tensor], size: int, n: int) -> None:
    tolerance = 1e-3 if together.dtype != torch.float64 else 1e-6
    scale = together.abs().max().clamp_min(1e-6)
    if bool(((together - alone).abs() <= tolerance * scale).all()):
        return
    if bool(((alone - again()).abs() > tolerance * scale).any()):
        raise Unsupported(
            "The same example gave two different losses in two forward passes, so the model draws random numbers "
            "even in evaluation mode; switch dropout and sampling off while measuring."
        )
    row = int((together - alone).abs().argmax())
    raise Unsupported(
        f"The loss of example {row} is {float(together[row]):.6g} in a batch of {n} and {float(alone[row]):.6g} in "
        f"a batch of {size}, so examples influence each other (BatchNorm on batch statistics, a comparison across "
        "the batch) and have no gradients of their own: use running statistics (eval mode) or another norm."
    )


def _losses(model: nn.Module, loss_fn: LossFunction, batch: Batch) -> Tensor:
    with torch.no_grad():
        return example_losses(loss_fn, batch.forward(model), batch.targets, batch.size)
