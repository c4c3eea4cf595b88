"""A curvature matrix of a network's loss as a linear operator; `matrices` has the Hessian and its kin.

The matrices act on flat vectors of the trainable parameters in `named_parameters()` order. Products are exact
sums over all batches, in evaluation mode, in float32 unless the model is float64. Before its first product an
operator tests itself on the model (selftest.py); what cannot be right raises Unsupported. A model
wrapped in torch.compile, DataParallel or DistributedDataParallel is measured bare. Where the data are split over
ranks (`Snapshot(..., ranks=True)`), each product is the mean over all ranks' data by one all_reduce. Products take
whole vectors, equal on every rank bit for bit; the algorithms of `linalg` keep 1/W of each vector on a rank
(`apply`), and take the same decisions on each. Of a sharded model whose layers are gathered one at a time
(`by_layer.py`) parts of vectors are as its shards, and none is whole anywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from diag.checkpoints.unwrap import bare_model
from diag.curvature.by_layer import ShardedObjective, SpreadByLayer
from diag.curvature.carry import Carried
from diag.curvature.layout import layout_of, participation
from diag.curvature.memory import MemoryPlan, available_memory, plan_memory
from diag.curvature.objective import PRECISIONS, LossFn, Objective, native_precision
from diag.curvature.probe import refuse_cut
from diag.curvature.products import Curvature, Graph, differenced_products, rebuilt_products
from diag.curvature.record import SelfTest
from diag.curvature.selftest import run_self_test
from diag.curvature.values import Values
from diag.distributed.together import Together
from diag.errors import InvalidInput, Unsupported
from diag.linalg.operator import LinearOperator
from diag.linalg.reductions import IN_ONE_PROCESS, Spread, SpreadOver
from diag.snapshot.batch import Batch, fingerprint
from diag.snapshot.parameters import FlatLayout
from diag.snapshot.picking import random_blocks_of, subsampled
from diag.snapshot.sharded.by_layer import ByLayer


class CurvatureOperator(LinearOperator):
    """A curvature matrix of the mean loss over `batches`; subclasses say which.

    model: the network; it is left as it was by every product. loss_fn(outputs, targets): the batch's mean.
    precision: "float32" or "float64"; by default the model's own, float32 where that is a half precision.
    memory: the bytes that graphs may hold; by default a quarter of what is free. The graph of all the data is
        kept between products where it fits, else it is rebuilt for each in micro-batches that fit.
    ranks: the ranks that share the data, `batches` being this one's; all make the same products. weight: what its
        share counts (by default the number of its examples).
    layers: of a sharded model that no rank holds whole (`model` is then its copy that gathers; ranks and weight are
        given with it).
    micro_batch: the most examples per pass. seed: of the self-test's random direction. checked: a self-test of
        the same model, to spare a second one.

    Raises InvalidInput or Unsupported where the model, loss or data cannot be measured.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Batch],
        *,
        precision: str | None = None,
        memory: int | None = None,
        micro_batch: int | None = None,
        seed: int = 0,
        checked: SelfTest | None = None,
        ranks: Together | None = None,
        weight: float | None = None,
        layers: ByLayer | None = None,
    ):
        model = bare_model(model)
        precision = native_precision(model) if precision is None else precision
        if precision not in PRECISIONS:
            raise InvalidInput(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
        self._whole_batches = tuple(batches)  # as they were before any is cut
        parts = tuple(part for batch in self._whole_batches for part in batch.split(micro_batch))
        if not parts:
            raise InvalidInput("There is no batch to measure curvature on; give at least one.")
        self._layers = layers
        if layers is None:
            self.objective = Objective(model, loss_fn, parts, layout_of(model), precision)
        else:
            assert weight is not None
            self.objective = ShardedObjective.of(layers, loss_fn, parts, precision, weight)
        super().__init__(self.layout.size, self.objective.dtype, self.objective.device)
        self._settings: dict[str, Any] = {"memory": memory, "seed": seed, "ranks": ranks, "layers": layers}
        self.spread = _spread_of(ranks, layers)
        self._weight = weight
        self._self_test = checked
        self._plan: MemoryPlan | None = None
        self._graph: Graph | None = None
        self._entered_in: int | None = None  # the thread that is inside `many_products`
        self._values = Values(model)
        self.carried: Carried | None = None  # what earlier measurements left: see carry.py

    def _curvature(self) -> Curvature:
        raise NotImplementedError

    # -- what is known about it --------------------------------------------------------------------

    @property
    def layout(self) -> FlatLayout:
        """The names, shapes and slices of the parameters in the flat vectors."""
        return self.objective.layout if self._layers is None else FlatLayout.of(self._layers.shapes)

    @property
    def layers(self) -> dict[str, slice]:
        """Layer name -> slice of the flat vectors; `block(layers[name])` is that layer's block."""
        return self.layout.layers

    @property
    def num_examples(self) -> int:
        """The number of examples that the mean is over."""
        return self._all_examples if self._settings["ranks"] is not None else self.objective.num_examples

    @cached_property
    def _all_examples(self) -> int:
        return round(self._settings["ranks"].total(self.objective.num_examples))

    @property
    def free_memory(self) -> int:
        """The bytes that an algorithm may take for its vectors, the same on all ranks."""
        own, ranks = available_memory(self.device), self._settings["ranks"]
        return own if ranks is None else int(ranks.least(own))

    @property
    def self_test(self) -> SelfTest:
        """The record of the self-test, which runs when first needed. Raises Unsupported where it fails."""
        if self._self_test is None and self._settings["ranks"] is not None:
            self._settings["ranks"].all_succeed(self._run_self_test)
        elif self._self_test is None:
            self._run_self_test()
        assert self._self_test is not None
        return self._self_test

    def _run_self_test(self) -> None:
        with self._one_pass():
            test = run_self_test(self._curvature(), self.objective, self._settings["seed"])
        if self._layers is None:
            refuse_cut(self.objective, self._whole_batches, self.objective.batches)
        self._self_test = test

    def _one_pass(self) -> AbstractContextManager[None]:
        return nullcontext() if self._layers is None else self._layers.lock.one_pass()

    @property
    def memory_plan(self) -> MemoryPlan:
        """Whether graphs are kept between products, the micro-batches, and the bytes behind that choice."""
        if self._plan is None:
            memory = self._settings["memory"]
            if self.self_test.differenced or self._layers is not None:
                self._plan = MemoryPlan(False, self.objective.batches, 0, memory or 0)
            else:
                plan = plan_memory(self._curvature(), self.objective, memory)
                refuse_cut(self.objective, self.objective.batches, plan.batches)
                self._plan = plan
        return self._plan

    def _details(self) -> tuple[Any, ...]:
        loss = self.objective.loss_fn
        name = getattr(loss, "__qualname__", type(loss).__qualname__)
        batches = [batch.size for batch in self.objective.batches]
        return self.objective.precision, name, batches, fingerprint(self.objective.batches), self._values.digest

    def subsample(self, num_examples: int, seed: int = 0) -> Self:
        """The same matrix on `num_examples` of the examples, drawn without replacement."""
        if self._settings["ranks"] is not None:
            raise Unsupported("A matrix over ranks is not subsampled; give each rank fewer examples.")
        return self._on(subsampled(self.objective.batches, num_examples, seed))

    def blocks(self, count: int, seed: int = 0) -> list[Self]:
        """The same matrix on `count` disjoint random blocks of the examples.

        Raises InvalidInput where there are fewer examples than blocks.
        """
        ranks = self._settings["ranks"]
        if ranks is not None and (least := int(ranks.least(self.objective.num_examples))) < count:
            raise InvalidInput(f"A rank has {least} examples, fewer than {count} blocks; give each rank more.")
        return [self._on(block) for block in random_blocks_of(self.objective.batches, count, seed)]

    def _on(self, batches: list[Batch]) -> Self:
        settings = self._settings | {"precision": self.objective.precision, "checked": self.self_test}
        if (ranks := self._settings["ranks"]) is not None:
            part = self._share * sum(batch.size for batch in batches) / self.objective.num_examples
            settings["weight"] = part / ranks.total(part)
        other = type(self)(self.objective.model, self.objective.loss_fn, batches, **settings)
        other.deadline = self.deadline
        return other

    # -- products ------------------------------------------------------------------------------------

    def apply(self, part: Tensor) -> Tensor:
        """This process's part of A v, from its part of v."""
        if self._layers is None:
            return super().apply(part)
        self.num_products += 1
        return self._part_of_product(part)

    def _part_of_product(self, part: Tensor) -> Tensor:
        """Where layers are gathered one at a time: nothing of it is whole anywhere."""
        ranks, _ = self._settings["ranks"], self.self_test
        ranks.all_succeed(self.deadline.check)  # and that of the ranks
        with self._one_pass():
            return self._own_product(part)

    def _matvec(self, v: Tensor) -> Tensor:
        if self._layers is not None:
            return self.spread.whole(self._part_of_product(self.spread.part(v)), self.size)
        return self._over_ranks(lambda: self._own_product(v), v)

    def _over_ranks(self, product: Callable[[], Tensor], like: Tensor) -> Tensor:
        """The mean over the ranks' shares of the data of this rank's product."""
        ranks = self._settings["ranks"]
        if ranks is None:
            return product()
        weight, _ = self._share, self.self_test  # what all ranks do together comes before what one does alone
        return ranks.sum(lambda: product() * weight, like)

    @cached_property
    def _share(self) -> float:
        return self.objective.num_examples / self._all_examples if self._weight is None else self._weight

    def _own_product(self, v: Tensor) -> Tensor:
        graph = self._kept_graph()
        if graph is None:
            return self._rebuilt(v[None])[0]
        layout = self.objective.layout
        with self._replayed(), self.objective.plain_kernels():
            pieces = graph.product(layout.views(v), True)
        return layout.flatten(pieces, v)

    @contextmanager
    def many_products(self) -> Iterator[None]:
        """Enters what surrounds products from a kept graph once; the others each call the model and stand alone."""
        if (ranks := self._settings["ranks"]) is not None:
            _ = self.self_test  # what all ranks do together comes before what each does alone
            ranks.all_succeed(self._kept_graph)
        with self._replayed():
            yield

    @contextmanager
    def _replayed(self) -> Iterator[None]:
        if self._entered_in == threading.get_ident() or self._kept_graph() is None:
            yield
            return
        before, self._entered_in = self._entered_in, threading.get_ident()
        try:
            with self.objective.replayed():
                yield
        finally:
            self._entered_in = before

    def _matvecs(self, vectors: Tensor) -> Tensor:
        if self._layers is not None:
            return torch.stack([self._matvec(v) for v in vectors])
        if self._settings["ranks"] is not None:  # one sum for all of them
            return self._over_ranks(lambda: self._own_products(vectors), vectors)
        return super()._matvecs(vectors) if self._kept_graph() is not None else self._rebuilt(vectors)

    def _own_products(self, vectors: Tensor) -> Tensor:
        if self._kept_graph() is None:
            return self._rebuilt(vectors)
        with self._replayed():
            return torch.stack([self._own_product(v) for v in vectors])

    def _kept_graph(self) -> Graph | None:
        """The graph of all the data where the plan keeps one, rebuilt after a write to the parameters."""
        plan = self.memory_plan
        if self._values.were_rewritten():
            self._graph = None
        if self._graph is None and plan.retained:
            try:
                with self.objective.measured():
                    parameters = self.objective.parameters()
                    self._graph = self._curvature().graph(self.objective, parameters, plan.batches)
            except torch.OutOfMemoryError:
                self._plan = MemoryPlan(False, plan.batches, plan.graph_bytes, plan.allowed_bytes)
        return self._graph

    def _rebuilt(self, vectors: Tensor) -> Tensor:
        test, curvature = self.self_test, self._curvature()
        if test.differenced:
            objective = self.objective.at_precision(test.precision)
            return differenced_products(curvature, objective, vectors, test.step)
        return rebuilt_products(curvature, self.objective, self.memory_plan.batches, vectors, self.deadline)

    def layer_shares(self, part: Tensor) -> dict[str, float]:
        """The share of a vector's squared length in each layer, from this process's part of it."""
        if self._layers is None:
            return participation(self.layout, self.spread.whole(part, self.size))
        layers = self.objective.layout.layers
        squares = self.objective.lengths([part[own] for own in layers.values()]).square()
        return dict(zip(layers, (squares / squares.sum()).tolist(), strict=True))

    def release(self) -> None:
        """Free the kept graph; the next product builds it again."""
        self._graph = None

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, num_examples={self.num_examples})"


def _spread_of(ranks: Together | None, layers: ByLayer | None) -> Spread:
    if layers is not None:
        return SpreadByLayer(layers)
    return IN_ONE_PROCESS if ranks is None else SpreadOver(ranks.rank, ranks.world, ranks.totals, ranks.joined)
