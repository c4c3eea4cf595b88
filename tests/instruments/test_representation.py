"""Representations over depth: closed forms on planted features, brute force for the U-statistic, memory of
streams."""

import copy
import itertools
import math

import numpy
import pytest
import torch
from torch import nn

import diag
from diag.instruments.collapse_by_layer import collapse_by_layer
from diag.instruments.representation import representation
from diag.linalg.geometry.class_stream import ClassStream
from diag.linalg.geometry.similarity import centred_gram, cka_between
from diag.result import Level
from diag.snapshot.inside.layers import LayerOutputs
from diag.testing import check_result, classification, leaves_no_trace, refusal, simplex_etf


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- representation
# -------------------------------------------------------------------------------------------------


def test_independent_dimensions_have_no_redundancy_beyond_chance():
    """Mean of 2016 squared correlations of variance 2/n^2: standard error 2/n/sqrt(2016) * ... < 5e-5; 4 of
    them."""
    found = representation(normal(1000, 64))
    assert abs(found.redundancy) < 2e-4 and found.dead == 0 and found.duplicates[0] == 0
    assert 58 < found.effective_rank < 64  # Marchenko-Pastur with ratio .064 costs a few per cent


def test_planted_rank_duplicates_and_dead_dimensions():
    low = normal(500, 3) @ normal(3, 20, seed=1)
    found = representation(low)
    assert found.effective_rank <= 3 + 1e-9
    x = normal(800, 6)
    x = torch.cat([x, 3 * x[:, :2] - 1, torch.full((800, 2), 7.0, dtype=torch.float64)], 1)
    found = representation(x)
    assert found.dead == pytest.approx(0.2) and found.duplicates[0] == pytest.approx(2 / 8)
    # Two of 28 pairs have correlation 1; the others are within chance, whose mean is subtracted.
    assert found.redundancy == pytest.approx(2 / 28, abs=0.002)
    check_result(found)


def test_equal_variances_have_full_rank_and_unequal_ones_the_entropy():
    """An orthogonal design makes the covariance exactly diagonal; rounding of float64 sums."""
    basis = torch.linalg.qr(torch.cat([torch.ones(64, 1, dtype=torch.float64), normal(64, 4)], 1))[0][:, 1:]
    assert representation(basis).effective_rank == pytest.approx(4, abs=1e-9)
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    entropy = float(-(p * p.log()).sum())
    assert representation(basis * p.sqrt()).effective_rank == pytest.approx(math.exp(entropy), abs=1e-9)


def test_constant_features_are_degenerate():
    verdict = representation(torch.full((50, 4), 3.3)).verdict()
    assert verdict.level is Level.NOT_APPLICABLE and "degenerate" in verdict.sentence


def hsic_by_tuples(k, m):
    """The U-statistic as the mean over all ordered 4-tuples of distinct examples (Song et al. 2012, Eq. 2)."""
    values = [
        k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in itertools.permutations(range(len(k)), 4)
    ]
    return float(sum(values) / len(values))


def unbiased_hsic(k, m):
    """The same in closed form (Song et al. 2012, Eq. 5)."""
    n = len(k)
    k, m = (a - torch.diag(a.diagonal()) for a in (k, m))
    rows = k.sum(0), m.sum(0)
    total = (k * m).sum() + rows[0].sum() * rows[1].sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows[0] @ rows[1]
    return float(total) / (n * (n - 3))


def cka_of_pair(k, m):
    return unbiased_hsic(k, m) / math.sqrt(unbiased_hsic(k, k) * unbiased_hsic(m, m))


def jackknife_of_pair(k, m, blocks=10):
    """Without every tenth example, from each beginning: the spread of what is left."""
    rest = [[i for i in range(len(k)) if i % blocks != b] for b in range(blocks)]
    without = [cka_of_pair(k[r][:, r], m[r][:, r]) for r in rest]
    return math.sqrt(numpy.var(without) * (blocks - 1))


def test_hsic_is_the_mean_over_all_tuples():
    k, m = centred_gram(normal(6, 3)), centred_gram(normal(6, 4, seed=2))
    assert unbiased_hsic(k, m) == pytest.approx(hsic_by_tuples(k, m), abs=1e-12)


