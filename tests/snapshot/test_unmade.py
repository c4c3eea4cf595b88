"""Models that cannot be measured as they are: refused by every instrument with what to do, and left as they are."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.errors import InvalidInput, Unsupported

NEED_THE_MODEL = ("softmax_collapse", "gradient_coherence", "hessian_spectrum", "sharpness", "representation")


def data(n=16):
    torch.manual_seed(0)
    return torch.randn(n, 5), torch.randint(0, 3, (n,))


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.last = torch.jit.script(nn.Linear(5, 8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.inside(x)))


def meta():
    with torch.device("meta"):
        return mlp()


REFUSED = {
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 3)), "call the model once"),
    "meta": (meta, "load the weights"),
    "scripted": (lambda: torch.jit.script(mlp()), "TorchScript"),
    "traced": (lambda: torch.jit.trace(mlp(), torch.ones(2, 5)), "TorchScript"),
    "a scripted part": (Part, "inside is compiled to TorchScript"),
}


@pytest.mark.parametrize("instrument", NEED_THE_MODEL)
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_it_is_refused_with_what_to_do(name, instrument):
    make, reason = REFUSED[name]
    model = make()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(Unsupported, match=reason):
        diag.measure(diag.Snapshot(model, nn.CrossEntropyLoss(), data()), instrument)
    assert [type(m) for m in model.modules()] == kinds  # a lazy layer is still one


def test_a_watch_of_values_elsewhere_is_refused_at_the_door():
    with pytest.raises(InvalidInput, match="meta device"):
        diag.watch(meta())


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8, dtype=torch.cfloat) * 0.3)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last((x.to(torch.cfloat) @ self.weight).abs())


class Converting(nn.Module):
    """Layers in bfloat16 whose inputs the forward converts itself."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8).to(torch.bfloat16), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.to(torch.bfloat16))).float())


@pytest.mark.parametrize("instrument", ["sharpness", "hessian_spectrum", "trust_radius", "opposing_signals"])
@pytest.mark.parametrize(
    ("make", "reason"), [(Complex, "real and imaginary parts"), (Converting, r"measure a copy, model.float\(\)")]
)
def test_parameters_that_cannot_be_moved_in_another_dtype_are_refused(make, reason, instrument):
    snapshot = diag.Snapshot(make(), nn.CrossEntropyLoss(), data(64))
    with pytest.raises(Unsupported, match=reason):
        diag.measure(snapshot, instrument)


@pytest.mark.parametrize("make", [Complex, Converting])
def test_what_needs_one_forward_pass_is_right_for_them(make):
    x, y = data()
    model = make()
    found = diag.softmax_collapse(diag.Snapshot(model, nn.CrossEntropyLoss(), (x, y)))
    assert found.accuracy == pytest.approx((model(x).argmax(1) == y).float().mean().item())


def test_half_precision_throughout_is_measured_in_float32():
    x, y = data()
    model = mlp().to(torch.bfloat16)
    wide = mlp()
    wide.load_state_dict({n: p.float() for n, p in model.state_dict().items()})
    given = x.to(torch.bfloat16)
    found = diag.hessian_spectrum(diag.Snapshot(model, nn.CrossEntropyLoss(), (given, y)), num_eigenvalues=1)
    expected = diag.hessian_spectrum(
        diag.Snapshot(wide, nn.CrossEntropyLoss(), (given.float(), y)), num_eigenvalues=1
    )
    assert found.eigenvalues[0] == pytest.approx(expected.eigenvalues[0], rel=1e-3)
    assert math.isfinite(diag.sharpness(diag.Snapshot(model, nn.CrossEntropyLoss(), (given, y))).worst_case)


class Bag(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.bag, self.last = nn.EmbeddingBag(20, 6, sparse=sparse), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.bag(x))


def test_sparse_gradients_are_those_of_the_dense_layer():
    x, y = torch.randint(0, 20, (16, 5), generator=torch.Generator().manual_seed(0)), data()[1]
    torch.manual_seed(0)
    sparse, dense = Bag(True), Bag(False)
    dense.load_state_dict(sparse.state_dict())
    found, expected = (
        diag.gradient_coherence(diag.Snapshot(m, nn.CrossEntropyLoss(), (x, y))) for m in (sparse, dense)
    )
    assert found.coherence == pytest.approx(expected.coherence, rel=1e-5)
    assert found.m_coherence == pytest.approx(expected.m_coherence, rel=1e-5)
    gradients = diag.Snapshot(sparse, nn.CrossEntropyLoss(), (x, y)).quantity("per_example_gradients")
    losses = F.cross_entropy(dense(x), y, reduction="none")
    own = [torch.autograd.grad(v, list(dense.parameters()), retain_graph=True) for v in losses]
    norms = torch.stack([torch.cat([g.reshape(-1) for g in each]).norm() for each in own])
    torch.testing.assert_close(gradients.norms(), norms.to(gradients.norms()), rtol=1e-4, atol=1e-7)


class OwnLoss(nn.Module):
    """A model that takes its batch by name, whatever the names, and computes its own loss."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(5, 3)

    def forward(self, **batch):
        z = self.last(batch["x"])
        return {"logits": z, "loss": F.cross_entropy(z, batch["labels"])}


def test_labels_stay_in_the_batch_for_a_model_with_its_own_loss():
    x, y = data()
    model = OwnLoss()
    snapshot = diag.Snapshot(model, None, {"x": x, "labels": y})
    assert snapshot.quantity("loss_at")(dict(model.named_parameters())) == pytest.approx(
        F.cross_entropy(model.last(x), y).item(), rel=1e-6
    )
    assert torch.equal(snapshot.quantity("labels"), y)


def test_an_error_of_any_kind_in_the_model_is_explained():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(5, 3)

        def forward(self, x):
            return self.last({"x": x}["y"])

    with pytest.raises(InvalidInput, match="cannot be called on this data"):
        diag.softmax_collapse(diag.Snapshot(Broken(), nn.CrossEntropyLoss(), data()))
