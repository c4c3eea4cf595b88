"""Scores of orders of rows: against the moments over all orders counted one by one, and over many drawn ones."""

import itertools
import math

import pytest
import torch

from diag.linalg.geometry.pairing import centred, crossing_score, pairing_scores, similarity


def drawn(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return similarity(inputs), torch.randn(n, 2, generator=generator, dtype=torch.float64)


def total(kernel, columns):
    columns = columns - columns.mean(0)
    return float((centred(kernel) * (columns @ columns.T)).sum())


def test_scores_are_those_of_all_orders_counted_one_by_one():
    kernel, columns = drawn(8)
    orders = [torch.tensor(order) for order in itertools.permutations(range(8))]
    every = torch.tensor([total(kernel, columns[order]) for order in orders], dtype=torch.float64)
    wanted = (every[:5] - every.mean()) / every.std(correction=0)
    assert pairing_scores(centred(kernel), columns, orders[:5]) == pytest.approx(wanted.tolist(), rel=1e-9)


def test_a_score_across_two_parts_is_that_of_all_orders_of_the_first():
    kernel, columns = drawn(16, seed=1)
    across = kernel[:8, 8:]
    across = across - across.mean(0) - across.mean(1, keepdim=True) + across.mean()
    own, others = columns[:8] - columns[:8].mean(0), columns[8:] - columns[8:].mean(0)
    orders = torch.tensor(list(itertools.permutations(range(8))))
    every = (own[orders] * (across @ others)).sum((1, 2))
    assert abs(float(every.mean())) < 1e-9
    wanted = float(every[0] / every.std(correction=0))
    assert crossing_score(kernel, columns, 8) == pytest.approx(wanted, rel=1e-9)


def test_a_relation_is_found_and_its_loss_under_a_move_of_one_row_too():
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    targets = inputs[:, :1] + 0.5 * torch.randn(200, 1, generator=generator, dtype=torch.float64)
    orders = [torch.arange(200), torch.arange(200).roll(1)]
    own, moved = pairing_scores(centred(similarity(inputs)), targets, orders)
    assert own > 20 and abs(moved) < 4


def test_rows_near_one_another_tell_of_what_the_distance_of_all_does_not():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.rand(400, 1, generator=generator, dtype=torch.float64)
    targets = (60 * inputs).sin()
    rows = [torch.arange(400)]
    assert abs(pairing_scores(centred(similarity(inputs)), targets, rows)[0]) < 4
    assert pairing_scores(centred(similarity(inputs, within=4 / 400)), targets, rows)[0] > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_equal_do_not_set_the_width(dtype):
    rows = torch.randn(4, 30, generator=torch.Generator().manual_seed(4), dtype=dtype)
    rows = torch.cat([rows[:1].expand(46, 30), rows[1:]])  # most pairs are of equal rows
    squared = (rows[:, None].double() - rows[None].double()).square().sum(2)
    width = squared[squared > 0].quantile(0.5, interpolation="lower")
    assert similarity(rows) == pytest.approx((-squared / width).exp(), abs=1e-5)


@pytest.mark.parametrize("n", [0, 1, 7])
def test_few_rows_have_no_score(n):
    kernel, columns = torch.eye(n), torch.arange(float(n))[:, None]
    assert math.isnan(pairing_scores(centred(kernel), columns, [torch.arange(n)])[0])
    assert math.isnan(crossing_score(kernel, columns, n // 2))


def test_what_does_not_vary_has_no_score():
    kernel, _ = drawn(20)
    assert math.isnan(pairing_scores(centred(kernel), torch.ones(20, 1), [torch.arange(20)])[0])
    assert math.isnan(pairing_scores(centred(torch.ones(20, 20)), torch.randn(20, 1), [torch.arange(20)])[0])
