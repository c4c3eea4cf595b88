"""Checks of the data, of the first loss and of the outcome: values by hand, and the verdict of a course."""

import dataclasses
import math

import numpy
import pytest
import torch
import torch.nn.functional as F

import diag
from diag.instruments.causes import Cause
from diag.instruments.outcome.generalization import Generalization
from diag.instruments.outcome.trivial import TrivialPredictor
from diag.snapshot.history import empty_history
from diag.snapshot.loop.data import LossFacts
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import OptimizerFacts


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return torch.randn(200, 12)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda x: x, ""),
        (lambda x: 128 + 70 * x, Cause.INPUTS_NOT_NORMALIZED),
        (lambda x: x * torch.tensor([1000.0] + [1.0] * 11), Cause.INPUTS_NOT_NORMALIZED),
        (lambda x: x / 255, Cause.INPUTS_TOO_SMALL),
        (lambda x: x[:1].expand_as(x), Cause.INPUTS_CONSTANT),
        (lambda x: torch.cat([x[:, :3], torch.ones(200, 9)], 1), Cause.INPUTS_CONSTANT),
        (lambda x: x.index_fill(0, torch.tensor([7]), math.nan), Cause.DATA_NOT_FINITE),
        (lambda x: x.index_fill(0, torch.tensor([7, 90]), 1e4), Cause.BATCHES_POISONED),
        (lambda x: torch.cat([x[:140], 1e4 * x[140:]]), Cause.BATCHES_POISONED),  # a batch that one row has spoiled
        (lambda x: x * torch.linspace(0, 13, 200).exp()[:, None], Cause.INPUTS_NOT_NORMALIZED),  # a heavy tail
        (lambda x: x.clamp_min(0), ""),  # images: much of them is zero
    ],
)
def test_the_scale_of_inputs(rows, change, cause):
    verdict = diag.input_scale(inputs=change(rows)).verdict()
    assert verdict.cause == cause and (verdict.level == "ok") == (cause == "")


def test_the_numbers_of_the_inputs(rows):
    result = diag.input_scale(inputs=3 + 2 * rows)
    assert result.mean == pytest.approx(float((3 + 2 * rows.double()).mean()))
    assert result.std == pytest.approx(float((2 * rows.double()).std(correction=0)))
    assert result.examples == 200 and result.constant == 0.0


def test_token_numbers_have_no_scale():
    assert diag.input_scale(inputs=torch.randint(0, 9, (50, 4))).verdict().level == "not_applicable"


def test_of_several_inputs_the_rows_of_numbers_are_judged(rows):
    tokens, far = torch.randint(0, 9, (200, 4)), 1e6 * (5 + rows)
    assert diag.input_scale(inputs=(tokens, far)).verdict().cause == Cause.INPUTS_NOT_NORMALIZED
    assert diag.input_scale(inputs={"a": tokens, "b": rows}).verdict().level == "ok"
    times = 500 * torch.ones(200, 1)  # of a diffusion: one number beside the rows
    assert diag.input_scale(inputs=(rows, times)).verdict().level == "ok"
    assert diag.input_scale(inputs=(tokens, tokens)).verdict().level == "not_applicable"


def test_classes_that_are_missing_or_rare():
    logits = torch.zeros(200, 4)
    even = torch.arange(200) % 4
    assert diag.class_counts(logits=logits, labels=even, inputs=logits).verdict().level == "ok"
    absent = torch.where(even == 3, 0, even)
    verdict = diag.class_counts(logits=logits, labels=absent, inputs=logits).verdict()
    assert verdict.cause == Cause.CLASS_MISSING and "3" in verdict.sentence
    rare = torch.cat([torch.full((197,), 1), torch.tensor([0, 2, 3])])
    assert diag.class_counts(logits=logits, labels=rare, inputs=logits).verdict().cause == Cause.CLASS_IMBALANCE
    few = diag.class_counts(logits=logits[:40], labels=absent[:40], inputs=logits[:40])
    assert few.verdict().level == "not_applicable"
    tokens = diag.class_counts(logits=logits, labels=rare, inputs=logits[:20])  # ten labels an example
    assert tokens.verdict().level == "not_applicable"


@pytest.mark.parametrize(("first", "cause"), [(2.4, ""), (3.2, ""), (9.0, Cause.INITIAL_LOSS_HIGH)])
def test_the_first_loss_beside_guessing_evenly(first, cause):
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 10), torch.randint(0, 10, (50,))
    history = dataclasses.replace(empty_history({"w": 4}, 3), loss=numpy.array([first, 2.0, 2.0]))
    given = {"logits": logits, "labels": labels, "losses": F.cross_entropy(logits, labels, reduction="none")}
    result = diag.initial_loss(history=history, **given)
    assert result.verdict().cause == cause and result.even == pytest.approx(math.log(10))
    other = diag.initial_loss(history=history, **given | {"losses": given["losses"] * 2})
    assert other.verdict().level == "not_applicable"
    summed = Loop(step=3, losses=(LossFacts("cross_entropy", reduction="sum"),))
    assert diag.initial_loss(history=history, loop=summed, **given).verdict().level == "not_applicable"
    steps = (OptimizerFacts("SGD", held=("w",), steps=3, passes=4),)
    losses = [(LossFacts("cross_entropy", factor=f),) for f in (1, 0.25)]
    added, divided = (Loop(step=3, optimizers=steps, losses=kind) for kind in losses)
    assert diag.initial_loss(history=history, loop=added, **given).verdict().level == "not_applicable"
    assert diag.initial_loss(history=history, loop=divided, **given).verdict().cause == cause


