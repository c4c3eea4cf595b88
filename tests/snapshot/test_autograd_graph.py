"""Walks of autograd's graph, on graphs that are written out by hand."""

import torch

from diag.snapshot.autograd_graph import first_arguments, kind_of, nodes_before, parents_of, signed


def kinds(nodes):
    return [kind_of(node) for node in nodes]


def test_each_node_once_the_nearest_first():
    a = torch.ones(2, requires_grad=True)
    b = a.exp()
    total = (b * b.sin() + b).sum()  # b is reached on three ways
    found = kinds(nodes_before([total.grad_fn, None]))
    assert found == ["Sum", "Add", "Mul", "Exp", "Sin", "torch::autograd::AccumulateGrad".rpartition("::")[2]]
    assert kinds(nodes_before([total.grad_fn], 3)) == found[:3]
    assert kinds(nodes_before([total.grad_fn], ends=lambda node: kind_of(node) in ("Mul", "Exp"))) == found[:4]
    assert list(nodes_before([None])) == []


def test_first_arguments_pass_over_those_without_a_gradient():
    a = torch.ones(3, requires_grad=True)
    scaled = torch.tensor(2.0) * a.neg()
    assert kinds(first_arguments(scaled.grad_fn, 9)) == ["Mul", "Neg", "AccumulateGrad"]
    assert kinds(first_arguments(scaled.grad_fn, 2)) == ["Mul", "Neg"]
    assert list(first_arguments(None, 9)) == []
    assert kinds(parents_of(scaled.grad_fn)) == ["Neg"]


def test_saved_axes_have_their_sign_again():
    made = torch.ones(2, 3, requires_grad=True).log_softmax(-1).grad_fn
    assert signed(made._saved_dim) in (-1, 1)
    assert signed((1 << 64) - 1) == -1 and signed(5) == 5
