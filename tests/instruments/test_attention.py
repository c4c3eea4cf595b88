"""Attention: closed forms on planted scores, one answer for every way of writing it, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.attention import attention as measure
from diag.result import Level
from diag.snapshot.inside.attention import EXAMPLES_OF_A_CALL, AttentionCall, _chosen, attention_calls
from diag.snapshot.inside.scores import (
    ENTROPY,
    GAP,
    KEYS,
    LOGIT,
    MARGIN,
    SPREAD,
    WEIGHT,
    row_statistics,
)
from diag.testing import check_result, leaves_no_trace, refusal

WIDTH, HEADS, LENGTH = 12, 3, 7


class Written(nn.Module):
    """One self-attention with the same weights, written in four ways; `how` says which."""

    def __init__(self, how, causal=False):
        super().__init__()
        self.how, self.causal = how, causal
        torch.manual_seed(0)
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.qkv.weight.data, self.qkv.bias.data = self.inner.in_proj_weight.data, self.inner.in_proj_bias.data

    def forward(self, x):
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if self.causal else None
        if self.how.startswith("module"):
            return self.inner(x, x, x, attn_mask=mask, need_weights=self.how == "module with weights")[0].mean(1)
        q, k, v = (p.view(len(x), LENGTH, HEADS, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        if self.how == "function":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(mask, -torch.inf) if self.causal else scores
            out = F.dropout(scores.softmax(-1), 0.1, self.training) @ v
        return out.transpose(1, 2).flatten(2).mean(1)


WAYS = ["module", "module with weights", "function", "by hand"]


def snapshot(model, n=5):
    x = torch.randn(n, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    return diag.Snapshot(model, None, (x, torch.zeros(n, dtype=torch.long)))


def call(scores, dtype="float32"):
    return AttentionCall("a", dtype, row_statistics(scores), (math.nan,) * scores.shape[1])


# -- closed forms
# ---------------------------------------------------------------------------------------------------


def test_uniform_one_hot_and_planted_scores():
    """Rounding of a float64 softmax over 8 keys: 1e-12 is a thousand units."""
    level, sharp = torch.zeros(1, 1, 1, 8), torch.tensor([0.0] * 7 + [800.0]).view(1, 1, 1, 8)
    even, one = (row_statistics(s)[0, 0] for s in (level, sharp))
    assert even[ENTROPY] == pytest.approx(1, abs=1e-12) and even[WEIGHT] == pytest.approx(1 / 8, abs=1e-12)
    assert even[MARGIN] == pytest.approx(-math.log(7), abs=1e-12) and even[GAP] == 0 == even[SPREAD]
    assert one[ENTROPY] == 0 and one[WEIGHT] == 1 and one[GAP] == 800 == one[LOGIT]
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    planted = row_statistics(p.log().view(1, 1, 1, 3))[0, 0]
    assert planted[ENTROPY] == pytest.approx(1.5 * math.log(2) / math.log(3), abs=1e-12)
    assert planted[GAP] == pytest.approx(math.log(2), abs=1e-12) and planted[MARGIN] == pytest.approx(0, abs=1e-12)


def test_keys_that_may_not_be_seen_do_not_count():
    scores = torch.tensor([[0.0, 0.0, -torch.inf], [3.0, -torch.inf, -torch.inf], [-torch.inf] * 3])
    rows = row_statistics(scores.view(1, 1, 3, 3))[0]
    assert rows[0, ENTROPY] == pytest.approx(1, abs=1e-12) and rows[0, KEYS] == 2
    assert rows[1:].isnan().all()  # one key, none: nothing to choose


def test_margins_grow_with_the_scale_and_entropies_fall():
    scores = torch.randn(4, 2, 5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    courses = torch.stack([row_statistics(scores * c).mean((0, 1)) for c in (0.5, 1, 2, 4)])
    assert (courses.diff(dim=0)[:, [GAP, WEIGHT, MARGIN]] > 0).all() and (courses[:, ENTROPY].diff() < 0).all()
    shifted = row_statistics(scores + 50)
    blind = [ENTROPY, WEIGHT, GAP, MARGIN, SPREAD]
    assert torch.allclose(shifted[..., blind], row_statistics(scores)[..., blind], atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding_to_one_key_begins_at_b_ln_2(dtype):
    """Two keys, so that the margin is the gap: 1 + e^-m rounds to 1 from m = b ln 2 on, and not 1e-3 below."""
    edge = {"float32": 24, "float64": 53}[dtype] * math.log(2)
    for gap, rounds in ((edge - 1e-3, 0.0), (edge + 1e-3, 1.0)):
        scores = torch.tensor([0.0, gap], dtype=torch.float64)
        assert measure(attention_calls=[call(scores.view(1, 1, 1, 2), dtype)]).collapsed == rounds
        one = torch.ones((), dtype=getattr(torch, dtype))
        assert bool(one + torch.tensor(-gap, dtype=one.dtype).exp() == 1) == bool(rounds)


# -- hearing it in a model
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("how", WAYS)
def test_every_way_of_writing_it_gives_the_dense_numbers(how, causal):
    """Against float64 scores by the formula; float32 products of width 4 round at 1e-7 of scores of order 1."""
    model = Written(how, causal)
    given = snapshot(model)
    with leaves_no_trace(model):
        found = attention_calls(given)
    x = given.batches[0].args[0].double()
    q, k, _ = (x @ model.qkv.weight.double().T + model.qkv.bias.double()).chunk(3, -1)
    q, k = (p.view(len(x), LENGTH, HEADS, -1).transpose(1, 2) for p in (q, k))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf)
    assert len(found) == 1
    assert torch.allclose(found[0].rows, row_statistics(scores), atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("how", ["module", "function"])
def test_the_norm_of_query_times_key_weights(how):
    """Against the dense product in float64, relative 1e-6."""
    model = Written(how)
    q, k = (w.double() for w in model.qkv.weight.chunk(3)[:2])
    dense = [float((a.T @ b).detach().norm()) for a, b in zip(q.chunk(HEADS), k.chunk(HEADS), strict=True)]
    assert attention_calls(snapshot(model))[0].weight_norms == pytest.approx(dense, rel=1e-6)


class Grouped(nn.Module):
    """Four query heads share two key heads, with a scale and a mask of floats of their own."""

    def forward(self, x):
        q, k = x.view(len(x), LENGTH, 4, 3).transpose(1, 2), x[..., :6].view(len(x), LENGTH, 2, 3).transpose(1, 2)
        mask = torch.zeros(LENGTH, LENGTH).index_fill(1, torch.tensor([2]), -torch.inf)
        return F.scaled_dot_product_attention(q, k, k, mask, scale=0.2, enable_gqa=True).flatten(1)


def test_grouped_heads_scale_and_mask():
    given = snapshot(Grouped())
    (found,) = attention_calls(given)
    x = given.batches[0].args[0].double()
    q = x.view(len(x), LENGTH, 4, 3).transpose(1, 2)
    k = x[..., :6].view(len(x), LENGTH, 2, 3).transpose(1, 2).repeat_interleave(2, 1)
    scores = 0.2 * q @ k.transpose(-2, -1)
    scores[..., 2] = -torch.inf
    assert torch.allclose(found.rows, row_statistics(scores), atol=2e-6)


def test_padding_and_encoder_layers():
    """torch's fast path hides the attention; measuring does not take it."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x):
            padding = torch.zeros(len(x), LENGTH, dtype=torch.bool)
            padding[0, 4:] = True
            return self.layers(x, src_key_padding_mask=padding).mean(1)

    calls = attention_calls(snapshot(Encoder(), n=2))
    assert [c.layer for c in calls] == ["layers.layers.0.self_attn", "layers.layers.1.self_attn"]
    keys = calls[0].rows[0, :, KEYS]
    assert keys.tolist() == [4.0] * LENGTH + [7.0] * LENGTH


