"""Computing with all ranks at once: each has a share of the data, and what leaves is the mean over all of it.

Every rank makes the same calls in the same order. A rank on which a computation fails still takes part in the sum
and says so in it, so that all of them stop with the reason and none waits for another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from diag.distributed.checksums import checksum_of
from diag.distributed.meeting import initialized
from diag.distributed.placement import is_spread
from diag.errors import InvalidInput, Unsupported

ONE_PROCESS = "There is one process, so ranks= has nothing to put together; leave it out, or start with torchrun."
FAILED = "Rank {} could not compute its share; its own message says why."
DIFFER = (
    "The ranks hold other values of {}, so that they have no common loss; load one state on all of them, or "
    "broadcast it from rank 0."
)
SHARDED = (
    "{} is a DTensor with placement {}; curvature over ranks needs parameters that each rank holds whole. Gather "
    "them (full_tensor()) into an unsharded copy of the model."
)


class Together:
    """The ranks of torch.distributed's own group. state: the model's tensors by name, which must be equal on all.

    device: where messages go by. Raises InvalidInput where there is one process, Unsupported where tensors are
    sharded or differ.
    """

    def __init__(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        if not initialized():
            raise InvalidInput(ONE_PROCESS)
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        self._refuse_sharded(state)
        self._refuse_different(state)

    def _refuse_sharded(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in state.items():
            if is_spread(tensor):  # on every rank alike, so that none waits for another
                raise Unsupported(SHARDED.format(name, tensor.placements))  # type: ignore[attr-defined]

    def _refuse_different(self, state: Mapping[str, Tensor]) -> None:
        own = torch.stack([checksum_of(t) for t in state.values()]).to(self.device)
        count = torch.tensor([len(own), -len(own)], device=self.device)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        if int(count[0]) != -int(count[1]):
            raise Unsupported(DIFFER.format("different models"))
        most, least = own.clone(), own.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        for name, differs in zip(state, (most != least).tolist(), strict=True):
            if differs:
                raise Unsupported(DIFFER.format(name))

    def total(self, number: float) -> float:
        """The sum of the ranks' numbers."""
        value = torch.tensor([number], dtype=torch.float64, device=self.device)
        dist.all_reduce(value)
        return float(value)

    def least(self, number: float) -> float:
        """The smallest of the ranks' numbers."""
        value = torch.tensor([number], dtype=torch.float64, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MIN)
        return float(value)

    def sum(self, compute: Callable[[], Tensor], like: Tensor) -> Tensor:
        """The sum over ranks of what `compute()` gives, a tensor like `like`.

        Raises on every rank where one has raised: there its own error, on the others Unsupported.
        """
        error: Exception | None = None
        message = like.new_zeros(like.numel() + 1)
        try:
            message[:-1] = compute().reshape(-1)
        except Exception as raised:
            error = raised
            message.zero_()
            message[-1] = 1.0 + self.rank
        dist.all_reduce(message)
        if error is not None:
            raise error
        failed = float(message[-1])
        if failed:
            raise Unsupported(FAILED.format(int(failed) - 1 if failed <= self.world else "of several"))
        return message[:-1].reshape(like.shape)

    def all_succeed(self, compute: Callable[[], object]) -> None:
        """Call `compute()` on every rank; raises on all of them where it raises on one."""

        def tried() -> Tensor:
            compute()
            return torch.zeros(1, dtype=torch.float64, device=self.device)

        self.sum(tried, torch.zeros(1, dtype=torch.float64, device=self.device))
