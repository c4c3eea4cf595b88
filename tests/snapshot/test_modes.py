"""Modes of the program see its own operations and none of diag's; what they change of a network is refused."""

import collections
import contextlib
import gc

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import diag
from diag.errors import Unsupported
from diag.snapshot.state.looking_on import looks_on
from diag.snapshot.state.modes import unseen


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.seen[f"{getattr(func, '__self__', '')} {func.__name__}"] += 1
        out = func(*args, **kwargs)
        self.last = func
        return out


class Halving(TorchDispatchMode):
    """Another network: what each matrix product gives is halved."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out / 2 if func is torch.ops.aten.addmm.default else out


@contextlib.contextmanager
def counted():
    flops, functions, operations = FlopCounterMode(display=False), Functions(), Operations()
    with flops, functions, operations:
        yield lambda: (flops.get_total_flops(), functions.seen, operations.seen)


SOME = ["softmax_collapse", "gradient_coherence", "hessian_spectrum", "edge_of_stability", "gradient_flow"]


def trained(watched, closure, each):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    x, y, loss = torch.randn(64, 6), torch.randint(0, 3, (64,)), nn.CrossEntropyLoss()
    optimizer = torch.optim.LBFGS(model.parameters()) if closure else torch.optim.Adam(model.parameters(), 1e-2)

    def value():
        optimizer.zero_grad()
        descended = loss(model(x), y)
        descended.backward()
        nn.utils.clip_grad_norm_((p for p in model.parameters() if p.grad is not None), 1.0)
        return descended

    def step():
        if closure:
            optimizer.step(value)
        else:
            value()
            optimizer.step()

    totals = []
    with contextlib.nullcontext() if each else counted() as whole:
        watcher = (
            diag.watch(model, budget=1.0, instruments=SOME if each else "all")
            if watched
            else contextlib.nullcontext()
        )
        with watcher:
            for i in range(6):
                with counted() if each else contextlib.nullcontext() as one:
                    step()
                if each:
                    totals.append(one())
                if watched and i == 4:
                    watcher.measure()
    return totals or whole(), [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("closure", [False, True], ids=["step", "closure"])
@pytest.mark.parametrize("each", [False, True], ids=["around the training", "around each step"])
def test_a_mode_counts_the_same_watched_and_unwatched(closure, each):
    plain, weights = trained(False, closure, each)
    watched, same = trained(True, closure, each)
    assert watched == plain
    assert all(map(torch.equal, weights, same))
    gc.collect()


def test_a_mode_around_a_loss_of_several_tensors_sees_nothing_of_a_watch():
    model, x = nn.Linear(6, 4), torch.randn(9, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step():
        optimizer.zero_grad()
        outputs = model(x)
        with Functions() as functions:
            loss = nn.functional.triplet_margin_loss(outputs[:3], outputs[3:6], outputs[6:])
        loss.backward()
        optimizer.step()
        return functions.seen

    plain = step()
    with diag.watch(model):
        assert [step() for _ in range(3)] == [plain] * 3


def of_two_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return diag.Snapshot(model, nn.CrossEntropyLoss(), (torch.randn(32, 6), torch.randint(0, 3, (32,))))


@pytest.mark.parametrize("name", ["softmax_collapse", "hessian_spectrum", "gradient_coherence"])
def test_a_snapshot_measures_unseen_and_the_same(name):
    without = diag.measure(of_two_layers(), name)
    snapshot = of_two_layers()
    with counted() as seen:
        within = diag.measure(snapshot, name)
        assert seen() == (0, {}, {})
        torch.ones(2) + 1  # they are back
        assert seen()[2]["aten.add.Tensor"] == 1
    assert within == without


def test_a_mode_that_changes_the_network_is_refused():
    snapshot = of_two_layers()
    with Halving(), pytest.raises(Unsupported, match="without Halving the model gives something else"):
        diag.softmax_collapse(snapshot)
    diag.softmax_collapse(of_two_layers())


def test_the_modes_are_back_in_their_order_after_an_error_and_a_default_device_stays():
    functions, operations = Functions(), Operations()
    with functions, torch.device("meta"), operations:
        before = [torch._C._get_function_stack_at(i) for i in range(2)]
        functions.seen.clear()  # entering the device was seen
        with contextlib.suppress(ZeroDivisionError), unseen():
            made = torch.ones(2)
            raise ZeroDivisionError
        assert not functions.seen and not operations.seen
        assert [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())] == before
        assert torch._C._get_dispatch_stack_at(torch._C._len_torch_dispatch_stack() - 1) is operations
        torch.ones(2)
    assert operations.seen and functions.seen and made.device.type == "meta"
    assert not torch._C._len_torch_function_stack() and not torch._C._len_torch_dispatch_stack()


def test_a_function_that_calls_itself_unseen_puts_the_modes_back_once():
    @unseen()
    def depth(n):
        """One for each call."""
        torch.ones(2)
        return 1 + depth(n - 1) if n else 0

    assert depth.__doc__ == "One for each call."
    with Functions() as functions, Operations() as operations:
        functions.seen.clear()
        assert depth(3) == 3 and not functions.seen and not operations.seen
        torch.ones(2)
        assert functions.seen and operations.seen


class InPlace(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        out.mul_(2)
        return out


class Rebinding(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = [a.half() for a in args]
        return func(*args, **(kwargs or {}))


class Stored(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        out[0] = 0
        return out


class Other(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return torch.neg(*args) if func is torch.abs else func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "only_looks_on"),
    [(Operations, True), (Functions, True)] + [(k, False) for k in (Halving, InPlace, Rebinding, Stored, Other)],
)
def test_what_a_mode_does_is_read_from_its_code(kind, only_looks_on):
    assert looks_on(kind) is only_looks_on


def test_a_watched_training_inside_a_mode_that_may_change_it_says_so():
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=["softmax_collapse"]) as watcher:
        for _ in range(3):
            with Halving():
                nn.functional.cross_entropy(model(torch.ones(4, 6)), torch.tensor([0, 1, 2, 0])).backward()
                optimizer.step()
    (said,) = [e.text for e in watcher.run.events if "Halving" in e.text]
    assert "without it" in said
