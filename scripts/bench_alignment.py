#!/usr/bin/env python3
"""Time of finding symmetries, of weight matching and of a profile, against width, depth and architecture.

    scripts/bench_alignment.py                # widths 64 to 4096, depths 1 to 16, ResNet-20, the profile
    scripts/bench_alignment.py --gpt          # two GPTs of 100 million parameters (minutes, 3 GB)
    scripts/bench_alignment.py --threads 1

Both networks are independently initialised (the hardest case: nothing matches), with LayerNorm and BatchNorm
statistics as at the start; times are wall clock (and processor time, which a busy
machine changes less), medians of `--repeats`.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diag
from diag.connectivity.alignment import align_weights
from diag.connectivity.interpolation import Interpolation
from diag.connectivity.symmetries import find_symmetries

ROOT = Path(__file__).resolve().parent.parent


def architectures() -> ModuleType:
    """The networks of the tests."""
    path = ROOT / "tests" / "connectivity" / "symmetries" / "conftest.py"
    spec = importlib.util.spec_from_file_location("architectures", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def mlp(width: int, depth: int = 2) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(784, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def alike(model: nn.Module) -> nn.Module:
    """All weights of one size, so that no part (a large embedding) decides the matching alone."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02)
    return model


def measure(name: str, build: Callable[[], nn.Module], inputs: Tensor, orders: int | None, repeats: int) -> None:
    torch.manual_seed(0)
    first, second = build().eval(), build().eval()
    began = time.perf_counter()
    found = find_symmetries(first, (inputs, torch.zeros(len(inputs))))
    tracing = time.perf_counter() - began
    a, b = first.state_dict(), second.state_dict()
    seconds, cpu = [], []
    for _ in range(repeats):
        began, began_cpu = time.perf_counter(), time.process_time()
        result = align_weights(found, a, b, orders=orders)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    size = sum(p.numel() for p in first.parameters())
    print(
        f"{name:18} {size / 1e6:7.2f}M parameters {len(found.groups):3} groups, symmetries {tracing:6.2f} s, "
        f"matching {statistics.median(seconds):7.2f} s ({statistics.median(cpu):7.2f} s of processor), "
        f"{result.orders} orders, {result.passes} passes in the best",
        flush=True,
    )


def profile(
    name: str, build: Callable[[], nn.Module], data: tuple[Tensor, Tensor], repeats: int, norm_stats: str = "reset"
) -> None:
    """25 points of a profile against 25 plain evaluations of the mean loss, interleaved."""
    torch.manual_seed(0)
    first, second = build().eval(), build().eval()
    snapshot = diag.Snapshot(first, F.cross_entropy, data, micro_batch=500)
    path = Interpolation(snapshot)
    end = path.fit(second)
    ratios = []
    path.profile(end, [0.5])
    for _ in range(repeats):
        began = time.process_time()
        with torch.no_grad():
            for _ in range(25):
                sum(float(F.cross_entropy(first(b.args[0]), b.targets)) * b.size for b in snapshot.batches)
        plain = time.process_time() - began
        began = time.process_time()
        path.profile(end, [i / 24 for i in range(25)], norm_stats=norm_stats)
        ratios.append((time.process_time() - began) / plain)
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(
        f"{name:18} profile of 25 points over 25 plain evaluations, processor time: "
        f"{statistics.median(ratios):.3f} ({spread})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpt", action="store_true", help="only the two large GPTs")
    parser.add_argument("--orders", type=int, help="orders of visits (default: diag's own choice)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 256, 1024, 2048, 4096])
    parser.add_argument("--depths", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(f"torch {torch.__version__}, diag {diag.__version__}, {asked.threads} threads")
    known = architectures()
    if asked.gpt:
        build = lambda: alike(known.GPT(768, 12, 12, words=20000, context=1024))  # noqa: E731
        measure("GPT", build, torch.randint(0, 20000, (2, 16)), asked.orders, 1)
        return
    digits = torch.rand(4000, 784)
    for width in asked.widths:
        measure(f"MLP, width {width}", lambda w=width: mlp(w), digits, asked.orders, asked.repeats)
    for depth in asked.depths:
        measure(f"MLP, depth {depth}", lambda d=depth: mlp(256, d), digits, asked.orders, asked.repeats)
    images = torch.randn(200, 3, 32, 32)
    measure("ResNet-20", known.ResNet, images, asked.orders, asked.repeats)
    labels = torch.randint(0, 10, (4000,))
    profile("MLP, width 1024", lambda: mlp(1024), (digits, labels), asked.repeats)
    profile("ResNet-20, keep", known.ResNet, (images, labels[:200]), asked.repeats, "keep")
    profile("ResNet-20, reset", known.ResNet, (images, labels[:200]), asked.repeats)  # one more pass a point


if __name__ == "__main__":
    main()
