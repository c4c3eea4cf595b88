"""Follow the axes of every parameter through one forward pass.

A `TorchDispatchMode` sees each ATen operation of an ordinary forward pass on real data, so whatever runs can
be traced: no symbolic tracing, no rewriting, no restriction on the model's Python code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diag.connectivity.symmetries import rules, view_rules
from diag.connectivity.symmetries.axes import Labels
from diag.connectivity.symmetries.labelling import Labelling
from diag.errors import Unsupported
from diag.snapshot.batch import tensors_in


class AxisTrace(TorchDispatchMode, Labelling):
    """The labels of every tensor of a pass, and which operations there were."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        Labelling.__init__(self)
        self.unknown: dict[str, str] = {}  # operation without a rule -> module where it was met first
        self.operations: list[tuple[str, list[Labels]]] = []
        self.modules: list[str] = [""]
        self.dtypes: set[torch.dtype] = set()  # of all floating results: the coarsest bounds what a check can see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        bound = _bind(func, args, kwargs)
        operands = tensors_in(bound)
        results = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        before = {id(t) for t in operands}
        self._apply(func, bound, results)
        produced = tensors_in(results)
        self.dtypes |= {t.dtype for t in produced if t.is_floating_point()}
        for tensor in produced:
            if not self.is_labelled(tensor):
                reason = f"{operation_name(func)} gives an axis of its own"
                self.label(tensor, tuple(self.algebra.axis(n, reason) for n in tensor.shape))
        if any(self.is_data(t) for t in operands):
            self.used += [self.labels(t) for t in operands]
            for tensor in produced:
                self.mark_data(tensor, in_place=id(tensor) in before)
        self.operations.append((operation_name(func), [self.labels(t) for t in produced]))
        return outputs

    def _apply(self, func: Any, bound: dict[str, Any], results: Sequence[Any]) -> None:
        name = operation_name(func)
        if name in rules.AXIS_RULES:
            rules.AXIS_RULES[name](self, bound, results)
        elif torch.Tag.pointwise in func.tags or torch.Tag.pointwise in _functional_tags(name):
            rules.pointwise(self, bound, results)
        elif spatial := _spatial_axes(name):
            view_rules.windowed(self, bound, results, spatial)
        elif tensors_in(bound):
            self.unknown.setdefault(name, self.modules[-1])
            where = f" in '{self.modules[-1]}'" if self.modules[-1] else ""
            for tensor in tensors_in([bound, results]):
                for axis in self.labels(tensor):
                    self.algebra.freeze(axis, f"aten.{name}{where} has no rule here")


def operation_name(func: Any) -> str:
    """The name of an operation of aten, without its overload."""
    return func._schema.name.split("::")[-1]


def _bind(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by their schema names, defaults included."""
    bound = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    bound.update(zip((a.name for a in func._schema.arguments), args, strict=False))
    bound.update(kwargs)
    return bound


def _functional_tags(name: str) -> Sequence[Any]:
    """The tags of `relu` for `relu_`: in-place forms do not all carry them."""
    packet = getattr(torch.ops.aten, name.rstrip("_"), None) if name.endswith("_") else None
    return [tag for o in packet.overloads() for tag in getattr(packet, o).tags] if packet else ()


def _spatial_axes(name: str) -> int:
    """How many trailing axes a pooling or resampling operation reads through windows."""
    if "pool" in name or name.startswith(("upsample", "_upsample", "reflection_pad", "replication_pad")):
        return next((int(d) for d in "123" if f"{d}d" in name), 2 if "bi" in name else 0)
    return 0


# ---- tracing a model


def trace_model(model: nn.Module, example: Any) -> tuple[AxisTrace, dict[str, Labels]]:
    """One forward pass of `model` on `example` (a Batch): the trace, and the labels of each state entry.

    Raises Unsupported, with the operation's name, where the forward pass fails or gives no floating output.
    """
    trace = AxisTrace()
    labels: dict[str, Labels] = {}
    kept = set(model.state_dict(keep_vars=True))
    for name, tensor in [*model.named_parameters(remove_duplicate=False),
                         *model.named_buffers(remove_duplicate=False)]:  # fmt: skip
        if not trace.is_labelled(tensor):
            movable = tensor.is_floating_point() and (name in kept or isinstance(tensor, nn.Parameter))
            reason = None if movable else "a buffer that a checkpoint does not hold as numbers"
            trace.label(tensor, tuple(trace.algebra.axis(n, reason) for n in tensor.shape))
        if name in kept:
            labels[name] = trace.labels(tensor)
    for tensor in tensors_in([example.args, example.kwargs]):
        trace.label(tensor, tuple(trace.algebra.axis(n, "an axis of the input") for n in tensor.shape))
        trace.mark_data(tensor)
    with torch.inference_mode(False), torch.no_grad(), unfused(), _module_names(model, trace):
        try:
            with trace:
                outputs = example.forward(model)
        except Exception as error:
            last = trace.operations[-1][0] if trace.operations else "the first operation"
            raise Unsupported(
                f"Tracing failed in '{trace.modules[-1]}' after aten.{last} with {type(error).__name__}: "
                f"{error}; expected a forward pass that runs on the example given."
            ) from error
    answers = main_outputs(outputs)
    if not any(t.is_floating_point() or t.is_complex() for t in answers):
        kinds = ", ".join(sorted({str(t.dtype) for t in answers})) or "no tensor"
        raise Unsupported(
            f"The model returns {kinds}; expected floating outputs, by which a symmetry can be checked: wrap the "
            "model so that it returns its logits."
        )
    for tensor in answers:
        trace.freeze_axes((trace.labels(tensor),), "an axis of the output")
    return trace, labels


def main_outputs(outputs: Any) -> list[Tensor]:
    """The tensors that count as the model's answer: `logits` where they have a name, else all."""
    named = outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    return tensors_in(named if named is not None else outputs)


@contextmanager
def unfused() -> Iterator[None]:
    """No fused attention, encoder or recurrent kernels: they hide the axes that they work on."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        with sdpa_kernel([SDPBackend.MATH]), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)


class Lifted(TorchDispatchMode):
    """A pass in float64 throughout: casts of the model's own to float32 or less (norms, softmax) give float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        dtype_asked = kwargs.get("dtype")
        if isinstance(dtype_asked, torch.dtype) and dtype_asked.is_floating_point:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def _module_names(model: nn.Module, trace: AxisTrace) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in model.named_modules():
            enter = module.register_forward_pre_hook(lambda *_, n=name: trace.modules.append(n))
            leave = module.register_forward_hook(lambda *_: _leave(trace))
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        yield


def _leave(trace: AxisTrace) -> None:
    trace.modules.pop()
