"""One batch in a single normal form: the positional and keyword arguments of the model, and the targets.

`reading.forms` makes it of what the user's data gives.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from diag.errors import Unsupported
from diag.snapshot.state.host import as_the_program
from diag.snapshot.state.python import renew

FINGERPRINT_BYTES = 1 << 22
COUPLED = (
    "The loss compares the examples of a batch with each other, or weighs them in a way that could not be read"
)
COUPLED_EXAMPLES = (
    f"{COUPLED}, so that no part of a batch has a loss of its own; give a loss that averages over examples."
)
RowChoice = slice | Tensor  # from one to another, or their numbers
LABEL_KEYS = ("labels", "label", "targets", "target")


@dataclass(frozen=True)
class Batch:
    """The arguments of one model call and the targets its outputs are compared with.

    `size` is the number of examples: the length of the targets' (else the inputs') first axis. coupled: the batch
    must stay whole, as the loss compares its examples with each other, or for the reason `why`. shared: the numbers
    of the inputs' tensors, in order, that all examples share although their first axis is as long.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any
    size: int
    coupled: bool = False
    why: str = ""
    shared: frozenset[int] = frozenset()
    label_key: str = ""  # what a dict held the targets under

    def forward(self, model: nn.Module | Callable[..., Any]) -> Any:
        """The model's outputs on this batch."""
        if isinstance(model, nn.Module):
            renew(model)
        with as_the_program():
            return model(*self.args, **self.kwargs)

    def forward_on_copies(self, model: nn.Module) -> Any:
        """The same on copies of the inputs, as the model may write into them."""
        args, kwargs = map_tensors(torch.clone, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs).forward(model)

    def with_targets(self, model: nn.Module) -> Batch:
        """The same batch with the targets among the model's arguments too, where its `forward` takes them by name.

        A model that computes its own loss needs them.
        """
        taken = arguments_of(model)
        named = {n for n, p in taken.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        name = next((key for key in LABEL_KEYS if key in named), None)
        positional = [p for p in taken.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        passed = {p.name for p in positional[: len(self.args)]} | set(self.kwargs)
        if name is None and any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            name = self.label_key or None
        if name is None or name in passed or self.targets is None:
            return self
        return replace(self, kwargs=self.kwargs | {name: self.targets})

    def to(self, device: torch.device | str | None) -> Batch:
        """The same batch on `device` (unchanged where `device` is None)."""
        if device is None:
            return self
        move = lambda t: t.to(device)  # noqa: E731
        args, kwargs, targets = (map_tensors(move, x) for x in (self.args, self.kwargs, self.targets))
        return replace(self, args=args, kwargs=kwargs, targets=targets)

    def slice(self, start: int, stop: int) -> Batch:
        """Examples `start` to `stop` (exclusive). Tensors whose first axis is not the batch stay whole.

        Raises Unsupported for a part of a batch that must stay whole.
        """
        if self.coupled and (start > 0 or stop < self.size):
            raise Unsupported(self.why or COUPLED_EXAMPLES)
        stop = min(stop, self.size)
        if start == 0 and stop == self.size:
            return self
        return self._picked(slice(start, stop), stop - start)

    def few(self, most: int) -> Batch:
        """The first examples, `most` at most; all of a batch that must stay whole."""
        return self if self.coupled or self.size <= most else self.slice(0, most)

    def take(self, rows: Sequence[int]) -> Batch:
        """The examples in these rows, in the order given. Tensors whose first axis is not the batch stay whole.

        Raises Unsupported for a part of a batch that must stay whole.
        """
        if self.coupled and sorted(rows) != list(range(self.size)):
            raise Unsupported(self.why or COUPLED_EXAMPLES)
        return self._picked(torch.tensor(rows), len(rows))

    def _picked(self, rows: RowChoice, size: int) -> Batch:
        of_all = self.ids_of_shared()

        def pick(value: Any) -> Any:
            if isinstance(value, PackedSequence):
                return picked_sequences(value, rows)
            if id(value) in of_all or not value.ndim or value.shape[0] != self.size:
                return value
            return value[rows if isinstance(rows, slice) else rows.to(value.device)]

        args, kwargs, targets = (map_tensors(pick, x, packed=True) for x in (self.args, self.kwargs, self.targets))
        return replace(self, args=args, kwargs=kwargs, targets=targets, size=size)

    def ids_of_shared(self) -> set[int]:
        """The ids of the tensors that all examples share, of those whose first axis is as long as the batch."""
        found = tensors_in((self.args, self.kwargs)) if self.shared else []
        return {id(t) for number, t in enumerate(found) if number in self.shared}

    def is_by_row(self, part: Any) -> bool:
        """Whether this part of the batch is a tensor with the examples along its first axis."""
        by_shape = isinstance(part, Tensor) and part.ndim > 0 and part.shape[0] == self.size
        return by_shape and id(part) not in self.ids_of_shared()

    def split(self, size: int | None) -> Iterator[Batch]:
        """Micro-batches of at most `size` examples, in order; a batch that must stay whole is not cut."""
        step = self.size if self.coupled else size or self.size
        for start in range(0, self.size, step):
            yield self.slice(start, start + step)


def arguments_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of the model's forward() by name; none where they cannot be read (a built-in function)."""
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}


def map_tensors(function: Callable[[Any], Any], value: Any, packed: bool = False) -> Any:
    """Apply `function` to every tensor in nested tuples, lists, dicts and dataclasses; all else stays.

    packed: a PackedSequence is given to it as one; else its data are, as its other parts say where they belong.
    """
    if isinstance(value, Tensor) or (packed and isinstance(value, PackedSequence)):
        return function(value)
    if isinstance(value, PackedSequence):
        data = function(value.data)
        order = (t if t is None else t.to(data.device) for t in (value.sorted_indices, value.unsorted_indices))
        return PackedSequence(data, value.batch_sizes, *order)
    if isinstance(value, Mapping):
        return like_mapping(value, {key: map_tensors(function, item, packed) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item, packed) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, item, packed) for item in value)
    if is_record(value) and tensors_in(value):
        return _record_like(value, lambda item: map_tensors(function, item, packed))
    return value


