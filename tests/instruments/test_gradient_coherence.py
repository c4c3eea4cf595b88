"""Gradient coherence against the closed forms of m-coherence and against dense float64 gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.errors import InvalidInput
from diag.gradients import MatrixGradients
from diag.instruments.gradient_coherence import JACKKNIFE_BLOCKS
from diag.result import Level
from diag.testing import refusal

coherence = diag.gradient_coherence


def measure(matrix, **options):
    return coherence(per_example_gradients=matrix.double(), **options)


# Oracle 3a: exact values.


def test_identical_gradients_help_everyone():
    result = measure(torch.randn(1, 7).expand(20, 7))
    assert result.m_coherence == pytest.approx(20, abs=1e-10)
    assert result.corrected == pytest.approx(1, abs=1e-10)
    assert result.standard_error == pytest.approx(0, abs=1e-10)


def test_orthogonal_gradients_help_only_themselves():
    scales = torch.arange(1.0, 13.0)  # any norms
    result = measure(torch.diag(scales))
    assert result.m_coherence == pytest.approx(1, abs=1e-10)
    assert result.corrected == pytest.approx(0, abs=1e-10)


def test_opposite_gradients_cancel():
    g = torch.randn(1, 5)
    result = measure(torch.cat([g, -g]))
    assert result.m_coherence == pytest.approx(0, abs=1e-10)
    assert result.corrected == pytest.approx(-1, abs=1e-10)


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_of_an_orthogonal_set(copies):
    assert measure(torch.eye(6).repeat(copies, 1)).m_coherence == pytest.approx(copies, abs=1e-10)


def test_zero_rows_and_scale_change_nothing():
    matrix = torch.randn(10, 4).double()
    padded = measure(torch.cat([3.5 * matrix, torch.zeros(30, 4).double()]))
    plain = measure(matrix)
    assert padded.m_coherence == pytest.approx(plain.m_coherence, abs=1e-10)
    assert padded.coherence == pytest.approx(plain.coherence / 4, abs=1e-10)
    assert padded.zero_gradients == 0.75


# Oracle 3b: the law of the sample size.


@pytest.mark.parametrize("m", [10, 100])
def test_sample_size_law(m):
    """g = mu + noise with |mu|^2 = 1, tr Cov = 50 - so alpha_pop = 1/51 - over 300 draws.

    The ratio of means has a bias of order 1/m and the draws an error: 3 % is the oracle's band."""
    generator = torch.Generator().manual_seed(0)
    mu = torch.zeros(50, dtype=torch.float64)
    mu[0] = 1.0
    found, corrected = [], []
    for _ in range(300):
        result = measure(mu + torch.randn(m, 50, generator=generator, dtype=torch.float64))
        found.append(result.m_coherence)
        corrected.append(result.corrected)
    assert sum(found) / 300 == pytest.approx(1 + (m - 1) / 51, rel=0.03)
    spread = torch.tensor(corrected).std() / 300**0.5
    assert abs(sum(corrected) / 300 - 1 / 51) < 4 * float(spread) + 0.03 / 51


def test_standard_error_matches_the_spread_of_draws():
    """The mean jackknife error over 200 draws against the true spread, times t / 2 of ten; 25 % is four errors
    of each."""
    generator = torch.Generator().manual_seed(1)
    values, errors = [], []
    for _ in range(200):
        result = measure(0.3 + torch.randn(60, 20, generator=generator, dtype=torch.float64))
        values.append(result.corrected)
        errors.append(result.standard_error)
    assert sum(errors) / 200 == pytest.approx(float(torch.tensor(values).std()) * 2.2622 / 2, rel=0.25)


def test_batches_follow_the_closed_form():
    """Means of k gradients drawn with replacement have alpha_k = k alpha / (1 + (k - 1) alpha) (population)."""
    torch.manual_seed(2)
    matrix = torch.randn(40, 6, dtype=torch.float64) + 0.4
    alpha = measure(matrix).coherence
    drawn = matrix[torch.randint(40, (60_000, 5))].mean(1)
    assert measure(drawn).coherence == pytest.approx(5 * alpha / (1 + 4 * alpha), rel=0.02)


# Layers, classes, noise.


def problem(n=60, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    y = torch.arange(n) % 3
    x = torch.eye(8, dtype=torch.float64)[y] * 2 + torch.randn(n, 8, dtype=torch.float64)
    return diag.Snapshot(model, F.cross_entropy, (x, y), **options), model, x, y


def dense(model, x, y):
    rows = []
    for i in range(len(x)):
        gradients = torch.autograd.grad(
            F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters())
        )
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


@pytest.mark.parametrize("micro_batch", [None, 7])
def test_a_network_against_its_dense_gradients(micro_batch):
    snapshot, model, x, y = problem(micro_batch=micro_batch)
    result, g = coherence(snapshot), dense(model, x, y)
    squares = g.square().sum(1)
    alpha = float(g.mean(0).square().sum() / squares.mean())
    assert result.coherence == pytest.approx(alpha, rel=1e-10)
    assert result.corrected == pytest.approx((60 * alpha - 1) / 59, rel=1e-8)
    total = sum(result.layer_energy[layer] * result.by_layer[layer] for layer in result.by_layer)
    assert total == pytest.approx(result.coherence, rel=1e-10)
    assert sum(result.layer_energy.values()) == pytest.approx(1, abs=1e-12)
    first = g[:, : 8 * 12 + 12]
    expected = float(first.mean(0).square().sum() / first.square().sum(1).mean())
    assert result.by_layer["0"] == pytest.approx(expected, rel=1e-10)
    trace = float((g - g.mean(0)).square().sum() / 59)
    signal = float(g.mean(0).square().sum()) - trace / 60
    assert result.noise_scale == pytest.approx(trace / signal, rel=1e-8)
    assert result.mean_loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-10)
    assert result.coverage == result.parameter_coverage == 1.0


