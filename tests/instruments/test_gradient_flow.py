"""Gradient flow against histories made by hand, whose every count and law is known."""

import dataclasses
import json
import math

import numpy
import pytest
import torch
from torch import nn

import diag
from diag.errors import MissingQuantity
from diag.instruments.gradient_flow.instrument import STEPS_SHOWN, GradientFlow, gradient_flow
from diag.instruments.gradient_flow.statistics import normalisation_layers
from diag.linalg.growth import fit_growth, log_spaced
from diag.result import Level
from diag.snapshot.history import empty_history
from diag.testing import check_plot, check_result

LAYERS = {f"{layer}.{part}": size for layer in ("a", "b", "c", "d") for part, size in (("weight", 12), ("bias", 4))}


def record(length=50, layers=LAYERS, **columns):
    """A history in which everything was observed and is ordinary, but for the columns given."""
    rows = empty_history(layers, length)
    table = numpy.ones((length, len(layers)), numpy.float32)
    ordinary = {
        "loss": numpy.ones(length),
        "learning_rate": numpy.full(length, 0.1),
        "gradient_norm": table,
        "parameter_norm": 2 * table,
        "update_norm": table / 10,
        "distance": table,
        "applied_gradient_norm": numpy.ones(length),
    }
    return dataclasses.replace(rows, **(ordinary | columns))


def with_distance(d, **more):
    """A history of one weight whose distance from the start is `d` at steps 1, 2, ..."""
    return record(len(d), {"a.weight": 3}, distance=numpy.asarray(d, numpy.float32)[:, None], **more)


def test_quiet_on_an_ordinary_run():
    result = gradient_flow(history=record())
    assert result.verdict().level is Level.OK
    assert result.verdict().sentence == "Losses and gradients were finite at all 50 steps."
    assert result.update_ratio == pytest.approx(0.05)
    assert result.num_steps == 50 and result.layers == tuple(LAYERS)
    check_result(result)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_alarm_on_a_loss_that_is_not_finite(bad):
    history = record()
    history.loss[[6, 19]] = bad
    history.loss_finite[[6, 19]] = False
    result = gradient_flow(history=history)
    verdict = result.verdict()
    assert (result.non_finite_losses, result.loss_steps) == (2, (7, 20))
    assert verdict.level is Level.ALARM and verdict.confidence == "arithmetic"
    assert verdict.sentence == "The loss was not finite at 2 steps (7, 20) (of 50 recorded)."
    check_result(result)


def test_a_loss_that_was_not_seen_is_no_alarm():
    result = gradient_flow(history=record(loss=numpy.full(50, math.nan)))
    assert result.non_finite_losses == 0 and result.verdict().level is Level.UNKNOWN
    assert "losses at 0 and gradients at 50 were seen" in result.verdict().sentence


def unseen(**columns):
    history = record()
    for name, rows in columns.items():
        getattr(history, name)[rows] = math.nan
    return gradient_flow(history=history).verdict()


def test_finite_is_only_said_of_what_was_seen():
    hooks_gone = unseen(loss=slice(20, None))
    assert hooks_gone.level is Level.UNKNOWN
    assert hooks_gone.sentence == (
        "Of 50 steps recorded, losses at 20 and gradients at 50 were seen, and these were finite."
    )
    one_missing = unseen(loss=slice(3, 4))
    assert one_missing.level is Level.OK and "losses at 49 and gradients at 50" in one_missing.sentence
    half_cut = unseen(gradient_norm=(slice(None), [0, 1, 2, 3]))
    assert half_cut.level is Level.UNKNOWN
    assert "4 of the 8 parameter tensors had no gradient at any step (a.weight, a.bias, b.weight and 1 more)" in (
        half_cut.sentence
    )
    none = unseen(gradient_norm=slice(None))
    assert none.level is Level.UNKNOWN
    assert none.sentence == "No gradient was seen at any of the 50 steps recorded."
    log = gradient_flow(history=dataclasses.replace(empty_history({}, 50), loss=numpy.ones(50))).verdict()
    assert log.level is Level.UNKNOWN and not log.advice and log.sentence.startswith("The record has no layers")


