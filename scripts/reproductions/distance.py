"""The distance from the start grows like log t, and per update it is the same for every batch size."""

from __future__ import annotations

import dataclasses

import numpy
import torch
from reproducing import Card, Expectation, Lab
from torch import nn
from torch.nn.utils import parameters_to_vector

import diag
from diag import datasets
from diag.instruments.gradient_flow.instrument import GradientFlow
from diag.snapshot.history import History, empty_history

STEPS, EXAMPLES, SEED = 1500, 4000, 0
ARMS = {
    "B50-lr0.02": (50, 0.02),
    "B200-lr0.02": (200, 0.02),
    "B200-lr0.04": (200, 0.04),
    "B800-lr0.02": (800, 0.02),
    "B800-lr0.08": (800, 0.08),
}
EXPECTED_SLOPES = {
    "B50-lr0.02": 2.38,
    "B200-lr0.02": 2.27,
    "B200-lr0.04": 2.50,
    "B800-lr0.02": 2.27,
    "B800-lr0.08": 2.48,
}


def train_arm(lab: Lab, arm: str) -> GradientFlow:
    """SGD with momentum for 1,500 steps, watched; the distance law of its record."""
    batch, rate = ARMS[arm]
    train, _ = datasets.load_dataset("mnist5k", seed=SEED).split(EXAMPLES)
    x, y = train.inputs.flatten(1), train.labels
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    order, start = torch.Generator().manual_seed(SEED), parameters_to_vector(model.parameters()).detach()
    distance: list[float] = []
    with diag.watch(model, run=lab.run_folder(arm), instruments=["gradient_flow"]):
        while len(distance) < STEPS:
            for rows in torch.randperm(EXAMPLES, generator=order).split(batch)[: STEPS - len(distance)]:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
                distance.append(float((parameters_to_vector(model.parameters()).detach() - start).norm()))
    # The watch measures distances as its budget allows; for numbers that repeat exactly every step is taken.
    result = diag.gradient_flow(history=record(distance, rate, len(start)))
    assert isinstance(result, GradientFlow)
    r2 = result.r2_by_law
    lab.say(
        f"  {arm}: slope {result.growth_slope:.2f}, R^2 log {r2['log']:.3f} sqrt {r2['sqrt']:.3f}, exponent "
        f"{result.growth_exponent:.2f}, distance at steps 10, 100 and 1,000: {distance[9]:.2f} {distance[99]:.2f} "
        f"{distance[999]:.2f}"
    )
    return result


def record(distance: list[float], rate: float, size: int) -> History:
    """A history of nothing but the distance of all parameters from the start, at one learning rate."""
    rows = empty_history({"parameters": size}, len(distance))
    column = numpy.array(distance, numpy.float32)[:, None]
    return dataclasses.replace(rows, distance=column, learning_rate=numpy.full(len(distance), rate))


def run(lab: Lab) -> list[Expectation]:
    """Five pairs of batch size and learning rate, the same number of updates."""
    found = {arm: train_arm(lab, arm) for arm in ARMS}
    slopes = {arm: result.growth_slope for arm, result in found.items()}
    expectations = [
        Expectation(
            f"{arm}: R^2 of log less that of sqrt, t in [10, 1500]",
            "positive",
            r.r2_by_law["log"] - r.r2_by_law["sqrt"],
            low=0.0,
        )
        for arm, r in found.items()
    ]
    expectations += [
        Expectation(f"{arm}: slope c of a + c log t", EXPECTED_SLOPES[arm], slope) for arm, slope in slopes.items()
    ]
    same_rate = [slope for arm, slope in slopes.items() if arm.endswith("lr0.02")]
    expectations += [
        Expectation(
            "largest over smallest slope, all arms",
            "2.50 / 2.27",
            max(slopes.values()) / min(slopes.values()),
            high=1.15,
        ),
        Expectation(
            "largest over smallest slope, equal learning rate",
            "2.38 / 2.27",
            max(same_rate) / min(same_rate),
            high=1.15,
        ),
    ]
    return expectations


CARD = Card(
    title="The distance from the start grows with log t",
    source="Hoffer, Hubara, Soudry 2017, arXiv:1705.08741",
    claim=(
        "Over steps 10 to 1,500 at one learning rate the distance of the weights from their start follows "
        "a + c log t better than a + c sqrt t, and c hardly depends on the batch size: iterations count, not "
        "epochs."
    ),
    takes="1 minute",
    run=run,
    notes=(
        "One or two decades do not identify the law: on steps from 100 on sqrt may fit better. The numbers "
        "describe; decay, Adam, normalisation and a changing learning rate break the interpretation."
    ),
)
