"""What is measured while training is what training descends: factors are taken over, anything else is refused."""

import math
import weakref

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel.distributed import _DDPSink

import diag
from diag.errors import MissingQuantity
from diag.watching.observe.terms import terms_of

LR = 0.12


def problem(n=256):
    torch.manual_seed(0)
    x = torch.randn(n, 6, dtype=torch.float64)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double(), x, x[:, :3].argmax(1)


def largest_eigenvalue(model, objective):
    """Of the dense Hessian of `objective()`, float64."""
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def value(flat):
        parts = flat.split([s.numel() for s in shapes])
        return objective({n: v.view(s) for n, v, s in zip(names, parts, shapes, strict=True)})

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(value, flat))[-1])


def called(model, x):
    return lambda values: torch.func.functional_call(model, values, (x,))


def watched(model, step, steps=3, instruments=("hessian_spectrum", "edge_of_stability"), **options):
    """The run of `steps` of SGD on `step(model)`; all instruments measure after each."""
    optimizer = torch.optim.SGD(model.parameters(), LR)
    losses = []
    given = {"budget": math.inf, "every": 1, "instruments": instruments} | options
    with diag.watch(model, **given) as watcher:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = step(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    run = watcher.run
    assert not [e for e in run.events if e.kind == "internal error"], [e.text for e in run.events]
    numpy.testing.assert_allclose(run.history.loss, losses, rtol=1e-6)
    return run, watcher


def texts(run):
    return " ".join(e.text for e in run.events)


def pulled(z, y):
    return 0.1 * F.cross_entropy(z, y) + 10 * ((z - 3 * F.one_hot(y, 3)) ** 2).mean()


FACTORS = {
    "times ten": lambda z, y: 10 * F.cross_entropy(z, y),
    "divided": lambda z, y: F.cross_entropy(z, y) / 4,
    "in place": lambda z, y: F.cross_entropy(z, y).mul_(10),
    "by a tensor": lambda z, y: torch.tensor(10.0) * F.cross_entropy(z, y),
    "and shifted": lambda z, y: 10 * (F.cross_entropy(z, y) + 3),
    "stacked": lambda z, y: torch.stack([10 * F.cross_entropy(z, y), torch.zeros(())]).sum(),
    "summed": lambda z, y: 0.1 * F.cross_entropy(z, y, reduction="sum"),
    "negative twice": lambda z, y: -(0 - 7 * F.cross_entropy(z, y)),
    "twice": lambda z, y: (lambda c: c + 2 * c)(F.cross_entropy(z, y)),
}
MULTIPLES = {"divided": 0.25, "summed": 25.6, "negative twice": 7, "twice": 3}


@pytest.mark.parametrize("name", FACTORS)
def test_a_constant_factor_is_taken_over(name):
    model, x, y = problem()
    run, watcher = watched(model, lambda m: FACTORS[name](m(x), y))
    factor = MULTIPLES.get(name, 10)
    call = called(model, x)
    expected = factor * largest_eigenvalue(model, lambda v: F.cross_entropy(call(v), y))
    result = run.series("hessian_spectrum")[-1][1]
    assert result.eigenvalues[0] == pytest.approx(expected, rel=2e-3)  # Lanczos to 1e-3
    assert run.series("edge_of_stability")[-1][1].ratio == pytest.approx(expected * LR / 2, rel=1e-2)
    assert watcher._losses.objective.factor == pytest.approx(factor, rel=1e-6)


bce = F.binary_cross_entropy_with_logits
CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


def each(z, y, **settings):
    return F.cross_entropy(z, y, reduction="none", **settings)


def one_hot(y):
    return F.one_hot(y, 3).double()


LATER = {
    "a temperature": lambda z, y: F.cross_entropy(z / 2.5, y),
    "a scale and a factor": lambda z, y: 4 * F.cross_entropy(z * 0.5, y),
    "a temperature before the log": lambda z, y: F.nll_loss(F.log_softmax(z / 2, 1), y),
    "a mean of rows": lambda z, y: each(z, y).mean(),
    "rows divided by their number": lambda z, y: 3 * each(z, y).sum() / len(y),
    "a mean of means": lambda z, y: each(z, y).view(2, -1).mean(1).mean(),
    "weighted rows": lambda z, y: each(z, y, weight=CLASS_WEIGHTS).mean(),
    "ignored rows in the mean": lambda z, y: each(z, y, ignore_index=2).mean(),
    "a mean of squares": lambda z, y: F.mse_loss(z, one_hot(y), reduction="none").mean(),
    "sums of squares": lambda z, y: F.mse_loss(z, one_hot(y), reduction="none").sum(1).mean(),
    "labels by themselves": lambda z, y: (
        -F.binary_cross_entropy_with_logits(z, one_hot(y), reduction="none").mul(-2).mean()
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_the_way_into_the_loss_and_out_of_it_is_part_of_the_objective(name):
    model, x, y = problem()
    run, _ = watched(model, lambda m: LATER[name](m(x), y))
    call = called(model, x)
    expected = largest_eigenvalue(model, lambda v: LATER[name](call(v), y))
    assert run.series("hessian_spectrum")[-1][1].eigenvalues[0] == pytest.approx(expected, rel=2e-3)
    assert run.series("edge_of_stability")[-1][1].ratio == pytest.approx(expected * LR / 2, rel=1e-2)


REFUSED = {
    "weights of rows": lambda z, y, w: (each(z, y) * w).mean(),
    "a mask": lambda z, y, w: each(z, y)[w > 0.5].mean(),
    "the worst rows": lambda z, y, w: each(z, y).topk(4).values.mean(),
    "a product with itself": lambda z, y, w: (each(z, y) ** 2).mean(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_else_is_done_to_the_rows_is_refused(name):
    model, x, y = problem()
    weights = torch.rand(len(x), dtype=torch.float64)
    run, watcher = watched(model, lambda m: REFUSED[name](m(x), y, weights))
    assert not run.series("hessian_spectrum")
    with pytest.raises(MissingQuantity, match="rows are weighted, masked or otherwise changed"):
        watcher._losses.objective(model(x), y)


def test_a_temperature_that_moves_is_noticed():
    model, x, y = problem()
    temperatures = iter([4.0, 4.0, 2.0])
    run, watcher = watched(model, lambda m: F.cross_entropy(m(x) / next(temperatures), y))
    with pytest.raises(MissingQuantity, match="of another output than before, or with other settings"):
        watcher._losses.objective(model(x), y)
    assert max(step for step, _ in run.series("hessian_spectrum")) == 2


def test_a_trained_temperature_is_refused():
    model, x, y = problem()
    model.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    run, _ = watched(model, lambda m: F.cross_entropy(m(x) * m.scale.exp(), y), steps=6)
    assert "in a way diag cannot repeat" in texts(run) and not run.series("hessian_spectrum")


def accumulated(parts, divide):
    def step(model, x, y):
        for rows in torch.arange(len(x)).chunk(parts):
            (F.cross_entropy(model(x[rows]), y[rows]) / divide).backward()

    return step


@pytest.mark.parametrize(("parts", "divide", "factor"), [(4, 4, 1.0), (4, 1, 4.0), (1, 4, 0.25)])
def test_micro_batches_add_up_to_what_the_step_descends(parts, divide, factor):
    model, x, y = problem()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    with diag.watch(model, budget=math.inf, every=1, instruments=["hessian_spectrum"]) as watcher:
        for _ in range(3):
            optimizer.zero_grad()
            before = F.cross_entropy(model(x), y).item()
            accumulated(parts, divide)(model, x, y)
            optimizer.step()
    assert watcher.run.history.loss[-1] == pytest.approx(factor * before, rel=1e-6)
    call = called(model, x)
    expected = factor * largest_eigenvalue(model, lambda v: F.cross_entropy(call(v), y))
    assert watcher.run.series("hessian_spectrum")[-1][1].eigenvalues[0] == pytest.approx(expected, rel=2e-3)


def entropy(z):
    return -(z.softmax(1) * z.log_softmax(1)).sum(1).mean()


OTHERS = {
    "a second loss": (pulled, "cross_entropy is only a part of it"),
    "an entropy bonus": (
        lambda z, y: F.cross_entropy(z, y) - 0.3 * entropy(z),
        "cross_entropy is only a part of it",
    ),
    "an L1 penalty": (None, "cross_entropy is only a part of it"),
    "a trained factor": (
        lambda z, y: F.cross_entropy(z, y) * z.mean().exp(),
        "the value of cross_entropy is not passed on as it is",
    ),
    "a function of it": (lambda z, y: (F.cross_entropy(z, y) - 0.1).abs() + 0.1, "is not passed on as it is"),
    "mixed up": (lambda z, y: 0.3 * F.cross_entropy(z, y) + 0.7 * F.cross_entropy(z, y.flip(0)), "several loss"),
    "a target that moves": (lambda z, y: F.mse_loss(z, z.flip(0)), "targets of mse_loss are themselves computed"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_said_once_and_nothing_is_measured_with_a_part(name):
    loss, text = OTHERS[name]
    model, x, y = problem()
    penalised = lambda m: F.cross_entropy(m(x), y) + 0.01 * sum(p.abs().sum() for p in m.parameters())  # noqa: E731
    step = penalised if loss is None else lambda m: loss(m(x), y)
    run, watcher = watched(model, step, steps=8, instruments=None)
    assert texts(run).count("cannot be measured again") == 1 and text in texts(run)
    assert numpy.isfinite(run.history.gradient_norm).all()
    for instrument in ("hessian_spectrum", "edge_of_stability", "sharpness", "gradient_coherence"):
        assert not run.series(instrument), instrument
    if name not in ("mixed up", "a target that moves"):
        skipped = [r for r in run.records if r.instrument == "hessian_spectrum"]
        assert len(skipped) == 1 and skipped[0].outcome.kind == "skipped"  # once, and not again
        with pytest.raises(MissingQuantity, match="give loss_fn="):
            watcher._losses.objective(model(x), y)


def test_the_users_own_word_is_measured():
    """Its two terms add up to a sharpness far over the edge, that of cross_entropy alone is far below."""
    model, x, y = problem()
    run, _ = watched(model, lambda m: pulled(m(x), y), loss_fn=pulled, probe=(x, y))
    call = called(model, x)
    expected = largest_eigenvalue(model, lambda v: pulled(call(v), y))
    part = largest_eigenvalue(model, lambda v: 0.1 * F.cross_entropy(call(v), y))
    ratio = run.series("edge_of_stability")[-1][1].ratio
    assert ratio == pytest.approx(expected * LR / 2, rel=1e-2)
    assert ratio > 10 * part * LR / 2


def test_weights_of_rows_beside_the_targets_are_measured():
    """What the refusal of such a loss says to do."""
    model, x, y = problem()
    weights = torch.rand(len(x), dtype=torch.float64)

    def weighted(outputs, targets):
        labels, w = targets
        return (F.cross_entropy(outputs, labels, reduction="none") * w).sum() / w.sum()

    given = {"loss_fn": weighted, "probe": (x, (y, weights))}
    run, _ = watched(model, lambda m: weighted(m(x), (y, weights)), **given)
    call = called(model, x)
    expected = largest_eigenvalue(model, lambda v: weighted(call(v), (y, weights)))
    assert run.series("hessian_spectrum")[-1][1].eigenvalues[0] == pytest.approx(expected, rel=2e-3)
    snapshot = diag.Snapshot(model, weighted, (x, (y, weights)), micro_batch=50)
    gradient = torch.autograd.grad(weighted(model(x), (y, weights)), list(model.parameters()))
    for found, own in zip(snapshot.quantity("gradient").values(), gradient, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-8, atol=1e-12)


def test_a_term_that_comes_later_takes_the_loss_away():
    model, x, y = problem()
    steps = iter(range(100))

    def step(m):
        loss = F.cross_entropy(m(x), y)
        return loss if next(steps) < 4 else loss + 0.01 * m[0].weight.square().sum()

    run, _ = watched(model, step, steps=8)
    measured = [s for s, _ in run.series("hessian_spectrum")]
    assert measured and max(measured) <= 4
    assert "cross_entropy is only a part of it" in texts(run)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, x):
        mean, log_variance = self.encode(x).chunk(2, 1)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decode(z), mean, log_variance


def test_a_variational_autoencoder_is_recorded_whole():
    torch.manual_seed(0)
    model, x = Autoencoder(), torch.randn(64, 6)

    def step(m):
        out, mean, log_variance = m(x)
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        return (F.mse_loss(out, x, reduction="sum") + divergence) / len(x)

    run, _ = watched(model, step, steps=7)  # `watched` compares the recorded loss with the whole
    assert "mse_loss is only a part of it" in texts(run) and not run.series("hessian_spectrum")


@pytest.mark.parametrize("functional", [True, False])
def test_a_loss_at_adapted_parameters_is_not_the_models_own(functional):
    model, x, y = problem()

    def step(m):
        inner = F.cross_entropy(m(x[:128]), y[:128])
        values = dict(m.named_parameters())
        slopes = torch.autograd.grad(inner, list(values.values()), create_graph=True)
        fast = {n: p - 0.5 * g for (n, p), g in zip(values.items(), slopes, strict=True)}
        if functional:
            out = torch.func.functional_call(m, fast, (x[128:],))
        else:
            out = F.linear(torch.tanh(F.linear(x[128:], *list(fast.values())[:2])), *list(fast.values())[2:])
        return F.cross_entropy(out, y[128:])

    run, _ = watched(model, step, steps=7)  # `watched` compares the recorded loss with the outer one
    assert not run.series("hessian_spectrum") and "cannot be measured again" in texts(run)


def test_a_direction_given_to_backward_is_a_factor():
    model, x, y = problem()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    with diag.watch(model, budget=math.inf, instruments=["hessian_spectrum"]) as watcher:
        for _ in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward(torch.tensor(5.0, dtype=torch.float64))
            optimizer.step()
    assert watcher.run.history.loss[-1] == pytest.approx(5 * loss.item(), rel=1e-6)
    call = called(model, x)
    expected = 5 * largest_eigenvalue(model, lambda v: F.cross_entropy(call(v), y))
    assert watcher.run.series("hessian_spectrum")[-1][1].eigenvalues[0] == pytest.approx(expected, rel=2e-3)


# Another network's objective.


class Pair:
    """A generator and a discriminator, and the discriminator's own two passes of a step."""

    def __init__(self, set_to_none=True):
        torch.manual_seed(0)
        self.generator = nn.Linear(3, 2).double()
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.set_to_none = set_to_none
        self.real = torch.randn(32, 2, dtype=torch.float64) + 2
        self.noise = torch.randn(32, 3, dtype=torch.float64)
        self.g = torch.optim.SGD(self.generator.parameters(), 0.1)
        self.d = torch.optim.SGD(self.critic.parameters(), 0.1)

    def of_the_critic(self, critic, fake):
        """What the discriminator descends."""
        ones, zeros = torch.ones(32, 1, dtype=torch.float64), torch.zeros(32, 1, dtype=torch.float64)
        bce = F.binary_cross_entropy_with_logits
        return bce(critic(self.real), ones) + bce(critic(fake), zeros)

    def generator_first(self):
        self.g.zero_grad(set_to_none=self.set_to_none)
        fooled = self.critic(self.generator(self.noise))
        F.binary_cross_entropy_with_logits(fooled, torch.ones_like(fooled)).backward()
        self.g.step()
        fake = self.generator(self.noise).detach()
        self.d.zero_grad(set_to_none=self.set_to_none)
        ones, zeros = torch.ones(32, 1, dtype=torch.float64), torch.zeros(32, 1, dtype=torch.float64)
        halves = [
            F.binary_cross_entropy_with_logits(self.critic(self.real), ones),
            F.binary_cross_entropy_with_logits(self.critic(fake), zeros),
        ]
        for half in halves:
            half.backward()
        self.d.step()
        return sum(half.item() for half in halves), fake


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_discriminator_has_its_own_objective(named, set_to_none):
    """The generator's pass, which comes first, goes through it and ends in the same loss function."""
    pair = Pair(set_to_none)
    options = {"optimizer": pair.d} if named else {}
    losses = []
    with diag.watch(pair.critic, budget=math.inf, every=1, instruments=["hessian_spectrum"], **options) as watcher:
        for _ in range(3):
            losses.append(pair.generator_first()[0])
    numpy.testing.assert_allclose(watcher.run.history.loss, losses, rtol=1e-6)
    assert watcher._losses.objective.factor == pytest.approx(2.0)  # the sum of two means over as many examples


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_sharpness_of_a_discriminator_is_that_of_its_own_loss(set_to_none):
    pair = Pair(set_to_none)
    with diag.watch(pair.critic, optimizer=pair.d, instruments=[]) as watcher:
        _, fake = pair.generator_first()
        batches = watcher._probe.batches
        assert torch.equal(torch.cat([b.args[0] for b in batches]), torch.cat([pair.real, fake]))
        spectrum = diag.hessian_spectrum(diag.Snapshot(pair.critic, watcher._losses.objective, batches))
    expected = largest_eigenvalue(
        pair.critic,
        lambda v: pair.of_the_critic(lambda x: torch.func.functional_call(pair.critic, v, (x,)), fake),
    )
    assert spectrum.eigenvalues[0] == pytest.approx(expected, rel=2e-3)


def test_a_shared_backward_of_two_networks_is_each_ones_own_part():
    (first, x, y), (second, _, _) = problem(), problem()
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(2)
    optimizers = [torch.optim.SGD(m.parameters(), LR) for m in (first, second)]
    watchers = [diag.watch(m, budget=math.inf, every=1, instruments=["hessian_spectrum"]) for m in (first, second)]
    for _ in range(3):
        losses = [F.cross_entropy(first(x), y), 3 * F.cross_entropy(second(x), y)]
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(losses).backward()
        for optimizer in optimizers:
            optimizer.step()
    for watcher, model, loss, factor in zip(watchers, (first, second), losses, (1, 3), strict=True):
        watcher.close()
        run = watcher.run
        assert run.history.loss[-1] == pytest.approx(loss.item(), rel=1e-6)
        call = called(model, x)
        expected = factor * largest_eigenvalue(model, lambda v, call=call: F.cross_entropy(call(v), y))
        assert run.series("hessian_spectrum")[-1][1].eigenvalues[0] == pytest.approx(expected, rel=2e-3)
        assert "one term more of which this model has no part" in texts(run)


@pytest.mark.parametrize("steps_between", [0, 20])
def test_terms_that_change_places_stay_each_networks_own(steps_between):
    (first, x, y), (second, _, _) = problem(), problem()
    with torch.no_grad():
        second[0].weight.mul_(2)

    def outputs(model):
        z = model(x)
        for _ in range(steps_between):  # so that where the loss's input came from takes a longer look
            z = z + 1
        return z

    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], LR)
    own = []
    with diag.watch(first, instruments=[]) as watcher:
        for i in range(6):
            losses = [F.cross_entropy(outputs(first), y), F.cross_entropy(outputs(second), y)]
            own.append(losses[0].item())
            optimizer.zero_grad()
            sum(losses if i % 2 else losses[::-1]).backward()
            optimizer.step()
    numpy.testing.assert_allclose(watcher.run.history.loss, own, rtol=1e-6)


def test_a_pass_to_other_parameters_alone_is_none_of_this_model():
    """backward(inputs=...) leaves the discriminator's gradients alone, so its step does not descend that loss."""
    pair = Pair()
    with diag.watch(pair.critic, optimizer=pair.d, instruments=[]) as watcher:
        pair.d.zero_grad()
        ones = torch.ones(32, 1, dtype=torch.float64)
        loss = F.binary_cross_entropy_with_logits(pair.critic(pair.real), ones)
        loss.backward()
        fooled = F.binary_cross_entropy_with_logits(pair.critic(pair.generator(pair.noise)), ones)
        fooled.backward(inputs=list(pair.generator.parameters()))
        pair.d.step()
    assert watcher.run.history.loss[-1] == pytest.approx(loss.item(), rel=1e-6)
    assert [b.size for b in watcher._probe.batches] == [32]


def test_parameters_that_are_moved_by_hand_are_not_called_sam():
    model, x, y = problem()
    with diag.watch(model, instruments=[]) as watcher:
        for _ in range(3):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.1)
    assert "as SAM does" not in texts(watcher.run)
    assert "No optimizer step on the model's parameters was seen" in texts(watcher.run)


# Which outputs the loss is called on, and a loss that is computed inside the model.


class Parts(nn.Module):
    """Returns its features beside its logits; with labels its logits and its loss, or with a dict all by name."""

    def __init__(self, form="features"):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.form = nn.Linear(6, 16), nn.Linear(16, 3), form
        self.double()

    def forward(self, x, targets=None):
        features = torch.tanh(self.body(x))
        z = self.head(features)
        if self.form == "features":
            return features, z
        if self.form == "dict":
            return {"features": features, "scores": z}
        return z, None if targets is None else F.cross_entropy(z, targets)


LOSSES = {
    "features": lambda m, x, y: F.cross_entropy(m(x)[1], y),
    "dict": lambda m, x, y: F.cross_entropy(m(x)["scores"], y),
    "loss inside": lambda m, x, y: m(x, y)[1],
    "loss inside, times ten": lambda m, x, y: 10 * m(x, targets=y)[1],
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_found_among_the_outputs(name):
    _, x, y = problem()
    model = Parts(name)
    names = ("hessian_spectrum", "softmax_collapse", "neural_collapse")
    run, _ = watched(model, lambda m: LOSSES[name](m, x, y), instruments=names)
    call = lambda v: torch.func.functional_call(model, v, (x,))  # noqa: E731
    z = lambda v: list(call(v).values())[1] if name == "dict" else call(v)[name == "features"]  # noqa: E731
    factor = 10 if name.endswith("ten") else 1
    expected = factor * largest_eigenvalue(model, lambda v: F.cross_entropy(z(v), y))
    assert run.series("hessian_spectrum")[-1][1].eigenvalues[0] == pytest.approx(expected, rel=2e-3)
    accuracy = (z(dict(model.named_parameters())).argmax(1) == y).double().mean().item()
    assert run.series("softmax_collapse")[-1][1].accuracy == pytest.approx(accuracy)
    assert run.series("neural_collapse")
    # A snapshot gives the targets to a model that takes them.
    if name == "loss inside":
        assert diag.softmax_collapse(diag.Snapshot(model, None, (x, y))).accuracy == pytest.approx(accuracy)
        assert diag.Snapshot(model, None, (x, y)).quantity("losses").mean().item() == pytest.approx(
            F.cross_entropy(z(dict(model.named_parameters())), y).item()
        )


def test_a_part_that_is_known_still_tells_which_labels_belong_to_which_logits():
    """With a penalty the curvature is not known, the geometry of the features is."""
    _, x, y = problem()
    model = Parts()
    step = lambda m: F.cross_entropy(m(x)[1], y) + 0.1 * m.head.weight.square().sum()  # noqa: E731
    run, _ = watched(model, step, instruments=("hessian_spectrum", "neural_collapse"))
    assert run.series("neural_collapse") and not run.series("hessian_spectrum")


@pytest.mark.parametrize(
    ("outputs", "known"),
    [
        (lambda loss, logits: (loss, logits), True),
        (lambda loss, logits: (logits, loss), True),
        (lambda loss, logits: (torch.ones(2), logits, loss), True),
        (lambda loss, logits: (3, logits, loss), False),  # numbers that are no tensors shift the order
    ],
)
def test_a_data_parallel_wrapper_hands_each_output_on_as_it_is(outputs, known):
    wrapper = type("Wrapper", (), {"_ddp_sink_clone": True})()
    logits = torch.randn(4, 3, requires_grad=True) * 2
    loss = F.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
    given = outputs(loss, logits)
    handed = _DDPSink.apply(weakref.ref(wrapper), *given)[[o is loss for o in given].index(True)]
    (term,) = terms_of(handed * 3 / 2, [loss.grad_fn._sequence_nr()])
    assert term.known is known and (not known or (term.node is loss.grad_fn and term.factors == (1 / 2, 3.0)))
    (ended,) = terms_of(handed, [handed.grad_fn._sequence_nr()])
    assert ended.known and ended.node is handed.grad_fn, "where the wrapper's own loss is known, it ends there"