def test_gradients_read_all_through_a_run_speak_for_it():
    rows = numpy.setdiff1d(numpy.arange(50), [0, 1, 9, 18, 27, 36, 45])
    thinned = gradient_flow(history=without_gradients(rows))
    assert thinned.longest_unread == 8 and thinned.verdict().level is Level.OK
    assert thinned.verdict().sentence == (
        "Losses were finite at all 50 steps, and gradients at the 7 of them at which they were read."
    )
    stopped = gradient_flow(history=without_gradients(numpy.arange(30, 50)))  # as when hooks are taken away
    assert stopped.longest_unread == 20 and stopped.verdict().level is Level.UNKNOWN


def test_a_layer_is_idle_though_its_gradient_was_read_at_some_steps_only():
    history = without_gradients(numpy.arange(1, 50, 2))
    history.gradient_norm[::2, 2] = 0
    verdict = gradient_flow(history=history).verdict()
    assert verdict.level is Level.WARNING and verdict.layers == ("b.weight",)
    assert "was exactly zero at all 25 steps that were looked at: b.weight" in verdict.sentence
    few = without_gradients(numpy.arange(9, 50))
    few.gradient_norm[:9, 2] = 0
    assert gradient_flow(history=few).verdict().level is not Level.WARNING  # it may begin later


def without_gradients(rows):
    history = record()
    history.gradient_norm[rows] = math.nan
    return history


def test_warning_where_no_weight_moves():
    zero = numpy.zeros((50, len(LAYERS)), numpy.float32)
    still = gradient_flow(history=record(update_norm=zero, distance=zero)).verdict()
    assert still.level is Level.WARNING and still.sentence == "No weight moved at any of the 50 steps recorded."
    late = zero.copy()
    late[-1] = 1
    assert gradient_flow(history=record(update_norm=late, distance=late)).verdict().level is Level.OK
    few = numpy.full((50, len(LAYERS)), numpy.nan, numpy.float32)
    few[:3] = 0  # a warm-up from zero, looked at in its first steps only
    assert gradient_flow(history=record(update_norm=few, distance=few)).verdict().level is Level.OK


def test_alarm_on_gradients_that_were_applied_and_not_on_those_that_were_skipped():
    history = record(100)
    history.gradient_finite[4, 2] = history.gradient_finite[7, 2:4] = False
    history.gradient_norm[4, 2] = history.gradient_norm[7, 2] = history.gradient_norm[7, 3] = math.inf
    history.skipped[[4, 7]] = True
    skipped = gradient_flow(history=history)
    assert (skipped.non_finite_gradients, skipped.non_finite_applied, skipped.skipped_steps) == (2, 0, 2)
    assert skipped.gradient_layers == ("b.weight", "b.bias") and skipped.skipped_step_numbers == (5, 8)
    assert skipped.verdict().level is Level.OK
    assert "or were skipped by the GradScaler (2 steps" in skipped.verdict().sentence
    history.skipped[7] = False
    applied = gradient_flow(history=history)
    assert applied.non_finite_applied == 1 and applied.verdict().level is Level.ALARM
    assert (
        "gradients were not finite at 2 steps (5, 8), and the optimizer took 1 of these"
        in applied.verdict().sentence.lower()
    )
    assert applied.verdict().layers == ("b.weight", "b.bias")


def test_warning_when_many_steps_are_skipped():
    history = record(200)
    history.skipped[:200:10] = True
    assert gradient_flow(history=history).verdict().level is Level.WARNING
    assert (
        "left out 10 % of the steps (20 of 200), first at step 1"
        in gradient_flow(history=history).verdict().sentence
    )
    assert gradient_flow(history=history, skipped_share=0.2).verdict().level is Level.OK


@pytest.mark.parametrize(("steps", "first"), [(1, 1), (10, 3), (40, 16)])
def test_a_scaler_that_finds_its_scale_is_no_finding(steps, first):
    history = record(steps)
    history.skipped[:first] = True
    assert gradient_flow(history=history).verdict().level is Level.OK


def test_warning_on_a_layer_that_never_gets_a_gradient():
    history = record()
    history.gradient_norm[:, 4:6] = 0
    result = gradient_flow(history=history)
    assert result.idle_layers == ("c.weight", "c.bias") and result.verdict().level is Level.WARNING
    assert (
        "of 2 of 8 parameter tensors was exactly zero at all 50 steps: c.weight and c.bias"
        in result.verdict().sentence
    )
    history.gradient_norm[3, 4:6] = 1e-30
    assert gradient_flow(history=history).verdict().level is Level.OK


