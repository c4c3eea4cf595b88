"""The parts of the facts of a loop (see `facts`), as plain data.

Steps are counted from 1 as in the record of the run; names are those of parameters and modules of the watched
model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OF_LOG_PROBABILITIES = ("cross_entropy", "nll_loss")
OF_BINARY_TARGETS = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
BINARY = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
OUTLIER_ROW = 100.0  # times the size of the median row, from which on a row of the inputs is an outlier


@dataclass(frozen=True)
class Tally:
    """How often something happened: `times` in all, at steps `first` to `last`; `running` is how often in a row up
    to now and `longest` the longest such row."""

    times: int = 0
    first: int = 0
    last: int = 0
    running: int = 0
    longest: int = 0

    def __bool__(self) -> bool:
        return self.times > 0


@dataclass(frozen=True)
class Pattern:
    """An order of events that one or more steps had, from the model's first call after a step to its next one.

    letters: F a call of the model in training, E one without gradients, B backward (b: it did not reach the model),
    U unscaling, C clipping, S an optimizer's step (s: left out by the scaler), Z zeroing, L a scheduler's step, D a
    batch from a DataLoader. A part that repeats is written once with its number: "(DFB)4SZ"."""

    letters: str
    first: int
    last: int
    count: int


@dataclass(frozen=True)
class OptimizerFacts:
    """One optimizer that stepped, or that was zeroed or scheduled.

    groups: hyperparameters by parameter group, made_with: the same at its first step. held: names of the model's
    parameters in it; foreign: how many other tensors; stale: names of parameters that no optimizer holds and that
    have the shape of a foreign tensor here which gets no gradient. nested: its steps are taken inside another
    optimizer's. stateful: it keeps moments. looked: how many of its steps were looked at closely; what is counted
    in the following is counted in these. unzeroed: steps on a gradient that was not reset since the step before;
    partly_zeroed: those where only some were not, not_zeroed: some of these parameters. empty: steps without any
    gradient. zeroed_before: steps after the gradient of a backward pass was zeroed; before_backward: the same, and
    the model had been called in between, so that the step comes before its backward pass; late: steps between a
    call of the model and the backward pass of that call. repeated: steps without a backward pass since the last
    step, on the same gradient. doubled: steps on a gradient that another optimizer had just stepped on. lost: steps
    before which earlier backward passes were zeroed away, of `passes_lost` each. passes: backward passes that made
    up the last step's gradient. scaled: steps on gradients that still carried a scaler's scale. stale_gradients:
    parameters whose gradient was left over from the step before while others' was not. no_state: its first step in
    a run that was resumed began without moments. set_beside: hyperparameters that were set as
    attributes of the optimizer, where it reads none."""

    kind: str
    groups: tuple[Mapping[str, Any], ...] = ()
    made_with: tuple[Mapping[str, Any], ...] = ()
    held: tuple[str, ...] = ()
    foreign: int = 0
    stale: tuple[str, ...] = ()
    nested: bool = False
    stateful: bool = False
    steps: int = 0
    looked: int = 0
    first_step: int = 0
    last_step: int = 0
    unzeroed: Tally = Tally()
    partly_zeroed: Tally = Tally()
    not_zeroed: tuple[str, ...] = ()
    empty: Tally = Tally()
    zeroed_before: Tally = Tally()
    before_backward: Tally = Tally()
    late: Tally = Tally()
    repeated: Tally = Tally()
    doubled: Tally = Tally()
    lost: Tally = Tally()
    passes_lost: int = 0
    passes: int = 0
    scaled: Tally = Tally()
    stale_gradients: tuple[str, ...] = ()
    no_state: bool = False
    set_beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParameterFacts:
    """One parameter of the model as it is now.

    trainable: requires_grad, and since which step; optimizers: how many hold it (not counting nested ones); rate:
    the learning rate of its group, None where it is in none or the rate is not on the host. gradient: the first
    step at which a gradient was seen, 0 if never; missing: at how many of the looks in a row, up to now, it had
    none although an optimizer that holds it stepped. replaced: since which step it stands where another tensor
    stood. ungathered: at how many looks in a row, up to now, it had a gradient and no optimizer held it. called:
    whether its module was called in the forward pass that was looked at closely for it, None where none was;
    with_graph: whether that call's output carried a graph (False: it ran under no_grad); forgotten: it was not
    called, and no method of the module around it names it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    since: int = 0
    optimizers: int = 0
    rate: float | None = None
    gradient: int = 0
    missing: int = 0
    replaced: int = 0
    called: bool | None = None
    with_graph: bool | None = None
    forgotten: bool = False
    ungathered: int = 0


