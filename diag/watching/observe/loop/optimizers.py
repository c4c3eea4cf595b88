"""The optimizers of a process, as far as they concern the model: what they hold and what their steps are taken
on."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from diag.snapshot.loop.steps import OptimizerFacts, Tally
from diag.snapshot.optimizer import HYPERPARAMETERS
from diag.watching.hooks.model_hook import instances_of
from diag.watching.observe.loop.moment import Counter, Moment
from diag.watching.observe.loop.zeroing import Gradients, Watched, mark_of

MOST_OPTIMIZERS = 64  # optimizers that are followed
TIMES_IN_A_ROW = 2  # times in a row
NEVER_STEPPED = 10  # gradients zeroed unused: two networks against each other take turns of five steps and less


class OptimizerRecord:
    """One optimizer and its steps."""

    def __init__(self, optimizer: Optimizer, kind: str) -> None:
        self.reference = weakref.ref(optimizer)
        self.kind = kind
        self.size = -1
        self.looked, self.due = 0, 1  # of its steps; the next at which everything is looked at
        self.swept = self.just_swept = False  # the step under way, the one just taken, is one of them
        self.held: list[nn.Parameter] = []
        self.foreign: list[Tensor] = []
        self.watched: list[Watched] = []
        self.nested = self.stateful = self.no_state = False
        self.steps = self.first_step = self.last_step = 0
        self.passes = self.passes_lost = 0
        self.unzeroed, self.empty, self.zeroed_before, self.before_backward = (Counter() for _ in range(4))
        self.repeated, self.doubled, self.lost, self.scaled, self.late = (Counter() for _ in range(5))
        self.partly, self.idle = Counter(), Counter()
        self.unused: tuple[str, ...] = ()
        self.kept: tuple[str, ...] = ()
        self.may_be_late = self.by_closure = False
        self.stale: tuple[str, ...] = ()
        self.stale_gradients: set[str] = set()
        self.marks: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.groups: tuple[Mapping[str, Any], ...] = ()
        self.attributes = -1  # how many the object had at its first step
        self.set_beside: tuple[str, ...] = ()
        self.made_with: tuple[Mapping[str, Any], ...] = ()

    def read_groups(self) -> None:
        """Keep the hyperparameters as they are now; what is not on the host is left out."""
        optimizer = self.reference()
        if optimizer is not None:
            self.groups = tuple(
                {k: plain_number(g[k]) for k in HYPERPARAMETERS if k in g and plain_number(g[k]) is not None}
                for g in optimizer.param_groups
            )


class Optimizers:
    """All optimizers that were seen to step, zero or be scheduled.

    names: of the model's parameters by id, kept up to date by the sweep over the model.
    """

    def __init__(self, moment: Moment, gradients: Gradients, names: dict[int, str], resumed: bool) -> None:
        self._moment, self._gradients, self._names, self._resumed = moment, gradients, names, resumed
        self.records: list[OptimizerRecord] = []
        self._by_id: dict[int, OptimizerRecord] = {}
        self._inside: list[Optimizer] = []
        self._searched = self.called = False
        self.unusual = False  # steps are made of other steps or of closures, so that every one must be looked at
        self.adversarial = False  # the inputs ask for a gradient: backward passes are made for them

    def record(self, optimizer: Any) -> OptimizerRecord | None:
        """What is known of it; of a wrapper (Accelerate's) that of the optimizer inside."""
        known = self._by_id.get(id(optimizer))
        if known is not None and known.reference() is optimizer:
            return known
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(optimizer, Optimizer) or (
            isinstance(inner, Optimizer)
            and getattr(optimizer, "param_groups", None) is getattr(inner, "param_groups", ())
        ):
            return self.record(inner) if isinstance(inner, Optimizer) else None
        if len(self.records) >= MOST_OPTIMIZERS:
            return None
        known = OptimizerRecord(optimizer, type(optimizer).__name__)
        self.records.append(known)
        self._by_id[id(optimizer)] = known
        self.refresh(known, optimizer)
        return known

    def refresh(self, record: OptimizerRecord, optimizer: Optimizer) -> None:
        """Read again what it holds."""
        held = [p for group in optimizer.param_groups for p in group["params"]]
        record.size = len(held)
        record.held = [p for p in held if id(p) in self._names]
        record.foreign = [p for p in held if id(p) not in self._names]
        record.watched = self._gradients.of(record.held)
        record.read_groups()

    def search(self) -> None:
        """Look once for the optimizers that exist and have done nothing yet."""
        if self._searched:
            return
        self._searched = True
        for found in instances_of(Optimizer):
            self.record(found)

    # Steps

    def before_step(self, optimizer: Optimizer, closure: bool) -> OptimizerRecord | None:
        """It is about to step; its record where the step counts by itself."""
        record = self.record(optimizer)
        if optimizer in self._inside:  # an exception left its last step
            self._inside = []
        self._inside.append(optimizer)
        if record is None:
            return None
        if len(self._inside) > 1:
            record.nested = self.unusual = True
            return None
        self.unusual |= closure
        record.by_closure = closure
        if record.size != sum(len(g["params"]) for g in optimizer.param_groups):
            self.refresh(record, optimizer)
        if len(vars(optimizer)) > record.attributes >= 0:
            self._set_beside(record, optimizer)
        if record.steps == 0:
            record.attributes = len(vars(optimizer))
            record.read_groups()
            record.made_with = record.groups
            record.no_state = self._resumed and not optimizer.state and bool(record.held)
        if record.held and not closure:
            record.looked += 1
            record.may_be_late = self.called
            self._judge(record)
        return record

    def _set_beside(self, record: OptimizerRecord, optimizer: Optimizer) -> None:
        """The object has got an attribute since its first step; of torch's own classes none is read."""
        record.attributes = len(vars(optimizer))
        found = tuple(k for k in vars(optimizer) if k in HYPERPARAMETERS)
        if type(optimizer).__module__.startswith("torch.optim") and found:
            record.set_beside = found
            self._moment.news(("set beside", id(record)), "optimizers")

    def after_step(self, optimizer: Optimizer) -> OptimizerRecord | None:
        """It has stepped; its record where the step counts by itself."""
        if self._inside and (self._inside.pop() is not optimizer or self._inside):
            return None
        record = self._by_id.get(id(optimizer))
        if record is None or record.nested:
            return None
        step, record.just_swept, record.swept = self._moment.step, record.swept, False
        record.steps += 1
        record.first_step, record.last_step = record.first_step or step, step
        if not self._moment.attentive:
            return record
        if record.steps == 1:
            record.stateful = bool(optimizer.state) and any(optimizer.state.values())
        if record.by_closure and record.steps > 1:
            # Its backward passes came inside the step: the gradient holds earlier ones where it was never reset,
            # and within the step before, too, each added to the last.
            kept = [w for w in record.watched if w.reached]
            older = bool(kept) and all(w.fresh > w.reached and not w.was_zero() for w in kept)
            self._count(record.unzeroed, step - 1, older, "not zeroed", record)
        for w in record.watched:
            w.stepped(id(record))
        self.used()
        if record.just_swept:
            # An id may be used again by the next gradient; a weak reference tells the two apart.
            record.marks = {
                id(p): (weakref.ref(p.grad), p.grad._version) for p in record.held if p.grad is not None
            }
        if record.steps <= 3:
            self._moment.news(("stepped", id(record), record.steps), "optimizers")
        return record

    def zeroed(self) -> None:
        """Gradients were zeroed: do some of them belong to an optimizer that has never stepped?"""
        idle = [r for r in self.records if r.held and not r.steps and not r.nested]
        if not idle or not any(r.steps for r in self.records):
            return
        stepped = {id(p) for r in self.records if r.steps for p in r.held}
        for record in idle:
            alone = [w for w in record.watched if id(w.parameter) not in stepped]
            gone = [w for w in alone if w.wasted()]
            if gone and record.idle.hit(self._moment.step) == NEVER_STEPPED:
                record.unused = tuple(self._names.get(id(w.parameter), "") for w in gone)
                self._moment.news(("idle", id(record)), "optimizers")

    def forward_called(self) -> None:
        """The model was called in training: no earlier call's backward pass is still to come."""
        self.called = True
        for record in self.records:
            if record.may_be_late:
                record.may_be_late = False
                record.late.miss()

    def backward_called(self) -> None:
        """A backward pass begins: a step since the call that it belongs to came too early."""
        self.called = False
        for record in self.records:
            if record.may_be_late:
                record.may_be_late = False
                self._count(record.late, record.last_step, True, "late", record)

    def begin(self) -> None:
        """A stretch of steps that are looked at closely begins."""
        self._inside, self.called = [], False
        for w in self._gradients.watched:
            w.begin()
        for record in self.records:
            record.may_be_late, record.marks = False, {}

    def used(self) -> None:
        """A step has made use of all backward passes so far, whichever parameters they reached."""
        for w in self._gradients.watched:
            w.unused = 0

    @property
    def inside(self) -> bool:
        """Whether an optimizer is stepping."""
        return bool(self._inside)

    def _judge(self, record: OptimizerRecord) -> None:
        watched = [w for w in record.watched if w.parameter.requires_grad]
        step = self._moment.step
        if not watched or any(w.assigned() for w in watched):
            return
        present = [w for w in watched if w.parameter.grad is not None]
        if not present:
            self._count(record.empty, step, True, "empty", record)
        if not any(w.reached for w in watched):
            self._without_backward(record, present, watched)
            return
        gone = not any(w.fresh for w in watched)
        called = record.may_be_late  # the model was called since: the backward pass is still to come
        self._count(record.before_backward, step, gone and called, "before backward", record)
        self._count(record.zeroed_before, step, gone and not called, "zeroed before", record)
        if gone:
            return
        if record.steps:
            self._kept(record, present)
        self._lost(record, watched)
        record.passes = max(w.fresh for w in watched)
        self._stale(record)

    def _without_backward(
        self, record: OptimizerRecord, present: Sequence[Watched], watched: Sequence[Watched]
    ) -> None:
        step = self._moment.step
        if not present:
            called = record.may_be_late
            self._count(record.before_backward, step, called, "before backward", record)
            return
        same = all(w.fresh and mark_of(w.parameter) == w.mark for w in present)
        if not same or not any(w.stepper for w in present):
            return
        mine = all(w.stepper == id(record) for w in present)
        self._count(record.repeated if mine else record.doubled, step, True, "used again", record)

    def _kept(self, record: OptimizerRecord, present: Sequence[Watched]) -> None:
        kept = all(w.kept for w in present) and not any(w.was_zero() for w in present)
        self._count(record.unzeroed, self._moment.step, kept, "not zeroed", record)
        some = [] if kept else [w for w in present if w.kept and w.reached and not w.was_zero()]
        self._count(record.partly, self._moment.step, bool(some), "partly zeroed", record)
        if some:
            record.kept = tuple(self._names.get(id(w.parameter), "") for w in some)

    def _lost(self, record: OptimizerRecord, watched: Sequence[Watched]) -> None:
        lost = max(w.thrown for w in watched)
        if self.adversarial:
            lost = 0
        if lost:
            record.passes_lost = lost
        self._count(record.lost, self._moment.step, lost > 0, "lost", record)

    def _stale(self, record: OptimizerRecord) -> None:
        """Gradients that neither a zeroing nor a backward pass has touched since the step before."""
        if not record.marks:
            return
        marks, record.marks = record.marks, {}
        same = [p for p in record.held if p.grad is not None and _is_at(marks.get(id(p)), p.grad)]
        if same and len(same) < len(record.held):
            names = {self._names[id(p)] for p in same if id(p) in self._names}
            known = record.stale_gradients & names if record.stale_gradients else names
            if record.stale_gradients and known:
                self._moment.news(("stale gradients", id(record)), "optimizers")
            record.stale_gradients = names

    def _count(self, counter: Counter, step: int, happened: bool, kind: str, record: OptimizerRecord) -> None:
        if not happened:
            counter.miss()
        elif counter.hit(step) in (TIMES_IN_A_ROW, TIMES_IN_A_ROW + 1) or counter.times == TIMES_IN_A_ROW:
            self._moment.news((kind, id(record), counter.running), "optimizers")

    # Facts

    def facts(self) -> tuple[OptimizerFacts, ...]:
        """Each of them as plain data."""
        return tuple(self._facts(r) for r in self.records)

    def _facts(self, r: OptimizerRecord) -> OptimizerFacts:
        r.read_groups()
        unzeroed = Counter() if any(w.was_zero(wait=True) for w in r.watched) else r.unzeroed
        return OptimizerFacts(
            kind=r.kind,
            groups=r.groups,
            made_with=r.made_with,
            held=tuple(dict.fromkeys(self._names[id(p)] for p in r.held if id(p) in self._names)),
            foreign=len(r.foreign),
            stale=r.stale,
            nested=r.nested,
            by_closure=r.by_closure,
            stateful=r.stateful,
            steps=r.steps,
            looked=r.looked,
            first_step=r.first_step,
            last_step=r.last_step,
            unzeroed=unzeroed.tally(),
            empty=r.empty.tally(),
            zeroed_before=r.zeroed_before.tally(),
            before_backward=r.before_backward.tally(),
            repeated=r.repeated.tally(),
            doubled=r.doubled.tally(),
            lost=r.lost.tally(),
            passes_lost=r.passes_lost,
            passes=r.passes,
            scaled=r.scaled.tally(),
            late=r.late.tally(),
            partly_zeroed=r.partly.tally(),
            not_zeroed=r.kept,
            stale_gradients=tuple(sorted(r.stale_gradients)),
            no_state=r.no_state,
            set_beside=r.set_beside,
            idle=Tally() if r.steps else r.idle.tally(),
            unused=r.unused,
        )


def _is_at(mark: tuple[weakref.ref[Tensor], int] | None, gradient: Tensor) -> bool:
    return mark is not None and mark[0]() is gradient and mark[1] == gradient._version


def plain_number(value: Any) -> Any:
    """A number, or a tuple of numbers, that is on the host; else None."""
    if isinstance(value, Tensor):
        return value.item() if value.device.type == "cpu" and value.numel() == 1 else None
    if isinstance(value, (tuple, list)):
        return tuple(plain_number(v) for v in value)
    return value if isinstance(value, (bool, int, float, str)) else None
