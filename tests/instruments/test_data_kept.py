"""Stored data that training writes into: slices changed in place, data sets whose rows change between epochs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import diag
from diag.instruments.causes import Cause
from diag.watching.observe.loop.data.stored import StoredData
from diag.watching.observe.loop.moment import Moment

N, D, BATCH = 256, 6, 64


class Rows(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator)
    return x, (x[:, 0] > 0).long()


def trained(batches):
    """The verdict on a training on these (inputs, labels)."""
    torch.manual_seed(0)
    model = nn.Linear(D, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=["data_kept"]) as watcher:
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return watcher.run.findings()[0].verdict


def slices(change, steps=60):
    x, y = data()
    for step in range(steps):
        at = (step * 16) % (N - BATCH)
        yield change(x[at : at + BATCH]), y[at : at + BATCH]


def test_slices_that_are_written_into_are_told():
    verdict = trained(slices(lambda x: x.add_(0.1 * torch.randn_like(x))))
    assert verdict.level == "warning" and verdict.cause == Cause.DATA_OVERWRITTEN
    assert "batches are slices of one stored tensor" in verdict.sentence


def test_slices_that_are_read_or_augmented_as_copies_are_quiet():
    assert trained(slices(lambda x: x)).level == "ok"
    assert trained(slices(lambda x: x + 0.1 * torch.randn_like(x))).level == "not_applicable"


def test_a_buffer_that_is_filled_before_each_call_is_no_stored_data():
    x, y = data()
    buffer = torch.zeros(2 * BATCH, D)

    def batches():
        for step in range(60):
            at = (step * 16) % (N - BATCH)
            buffer[:BATCH].copy_(x[at : at + BATCH])
            yield buffer[:BATCH] if step % 2 else x[at : at + BATCH], y[at : at + BATCH]

    assert trained(batches()).level != "warning"


def epochs(change, kind=TensorDataset, of_numpy=False, number=4):
    x, y = data()
    dataset = kind(x.numpy() if of_numpy else x, y)
    loader = DataLoader(dataset, BATCH, shuffle=True)
    for epoch in range(number):
        change(dataset.x if kind is Rows else dataset.tensors[0], epoch)
        yield from loader


def noisy(x, epoch):
    noise = 0.3 * torch.randn(N, D)
    x += noise if isinstance(x, torch.Tensor) else noise.numpy()


@pytest.mark.parametrize(("kind", "of_numpy"), [(TensorDataset, False), (Rows, False), (Rows, True)])
def test_data_sets_whose_rows_change_in_place_are_told(kind, of_numpy):
    verdict = trained(epochs(noisy, kind, of_numpy))
    assert verdict.cause == Cause.DATA_OVERWRITTEN
    assert "before 3 of 3 epochs" in verdict.sentence


def filled_once(x, epoch):
    if epoch == 1:
        x.add_(1.0)


def made_again(x, epoch):
    x.copy_(torch.randn(N, D))


@pytest.mark.parametrize("change", [lambda x, epoch: None, filled_once, made_again])
def test_data_that_stays_is_filled_once_or_is_made_again_is_quiet(change):
    assert trained(epochs(change)).level == "ok"


def started(make, of_numpy=False):
    """The facts of six epochs, each of a data set that is made for it of x, and where its numbers lay."""
    x, y = data()
    stored, addresses = StoredData(Moment()), []
    for _ in range(6):
        dataset = None  # the one before is freed
        made = make(x)
        dataset = Rows(made.numpy() if of_numpy else made, y)
        addresses.append(made.data_ptr())
        del made
        stored.loader_started(dataset)
    return stored.facts(), addresses


@pytest.mark.parametrize("of_numpy", [False, True])
def test_copies_made_for_each_epoch_where_the_ones_before_lay_are_not_the_stored_data(of_numpy):
    facts, addresses = started(lambda x: x.clone().add_(torch.randn(N, D), alpha=0.3), of_numpy)
    assert len(set(addresses)) < len(addresses)  # else this says nothing
    assert facts.epochs == facts.epochs_changed == 0


def test_new_views_of_data_that_is_written_into_are_the_stored_data():
    facts, _ = started(lambda x: x.add_(torch.randn(N, D), alpha=0.3)[:200])
    assert facts.epochs == facts.epochs_changed == 5


def test_slices_of_which_three_rows_are_followed_are_news_too():
    x, _ = data()
    stored = StoredData(moment := Moment())
    for _ in range(20):
        stored.training_call((x[:48].add_(1.0),), {})
    assert stored.facts().rows_changed == 54 and moment.changed


def test_batches_that_are_made_on_the_way_are_refused():
    verdict = trained((torch.randn(BATCH, D), torch.randint(0, 2, (BATCH,))) for _ in range(6))
    assert verdict.level == "not_applicable"
    assert "no data was seen twice" in verdict.sentence
