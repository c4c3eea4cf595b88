"""Exact per-example gradients of a model from one recorded forward pass and one backward pass per micro-batch.

The backward pass goes to the outputs of the recorded calls only; parameter gradients are not even computed.
What a parameter's examples contribute follows from the calls' inputs and these output gradients
(`diag.quantities.per_example.closed_forms`). The first batch is preceded by a self-test on a few examples
(`diag.quantities.per_example.plan`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import InvalidInput, MissingQuantity, Unsupported
from diag.quantities.batch import Batch
from diag.quantities.per_example import plan as planning
from diag.quantities.per_example.gradients import Blocks, Coverage, PerExampleGradients
from diag.quantities.per_example.losses import LossFunction, check_finite, check_mean, example_losses
from diag.quantities.preserve import preserved
from diag.quantities.unwrap import bare_model


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
        trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self._trainable = trainable
        self._parameters = {n: p for n, p in trainable.items() if layers is None or layers(n)}
        _check_parameters(self._parameters, trainable)
        super().__init__(
            {n: tuple(p.shape) for n, p in self._parameters.items()}, sum(b.size for b in self._batches)
        )
        self._plan: planning.Plan | None = None
        self._losses: dict[int, Tensor] = {}
        self._share: float | None = None

    # ---- what comes with the gradients ---------------------------------------------------------

    def losses(self) -> Tensor:
        """(n,): each example's loss."""
        if len(self._losses) < len(self._batches):
            for _ in self.stream():
                pass
        return torch.cat([self._losses[i] for i in range(len(self._batches))])

    @property
    def coverage(self) -> Coverage:
        if self._plan is None:
            next(iter(self.stream()))
        assert self._plan is not None
        missing = tuple(n for n in self._trainable if n not in self._parameters)
        total = sum(p.numel() for p in self._trainable.values())
        methods = {n: self._plan.methods.get(n, "no example moves it") for n in self._parameters}
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

    def stream(self) -> Iterator[tuple[slice, Blocks]]:
        with preserved(self.model, mode=self.mode), _eager():
            start = 0
            for i, batch in enumerate(self._batches):
                blocks, losses = self._blocks(batch, start)
                self._losses[i] = losses
                yield slice(start, start + batch.size), blocks
                start += batch.size

    def _blocks(self, batch: Batch, first_row: int) -> tuple[Blocks, Tensor]:
        """Blocks and losses of one micro-batch; makes the plan at the first, and anew where it does not fit."""
        fresh = self._plan is None
        plan = self._plan or planning.make_plan(self.model, self.loss_fn, batch, self._parameters)
        for whole in (False, True):
            run = planning.forward(self.model, self.loss_fn, batch, self._parameters)
            if planning.matches(plan, run.uses):
                found = self._backward(plan, run, batch, first_row, fresh)
                if found is not None:
                    self._plan = plan
                    return found
            plan, fresh = planning.make_plan(self.model, self.loss_fn, batch, self._parameters, whole=whole), True
        raise Unsupported(
            "The model does other things at every call, so its per-example gradients cannot be told apart; give a "
            "model whose forward pass is the same for every batch."
        )

    def _backward(
        self, plan: planning.Plan, run: planning.Forward, batch: Batch, first_row: int, fresh: bool
    ) -> tuple[Blocks, Tensor] | None:
        """None where the plan turns out not to fit: a call that looked dead in the probe is not."""
        n = batch.size
        through_graph = bool(plan.graph_parameters)
        with torch.set_grad_enabled(through_graph):
            losses = example_losses(self.loss_fn, run.outputs, batch.targets, n)
        check_finite(losses.detach(), first_row)
        check_mean(run.loss.detach(), losses.detach())
        if fresh and n > 1:
            planning.check_independent(self.model, self.loss_fn, batch, losses.detach())
        wanted = sorted(plan.layouts.keys() | plan.unresolved)
        deltas = self._output_gradients(run, [run.uses[i].edge for i in wanted], n, keep=through_graph)
        found = {i: d for i, d in zip(wanted, deltas, strict=True) if d is not None}
        if any(bool(found[i].any()) for i in plan.unresolved if i in found):
            return None
        if not all(layout.fits(run.uses[i].shape, n) for i, layout in plan.layouts.items()):
            return None
        before = len(plan.graph_parameters)
        blocks = planning.blocks_of(plan, run.uses, found, losses, n, self._parameters)
        return (blocks, losses.detach()) if len(plan.graph_parameters) == before else None

    def _output_gradients(
        self, run: planning.Forward, edges: Sequence[Any], n: int, keep: bool
    ) -> Sequence[Tensor | None]:
        """Gradients of sum_i l_i, which is n times the mean, at the outputs of the recorded calls."""
        if not edges:
            return []
        seed = torch.full_like(run.loss, n)
        return torch.autograd.grad([run.loss], edges, [seed], retain_graph=keep or None, allow_unused=True)


def _check_parameters(selected: dict[str, nn.Parameter], trainable: dict[str, nn.Parameter]) -> None:
    if not trainable:
        raise InvalidInput("The model has no trainable parameter; set requires_grad on those to measure.")
    if not selected:
        raise InvalidInput(
            f"No trainable parameter was selected; names are, for example, {', '.join(list(trainable)[:3])}."
        )
    for name, parameter in selected.items():
        if type(parameter.data).__name__ == "DTensor":
            raise Unsupported(
                f"The parameter {name} is sharded (a DTensor); gather the full parameters into an unsharded copy "
                "of the model and measure that."
            )
        if not parameter.is_floating_point():
            raise Unsupported(f"The parameter {name} has dtype {parameter.dtype}; expected real floating point.")


def _eager() -> Any:
    """Compiled submodules run eagerly, so that the calls inside them are seen."""
    return torch.compiler.set_stance("force_eager")
