"""Problems with known answers, and the contract every instrument keeps: for our tests and for authors of
instruments in other packages.

    from diag.testing import check_instrument
    def test_contract():
        check_instrument(my_instrument)
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from diag.encoding import equal
from diag.errors import DiagError
from diag.registry import Instrument, Measurable, attempt
from diag.result import Level, Result, Skipped, Verdict
from diag.snapshot.snapshot import Snapshot

# Problems with known answers.


class Quadratic(nn.Module):
    """A model whose loss is 1/2 w^T A w + c, so that its Hessian is A whatever the data are."""

    def __init__(self, matrix: Tensor, start: Tensor, constant: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.weight = nn.Parameter(start)
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        """The parameters moved through the planted curvature, for each row of x."""
        matrix = torch.as_tensor(self.matrix)
        value = 0.5 * self.weight @ (matrix @ self.weight) + self.constant
        return value.expand(len(x))


def planted_spectrum(
    eigenvalues: Sequence[float], *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Quadratic, Callable[[Tensor, Any], Tensor], tuple[Tensor, Tensor]]:
    """(model, loss_fn, data) whose Hessian has exactly these eigenvalues, in a random orthonormal basis."""
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    start = torch.randn(len(values), generator=generator, dtype=torch.float64)
    model = Quadratic((basis * values @ basis.T).to(dtype), start.to(dtype))
    return (
        model,
        lambda outputs, targets: outputs.mean(),
        (torch.zeros(4, 1, dtype=dtype), torch.zeros(4, dtype=dtype)),
    )


def simplex_etf(classes: int, dimension: int, *, seed: int = 0) -> Tensor:
    """The vertices (K, d) of a centred simplex with unit-norm rows: pairwise cosines -1/(K-1). Needs d >= K."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.randn(dimension, classes, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(frame)
    centred = torch.eye(classes, dtype=torch.float64) - 1 / classes
    vertices: Tensor = (centred @ basis.T) * (classes / (classes - 1)) ** 0.5
    return vertices


_HYPERPARAMETERS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}


