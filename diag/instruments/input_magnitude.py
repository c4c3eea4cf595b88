"""Input magnitude: whether the first layer learns mainly from the examples whose inputs are large.

The gradient of a first linear layer is an output gradient times the input, so it scales with the raw
size of the input: bright, high-contrast or unnormalised examples dominate it. Nothing here has been tried on
trained networks beyond the identity itself, so it describes and gives no verdict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_number, format_share
from diag.errors import InvalidInput, MissingQuantity, layer_called, named
from diag.gradients import PerExampleGradients
from diag.instruments.opposing_signals.movement import correlation
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured

SOURCE = "Petersen et al. 2024, TrAct: Making First-layer Pre-Activations Trainable, arXiv:2410.23970"
SPREAD_OF_NORMS = 0.01  # of the log of the inputs' norms: below it they are all of one size
TOP = 0.01
MOST_COLUMNS_COMPARED = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class InputMagnitude(Result):
    """How the first layer's gradient follows the size of the inputs; NaN where all inputs have one size."""

    slope: float = measured(
        "slope of log gradient norm over log input norm", remark="1: proportional, 0: independent"
    )
    correlation: float = measured("correlation of the two logs")
    top_share: float = measured("the layer's squared gradient in the 1 % largest inputs", unit="share")
    spread: float = measured("standard deviation of the log of the inputs' norms")
    condition: float = measured(
        "largest eigenvalue of X'X over the mean of those that are not zero", remark="NaN: not measured"
    )
    zero_gradients: float = measured("examples whose gradient in the layer is exactly zero", unit="share")
    num_examples: int = measured("examples")
    layer: str = measured("the layer measured")
    input_norms: NDArray[numpy.float64] = measured("norm of each input", shape="(n,)")
    gradient_norms: NDArray[numpy.float64] = measured("norm of each example's gradient in the layer", shape="(n,)")

    def verdict(self) -> Verdict:
        unmet = self.unmet()
        found = (
            f"in {layer_called(self.layer)} the gradient norm grows as the input norm to the power "
            f"{format_number(self.slope)}, with correlation {format_number(self.correlation)}, and the 1 % "
            f"largest inputs hold {format_share(self.top_share)} of the squared gradient; what that leads to has "
            "not been tested."
        )
        return Verdict(
            Level.NOT_APPLICABLE,
            f"No verdict: {unmet.detail if unmet else found}",
            advice="Where large inputs dominate, normalise the inputs and measure again.",
            source=SOURCE,
            confidence=Confidence.ARITHMETIC,
            value=self.slope,
        )

    def plot(self, ax: Any = None) -> Any:
        """Gradient norm over input norm, one point an example."""
        ax.loglog(self.input_norms, self.gradient_norms, ".", markersize=3)
        ax.set(xlabel="norm of the input", ylabel="norm of the gradient")


@instrument(
    source=SOURCE,
    title="Input magnitude",
    kind="description",
    why="Where large inputs have the large gradients, a few bright or long examples decide where the first "
    "layer goes.",
    formula="|g_i| = |delta_i| sqrt(|x_i|^2 + 1) in a linear first layer with a bias",
)
def input_magnitude(per_example_gradients: PerExampleGradients, inputs: Any, *, layer: str = "") -> InputMagnitude:
    """How the first layer's per-example gradient norms follow the sizes of the inputs.

    per_example_gradients: n gradients at fixed weights; inputs: floating tensor (n, ...). `condition` is that of
    X'X for inputs of up to 2,048 features. Exact: a linear layer has |g_i| = |delta_i| sqrt(|x_i|^2 + 1).

    Settings: `layer`, the layer that takes the inputs; by default the first in `named_parameters()` order.

    Raises MissingQuantity where the inputs are not a floating tensor, InvalidInput for a layer that is not there.
    Source: Petersen et al. 2024, arXiv:2410.23970.
    """
    n = per_example_gradients.num_examples
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or len(inputs) != n:
        raise MissingQuantity(
            "The inputs are not one floating tensor (n, ...), so they have no magnitudes to compare; pass inputs=."
        )
    names = per_example_gradients.layers
    if layer and layer not in names:
        raise InvalidInput(f"There is no layer {layer!r}; the layers are {named(names, 8)}.")
    layer = layer or names[0]
    x = inputs.detach().cpu().double().flatten(1)
    sizes = torch.linalg.vector_norm(x, dim=1)
    squares = per_example_gradients.squared_norms_by_layer()[layer]
    seen = (sizes > 0) & (squares > 0)
    log_x, log_g = sizes[seen].log(), squares[seen].sqrt().log()
    spread = float(log_x.std()) if len(log_x) > 1 else 0.0
    varied = spread >= SPREAD_OF_NORMS
    r = correlation(log_x, log_g) if varied else math.nan
    top = sizes.argsort(descending=True)[: max(1, math.ceil(TOP * n))]
    total = float(squares.sum())
    return InputMagnitude(
        slope=r * float(log_g.std()) / spread if varied else math.nan,
        correlation=r,
        top_share=float(squares[top].sum()) / total if total > 0 else math.nan,
        spread=spread,
        condition=_condition(x),
        zero_gradients=float((squares == 0).double().mean()),
        num_examples=n,
        layer=layer,
        input_norms=sizes.numpy(),
        gradient_norms=squares.sqrt().numpy(),
        preconditions=_preconditions(len(log_x), n, layer, spread),
    )


def _preconditions(seen: int, n: int, layer: str, spread: float) -> tuple[Precondition, ...]:
    """seen: examples of n with a gradient in the layer and an input other than zero."""
    return (
        Precondition(
            "gradients in the layer",
            seen > 1,
            f"{seen} of {n:,} examples {'has' if seen == 1 else 'have'} a gradient other than zero in {layer}, so "
            "there is nothing to compare sizes with.",
        ),
        Precondition(
            "inputs of different sizes",
            spread >= SPREAD_OF_NORMS,
            f"the norms of the inputs differ by {format_share(spread)} only, too little to fit a slope.",
        ),
    )


def _condition(x: Tensor) -> float:
    if x.shape[1] > MOST_COLUMNS_COMPARED or not len(x):
        return math.nan
    eigenvalues = torch.linalg.svdvals(x).square()
    kept = eigenvalues[eigenvalues > 1e-12 * eigenvalues.max()] if float(eigenvalues.max()) > 0 else eigenvalues
    return float(kept.max() / kept.mean())
