"""The graph of a model: which module's output goes into which other module, as one forward pass shows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from diag.errors import Unsupported
from diag.snapshot.batch import Batch, tensors_in
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot

if TYPE_CHECKING:
    import networkx

INPUT, OUTPUT = "input", "output"
# Operations that only rearrange a tensor: they are not nodes.
TRANSPARENT = {
    "view", "unsafe_view", "reshape", "reshape_alias", "permute", "transpose", "t", "expand", "squeeze",
    "unsqueeze", "select", "slice", "split", "split_with_sizes", "unbind", "clone", "detach", "alias", "to_copy",
    "contiguous",
}  # fmt: skip


def module_graph(snapshot: Snapshot) -> networkx.DiGraph:
    """The snapshot's model as a graph: see `trace_modules`. Raises MissingQuantity without data."""
    (batch,) = snapshot.cuttable(snapshot.batches[:1])
    return trace_modules(snapshot.model, batch.few(2))


def trace_modules(model: nn.Module, batch: Batch) -> networkx.DiGraph:
    """A directed graph of one forward pass.

    Nodes: "input", "output", every module without children that was called ("fc", "conv1"), PyTorch's modules
    with parameters of their own (attention), and operations in between ("blocks.0: add"). Node attributes: kind
    (class or operation), parameters (their number, tied ones at their first owner), shape (of the first output,
    without the batch), calls. Edges follow tensors.
    Raises Unsupported where the forward pass fails.
    """
    import networkx

    recorder = _Recorder(model, networkx.DiGraph())
    graph = recorder.graph
    graph.add_node(INPUT, kind=INPUT, parameters=0, shape=(), calls=1)
    with preserved(model), torch.no_grad(), _following(model, recorder):
        for tensor in tensors_in([batch.args, batch.kwargs]):
            recorder.producers[tensor] = INPUT
        try:
            with recorder:
                outputs = batch.forward(model)
        except Exception as error:
            raise Unsupported(
                f"The forward pass failed with {type(error).__name__}: {error}; expected a model that runs on "
                "the data."
            ) from error
    graph.add_node(OUTPUT, kind=OUTPUT, parameters=0, shape=(), calls=1)
    for tensor in tensors_in(outputs):
        recorder.connect(tensor, OUTPUT)
    # A module that did nothing (dropout in evaluation mode) has handed its input on.
    graph.remove_nodes_from([n for n in networkx.isolates(graph) if n not in (INPUT, OUTPUT)])
    return graph


def _is_leaf(module: nn.Module) -> bool:
    """A module without children, or one of PyTorch's own that works on parameters of its own (attention)."""
    own = next(module.parameters(recurse=False), None) is not None
    return not any(module.children()) or (own and type(module).__module__.startswith("torch.nn."))


class _Recorder(TorchDispatchMode):
    """Knows which node made each tensor."""

    def __init__(self, model: nn.Module, graph: networkx.DiGraph) -> None:
        super().__init__()
        self.graph = graph
        self.producers = WeakIdKeyDictionary()
        self.stack: list[tuple[str, nn.Module, str | None]] = []  # module path, module, its node if a leaf
        self._owned: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        operands, produced = tensors_in([args, kwargs or {}]), tensors_in(outputs)
        sources = [t for t in operands if t in self.producers]
        name = func._schema.name.split("::")[-1].strip("_")
        leaf = next((node for _, _, node in self.stack if node is not None), None)
        if not sources or not produced:
            return outputs
        if leaf is None and name in TRANSPARENT:
            node = self.producers[sources[0]]
        else:
            node = leaf or self._operation(name)
            for tensor in sources:
                self.connect(tensor, node)
            self.graph.nodes[node]["shape"] = tuple(produced[0].shape[1:])
        for tensor in produced:
            self.producers[tensor] = node
        return outputs

    def connect(self, tensor: torch.Tensor, node: str) -> None:
        source = self.producers.get(tensor)
        if source is not None and source != node and not self.graph.has_edge(source, node):
            self.graph.add_edge(source, node)

    def _operation(self, name: str) -> str:
        owner = self.stack[-1][0] if self.stack else ""
        label = f"{owner}: {name}" if owner else name
        node, k = label, 2
        while node in self.graph:
            node, k = f"{label} {k}", k + 1
        self.graph.add_node(node, kind=name, parameters=0, shape=(), calls=1)
        return node

    def enter(self, path: str, module: nn.Module) -> None:
        node = path if path and _is_leaf(module) else None
        if node is not None:
            if node not in self.graph:
                own = [p for p in module.parameters() if id(p) not in self._owned]
                self._owned |= {id(p) for p in own}
                count = sum(p.numel() for p in own)
                self.graph.add_node(node, kind=type(module).__name__, parameters=count, shape=(), calls=0)
            self.graph.nodes[node]["calls"] += 1
        self.stack.append((path, module, node))


@contextmanager
def _following(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    def leave(*_: Any) -> None:
        recorder.stack.pop()

    with ExitStack() as stack:
        for path, module in model.named_modules():
            enter = module.register_forward_pre_hook(lambda m, _, n=path: recorder.enter(n, m))
            stack.callback(enter.remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield
