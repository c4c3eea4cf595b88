"""Hooks of others do not fire while measuring; torch's own do, and a hook that changes the network is refused."""

import functools
import math
import threading

import pytest
import torch
from torch import nn
from torch.nn.modules import module as all_modules
from torch.nn.utils import prune

import diag
from diag.errors import Unsupported
from diag.registry import attempt, instruments
from diag.snapshot.preserve import preserved
from diag.snapshot.state.doubtful_hooks import doubtful_hooks, may_change
from diag.snapshot.state.hooks import FORWARD_HOOKS, silent

MANY = {"budget": math.inf, "instruments": ["softmax_collapse", "gradient_coherence", "hessian_spectrum"]}
HOOK_DICTS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def data(n=48):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(3))
    return x, x[:, :3].argmax(1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def snapshot(model, **arguments):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return diag.Snapshot(model, nn.CrossEntropyLoss(), data(), held_out=data(24), optimizer=optimizer, **arguments)


@pytest.fixture
def hooked(model):
    calls, handles = [], []

    def note(kind):
        def hook(*args, **kwargs):
            calls.append(kind)

        return hook

    part, weight = model[0], model[0].weight
    handles = [
        part.register_forward_pre_hook(note("pre")),
        part.register_forward_hook(note("forward")),
        part.register_forward_hook(note("always"), with_kwargs=True, always_call=True),
        part.register_full_backward_pre_hook(note("backward pre")),
        part.register_full_backward_hook(note("backward")),
        weight.register_hook(note("tensor")),
        weight.register_post_accumulate_grad_hook(note("accumulated")),
        all_modules.register_module_forward_pre_hook(note("any pre")),
        all_modules.register_module_forward_hook(note("any forward")),
        all_modules.register_module_full_backward_pre_hook(note("any backward pre")),
        all_modules.register_module_full_backward_hook(note("any backward")),
    ]
    yield model, calls
    for handle in handles:
        handle.remove()


def hook_dicts(model):
    """Each dict of hooks by id, with its entries in order."""
    held = [vars(m)[name] for m in model.modules() for name in HOOK_DICTS]
    held += [getattr(all_modules, f"_global{name}") for name in HOOK_DICTS]
    held += [getattr(p, n) for p in model.parameters() for n in ("_backward_hooks", "_post_accumulate_grad_hooks")]
    return [(id(hooks), list(hooks.items())) for hooks in held if hooks is not None]


def train_step(model):
    x, y = data()
    nn.functional.cross_entropy(model(x), y).backward()
    model.zero_grad()


@pytest.mark.parametrize("name", instruments())
def test_no_hook_of_others_fires_in_an_instrument(hooked, name):
    model, calls = hooked
    train_step(model)
    assert {"pre", "forward", "always", "backward pre", "backward", "tensor", "accumulated"} <= set(calls)
    before, once = hook_dicts(model), list(calls)
    calls.clear()
    other = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).state_dict()
    attempt(snapshot(model, other=other, previous=other), instruments()[name])
    assert calls == [] and hook_dicts(model) == before
    train_step(model)
    assert calls == once


def test_dicts_are_restored_after_an_exception_and_what_is_hooked_inside(model):
    keep = model[0].register_forward_hook(print)
    gone = model[0].register_forward_hook(repr)
    before = hook_dicts(model)
    with pytest.raises(ZeroDivisionError), silent(model):
        assert not model[0]._forward_hooks
        gone.remove()  # by the network itself: an unwatched one would still have it
        model[0].register_forward_hook(len)
        raise ZeroDivisionError
    assert hook_dicts(model) == before
    keep.remove()


def test_our_own_hooks_come_and_go_inside(model):
    def ours(*args):
        pass

    ours.__module__ = "diag.somewhere"
    foreign = model[0].register_forward_hook(print)
    before = model[0].register_forward_hook(ours)
    with preserved(model):
        assert list(model[0]._forward_hooks.values()) == [ours]
        after = model[0].register_forward_hook(functools.partial(ours))
        before.remove()
    assert list(model[0]._forward_hooks) == [foreign.id, after.id]


def test_hooks_of_all_modules_fire_in_other_threads(model):
    calls = []
    handle = all_modules.register_module_forward_hook(lambda *a: calls.append(threading.get_ident()))
    try:
        begin = threading.Event()
        thread = threading.Thread(target=lambda: begin.wait(10) and nn.Linear(1, 1)(torch.ones(1, 1)))
        thread.start()
        with preserved(model), preserved(nn.Linear(1, 1)):
            model(data()[0])
            begin.set()
            thread.join()
            assert set(calls) == {thread.ident}
        model(data()[0])
        assert threading.get_ident() in calls
    finally:
        handle.remove()
    assert not all_modules._global_forward_hooks


def test_two_threads_that_measure_leave_the_hooks_of_all_modules():
    hook = lambda *a: None  # noqa: E731
    handle = all_modules.register_module_forward_hook(hook)
    inside, leave = threading.Event(), threading.Event()

    def measure():
        with preserved(nn.Linear(1, 1)):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=measure)
    try:
        with preserved(nn.Linear(1, 1)):
            thread.start()
            inside.wait(10)
        leave.set()
        thread.join()
        assert all_modules._global_forward_hooks[handle.id] is hook
    finally:
        handle.remove()


# ---- hooks that are a part of the network


def reference(model, build):
    """Logits by the plain weights that `build` gives for each linear layer."""
    x = data()[0]
    for part in model:
        x = x @ build(part).T + part.bias if isinstance(part, nn.Linear) else part(x)
    return x


