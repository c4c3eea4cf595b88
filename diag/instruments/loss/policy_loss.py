"""Policy gradients: whether the loss makes the better actions more likely, and whether another term drowns that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import THRICE, LoopCheck, LoopFinding, judged
from diag.ranges import Threshold
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition
from diag.snapshot.loop.arithmetic import PolicyLook
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of the policy gradient: Sutton et al. 2000"
AGAINST = -0.5  # correlation
ENTROPY_OUTWEIGHS, NEARLY_EVEN = 2.0, 0.99
LOOKS_AND_STEPS = 5, 50
CRITIC_OUTWEIGHS = 3000.0


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyLoss(LoopCheck):
    """Policy gradients that point away from the better actions, or that nothing but another term moves."""

    cites = SOURCE


@instrument(
    source=SOURCE,
    title="Policy gradient",
    kind="check",
    why="A policy whose gradient has the wrong sign, or does not come to it, gets worse or stays as it is, and the "
    "value of its loss does not show it: that is no measure of the return.",
)
def policy_loss(loop: Loop, *, times: Threshold = CRITIC_OUTWEIGHS) -> PolicyLoss:
    """Whether a policy gradient makes actions more likely that did better than the critic expected.

    loop: the facts of the loop, with the derivatives of the loss by the log-probabilities of actions and by the
    critic's values, and the entropy, of backward passes that were looked at. Findings, each at all of at least
    three looks: the derivatives by the log-probabilities go against the critic's error (a warning, since returns
    may be costs); nothing but the entropy depends on the policy (log-probabilities without a gradient); the
    derivative by the values is above `times` that by the log-probabilities, and both have layers in common. And at
    the last five looks: the entropy weighs more than twice as much as all actions together, and the policy has more
    than 99 % of the largest entropy. Discrete actions alone. Raises nothing of its own.
    """
    looks = loop.policy.looks
    known = Precondition(
        "a policy", len(looks) > 0, "no log-probabilities of discrete actions were seen in the loss."
    )
    fine = "The policy gradient makes the better actions more likely, and no other term drowns it."
    findings = list(_findings(looks, times)) if len(looks) >= THRICE else []
    return judged(PolicyLoss, loop.step, findings, fine, preconditions=(known,))


def _findings(looks: tuple[PolicyLook, ...], times: float) -> Iterator[LoopFinding]:
    if all(look.rewarded is False for look in looks):
        yield _unrewarded(looks[0])
    if _each(looks, lambda look: look.agreement < AGAINST):
        yield _against(looks)
    needed, steps = LOOKS_AND_STEPS
    last = looks[-needed:]
    if len(last) == needed and last[-1].step >= steps and _each(last, _stays_even):
        yield _even(last)
    if _each(looks, lambda look: look.critic_over_actions > times and look.shared is True):
        yield _drowned(looks)


def _each(looks: tuple[PolicyLook, ...], holds: Callable[[PolicyLook], bool]) -> bool:
    return all(holds(look) for look in looks)


def _stays_even(look: PolicyLook) -> bool:
    return look.bonus and look.entropy_over_actions > ENTROPY_OUTWEIGHS and look.entropy > NEARLY_EVEN


def _unrewarded(first: PolicyLook) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.GRAPH_CUT,
        "Nothing but the entropy trains the policy: no other term of the loss depends on its logits, so that no "
        "action is made more likely for its return.",
        "Compute the log-probabilities of the actions with a gradient: not under no_grad, not detached, not those "
        "kept from the rollout.",
        "A derivative of the loss by the log-probability of an action.",
        step=first.step,
    )


def _against(looks: tuple[PolicyLook, ...]) -> LoopFinding:
    found = float(numpy.median([look.agreement for look in looks]))
    return LoopFinding(
        Level.WARNING,  # returns may be costs
        Cause.LOSS_ASCENDED,
        "The loss makes actions less likely that had a larger return than the critic expected: at all "
        f"{len(looks):,} backward passes that were looked at the derivatives by the log-probabilities go "
        f"against the "
        f"critic's error (correlation {format_number(found)}).",
        "Descend minus the log-probability times the advantage, and take the advantage as return less value.",
        "Returns that are costs, meant to become small.",
        step=looks[0].step,
    )


def _even(looks: tuple[PolicyLook, ...]) -> LoopFinding:
    ratio = float(numpy.median([look.entropy_over_actions for look in looks]))
    least = min(look.entropy for look in looks)
    return LoopFinding(
        Level.ALARM,
        Cause.LOSS_TERM_DOMINATES,
        f"The entropy bonus keeps the policy from deciding: its factor is {format_number(ratio)} times those "
        f"of all "
        f"actions together, and at step {looks[-1].step:,} the policy still has {format_share(least)} of the "
        "largest entropy.",
        "Lower the factor of the entropy, to about a hundredth of the advantages' size.",
        "With a smaller factor the policy stays as even.",
        step=looks[0].step,
    )


def _drowned(looks: tuple[PolicyLook, ...]) -> LoopFinding:
    ratio = float(numpy.median([look.critic_over_actions for look in looks]))
    return LoopFinding(
        Level.WARNING,
        Cause.LOSS_TERM_DOMINATES,
        f"The critic's loss drowns the policy's in the layers that they share: its derivative by the values is "
        f"{format_number(ratio)} times that by the log-probabilities of the actions.",
        "Lower the factor of the value loss, bring the returns to unit scale, or give the critic layers of "
        "its own.",
        "A policy that learns as fast with a smaller factor.",
        step=looks[0].step,
        confidence=Confidence.WEAK_EMPIRICAL,
    )
