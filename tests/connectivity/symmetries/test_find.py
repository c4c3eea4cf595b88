"""The groups found by tracing are those known by theory, and moving them leaves the function alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.connectivity.symmetries import find_symmetries, verify
from diag.connectivity.symmetries import rules as table
from diag.errors import InvalidInput, Unsupported
from diag.testing import leaves_no_trace


def sizes(found):
    return sorted((g.size, g.parent_sizes) for g in found.groups.values())


def vectors(*shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, torch.zeros(len(x))


class Net(nn.Module):
    """A forward pass given as a function, over the parts given by name."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)
        self.double()

    def forward(self, *args):
        return self.function(self, *args)


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
    assert 0 < find_symmetries(net.model, net.batch).deviation < 1e-4


def linear(*sizes):
    return nn.Linear(*sizes)


OTHERS = {
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(linear(3, 6)), nn.ReLU(), linear(6, 2)),
        (4, 3), [(6, ())],
    ),
    "gated linear unit": (lambda: nn.Sequential(linear(4, 12), nn.GLU(), linear(6, 2)), (4, 4), [(6, ())]),
    "maxout": (
        lambda: Net(lambda s, x: s.b(s.a(x).view(-1, 6, 2).amax(-1)), a=linear(4, 12), b=linear(6, 2)),
        (4, 4), [(2, (6,)), (6, ())],
    ),
    "stacked experts": (
        lambda: Net(
            lambda s, x: (
                torch.einsum("beh,eho->beo", torch.einsum("bi,eih->beh", x, s.a).relu(), s.b)
                * s.route(x).softmax(-1)[..., None]
            ).sum(1),
            route=linear(4, 3), a=nn.Parameter(torch.randn(3, 4, 6)), b=nn.Parameter(torch.randn(3, 6, 2)),
        ),
        (5, 4), [(3, ()), (6, (3,))],
    ),
    "low-rank adapter": (
        lambda: Net(
            lambda s, x: s.b((s.a(x) + s.up(s.down(x))).relu()),
            a=linear(4, 6), down=linear(4, 2), up=linear(2, 6), b=linear(6, 2),
        ),
        (4, 4), [(2, ()), (6, ())],
    ),
    "one matrix twice": (
        lambda: Net(
            lambda s, x: s.b(s.w(s.w(s.a(x)).relu()).relu()), a=linear(4, 6), w=linear(6, 6), b=linear(6, 2)
        ),
        (4, 4), [(6, ())],
    ),
    "written in place": (
        lambda: Net(
            lambda s, x: s.c(_filled(x.new_zeros(len(x), 10), s.a(x), s.b(x))),
            a=linear(4, 6), b=linear(4, 4), c=linear(10, 2),
        ),
        (4, 4), [(4, ()), (6, ())],
    ),
    "cosine similarity of towers": (
        lambda: Net(lambda s, x: F.normalize(s.a(x)) @ F.normalize(s.p).T, a=linear(4, 6),
                    p=nn.Parameter(torch.randn(3, 6))),
        (4, 4), [(6, ())],
    ),
    "pixel shuffle": (
        lambda: Net(lambda s, x: s.b(F.pixel_shuffle(s.a(x), 2).relu()).mean((2, 3)),
                    a=nn.Conv2d(2, 8, 1), b=nn.Conv2d(2, 3, 1)),
        (4, 2, 3, 3), [(2, ())],
    ),
    "repeated": (
        lambda: Net(lambda s, x: s.b(s.a(x).relu().repeat(1, 2)), a=linear(4, 6), b=linear(12, 2)),
        (4, 4), [(2, (6,)), (6, ())],  # the copies of a unit are alike, so they may change places, too
    ),
    "complex numbers": (
        lambda: Net(lambda s, x: s.b(_doubled_as_complex(s.a(x))),
                    a=linear(4, 6), b=linear(6, 2)),
        (4, 4), [(3, ())],
    ),
    "patches": (
        lambda: Net(lambda s, x: s.b(F.unfold(s.a(x).relu(), 2).mean(2)), a=nn.Conv2d(2, 4, 1), b=linear(16, 2)),
        (4, 2, 3, 3), [(4, ())],
    ),
    "pooling with channels last": (
        lambda: Net(lambda s, x: s.b(F.adaptive_avg_pool2d(s.a(_channels_last(x)), 1).flatten(1)),
                    a=nn.Conv2d(2, 4, 1).to(memory_format=torch.channels_last), b=linear(4, 2)),
        (4, 2, 3, 3), [(4, ())],
    ),
}  # fmt: skip


