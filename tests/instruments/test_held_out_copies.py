"""Held-out rows that are training rows are told, where chance does not make rows equal."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import diag
from diag.instruments.causes import Cause
from diag.snapshot.loop.data import DrawFacts, EvaluatedRows
from diag.snapshot.loop.facts import Loop


def drawn(n, seed, features=5):
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed))


def test_copies_are_counted_and_chance_is_bounded_by_the_training_rows():
    training, others = drawn(300, 0), drawn(100, 1)
    others[:40] = training[200:240]
    result = diag.held_out_copies(training, others)
    assert result.copies == 40
    assert result.expected == pytest.approx(3 / (300 * 299 / 2) * 300 * 100)
    verdict = result.verdict()
    assert verdict.level == "warning" and verdict.cause == Cause.HELD_OUT_IN_TRAINING
    assert "40 of 100" in verdict.sentence


def test_rows_of_their_own_are_fine():
    none = diag.held_out_copies(drawn(300, 0), drawn(100, 1)).verdict()
    assert none.level == "ok" and "0 of 100 held-out rows are among 300 training rows." in none.sentence


def test_rows_that_are_equal_by_chance_are_fine():
    # Three answers of yes or no: eight rows, and every held-out row is among the training rows.
    training, others = (drawn(n, n, features=3).sign() for n in (300, 100))
    result = diag.held_out_copies(training, others)
    assert result.copies == 100 and result.verdict().level == "ok"


def test_rows_of_several_tensors_are_told_by_all_of_them():
    first, second = torch.arange(64)[:, None], drawn(64, 0)
    same = diag.held_out_copies({"a": first, "b": second}, {"a": first, "b": second})
    other = diag.held_out_copies({"a": first, "b": second}, {"a": first, "b": drawn(64, 1)})
    assert same.copies == 64 and other.copies == 0


def test_images_in_a_smaller_format_are_the_same_rows():
    images = torch.randint(256, (40, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    assert diag.held_out_copies(images.to(torch.uint8), images.float()).copies == 40


def test_few_rows_and_an_evaluation_of_the_training_data_are_not_judged():
    few = diag.held_out_copies(drawn(300, 0), drawn(8, 1)).verdict()
    assert few.level == "not_applicable" and "fewer than 32 rows of numbers" in few.sentence
    facts = DrawFacts(draws=300, distinct=300, evaluated=(EvaluatedRows(300, 0),))
    copied = diag.held_out_copies(drawn(300, 0), drawn(300, 0), loop=Loop(step=9, drawn=facts))
    assert copied.copies == 300 and copied.verdict().level == "not_applicable"
    assert "as many rows are evaluated as training has" in copied.verdict().sentence


@pytest.mark.parametrize("leaks", [True, False])
def test_a_held_out_set_inside_the_training_set_is_told_while_training(leaks):
    logging.getLogger("diag").setLevel(logging.CRITICAL)
    x, others = drawn(400, 0), drawn(100, 1)
    x = torch.cat([x, others]) if leaks else x
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train, rest = (TensorDataset(rows, rows[:, :3].argmax(1)) for rows in (x, others))
    with diag.watch(model, instruments=["held_out_copies"]) as watcher:
        for _ in range(3):
            for rows, labels in DataLoader(train, 20, shuffle=True):
                optimizer.zero_grad()
                F.cross_entropy(model(rows), labels).backward()
                optimizer.step()
            with torch.no_grad():
                for rows, _ in DataLoader(rest, 50):
                    model(rows)
    logging.getLogger("diag").setLevel(logging.NOTSET)
    assert [f.verdict.cause for f in watcher.findings] == [Cause.HELD_OUT_IN_TRAINING] * leaks
