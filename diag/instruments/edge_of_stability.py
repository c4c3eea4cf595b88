"""Is the learning rate above what gradient descent can bear at this curvature?

On a quadratic, gradient descent is stable exactly when the learning rate times the largest eigenvalue is at
most 2; momentum and preconditioning move that threshold. Full-batch training drives the largest eigenvalue up
to the threshold and hovers there: the edge of stability, which is no fault. Staying beyond it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from diag.display import format_number
from diag.errors import InvalidInput, MissingQuantity, Unsupported
from diag.linalg.lanczos import eigenpairs
from diag.linalg.operator import LinearOperator
from diag.linalg.trace import trace_and_norm
from diag.quantities.curvature_preconditioner import preconditioned
from diag.registry import instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured

SOURCE = "Cohen et al. 2021, arXiv:2103.00065; Cohen et al. 2022, arXiv:2207.14484"

EDGE_BEGINS, EDGE_ENDS = 0.95, 1.15  # of the threshold: where full-batch runs were seen to hover
MEASUREMENTS_FOR_A_TREND = 3

Group = Mapping[str, Any]


def descent(group: Group) -> float:
    """SGD with momentum beta, dampening d: eta lambda <= (2 + 2 beta) / (1 - d); Nesterov: / (1 + 2 beta).

    From the root -1 of r^2 - (1 + beta - eta (1 - d) lambda) r + beta, and for Nesterov of
    r^2 - (1 + beta) (1 - eta lambda) r + beta (1 - eta lambda). The first step, which torch does not dampen, does
    not matter.
    """
    beta, dampening = float(group.get("momentum", 0)), float(group.get("dampening", 0))
    if group.get("nesterov"):
        return (2 + 2 * beta) / (1 + 2 * beta)
    return (2 + 2 * beta) / (1 - dampening) if beta else 2.0


def adam(group: Group) -> float:
    """Adam's averaged momentum: eta lambda <= (2 + 2 beta1) / (1 - beta1), 38 at 0.9, of the preconditioned
    Hessian; the second moment is taken as constant."""
    beta = float(group["betas"][0])
    return (2 + 2 * beta) / (1 - beta)


def rmsprop(group: Group) -> float:
    """RMSprop's momentum is a heavy ball on the preconditioned gradient."""
    return 2 + 2 * float(group.get("momentum", 0))


