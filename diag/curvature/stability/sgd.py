"""Can SGD with small batches stay at this point? Its own thresholds, from the curvature of the examples.

They are known for a squared loss that is fitted (every example's gradient vanishes), plain SGD and a constant
learning rate. There the Hessian of each example is its Gauss-Newton matrix G_i = s J_i^T J_i, so that products with
the Jacobian are enough. What does not hold is said. See diag/linalg/mean_square.py for the conditions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diag.curvature.examples import curvature_shares
from diag.curvature.objective import gradients, output_tensors
from diag.curvature.operators import CurvatureOperator
from diag.curvature.stability.optimizer import LinearStability
from diag.errors import DiagError
from diag.linalg.lanczos import Eigenpairs
from diag.linalg.mean_square import mean_square_threshold, noise_factor, norm_bound, scatter_bound, squared_norms
from diag.linalg.operator import LinearOperator
from diag.linalg.trace import TraceAndNorm
from diag.snapshot.batch import Batch
from diag.snapshot.optimizer import OptimizerState

MOST_ROWS = 256  # outputs of all examples together, for the exact threshold: a matrix of its square per vector
MOST_JACOBIAN_NUMBERS = 1 << 26  # in the rows of the Jacobian that are held at once
FITTED_WITHIN = 0.01  # of the spread of the outputs, by squares; our choice, uncalibrated
SAME_WITHIN = 0.05  # between the curvature of the loss and of the linearised network; our choice, uncalibrated
QUADRATIC_STEPS = (0.5, 2.0)  # at which the loss is asked whether it is quadratic, in units of the outputs' spread
QUADRATIC_WITHIN = 1e-3


@dataclass(frozen=True)
class SgdStability:
    """Learning rate over each bound; NaN where it is not known.

    scatter: equation 15. norm and its standard error: equation 16. exact: over the mean-square threshold.
    unexplained: squared residuals over the spread of the outputs. mismatch: |v^T G v / v^T H v - 1| for the top
    eigenvector v. not_squared: why the loss is not a squared loss, in a clause; the rest is then NaN. notes: what
    was left out, and why.
    """

    scatter: float = math.nan
    norm: float = math.nan
    norm_standard_error: float = math.nan
    exact: float = math.nan
    unexplained: float = math.nan
    mismatch: float = math.nan
    not_squared: str = ""
    notes: tuple[str, ...] = ()

    @property
    def fitted(self) -> bool:
        """Whether the examples are fitted well enough for G_i to stand for their Hessians."""
        return self.unexplained <= FITTED_WITHIN and self.mismatch <= SAME_WITHIN


def sgd_stability(
    hessian: CurvatureOperator,
    *,
    learning_rate: float,
    batch_size: int,
    largest: float,
    vector: Tensor,
    trace: tuple[float, float],
    norm: tuple[float, float],
    seed: int = 0,
) -> SgdStability:
    """The thresholds of plain SGD at the operator's point.

    largest, vector: of the Hessian. trace, norm: of the Hessian with their standard errors, used where the examples
    are too many for all rows of their Jacobian.
    """
    try:
        loss = SquaredLoss.of(hessian)
    except DiagError as error:
        return SgdStability(not_squared=str(error).rstrip("."))
    if isinstance(loss, str):
        return SgdStability(not_squared=loss)
    pi = noise_factor(hessian.num_examples, batch_size)
    shares = curvature_shares(hessian, vector).cpu()
    scatter = learning_rate / scatter_bound(largest, shares, pi)
    known: dict[str, Any] = {
        "scatter": scatter,
        "unexplained": loss.unexplained,
        "mismatch": abs(float(shares.mean()) / largest - 1),
    }
    count, why = _examples_to_take(hessian, loss.outputs)
    if not count:
        return SgdStability(**known, notes=(why,))
    rows = loss.scale**0.5 * jacobian_rows(hessian.subsample(count, seed) if why else hessian)
    squares = squared_norms(rows)
    if why:
        sampled = float(squares.mean()), float(squares.std()) / math.sqrt(count)
        value, spread = _norm_ratio(learning_rate, trace, norm, sampled, pi)
        return SgdStability(**known, norm=value, norm_standard_error=spread, notes=(why,))
    flat = rows.flatten(0, 1).double()
    gram = flat @ flat.T / len(rows)
    bound = norm_bound(float(gram.trace()), float(gram.square().sum()), float(squares.mean()), pi)
    exact = learning_rate / mean_square_threshold(rows, batch_size, seed=seed)
    return SgdStability(**known, norm=learning_rate / bound, norm_standard_error=0.0, exact=exact)


def _plain_sgd(stability: LinearStability, optimizer: OptimizerState, batch_size: int | None, n: int) -> bool:
    """Whether plain SGD with batches of a known size is at work."""
    return stability.plain and optimizer.kind == "SGD" and batch_size is not None and n > 1


def trace_factor(stability: LinearStability, optimizer: OptimizerState, batch_size: int | None, n: int) -> float:
    """eta pi / 2, where plain SGD with batches of B is known to be at work."""
    if batch_size is None or not _plain_sgd(stability, optimizer, batch_size, n):
        return math.nan
    return stability.learning_rate / 2 * noise_factor(n, batch_size)


def small_batches(
    hessian: LinearOperator,
    stability: LinearStability,
    optimizer: OptimizerState,
    batch_size: int | None,
    top: Eigenpairs,
    traced: TraceAndNorm,
    seed: int,
) -> SgdStability:
    """SGD's thresholds for small batches, where they are defined; weight decay is not a part of them."""
    if not isinstance(hessian, CurvatureOperator) or batch_size is None or batch_size >= hessian.num_examples:
        return SgdStability()
    plain = _plain_sgd(stability, optimizer, batch_size, hessian.num_examples)
    if not plain or stability.operator is not hessian or not float(top.values[0]) > 0:
        return SgdStability(not_squared="the optimizer is not plain SGD with one learning rate and no decay")
    if not hessian.spread.alone:
        return SgdStability(not_squared="it needs each example's curvature, which is not put together over ranks")
    assert top.vectors is not None
    trace, norm = traced.trace, traced.frobenius_norm
    return sgd_stability(
        hessian,
        learning_rate=stability.learning_rate,
        batch_size=batch_size,
        largest=float(top.values[0]),
        vector=top.vectors[0],
        trace=(trace.value, trace.standard_error),
        norm=(norm.value, norm.standard_error),
        seed=seed,
    )


