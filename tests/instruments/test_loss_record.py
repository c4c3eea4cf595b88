"""The record of losses at consecutive steps, and the edge of stability at its ends, against closed forms."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.errors import InvalidInput, MissingQuantity
from diag.instruments.opposing_signals.loss_record import Edge, LossRecord, Recording, edge_of
from diag.testing import leaves_no_trace, planted_spectrum

AT_EDGE = Edge(10.0, 10.0, "2 / learning rate")


def test_the_edge_of_a_quadratic():
    """H has eigenvalues 7, 2, 1; momentum 0.5 at learning rate 0.1 is stable up to (2 + 1) / 0.1 = 30."""
    model, loss_fn, data = planted_spectrum([7.0, 2.0, 1.0])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    edge = edge_of(diag.Snapshot(model, loss_fn, data, optimizer=optimizer))
    assert edge.sharpness == pytest.approx(7.0, rel=1e-3)  # Lanczos stops at a residual of 1 %
    assert edge.threshold == pytest.approx(30.0) and edge.ratio == pytest.approx(7 / 30, rel=1e-3)
    unknown = edge_of(diag.Snapshot(model, loss_fn, data))
    assert math.isnan(unknown.ratio) and unknown.unknown == "the optimizer is not known"


class Quartic(nn.Module):
    """Loss w^4 / 12, so that H = w^2: across the valley it vanishes halfway and nowhere else."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))

    def forward(self, x):
        return (self.w**4 / 12).expand(len(x))


def test_the_ends_are_measured_halfway_between_iterates():
    model = Quartic()
    data = torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)

    def snapshot():
        return diag.Snapshot(model, lambda outputs, targets: outputs.mean(), data)

    def move(value):
        with torch.no_grad():
            model.w.fill_(value)

    recording = Recording(snapshot(), 10)
    for step, value in enumerate((4.0, 6.0, 5.0, 3.0), 11):
        move(value)
        memory, version = model.w.data_ptr(), model.w._version
        recording.add(snapshot(), step)
        assert (model.w.data_ptr(), model.w._version, model.w.item()) == (memory, version, value)
    with leaves_no_trace(model):
        record = recording.finish(snapshot())
    assert record.first.sharpness == pytest.approx(3.0**2)  # between 2 and 4
    assert record.last.sharpness == pytest.approx(4.0**2)  # between 5 and 3
    assert record.steps == (10, 11, 12, 13, 14)
    expected = torch.tensor([2.0, 4.0, 6.0, 5.0, 3.0], dtype=torch.float64) ** 4 / 12
    torch.testing.assert_close(record.losses, expected[:, None].expand(5, 3))
    move(2.5)
    with pytest.raises(InvalidInput, match="parameters have changed since the last recorded step"):
        recording.finish(snapshot())


def test_an_error_on_the_way_leaves_the_parameters(monkeypatch):
    model = nn.Linear(2, 2)
    kept = [p.detach().clone() for p in model.parameters()]
    snapshot = diag.Snapshot(model, F.cross_entropy, (torch.randn(6, 2), torch.arange(6) % 2))
    recording = Recording(snapshot, 0)

    def broken(snapshot):
        raise RuntimeError("a stone in the shoe")

    monkeypatch.setattr("diag.instruments.opposing_signals.loss_record.edge_of", broken)
    with pytest.raises(RuntimeError, match="a stone"):
        recording.add(snapshot, 1)
    assert all(torch.equal(p, k) for p, k in zip(model.parameters(), kept, strict=True))


def record(**changes):
    return LossRecord(torch.rand(6, 4), **{"first": AT_EDGE, "last": AT_EDGE} | changes)


def unmet(**changes):
    return [p.name for p in record(**changes).preconditions() if not p.holds]


def test_preconditions():
    assert unmet() == []
    assert unmet(last=Edge(9.0, 10.0)) == ["the edge of stability"] == unmet(first=Edge(16.0, 10.0))
    assert unmet(loss_scale=0.5) == ["the edge of stability"]
    assert unmet(first=Edge(20.0, 10.0), last=Edge(20.0, 10.0), loss_scale=0.5) == []
    assert unmet(same_examples=False) == ["the same examples at every step"]
    assert (
        unmet(last=Edge(9.0, unknown="no rule")) == ["a known threshold of stability"] == unmet(loss_scale=math.nan)
    )


def test_refusals():
    with pytest.raises(
        InvalidInput, match=r"has the shape \(4, 3\); expected \(T \+ 1, n\), floating, with at least"
    ):
        LossRecord(torch.rand(4, 3), AT_EDGE, AT_EDGE)
    with pytest.raises(InvalidInput, match="is not finite"):
        LossRecord(torch.full((6, 3), math.inf), AT_EDGE, AT_EDGE)
    with pytest.raises(InvalidInput, match="6 rows of losses and 2 steps"):
        LossRecord(torch.rand(6, 3), AT_EDGE, AT_EDGE, steps=(1, 2))
    model, loss_fn, data = planted_spectrum([2.0, 1.0])
    with pytest.raises(MissingQuantity, match=r"measure inside diag.watch, or pass loss_record="):
        diag.Snapshot(model, loss_fn, data).quantity("loss_record")


def problem(n=60):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return diag.Snapshot(model, F.cross_entropy, (torch.randn(n, 5), torch.arange(n) % 3))


def swapping(n=60, k=10):
    change = torch.zeros(8, n)
    change[::2, :k], change[1::2, :k] = 1.0, -1.0
    change[::2, k : 2 * k], change[1::2, k : 2 * k] = -1.0, 1.0
    return torch.cat([torch.zeros(1, n), change.cumsum(0)]) + 2.0


def test_a_record_with_a_model_at_hand():
    """The groups are the record's, and the model tells their gradients and curvature."""
    given = LossRecord(swapping(), AT_EDGE, AT_EDGE)
    result = diag.opposing_signals(problem(), loss_record=given)
    assert result.mode == "online" and result.swap == 1.0
    assert set(result.group_a) | set(result.group_b) == set(range(20))
    assert 0 < result.curvature_share < 1 and result.null_share > 0 and abs(result.cosine) <= 1
    assert result.cosines.shape == (20, 20) and not math.isnan(result.norm_auc)
    static = diag.opposing_signals(problem(), loss_record=given, mode="static")
    assert static.mode == "static" and static.notes == ()


def test_records_that_do_not_fit():
    given = LossRecord(swapping(50), AT_EDGE, AT_EDGE)
    with pytest.raises(InvalidInput, match="record is of 50 examples and the data of 60"):
        diag.opposing_signals(problem(), loss_record=given)
    with pytest.raises(MissingQuantity, match="loss_record is missing, which mode='online' judges"):
        diag.opposing_signals(problem(), mode="online")
    with pytest.raises(InvalidInput, match="window is 3; expected at least 4 steps, or 0"):
        diag.opposing_signals(problem(), window=3)
