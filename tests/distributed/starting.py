"""Starts one process a rank, and reads what each of them found."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("trainings.py")
QUIET = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def start(world, folder, names, script=SCRIPT):
    """Run the trainings of a script; what the ranks found, by rank."""
    run_ranks([[script, str(rank), str(world), folder, *names] for rank in range(world)])
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def run_ranks(arguments, env=None):
    """Run Python with each rank's arguments, all at once; env: what each has in its environment besides."""
    processes = [
        subprocess.Popen(
            [sys.executable, *each],
            env=os.environ | QUIET | more,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each, more in zip(arguments, env or [{}] * len(arguments), strict=True)
    ]
    try:
        errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), errors