@dataclass(frozen=True)
class SchedulerFacts:
    """One learning-rate scheduler: its class, its steps, and the optimizer that it changes (an index into
    `Loop.optimizers`). horizon: after how many of its steps it has run its course, 0 where it has no end.
    before_optimizer: its first step came before any of the optimizer's. repeated: steps at which it stepped more
    than once; per_micro_batch: those at which it stepped with each backward pass. peak: the learning rate that its
    settings lead up to (the optimizer's own, or max_lr), NaN where that is not on the host. decay: what each of its
    steps multiplies the rate with, on average over many, 1 where it has another form. last_milestone: the step
    after which a schedule of milestones keeps the rate, 0 where it has another form; final: what the rate then is
    of the first."""

    kind: str
    optimizer: int
    steps: int = 0
    first_step: int = 0
    last_step: int = 0
    horizon: int = 0
    before_optimizer: bool = False
    repeated: Tally = Tally()
    per_micro_batch: Tally = Tally()
    peak: float = math.nan
    decay: float = 1.0
    last_milestone: int = 0
    final: float = 1.0


@dataclass(frozen=True)
class ModeFacts:
    """Modes of the modules that act differently in training and evaluation (dropout with p > 0, batch norm).

    noisy: their names. eval_in_training: those that were in eval mode in a training call, with the tally of these
    calls' steps; the same from the start, or since an evaluation (`left_by_evaluation`, the step). root: the model
    itself was in eval mode. Of eval_in_training: trained_parts, those in a part with trainable parameters; norms,
    the batch norms; untracked, the batch norms that have never seen a batch. evaluations: runs of calls without
    gradients; train_in_evaluation: those with noisy modules in train mode, with_loss: of them followed by a loss
    without gradients, held_out: of them those on several batches, or the only one, of a DataLoader whose rows
    training does not use, each batch called once; same_inputs: single calls on the very tensor of the training call
    before, after its backward pass."""

    noisy: tuple[str, ...] = ()
    eval_in_training: tuple[str, ...] = ()
    eval_steps: Tally = Tally()
    left_by_evaluation: int = 0
    root: bool = False
    trained_parts: tuple[str, ...] = ()
    untracked: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    evaluations: int = 0
    train_in_evaluation: Tally = Tally()
    with_loss: Tally = Tally()
    held_out: Tally = Tally()
    same_inputs: Tally = Tally()
    moving_statistics: bool = False


@dataclass(frozen=True)
class BatchFacts:
    """What the batches were, by a hash of a few numbers of each training call's inputs.

    calls: how many were hashed; lag: after how many calls the same batch comes again, 0 where none does; repeats:
    how many calls in a row were the batch of `lag` calls before. fetched: before how many of these calls a
    DataLoader gave a batch; loaders: epochs of DataLoaders begun, epochs: those of one that were followed by
    training calls, again: the step at which the last of these that was not its first began; loader_batches: batches
    in such an epoch; by_rows: its sampler orders rows, so that no two epochs have the same batches by chance.
    label_counts: of each class over the batches that were
    counted (`counted` of them), and distinct: classes in a batch, on average; batch_size: targets counted a batch
    on average; continued: the share of batches that have a class of the batch just before. empty: how many of
    these loaders had no batch, and of the last the rows of its data set and its batch size."""

    calls: int = 0
    lag: int = 0
    repeats: int = 0
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
    the first of them that differ (odd). Of the first `raw` batches that a DataLoader gave, in `alike` all rows
    were one."""

    batches: int = 0
    rows: int = 0
    large: int = 0
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
    embedding whose entries are the loss's classes; padded: the share of targets that are the latter. truncated:
    the targets are what a DataLoader gave, cut to whole numbers, and the largest change that this made; constant:
    calls whose targets were all one number where the DataLoader gave floating ones that differ. lowest, highest:
    of the targets of binary cross-entropy; several: the largest number of classes that one row of zeros and ones
    has, where softmax is taken over them. averaged: of a loss that is not reduced, backward() was called on its
    plain mean; ascended: it enters what backward() is called on with a minus sign. weighted: class weights were
    given."""

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
    truncated: float = 0.0
    constant: int = 0
    lowest: float = 0.0
    highest: float = 0.0
    several: int = 0
    averaged: bool = False
    ascended: bool = False
    weighted: bool = False
    label_smoothing: float = 0.0

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
class WrapperFacts:
    """The data-parallel wrapper that the model is in: its class, "" for none; its calls in training, and the
    processes that train together."""

    kind: str = ""
    calls: int = 0
    processes: int = 1


