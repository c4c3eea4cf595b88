"""How long a run of 100,000 steps and 100,000 recorded results takes to open, and an append to return.

python scripts/bench_open_run.py
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy
import torch

import diag
from diag.run.reading import read_run
from diag.run.writer import RunWriter
from diag.snapshot.history import empty_history

RECORDS, LAYERS, REPEATS = 100_000, 50, 7


def main() -> None:
    """Print the medians over the repeats."""
    print(f"python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}")
    layers = {f"layer{i}.weight": 1000 for i in range(LAYERS)}
    labels = torch.arange(40) % 4
    result = diag.softmax_collapse(
        logits=torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), labels=labels
    )
    with tempfile.TemporaryDirectory() as folder:
        with RunWriter(folder, {"layers": layers, "model": "Net"}) as writer:
            writer.append_steps(empty_history(layers, RECORDS))
            began = time.perf_counter()
            for step in range(1, 1001):
                writer.append_outcome(step, result, 0.01)
            print(f"append of one result: {(time.perf_counter() - began):.3f} ms (mean of 1,000)")
            for step in range(1001, RECORDS + 1):
                writer.append_outcome(step, result, 0.01)
        sizes = ", ".join(f"{f.name} {f.stat().st_size / 1e6:.1f} MB" for f in sorted(Path(folder).glob("*.*n*")))
        print(f"{RECORDS:,} steps of {LAYERS} layers, {RECORDS:,} results: {sizes}")
        busy = time.process_time()
        times = [_seconds(lambda: read_run(folder)) for _ in range(REPEATS)]
        busy = (time.process_time() - busy) / REPEATS
        spread = f"median of {REPEATS}, {min(times):.2f} to {max(times):.2f}"
        print(f"load: {statistics.median(times):.2f} s ({spread}); {busy:.2f} s of CPU")
        run = read_run(folder)
        print(f"loss of every step: {_seconds(lambda: numpy.asarray(run.history.loss).sum()):.3f} s")


def _seconds(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
