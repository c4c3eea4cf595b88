"""Labels that move against their rows for some batches: named with their steps; labels drawn again: not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diag
from diag.instruments.causes import Cause
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.rows import Moved, RowFacts


def train(change, loader=True, epochs=4, n=320):
    """The findings of a training whose labels at each step (from 1) are `change(step, labels)`."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, generator=generator)
    step = 0
    with diag.watch(model, instruments=["labels_kept"]) as watcher:
        for _ in range(epochs):
            own = ((x[r], y[r]) for r in torch.randperm(n, generator=generator).split(32))
            for inputs, labels in batches if loader else own:
                step += 1
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), change(step, labels)).backward()
                optimizer.step()
    return watcher


@pytest.mark.parametrize("loader", [True, False], ids=["loader", "own batches"])
def test_stretches_of_moved_labels_are_named_by_their_steps(loader):
    watcher = train(lambda step, y: (y + 1) % 3 if step in (22, 23, 31) else y, loader)
    (finding,) = watcher.findings
    verdict = finding.verdict
    assert verdict.cause == Cause.BATCHES_POISONED and (verdict.step, finding.first_step) == (22, 24)
    last = watcher.run.series("labels_kept")[-1][1].verdict()
    assert last.sentence.startswith("At steps 22 to 23 and step 31 nearly all rows of a batch had another label")
    assert "(96 rows)" in last.sentence


@pytest.mark.parametrize(
    "change",
    [
        lambda step, y: y,
        lambda step, y: torch.where(torch.rand(y.shape) < 0.1, (y + 1) % 3, y),  # noise that is drawn again
        lambda step, y: torch.randint_like(y, 3),  # targets of a pretext task
        lambda step, y: y if step <= 20 else (y + 1) % 3,  # classes numbered otherwise from then on
    ],
    ids=["kept", "noise", "drawn", "renamed"],
)
def test_labels_that_stay_or_are_drawn_again_are_left_in_peace(change):
    torch.manual_seed(0)
    assert not train(change).findings


def test_too_few_sights_and_no_rows_are_refused():
    facts = RowFacts(reason="", compared=40, changed=32, moved=(Moved(3, 3, 32),))
    assert "few rows were met a second time" in diag.labels_kept(loop=Loop(step=9, rows=facts)).verdict().sentence
    assert diag.labels_kept(loop=Loop(step=9)).verdict().level == "not_applicable"
