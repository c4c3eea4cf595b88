"""The spectrum against planted eigenvalues, dense Hessians, and what may be concluded from them."""

import copy
import math

import numpy
import pytest
import torch
from torch import nn

import diag
from diag.curvature.class_directions import class_directions
from diag.curvature.matrices import Hessian
from diag.errors import InvalidInput, MissingQuantity
from diag.instruments.hessian_spectrum.instrument import HessianSpectrum
from diag.linalg.operator import FunctionOperator, LinearOperator
from diag.registry import attempt
from diag.result import Level, Skipped
from diag.testing import check_result, classification, planted_spectrum, refusal


def planted(outliers, bulk=0.1, size=300, seed=0, dtype=torch.float64):
    """A dense operator with these outliers over a bulk uniform in [-bulk, bulk], and its eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    rest = (torch.rand(size - len(outliers), generator=generator, dtype=torch.float64) * 2 - 1) * bulk
    values = torch.cat([torch.tensor(outliers, dtype=torch.float64), rest])
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    matrix = (basis * values) @ basis.T
    return LinearOperator.from_matrix(((matrix + matrix.T) / 2).to(dtype)), values.sort(descending=True).values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_probes", [1, 3])
def test_planted_spectrum_within_its_own_bounds(dtype, num_probes):
    operator, values = planted([10.0, 5.0, 2.0], dtype=dtype)
    result = diag.hessian_spectrum(hessian=operator, num_eigenvalues=3, num_probes=num_probes, trace_probes=40)
    error = numpy.abs(result.eigenvalues - values[:3].numpy())
    assert (error <= result.residuals + 1e-12).all() and (error < 1e-5).all()
    assert abs(result.smallest - values[-1]) <= result.smallest_residual + 1e-12
    assert abs(result.trace - values.sum()) < 4 * result.trace_standard_error
    assert abs(result.frobenius_norm - values.norm()) < 4 * result.frobenius_norm_standard_error
    # 297 of 300 are in the bulk, which the density holds, and half of it is negative.
    mass = numpy.trapezoid(result.density, result.density_grid)
    assert mass == pytest.approx(297 / 300, abs=0.02)
    below = float((values < -1e-3 * 10).double().mean())
    # One probe of 300 Gaussian entries: standard deviation about sqrt(2 / 300) / 2, and what 80 steps resolve.
    assert abs(result.negative_share - below) < 4 * result.negative_share_standard_error < 0.25
    assert 0.02 < result.distribution_error < 0.2
    assert math.isnan(result.num_outliers) and numpy.isnan(result.sampling_errors).all()
    assert result.num_products == operator.num_products
    check_result(result)


def test_a_small_model_is_known_wholly():
    """With fewer parameters than steps the run is a full diagonalisation: no standard errors are left."""
    values = [3.0, 1.0, 1.0, 0.5, 0.0, -0.01]
    model, loss_fn, data = planted_spectrum(values)
    result = diag.hessian_spectrum(diag.Snapshot(model, loss_fn, data), num_eigenvalues=4)
    assert result.eigenvalues == pytest.approx([3, 1, 1, 0.5], abs=1e-10)
    assert result.smallest == pytest.approx(-0.01, abs=1e-10)
    assert (result.trace, result.trace_standard_error) == (pytest.approx(5.49), 0.0)
    assert result.frobenius_norm == pytest.approx(numpy.linalg.norm(values))
    assert (result.negative_share, result.negative_share_standard_error) == (pytest.approx(1 / 6), 0)
    assert result.distribution_error == 0


def dense_hessian(problem):
    """The float64 Hessian of the problem's loss by autograd, (P, P)."""
    names = [n for n, _ in problem.model.named_parameters()]
    start = [p.detach().double() for p in problem.model.parameters()]
    x, y = problem.data[0].double(), problem.data[1]

    def loss(flat):
        parts = flat.split([p.numel() for p in start])
        values = {n: part.view(p.shape) for n, part, p in zip(names, parts, start, strict=True)}
        return problem.loss_fn(torch.func.functional_call(problem.model.double(), values, (x,)), y)

    flat = torch.cat([p.reshape(-1) for p in start])
    return torch.autograd.functional.hessian(loss, flat)


