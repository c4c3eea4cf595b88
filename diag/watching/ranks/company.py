"""This rank's watch among the others': they meet at the first step; from then on their numbers are put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from diag.distributed.link import Link
from diag.distributed.meeting import Meeting, announce, initialized, rank_here, signature_of
from diag.distributed.placement import data_apart, placements_of, reads_one_batch
from diag.registry import instruments
from diag.snapshot.loop.ranks import RankFacts
from diag.watching.guard import safely
from diag.watching.observe.learning import Note
from diag.watching.observe.loop.moment import due
from diag.watching.observe.rows import Row, Sharing
from diag.watching.ranks import comparison, shared_rows
from diag.watching.ranks.agreement import Agreement
from diag.watching.ranks.comparison import BatchSums, RankComparison
from diag.watching.ranks.shared_rows import SharedRows

ONLY_RANK_0 = (
    "Of {} ranks only rank 0 is watched ({}): the loss is that of rank 0's examples, the norms of what is sharded "
    "are left out, and the ranks are not compared. Call diag.watch on every rank."
)
ALL_RANKS = "All {} ranks are watched: the loss is the mean over ranks, and norms are those of the whole tensors."


class Company:
    """model: without wrappers. note, info(key, sentence): tell once."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], note: Note, info: Note) -> None:
        self._model, self._parameters = model, dict(parameters)
        self._note, self._info = note, info
        self.rank = rank_here()
        self.batches = BatchSums()
        self.sharing: Sharing | None = None
        self.send: Callable[[], None] | None = None  # sends what waits for the device
        self._link: Link | None = None
        self.agreement: Agreement | None = None
        self._comparison: RankComparison | None = None
        self._met = False
        self.alone = False  # it is known that no other process trains
        self._meeting: Meeting | None = safely(self._announce)

    @property
    def together(self) -> bool:
        """Whether it is watched with the other ranks, or will be."""
        return not self._met or self._link is not None

    @property
    def leads(self) -> bool:
        """Whether this rank records and judges."""
        return self.rank == 0

    def _announce(self) -> Meeting | None:
        if not initialized():
            return None
        return announce(signature_of((n, p.numel()) for n, p in self._parameters.items()))

    # How they meet

    def meet(self) -> None:
        """At the end of the first step."""
        if self._met:
            return
        self._met = self.alone = True
        self._meeting = self._meeting or safely(self._announce)
        if self._meeting is None:
            return
        self.rank = self._meeting.rank
        why = safely(self._meeting.all_here)
        link = None
        if why == "":
            link = Link(self._meeting)
            link.connect(shared_rows.STEP_MESSAGES)
            link.connect(comparison.COMPARISON_MESSAGES)
            why = link.reason
        self._begin(self._meeting.world, None if why != "" else link, why or "they could not be reached")

    def _begin(self, world: int, link: Link | None, why: str) -> None:
        self.alone = False
        placements = placements_of(self._model, self._parameters, world)
        for sentence in dict.fromkeys(p.why for p in placements.values() if p.why):
            self._note(sentence, sentence)
        self._link = link
        parameters = list(self._parameters.values())
        self.sharing = SharedRows(link, list(placements.values()), parameters, self._note)
        if link is None:
            self._note("ranks", ONLY_RANK_0.format(world, why))
            return
        self._info("ranks", ALL_RANKS.format(world))
        self._comparison = RankComparison(link, self._parameters, placements, self._model)
        self.agreement = Agreement(link, list(instruments()), parameters[0].device)

    # What happens

    def called(self, args: Any, kwargs: Any) -> None:
        """The model or its wrapper was called in training."""
        if not self.alone:
            self.batches.called(args, kwargs)

    def loss_called(self, args: Any, kwargs: Any) -> None:
        """A loss was computed in training."""
        if not self.alone:
            self.batches.loss_called(args, kwargs)

    def paused(self) -> None:
        """Something other than a step begins: what is ready is sent, for the others may go on before this rank."""
        if self.send is not None and self._link is not None:
            self.send()

    def step_ended(self, row: Row, optimizers: Sequence[Optimizer]) -> bool:
        """A step is over and about to be recorded; whether the facts have something new."""
        step = self.batches.step
        batch = self.batches.ended()
        if self._comparison is None or self._link is None:
            return False
        try:
            if due(step):
                self._comparison.look(step, row, optimizers, batch)
            return self._comparison.take_up()
        except Exception as error:
            self._link.broke(error)  # the others would wait for this rank's part
            raise

    def facts(self) -> RankFacts:
        """What is known of the ranks."""
        if self._comparison is None:
            return RankFacts()
        found, model = self._comparison.facts(), self._model
        return dataclasses.replace(
            found, data_apart=data_apart(model), one_batch=reads_one_batch(model, found.world)
        )

    def leave(self, why: str) -> None:
        """This rank's watch ends."""
        if self._comparison is not None:
            safely(self._comparison.take_up)
        if self._link is not None:
            self._link.leave(why)


def hold_whole(parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether each parameter is held whole by this process."""
    return not any(hasattr(p, "placements") for p in parameters.values())
