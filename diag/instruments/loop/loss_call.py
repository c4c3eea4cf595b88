"""Is the loss function called on what it expects?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, STEP_OF_A_SUM, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition
from diag.snapshot.loop.arithmetic import ArithmeticFacts, Expansion
from diag.snapshot.loop.data import OF_BINARY_TARGETS, LossFacts
from diag.snapshot.loop.facts import Loop

CALLS_NEEDED = 3  # calls whose numbers were looked at
HARDLY_ANY_CLASS = 0.995  # entropy over the largest
PADDED, FILLED = 0.05, 0.1  # of the targets
LOG_INPUT = ("nll_loss", "kl_div")
SOFTMAX_INSIDE = ("cross_entropy",)
SIGMOID_INSIDE = ("binary_cross_entropy_with_logits",)


@dataclass(frozen=True, kw_only=True, eq=False)
class LossCall(LoopCheck):
    """A loss function that is called on the wrong kind of numbers or shapes."""


@instrument(
    source=SOURCE,
    title="Call of the loss function",
    kind="check",
    before_training="always",
    why="A loss function that is given what it does not expect returns a number all the same: the training "
    "descends something else than was meant.",
)
def loss_call(loop: Loop) -> LossCall:
    """Whether the loss function gets what it expects: logits or log-probabilities, shapes that fit, whole targets.

    What made its input is read from the graph; the numbers of the first three calls are looked at besides, for rows
    that are probabilities within rounding. Padding counts where the embedding's padding index is among the targets,
    or one number fills the ends of their sequences to different lengths and stands nowhere else, and the loss
    ignores another. log_softmax before cross_entropy changes nothing and is not reported. Of the loop's own
    arithmetic the graph says whether two sides were broadcast against each other before all was summed, and whether
    an output that is a softmax or sigmoid is given to one again.

    Raises nothing of its own.
    """
    seen = Precondition("a loss function", bool(loop.losses), "no call of a loss function of torch was seen.")
    kinds = ", ".join(dict.fromkeys(f.function or "the loss" for f in loop.losses))
    fine = f"{kinds} is called on what it expects."
    findings = [finding for f in loop.losses for finding in _findings(f)]
    findings += [_summed(f) for f in loop.losses if _is_summed(f, loop)]
    known = {f.cause for f in findings}
    findings += [f for f in _of_arithmetic(loop.arithmetic) if f.cause not in known]
    return judged(LossCall, loop.step, findings, fine, preconditions=(seen,))


def _of_arithmetic(a: ArithmeticFacts) -> Iterator[LoopFinding]:
    """What the loop's own arithmetic does with the outputs."""
    for e in a.expanded:
        yield _expanded(e)
    if a.twice:
        inside = Cause.DOUBLE_SOFTMAX if a.twice == "softmax" else Cause.DOUBLE_SIGMOID
        yield LoopFinding(
            Level.ALARM,
            inside,
            f"The model's output is a {a.twice} already, and the loss takes the {a.twice} of it again, so that its "
            "probabilities stay near one another and its gradients shrink.",
            f"Take the {a.twice} out of the model, or give what is named probs (not logits) the probabilities.",
            "Outputs of the model that are negative or exceed one.",
            step=a.twice_step,
        )


def _expanded(e: Expansion) -> LoopFinding:
    what = "takes the difference" if e.operation == "difference" else "takes the product"
    of = "every output and every target" if e.operation == "difference" else "every entry of one and every other's"
    return LoopFinding(
        Level.ALARM,
        Cause.TARGETS_BROADCAST,
        f"The loss {what} of {of}, of other examples too: {_shape(e.shape)} and {_shape(e.other)} are broadcast "
        "against each other, and all of it is summed.",
        "Bring both to one shape: squeeze(1) of the one, or unsqueeze(1) of the other.",
        "Two sides of equal shape.",
        step=e.step,
    )


