"""What can be asked of per-example gradients, each answered by one pass over their blocks.

A query is a value: equal queries have equal answers. `begin` gives an unfinished answer, which takes the
blocks as they come and keeps none of them but where it says so. So one pass can answer several queries, and a
training step's hooks can answer those that were asked before it began.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diag.gradients.rules.blocks import Block
from diag.snapshot.parameters import layer_of

ExampleGroup = tuple[int, ...]
EXACT = 50_000_000  # numbers up to which sums are taken in float64, 400 MB


class Asked(Protocol):
    """What a query needs to know of the gradients that it is asked of (see `PerExampleGradients`)."""

    num_examples: int
    num_parameters: int
    num_batches: int
    shapes: dict[str, tuple[int, ...]]
    columns: dict[str, slice]

    @property
    def layers(self) -> Iterable[str]:
        """The names of the layers."""


class Accumulator(Protocol):
    """An answer that is not finished."""

    def consume(self, rows: slice, name: str, block: Block) -> None:
        """Take the block of parameter `name` for the examples `rows`."""

    def result(self) -> Any:
        """The answer, once all blocks were there."""


class Query(Hashable, Protocol):
    """Something to ask of gradients."""

    def begin(self, gradients: Asked) -> Accumulator:
        """An accumulator that takes the blocks of these gradients."""


@dataclass(frozen=True)
class SquaredNorms:
    """Per layer, (n,) float64: ||g_i||^2 over that layer's parameters."""

    def begin(self, gradients: Asked) -> Accumulator:
        """An accumulator of this query's answer."""
        return _SquaredNorms(gradients)


class _SquaredNorms:
    def __init__(self, gradients: Asked) -> None:
        self._about, self._parts = gradients, list[tuple[slice, str, Tensor]]()

    def consume(self, rows: slice, name: str, block: Block) -> None:
        self._parts.append((rows, name, block.squared_norms()))

    def result(self) -> dict[str, Tensor]:
        found = {layer: zeros(self._about.num_examples) for layer in self._about.layers}
        for rows, name, part in self._parts:
            found[layer_of(name)][rows] += part.to("cpu")
        return found


@dataclass(frozen=True)
class GroupSums:
    """(number of groups, P): the sum of g_i over each group of examples."""

    groups: tuple[ExampleGroup, ...]

    def begin(self, gradients: Asked) -> Accumulator:
        """An accumulator of this query's answer."""
        return _GroupSums(gradients, self.groups)


class _GroupSums:
    def __init__(self, gradients: Asked, groups: Sequence[ExampleGroup]) -> None:
        self._about, self._groups = gradients, [torch.tensor(g, dtype=torch.long) for g in groups]
        self._exact = len(groups) * gradients.num_parameters <= EXACT
        self.sums: dict[str, Tensor] = {}

    def of_block(self, rows: slice, block: Block) -> Tensor:
        """(number of groups, size): the part of the examples `rows`."""
        inside = [g[(g >= rows.start) & (g < rows.stop)] - rows.start for g in self._groups]
        return block.group_sums([g.to(block.device) for g in inside]).flatten(1)

    def consume(self, rows: slice, name: str, block: Block) -> None:
        found = self.of_block(rows, block)
        if name in self.sums:
            self.sums[name] += found
        else:
            self.sums[name] = found.double() if self._exact else found

    def result(self) -> Tensor:
        shape = (len(self._groups), self._about.num_parameters)
        like = next(iter(self.sums.values()), None)
        result = torch.zeros(shape) if like is None else like.new_zeros(shape)
        for name, part in self.sums.items():
            result[:, self._about.columns[name]] = part
        return result


@dataclass(frozen=True)
class GroupGram:
    """Per layer, (G, G) float64: inner products of the groups' summed gradients.

    With one micro-batch no more than one parameter's sums are held.
    """

    groups: tuple[ExampleGroup, ...]

    def begin(self, gradients: Asked) -> Accumulator:
        """An accumulator of this query's answer."""
        return _GroupGram(gradients, self.groups)


