"""Linear symmetries beyond permutations: which are found, that they are exact, and that alignment undoes them."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diag
from diag.connectivity.activation_linear import align_linear_activations
from diag.connectivity.linear_alignment import align_linear
from diag.connectivity.symmetries import find_linear_symmetries, find_symmetries
from diag.connectivity.symmetries.gauge import standard_form, undone, usable_gains
from diag.connectivity.symmetries.linear_groups import complement_of_ones, orthogonal_part
from diag.errors import InvalidInput, Unsupported
from diag.snapshot.reading.forms import as_batches
from diag.testing import leaves_no_trace


class Reader(nn.Module):
    """Tokens of vectors, two blocks of attention and ReLU before which the stream is normed, the mean read out."""

    def __init__(self, norm: type[nn.Module] = nn.RMSNorm, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.embed = heads, nn.Linear(5, width)
        self.place = nn.Parameter(torch.randn(4, width))
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.ModuleList(nn.Linear(width, width) for _ in range(2)))
        self.up, self.down = (
            nn.ModuleList(nn.Linear(a, b) for _ in range(2)) for a, b in ((width, 14), (14, width))
        )
        self.norms = nn.ModuleList(norm(width) for _ in range(5))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place
        for i in range(2):
            y = self.norms[2 * i](x)
            q, k, v = (f[i](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
            x = x + self.o[i](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + self.down[i](F.relu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(self.norms[4](x.mean(1)))


def varied(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, with no weight at a special value and every gain positive."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.3 * (torch.rand(p.shape, generator=generator, dtype=p.dtype) - 0.5))
            p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def seeded(build, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return varied(build(), seed)


def vectors(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def found_in(model: nn.Module, inputs: Tensor):
    batch = (inputs, torch.zeros(len(inputs), dtype=torch.long))
    symmetries = find_symmetries(model, batch)
    return symmetries, find_linear_symmetries(model, batch, symmetries)


EXPECTED = {  # by kind; the LSTM and GRU read their embedding linearly, as LayerNorm's readers do its gain
    "mlp": {"scale": 1, "sign": 1},
    "conv and flatten": {"scale": 1},
    "layer norm": {},
    "residual stream": {"invertible": 1, "scale": 2},
    "u-net": {"scale": 3},
    "gpt, split": {"scale": 4, "invertible": 4},
    "gpt, bloom": {"scale": 4, "invertible": 4},
    "lstm": {"invertible": 1},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_found_is_what_the_architecture_has(network, name):
    net = network(name)
    with leaves_no_trace(net.model):
        _, linear = found_in(net.model, net.inputs)
    assert Counter(g.kind for g in linear.groups.values()) == EXPECTED[name]
    assert linear.deviation < 1e-9
    for group in linear.groups:  # on other inputs than those it was checked on, by torch's own call
        state = dict([*net.model.named_parameters(), *net.model.named_buffers()])
        moved = linear.apply(linear.random(group, state, 3), state)
        moved = {n: moved[n] for n in state}
        inputs = net.inputs.flip(0)
        outputs = [torch.func.functional_call(net.model, s, (inputs,)) for s in (state, moved)]
        assert any(not torch.equal(moved[n], state[n]) for n in state)
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-9 * float(outputs[0].abs().max()))


def test_the_places_of_a_relu_pair_and_of_tanh_are_those_of_the_definition():
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)))
    _, linear = found_in(model, vectors(4, 5))
    scale, sign = linear.groups.values()
    assert [(s.entry, s.action) for s in scale.slots] == [("0.weight", 1), ("0.bias", 1), ("2.weight", -1)]
    assert {s.entry for s in sign.slots} == {"2.weight", "2.bias", "4.weight"}
    state = dict(model.state_dict())
    s = 1 + torch.arange(9, dtype=torch.float64)
    moved = linear.apply([(scale.name, s)], state)
    assert torch.equal(moved["0.weight"], state["0.weight"] * s[:, None])
    assert torch.equal(moved["0.bias"], state["0.bias"] * s)
    assert torch.equal(moved["2.weight"], state["2.weight"] * (1 / s))
    assert (scale.dimension, sign.dimension) == (9, 0)


def test_a_stream_under_rmsnorm_rotates_and_one_under_layernorm_keeps_its_mean():
    for norm, centred in ((nn.RMSNorm, False), (nn.LayerNorm, True)):
        model = seeded(lambda norm=norm: Reader(norm))
        _, linear = found_in(model, vectors(4, 4, 5))
        kinds = Counter(g.kind for g in linear.groups.values())
        assert kinds == {
            "scale": 7,
            "invertible": 4,
            "orthogonal": 1,
        }  # five gains and two ReLU layers; QK, OV twice
        (stream,) = linear.of_kind("orthogonal")
        assert stream.centred == centred and len(stream.first) == 5
        assert stream.dimension == (11 * 10 // 2 if centred else 12 * 11 // 2)
        assert all(linear.groups[n].gain.entry.startswith("norms.") for n in stream.first)


class Rotary(nn.Module):
    """One block of causal attention whose query and key are turned by position, in one of the layouts in use."""

    def __init__(self, layout: str = "halves", gain: bool = True, tied: bool = False, shared: int = 1) -> None:
        super().__init__()
        self.layout, self.shared, width = layout, shared, 12
        self.embed = nn.Embedding(11, width)
        self.q, self.o = nn.Linear(width, 2 * 6, bias=layout == "halves"), nn.Linear(12, width)
        self.k, self.v = (nn.Linear(width, 12 // shared, bias=layout == "halves") for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(width, elementwise_affine=gain or i == 0) for i in range(2))
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("angle", torch.outer(torch.arange(16.0), 3.0 ** -torch.arange(3.0)))

    def turn(self, x: Tensor) -> Tensor:
        angle = self.angle[: x.shape[-2]].to(x)
        if self.layout == "complex":
            pairs = torch.view_as_complex(x.unflatten(-1, (3, 2)).contiguous())
            return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
        a, b = x.chunk(2, -1) if self.layout == "halves" else (x[..., ::2], x[..., 1::2])
        a, b = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
        return torch.cat([a, b], -1) if self.layout == "halves" else torch.stack([a, b], -1).flatten(-2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.norms[0](x)
        q, k, v = (f(y).unflatten(-1, (-1, 6)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.shared, 1) for t in (self.turn(k), v))
        y = F.scaled_dot_product_attention(self.turn(q), k, v, is_causal=True)
        return self.head(self.norms[1](x + self.o(y.transpose(1, 2).flatten(2))))


def words() -> Tensor:
    return torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", ["halves", "neighbours", "complex"])
@pytest.mark.parametrize("shared", [1, 2])
def test_rotary_positions_leave_a_turn_and_a_scale_of_each_plane(layout, shared):
    """A complex number for each of three planes of each head of keys; no other matrix commutes with the turns."""
    model = seeded(lambda: Rotary(layout, shared=shared))
    _, linear = found_in(model, words())
    (plane,) = linear.of_kind("plane")
    heads = 2 // shared
    assert plane.shape == ((heads, 3, 2, 2) if heads > 1 else (3, 2, 2)) and plane.dimension == 6 * heads
    assert {s.entry.split(".")[0] for s in plane.slots} == {"q", "k"} and linear.deviation < 1e-9
    state = {n: t.detach() for n, t in model.state_dict().items()}
    z = plane.random(torch.Generator().manual_seed(4))
    moved = linear.apply([(plane.name, z)], state)
    outputs = [torch.func.functional_call(model, s, (words().flip(0),)) for s in (state, moved)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-11)
    mirrored = linear.apply([(plane.name, z * torch.tensor([1.0, -1.0]))], state)  # turns the other way
    assert (torch.func.functional_call(model, mirrored, (words(),)) - outputs[0]).abs().max() > 1e-4
    rows = [0, 3] if layout == "halves" else [0, 1]  # of the first head's first plane
    torch.testing.assert_close(moved["q.weight"][rows], z.reshape(-1, 2, 2)[0] @ state["q.weight"][rows])


def test_under_tied_embeddings_a_stream_rotates_only_where_no_gain_stands_before_them():
    """R diag(gain) R^T = diag(gain) for signs alone where all gains differ."""
    free = found_in(seeded(lambda: Rotary(gain=False, tied=True)), words())[1]
    assert [g.dimension for g in free.of_kind("orthogonal")] == [12 * 11 // 2] and not free.refused
    held = found_in(seeded(lambda: Rotary(tied=True)), words())[1]
    assert not held.of_kind("orthogonal")
    why = held.refused["orthogonal of embed.weight[1]"]
    assert why.startswith("the gain norms.1.weight cannot be put into what reads it")
    (sign,) = (g for g in held.of_kind("sign") if g.units == "embed.weight[1]")
    assert {s.entry for s in sign.slots} >= {f"{n}.weight" for n in ("embed", "o", "q", "k", "v")} | {"o.bias"}
    apart = found_in(seeded(lambda: Rotary()), words())[1]
    assert len(apart.of_kind("orthogonal")) == 1 and not apart.refused


def test_an_activation_that_is_neither_even_homogeneous_nor_odd_has_none():
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 3)))
    _, linear = found_in(model, vectors(4, 5))
    assert not linear.groups and not linear.refused
    found = diag.linear_freedom(diag.Snapshot(model, F.mse_loss, (vectors(4, 5), vectors(4, 3))))
    assert found.directions == 0 and "No linear map" in found.verdict().sentence


def test_orthogonal_part_is_the_closest_and_keeps_what_it_must():
    matrix = vectors(6, 6)
    for centred in (False, True):
        q = orthogonal_part(matrix, centred)
        torch.testing.assert_close(q @ q.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
        for seed in range(20):
            other = orthogonal_part(vectors(6, 6, seed=seed), centred)
            assert (other * matrix).sum() <= (q * matrix).sum() + 1e-12
    ones = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(q @ ones, ones, rtol=0, atol=1e-12)
    basis = complement_of_ones(6)
    torch.testing.assert_close(basis.T @ basis, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(basis.T @ ones, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_standard_form_is_balanced_and_undone_exactly():
    model = seeded(Reader)
    _, linear = found_in(model, vectors(4, 4, 5))
    state = {n: t.detach() for n, t in model.state_dict().items()}
    moves = standard_form(linear, state, usable_gains(linear, state))
    form = linear.apply(moves, state)
    for i in range(5):
        torch.testing.assert_close(form[f"norms.{i}.weight"], torch.ones(12, dtype=torch.float64))
    q, k = (torch.cat([form[f"{n}.0.weight"], form[f"{n}.0.bias"][:, None]], 1) for n in "qk")
    for head in range(3):
        rows = slice(4 * head, 4 * head + 4)
        torch.testing.assert_close(q[rows] @ q[rows].T, k[rows] @ k[rows].T, rtol=1e-9, atol=1e-9)
    incoming = torch.cat([form["up.0.weight"], form["up.0.bias"][:, None]], 1).norm(dim=1)
    torch.testing.assert_close(incoming, form["down.0.weight"].norm(dim=0), rtol=1e-9, atol=1e-9)
    back = linear.apply(undone(linear, moves), form)
    for name, tensor in state.items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-9, atol=1e-9)


def moved_copy(model: nn.Module, symmetries, linear, seed: int) -> dict[str, Tensor]:
    """The state after a random permutation and a random map of every linear group."""
    state = symmetries.apply(symmetries.random(seed), dict(model.state_dict()))
    for number, name in enumerate(linear.groups):
        if linear.groups[name].kind != "orthogonal" or not linear.groups[name].first:
            state = linear.apply(linear.random(name, state, seed + number), state)
    for group in linear.of_kind("orthogonal"):
        state = linear.apply(linear.random(group.name, state, seed), state)
    return state


PLANTED = {
    "relu and tanh": (
        lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)),
        (4, 5),
    ),
    "rms transformer": (Reader, (4, 4, 5)),
    "rotary": (Rotary, words),
    "rotary, grouped": (lambda: Rotary("neighbours", shared=2), words),
    "rotary, tied": (lambda: Rotary("complex", tied=True), words),
    "layer norm transformer": (lambda: Reader(nn.LayerNorm), (4, 4, 5)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_moved_copy_is_aligned_back(name):
    build, shape = PLANTED[name]
    model = seeded(build)
    inputs = shape() if callable(shape) else vectors(*shape)
    symmetries, linear = found_in(model, inputs)
    state = {n: t.detach() for n, t in model.state_dict().items()}
    moved = moved_copy(model, symmetries, linear, 7)
    inputs = inputs.flip(0) if callable(shape) else vectors(*shape, seed=9)
    own = [n for n, _ in model.named_parameters()]
    outputs = [torch.func.functional_call(model, {n: s[n] for n in own}, (inputs,)) for s in (state, moved)]
    torch.testing.assert_close(*outputs, rtol=1e-8, atol=1e-8)
    result = align_linear(symmetries, linear, state, moved)
    assert result.objective == pytest.approx(result.limit, rel=1e-9) and result.before < 0.9 * result.limit
    # The ascent ends where a step gains less than 1e-12 of the limit, <A, A>: there the weights are a relative 1e-6
    # of |A| = 13 apart, and undoing the standard form multiplies that by a number of order one.
    for entry, tensor in state.items():
        torch.testing.assert_close(result.state[entry], tensor, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", PLANTED)
def test_a_moved_copy_is_aligned_back_by_activations(name):
    build, shape = PLANTED[name]
    model = seeded(build)
    inputs = shape() if callable(shape) else vectors(*shape)
    symmetries, linear = found_in(model, inputs)
    state = {n: t.detach() for n, t in model.state_dict().items()}
    moved = moved_copy(model, symmetries, linear, 7)
    if callable(shape):
        many = torch.randint(0, int(inputs.max()) + 1, (40, *inputs.shape[1:]))
    else:
        many = vectors(40, *shape[1:], seed=9)
    (whole,) = as_batches((many, torch.zeros(40)), None)
    batches = list(whole.split(24))  # of two sizes
    with leaves_no_trace(model):
        result = align_linear_activations(symmetries, linear, model, state, moved, batches)
    assert result.method == "activations" and result.before < 0.9 * result.objective
    for entry, tensor in state.items():
        torch.testing.assert_close(result.state[entry], tensor, rtol=0, atol=5e-5)
    with pytest.raises(InvalidInput, match="Activation matching found no activation"):
        align_linear_activations(symmetries, linear, model, state, moved, [])


def test_align_uses_them_and_permutations_alone_leave_a_barrier():
    model = seeded(Reader)
    x = vectors(60, 4, 5)
    labels = model(x).argmax(1)
    other = copy.deepcopy(model)
    symmetries, linear = found_in(model, x[:4])
    other.load_state_dict(moved_copy(model, symmetries, linear, 7))
    snapshot = diag.Snapshot(model, F.cross_entropy, (x, labels), other=other)
    plain = diag.mode_connectivity(snapshot, align="weights", points=5, refine=0)
    more = diag.mode_connectivity(snapshot, align="weights", points=5, refine=0, beyond_permutations=True)
    assert plain.aligned_barrier > 0.01 and abs(more.aligned_barrier) < 1e-6
    assert more.function_change < 1e-8 and more.aligned_distance < 1e-4 < plain.aligned_distance
    assert diag.align(snapshot, other, points=5, beyond_permutations=True).aligned.barrier < 1e-6
    by_activations = diag.align(snapshot, other, by="activations", points=5, beyond_permutations=True)
    assert by_activations.alignment.method == "activations" and by_activations.aligned.barrier < 1e-6
    with pytest.raises(InvalidInput, match="orders takes a whole number of 1 or more or none"):
        diag.mode_connectivity(snapshot, align="weights", orders=0, beyond_permutations=True)


def test_units_that_the_outputs_do_not_depend_on_are_told():
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    _, linear = found_in(model, vectors(4, 5))
    assert not linear.of_kind("scale", "invertible")
    assert [why for why in linear.refused.values() if "do not depend on its weights" in why]


class WrongBackward(torch.autograd.Function):
    """tanh, with the derivative tanh(x) / x: by gradients alone its units could be scaled."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.tanh() / x


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return WrongBackward.apply(x)


