"""When a run of Lanczos may stop: what the rule answers on tridiagonal matrices that are written down."""

import torch

from diag.linalg.ritz import StoppingRule, Which, ritz


def bordered(values: list[float], border: float = 0.0) -> torch.Tensor:
    """T = diag(values), whose last vector is coupled to the next by `border`."""
    matrix = torch.zeros(len(values) + 1, len(values) + 1, dtype=torch.float64)
    matrix.diagonal()[:-1] = torch.tensor(values, dtype=torch.float64)
    matrix[-1, -2] = matrix[-2, -1] = border
    return matrix


def test_pairs_that_converged_are_looked_at_twice_unless_the_space_is_exhausted() -> None:
    matrix = bordered([3.0, 2.0, 1.0])
    rule = StoppingRule(Which(largest=1))
    assert not rule.satisfied(3, ritz(matrix), matrix, [0], exhausted=False)
    assert rule.satisfied(4, ritz(matrix), matrix, [0], exhausted=False)
    open_end = bordered([1.0, 2.0, 3.0], border=1.0)
    for exhausted in (False, True):
        assert StoppingRule(Which(largest=1)).satisfied(3, ritz(open_end), open_end, [0], exhausted) == exhausted


def test_after_a_breakdown_values_as_good_as_the_fresh_ones_are_enough() -> None:
    """Of zeros alone the slack is zero, so that only equality says that nothing better is pending."""
    for values, found in (([0.0] * 6, True), ([1.0, 1.0, 0.0, 2.0, 0.0, 0.0], False)):
        matrix, rule = bordered(values), StoppingRule(Which(largest=2))
        looks = [rule.satisfied(n, ritz(matrix), matrix, [0, 3], exhausted=False) for n in (6, 7)]
        assert looks == [False, found]


def test_an_error_is_compared_with_the_value_or_a_hundredth_of_the_largest() -> None:
    values, errors = torch.tensor([1000.0, 200.0, 1.0, 1.0]), torch.tensor([99.0, 21.0, 0.9, 1.1])
    assert Which(largest=1, tolerance=0.1).converged(values, errors).tolist() == [True, False, True, False]
