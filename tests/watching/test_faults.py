"""Whatever breaks in diag while a training is watched, nothing of it reaches the loop.

The body of each function of the rooms that a watch uses is exchanged for one that raises, so that it raises however
it was taken hold of. The guard itself and the few functions that torch or the user calls first are left out: what
they call is what fails.
"""

import ast
import contextlib
import importlib
import inspect
import pkgutil
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.watching.hooks.hub import HUB

ROOMS = ("diag.watching", "diag.run", "diag.snapshot")
# What torch or the user calls first. Each is a few lines that hand on to a function inside the guard.
OUTERMOST = {
    "guarded", "safely", "shielded",
    "Watcher.close", "Watcher.__enter__", "Watcher.__exit__", "Watcher.measure",
    "ForwardHook.__call__", "_ModuleHook.__call__", "_Before.__call__", "_After.__call__",
    "_detour", "_detoured", "_observed",
}  # fmt: skip


class Injected(Exception):
    """Its text is unavailable, too."""

    def __str__(self):
        raise RuntimeError("no text")


def functions():
    """Every plain function of the rooms, by module and qualified name; methods, properties, what is decorated."""
    found = {}
    for room in ROOMS:
        package = importlib.import_module(room)
        names = [room, *(m.name for m in pkgutil.walk_packages(package.__path__, f"{room}."))]
        for name in names:
            module = importlib.import_module(name)
            for owner in [module, *(c for c in vars(module).values() if inspect.isclass(c))]:
                for value in vars(owner).values():
                    for function in plain(value):
                        if function.__module__ == name and Path(function.__code__.co_filename).is_relative_to(ROOT):
                            found[f"{name}:{function.__qualname__}"] = function
    return {name: f for name, f in found.items() if name.split(":")[1] not in OUTERMOST}


ROOT = Path(diag.__file__).parent


def plain(value):
    """The functions behind an attribute."""
    value = getattr(value, "__func__", value)  # class and static methods
    if isinstance(value, property):
        return [f for f in (value.fget, value.fset) if f is not None]
    function = getattr(value, "func", value)  # cached properties
    function = inspect.unwrap(function) if callable(function) else function
    return [function] if isinstance(function, types.FunctionType) else []


FUNCTIONS = functions()


@contextlib.contextmanager
def broken(function):
    """Inside, the function raises at every call."""
    own = function.__code__
    free = own.co_freevars
    # The body of a closure must have as many cells as the one that it stands in for.
    cells = "".join(f"    {name} = None\n" for name in free)
    uses = "".join(f"        {name}\n" for name in free)
    source = f"def make():\n{cells}    def body(*args, **kwargs):\n        raise Injected\n{uses}    return body\n"
    made = {"Injected": Injected}
    exec(compile(ast.parse(source), "<broken>", "exec"), made)
    code = made["make"]().__code__
    defaults, keywords = function.__defaults__, function.__kwdefaults__
    function.__globals__["Injected"] = Injected
    function.__code__ = code
    try:
        yield
    finally:
        function.__code__ = own
        function.__defaults__, function.__kwdefaults__ = defaults, keywords
        del function.__globals__["Injected"]


def train(model, watcher=None):
    """A few steps with everything that is looked at: clipping, a closure, no_grad, a loss module, a deep copy."""
    x, y = torch.randn(24, 4), torch.randint(0, 3, (24,))
    adam = torch.optim.Adam(model.parameters(), 0.01)
    lbfgs = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=2)
    loss = nn.CrossEntropyLoss()
    for step in range(4):
        adam.zero_grad()
        value = loss(model(x), y)
        value.backward()
        nn.utils.clip_grad_norm_((p for p in model.parameters()), 1.0)
        if watcher is not None and step == 2:
            watcher.loss(value)
        adam.step()

    def closure():
        lbfgs.zero_grad()
        value = F.cross_entropy(model(x), y)
        value.backward()
        return value

    lbfgs.step(closure)
    with torch.no_grad():
        model(x)
    assert all(p.requires_grad for p in model.parameters()) and model.training


