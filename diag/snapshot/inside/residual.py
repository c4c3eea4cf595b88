"""The longest residual stack of a model: modules that follow each other and each add something to what they are
given.

A module counts where its output is its first input plus terms, as tracing of one forward pass shows: the input goes
through additions alone to the output. What else it is called with (masks, positions) is kept as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from diag.errors import MissingQuantity
from diag.snapshot.batch import tensors_in
from diag.snapshot.explain import CALL_ERRORS, explained
from diag.snapshot.module_graph import TRANSPARENT
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot

RESIDUAL_EXAMPLES = 32
SUMS = {"add", "add_", "sub", "sub_"}
SAME = 1e-4  # relative: what a block gives again, to rounding
UNREPEATABLE = (
    "{} gives something else when it is called again on what it was given, as with a cache of keys and values; "
    "turn such a cache off (model.config.use_cache = False)."
)


@dataclass(frozen=True)
class ResidualStack:
    """names: of the blocks f_1 .. f_L, in order. start: what enters the first. in_turn: f_l(h_l), what each block
    adds where it stands; at_start: f_l(h_0), what it would add to the stack's input. All of one shape, (examples,
    ...).
    """

    names: tuple[str, ...]
    start: Tensor
    in_turn: tuple[Tensor, ...]
    at_start: tuple[Tensor, ...]


@dataclass
class _Call:
    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    adds: bool


def residual_stack(snapshot: Snapshot) -> ResidualStack:
    """What the blocks of the longest residual stack add, in turn and at its start, on at most 32 examples.

    Raises MissingQuantity where no two modules that add to what they are given follow each other, or where one
    of them does not give the same again.
    """
    model, (batch,) = snapshot.model, snapshot.cuttable(snapshot.batches[:1])
    try:
        with preserved(model), torch.no_grad():
            calls = _traced(model, lambda: batch.few(RESIDUAL_EXAMPLES).forward(model))
            chain = _longest(calls)
            if len(chain) < 2:
                raise MissingQuantity(
                    "the model has no two blocks in a row that add to what they are given (h + f(h), the sum made "
                    "by the block's own forward, with nothing after it)."
                )
            _refuse_unrepeatable(chain)
            start = chain[0].args[0]
            in_turn = tuple(call.output - call.args[0] for call in chain)
            at_start = tuple(_first(c.module(start, *c.args[1:], **c.kwargs)) - start for c in chain)
    except CALL_ERRORS as error:
        raise explained(model, snapshot.batches, error) from error
    return ResidualStack(tuple(c.name for c in chain), start, in_turn, at_start)


def _refuse_unrepeatable(chain: list[_Call]) -> None:
    """Raises MissingQuantity where a block gives something else when it is called again on what it was given."""
    for call in chain:
        try:
            again = _first(call.module(*call.args, **call.kwargs))
        except CALL_ERRORS:
            again = None
        if again is None or not torch.allclose(
            again, call.output, rtol=SAME, atol=SAME * float(call.output.abs().max())
        ):
            raise MissingQuantity(UNREPEATABLE.format(call.name))


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _longest(calls: list[_Call]) -> list[_Call]:
    """The longest run of calls of different modules, each on the output of the one before."""
    best: list[_Call] = []
    for i, first in enumerate(calls):
        chain = [first]
        for call in calls[i + 1 :]:
            if call.args[0] is chain[-1].output and call.module not in [c.module for c in chain]:
                chain.append(call)
        # Inner modules end before the blocks that hold them, so of equal runs the later is the outer one.
        if len(chain) >= max(len(best), 1):
            best = chain
    return best


def _traced(model: nn.Module, forward: Any) -> list[_Call]:
    """The calls of modules whose output is their first input plus terms, in the order in which they end."""
    calls: list[_Call] = []
    with _Sums() as sums, _hooked(model, sums, calls):
        forward()
    return [call for call in calls if call.adds]


class _Sums(TorchDispatchMode):
    """For every tensor the inputs of running modules that reached it through additions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.carries: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        name = func.name().split("::")[-1].split(".")[0]
        if name in SUMS or name in TRANSPARENT:
            carried = frozenset().union(
                *(self.carries.get(t, frozenset()) for t in tensors_in([args, kwargs or {}]))
            )
            for tensor in tensors_in(outputs):
                self.carries[tensor] = carried | self.carries.get(tensor, frozenset())
        return outputs


@contextmanager
def _hooked(model: nn.Module, sums: _Sums, calls: list[_Call]) -> Iterator[None]:
    tokens: list[tuple[object, Tensor | None]] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        before = args[0] if args and isinstance(args[0], Tensor) and args[0].is_floating_point() else None
        token = object()
        tokens.append((token, before))
        if before is not None:
            sums.carries[before] = sums.carries.get(before, frozenset()) | {token}

    def leave(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        token, before = tokens.pop()
        out = _first(output)
        if before is None or not isinstance(out, Tensor) or out.shape != before.shape or out is before:
            return
        calls.append(_Call(name, module, args, dict(kwargs), out, token in sums.carries.get(out, frozenset())))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hook = module.register_forward_hook(lambda *a, n=name: leave(n, *a), with_kwargs=True)
                stack.callback(hook.remove)
        yield
