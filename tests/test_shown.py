"""All Python and every command that README and documentation show run, in a folder that has what they name."""

import glob
import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diag
from diag.cli import main
from diag.datasets import load_dataset

ROOT = Path(__file__).resolve().parent.parent
SHOWN = [ROOT / "README.md", *(f for f in sorted((ROOT / "docs").rglob("*.md")) if f.name != "tutorial.md")]
RUNS = ["mine", "a", "b", "new", "old", "h1", "h2", "accepted", "sweep/1", "sweep/2", "sweep/3"]
FILES = ["a.pt", "b.pt", "c.pt", "before.pt", "after.pt", "last.pt", "ckpt/1.pt", "ckpt/2.pt"]
ENDLESS = {"live", "--follow"}  # they go on until they are stopped; tests/cli/test_live.py tries them
TASK = """
import torch
from torch import nn

def build():
    labels = torch.arange(60) % 3
    inputs = nn.functional.one_hot(labels, 8).float()
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    return model, nn.functional.cross_entropy, (inputs, labels)
"""


def network(width=16, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def named():
    """What the examples take for granted: a model, a loss, data, a loop."""
    labels = torch.arange(60) % 3
    data = (nn.functional.one_hot(labels, 8).float(), labels)
    loss_fn, model = nn.functional.cross_entropy, network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(model):
        for _ in range(4):
            optimizer.zero_grad()
            loss_fn(model(data[0]), data[1]).backward()
            optimizer.step()

    return {
        "diag": diag, "model": model, "loss_fn": loss_fn, "data": data, "test_data": data, "optimizer": optimizer,
        "train": train, "loader": DataLoader(TensorDataset(*data), 20, shuffle=True), "features": data[0],
        "labels": labels, "test_inputs": data[0], "test_labels": labels,
        "build": lambda seed: network(seed=seed), "build_wide": network,
    }  # fmt: skip


def good_run(folder):
    """Fifty steps on digits, of which no check finds anything wrong."""
    digits = load_dataset("digits")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with diag.watch(model, run=folder):
        for rows in torch.randperm(len(digits)).split(32)[:50]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(digits.inputs[rows]), digits.labels[rows]).backward()
            optimizer.step()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with runs, checkpoints, a task and a log by the names that the pages use."""
    folder = tmp_path_factory.mktemp("world")
    good_run(folder / "run")
    for name in RUNS:
        shutil.copytree(folder / "run", folder / "runs" / name)
    (folder / "ckpt").mkdir()
    for i, name in enumerate(FILES):
        torch.manual_seed(i)
        state = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).state_dict()
        torch.save(state, folder / name)
    (folder / "project").mkdir()
    (folder / "project" / "task.py").write_text(TASK)
    log = folder / "outputs" / "checkpoint-500" / "trainer_state.json"
    log.parent.mkdir(parents=True)
    history = [{"step": 10 * i, "loss": 2 / i, "learning_rate": 1e-3} for i in range(1, 20)]
    log.write_text(json.dumps({"log_history": history, "global_step": 190}))
    return folder


def blocks(language):
    for path in SHOWN:
        found = re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.S)
        for number, code in enumerate(found):
            if "@instrument" not in code:  # tests/test_readme.py has it: it must lie in a file
                yield pytest.param(code, id=f"{path.stem}-{number}")


@pytest.mark.parametrize("code", list(blocks("python")))
def test_python_runs_as_it_is_shown(code, world, tmp_path, monkeypatch):
    for package in re.findall(r"diag\.integrations\.(lightning|transformers|accelerate) import", code):
        pytest.importorskip(package, reason="pip install diag[trainers]")
    if "integrations" in code:  # called with the real libraries in tests/integrations
        code = "\n".join(line for line in code.splitlines() if line.startswith("from diag."))
    shutil.copytree(world / "runs" / "mine", tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.print", lambda *shown: None)
    exec(compile(code, "shown", "exec"), named())


def commands():
    found = {}
    for path in SHOWN:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.S):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["diag"] and not ENDLESS & set(words):
                    found[" ".join(words[1:])] = words[1:]
    return found


@pytest.mark.parametrize("words", commands().values(), ids=commands())
def test_a_command_runs_as_it_is_shown(words, world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(world)
    if words[0] == "import":
        shutil.rmtree(world / "runs" / "old")
    arguments = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else [word])]
    done = CliRunner().invoke(main, arguments, env={"NO_COLOR": "1"})
    assert done.exit_code in (0, 1) and not (done.exception and not isinstance(done.exception, SystemExit)), (
        done.output + done.stderr
    )
    for option, name in itertools.pairwise(arguments):
        if option in ("-o", "--junit", "--sarif"):
            assert (world / name).exists(), name
