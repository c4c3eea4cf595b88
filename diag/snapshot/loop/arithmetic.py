"""What a loop's own arithmetic does between the model's outputs and the number that backward() is called on, as a
part of its facts (see `facts`): read from the autograd graph, with what the graph keeps of the numbers.

Steps are counted from 1 as in the record of the run."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Expansion:
    """Two tensors that were broadcast against each other, so that every entry of one meets every entry of the
    other, and all of that was summed: in a "difference" or a "product". shape: of the one that has a graph; other:
    of the other one; step: the first at which it was seen."""

    operation: str
    shape: tuple[int, ...]
    other: tuple[int, ...]
    step: int


@dataclass(frozen=True)
class ArithmeticFacts:
    """expanded: what was broadcast in the loss, each kind once. twice: a function ("softmax", "sigmoid") that made
    an output of the model and was then applied to that output again, empty where none was; twice_step: the first
    step at which that was seen."""

    expanded: tuple[Expansion, ...] = ()
    twice: str = ""
    twice_step: int = 0


@dataclass(frozen=True)
class LatentLook:
    """Variational latents at one backward pass: Gaussian means and variances of each row whose KL divergence from
    the standard Gaussian is a part of the loss.

    size: latents of a row. told: of the latent that says most of its row the share of its variance over the batch
    that lies between the rows' means. nats: the divergence of a row, a mean over the batch. weight: of the
    divergence of one latent over that of one entry of the other parts, 1 where both are sums. mean_used: whether
    any other part of the loss depends on the means; None where that is not known. noise: what the rest of the loss
    multiplies constants by: the "deviation" whose variance the divergence holds, that "variance" itself, its
    "logarithm", "nothing" where the rest does not depend on it; empty where that is not known."""

    step: int
    size: int
    told: float
    nats: float
    weight: float
    mean_used: bool | None
    noise: str = ""


@dataclass(frozen=True)
class LatentFacts:
    """The looks at variational latents, the first and the last of them."""

    looks: tuple[LatentLook, ...] = ()


@dataclass(frozen=True)
class PolicyLook:
    """A policy gradient at one backward pass: log-probabilities of actions, times constants, summed.

    agreement: the correlation, over actions, of the derivative of the loss by the log-probability with the critic's
    error (its value less the return): 1 where actions with larger returns than expected are made more likely, -1
    where less; NaN where there is no critic in the loss. entropy: of the policy, over the largest that it can be,
    NaN where it is not in the loss; bonus: it is to grow; entropy_over_actions: its factor over the sum of the
    factors of all log-probabilities, infinite where these are all zero. rewarded: whether anything but the entropy
    depends on the policy's logits. critic_over_actions: the norm of the derivatives by the values over that by the
    log-probabilities, infinite where these are all zero; shared: value and policy come from common layers; None
    where that is not known. bounded: the function that gave the logits of the `actions` ("sigmoid", "" for none).
    redrawn: the actions were drawn from the policy after it had been called on the rows of a rollout again. asked:
    the return that the critic is asked for in all states, NaN where it differs or is zero."""

    step: int
    agreement: float
    entropy: float
    entropy_over_actions: float
    bonus: bool
    rewarded: bool | None
    critic_over_actions: float
    shared: bool | None
    bounded: str = ""
    actions: int = 0
    redrawn: bool = False
    asked: float = math.nan


@dataclass(frozen=True)
class PolicyFacts:
    """The looks at a policy gradient, the first and the last of them."""

    looks: tuple[PolicyLook, ...] = ()


@dataclass(frozen=True)
class ActionLook:
    """A regression of values of actions at one backward pass: one of each row's outputs against a number.

    largest: that one is the largest of the row, and not one that an index gives. acted: the model was called
    without gradients since the last backward pass, on fewer rows a call, as one that acts. rows; actions: outputs
    of a row; picked: the one that the index gives in all rows, -1 where it is not one alone. through: the number,
    too, comes from the model, called on other rows with gradients. discount: what the values of next states are
    multiplied by in it, NaN where that was not found, and whose values: number `copy` of the copies of the model,
    -1 for its own. settled: the share of rows whose number is one of a few, `settled_at`, whatever these values
    are; NaN where there are no such values."""

    step: int
    largest: bool
    acted: bool
    rows: int = 0
    actions: int = 0
    picked: int = -1
    through: bool = False
    discount: float = math.nan
    copy: int = -1
    settled: float = math.nan
    settled_at: tuple[float, ...] = ()


@dataclass(frozen=True)
class ActionFacts:
    """The looks at such a regression, the first and the last of them."""

    looks: tuple[ActionLook, ...] = ()


@dataclass(frozen=True)
class DomainFacts:
    """The calls of one loss function of torch that were looked at: of each thing that the function is not made for
    the smallest and the largest share of a call's entries that were so ("blank" among the targets of ctc_loss)."""

    function: str
    looked: int
    first: int
    lowest: Mapping[str, float] = field(default_factory=dict)
    highest: Mapping[str, float] = field(default_factory=dict)


class Odd(enum.StrEnum):
    """Something in the formula of a loss that leaves it without what it is for."""

    SCALE_UNPAID = "errors are scaled by what enters the loss nowhere else"
    SCALE_FALLS = "the scale of the errors and its logarithm fall together"
    VARIANCE_CLAMPED = "variances lie where a clamp keeps them"
    FLOW_UNPAID = "the latent of a flow is scaled, and its determinant is missing"
    FLOW_FALLS = "the latent of a flow and its determinant fall together"
    COLUMNS_KEPT = "no layer of a flow scales some columns"
    NOISE_UNPAID = "noise is scaled by what enters the loss nowhere else"
    NOISE_UNRELATED = "the noise that is asked for is not in the input"
    ONE_LEVEL = "noise is asked for at one level"
    MEAN_SQUARED = "a mean of differences is squared"
    MEAN_ABSOLUTE = "the absolute value of a mean of differences is taken"
    MET_BY_ZERO = "nothing is compared with a given number"
    DILUTED = "a mean runs over rows without a target"
    ONE_TARGET = "a mask leaves entries of one target alone"
    PAIRS_BOTH_WAYS = "a mask takes each pair both ways"
    PAIRS_BOUNDED = "scores are bounded before they are compared"
    LIKELIHOOD_DESCENDED = "a log-likelihood is descended"
    HALF_DESCENDED = "one half of a binary cross-entropy has the sign of the other turned"
    PULLED_AWAY = "outputs are pulled away from their labels"
    SOFTMAX_OF_ONE = "a softmax runs over an axis of length one"
    BEYOND_REACH = "the end of the network cannot reach the targets"
    OUTPUTS_CUT = "a ReLU makes every output zero"
    SECOND_DERIVATIVE = "a second derivative goes through a ReLU"
    SUMMED = "the loss is a sum over the rows"


@dataclass(frozen=True)
class Oddity:
    """What was odd: its kind, and of which function where there are several; how many backward passes
    had been looked at (`looked`) when it was last seen and in how many of these it was (`seen`), the first step,
    and numbers of the last look."""

    kind: Odd
    looked: int
    seen: int
    first: int
    numbers: Mapping[str, float] = field(default_factory=dict)
    of: str = ""


@dataclass(frozen=True)
class FormulaFacts:
    """Of the loop's own loss: backward passes looked at, and what was odd."""

    looked: int = 0
    odd: tuple[Oddity, ...] = ()
