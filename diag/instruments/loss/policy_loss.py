"""Policy gradients: whether the loss makes the better actions more likely, and whether another term drowns that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import THRICE, LoopCheck, LoopFinding, judged
from diag.ranges import Threshold
from diag.registry import instrument
from diag.result import OUR_CHOICE, Confidence, Level, Precondition
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
    than 99 % of the largest entropy. Where one of the last two holds and the derivatives by all log-probabilities
    are zero at the last five looks, no action is told from another, which is said instead (a warning, since a
    reward may be yet to be found). And at all looks: the actions were drawn from a second call of the policy on the
    states of the rollout; the logits are outputs of a sigmoid; at five looks or more, up to step 50 or later, the
    critic is asked for one return in all states. Discrete actions alone. Raises nothing of its own.
    """
    looks = loop.policy.looks
    known = Precondition(
        "a policy", len(looks) > 0, "no log-probabilities of discrete actions were seen in the loss."
    )
    fine = "No fault of the policy gradient was seen: neither a wrong sign nor another term that drowns it."
    findings = list(_findings(looks, times)) if len(looks) >= THRICE else []
    return judged(PolicyLoss, loop.step, findings, fine, preconditions=(known,))


def _findings(looks: tuple[PolicyLook, ...], times: float) -> Iterator[LoopFinding]:
    yield from _of_the_setup(looks)
    if all(look.rewarded is False for look in looks):
        yield _unrewarded(looks[0])
    if all(look.agreement < AGAINST for look in looks):
        yield _against(looks)
    needed, steps = LOOKS_AND_STEPS
    last = looks[-needed:]
    late = len(last) == needed and last[-1].step >= steps
    even = late and all(map(_stays_even, last))
    drowned = all(look.critic_over_actions > times and look.shared is True for look in looks)
    if all(map(_weighs_nothing, last)):
        if late and (even or drowned):
            yield _alike(last)
        return
    if even:
        yield _even(last)
    if drowned:
        yield _drowned(looks)


def _of_the_setup(looks: tuple[PolicyLook, ...]) -> Iterator[LoopFinding]:
    """What does not depend on how the terms weigh."""
    if all(look.redrawn for look in looks):
        yield _redrawn(looks)
    if all(look.bounded == "sigmoid" for look in looks):
        yield _bounded(looks)
    needed, steps = LOOKS_AND_STEPS
    settled = len(looks) >= needed and looks[-1].step >= steps
    if settled and not any(math.isnan(look.asked) for look in looks):
        yield _one_return(looks)


def _weighs_nothing(look: PolicyLook) -> bool:
    """Whether no action counts in the loss: what is compared with all of them together is infinitely larger."""
    return math.isinf(look.entropy_over_actions) or math.isinf(look.critic_over_actions)


def _median(values: Iterable[float]) -> float:
    """Over the looks at which any action counted."""
    return float(numpy.median([v for v in values if math.isfinite(v)]))


def _stays_even(look: PolicyLook) -> bool:
    return look.bonus and look.entropy_over_actions > ENTROPY_OUTWEIGHS and look.entropy > NEARLY_EVEN


def _unrewarded(first: PolicyLook) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.GRAPH_CUT,
        "Nothing but its entropy trains the policy: no other term of the loss depends on its logits, so that no "
        "action is made more likely for its return.",
        "Compute the log-probabilities of the actions with a gradient: not under no_grad, not detached, not those "
        "kept from the rollout.",
        "A derivative of the loss by the log-probability of an action.",
        step=first.step,
    )


def _against(looks: tuple[PolicyLook, ...]) -> LoopFinding:
    found = _median(look.agreement for look in looks)
    return LoopFinding(
        Level.WARNING,  # returns may be costs
        Cause.LOSS_ASCENDED,
        "The loss makes actions less likely that had a larger return than the critic expected: what their "
        f"log-probabilities are multiplied by has a correlation of {format_number(found)} with the critic's value "
        f"less the return, at all {len(looks):,} backward passes that were looked at; 1 would make the better "
        "actions more likely.",
        "Descend minus the log-probability times the advantage, and take the advantage as return less value.",
        "Returns that are costs, meant to become small.",
        step=looks[0].step,
        threshold_source=OUR_CHOICE,
    )


