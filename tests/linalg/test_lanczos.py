"""Lanczos on matrices of known spectrum: the eigenvalues, their multiplicity, and the stated bounds."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diag.errors import InvalidInput
from diag.linalg.lanczos import Eigenpairs, eigenpairs, extract, run_lanczos
from diag.linalg.operator import FunctionOperator, LinearOperator
from diag.linalg.reductions import norm
from diag.linalg.refine import complete
from diag.linalg.ritz import Which, error_bounds

Planted = Callable[..., LinearOperator]


def check_against(pairs: Eigenpairs, expected: Tensor) -> None:
    """Every value within its own stated bound of the one it stands for, in order."""
    assert pairs.converged.all()
    assert ((pairs.values - expected).abs() <= pairs.bounds + 1e-12).all(), (pairs.values - expected, pairs.bounds)


# -- the oracles ---------------------------------------------------------------------------------


def test_o6c_outliers_to_rounding(planted: Planted, o6c: Tensor) -> None:
    pairs = eigenpairs(planted(o6c), largest=3, tolerance=1e-8)
    torch.testing.assert_close(pairs.values, o6c[:3], rtol=1e-8, atol=0)
    check_against(pairs, o6c[:3])


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e7])
def test_o6c_in_float32_at_any_scale(planted: Planted, o6c: Tensor, scale: float) -> None:
    """A loss scaled by 1e-7 must not change an eigenvalue's relative error (others divide by |v| + 1e-6)."""
    pairs = eigenpairs(planted(o6c * scale, torch.float32), largest=3, tolerance=1e-4)
    # The float32 matrix itself has eigenvalues off by 1e-6 of the largest.
    torch.testing.assert_close(pairs.values / scale, o6c[:3], rtol=0, atol=1e-5)


