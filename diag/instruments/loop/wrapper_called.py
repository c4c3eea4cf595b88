"""Does training call the data-parallel wrapper, whose forward pass is what gradients are averaged by?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.errors import counted
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, THRICE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.facts import Loop


@dataclass(frozen=True, kw_only=True, eq=False)
class WrapperCalled(LoopCheck):
    """Training calls that go past the data-parallel wrapper."""


@instrument(
    source=SOURCE,
    title="Data-parallel wrapper",
    kind="check",
    why="Calls past the wrapper leave the ranks' gradients unaveraged: each rank trains a network of its own.",
)
def wrapper_called(loop: Loop) -> WrapperCalled:
    """Whether the calls of training go through DistributedDataParallel, where there is one and several processes.

    The wrapper prepares the averaging of gradients in its own forward pass. Where only the module inside it is
    called, each process steps on the gradient of its own batches and the replicas drift apart.

    Raises nothing of its own.
    """
    w = loop.wrapper
    several = Precondition("several processes", w.processes > 1, "there is one process.")
    wrapped = Precondition("a wrapper", bool(w.kind), "the model is in no DistributedDataParallel.")
    fine = f"{counted(w.calls, 'training call')} went through {w.kind or 'the wrapper'}."
    found = list(_findings(loop)) if w.processes > 1 and w.kind else []
    return judged(WrapperCalled, loop.step, found, fine, preconditions=(several, wrapped))


def _findings(loop: Loop) -> Iterator[LoopFinding]:
    if loop.calls >= THRICE and not loop.wrapper.calls and loop.backwards:
        yield LoopFinding(
            Level.ALARM,
            Cause.GRADIENTS_NOT_REDUCED,
            f"Training calls the module inside {loop.wrapper.kind} and never the wrapper, which so averages no "
            f"gradients: {counted(loop.calls, 'call')} in one of {loop.wrapper.processes:,} processes.",
            "Call the wrapper itself, model(x), not model.module(x).",
            "Gradients that something else averages over the processes before each step.",
            step=1,
        )
