"""Which tensor a model holds in each place, so that it can be checked afterwards that it still does.

A measurement calls the model at other values of its tensors, and a network may bind tensors of its own while it
runs. A parameter that is not the one that the optimizer holds would silently never be trained again.
What has changed is put back, and reported in one sentence.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
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

_said: ContextVar[list[str] | None] = ContextVar("diag_said", default=None)
_checked: ContextVar[frozenset[int]] = ContextVar("diag_checked", default=frozenset())


@dataclass
class Held:
    """One module's dicts of parameters and buffers, and what was in them."""

    name: str
    module: nn.Module
    dicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor | None]] = field(default_factory=dict)


class OwnTensors:
    """The tensors of a model by place; with `values`, what is in them too where that is not too much."""

    def __init__(self, model: nn.Module, values: bool = False) -> None:
        self._held = [_held(name, module) for name, module in model.named_modules()]
        self._keeper = keeper_of(model)
        tensors = [*model.named_parameters(), *model.named_buffers()] if values else []
        self._copies = sum(t.numel() * t.element_size() for _, t in tensors) <= KEPT_BYTES
        self._values = [(n, t, version_of(t), t.detach().clone() if self._copies else None) for n, t in tensors]

    def put_back(self) -> list[str]:
        """Put each tensor back in its place; the places that held another, by name, buffers left out: a forward
        pass may bind a new tensor to one."""
        if self._keeper and self._changed():
            for held in self._held:
                if hasattr(held.module, "_get_fsdp_state"):  # it counts on the tensors that it has put in place
                    held.module.reshard()  # type: ignore[operator]
        foreign = []
        for held, kind in self._changed():
            own, now, tensors = held.dicts[kind], vars(held.module).get(kind), held.tensors[kind]
            if kind == "_parameters" and not self._keeper:
                foreign += [f"{held.name}.{key}".removeprefix(".") for key in _different(now or {}, tensors)]
            own.clear()
            own.update(tensors)
            vars(held.module)[kind] = own
        return foreign

    def _changed(self) -> list[tuple[Held, str]]:
        return [
            (held, kind)
            for held in self._held
            for kind, own in held.dicts.items()
            if vars(held.module).get(kind) is not own or not _same_order(own, held.tensors[kind])
        ]

    def rewrite(self) -> list[str]:
        """Put the values back that have changed in place, as far as they were kept; the tensors, by name."""
        written = [
            v for v in self._values if (version_of(v[1]) != v[2] if v[3] is None else not same_bits(v[1], v[3]))
        ]
        with torch.no_grad():
            for _, parameter, _, value in written:
                if value is not None:
                    parameter.copy_(value)
        return [name for name, *_ in written]

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


def _held(name: str, module: nn.Module) -> Held:
    held = Held(name, module)
    for kind in ("_parameters", "_buffers"):
        own = vars(module).get(kind)
        if isinstance(own, dict):  # TorchScript modules have none, and cannot bind another tensor
            held.dicts[kind], held.tensors[kind] = own, dict(own)
    return held


def keeper_of(model: nn.Module) -> str:
    """Who puts the parameters in place at each call and takes them out again, "" for no one."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            return "torch's fully_shard"
        if hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters(recurse=False)):
            return "accelerate's offloading"
    return ""


def _different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [key for key in dict.fromkeys([*a, *b]) if a.get(key) is not b.get(key)]


def _same_order(a: dict[str, Any], b: dict[str, Any]) -> bool:
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
