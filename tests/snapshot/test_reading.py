"""Data that may never end is cut, and says so; all other data is read as a whole."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

import diag
from diag.reporting.document import document
from diag.snapshot.reading import data as reading

X, Y = torch.randn(8, 4), torch.arange(8) % 3


class Endless(IterableDataset):
    def __iter__(self):
        return zip(itertools.cycle(X), itertools.cycle(Y), strict=True)


class Again:
    """A loader that begins again; its length is that of one round, or it tells none."""

    def __init__(self, length=None, rounds=None):
        self.length, self.rounds = length, rounds

    def __len__(self):
        if self.length is None:
            raise TypeError("no length")
        return self.length

    def __iter__(self):
        return itertools.repeat((X, Y)) if self.rounds is None else itertools.repeat((X, Y), self.rounds)


def snapshot(data, **more):
    return diag.Snapshot(nn.Linear(4, 3), nn.CrossEntropyLoss(), data, **more)


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(reading, "MOST_EXAMPLES_READ", 40)


ENDLESS = {
    "iterator": lambda: itertools.repeat((X, Y)),
    "no length": Again,
    "goes on beyond its length": lambda: Again(length=3),
    "iterable data set": lambda: DataLoader(Endless(), batch_size=8),
    "endless sampler": lambda: DataLoader(TensorDataset(X, Y), batch_sampler=itertools.repeat(range(8))),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_does_not_end_is_cut_and_says_so(name):
    cut = snapshot(ENDLESS[name]())
    with pytest.warns(UserWarning, match="only its first 40 examples were read; give max_examples="):
        assert cut.num_examples == 40
    assert "first 40 examples" in cut.cut_short
    assert cut.replace(loss_fn=nn.NLLLoss()).cut_short == cut.cut_short


def test_the_report_says_so():
    with pytest.warns(UserWarning, match="first 40"):
        made = document(snapshot(Again()), drawings=False)
    assert any("first 40 examples were read" in str(caveat) for caveat in made["caveats"])


def test_large_batches_are_counted_in_bytes(monkeypatch):
    monkeypatch.setattr(reading, "MOST_BYTES_READ", 3 * (X.nbytes + Y.nbytes))
    monkeypatch.setattr(reading, "MOST_EXAMPLES_READ", 10**9)
    with pytest.warns(UserWarning, match="first 24"):
        assert snapshot(Again()).num_examples == 24


@pytest.mark.parametrize(
    ("data", "more", "count"),
    [
        ([(X, Y)] * 9, {}, 72),
        (DataLoader(TensorDataset(X.repeat(9, 1), Y.repeat(9)), 8), {}, 72),
        (DataLoader(TensorDataset(X, Y), 8, sampler=RandomSampler(Y, True, 72)), {}, 72),
        (Again(rounds=5), {}, 40),
        (Again(length=9, rounds=9), {}, 72),
        (Again(), {"max_examples": 100}, 100),
        ((X, Y), {}, 8),
    ],
)
def test_what_ends_or_has_a_limit_is_read_as_asked(data, more, count):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = snapshot(data, **more)
        assert whole.num_examples == count and not whole.cut_short


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at what waits for a device that is not there")
def test_reading_leaves_nothing_to_be_done_once_a_device_is_in_use():
    """torch.manual_seed leaves a call for each kind of device, with the stack that it came from."""
    waiting = len(torch.cuda._queued_calls)
    x = torch.randn(6, 2)
    assert (
        len(diag.Snapshot(nn.Linear(2, 2), nn.CrossEntropyLoss(), (x, torch.zeros(6, dtype=torch.long))).batches)
        == 1
    )
    assert len(torch.cuda._queued_calls) == waiting
