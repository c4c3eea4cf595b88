"""Record every place in a forward pass where a trainable parameter meets the data.

Per-example gradients of a parameter follow from two things at each such place (a *use*): the tensors that went
into the operation and the gradient of the loss with respect to its output. `Capture` is a
`TorchFunctionMode`: it sees the calls themselves (`linear`, `conv2d`, `add`, ...), not modules, so tied
weights, modules called several times, parameters used directly and attention's packed projections all
look alike. Nothing in the model changes: the ordinary kernels run and the ordinary graph is built.

A tensor computed from parameters alone (a transpose, a slice, a normalised weight) is *derived*: it stands
for its parameters until it meets the data.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from diag.errors import Unsupported
from diag.gradients.layer_rules import PARAMETER, Rule, followed
from diag.gradients.rules.recurrent import UNROLLED, is_padded_call
from diag.gradients.sources import ArgumentPlace, Source, item, rearranged


@dataclass(eq=False)
class Use:
    """One call in which parameters, or tensors derived from them, took part.

    `with_data` tells whether any other argument depends, or may depend, on the examples. `versions` are the
    arguments' version counters before the call, `inputs` their graph nodes. `readable` tells whether what the
    graph node saved may be read: hooks on saved tensors (checkpoints, offloading) can allow one reading only.
    """

    index: int
    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slots: dict[ArgumentPlace, Source]
    with_data: bool
    shape: torch.Size
    edge: GradientEdge
    versions: dict[ArgumentPlace, int]
    inputs: list[Node | None]
    readable: bool = False
    rule: tuple[nn.Module, Rule] | None = None  # of the layer that was called, where its user gave one

    @property
    def signature(self) -> tuple[Any, ...]:
        """What tells one model's calls from another's: the function, and where parameters stand in it."""
        return self.name, *self.slots

    def bare(self) -> Use:
        """The same without the tensors, so that an activation is freed as soon as the backward pass allows."""
        bare = object.__new__(Use)  # a tenth of what copy.copy takes, for every call of every step
        bare.__dict__.update(self.__dict__, args=(), kwargs={}, versions={})
        return bare

    def argument(self, place: ArgumentPlace) -> Any:
        """The argument at this place."""
        value = self.kwargs[place[0]] if isinstance(place[0], str) else self.args[place[0]]
        return value[place[1]] if len(place) == 2 else value

    def overwritten(self, place: ArgumentPlace) -> bool:
        """True where the argument no longer holds what went into the call."""
        return self.argument(place)._version != self.versions[place]


class Capture(TorchFunctionMode):
    """While active, appends a `Use` for each call that one of `parameters` takes part in.

    `unroll`: write recurrent kernels out step by step, which rounds differently. `on_use` is called with each use.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        unroll: bool = True,
        on_use: Callable[[Use], None] | None = None,
    ) -> None:
        super().__init__()
        self._unroll, self._on_use = unroll, on_use
        self.uses: list[Use] = []
        self._parameters = {id(p): Source((name,), p.shape) for name, p in parameters.items()}
        self._constants = {id(t): t for t in _constant_tensors(model) if id(t) not in self._parameters}
        self.several: list[tuple[list[Node], list[Node | None]]] = []  # output and input nodes of split, chunk, ...
        self._changed: dict[int, Any] = {}  # what the model's own tensors have become by being written into
        self._token = object()
        self._running: set[Any] = set()
        self._model, self._hooks, self._entered = model, list[Any](), 0
        self._inside: list[dict[ArgumentPlace, int]] = []  # layers with rules that are being called

    def __enter__(self) -> Self:
        if not self._entered:  # it is entered again for each function of torch's that it steps into
            self._hooks = followed(self._model, self)
        self._entered += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entered -= 1
        if not self._entered:
            for hook in self._hooks:
                hook.remove()
            self._hooks, self._inside = [], []

    def layer_begins(self, args: Any, kwargs: Any) -> None:
        """A layer whose user gave a rule is about to be called: its own calls are not looked at."""
        self._inside.append({place: tensor._version for place, tensor in _tensors(args, kwargs)})

    def layer_ends(self, layer: nn.Module, rule: Rule, args: Any, kwargs: Any, output: Any) -> None:
        """It has returned."""
        versions = self._inside.pop()
        known = isinstance(output, Tensor) and output.grad_fn is not None and torch.is_grad_enabled()
        own = {PARAMETER + n: p for n, p in layer.named_parameters() if id(p) in self._parameters}
        if self._inside or not known or not own:
            return
        slots: dict[ArgumentPlace, Source] = {(name,): self._parameters[id(p)] for name, p in own.items()}
        versions |= {(name,): p._version for name, p in own.items()}
        nodes = [tensor.grad_fn for _, tensor in _tensors(args, kwargs)]
        self._use(
            Use(len(self.uses), type(layer).__name__, layer, args, {**kwargs, **own}, slots, True, output.shape,
                get_gradient_edge(output), versions, nodes, rule=(layer, rule))
        )  # fmt: skip

    def _use(self, use: Use) -> None:
        self.uses.append(use)
        if self._on_use is not None:
            self._on_use(use)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if self._unroll and name in UNROLLED and is_padded_call(name, args):
            with self:
                return UNROLLED[name](*args)
        if getattr(func, "__module__", None) == "torch.nn.functional" and func not in self._running:
            return self._step_into(func, args, kwargs)
        if name == "__get__":  # a property such as Tensor.T or Tensor.shape
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        return self._call(name, func, args, kwargs)

    def _step_into(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the body of a Python function of torch's, so that the calls inside it are seen."""
        self._running.add(func)
        try:
            with self:
                return _without_dispatch(func)(*args, **kwargs)
        finally:
            self._running.discard(func)

    def _call(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        _refuse(name, args)
        tensors = dict(_tensors(args, kwargs))
        kinds = {place: self._kind(tensor) for place, tensor in tensors.items()}
        slots = {place: kind for place, kind in kinds.items() if isinstance(kind, Source)}
        with_data = any(kind is _OF_DATA for kind in kinds.values())
        if not slots:
            result = func(*args, **kwargs)
            output = args[0] if name == "__setitem__" else result
            # An untagged tensor counts as data, so only what differs from that needs a tag.
            if not with_data or _overwrites(name):
                self._tag(output, _OF_DATA if with_data else _CONSTANT)
            return result
        versions = {place: tensor._version for place, tensor in tensors.items()}
        nodes = [tensor.grad_fn for tensor in tensors.values()]
        result = func(*args, **kwargs)
        output = args[0] if name == "__setitem__" else result
        index = None
        if isinstance(output, Tensor) and output.requires_grad and torch.is_grad_enabled():
            index = len(self.uses)
            self._use(
                Use(index, name, func, args, kwargs, slots, with_data, output.shape,
                    get_gradient_edge(output), versions, nodes, not _saving_hooks(True))
            )  # fmt: skip
        if not with_data:
            self._derive(name, func, args, kwargs, slots, output, index)
            if isinstance(output, (tuple, list)):
                made = [t.grad_fn for t in output if isinstance(t, Tensor) and t.grad_fn is not None]
                self.several.append((made, nodes))
        elif _overwrites(name):
            self._tag(output, _OF_DATA)
        return result

    def _kind(self, tensor: Tensor) -> Any:
        source = self._parameters.get(id(tensor))
        if source is not None:
            return source
        if id(tensor) in self._constants:
            return self._changed.get(id(tensor), _CONSTANT)
        token, kind = getattr(tensor, "diag_kind", (None, None))
        return kind if token is self._token else _OF_DATA

    def _tag(self, value: Any, kind: Any) -> None:
        # An attribute lives exactly as long as its tensor; by id, a new tensor could be taken for a freed one.
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if not isinstance(tensor, Tensor) or id(tensor) in self._parameters:
                continue
            if id(tensor) in self._constants:  # the model's own: it must not carry our tag when it is saved
                self._changed[id(tensor)] = kind
            else:
                tensor.diag_kind = (self._token, kind)  # type: ignore[attr-defined]

    def _derive(
        self,
        name: str,
        func: Any,
        args: Any,
        kwargs: Any,
        slots: dict[ArgumentPlace, Source],
        output: Any,
        use: int | None,
    ) -> None:
        """Tag what was computed from parameters alone with what it stands for."""
        names = tuple(dict.fromkeys(n for source in slots.values() for n in source.names))
        made_by = frozenset().union(*(s.made_by for s in slots.values()), () if use is None else (use,))
        positions = rearranged(name, func, args, kwargs, slots)
        for i, tensor in enumerate(output if isinstance(output, (tuple, list)) else (output,)):
            if not isinstance(tensor, Tensor):
                continue
            if not tensor.requires_grad:
                self._tag(tensor, _CONSTANT)
                continue
            where = positions
            if positions is not None and isinstance(output, (tuple, list)):
                where = cache(partial(item, positions, i))
            edge = None if where is not None else get_gradient_edge(tensor)
            self._tag(tensor, Source(names, tensor.shape, where, edge, made_by))


def _refuse(name: str, args: Any) -> None:
    if name == "embedding_renorm_":
        raise Unsupported(
            "An embedding has max_norm, so each forward pass rewrites its weights; set max_norm=None to measure."
        )
    if name == "embedding" and len(args) > 3 and args[3]:
        raise Unsupported(
            "An embedding has scale_grad_by_freq, so an example's gradient depends on the rest of its batch; set "
            "it to False to measure."
        )


class _Marker:
    pass


_CONSTANT = _Marker()  # no example has any influence on it
_OF_DATA = _Marker()


def _overwrites(name: str) -> bool:
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _tensors(args: Any, kwargs: Any) -> Iterator[tuple[ArgumentPlace, Tensor]]:
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor):
            yield (key,), value
        elif isinstance(value, (tuple, list)):
            for i, item in enumerate(value):
                if isinstance(item, Tensor):
                    yield (key, i), item


def _constant_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Everything a module holds that no example can have changed: frozen parameters, buffers, attributes."""
    for module in model.modules():
        for held in (vars(module), module._parameters, module._buffers):
            yield from (value for value in held.values() if isinstance(value, Tensor))


# The innermost hooks on saved tensors, or None; older versions of torch cannot be asked.
_saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)
_copies: dict[Any, Any] = {}


def _without_dispatch(func: Any) -> Any:
    """A Python function of `torch.nn.functional` that runs its body instead of asking the mode again.

    The copy shares the code and sees other globals, so nothing of torch's is patched.
    """
    if func not in _copies:
        checks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
        copy = types.FunctionType(
            func.__code__, {**func.__globals__, **dict.fromkeys(checks, _never)}, func.__name__,
            func.__defaults__, func.__closure__,
        )  # fmt: skip
        copy.__kwdefaults__ = func.__kwdefaults__
        _copies[func] = copy
    return _copies[func]


def _never(*_: Any) -> bool:
    return False
