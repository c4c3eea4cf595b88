"""What can be asked of per-example gradients, each answered by one pass over their blocks.

A query is a value: equal queries have equal answers. `begin` gives an accumulator, which takes the blocks as they
come and keeps none of them but where it says so. So one pass can answer several queries, and a
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
MOST_FLOAT64_SUMS = 50_000_000  # numbers up to which sums are taken in float64, 400 MB
SUMS_AT_ONCE = 1 << 26  # numbers of one parameter's sums that are held at once, 256 MB in float32
IN_ALL = 1 << 28  # and of all parameters' sums, where several micro-batches add to them
COLUMNS_AT_ONCE = 1 << 20


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
    """Accumulates the answer to one query, block by block."""

    def consume(self, rows: slice, name: str, block: Block) -> None:
        """Take the block of parameter `name` for the examples `rows`."""

    def result(self) -> Any:
        """The answer, once it has taken all blocks."""


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
        self._exact = len(groups) * gradients.num_parameters <= MOST_FLOAT64_SUMS
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
        result = torch.zeros(shape, dtype=torch.float32) if like is None else like.new_zeros(shape)
        for name, part in self.sums.items():
            result[:, self._about.columns[name]] = part
        return result


@dataclass(frozen=True)
class GroupGram:
    """Per layer, (G, G) float64: inner products of the groups' summed gradients.

    With one micro-batch no more than one parameter's sums are held, and of these no more than `SUMS_AT_ONCE`
    numbers. parameters: those that count, where not all do.
    """

    groups: tuple[ExampleGroup, ...]
    parameters: frozenset[str] | None = None

    def parts(self, gradients: Asked) -> list[GroupGram]:
        """The same question in parts whose sums fit into memory: the sum of the answers is the answer."""
        room = IN_ALL // max(1, sum(map(bool, self.groups)))
        if gradients.num_batches == 1 or gradients.num_parameters <= room:
            return [self]
        sets, left = list[list[str]](), 0
        for name, columns in gradients.columns.items():
            size = columns.stop - columns.start
            if size > left:
                sets.append([])
                left = room
            sets[-1].append(name)
            left -= size
        return [GroupGram(self.groups, frozenset(names)) for names in sets]

    def begin(self, gradients: Asked) -> Accumulator:
        """An accumulator of this query's answer."""
        return _GroupGram(gradients, self)


class _GroupGram:
    def __init__(self, gradients: Asked, asked: GroupGram) -> None:
        count = len(asked.groups)
        self._grams = {layer: zeros(count, count) for layer in gradients.layers}
        self._some = [i for i, group in enumerate(asked.groups) if group]  # nothing is held for empty ones
        self._gradients, self._groups = gradients, [asked.groups[i] for i in self._some]
        self._parameters = asked.parameters
        self._sums, self._at_once = _GroupSums(gradients, self._groups), gradients.num_batches == 1

    def consume(self, rows: slice, name: str, block: Block) -> None:
        if self._parameters is not None and name not in self._parameters:
            return
        if not self._at_once:
            self._sums.consume(rows, name, block)
        elif len(self._groups) * block.size <= SUMS_AT_ONCE:
            self._add(name, self._sums.of_block(rows, block))
        else:
            self._in_tiles(name, rows, block)

    def _in_tiles(self, name: str, rows: slice, block: Block) -> None:
        """A few groups against a few at a time, their sums formed again for each such pair."""
        width = max(1, SUMS_AT_ONCE // 2 // block.size)
        starts = range(0, len(self._groups), width)
        for first in starts:
            left = self._of_groups(first, width, rows, block)
            self._put(name, first, first, _products(left, left))
            for second in (s for s in starts if s > first):
                product = _products(left, self._of_groups(second, width, rows, block))
                self._put(name, first, second, product)
                self._put(name, second, first, product.T)

    def _of_groups(self, start: int, width: int, rows: slice, block: Block) -> Tensor:
        return _GroupSums(self._gradients, self._groups[start : start + width]).of_block(rows, block)

    def _add(self, name: str, sums: Tensor) -> None:
        self._put(name, 0, 0, _products(sums, sums))

    def _put(self, name: str, first: int, second: int, product: Tensor) -> None:
        rows = torch.tensor(self._some[first : first + len(product)])
        columns = torch.tensor(self._some[second : second + product.shape[1]])
        self._grams[layer_of(name)][rows[:, None], columns] += product.to("cpu")

    def result(self) -> dict[str, Tensor]:
        while self._sums.sums:
            self._add(*self._sums.sums.popitem())
        return self._grams


def _products(left: Tensor, right: Tensor) -> Tensor:
    """(G, H) float64: `left @ right.T`, a part of the columns at a time."""
    width = max(1, COLUMNS_AT_ONCE // max(1, len(left)))
    found = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for a, b in zip(left.split(width, 1), right.split(width, 1), strict=True):
        a = a.double()
        found += a @ (a if right is left else b.double()).T
    return found


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
        return torch.zeros(self._shape, dtype=torch.float32) if self._found is None else self._found


def zeros(*shape: int) -> Tensor:
    """Zeros of this shape in float64."""
    return torch.zeros(shape, dtype=torch.float64)
