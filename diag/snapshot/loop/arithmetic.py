"""What a loop's own arithmetic does between the model's outputs and the number that backward() is called on, as a
part of its facts (see `facts`): read from the autograd graph, with what the graph keeps of the numbers.

Steps are counted from 1 as in the record of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
    any other part of the loss depends on the means; None where that is not known."""

    step: int
    size: int
    told: float
    nats: float
    weight: float
    mean_used: bool | None


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
    without gradients since the last backward pass, on fewer rows a call, as one that acts."""

    step: int
    largest: bool
    acted: bool


@dataclass(frozen=True)
class ActionFacts:
    """The looks at such a regression, the first and the last of them."""

    looks: tuple[ActionLook, ...] = ()