# One of each way of measuring: a forward pass, a step's own gradients, the record; and, slow, curvature, a window.
QUICK = {"softmax_collapse": {}, "gradient_coherence": {}, "gradient_flow": {}}
ALL = QUICK | {"edge_of_stability": {}, "opposing_signals": {"k": 5}}


def watched_training(function=None, instruments=QUICK):
    """Train watched, with the function broken from the first step on, and through the end of the watch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.1), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    watcher = diag.watch(model, instruments=instruments, budget=float("inf"), on_finding=lambda finding: None)
    with broken(function) if function is not None else contextlib.nullcontext(), watcher:
        train(model, watcher)
        watcher.measure("softmax_collapse")
    return model, watcher


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    assert not any(f.__code__.co_filename == "<broken>" for f in FUNCTIONS.values())
    # A watch whose end was broken may still listen, and may have left something.
    HUB._listeners = []
    HUB._uninstall()
    assert not any("_diag_around" in (f.__kwdefaults__ or {}) for f in vars(F).values() if inspect.isfunction(f))


def test_the_functions_are_found():
    names = {name.split(":")[1] for name in FUNCTIONS}
    assert len(FUNCTIONS) > 350
    assert {"Clock.start", "LossObserver._output_reached", "Recorder.internal_error", "is_transformed"} <= names
    assert "Snapshot.num_examples" in names and "preserved" in names and "guarded" not in names


def test_a_broken_function_is_said_and_the_training_goes_on():
    plainly, _ = watched_training()
    model, watcher = watched_training(FUNCTIONS["diag.watching.observe.steps:StepObserver.before_step"])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plainly.parameters(), strict=True))
    (event,) = [e for e in watcher.run.events if e.kind == "internal error"]
    assert "diag failed to observe optimizer steps (Injected: Injected, whose text is unavailable" in event.text


def raised(names, instruments=QUICK):
    """Which of the functions' errors reach the loop."""
    found = {}
    for name in names:
        try:
            watched_training(FUNCTIONS[name], instruments)
        except Exception as error:
            found[name] = repr(type(error))
    return found


OF_MODES = [name for name in sorted(FUNCTIONS) if name.startswith("diag.snapshot.state.modes:")]  # entered first
SAMPLE = [name for i, name in enumerate(sorted(FUNCTIONS)) if i % 64 == 0]


def test_no_error_of_a_function_reaches_the_loop():
    """A few of them here, all of them in the test below."""
    assert raised(SAMPLE) == {}
    assert len(OF_MODES) > 10 and raised(OF_MODES) == {}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(12))
def test_no_error_of_any_function_reaches_the_loop(part):
    assert raised([name for i, name in enumerate(sorted(FUNCTIONS)) if i % 12 == part], ALL) == {}


@pytest.mark.parametrize("name", ["Body.undo", "Attribute.undo", "_taken_away"])
def test_what_could_not_be_taken_away_is_taken_away_the_next_time(name):
    module = "hub" if name == "_taken_away" else "patches"
    before = (F.cross_entropy.__code__, torch.autograd.backward)
    watched_training(FUNCTIONS[f"diag.watching.hooks.{module}:{name}"])
    assert (F.cross_entropy.__code__, torch.autograd.backward) != before
    _, watcher = watched_training()
    assert (F.cross_entropy.__code__, torch.autograd.backward) == before
    assert not [e for e in watcher.run.events if e.kind == "internal error"]
    assert watcher.run.history.loss_finite.all() and not [x for x in watcher.run.history.loss if x != x]


@pytest.mark.parametrize("name", ["Hub._loss_over", "Hub._schedule_over"])
def test_a_call_whose_end_was_not_seen_is_over_for_the_next_watch(name):
    watched_training(FUNCTIONS[f"diag.watching.hooks.hub:{name}"])
    _, watcher = watched_training()
    assert watcher.run.series("softmax_collapse")
    assert not any("no loss function of torch" in e.text for e in watcher.run.events)
