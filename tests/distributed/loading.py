"""Checkpoints that ranks load into a sharded model, each its own parts (see `test_by_layer`)."""

from pathlib import Path
from unittest import mock

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import trainings
from torch.nn import functional as F

from diag.checkpoints import load_into, load_state
from diag.checkpoints.stored import StoredTensor
from diag.distributed.placement import own_part
from diag.errors import CheckpointError
from diag.run.checkpoints import from_checkpoints


def saved(folder, state):
    """The state in each way, by name."""
    places = {kind: folder / kind for kind in ("dcp", "ranks", "hugging face")}
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
    dcp.save({"model": state, "step": 5}, checkpoint_id=places["dcp"])
    torch.save(state, places["ranks"] / f"rank{trainings.RANK}.pt")
    if trainings.RANK == 0:
        safetensors.torch.save_file(whole, places["hugging face"] / "model.safetensors")
    trainings.dist.barrier()
    return places


def unreadable(folder):
    """What each rank says where the part of rank 1 alone cannot be read, and the measurement after that."""
    data = trainings.share()

    def build():
        return trainings.fully(trainings.networks()["mlp"]), F.cross_entropy, data

    def damaged(model, checkpoint):
        if trainings.RANK == 1:
            raise CheckpointError("0.weight cannot be read.")
        return load_into(model, checkpoint)

    place = Path(folder) / "damaged"
    place.mkdir(exist_ok=True)
    dcp.save({"model": build()[0].state_dict()}, checkpoint_id=place)
    trainings.dist.barrier()

    def measured():
        return len(from_checkpoints([place], build, names=["hessian_spectrum"], ranks=True).records)

    with mock.patch("diag.run.checkpoints.load_into", damaged):
        said = trainings.refusal(measured)
    return [said, measured()]


def loaded(folder):
    """For each way: whether each rank's parts came back bit for bit, and the shapes of sharded tensors that any
    rank put together whole on the way."""
    state, found = trainings.fully(trainings.networks()["conv"]).state_dict(), {}
    for kind, place in saved(Path(folder), state).items():
        other = trainings.networks()["conv"]
        for parameter in other.parameters():
            torch.nn.init.zeros_(parameter)
        sharded = trainings.fully(other)
        with mock.patch.object(StoredTensor, "whole", autospec=True, side_effect=StoredTensor.whole) as whole:
            load_into(sharded, load_state(place, in_parts=True))
        pairs = zip(sharded.state_dict().values(), state.values(), strict=True)
        buffers = {tuple(b.shape) for b in sharded.buffers()}
        found[kind] = [
            all(torch.equal(own_part(a), own_part(b)) for a, b in pairs),
            [tuple(c.args[0].shape) for c in whole.call_args_list if tuple(c.args[0].shape) not in buffers],
        ]
    return found
