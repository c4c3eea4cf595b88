"""Is the optimizer that steps the same one all along, with its moments?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from diag.errors import counted
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import NO_STEP, SOURCE, THRICE, TWICE, LoopCheck, LoopFinding, judged
from diag.instruments.loop.schedule.too_fast import steps_an_epoch
from diag.registry import instrument
from diag.result import Level
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import OptimizerFacts

EPOCHS_OF_A_PHASE = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class OptimizerKept(LoopCheck):
    """An optimizer that is made again, or that lost its moments."""


@instrument(
    source=SOURCE,
    title="The optimizer is kept",
    kind="check",
    why="A new optimizer has forgotten its moments: each time the first steps are as blind as at the start.",
)
def optimizer_kept(loop: Loop) -> OptimizerKept:
    """Whether one optimizer trains the model all along.

    Several optimizers of one class that hold the same parameters, each of which stops for good where the next
    begins, are one that is made again; where it keeps moments, they start from zero each time. A second one is told
    only where it has the settings of the first (but for what a scheduler made of its rate) and begins with the
    second epoch of a DataLoader, until it goes on for longer than an epoch: else it may be another phase of
    training. Three and more that differ in their settings and last for two epochs each are such phases, too. One
    that begins where the weights were changed from outside, as those of a next fold are, is another
    training.

    Raises nothing of its own.
    """
    about = {} if loop.training else {"preconditions": (NO_STEP,)}
    findings = list(_findings(loop)) if loop.training else []
    fine = f"{counted(len(loop.training), 'optimizer')} took {counted(loop.step, 'step')}."
    return judged(OptimizerKept, loop.step, findings, fine, **about)


def _findings(loop: Loop) -> Iterator[LoopFinding]:
    chains: dict[tuple[str, tuple[str, ...]], list[OptimizerFacts]] = {}
    other_trainings = {c.step for c in loop.outside}
    for o in sorted(loop.training, key=lambda o: o.first_step):
        chain = chains.setdefault((o.kind, o.held), [])
        if (not chain or chain[-1].last_step < o.first_step) and o.first_step not in other_trainings:
            chain.append(o)
    for chain in chains.values():
        again = (len(chain) >= THRICE and not _are_phases(chain, loop)) or each_epoch(chain, loop)
        if again and any(o.stateful for o in chain):
            yield _again(chain)
    lost = [o for o in loop.training if o.no_state and o.stateful]
    if lost and loop.resumed:
        yield LoopFinding(
            Level.WARNING,
            Cause.OPTIMIZER_STATE_NOT_RESTORED,
            f"The run goes on after step {loop.resumed:,} and its optimizer ({lost[0].kind}) has no moments.",
            "Save optimizer.state_dict() with the model and load it when training is resumed.",
            "An optimizer whose state is not empty at the first step.",
            step=loop.resumed + 1,
        )


def _are_phases(chain: list[OptimizerFacts], loop: Loop) -> bool:
    """Whether each was made with other settings than the one before, and lasted for epochs, as the phases of a
    training do that are planned."""
    epoch = steps_an_epoch(loop)
    planned = not any(made_alike(a, b) for a, b in pairwise(chain))
    return planned and epoch > 0 and all(o.steps >= EPOCHS_OF_A_PHASE * epoch for o in chain[:-1])


def each_epoch(chain: list[OptimizerFacts], loop: Loop) -> bool:
    """Whether one was made again for the second epoch of a DataLoader, as the first was made, and nothing else
    changed there."""
    if len(chain) != TWICE:
        return False
    first, second = chain
    elsewhere = any(c.step == second.first_step for c in loop.outside)
    return (
        second.first_step == loop.batches.again
        and loop.batches.epochs == len(chain)
        and made_alike(first, second)
        and not elsewhere
    )


def made_alike(first: OptimizerFacts, second: OptimizerFacts) -> bool:
    """Whether two were made with the same settings; a scheduler that was made for one only has changed its rate
    before the first step, and kept what it began from."""
    return [_settings(g) for g in first.made_with] == [_settings(g) for g in second.made_with]


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    rate = {"lr": group.get("initial_lr", group.get("lr"))}
    return {k: v for k, v in group.items() if k != "initial_lr"} | rate


def _again(chain: list[OptimizerFacts]) -> LoopFinding:
    steps = [o.steps for o in chain[:-1]]
    every = max(steps)
    often = "at every step" if every == 1 else f"every {every:,} steps or fewer"
    return LoopFinding(
        Level.ALARM if every == 1 else Level.WARNING,
        Cause.OPTIMIZER_RECREATED,
        f"The optimizer ({chain[0].kind}) is made again {often}, {len(chain):,} so far, so its moments start from "
        "zero each time.",
        "Make the optimizer once, before the loop.",
        "One optimizer that takes all steps.",
        step=chain[1].first_step,
    )
