"""What a carry saves between measurements of curvature, and what it may cost in certainty.

    python scripts/bench_warm_start.py [--measurements 9] [--seeds 1]

An MLP (784-128-128-10) learns MNIST digits with SGD and with Adam; every 1, 5 and 25 steps the largest eigenvalues
of the Hessian on 512 digits are found from a random start and from what the last measurement left, which starts
cold at every fourth (see diag/curvature/carry.py). Printed are the mean products of both, how many of the
measurements gave a value further than the tolerance from a run to 1e-5, and what the self-test costs, in
products. Then the hardest case for a warm start: old eigenvectors that stay exactly eigenvectors while a larger
eigenvalue arises elsewhere, on planted spectra; how often it is missed by a warm run, and by a cold one.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import bench_curvature
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diag.curvature.carry import RENEW_EVERY
from diag.curvature.matrices import Hessian
from diag.curvature.stability.preconditioner import divisor
from diag.linalg.lanczos import eigenpairs
from diag.linalg.operator import FunctionOperator, LinearOperator
from diag.linalg.warm import warm_eigenpairs
from diag.snapshot.reading.forms import as_batches

digits = functools.cache(bench_curvature.digits)
EVERY = (1, 5, 25)
FIRST = 50  # the first measured step
RUNS = (
    ("H", 1, 1e-3),
    ("H", 1, 1e-2),
    ("H", 5, 1e-2),
    ("H", 10, 1e-3),
    ("|w| H |w|", 1, 1e-2),
    ("Adam's H", 1, 1e-3),
)
PLANTED = ((1.05, 1.1), (1.2, 1.25), (2.0, 2.02), (2.0, 2.2), (2.0, 4.0), (5.0, 5.05), (5.0, 6.0))


def training(kind: str, seed: int) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """The model and its optimizer before each step."""
    images, labels = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    if kind == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield model, optimizer
        rows = torch.randint(len(images), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()


def seen(hessian: Hessian, optimizer: torch.optim.Optimizer, name: str) -> LinearOperator:
    if name == "H":
        return hessian
    if name == "|w| H |w|":
        sizes = [p.detach().abs().flatten() for p in hessian.objective.model.parameters()]
        return hessian.diagonally_scaled(torch.cat(sizes))
    return hessian.diagonally_scaled(divisor(hessian, optimizer).rsqrt())


def compare(kind: str, every: int, measurements: int, seed: int, into: dict[Any, list[tuple[int, ...]]]) -> None:
    images, labels = digits()
    batches = list(as_batches((images[:512], labels[:512])))
    left: dict[Any, Any] = {}
    test = None
    for step, (model, optimizer) in enumerate(training(kind, seed)):
        moment, off = divmod(step - FIRST, every)
        if step < FIRST or off:
            continue
        if moment >= measurements:
            return
        hessian = Hessian(model, F.cross_entropy, batches, checked=test)
        test = hessian.self_test
        for run in RUNS:
            name, count, tolerance = run
            if name == "Adam's H" and kind == "SGD":
                continue
            operator = seen(hessian, optimizer, name)
            settings: dict[str, Any] = {"largest": count, "tolerance": tolerance, "seed": moment}
            truth = eigenpairs(operator, largest=count, tolerance=1e-5, seed=measurements).values
            cold = eigenpairs(operator, **settings)
            earlier = left.get(run) if moment % RENEW_EVERY else None
            warm, left[run] = warm_eigenpairs(operator, earlier, **settings)
            wrong = [bool(((p.values - truth).abs() > tolerance * truth[0]).any()) for p in (cold, warm)]
            into.setdefault((kind, every, run), []).append((cold.num_products, warm.num_products, *wrong))


def self_test_in_products() -> float:
    images, labels = digits()
    model, _ = next(training("SGD", 0))
    batches = list(as_batches((images[:512], labels[:512])))
    v = torch.randn(sum(p.numel() for p in model.parameters()), generator=torch.Generator().manual_seed(0))
    ratios = []
    for _ in range(9):
        hessian = Hessian(model, F.cross_entropy, batches)
        began = time.process_time()
        _ = hessian.self_test
        tested = time.process_time() - began
        hessian @ v
        began = time.process_time()
        for _ in range(10):
            hessian @ v
        ratios.append(10 * tested / (time.process_time() - began))
    return statistics.median(ratios)


def planted(old: float, new: float, bulk: Tensor, seed: int) -> tuple[bool, bool]:
    """Whether the new eigenvalue is missed: by a warm run, and by a cold one."""
    values = bulk.clone()
    values[3] = old
    _, earlier = warm_eigenpairs(FunctionOperator(lambda v: values * v, len(values)), None, largest=1, seed=seed)
    values[7] = new
    operator = FunctionOperator(lambda v: values * v, len(values))
    warm, _ = warm_eigenpairs(operator, earlier, largest=1, seed=seed + 1000)
    cold = eigenpairs(operator, largest=1, seed=seed + 1000)
    return tuple(abs(float(p.values[0]) - new) > 2e-3 * new for p in (warm, cold))  # type: ignore[return-value]


def line(key: tuple[str, int, tuple[str, int, float]], rows: list[tuple[int, ...]]) -> str:
    kind, every, (name, count, tolerance) = key
    cold, warm, wrong_cold, wrong_warm = (sum(column) for column in zip(*rows, strict=True))
    return (
        f"{kind:5s} every {every:<3d} {name:10s} {count:2d} to {tolerance:g}".ljust(40)
        + f"{cold / len(rows):8.1f} {warm / len(rows):5.1f}  {warm / cold:5.2f}"
        + f"{wrong_cold:37d} {wrong_warm:5d} {len(rows):3d}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--measurements", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; self-test: {self_test_in_products():.1f} products", flush=True)
    print(f"{'':34s} products cold  warm  ratio   off by more than the tolerance: cold  warm  of")
    for kind in ("SGD", "Adam"):
        for every in EVERY:
            table: dict[Any, list[tuple[int, ...]]] = {}
            for seed in range(given.seeds):
                compare(kind, every, given.measurements, seed, table)
            for key, rows in table.items():
                print(line(key, rows), flush=True)
    size = 2000
    uniform = 2 * torch.rand(size, generator=torch.Generator().manual_seed(1)) - 1
    tail = torch.randn(size, generator=torch.Generator().manual_seed(1)).abs() ** 3
    print(
        f"missed of 20, bulk within 1 (size {size}):  old -> new   uniform bulk: warm cold   with a tail: warm cold"
    )
    for old, new in PLANTED:
        counts = []
        for bulk in (uniform, tail / tail.max()):
            found = [planted(old, new, bulk, seed) for seed in range(20)]
            counts += [sum(w for w, _ in found), sum(c for _, c in found)]
        print(f"{old:49g} -> {new:<4g} {counts[0]:20d} {counts[1]:4d} {counts[2]:19d} {counts[3]:4d}")


if __name__ == "__main__":
    main()
