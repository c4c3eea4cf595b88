"""Networks between two networks: the loss and error on a path from theta_0 to theta_1, with standard errors.

One working copy of the model is overwritten in place for every point; both models stay as they are. The
bracket L(theta_a) - (1-a) L(theta_0) - a L(theta_1) is formed example by example, so that its standard error
is the paired one: most of the spread between examples is common to all points and cancels.

Sources: Entezari et al. 2022 (arXiv:2110.06296, eq. 1) for the barrier; Frankle et al. 2020
(arXiv:1912.05671) for the error instability.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diag.errors import InvalidInput, MissingQuantity, Unsupported
from diag.quantities.batch import Batch
from diag.quantities.example_scores import Scores, score_examples
from diag.quantities.fit import check_states_fit
from diag.quantities.preserve import preserved

if TYPE_CHECKING:
    from diag.quantities.snapshot import Snapshot
    from diag.quantities.symmetries import Symmetries

State = Mapping[str, Tensor]
NORM_STATS = ("reset", "lerp", "keep")
BATCH_NORMS = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Profile:
    """What was measured along a path; k points, all arrays float64 on the CPU.

    alphas (k,), ascending, with 0 and 1. losses, errors (k,): means over the examples (errors are shares of
    wrong answers, NaN where targets are no class numbers). brackets, error_brackets (k,): excess over the
    chord; standard_errors, error_standard_errors (k,): of the brackets, paired over the examples.
    num_examples: how many.
    """

    alphas: Tensor
    losses: Tensor
    errors: Tensor
    brackets: Tensor
    standard_errors: Tensor
    error_brackets: Tensor
    error_standard_errors: Tensor
    num_examples: int

    @property
    def barrier(self) -> float:
        """max_a of the loss bracket (Entezari eq. 1); at least 0, because a = 0 is a point."""
        return float(self.brackets.max())

    @property
    def peak(self) -> int:
        """Which point the maximum is at."""
        return int(self.brackets.argmax())

    @property
    def error_barrier(self) -> float:
        """max_a of the error bracket."""
        return float(self.error_brackets.max())

    @property
    def error_standard_error(self) -> float:
        """The standard error of the error bracket at its maximum; where that is an end, of the largest inside."""
        inside = self.error_brackets.clone()
        inside[0] = inside[-1] = -math.inf
        k = int(inside.argmax()) if len(inside) > 2 and not bool(inside.isnan().any()) else 0
        return float(self.error_standard_errors[k])

    @property
    def mean_baseline_barrier(self) -> float:
        """max_a L(theta_a) - (L(theta_0) + L(theta_1)) / 2 (Git Re-Basin, Definition 2.2)."""
        return float(self.losses.max() - (self.losses[0] + self.losses[-1]) / 2)

    @property
    def instability(self) -> float:
        """max_a error(theta_a) - (error(theta_0) + error(theta_1)) / 2 (Frankle et al. 2020)."""
        return float(self.errors.max() - (self.errors[0] + self.errors[-1]) / 2)


class Interpolation:
    """The paths from a snapshot's model to other states of it, on the snapshot's data or held-out data.

    Everything is measured in evaluation mode. `norm_stats` says how BatchNorm statistics follow: "reset"
    measures them anew on the data at every point, "lerp" interpolates them (a negative control: it is wrong
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
                    f"The model cannot be copied ({str(error).splitlines()[0]}), and interpolation overwrites a "
                    "copy; give a model that copy.deepcopy can copy."
                ) from error
        return self._copy

    @property
    def held_out(self) -> Snapshot | None:
        """The snapshot on held-out data, where there is such data."""
        return None if self.snapshot._held_out is None else self.snapshot._held_out_snapshot

    def starting_at(self, start: State) -> Interpolation:
        """The paths from another state (as `fit` gives it), with the same working copy."""
        other = copy.copy(self)
        other.start = dict(start)
        other._copy = self.copy
        return other

    @property
    def symmetries(self) -> Symmetries:
        """The model's permutation groups, found and checked when first asked for."""
        return self.snapshot.quantity("symmetries")

    def fit(self, other: Any) -> dict[str, Tensor]:
        """`other` (a state dict, a module or a Snapshot) as a state that paths can lead to.

        Raises InvalidInput, in one sentence with the first difference, where it is not of this network.
        """
        state = state_of(other)
        check_states_fit(_without_ties(self.snapshot.model), state, names=("the model", "other"))
        return {n: state[n].detach().to(t.device, t.dtype) for n, t in self.start.items()}

    def profile(
        self,
        end: State,
        alphas: Sequence[float],
        *,
        start: State | None = None,
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
        points = _Points(lambda alpha: self._scores(alpha, write, norm_stats, held_out, around))
        grid = sorted({0.0, 1.0, *map(float, alphas)})
        if grid[0] < 0 or grid[-1] > 1:
            raise InvalidInput(f"The grid reaches from {grid[0]} to {grid[-1]}; expected points between 0 and 1.")
        for alpha in grid:
            points.add(alpha)
        for _ in range(refine):
            for alpha in points.around_the_peak():
                points.add(alpha)
        return points.profile()

    def evaluate(self, state: State, *, held_out: bool = False) -> Scores:
        """The scores of one state as it is, with its own BatchNorm statistics."""
        return self._scores(0.0, straight(state, state), "lerp", held_out, lambda alpha: nullcontext())

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
        with preserved(self.copy), torch.no_grad():
            kept = None if norm_stats != "keep" else _norm_statistics(self.start)
            write(self.copy, alpha)
            if kept is not None:
                overwrite(self.copy, kept)
            with around(alpha):
                if norm_stats == "reset" and self.has_batch_norm:
                    reset_norm_statistics(self.copy, self.snapshot.batches)
                return score_examples(self.copy, source)


class _Points:
    """Scores at ascending alphas; of each point only sums are kept, and all examples only of the two ends."""

    def __init__(self, score: Callable[[float], Scores]) -> None:
        self.score = score
        self.ends = [score(0.0), score(1.0)]
        self.rows: dict[float, tuple[float, ...]] = {}

    def add(self, alpha: float) -> None:
        if alpha in self.rows:
            return
        scores = self.ends[int(alpha)] if alpha in (0.0, 1.0) else self.score(alpha)
        first, last = self.ends
        excess = _bracket(scores.losses, first.losses, last.losses, alpha)
        wrong = _bracket(scores.errors, first.errors, last.errors, alpha)
        paired = scores.per_example
        self.rows[alpha] = (
            float(scores.losses.mean()), float(scores.errors.mean()), float(excess.mean()),
            _standard_error(excess) if paired else math.nan, float(wrong.mean()), _standard_error(wrong),
        )  # fmt: skip

    def around_the_peak(self) -> list[float]:
        alphas = sorted(self.rows)
        k = max(range(len(alphas)), key=lambda i: self.rows[alphas[i]][2])
        neighbours = [alphas[i] for i in (k - 1, k + 1) if 0 <= i < len(alphas)]
        return [(alphas[k] + other) / 2 for other in neighbours]

    def profile(self) -> Profile:
        alphas = sorted(self.rows)
        columns = torch.tensor([self.rows[a] for a in alphas], dtype=torch.float64).T
        losses, errors, brackets, se, error_brackets, error_se = columns
        return Profile(
            torch.tensor(alphas, dtype=torch.float64), losses, errors, brackets, se, error_brackets, error_se,
            self.ends[0].size,
        )  # fmt: skip


def _bracket(values: Tensor, first: Tensor, last: Tensor, alpha: float) -> Tensor:
    if alpha in (0.0, 1.0):
        return torch.zeros_like(values) * values  # exactly 0, and NaN where there is no value
    # In this order the bracket of three equal numbers is exactly zero.
    return (values - first) - alpha * (last - first)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


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


def overwrite(model: nn.Module, state: State) -> None:
    """Write `state`'s entries into the model in place."""
    targets = _targets(model)
    for name, value in state.items():
        targets[name].copy_(value)


def straight(start: State, end: State) -> Callable[[nn.Module, float], None]:
    """Writes (1-a) start + a end into a model: floating entries by lerp in at least float32, others start's.

    torch.lerp gives the ends exactly, and equal values at every a.
    """

    def write(model: nn.Module, alpha: float) -> None:
        targets = _targets(model)
        for name, a in start.items():
            _write_lerp(targets[name], a, end[name], alpha)

    return write


def _write_lerp(target: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    if not (a.is_floating_point() or a.is_complex()):
        target.copy_(a)
    elif a.dtype in (torch.float16, torch.bfloat16):
        target.copy_(torch.lerp(a.float(), b.float(), alpha))
    else:
        torch.lerp(a, b, alpha, out=target)


# ---- BatchNorm statistics


def _norm_statistics(state: State) -> dict[str, Tensor]:
    ends = ("running_mean", "running_var", "num_batches_tracked")
    return {n: t for n, t in state.items() if n.rsplit(".", 1)[-1] in ends}


def reset_norm_statistics(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Measure BatchNorm statistics anew: the plain average over the batches in train mode (REPAIR, section 3).

    Only BatchNorm modules are put into train mode: dropout stays off. Batches of one example are left out,
    for they have no variance.
    """
    with norm_layers_in_training(model):
        for batch in batches:
            if batch.size > 1:
                batch.forward(model)


@contextmanager
def norm_layers_in_training(model: nn.Module) -> Iterator[None]:
    """BatchNorm modules average the statistics of every batch seen inside, starting from nothing."""
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    try:
        for module in norms:
            module.reset_running_stats()
            module.momentum = None
            module.train()
        yield
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
            module.eval()


# ---- from a snapshot


def state_of(other: Any) -> dict[str, Tensor]:
    """The state dict of a Snapshot, a module, or a state dict itself."""
    found = getattr(getattr(other, "model", other), "state_dict", None)
    state = found() if found is not None else other
    if not isinstance(state, Mapping) or not all(isinstance(n, str) for n in state):
        raise InvalidInput(
            f"other is a {type(other).__name__}; expected a state dict, a module or a Snapshot of the same network."
        )
    return {n: t for n, t in state.items() if isinstance(t, Tensor)}


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