def is_record(value: Any) -> bool:
    """Whether it is an instance of a dataclass of the user's."""
    return is_dataclass(value) and not isinstance(value, type)


def _record_like(value: Any, change: Callable[[Any], Any]) -> Any:
    """The record with its fields changed; as it is where it cannot be made again from them."""
    items = {f.name: change(getattr(value, f.name)) for f in fields(value) if f.init and hasattr(value, f.name)}
    try:
        return replace(value, **items)
    except (TypeError, ValueError):
        return value


def picked_sequences(value: PackedSequence, rows: RowChoice) -> PackedSequence:
    """The sequences with these numbers, packed again."""
    sequences = unpack_sequence(value)
    numbers = range(len(sequences))[rows] if isinstance(rows, slice) else rows.tolist()
    return pack_sequence([sequences[i] for i in numbers], enforce_sorted=False)


def like_mapping(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """The items in a mapping of the same kind: the outputs of a Hugging Face model have attributes too."""
    if type(value) is dict:
        return items
    try:
        return type(value)(**items)
    except (TypeError, ValueError):
        return items


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, dicts and dataclasses, in order; what holds itself is visited once."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    _collect(value, found, set())
    return found


def _collect(value: Any, found: list[Tensor], inside: set[int]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list, dict, Mapping)) and id(value) not in inside:  # the quick ones first
        inside.add(id(value))
        for item in value if isinstance(value, (tuple, list)) else value.values():
            _collect(item, found, inside)
        inside.discard(id(value))
    elif is_record(value) and id(value) not in inside:
        inside.add(id(value))
        for field in fields(value):
            _collect(getattr(value, field.name, None), found, inside)
        inside.discard(id(value))


def fingerprint(batches: Iterable[Batch]) -> str:
    """A hash of the examples (of their first 4 MB), so that two measurements can be seen to be on the same ones."""
    digest = hashlib.blake2b(digest_size=6)
    budget = FINGERPRINT_BYTES

    def add(t: Tensor) -> Tensor:
        nonlocal budget
        raw = t.detach().cpu().contiguous().flatten()[: max(budget, 0)].view(torch.uint8).numpy()
        digest.update(str(tuple(t.shape)).encode() + raw.tobytes())
        budget -= raw.nbytes
        return t

    for batch in batches:
        map_tensors(add, (batch.args, batch.kwargs, batch.targets))
    return digest.hexdigest()
