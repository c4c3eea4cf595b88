"""Gradient descent trains at the edge of stability: the sharpness climbs to 2 / learning rate and stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from reproducing import Card, Expectation, Lab
from torch import Tensor, nn

import diag
from diag import datasets

EXAMPLES, EVERY = 1000, 10
PLANTED, CHANNELS, VALUE = 20, 16, 6.0  # images a group, extra inputs, their value


@dataclass(frozen=True)
class Arm:
    """Full-batch gradient descent at one learning rate, with or without two planted groups of outliers."""

    rate: float
    steps: int
    planted: bool
    seed: int = 0


ARMS = {
    "planted": Arm(0.2, 400, True),
    "planted-seed-1": Arm(0.2, 400, True, seed=1),
    "natural": Arm(0.5, 500, False),
    "small-steps": Arm(0.02, 400, True),
}


def data(planted: bool, seed: int) -> tuple[Tensor, Tensor]:
    """1,000 centred digits with 16 more inputs: 6 for 20 images of a 3 and 20 of an 8 where planted, else 0."""
    digits = datasets.load_dataset("digits", seed=seed)
    x, y = digits.inputs.flatten(1)[:EXAMPLES], digits.labels[:EXAMPLES]
    extra = torch.zeros(len(x), CHANNELS)
    if planted:
        for label in (3, 8):
            extra[(y == label).nonzero().flatten()[:PLANTED]] = VALUE
    return torch.cat([x - x.mean(0), extra], 1), nn.functional.one_hot(y, 10).float()


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """1/2 ||f - y||^2, the mean over the examples."""
    return 0.5 * (outputs - targets).square().sum(1).mean()


def train_arm(lab: Lab, name: str, arm: Arm) -> dict[int, float]:
    """The sharpness, the largest eigenvalue of the Hessian, at every tenth step."""
    x, y = data(arm.planted, arm.seed)
    torch.manual_seed(arm.seed)
    layers: list[Callable[..., nn.Module] | nn.Module] = [
        nn.Linear(x.shape[1], 64),
        nn.Tanh(),
        nn.Linear(64, 64),
        nn.Tanh(),
    ]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=arm.rate)
    sharpness = {}
    with lab.recorder(name, model, optimizer=f"gradient descent, rate {arm.rate}", seed=arm.seed) as record:
        for step in range(arm.steps + 1):
            if step % EVERY == 0:
                snapshot = diag.Snapshot(model, half_squared_error, (x, y), optimizer=optimizer)
                result = diag.edge_of_stability(snapshot, batch_size=EXAMPLES, trace_probes=4)
                record.append_outcome(step, result)
                sharpness[step] = result.sharpness
            optimizer.zero_grad()
            half_squared_error(model(x), y).backward()
            optimizer.step()
    course = " ".join(f"{v * arm.rate / 2:.2f}" for step, v in sharpness.items() if step % 50 == 0)
    lab.say(f"  {name}: sharpness over 2 / learning rate at every 50th step: {course}")
    return sharpness


def run(lab: Lab) -> list[Expectation]:
    """Two data sets at the edge, a second seed, and learning rates too small to reach it."""
    found = {name: train_arm(lab, name, arm) for name, arm in ARMS.items()}

    def ratio(name: str, last: int = 100) -> float:
        arm = ARMS[name]
        return median(v for step, v in found[name].items() if step > arm.steps - last) * arm.rate / 2

    planted = found["planted"]
    crossing = next((step for step, value in planted.items() if value > 10), ARMS["planted"].steps)
    return [
        Expectation("planted: sharpness at the start", 2.9, planted[0], 2, 4),
        Expectation(
            "planted: step at which it crosses 2 / 0.2 = 10", "160; seeds 1-3: 180, 180, 250", crossing, 100, 300
        ),
        Expectation(
            "planted: median of the last 100 steps over 2 / rate", "0.996 to 1.007", ratio("planted"), 0.95, 1.15
        ),
        Expectation("the same, seed 1", "0.98", ratio("planted-seed-1"), 0.95, 1.15),
        Expectation("natural digits, rate 0.5", "0.98 to 1.13", ratio("natural"), 0.95, 1.15),
        Expectation("control: rate 0.02, as many steps", "below 1", ratio("small-steps"), high=0.5),
    ]


CARD = Card(
    title="Gradient descent trains at the edge of stability",
    source="Cohen, Kaur, Li, Kolter, Talwalkar 2021, arXiv:2103.00065",
    claim=(
        "Under full-batch gradient descent on the squared error the largest eigenvalue of the Hessian climbs until "
        "it reaches 2 / learning rate and then hovers there, while the loss goes on falling; at a tenth of the "
        "learning rate it stays below that threshold."
    ),
    takes="2 minutes",
    run=run,
    notes="Tanh MLP 80-64-64-10 on 1,000 centred digits. With cross-entropy the sharpness falls again later.",
)
