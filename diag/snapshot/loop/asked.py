"""What a loss function is asked to bring together, as plain data: the targets' numbers, the outputs' range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

SPREADS_BY = 2.0  # times the spread of the first targets, which the batches of one data set differ by less than


@dataclass(frozen=True)
class AskedFacts:
    """The calls of one loss function of torch that were looked at.

    function, its reduction; looked: calls; first_step: of the first; targets: how many numbers were counted in all.
    low, high, mean: of these targets; binary: they are all zero or one. constant_loss: the mean loss of the best
    answer that is the same for every example (the class frequencies for classes, the share of ones for binary
    targets, the mean of each output for squared errors, the median for absolute ones; of these targets), and its
    standard error; NaN where that is not known. weighted: classes are weighted, smoothed, or the loss is a sum.
    activation: the function that made the outputs ("relu", "tanh", "clamp", "" for none that bounds them), with
    the range in which it holds them; outside: the share of targets beyond this range by more than a hundredth of
    the targets' own.
    copied: the feature of the input, by its place in the flattened example, of which the target is an affine
    function on all rows of `copied_looks` calls; -1 where there is none. rows: of these calls; features: of the
    input. outputs_a_row: numbers that the loss function gets of each example (classes, where there is one label).
    from_data: where a DataLoader gave a batch before these calls, the targets were a tensor of it.
    one_a_row: every example had one target. zeros: the share of the
    function's inputs that are exactly zero. spread_first, spread_last: standard deviations of the targets that are
    numbers, of the first three calls and of the last that was looked at; NaN for others. uncounted: classes whose
    weight is zero. counts: how often each class was asked for; of_sequences: of the places of examples, not of
    examples."""

    function: str
    reduction: str = ""
    looked: int = 0
    first_step: int = 0
    targets: int = 0
    classes: int = 0
    low: float = math.nan
    high: float = math.nan
    mean: float = math.nan
    binary: bool = False
    constant_loss: float = math.nan
    constant_error: float = math.nan
    weighted: bool = False
    activation: str = ""
    lower: float = -math.inf
    upper: float = math.inf
    outside: float = 0.0
    copied: int = -1
    copied_looks: int = 0
    rows: int = 0
    features: int = 0
    outputs_a_row: int = 0
    from_data: bool = False
    one_a_row: bool = False
    zeros: float = 0.0
    spread_first: float = math.nan
    spread_last: float = math.nan
    uncounted: tuple[int, ...] = ()
    counts: Mapping[int, int] = field(default_factory=dict)
    of_sequences: bool = False

    @property
    def moving(self) -> bool:
        """Whether the targets have come to lie much farther apart than they did at first, as those do that training
        itself makes (the values of a critic)."""
        return self.spread_last > SPREADS_BY * self.spread_first
