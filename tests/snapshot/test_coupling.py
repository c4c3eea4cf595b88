"""A loss with something that is computed over the batch is not cut: noticed by its value or by its gradient."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.curvature import memory as curvature_memory
from diag.curvature.matrices import Hessian
from diag.errors import InvalidInput, MissingQuantity, Unsupported
from diag.snapshot.objective.counting import counted_batches
from diag.snapshot.reading.data import Cut, shared_out
from diag.snapshot.reading.forms import as_batches


class Routed(nn.Module):
    """Experts whose load is balanced over the batch, as Mixtral's are; `give` says where that goes."""

    def __init__(self, give, coefficient=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.router, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.give, self.coefficient = give, coefficient
        self.double()

    def forward(self, x, labels=None):
        h = torch.tanh(self.embed(x))
        p = torch.softmax(3 * self.router(h), -1)
        mixed = (p[..., None] * torch.stack([e(h) for e in self.experts], 1)).sum(1)
        load = F.one_hot(p.argmax(-1), 4).double().mean(0)
        balance = self.coefficient * 4 * (load * p.mean(0)).sum()
        return self.give(self.head(h + mixed), balance, labels)


def with_loss(z, balance, y):
    return {"loss": F.cross_entropy(z, y) + balance, "logits": z}


def of_gradients_alone(z, balance, y):
    return {"loss": F.cross_entropy(z, y) + balance - balance.detach(), "logits": z}


def a_rescaled_loss(z, balance, y):
    return {"loss": F.cross_entropy(z, y) / (1 + balance.detach()), "logits": z}


def beside_the_logits(z, balance, y):
    return z, balance


OWN = {f.__name__: (f, None) for f in (with_loss, of_gradients_alone, a_rescaled_loss)}
GIVEN = {"beside_the_logits": (beside_the_logits, lambda out, y: F.cross_entropy(out[0], y) + out[1])}
CASES = OWN | GIVEN


def problem(name, micro_batch, coefficient=0.1):
    give, loss_fn = CASES[name]
    model = Routed(give, coefficient)
    x, y = torch.randn(24, 6, dtype=torch.float64), torch.randint(0, 3, (24,))
    data = [{"x": x, "labels": y}] if loss_fn is None else (x, y)
    loss = model(x, y)["loss"] if loss_fn is None else loss_fn(model(x), y)
    return diag.Snapshot(model, loss_fn, data, micro_batch=micro_batch), torch.autograd.grad(
        loss, model.parameters()
    )


@pytest.mark.parametrize("coefficient", [0.1, 0.01])
@pytest.mark.parametrize("micro_batch", [1, 3, 8, 23])
@pytest.mark.parametrize("name", CASES)
def test_a_loss_over_the_batch_is_not_cut(name, micro_batch, coefficient):
    snapshot, _ = problem(name, micro_batch, coefficient)
    asked = {
        "gradient": lambda: snapshot.quantity("gradient"),
        "loss_at": lambda: snapshot.quantity("loss_at")(dict(snapshot.model.named_parameters())),
        "losses": lambda: snapshot.quantity("losses"),
        "hessian": lambda: snapshot.quantity("hessian").matvec(torch.ones(1)),
    }
    for ask in asked.values():
        with pytest.raises(Unsupported, match=r"compares the examples of a batch with each other.*micro_batch="):
            ask()


@pytest.mark.parametrize("micro_batch", [None, 24, 100])
@pytest.mark.parametrize("name", CASES)
def test_its_gradient_is_right_where_nothing_is_cut(name, micro_batch):
    snapshot, expected = problem(name, micro_batch)
    for found, own in zip(snapshot.quantity("gradient").values(), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 23])
@pytest.mark.parametrize("name", CASES)
def test_without_what_couples_it_is_cut(name, micro_batch):
    snapshot, expected = problem(name, micro_batch, coefficient=0.0)
    for found, own in zip(snapshot.quantity("gradient").values(), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-12)


def test_what_does_not_fit_in_memory_is_not_cut_behind_the_back(monkeypatch):
    """One batch, which no one asked to be cut; the reference are differences of gradients."""
    monkeypatch.setattr(curvature_memory, "available_memory", lambda device: 20_000)
    snapshot, expected = problem("with_loss", None)
    hessian = snapshot.quantity("hessian")
    assert not hessian.memory_plan.retained
    flat = torch.cat([g.reshape(-1) for g in expected])
    product = hessian @ flat
    model, step = snapshot.model, 1e-5 / float(flat.norm())
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, g in zip(model.parameters(), expected, strict=True):
                p.add_(g, alpha=sign * step)
        batch = snapshot.batches[0]
        loss = model(*batch.args, **batch.kwargs)["loss"]
        ends.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, model.parameters())]))
        with torch.no_grad():
            for p, g in zip(model.parameters(), expected, strict=True):
                p.sub_(g, alpha=sign * step)
    truth = (ends[0] - ends[1]) / (2 * step)
    assert float((product - truth).norm()) < 1e-5 * float(truth.norm())


