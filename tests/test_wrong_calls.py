"""Calls that do not fit get one sentence: what was found, what was expected, what to do."""

import inspect
import math
import typing

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.errors import DiagError, InvalidInput
from diag.ranges import Within
from diag.registry import instruments
from diag.snapshot.reading.forms import as_tensors

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
LOGITS = X[:, :3]


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def snapshot(data=(X, Y), **more):
    return diag.Snapshot(network(), F.cross_entropy, data, **more)


def losses(data, **more):
    return snapshot(data, **more).quantity("losses")


def widths(given, **more):
    return diag.coordinate_check(lambda width: nn.Linear(4, 3), F.cross_entropy, (X, Y), widths=given, **more)


CALLS = {  # arguments that a function does not have, or lacks
    "a run by its path": (lambda: diag.Run("runs/x"), r"Run was called on a str by position; .*diag\.load\(path\)"),
    "a run of a path": (lambda: diag.Run(path="runs/x"), r"made of a path alone.*diag\.load\(path\) opens"),
    "no model": (lambda: diag.watch(budget=50), r"watch was called without model; expected watch\(model, loss_fn="),
    "a folder by position": (
        lambda: diag.watch(network(), "runs/x"),
        r"watch was called on a Sequential and a str by position; expected watch\(model, .*run=",
    ),
    "a name nearly right of any number of runs": (
        lambda: diag.compare("runs/a", "runs/b", outptu="x.html"),
        r"compare has no argument 'outptu'; did you mean output\? expected compare\(\*sources, output=",
    ),
    "a name nearly right": (lambda: diag.watch(network(), runs="x"), r"has no argument 'runs'; did you mean run\?"),
    "nothing": (
        lambda: diag.Snapshot(),
        r"Snapshot was called without model; expected Snapshot\(model, loss_fn, data",
    ),
    "four by position": (
        lambda: diag.Snapshot(network(), F.cross_entropy, X, Y),
        "a Tensor and a Tensor by position",
    ),
    "twice": (lambda: diag.align(snapshot(), network(), other=network()), "given other by position and by name"),
    "no instrument": (lambda: diag.measure(snapshot()), "measure was called without name"),
    "a setting and no instrument": (
        lambda: diag.measure(snapshot(), alarm_at=0.3),  # not at fault: any name may be one
        r"measure was called without name; expected measure\(snapshot, name\)",
    ),
    "an argument for checkpoints and none of them": (
        lambda: diag.report(max_examples=3),
        r"report was called without source; expected report\(source, output, build=",
    ),
    "a verdict of nothing": (
        lambda: diag.Verdict(),
        r"without level and sentence; expected Verdict\(level, sentence,",
    ),
    "a watcher by hand": (
        lambda: diag.Watcher(network()),
        r"Watcher was called without .*diag\.watch\(model\) makes",
    ),
    "a bare decorator": (lambda: diag.instrument(lambda x: x), "instrument was called on a function by position"),
}
VALUES = {  # arguments of another kind or outside their range
    "points": (
        lambda: diag.align(snapshot(), network(), points=1),
        r"align\.points takes a whole number of 3 or more",
    ),
    "points as text": (
        lambda: diag.connect(snapshot(), [network()] * 2, points="a"),
        "points takes .* and not 'a'",
    ),
    "a threshold": (
        lambda: diag.connect(snapshot(), [network()] * 2, threshold=math.nan),
        r"connect\.threshold takes a number of 0 or more \(its default is 0\.02\) and not nan",
    ),
    "a matching": (
        lambda: diag.connect(snapshot(), [network()] * 2, align="x"),
        "align is 'x'; expected None, 'weig",
    ),
    "one file for several": (
        lambda: diag.connect(snapshot(), "a.pt"),
        "states takes a dict or a list and not 'a.pt'",
    ),
    "a model for a snapshot": (
        lambda: diag.align(network(), network()),
        "snapshot takes a Snapshot and not a Sequen",
    ),
    "no forks": (lambda: diag.fork_stability(snapshot(), 3), "forks takes a dict and not 3"),
    "a fork at a text": (
        lambda: diag.fork_stability(snapshot(), {"a": []}),
        "A fork is at step 'a'; expected the num",
    ),
    "losses in a list": (
        lambda: diag.loss_conflict(snapshot(), [F.mse_loss] * 2),
        "losses takes a dict and not a list",
    ),
    "steps": (
        lambda: diag.preflight(network(), F.cross_entropy, (X, Y), steps=0),
        "steps takes a whole number of 1",
    ),
    "seconds": (lambda: diag.preflight(network(), F.cross_entropy, (X, Y), seconds=math.nan), "a number above 0"),
    "progress": (
        lambda: diag.preflight(network(), F.cross_entropy, (X, Y), progress=3),
        "takes a function and not 3",
    ),
    "one width": (lambda: widths(3), "widths takes a list .* and not 3"),
    "a width of -1": (lambda: widths((-1, 2)), "widths takes a whole number of 1 or more and not -1"),
    "no model built": (
        lambda: diag.coordinate_check(lambda width: None, F.cross_entropy, (X, Y)),
        r"build\(64\) gave None; expected a module",
    ),
    "a build that raises": (
        lambda: diag.coordinate_check(lambda width: 1 / 0, F.cross_entropy, (X, Y)),
        r"build\(64\) raised ZeroDivisionError at .*test_wrong_calls",
    ),
    "a list compared": (lambda: diag.compare([diag.Run(), diag.Run()]), r"one list of 2; give each by itself"),
    "a name for a letter": (lambda: diag.compare(diag.Run(), diag.Run(), names="ab"), "names takes a list or none"),
    "one healthy run": (lambda: diag.compare(diag.Run(), diag.Run(), healthy=diag.Run()), "healthy takes a list"),
    "results in a list": (lambda: diag.report([3]), "The path is an int; expected the name of a file or folder"),
    "an empty path": (lambda: diag.load(""), "The path is an empty text; expected the name of a file or folder"),
    "an empty folder name": (lambda: diag.watch(network(), run=""), "run is an empty text; expected the path"),
    "going on with nothing": (lambda: diag.watch(network(), resume=True), r"there is no run=; give the folder"),
    "all of a model": (lambda: diag.measure_all(network()), "called on a Sequential; expected a diag.Snapshot"),
    "all of a number": (
        lambda: diag.measure_all(snapshot(), 3),
        "names is an int; expected the names of instruments",
    ),
    "settings of none": (
        lambda: diag.measure_all(snapshot(), "attention", {"attentoin": {}}),
        "did you mean attention",
    ),
    "settings of a number": (
        lambda: diag.measure_all(snapshot(), "attention", {"attention": 3}),
        "expected a dict by",
    ),
    "a level": (lambda: diag.Verdict("bad", "It is."), "'bad' is no Level; expected one of 'alarm', 'warning'"),
    "a sentence": (lambda: diag.Verdict("ok", 3), "A verdict has an empty sentence"),
    "when": (
        lambda: diag.instrument(source="s", before_training="now"),
        "expected one of 'never', 'always', 'with opt",
    ),
    "a result of nothing": (
        lambda: instruments()["attention"].result.from_dict({}),
        "has no .*; expected what to_dict",
    ),
    "a result of a number": (
        lambda: instruments()["attention"].result.from_dict(3),
        "read from an int; expected the",
    ),
    "logits": (lambda: diag.stable_cross_entropy(3, 4), "stable_cross_entropy got an int; expected tensors"),
    "yes or no": (
        lambda: diag.perp_grad(torch.optim.SGD(network().parameters(), 0.1), whole="a"),
        "takes yes or no",
    ),
    "an optimizer's layer": (
        lambda: diag.gradient_rule(network()),
        "given a Sequential; expected a class of layers",
    ),
}
SNAPSHOTS = {
    "unpack": (lambda: losses((X, Y), unpack=lambda batch: batch[0]), r"unpack\(batch\) gave .*; expected a pair"),
    "a device that is not here": (
        lambda: snapshot(device="cuda:99"),
        "which is not on this machine .*; give another",
    ),
    "a deadline": (lambda: snapshot(deadline=5), "deadline is an int; expected a Deadline"),
    "a quantity": (lambda: snapshot().quantity("lables"), r"not a quantity of the glossary; did you mean labels\?"),
    "a number for a quantity": (
        lambda: snapshot().quantity(3),
        "3 is not a quantity of the glossary; expected one of",
    ),
    "a history": (
        lambda: diag.divergence(snapshot(history=3)),
        "history is an int; expected a History; measure ins",
    ),
    "a loop": (lambda: diag.class_counts(snapshot(loop=3)), "loop is an int; expected the facts of a watched loop"),
    "a weight alone": (
        lambda: diag.neural_collapse(X, Y, torch.randn(3, 4)),
        "classifier is a Tensor; expected a tupl",
    ),
    "attention": (lambda: diag.attention(torch.randn(3)), "attention_calls is a Tensor; expected a list"),
    "objects": (
        lambda: losses((X.numpy().astype(object), Y.numpy())),
        "NumPy array of dtype object; expected numbers",
    ),
}


