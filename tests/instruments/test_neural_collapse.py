"""Neural collapse against exact simplices, a theorem's minimiser, and an independent dense implementation."""

import json
import math

import numpy
import pytest
import scipy.optimize
import torch
from torch import nn

import diag
from diag.errors import InvalidInput, Unsupported
from diag.instruments.neural_collapse.instrument import NeuralCollapse, neural_collapse
from diag.result import Level
from diag.testing import check_plot, check_result, simplex_etf

K, D, N = 10, 32, 20
LABELS = torch.arange(K).repeat_interleave(N)


def collapsed(noise=0.0, seed=0, each=N, offset=0.3, dimension=D):
    """Features around a simplex shifted by `offset`, and the classifier that belongs to them."""
    frame = simplex_etf(K, dimension)
    labels = torch.arange(K).repeat_interleave(each)
    generator = torch.Generator().manual_seed(seed)
    h = frame[labels] + offset
    h = h + noise * torch.randn(h.shape, generator=generator, dtype=torch.float64)
    weight = 3 * frame
    return {"features": h, "labels": labels, "classifier": (weight, -weight.sum(1) * offset)}


def dense_reference(h, y):
    """NC1, NC1~ and NC2 straight from their definitions, with (d, d) matrices and numpy's pseudo-inverse."""
    h, y = h.double().numpy(), y.numpy()
    means = numpy.stack([h[y == k].mean(0) for k in range(y.max() + 1)])
    m = means - means.mean(0)
    within = numpy.mean([numpy.cov(h[y == k].T, bias=True) for k in range(len(m))], axis=0)
    between = m.T @ m / len(m)
    gram = m @ m.T
    simplex = (numpy.eye(len(m)) - 1 / len(m)) / math.sqrt(len(m) - 1)
    nc1 = numpy.trace(within @ numpy.linalg.pinv(between, rcond=1e-10)) / len(m)
    ratio = numpy.trace(within) / numpy.trace(between)
    return nc1, ratio, numpy.linalg.norm(gram / numpy.linalg.norm(gram) - simplex)


def test_an_exact_simplex_has_only_zeros():
    """Closed form: float64 rounding is 1e-16 a number, some thousand of them are added."""
    given = collapsed()
    result = neural_collapse(**given, held_out_features=given["features"], held_out_labels=given["labels"])
    zeros = ["nc1", "nc1_ratio", "nc2", "nc3", "nc4", "nc2_norms", "nc2_angle_spread", "nc2_angles"]
    zeros += ["nc2_classifier", "nc3_product", "bias_check", "cdnv", "held_out_nc1", "held_out_nc4"]
    assert max(getattr(result, name) for name in zeros) <= 1e-12
    # arccos turns 1e-15 below 1 into 5e-8 rad.
    assert result.deviation_angle < 1e-5
    assert result.effective_rank == pytest.approx(K - 1, abs=1e-9)
    assert result.train_accuracy == 1.0 and not result.degenerate
    verdict = result.verdict()
    assert verdict.level is Level.OK and result.is_collapsed
    assert "The features have collapsed to their class means (NC1 " in verdict.sentence
    assert "not a score of generalisation" in verdict.advice
    assert verdict.threshold_source == "our choice, uncalibrated"
    check_result(result)


def test_isotropic_noise_has_the_closed_form():
    """Closed form: NC1 = (K-1) sigma^2 (n-1)/n over s^2 + sigma^2/n; NC1~ likewise. 3 % for n = 400."""
    sigma, n = 0.1, 400
    result = neural_collapse(**collapsed(sigma, each=n))
    s2 = float(torch.linalg.svdvals(simplex_etf(K, D))[0] ** 2)
    assert result.nc1 == pytest.approx((K - 1) * sigma**2 * (n - 1) / n / (s2 + sigma**2 / n), rel=0.03)
    trace_between = (1 + D * sigma**2 / n * (K - 1) / K) * K / K
    assert result.nc1_ratio == pytest.approx(D * sigma**2 * (n - 1) / n / trace_between, rel=0.03)


@pytest.mark.parametrize("sizes", [(7, 7, 7, 7), (2, 30, 5, 11)])
@pytest.mark.parametrize("dimension", [3, 12])
def test_the_thin_svd_agrees_with_dense_matrices(sizes, dimension):
    generator = torch.Generator().manual_seed(1)
    y = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    h = torch.randn(len(y), dimension, generator=generator, dtype=torch.float64) + 5 * y[:, None]
    h[:, 0] += 100.0
    result = neural_collapse(features=h, labels=y)
    # pinv squares the condition number, so it is the dense side that limits the agreement.
    numpy.testing.assert_allclose((result.nc1, result.nc1_ratio, result.nc2), dense_reference(h, y), rtol=1e-7)


