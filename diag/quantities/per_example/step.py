"""Per-example gradients of a training step, from its own forward and backward pass.

    plan = plan_for_steps(model, loss_fn, batch)              # once
    with StepGradients(model, plan, batch_size=len(x)) as step:
        loss_fn(model(x), y).backward()
    step.norms()

The step itself stays as it is, bit for bit: the recorded calls run unchanged, and hooks read output gradients that
the backward pass makes anyway. What the loss was scaled by (accumulation, a GradScaler) scales the gradients here
too; ratios such as coherence do not feel it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Self

from torch import nn

from diag.errors import Unsupported
from diag.quantities.batch import Batch
from diag.quantities.parameters import trainable
from diag.quantities.per_example.assembly import Assembly
from diag.quantities.per_example.backward import take
from diag.quantities.per_example.blocks import Block
from diag.quantities.per_example.capture import Capture, Use
from diag.quantities.per_example.combination import Scaled
from diag.quantities.per_example.gradients import Consumer, Coverage, PerExampleGradients
from diag.quantities.per_example.losses import LossFunction
from diag.quantities.per_example.plan import PROBES, Plan, make_plan, probe_of
from diag.quantities.preserve import preserved


def plan_for_steps(model: nn.Module, loss_fn: LossFunction, batch: Batch) -> Plan:
    """Where the examples lie in the calls of a training step; the model is left as it was.

    Raises Unsupported where a step cannot be read: BatchNorm on batch statistics ties examples together, and calls
    without a closed form, or recurrent kernels, would need passes of their own.
    """
    probe = probe_of(batch, PROBES[0], lambda: NotImplemented)
    with preserved(model, mode="train"):
        plan = make_plan(model, loss_fn, probe, trainable(model), unroll=False)
    unread = plan.graph_parameters | {name for name, how in plan.methods.items() if "each example" in how}
    if unread or plan.late:
        raise Unsupported(
            f"The training step's own gradients cannot be told apart by example in {', '.join(sorted(unread)[:3])} "
            "(BatchNorm on batch statistics, or a call without a closed form); measure on a snapshot instead."
        )
    return plan


class StepGradients(PerExampleGradients):
    """The gradients of the step that ran inside `with`; they hold its activations until dropped.

    Questions raise Unsupported where no whole step was seen, or one that made other calls than the plan's.
    """

    def __init__(self, model: nn.Module, plan: Plan, batch_size: int) -> None:
        self._parameters = trainable(model)
        super().__init__({name: tuple(p.shape) for name, p in self._parameters.items()}, batch_size)
        self._plan, self._blocks, self._hooks = plan, dict[str, Block](), list[Any]()
        self._capture = Capture(model, self._parameters, unroll=False, on_use=self._hook)
        self._assembly = Assembly(plan, self._capture.uses, batch_size, self._parameters, self._blocks.__setitem__)
        self._whole = False

    def __enter__(self) -> Self:
        self._capture.__enter__()
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        self._capture.__exit__(kind, value, traceback)
        for hook in self._hooks:
            hook.remove()
        self._whole = kind is None and self._plan.fits(self._capture.uses, self.num_examples)
        if self._whole:
            self._assembly.finish(None)

    def _hook(self, use: Use) -> None:
        layout = self._plan.layouts.get(use.index)
        if layout is not None and layout.fits(use.shape, self.num_examples):
            taking = partial(take, self._assembly, use.index, use.edge.output_nr)
            self._hooks.append(use.edge.node.register_prehook(taking))

    @property
    def coverage(self) -> Coverage:
        return Coverage(1.0, 1.0, self._plan.methods)

    def stream(self, consume: Consumer) -> None:
        if not self._whole or not self._blocks:
            raise Unsupported(
                "No whole training step was seen, with one forward and one backward pass inside the with block, or "
                "one unlike the plan's; make the plan on a batch of the same kind."
            )
        for name, block in self._blocks.items():
            # The loss of a step is a mean, so each example's own gradient is n times what came up for it.
            consume(slice(0, self.num_examples), name, Scaled(block, self.num_examples))