@pytest.mark.parametrize(("call", "text"), [*CALLS.values(), *VALUES.values(), *SNAPSHOTS.values()],
                         ids=[*CALLS, *VALUES, *SNAPSHOTS])  # fmt: skip
def test_a_wrong_call_gets_one_sentence(call, text):
    with pytest.raises(DiagError, match=text) as error:
        call()
    assert "\n" not in str(error.value) and str(error.value)[-1] in ".?"


def test_a_call_that_does_not_fit_is_a_type_error_too_and_others_are_let_through():
    with pytest.raises(TypeError):
        diag.watch()

    def fails(width):
        raise TypeError("inside")

    with pytest.raises(InvalidInput, match=r"build\(64\) raised TypeError.*inside"):
        diag.coordinate_check(fails, F.cross_entropy, (X, Y))


@pytest.mark.parametrize(
    "data",
    [
        (X.numpy(), Y.numpy()),
        [X.numpy(), Y.numpy()],
        [(X[:6].numpy(), Y[:6].numpy()), (X[6:].numpy(), Y[6:].numpy())],
        (X.numpy(), Y),
        {"input": X.numpy(), "labels": Y.numpy()},
        (X.numpy()[::-1][::-1], Y.numpy().astype(">i8")),
    ],
    ids=["a pair", "a list", "batches", "beside a tensor", "a dict", "strides and byte order"],
)
def test_arrays_are_read_as_tensors(data):
    """Two arrays are inputs and targets, not two batches."""
    assert torch.equal(losses(data), losses((X, Y)))


