#!/usr/bin/env python
"""What `import diag` costs over `import torch`: interleaved fresh interpreters, medians, and the ratio.

Every module is compiled once, before anything is timed, as in any environment that may write bytecode: with
PYTHONDONTWRITEBYTECODE set the sources of diag would be compiled again each time, and those of torch not.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

CONTENDERS = {
    "import torch": "import torch",
    "import torch, diag": "import torch, diag",
    "... and its public names": "import torch, diag; diag.Snapshot, diag.watch, diag.report, diag.load",
}


def seconds(code: str, compiled: str) -> float:
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    return time.perf_counter() - began


def measured(rounds: int, compiled: str) -> dict[str, list[float]]:
    for code in CONTENDERS.values():
        seconds(code, compiled)  # compile, and warm the file cache
    times = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, code in CONTENDERS.items():
            times[name].append(seconds(code, compiled))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as compiled:
        times = measured(rounds, compiled)
    base = statistics.median(times["import torch"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:28} {median:6.3f} s   ratio {median / base:5.3f}")


if __name__ == "__main__":
    main()
