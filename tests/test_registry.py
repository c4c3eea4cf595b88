"""Declaring, calling and finding instruments."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import diag
from diag.errors import InvalidInput, MissingQuantity, Unsupported
from diag.registry import Kind, attempt, find, instrument, instruments, measure, measure_all
from diag.result import Failed, Level, Result, Skipped, Verdict, measured
from diag.testing import classification, is_one_sentence


@dataclass(frozen=True, kw_only=True)
class Mean(Result):
    mean: float = measured("mean logit", unit="nats")

    def verdict(self):
        return Verdict(Level.OK, f"The mean is {self.mean}.", source="none")

    def plot(self, ax):
        ax.set(xlabel="x", ylabel="y")


@instrument(source="none")
def mean_logit(logits, labels=None, features=None, held_out_logits=None, *, scale: float = 1.0) -> Mean:
    """The mean logit.

    Raises nothing of its own.
    """
    if scale < 0:
        raise ZeroDivisionError("scale")
    if scale == 0:
        raise Unsupported("A scale of zero has no right answer; give another.")
    return Mean(mean=scale * logits.mean())


def test_an_instrument_is_called_on_a_snapshot_or_on_quantities():
    problem = classification()
    from_snapshot = mean_logit(problem.snapshot(), scale=2.0)
    logits = problem.model(problem.data[0]).detach()
    assert from_snapshot.mean == pytest.approx(2 * logits.mean().item(), rel=1e-6)
    assert mean_logit(logits=logits.numpy()).mean == pytest.approx(logits.mean().item(), rel=1e-6)


def test_a_given_quantity_wins_over_the_snapshots():
    assert mean_logit(classification().snapshot(), logits=torch.ones(90, 3)).mean == 1.0


def test_provenance_says_where_a_result_comes_from():
    about = mean_logit(classification().snapshot(seed=5)).provenance
    assert (about.instrument, about.settings, about.num_examples, about.seed) == (
        "mean_logit",
        {"scale": 1.0},
        90,
        5,
    )
    assert len(about.data_fingerprint) == 12
    assert about.seconds > 0


def test_what_is_missing_and_what_breaks_become_records():
    no_data = diag.Snapshot(nn.Linear(2, 2))
    skipped = attempt(no_data, mean_logit)
    assert skipped == Skipped(
        "mean_logit", "logits is missing: the snapshot has no data; give data= with (inputs, targets)."
    )
    snapshot = classification().snapshot()
    assert isinstance(attempt(snapshot, mean_logit, scale=0.0), Skipped)
    failed = attempt(snapshot, mean_logit, scale=-1.0)
    assert isinstance(failed, Failed)
    assert failed.reason == "ZeroDivisionError: scale"
    assert "mean_logit" in failed.traceback


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mean_logit(), "needs logits; pass logits=..., or a snapshot"),
        (lambda: mean_logit(nn.Linear(1, 1)), "called on a Linear; expected a diag.Snapshot, or the quantities"),
        (lambda: mean_logit(logits=torch.ones(2, 2), size=3), "has no setting or quantity 'size'; its quantities"),
        (lambda: mean_logit.converted_settings(3), "The settings of mean_logit are an int; expected a dict"),
        (lambda: find(3), "The name of an instrument is an int; expected one that `diag list` shows"),
        (lambda: find("mean_lgit"), "There is no instrument 'mean_lgit'; .*`diag list`|did you mean"),
    ],
)
def test_mistakes_get_one_sentence(call, text):
    with pytest.raises((InvalidInput, MissingQuantity), match=text) as caught:
        call()
    assert is_one_sentence(str(caught.value))


def no_docstring(logits) -> Mean: ...


def wrong_quantity(logit) -> Mean:
    """Doc."""


def no_default(logits, *, cut) -> Mean:
    """Doc."""


def no_result(logits) -> float:
    """Doc."""


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (no_docstring, "has no docstring"),
        (wrong_quantity, "'logit' is not a quantity of the glossary"),
        (no_default, "setting cut of no_default has no default"),
        (no_result, "annotate it with a subclass of Result"),
    ],
)
def test_declarations_are_checked(function, text):
    with pytest.raises(InvalidInput, match=text):
        instrument(source="none")(function)


def test_measure_is_the_same_call_by_name():
    snapshot = classification().snapshot()
    name = "softmax_collapse"
    assert measure(snapshot, name) == measure(snapshot, find(name)) == getattr(diag, name)(snapshot)
    assert diag.measure(snapshot, name, alarm_at=0.9).provenance.settings["alarm_at"] == 0.9


def test_measure_all_never_raises():
    outcomes = measure_all(diag.Snapshot(nn.Linear(2, 2)))
    assert set(outcomes) == set(instruments())
    assert not [o for o in outcomes.values() if isinstance(o, Failed)]


def test_every_instrument_is_an_attribute_of_diag():
    for name, found in instruments().items():
        assert getattr(diag, name) is found
    assert set(instruments()) <= set(dir(diag))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = diag.nonsense


THIRD_PARTY = '''
from dataclasses import dataclass
from diag import Result, Verdict, instrument, measured

@dataclass(frozen=True, kw_only=True)
class LargestWeight(Result):
    largest: float = measured("largest weight", unit="1")
    def verdict(self):
        return Verdict("alarm", f"The largest weight is {self.largest:.3g}.", advice="Look at it.", source="none",
                       refutation="A smaller one.")
    def plot(self, ax):
        ax.bar([0], [self.largest]); ax.set(xlabel="weight", ylabel="size")

@instrument(source="third party")
def largest_weight(params) -> LargestWeight:
    """The largest weight. Raises nothing of its own."""
    return LargestWeight(largest=max(p.abs().max() for p in params.values()))
'''


@pytest.fixture
def third_party(tmp_path):
    """A folder for PYTHONPATH with an installed package that offers one instrument by entry point."""
    (tmp_path / "third_party.py").write_text(THIRD_PARTY)
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[diag.instruments]\nlargest_weight = third_party\n")
    return tmp_path


def run_python(code, path, **options):
    import os

    environment = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, **options)


def test_an_instrument_of_another_package_appears_everywhere(third_party):
    code = f"""