def test_a_map_that_only_wrong_gradients_allow_is_refused_by_the_outputs():
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 9), Wrong(), nn.Linear(9, 3)))
    _, linear = found_in(model, vectors(4, 5))
    assert Counter(g.kind for g in linear.groups.values()) == {"sign": 1}
    (why,) = linear.refused.values()
    assert why.startswith("such a map changed the outputs (relative change ")


def test_a_gain_near_zero_is_left_where_it_is():
    model = seeded(Reader)
    with torch.no_grad():
        model.norms[4].weight[3] = 0.0
    _, linear = found_in(model, vectors(4, 4, 5))
    state = dict(model.state_dict())
    assert len(usable_gains(linear, state)) == 4


class Narrow(nn.Sequential):
    """Casts what it is given, as norms and softmax do in many models."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(torch.bfloat16)


def test_the_models_own_casts_to_less_hide_nothing():
    """Rounding to bfloat16 would leave 1e-3 of any change, far beyond the 1e-9 that is asked for."""
    _, linear = found_in(Narrow(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)), torch.randn(4, 5))
    assert Counter(g.kind for g in linear.groups.values()) == {"scale": 1} and linear.deviation < 1e-12


def test_a_model_that_runs_in_no_float64_is_refused():
    class Table(nn.Sequential):
        table = torch.eye(5)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x @ self.table)

    model = Table(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3))
    with pytest.raises(Unsupported, match="does not run in float64 on a copy"):
        found_in(model, torch.randn(4, 5))


def test_it_stops_where_the_deadline_says_so():
    class Late(Exception):
        pass

    def tick() -> None:
        raise Late

    model = seeded(lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)))
    batch = (vectors(4, 5), torch.zeros(4, dtype=torch.long))
    symmetries = find_symmetries(model, batch)
    with leaves_no_trace(model), pytest.raises(Late):
        find_linear_symmetries(model, batch, symmetries, tick=tick)
