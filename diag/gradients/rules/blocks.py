"""The per-example gradients of one weight from one use, in factors instead of n x P numbers.

Every block stands for n matrices G_i of one shape and answers the same questions: squared norms, sums over
groups of examples, products with given directions, and dense gradients for a slice of the
examples. `Outer` is G_i = sum_t b_it a_it' (linear layers, a convolution's patches), `Dense` holds small
gradients as they are, `Lazy` computes large ones a slice at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from diag.gradients.rules.float64_sums import row_norms, squared, squared_rows, sums, sums_of_squares

# Numbers that one temporary may hold (float32: 4 MB, which stays in a cache); larger work goes in slices.
SCRATCH = 1_000_000
LARGE_GRADIENT = 16_384  # numbers of a gradient from which on a call for each example costs nothing on a CPU
GHOST_STRIP = 128  # steps whose products with all others are formed at a time: they are symmetric, so half suffice


class Block:
    """n gradients of shape `shape`; subclasses give `dense`, and faster answers where their form allows."""

    n: int
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """How many numbers one gradient has."""
        return math.prod(self.shape)

    def dense(self, examples: slice) -> Tensor:
        """(number of examples, *shape): the gradients themselves, for a slice of the examples."""
        raise NotImplementedError

    def slices(self, numbers_each: int | None = None) -> Iterator[slice]:
        """Slices of the examples whose temporaries of `numbers_each` numbers fit the scratch space."""
        step = max(1, SCRATCH // max(1, numbers_each or self.size))
        for start in range(0, self.n, step):
            yield slice(start, min(start + step, self.n))

    def squared_norms(self) -> Tensor:
        """(n,) float64: ||G_i||^2."""
        return torch.cat([squared(self.dense(s)) for s in self.slices()])

    def group_sums(self, groups: Sequence[Tensor]) -> Tensor:
        """(number of groups, *shape): the sum of G_i over each group's examples (index tensors)."""
        found = torch.empty(len(groups), *self.shape, dtype=self.dtype, device=self.device)
        for i, group in enumerate(groups):
            found[i] = self._sum(group)
        return found

    def _sum(self, group: Tensor) -> Tensor:
        weights = torch.bincount(group, minlength=self.n)
        parts = [torch.einsum("n,n...->...", weights[s].to(d.dtype), d) for s, d in self._dense_slices()]
        return torch.stack(parts).sum(0)

    def _dense_slices(self) -> Iterator[tuple[slice, Tensor]]:
        for s in self.slices():
            yield s, self.dense(s)

    def project(self, directions: Tensor) -> Tensor:
        """(n, m): <G_i, V_j> for directions of shape (m, *shape)."""
        flat = directions.flatten(1).T
        return torch.cat([d.flatten(1) @ flat for _, d in self._dense_slices()])

    def gram(self, other: Block) -> Tensor:
        """(n, n_other): <G_i, G'_j> with a block of the same shape."""
        result = None
        for rows in row_slices(self.shape, self.n if other is self else self.n + other.n):
            mine = self.dense_rows(rows).flatten(1)
            product = mine @ (mine if other is self else other.dense_rows(rows).flatten(1)).T
            result = product if result is None else result + product
        assert result is not None
        return result

    def dense_rows(self, rows: slice) -> Tensor:
        """(n, number of rows, *rest): a slice of the first axis of every G_i."""
        return torch.cat([d[:, rows] for _, d in self._dense_slices()])


