"""The imports point one way, and importing diag loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diag
from diag.registry import instruments

ROOT = Path(diag.__file__).parent
# The rooms from the ground up; each may import those below it, and what `ALLOWED` adds or takes away.
GROUND = {"errors", "display", "result", "linalg"}
ALLOWED = {
    "errors": set(),
    "display": set(),
    "result": {"errors", "display"},
    "linalg": {"errors"},
    "remedies": {"errors", "linalg"},
    "checkpoints": {"errors"},
    "snapshot": {"errors", "linalg", "checkpoints"},
}
ALLOWED["gradients"] = ALLOWED["snapshot"] | {"snapshot"}
ALLOWED["curvature"] = ALLOWED["gradients"] | {"gradients"}
ALLOWED["connectivity"] = ALLOWED["curvature"] | {"curvature"}
ALLOWED["registry"] = {"errors", "result", "snapshot"}
ALLOWED["instruments"] = ALLOWED["connectivity"] | GROUND | {"connectivity", "registry", "remedies"}
ALLOWED["run"] = {"errors", "display", "result", "checkpoints", "snapshot", "registry"}
ALLOWED["watching"] = ALLOWED["instruments"] | {"instruments", "run"}
ALLOWED["reporting"] = ALLOWED["run"] | {"run"}
ALLOWED["integrations"] = ALLOWED["watching"] | {"watching", "reporting"}
# The top floor: the command line, the demo, and what helps authors of instruments and tests.
TOP = {"cli", "demo", "datasets", "testing", "__init__"}


def imports_of_ours(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "diag":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diag."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {n.name.split(".")[1] for n in node.names if n.name.startswith("diag.")}
    return found


FILES = [(p, p.relative_to(ROOT).parts[0].removesuffix(".py")) for p in sorted(ROOT.rglob("*.py"))]


@pytest.mark.parametrize(("path", "part"), [f for f in FILES if f[1] in ALLOWED], ids=lambda x: str(x)[-40:])
def test_imports_point_one_way(path, part):
    assert imports_of_ours(path) <= ALLOWED[part] | {part}


def test_the_layers_are_not_left_unguarded():
    assert {part for _, part in FILES} <= set(ALLOWED) | TOP


def test_no_file_of_the_core_names_an_instrument():
    names = set(instruments())
    core = [p for p, part in FILES if part in {"registry", "result", "run", "watching", "reporting", "cli"}]
    for path in core:
        literals = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not names & literals, f"{path} names an instrument"
        # A window of steps is recorded, and a command made, for the one instrument that asks for it.
        if path.name not in {"window.py", "connect.py"}:
            assert not any(f"diag.instruments.{n}" in path.read_text() for n in names)


def test_importing_diag_loads_nothing_heavy():
    code = (
        "import torch, sys; before = set(sys.modules); import diag; diag.Snapshot\n"
        "heavy = {'matplotlib', 'seaborn', 'pandas', 'scipy', 'networkx', 'sklearn', 'jinja2', 'rich', 'click'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
