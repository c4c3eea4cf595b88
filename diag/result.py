"""What an instrument returns: an immutable `Result` that can judge, draw and serialise itself.

An author writes a frozen dataclass with `measured` fields and the methods `verdict()` and `plot(ax)`; where
the time course matters also `trend(series)` and `plot_trend(ax, series)`. Everything else is derived here.

    @dataclass(frozen=True, kw_only=True)
    class SoftmaxCollapse(Result):
        collapsed: float = measured("examples whose loss gradient is exactly zero", unit="share")

        def verdict(self) -> Verdict: ...
        def plot(self, ax) -> None: ...

The classes of a verdict are re-exported here, so that an author imports from one place.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from diag import display
from diag.door import class_at_the_door
from diag.encoding import decode, encode, equal, plain_data
from diag.errors import InvalidInput, MissingData, as_path, did_you_mean, named, type_of
from diag.verdict import OUR_CHOICE, Confidence, Level, Precondition, Verdict

__all__ = [
    "OUR_CHOICE",
    "RESULT_FORMAT",
    "Confidence",
    "Failed",
    "Level",
    "Outcome",
    "Precondition",
    "Provenance",
    "Result",
    "Skipped",
    "Verdict",
    "measured",
    "pandas_installed",
]

RESULT_FORMAT = "diag-result"
LONGEST_LABEL = 34  # characters that stand beside the axis of a small chart


@dataclass(frozen=True)
class Provenance:
    """Where a result comes from: filled in by the registry, not by the instrument's author."""

    instrument: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_examples: int | None = None
    data_fingerprint: str = ""
    seed: int | None = None
    seconds: float | None = None


