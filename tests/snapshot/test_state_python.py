"""What a model keeps in Python is after a measurement what it was before, in the same objects."""

import collections
import functools
import itertools
import math
import random
import types

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.errors import Unsupported
from diag.registry import attempt, instruments
from diag.snapshot.preserve import preserved
from diag.snapshot.state.python import State, kept_state
from diag.snapshot.state.standins import CacheApart, entries_of
from diag.snapshot.state.walk import MOST_OBJECTS

calls = 0
history = []


def data(n=48):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(3))
    return x, x[:, :3].argmax(1)


class Base(nn.Module):
    """A linear map whose output is moved by what the module keeps."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(x) * (1 + 0.01 * self.keep(x))

    def state(self):
        """Everything kept, as plain data."""
        raise NotImplementedError


class Annealing(Base):
    n = 0

    def keep(self, x):
        self.n += 1
        return self.n

    def state(self):
        return self.n


class Made(collections.OrderedDict):
    """Entries are classes, of which one gets instances, as in a table of activations."""

    def __getitem__(self, key):
        return super().__getitem__(key)(3)


class Containers(Base):
    def __init__(self):
        super().__init__()
        self.made = Made(int=int, text=str)
        self.log, self.by_name, self.last = [], {"a": {"n": 0}}, collections.deque([1, 2], maxlen=3)
        self.seen, self.raw, self.ordered = {1}, bytearray(b"ab"), collections.OrderedDict(b=1, a=2)
        self.alias = self.log
        self.counter = collections.Counter()

    def keep(self, x):
        self.alias.append(len(self.log))
        self.by_name["a"]["n"] += 1
        self.last.append(len(x))
        self.seen.add(len(self.seen))
        self.raw[0] += 1
        self.ordered.move_to_end("b")
        self.counter["calls"] += 1
        self.made.move_to_end("int")
        return len(self.log) + self.by_name["a"]["n"]

    def state(self):
        ordered = list(self.ordered.items())
        same = self.alias is self.log
        return (
            list(self.log), dict(self.by_name["a"]), list(self.last), set(self.seen), bytes(self.raw), ordered,
            same, dict(self.counter), list(self.made.items()),
        )  # fmt: skip


class Tensors(Base):
    """A memory bank as a buffer, as an attribute and as a list; one with the graph of the last call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bank", torch.zeros(4, 3))
        self.plain, self.items, self.memory, self.array = torch.ones(3), [torch.zeros(3)], None, numpy.zeros(2)

    def keep(self, x):
        z = self.fc(x)
        self.bank[0] = z.mean(0).detach()
        self.plain += z.mean(0).detach()
        self.plain.data.mul_(1.5)
        self.items[0].add_(1)
        self.items.append(z.mean(0))
        self.array += 1
        carried = 0 if self.memory is None else self.memory.sum()
        self.memory = z.mean(0)
        return self.bank.sum() + self.plain.sum() + self.items[0].sum() + float(self.array[0]) + carried

    def state(self):
        tensors = (self.bank, self.plain, *self.items, *([] if self.memory is None else [self.memory]))
        return [t.tolist() for t in tensors], self.array.tolist(), id(self.memory), [id(t) for t in self.items]


class Draws(Base):
    def __init__(self):
        super().__init__()
        self.python, self.torch = random.Random(1), torch.Generator().manual_seed(1)
        self.numpy, self.old = numpy.random.default_rng(1), numpy.random.RandomState(1)

    def keep(self, x):
        drawn = torch.rand(1, generator=self.torch).item()
        return self.python.random() + drawn + self.numpy.random() + self.old.rand()

    def state(self):
        old = self.old.get_state()
        return self.python.getstate(), self.torch.get_state().tolist(), str(self.numpy.bit_generator.state), old[2]


class Iterators(Base):
    def __init__(self):
        super().__init__()
        self.count, self.held = itertools.count(3), {"cycle": itertools.cycle([1, 2, 3])}

    def keep(self, x):
        return next(self.count) + next(self.held["cycle"])

    def state(self):
        return repr(self.count), id(self.count), id(self.held["cycle"])


