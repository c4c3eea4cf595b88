"""The quantity `per_example_gradients`: what can be asked of n gradients without ever holding n x P numbers.

`PerExampleGradients` answers from a stream of blocks, one micro-batch at a time. `ModelGradients` gets them from a
model (`diag.quantities.per_example.engine`), `MatrixGradients` from a matrix (`diag.quantities.per_example.given`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diag.errors import InvalidInput
from diag.quantities.parameters import layer_of
from diag.quantities.per_example.blocks import Block, matrix_shape

Consumer = Callable[[slice, str, Block], None]  # the examples' rows, the parameter's name, its block


@dataclass(frozen=True)
class Coverage:
    """How much of the gradient the numbers speak for.

    `parameters`: share of the trainable parameters. `squared_gradient`: share of the squared norm of the
    mean gradient. `methods`: how each parameter's gradients were computed. `missing`: parameters left out.
    """

    parameters: float
    squared_gradient: float
    methods: Mapping[str, str]
    missing: tuple[str, ...] = ()


class PerExampleGradients:
    """Gradients g_1 ... g_n of the examples' losses at one set of parameters.

    Flat vectors follow `named_parameters()` order, trainable parameters only, tied ones once. A layer is
    what `parameters.layer_of` says. Norms and inner products come in
    float64. Subclasses give `stream` and `coverage`.
    """

    num_batches = 1

    def __init__(self, shapes: Mapping[str, Sequence[int]], num_examples: int) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.num_examples = num_examples
        self._slices: dict[str, slice] = {}
        start = 0
        for name, shape in self.shapes.items():
            self._slices[name] = slice(start, start + math.prod(shape))
            start += math.prod(shape)
        self.num_parameters = start
        self._layer_norms: dict[str, Tensor] | None = None

    @property
    def coverage(self) -> Coverage:
        raise NotImplementedError

    def stream(self, consume: Consumer) -> None:
        """Call `consume(rows, name, block)` for each parameter of each micro-batch, in no certain order.

        A block is good for as long as it is kept; parameters that no example moves are left out.
        """
        raise NotImplementedError

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in order."""
        return tuple(dict.fromkeys(map(layer_of, self.shapes)))

    def parameters_of(self, layer: str) -> list[str]:
        return [name for name in self.shapes if layer_of(name) == layer]

    def columns_of(self, layer: str) -> Tensor:
        """(P_layer,): where a layer's parameters lie in flat vectors."""
        slices = [self._slices[name] for name in self.parameters_of(layer)]
        return torch.cat([torch.arange(part.start, part.stop) for part in slices])

    # ---- answers -------------------------------------------------------------------------------

    def norms(self) -> Tensor:
        """(n,) float64: ||g_i||."""
        return torch.stack(list(self.squared_norms_by_layer().values())).sum(0).sqrt()

    def squared_norms_by_layer(self) -> dict[str, Tensor]:
        """Per layer, (n,) float64: ||g_i||^2 over that layer's parameters. Computed once."""
        if self._layer_norms is None:
            _, self._layer_norms = self._sums_and_norms([], norms=True)
        return self._layer_norms

    def mean(self) -> Tensor:
        """(P,): the gradient of the mean loss."""
        return self.group_sums([torch.arange(self.num_examples)])[0] / self.num_examples

    def group_sums(self, groups: Sequence[Tensor]) -> Tensor:
        """(number of groups, P): the sum of g_i over each group, given as index tensors into the examples.

        Costs about one ordinary parameter gradient for each time that an example occurs in a group.
        """
        sums, _ = self._sums_and_norms(groups, norms=False)
        if not sums:
            return torch.zeros(len(groups), self.num_parameters)
        like = next(iter(sums.values()))
        result = like.new_zeros(len(groups), self.num_parameters)
        for name, part in sums.items():
            result[:, self._slices[name]] = part
        return result

    def group_gram_by_layer(self, groups: Sequence[Tensor]) -> dict[str, Tensor]:
        """Per layer, (G, G) float64: inner products of the groups' summed gradients.

        The norms are taken in the same pass. With one micro-batch no more than one parameter's sums are held.
        """
        grams = {layer: torch.zeros(len(groups), len(groups), dtype=torch.float64) for layer in self.layers}

        def add(name: str, sums: Tensor) -> None:
            sums = sums.double()
            grams[layer_of(name)] += (sums @ sums.T).to("cpu")

        at_once = add if self.num_batches == 1 else None
        sums, norms = self._sums_and_norms(groups, norms=self._layer_norms is None, hand_on=at_once)
        for name, part in sums.items():
            add(name, part)
        self._layer_norms = self._layer_norms or norms
        return grams

    def _sums_and_norms(
        self, groups: Sequence[Tensor], norms: bool, hand_on: Callable[[str, Tensor], None] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        exact = len(groups) * self.num_parameters <= 50_000_000
        sums: dict[str, Tensor] = {}
        squares = {layer: torch.zeros(self.num_examples, dtype=torch.float64) for layer in self.layers}

        def consume(rows: slice, name: str, block: Block) -> None:
            if norms:
                squares[layer_of(name)][rows] += block.squared_norms().to("cpu")
            if not groups:
                return
            inside = [g[(g >= rows.start) & (g < rows.stop)] - rows.start for g in groups]
            found = block.group_sums([g.to(block.device) for g in inside]).flatten(1)
            if hand_on is not None:
                hand_on(name, found)
            elif name in sums:
                sums[name] += found
            else:
                sums[name] = found.double() if exact else found

        self.stream(consume)
        return sums, squares

    def gram(self) -> Tensor:
        """(n, n) float64: <g_i, g_j>. Keeps the factors of all micro-batches while it runs."""
        return torch.stack(list(self.gram_by_layer().values())).sum(0)

    def gram_by_layer(self) -> dict[str, Tensor]:
        """Per layer, (n, n) float64: inner products over that layer's parameters."""
        grams = {
            layer: torch.zeros(self.num_examples, self.num_examples, dtype=torch.float64) for layer in self.layers
        }
        kept: dict[str, list[tuple[slice, Block]]] = {}
        several = self.num_batches > 1

        def consume(rows: slice, name: str, block: Block) -> None:
            gram = grams[layer_of(name)]
            gram[rows, rows] += block.gram(block).to(gram)
            for columns, other in kept.get(name, ()):
                product = block.gram(other).to(gram)
                gram[rows, columns] += product
                gram[columns, rows] += product.T
            if several:
                kept.setdefault(name, []).append((rows, block))

        self.stream(consume)
        return grams

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
        shape = (self.num_examples, len(directions))
        result = {layer: torch.zeros(shape, dtype=torch.float64) for layer in self.layers}

        def consume(rows: slice, name: str, block: Block) -> None:
            part = directions[:, self._slices[name]].to(block.device, block.dtype)
            found = block.project(part.reshape(-1, *block.shape))
            result[layer_of(name)][rows] += found.to(result[layer_of(name)])

        self.stream(consume)
        return result

    def sketch(self, k: int = 16, seed: int = 0) -> Tensor:
        """(n, d): random projections whose inner products estimate <g_i, g_j> without bias.

        Each weight matrix G is sketched as R'GC with independent random signs in R and C (k columns each), so
        d is at most k^2 per parameter. Parameters of at most k^2 numbers are kept exactly.
        """
        return torch.cat(list(self.sketch_by_layer(k, seed).values()), 1)

    def sketch_by_layer(self, k: int = 16, seed: int = 0) -> dict[str, Tensor]:
        """Per layer, (n, d_layer): see `sketch`."""
        if k < 1:
            raise InvalidInput(f"The sketch has k = {k} dimensions; expected a whole number of at least 1.")
        parts: dict[str, list[Tensor]] = {}
        matrices: dict[str, tuple[Tensor | None, Tensor | None]] = {}

        def consume(rows: slice, name: str, block: Block) -> None:
            if name not in matrices:
                matrices[name] = _signs(name, block, k, seed)
            parts.setdefault(name, []).append(block.sketch(*matrices[name]).flatten(1))

        self.stream(consume)
        sketches: dict[str, list[Tensor]] = {layer: [] for layer in self.layers}
        for name in (name for name in self.shapes if name in parts):
            sketches[layer_of(name)].append(torch.cat(parts[name]))
        empty = torch.zeros(self.num_examples, 0)
        return {layer: torch.cat(found, 1) if found else empty for layer, found in sketches.items()}

    def dense(self) -> Tensor:
        """(n, P): all gradients in full. Only for small models: n times the parameters' memory."""
        result: Tensor | None = None

        def consume(rows: slice, name: str, block: Block) -> None:
            nonlocal result
            if result is None:
                shape = (self.num_examples, self.num_parameters)
                result = torch.zeros(shape, device=block.device, dtype=block.dtype)
            values = torch.cat([block.dense(s).flatten(1) for s in block.slices()])
            result[rows, self._slices[name]] = values

        self.stream(consume)
        return torch.zeros(self.num_examples, self.num_parameters) if result is None else result

    def select(self, rows: Sequence[int]) -> PerExampleGradients:
        """The gradients of some examples only, in the order given."""
        raise NotImplementedError

    def by_layer(self) -> dict[str, LayerGradients]:
        """Each layer's own gradients, with the same questions."""
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


def _signs(name: str, block: Block, k: int, seed: int) -> tuple[Tensor | None, Tensor | None]:
    """Random sign matrices for the two sides of a weight; None where that side is small enough to keep."""
    rows, columns = matrix_shape(block.shape)
    if rows * columns <= k * k:
        return None, None
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    keep_columns = max(k, k * k // rows)

    def signs(size: int, kept: int) -> Tensor | None:
        if size <= kept:
            return None
        bits = torch.randint(0, 2, (size, kept), generator=generator)
        return ((2 * bits - 1) / math.sqrt(kept)).to(block.device, block.dtype)

    return signs(rows, k), signs(columns, keep_columns)
