"""What the four signs of neural collapse say of one network at one moment."""

from __future__ import annotations

import math
from typing import Any

from diag.display import format_number, format_share
from diag.instruments.neural_collapse.fields import MeasuredCollapse
from diag.result import OUR_CHOICE, Level, Verdict

SOURCE = "Papyan, Han, Donoho 2020, arXiv:2008.08186; Tirer, Huang, Niles-Weed 2022, arXiv:2210.16658"
COLLAPSE_IS_NO_SCORE = "Neural collapse appears with random labels too, so it is not a score of generalisation."


def verdict_on_collapse(result: MeasuredCollapse) -> Verdict:
    """What is unusual about the four signs, or else whether the features have collapsed."""
    unmet = result.unmet()
    if unmet is not None:
        return unmet.verdict(SOURCE)
    return _unusual(result) or _state(result)


def _unusual(result: MeasuredCollapse) -> Verdict | None:
    nc4_limit = result.setting("nc4_unusual")
    nc2_limit = result.setting("nc2_unusual")
    if result.nc4 > nc4_limit:
        found = (
            f"For {format_share(result.nc4)} of the examples the network decides for another class than the one "
            f"whose mean features are nearest (NC4), although its training accuracy is "
            f"{format_share(result.train_accuracy)}"
        )
        value, threshold = result.nc4, nc4_limit
        advice = "Look at the examples whose decision differs: their features lie nearer to another class."
    elif result.nc1 < result.setting("nc1_collapsed") and result.nc2 > nc2_limit:
        found = (
            f"The features of each class have shrunk to their mean (NC1 {format_number(result.nc1)}), but the "
            f"class means are not spread evenly, as the corners of a simplex (NC2 {format_number(result.nc2)})"
        )
        value, threshold = result.nc2, nc2_limit
        advice = "Look at the class sizes: with a few dominant classes the means of the small ones merge."
    else:
        return None
    return _judged(
        result,
        Level.DESCRIPTION,
        f"{found}.",
        advice=advice,
        value=value,
        threshold=threshold,
        refutation="Measure on the whole, class-balanced training set without augmentation.",
    )


def _state(result: MeasuredCollapse) -> Verdict:
    numbers = (
        f"NC1 {format_number(result.nc1)}, NC2 {format_number(result.nc2)}, NC3 {format_number(result.nc3)}, NC4 "
        f"{format_number(result.nc4)} at training accuracy {format_share(result.train_accuracy)}"
    )
    if not math.isnan(result.held_out_nc1):
        numbers += f"; held out NC1 {format_number(result.held_out_nc1)}, NC4 {format_number(result.held_out_nc4)}"
    word = "have collapsed to their class means" if result.is_collapsed else "have not collapsed"
    return _judged(
        result,
        Level.OK,
        f"The features {word} ({numbers}).",
        advice=COLLAPSE_IS_NO_SCORE,
        value=result.nc1,
        threshold=result.setting("nc1_collapsed"),
    )


def _judged(result: MeasuredCollapse, level: Level, sentence: str, **more: Any) -> Verdict:
    return Verdict(level, sentence, source=SOURCE, threshold_source=OUR_CHOICE, **more)
