"""What an engineer has of the package: names, types, calls, errors, pickles and files."""

import ast
import copy
import inspect
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
import diag.registry
from diag.errors import InvalidInput
from diag.registry import instruments

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return torch.randn(12, 3), torch.arange(12) % 3


@pytest.fixture
def snapshot():
    torch.manual_seed(0)
    return diag.Snapshot(nn.Linear(4, 3), F.cross_entropy, (torch.randn(12, 4), torch.arange(12) % 3))


def test_the_stub_is_what_the_registry_gives():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "stub", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_stub_offers_what_there_is_at_run_time():
    """Name by name, and each of its kind: what other packages add to the instruments is in no file of ours."""
    body = ast.parse((ROOT / "diag" / "__init__.pyi").read_text()).body
    imports = [alias for node in body if isinstance(node, ast.ImportFrom) for alias in node.names if alias.asname]
    variables = {node.target.id: ast.unparse(node.annotation) for node in body if isinstance(node, ast.AnnAssign)}
    ours = [n for n in dir(diag) if (getattr(getattr(diag, n), "__module__", "diag.")).startswith("diag.")]
    assert sorted([*(alias.name for alias in imports), *variables]) == sorted([*ours, "__all__", "__version__"])
    assert diag.__all__ == dir(diag)
    for name in set(variables) - {"__all__", "__version__"}:
        assert isinstance(getattr(diag, name), diag.registry.Instrument)
        assert variables[name] == f"_{getattr(diag, name).result.__name__}Instrument"
    for alias in imports:
        assert alias.name == alias.asname and hasattr(diag, alias.name)


def test_a_type_checker_knows_what_a_stub_offers():
    """Every public attribute of an instrument is one of the class that the stub derives each instrument from."""
    public = {n for n in vars(diag.hessian_spectrum) if not n.startswith("_")}
    declared = {*vars(diag.registry.Instrument), *diag.registry.Instrument.__annotations__}
    assert public <= declared