@dataclass(frozen=True)
class TargetFacts:
    """What the first losses were asked for. Of losses between numbers (`function`), `looked` of them: root mean
    square, mean and standard deviation of the targets, and the root mean square of the network's first outputs.
    Of targets that are whole numbers where the model is given sequences of tokens: `aligned` were compared, and
    shifts says in how many of them every target was the token so many positions on in the input."""

    function: str = ""
    looked: int = 0
    size: float = math.nan
    mean: float = math.nan
    deviation: float = math.nan
    first_output: float = math.nan
    aligned: int = 0
    shifts: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ScalingFacts:
    """Mixed precision: scaled_losses counts the losses that a GradScaler multiplied; autocast the training calls
    under autocast or with tensors of half precision in their graph, of `looked` that were looked at. scale: the
    last that is known. float16: a call of the model computed in it. skipped: steps that the scaler left out.
    clipped_scaled: clips of gradients that still carried the scale."""

    scaled_losses: int = 0
    looked: int = 0
    autocast: int = 0
    half_parameters: bool = False
    float16: bool = False
    scale: float | None = None
    skipped: Tally = Tally()
    clipped_scaled: Tally = Tally()


@dataclass(frozen=True)
class ClippingFacts:
    """Clips of gradients: their threshold, at how many steps; early: steps at which the only clip came before the
    first backward pass or after the step; partial: backward passes came after the last clip; empty: clips that were
    given no parameter with a gradient; covered: parameters of the last clip, of `trained` that had a gradient."""

    threshold: float | None = None
    clips: Tally = Tally()
    early: Tally = Tally()
    partial: Tally = Tally()
    empty: Tally = Tally()
    covered: int = 0
    trained: int = 0


@dataclass(frozen=True)
class OutsideChange:
    """Weights that something other than an optimizer changed between a step and the next training call.

    names: parameters that were seen to differ (of the few that are looked at); evaluated: the change had been made
    by the time of an evaluation in between; returned_to: the step whose values they have now, None where they have
    none that is known (0: the values at the start)."""

    step: int
    names: tuple[str, ...]
    evaluated: bool
    returned_to: int | None = None


@dataclass(frozen=True)
class LayerFacts:
    """Layers that are one, or were: shared: names of one module with parameters that stands at several places of
    one container; tied: names of one parameter under several names; untied: pairs that were tied at the start and
    are not now, or that the model's configuration says are tied and are not; start_equal: pairs of separate trained
    parameters that had equal random numbers at the start; still_equal: those of them that are equal after steps;
    embedding_pairs: those of them that are an embedding and a linear layer. looks: sweeps of the model so far."""

    shared: tuple[tuple[str, ...], ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    untied: tuple[tuple[str, str], ...] = ()
    start_equal: tuple[tuple[str, str], ...] = ()
    still_equal: tuple[tuple[str, str], ...] = ()
    embedding_pairs: tuple[tuple[str, str], ...] = ()
    looks: int = 0


@dataclass(frozen=True)
class OriginFacts:
    """The first loss that was not finite: its step, whether the batch and the model's outputs were finite (None:
    not known), and what in the computation of the loss left the numbers, in words, empty where that is not
    known."""

    step: int
    batch_finite: bool | None
    outputs_finite: bool | None
    operation: str = ""


@dataclass(frozen=True)
class PenaltyFacts:
    """Terms on the weights alone that are added to the loss: their sum, and the value of the loss functions beside
    it, at the steps of a few backward passes that had such a term."""

    steps: tuple[int, ...] = ()
    penalties: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class ShapeFacts:
    """The model's last linear layer when the watch began (its name, inputs and outputs; zero where it has none),
    and its dropout modules with their rates."""

    head: str = ""
    head_inputs: int = 0
    head_outputs: int = 0
    dropouts: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class StartingWeight:
    """One weight of a layer when the watch began. gain: root mean square times the root of the number of inputs of
    a unit: what the layer makes of inputs of size one that vary independently. constant: all its entries are one
    number, `value` (else the smallest)."""

    name: str
    gain: float
    constant: bool
    value: float
    trainable: bool


@dataclass(frozen=True)
class ChanceFacts:
    """drawn: evaluation calls in eval mode in which random numbers were drawn; always_dropping: modules whose
    forward calls dropout whatever the mode, looked for where numbers were drawn. differing: evaluations whose first
    batch had the labels of an earlier one and other inputs. seeded: steps at which torch.manual_seed set the same
    seed again."""

    drawn: Tally = Tally()
    always_dropping: tuple[str, ...] = ()
    differing: Tally = Tally()
    seeded: Tally = Tally()
