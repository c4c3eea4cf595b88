"""Targets beside the inputs, the range of the outputs, the best constant answer: told, quiet, refused."""

import logging
import math
import warnings
from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diag
from diag.instruments.causes import Cause
from diag.instruments.loss.output_range import lowest_loss
from diag.snapshot.loop.asked import AskedFacts
from diag.watching.observe.loop.data.asked import affine_features, uncounted
from diag.watching.observe.loop.data.bounds import bounded_by

WATCHED = ["target_values", "output_range", "constant_answer"]


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("diag").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("diag").setLevel(logging.NOTSET)


def table(n=240, features=6, seed=0):
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed))


def told(x, y, loss, end=None, out=1, epochs=2, lr=0.05, size=24):
    """{cause: verdict} of a small network trained on (x, y)."""
    torch.manual_seed(0)
    last = [] if end is None else [end]
    model = nn.Sequential(nn.Linear(x.shape[1], 12), nn.Tanh(), nn.Linear(12, out), *last)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with diag.watch(model, instruments=WATCHED) as watcher:
            for _ in range(epochs):
                for a, b in DataLoader(TensorDataset(x, y), size, shuffle=True):
                    optimizer.zero_grad()
                    z = model(a)
                    loss(z.squeeze(1) if out == 1 else z, b).backward()
                    optimizer.step()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return {f.verdict.cause: f.verdict for f in watcher.run.findings() if f.verdict.cause}, watcher.run


def last(run, name):
    return run.series(name)[-1][1]


# The target is in the input


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss])
def test_a_target_that_is_a_feature_in_other_units_is_told_with_the_feature(loss):
    x = table()
    found, _ = told(x, 3.0 * x[:, 4] - 1.0, loss)
    verdict = found[Cause.ANSWER_IN_INPUT]
    assert verdict.level == "warning" and "feature 4 " in verdict.sentence


def test_an_indicator_of_one_class_among_the_features_is_told():
    x = table()
    y = x[:, :3].argmax(1)
    x[:, 5] = (y == 2).float() * 7 - 3
    found, _ = told(x, y, F.cross_entropy, out=3)
    assert "feature 5 " in found[Cause.ANSWER_IN_INPUT].sentence


def test_a_feature_that_nearly_gives_the_target_is_not_told():
    x = table()
    found, _ = told(x, x[:, 4] + 0.02 * table(seed=1)[:, 0], F.mse_loss)  # a correlation of .9998
    assert Cause.ANSWER_IN_INPUT not in found
    x, y = table(), (table()[:, 1] > 0).float()
    found, _ = told(x, y, F.binary_cross_entropy_with_logits)  # the sign of a feature is not the feature
    assert Cause.ANSWER_IN_INPUT not in found


def test_one_feature_alone_may_be_a_straight_line():
    x = table(features=1)
    found, _ = told(x, 2 * x[:, 0] + 1, F.mse_loss)
    assert Cause.ANSWER_IN_INPUT not in found


def test_copies_against_a_dense_correlation():
    x = table(64, 9).double()
    y = x[:, 2] * -4 + 9
    dense = numpy.corrcoef(numpy.concatenate([x.numpy(), y.numpy()[:, None]], 1).T)[-1, :-1]
    assert affine_features(x, y).tolist() == numpy.flatnonzero(abs(dense) > 1 - 1e-6).tolist() == [2]
    x[:, 3] = 5.0  # a constant feature gives nothing away
    assert affine_features(x, torch.ones(64)).tolist() == []


@pytest.mark.parametrize("rows", [1, 3])
def test_a_class_of_one_row_follows_from_no_feature(rows):
    """As the rows' own numbers, which a contrastive loss asks for: some rare feature is of one row alone."""
    x, y = torch.zeros(48, 200, dtype=torch.float64), torch.arange(48) // rows
    x[:rows, 7] = 1.0
    assert affine_features(x, y).tolist() == ([] if rows == 1 else [7])


def test_the_class_that_is_ignored_may_weigh_nothing():
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0])
    assert uncounted(weights, 0) == (2,) and uncounted(weights, -100) == (0, 2) and uncounted(None, 0) == ()


# All targets alike, two classes very unequal


