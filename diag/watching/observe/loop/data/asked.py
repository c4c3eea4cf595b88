"""What a loss function is asked to bring together: the numbers of the targets, the range of the outputs, and
whether a feature of the inputs already holds the targets.

A few calls of each loss function are looked at. What is on a device is kept there and read when the facts are asked
for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.asked import AskedFacts
from diag.snapshot.loop.data import OF_BINARY_TARGETS, OF_LOG_PROBABILITIES
from diag.snapshot.objective.comparison import IGNORED_LABEL
from diag.snapshot.objective.loss_spy import input_and_target
from diag.watching.observe.loop.data.bounds import UNBOUNDED, bounded_by
from diag.watching.observe.loop.data.padding import before_flattening
from diag.watching.observe.loop.data.targets import OF_NUMBERS
from diag.watching.observe.loop.modes import is_dense
from diag.watching.observe.loop.moment import Moment, due

TARGETS_LOOKED_AT = 24  # calls of a function whose targets are read, then ever fewer
INPUTS_LOOKED_AT = 6  # calls whose inputs are compared with their targets, then ever fewer
TOLD_AFTER = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24)  # looks at a function that are news
FUNCTIONS_FOLLOWED = 8
TARGETS_READ, WIDEST_EXAMPLE = 1 << 14, 1 << 12  # numbers of a call that are read; and of an example
FEWEST_ROWS, ROWS_OF_A_CLASS = 8, 3
FIRST_TARGETS = 3  # calls
ROUNDING_OF_CORRELATION = 1e-6  # how far from one it may be to be told from none


@dataclass
class _Kind:
    """Calls of one function so far."""

    function: str
    reduction: str
    first_step: int
    calls: int = 0
    looked: int = 0
    weighted: bool = False
    ignored: int = IGNORED_LABEL
    activation: tuple[str, float, float] = UNBOUNDED
    numbers: list[Tensor] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    outputs: int = 0
    given_zeros: list[Tensor] = field(default_factory=list)
    weights: Tensor | None = None
    one_a_row: bool = True
    loaded: int = 0  # calls before which a DataLoader gave a batch
    from_data: int = 0  # of these, those whose targets were in it
    of_sequences: bool = False
    copied: set[int] | None = None
    copied_looks: int = 0
    rows: int = 0
    features: int = 0
    told: AskedFacts | None = None  # what the calls looked at so far say


class Demands:
    """Follows the loss functions of training and the inputs before them."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._kinds: dict[str, _Kind] = {}
        self._inputs: Tensor | None = None
        self._sequences: set[int] = set()  # numbers of tokens in the sequences that the model was given
        self._calls = 0
        self._batch: list[Tensor] = []
        self._waiting: list[tuple[_Kind, Tensor, Tensor | None]] = []

    def training_call(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The model was called in training."""
        self._calls += 1
        self._inputs = None
        tensors = [t for t in tensors_in((args, dict(kwargs))) if t.ndim > 1]
        self._sequences = {t.numel() for t in tensors if not t.is_floating_point() and t.shape[1] > 1}
        if self._calls <= INPUTS_LOOKED_AT or due(self._calls):
            self._inputs = next((t for t in tensors if is_dense(t) and t.is_floating_point()), None)

    def fetched(self, batch: Any) -> None:
        """A DataLoader gave a batch."""
        self._batch = list(tensors_in(batch))[:8] if self._calls < TARGETS_LOOKED_AT or due(self._calls + 1) else []

    def loss_called(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A loss function of torch returned a value that has a graph."""
        prediction, target = input_and_target(args, kwargs)
        if name not in (*OF_NUMBERS, *OF_BINARY_TARGETS, *OF_LOG_PROBABILITIES):
            return
        kind = self._kinds.get(name)
        if kind is None:
            if len(self._kinds) >= FUNCTIONS_FOLLOWED:
                return
            kind = self._kinds[name] = _Kind(name, str(kwargs.get("reduction", "mean")), self._moment.step)
        kind.calls += 1
        if (
            (kind.calls <= TARGETS_LOOKED_AT or due(kind.calls))
            and isinstance(target, Tensor)
            and isinstance(prediction, Tensor)
            and is_dense(target)
            and target.numel()
        ):
            self._look(kind, prediction, target.detach(), kwargs)

    def _look(self, kind: _Kind, prediction: Tensor, target: Tensor, kwargs: Mapping[str, Any]) -> None:
        kind.told = None
        weights = kwargs.get("weight")
        kind.weights = weights.detach() if isinstance(weights, Tensor) else kind.weights
        if kind.looked < INPUTS_LOOKED_AT:
            kind.given_zeros.append((prediction.detach().reshape(-1)[:TARGETS_READ] == 0).float().mean())
        kind.weighted |= any(kwargs.get(k) is not None for k in ("weight", "pos_weight"))
        kind.weighted |= bool(kwargs.get("label_smoothing"))
        ignored = kwargs.get("ignore_index")
        kind.ignored = ignored if isinstance(ignored, int) else kind.ignored
        kind.activation = bounded_by(prediction) if kind.looked == 0 or kind.activation[0] else kind.activation
        axis = 1 if kind.function in OF_LOG_PROBABILITIES and prediction.ndim > 1 else -1
        one_long_row = target.ndim == 1 and before_flattening(prediction, len(target)) is not None
        kind.of_sequences |= target.ndim > 1 or one_long_row or target.numel() in self._sequences
        kind.outputs = prediction.shape[axis] if prediction.ndim else 0
        kind.loaded += bool(self._batch)
        kind.from_data += any(same_numbers(t, target) for t in self._batch)
        rows = len(target) if target.ndim else 1
        kind.one_a_row &= rows == target.numel() and (self._inputs is None or len(self._inputs) == rows)
        inputs, self._inputs = self._inputs, None
        fits = inputs is not None and len(inputs) == rows == target.numel() >= FEWEST_ROWS
        self._batch = []
        small = fits and inputs is not None and inputs.numel() <= rows * WIDEST_EXAMPLE
        inputs = inputs.detach().reshape(rows, -1) if small and inputs is not None else None
        target = target.reshape(rows, -1)[: max(TARGETS_READ // max(target.numel() // max(rows, 1), 1), 2)]
        if target.is_cpu:
            self._note(kind, target, inputs)
        elif len(self._waiting) < 4 * TARGETS_LOOKED_AT:
            self._waiting.append((kind, target.clone(), None if inputs is None else inputs.clone()))

    def _note(self, kind: _Kind, target: Tensor, inputs: Tensor | None) -> None:
        kind.looked += 1
        if target.is_floating_point():
            kind.numbers.append(target.double())
        else:
            values, counts = target[target != kind.ignored].unique(return_counts=True)
            for value, count in zip(values.tolist(), counts.tolist(), strict=True):
                kind.counts[value] = kind.counts.get(value, 0) + count
        if inputs is not None and len(inputs) == len(target):
            found = set(affine_features(inputs.double(), target.reshape(-1)).tolist())
            kind.copied = found if kind.copied is None else kind.copied & found
            kind.copied_looks, kind.rows = kind.copied_looks + 1, kind.rows + len(inputs)
            kind.features = inputs.shape[1]
        if kind.looked in TOLD_AFTER:
            self._moment.news(("asked", kind.function, kind.looked), "asked")

    def facts(self) -> tuple[AskedFacts, ...]:
        """Each function's as plain data; what is on a device is read now."""
        waiting, self._waiting = self._waiting, []
        for kind, target, inputs in waiting:
            self._note(kind, target.cpu(), None if inputs is None else inputs.cpu())
        return tuple(_told(k) for k in self._kinds.values() if k.looked)


def same_numbers(prediction: Tensor, target: Tensor) -> bool:
    """Whether the two hold the same numbers, on the host; elsewhere whether they have as many."""
    if prediction.numel() != target.numel():
        return False
    on_host = prediction.is_cpu and target.is_cpu
    return not on_host or bool((prediction.reshape(-1) == target.reshape(-1)).all())


def affine_features(inputs: Tensor, target: Tensor) -> Tensor:
    """The features (columns) of the inputs (n, d) of which the targets (n,) are an affine function: for class
    numbers, of which one class against the others is. A class of one or two rows proves nothing: among many
    features some are zero on all other rows."""
    none = torch.zeros(0, dtype=torch.int64)
    if target.is_floating_point():
        responses = target.double().unsqueeze(1)
    else:
        classes, counts = target.unique(return_counts=True)
        if not 2 <= len(classes) <= 64:
            return none
        classes = classes[(counts >= ROWS_OF_A_CLASS) & (counts <= len(target) - ROWS_OF_A_CLASS)]
        responses = torch.cat([(target[:, None] == classes).double(), target.double().unsqueeze(1)], 1)
    x, y = inputs - inputs.mean(0), responses - responses.mean(0)
    enough = (y != 0).any(0)
    x_size, y_size = x.norm(dim=0), y.norm(dim=0)
    varies = x_size > 1e-6 * inputs.norm(dim=0)
    products = (x.T @ y).abs() / (x_size[:, None] * y_size).clamp_min(1e-300)
    found = ((products >= 1 - ROUNDING_OF_CORRELATION) & varies[:, None] & enough).any(1)
    return found.nonzero().flatten() if bool(inputs.isfinite().all()) else none


def _told(k: _Kind) -> AskedFacts:
    k.told = k.told or _facts(k)
    return k.told


def _facts(k: _Kind) -> AskedFacts:
    numbers = torch.cat([n.reshape(-1) for n in k.numbers]) if k.numbers else torch.zeros(0, dtype=torch.float64)
    binary = len(numbers) > 0 and bool(((numbers == 0) | (numbers == 1)).all())
    low, high = (float(numbers.min()), float(numbers.max())) if len(numbers) else (math.nan, math.nan)
    loss, error = _constant_loss(k, numbers, binary)
    name, lower, upper = k.activation
    slack = 0.01 * (high - low) if len(numbers) else 0.0
    beyond = (numbers < lower - slack) | (numbers > upper + slack)
    return AskedFacts(
        function=k.function,
        reduction=k.reduction,
        looked=k.looked,
        first_step=k.first_step,
        targets=len(numbers) + sum(k.counts.values()),
        classes=len(k.counts),
        low=low,
        high=high,
        mean=float(numbers.mean()) if len(numbers) else math.nan,
        binary=binary,
        constant_loss=loss,
        constant_error=error,
        weighted=k.weighted or k.reduction != "mean",
        activation=name,
        lower=lower,
        upper=upper,
        outside=float(beyond.double().mean()) if len(numbers) else 0.0,
        copied=min(k.copied) if k.copied else -1,
        copied_looks=k.copied_looks if k.copied else 0,
        rows=k.rows,
        features=k.features,
        outputs_a_row=k.outputs,
        one_a_row=k.one_a_row,
        zeros=min((float(z) for z in k.given_zeros), default=0.0),
        spread_first=_spread(k.numbers[:FIRST_TARGETS]),
        spread_last=_spread(k.numbers[-1:]) if k.looked > FIRST_TARGETS else math.nan,
        uncounted=uncounted(k.weights, k.ignored),
        counts=dict(sorted(k.counts.items())),
        of_sequences=k.of_sequences,
        from_data=0 < k.loaded == k.from_data,
    )


def _spread(numbers: list[Tensor]) -> float:
    """The standard deviation of these targets; NaN where there are fewer than eight."""
    all_of = torch.cat([n.reshape(-1) for n in numbers]) if numbers else torch.zeros(0)
    return float(all_of.std()) if len(all_of) >= FEWEST_ROWS else math.nan


def uncounted(weights: Tensor | None, ignored: int) -> tuple[int, ...]:
    """The classes with a weight of zero, but for the one that the loss ignores."""
    if weights is None or weights.ndim != 1:
        return ()
    return tuple(c for c in (weights == 0).nonzero().flatten().tolist() if c != ignored)


def _constant_loss(k: _Kind, numbers: Tensor, binary: bool) -> tuple[float, float]:
    """The mean loss of the best constant answer and its standard error, from the targets that were read."""
    if k.function in OF_LOG_PROBABILITIES and k.counts:
        shares = torch.tensor(list(k.counts.values()), dtype=torch.float64)
        return _entropy(shares / shares.sum(), float(shares.sum()))
    if k.function in OF_BINARY_TARGETS and binary:
        ones = float(numbers.mean())
        return _entropy(torch.tensor([ones, 1 - ones], dtype=torch.float64), len(numbers))
    if k.function == "l1_loss" and numbers.numel() == sum(len(n) for n in k.numbers) > 8:
        away = (numbers - numbers.median()).abs()
        return float(away.mean()), float(away.std() / len(away) ** 0.5)
    if k.function == "mse_loss" and k.numbers and len({n.shape[1:] for n in k.numbers}) == 1:
        rows = torch.cat(k.numbers)
        if len(rows) > 8:
            each = (rows - rows.mean(0)).square().mean(1) * len(rows) / (len(rows) - 1)
            return float(each.mean()), float(each.std() / len(rows) ** 0.5)
    return math.nan, math.nan


def _entropy(shares: Tensor, count: float) -> tuple[float, float]:
    shares = shares[shares > 0]
    logs = -shares.log()
    mean = float((shares * logs).sum())
    return mean, float(((shares * logs.square()).sum() - mean**2).clamp_min(0).sqrt()) / count**0.5
