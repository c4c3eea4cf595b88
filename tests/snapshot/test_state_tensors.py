"""After a measurement each place of a network holds the tensor, with the value, that it held before."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import diag
from diag.errors import InvalidInput, Unsupported
from diag.registry import attempt, instruments
from diag.snapshot.call_at import call_at
from diag.snapshot.state.tensors import hearing, own_tensors, same_bits


def data(n=48):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(3))
    return x, x[:, :3].argmax(1)


class Shared(nn.Module):
    """One layer four times, as ALBERT has it."""

    def __init__(self):
        super().__init__()
        layer = nn.Linear(8, 8)
        self.first, self.layers, self.last = nn.Linear(6, 8), nn.ModuleList([layer] * 4), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(x)


class TiedSharedAndParametrized(nn.Module):
    """A module under two names, whose weight is another module's too; one weight and one buffer are derived."""

    def __init__(self):
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(6, 8))
        self.a = nn.Linear(8, 8)
        self.b = self.a
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.a.weight
        self.norm = nn.BatchNorm1d(8)
        self.again = self.norm
        self.last = parametrizations.spectral_norm(nn.Linear(8, 3))

    def forward(self, x):
        x = self.again(self.tied(torch.tanh(self.b(torch.tanh(self.a(self.first(x)))))))
        return self.last(x)


NETWORKS = {"shared": Shared, "tied, shared and parametrized": TiedSharedAndParametrized}


