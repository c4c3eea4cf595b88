"""The parts of the mutation runner that need no trial: the changes it finds, the tests it picks, its guards."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from mutation.choice import Choice  # noqa: E402
from mutation.guards import GUARDS  # noqa: E402
from mutation.sites import mutants_of  # noqa: E402

SOURCE = '''"""Text with 1 < 2."""
LEAST: float = 0.5


def f(x, y=3, *, z=True):
    """More text: 7 + 7."""
    if x <= y and not z:
        return -x + max(y, 2)
    if x is None:
        raise ValueError(f"{x} is not {1 + 1}")
    return x - y * x
'''


def changes(tmp_path: Path, seed: int) -> set[tuple[str, str, str]]:
    path = tmp_path / "m.py"
    path.write_text(SOURCE)
    return {(m.kind, m.old, m.new) for m in mutants_of(path, tmp_path, seed)}


def test_every_kind_of_place_is_found_and_prose_is_left_alone(tmp_path):
    found = set().union(*(changes(tmp_path, seed) for seed in range(12)))
    assert found == {
        ("threshold", "0.5", "5.0"), ("threshold", "0.5", "0.05"), ("threshold", "3", "4"), ("threshold", "3", "2"),
        ("threshold", "True", "False"), ("comparison", "<=", "<"), ("comparison", "<=", ">"),
        ("boolean", "and", "or"), ("boolean", "not ", ""), ("sign", "-", ""), ("sign", "+", "-"),
        ("function", "max", "min"),
        ("constant", "2", "3"), ("constant", "2", "1"), ("comparison", "is", "is not"), ("sign", "-", "+"),
        ("sign", "*", "/"), ("branch", "x <= y and not z", "True"), ("branch", "x <= y and not z", "False"),
        ("branch", "x is None", "False"),
    }  # fmt: skip
    assert changes(tmp_path, 4) == changes(tmp_path, 4)


def test_each_change_is_in_one_place_of_code_that_still_parses(tmp_path):
    path = tmp_path / "m.py"
    path.write_text("é = 1  # bytes and letters are not the same\n" + SOURCE)
    source = path.read_bytes()
    for mutant in mutants_of(path, tmp_path, 0):
        assert source[mutant.start : mutant.stop].decode() == mutant.old
        assert ast.dump(ast.parse(mutant.applied(source))) != ast.dump(ast.parse(source))
        assert source.splitlines()[mutant.line - 1].decode().strip() == mutant.text


def test_the_tests_nearest_to_a_module_come_first():
    asked = Choice(ROOT).of("diag/linalg/krylov.py")
    assert asked[0] == "tests/linalg/test_krylov.py" and "tests/linalg/test_lanczos.py" in asked
    assert "tests/instruments/test_neural_collapse.py" in Choice(ROOT).of("diag/linalg/geometry/class_geometry.py")


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.what)
def test_each_guard_still_names_a_line_and_a_test(guard):
    """Whether the test notices the change is tried by `scripts/mutate --guards`."""
    assert (ROOT / guard.path).read_text().count(guard.old) == 1
    file, name = guard.test.split("::")
    assert f"\ndef {name}(" in (ROOT / file).read_text()
    ast.parse((ROOT / guard.path).read_text().replace(guard.old, guard.new))
