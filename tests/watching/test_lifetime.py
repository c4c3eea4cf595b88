"""A watch begins with clear errors, never raises into training, and ends with nothing left behind."""

import gc
import math
import os
import subprocess
import sys
import threading
import warnings
import weakref
from operator import attrgetter

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.errors import InvalidInput, RunError
from diag.watching.hooks.hub import HUB


def step(model, x, y, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_mistakes_are_told_at_construction(tiny, tmp_path):
    model, _, _ = tiny
    frozen = nn.Linear(2, 2).requires_grad_(False)
    cases = [
        ((torch.relu,), {}, InvalidInput, "The model is a builtin_function_or_method; expected a torch.nn.Module"),
        ((frozen,), {}, InvalidInput, "has no trainable parameter; set requires_grad"),
        ((nn.LazyLinear(3),), {}, InvalidInput, "weight has no shape yet; call the model once"),
        ((model,), {"loss_fn": 3}, InvalidInput, "loss_fn is an int; expected loss_fn"),
        ((model,), {"every": 0}, InvalidInput, "every is 0; expected a number of steps, 1 or more"),
        ((model,), {"budget": -1}, InvalidInput, "budget is -1; expected a share of wall time"),
        ((model,), {"budget": math.nan}, InvalidInput, "budget is nan"),
        ((model,), {"budget": 50}, InvalidInput, "budget is 50; expected a share of wall time from 0 to 1"),
        ((model,), {"budget": True}, InvalidInput, "budget is True"),
        ((model,), {"every": True}, InvalidInput, "every is True"),
        ((model,), {"resume": "later"}, InvalidInput, "resume is 'later'; expected True, False or the number"),
        ((model,), {"resume": -1}, InvalidInput, "resume is -1; expected True, False or the number"),
        ((model,), {"resume": "yes"}, InvalidInput, "resume is 'yes' and there is no run=; give the folder"),
        ((model,), {"budget": "5 %"}, InvalidInput, "budget is '5 %'; expected a share of wall time"),
        ((model,), {"every": 2.5}, InvalidInput, "every is 2.5; expected a number of steps"),
        ((model,), {"on_finding": 3}, InvalidInput, "on_finding is an int; expected a function of one finding"),
        (
            (model,),
            {"instruments": 3},
            InvalidInput,
            "instruments is an int; expected names, or a dict of settings",
        ),
        (
            (model,),
            {"instruments": {"sharpness": 3}},
            InvalidInput,
            "settings of sharpness are an int; expected a dict",
        ),
        (
            (model,),
            {"instruments": {"sharpness": {"rho": "x"}}},
            InvalidInput,
            "sharpness.rho takes a number",
        ),
        ((model,), {"run": 3}, InvalidInput, "run is an int; expected the path of a folder"),
        ((model,), {"optimizer": 3}, InvalidInput, "optimizer is an int; expected a torch.optim.Optimizer"),
        ((model,), {"instruments": ["softmax_colapse"]}, InvalidInput, "did you mean softmax_collapse"),
        (
            (model,),
            {"instruments": {"softmax_collapse": {"alarm": 1}}},
            InvalidInput,
            "softmax_collapse has no setting 'alarm'",
        ),
        ((model,), {"probe": []}, InvalidInput, "holds no batch"),
        (
            (model,),
            {"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)},
            InvalidInput,
            "holds no trainable parameter of the model",
        ),
    ]
    for args, kwargs, error, text in cases:
        with pytest.raises(error, match=text.replace("(", r"\(")):
            diag.watch(*args, **kwargs)
    with pytest.raises(RunError):
        (tmp_path / "file").write_text("")
        diag.watch(model, run=tmp_path / "file")
    assert not HUB.listeners


def test_numbers_are_converted_as_settings_are(tiny, tmp_path):
    model, _, _ = tiny
    with diag.watch(model, run=tmp_path, instruments=[], budget="0.02", every="3", resume="0") as watcher:
        assert watcher.run.metadata["budget"] == 0.02 and watcher.run.metadata["every"] == 3
    with diag.watch(model, instruments=[], budget="inf", every=torch.tensor(2)) as watcher:
        assert watcher.run.metadata["budget"] == math.inf and watcher.run.metadata["every"] == 2


def test_a_run_that_another_process_writes_is_refused(tiny, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    model, _, _ = tiny
    diag.watch(model, run=tmp_path).close()
    with open(tmp_path / "writer.lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="is being written by process"):
            diag.watch(model, run=tmp_path)


def test_nothing_is_left_behind(tiny, helpers):
    model, x, y = tiny
    assert helpers.is_torch_untouched()
    originals = (F.cross_entropy.__code__, torch.autograd.backward, torch.nn.utils.clip_grad.clip_grad_norm_)
    with diag.watch(model, instruments=[]) as watcher:
        assert not helpers.is_torch_untouched()
        step(model, x, y)
    assert helpers.is_torch_untouched()
    assert originals == (
        F.cross_entropy.__code__,
        torch.autograd.backward,
        torch.nn.utils.clip_grad.clip_grad_norm_,
    )
    assert not model._forward_hooks and not model._forward_hooks_with_kwargs
    step(model, x, y)
    assert watcher.last_step == 1
    watcher.close()


def test_a_second_watch_replaces_the_first(tiny, tmp_path):
    model, x, y = tiny
    first = diag.watch(model, run=tmp_path / "a", instruments=[])
    step(model, x, y)
    second = diag.watch(model, run=tmp_path / "b", instruments=[])
    step(model, x, y)
    again = diag.watch(model, run=tmp_path / "b", instruments=[])
    step(model, x, y)
    assert len(model._forward_hooks) == 1 and len(HUB.listeners) == 1
    assert "closed" in repr(first) and "closed" in repr(second) and "watching" in repr(again)
    assert (first.last_step, second.last_step, again.last_step) == (1, 1, 1)
    again.close()
    assert not model._forward_hooks


def test_a_run_folder_taken_over_by_another_model(tmp_path, tiny):
    model, x, y = tiny
    first = diag.watch(model, run=tmp_path, instruments=[])
    other = nn.Linear(6, 3).double()
    with diag.watch(other, run=tmp_path, instruments=[]):
        assert "closed" in repr(first)
        step(model, x, y)
        step(other, x, y)
    assert diag.load(tmp_path).history.layers == ("weight", "bias")


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()])
def test_an_exception_of_the_loop_passes_and_the_run_is_closed(tiny, tmp_path, helpers, error):
    model, x, y = tiny
    with pytest.raises(type(error)), diag.watch(model, run=tmp_path) as watcher:
        step(model, x, y)
        raise error
    assert "closed" in repr(watcher) and helpers.is_torch_untouched()
    run = diag.load(tmp_path)
    assert len(run.history) == 1
    assert f"Training ended by {type(error).__name__}" in helpers.texts(run, "exception")


def test_an_exception_in_the_model_or_in_backward_changes_nothing(tiny):
    model, x, y = tiny
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=[]) as watcher:
        with pytest.raises(RuntimeError):
            model(x[:, :2])
        with pytest.raises(RuntimeError):
            model(x).backward()
        with pytest.raises(IndexError):
            F.cross_entropy(model(x), y + 7)
        with pytest.raises(TypeError):
            F.cross_entropy()
        with pytest.raises(TypeError):
            nn.utils.clip_grad_norm_()
        step(model, x, y, optimizer)
    assert numpy.isfinite(watcher.run.history.loss).all()


PARTS = {
    "_losses.forward_called": "inputs and outputs",
    "_losses.loss_called": "loss",
    "_losses.backward_called": "loss",
    "_losses.backward_done": "loss",
    "_steps.gradients.before_clip": "gradients before clipping",
    "_steps.before_step": "optimizer steps",
    "_steps.after_step": "optimizer steps",
    "_measurements.run": "measurements",
    "_rows.add": "optimizer steps",
}


@pytest.mark.parametrize("where", PARTS)
def test_an_error_of_ours_is_recorded_once_and_never_raised(where, tiny, helpers):
    model, x, y = tiny
    with diag.watch(model, budget=math.inf, instruments=["softmax_collapse"], probe=(x, y)) as watcher:
        owner, name = where.rsplit(".", 1)

        def broken(*args, **kwargs):
            raise ZeroDivisionError("ours")

        setattr(attrgetter(owner)(watcher), name, broken)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    errors = [e for e in watcher.run.events if e.kind == "internal error"]
    assert len(errors) == 1 and f"failed to observe {PARTS[where]} (ZeroDivisionError: ours" in errors[0].text
    assert helpers.is_torch_untouched()


def test_a_full_disk_is_told_at_the_end(tiny, tmp_path):
    model, x, y = tiny
    watcher = diag.watch(model, run=tmp_path, instruments=[])
    step(model, x, y)

    def full(*args):
        raise RunError("steps.bin cannot be written (No space left on device); free some space.")

    watcher._recorder._writer.append_table = full
    step(model, x, y)
    with pytest.warns(UserWarning, match="The record of the watched run is not complete.*No space left"):
        watcher.close()
    assert len(diag.load(tmp_path).history) == 1


def test_warnings_turned_into_errors_do_not_stop_training(tiny):
    model, x, y = tiny
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with diag.watch(model, budget=math.inf, probe=(x, y), instruments=["softmax_collapse"]):
            for _ in range(3):
                step(model, x, y)


def test_an_instrument_that_breaks_is_recorded_and_retired(tiny, monkeypatch):
    from diag.registry import instruments

    model, x, y = tiny
    which = instruments()["softmax_collapse"]

    def softmax_collapse(*args, **kwargs):
        raise ZeroDivisionError("in an instrument")

    monkeypatch.setattr(which, "function", softmax_collapse)
    with diag.watch(model, budget=math.inf, every=1, probe=(x, y), instruments=["softmax_collapse"]) as watcher:
        for _ in range(30):
            step(model, x, y)
    outcomes = watcher.run.outcomes
    assert [type(o).__name__ for _, o in outcomes] == ["Failed"] * 3
    assert "ZeroDivisionError: in an instrument" in outcomes[0][1].reason
    assert [s for s, _ in outcomes] == [1, 4, 16]


def test_what_cannot_be_measured_is_said_once(tiny):
    model, x, y = tiny
    with diag.watch(model, budget=math.inf, every=1, probe=(x, y), instruments=["mode_connectivity"]) as watcher:
        for _ in range(5):
            step(model, x, y)
    assert len(watcher.run.outcomes) == 1 and "give it other=" in watcher.run.outcomes[0][1].reason


def test_a_loop_that_never_steps_is_told(tiny, helpers):
    model, x, y = tiny
    with diag.watch(model) as watcher:
        F.cross_entropy(model(x), y).backward()
    assert "No optimizer step on the model's parameters was seen" in helpers.texts(watcher.run)


def test_a_forgotten_watcher_goes_with_its_model(helpers):
    model = nn.Linear(2, 2)
    gone = weakref.ref(diag.watch(model, instruments=[]))
    assert gone() is not None and HUB.listeners
    del model
    gc.collect()
    assert gone() is None and not HUB.listeners and helpers.is_torch_untouched()


def test_only_rank_zero_records(tiny, monkeypatch, tmp_path):
    model, x, y = tiny
    monkeypatch.setenv("RANK", "3")
    with diag.watch(model, run=tmp_path / "run") as watcher:
        step(model, x, y)
        assert not model._forward_hooks and not HUB.listeners and "not rank 0" in repr(watcher)
    assert watcher.run.history is None and not (tmp_path / "run").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_touch_the_record(tiny, tmp_path):
    model, x, y = tiny
    watcher = diag.watch(model, run=tmp_path, instruments=[])
    step(model, x, y)
    child = os.fork()
    if child == 0:
        step(model, x, y)
        watcher.close()
        os._exit(0 if not HUB.listeners else 1)
    assert os.waitpid(child, 0)[1] == 0
    step(model, x, y)
    watcher.close()
    run = diag.load(tmp_path)
    assert run.history.steps.tolist() == [1, 2] and run.torn == 0


def test_training_in_another_thread_is_watched(tiny):
    model, x, y = tiny
    watcher = diag.watch(model, instruments=["softmax_collapse"], budget=math.inf, probe=(x, y))
    thread = threading.Thread(target=lambda: [step(model, x, y) for _ in range(3)])
    thread.start()
    thread.join()
    watcher.close()
    assert len(watcher.run.history) == 3 and watcher.run.series("softmax_collapse")


def test_torch_func_and_other_uses_of_the_losses_are_left_alone(tiny):
    model, x, y = tiny
    values = dict(model.named_parameters())

    def loss(values, x, y):
        return F.cross_entropy(torch.func.functional_call(model, values, (x[None],)), y[None])

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    expected = per_example(values, x, y)
    with diag.watch(model, instruments=[]) as watcher:
        got = per_example(values, x, y)
        traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
        with torch.device("cpu"):
            step(model, x, y)
    assert all(torch.equal(got[n], expected[n]) for n in expected) and traced is not None
    assert len(watcher.run.history) == 1 and not [e for e in watcher.run.events if e.kind == "internal error"]


ORDERS = (
    "import diag; diag.watch; from diag.watching.watcher import Watcher",
    "from diag.watching.watcher import Watcher; import diag",
    "from diag.watching.watcher import watch, Watcher; import diag",
    "import diag.watching.measure.schedule; import diag",
    "from diag import watch; import diag",
)


FRESH = """
import inspect, sys, torch
x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
for order in {orders!r}:
    for name in [n for n in sys.modules if n.split(".")[0] == "diag"]:
        del sys.modules[name]
    exec(order)
    import diag
    model = torch.nn.Linear(3, 2)
    watcher = diag.watch(model, instruments=[], run={run!r})
    from diag.watching.watcher import Watcher, watch
    assert isinstance(watcher, Watcher) and callable(diag.watch) and callable(diag.report), order
    assert inspect.signature(diag.watch) == inspect.signature(watch)
    import diag.reporting
    from diag.reporting import report
    assert callable(diag.report) and callable(report), order
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(5):
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    if order != {orders!r}[-1]:
        watcher.close()
"""


def test_any_order_of_imports_and_a_script_that_ends_without_closing(tmp_path):
    code = FRESH.format(orders=ORDERS, run=str(tmp_path / "run"))
    subprocess.run([sys.executable, "-c", code], check=True, text=True)
    run = diag.load(tmp_path / "run")
    assert len(run.history) == 5 and run.wall_seconds > 0
