"""The lines whose change must not go unnoticed, each with the one test that notices.

Each was once changed without any test failing. A guard names its file, the text to replace, which must stand there
exactly once, the replacement, and the test (file, or file and function) that fails when this alone is changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mutation.trial import KILLED, Outcome, Tree


@dataclass(frozen=True)
class Guard:
    """`old` in the file at `path` becomes `new`, and the test at `test` fails."""

    what: str
    path: str
    old: str
    new: str
    test: str


GUARDS = [
    Guard(
        "the plan of per-example gradients believes every closed form",
        "diag/gradients/planning.py",
        "return max(norms, gram) <= allowed and error**0.5 <= slack * size**0.5 + 1e-6 * total",
        "return True",
        "tests/gradients/test_plan.py::test_a_closed_form_that_is_wrong_is_not_used",
    ),
    Guard(
        "examples that share half an element count as apart",
        "diag/gradients/rules/layout.py",
        "LAYOUT_TOLERANCE = 1e-3  #",
        "LAYOUT_TOLERANCE = 0.5  #",
        "tests/gradients/test_plan.py::test_elements_that_examples_share_by_more_than_rounding_belong_to_none",
    ),
    Guard(
        "a curvature product may be off by 30 % in float64",
        "diag/curvature/selftest.py",
        'FAIL_ABOVE = {"float64": 0.03',
        'FAIL_ABOVE = {"float64": 0.3',
        "tests/curvature/test_selftest.py::test_how_wrong_a_product_may_be",
    ),
    Guard(
        "a small parameter is judged by the whole product",
        "diag/curvature/selftest.py",
        'SMALLEST_PART = {"float64": 0.01',
        'SMALLEST_PART = {"float64": 1.0',
        "tests/curvature/test_selftest.py"
        "::test_each_parameter_is_judged_by_itself_down_to_a_hundredth_of_the_product",
    ),
    Guard(
        "a product that is not symmetric passes",
        "diag/curvature/selftest.py",
        "if asymmetry > FAIL_ABOVE[self.precision]:",
        "if False:",
        "tests/curvature/test_selftest.py"
        "::test_a_product_that_is_not_symmetric_fails_though_every_difference_is_small",
    ),
    Guard(
        "the bounds of the distribution are half as wide",
        "diag/linalg/quadrature.py",
        "turn = deviations / math.sqrt(",
        "turn = 0.5 * deviations / math.sqrt(",
        "tests/linalg/test_quadrature.py::test_two_deviations_of_chance_are_as_wide_as_two",
    ),
    Guard(
        "the cross term of the Frobenius norm counts once",
        "diag/linalg/trace.py",
        "known.square().sum() + 2 * cross",
        "known.square().sum() + cross",
        "tests/linalg/test_quadrature.py::test_the_norm_takes_what_couples_the_known_to_the_rest_twice",
    ),
    Guard(
        "no second pass of Gram-Schmidt",
        "diag/linalg/krylov.py",
        "if self._lost_too_much(found, left):",
        "if False:",
        "tests/linalg/test_krylov.py::test_the_basis_stays_orthogonal_where_a_product_is_almost_inside_it",
    ),
    Guard(
        "Lanczos follows the rounding of the products",
        "diag/linalg/krylov.py",
        "SMALLEST_COUPLING = 1e-10",
        "SMALLEST_COUPLING = 1e-30",
        "tests/linalg/test_krylov.py::test_multiplicity_is_found_behind_the_rounding_of_the_products",
    ),
    Guard(
        "a warm start does not wait for what may still rise",
        "diag/linalg/warm.py",
        "pairs.values[following] + pairs.residuals[following]",
        "pairs.values[following] - pairs.residuals[following]",
        "tests/linalg/test_warm.py::test_a_run_waits_for_a_next_value_that_may_still_rise_above",
    ),
    Guard(
        "verdicts of ok are named beside a layer",
        "diag/reporting/layers.py",
        "finding.verdict.level.severity > 1:",
        "finding.verdict.level.severity > 9:",
        "tests/reporting/test_layers.py::test_only_what_is_wrong_is_named_beside_a_layer",
    ),
]


def check(tree: Tree, limit: float = 60.0) -> list[str]:
    """What is wrong with the guards, a sentence each; empty where every one is held by its test alone."""
    plain = tree.run([guard.test for guard in GUARDS], limit)
    if plain.result != "survived":
        return [f"Without any change the guards' tests do not pass ({plain.result}: {plain.test})."]
    return [sentence for guard in GUARDS if (sentence := _complaint(tree, guard, limit))]


def _complaint(tree: Tree, guard: Guard, limit: float) -> str:
    source = (tree.folder / guard.path).read_text()
    if source.count(guard.old) != 1:
        found = source.count(guard.old)
        return f"{guard.path} holds {guard.old!r} {found} times, expected once; mend {Path(__file__).name}."
    with tree.changed(guard.path, source.replace(guard.old, guard.new).encode()):
        outcome = tree.run([guard.test], limit)
    print(f"{outcome.result:10}{outcome.seconds:6.1f} s  {guard.what}", flush=True)
    return "" if _held(outcome, guard) else f"{guard.test} does not notice it when {guard.what}."


def _held(outcome: Outcome, guard: Guard) -> bool:
    """Killed by an assertion of the very test, not by a file that can no longer be imported."""
    return outcome.result == KILLED and outcome.test.startswith(guard.test)
