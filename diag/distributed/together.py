"""Computing with all ranks at once: each has a share of the data, and what leaves is the mean over all of it.

Every rank makes the same calls in the same order. A rank on which a computation fails still takes part in the sum
and says so in it, so that all of them stop with the reason and none waits for another. Where a message fails (a
rank has gone, or is later than the group's timeout) nothing more is sent, and each further call raises the reason.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diag.distributed.checksums import checksum_of
from diag.distributed.link import plain_reason
from diag.distributed.meeting import initialized
from diag.distributed.placement import block_of, is_spread, own_part
from diag.errors import InvalidInput, Unsupported, text_of
from diag.linalg.deadline import NEVER, Deadline, free_memory

ONE_PROCESS = "There is one process, so ranks= has nothing to put together; leave it out, or start with torchrun."
FAILED = "Rank {} could not compute its share; its own message says why."
FAILED_SO = "Rank {} could not compute its share ({})."
PARTED = "The ranks could not continue together ({}); look at what happened to the others."
UNLIKE_ROWS = (
    "The ranks' {} are not of one kind (shape and number format), so that they do not make one table; give every "
    "rank examples of one shape and the same model."
)
ROWS_TOO_LARGE = (
    "The {} of all ranks are {:.2g} GB, more than a quarter of what is free on some rank ({:.2g} GB); give fewer "
    "examples (max_examples=)."
)
FREE_SHARE_OF_ROWS = 0.25
DIFFER = (
    "The ranks hold other values of {}, so that they have no common loss; load one state on all of them, or "
    "broadcast it from rank 0."
)


class Together:
    """The ranks of torch.distributed's own group, or of `group`.

    device: where messages go by. on_host: the group takes only what is on the host. deadline: of the whole, known
    to one rank; where it has passed all of them stop at the next sum. tell(sentence), told(rank): how ranks say
    what became of them, beside the messages. Raises InvalidInput where there is one process.
    """

    def __init__(
        self,
        device: torch.device,
        group: Any = None,
        on_host: bool = False,
        tell: Callable[[str], None] | None = None,
        told: Callable[[int], str] | None = None,
    ) -> None:
        if group is None and not initialized():
            raise InvalidInput(ONE_PROCESS)
        known: Any = dist.group.WORLD if group is None else group
        self._group: Any = known
        self.rank, self.world = known.rank(), known.size()
        self.device = torch.device("cpu") if on_host else device
        self._tell, self._told = tell, told
        self.deadline: Deadline = NEVER
        self.failed = False  # whether the last sum was stopped on all ranks alike
        self.lost = ""  # why nothing more is sent

    def refuse_different(self, state: Mapping[str, Tensor]) -> None:
        """Raise Unsupported where the ranks hold other values of these tensors, by name."""
        own = torch.stack([checksum_of(t).to(self.device) for t in state.values()])
        if not self.same(torch.tensor([len(own)])).all():
            raise Unsupported(DIFFER.format("different models"))
        for name, same in zip(state, self.same(own).tolist(), strict=True):
            if not same:
                raise Unsupported(DIFFER.format(name))

    def same(self, numbers: Tensor) -> Tensor:
        """Which of these integers all ranks have in common."""
        most, least = numbers.to(self.device, copy=True), numbers.to(self.device, copy=True)
        self._reduce(most, dist.ReduceOp.MAX)
        self._reduce(least, dist.ReduceOp.MIN)
        return most == least

    def total(self, number: float) -> float:
        """The sum of the ranks' numbers."""
        return float(self.totals(torch.tensor([number], dtype=torch.float64)))

    def totals(self, numbers: Tensor) -> Tensor:
        """The sums of the ranks' tensors, which have one shape."""
        value = numbers.to(self.device, copy=True)
        self._reduce(value)
        return value.to(numbers.device)

    def least(self, number: float) -> float:
        """The smallest of the ranks' numbers."""
        value = torch.tensor([number], dtype=torch.float64, device=self.device)
        self._reduce(value, dist.ReduceOp.MIN)
        return float(value)

    def most(self, number: float) -> float:
        """The largest of the ranks' numbers."""
        return float(self.largest(torch.tensor([number], dtype=torch.float64)))

    def largest(self, numbers: Tensor) -> Tensor:
        """The largest of the ranks' tensors, which have one shape, entry by entry."""
        value = numbers.to(self.device, copy=True)
        self._reduce(value, dist.ReduceOp.MAX)
        return value.to(numbers.device)

    def table(self, own: Tensor) -> Tensor:
        """(world, n): the ranks' vectors (n,), which have one size and dtype."""
        message = own.to(self.device).contiguous()
        whole = message.new_empty(self.world, len(message))
        self._send(lambda: self._group.allgather([list(whole)], [message]))
        return whole.to(own.device)

    def own_row_of_sum(self, table: Tensor) -> Tensor:
        """(n,): this rank's row of the sum of the ranks' tables (world, n)."""
        message = table.to(self.device).contiguous()
        found = message.new_empty(message.shape[1])
        self._send(lambda: self._group.reduce_scatter([found], [list(message)]))
        return found.to(table.device)

    def sum(self, compute: Callable[[], Tensor], like: Tensor) -> Tensor:
        """The sum over ranks of what `compute()` gives, a tensor like `like`.

        Raises on every rank where one has raised: there its own error, on the others Unsupported.
        """
        error: Exception | None = None
        message = like.new_zeros(like.numel() + 1)
        try:
            self.deadline.check()
            message[:-1] = compute().reshape(-1)
        except Exception as raised:
            error = raised
            message.zero_()
            message[-1] = 1.0 + self.rank
            self.say(raised)
        found = message.to(self.device)
        self._reduce(found)
        failed = float(found[-1])
        self.failed = bool(failed)
        if error is not None:
            raise error
        if failed:
            raise Unsupported(self.about(int(failed) - 1))
        return found[:-1].reshape(like.shape).to(like.device)

    def say(self, error: Exception) -> None:
        """Tell the others what has failed here, where ranks tell each other."""
        if self._tell is not None:
            self._tell(f"{type(error).__name__}: {text_of(error)}")

    def about(self, rank: int) -> str:
        """Which rank has failed, and how where it has said so. (Where several have, their numbers were added.)"""
        why = self._told(rank) if self._told is not None and rank < self.world else ""
        return FAILED_SO.format(rank, why.rstrip(".")) if why else FAILED.format(rank if rank < self.world else "?")

    def _farewells(self) -> str:
        told = self._told
        said = [] if told is None else [(r, told(r)) for r in range(self.world) if r != self.rank]
        return "; ".join(f"rank {r}: {what}" for r, what in said if what)

    def close(self, why: str) -> None:
        """This rank computes nothing more with the others, which see it at once."""
        if not self.lost:
            self.lost, self._group = why, None
            if self._tell is not None:
                self._tell(why)

    def all_succeed(self, compute: Callable[[], object]) -> None:
        """Call `compute()` on every rank; raises on all of them where it raises on one."""

        def tried() -> Tensor:
            compute()
            return torch.zeros(1, dtype=torch.float64, device=self.device)

        self.sum(tried, torch.zeros(1, dtype=torch.float64, device=self.device))

    def rows(self, compute: Callable[[], Tensor], what: str) -> Tensor:
        """The rows of the tensors (n_r, ...) that `compute()` gives, of all ranks, those of rank 0 first.

        Raises on every rank where one has raised, and Unsupported where rows are of unlike kinds or too many.
        """
        found: list[Tensor] = []
        self.all_succeed(lambda: found.append(compute().detach()))
        own = found[0]
        kind = zlib.crc32(repr((own.dtype, tuple(own.shape[1:]))).encode())
        if not self.same(torch.tensor([kind])).all():
            raise Unsupported(UNLIKE_ROWS.format(what))
        sizes = [int(n) for n in self.totals(torch.arange(self.world).eq(self.rank) * len(own))]
        self._refuse_many(own.element_size() * own.shape[1:].numel() * sum(sizes), what)
        longest = max(sizes)
        block = own.new_zeros(longest, *own.shape[1:])
        block[: len(own)] = own
        whole = self.table(block.reshape(-1)).view(self.world, *block.shape)
        return torch.cat([part[:size] for part, size in zip(whole, sizes, strict=True)])

    def _refuse_many(self, size: float, what: str) -> None:
        free = self.least(free_memory(self.device))
        if size > FREE_SHARE_OF_ROWS * free:
            raise Unsupported(ROWS_TOO_LARGE.format(what, size / 1e9, free / 1e9))

    def joined(self, part: Tensor, size: int) -> Tensor:
        """The ranks' parts of a vector of so many entries, one after the other; all but the last are equally
        long."""
        each = -(-size // self.world)
        own = part.new_zeros(each)
        own[: len(part)] = part
        return self.table(own).reshape(-1)[:size]

    def own_block(self, tensor: Tensor, from_first: bool = False) -> Tensor:
        """A copy of a plain tensor; of one that is spread over the ranks this rank's block of it, among zeros.

        from_first: of a plain one, nothing but on rank 0, whose values all ranks will have.
        """
        if not is_spread(tensor):
            return torch.zeros_like(tensor) if from_first and self.rank else tensor.detach().clone()
        part, block = own_part(tensor), block_of(tensor)
        found = torch.zeros(tensor.shape, dtype=part.dtype, device=part.device)
        if block is not None:
            found[block] = part
        return found

    def filled(self, tensor: Tensor, block: Tensor, from_first: bool = False) -> Tensor:
        """All of the tensor, bit for bit, from what `own_block` gave on each rank."""
        if not is_spread(tensor) and not from_first:
            return block
        message = block.to(self.device)
        self._reduce(message.view(torch.uint8) if message.dtype is torch.bool else message)
        return message.to(block.device)

    def _reduce(self, tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = operation
        self._send(lambda: self._group.allreduce([tensor], options))

    def _send(self, begin: Callable[[], Any]) -> None:
        if self.lost:
            raise Unsupported(PARTED.format(self.lost))
        try:
            begin().wait()
        except Exception as error:
            self.lost, self._group = self._farewells() or plain_reason(error), None
            raise Unsupported(PARTED.format(self.lost)) from error