@pytest.mark.parametrize("coefficient", [0.1, 0.0])
@pytest.mark.parametrize("how", [{"micro_batch": 5}, {"memory": 24_000}])
def test_an_operator_that_is_made_directly_does_not_cut_it_either(how, coefficient):
    snapshot, _ = problem("beside_the_logits", None, coefficient)
    batches = tuple(replace(batch, coupled=False) for batch in snapshot.batches)
    operator = Hessian(snapshot.model, snapshot.batch_loss, batches, **how)
    v = torch.ones(operator.size, dtype=torch.float64)
    if coefficient:
        for _ in range(2):  # the second time as well
            with pytest.raises(Unsupported, match=r"compares the examples of a batch.*without micro_batch="):
                operator @ v
    else:
        assert len(operator.memory_plan.batches) > 1
        truth = Hessian(snapshot.model, snapshot.batch_loss, batches) @ v
        torch.testing.assert_close(operator @ v, truth, rtol=1e-9, atol=1e-12)


class Weighing(nn.Module):
    """Its own loss is a mean by weights that are among its inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 3).double()

    def forward(self, x, weight, labels):
        z = self.head(x)
        each = F.cross_entropy(z, labels, reduction="none")
        return {"loss": (each * weight).sum() / weight.sum(), "logits": z}


def test_weights_that_could_not_be_read_are_named_as_a_reason():
    model = Weighing()
    x, y, weight = torch.randn(24, 6, dtype=torch.float64), torch.randint(0, 3, (24,)), torch.rand(24).double()
    data = [{"x": x, "weight": weight, "labels": y}]
    with pytest.raises(Unsupported, match=r"or weighs them in a way that could not be read.*micro_batch="):
        diag.Snapshot(model, None, data, micro_batch=5).quantity("hessian")
    labels = torch.where(torch.arange(24) % 7 < 3, -100, y)
    operator = Hessian(model.head, F.cross_entropy, as_batches((x, labels)), micro_batch=5)
    with pytest.raises(Unsupported, match=r"or weighs them in a way that could not be read.*micro_batch="):
        operator @ torch.ones(operator.size, dtype=torch.float64)


def test_numbers_in_half_precision_inside_are_not_taken_for_it():
    class Narrow(Routed):
        def forward(self, x, labels=None):
            with torch.autocast("cpu", torch.bfloat16):
                z = self.head(torch.tanh(self.embed(x)))
            return {"loss": F.cross_entropy(z.float(), labels), "logits": z}

    model = Narrow(None).float()
    data = [{"x": torch.randn(24, 6), "labels": torch.randint(0, 3, (24,))}]
    for micro_batch in (None, 3):
        assert not any(
            b.coupled for b in counted_batches(diag.Snapshot(model, None, data, micro_batch=micro_batch))
        )


class OneOfTwo:
    """A rank of two that were given the same rows."""

    world = 2

    def __init__(self, rank):
        self.rank = rank

    def same(self, numbers):
        return True


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("sizes", [(24,), (12, 12), (8, 16), (3, 3, 3, 3, 12)])
def test_what_is_cut_between_ranks_is_known(rank, sizes):
    x = torch.arange(24.0)[:, None]
    batches = tuple(as_batches([(part, part[:, 0]) for part in x.split(sizes)]))
    found, cut = shared_out(batches, OneOfTwo(rank), Cut())
    assert torch.cat([b.targets for b in found]).tolist() == x[12 * rank : 12 * rank + 12, 0].tolist()
    assert (cut.part is not None) == (sizes in ((24,), (8, 16)))
    if cut.part is not None:
        rows = torch.cat([b.targets for b in found[cut.first :]])
        assert cut.part.targets.tolist() == rows[: cut.part.size].tolist()


class Reconstructed(nn.Module):
    """A loss of its own that needs no labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.code = nn.Linear(6, 2).double()

    def forward(self, x, noise, labels=None):
        z = self.code(x + noise)
        return {"loss": (z @ self.code.weight - x).square().mean() if labels is None else None, "code": z}


@pytest.mark.parametrize("micro_batch", [None, 1, 5])
def test_a_dict_without_labels_is_all_the_models_where_it_computes_the_loss(micro_batch):
    model = Reconstructed()
    batch = {"x": torch.randn(12, 6, dtype=torch.float64), "noise": torch.randn(12, 6, dtype=torch.float64)}
    snapshot = diag.Snapshot(model, None, [batch], micro_batch=micro_batch)
    expected = torch.autograd.grad(model(**batch)["loss"], list(model.parameters()))
    for found, own in zip(snapshot.quantity("gradient").values(), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-12)


def test_a_model_that_needs_labels_and_is_given_none_has_no_loss():
    class Silent(Reconstructed):
        def forward(self, x, noise):
            return {"code": self.code(x + noise)}

    batch = {"x": torch.randn(12, 6, dtype=torch.float64), "noise": torch.zeros(12, 6, dtype=torch.float64)}
    with pytest.raises(MissingQuantity, match=r"no loss; give loss_fn=.*or in each batch what the model computes"):
        diag.Snapshot(Silent(), None, [batch]).quantity("gradient")
    with pytest.raises(InvalidInput, match=r"none of \['labels'"):
        diag.Snapshot(Silent(), nn.CrossEntropyLoss(), [batch]).quantity("gradient")
