"""A loss that is the loop's own arithmetic: the model's calls serve as the probe set, without targets."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.errors import DiagError

N, D = 16, 8
LOOKED = ["dead_units", "output_constant", "labels_belong"]


class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode, self.drop = nn.Linear(D, 6), nn.Linear(3, D), nn.Dropout(0.2)

    def forward(self, x):
        mean, log_variance = self.encode(self.drop(x)).chunk(2, 1)
        return self.decode(mean + torch.randn_like(mean) * (log_variance / 2).exp()), mean, log_variance


def elbo(model, _):
    x = torch.randn(N, D)
    out, mean, log_variance = model(x)
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
    return (out - x).abs().pow(1.5).mean() + divergence


def encoder():
    return nn.Sequential(nn.Linear(D, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def views(model, _):
    a, b = (F.normalize(model(torch.randn(N, D)), dim=1) for _ in range(2))
    return -(a * b).sum(1).mean() + (a @ a.T).square().mean()


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D + 1, 16), nn.ReLU(), nn.Linear(16, D))

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None] / 10.0], 1))


def denoise(model, _):
    noise = torch.randn(N, D)
    return (model(noise + 1, torch.randint(0, 10, (N,))) - noise).abs().pow(1.5).mean()


def policy(model, step):
    """Episodes are of different lengths."""
    logits = model(torch.randn(5 + step % 7, D))
    action = torch.distributions.Categorical(logits=logits)
    return -(action.log_prob(action.sample()) * torch.randn(len(logits))).mean()


LOOPS = {
    "vae": (Vae, elbo),
    "views": (encoder, views),
    "denoiser": (Denoiser, denoise),
    "policy": (encoder, policy),
}


def train(model, loss, steps=12):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def watched(make, loss, instruments=LOOKED, **options):
    torch.manual_seed(0)
    model = make()
    with diag.watch(model, instruments=instruments, **options) as watcher:
        train(model, loss)
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return model, watcher


@pytest.mark.parametrize("name", LOOPS)
def test_what_needs_the_outputs_alone_is_measured_and_the_rest_refused(name, helpers):
    make, loss = LOOPS[name]
    model, watcher = watched(make, loss)
    batches = watcher._probe.batches
    assert batches and all(b.targets is None for b in batches) and sum(b.size for b in batches) >= 20
    assert [s for s, _ in watcher.run.series("output_constant")][-2:] == [10, 12]
    assert bool(watcher.run.series("dead_units"))
    assert not watcher.run.series("labels_belong")
    assert "serve as the probe set, without targets" in helpers.texts(watcher.run)
    with pytest.raises(DiagError, match="what training descends is not known"):
        diag.Snapshot(model, watcher._losses.objective, batches).quantity("losses")


@pytest.mark.parametrize("name", LOOPS)
def test_training_is_bit_identical(name):
    make, loss = LOOPS[name]
    model, _ = watched(make, loss, budget=1.0)
    after = torch.rand(1)
    torch.manual_seed(0)
    alone = make()
    train(alone, loss)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), alone.state_dict().values(), strict=True)
    )
    assert torch.equal(after, torch.rand(1))


def test_the_first_call_of_a_step_is_as_good_as_the_last():
    """Calls of one form are mixed; one of another form is left out."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(D, 4), nn.Linear(3, 4)

        def forward(self, x, y=None):
            return self.a(x) if y is None else self.b(y) + self.a(x)

    def alternately(model, step):
        x = torch.randn(N, D)
        return (model(x) if step % 2 else model(x, torch.randn(N, 3))).abs().pow(1.5).mean()

    _, watcher = watched(Two, alternately)
    batches = watcher._probe.batches
    assert len({len(b.args) for b in batches}) == 1 and len(batches) >= 2


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(lambda: nn.Linear(D, 2), (D,)), (lambda: nn.Flatten(0), (N, D))],
    ids=["one example without an axis", "outputs without the axis of examples"],
)
def test_calls_whose_examples_cannot_be_told_are_not_kept(make, inputs):
    def loss(model, _):
        return model(torch.randn(inputs)).abs().pow(1.5).mean()

    _, watcher = watched(lambda: nn.Sequential(nn.Linear(D, D), make()), loss)
    assert not watcher._probe.batches and not watcher.run.series("output_constant")


def test_a_model_that_is_never_called_itself_is_said(helpers):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(D, 2)

        def score(self, x):
            return self.inner(x)

    _, watcher = watched(Parts, lambda m, _: m.score(torch.randn(N, D)).abs().pow(1.5).mean())
    assert not watcher._probe.batches
    assert "only its parts are called" in helpers.texts(watcher.run)


def test_a_collapse_is_found_where_the_loss_is_not_known():
    def together(model, _):
        a, b = (model(torch.randn(N, D)) for _ in range(2))
        return (a.mean(0) - b.mean(0)).abs().pow(1.5).mean() + 10 * (a - a.mean(0)).abs().pow(1.5).mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[2].weight.mul_(1e-5)
        model[2].bias.fill_(50.0)  # which outweighs all that depends on the input
    with diag.watch(model, instruments=LOOKED) as watcher:
        train(model, together, 40)
    assert "output_constant" in {f.verdict.cause for f in watcher.findings}