@pytest.mark.parametrize(("factor", "word"), [(1e-3, "vanishes"), (1e4, "explodes")])
def test_the_depth_is_judged_only_for_a_plain_network(factor, word):
    history = record()
    history.gradient_norm[0, 1::2] = factor ** (numpy.arange(3, -1, -1) / 3)
    described = gradient_flow(history=history)
    # float32 norms; the fit of an exact geometric profile is exact.
    assert described.depth_factor == pytest.approx(factor, rel=1e-5)
    assert described.verdict().level is Level.OK
    judged = gradient_flow(history=history, plain_network=True)
    assert (
        judged.verdict().level is Level.ALARM and f"The gradient {word} over the depth" in judged.verdict().sentence
    )
    assert gradient_flow(history=history, plain_network=True, depth_factor=1e5).verdict().level is Level.OK
    check_result(judged)


def test_the_depth_factor_of_deep_linear_networks_is_that_of_backpropagation():
    """Orthogonal layers scaled by c with zero biases: the error signal shrinks by exactly c a layer."""
    torch.manual_seed(0)
    width, depth, c = 16, 9, 0.4
    layers = [nn.Linear(width, width) for _ in range(depth)]
    for layer in layers:
        layer.weight.data = c * torch.linalg.qr(torch.randn(width, width))[0]
        nn.init.zeros_(layer.bias)
    data = (torch.randn(32, width), torch.randn(32, width))
    snapshot = diag.Snapshot(nn.Sequential(*layers), nn.MSELoss(), data)
    result = diag.gradient_flow(snapshot, plain_network=True)
    assert result.depth_factor == pytest.approx(c ** (depth - 1), rel=1e-4)  # float32, nine products
    assert result.verdict().level is Level.ALARM
    # The weights' gradients are no help: <W, dL/dW> is the same for every layer (their spread stays below 2).
    weights = result.gradient_norm[0, ::2]
    assert weights.max() / weights.min() < 2


def test_a_network_without_biases_has_no_depth_factor():
    history = record(layers={"a.weight": 9, "b.weight": 9, "c.weight": 9})
    assert math.isnan(gradient_flow(history=history, plain_network=True).depth_factor)
    assert gradient_flow(history=history, plain_network=True).verdict().level is Level.OK


def test_normalisation_layers_do_not_count_as_weights():
    sizes = {"conv.weight": 72, "conv.bias": 8, "bn.weight": 8, "bn.bias": 8, "head.weight": 80, "scale": 1}
    history = record(5, sizes)
    assert normalisation_layers(history).tolist() == [False, False, True, True, False, False]
    history.distance[:] = numpy.array([3, 0, 99, 99, 4, 0])
    assert gradient_flow(history=history).distance == pytest.approx(5.0)


def test_exact_laws_are_recognised():
    """Closed form: an exact log curve has R^2 1 for the log law; a linear drift has exponent 1."""
    t = numpy.arange(10.0, 2000)
    log = fit_growth(t, 1 + 2 * numpy.log(t))
    assert log["log"].r2 == pytest.approx(1, abs=1e-12) and log["log"].slope == pytest.approx(2, abs=1e-10)
    assert log["log"].aic < min(log["sqrt"].aic, log["power"].aic)
    drift = fit_growth(t, 3 * t)
    assert drift["power"].slope == pytest.approx(1, abs=1e-10) and drift["power"].r2 == pytest.approx(1, abs=1e-12)
    root = fit_growth(t, 0.5 * numpy.sqrt(t))
    assert root["sqrt"].slope == pytest.approx(0.5, abs=1e-10)
    # AIC of a known residual: n log(RSS / n) + 2 * 2.
    noisy = fit_growth(t, numpy.log(t) + 0.1 * (-1.0) ** numpy.arange(len(t)))["log"]
    assert noisy.aic == pytest.approx(len(t) * math.log(0.01) + 4, rel=1e-3)


