"""Optimizer steps as they happen: which rounds they make, and where the parameters went.

A row of the record is one round (see `rounds`). Where a step is given a closure, the gradients
are those of the closure's first evaluation, at the parameters before the step.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from diag.display import format_share
from diag.snapshot.optimizer import described_optimizer
from diag.snapshot.state.modes import unseen
from diag.watching.guard import safely
from diag.watching.measure.schedule import Regular, Thinning
from diag.watching.observe.direction import Directions
from diag.watching.observe.gradients import GradientNorms, StepMembers
from diag.watching.observe.learning import Note
from diag.watching.observe.losses import LossObserver
from diag.watching.observe.norms import NORM_BLOCK, copies, differences, norms
from diag.watching.observe.rounds import Rounds
from diag.watching.observe.rows import Row

# Reading the gradients at every step is worth this share of its time, and in any case so many seconds.
READING_SHARE, READING_FREE = 0.003, 5e-5
SHARDED_EVERY = 10  # steps between the parameter norms of sharded parameters
THINNED = (
    "Reading the gradients of {:,} parameter tensors takes more than {} of a step, so their norms are recorded "
    "at some of the steps only; the loss is recorded at every one."
)
TOLD = (
    "The steps of an optimizer are seen, so watcher.step() is not needed; calls of it make no step of the record."
)
FOREIGN = (
    "The optimizer also steps parameters that were not trainable parameters of the model when the watch began; "
    "they are not recorded."
)


class Followed(NamedTuple):
    """How the parameters are followed: up to a share of the time, by this rank or not, whole or sharded."""

    share: float
    by_this_rank: bool = True
    whole: bool = True

    @property
    def any(self) -> bool:
        """Whether this rank looks at parameters: all must where they are sharded, else rank 0 does."""
        return self.by_this_rank or not self.whole

    def thinning(self) -> Thinning | Regular:
        """At which steps; where they are sharded, at the same on all ranks."""
        return Thinning(self.share) if self.whole else Regular(SHARDED_EVERY)

    def reading(self) -> Thinning | Regular:
        """At which steps gradients are read."""
        return Thinning(READING_SHARE, free=READING_FREE) if self.whole else Regular(1)


class StepObserver:
    """Makes a `Row` of every optimizer step that concerns the watched parameters.

    finished(row, in_step): a row is complete; in_step says that nothing of the training loop is half done.
    clock(): seconds since training began. broke(error): something of ours failed inside a step.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        losses: LossObserver,
        finished: Callable[[Row, bool], None],
        clock: Callable[[], float],
        note: Note,
        followed: Followed,
        broke: Callable[[Exception], None] | None = None,
    ) -> None:
        self.parameters = list(parameters.values())
        self._index = {id(p): i for i, p in enumerate(self.parameters)}
        self._losses, self._finished, self._clock, self._note = losses, finished, clock, note
        self.broke = broke
        self.gradients = GradientNorms(self.parameters, self._index, note)
        self._follows = followed.any
        self.start = self._start_copies() if followed.any else []
        self.thinning, self.reading = followed.thinning(), followed.reading()
        self.before: dict[int, Tensor] = {}
        self.directions, self._by_closure = Directions(), False
        self.keep_before = False
        self._buffers: dict[int, Tensor] = {}
        self._scratch = torch.empty(NORM_BLOCK, dtype=torch.float32)
        self.optimizer: Optimizer | None = None
        self.steps = 0
        self._members: weakref.WeakKeyDictionary[Optimizer, tuple[int, StepMembers]] = weakref.WeakKeyDictionary()
        self._last: tuple[weakref.ref[Optimizer], int, StepMembers | None] | None = None  # asked for
        self._known: weakref.WeakKeyDictionary[Optimizer, None] = weakref.WeakKeyDictionary()
        self._row: Row | None = None
        self._rounds = Rounds()
        self._covered: set[int] = set()
        self._taken = self._inside_backward = self._thinned = False
        self._cost = self._now = 0.0  # seconds: that parameters have taken; after the start, as the step began
        self._fired: set[int] = set()
        self._described = 0
        self._opened: weakref.ref[Optimizer] | None = None  # the optimizer that stepped last

    def _start_copies(self) -> list[Tensor]:
        # The copy for the distance from the start must not take the memory that training needs.
        away = any(p.device.type != "cpu" for p in self.parameters)
        return copies(self.parameters, torch.device("cpu") if away else None)

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that have stepped, in the order of their first steps."""
        return list(self._known)

    # Steps

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """An optimizer is about to step; gives its changed arguments where it has a closure."""
        members = self.members(optimizer)
        if members is None:
            return None
        self._fired.add(id(optimizer))
        if (self._rounds.stepped or self._rounds.closed) and not self._begins(optimizer):
            return None
        row = self._open(optimizer)
        fresh = self._not_stepped_yet(members) if self._covered else members
        if self._taken or self.keep_before:
            self._remember(fresh)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        self._by_closure = callable(closure)
        if not self._by_closure:
            self.gradients.read(row, optimizer, fresh)
            return None
        wrapped = self._first_evaluation(closure, row, optimizer, fresh)
        return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"closure": wrapped})

    def after_step(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""
        members = self.members(optimizer)
        if members is None or self._row is None:
            return
        if (found_inf := getattr(optimizer, "found_inf", None)) is not None:
            self._row.skipped = found_inf.detach().clone()
        if self._taken:
            self._measure_parameters(self._row, members, optimizer)
        self._close_round(optimizer, members)

    def told(self) -> None:
        """The loop reports that it has made a step, without an optimizer of torch's."""
        if len(self._known):
            self._note("told", TOLD)
            return
        everyone = self.gradients.everyone
        self._row = row = Row()
        self._now = self._clock()
        self._taken = bool(self.before)
        self.gradients.read(row, None, everyone)
        self._measure_parameters(row, everyone)
        self.finish(in_step=True)
        # The next step is compared with what the parameters are now.
        self._taken = self._follows and self.thinning.take(self.steps + 1, self._now)
        if self._taken or self.keep_before:
            self._remember(everyone)

    def scaler_stepping(self, optimizer: Optimizer) -> None:
        """A GradScaler is about to step an optimizer, or to leave the step out."""
        self._fired.discard(id(optimizer))

    def scaler_stepped(self, optimizer: Optimizer) -> None:
        """It has done so; where the optimizer did not step, the step was left out."""
        members = self.members(optimizer)
        if members is None or id(optimizer) in self._fired:
            return
        if not self._begins(optimizer):
            return
        row = self._open(optimizer)
        row.skipped = True
        self.gradients.read(row, optimizer, self._not_stepped_yet(members) if self._covered else members)
        self._close_round(optimizer, members)

    def unscaling(self, optimizer: Optimizer, scaler: Any) -> None:
        """A GradScaler is about to divide an optimizer's gradients by its scale."""
        members = self.members(optimizer)
        if members is not None:
            self.gradients.unscaling(members, scaler)

    def backward_begins(self) -> None:
        """A backward pass begins."""
        self._rounds.gone_on()

    def backward_done(self) -> None:
        """A backward pass has ended; what was stepped inside it makes a row."""
        if self._inside_backward:
            self._inside_backward = False
            self.finish(in_step=True)

    def training_pass(self) -> None:
        """The model was called in training: a round of several optimizers is over."""
        if self._rounds.stepped:
            self.finish(in_step=False)
        self._rounds.gone_on()

    def finish(self, in_step: bool) -> None:
        """Hand over the open row, if any."""
        row, self._row = self._row, None
        if row is None:
            return
        row.losses = self._losses.take()
        self._rounds.close()
        self._covered = set()
        self.steps += 1
        if self._taken:
            self.thinning.spent(self._cost)
        self._read_next()
        self._finished(row, in_step)
        self.before, self._taken, self._cost = {}, False, 0.0

    def _read_next(self) -> None:
        """Whether the gradients of the next step are read: at every one, unless that takes too much of its time."""
        if self.gradients.active:
            self.reading.spent(self.gradients.cost)
            self.gradients.forget()
        self.gradients.active = self.reading.take(self.steps + 1, self._now)
        if not (self.gradients.active or self._thinned):
            self._thinned = True
            self._note("gradient norms", THINNED.format(len(self.parameters), format_share(READING_SHARE)))

    def members(self, optimizer: Optimizer) -> StepMembers | None:
        """The watched parameters that the optimizer holds; None where it holds none."""
        groups = optimizer.param_groups
        count = len(groups[0]["params"]) if len(groups) == 1 else sum(len(group["params"]) for group in groups)
        if self._last is not None and self._last[0]() is optimizer and self._last[1] == count:
            return self._last[2]
        known = self._members.get(optimizer)
        if known is None or known[0] != count:
            known = self._members[optimizer] = (count, self._members_of(optimizer))
        found = known[1] if len(known[1].columns) else None
        self._last = (weakref.ref(optimizer), count, found)
        return found

    def _members_of(self, optimizer: Optimizer) -> StepMembers:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        columns = sorted({self._index[id(p)] for p in held if id(p) in self._index})
        if columns and len(columns) < len({id(p) for p in held}):
            self._note("parameters", FOREIGN)
        return StepMembers(numpy.array(columns, numpy.intp), tuple(self.parameters[c] for c in columns))

    def _not_stepped_yet(self, members: StepMembers) -> StepMembers:
        """Those that no other optimizer has stepped in this round."""
        columns = [c for c in members.columns.tolist() if c not in self._covered]
        return StepMembers(numpy.array(columns, numpy.intp), tuple(self.parameters[c] for c in columns))

    def _begins(self, optimizer: Optimizer) -> bool:
        """Whether its step belongs to the open row or to a new one, and not to one that has been handed over."""
        if self._rounds.is_again(id(optimizer)):
            self.finish(in_step=False)
        return not self._rounds.is_late(id(optimizer))

    def _open(self, optimizer: Optimizer) -> Row:
        if self._row is None:
            rate = optimizer.param_groups[0].get("lr", numpy.nan)
            self._row = Row(learning_rate=rate)
            self._now = self._clock()
            self._taken = self._follows and self.thinning.take(self.steps + 1, self._now)
        if self._opened is None or self._opened() is not optimizer:
            self._opened = weakref.ref(optimizer)
            self._meet(optimizer, self._row)
        return self._row

    def _meet(self, optimizer: Optimizer, row: Row) -> None:
        """Another optimizer than the last one steps, perhaps for the first time."""
        if optimizer not in self._known:
            self._known[optimizer] = None
        if self._described != len(self._known):
            self._described = len(self._known)
            row.optimizer = _described(self._known)
        self.optimizer = self.optimizer if self.optimizer is not None else optimizer

    def _close_round(self, optimizer: Optimizer, members: StepMembers) -> None:
        alone = len(members.columns) >= len(self.parameters)
        if not alone:
            self._covered.update(members.columns.tolist())
        everything = alone or len(self._covered) >= len(self.parameters)
        complete = self._rounds.is_complete(id(optimizer), everything)
        if alone and not complete:
            self._covered.update(members.columns.tolist())
        # Inside a backward pass (one optimizer for each parameter) the loss is not known yet.
        self._inside_backward = torch._C._current_graph_task_id() != -1
        if complete and not self._inside_backward:
            self.finish(in_step=True)

    def _first_evaluation(self, closure: Any, row: Row, optimizer: Optimizer, members: StepMembers) -> Any:
        first = True

        def wrapped() -> Any:
            nonlocal first
            value = closure()
            if first:
                first = False
                safely(self._evaluated, row, optimizer, members, broke=self.broke)
            return value

        return wrapped

    def _evaluated(self, row: Row, optimizer: Optimizer, members: StepMembers) -> None:
        with unseen():
            self.gradients.read(row, optimizer, members)
        self._losses.freeze()

    # Parameters

    def _remember(self, members: StepMembers) -> None:
        began = time.perf_counter()
        for c, p in zip(members.columns.tolist(), members.parameters, strict=True):
            kept = self._buffers.get(c)
            if kept is None:
                (kept,) = copies([p])
            else:
                kept.copy_(p.detach())
            self.before[c] = kept
            if _is_reusable(p):  # touching fresh memory costs several times what copying does
                self._buffers[c] = kept
        self._cost += time.perf_counter() - began

    def _measure_parameters(self, row: Row, members: StepMembers, optimizer: Any = None) -> None:
        if not self._taken or any(c not in self.before for c in members.columns.tolist()):
            return
        began = time.perf_counter()
        columns, now = members.columns, members.parameters
        row.norms.append(("parameter_norm", columns, norms(now)))
        row.norms.append(
            ("update_norm", columns, differences(now, [self.before[c] for c in columns.tolist()], self._scratch))
        )
        row.norms.append(
            ("distance", columns, differences(now, [self.start[c] for c in columns.tolist()], self._scratch))
        )
        if optimizer is not None and not self._by_closure:  # a closure leaves the gradient of another point
            self.directions.stepped(now, [self.before[c] for c in columns.tolist()], optimizer)
        self._cost += time.perf_counter() - began


def _is_reusable(p: Tensor) -> bool:
    return p.is_cpu and p.layout is torch.strided and not hasattr(p, "to_local")


def _described(optimizers: Iterable[Optimizer]) -> dict[str, Any]:
    states = [described_optimizer(o) for o in optimizers]
    groups: Sequence[Any] = [g for s in states for g in s.groups]
    first = dict(groups[0]) if groups else {}
    return first | {"kind": " and ".join(dict.fromkeys(s.kind for s in states)), "groups": tuple(groups)}
