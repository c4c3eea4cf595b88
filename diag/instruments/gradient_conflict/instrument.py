"""Gradient conflict: whether groups of examples, tasks or losses pull the parameters against each other.

For the mean gradients G_a of groups a, the cosine of G_a and G_b in each layer. The estimates of a finite number of
examples are noisy: their norms are too long, which biases cosines to 0, so the lengths are estimated from
products of different examples, and the error by leaving out one block of examples at a time. Nothing here has
been tried on what it predicts, so it describes and gives no verdict.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_number, format_share
from diag.door import at_the_door
from diag.errors import InvalidInput, MissingQuantity
from diag.gradients import PerExampleGradients, StackedGradients, as_gradients
from diag.instruments.gradient_conflict.cosines import (
    conflict_by_layer,
    corrected_cosine,
    cosines_with_errors,
    length_kept,
    lowest_pair,
    mean_products,
)
from diag.linalg.coherence import across_halves, noise_floor, random_blocks
from diag.linalg.student import STANDARD_ERRORS, factor
from diag.ranges import Seed
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.snapshot import Snapshot

SOURCE = "Yu et al. 2020, arXiv:2001.06782 (gradient conflict: a negative cosine)"
ERROR_BLOCKS, MOST_GROUPS = 10, 20


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientConflict(Result):
    """Cosines between the groups' mean gradients, over all layers and in each."""

    lowest: float = measured("smallest cosine of two groups' mean gradients, as measured")
    lowest_corrected: float = measured(
        "the same pair's cosine with the lengths freed of noise", remark="NaN: within noise"
    )
    lowest_standard_error: float = measured(
        "jackknife standard error of the cosine of that pair, such that two of them hold for all pairs at once"
    )
    conflicting_pairs: float = measured("pairs with a cosine below 0 by two standard errors", unit="share")
    length_kept: float = measured("length of the summed gradient over the sum of the groups' lengths")
    num_groups: int = measured("groups compared")
    num_examples: int = measured("examples, all groups together")
    groups: tuple[int, ...] = measured("the groups' labels, in the order of the matrices")
    pair: tuple[int, ...] = measured("labels of the two groups with the smallest cosine")
    cosines: NDArray[numpy.float64] = measured("cosines of the mean gradients", shape="(groups, groups)")
    standard_errors: NDArray[numpy.float64] = measured("their jackknife errors", shape="(groups, groups)")
    lowest_across_halves: float = measured(
        "the same pair's cosine, one group on a random half of the examples and the other on the rest"
    )
    noise_floor: float = measured(
        "what a cosine of 1 would be across halves: noise leaves no more of it", remark="NaN: it leaves nothing"
    )
    across_halves: NDArray[numpy.float64] = measured(
        "cosines of the groups' gradients on different halves of the examples",
        remark="on the diagonal a group with itself",
        shape="(groups, groups)",
    )
    lowest_by_layer: dict[str, float] = measured("smallest cosine of two groups in each layer")
    lowest_across_halves_by_layer: dict[str, float] = measured("that pair's cosine across halves, in each layer")
    noise_floor_by_layer: dict[str, float] = measured("and what noise leaves of a cosine of 1 there")
    length_kept_by_layer: dict[str, float] = measured("summed length over the sum of lengths, in each layer")

    def verdict(self) -> Verdict:
        unmet = self.unmet()
        detail = unmet.detail if unmet else self._described()
        return Verdict(
            Level.NOT_APPLICABLE,
            f"No verdict: {detail}",
            advice="Negative cosines say that a step for one group costs the other; compare before and after a "
            "change of loss weights, not one value by itself.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            value=self.lowest,
        )

    def _described(self) -> str:
        error = (
            "" if math.isnan(self.lowest_standard_error) else f" ± {format_number(self.lowest_standard_error, 2)}"
        )
        return (
            f"the smallest cosine, {format_number(self.lowest)}{error}, is between the groups {self.pair[0]} and "
            f"{self.pair[1]} ({self._halves()}); {format_share(self.conflicting_pairs)} of the pairs conflict "
            f"beyond the noise and the groups' sum keeps {format_share(self.length_kept)} of their lengths; what "
            "that leads to has not been tested."
        )

    def _halves(self) -> str:
        floor = "nothing" if math.isnan(self.noise_floor) else format_number(self.noise_floor)
        return (
            f"{format_number(self.lowest_across_halves)} on different halves of the examples, where noise leaves "
            f"{floor} of a cosine of 1"
        )

    @classmethod
    def trend(cls, series: Sequence[tuple[int, Self]]) -> Verdict:
        """How often the cosine of a pair changed its sign from one measurement to the next."""
        rate = sign_flip_rate([result for _, result in series])
        if math.isnan(rate):
            return series[-1][1].verdict()
        return Verdict(
            Level.NOT_APPLICABLE,
            f"No verdict: over {len(series)} measurements the cosines changed sign in {format_share(rate)} of the "
            f"steps between them; at the end {series[-1][1]._described()}",
            source=SOURCE,
            value=rate,
        )

    def plot(self, ax: Any = None) -> Any:
        """The matrix of cosines."""
        mesh = ax.imshow(self.cosines, vmin=-1, vmax=1, cmap="RdBu")
        ax.figure.colorbar(mesh, ax=ax, label="cosine")
        ax.set_xticks(range(len(self.groups)), self.groups)
        ax.set_yticks(range(len(self.groups)), self.groups)
        ax.grid(False)
        ax.set(xlabel="group", ylabel="group")


