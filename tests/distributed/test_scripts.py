"""The scripts about several processes, on as little as shows that they work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def started(name, *arguments):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPTS / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=400)


def test_the_bench_of_sizes_finds_one_largest_eigenvalue_and_half_of_the_basis(tmp_path):
    kept = tmp_path / "scale.json"
    small = ("--size", "tiny", "--batch", 4, "--length", 8, "--micro", 2, "--products", 4)
    done = started("bench_scale.py", *small, "--processes", 1, 2, "--way", "fsdp", "--json", kept)
    assert done.returncode == 0, done.stderr
    one, two = json.loads(kept.read_text())["rows"]
    assert (one["processes"], two["processes"]) == (1, 2) and one["parameters"] == two["parameters"]
    assert two["largest"] == pytest.approx(one["largest"], rel=1e-4)
    assert two["basis_bytes"] <= 0.5 * one["basis_bytes"] + 4 * 5


@pytest.mark.slow
def test_no_run_hangs_whatever_happens_to_a_rank():
    done = started("inject_faults.py", "--runs", 20)
    assert done.returncode == 0, done.stdout
    assert "runs: 20, hangs: 0, unreadable records: 0, failures of our own: 0" in done.stdout