def _filled(out, a, b):
    out[:, :6] = a
    out[:, 6:] = b
    return out


def _doubled_as_complex(h):
    return torch.view_as_real(2 * torch.view_as_complex(h.view(-1, 3, 2))).flatten(1)


def _channels_last(x):
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", OTHERS)
def test_other_constructs(name):
    build, shape, groups = OTHERS[name]
    found = find_symmetries(build().double(), vectors(*shape))
    assert sizes(found) == sorted(groups) and found.deviation < 1e-10


def test_a_bag_of_embeddings():
    ids = torch.randint(0, 10, (4, 3), generator=torch.Generator().manual_seed(0))
    model = Net(lambda s, x: s.b(s.a(x).relu()), a=nn.EmbeddingBag(10, 6, mode="sum"), b=linear(6, 2))
    found = find_symmetries(model, (ids, torch.zeros(4)))
    assert sizes(found) == [(6, ())] and found.deviation < 1e-10
    assert found.frozen["a.weight[0]"] == "rows are looked up by index"


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda h: h.cumsum(1), "depends on the position"),
        (lambda h: h.flip(1), "depends on the position"),
        (lambda h: h.sort(1).values, "depends on the position"),
        (lambda h: h[:, [2, 0, 1, 3, 5, 4]], "looked up by index"),
        (lambda h: h.index_select(1, torch.tensor([2, 0, 1])), "looked up by index"),
        (lambda h: torch.fft.rfft(h).abs(), "aten._fft_r2c in 'inner' has no rule here"),
        (lambda h: h * torch.arange(6.0).double(), "gives an axis of its own|a constant in the code"),
        (lambda h: h[:, ::2], "sliced through a block"),
    ],
)
def test_what_tells_units_apart_freezes_them(operation, reason):
    model = Net(lambda s, x: operation(s.a(x)), a=linear(3, 6))
    found = find_symmetries(Net(lambda s, x: s.inner(x).square().sum(1), inner=model), vectors(4, 3))
    assert not found.groups
    why = found.frozen["inner.a.weight[0]"]
    assert any(part in why for part in reason.split("|")), why


def test_queries_and_keys_are_not_permuted_and_the_reason_is_given(network):
    net = network("gpt, split")
    found = find_symmetries(net.model, net.batch)
    reasons = [why for name, why in found.frozen.items() if name.startswith("blocks.0.inner.1.qkv.weight[0]")]
    assert len(reasons) == 1  # one set of units: query and key are contracted over it
    assert "contracted between two activations (query and key)" in reasons[0]


def test_weights_beyond_the_example_are_left_alone():
    """Rows of a table of positions that this example is too short for: nothing is known about them."""
    model = Net(lambda s, x: s.b(s.a(x) + s.p[: x.shape[1]]), a=linear(3, 6), b=linear(6, 2),
                p=nn.Parameter(torch.randn(9, 6)))  # fmt: skip
    found = find_symmetries(model, vectors(4, 5, 3))
    assert sizes(found) == [(6, ())]
    assert {why for n, why in found.frozen.items() if n.startswith("p[0]")} == {
        "an axis of the input", "not used on the example given"
    }  # fmt: skip


def test_an_unknown_operation_is_named_with_its_module():
    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.fft.rfft(x).abs()

    found = find_symmetries(nn.Sequential(linear(3, 6), Spectrum()).double(), vectors(4, 3))
    assert found.unknown == {"_fft_r2c": "1"}


