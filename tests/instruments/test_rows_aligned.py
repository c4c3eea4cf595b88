"""Targets that stand in other rows than their inputs: moved by one, turned round, exchanged in a part, shuffled."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diag
from diag.instruments.causes import Cause
from diag.linalg.geometry.pairing import centred, pairing_scores, similarity
from diag.result import Level
from diag.watching.observe.loop.answers.scored import PairedRows, paired_facts

ROWS, FEATURES = 384, 6


def table(seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(ROWS, FEATURES, generator=generator)
    return inputs, inputs[:, 0] - inputs[:, 1] + 0.3 * torch.randn(ROWS, generator=generator)


def network(outputs=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, outputs))


def cross_entropy(outputs, targets):
    return F.cross_entropy(outputs, (targets > 0).long())


def own_squares(outputs, targets):
    return (outputs.squeeze(1) - targets).pow(2).mean()


def own_likelihood(outputs, targets):
    mean, log_variance = outputs[:, 0], outputs[:, 1]
    return (0.5 * log_variance + 0.5 * (-log_variance).exp() * (targets - mean) ** 2).mean()


LOSSES = [(cross_entropy, 2), (own_squares, 1), (own_likelihood, 2)]


def trained(inputs, targets, loss=cross_entropy, outputs=2, epochs=3, loader=True, change=lambda y: y):
    model = network(outputs)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(1)
    data = DataLoader(TensorDataset(inputs, targets), 32, shuffle=True, generator=generator)
    with diag.watch(model) as watcher:
        for _ in range(epochs):
            order = torch.randperm(ROWS, generator=generator).split(32)
            for x, y in data if loader else [(inputs[rows], targets[rows]) for rows in order]:
                value = loss(model(x), change(y))
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
    return watcher


def told(watcher):
    return [f.verdict for f in watcher.findings if f.instrument == "rows_aligned"]


@pytest.mark.parametrize(("loss", "outputs"), LOSSES, ids=["classes", "squares", "likelihood"])
def test_targets_rolled_in_their_batch_are_named_with_the_row(loss, outputs):
    found = told(trained(*table(), loss, outputs, change=lambda y: y.roll(1)))
    assert found and found[-1].level is Level.ALARM and found[-1].cause == Cause.TARGETS_MISPLACED
    assert "one row further on in the batch" in found[-1].sentence


def test_targets_turned_round_in_their_batch():
    found = told(trained(*table(), change=lambda y: y.flip(0)))
    assert found and "from the other end of the batch" in found[-1].sentence


def test_labels_of_the_next_row_of_the_data_set_are_named_with_the_row():
    inputs, targets = table()
    found = told(trained(inputs, targets.roll(-2)))
    assert found and "2 rows before in the data set" in found[-1].sentence


def test_classes_exchanged_in_one_part_of_the_data_set():
    inputs, targets = table()
    targets[:170] *= -1
    found = told(trained(inputs, targets, epochs=4))
    assert found and found[-1].cause == Cause.LABELS_WRONG
    assert "contradict each other" in found[-1].sentence


def test_shuffled_targets_of_one_of_two_losses():
    inputs, targets = table()
    shuffled = targets[torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))]

    def both(outputs, y):
        return F.mse_loss(outputs[:, 0], y[:, 0]) + F.cross_entropy(outputs[:, 1:], (y[:, 1] > 0).long())

    found = told(trained(inputs, torch.stack([targets, shuffled], 1), both, 3, epochs=12))
    assert found and found[-1].cause == Cause.LABELS_SHUFFLED and "(cross_entropy)" in found[-1].sentence
    right = trained(inputs, torch.stack([targets, targets], 1), both, 3, epochs=12)
    assert not told(right)


def test_shuffled_targets_of_the_loops_own_regression():
    inputs, targets = table()
    shuffled = targets[torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))]
    found = told(trained(inputs, shuffled, own_likelihood, 2, epochs=20, loader=False))
    assert found and found[-1].cause == Cause.LABELS_SHUFFLED


@pytest.mark.parametrize(("loss", "outputs"), LOSSES, ids=["classes", "squares", "likelihood"])
@pytest.mark.parametrize("loader", [True, False], ids=["loader", "indices"])
def test_quiet_where_targets_stand_in_their_rows(loss, outputs, loader):
    assert not told(trained(*table(), loss, outputs, epochs=18, loader=loader))


def test_quiet_on_data_in_the_order_of_its_targets():
    inputs, targets = table()
    order = targets.argsort()
    assert not told(trained(inputs[order], targets[order], own_squares, 1))


def test_quiet_where_two_losses_share_the_targets_of_a_mixed_batch():
    def mixed(outputs, y):
        partner = (y > 0).long().roll(7)
        return 0.9 * F.cross_entropy(outputs, (y > 0).long()) + 0.1 * F.cross_entropy(outputs, partner)

    assert not told(trained(*table(), mixed, 2, epochs=12))


def test_nothing_is_said_of_few_rows_or_of_positions_in_a_batch():
    inputs, targets = table()
    watcher = trained(inputs, targets, lambda z, y: F.cross_entropy(z, torch.arange(len(z))), 32)
    (verdict,) = [f.verdict for f in watcher.run.findings() if f.instrument == "rows_aligned"]
    assert verdict.level is Level.NOT_APPLICABLE and "fewer than 48 rows" in verdict.sentence


def test_a_window_that_holds_its_target_is_told_in_the_loops_own_arithmetic_under_a_factor():
    inputs, _ = table()

    def scaled(outputs, y):
        return 1024.0 * (outputs.squeeze(1) - y).pow(2).mean()

    found = [
        f.verdict for f in trained(inputs, inputs[:, 4], scaled, 1).findings if f.instrument == "target_values"
    ]
    assert found and found[-1].cause == Cause.ANSWER_IN_INPUT and "feature 4" in found[-1].sentence


def test_targets_of_raw_units_are_told_behind_a_variance():
    inputs, targets = table()

    def scale(y):
        watcher = trained(inputs, y, own_likelihood, 2)
        return [f.verdict for f in watcher.findings if f.instrument == "target_scale"]

    found = scale(20_000 + 5_000 * targets)
    assert found and found[-1].cause == Cause.TARGETS_NOT_NORMALIZED
    assert not scale(targets)


def looks(rows, by=0, size=32):
    """Batches of a drawn order of a data set whose targets stand `by` rows on."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, FEATURES, generator=generator)
    targets = (inputs[:, :1] + 0.3 * torch.randn(rows, 1, generator=generator)).roll(by, 0)
    order = torch.randperm(rows, generator=generator).split(size)
    return [PairedRows([inputs[places]], (False,), targets[places], places) for places in order]


