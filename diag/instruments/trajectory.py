"""How far a network's answers move in the space of functions: from one step to the next, and along its trajectory.

Sharpness-aware training uses two such distances: TRAM takes the divergence of the last step's outputs from the
current ones as the radius within which it looks for sharp directions, and SAF adds to the loss the divergence of
the current outputs, softened by a temperature, from those some epochs before. Neither says by itself whether a
network generalises, so they describe.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_number, format_share
from diag.linalg.reductions import ELEMENTS_AT_ONCE
from diag.linalg.student import error_of_mean
from diag.ranges import Count, Positive
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured

SOURCE = "Du et al. 2022, arXiv:2205.14083 (SAF); Sherborne et al. 2023, arXiv:2310.03646 (TRAM)"
TEMPERATURE = 5.0  # SAF's
KEPT_NUMBERS = 1 << 16  # of the logits that a result keeps, to be compared with later ones


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory(Result):
    """Divergences of an earlier snapshot's answers from the current ones; NaN without an earlier one."""

    trust_distance: float = measured("mean KL(p_earlier || p_now) of the answers: TRAM's distance", unit="nats")
    trust_distance_standard_error: float = measured("standard error of that mean over examples", unit="nats")
    trajectory_loss: float = measured(
        "the same with all logits divided by the temperature: SAF's trajectory loss without its weight", unit="nats"
    )
    trajectory_loss_standard_error: float = measured("standard error of that mean over examples", unit="nats")
    changed: float = measured("examples whose decision differs from the earlier snapshot's", unit="share")
    kept: NDArray[numpy.float32] = measured(
        "logits of the first examples, to be compared with later ones", shape="(kept examples, classes)"
    )

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        return self._described(
            f"Since the earlier snapshot the answers moved by {format_number(self.trust_distance)} nats a row, by "
            f"{format_number(self.trajectory_loss)} at a temperature of "
            f"{format_number(self.setting('temperature'))}, and {format_share(self.changed)} of the "
            f"decisions changed"
        )

    def _described(self, found: str) -> Verdict:
        return Verdict(
            Level.DESCRIPTION,
            f"{found}; the numbers only describe.",
            advice="Compare runs of one architecture on the same examples. As parts of an objective they are "
            "TRAM's radius and SAF's penalty; how large they should be no paper says.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            value=self.trajectory_loss,
        )

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """SAF's trajectory loss between measurements: the last step's and the largest one."""
        found = trajectory_losses(series)
        if not found:
            return series[-1][1].verdict()
        (began, ended, last), largest = found[-1], max(found, key=lambda row: row[2])
        return series[-1][1]._described(
            f"From step {began:,} to {ended:,} the answers moved by a trajectory loss of {format_number(last)} "
            f"nats at a temperature of {format_number(series[-1][1].setting('temperature'))}, and most from step "
            f"{largest[0]:,} to {largest[1]:,}, by {format_number(largest[2])}"
        )

    def plot(self, ax: Any = None) -> Any:
        """Both distances, with two standard errors."""
        values = [self.trust_distance, self.trajectory_loss]
        errors = [2 * self.trust_distance_standard_error, 2 * self.trajectory_loss_standard_error]
        ax.bar(["as it is", "softened"], values, yerr=errors)
        ax.set(xlabel="answers", ylabel="divergence from the earlier ones (nats)")

    @classmethod
    def plot_trend(cls, ax: Any, series: Sequence[tuple[int, Self]]) -> None:
        """The trajectory loss from each measurement to the one that it is compared with."""
        found = trajectory_losses(series)
        ax.plot([ended for _, ended, _ in found], [value for _, _, value in found], marker="o", markersize=3)
        ax.set(xlabel="step", ylabel="trajectory loss (nats)")