import diag, torch
from torch import nn
from diag.cli import main
from click.testing import CliRunner
from diag.testing import check_instrument
check_instrument(diag.largest_weight)
torch.manual_seed(0)
model = nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with diag.watch(model, run=r"{third_party}/run", instruments=["largest_weight"]):
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 3)), torch.randint(2, (8,))).backward()
        optimizer.step()
listed = CliRunner().invoke(main, ["list"])
assert "largest_weight" in listed.output, listed.output
checked = CliRunner().invoke(main, ["check", r"{third_party}/run", "--fail-on", "alarm"])
assert checked.exit_code == 1, checked.output
diag.report(r"{third_party}/run", output=r"{third_party}/page.html")
assert "The largest weight is" in open(r"{third_party}/page.html").read()
print("all there")
"""
    shown = run_python(code, third_party)
    assert shown.stdout.strip().endswith("all there"), shown.stderr[-2000:] + shown.stdout[-2000:]


def test_a_broken_entry_point_is_left_out_with_a_warning(third_party):
    (third_party / "third_party.py").write_text("import nothing_of_this_name\n")
    shown = run_python(
        "from diag.registry import instruments; print('largest_weight' in instruments())", third_party
    )
    assert shown.stdout.strip() == "False"
    assert (
        "largest_weight (third_party) cannot be imported (No module named 'nothing_of_this_name')" in shown.stderr
    )


def test_every_instrument_says_why_what_it_finds_matters():
    own = [i for i in instruments().values() if i.function.__module__.startswith("diag.")]
    without = [i.name for i in own if not i.why.endswith(".") or i.why == i.summary or len(i.why) > 200]
    assert not without


def test_an_instrument_says_when_a_watch_runs_it():
    def looks(logits) -> Mean:
        """A look."""

    assert instrument(source="none")(looks).kind is Kind.MEASUREMENT
    assert instrument(source="none", kind="check")(looks).kind is Kind.CHECK
    with pytest.raises(InvalidInput, match="kind='chek' is not known; expected one of 'check', 'measurement', "):
        instrument(source="none", kind="chek")