class InTuples(Base):
    """What is in a tuple cannot be replaced there: the tuple is."""

    def __init__(self):
        super().__init__()
        self.held = (itertools.count(1), [0], (iter([1, 2, 3, 4, 5, 6]), 2))

    def keep(self, x):
        self.held[1][0] += 1
        return next(self.held[0]) + self.held[1][0] + next(self.held[2][0])

    def state(self):
        return repr(self.held[0]), list(self.held[1]), self.held[2][0].__length_hint__(), id(self.held)


class Schedule:
    __slots__ = ("__step", "parts")

    def __init__(self):
        self.__step, self.parts = 0, []

    def next(self):
        self.__step += 1
        self.parts.append(self.__step)
        return self.__step

    @property
    def step(self):
        return self.__step


class Helpers(Base):
    """Helper objects, closures, defaults, the attributes of a class, a namespace, globals, tuples of lists."""

    shared = 0
    table = {"n": 0}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.schedule, self.names, self.pair = Schedule(), types.SimpleNamespace(n=0), ([0], 1)
        n = 0

        def count():
            nonlocal n
            n += 1
            return n

        self.count, self.later = count, functools.partial(self.names.__dict__.__setitem__, "m")

    def default(self, held=[0]):  # noqa: B006
        held[0] += 1
        return held[0]

    def keep(self, x):
        global calls
        calls += 1
        history.append(calls)
        type(self).shared += 1
        self.table["n"] += 1
        self.names.n += 1
        self.pair[0][0] += 1
        self.later(self.names.n)
        return self.schedule.next() + self.count() + self.default() + self.shared + calls

    def state(self):
        cell = self.count.__closure__[0].cell_contents
        default = self.default.__func__.__defaults__[0][0]
        kept = self.schedule.step, list(self.schedule.parts), dict(vars(self.names)), self.pair[0][0]
        return *kept, cell, default, self.shared, self.table["n"], calls, list(history)


class Caches(Base):
    """What is computed once and kept: by functools and by hand."""

    def __init__(self):
        super().__init__()
        self.made, self.by_size = 0, {}

    @functools.lru_cache  # noqa: B019
    def scale(self, n):
        self.made += 1
        return torch.rand(())

    @functools.cache  # noqa: B019
    def other(self, n, flag=False):
        return torch.rand(())

    @functools.cached_property
    def once(self):
        return torch.rand(())

    def keep(self, x):
        if len(x) not in self.by_size:
            self.by_size[len(x)] = torch.rand(())
        return self.scale(len(x)) + self.other(len(x), flag=True) + self.once + self.by_size[len(x)]

    def state(self):
        held = {n: float(v) for n, v in self.by_size.items()}
        scale, other = type(self).__dict__["scale"], type(self).__dict__["other"]
        entries = [sorted((str(k), float(v)) for k, v in entries_of(f).items()) for f in (scale, other)]
        return self.made, held, entries, float(vars(self).get("once", -1)), id(scale), id(other)


class Unregistered(Base):
    """A network that is no submodule, held in a list."""

    def __init__(self):
        super().__init__()
        self.teacher = [nn.BatchNorm1d(6)]

    def keep(self, x):
        return self.teacher[0].train()(x).mean().detach() + self.teacher[0].running_mean.sum()

    def state(self):
        teacher = self.teacher[0]
        return teacher.running_mean.tolist(), int(teacher.num_batches_tracked), teacher.training


STATEFUL = (Annealing, Containers, Tensors, Draws, Iterators, InTuples, Helpers, Caches, Unregistered)


def some_steps(model, steps=3, measure=lambda step: None):
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for step in range(steps):
        part = slice(16 * (step % 3), 16 * (step % 3) + 16)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[part]), y[part])
        if not isinstance(model, Tensors):
            loss.backward()
        else:
            loss.backward(retain_graph=True)
        optimizer.step()
        losses.append(loss.item())
        measure(step)
    return losses


@pytest.fixture(params=STATEFUL, ids=lambda c: c.__name__)
def model(request):
    torch.manual_seed(0)
    made = request.param()
    with torch.no_grad():
        made(data(16)[0])
    return made


