"""Are parameters, constant buffers, gradients and hyperparameters the same on all ranks?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from diag.errors import counted, named
from diag.instruments.causes import Cause
from diag.instruments.loop.findings import SOURCE, LoopCheck, LoopFinding, judged
from diag.registry import instrument
from diag.result import Level, Precondition
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.ranks import Difference, RankFacts

LOOKS_THAT_DIFFER = 2  # in a row at which gradients must differ
MAY_BE_ROUNDING = 1e-4  # of a tensor's norm: a difference below it may be rounding
SEVERAL_RANKS = Precondition("several ranks that are all watched", False, "one process trains, or is watched.")


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplicasEqual(LoopCheck):
    """What ranks that should be copies of each other have otherwise than rank 0."""


@instrument(
    source=SOURCE,
    title="Replicas",
    kind="check",
    why="Replicas that drift apart train different networks whose gradients are averaged as if they were "
    "one; the checkpoint is that of one rank only.",
)
def replicas_equal(loop: Loop) -> ReplicasEqual:
    """Whether the ranks of a data-parallel training have the same parameters, buffers, gradients and settings.

    After steps 1, 2, 3, 10, 30, 100, ... checksums of the bits of every tensor that each rank holds whole are
    compared with rank 0's, the norms of the gradients that the optimizer was given, and each optimizer's
    hyperparameters. Buffers count where training does not change them: running means follow each rank's own data.
    Sharded tensors have no replica to compare with. A difference of a size that rounding explains is a warning.

    Raises nothing of its own.
    """
    ranks = loop.ranks
    if not ranks.together or not ranks.looks:
        return judged(ReplicasEqual, loop.step, [], "", preconditions=(SEVERAL_RANKS,))
    what = (
        "Parameters, constant buffers, gradients and hyperparameters"
        if ranks.replicated
        else ("All parameters are sharded, so that there is no replica; constant buffers and hyperparameters")
    )
    fine = (
        f"{what} were the same on all {ranks.world} ranks after {counted(len(ranks.looks), 'step')} at which "
        f"they were compared, the last after step {ranks.looks[-1]:,}."
    )
    past_wrapper = bool(loop.wrapper.kind) and not loop.wrapper.calls
    return judged(ReplicasEqual, loop.step, _findings(ranks, past_wrapper), fine)


def _findings(ranks: RankFacts, past_wrapper: bool) -> Iterator[LoopFinding]:
    apart = ranks.equal_gradients == 0 and any(d.times >= LOOKS_THAT_DIFFER for d in ranks.gradients)
    if apart and ranks.one_batch and ranks.rows_compared >= LOOKS_THAT_DIFFER and not ranks.rows_equal:
        yield _read_apart(ranks)
    elif apart and not past_wrapper:  # which `wrapper_called` says
        yield _not_reduced(ranks)
    if ranks.settings:
        yield _settings(ranks)
    if ranks.parameters:
        yield _parameters(ranks, explained=apart)
    if ranks.buffers and not ranks.parameters:
        yield _buffers(ranks.buffers)


def _read_apart(ranks: RankFacts) -> LoopFinding:
    worst = max(ranks.gradients, key=lambda d: d.size)
    return LoopFinding(
        Level.ALARM,
        Cause.RANKS_READ_APART,
        f"The {ranks.world} ranks hold parts of one network (tensor parallelism) and are given different batches: "
        f"inputs or targets differed at each of {counted(ranks.rows_compared, 'step')} compared, and so do the "
        f"gradients of what each rank holds whole, on rank {worst.rank} by up to {worst.size:.1%}.",
        "Give all ranks of a tensor-parallel group the same rows: one seed for their samplers, or a sampler that "
        "counts groups and not ranks.",
        "Inputs and targets that are equal on all ranks, or gradients that are.",
        step=worst.since,
        layers=worst.names,
    )


def _not_reduced(ranks: RankFacts) -> LoopFinding:
    worst = max(ranks.gradients, key=lambda d: d.size)
    advice = (
        "Wrap the model in DistributedDataParallel and call the wrapper, or average the gradients before the step."
        if ranks.data_apart
        else "Look for what each rank of a tensor-parallel group draws or computes by itself: dropout with its own "
        "seed, a layer outside of the plan whose input is one rank's part."
    )
    return LoopFinding(
        Level.ALARM,
        Cause.GRADIENTS_NOT_REDUCED,
        f"Each rank steps on its own gradient, nothing averages them: on rank {worst.rank} the "
        f"gradient norms are up to {worst.size:.1%} from rank 0's, at each of {counted(worst.times, 'step')} "
        f"compared.",
        advice,
        "Equal gradient norms on all ranks at the optimizer's step; or a method in which ranks step alone and "
        "parameters are averaged now and then.",
        step=worst.since,
        layers=worst.names,
    )


def _parameters(ranks: RankFacts, explained: bool) -> LoopFinding:
    first = min(ranks.parameters, key=lambda d: (d.since, d.rank))
    others = [d.rank for d in ranks.parameters if d.rank != first.rank]
    also = f" (and rank{'s' if len(others) > 1 else ''} {named([str(r) for r in others])})" if others else ""
    small = all(d.size < MAY_BE_ROUNDING for d in ranks.parameters)
    from_start = first.since == ranks.looks[0] and not explained and ranks.data_apart
    return LoopFinding(
        Level.WARNING if small else Level.ALARM,
        Cause.REPLICAS_DIFFER,
        f"Rank {first.rank}{also} has other parameters than rank 0 since step {first.since:,} at the latest, "
        f"first in {first.names[0]} ({counted(len(first.names), 'tensor')} "
        f"now{', by as little as rounding' if small else ''}).",
        "Start all ranks from the same weights: wrap the model in DistributedDataParallel, or broadcast its state "
        "from rank 0 before the first step. If they did start so, look for what the first step does on one rank "
        "alone: clipping, hyperparameters."
        if from_start
        else "Look for what changes weights on one rank alone: an optimizer step that a rank skips, gradients that "
        "are not averaged, hyperparameters or a restored checkpoint that differ.",
        "Checksums that are equal on all ranks; or ranks that are meant to differ, as experts do.",
        step=first.since,
        layers=first.names,
        explained_by=(Cause.GRADIENTS_NOT_REDUCED, Cause.RANKS_READ_APART) if explained else (),
    )


def _buffers(buffers: Sequence[Difference]) -> LoopFinding:
    first = min(buffers, key=lambda d: (d.since, d.rank))
    return LoopFinding(
        Level.ALARM,
        Cause.REPLICAS_DIFFER,
        f"Rank {first.rank} has another constant buffer than rank 0: {named(first.names)}, compared after step "
        f"{first.since:,}.",
        "Make the buffer from one seed on all ranks, or broadcast it from rank 0.",
        "Checksums of the buffer that are equal on all ranks.",
        step=first.since,
        layers=first.names,
    )


def _settings(ranks: RankFacts) -> LoopFinding:
    first = min(ranks.settings, key=lambda s: (s.since, s.rank))
    return LoopFinding(
        Level.ALARM,
        Cause.RANK_SETTINGS_DIFFER,
        f"Rank {first.rank} steps with {first.name} {first.value:g} in parameter group {first.group}, rank 0 with "
        f"{first.first:g}, since step {first.since:,} at the latest.",
        "Set hyperparameters from what all ranks have in common; step a scheduler on a number that was averaged "
        "over ranks.",
        "Equal hyperparameters on all ranks.",
        step=first.since,
    )
