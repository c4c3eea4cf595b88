"""Labels that look wrong: the margins by hand, and precision on three data sets with a tenth of the labels
moved."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import nn

import diag
from diag.instruments.causes import Cause
from diag.instruments.data.label_audit import LabelAudit, area_under_the_margin
from diag.watching.measure.schedule import next_due


def test_the_margin_is_the_labels_logit_less_the_largest_other():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 3.0, 1.0], [1.0, 1.0, 4.0]])
    result = diag.label_audit(logits, torch.tensor([0, 2, 2]))
    assert result.margins.tolist() == [2.0, -2.0, 3.0] and result.answers.tolist() == [0, 1, 2]
    assert result.accuracy == pytest.approx(2 / 3) and result.verdict().level == "description"


def test_tokens_are_no_rows():
    result = diag.label_audit(torch.randn(12, 3), torch.arange(12) % 3, torch.zeros(4, 3, dtype=torch.long))
    assert result.verdict().level == "not_applicable"


DATA = {"digits": datasets.load_digits, "wine": datasets.load_wine, "breast cancer": datasets.load_breast_cancer}


def course(name, wrong_share, steps=400):
    """(series of audits as a watch makes it, which labels are wrong, the losses at the end)."""
    data = DATA[name]()
    x = torch.tensor(data.data, dtype=torch.float32)
    x, y = (x - x.mean(0)) / x.std(0).clamp_min(1e-3), torch.tensor(data.target)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(x), generator=generator)[: int(wrong_share * len(x))]
    classes = int(y.max()) + 1
    y[rows] = (y[rows] + torch.randint(1, classes, (len(rows),), generator=generator)) % classes
    wrong = torch.zeros(len(x), dtype=torch.bool).index_fill(0, rows, True)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    series, due, step = [], 1, 0
    while step < steps:
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            step += 1
            if step >= due:
                with torch.no_grad():
                    series.append((step, diag.label_audit(model(x), y, x)))
                due = next_due(step, None)
    with torch.no_grad():
        return series, wrong, F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("name", DATA)
def test_a_tenth_of_wrong_labels_is_named_by_row(name):
    series, wrong, losses = course(name, 0.1)
    verdict = LabelAudit.trend(series)
    assert verdict.cause == Cause.LABELS_WRONG
    named = torch.tensor(verdict.examples)
    precision = float(wrong[named].float().mean())
    by_loss = float(wrong[losses.argsort(descending=True)[: len(named)]].float().mean())
    assert precision >= 0.85 and precision >= by_loss
    assert len(named) >= 0.4 * int(wrong.sum())
    shown = list(LabelAudit.trend_examples(series))
    assert [item["row"] for item in shown] == list(verdict.examples[:12])
    assert all("features" in item for item in shown[:3])


@pytest.mark.parametrize("name", DATA)
def test_right_labels_raise_no_warning_at_any_moment(name):
    series, _, _ = course(name, 0.0)
    assert {LabelAudit.trend(series[: k + 1]).level for k in range(len(series))} <= {"ok", "description"}


def test_the_area_is_the_mean_margin_since_most_was_learned():
    def audit(accuracy, margins):
        n = len(margins)
        return LabelAudit(
            accuracy=accuracy, negative=0.0, margins=numpy.array(margins), answers=numpy.zeros(n, numpy.int32),
            labels=numpy.zeros(n, numpy.int32), shown_rows=numpy.zeros(0, numpy.int32), row_inputs=numpy.zeros(0),
        )  # fmt: skip

    series = [(1, audit(0.2, [9.0, 9.0])), (2, audit(0.7, [1.0, -2.0])), (3, audit(0.9, [3.0, -1.0]))]
    area, median, counted = area_under_the_margin(series)
    assert area.tolist() == [2.0, -1.5] and (median, counted) == (2.0, 2)
    late = [(1, audit(0.7, [-1.0, -1.0])), *series[1:]]  # the others are not known at the first
    area, median, counted = area_under_the_margin([*late, (4, audit(0.9, [5.0, -3.0]))])
    assert area.tolist() == [3.0, -2.0] and (median, counted) == (3.0, 3)
