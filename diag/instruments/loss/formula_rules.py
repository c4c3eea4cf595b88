"""What is said of each odd thing in the formula of a loss: one table, of causes and sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import FindingText, LoopFinding, reach
from diag.result import Level
from diag.snapshot.loop.arithmetic import Odd, Oddity

SHARES = ("share", "left", "outside")  # of the numbers of an oddity

Words = dict[str, str]


@dataclass(frozen=True)
class FormulaRule(FindingText):
    """What is said of an oddity. `{name}` in a text is one of its numbers, `{of}` its function, or one of the
    `words` that are made of the numbers."""

    words: Callable[[Mapping[str, float]], Words] = lambda numbers: {}

    def told(self, odd: Oddity) -> LoopFinding:
        """The finding, with the numbers of the last look."""
        words = {k: format_share(v) if k in SHARES else format_number(v) for k, v in odd.numbers.items()}
        return self.finding(words | {"of": odd.of} | self.words(odd.numbers), odd.first)


def _either(number: str, word: str, one: str, other: str) -> Callable[[Mapping[str, float]], Words]:
    """A word that depends on whether a number is zero."""
    return lambda n: {word: one if n[number] else other}


def _columns(n: Mapping[str, float]) -> Words:
    count = int(n["columns"])
    return {"which": f"Column {int(n['first'])} is" if count == 1 else f"{count:,} columns are"}


def _away(n: Mapping[str, float]) -> Words:
    which = {1: "entries whose target is 1", 0: "entries whose target is 0"}
    return {
        "which": which.get(int(n["label"]), "the right classes"),
        "moves": "raises" if n["label"] == 0 else "lowers",
    }


def _of_a_mean(what: str) -> FormulaRule:
    return FormulaRule(
        Cause.ERRORS_CANCEL,
        f"The loss is the {what} of the mean of {{entries}} differences, in which errors of opposite sign cancel: "
        "it is zero as soon as the outputs are right on average.",
        f"Take the {what} of each difference first and the mean afterwards: ((a - b) ** 2).mean().",
        "A loss that is only to bring averages together.",
    )


FORMULA_RULES: dict[Odd, FormulaRule] = {
    Odd.SCALE_UNPAID: FormulaRule(
        Cause.LOSS_UNBOUNDED,
        "The loss can be lowered without making any error smaller: its errors are {how} that the network computes "
        "and that enters the loss nowhere else, so that training drives it to where no error counts.",
        "Add the term that pays for it: of a Gaussian half the log-variance, of a learned weight exp(-s) of a task "
        "s/2.",
        "Another term of the loss that depends on it.",
        words=_either("exponent", "how", "multiplied by an exponential", "divided by a quantity"),
    ),
    Odd.SCALE_FALLS: FormulaRule(
        Cause.LOSS_UNBOUNDED,
        "The loss has no lower bound: the scale that {how} the errors and the term of its logarithm fall together, "
        "so that the network lowers both whatever its errors are.",
        "Look at the two signs: of a Gaussian with the log-variance s it is exp(-s) * error**2 + s.",
        "Two terms that pull the scale opposite ways.",
        words=_either("exponent", "how", "multiplies", "divides"),
    ),
    Odd.VARIANCE_CLAMPED: FormulaRule(
        Cause.LOSS_UNBOUNDED,
        "{share} of the variances that the loss divides by lie at the {least} that a clamp keeps them at: there "
        "they have no gradient, and an error counts {times} times.",
        "Make the variance positive by softplus or exp of the output, and add a small number to it.",
        "Variances above the clamp.",
        words=lambda n: {"times": format_number(1 / n["least"])},
    ),
    Odd.FLOW_UNPAID: FormulaRule(
        Cause.LOSS_UNBOUNDED,
        "The loss falls as the network shrinks everything to one point: it is the squared size of a latent that "
        "{layers} exponentials of the network scale, and none of their exponents is a term of it (the "
        "log-determinant is missing).",
        "Subtract the sum of the exponents of all layers (the log-determinant) from the loss.",
        "A term of the loss with these exponents.",
    ),
    Odd.FLOW_FALLS: FormulaRule(
        Cause.LOSS_UNBOUNDED,
        "The loss has no lower bound: the exponents of {layers} exponentials that scale the latent are added to "
        "it, so that it falls with them as the squared latent does (the log-determinant has the wrong sign).",
        "Subtract the log-determinant from the loss (add it to the log-likelihood).",
        "Exponents that enter the loss with a minus sign.",
    ),
    Odd.COLUMNS_KEPT: FormulaRule(
        Cause.AXES_MIXED,
        "{which} never scaled: in all {layers} layers of the flow the factor there is exactly one for every row.",
        "Alternate the masks (or exchange the halves) from one coupling layer to the next, so that each column is "
        "transformed by some layer.",
        "A layer whose factor differs from one there.",
        Level.WARNING,
        words=_columns,
    ),
    Odd.NOISE_UNPAID: FormulaRule(
        Cause.LOSS_UNBOUNDED,
        "The network adds noise to its code, mean + exp(s) * noise, and nothing in the loss keeps that noise from "
        "vanishing: no term but the noise itself depends on s{zero}, so that training takes it away.",
        "Add the KL divergence of the code from the standard normal distribution (of a policy, its entropy) to the "
        "loss.",
        "A term of the loss that grows as s falls.",
        Level.WARNING,
        words=_either("weightless", "zero", " (a term that has it is multiplied by zero)", ""),
    ),
    Odd.NOISE_UNRELATED: FormulaRule(
        Cause.LABELS_SHUFFLED,
        "The noise that the network is asked for is not in its input: at each look the targets, {numbers} entries "
        "of standard normal noise, are correlated with neither the inputs nor the outputs.",
        "Keep the noise that is added to the input, and ask for that; do not draw it once more.",
        "Inputs that are correlated with their targets.",
    ),
    Odd.ONE_LEVEL: FormulaRule(
        Cause.INPUTS_CONSTANT,
        "The network is asked for noise at one level only: input {argument} is {value} for every row of every call "
        "looked at.",
        "Draw the time (the noise level) for each row: torch.rand, or randint up to the number of steps.",
        "Calls in which this input differs.",
        Level.WARNING,
    ),
    Odd.MEAN_SQUARED: _of_a_mean("square"),
    Odd.MEAN_ABSOLUTE: _of_a_mean("absolute value"),
    Odd.MET_BY_ZERO: FormulaRule(
        Cause.ERRORS_CANCEL,
        "A network that answers zero everywhere makes the loss zero: it is a sum of squares of what the network "
        "computes, and nothing in it is compared with a number that is given (a target, a condition at the start "
        "or at a boundary).",
        "Add the term that is to keep the answer from zero: initial and boundary conditions of an equation, the "
        "pairs that are to differ of a comparison.",
        "A term with a given number in it.",
    ),
    Odd.DILUTED: FormulaRule(
        Cause.IGNORED_LABELS_COUNTED,
        "A term of the loss is a mean over {rows} rows of targets, of which {empty} are zero throughout; another "
        "term is taken over the {full} others alone. Where there is no target the network is trained to answer "
        "zero, and the rows that have one count that much less.",
        "Take this mean over the rows that have a target: loss(output[mask], target[mask]).",
        "Zeros that are targets in their own right.",
        Level.WARNING,
        words=lambda n: {"empty": format_share(1 - n["full"] / n["rows"])},
    ),
    Odd.ONE_TARGET: FormulaRule(
        Cause.ERRORS_CANCEL,
        "Only entries with {kept} {target} count in the loss: its mask leaves out all others, {left} of the "
        "targets, so that the same answer everywhere is right everywhere.",
        "Let the other entries count too (with a weight, if they are many), and use the mask for the terms that "
        "only exist at the chosen entries.",
        "Another term that asks for the other targets.",
        words=_either("classes", "kept", "class", "a target of"),
    ),
    Odd.PAIRS_BOTH_WAYS: FormulaRule(
        Cause.ERRORS_CANCEL,
        "Equal scores for all are the best answer to the loss: it asks each pair of scores to differ both ways, as "
        "its mask ({pairs} pairs) holds each pair in both orders.",
        "Take the pairs in which the first is to be above the second: rel_i > rel_j, not rel_i == rel_j.",
        "A mask with a pair in one order only.",
    ),
    Odd.PAIRS_BOUNDED: FormulaRule(
        Cause.OUTPUT_RANGE,
        "The scores whose differences the loss takes are outputs of a {of}: they differ by at most {width}, so "
        "that no pair's loss falls below {least}.",
        "Take the {of} out of the model: a ranking loss takes scores of any size.",
        "Scores that differ by more.",
        Level.WARNING,
    ),
    Odd.LIKELIHOOD_DESCENDED: FormulaRule(
        Cause.LOSS_ASCENDED,
        "Training makes what was observed less likely: the loss is the log-probability of the labels itself, and "
        "it falls without end as that probability goes to zero.",
        "Put a minus sign before the log-likelihood.",
        "A loss that is meant to unlearn these labels.",
        Level.WARNING,
    ),
    Odd.HALF_DESCENDED: FormulaRule(
        Cause.LOSS_ASCENDED,
        "The two halves of the binary cross-entropy have opposite signs: entries whose target is {target} are "
        "trained away from it, so that one answer is the best for all and the loss falls without end.",
        "Put the minus sign before both: -(y * log(p) + (1 - y) * log(1 - p)).",
        "Two halves that fall as the probability of their target grows.",
    ),
    Odd.SOFTMAX_OF_ONE: FormulaRule(
        Cause.WRONG_CLASS_AXIS,
        "The softmax after the last layer runs over axis {axis}, which has length one: it gives {result} whatever "
        "the network computes, and nothing is learned through it.",
        "For one output a row use binary_cross_entropy_with_logits, and sigmoid for probabilities; for several "
        "classes give the network one output a class and apply softmax over these.",
        "A softmax over more than one entry.",
        words=lambda n: {"result": "one" if n["result"] else "the logarithm of one"},
    ),
    Odd.PULLED_AWAY: FormulaRule(
        Cause.LOSS_ASCENDED,
        "Training goes away from the labels: the loss is a function of the {of}, and at each look its gradient "
        "{moves} {share} of the outputs of {which}.",
        "Look at the signs: an overlap (Dice, IoU) is taken from one, 1 - overlap, and a focal factor is a power "
        "of one less the label's probability, (1 - p) ** gamma.",
        "A loss that is meant to unlearn these labels.",
        Level.WARNING,
        words=_away,
    ),
    Odd.BEYOND_REACH: FormulaRule(
        Cause.OUTPUT_RANGE,
        "The network ends in {of}, which keeps its outputs {reach}; {outside} of what the loss compares them with "
        "lies beyond (it goes from {low} to {high}).",
        "Take the {of} after the last layer out of the model, or bring the targets into that range.",
        "Targets that all lie in that range.",
        words=lambda n: {"reach": reach(n["lower"], n["upper"])},
    ),
    Odd.OUTPUTS_CUT: FormulaRule(
        Cause.UNITS_DEAD,
        "The ReLU that the network ends in makes every output zero ({outputs} of a batch), so that no gradient "
        "reaches any layer.",
        "Take the ReLU after the last layer out of the model (softplus or exp where outputs must be positive), and "
        "look at the bias of the last layer.",
        "An output above zero.",
    ),
    Odd.SECOND_DERIVATIVE: FormulaRule(
        Cause.DERIVATIVE_ZERO,
        "The loss takes a second derivative through a ReLU, which is exactly zero: the network is piecewise linear "
        "in what it is differentiated by, so that this term is zero whatever the weights are.",
        "Use a smooth activation function (tanh, SiLU, softplus, sine) where a loss has second derivatives.",
        "A second derivative that is not zero.",
    ),
    Odd.SUMMED: FormulaRule(
        Cause.LOSS_SUMMED,
        "The loss is a sum over the {rows} rows of a batch where a mean is usual, so with SGD the step is that of "
        "a learning rate {rows} times as large, and it grows with the batch.",
        "Use the mean over the batch, or divide the learning rate by {rows}.",
        "A learning rate that was chosen for the sum.",
        Level.WARNING,
    ),
}