def _findings(f: LossFacts) -> Iterator[LoopFinding]:
    always = f.checked >= min(CALLS_NEEDED, f.calls) and f.checked > 0
    probabilities = f.came_from == "softmax" or (
        always and f.probabilities == f.checked and f.checked >= CALLS_NEEDED
    )
    if f.broadcast:
        yield _broadcast(f)
    if f.function in SOFTMAX_INSIDE and (probabilities or f.came_from == "sigmoid"):
        yield _double(f, Cause.DOUBLE_SOFTMAX, "softmax")
    if f.function in SIGMOID_INSIDE and (f.came_from == "sigmoid" or probabilities):
        yield _double(f, Cause.DOUBLE_SIGMOID, "the sigmoid")
    if f.flat:
        yield _flat(f)
    if f.function in LOG_INPUT:
        yield from _log_input(f, probabilities, always)
    if f.truncated > 0:
        yield _truncated(f)
    elif f.constant >= CALLS_NEEDED and f.function in OF_BINARY_TARGETS:
        yield _constant(f)
    if f.function in OF_BINARY_TARGETS and (f.lowest < 0 or f.highest > 1):
        yield _outside(f)
    if f.even_calls >= CALLS_NEEDED and f.evenness > HARDLY_ANY_CLASS:
        yield _even_targets(f)
    if f.several > 1:
        yield _several(f)
    if f.root and f.factor is not None and f.factor < 0:
        yield _ascended(f, f"backward() is called on {f.function} times {f.factor:.3g}")
    elif f.ascended and not f.root:
        yield _ascended(f, f"{f.function} has a minus sign in the sum that backward() is called on")
    if f.reduction == "none" and not f.averaged:
        return
    if f.padded >= PADDED and f.padding is not None and f.ignored != f.padding:
        yield _padding(f, f.padding, f.padded, "the padding index of the model's embedding")
    elif f.filler is not None and _is_counted(f):
        yield _padding(f, f.filler, f.filled, "which fills the ends of sequences and stands nowhere else")


def _log_input(f: LossFacts, probabilities: bool, always: bool) -> Iterator[LoopFinding]:
    axis = 1 if f.function == "nll_loss" else len(f.input_shape) - 1
    # kl_div sums over whatever axis: the classes of a picture may lie on any but the examples'.
    wrong = f.over_axis != axis if f.function == "nll_loss" else f.over_axis == 0 < axis
    if f.came_from in ("softmax", "log_softmax") and f.over_axis is not None and wrong:
        yield _axis(f, axis)
    elif probabilities:
        yield _logs(f, "probabilities")
    elif f.function == "nll_loss" and always and f.checked >= CALLS_NEEDED and not f.log_probabilities:
        yield _logs(f, "numbers that are no log-probabilities over the classes (axis 1)")


def _flat(f: LossFacts) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.GRAPH_CUT,
        f"{f.function} is called on what {f.flat} made of the outputs, and its derivative is zero everywhere: no "
        "gradient passes to the network.",
        f"Train on the outputs themselves, and use {f.flat} only for what is reported.",
        "A gradient of the last layer that is not zero.",
        step=f.first_step,
    )


def _broadcast(f: LossFacts) -> LoopFinding:
    what = f"{f.function} compares" if f.function else "The loss compares"
    shapes = f"outputs {_shape(f.input_shape)} and targets {_shape(f.target_shape)}"
    return LoopFinding(
        Level.ALARM,
        Cause.TARGETS_BROADCAST,
        f"{what} every output with every target: {shapes} are broadcast against each other.",
        "Bring both to one shape: outputs.squeeze(1), or targets.unsqueeze(1).",
        "Outputs and targets of equal shape.",
        step=f.first_step,
    )


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _double(f: LossFacts, cause: Cause, inside: str) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        cause,
        f"{f.function} is called on probabilities and applies {inside} to them again, so its gradients shrink "
        "and it cannot come near zero.",
        f"Give {f.function} the raw outputs (logits): take the softmax or sigmoid out of the model.",
        "Inputs of the loss that are negative or exceed one.",
        step=f.first_step,
    )


def _logs(f: LossFacts, what: str) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.LOGITS_INTO_PROBABILITY_LOSS,
        f"{f.function} expects log-probabilities and is called on {what}.",
        f"Apply log_softmax over the classes before {f.function}, or use cross_entropy on the raw outputs.",
        "Rows whose exponentials add up to one.",
        step=f.first_step,
    )


def _axis(f: LossFacts, axis: int) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.WRONG_CLASS_AXIS,
        f"{f.came_from} runs over axis {f.over_axis} of the outputs {_shape(f.input_shape)}, and {f.function} "
        f"takes the classes from axis {axis}.",
        f"Apply {f.came_from} over the classes: dim={axis}.",
        "Rows over the classes whose probabilities add up to one.",
        step=f.first_step,
    )