def test_classes_against_their_dense_gradients():
    snapshot, model, x, y = problem()
    result, g = coherence(snapshot), dense(model, x, y)
    products = g @ g.T
    for a in range(3):
        for b in range(3):
            block = products[y == a][:, y == b]
            mean = (block.sum() - block.trace()) / (20 * 19) if a == b else block.mean()
            size = (products.diag()[y == a].mean() * products.diag()[y == b].mean()).sqrt()
            assert result.class_coherence[a, b] == pytest.approx(float(mean / size), rel=1e-8)
    assert result.classes == (0, 1, 2)


def test_only_the_largest_classes_are_shown():
    labels = torch.cat([torch.arange(30), torch.tensor([29, 28])])
    result = measure(torch.randn(32, 5), labels=labels)
    assert len(result.classes) == 20 and {28, 29} <= set(result.classes)
    assert math.isnan(result.class_coherence[0, 0])  # one example has no pair
    assert measure(torch.randn(4, 5), labels=torch.arange(3)).classes == ()  # labels of something else


def test_blocks_are_seeded():
    matrix = torch.randn(50, 6)
    assert measure(matrix, seed=3) == measure(matrix, seed=3)
    assert measure(matrix, seed=3).standard_error != measure(matrix, seed=4).standard_error
    assert JACKKNIFE_BLOCKS == 10


# Verdicts: only the paired contrast, only early, only with something to compare.


def steps(model, x, y, count):
    for _ in range(count):
        loss = F.cross_entropy(model(x), y)
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.data.sub_(0.5 * g)


def test_learnable_labels_agree_more_than_permuted_ones():
    """At the start: the mean loss is still near ln 3, and each class pulls its own way."""
    snapshot, model, *_ = problem(n=300)
    with torch.no_grad():
        model[2].weight.mul_(0.1)
        model[2].bias.zero_()
    snapshot = diag.Snapshot(model, F.cross_entropy, snapshot.batches)
    result = coherence(snapshot, contrast=True)
    verdict = result.verdict()
    assert verdict.level == Level.OK and "more than they would with permuted labels" in verdict.sentence
    assert result.ratio > 3 and verdict.value > verdict.threshold


def test_random_labels_do_not():
    _, model, x, _ = problem(n=200)
    torch.manual_seed(5)
    # A balanced start, so that the first step is not the same for every label.
    with torch.no_grad():
        model[2].weight.mul_(0.01)
    noise = torch.randn_like(x)
    random = diag.Snapshot(model, F.cross_entropy, (noise, torch.randint(3, (200,))))
    verdict = coherence(random, contrast=True).verdict()
    assert verdict.level == Level.UNKNOWN and "no more than with permuted labels" in verdict.sentence


def test_a_single_value_judges_nothing():
    snapshot, *_ = problem()
    verdict = coherence(snapshot).verdict()
    assert verdict.level == Level.NOT_APPLICABLE and "set contrast=True" in verdict.sentence


def test_fitted_data_judge_nothing():
    _, model, x, y = problem()
    steps(model, x, y, 300)
    verdict = coherence(diag.Snapshot(model, F.cross_entropy, (x, y)), contrast=True).verdict()
    assert verdict.level == Level.NOT_APPLICABLE and "the data are fitted" in verdict.sentence
    late = coherence(diag.Snapshot(model, F.cross_entropy, (x, y)), contrast=True, fit_below=0.0)
    assert late.verdict().level != Level.NOT_APPLICABLE


def test_nothing_to_judge():
    assert "give at least two" in measure(torch.randn(1, 4)).verdict().sentence
    zero = measure(torch.zeros(5, 4))
    assert math.isnan(zero.coherence) and "exactly zero" in zero.verdict().sentence


def test_the_course_tells_the_peak():
    results = [measure(torch.randn(20, 30) + shift) for shift in (0.1, 1.0, 0.3)]
    verdict = type(results[0]).trend([(10 * i, r) for i, r in enumerate(results)])
    assert "largest at step 10" in verdict.sentence and verdict.value == 10
    assert verdict.level == Level.NOT_APPLICABLE
    results[1] = measure(torch.randn(19, 30) + 1)  # unequal m: only the corrected value compares
    sentence = type(results[0]).trend(list(enumerate(results))).sentence
    assert sentence.startswith("Corrected coherence (of 19 to 20 examples) started at")


def test_refusals():
    assert "only gradients were given" in refusal(coherence, per_example_gradients=torch.randn(4, 3), contrast=True)
    assert "one row per example" in refusal(coherence, per_example_gradients=torch.randn(4))
    with pytest.raises(InvalidInput, match="expected PerExampleGradients"):
        coherence(per_example_gradients="gradients")


def test_named_slices_are_layers():
    matrix = torch.randn(9, 5, dtype=torch.float64)
    result = coherence(per_example_gradients=MatrixGradients(matrix, {"a": 2, "b": 3}))
    expected = float(matrix[:, :2].mean(0).square().sum() / matrix[:, :2].square().sum(1).mean())
    assert result.by_layer["a"] == pytest.approx(expected, rel=1e-12)
