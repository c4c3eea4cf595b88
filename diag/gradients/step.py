"""Per-example gradients of a training step, from its own forward and backward pass.

    plan = plan_for_steps(model, loss_fn, batch)              # once
    with StepGradients(model, plan, batch_size=len(x), ask=[SquaredNorms()]) as step:
        loss_fn(model(x), y).backward()
    step.norms()

The step itself stays as it is, bit for bit: the recorded calls run unchanged, and hooks read output gradients that
the backward pass makes anyway. What was asked beforehand is answered inside these hooks, layer by layer, and
nothing is kept; without `ask`, the step's activations are held until the object is dropped, and anything can be
asked. Where only hooks around the forward pass are available, `end_forward` ends the recording, and `ask_only`
takes queries up to the backward pass. What the loss was scaled by (accumulation, a GradScaler) scales the gradients
here too; ratios such as coherence do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from diag.errors import Unsupported, first_line, named
from diag.gradients.assembly import Assembly
from diag.gradients.capture import Capture, Use
from diag.gradients.layer_rules import Rule
from diag.gradients.per_example import Consumer, Coverage, PerExampleGradients
from diag.gradients.plan import PROBE_SIZES, Plan, probe_of
from diag.gradients.planning import make_plan
from diag.gradients.queries import Accumulator, Query
from diag.gradients.rules.blocks import Block
from diag.gradients.rules.combination import Scaled
from diag.snapshot.batch import Batch
from diag.snapshot.example_losses import LossFunction
from diag.snapshot.parameters import trainable
from diag.snapshot.preserve import exact_arithmetic, preserved
from diag.snapshot.state.modes import unseen


def plan_for_steps(model: nn.Module, loss_fn: LossFunction, batch: Batch) -> Plan:
    """Where the examples lie in the calls of a training step; the model is left as it was.

    Raises Unsupported where a step cannot be read: BatchNorm on batch statistics ties examples together, and calls
    without a closed form, or recurrent kernels, would need passes of their own.
    """
    probe = probe_of(batch, PROBE_SIZES[0], lambda: NotImplemented)
    with preserved(model, mode="train"):
        plan = make_plan(model, loss_fn, probe, trainable(model), unroll=False)
    unread = plan.graph_parameters | {n for n, method in plan.methods.items() if method.one_by_one}
    if unread or plan.late:
        batch_norm = any(isinstance(m, _BatchNorm) and m.training for m in model.modules())
        why = "BatchNorm on batch statistics" if batch_norm else "a call whose rule is not known here"
        where = f" in {named(sorted(unread))}" if unread else ""
        raise Unsupported(
            f"The training step's own gradients cannot be told apart by example{where} ({why}); measure on a "
            "snapshot instead."
        )
    return plan


class _Undisturbing(Capture):
    """Records calls and lets nothing that goes wrong in that reach them: each runs once, as it was asked for."""

    _broken = False

    def _call(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if self._broken:
            return func(*args, **kwargs)
        once, index = _Once(func), len(self.uses)
        try:
            result = super()._call(name, once, args, kwargs)
        except Exception:
            if once.called and not once.results:
                raise  # the call's own
            self._broken = True
            self.uses.clear()  # so that the step is seen to differ from the plan
            result = once.results[0] if once.results else func(*args, **kwargs)
        once.results = None
        for use in self.uses[index:]:
            use.func = func
        return result

    def layer_ends(self, layer: nn.Module, rule: Rule, args: Any, kwargs: Any, output: Any) -> None:
        try:
            super().layer_ends(layer, rule, args, kwargs, output)
        except Exception:
            self._broken = True
            self.uses.clear()


class _Once:
    """A call that remembers its result; without a list for the `results` it only passes on."""

    def __init__(self, func: Any) -> None:
        self.func, self.called = func, False
        self.results: list[Any] | None = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        result = self.func(*args, **kwargs)
        if self.results is not None:
            self.results.append(result)
        return result


class StepGradients(PerExampleGradients):
    """The gradients of the step that ran inside `with`.

    `ask`: the only queries (`diag.gradients.queries`) that there will be. Nothing that goes wrong
    in reading the step reaches it: queries raise Unsupported where no whole step was seen, or one that made
    other calls than the plan's.
    """

    def __init__(self, model: nn.Module, plan: Plan, batch_size: int, ask: Sequence[Query] | None = None) -> None:
        self._parameters = trainable(model)
        super().__init__({name: tuple(p.shape) for name, p in self._parameters.items()}, batch_size)
        self._plan, self._blocks, self._hooks = plan, dict[str, Block](), list[Any]()
        self._answers: dict[Query, Accumulator] | None = None
        if ask is not None:
            self.ask_only(ask)
        self.unplanned = False  # whether something else was asked than what had been asked beforehand
        self._capture = _Undisturbing(model, self._parameters, unroll=False, on_use=self._hook)
        self._assembly = Assembly(plan, self._capture.uses, batch_size, self._parameters, self._consume)
        self._on_cpu = all(p.device.type == "cpu" for p in self._parameters.values())
        self._taken: set[int] = set()
        self._trouble: str | None = "there was no backward pass"  # why the step was not seen whole

    def ask_only(self, queries: Iterable[Query]) -> None:
        """Announce the only queries that there will be, before the backward pass begins."""
        self._answers = {query: query.begin(self) for query in queries}

    def __enter__(self) -> Self:
        self._trouble, self._recording = None, True
        self._capture.__enter__()
        return self

    def end_forward(self) -> None:
        """The forward pass is over: what follows inside `with`, but for the backward pass, is not looked at."""
        if self._recording:
            self._recording = False
            self._capture.__exit__(None, None, None)

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        self.end_forward()
        for hook in self._hooks:
            hook.remove()
        if kind is not None:
            self._trouble = f"the step raised {kind.__name__}"
        self._read(self._finish)
        # They and this object hold each other, and the activations: freed here, they do not wait for the collector.
        del self._capture, self._assembly, self._hooks

    def _finish(self) -> None:
        if not self._taken:
            raise Unsupported("there was no backward pass")
        self._check_calls()
        self._assembly.finish(None)
        if self._answers is not None:
            self._known |= {query: accumulator.result() for query, accumulator in self._answers.items()}

    def _check_calls(self) -> None:
        if not self._plan.fits(self._capture.uses, self.num_examples):
            raise Unsupported("it made other calls than the plan's")

    def _read(self, work: Callable[[], None]) -> None:
        """Arithmetic of our own within the user's step: not seen by the capture, exact, and never raising."""
        if self._trouble is not None:
            return
        try:
            with unseen(), torch._C.DisableTorchFunction(), torch.no_grad(), self._exact():
                work()
        except Exception as error:
            self._trouble = first_line(error)

    def _exact(self) -> AbstractContextManager[None]:
        return nullcontext() if self._on_cpu and not torch.is_autocast_enabled("cpu") else exact_arithmetic()

    def _hook(self, use: Use) -> None:
        """A call of the forward pass: wait for its output's gradient where the plan reads it."""
        layout = self._plan.layouts.get(use.index)
        if layout is None or not layout.fits(use.shape, self.num_examples):
            self._capture.uses[use.index] = use.bare()
        else:
            taking = partial(self._take, use.index, use.edge.output_nr)
            self._hooks.append(use.edge.node.register_prehook(taking))

    def _take(self, index: int, output: int, gradients: Sequence[Tensor | None]) -> None:
        """Before the backward pass goes through a call: its output's gradient and its inputs are there."""
        delta = gradients[output]
        if delta is None:
            return
        self._read(partial(self._add, index, delta.detach()))

    def _add(self, index: int, delta: Tensor) -> None:
        if index in self._taken:
            raise Unsupported("there were several backward passes")
        if not self._taken:
            self._check_calls()
        self.deadline.check()
        self._taken.add(index)
        self._assembly.add(index, delta)

    def _consume(self, name: str, block: Block) -> None:
        # The loss of a step is a mean, so each example's own gradient is n times what came up for it.
        block = Scaled(block, self.num_examples)
        if self._answers is None:
            self._blocks[name] = block
            return
        for accumulator in self._answers.values():
            self.deadline.check()
            accumulator.consume(slice(0, self.num_examples), name, block)

    @property
    def coverage(self) -> Coverage:
        return Coverage(1.0, 1.0, self._plan.methods)

    def stream(self, consume: Consumer) -> None:
        self._check()
        if self._answers is not None:
            self.unplanned = True
            raise Unsupported(
                "This was not among the queries asked before the step, and it is over; add the query to ask=."
            )
        with torch.no_grad(), self._exact():
            for name, block in self._blocks.items():
                consume(slice(0, self.num_examples), name, block)

    def ask(self, *queries: Query) -> tuple[Any, ...]:
        self._check()
        return super().ask(*queries)

    def _check(self) -> None:
        if self._trouble is not None:
            raise Unsupported(
                "No whole training step was seen, with one forward and one backward pass inside the with block "
                f"({self._trouble}); where its calls differ, make the plan on a batch of the same kind."
            )
