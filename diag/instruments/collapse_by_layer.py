"""Neural collapse at every layer: where over depth the classes separate and contract, on training and held-out
data.

Theory and small experiments have NC1 fall layer by layer; what a course over depth says about a network's quality
is not known, so it is described. Two passes over the data in float64, with memory independent of their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_number, format_share
from diag.errors import InvalidInput, MissingQuantity
from diag.linalg.geometry.class_geometry import ClassMeans, simplex_distance
from diag.linalg.geometry.class_stream import ClassStream
from diag.ranges import Threshold
from diag.registry import instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.inside.layers import LayerOutputs, as_layer_outputs

SOURCE = "Papyan, Han, Donoho 2020, arXiv:2008.08186; Tirer, Huang, Niles-Weed 2022, arXiv:2210.16658"
SEPARATED = 0.01
MOST_MEAN_NUMBERS = 1 << 26  # float64 numbers of class means that are kept, all layers together


@dataclass(frozen=True, kw_only=True, eq=False)
class CollapseByLayer(Result):
    """The layers are in the order of the forward pass; held-out numbers use the class means of the training
    data."""

    first_separated: int = measured(
        "number of the layer from which on the nearest class mean is the label's, but for few", remark="-1: none"
    )
    falling: float = measured("steps from one layer to the next at which NC1~ falls", unit="share")
    last_nc1_ratio: float = measured("NC1~ = Tr S_W / Tr S_B of the last layer")
    last_mistakes: float = measured("examples nearer to another class mean, last layer", unit="share")
    num_classes: int = measured("classes present in the data, K")
    smallest_class: int = measured("examples of the smallest class")
    largest_class: int = measured("examples of the largest class")
    layers: tuple[str, ...] = measured("the layers")
    widths: tuple[int, ...] = measured("features of each layer, positions averaged")
    nc1_ratio: NDArray[numpy.float64] = measured("NC1~ = Tr S_W / Tr S_B", shape="(layers,)")
    nc1: NDArray[numpy.float64] = measured(
        "NC1 = Tr(S_W S_B^+) / K", remark="NaN: two means coincide", shape="(layers,)"
    )
    nc2: NDArray[numpy.float64] = measured("NC2: distance of M M^T from a simplex's", shape="(layers,)")
    mistakes: NDArray[numpy.float64] = measured(
        "examples whose nearest class mean is another's", unit="share", shape="(layers,)"
    )
    held_out_nc1_ratio: NDArray[numpy.float64] = measured("NC1~ of held-out examples", shape="(layers,)")
    held_out_mistakes: NDArray[numpy.float64] = measured(
        "the same for held-out examples, by the training means", unit="share", shape="(layers,)"
    )

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        begins = self.layers[self.first_separated] if self.first_separated >= 0 else "no layer"
        held_out = self.held_out_mistakes[-1]
        more = "" if math.isnan(held_out) else f" ({format_share(held_out)} held out)"
        return Verdict(
            Level.DESCRIPTION,
            f"From {begins} on nearly every example is nearest to its own class mean; over depth the spread within "
            f"classes over that between them (NC1~) goes from {format_number(self.nc1_ratio[0])} to "
            f"{format_number(self.last_nc1_ratio)}, and in the last layer {format_share(self.last_mistakes)}{more} "
            "of the examples are nearer to another class; the numbers only describe.",
            advice="Neural collapse appears with random labels too, so it is not a score of generalisation; a "
            "course that parts between training and held-out data shows where the network fits what does not "
            "carry over.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            value=self.last_nc1_ratio,
            threshold_source=OUR_CHOICE,
        )

    def plot(self, ax: Any = None) -> Any:
        """NC1~ over depth, training and held out."""
        places = range(len(self.layers))
        ax.plot(places, self.nc1_ratio, marker="o", markersize=3, label="training data")
        if not numpy.isnan(self.held_out_nc1_ratio).all():
            ax.plot(places, self.held_out_nc1_ratio, marker="o", markersize=3, label="held out")
        ax.set_xticks(places, self.layers, rotation=45, ha="right", fontsize=6)
        ax.set(xlabel="layer", ylabel="spread within / between classes (NC1~)", yscale="log")
        ax.legend(fontsize=7, frameon=False)


@instrument(
    source=SOURCE,
    title="Neural collapse by layer",
    kind="description",
    why="It shows at which depth the classes come apart, and so which layers do the work, which could be "
    "left out or retrained, and whether that holds on new data.",
    formula="NC1 = Tr(S_W S_B^+) / K, NC1~ = Tr S_W / Tr S_B, at every layer",
)
def collapse_by_layer(
    layer_outputs: LayerOutputs | Mapping[str, Tensor],
    labels: Tensor,
    held_out_layer_outputs: LayerOutputs | Mapping[str, Tensor] | None = None,
    held_out_labels: Tensor | None = None,
    *,
    separated: Threshold = SEPARATED,
) -> CollapseByLayer:
    """NC1, NC1~, NC2 and the mistakes of the nearest class mean at every layer, on training and held-out data.

    layer_outputs: the outputs of the layers, gone through twice, or a mapping from names to features (n, d);
    labels: class numbers (n,). Features at several positions of an example are averaged; where labels are one a
    token, tokens are the examples. The within-class covariance is the average over classes and the global mean
    that of the class means, so that large classes do not decide. Held-out numbers are around the training means.

    Settings: `separated`, the share of mistakes below which a layer counts as separating the classes (our choice,
    uncalibrated). Raises InvalidInput for fewer than two classes, MissingQuantity where no layer gives a row for
    each label. Sources: Papyan, Han, Donoho 2020, arXiv:2008.08186; Tirer et al. 2022, arXiv:2210.16658.
    """
    counts = labels.unique(return_counts=True)[1]
    if len(counts) < 2:
        raise InvalidInput("The labels hold one class; neural collapse needs at least two.")
    streams = _train(as_layer_outputs(layer_outputs, labels), labels)
    held = _held_out(held_out_layer_outputs, held_out_labels, streams)
    found = {name: s.finished() for name, s in streams.items()}
    ratio = numpy.array([_ratio(by) for by in found.values()])
    mistakes = numpy.array([s.mistakes for s in streams.values()])
    return CollapseByLayer(
        first_separated=_from_where_on(mistakes <= separated),
        falling=float((numpy.diff(ratio) < 0).mean()) if len(ratio) > 1 else math.nan,
        last_nc1_ratio=ratio[-1],
        last_mistakes=mistakes[-1],
        num_classes=len(counts),
        smallest_class=int(counts.min()),
        largest_class=int(counts.max()),
        layers=tuple(found),
        widths=tuple(by.means.shape[1] for by in found.values()),
        nc1_ratio=ratio,
        nc1=numpy.array([s.within_over_between() for s in streams.values()]),
        nc2=numpy.array([simplex_distance(by.centred @ by.centred.T) for by in found.values()]),
        mistakes=mistakes,
        held_out_nc1_ratio=numpy.array([_ratio(held[n].finished()) if n in held else math.nan for n in found]),
        held_out_mistakes=numpy.array([held[n].mistakes if n in held else math.nan for n in found]),
        preconditions=(_finite(ratio),),
    )


def _train(outputs: LayerOutputs, labels: Tensor) -> dict[str, ClassStream]:
    """Both passes over the training data."""
    streams: dict[str, ClassStream] = {}
    rows: dict[str, int] = {}
    room = MOST_MEAN_NUMBERS

    def add(name: str, block: Tensor, start: int) -> None:
        nonlocal room
        if name not in streams:
            streams[name] = ClassStream(labels)
            room -= block.shape[1] * len(streams[name].classes)
        if room > 0 and start + len(block) <= len(labels):
            streams[name].add(block, start)
            rows[name] = rows.get(name, 0) + len(block)

    outputs.visit(add)
    whole = {name: s for name, s in streams.items() if rows.get(name) == len(labels)}
    if not whole:
        raise MissingQuantity(
            f"no layer gives one row of features for each of the {len(labels):,} labels; pass layer_outputs= "
            f"yourself."
        )
    for stream in whole.values():
        stream.means()
    outputs.visit(lambda name, block, start: whole[name].add_spread(block, start) if name in whole else None)
    return whole


def _held_out(
    outputs: LayerOutputs | Mapping[str, Tensor] | None, labels: Tensor | None, train: Mapping[str, ClassStream]
) -> dict[str, ClassStream]:
    if outputs is None or labels is None:
        return {}
    held = {name: ClassStream(labels, stream.by) for name, stream in train.items()}
    as_layer_outputs(outputs, labels).visit(
        lambda name, block, start: held[name].add_spread(block, start) if name in held else None
    )
    return held


def _ratio(by: ClassMeans) -> float:
    between = float(by.centred.square().sum() / len(by.classes))
    return float(by.within.mean()) / between if between > 0 else math.nan


def _from_where_on(holds: NDArray[numpy.bool_]) -> int:
    """The first place from which on it holds to the end, or -1."""
    wrong = numpy.flatnonzero(~holds)
    first = int(wrong[-1]) + 1 if len(wrong) else 0
    return first if first < len(holds) else -1


def _finite(ratio: NDArray[numpy.float64]) -> Precondition:
    known = bool(numpy.isfinite(ratio[[0, -1]]).all())
    return Precondition(
        "finite features whose class means differ",
        known,
        "the features of the first or the last layer are not finite, or their class means coincide.",
    )
