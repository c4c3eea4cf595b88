"""Losses written by hand: what their formula leaves out, turns round or takes together, and the same done right."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.instruments.loss.formula_rules import FORMULA_RULES
from diag.snapshot.loop.arithmetic import FormulaFacts, Odd, Oddity
from diag.snapshot.loop.facts import Loop

N, D = 32, 5


def net(outputs=2, end=None):
    layers = [nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, outputs)]
    return nn.Sequential(*layers, *([end] if end is not None else []))


def told(loss, model=None, steps=4, rate=1e-3, optimizer=None, data=None):
    """The findings of `loss_formula` on a few steps of loss(model, x, y)."""
    torch.manual_seed(0)
    model = model or net()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), rate)
    with diag.watch(model, instruments=["loss_formula"]) as watcher:
        for _ in range(steps):
            x = torch.randn(N, D)
            optimizer.zero_grad()
            loss(model, *(data() if data else (x, x[:, :2].sum(1) + 0.3 * torch.randn(N)))).backward()
            optimizer.step()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return [(f.verdict.cause, f.verdict.sentence) for f in watcher.findings]


def gaussian(exponent, term, weight=0.5):
    def loss(model, x, y):
        m, s = model(x).unbind(1)
        return weight * ((term * s if term else 0.0) + torch.exp(exponent * s) * (y - m) ** 2).mean()

    return loss


def by_deviation(log):
    def loss(model, x, y):
        out = model(x)
        m, sd = out[:, 0], F.softplus(out[:, 1]) + 1e-3
        return ((log * sd.log() if log else 0.0) + 0.5 * ((y - m) / sd) ** 2).mean()

    return loss


def by_distribution(model, x, y):
    m, s = model(x).unbind(1)
    return -Normal(m, s.exp()).log_prob(y).mean()


@pytest.mark.parametrize(
    "loss",
    [gaussian(-1, 0), gaussian(-2, 0, 3.0), by_deviation(0)],
    ids=["variance", "deviation", "softplus"],
)
def test_a_scale_that_nothing_pays_for_is_found(loss):
    ((cause, sentence),) = told(loss)
    assert cause == Cause.LOSS_UNBOUNDED and "enters the loss nowhere else" in sentence


@pytest.mark.parametrize("loss", [gaussian(1, 1), gaussian(-1, -1), by_deviation(-1)])
def test_a_scale_whose_logarithm_has_the_wrong_sign_is_found(loss):
    ((cause, sentence),) = told(loss)
    assert cause == Cause.LOSS_UNBOUNDED and "fall together" in sentence


@pytest.mark.parametrize("loss", [gaussian(-1, 1), gaussian(-2, 2), by_deviation(1), by_distribution])
def test_a_gaussian_likelihood_is_left_alone(loss):
    assert told(loss) == []


def test_a_variance_that_a_clamp_holds_is_found():
    def loss(model, x, y):
        m, v = model(x).unbind(1)
        v = v.clamp(min=1e-6)
        return (0.5 * v.log() + 0.5 * (y - m) ** 2 / v).mean()

    ((cause, sentence),) = told(loss)
    assert cause == Cause.LOSS_UNBOUNDED and "a clamp keeps them at" in sentence


def test_relative_errors_and_ratios_are_left_alone():
    def relative(model, x, y):
        m = model(x)[:, 0]
        return ((y - m) ** 2 / (m**2 + 1)).mean()

    def ratio(model, x, y):
        m, s = model(x).unbind(1)
        return (m - y).square().sum() / s.square().sum()

    assert told(relative) == [] and told(ratio) == []


class Weighted(nn.Module):
    """Two tasks with learned weights."""

    def __init__(self):
        super().__init__()
        self.body, self.s = net(2), nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("term", [0.0, 0.5])
def test_learned_weights_of_tasks_need_their_term(term):
    model = Weighted()

    def loss(model, x, y):
        out, w = model(x), torch.exp(-model.s)
        both = w[0] * F.mse_loss(out[:, 0], y) + w[1] * F.l1_loss(out[:, 1], y)
        return both + term * model.s.sum() if term else both

    found = told(loss, model)
    assert [cause for cause, _ in found] == ([] if term else [Cause.LOSS_UNBOUNDED])


# Flows


class Flow(nn.Module):
    """Coupling layers over two columns, in the way of a mask or by halves."""

    def __init__(self, alternate=True, layers=4):
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(layers)
        )
        self.alternate = alternate

    def forward(self, x):
        total = torch.zeros(len(x))
        for i, layer in enumerate(self.nets):
            m = torch.tensor([1.0, 0.0] if i % 2 == 0 or not self.alternate else [0.0, 1.0])
            a, t = layer(x * m).chunk(2, -1)
            a, t = torch.tanh(a) * (1 - m), t * (1 - m)
            x, total = x * torch.exp(a) + t, total + a.sum(-1)
        return x, total


def likelihood(sign):
    def loss(model, x, _):
        z, total = model(x[:, :2])
        return (0.5 * z**2 + 0.5 * math.log(2 * math.pi)).sum(-1).mean() - sign * total.mean()

    return loss


def without(model, x, _):
    return 0.5 * model(x[:, :2])[0].square().sum(-1).mean()


def test_a_flow_needs_its_determinant_with_the_right_sign():
    assert told(likelihood(1), Flow()) == []
    ((cause, sentence),) = told(without, Flow())
    assert cause == Cause.LOSS_UNBOUNDED and "log-determinant is missing" in sentence and "4 exp" in sentence
    ((cause, sentence),) = told(likelihood(-1), Flow())
    assert cause == Cause.LOSS_UNBOUNDED and "wrong sign" in sentence


def test_a_column_that_no_layer_scales_is_found():
    ((cause, sentence),) = told(likelihood(1), Flow(alternate=False))
    assert cause == Cause.AXES_MIXED and sentence.startswith("Column 0 is never scaled: in all 4 layers")


def test_a_regression_with_exponential_gates_is_no_flow():
    assert told(lambda model, x, y: (model(x[:, :2])[0] - y[:, None]).square().mean(), Flow()) == []


# Reductions and masks


def test_the_square_of_a_mean_is_found_and_a_mean_of_squares_left_alone():
    ((cause, sentence),) = told(lambda model, x, y: (model(x)[:, 0] - y).mean() ** 2)
    assert cause == Cause.ERRORS_CANCEL and f"mean of {N} differences" in sentence
    ((cause, sentence),) = told(lambda model, x, y: (y - model(x)[:, 0]).mean().abs())
    assert cause == Cause.ERRORS_CANCEL and "absolute value" in sentence
    assert told(lambda model, x, y: ((model(x)[:, 0] - y) ** 2).mean().sqrt()) == []
    assert told(lambda model, x, y: (model(x).mean() - 0.3) ** 2) == []


def entries(model, x, y):
    target = (y > 0).float()
    model.last = model(x)
    return F.binary_cross_entropy_with_logits(model.last[:, 0], target, reduction="none"), target


def test_a_mask_that_leaves_one_target_alone_is_found():
    def chosen(model, x, y):
        each, target = entries(model, x, y)
        return each[target > 0].mean()

    def weighted(model, x, y):
        each, target = entries(model, x, y)
        return (each * target).sum() / target.sum()

    def both(model, x, y):
        each, target = entries(model, x, y)
        return each[target > 0].mean() + 0.5 * each[target == 0].mean()

    def by_hand(model, x, y):
        each, target = entries(model, x, y)
        return each[target > 0].mean() + 0.5 * model.last[:, 0][target == 0].sigmoid().square().mean()

    def some(model, x, y):
        each, _ = entries(model, x, y)
        return each[x[:, 0] > 0].mean()

    for loss in (chosen, weighted):
        ((cause, sentence),) = told(loss)
        assert cause == Cause.ERRORS_CANCEL and "Only entries with a target of 1 count" in sentence
    assert told(both) == [] and told(some) == [] and told(by_hand) == []


def ranking(mask, score=lambda z: z):
    def loss(model, x, y):
        s, rel = score(model(x)[:, 0]).view(4, -1), (y * 2).round().view(4, -1)
        d = s[:, :, None] - s[:, None, :]
        return F.softplus(-d)[mask(rel[:, :, None], rel[:, None, :])].mean()

    return loss


def test_pairs_that_are_taken_both_ways_are_found():
    ((cause, sentence),) = told(ranking(torch.eq))
    assert cause == Cause.ERRORS_CANCEL and "both ways" in sentence
    assert told(ranking(torch.gt)) == [] and told(ranking(torch.lt)) == []


def test_scores_that_are_bounded_before_they_are_compared_are_found():
    ((cause, sentence),) = told(ranking(torch.gt, torch.sigmoid))
    assert cause == Cause.OUTPUT_RANGE and format(math.log1p(math.exp(-1)), ".3f") in sentence
    assert told(ranking(torch.gt, lambda z: 10 * torch.sigmoid(z))) == []


def test_a_log_likelihood_that_is_descended_is_found():
    def own(sign):
        def loss(model, x, y):
            q, label = torch.sigmoid(model(x)[:, 0]).clamp(1e-6, 1 - 1e-6), (y > 0).float()
            return sign * (label * q.log() + (1 - label) * (1 - q).log()).mean()

        return loss

    def picked(sign):
        return lambda model, x, y: sign * model(x).log_softmax(1).gather(1, (y > 0).long()[:, None]).mean()

    for written in (own, picked):
        ((cause, _),) = told(written(1))
        assert cause == Cause.LOSS_ASCENDED and told(written(-1)) == []
    # The generator of a game that descends log(1 - D), and advantages of both signs.
    assert told(lambda model, x, y: (1 - torch.sigmoid(model(x)[:, 0])).log().mean()) == []
    assert told(lambda m, x, y: (y * m(x).log_softmax(1).gather(1, (y > 0).long()[:, None])[:, 0]).mean()) == []


# The end of the network


@pytest.mark.parametrize("end", [nn.ReLU(), nn.Sigmoid(), nn.Tanh()])
@pytest.mark.parametrize("weighed", [True, False])
def test_an_end_that_cannot_reach_what_it_is_compared_with_is_found(end, weighed):
    def loss(model, x, y):
        out = model(x).squeeze(1)
        return (torch.exp(-out.detach()) * (3 * y - out) ** 2).mean() if weighed else (out - 3 * y).abs().mean()

    ((cause, sentence),) = told(loss, net(1, end))
    assert cause == Cause.OUTPUT_RANGE and type(end).__name__.lower() in sentence


def test_targets_within_reach_are_left_alone():
    assert told(lambda model, x, y: ((y.abs() - model(x)[:, 0]) ** 2).mean(), net(1, nn.ReLU())) == []


def test_a_relu_that_cuts_every_output_is_found():
    model = net(1, nn.ReLU())
    nn.init.constant_(model[2].bias, -9.0)
    found = told(lambda model, x, y: torch.logcumsumexp(model(x)[:, 0], 0).mean(), model)
    assert [cause for cause, _ in found] == [Cause.UNITS_DEAD]


def test_graphs_of_calls_without_a_backward_pass_are_let_go():
    """An evaluation that forgets no_grad, before a pass that will be read, keeps no graph but the loop's own."""
    torch.manual_seed(0)
    model, hidden = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, 2), nn.ReLU()), []
    model[1].register_forward_hook(lambda m, args, out: hidden.append(out.untyped_storage()._weak_ref()))
    with diag.watch(model, instruments=["loss_formula"]):
        for _ in range(8):
            F.mse_loss(model(torch.randn(N, D)), torch.zeros(N, 2)).item()
        assert all(map(torch.UntypedStorage._expired, hidden)) and len(hidden) == 8


