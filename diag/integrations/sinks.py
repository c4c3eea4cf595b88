"""Findings beside your usual logs: TensorBoard, Weights & Biases, MLflow, CSV.

A sink is called with a finding when it is first seen, so it goes where `on_finding=` goes:

    diag.watch(model, on_finding=CsvSink("findings.csv"))
    diag.watch(model, on_finding=every_sink(TensorBoardSink(writer), WandbSink(wandb_run)))

`sink.export(run)` writes the numbers of every check over the steps. No sink has a step axis of its own: a step is
the number of the optimizer step, and Weights & Biases keeps its own count.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from diag.errors import InvalidInput, type_of
from diag.run.entries import Finding
from diag.run.run import Run

FINDING_COLUMNS = ("step", "level", "instrument", "title", "sentence", "advice", "source")
PREFIX = "diag"


class Sink:
    """A destination of findings; a subclass writes `text` and `scalar`."""

    def __init__(self) -> None:
        self.counts = {"alarm": 0, "warning": 0}

    def __call__(self, finding: Finding) -> None:
        """Log one finding: its sentence as text, and how many there are of its level as a number."""
        level, step = str(finding.verdict.level), finding.last_step
        self.text(f"{PREFIX}/{finding.instrument}", finding_text(finding), step)
        if level in self.counts:
            self.counts[level] += 1
            self.scalar(f"{PREFIX}/{level}s", float(self.counts[level]), step)

    def export(self, run: Run) -> None:
        """Write every number of every check over the steps, and the findings as text."""
        for name, step, value in run_numbers(run):
            self.scalar(name, value, step)
        for finding in run.findings():
            if finding.verdict.level.is_finding:
                self.text(f"{PREFIX}/{finding.instrument}", finding_text(finding), finding.last_step)

    def text(self, name: str, text: str, step: int) -> None:
        """Write a text at this step."""
        raise NotImplementedError(f"{type(self).__name__} must define text().")

    def scalar(self, name: str, value: float, step: int) -> None:
        """Write a number at this step."""
        raise NotImplementedError(f"{type(self).__name__} must define scalar().")


def finding_text(finding: Finding) -> str:
    """A finding as one paragraph: level, title, sentence and what to try."""
    verdict = finding.verdict
    advice = f" Try: {verdict.advice}" if verdict.advice else ""
    return f"{verdict.level}: {finding.title}. {verdict.sentence}{advice}"


def run_numbers(run: Run) -> Iterable[tuple[str, int, float]]:
    """(name, step, value) of every finite number that a check measured, in step order."""
    rows = [
        (f"{PREFIX}/{name}/{scalar}", step, float(value))
        for name in run.instruments
        for step, result in run.series(name)
        for scalar, value in result.scalars().items()
        if math.isfinite(float(value))
    ]
    return sorted(rows, key=lambda row: row[1])


class TensorBoardSink(Sink):
    """Into a `torch.utils.tensorboard.SummaryWriter`, which needs the package tensorboard."""

    def __init__(self, writer: Any) -> None:
        super().__init__()
        if not hasattr(writer, "add_text"):
            raise InvalidInput(f"TensorBoardSink got {type_of(writer)}; expected a SummaryWriter.")
        self.writer = writer

    def text(self, name: str, text: str, step: int) -> None:
        self.writer.add_text(name, text, step)

    def scalar(self, name: str, value: float, step: int) -> None:
        self.writer.add_scalar(name, value, step)


class WandbSink(Sink):
    """Into a run of Weights & Biases: numbers on its own step, findings as a table in the summary."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        if not hasattr(run, "log") or not hasattr(run, "summary"):
            raise InvalidInput(f"WandbSink got {type_of(run)}; expected what wandb.init() returns.")
        self.run = run

    def text(self, name: str, text: str, step: int) -> None:
        self.run.summary[name] = f"step {step}: {text}"

    def scalar(self, name: str, value: float, step: int) -> None:
        # Without a commit the number joins the row that the training logs next: no step of ours.
        self.run.log({name: value}, commit=False)

    def export(self, run: Run) -> None:
        """As Sink.export, with the step of each number beside it, since W&B does not take steps that are past."""
        self.run.define_metric(f"{PREFIX}/*", step_metric=f"{PREFIX}/step")
        by_step: dict[int, dict[str, float]] = {}
        for name, step, value in run_numbers(run):
            by_step.setdefault(step, {})[name] = value
        for step, values in by_step.items():
            self.run.log({**values, f"{PREFIX}/step": step})
        for finding in run.findings():
            if finding.verdict.level.is_finding:
                self.text(f"{PREFIX}/{finding.instrument}", finding_text(finding), finding.last_step)


class MlflowSink(Sink):
    """Into an MLflow run, through a client: `MlflowSink(mlflow.MlflowClient(), run_id)`."""

    def __init__(self, client: Any, run_id: str) -> None:
        super().__init__()
        if not hasattr(client, "log_metric"):
            raise InvalidInput(f"MlflowSink got {type_of(client)}; expected an mlflow.MlflowClient.")
        self.client, self.run_id = client, run_id

    def text(self, name: str, text: str, step: int) -> None:
        # A tag holds the newest sentence of a check; a run may have no more than a few hundred characters in one.
        self.client.set_tag(self.run_id, name.replace("/", "."), f"step {step}: {text}"[:490])

    def scalar(self, name: str, value: float, step: int) -> None:
        self.client.log_metric(self.run_id, name, value, step=step)


class CsvSink(Sink):
    """Into a CSV file, a line a finding; the numbers of `export` go to a second file beside it."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.numbers = self.path.with_name(f"{self.path.stem}_numbers.csv")

    def __call__(self, finding: Finding) -> None:
        verdict = finding.verdict
        row = (
            finding.last_step,
            verdict.level,
            finding.instrument,
            finding.title,
            verdict.sentence,
            verdict.advice,
        )
        _append(self.path, FINDING_COLUMNS, [(*row, verdict.source or finding.source)])

    def export(self, run: Run) -> None:
        """The findings as lines, and every number in a file of its own: step, name, value."""
        for finding in run.findings():
            if finding.verdict.level.is_finding:
                self(finding)
        _append(
            self.numbers, ("step", "name", "value"), ((step, name, value) for name, step, value in run_numbers(run))
        )


def _append(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(columns)
        writer.writerows(rows)


def every_sink(*sinks: Callable[[Finding], object]) -> Callable[[Finding], None]:
    """One callable for `on_finding=` that calls all of these; one that raises does not stop the others."""

    def tell(finding: Finding) -> None:
        errors = []
        for sink in sinks:
            try:
                sink(finding)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    return tell
