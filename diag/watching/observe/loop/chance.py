"""Chance where there should be none, or the same each time: random numbers drawn in evaluation mode, held-out rows
that differ between evaluations, and one seed that is set again and again."""

from __future__ import annotations

import ast
import random
import zlib
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.network import ChanceFacts
from diag.watching.observe.loop.data.source import tree_of
from diag.watching.observe.loop.data.stream import bytes_of, sampled
from diag.watching.observe.loop.modes import first_tensor
from diag.watching.observe.loop.moment import Counter, Moment

LABELS, KINDS = 8, 3  # labels of a batch at least, and distinct ones, to know it again by
COMPARED = 20  # losses whose targets are compared with the loader's labels
KEPT = 64
CALLS = 64  # evaluation calls that are looked at for random numbers
SEEDS_REPORTED = (3, 10)  # times that one seed is set in a row of steps that are news


class Chance:
    """Follows evaluations in eval mode and the seeds that are set."""

    def __init__(self, model: nn.Module, moment: Moment) -> None:
        self._model, self._moment = model, moment
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._state: Any = None
        self._calls = 0
        self._drawn = Counter()
        self._always: tuple[str, ...] | None = None
        self._labels: Tensor | None = None
        self._dataset = 0
        self._rows: dict[tuple[int, int], tuple[int, int]] = {}
        self._raw = 0
        self._before: tuple[Any, ...] | None = None
        self._of_data = True  # the model's inputs are data, not what another network makes of it
        self._supervised, self._compared = False, 0
        self._differing = Counter()
        self._first = True
        self._seed: tuple[Any, int] | None = None
        self._seeded = Counter()

    # Evaluations

    def fetched(self, batch: Any, dataset: int = 0) -> None:
        """A DataLoader gave a batch of this data set: its labels tell it from others."""
        tensors = tensors_in(batch)
        labels = [t for t in tensors if t.ndim == 1 and not t.is_floating_point() and t.is_cpu]
        self._labels, self._dataset = labels[-1] if labels else None, dataset
        if torch.is_grad_enabled() or self._model.training or not self._first:
            return
        raw = next((t for t in tensors if t.is_floating_point() and t.is_cpu and t.numel()), None)
        self._raw = 0 if raw is None else zlib.crc32(bytes_of(sampled(raw)))
        self._state, self._before = random_state(self._device), random_numbers()

    def training_call(self, args: Any = ()) -> None:
        """The model was called in training."""
        self._first, self._state, self._before = True, None, None
        self._of_data &= not any(isinstance(a, Tensor) and a.requires_grad for a in args)

    def loss_called(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A loss was called in training: are the loader's labels its targets? Where rows are told apart by labels
        that nothing is trained on, as in self-supervised training, differing inputs are how it works."""
        if self._supervised or self._labels is None or self._compared >= COMPARED:
            return
        self._compared += 1
        labels = self._labels
        self._supervised = any(
            t.shape == labels.shape and t.is_cpu and torch.equal(t, labels)
            for t in tensors_in((args, dict(kwargs)))
        )

    def evaluated(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The model was called without gradients."""
        drawn = self._before is not None and self._before != random_numbers()
        if not self._model.training and self._calls < CALLS:
            drawn |= self._draws()
        labels, self._labels = self._labels, None
        first, self._first = self._first, False
        if first and labels is not None and not self._model.training:
            self._same_rows(labels, args, kwargs, drawn)

    def _same_rows(self, labels: Tensor, args: Any, kwargs: Mapping[str, Any], drawn: bool) -> None:
        """Have rows with these labels other inputs than before, and by chance? `drawn`: random numbers were, since
        the loader gave the batch."""
        inputs = first_tensor(args, kwargs)
        if inputs is None or not inputs.is_floating_point() or not inputs.is_cpu or len(self._rows) >= KEPT:
            return
        if len(labels) < LABELS or len(labels.unique()) < KINDS or not inputs.numel():
            return
        rows, now = zlib.crc32(bytes_of(labels)), zlib.crc32(bytes_of(sampled(inputs)))
        before = self._rows.get((self._dataset, rows))
        self._rows[self._dataset, rows] = now, self._raw
        if before is not None:
            if before[0] != now and self._supervised and self._of_data and (drawn or before[1] != self._raw):
                self._differing.hit(self._moment.step)
                self._moment.news(("rows differ", min(self._differing.times, 3)), "chance")
            else:
                self._differing.miss()

    def _draws(self) -> bool:
        """Were random numbers drawn since the call or the batch before, in one evaluation?"""
        self._calls += 1
        state, self._state = self._state, random_state(self._device)
        if state is None or torch.equal(state, self._state):
            return False
        self._drawn.hit(self._moment.step)
        if self._always is None:
            self._always = always_dropping(self._model)
            self._moment.news(("dropout in evaluation", self._always), "chance")
        return True

    # Seeds

    def seeded(self, seed: Any) -> None:
        """`torch.manual_seed` was called."""
        known, step = self._seed, self._moment.step
        self._seed = (seed, step)
        if known is not None and known[0] == seed and known[1] == step - 1:
            if self._seeded.hit(step) in SEEDS_REPORTED:
                self._moment.news(("seeded", self._seeded.running), "chance")
        elif known is None or known[0] != seed or known[1] < step - 1:
            self._seeded.miss()

    def facts(self) -> ChanceFacts:
        """As plain data."""
        return ChanceFacts(
            drawn=self._drawn.tally(),
            always_dropping=self._always or (),
            differing=self._differing.tally(),
            seeded=self._seeded.tally(),
        )


def random_state(device: torch.device) -> Tensor:
    """What changes when a random number is drawn on the device; nothing is waited for."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
        return torch.tensor([generator.initial_seed() % (1 << 62), generator.get_offset()])
    return torch.default_generator.get_state()


def random_numbers() -> tuple[Any, ...]:
    """What changes when Python or NumPy draw a random number of their own generators."""
    of_numpy: Any = numpy.random.get_state()
    return random.getstate(), of_numpy[1].tobytes(), of_numpy[2:]


def always_dropping(model: nn.Module) -> tuple[str, ...]:
    """The modules whose `forward` calls dropout without regard to the mode, read from their source."""
    kinds: dict[type, bool] = {}
    found = []
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("torch."):
            continue
        if kind not in kinds:
            kinds[kind] = drops_always(kind)
        if kinds[kind]:
            found.append(name or "the model")
    return tuple(found)


def drops_always(kind: type) -> bool:
    """Whether the source of the class's `forward` has a call of dropout that does not depend on the mode."""
    tree = tree_of(getattr(kind, "forward", None))
    return tree is not None and any(
        isinstance(node, ast.Call) and _is_unconditional(node) for node in ast.walk(tree)
    )


def _is_unconditional(call: ast.Call) -> bool:
    name = _name(call.func)
    keywords = {k.arg: k.value for k in call.keywords}
    if name == "scaled_dot_product_attention":
        rate = keywords.get("dropout_p")
        return isinstance(rate, ast.Constant) and bool(rate.value)
    if name.endswith("dropout") and not _of_self(call.func):
        training = keywords.get("training", call.args[2] if len(call.args) > 2 else None)
        return training is None or (isinstance(training, ast.Constant) and bool(training.value))
    return isinstance(call.func, ast.Call) and _name(call.func.func).startswith("Dropout")


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _of_self(function: ast.expr) -> bool:
    """`self.dropout(x)`: a module that knows its mode."""
    while isinstance(function, ast.Attribute):
        function = function.value
    return isinstance(function, ast.Name) and function.id == "self"
