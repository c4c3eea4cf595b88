"""The house is in order: imports point one way and in no circle, and no module takes another's private names.

What a room lends to others stands in the `__all__` of its `__init__`: names of its modules, and objects. To use
another module of a room from outside, add it there; a name that nobody outside uses is taken out again.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import networkx
import pytest

import diag
from diag.foreign import PRIVATE
from diag.registry import instruments
from diag.snapshot.glossary import GLOSSARY
from tests.source import parsed

ROOT = Path(diag.__file__).parent
# The rooms from the ground up; each may import those below it, and what `ALLOWED` adds or takes away.
GROUND = {"errors", "ranges", "conversion", "door", "display", "encoding", "verdict", "result", "linalg"}
ALLOWED = {
    "errors": set(),
    "foreign": set(),
    "ranges": set(),
    "conversion": {"errors", "ranges"},
    "door": {"errors", "conversion"},
    "display": set(),
    "encoding": {"errors"},
    "verdict": {"errors", "door", "display", "encoding"},
    "result": {"errors", "door", "display", "encoding", "verdict"},
    "linalg": {"errors"},
    "remedies": {"errors", "door", "linalg"},
    "checkpoints": {"errors"},
    "distributed": {"errors", "linalg"},
    "snapshot": {"errors", "ranges", "door", "linalg", "checkpoints", "distributed"},
}
ALLOWED["build"] = {"errors", "snapshot"}
ALLOWED["gradients"] = ALLOWED["snapshot"] | {"snapshot"}
ALLOWED["curvature"] = ALLOWED["gradients"] | {"gradients"}
ALLOWED["connectivity"] = ALLOWED["curvature"] | {"curvature", "ranges", "conversion", "build"}
ALLOWED["declaration"] = {"snapshot"}
ALLOWED["instrument_call"] = {"conversion", "declaration", "errors", "result", "snapshot"}
ALLOWED["registry"] = {"declaration", "door", "errors", "instrument_call", "result", "snapshot"}
ALLOWED["instruments"] = ALLOWED["connectivity"] | GROUND | {"connectivity", "registry", "remedies"}
ALLOWED["rates"] = {"result"}
ALLOWED["run"] = {"errors", "door", "display", "encoding", "result", "rates", "checkpoints", "snapshot", "registry"}
ALLOWED["run"] |= {"distributed", "linalg", "build"}
ALLOWED["watching"] = ALLOWED["instruments"] | {"instruments", "run"}
ALLOWED["reporting"] = ALLOWED["run"] | {"run", "conversion"}
ALLOWED["trial"] = {"build"} | ALLOWED["watching"] | {"watching", "ranges", "conversion"}
ALLOWED["integrations"] = ALLOWED["watching"] | {"watching", "reporting"}
# The top floor: the command line, the demo, and what helps authors of instruments and tests.
TOP = {"__main__", "cli", "demo", "datasets", "testing", "__init__"}
QUANTITY_ROOMS = {"snapshot", "gradients", "curvature", "connectivity"}
ONE_FILE_EACH = {"instruments"}  # a room that grows by a file for each new thing
MOST_FILES = 20
MOST_LINES = 40  # of a function
DECLARED = {"SOURCE", "EXPLAINED_BY", "COMMANDS"}  # by an instrument or a module of commands, of itself
OF_NAMED_TUPLES = {"_replace", "_fields", "_asdict", "_make"}  # public, in spite of their names
DISCOVERED = {"diag.registry": {"diag.instruments"}}  # a folder whose files are found when they are asked for
PUBLIC = {
    "diag.snapshot.snapshot",
    "diag.watching.watcher",
    "diag.run.run",
    "diag.run.saved",
    "diag.trial.preflight",
}  # reached as names of `diag`


def name_of(path: Path) -> str:
    """The dotted name of a module of ours."""
    parts = ("diag", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def tree(name: str) -> ast.Module:
    return parsed(MODULES[name])


@functools.cache
def imported_names(name: str) -> frozenset[str]:
    """All of ours that a module imports, as dotted names: for types only, in functions and by strings, too."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import; give the whole name"
            if (node.module or "").split(".")[0] == "diag":
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("diag.")}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MODULES:
            found |= {node.value} - {"diag"} - DISCOVERED.get(name, set())
    return frozenset(found)


