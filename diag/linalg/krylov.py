"""The Lanczos recurrence: an orthonormal basis of a Krylov space, grown by one product at a time.

With the basis vectors as rows q_1 .. q_m of Q, A symmetric and T = Q A Q^T,

    A q_j = sum_i T_ij q_i + t_j q_(m+1),

so that the eigenpairs (theta, s) of the small T give Ritz pairs (theta, s Q) of A with the exact residual
norm |<t, s>|. T is tridiagonal until a thick restart, and arrow-headed after one. Sources: Lanczos 1950;
full reorthogonalisation with the "twice is enough" test, Daniel, Gragg, Kaufman and Stewart 1976 and
Parlett, The Symmetric Eigenvalue Problem, 6.9; thick restart, Wu and Simon 2000.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diag.errors import InvalidInput
from diag.linalg.operator import LinearOperator
from diag.linalg.reductions import dot, norm, normal, orthogonalise, rotate

# A coupling below this share of the largest is a breakdown: nothing but rounding would be followed further.
SMALLEST_COUPLING = 1e-10


class KrylovSpace:
    """A growing Lanczos basis with its projected matrix; the mutable core of every run.

    Attributes: `steps` (vectors in the basis, m), `kept` (those that came from the last thick restart),
    `blocks` (where each part of the basis that grew from a vector of its own begins), `exhausted`
    (the basis spans everything), `basis` (capacity + 1, part of the size that is held here), `projected` (capacity
    + 1 square, float64: T bordered by t), `drift` (float64: the largest norm of what should have been zero in
    Q A q_j; it measures the rounding and the asymmetry of the products).
    """

    _COUNTERS = ("steps", "kept", "blocks", "exhausted", "_settled")

    def __init__(
        self,
        operator: LinearOperator,
        capacity: int,
        generator: torch.Generator,
    ):
        self.operator = operator
        self.capacity = min(capacity, operator.size)
        self.generator = generator
        rows = min(self.capacity + 1, operator.size)
        self.basis = torch.empty(rows, operator.part_size, dtype=operator.dtype, device=operator.device)
        side = self.capacity + 1
        self.projected = torch.zeros(side, side, dtype=torch.float64, device=operator.device)
        self.drift = torch.zeros((), dtype=torch.float64, device=operator.device)
        self.steps = self.kept = self._settled = 0
        self.blocks = [0]
        self.exhausted = False

    # -- growing ---------------------------------------------------------------------------------

    def start(self, vector: Tensor | None = None) -> None:
        """Begins at `vector` (its part here), or at a Gaussian one."""
        if vector is None:
            self._set_next(self._fresh_vector(0))
            return
        length = norm(vector, self.operator.spread)
        if not 0 < length.item() < float("inf"):
            raise InvalidInput("The start vector is zero or not finite; give another, or none.")
        self._set_next(vector, 1 / length)

    def extend(self) -> None:
        """One Lanczos step: one product, one (or two) passes of reorthogonalisation; no synchronisation
        with the host on devices other than the CPU."""
        j, projected = self.steps, self.projected
        q, spread = self.basis[j], self.operator.spread
        w = self.operator.apply(q)
        projected[j, j] = dot(q, w, spread)
        found, left = orthogonalise(w, self.basis[: j + 1], *self._known_part(), spread)
        self.drift = torch.maximum(self.drift, found.norm())
        projected[j, j] += found[j]
        if self._lost_too_much(found, left):
            found, left = orthogonalise(w, self.basis[: j + 1], spread=spread)
            projected[j, j] += found[j]
        self.steps = j + 1
        if self.steps == self.operator.size:
            self.exhausted = True
        else:
            length = left.sqrt()
            projected[j, j + 1] = projected[j + 1, j] = length
            self._set_next(w, 1 / length.clamp_min(torch.finfo(w.dtype).tiny))

    def settle(self) -> Tensor:
        """The bordered T, (m + 1, m + 1) float64 on the host; a breakdown that it shows is repaired first.

        At a breakdown the basis spans an invariant subspace: the run continues from a fresh random vector,
        decoupled from the rest, which is how multiple eigenvalues come out with their multiplicity.
        """
        bordered = self._bordered()
        if not bordered.isfinite().all():
            raise InvalidInput(
                f"A product of {self.operator!r} within the first {self.steps} steps is not finite; check the "
                "loss and the parameters for NaN and overflow."
            )
        coupling = bordered.diagonal(1)[: self.operator.size - 1]
        threshold = max(10 * torch.finfo(self.operator.dtype).eps, SMALLEST_COUPLING) * bordered.abs().max()
        broken = (coupling[self._settled :] <= threshold).nonzero()
        if len(broken):
            last = self._settled + int(broken[0])
            self.drift.clamp_(min=coupling[last].item())
            self._restart_fresh(last + 1)
            bordered = self._bordered()
        self._settled = self.steps
        return bordered

    def _bordered(self) -> Tensor:
        reached = slice(self.steps + 1)
        return self.projected[reached, reached].cpu()

    def compress(self, weights: Tensor) -> None:
        """Thick restart: keeps the Ritz vectors weights (p, m) @ Q, whose Ritz values are Rayleigh quotients,
        and the vector that comes next."""
        kept, m = weights.shape
        weights = weights.to(self.projected)
        values = weights @ self.projected[:m, :m] @ weights.T
        coupling = weights @ self.projected[:m, m]
        rotate(weights, self.basis)
        self.basis[kept] = self.basis[m]
        self.projected.zero_()
        self.projected[:kept, :kept] = values.diagonal().diag()
        self.projected[:kept, kept] = self.projected[kept, :kept] = coupling
        self.steps = self.kept = self._settled = kept
        self.blocks = [0]

    # -- on disk ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as tensors and numbers."""
        return {
            "basis": self.basis[: self.steps + 1],
            "projected": self.projected,
            "drift": self.drift,
            "generator": self.generator.get_state(),
            **{name: getattr(self, name) for name in self._COUNTERS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.basis[: len(state["basis"])] = state["basis"]
        self.projected, self.drift = state["projected"], state["drift"]
        self.generator.set_state(state["generator"].cpu())
        for name in self._COUNTERS:
            setattr(self, name, state[name])

    # -- the parts -------------------------------------------------------------------------------

    def _known_part(self) -> tuple[Tensor, Tensor]:
        """The coefficients of A q_j that the recurrence gives, with the basis vectors they belong to."""
        j = self.steps
        first = 0 if j == self.kept else j - 1  # all that is coupled to q_j: the arrow, or q_(j-1)
        return self.projected[j, first : j + 1], self.basis[first : j + 1]

    def _set_next(self, vector: Tensor, factor: Tensor | float = 1.0) -> None:
        torch.mul(vector, factor, out=self.basis[self.steps])

    def _lost_too_much(self, found: Tensor, left: Tensor) -> bool:
        """Whether a pass removed more than half of the squared norm; elsewhere than on the CPU the answer
        would cost a synchronisation, so there a second pass is always made."""
        return self.basis.device.type != "cpu" or bool(found @ found > left)

    def _fresh_vector(self, count: int) -> Tensor:
        """A unit Gaussian vector orthogonal to the first `count` of the basis."""
        operator = self.operator
        drawn = operator.spread.drawn(operator.size, normal(self.generator))
        vector = drawn.to(dtype=operator.dtype, device=operator.device)
        if count:
            for _ in range(2):
                orthogonalise(vector, self.basis[:count], spread=operator.spread)
        return vector.mul_(1 / norm(vector, operator.spread))

    def _restart_fresh(self, steps: int) -> None:
        self.steps, self.exhausted = steps, False
        self.blocks.append(steps)
        self.projected[steps:, :] = 0
        self.projected[:, steps:] = 0
        self._set_next(self._fresh_vector(steps))
