"""The module graph follows tensors, not the order of definition."""

import networkx
import pytest
import torch
from torch import nn

import diag
from diag.errors import Unsupported
from diag.snapshot.module_graph import trace_modules
from diag.snapshot.reading.forms import as_batch


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 2)  # defined first, used last
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)
        self.drop = nn.Dropout()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        a = self.drop(self.left(x)).relu()
        b = self.attend(*[self.right(x)[:, None]] * 3)[0][:, 0]
        return self.last(torch.cat([a, b], 1))


def test_edges_follow_tensors():
    graph = trace_modules(Branches(), as_batch((torch.randn(2, 3), torch.zeros(2))))
    assert set(graph.edges) == {
        ("input", "left"), ("input", "right"), ("left", "relu"), ("right", "attend"), ("relu", "cat"),
        ("attend", "cat"), ("cat", "last"), ("last", "output"),
    }  # fmt: skip
    assert graph.nodes["last"] == {"kind": "Linear", "parameters": 18, "shape": (2,), "calls": 1}
    assert graph.nodes["attend"]["parameters"] == 4 * 4 * 4 + 4 * 4
    assert networkx.is_directed_acyclic_graph(graph)


def test_a_shared_module_is_one_node_called_twice():
    inner = nn.Linear(3, 3)
    model = nn.Sequential(inner, nn.ReLU(), inner)
    graph = diag.Snapshot(model, None, (torch.randn(2, 3), torch.zeros(2))).quantity("module_graph")
    assert graph.nodes["0"]["calls"] == 2
    assert ("1", "0") in graph.edges and ("0", "output") in graph.edges


def test_a_failing_pass_is_told():
    with pytest.raises(Unsupported, match=r"forward pass failed with RuntimeError.*expected a model that runs"):
        trace_modules(nn.Linear(3, 3), as_batch((torch.randn(2, 4), torch.zeros(2))))
