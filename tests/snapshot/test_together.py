"""Quantities that share the pass for the logits are, to the last bit, those of passes of their own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diag.errors import MissingQuantity
from diag.snapshot.activations import ActivationListener
from diag.snapshot.forward import _call_heard
from diag.snapshot.inside.attention import AttentionListener
from diag.snapshot.inside.together import LISTENERS, share_the_pass
from diag.snapshot.snapshot import Snapshot


class Attending(nn.Module):
    """Attention, a functional nonlinearity and the same layer twice."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.attention(x, x, x)[0]
        return self.head(F.relu(self.layer(torch.tanh(self.layer(x)))).mean(1))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
    )


def snapshot_of(model, shape, loss_fn=F.cross_entropy):
    torch.manual_seed(1)
    data = [(torch.randn(n, *shape), torch.randint(0, 3, (n,))) for n in (40, 9)]
    return Snapshot(model, loss_fn, data)


def found(snapshot, name):
    try:
        return snapshot.quantity(name)
    except MissingQuantity as error:
        return str(error)


def same(one, other):
    """Equal, with a NaN equal to itself."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dict__"):
        return same(tuple(vars(one).values()), tuple(vars(other).values()))
    return one == other or (one != one and other != other)


@pytest.mark.parametrize(("make", "shape"), [(Attending, (5, 8)), (convolutional, (1, 8, 8))])
@pytest.mark.parametrize("first", ["logits", *LISTENERS])
def test_one_pass_gives_what_several_give(make, shape, first):
    torch.manual_seed(0)
    model = make()
    alone = {name: found(snapshot_of(model, shape), name) for name in ("logits", "losses", *LISTENERS)}
    shared = snapshot_of(model, shape)
    share_the_pass(shared, alone)
    assert same(found(shared, first), alone[first])
    for name, value in alone.items():
        assert same(found(shared, name), value), name
    assert all(listener.complete for listener in shared.listeners.values())


class Linears(TorchFunctionMode):
    """Counts the calls of linear layers."""

    __module__ = "diag.testing"  # modes of others do not see what diag computes

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is F.linear
        return func(*args, **(kwargs or {}))


def test_the_model_is_called_once_a_batch():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    names = ("logits", "activations", "running_statistics")
    for shares, passes in ((False, 3), (True, 1)):
        snapshot = snapshot_of(model, (4,))
        if shares:
            share_the_pass(snapshot, names)
        snapshot.batches  # noqa: B018 (reading the data may call the model)
        with Linears() as seen:
            for name in names:
                snapshot.quantity(name)
        assert seen.calls == 2 * 2 * passes  # two layers, two batches


def test_a_listener_that_breaks_leaves_the_others_their_own_pass():
    snapshot = snapshot_of(convolutional(), (1, 8, 8))
    share_the_pass(snapshot, LISTENERS)

    def broken(batch, outputs):
        raise ZeroDivisionError

    snapshot.listeners["activations"].called = broken
    assert len(snapshot.quantity("logits")) == 49
    assert not any(listener.complete for listener in snapshot.listeners.values())
    assert snapshot.quantity("running_statistics")[0].name == "1"
    assert snapshot.quantity("activations")[-1].name == "output"


def test_what_the_loss_calls_is_not_the_models():
    def loss_fn(outputs, targets):
        return F.cross_entropy(F.relu(F.linear(outputs, torch.eye(3))), targets)

    snapshot = snapshot_of(convolutional(), (1, 8, 8), loss_fn)
    share_the_pass(snapshot, LISTENERS)
    snapshot.quantity("losses")
    assert [(a.name, a.function) for a in snapshot.quantity("activations")] == [
        ("0", "convolution"), ("2", "relu"), ("5", "linear"), ("output", "output"),
    ]  # fmt: skip


@pytest.mark.parametrize("shares", [False, True])
def test_the_model_finds_the_programs_default_device_and_the_listeners_the_host(shares):
    """The meta device stands for an accelerator: what is made on it by mistake has no number."""

    class Asking(nn.BatchNorm1d):
        def forward(self, x):
            if asked and torch.get_default_device().type != "meta":
                raise RuntimeError("another default device")
            return super().forward(x)

    torch.manual_seed(0)
    model, asked = nn.Sequential(Asking(4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), False
    names = ("logits", "activations", "running_statistics")
    alone = {name: snapshot_of(model, (4,)).quantity(name) for name in names}
    snapshot, asked = snapshot_of(model, (4,)), True
    if shares:
        share_the_pass(snapshot, names)
    with torch.device("meta"):
        for name in names:
            assert same(snapshot.quantity(name), alone[name]), name
    assert all(listener.complete for listener in snapshot.listeners.values())


class Counting(TorchFunctionMode):
    """How many functions of torch are called inside."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [ActivationListener, AttentionListener])
def test_what_a_listener_computes_is_not_heard_by_the_others(kind):
    model = Attending().eval()
    (batch, _) = snapshot_of(model, (5, 8)).batches
    listener = kind(model)
    with torch.no_grad(), Counting() as alone:
        batch.forward(model)
    with torch.no_grad(), Counting() as beside, listener.throughout():
        _call_heard(model, [listener], batch)
    assert getattr(listener, "sums", None) or listener.calls  # it did hear the model
    assert alone.calls <= beside.calls <= alone.calls + 12  # statistics would be some ten for each of four layers