class _GroupGram:
    def __init__(self, gradients: Asked, groups: Sequence[ExampleGroup]) -> None:
        self._grams = {layer: zeros(len(groups), len(groups)) for layer in gradients.layers}
        self._sums, self._at_once = _GroupSums(gradients, groups), gradients.num_batches == 1

    def consume(self, rows: slice, name: str, block: Block) -> None:
        if self._at_once:
            self._add(name, self._sums.of_block(rows, block))
        else:
            self._sums.consume(rows, name, block)

    def _add(self, name: str, sums: Tensor) -> None:
        sums = sums.double()
        self._grams[layer_of(name)] += (sums @ sums.T).to("cpu")

    def result(self) -> dict[str, Tensor]:
        while self._sums.sums:
            self._add(*self._sums.sums.popitem())
        return self._grams


@dataclass(frozen=True)
class Gram:
    """Per layer, (n, n) float64: <g_i, g_j>. Of several micro-batches it keeps the factors while it runs."""

    def begin(self, gradients: Asked) -> Accumulator:
        """An accumulator of this query's answer."""
        return _Gram(gradients)


class _Gram:
    def __init__(self, gradients: Asked) -> None:
        n = gradients.num_examples
        self._grams = {layer: zeros(n, n) for layer in gradients.layers}
        self._several = gradients.num_batches > 1
        self._kept: dict[str, list[tuple[slice, Block]]] = {}

    def consume(self, rows: slice, name: str, block: Block) -> None:
        gram = self._grams[layer_of(name)]
        gram[rows, rows] += block.gram(block).to(gram)
        for columns, other in self._kept.get(name, ()):
            product = block.gram(other).to(gram)
            gram[rows, columns] += product
            gram[columns, rows] += product.T
        if self._several:
            self._kept.setdefault(name, []).append((rows, block))

    def result(self) -> dict[str, Tensor]:
        self._kept.clear()
        return self._grams


@dataclass(frozen=True, eq=False)
class Projection:
    """Per layer, (n, m) float64: the layer's part of <g_i, v_j> for flat directions (m, P)."""

    directions: Tensor

    def begin(self, gradients: Asked) -> Accumulator:
        """An accumulator of this query's answer."""
        return _Projection(gradients, self.directions)


class _Projection:
    def __init__(self, gradients: Asked, directions: Tensor) -> None:
        self._directions, self._columns = directions, gradients.columns
        self._found = {layer: zeros(gradients.num_examples, len(directions)) for layer in gradients.layers}

    def consume(self, rows: slice, name: str, block: Block) -> None:
        part = self._directions[:, self._columns[name]].to(block.device, block.dtype)
        result = self._found[layer_of(name)]
        result[rows] += block.project(part.reshape(-1, *block.shape)).to(result)

    def result(self) -> dict[str, Tensor]:
        return self._found


@dataclass(frozen=True)
class Everything:
    """(n, P): all gradients in full."""

    def begin(self, gradients: Asked) -> Accumulator:
        """An accumulator of this query's answer."""
        return _Everything(gradients)


class _Everything:
    def __init__(self, gradients: Asked) -> None:
        self._shape, self._columns = (gradients.num_examples, gradients.num_parameters), gradients.columns
        self._found: Tensor | None = None

    def consume(self, rows: slice, name: str, block: Block) -> None:
        if self._found is None:
            self._found = torch.zeros(self._shape, device=block.device, dtype=block.dtype)
        self._found[rows, self._columns[name]] = torch.cat([block.dense(s).flatten(1) for s in block.slices()])

    def result(self) -> Tensor:
        return torch.zeros(self._shape) if self._found is None else self._found


def zeros(*shape: int) -> Tensor:
    """Zeros of this shape in float64."""
    return torch.zeros(shape, dtype=torch.float64)
