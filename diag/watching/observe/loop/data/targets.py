"""What training asks for: the size of floating targets beside that of the outputs, and which of the input's tokens
the targets are.

A few calls are looked at. What is on a device is kept there and read when the facts are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.data import TargetFacts
from diag.snapshot.objective.comparison import IGNORED_LABEL
from diag.snapshot.objective.loss_spy import input_and_target
from diag.watching.observe.loop.moment import Moment

TARGET_CALLS = 3  # calls
TARGET_ROWS, TARGET_NUMBERS = 8, 4096  # of a call that are read
FARTHEST = 32  # positions by which targets are looked for
TOKENS_COMPARED, DISTINCT_TOKENS = 48, 6  # tokens at least that agree, and distinct ones among them
OF_NUMBERS = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")


class Targets:
    """Follows the first losses of training and the inputs before them."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._tokens: list[Tensor] = []
        self._shifts: dict[int, int] = {}
        self._looks = self._aligned = self._numbers = 0
        self._waiting: list[tuple[str, Tensor, list[Tensor], int]] = []
        self._sizes: list[tuple[float, float, float, float]] = []
        self._function = ""

    def training_call(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The model was called in training."""
        if self._looks < TARGET_CALLS:
            self._tokens = [t for t in tensors_in((args, dict(kwargs))) if is_tokens(t)][:4]

    def loss_called(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A loss function of torch returned a value that has a graph."""
        given, target = input_and_target(args, kwargs)
        if not isinstance(target, Tensor) or not isinstance(given, Tensor):
            return
        if self._tokens and not target.is_floating_point() and self._looks < TARGET_CALLS:
            self._looks += 1
            ignored = kwargs.get("ignore_index", IGNORED_LABEL)
            self._read("tokens", target, self._tokens, ignored if isinstance(ignored, int) else IGNORED_LABEL)
        elif target.is_floating_point() and name in OF_NUMBERS and self._numbers < TARGET_CALLS:
            self._numbers += 1
            self._function = name
            self._read("numbers", target.reshape(-1)[:TARGET_NUMBERS], [given.reshape(-1)[:TARGET_NUMBERS]], 0)

    def _read(self, what: str, target: Tensor, others: list[Tensor], ignored: int) -> None:
        if target.is_cpu:
            self._note(what, target.detach(), [t.detach() for t in others], ignored)
        else:
            kept = [t.detach().clone() for t in (target, *others)]
            self._waiting.append((what, kept[0], kept[1:], ignored))

    def _note(self, what: str, target: Tensor, others: list[Tensor], ignored: int) -> None:
        if what == "numbers":
            wanted, given = target.double(), others[0].double()
            if wanted.numel() > 1:
                size = float(wanted.square().mean().sqrt())
                spread, mean = float(wanted.std(correction=0)), float(wanted.mean())
                self._sizes.append((size, mean, spread, float(given.square().mean().sqrt())))
                self._moment.news("size of targets")
            return
        shift = next((s for t in others if (s := shift_of(t, target, ignored)) is not None), None)
        self._aligned += 1
        if shift is not None:
            self._shifts[shift] = self._shifts.get(shift, 0) + 1
            self._moment.news(("targets", shift, self._aligned))

    def facts(self) -> TargetFacts:
        """As plain data; what is on a device is read now."""
        waiting, self._waiting = self._waiting, []
        for what, target, others, ignored in waiting:
            self._note(what, target.cpu(), [t.cpu() for t in others], ignored)
        sizes = torch.tensor(self._sizes).double().mean(0).tolist() if self._sizes else [float("nan")] * 4
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
        )


def is_tokens(t: Tensor) -> bool:
    """Whether the tensor may hold sequences of token numbers."""
    return t.ndim == 2 and t.dtype in (torch.int64, torch.int32) and t.shape[1] > 4


def shift_of(tokens: Tensor, target: Tensor, ignored: int) -> int | None:
    """The s for which the target at each position is the token s positions on, None where there is none: 1 where
    the next one is asked for, 0 where the same. tokens (n, t); target (n, t) or flattened; `ignored` targets do not
    count."""
    if target.numel() == tokens.numel():
        target = target.reshape(tokens.shape)
    if target.shape != tokens.shape:
        return None
    tokens, target = tokens[:TARGET_ROWS], target[:TARGET_ROWS]
    length = tokens.shape[1]
    for distance in range(min(FARTHEST, length - 2) + 1):
        for s in {distance, -distance}:
            ours, theirs = target[:, max(-s, 0) : length - max(s, 0)], tokens[:, max(s, 0) : length - max(-s, 0)]
            counts = ours != ignored
            if bool((ours == theirs)[counts].all()) and _enough(ours[counts]):
                return s
    return None


def _enough(values: Tensor) -> bool:
    return values.numel() >= TOKENS_COMPARED and len(values.unique()) >= DISTINCT_TOKENS
