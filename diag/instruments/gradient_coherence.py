"""Gradient coherence: whether the gradients of single examples point the same way, or each its own.

For gradients g_1 ... g_m of the examples' losses at one set of weights, alpha = ||mean g||^2 / mean ||g||^2,
and m alpha is the number of examples, itself included, that a step along one example's gradient helps on
average: m where all agree, 1 where all are orthogonal, below 1 where they cancel. Late in training the values of
learnable and of random labels overlap, so a single number judges nothing; the contrast with permuted labels,
early in training, does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_number, format_share
from diag.errors import InvalidInput, named
from diag.gradients import PerExampleGradients, as_gradients
from diag.linalg.coherence import Coherence, between_groups, coherence, noise_scale, random_blocks
from diag.linalg.student import STANDARD_ERRORS
from diag.ranges import Seed, Threshold
from diag.registry import instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured

SOURCE = "Chatterjee, Zielinski 2022, arXiv:2203.10036; Chatterjee, Zielinski 2020, arXiv:2008.01217"
JACKKNIFE_BLOCKS = 10
MAX_CLASSES = 20
FIT_BELOW = 0.05
NO_VERDICT = "Compare runs only at equal m, or by the corrected value, and early in training."


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientCoherence(Result):
    """Agreement of the examples' gradients, over all layers and in each."""

    coherence: float = measured("alpha = ||mean gradient||^2 / mean ||gradient||^2")
    m_coherence: float = measured(
        "m alpha: examples that one example's step helps, itself included", unit="examples"
    )
    corrected: float = measured("alpha over pairs of different examples", remark="does not depend on m")
    standard_error: float = measured("jackknife standard error of the corrected value, over 10 blocks")
    num_examples: int = measured("examples, m")
    zero_gradients: float = measured("examples whose gradient is exactly zero", unit="share")
    noise_scale: float = measured("batch size at which noise and mean gradient are equal", unit="examples")
    mean_loss: float = measured("mean loss of the examples", remark="NaN where only gradients were given")
    coverage: float = measured("squared mean gradient in the parameters that were measured", unit="share")
    parameter_coverage: float = measured("trainable parameters that were measured", unit="share")
    permuted: float = measured(
        "corrected coherence with permuted labels, same network", remark="NaN: not asked for"
    )
    permuted_standard_error: float = measured("its jackknife standard error")
    by_layer: dict[str, float] = measured("alpha of each layer's part of the gradient")
    layer_energy: dict[str, float] = measured("each layer's part of the mean squared norm", unit="share")
    layer_standard_error: dict[str, float] = measured("jackknife standard error of each layer's corrected value")
    classes: tuple[int, ...] = measured("the classes of the matrix, in order")
    class_coherence: NDArray[numpy.float64] = measured(
        "mean product of two different gradients, one of each class, over their root mean squares",
        shape="(classes, classes)",
    )

    @property
    def ratio(self) -> float:
        """Corrected coherence over that with permuted labels, the latter at least its standard error."""
        return self.corrected / max(self.permuted, self.permuted_standard_error)

    def corrected_by_layer(self) -> dict[str, float]:
        """The corrected value of each layer: (m alpha - 1) / (m - 1)."""
        m = self.num_examples
        return {layer: (m * alpha - 1) / (m - 1) for layer, alpha in self.by_layer.items()}

    def verdict(self) -> Verdict:
        unmet = self.unmet()
        if unmet is not None:
            return unmet.verdict(SOURCE, NO_VERDICT)
        gap = self.corrected - self.permuted
        error = math.hypot(self.standard_error, self.permuted_standard_error)
        limit = STANDARD_ERRORS * error
        numbers = (
            f"{_with_error(self.corrected, self.standard_error)} against "
            f"{_with_error(self.permuted, self.permuted_standard_error)} with permuted labels (m = "
            f"{self.num_examples:,})"
        )
        if gap > limit:
            level, found = Level.OK, "The examples agree more than they would with permuted labels"
        else:
            level, found = Level.UNKNOWN, "The examples agree no more than with permuted labels, within the error"
        return Verdict(
            level,
            f"{found}: corrected coherence {numbers}.",
            advice="Measure on more examples, or look for labels that do not follow from the inputs."
            if level == Level.UNKNOWN
            else NO_VERDICT,
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            refutation="The same contrast with other permutations, or at another step early in training.",
            value=gap,
            threshold=limit,
            threshold_source=OUR_CHOICE,
        )

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """The course: when m-coherence peaked. Timing tells label types apart; heights do not."""
        if len(series) < 2:
            return series[-1][1].verdict()
        sizes = {result.num_examples for _, result in series}
        name = "m_coherence" if len(sizes) == 1 else "corrected"
        known = [(step, getattr(r, name)) for step, r in series if not math.isnan(getattr(r, name))]
        if not known:
            return series[-1][1].verdict()
        step, peak = max(known, key=lambda item: item[1])
        word = (
            "m-coherence"
            if len(sizes) == 1
            else f"Corrected coherence (of {min(sizes):,} to {max(sizes):,} examples)"
        )
        return Verdict(
            Level.NOT_APPLICABLE,
            f"{word} started at {format_number(known[0][1])}, was largest at step {step:,} "
            f"({format_number(peak)}) and ended at {format_number(known[-1][1])}, which describes the run and "
            "judges nothing.",
            advice="Compare the step of the peak with that of the same network on permuted labels: there it comes "
            "later.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            value=float(step),
        )

    def plot(self, ax: Any = None) -> Any:
        """Corrected coherence of each layer, with two standard errors; the widest layers where there are many."""
        top = sorted(self.by_layer, key=lambda layer: -self.layer_energy[layer])[:20]
        drawn_layers = [layer for layer in self.by_layer if layer in top]
        corrected = self.corrected_by_layer() if self.num_examples > 1 else dict.fromkeys(drawn_layers, math.nan)
        errors = [2 * self.layer_standard_error[layer] for layer in drawn_layers]
        ax.barh(range(len(drawn_layers)), [corrected[layer] for layer in drawn_layers], xerr=errors, height=0.6)
        ax.set_yticks(range(len(drawn_layers)), drawn_layers)
        ax.invert_yaxis()
        ax.axvline(0, color="0.5", linewidth=0.7)
        ax.set(xlabel="corrected coherence", ylabel="layer")

    @classmethod
    def plot_trend(cls, ax: Any, series: Sequence[tuple[int, Any]]) -> None:
        steps = [step for step, _ in series]
        ax.plot(steps, [r.m_coherence for _, r in series], marker="o", markersize=3)
        ax.axhline(1, color="0.5", linewidth=0.7, linestyle="--")
        if any(r.m_coherence > 0 for _, r in series):
            ax.set_yscale("log")
        ax.set(xlabel="step", ylabel="m-coherence (1: orthogonal)")


