"""The scale of the inputs: whether they are near zero mean and unit scale, vary at all, and are alike in scale."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diag.display import format_number, format_share
from diag.errors import named
from diag.instruments.causes import Cause
from diag.instruments.network.several import may_be_data, named_inputs, varies
from diag.ranges import Share, Threshold, Times
from diag.registry import Kind, instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.loop.data import OUTLIER_ROW

SOURCE = "LeCun et al. 1998, Efficient BackProp, 4.3 (inputs of zero mean and equal scale)"
LARGE_INPUTS, SMALL_INPUTS, FEATURE_RATIO, CONSTANT_SHARE = 20.0, 0.02, 300.0, 0.65
FEWEST_EXAMPLES = 8
NO_ROWS = f"the inputs are not {FEWEST_EXAMPLES} or more rows of floating-point numbers."
GAP_TO_THE_REST = 10.0  # times the largest of the other rows
FEWEST_OF_FILL, SHARE_OF_FILL = 4, 0.01  # rows that hold one number far from all others of its feature
FILL_AWAY = 3.0  # times the range of these others
OTHERS_AT_LEAST, OTHERS_DIFFER = 24, 0.5  # rows with others, and of these the share of different numbers


@dataclass(frozen=True, kw_only=True, eq=False)
class InputScale(Result):
    """Features are the entries of one example; what is constant is left out of the ratio of scales."""

    name: str = measured("which of several inputs this is; empty: the only one", default="")

    mean: float = measured("mean of all entries")
    std: float = measured("standard deviation of all entries")
    size: float = measured("root mean square of all entries")
    constant: float = measured("features that are the same for every example", unit="share")
    largest_scale: float = measured("the largest root mean square of a feature")
    scale_ratio: float = measured("that over the median feature's")
    widest_feature: int = measured("the feature with the largest scale, by its place in the flattened example")
    non_finite: int = measured("examples with entries that are not finite")
    outliers: tuple[int, ...] = measured("examples whose size is a hundred times the median one's, or more")
    examples: int = measured("examples")
    fill_feature: int = measured("the feature that holds one number far from its others in many rows", default=-1)
    fill: float = measured("that number", default=math.nan)
    filled: int = measured("rows that hold it", default=0)
    fill_away: float = measured("how far it is from the others, in their range", default=math.nan)

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        return next(v for v in self._verdicts() if v is not None)

    def _verdicts(self) -> Iterator[Verdict]:
        yield from self._rows_that_are_wrong()
        yield from self._inputs_that_do_not_vary()
        yield from self._filled_in()
        yield from self._inputs_off_scale()
        yield Verdict(
            Level.OK,
            f"{self._inputs} have mean {format_number(self.mean)} and standard deviation "
            f"{format_number(self.std)}.",
            source=SOURCE,
        )

    @property
    def _inputs(self) -> str:
        return f"The numbers of {self.name!r}" if self.name else "The inputs"

    @property
    def _features(self) -> str:
        return f"features of {self.name!r}" if self.name else "input features"

    def _rows_that_are_wrong(self) -> Iterator[Verdict]:
        if self.non_finite:
            yield self._bad(
                Level.ALARM, Cause.DATA_NOT_FINITE,
                f"{self.non_finite:,} of {self.examples:,} inputs hold NaN or infinity.",
                "Find these rows and leave them out or fill them in; one of them is enough to break every weight.",
                float(self.non_finite), 0.0, Confidence.ARITHMETIC,
            )  # fmt: skip
        if self.outliers:
            yield self._bad(
                Level.WARNING, Cause.BATCHES_POISONED,
                f"{len(self.outliers):,} of {self.examples:,} inputs are a hundred times as large as the others or "
                f"more (rows {named(self.outliers, 5)}).",
                "Look at these rows: a wrong unit, a failed conversion, a placeholder such as 9999.",
                float(len(self.outliers)), 0.0, Confidence.ARITHMETIC,
            )  # fmt: skip

    def _inputs_that_do_not_vary(self) -> Iterator[Verdict]:
        if self.constant >= self.setting("constant"):
            what = "All inputs are the same" if self.constant == 1.0 else f"{format_share(self.constant)} of the "
            what += "" if self.constant == 1.0 else f"{self._features} are the same for every example"
            yield self._bad(
                Level.ALARM if self.constant == 1.0 else Level.WARNING, Cause.INPUTS_CONSTANT, f"{what}.",
                "Look at what the data set returns for two different rows, and at joins and fills that may have "
                "failed.",
                self.constant, self.setting("constant"), Confidence.ARITHMETIC,
            )  # fmt: skip

    def _filled_in(self) -> Iterator[Verdict]:
        if self.filled:
            yield self._bad(
                Level.WARNING, Cause.MISSING_VALUES_FILLED,
                f"Feature {self.fill_feature} is the same number, {format_number(self.fill)}, in {self.filled:,} "
                f"of {self.examples:,} rows, {format_number(self.fill_away)} times as far from all its other "
                "numbers as these lie apart, as a code for missing values (-999) does: beside it the others are "
                "nearly equal.",
                "Fill such values in with the median or mean of the others, before the scale of the feature is "
                "taken, and give the network a feature that says where they were missing.",
                self.fill_away, FILL_AWAY, Confidence.ARITHMETIC,
            )  # fmt: skip

    def _inputs_off_scale(self) -> Iterator[Verdict]:
        if self.size > self.setting("large"):
            yield self._bad(
                Level.WARNING, Cause.INPUTS_NOT_NORMALIZED,
                f"{self._inputs} are not normalised: their size is {format_number(self.size)} (mean "
                f"{format_number(self.mean)}, standard deviation {format_number(self.std)}), where about 1 is "
                "expected.",
                "Subtract the mean and divide by the standard deviation of the training data (bytes: divide by "
                "255).",
                self.size, self.setting("large"), Confidence.WEAK_EMPIRICAL,
            )  # fmt: skip
        if self.scale_ratio > self.setting("ratio"):
            yield self._bad(
                Level.WARNING, Cause.INPUTS_NOT_NORMALIZED,
                f"The {self._features} differ in scale: feature {self.widest_feature} is "
                f"{format_number(self.scale_ratio)} times as large as the median one, so that it drowns the "
                f"others.",
                "Standardise each feature on the training data.",
                self.scale_ratio, self.setting("ratio"), Confidence.WEAK_EMPIRICAL,
            )  # fmt: skip
        if self.std < self.setting("small"):
            yield self._bad(
                Level.WARNING, Cause.INPUTS_TOO_SMALL,
                f"{self._inputs} hardly vary: their standard deviation is {format_number(self.std)}, where about 1 "
                "is expected.",
                "Look for a normalisation that is done twice (dividing by 255 where the data is in [0, 1] "
                "already).",
                self.std, self.setting("small"), Confidence.WEAK_EMPIRICAL,
            )  # fmt: skip

    def _bad(
        self, level: Level, cause: Cause, sentence: str, advice: str, value: float, limit: float, sure: Confidence
    ) -> Verdict:
        return Verdict(
            level,
            sentence,
            advice=advice,
            source=SOURCE,
            confidence=sure,
            refutation="The training goes no better with inputs of zero mean and unit scale.",
            value=value,
            threshold=limit,
            threshold_source=OUR_CHOICE,
            cause=cause,
            explained_by=(cause,),  # the rows of all batches say more than those of the probe set
            step=1,
        )

    def plot(self, ax: Any = None) -> Any:
        """Mean and standard deviation of the inputs."""
        ax.bar(["mean", "standard deviation"], [self.mean, self.std])
        ax.set(xlabel="all entries", ylabel="value")


@instrument(
    source=SOURCE,
    title="Scale of the inputs",
    kind=Kind.CHECK,
    before_training="always",
    why="Inputs that are far from zero or differ in scale by orders of magnitude make the loss steep along "
    "some weights and flat along others, so that no learning rate suits all.",
)
def input_scale(
    inputs: Any,
    *,
    large: Threshold = LARGE_INPUTS,
    small: Threshold = SMALL_INPUTS,
    ratio: Times = FEATURE_RATIO,
    constant: Share = CONSTANT_SHARE,
) -> InputScale:
    """Whether the inputs are near zero mean and unit scale, vary from example to example, and are alike in scale.

    inputs: a floating tensor (n, ...), or several inputs, of which the floating one of the largest scale with at
    least two features is judged; token numbers, masks and what is by its name a label, a place, a time or a length
    are not, nor one that is the same for all examples where others vary. A feature of a table that is one number in
    four rows and a hundredth of them, three times as far from all its others as these lie apart, where at least
    half of these differ, holds a code for what is missing. `large`: root mean square of all entries;
    `small`: their standard deviation; `ratio`: scale of the largest over that of the median feature
    (of inputs with one axis of features); `constant`: share of features that never vary. Beyond each it warns.
    Raises nothing of its own.
    """
    name, inputs = _judged(inputs)
    floating = _are_rows_of_numbers(inputs)
    rows = inputs.detach().flatten(1).double() if floating else torch.zeros(1, 1, dtype=torch.float64)
    finite = rows.isfinite().all(1)
    good = rows[finite] if finite.any() else torch.zeros(1, rows.shape[1], dtype=torch.float64)
    rows_size = rows.nan_to_num(0.0, 0.0, 0.0).square().mean(1).sqrt()
    limit = OUTLIER_ROW * rows_size.median()
    few = _are_others(rows_size, limit)
    good = good[good.square().mean(1).sqrt() <= limit] if few else good
    scales = good.square().mean(0).sqrt()
    varies = good.amax(0) > good.amin(0)
    table = floating and inputs.ndim == 2
    feature, fill, filled, away = _fill(good) if table else (-1, math.nan, 0, math.nan)
    widest, ratio_found = _ratio(scales[varies], varies) if table else (0, math.nan)
    return InputScale(
        name=name,
        mean=float(good.mean()),
        std=float(good.std(correction=0)),
        size=float(good.square().mean().sqrt()),
        constant=float((~varies).double().mean()),
        largest_scale=float(scales.max()),
        scale_ratio=ratio_found,
        widest_feature=widest,
        non_finite=int((~finite).sum()),
        outliers=tuple((rows_size > limit).nonzero().flatten().tolist()) if few else (),
        examples=len(rows),
        fill_feature=feature,
        fill=fill,
        filled=filled,
        fill_away=away,
        preconditions=(Precondition("floating inputs", floating, NO_ROWS),),
    )


def _judged(inputs: Any) -> tuple[str, Tensor | None]:
    """The only input, or of several the rows of numbers with the largest entries, where there are any."""
    if isinstance(inputs, Tensor):
        return "", inputs
    known = named_inputs(inputs)
    if len(known) == 1:
        return "", next(iter(known.values()))
    rows = {n: t for n, t in known.items() if _are_rows_of_numbers(t) and t[0].numel() > 1 and may_be_data(n, t)}
    if any(varies(t) for t in known.values()):
        rows = {n: t for n, t in rows.items() if varies(t)}
    return max(rows.items(), key=lambda item: _size(item[1]), default=("", None))


def _size(rows: Tensor) -> float:
    """Mean square of the numbers, those that are not finite left out."""
    return float(rows.detach().double().nan_to_num(0.0, 0.0, 0.0).square().mean())


def _are_rows_of_numbers(inputs: Any) -> bool:
    floating = isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim > 1
    return floating and len(inputs) >= FEWEST_EXAMPLES


def _are_others(sizes: Tensor, limit: Tensor) -> bool:
    """Whether the rows above the limit are others than the rest: few, or far from all of it, as a batch is that one
    row has spoiled; else the tail is heavy."""
    large, rest = sizes[sizes > limit], sizes[sizes <= limit]
    few = len(large) <= len(sizes) // 20
    return float(limit) > 0 and (few or bool(large.min() > GAP_TO_THE_REST * rest.max()))


def _fill(rows: Tensor) -> tuple[int, float, int, float]:
    """(feature, number, rows with it, how far from all its others in their range) of the feature with one number
    that is farthest from its others; -1 and no rows where there is none."""
    n, best = len(rows), (-1, math.nan, 0, math.nan)
    ordered = rows.sort(0).values
    for end, by_distance in ((ordered[0], ordered), (ordered[-1], -ordered.flip(0))):  # the smallest or the largest
        here = (ordered == end).sum(0)
        nearest = by_distance.gather(0, here.clamp_max(n - 1)[None])[0]
        reach = by_distance[-1] - nearest
        away = (nearest - by_distance[0]) / reach
        enough = (here >= max(FEWEST_OF_FILL, SHARE_OF_FILL * n)) & (n - here >= OTHERS_AT_LEAST)
        for feature in (enough & (reach > 0) & (away >= FILL_AWAY)).nonzero().flatten().tolist():
            others, far = by_distance[here[feature] :, feature], float(away[feature])
            if len(others.unique()) >= OTHERS_DIFFER * len(others) and not far <= best[3]:
                best = (feature, float(end[feature]), int(here[feature]), far)
    return best


def _ratio(scales: Tensor, varies: Tensor) -> tuple[int, float]:
    """(the widest feature's place, its scale over the median one's)."""
    if len(scales) < 2 or float(scales.median()) == 0.0:
        return 0, math.nan
    place = int(varies.nonzero().flatten()[scales.argmax()])
    return place, float(scales.max() / scales.median())
