"""Class weights: told where they leave many examples next to nothing or favour the frequent, silent where they even
out the classes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.snapshot.loop.data import BatchFacts, LossFacts
from diag.snapshot.loop.facts import Loop


def judged(counts, weights, **more):
    losses = (LossFacts("cross_entropy", class_weights=tuple(weights), weighted=True, first_step=1),)
    batches = BatchFacts(label_counts=dict(enumerate(counts)))
    return diag.class_weights(loop=Loop(step=9, losses=losses + more.get("others", ()), batches=batches)).verdict()


def binary(share, weight, entries=100_000):
    return columns([weight], [share], entries)


def columns(weights, shares, entries=100_000):
    loss = LossFacts(
        "binary_cross_entropy_with_logits",
        positive_weights=tuple(weights),
        ones=tuple(share * entries for share in shares),
        entries=entries,
        weighted=True,
    )
    return diag.class_weights(loop=Loop(step=9, losses=(loss,))).verdict()


def test_classes_that_are_left_next_to_nothing_are_told_with_their_part():
    # Class 0 has 100 * 1000 of 100 * 1000 + 900 * 0.001 parts.
    verdict = judged([100] * 10, [1000.0] + [1e-3] * 9)
    assert verdict.level == "warning" and verdict.cause == Cause.CLASS_WEIGHTS_WRONG
    assert "90 % of the examples" in verdict.sentence and "class 0 1,000" in verdict.sentence


def test_a_background_of_most_pixels_that_hardly_counts_is_told():
    assert judged([800, 100, 100], [1e-4, 1.0, 1.0]).cause == Cause.CLASS_WEIGHTS_WRONG


def test_weights_in_proportion_to_the_classes_are_the_wrong_way_round():
    verdict = judged([600, 300, 60], [0.6, 0.3, 0.06])
    assert verdict.cause == Cause.CLASS_WEIGHTS_WRONG and "larger for the more frequent classes" in verdict.sentence


@pytest.mark.parametrize(
    ("counts", "weights"),
    [
        ([600, 300, 60], [320 / 600, 320 / 300, 320 / 60]),  # balanced
        ([5000] + [5] * 999, [1 / 5000] + [1 / 5] * 999),  # balanced, and one class of a thousand has half the rows
        ([950, 25, 25], [0.1, 1.0, 1.0]),  # background counts less
        ([500, 300, 200], [0.0, 1.0, 1.0]),  # a class that is left out on purpose
        ([100, 100, 100], [1.0, 3.0, 0.5]),  # costs that differ, of classes that do not
        ([600, 300, 60], [1.0, 1.0, 1.0]),
    ],
)
def test_weights_that_even_out_or_choose_are_fine(counts, weights):
    assert judged(counts, weights).level == "ok"


def test_the_weight_of_positives_is_judged_by_their_share():
    assert binary(0.6, 1000.0).cause == Cause.CLASS_WEIGHTS_WRONG
    assert binary(0.01, 99.0).level == "ok"
    assert binary(0.1, 3.0).level == "ok"  # the square root of what evens out
    assert binary(0.1, 27.0).level == "ok"
    assert binary(0.1, 0.5).level == "ok"  # fewer false positives, on purpose
    assert binary(0.001, 1000.0).level == "ok"


def test_nothing_is_said_without_weights_or_with_labels_of_several_losses():
    without = diag.class_weights(loop=Loop(step=9, losses=(LossFacts("cross_entropy"),))).verdict()
    assert without.level == "not_applicable" and "the loss was given no class weights" in without.sentence
    assert judged([100] * 10, [1000.0] + [1e-3] * 9, others=(LossFacts("nll_loss"),)).level == "ok"
    assert judged([3, 3], [1000.0, 1e-3]).level == "ok"  # six labels


@pytest.mark.parametrize("binary_loss", [False, True])
def test_the_weights_of_a_watched_loop_are_read_from_the_loss(binary_loss):
    torch.manual_seed(0)
    model = nn.Linear(4, 1 if binary_loss else 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    weighted = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(1e4)) if binary_loss else None
    with diag.watch(model, instruments=["class_weights"]) as watcher:
        for _ in range(12):
            x = torch.randn(32, 4)
            y = (x[:, :1] > 0).float() if binary_loss else x[:, :3].argmax(1)
            weight = torch.tensor([1e3, 1e-2, 1e-2])
            loss = weighted(model(x), y) if weighted else F.cross_entropy(model(x), y, weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert [f.verdict.cause for f in watcher.findings] == [Cause.CLASS_WEIGHTS_WRONG]


def test_a_weight_of_ones_far_above_what_evens_out_is_told_with_that():
    verdict = binary(0.05, 1000.0)
    assert verdict.cause == Cause.CLASS_WEIGHTS_WRONG and "19 evens the two out" in verdict.sentence


def test_a_weight_that_makes_rare_ones_count_less_still_is_told():
    verdict = binary(0.1, 0.1 / 0.9)
    assert verdict.cause == Cause.CLASS_WEIGHTS_WRONG and "count less still" in verdict.sentence
    assert binary(0.1, 0.001).cause == Cause.CLASS_WEIGHTS_WRONG


@pytest.mark.parametrize(("share", "weight"), [(0.9, 0.1 / 0.9), (0.95, 0.2), (0.5, 0.2), (0.95, 1.0), (0.95, 1.2)])
def test_weights_that_even_out_frequent_ones_or_are_next_to_none_are_fine(share, weight):
    assert binary(share, weight).level == "ok"


def test_a_share_of_ones_that_a_few_rows_do_not_tell_is_left_alone():
    assert binary(2 / 16, 99.0, entries=16).level == "ok"
    assert binary(2 / 16, 0.1, entries=16).level == "ok"


def test_weights_of_several_columns_are_judged_by_their_own_shares():
    assert columns([9.0, 999.0], [0.1, 0.001]).level == "ok"
    verdict = columns([0.1, 0.01, 1.0], [0.1, 0.01, 0.5])
    assert verdict.cause == Cause.CLASS_WEIGHTS_WRONG and "in 2 of 3 columns" in verdict.sentence


def test_shares_of_columns_are_seen_where_there_is_a_weight_for_each():
    model = nn.Linear(4, 3)
    targets = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]).repeat(16, 1)
    with diag.watch(model, instruments=["class_weights"]) as watcher:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(4):
            optimizer.zero_grad()
            weights = torch.tensor([1.0, 300.0, 1.0])
            F.binary_cross_entropy_with_logits(model(torch.randn(64, 4)), targets, pos_weight=weights).backward()
            optimizer.step()
    (finding,) = watcher.findings
    assert "300" in finding.verdict.sentence and "in 1 of 3 columns" in finding.verdict.sentence
    assert "25 % of the targets" in finding.verdict.sentence and "3 evens the two out" in finding.verdict.sentence
