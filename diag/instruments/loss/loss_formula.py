"""The formula of a loss written by hand: does it ask for what it is for, and can it be lowered without end?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from diag.display import format_number, format_share
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import STEP_OF_A_SUM, THRICE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.arithmetic import Odd, Oddity
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic of the formula, read from its graph"
STARTS_AT_ZERO = 1  # looks at which layers that start at zero say nothing
LOOKS_OF_A_WARMUP = 6  # with the one at the 100th pass: a factor that stays at zero until then


@dataclass(frozen=True, kw_only=True, eq=False)
class LossFormula(LoopCheck):
    """What the loop's own arithmetic leaves out, turns round or takes together."""


@instrument(
    source=SOURCE,
    title="Formula of the loss",
    kind="check",
    why="A loss written by hand falls as well where a term is missing or a sign is wrong: what it asks for is then "
    "something else than what is wanted.",
)
def loss_formula(loop: Loop) -> LossFormula:
    """Whether the loss asks for what losses of its form are for.

    Read from the graph of the backward passes that were looked at (the first three, the 10th, the 30th, ...), with
    the masks and results that the graph keeps: errors that are averaged before they are squared; predicted
    variances, task weights and layers of a flow whose logarithm is missing or has the wrong sign; variances that
    a clamp holds; log-likelihoods that are descended; a mask that leaves one target alone, or takes every pair both
    ways; scores that are bounded before they are subtracted; functions that end the network out of reach of the
    targets; the second derivative of a ReLU; sums over the batch with plain SGD. An alarm takes all looks, three at
    least. Raises nothing of its own.
    """
    facts = loop.formula
    seen = Precondition("a loss", facts.looked > 0, "no backward pass from one number was looked at.")
    fine = f"Nothing is missing or turned round in the formula of the loss, at {facts.looked:,} backward passes."
    return judged(LossFormula, loop.step, list(_findings(loop)), fine, preconditions=(seen,))


def _findings(loop: Loop) -> Iterator[LoopFinding]:
    for odd in loop.formula.odd:
        spared = STARTS_AT_ZERO if odd.kind == Odd.COLUMNS_KEPT else 0
        if odd.seen < max(THRICE, loop.formula.looked - spared):
            continue
        late = odd.kind == Odd.NOISE_UNRELATED or bool(odd.numbers.get("weightless"))
        if (late and odd.seen < LOOKS_OF_A_WARMUP) or (odd.kind == Odd.SUMMED and not _is_large(loop, odd)):
            continue
        yield SENTENCES[odd.kind](odd)


def _is_large(loop: Loop, odd: Oddity) -> bool:
    rates = [g.get("lr", 0.0) for o in loop.training if o.kind == "SGD" for g in o.groups]
    return bool(rates) and max(rates) * odd.numbers["rows"] >= STEP_OF_A_SUM and odd.numbers["rows"] > 1


def _told(
    odd: Oddity, cause: Cause, sentence: str, advice: str, refutation: str, level: str = "alarm"
) -> LoopFinding:
    return LoopFinding(Level(level), cause, sentence, advice, refutation, step=odd.first)


def _scale_alone(odd: Oddity) -> LoopFinding:
    how = "multiplied by an exponential" if odd.numbers["exponent"] else "divided by a quantity"
    return _told(
        odd,
        Cause.LOSS_UNBOUNDED,
        f"The loss can be lowered without making any error smaller: its errors are {how} that the network computes "
        "and that enters the loss nowhere else, so that it is driven to where no error counts.",
        "Add the term that pays for it: of a Gaussian half the log-variance, of a learned weight exp(-s) of a task "
        "s/2.",
        "Another term of the loss that depends on it.",
    )


def _scale_falls(odd: Oddity) -> LoopFinding:
    how = "multiplies" if odd.numbers["exponent"] else "divides"
    return _told(
        odd,
        Cause.LOSS_UNBOUNDED,
        f"The loss has no lower bound: the scale that {how} the errors and the term of its logarithm fall "
        f"together, so "
        "that the network lowers both whatever its errors are.",
        "Look at the two signs: of a Gaussian with the log-variance s it is exp(-s) * error**2 + s.",
        "Two terms that pull the scale opposite ways.",
    )


def _flow_alone(odd: Oddity) -> LoopFinding:
    return _told(
        odd,
        Cause.LOSS_UNBOUNDED,
        f"The loss is the squared size of a latent that {int(odd.numbers['layers'])} exponentials of the network "
        "scale, and none of their exponents is a term of it: it falls as the network shrinks everything to one "
        "point. The log-determinant is missing.",
        "Subtract the sum of the exponents of all layers (the log-determinant) from the loss.",
        "A term of the loss with these exponents.",
    )


def _flow_falls(odd: Oddity) -> LoopFinding:
    return _told(
        odd,
        Cause.LOSS_UNBOUNDED,
        f"The loss has no lower bound: the exponents of {int(odd.numbers['layers'])} exponentials that scale the "
        "latent are added to it, so that it falls with them as the squared latent does. The log-determinant "
        "has the "
        "wrong sign.",
        "Subtract the log-determinant from the loss (add it to the log-likelihood).",
        "Exponents that enter the loss with a minus sign.",
    )


