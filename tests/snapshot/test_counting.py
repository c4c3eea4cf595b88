"""One objective, the same whatever the batching: what counts is summed and divided once."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
import diag.registry
from diag.errors import DiagError, Unsupported
from diag.snapshot.objective.counting import counted_batches

V, N, T = 7, 20, 9
WEIGHTS = torch.tensor([0.1, 3.0, 0.5, 1.0, 2.0, 0.2, 1.0], dtype=torch.float64)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.head = nn.Embedding(V, 5), nn.Linear(5, V)
        self.double()

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


def ragged(ignored):
    """(ids, labels) whose sequences have 1 to T labels that count; two of them have none."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(V, (N, T), generator=generator)
    lengths = torch.randint(1, T + 1, (N,), generator=generator)
    lengths[[4, 11]] = 0
    labels = torch.where(ids == 0, 1, ids.roll(1, 1)).clamp_min(1)
    labels[torch.arange(T) >= lengths[:, None]] = ignored
    return ids, labels


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def tokenwise(z, y, **settings):
    return F.cross_entropy(z.reshape(-1, V), y.reshape(-1), **settings)


def masked(z, y):
    mask = (y != -1).double()
    each = F.cross_entropy(z.reshape(-1, V), y.clamp_min(0).reshape(-1), reduction="none").view_as(mask)
    return (each * mask).sum() / mask.sum()


def summed(z, y):
    return tokenwise(z, y, reduction="sum", ignore_index=-1) / (y != -1).sum()


CASES = {
    "-100": (tokenwise, -100),
    "padding": (lambda z, y: tokenwise(z, y, ignore_index=0), 0),
    "class weights": (lambda z, y: tokenwise(z, y, weight=WEIGHTS.to(z.dtype)), -100),
    "a mask": (masked, -1),
    "a sum by hand": (summed, -1),
}


def everything(name, micro_batch=None):
    """(model, the snapshot, and the mean over all that counts, as a function of the parameters)."""
    loss_fn, ignored = CASES[name]
    model, data = Tokens(), ragged(ignored)
    call = lambda values: torch.func.functional_call(model, values, (data[0],))  # noqa: E731
    return model, diag.Snapshot(model, loss_fn, data, micro_batch=micro_batch), lambda v: loss_fn(call(v), data[1])


BATCHINGS = {
    "-100": (None, 7, 3, 1),
    "padding": (None, 6),
    "class weights": (None, 7, 1),
    "a mask": (None, 7, 1),
    "a sum by hand": (None, 3),
}


@pytest.mark.parametrize(("name", "size"), [(n, s) for n in CASES for s in BATCHINGS.get(n, (None,))])
def test_every_quantity_is_of_the_one_objective(name, size):
    model, snapshot, objective = everything(name, size)
    values = dict(model.named_parameters())
    loss = objective(values)
    gradient = flat(torch.autograd.grad(loss, list(values.values())))
    found = flat(snapshot.quantity("gradient").values())
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)
    assert snapshot.quantity("loss_at")(values) == pytest.approx(loss.item(), rel=1e-10)
    assert snapshot.quantity("losses").mean().item() == pytest.approx(loss.item(), rel=1e-10)
    losses_at = snapshot.quantity("losses_at")
    each, slope = losses_at.step(losses_at.center)
    assert each.mean().item() == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(slope, gradient, rtol=1e-9, atol=1e-12)
    path = snapshot.quantity("interpolation")
    assert path.evaluate(model.state_dict()).losses.mean().item() == pytest.approx(loss.item(), rel=1e-10)


@pytest.mark.parametrize(("name", "size"), [("-100", None), ("-100", 3), ("class weights", 7), ("a mask", None)])
def test_curvature_is_of_the_one_objective(name, size):
    model, snapshot, objective = everything(name, size)
    names, shapes = [n for n, _ in model.named_parameters()], [p.shape for p in model.parameters()]

    def of(vector):
        parts = vector.split([s.numel() for s in shapes])
        return objective({n: v.view(s) for n, v, s in zip(names, parts, shapes, strict=True)})

    at = flat(model.parameters()).detach()
    dense = torch.autograd.functional.hessian(of, at)
    spectrum = diag.hessian_spectrum(snapshot, num_eigenvalues=2)
    assert spectrum.eigenvalues[0] == pytest.approx(torch.linalg.eigvalsh(dense)[-1].item(), rel=1e-3)
    v = torch.randn(len(at), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(snapshot.quantity("hessian") @ v, dense @ v, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "size"), [("-100", None), ("-100", 7), ("class weights", None), ("padding", 6), ("a mask", 7)]
)
def test_the_gradients_of_examples_make_up_that_of_the_objective(name, size):
    """Rows without a label that counts are no rows to remove: their gradient is zero."""
    model, snapshot, objective = everything(name, size)
    whole = torch.cat(
        [
            g.reshape(-1)
            for g in torch.autograd.grad(objective(dict(model.named_parameters())), list(model.parameters()))
        ]
    )
    gradients = snapshot.quantity("per_example_gradients")
    torch.testing.assert_close(gradients.mean().to(whole), whole, rtol=1e-6, atol=1e-9)
    assert gradients.norms()[[4, 11]].tolist() == [0.0, 0.0]


