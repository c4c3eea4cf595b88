"""Two small transformers are nearer once rotations and invertible maps are matched, not only permutations."""

from __future__ import annotations

import statistics

from reproducing import Card, Expectation, Lab
from reproductions._small_networks import Transformer, between, independent
from torch import nn

import diag
from diag.instruments.mode_connectivity.instrument import ModeConnectivity

STEPS = 500
PAIRS = {f"pair-{k}-{k + 1}": (k, k + 1) for k in range(13, 23, 2)}


def measured(lab: Lab, arm: str, pair: tuple[nn.Module, nn.Module], beyond: bool) -> ModeConnectivity:
    """Mode connectivity before and after matching, recorded as an arm."""

    def matched(snapshot: diag.Snapshot) -> ModeConnectivity:
        return diag.mode_connectivity(snapshot, align="weights", refine=0, beyond_permutations=beyond)

    result = between(lab, arm, pair, STEPS, matched)
    lab.say(
        f"  {arm}: loss barrier {result.barrier:.3f} (error {result.error_barrier:.3f}), matched "
        f"{result.aligned_barrier:.3f} ({result.aligned_error_barrier:.3f}); distance {result.distance:.1f}, "
        f"matched {result.aligned_distance:.1f}; outputs changed by {result.function_change:.1e}"
    )
    return result


def run(lab: Lab) -> list[Expectation]:
    """Five pairs of independent trainings; each as it is, after permutations and after all symmetries."""
    found, ratios = [], []
    for name, seeds in PAIRS.items():
        first, second = (independent(Transformer, seed, STEPS) for seed in seeds)
        plain = measured(lab, f"{name}-permutations", (first, second), beyond=False)
        more = measured(lab, f"{name}-all", (first, second), beyond=True)
        ratios.append(plain.aligned_barrier / more.aligned_barrier)
        found += expectations(name, plain, more)
    middle = statistics.median(ratios)
    return [
        *found,
        Expectation("median of the barrier after permutations over that after all", "1.88", middle, low=1.2),
        Expectation("pairs of five in which it is lower after all", "-", sum(r > 1 for r in ratios)),
    ]


def expectations(name: str, plain: ModeConnectivity, more: ModeConnectivity) -> list[Expectation]:
    """One pair's numbers beside their bands."""
    nearer = more.aligned_distance / plain.aligned_distance
    return [
        Expectation(
            f"{name}: relative change of the outputs by the alignment", "rounding", more.function_change, high=1e-4
        ),
        Expectation(f"{name}: loss barrier as they are", "2.54 to 4.12", plain.barrier),
        Expectation(f"{name}: loss barrier after permutations", "2.16 to 2.66", plain.aligned_barrier),
        Expectation(f"{name}: loss barrier after all", "0.56 to 3.61", more.aligned_barrier),
        Expectation(f"{name}: distance after all over that after permutations", "0.81 to 0.82", nearer, high=0.9),
    ]


CARD = Card(
    title="What permutations leave of a barrier between transformers, larger symmetries lower",
    source="Theus et al. 2025, arXiv:2506.22712; Ainsworth, Hayase, Srinivasa 2023, arXiv:2209.04836",
    claim=(
        "Transformers have more symmetries than permutations: the stream under RMSNorm may be rotated, queries and "
        "keys (values and outputs) of a head mapped by any invertible matrix, ReLU units rescaled. Matching over "
        "these too lowers the barrier between two independently trained networks further than permutations do."
    ),
    takes="2 minutes",
    run=run,
    notes=(
        "What is expected comes from the pairs of seeds 1 to 12, before these were run. There a first band, a "
        "barrier at least 1.2 times lower in each pair, was set on three pairs and failed on one of the next "
        "three: for seeds 7 and 8 the barrier in loss rose from 2.66 to 3.61 (that in error fell from 0.73 to "
        "0.65), as matching looks at weights, not at the loss. So the band is for the median. The paper "
        "reports low and zero barriers between Vision Transformers and between GPT-2s (its abstract was "
        "read); here, in networks of width 24, a barrier remains, which does not show that the solutions "
        "differ."
    ),
)