def _columns(odd: Oddity) -> LoopFinding:
    count, layers = int(odd.numbers["columns"]), int(odd.numbers["layers"])
    which = f"Column {int(odd.numbers['first'])} is" if count == 1 else f"{count:,} columns are"
    return _told(
        odd,
        Cause.AXES_MIXED,
        f"{which} never scaled: in all {layers} layers of the flow the factor there is exactly one for every row.",
        "Alternate the masks (or exchange the halves) from one coupling layer to the next, so that each column is "
        "transformed by some layer.",
        "A layer whose factor differs from one there.",
        "warning",
    )


def _mean_squared(odd: Oddity) -> LoopFinding:
    what = "square" if odd.kind == Odd.MEAN_SQUARED else "absolute value"
    return _told(
        odd,
        Cause.ERRORS_CANCEL,
        f"The loss is the {what} of the mean of {int(odd.numbers['entries']):,} differences, in which errors of "
        "opposite sign cancel: it is zero as soon as the outputs are right on average.",
        f"Take the {what} of each difference first and the mean afterwards: ((a - b) ** 2).mean().",
        "A loss that is only to bring averages together.",
    )


def _met_by_zero(odd: Oddity) -> LoopFinding:
    return _told(
        odd,
        Cause.ERRORS_CANCEL,
        "An answer of zero everywhere meets the loss: it is a sum of squares of what the network computes, "
        "and nothing "
        "in it is compared with a number that is given (a target, a condition at the start or at a boundary).",
        "Add the term that is to keep the answer from zero: initial and boundary conditions of an equation, the "
        "pairs that are to differ of a comparison.",
        "A term with a given number in it.",
    )


def _diluted(odd: Oddity) -> LoopFinding:
    rows, full = int(odd.numbers["rows"]), int(odd.numbers["full"])
    return _told(
        odd,
        Cause.IGNORED_LABELS_COUNTED,
        f"A term of the loss is a mean over {rows:,} rows of targets, of which "
        f"{format_share(1 - full / rows)} are zero "
        f"throughout; another term is taken over the {full:,} others alone. Where there is no target the "
        f"network is "
        "trained to answer zero, and the rest counts as much less.",
        "Take this mean over the rows that have a target: loss(output[mask], target[mask]).",
        "Zeros that are targets in their own right.",
        "warning",
    )


def _clamped(odd: Oddity) -> LoopFinding:
    return _told(
        odd,
        Cause.LOSS_UNBOUNDED,
        f"{format_share(odd.numbers['share'])} of the variances that the loss divides by lie at the "
        f"{format_number(odd.numbers['least'])} that a clamp keeps them at: there they have no gradient, and "
        f"an error "
        f"counts {format_number(1 / odd.numbers['least'])} times.",
        "Make the variance positive by softplus or exp of the output, and add a small number to it.",
        "Variances above the clamp.",
    )


def _descended(odd: Oddity) -> LoopFinding:
    return _told(
        odd,
        Cause.LOSS_ASCENDED,
        "Training makes what was observed less likely: the loss is the log-probability of the labels "
        "itself, and it "
        "falls without end as that goes to zero.",
        "Put a minus sign before the log-likelihood.",
        "A loss that is meant to unlearn these labels.",
        "warning",
    )


def _one_kind(odd: Oddity) -> LoopFinding:
    target = format_number(odd.numbers["target"])
    kept = f"class {target}" if odd.numbers["classes"] else f"a target of {target}"
    return _told(
        odd,
        Cause.ERRORS_CANCEL,
        f"Only entries with {kept} count in the loss: its mask leaves out all others, "
        f"{format_share(odd.numbers['left'])} "
        "of the targets, so that the same answer everywhere is right everywhere.",
        "Let the other entries count too (with a weight, if they are many), and use the mask for the terms "
        "that only "
        "exist at the chosen entries.",
        "Another term that asks for the other targets.",
    )


def _both_ways(odd: Oddity) -> LoopFinding:
    return _told(
        odd,
        Cause.ERRORS_CANCEL,
        f"The loss asks each pair of scores to differ both ways: its mask ({int(odd.numbers['pairs']):,} pairs) is "
        "the same with the two exchanged, and equal scores are the best answer.",
        "Take the pairs in which the first is to be above the second: rel_i > rel_j, not rel_i == rel_j.",
        "A mask with a pair in one order only.",
    )


def _bounded(odd: Oddity) -> LoopFinding:
    return _told(
        odd,
        Cause.OUTPUT_RANGE,
        f"The scores whose differences the loss takes are outputs of a {odd.of}: they differ by at most "
        f"{format_number(odd.numbers['width'])}, so that no pair's loss falls below "
        f"{format_number(odd.numbers['least'])}.",
        f"Take the {odd.of} out of the model: a ranking loss takes scores of any size.",
        "Scores that differ by more.",
        "warning",
    )


