"""The present state of the training as observed: what a measurement is made on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from diag.curvature.carry import Carry
from diag.distributed.together import Together
from diag.errors import MissingQuantity
from diag.linalg.deadline import NEVER, Deadline
from diag.snapshot.batch import Batch, fingerprint
from diag.snapshot.cutting import Cutting
from diag.snapshot.history import History
from diag.snapshot.sharded.whole import is_sharded
from diag.snapshot.snapshot import Snapshot
from diag.snapshot.state.hook_check import HookCheck
from diag.watching.measure.follow import MovedBatches
from diag.watching.measure.probe import Probe
from diag.watching.observe.loop.observer import LoopObserver
from diag.watching.observe.losses import LossObserver
from diag.watching.observe.steps import StepObserver

NO_STEP_YET = (
    "No step has been recorded yet: its numbers are still on their way to this process; it is tried again."
)


class Training:
    """The model, the loss, the probe set and the steps so far.

    model: without wrappers. optimizer: the only one that counts, if the user named one. history(): the record of
    the steps so far. loop: gathers the facts of the loop.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        losses: LossObserver,
        steps: StepObserver,
        held_out: list[Batch] | None,
        history: Callable[[], History | None],
        loop: LoopObserver,
    ) -> None:
        self.model, self.optimizer, self.losses, self.steps = model, optimizer, losses, steps
        self.loop = loop
        self.probe: Probe = losses.probe
        self.copied: tuple[nn.Module, Optimizer | None] | None = None  # a whole copy of a sharded model, for now
        self.calls = self.examples = 0  # of the model in training, and how many examples they had
        self._held_out, self._history = held_out, history
        self._carry, self._hook_check, self._cutting = Carry(), HookCheck(), Cutting()
        self._followed, self._held_out_followed = MovedBatches(model), MovedBatches(model)
        self.fingerprint = ""  # of the probe set

    def called(self, examples: int) -> None:
        """The model was called in training, on so many examples."""
        self.calls += 1
        self.examples += examples
        if self.calls == 1 and not self.probe.batches:
            self._followed.begin()

    @property
    def sharded(self) -> bool:
        """Whether this process alone cannot run the model."""
        return self.copied is None and is_sharded(self.model)

    @property
    def torch_optimizer(self) -> Optimizer | None:
        """The optimizer that counts."""
        return self.optimizer or self.steps.optimizer

    def snapshot(self, max_examples: int | None = None, ranks: Together | None = None) -> Snapshot:
        """The training now, on the probe set, or on its first examples; with a deadline of its own.

        ranks: on the probe sets of all ranks.
        """
        model, optimizer = self.copied or (self.model, self.torch_optimizer)
        snapshot = Snapshot(
            model,
            self.losses.objective,
            self._followed.here(self.probe.batches),
            held_out=self._held_out_for(max_examples),
            previous=self._previous() if self.copied is None else None,
            optimizer=optimizer,
            history=_LazyHistory(self._history),
            loop=self.loop.facts,
            carry=self._carry if max_examples is None and ranks is None and self.copied is None else None,
            max_examples=max_examples,
            deadline=Deadline() if ranks is None else NEVER,
            ranks=ranks or False,
        )
        # The probe set does not change, so it need not be hashed at every measurement.
        if max_examples is None and ranks is None:
            snapshot.__dict__["fingerprint"] = self.fingerprint
        if self.copied is None:
            snapshot.__dict__["hook_check"] = self._hook_check
            snapshot.__dict__["cutting"] = self._cutting
        return snapshot

    def _held_out_for(self, max_examples: int | None) -> list[Batch] | None:
        """The user's held-out data; for checks without any, the rows that the loop is seen to evaluate on."""
        seen = self.loop.evaluated_data.batches if max_examples is not None else None
        held_out = self._held_out or seen
        return held_out and self._held_out_followed.here(held_out)

    @property
    def held_out_seen(self) -> int:
        """How many rows of the loop's evaluation serve as held-out data."""
        seen = None if self._held_out else self.loop.evaluated_data.batches
        return sum(batch.size for batch in seen or ())

    @property
    def held_out_may_come(self) -> bool:
        """Whether there is no held-out data, and the loop may still show some."""
        return self._held_out is None and self.loop.evaluated_data.may_come

    def _previous(self) -> dict[str, Any] | None:
        before = self.steps.before
        if not before:
            return None
        columns = {id(p): c for c, p in enumerate(self.steps.parameters)}
        state = dict(self.model.state_dict())
        for name, p in self.model.named_parameters(remove_duplicate=False):
            if columns.get(id(p)) in before:
                state[name] = before[columns[id(p)]]
        return state

    def describe_probe(self) -> str:
        """What the probe set is, once it is complete; nothing the next time."""
        if self.fingerprint or not self.probe.batches or not self.probe.complete:
            return ""
        self.fingerprint = fingerprint(batch.with_targets(self.model) for batch in self.probe.batches)
        return f"{self.probe.size:,} examples, fingerprint {self.fingerprint}."


class _LazyHistory:
    """The record so far, read only if an instrument looks at it."""

    def __init__(self, history: Callable[[], History | None]) -> None:
        self._history = weakref.WeakMethod(history)  # what a snapshot is kept by must not keep the watch

    def __len__(self) -> int:
        return len(self.steps)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if (known := self.__dict__.get("_record")) is not None:
            return getattr(known, name)  # a method: the fields are here
        read = self._history()
        if read is None:
            raise AttributeError(name)
        history = read()
        if history is None:
            raise MissingQuantity(NO_STEP_YET)
        self.__dict__.update({f: getattr(history, f) for f in history.__dataclass_fields__}, _record=history)
        return getattr(history, name)