def test_cka_is_one_for_a_rotation_and_zero_for_independent_features():
    """200 draws of independent features, wide for their number: mean 0 within four standard errors, where the
    biased estimate is about d/(d + n)."""
    x = normal(40, 5)
    q = torch.linalg.qr(normal(5, 5, seed=3))[0]
    found, _ = cka_between([centred_gram(x), centred_gram(2.5 * x @ q + 1)])
    assert found[0, 1] == pytest.approx(1, abs=1e-12)
    draws = [
        float(cka_between([centred_gram(normal(20, 30, seed=s)) for s in (i, 1000 + i)])[0][0, 1])
        for i in range(200)
    ]
    assert abs(numpy.mean(draws)) < 4 * numpy.std(draws) / math.sqrt(200)


def test_cka_of_three_examples_is_unknown_and_of_four_is_not():
    """The U-statistic divides by n (n - 3)."""
    grams = [centred_gram(normal(4, 5, seed=i)) for i in range(2)]
    assert all(found.isnan().all() for found in cka_between([g[:3, :3] for g in grams]))
    cka, error = cka_between(grams)
    assert cka.isfinite().all() and error.isnan().all()


def test_all_pairs_at_once_are_the_pairs_one_by_one():
    grams = [centred_gram(normal(60, d, seed=d) + normal(60, 1, seed=1)) for d in (3, 5, 80)]
    cka, errors = cka_between(grams)
    for i, j in itertools.product(range(3), repeat=2):
        pair = grams[i], grams[j]
        assert cka[i, j] == pytest.approx(cka_of_pair(*pair), rel=1e-9, abs=1e-12)
        assert errors[i, j] == pytest.approx(jackknife_of_pair(*pair), rel=1e-9, abs=1e-12)


def test_jackknife_covers_the_spread_between_draws():
    """The ratio of an error from ten blocks to the spread of 60 draws: within a factor of 1.6."""
    mix = normal(4, 6, seed=9)

    def draw(i):
        x = normal(200, 4, seed=i)
        return representation({"a": x, "b": x @ mix + 2 * normal(200, 6, seed=500 + i)}, compared=200)

    found = [draw(i) for i in range(60)]
    spread = numpy.std([f.cka[0, 1] for f in found])
    assert 1 / 1.6 < numpy.mean([f.cka_errors[0, 1] for f in found]) / spread < 1.6


def test_on_a_snapshot_with_an_earlier_state():
    problem = classification()
    with leaves_no_trace(problem.model):
        found = representation(problem.snapshot())
    assert found.layers == ("input", "0", "1", "2", "3", "4") and found.widths == (8, 12, 12, 10, 10, 3)
    assert numpy.allclose(numpy.diag(found.cka), 1) and found.previous_cka > 0.9
    assert 0.9 < found.invariance < 1 and found.invariances[0] == pytest.approx(1 / math.sqrt(1.01), abs=0.02)
    same = representation(problem.snapshot(previous=copy.deepcopy(problem.model.state_dict())))
    assert same.previous_cka == pytest.approx(1, abs=1e-9)


def dense(x):
    """Effective rank, duplicates and redundancy of features in memory, by the definitions, in float64."""
    c = torch.from_numpy(numpy.cov(x.double().numpy().T, bias=True))
    p = torch.linalg.eigvalsh(c).clamp_min(0)
    p = p[p > 0] / p.sum()
    r = torch.from_numpy(numpy.corrcoef(x.double().numpy().T))
    n, d = x.shape
    redundancy = float(r.square().sum() - d) / (d * (d - 1)) - 1 / (n - 1)
    return (
        math.exp(-float((p * p.log()).sum())),
        float((r.abs() > 0.999).triu(1).any(0).double().mean()),
        redundancy,
    )


@pytest.mark.parametrize("block", [1, 7, 64, 500])
def test_a_stream_of_blocks_gives_the_dense_numbers_and_keeps_no_more_rows_than_it_compares(block):
    """Means a thousand standard deviations from zero, float32: what is lost is 1e6 eps of float64, 2e-10."""
    x = (normal(500, 8) @ normal(8, 12, seed=1) + 1000).float()
    x[:, 11] = x[:, 10]

    def visit(take, noise):
        for start in range(0, len(x), block):
            take("a", x[start : start + block].clone(), start)
            take("b", x[start : start + block, :5].clone(), start)

    found = representation(LayerOutputs(visit, None), compared=60)
    rank, duplicates, redundancy = dense(x)
    assert found.effective_ranks[0] == pytest.approx(rank, rel=1e-8)
    assert found.duplicates[0] == duplicates == pytest.approx(1 / 12)
    assert found.redundancies[0] == pytest.approx(redundancy, rel=1e-8, abs=1e-9)
    rows = x[:: math.ceil(500 / 60)].double()
    assert found.num_compared == len(rows) and found.num_rows == 500
    pair = centred_gram(rows), centred_gram(rows[:, :5])
    assert found.cka[0, 1] == pytest.approx(cka_of_pair(*pair), rel=1e-9)


