"""One case that warns, one that stays quiet, one of unknown and one without verdict; the numbers are known."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.connectivity.symmetries import find_symmetries
from diag.errors import InvalidInput, MissingQuantity, Unsupported
from diag.instruments.mode_connectivity.instrument import mode_connectivity
from diag.result import Level
from diag.testing import check_instrument, check_result, classification, leaves_no_trace, refusal


def digits(n=1797):
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))[:n]
    x = torch.from_numpy(found.data).double() / 16
    return x[order], torch.from_numpy(found.target)[order]


def trained(init=0, order=0, width=32, norm=False, steps=200):
    x, y = digits(1000)
    with torch.random.fork_rng():
        torch.manual_seed(init)
        layers = [nn.Linear(64, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]
        layers += [nn.Linear(width, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(width, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(order)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def pair():
    return trained(1, 1), trained(2, 2)


def snapshot(model, **more):
    x, y = digits()
    return diag.Snapshot(model, F.cross_entropy, (x[:1000], y[:1000]), held_out=(x[1000:], y[1000:]), **more)


def test_contract():
    check_instrument(mode_connectivity)


def test_two_independent_networks_are_separated_and_matching_brings_them_closer(pair):
    a, b = pair
    with leaves_no_trace(a), leaves_no_trace(b):
        result = mode_connectivity(snapshot(a, other=b), align="weights")
    # At width 32 the barrier falls fivefold; the reproduction asserts more, at widths 64 and 256.
    assert result.error_barrier > 0.1 and result.barrier > 3 * result.aligned_barrier
    before = mode_connectivity(snapshot(a), other=b.state_dict())
    verdict = before.verdict()
    assert verdict.level is Level.WARNING and "separated by the straight line: on held-out data" in verdict.sentence
    assert 'align="weights"' in verdict.advice and verdict.threshold == 0.02
    assert math.isnan(before.aligned_barrier) and before.aligned_state is None
    assert "after the units of the second were matched by weights (before:" in result.verdict().sentence
    assert "does not show that the solutions differ" in result.verdict().refutation
    b.load_state_dict(result.aligned_state)  # the aligned state is a state dict of the same function
    assert mode_connectivity(snapshot(a), other=b).barrier == pytest.approx(result.aligned_barrier, rel=1e-9)


def test_two_runs_from_a_trained_ancestor_are_connected():
    ancestor = trained(1, 1, steps=150)
    forks = []
    for seed in (1, 2):
        model = copy.deepcopy(ancestor)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        x, y = digits(1000)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(100):
            rows = torch.randint(len(x), (64,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        forks.append(model.eval())
    result = mode_connectivity(snapshot(forks[0], other=forks[1], previous=ancestor.state_dict()))
    assert result.verdict().level is Level.OK
    assert "are connected by the straight line" in result.verdict().sentence
    assert 0 < result.angle < 180


def test_a_permuted_copy_has_a_barrier_that_alignment_removes(pair):
    """Naive barrier large; after matching the weights are bit-equal and the bracket is exactly zero."""
    a, _ = pair
    groups = find_symmetries(a, digits(4))
    moved = groups.apply(groups.random(3), a.state_dict())
    for method in ("weights", "activations"):
        result = mode_connectivity(snapshot(a), other=moved, align=method)
        assert result.barrier > 0.1
        assert all(torch.equal(t, result.aligned_state[n]) for n, t in a.state_dict().items())
        assert result.aligned_barrier == 0 and result.aligned_distance == 0
        assert result.alignment_passes <= 4
        assert result.function_change < 1e-10
        assert result.verdict().level is Level.OK


def test_interpolated_batch_norm_statistics_are_a_control_without_a_verdict():
    a, b = trained(1, 1, norm=True, steps=100), trained(2, 2, norm=True, steps=100)
    reset = mode_connectivity(snapshot(a, other=b), align="weights")
    lerp = mode_connectivity(snapshot(a, other=b), align="weights", norm_stats="lerp")
    assert reset.aligned_barrier < lerp.aligned_barrier
    assert lerp.verdict().level is Level.NOT_APPLICABLE and 'norm_stats="reset"' in lerp.verdict().sentence
    assert reset.reset_shift > 0 and math.isnan(lerp.reset_shift)
    assert reset.norm_stats == "reset"


def test_untrained_networks_get_no_verdict():
    a, b = trained(1, steps=0), trained(2, steps=0)
    verdict = mode_connectivity(snapshot(a, other=b)).verdict()
    assert verdict.level is Level.NOT_APPLICABLE
    assert "a line to an untrained network says nothing" in verdict.sentence


def test_a_regression_has_no_line_from_a_paper():
    x = torch.randn(80, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x.sum(1, keepdim=True)
    models = [nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double() for _ in range(2)]
    for seed, model in enumerate(models):
        for i, p in enumerate(model.parameters()):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * seed + i), dtype=p.dtype)
    result = mode_connectivity(diag.Snapshot(models[0], F.mse_loss, (x, y), other=models[1]))
    same = mode_connectivity(diag.Snapshot(models[0], F.mse_loss, (x, y), other=models[0].state_dict()))
    assert math.isnan(result.error_barrier)
    assert same.verdict().level is Level.OK and "no barrier beyond the noise" in same.verdict().sentence
    if result.barrier > 2 * result.barrier_standard_error:
        assert result.verdict().level is Level.UNKNOWN and "no paper gives a line" in result.verdict().sentence


def test_uncertain_near_the_line(pair):
    result = mode_connectivity(snapshot(pair[0], other=pair[1]))
    near = dataclasses.replace(result, deciding_error_barrier=0.021, deciding_standard_error=0.001)
    assert near.verdict().level is Level.UNKNOWN and "within the uncertainty" in near.verdict().sentence
    clear = dataclasses.replace(result, deciding_error_barrier=0.05, deciding_standard_error=0.001)
    assert clear.verdict().level is Level.WARNING and "partly connected" in clear.verdict().sentence
    lost = dataclasses.replace(result, deciding_error_barrier=math.inf)
    assert lost.verdict().level is Level.UNKNOWN


def test_everything_at_once_on_a_small_classifier():
    problem = classification()
    with leaves_no_trace(problem.model):
        result = mode_connectivity(
            problem.snapshot(), align="activations", repair=True, layers=True, path="bezier", bezier_steps=20
        )
    check_result(result)
    assert set(result.curves) == {"held-out", "aligned", "aligned, held-out", "repaired", "Bezier curve"}
    assert set(result.layer_barriers) == set(result.layer_barriers_back) and len(result.layer_barriers) >= 2
    assert result.variance_ratios


def test_refusals(pair):
    a, _ = pair
    assert refusal(mode_connectivity, snapshot(a)) == (
        "other is missing: the snapshot has no second network; give it other= a state dict or a Snapshot."
    )
    with pytest.raises(
        InvalidInput, match=r"'0.weight' has shape \(32, 64\) in the model and \(16, 64\) in other \("
    ):
        mode_connectivity(snapshot(a), other=trained(1, width=16, steps=0))
    with pytest.raises(InvalidInput, match=r"points takes a whole number of 3 or more .* and not 2"):
        mode_connectivity(snapshot(a), other=a, points=2)
    with pytest.raises(InvalidInput, match="align is 'units'; expected None, 'weights' or 'activations'"):
        mode_connectivity(snapshot(a), other=a, align="units")
    with pytest.raises(InvalidInput, match="path is 'arc'; expected 'line' or 'bezier'"):
        mode_connectivity(snapshot(a), other=a, path="arc")
    with pytest.raises(MissingQuantity, match="has no data"):
        mode_connectivity(diag.Snapshot(a, F.cross_entropy), other=a)


def test_a_model_without_movable_units_cannot_be_aligned():
    model = nn.Linear(64, 10).double()
    with pytest.raises(Unsupported, match=r"no group of units that could be permuted .* set align=None"):
        mode_connectivity(snapshot(model), other=model.state_dict(), align="weights")
