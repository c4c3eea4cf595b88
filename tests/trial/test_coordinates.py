"""The coordinate check against slopes that follow from the parametrisation."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.errors import InvalidInput
from diag.trial.coordinates import CoordinateCheck, width_slopes

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(1, 10, generator=GENERATOR), torch.randn(1, 1, generator=GENERATOR)
ABOUT = {"widths": (32, 64, 128, 256), "draws": 3}


def standard(width, rate=lambda width: 1e-4):
    model = nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 1, bias=False))
    nn.init.normal_(model[2].weight, std=width**-0.5)
    hidden, last = [*model[0].parameters()], [*model[2].parameters()]
    groups = [{"params": hidden, "lr": 1e-7}, {"params": last, "lr": rate(width)}]
    return model, torch.optim.Adam(groups, eps=1e-30)


def maximal_update(width):
    """The last layer starts at 1 / width and learns at a rate over the width."""
    model, optimizer = standard(width, lambda width: 1e-4 * 32 / width)
    with torch.no_grad():
        model[2].weight /= width**0.5
    return model, optimizer


def test_adams_first_step_moves_a_standard_output_in_proportion_to_the_width():
    """Of one example each weight of the last layer moves by the rate, with the sign of its h: the output changes by
    rate x width x the mean of |h|: slope 1. A hidden unit's moves by the rate times |x|_1: slope 0, as its size.
    The means over 32 units and more vary by 10 % and less, which moves slopes by about .05."""
    found = diag.coordinate_check(standard, F.mse_loss, (X, Y), steps=1, **ABOUT)
    at = found.layers.index("2")
    assert found.change_slopes[at] == pytest.approx(1, abs=0.15)
    assert abs(found.slopes[0]) < 0.15 and abs(found.change_slopes[0]) < 0.1
    assert "2" in found.growing() and "grow with the width" in found.sentence()


def test_under_maximal_updates_no_change_grows():
    found = diag.coordinate_check(maximal_update, F.mse_loss, (X, Y), steps=1, **ABOUT)
    assert abs(found.change_slopes[found.layers.index("2")]) < 0.15


def test_width_slopes_find_a_power_and_its_error():
    """Sizes of exactly width^(0, 0.5); and a noisy one, whose slope lies within four standard errors."""
    sizes = {w: [numpy.array([3.0, w**0.5])] * 2 for w in (32, 64, 128)}
    slopes, errors = width_slopes(sizes)
    assert slopes == pytest.approx([0, 0.5], abs=1e-12) and errors == pytest.approx([0, 0], abs=1e-7)
    noise = numpy.random.default_rng(0)
    noisy = {w: [numpy.exp(0.1 * noise.normal(size=1)) * w**0.3 for _ in range(5)] for w in (16, 64, 256)}
    slope, error = width_slopes(noisy)
    assert abs(slope[0] - 0.3) < 4 * error[0] and 0.005 < error[0] < 0.05


def test_what_grows_is_beyond_two_standard_errors():
    """Slopes of .5 and .3 with errors of .2: only the first is more than two of them above 0."""
    zero, error = numpy.zeros(2), numpy.full(2, 0.2)
    found = CoordinateCheck(("a", "b"), (8, 16), zero, error, numpy.array([0.5, 0.3]), error)
    assert found.growing() == ("a",) and found.sentence().startswith("1 of 2 layers grow with the width, a first")
    flat = CoordinateCheck(("a", "b"), (8, 16), zero, error, zero - 1, error)
    assert flat.growing() == () and "None of 2 layers grows" in flat.sentence()


def test_a_bare_model_is_trained_by_adam_and_random_numbers_are_left_alone():
    state = torch.get_rng_state()
    found = diag.coordinate_check(lambda w: standard(w)[0], F.mse_loss, (X, Y), widths=(8, 16), draws=2)
    assert torch.equal(torch.get_rng_state(), state) and found.widths == (8, 16)


def test_refusals():
    with pytest.raises(InvalidInput, match="give two widths or more"):
        diag.coordinate_check(standard, F.mse_loss, (X, Y), widths=(8, 8))
    with pytest.raises(InvalidInput, match="got 2 widths and 1 draws; give two widths or more, and three"):
        diag.coordinate_check(standard, F.mse_loss, (X, Y), widths=(8, 16), draws=1)
    deeper = lambda w: nn.Sequential(*(nn.Linear(10, 10) for _ in range(w // 8)), nn.Linear(10, 1))  # noqa: E731
    with pytest.raises(InvalidInput, match="build one architecture"):
        diag.coordinate_check(deeper, F.mse_loss, (X, Y), widths=(8, 16))
