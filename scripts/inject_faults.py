#!/usr/bin/env python3
"""Watched trainings on two processes, each with one fault on a random rank: none may hang.

    scripts/inject_faults.py                          # 200 runs, some seconds each
    scripts/inject_faults.py --first 40 --runs 20     # runs 40 to 59; a run's number decides all of it

The faults: the loop raises, the process ends without a word or is killed, a rank sleeps longer than the watch waits
or than the process group does, and in a measurement: no memory, a sleep, an end, an error of another kind. A run
hangs if its processes have not ended `LIMIT` seconds after it began. Then, and where the record of rank 0 cannot be
opened, the exit status is 1.
"""

import argparse
import atexit
import contextlib
import datetime
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PYTHON = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "python"
WORLD, STEPS = 2, 8
GROUP, WATCH = 6.0, 3.0  # seconds after which the process group gives up, and the watch's own messages
LIMIT = 60.0
KINDS = ("raises", "exits", "killed", "sleeps", "sleeps long")
INSIDE = ("no memory", "sleeps", "exits", "raises")
WAYS = ("ddp", "fsdp")
INSTRUMENTS: dict[str, dict[str, Any]] = {
    "replicas_equal": {},
    "ranks_data": {},
    "softmax_collapse": {},
    "hessian_spectrum": {"num_eigenvalues": 2, "steps": 6, "trace_probes": 2, "half_split": False},
}


@dataclass(frozen=True)
class Fault:
    """One run's fault. inside: in a measurement, at its `call`-th derivative; else before the optimizer's
    `step`."""

    run: int
    kind: str
    inside: bool
    rank: int
    step: int
    call: int
    way: str
    in_block: bool  # whether the watch is closed by a with block, or by the process's end

    @classmethod
    def of(cls, run: int) -> "Fault":
        """The fault of the run of this number."""
        draw = random.Random(run)
        inside = draw.random() < 0.5
        kind = draw.choice(INSIDE if inside else KINDS)
        rank, step, call = draw.randrange(WORLD), draw.randint(1, STEPS), draw.randint(1, 60)
        return cls(run, kind, inside, rank, step, call, draw.choice(WAYS), draw.random() < 0.5)

    def happen(self) -> None:
        """The fault itself."""
        if self.kind == "raises":
            raise ZeroDivisionError("injected")
        if self.kind == "no memory":
            raise MemoryError("injected")
        if self.kind == "exits":
            os._exit(7)
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(WATCH + 1 if self.kind == "sleeps" else GROUP + 1)

    def __str__(self) -> str:
        where = f"derivative {self.call} of a measurement" if self.inside else f"step {self.step}"
        return f"{self.kind} on rank {self.rank} at {where}, {self.way}"


def one_rank(fault: Fault, rank: int, folder: str) -> None:
    """Train, watched, until the fault or the end."""
    import torch.distributed as dist

    store = f"file://{folder}/store"
    limit = datetime.timedelta(seconds=GROUP)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=limit)
    with _in_measurements(fault) if fault.inside and rank == fault.rank else contextlib.nullcontext():
        _train(fault, rank, f"{folder}/run")


def _train(fault: Fault, rank: int, run: str) -> None:
    import torch
    from torch.nn import functional as F

    import diag

    model = _model(fault.way)
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(rank))
    y, optimizer = (x[:, 0] > 0).long(), torch.optim.SGD(model.parameters(), 0.1)
    watch = diag.watch(model, run=run, instruments=INSTRUMENTS, every=2, budget=float("inf"))
    with watch if fault.in_block else contextlib.nullcontext():
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if not fault.inside and rank == fault.rank and step == fault.step:
                fault.happen()
            optimizer.step()


def _model(way: str) -> Any:
    import torch
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    return nn.parallel.DistributedDataParallel(model) if way == "ddp" else fully_shard(model)


@contextlib.contextmanager
def _in_measurements(fault: Fault) -> Iterator[None]:
    """The fault happens at a call of torch.autograd.grad, which the training does not use."""
    import torch

    plain, calls = torch.autograd.grad, 0

    def grad(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault.call:
            fault.happen()
        return plain(*args, **kwargs)

    torch.autograd.grad = grad
    try:
        yield
    finally:
        torch.autograd.grad = plain


def forked(work: Callable[[], None], errors: str) -> int:
    """Do `work` in a child of this process, whose messages go to a file; its process id."""
    child = os.fork()
    if child:
        return child
    status = 0
    try:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        status = 1
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        os._exit(status)


def ended(children: list[int], seconds: float) -> list[int | None]:
    """Their exit statuses; None for one that had to be killed."""
    found: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(found) < len(children) and time.monotonic() < end:
        for child in set(children) - set(found):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                found[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in set(children) - set(found):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [found.get(child) for child in children]


def inject(run: int, folder: str) -> dict[str, Any]:
    """One run: what happened, how its processes ended, and what rank 0 had recorded."""
    import diag

    fault, began = Fault.of(run), time.monotonic()
    ranks = range(WORLD)
    children = [forked(lambda r=r: one_rank(fault, r, folder), f"{folder}/errors{r}") for r in ranks]  # type: ignore[misc]
    status = ended(children, LIMIT)
    seconds = time.monotonic() - began
    found: dict[str, Any] = {"run": run, "fault": str(fault), "status": status, "seconds": round(seconds, 1)}
    try:
        record = diag.load(f"{folder}/run")
        found["steps"] = 0 if record.history is None else len(record.history)
        found["measured"] = len(record.series("hessian_spectrum"))
        found["not measured"] = sorted({outcome.reason[:160] for _, outcome in record.outcomes})
        found["notes"] = [e.text[:160] for e in record.events if e.kind == "note"]
        broken = [e.text for e in record.events if e.kind == "internal error"]
        found |= {"broken": broken} if broken else {}
    except Exception as error:
        found["unreadable"] = f"{type(error).__name__}: {error}"
    errors = [Path(folder, f"errors{r}").read_text().strip()[-200:] for r in range(WORLD)]
    return found | {"errors": [e for e in errors if e]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    asked = parser.parse_args()
    import torch

    from diag.registry import instruments

    torch.set_num_threads(1)
    instruments()  # imported here, once for all runs

    count: Counter[str] = Counter()
    for run in range(asked.first, asked.first + asked.runs):
        folder = tempfile.mkdtemp()  # no TemporaryDirectory, which would go with the first child that ends
        found = inject(run, folder)
        shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(found), flush=True)
        count["runs"] += 1
        count["hangs"] += None in found["status"]
        count["unreadable records"] += bool(found.get("unreadable"))
        count["failures of our own"] += bool(found.get("broken"))
    print(", ".join(f"{name}: {number}" for name, number in count.items()))
    return 1 if count["hangs"] or count["unreadable records"] else 0


if __name__ == "__main__":
    if importlib.util.find_spec("torch") is None and PYTHON.exists():
        os.execv(PYTHON, [str(PYTHON), *sys.argv])
    sys.exit(main())