def snapshot(model):
    other = {n: t + 0.1 if t.is_floating_point() else t for n, t in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return diag.Snapshot(
        model, nn.CrossEntropyLoss(), data(20), held_out=data(8), other=other, previous=other, optimizer=optimizer
    )


@pytest.mark.parametrize("name", instruments())
def test_no_instrument_moves_the_state(model, name):
    before = model.state()
    attempt(snapshot(model), instruments()[name])
    assert model.state() == before


def test_every_pass_sees_the_same_state(model):
    with kept_state(model):
        outputs = []
        for _ in range(3):
            with preserved(model), torch.no_grad():
                outputs.append(model(data(10)[0]))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_the_outputs_are_those_of_the_next_call(model):
    found = snapshot(model).quantity("logits")
    with torch.no_grad():
        assert torch.equal(found, model.eval()(data(20)[0]))


def test_an_exception_leaves_the_state(model):
    before = model.state()
    with pytest.raises(ZeroDivisionError), preserved(model):
        model(data(16)[0])
        raise ZeroDivisionError
    assert model.state() == before


def test_training_goes_on_as_if_nothing_was_measured(model):
    torch.manual_seed(1)
    twin = type(model)()
    twin.load_state_dict(model.state_dict())
    reset()
    torch.manual_seed(2)
    plain = some_steps(twin)
    reset()
    again = type(model)()
    again.load_state_dict(model.state_dict())
    torch.manual_seed(2)
    measured = some_steps(again, measure=lambda step: snapshot(again).quantity("gradient"))
    assert measured == plain


def reset():
    """The classes and this module as they are at first."""
    global calls
    calls = 0
    history.clear()
    Helpers.shared, Helpers.table["n"], Helpers.default.__defaults__[0][0] = 0, 0, 0
    Caches.scale.cache_clear()
    Caches.other.cache_clear()


# ---- what cannot be put back


class Generating(Base):
    def __init__(self):
        super().__init__()
        self.noise = (torch.rand(()) for _ in itertools.count())

    def keep(self, x):
        return next(self.noise)


def test_a_generator_is_not_advanced_and_the_model_is_refused():
    model = Generating()
    torch.manual_seed(0)
    expected = torch.rand(())
    with pytest.raises(Unsupported, match="The model takes the next item of a generator that it holds"):
        snapshot(model).quantity("logits")
    torch.manual_seed(0)
    assert next(model.noise) == expected


class Large(Base):
    def __init__(self):
        super().__init__()
        self.bank = torch.zeros(5000, 5000)

    def keep(self, x):
        self.bank[0] += 1
        return float(self.bank[0, 0])


def test_a_tensor_too_large_to_copy_is_told_and_the_model_refused_from_then_on():
    found = snapshot(Large())
    match = r"A call of the model changes Large\.bank, which measuring cannot put back \(too large to be copied"
    with pytest.raises(Unsupported, match=match):
        found.quantity("logits")
    moved = float(found.model.bank[0, 0])
    with pytest.raises(Unsupported, match=match):
        found.quantity("gradient")
    assert float(found.model.bank[0, 0]) == moved


def test_a_graph_of_training_is_left_to_it():
    """Truncated backpropagation: the next loss goes through what the last call computed."""

    class Carrying(Base):
        def __init__(self):
            super().__init__()
            self.memory = [torch.zeros(3)]

        def keep(self, x):
            kept = self.memory[0]
            self.memory[0] = self.fc(x).exp().mean(0)
            return kept

    model, (x, y) = Carrying(), data(16)
    model(x)
    snapshot(model).quantity("gradient")
    diag.hessian_spectrum(snapshot(model), num_eigenvalues=1)
    F.cross_entropy(model(x), y).backward()
    assert float(model.fc.weight.grad.abs().sum()) > 0


def test_a_view_of_a_parameter_stays_a_view():
    class Tied(Base):
        def __init__(self):
            super().__init__()
            self.turned = self.fc.weight.t()

        def forward(self, x):
            return x @ self.turned

    model, (x, y) = Tied(), data(20)
    gradient = snapshot(model).quantity("gradient")["fc.weight"]
    F.cross_entropy(model(x), y).backward()
    assert torch.allclose(gradient, model.fc.weight.grad, atol=1e-7)


def test_a_list_filled_by_a_hook_and_used_in_the_loss():
    def train(watched):
        torch.manual_seed(0)
        model, kept = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), []
        model[0].register_forward_hook(lambda module, args, output: kept.append(output))
        watcher = diag.watch(model, budget=math.inf) if watched else None
        optimizer, (x, y) = torch.optim.SGD(model.parameters(), 0.1), data()
        for _ in range(6):
            kept.clear()
            loss = F.cross_entropy(model(x), y) + 0.01 * torch.stack(kept).square().mean()
            assert len(kept) == 1
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if watcher is not None:
            watcher.close()
        assert len(kept) == 1
        return model.state_dict()

    a, b = train(False), train(True)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_loss_that_keeps_something():
    class Annealed(nn.Module):
        def __init__(self):
            super().__init__()
            self.n, self.log = 0, []
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, outputs, targets):
            self.n += 1
            self.log.append(self.n)
            self.mean.mul_(0.9).add_(outputs.mean().detach())
            return F.cross_entropy(outputs, targets) * (1 + 0.1 * self.n)

    model, loss = nn.Linear(6, 3), Annealed()
    found = diag.Snapshot(model, loss, data(20))
    for name in ("gradient", "losses"):
        found.quantity(name)
    diag.hessian_spectrum(found, num_eigenvalues=1)
    assert loss.n == 0 and loss.log == [] and loss.mean == 0


