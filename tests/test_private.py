"""What diag replaces in the process and which private names of others it touches are all in one table, and exist.

The scan of the source sees attributes (`x._name`, but of `self`), what is imported, and every text that is such a
name or leads to one ("torch._dynamo"), as it is given to getattr, hasattr or a table; f-strings by how they begin.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.foreign import PRIVATE, REPLACED_FUNCTIONS
from diag.watching.hooks.hub import FURTHER_LOSSES, HUB, LOSSES
from diag.watching.hooks.patches import Attribute, Body
from tests.source import parsed

ROOT = Path(diag.__file__).parent
PRIVATE_NAME = re.compile(r"_[A-Za-z]\w*")
DOTTED = re.compile(r"[a-z]\w*(\.\w+)+\.?")
PUBLIC = {"_replace", "_fields", "_asdict", "_make", "_repr_html_"}  # of named tuples and notebooks
OWN_TEXTS = {  # texts of ours that begin like private names
    "_diag_around": "an argument that the body of a replaced function has",
    "_noted": "where facts keep which of them were read",
    "_made_plain": "where a class keeps which of its fields become plain",
    "_original": "the attribute of a stand-in",
    "_standard_error": "the end of the name of a field",
    "_finite": "the end of the name of a column",
    "_step": "the end of the name of a field, and a column of W&B",
    "_hooks": "the end of the names of an optimizer's hooks",
    "_upsample": "the beginning of the names of operations",
}


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


def optimizer():
    return torch.optim.SGD([x(2)], 0.1)


def schedulers():
    parts = [torch.optim.lr_scheduler.StepLR(optimizer(), 1)]
    parts.append(torch.optim.lr_scheduler.StepLR(parts[0].optimizer, 1))
    return torch.optim.lr_scheduler.SequentialLR(parts[0].optimizer, parts, [2])


def replicated():
    model = nn.Linear(2, 2)
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["bias"])
    return model


def offloaded():
    hooks = pytest.importorskip("accelerate.hooks")
    return hooks.add_hook_to_module(nn.Linear(2, 2), hooks.ModelHook())


MAKERS = {
    "tensor": lambda: x(2),
    "view": lambda: x(2, 2).detach()[0],
    "storage": lambda: x(2).untyped_storage(),
    "node": lambda: x(2).exp().grad_fn,
    "LogSoftmax": lambda: x(2, 3).log_softmax(1).grad_fn,
    "Transpose": lambda: x(2, 3).transpose(0, 1).grad_fn,
    "Permute": lambda: x(2, 3).permute(1, 0).grad_fn,
    "Index": lambda: x(2, 3)[torch.arange(2), torch.arange(2)].grad_fn,
    "Diagonal": lambda: x(2, 3).diagonal().grad_fn,
    "Split": lambda: x(2, 4).chunk(2, 1)[0].grad_fn,
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
    "Clamp": lambda: x(2).clamp(0, 1).grad_fn,
    "Hardtanh": lambda: F.hardtanh(x(2)).grad_fn,
    "MSELoss": lambda: F.mse_loss(x(2), torch.ones(2)).grad_fn,
    "SmoothL1Loss": lambda: F.smooth_l1_loss(x(2), torch.ones(2)).grad_fn,
    "HuberLoss": lambda: F.huber_loss(x(2), torch.ones(2)).grad_fn,
    "NllLoss": lambda: F.nll_loss(x(2, 3), torch.ones(2, dtype=torch.long)).grad_fn,
    "lazy": lambda: nn.LazyLinear(2),
    "compiled": lambda: torch.compile(nn.Linear(2, 2)),
    "replicated": replicated,
    "scheduler": lambda: torch.optim.lr_scheduler.StepLR(optimizer(), 1),
    "schedulers": schedulers,
    "optimizer step": lambda: torch.optim.lr_scheduler.StepLR(optimizer(), 1).optimizer.step,
    "loader": lambda: iter(torch.utils.data.DataLoader(torch.ones(2))),
    "offloaded": offloaded,
    "figure": lambda: pytest.importorskip("matplotlib.figure").Figure(),
    "key of a state dict": lambda: {nn.modules.module._EXTRA_STATE_KEY_SUFFIX: None},
    "sys.modules": lambda: sys.modules,
    "enum member": lambda: diag.Level.OK,
    "mode": lambda: torch._subclasses.FakeTensorMode(),
    "scaler": lambda: torch.amp.GradScaler("cpu"),
}


@pytest.mark.parametrize("row", PRIVATE, ids=lambda row: f"{row.of}.{row.name}")
def test_each_private_name_exists(row):
    assert row.why and row.since
    if row.of in MAKERS:
        owner = MAKERS[row.of]()
        assert row.name in owner if isinstance(owner, dict) else hasattr(owner, row.name)
        return
    if row.of.split(".")[0] in ("accelerate", "transformers"):
        pytest.importorskip(row.of.split(".")[0])
    if row.name == "_local" and sys.version_info < (3, 13):
        pytest.skip("Python before 3.13 has no such module")
    if row.name == "_original_forward":  # only prepared models have it
        assert row.name in inspect.getsource(found(row.of))
        return
    with contextlib.suppress(ImportError):
        importlib.import_module(f"{row.of}.{row.name}")
    assert hasattr(found(row.of), row.name)


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
    assert {row.where.split(".")[-1] for row in REPLACED_FUNCTIONS if row.how == "body"} == {
        *LOSSES,
        *FURTHER_LOSSES,
    }


PATHS = [path for path in sorted(ROOT.rglob("*.py")) if path.name != "foreign.py"]
REPLACED_NAMES = {part for row in REPLACED_FUNCTIONS for part in row.where.split(".") if part.startswith("_")}


@functools.cache
def known_names():
    return {row.name for row in PRIVATE} | REPLACED_NAMES | PUBLIC


@functools.cache
def own_names():
    return {name for path in PATHS for name in defined(parsed(path))}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_name_of_others_is_touched_that_is_not_in_the_table(path):
    of_objects = set(accessed(parsed(path))) - set(defined(parsed(path)))
    in_texts = set(named_in_texts(parsed(path))) - own_names() - set(OWN_TEXTS)
    touched = (of_objects | in_texts) - known_names()
    touched = {t for t in touched if not (t.endswith("*") and any(k.startswith(t[:-1]) for k in known_names()))}
    assert not touched, f"{path.relative_to(ROOT)} touches {sorted(touched)}: add rows to diag/foreign.py"


def test_every_row_of_the_table_is_needed():
    used = {name for path in PATHS for name in (*accessed(parsed(path)), *named_in_texts(parsed(path)))}
    unused = {
        row.name
        for row in PRIVATE
        if is_private(row.name)
        and row.name not in used
        and not any(u.endswith("*") and row.name.startswith(u[:-1]) for u in used)
    }
    assert not unused, f"diag touches none of {sorted(unused)}: take their rows out of diag/foreign.py"
    texts = {name for path in PATHS for name in named_in_texts(parsed(path))}
    assert set(OWN_TEXTS) <= texts | own_names()


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("x._hidden", {"_hidden"}),
        ("self._own", set()),
        ("getattr(x, '_hidden', None)", {"_hidden"}),
        ("hasattr(x, '_hidden')", {"_hidden"}),
        ("NAMES = ('_hidden', 'shown')", {"_hidden"}),
        ("getattr(x, f'_global{kind}')", {"_global*"}),
        ("from torch._inner import thing", {"_inner"}),
        ("from numpy import _hidden", {"_hidden"}),
        ("sys.modules.get('torch._inner.part')", {"_inner"}),
        ("x.__dict__", set()),
        ("'_ in a sentence'", set()),
    ],
)
def test_the_scan_itself(code, names):
    tree = ast.parse(code)
    assert {*accessed(tree), *named_in_texts(tree)} == names


def defined(tree):
    """The private names that a module of ours defines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr if of_self(node) else ""


def accessed(tree):
    """The private names that it takes from other objects, or imports from other packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not of_self(node):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in ("diag", "__future__"):
            yield from (part for part in (node.module or "").split(".") if is_private(part))
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split(".") if is_private(part))


def named_in_texts(tree):
    """The private names in texts: one by itself, in a dotted path, or as the beginning of an f-string (with a
    *)."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            if PRIVATE_NAME.fullmatch(node.values[0].value):
                yield f"{node.values[0].value}*"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            if PRIVATE_NAME.fullmatch(node.value) and is_private(node.value):
                yield node.value
            elif DOTTED.fullmatch(node.value):
                yield from (part for part in node.value.split(".") if len(part) > 1 and is_private(part))


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def of_self(node):
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