# -- neural collapse by layer
# ---------------------------------------------------------------------------------------

K, N = 5, 30
LABELS = torch.arange(K).repeat_interleave(N)


def test_planted_noise_has_the_closed_form_at_every_layer():
    """NC1~ = d sigma^2 (n-1)/n over Tr S_B, to which the noise of the means adds (K-1)/K d sigma^2/n.

    Within four standard errors: sqrt(2 / (K n d)) of the numerator, 2 sigma / sqrt(K n) of the denominator.
    """
    d, each = 16, 200
    labels = torch.arange(K).repeat_interleave(each)
    frame = simplex_etf(K, d)
    sigmas = (1.0, 0.3, 0.05)
    layers = {f"l{i}": frame[labels] + s * normal(len(labels), d, seed=i) + 2 for i, s in enumerate(sigmas)}
    found = collapse_by_layer(layers, labels)
    for s, ratio in zip(sigmas, found.nc1_ratio, strict=True):
        between = 1 + d * s**2 / each * (K - 1) / K
        error = 4 * (math.sqrt(2 / (K * each * d)) + 2 * s / math.sqrt(K * each))
        assert ratio == pytest.approx(d * s**2 * (1 - 1 / each) / between, rel=error)
    assert found.falling == 1 and found.mistakes[-1] == 0 and found.first_separated == 1
    check_result(found)
    assert found.verdict().level is Level.DESCRIPTION


def test_an_exact_simplex_is_zero_at_every_width():
    frame = simplex_etf(K, 8)
    found = collapse_by_layer({"a": frame[LABELS] + 0.3, "b": 7 * frame[LABELS]}, LABELS)
    zeros = [found.nc1, found.nc1_ratio, found.nc2, found.mistakes]
    assert max(float(abs(z).max()) for z in zeros) < 1e-12


def test_imbalance_does_not_decide_and_blocks_do_not_matter():
    """The mean over classes, against the dense definition; the same from blocks of 7 rows."""
    sizes = [100, 40, 10, 5]
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    h = normal(len(labels), 6) + 3 * torch.eye(4, 6, dtype=torch.float64)[labels]
    means = torch.stack([h[labels == k].mean(0) for k in range(4)])
    within = torch.stack([(h[labels == k] - means[k]).square().sum(1).mean() for k in range(4)]).mean()
    between = (means - means.mean(0)).square().sum() / 4
    found = collapse_by_layer({"a": h}, labels)
    assert found.nc1_ratio[0] == pytest.approx(float(within / between), rel=1e-12)
    assert (found.smallest_class, found.largest_class) == (5, 100)
    stream = ClassStream(labels)
    for work in (stream.add, stream.add_spread):
        for i in range(0, len(h), 7):
            work(h[i : i + 7], i)
        if work == stream.add:
            stream.means()
    assert stream.within_over_between() == pytest.approx(found.nc1[0], rel=1e-12)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out = nn.Embedding(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.out(self.embedding(x))


def test_tokens_are_examples_where_labels_are_one_each():
    """A layer that depends on the token alone has collapsed exactly onto the tokens' classes."""
    x = torch.randint(4, (10, 7), generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[:, 0] = -100
    found = collapse_by_layer(diag.Snapshot(Tokens(), None, (x, y)))
    assert found.layers == ("embedding", "out") and found.nc1_ratio.max() < 1e-12 and found.smallest_class > 0


def test_held_out_examples_are_measured_around_the_training_means():
    problem = classification()
    with leaves_no_trace(problem.model):
        found = collapse_by_layer(problem.snapshot())
    assert found.layers[0] == "input" and len(found.held_out_nc1_ratio) == len(found.layers)
    again = collapse_by_layer(problem.snapshot(held_out=problem.data))
    assert again.held_out_nc1_ratio == pytest.approx(again.nc1_ratio, rel=1e-9)
    assert again.held_out_mistakes == pytest.approx(again.mistakes)


def test_convolutions_are_averaged_over_positions_and_sequences_too():
    torch.manual_seed(0)
    images = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 2))
    x, y = torch.randn(8, 1, 6, 6), torch.arange(8) % 2
    assert representation(diag.Snapshot(images, None, (x, y))).widths == (1, 3, 3, 2)
    waves = nn.Sequential(nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    assert representation(diag.Snapshot(waves, None, (torch.randn(8, 1, 6), y))).widths[1:] == (3, 3, 2)
    recurrent = nn.LSTM(3, 5, batch_first=True)
    assert representation(diag.Snapshot(recurrent, None, (torch.randn(8, 4, 3), y))).widths == (3, 5)


class Reader(nn.Module):
    """Classifies by the mean of its tokens, the mask by one of the names in use."""

    def __init__(self, padding=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 6, padding_idx=padding)
        self.layer, self.out = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x, attention_mask=None, src_key_padding_mask=None):
        return self.out(self.layer(self.embedding(x)).mean(1))