def _with_error(value: float, error: float) -> str:
    return f"{format_number(value)} ± {format_number(error, 2)}"


@instrument(
    source=SOURCE,
    title="Gradient coherence",
    why="Where examples pull the same way, one step helps them all; where each pulls its own way, the "
    "network has to learn them one by one.",
    formula="alpha = |mean g|^2 / mean |g|^2; corrected = (m alpha - 1) / (m - 1)",
)
def gradient_coherence(
    per_example_gradients: PerExampleGradients,
    labels: Tensor | None = None,
    *,
    contrast: bool = False,
    fit_below: Threshold = FIT_BELOW,
    seed: Seed = 0,
) -> GradientCoherence:
    """How far the gradients of single examples agree, over all layers and in each.

    per_example_gradients: m gradients at fixed weights (`diag.gradients`), or a floating matrix
    (m, P). labels: class numbers (m,), for the agreement within and between classes; left out where their
    number is not m, as for sequences, and beyond the 20 largest classes.

    alpha = ||mean g||^2 / mean ||g||^2; m-coherence m alpha; corrected (m alpha - 1) / (m - 1), the mean product of
    two different gradients over the mean squared norm, with a jackknife standard error over 10 random blocks. alpha
    is the sum over layers of `layer_energy` times `by_layer`. Example order never matters but for the blocks.

    Settings: `contrast=True` measures the same network with permuted labels too, which is what a verdict needs;
    `fit_below`: a mean loss under this counts as fitted, and then no verdict is given (our choice,
    uncalibrated; meant for cross-entropy in nats); `seed`: of the blocks and the permutation.

    Raises InvalidInput where the gradients are neither. Source: Chatterjee and Zielinski 2022, arXiv:2203.10036.
    """
    gradients = as_gradients(per_example_gradients)
    blocks = random_blocks(gradients.num_examples, JACKKNIFE_BLOCKS, seed)
    groups = _largest_classes(labels, gradients.num_examples)
    grams = gradients.group_gram_by_layer([*blocks, *groups.values()])
    squares = gradients.squared_norms_by_layer()
    num = len(blocks)
    layers = {name: coherence(gram[:num, :num], squares[name], blocks) for name, gram in grams.items()}
    gram, square = torch.stack(list(grams.values())).sum(0), torch.stack(list(squares.values())).sum(0)
    whole = coherence(gram[:num, :num], square, blocks)
    permuted = _permuted(gradients, seed) if contrast else None
    coverage, mean_loss = gradients.coverage, _mean_loss(gradients)
    energy = float(square.sum())
    return GradientCoherence(
        coherence=whole.alpha,
        m_coherence=whole.m_alpha,
        corrected=whole.corrected,
        standard_error=whole.standard_error,
        num_examples=whole.m,
        zero_gradients=float((square == 0).double().mean()),
        noise_scale=noise_scale(whole),
        mean_loss=mean_loss,
        coverage=coverage.squared_gradient,
        parameter_coverage=coverage.parameters,
        by_layer={name: found.alpha for name, found in layers.items()},
        layer_energy={name: float(s.sum()) / energy if energy else math.nan for name, s in squares.items()},
        layer_standard_error={name: found.standard_error for name, found in layers.items()},
        classes=tuple(groups),
        class_coherence=between_groups(gram[num:, num:], [square[rows] for rows in groups.values()]).numpy(),
        preconditions=_preconditions(whole, permuted, mean_loss, fit_below),
        notes=_notes(gradients),
        **_of_permuted_labels(permuted),
    )