def test_a_network_against_its_dense_hessian():
    problem = classification()
    snapshot = problem.snapshot()
    result = diag.hessian_spectrum(snapshot, trace_probes=60)
    values, vectors = torch.linalg.eigh(dense_hessian(classification()))
    dense = values.flip(0)
    # Float32 products through a small network: 1e-6 of the largest eigenvalue, and the residuals say so.
    assert numpy.abs(result.eigenvalues - dense[:10].numpy()).max() < 2e-5
    assert abs(result.smallest - dense[-1]) < 2e-5
    assert abs(result.trace - dense.sum()) < 4 * result.trace_standard_error
    top = vectors[:, -1]
    layers = dict(snapshot.quantity("hessian").layers)
    for name, part in layers.items():
        assert result.layer_shares[name] == pytest.approx(float(top[part].square().sum()), abs=1e-3)
    assert sum(result.layer_shares.values()) == pytest.approx(1, abs=1e-4)
    assert (result.sampling_errors >= 0).all()


def test_sampling_errors_shrink_with_the_data():
    """Half-split differences fall as 1 / sqrt(n): 36 times the data, six times less, within a factor of three."""
    few = diag.hessian_spectrum(classification(examples=30).snapshot()).sampling_errors[0]
    problem = classification(examples=30)
    many = classification(examples=1080)
    big = diag.hessian_spectrum(problem.snapshot(data=many.data)).sampling_errors[0]
    assert big < few


def test_class_directions_by_their_definition():
    """d_c = mean over i in c and c' != c of sqrt(p_ic') (grad z_ic' - sum_k p_ik grad z_ik), from the Jacobian."""
    problem = classification(examples=12)
    model, (x, y) = problem.model.double(), (problem.data[0].double(), problem.data[1])
    found = class_directions(diag.Snapshot(model, problem.loss_fn, (x, y)))
    parameters = dict(model.named_parameters())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(parameters)
    flat = torch.cat([j.reshape(12, 3, -1) for j in jacobian.values()], dim=2)
    p = model(x).softmax(1).detach()
    centred = flat - (p[:, :, None] * flat).sum(1, keepdim=True)
    for c in range(3):
        terms = [p[i, k].sqrt() * centred[i, k] for i in range(12) if y[i] == c for k in range(3) if k != c]
        torch.testing.assert_close(found[c], torch.stack(terms).mean(0).detach(), rtol=1e-10, atol=1e-14)


def test_outliers_are_the_leading_run_within_the_span():
    operator, _ = planted([10.0, 8.0, 6.0, 4.0])
    vectors = torch.linalg.eigh(operator.matrix).eigenvectors.flip(1).T
    inside = torch.stack([vectors[0] + vectors[1], vectors[0] - vectors[1], vectors[3]])
    result = diag.hessian_spectrum(hessian=operator, class_directions=inside, num_eigenvalues=4)
    # The third is outside, so the fourth does not count: a leading run, not a number of all inside.
    assert result.overlaps == pytest.approx([1, 1, 0, 1], abs=1e-6)
    assert (result.num_outliers, result.num_class_directions) == (2, 3)


def test_no_strong_negative_curvature_is_quiet():
    operator, _ = planted([10.0, 5.0])
    verdict = diag.hessian_spectrum(hessian=operator, num_eigenvalues=2).verdict()
    assert verdict.level is Level.OK
    assert "no strong negative curvature (largest eigenvalue 10, smallest -0.0" in verdict.sentence
    assert "nothing about generalisation" in verdict.advice


def test_negative_curvature_warns():
    operator, _ = planted([10.0, 5.0, -3.0])
    verdict = diag.hessian_spectrum(hessian=operator, num_eigenvalues=2).verdict()
    assert verdict.level is Level.WARNING
    assert (
        "This is not a minimum of the loss: it curves downwards by 30 % of its largest curvature"
        in verdict.sentence
    )
    assert verdict.value == pytest.approx(0.3, rel=1e-4) and verdict.threshold == 0.05
    # The threshold is a setting.
    relaxed = diag.hessian_spectrum(hessian=operator, num_eigenvalues=2, negative_above=0.5).verdict()
    assert relaxed.level is Level.OK


def test_what_has_not_converged_is_not_reported():
    spectrum = torch.linspace(0, 1, 2000, dtype=torch.float64)
    operator = FunctionOperator(lambda v: spectrum * v, 2000, torch.float64)
    result = diag.hessian_spectrum(hessian=operator, num_eigenvalues=5, steps=2, max_products=20, tolerance=1e-6)
    assert len(result.eigenvalues) < 5
    assert "had not converged and are not reported: give a larger max_products=." in result.notes[0]
    assert result.verdict().level is Level.UNKNOWN
    assert "did not converge within" in result.verdict().sentence
    check_result(result)


def test_products_that_are_not_finite_are_refused():
    with pytest.raises(InvalidInput, match="is not finite; check the loss and the parameters"):
        diag.hessian_spectrum(hessian=FunctionOperator(lambda v: v / 0, 50))


