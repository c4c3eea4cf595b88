"""What training asks for: the size of floating targets beside that of the outputs, and which of the input's tokens
the targets are.

A few calls are looked at. What is on a device is kept there and read when the facts are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, first_arguments, kind_of, signed
from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.data import TargetFacts
from diag.snapshot.objective.comparison import IGNORED_LABEL
from diag.snapshot.objective.loss_spy import input_and_target
from diag.watching.observe.loop.data.padding import before_flattening
from diag.watching.observe.loop.moment import Moment

TARGET_CALLS = 3  # calls
TARGET_ROWS, TARGET_NUMBERS = 8, 4096  # of a call that are read
FARTHEST = 32  # positions by which targets are looked for
TOKENS_COMPARED, DISTINCT_TOKENS = 48, 6  # tokens at least that agree, and distinct ones among them
MOST_CUT = 4  # positions of a sequence that a loss may leave out at its ends
NODES_TO_CUT = 16
OF_NUMBERS = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")


@dataclass
class AskedTokens:
    """One loss whose targets may be tokens. start: the position of the first output that it is of; outputs:
    the first axes of these before they were put in one row; tokens: inputs that the targets may be of, those
    before it and, as a model may compute the loss itself, those of the next call that ends."""

    target: Tensor
    ignored: int
    start: int
    outputs: tuple[int, int] | None = None
    tokens: list[Tensor] = field(default_factory=list)

    def shift(self) -> int | None:
        """By how many positions the targets stand before the tokens that they are, None where they are none."""
        shifts = (shift_of(t, self.target, self.ignored, self.start) for t in self.tokens)
        return next((s for s in shifts if s is not None), None)

    def exchanged(self) -> bool:
        """Whether each row of targets is the next tokens of another row."""
        return any(rows_exchanged(t, self.target, self.ignored, self.start) for t in self.tokens)

    def order(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """The shapes that outputs and targets had before they were put in one row, where the order differs."""
        shapes = [t.shape for t in self.tokens if shift_of(t, self.target, self.ignored, self.start) is not None]
        if self.outputs is None or self.target.ndim != 1 or not shapes:
            return None
        targets = shapes[0][0], len(self.target) // shapes[0][0]
        turned = self.outputs == targets[::-1] and targets[0] != targets[1]
        return (self.outputs, targets) if turned else None

    def turned(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """The same where outputs were put in one row example by example, and targets position by position."""
        n, length = self.outputs or (0, 0)
        if self.target.ndim != 1 or not n or len(self.target) != n * length:
            return None
        by_example = self.target.reshape(length, n).T
        inputs = [t for t in self.tokens if t.shape == (n, length)]
        found = any(shift_of(t, by_example, self.ignored) is not None for t in inputs)
        return ((n, length), (length, n)) if found else None


class Targets:
    """Follows the first losses of training and the inputs before them."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._tokens: list[Tensor] = []
        self._shifts: dict[int, int] = {}
        self._looks = self._aligned = self._numbers = self._exchanged = 0
        self._flattened: tuple[tuple[int, int], tuple[int, int]] | tuple[()] = ()
        self._open: AskedTokens | None = None  # until the call that it may be of has ended
        self._waiting: list[AskedTokens] = []
        self._numbers_waiting: list[tuple[Tensor, Tensor]] = []
        self._sizes: list[tuple[float, float, float, float]] = []
        self._function = ""

    def training_call(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The model was called in training."""
        if self._looks >= TARGET_CALLS and self._open is None:
            return
        self._tokens = [t for t in tensors_in((args, dict(kwargs))) if is_tokens(t)][:4]
        asked, self._open = self._open, None
        if asked is not None and (asked.tokens or self._tokens):
            self._looks += 1
            asked.tokens += self._tokens
            self._compare(asked)

    def loss_called(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A loss function of torch returned a value that has a graph."""
        prediction, target = input_and_target(args, kwargs)
        if not isinstance(target, Tensor) or not isinstance(prediction, Tensor):
            return
        if not target.is_floating_point() and self._looks < TARGET_CALLS:
            ignored = kwargs.get("ignore_index", IGNORED_LABEL)
            ignored = ignored if isinstance(ignored, int) else IGNORED_LABEL
            outputs = before_flattening(prediction, len(target)) if target.ndim == 1 else None
            start = first_position(prediction)
            self._ask(AskedTokens(target.detach(), ignored, start, outputs, list(self._tokens)))
        elif target.is_floating_point() and name in OF_NUMBERS and self._numbers < TARGET_CALLS:
            self._numbers += 1
            self._function = name
            expected, got = (t.detach().reshape(-1)[:TARGET_NUMBERS] for t in (target, prediction))
            if expected.is_cpu:
                self._measure(expected, got)
            else:
                self._numbers_waiting.append((expected.clone(), got.clone()))

    def _ask(self, asked: AskedTokens) -> None:
        """Compare with the tokens before, where these may be meant, else wait for those of the call that ends
        next."""
        if asked.target.is_cpu and asked.shift() is not None:
            self._looks += 1
            self._compare(asked)
        else:
            self._open = asked

    def _compare(self, asked: AskedTokens) -> None:
        if asked.target.is_cpu:
            self._note(asked)
        else:
            kept = [t.detach().clone() for t in asked.tokens]
            self._waiting.append(replace(asked, target=asked.target.clone(), tokens=kept))

    def _measure(self, target: Tensor, output: Tensor) -> None:
        expected, predicted = target.double(), output.double()
        if expected.numel() > 1:
            size = float(expected.square().mean().sqrt())
            spread, mean = float(expected.std(correction=0)), float(expected.mean())
            self._sizes.append((size, mean, spread, float(predicted.square().mean().sqrt())))
            self._moment.news("size of targets", "targets")

    def _note(self, asked: AskedTokens) -> None:
        shift = asked.shift()
        self._aligned += 1
        if shift is not None:
            self._shifts[shift] = self._shifts.get(shift, 0) + 1
            self._flattened = self._flattened or asked.order() or ()
            self._moment.news(("targets", shift, self._aligned), "targets")
        elif (order := asked.turned()) is not None:
            self._flattened = self._flattened or order
            self._moment.news(("turned", self._aligned), "targets")
        elif asked.exchanged():
            self._exchanged += 1
            self._moment.news(("rows exchanged", self._exchanged), "targets")

    def facts(self) -> TargetFacts:
        """As plain data; what is on a device is read now."""
        waiting, self._waiting = self._waiting, []
        for asked in waiting:
            self._note(replace(asked, target=asked.target.cpu(), tokens=[t.cpu() for t in asked.tokens]))
        numbers, self._numbers_waiting = self._numbers_waiting, []
        for expected, predicted in numbers:
            self._measure(expected.cpu(), predicted.cpu())
        sizes = [float("nan")] * 4
        if self._sizes:
            sizes = torch.tensor(self._sizes, dtype=torch.float64).mean(0).tolist()
        first_output = self._sizes[0][3] if self._sizes else float("nan")
        return TargetFacts(
            function=self._function,
            looked=len(self._sizes),
            size=sizes[0],
            mean=sizes[1],
            deviation=sizes[2],
            first_output=first_output,
            aligned=self._aligned,
            shifts=dict(sorted(self._shifts.items())),
            exchanged=self._exchanged,
            flattened=self._flattened,
        )


def is_tokens(t: Tensor) -> bool:
    """Whether the tensor may hold sequences of token numbers."""
    return t.ndim == 2 and t.dtype in (torch.int64, torch.int32) and t.shape[1] > 4


def first_position(prediction: Tensor) -> int:
    """Of outputs that were cut over positions, z[:, a:b], the first position a; 0 where nothing was cut."""
    for node in first_arguments(prediction.grad_fn, NODES_TO_CUT):
        name = kind_of(node)
        if name == "Slice" and signed(getattr(node, "_saved_dim", 0)) in (1, -2):
            start = signed(getattr(node, "_saved_start", None) or 0)
            if start or signed(getattr(node, "_saved_end", 0)) < 0:
                length = getattr(node, "_saved_self_sym_sizes", (0, 0))[1]
                return start if start >= 0 else int(length) + start
        if name not in (*PASSING_ON, "Slice", "Transpose", "Permute", "LogSoftmax"):
            break
    return 0


def shift_of(tokens: Tensor, target: Tensor, ignored: int, start: int = 0) -> int | None:
    """The s for which the target at each position is the token s positions on, None where there is none: 1 where
    the next one is asked for, 0 where the same. tokens (n, t); target (n, t), or (n, t - c) from position `start`
    on, or flattened; `ignored` targets do not count."""
    n, length = tokens.shape
    asked = target.numel() // max(n, 1)
    if not length - MOST_CUT <= asked <= length or target.numel() != n * asked:
        return None
    if target.ndim != 1 and target.shape != (n, asked):
        return None
    tokens, target = tokens[:TARGET_ROWS], target.reshape(n, asked)[:TARGET_ROWS]
    for distance in range(min(FARTHEST, length - 2) + 1):
        for s in {distance, -distance}:
            at = start + s  # the token that the first target is, should it be inside
            low, high = max(0, -at), min(asked, length - at)
            if high <= low:
                continue
            ours, theirs = target[:, low:high], tokens[:, low + at : high + at]
            counts = ours != ignored
            if bool((ours == theirs)[counts].all()) and _enough(ours[counts]):
                return s
    return None


def rows_exchanged(tokens: Tensor, target: Tensor, ignored: int, start: int = 0) -> bool:
    """Whether rows of targets are the tokens one position on of other rows of the input: each of the first rows of
    some one's, and hardly any of its own. Shapes as for `shift_of`."""
    n, length = tokens.shape
    asked = target.numel() // max(n, 1)
    at = start + 1
    high = min(asked, length - at)
    fits = length - MOST_CUT <= asked <= length and target.numel() == n * asked and n >= TARGET_ROWS
    if not fits or (target.ndim != 1 and target.shape != (n, asked)) or high < 1:
        return False
    ours = target.reshape(n, asked)[:TARGET_ROWS, :high]
    counts = ours != ignored
    agree = ((ours[:, None] == tokens[None, :, at : at + high]) | ~counts[:, None]).all(-1)
    told_apart = agree.sum(1) == 1  # a row of one token says nothing
    own = agree[:, :TARGET_ROWS].diagonal() & told_apart
    return _enough(ours[counts]) and int(told_apart.sum()) > TARGET_ROWS // 2 and int(own.sum()) <= TARGET_ROWS // 4


def _enough(values: Tensor) -> bool:
    return values.numel() >= TOKENS_COMPARED and len(values.unique()) >= DISTINCT_TOKENS
