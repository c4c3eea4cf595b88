"""Which weights stand one behind the other, read from graphs whose order is known."""

import dataclasses

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.causes import Cause
from diag.snapshot.history import empty_history
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.network import DepthFacts
from diag.watching.observe.loop.formula.depth import NODES_OF_DEPTH, Depth, longest_chains


def chains(model, *losses):
    depth = Depth({id(p): name for name, p in model.named_parameters()})
    for loss in losses:
        depth.backward_called(loss)
    return {tuple(name.removesuffix(".weight") for name in chain) for chain in depth.facts().chains}


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 3)


def test_heads_beside_each_other_end_two_ways_of_one_trunk():
    model = Heads()
    hidden = F.relu(model.b(F.relu(model.a(torch.randn(4, 4)))))
    loss = model.left(hidden).sum() + model.right(hidden).sum()
    assert chains(model, loss) == {("a", "b", "left"), ("a", "b", "right")}
    # a part whose graph is cut stands alone
    assert chains(model, model.left(hidden.detach()).sum() + model.right(hidden).sum()) == {
        ("left",), ("a", "b", "right")
    }  # fmt: skip
    # ... and what only one pass shows is added to what another did
    assert chains(model, model.a(torch.ones(4)).sum(), model.left(hidden).sum()) == {("a", "b", "left")}


@pytest.mark.parametrize("bias", [True, False])
def test_a_first_layer_as_large_as_its_batch_is_no_weight_of_the_next(bias):
    model = nn.Sequential(*(nn.Linear(6, 6, bias=bias) for _ in range(4)))
    assert chains(model, model(torch.randn(6, 6)).sum()) == {("0", "1", "2", "3")}


def test_tied_weights_and_recurrent_ones_do_not_come_after_themselves():
    model = nn.ModuleDict({"words": nn.Embedding(7, 8), "rnn": nn.GRU(8, 8, 2, batch_first=True)})
    states = model["rnn"](model["words"](torch.randint(7, (3, 5))))[0]
    loss = F.cross_entropy(states.mean(1) @ model["words"].weight.T, torch.randint(7, (3,)))
    alone, found = sorted(chains(model, loss), key=len)
    assert alone == ("words",)  # it is the first and the last
    order = ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.weight_ih_l1", "rnn.weight_hh_l1"]
    assert [name for name in order if name in found] == list(found)


def test_the_longest_way_goes_through_all_blocks_and_a_graph_too_large_gives_none():
    # 0 before 1 and 2; 1 before 2; 3 apart; 4 and 5 each before the other
    assert longest_chains([0, 0b1, 0b11, 0, 0b100000, 0b10000], range(6)) == [[0, 1, 2], [3], [4], [5]]
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    out = model(torch.randn(2, 2))
    for _ in range(NODES_OF_DEPTH):
        out = out + 1
    assert chains(model, out.sum()) == set()


def test_small_gradients_of_a_network_beside_another_do_not_vanish_over_the_depth():
    names = [f"{part}.{i}.weight" for part in ("actor", "critic") for i in range(4)]
    norms = numpy.tile(numpy.repeat([1e-6, 1.0], 4), (30, 1)).astype(numpy.float32)
    history = dataclasses.replace(empty_history(dict.fromkeys(names, 256), 30), gradient_norm=norms)
    assert diag.gradient_depth(history=history).verdict().cause == Cause.GRADIENTS_VANISH  # by their names alone
    two = Loop(step=30, depth=DepthFacts((tuple(names[:4]), tuple(names[4:])), tuple(names)))
    result = diag.gradient_depth(history=history, loop=two)
    assert result.factor == pytest.approx(1) and result.verdict().level == "ok"
    short = Loop(step=30, depth=DepthFacts(tuple((name,) for name in names), tuple(names)))
    assert "fewer than 4 weights" in diag.gradient_depth(history=history, loop=short).verdict().sentence
    # a trunk with two heads, one of which hardly counts: it is compared with the other
    trunk = Loop(step=30, depth=DepthFacts((tuple(names[4:] + names[:1]), tuple(names[4:])), tuple(names[4:])))
    assert diag.gradient_depth(history=history, loop=trunk).verdict().level == "ok"
    deep = Loop(step=30, depth=DepthFacts((tuple(names),), tuple(names)))
    assert diag.gradient_depth(history=history, loop=deep).verdict().cause == Cause.GRADIENTS_VANISH