def predictor(loss):
    return TrivialPredictor(loss=loss, loss_standard_error=0.01, entropy=math.log(4), classes=4, examples=400)


def test_no_better_than_the_class_frequencies():
    torch.manual_seed(0)
    labels = torch.arange(400) % 4
    losses = torch.full((400,), math.log(4))
    result = diag.trivial_predictor(logits=torch.zeros(400, 4), labels=labels, losses=losses)
    assert result.loss == pytest.approx(result.entropy) == pytest.approx(math.log(4))
    flat = [(s, predictor(1.39)) for s in (1, 10, 30, 100)]
    verdict = TrivialPredictor.trend(flat)
    assert verdict.level == "warning" and verdict.cause == Cause.WORSE_THAN_TRIVIAL
    assert {Cause.LEARNING_RATE_TOO_LOW, Cause.LABELS_SHUFFLED} <= set(verdict.explained_by)
    assert Cause.WORSE_THAN_TRIVIAL not in verdict.explained_by
    assert TrivialPredictor.trend(flat[:3]).level == "unknown"
    assert TrivialPredictor.trend([*flat[:2], (30, predictor(1.2)), (100, predictor(1.5))]).level == "unknown"
    assert TrivialPredictor.trend([*flat, (300, predictor(0.9))]).level == "ok"


def outcome(loss, held_out_loss, accuracy=math.nan, held_out_accuracy=math.nan, n=256):
    return Generalization(
        loss=loss, held_out_loss=held_out_loss, held_out_loss_standard_error=0.02, accuracy=accuracy,
        held_out_accuracy=held_out_accuracy, held_out_chance=0.1, held_out_examples=n,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("course", "level"),
    [
        # the share of right answers falls by .15, three standard errors being .09 at n = 256
        ([outcome(2.3, 2.3, 0.1, 0.1), outcome(0.5, 0.5, 0.9, 0.95), outcome(0.01, 0.9, 1.0, 0.8)], "warning"),
        # the held-out loss grows with the certainty, and as many answers are right
        ([outcome(2.3, 2.3, 0.1, 0.1), outcome(0.5, 0.5, 0.9, 0.95), outcome(0.01, 0.9, 1.0, 0.94)], "ok"),
        ([outcome(1.0, 1.0), outcome(0.5, 0.6), outcome(0.1, 0.9)], "warning"),
        ([outcome(1.0, 1.0), outcome(0.5, 0.6), outcome(0.1, 0.62)], "ok"),
        # both get worse: that is no overfitting
        ([outcome(1.0, 1.0), outcome(0.5, 0.6), outcome(2.0, 2.1)], "ok"),
        ([outcome(0.5, 0.6), outcome(0.1, 0.9)], "ok"),  # too early to speak of a course
    ],
)
def test_the_best_step_is_past(course, level):
    verdict = Generalization.trend([(10**i, r) for i, r in enumerate(course)])
    assert verdict.level == level
    assert verdict.step == (10 if level == "warning" else None)


def test_what_is_learned_by_heart_from_labels_that_mean_nothing():
    course = [outcome(2.3, 2.3, 0.1, 0.1), outcome(1.5, 2.6, 0.5, 0.11), outcome(0.5, 3.5, 0.9, 0.12)]
    verdict = Generalization.trend([(10**i, r) for i, r in enumerate(course)])
    assert verdict.cause == Cause.WORSE_THAN_TRIVIAL and Cause.LABELS_SHUFFLED in verdict.explained_by
    learned = [*course[:2], outcome(0.5, 1.5, 0.9, 0.3)]
    assert Generalization.trend([(10**i, r) for i, r in enumerate(learned)]).cause == ""


def test_generalisation_of_tensors():
    logits, labels = torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 1, 2, 1])
    losses = torch.tensor([1.0, 2.0, 3.0, 6.0])
    result = diag.generalization(
        losses=losses, held_out_losses=losses + 1, logits=logits, labels=labels, held_out_logits=logits,
        held_out_labels=torch.tensor([0, 2, 1, 1]),
    )  # fmt: skip
    assert (result.loss, result.held_out_loss) == (3.0, 4.0)
    assert (result.accuracy, result.held_out_accuracy) == (0.75, 0.25)
    assert result.held_out_loss_standard_error == pytest.approx(
        float(losses.double().std() / 2) * 3.182446305 / 2
    )  # t of three


# A code for missing values


def with_code(code, share, n=200, feature=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator)
    x[torch.rand(n, generator=generator) < share, feature] = code
    return x


@pytest.mark.parametrize("code", [-999.0, 99.0, -30.0])
def test_a_code_for_missing_values_is_told(code):
    raw = with_code(code, 0.1)
    standardised = (raw - raw.mean(0)) / raw.std(0)
    verdict = diag.input_scale(inputs=standardised).verdict()
    assert (verdict.level, verdict.cause) == ("warning", Cause.MISSING_VALUES_FILLED)
    assert "Feature 3 is the same number" in verdict.sentence


def test_one_number_among_or_near_the_others_and_features_of_few_values_are_quiet():
    near = with_code(-4.0, 0.1)
    seldom = with_code(-30.0, 0.0)
    seldom[:2, 3] = -30.0
    few = torch.randn(200, 6)
    few[:, 0] = torch.randint(3, (200,)) + 20.0 * (torch.rand(200) < 0.1)
    for x in (with_code(0.0, 0.4), near, seldom, few):
        assert diag.input_scale(inputs=x).filled == 0
