"""The map of layer by step and the table of layers, against plain NumPy."""

import dataclasses

import numpy
import pytest
import report_fakes

from diag.reporting.heatmap import MAX_CELLS, heatmaps, ratio
from diag.reporting.layers import layer_map
from diag.reporting.timeline import Axis
from diag.result import Level

SIX = {f"layer{i}": 4 for i in range(6)}


def plain_history(steps=500, names=SIX):
    return report_fakes.history(steps, names, seed=3)


def cell(heat, layer, step):
    column = next(c for c, (a, b) in enumerate(zip(heat["starts"], heat["ends"], strict=True)) if a <= step <= b)
    return heat["values"][layer][column]


def test_neither_a_spike_nor_a_collapse_is_averaged_away():
    history = plain_history()
    history.gradient_norm[100, 0] = 1e6
    history.gradient_norm[200, 1] = 1e-9
    history.gradient_norm[300, 2] = 0.0
    gradient, _ = heatmaps(Axis(1, 500), history, list(range(6)))
    assert (cell(gradient, 0, 101), cell(gradient, 1, 201), cell(gradient, 2, 301)) == (1e6, 1e-9, 0.0)


def test_a_spike_of_a_layer_that_is_otherwise_zero_is_seen():
    history = plain_history()
    history.gradient_norm[:, 0] = 0.0
    history.gradient_norm[250, 0] = 7.0
    gradient, _ = heatmaps(Axis(1, 500), history, list(range(6)))
    assert cell(gradient, 0, 251) == 7.0


def test_each_cell_is_the_median_of_its_steps_or_the_farthest_value_beyond_a_factor_of_ten():
    history = plain_history(1000)
    noise = 10 ** numpy.random.default_rng(0).normal(0, 0.6, history.gradient_norm.shape)
    history = dataclasses.replace(history, gradient_norm=(history.gradient_norm * noise).astype("f4"))
    history.gradient_norm[700, 4] = history.update_norm[700, 4] = 1.0  # no longer infinite
    gradient, update = heatmaps(Axis(1, 1000), history, list(range(6)))
    tables = (history.gradient_norm.astype(float), history.update_norm.astype(float) / history.parameter_norm)
    kinds = set()
    for heat, table in zip((gradient, update), tables, strict=True):
        for column, (a, b) in enumerate(zip(heat["starts"], heat["ends"], strict=True)):
            for layer in range(6):
                part = table[a - 1 : b, layer]
                middle = numpy.median(part)
                far = part[numpy.abs(numpy.log10(part / middle)).argmax()]
                is_far = abs(numpy.log10(far / middle)) > 1
                kinds.add(is_far)
                expected = far if is_far else middle
                # Three digits are kept.
                numpy.testing.assert_allclose(heat["values"][layer][column], expected, rtol=6e-3)
    assert kinds == {True, False}


def test_the_parts_of_a_map_cover_every_step_once():
    gradient, _ = heatmaps(Axis(1, 500), plain_history(), list(range(6)))
    steps = [s for a, b in zip(gradient["starts"], gradient["ends"], strict=True) for s in range(a, b + 1)]
    assert steps == list(range(1, 501))


def test_what_is_not_finite_is_marked_and_what_was_not_observed_is_nothing():
    history = plain_history()
    history.gradient_finite[10, 2] = False
    history.gradient_norm[10, 2] = numpy.inf
    history.gradient_norm[:, 4] = numpy.nan
    gradient, _ = heatmaps(Axis(1, 500), history, list(range(6)))
    assert [layer for layer, _ in gradient["nonfinite"]] == [2]
    assert set(gradient["values"][4]) == {None}
    assert numpy.isfinite([v for v in gradient["values"][2] if v is not None]).all()


def test_a_map_where_nothing_was_observed_is_left_out():
    history = plain_history()
    history.update_norm[:] = numpy.nan
    assert [m["name"] for m in heatmaps(Axis(1, 500), history, [0, 1])] == ["gradient_norm"]


