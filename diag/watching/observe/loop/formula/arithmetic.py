"""What a loop's own arithmetic does with the model's outputs, read from the graph of a few backward passes.

Broadcast: a sum or mean over all of a difference or a product whose two sides were expanded against each other,
(N,) against (N, 1). Of a product the graph keeps both shapes. Of a difference it keeps one; that the other was
expanded is certain where what the next operation kept of the difference is a sum of a function of the row and a
function of the column; where nothing is kept, or on a device, it is read from the shapes: all rows of a linear
layer's one output against all rows. Where an axis was put in by hand, or two sides of the network's own meet,
pairs are meant.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, first_arguments, kind_of, parents_of
from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.arithmetic import ArithmeticFacts, Expansion
from diag.watching.observe.loop.formula.parts import given_shape
from diag.watching.observe.loop.formula.twice import applied_twice, is_multiple
from diag.watching.observe.loop.losses import made_by
from diag.watching.observe.loop.moment import Moment, due
from diag.watching.observe.terms import terms_of

OUTPUTS_OF_A_PASS = 512  # of the calls before a backward pass: of an episode, one call a moment
ENTRIES_OF_A_SUM = 256  # nodes of one sum that are visited
NODES_OF_A_NUMBER = 8  # between a term and the mean that it is a function of
OF_ONE_NUMBER = ("Sqrt", "Pow", "Log", "Exp", "Add", "Mul", "Div", "Neg", *PASSING_ON)
MOST_NUMBERS = 1 << 22  # of a difference that are looked at
ROUNDING = 1e-4  # of the largest difference
SAVE_THEIR_ARGUMENT = (
    "Pow",
    "Abs",
    "Clamp",
    "ClampMin",
    "ClampMax",
    "Log",
    "Cosh",
    "Softplus",
    "Huber",
    "SmoothL1",
)
LARGER_OF_TWO = ("Maximum", "Minimum")
ELEMENTWISE = frozenset(
    (
        *SAVE_THEIR_ARGUMENT,
        *LARGER_OF_TWO,
        "Mul",
        "Div",
        "Neg",
        "Relu",
        "Exp",
        "Where",
        "Sqrt",
        "Log1P",
        "Tanh",
        *PASSING_ON,
    )
)
AXIS_BY_HAND = ("Unsqueeze", "Expand")
TAKEN_FROM = ("Select", "Slice", *PASSING_ON)


class Arithmetic:
    """Follows the outputs up to each backward pass; looks at the first three, the 10th, the 30th, the 100th, ..."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._made: dict[int, tuple[str, int | None]] = {}  # by node: what function made an output, over which axis
        self._passes = 0
        self._expanded: dict[str, Expansion] = {}
        self._twice, self._twice_step = "", 0

    @property
    def _looking(self) -> bool:
        return due(self._passes + 1)

    def training_call(self, outputs: Any) -> None:
        """The model was called in training."""
        if not self._looking or len(self._made) >= OUTPUTS_OF_A_PASS:
            return
        for t in [outputs] if isinstance(outputs, Tensor) else tensors_in(outputs):
            if t.grad_fn is not None:
                self._made[t.grad_fn._sequence_nr()] = made_by(t)

    def backward_called(self, roots: Any) -> None:
        """A backward pass begins."""
        looking, made = self._looking, self._made
        self._made = {}
        self._passes += 1
        if not looking or not isinstance(roots, Tensor) or roots.grad_fn is None or roots.numel() != 1:
            return
        self._look_twice(roots, made)
        for found in expansions(roots, made):
            kept = Expansion(*found, self._moment.step)
            if self._expanded.setdefault(kept.operation, kept) is kept:
                self._moment.news(("broadcast in the loss", kept.operation), "arithmetic")

    def _look_twice(self, root: Tensor, made: dict[int, tuple[str, int | None]]) -> None:
        if not self._twice and (name := applied_twice(root, made)):
            self._twice, self._twice_step = name, self._moment.step
            self._moment.news(("twice", name), "arithmetic")

    def facts(self) -> ArithmeticFacts:
        """As plain data."""
        return ArithmeticFacts(tuple(self._expanded.values()), self._twice, self._twice_step)


# Broadcast


@dataclass(frozen=True)
class _Entry:
    """A node inside a sum, its output's index, and the numbers that it gave, up to a factor, where they are
    kept."""

    node: Any
    index: int
    kept: Tensor | None


def expansions(root: Tensor, outputs: Container[int] = ()) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """The operation, the shape of the side with a graph and that of the other, of what is broadcast in the sums
    that `root` is made of; nothing where two sides with a graph meet in pairs.

    outputs: the nodes that gave the model's outputs; how these came by their shape is the model's own affair.
    """
    found: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for term in map(_sum_inside, (term.node for term in terms_of(root, ()))):
        if term is None:
            continue
        start, index = term.next_functions[0]
        shape = given_shape(start, index)
        if shape is None or max(shape.count(n) for n in (*shape, 0)) < 2:
            continue  # an axis that comes twice is what the mistake leaves
        for entry in _entries(start, index, shape):
            one = _expansion(entry, shape, outputs)
            if one is not None and not one[0]:
                return []
            found += [one] if one is not None else []
    return found