@pytest.mark.parametrize(
    "how", ["attention_mask", "by position", "src_key_padding_mask", "padding index", "nothing"]
)
def test_padding_is_left_out_of_the_mean_where_something_says_which_it_is(how):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 9, (20, 7), generator=generator)
    tokens = torch.arange(7) < torch.randint(2, 8, (20, 1), generator=generator)
    tokens[3] = False  # an example of padding alone counts with all that it has
    x = x * tokens
    model, y = Reader(0 if how == "padding index" else None), torch.arange(20) % 3
    mask = {"attention_mask": tokens.long(), "by position": tokens.float(), "src_key_padding_mask": ~tokens}
    batch = {"x": x, "labels": y} | ({how: mask[how]} if how in mask else {})
    if how == "by position":
        batch = (x, mask[how]), y
    used = torch.ones_like(tokens) if how == "nothing" else tokens | ~tokens.any(1, keepdim=True)
    rows = (model.layer(model.embedding(x)) * used[..., None]).sum(1) / used.sum(1, keepdim=True)
    found = representation(diag.Snapshot(model, nn.CrossEntropyLoss(), batch))
    assert found.effective_ranks[found.layers.index("layer")] == pytest.approx(dense(rows.detach())[0], rel=1e-5)


@pytest.mark.parametrize("channels", [7, 5])  # seven tokens: as many as channels, and not
def test_padding_is_left_out_after_a_convolution_too(channels):
    torch.manual_seed(0)
    x = torch.randint(1, 9, (20, 7)) * (torch.arange(7) < torch.randint(2, 8, (20, 1)))
    embedding, layer = nn.Embedding(9, 6, padding_idx=0), nn.Conv1d(6, channels, 1)

    class Convolved(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layer, self.out = embedding, layer, nn.Linear(channels, 3)

        def forward(self, x):
            return self.out(self.layer(self.embedding(x).transpose(1, 2)).mean(2))

    z, used = layer(embedding(x).transpose(1, 2)).detach(), (x != 0)[:, None]
    rows = (z * used).sum(2) / used.sum(2)
    found = representation(diag.Snapshot(Convolved(), nn.CrossEntropyLoss(), (x, torch.arange(20) % 3)))
    assert found.effective_ranks[found.layers.index("layer")] == pytest.approx(dense(rows)[0], rel=1e-5)


def test_a_loss_among_the_modules_is_no_layer():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.loss = nn.Linear(4, 3), nn.CrossEntropyLoss()

        def forward(self, x, labels):
            z = self.layer(x)
            return {"logits": z, "loss": self.loss(z, labels)}

    found = representation(diag.Snapshot(WithLoss(), None, {"x": torch.randn(9, 4), "labels": torch.arange(9) % 3}))
    assert found.layers == ("layer",)


def test_refusals():
    assert "one class" in refusal(
        collapse_by_layer, layer_outputs={"a": normal(4, 2)}, labels=torch.zeros(4).long()
    )
    wrong = {"layer_outputs": {"a": normal(5, 2)}, "labels": torch.arange(4) % 2}
    assert "no layer gives one row" in refusal(collapse_by_layer, **wrong)
