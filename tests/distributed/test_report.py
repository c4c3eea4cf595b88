"""`torchrun -m diag report`: one page of all ranks, with the numbers of one process."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from torch import nn

from diag.cli import main

BUILD = """
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

def build():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    if dist.is_initialized():
        from torch.distributed.fsdp import fully_shard
        fully_shard(net)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).double()
    return net, F.cross_entropy, (x, x[:, :3].argmax(1))

def by_layer():
    return {**dict(zip(("model", "loss_fn", "data"), build())), "ranks": "by_layer"}
"""
NAMES = ("hessian_spectrum", "softmax_collapse", "neural_collapse")
PER_RANK = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def arguments(folder, output, checkpoint="model.pt", build="build"):
    chosen = [part for name in NAMES for part in ("--instrument", name)]
    given = ["report", folder / checkpoint, "--build", f"{folder}/task.py:{build}", *chosen, "-o", folder / output]
    return [str(part) for part in given]


def read(folder, output):
    return json.loads((folder / output).with_suffix(".json").read_text())


def of_all_ranks(folder, output, **given):
    command = [*PER_RANK, "-m", "diag", *arguments(folder, output, **given)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return read(folder, output), done


def of_one_process(folder, output):
    done = CliRunner().invoke(main, arguments(folder, output))
    assert done.exit_code == 0, done.output
    return read(folder, output)


def found(document):
    """What each check says, with its value: sentences hold the numbers to three digits or four."""
    values = {a["id"]: a["value"]["number"] for a in document["audits"] if a.get("value") is not None}
    return {a["id"]: (a["level"], a["title"]) for a in document["audits"]}, values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "task.py").write_text(BUILD)
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    net[1].running_mean.normal_(0, 0.1)
    torch.save(net.state_dict(), folder / "model.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save({"model": net.state_dict()}, checkpoint_id=folder / "dcp")
    return folder


@pytest.mark.slow
def test_one_page_where_no_rank_has_all_weights(folder):
    """Each rank loads its parts of a folder of torch.distributed.checkpoint; what needs all weights is skipped."""
    together, done = of_all_ranks(folder, "layers.html", checkpoint="dcp", build="by_layer")
    alone = of_one_process(folder, "one.html")
    (ours, values), (theirs, expected) = found(together), found(alone)
    assert ours.pop("neural-collapse")[0] == "skipped" and theirs.pop("neural-collapse")
    assert "as no rank holds all of them" in done.stdout
    assert ours == theirs and values == {name: pytest.approx(expected[name], rel=1e-6) for name in values}


def test_one_page_of_all_ranks_with_the_numbers_of_one_process(folder):
    """Sums over shares differ from those over all rows by float64 rounding."""
    together, done = of_all_ranks(folder, "ranks.html")
    alone = of_one_process(folder, "alone.html")
    assert done.stdout.count("Report:") == 1
    (ours, values), (theirs, expected) = found(together), found(alone)
    assert len(ours) >= len(NAMES) and ours == theirs
    assert values == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_a_rank_ends_with_the_status_of_its_command_and_all_that_it_said(tmp_path):
    """A rank does not wait until the interpreter is torn down; nothing that it printed may be lost by that."""
    one_of_two = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | one_of_two
    for given, status in ((["report", str(tmp_path / "absent.pt")], 2), (["list"], 0)):
        alone = CliRunner().invoke(main, given, prog_name="python -m diag")
        rank = subprocess.run([sys.executable, "-m", "diag", *given], capture_output=True, text=True, env=env)
        assert rank.returncode == alone.exit_code == status
        assert rank.stdout == alone.stdout and rank.stderr == alone.stderr
        assert rank.stdout or rank.stderr
