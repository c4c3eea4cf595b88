"""One backward pass that hands each recorded call's output gradient on as it comes up, and keeps none.

It goes to the outputs of the calls only: gradients of parameters are not even computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from diag.gradients.assembly import Assembly
from diag.gradients.plan import Forward, Plan
from diag.snapshot.autograd_graph import parents_of


def backward(run: Forward, plan: Plan, assembly: Assembly, n: int, keep_graph: bool) -> None:
    """Hand the gradient of sum_i l_i (n times the mean) at each call's output to `assembly`, as it comes up.

    Calls that lie upstream of all others are asked for; the backward pass meets the rest on its way there, and a
    hook on each takes its gradient, so that no more of them are alive at a time than need be.
    """
    calls = {i: run.uses[i].edge for i in plan.layouts}
    run.uses[:] = [use if use.index in calls else use.bare() for use in run.uses]
    if not calls:
        return
    first = plan.first = first_calls(calls) if plan.first is None else plan.first
    hooks = []
    try:
        for i in calls.keys() - first:
            hooks.append(calls[i].node.register_prehook(partial(take_gradient, assembly, i, calls[i].output_nr)))
        asked = sorted(first)
        seed = torch.full_like(run.loss, n)
        found = torch.autograd.grad(
            [run.loss], [calls[i] for i in asked], [seed], retain_graph=keep_graph or None, allow_unused=True
        )
    finally:
        for hook in hooks:
            hook.remove()
    for i, delta in zip(asked, found, strict=True):
        if delta is not None:
            assembly.add(i, delta)


def take_gradient(assembly: Assembly, index: int, output: int, gradients: Sequence[Tensor | None]) -> None:
    """A hook before a graph node: hand the gradient of one of its outputs to the assembly."""
    delta = gradients[output]
    if delta is not None:
        assembly.add(index, delta.detach())


def first_calls(calls: dict[int, GradientEdge]) -> set[int]:
    """The calls from whose node no other call's node can be reached: the backward pass ends there."""
    nodes: dict[Node, list[int]] = {}
    for i, edge in calls.items():
        nodes.setdefault(edge.node, []).append(i)
    reaches: dict[Node, bool] = {}  # does a walk from here, this node excluded, meet a call?
    for start in nodes:
        stack = [start]
        while stack:
            node = stack[-1]
            following = parents_of(node)
            waiting = [n for n in following if n not in reaches]
            if waiting and node not in reaches:
                stack.extend(waiting)
            else:
                reaches[node] = any(n in nodes or reaches[n] for n in following)
                stack.pop()
    return {i for node, indices in nodes.items() if not reaches[node] for i in indices}
