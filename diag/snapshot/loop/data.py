"""What a loop trained on and towards, as parts of its facts (see `facts`): batches, rows, targets, losses.

Steps are counted from 1 as in the record of the run; names are those of parameters and modules of the watched
model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

OF_LOG_PROBABILITIES = ("cross_entropy", "nll_loss")
OF_BINARY_TARGETS = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
OUTLIER_ROW = 100.0  # times the size of the median row, from which on a row of the inputs is an outlier


@dataclass(frozen=True)
class BatchFacts:
    """What the batches were, by a hash of a few numbers of each training call's inputs.

    calls: how many were hashed; lag: after how many calls the same batch comes again, 0 where none does;
    steps_apart: how many optimizer steps that took; repeats: how many calls in a row were the batch of `lag` calls
    before; out_of_order: of the last batches that came again, the share that did not after whole rounds of `lag`.
    fetched: before how many of these calls a DataLoader gave a batch; loaders: epochs of DataLoaders
    begun, epochs: those of one that were followed by training calls, again: the step at which the last of these
    that was not its first began; loader_batches: batches in such an epoch; by_rows: its sampler orders rows, so
    that no two epochs have the same batches by chance. readers: workers of the last loader, where its data set is
    a stream (IterableDataset), which each of them reads; pairs: of batches that loaders gave one after the other
    and that were compared, equal_pairs those that were one batch twice. label_counts: of each class over the
    batches that were counted (`counted` of them), and distinct: classes in a batch, on average; batch_size:
    targets counted a batch on average; continued: the share of batches that have a class of the batch just before.
    empty: how many of these loaders had no batch, and of the last the rows of its data set and its batch size."""

    calls: int = 0
    lag: int = 0
    steps_apart: int = 0
    repeats: int = 0
    out_of_order: float = 0.0
    since: int = 0
    fetched: int = 0
    loaders: int = 0
    empty: int = 0
    empty_rows: int = 0
    empty_size: int = 0
    epochs: int = 0
    again: int = 0
    loader_batches: int = 0
    by_rows: bool = False
    readers: int = 0
    pairs: int = 0
    equal_pairs: int = 0
    shuffled: bool | None = None
    label_counts: Mapping[int, int] = field(default_factory=dict)
    counted: int = 0
    distinct: float = 0.0
    batch_size: float = 0.0
    continued: float = 0.0


@dataclass(frozen=True)
class OddRow:
    """A row of a batch whose largest entry is `size` times that of the median row (not finite where it is not):
    the step and its place in the batch where it was first seen, and its place in the data set, -1 where the loader
    does not show it."""

    step: int
    row: int
    index: int = -1
    size: float = math.nan


@dataclass(frozen=True)
class ContentFacts:
    """What the inputs of training held, in `batches` that were looked at, with `rows` rows: how many were a hundred
    times as large as the median one and ten times as large as any nearer to it (large) or not finite (broken), and
    the first of them that differ (odd). whole: batches of which at least half of the rows are large. Of the first
    `raw` batches that a DataLoader gave, in `alike` all rows were one."""

    batches: int = 0
    rows: int = 0
    large: int = 0
    whole: int = 0
    broken: int = 0
    odd: tuple[OddRow, ...] = ()
    raw: int = 0
    alike: int = 0


@dataclass(frozen=True)
class EvaluatedRows:
    """Of one data set whose rows a DataLoader gave to calls without gradients: how many rows, how many of them
    training has used, and whether training reads this very data set. comparable: how many lie in a data set of
    which training reads some rows; of the others nothing is known but that they are other objects."""

    rows: int
    trained: int
    of_training: bool = False
    comparable: int = 0


@dataclass(frozen=True)
class DrawFacts:
    """Which rows DataLoaders drew. In the training epoch with the most draws: draws, how many different places
    (distinct), and how many of them once; rows: of the data set that the loader's is a part of, 0 where not
    known."""

    draws: int = 0
    distinct: int = 0
    once: int = 0
    rows: int = 0
    evaluated: tuple[EvaluatedRows, ...] = ()


@dataclass
class LossFacts:
    """The calls of one loss function with inputs and targets of one kind; counted up in place, so a `Loop` has
    copies.

    function and reduction; input_shape, target_shape and their dtypes, of the last call; calls: how many.
    broadcast: both were expanded against each other. came_from: the function that made the input, read from its
    graph ("softmax", "log_softmax", "sigmoid", "" for none of these), over_axis: its axis where it has one.
    probabilities, log_probabilities: in how many of the `checked` calls every row of the input was one. factor:
    what the loss was multiplied with before backward(), None where not known; root: backward() was called on it, or
    a multiple of it. ignored, padding: the index that the loss ignores, and the padding index of the model's
    embedding whose entries are the loss's classes; padded: the share of targets that are the latter. filler: a
    number that fills the ends of sequences of targets to different lengths and stood nowhere else in the
    `filled_calls` that were looked at, None where there is none; filled: the largest share of a batch's targets
    that it was. truncated: the targets are what a DataLoader gave, cut to whole numbers, and the largest change
    that this made; constant: calls whose targets were all one number where the DataLoader gave floating ones that
    differ. lowest, highest: of the targets of binary cross-entropy; several: the largest number of classes that one
    row of zeros and ones has, where softmax is taken over them. averaged: of a loss that is not reduced, backward()
    was called on its plain mean; ascended: it enters what backward() is called on with a minus sign. weighted:
    class weights were given, class_weights: these, one for each class, and positive_weights those of the ones of
    binary cross-entropy, one for each column of the targets or one for all; ones, entries: of each such column,
    the ones among its targets, and how many targets there were, in the calls looked at. flat: the function whose
    derivative is zero that made the input ("round()"). evenness: of targets that are distributions over classes,
    the smallest mean entropy of a call over the largest that it can be, in `even_calls` calls.
    like: of the loop's own arithmetic (function ""), the function of torch that all of what backward() is called on
    amounts to, "" where that is not known."""

    function: str
    reduction: str = ""
    input_shape: tuple[int, ...] = ()
    target_shape: tuple[int, ...] = ()
    input_dtype: str = ""
    target_dtype: str = ""
    calls: int = 0
    first_step: int = 0
    broadcast: bool = False
    came_from: str = ""
    over_axis: int | None = None
    checked: int = 0
    probabilities: int = 0
    log_probabilities: int = 0
    factor: float | None = None
    root: bool = False
    ignored: int | None = None
    padding: int | None = None
    padded: float = 0.0
    filler: int | None = None
    filled: float = 0.0
    filled_calls: int = 0
    truncated: float = 0.0
    constant: int = 0
    lowest: float = 0.0
    highest: float = 0.0
    several: int = 0
    averaged: bool = False
    ascended: bool = False
    weighted: bool = False
    class_weights: tuple[float, ...] = ()
    positive_weights: tuple[float, ...] = ()
    ones: tuple[float, ...] = ()
    entries: int = 0
    flat: str = ""
    evenness: float = math.nan
    even_calls: int = 0
    label_smoothing: float = 0.0
    like: str = ""

    @property
    def of_log_probabilities(self) -> bool:
        """Whether the loss is minus the log-probability of one class among several."""
        return self.function in OF_LOG_PROBABILITIES


@dataclass(frozen=True)
class RootFacts:
    """What backward() was called on: of `looked` that could be read from their graphs, `undivided` had a term that
    is a mean over the batch with the factor one, so that the whole was not divided."""

    looked: int = 0
    undivided: int = 0


@dataclass(frozen=True)
class TargetFacts:
    """What the first losses were asked for. Of losses between numbers (`function`), `looked` of them: root mean
    square, mean and standard deviation of the targets, and the root mean square of the network's first outputs.
    Of targets that are whole numbers where the model is given sequences of tokens: `aligned` were compared, and
    shifts says in how many of them every target was the token so many positions on in the input; exchanged: in how
    many of them each row of targets was the next tokens of another row; flattened: the shapes (without classes)
    from which outputs and targets were put in one row, where these say that the order differs."""

    function: str = ""
    looked: int = 0
    size: float = math.nan
    mean: float = math.nan
    deviation: float = math.nan
    first_output: float = math.nan
    aligned: int = 0
    shifts: Mapping[int, int] = field(default_factory=dict)
    exchanged: int = 0
    flattened: tuple[tuple[int, int], tuple[int, int]] | tuple[()] = ()


@dataclass(frozen=True)
class PairFacts:
    """Backward passes before which the model was called several times: how many were looked at, and in how many of
    these a loss brings together two calls that had the same inputs and gave the same outputs; the step of the
    first."""

    looked: int = 0
    same: int = 0
    first: int = 0


@dataclass(frozen=True)
class PenaltyFacts:
    """Terms on the weights alone that are added to the loss: their sum, and the value of the loss functions beside
    it, at the steps of a few backward passes that had such a term."""

    steps: tuple[int, ...] = ()
    penalties: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