def module_of(dotted: str) -> str:
    """The module of ours that a dotted name is, or is in."""
    return dotted if dotted in MODULES else dotted.rpartition(".")[0]


def imported_modules(name: str) -> set[str]:
    return {module_of(dotted) for dotted in imported_names(name)} - {name, "diag"}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


@pytest.mark.parametrize("name", [n for n in MODULES if room(n) in ALLOWED])
def test_imports_point_one_way(name):
    assert {room(other) for other in imported_modules(name)} <= ALLOWED[room(name)] | {room(name)}


def test_every_room_is_known():
    assert {room(name) for name in MODULES} <= set(ALLOWED) | TOP


def test_no_circle_between_modules():
    graph = networkx.DiGraph(
        (name, other) for name in MODULES if name != "diag" for other in imported_modules(name)
    )
    circles = [sorted(part) for part in networkx.strongly_connected_components(graph) if len(part) > 1]
    assert not circles, f"These modules import each other: {circles}"


def test_quantities_are_computed_where_models_are():
    """The glossary alone names modules above its own room: it loads each when its quantity is first asked for."""
    for row in GLOSSARY.values():
        assert row.module.split(".")[0] in QUANTITY_ROOMS and f"diag.{row.module}" in MODULES, row


def lent(package: str) -> list[str] | None:
    """The `__all__` of a package, as it is written."""
    for node in tree(package).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
        ):
            return ast.literal_eval(node.value)
    return None


def uses_from_outside(package: str) -> dict[str, set[str]]:
    """What modules outside a package import from it: the first name within the package -> by whom."""
    found: dict[str, set[str]] = {}
    for name in MODULES:
        if name != "diag" and not (name + ".").startswith(package + "."):
            for dotted in imported_names(name):
                if dotted.startswith(package + "."):
                    found.setdefault(dotted.removeprefix(package + ".").split(".")[0], set()).add(name)
    return found


@pytest.mark.parametrize("package", sorted(PACKAGES - {"diag"}))
def test_a_room_states_its_rule_and_what_it_lends(package):
    assert ast.get_docstring(tree(package)), f"{package} does not say what its rule is"
    if room(package) in TOP:
        return
    names, used = lent(package) or [], uses_from_outside(package)
    for name, users in used.items():
        assert name in names, f"{sorted(users)} import {name} from {package}; add it to its __all__"
    late = [f"diag.{row.module}." for row in GLOSSARY.values()]
    own = {d.rpartition(".")[2] for d in imported_names(package)} | own_names(package)
    for name in names:
        assert f"{package}.{name}" in MODULES or name in own, (
            f"there is no {package}.{name}; take it out of __all__"
        )
    for name in (f"{package}.{n}" for n in names if f"{package}.{n}" in MODULES):
        wanted = name.rpartition(".")[2] in used or any(entry.startswith(f"{name}.") for entry in late)
        assert wanted or name in PUBLIC, f"no other room uses {name}; take it out of the __all__ of {package}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_private_names_stay_at_home(name):
    """No `from diag.x import _y`; `x._y` where `_y` is not the module's own is held to a table by test_private."""
    taken = [dotted for dotted in imported_names(name) if private(dotted.rpartition(".")[2])]
    assert not taken, f"{name} imports {taken}"
    unknown = private_attributes(name) - {row.name for row in PRIVATE}
    assert not unknown, f"{name} uses {sorted(unknown)}: take a public name, or add a row to diag/foreign.py"


