"""Held-out data: rows that the loop evaluates on serve as such, and what is said of them."""

import logging
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import diag
from diag.instruments.causes import Cause
from diag.instruments.outcome.generalization import Generalization
from diag.snapshot.loop.data import LossFacts
from diag.snapshot.loop.facts import Loop
from diag.watching.observe.loop.data.evaluated import place_of

WATCHED = ["generalization", "held_out_inputs_alike", "labels_belong"]
SQUARES = Loop(step=9, losses=(LossFacts("mse_loss", reduction="mean", root=True, factor=1.0),))


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("diag").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("diag").setLevel(logging.NOTSET)


def sets(targets, n=320):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator)
    y = targets(x, generator)
    return TensorDataset(x[:256], y[:256]), TensorDataset(x[256:], y[256:])


def classes(x, generator):
    return x[:, :3].argmax(1)


def watched(train, rest, loss=F.cross_entropy, outputs=3, epochs=10, prepare=lambda x: x, **given):
    """The run of a training that is evaluated after each epoch; how fast the machine is changes nothing of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, outputs))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with diag.watch(model, instruments=WATCHED, budget=math.inf, **given) as watcher:
            for _ in range(epochs):
                for x, y in DataLoader(train, 16, shuffle=True):
                    optimizer.zero_grad()
                    loss(model(x), y).backward()
                    optimizer.step()
                with torch.no_grad():
                    for x, _ in DataLoader(rest, 16):
                        model(prepare(x))
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return watcher.run


def causes(run):
    return {f.verdict.cause for f in run.findings() if f.verdict.cause}


def told_first(run):
    """The causes that the stories begin with."""
    return [story.finding.verdict.cause for story in run.stories()]


def test_evaluated_rows_are_measured_as_held_out_data():
    run = watched(*sets(classes))
    _, last = run.series("generalization")[-1]
    assert last.held_out_examples == 64
    assert last.held_out_accuracy > 0.8
    assert any("64 rows that the loop evaluates on" in e.text for e in run.events)
    assert not causes(run)


def test_what_the_user_gives_comes_first():
    train, held_out = sets(classes)
    x, y = held_out.tensors
    run = watched(train, held_out, held_out=(x[:40], y[:40]))
    assert run.series("generalization")[-1][1].held_out_examples == 40


def test_rows_of_the_training_set_are_no_held_out_data():
    train, _ = sets(classes)
    run = watched(train, train)
    assert not run.series("generalization")
    assert any(skipped.instrument == "generalization" for _, skipped in run.outcomes)


def test_targets_that_are_changed_on_the_way_are_not_looked_for_elsewhere():
    run = watched(*sets(classes), loss=lambda z, y: F.cross_entropy(z, (y + 1) % 3))
    assert not run.series("generalization")


def test_shuffled_labels_carry_nothing_over():
    shuffled = sets(lambda x, g: torch.randint(3, (len(x),), generator=g), n=512)
    assert told_first(watched(*shuffled)) == [Cause.LABELS_SHUFFLED]


def test_shuffled_targets_carry_nothing_over():
    shuffled = sets(lambda x, g: torch.randn(len(x), 1, generator=g))
    run = watched(*shuffled, loss=F.mse_loss, outputs=1, epochs=20)
    assert told_first(run) == [Cause.LABELS_SHUFFLED]
    outcome = next(f for f in run.findings() if f.instrument == "generalization")
    assert outcome.verdict.cause == Cause.WORSE_THAN_TRIVIAL and "mean of the targets" in outcome.verdict.sentence


def test_targets_that_follow_from_the_inputs_do():
    run = watched(*sets(lambda x, g: x[:, :1] - x[:, 1:2]), loss=F.mse_loss, outputs=1)
    assert not causes(run)
    _, last = run.series("generalization")[-1]
    assert last.held_out_gain > 4 * last.held_out_gain_standard_error


def test_held_out_inputs_that_are_not_normalised():
    assert Cause.HELD_OUT_DIFFERS in causes(watched(*sets(classes), prepare=lambda x: 4 * x + 3))


def result(step, **fields):
    usual = {
        "loss": 1.0, "held_out_loss": 1.0, "held_out_loss_standard_error": 0.01, "accuracy": 0.5,
        "held_out_accuracy": 0.5, "held_out_chance": 0.1, "held_out_examples": 400, "gain": 1.0,
        "gain_standard_error": 0.02, "held_out_gain": 1.0, "held_out_gain_standard_error": 0.02,
    }  # fmt: skip
    return step, Generalization(**usual | fields)


def test_training_and_held_out_data_part():
    course = [
        result(10),
        result(30, loss=0.4, accuracy=0.9, held_out_loss=0.9, held_out_accuracy=0.64),
        result(100, loss=0.01, accuracy=1.0, held_out_loss=1.4, held_out_accuracy=0.63),
    ]
    verdict = Generalization.trend(course)
    assert verdict.cause == Cause.OVERFITTING
    assert "from 0.9 at step 30 to 1.4" in verdict.sentence
    sure = [*course[:2], result(100, loss=0.01, accuracy=1.0, held_out_loss=1.4, held_out_accuracy=0.93)]
    assert Generalization.trend(sure).level == diag.Level.OK  # surer of what it gets wrong, and right as often


def standing(**last):
    """A course whose training loss fell by half and more since its first half, ending with `last`."""
    half = {k: v for k, v in last.items() if k in ("held_out_loss", "held_out_accuracy")}
    if "accuracy" in last and math.isnan(last["accuracy"]):
        half["accuracy"] = math.nan
    return [result(10), result(100, loss=0.2, **half), result(400, loss=0.01, **last)]


NUMBERS = {"accuracy": math.nan, "held_out_accuracy": math.nan, "gain": 0.99}


HEART = {"accuracy": 1.0, "held_out_accuracy": 0.64}


@pytest.mark.parametrize("last", [HEART, {"held_out_loss": 0.7, **NUMBERS}], ids=["classes", "numbers"])
def test_what_is_known_by_heart_and_carries_no_further(last):
    """By a quarter of the examples, and of the loss of one that answers with the mean, which is 1 here."""
    verdict = Generalization.trend(standing(**last))
    assert verdict.cause == Cause.OVERFITTING and verdict.step == 100
    assert "Nothing more carries over" in verdict.sentence


def test_smoothed_labels_are_known_by_heart_at_a_loss_that_does_not_vanish():
    course = [
        *standing(**HEART)[:1],
        result(100, **HEART | {"loss": 0.9, "accuracy": 0.8}),
        result(400, **HEART, loss=0.6),
    ]
    assert Generalization.trend(course).cause == Cause.OVERFITTING


@pytest.mark.parametrize(
    "course",
    [
        standing(**HEART | {"held_out_accuracy": 0.76}),  # less than a quarter apart
        standing(**HEART | {"accuracy": 0.97}),  # not by heart
        # the training loss hardly fell, and no more training examples are right
        [result(10), result(100, **HEART | {"loss": 0.2}), result(400, **HEART | {"loss": 0.12})],
        [*standing(**HEART)[:2], result(400, **HEART | {"loss": 0.01, "held_out_accuracy": 0.68})],  # more came
        standing(held_out_loss=0.25, **NUMBERS),
        standing(held_out_loss=0.7, **NUMBERS | {"gain": math.nan}),  # of another loss nothing is known
    ],
)
def test_what_still_carries_over_or_is_not_far_apart_is_quiet(course):
    assert Generalization.trend(course).level == diag.Level.OK


def test_the_gain_over_an_answer_without_inputs():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]).double()
    labels = torch.tensor([0, 1, 1])
    losses = F.cross_entropy(logits, labels, reduction="none")
    found = diag.generalization(losses, losses, logits, labels, logits, labels)
    shares = torch.tensor([2 / 5, 3 / 5]).double()  # one more of each than was counted
    assert found.gain == pytest.approx(float((-shares.log()[labels] - losses).mean()))
    targets = torch.tensor([1.0, 2.0, 6.0])
    squares = torch.tensor([0.5, 0.5, 0.5])
    told = {"losses": squares, "held_out_losses": squares, "targets": targets, "held_out_targets": targets + 1}
    found = diag.generalization(**told, loop=SQUARES)
    assert found.gain == pytest.approx((4 + 1 + 9) / 3 - 0.5)
    assert found.held_out_gain == pytest.approx((1 + 0 + 16) / 3 - 0.5)  # from the mean of the training targets
    other = diag.generalization(**told, loop=Loop(step=9, losses=(LossFacts("l1_loss", root=True),)))
    assert other.gain != other.gain  # of another loss it is not known


def inputs(mean, deviation, n=400):
    return mean + deviation * torch.randn(n, 5, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(("mean", "deviation", "differs"), [(0, 1.5, False), (0.13, 0.31, True), (3, 1, True)])
def test_scale_and_mean_of_held_out_inputs(mean, deviation, differs):
    verdict = diag.held_out_inputs_alike(inputs(0, 1), inputs(mean, deviation)).verdict()
    assert (verdict.cause == Cause.HELD_OUT_DIFFERS) == differs


def test_a_few_corrupt_rows_are_not_how_inputs_are_prepared():
    ours = inputs(0, 1)
    ours[[3, 50]] *= 1e5
    assert diag.held_out_inputs_alike(ours, inputs(0, 1)).verdict().level == diag.Level.OK


@pytest.mark.parametrize("theirs", [torch.zeros(400, 5, dtype=torch.long), inputs(0, 1)[:, :3], inputs(0, 1)[:8]])
def test_inputs_that_cannot_be_compared(theirs):
    assert diag.held_out_inputs_alike(inputs(0, 1), theirs).verdict().level == diag.Level.NOT_APPLICABLE


def test_the_place_of_the_targets_in_a_batch():
    x, y, z = torch.randn(8, 3), torch.arange(8), torch.arange(8) + 1
    assert place_of(y, [x, y, z]) == 1
    assert place_of(z.clone(), [x, y, z]) == 2
    assert place_of(y + 5, [x, y, z]) is None
    assert place_of(y.clone(), [x, y, y.clone()]) is None


def test_answering_with_the_commonest_class_of_unequal_training_classes_is_not_learned_by_heart():
    course = [result(10**i, accuracy=0.97, held_out_accuracy=0.1, chance=0.95, gain=-1.0) for i in range(3)]
    assert Generalization.trend(course).cause != Cause.WORSE_THAN_TRIVIAL
    equal = [result(10**i, accuracy=0.97, held_out_accuracy=0.1, chance=0.1, gain=-1.0) for i in range(3)]
    assert Generalization.trend(equal).cause == Cause.WORSE_THAN_TRIVIAL