def test_the_version_stands_in_one_place():
    """`diag.__version__` is what the package's metadata are made of, and what is cited is the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "diag.__version__"}
    assert f"\nversion: {diag.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_picture_of_the_rooms_is_what_the_code_gives():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "rooms", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_star_import_brings_the_instruments():
    code = "from diag import *; print(softmax_collapse.name, Snapshot.__name__, watch.__name__, Level.OK, Skipped)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("softmax_collapse Snapshot watch ok"), done.stderr


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(AttributeError, match="did you mean hessian_spectrum"):
        _ = diag.hesian_spectrum


def test_quantities_by_position_are_quantities_by_name(tensors):
    logits, labels = tensors
    by_position, by_name = (
        diag.class_counts(logits, labels, logits),
        diag.class_counts(logits=logits, labels=labels, inputs=logits),
    )
    assert by_position == by_name
    with pytest.raises(InvalidInput, match="logits by position and by name"):
        diag.class_counts(logits, logits=logits)
    with pytest.raises(InvalidInput, match=r"called on a Tensor, .*; expected a diag.Snapshot, or the quantities"):
        diag.class_counts(logits, labels, logits, None, labels)
    with pytest.raises(
        InvalidInput, match=r"called on a Tensor, a Tensor and an int; .* settings are given by name"
    ):
        diag.class_counts(logits, labels, 10)


def test_after_a_snapshot_everything_has_a_name(snapshot, tensors):
    assert diag.class_counts(snapshot) == diag.class_counts(snapshot=snapshot)
    with pytest.raises(InvalidInput, match="called on a Snapshot and a Tensor by position"):
        diag.class_counts(snapshot, tensors[1])


@pytest.mark.parametrize(("given", "expected"), [(3.0, 3), ("3", 3), (numpy.int64(3), 3), (torch.tensor(3), 3)])
def test_settings_are_converted(snapshot, given, expected):
    result = diag.hessian_spectrum(snapshot, num_eigenvalues=given)
    assert len(result.eigenvalues) == expected and result.provenance.settings["num_eigenvalues"] == expected


@pytest.mark.parametrize("given", [2.5, "many", None, [3], True])
def test_a_setting_of_another_kind_is_refused_in_one_sentence(snapshot, given):
    with pytest.raises(
        InvalidInput, match=r"num_eigenvalues takes a whole number of 1 or more \(its default is .*\) and not"
    ):
        diag.hessian_spectrum(snapshot, num_eigenvalues=given)


def test_signatures_name_the_snapshot_and_the_settings():
    signature = inspect.signature(diag.class_counts)
    assert list(signature.parameters) == ["logits", "labels", "inputs", "loop", "ratio"]
    assert "Snapshot" in str(signature.parameters["logits"].annotation)


@pytest.mark.parametrize("name", sorted(instruments()))
def test_instruments_can_be_pickled_and_copied(name):
    instrument = instruments()[name]
    assert pickle.loads(pickle.dumps(instrument)) is instrument and copy.deepcopy(instrument) is instrument


def test_watch_can_be_pickled():
    assert pickle.loads(pickle.dumps(diag.watch)) is diag.watch


def test_a_result_in_one_line_and_on_an_axis_of_its_own(tensors):
    result = diag.class_counts(*tensors, tensors[0])
    assert "\n" not in repr(result) and repr(result).startswith("<ClassCounts ")
    assert str(result.verdict()) == result.verdict().sentence
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    assert result.plot().get_xlabel() == "class"
    with pytest.raises(InvalidInput, match="ax is an int; expected matplotlib Axes"):
        result.plot(3)
    pyplot.close("all")


def test_arguments_that_a_function_does_not_have_are_named(snapshot):
    with pytest.raises(InvalidInput, match=r"report has no argument 'setting'; did you mean settings\?"):
        diag.report(["a.pt", "b.pt"], build=print, setting={})
    with pytest.raises(InvalidInput, match=r"report has no argument 'titel'; did you mean title\?"):
        diag.report(snapshot, titel="a network")
    with pytest.raises(InvalidInput, match="report takes names for checkpoints only; give build="):
        diag.report(snapshot, names=["sharpness"])
    with pytest.raises(InvalidInput, match="The gradient rule is an int; expected rule"):
        diag.gradient_rule(nn.Linear)(3)
    with pytest.raises(InvalidInput, match=r"optimizer is an int; expected a torch\.optim\.Optimizer"):
        diag.perp_grad(3)
    assert list(diag.measure_all(snapshot, "class_counts")) == ["class_counts"]


def test_a_result_is_immutable_through_and_through(snapshot):
    spectrum = diag.hessian_spectrum(snapshot, num_eigenvalues=2)
    mapping = next(v for v in vars(spectrum).values() if isinstance(v, dict))
    with pytest.raises(TypeError, match="immutable"):
        mapping["new"] = 1
    assert pickle.loads(pickle.dumps(spectrum)) == spectrum == copy.deepcopy(spectrum)


def test_a_result_that_is_saved_is_loaded(tensors, tmp_path):
    result = diag.class_counts(*tensors, tensors[0])
    assert diag.load(result.save(tmp_path / "counts.json")) == result
    for call in (result.save, diag.load):
        with pytest.raises(InvalidInput, match="The path is an int; expected the name of a file or folder"):
            call(3)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(diag.errors.RunError, match="neither a run nor a result"):
        diag.load(tmp_path / "other.json")


def test_a_plain_matrix_is_per_example_gradients(tensors):
    matrix, labels = torch.randn(12, 5), tensors[1]
    assert diag.gradient_conflict(matrix, labels).provenance.instrument == "gradient_conflict"


def test_a_report_of_checkpoints_from_python(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Linear(4, 3), F.cross_entropy, (torch.randn(60, 4), torch.arange(60) % 3)

    paths = []
    for i in range(2):
        torch.manual_seed(i)
        paths.append(tmp_path / f"step{i}.pt")
        torch.save(nn.Linear(4, 3).state_dict(), paths[-1])
    page = diag.report(paths, tmp_path / "page.html", build=build, names=["neural_collapse"])
    assert "Neural collapse" in Path(page).read_text()
    with pytest.raises(InvalidInput, match="for checkpoints only"):
        diag.report(tmp_path, names=["neural_collapse"])


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "diag", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in ("report", "show", "check", "demo"))
