"""Flipped labels on real digits: how many of them the instruments name, beside a plain ranking by loss."""

from __future__ import annotations

import torch
from reproducing import Card, Expectation, Lab
from torch import Tensor, nn

import diag
from diag import datasets

EXAMPLES, FLIPPED, BATCH, SEEDS = 1000, 50, 100, (0, 1, 2)
EPOCHS = (5, 20, 60)


def precision(ranked: Tensor, flipped: Tensor) -> float:
    """Share of the first 50 rows that carry a flipped label; 5 % by chance."""
    return float(torch.isin(ranked[:FLIPPED], flipped).double().mean())


def train_arm(lab: Lab, seed: int) -> dict[int, dict[str, float]]:
    """SGD on 1,000 digits of which 50 have a wrong label; precision at 50 of each ranking at some epochs."""
    data = datasets.load_dataset("digits").shuffled(seed)[slice(0, EXAMPLES)]
    generator = torch.Generator().manual_seed(seed)
    flipped = torch.randperm(EXAMPLES, generator=generator)[:FLIPPED]
    x, y = data.inputs.flatten(1) - data.inputs.flatten(1).mean(0), data.labels.clone()
    y[flipped] = (y[flipped] + torch.randint(1, 10, (FLIPPED,), generator=generator)) % 10
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = {}
    with lab.recorder(f"seed-{seed}", model, optimizer="SGD, lr 0.05, momentum 0.9", seed=seed) as record:
        for epoch in range(1, EPOCHS[-1] + 1):
            for rows in torch.randperm(EXAMPLES, generator=generator).split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            if epoch in EPOCHS:
                snapshot = diag.Snapshot(model, nn.CrossEntropyLoss(), (x, y))
                opposing = diag.opposing_signals(snapshot, k=FLIPPED // 2)
                record.append_outcome(epoch * (EXAMPLES // BATCH), opposing)
                gradients = snapshot.quantity("per_example_gradients")
                with_mean = gradients.project(gradients.mean())[:, 0] / gradients.norms().clamp_min(1e-12)
                named = torch.as_tensor([*opposing.group_a.tolist(), *opposing.group_b.tolist()])
                found[epoch] = {
                    "opposing": precision(named, flipped),
                    "loss": precision(snapshot.quantity("losses").argsort(descending=True), flipped),
                    "norm": precision(gradients.norms().argsort(descending=True), flipped),
                    "against the mean": precision(with_mean.argsort(), flipped),
                }
                lab.say(f"  seed {seed} epoch {epoch}: {found[epoch]}")
    return found


def run(lab: Lab) -> list[Expectation]:
    """Mean precision over three seeds."""
    arms = [train_arm(lab, seed) for seed in SEEDS]

    def mean(epoch: int, name: str) -> float:
        return sum(arm[epoch][name] for arm in arms) / len(arms)

    names = {
        "opposing": "the rows that opposing_signals names",
        "loss": "the 50 largest losses",
        "norm": "the 50 largest gradient norms",
        "against the mean": "the 50 gradients most against the mean",
    }
    rows = [
        Expectation(f"epoch {epoch}: flipped among {text}", "5 % by chance", 100 * mean(epoch, name), unit="%")
        for epoch in EPOCHS
        for name, text in names.items()
    ]
    best = max(mean(epoch, "loss") for epoch in EPOCHS)
    return [*rows, Expectation("a plain loss ranking at its best epoch", "> 60 %", 100 * best, low=60, unit="%")]


CARD = Card(
    title="Flipped labels among the examples that instruments name",
    source="ours; no paper claims it",
    claim=(
        "Of 1,000 digits 50 carry a wrong label. How many of the 50 rows that an instrument names are among them, "
        "beside the 50 largest losses, over three seeds."
    ),
    takes="20 seconds",
    run=run,
    notes=(
        "opposing_signals looks for two groups in a sharp direction, not for wrong labels: where it does worse "
        "than a ranking by loss, rank by loss."
    ),
)
