"""A watch keeps no more, however long it lasts."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of the memory")
def test_the_memory_of_a_long_training_is_flat():
    """30,000 steps; `scripts/soak` takes a million."""
    done = subprocess.run([sys.executable, SCRIPT, "--steps", "30000"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" steps ") == 10
