"""The check of attention heads: one key from the start, logits that grow, an even spread, and what is healthy."""

import dataclasses

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.causes import Cause
from diag.instruments.network.attention_heads import AttentionHeads
from diag.snapshot.history import empty_history


class Reader(nn.Module):
    def __init__(self, scale, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.scale = nn.Linear(width, 3 * width), scale

    def forward(self, x):
        q, k, v = (p.unflatten(-1, (4, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale).mean((1, 2))


def measured(scale, moved=0.5, keys=16):
    torch.manual_seed(1)
    x = torch.randn(8, keys, 32)
    history = empty_history({"qkv.weight": 3072}, 3)
    norms = numpy.ones((3, 1), numpy.float32)
    history = dataclasses.replace(history, parameter_norm=norms, distance=moved * norms)
    snapshot = diag.Snapshot(Reader(scale), None, (x, torch.zeros(8).long()))
    return diag.attention_heads(snapshot, history=history)


@pytest.mark.parametrize(
    ("series", "cause"),
    [
        ([(1, 1000.0), (100, 0.35)], Cause.ATTENTION_ONE_HOT),
        ([(1, 0.35), (100, 1000.0)], Cause.ATTENTION_LOGITS_GROW),
        ([(1, 0.35), (100, 0.001)], Cause.ATTENTION_UNIFORM),
        ([(1, 0.001), (30, 0.001)], ""),  # so many transformers begin
        ([(1, 0.35), (100, 1.0)], ""),
        ([(50, 1000.0)], Cause.ATTENTION_LOGITS_GROW),
        ([(1, 0.35), (100, 6.0)], ""),  # sharper, with logits that a trained head has
    ],
)
def test_the_course_of_the_heads_is_judged(series, cause):
    verdict = AttentionHeads.trend([(step, measured(scale)) for step, scale in series])
    assert verdict.cause == cause
    assert verdict.level == ("warning" if cause else "ok") or not cause


def test_an_even_spread_is_a_start_until_the_weights_have_moved():
    assert AttentionHeads.trend([(300, measured(0.001, moved=0.01))]).level == "ok"


def test_heads_of_few_keys_are_not_judged():
    assert AttentionHeads.trend([(1, measured(1000.0, keys=3))]).level == "not_applicable"
