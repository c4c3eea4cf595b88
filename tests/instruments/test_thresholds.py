"""A verdict turns where its threshold lies: one number of a made-up result, just below it and just above.

A threshold that is ten times as high or as low as it says fails here; whether it is a good one is not asked.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.curvature.stability.sgd import SgdStability
from diag.instruments.opposing_signals.instrument import opposing_signals_online
from diag.linalg.operator import LinearOperator
from diag.result import Level


def levels(result, **changes):
    """The levels of the result with one field at each of two values."""
    ((name, values),) = changes.items()
    return tuple(dataclasses.replace(result, **{name: value}).verdict().level for value in values)


def oscillating():
    """Two groups of 10 of 200 examples that trade places at every step."""
    generator = torch.Generator().manual_seed(0)
    change = 0.01 * torch.randn(8, 200, generator=generator, dtype=torch.float64)
    for t in range(8):
        change[t, :10] += (-1) ** t
        change[t, 10:20] -= (-1) ** t
    record = torch.cat([torch.full((1, 200), 5.0, dtype=torch.float64), 5.0 + change.cumsum(0)])
    result = opposing_signals_online(
        record, learning_rate=1.0, sharpness=(2.0, 2.1), labels=torch.arange(200) // 10
    )
    assert result.verdict().level == Level.WARNING
    return dataclasses.replace(result, chance_share=0.01)


@pytest.mark.parametrize(
    ("field", "warns", "quiet"),
    [
        ("swap", 0.61, 0.59),
        ("persist", 0.19, 0.21),
        ("antiphase", -0.71, -0.69),
        ("share", 0.41, 0.39),  # where chance explains less than that
        ("chance_share", 0.15, 0.25),  # five times it, against a share of about .9
        ("null_share", 0.8, 0.99),
    ],
)
def test_opposing_signals(field, warns, quiet):
    result = oscillating()
    assert 0.8 < result.share < 0.99
    assert levels(result, **{field: (warns, quiet)}) == (Level.WARNING, Level.OK)


def test_opposing_signals_says_what_else_it_saw():
    result = oscillating()
    for spike, said in ((1.05, False), (1.15, True)):
        assert ("mean loss jumps" in dataclasses.replace(result, spike=spike).verdict().sentence) == said
    for persist, swap, said in ((0.75, 0.1, True), (0.65, 0.1, False), (0.75, 0.25, False)):
        sentence = dataclasses.replace(result, persist=persist, swap=swap).verdict().sentence
        assert ("The same examples stay at each end" in sentence) == said


def collapsed_features():
    """Ten examples of each of four classes, each at its class's corner of a simplex."""
    labels = torch.arange(4).repeat_interleave(10)
    corners = torch.eye(4, dtype=torch.float64)
    logits = 10 * corners[labels]
    noise = 1e-3 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = diag.neural_collapse(
        corners[labels] + noise, labels, (corners, torch.zeros(4).double()), logits=logits
    )
    assert result.verdict().level == Level.OK and result.is_collapsed
    return result


@pytest.mark.parametrize(("field", "usual", "unusual"), [("nc4", 0.009, 0.011), ("nc2", 0.79, 0.81)])
def test_neural_collapse(field, usual, unusual):
    words = {"nc4": "decides for another class than the one", "nc2": "class means are not spread evenly"}[field]
    for value, said in ((usual, False), (unusual, True)):
        verdict = dataclasses.replace(collapsed_features(), **{field: value}).verdict()
        assert (words in verdict.sentence) == said == (verdict.level == Level.DESCRIPTION)


@pytest.mark.parametrize(
    ("field", "inside", "outside"), [("nc1", 0.09, 0.11), ("nc2", 0.29, 0.31), ("nc4", 0, 0.01)]
)
def test_neural_collapse_says_so(field, inside, outside):
    result = collapsed_features()
    assert dataclasses.replace(result, **{field: inside}).is_collapsed
    assert not dataclasses.replace(result, **{field: outside}).is_collapsed
    # Far from a simplex is unusual only where the classes have collapsed.
    far = dataclasses.replace(result, nc2=0.9)
    if field == "nc1":
        assert levels(far, nc1=(inside, outside)) == (Level.DESCRIPTION, Level.OK)