# Optimizer -> eta times the largest stable eigenvalue; an optimizer that is not here gets no verdict.
THRESHOLDS: dict[str, Callable[[Group], float]] = {
    "SGD": descent,
    "Adam": adam,
    "AdamW": adam,
    "RMSprop": rmsprop,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class EdgeOfStability(Result):
    """The largest eigenvalue that the optimizer sees, beside the largest that it can bear."""

    sharpness: float = measured("largest eigenvalue of the Hessian, preconditioned where the optimizer does so")
    residual: float = measured("an eigenvalue lies within this of `sharpness`")
    threshold: float = measured("largest stable eigenvalue at this learning rate; NaN where it is not known")
    ratio: float = measured("sharpness / threshold; NaN where that is not known")
    trace: float = measured("trace of the Hessian without preconditioner")
    trace_standard_error: float = measured("standard error of the trace")
    trace_ratio: float = measured(
        "learning rate x trace / 2 x (n - B) / (B (n - 1)): above 1, no linearly stable minimum of squared loss "
        "under SGD; NaN without the batch size B"
    )
    learning_rate: float = measured("learning rate; NaN where the parameter groups differ")
    optimizer_kind: str = measured("class of the optimizer")
    full_batch: bool = measured("the batch size that was given covers all the data")
    num_products: int = measured("Hessian-vector products spent; depends on the rounding of the dtype")

    def verdict(self) -> Verdict:
        numbers = (
            f"{format_number(self.sharpness)} against a threshold of {format_number(self.threshold)} for "
            f"{self.optimizer_kind} at learning rate {format_number(self.learning_rate)}"
        )
        unmet = self.unmet()
        if unmet is not None:
            return Verdict(Level.NOT_APPLICABLE, f"No verdict: {unmet.detail}", source=SOURCE)
        slack, begins, ends = self.residual / self.threshold, *self._band()
        if self.ratio - slack > ends:
            return self._judged(
                Level.WARNING,
                f"Beyond the edge of stability: the largest eigenvalue is {numbers}, so steps overshoot.",
                advice="If the loss spikes or diverges, lower the learning rate or warm it up; one measurement in "
                "a burst may pass on its own.",
                refutation="The next measurements come back to the threshold, or a smaller learning rate gives the "
                "same curve.",
            )
        if self.ratio + slack > ends:
            return self._judged(Level.UNKNOWN, f"Near the end of the edge of stability: {numbers}.")
        if self.ratio >= begins:
            return self._judged(
                Level.OK,
                f"At the edge of stability, where full-batch training hovers: the largest eigenvalue is {numbers}.",
            )
        return self._judged(
            Level.OK,
            f"Below the edge of stability: the largest eigenvalue is {numbers}; that does not prove stability.",
        )

    def _band(self) -> tuple[float, float]:
        settings = self.provenance.settings
        return float(settings.get("edge_begins", EDGE_BEGINS)), float(settings.get("edge_ends", EDGE_ENDS))

    def _judged(self, level: Level, sentence: str, **more: Any) -> Verdict:
        return Verdict(
            level,
            sentence,
            source=SOURCE,
            confidence=Confidence.THEOREM,
            value=self.ratio,
            threshold=self._band()[1],
            threshold_source=f"2 / learning rate is a theorem; the band around it is {OUR_CHOICE}",
            **more,
        )

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """Three measurements in a row beyond the edge: persistently unstable."""
        last = series[-1][1]
        recent = series[-MEASUREMENTS_FOR_A_TREND:]
        levels = [result.verdict().level for _, result in recent]
        if len(recent) < MEASUREMENTS_FOR_A_TREND or set(levels) != {Level.WARNING}:
            return last.verdict()
        ratios = ", ".join(format_number(result.ratio) for _, result in recent)
        return last._judged(
            Level.ALARM,
            f"Linearly unstable from step {recent[0][0]:,} to {recent[-1][0]:,}: the largest eigenvalue stays "
            f"beyond its threshold ({ratios} times it).",
            advice="Lower the learning rate below the threshold divided by the largest eigenvalue.",
            refutation="The loss keeps falling over these steps on all the data.",
        )

    def plot(self, ax: Any) -> None:
        """The largest eigenvalue as a bar up to its threshold."""
        ax.barh(["largest eigenvalue"], [self.sharpness], xerr=[self.residual], color="tab:blue", height=0.4)
        if not math.isnan(self.threshold):
            ax.axvline(self.threshold, color="tab:red", label="stable up to here")
            ax.legend(fontsize=7, frameon=False)
        ax.set(xlabel="eigenvalue of the (preconditioned) Hessian", ylabel="sharpness")

    @classmethod
    def plot_trend(cls, ax: Any, series: Sequence[tuple[int, Self]]) -> None:
        """Sharpness and its threshold over the steps."""
        steps = [step for step, _ in series]
        ax.plot(steps, [r.sharpness for _, r in series], marker="o", markersize=3, label="largest eigenvalue")
        ax.plot(steps, [r.threshold for _, r in series], color="tab:red", label="stable up to here")
        ax.set(xlabel="step", ylabel="eigenvalue of the (preconditioned) Hessian")
        ax.legend(fontsize=7, frameon=False)


@instrument(source=SOURCE, title="Edge of stability")
def edge_of_stability(
    hessian: Any,
    optimizer: Any,
    *,
    batch_size: int | None = None,
    trace_probes: int = 10,
    tolerance: float = 1e-3,
    edge_begins: float = EDGE_BEGINS,
    edge_ends: float = EDGE_ENDS,
    seed: int = 0,
) -> EdgeOfStability:
    """The largest eigenvalue of the Hessian against the largest that the optimizer is stable at.

    hessian: a LinearOperator of size P of the mean loss; optimizer: its kind, settings and state (diag's
    OptimizerState). Adam, AdamW and RMSprop see the preconditioned Hessian D^(-1/2) H D^(-1/2); SGD's coupled
    weight decay is added to the eigenvalue. `batch_size` B is that of training: the theorem is about full-batch
    steps, so there is a verdict only where B covers all the n examples of the data.

    The threshold is a theorem for quadratics; the band `edge_begins` to `edge_ends` around it in which training
    hovers is our choice, uncalibrated. A ratio below 1 is necessary, not sufficient.

    Raises InvalidInput where the operator's products are not finite, and MissingQuantity where the optimizer
    has not taken a step. Sources: Cohen et al. 2021, arXiv:2103.00065 and 2022, arXiv:2207.14484; for the trace
    Mulayoff and Michaeli 2024, Eq. 16 with rank-one examples.
    """
    if batch_size is not None and batch_size < 1:
        raise InvalidInput(f"batch_size={batch_size} was given; give the number of examples in a training step.")
    rate = math.nan if optimizer.learning_rate is None else float(optimizer.learning_rate)
    seen, reason = _seen_by(optimizer, hessian)
    pairs = eigenpairs(seen, largest=1, tolerance=tolerance, seed=seed)
    same = seen is hessian
    trace = trace_and_norm(hessian, num_probes=trace_probes, deflate=pairs if same else None, seed=seed).trace
    sharpness = float(pairs.values[0]) + _coupled_decay(optimizer)
    examples = getattr(hessian, "num_examples", None)
    full = batch_size is not None and examples is not None and batch_size >= examples
    rule = THRESHOLDS.get(optimizer.kind)
    threshold = math.nan if rule is None or not rate > 0 else rule(optimizer.groups[0]) / rate
    return EdgeOfStability(
        sharpness=sharpness,
        residual=float(pairs.residuals[0]) + pairs.rounding,
        threshold=threshold,
        ratio=sharpness / threshold,
        trace=trace.value,
        trace_standard_error=trace.standard_error,
        trace_ratio=_trace_ratio(rate, trace.value, batch_size, examples),
        learning_rate=rate,
        optimizer_kind=optimizer.kind,
        full_batch=full,
        num_products=pairs.num_products + trace_probes,
        preconditions=(
            Precondition(
                "optimizer of the table", not reason and rule is not None, reason or _of_the_table(optimizer)
            ),
            Precondition(
                "one setting for all parameters",
                _is_uniform(optimizer),
                "the parameter groups differ in what the threshold depends on, such as the learning rate.",
            ),
            Precondition("positive learning rate", rate > 0, f"the learning rate is {format_number(rate)}."),
            Precondition("full-batch steps", full, _of_the_batch(batch_size, examples)),
            Precondition("converged", bool(pairs.converged.all()), "the largest eigenvalue has not converged."),
        ),
    )


def _seen_by(optimizer: Any, hessian: Any) -> tuple[LinearOperator, str]:
    """The operator whose eigenvalue decides, and why it is not known where it is not."""
    if optimizer.kind == "SGD" or optimizer.kind not in THRESHOLDS:
        return hessian, ""
    try:
        return preconditioned(hessian, optimizer.torch_optimizer), ""
    except (Unsupported, MissingQuantity) as error:
        return hessian, f"{error}"


def _coupled_decay(optimizer: Any) -> float:
    """Weight decay that SGD adds to the gradient shifts every eigenvalue by itself."""
    return float(optimizer.groups[0].get("weight_decay", 0.0)) if optimizer.kind == "SGD" else 0.0


def _is_uniform(optimizer: Any) -> bool:
    return all(group == optimizer.groups[0] for group in optimizer.groups)


def _of_the_table(optimizer: Any) -> str:
    return f"the threshold of {optimizer.kind} is not known; it is for {', '.join(THRESHOLDS)}."


def _of_the_batch(batch_size: int | None, examples: int | None) -> str:
    if batch_size is None:
        return "the theorem is about full-batch steps; give batch_size= of the training."
    return f"the theorem is about full-batch steps; a step of training sees {batch_size} of {examples} examples."


def _trace_ratio(rate: float, trace: float, batch_size: int | None, examples: int | None) -> float:
    if batch_size is None or examples is None or examples < 2:
        return math.nan
    noise = max(examples - batch_size, 0) / (batch_size * (examples - 1))
    return rate * trace * noise / 2
