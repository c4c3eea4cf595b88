"""Every number of the step-by-step record against a loop that computes it by hand in float64."""

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag

# Rows are float32; the network and the reference are float64.
CLOSE = {"rtol": 2e-6, "atol": 1e-12}


def norm(t):
    return float(t.detach().double().norm())


class ByHand:
    """Collects what a row should hold, from inside the training loop."""

    def __init__(self, model):
        self.parameters = list(model.parameters())
        self.start = [p.detach().clone() for p in self.parameters]
        self.rows = {k: [] for k in ("gradient", "applied", "parameter", "update", "distance", "loss")}

    def gradients(self):
        self.rows["gradient"].append([norm(p.grad) for p in self.parameters])

    def before(self, loss):
        self.rows["loss"].append(loss)
        self.rows["applied"].append(norm(torch.cat([p.grad.flatten() for p in self.parameters])))
        self.old = [p.detach().clone() for p in self.parameters]

    def after(self):
        self.rows["parameter"].append([norm(p) for p in self.parameters])
        self.rows["update"].append([norm(p - o) for p, o in zip(self.parameters, self.old, strict=True)])
        self.rows["distance"].append([norm(p - s) for p, s in zip(self.parameters, self.start, strict=True)])

    def check(self, history):
        numpy.testing.assert_allclose(history.loss, self.rows["loss"], **CLOSE)
        numpy.testing.assert_allclose(history.gradient_norm, self.rows["gradient"], **CLOSE)
        numpy.testing.assert_allclose(history.applied_gradient_norm, self.rows["applied"], **CLOSE)
        for name in ("parameter", "update"):
            got, expected = getattr(history, f"{name}_norm"), numpy.array(self.rows[name])
            seen = numpy.isfinite(got)
            assert seen[:5].all() and (seen.all(1) == seen.any(1)).all()
            numpy.testing.assert_allclose(got[seen], expected[seen], **CLOSE)
        seen = numpy.isfinite(history.distance)
        numpy.testing.assert_allclose(history.distance[seen], numpy.array(self.rows["distance"])[seen], **CLOSE)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD", "Adagrad"])
def test_a_plain_loop(tiny, optimizer):
    model, x, y = tiny
    steps = getattr(torch.optim, optimizer)(model.parameters(), 0.05)
    hand = ByHand(model)
    with diag.watch(model, instruments=[]) as watcher:
        for i in range(12):
            batch = slice(3 * i, 3 * i + 4)
            loss = F.cross_entropy(model(x[batch]), y[batch])
            steps.zero_grad()
            loss.backward()
            hand.gradients()
            hand.before(loss.item())
            steps.step()
            hand.after()
    history = watcher.run.history
    hand.check(history)
    assert history.steps.tolist() == list(range(1, 13)) and history.total_steps == 12
    assert history.layers == ("0.weight", "0.bias", "2.weight", "2.bias") and history.sizes == (48, 8, 24, 3)
    numpy.testing.assert_allclose(history.learning_rate, 0.05)
    assert history.gradient_finite.all() and history.loss_finite.all() and not history.skipped.any()
    assert history.optimizer["kind"] == optimizer


@pytest.mark.parametrize("how", ["norm", "imported norm", "value", "given norm"])
def test_gradients_before_and_after_clipping(tiny, how):
    from torch.nn.utils import clip_grad_norm_ as imported

    model, x, y = tiny
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    hand = ByHand(model)

    def clip():
        if how == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        elif how == "imported norm":
            imported(list(model.parameters()), max_norm=0.1)
        elif how == "value":
            nn.utils.clip_grad_value_(model.parameters(), 0.01)
        else:
            total = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            nn.utils.clip_grads_with_norm_(model.parameters(), 0.1, total)

    with diag.watch(model, instruments=[]) as watcher:
        for _ in range(6):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            hand.gradients()
            clip()
            hand.before(loss.item())
            optimizer.step()
            hand.after()
    hand.check(watcher.run.history)
    assert max(hand.rows["applied"]) < 0.11 < min(norm(torch.tensor(g)) for g in hand.rows["gradient"])


def test_what_is_done_to_gradients_between_clip_and_step_is_in_the_applied_norm(tiny):
    model, x, y = tiny
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    with diag.watch(model, instruments=[]) as watcher:
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for p in model.parameters():
            p.grad.mul_(3.0)
        expected = norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.step()
    assert watcher.run.history.applied_gradient_norm[0] == pytest.approx(expected, rel=1e-6)