@dataclass(frozen=True)
class Classification:
    """A small trained classifier with train and held-out data, an earlier state and an independent twin."""

    model: nn.Module
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    data: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    previous: dict[str, Tensor]
    other: dict[str, Tensor]
    optimizer: torch.optim.Optimizer

    def snapshot(self, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Snapshot:
        """A snapshot with everything that an instrument may ask for, in `dtype`."""

        def cast(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return pair[0].to(dtype), pair[1]

        arguments: dict[str, Any] = {"held_out": cast(self.held_out), "optimizer": self.optimizer}
        arguments |= {
            name: {k: v.to(dtype) for k, v in getattr(self, name).items()} for name in ("previous", "other")
        }
        arguments |= {"loss_fn": self.loss_fn, "data": cast(self.data)} | overrides
        # A float32 model is measured itself, so that a check can see whether it was changed.
        model = self.model
        if dtype != torch.float32:
            model = copy.deepcopy(self.model).to(dtype)
            arguments["optimizer"] = torch.optim.SGD(model.parameters(), **_HYPERPARAMETERS)
        return Snapshot(model, **arguments)


def classification(*, seed: int = 0, classes: int = 3, examples: int = 90, steps: int = 25) -> Classification:
    """Gaussian blobs learnt by a small ReLU network with SGD; the same seed gives the same everything."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2.5 * torch.eye(classes, 8)

    def blobs(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(n) % classes
        return centres[labels] + 0.6 * torch.randn(n, 8, generator=generator), labels

    data, held_out = blobs(examples), blobs(examples)
    model, optimizer, previous = _trained(data, classes, seed, steps)
    other, _, _ = _trained(data, classes, seed + 1, steps)
    loss = nn.CrossEntropyLoss()
    return Classification(model, loss, data, held_out, previous, other.state_dict(), optimizer)


def _trained(
    data: tuple[Tensor, Tensor], classes: int, seed: int, steps: int
) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, classes))
    optimizer = torch.optim.SGD(model.parameters(), **_HYPERPARAMETERS)
    previous: dict[str, Tensor] = {}
    for step in range(steps):
        if step == steps - 1:
            previous = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    return model, optimizer, previous


# The contract.


def check_instrument(which: Instrument, problem: Classification | None = None) -> None:
    """Every promise an instrument makes; raises AssertionError with one sentence at the first that is broken.

    On `problem` (a small trained classifier) the instrument must give a result, or say why it cannot.
    """
    problem = problem or classification()
    check_documentation(which)
    with leaves_no_trace(problem.model):
        outcome = attempt(problem.snapshot(), which)
    if isinstance(outcome, Skipped):
        assert is_one_sentence(outcome.reason), (
            f"{which.name} is skipped for a reason that is not a sentence: {outcome}"
        )
        return
    assert isinstance(outcome, Result), f"{which.name} failed on a small classifier: {outcome.reason}"
    check_result(outcome)
    again = attempt(problem.snapshot(), which)
    assert outcome == again, f"{which.name} gives two results for one seed: {outcome} and {again}"


def check_documentation(which: Instrument) -> None:
    """The docstring says what is raised, the source is named, and every field says what it is."""
    text = which.function.__doc__ or ""
    assert "Raises" in text, f"The docstring of {which.name} does not say what it raises."
    assert which.source, f"{which.name} names no source."
    assert which.result.measured_fields(), f"{which.result.__name__} has no measured field."
    for field in which.result.measured_fields():
        assert field.metadata["description"], f"{which.result.__name__}.{field.name} has no description."
        if "ndarray" in str(field.type) or "NDArray" in str(field.type):
            assert field.metadata["shape"], f"{which.result.__name__}.{field.name} is an array without a shape."


def check_result(result: Result) -> None:
    """Strict JSON and back, a verdict of one sentence, a plot with labelled axes, a page in a notebook."""
    name = type(result).__name__
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert type(result).from_dict(json.loads(text)) == result, f"{name} changes on its way through JSON."
    check_verdict(result.verdict(), result)
    check_verdict(type(result).trend([(1, result)]), result)
    check_plot(result.plot)
    check_plot(lambda ax: type(result).plot_trend(ax, [(1, result), (2, result)]))
    assert "<svg" in result._repr_html_(), f"{name} does not draw itself in a notebook."


def check_verdict(verdict: Verdict, result: Result) -> None:
    """One sentence and a source; a failed precondition allows no verdict; a warning says what to do."""
    assert is_one_sentence(verdict.sentence), f"The verdict is not one sentence: {verdict.sentence!r}"
    assert verdict.source, f"The verdict names no source: {verdict.sentence!r}"
    unmet = result.unmet()
    assert unmet is None or verdict.level == Level.NOT_APPLICABLE, f"{unmet} does not hold, yet: {verdict}"
    if verdict.level in (Level.WARNING, Level.ALARM):
        assert verdict.advice and verdict.refutation, f"No advice, or nothing that would refute it: {verdict}"
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict(), allow_nan=False))) == verdict


def check_plot(draw: Callable[[Any], None]) -> None:
    """Both axes carry a label."""
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    draw(ax)
    for axes in ax.figure.axes:
        if axes.axison and axes.get_label() != "<colorbar>":
            assert axes.get_xlabel(), f"{draw} leaves an x axis without a label."
            assert axes.get_ylabel(), f"{draw} leaves a y axis without a label."


def is_one_sentence(text: str) -> bool:
    """True for one line of text that ends in a full stop (colons and semicolons may divide it)."""
    return bool(text.strip()) and "\n" not in text and text.rstrip().endswith((".", "?"))


def refusal(which: Instrument, snapshot: Measurable | None = None, **arguments: Any) -> str:
    """The sentence with which the instrument refuses; AssertionError where it accepts or breaks otherwise."""
    try:
        result = which(snapshot, **arguments)
    except DiagError as error:
        assert is_one_sentence(str(error)), f"{which.name} refuses without one clear sentence: {error}"
        return str(error)
    raise AssertionError(f"{which.name} accepts what it should refuse, and gives {result}")


@contextmanager
def leaves_no_trace(model: nn.Module) -> Iterator[None]:
    """AssertionError where parameters, buffers, gradients, modes, hooks or a random state differ afterwards."""
    before = trace(model)
    yield
    after = trace(model)
    changed = [name for name in before if not equal(before[name], after[name])]
    assert not changed, f"Measuring changed {', '.join(changed)}."


def trace(model: nn.Module) -> dict[str, Any]:
    """All that measuring must leave alone, as plain data."""
    state: dict[str, Any] = {f"value of {k}": v.detach().clone().numpy() for k, v in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state[f"gradient of {name}"] = None if parameter.grad is None else parameter.grad.clone().numpy()
        state[f"requires_grad of {name}"] = parameter.requires_grad
    for name, module in model.named_modules():
        state[f"mode of {name or 'model'}"] = module.training
        state[f"hooks of {name or 'model'}"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
    state["torch's random state"] = torch.get_rng_state().numpy()
    state["NumPy's random state"] = list(numpy.random.get_state())[1:]
    state["Python's random state"] = random.getstate()
    return state