def test_the_minimiser_of_tirer_theorem_2_1_has_collapsed():
    """Closed form: unconstrained features with squared loss. The theorem's minimiser is an orthogonal frame
    of squared length rho = (1 - c) sqrt(lw / lh); centred it is a simplex, and w_k = sqrt(lh / lw) hb_k."""
    classes, n, d, lw, lh = 4, 6, 8, 0.01, 0.02
    y = torch.arange(classes).repeat_interleave(n)
    target = nn.functional.one_hot(y, classes).T.double()

    def loss(flat):
        both = torch.from_numpy(flat).requires_grad_()
        w, h = both[: classes * d].view(classes, d), both[classes * d :].view(d, classes * n)
        fit = ((w @ h - target) ** 2).sum() / (2 * classes * n)
        value = fit + lw / (2 * classes) * (w**2).sum() + lh / (2 * classes * n) * (h**2).sum()
        (gradient,) = torch.autograd.grad(value, both)
        return value.item(), gradient.numpy()

    start = numpy.random.default_rng(0).standard_normal(classes * d + d * classes * n)
    options = {"maxiter": 5000, "maxfun": 10000, "ftol": 0, "gtol": 1e-8}
    end = torch.from_numpy(scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x)
    w, h = end[: classes * d].view(classes, d), end[classes * d :].view(d, classes * n)
    result = neural_collapse(features=h.T, labels=y, classifier=(w, torch.zeros(classes)))
    means = torch.stack([h.T[y == k].mean(0) for k in range(classes)])
    rho = (1 - math.sqrt(lh * lw)) * math.sqrt(lw / lh)
    torch.testing.assert_close(means @ means.T, rho * torch.eye(classes).double(), atol=1e-5, rtol=0)
    assert max(result.nc1_ratio, result.nc2) < 1e-5 and result.nc4 == 0


def test_the_deviation_angle_of_a_linear_discriminant():
    """for Sigma = diag(1, s), w = Sigma^-1 m has cos = (1 + 1/s) / sqrt(2 (1 + 1/s^2))."""
    s = 7.0
    h = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double().repeat_interleave(2, 0)
    w = torch.tensor([[0.0, 0.0], [1.0, 1 / s]], dtype=torch.float64)
    result = neural_collapse(features=h, labels=torch.tensor([0, 0, 1, 1]), classifier=(w, torch.zeros(2)))
    expected = math.degrees(math.acos((1 + 1 / s) / math.sqrt(2 * (1 + 1 / s**2))))
    assert result.deviation_angle == pytest.approx(expected, abs=1e-9)
    assert expected == pytest.approx(36.8699, abs=1e-4)


def test_no_scale_changes_anything_but_the_feature_norm():
    given = collapsed(0.3)
    small = neural_collapse(**given)
    large = neural_collapse(**(given | {"features": 1000 * given["features"]}))
    for name in ("nc1", "nc1_ratio", "nc2", "nc3", "nc2_norms", "cdnv", "effective_rank", "deviation_angle"):
        assert getattr(small, name) == pytest.approx(getattr(large, name), rel=1e-9)


def test_random_labels_on_random_features_are_far_from_collapse():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(200, 32, generator=generator)
    result = neural_collapse(
        features=h, labels=LABELS, classifier=(torch.randn(10, 32, generator=generator), torch.zeros(10))
    )
    # Means of 20 standard normal vectors: s_j^2 is about 32 / 20, so NC1 about 9 / 1.6.
    assert result.nc1 > 3 and result.nc4 > 0.5
    assert result.verdict().level is Level.NOT_APPLICABLE
    assert "below the 99.5 % at which the terminal phase of training begins" in result.verdict().sentence


def test_no_verdict_without_the_training_accuracy():
    result = neural_collapse(features=collapsed()["features"], labels=LABELS)
    assert result.nc1 < 1e-12 and math.isnan(result.nc3) and math.isnan(result.nc4)
    assert "the training accuracy is not known; give classifier= or logits= too" in result.verdict().sentence
    check_result(result)


