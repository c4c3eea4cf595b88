"""A loop that moves its model to another precision, or has tensors made elsewhere, is measured as before."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.registry import instruments
from diag.result import Failed
from diag.snapshot.batch import Batch
from diag.watching.measure.follow import MovedBatches

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


class Scaled(nn.Module):
    """An MLP whose forward makes tensors of its own, as the program makes them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        ones = torch.ones(x.shape[1])  # where the program makes it, in its precision
        return self.last(torch.tanh(self.first(x * ones.to(x))))


def trained(watched, change=lambda model, step: None, steps=8):
    """The weights that the loop leaves, and what was recorded. change(model, step) before each step."""
    torch.manual_seed(0)
    model = Scaled().to("cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    watcher = diag.watch(model, budget=1e-9, instruments="all") if watched else None
    for step in range(steps):
        change(model, step)
        dtype = model.first.weight.dtype
        optimizer.zero_grad()
        rows = slice(16 * (step % 3), 16 * (step % 3) + 16)
        F.cross_entropy(model(X[rows].to(dtype)).float(), Y[rows]).backward()
        optimizer.step()
        if watcher and step == 6:
            watcher.measure()
    if watcher:
        watcher.close()
    return copy.deepcopy(model.state_dict()), watcher and watcher.run


def broken(run):
    errors = [e.text for e in run.events if e.kind == "internal error"]
    return errors + [o.reason for _, o in run.outcomes if isinstance(o, Failed)]


def convert_to(dtype):
    return lambda model, step: model.to(dtype) if step == 4 else None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_probe_set_follows_a_model_that_is_converted(dtype):
    unwatched, _ = trained(False, convert_to(dtype))
    watched, run = trained(True, convert_to(dtype))
    assert all(torch.equal(watched[k], unwatched[k]) for k in watched)
    assert not broken(run)
    step, collapse = run.series("softmax_collapse")[-1]
    assert step >= 7 and math.isfinite(collapse.collapsed)
    # What is only written in another precision is not changed from outside.
    assert not [f for f in run.findings() if f.instrument == "outside_changes" and f.verdict.level != "ok"]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_in_another_default_precision_no_less_is_measured(default):
    plain = trained(True)[1]
    state, run = None, None
    torch.set_default_dtype(default)
    try:
        model = Scaled().float()
        assert model.first.weight.dtype is torch.float32
        state, run = trained(True, lambda model, step: model.float() if step == 0 else None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert state is not None and not broken(run)
    measured = {name for name in instruments() if plain.series(name)}
    assert {name for name in instruments() if run.series(name)} >= measured


def test_batches_are_moved_once_and_others_that_take_their_place_again():
    def batches(begin):
        return [Batch((X[begin : begin + 8],), {}, Y[begin : begin + 8], 8)]

    model = Scaled()
    moved, kept = MovedBatches(model), batches(0)
    assert moved.here(kept) is kept
    model.double()
    there = moved.here(kept)
    assert moved.here(list(kept)) is there and there[0].targets.dtype is torch.int64
    del kept, there
    for begin in (8, 16, 24):  # each is made where the one before it lay
        assert torch.equal(moved.here(batches(begin))[0].args[0], X[begin : begin + 8].double())


def on(device):
    """The weights and the run of a training whose program has tensors made on that device by default."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    torch.set_default_device(device)
    try:
        with diag.watch(model, budget=1e-9, instruments="all") as watcher:
            for step in range(8):
                optimizer.zero_grad()
                rows = slice(16 * (step % 3), 16 * (step % 3) + 16)
                F.cross_entropy(model(X[rows]), Y[rows]).backward()
                optimizer.step()
                if step == 6:
                    watcher.measure()
    finally:
        torch.set_default_device(None)
    return model.state_dict(), watcher.run


def test_tensors_of_diags_own_lie_on_the_host_whatever_the_default_device():
    """The meta device stands for an accelerator: what is made on it by mistake has no number."""
    (plain, before), (state, run) = on("cpu"), on("meta")
    assert not broken(run)
    assert all(torch.equal(plain[k], state[k]) for k in plain)
    for name in instruments():
        assert [s for s, _ in run.series(name)] == [s for s, _ in before.series(name)], name


def test_the_model_and_the_loss_are_called_with_the_programs_default_device():
    def check():
        if asked and torch.get_default_device().type != "meta":
            raise RuntimeError("another default device")

    class Asking(nn.Linear):
        def forward(self, x):
            check()
            return super().forward(x)

    def loss_fn(z, y):
        check()
        return F.cross_entropy(z, y)

    model, asked = Asking(6, 3), True
    with torch.device("meta"):
        spectrum = diag.hessian_spectrum(diag.Snapshot(model, loss_fn, (X, Y)), num_eigenvalues=2)
        assert torch.get_default_device().type == "meta"
    asked = False
    reference = diag.hessian_spectrum(diag.Snapshot(model, F.cross_entropy, (X, Y)), num_eigenvalues=2)
    assert spectrum.eigenvalues == pytest.approx(reference.eigenvalues, rel=1e-4)


def outside_changes_of(change, dtype):
    """What is said of a training whose weights change(weight, step) touches before each step."""
    torch.manual_seed(0)
    model = Scaled().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=["outside_changes"]) as watcher:
        for step in range(8):
            change(model.first.weight, step)
            optimizer.zero_grad()
            F.cross_entropy(model(X.to(dtype)).float(), Y).backward()
            optimizer.step()
    assert not broken(watcher.run)
    (found,) = watcher.run.findings()
    return found.verdict


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_that_are_not_a_number_are_not_changed_from_outside(dtype, turned):
    def poisoned(weight, step):
        """From step 3 on the gradients are not numbers, and so the weights are none after the optimizer's step."""
        if step == 0 and turned:
            weight.data = weight.data.t().contiguous().t()
        if step == 3:
            weight.register_hook(lambda g: g * math.nan)

    assert outside_changes_of(poisoned, dtype).level == "ok"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_changed_by_hand_are_named_in_any_precision(dtype):
    verdict = outside_changes_of(lambda weight, step: weight.data.mul_(1.5) if step > 5 else None, dtype)
    assert verdict.level in ("alarm", "warning") and "first.weight" in verdict.sentence
    often = outside_changes_of(lambda weight, step: weight.data.mul_(1.5) if step else None, dtype)
    assert often.level == "ok" and "7 times in 8 steps" in often.sentence and "taken to be meant" in often.sentence