def _sum_inside(node: Any) -> Any:
    """The sum or mean over all axes that a term is, or is a function of, as the root of a mean is; else None."""
    for before in first_arguments(node, NODES_OF_A_NUMBER):
        if kind_of(before) in ("Mean", "Sum"):
            return None if hasattr(before, "_saved_dim") else before
        if kind_of(before) not in OF_ONE_NUMBER:
            return None
    return None


def _entries(start: Any, index: int, shape: tuple[int, ...]) -> Iterator[_Entry]:
    """The nodes of this shape, of operations entry by entry, that a sum is taken over."""
    waiting = deque([_Entry(start, index, None)])
    for _ in range(ENTRIES_OF_A_SUM):
        if not waiting:
            return
        entry = waiting.popleft()
        if entry.node is None or given_shape(entry.node, entry.index) != shape:
            continue
        yield entry
        if kind_of(entry.node) in ELEMENTWISE or kind_of(entry.node) in ("Add", "Sub", "Rsub"):
            waiting += _before(entry)


def _before(entry: _Entry) -> list[_Entry]:
    node, name = entry.node, kind_of(entry.node)
    sides = node.next_functions
    kept: list[Tensor | None] = [None] * len(sides)
    if name in SAVE_THEIR_ARGUMENT:
        kept[0] = getattr(node, "_saved_self", None)
    elif name in LARGER_OF_TWO or (name == "Mul" and len(parents_of(node)) == 2):
        kept = [getattr(node, "_saved_self", None), getattr(node, "_saved_other", None)][: len(sides)]
    elif name == "Neg" or (name in ("Mul", "Div") and is_multiple(node)):
        kept = [entry.kept] * len(sides)
    return [_Entry(parent, index, k) for (parent, index), k in zip(sides, kept, strict=True)]


def _expansion(
    entry: _Entry, shape: tuple[int, ...], outputs: Container[int]
) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
    """What is broadcast in this node; ("", ...) where both sides have a graph; None for nothing."""
    name, sides = kind_of(entry.node), entry.node.next_functions
    here = [(node, index) for node, index in sides if node is not None]
    shapes = [given_shape(*side) for side in here]
    if name not in ("Sub", "Rsub", "Add", "Mul") or None in shapes or not shapes:
        return None
    if len(here) == 2 and here[0] != here[1] and all(_is_expanded(s, shape) for s in shapes if s is not None):
        return "", shape, shape
    if len(here) != 1 or not _is_expanded(mine := shapes[0] or (), shape) or _by_hand(here[0][0], outputs):
        return None
    if name == "Mul":
        other = entry.node._saved_other if sides[0][0] is not None else entry.node._saved_self
        if not isinstance(other, Tensor):
            return None
        # A factor that was broadcast before, as an advantage of (N,) and (N, 1), is a sum of row and column itself.
        both = _is_expanded(tuple(other.shape), shape) or bool(_sum_of_both(mine, shape, other))
        return ("product", mine, tuple(other.shape)) if both else None
    hidden = entry.kept is None or not entry.kept.is_cpu
    other_shape = _other_column(here[0][0], mine, shape) if hidden else _sum_of_both(mine, shape, entry.kept)
    return ("difference", mine, other_shape) if other_shape else None


def _is_expanded(side: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a tensor of several numbers was expanded to this shape."""
    return 1 < math.prod(side) < math.prod(shape)


def _by_hand(node: Any, outputs: Container[int]) -> bool:
    """Whether an axis of one was put in, or the tensor expanded, after it left the model and before it met the
    other side."""
    for before in first_arguments(node, 8):
        if before._sequence_nr() in outputs:
            return False
        name = kind_of(before)
        if name in AXIS_BY_HAND:
            return True
        if name in ("View", "ReshapeAlias", "UnsafeView"):
            after, original = given_shape(before, 0) or (), tuple(getattr(before, "_saved_self_sym_sizes", ()))
            if after.count(1) > original.count(1):
                return True
        if name not in TAKEN_FROM:
            return False
    return False


def _sum_of_both(side: tuple[int, ...], shape: tuple[int, ...], kept: Tensor | None) -> tuple[int, ...]:
    """Where the numbers are a function of the row plus one of the column, so that another side was expanded along
    an axis as long as the one along which `side` was: the shape of that other side; else empty."""
    if not isinstance(kept, Tensor) or tuple(kept.shape) != shape or not kept.is_cpu or kept.numel() > MOST_NUMBERS:
        return ()
    full = (1,) * (len(shape) - len(side)) + side
    numbers = kept.detach().double()
    slack = ROUNDING * float(numbers.abs().max())
    for along in (i for i, n in enumerate(full) if n == 1 < shape[i]):
        for other in (j for j, n in enumerate(full) if n > 1 and n == shape[along]):
            # Nothing of the row depends on the column: the other side is the same along this one's axis.
            rows = numbers - numbers.narrow(other, 0, 1)
            pairs = float((rows - rows.narrow(along, 0, 1)).abs().max()) <= slack
            if pairs and float((numbers - numbers.narrow(along, 0, 1)).abs().max()) > slack:
                found = tuple(1 if j == other else n for j, n in enumerate(shape))
                return found[1:] if found[0] == 1 else found
    return ()


def _other_column(node: Any, side: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a linear layer's one output an example, (N, 1) or squeezed to (N,), met to give (N, N)."""
    n = math.prod(side)
    square = shape == (n, n) and kind_of(node) in ("Addmm", "Squeeze")
    return ((n,) if len(side) == 2 else (n, 1)) if square else ()
