"""Boundary tilting against the angles of linear discriminants, planted tilts, and distances found by bisection."""

import math

import pytest
import torch

from diag.instruments.boundary_tilting import boundary_tilting, distance_along
from diag.result import Level
from diag.testing import check_result, classification, refusal, simplex_etf


def two(m, n=40, seed=0):
    """Two classes whose means differ by m exactly, with noise that is centred in each class."""
    noise = torch.randn(n, len(m), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = noise - noise.mean(0)
    return torch.cat([noise, noise + m]), torch.arange(2).repeat_interleave(n)


def tilt(m, w, bias=0.0):
    h, y = two(m)
    return boundary_tilting(h, y, (torch.stack([torch.zeros_like(w), w]), torch.tensor([0.0, bias])))


M = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("s", [0.1, 1.0, 9.0])
def test_the_linear_discriminant_of_a_diagonal_covariance(s):
    """w = S^-1 m: cos = sum m_i^2/s_i over |m| |m/s|; arccos of float64 is right to 1e-8 rad away from 0."""
    variance = torch.tensor([1.0, s, 1.0], dtype=torch.float64)
    w = M / variance
    expected = math.degrees(math.acos(min(1.0, float(w @ M / w.norm() / M.norm()))))
    assert tilt(M, w).mean_angle == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("t", [0.0, 0.5, 20.0])
def test_a_part_orthogonal_to_the_means_tilts_by_its_arctangent(t):
    v = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    found = tilt(M, M + t * v, bias=-3.0)
    assert found.mean_angle == pytest.approx(math.degrees(math.atan(t / 5)), abs=2e-6)
    assert found.largest_strength == pytest.approx(math.sqrt(1 + t**2 / 25), rel=1e-12)


def test_a_wrong_way_boundary_has_no_finite_strength():
    assert tilt(M, -M).largest_angle == pytest.approx(180) and tilt(M, -M).largest_strength == math.inf


def test_distances_are_those_that_bisection_finds_and_add_up():
    """d_0 + d_1 = |m| cos(angle) whatever the bias; bisection of float64 to 1e-12."""
    h, y = two(M)
    w, bias = M + 2.0, -20.0
    found = tilt(M, w, bias)

    def decides(points):
        return (points @ w + bias > 0).long()

    unit = w / w.norm()
    means = [h[y == k].mean(0) for k in (0, 1)]
    walked = [distance_along(decides, means[0], unit, 20.0), distance_along(decides, means[1], -unit, 20.0)]
    assert [found.distances[0, 1], found.distances[1, 0]] == pytest.approx(walked, abs=1e-10)
    assert found.half_distances[0, 1] / (sum(walked) / 2) == pytest.approx(found.largest_strength, rel=1e-10)
    assert found.off_centre == pytest.approx(abs(walked[0] - walked[1]) / sum(walked), rel=1e-9)
    assert distance_along(decides, means[0], -unit, 20.0) == math.inf


def test_self_dual_means_and_rows_are_not_tilted():
    """Neural collapse: rows along the means; arccos turns 1e-15 below 1 into 3e-6 degrees."""
    frame = simplex_etf(6, 8)
    labels = torch.arange(6).repeat_interleave(3)
    found = boundary_tilting(frame[labels] + 0.3, labels, (2 * frame, torch.zeros(6)))
    assert found.largest_angle < 1e-5 and found.median_strength == pytest.approx(1, abs=1e-12)
    check_result(found)
    assert found.verdict().level is Level.DESCRIPTION


def test_one_output_is_the_second_of_two_classes():
    h, y = two(M)
    w = M + 1
    both = tilt(M, w)
    assert boundary_tilting(h, y, (w[None], torch.zeros(1))).mean_angle == pytest.approx(both.mean_angle, abs=1e-9)


def test_on_a_snapshot_and_refusals():
    found = boundary_tilting(classification().snapshot())
    assert found.num_classes == 3 and 0 < found.mean_angle < 90
    h, y = two(M)
    given = {"features": h, "labels": y}
    assert "weight of shape (2, 5)" in refusal(
        boundary_tilting, **given, classifier=(torch.ones(2, 5), torch.ones(2))
    )
    one = given | {"labels": torch.zeros_like(y), "classifier": (torch.ones(2, 3), torch.ones(2))}
    assert "a boundary needs two" in refusal(boundary_tilting, **one)
    same = boundary_tilting(h, y, (torch.ones(2, 3), torch.zeros(2)))
    assert same.verdict().level is Level.NOT_APPLICABLE
