"""Are torch's loss functions of special form given what they are made for? One table of what each must not get."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from diag.display import format_share
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, THRICE, FindingText, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.arithmetic import DomainFacts
from diag.snapshot.loop.facts import Loop

MOSTLY, A_PART, ANY = 0.5, 0.05, 0.0


@dataclass(frozen=True)
class DomainRule(FindingText):
    """A share of a call's entries above `above`, at every look, or in `ever` at any: what is said of it. `{share}`
    in the sentence is the largest share."""

    above: float = ANY
    ever: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class LossDomain(LoopCheck):
    """A loss function that is given numbers for which it is not made."""


@instrument(
    source=SOURCE,
    title="Domain of the loss function",
    kind="check",
    why="These functions return a number for anything that they are given, and where it is not what they are made "
    "for the training goes on towards something else.",
)
def loss_domain(loop: Loop) -> LossDomain:
    """Whether loss functions of special form get what they are made for.

    Looked at are ctc_loss, kl_div, the losses of Gaussian and Poisson likelihoods, those of labels +1 and -1, of
    several labels, of margins and of triplets, wherever they are called. An alarm or a warning where at every look,
    three at least, a share of what was given lies outside. Raises nothing of its own.
    """
    facts = loop.domains
    seen = Precondition("a loss function", bool(facts), "no loss function of special form was called.")
    fine = f"What {', '.join(f.function for f in facts) or 'no function'} is given is what it is made for."
    return judged(LossDomain, loop.step, [x for f in facts for x in _findings(f)], fine, preconditions=(seen,))


def _findings(f: DomainFacts) -> Iterator[LoopFinding]:
    if f.looked < THRICE:
        return
    rules = DOMAIN_RULES[f.function]
    found = [name for name, rule in rules.items() if _is_outside(f, name, rule)]
    said = {other for name in found for other in INSTEAD.get(name, ())}
    for name in (n for n in found if n not in said):
        finding = rules[name].finding({"share": format_share(f.highest[name])}, f.first)
        yield replace(finding, sentence=f"{f.function} {finding.sentence}")


def _is_outside(f: DomainFacts, name: str, rule: DomainRule) -> bool:
    return (f.highest if rule.ever else f.lowest).get(name, 0.0) > rule.above


# Where the first is found, the others follow from it and are not told.
INSTEAD = {"over time": ("no log-probabilities",), "target is a logarithm": ("no log-probabilities",),
           "zeros": ("no signs",)}  # fmt: skip
EQUAL_SHAPES = "Bring both to one shape: outputs.squeeze(1), or targets.unsqueeze(1)."
BROADCAST = DomainRule(
    Cause.TARGETS_BROADCAST,
    "gets two tensors that are broadcast against each other, so that every output is compared with every target.",
    EQUAL_SHAPES,
    "Two sides of equal shape.",
)
SIGNS = {
    "zeros": DomainRule(
        Cause.TARGETS_OUT_OF_RANGE,
        "takes labels of +1 and -1 and gets zeros ({share} of them), for which it has no meaning.",
        "Turn 0 and 1 into -1 and +1: 2 * labels - 1.",
        "Labels of +1 and -1 alone.",
        above=A_PART,
    ),
    "no signs": DomainRule(
        Cause.TARGETS_OUT_OF_RANGE,
        "takes labels of +1 and -1, and {share} of those that it gets are something else.",
        "Give it +1 for what belongs together (or above), -1 for what does not.",
        "Labels of +1 and -1 alone.",
        above=A_PART,
    ),
}
SIGMOID = DomainRule(
    Cause.DOUBLE_SIGMOID,
    "is given probabilities and applies the sigmoid to them again, so that its gradients shrink.",
    "Take the sigmoid out of the model.",
    "Outputs that are negative or exceed one.",
)
TRIPLETS = {
    "anchor is positive": DomainRule(
        Cause.PAIR_IDENTICAL,
        "compares the anchor with itself: {share} of the positives are equal to it.",
        "Draw another example (or another view) of the anchor's kind as the positive.",
        "Positives that differ from their anchors.",
        above=MOSTLY,
    ),
    "negative is positive": DomainRule(
        Cause.PAIR_IDENTICAL,
        "gets negatives of which {share} are equal to the positives, so that nothing is to be nearer than "
        "anything else.",
        "Draw the negative from what does not belong to the anchor.",
        "Negatives that differ from the positives.",
        above=MOSTLY,
    ),
    "negative is anchor": DomainRule(
        Cause.PAIR_IDENTICAL,
        "gets negatives of which {share} are the anchors themselves.",
        "Draw the negative from what does not belong to the anchor.",
        "Negatives that differ from the anchors.",
        above=MOSTLY,
    ),
}
DOMAIN_RULES: dict[str, dict[str, DomainRule]] = {
    "ctc_loss": {
        "over time": DomainRule(
            Cause.WRONG_CLASS_AXIS,
            "takes log-probabilities over the classes, the last axis, and those that it gets add up to one over "
            "time.",
            "Apply log_softmax over the classes: dim=-1.",
            "Exponentials that add up to one over the classes.",
            above=MOSTLY,
        ),
        "no log-probabilities": DomainRule(
            Cause.LOGITS_INTO_PROBABILITY_LOSS,
            "expects log-probabilities, and the exponentials of what it gets do not add up to one over the "
            "classes: it falls as all outputs grow, whatever the targets are.",
            "Apply log_softmax(dim=-1) to the raw outputs before it.",
            "Exponentials that add up to one over the classes.",
            above=MOSTLY,
        ),
        "blank": DomainRule(
            Cause.TARGETS_OUT_OF_RANGE,
            "gets targets in which {share} of the symbols are the blank, which no transcript may hold.",
            "Number the symbols from 1 with blank=0 (or give the blank a class of its own), and give the "
            "transcripts' true lengths, without padding.",
            "Transcripts without the blank's number.",
        ),
        "too short": DomainRule(
            Cause.INPUT_TOO_SHORT,
            "gets transcripts that are longer than the outputs: up to {share} of the rows of a batch have fewer "
            "time steps than symbols (with one more between two alike), and no alignment exists for them: a loss "
            "of infinity, or of zero with zero_infinity=True, which teaches nothing.",
            "Lower the stride over time, or leave out these rows; look at input_lengths after each stride.",
            "As many time steps as symbols in each row.",
            above=A_PART,
        ),
    },
    "kl_div": {
        "no log-probabilities": DomainRule(
            Cause.LOGITS_INTO_PROBABILITY_LOSS,
            "expects log-probabilities, and the exponentials of what it gets add up to one over no axis.",
            "Apply log_softmax to the raw outputs before it.",
            "An input whose exponentials add up to one.",
            Level.WARNING,
            above=MOSTLY,
        ),
        "target is a logarithm": DomainRule(
            Cause.LOGITS_INTO_PROBABILITY_LOSS,
            "expects probabilities as targets, and {share} of those that it gets are negative, as logarithms are.",
            "Give log_target=True with log-probabilities, or the probabilities themselves.",
            "Targets that are never negative.",
            above=A_PART,
        ),
        "target is no logarithm": DomainRule(
            Cause.LOGITS_INTO_PROBABILITY_LOSS,
            "is told that its targets are logarithms (log_target=True) and gets probabilities.",
            "Leave out log_target=True, or give the logarithms.",
            "Targets that are negative.",
            above=MOSTLY,
        ),
    },
    "gaussian_nll_loss": {
        "broadcast": BROADCAST,
        "at the floor": DomainRule(
            Cause.LOSS_UNBOUNDED,
            "gets variances of which {share} are not above eps, where they have no gradient and errors weigh as "
            "much as they can.",
            "Make the variance positive by softplus or exp of the output.",
            "Variances above eps.",
            Level.WARNING,
            above=A_PART,
        ),
    },
    "poisson_nll_loss": {
        "broadcast": BROADCAST,
        "negative counts": DomainRule(
            Cause.TARGETS_OUT_OF_RANGE,
            "is made for counts, and {share} of the targets are negative: then it has no lower bound.",
            "Give it the counts themselves, not standardised.",
            "Targets that are never negative.",
        ),
        "exponential twice": DomainRule(
            Cause.LOGITS_INTO_PROBABILITY_LOSS,
            "takes the logarithm of the rate and applies the exponential itself, and what it gets comes from a "
            "function that is never negative: no rate is below one.",
            "Take the exponential (or softplus, ReLU) out of the model, or give log_input=False.",
            "Outputs that are negative.",
        ),
        "negative rates": DomainRule(
            Cause.LOGITS_INTO_PROBABILITY_LOSS,
            "is told that its input is the rate (log_input=False), and {share} of it is negative.",
            "Give log_input=True, or end the network in softplus.",
            "Rates above zero.",
            above=A_PART,
        ),
    },
    "cosine_embedding_loss": SIGNS,
    "hinge_embedding_loss": SIGNS,
    "margin_ranking_loss": SIGNS | {"broadcast": BROADCAST},
    "soft_margin_loss": SIGNS | {"sigmoid": SIGMOID},
    "multilabel_soft_margin_loss": {
        "sigmoid": SIGMOID,
        "outside": DomainRule(
            Cause.TARGETS_OUT_OF_RANGE,
            "takes labels of 0 and 1, and {share} of those that it gets lie outside: then it has no lower bound.",
            "Turn -1 and +1 into 0 and 1.",
            "Labels between 0 and 1.",
        ),
    },
    "multilabel_margin_loss": {
        "zeros and ones": DomainRule(
            Cause.TARGETS_OUT_OF_RANGE,
            "takes the numbers of the right classes, ended by -1, and gets rows of zeros and ones: it takes "
            "classes 0 and 1 for the right ones.",
            "Give the class numbers ended by -1, or use multilabel_soft_margin_loss for zeros and ones.",
            "Rows that end at -1.",
            above=MOSTLY,
        ),
    },
    "multi_margin_loss": {
        "probabilities": DomainRule(
            Cause.OUTPUT_RANGE,
            "asks for scores that differ by its margin of 1 or more, and gets probabilities, which never differ by "
            "more than 1.",
            "Take the softmax out of the model.",
            "Scores beyond 0 to 1.",
        ),
    },
    "triplet_margin_loss": TRIPLETS,
    "triplet_margin_with_distance_loss": TRIPLETS,
}
