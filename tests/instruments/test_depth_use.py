"""Depth use against products of matrices, and residual stacks found in models as they are written."""

import numpy
import pytest
import torch
from torch import nn

import diag
from diag.instruments.depth_use import depth_use
from diag.result import Level
from diag.snapshot.inside.residual import residual_stack
from diag.testing import check_result, classification, leaves_no_trace, refusal

WIDTH = 6


class Block(nn.Module):
    def __init__(self, matrix):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.inner.weight = nn.Parameter(matrix)

    def forward(self, h):
        return h + self.inner(h)


def linear_stack(matrices):
    return nn.Sequential(*(Block(m) for m in matrices))


def inputs(n=9):
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(0)).double(), torch.zeros(n).long()


def matrices(count, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [scale * torch.randn(WIDTH, WIDTH, generator=generator).double() for _ in range(count)]


def measure(model, data=None):
    return depth_use(diag.Snapshot(model, None, data or inputs()))


def test_linear_blocks_leave_exactly_the_products():
    """F = prod (I + A_l); what is left is F - I - sum A_l, by matrices in float64."""
    given = matrices(4, 0.3)
    found = measure(linear_stack(given))
    x, eye = inputs()[0], torch.eye(WIDTH).double()
    whole = eye
    for a in given:
        whole = (eye + a) @ whole
    rest = whole - eye - sum(given)
    expected = float((x @ rest.T).norm() / (x @ (whole - eye).T).norm())
    assert found.interaction_ratio == pytest.approx(expected, rel=1e-10) and found.shifts[0] == 0


def test_the_remainder_is_of_second_order():
    """Slope 2 of the remainder, so 1 of the ratio, over two decades in which third order is below 1 %."""
    scales = numpy.array([1e-4, 1e-3, 1e-2]) / 3
    ratios = [measure(linear_stack(matrices(3, s))).interaction_ratio for s in scales]
    assert numpy.polyfit(numpy.log(scales), numpy.log(ratios), 1)[0] == pytest.approx(1, abs=0.02)


def test_blocks_that_do_not_act_on_each_other_and_the_order_of_commuting_ones():
    split = [torch.zeros(WIDTH, WIDTH).double() for _ in range(2)]
    split[0][:3, :3], split[1][3:, 3:] = 1.0, 2.0
    assert measure(linear_stack(split)).interaction_ratio == 0
    a = matrices(1)[0]
    there, back = (measure(linear_stack(pair)).interaction_ratio for pair in ([a, a @ a], [a @ a, a]))
    assert there == pytest.approx(back, rel=1e-10) and there > 0.1


class PreNorm(nn.Module):
    """A transformer's block that gets a mask and gives a tuple, as large libraries have it."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner, self.wide = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h, mask, scale=1.0):
        h = h + self.inner(self.norm(h)) * mask
        return h + scale * self.wide(h.relu()), mask


class Model(nn.Module):
    def __init__(self, block, count=3):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(count))
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x):
        h = self.first(x)
        for block in self.blocks:
            h = block(h, torch.ones_like(h), scale=0.5)[0]
        return self.out(h)


def test_blocks_with_more_arguments_are_found_as_they_are_called():
    model = Model(PreNorm)
    given = diag.Snapshot(model, None, (torch.randn(5, WIDTH), torch.zeros(5).long()))
    with leaves_no_trace(model):
        found = residual_stack(given)
    assert found.names == ("blocks.0", "blocks.1", "blocks.2")
    h, mask = found.start, torch.ones_like(found.start)
    torch.testing.assert_close(found.at_start[2], model.blocks[2](h, mask, scale=0.5)[0] - h)
    torch.testing.assert_close(found.in_turn[0], found.at_start[0])


class PostNorm(PreNorm):
    def forward(self, h, mask, scale=1.0):
        return self.norm(h + self.inner(h)), mask


def test_models_without_such_a_stack_are_refused():
    data = (torch.randn(5, WIDTH), torch.zeros(5).long())
    assert "no two blocks in a row that add" in refusal(depth_use, diag.Snapshot(Model(PostNorm), None, data))
    assert "no two blocks in a row that add" in refusal(depth_use, classification().snapshot())


def test_the_result_describes():
    found = measure(linear_stack(matrices(3, 0.2)))
    check_result(found)
    assert found.verdict().level is Level.DESCRIPTION
    still = measure(linear_stack([torch.zeros(WIDTH, WIDTH).double()] * 2))
    assert still.verdict().level is Level.NOT_APPLICABLE


class Remembering(Block):
    """A block that mixes in what it was given before, as attention with a cache of keys and values does."""

    def forward(self, h, seen):
        seen.append(h)
        return h + self.inner(sum(seen))


class WithCaches(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block, seen in zip(self.blocks, [[] for _ in self.blocks], strict=True):
            x = block(x, seen)
        return x


def test_blocks_that_keep_what_they_were_given_are_refused():
    snapshot = diag.Snapshot(WithCaches(Remembering(m) for m in matrices(3, 0.3)), None, inputs())
    assert "blocks.0 gives something else when it is called again" in refusal(depth_use, snapshot)
