"""What leads to a backward pass: which loss function's call or returned loss, by which factor, and what else.

They are identified by the numbers that autograd gives its nodes. No graph is kept alive: of each call its number
and its value are kept until the step is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from diag.snapshot.autograd_graph import nodes_before
from diag.watching.observe.capture import SeenLossCall
from diag.watching.observe.terms import Term, product, terms_of

NODES_BEFORE_TERM = 64  # nodes before an unknown term that are looked at
MOST_LOSS_CALLS = 8  # calls that are kept
ROWS_CHANGED = "the losses of its rows are weighted, masked or otherwise changed after its call"
WHY_NO_CALL = {0: "no loss function of torch was seen to lead to it", 1: ROWS_CHANGED}
SEVERAL_LOSSES = "several loss functions lead to it"
ONLY_A_PART = "{} is only a part of it: something that is not known is added (a penalty, say)"
VALUE_CHANGED = "the value of {} is not passed on as it is, nor times a constant"


class SeenValue(NamedTuple):
    """A value that was seen: a loss function's, or one that the model returned (`place`: where in its outputs).

    number: of its graph node. value: a float where it is on the host and nothing is learned from it. call: what is
    kept of it to learn from. count: what a summed loss is divided by to be a mean; None for any other. form: what
    tells the call from others of the same function.
    """

    number: int
    value: Tensor | float
    name: str
    call: SeenLossCall | None = None
    count: Any = None
    place: Any = None
    form: Any = None

    @property
    def is_one(self) -> bool:
        """Whether it is one number."""
        return isinstance(self.value, float) or self.value.numel() == 1

    @property
    def mean(self) -> Any:
        """Of all its numbers."""
        return self.value if isinstance(self.value, float) else self.value.mean()


class Pass(NamedTuple):
    """A backward pass: the value that it descends, and what that is a constant multiple of.

    value: None where backward() was not called on one number. seen: the one value behind it, if it is known at all;
    reason: why the loss is not a constant multiple of it, in a clause, else empty. factor: that constant. others:
    how many more terms there are of which this model has no part.
    """

    value: Tensor | float | None
    seen: SeenValue | None
    reason: str
    factor: Any = 1.0
    others: int = 0

    @property
    def multiple(self) -> Any:
        """How many times the mean loss is descended: the factor, and the number of terms of a sum."""
        count = None if self.seen is None else self.seen.count
        return self.factor if count is None else self.factor * count


class LossCalls:
    """The values seen since the last step."""

    def __init__(self) -> None:
        self._seen: deque[SeenValue] = deque(maxlen=MOST_LOSS_CALLS)
        self._scaled: dict[int, Tensor] = {}
        # Which terms of a loss are this model's, by what they are: finding out takes a walk through the graph.
        self._own: dict[Any, tuple[bool, ...]] = {}

    def add(self, seen: SeenValue) -> None:
        """A value that has a graph. One that was seen before gains the place in the model's outputs."""
        for i, known in enumerate(self._seen):
            if known.number == seen.number:
                self._seen[i] = known._replace(place=seen.place) if seen.place is not None else seen
                return
        self._seen.append(seen)

    def scaled(self, loss: Tensor, scaled: Tensor) -> None:
        """A GradScaler made `scaled` of `loss`."""
        self._scaled = {number_of(scaled): loss.detach()}

    def behind(self, root: Tensor, concerns: Callable[[Any], bool | None]) -> Pass:
        """What a backward pass from `root`, a tensor of one number, descends.

        concerns(node): whether this model has a part in what leads to it; None where that cannot be told.
        """
        number = number_of(root)
        # A loss that is scaled in place, or freed, would change the value that is kept.
        whole = self._scaled.get(number, root.detach()).reshape(()).clone()
        if not self._scaled:  # nearly always the loss is descended as it is
            for seen in self._seen:
                if seen.number == number and seen.name and seen.is_one:
                    return Pass(whole, seen, "")
        found = self._behind(root, whole, [s for s in self._seen if s.name], concerns)
        # A loss that the model returned says less than the loss function's call inside it, so it is asked second.
        if found.reason and (own := self._behind(root, whole, list(self._seen), concerns)) and not own.reason:
            return own
        return found

    def just_called(self, root: Tensor) -> Pass | None:
        """The pass from `root` where that is what the last loss function returned, as it is; else None."""
        if self._scaled or not self._seen:
            return None
        seen = self._seen[-1]
        if seen.number != number_of(root) or not seen.name or not seen.is_one:
            return None
        return Pass(root.item() if root.is_cpu else root.detach().reshape(()).clone(), seen, "")

    def _behind(self, root: Tensor, whole: Tensor, among: list[SeenValue], concerns: Callable[[Any], Any]) -> Pass:
        seen = {s.number: s for s in among}
        terms = terms_of(root, seen, self._scaled)
        own = self._own_of(terms, seen, concerns) if len(terms) > 1 else terms
        known = {t.number: seen[t.number] for t in own if t.known}
        others = len(terms) - len(own)
        if len(known) != 1 or any(not t.known for t in own):
            part, reason = self._unknown(own, known, seen)
            return Pass(whole, part, reason, 1.0, others)
        (found,) = known.values()
        factor: Any = 0.0
        for term in own:
            factor = factor + product(term.factors)
        return Pass(whole if not others else found.mean * factor, found, "", factor, others)

    def clear(self) -> None:
        """The step is over."""
        self._seen.clear()
        self._scaled.clear()

    def _own_of(self, terms: list[Term], seen: dict[int, SeenValue], concerns: Callable[[Any], Any]) -> list[Term]:
        key = tuple(_kind_of(t, seen) for t in terms)
        alike = [kind for kind in key if kind[1] is None]
        known = self._own.get(key) if len(set(alike)) == len(alike) else None  # else one may be another's in turn
        if known is None:
            known = self._own[key] = tuple(concerns(t.node) is not False for t in terms)
        return [term for term, own in zip(terms, known, strict=True) if own]

    def _unknown(
        self, own: list[Term], known: dict[int, SeenValue], among: dict[int, SeenValue]
    ) -> tuple[SeenValue | None, str]:
        """The one known value behind terms that are not all known, and the reason why it is not all."""
        hidden = {s.number: s for t in own if not t.known for s in _before(t.node, among)}
        found = known | hidden
        if len(found) > 1:
            return None, SEVERAL_LOSSES
        if not found:
            return None, WHY_NO_CALL[0]
        (seen,) = found.values()
        if not seen.is_one:
            return seen, WHY_NO_CALL[1]
        return seen, (ONLY_A_PART if known else VALUE_CHANGED).format(seen.name)


def _kind_of(term: Term, seen: dict[int, SeenValue]) -> tuple[str, Any]:
    """What a term is, and which output of the model it was called on, where that is known."""
    if not term.known:
        return term.name, None
    value = seen[term.number]
    return value.name, value.place if value.form is None else value.form[0]


def number_of(tensor: Tensor) -> int:
    """The number of the graph node that made the tensor."""
    return -1 if tensor.grad_fn is None else tensor.grad_fn._sequence_nr()


def _before(node: Any, seen: dict[int, SeenValue]) -> list[SeenValue]:
    """The values seen among the nodes before an unknown one."""
    numbers = (
        n._sequence_nr() for n in nodes_before([node], NODES_BEFORE_TERM, lambda n: n._sequence_nr() in seen)
    )
    return [seen[number] for number in numbers if number in seen]
