"""One tensor of a checkpoint as the model has it: its values unchanged, or refused in one sentence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diag.checkpoints.stored import StoredTensor
from diag.errors import CheckpointError


def as_own_dtype(name: str, value: Tensor, own: Tensor | None) -> Tensor:
    """`value` as a plain tensor of the dtype of `own` (None: of its own dtype).

    Raises CheckpointError where it is not stored as plain numbers (sparse, quantised, one shard, without values),
    or where the other dtype would change the numbers: an imaginary part lost, a number made infinite, integers that
    are codes, fractions that become whole.
    """
    stored = plain_tensor(name, value)
    if own is None or own.dtype == stored.dtype:
        return stored
    if stored.is_complex() and not own.is_complex():
        raise _refused(name, stored, own, "would lose their imaginary part")
    if isinstance(own, nn.Parameter) and not (stored.is_floating_point() or stored.is_complex()):
        raise _refused(name, stored, own, "may be the codes of a quantised model, which are not weights")
    made = stored.to(own.dtype)
    if made.is_floating_point() or made.is_complex():
        if not torch.equal(_finite(stored), _finite(made)):
            raise _refused(name, stored, own, "are too large for it")
    elif not torch.equal(made.to(stored.dtype), stored):
        raise _refused(name, stored, own, "would become other numbers")
    return made


def _finite(value: Tensor) -> Tensor:
    narrow = value.is_floating_point() and value.itemsize == 1  # torch.isfinite does not take these
    return (value.float() if narrow else value).isfinite()


def _refused(name: str, value: Tensor, own: Tensor, why: str) -> CheckpointError:
    stored, expected = (str(t.dtype).removeprefix("torch.") for t in (value, own))
    return CheckpointError(
        f"{name} holds {stored} values in the checkpoint that {why} as the model's {expected}; build the "
        "model with the dtypes that were saved."
    )


def plain_tensor(name: str, value: Tensor) -> Tensor:
    """`value` as a plain tensor on the CPU. Raises CheckpointError where it is none, or one shard."""
    kind = _kind(value)
    if kind:
        raise CheckpointError(f"{name} is {kind} in the checkpoint; save it as a plain tensor with all its values.")
    if isinstance(value, StoredTensor):
        return value.whole()
    if type(value) is Tensor:
        return value
    if isinstance(value, nn.Parameter):
        return value.detach()
    local = value.to_local() if hasattr(value, "to_local") else None
    if local is None or local.shape != value.shape:
        raise CheckpointError(
            f"{name} is one shard of a distributed tensor; save the whole state with "
            "torch.distributed.checkpoint, call full_tensor() before saving, or give a folder that holds the files "
            "of all ranks (rank0.pt, rank1.pt, ...)."
        )
    return local


def _kind(value: Tensor) -> str:
    if value.is_nested:
        return "a nested tensor"
    if value.device.type == "meta":
        return "a tensor without values (of the device meta)"
    if value.is_quantized:
        return "a quantised tensor"
    if value.layout is not torch.strided:
        return f"a tensor of the layout {str(value.layout).removeprefix('torch.')}"
    return ""
