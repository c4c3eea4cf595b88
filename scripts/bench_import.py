#!/usr/bin/env python
"""What `import diag` costs over `import torch`: interleaved fresh interpreters, medians, and the ratio."""

import argparse
import statistics
import subprocess
import sys
import time

CONTENDERS = {
    "import torch": "import torch",
    "import torch, diag": "import torch, diag",
    "... and its public names": "import torch, diag; diag.Snapshot, diag.watch, diag.report, diag.load",
}


def seconds(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    for code in CONTENDERS.values():
        seconds(code)  # warm the file cache
    times = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, code in CONTENDERS.items():
            times[name].append(seconds(code))
    base = statistics.median(times["import torch"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:28} {median:6.3f} s   ratio {median / base:5.3f}")


if __name__ == "__main__":
    main()