def test_a_wrong_group_is_caught_by_the_check_and_dropped(monkeypatch):
    """With a rule that is wrong (a cumulative sum taken for pointwise), the check finds the changed outputs."""

    def wrong(trace, args, outputs):
        trace.label(outputs[0], trace.labels(args["self"]))

    monkeypatch.setitem(table.AXIS_RULES, "cumsum", wrong)
    parts = {"a": linear(3, 6), "b": linear(6, 2), "c": linear(3, 5), "d": linear(5, 2)}
    model = Net(lambda s, x: s.b(s.a(x).cumsum(1)) + s.d(s.c(x)), **parts)
    assert sizes(find_symmetries(model, vectors(4, 3), check=False)) == [(5, ()), (6, ())]
    found = find_symmetries(model, vectors(4, 3))
    assert sizes(found) == [(5, ())]
    assert "moving these units changed the outputs (relative change" in found.frozen["a.weight[0]"]
    assert found.deviation < 1e-10


def test_constant_weights_do_not_hide_a_wrong_group(monkeypatch):
    """With a norm's fresh ones and zeros, forgetting to move them changes nothing; perturbed weights show it."""
    wrong = lambda trace, args, outputs: trace.label(outputs[0], trace.labels(args["input"]))  # noqa: E731
    monkeypatch.setitem(table.AXIS_RULES, "native_layer_norm", wrong)
    model = nn.Sequential(linear(3, 6), nn.LayerNorm(6), linear(6, 2)).double()
    assert not find_symmetries(model, vectors(4, 3)).groups


def test_tracing_leaves_the_model_alone(network):
    net = network("vit", torch.float32)
    net.model.train()
    with leaves_no_trace(net.model):
        find_symmetries(net.model, net.batch)


def test_tied_weights_stay_tied(network):
    net = network("gpt, split")
    found = find_symmetries(net.model, net.batch)
    moved = found.apply(found.random(1), net.model.state_dict())
    assert found.tied == {"head.weight": "tokens.weight"} and moved["head.weight"] is moved["tokens.weight"]


def test_a_model_written_for_one_batch_size_is_traced_with_the_whole_batch():
    model = Net(lambda s, x: s.b(s.a(x.view(4, 3))), a=linear(3, 6), b=linear(6, 2))
    assert sizes(find_symmetries(model, vectors(4, 3))) == [(6, ())]


def test_the_snapshot_gives_them():
    model = nn.Sequential(linear(3, 6), nn.ReLU(), linear(6, 2)).double()
    assert sizes(diag.Snapshot(model, None, vectors(4, 3)).quantity("symmetries")) == [(6, ())]


def test_errors_say_where_and_what():
    model = nn.Sequential(linear(3, 6), nn.Sequential(nn.ReLU(), linear(5, 2))).double()
    with pytest.raises(Unsupported, match=r"failed in '1.1' after aten\.\w+ with RuntimeError: .* runs on the"):
        find_symmetries(model, vectors(4, 3))
    model = nn.Sequential(linear(3, 6), nn.ReLU(), linear(6, 2)).double()
    found = find_symmetries(model, vectors(4, 3))
    with pytest.raises(
        InvalidInput, match=r"entry '0.weight' is \(2, 3\); expected shape \(6, 3\) as in the model"
    ):
        found.apply(found.identity(), {"0.weight": torch.zeros(2, 3)})
    with pytest.raises(InvalidInput, match=r"entry '0.weight' is missing; expected shape"):
        found.apply(found.identity(), {})
    with pytest.raises(Unsupported, match=r"returns torch.int64; expected floating outputs"):
        find_symmetries(Net(lambda s, x: s.inner(x).argmax(1), inner=model), vectors(4, 3))
    broken = copy.deepcopy(model)
    broken[0].weight.data.fill_(torch.nan)
    with pytest.raises(Unsupported, match="outputs on the example are not finite"):
        find_symmetries(broken, vectors(4, 3))


@pytest.mark.parametrize("name", ["resnet", "gpt, split", "llama"])
def test_inside_inference_mode_the_groups_are_the_same(network, name):
    """There torch would show composite operations whole, for which there are no rules: it is left for the trace."""
    net = network(name)
    with torch.inference_mode():
        found = find_symmetries(net.model, net.batch)
    assert sizes(found) == sorted(net.groups) and not found.unknown and found.deviation < 1e-10
