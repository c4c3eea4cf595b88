"""How the targets of training's batches lie beside their inputs, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PairedFacts:
    """Of one loss that compares one target a row with what the model made of the row: scores of the dependence
    between targets and inputs, in standard deviations of what they are over all orders of the targets
    (`diag.linalg.geometry.pairing`); NaN where not known.

    function: of torch, "" for the loop's own arithmetic; number: which of its calls after a call of the model.
    rows: that were compared;
    own: the score as they stand, nearby: that of rows that lie next to one another, where the inputs are one table.
    moved: the best score when the targets of each batch are moved by `by` rows (0: turned round), on the same rows.
    in_data, own_in_data: the same for rows one behind the other in the data set (`data_by` rows on), on data_rows
    rows. across: the score of what the rows before the place `split` say of those from it on, within: the lower of
    the two parts' own scores. told_apart, early: outputs beside targets at the last looks, and at steps 30 to 130:
    the squared correlation, or the accuracy over that of the most frequent class. plain: the inputs are one tensor
    of numbers; table: a small one, as the targets are. kinds: the targets of two losses with one number of these
    are the same numbers in another order. copied: the feature of the input of which the target is an affine
    function on all of copied_rows rows, -1 where there is none among so many features. size, mean, deviation: of
    floating targets (size: root mean square); first_output: the root mean square of the first outputs."""

    function: str
    number: int = 1
    rows: int = 0
    own: float = math.nan
    nearby: float = math.nan
    moved: float = math.nan
    by: int = 0
    data_rows: int = 0
    own_in_data: float = math.nan
    in_data: float = math.nan
    data_by: int = 0
    split: int = 0
    across: float = math.nan
    within: float = math.nan
    told_apart: float = math.nan
    early: float = math.nan
    plain: bool = False
    table: bool = False
    copied: int = -1
    copied_rows: int = 0
    features: int = 0
    size: float = math.nan
    mean: float = math.nan
    deviation: float = math.nan
    first_output: float = math.nan
    kinds: int = 0
