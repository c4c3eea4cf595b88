"""Inputs that do not differ, that repeat within a batch, that are prepared otherwise in evaluation; examples
mixed."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diag
from diag.instruments.causes import Cause
from diag.snapshot.batch import Batch
from diag.snapshot.inside.apart import mixing
from diag.watching.observe.loop.data.inputs import Sums, marks_of

WATCHED = ["batch_rows", "evaluation_inputs", "examples_mixed", "classes_mixed", "batches_repeated"]


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("diag").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("diag").setLevel(logging.NOTSET)


def told(model, x, y, change=lambda a, b: (a, b), evaluate=None, epochs=3):
    """{cause: verdict} of a classifier trained on (x, y)."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with diag.watch(model, instruments=WATCHED) as watcher:
            for _ in range(epochs):
                model.train()
                for a, b in DataLoader(TensorDataset(x, y), 24, shuffle=True):
                    a, b = change(a, b)
                    optimizer.zero_grad()
                    F.cross_entropy(model(a), b).backward()
                    optimizer.step()
                if evaluate is not None:
                    model.eval()
                    with torch.no_grad():
                        model(evaluate)
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return {f.verdict.cause: f.verdict for f in watcher.run.findings() if f.verdict.cause}


def network(*middle, inputs=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 12), nn.Tanh(), *middle, nn.Linear(12, 3))


def rows(n=240, seed=0):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1)


# Rows that do not differ


def test_tokens_that_are_all_one_are_told_and_are_no_repeated_batch():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(40, 3))
    found = told(model, torch.full((240, 5), 7), rows()[1])
    assert found[Cause.INPUTS_CONSTANT].level == "alarm" and Cause.BATCH_REPEATED not in found


def test_rows_that_repeat_within_a_batch_are_told_and_are_not_sorted_classes():
    found = told(network(), *rows(), change=lambda a, b: (a[:4].repeat(6, 1), b[:4].repeat(6)))
    assert found[Cause.ROWS_DUPLICATED].level == "warning" and Cause.CLASSES_SORTED not in found


def test_rows_of_a_small_table_and_two_views_of_each_row_are_quiet():
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).repeat(60, 1)
    found = told(network(inputs=2), corners, (corners.sum(1) == 1).long())
    assert not {Cause.ROWS_DUPLICATED, Cause.INPUTS_CONSTANT} & set(found)
    found = told(network(), *rows(), change=lambda a, b: (torch.cat([a[:12], a[:12]]), torch.cat([b[:12], b[:12]])))
    assert Cause.ROWS_DUPLICATED not in found


def test_a_batch_far_larger_than_the_others_is_not_what_training_is_like():
    usual, sums = torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(0)), Sums()
    for batch in (usual[0], 1e4 * usual[0], *usual[1:]):
        sums.add(batch)
    assert sums.mean == pytest.approx(float(usual.double().mean()), abs=1e-9)
    assert sums.deviation == pytest.approx(float(usual.double().std(correction=0)), rel=1e-9)


def test_marks_tell_rows_apart_as_a_comparison_of_all_entries_does():
    x = torch.randint(0, 2, (100, 3), generator=torch.Generator().manual_seed(0))
    marks = marks_of(x)
    same = torch.tensor(marks)[:, None] == torch.tensor(marks)
    assert torch.equal(same, (x[:, None] == x).all(-1))


# Evaluation


@pytest.mark.parametrize(("scale", "shift", "is_told"), [(255.0, 0.0, True), (1.0, 5.0, True), (1.3, 0.2, False)])
def test_inputs_of_another_scale_in_evaluation_are_told(scale, shift, is_told):
    found = told(network(), *rows(), evaluate=rows(120, 1)[0] * scale + shift)
    assert (Cause.HELD_OUT_DIFFERS in found) is is_told


# Examples that see each other


class MeanOfBatch(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class SumBefore(nn.Module):
    """A recurrence along the wrong axis: an example sees those before it."""

    def forward(self, x):
        return x.cumsum(0)


@pytest.mark.parametrize("mixer", [MeanOfBatch(), nn.Softmax(0), SumBefore()])
def test_a_layer_that_mixes_examples_is_told(mixer):
    assert told(network(mixer), *rows())[Cause.EXAMPLES_MIXED].level == "warning"


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(12), nn.LayerNorm(12), nn.Dropout(0.5)])
def test_layers_that_keep_examples_apart_are_quiet(layer):
    assert Cause.EXAMPLES_MIXED not in told(network(layer), *rows())


def test_mixing_is_the_change_computed_by_hand():
    x = rows(5)[0].double()
    found = mixing(MeanOfBatch(), Batch((x,), {}, None, 5))
    before = x - x.mean(0)
    size = before.square().mean().sqrt()
    # With every row replaced by one, that row becomes zero.
    by_hand = max(before[0].abs().max(), before[-1].abs().max()) / size
    assert found == pytest.approx(float(by_hand), rel=1e-12)