def measured(
    description: str,
    *,
    remark: str = "",
    unit: str = "",
    shape: str = "",
    record: bool = True,
    default: Any = dataclasses.MISSING,
) -> Any:
    """A field of a `Result`: what it is, its unit, and for arrays its shape, stated once.

    `remark` is what else there is to say of it, as when it is not known; it stands after the description, and not
    on an axis. `record=False` keeps a field (a state dict, say) in memory only: it is in no file and in no
    comparison.
    """
    whole = f"{description}; {remark}" if remark else description
    metadata = {"description": whole, "label": description, "unit": unit, "shape": shape, "record": record}
    return dataclasses.field(default=default, metadata=metadata, compare=record)


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The base of every instrument's result: frozen; fields are scalars, strings, tuples, dicts with string
    keys, or NumPy arrays on the CPU (tensors given to the constructor are converted).

    `preconditions` that fail make the verdict `not_applicable`; `notes` are caveats that the report shows.
    """

    setting_defaults: ClassVar[Mapping[str, Any]] = {}  # of the instrument that gives it

    preconditions: tuple[Precondition, ...] = dataclasses.field(default=(), metadata={"base": True})
    notes: tuple[str, ...] = dataclasses.field(default=(), metadata={"base": True})
    provenance: Provenance = dataclasses.field(default_factory=Provenance, compare=False, metadata={"base": True})

    _made_plain: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The dataclass decorator would write an __eq__ that compares arrays with == and so raises, and a __repr__
        # that prints every array.
        cls.__eq__, cls.__repr__ = Result.__eq__, Result.__repr__  # type: ignore[method-assign]
        if "plot" in vars(cls):
            cls.plot = _with_an_axis(vars(cls)["plot"])  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        for name in _names_made_plain(type(self)):
            object.__setattr__(self, name, plain_data(getattr(self, name)))

    def setting(self, name: str) -> Any:
        """The value that a setting had when this was measured; the instrument's default where that is not known.

        Raises InvalidInput for a name that is none of its settings.
        """
        known = {**self.setting_defaults, **self.provenance.settings}
        if name not in known:
            meant = did_you_mean(name, known, 1) or f"it has {named(list(known)) or 'none'}."
            raise InvalidInput(f"{type(self).__name__} has no setting {name!r}; {meant}")
        return known[name]

    # What an author writes.

    def verdict(self) -> Verdict:
        """The judgement of this one measurement."""
        raise NotImplementedError(f"{type(self).__name__} must define verdict().")

    def plot(self, ax: Any = None) -> Any:
        """Draw this measurement on a matplotlib Axes, with both axes labelled; on a new one where none is given.

        An author writes `plot(self, ax)`; the axes are made and returned here.
        """
        raise NotImplementedError(f"{type(self).__name__} must define plot(ax).")

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """The judgement of a course over training: `series` is (step, result), by step, at least one."""
        return series[-1][1].verdict()

    @classmethod
    def from_logged(
        cls, metrics: Mapping[str, Sequence[tuple[int, float]]], history: Any
    ) -> Sequence[tuple[int, Self]]:
        """The course that numbers logged by the user or another tool give, for a run in which nothing else was
        measured: `metrics` are (step, value) by name, `history` the record of the steps, if any."""
        return ()

    @classmethod
    def plot_trend(cls, ax: Any, series: Sequence[tuple[int, Self]]) -> None:
        """Draw the course of the first scalar over the training steps."""
        name = next(iter(series[-1][1].scalars()), None)
        if name is None:
            series[-1][1].plot(ax)
            return
        steps, values = [s for s, _ in series], [r.scalars().get(name, math.nan) for _, r in series]
        ax.plot(steps, values, marker="o", markersize=3)
        words = next((f.metadata["label"] for f in cls.measured_fields() if f.name == name), "")
        ax.set(xlabel="step", ylabel=words if 0 < len(words) <= LONGEST_LABEL else name.replace("_", " "))

    # What is derived.

    def unmet(self) -> Precondition | None:
        """The first precondition that fails, if any."""
        return next((p for p in self.preconditions if not p.holds), None)

    @classmethod
    def measured_fields(cls) -> tuple[dataclasses.Field[Any], ...]:
        """The fields that hold measurements, in the order in which they are declared."""
        return tuple(f for f in dataclasses.fields(cls) if "description" in f.metadata)

    def scalars(self) -> dict[str, float]:
        """Every number in the result by name; a dict of numbers gives `field/key`."""
        return dict(self._numbers())

    def _numbers(self) -> Iterator[tuple[str, float]]:
        for field in self.measured_fields():
            value = getattr(self, field.name)
            if isinstance(value, (int, float)):
                yield field.name, value
            elif isinstance(value, Mapping):
                yield from ((f"{field.name}/{k}", v) for k, v in value.items() if isinstance(v, (int, float)))

    def to_frame(self) -> Any:
        """A pandas DataFrame with one row a number: value, unit, description."""
        pandas = pandas_installed()
        about = {f.name: f.metadata for f in self.measured_fields()}
        rows = [
            (name, value, about[name.split("/")[0]]["unit"], about[name.split("/")[0]]["description"])
            for name, value in self._numbers()
        ]
        return pandas.DataFrame(rows, columns=["name", "value", "unit", "description"]).set_index("name")

    def to_dict(self, save_array: Callable[[Any], str] | None = None) -> dict[str, Any]:
        """A JSON-safe dict. `save_array(array) -> name` may store large arrays elsewhere."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get("record", True)}
        data["preconditions"] = [dataclasses.asdict(p) for p in self.preconditions]
        data["provenance"] = dataclasses.asdict(self.provenance)
        encoded: dict[str, Any] = encode(data, save_array)
        return encoded

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], load_array: Callable[[str], Any] | None = None) -> Self:
        """The result that `to_dict` wrote. Fields that this version does not know are left out."""
        if not isinstance(data, Mapping):
            raise InvalidInput(f"{cls.__name__} was read from {type_of(data)}; expected the dict of to_dict.")
        values = decode(data, load_array)
        known = {f.name for f in dataclasses.fields(cls)}
        values = {name: value for name, value in values.items() if name in known}
        values["preconditions"] = tuple(Precondition(**p) for p in values.get("preconditions", ()))
        values["provenance"] = Provenance(**values.get("provenance", {}))
        for field in dataclasses.fields(cls):
            if not field.metadata.get("record", True) and field.default is dataclasses.MISSING:
                values[field.name] = None
        if lacking := [f.name for f in dataclasses.fields(cls) if _is_required(f) and f.name not in values]:
            raise InvalidInput(f"The dict of {cls.__name__} has no {named(lacking)}; expected what to_dict gave.")
        return cls(**values)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(
            equal(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self) if f.compare
        )

    __hash__ = None  # type: ignore[assignment]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as one JSON file, arrays included, that `diag.load` reads. Raises InvalidInput where it
        cannot."""
        data = {"format": RESULT_FORMAT, "instrument": self.provenance.instrument, "result": self.to_dict()}
        target = as_path(path)
        try:
            target.write_text(json.dumps(data, allow_nan=False))
        except OSError as error:
            raise InvalidInput(
                f"The result cannot be written to {target} ({error.strerror}); give another path."
            ) from None
        return target

    def __repr__(self) -> str:
        numbers = [f"{name} {display.format_number(value)}" for name, value in self._numbers()][:3]
        try:
            verdict = self.verdict()
            judged = f"{verdict.level}: {verdict.sentence}"
        except Exception as error:
            judged = f"no verdict ({type(error).__name__})"
        return f"<{type(self).__name__} {judged} [{', '.join(numbers)}]>"

    def _repr_html_(self) -> str:
        about = {f.name: f.metadata for f in self.measured_fields()}
        rows = {
            name: (
                f"{display.format_number(value)} {about[name.split('/')[0]]['unit']}".strip(),
                about[name.split("/")[0]]["description"],
            )
            for name, value in self._numbers()
        }
        svg = display.figure_svg(self.plot, salt=type(self).__name__)
        return f"{self.verdict()._repr_html_()}{svg}{display.table_html(rows, type(self).__name__)}"


def _with_an_axis(plot: Callable[..., None]) -> Callable[..., Any]:
    """An author's `plot(self, ax)` that makes the axes where none are given, and returns them."""

    @functools.wraps(plot)
    def call(self: Any, ax: Any = None) -> Any:
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.figure().subplots()
        elif not hasattr(ax, "set_xlabel"):
            raise InvalidInput(f"ax is {type_of(ax)}; expected matplotlib Axes, or none to have them made.")
        plot(self, ax)
        return ax

    return call


@class_at_the_door(convert=False)
@dataclass(frozen=True)
class Skipped:
    """An instrument that did not run, and in one sentence why and how to make it run."""

    instrument: str
    reason: str


@class_at_the_door(convert=False)
@dataclass(frozen=True)
class Failed:
    """An instrument that raised an unexpected error; the traceback is kept."""

    instrument: str
    reason: str
    traceback: str = ""


Outcome = Result | Skipped | Failed


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _names_made_plain(kind: type[Result]) -> tuple[str, ...]:
    """The fields of a result that become plain data, found once for a class."""
    known: tuple[str, ...] | None = vars(kind).get("_made_plain")
    if known is None:
        fields = dataclasses.fields(kind)
        known = tuple(f.name for f in fields if f.metadata.get("record", True) and not f.metadata.get("base"))
        kind._made_plain = known
    return known


def pandas_installed() -> Any:
    """The module pandas, for tables; raises MissingData where it is not installed."""
    try:
        return importlib.import_module("pandas")
    except ImportError:
        raise MissingData(
            "to_frame() gives a pandas table, and pandas is not installed: pip install pandas."
        ) from None
