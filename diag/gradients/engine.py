"""Exact per-example gradients of a model from one recorded forward pass and one backward pass per micro-batch.

The backward pass goes to the outputs of the recorded calls only; parameter gradients are not even computed.
What a parameter's examples contribute follows from the calls' inputs and these output gradients
(`diag.gradients.rules.closed_forms`). The first batch is preceded by a self-test on a few examples
(`diag.gradients.plan`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diag.checkpoints.unwrap import bare_model
from diag.errors import InvalidInput, MissingQuantity, Unsupported, named
from diag.gradients.assembly import Assembly
from diag.gradients.backward import backward
from diag.gradients.coupling import check_independent, losses_of
from diag.gradients.methods import NOT_MOVED
from diag.gradients.per_example import Consumer, Coverage, PerExampleGradients
from diag.gradients.plan import PROBE_SIZES, Forward, NotFinite, Plan, copied, forward, probe_of
from diag.gradients.planning import make_plan
from diag.gradients.queries import Query
from diag.gradients.rules.blocks import Block
from diag.snapshot.batch import Batch
from diag.snapshot.example_losses import LossFunction, check_finite, check_mean, example_losses
from diag.snapshot.parameters import trainable
from diag.snapshot.picking import permuted_targets, picked
from diag.snapshot.preserve import preserved
from diag.snapshot.state.bits import bits_of
from diag.snapshot.state.unmade import REENTRANT, is_reentrant


class ModelGradients(PerExampleGradients):
    """Per-example gradients of `loss_fn(model(inputs), targets)` over `batches`.

    `loss_fn` averages over a batch. `layers` selects parameters by name (a predicate on `named_parameters()`
    names); the rest counts as missing in `coverage`. `micro_batch` bounds the examples held at once. `mode` is
    "eval" unless the model is to be measured as it is ("keep"). The model is left as it was found.

    Raises InvalidInput for a loss that is not a mean or not finite, Unsupported where examples depend on each
    other or the model's parameters cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Sequence[Batch],
        *,
        layers: Callable[[str], bool] | None = None,
        micro_batch: int | None = None,
        mode: str = "eval",
    ) -> None:
        self.model, self.loss_fn, self.mode = bare_model(model), loss_fn, mode
        self._batches = [part for batch in batches for part in batch.split(micro_batch)]
        if not self._batches:
            raise MissingQuantity("The data holds no batch; per-example gradients need at least one example.")
        self._trainable, self._select = trainable(self.model), layers
        self._parameters = {n: p for n, p in self._trainable.items() if layers is None or layers(n)}
        _check_parameters(self._parameters, list(self._trainable))
        super().__init__(
            {n: tuple(p.shape) for n, p in self._parameters.items()}, sum(b.size for b in self._batches)
        )
        self.num_batches = len(self._batches)
        self._plan: Plan | None = None
        self._independent = False  # examples were seen not to influence each other
        self._losses: dict[int, Tensor] = {}  # by first row
        self._values: tuple[Any, ...] = ()  # of the parameters that the losses and norms were taken at
        self._share: float | None = None

    # ---- what comes with the gradients ---------------------------------------------------------

    def with_permuted_targets(self, seed: int = 0) -> ModelGradients:
        """The same network and inputs with the targets permuted among the examples."""
        return self._on(permuted_targets(self._batches, seed))

    def select(self, rows: Sequence[int]) -> ModelGradients:
        """The gradients of some examples only, in the order given."""
        return self._on(picked(self._batches, rows))

    def _on(self, batches: Sequence[Batch]) -> ModelGradients:
        other = ModelGradients(self.model, self.loss_fn, batches, layers=self._select, mode=self.mode)
        other.deadline = self.deadline
        return other

    def prepare(self) -> None:
        """Make the plan for the first batch, with its self-test; otherwise the first query does."""
        if self._plan is None:
            with preserved(self.model, mode=self.mode), _eager():
                self._plan = self._make_plan(self._batches[0], slice(0, self._batches[0].size), PROBE_SIZES[0])

    def losses(self) -> Tensor:
        """(n,): each example's loss."""
        self._forget_other_states()
        if len(self._losses) < len(self._batches):
            self.stream(_ignore)
        return torch.cat([self._losses[start] for start in sorted(self._losses)])

    @property
    def coverage(self) -> Coverage:
        if self._plan is None:
            self.stream(_ignore)
        assert self._plan is not None
        missing = tuple(n for n in self._trainable if n not in self._parameters)
        total = sum(p.numel() for p in self._trainable.values())
        methods = {n: self._plan.methods.get(n, NOT_MOVED) for n in self._parameters}
        return Coverage(self.num_parameters / total, self._squared_share(missing), methods, missing)

    def _squared_share(self, missing: Sequence[str]) -> float:
        """Share of the squared mean gradient in the selected parameters; needs one ordinary backward pass."""
        if not missing:
            return 1.0
        if self._share is None:
            totals = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in self._trainable.items()}
            with preserved(self.model, mode=self.mode), torch.enable_grad():
                for batch in self._batches:
                    loss = self.loss_fn(batch.forward(self.model), batch.targets) * batch.size
                    found = torch.autograd.grad(loss, list(self._trainable.values()), allow_unused=True)
                    for name, gradient in zip(self._trainable, found, strict=True):
                        if gradient is not None:
                            totals[name] += gradient.to_dense()
            squares = {n: float(t.square().sum()) for n, t in totals.items()}
            whole = sum(squares.values())
            self._share = sum(squares[n] for n in self._parameters) / whole if whole else float("nan")
        return self._share

    # ---- the stream ----------------------------------------------------------------------------

    def stream(self, consume: Consumer) -> None:
        with preserved(self.model, mode=self.mode), _eager():
            start = 0
            for batch in self._batches:
                self.deadline.check()
                rows = slice(start, start + batch.size)
                losses = self._stream_batch(batch, rows, consume)
                self._losses[rows.start] = losses
                start += batch.size

    def _stream_batch(self, batch: Batch, rows: slice, consume: Consumer) -> Tensor:
        """One micro-batch; makes the plan at the first, and again where it does not fit. Returns the losses."""
        sizes = list(PROBE_SIZES)
        while self._plan is not None or sizes:
            fresh = not self._independent
            plan = self._plan = self._plan or self._make_plan(batch, rows, sizes.pop(0))
            run = forward(
                self.model, self.loss_fn, copied(batch) if plan.overwrites_inputs else batch, self._parameters
            )
            alive = self._revived_calls(plan, run)
            if alive and not sizes:
                plan.give_up(alive, run.uses)
            elif alive or not plan.fits(run.uses, batch.size):
                self._plan = None
                continue
            keep_graph = bool(plan.graph_parameters)
            losses = self._example_losses(run, batch, rows, keep_graph)
            if fresh and batch.size > 1:
                check_independent(self.model, self.loss_fn, batch, losses.detach())
                self._independent = True
            run.outputs = None  # nothing that follows needs them; the graph keeps what it does
            assembly = Assembly(plan, run.uses, batch.size, self._parameters, partial(consume, rows), self.deadline)
            backward(run, plan, assembly, batch.size, keep_graph)
            assembly.finish(losses if keep_graph else None)
            return losses.detach()
        raise Unsupported(
            "The model does other things at every call, so its per-example gradients cannot be told apart; give a "
            "model whose forward pass is the same for every batch."
        )

    def _example_losses(self, run: Forward, batch: Batch, rows: slice, keep_graph: bool) -> Tensor:
        """Each example's loss, checked; without a graph they are taken once for one state of the parameters."""
        self._forget_other_states()
        if not keep_graph and rows.start in self._losses:
            return self._losses[rows.start]
        with torch.set_grad_enabled(keep_graph):
            losses = example_losses(self.loss_fn, run.outputs, batch.targets, batch.size)
        check_finite(losses.detach(), rows.start)
        check_mean(run.loss.detach(), losses.detach())
        return losses

    def _forget_other_states(self) -> None:
        values = tuple(bits_of(p) for p in self._parameters.values())
        if values != self._values:
            self._losses, self._known, self._values = {}, {}, values

    def ask(self, *queries: Query) -> tuple[Any, ...]:
        self._forget_other_states()
        return super().ask(*queries)

    def _make_plan(self, batch: Batch, rows: slice, size: int) -> Plan:
        probe = probe_of(batch, size, lambda: losses_of(self.model, self.loss_fn, batch))
        try:
            return make_plan(self.model, self.loss_fn, probe, self._parameters, deadline=self.deadline)
        except RuntimeError as error:
            if not is_reentrant(error):
                raise
            raise Unsupported(REENTRANT) from None
        except NotFinite:
            check_finite(losses_of(self.model, self.loss_fn, batch), rows.start)
            raise Unsupported(
                "The loss of the first examples is not finite when they are taken in a smaller batch; look for a "
                "division by a batch statistic."
            ) from None

    def _revived_calls(self, plan: Plan, run: Forward) -> set[int]:
        """Calls whose gradient was zero on the plan's few examples and is not here."""
        calls = sorted(i for i in plan.unresolved if i < len(run.uses))
        if not calls:
            return set()
        edges = [run.uses[i].edge for i in calls]
        found = torch.autograd.grad([run.loss], edges, retain_graph=True, allow_unused=True)
        return {i for i, g in zip(calls, found, strict=True) if g is not None and bool(g.any())}


def _check_parameters(selected: dict[str, nn.Parameter], names: list[str]) -> None:
    if not selected:
        raise InvalidInput(f"No trainable parameter was selected; names are, for example, {named(names)}.")
    for name, parameter in selected.items():
        if nn.parameter.is_lazy(parameter):
            raise InvalidInput(f"The parameter {name} has no shape yet; run the model on one batch first.")
        if type(parameter.data).__name__ == "DTensor":
            raise Unsupported(
                f"The parameter {name} is sharded (a DTensor); gather the full parameters into an unsharded copy "
                "of the model and measure that."
            )
        if not parameter.is_floating_point():
            raise Unsupported(f"The parameter {name} has dtype {parameter.dtype}; expected real floating point.")


def _ignore(rows: slice, name: str, block: Block) -> None:
    pass


def _eager() -> AbstractContextManager[Any]:
    """Compiled submodules run eagerly, so that the calls inside them are seen."""
    if "torch._dynamo" not in sys.modules:  # nothing was ever compiled, and importing it takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
