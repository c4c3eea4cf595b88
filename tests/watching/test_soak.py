"""A watch keeps no more, however long it lasts."""

import gc
import subprocess
import sys
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diag
from diag.watching.measure import live
from diag.watching.observe.loop import weights
from diag.watching.observe.loop.data import stream as batch_stream
from diag.watching.observe.loop.recent import Recent

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak"


def distinct():
    """Batches that never come again."""
    while True:
        x = torch.randn(8, 4)
        yield x, (x[:, 0] > 0).long()


def the_same_few():
    """Four batches in turn."""
    return cycle(list(islice(distinct(), 4)))


def shuffled():
    """A DataLoader's, in short epochs."""
    x = torch.randn(64, 4)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 8, shuffle=True)
    while True:
        yield from loader


def blocks_after(steps, stream, model, optimizer):
    """Train on, and count what Python holds; a full collection empties the lists of free objects, too."""
    for x, y in islice(stream, steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    gc.collect()
    return sys.getallocatedblocks()


@pytest.mark.parametrize("stream", [distinct, the_same_few, shuffled])
def test_objects_do_not_grow_in_number_with_the_steps(stream, monkeypatch, tmp_path):
    """What is remembered up to a bound is kept short here, so that the bounds are reached soon. One object kept at
    each of the eighth of the steps that are looked at closely would be 375; the tolerance is half of that."""
    for room, name, size in [
        (batch_stream, "BATCHES_REMEMBERED", 16),
        (weights, "PAST", 16),
        (live, "RECENT_ROWS", 16),
    ]:
        monkeypatch.setattr(room, name, size)
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    with diag.watch(model, run=tmp_path / "run", instruments=["divergence"]):
        given = stream()
        before = blocks_after(1000, given, model, optimizer)
        after = blocks_after(3000, given, model, optimizer)
    assert after - before < 187


@pytest.mark.parametrize("keys", [range(1000), [3] * 1000])
def test_recent_keeps_the_last_and_no_more_than_twice_as_many(keys):
    recent = Recent(10)
    for value, key in enumerate(keys):
        recent.set(key, value)
        assert recent.get(key) == value
        assert len(recent) <= 20
    last = dict(zip(keys, range(1000), strict=True))
    assert all(recent.get(key) == last[key] for key in list(keys)[-10:])
    assert recent.get(-1) is None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of the memory")
def test_the_memory_of_a_long_training_is_flat():
    """30,000 steps; `scripts/soak` takes a million."""
    done = subprocess.run([sys.executable, SCRIPT, "--steps", "30000"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" steps ") == 10