# ---- the parts


def test_what_is_found_is_bounded():
    model = nn.Linear(2, 2)
    model.log = [[i] for i in range(50_000)]
    model.numbers = list(range(200_000))
    state = State(model)
    assert len(state._kept) <= MOST_OBJECTS
    model.numbers.append(1)
    state.put_back()
    assert len(model.numbers) == 200_000


def test_each_of_many_modules_is_put_back():
    """More modules than objects that are looked at of any other model."""

    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.n, self.log, self.more = 0, [], {"seen": []}

        def forward(self, x):
            self.n += 1
            self.log.append(self.n)
            self.more["seen"].append(self.n)
            return x

    model = nn.Sequential(*(Remembering() for _ in range(MOST_OBJECTS + 1_000)))
    with preserved(model):
        model(torch.ones(1))
    for part in model:
        assert (part.n, part.log, part.more) == (0, [], {"seen": []})


def test_the_trainer_and_the_optimizer_are_not_entered():
    model = nn.Linear(2, 2)
    model.optimizer = torch.optim.Adam(model.parameters())
    model.fc_out = model.optimizer.param_groups
    state = State(model)
    model.optimizer.state["x"] = 1
    state.put_back()
    assert model.optimizer.state["x"] == 1


def test_what_does_not_let_itself_be_looked_at_is_left_alone():
    class Shy:
        def __getattribute__(self, name):
            raise RuntimeError("not now")

    model = nn.Linear(2, 2)
    model.held, model.log = [Shy()], []
    with preserved(model):
        model.log.append(1)
    assert model.log == []


def test_parts_of_parameters_that_another_library_keeps_there():
    model = nn.Linear(2, 2)
    model.weight.grad_sample = torch.ones(3, 2, 2)
    kept = model.weight.grad_sample
    with preserved(model):
        model.weight.grad_sample = None
        kept.mul_(0)
        model.bias.extra = 1
    assert model.weight.grad_sample is kept and bool((kept == 1).all())


@pytest.mark.parametrize("maxsize", [None, 2, 128])
def test_a_cache_is_read_and_not_written_to(maxsize):
    made = []

    @functools.lru_cache(maxsize=maxsize)
    def function(*args, **kwargs):
        made.append(args)
        return len(made)

    function(1), function("a"), function((1, 2)), function(2.5, x=3)
    before, info = entries_of(function), function.cache_info()
    apart = CacheApart(function, before)
    assert apart(2.5, x=3) == 4 and apart((1, 2)) == 3
    assert apart(9) == apart(9) == 5 and apart(9, y=1) == apart(9, y=1) == 6
    assert function.cache_info() == info and entries_of(function) == before
    assert CacheApart(functools.cache(lambda: 7), {})() == 7
