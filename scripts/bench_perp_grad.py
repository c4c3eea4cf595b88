#!/usr/bin/env python3
"""What perp_grad adds to an optimizer's step, beside torch's AdamW in its forms and beside the memory moved.

    .venv/bin/python scripts/bench_perp_grad.py [--repeats 20] [--device cpu]

Prints milliseconds (the fastest of the repeats, since what else runs only adds; on a CPU those of the processor)
and the share of the step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from diag import remedies

MODELS: dict[str, Callable[[], nn.Module]] = {
    "3 matrices, 0.1 M": lambda: nn.Sequential(nn.Linear(226, 200), nn.Linear(200, 200), nn.Linear(200, 113)),
    "8 matrices, 8.4 M": lambda: nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))),
    "6 transformer blocks, 4.7 M": lambda: nn.Sequential(
        *(nn.TransformerEncoderLayer(256, 4, 1024) for _ in range(6))
    ),
}
FORMS: dict[str, dict[str, bool]] = {"as it is": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def fastest(call: Callable[[], object], repeats: int, device: str) -> float:
    """Milliseconds of the fastest call."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    torch.set_num_threads(1)
    call()
    best = float("inf")
    for _ in range(repeats):
        began = clock()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, clock() - began)
    return 1000 * best


def measure(name: str, repeats: int, device: str) -> None:
    """A line for each form of AdamW and each variant of perp_grad."""
    model = MODELS[name]().to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for form, given in FORMS.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, **given)
        plain = fastest(optimizer.step, repeats, device)
        for whole in (False, True):
            handle = remedies.perp_grad(optimizer, whole=whole)
            more = fastest(optimizer.step, repeats, device) - plain
            handle.remove()
            variant = "whole" if whole else "each tensor"
            print(f"{name:28} AdamW {form:8} {plain:8.2f} ms  {variant:11} +{more:6.2f} ms  {more / plain:6.1%}")


def main() -> None:
    """Measure all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    for name in MODELS:
        measure(name, given.repeats, given.device)


if __name__ == "__main__":
    main()
