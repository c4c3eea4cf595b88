"""Largest eigenpairs of an operator that has moved a little since they were last found.

Lanczos that starts near the earlier eigenvectors finds them again in fewer steps, and would stop before it has
seen an eigenvalue that has arisen elsewhere. So the start vector holds a tenth of noise, which makes the run a
search from a random vector as well. It may stop when

- that search has been long enough. In the last cold run of m products the weight of an eigenvector grew from
  1 / sqrt(size), that of a random vector, to 1 / tolerance times all others. To be seen it has to outgrow them
  only, which at the same rate takes the share log sqrt(size) / (log sqrt(size) + log(1 / tolerance)) of m, about
  half; an eigenvalue that is now among the largest is as far from the bulk as those that were;
- what is seen is not on its way up: the next Ritz value lies below the wanted by more than its residual.

That is an estimate, not a theorem: where the earlier eigenvectors stay exactly eigenvectors, a new eigenvalue that
appears a few per cent above them and near the edge of the bulk can be missed. So a caller that starts warm again
and again has to start cold now and then. The gain is small for the same reason: most of a run for one pair is the
search. scripts/bench_warm_start.py prints both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diag.linalg.lanczos import Eigenpairs, extract, run_lanczos, warm_start
from diag.linalg.operator import LinearOperator
from diag.linalg.ritz import Ritz, StoppingRule, Which


@dataclass(frozen=True)
class Earlier:
    """What a run leaves for the next: `direction` (size,), the sum of the eigenvectors that it found, in bfloat16
    (noise is added to it anyway), and the `cold_products` that the last run without a warm start took."""

    direction: Tensor
    cold_products: int


def warm_eigenpairs(
    operator: LinearOperator,
    earlier: Earlier | None,
    *,
    largest: int,
    tolerance: float = 1e-3,
    max_products: int = 1000,
    seed: int = 0,
    unchanged: bool = False,
) -> tuple[Eigenpairs, Earlier]:
    """The `largest` eigenpairs as by `eigenpairs`, and what to give the next run.

    Args: earlier, what a run for as many pairs of a similar operator of this size left (None: a cold start);
    unchanged, that it was of this very operator, where no search is due. Raises InvalidInput when a product is not
    finite.
    """
    which = Which(largest=largest, tolerance=tolerance)
    if earlier is None:
        run = run_lanczos(operator, which, max_products=max_products, seed=seed)
        pairs = extract(run, which, seed)
        return pairs, Earlier(_sum(pairs), run.num_products)
    least = 0 if unchanged else search_length(operator.size, earlier.cold_products, largest, tolerance)
    stopping_rule = StoppingRule(which) if unchanged else CautiousStoppingRule(which)
    start = warm_start(earlier.direction.to(operator.dtype), operator, torch.Generator().manual_seed(seed))
    run = run_lanczos(
        operator,
        which,
        max_products=max_products,
        min_products=min(least, max_products),
        start=start,
        stopping_rule=stopping_rule,
        seed=seed,
    )
    pairs = extract(run, which, seed)
    return pairs, Earlier(_sum(pairs), earlier.cold_products)


def search_length(size: int, cold_products: int, count: int, tolerance: float) -> int:
    """The products that a warm run for `count` pairs makes at least: see the module's text."""
    growth = math.log(math.sqrt(size))
    share = growth / (growth + math.log(1 / tolerance))
    return min(count + 1 + math.ceil(share * max(cold_products - count, 0)), size)


class CautiousStoppingRule(StoppingRule):
    """Stops only where the next Ritz value cannot be on its way up among the wanted: it lies below them by more
    than its residual, or has converged."""

    def _all_converged(self, pairs: Ritz) -> bool:
        if not super()._all_converged(pairs):
            return False
        order = pairs.values.argsort(descending=True)
        last, following = order[self.which.largest - 1], order[self.which.largest]
        above = pairs.values[following] + pairs.residuals[following]
        limit = self.which.tolerance * pairs.values.abs().max()
        return bool(above < pairs.values[last] or pairs.residuals[following] <= limit)


def _sum(pairs: Eigenpairs) -> Tensor:
    assert pairs.vectors is not None
    return pairs.vectors.sum(0).to(torch.bfloat16)