def test_logits_stand_in_for_the_classifier():
    given = collapsed(0.05)
    weight, bias = given.pop("classifier")
    result = neural_collapse(**given, logits=given["features"] @ weight.T + bias)
    assert result.train_accuracy == 1.0 and result.nc4 == 0 and math.isnan(result.nc3)
    assert result.verdict().level is Level.OK


def test_warning_where_decisions_are_not_the_nearest_mean():
    """The true class wins by a feature that hardly moves the means, so that the nearest mean is another one's."""
    given = collapsed(0.5, offset=0.0)
    y = given["labels"]
    h = torch.cat([given["features"], 0.01 * nn.functional.one_hot(y, K).double()], 1)
    weight = torch.cat([torch.zeros(K, D).double(), 1e3 * torch.eye(K).double()], 1)
    result = neural_collapse(features=h, labels=y, classifier=(weight, torch.zeros(K)))
    assert result.train_accuracy == 1.0 and result.nc4 > 0.01
    verdict = result.verdict()
    assert verdict.level is Level.DESCRIPTION
    assert "another class than the one whose mean features are nearest (NC4)" in verdict.sentence
    assert (
        neural_collapse(features=h, labels=y, classifier=(weight, torch.zeros(K)), nc4_unusual=0.9).nc4
        == result.nc4
    )
    check_result(result)


def test_warning_where_the_means_of_small_classes_merge():
    means = 0.05 * simplex_etf(K, D)
    means[:2] = simplex_etf(K, D)[:2]
    weight = torch.linalg.pinv(means).T
    result = neural_collapse(features=means[LABELS], labels=LABELS, classifier=(weight, torch.zeros(K)))
    assert result.train_accuracy == 1.0 and result.nc2 > 0.8
    assert "class means are not spread evenly" in result.verdict().sentence
    assert result.verdict().level is Level.DESCRIPTION


def test_coinciding_class_means_are_flagged_not_divided_by():
    given = collapsed()
    given["features"][LABELS == 1] = given["features"][LABELS == 0]
    result = neural_collapse(**given)
    assert result.degenerate and math.isnan(result.nc1) and math.isfinite(result.nc1_ratio)
    assert (
        neural_collapse(**given, terminal_accuracy=0.5).verdict().sentence.startswith("No verdict: two class means")
    )


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_whether_class_means_coincide_does_not_depend_on_the_unit(scale):
    """The rank of the class means is that of their ratio: 1e-10 of the largest distance is rounding, 1 is not."""
    given = collapsed()
    given["features"] = given["features"].double() * scale
    assert not neural_collapse(**given).degenerate
    apart = given["features"][LABELS == 0].mean(0) - given["features"][LABELS == 1].mean(0)
    given["features"][LABELS == 1] = given["features"][LABELS == 0] + 1e-10 * apart
    assert neural_collapse(**given).degenerate


def test_all_features_equal():
    result = neural_collapse(features=torch.ones(6, 4), labels=torch.tensor([0, 1, 2] * 2))
    assert result.degenerate and math.isnan(result.nc1_ratio)
    check_result(result)


def test_too_few_features_for_a_simplex():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(K, 4, generator=generator).double()
    given = {"features": means[LABELS], "labels": LABELS, "logits": nn.functional.one_hot(LABELS, K).double()}
    result = neural_collapse(**given)
    assert not result.degenerate and len(result.singular_values) == 4
    assert "there are 4 features for 10 classes, whose simplex needs 9" in result.verdict().sentence


def test_a_class_with_one_example_gives_no_verdict():
    given = collapsed()
    keep = torch.cat([torch.tensor([0]), torch.arange(N, K * N)])
    given |= {"features": given["features"][keep], "labels": LABELS[keep]}
    assert (
        "the smallest class has 1 example, which is its own mean; give more data"
        in neural_collapse(**given).verdict().sentence
    )


def test_classes_that_are_absent_are_left_out():
    given = collapsed(0.1)
    keep = LABELS != 4
    part = given | {"features": given["features"][keep], "labels": LABELS[keep]}
    result = neural_collapse(**part, held_out_features=given["features"], held_out_labels=LABELS)
    assert result.num_classes == 9 and math.isfinite(result.nc3)
    # The held-out examples of class 4 have no training mean, so the others alone count.
    assert result.held_out_nc1 == pytest.approx(result.nc1, rel=1e-12)


