"""The quantity `per_example_gradients`: what can be asked of n gradients without ever holding n x P numbers.

`PerExampleGradients` answers from a stream of blocks, one micro-batch at a time. `ModelGradients` gets them from a
model (`diag.gradients.engine`), `MatrixGradients` from a matrix (`diag.gradients.from_matrix`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diag.errors import InvalidInput
from diag.gradients.methods import Method
from diag.gradients.queries import (
    Accumulator,
    Everything,
    Gram,
    GroupGram,
    GroupSums,
    Projection,
    Query,
    SquaredNorms,
)
from diag.gradients.rules.blocks import Block
from diag.linalg.deadline import NEVER, Deadline
from diag.snapshot.parameters import FlatLayout, layer_of

Consumer = Callable[[slice, str, Block], None]  # the examples' rows, the parameter's name, its block


@dataclass(frozen=True)
class Coverage:
    """How much of the gradient the numbers cover.

    `parameters`: share of the trainable parameters. `squared_gradient`: share of the squared norm of the
    mean gradient. `methods`: how each parameter's gradients were computed. `missing`: parameters left out.
    """

    parameters: float
    squared_gradient: float
    methods: Mapping[str, Method]
    missing: tuple[str, ...] = ()


class PerExampleGradients:
    """Gradients g_1 ... g_n of the examples' losses at one set of parameters.

    Flat vectors follow `named_parameters()` order, trainable parameters only, tied ones once. A layer is what
    `parameters.layer_of` says. Norms and inner products come in float64. `deadline` is checked between parameters
    and examples. Subclasses give `stream` and `coverage`.
    """

    num_batches = 1
    deadline: Deadline = NEVER

    def __init__(self, shapes: Mapping[str, Sequence[int]], num_examples: int) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.num_examples = num_examples
        flat = FlatLayout.of(self.shapes)
        self.columns, self.num_parameters = flat.columns, flat.size
        self._known: dict[Query, Any] = {}  # answers that are kept

    @property
    def coverage(self) -> Coverage:
        """How much of the gradient this covers, and by which methods."""
        raise NotImplementedError

    def stream(self, consume: Consumer) -> None:
        """Call `consume(rows, name, block)` for each parameter of each micro-batch, in any order.

        A block is good for as long as it is kept; parameters that no example moves are left out.
        """
        raise NotImplementedError

    @property
    def examples(self) -> Tensor:
        """(n,): which example each gradient is of; those of one example have their noise in common."""
        return torch.arange(self.num_examples)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in order."""
        return tuple(dict.fromkeys(map(layer_of, self.shapes)))

    def parameters_of(self, layer: str) -> list[str]:
        """The names of the parameters in this layer."""
        return [name for name in self.shapes if layer_of(name) == layer]

    # ---- answers -------------------------------------------------------------------------------

    def ask(self, *queries: Query) -> tuple[Any, ...]:
        """The answers to several queries (`diag.gradients.queries`) from one pass.

        Squared norms are kept for the next time; all else is computed again.
        """
        accumulators = {query: query.begin(self) for query in queries if query not in self._known}
        if accumulators:
            self.stream(partial(_hand_on, self.deadline, list(accumulators.values())))
        found = {query: accumulator.result() for query, accumulator in accumulators.items()}
        if SquaredNorms() in found:
            self._known[SquaredNorms()] = found[SquaredNorms()]
        return tuple((found | self._known)[query] for query in queries)

    def norms(self) -> Tensor:
        """(n,) float64: ||g_i||."""
        return torch.stack(list(self.squared_norms_by_layer().values())).sum(0).sqrt()

    def squared_norms_by_layer(self) -> dict[str, Tensor]:
        """Per layer, (n,) float64: ||g_i||^2 over that layer's parameters. Computed once."""
        found: dict[str, Tensor] = self.ask(SquaredNorms())[0]
        return found

    def mean(self) -> Tensor:
        """(P,): the gradient of the mean loss."""
        return self.group_sums([torch.arange(self.num_examples)])[0] / self.num_examples

    def group_sums(self, groups: Sequence[Tensor]) -> Tensor:
        """(number of groups, P): the sum of g_i over each group, given as index tensors into the examples.

        Costs about one ordinary parameter gradient for each time that an example occurs in a group.
        """
        found: Tensor = self.ask(GroupSums(as_groups(groups)))[0]
        return found

    def group_gram_by_layer(self, groups: Sequence[Tensor]) -> dict[str, Tensor]:
        """Per layer, (G, G) float64: inner products of the groups' summed gradients.

        The norms are taken in the same pass. With one micro-batch no more than one parameter's sums are held; with
        several, those of all parameters, or of as many as fit into memory, in a pass over the data for each part.
        """
        first, *more = GroupGram(as_groups(groups)).parts(self)
        found: dict[str, Tensor] = self.ask(first, SquaredNorms())[0]
        for part in more:
            for layer, gram in self.ask(part)[0].items():
                found[layer] = found[layer] + gram
        return found

    def gram(self) -> Tensor:
        """(n, n) float64: <g_i, g_j>. Keeps the factors of all micro-batches while it runs."""
        return torch.stack(list(self.gram_by_layer().values())).sum(0)

    def gram_by_layer(self) -> dict[str, Tensor]:
        """Per layer, (n, n) float64: inner products over that layer's parameters."""
        found: dict[str, Tensor] = self.ask(Gram())[0]
        return found

    def project(self, directions: Tensor) -> Tensor:
        """(n, m): <g_i, v_j> for flat directions (m, P) or one direction (P,).

        Raises InvalidInput where the directions' length is not P.
        """
        return torch.stack(list(self.project_by_layer(directions).values())).sum(0)

    def project_by_layer(self, directions: Tensor) -> dict[str, Tensor]:
        """Per layer, (n, m) float64: the layer's part of <g_i, v_j>."""
        directions = torch.as_tensor(directions)
        directions = directions[None] if directions.ndim == 1 else directions
        if directions.ndim != 2 or directions.shape[1] != self.num_parameters:
            raise InvalidInput(
                f"The directions have the shape {tuple(directions.shape)}; expected (m, {self.num_parameters}), "
                "one flat vector of all trainable parameters per row."
            )
        found: dict[str, Tensor] = self.ask(Projection(directions))[0]
        return found

    def dense(self) -> Tensor:
        """(n, P): all gradients in full. Only for small models: n times the parameters' memory."""
        found: Tensor = self.ask(Everything())[0]
        return found

    def select(self, rows: Sequence[int]) -> PerExampleGradients:
        """The gradients of some examples only, in the order given."""
        raise NotImplementedError

    def by_layer(self) -> dict[str, LayerGradients]:
        """Each layer's own gradients, with the same queries."""
        return {layer: LayerGradients(self, layer) for layer in self.layers}