@dataclass(frozen=True)
class SquaredLoss:
    """A loss scale / 2 |z_i - y_i|^2, averaged over the examples: its `scale`, how many `outputs` an example has,
    and the share of the outputs' spread that is `unexplained`."""

    scale: float
    outputs: int
    unexplained: float

    @classmethod
    def of(cls, operator: CurvatureOperator) -> SquaredLoss | str:
        """The operator's loss, or why it is not squared, in a clause: its gradient in the outputs must be linear
        in them, with one slope for all."""
        objective = operator.objective
        outputs, residuals, slopes = [], [], []
        with objective.measured():
            parameters = objective.parameters()
            generator = torch.Generator().manual_seed(0)
            for batch in objective.batches:
                found = _loss_gradient(operator, parameters, batch)
                if isinstance(found, str):
                    return found
                z, gradient = found
                spread = float(z.std()) if z.numel() > 1 and float(z.std()) > 0 else 1.0
                base = gradient(z)
                for step in QUADRATIC_STEPS:
                    d = step * spread * torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
                    change = gradient(z + d) - base
                    slope = float((change * d).sum() / (d * d).sum())
                    if not float((change - slope * d).norm()) <= QUADRATIC_WITHIN * abs(slope) * float(d.norm()):
                        return "the loss is not a squared loss"
                    if not slope > 0:
                        return "the loss is not a squared loss"
                    slopes.append(slope * batch.size)
                outputs.append(z.reshape(len(z), -1).double())
                residuals.append(
                    base.reshape(len(z), -1).double() * batch.size / slopes[-1] if slopes[-1] else base * math.inf
                )
        scale = slopes[0]
        if max(abs(s - scale) for s in slopes) > 10 * QUADRATIC_WITHIN * scale:
            return "the loss is not a squared loss with one scale for all examples"
        every = torch.cat(outputs)
        spread = float((every - every.mean(0)).square().sum())
        left = float(torch.cat(residuals).square().sum())
        return cls(scale, every.shape[1], left / spread if spread else (math.inf if left else 0.0))


def jacobian_rows(operator: CurvatureOperator) -> Tensor:
    """The Jacobian of each example's outputs (n, K, P), by one backward pass for each of them."""
    objective, rows = operator.objective, []
    like = torch.zeros((), dtype=operator.dtype, device=operator.device)
    with objective.measured():
        parameters = objective.parameters()
        for batch in objective.batches:
            for one in (batch.slice(i, i + 1) for i in range(batch.size)):
                (z,), _ = output_tensors(objective.outputs(parameters, one))
                for entry in z.flatten():
                    pieces = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
                    rows.append(objective.layout.flatten(pieces, like))
    return torch.stack(rows).view(operator.num_examples, -1, operator.size)


def _loss_gradient(operator: CurvatureOperator, parameters: list[Tensor], batch: Batch) -> Any:
    """(outputs of a batch, detached; the loss's gradient as a function of them), or why there is none."""
    objective = operator.objective
    tensors, rebuilt = output_tensors(objective.outputs(parameters, batch))
    if len(tensors) != 1 or tensors[0].shape[:1] != (batch.size,):
        return "the model's outputs are not one tensor with the examples as its first axis"

    def gradient(z: Tensor) -> Tensor:
        leaf = z.detach().requires_grad_()
        (found,) = gradients(objective.loss_of(rebuilt([leaf]), batch), [leaf], create_graph=False)
        return torch.zeros_like(leaf) if found is None else found.detach()

    return tensors[0].detach(), gradient


def _examples_to_take(hessian: CurvatureOperator, outputs: int) -> tuple[int, str]:
    """How many examples' rows can be held, and what is left out for it ("" where all can)."""
    n = hessian.num_examples
    fit = min(MOST_ROWS, MOST_JACOBIAN_NUMBERS // hessian.size) // outputs
    if fit >= n:
        return n, ""
    if fit < 2:
        return 0, (
            f"Equation 16 and the exact threshold need {outputs:,} rows of {hessian.size:,} numbers for each "
            "example, which is too much here."
        )
    return fit, (
        f"The exact threshold of SGD is left out: {n:,} examples have {n * outputs:,} outputs, and it is computed "
        f"for {MOST_ROWS} at most; the mean squared norm of the examples' curvature is of {fit} of them."
    )


def _norm_ratio(
    rate: float, trace: tuple[float, float], norm: tuple[float, float], mean_square: tuple[float, float], pi: float
) -> tuple[float, float]:
    """Learning rate over the bound of equation 16, and its standard error to first order."""
    bound = norm_bound(trace[0], norm[0] ** 2, mean_square[0], pi)
    parts = (
        trace[1] / (bound * trace[0]),
        (1 - pi) * norm[0] * norm[1] / trace[0],
        pi * mean_square[1] / (2 * trace[0]),
    )
    return rate / bound, rate * math.sqrt(sum(p * p for p in parts))
