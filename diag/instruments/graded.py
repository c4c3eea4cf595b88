"""Verdicts on one number against a threshold: what they have in common is said once."""

from __future__ import annotations

from functools import partial
from typing import Any

from diag.result import OUR_CHOICE, Verdict


def graded(
    source: str, value: float, threshold: float, threshold_source: str = OUR_CHOICE, **more: Any
) -> partial[Verdict]:
    """Makes verdicts on `value` against `threshold`: call it with a level, a sentence and what else they need."""
    return partial(
        Verdict, source=source, value=value, threshold=threshold, threshold_source=threshold_source, **more
    )
