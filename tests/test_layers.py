"""The imports point one way, and importing diag loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diag

ROOT = Path(diag.__file__).parent
# What a part may import of ours, besides itself. `errors`, `display` and `callable_package` import nothing of ours.
BASE = {"errors", "display", "callable_package"}
QUANTITIES = BASE | {"result", "linalg"}
INSTRUMENTS = QUANTITIES | {"quantities", "registry", "stable_loss"}
RECORDS = INSTRUMENTS | {"instruments", "run", "run_files", "run_writer", "checkpoints", "watch"}
PAGES = RECORDS | {"report"}
ALLOWED = {
    "errors": set(),
    "display": set(),
    "result": BASE,
    "linalg": {"errors"},
    "stable_loss": {"errors", "linalg"},
    "quantities": QUANTITIES,
    "registry": QUANTITIES | {"quantities"},
    "instruments": INSTRUMENTS,
    "run": RECORDS,
    "run_files": RECORDS,
    "run_writer": RECORDS,
    "checkpoints": RECORDS,
    "watch": RECORDS,
    "report": PAGES,
    "integrations": PAGES,
}


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
    parts = {part for _, part in FILES}
    assert {"result", "linalg", "quantities", "registry", "instruments"} <= parts & set(ALLOWED)


def test_no_file_of_the_core_names_an_instrument():
    names = {p.stem for p in (ROOT / "instruments").glob("*.py")} - {"__init__"}
    core = [p for p, part in FILES if part in {"registry", "result", "run", "run_files", "watch", "report", "cli"}]
    for path in core:
        literals = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not names & literals, f"{path} names an instrument"
        assert not any(f"diag.instruments.{n}" in path.read_text() for n in names)


def test_importing_diag_loads_nothing_heavy():
    code = (
        "import torch, sys; before = set(sys.modules); import diag; diag.Snapshot\n"
        "heavy = {'matplotlib', 'seaborn', 'pandas', 'scipy', 'networkx', 'sklearn', 'jinja2', 'rich', 'click'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
