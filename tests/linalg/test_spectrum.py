"""One run's extreme pairs, density and trace, where the pairs that are taken out meet the rest."""

import math

import pytest
import torch

from diag.errors import InvalidInput
from diag.linalg.operator import LinearOperator
from diag.linalg.spectrum import spectrum


def rotated(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(values, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    matrix = (basis * values) @ basis.T
    return LinearOperator.from_matrix((matrix + matrix.T) / 2)


def test_every_share_adds_up_and_the_known_are_out_of_the_rest():
    values = torch.cat([torch.tensor([9.0, 7.0, 5.0]), torch.linspace(-0.1, 0.1, 197)])
    found = spectrum(rotated(values), largest=3, steps=40)
    assert found.top.values.tolist() == pytest.approx([9, 7, 5])
    assert found.rest.atoms.tolist() == pytest.approx([9, 7, 5, -0.1])
    assert float(found.rest.weights.sum()) == pytest.approx(196 / 200)
    heavy = found.rest.nodes[found.rest.weights > 1e-12]
    assert float(heavy.abs().max()) < 0.11
    assert found.extremes.tolist() == pytest.approx([-0.1, 9])
    # The whole distribution at a point between bulk and outliers: 197 of 200, exactly.
    assert float(found.rest.distribution(torch.tensor([1.0]))) == pytest.approx(197 / 200)


def test_a_matrix_of_low_rank_keeps_its_zeros():
    """Rank 5 of 200: the smallest eigenvalue is one of 195 zeros, of which one start vector shows one."""
    found = spectrum(rotated([9.0, 7.0, 5.0, 3.0, 1.0] + [0.0] * 195), largest=5, steps=40)
    assert found.top.values.tolist() == pytest.approx([9, 7, 5, 3, 1])
    at_zero = found.rest.weights[(found.rest.nodes.abs() < 1e-9)].sum()
    assert float(at_zero) == pytest.approx(194 / 200, abs=1e-9)
    assert found.trace.value == pytest.approx(25, abs=1e-9)
    assert found.frobenius_norm.value == pytest.approx(165**0.5, rel=1e-9)


def test_a_spanned_space_is_known_wholly():
    found = spectrum(rotated([3.0, 1.0, 0.5, -2.0]), largest=2)
    assert (found.trace.value, found.trace.standard_error) == (pytest.approx(2.5), 0.0)
    assert found.rest.nodes[0].tolist() == pytest.approx([0.5])
    assert found.rest.weights[0].tolist() == pytest.approx([1 / 4])
    assert found.bottom.values.tolist() == pytest.approx([-2])
    whole = spectrum(rotated([3.0, 1.0, 0.5, -2.0]), largest=9)
    assert whole.top.values.tolist() == pytest.approx([3, 1, 0.5, -2])
    assert len(whole.bottom.values) == 0 and whole.rest.nodes.shape == (1, 0)


def test_a_thick_restart_changes_no_number_beyond_the_tolerance():
    values = torch.cat([torch.tensor([9.0, 7.0]), torch.linspace(-1, 1, 298)])
    free = spectrum(rotated(values), largest=2, steps=60)
    operator = rotated(values)
    capped = spectrum(operator, largest=2, steps=60, memory=30 * 300 * 8)
    # A restart keeps the largest pairs alone, so the smallest takes a run of its own; within .001 x 9.
    assert capped.bottom.values.tolist() == pytest.approx([-1], abs=9e-3)
    assert capped.num_products == operator.num_products
    assert capped.top.values.tolist() == pytest.approx(free.top.values.tolist(), abs=1e-6)
    assert abs(capped.trace.value - float(values.sum())) < 4 * capped.trace.standard_error
    assert float(capped.rest.weights.sum()) == pytest.approx(297 / 300)


def test_the_quadrature_has_all_the_steps_that_were_asked_for():
    """More than the default basis of 100; a cap on the memory, as above, makes it fewer."""
    values = torch.cat([torch.tensor([9.0]), torch.linspace(-1, 1, 399)])
    assert spectrum(rotated(values), largest=1, steps=150).rest.nodes.shape == (1, 150)
    assert spectrum(rotated(values), largest=1, steps=150, memory=60 * 400 * 8).rest.nodes.shape[1] < 60


def test_one_probe_states_its_error_and_a_spanned_space_has_none():
    values = torch.cat([torch.tensor([9.0, 7.0]), torch.linspace(-1, 1, 298)])
    grid = torch.tensor([-0.5, 0.0, 0.5, 2.0, 8.0], dtype=torch.float64)
    truth = (values.double()[:, None] <= grid).double().mean(0)
    found = spectrum(rotated(values), largest=2, steps=40)
    low, high = found.rest.distribution_bounds(grid)
    assert ((low <= truth) & (truth <= high)).all()
    assert (high - low)[3:].max() < 0.02 < (high - low)[1] < 0.3  # what is between known eigenvalues is known
    whole = spectrum(rotated(values[:60]), largest=2)
    low, high = whole.rest.distribution_bounds(grid)
    assert torch.equal(low, high)


def test_more_probes_bound_the_distribution_more_tightly():
    operator = rotated(torch.cat([torch.tensor([9.0]), torch.linspace(-1, 1, 199)]))
    found = spectrum(operator, largest=1, steps=40, num_probes=4)
    assert found.num_products == operator.num_products
    grid = torch.tensor([0.0], dtype=torch.float64)
    low, high = found.rest.distribution_bounds(grid)
    assert low <= 0.5 <= high
    low_of_one, high_of_one = spectrum(operator, largest=1, steps=40).rest.distribution_bounds(grid)
    assert high - low < 0.8 * (high_of_one - low_of_one)


def test_products_that_are_not_finite_are_refused():
    with pytest.raises(InvalidInput, match="is not finite; check the loss"):
        spectrum(LinearOperator.from_matrix(torch.eye(5)) * float("inf"))


@pytest.mark.parametrize("seed", range(4))
def test_two_probes_that_agree_by_chance_do_not_state_too_small_an_error(seed):
    """Of k normal probes the trace has the variance 2 tr A^2 / k, and |A|_F^2 has 2 tr A^4 / k."""
    values = torch.linspace(-5, 5, 300, dtype=torch.float64)
    found = spectrum(rotated(values), largest=1, steps=40, trace_probes=2, num_probes=8, seed=seed)
    of_trace = float(values.square().sum().sqrt())
    of_norm = float(values.pow(4).sum().sqrt() / (2 * values.norm()))
    assert found.trace.standard_error > 0.9 * of_trace
    assert found.frobenius_norm.standard_error > 0.9 * of_norm


def test_many_probes_state_an_error_that_is_no_larger_than_theirs():
    values = torch.linspace(-5, 5, 300, dtype=torch.float64)
    found = spectrum(rotated(values), largest=1, steps=40, trace_probes=50, num_probes=8)
    of_norm = math.sqrt(2 * float(values.pow(4).sum()) / 50) / (2 * float(values.norm()))
    assert 0.7 * of_norm < found.frobenius_norm.standard_error < 1.5 * of_norm
