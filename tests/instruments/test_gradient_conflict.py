"""Gradient conflict against closed forms and dense gradients."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.errors import InvalidInput
from diag.gradients import MatrixGradients, ModelGradients
from diag.instruments.gradient_conflict.instrument import sign_flip_rate, stack_losses
from diag.linalg.coherence import random_blocks
from diag.result import Level
from diag.snapshot.reading.forms import as_batch
from diag.testing import refusal

conflict = diag.gradient_conflict


def measure(matrix, labels, layers=None):
    return conflict(per_example_gradients=MatrixGradients(matrix.double(), layers), labels=torch.as_tensor(labels))


def two(first, second, n=20, noise=0.0):
    torch.manual_seed(0)
    matrix = torch.cat([torch.as_tensor(first).expand(n, -1), torch.as_tensor(second).expand(n, -1)]).double()
    return measure(matrix + noise * torch.randn_like(matrix), torch.arange(2).repeat_interleave(n))


def test_equal_opposite_and_orthogonal_gradients():
    g = torch.tensor([3.0, -1.0, 2.0])
    same, opposite = two(g, 2 * g), two(g, -g)
    assert same.lowest == pytest.approx(1) and same.length_kept == pytest.approx(1)
    assert opposite.lowest == pytest.approx(-1) and opposite.length_kept == pytest.approx(0, abs=1e-7)
    assert opposite.conflicting_pairs == 1.0 and same.conflicting_pairs == 0.0
    apart = two(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    assert apart.lowest == pytest.approx(0, abs=1e-12)
    assert apart.length_kept == pytest.approx(math.sqrt(5) / 3)


def test_quadratic_losses_of_two_tasks():
    """Losses 1/2 |w - a|^2 and 1/2 |w - b|^2 at w: the gradients are w - a and w - b."""

    class Point(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.w = nn.Parameter(w)

        def forward(self, x):
            return self.w.expand(len(x), -1) + 0 * x

    w, a, b = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 2.0], [0.0, 2.0], [3.0, 3.0]))
    model = Point(w)

    def loss_fn(outputs, targets):
        return 0.5 * (outputs - targets).square().sum(1).mean()

    tasks = {
        name: ModelGradients(model, loss_fn, [as_batch((torch.zeros(4, 2).double(), target.expand(4, 2)))])
        for name, target in (("a", a), ("b", b))
    }
    gradients, labels = stack_losses(tasks)
    result = conflict(per_example_gradients=gradients, labels=labels)
    expected = F.cosine_similarity((w - a)[None], (w - b)[None])
    assert result.lowest == pytest.approx(float(expected), rel=1e-10)
    assert result.groups == (0, 1) and result.num_examples == 8


def test_a_network_against_its_dense_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(60, 5).double(), torch.arange(60) % 3
    result = conflict(diag.Snapshot(model, F.cross_entropy, (x, y), micro_batch=13))
    means = []
    for c in range(3):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[y == c]), y[y == c]), list(model.parameters()))
        means.append(torch.cat([g.flatten() for g in gradients]))
    means = torch.stack(means)
    units = F.normalize(means, dim=1)
    torch.testing.assert_close(torch.tensor(result.cosines), units @ units.T, rtol=1e-10, atol=1e-10)
    assert result.length_kept == pytest.approx(float(means.sum(0).norm() / means.norm(dim=1).sum()), rel=1e-10)
    first = F.normalize(means[:, :42], dim=1) @ F.normalize(means[:, :42], dim=1).T
    assert result.lowest_by_layer["0"] == pytest.approx(float(first.min()), rel=1e-10)


T_OF_TEN = 2.2622  # the 97.5 % point of Student's distribution with nine degrees of freedom (any table)


def test_noise_pulls_cosines_to_zero_and_the_correction_does_not():
    """200 draws of two groups with true cosine -.6 under noise three times the signal in 10 dimensions."""
    torch.manual_seed(1)
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-0.6, 0.8])
    raw, corrected, errors = [], [], []
    for _ in range(200):
        matrix = torch.zeros(80, 10).double()
        matrix[:40, :2], matrix[40:, :2] = a.double(), b.double()
        result = measure(matrix + torch.randn_like(matrix), torch.arange(2).repeat_interleave(40))
        raw.append(result.lowest)
        corrected.append(result.lowest_corrected)
        errors.append(result.lowest_standard_error)
    known = torch.tensor(corrected)
    known = known[~known.isnan()]
    assert len(known) > 190 and bool((known.abs() <= 1).all())  # beyond 1 noise leaves no cosine
    mean, spread = known.mean(), known.std()
    assert abs(float(mean) + 0.6) < 4 * float(spread) / 200**0.5 + 0.02  # the ratio's own bias is of order 1/n
    assert sum(raw) / 200 > -0.55
    assert sum(errors) / 200 == pytest.approx(float(torch.tensor(raw).std()) * T_OF_TEN / 2, rel=0.3)


def test_conflict_within_noise_is_not_counted():
    result = two(torch.tensor([1.0, 0.0]), torch.tensor([-0.02, 1.0]), noise=1.0)
    assert result.conflicting_pairs == 0.0


def test_layers_can_conflict_alone():
    matrix = torch.tensor([[1.0, 0.0, 5.0]] * 4 + [[-1.0, 0.0, 5.0]] * 4)
    result = measure(matrix, [0] * 4 + [1] * 4, {"first": 2, "second": 1})
    assert result.lowest_by_layer == {"first": pytest.approx(-1), "second": pytest.approx(1)}
    assert result.lowest > 0.9


def test_it_describes_and_does_not_judge():
    verdict = two(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.1])).verdict()
    assert verdict.level == Level.NOT_APPLICABLE and "has not been tested" in verdict.sentence
    zero = two(torch.zeros(2), torch.zeros(2))
    assert "have no direction" in zero.verdict().sentence


def test_sign_flips_over_time():
    g, h = torch.tensor([1.0, 0.2]), torch.tensor([1.0, 0.1])
    series = [two(g, h), two(g, -h), two(g, h), two(g, h)]
    assert sign_flip_rate(series) == pytest.approx(2 / 3)
    assert "changed sign in 66.7 %" in type(series[0]).trend(list(enumerate(series))).sentence
    assert math.isnan(sign_flip_rate(series[:1]))


def test_refusals():
    matrix = torch.randn(6, 3)
    given = {"per_example_gradients": MatrixGradients(matrix)}
    assert "(5,) for 6 examples" in refusal(conflict, labels=torch.arange(5), **given)
    assert "name at least two" in refusal(conflict, labels=torch.zeros(6, dtype=torch.long), **given)
    with pytest.raises(InvalidInput, match="not of the same parameters"):
        stack_losses({"a": MatrixGradients(matrix), "b": MatrixGradients(matrix[:, :2])})


# -- named losses on the same examples
# --------------------------------------------------------------------------------


def pulled_to(target):
    """1/2 |w - target|^2 of a weight that the model gives for every example: gradient w - target."""
    return lambda outputs, targets: 0.5 * (outputs - target).square().sum(1).mean()


class Weight(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.weight = nn.Parameter(w)

    def forward(self, x):
        return self.weight.expand(len(x), -1) * torch.ones_like(x[:, :1])


def test_named_losses_have_the_cosine_of_their_pulls():
    """Quadratics with minima a and b at w: cos(w - a, w - b), and w + w - a - b over the lengths; float64."""
    w, a, b = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 2.0, 0.0], [0.0, 3.0, 1.0], [2.0, 0.5, 0.5]))
    given = diag.Snapshot(Weight(w.clone()), None, (torch.randn(20, 2).double(), torch.zeros(20)))
    found = diag.loss_conflict(given, {"a": pulled_to(a), "b": pulled_to(b)})
    u, v = w - a, w - b
    assert found.lowest == pytest.approx(float(u @ v / u.norm() / v.norm()), rel=1e-9)
    assert found.length_kept == pytest.approx(float((u + v).norm() / (u.norm() + v.norm())), rel=1e-9)
    assert found.groups == (0, 1) and "0 is a, 1 is b" in found.notes[-1]


def test_a_loss_and_itself_and_its_opposite():
    problem = diag.testing.classification()
    plain, given = F.cross_entropy, problem.snapshot()
    assert diag.loss_conflict(given, {"one": plain, "two": plain}).lowest == pytest.approx(1, abs=1e-6)
    opposite = diag.loss_conflict(given, {"one": plain, "two": lambda z, y: -plain(z, y)})
    assert opposite.lowest == pytest.approx(-1, abs=1e-6) and opposite.length_kept < 1e-3
    with pytest.raises(InvalidInput, match="expected two or more"):
        diag.loss_conflict(given, {"one": plain})


# -- the noise floor
# ----------------------------------------------------------------------------------------------------


def halves_one_by_one(first, second, blocks):
    """The mean over all halvings of the cosine of `first` on one half and `second` on the other, by a loop."""
    found = []
    for chosen in itertools.combinations(range(len(blocks)), len(blocks) // 2):
        half = torch.cat([blocks[b] for b in chosen])
        rest = torch.cat([block for b, block in enumerate(blocks) if b not in chosen])
        for a, b in ((first[half].sum(0), second[rest].sum(0)), (first[rest].sum(0), second[half].sum(0))):
            found.append(float(F.cosine_similarity(a, b, dim=0)))
    return sum(found) / len(found)


def test_halves_are_those_of_a_loop_over_all_of_them():
    """Two losses on the same 24 examples, dense float64 matrices; every entry to rounding."""
    torch.manual_seed(0)
    matrices = torch.randn(2, 24, 5).double() + 0.4
    gradients, labels = stack_losses({str(i): MatrixGradients(m, {"a": 2, "b": 3}) for i, m in enumerate(matrices)})
    found = conflict(per_example_gradients=gradients, labels=labels, seed=3)
    blocks = random_blocks(24, 10, 3)
    for i, j in itertools.product(range(2), repeat=2):
        expected = halves_one_by_one(matrices[i], matrices[j], blocks)
        assert found.across_halves[i, j] == pytest.approx(expected, rel=1e-10)
    first = halves_one_by_one(matrices[0][:, :2], matrices[1][:, :2], blocks)
    own = [halves_one_by_one(m[:, :2], m[:, :2], blocks) for m in matrices]
    assert found.lowest_across_halves_by_layer["a"] == pytest.approx(first, rel=1e-10)
    assert found.noise_floor_by_layer["a"] == pytest.approx(math.sqrt(own[0] * own[1]), rel=1e-10)
    assert found.lowest_across_halves == found.across_halves[0, 1]
    assert found.noise_floor == pytest.approx(math.sqrt(found.across_halves[0, 0] * found.across_halves[1, 1]))


def test_losses_that_share_nothing_but_their_examples_do_not_agree_across_halves():
    """Means at a right angle under noise that both share. In P = 400 dimensions with noise of deviation s and n
    examples the cosine is near s^2 P / n over 1 + s^2 P / n, and 0 across halves; the floor is 1 over 1 + 2 s^2 P
    / n.
    """
    torch.manual_seed(2)
    n, p, s = 200, 400, 0.5
    noise = s * torch.randn(n, p).double()
    units = torch.eye(p, dtype=torch.float64)[:2]
    gradients, labels = stack_losses(
        {name: MatrixGradients(noise + u) for name, u in zip("ab", units, strict=True)}
    )
    found = conflict(per_example_gradients=gradients, labels=labels)
    shared = s**2 * p / n
    assert found.lowest == pytest.approx(shared / (1 + shared), abs=0.1)
    assert found.lowest_across_halves == pytest.approx(0, abs=0.1)
    assert found.noise_floor == pytest.approx(1 / (1 + 2 * shared), abs=0.1)
    assert "on different halves of the examples" in found.verdict().sentence


def test_noise_alone_leaves_no_floor():
    """Groups of opposite pairs have no mean: no half agrees with the rest, and it is said so."""
    torch.manual_seed(0)
    rows = torch.randn(20, 3).double()
    found = measure(torch.cat([rows - rows.mean(0), rows]), torch.arange(2).repeat_interleave(20))
    assert math.isnan(found.noise_floor) and "noise leaves nothing of a cosine of 1" in found.verdict().sentence
