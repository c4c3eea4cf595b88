"""Permuting the units of one of two independently trained networks removes most of the barrier between them."""

from __future__ import annotations

import torch
from reproducing import Card, Expectation, Lab
from torch import nn

import diag
from diag import datasets
from diag.instruments.mode_connectivity.instrument import ModeConnectivity

TRAIN, EPOCHS, BATCH, RATE = 4000, 30, 100, 1e-3


def network(width: int, norm: bool = False) -> nn.Sequential:
    """784-w-w-w-10 with ReLU, and BatchNorm where asked for."""
    layers: list[nn.Module] = []
    for inputs in (784, width, width):
        layers += [nn.Linear(inputs, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def trained(width: int, init: int, order: int, norm: bool = False) -> nn.Sequential:
    """Adam on 4,000 digits, 30 epochs; `init` seeds the weights and `order` the batches."""
    train, _ = datasets.load_dataset("mnist5k", seed=0).split(TRAIN)
    x, y = train.inputs.flatten(1), train.labels
    torch.manual_seed(init)
    model = network(width, norm)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    batches = torch.Generator().manual_seed(order)
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAIN, generator=batches).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


def measured(lab: Lab, arm: str, first: nn.Module, second: nn.Module, **settings: object) -> ModeConnectivity:
    """Mode connectivity of the two, recorded as an arm of its own."""
    train, test = datasets.load_dataset("mnist5k", seed=0).split(TRAIN)
    data, held_out = ((d.inputs.flatten(1), d.labels) for d in (train, test))
    snapshot = diag.Snapshot(first, nn.CrossEntropyLoss(), data, held_out=held_out, other=second.state_dict())
    result = diag.mode_connectivity(snapshot, **{"align": "weights", "refine": 0} | settings)
    assert isinstance(result, ModeConnectivity)
    with lab.recorder(arm, first) as record:
        record.append_outcome(EPOCHS * TRAIN // BATCH, result)
    lab.say(
        f"  {arm}: loss barrier {result.barrier:.4f} (error {result.error_barrier:.4f}); matched "
        f"{result.aligned_barrier:.4f} ({result.aligned_error_barrier:.4f}) in {result.alignment_passes:.0f} "
        f"passes; held out {result.held_out_barrier:.4f} and {result.aligned_held_out_barrier:.4f}"
    )
    return result


EXPECTED = {  # naive loss and error barrier, the same after matching
    "w64": (1.464, 0.547, 0.172, 0.062),
    "w64-second-pair": (2.140, 0.692, 0.089, 0.029),
    "w256": (1.175, 0.468, 0.0116, 0.0023),
    "w256-second-pair": (0.878, 0.295, 0.0104, 0.0013),
}


def run(lab: Lab) -> list[Expectation]:
    """Two pairs at each of two widths; one start with two orders; BatchNorm with statistics lerped and reset."""
    found = {}
    for arm in EXPECTED:
        width, seeds = int(arm.split("-")[0][1:]), (3, 4) if "second" in arm else (1, 2)
        first, second = (trained(width, seed, seed) for seed in seeds)
        found[arm] = measured(lab, arm, first, second)
    fork = measured(lab, "one-start-two-orders", trained(256, 1, 1), trained(256, 1, 2), align=None)
    pair = [trained(256, seed, seed, norm=True) for seed in (1, 2)]
    reset = measured(lab, "batch-norm-reset", *pair)
    lerp = measured(lab, "batch-norm-lerp", *pair, norm_stats="lerp")
    expectations = []
    for arm, (loss, error, matched, matched_error) in EXPECTED.items():
        least, r = 50 if arm.startswith("w256") else 5, found[arm]
        expectations += [
            Expectation(f"{arm}: loss barrier as they are", loss, r.barrier),
            Expectation(f"{arm}: error barrier as they are", error, r.error_barrier, low=0.1, unit="share"),
            Expectation(f"{arm}: loss barrier after matching", matched, r.aligned_barrier),
            Expectation(
                f"{arm}: error barrier after matching",
                matched_error,
                r.aligned_error_barrier,
                high=0.1,
                unit="share",
            ),
            Expectation(
                f"{arm}: matching divides the loss barrier by",
                loss / matched,
                r.barrier / r.aligned_barrier,
                low=least,
            ),
        ]
    narrow, wide = (min(found[a].aligned_barrier for a in found if a.startswith(w)) for w in ("w64", "w256"))
    return [
        *expectations,
        Expectation(
            "after matching, the narrow networks' barrier over the wide ones'", ">= 1", narrow / wide, low=1.0
        ),
        Expectation("one start, two orders, width 256: loss barrier", 0.0082, fork.barrier, high=0.05),
        Expectation(
            "BatchNorm, as they are: barrier with statistics interpolated, over reset", "above 1",
            lerp.barrier / reset.barrier, low=1.0,
        ),
        Expectation(
            "BatchNorm, matched: barrier with statistics interpolated, less reset", "positive",
            lerp.aligned_barrier - reset.aligned_barrier, low=0.0,
        ),
        Expectation("BatchNorm, matched: loss barrier with statistics reset", "none", reset.aligned_barrier),
    ]  # fmt: skip


CARD = Card(
    title="Two trained networks are connected once their units stand in the same order",
    source="Ainsworth, Hayase, Srinivasa 2023, arXiv:2209.04836; Entezari et al. 2022, arXiv:2110.06296",
    claim=(
        "On the straight line between two independently trained networks the loss has a barrier; permuting the "
        "hidden units of one of them, without data, removes most of it, and the more the wider they are. Two runs "
        "from one start need no permutation. With BatchNorm the statistics must be measured again on the line."
    ),
    takes="3 minutes",
    run=run,
    notes=(
        "A barrier that remains after matching does not show that the two solutions differ: the matching is a "
        "local search, and permutations are not all symmetries. The bands (division by 5 and by 50) were fixed on "
        "the first pair of seeds before the second was run."
    ),
)