def test_sharpness_is_of_the_one_objective():
    """SAM's step on the mean over tokens, by hand, and the same in batches of three."""
    model, whole, objective = everything("-100")
    values = dict(model.named_parameters())
    gradient = torch.autograd.grad(objective(values), list(values.values()))
    length = flat(gradient).norm()
    rho = 0.05
    moved = {n: p + rho * g / length for (n, p), g in zip(values.items(), gradient, strict=True)}
    expected = (objective(moved) - objective(values)).item()
    for snapshot in (whole, everything("-100", 3)[1]):
        assert diag.sharpness(snapshot, rho=rho).one_step == pytest.approx(expected, rel=1e-6)


def test_groups_are_objectives_of_their_own():
    _, snapshot, _ = everything("-100")
    losses_at = snapshot.quantity("losses_at")
    data = ragged(-100)
    z = Tokens()(data[0]).detach()
    for group in losses_at.groups(6, seed=0):
        rows = torch.cat([b.args[0] for b in group._batches])
        numbers = [(data[0] == row).all(1).nonzero()[0, 0].item() for row in rows]
        expected = tokenwise(z[numbers], data[1][numbers]).item()
        assert group(group.center).mean().item() == pytest.approx(expected, rel=1e-9)


def test_the_ends_of_a_path_are_the_networks_own_losses():
    model, snapshot, objective = everything("-100", 3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5), dtype=p.dtype))
    result = diag.mode_connectivity(snapshot.replace(other=other.state_dict()))
    ends = [objective(dict(m.named_parameters())).item() for m in (model, other)]
    assert [result.losses[0], result.losses[-1]] == pytest.approx(ends, rel=1e-9)


def test_what_examples_count_is_told_where_only_later_batches_have_a_mask():
    """Every example of the first batch counts as much as every other, and more than those of the second."""
    model, (ids, labels) = Tokens(), ragged(-1)
    labels[:8] = ids[:8].clamp_min(1)
    snapshot = diag.Snapshot(model, masked, [(ids[:8], labels[:8]), (ids[8:], labels[8:])])
    expected = flat(torch.autograd.grad(masked(model(ids), labels), list(model.parameters())))
    torch.testing.assert_close(flat(snapshot.quantity("gradient").values()), expected, rtol=1e-9, atol=1e-12)


def test_squared_errors_of_batches_of_many_lengths():
    """Elements are what counts."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    batches = [(torch.randn(4, t, 3).double(), torch.randn(4, t, 2).double()) for t in (2, 5, 9)]
    snapshot = diag.Snapshot(model, nn.MSELoss(), batches)
    joined = [torch.cat([b[i].reshape(-1, b[i].shape[-1]) for b in batches]) for i in (0, 1)]
    loss = F.mse_loss(model(joined[0]), joined[1])
    expected = flat(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(flat(snapshot.quantity("gradient").values()), expected)
    assert snapshot.quantity("losses").mean().item() == pytest.approx(loss.item(), rel=1e-10)


def test_where_all_examples_count_alike_the_targets_are_left_as_they_are():
    model, data = Tokens(), (torch.randint(V, (6, T)), torch.randint(V, (6, T)))
    snapshot = diag.Snapshot(model, tokenwise, data)
    assert counted_batches(snapshot) == snapshot.batches


def contrastive(z, y):
    z = F.normalize(z.flatten(1), dim=1)
    return F.cross_entropy(z @ z.flip(0).T, torch.arange(len(z)))


def test_a_loss_that_couples_examples_is_measured_in_its_batches_or_refused():
    model, data = Tokens(), ragged(-100)
    batches = [(data[0][i : i + 5], data[1][i : i + 5]) for i in range(0, N, 5)]
    snapshot = diag.Snapshot(model, contrastive, batches)
    loss = torch.stack([contrastive(model(x), y) for x, y in batches]).mean()
    expected = torch.cat(
        [
            g.reshape(-1)
            for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            if g is not None
        ]
    )
    torch.testing.assert_close(torch.cat([g.reshape(-1) for g in snapshot.quantity("gradient").values()]), expected)
    for name in ("losses", "losses_at", "per_example_gradients"):
        with pytest.raises(Unsupported, match="compares the examples of a batch"):
            snapshot.quantity(name)
    assert isinstance(diag.registry.attempt(snapshot, diag.registry.find("sharpness")).reason, str)


def test_a_sum_is_refused_where_a_mean_is_needed():
    model, data = Tokens(), ragged(-100)
    snapshot = diag.Snapshot(model, lambda z, y: tokenwise(z, y, reduction="sum"), data)
    with pytest.raises(DiagError, match="sum"):
        snapshot.quantity("per_example_gradients")
