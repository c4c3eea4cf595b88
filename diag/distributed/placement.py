"""How a parameter is placed on the ranks, and how many of them hold the same part of it.

A tensor without a placement is taken to be the same on all ranks, as under DistributedDataParallel; a DTensor has
its placements. What another library shards in ways of its own is unknown, with the reason.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Marks that libraries put on plain tensors which are parts of something: their own names for it.
OWN_MARKS = {"ds_id": "DeepSpeed", "tensor_model_parallel": "Megatron", "expert_model_parallel": "Megatron"}
FLAT_PARAMETERS = (
    "The parameters are flattened and sharded by FullyShardedDataParallel (FSDP1), so that no rank holds whole "
    "tensors: norms are not recorded. Use fully_shard (FSDP2) to have them."
)
PARTIAL_SUM = (
    "{} is a partial sum on each rank (placement {}), so that its norm cannot be put together from theirs."
)
OUTSIDE = "{} lies on a device mesh that does not have all the ranks, so that its norm is not recorded."
LIBRARY = "{} is sharded by {} in a way of its own, so that its norm is not recorded."
LEFT_OUT_OF_DDP = (
    "{} is left out of DistributedDataParallel, so that each rank has its own; its norm is not recorded."
)


@dataclass(frozen=True)
class Placement:
    """copies: how many ranks hold the same part of the tensor; 0 where that is unknown, with the reason `why`."""

    copies: int
    world: int
    why: str = ""

    @property
    def known(self) -> bool:
        """Whether the ranks' numbers can be put together."""
        return self.copies > 0

    @property
    def replicated(self) -> bool:
        """Whether every rank holds all of it."""
        return self.copies == self.world

    @property
    def sharded(self) -> bool:
        """Whether the ranks hold different parts."""
        return 0 < self.copies < self.world


def is_spread(tensor: Any) -> bool:
    """Whether the tensor is a DTensor."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def own_part(tensor: Tensor) -> Tensor:
    """The part that this process holds, without its graph; operations on it never wait for another process."""
    plain = tensor.detach()
    return plain.to_local() if is_spread(plain) else plain  # type: ignore[attr-defined]


def is_flat(model: nn.Module) -> bool:
    """Whether the model is under FSDP1, which holds flat pieces of the parameters."""
    return any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())


def data_apart(model: nn.Module) -> bool:
    """Whether ranks are meant to train on other data: under tensor parallelism they are not."""
    spread = [p for p in model.parameters() if is_spread(p)]
    axes = max((sum(not q.is_replicate() for q in p.placements) for p in spread), default=0)  # type: ignore[attr-defined]
    fully = any(hasattr(m, "_get_fsdp_state") for m in model.modules())
    return not spread or (fully and axes <= 1)


def reads_one_batch(model: nn.Module, world: int) -> bool:
    """Whether all ranks hold parts of one network, so that they are to read one batch: pure tensor parallelism."""
    spread: list[Any] = [p for p in model.parameters() if is_spread(p)]
    split = any(not q.is_replicate() for p in spread for q in p.placements)
    over_all = all(p.device_mesh.ndim == 1 and p.device_mesh.size() == world for p in spread)
    return split and over_all and not data_apart(model)


def gradient_lies_alike(parameter: Tensor) -> bool | None:
    """Whether the gradient is spread over the ranks as its parameter is; None where there is no gradient.

    It may be a sum that no rank has yet, which the optimizer's step or clipping makes: under sequence parallelism
    that of a normalisation's weights is.
    """
    gradient: Any = parameter.grad
    if gradient is None:
        return None
    if is_spread(gradient) != is_spread(parameter):
        return False
    return not is_spread(parameter) or bool(gradient.placements == parameter.placements)  # type: ignore[attr-defined]


def block_of(tensor: Any) -> tuple[slice, ...] | None:
    """Where this process's part of a DTensor lies in the whole; None where another rank, that holds the same part,
    stands for it, or where the part is empty."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as local

    mesh, placements = tensor.device_mesh, tensor.placements
    own = mesh.get_coordinate()
    first = own is not None and all(c == 0 or not p.is_replicate() for c, p in zip(own, placements, strict=True))
    if not first or int(mesh.mesh.min()) != 0:
        return None
    shape, start = local(tensor.shape, mesh, placements)
    block = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
    return block if all(shape) else None


def placement_of(name: str, tensor: Tensor, world: int) -> Placement:
    """How `tensor`, called `name`, is spread over `world` ranks."""
    for mark, library in OWN_MARKS.items():
        if getattr(tensor, mark, False):
            return Placement(0, world, LIBRARY.format(name, library))
    if not is_spread(tensor):
        return Placement(world, world)
    mesh, parts = tensor.device_mesh, 1  # type: ignore[attr-defined]
    if world % mesh.size() or mesh.get_coordinate() is None:
        return Placement(0, world, OUTSIDE.format(name))
    for axis, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
        if placement.is_partial():
            return Placement(0, world, PARTIAL_SUM.format(name, placement))
        if not placement.is_replicate():
            parts *= mesh.size(axis)
    return Placement(world // parts, world)


def placements_of(model: nn.Module, parameters: dict[str, nn.Parameter], world: int) -> dict[str, Placement]:
    """How each of the model's parameters is spread."""
    if is_flat(model):
        return {name: Placement(0, world, FLAT_PARAMETERS) for name in parameters}
    ignored: Collection[str] = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    found = {name: placement_of(name, p, world) for name, p in parameters.items()}
    return found | {n: Placement(0, world, LEFT_OUT_OF_DDP.format(n)) for n in ignored if n in found}
