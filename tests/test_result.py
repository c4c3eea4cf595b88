"""Results are immutable data that go through JSON unchanged; verdicts are one sentence and a source."""

import dataclasses
import json
import math
from dataclasses import dataclass

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import diag
from diag.encoding import decode, encode, equal
from diag.errors import InvalidInput
from diag.result import Level, Precondition, Result, Verdict, measured


@dataclass(frozen=True, kw_only=True)
class Sample(Result):
    share: float = measured("a share", unit="share")
    by_layer: dict = measured("a number a layer", unit="nats")
    curve: numpy.ndarray = measured("a curve", shape="T")
    state: object = measured("kept in memory only", record=False, default=None)

    def verdict(self):
        return Verdict(Level.OK, f"The share is {self.share}.", source="none")

    def plot(self, ax):
        ax.plot(self.curve)
        ax.set(xlabel="step", ylabel="curve")


def sample(**changes):
    values = {"share": 0.25, "by_layer": {"a": 1.0, "b": math.nan}, "curve": torch.arange(3.0)}
    return Sample(**(values | changes))


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats()
    | st.text(max_size=5)
    | arrays.arrays(
        st.sampled_from([numpy.float32, numpy.float64, numpy.int64, numpy.bool_]), arrays.array_shapes(max_dims=3)
    )
)
plain_data = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4).filter(lambda k: not k.startswith("__")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(plain_data)
@settings(deadline=None, max_examples=150)
def test_plain_data_goes_through_strict_json_unchanged(value):
    text = json.dumps(encode(value), allow_nan=False)
    assert equal(decode(json.loads(text)), value)


def test_large_arrays_can_be_stored_elsewhere():
    store = {}

    def save(array):
        store["one"] = array
        return "one"

    big = sample(curve=numpy.arange(100.0))
    data = json.loads(json.dumps(big.to_dict(save)))
    assert data["curve"] == {"__array__": "one"}
    assert Sample.from_dict(data, store.__getitem__) == big
    with pytest.raises(InvalidInput, match="names an array in another file; load it through its run"):
        Sample.from_dict(data)


def test_a_result_is_frozen_down_to_its_arrays():
    result = sample()
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.share = 1.0
    with pytest.raises(ValueError, match="read-only"):
        result.curve[0] = 7


def test_tensors_become_arrays_and_bfloat16_survives():
    result = sample(curve=torch.tensor([1.5], dtype=torch.bfloat16), share=torch.tensor(0.5))
    assert result.curve.dtype == numpy.float32
    assert isinstance(result.share, float)


def test_equality_treats_nan_as_equal_and_sees_every_recorded_field():
    assert sample() == sample()
    assert sample() != sample(curve=torch.arange(4.0))
    assert sample() != sample(by_layer={"a": 2.0, "b": math.nan})
    assert sample(state={"w": 1}) == sample(state={"w": 2})  # unrecorded
    assert sample() != "sample"


def test_unrecorded_fields_are_in_no_file():
    assert "state" not in sample(state=object()).to_dict()


def test_a_result_from_a_newer_version_loses_only_its_new_fields():
    data = sample().to_dict() | {"later": 1}
    assert Sample.from_dict(data) == sample()


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(InvalidInput, match="holds a set; expected numbers, strings, tuples, dicts or arrays"):
        sample(by_layer={"a": {1}}).to_dict()


def test_scalars_and_frame():
    assert sample().scalars() == {
        "share": 0.25,
        "by_layer/a": 1.0,
        "by_layer/b": pytest.approx(math.nan, nan_ok=True),
    }
    frame = sample().to_frame()
    assert frame.loc["share", "unit"] == "share"
    assert frame.loc["by_layer/a", "value"] == 1.0


def test_a_failed_precondition_is_found():
    fails = Precondition("enough data", False, "3 of 10")
    assert sample(preconditions=(Precondition("a", True), fails)).unmet() is fails
    assert sample().unmet() is None


def test_the_notebook_view_escapes_and_draws():
    @dataclass(frozen=True, kw_only=True)
    class Hostile(Sample):
        def verdict(self):
            return Verdict(Level.ALARM, "<script>alert(1)</script>", source="none")

    shown = Hostile(share=1.0, by_layer={}, curve=numpy.arange(3.0))._repr_html_()
    assert "<script>" not in shown
    assert "<svg" in shown


def test_verdicts_round_trip_and_refuse_nonsense():
    verdict = Verdict(
        "warning", "One of two.", advice="Try it.", source="a paper", layers=("a",), value=math.inf, threshold=1.0
    )
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict(), allow_nan=False))) == verdict
    assert verdict.level is Level.WARNING
    with pytest.raises(InvalidInput, match="empty sentence"):
        Verdict(Level.OK, " ")
    with pytest.raises(ValueError, match="'bad' is no Level; expected one of 'alarm', "):
        Verdict("bad", "One.")


def test_levels_sort_from_the_worst():
    order = sorted(Level, key=lambda level: level.severity)
    assert order[0] is Level.ALARM
    assert order.index(Level.WARNING) < order.index(Level.UNKNOWN) < order.index(Level.OK)


def test_a_setting_that_there_is_not_is_asked_for_by_name():
    result = diag.softmax_collapse(torch.eye(3), torch.arange(3))
    with pytest.raises(InvalidInput, match=r"SoftmaxCollapse has no setting 'alarm'; did you mean alarm_at\?"):
        result.setting("alarm")