def test_class_directions_are_missing_for_regression():
    model = nn.Linear(3, 1)
    data = (torch.ones(4, 3), torch.ones(4, 1))
    snapshot = diag.Snapshot(model, nn.functional.mse_loss, data)
    with pytest.raises(MissingQuantity, match="class numbers"):
        snapshot.quantity("class_directions")
    assert math.isnan(diag.hessian_spectrum(snapshot).num_outliers)


def test_unused_parameter_scaled_loss_and_ragged_batch():
    """Three traps of other tools at once: an unused parameter, a loss of 1e-7, a last batch of one example."""
    problem = classification(examples=31)
    plain = diag.hessian_spectrum(problem.snapshot(data=problem.data), num_eigenvalues=3)
    problem.model.unused = nn.Parameter(torch.ones(5))
    x, y = problem.data
    batches = [(x[i : i + 10], y[i : i + 10]) for i in range(0, 31, 10)]
    snapshot = diag.Snapshot(problem.model, lambda z, t: 1e-7 * problem.loss_fn(z, t), batches)
    result = diag.hessian_spectrum(snapshot, num_eigenvalues=3)
    assert result.eigenvalues * 1e7 == pytest.approx(plain.eigenvalues, rel=1e-4)
    assert result.num_parameters == plain.num_parameters + 5


def test_trend_plots_and_result_type():
    operator, _ = planted([10.0, 5.0])
    result = diag.hessian_spectrum(hessian=operator, num_eigenvalues=1)
    assert isinstance(result, HessianSpectrum)
    check_result(result)


# Nothing is missed, nothing is reported twice.


@pytest.mark.parametrize("steps", [20, 80, 200])
def test_no_eigenvalue_is_reported_twice(steps):
    """Without full reorthogonalisation 80 steps give eleven copies of the largest eigenvalue."""
    operator, values = planted([10.0, 5.0, 2.0], dtype=torch.float32)
    result = diag.hessian_spectrum(hessian=operator, num_eigenvalues=6, steps=steps, max_products=400)
    assert result.eigenvalues == pytest.approx(values[:6].numpy(), abs=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("outliers", "expected"),
    [
        ([5.0, 5.0, 3.0, -3.0], [5, 5]),
        ([5.0, 5.0, 5.0, 2.0, -3.0], [5, 5, 5]),
        ([5.0, -4.99, 4.98, 3.0], [5, 4.98, 3]),
    ],
)
def test_multiple_and_crowded_eigenvalues_come_with_their_multiplicity(dtype, outliers, expected):
    """Five steps can be satisfied with one copy of a double eigenvalue: the search for missed ones is not."""
    operator, values = planted(outliers, dtype=dtype)
    result = diag.hessian_spectrum(hessian=operator, num_eigenvalues=len(expected), steps=5)
    assert result.eigenvalues == pytest.approx(expected, abs=1e-5)
    assert result.smallest == pytest.approx(float(values[-1]), abs=1e-4)
    assert result.num_products == operator.num_products


# The oracles of section 6.6.


