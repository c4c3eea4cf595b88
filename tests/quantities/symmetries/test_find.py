"""The groups found by tracing are those known by theory, and moving them leaves the function alone."""

import pytest
import torch
from torch import nn

from diag.errors import InvalidInput, Unsupported
from diag.quantities.symmetries import find_symmetries, verify


def sizes(found):
    groups = found.groups.values()
    return sorted((g.size, g.parent_sizes) for g in groups)


def test_groups_are_those_of_the_architecture(network, architecture):
    net = network(architecture)
    found = find_symmetries(net.model, net.batch)
    assert sizes(found) == sorted(net.groups)
    assert not found.unknown
    # The check itself: 1e-10 in float64 is the bar; random elements move every group.
    assert found.deviation < 1e-10
    assert verify(found, net.model, net.batch, seed=5) < 1e-10


def test_a_random_element_moves_weights_and_not_outputs(network, architecture):
    net = network(architecture)
    found = find_symmetries(net.model, net.batch)
    state = {n: t.clone() for n, t in net.model.state_dict().items()}
    moved = found.apply(found.random(3), state)
    with torch.no_grad():
        before = net.model(net.inputs)
        net.model.load_state_dict(moved)
        after = net.model(net.inputs)
    assert (before - after).abs().max() < 1e-10 * before.abs().max()
    for group in found.groups.values():
        assert any(not torch.equal(moved[name], state[name]) for name, _ in group.axes)


@pytest.mark.parametrize("name", ["resnet", "gpt, split", "llama"])
def test_float32(network, name):
    net = network(name, torch.float32)
    assert find_symmetries(net.model, net.batch).deviation < 1e-4
