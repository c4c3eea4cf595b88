"""A state that does not fit is refused with the first difference; names may differ where only one reading fits."""

import re

import pytest
import torch
from torch import nn

from diag.checkpoints import Checkpoint, load_into
from diag.errors import CheckpointError


def checkpoint(state):
    return Checkpoint("a.pt", dict(state), "torch file")


def linear(n_in=2, n_out=3):
    return nn.Linear(n_in, n_out)


def test_the_first_difference_and_how_many_more(net):
    state = net.state_dict()
    state["embedding.weight"] = state["head.weight"] = torch.ones(7, 4)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    text = (
        "a.pt does not fit Net: embedding.weight has shape (7, 4) in the checkpoint and (5, 4) in the model, and "
        "1 more differ; build the model that was trained."
    )
    with pytest.raises(CheckpointError, match=re.escape(text)):
        load_into(net, checkpoint(state))
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


def test_missing_and_surplus_names(net):
    state = net.state_dict()
    del state["conv.bias"]
    with pytest.raises(CheckpointError, match=r"conv\.bias is missing in the checkpoint; build"):
        load_into(net, checkpoint(state))
    state = net.state_dict() | {"extra": torch.ones(1)}
    with pytest.raises(CheckpointError, match="extra of the checkpoint is not in the model; build"):
        load_into(net, checkpoint(state))


def test_a_tied_weight_may_be_there_once_and_old_batch_norms_lack_a_counter(net, other, same):
    state = net.state_dict()
    del state["embedding.weight"], state["norm.num_batches_tracked"]
    assert load_into(other, checkpoint(state)) == ()
    same(net, other)


def test_a_prefix_is_taken_off_or_put_before():
    small, wrapped = linear(), nn.ModuleDict({"body": linear()})
    state = {f"body.{n}": t for n, t in linear().state_dict().items()} | {"loss.weight": torch.ones(1)}
    notes = load_into(small, checkpoint(state))
    assert notes == ("The prefix 'body.' was taken off the names, and 1 entries outside it were left out.",)
    assert torch.equal(small.weight, state["body.weight"])
    notes = load_into(wrapped, checkpoint(small.state_dict()))
    assert notes == ("The prefix 'body.' was put before the names.",)
    assert torch.equal(wrapped["body"].weight, small.weight)


def test_two_parts_that_both_fit_are_not_chosen_between():
    state = {f"{part}.{n}": t for part in ("student", "teacher") for n, t in linear().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"fits Linear in 2 ways, by the parts student\., teacher\.; save"):
        load_into(linear(), checkpoint(state))


def test_another_dtype_is_converted_and_noted():
    model, state = linear(), linear().half().state_dict()
    assert load_into(model, checkpoint(state)) == (
        "Values stored as torch.float16 were read as the model's torch.float32.",
    )
    assert torch.equal(model.weight, state["weight"].float())


def test_parameters_in_place_of_tensors():
    model, state = linear(), dict(linear().named_parameters())
    load_into(model, checkpoint(state))
    assert torch.equal(model.weight, state["weight"])
