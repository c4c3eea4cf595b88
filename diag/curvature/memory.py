"""How many bytes a graph holds, how many are available, and so whether to keep the graph or rebuild it.

The estimate is a measurement: graphs of a few examples are built and the distinct storages that they save are
counted, at two sizes, so that what grows with the data is separated from what does not.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diag.curvature.objective import Objective
from diag.curvature.probe import probe_batch
from diag.curvature.products import Curvature
from diag.errors import InvalidInput
from diag.linalg.deadline import free_memory
from diag.linalg.operator import LinearOperator
from diag.snapshot.batch import Batch, tensors_in

# What a product holds beyond the graph, as a share of the graph: the derivatives that are on their way. Measured
# as peak resident memory (MLP 670k / ResNet-20 / 4-layer GPT): kept graphs up to 0.65, rebuilt ones up to 0.22,
# since those shrink while they are used.
KEPT_WORKING_SHARE, REBUILT_WORKING_SHARE = 0.7, 0.25
WORKING_VECTORS = 3  # the gradient, the product and the pieces it is put together from
DEFAULT_SHARE = 0.25  # of the memory that is free: the caller's own training step wants the rest
UNKNOWN_MEMORY = 1 << 30


@dataclass(frozen=True)
class MemoryPlan:
    """Whether the graph is kept between products, in which micro-batches, and the bytes that were counted.

    graph_bytes: what the whole data's graph would hold; allowed_bytes: the cap that decided.
    """

    retained: bool
    batches: tuple[Batch, ...]
    graph_bytes: int
    allowed_bytes: int


def plan_memory(curvature: Curvature, objective: Objective, memory: int | None) -> MemoryPlan:
    """Keep the graph of all the data where `memory` bytes hold it; else micro-batches that fit one at a time.

    Without a cap the micro-batches also keep to what one gradient of the largest batch takes, so that measuring
    needs no more than training did. Raises InvalidInput where `memory` does not hold the graph of one example.
    """
    allowed = available_memory(objective.device) if memory is None else memory
    probe = probe_batch(objective)
    try:
        fixed, per_element = _graph_size(
            lambda part: curvature.graph(part, part.parameters(), part.batches), objective, probe
        )
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        # Inside torch.func what is saved cannot be counted: nothing is kept.
        return MemoryPlan(False, objective.batches, 0, allowed)
    elements = sum(_elements(b) for b in objective.batches)
    vectors = WORKING_VECTORS * objective.layout.size * objective.dtype.itemsize
    whole = int((per_element * elements + fixed * len(objective.batches)) * (1 + KEPT_WORKING_SHARE) + vectors)
    if whole <= allowed:
        return MemoryPlan(True, objective.batches, whole, allowed)
    limit = allowed - vectors
    if memory is None:
        base, slope = _graph_size(lambda part: part.loss(part.parameters(), part.batches[0]), objective, probe)
        limit = min(limit, int(base + slope * max(map(_elements, objective.batches))))
    pieces: list[Batch] = []
    for batch in objective.batches:
        each = per_element * _elements(batch) / batch.size
        fit = (limit / (1 + REBUILT_WORKING_SHARE) - fixed) / max(each, 1e-9)
        if fit < 1 and memory is not None:
            least = (fixed + each) * (1 + REBUILT_WORKING_SHARE) + vectors
            raise InvalidInput(
                f"The graph of one example needs about {_human(least)} and memory= allows {_human(memory)}; "
                f"allow at least {_human(least)}."
            )
        count = math.ceil(batch.size / max(1, min(batch.size, int(fit))))
        pieces += batch.split(math.ceil(batch.size / count))
    return MemoryPlan(False, tuple(pieces), whole, allowed)


def memory_beside(operator: LinearOperator) -> int:
    """The bytes that an algorithm may take for its vectors; the same on all ranks that share an operator's data."""
    return getattr(operator, "free_memory", None) or available_memory(operator.device)


def available_memory(device: torch.device) -> int:
    """The share of the device's free memory that a kept graph may take when no cap is given, in bytes."""
    free = free_memory(device)
    return int(DEFAULT_SHARE * (free if free < math.inf else UNKNOWN_MEMORY))


def saved_bytes(build: Callable[[Objective], object], objective: Objective) -> int:
    """The bytes of the distinct storages that a graph saves, parameters, buffers and data not counted.

    `build(objective)` returns whatever holds the graph; the caller is inside `objective.measured()`.
    """
    ours = [*objective.constants.values(), *objective.model.parameters(), *objective.model.buffers()]
    data = [tensors_in((b.args, b.kwargs, b.targets)) for b in objective.batches]
    known = {_storage(t) for t in (*ours, *(t for tensors in data for t in tensors))}
    kept: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())  # with its graph it would keep itself alive
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        graph = build(objective)
    # What was saved on the way and is gone by now does not count.
    tensors = [saved.tensor for saved in kept if saved.tensor.layout == torch.strided]
    sizes = {_storage(t): t.untyped_storage().nbytes() for t in tensors if _storage(t) not in known}
    del graph
    return sum(sizes.values())


class _Saved:
    """A tensor that a graph holds, for as long as the graph holds it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def _graph_size(build: Callable[[Objective], object], objective: Objective, probe: Batch) -> tuple[float, float]:
    """(bytes that do not grow with the data, bytes per element of the inputs)."""
    sizes = [probe] if probe.size == 1 or probe.coupled else [probe.slice(0, probe.size // 2), probe]
    with objective.measured():
        counted = [saved_bytes(build, objective.on([b])) for b in sizes]
    elements = [_elements(b) for b in sizes]
    if elements[0] == elements[-1]:
        return 0.0, counted[-1] / elements[-1]
    slope = max((counted[1] - counted[0]) / (elements[1] - elements[0]), 0.0)
    return max(counted[1] - slope * elements[1], 0.0), slope


def _elements(batch: Batch) -> int:
    return max(sum(t.numel() for t in tensors_in((batch.args, batch.kwargs))), batch.size)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _human(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return ""
