"""`@instrument` turns a pure function into an instrument, and this is where all of them are found.

The positional parameters of the function name quantities of the glossary (with the default None: optional);
its keyword-only parameters are settings. From these, the annotations and the docstring everything else is
derived: the call on a snapshot, the command-line flags, the rows of the report, the contract tests.

An instrument is discovered when its file lies in `diag/instruments/`, or when another package names it under
the entry point group `diag.instruments`. No line of the core names one.

What declares and what calls an instrument is re-exported here, so that an author imports from one place.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import traceback
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from diag.declaration import (
    GRADIENT,
    PRODUCT,
    SELF_TEST,
    BeforeTraining,
    Kind,
    Measurable,
    Need,
    Setting,
    StepRecording,
    StepWindow,
)
from diag.door import at_the_door
from diag.errors import (
    DiagError,
    InvalidInput,
    MissingQuantity,
    Stopped,
    Unsupported,
    did_you_mean,
    text_of,
    type_of,
)
from diag.instrument_call import Instrument
from diag.result import Failed, Outcome, Result, Skipped
from diag.snapshot.glossary import HELD_OUT, lookup
from diag.snapshot.sharded.quantities import OVER_RANKS
from diag.snapshot.state.tensors import hearing

__all__ = [
    "ENTRY_POINTS",
    "GRADIENT",
    "PRODUCT",
    "SELF_TEST",
    "BeforeTraining",
    "Instrument",
    "Kind",
    "Measurable",
    "StepRecording",
    "StepWindow",
    "attempt",
    "find",
    "instrument",
    "instruments",
    "is_put_together",
    "measure",
    "measure_all",
    "requires",
]

Choice = TypeVar("Choice", bound=enum.Enum)
ENTRY_POINTS = "diag.instruments"


@at_the_door
def instrument(
    *,
    source: str,
    title: str = "",
    passes: Callable[[Mapping[str, Any]], float] | None = None,
    kind: str | Kind = Kind.MEASUREMENT,
    window: StepWindow | None = None,
    before_training: str | BeforeTraining = BeforeTraining.NEVER,
    why: str = "",
    formula: str = "",
) -> Callable[[Callable[..., Result]], Instrument]:
    """Declare an instrument. `source` names the paper ("arXiv:2501.04697"); `title` is for people to read, and
    `why` says to them in one sentence what is lost where it finds something; `formula` is what is measured.

    `passes(settings)` is what measuring usually takes, in forward passes over the data (GRADIENT, PRODUCT), where
    the costs of the quantities do not tell: a watch plans by it until it has timed a first measurement.

    `kind` says when a watch runs it: "check" at scheduled steps whatever the budget, "measurement" as the budget
    allows, "description" only when it is asked for. `window`: consecutive steps that it wants recorded there.
    `before_training`: whether a preflight runs it ("never", "always", "with optimizer").

    Raises InvalidInput where a positional parameter is not in the glossary, a keyword-only one has no
    default, the docstring is missing, the return annotation is no Result, or the kind is none of the three.
    """
    when, before = _chosen(Kind, kind, "kind"), _chosen(BeforeTraining, before_training, "before_training")

    def declare(function: Callable[..., Result]) -> Instrument:
        hints = typing.get_type_hints(function, include_extras=True)
        result = hints.get("return")
        if not (isinstance(result, type) and issubclass(result, Result)):
            raise InvalidInput(f"{function.__name__} returns {result}; annotate it with a subclass of Result.")
        if not inspect.getdoc(function):
            raise InvalidInput(f"{function.__name__} has no docstring; it becomes the help text and the report's.")
        needs, settings = _signature(function, hints)
        result.setting_defaults = {s.name: s.default for s in settings}
        called = title or _title(function.__name__)
        made = Instrument(
            function, source, called, needs, settings, result, passes, when, window, before, why, formula
        )
        functools.update_wrapper(typing.cast(Any, made), function)  # name, docstring, module
        return made

    return declare


def _chosen(kind: type[Choice], choice: object, name: str) -> Choice:
    try:
        return kind(choice)
    except ValueError:
        known = ", ".join(repr(k.value) for k in kind)
        raise InvalidInput(f"{name}={choice!r} is not known; expected one of {known}.") from None


def _signature(
    function: Callable[..., Any], hints: Mapping[str, Any]
) -> tuple[tuple[Need, ...], tuple[Setting, ...]]:
    needs, settings = [], []
    for parameter in inspect.signature(function).parameters.values():
        optional = parameter.default is not parameter.empty
        if parameter.kind is parameter.KEYWORD_ONLY:
            if not optional:
                raise InvalidInput(f"The setting {parameter.name} of {function.__name__} has no default; give one.")
            settings.append(Setting(parameter.name, parameter.default, hints.get(parameter.name, Any)))
        else:
            needs.append(Need(lookup(parameter.name), parameter.name, optional, hints.get(parameter.name, Any)))
    return tuple(needs), tuple(settings)


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


@functools.cache
def instruments() -> Mapping[str, Instrument]:
    """All instruments by name: diag's own, then those that other packages offer through entry points.

    An entry point that cannot be imported is left out with a warning.
    """
    package = importlib.import_module("diag.instruments")
    modules = [
        importlib.import_module(m.name) for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    found = {i.name: i for module in modules for i in _declared(module)}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        found |= {i.name: i for i in _load(entry)}
    return found


def _declared(module: Any) -> Iterable[Instrument]:
    return (
        v for v in vars(module).values() if isinstance(v, Instrument) and v.function.__module__ == module.__name__
    )


def _load(entry: importlib.metadata.EntryPoint) -> list[Instrument]:
    try:
        loaded = entry.load()
    except Exception as error:
        warnings.warn(f"The instrument {entry.name} ({entry.value}) cannot be imported ({error}); it is left out.")
        return []
    return [loaded] if isinstance(loaded, Instrument) else list(_declared(loaded))


def find(name: str | Instrument) -> Instrument:
    """The instrument called `name`, or itself; raises InvalidInput with the nearest names where there is none."""
    if isinstance(name, Instrument):
        return name
    if not isinstance(name, str):
        raise InvalidInput(f"The name of an instrument is {type_of(name)}; expected one that `diag list` shows.")
    known = instruments()
    if name in known:
        return known[name]
    hint = did_you_mean(name, known, 3) or "`diag list` shows all there are."
    raise InvalidInput(f"There is no instrument {name!r}; {hint}")


@at_the_door
def measure(snapshot: Measurable, name: str | Instrument, **settings: Any) -> Result:
    """Measure with the instrument called `name`, or with the instrument: the same as calling it on the snapshot."""
    return find(name)(snapshot, **settings)


def is_put_together(instrument: Instrument) -> bool:
    """Whether an instrument can be measured on the data of several ranks at once: all it needs is put together.

    What it takes besides, where it is there, it goes without; but what a loop tells or recorded differs between
    ranks, so that they might not do the same.
    """
    needs = {need.name.removeprefix(HELD_OUT) for need in instrument.needs if not need.optional}
    optional = {need.name for need in instrument.needs if need.optional}
    return needs <= OVER_RANKS and not optional & {"loop", "history", "loss_record"}


def requires(instrument: Instrument, *names: str) -> bool:
    """Whether an instrument cannot do without one of these quantities."""
    return any(need.name in names and not need.optional for need in instrument.needs)


def attempt(snapshot: Measurable | None, which: Instrument, **arguments: Any) -> Outcome:
    """Measure without ever raising. `arguments` are settings and, as in a call of the instrument, quantities.

    It becomes Skipped where a quantity is missing, no correct number is available or no time was left; Failed where
    something breaks.
    """
    with hearing() as said:
        outcome = _attempted(snapshot, which, arguments)
    if said and isinstance(outcome, (Skipped, Failed)):  # a result has them among its notes
        outcome = dataclasses.replace(outcome, reason=" ".join([outcome.reason, *said]))
    # Code that caught the stop and went on by another way did not measure what was asked.
    stop: str = getattr(getattr(snapshot, "deadline", None), "reason", "")
    return Skipped(which.name, stop) if stop else outcome


def _attempted(snapshot: Measurable | None, which: Instrument, arguments: Mapping[str, Any]) -> Outcome:
    try:
        return which(snapshot, **arguments)
    except (MissingQuantity, Unsupported, Stopped) as error:
        return Skipped(which.name, text_of(error))
    except DiagError as error:
        return Failed(which.name, text_of(error))
    except Exception as error:
        return Failed(which.name, f"{type(error).__name__}: {text_of(error)}", traceback.format_exc())


@at_the_door
def measure_all(
    snapshot: Measurable,
    names: str | Instrument | Iterable[str | Instrument] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Outcome]:
    """Measure with every instrument (or those named); the outcomes by name, none of them an exception."""
    if not isinstance(snapshot, Measurable):
        raise InvalidInput(f"measure_all was called on {type_of(snapshot)}; expected a diag.Snapshot.")
    names = [names] if isinstance(names, str | Instrument) else names
    if names is not None and not isinstance(names, Iterable):
        raise InvalidInput(f"names is {type_of(names)}; expected the names of instruments, or none for all.")
    settings = {
        find(name).name: find(name).converted_settings(own_settings)
        for name, own_settings in (settings or {}).items()
    }
    chosen = instruments().values() if names is None else [find(name) for name in names]
    return {i.name: attempt(snapshot, i, **settings.get(i.name, {})) for i in chosen}
