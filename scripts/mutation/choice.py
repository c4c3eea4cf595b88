"""Which test files concern a module: those that import it or bear its name, its room's, and its importers'."""

from __future__ import annotations

import ast
from pathlib import Path

# Tests of a room that bear none of its modules' names.
ALSO = {"run": ["tests/cli/test_runs.py"], "instruments": ["tests/instruments/test_thresholds.py"]}
# Test files that look at no single module, or need other machines: they are not asked.
NEVER = {
    "test_gpu.py",
    "test_notebooks.py",
    "test_readme.py",
    "test_demo.py",
    "test_browser.py",
    "test_mutation.py",
}


class Choice:
    """The order in which test files are asked about a module of the tree at `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tests = {p: _imports(p) for p in sorted((root / "tests").rglob("test_*.py")) if p.name not in NEVER}
        self.modules = {_name(p, root): _imports(p) for p in sorted((root / "diag").rglob("*.py"))}

    def of(self, path: str, closest: bool = False) -> list[str]:
        """Test files, from the root, those close to the module first; `closest`: only those, if there are any."""
        name = _name(self.root / path, self.root)
        close = [p for p, imported in self.tests.items() if name in imported or _mirrors(p, name)]
        room = name.split(".")[1]
        close += [self.root / p for p in ALSO.get(room, [])]
        near = [p for p in self.tests if p.relative_to(self.root).parts[1] == room]
        far = self._of_importers({name})
        chosen = (close or far) if closest else []
        ordered = dict.fromkeys(chosen or [*close, *far, *near])
        return [str(p.relative_to(self.root)) for p in ordered]

    def _of_importers(self, names: set[str]) -> list[Path]:
        """The tests named after what imports these modules, or of what imports that, and so on."""
        users = {user for user, imported in self.modules.items() if imported & names} - names
        found = [p for p in self.tests if any(_mirrors(p, user) for user in users)]
        return found if found or not users else self._of_importers(names | users)


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> set[str]:
    """Names of modules, and of what is taken from them, that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def _mirrors(test: Path, name: str) -> bool:
    """tests/ROOM/test_NAME.py, or test_NAME_something.py, for diag.ROOM....NAME (or an instrument's folder)."""
    room, stem = name.split(".")[1:2], test.stem.removeprefix("test_")
    alike = any(stem == part or stem.startswith(f"{part}_") for part in name.split(".")[2:])
    return alike and test.parent.name in room
