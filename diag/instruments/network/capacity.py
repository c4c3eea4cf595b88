"""Capacity: whether so little of the signal is let through that the network cannot fit its data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.display import format_share
from diag.errors import layers_called
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import LoopCheck, LoopFinding, judged
from diag.ranges import Share
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.facts import Loop

SOURCE = "arithmetic on the model's modules"
DROPPED = 0.9


@dataclass(frozen=True, kw_only=True, eq=False)
class Capacity(LoopCheck):
    """Layers that let hardly anything through."""

    cites = SOURCE


@instrument(
    source=SOURCE,
    title="Capacity",
    kind="check",
    why="What passes through nearly no units, or through a single number, cannot tell the classes apart, "
    "however long it trains.",
)
def capacity(loop: Loop, *, dropped: Share = DROPPED) -> Capacity:
    """Whether dropout leaves nearly no units, a classifier has a single number to separate its classes by, or no
    activation function stands between the layers.

    loop: the facts of the loop, with the model's last linear layer and dropout modules. A warning where a dropout
    module has a rate of `dropped` or more, where the last linear layer, which gives the logits of a classification
    loss, has one input, and where the graph shows a network of linear layers alone. Raises nothing of its own.
    """
    shape = loop.shape
    known = Precondition("layers", bool(shape.head or shape.dropouts), "no linear layer and no dropout was seen.")
    fine = "Neither dropout nor the last layer cuts off nearly all of the signal."
    findings = [*_findings(loop, dropped), *_linear(loop)]
    return judged(Capacity, loop.step, findings, fine, preconditions=(known,))


def _linear(loop: Loop) -> Iterator[LoopFinding]:
    names = loop.depth.linear
    if not names:
        return
    yield LoopFinding(
        Level.WARNING,
        Cause.UNDERFITTING,
        f"No activation function stands between the network's {len(names)} linear layers, so that together they "
        "compute nothing that a single one could not.",
        "Put an activation function after each linear layer but the last: nn.ReLU(), nn.GELU().",
        "A network that is meant to be linear.",
        step=1,
        layers=tuple(name.rpartition(".")[0] for name in names),
    )


def _findings(loop: Loop, dropped: float) -> Iterator[LoopFinding]:
    shape = loop.shape
    high = [(name, rate) for name, rate in shape.dropouts if rate >= dropped]
    if high:
        worst = max(rate for _, rate in high)
        rest = f"multiplies them by {1 / (1 - worst):.0f}" if worst < 1 else "nothing is left"
        yield LoopFinding(
            Level.WARNING,
            Cause.UNDERFITTING,
            f"Dropout of {worst:g} ({layers_called([name for name, _ in high])}) leaves {format_share(1 - worst)} "
            f"of the units in each training step and {rest}, far more than helps training (rates of 0.1 to 0.5 are "
            "common).",
            "Use a rate of 0.1 to 0.5; p is the share that is dropped, not kept.",
            "At a rate of 0.5 the training loss falls no lower.",
            step=1,
            layers=tuple(name for name, _ in high),
        )
    classifies = any(
        f.of_log_probabilities and len(f.input_shape) > 1 and f.input_shape[1] == shape.head_outputs
        for f in loop.losses
    )
    if shape.head_inputs == 1 and shape.head_outputs > 1 and classifies:
        yield LoopFinding(
            Level.WARNING,
            Cause.UNDERFITTING,
            f"The last layer ({shape.head}) tells {shape.head_outputs:,} classes by a single number: the layer "
            "before it has one unit.",
            "Make the layer before it wider: at least as wide as there are classes.",
            "With a wider layer the training loss falls no lower.",
            step=1,
            layers=(shape.head,),
        )