class LayerGradients(PerExampleGradients):
    """The part of the gradients that belongs to one layer."""

    def __init__(self, whole: PerExampleGradients, layer: str) -> None:
        names = whole.parameters_of(layer)
        super().__init__({name: whole.shapes[name] for name in names}, whole.num_examples)
        self.whole, self.layer, self.num_batches = whole, layer, whole.num_batches

    @property
    def coverage(self) -> Coverage:
        return self.whole.coverage

    def stream(self, consume: Consumer) -> None:
        def only_mine(rows: slice, name: str, block: Block) -> None:
            if name in self.shapes:
                consume(rows, name, block)

        self.whole.stream(only_mine)

    def select(self, rows: Sequence[int]) -> PerExampleGradients:
        return LayerGradients(self.whole.select(rows), self.layer)

    def squared_norms_by_layer(self) -> dict[str, Tensor]:
        return {self.layer: self.whole.squared_norms_by_layer()[self.layer]}


def _hand_on(deadline: Deadline, accumulators: Sequence[Accumulator], rows: slice, name: str, block: Block) -> None:
    for accumulator in accumulators:
        deadline.check()
        accumulator.consume(rows, name, block)


def as_groups(groups: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Groups of examples as a value, for `GroupSums` and `GroupGram`."""
    return tuple(tuple(torch.as_tensor(group).tolist()) for group in groups)
