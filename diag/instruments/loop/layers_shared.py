"""Are layers that are meant to be separate one, or layers that are meant to be one separate?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diag.errors import counted, named
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, LoopCheck, LoopFinding, judged, parameters_named
from diag.registry import instrument
from diag.result import Level
from diag.snapshot.loop.facts import Loop


@dataclass(frozen=True, kw_only=True, eq=False)
class LayersShared(LoopCheck):
    """Layers that share their parameters, or no longer do."""


@instrument(
    source=SOURCE,
    title="Shared and tied layers",
    kind="check",
    before_training="always",
    why="Layers that are one by mistake have a fraction of the capacity that was meant; ones that should be "
    "tied and are not drift apart.",
)
def layers_shared(loop: Loop) -> LayersShared:
    """Whether layers share parameters as they are meant to.

    One module at several places of one list ([layer] * n) has one set of weights. An embedding and an output layer
    that start with equal numbers and are two tensors were meant to be tied. Separate layers that start equal are
    reported only if they are still equal after steps, as their gradients then always are, too.

    Raises nothing of its own.
    """
    fine = f"{counted(len(loop.layers.tied), 'tied parameter')}; no container holds one layer several times."
    return judged(LayersShared, loop.step, list(_findings(loop)), fine)


def _findings(loop: Loop) -> Iterator[LoopFinding]:
    facts = loop.layers
    for names in facts.shared:
        yield LoopFinding(
            Level.WARNING,
            Cause.LAYERS_SHARED,
            f"Layers {named(names)} are one module with one set of weights: changing one changes all {len(names)}.",
            "Make each layer by itself: nn.ModuleList([Layer() for _ in range(n)]) instead of [layer] * n.",
            "Layers whose parameters are different tensors; leave it if the sharing is meant.",
            layers=names,
        )
    for pair in (*facts.untied, *(p for p in facts.embedding_pairs if p not in facts.untied)):
        yield LoopFinding(
            Level.WARNING,
            Cause.LAYERS_UNTIED,
            f"{parameters_named(pair)} were meant to be tied and are two tensors, which drift apart.",
            "Assign the parameter itself (head.weight = embedding.weight), after loading and moving the model.",
            "One tensor under both names.",
            layers=pair,
        )
    trained = {p.name for p in loop.parameters if p.gradient and p.optimizers}
    still = [pair for pair in facts.still_equal if set(pair) <= trained]
    if still:
        yield LoopFinding(
            Level.WARNING,
            Cause.LAYERS_START_EQUAL,
            f"{parameters_named(still[0])} started with the same numbers and are still equal after "
            f"{counted(loop.step, 'step')}: they get the same gradients and do the work of one.",
            "Initialise each layer by itself instead of copying one.",
            "Two parameters that differ.",
            layers=still[0],
        )