def _of_permuted_labels(found: Coherence | None) -> dict[str, Any]:
    """The fields of the same network with permuted labels; NaN where that was not asked for."""
    known = (found.corrected, found.standard_error) if found else (math.nan, math.nan)
    return dict(zip(("permuted", "permuted_standard_error"), known, strict=True))


def _largest_classes(labels: Tensor | None, m: int) -> dict[int, Tensor]:
    """Class number -> its examples, for the largest classes; none where labels are not one an example."""
    if labels is None or labels.shape != (m,) or m < 2:
        return {}
    labels = labels.detach().cpu()
    values, counts = labels.unique(return_counts=True)
    kept = values[counts.argsort(descending=True, stable=True)[:MAX_CLASSES]].sort().values
    return {int(c): (labels == c).nonzero().flatten() for c in kept}


def _permuted(gradients: PerExampleGradients, seed: int) -> Coherence:
    """The coherence of the same network with permuted labels."""
    permute = getattr(gradients, "with_permuted_targets", None)
    if permute is None:
        raise InvalidInput(
            "contrast=True needs a model to measure with permuted labels, and here only gradients were given; call "
            "gradient_coherence on a Snapshot."
        )
    other = permute(seed)
    blocks = random_blocks(other.num_examples, JACKKNIFE_BLOCKS, seed)
    gram = torch.stack(list(other.group_gram_by_layer(blocks).values())).sum(0)
    return coherence(gram, torch.stack(list(other.squared_norms_by_layer().values())).sum(0), blocks)


def _mean_loss(gradients: PerExampleGradients) -> float:
    losses = getattr(gradients, "losses", None)
    return float(losses().double().mean()) if losses is not None else math.nan


def _preconditions(
    found: Coherence, permuted: Coherence | None, mean_loss: float, fit_below: float
) -> tuple[Precondition, ...]:
    described = (
        f"m-coherence is {format_number(found.m_alpha)} of at most {found.m:,} (corrected alpha "
        f"{_with_error(found.corrected, found.standard_error)})"
    )
    return (
        Precondition("at least two examples", found.m > 1, "one example agrees with itself; give at least two."),
        Precondition(
            "gradients that are not all zero",
            not math.isnan(found.alpha),
            "all gradients are exactly zero, so coherence is 0/0.",
        ),
        Precondition(
            "the contrast with permuted labels",
            permuted is not None,
            f"{described}, and a single value describes but judges nothing; set contrast=True to measure the same "
            "network with permuted labels.",
        ),
        Precondition(
            "early in training",
            not mean_loss < fit_below,
            f"the mean loss is {format_number(mean_loss)}, so the data are fitted, and then the values of all "
            f"kinds of labels overlap; {described}.",
        ),
    )


def _notes(gradients: PerExampleGradients) -> tuple[str, ...]:
    coverage = gradients.coverage
    notes = []
    if coverage.missing:
        notes.append(
            f"{len(coverage.missing)} parameters were left out; the rest holds "
            f"{format_share(coverage.squared_gradient)} of the squared mean gradient."
        )
    slow = sorted(n for n, method in coverage.methods.items() if method.one_by_one)
    if slow:
        notes.append(f"Computed one example at a time, as no closed form is known: {named(slow, 5)}.")
    return tuple(notes)