def test_a_map_stays_small():
    names = {f"layer{i}": 1 for i in range(200)}
    history = report_fakes.history(300, names)
    for heat in heatmaps(Axis(1, 300), history, list(range(200))):
        assert sum(map(len, heat["values"])) <= MAX_CELLS


def test_the_ratio_of_a_layer_of_zeros_is_nothing():
    numpy.testing.assert_array_equal(ratio(numpy.array([1.0, 1.0]), numpy.array([2.0, 0.0])), [0.5, numpy.nan])


def test_the_table_holds_what_numpy_finds():
    history = plain_history(3000)
    history.gradient_finite[5:8, 1] = False
    history.gradient_norm[5:8, 1] = numpy.nan
    history.distance[-1, 2] = numpy.nan  # the last that was observed counts
    got = layer_map(Axis(1, 3000), history, [])
    assert got["median_of"] == 2000
    for i, row in enumerate(got["rows"]):
        gradient = history.gradient_norm[:, i].astype(float)
        gradient = gradient[numpy.isfinite(gradient)]
        expected = {
            "gradient_lowest": gradient.min(),
            "gradient_highest": gradient.max(),
            "parameter_last": history.parameter_norm[-1, i],
            "distance_last": history.distance[-2 if i == 2 else -1, i],
        }
        for key, value in expected.items():
            numpy.testing.assert_allclose(row[key], value, rtol=1e-3)  # four digits are kept
        # The median of 2,000 of 3,000 steps: a quantile between 0.45 and 0.55 of all of them.
        low, high = numpy.quantile(gradient, [0.45, 0.55])
        assert low <= row["gradient_median"] <= high
        assert row["nonfinite"] == {1: 3, 4: 1}.get(i, 0)  # the made-up history has one of its own


def test_the_median_of_a_short_run_is_exact():
    history = plain_history(101)
    rows = layer_map(Axis(1, 101), history, [])["rows"]
    expected = numpy.median(history.update_norm.astype(float) / history.parameter_norm, axis=0)
    numpy.testing.assert_allclose([r["ratio_median"] for r in rows], expected, rtol=1e-3)


def test_of_very_many_layers_those_that_stand_out_are_shown():
    names = {f"block{i}.weight": 1 for i in range(1000)}
    history = report_fakes.history(20, names)
    history = dataclasses.replace(history, gradient_norm=numpy.ones_like(history.gradient_norm))
    history.gradient_norm[:, 700] = 1e-12
    history.gradient_finite[3, 800] = False
    finding = report_fakes.evidence().findings[0]
    named = dataclasses.replace(finding, verdict=dataclasses.replace(finding.verdict, layers=("block900",)))
    got = layer_map(Axis(1, 20), history, [named])
    shown = [row["name"] for row in got["rows"]]
    assert len(shown) == 300 and got["left_out"] == 700
    assert {"block700.weight", "block800.weight", "block900.weight"} <= set(shown)
    assert shown == sorted(shown, key=lambda n: int(n[5:].split(".")[0]))
    assert next(r for r in got["rows"] if r["name"] == "block900.weight")["findings"] == ["collapse"]


@pytest.mark.parametrize("level", list(Level))
def test_only_what_is_wrong_is_named_beside_a_layer(level):
    """A verdict of ok, or of a measurement that says nothing, is no finding about the layers that it names."""
    finding = report_fakes.evidence().findings[0]
    verdict = dataclasses.replace(finding.verdict, level=level, layers=("layer3",))
    rows = layer_map(Axis(1, 500), plain_history(), [dataclasses.replace(finding, verdict=verdict)])["rows"]
    named = [row["name"] for row in rows if row["findings"]]
    assert named == (["layer3"] if level in (Level.ALARM, Level.WARNING) else [])


def test_a_single_row_has_a_table_and_no_map():
    got = layer_map(None, plain_history(1), [])
    assert got["maps"] == [] and len(got["rows"]) == 6
