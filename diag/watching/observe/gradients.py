"""The gradients that an optimizer is given: their norms before clipping, and what was done to them since.

Clipping and a GradScaler change gradients in place, so norms are taken when a clip begins and kept for the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from diag.watching.observe.norms import SMALL_TENSOR, norms
from diag.watching.observe.rows import Columns, Row

FEW_NUMBERS = 4096  # that are read at every step in a few microseconds
CLIPPED_SCALED = (
    "Gradients were clipped before the GradScaler unscaled them, so the limit applied to scaled values; call "
    "scaler.unscale_(optimizer) first."
)


@dataclass(frozen=True)
class StepMembers:
    """The watched parameters that an optimizer holds, and their columns in the record."""

    columns: Columns
    parameters: tuple[nn.Parameter, ...]

    @cached_property
    def telling(self) -> tuple[nn.Parameter, ...]:
        """Those whose gradients tell whether any is not finite: what is not spreads in the backward pass to the
        layers nearer the input, unless a unit that is switched off stops it, so the first and the last of the small
        ones do."""
        found = [p for p in self.parameters if p.grad is not None] or list(self.parameters)
        small = [p for p in found if p.numel() <= FEW_NUMBERS] or [min(found, key=lambda p: p.numel())]
        return (small[0], small[-1]) if len(small) > 1 else (small[0],)


@dataclass
class Clipped:
    """Gradients as they were before a clip, and what tells whether anything has touched them since."""

    columns: Columns
    values: Any
    gradients: list[Tensor]
    versions: list[int]
    limits: list[tuple[Any, Any]]
    measured_after: bool = False
    scale: Any = None

    def untouched(self) -> bool:
        """Whether nothing has written to the gradients since."""
        return all(g._version == v for g, v in zip(self.gradients, self.versions, strict=True))


class GradientNorms:
    """Takes the gradient norms of a step. `index`: the column of each watched parameter, by id."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], index: Mapping[int, int], note: Callable[[str, str], None]
    ) -> None:
        self._parameters, self._index, self._note = parameters, index, note
        self.everyone = StepMembers(numpy.arange(len(parameters)), tuple(parameters))
        self._clips: list[Clipped] = []
        self.active = True  # whether the gradients of this step are read
        self.cost = 0.0  # seconds that reading them has taken

    def before_clip(self, parameters: Any, max_norm: Any, total_norm: Any) -> Clipped | None:
        """Gradients are about to be clipped: take their norms first (max_norm None: clipped by value)."""
        if not (self.active or self._must_be_read(self.everyone, total_norm)):
            return None
        began = time.perf_counter()
        clip = self._before_clip(parameters, max_norm, total_norm)
        self.cost += time.perf_counter() - began
        return clip

    def _before_clip(self, parameters: Any, max_norm: Any, total_norm: Any) -> Clipped | None:
        clipped = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        columns = [self._index[id(p)] for p in clipped if id(p) in self._index and p.grad is not None]
        if not columns:
            return None
        # Of a sharded total this process has a part only; the whole is made of the reduced norms (see `ranks`).
        total_norm = total_norm.to_local() if hasattr(total_norm, "to_local") else total_norm
        limit = None if max_norm is None else (float(max_norm), total_norm)
        for clip in self._clips:
            if clip.columns.tolist() == columns and clip.untouched():
                clip.limits.append(limit) if limit else None
                clip.measured_after |= limit is None
                return clip
        gradients = [_of(self._parameters[c]) for c in columns]
        where = numpy.array(columns, numpy.intp)
        clip = Clipped(where, norms(gradients), gradients, [], [limit] if limit else [], limit is None)
        self._clips = [c for c in self._clips if not numpy.isin(c.columns, where).any()] + [clip]
        return clip

    def after_clip(self, clip: Clipped | None) -> None:
        """The gradients have been clipped."""
        if clip is not None:
            clip.versions = [g._version for g in clip.gradients]

    def unscaling(self, members: StepMembers, scaler: Any) -> None:
        """A GradScaler is about to divide an optimizer's gradients by its scale."""
        for clip in self._clips:
            if clip.scale is None and numpy.isin(clip.columns, members.columns).any():
                clip.scale, clip.measured_after = scaler._scale.detach().clone(), True
                self._note("clipping", CLIPPED_SCALED)

    def read(self, row: Row, optimizer: Optimizer | None, members: StepMembers) -> None:
        """The optimizer is about to use the gradients: their norms go into the row, if this step is read or they
        are not finite."""
        if members.parameters and (self.active or self._must_be_read(members)):
            began = time.perf_counter()
            self._read(row, optimizer, members)
            self.cost += time.perf_counter() - began

    def _read(self, row: Row, optimizer: Optimizer | None, members: StepMembers) -> None:
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            row.unscale.append((members.columns, scale.detach().clone()))
        gradients = [g for p in members.parameters if (g := p.grad) is not None]
        if not self._clips and len(gradients) == len(members.parameters):  # the usual case, at every step
            row.norms.append(("gradient_norm", members.columns, norms(gradients)))
            return
        left = set(members.columns.tolist())
        for clip in self._clips:
            inside = numpy.isin(clip.columns, members.columns)
            if not inside.any() or not (clip.scale is not None or clip.untouched()):
                continue
            columns = clip.columns[inside]
            row.norms.append(("gradient_norm", columns, _kept(clip.values, inside)))
            row.clips.extend((columns, limit, total) for limit, total in clip.limits)
            if clip.scale is not None:
                row.unscale.append((columns, clip.scale))
            if clip.measured_after:
                row.applied.append((columns, norms([_of(self._parameters[c]) for c in columns])))
            left -= set(columns.tolist())
        rest = [c for c in sorted(left) if self._parameters[c].grad is not None]
        if rest:
            columns = numpy.array(rest, numpy.intp)
            row.norms.append(("gradient_norm", columns, norms([_of(self._parameters[c]) for c in rest])))

    def _must_be_read(self, members: StepMembers, total_norm: Any = None) -> bool:
        """Whether the gradients of a step that need not be read are not finite, as far as the host knows without
        waiting; from here on they are read."""
        asked = [p.grad for p in members.telling] if total_norm is None else [total_norm]
        for t in asked:
            if _is_broken(t):
                self.active = True
                break
        return self.active

    def forget(self) -> None:
        """The step is over."""
        self._clips, self.cost = [], 0.0


def _is_broken(t: Tensor | None) -> bool:
    """Whether a number in it is not finite; False where that cannot be told at once."""
    if type(t) is not Tensor or not (t.is_cpu and t.layout is torch.strided and t.is_floating_point()):
        return False
    if t.dtype is torch.float32 and not t.requires_grad and t.numel() <= SMALL_TENSOR:
        flat = t.numpy()
        return not math.isfinite(numpy.vdot(flat, flat))  # also where only a square is beyond the range
    return not math.isfinite(t.detach().sum().item())


def _of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _kept(values: Any, mask: NDArray[numpy.bool_]) -> Any:
    if mask.all() or not isinstance(values, Tensor):
        return values[mask] if not isinstance(values, Tensor) else values
    return values[torch.from_numpy(numpy.flatnonzero(mask)).to(values.device)]
