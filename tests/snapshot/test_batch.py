"""Every form a batch can have becomes the same normal form; what has no known form is refused."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diag.errors import InvalidInput
from diag.snapshot.batch import map_tensors, tensors_in
from diag.snapshot.reading.forms import as_batch, as_batches

X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)


@pytest.mark.parametrize(
    ("item", "args", "kwargs"),
    [
        ((X, Y), (X,), {}),
        ([X, Y], (X,), {}),
        (((X, X), Y), (X, X), {}),
        ({"input_ids": X, "labels": Y}, (), {"input_ids": X}),
        (({"x": X}, Y), (), {"x": X}),
    ],
)
def test_forms(item, args, kwargs):
    batch = as_batch(item)
    assert torch.equal(batch.targets, Y)
    assert batch.size == 6
    assert len(batch.args) == len(args)
    assert batch.kwargs.keys() == kwargs.keys()


def test_unpack_makes_of_a_batch_what_the_user_says():
    batch = as_batch((X, "name", Y), unpack=lambda b: (b[0], b[2]))
    assert torch.equal(batch.args[0], X)


def test_one_batch_and_many():
    assert len(list(as_batches((X, Y)))) == 1
    assert len(list(as_batches([X, Y]))) == 1  # what a DataLoader's collate gives
    assert len(list(as_batches([(X, Y), (X, Y)]))) == 2
    assert len(list(as_batches([[X, Y], [X, Y]]))) == 2
    assert len(list(as_batches({"x": X, "labels": Y}))) == 1
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4)
    assert [b.size for b in as_batches(loader)] == [4, 2]


@given(st.integers(1, 9))
def test_splitting_loses_and_repeats_nothing(size):
    parts = list(as_batch((X, Y)).split(size))
    assert torch.equal(torch.cat([p.args[0] for p in parts]), X)
    assert torch.equal(torch.cat([p.targets for p in parts]), Y)
    assert all(p.size <= size for p in parts)
    assert sum(p.size for p in parts) == 6


def test_tensors_without_the_batch_axis_stay_whole():
    table = torch.ones(3, 3)
    part = as_batch(((X, table), Y)).slice(0, 2)
    assert part.args[1] is table


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (
            (X, X, Y),
            "A batch is a tuple of length 3; expected .inputs, targets. or a dict with labels: give unpack=",
        ),
        ({"x": X}, "a dict with the keys .'x'. and none of"),
        ((torch.zeros(0, 2), torch.zeros(0)), "holds a batch with no examples"),
        (("a", "b"), "holds no tensor"),
    ],
)
def test_refusals(item, text):
    with pytest.raises(InvalidInput, match=text):
        as_batch(item)


def test_data_of_no_known_kind():
    with pytest.raises(InvalidInput, match="The data is an int; expected a DataLoader"):
        list(as_batches(3))


@dataclasses.dataclass
class Answer:
    loss: torch.Tensor | None
    logits: torch.Tensor
    rows: int = 0


def test_tensors_in_dataclasses_are_found_and_changed():
    answer = Answer(None, torch.arange(3.0), 3)
    (found,) = tensors_in({"all": [answer]})
    assert found is answer.logits
    changed = map_tensors(lambda t: t + 1, (answer,))[0]
    assert type(changed) is Answer and changed.rows == 3 and changed.loss is None
    assert changed.logits.tolist() == [1.0, 2.0, 3.0] and answer.logits.tolist() == [0.0, 1.0, 2.0]
    assert tensors_in(Answer) == []


@dataclasses.dataclass
class Node:
    parent: object = None


def test_dataclasses_without_a_tensor_stay_the_objects_that_they_are():
    node = Node()
    node.parent = node
    assert map_tensors(lambda t: t + 1, {"node": node, "x": X})["node"] is node