def sign_flip_rate(series: Sequence[GradientConflict]) -> float:
    """Share of (pair, consecutive measurements) in which the pair's cosine changed sign; NaN without any."""
    flips = [
        numpy.sign(a.cosines) != numpy.sign(b.cosines)
        for a, b in itertools.pairwise(series)
        if a.groups == b.groups
    ]
    pairs = [f[numpy.triu_indices(len(f), 1)] for f in flips]
    return float(numpy.concatenate(pairs).mean()) if pairs and pairs[0].size else math.nan


@instrument(
    source=SOURCE,
    title="Gradient conflict",
    kind="description",
    why="Groups of examples whose gradients point against each other gain at each other's cost: what helps "
    "the one undoes the other.",
    formula="cos(a, b) = <G_a, G_b> / (|G_a| |G_b|), G_a the mean gradient of group a",
)
def gradient_conflict(
    per_example_gradients: PerExampleGradients, labels: Tensor, *, seed: Seed = 0
) -> GradientConflict:
    """Cosines between the mean gradients of groups of examples, over all layers and in each.

    per_example_gradients: n gradients at fixed weights, or a floating matrix (n, P). labels: the group of each,
    integers (n,): classes, tasks, or losses. To compare several losses on the same examples, put their gradients
    together: `gradients, labels = stack_losses({"a": ..., "b": ...})`. Of more than 20 groups the largest are
    compared.

    `cosines` are those of the measured means; noise pulls them to 0. `lowest_corrected` divides by lengths from
    products of different examples instead. Errors are jackknife errors over 10 random blocks; losses on the same
    examples are left out together. `across_halves` compares groups on different halves, averaged over all halvings
    of the blocks, so that noise that two losses share through their examples does not count; its diagonal, a group
    with itself, is the noise floor. `length_kept` is |sum_a G_a| / sum_a |G_a|: 1 without conflict.

    Settings: `seed`, of the blocks. Raises MissingQuantity where labels are not one an example or name fewer than
    two groups. Source: Yu et al. 2020, arXiv:2001.06782.
    """
    per_example_gradients = as_gradients(per_example_gradients)
    n = per_example_gradients.num_examples
    names, members = _groups(labels, n)
    examples = per_example_gradients.examples
    blocks = random_blocks(int(examples.max()) + 1, ERROR_BLOCKS, seed)
    parts = [group[torch.isin(examples[group], block)] for group in members for block in blocks]
    grams = per_example_gradients.group_gram_by_layer(parts)
    gram = torch.stack(list(grams.values())).sum(0)
    sizes = torch.tensor([len(part) for part in parts], dtype=torch.float64).view(len(members), -1)
    cosines, errors = cosines_with_errors(gram, sizes)
    upper = torch.triu_indices(len(members), len(members), 1)
    values = cosines[upper[0], upper[1]]
    a, b = lowest_pair(cosines)
    conflicts = values + STANDARD_ERRORS * errors[upper[0], upper[1]] < 0
    squares = torch.stack([per_example_gradients.norms()[group].square().sum() for group in members])
    halves = across_halves(gram, len(members))
    return GradientConflict(
        lowest=float(cosines[a, b]),
        lowest_corrected=corrected_cosine(gram, sizes, squares, a, b),
        lowest_standard_error=float(errors[a, b]) * factor(ERROR_BLOCKS, len(values)) / factor(ERROR_BLOCKS),
        conflicting_pairs=float(conflicts.double().mean()),
        length_kept=length_kept(mean_products(gram, sizes)),
        num_groups=len(members),
        num_examples=n,
        groups=names,
        pair=(names[a], names[b]),
        cosines=cosines.numpy(),
        standard_errors=errors.numpy(),
        lowest_across_halves=float(halves[a, b]),
        noise_floor=noise_floor(halves, a, b),
        across_halves=halves.numpy(),
        preconditions=(_not_zero(float(cosines[a, b])),),
        **conflict_by_layer({name: (found, mean_products(found, sizes)) for name, found in grams.items()}),
    )