def places(model):
    """Every tensor under every name, its version, and the dicts themselves."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    found = {name: (id(t), t._version) for name, t in named}
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"dicts of {name}"] = (id(module._parameters), id(module._buffers))
        found[f"order of {name}"] = (tuple(module._parameters), tuple(module._buffers))
    return found


@pytest.fixture(params=NETWORKS)
def model(request):
    torch.manual_seed(0)
    made = NETWORKS[request.param]()
    made(data()[0])
    return made


def test_a_call_at_other_values_leaves_each_place_as_it_was(model):
    before = places(model)
    values = {n: 2 * p.detach() for n, p in model.named_parameters()}
    call_at(model.eval(), values, data()[:1])
    assert places(model) == before


def test_a_shared_module_is_called_at_the_values():
    model, (x, _) = Shared().double(), data()
    values = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    expected = x.double() @ values["first.weight"].T + values["first.bias"]
    for _ in range(4):
        expected = torch.tanh(expected @ values["layers.0.weight"].T + values["layers.0.bias"])
    expected = expected @ values["last.weight"].T + values["last.bias"]
    assert torch.equal(call_at(model, values, (x.double(),)), expected)


def test_ties_hold_whichever_name_is_given():
    model, (x, _) = TiedSharedAndParametrized().eval(), data()
    moved = 2 * model.a.weight.detach()
    expected = functional_call(TiedSharedAndParametrized_of(model), {"a.weight": moved}, (x,))
    for name in ("a.weight", "b.weight", "tied.weight"):
        assert torch.equal(call_at(model, {name: moved}, (x,)), expected)
    both = {"a.weight": moved, "tied.weight": moved.clone()}
    assert torch.equal(call_at(model, both, (x,)), expected)
    with pytest.raises(InvalidInput, match=r"a.weight and tied.weight are one tensor of the model, and two diff"):
        call_at(model, {"a.weight": moved, "tied.weight": moved + 1}, (x,))


def TiedSharedAndParametrized_of(model):
    """The same network with two modules in place of the one that has two names."""
    unshared = TiedSharedAndParametrized().eval()
    unshared.b, unshared.again = nn.Linear(8, 8), nn.BatchNorm1d(8)
    unshared.b.weight, unshared.eval().b.bias = unshared.a.weight, unshared.a.bias
    unshared.load_state_dict(model.state_dict())
    return unshared


def test_a_parametrization_is_applied_to_the_value_given():
    model, (x, _) = TiedSharedAndParametrized().eval(), data()
    name = "first.parametrizations.weight.original0"
    expected = functional_call(model.first, {name.removeprefix("first."): torch.ones(8, 1)}, (x,))
    seen = []
    handle = model.first.register_forward_hook(lambda module, args, output: seen.append(output))
    call_at(model, {name: torch.ones(8, 1)}, (x,))
    handle.remove()
    assert torch.equal(seen[0], expected)
    with pytest.raises(InvalidInput, match=r"The model has no parameter or buffer 'first\.weight'; give values by"):
        call_at(model, {"first.weight": torch.ones(8, 6)}, (x,))


def test_buffers_and_what_a_call_binds_to_them():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1
            return x * self.count

    model = Counting()
    own, values = model.count, {"count": torch.tensor(4.0)}
    assert call_at(model, values, (torch.ones(()),)) == 5
    assert model.count is own and values == {"count": torch.tensor(4.0)}


def test_an_exception_in_the_call_leaves_nothing_behind(model):
    before = places(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call_at(model, {n: p.detach() for n, p in model.named_parameters()}, (torch.ones(2, 5),))
    assert places(model) == before


def test_torchscript_is_refused():
    scripted = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(Unsupported, match="The model is compiled to TorchScript, whose parameters cannot be moved"):
        call_at(scripted, {"weight": torch.ones(2, 2)}, (torch.ones(1, 2),))


@pytest.mark.parametrize("name", instruments())
def test_no_instrument_moves_a_tensor(model, name):
    other = NETWORKS["shared" if isinstance(model, Shared) else "tied, shared and parametrized"]()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before, values = places(model), {n: t.clone() for n, t in model.state_dict().items()}
    snapshot = diag.Snapshot(
        model, nn.CrossEntropyLoss(), data(), held_out=data(24), other=other.state_dict(),
        previous=other.state_dict(), optimizer=optimizer,
    )  # fmt: skip
    outcome = attempt(snapshot, instruments()[name])
    assert places(model) == before
    assert all(torch.equal(values[n], t) for n, t in model.state_dict().items())
    assert not any("While measuring" in note for note in getattr(outcome, "notes", ()))


def train(model, steps):
    x, y = data(192)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(steps):
        part = slice(16 * (step % 12), 16 * (step % 12) + 16)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for _, p in model.named_parameters(remove_duplicate=False)} == held
    return accuracy(model)


def accuracy(model):
    x, y = data(192)
    return float((model.eval()(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("arguments", [{}, {"budget": math.inf, "probe": data(12)}], ids=["default", "endless"])
def test_watching_does_not_take_a_parameter_from_the_optimizer(network, arguments):
    torch.manual_seed(0)
    models = [NETWORKS[network](), NETWORKS[network]()]
    models[1].load_state_dict(models[0].state_dict())
    steps = 5 if arguments else 300
    accuracies = [train(models[0], steps)]
    with diag.watch(models[1], **arguments) as watcher:
        accuracies.append(train(models[1], steps))
    accuracies.append(accuracy(models[1]))  # closing measures once more
    states = [model.state_dict() for model in models]
    assert not [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]
    assert accuracies[0] == accuracies[1] == accuracies[2] > (0.3 if arguments else 0.8)
    assert not [e.text for e in watcher.run.events if "While measuring" in e.text or e.kind == "internal error"]


# ---- what a measurement leaves is put back and said


class Rebinding(nn.Linear):
    """Puts another tensor in its weight's place when it is called."""

    def forward(self, x):
        self._parameters["weight"] = nn.Parameter(self.weight.detach().clone())
        return super().forward(x)