def _truncated(f: LossFacts) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.TARGETS_CAST,
        f"The targets are cut to whole numbers ({f.target_dtype}) before {f.function}: the data has fractions, and "
        f"up to {f.truncated:.2g} is lost.",
        "Keep the targets floating: .float() instead of .long() or .int().",
        "Data whose targets are whole numbers.",
        step=f.first_step,
    )


def _constant(f: LossFacts) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.TARGETS_CAST,
        f"All targets that {f.function} gets are one number, while those of the data differ: they lost their "
        "values on the way.",
        "Look for .int() or .long() after a scaling, or for a comparison that is never true.",
        "A batch whose targets differ.",
        step=f.first_step,
    )


def _outside(f: LossFacts) -> LoopFinding:
    return LoopFinding(
        Level.ALARM,
        Cause.TARGETS_OUT_OF_RANGE,
        f"{f.function} expects targets between 0 and 1 and gets some from {f.lowest:.3g} to {f.highest:.3g}: "
        "then the loss has no lower bound.",
        "Bring the targets to 0 and 1: class numbers that begin at one, or a mask up to 255.",
        "Targets between 0 and 1.",
        step=f.first_step,
    )


def _even_targets(f: LossFacts) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.TARGETS_ALL_EQUAL,
        f"The targets of {f.function} hardly prefer any class: in all {f.even_calls:,} calls looked at their "
        f"entropy is {100 * f.evenness:.4g} % or more of the largest that it can be.",
        "Look at whether the teacher was trained and its weights are loaded, and lower the temperature that "
        "divides its answers.",
        "A batch of targets that prefer some classes.",
        step=f.first_step,
    )


def _several(f: LossFacts) -> LoopFinding:
    softmax = "its softmax" if f.function in SOFTMAX_INSIDE else "the softmax before it"
    return LoopFinding(
        Level.WARNING,
        Cause.TARGETS_OUT_OF_RANGE,
        f"{f.function} is called on rows that have up to {f.several:,} classes at once, and {softmax} shares one "
        "among them.",
        "Use binary_cross_entropy_with_logits on the raw outputs for several classes at once, or divide each "
        "row by its sum.",
        "Rows of targets whose sum is one.",
        step=f.first_step,
    )


def _ascended(f: LossFacts, how: str) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,  # an adversary, or unlearning, goes up a loss on purpose
        Cause.LOSS_ASCENDED,
        f"Training goes up the loss: {how}.",
        "Call backward() on the loss itself, without the minus sign.",
        "A loss that is meant to grow, as an adversary's.",
        step=f.first_step,
    )


def _is_summed(f: LossFacts, loop: Loop) -> bool:
    rates = [g.get("lr", 0.0) for o in loop.training if o.kind == "SGD" for g in o.groups]
    whole = f.reduction == "sum" and f.root and f.factor == 1
    return whole and bool(rates) and max(rates) * _examples(f) >= STEP_OF_A_SUM


def _examples(f: LossFacts) -> int:
    return f.input_shape[0] if f.input_shape else 1


def _summed(f: LossFacts) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.LOSS_SUMMED,
        f"{f.function} is a sum over {_examples(f):,} examples where a mean is usual, so with SGD the step is that "
        f"of a learning rate {_examples(f):,} times as large, and it grows with the batch.",
        f"Use reduction='mean', or divide the learning rate by {_examples(f):,}.",
        "A learning rate that was chosen for the sum.",
        step=f.first_step,
        confidence=Confidence.WEAK_EMPIRICAL,
    )


def _is_counted(f: LossFacts) -> bool:
    """Whether what fills the ends of the sequences was seen often enough, and nothing keeps it from counting."""
    seen = f.filled_calls >= CALLS_NEEDED and f.filled >= FILLED
    return seen and f.ignored != f.filler and not f.weighted


def _padding(f: LossFacts, index: int, share: float, what: str) -> LoopFinding:
    return LoopFinding(
        Level.WARNING,
        Cause.IGNORED_LABELS_COUNTED,
        f"Padding counts in the loss: up to {share:.0%} of the targets of a batch are {index}, {what}.",
        f"Give {f.function} ignore_index={index}.",
        "Targets in which this number stands for a real token.",
        step=f.first_step,
    )
