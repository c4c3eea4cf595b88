"""The curvature engine on a GPU: right against float64 on the CPU, and how fast.

    python scripts/bench_gpu.py                 # needs a CUDA device; says so and stops without one
    python scripts/bench_gpu.py --largest       # also: the largest GPT that fits

Prints, for a GPT, the eigenvalues beside those of the float64 CPU run, products a second, the share of the time
that is spent outside the products, and the peak of device memory beside the basis.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from bench_curvature import GPT, text

from diag.curvature.matrices import Hessian
from diag.linalg.lanczos import eigenpairs, run_lanczos
from diag.linalg.operator import LinearOperator
from diag.snapshot.snapshot import Snapshot


def operator(width: int, layers: int, examples: int, device: str, dtype: torch.dtype = torch.float32) -> Hessian:
    """The Hessian of a freshly initialised GPT on `examples` rows of 64 bytes."""
    torch.manual_seed(0)
    model = GPT(width=width, layers=layers, heads=max(width // 32, 1)).to(device=device, dtype=dtype).eval()
    rows = text()[:examples].to(device)
    snapshot = Snapshot(model, nn.CrossEntropyLoss(), (rows[:, :-1].contiguous(), rows[:, 1:].contiguous()))
    return snapshot.quantity("hessian")


class Timed(LinearOperator):
    """An operator that adds up the time of its products, the device's queue emptied before and after."""

    def __init__(self, base: LinearOperator):
        super().__init__(base.size, base.dtype, base.device)
        self.base, self.seconds = base, 0.0

    def _matvec(self, v: Tensor) -> Tensor:
        result, seconds = clocked(lambda: self.base.matvec(v))
        self.seconds += seconds
        return result


def clocked(work: Callable[[], Any]) -> tuple[Any, float]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return result, time.perf_counter() - start


def correctness(device: str) -> bool:
    """The top five and the smallest on the device in float32, beside float64 on the CPU."""
    small = {"width": 32, "layers": 2, "examples": 8}
    exact = eigenpairs(operator(**small, device="cpu", dtype=torch.float64), largest=5, smallest=1, tolerance=1e-5)
    found = eigenpairs(operator(**small, device=device), largest=5, smallest=1, tolerance=1e-4)
    error = (found.values - exact.values).abs()
    good = bool((error <= found.bounds + exact.bounds).all())
    print(f"float64 on the CPU {exact.values.tolist()}\nfloat32 on {device}   {found.values.tolist()}")
    print(f"largest error {float(error.max()):.2e}, within the stated bounds: {good}")
    return good


def speed(device: str, width: int, layers: int, steps: int = 40) -> None:
    """Products a second and the share of the time outside them, measured in two runs so that the clock of the
    second does not slow the first."""
    hessian = operator(width, layers, 64, device)
    v = torch.randn(hessian.size, device=device)
    hessian.matvec(v)
    torch.cuda.reset_peak_memory_stats()
    _, total = clocked(lambda: run_lanczos(hessian, None, max_products=steps))
    timed = Timed(hessian)
    run_lanczos(timed, None, max_products=steps)
    outside = max(1 - timed.seconds / total, 0.0)
    peak, basis = torch.cuda.max_memory_allocated() / 2**30, (steps + 1) * hessian.size * 4 / 2**30
    print(
        f"{hessian.size:,} parameters: {steps / total:.1f} products a second, {outside:.1%} of the time outside "
        f"the products, peak {peak:.2f} GiB of which the basis {basis:.2f} GiB"
    )


def largest(device: str, steps: int = 20) -> None:
    """Doubles the width until memory runs out; a basis of `steps` vectors."""
    width = 256
    while True:
        try:
            hessian = operator(width, 8, 4, device)
            run_lanczos(hessian, None, max_products=steps)
            print(f"fits: {hessian.size:,} parameters with {steps} basis vectors")
            del hessian
            torch.cuda.empty_cache()
            width *= 2
        except torch.OutOfMemoryError:
            print(f"does not fit: width {width}, 8 layers")
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", action="store_true", help="look for the largest GPT that fits")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device was found, so nothing was measured; run this on a machine with a GPU.")
        return 2
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    good = correctness("cuda")
    for width, layers in ((128, 4), (512, 8)):
        speed("cuda", width, layers)
    if options.largest:
        largest("cuda")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
