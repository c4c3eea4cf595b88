"""What diag replaces in the process and which private names of torch it touches are all in one table, and exist."""

import ast
import functools
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.watching.hooks.hub import HUB, LOSSES
from diag.watching.hooks.patches import Attribute, Body
from diag.watching.hooks.private import PRIVATE, REPLACED_FUNCTIONS

ROOT = Path(diag.__file__).parent
# Private names of other packages, and of Python's own.
OF_OTHERS = {"_replace", "_fields", "_asdict", "_make", "_value_", "_get_renderer", "_DummyThread"}


def found(path):
    """The object at a dotted path; AttributeError where there is none."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        return functools.reduce(getattr, parts[length:], owner)
    raise AttributeError(path)


def x(*shape):
    return torch.randn(*shape, requires_grad=True)


def attention():
    q = x(1, 2, 8, 4)
    return F.scaled_dot_product_attention(q, q, q).grad_fn


MAKERS = {
    "tensor": lambda: x(2),
    "view": lambda: x(2, 2).detach()[0],
    "storage": lambda: x(2).untyped_storage(),
    "node": lambda: x(2).exp().grad_fn,
    "LogSoftmax": lambda: x(2, 3).log_softmax(1).grad_fn,
    "Transpose": lambda: x(2, 3).transpose(0, 1).grad_fn,
    "Permute": lambda: x(2, 3).permute(1, 0).grad_fn,
    "Select": lambda: x(2, 3).select(1, 0).grad_fn,
    "Slice": lambda: x(2, 3)[:, :2].grad_fn,
    "Mean": lambda: x(2, 3).mean().grad_fn,
    "Add": lambda: x(2).add(x(2), alpha=2).grad_fn,
    "Mul": lambda: (x(2) * x(2)).grad_fn,
    "Pow": lambda: (x(2) ** 2).grad_fn,
    "Addmm": lambda: F.linear(x(2, 3), x(4, 3), x(4)).grad_fn,
    "Convolution": lambda: F.conv1d(x(1, 2, 5), x(3, 2, 2)).grad_fn,
    "Attention": attention,
    "LayerNorm": lambda: F.layer_norm(x(2, 3), (3,)).grad_fn,
    "module": lambda: nn.Linear(2, 2),
    "operation": lambda: torch.ops.aten.add.Tensor,
    "scaler": lambda: torch.amp.GradScaler("cpu"),
}


@pytest.mark.parametrize("row", PRIVATE, ids=lambda row: f"{row.of}.{row.name}")
def test_each_private_name_exists(row):
    owner = found(row.of) if row.of.startswith("torch") else MAKERS[row.of]()
    assert hasattr(owner, row.name) and row.why and row.since


@pytest.mark.parametrize("row", REPLACED_FUNCTIONS, ids=lambda row: row.where)
def test_each_replaced_name_exists(row):
    what = found(row.where)
    assert row.how in ("body", "attribute", "flag") and row.while_ in ("watching", "measuring") and row.why
    if row.how == "body":  # a plain function, whose body can be exchanged
        assert inspect.isfunction(what) and what.__closure__ is None


def test_the_table_is_what_a_watch_replaces():
    replaced = set()
    for patch in HUB._make_patches():
        if isinstance(patch, Body):
            replaced.add((id(F), patch.function.__name__))
        elif isinstance(patch, Attribute):
            replaced |= {(id(owner), name) for owner, name in patch.places if hasattr(owner, name)}
    places = (row.where.rpartition(".") for row in REPLACED_FUNCTIONS if row.while_ == "watching")
    assert replaced == {(id(found(owner)), name) for owner, _, name in places}
    assert {row.where.split(".")[-1] for row in REPLACED_FUNCTIONS if row.how == "body"} == set(LOSSES)


def test_no_private_name_of_torch_is_touched_that_is_not_in_the_table():
    trees = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
    ours = {name for tree in trees.values() for name in defined(tree)}
    known = {row.name for row in PRIVATE} | {row.where.split(".")[-1] for row in REPLACED_FUNCTIONS} | OF_OTHERS
    for path, tree in trees.items():
        touched = {name for name in accessed(tree) if name not in ours}
        assert touched <= known, f"{path.relative_to(ROOT)} touches {sorted(touched - known)}"


def defined(tree):
    """The private names that a module of ours defines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr if of_self(node) else ""


def accessed(tree):
    """The private names that it takes from other objects, or imports from torch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not of_self(node):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from (part for part in node.module.split(".") if is_private(part) and part != "_C")
            yield from (alias.name for alias in node.names if is_private(alias.name))


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_C"


def of_self(node):
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