def test_accumulated_micro_batches_are_averaged(tiny):
    model, x, y = tiny
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    losses, gradients = [], []
    with diag.watch(model, instruments=[]) as watcher:
        for step in range(3):
            optimizer.zero_grad()
            here = []
            for i in range(4):
                batch = slice(10 * i, 10 * i + 10)
                loss = F.cross_entropy(model(x[batch]), y[batch])
                (loss / 4).backward()
                here.append(loss.item())
            losses.append(numpy.mean(here))
            gradients.append([norm(p.grad) for p in model.parameters()])
            optimizer.step()
            if step == 1:  # validation in between changes nothing
                with torch.no_grad():
                    F.cross_entropy(model(x), y)
    numpy.testing.assert_allclose(watcher.run.history.loss, losses, **CLOSE)
    numpy.testing.assert_allclose(watcher.run.history.gradient_norm, gradients, **CLOSE)


def test_true_gradients_and_skipped_steps_under_a_grad_scaler():
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    expected, losses = [], []
    with diag.watch(model, instruments=[]) as watcher:
        for i in range(5):
            optimizer.zero_grad()
            scale = scaler.get_scale()
            loss = F.cross_entropy(model(x * (float("inf") if i == 2 else 1.0)), y)
            losses.append(loss.item())
            scaler.scale(loss).backward()
            expected.append([norm(p.grad) / scale for p in model.parameters()])
            scaler.step(optimizer)
            scaler.update()
    history = watcher.run.history
    assert history.skipped.tolist() == [False, False, True, False, False]
    assert history.steps.tolist() == [1, 2, 3, 4, 5]
    good = ~history.skipped
    numpy.testing.assert_allclose(history.gradient_norm[good], numpy.array(expected)[good], rtol=1e-5)
    numpy.testing.assert_allclose(history.loss[good], numpy.array(losses)[good], rtol=1e-6)
    assert not history.gradient_finite[2].any() and history.gradient_finite[good].all()
    assert not history.loss_finite[2] and history.loss_finite[good].all()
    assert numpy.isnan(history.applied_gradient_norm[2])


def test_clipping_after_unscaling_and_a_fused_optimizer():
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = []
    with diag.watch(model, instruments=[]) as watcher:
        for i in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x * (float("inf") if i == 3 else 1.0)), y).backward()
            expected.append([norm(p.grad) for p in model.parameters()])
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x * (float("inf") if i == 3 else 1.0)), y)).backward()
            if i == 1:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
    history = watcher.run.history
    numpy.testing.assert_allclose(history.gradient_norm[:3], expected[:3], rtol=1e-5)
    assert history.applied_gradient_norm[1] == pytest.approx(0.01, rel=1e-3)
    assert history.skipped.tolist() == [False, False, False, True]


def test_clipping_scaled_gradients_is_told(helpers):
    model = nn.Linear(5, 3)
    x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with diag.watch(model, instruments=[]) as watcher:
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        true = [norm(p.grad) / 64.0 for p in model.parameters()]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    numpy.testing.assert_allclose(watcher.run.history.gradient_norm[0], true, rtol=1e-5)
    assert watcher.run.history.applied_gradient_norm[0] == pytest.approx(1 / 64, rel=1e-3)
    assert "clipped before the GradScaler unscaled them" in helpers.texts(watcher.run)


def test_non_finite_losses_and_gradients_are_told_apart_from_unobserved(tiny):
    model, x, y = tiny
    model[2].bias.requires_grad_(False)
    model[2].bias.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=[]) as watcher:
        for scale in (1.0, float("nan")):
            optimizer.zero_grad()
            F.cross_entropy(model(x * scale), y).backward()
            model[0].bias.grad = None
            optimizer.step()
    history = watcher.run.history
    assert history.loss_finite.tolist() == [True, False]
    assert history.gradient_finite.tolist() == [[True] * 4, [False, True, False, False]]
    assert numpy.isnan(history.gradient_norm[:, 1]).all()


def test_resuming_goes_on_with_the_steps(tiny, tmp_path):
    model, x, y = tiny
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for resume in (False, True):
        with diag.watch(model, instruments=[], run=tmp_path / "run", resume=resume):
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    run = diag.load(tmp_path / "run")
    assert run.history.steps.tolist() == [1, 2, 3, 4, 5, 6]