def test_oracle_6a_softmax_regression():
    """H = 1/n sum (diag p - p p^T) (x) x x^T; a shift of all logits by one linear map leaves d directions flat."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    model = nn.Linear(5, 3, bias=False).double()
    p = model(x).softmax(1).detach()
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    dense = torch.einsum("nab,ni,nj->aibj", curvature, x, x).reshape(15, 15) / 40
    expected = torch.linalg.eigvalsh(dense).flip(0).numpy()
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), (x, torch.arange(40) % 3))
    result = diag.hessian_spectrum(snapshot, num_eigenvalues=15)
    assert result.eigenvalues == pytest.approx(expected, abs=1e-12)
    assert (numpy.abs(result.eigenvalues) < 1e-12).sum() == 5
    # The Gauss-Newton matrix of a linear model is its Hessian.
    linear = diag.hessian_spectrum(hessian=snapshot.quantity("gauss_newton"), num_eigenvalues=15)
    assert linear.eigenvalues == pytest.approx(expected, abs=1e-12)
    assert linear.smallest > -1e-12
    # Accumulated over ragged batches it is the same.
    batches = [(x[i : i + 9], torch.arange(40)[i : i + 9] % 3) for i in range(0, 40, 9)]
    ragged = diag.hessian_spectrum(diag.Snapshot(model, nn.CrossEntropyLoss(), batches), num_eigenvalues=15)
    assert ragged.eigenvalues == pytest.approx(expected, abs=1e-12)


class Chain(nn.Module):
    """f(x) = w_1 w_2 ... w_L x, at the balanced weights that give `target`."""

    def __init__(self, length, target):
        super().__init__()
        self.weights = nn.Parameter(torch.full((length,), target ** (1 / length), dtype=torch.float64))

    def forward(self, x):
        return self.weights.prod() * x


@pytest.mark.parametrize("length", [2, 3, 5])
def test_oracle_6b_scalar_chain(length):
    """At the balanced minimum of 1/2 (w_1 ... w_L - y)^2 the only eigenvalue but zero is L y^(2 - 2/L)."""
    y = 1.7
    one = torch.ones(1, 1, dtype=torch.float64)
    snapshot = diag.Snapshot(Chain(length, y), lambda z, t: 0.5 * (z - t).square().mean(), (one, y * one))
    result = diag.hessian_spectrum(snapshot, num_eigenvalues=length)
    expected = [length * y ** (2 - 2 / length), *[0.0] * (length - 1)]
    assert result.eigenvalues == pytest.approx(expected, abs=1e-10)


def test_oracle_6d_decay_shifts_every_eigenvalue():
    problem = classification()
    plain = diag.hessian_spectrum(problem.snapshot(), num_eigenvalues=5)
    shifted = diag.hessian_spectrum(problem.snapshot(), num_eigenvalues=5, weight_decay=0.25)
    # The same Krylov space in exact arithmetic; here to float32.
    assert shifted.eigenvalues - 0.25 == pytest.approx(plain.eigenvalues, abs=1e-5)
    assert shifted.smallest - 0.25 == pytest.approx(plain.smallest, abs=1e-5)
    assert shifted.sampling_errors == pytest.approx(plain.sampling_errors, abs=1e-5)


def test_oracle_6e_reparametrisation_changes_the_spectrum_at_equal_function():
    """theta' = D theta gives H' = D^-1 H D^-1: why a size of an eigenvalue judges nothing."""
    model, loss, data = planted_spectrum([4.0, 1.0, 0.25])
    scale = torch.tensor([10.0, 0.1, 3.0], dtype=torch.float64)
    other = LinearOperator.from_matrix(model.matrix / (scale[:, None] * scale))
    result = diag.hessian_spectrum(hessian=other, num_eigenvalues=3)
    expected = torch.linalg.eigvalsh(model.matrix / (scale[:, None] * scale)).flip(0).numpy()
    assert result.eigenvalues == pytest.approx(expected, rel=1e-8)
    assert result.eigenvalues[0] > 10 * diag.hessian_spectrum(diag.Snapshot(model, loss, data)).eigenvalues[0]


# What is left, and what is refused.


def test_the_density_has_the_distribution_of_the_eigenvalues():
    """Kolmogorov's distance to the dense spectrum; 3 probes of 500 entries leave sqrt(2 / 1500) / 2 = .02, and the
    smoothing and the nodes, of which 80 stand for 500 eigenvalues, some more."""
    operator, values = planted([10.0, 5.0], bulk=1.0, size=500)
    result = diag.hessian_spectrum(hessian=operator, num_eigenvalues=2, num_probes=3)
    mass = numpy.diff(result.density_grid) * (result.density[1:] + result.density[:-1]) / 2
    bulk = values[2:].numpy()
    exact = numpy.array([(bulk <= x).mean() for x in result.density_grid[1:]]) * 498 / 500
    assert numpy.abs(numpy.cumsum(mass) - exact).max() < 0.08


def test_a_hessian_of_zeros_is_no_saddle():
    result = diag.hessian_spectrum(hessian=LinearOperator.from_matrix(torch.zeros(6, 6)), num_eigenvalues=2)
    assert (result.trace, result.negative_share) == (0.0, 0.0)
    assert result.verdict().level is Level.OK
    check_result(result)


def test_a_maximum_is_no_minimum():
    result = diag.hessian_spectrum(hessian=LinearOperator.from_matrix(-torch.eye(4).double()), num_eigenvalues=2)
    assert result.verdict().level is Level.WARNING


def test_a_residual_across_the_threshold_leaves_it_open():
    operator, _ = planted([10.0, -0.5])
    result = diag.hessian_spectrum(hessian=operator, num_eigenvalues=1)
    unsure = type(result)(**{**vars(result), "smallest_residual": 0.01}).verdict()
    assert unsure.level is Level.UNKNOWN
    assert (
        "curves downwards strongly is not known, as the smallest eigenvalue may be off by 0.01" in unsure.sentence
    )


def test_the_memory_cap_is_kept_and_the_answer_is_the_same():
    operator, values = planted([10.0, 5.0, 2.0])
    cap = 40 * 300 * 8
    result = diag.hessian_spectrum(hessian=operator, num_eigenvalues=3, memory=cap)
    assert result.eigenvalues == pytest.approx(values[:3].numpy(), abs=1e-6)
    assert "bytes hold" in refusal(diag.hessian_spectrum, hessian=operator, memory=5 * 300 * 8)


def test_refusals():
    operator, _ = planted([10.0])
    measure = diag.hessian_spectrum
    assert "expected a LinearOperator: wrap a matrix in" in refusal(measure, hessian=torch.eye(3))
    assert "num_eigenvalues takes a whole number of 1 or more" in refusal(
        measure, hessian=operator, num_eigenvalues=0
    )
    assert "expected (classes, 300)" in refusal(measure, hessian=operator, class_directions=torch.ones(2, 4))
    assert "tolerance takes a number above 0 and up to 1" in refusal(measure, hessian=operator, tolerance=2.0)
    assert "expected at least 2, which" in refusal(measure, hessian=operator, trace_probes=1)


class StraightThrough(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x):
        z = self.inner(x)
        return z + (z.round() - z).detach()


def test_a_model_without_right_products_is_skipped_with_the_reason():
    data = (torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.randn(8, 2))
    snapshot = diag.Snapshot(StraightThrough(), nn.functional.mse_loss, data)
    outcome = attempt(snapshot, diag.hessian_spectrum)
    assert isinstance(outcome, Skipped)
    assert "measure a loss without them" in outcome.reason


def test_the_self_test_is_in_the_notes():
    result = diag.hessian_spectrum(classification().snapshot(), num_eigenvalues=1)
    assert "Products agree with finite differences to" in result.notes[-1]


def test_a_killed_measurement_goes_on_where_it_was(tmp_path, monkeypatch):
    """At the same parameters on the same data, and at no others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    data, state = (torch.randn(30, 4), torch.arange(30) % 2), copy.deepcopy(model.state_dict())

    def measure(**settings):
        snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), data)
        return diag.hessian_spectrum(snapshot, num_eigenvalues=3, steps=30, half_split=False, **settings)

    whole, counted = measure(), []
    plain = Hessian._matvec

    def counting(self, v):
        if len(counted) == 25:
            raise KeyboardInterrupt
        counted.append(1)
        return plain(self, v)

    monkeypatch.setattr(Hessian, "_matvec", counting)
    with pytest.raises(KeyboardInterrupt):
        measure(checkpoint=str(tmp_path))
    monkeypatch.setattr(Hessian, "_matvec", plain)
    with torch.no_grad():
        model[0].bias.add_(0.1)
    assert measure(checkpoint=str(tmp_path)).trace != whole.trace
    assert len(list(tmp_path.iterdir())) == 1
    model.load_state_dict(state)
    resumed = measure(checkpoint=str(tmp_path))
    assert numpy.allclose(resumed.eigenvalues, whole.eigenvalues, rtol=1e-5) and not list(tmp_path.iterdir())


