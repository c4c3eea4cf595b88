"""DistributedDataParallel: rank 0 measures and records for all, and every rank trains as it would unwatched."""

import json
import os
import subprocess
import sys

import pytest

# Trains three times from one seed in two processes: unwatched, watched as wrapped, watched as bare. Every pass of
# the wrapper sends buffers to the other rank, so a measurement through it would wait for ever for a rank that does
# not measure; what the ranks leave behind, calls of the wrapper included, is compared in the test.
SCRIPT = """
import datetime, hashlib, json, math, os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn import functional as F
import diag

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
)
generator = torch.Generator().manual_seed(rank)
x = torch.randn(48, 1, 6, 6, generator=generator)
y = x[:, 0, 0, :3].argmax(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(64, 3)

    def forward(self, x):
        return self.fc(self.drop(F.relu(self.norm(self.conv(x)))).flatten(1))

def train(how):
    torch.manual_seed(rank)
    model = Net()
    wrapped = nn.parallel.DistributedDataParallel(model)
    calls, losses = [], []
    wrapped.register_forward_pre_hook(lambda *a: calls.append(1))
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.05, momentum=0.9)
    watcher = None
    if how != "unwatched":
        settings = {"sharpness": {"num_draws": 4, "steps": 2}, "softmax_collapse": {}, "gradient_coherence": {}}
        watched = wrapped if how == "wrapped" else model
        watcher = diag.watch(watched, run=f"{folder}/{how}", budget=math.inf, instruments=settings)
    for k in range(24):
        part = slice(16 * (k // 2 % 3), 16 * (k // 2 % 3) + 16)
        if k % 2 == 0:
            with wrapped.no_sync():
                loss = F.cross_entropy(wrapped(x[part]), y[part])
                (loss / 2).backward()
        else:
            loss = F.cross_entropy(wrapped(x[part]), y[part])
            (loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    if watcher is not None:
        watcher.close()
    state = torch.cat([v.double().flatten() for v in model.state_dict().values()] + [torch.rand(3).double()])
    found = {"state": hashlib.sha256(state.numpy().tobytes()).hexdigest(), "calls": len(calls), "losses": losses}
    if watcher is not None:
        run = watcher.run
        found |= {
            "repr": repr(watcher), "measured": {n: len(run.series(n)) for n in run.instruments},
            "recorded": [] if run.history is None else run.history.loss.tolist(),
            "errors": [e.text for e in run.events if e.kind == "internal error"],
        }
    return found

found = {how: train(how) for how in ("unwatched", "wrapped", "bare")}
dist.destroy_process_group()
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(found, file)
sys.stderr.flush()
os._exit(0)  # threads of gloo that outlive the interpreter can end a process with SIGABRT after its work
"""


@pytest.mark.slow
def test_two_ranks(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, script, str(rank), tmp_path], env=env, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for how in ("wrapped", "bare"):
        for rank in (first, second):
            assert rank[how]["state"] == rank["unwatched"]["state"]
            assert rank[how]["calls"] == rank["unwatched"]["calls"] == 24
        both = [(a + b) / 2 for a, b in zip(first[how]["losses"], second[how]["losses"], strict=True)]
        recorded = [(a + b) / 2 for a, b in zip(*[iter(both)] * 2, strict=True)]
        assert first[how]["recorded"] == pytest.approx(recorded, rel=1e-6)
        assert first[how]["measured"].keys() == {"sharpness", "softmax_collapse", "gradient_coherence"}
        assert first[how]["errors"] == []
        assert second[how]["repr"] == "<Watcher of Net, 12 steps, closed, rank 1, not rank 0, which records>"
        assert second[how]["measured"] == {} and second[how]["recorded"] == []
