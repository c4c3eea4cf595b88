"""The places of a source file where one small change makes a mutant, found in its syntax tree."""

from __future__ import annotations

import ast
import collections
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

COMPARISONS = {
    ast.Lt: ("<", ["<=", ">="]), ast.LtE: ("<=", ["<", ">"]),
    ast.Gt: (">", [">=", "<="]), ast.GtE: (">=", [">", "<"]),
    ast.Eq: ("==", ["!="]), ast.NotEq: ("!=", ["=="]), ast.Is: ("is", ["is not"]), ast.IsNot: ("is not", ["is"]),
    ast.In: ("in", ["not in"]), ast.NotIn: ("not in", ["in"]),
}  # fmt: skip
OPERATORS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
}  # fmt: skip
KINDS = ("threshold", "constant", "comparison", "sign", "boolean", "branch", "function")
FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any", "clamp_min": "clamp_max", "ceil": "floor"}


@dataclass(frozen=True)
class Mutant:
    """One change: bytes [start, stop) of the file at `path` (from the root) become `new`."""

    path: str
    line: int
    start: int
    stop: int
    old: str
    new: str
    kind: str
    text: str  # the line as it stands, stripped

    twin: int = 0  # how many mutants before it are the same change in the same words

    @property
    def change(self) -> str:
        """What kind of change, and which."""
        return f"{self.kind} {self.old} -> {self.new or 'nothing'}"

    @property
    def key(self) -> str:
        """A name that stays the same while the line does, wherever it stands."""
        return f"{self.path}: {self.text} :: {self.change}" + (f" #{self.twin}" if self.twin else "")

    def applied(self, source: bytes) -> bytes:
        """The file's text with the change."""
        return source[: self.start] + self.new.encode() + source[self.stop :]


def mutants_of(path: Path, root: Path, seed: int) -> list[Mutant]:
    """One mutant a place: which of a place's changes is taken depends on the seed and the place alone."""
    source = path.read_bytes()
    found = _Finder(source, str(path.relative_to(root))).found
    chosen = {}
    for mutant in found:
        chosen.setdefault((mutant.start, mutant.stop, mutant.kind), []).append(mutant)
    drawn, seen = [], collections.Counter()
    for options in chosen.values():
        mutant = _draw(seed, options)
        drawn.append(replace(mutant, twin=seen[mutant.key]))
        seen[mutant.key] += 1
    return drawn


def _draw(seed: int, options: list[Mutant]) -> Mutant:
    digest = hashlib.sha256(f"{seed} {options[0].path} {options[0].start} {options[0].text}".encode()).digest()
    return random.Random(digest).choice(options)


class _Finder(ast.NodeVisitor):
    """Walks what is run; leaves out what is only said: annotations, errors' texts, __all__, type checking."""

    def __init__(self, source: bytes, path: str) -> None:
        self.source, self.path, self.found = source, path, []
        self.constants = "threshold"  # outside functions, and where a parameter has a default
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.visit(ast.parse(source))

    def _at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def _span(self, node: ast.expr) -> tuple[int, int]:
        return self._at(node.lineno, node.col_offset), self._at(node.end_lineno or 0, node.end_col_offset or 0)

    def _add(self, start: int, stop: int, new: str, kind: str) -> None:
        line = self.source.count(b"\n", 0, start) + 1
        text = self.source.splitlines()[line - 1].decode().strip()
        old = self.source[start:stop].decode()
        mutant = Mutant(self.path, line, start, stop, old, new, kind, text)
        try:
            ast.parse(mutant.applied(self.source))
        except SyntaxError:
            return
        self.found.append(mutant)

    def _between(self, left: ast.expr, right: ast.expr, old: str, new: str, kind: str) -> None:
        """Replaces the operator that stands between two operands."""
        start, stop = self._span(left)[1], self._span(right)[0]
        place = self.source.find(old.encode(), start, stop)
        if place >= 0:
            self._add(place, place + len(old), new, kind)

    # -- what is not looked into -------------------------------------------------------------------

    def visit_Raise(self, node: ast.Raise) -> None:
        """The words of an error are no arithmetic."""

    def visit_Assert(self, node: ast.Assert) -> None:
        """An assertion that never fails has no effect."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Nor is other prose."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outside, self.constants = self.constants, "threshold"
        placed = [*node.args.posonlyargs, *node.args.args]
        arguments = [*placed[len(placed) - len(node.args.defaults) :], *node.args.kwonlyargs]
        for argument, default in zip(arguments, (*node.args.defaults, *node.args.kw_defaults), strict=True):
            if default is not None and argument.arg != "seed":  # one seed is as good as another
                self.visit(default)
        self.constants = "constant"
        for statement in node.body:
            self.visit(statement)
        self.constants = outside

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outside, self.constants = self.constants, "constant"
        for part in node.body:
            self.visit(part)
        self.constants = outside

    # -- what is changed ---------------------------------------------------------------------------

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return
        if all(
            isinstance(part, ast.Raise) for part in node.body
        ):  # a refusal is tested, or is not, by its condition
            self._force(node.test, ("False",))
        else:
            self._force(node.test, ("True", "False"))
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._force(node.test, ("True", "False"))
        self.generic_visit(node)

    def _force(self, test: ast.expr, values: tuple[str, ...]) -> None:
        for value in values:
            self._add(*self._span(test), value, "branch")

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for operator, left, right in zip(node.ops, operands, operands[1:], strict=False):
            old, others = COMPARISONS[type(operator)]
            for new in others:
                self._between(left, right, old, new, "comparison")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        words = any(isinstance(side, ast.JoinedStr) or _is_text(side) for side in (node.left, node.right))
        if type(node.op) in OPERATORS and not words:
            old, new = OPERATORS[type(node.op)]
            self._between(node.left, node.right, old, new, "sign")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between(left, right, old, new, "boolean")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        start, inner = self._span(node)[0], self._span(node.operand)
        if isinstance(node.op, ast.Not):
            self._add(start, inner[0], "", "boolean")
        elif isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self._add(start, inner[0], "", "sign")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func
        if isinstance(name, ast.Name) and name.id in FUNCTIONS:
            self._add(*self._span(name), FUNCTIONS[name.id], "function")
        elif isinstance(name, ast.Attribute) and name.attr in FUNCTIONS:
            stop = self._span(name)[1]
            self._add(stop - len(name.attr), stop, FUNCTIONS[name.attr], "function")
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "strict":  # of zip: what it would raise, no right program meets
            self.visit(node.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        for new in _others(node.value):
            self._add(*self._span(node), new, self.constants)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _others(value: object) -> Iterator[str]:
    if isinstance(value, bool):
        yield str(not value)
    elif isinstance(value, int):
        yield from (str(value + 1), str(value - 1)) if 0 < abs(value) < 20 else (str(2 * value or 1),)
    elif isinstance(value, float):
        yield from (repr(10 * value or 1.0), repr(value / 10 or -1.0))
