"""Oracles of the line between two networks, and that measuring it leaves nothing behind."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.connectivity.interpolation import Interpolation, straight
from diag.connectivity.interpolation_bezier import bezier, train_control_point
from diag.connectivity.interpolation_layers import angle, first_stable_step, layer_barriers
from diag.connectivity.interpolation_repair import Repair
from diag.errors import InvalidInput, MissingQuantity, Unsupported
from diag.testing import leaves_no_trace

GRID = [i / 10 for i in range(11)]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(seed, norm=False, width=8, dtype=torch.float64):
    layers = [nn.Linear(4, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU(), nn.Linear(width, 3)]
    model = nn.Sequential(*layers).to(dtype)
    for i, p in enumerate(model.parameters()):
        p.data = randn(*p.shape, seed=100 * seed + i, dtype=dtype)
    if norm:
        with torch.no_grad():
            model.train()
            for _ in range(20):
                model(randn(60, 4, seed=1, dtype=dtype) * (1 + seed))
    return model.eval()


def data(n=60, dtype=torch.float64):
    x = randn(n, 4, seed=1, dtype=dtype)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def path(model, loss=F.cross_entropy, batch=None, **more):
    return Interpolation(diag.Snapshot(model, loss, batch or data(), **more))


def test_the_same_network_twice_has_a_bracket_of_exactly_zero():
    """At every point, in float64 and float32."""
    for dtype in (torch.float64, torch.float32):
        model = network(1, dtype=dtype)
        found = path(model, batch=data(dtype=dtype))
        profile = found.profile(found.fit(copy.deepcopy(model).state_dict()), GRID, refine=2)
        assert profile.brackets.eq(0).all() and profile.error_brackets.eq(0).all()
        assert profile.barrier == profile.instability == 0


def test_a_convex_problem_has_the_bracket_of_its_quadratic():
    """Linear regression, -1/2 a (1-a) D^T H D with the Hessian 2/n X^T X of the mean square."""
    model = nn.Linear(4, 1, bias=False).double()
    other = nn.Linear(4, 1, bias=False).double()
    x, y = randn(50, 4), randn(50, 1, seed=2)
    found = path(model, F.mse_loss, (x, y))
    profile = found.profile(other.state_dict(), GRID)
    change = (other.weight - model.weight).detach().flatten()
    curvature = float(change @ (2 / 50 * x.T @ x) @ change)
    expected = -0.5 * profile.alphas * (1 - profile.alphas) * curvature
    assert torch.allclose(profile.brackets, expected, atol=1e-12, rtol=0)
    assert profile.barrier == 0 and math.isnan(profile.instability)


def test_losses_errors_and_standard_errors_are_those_of_plain_evaluation():
    a, b = network(1), network(2)
    x, y = data()
    profile = path(a).profile(b.state_dict(), [0.3])
    mixed = copy.deepcopy(a)
    for p, q in zip(mixed.parameters(), b.parameters(), strict=True):
        p.data = 0.7 * p.data + 0.3 * q.data
    losses = [F.cross_entropy(m(x), y, reduction="none").detach() for m in (a, mixed, b)]
    excess = losses[1] - 0.7 * losses[0] - 0.3 * losses[2]
    assert torch.allclose(profile.losses, torch.stack(losses).mean(1), rtol=1e-12)
    assert float(profile.brackets[1]) == pytest.approx(float(excess.mean()), rel=1e-10)
    assert float(profile.standard_errors[1]) == pytest.approx(float(excess.std() / 60**0.5), rel=1e-10)
    errors = [float((m(x).argmax(1) != y).double().mean()) for m in (a, mixed, b)]
    assert profile.errors.tolist() == pytest.approx(errors)
    assert profile.instability == pytest.approx(max(errors) - (errors[0] + errors[2]) / 2)


def test_refinement_only_adds_points_beside_the_maximum():
    found = path(network(1))
    end = found.fit(network(2).state_dict())
    coarse, fine = found.profile(end, [0.5]), found.profile(end, [0.5], refine=3)
    assert set(coarse.alphas.tolist()) < set(fine.alphas.tolist())
    assert fine.barrier >= coarse.barrier
    exact = found.profile(end, [i / 200 for i in range(201)])
    # Three bisections leave an interval of 1/16 around the maximum of a curve that is smooth there.
    assert abs(float(fine.alphas[fine.peak] - exact.alphas[exact.peak])) <= 1 / 16


def test_ends_with_interpolated_statistics_are_the_networks_themselves():
    """Lerp reproduces the ends; reset changes them slightly, by how much is known."""
    a, b = network(1, norm=True), network(2, norm=True)
    x, y = data()
    found = path(a)
    own = [float(F.cross_entropy(m(x), y).detach()) for m in (a, b)]
    lerp = found.profile(b.state_dict(), [0.5], norm_stats="lerp")
    assert lerp.losses[[0, -1]].tolist() == pytest.approx(own, rel=1e-12)
    reset = found.profile(b.state_dict(), [0.5], norm_stats="reset")
    expected = []
    for model in (a, b):
        again = copy.deepcopy(model).train()
        again[1].reset_running_stats()
        again[1].momentum = None
        with torch.no_grad():
            again(x)
            expected.append(float(F.cross_entropy(again.eval()(x), y)))
    assert reset.losses[[0, -1]].tolist() == pytest.approx(expected, rel=1e-12)
    keep = found.profile(b.state_dict(), [0.5], norm_stats="keep")
    assert float(keep.losses[0]) == pytest.approx(own[0], rel=1e-12)
    assert float(keep.losses[-1]) != pytest.approx(own[1], rel=1e-3)


def test_both_models_and_all_random_states_stay_as_they_are():
    a, b = network(1, norm=True), network(2, norm=True)
    a.train()
    a(data()[0]).sum().backward()
    with leaves_no_trace(a), leaves_no_trace(b):
        found = path(a)
        end = found.fit(b)
        found.profile(end, GRID, refine=1)
        Repair(found, end).variance_ratios()
        train_control_point(found, end, steps=3)
        layer_barriers(found, end)


def test_integer_entries_stay_and_half_precision_is_interpolated_in_float32():
    a, b = network(1).to(torch.bfloat16), network(2).to(torch.bfloat16)
    found = path(a, batch=(data()[0].to(torch.bfloat16), data()[1]))
    profile = found.profile(b.state_dict(), [0.25])
    expected = torch.lerp(a[0].weight.float(), b[0].weight.float(), 0.25).to(torch.bfloat16)
    straight(found.start, found.fit(b))(found.copy, 0.25)
    assert torch.equal(found.copy[0].weight, expected)
    assert profile.losses.isfinite().all()


def test_repair_gives_the_units_the_promised_mean_and_spread():
    a, b = network(1), network(2)
    found = path(a)
    end = found.fit(b)
    repair = Repair(found, end)
    assert list(repair.layers) == ["0"]
    x = data()[0]
    goal_std = (a[0](x).std(0, correction=0) + b[0](x).std(0, correction=0)) / 2
    goal_mean = (a[0](x).mean(0) + b[0](x).mean(0)) / 2
    mixed = 0.5 * (a[0](x) + b[0](x))  # the first layer is linear in its weights
    ratio = (mixed.std(0, correction=0) / goal_std).mean().detach()
    assert repair.variance_ratios()["0"] == pytest.approx(float(ratio), rel=1e-10)
    seen = {}
    with torch.no_grad():
        straight(found.start, end)(found.copy, 0.5)
        with repair.corrected(0.5):
            hook = found.copy[1].register_forward_pre_hook(lambda m, args: seen.update(x=args[0].clone()))
            found.copy(x)
            hook.remove()
    # REPAIR adds 1e-5 of the goal's variance to the one measured: a relative error of half of that over ratio^2.
    least = float((mixed.std(0, correction=0) / goal_std).detach().min())
    assert torch.allclose(seen["x"].std(0, correction=0), goal_std, rtol=0.51e-5 / least**2)
    assert torch.allclose(seen["x"].mean(0), goal_mean, atol=1e-4)


def test_repair_without_a_hidden_layer_is_refused():
    model = nn.Linear(4, 3).double()
    with pytest.raises(Unsupported, match="no hidden linear or convolutional layer"):
        Repair(path(model), model.state_dict())


def test_a_layer_barrier_is_the_plain_loss_over_the_chord():
    a, b = network(1), network(2)
    x, y = data()
    found = path(a)
    barriers = layer_barriers(found, found.fit(b))
    assert list(barriers) == ["0", "2"]
    ends = [float(F.cross_entropy(m(x), y)) for m in (a, b)]
    values = []
    for alpha in (0, 0.25, 0.5, 0.75, 1):
        mixed = copy.deepcopy(a)
        for p, q in zip(mixed[2].parameters(), b[2].parameters(), strict=True):
            p.data = (1 - alpha) * p.data + alpha * q.data
        values.append(float(F.cross_entropy(mixed(x), y)) - (1 - alpha) * ends[0] - alpha * ends[1])
    assert barriers["2"].from_first == pytest.approx(max(values), rel=1e-10)


def test_a_bezier_curve_ends_at_the_networks_and_lowers_the_loss():
    a, b = network(1), network(2)
    found = path(a)
    end = found.fit(b)
    control = train_control_point(found, end, steps=150, learning_rate=0.05)
    line = found.profile(end, GRID)
    curve = found.profile(end, GRID, write=bezier(found.start, control, end))
    assert torch.equal(curve.losses[[0, -1]], line.losses[[0, -1]])
    assert float(curve.losses.mean()) < float(line.losses.mean())
    straight_control = {n: (found.start[n] + end[n]) / 2 for n in control}
    flat = found.profile(end, GRID, write=bezier(found.start, straight_control, end))
    assert torch.allclose(flat.losses, line.losses, rtol=1e-10)  # the degenerate curve is the line


def test_angles_of_a_right_triangle():
    origin = {"w": torch.zeros(2)}
    x, y = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 5.0])}
    assert angle(x, y, origin) == pytest.approx(90)
    assert angle(x, {"w": torch.tensor([1.0, 1.0])}, origin) == pytest.approx(45)
    assert math.isnan(angle(origin, y, origin))
    with pytest.raises(InvalidInput, match="'w' has shape"):
        angle(x, y, {"w": torch.zeros(3)})


def test_the_step_from_which_forks_stay_connected():
    assert first_stable_step([0, 100, 200, 300], [0.3, 0.01, 0.05, 0.0]) == 300
    assert first_stable_step([0, 100, 200], [0.3, 0.01, 0.0]) == 100
    assert first_stable_step([0, 100], [0.0, 0.3]) is None
    with pytest.raises(InvalidInput, match="2 steps and 1 instabilities"):
        first_stable_step([0, 1], [0.1])


def test_a_loss_on_the_whole_batch_gives_means_and_no_standard_error():
    def pairwise(z, y):
        if len(z) < 2:
            raise ValueError("needs pairs")
        return (z[0] - z[1]).square().mean()

    a, b = network(1), network(2)
    profile = path(a, pairwise).profile(b.state_dict(), [0.5])
    assert float(profile.losses[0]) == pytest.approx(float(pairwise(a(data()[0]), None)))
    assert profile.standard_errors.isnan().all()


def test_errors_say_what_to_do():
    found = path(network(1))
    with pytest.raises(InvalidInput, match=r"'0.weight' has shape \(8, 4\) in the model and \(6, 4\) in other"):
        found.fit(network(1, width=6))
    with pytest.raises(InvalidInput, match="other is an int; expected a state dict"):
        found.fit(3)
    for call in (diag.align, diag.connect):
        with pytest.raises(InvalidInput, match="snapshot takes a Snapshot and not a Sequential"):
            call(network(1), [network(1), network(2)])
    moved = path(network(1))
    with torch.no_grad():
        moved.snapshot.model[0].weight.add_(1.0)
    with pytest.raises(InvalidInput, match="has changed since the snapshot was made"):
        moved.fit(network(2))
    end = found.fit(network(2))
    with pytest.raises(InvalidInput, match="norm_stats is 'mean'; expected one of reset, lerp, keep"):
        found.profile(end, [0.5], norm_stats="mean")
    with pytest.raises(InvalidInput, match=r"reaches from 0.0 to 1.5"):
        found.profile(end, [1.5])
    with pytest.raises(MissingQuantity, match="no held-out data"):
        found.profile(end, [0.5], held_out=True)
    with pytest.raises(InvalidInput, match="bezier_steps is 0"):
        train_control_point(found, end, steps=0)
