"""Every architecture: a randomly permuted copy is brought back, to the bit."""

import pytest
import torch

import diag
from diag.connectivity.activation_matching import align_activations
from diag.connectivity.alignment import align_weights
from diag.connectivity.interpolation import Interpolation
from diag.connectivity.symmetries import find_symmetries
from diag.snapshot.reading.forms import as_batches


def test_a_permuted_copy_is_aligned_back(network, architecture):
    net = network(architecture)
    found = find_symmetries(net.model, net.batch)
    state = {n: t.clone() for n, t in net.model.state_dict().items()}
    moved = found.apply(found.random(7), state)
    result = align_weights(found, state, moved)
    assert result.passes <= 10
    for name, tensor in state.items():
        assert torch.equal(result.state[name], tensor), name
    path = Interpolation(diag.Snapshot(net.model, lambda z, _: z.square().mean(), net.batch))
    profile = path.profile(path.fit(result.state), [0.5])
    assert profile.brackets.eq(0).all()
    # <A, A> is the largest value that <A, P(B)> can have for a permuted copy.
    assert result.objective == pytest.approx(result.limit, rel=1e-12)
    assert result.before < result.objective


def test_activation_matching_brings_it_back_too(network, architecture):
    net = network(architecture)
    found = find_symmetries(net.model, net.batch)
    state = {n: t.clone() for n, t in net.model.state_dict().items()}
    moved = found.apply(found.random(7), state)
    generator = torch.Generator().manual_seed(0)
    if net.inputs.is_floating_point():  # enough observations that no two units correlate perfectly
        inputs = torch.randn(64, *net.inputs.shape[1:], generator=generator, dtype=net.inputs.dtype)
    else:
        inputs = torch.randint(0, 11, (64, *net.inputs.shape[1:]), generator=generator)
    batches = list(as_batches((inputs, torch.zeros(64)), None))
    result = align_activations(found, net.model, state, moved, [b for x in batches for b in x.split(24)])
    for name, tensor in state.items():
        assert torch.equal(result.state[name], tensor), name
