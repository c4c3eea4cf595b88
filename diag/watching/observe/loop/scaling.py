"""Mixed precision and clipping: who multiplied, divided and cut the gradients, and in which order."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diag.snapshot.autograd_graph import nodes_before
from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.steps import ClippingFacts, ScalingFacts
from diag.watching.observe.loop.moment import Counter, Moment
from diag.watching.observe.loop.optimizers import OptimizerRecord
from diag.watching.observe.norms import HALF_PRECISION

GRAPHS_LOOKED_AT = 3  # training calls whose graph is looked at
NODES_OF_GRAPH = 64  # nodes of the graph
SAVED = (
    "_saved_self",
    "_saved_mat1",
    "_saved_mat2",
    "_saved_input",
    "_saved_weight",
    "_saved_result",
    "_saved_query",
)
SKIPPED = (17, 40)  # steps left out in a row that are news: a scale of 2^16 is below one after 17


class Scaling:
    """Follows a GradScaler and autocast."""

    def __init__(self, model: nn.Module, moment: Moment) -> None:
        self._moment = moment
        self._half = any(p.dtype in HALF_PRECISION for p in model.parameters())
        self._sixteen = any(p.dtype == torch.float16 for p in model.parameters())
        self._scaled_losses = self._looked = self._autocast = 0
        self._skipped, self._clipped_scaled = Counter(), Counter()
        self._scaled: set[int] = set()  # graph nodes of scaled losses since the last backward pass
        self.carried = False  # gradients carry the scale
        self._unscaled: set[int] = set()  # optimizers whose gradients have been divided since
        self._clipped = False  # while they carried it
        self._stepping: set[int] = set()
        self._fired = True
        self._scale: Any = None
        self._scaler: Callable[[], Any] = lambda: None

    def training_call(self, outputs: Any) -> None:
        """The model was called in training."""
        if self._looked >= GRAPHS_LOOKED_AT or self._half:
            return
        self._looked += 1
        found = [outputs] if isinstance(outputs, Tensor) else tensors_in(outputs)
        tensor = next((t for t in found if t.requires_grad), None)
        device = "cpu" if tensor is None else tensor.device.type
        on = torch.is_autocast_enabled(device) or any(t.dtype in HALF_PRECISION for t in found)
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        self._sixteen |= autocast or any(t.dtype == torch.float16 for t in found)
        self._autocast += on or (tensor is not None and has_half(tensor.grad_fn))

    def loss_scaled(self, losses: Any, scaled: Any) -> None:
        """A GradScaler made `scaled` of `losses`."""
        if scaled is losses or not isinstance(scaled, Tensor) or scaled.grad_fn is None:
            return
        self._scaled_losses += 1
        self._scaled.add(scaled.grad_fn._sequence_nr())
        if self._scaled_losses == GRAPHS_LOOKED_AT:
            self._moment.news("loss scaled", "scaling")

    def backward_called(self, roots: Any) -> None:
        """A backward pass begins."""
        root = roots if isinstance(roots, Tensor) else next((r for r in roots or () if isinstance(r, Tensor)), None)
        if root is not None and root.grad_fn is not None and root.grad_fn._sequence_nr() in self._scaled:
            self.carried, self._unscaled = True, set()
        self._scaled.clear()

    def unscaling(self, optimizer: Any, scaler: Any) -> None:
        """A GradScaler divides an optimizer's gradients."""
        self._unscaled.add(id(optimizer))
        self._scale, self._scaler = scaler._scale, weakref.ref(scaler)

    def clipping(self) -> None:
        """Gradients are clipped."""
        if self.carried and not self._unscaled:
            self._clipped = True

    def scaler_stepping(self, optimizer: Any) -> None:
        """A GradScaler is about to step an optimizer, or to leave the step out."""
        self._stepping.add(id(optimizer))
        self._fired = False
        self._note_clip()

    def scaler_stepped(self, optimizer: Any) -> bool:
        """It has done so; whether the step was left out."""
        self._stepping.discard(id(optimizer))
        skipped = not self._fired
        self._fired = True
        if skipped:
            if self._skipped.hit(self._moment.step) in SKIPPED:
                self._moment.news(("skipped", self._skipped.running), "scaling")
        else:
            self._skipped.miss()
        self._end()
        return skipped

    def begin(self) -> None:
        """A stretch of steps that are looked at closely begins."""
        self.carried = self._clipped = False
        self._scaled.clear()

    def stepped(self) -> None:
        """An optimizer has stepped."""
        self._fired = True

    def before_step(self, optimizer: Any, record: OptimizerRecord | None) -> None:
        """An optimizer is about to step."""
        if record is None or not record.held:
            return
        by_scaler = id(optimizer) in self._stepping
        if self.carried and not by_scaler and id(optimizer) not in self._unscaled:
            if record.scaled.hit(self._moment.step) <= 2:
                self._moment.news(("scaled", record.scaled.running), "scaling")
            self._note_clip()
            self._end()

    def _note_clip(self) -> None:
        if self._clipped:
            self._clipped = False
            if self._clipped_scaled.hit(self._moment.step) <= 2:
                self._moment.news(("clipped scaled", self._clipped_scaled.running), "scaling")

    def _end(self) -> None:
        self._clipped = False

    def zeroed(self) -> None:
        """Gradients were reset."""
        self.carried, self._clipped, self._unscaled = False, False, set()

    def facts(self) -> ScalingFacts:
        """As plain data."""
        scale = self._scale
        known = isinstance(scale, Tensor) and scale.device.type == "cpu"
        backoff = getattr(self._scaler(), "_backoff_factor", None)
        return ScalingFacts(
            scaled_losses=self._scaled_losses,
            looked=self._looked,
            autocast=self._autocast,
            half_parameters=self._half,
            float16=self._sixteen,
            scale=float(scale) if known else None,
            backoff=backoff if isinstance(backoff, float) else None,
            skipped=self._skipped.tally(),
            clipped_scaled=self._clipped_scaled.tally(),
        )