def _not_zero(lowest: float) -> Precondition:
    return Precondition(
        "gradients that are not zero",
        not math.isnan(lowest),
        "the mean gradients of all pairs vanish, so they have no direction.",
    )


def stack_losses(losses: Mapping[str, PerExampleGradients]) -> tuple[StackedGradients, Tensor]:
    """Gradients of several losses or tasks as groups 0, 1, ... of one quantity, and the labels that name them.

    Raises InvalidInput where they are not of the same parameters.
    """
    stacked = StackedGradients(list(losses.values()))
    sizes = torch.tensor([gradients.num_examples for gradients in losses.values()])
    return stacked, torch.repeat_interleave(torch.arange(len(sizes)), sizes)


@at_the_door
def loss_conflict(
    snapshot: Snapshot, losses: Mapping[str, Callable[[Any, Any], Tensor]], *, seed: Seed = 0
) -> GradientConflict:
    """Conflict between named losses on the same examples: groups 0, 1, ... are the losses in the order given.

    losses: at least two `loss_fn(outputs, targets)` by name, each the mean over examples. The examples are the
    snapshot's own, so the losses share their noise: `across_halves` has each on one half of the examples against
    the other on the rest, beside the noise floor. Raises InvalidInput for fewer than two losses, and what
    per-example gradients raise.
    """
    if len(losses) < 2:
        raise InvalidInput(f"loss_conflict got {len(losses)} losses; expected two or more, by name.")
    found = {n: snapshot.replace(loss_fn=f).quantity("per_example_gradients") for n, f in losses.items()}
    stacked, labels = stack_losses(found)
    result = gradient_conflict(per_example_gradients=stacked, labels=labels, seed=seed)
    assert isinstance(result, GradientConflict)
    names = ", ".join(f"{i} is {name}" for i, name in enumerate(losses))
    return dataclasses.replace(result, notes=(*result.notes, f"The groups are losses: {names}."))


def _groups(labels: Tensor, n: int) -> tuple[tuple[int, ...], list[Tensor]]:
    labels = torch.as_tensor(labels).detach().cpu()
    if labels.shape != (n,):
        raise MissingQuantity(
            f"labels have the shape {tuple(labels.shape)} for {n} examples; give the group of each example."
        )
    values, counts = labels.unique(return_counts=True)
    if len(values) < 2:
        raise MissingQuantity("All examples are in one group; give labels that name at least two.")
    kept = values[counts.argsort(descending=True, stable=True)[:MOST_GROUPS]].sort().values
    return tuple(int(v) for v in kept), [(labels == v).nonzero().flatten() for v in kept]
