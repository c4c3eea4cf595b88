"""Norms against float64, at the sizes and ranges where float32 sums go wrong."""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diag.run.rows import row_columns, row_dtype
from diag.watching.measure.schedule import Thinning
from diag.watching.observe.norms import copies, differences, norms
from diag.watching.observe.rows import Readback, Row, RowQueue


@pytest.mark.parametrize("size", [1, 3, 1000, (1 << 16) + 1, 3_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_norms_are_right_at_any_size(size, dtype):
    t = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    # A float32 dot of a block of 131,072 entries is good to some 1e-6; torch's own norm of 3M is off by 3e-5.
    assert norms([t])[0] == pytest.approx(t.double().norm().item(), rel=5e-6)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.floats(-30, 30), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_norms_of_any_shape_and_scale(shape, exponent, seed):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    other = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed + 1))
    expected = [float(x.double().norm()) for x in (t, other)]
    # Squares of 1e30 and 1e-30 leave float32; the norms must not.
    numpy.testing.assert_allclose(norms([t, other]), expected, rtol=1e-6)


def test_norms_of_unusual_tensors():
    sparse = torch.sparse_coo_tensor([[1, 1, 3]], torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]]), (5, 2))
    view = torch.randn(300, 400).t()
    complex_one = torch.randn(5, dtype=torch.complex64)
    given_ones = [sparse, view, complex_one, torch.tensor(3.0), torch.zeros(0), torch.full((3,), 2.0).bfloat16()]
    expected = [sparse.to_dense().norm(), view.norm(), complex_one.abs().norm(), 3.0, 0.0, 12**0.5]
    numpy.testing.assert_allclose(norms(given_ones), [float(e) for e in expected], rtol=1e-6)


def test_what_is_not_finite_stays_so():
    values = norms([torch.tensor([1.0, torch.inf]), torch.tensor([torch.nan]), torch.ones(2)])
    assert numpy.isfinite(values).tolist() == [False, False, True]


def test_differences_of_half_precision_do_not_round():
    after, before = torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([0.00390625, 1.9921875]).bfloat16()
    expected = float((after.double() - before.double()).norm())
    assert differences([after], [before])[0].item() == pytest.approx(expected, rel=1e-7)
    many = [torch.randn(700, 700) for _ in range(5)]
    old = copies(many)
    for t in many:
        t += 0.5
    numpy.testing.assert_allclose(differences(many, old), [350.0] * 5, rtol=1e-6)
    assert all(o.data_ptr() != t.data_ptr() for o, t in zip(old, many, strict=True))


class Later:
    """Stands for an event of a device whose copy arrives after `polls` questions."""

    def __init__(self, polls):
        self.polls = polls

    def query(self):
        self.polls -= 1
        return self.polls < 0

    def synchronize(self):
        self.polls = -1


def row(value):
    return Row([value], 0.1, [("gradient_norm", numpy.array([0]), torch.tensor([2.0 * value]))])


def test_rows_are_written_in_order_once_their_numbers_have_arrived(monkeypatch):
    written = []
    rows = RowQueue(row_dtype(row_columns(1)), 7, lambda table, row: written.append(table.copy()))
    polls = iter((2, 0, 0, 5))

    class Slow(Readback):
        def __init__(self, numbers):
            super().__init__(numbers)
            self._event = Later(next(polls))

    monkeypatch.setattr("diag.watching.observe.rows.Readback", Slow)
    rows._waiting.append((7, row(0.0), Slow(row(0.0).numbers())))
    counts = []
    for value in (1.0, 2.0, 3.0):
        rows.add(row(value))
        counts.append(len(written))
    assert rows.step == 10 and counts == [0, 0, 3]
    rows.drain(wait=True)
    assert [int(h["steps"][0]) for h in written] == [7, 8, 9, 10]
    assert [float(h["gradient_norm"][0, 0]) for h in written] == [0.0, 2.0, 4.0, 6.0]


def test_thinning_takes_geometric_steps_and_what_the_share_allows():
    busy = Thinning(0.01)
    taken = []
    for step in range(1, 1001):
        if busy.take(step, elapsed=1e-4 * step):
            taken.append(step)
            busy.spent(1e-3)  # ten times what a step takes: only the geometric steps are left, far apart
    assert taken == [*range(1, 11), 15, 23, 35, 53, 80, 120, 180, 270, 405, 608, 912]
    cheap, taken = Thinning(1e-4), []
    for step in range(1, 1001):
        if cheap.take(step, elapsed=1e-4 * step):
            taken.append(step)
            cheap.spent(1e-6)  # a hundredth of a step: at some 60 steps less than two hundredths of the time
    assert taken[:10] == list(range(1, 11)) and 50 < len(taken) < 75
    ratios = numpy.diff(taken[20:]) / taken[20:-1]
    assert ratios.max() < 0.13
    idle = Thinning(0.01)
    assert all(idle.take(s, 0.1 * s) and not idle.spent(1e-6) for s in range(1, 101))


@pytest.mark.filterwarnings("error")  # norms whose squares no float64 holds are none of the user's concern
def test_a_usual_row_is_written_as_any_other():
    columns = numpy.array([0, 2], numpy.intp)
    written = {}
    for kind in ("usual", "any"):
        tables = written[kind] = []
        queue = RowQueue(row_dtype(row_columns(3)), 0, lambda table, row, to=tables: to.append(table.tobytes()))
        if kind == "any":
            queue._finish_usual = lambda step, row: False
        for values in ([3.0, 4.0], [numpy.nan, 1.0], [1e200, 1.0], [0.0, 0.0], []):
            norms_of = [("gradient_norm", columns, numpy.array(values))] if values else []
            for loss in (0.5, math.inf):
                queue.add(Row([torch.tensor(loss)], 0.1, list(norms_of)))
    assert written["usual"] == written["any"] and len(written["any"]) == 10


def test_differences_of_many_small_tensors_are_those_of_each():
    generator = torch.Generator().manual_seed(0)
    after = [torch.randn(i % 7 + 1, 3, generator=generator) for i in range(90)] + [torch.randn(400), torch.zeros(0)]
    after += [torch.randn(5).double()]
    before = [a + 1e-3 * torch.randn(a.shape, generator=generator, dtype=a.dtype) for a in after]
    expected = [(a.double() - b.double()).norm().item() for a, b in zip(after, before, strict=True)]
    # The difference of two float32 numbers near 1 is exact to 1e-7 of them, which is 1e-4 of 1e-3.
    numpy.testing.assert_allclose(differences(after, before), expected, rtol=1e-4)
