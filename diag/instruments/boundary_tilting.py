"""Boundary tilting: how far a classifier's boundaries lean away from halfway between the class means.

For classes a and b the direction m between their means is what the nearest-centroid classifier decides by. A
boundary with normal w at an angle to m comes closer to the means by the cosine of that angle: the angle is the
tilt, and one over its cosine the adversarial strength. Tilted boundaries follow directions in which the data vary
little.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_number
from diag.errors import InvalidInput, Unsupported
from diag.linalg.geometry.class_geometry import ClassMeans
from diag.linalg.geometry.class_stream import ClassStream, row_blocks
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured

SOURCE = "Tanay, Griffin 2016, arXiv:1608.07690"
MOST_CLASSES_IN_PAIRS = 2000


@dataclass(frozen=True, kw_only=True, eq=False)
class BoundaryTilting(Result):
    """Angles and strengths of the pairs of classes in the final layer's space."""

    mean_angle: float = measured(
        "mean over pairs of the angle between normal and centroid direction", unit="degrees"
    )
    largest_angle: float = measured("the same for the most tilted pair", unit="degrees")
    median_strength: float = measured("median over pairs of 1 / cos(angle)")
    largest_strength: float = measured(
        "1 / cos(angle) of the most tilted pair", remark="infinite from 90 degrees on"
    )
    off_centre: float = measured(
        "median over pairs of how far the boundary is from halfway between the means: 0 halfway, 1 at a mean"
    )
    num_classes: int = measured("classes present in the data")
    pair: tuple[int, ...] = measured("the most tilted pair of classes")
    classes: tuple[int, ...] = measured("the class numbers, in the order of the matrices")
    angles: NDArray[numpy.float64] = measured("angle of each pair", unit="degrees", shape="(classes, classes)")
    distances: NDArray[numpy.float64] = measured(
        "distance of the mean of the row's class from its boundary with the column's",
        remark="negative: on the other side",
        shape="(classes, classes)",
    )
    half_distances: NDArray[numpy.float64] = measured("half the distance of the means", shape="(classes, classes)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        return Verdict(
            Level.DESCRIPTION,
            f"The boundaries are tilted by {format_number(self.mean_angle)} degrees on average from those of the "
            f"nearest class mean, most ({format_number(self.largest_angle)}) between {self.pair[0]} and "
            f"{self.pair[1]}, where a step to the boundary is {format_number(self.largest_strength)} times shorter "
            "than half the way between the means; the numbers only describe.",
            advice="Compare under stronger weight decay: a tilt that goes while the accuracy stays was not needed. "
            "It is of the last layer's space; what it means for the inputs depends on the layers before it.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            value=self.largest_angle,
        )

    def plot(self, ax: Any = None) -> Any:
        """The matrix of angles."""
        mesh = ax.imshow(self.angles, vmin=0, vmax=90, cmap="viridis")
        ax.figure.colorbar(mesh, ax=ax, label="tilt (degrees)")
        if len(self.classes) <= 20:
            ax.set_xticks(range(len(self.classes)), self.classes)
            ax.set_yticks(range(len(self.classes)), self.classes)
        ax.grid(False)
        ax.set(xlabel="class", ylabel="class")