def test_inputs_without_an_array_stay_the_objects_that_they_are():
    class Graph(dict):
        pass

    inputs = Graph(x=X, parts=[X, (Y,)])
    assert as_tensors(inputs) is inputs and as_tensors([inputs])[0] is inputs
    assert type(as_tensors(Graph(x=X.numpy()))) is Graph


def test_two_arrays_of_two_rows_are_one_batch():
    found = snapshot((X[:2].numpy(), Y[:2].numpy()))
    assert found.num_examples == 2 and len(found.batches) == 1


SETTINGS = [(i, s) for i in instruments().values() for s in i.settings if s.type not in (bool, str)]


def ranges_of(type_):
    inner = [r for part in typing.get_args(type_) for r in ranges_of(part)]
    return inner + [r for r in getattr(type_, "__metadata__", ()) if isinstance(r, Within)]


@pytest.mark.parametrize(("instrument", "setting"), SETTINGS, ids=[f"{i.name}.{s.name}" for i, s in SETTINGS])
def test_every_number_has_a_range_and_is_held_to_it(instrument, setting):
    if setting.type == str | None:
        return
    (range_,) = ranges_of(setting.type)
    assert setting.default is None or range_.holds(setting.default)
    beyond = [math.nan, range_.low - 1, *([range_.low] if range_.above else [])]
    beyond += [range_.high * 2] if range_.high < math.inf else [] if range_.infinite else [math.inf]
    for value in beyond:
        with pytest.raises(InvalidInput, match=rf"^{instrument.name}\.{setting.name} takes a .* and not"):
            instrument.converted_settings({setting.name: value})
    inside = range_.low + (1 if range_.above else 0)
    assert instrument.converted_settings({setting.name: inside}) == {setting.name: inside}


def test_every_public_function_stands_at_the_door():
    """But the losses, which are called inside of training and compiled."""
    inside = {
        "stable_cross_entropy",
        "stable_binary_cross_entropy",
        "stablemax",
        "stablemax_cross_entropy",
        "measured",
    }
    known = set(instruments()) | inside
    functions = [n for n in dir(diag) if n not in known and inspect.isfunction(getattr(diag, n))]
    assert len(functions) > 10
    for name in functions:
        parameters = inspect.signature(getattr(diag, name)).parameters.values()
        takes_any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
        said = "was called without (snapshot|source)" if takes_any_name else "has no argument 'nonsense'"
        with pytest.raises(InvalidInput, match=f"{name} {said}"):
            getattr(diag, name)(nonsense=1)
