"""Neural collapse: how far the features of each class have shrunk to their mean, and the means to a simplex.

Late in the training of a classifier the inputs h of its final layer tend to their class means (NC1), the
centred class means M to the vertices of a simplex (NC2), the classifier's rows W to those means (NC3), and its
decisions to the nearest class mean (NC4). Each number here is 0 in the limit. The global mean is always the
unweighted mean of the class means, and the within-class covariance the average over classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from diag.display import format_number, format_share
from diag.errors import InvalidInput, Unsupported
from diag.instruments.neural_collapse.fields import MeasuredCollapse
from diag.instruments.neural_collapse.judging import COLLAPSE_IS_NO_SCORE, SOURCE, verdict_on_collapse
from diag.linalg.geometry.class_geometry import (
    ClassMeans,
    deviation_angle,
    distance_normalised_variance,
    effective_rank,
    pairwise_cosines,
    simplex_distance,
    unit,
)
from diag.linalg.geometry.class_stream import streamed
from diag.linalg.softmax_rounding import in_blocks
from diag.ranges import Share, Threshold
from diag.registry import instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Verdict

TERMINAL_ACCURACY = 0.995
NC1_COLLAPSED = 0.1
NC2_COLLAPSED = 0.3
NC2_UNUSUAL = 0.8
NC4_UNUSUAL = 0.01
SNAPSHOTS_FOR_A_TREND = 3
MOST_CLASSES_MEASURED = 5000


@dataclass(frozen=True, kw_only=True, eq=False)
class NeuralCollapse(MeasuredCollapse):
    """How far features have shrunk to their class means, and these to a simplex."""

    def verdict(self) -> Verdict:
        return verdict_on_collapse(self)

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """Collapsing: NC1~, NC2 and NC3 all fall over the last three snapshots of the terminal phase."""
        last = series[-1][1].verdict()
        recent = series[-SNAPSHOTS_FOR_A_TREND:]
        terminal = all(result.unmet() is None for _, result in recent)
        if last.level is not Level.OK or len(recent) < SNAPSHOTS_FOR_A_TREND or not terminal:
            return last
        courses = {name: [getattr(result, name) for _, result in recent] for name in ("nc1_ratio", "nc2", "nc3")}
        if not all(a > b for course in courses.values() for a, b in itertools.pairwise(course)):
            return last
        parts = ", ".join(
            f"{name} {format_number(courses[key][0])} to {format_number(courses[key][-1])}"
            for key, name in (("nc1_ratio", "NC1~"), ("nc2", "NC2"), ("nc3", "NC3"))
        )
        return Verdict(
            Level.OK,
            f"The features are collapsing: from step {recent[0][0]:,} to {recent[-1][0]:,} {parts}; "
            f"{last.sentence[0].lower()}{last.sentence[1:]}",
            advice=COLLAPSE_IS_NO_SCORE,
            source=SOURCE,
            confidence=Confidence.STRONG_EMPIRICAL,
            value=last.value,
            threshold=last.threshold,
            threshold_source=OUR_CHOICE,
        )

    def plot(self, ax: Any = None) -> Any:
        """The four numbers and their variants, each 0 in the limit, with the held-out ones beside them."""
        rows = ["nc1", "nc1_ratio", "nc2", "nc2_norms", "nc2_angles", "nc3", "nc3_product", "nc4"]
        names = ["NC1", "NC1~", "NC2", "NC2 lengths", "NC2 angles", "NC3", "NC3 product", "NC4"]
        values = [getattr(self, row) for row in rows]
        ax.barh(names, values, color="tab:blue", height=0.6, label="training data")
        held = {"NC1": self.held_out_nc1, "NC4": self.held_out_nc4}
        if not math.isnan(self.held_out_nc1):
            ax.plot(list(held.values()), list(held), "D", color="tab:orange", label="held out")
        ax.invert_yaxis()
        ax.set(xlabel="distance from collapse (0 = collapsed)", ylabel="sign of neural collapse")
        ax.legend(fontsize=7, frameon=False)

    @classmethod
    def plot_trend(cls, ax: Any, series: Sequence[tuple[int, Self]]) -> None:
        """NC1, NC1~, NC2 and NC3 over the steps; grey where training accuracy is below the terminal phase."""
        steps = [step for step, _ in series]
        for key, name in (("nc1_ratio", "NC1~"), ("nc1", "NC1"), ("nc2", "NC2"), ("nc3", "NC3")):
            values = [getattr(result, key) for _, result in series]
            if not all(map(math.isnan, values)):
                ax.plot(steps, values, marker="o", markersize=3, label=name)
        begins = next((step for step, result in series if result.unmet() is None), None)
        if begins is not None:
            ax.axvline(begins, color="gray", linestyle=":", label="terminal phase begins")
        ax.set(xlabel="step", ylabel="distance from collapse", yscale="log")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7, frameon=False)


@instrument(
    source=SOURCE,
    title="Neural collapse",
    why="Features that gather at their class means are what long trainings often end in; the examples that "
    "stay away from their mean are worth a look, as hard or mislabelled ones do.",
    formula="NC1 = Tr(S_W S_B^+) / K, NC1~ = Tr S_W / Tr S_B; NC4 = share of argmax_k z_k != argmin_k |h - m_k|",
)
def neural_collapse(
    features: Tensor,
    labels: Tensor,
    classifier: tuple[Tensor, Tensor] | None = None,
    held_out_features: Tensor | None = None,
    held_out_labels: Tensor | None = None,
    logits: Tensor | None = None,
    *,
    terminal_accuracy: Share = TERMINAL_ACCURACY,
    nc1_collapsed: Threshold = NC1_COLLAPSED,
    nc2_collapsed: Threshold = NC2_COLLAPSED,
    nc2_unusual: Threshold = NC2_UNUSUAL,
    nc4_unusual: Share = NC4_UNUSUAL,
) -> NeuralCollapse:
    """How far the classes' features have shrunk to their means, and the means and classifier to a simplex.

    features (n, d): the inputs of the final linear layer on training data, without augmentation; labels (n,)
    class numbers; classifier: (weight (K, d), bias (K,)) of that layer, for NC3, NC4 and the training accuracy;
    logits (n, K), for NC4 and the accuracy where the classifier is not given. Held-out NC1 and NC4 use the class
    means of the training data. All numbers are without unit, computed in float64; angles are in degrees.

    There is a verdict only in the terminal phase (training accuracy at least `terminal_accuracy`), with at least
    two examples a class, at least K - 1 features and distinct class means. The cut-offs `nc1_collapsed`,
    `nc2_collapsed`, `nc2_unusual` and `nc4_unusual` are our choice, uncalibrated.

    Raises InvalidInput for fewer than two classes, or where classifier and features do not fit, and Unsupported
    for more than 5,000 classes, whose pairs would not fit in memory. Sources: Papyan, Han, Donoho 2020,
    arXiv:2008.08186; Tirer et al. 2022, arXiv:2210.16658 (Eq. 3); Zhu et al. 2021, arXiv:2105.02375 (NC3 by the
    product).
    """
    h, y = features, labels.to(features.device).long()
    stream = streamed(h, y)
    by = stream.finished()
    _check_classes(by.classes)
    weight, bias = _linear(classifier, h, int(by.classes[-1]))
    decided = _decisions(h, weight, bias, logits)
    accuracy = math.nan if decided is None else _share(decided == y)
    lengths, cosines = by.centred.norm(dim=1), pairwise_cosines(by.centred)
    return NeuralCollapse(
        nc1=stream.within_over_between(),
        nc1_ratio=_quotient(by.within.mean(), by.centred.square().sum() / len(by.classes)),
        nc2=simplex_distance(by.centred @ by.centred.T),
        nc4=math.nan if decided is None else _share(_nearest(h, by) != decided),
        degenerate=by.degenerate,
        nc2_norms=_quotient(lengths.std(correction=0), lengths.mean()),
        nc2_angle_spread=float(cosines.std(correction=0)),
        nc2_angles=float((cosines + 1 / (len(by.classes) - 1)).abs().mean()),
        feature_norm=stream.mean_length,
        train_accuracy=accuracy,
        num_features=h.shape[1],
        preconditions=_preconditions(accuracy, terminal_accuracy, by, h.shape[1]),
        **_of_the_means(by),
        **_of_the_classifier(weight, bias, by),
        **_held_out(held_out_features, held_out_labels, by, weight, bias),
    )


def _of_the_means(by: ClassMeans) -> dict[str, Any]:
    return {
        "cdnv": distance_normalised_variance(by),
        "effective_rank": effective_rank(by.singular),
        "num_classes": len(by.classes),
        "singular_values": by.singular.cpu().numpy(),
    }


def _check_classes(classes: Tensor) -> None:
    if len(classes) < 2:
        raise InvalidInput(f"The labels hold one class ({int(classes[0])}); neural collapse needs at least two.")
    if len(classes) > MOST_CLASSES_MEASURED:
        raise Unsupported(
            f"The labels hold {len(classes):,} classes; neural collapse compares all pairs of classes, up to "
            f"{MOST_CLASSES_MEASURED:,}: measure on the examples of some classes."
        )


def _linear(classifier: Any, h: Tensor, last_class: int) -> tuple[Tensor | None, Tensor | None]:
    if classifier is None:
        return None, None
    weight, bias = (torch.as_tensor(part).detach().to(h.device).double() for part in classifier)
    if weight.ndim != 2 or weight.shape[1] != h.shape[1] or bias.shape != weight.shape[:1]:
        raise InvalidInput(
            f"The classifier has a weight of shape {tuple(weight.shape)} and a bias of shape {tuple(bias.shape)}; "
            f"expected (classes, {h.shape[1]}) and (classes,) for features of shape {tuple(h.shape)}."
        )
    if last_class >= len(weight):
        raise InvalidInput(f"The labels go up to {last_class}; the classifier has only {len(weight)} classes.")
    return weight, bias


def _preconditions(accuracy: float, terminal: float, by: ClassMeans, features: int) -> tuple[Precondition, ...]:
    classes, fewest, known = len(by.classes), int(by.counts.min()), not math.isnan(accuracy)
    reached = accuracy >= terminal
    return (
        Precondition(
            "terminal phase of training",
            reached,
            f"the training accuracy is {format_share(accuracy)}, below the {format_share(terminal)} at which the "
            "terminal phase of training begins; the numbers only describe."
            if known
            else "the training accuracy is not known; give classifier= or logits= too.",
        ),
        Precondition(
            "at least K - 1 features",
            features >= classes - 1,
            f"there are {features} features for {classes} classes, whose simplex needs {classes - 1}.",
        ),
        Precondition(
            "at least two examples a class",
            fewest >= 2,
            "the smallest class has 1 example, which is its own mean; give more data.",
        ),
        Precondition(
            "distinct class means",
            not by.degenerate,
            "two class means coincide, so NC1 is not defined.",
        ),
    )


def _of_the_classifier(weight: Tensor | None, bias: Tensor | None, by: ClassMeans) -> dict[str, Any]:
    if weight is None or bias is None:
        return dict.fromkeys(("nc3", "nc2_classifier", "nc3_product", "bias_check", "deviation_angle"), math.nan)
    w, m = weight[by.classes], by.centred
    at_centre = w @ by.centre + bias[by.classes]
    return {
        "nc3": float((unit(w) - unit(m)).norm()),
        "nc2_classifier": simplex_distance(w @ w.T),
        "nc3_product": simplex_distance(w @ m.T),
        "bias_check": float((at_centre - at_centre.mean()).norm()),
        "deviation_angle": deviation_angle(w, m),
    }


def _held_out(
    h: Tensor | None, labels: Tensor | None, by: ClassMeans, weight: Tensor | None, bias: Tensor | None
) -> dict[str, Any]:
    """NC1 and NC4 of held-out features by the training means; examples of classes not trained on are left out."""
    nc1 = nc4 = math.nan
    if h is not None and labels is not None:
        known = torch.isin(labels.to(by.classes), by.classes)
        h, y = h.to(by.means.device)[known], labels.to(by.classes)[known]
        nc1 = streamed(h, y, by).within_over_between() if len(h) else math.nan
        decided = _decisions(h, weight, bias)
        if len(h) and decided is not None:
            nc4 = _share(_nearest(h, by) != decided)
    return {"held_out_nc1": nc1, "held_out_nc4": nc4}


def _decisions(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, logits: Tensor | None = None
) -> Tensor | None:
    if weight is None or bias is None:
        return None if logits is None else logits.argmax(1).to(h.device)
    return in_blocks(lambda rows: (rows.double() @ weight.T + bias).argmax(1), h)


def _nearest(h: Tensor, by: ClassMeans) -> Tensor:
    return in_blocks(lambda rows: by.nearest(rows.double()), h)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def _quotient(a: Tensor, b: Tensor) -> float:
    return float(a / b) if float(b) > 0 else math.nan