def test_eigenvectors_are_kept_where_they_are_asked_for(tmp_path):
    """Each satisfies its defining identity to within its residual; without a word none is kept, nor in a file."""
    operator, _ = planted([10.0, 5.0, 2.0])
    assert diag.hessian_spectrum(hessian=operator, num_eigenvalues=3).eigenvectors is None
    result = diag.hessian_spectrum(hessian=operator, num_eigenvalues=3, keep_eigenvectors=True)
    vectors = torch.from_numpy(result.eigenvectors.copy())
    images = torch.stack([operator.matvec(v) for v in vectors])
    errors = (images - torch.from_numpy(result.eigenvalues.copy())[:, None] * vectors).norm(dim=1)
    assert vectors.shape == (3, 300) and (errors.numpy() <= result.residuals + 1e-12).all()
    assert torch.allclose(vectors @ vectors.T, torch.eye(3, dtype=vectors.dtype), atol=1e-9)
    with pytest.raises(ValueError, match="read-only"):
        result.eigenvectors[0] = 0
    result.save(tmp_path / "spectrum.json")
    assert diag.load(tmp_path / "spectrum.json").eigenvectors is None


def test_kept_eigenvectors_are_in_the_order_of_the_parameters():
    """The entries are those of the dense Hessian's eigenvector, up to its sign."""
    result = diag.hessian_spectrum(classification().snapshot(), num_eigenvalues=1, keep_eigenvectors=True)
    top = torch.linalg.eigh(dense_hessian(classification())).eigenvectors[:, -1].numpy()
    found = result.eigenvectors[0]
    # A residual of 1e-3 of the largest eigenvalue turns the vector by at most that over the gap, here under 1e-2.
    assert abs(found @ top) == pytest.approx(1, abs=1e-3)