def _beyond(odd: Oddity) -> LoopFinding:
    n = odd.numbers
    reach = f"between {format_number(n['lower'])} and {format_number(n['upper'])}"
    reach = f"above {format_number(n['lower'])}" if n["upper"] == float("inf") else reach
    return _told(
        odd,
        Cause.OUTPUT_RANGE,
        f"The network ends in {odd.of}, which keeps its outputs {reach}; {format_share(n['outside'])} of "
        f"what the loss "
        f"compares them with lies beyond (it goes from {format_number(n['low'])} to {format_number(n['high'])}).",
        f"Take the {odd.of} after the last layer out of the model, or bring the targets into that range.",
        "Targets that all lie in that range.",
    )


def _cut(odd: Oddity) -> LoopFinding:
    return _told(
        odd,
        Cause.UNITS_DEAD,
        f"The ReLU that the network ends in makes every output zero ({int(odd.numbers['outputs']):,} of a "
        f"batch), so "
        "that no gradient reaches any layer.",
        "Take the ReLU after the last layer out of the model (softplus or exp where outputs must be positive), and "
        "look at the bias of the last layer.",
        "An output above zero.",
    )


def _second_derivative(odd: Oddity) -> LoopFinding:
    return _told(
        odd,
        Cause.DERIVATIVE_ZERO,
        "The loss takes a second derivative through a ReLU, which is exactly zero: the network is piecewise "
        "linear in "
        "what it is differentiated by, so that this term is nothing whatever its weights are.",
        "Use a smooth activation function (tanh, SiLU, softplus, sine) where a loss has second derivatives.",
        "A second derivative that is not zero.",
    )


def _summed(odd: Oddity) -> LoopFinding:
    rows = int(odd.numbers["rows"])
    return _told(
        odd,
        Cause.LOSS_SUMMED,
        f"The loss is a sum over the {rows:,} rows of a batch where a mean is usual, so with SGD the step is "
        f"that of a "
        f"learning rate {rows:,} times as large, and it grows with the batch.",
        f"Use the mean over the batch, or divide the learning rate by {rows:,}.",
        "A learning rate that was chosen for the sum.",
        "warning",
    )


def _noise(odd: Oddity) -> LoopFinding:
    zero = " (a term that has it is multiplied by zero)" if odd.numbers["weightless"] else ""
    return _told(
        odd,
        Cause.LOSS_UNBOUNDED,
        "The network adds noise to its code, mean + exp(s) * noise, and nothing in the loss keeps that noise from "
        f"vanishing: no term but the noise itself depends on s{zero}, so that training takes it away.",
        "Add the KL divergence of the code from the standard normal distribution (of a policy, its entropy) to the "
        "loss.",
        "A term of the loss that grows as s falls.",
        "warning",
    )


def _unrelated(odd: Oddity) -> LoopFinding:
    return _told(
        odd,
        Cause.LABELS_SHUFFLED,
        f"The noise that the network is asked for is not in its input: of {int(odd.numbers['numbers']):,} "
        f"entries of "
        "standard normal targets neither the inputs nor the outputs have any correlation with them, at each look.",
        "Keep the noise that is added to the input, and ask for that; do not draw it once more.",
        "Inputs that are correlated with their targets.",
    )


def _level(odd: Oddity) -> LoopFinding:
    return _told(
        odd,
        Cause.INPUTS_CONSTANT,
        f"The network is asked for noise at one level only: input {int(odd.numbers['argument'])} is "
        f"{format_number(odd.numbers['value'])} for every row of every call looked at.",
        "Draw the time (the noise level) for each row: torch.rand, or randint up to the number of steps.",
        "Calls in which this input differs.",
        "warning",
    )


SENTENCES: dict[Odd, Callable[[Oddity], LoopFinding]] = {
    Odd.SCALE_UNPAID: _scale_alone,
    Odd.SCALE_FALLS: _scale_falls,
    Odd.VARIANCE_CLAMPED: _clamped,
    Odd.FLOW_UNPAID: _flow_alone,
    Odd.FLOW_FALLS: _flow_falls,
    Odd.COLUMNS_KEPT: _columns,
    Odd.NOISE_UNPAID: _noise,
    Odd.NOISE_UNRELATED: _unrelated,
    Odd.ONE_LEVEL: _level,
    Odd.MEAN_SQUARED: _mean_squared,
    Odd.MEAN_ABSOLUTE: _mean_squared,
    Odd.MET_BY_ZERO: _met_by_zero,
    Odd.DILUTED: _diluted,
    Odd.ONE_TARGET: _one_kind,
    Odd.PAIRS_BOTH_WAYS: _both_ways,
    Odd.PAIRS_BOUNDED: _bounded,
    Odd.LIKELIHOOD_DESCENDED: _descended,
    Odd.BEYOND_REACH: _beyond,
    Odd.OUTPUTS_CUT: _cut,
    Odd.SECOND_DERIVATIVE: _second_derivative,
    Odd.SUMMED: _summed,
}
