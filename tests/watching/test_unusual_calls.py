"""Inputs, hooks and checkpoints that some measurement cannot use: every step is recorded, the reason given."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import diag
from diag.errors import InvalidInput, Unsupported
from diag.result import Failed
from diag.watching.measure.probe import Probe

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


def watched(model, given=lambda x: x, steps=6):
    """The run, and the losses of the loop."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    with diag.watch(model, budget=1e-9, instruments="all") as watcher:
        for step in range(steps):
            rows = slice(16 * (step % 3), 16 * (step % 3) + 16)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(given(X[rows])), Y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step == 4:
                watcher.measure()
    return watcher.run, losses


def errors(run):
    return [e.text for e in run.events if e.kind == "internal error"]


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        return torch.sparse.mm(x, self.weight)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_inputs_are_recorded_at_every_step(layout):
    run, losses = watched(Sparse(), lambda x: getattr(x, layout)())
    assert not errors(run)
    assert run.history.loss == pytest.approx(losses)
    assert not [o for _, o in run.outcomes if isinstance(o, Failed)]
    assert any("give them as dense tensors" in e.text for e in run.events)
    with pytest.raises(Unsupported, match="give them as dense tensors"):
        diag.measure(diag.Snapshot(Sparse(), F.cross_entropy, (getattr(X, layout)(), Y)), "softmax_collapse")


def test_what_cannot_be_kept_loses_no_step(monkeypatch):
    monkeypatch.setattr(Probe, "add", lambda *args: 1 / 0)
    run, losses = watched(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    assert run.history.loss == pytest.approx(losses)
    assert any("could not be kept (" in e.text and "division by zero" in e.text for e in run.events)


def test_a_hook_that_changes_the_outputs_is_a_reason_and_no_error():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].register_forward_hook(lambda module, args, output: output / 2)
    run, losses = watched(model)
    assert not errors(run)
    assert run.history.loss == pytest.approx(losses)
    reasons = [o.reason for _, o in run.outcomes if o.instrument == "softmax_collapse"]
    assert reasons and all("Hooks that are not diag's do not fire" in reason for reason in reasons)


def test_hooks_on_saved_tensors_do_not_fire_while_measuring():
    def packed(x):
        counts[0] += 1
        return x

    counts, model = [0], nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.autograd.graph.saved_tensors_hooks(packed, lambda x: x):
        run, losses = watched(model)
        before = counts[0]
        F.cross_entropy(model(X), Y)
    saved_by_a_pass = counts[0] - before
    assert not errors(run) and before == saved_by_a_pass * len(losses)


def test_a_scripted_model_is_refused_and_one_with_a_scripted_part_recorded():
    def made():
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    with pytest.raises(InvalidInput, match="compiled to TorchScript"):
        diag.watch(torch.jit.script(made()))
    run, losses = watched(nn.Sequential(torch.jit.script(made()), nn.Linear(3, 3)))
    assert not errors(run)
    assert run.history.loss == pytest.approx(losses)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.reentrant = reentrant

    def _inner(self, h):
        return torch.tanh(self.middle(h))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.reentrant is None:
            return self.last(self._inner(h))
        return self.last(checkpoint(self._inner, h, use_reentrant=self.reentrant))


def snapshot_of(reentrant):
    torch.manual_seed(0)
    return diag.Snapshot(Checkpointed(reentrant), F.cross_entropy, (X, Y))


def test_the_chain_of_layers_is_that_without_a_checkpoint():
    plain, recomputed = (diag.initialization(snapshot_of(r)) for r in (None, False))
    assert recomputed.layers == plain.layers == ("first", "middle", "last")
    for name in ("kernels", "perpendicular", "parallel", "backward"):
        a, b = getattr(recomputed, name), getattr(plain, name)
        assert all(
            math.isclose(x, y, rel_tol=1e-5) or (math.isnan(x) and math.isnan(y)) for x, y in zip(a, b, strict=True)
        )


@pytest.mark.parametrize(
    "name", ["initialization", "sharpness", "trust_radius", "gradient_flow", "gradient_coherence"]
)
def test_reentrant_checkpoints_are_refused_with_what_to_do(name):
    with pytest.raises(Unsupported, match="recomputes activations with reentrant checkpoints"):
        diag.measure(snapshot_of(True), name)


def test_a_loader_that_was_given_its_batch_sampler_is_followed():
    """Its batch_size is None, as that of a loader that Accelerate has prepared."""
    rows = TensorDataset(X, Y)
    loader = DataLoader(rows, batch_sampler=BatchSampler(RandomSampler(rows), 16, drop_last=False))
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model) as watcher:
        for _ in range(4):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    assert not errors(watcher.run) and len(watcher.run.history) == 12


@pytest.mark.parametrize("name", ["gradient_flow", "gradient_depth", "softmax_collapse", "hessian_spectrum"])
def test_a_model_without_values_is_refused_whatever_is_asked(name):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(Unsupported, match="is on the meta device, which holds no numbers"):
        diag.measure(diag.Snapshot(model, F.cross_entropy, (X, Y)), name)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_cost_no_loss_and_no_error(layout):
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    with diag.watch(model, budget=1e-9) as watcher:
        for _ in range(6):
            rows = [torch.randn(k, 3) for k in (2, 5, 3, 4)]
            outputs = torch.cat(model(torch.nested.nested_tensor(rows, layout=layout)).unbind())
            optimizer.zero_grad()
            loss = F.cross_entropy(outputs, torch.cat(rows).argmax(1))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    run = watcher.run
    assert run.history.loss == pytest.approx(losses, rel=1e-6)
    assert not [e.text for e in run.events if e.kind == "internal error"]
    assert any("called on nested tensors, or gives them; give loss_fn=" in e.text for e in run.events)
