"""What a watch expects a first measurement of curvature to take, beside what it takes.

    python scripts/bench_estimates.py [--steps 20]

The demo's MLP on digits and a small GPT on source text train under a watch that measures nothing by itself; then
each instrument that needs the Hessian measures, twice: with its self-test in full and with the one that is
carried. Printed are seconds of wall time, and the estimate as a share of the first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import bench_curvature
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.registry import instruments


def mlp() -> tuple[nn.Module, Callable[..., Any], tuple[torch.Tensor, torch.Tensor]]:
    images, labels = bench_curvature.digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return model, F.cross_entropy, (images, labels)


class SmallGPT(nn.Module):
    """Two blocks of width 64 on bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, 64), nn.Parameter(0.02 * torch.randn(64, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.blocks(self.embedding(tokens) + self.position, mask=mask, is_causal=True))


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt() -> tuple[nn.Module, Callable[..., Any], tuple[torch.Tensor, torch.Tensor]]:
    rows = bench_curvature.text()
    torch.manual_seed(0)
    return SmallGPT(), token_loss, (rows[:, :-1], rows[:, 1:])


def measure(name: str, steps: int) -> None:
    model, loss_fn, (x, y) = {"MLP": mlp, "GPT": gpt}[name]()
    batch, probe = {"MLP": (64, 512), "GPT": (16, 32)}[name]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    dear: dict[str, dict[str, Any]] = {
        n: {} for n, i in instruments().items() if any(q.quantity.name == "hessian" for q in i.needs)
    }
    watched = diag.watch(model, loss_fn=loss_fn, probe=(x[:probe], y[:probe]), instruments=dear, budget=1e-9)
    generator = torch.Generator().manual_seed(0)
    with watched as watcher:
        for _ in range(steps):
            rows = torch.randint(len(x), (batch,), generator=generator)
            optimizer.zero_grad()
            loss_fn(model(x[rows]), y[rows]).backward()
            optimizer.step()
        expected = {n: a.estimate for n, a in watcher._measurements.schedule.accounts.items()}
        for instrument in dear:
            taken = []
            for _ in range(2):
                began = time.perf_counter()
                watcher.measure(instrument)
                taken.append(time.perf_counter() - began)
            last = watcher.run.series(instrument)
            products = f"{last[-1][1].scalars().get('num_products', float('nan')):.0f}" if last else "none"
            estimate = expected[instrument]
            print(
                f"{name:4s} {instrument:20s} estimate {estimate:7.2f} s   first {taken[0]:7.2f}   second "
                f"{taken[1]:7.2f}   estimate / first {estimate / taken[0]:5.2f}   products {products}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, diag {diag.__version__}")
    for name in ("MLP", "GPT"):
        measure(name, given.steps)


if __name__ == "__main__":
    main()
