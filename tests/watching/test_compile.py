"""A compiled model is watched too, and its graphs are those of the unwatched model."""

import math
import shutil

import numpy
import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F

import diag


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    return x, x[:, :3].argmax(1)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(model, call, steps=8):
    """Training through `call`; the counter of the compiler tells how many graphs it made."""
    x, y = data()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses, norms = [], []
    for i in range(steps):
        batch = slice(8 * (i % 8), 8 * (i % 8) + 8)
        optimizer.zero_grad()
        loss = F.cross_entropy(call(x[batch]), y[batch])
        loss.backward()
        losses.append(loss.item())
        norms.append([p.grad.norm().item() for p in model.parameters()])
        optimizer.step()
    return losses, norms


def compiled_training(backend, when, watched):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Net()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    options = {"budget": math.inf, "every": 2, "instruments": ["softmax_collapse"], "probe": data()}
    watcher = None
    if watched and when in ("watch first", "in place after"):
        watcher = diag.watch(model, **options)
    if when.startswith("in place"):
        model.compile(backend=counter)
        call = model
    else:
        call = torch.compile(model, backend=counter)
    if when == "after some steps":
        train(model, call, 2)
    if watched and watcher is None:
        watcher = diag.watch(call if when == "the wrapper" else model, **options)
    losses, norms = train(model, call)
    if watcher is not None:
        watcher.close()
    return model, counter, losses, norms, watcher


WHEN = ("watch first", "compile first", "after some steps", "the wrapper", "in place", "in place after")


# Only inductor generates code; it needs a C++ compiler and takes seconds for each graph.
INDUCTOR = pytest.param(
    "inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="g++")]
)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_compiled_training_is_recorded_and_the_same(backend, when, helpers):
    plain, plain_counter, _, _, _ = compiled_training(backend, when, False)
    model, counter, losses, norms, watcher = compiled_training(backend, when, True)
    helpers.assert_identical(model.state_dict(), plain.state_dict())
    assert counter.frame_count == plain_counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    run = watcher.run
    numpy.testing.assert_allclose(run.history.loss, losses, rtol=1e-6)
    numpy.testing.assert_allclose(run.history.gradient_norm, norms, rtol=1e-5)
    assert len(run.series("softmax_collapse")) >= 3, run.events
    assert not [e for e in run.events if e.kind == "internal error"]


def test_what_needs_the_loss_waits_until_a_compiled_model_has_shown_it():
    """The wrapper is found after the first step; what lacked the loss then would not be asked again."""
    torch.manual_seed(0)
    model = Net()
    cheap = {"sharpness": {"num_draws": 4, "steps": 1}}
    options = {"budget": math.inf, "every": 1, "instruments": cheap, "probe": data()}
    with diag.watch(model, **options) as watcher:
        train(model, torch.compile(model, backend="eager"), 4)
    assert [step for step, _ in watcher.run.series("sharpness")] == [2, 3, 4]
    assert not watcher.run.outcomes


@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_that_is_compiled_in_the_middle_of_training(in_place):
    torch.manual_seed(0)
    model = Net()
    with diag.watch(model, instruments=["softmax_collapse"]) as watcher:
        losses, _ = train(model, model, 3)
        if in_place:
            model.compile(backend="eager")
        losses += train(model, model if in_place else torch.compile(model, backend="eager"), 8)[0]
    # What is compiled is looked for after steps without a call: the first of them shows no loss of its own.
    recorded = watcher.run.history.loss
    assert len(recorded) == 11
    numpy.testing.assert_allclose(numpy.delete(recorded, 3), numpy.delete(losses, 3), rtol=1e-6)
    assert watcher._training.calls == 10


@pytest.mark.parametrize("when", ["watch first", "compile first", "in place"])
def test_no_step_of_a_compiled_model_is_read_for_gradients(when):
    """Reading the calls inside a step would make the compiler compile them again, and other kernels train."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Net()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    options = {"budget": math.inf, "every": 1, "instruments": ["gradient_coherence"], "probe": data()}
    watcher = diag.watch(model, **options) if when == "watch first" else None
    if when == "in place":
        model.compile(backend=counter)
    call = model if when == "in place" else torch.compile(model, backend=counter)
    watcher = watcher or diag.watch(model, **options)
    train(model, call)
    watcher.close()
    assert counter.frame_count == 1 and len(watcher.run.series("gradient_coherence")) >= 6
    assert "the model is compiled" in str(watcher.run.series("gradient_coherence")[-1][1].notes)


def test_the_probe_of_a_compiled_model_is_learned():
    torch.manual_seed(0)
    model = Net()
    with diag.watch(model, instruments=["softmax_collapse"]) as watcher:
        train(model, torch.compile(model, backend="eager"), 20)
    # The wrapper is found after the first step, so the first micro-batch is missing.
    assert watcher._probe.size == 64 and watcher.run.series("softmax_collapse")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_loss_inside_the_compiled_function(backend, helpers):
    """HF models compute their loss inside; then the value that backward() is called on is what can be seen."""
    x, y = data()

    def run(watched):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Net()
        counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
        loss_of = torch.compile(lambda x, y: F.cross_entropy(model(x), y), backend=counter, fullgraph=True)
        watcher = diag.watch(model, instruments=[]) if watched else None
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses = []
        for _ in range(4):
            loss = loss_of(x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if watcher is not None:
            watcher.close()
        return model, counter, losses, watcher

    plain, plain_counter, losses, _ = run(False)
    model, counter, _, watcher = run(True)
    helpers.assert_identical(model.state_dict(), plain.state_dict())
    assert counter.frame_count == plain_counter.frame_count
    numpy.testing.assert_allclose(watcher.run.history.loss, losses, rtol=1e-6)
    assert "No call of the model in training was seen" in helpers.texts(watcher.run)


def test_nothing_is_left_on_a_compiled_model():
    model = Net()
    wrapper = torch.compile(model, backend="eager")
    inner = Net()
    inner.compile(backend="eager")
    original = inner._compiled_call_impl
    for target in (model, inner):
        diag.watch(target, instruments=[]).close()
    assert not model._forward_hooks and not wrapper._forward_hooks and not inner._forward_hooks
    assert inner._compiled_call_impl is original
