"""What is wrong with what reaches the layers, and the sentence where nothing is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from diag.display import format_number, format_share
from diag.errors import counted, named, of_the_steps
from diag.instruments.causes import Cause
from diag.instruments.gradient_flow.fields import RecordedFlow
from diag.result import OUR_CHOICE, Confidence, Level, Verdict

SOURCE = (
    "arithmetic for what is not finite; Hoffer, Hubara, Soudry 2017, arXiv:1705.08741, for the distance; Roberts, "
    "Yaida, Hanin 2022, arXiv:2106.10165, for the depth"
)
HALVINGS = 16  # by which a GradScaler's first scale, 2^16, comes down to one: so it is found
LEFT = 5.0  # times the first loss
SEEN_SHARE = 0.95  # of the steps (our choice), from which on what was seen speaks for all
LONGEST_GAP = 0.2  # of the steps (our choice): gradients read at some steps speak for all, if never longer apart
STEPS_BEFORE_ZERO_GRADIENT = 10  # steps; what starts at zero on purpose gets its gradient after the first ones


def verdicts_on_flow(flow: RecordedFlow) -> Iterator[Verdict | None]:
    """Worst first: arithmetic before theory, and a description at the end."""
    yield _non_finite(flow)
    yield _unseen(flow)
    yield _idle(flow)
    yield _many_skipped(flow)
    yield _vanishing(flow)
    left = flow.loss_growth > LEFT  # whether training went well is not judged here, and is not to seem so
    whole = _is_seen(flow, flow.losses_seen) and _gradients_speak_for_all(flow) and not flow.unseen_layers
    yield Verdict(
        (Level.DESCRIPTION if left else Level.OK) if whole else Level.UNKNOWN,
        f"{_finite(flow)}{_skips(flow)}{_growth(flow)}.",
        source=SOURCE,
        confidence=Confidence.ARITHMETIC,
        value=0.0,
        threshold=0.0,
    )


def _non_finite(flow: RecordedFlow) -> Verdict | None:
    if not flow.non_finite_losses and not flow.non_finite_applied:
        return None
    found = []
    if flow.non_finite_losses:
        found.append(f"the loss was not finite at {_steps(flow.non_finite_losses, flow.loss_steps)}")
    if flow.non_finite_applied:
        found.append(
            f"gradients were not finite at {_steps(flow.non_finite_gradients, flow.gradient_steps)}, and the "
            f"optimizer took {flow.non_finite_applied:,} of these steps"
        )
    text = " and ".join(found)
    return Verdict(
        Level.ALARM,
        f"{text[0].upper()}{text[1:]} (of {flow.num_steps:,} recorded).",
        advice="Look at the batch of the first such step; then lower the learning rate, warm it up, or clip "
        "the gradient; under float16 use a GradScaler.",
        source="arithmetic",
        confidence=Confidence.ARITHMETIC,
        refutation="Compute the loss of that batch again in float64 from the state before the step: if it is "
        "finite, the precision is to blame, not the batch.",
        value=float(flow.non_finite_losses + flow.non_finite_applied),
        threshold=0.0,
        threshold_source="any step at all",
        layers=flow.gradient_layers[:5],
        cause=Cause.NOT_FINITE,
        explained_by=(Cause.NOT_FINITE, Cause.DATA_NOT_FINITE, Cause.GRADIENT_UNDERFLOW),
        step=flow.loss_steps[0] if flow.loss_steps else None,
    )


def _idle(flow: RecordedFlow) -> Verdict | None:
    if not flow.idle_layers or flow.gradients_seen < STEPS_BEFORE_ZERO_GRADIENT:
        return None
    return Verdict(
        Level.WARNING,
        f"The gradient of {len(flow.idle_layers):,} of {len(flow.layers):,} parameter tensors was exactly zero "
        f"{_span(flow, flow.gradients_seen)}: {named(flow.idle_layers)}.",
        advice="Check that these layers take part in the loss: dead ReLUs, a zero factor in front of a branch, "
        "labels that mask it, or gradients too small for half precision leave a layer without a gradient.",
        source="arithmetic",
        confidence=Confidence.ARITHMETIC,
        refutation="A single step on other data with a gradient other than zero in these tensors.",
        value=float(len(flow.idle_layers)),
        threshold=0.0,
        threshold_source="any tensor at all",
        layers=flow.idle_layers,
        explained_by=(
            Cause.GRADIENT_UNDERFLOW,
            Cause.UNITS_DEAD,
            Cause.GRAPH_CUT,
            Cause.INITIALIZATION_CONSTANT,
            Cause.OUTPUT_CONSTANT,
            Cause.INPUTS_CONSTANT,
            Cause.PARAMETER_IN_NO_OPTIMIZER,
            Cause.LEARNING_RATE_ZERO,
            Cause.GRADIENTS_ZEROED_BEFORE_STEP,
        ),
    )


def _many_skipped(flow: RecordedFlow) -> Verdict | None:
    limit = flow.setting("skipped_share")
    share = flow.skipped_steps / max(flow.num_steps, 1)
    if share <= limit or flow.skipped_steps <= HALVINGS:
        return None
    return Verdict(
        Level.WARNING,
        f"The GradScaler left out {format_share(share)} of the steps ({flow.skipped_steps:,} of "
        f"{flow.num_steps:,}), first at step {flow.skipped_step_numbers[0]:,}.",
        advice="A few skips are how the scale is found; so many say that gradients overflow float16 again and "
        "again: use bfloat16, or look for the layer whose gradient is not finite.",
        source="torch.amp.GradScaler",
        confidence=Confidence.ARITHMETIC,
        refutation="A run in bfloat16 or float32 whose gradients are as large.",
        value=share,
        threshold=limit,
        threshold_source=OUR_CHOICE,
        layers=flow.gradient_layers[:5],
        explained_by=(
            Cause.SCALER_SKIPS_FOREVER,
            Cause.NOT_FINITE,
            Cause.DATA_NOT_FINITE,
            Cause.INPUTS_NOT_NORMALIZED,
            Cause.TARGETS_NOT_NORMALIZED,
        ),
    )


def _vanishing(flow: RecordedFlow) -> Verdict | None:
    limit = flow.setting("depth_factor")
    strays = flow.depth_factor < 1 / limit or flow.depth_factor > limit
    if not (flow.plain_network and strays):
        return None
    word = "vanishes" if flow.depth_factor < 1 else "explodes"
    return Verdict(
        Level.ALARM,
        f"The gradient {word} over the depth at initialisation: by a factor of "
        f"{format_number(flow.depth_factor)} from the last layer's bias to the first's.",
        advice="Scale the initial weights for the activation (variance 2 / fan-in for ReLU, 1 / fan-in for "
        "tanh), or add normalisation or skip connections.",
        source="Roberts, Yaida, Hanin 2022, arXiv:2106.10165",
        confidence=Confidence.STRONG_EMPIRICAL,
        refutation="The factor over several seeds: in a narrow, deep network a single draw fluctuates.",
        value=flow.depth_factor,
        threshold=limit,
        threshold_source=OUR_CHOICE,
    )


def _unseen(flow: RecordedFlow) -> Verdict | None:
    """No gradient at all, or weights that never moved: that nothing was infinite then says nothing."""
    if flow.num_steps < STEPS_BEFORE_ZERO_GRADIENT or (flow.gradients_seen and not flow.still):
        return None
    nothing = not flow.gradients_seen
    if nothing and not flow.layers:
        return Verdict(
            Level.UNKNOWN,
            "The record has no layers, as that of a log has none, so nothing is known of their gradients.",
            source="arithmetic",
            confidence=Confidence.ARITHMETIC,
        )
    found = "No gradient was seen" if nothing else "No weight moved"
    return Verdict(
        Level.UNKNOWN if nothing else Level.WARNING,
        f"{found} at any of the {flow.num_steps:,} steps recorded.",
        advice="Call backward() on the loss itself, zero gradients before it and not between it and the step, "
        "and look at the learning rate and at the run's notes.",
        source="arithmetic",
        confidence=Confidence.ARITHMETIC,
        refutation="A gradient at a step of the optimizer, and a weight that is another after it.",
        explained_by=(Cause.GRAPH_CUT, Cause.GRADIENTS_ZEROED_BEFORE_STEP, Cause.LEARNING_RATE_ZERO,
                      Cause.WEIGHTS_UNCHANGED, Cause.UNITS_DEAD, Cause.OUTPUT_CONSTANT,
                      Cause.SCALER_SKIPS_FOREVER, Cause.GRADIENT_UNDERFLOW, Cause.STEP_BEFORE_BACKWARD),
    )  # fmt: skip


def _finite(flow: RecordedFlow) -> str:
    """What was finite: only what was seen."""
    if not flow.gradients_seen and not flow.losses_seen:
        return f"No loss and no gradient was seen at any of the {flow.num_steps:,} steps recorded"
    seen = flow.losses_seen, flow.gradients_seen
    if seen == (flow.num_steps, flow.num_steps):
        found = f"Losses and gradients were finite {_span(flow, flow.num_steps)}"
    elif seen[0] == flow.num_steps and _gradients_speak_for_all(flow):
        found = (
            f"Losses were finite {_span(flow, seen[0])}, and gradients at the {seen[1]:,} of them at which they "
            "were read"
        )
    else:
        found = (
            f"Of {flow.num_steps:,} steps recorded, losses at {seen[0]:,} and gradients at {seen[1]:,} were "
            "seen, and these were finite"
        )
    if not flow.unseen_layers or not flow.gradients_seen:
        return found
    return (
        f"{found}; {len(flow.unseen_layers):,} of the {len(flow.layers):,} parameter tensors had no gradient "
        f"at any step ({named(flow.unseen_layers)})"
    )


def _span(flow: RecordedFlow, seen: int) -> str:
    if len(flow.steps) <= 1:
        return "at the one state measured"
    return f"at {of_the_steps(seen, seen, flow.num_steps)}"


def _skips(flow: RecordedFlow) -> str:
    if not flow.skipped_steps:
        return ""
    return f" or were skipped by the GradScaler ({flow.skipped_steps:,} steps, as it finds its scale)"


def _growth(flow: RecordedFlow) -> str:
    if not flow.last_fitted_step:
        return ""
    log, sqrt = flow.r2_by_law["log"], flow.r2_by_law["sqrt"]
    word = "better" if log > sqrt else "worse"
    return (
        f"; over steps {flow.first_fitted_step:,} to {flow.last_fitted_step:,} the logarithmic law fits the "
        f"distance from the start {word} than sqrt (R^2 {log:.3f} and {sqrt:.3f})"
    )


def _is_seen(flow: RecordedFlow, steps: int) -> bool:
    """Whether what was seen at so many steps speaks for all."""
    return steps >= SEEN_SHARE * flow.num_steps


def _gradients_speak_for_all(flow: RecordedFlow) -> bool:
    """Whether they were seen at nearly all steps, or all through the run: a gradient in between that was not
    finite, and was applied, would have made the losses after it so."""
    return _is_seen(flow, flow.gradients_seen) or flow.longest_unread <= LONGEST_GAP * flow.num_steps


def _steps(count: int, numbers: Sequence[int]) -> str:
    listed = ", ".join(f"{n:,}" for n in numbers[:3]) + (", ..." if count > 3 else "")
    return f"{counted(count, 'step')} ({listed})"