def test_the_score_of_their_own_order_is_that_of_distances_in_float64():
    batches = looks(320)
    rows = torch.cat([b.features[0] for b in batches]).double()
    kernel = centred(similarity((rows - rows.mean(0)) / rows.std(0)))
    targets = torch.cat([b.targets for b in batches]).double()
    targets = (targets - targets.mean()) / targets.std()
    columns = torch.cat([targets, targets.square() - 1], 1)
    (wanted,) = pairing_scores(kernel, columns, [torch.arange(320)])
    # distances in float32 are right to some 1e-6 of the largest
    assert paired_facts("", 1, batches).own == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("rows", [200, 300, 700])
@pytest.mark.parametrize("by", [-3, 2])
def test_the_order_of_the_data_set_is_told_of_up_to_512_rows(rows, by):
    facts = paired_facts("", 1, looks(rows, by))
    assert facts.data_by == by and facts.data_rows == min(rows - abs(by), 512)
    assert facts.in_data > 20 and facts.own_in_data < 3


def test_rows_that_have_been_told_are_told_again_with_what_came_later():
    batches = looks(900)
    before = paired_facts("", 1, batches[:20])
    assert before.rows == 512 and paired_facts("", 1, batches, before) == paired_facts("", 1, batches)
    early = paired_facts("", 1, batches[:4])
    assert early.rows == 128 and paired_facts("", 1, batches, early).rows == 512