def test_an_isotropic_random_walk_is_classified_as_sqrt():
    """Closed form: 1000 dimensions, 1500 steps; the walk's distance is sqrt(1000 t) within 1 / sqrt(2000)."""
    walk = numpy.random.default_rng(0).standard_normal((1500, 1000)).cumsum(0)
    result = gradient_flow(history=with_distance(numpy.linalg.norm(walk, axis=1)))
    assert result.r2_by_law["sqrt"] > 0.999 > 0.95 > result.r2_by_law["log"]
    assert result.growth_exponent == pytest.approx(0.5, abs=0.02)
    assert (
        "over steps 10 to 1,500 the logarithmic law fits the distance from the start worse than sqrt"
        in result.verdict().sentence
    )


def test_a_log_curve_is_said_to_be_one():
    result = gradient_flow(history=with_distance(numpy.log(numpy.arange(1, 3001)) + 1))
    assert result.growth_slope == pytest.approx(1, rel=1e-4)  # distances are kept in float32
    assert "the logarithmic law fits the distance from the start better than sqrt" in result.verdict().sentence


def test_no_law_is_stated_below_two_decades():
    result = gradient_flow(history=with_distance(numpy.log(numpy.arange(1, 990)) + 1))
    assert math.isnan(result.growth_slope) and result.last_fitted_step == 0
    assert "law" not in result.verdict().sentence


def test_only_the_longest_stretch_of_one_learning_rate_is_fitted():
    d = numpy.log(numpy.arange(1, 5001)) + 1
    rate = numpy.where(numpy.arange(1, 5001) <= 2000, 0.1, 0.01)
    result = gradient_flow(history=with_distance(d, learning_rate=rate))
    assert (result.first_fitted_step, result.last_fitted_step) == (10, 2000)
    warming = numpy.where(numpy.arange(1, 5001) <= 300, numpy.arange(1, 5001) * 1e-3, 0.1)
    assert gradient_flow(history=with_distance(d, learning_rate=warming)).last_fitted_step == 0


def test_log_spaced_rows_keep_the_ends():
    steps = numpy.arange(7, 20_000, 3)
    rows = log_spaced(steps, 50)
    assert rows[0] == 0 and rows[-1] == len(steps) - 1 and len(rows) <= 50
    ratios = steps[rows][1:] / steps[rows][:-1]
    assert ratios[10:].max() < 1.3
    assert log_spaced(steps[:20], 50).tolist() == list(range(20))


def test_long_records_are_thinned_but_counted_in_full():
    history = record(10_000)
    history.loss_finite[1234] = False
    result = gradient_flow(history=history)
    assert result.gradient_norm.shape == (STEPS_SHOWN, len(LAYERS)) and result.num_steps == 10_000
    assert (result.steps[0], result.steps[-1]) == (1, 10_000) and result.loss_steps == (1235,)


def test_steps_at_which_the_parameters_were_not_observed_are_not_shown():
    history = record(100)
    unseen = numpy.arange(100) % 10 != 3
    for name in ("distance", "parameter_norm", "update_norm"):
        getattr(history, name)[unseen] = math.nan
    result = gradient_flow(history=history)
    assert result.steps.tolist() == list(range(4, 100, 10)) and numpy.isfinite(result.update_ratio).all()
    assert result.relative_distance == pytest.approx(0.5)


def test_on_a_snapshot_it_describes_the_one_state():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    x, y = torch.randn(20, 4), torch.arange(20) % 2
    result = diag.gradient_flow(diag.Snapshot(model, nn.CrossEntropyLoss(), (x, y)))
    nn.CrossEntropyLoss()(model(x), y).backward()
    expected = [float(p.grad.norm()) for p in model.parameters()]
    numpy.testing.assert_allclose(result.gradient_norm[0], expected, rtol=1e-5)
    assert result.verdict().sentence == "Losses and gradients were finite at the one state measured."
    check_plot(result.plot)


def test_round_trip():
    history = record(30)
    history.loss_finite[3] = False
    result = gradient_flow(history=history)
    again = GradientFlow.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    assert again == result and again.verdict() == result.verdict()
    check_plot(lambda ax: GradientFlow.plot_trend(ax, [(30, result)]))


def test_it_refuses_without_a_history():
    with pytest.raises(MissingQuantity, match="gradient_flow needs history; pass history="):
        gradient_flow()
