"""Whether a parameter still holds the numbers that it was initialised with, told by these numbers alone.

torch draws the weights of its layers uniformly within a bound that follows from their shape, and those of
embeddings from the unit normal. Trained weights leave the bound, and have rows and directions that are larger than
chance makes them. So a layer in which nothing of this is to be seen has not been trained, here or elsewhere. Draws
that were made smaller or larger by one factor have a bound all the same, with as many entries next to it as
anywhere: the smallest training blurs it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diag.snapshot.loop.steps import ZEROS

DRAWN = ("uniform", "normal")
ENOUGH_TO_TELL = 1000  # fewer may look like draws by chance
NEAR_THE_BOUND = 20.0  # of n uniform entries none lies within 20 / n of the bound in exp(-20) of all draws
ENTRIES_LOOKED_AT = 4096
SIDE = 256  # of the block whose largest singular value is taken
ERRORS_OF_DRAWS = 4.0
NEXT_TO_THE_EDGE = (0.05, 0.02)  # widths, in shares of a bound, in which so large a share of the entries lies
KOLMOGOROV_SMIRNOV = 1.95  # over the root of the number of entries: one draw in a thousand lies further off
ABOVE_THE_EDGE = 1.1  # of the largest singular value that independent entries have, (root of m + root of n) std


def looks_fresh(module: nn.Module, p: Tensor) -> str:
    """What the numbers of this weight of `module` look like: "uniform" or "normal" draws of an initialisation,
    "zeros", or "" where they look like neither, or there are too few to tell."""
    own = getattr(p, "to_local", p.detach)().detach()
    if own.ndim < 2 or own.numel() < ENOUGH_TO_TELL or not own.is_floating_point() or own.is_meta:
        return ""
    low, high = torch.aminmax(own)
    largest = float(torch.maximum(-low, high))
    if largest == 0.0:
        return ZEROS
    if own.dtype not in (torch.float32, torch.float64):  # rounded draws reach past their bound
        return ""
    flat = own.reshape(-1)
    some = flat[:: max(len(flat) // ENTRIES_LOOKED_AT, 1)][:ENTRIES_LOOKED_AT].cpu().double()
    kind = ""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        kind = "normal" if _is_unit_normal(some) else ""
    elif any(_is_uniform(some, largest, bound, own.numel()) for bound in _bounds(module, own)):
        kind = "uniform"
    elif _has_sharp_edge(some, largest):
        kind = "uniform" if _is_uniform(some, largest, largest, own.numel()) else ""
    return kind if kind and _has_no_direction(own) else ""


def _bounds(module: nn.Module, p: Tensor) -> Iterator[float]:
    """Those of torch's own start, and of Xavier's and He's uniform ones."""
    inside = p[0, 0].numel()
    fan_in, fan_out = p.shape[1] * inside, p.shape[0] * inside
    if isinstance(module, nn.RNNBase):
        yield 1 / math.sqrt(module.hidden_size)
    yield 1 / math.sqrt(fan_in)
    yield math.sqrt(6 / (fan_in + fan_out))
    yield math.sqrt(6 / fan_in)


def _is_uniform(some: Tensor, largest: float, bound: float, entries: int) -> bool:
    if not bound * (1 - NEAR_THE_BOUND / entries) <= largest <= bound * (1 + 1e-6):
        return False
    cumulative = (some.sort().values / bound + 1) / 2
    steps = torch.arange(1, len(some) + 1, dtype=torch.float64) / len(some)
    return float((cumulative - steps).abs().max()) < KOLMOGOROV_SMIRNOV / math.sqrt(len(some)) + 1 / len(some)


def _has_sharp_edge(some: Tensor, largest: float) -> bool:
    """Whether as many entries lie next to the largest as between any others."""
    sizes, n = some.abs() / largest, len(some)
    counts = ((int((sizes >= 1 - width).sum()), width * n) for width in NEXT_TO_THE_EDGE)
    return all(abs(count - expected) <= ERRORS_OF_DRAWS * math.sqrt(expected) for count, expected in counts)


def _is_unit_normal(some: Tensor) -> bool:
    """Mean, variance and fourth moment as of draws; a row of zeros for padding is left out."""
    x = some[some != 0]
    n = max(len(x), 1)
    errors = (
        float(x.mean()) * math.sqrt(n),
        (float(x.square().mean()) - 1) * math.sqrt(n / 2),
        (float(x.pow(4).mean()) - 3) * math.sqrt(n / 96),
    )
    return len(x) > len(some) / 2 and all(abs(e) < ERRORS_OF_DRAWS for e in errors)


def _has_no_direction(p: Tensor) -> bool:
    """Whether no direction of the weight is larger than those of independent entries are."""
    block = p.flatten(1)[:SIDE, :SIDE].cpu().double()
    block = block[block.abs().sum(1) > 0]
    std = float(block.square().mean().sqrt())
    edge = std * (math.sqrt(block.shape[0]) + math.sqrt(block.shape[1]))
    return float(torch.linalg.matrix_norm(block, 2)) <= ABOVE_THE_EDGE * edge
