"""What a self-test of curvature runs on: a few examples, float64 where the model allows, and directions.

Mistakes in the loss or the data come to light here first, so this is where they are put into a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diag.curvature.objective import Objective
from diag.errors import DiagError, InvalidInput, Unsupported, first_line
from diag.linalg.reductions import length
from diag.snapshot.batch import COUPLED, Batch, tensors_in
from diag.snapshot.objective.coupling import rounding_of_parts
from diag.snapshot.reading.data import EXAMPLES_IN_PART
from diag.snapshot.state.unmade import refuse_unusual

CUT_APART = (
    f"{COUPLED}, so what it is depends on the batches, and these had to be cut; give smaller batches, as they are "
    "meant, without micro_batch=, or allow more memory."
)
NUM_EXAMPLES = (4, 32)  # at least, at most; between them a sixteenth, so that the test costs about one product


def probe_batch(objective: Objective) -> Batch:
    """A few examples of the batch whose examples are largest; the whole batch where it cannot be cut."""

    def elements(batch: Batch) -> float:
        return sum(t.numel() for t in tensors_in((batch.args, batch.kwargs))) / batch.size

    largest = max(objective.batches, key=elements)
    least, most = NUM_EXAMPLES
    few = min(max(objective.num_examples // 16, least), most)
    small = largest if largest.coupled else largest.slice(0, few)
    with objective.measured():
        theta = objective.parameters()
        try:
            probe, loss = small, objective.loss(theta, small)
        except DiagError:
            raise
        except Exception:  # inputs whose first axis is not the examples cannot be cut
            probe, loss = largest, _first_loss(objective, theta, largest)
        if not loss.requires_grad:
            raise InvalidInput(
                "The loss does not depend on any trainable parameter; check loss_fn and requires_grad."
            )
        _refuse_hidden_parameters(objective, loss)
    return probe


def _refuse_hidden_parameters(objective: Objective, loss: Tensor) -> None:
    """Raises Unsupported where the loss reaches the model's own parameters past those that were given to it."""
    named = {name: p for name, p in objective.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    used = [name for name, grad in zip(named, found, strict=True) if grad is not None]
    if used:
        raise Unsupported(
            f"The loss uses parameter {used[0]} outside the model's forward pass (a penalty in loss_fn, or a list "
            "that holds parameters), where it cannot be moved; leave a penalty out and add its curvature with "
            "operator.shifted(decay), or register the parameter in the module that uses it."
        )


def _first_loss(objective: Objective, theta: Sequence[Tensor], batch: Batch) -> Tensor:
    try:
        return objective.loss(theta, batch)
    except DiagError:
        raise
    except Exception as error:
        refuse_unusual(objective.model, error)
        raise InvalidInput(
            f"The loss could not be computed on a batch ({type(error).__name__}: {first_line(error)}); check "
            "that loss_fn(model(inputs), targets) runs on this data."
        ) from error


def refuse_sums(objective: Objective, probe: Batch) -> None:
    """Raises InvalidInput where the loss of a batch is the sum of its halves' losses, not their mean."""
    if not objective.everywhere(probe.size >= 2 and not probe.size % 2 and not probe.coupled):
        return
    halves = [probe.slice(0, probe.size // 2), probe.slice(probe.size // 2, probe.size)]
    with objective.measured():
        theta = objective.parameters()
        try:
            whole, first, second = (float(objective.loss(theta, b).detach()) for b in (probe, *halves))
        except Exception:  # a batch that cannot be cut
            return
    if abs(first + second - whole) <= 1e-3 * abs(whole) and abs((first + second) / 2 - whole) > 0.1 * abs(whole):
        raise InvalidInput(
            "loss_fn sums over the examples of a batch; expected their mean, so that batches of different sizes "
            'weigh alike: use reduction="mean".'
        )


def refuse_cut(objective: Objective, whole: Sequence[Batch], parts: Sequence[Batch]) -> None:
    """Raises Unsupported where batches were cut into parts of which the loss, or its gradient, is another one."""
    cut = next((batch for batch in whole if batch.size > 1 and not any(batch is part for part in parts)), None)
    if cut is None:
        return
    few = cut.few(EXAMPLES_IN_PART)
    halves = [few.slice(0, few.size // 2), few.slice(few.size // 2, few.size)]
    with objective.measured():
        theta = objective.parameters()
        within = rounding_of_parts(objective.loss(theta, few))
        at = [objective.on([batch]) for batch in (few, *halves)]
        values, slopes = [part.value(theta) for part in at], [part.gradient(theta) for part in at]
    first, second = (half.size / few.size for half in halves)
    apart = abs(values[0] - first * values[1] - second * values[2])
    turned = float((slopes[0] - first * slopes[1] - second * slopes[2]).norm())
    largest = max(first * abs(values[1]), second * abs(values[2]))
    longest = max(first * float(slopes[1].norm()), second * float(slopes[2].norm()))
    if apart > within * largest or turned > within * longest:
        raise Unsupported(CUT_APART)


def in_float64(own: Objective) -> tuple[Objective, Tensor]:
    """The objective in float64 where the model runs in it, else in float32; and its gradient with torch's own
    kernels, for the others to be compared with."""
    for precision in ("float64", "float32"):
        trial = own.at_precision(precision)
        try:
            with trial.measured(shorter=False):
                return trial, trial.gradient(trial.parameters())
        except Exception:  # weights or kernels that exist in one precision only
            if precision == "float32":
                raise
    raise AssertionError


def rows_held_fixed(model: nn.Module, objective: Objective) -> list[tuple[int, int]]:
    """(parameter, row) of every embedding's padding row, whose gradient PyTorch defines as zero."""
    trainable = dict(model.named_parameters())
    place = {id(trainable[name]): i for i, name in enumerate(objective.layout.names)}
    return [
        (place[id(module.weight)], module.padding_idx)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        and module.padding_idx is not None
        and id(module.weight) in place
    ]


def hold_fixed(vector: Tensor, objective: Objective, rows: list[tuple[int, int]]) -> Tensor:
    """`vector` with zeros in the given rows, changed in place."""
    views = objective.layout.views(vector)
    for parameter, row in rows:
        if (own := objective.own_row(parameter, row)) is not None:
            views[parameter][own] = 0
    return vector


def random_direction(objective: Objective, theta: Sequence[Tensor], seed: int) -> Tensor:
    """A random unit vector in which every parameter tensor has about its share of the parameters' length."""
    generator = torch.Generator().manual_seed(seed)
    least = 0.01 * max(length(objective.layout.flatten(theta, theta[0])), 1e-3)
    pieces = []
    for p in theta:
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        pieces.append(noise * ((length(p) + least) / max(p.numel() ** 0.5, 1.0)))
    flat = objective.layout.flatten(pieces, theta[0])
    direction = hold_fixed(flat, objective, rows_held_fixed(objective.model, objective))
    return direction / objective.length(direction)