def test_held_out_numbers_use_the_training_means():
    """Held-out features all shifted by v: NC1 grows by (1/K) sum_j (v . v_j)^2 / (s_j^2 / K)."""
    given = collapsed(0.1, offset=0.0)
    shift = simplex_etf(K, D)[0]
    result = neural_collapse(**given, held_out_features=given["features"] + shift, held_out_labels=LABELS)
    by = torch.stack([given["features"][k == LABELS].mean(0) for k in range(K)])
    _, s, v = torch.linalg.svd(by - by.mean(0), full_matrices=False)
    grown = ((v[: K - 1] @ shift) ** 2 / s[: K - 1] ** 2).sum()
    assert result.held_out_nc1 == pytest.approx(result.nc1 + float(grown), rel=1e-9)


def test_the_bias_decides_too():
    """A bias that turns the classifier's decision must show in NC4 and in the bias check."""
    given = collapsed()
    weight, bias = given["classifier"]
    bias = bias.clone()
    bias[0] += 100.0
    result = neural_collapse(**(given | {"classifier": (weight, bias)}))
    assert result.nc4 == pytest.approx(0.9)
    # Centring over the classes takes off a tenth: the length of 100 (e_0 - 1/10).
    assert result.bias_check == pytest.approx(100 * math.sqrt(0.9), rel=1e-9)


def course(*noises):
    return [(10 * i, neural_collapse(**collapsed(noise, seed=i))) for i, noise in enumerate(noises)]


def perturbed(size, step):
    """A simplex whose means, classifier and spread are all off by `size`, in the same direction each time."""
    given = collapsed(0.3 * size)
    generator = torch.Generator().manual_seed(3)
    means = simplex_etf(K, D) + 0.1 * size * torch.randn(K, D, generator=generator, dtype=torch.float64)
    given["features"] = given["features"] - simplex_etf(K, D)[LABELS] + means[LABELS]
    return step, neural_collapse(**given)


def test_collapsing_needs_three_snapshots_that_fall():
    falling = [perturbed(0.6, 10), perturbed(0.4, 20), perturbed(0.2, 30)]
    verdict = NeuralCollapse.trend(falling)
    assert verdict.sentence.startswith("The features are collapsing: from step 10 to 30 NC1~ ")
    assert verdict.level is Level.OK and verdict.confidence == "strong_empirical"
    for series in (falling[:2], [falling[0], falling[2], falling[1]]):
        assert "are collapsing" not in NeuralCollapse.trend(series).sentence


def test_round_trip_and_plots():
    given = collapsed(0.2)
    result = neural_collapse(**given, held_out_features=given["features"], held_out_labels=LABELS)
    again = NeuralCollapse.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    assert again == result and again.verdict() == result.verdict()
    check_plot(result.plot)
    check_plot(lambda ax: NeuralCollapse.plot_trend(ax, course(0.3, 0.2, 0.1)))


def test_on_a_snapshot():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(30, 6), torch.arange(30) % 3
    result = diag.neural_collapse(diag.Snapshot(model, nn.CrossEntropyLoss(), (x, y), held_out=(x, y)))
    h = model[1](model[0](x)).detach()
    expected = neural_collapse(features=h, labels=y, classifier=(model[2].weight, model[2].bias))
    assert result.nc1 == pytest.approx(expected.nc1, rel=1e-6) and result.nc3 == pytest.approx(
        expected.nc3, rel=1e-6
    )
    assert result.held_out_nc1 == pytest.approx(result.nc1, rel=1e-9)


def test_too_many_classes_for_all_pairs():
    with pytest.raises(Unsupported, match=r"The labels hold 5,001 classes; .* up to 5,000: measure on the exa"):
        neural_collapse(features=torch.randn(5001, 2), labels=torch.arange(5001))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"labels": torch.zeros(K * N, dtype=torch.long)}, r"The labels hold one class \(0\); .* at least two"),
        ({"labels": LABELS[:-1]}, "labels have 199 examples and features have 200"),
        ({"classifier": (torch.zeros(K, 7), torch.zeros(K))}, r"expected \(classes, 32\) and \(classes,\)"),
        (
            {"classifier": (torch.zeros(4, D), torch.zeros(4))},
            "The labels go up to 9; the classifier has only 4 classes",
        ),
        ({"features": torch.full((K * N, D), math.nan)}, "features are not finite in 200 of 200 rows"),
    ],
)
def test_refusals(change, text):
    with pytest.raises(InvalidInput, match=text):
        neural_collapse(**(collapsed() | change))
