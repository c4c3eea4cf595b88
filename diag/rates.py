"""How often each check was right and wrong, as counted by `scripts/calibrate` on programs that chose no threshold.

`scripts/calibrate --page` writes the counts (`rates.json`) together with the documentation's page.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources
from typing import TypedDict

from diag.result import OUR_CHOICE, Verdict


class Rates(TypedDict):
    """Counts of one check: trainings broken in a way that it names, those in which it named it; sound trainings,
    those in which it found something."""

    broken: int
    named: int
    sound: int
    disturbed: int


@functools.cache
def rates() -> dict[str, Rates]:
    """The counts of every check that was counted, by its name."""
    found: dict[str, Rates] = json.loads(resources.files("diag").joinpath("rates.json").read_text())
    return found


def with_rates(check: str, verdict: Verdict) -> Verdict:
    """The verdict with the counted rates as its threshold's source, where the threshold is ours and was counted."""
    counted = rates().get(check)
    if verdict.threshold_source != OUR_CHOICE or counted is None or not counted["named"]:
        return verdict
    counted_as = (
        f"our choice, calibrated: the cause named in {counted['named']} of {counted['broken']} broken trainings of "
        f"its kinds, something said in {counted['disturbed']} of {counted['sound']} sound ones"
    )
    return dataclasses.replace(verdict, threshold_source=counted_as)