def _alike(last: tuple[PolicyLook, ...]) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,  # a reward may be yet to be found
        Cause.TARGETS_ALL_EQUAL,
        f"No action is told from another: at the last {len(last):,} backward passes that were looked at, up to "
        f"step {last[-1].step:,}, the log-probabilities of all actions are multiplied by zero, so that none is "
        "made more likely than another, and other terms alone train the policy's layers.",
        "Print the advantages: they are zero where all returns are equal, where a baseline is subtracted from "
        "itself, and where they are normalised over a single one.",
        "Returns that will differ once a reward has been found.",
        step=last[0].step,
    )


def _redrawn(looks: tuple[PolicyLook, ...]) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.ACTION_NOT_TAKEN,
        "The log-probabilities in the loss are those of freshly drawn actions, not of the ones that were taken: at "
        f"all {len(looks):,} backward passes that were looked at the policy was called again on the states of the "
        "rollout, and the actions are what torch's generator gave after that call.",
        "Store the actions of the rollout and give these to log_prob().",
        "Rewards that were given for the freshly drawn actions.",
        step=looks[0].step,
    )


def _bounded(looks: tuple[PolicyLook, ...]) -> LoopFinding:
    actions = looks[0].actions
    most, least = math.e / (math.e + actions - 1), 1 / (1 + math.e * (actions - 1))
    return LoopFinding(
        Level.WARNING,
        Cause.OUTPUT_RANGE,
        f"The policy cannot become decided: its logits are outputs of a sigmoid, between 0 and 1, so that of "
        f"{actions:,} actions none can have a probability above {format_share(most)} or below "
        f"{format_share(least)}.",
        "Give the raw outputs of the last layer as logits.",
        "Logits that are outputs of a linear layer.",
        step=looks[0].step,
    )


def _one_return(looks: tuple[PolicyLook, ...]) -> LoopFinding:
    last = looks[-1]
    return LoopFinding(
        Level.WARNING,
        Cause.TARGETS_ALL_EQUAL,
        f"The critic is asked for the same return in every state, {format_number(last.asked)} at step "
        f"{last.step:,}, at all {len(looks):,} backward passes that were looked at, so that advantages say nothing "
        "of what comes after an action.",
        "Look at how rewards to come are summed up: a discount of zero leaves the immediate reward alone.",
        "An environment in which all states are worth the same.",
        step=looks[0].step,
    )


def _even(looks: tuple[PolicyLook, ...]) -> LoopFinding:
    ratio = _median(look.entropy_over_actions for look in looks)
    least = min(look.entropy for look in looks)
    return LoopFinding(
        Level.ALARM,
        Cause.LOSS_TERM_DOMINATES,
        "The policy stays next to random, since the entropy bonus outweighs the returns: its factor is "
        f"{format_number(ratio)} times that of the log-probabilities of all actions together, and up to step "
        f"{looks[-1].step:,} the policy keeps {format_share(least)} or more of the largest entropy that it "
        "can have.",
        "Lower the factor of the entropy, to about a hundredth of the advantages' size.",
        "With a smaller factor the policy stays as even.",
        step=looks[0].step,
        threshold_source=OUR_CHOICE,
    )


def _drowned(looks: tuple[PolicyLook, ...]) -> LoopFinding:
    ratio = _median(look.critic_over_actions for look in looks)
    return LoopFinding(
        Level.WARNING,
        Cause.LOSS_TERM_DOMINATES,
        "The critic's loss drowns the policy's in the layers that they share: its gradient at the values is "
        f"{format_number(ratio)} times as large as the policy's at the log-probabilities of the actions.",
        "Lower the factor of the value loss, bring the returns to unit scale, or give the critic layers of "
        "its own.",
        "A policy that learns as fast with a smaller factor.",
        step=looks[0].step,
        confidence=Confidence.WEAK_EMPIRICAL,
        threshold_source=OUR_CHOICE,
    )
