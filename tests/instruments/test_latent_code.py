"""Variational autoencoders: codes that say nothing of their rows, and what nothing but the divergence trains."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.snapshot.loop.arithmetic import LatentFacts, LatentLook
from diag.snapshot.loop.facts import Loop
from diag.watching.observe.loop.formula.latents import gaussian_divergence, latent_look
from diag.watching.observe.loop.formula.parts import parts_of

N, D, K = 32, 10, 3


def by_log_variance(mean, s):
    return -0.5 * (1 + s - mean.pow(2) - s.exp()).sum(1), s.mul(0.5).exp()


def by_twice_the_log_deviation(mean, s):
    return 0.5 * (mean**2 + (2 * s).exp() - 1 - 2 * s).sum(-1), s.exp()


def by_deviation(mean, s):
    deviation = F.softplus(s)
    return 0.5 * (mean * mean + deviation**2 - 2 * deviation.log() - 1).sum(1), deviation


def by_distributions(mean, s):
    own = Normal(mean, s.exp())
    return kl_divergence(own, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(1), own.scale


WRITTEN = [by_log_variance, by_twice_the_log_deviation, by_deviation, by_distributions]


def seen(written, weight, loss):
    """The divergence found in a loss of known means and variances, and these."""
    torch.manual_seed(0)
    x = torch.randn(N, D)
    mean, s = nn.Linear(D, K)(x), nn.Linear(D, K)(x)
    nats, deviation = written(mean, s)
    out = nn.Linear(K, D)(mean + deviation * torch.randn(N, K))
    return gaussian_divergence(parts_of(loss(out, x, nats, weight))), mean, deviation


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize(
    ("loss", "rows"),
    [
        (lambda o, x, k, w: F.mse_loss(o, x, reduction="sum") / N + w * k.mean(), N),
        (lambda o, x, k, w: ((o - x).square().sum(1) + w * k).mean(), N),
        (lambda o, x, k, w: torch.stack([(o - x).square().mean(), w * k.sum()]).sum(), 1),
    ],
    ids=["mean of sums", "by row", "sum"],
)
def test_the_divergence_is_found_however_it_is_written(written, loss, rows):
    found, mean, deviation = seen(written, 3.0, loss)
    assert torch.equal(found.means, mean) and torch.allclose(found.variances, deviation**2, rtol=1e-6)
    assert found.weight == pytest.approx(3.0 / rows, rel=1e-6)


@pytest.mark.parametrize(("ignored", "reduction"), [(0, "mean"), (7, "mean"), (7, "sum")])
def test_the_weight_is_beside_that_of_one_token(ignored, reduction):
    """Of each row T tokens of V kinds are reconstructed, some places of which count in no loss."""
    torch.manual_seed(0)
    T, V = 20, 6
    mean, s = nn.Linear(D, K)(torch.randn(N, D)), nn.Linear(D, K)(torch.randn(N, D))
    nats, deviation = by_log_variance(mean, s)
    logits = nn.Linear(K, T * V)(mean + deviation * torch.randn(N, K)).view(N * T, V)
    tokens = torch.randint(0, V, (N * T,))
    tokens[:ignored] = -100
    parts = parts_of(F.cross_entropy(logits, tokens, reduction=reduction) + nats.mean())
    count = N * T - ignored if reduction == "mean" else 1
    assert latent_look(1, gaussian_divergence(parts), parts).weight == pytest.approx(count / N, rel=1e-6)


class Autoencoder(nn.Module):
    def __init__(self, code=lambda mean, deviation: mean + deviation * torch.randn_like(mean)):
        super().__init__()
        self.body, self.mean, self.s = (
            nn.Sequential(nn.Linear(D, 32), nn.Tanh()),
            nn.Linear(32, K),
            nn.Linear(32, K),
        )
        self.decoder, self.code = nn.Sequential(nn.Linear(K, 32), nn.Tanh(), nn.Linear(32, D)), code

    def forward(self, x):
        h = self.body(x)
        mean, s = self.mean(h), self.s(h)
        return self.decoder(self.code(mean, (0.5 * s).exp())), mean, s


def rows():
    """Rows that three numbers tell apart, to a tenth."""
    return torch.randn(N, K) @ torch.randn(K, D, generator=torch.Generator().manual_seed(1)) + 0.1 * torch.randn(
        N, D
    )


def told(loss, model=None, steps=160):
    torch.manual_seed(0)
    model = model or Autoencoder()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with diag.watch(model, instruments=["latent_code"]) as watcher:
        for _ in range(steps):
            x = rows()
            out, mean, s = model(x)
            optimizer.zero_grad()
            loss(out, x, by_log_variance(mean, s)[0]).backward()
            optimizer.step()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return watcher.findings


def usual(out, x, nats):
    return (0.5 * (out - x).square().sum(1) + nats).mean()


@pytest.mark.parametrize(
    "loss",
    [
        lambda out, x, nats: (0.5 * (out - x).square().sum(1) + 100 * nats).mean(),
        lambda out, x, nats: F.mse_loss(out, x) + nats.sum(),
    ],
    ids=["a factor of 100", "mean beside sum"],
)
def test_a_divergence_that_outweighs_the_reconstruction_is_named(loss):
    (finding,) = told(loss)
    assert (finding.verdict.level, finding.verdict.cause) == ("alarm", Cause.LOSS_TERM_DOMINATES)
    assert finding.verdict.sentence.startswith("The latent code hardly differs between examples")


@pytest.mark.parametrize(
    "code",
    [
        lambda mean, deviation: (mean + deviation * torch.randn_like(mean)).detach(),
        lambda mean, deviation: deviation * torch.randn_like(mean),
        lambda mean, deviation: Normal(mean, deviation).sample(),
    ],
    ids=["detached", "the mean left out", "sample for rsample"],
)
def test_means_that_only_the_divergence_trains_are_named_within_three_steps(code):
    (finding,) = told(usual, Autoencoder(code), steps=8)
    assert (finding.verdict.level, finding.verdict.cause) == ("alarm", Cause.GRAPH_CUT)
    assert finding.first_step <= 3


def test_codes_that_say_something_are_fine():
    assert not told(usual)
    assert not told(lambda out, x, nats: F.mse_loss(out, x) + 1e-3 * nats.mean())


def test_a_divergence_that_weighs_much_and_leaves_the_code_its_rows_is_fine():
    assert not told(lambda out, x, nats: (30 * (0.5 * (out - x).square().sum(1)) + 6 * nats).mean(), steps=120)


def look(step, share, weight=1.0, used=True):
    return LatentLook(step, K, share, 0.0, weight, used)


def judged(*looks, step=900, ended=False):
    return diag.latent_code(loop=Loop(step, latents=LatentFacts(looks), ended=ended)).verdict()


def test_a_collapse_under_the_usual_weight_is_told_late():
    course = look(1, 0.1), look(300, 1e-4), look(900, 1e-4)
    assert judged(*course).level == "ok"  # it may come back
    verdict = judged(*course, ended=True)
    assert (verdict.level, verdict.cause) == ("warning", Cause.EMBEDDINGS_COLLAPSED)


def test_codes_that_have_not_been_learned_yet_are_no_collapse():
    assert judged(look(1, 0.008), look(300, 0.008), look(900, 0.009), ended=True).level == "ok"
    assert judged(look(1, 0.1), look(2, 1e-4, 50.0), look(3, 1e-4, 50.0)).level == "ok"


def test_without_a_divergence_nothing_is_judged():
    assert judged().level == "not_applicable"
    assert not told(lambda out, x, nats: F.mse_loss(out, x), steps=8)


def test_weights_that_are_random_variables_are_no_code():
    """Bayes by backprop: the divergence is that of the weights."""
    mean, s = nn.Parameter(torch.zeros(N, K)), nn.Parameter(torch.zeros(N, K))
    nats, deviation = by_log_variance(mean, s)
    loss = (torch.randn(D, N) @ (mean + deviation * torch.randn(N, K))).square().mean() + nats.mean()
    assert gaussian_divergence(parts_of(loss)) is None


# What the noise is multiplied by


class Drawn(Autoencoder):
    """Its code is draw(mean, s) of one layer's two halves, s the logarithm of the variance."""

    def __init__(self, draw):
        super().__init__()
        self.draw, self.both = draw, nn.Linear(32, 2 * K)

    def forward(self, x):
        mean, s = self.both(self.body(x)).chunk(2, -1)
        return self.decoder(self.draw(mean, s)), mean, s


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda mean, s: mean, "is not drawn"),
        (lambda mean, s: mean + s * torch.randn_like(s), "multiplied by the logarithm"),
        (lambda mean, s: mean + s.exp() * torch.randn_like(s), "multiplied by its variance"),
    ],
    ids=["nothing", "logarithm", "variance"],
)
def test_a_code_that_is_drawn_with_another_spread_is_found(draw, said):
    (finding,) = told(usual, Drawn(draw), steps=12)
    assert finding.verdict.cause == Cause.NOISE_MISPLACED and said in finding.verdict.sentence


@pytest.mark.parametrize(
    "draw",
    [
        lambda mean, s: mean + (0.5 * s).exp() * torch.randn_like(s),
        lambda mean, s: Normal(mean, torch.exp(s / 2)).rsample(),
        lambda mean, s: mean + s.exp().sqrt() * torch.randn_like(s),
    ],
)
def test_a_code_that_is_drawn_with_its_own_variance_is_left_alone(draw):
    assert told(usual, Drawn(draw), steps=12) == ()


def test_slices_that_are_taken_twice_are_not_taken_for_a_code_without_noise():
    class Sliced(Drawn):
        def forward(self, x):
            h = self.both(self.body(x))
            z = h[:, :K] + (0.5 * h[:, K:]).exp() * torch.randn(len(x), K)
            return self.decoder(z), h[:, :K], h[:, K:]

    assert told(usual, Sliced(None), steps=12) == ()
