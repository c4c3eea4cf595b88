"""`@instrument` turns a pure function into an instrument, and this is where all of them are found.

The positional parameters of the function name quantities of the glossary (with the default None: optional);
its keyword-only parameters are settings. From these, the annotations and the docstring everything else is
derived: the call on a snapshot, the command-line flags, the rows of the report, the contract tests.

An instrument is discovered when its file lies in `diag/instruments/`, or when another package names it under
the entry point group `diag.instruments`. No line of the core names one.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import time
import traceback
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import nn

from diag.conversion import converted, describe, is_a
from diag.door import at_the_door
from diag.errors import (
    DiagError,
    InvalidInput,
    MissingQuantity,
    Stopped,
    Unsupported,
    did_you_mean,
    named,
    text_of,
    type_of,
)
from diag.result import Failed, Outcome, Provenance, Result, Skipped
from diag.snapshot.glossary import HELD_OUT, Effort, Quantity, lookup
from diag.snapshot.snapshot import OVER_RANKS, Snapshot
from diag.snapshot.state.host import on_host
from diag.snapshot.state.modes import unseen
from diag.snapshot.state.tensors import hearing
from diag.snapshot.validation import checked

Choice = TypeVar("Choice", bound=enum.Enum)
ENTRY_POINTS = "diag.instruments"

# What an instrument's `passes` counts in: forward passes over the data. A curvature product is two or three
# gradients and an algorithm's own vectors; by scripts/bench_estimates.py 5 to 14 passes, the self-test 20 to 60.
GRADIENT, PRODUCT, SELF_TEST = 3.0, 8.0, 40.0


class Kind(enum.Enum):
    """When a watch runs an instrument."""

    CHECK = (
        "check"  # costs nothing or one look (at most one forward pass over the probe): at scheduled steps, always
    )
    MEASUREMENT = "measurement"  # expensive (curvature, per-example gradients): as the budget allows
    DESCRIPTION = "description"  # judges nothing: only by name or with instruments="all"


class BeforeTraining(enum.Enum):
    """Whether a preflight, which trains on one batch again and again, runs a check."""

    NEVER = "never"  # it judges what a whole training does: epochs, schedules, held-out data
    ALWAYS = "always"
    WITH_OPTIMIZER = "with optimizer"  # it judges the optimizer, so only where that is the user's


@runtime_checkable
class Measurable(Protocol):
    """What an instrument can be called on: a `Snapshot`, or anything that gives quantities by name."""

    def quantity(self, name: str) -> Any:
        """The value of a glossary quantity; raises MissingQuantity where it cannot be given."""

    def provenance(self) -> dict[str, Any]:
        """num_examples, data_fingerprint and seed, as far as they are known."""

    def explain(self, error: Exception | None = None) -> None:
        """Called after `error` broke something: raise a DiagError if the reason lies in what the user gave."""


@dataclass(frozen=True)
class Need:
    """One positional parameter: a quantity, and whether the instrument can do without it."""

    quantity: Quantity
    name: str
    optional: bool
    type: Any = Any


@dataclass(frozen=True)
class Setting:
    """One keyword-only parameter: a setting with its default and its type."""

    name: str
    default: Any
    type: Any


class StepRecording(Protocol):
    """A record of consecutive steps that is growing (see `StepWindow`)."""

    @property
    def num_steps(self) -> int:
        """Steps recorded, the first not counted."""

    @property
    def last_step(self) -> int:
        """The number of the last recorded step."""

    @property
    def losses(self) -> Any:
        """(T + 1, n): the losses so far."""

    def add(self, snapshot: Any, step: int) -> None:
        """Record another step; `snapshot` is of the same model and data after it."""

    def finish(self, snapshot: Any, same_examples: bool, loss_scale: float) -> Any:
        """The record, at the last recorded step. same_examples: whether every step was taken on one batch.
        loss_scale: training descends this multiple of the recorded mean loss; NaN where it is another loss."""


@dataclass(frozen=True)
class StepWindow:
    """Consecutive optimizer steps that a watched run records for an instrument before it measures.

    quantity: the parameter that takes the record. length(settings): how many steps, 0 for none.
    required(settings): whether it measures nothing without a record. least: fewer steps cannot be judged.
    begin(snapshot, step): starts a record. insist, shorten: how a user asks for a record in spite of a reason
    against it, and for a shorter one, for sentences.
    """

    quantity: str
    length: Callable[[Mapping[str, Any]], int]
    required: Callable[[Mapping[str, Any]], bool]
    least: int
    begin: Callable[[Any, int], StepRecording]
    insist: str
    shorten: str


@dataclass(eq=False)
class Instrument:
    """A named measurement; call it on a snapshot, or on the quantities by name."""

    function: Callable[..., Result]
    source: str
    title: str
    needs: tuple[Need, ...]
    settings: tuple[Setting, ...]
    result: type[Result]
    passes: Callable[[Mapping[str, Any]], float] | None = None
    kind: Kind = Kind.MEASUREMENT
    window: StepWindow | None = None
    before_training: BeforeTraining = BeforeTraining.NEVER
    why: str = ""
    formula: str = ""

    @property
    def name(self) -> str:
        """The name of its function, by which it is called everywhere."""
        return self.function.__name__

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")

    @property
    def costs(self) -> tuple[Effort, ...]:
        """What measuring takes: each cost among the quantities that must be there, once."""
        return tuple(
            dict.fromkeys(n.quantity.cost for n in self.needs if not n.optional and n.quantity.cost.passes)
        )

    @property
    def cost(self) -> str:
        """The same in words."""
        return ", ".join(cost.text for cost in self.costs) or Effort.NONE.text

    def all_settings(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """These settings, and the others at their defaults."""
        return {s.name: s.default for s in self.settings} | dict(chosen)

    def converted_settings(self, chosen: Any) -> dict[str, Any]:
        """These settings as values of their types; raises InvalidInput for one that is none, or unknown."""
        if not isinstance(chosen, Mapping):
            raise InvalidInput(f"The settings of {self.name} are {type_of(chosen)}; expected a dict by name.")
        known = {setting.name: setting for setting in self.settings}
        for name in chosen:
            if name not in known:
                raise InvalidInput(f"{self.name} has no setting {name!r}; it has {', '.join(known) or 'none'}.")
        rest = dict(chosen)
        return {name: self._setting(known[name], rest) for name in chosen}

    def expected_passes(self, chosen: Mapping[str, Any]) -> float | None:
        """The forward passes over the data that measuring is expected to take with these settings, the others at
        their defaults; None where the instrument does not say."""
        return None if self.passes is None else self.passes(self.all_settings(chosen))

    @property
    def from_history(self) -> bool:
        """True where the recorded steps of a watched run are enough, so that opening the run computes it."""
        return {n.quantity.name for n in self.needs} == {"history"}

    @property
    def from_steps(self) -> bool:
        """True where the recorded steps are enough; what else is known of the loop is used where there is any."""
        return {n.quantity.name for n in self.needs if not n.optional} == {"history"}

    @property
    def from_record(self) -> bool:
        """True where the recorded steps and the facts of the loop are enough: no pass of the model is needed."""
        needed = {n.quantity.name for n in self.needs if not n.optional}
        return bool(needed) and needed <= {"history", "loop"}

    @property
    def of_a_snapshot(self) -> bool:
        """False for what only other parts of `diag` can be asked: a trial before training, a checkpoint file."""
        return not any(n.quantity.external for n in self.needs if not n.optional)

    @unseen()
    def __call__(self, /, *positional: Any, **by_name: Any) -> Result:
        """Measure on a `Snapshot`, or on the quantities, by position or by name.

        Raises InvalidInput for values that do not fit, MissingQuantity for a quantity that is neither given
        nor available from the snapshot.
        """
        snapshot, by_name = self._arguments(positional, by_name)
        settings = {s.name: self._setting(s, by_name) for s in self.settings}
        self._refuse_unknown(by_name)
        began = time.perf_counter()
        with on_host(), hearing() as said, self._undisturbed(snapshot, by_name):
            found = {n.name: self._value(n, snapshot, by_name) for n in self.needs}
            quantities = checked(found)
            result = self._measured(snapshot, quantities | settings)
        about = snapshot.provenance() if snapshot is not None else {}
        provenance = Provenance(self.name, settings, seconds=time.perf_counter() - began, **about)
        return _signed(result, provenance, (*result.notes, *said))

    def _arguments(
        self, positional: tuple[Any, ...], by_name: Mapping[str, Any]
    ) -> tuple[Measurable | None, dict[str, Any]]:
        """The snapshot, if one was given first, and everything else by name."""
        names, found = [n.name for n in self.needs], dict(by_name)
        rest = found.pop("snapshot", None) if "snapshot" not in names else None
        values = positional if rest is None else (rest, *positional)
        if values and (values[0] is None or isinstance(values[0], Measurable)):
            if len(values) > 1:
                raise InvalidInput(
                    f"{self.name} was called on {_kinds(values)} by position; expected what follows a snapshot by "
                    "name."
                )
            return values[0], found
        if len(values) > len(names) or any(isinstance(v, (nn.Module, str, int, float)) for v in values):
            settings = "; settings are given by name" if len(values) > 1 else ""
            raise InvalidInput(
                f"{self.name} was called on {_kinds(values)}; expected a diag.Snapshot, or the quantities: "
                f"{self.name}({', '.join(n + '=...' for n in names)}){settings}."
            )
        for name, value in zip(names, values, strict=False):
            if name in found:
                raise InvalidInput(f"{self.name} was given {name} by position and by name; give it once.")
            found[name] = value
        return None, found

    def _setting(self, setting: Setting, by_name: dict[str, Any]) -> Any:
        """The setting's value, taken out of what was given and converted."""
        if setting.name not in by_name:
            return setting.default
        return converted(by_name.pop(setting.name), setting.type, setting.default, f"{self.name}.{setting.name}")

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the function, with a snapshot in the place of the first quantity."""
        own = inspect.signature(self.function)
        parameters = list(own.parameters.values())
        first = parameters[0]
        parameters[0] = first.replace(annotation=f"Snapshot | {first.annotation}")
        later = [
            p.replace(default=None) if p.kind is not p.KEYWORD_ONLY and p.default is p.empty else p
            for p in parameters[1:]
        ]
        return own.replace(parameters=[parameters[0], *later])

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        """Pickled by where it is defined, as functions are."""
        return _imported, (self.function.__module__, self.function.__qualname__)

    def _undisturbed(self, snapshot: Measurable | None, by_name: Mapping[str, Any]) -> AbstractContextManager[None]:
        if not isinstance(snapshot, Snapshot):
            return nullcontext()
        asked = [n.quantity for n in self.needs if by_name.get(n.name) is None]
        return snapshot.undisturbed(called=any(quantity.cost is not Effort.NONE for quantity in asked))

    def _measured(self, snapshot: Measurable | None, arguments: Mapping[str, Any]) -> Result:
        try:
            return self.function(**arguments)
        except DiagError:
            raise
        except Exception as error:
            if snapshot is not None:
                snapshot.explain(error)
            self._refuse_other_kinds(arguments)
            raise

    def _value(self, need: Need, snapshot: Measurable | None, by_name: Mapping[str, Any]) -> Any:
        if by_name.get(need.name) is not None:
            return by_name[need.name]
        try:
            if snapshot is None:
                raise MissingQuantity(f"{self.name} needs {need.name}; pass {need.name}=..., or a snapshot.")
            return snapshot.quantity(need.name)
        except MissingQuantity:
            if need.optional:
                return None
            raise

    def _refuse_other_kinds(self, values: Mapping[str, Any]) -> None:
        """After something broke: raise InvalidInput if an object is of another kind than its annotation says."""
        for need in self.needs:
            if not is_a(value := values[need.name], need.type) and need.quantity.kind == "object":
                raise InvalidInput(
                    f"{need.name} is {type_of(value)}; expected {describe(need.type)}; {need.quantity.how}."
                )

    def _refuse_unknown(self, by_name: Mapping[str, Any]) -> None:
        known = [n.name for n in self.needs]
        for name in by_name:
            if name not in known:
                settings = [s.name for s in self.settings]
                meant = did_you_mean(name, [*known, *settings], 1)
                raise InvalidInput(
                    f"{self.name} has no setting or quantity {name!r}; {meant}{' ' if meant else ''}its quantities "
                    f"are {', '.join(known)} and its settings {', '.join(settings) or 'none'}."
                )

    def __repr__(self) -> str:
        return f"<instrument {self.name}({', '.join(n.name for n in self.needs)})>"


def _signed(result: Result, provenance: Provenance, notes: tuple[str, ...]) -> Result:
    """The result with these; its fields were made plain when it was made, and need not be again."""
    signed = copy.copy(result)
    object.__setattr__(signed, "provenance", provenance)
    object.__setattr__(signed, "notes", notes)
    return signed


def _imported(module: str, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


def _kinds(values: Sequence[Any]) -> str:
    return named([type_of(value) for value in values], len(values))


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
    import warnings

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

    What it takes besides, where it is there, it goes without; but what a loop tells differs between ranks, so that
    they might not do the same.
    """
    needs = {need.name.removeprefix(HELD_OUT) for need in instrument.needs if not need.optional}
    optional = {need.name for need in instrument.needs if need.optional}
    return needs <= OVER_RANKS and not optional & {"loop", "history"}


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
