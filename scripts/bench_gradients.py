"""Time and memory of per-example gradients, against vmap(grad) and Opacus, on four models.

    python scripts/bench_gradients.py                       # all models
    python scripts/bench_gradients.py --models mlp --repeats 5
    python scripts/bench_gradients.py --opacus /tmp/opacus/lib/python3.11/site-packages

Every contender is timed in turn, `--repeats` rounds, in CPU seconds of one thread, which other work on the machine
disturbs less than the clock; the table shows medians, the extra time over one ordinary forward and backward pass,
the peak of memory allocated during the call over that of the ordinary pass, and the worst relative error of the
squared norms against a float64 loop. The self-test of the first call is shown by itself, since it is paid once for
a model. "A step's" rows are the training step with the question answered in its own backward pass, so the step is
part of their time and memory; "unasked" keeps what any later question would need. Opacus is optional
(`pip install diag[bench]`).
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diag.gradients import Gram, ModelGradients, SquaredNorms, StepGradients, plan_for_steps
from diag.gradients.queries import Query
from diag.snapshot.batch import Batch
from diag.snapshot.reading.forms import as_batch

Loss = Callable[[Tensor, Tensor], Tensor]


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A small causal transformer; `width` 128 and 512 are the two sizes."""

    def __init__(self, width: int, depth: int = 4, vocabulary: int = 512, length: int = 256) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        # One row of positions for each example, which Opacus needs, costs the others nothing.
        where = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape).contiguous()
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(where))))


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def conv_net() -> nn.Module:
    def stage(i: int, o: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(8, o), nn.ReLU()]

    return nn.Sequential(
        *stage(3, 32, 1), *stage(32, 32, 1), *stage(32, 64, 2), *stage(64, 64, 1), *stage(64, 128, 2),
        *stage(128, 128, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def problems(names: list[str]) -> dict[str, tuple[nn.Module, Loss, Batch]]:
    torch.manual_seed(0)
    made: dict[str, Callable[[], tuple[nn.Module, Loss, Any]]] = {
        "mlp": lambda: (
            nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)),
            F.cross_entropy,
            (torch.randn(256, 784), torch.randint(10, (256,))),
        ),
        "conv": lambda: (conv_net(), F.cross_entropy, (torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))),
        "gpt128": lambda: (GPT(128), token_loss, tuple(torch.randint(512, (8, 128)) for _ in range(2))),
        "gpt512": lambda: (GPT(512), token_loss, tuple(torch.randint(512, (4, 256)) for _ in range(2))),
    }
    found = {}
    for name in names:
        model, loss_fn, data = made[name]()
        found[name] = (model.eval(), loss_fn, as_batch(data))
    return found


def contenders(model: nn.Module, loss_fn: Loss, batch: Batch, opacus: bool) -> dict[str, Callable[[], Any]]:
    """Name -> one call. The first is the ordinary pass that the others are compared with."""
    parameters = dict(model.named_parameters())

    def ordinary() -> Any:
        loss = loss_fn(batch.forward(model), batch.targets)
        return torch.autograd.grad(loss, list(parameters.values()))

    engine = ModelGradients(model, loss_fn, [batch])
    everyone = [torch.arange(batch.size)]

    def fresh() -> ModelGradients:
        engine._known.clear()
        return engine

    plan = plan_for_steps(model, loss_fn, batch)

    def step(ask: Query | None) -> Callable[[], Any]:
        """The ordinary pass with this question answered on its way, or with all kept and the norms asked after."""

        def call() -> Any:
            with StepGradients(model, plan, batch.size, ask=None if ask is None else [ask]) as seen:
                ordinary()
            return seen.ask(ask or SquaredNorms())[0]

        return call

    def vmapped() -> Tensor:
        def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return loss_fn(torch.func.functional_call(model, values, (x[None],)), y[None])

        values = {k: p.detach() for k, p in parameters.items()}
        rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(values, batch.args[0], batch.targets)
        return torch.stack([g.flatten(1).square().sum(1) for g in rows.values()]).sum(0)

    calls: dict[str, Callable[[], Any]] = {
        "forward + backward": ordinary,
        "diag: norms": lambda: fresh().norms(),
        "diag: norms and mean gradient": lambda: fresh().group_gram_by_layer(everyone),
        "diag: gram": lambda: fresh().gram(),
        "diag: a step's norms": step(SquaredNorms()),
        "diag: a step's gram": step(Gram()),
        "diag: a step's norms, unasked": step(None),
        "vmap(grad)": vmapped,
    }
    if opacus:
        calls |= opacus_contenders(model, loss_fn, batch)
    return calls


