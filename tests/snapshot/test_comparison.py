"""What a loss compares with the labels is what reproduces it: which tensor, which axis, which labels."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.errors import MissingQuantity
from diag.testing import is_one_sentence

N, K, T = 12, 5, 7


def generator():
    return torch.Generator().manual_seed(0)


class Fixed(nn.Module):
    """A layer whose outputs are brought into the form that a case asks for."""

    def __init__(self, form, width=K):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head, self.form = nn.Linear(4, 6), nn.Linear(6, width), form

    def forward(self, x, **labels):
        features = torch.tanh(self.body(x))
        return self.form(features, self.head(features), **labels)


def plain(features, z):
    return z


def dense(shape=(N,)):
    """(x, y): labels of this shape."""
    x = torch.randn(*shape, 4, generator=generator())
    return x, torch.randint(K, shape, generator=generator())


def focal(z, y):
    p = z.softmax(1).gather(1, y[:, None])[:, 0]
    return (-(1 - p).square() * p.log()).mean()


def by_hand(z, y):
    return -z.log_softmax(1)[torch.arange(len(y)), y].mean()


def one_against_all(z, y):
    return F.binary_cross_entropy_with_logits(z, F.one_hot(y, z.shape[1]).float())


PAD = 0
# name -> form of the outputs, shape of the labels, loss, and from (the head's outputs, labels) the logits and the
# labels that the loss counts.
CASES = {
    "cross entropy": (plain, (N,), F.cross_entropy, lambda z, y: (z, y)),
    "a module": (plain, (N,), nn.CrossEntropyLoss(label_smoothing=0.1), lambda z, y: (z, y)),
    "by hand": (plain, (N,), by_hand, lambda z, y: (z, y)),
    "stable": (plain, (N,), diag.stable_cross_entropy, lambda z, y: (z, y)),
    "focal": (plain, (N,), focal, lambda z, y: (z, y)),
    "squared error of one-hot": (
        plain,
        (N,),
        lambda z, y: F.mse_loss(z, 3 * F.one_hot(y, K).float()),
        lambda z, y: (z, y),
    ),
    "one against all": (plain, (N,), one_against_all, lambda z, y: (z, y)),
    "margins": (plain, (N,), F.multi_margin_loss, lambda z, y: (z, y)),
    "log-softmax in the model": (lambda f, z: z.log_softmax(1), (N,), F.nll_loss, lambda z, y: (z, y)),
    "log-softmax in the loss": (plain, (N,), lambda z, y: F.nll_loss(z.log_softmax(1), y), lambda z, y: (z, y)),
    "a temperature": (plain, (N,), lambda z, y: F.cross_entropy(z / 3, y), lambda z, y: (z / 3, y)),
    "two softmaxes": (
        plain,
        (N,),
        lambda z, y: F.cross_entropy(z.softmax(1), y),
        lambda z, y: (z.softmax(1), y),
    ),
    "features and logits": (
        lambda f, z: (f, z),
        (N,),
        lambda o, y: F.cross_entropy(o[1], y),
        lambda z, y: (z, y),
    ),
    "a dict": (
        lambda f, z: {"embedding": f, "out": z},
        (N,),
        lambda o, y: F.cross_entropy(o["out"], y),
        lambda z, y: (z, y),
    ),
    "by hand, features and logits": (lambda f, z: (f, z), (N,), lambda o, y: by_hand(o[1], y), lambda z, y: (z, y)),
    "padding is class 0": (
        plain,
        (N,),
        nn.CrossEntropyLoss(ignore_index=PAD),
        lambda z, y: (z[y != PAD], y[y != PAD]),
    ),
    "padding by hand": (
        plain,
        (N,),
        lambda z, y: (F.cross_entropy(z, y, reduction="none") * (y != PAD)).sum() / (y != PAD).sum(),
        None,  # a mask that is multiplied is not seen in the call: see below
    ),
    "tokens": (
        plain,
        (N, T),
        lambda z, y: F.cross_entropy(z.reshape(-1, K), y.reshape(-1)),
        lambda z, y: (z.reshape(-1, K), y.reshape(-1)),
    ),
    "tokens, classes second": (
        lambda f, z: z.transpose(1, 2),
        (N, T),
        F.cross_entropy,
        lambda z, y: (z.reshape(-1, K), y.reshape(-1)),
    ),
    "images, classes second": (
        lambda f, z: z.movedim(-1, 1),
        (3, K, K),  # as large as the classes
        F.cross_entropy,
        lambda z, y: (z.reshape(-1, K), y.reshape(-1)),
    ),
    "images by hand": (
        lambda f, z: z.movedim(-1, 1),
        (3, K, K),
        lambda z, y: -z.log_softmax(1).gather(1, y[:, None]).mean(),
        lambda z, y: (z.reshape(-1, K), y.reshape(-1)),
    ),
    "shifted tokens": (
        plain,
        (N, T),
        lambda z, y: F.cross_entropy(z[:, :-1].reshape(-1, K), y[:, 1:].reshape(-1)),
        lambda z, y: (z[:, :-1].reshape(-1, K), y[:, 1:].reshape(-1)),
    ),
    "tokens behind a mask": (
        plain,
        (N, T),
        lambda z, y: F.cross_entropy(z[y > 1], y[y > 1]),
        lambda z, y: (z[y > 1], y[y > 1]),
    ),
}


def snapshot_of(name, **options):
    form, shape, loss_fn, _ = CASES[name]
    return diag.Snapshot(Fixed(form), loss_fn, dense(shape), **options)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case[3] is not None])
def test_logits_labels_and_features_are_what_the_loss_compares(name):
    _, shape, _, expected = CASES[name]
    snapshot = snapshot_of(name)
    x, y = dense(shape)
    features = torch.tanh(snapshot.model.body(x)).detach()
    z = snapshot.model.head(features).detach()
    logits, labels = expected(z, y)
    assert torch.equal(snapshot.quantity("labels"), labels)
    torch.testing.assert_close(snapshot.quantity("logits"), logits, rtol=1e-5, atol=1e-6)
    rows = expected(torch.arange(y.numel()).view(*y.shape, 1).expand(*y.shape, K).double(), y)[0][:, 0]
    if name not in ("a temperature", "two softmaxes"):
        rows = rows.long()
        torch.testing.assert_close(snapshot.quantity("features"), features.reshape(-1, 6)[rows])
    else:
        torch.testing.assert_close(snapshot.quantity("features"), features)
    right = (logits.argmax(1) == labels).float().mean()
    scores = snapshot.quantity("interpolation").evaluate(snapshot.model.state_dict())
    if name not in ("tokens behind a mask", "shifted tokens"):
        assert 1 - scores.errors.mean() == pytest.approx(float(right), abs=0.35)


@pytest.mark.parametrize("name", ["cross entropy", "by hand", "tokens", "tokens, classes second", "shifted tokens"])
def test_the_gradients_of_the_logits_are_those_of_each_label_alone(name):
    snapshot = snapshot_of(name)
    z, y = snapshot.quantity("logits"), snapshot.quantity("labels")
    expected = z.softmax(1) - F.one_hot(y, K)
    torch.testing.assert_close(snapshot.quantity("logit_gradients"), expected, rtol=1e-4, atol=1e-6)


def supervised_contrastive(z, y):
    z = F.normalize(z, dim=1)
    similar = (z @ z.T / 0.2).fill_diagonal_(-1e9).log_softmax(1)
    same = (y[:, None] == y[None]).fill_diagonal_(False)
    return -(similar * same).sum() / same.sum()


def info_nce(z, y):
    z = F.normalize(z, dim=1)
    return F.cross_entropy(z @ z.flip(0).T, torch.arange(len(z)))


REFUSED = {
    "a contrastive loss by hand": (plain, supervised_contrastive, None, "does not behave like a loss of classes"),
    "a contrastive loss": (plain, info_nce, None, "compares the examples with each other"),
    "counts": (
        lambda f, z: z[:, 0],
        F.poisson_nll_loss,
        None,
        "the loss is poisson_nll_loss, which compares the outputs with other things than class numbers",
    ),
    "one logit": (
        lambda f, z: z[:, :1],
        lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], (y > 2).float()),
        None,
        "the loss is binary_cross_entropy_with_logits",
    ),
    "ranks": (lambda f, z: z[:, 0], lambda z, y: F.mse_loss(z, y.float()), None, "the loss is mse_loss"),
    "two heads": (
        lambda f, z: (z, 2 * z),
        lambda o, y: F.cross_entropy(o[0], y) + F.cross_entropy(o[1], y),
        None,
        "several comparisons with labels",
    ),
    "no loss, and both axes fit": (lambda f, z: z.view(N, K, 1).expand(N, K, K), None, (N, K), "along which axis"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_nothing_reproduces_the_loss_nothing_that_needs_labels_speaks(name):
    form, loss_fn, shape, text = REFUSED[name]
    x, y = dense()
    y = y if shape is None else torch.randint(K, shape, generator=generator())
    snapshot = diag.Snapshot(Fixed(form), loss_fn, (x, y))
    for quantity in ("labels", "logits"):
        with pytest.raises(MissingQuantity, match=text) as caught:
            snapshot.quantity(quantity)
        assert is_one_sentence(str(caught.value))
    for instrument in (diag.softmax_collapse, diag.neural_collapse):
        with pytest.raises(MissingQuantity):
            instrument(snapshot)


def test_double_softmax_is_judged_on_what_enters_the_loss():
    """Probabilities as logits are never more than one apart, so nothing collapses, however sure the network is."""
    model, (x, _) = Fixed(plain), dense()
    with torch.no_grad():
        model.head.weight.mul_(1e3)
    sure = model(x).argmax(1)
    collapsed = diag.softmax_collapse(diag.Snapshot(model, F.cross_entropy, (x, sure)))
    twice = diag.softmax_collapse(diag.Snapshot(model, lambda z, y: F.cross_entropy(z.softmax(1), y), (x, sure)))
    assert collapsed.collapsed > 0.5 and twice.collapsed == 0
    assert max(twice.margins) < 1


def test_padding_that_the_loss_ignores_does_not_collapse():
    """70 % of the labels are PAD, of which the network is sure; the true count is 0 of the others."""
    torch.manual_seed(0)
    x = torch.randn(120, 4)
    y = torch.where(torch.arange(120) < 84, 0, 1 + torch.arange(120) % 3)
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([60.0, 0.0, 0.0, 0.0]))
    ignored = diag.softmax_collapse(diag.Snapshot(model, nn.CrossEntropyLoss(ignore_index=0), (x, y)))
    assert (ignored.collapsed, len(ignored.margins)) == (0.0, 36)
    assert diag.softmax_collapse(diag.Snapshot(model, nn.CrossEntropyLoss(), (x, y))).collapsed == 0.7
