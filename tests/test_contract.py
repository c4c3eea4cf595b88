"""The contract over the registry: a new instrument is covered here by dropping in its file."""

import contextlib
import copy
import functools
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diag
from diag.encoding import equal
from diag.registry import attempt, instruments
from diag.result import Failed, Level, Result, Skipped
from diag.snapshot.glossary import GLOSSARY, HELD_OUT
from diag.testing import check_instrument, classification, is_one_sentence, leaves_no_trace

NAMES = list(instruments())


@pytest.fixture(scope="module")
def problem():
    return classification()


def test_the_instruments_of_this_package_are_found():
    assert {"softmax_collapse", "neural_collapse", "gradient_coherence", "gradient_flow"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_contract(name, problem):
    check_instrument(instruments()[name], problem)


@pytest.mark.parametrize("name", NAMES)
def test_only_glossary_names(name):
    assert {n.name.removeprefix(HELD_OUT) for n in instruments()[name].needs} <= set(GLOSSARY)


def same_within(a, b, slack):
    return a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= 2e-3 * max(abs(a), abs(b)) + 1e-4 + slack


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_float64(name, problem):
    """Within 2e-3: a thousand roundings of 1e-7 through a small network; estimates within four standard errors,
    as the two types draw different random numbers."""
    single, double = (
        attempt(problem.snapshot(dtype=d), instruments()[name]) for d in (torch.float32, torch.float64)
    )
    if isinstance(single, Skipped):
        assert isinstance(double, Skipped)
        return
    a, b = single.scalars(), double.scalars()
    assert a.keys() == b.keys()
    for key in a:
        error = a.get(f"{key}_standard_error", 0.0) + b.get(f"{key}_standard_error", 0.0)
        if not key.endswith("standard_error") and not single_precision_speaks_of_itself(single, key):
            assert same_within(a[key], b[key], 4 * error), f"{key}: {a[key]} in float32, {b[key]} in float64"


def single_precision_speaks_of_itself(result, key):
    field = next(f for f in result.measured_fields() if f.name == key.split("/")[0])
    return "rounding" in field.metadata["description"] or "dtype" in field.metadata["description"]


class IntegerLogits(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x):
        return self.layer(x).long()


def hostile_snapshots(problem):
    """(what is wrong, snapshot): built one by one, so that each is measured on an untouched model."""
    x, y = problem.data
    broken = copy.deepcopy(problem.model)
    with torch.no_grad():
        broken[0].weight[0, 0] = math.nan
    loss = problem.loss_fn
    yield "empty data", diag.Snapshot(problem.model, loss, [])
    yield "no examples", diag.Snapshot(problem.model, loss, (x[:0], y[:0]))
    yield "one class", problem.snapshot(data=(x, torch.zeros_like(y)))
    yield "one example", problem.snapshot(data=(x[:1], y[:1]))
    yield "NaN logits", diag.Snapshot(broken, loss, (x, y))
    yield "wrong shape of the inputs", diag.Snapshot(problem.model, loss, (x[:, :5], y))
    yield "wrong number of labels", diag.Snapshot(problem.model, loss, (x, y[:-1]))
    yield "integer logits", diag.Snapshot(IntegerLogits(), loss, (x, y))
    yield "labels out of range", diag.Snapshot(problem.model, loss, (x, y + 7))
    yield "floating labels", diag.Snapshot(problem.model, loss, (x, y.float()))
    yield "no trainable parameter", diag.Snapshot(copy.deepcopy(problem.model).requires_grad_(False), loss, (x, y))


REFUSED_BY_ALL_THAT_USE_DATA = {"empty data", "no examples", "wrong shape of the inputs", "integer logits"}


@pytest.mark.parametrize("name", NAMES)
def test_hostile_inputs_get_one_clear_sentence(name, problem):
    which = instruments()[name]
    for wrong, snapshot in hostile_snapshots(problem):
        with leaves_no_trace(snapshot.model):
            outcome = attempt(snapshot, which)
        if isinstance(outcome, Result):
            assert is_one_sentence(outcome.verdict().sentence)
            assert wrong not in REFUSED_BY_ALL_THAT_USE_DATA or not which.costs, f"{wrong}: {outcome}"
            looks_at_the_model = not {n.quantity.name for n in which.needs} <= {"inputs", "labels"}
            good = looks_at_the_model and outcome.verdict().level == Level.OK
            assert wrong != "NaN logits" or not good, f"NaN taken for good: {outcome}"
        else:
            trace = outcome.traceback if isinstance(outcome, Failed) else ""
            assert not trace, f"{wrong} broke {name}: {trace}"
            assert is_one_sentence(outcome.reason), f"{wrong}: {outcome.reason}"


# Watched training ends bit-identical to unwatched.


def net(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


def examples(n=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def train(model, optimizer, batches, *, accumulate=1, autocast=False):
    loss_fn = nn.CrossEntropyLoss()
    for step, (x, y) in enumerate(batches):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_fn(model(x), y) / accumulate
        loss.backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def chunks():
    x, y = examples()
    return [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]


def dropout_batchnorm_adam(watched):
    model = net(0.3)
    with watched(model):
        train(model, torch.optim.Adam(model.parameters(), lr=0.01), chunks())
    return model


def sgd_momentum(watched):
    model = net()
    with watched(model):
        train(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), chunks())
    return model


def autocast(watched):
    model = net(0.3)
    with watched(model):
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), chunks(), autocast=True)
    return model


def accumulation(watched):
    model = net(0.3)
    with watched(model):
        train(model, torch.optim.AdamW(model.parameters(), lr=0.01), chunks(), accumulate=2)
    return model


def shuffled_loader_with_workers(watched):
    model = net(0.3)
    loader = DataLoader(TensorDataset(*examples()), batch_size=16, shuffle=True, num_workers=1)
    with watched(model):
        train(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), loader)
    return model


RECIPES = {f.__name__: f for f in (dropout_batchnorm_adam, sgd_momentum, autocast, accumulation)}
RECIPES |= {"shuffled_loader_with_workers": shuffled_loader_with_workers}


def outcome_of(recipe, watched=lambda model: contextlib.nullcontext()):
    model = RECIPES[recipe](watched)
    state = {k: v.detach().clone().numpy() for k, v in model.state_dict().items()}
    return state | {"what the next draw will be": torch.rand(3).numpy()}


@functools.cache
def unwatched(recipe):
    return outcome_of(recipe)


def check_bit_identical(names, recipe):
    watchers = []

    def watched(model):
        watchers.append(diag.watch(model, instruments=names, every=3, budget=math.inf))
        return watchers[-1]

    state = outcome_of(recipe, watched)
    changed = [key for key, value in unwatched(recipe).items() if not equal(value, state[key])]
    assert not changed, f"{names} changed {changed}"
    run = watchers[0].run
    assert len(run.history) > 0
    refused = {o.instrument for _, o in run.outcomes if isinstance(o, Skipped)}
    # Without this the test would pass for a watch that measures nothing.
    assert all(run.series(name) or name in refused for name in names), run.events
    assert not [o for _, o in run.outcomes if isinstance(o, Failed)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_watched_by_all_is_bit_identical(recipe):
    check_bit_identical(NAMES, recipe)


# An instrument that disturbs the training by itself is named by the run that it has for itself, each in one of the
# recipes in turn.
ALONE = [(name, list(RECIPES)[i % len(RECIPES)]) for i, name in enumerate(NAMES)]


@pytest.mark.parametrize(("name", "recipe"), ALONE)
def test_training_watched_by_one_is_bit_identical(name, recipe):
    check_bit_identical([name], recipe)
