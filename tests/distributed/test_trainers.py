"""Other people's trainers under two processes; each is skipped where its package is not installed.

pip install diag[trainers]
"""

import importlib.util
import json
import os
import socket
import sys
from pathlib import Path

import pytest

import diag
from tests.distributed.starting import run_ranks

SCRIPT = Path(__file__).with_name("trainers.py")
WORLD, STEPS = 2, 20


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(name, folder):
    """Run the trainer on every rank; the hashes that each found."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(WORLD),
              "PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    ranks = [str(rank) for rank in range(WORLD)]
    run_ranks(
        [[SCRIPT, name, rank, str(WORLD), folder] for rank in ranks],
        [common | {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": "0"} for rank in ranks],
    )
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in ranks]


@pytest.mark.parametrize("name", ["accelerate", "transformers", "lightning", "lightning_fsdp"])
def test_a_trainer_on_two_ranks_trains_as_it_would_and_is_recorded_as_one(tmp_path, name):
    package = name.partition("_")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    for unwatched, watched in start(name, tmp_path):
        assert unwatched == watched
    run = diag.load(tmp_path / name)
    assert len(run.history) == STEPS
    assert not [e.text for e in run.events if e.kind == "internal error"]
    assert any("All 2 ranks are watched" in e.text for e in run.events)
    assert not [f.verdict.sentence for f in run.findings() if f.instrument in ("replicas_equal", "ranks_data")
                and f.verdict.level.is_finding]  # fmt: skip
    spectra = run.series("hessian_spectrum")
    assert spectra and spectra[-1][1].provenance.num_examples > 8
