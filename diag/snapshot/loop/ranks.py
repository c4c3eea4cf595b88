"""Facts of a training on several ranks (see `facts`), as plain data: what is equal on all of them and what is not.

The ranks are compared after steps 1, 2, 3, 10, 30, 100, ... by checksums of the bits of what they have.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """What differs on one rank from rank 0. rank; names: of the tensors that differ at the last look, in the
    model's order; since: the first look at which one differed without a look between at which none did; times: how
    many looks in a row, up to the last. size: the largest difference, in units of the tensor's own norm; NaN where
    only the bits are known to differ."""

    rank: int
    names: tuple[str, ...]
    since: int
    times: int
    size: float = float("nan")


@dataclass(frozen=True)
class RankSetting:
    """A hyperparameter of an optimizer that is not rank 0's: of which rank, its name and group, both values."""

    rank: int
    name: str
    group: int
    value: float
    first: float
    since: int = 0


@dataclass(frozen=True)
class SameRows:
    """Ranks that had the same inputs and targets at each of so many comparisons."""

    ranks: tuple[int, ...]
    looks: int


@dataclass(frozen=True)
class RankFacts:
    """world: how many ranks train; together: all of them watch. looks: the steps after which they were compared.
    replicated: parameters that each rank holds whole; the others are sharded or of unknown placement.

    parameters, buffers, gradients: for each rank that differs from rank 0, what differs; buffers are those that
    training does not change, gradients those that the optimizer was given. equal_gradients: looks at which all
    ranks had the same gradients. rows: ranks that read the same data; data_apart: ranks are meant to have data of
    their own. one_batch: all ranks hold parts of one network (tensor parallelism), and so are to read one batch;
    rows_compared: looks at which the batches of all ranks were seen; rows_equal: those of them at which they were
    the same on all ranks. examples: for each look, the examples of each rank. settings: hyperparameters that
    differ."""

    world: int = 1
    together: bool = False
    looks: tuple[int, ...] = ()
    replicated: int = 0
    parameters: tuple[Difference, ...] = ()
    buffers: tuple[Difference, ...] = ()
    gradients: tuple[Difference, ...] = ()
    equal_gradients: int = 0
    rows: tuple[SameRows, ...] = ()
    data_apart: bool = True
    one_batch: bool = False
    rows_compared: int = 0
    rows_equal: int = 0
    examples: tuple[tuple[int, ...], ...] = ()
    settings: tuple[RankSetting, ...] = ()
