"""What a loop did with its steps, as parts of its facts (see `facts`): optimizers, schedulers, scaling, clipping.

Steps are counted from 1 as in the record of the run; names are those of parameters and modules of the watched
model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tally:
    """How often something happened: `times` in all, at steps `first` to `last`; `running` is how often in a row up
    to now, `longest` the longest such row, and `since` the step at which the last one began. Not every step is
    looked at."""

    times: int = 0
    first: int = 0
    last: int = 0
    running: int = 0
    longest: int = 0
    since: int = 0

    def __bool__(self) -> bool:
        return self.times > 0


NOT_ONCE = Tally()
ZEROS = "zeros"  # what a parameter may look like; see `ParameterFacts.fresh`


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
    optimizer's. by_closure: its steps call a function that computes the loss, as often as they like. stateful: it
    keeps moments. looked: how many of its steps were looked at closely; what is counted
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
    attributes of the optimizer, where it reads none. idle: it has never stepped, and gradients that it alone could
    use, of the parameters `unused`, were zeroed."""

    kind: str
    groups: tuple[Mapping[str, Any], ...] = ()
    made_with: tuple[Mapping[str, Any], ...] = ()
    held: tuple[str, ...] = ()
    foreign: int = 0
    stale: tuple[str, ...] = ()
    nested: bool = False
    by_closure: bool = False
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
    idle: Tally = Tally()
    unused: tuple[str, ...] = ()


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
    called, and no method of the module around it names it. fresh: of one that nothing trains, what its numbers look
    like: "uniform" or "normal" draws of an initialisation, or "zeros"; empty where they look like neither, or were
    not looked at."""

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
    fresh: str = ""


@dataclass(frozen=True)
class SchedulerFacts:
    """One learning-rate scheduler: its class, its steps, and the optimizer that it changes (an index into
    `Loop.optimizers`). horizon: after how many of its steps it has run its course, 0 where it has no end.
    before_optimizer: its first step came before any of the optimizer's. repeated: steps at which it stepped more
    than once; per_micro_batch: those at which it stepped with each backward pass. peak: the learning rate that its
    settings lead up to (the optimizer's own, or max_lr), NaN where that is not on the host. decay: what each of its
    steps multiplies the rate with, on average over many, 1 where it has another form. last_milestone: the step
    after which a schedule of milestones keeps the rate, 0 where it has another form; final: what the rate then is
    of the first. plateau: what it takes to be better ("min", "max") of one that waits for a plateau, else empty;
    best: the best that it was given so far."""

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
    plateau: str = ""
    best: float = math.nan


@dataclass(frozen=True)
class ScalingFacts:
    """Mixed precision: scaled_losses counts the losses that a GradScaler multiplied; autocast the training calls
    under autocast or with tensors of half precision in their graph, of `looked` that were looked at. scale: the
    last that is known; backoff: what the scaler multiplies it with after each step that it leaves out. float16: a
    call of the model computed in it. skipped: steps that the scaler left out. clipped_scaled: clips of gradients
    that still carried the scale."""

    scaled_losses: int = 0
    looked: int = 0
    autocast: int = 0
    half_parameters: bool = False
    float16: bool = False
    scale: float | None = None
    backoff: float | None = None
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
class WrapperFacts:
    """The data-parallel wrapper that the model is in: its class, "" for none; its calls in training, and the
    processes that train together."""

    kind: str = ""
    calls: int = 0
    processes: int = 1


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
class OriginFacts:
    """The first loss that was not finite: its step, whether the batch and the model's outputs were finite (None:
    not known), and what in the computation of the loss left the numbers, in words, empty where that is not
    known."""

    step: int
    batch_finite: bool | None
    outputs_finite: bool | None
    operation: str = ""