def test_what_is_looked_at_is_bounded_and_holds_the_last_query():
    assert _chosen(1000)[-1] == 999 and len(_chosen(1000)) <= 64 and _chosen(5) == [0, 1, 2, 3, 4]
    (found,) = attention_calls(snapshot(Written("function"), n=100))
    assert found.rows.shape == (HEADS, EXAMPLES_OF_A_CALL * LENGTH, 7)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.out = nn.LSTM(WIDTH, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.cells(x)[0][:, -1]).softmax(-1)


def test_a_model_without_attention_is_refused():
    assert "calls no attention that is recognised" in refusal(measure, snapshot(Recurrent()))
    assert "no attention among what was given" in refusal(measure, attention_calls=[])


def test_the_result_describes_and_says_how_it_moved():
    scores = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    first, last = (measure(attention_calls=[call(scores * c)]) for c in (1, 300))
    check_result(last)
    assert first.verdict().level is last.verdict().level is Level.DESCRIPTION
    assert first.one_hot_heads == 0 and last.one_hot_heads == 1
    assert "From step 1 to 9 the median entropy went from" in type(last).trend([(1, first), (9, last)]).sentence
    broken = measure(attention_calls=[call(torch.full((1, 1, 2, 3), torch.nan))])
    assert broken.verdict().level is Level.NOT_APPLICABLE and "0 of 1 heads" in broken.verdict().sentence


# -- masks that are added


@pytest.mark.parametrize("mask", [-1e4, -1e9, float(torch.finfo(torch.float32).min), -65504.0])
@pytest.mark.parametrize("added", [True, False])
def test_a_large_negative_number_is_a_mask(mask, added):
    scores = 3 * torch.randn(2, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    masked = scores + future * mask if added else scores.masked_fill(future, mask)
    expected = row_statistics(scores.masked_fill(future, -torch.inf))
    torch.testing.assert_close(row_statistics(masked), expected, rtol=1e-6, atol=1e-9, equal_nan=True)
    assert row_statistics(masked)[0, -1, KEYS] == LENGTH and row_statistics(masked)[0, 1, KEYS] == 2


def test_scores_that_have_grown_large_are_no_mask():
    scores = 8000 * torch.randn(2, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    assert (row_statistics(scores)[0, :, KEYS] == 20).all()
