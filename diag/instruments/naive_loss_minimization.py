"""Naive loss minimisation: whether the loss falls by scaling the logits up, with the decisions as they are.

Once every training example is right, cross-entropy falls along the weights themselves. The gradient then lines up
with the weights, and the logits of a later snapshot with those of the earlier one. On separable data this is
unavoidable, in runs that generalise too, so it describes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diag.display import format_number, format_share
from diag.errors import InvalidInput
from diag.registry import GRADIENT, instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured

SOURCE = "Prieto, Barsbey, Mediano, Birdal 2025, arXiv:2501.04697 (Definition 5, Figure 5)"


@dataclass(frozen=True, kw_only=True, eq=False)
class NaiveLossMinimization(Result):
    """Cosines of the weights with minus the gradient, and of the logits with their own change; NaN: not known."""

    cosine: float = measured("cosine of all trainable weights with minus the gradient")
    null: float = measured("standard deviation of that cosine by chance, 1 / sqrt(number of weights)")
    highest: float = measured("largest cosine of one tensor")
    highest_tensor: str = measured("the tensor with the largest cosine")
    logit_cosine: float = measured(
        "cosine of the class-centred logits with their change since the earlier snapshot"
    )
    logit_growth: float = measured("length of the class-centred logits over the earlier snapshot's")
    changed: float = measured("examples whose decision differs from the earlier snapshot's", unit="share")
    cosines: dict[str, float] = measured("cosine of each tensor with minus its gradient")
    nulls: dict[str, float] = measured("standard deviation of each by chance, 1 / sqrt(numel)")
    inner_products: dict[str, float] = measured(
        "<W, dL/dW> of each tensor: the same for all layers of a network that is homogeneous in each"
    )

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        space = ""
        if not math.isnan(self.logit_cosine):
            space = (
                ", and since the earlier snapshot the logits grew by a factor of "
                f"{format_number(self.logit_growth)} along themselves with cosine "
                f"{format_number(self.logit_cosine)} while {format_share(self.changed)} of the decisions changed"
            )
        return Verdict(
            Level.DESCRIPTION,
            f"The weights and minus their gradient have a cosine of {format_number(self.cosine)} (by chance "
            f"± {format_number(self.null, 2)}), most {self.highest_tensor} with "
            f"{format_number(self.highest)}{space}; the numbers only describe.",
            advice="High cosines occur in runs that generalise as well; they matter where the training set is "
            "fitted, held-out accuracy does not rise and the softmax is close to rounding. As a control, train on "
            "with diag.perp_grad(optimizer).",
            source=SOURCE,
            confidence=Confidence.CONTESTED,
            value=self.cosine,
        )

    def plot(self, ax: Any = None) -> Any:
        """The cosine of each tensor, with what chance gives."""
        names = list(self.cosines)
        ax.barh(names, list(self.cosines.values()), height=0.6)
        ax.barh(
            names, [2 * self.nulls[n] for n in names], left=[-self.nulls[n] for n in names], height=0.9, alpha=0.3
        )
        ax.invert_yaxis()
        ax.tick_params(axis="y", labelsize=6)
        ax.set(xlabel="cosine of weights and minus gradient (shaded: chance)", ylabel="tensor", xlim=(-1.02, 1.02))


@instrument(
    source=SOURCE,
    title="Naive loss minimisation",
    kind="description",
    passes=lambda settings: GRADIENT + 2,
    why="Scaling up its outputs lowers the loss of a network without changing a single answer: the curve "
    "falls and nothing is learned.",
    formula="cos(-dL/dw, w) of every tensor; cos(z - z_before, z), z the logits centred over classes",
)
def naive_loss_minimization(
    params: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    logits: Tensor | None = None,
    previous_logits: Tensor | None = None,
) -> NaiveLossMinimization:
    """How far the gradient, and the change of the logits, lie along the weights and the logits themselves.

    params and gradient: by parameter name; a tensor whose gradient or value is zero has no cosine and is left out.
    logits and previous_logits (n, K): of the same examples now and at an earlier snapshot; both centred over
    classes, since a constant added to a row changes no softmax. Pure scaling has a logit cosine of 1 and changes no
    decision. All in float64.

    Raises InvalidInput where names or shapes do not fit. Source: Prieto et al. 2025, arXiv:2501.04697, Definition
    5; the comparison of logits is ours.
    """
    if set(params) != set(gradient) or any(params[n].shape != gradient[n].shape for n in params):
        raise InvalidInput("The gradient has other names or shapes than the parameters; give those of one model.")
    tables = {n: _products(params[n], gradient[n]) for n in params}
    known = {n: t for n, t in tables.items() if t[1] > 0 and t[2] > 0}
    cosines = {n: -t[0] / math.sqrt(t[1] * t[2]) for n, t in known.items()}
    inner, squares, slopes = (sum(t[i] for t in tables.values()) for i in range(3))
    top = max(cosines, key=lambda n: cosines[n]) if cosines else ""
    return NaiveLossMinimization(
        cosine=-inner / math.sqrt(squares * slopes) if squares * slopes > 0 else math.nan,
        null=1 / math.sqrt(sum(p.numel() for p in params.values())),
        highest=cosines.get(top, math.nan),
        highest_tensor=top,
        cosines=cosines,
        nulls={n: 1 / math.sqrt(params[n].numel()) for n in cosines},
        inner_products={n: t[0] for n, t in tables.items()},
        preconditions=(
            Precondition(
                "a gradient that is finite and not zero",
                bool(cosines) and math.isfinite(sum(cosines.values())),
                "a finite gradient is needed that is not zero in every tensor.",
            ),
        ),
        **_of_the_logits(logits, previous_logits),
    )


def _products(p: Tensor, g: Tensor) -> tuple[float, float, float]:
    p, g = p.double(), (g.to_dense() if g.is_sparse else g).double()
    return float((p * g).sum()), float(p.square().sum()), float(g.square().sum())


def _of_the_logits(now: Tensor | None, before: Tensor | None) -> dict[str, Any]:
    if now is None or before is None or now.shape != before.shape:
        return dict.fromkeys(("logit_cosine", "logit_growth", "changed"), math.nan)
    a, b = (z.double() - z.double().mean(1, keepdim=True) for z in (before, now))
    change = b - a
    sizes = float(change.norm() * a.norm())
    return {
        "logit_cosine": float((change * a).sum()) / sizes if sizes > 0 else math.nan,
        "logit_growth": float(b.norm() / a.norm()) if float(a.norm()) > 0 else math.nan,
        "changed": float((a.argmax(1) != b.argmax(1)).double().mean()),
    }