@instrument(
    source=SOURCE,
    title="Boundary tilting",
    kind="description",
    why="A boundary that leans far away from halfway between the classes passes close to examples, so that "
    "changes too small to see can turn the answer.",
    formula="angle = arccos(<w_b - w_a, m_b - m_a> / (|w_b - w_a| |m_b - m_a|)), strength = 1 / cos(angle)",
)
def boundary_tilting(features: Tensor, labels: Tensor, classifier: tuple[Tensor, Tensor]) -> BoundaryTilting:
    """Angle between each pair's decision boundary and that of the nearest class mean, and 1 / cos of it.

    features (n, d): what enters the final linear layer, labels (n,) class numbers, classifier: its weight (K, d)
    and bias (K,); one row is the second of two classes. For a linear model the features are the inputs. With w =
    w_b - w_a and m the difference of the class means, angle = arccos(<w, m> / |w||m|). The two means' distances
    from the boundary add up to |m| cos(angle) wherever it lies between them, so 1 / cos(angle) is the adversarial
    strength relative to the nearest-centroid classifier: how much shorter the step to the boundary is. Float64.

    Raises InvalidInput for fewer than two classes or where the classifier does not fit, Unsupported for more than
    2,000 classes. Source: Tanay, Griffin 2016, arXiv:1608.07690 (only its abstract was read: the angle and the
    strength are our derivation).
    """
    by = _means(features, labels)
    weight, bias = _rows(classifier, by, features.shape[1])
    products = weight @ by.means.T  # <w_i, mean_j>
    own = (products + bias[:, None]).diagonal()
    # <w_i - w_j, mean_i> + c_i - c_j: how far mean i is on its own side of its boundary with j, times |w_i - w_j|
    lead = own[:, None] - (products + bias[:, None]).T
    lengths = torch.cdist(weight, weight)
    between = torch.cdist(by.means, by.means)
    cosines = ((lead + lead.T) / (lengths * between)).clamp(-1, 1)
    angles = cosines.arccos().rad2deg().fill_diagonal_(0)
    i, j = torch.triu_indices(len(by.classes), len(by.classes), 1)
    over_pairs = angles[i, j]
    worst = int(over_pairs.nan_to_num(-1).argmax())
    strengths = torch.where(cosines[i, j] > 0, 1 / cosines[i, j], math.inf)
    off = ((lead - lead.T).abs() / (lead + lead.T).abs())[i, j]
    numbers = [int(c) for c in by.classes]
    return BoundaryTilting(
        mean_angle=float(over_pairs.mean()),
        largest_angle=float(over_pairs[worst]),
        median_strength=float(strengths.median()),
        largest_strength=float(strengths[worst]),
        off_centre=float(off.median()),
        num_classes=len(numbers),
        pair=(numbers[int(i[worst])], numbers[int(j[worst])]),
        classes=tuple(numbers),
        angles=angles.cpu().numpy(),
        distances=(lead / lengths).fill_diagonal_(0).cpu().numpy(),
        half_distances=(between / 2).cpu().numpy(),
        preconditions=(_told_apart(over_pairs),),
    )


def _means(features: Tensor, labels: Tensor) -> ClassMeans:
    stream = ClassStream(labels.to(features.device).long())
    if len(stream.classes) < 2:
        raise InvalidInput("The labels hold one class; a boundary needs two.")
    if len(stream.classes) > MOST_CLASSES_IN_PAIRS:
        raise Unsupported(
            f"The labels hold {len(stream.classes):,} classes; all pairs are compared, up to "
            f"{MOST_CLASSES_IN_PAIRS:,} classes: measure on the examples of some classes."
        )
    for start, block in row_blocks(features):
        stream.add(block, start)
    return stream.means()


def _rows(classifier: Any, by: ClassMeans, width: int) -> tuple[Tensor, Tensor]:
    """The rows of the classes that are present."""
    weight, bias = (torch.as_tensor(part).detach().to(by.means) for part in classifier)
    if weight.ndim == 2 and len(weight) == 1:  # one output: the log-odds of class 1
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
    last = int(by.classes[-1])
    if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1] or last >= len(weight):
        raise InvalidInput(
            f"The classifier has a weight of shape {tuple(weight.shape)} and a bias of shape {tuple(bias.shape)}; "
            f"expected ({last + 1} or more, {width}) and one bias a row."
        )
    return weight[by.classes], bias[by.classes]


def _told_apart(angles: Tensor) -> Precondition:
    known = bool(torch.isfinite(angles).all())
    return Precondition(
        "pairs whose means and rows differ",
        known,
        "two class means or two rows of the classifier coincide.",
    )


def distance_along(decides: Any, start: Tensor, direction: Tensor, longest: float, steps: int = 60) -> float:
    """How far from `start` (d,) along a unit `direction` the decision `decides(points (n, d)) -> (n,)` changes.

    By bisection of the first of 64 even intervals up to `longest` in which it does; infinite where it does not.
    """
    first = decides(start[None])[0]
    grid = torch.linspace(0, longest, 65, dtype=start.dtype, device=start.device)
    changed = decides(start + grid[:, None] * direction) != first
    if not bool(changed.any()):
        return math.inf
    at = int(changed.int().argmax())
    low, high = float(grid[at - 1]), float(grid[at])
    for _ in itertools.repeat(None, steps):
        middle = (low + high) / 2
        low, high = (low, middle) if decides((start + middle * direction)[None])[0] != first else (middle, high)
    return (low + high) / 2