class Renormalising(nn.Linear):
    """Writes its rows to length one when it is called, as an embedding with max_norm does."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.div_(self.weight.norm(dim=1, keepdim=True))
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Rebinding, r"While measuring, weight of the model was replaced by another tensor; it is put back, and wh"),
        (Renormalising, r"While measuring, weight of the model was written to in place, by the model's own forwar"),
    ],
)
def test_a_foreign_tensor_or_value_is_put_back_and_said(kind, said):
    model = kind(6, 3)
    own, value = model.weight, model.weight.detach().clone()
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), data())
    result = diag.softmax_collapse(snapshot)
    assert model.weight is own and torch.equal(own, value)
    assert [n for n in result.notes if n.startswith(said[:40])]
    with pytest.warns(RuntimeWarning, match=said):
        diag.Snapshot(model, nn.CrossEntropyLoss(), data()).quantity("logits")
    assert model.weight is own and torch.equal(own, value)


def test_a_watch_records_what_a_measurement_left():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Rebinding(8, 3))
    with diag.watch(model, budget=math.inf, instruments=["softmax_collapse"]) as watcher:
        x, y = data(32)
        optimizer = torch.optim.SGD(model[:1].parameters(), 0.1)
        for _ in range(4):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        own = model[2].weight
        watcher.measure()
        assert model[2].weight is own
    (_, result), *_ = watcher.run.series("softmax_collapse")
    assert [n for n in result.notes if "2.weight of the model was replaced by another tensor" in n]


def test_a_failure_says_it_too():
    class Failing(Rebinding):
        def forward(self, x):
            super().forward(x)
            raise KeyError("nothing")

    outcome = attempt(
        diag.Snapshot(Failing(6, 3), nn.CrossEntropyLoss(), data()), instruments()["softmax_collapse"]
    )
    assert "While measuring, weight of the model was replaced" in outcome.reason


def test_a_parameter_that_is_gone_or_new_and_a_dict_that_is_another():
    model = nn.Linear(2, 2)
    weight, bias, held = model.weight, model.bias, model._parameters
    with hearing() as said, own_tensors(model):
        del model.weight
        model.register_parameter("extra", nn.Parameter(torch.ones(1)))
        model.__dict__["_parameters"] = dict(model._parameters)
    assert model._parameters is held and list(held.items()) == [("weight", weight), ("bias", bias)]
    assert said == [
        "While measuring, extra and weight of the model were replaced by other tensors; they are put back, and "
        "what was measured may be wrong."
    ]


def test_bits_are_compared():
    nan, zero = torch.tensor([math.nan, 1.0]), torch.zeros(2)
    assert same_bits(nan, nan.clone()) and not same_bits(nan, torch.ones(2)) and not same_bits(zero, -zero)
    z = torch.complex(nan, zero)
    assert same_bits(z, z.clone()) and not same_bits(z, z.conj())
    assert not same_bits(zero, zero.double()) and not same_bits(zero, torch.zeros(3))
    assert same_bits(zero.bool(), zero.bool()) and same_bits(torch.ones(3, 2).T, torch.ones(2, 3))


def test_a_value_that_was_put_back_is_no_later_moment():
    model = Renormalising(6, 3)
    snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), data())
    diag.softmax_collapse(snapshot)
    diag.neural_collapse(snapshot)
    with torch.no_grad():
        model.weight.add_(1)
    for _ in range(2):
        with pytest.raises(InvalidInput, match="has changed since the snapshot was made"):
            diag.hessian_spectrum(snapshot, num_eigenvalues=1)


@pytest.fixture
def one_process(tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_sharded_by_torch_keeps_count_of_its_own_tensors(one_process):
    from torch.distributed.fsdp import fully_shard

    losses = []
    for measured in (False, True):
        torch.manual_seed(0)
        model, (x, y) = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), data()
        fully_shard(model[0], mesh=one_process)
        fully_shard(model, mesh=one_process)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if measured:
                before = places(model)
                snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), data(24))
                assert snapshot.quantity("logits").shape == (24, 3)
                assert places(model) == before
                with pytest.raises(Unsupported, match="put in place at each call by torch's fully_shard"):
                    snapshot.quantity("loss_at")({n: p.detach() for n, p in model.named_parameters()})
    assert losses[:3] == losses[3:]
