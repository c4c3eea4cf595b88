"""Weight matching: optimal where that can be enumerated, monotone, and honest about states that do not fit."""

import copy
from itertools import pairwise, permutations

import pytest
import torch
from torch import nn

from diag.connectivity.activation_matching import align_activations
from diag.connectivity.alignment import align_weights, compose
from diag.connectivity.symmetries import find_symmetries
from diag.errors import InvalidInput
from diag.snapshot.reading.forms import as_batch


def mlp(width=5, seed=0, depth=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    sizes = [3, *[width] * depth, 2]
    layers = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).to(dtype)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


def batch(dtype=torch.float64, n=40):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(
        dtype
    ), torch.zeros(n)


def inner(a, b):
    return sum(float((a[n] * b[n]).sum()) for n in a)


def test_one_hidden_layer_reaches_the_best_of_all_permutations():
    a, b = mlp(seed=1).state_dict(), mlp(seed=2).state_dict()
    found = find_symmetries(mlp(), batch())
    result = align_weights(found, a, b)
    (name,) = found.groups
    best = max(inner(a, found.apply({name: torch.tensor(p)}, b)) for p in permutations(range(5)))
    # Two sums of 27 products in float64.
    assert result.objective + inner(*({"": s["2.bias"]} for s in (a, b))) == pytest.approx(best, rel=1e-12)


def test_the_objective_is_that_of_the_state_returned_and_never_falls():
    model = mlp(width=12, depth=3)
    found = find_symmetries(model, batch())
    a, b = mlp(width=12, depth=3, seed=1).state_dict(), mlp(width=12, depth=3, seed=2).state_dict()
    objectives = [align_weights(found, a, b, orders=1, max_passes=k).objective for k in (1, 2, 3, 50)]
    assert objectives == sorted(objectives)
    result = align_weights(found, a, b)
    counted = [n for n in a if n != "6.bias"]  # the output's bias is carried by no group
    assert result.objective == pytest.approx(inner({n: a[n] for n in counted}, result.state), rel=1e-12)
    assert result.objective >= objectives[-1] > result.before
    assert torch.equal(result.state["0.weight"], found.apply(result.element, b)["0.weight"])


def test_more_orders_never_make_it_worse():
    found = find_symmetries(mlp(width=12, depth=3), batch())
    a, b = mlp(width=12, depth=3, seed=3).state_dict(), mlp(width=12, depth=3, seed=4).state_dict()
    one, five = (align_weights(found, a, b, orders=k) for k in (1, 5))
    assert five.objective >= one.objective


def test_random_starts_find_tiny_groups_that_orders_alone_miss():
    """Bottlenecks of two units: from the given order, this copy ends at a local optimum whatever the order."""

    class Bottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 8))

        def forward(self, x):
            return x + self.inner(x)

    missed = {1: 0, 10: 0}
    for seed in range(12):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(3, 8), Bottleneck(), Bottleneck(), nn.Linear(8, 2)).double()
        found = find_symmetries(model, batch(), check=False)
        state = model.state_dict()
        for orders in missed:
            result = align_weights(found, state, found.apply(found.random(seed), state), orders=orders)
            missed[orders] += result.objective < result.limit * (1 - 1e-12)
    assert missed[1] > 0 and missed[10] == 0


def test_composition_is_first_then_second():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten())
    images = (torch.randn(2, 3, 5, 5), torch.zeros(2))
    found = find_symmetries(model, images)
    state, first, second = model.state_dict(), found.random(1), found.random(2)
    both = found.apply(compose(found.groups, first, second), state)
    step_by_step = found.apply(second, found.apply(first, state))
    assert all(torch.equal(both[n], step_by_step[n]) for n in state)


def test_a_scale_symmetry_is_no_permutation():
    """(s W1, b1 s, W2 / s) is the same function; matching by permutation leaves the weights apart."""
    model = mlp(width=4)
    scaled = copy.deepcopy(model)
    scaled[0].weight.data *= 4
    scaled[0].bias.data *= 4
    scaled[2].weight.data /= 4
    x, _ = batch()
    assert torch.allclose(model(x), scaled(x), rtol=1e-12)
    found = find_symmetries(model, batch())
    result = align_weights(found, model.state_dict(), scaled.state_dict())
    assert torch.equal(result.element["0.weight[0]"], torch.arange(4))
    assert not torch.allclose(result.state["0.weight"], model.state_dict()["0.weight"])


def test_activation_matching_recovers_a_noisy_copy():
    model = mlp(width=16, depth=2)
    found = find_symmetries(model, batch())
    element = found.random(5)
    moved = found.apply(element, model.state_dict())
    noise = torch.Generator().manual_seed(0)
    noisy = {n: t + 0.02 * torch.randn(t.shape, generator=noise, dtype=t.dtype) for n, t in moved.items()}
    result = align_activations(found, model, model.state_dict(), noisy, [as_batch(batch(n=400))])
    for name, p in result.element.items():
        assert torch.equal(element[name][p], torch.arange(16))


def test_states_that_do_not_fit_are_refused_in_one_sentence():
    found = find_symmetries(mlp(), batch())
    a = mlp().state_dict()
    wide = mlp(width=6).state_dict()
    with pytest.raises(InvalidInput, match=r"'0.weight' has shape \(5, 3\) in the first network and \(6, 3\) in "
                                           r"the second \(2 more differences\); expected two"):  # fmt: skip
        align_weights(found, a, wide)
    missing = {n: t for n, t in a.items() if n != "2.bias"}
    with pytest.raises(InvalidInput, match=r"'2.bias' is in the first network and missing in the second; expected"):
        align_weights(found, a, missing)
    with pytest.raises(InvalidInput, match="'extra' is in the second and missing in the first network"):
        align_weights(found, a, {**a, "extra": a["2.bias"]})
    with pytest.raises(InvalidInput, match=r"'0.weight' has shape .* in the model"):
        align_weights(found, wide, wide)


def test_two_vocabularies_are_named():
    a, b = {"embed.weight": torch.zeros(10, 4)}, {"embed.weight": torch.zeros(12, 4)}
    found = find_symmetries(mlp(), batch())
    with pytest.raises(InvalidInput, match="so the vocabularies differ; expected two trained copies"):
        align_weights(found, a, b)


def test_no_data_is_refused():
    found = find_symmetries(mlp(), batch())
    a = mlp().state_dict()
    with pytest.raises(InvalidInput, match="no activation to pair; give at least one batch"):
        align_activations(found, mlp(), a, a, [])
    with pytest.raises(InvalidInput, match="number of orders is 0"):
        align_weights(found, a, a, orders=0)