@pytest.mark.parametrize(
    "hook", [nn.utils.spectral_norm, nn.utils.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_torch_s_functional_hooks_fire(model, hook):
    hook(model[0])
    x, _ = data()
    model.eval()
    expected = model(x).detach()
    with torch.no_grad():
        for p in model[0].parameters():
            p.mul_(1.5)
    moved = snapshot(model).quantity("logits")
    assert not torch.equal(moved, expected)  # the derived weight is computed again
    assert torch.equal(moved, model(x).detach())


def test_a_hook_that_changes_the_outputs_is_refused(model):
    def doubled(module, args, output):
        return 2 * output

    model[0].register_forward_hook(doubled)
    match = (
        r"without doubled of 0 the model gives something else; move what such a hook does into the module's forw"
    )
    with pytest.raises(Unsupported, match=match):
        snapshot(model).quantity("logits")
    outcome = attempt(snapshot(model), instruments()["softmax_collapse"])
    assert "without doubled of 0 the model gives something else" in outcome.reason
    with diag.watch(model, budget=math.inf, instruments=["softmax_collapse"]) as watcher:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data()[0]), data()[1]).backward()
            optimizer.step()
    assert not watcher.run.series("softmax_collapse")


def test_a_hook_that_writes_into_the_weights_is_refused(model):
    def scaled(module, args):
        module.__dict__["scale"] = 3.0
        args[0].mul_(2)

    model[2].register_forward_pre_hook(scaled)
    with pytest.raises(Unsupported, match="without scaled of 2 the model gives something else"):
        snapshot(model).quantity("logits")


def test_a_network_that_lives_on_what_its_hooks_keep_is_refused(model):
    class Collecting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.found = model, {}
            model[0].register_forward_hook(self.keep)

        def keep(self, module, args, output):
            self.found["first"] = output

        def forward(self, x):
            self.body(x)
            return self.found.pop("first")

    with pytest.raises(Unsupported, match=r"without Collecting\.keep of body\.0 the model gives something else"):
        snapshot(Collecting()).quantity("logits")


def test_a_hook_that_only_looks_is_not_tried():
    calls, kept = [], {}

    def counting(module, args, output):
        calls.append(output.sum())

    class Looking:
        def __call__(self, module, args):
            calls.append(1)

    def keeping(module, args, output):
        kept["x"] = output

    def sometimes(module, args, output):
        return output if output.ndim > 7 else None

    assert not may_change(lambda *a: calls.append(a[2].sum().item())) and not may_change(lambda *a: calls.append(1))
    assert may_change(lambda *a: calls.append(1) or 2) and may_change(lambda m, a, o: o.clone())
    assert not may_change(counting) and not may_change(Looking()) and not may_change(functools.partial(counting))
    assert may_change(keeping) and may_change(lambda m, a, o: o) and may_change(sometimes) and may_change(print)
    assert may_change(lambda m, a, o: o.requires_grad_())
    layer = nn.Linear(1, 1)
    layer.register_forward_hook(counting)
    assert doubtful_hooks(layer) == []
    layer.register_forward_hook(keeping)
    assert doubtful_hooks(layer) == [("", keeping)]
    assert FORWARD_HOOKS == ("_forward_pre_hooks", "_forward_hooks")


def test_a_doubtful_hook_that_changes_nothing_is_tried_once(model):
    kept = {}

    def keeping(module, args, output):
        kept["calls"] = kept.get("calls", 0) + 1

    model[0].register_forward_hook(keeping)
    found = snapshot(model)
    found.quantity("logits")
    tried = kept.get("calls", 0)
    found.quantity("gradient")
    found.quantity("losses")
    assert kept.get("calls", 0) == tried
    assert torch.equal(found.quantity("logits"), nn.Sequential(*model)(data()[0]))


# ---- libraries


def private(model, x, y, watched, **arguments):
    """A few steps of Opacus; the noise is of a fixed seed."""
    opacus = pytest.importorskip("opacus")
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    engine = opacus.PrivacyEngine()
    generator = torch.Generator().manual_seed(1)
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0,
        noise_generator=generator, poisson_sampling=False,
    )  # fmt: skip
    watcher = diag.watch(model, **arguments) if watched else None
    for _ in range(3):
        for a, b in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(a), b).backward()
            if watched == "snapshot":
                snapshot(model).quantity("gradient")
            optimizer.step()
    if watcher is not None:
        watcher.close()
    return model, watcher


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arguments", [{}, MANY], ids=["default", "many"])
def test_opacus_is_undisturbed_by_a_watch(arguments):
    nets = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x, y = data()
    plain, _ = private(nets[0], x, y, watched=False)
    watched, watcher = private(nets[1], x, y, watched=True, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    assert len(watcher.run.history) == 9
    if arguments:
        assert watcher.run.series("softmax_collapse")


@pytest.mark.filterwarnings("ignore")
def test_a_snapshot_between_the_steps_of_opacus():
    grad_sample = pytest.importorskip("opacus").GradSampleModule
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    private_model, (x, y) = grad_sample(model), data()
    loss = nn.functional.cross_entropy(private_model(x), y)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(x), y)
    found = snapshot(private_model)
    gradient = found.quantity("gradient")  # between forward and backward pass
    assert torch.equal(found.quantity("losses").mean(), expected) or abs(loss - expected) < 1e-6
    loss.backward()
    for name, p in private_model.named_parameters():
        assert torch.allclose(p.grad_sample.mean(0), gradient[name], atol=1e-6)
    for which in instruments().values():
        attempt(snapshot(private_model), which)