class Clipping:
    """Follows `clip_grad_norm_` and its like."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._threshold: float | None = None
        self._clips, self._early, self._partial, self._empty = (Counter() for _ in range(4))
        self._covered = self._trained = 0
        self._this = self._before = self._after = False

    def begin(self) -> None:
        """A stretch of steps that are looked at closely begins."""
        self._this = self._before = self._after = False

    def clipped(self, parameters: Any, limit: Any, names: Mapping[int, str], passes: bool) -> bool:
        """Gradients are clipped; passes: there was a backward pass since the last step. False where they are not
        this model's."""
        clipped = [parameters] if isinstance(parameters, Tensor) else list(parameters or ())
        ours = [p for p in clipped if id(p) in names]
        if not ours and clipped:
            return False
        self._this = True
        self._covered = sum(p.grad is not None for p in ours)
        self._trained = len(names)
        if isinstance(limit, (int, float)):
            self._threshold = float(limit)
        if passes:
            self._before, self._after = True, False
        if self._covered == 0:
            self._hit(self._empty, "empty clip")
        return True

    def backward(self) -> None:
        """A backward pass reached the model."""
        self._after = self._this

    def stepped(self) -> None:
        """An optimizer that holds the model's parameters has stepped."""
        if not self._this:
            return
        self._clips.hit(self._moment.step)
        if not self._before:
            self._hit(self._early, "early clip")
        else:
            self._early.miss()
            self._hit(self._partial, "partial clip") if self._after else self._partial.miss()
        self._this = self._before = self._after = False

    def _hit(self, counter: Counter, kind: str) -> None:
        if counter.hit(self._moment.step) <= 3:
            self._moment.news((kind, counter.running), "clipping")

    def facts(self) -> ClippingFacts:
        """As plain data."""
        return ClippingFacts(
            threshold=self._threshold,
            clips=self._clips.tally(),
            early=self._early.tally(),
            partial=self._partial.tally(),
            empty=self._empty.tally(),
            covered=self._covered,
            trained=self._trained,
        )


def has_half(node: Any) -> bool:
    """Whether a tensor of half precision is kept for the backward pass in the nodes nearest to `node`."""
    return any(_keeps_half(before) for before in nodes_before([node], NODES_OF_GRAPH))


def _keeps_half(node: Any) -> bool:
    for name in SAVED:
        try:
            saved = getattr(node, name, None)
        except RuntimeError:  # freed, or kept by a hook
            continue
        if isinstance(saved, Tensor) and saved.dtype in HALF_PRECISION:
            return True
    return False