def test_targets_that_are_all_alike_are_told_and_differing_ones_are_not():
    found, _ = told(table(), torch.ones(240), F.binary_cross_entropy_with_logits)
    assert found[Cause.TARGETS_ALL_EQUAL].level == "alarm"
    found, _ = told(table(), (table()[:, 0] > 0).float(), F.binary_cross_entropy_with_logits)
    assert not {Cause.TARGETS_ALL_EQUAL, Cause.CLASS_IMBALANCE} & set(found)


def test_targets_that_the_loop_makes_itself_are_not_judged():
    """A generator is trained towards ones."""
    found, _ = told(table(), table()[:, 0], lambda z, b: F.binary_cross_entropy_with_logits(z, torch.ones_like(z)))
    assert Cause.TARGETS_ALL_EQUAL not in found


def test_a_binary_target_with_few_ones_is_told():
    y = torch.zeros(240)
    y[::40] = 1  # 6 of 240: 234 / (6 + sqrt(6)) = 27.7 at least
    found, _ = told(table(), y, F.binary_cross_entropy_with_logits, epochs=6)
    assert found[Cause.CLASS_IMBALANCE].level == "warning"


# The range of the outputs


def test_a_tanh_before_larger_targets_is_told():
    found, _ = told(table(), 5 * table()[:, 0] + 9, F.mse_loss, end=nn.Tanh())
    verdict = found[Cause.OUTPUT_RANGE]
    assert verdict.level == "alarm" and "between -1 and 1" in verdict.sentence


