"""Which way a loss pulls the outputs beside what the labels say: the gradient at the outputs, taken from the loop's
own backward pass.

A sum of cross-entropies says that by the sign of its terms, which others read. Here are the losses that are more
than such a sum: a focal factor times a cross-entropy, an overlap such as Dice's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeGuard

from torch import Tensor

from diag.snapshot.autograd_graph import constant_of, kind_of, nodes_before, parents_of, signed
from diag.watching.guard import safely
from diag.watching.observe.loop.formula.chains import is_even_power, sides_of
from diag.watching.observe.loop.formula.labels.likelihoods import NODES_AFTER_LAYERS, OF_LAYERS
from diag.watching.observe.loop.formula.parts import Summand, given_shape, parts_behind
from diag.watching.observe.loop.formula.sides.likeness import picked_answers

FEWEST_PULLED = 8  # numbers with a gradient
PULLED_AWAY_SHARE = (
    0.9  # the share of them that is pulled away from its label; of a loss that learns it is near none
)
NODES_OF_CLASSES = ("NllLoss", "NllLoss2D")
NODES_OF_FLAGS = ("BinaryCrossEntropy", "BinaryCrossEntropyWithLogits")
PICKING = ("Gather", "Index")
NO_LABEL = -1


class LabelsAsked(NamedTuple):
    """Outputs, as output `number` of a node, and what the labels say of them: class numbers, whose axis is
    the second of the outputs, or zeros and ones of the outputs' shape. of: the kind of loss that asks."""

    node: Any
    number: int
    labels: Tensor
    of: str


class Pulled(NamedTuple):
    """The share of the labels from which the outputs are pulled away; of: the labels 1 or 0 alone, or `NO_LABEL`
    for class numbers. None of them where no gradient is left."""

    share: float
    of: int


Tell = Callable[[Pulled | None, str], None]


def listen(root: Tensor, parts: list[Summand], tell: Tell) -> None:
    """Have `tell` called in the backward pass that begins, with how the loss pulls at what it asks for. parts: of
    the loss; a cross-entropy among them has the sign that it has there."""
    nodes = list(nodes_before([root.grad_fn], NODES_AFTER_LAYERS, lambda node: kind_of(node) in OF_LAYERS))
    if _may_turn(nodes):
        return
    plain = {p.node for p in parts}
    in_a_sum = any(kind_of(n) in (*NODES_OF_CLASSES, *NODES_OF_FLAGS, *PICKING) for n in plain)
    looked = [n for n in nodes if n not in plain or kind_of(n) == "Div"]  # an overlap may be all of a term
    found = [a for a in _asked(looked) if a.node is not None]
    for of in dict.fromkeys(a.of for a in found):
        one, *more = [a for a in found if a.of == of]
        if of == OF_AN_OVERLAP or not (more or in_a_sum):  # of several overlaps each class has its own
            one.node.register_prehook(partial(_taken, tell, one.number, one.labels, of))


def _taken(tell: Tell, index: int, labels: Tensor, of: str, gradients: Any) -> None:
    """The gradient at the outputs: nothing raises into the backward pass. No node is held, since the hook belongs
    to one."""
    if len(gradients) > index and isinstance(gradients[index], Tensor):
        safely(_tell, tell, gradients[index].detach(), labels, of)


def _tell(tell: Tell, gradient: Tensor, labels: Tensor, of: str) -> None:
    tell(pulled_away(gradient, labels), of)


def pulled_away(gradient: Tensor, labels: Tensor) -> Pulled | None:
    """How the gradient at outputs pulls these beside their labels: of zeros and ones the worse of the two kinds."""
    if gradient.shape == labels.shape:
        groups = {1: gradient[labels == 1], 0: -gradient[labels == 0]}
    else:
        inside = (labels >= 0) & (labels < gradient.shape[1])
        groups = {
            NO_LABEL: gradient.gather(1, labels.clamp(0, gradient.shape[1] - 1).unsqueeze(1)).squeeze(1)[inside]
        }
    moved = {of: numbers[numbers != 0] for of, numbers in groups.items()}
    shares = [Pulled(float((n > 0).double().mean()), of) for of, n in moved.items() if n.numel() >= FEWEST_PULLED]
    return max(shares, default=None)


def _may_turn(nodes: list[Any]) -> bool:
    """Whether numbers below zero multiply entries, as an advantage does that is to turn the sign."""
    for node in nodes:
        if kind_of(node) == "Mul" and len(parents_of(node)) == 1:
            other = constant_of(node)
            if isinstance(other, Tensor) and other.numel() > 1 and other.is_cpu and bool((other < 0).any()):
                return True
    return False


# What is asked for

OF_CLASS_NUMBERS, OF_ZEROS_AND_ONES = "cross-entropy", "binary cross-entropy"
OF_A_PROBABILITY, OF_AN_OVERLAP = "label's probability", "overlap"


def _asked(nodes: list[Any]) -> Iterator[LabelsAsked]:
    for node in nodes:
        kind = kind_of(node)
        if kind in NODES_OF_CLASSES:
            yield from _of_classes(node, getattr(node, "_saved_target", None), OF_CLASS_NUMBERS)
        elif kind in NODES_OF_FLAGS:
            yield from _of_flags(node)
        elif kind in PICKING:
            yield from _of_classes(node, picked_answers(Summand(node, 0, 1.0)), OF_A_PROBABILITY)
        elif kind == "Div" and len(sides_of(node)) == 2:
            yield from _of_overlap(*sides_of(node))


def _of_classes(node: Any, labels: Any, of: str) -> Iterator[LabelsAsked]:
    """The logits behind a softmax of which one entry of each row is taken."""
    before = next(iter(parents_of(node)), None)
    if not isinstance(labels, Tensor) or not labels.is_cpu or before is None or "Softmax" not in kind_of(before):
        return
    (source, index), shape = before.next_functions[0], given_shape(before, 0)
    axis = signed(before._saved_dim)
    if shape is not None and len(shape) == labels.ndim + 1 and axis in (1, 1 - len(shape)):
        yield LabelsAsked(source, index, labels, of)


def _of_flags(node: Any) -> Iterator[LabelsAsked]:
    labels, (source, index) = getattr(node, "_saved_target", None), node.next_functions[0]
    if _are_flags(labels) and given_shape(source, index) == tuple(labels.shape):
        yield LabelsAsked(source, index, labels, OF_ZEROS_AND_ONES)


def _of_overlap(above: tuple[Any, int], below: tuple[Any, int]) -> Iterator[LabelsAsked]:
    """Probabilities of which those where the target is one stand above, summed, and all of them below."""
    sizes = {(p.node, p.index) for p in _sums(below)}
    for p in _sums(above):
        labels = p.factors[0] if len(p.factors) == 1 else None
        if _are_flags(labels) and p.number > 0 and (p.node, p.index) in sizes and p.shape == tuple(labels.shape):
            yield LabelsAsked(p.node, p.index, labels, OF_AN_OVERLAP)


def _sums(side: tuple[Any, int]) -> Iterator[Summand]:
    """What a side is a sum of; of a square, what is squared."""
    for p in parts_behind(Summand(*side, 1.0)):
        squared = is_even_power(p.node)
        yield Summand(*sides_of(p.node)[0], p.number, p.factors) if squared else p


def _are_flags(labels: Any) -> TypeGuard[Tensor]:
    """Whether they are zeros and ones, and both."""
    if not isinstance(labels, Tensor) or not labels.is_cpu or not labels.ndim:
        return False
    ones = labels == 1
    return bool((ones | (labels == 0)).all()) and bool(ones.any()) and not bool(ones.all())
