"""Losses written out by hand: sides that are broadcast against each other, a softmax or sigmoid applied twice."""

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.watching.observe.loop.formula.arithmetic import expansions

N, D = 16, 5
ACTIONS = torch.arange(N) % 3


def told(loss, model=None, steps=6, closure=False):
    """What is said of a training on loss(outputs (N, 3), targets (N,))."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(D, 12), nn.Tanh(), nn.Linear(12, 3))
    optimizer = (
        torch.optim.LBFGS(model.parameters(), 1e-2, 2) if closure else torch.optim.SGD(model.parameters(), 1e-2)
    )
    with diag.watch(model, instruments=["loss_call"]) as watcher:
        for _ in range(steps):
            x, y = torch.randn(N, D), torch.randn(N)

            def evaluate(x=x, y=y):
                optimizer.zero_grad()
                value = loss(model(x), y)
                value.backward()
                return value

            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return watcher.findings


def pinball(error):
    return torch.maximum(0.1 * error, -0.9 * error).mean()


def by_policy(p, weights):
    return -(Categorical(logits=p).log_prob(ACTIONS) * weights).mean()


EVERY_WITH_EVERY = {
    "three columns of a regression, summed, and a penalty": lambda p, y: (
        sum(((p[:, k : k + 1] - y) ** 2).mean() for k in range(3)) / 3 + 0.1 * p.pow(2).sum()
    ),
    "a quantile": lambda p, y: pinball(y[:, None] - p[:, 1]),
    "huber": lambda p, y: 0.3 * (p[:, :1] - y).abs().clamp(max=1).mean() + p.pow(2).mean(),
    "advantages with an axis too many": lambda p, y: by_policy(p, y[:, None]),
    "advantages that were broadcast before": lambda p, y: by_policy(p, y - p[:, :1].detach()) + p.pow(2).mean(),
    "weights of examples": lambda p, y: (F.cross_entropy(p, ACTIONS, reduction="none") * y.abs()[:, None]).mean(),
    "weights, divided by their sum": lambda p, y: (
        (F.cross_entropy(p, ACTIONS, reduction="none") * y.abs()[:, None]).sum() / y.abs().sum()
    ),
}


@pytest.mark.parametrize("loss", EVERY_WITH_EVERY.values(), ids=EVERY_WITH_EVERY.keys())
@pytest.mark.parametrize("closure", [False, True], ids=["loop", "closure"])
def test_sides_that_are_broadcast_are_named_at_the_first_steps(loss, closure):
    (finding,) = told(loss, closure=closure)
    assert (finding.verdict.level, finding.verdict.cause) == ("alarm", Cause.TARGETS_BROADCAST)
    assert finding.first_step <= 3
    assert any(shape in finding.verdict.sentence for shape in (f"({N}, 1)", f"({N}, {N})"))


def test_the_root_of_a_mean_and_an_axis_that_the_model_puts_in():
    p, y = nn.Linear(D, 1)(torch.randn(N, D)), torch.randn(N)
    assert expansions(((p - y) ** 2).mean().sqrt()) == [("difference", (N, 1), (N,))]
    model_output = p.squeeze(1).unsqueeze(1)
    assert not expansions(((model_output - y) ** 2).mean())  # in the loop, such an axis is meant
    outputs = {model_output.grad_fn._sequence_nr()}
    assert expansions(((model_output - y) ** 2).mean(), outputs) == [("difference", (N, 1), (N,))]


@pytest.mark.parametrize("squeezed", [False, True])
def test_a_difference_of_which_nothing_is_kept_is_told_by_its_shapes(squeezed):
    """Of a linear layer's one output an example, so that a matrix of the network's own is left alone."""
    p, y = nn.Linear(D, 1)(torch.randn(N, D)), torch.randn(N)
    p, y = (p.squeeze(1), y[:, None]) if squeezed else (p, y)
    assert expansions((p - y).mean()) == [("difference", tuple(p.shape), tuple(y.shape))]
    assert not expansions((p.tanh() - y).mean()) and not expansions((p[:, None] - y).mean())


MEANT = {
    "equal shapes": lambda p, y: ((p[:, 0] - y) ** 2).mean() + p.pow(2).mean(),
    "quantiles": lambda p, y: pinball(y[:, None] - p),
    "policy gradient": lambda p, y: by_policy(p, y),
    "pairs of the network's own": lambda p, y: (p[:, :1] - p[:, 0]).abs().mean() + (p[:, 1] - y).abs().mean(),
    "an axis put in by hand": lambda p, y: pinball(p[:, 0].unsqueeze(1) - y),
    "a matrix of targets": lambda p, y: ((p[:, :1] - torch.randn(N, N)) ** 2).mean(),
    "a factor for each pair": lambda p, y: (p[:, 0] * torch.randn(N, N)).mean(),
    "a mean over one axis only": lambda p, y: ((p[:, :1] - y) ** 2).mean(1).amin(),
    "one target for all": lambda p, y: ((p[:, :1] - y[:1]) ** 2).mean(),
}


@pytest.mark.parametrize("loss", MEANT.values(), ids=MEANT.keys())
def test_what_is_meant_in_pairs_and_equal_shapes_are_left_alone(loss):
    assert not told(loss)


@pytest.mark.parametrize("loss", [EVERY_WITH_EVERY["a quantile"], EVERY_WITH_EVERY["huber"]])
def test_a_difference_whose_numbers_are_not_at_hand_is_left_alone(loss):
    """Of float16 rounding the sum of row and column cannot be told from a matrix; nor without what was kept."""
    p, y = torch.randn(N, 3, requires_grad=True) * 1.0, torch.randn(N)
    assert expansions(loss(p, y))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.to(torch.float16), lambda t: t.float()):
        assert not expansions(loss(p, y))


class Probabilities(nn.Sequential):
    def __init__(self, end):
        super().__init__(nn.Linear(D, 12), nn.Tanh(), nn.Linear(12, 3), end)


@pytest.mark.parametrize(
    ("end", "loss", "cause"),
    [
        (nn.Softmax(-1), lambda p, y: by_policy(p, y), Cause.DOUBLE_SOFTMAX),
        (nn.Softmax(1), lambda p, y: -(p.log_softmax(1)[torch.arange(N), ACTIONS]).mean(), Cause.DOUBLE_SOFTMAX),
        (nn.Sigmoid(), lambda p, y: -(p.sigmoid() + 1e-6).log().mean(), Cause.DOUBLE_SIGMOID),
        (nn.Sigmoid(), lambda p, y: -(p.reshape(-1, 1).sigmoid() + 1e-6).log().mean(), Cause.DOUBLE_SIGMOID),
        (
            nn.Sequential(nn.Sigmoid(), nn.Flatten(0)),
            lambda p, y: -(p.sigmoid() + 1e-6).log().mean(),
            Cause.DOUBLE_SIGMOID,
        ),
        (nn.Sigmoid(), lambda p, y: (F.softplus(p) - (y > 0)[:, None] * p).mean(), Cause.DOUBLE_SIGMOID),
        (nn.Sigmoid(), lambda p, y: F.softplus(-p).mean(), Cause.DOUBLE_SIGMOID),
    ],
    ids=[
        "policy",
        "cross-entropy by hand",
        "sigmoid",
        "reshaped in the loop",
        "reshaped in the model",
        "logits",
        "game",
    ],
)
def test_probabilities_that_are_made_probabilities_again(end, loss, cause):
    (finding,) = told(loss, Probabilities(end))
    assert finding.verdict.cause == cause and finding.first_step <= 3


@pytest.mark.parametrize(
    ("end", "loss"),
    [
        (nn.Softmax(-1), lambda p, y: -(Categorical(probs=p).log_prob(ACTIONS) * y).mean()),
        (nn.Softmax(0), lambda p, y: by_policy(p, y)),  # over the examples: another thing
        (nn.Softmax(-1), lambda p, y: -((p / 0.1).log_softmax(1)[:, 0]).mean()),  # sharpened on purpose
        (nn.Identity(), lambda p, y: by_policy(p, y)),
        (nn.Sigmoid(), lambda p, y: -Bernoulli(probs=p).log_prob((p > 0.5).float()).mean()),
        (nn.Identity(), lambda p, y: (F.softplus(p) - (y > 0)[:, None] * p).mean()),
        (nn.Sigmoid(), lambda p, y: (F.softplus(p) - y[:, None].detach()).square().mean()),
    ],
    ids=["probs=", "another axis", "sharpened", "logits", "bernoulli", "softened logits", "softened"],
)
def test_probabilities_that_are_taken_as_such(end, loss):
    assert not told(loss, Probabilities(end))


def distilled(teacher, temperature=3.0, function=None):
    """Of a teacher whose logits have this size."""

    def loss(p, y):
        target = (teacher * torch.randn(N, 3) / temperature).softmax(1)
        return function(p, target) if function else F.kl_div(p.log_softmax(1), target, reduction="batchmean")

    return loss


@pytest.mark.parametrize(
    "loss",
    [distilled(0.2), distilled(5.0, 1000.0), distilled(0.2, function=F.cross_entropy)],
    ids=["an untrained teacher", "a high temperature", "cross-entropy"],
)
def test_targets_that_prefer_no_class_are_named(loss):
    (finding,) = told(loss)
    assert (finding.verdict.level, finding.verdict.cause) == ("warning", Cause.TARGETS_ALL_EQUAL)
    assert finding.first_step <= 3


@pytest.mark.parametrize(
    "loss",
    [
        distilled(3.0),
        distilled(5.0, 20.0),  # the logits are matched, as at high temperatures on purpose
        lambda p, y: F.cross_entropy(p, 0.9 * F.one_hot(ACTIONS, 3) + 0.1 / 3),
        lambda p, y: F.kl_div(p.log_softmax(1), torch.rand(N, 3), reduction="sum"),  # no distributions
    ],
    ids=["a teacher", "temperature 20", "smoothed labels", "no distributions"],
)
def test_targets_that_prefer_classes_are_fine(loss):
    assert not told(loss)