def names_defined(node: ast.stmt) -> list[str]:
    """What a statement of a module gives a name to."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = (
        node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    )
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def test_different_things_bear_different_names():
    """A public function, class, type or constant has a name of its own in the whole of `diag`, so that it says
    which it is; only what each of several modules declares of itself bears one name in all of them."""
    homes: dict[str, list[str]] = {}
    for name in MODULES:
        for node in tree(name).body:
            for found in names_defined(node):
                if not found.startswith("_") and found not in DECLARED:
                    homes.setdefault(found, []).append(name)
    doubles = {name: found for name, found in homes.items() if len(found) > 1}
    assert not doubles, f"Public names that more than one module defines: {doubles}"


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("_")  # `_repr_html_` and its like are protocols


@functools.cache
def own_names(name: str) -> frozenset[str]:
    """What a module defines: functions, classes, variables, fields, and attributes that it sets on `self`."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_self(node):
            found.add(node.attr)
    return frozenset(found)


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def private_attributes(name: str) -> set[str]:
    """The private attributes that a module takes of anything but `self`, and does not define."""
    attributes = {n.attr for n in ast.walk(tree(name)) if isinstance(n, ast.Attribute) and not of_self(n)}
    return {a for a in attributes if private(a)} - own_names(name) - OF_NAMED_TUPLES


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function from its name to its end, without its docstring, which is the help text."""
    assert node.end_lineno is not None
    first = node.body[0]
    told = ast.get_docstring(node) is not None and first.end_lineno is not None
    return node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1 if told else 0)


def test_no_function_is_long():
    long = {
        f"{name}.{node.name}": lines
        for name in MODULES
        for node in ast.walk(tree(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (lines := code_lines(node)) > MOST_LINES
    }
    assert not long, f"Functions of more than {MOST_LINES} lines: {long}; split them"


def public_definitions(body: Iterable[ast.AST], where: str, owner: ast.ClassDef | None = None) -> Iterator[Any]:
    """(name, definition, class that it is in) of all public classes, functions and methods."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{where}.{node.name}", node, owner
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{where}.{node.name}", node)


def test_everything_public_says_what_it_is():
    """By a docstring of its own, or that of the method it overrides."""
    classes = {n.name: n for name in MODULES for n in ast.walk(tree(name)) if isinstance(n, ast.ClassDef)}

    def inherited(owner, method):
        for base in (classes.get(ast.unparse(b).partition("[")[0]) for b in owner.bases):
            if base is not None:
                yield from (n for n in base.body if isinstance(n, ast.FunctionDef) and n.name == method)
                yield from inherited(base, method)

    silent = [
        where
        for name in MODULES
        for where, node, owner in public_definitions(tree(name).body, name)
        if ast.get_docstring(node) is None
        and not any(ast.get_docstring(n) for n in (inherited(owner, node.name) if owner else ()))
    ]
    assert not silent, f"Public names without a docstring: {silent}"


def test_no_level_of_a_room_is_crowded():
    levels = {path.parent for path in MODULES.values() if path.parent.name not in ONE_FILE_EACH}
    crowded = {str(level): n for level in levels if (n := len(modules_in(level))) > MOST_FILES}
    assert not crowded


def modules_in(level: Path) -> list[Path]:
    return [path for path in level.glob("*.py") if path.name != "__init__.py"]


def test_no_file_of_the_core_names_an_instrument():
    names = set(instruments())
    for name in (
        n
        for n in MODULES
        if room(n)
        in {"registry", "instrument_call", "declaration", "result", "run", "watching", "reporting", "cli"}
    ):
        literals = {n.value for n in ast.walk(tree(name)) if isinstance(n, ast.Constant)}
        assert not names & literals, f"{name} names an instrument"
        assert not any(f"diag.instruments.{n}" in MODULES[name].read_text() for n in names), name


def test_importing_diag_loads_nothing_heavy():
    code = (
        "import torch, sys; before = set(sys.modules); import diag; diag.Snapshot\n"
        "heavy = {'matplotlib', 'seaborn', 'pandas', 'scipy', 'networkx', 'sklearn', 'jinja2', 'rich', 'click'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
