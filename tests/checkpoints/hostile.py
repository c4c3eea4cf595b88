"""Opens every hostile checkpoint in a process of its own and says what came of it.

python -m tests.checkpoints.hostile FOLDER [EVERY]    # prints JSON: outcomes, what ran, peak memory
"""

import json
import sys
import traceback
import warnings
from pathlib import Path

import torch
from torch import nn

from tests.checkpoints.hostile_pickles import memory, running, structures
from tests.checkpoints.hostile_values import damaged, folders, tensors
from tests.checkpoints.opcodes import SHAPE, saved


class Victim(nn.Module):
    """A model of one weight, and a buffer that a checkpoint may leave out."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full(SHAPE, 7.0))


def all_of(folder, trace):
    """Write every hostile checkpoint below `folder`; yields their paths."""
    made = [*running(trace), *memory(), *structures(), *tensors(), *damaged()]
    for number, (name, data) in enumerate(made):
        path = folder / str(number) / name
        path.parent.mkdir(parents=True)
        for part in ("DCP", "HF"):
            if f"in {part}/" in name:
                path = folder / str(number) / part / name.rpartition("/")[2]
                path.parent.mkdir()
        path.write_bytes(data)
        yield name, path.parent if path.parent.name in ("DCP", "HF") else path
    for name, files in folders():
        path = folder / name.replace("/", "_")[:60]
        path.mkdir()
        for file, data in files.items():
            (path / file).write_bytes(data)
        yield name, path


def peak():
    """The most virtual and resident memory that this process has had, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmPeak", "VmHWM"))


def open_one(path):
    """What comes of opening a checkpoint and loading it: "loaded", the error's sentence, or a traceback."""
    from diag.checkpoints import load_into, load_state
    from diag.errors import CheckpointError

    model = Victim()
    before = model.weight.detach().clone()
    try:
        load_into(model, load_state(path))
    except CheckpointError as error:
        assert torch.equal(model.weight, before), "the model was changed"
        return str(error)
    except BaseException:
        return traceback.format_exc()
    assert model.weight.shape == SHAPE and model.weight.dtype is torch.float32
    return "loaded"


def main(folder, every):
    """Open all of them, or every so many, and print what came of it as JSON."""
    folder, trace = Path(folder), Path(folder) / "it-ran"
    (folder / "good.pt").write_bytes(saved({"weight": torch.zeros(SHAPE)}))
    checkpoints = list(all_of(folder / "files", trace))[::every]
    assert open_one(folder / "good.pt") == "loaded"
    start, outcomes, greedy = peak(), {}, {}
    for name, path in checkpoints:
        before = peak()
        outcomes[f"{name} [{len(outcomes)}]"] = open_one(path)
        if peak()[0] - before[0] > 200 << 20:
            greedy[name] = peak()[0] - before[0]
    grown = [after - before for after, before in zip(peak(), start, strict=True)]
    about = {"ran": trace.exists(), "virtual": grown[0], "resident": grown[1], "greedy": greedy}
    print(json.dumps({"outcomes": outcomes} | about))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)