@pytest.mark.parametrize(("act", "causes"), [(nn.ReLU, [Cause.DERIVATIVE_ZERO]), (nn.Tanh, [])])
def test_a_second_derivative_through_a_relu_is_found(act, causes):
    model = nn.Sequential(nn.Linear(1, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 1))

    def loss(model, t, _):
        t = t.requires_grad_()
        x = model(t)
        (v,) = torch.autograd.grad(x.sum(), t, create_graph=True)
        (a,) = torch.autograd.grad(v.sum(), t, create_graph=True)
        return (a + v + x - 1).square().mean()

    found = told(loss, model, data=lambda: (torch.rand(N, 1), None))
    assert [cause for cause, _ in found] == causes


def test_the_slope_of_a_relu_network_may_be_penalised():
    model = nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 1))

    def loss(model, x, y):
        x = x.requires_grad_()
        (v,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (v.norm(dim=1) - 1).square().mean()

    assert told(loss, model) == []


def test_a_sum_over_the_batch_with_plain_descent_is_found():
    def summed(model, x, y):
        return -Normal(model(x)[:, 0], 1.0).log_prob(y).sum()

    ((cause, sentence),) = told(summed, rate=0.05)
    assert cause == Cause.LOSS_SUMMED and f"{N} rows" in sentence
    assert told(summed, rate=1e-3) == []
    model = net()
    assert told(summed, model, optimizer=torch.optim.Adam(model.parameters(), 0.1)) == []


def test_a_mean_by_hand_is_no_sum():
    def each(model, x, y):
        return (model(x)[:, 0] - y).square()

    def weighed(model, x, y):
        weights = torch.rand(N)
        return (weights / weights.sum() * each(model, x, y)).sum()

    def attended(model, x, y):
        m, s = model(x).unbind(1)
        return (s.softmax(0) * (m - y).square()).sum()

    for loss in (lambda *a: (each(*a) / N).sum(), weighed, attended):
        assert told(loss, rate=0.05) == []


def test_a_sum_of_halves_or_of_means_over_columns_is_a_sum():
    def halves(model, x, y):
        return (0.5 * (model(x)[:, 0] - y).square()).sum()

    def columns(model, x, y):
        return ((model(x) - x[:, :2]).square() / 2).sum()

    for loss in (halves, columns):
        assert [cause for cause, _ in told(loss, rate=0.02)] == [Cause.LOSS_SUMMED]


# The check on facts alone


def verdict(seen, looked, kind=Odd.MEAN_SQUARED, numbers=None):
    facts = FormulaFacts(looked, (Oddity(kind, looked, seen, 2, numbers or {"entries": 64.0}),))
    return diag.loss_formula(loop=Loop(step=100, formula=facts)).verdict()


def test_all_looks_are_needed_and_three_at_least():
    assert verdict(3, 3).level == "alarm" and verdict(3, 3).step == 2
    assert verdict(2, 2).level == "ok" and verdict(5, 6).level == "ok"


def test_each_kind_has_a_rule_whose_texts_are_complete():
    names = [
        "exponent",
        "label",
        "axis",
        "result",
        "share",
        "least",
        "layers",
        "columns",
        "first",
        "weightless",
        "numbers",
        "argument",
        "value",
        "entries",
        "parts",
        "rows",
        "full",
        "target",
        "left",
        "classes",
        "pairs",
        "width",
        "outside",
        "low",
        "high",
        "lower",
        "upper",
        "outputs",
    ]
    assert set(FORMULA_RULES) == set(Odd)
    for kind in Odd:
        odd = Oddity(kind, 3, 3, 1, dict.fromkeys(names, 0.5), "tanh")
        found = FORMULA_RULES[kind].told(odd)
        assert "{" not in found.sentence + found.advice and found.sentence.endswith(".")


def test_shares_numbers_and_words_are_put_into_the_sentence():
    numbers = {"outside": 0.25, "low": -2.0, "high": 3.0, "lower": 0.0, "upper": math.inf}
    odd = Oddity(Odd.BEYOND_REACH, 3, 3, 1, numbers, "relu")
    assert FORMULA_RULES[Odd.BEYOND_REACH].told(odd).sentence == (
        "The network ends in relu, which keeps its outputs above 0; 25 % of what the loss compares them with lies "
        "beyond (it goes from -2 to 3)."
    )
    alone = FORMULA_RULES[Odd.ONE_TARGET].told(
        Oddity(Odd.ONE_TARGET, 3, 3, 1, {"target": 1.0, "left": 0.5, "classes": 1.0})
    )
    assert alone.sentence.startswith(
        "Only entries with class 1 count in the loss: its mask leaves out all others, 50 %"
    )


def test_without_a_look_nothing_is_said():
    assert diag.loss_formula(loop=Loop(step=3)).verdict().level == "not_applicable"


# Noise that the network scales


class Noisy(nn.Module):
    """mean + exp(s) * noise, decoded."""

    def __init__(self):
        super().__init__()
        self.both, self.decoder = nn.Linear(D, 8), nn.Linear(4, 2)

    def forward(self, x):
        mean, s = self.both(x).chunk(2, -1)
        return self.decoder(mean + (0.5 * s).exp() * torch.randn_like(s)), mean, s


def decoded(weight):
    def loss(model, x, y):
        out, mean, s = model(x)
        error = (out[:, 0] - y).square().mean()
        kl = 0.5 * (mean**2 + s.exp() - 1 - s).sum(1).mean()
        return error if weight is None else error + weight() * kl

    return loss


def test_noise_that_nothing_keeps_up_is_found():
    ((cause, sentence),) = told(decoded(None), Noisy())
    assert cause == Cause.LOSS_UNBOUNDED and "keeps that noise from vanishing" in sentence
    assert told(decoded(lambda: 1e-3), Noisy()) == []


def test_a_divergence_that_is_multiplied_by_zero_is_found_once_a_warm_up_would_be_over():
    ((_, sentence),) = told(decoded(lambda: 0.0), Noisy(), steps=640)
    assert "multiplied by zero" in sentence
    assert told(decoded(lambda: 0.0), Noisy(), steps=90) == []
    weights = iter([0.0] * 5 + [0.1] * 200)
    assert told(decoded(lambda: next(weights)), Noisy(), steps=110) == []


def test_inputs_that_a_network_scales_are_no_noise():
    model = nn.Linear(D, D)
    assert told(lambda m, x, y: ((x * m(x).exp()).sum(1) - y).square().mean(), model) == []


# Noise that the network is asked for


def denoising(target=lambda eps, again: eps, level=lambda: torch.rand(64), own=True):
    """Rows of 64 numbers with noise, and the noise asked for; the level is an argument of the model."""

    def loss(model, x, y):
        clean, eps, t = torch.rand(64, 64), torch.randn(64, 64), level()
        noisy = (1 - t[:, None]) * clean + t[:, None] * eps
        asked, out = target(eps, torch.randn(64, 64)), model(noisy, t)
        return ((asked - out) ** 2).mean() if own else F.mse_loss(out, asked)

    return loss


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(65, 64)

    def forward(self, x, t):
        return self.layer(torch.cat([x, t[:, None]], 1))


@pytest.mark.parametrize("own", [True, False])
def test_noise_at_one_level_is_found(own):
    def always():
        return torch.full((64,), 0.25)

    ((cause, sentence),) = told(denoising(level=always, own=own), Denoiser())
    assert cause == Cause.INPUTS_CONSTANT and "input 1 is 0.25 for every row" in sentence
    assert told(denoising(own=own), Denoiser()) == []


@pytest.mark.parametrize("drawn", [lambda: torch.rand(64), lambda: torch.rand(1).expand(64)], ids=["rows", "calls"])
def test_a_class_that_is_one_for_all_is_no_level(drawn):
    class OfOneClass(Denoiser):
        def forward(self, x, t, label):
            return super().forward(x, t + label)

    def loss(model, x, y):
        clean, eps, t = torch.rand(64, 64), torch.randn(64, 64), drawn()
        out = model((1 - t[:, None]) * clean + t[:, None] * eps, t, torch.zeros(64))
        return (eps - out).square().mean()

    assert told(loss, OfOneClass()) == []


def test_noise_that_is_drawn_once_more_is_found():
    drawn_again = denoising(target=lambda eps, again: again)
    ((cause, sentence),) = told(drawn_again, Denoiser(), steps=600, rate=0.1)
    assert cause == Cause.LABELS_SHUFFLED and "4,096 entries" in sentence
    assert told(drawn_again, Denoiser(), steps=20) == []
    assert told(denoising(), Denoiser(), steps=600, rate=0.1) == []


# What zero meets


def oscillator(conditions):
    def loss(model, t, _):
        t = t.requires_grad_()
        x = model(t)
        (v,) = torch.autograd.grad(x.sum(), t, create_graph=True)
        (a,) = torch.autograd.grad(v.sum(), t, create_graph=True)
        residual = (a + 0.4 * v + 4 * x).square().mean()
        return residual + 20 * ((x[0] - 1) ** 2 + v[0] ** 2).sum() if conditions else residual

    return loss


@pytest.mark.parametrize("conditions", [True, False])
def test_an_equation_without_its_conditions_is_met_by_zero(conditions):
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    found = told(oscillator(conditions), model, data=lambda: (torch.rand(N, 1), None))
    assert [cause for cause, _ in found] == ([] if conditions else [Cause.ERRORS_CANCEL])


def test_an_answer_that_is_compared_with_what_is_given_is_left_alone():
    assert told(lambda model, x, y: (model(x)[:, 0] - y).square().mean() + model(x)[:, 1].abs().mean()) == []
    assert told(lambda model, x, y: (model(x) - model(x + 1).detach()).square().mean()) == []
    ((_, sentence),) = told(lambda model, x, y: (model(x) - model(x + 0.1)).square().mean())
    assert sentence.startswith("A network that answers zero everywhere makes the loss zero")


def detection(masked):
    def loss(model, x, y):
        out, here = model(x), x[:, 0] > 0.5
        box = torch.where(here[:, None], x[:, 1:3], torch.zeros(N, 2))
        of_boxes = F.smooth_l1_loss(out[here, :2], box[here]) if masked else F.smooth_l1_loss(out[:, :2], box)
        return 2 * of_boxes + F.cross_entropy(out[here, 2:], (x[here, 3] > 0).long())

    return loss


@pytest.mark.parametrize("masked", [True, False])
def test_a_mean_over_rows_without_a_target_is_found(masked):
    def many():
        return torch.cat([(torch.arange(N) < 10).float()[:, None], torch.randn(N, D - 1)], 1), None

    found = told(detection(masked), net(4), data=many)
    assert [cause for cause, _ in found] == ([] if masked else [Cause.IGNORED_LABELS_COUNTED])


# Targets of an error that is weighed


@pytest.mark.parametrize(
    "taken",
    [
        lambda out: (out[:, 0], out[:, 1]),
        lambda out: out.unbind(1),
        lambda out: [t.squeeze(1) for t in out.chunk(2, 1)],
    ],
    ids=["selected", "unbound", "chunks"],
)
@pytest.mark.parametrize(("scale", "causes"), [(20000.0, [Cause.TARGETS_NOT_NORMALIZED]), (1.0, [])])
def test_targets_far_from_the_outputs_are_found_behind_a_variance(taken, scale, causes):
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with diag.watch(model, instruments=["target_scale"]) as watcher:
        for _ in range(4):
            x = torch.randn(N, D)
            optimizer.zero_grad()
            (m, s), y = taken(model(x)), scale * (1 + x[:, 0])
            (0.5 * s + 0.5 * torch.exp(-s) * (y - m) ** 2).mean().backward()
            optimizer.step()
    assert [f.verdict.cause for f in watcher.findings] == causes
