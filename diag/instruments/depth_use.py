"""Depth use: whether a residual stack is more than its blocks side by side.

A stack h + f_1 + f_2(h + f_1) + ... expands into the sum of all blocks at the stack's input and terms in which
blocks act on what others added. Where these are small the stack could be one wide layer; nothing says that it
should be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray
from torch import Tensor

from diag.display import format_number
from diag.registry import instrument
from diag.result import Confidence, Level, Precondition, Result, Verdict, measured
from diag.snapshot.inside.residual import ResidualStack

SOURCE = "Bermeitinger, Hrycej, Handschuh 2023, arXiv:2309.08414"


@dataclass(frozen=True, kw_only=True, eq=False)
class DepthUse(Result):
    """Norms are over all examples and positions together."""

    interaction_ratio: float = measured(
        "what the blocks do together beyond the sum of each at the stack's input, over what the stack does"
    )
    median_shift: float = measured("|f(h) - f(h_0)| over |f(h)|, the median block after the first")
    num_blocks: int = measured("blocks of the stack")
    blocks: tuple[str, ...] = measured("the blocks")
    shifts: NDArray[numpy.float64] = measured("|f(h) - f(h_0)| over |f(h)|", shape="(blocks,)")
    sizes: NDArray[numpy.float64] = measured("|f(h)| over the size of the stack's input", shape="(blocks,)")

    def verdict(self) -> Verdict:
        if (unmet := self.unmet()) is not None:
            return unmet.verdict(SOURCE)
        return Verdict(
            Level.DESCRIPTION,
            f"Of what the {self.num_blocks} blocks from {self.blocks[0]} to {self.blocks[-1]} add, "
            f"{format_number(self.interaction_ratio)} times as much is due to blocks acting on what others added "
            "(0: the stack is its blocks side by side); the number only describes.",
            advice="Near 0, try the blocks in parallel; from 1 on the depth is used to compose.",
            source=SOURCE,
            confidence=Confidence.WEAK_EMPIRICAL,
            value=self.interaction_ratio,
        )

    def plot(self, ax: Any = None) -> Any:
        """How far each block's addition depends on the blocks before it."""
        places = range(self.num_blocks)
        ax.bar(places, self.shifts)
        ax.set_xticks(places, self.blocks, rotation=45, ha="right", fontsize=7)
        ax.set(xlabel="block", ylabel="|f(h) - f(h_0)| / |f(h)|")


@instrument(
    source=SOURCE,
    title="Depth use",
    kind="description",
    why="Where the blocks hardly build on one another, the network acts as a shallow and wide one, and "
    "further depth costs time and brings little.",
    formula="|F(h) - h - sum_l f_l(h)| / |F(h) - h|",
)
def depth_use(residual_stack: ResidualStack) -> DepthUse:
    """How much of a residual stack is due to blocks acting on what earlier blocks added.

    residual_stack: what the blocks of the longest residual stack add in turn and at its input, found by tracing, on
    at most 32 examples. The ratio is |F(h) - h - sum f_l(h)| / |F(h) - h| with F the whole stack. Float64 sums. One
    extra call of each block. Blocks with something after the sum (post-normalisation, a ReLU) are not such a stack.

    Raises nothing of its own. Source: Bermeitinger et al. 2023, arXiv:2309.08414 (the expansion, from its abstract;
    the ratio is ours).
    """
    in_turn = [t.double() for t in residual_stack.in_turn]
    at_start = [t.double() for t in residual_stack.at_start]
    whole = _sum(in_turn)
    shifts = numpy.array([_ratio(a - b, a) for a, b in zip(in_turn, at_start, strict=True)])
    return DepthUse(
        interaction_ratio=_ratio(whole - _sum(at_start), whole),
        median_shift=float(numpy.median(shifts[1:])),
        num_blocks=len(in_turn),
        blocks=residual_stack.names,
        shifts=shifts,
        sizes=numpy.array([_ratio(a, residual_stack.start.double()) for a in in_turn]),
        preconditions=(
            Precondition(
                "a stack that adds something finite",
                math.isfinite(float(whole.norm())) and float(whole.norm()) > 0,
                "the stack adds nothing, or something that is not finite.",
            ),
        ),
    )


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a.norm() / b.norm()) if float(b.norm()) > 0 else math.nan
