"""Which tensor a model holds in each place, so that it can be checked afterwards that it still does.

A measurement calls the model at other values of its tensors, and a network may bind tensors of its own while it
runs. A parameter that is not the one that the optimizer holds would silently never be trained again.
What has changed is put back, and reported in one sentence.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import named

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TENSOR_REPLACED = (
    "While measuring, {} of the model {} replaced by {}; {} put back, and what was measured may be wrong."
)
WRITTEN = (
    "While measuring, {} of the model {} written to in place, by the model's own forward pass or by an instrument; "
    "{}."
)
WAS_KEPT = "the values are put back, and what was measured may be wrong"
NOT_KEPT = "the model is too large for a copy, so training is no longer what it would have been without measuring"
KEPT_BYTES = 1 << 28  # of parameters and buffers, copied for the time of a measurement (our choice)
COPIED_TOGETHER = 1 << 11  # at most as many numbers has a tensor that is copied together with others
MANY_COPIED = 64  # and at least as many such tensors there must be
NO_TENSORS: Mapping[str, Any] = {}

# A module's name, the module, which of its dicts, that dict, and what was in it.
HeldPlace = tuple[str, nn.Module, str, dict[str, Any], Mapping[str, Any]]

_said: ContextVar[list[str] | None] = ContextVar("diag_said", default=None)
_checked: ContextVar[frozenset[int]] = ContextVar("diag_checked", default=frozenset())


class OwnTensors:
    """The tensors of a model by place; with `values`, what is in them too where that is not too much."""

    def __init__(self, model: nn.Module, values: bool = False) -> None:
        self._places = [place for name, module in model.named_modules() for place in _places(name, module)]
        self._keeper = keeper_of(model)
        tensors = [*model.named_parameters(), *model.named_buffers()] if values else []
        self._names, self._tensors = [n for n, _ in tensors], [t for _, t in tensors]
        self._copies = sum(t.numel() * t.element_size() for t in self._tensors) <= KEPT_BYTES
        self._versions = [version_of(t) for t in self._tensors]
        self._values = KeptValues(self._tensors) if self._copies else None

    def put_back(self) -> list[str]:
        """Put each tensor back in its place; the places that held another, by name, buffers left out: a forward
        pass may bind a new tensor to one."""
        changed = [place for place in self._places if not _is_as_it_was(place)]
        if self._keeper and changed:
            for _, module, *_ in self._places:
                if hasattr(module, "_get_fsdp_state"):  # it counts on the tensors that it has put in place
                    module.reshard()  # type: ignore[operator]
        foreign = []
        for name, module, kind, own, tensors in changed:
            now = vars(module).get(kind)
            if kind == "_parameters" and not self._keeper:
                foreign += [f"{name}.{key}".removeprefix(".") for key in _different(now or {}, tensors)]
            own.clear()
            own.update(tensors)
            vars(module)[kind] = own
        return foreign

    def rewrite(self) -> list[str]:
        """Put the values back that have changed in place, as far as they were kept; the tensors, by name."""
        if self._values is not None:
            written = self._values.put_back()
        else:
            now = map(version_of, self._tensors)
            written = [i for i, (a, b) in enumerate(zip(now, self._versions, strict=True)) if a != b]
        return [self._names[i] for i in written]

    def restore(self) -> None:
        """Put everything back, and say what was not as it had been."""
        foreign, written = self.put_back(), self.rewrite()
        if foreign:
            several = len(foreign) > 1
            others, they = ("other tensors", "they are") if several else ("another tensor", "it is")
            say(TENSOR_REPLACED.format(named(foreign), "were" if several else "was", others, they))
        if written:
            was = "were" if len(written) > 1 else "was"
            say(WRITTEN.format(named(written), was, WAS_KEPT if self._copies else NOT_KEPT))


class KeptValues:
    """The values of tensors at one moment, copied. Many small ones are copied and compared together, as a call for
    each takes as long as a thousand of their numbers."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._together = _many_small(tensors)
        small = {i for places in self._together for i in places}
        self._joined = [self._join(places) for places in self._together]
        self._alone = {i: t.detach().clone() for i, t in enumerate(tensors) if i not in small}

    def _join(self, places: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return torch.cat([self._tensors[i].reshape(-1) for i in places])

    def put_back(self) -> list[int]:
        """Write the values back that have changed; the places of their tensors."""
        written = []
        for i, value in self._alone.items():
            written += [i] if self._put_back(i, value) else []
        for places, before in zip(self._together, self._joined, strict=True):
            if not self._are_as_joined(places, before):
                parts = before.split([self._tensors[i].numel() for i in places])
                written += [i for i, part in zip(places, parts, strict=True) if self._put_back(i, part)]
        return sorted(written)

    def _are_as_joined(self, places: Sequence[int], before: Tensor) -> bool:
        try:
            return same_bits(self._join(places), before)
        except RuntimeError:  # one of them has become of another kind
            return False

    def _put_back(self, i: int, value: Tensor) -> bool:
        tensor = self._tensors[i]
        value = value.view(tensor.shape) if value.numel() == tensor.numel() else value
        if same_bits(tensor, value):
            return False
        with torch.no_grad():
            tensor.copy_(value)
        return True


def _many_small(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The places of plain tensors of few numbers in the host's memory, by dtype, where these are many."""
    found: dict[torch.dtype, list[int]] = {}
    for i, t in enumerate(tensors):
        if type(t) in (Tensor, nn.Parameter) and t.is_cpu and 0 < t.numel() <= COPIED_TOGETHER and _is_plain(t):
            found.setdefault(t.dtype, []).append(i)
    return [places for places in found.values() if len(places) >= MANY_COPIED]


def _is_plain(t: Tensor) -> bool:
    return t.layout is torch.strided and not (t.is_complex() or t.is_quantized or t.is_neg())


@contextmanager
def own_tensors(model: nn.Module, values: bool = False) -> Iterator[None]:
    """After the context each place of `model` holds the tensor that it held; what was put back is said.

    values: each tensor has its value again, too; inside another such context for the model the outer one restores
    it.
    """
    values = values and id(model) not in _checked.get()
    own, token = OwnTensors(model, values), _checked.set(_checked.get() | ({id(model)} if values else set()))
    try:
        yield
    finally:
        _checked.reset(token)
        own.restore()


def is_checked(model: nn.Module) -> bool:
    """Whether the values of the model's tensors will be put back, as a measurement of it is going on."""
    return id(model) in _checked.get()


@contextmanager
def hearing() -> Iterator[list[str]]:
    """The sentences said inside the context, each once; after an exception they go on to the next listener."""
    said: list[str] = []
    token = _said.set(said)
    try:
        yield said
    except BaseException:
        _said.reset(token)
        for sentence in said:
            say(sentence)
        raise
    _said.reset(token)


def say(sentence: str) -> None:
    """Tell the listeners; without one it becomes a warning."""
    said = _said.get()
    if said is None:
        warnings.warn(sentence, RuntimeWarning, stacklevel=2)
    elif sentence not in said:
        said.append(sentence)


def _places(name: str, module: nn.Module) -> Iterator[HeldPlace]:
    for kind in ("_parameters", "_buffers"):
        own = vars(module).get(kind)
        if isinstance(own, dict):  # TorchScript modules have none, and cannot bind another tensor
            yield name, module, kind, own, dict(own) if own else NO_TENSORS


def _is_as_it_was(place: HeldPlace) -> bool:
    _, module, kind, own, tensors = place
    return vars(module).get(kind) is own and (_same_order(own, tensors) if own or tensors else True)


def keeper_of(model: nn.Module) -> str:
    """Who puts the parameters in place at each call and takes them out again, "" for no one."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            return "torch's fully_shard"
        if hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters(recurse=False)):
            return "accelerate's offloading"
    return ""


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [key for key in dict.fromkeys([*a, *b]) if a.get(key) is not b.get(key)]


def _same_order(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return len(a) == len(b) and all(k == m and v is w for (k, v), (m, w) in zip(a.items(), b.items(), strict=True))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape and dtype and the same bits (a NaN is then equal to itself)."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.layout != torch.strided or a.is_meta or a.is_quantized:
        return True  # nothing that a kept copy can be compared with
    if a.is_complex():
        a, b = torch.view_as_real(a.detach().resolve_conj()), torch.view_as_real(b.detach().resolve_conj())
    integers = _INTEGERS.get(a.element_size())
    if integers is None or a.is_neg() or b.is_neg():
        return bool(((a == b) | ((a != a) & (b != b))).all())
    return torch.equal(a.detach().view(integers), b.detach().view(integers))


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written to; -1 where that is not counted."""
    try:
        return tensor._version
    except RuntimeError:  # an inference tensor counts nothing
        return -1