def trajectory_losses(series: Sequence[tuple[int, Trajectory]]) -> list[tuple[int, int, float]]:
    """(earlier step, step, SAF's trajectory loss) for each measurement and the one `back` measurements before it.

    series: of a run's probe set, which is the same at every step; measurements of other rows are left out.
    """
    back = int(series[-1][1].setting("back")) if series else 1
    pairs = zip(series, itertools.islice(series, back, None), strict=False)
    return [
        (began, ended, float(_divergences(*_tensors(a, b), b.setting("temperature")).mean()))
        for (began, a), (ended, b) in pairs
        if a.kept.shape == b.kept.shape and len(a.kept)
    ]


def _tensors(earlier: Trajectory, now: Trajectory) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(numpy.array(earlier.kept)), torch.from_numpy(numpy.array(now.kept))


@instrument(
    source=SOURCE,
    title="Trajectory of the answers",
    kind="description",
    passes=lambda settings: 2.0,
    why="How far weights move says little about how far the answers do; methods that seek flat minima go by the "
    "answers.",
    formula="mean KL(softmax(z_before) || softmax(z)); mean KL(softmax(z_before / tau) || softmax(z / tau))",
)
def trajectory(
    logits: Tensor, previous_logits: Tensor | None = None, *, temperature: Positive = TEMPERATURE, back: Count = 1
) -> Trajectory:
    """How far the answers moved since an earlier snapshot, as they are (TRAM) and softened by a temperature (SAF).

    logits and previous_logits (n, K): of the same rows now and before; in a watch before the last step, so that the
    first distance is TRAM's KL(p_{t-1} || p_t). The softened one is KL(softmax(z_before / tau) || softmax(z /
    tau)), which SAF multiplies by its weight. It needs no earlier snapshot over the course of a watch: each result
    keeps logits of the probe's first rows, and `trend` compares each measurement with the one `back` measurements
    before. Means over rows in float64, in nats, with standard errors over rows. Costs one forward pass, and one
    more where there is an earlier state.

    Settings: `temperature`, 5 as in SAF; `back`, in measurements, where SAF goes back three epochs. Raises
    InvalidInput for earlier logits of other rows.
    Sources: Du et al. 2022, arXiv:2205.14083; Sherborne et al. 2023, arXiv:2310.03646; their text was not at hand,
    and the forms are those of the published code.
    """
    rows = max(1, KEPT_NUMBERS // logits.shape[1])
    kept = logits[:rows].detach().float().cpu().numpy()
    if previous_logits is None:
        return Trajectory(
            trust_distance=math.nan,
            trust_distance_standard_error=math.nan,
            trajectory_loss=math.nan,
            trajectory_loss_standard_error=math.nan,
            changed=math.nan,
            kept=kept,
            preconditions=(_earlier(False),),
        )
    before = previous_logits.to(logits.device)
    plain, soft = (_divergences(before, logits, tau) for tau in (1.0, temperature))
    return Trajectory(
        trust_distance=float(plain.mean()),
        trust_distance_standard_error=error_of_mean(plain),
        trajectory_loss=float(soft.mean()),
        trajectory_loss_standard_error=error_of_mean(soft),
        changed=float((before.argmax(1) != logits.argmax(1)).double().mean()),
        kept=kept,
        preconditions=(_earlier(True),),
    )


def _earlier(present: bool) -> Precondition:
    return Precondition(
        "an earlier snapshot",
        present,
        "there is no earlier snapshot to compare with; give the snapshot previous=, or measure twice in a watch.",
    )


def _divergences(before: Tensor, now: Tensor, temperature: float) -> Tensor:
    """KL (n,) of the softened rows in float64, block by block; a class ruled out before adds nothing."""
    step = max(1, ELEMENTS_AT_ONCE // before.shape[1])
    found = []
    for a, b in zip(before.split(step), now.split(step), strict=True):
        p, q = ((z.double() / temperature).log_softmax(1) for z in (a, b))
        found.append(torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(1).clamp_min(0))
    return torch.cat(found)