@pytest.mark.parametrize("correct", [198, 199, 200])
def test_neural_collapse_is_judged_in_the_terminal_phase(correct):
    """From an accuracy of 99.5 % on, that is 199 of 200."""
    labels = torch.arange(4).repeat_interleave(50)
    features = torch.eye(4, dtype=torch.float64)[labels]
    logits = 10 * features.clone()
    logits[torch.arange(200 - correct)] = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    verdict = diag.neural_collapse(features, labels, logits=logits).verdict()
    assert (verdict.level == Level.NOT_APPLICABLE) == (correct < 199)


def margins():
    """Forty examples whose margins float32 still resolves well."""
    logits = torch.zeros(40, 10)
    logits[:, 0] = torch.linspace(2, 4, 40)
    result = diag.softmax_collapse(logits, torch.zeros(40, dtype=torch.long))
    assert result.verdict().level == Level.OK
    return result


def test_softmax_collapse_is_near():
    for field, far, near, other in (
        ("zero_sum_residual", 0.9e-3, 1.1e-3, {}),
        ("headroom", 2.1, 1.9, {"gradient_error": 2e-3}),
        ("gradient_error", 0.9e-3, 1.1e-3, {"headroom": 1.0}),
    ):
        for value, said in ((far, False), (near, True)):
            verdict = dataclasses.replace(margins(), **{field: value}, **other).verdict()
            assert ("collapse is near" in verdict.sentence) == said, (field, value)


@pytest.mark.parametrize(("off", "applies"), [(0.04, True), (0.06, False)])
def test_softmax_collapse_is_judged_where_the_loss_is_a_softmaxs(off, applies):
    """Gradients whose wrong classes are off from the softmax's by this share of their length, each by itself."""
    logits = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(40, dtype=torch.long)
    gradients = logits.softmax(1)
    gradients[:, 0] -= 1
    turned = gradients.clone()
    sign = torch.ones(40)
    sign[::2] = -1  # no factor for each class explains it
    turned[:, 1:] *= 1 + off * sign[:, None]
    verdict = diag.softmax_collapse(logits, labels, turned).verdict()
    assert (verdict.level == Level.NOT_APPLICABLE) != applies


@pytest.mark.parametrize(("inside", "outliers"), [(0.45, 0), (0.55, 1)])
def test_an_outlier_of_the_hessian_lies_for_more_than_half_in_the_class_directions(inside, outliers):
    matrix = torch.diag(torch.tensor([10.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64))
    direction = torch.tensor([[inside**0.5, 0, 0, 0, (1 - inside) ** 0.5]], dtype=torch.float64)
    operator = LinearOperator.from_matrix(matrix)
    result = diag.hessian_spectrum(hessian=operator, class_directions=direction, num_eigenvalues=1)
    assert result.overlaps == pytest.approx([inside]) and result.num_outliers == outliers


@pytest.mark.parametrize(("ratio", "level"), [(0.045, Level.OK), (0.055, Level.WARNING)])
def test_a_saddle_curves_downwards_by_a_twentieth(ratio, level):
    matrix = torch.diag(torch.tensor([10.0, 1.0, 0.5, 0.2, -10 * ratio], dtype=torch.float64))
    result = diag.hessian_spectrum(hessian=LinearOperator.from_matrix(matrix), num_eigenvalues=1)
    assert result.verdict().level == level


@pytest.mark.parametrize(("loss", "fitted"), [(0.04, True), (0.06, False)])
def test_gradient_coherence_is_judged_while_the_mean_loss_is_above_a_twentieth(loss, fitted):
    """One logit that gives each of the examples this very loss."""
    model = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-math.log(math.expm1(loss))], [0.0]]))
    data = torch.ones(20, 1).double(), torch.zeros(20, dtype=torch.long)
    result = diag.gradient_coherence(diag.Snapshot(model, F.cross_entropy, data), contrast=True)
    verdict = result.verdict()
    assert (verdict.level == Level.NOT_APPLICABLE and "the data are fitted" in verdict.sentence) == fitted


@pytest.mark.parametrize(
    ("unexplained", "mismatch", "fitted"), [(0.009, 0.049, True), (0.011, 0.049, False), (0.009, 0.051, False)]
)
def test_examples_are_fitted_to_a_hundredth_and_linear_to_a_twentieth(unexplained, mismatch, fitted):
    assert SgdStability(unexplained=unexplained, mismatch=mismatch).fitted == fitted