def test_o6a_softmax_regression_has_exactly_d_zeros(planted: Planted) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    p = torch.randn(50, 4, generator=generator, dtype=torch.float64).softmax(1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    matrix = torch.einsum("nij,na,nb->iajb", middle, x, x).reshape(24, 24) / 50
    dense = torch.linalg.eigvalsh(matrix).flip(0)
    pairs = eigenpairs(LinearOperator.from_matrix(matrix), largest=24, tolerance=1e-8)
    torch.testing.assert_close(pairs.values, dense, rtol=0, atol=1e-12)
    assert (pairs.values.abs() < 1e-12).sum() == 6


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_o6b_scalar_chain_has_one_nonzero_eigenvalue(depth: int) -> None:
    y = 1.7
    w = torch.full((depth,), y ** (1 / depth), dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda w: 0.5 * (w.prod() - y) ** 2, w)
    pairs = eigenpairs(LinearOperator.from_matrix(hessian), largest=depth)
    expected = torch.zeros(depth, dtype=torch.float64)
    expected[0] = depth * y ** (2 - 2 / depth)
    torch.testing.assert_close(pairs.values, expected, rtol=1e-12, atol=1e-12)


def test_o6d_weight_decay_shifts_every_eigenvalue(planted: Planted, o6c: Tensor) -> None:
    operator = planted(o6c)
    plain = eigenpairs(operator, largest=3, smallest=1, tolerance=1e-9)
    decayed = eigenpairs(operator.shifted(0.01), largest=3, smallest=1, tolerance=1e-9)
    torch.testing.assert_close(decayed.values, plain.values + 0.01, rtol=0, atol=1e-9)


def test_o6e_rescaled_parameters_have_another_spectrum(planted: Planted, o6c: Tensor) -> None:
    operator, d = planted(o6c), torch.linspace(0.2, 5, 200, dtype=torch.float64)
    dense = torch.linalg.eigvalsh(operator.to_dense() / (d[:, None] * d)).flip(0)
    pairs = eigenpairs(operator.diagonally_scaled(1 / d), largest=2, tolerance=1e-8)
    torch.testing.assert_close(pairs.values, dense[:2], rtol=1e-8, atol=0)
    assert pairs.values[0] > 1.5 * o6c[0], "another spectrum at equal function"


def test_o6f_a_positive_semidefinite_matrix_shows_no_negative_eigenvalue() -> None:
    jacobian = torch.randn(12, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    operator = LinearOperator.from_matrix(jacobian.T @ jacobian)
    pairs = complete(operator, eigenpairs(operator, smallest=3, vectors=True), Which(smallest=3))
    assert (pairs.values.abs() < 1e-8).all(), "the 48 zeros come with their multiplicity"


def test_o6g_a_sum_over_minibatches_is_the_full_matrix() -> None:
    """The accumulated operator has the spectrum of the mean, with the ragged last batch weighted by its size."""
    rows = torch.randn(25, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    full = LinearOperator.from_matrix(rows.T @ rows / 25)
    batches = [LinearOperator.from_matrix(b.T @ b / len(b)) * (len(b) / 25) for b in rows.split(8)]
    accumulated = batches[0] + batches[1] + batches[2] + batches[3]
    torch.testing.assert_close(
        eigenpairs(accumulated, largest=4, tolerance=1e-9).values,
        eigenpairs(full, largest=4, tolerance=1e-9).values,
        rtol=1e-9,
        atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [20, 80, 200])
def test_o6h_no_ghosts_at_any_number_of_steps(
    planted: Planted, o6c: Tensor, steps: int, dtype: torch.dtype
) -> None:
    """Without reorthogonalisation the first eigenvalue comes 2, 11, 25 times at 20, 80, 200 steps."""
    run = run_lanczos(planted(o6c, dtype), None, max_products=steps)
    for value in o6c[:3]:
        assert ((run.ritz.values - value).abs() < 0.1).sum() == 1
    basis = run.space.basis[: run.space.steps].double()
    identity = torch.eye(len(basis), dtype=torch.float64)
    assert (basis @ basis.T - identity).abs().max() < 100 * torch.finfo(dtype).eps
    if steps == 200:  # the whole space: every eigenvalue once, dense arithmetic as the reference
        torch.testing.assert_close(run.ritz.values, o6c.sort().values, rtol=0, atol=1e2 * torch.finfo(dtype).eps)


# -- multiplicity, breakdown and other traps -----------------------------------------------------


def test_two_signs_of_nearly_equal_size(planted: Planted) -> None:
    """Deflated power iteration fails on {5, -4.99, 4.98, 3}."""
    pairs = eigenpairs(planted([5, -4.99, 4.98, 3]), magnitude=4)
    torch.testing.assert_close(pairs.values, torch.tensor([5, -4.99, 4.98, 3], dtype=torch.float64))
    larger = eigenpairs(planted([5, -4.99, 4.98, 3] + [0.01 * i for i in range(60)]), magnitude=4, tolerance=1e-6)
    torch.testing.assert_close(larger.values, pairs.values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_multiple_eigenvalues_come_with_their_multiplicity(planted: Planted, dtype: torch.dtype) -> None:
    operator = planted([5.0] * 3 + [-2.0] * 2 + [1.0] * 95, dtype)
    pairs = eigenpairs(operator, largest=4, smallest=3)
    expected = torch.tensor([5, 5, 5, 1, 1, -2, -2], dtype=torch.float64)
    torch.testing.assert_close(pairs.values, expected, rtol=0, atol=1e-5)
    assert pairs.num_products < 40, "the number of distinct eigenvalues sets the cost, not the size"
    vectors = pairs.vectors.double()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spectrum", [[5.0] * 3 + [1.0] * 61, [5, 4, 3, 2] + [0.0] * 60, [0.0] * 30, [2.0, 2.0]])
def test_breakdown_that_is_noticed_late(
    planted: Planted, spectrum: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where T is looked at every few steps only: the same eigenvalues, by going back."""
    monkeypatch.setattr("diag.linalg.lanczos.looks_every_step", lambda device: False)
    operator = LinearOperator.from_matrix(torch.diag(torch.tensor(spectrum, dtype=torch.float64)))
    for pairs in (eigenpairs(operator, largest=6), eigenpairs(planted(spectrum, torch.float32), largest=6)):
        torch.testing.assert_close(pairs.values, torch.tensor(spectrum, dtype=torch.float64)[:6], rtol=0, atol=1e-5)
    whole = run_lanczos(operator, None, max_products=400)
    assert whole.space.exhausted
    torch.testing.assert_close(whole.ritz.values.flip(0), torch.tensor(spectrum, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rank_deficient_matrix_breaks_down_and_goes_on(planted: Planted, dtype: torch.dtype) -> None:
    pairs = eigenpairs(planted([5, 4, 3, 2] + [0.0] * 96, dtype), largest=10)
    torch.testing.assert_close(
        pairs.values, torch.tensor([5.0, 4, 3, 2] + [0] * 6, dtype=torch.float64), rtol=0, atol=1e-5
    )
    assert pairs.num_products <= 14


def test_zero_matrix_and_size_one(planted: Planted) -> None:
    assert eigenpairs(planted([0.0] * 30), largest=3).values.tolist() == [0, 0, 0]
    single = eigenpairs(planted([-3.0]), largest=1)
    assert single.values.tolist() == [-3.0]
    assert single.converged.all()


def test_more_asked_for_than_there_are(planted: Planted) -> None:
    values = [3.0, 1.0, -1.0, 2.0]
    assert eigenpairs(planted(values), largest=3, smallest=3).values.tolist() == pytest.approx([3, 2, 1, -1])


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    spectrum=st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=12),
    largest=st.integers(1, 4),
    smallest=st.integers(0, 3),
    seed=st.integers(0, 50),
)
def test_small_spectra_with_repeats_come_out_whole(
    spectrum: list[float], largest: int, smallest: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(spectrum, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    matrix = (q * values) @ q.T
    operator = LinearOperator.from_matrix((matrix + matrix.T) / 2)
    pairs = eigenpairs(operator, largest=largest, smallest=smallest, tolerance=1e-8, seed=seed)
    ordered = values.sort(descending=True).values
    if largest + smallest < len(ordered):
        ordered = torch.cat([ordered[:largest], ordered[len(ordered) - smallest :]])
    torch.testing.assert_close(pairs.values, ordered, rtol=0, atol=1e-7)


@settings(deadline=None, max_examples=10, derandomize=True)
@given(seed=st.integers(0, 1000), size=st.integers(30, 80), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_residuals_are_true_and_bounds_hold(seed: int, size: int, dtype: torch.dtype) -> None:
    square = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    operator = LinearOperator.from_matrix((square + square.T).to(dtype))
    pairs = eigenpairs(operator, largest=2, smallest=1, tolerance=1e-3, seed=seed)
    dense = torch.linalg.eigvalsh(operator.matrix.double()).flip(0)
    expected = torch.stack([dense[0], dense[1], dense[-1]])
    check_against(pairs, expected)
    for value, vector, residual in zip(pairs.values, pairs.vectors, pairs.residuals, strict=True):
        true = norm(operator.matvec(vector) - value.to(dtype) * vector)
        assert abs(true - residual) <= 20 * pairs.rounding + 1e-12


def test_criteria_agree_on_values_and_residual_takes_longer(planted: Planted) -> None:
    operator = planted(torch.linspace(0, 1, 300) ** 4)
    quick = eigenpairs(operator, largest=3, criterion="bound", seed=1)
    careful = eigenpairs(operator, largest=3, criterion="residual", seed=1)
    assert quick.num_products < careful.num_products
    assert (careful.residuals <= 1e-3 * careful.values).all()
    assert ((quick.values - careful.values).abs() <= quick.bounds).all()


def test_no_products_are_refused_and_one_is_a_rayleigh_quotient(planted: Planted) -> None:
    operator = planted([3.0, 2.0, 1.0])
    with pytest.raises(InvalidInput, match=r"max_products is 0; expected at least 1\."):
        eigenpairs(operator, largest=1, max_products=0)
    start = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64) / 3
    which = Which(largest=1)
    pairs = extract(run_lanczos(operator, which, max_products=1, start=start), which, seed=0)
    assert pairs.values.tolist() == pytest.approx([float(start @ operator.matvec(start))])
    assert not pairs.converged.any() and pairs.num_products == 1


def test_unconverged_pairs_say_so(planted: Planted) -> None:
    pairs = eigenpairs(planted(torch.linspace(0, 1, 300)), largest=5, max_products=12, tolerance=1e-6)
    assert not pairs.converged.any()
    assert pairs.num_products == 12


def test_error_bounds_by_hand() -> None:
    values, residuals = torch.tensor([0.0, 1.0]), torch.tensor([0.1, 0.5])
    # gap of 0: 1 - 0.5 = 0.5 -> 0.01 / 0.5; gap of 1: 1 - 0.1 = 0.9 -> 0.25 / 0.9.
    torch.testing.assert_close(error_bounds(values, residuals), torch.tensor([0.02, 0.25 / 0.9]))


# -- storage, memory, warm start -----------------------------------------------------------------


def decaying(size: int, dtype: torch.dtype = torch.float32) -> tuple[LinearOperator, Tensor]:
    """A large diagonal operator: outliers over a bulk, products that cost nothing."""
    bulk = torch.linspace(-0.05, 0.05, size - 12, dtype=torch.float64)
    spectrum = torch.cat([torch.linspace(3, 1, 12, dtype=torch.float64), bulk])
    diagonal = spectrum.to(dtype)
    return FunctionOperator(lambda v: diagonal * v, size, dtype), spectrum


def test_memory_cap_is_kept_by_thick_restarts() -> None:
    operator, spectrum = decaying(20_000)
    vectors = 14
    memory = 4 * 20_000 * 4 + vectors * 20_000 * 4
    run = run_lanczos(operator, Which(largest=5), max_products=500, memory=memory)
    pairs = extract(run, Which(largest=5), seed=0)
    assert run.space.basis.numel() * 4 <= memory - 4 * 20_000 * 4
    assert run.num_products > vectors, "the test must restart to mean anything"
    torch.testing.assert_close(pairs.values, spectrum[:5], rtol=1e-3, atol=0)
    assert run.satisfied


def test_restarts_keep_both_ends(planted: Planted) -> None:
    spectrum = torch.linspace(-1, 1, 400, dtype=torch.float64) ** 3
    pairs = eigenpairs(
        planted(spectrum), largest=3, smallest=3, memory=30 * 400 * 8, tolerance=1e-6, max_products=3000
    )
    ordered = spectrum.flip(0)
    expected = torch.cat([ordered[:3], ordered[-3:]])
    assert pairs.num_products > 26
    check_against(pairs, expected)


def test_a_cap_that_is_too_small_is_refused(planted: Planted, o6c: Tensor) -> None:
    with pytest.raises(
        InvalidInput, match=r"basis vectors of size 200, and 3 eigenpairs need 6; give at least 17600"
    ):
        eigenpairs(planted(o6c), largest=3, memory=9_000)
    fits = eigenpairs(planted(o6c), largest=3, memory=17_600)
    torch.testing.assert_close(fits.values, o6c[:3], rtol=1e-3, atol=0)


def test_warm_start_from_earlier_vectors_saves_products(planted: Planted) -> None:
    spectrum = torch.linspace(0, 1, 500, dtype=torch.float64) ** 6
    cold = eigenpairs(planted(spectrum), largest=5)
    warm = eigenpairs(planted(spectrum), largest=5, start=cold.vectors)
    assert warm.num_products < cold.num_products
    check_against(warm, spectrum.flip(0)[:5])


def test_warm_start_finds_what_has_risen_since(planted: Planted, o6c: Tensor) -> None:
    """A start inside an invariant subspace would never leave it."""
    operator = planted(o6c)
    before = eigenpairs(operator, largest=3, tolerance=1e-10)
    risen = eigenpairs(operator, smallest=1, tolerance=1e-10).vectors[0]
    dense = operator.to_dense() + 20 * torch.outer(risen, risen)
    after = eigenpairs(LinearOperator.from_matrix((dense + dense.T) / 2), largest=3, start=before.vectors)
    torch.testing.assert_close(after.values, torch.linalg.eigvalsh(dense).flip(0)[:3], rtol=1e-3, atol=0)


def test_same_seed_same_numbers_and_global_randomness_untouched(planted: Planted, o6c: Tensor) -> None:
    state = torch.get_rng_state()
    first, second = (eigenpairs(planted(o6c), largest=3, seed=4) for _ in range(2))
    other = eigenpairs(planted(o6c), largest=3, seed=5)
    assert torch.equal(first.values, second.values)
    assert not torch.equal(first.residuals, other.residuals)
    assert torch.equal(torch.get_rng_state(), state)


# -- refusals ------------------------------------------------------------------------------------


def test_products_that_are_not_finite_are_refused() -> None:
    operator = FunctionOperator(lambda v: v * float("nan"), 50)
    with pytest.raises(InvalidInput, match=r"product .* within the first 1 steps is not finite; check the loss"):
        eigenpairs(operator, largest=1)


def test_an_asymmetric_operator_shows_in_its_bounds(planted: Planted, o6c: Tensor) -> None:
    matrix = planted(o6c).to_dense()
    skew = torch.randn(200, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wrong = FunctionOperator(lambda v: matrix @ v + 0.02 * (skew - skew.T) @ v, 200, torch.float64)
    pairs = eigenpairs(wrong, largest=3, max_products=60)
    assert pairs.rounding > 0.05
    assert not pairs.converged.all()


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({}, "with at least one eigenvalue"),
        ({"largest": -1}, "expected largest and smallest, or magnitude"),
        ({"largest": 1, "magnitude": 1}, "expected largest and smallest, or magnitude"),
        ({"largest": 1, "tolerance": 0.0}, "expected a number between 0 and 1"),
        ({"largest": 1, "criterion": "luck"}, "expected 'bound' or 'residual'"),
        ({"largest": 1, "start": torch.zeros(200, dtype=torch.float64)}, "start vector is zero or not finite"),
    ],
)
def test_refused_questions(planted: Planted, o6c: Tensor, asked: dict, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        eigenpairs(planted(o6c), **asked)


# -- scale ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_million_parameters_top_eigenvalue_to_1e_6() -> None:
    """A planted spectrum in ten million dimensions: diagonal plus rank three, top eigenvalue known exactly."""
    size = 10_000_000
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(size, generator=generator)
    u /= norm(u).float()
    diagonal = torch.linspace(-0.1, 0.1, size)
    weight = 4.0

    def product(v: Tensor) -> Tensor:
        inside = sum((a.double() @ b.double()) for a, b in zip(u.split(1 << 16), v.split(1 << 16), strict=True))
        return diagonal * v + (weight * inside).float() * u

    # Secular equation of diag + weight u u^T: 1 = weight sum u_i^2 / (lambda - d_i), by bisection.
    squares, d = u.double().square(), diagonal.double()
    low, high = 0.2, 5.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if weight * (squares / (middle - d)).sum() > 1 else (low, middle)
    pairs = eigenpairs(FunctionOperator(product, size), largest=1, tolerance=1e-6, vectors=False)
    assert abs(pairs.values[0].item() / low - 1) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_numbers_of_float64_on_the_cpu(planted: Planted, o6c: Tensor) -> None:
    matrix = planted(o6c).to_dense()
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
        operator = LinearOperator.from_matrix(matrix.to(device="cuda", dtype=dtype))
        pairs = eigenpairs(operator, largest=3, smallest=2, tolerance=1e-6)
        expected = torch.linalg.eigvalsh(matrix).flip(0)[[0, 1, 2, -2, -1]]
        torch.testing.assert_close(pairs.values, expected, rtol=0, atol=10 * tolerance)
    repeated = torch.diag(torch.tensor([5.0] * 3 + [1.0] * 61, device="cuda"))
    torch.testing.assert_close(
        eigenpairs(LinearOperator.from_matrix(repeated), largest=4).values,
        torch.tensor([5.0, 5, 5, 1], dtype=torch.float64),
    )