class Times(nn.Module):
    """A tanh times a number."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x.tanh()


def test_a_tanh_times_a_number_is_told_where_the_targets_lie_beyond_that():
    found, _ = told(table(), table()[:, 0], F.mse_loss, end=Times(0.1))
    assert "ends in tanh times 0.1, which keeps its outputs between -0.1 and 0.1" in (
        found[Cause.OUTPUT_RANGE].sentence
    )
    for end, y in ((Times(9), 2 * table()[:, 0]), (Times(-9), 2 * table()[:, 0])):
        assert Cause.OUTPUT_RANGE not in told(table(), y, F.mse_loss, end=end)[0]
    capped, _ = told(table(), table()[:, :3].argmax(1), F.cross_entropy, end=Times(30), out=3)
    assert Cause.OUTPUT_RANGE not in capped


@pytest.mark.parametrize(
    ("loss", "end", "out", "level"),
    [
        (F.cross_entropy, nn.ReLU(), 3, "warning"),
        (F.cross_entropy, nn.Tanh(), 3, "alarm"),
        (F.binary_cross_entropy_with_logits, nn.ReLU(), 1, "alarm"),
        (F.binary_cross_entropy_with_logits, nn.Hardtanh(), 1, "alarm"),
    ],
)
def test_logits_that_an_activation_bounds_are_told(loss, end, out, level):
    x = table()
    y = x[:, :3].argmax(1) if out == 3 else (x[:, 0] > 0).float()
    found, _ = told(x, y, loss, end=end, out=out)
    assert found[Cause.OUTPUT_RANGE].level == level


@pytest.mark.parametrize("width", [1.0, 3.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_the_least_loss_of_bounded_logits_is_what_they_can_reach(width, classes):
    facts = AskedFacts("cross_entropy", lower=-width, upper=width, outputs_a_row=classes)
    best = torch.full((1, classes), -width, dtype=torch.float64)
    best[0, 0] = width
    assert lowest_loss(facts) == pytest.approx(float(F.cross_entropy(best, torch.tensor([0]))), rel=1e-12)
    facts = AskedFacts("binary_cross_entropy_with_logits", lower=-width, upper=width)
    least = F.binary_cross_entropy_with_logits(
        torch.tensor(width, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    )
    assert lowest_loss(facts) == pytest.approx(float(least), rel=1e-12)


def test_a_clamp_makes_no_probabilities_and_a_sigmoid_before_it_does():
    y = (table()[:, 0] > 0).float()
    found, _ = told(table(), y, lambda z, b: F.binary_cross_entropy(z.clamp(0, 1), b))
    assert Cause.LOGITS_INTO_PROBABILITY_LOSS in found
    found, _ = told(table(), y, lambda z, b: F.binary_cross_entropy(z.sigmoid().clamp(1e-6, 1 - 1e-6), b))
    assert Cause.LOGITS_INTO_PROBABILITY_LOSS not in found


def test_outputs_that_reach_their_targets_are_fine():
    for end, y in ((nn.Tanh(), table()[:, 0].tanh()), (nn.ReLU(), table()[:, 0].abs()), (None, table()[:, 0] * 9)):
        found, _ = told(table(), y, F.mse_loss, end=end)
        assert Cause.OUTPUT_RANGE not in found
    z = torch.randn(4, 3, requires_grad=True)
    assert bounded_by(30 * torch.tanh(z / 30)) == ("tanh times 30", -30.0, 30.0)  # soft capping
    assert bounded_by(-(z.relu() / 2)) == ("relu times -0.5", -math.inf, -0.0)
    for unknown in (torch.tanh(z) + 5, 2 / torch.sigmoid(z), torch.tanh(z) * z, torch.tanh(z) * torch.rand(4, 3)):
        assert bounded_by(unknown)[0] == ""
    assert bounded_by(torch.tanh(z).reshape(2, 6)) == ("tanh", -1.0, 1.0)


# The best constant answer


@pytest.mark.parametrize("kind", ["classes", "binary", "numbers", "absolute", "dense"])
def test_training_that_learns_nothing_from_its_inputs_is_told_and_one_that_learns_is_not(kind):
    x, noise = table(1920), table(1920, seed=7)
    by = {
        "classes": (F.cross_entropy, lambda s: s[:, :3].argmax(1), 3),
        "binary": (F.binary_cross_entropy_with_logits, lambda s: (s[:, 0] > 0.5).float(), 1),
        "numbers": (F.mse_loss, lambda s: s[:, 0] + s[:, 1], 1),
        "absolute": (F.l1_loss, lambda s: s[:, 0] + s[:, 1], 1),
        "dense": (F.binary_cross_entropy_with_logits, lambda s: (s[:, :5] > 0.3).float(), 5),
    }
    loss, target, out = by[kind]
    found, run = told(x, target(noise), loss, out=out, epochs=7, size=96)
    assert Cause.WORSE_THAN_TRIVIAL in found, last(run, "constant_answer")
    found, run = told(x, target(x), loss, out=out, epochs=7, size=96)
    assert Cause.WORSE_THAN_TRIVIAL not in found
    result = last(run, "constant_answer")
    y = target(x).double()
    shares = [float((y == v).double().mean()) for v in y.unique()] if kind in ("classes", "binary", "dense") else []
    exact = {
        "numbers": float(y.var()) if not shares else 0,
        "absolute": float((y - y.median()).abs().mean()) if not shares else 0,
    }.get(kind, -sum(s * math.log(s) for s in shares))
    # Read from a part of the targets: within five of its own standard errors of that of all of them.
    assert abs(result.constant_loss - exact) <= 5 * result.constant_error + 1e-6


@pytest.mark.parametrize("change", ["two terms", "weighted", "summed", "smoothed"])
def test_a_loss_that_is_not_the_plain_mean_is_not_judged(change):
    x = table()
    losses = {
        "two terms": lambda z, b: F.cross_entropy(z, b) + z.square().mean(),
        "weighted": lambda z, b: F.cross_entropy(z, b, weight=torch.tensor([1.0, 2.0, 3.0])),
        "summed": lambda z, b: F.cross_entropy(z, b, reduction="sum"),
        "smoothed": lambda z, b: F.cross_entropy(z, b, label_smoothing=0.1),
    }
    found, run = told(x, torch.arange(240) % 3, losses[change], out=3, epochs=11, lr=0.01)
    assert Cause.WORSE_THAN_TRIVIAL not in found
    assert last(run, "constant_answer").verdict().level == "not_applicable"


# Logits that dropout zeroes, classes that do not count


def test_dropout_on_the_logits_is_told_and_dropout_before_the_last_layer_is_not():
    x = table()
    found, _ = told(x, x[:, :3].argmax(1), F.cross_entropy, end=nn.Dropout(0.5), out=3)
    assert found[Cause.OUTPUT_RANGE].level == "warning" and "zero" in found[Cause.OUTPUT_RANGE].sentence
    found, _ = told(x, x[:, :3].argmax(1), F.cross_entropy, out=3)
    assert Cause.OUTPUT_RANGE not in found


def test_a_class_with_a_weight_of_zero_is_told():
    x = table()
    for weights, told_of in (([1.0, 0.0, 1.0], True), ([1.0, 0.1, 1.0], False)):
        found, _ = told(x, x[:, :3].argmax(1), partial(F.cross_entropy, weight=torch.tensor(weights)), out=3)
        assert (Cause.CLASS_MISSING in found) is told_of
