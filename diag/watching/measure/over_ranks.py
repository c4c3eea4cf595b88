"""What the ranks of a training measure together, or on a model that only all of them have whole.

Curvature is measured on the probe sets of all ranks at once. A sharded model is put together for the time of a
measurement: every rank gets a whole copy, and rank 0 measures on it what needs its own probe set alone. The steps
at which the ranks ask each other are the scheduled ones and those of the checks, which all of them know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diag.distributed.together import Together
from diag.errors import DiagError, text_of
from diag.linalg.deadline import Deadline, free_memory
from diag.registry import is_put_together, requires
from diag.result import Failed, Outcome
from diag.snapshot.sharded.whole import refuse_another_function, whole_copy, whole_optimizer
from diag.snapshot.snapshot import Snapshot
from diag.watching.measure.floor import next_floor
from diag.watching.measure.measuring import FAILURES, Measurements
from diag.watching.measure.schedule import next_due
from diag.watching.measure.training import Training
from diag.watching.ranks.agreement import Agreed, Agreement

NOT_NOW = Agreed(False, {})
NOT_TOGETHER = "The ranks measure nothing together any more ({}); what one rank can measure alone is rank 0's."
NOT_WHOLE = "The sharded parameters could not be put together, so that nothing is measured on them: {}"
ON_ALL_RANKS = "{} is measured on the probe sets of all {} ranks."


class OverRanks:
    """The part of the measurements that all ranks enter. note, info(key, sentence): report once."""

    def __init__(
        self,
        training: Training,
        measurements: Measurements,
        every: int | None,
        note: Callable[[str, str], None],
        info: Callable[[str, str], None],
        last_step: int = 0,
    ) -> None:
        self._training, self._measurements, self._every = training, measurements, every
        self._note, self._info = note, info
        chosen = measurements.chosen.items()
        self._able = [name for name, i in chosen if requires(i, "hessian") and is_put_together(i)]
        self._before, self._next, self._refused = last_step, 1, ""
        self.agreement: Agreement | None = None  # once the ranks have met
        self.measured: set[str] = set()
        self._failures: dict[str, int] = {}

    def able(self, name: str) -> bool:
        """Whether this is measured over all ranks."""
        return name in self._able and self.holds

    @property
    def holds(self) -> bool:
        """Whether the ranks can measure together."""
        return self.agreement is not None and self.agreement.holds and not self._refused

    def due(self, step: int) -> bool:
        """Whether the ranks ask each other after this step; the same on all of them."""
        step -= self._before  # a run that goes on is numbered from its last step by rank 0 alone
        if self.agreement is None or step < self._next:
            return False
        self._next = min(next_floor(step), next_due(step, self._every))
        return self.holds and bool(self._able or self._training.sharded)

    @property
    def apart(self) -> bool:
        """Whether the ranks' models may differ in their buffers, as running means do until they are sent."""
        return any(True for _ in self._training.model.buffers())

    def settle(self, ready: bool, proposal: Agreed = NOT_NOW) -> Agreed | None:
        """What all ranks do now; None for nothing."""
        assert self.agreement is not None
        agreed = self.agreement.settle(ready, proposal)
        if self.agreement.reason:
            self._note("measuring together", NOT_TOGETHER.format(self.agreement.reason))
        return agreed

    @contextmanager
    def whole(self, gather: bool) -> Iterator[bool]:
        """Inside the context the training is that of a whole copy, if asked; whether it could be had."""
        if not gather:
            yield True
            return
        done = self._gathered()
        try:
            yield done
        finally:
            self._training.copied = None

    def _gathered(self) -> bool:
        failed = ""
        try:
            self._gather()
        except DiagError as error:
            self._refused = "" if self._lost else str(error)
            self._note("whole copy", NOT_WHOLE.format(error))
        except Exception as error:
            failed = f"{type(error).__name__}: {text_of(error)}"
        return self._go_on(failed) and self._training.copied is not None

    def _gather(self) -> None:
        training, together = self._training, self._together
        assert together is not None
        device = next(training.model.parameters()).device
        copied = whole_copy(training.model, together, free_memory(device), first_buffers=True)
        refuse_another_function(training.model, copied.model, training.probe.batches[0], together)
        live = training.torch_optimizer
        optimizer = None if live is None else whole_optimizer(live, copied.tensors, together)
        training.copied = (copied.model, optimizer)

    @property
    def _together(self) -> Together | None:
        return self.agreement.together if self.agreement is not None else None

    @property
    def _lost(self) -> str:
        return self._together.lost if self._together is not None else ""

    def _go_on(self, failed: str) -> bool:
        return self.agreement is not None and self.agreement.ended(failed)

    def lead(self, agreed: Agreed, step: int) -> float:
        """Rank 0's part in what is measured over all ranks; gives the time taken in seconds."""
        seconds = 0.0
        for name in agreed.limits:
            together = self._together
            if together is None:
                break
            together.deadline = Deadline()
            self._info(f"ranks of {name}", ON_ALL_RANKS.format(name, together.world))
            seconds += self._measurements.run([name], step, self._training.snapshot(ranks=together))
            self.measured.add(name)
            if together.failed or together.lost:
                self._try_again(name, step)
            if not self._go_on(self._broke_off(self._measurements.last_outcome)):
                break
        return seconds

    def _try_again(self, name: str, step: int) -> None:
        """A rank could not compute its share, which says nothing of the next time."""
        self._failures[name] = self._failures.get(name, 0) + 1
        if self._failures[name] < FAILURES:
            self._measurements.schedule.postpone(name, 2 * step)

    def follow(self, agreed: Agreed) -> None:
        """Another rank's part."""
        with self.whole(agreed.gather) as done:
            for name in agreed.limits if done else ():
                together = self._together
                if together is None:
                    break
                snapshot: Snapshot = self._training.snapshot(ranks=together)
                if not self._go_on(self._broke_off(self._measurements.attempted(name, snapshot))):
                    break

    def _broke_off(self, outcome: Outcome | None) -> str:
        """Why this rank stopped where the others did not; "" where they all did alike, as they do by design."""
        together = self._together
        alike = together is None or together.failed
        return outcome.reason if isinstance(outcome, Failed) and outcome.traceback and not alike else ""
