"""`scripts/coverage`: a short cut of the simulations, and that it can fail."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def covering():
    sys.path.insert(0, str(SCRIPTS))
    import covering.main

    yield covering.main
    sys.path.remove(str(SCRIPTS))


@pytest.mark.parametrize("setting", ["power law", "64 examples, signal 0.1", "128 examples, 3 groups, signal 1.0"])
def test_a_cut_of_the_simulations_covers(covering, setting):
    rows = [r for case in covering.CASES if case.setting == setting for r in covering.rows_of(case, 30)]
    assert rows and not [r for r in rows if covering.too_low(r)]


def test_an_error_that_is_half_of_what_it_should_be_is_noticed(covering):
    import torch
    from covering.case import Case, Draw

    def draws(count):
        for value in torch.randn(count, generator=torch.Generator().manual_seed(0)).tolist():
            yield Draw("a normal number", 0.0, value, 0.5)

    (row,) = covering.rows_of(Case("nothing", "half the error", draws), 200)
    assert covering.too_low(row)
    assert "(too low)" in covering.table([row])[-1]


def test_every_error_of_the_page_is_there(covering):
    """The page names every instrument that states errors."""
    named = {case.instrument for case in covering.CASES}
    assert {
        "hessian_spectrum",
        "gradient_coherence",
        "gradient_conflict",
        "sharpness",
        "mode_connectivity",
    } <= named
