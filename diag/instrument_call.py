"""An instrument as an object: called on a snapshot or on quantities, it finds what its function needs, converts the
settings, and signs the result."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from diag.conversion import converted, describe, is_a
from diag.declaration import BeforeTraining, Kind, Measurable, Need, Setting, StepWindow
from diag.errors import DiagError, InvalidInput, MissingQuantity, did_you_mean, named, type_of
from diag.result import Provenance, Result
from diag.snapshot.glossary import Effort
from diag.snapshot.snapshot import Snapshot
from diag.snapshot.state.host import on_host
from diag.snapshot.state.modes import unseen
from diag.snapshot.state.tensors import hearing
from diag.snapshot.validation import checked


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
