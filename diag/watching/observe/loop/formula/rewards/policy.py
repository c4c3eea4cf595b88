"""Policy gradients: the log-probabilities of actions that were taken, each times a constant, the entropy of the
distribution that they come from, and the error of a critic, among the parts of a loss.

What the log-probability of one action weighs is the derivative of the loss; the critic's error, its value less the
return, is kept by the graph. Both are compared entry by entry, whichever way the advantage was estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diag.snapshot.autograd_graph import PASSING_ON, first_arguments, kind_of, nodes_before, parents_of
from diag.snapshot.loop.arithmetic import PolicyFacts, PolicyLook
from diag.watching.observe.loop.formula.parts import Summand, depends
from diag.watching.observe.loop.formula.reader import Reader
from diag.watching.observe.loop.formula.rewards.clipped_policy import log_probabilities_clipped
from diag.watching.observe.loop.formula.rewards.rollout import Rollout
from diag.watching.observe.loop.losses import MADE_BY
from diag.watching.observe.loop.moment import Moment

FEWEST_ACTIONS = 16
OF_CRITICS = ("MseLoss", "SmoothL1Loss", "HuberLoss")
COPIES = ("Clamp", "ClampMin", *PASSING_ON)
NODES_IN_COMMON = 4000
ONE_NUMBER = 1e-4  # of their size, that equal returns may differ by


class Policies(Reader[PolicyLook]):
    """Reads what a policy gradient is made of."""

    NAME, EVERY = "policy", 4

    def __init__(self, moment: Moment, rollout: Rollout) -> None:
        super().__init__(moment)
        self._rollout = rollout

    def _look(self, parts: list[Summand]) -> PolicyLook | None:
        return policy_look(parts, self._moment.step, self._rollout)

    def facts(self) -> PolicyFacts:
        """As plain data."""
        return PolicyFacts(tuple(self.looks))


def policy_look(parts: list[Summand], step: int, rollout: Rollout | None = None) -> PolicyLook | None:
    """What the parts say of a policy; None where they hold neither log-probabilities nor an entropy. rollout: the
    calls since the last backward pass."""
    parts = [log_probabilities_clipped(p) for p in parts]
    actions = [p for p in parts if p.factors and _is_log_probability(p)]
    entropies = [p for p in parts if _is_entropy(p)]
    if not actions and not entropies:
        return None
    pulls = torch.cat([p.weights.reshape(-1) for p in actions]) if actions else torch.zeros(0)
    error, slope, critic = next(_errors(parts, len(pulls)), (None, torch.zeros(0), None))
    whole, share = _entropy(entropies)
    rest = [p for p in parts if not any(p is e for e in entropies)]
    return PolicyLook(
        step=step,
        agreement=_agreement(pulls, error, slope) if error is not None else math.nan,
        entropy=share,
        entropy_over_actions=_ratio(-whole, float(pulls.abs().sum())) if entropies and actions else math.nan,
        bonus=whole < 0,
        rewarded=_rewarded(entropies, rest),
        critic_over_actions=_ratio(float(slope.norm()), float(pulls.norm())) if error is not None else math.nan,
        shared=_share_nodes(critic, actions[0].node) if error is not None else None,
        bounded=_bounded(actions),
        actions=actions[0].node._saved_self.shape[-1] if actions else 0,
        redrawn=_redrawn(actions, rollout),
        asked=next(_one_return(parts, rollout), math.nan),
    )


# Log-probabilities of actions


def _is_log_probability(p: Summand) -> bool:
    """Whether it is one entry of each row of a log-softmax."""
    if p.kind != "Gather" or not p.node.next_functions or p.node.next_functions[0][0] is None:
        return False
    return _logits_behind(p.node.next_functions[0][0]) is not None


def _logits_behind(node: Any) -> Any:
    """The node of the logits that a log-softmax, or logits less their logsumexp, was taken of."""
    for before in first_arguments(node, 12):
        kind = kind_of(before)
        if kind == "LogSoftmax":
            return before.next_functions[0][0]
        if kind == "Sub":
            first, second = (side[0] for side in before.next_functions)
            of = parents_of(second)[:1] if second is not None and kind_of(second) == "Logsumexp" else []
            return first if of and of[0] is first else None
        if kind not in (*COPIES, "Expand"):
            return None
    return None


def _bounded(actions: list[Summand]) -> str:
    """The function that gave the logits and holds them in a range, "" for none."""
    found = {MADE_BY.get(kind_of(_logits_behind(p.node.next_functions[0][0])), "") for p in actions}
    return next(iter(found)) if len(found) == 1 else ""


def _redrawn(actions: list[Summand], rollout: Rollout | None) -> bool:
    """Whether the actions were drawn after the call that the log-probabilities come from, on the rows that a policy
    had been called on to act."""
    if rollout is None or len(actions) != 1 or not rollout.replayed:
        return False
    node = actions[0].node
    kept = node._saved_self
    return isinstance(kept, Tensor) and rollout.drawn_since(node._saved_index, kept)


# Entropy: sums of p log p


def _is_entropy(p: Summand) -> bool:
    return p.kind == "Mul" and _logits_of_entropy(p.node) is not None


def _logits_of_entropy(node: Any) -> Any:
    """The node of the logits whose p log p this is; None for anything else."""
    sides = [side for side, _ in node.next_functions]
    for one, other in (sides, sides[::-1]) if len(sides) == 2 and None not in sides else ():
        logits = _logits_behind(one)
        if logits is None:
            continue
        made = next((n for n in first_arguments(other, 6) if kind_of(n) not in COPIES), None)
        if made is not None and kind_of(made) in ("Softmax", "Exp"):
            before = parents_of(made)[0]
            if before is logits or _logits_behind(before) is logits:
                return logits
    return None


def _entropy(entropies: list[Summand]) -> tuple[float, float]:
    """The factor with which the mean entropy enters the loss, and the mean over the largest that it can be."""
    if not entropies:
        return 0.0, math.nan
    factors, shares = [], []
    for p in entropies:
        rows, classes = math.prod(p.shape[:-1]), p.shape[-1]
        kept = p.node._saved_self, p.node._saved_other
        if not all(isinstance(t, Tensor) and t.is_cpu for t in kept) or classes < 2:
            return 0.0, math.nan
        values = -(kept[0].detach().double() * kept[1].detach().double()).sum(-1)
        factors.append(-p.weight * rows)
        shares.append(float(values.mean()) / math.log(classes))
    return sum(factors), sum(shares) / len(shares)


def _rewarded(entropies: list[Summand], rest: list[Summand]) -> bool | None:
    """Whether anything but the entropy depends on the logits that it is of; None where there is no entropy."""
    if not entropies:
        return None
    return depends(rest, _logits_of_entropy(entropies[0].node)._sequence_nr())


# The critic


def _errors(parts: list[Summand], count: int) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """Value less return, the derivative of the loss by the value, and the node, of a part with `count` entries."""
    for p in parts:
        error = _error(p) if count >= FEWEST_ACTIONS else None
        if error is None or error.numel() != count or not error.is_cpu:
            continue
        error = error.detach().double()
        weights = (
            p.weights.expand(error.shape)
            if p.shape == tuple(error.shape)
            else torch.full_like(error, p.entry_weight)
        )
        yield error.reshape(-1), (weights * _slope(p, error)).reshape(-1), p.node


def _slope(p: Summand, error: Tensor) -> Tensor:
    """The derivative of what the critic is asked for, by its value: linear losses have one that is bounded."""
    if p.kind == "HuberLoss":
        return error.clamp(-p.node._saved_delta, p.node._saved_delta)
    if p.kind == "SmoothL1Loss":
        beta = p.node._saved_beta
        return (error / beta).clamp(-1, 1) if beta else error.sign()
    return 2 * error


def _error(p: Summand) -> Tensor | None:
    node = p.node
    if p.kind in OF_CRITICS:
        value = getattr(node, "_saved_self", None)
        return value - node._saved_target if isinstance(value, Tensor) else None
    kept, before = getattr(node, "_saved_self", None), parents_of(node)[:1]
    if not p.is_square or not isinstance(kept, Tensor) or not before or kind_of(before[0]) not in ("Sub", "Rsub"):
        return None
    sides = [side for side, _ in before[0].next_functions]
    if sum(side is not None for side in sides) != 1:
        return None
    return kept if sides[0] is not None and kind_of(before[0]) == "Sub" else -kept


def _one_return(parts: list[Summand], rollout: Rollout | None) -> Iterator[float]:
    """The return that a critic is asked for in each of several states, NaN where they differ."""
    for p in parts:
        error = _error(p)
        if error is None or error.numel() < FEWEST_ACTIONS or not error.is_cpu:
            continue
        if p.kind in OF_CRITICS:
            returns = p.node._saved_target
        else:
            value = rollout.output_behind(parents_of(parents_of(p.node)[0])[0]) if rollout is not None else None
            if value is None or value.numel() != error.numel():
                continue
            returns = value.reshape(error.shape) - error.detach()
        low, high = map(float, returns.detach().aminmax())
        yield low if low and high - low <= ONE_NUMBER * abs(low) else math.nan


def _agreement(pulls: Tensor, errors: Tensor, derivative: Tensor) -> float:
    """The correlation of what an action's log-probability weighs with the critic's error: 1 where actions that did
    better than the critic expected are made more likely."""
    counted = pulls != 0
    a, b = pulls[counted], errors[counted]
    if len(a) < FEWEST_ACTIONS or float(derivative @ errors) <= 0:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else math.nan


def _ratio(a: float, b: float) -> float:
    """Infinite where b alone is zero, NaN where both are."""
    return a / b if b else math.copysign(math.inf, a) if a else math.nan


def _share_nodes(a: Any, b: Any) -> bool | None:
    """Whether two nodes come from one that is more than a parameter; None where their graphs are too large."""
    found = [set(nodes_before([node], NODES_IN_COMMON)) for node in (a, b)]
    if any(len(before) == NODES_IN_COMMON for before in found):
        return None
    return any(kind_of(node) != "AccumulateGrad" for node in found[0] & found[1])
