"""No line of `diag` reads prose: what a sentence says stands in an enum or a field beside it.

What is looked for: a text with a blank or a sentence's punctuation in it that is compared with, searched in or
taken off another text. Not seen: a sentence that is compared by way of a name, and single words.
"""

import ast
import re
from pathlib import Path

import pytest

import diag
from tests.source import parsed

ROOT = Path(diag.__file__).parent
MODULES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}

TAKEN_APART = {"split", "rsplit", "partition", "rpartition"}
TAKEN_APART |= {"startswith", "endswith", "removeprefix", "removesuffix"}
SEARCHED = {"find", "rfind", "index", "rindex", "count"}
PATTERNS = {"search", "match", "fullmatch", "findall", "finditer", "split"}  # of the module re
OF_PROSE = re.compile(r"\S\s+\S|;|[.,:!?]\s")
# Others' errors that have no kinds: text -> why there is no other way.
FOREIGN_TEXTS = {
    ("checkpoints/distributed.py", ". "): "the first sentence of an error of torch.load is quoted",
    ("checkpoints/formats.py", r"Unsupported [^\n.]*"): "torch.load raises one kind of error for all it refuses",
    ("checkpoints/formats.py", r"GLOBAL (\S+) was not an allowed"): "the same",
    ("curvature/memory.py", "saved tensor hooks"): "torch.func raises a plain RuntimeError",
    ("distributed/link.py", "closed by peer"): "gloo raises a plain RuntimeError",
    ("distributed/link.py", "reset by peer"): "the same",
    ("distributed/link.py", "imed out"): "the same",
    ("reporting/state.py", r"(?<=[.;:])\s+"): "a long text is shortened at the end of a sentence, to be shown",
}


def texts(node):
    """The constant texts in an expression, or in the members of a tuple, list or set."""
    members = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return [n.value for n in members if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def read_of(node):
    """The constant texts that a node of the syntax tree looks for in another text."""
    if isinstance(node, ast.Compare):
        return [t for part in (node.left, *node.comparators) for t in texts(part)]
    if isinstance(node, ast.MatchValue):
        return texts(node.value)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
        return []
    of_re = isinstance(node.func.value, ast.Name) and node.func.value.id == "re"
    names = PATTERNS if of_re else TAKEN_APART | SEARCHED
    return texts(node.args[0]) if node.func.attr in names else []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_reads_prose(name):
    found = {text for node in ast.walk(parsed(MODULES[name])) for text in read_of(node) if OF_PROSE.search(text)}
    strange = {text for text in found if (name, text) not in FOREIGN_TEXTS}
    assert not strange, f"{name} looks for {sorted(strange)} in a text; put an enum or a field beside the sentence"


VAGUE = {"given", "shown", "wanted", "wary", "patience", "occasions", "foreseen", "accurate"}
VAGUE |= {"last_words", "let_go"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_names_say_what_they_are_of(name):
    """Not by a common word alone: functions, classes, variables, arguments and attributes."""
    names = set()
    for node in ast.walk(parsed(MODULES[name])):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    assert not {n for n in names if n.strip("_").lower() in VAGUE}


def test_what_is_read_of_others_is_read():
    for name, text in FOREIGN_TEXTS:
        assert any(text in read_of(node) for node in ast.walk(parsed(MODULES[name]))), (
            f"{name} no longer reads {text!r}"
        )


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('told.split("; ")[0]', True),
        ('"each example" in how', True),
        ('"moves" in method', False),  # a word can be a key
        ('rule == "2 / learning rate"', True),
        ('text.partition(", fingerprint")', True),
        ('name.partition(".")', False),
        ('re.search("did not converge", text)', True),
        ('rule in ("no verdict", "known")', True),
    ],
)
def test_the_scan_itself(code, found):
    read = [t for node in ast.walk(ast.parse(code)) for t in read_of(node)]
    assert any(OF_PROSE.search(text) for text in read) == found