def opacus_contenders(model: nn.Module, loss_fn: Loss, batch: Batch) -> dict[str, Callable[[], Any]]:
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

    held = GradSampleModule(copy.deepcopy(model).train())
    ghost = GradSampleModuleFastGradientClipping(
        copy.deepcopy(model).train(), max_grad_norm=1.0, use_ghost_clipping=True
    )

    def run(wrapped: Any) -> None:
        wrapped.zero_grad(set_to_none=True)
        loss_fn(wrapped(*batch.args), batch.targets).backward()

    def per_sample() -> Tensor:
        run(held)
        rows = [p.grad_sample for p in held.parameters()]
        norms = torch.stack([g.flatten(1).square().sum(1) for g in rows]).sum(0)
        for p in held.parameters():
            p.grad_sample = None
        return norms

    def norms_only() -> Tensor:
        run(ghost)
        return ghost.get_norm_sample().square()

    return {"Opacus: per-sample gradients": per_sample, "Opacus: ghost norms": norms_only}


def squared_norms_by_loop(model: nn.Module, loss_fn: Loss, batch: Batch) -> Tensor:
    double = copy.deepcopy(model).double()
    rows = []
    for i in range(batch.size):
        part = batch.slice(i, i + 1)
        args = [a.double() if a.is_floating_point() else a for a in part.args]
        gradients = torch.autograd.grad(loss_fn(double(*args), part.targets), list(double.parameters()))
        rows.append(sum(g.square().sum() for g in gradients))
    return torch.stack(rows)  # type: ignore[arg-type]


def worst_error(name: str, found: Any, truth: Tensor) -> float | None:
    if name == "diag: norms":
        found = found.square()
    elif "step's norms" in name:
        found = sum(found.values())
    elif not name.startswith(("vmap", "Opacus")):
        return None
    return float(((found.double() - truth) / truth).abs().max())


def peak_memory(call: Callable[[], Any]) -> int:
    """The most bytes allocated at one time during the call, by the allocator's own events."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def measure(model: nn.Module, loss_fn: Loss, batch: Batch, repeats: int, opacus: bool) -> list[list[str]]:
    calls = contenders(model, loss_fn, batch, opacus)
    truth = squared_norms_by_loop(model, loss_fn, batch)
    errors = {name: worst_error(name, call(), truth) for name, call in calls.items()}  # also the warm-up
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.process_time()
            call()
            times[name].append(time.process_time() - began)
    memory = {name: peak_memory(call) for name, call in calls.items()}
    base, base_memory = statistics.median(times["forward + backward"]), memory["forward + backward"]
    rows = []
    for name in calls:
        median, error = statistics.median(times[name]), errors[name]
        rows.append([
            name, f"{1000 * median:.1f} ms", f"{100 * (median / base - 1):+.0f} %",
            f"{memory[name] / 2**20:.0f} MB", f"{memory[name] / base_memory:.2f}x",
            "" if error is None else f"{error:.1e}",
        ])  # fmt: skip
    began = time.process_time()
    ModelGradients(model, loss_fn, [batch]).norms()
    once = time.process_time() - began - statistics.median(times["diag: norms"])
    rows.append(["diag: self-test, once a model", f"{1000 * once:.1f} ms", f"{100 * once / base:.0f} %", *[""] * 3])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mlp", "conv", "gpt128", "gpt512"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--opacus", help="folder that holds opacus, where it is not installed")
    options = parser.parse_args()
    if options.opacus:
        sys.path.append(options.opacus)
    try:
        import opacus

        version = opacus.__version__
    except ImportError:
        version = "absent"
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, opacus {version}, CPU time of one thread, median of {options.repeats}")
    heads = ["", "time", "extra", "peak", "of ordinary", "worst error"]
    for name, (model, loss_fn, batch) in problems(options.models).items():
        size = sum(p.numel() for p in model.parameters())
        print(f"\n{name}: {size / 1e6:.2f}M parameters, batch {batch.size}")
        for row in [heads, *measure(model, loss_fn, batch, options.repeats, version != "absent")]:
            print("  " + row[0].ljust(32) + "".join(cell.rjust(13) for cell in row[1:]))


if __name__ == "__main__":
    main()
