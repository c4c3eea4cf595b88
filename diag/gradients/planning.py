"""Make the plan of how each parameter's per-example gradients are computed, and test it.

`make_plan` runs a few examples through the model. It finds where the examples lie in every recorded call,
chooses a method for each parameter, and tests the choice: the w-weighted sum of the per-example
gradients must equal the ordinary gradient of sum_i w_i l_i for random weights w. A parameter that fails gets a
slower, exact method; what has none is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import InvalidInput
from diag.gradients.assembly import Assembly
from diag.gradients.capture import Use
from diag.gradients.methods import WHOLE_GRAPH, How, Method
from diag.gradients.plan import NotFinite, Plan, copied, forward
from diag.gradients.rules.blocks import Block, row_slices
from diag.gradients.rules.closed_forms import FORMS
from diag.gradients.rules.layout import find_layout
from diag.gradients.unexplained import unexplained
from diag.linalg.deadline import NEVER, Deadline
from diag.linalg.reductions import length
from diag.snapshot.batch import Batch, tensors_in
from diag.snapshot.example_losses import LossFunction, check_mean, example_losses


def make_plan(
    model: nn.Module,
    loss_fn: LossFunction,
    probe: Batch,
    parameters: dict[str, nn.Parameter],
    unroll: bool = True,
    deadline: Deadline = NEVER,
) -> Plan:
    """The plan for batches like the one that this probe of two or more examples is from.

    Raises Unsupported where the model or the loss ties examples together.
    """
    probe = copied(probe)
    versions = [t._version for t in tensors_in((probe.args, probe.kwargs))]
    run = forward(model, loss_fn, probe, parameters, unroll)
    losses = example_losses(loss_fn, run.outputs, probe.targets, probe.size)
    if not bool(torch.isfinite(losses).all()):
        raise NotFinite
    check_mean(run.loss.detach(), losses.detach())
    weights = 1.0 + torch.arange(probe.size, dtype=losses.dtype, device=losses.device) * 0.618
    edges = [use.edge for use in run.uses]
    plain = torch.autograd.grad(losses.sum(), edges, retain_graph=True, allow_unused=True)
    names = list(parameters)
    inputs: list[Any] = [*edges, *parameters.values()]
    found = torch.autograd.grad((weights * losses).sum(), inputs, retain_graph=True, allow_unused=True)
    weighted, expected = found[: len(edges)], dict(zip(names, found[len(edges) :], strict=True))
    plan = _read_calls(run.uses, plain, weighted, weights)
    plan.overwrites_inputs = versions != [t._version for t in tensors_in((probe.args, probe.kwargs))]
    plan.graph_parameters |= unexplained(run.capture, [torch.autograd.graph.get_gradient_edge(losses)], parameters)
    blocks: dict[str, Block] = {}
    assembly = Assembly(plan, run.uses, probe.size, parameters, blocks.__setitem__, deadline)
    for index in plan.layouts:
        assembly.add(index, plain[index])
    assembly.finish(losses)
    dense = {name: None if g is None else g.detach().to_dense() for name, g in expected.items()}
    total = length([g for g in dense.values() if g is not None])
    for name, gradient in dense.items():
        deadline.check()
        if name not in plan.graph_parameters and not _agrees(blocks.get(name), weights, gradient, total):
            _refuse_rule(name, plan.methods.get(name))
            plan.graph_parameters.add(name)
    for name in plan.graph_parameters:
        plan.methods[name] = WHOLE_GRAPH
    return plan


def _refuse_rule(name: str, method: Method | None) -> None:
    """Raise InvalidInput where the method is a user's rule: its user has to correct it, so no other takes its
    place."""
    if method is not None and method.how is How.RULE:
        raise InvalidInput(
            f"By {method} the per-example gradients of {name} do not add up to autograd's gradient when the "
            "examples are weighted; correct the rule."
        )


def _read_calls(uses: list[Use], plain: Any, weighted: Any, weights: Tensor) -> Plan:
    """Find where the examples lie in each call, and so which calls to read."""
    plan = Plan({}, {}, set(), tuple(use.signature for use in uses))
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


def _agrees(block: Block | None, weights: Tensor, expected: Tensor | None, total: float) -> bool:
    """The self-test: sum_i w_i g_i equals the ordinary gradient of sum_i w_i l_i, norms and products the rows'.

    `total` is the norm of the whole gradient: a gradient that is zero but for rounding has no relative error.
    """
    if block is None or expected is None:
        held = None if block is None else block.dense(slice(None))
        return all(x is None or not bool(x.any()) for x in (expected, held))
    expected = expected.reshape(block.shape)
    products = torch.zeros(block.n, block.n, dtype=torch.float64, device=block.device)
    error = size = 0.0
    for rows in row_slices(block.shape, 4 * block.n):  # a few rows of a large weight at a time
        part, target = block.dense_rows(rows).flatten(1).double(), expected[rows].flatten().double()
        products += part @ part.T
        error += float((weights.double() @ part - target).square().sum())
        size += float(target.square().sum())
    slack = 1e-3 if weights.dtype in (torch.float32, torch.float64) else 5e-2
    # Norms and inner products have closed forms of their own, so they are tested too.
    allowed = slack * float(products.diag().max()) + 1e-12 * total**2
    norms = float((block.squared_norms() - products.diag()).abs().max())
    gram = float((block.gram(block).double() - products).abs().max())
    return max(norms, gram) <= allowed and error**0.5 <= slack * size**0.5 + 1e-6 * total