class Dense(Block):
    """Gradients held as they are: `values` (n, *shape). For biases, norms and scales."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.n, self.shape = values.shape[0], tuple(values.shape[1:])
        self.device, self.dtype = values.device, values.dtype

    def dense(self, examples: slice) -> Tensor:
        return self.values[examples]

    def squared_norms(self) -> Tensor:
        return squared(self.values)

    def _sum(self, group: Tensor) -> Tensor:
        return self.values[group].sum(0)

    def dense_rows(self, rows: slice) -> Tensor:
        return self.values[:, rows]


class Lazy(Block):
    """Gradients that `compute(slice of examples)` gives on demand."""

    def __init__(self, n: int, like: Tensor, compute: Callable[[slice], Tensor]) -> None:
        self.n, self.shape, self._compute = n, tuple(like.shape), compute
        self.device, self.dtype = like.device, like.dtype

    def dense(self, examples: slice) -> Tensor:
        return self._compute(examples)


class Outer(Block):
    """G_i = sum_t b_it a_it' for `a` (n, g, T, p) and `b` (n, g, T, q); g groups lie one below the other.

    `shape` is the weight's shape; its elements in order are those of (g, q, p).
    """

    def __init__(self, a: Tensor, b: Tensor, shape: Sequence[int]) -> None:
        self.a, self.b = a, b
        self.n, self.groups, self.steps, self.p = a.shape
        self.q, self.shape = b.shape[-1], tuple(shape)
        self.device, self.dtype = b.device, b.dtype

    def factors(self, examples: slice | Tensor) -> tuple[Tensor, Tensor]:
        """The two factors of some of the examples."""
        return self.a[examples], self.b[examples]

    def dense(self, examples: slice) -> Tensor:
        a, b = self.factors(examples)
        return (b.transpose(-1, -2) @ a).reshape(-1, *self.shape)

    def dense_rows(self, rows: slice) -> Tensor:
        if self.groups > 1:
            return super().dense_rows(rows)
        parts = []
        for s in self.slices(len(range(*rows.indices(self.shape[0]))) * self.p + self.steps * (self.p + self.q)):
            a, b = self.factors(s)
            parts.append((b[..., rows].transpose(-1, -2) @ a).reshape(a.shape[0], -1, *self.shape[1:]))
        return torch.cat(parts)

    def squared_norms(self) -> Tensor:
        if self.steps == 1:
            a, b = self.factors(slice(None))
            return (squared_rows(a) * squared_rows(b)).flatten(1).sum(1)
        share = (1 + 1 / len(list(_strips(self.steps)))) / 2  # of the T^2 products, the others being their mirror
        if share * self.steps * (self.p + self.q) < self.p * self.q:
            return self._ghost_norms()
        return self._materialised_norms()

    def _materialised_norms(self) -> Tensor:
        """||G_i||^2 with each G_i formed: small ones several at a time, large ones a piece at a time."""
        size = self.groups * self.p * self.q
        if size < LARGE_GRADIENT or self.groups > 1 or self.device.type != "cpu":
            return torch.cat([squared(self.dense(s)) for s in self.slices(size)])
        a, b = (x[:, 0] for x in self.factors(slice(None)))
        a, b = (a, b) if self.p > self.q else (b, a)  # long rows multiply faster
        step = min(b.shape[-1], max(1, SCRATCH // a.shape[-1]))
        product = a.new_empty(step, a.shape[-1])  # the same memory for all, which so stays in the cache
        rows = [
            row_norms(torch.mm(part, x, out=product[: len(part)]))
            for x, y in zip(a.unbind(0), b.transpose(1, 2).unbind(0), strict=True)
            for part in y.split(step)
        ]
        return torch.cat(rows).view(self.n, -1).double().square().sum(1)

    def _ghost_norms(self) -> Tensor:
        """sum_{t,t'} (a_t.a_t')(b_t.b_t'), with no gradient formed."""
        each = 3 * self.groups * self.steps * min(self.steps, GHOST_STRIP)
        return torch.cat([self._settled(s, *self._ghost_sums(s)) for s in self.slices(each)])

    def _settled(self, examples: slice, norms: Tensor, squares: Tensor) -> Tensor:
        """The ghost sums, with the gradient formed where the sum lost its digits.

        The terms can cancel: when the root of their `squares` is far above the result, rounding is too, and
        forming G_i, whose error enters only once, is more exact.
        """
        if self.dtype == torch.float32:
            lost = squares.sqrt() * torch.finfo(self.dtype).eps > 1e-6 * norms.abs()
            for i in lost.nonzero().flatten().tolist():
                norms[i] = squared(self.dense(slice(examples.start + i, examples.start + i + 1)))[0]
        return norms

    def _ghost_sums(self, examples: slice) -> tuple[Tensor, Tensor]:
        """Both (m,) float64: the sum of the terms and of their squares."""
        a, b = self.factors(examples)
        total = a.new_zeros(2, len(a), dtype=torch.float64)
        for start, stop in _strips(self.steps):
            terms = _products(a, start, stop).mul_(_products(b, start, stop))
            before, own = terms[..., :start], terms[..., start:]
            total += torch.stack([sums(own), sums_of_squares(own)])
            if start:  # those before the strip stand for their mirror images too
                total += 2 * torch.stack([sums(before), sums_of_squares(before)])
        return total[0], total[1]

    def _sum(self, group: Tensor) -> Tensor:
        total = None
        for part in group.split(max(1, 4 * SCRATCH // max(1, self.groups * self.steps * (self.p + self.q)))):
            a, b = self.factors(part)
            a, b = (x.movedim(1, 0).reshape(self.groups, -1, x.shape[-1]) for x in (a, b))
            product = b.transpose(-1, -2) @ a
            total = product if total is None else total + product
        return (self._zero() if total is None else total).reshape(self.shape)

    def _zero(self) -> Tensor:
        return self.b.new_zeros(self.groups, self.q, self.p)

    def project(self, directions: Tensor) -> Tensor:
        if self.steps > 1 and len(directions) > 1 and self.p > 1:
            return super().project(directions)
        columns = []
        for direction in directions.reshape(-1, self.groups, self.q, self.p).unbind():
            parts = []
            for s in self.slices(self.groups * self.steps * self.q):
                a, b = self.factors(s)
                parts.append(((a @ direction.transpose(-1, -2)) * b).flatten(1).sum(1))
            columns.append(torch.cat(parts))
        return torch.stack(columns, 1)

    def gram(self, other: Block) -> Tensor:
        if not isinstance(other, Outer):
            return super().gram(other)
        pairs = self.steps * other.steps
        if pairs > 1 and pairs * (self.p + self.q) > self.p * self.q * (1 + self.steps / self.n):
            return super().gram(other)
        return torch.cat([self._ghost_gram(s, other) for s in self.slices(other.n * self.steps * other.steps)])

    def _ghost_gram(self, examples: slice, other: Outer) -> Tensor:
        a, b = self.factors(examples)
        a2, b2 = other.factors(slice(None))
        parts = []
        for g in range(self.groups):
            products = _all_pairs(a[:, g], a2[:, g]).mul_(_all_pairs(b[:, g], b2[:, g]))
            shape = (a.shape[0], self.steps, other.n, other.steps)
            parts.append(products.view(shape).sum((1, 3)))
        return torch.stack(parts).sum(0)


def _strips(steps: int) -> Iterator[tuple[int, int]]:
    """Strips of about equal width, at most GHOST_STRIP."""
    count = -(-steps // GHOST_STRIP)
    for i in range(count):
        yield steps * i // count, steps * (i + 1) // count


def _products(x: Tensor, start: int, stop: int) -> Tensor:
    """(..., stop - start, stop): inner products of a strip's steps with all up to its end."""
    return x[..., start:stop, :] @ x[..., :stop, :].transpose(-1, -2)


def row_slices(shape: Sequence[int], n: int) -> Iterator[slice]:
    """Slices of the first axis of a weight whose n examples take 32 MB in float32, in steps of 16 where many."""
    if not shape:
        yield slice(None)
        return
    step = max(1, 8 * SCRATCH // max(1, n * math.prod(shape[1:])))
    step -= step % 16 if step > 16 else 0  # kernels for convolutions like such a number of channels
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _all_pairs(x: Tensor, y: Tensor) -> Tensor:
    """(n T, m S): inner products of every row of x (n, T, d) with every row of y (m, S, d)."""
    return x.flatten(0, 1) @ y.flatten(0, 1).T
