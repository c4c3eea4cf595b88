"""Without the gradient's part along the weights a network groks; with it, it does not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from reproducing import Card, Expectation, Lab
from torch import Tensor, nn

import diag
from diag.instruments.softmax_collapse.instrument import SoftmaxCollapse

WIDTH, LEARNING_RATE, EVERY, PROBE = 200, 0.01, 20, 500


def modular_addition(prime: int, share: float, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Pairs (a, b) as two one-hots with label (a + b) mod `prime`: a random `share` to train on, and the rest."""
    pairs = torch.cartesian_prod(torch.arange(prime), torch.arange(prime))
    x, y = torch.cat([F.one_hot(pairs[:, i], prime) for i in (0, 1)], 1).float(), pairs.sum(1) % prime
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    size = int(share * len(y))
    return (x[order[:size]], y[order[:size]]), (x[order[size:]], y[order[size:]])


def train_arm(
    lab: Lab, arm: str, prime: int, share: float, seed: int, epochs: int, perp: bool
) -> dict[int, SoftmaxCollapse]:
    """Full-batch AdamW without decay on float32 cross-entropy; softmax collapse and accuracies at some epochs."""
    (x, y), held_out = modular_addition(prime, share, seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(2 * prime, WIDTH, bias=False),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH, bias=False),
        nn.ReLU(),
        nn.Linear(WIDTH, prime, bias=False),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0)
    name = "AdamW on the projected gradient" if perp else "AdamW"
    if perp:
        diag.perp_grad(optimizer)
    course = {}
    with lab.recorder(arm, model, optimizer=f"{name}, lr {LEARNING_RATE}, no decay", seed=seed) as record:
        for epoch in range(1, epochs + 1):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if epoch % EVERY == 0:
                snapshot = diag.Snapshot(model, F.cross_entropy, (x[:PROBE], y[:PROBE]), held_out=held_out)
                result = diag.softmax_collapse(snapshot)
                assert isinstance(result, SoftmaxCollapse)
                record.append_outcome(epoch, result)
                course[epoch] = result
    end = course[epochs]
    lab.say(
        f"  {arm}: after {epochs} epochs accuracy {end.accuracy:.3f}, held out {end.held_out_accuracy:.4f}, "
        f"collapsed {end.collapsed:.2f}, median margin {end.median_margin:.1f}"
    )
    return course


def run(lab: Lab) -> list[Expectation]:
    """Three seeds with the projection, modulo 59; one without, modulo 113."""
    expectations = []
    for seed in (1, 2, 3):
        course = train_arm(lab, f"projected-seed-{seed}", 59, 0.5, seed, 160, perp=True)
        expectations.append(
            Expectation(
                f"projected gradient, seed {seed}: held-out accuracy at epoch 160",
                "0.995 to 1.000",
                course[160].held_out_accuracy,
                low=0.99,
            )
        )
    plain = train_arm(lab, "plain", 113, 0.4, 42, 200, perp=False)
    return [
        *expectations,
        Expectation("plain gradient: training accuracy at epoch 60", 1.0, plain[60].accuracy, low=1.0),
        Expectation(
            "plain gradient: held-out accuracy at epoch 160", "0.0005", plain[160].held_out_accuracy, high=0.02
        ),
        Expectation("plain gradient: collapsed examples at epoch 160", "none yet", plain[160].collapsed, high=0.0),
    ]


CARD = Card(
    title="Grokking without the gradient's part along the weights",
    source="Prieto, Barsbey, Mediano, Birdal 2025, arXiv:2501.04697 (Definition 7, per tensor as in its code)",
    claim=(
        "Without weight decay AdamW fits modular addition and does not generalise; when each tensor's gradient "
        "loses its part along the tensor, it generalises within 160 epochs."
    ),
    takes="1 minute",
    run=run,
    notes=(
        "In these epochs no example of the plain run has collapsed in float32, so collapse is not what keeps it "
        "from generalising here. Epochs are full-batch steps."
    ),
)
