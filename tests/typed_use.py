"""A program that uses the public names as an engineer would. It is not run: the type checker reads it, strictly."""

from collections.abc import Mapping
from typing import assert_type

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diag
import diag.registry


def measured(model: nn.Module, data: tuple[Tensor, Tensor]) -> list[diag.Verdict]:
    """Instruments on a snapshot, and on tensors, with their results' own types."""
    snapshot = diag.Snapshot(model, F.cross_entropy, data, seed=1)
    spectrum = diag.hessian_spectrum(snapshot, num_eigenvalues=3, keep_eigenvectors=True)
    assert_type(spectrum, diag.HessianSpectrum)
    assert_type(spectrum.trace, float)
    collapse = diag.neural_collapse(features=torch.ones(4, 2), labels=torch.tensor([0, 0, 1, 1]))
    assert_type(collapse.verdict(), diag.Verdict)
    collapse.plot().set(title="neural collapse")
    named = diag.measure(snapshot, "softmax_collapse", alarm_at=0.2)
    return [spectrum.verdict(), collapse.verdict(), named.verdict()]


def told(snapshot: diag.Snapshot) -> list[str]:
    """What an instrument says of itself; and one is handed on as what it is."""
    found: list[diag.registry.Instrument] = [diag.hessian_spectrum, diag.class_counts]
    outcomes = diag.measure_all(snapshot, [*found, "sharpness"])
    lines = [f"{i.name} {i.title} {i.summary} {i.cost} {i.source} {i.why} {i.kind.value}" for i in found]
    lines += [f"{need.name} {need.optional}" for need in diag.hessian_spectrum.needs]
    lines += [f"{setting.name} {setting.default}" for setting in diag.hessian_spectrum.settings]
    assert_type(diag.class_counts(snapshot=snapshot, ratio=5.0), diag.ClassCounts)
    assert_type(diag.hessian_spectrum.result, type[diag.Result])
    return [*lines, *outcomes, diag.testing.__name__]


def watched(model: nn.Module) -> diag.Run:
    """A watch, and what it has recorded."""
    with diag.watch(model, budget=0.05, on_finding=print) as watcher:
        assert_type(watcher, diag.Watcher)
        watcher.loss(0.5)
    worst = min((finding.verdict.level for finding in watcher.findings), key=lambda level: level.severity)
    return watcher.run if worst is not diag.Level.ALARM else diag.Run()


def two(snapshot: diag.Snapshot, other: Mapping[str, Tensor]) -> float:
    """Two networks."""
    found = diag.connect(snapshot, {"a": snapshot.model, "b": other}, points=5)
    return float(found.barriers.max()) + diag.align(snapshot, other).line.barrier


def written(run: diag.Run) -> None:
    """A page."""
    diag.report(run, "report.html")


def refused(snapshot: diag.Snapshot) -> str:
    """An error of diag's own."""
    try:
        diag.measure(snapshot, "hesian_spectrum")
    except diag.errors.DiagError as error:
        return str(error)
    return ""
