"""Sums that must not lose digits at ten million entries, and the passes of Gram-Schmidt."""

import pytest
import torch

from diag.linalg.reductions import combine, dot, gram, norm, orthogonalise, rotate


def test_norm_of_ten_million_float32_entries_is_good_to_1e_7() -> None:
    x = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))
    exact = torch.cat([part.double().square().sum()[None] for part in x.split(1_000_000)]).sum().sqrt()
    # Blocks of 2^15 float32 products summed to about 1e-8; torch's own float32 norm is off by 1e-4 here.
    assert abs(norm(x) / exact - 1) < 2e-7
    assert abs(dot(x, 2 * x) / (2 * exact**2) - 1) < 2e-7


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_orthogonalise_takes_out_the_basis_and_reports_what_it_found(storage: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(70_000, 5, generator=generator)).Q.T.contiguous().to(storage)
    weights = torch.tensor([3.0, -1.0, 0.5, 0.0, 2.0])
    noise = torch.randn(70_000, generator=generator)
    orthogonalise(noise, basis.float())
    orthogonalise(noise, basis.float())
    v = weights @ basis.float() + noise
    found, left = orthogonalise(v, basis)
    # bfloat16 rows are rounded to 2^-9 each, so their mutual products are 1e-3 instead of zero.
    tolerance = 1e-5 if storage == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), weights, rtol=0, atol=tolerance)
    assert abs(left.sqrt() / norm(noise) - 1) < 1e-3
    assert (basis.float() @ v).abs().max() < 10 * tolerance


def test_known_coefficients_are_taken_out_first() -> None:
    basis = torch.eye(3, 8)
    v = torch.arange(1.0, 9.0)
    found, left = orthogonalise(v, basis, torch.tensor([1.0, 2.0]), basis[:2])
    assert found.tolist() == [0.0, 0.0, 3.0]
    assert left.item() == 4**2 + 5**2 + 6**2 + 7**2 + 8**2


def test_rotate_in_place_equals_combine_equals_a_matrix_product() -> None:
    generator = torch.Generator().manual_seed(2)
    basis, weights = torch.randn(6, 100_000, generator=generator), torch.randn(3, 5, generator=generator)
    expected, untouched = weights.double() @ basis[:5].double(), basis[3:].clone()
    combined = combine(weights, basis[:5], torch.float32)
    rotate(weights, basis)
    # Five float32 products of order 1 each: rounding of 1e-6.
    torch.testing.assert_close(combined.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(basis[:3].double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(basis[3:], untouched)


def test_gram_is_float64() -> None:
    x = torch.randn(4, 100_000, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(gram(x, x), x.double() @ x.double().T, rtol=1e-12, atol=1e-9)
