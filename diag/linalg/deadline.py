"""How long a measurement may take and how much memory it may add: asked between products, batches and examples.

    deadline = Deadline(2.0, memory=1 << 30, why="twice its estimate of 1 s")
    for batch in batches:
        deadline.check()                 # raises Stopped

It is handed on explicitly (a `Snapshot` and its operators carry one), so nothing is shared by two measurements.
One unit of work, such as a forward pass, cannot be interrupted; a check therefore also stops where half of what
the last unit took is more than what is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf

import torch

from diag.errors import Stopped

MEMORY_EVERY = 0.01  # seconds between two looks at the memory, which take some microseconds


class Deadline:
    """A limit of `seconds` and of `memory` bytes, both counted from now; without them it never stops anything.

    why: where the time limit comes from, for the message. reason: the message that a check has raised, if any.
    """

    def __init__(
        self,
        seconds: float = inf,
        memory: float = inf,
        why: str = "",
        clock: Callable[[], float] = time.perf_counter,
        used: Callable[[], float] | None = None,
    ) -> None:
        self._clock, self._used = clock, used_memory if used is None else used
        self.restart(seconds, memory, why)

    def restart(self, seconds: float = inf, memory: float = inf, why: str = "") -> None:
        """Count from now, with other limits: for the next measurement on the same snapshot."""
        self.seconds, self.memory, self.why = seconds, memory, why
        self.reason = ""
        self._began = self._last = self._clock()
        self._looked = -inf
        self._held = self._used() if memory < inf else 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return self._clock() - self._began

    def check(self) -> None:
        """Raise Stopped where the time is up, or where too much memory is held."""
        if self.seconds == inf and self.memory == inf:
            return
        now = self._clock()
        unit, self._last = now - self._last, now
        if now - self._began + unit / 2 > self.seconds:
            self._stop(f"after {_seconds(now - self._began)}; it may take {_seconds(self.seconds)}{self._because}")
        if self.memory < inf and now - self._looked >= MEMORY_EVERY:
            self._looked = now
            added = self._used() - self._held
            if added > self.memory:
                self._stop(
                    f"after {_seconds(now - self._began)}, when it held {added / 2**30:.2f} GiB; it may take "
                    f"{self.memory / 2**30:.2f} GiB of memory"
                )

    @property
    def _because(self) -> str:
        return f", {self.why}" if self.why else ""

    def _stop(self, what: str) -> None:
        self.reason = f"The measurement was stopped {what}."
        raise Stopped(self.reason)


def used_memory() -> float:
    """Bytes that this process holds: of the machine's memory where the system reports that, and of the current
    GPU's."""
    on_device = torch.cuda.memory_allocated() if torch.cuda.is_available() and torch.cuda.is_initialized() else 0
    try:
        with open("/proc/self/statm", "rb") as pages:
            return int(pages.read().split()[1]) * PAGE + on_device
    except (OSError, ValueError, IndexError):
        return on_device


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device, of those that this process may take; infinity where that cannot be told."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return inf
    return min(free, _control_group_memory())


def _control_group_memory() -> float:
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            return int(limit.read()) - int(used.read())
    except (OSError, ValueError):
        return inf


def _page_size() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


PAGE = _page_size()
NEVER = Deadline()
