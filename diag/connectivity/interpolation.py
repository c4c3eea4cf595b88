"""Networks between two networks: the loss and error on a path from theta_0 to theta_1, with standard errors.

One working copy of the model is overwritten in place for every point; both models stay as they are. The numbers
along the path are in `interpolation_profile`, BatchNorm statistics in `interpolation_norms`.

Sources: Entezari et al. 2022 (arXiv:2110.06296, eq. 1) for the barrier; Frankle et al. 2020
(arXiv:1912.05671) for the error instability.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from diag.checkpoints import Checkpoint, as_checkpoint, load_into, load_state
from diag.connectivity.example_scores import Scores, score_examples
from diag.connectivity.fit import check_states_fit, check_ties, taken_over
from diag.connectivity.interpolation_norms import BATCH_NORMS, norm_statistics, reset_norm_statistics
from diag.connectivity.interpolation_profile import Points, Profile
from diag.connectivity.symmetries import LinearSymmetries, Symmetries
from diag.errors import CheckpointError, InvalidInput, MissingQuantity, Unsupported, first_line, type_of
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot

NetworkState = Mapping[str, Tensor]
READS_ALL_DATA = (
    "{} reads the data of one process, and here each rank has a share; measure it without ranks=, or leave it out."
)
NORM_STATS = ("reset", "lerp", "keep")


class Interpolation:
    """The paths from a snapshot's model to other states of it, on the snapshot's data or held-out data.

    Everything is measured in evaluation mode. `norm_stats` says how BatchNorm statistics follow: "reset"
    measures them again on the data at every point, "lerp" interpolates them (a negative control: it is wrong
    between networks), "keep" leaves the first network's.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.start: dict[str, Tensor] = _entries(snapshot.model)
        self.has_batch_norm = any(isinstance(m, BATCH_NORMS) for m in snapshot.model.modules())
        self._copy: nn.Module | None = None

    @property
    def copy(self) -> nn.Module:
        """The one working copy."""
        if self._copy is None:
            try:
                self._copy = copy.deepcopy(self.snapshot.model).requires_grad_(False)
            except RuntimeError as error:
                raise Unsupported(
                    f"The model cannot be copied ({first_line(error)}), and interpolation overwrites a "
                    "copy; give a model that copy.deepcopy can copy."
                ) from error
        return self._copy

    @property
    def held_out(self) -> Snapshot | None:
        """The snapshot on held-out data, where there is such data."""
        return self.snapshot.held_out if self.snapshot.has_held_out else None

    def starting_at(self, start: NetworkState) -> Interpolation:
        """The paths from another state (as `fit` gives it), with the same working copy."""
        other = copy.copy(self)
        other.start = dict(start)
        other._copy = self.copy
        return other

    def refuse_shares(self, what: str) -> None:
        """Raise Unsupported where the data are split over ranks, for `what` reads those of one process."""
        if self.snapshot.ranks is not None:
            raise Unsupported(READS_ALL_DATA.format(what))

    @property
    def symmetries(self) -> Symmetries:
        """The model's permutation groups, found and checked when first asked for."""
        return self.snapshot.quantity("symmetries")

    @property
    def linear_symmetries(self) -> LinearSymmetries:
        """The model's linear symmetries beyond permutations, found and checked when first asked for."""
        return self.snapshot.quantity("linear_symmetries")

    def fit(self, other: Any) -> dict[str, Tensor]:
        """`other` (a state dict, a module, a Snapshot or a checkpoint's path) as a state that paths can lead to.

        Names that carry a wrapper's prefix are read as those of a file are. Raises InvalidInput, in one sentence
        with the first difference, where it is not of this network, and CheckpointError where a file cannot be read
        or does not fit.
        """
        self.snapshot.refuse_a_later_moment()  # the start is the model itself, not a copy of it
        is_file = isinstance(other, (str, os.PathLike))
        state = self._read(load_state(os.fspath(other))) if is_file else self._fitting(state_of(other))
        check_ties(state, _ties(self.snapshot.model))
        return {n: taken_over(n, state[n], t) for n, t in self.start.items()}

    def _fitting(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state as it is, or under the names of the model."""
        try:
            check_states_fit(_without_ties(self.snapshot.model), state, names=("the model", "other"))
        except InvalidInput:
            try:
                return self._read(as_checkpoint(state, "other"))
            except CheckpointError:
                pass
            raise
        return state

    def _read(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        model = copy.deepcopy(self.snapshot.model)
        load_into(model, checkpoint)
        return state_of(model)

    def profile(
        self,
        end: NetworkState,
        alphas: Sequence[float],
        *,
        start: NetworkState | None = None,
        refine: int = 0,
        norm_stats: str = "reset",
        held_out: bool = False,
        write: Callable[[nn.Module, float], None] | None = None,
        around: Callable[[float], Any] = lambda alpha: nullcontext(),
    ) -> Profile:
        """Losses and errors at `alphas` (0 and 1 are added) and at `refine` rounds of midpoints at the peak.

        end: the state at a = 1; start: at a = 0, the snapshot's own if not given. write: puts the point `alpha`
        into the working copy (the default is the straight line). around: a context to evaluate within (REPAIR's
        corrections).
        """
        write = write or straight(start or self.start, end)
        points = Points(lambda alpha: self._scores(alpha, write, norm_stats, held_out, around))
        grid = sorted({0.0, 1.0, *map(float, alphas)})
        if grid[0] < 0 or grid[-1] > 1:
            raise InvalidInput(f"The grid reaches from {grid[0]} to {grid[-1]}; expected points between 0 and 1.")
        with preserved(self.copy):
            for alpha in grid:
                points.add(alpha)
            for _ in range(refine):
                for alpha in points.around_the_peak():
                    points.add(alpha)
        return points.profile()

    def evaluate(self, state: NetworkState, *, held_out: bool = False) -> Scores:
        """The scores of one state as it is, with its own BatchNorm statistics."""
        with preserved(self.copy):
            return self._scores(0.0, straight(state, state), "lerp", held_out, lambda alpha: nullcontext())

    def on_line(self, end: NetworkState, alpha: float) -> Scores:
        """The scores on the straight line to `end`, all floating entries blended."""
        with preserved(self.copy):
            return self._scores(alpha, straight(self.start, end), "lerp", False, lambda alpha: nullcontext())

    def _scores(
        self,
        alpha: float,
        write: Callable[[nn.Module, float], None],
        norm_stats: str,
        held_out: bool,
        around: Callable[[float], Any],
    ) -> Scores:
        if norm_stats not in NORM_STATS:
            raise InvalidInput(f"norm_stats is {norm_stats!r}; expected one of {', '.join(NORM_STATS)}.")
        source = self.held_out if held_out else self.snapshot
        if source is None:
            raise MissingQuantity("the snapshot has no held-out data; give held_out= with (inputs, targets).")
        with torch.no_grad():
            kept = None if norm_stats != "keep" else norm_statistics(self.start)
            write(self.copy, alpha)
            if kept is not None:
                overwrite(self.copy, kept)
            with around(alpha):
                if norm_stats == "reset" and self.has_batch_norm:
                    reset_norm_statistics(self.copy, self.snapshot.batches, self.snapshot.together)
                return score_examples(self.copy, source)


# ---- states


def _entries(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and every buffer of the state dict, detached, tied ones once."""
    kept = model.state_dict(keep_vars=True)
    named = [*model.named_parameters(), *model.named_buffers()]
    return {n: t.detach() for n, t in named if n in kept}


def _targets(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _without_ties(model: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}


def _ties(model: nn.Module) -> dict[str, str]:
    """The other names of tensors that have several -> the first."""
    first: dict[int, str] = {}
    named = model.state_dict(keep_vars=True).items()
    return {n: first[id(t)] for n, t in named if isinstance(t, Tensor) and first.setdefault(id(t), n) != n}


def overwrite(model: nn.Module, state: NetworkState) -> None:
    """Write `state`'s entries into the model in place."""
    targets = _targets(model)
    for name, value in state.items():
        targets[name].copy_(value)


def straight(start: NetworkState, end: NetworkState) -> Callable[[nn.Module, float], None]:
    """Writes (1-a) start + a end into a model: floating entries by lerp in at least float32, others start's.

    The ends are given exactly, and equal values at every a.
    """

    def write(model: nn.Module, alpha: float) -> None:
        targets = _targets(model)
        for name, a in start.items():
            _write_lerp(targets[name], a, end[name], alpha)

    return write


def _write_lerp(target: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    if not (a.is_floating_point() or a.is_complex()) or alpha == 0:
        target.copy_(a)
    elif alpha == 1:
        target.copy_(b)
    else:
        wide = a.dtype in (torch.float16, torch.bfloat16)
        between = torch.lerp(a.float(), b.float(), alpha) if wide else torch.lerp(a, b, alpha)
        target.copy_(
            torch.where(a == b, a.to(between.dtype), between)
        )  # equal infinities (a mask) have no difference


# ---- from a snapshot


def state_of(other: Any) -> dict[str, Tensor]:
    """The state dict of a Snapshot, a module, or a state dict itself."""
    found = getattr(getattr(other, "model", other), "state_dict", None)
    state = found() if found is not None else other
    if not isinstance(state, Mapping) or not all(isinstance(n, str) for n in state):
        raise InvalidInput(
            f"other is {type_of(other)}; expected a state dict, a module or a Snapshot of the same network."
        )
    tensors = {n: t for n, t in state.items() if isinstance(t, Tensor)}
    if not tensors and any(isinstance(value, Mapping) for value in state.values()):
        return {n: t for n, t in as_checkpoint(state, "other").state.items() if isinstance(t, Tensor)}
    return tensors


def interpolation(snapshot: Snapshot) -> Interpolation:
    """The paths from the snapshot's model to other states of it. Raises MissingQuantity without data."""
    _ = snapshot.batches
    return Interpolation(snapshot)


def other(snapshot: Snapshot) -> dict[str, Tensor]:
    """The whole state dict of the snapshot's second network, buffers included. Raises MissingQuantity without."""
    if snapshot.other is None:
        raise MissingQuantity("the snapshot has no second network; give it other= a state dict or a Snapshot.")
    return state_of(snapshot.other)


def ancestor(snapshot: Snapshot) -> dict[str, Tensor]:
    """The whole state dict of the snapshot's `previous` state. Raises MissingQuantity without."""
    if snapshot.previous is None:
        raise MissingQuantity("the snapshot has no earlier state; give it previous= a state dict or a Snapshot.")
    return state_of(snapshot.previous)
