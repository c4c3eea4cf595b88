#!/usr/bin/env python3
"""Neural collapse and effective rank of a million features: wall time and memory, against 60 s and 1 GB.

    .venv/bin/python scripts/bench_features.py                            # 1,000,000 x 512 of 1,000 classes
    .venv/bin/python scripts/bench_features.py --examples 100000 --threads 1

The features are class means with Gaussian noise around them, drawn again in every pass in blocks of 10,000 rows, so
that they are never all in memory; what drawing them takes is measured by itself and left out. Printed are seconds,
the peak of the process beyond what it held before, and NC1~ beside d sigma^2 / Tr Sigma_B. Exit status 1 beyond a
limit, which holds for the whole size alone.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import diag
from diag.snapshot.inside.layers import LayerOutputs

BLOCK, NOISE = 10_000, 0.5
MOST_SECONDS, MOST_BYTES = 60.0, 1 << 30


@dataclass
class Drawn:
    """Features of `examples` rows in `width` dimensions, `classes` means and noise around them."""

    examples: int
    width: int
    classes: int
    seconds: float = field(default=0.0)

    def __post_init__(self) -> None:
        self.means = torch.randn(self.classes, self.width, generator=torch.Generator().manual_seed(0))
        self.labels = torch.arange(self.examples) % self.classes

    def visit(self, take: Callable[[str, Tensor, int], None], noise: float) -> None:
        """One pass, block by block, the same numbers every time."""
        generator = torch.Generator().manual_seed(1)
        for start in range(0, self.examples, BLOCK):
            began = time.perf_counter()
            y = self.labels[start : start + BLOCK]
            block = self.means[y] + NOISE * torch.randn(len(y), self.width, generator=generator)
            self.seconds += time.perf_counter() - began
            take("features", block, start)

    @property
    def expected(self) -> float:
        """NC1~ of an infinite sample: d sigma^2 over the trace between classes."""
        centred = self.means.double() - self.means.double().mean(0)
        return self.width * NOISE**2 / float(centred.square().sum() / self.classes)


def peak() -> int:
    """The largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(name: str, drawn: Drawn, call: Callable[[LayerOutputs], Any]) -> tuple[Any, bool]:
    """The result, and whether it kept to both limits."""
    drawn.seconds, before, began = 0.0, peak(), time.perf_counter()
    result = call(LayerOutputs(drawn.visit, drawn.labels))
    seconds, more = time.perf_counter() - began - drawn.seconds, peak() - before
    print(f"{name:20} {seconds:7.1f} s (and {drawn.seconds:.1f} s of drawing)  {more / 2**30:.2f} GB more")
    return result, seconds <= MOST_SECONDS and more <= MOST_BYTES


def main() -> int:
    """Measure both instruments; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    drawn = Drawn(given.examples, given.width, given.classes)
    collapse, first = measured(
        "collapse_by_layer", drawn, lambda o: diag.collapse_by_layer(layer_outputs=o, labels=drawn.labels)
    )
    print(f"{'':20} NC1~ {collapse.last_nc1_ratio:.4f}, expected {drawn.expected:.4f}")
    _, second = measured("representation", drawn, lambda o: diag.representation(layer_outputs=o))
    return 0 if first and second else 1


if __name__ == "__main__":
    sys.exit(main())
