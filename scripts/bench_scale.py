#!/usr/bin/env python3
"""Curvature of a GPT on 1, 2 and 4 processes: time of a product, memory a rank, and the same eigenvalues.

    scripts/bench_scale.py                                   # 10M parameters
    scripts/bench_scale.py --size 100M --products 6 --batch 4
    scripts/bench_scale.py --way fsdp                        # parameters sharded by fully_shard, copied whole
    scripts/bench_scale.py --way by_layer                    # the same, whole weights of one layer at a time

The data, `--batch` texts of `--length` tokens, are shared out over the processes, each of one thread. The basis is
that of `--products` Lanczos steps. Memory: the peak of a process beyond what it held before it measured. A table of
one row a number of processes is printed; `--json FILE` keeps it. Exit status 1 where the largest eigenvalues of
two rows differ by more than 1e-4, which is the float32 rounding of sums in another order.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PYTHON = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "python"
# name -> layers, width, words
SIZES = {
    "tiny": (1, 16, 64),
    "1M": (4, 128, 2_000),
    "10M": (6, 320, 8_000),
    "100M": (12, 768, 20_000),
    "350M": (24, 1024, 50_000),
}
SAME_WITHIN = 1e-4


def gpt(size: str, length: int) -> Any:
    """A decoder of pre-norm blocks; its first and last weight are one."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    layers, width, words = SIZES[size]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:
            heads = max(width // 64, 1)
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1))
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(self.between(x))))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
            nn.init.normal_(self.words.weight, std=0.02)
            self.head.weight = self.words.weight

        def forward(self, tokens: Any) -> Any:
            return self.head(self.norm(self.blocks(self.words(tokens) + self.places.weight[: tokens.shape[1]])))

    torch.manual_seed(0)
    return GPT()


def token_loss(outputs: Any, targets: Any) -> Any:
    """The mean cross-entropy of the next tokens."""
    from torch.nn import functional as F

    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def memory() -> tuple[int, int]:
    """Bytes of this process that no file holds: now, and the peak of all that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024


def one_rank(asked: argparse.Namespace) -> None:
    """Measure on this process's share; rank 0 prints what it found."""
    import torch
    import torch.distributed as dist

    import diag
    from diag.linalg.reductions import normal
    from diag.linalg.spectrum import spectrum

    torch.set_num_threads(1)
    rank, world = asked.rank, asked.world
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{asked.store}", rank=rank, world_size=world)
    model = gpt(asked.size, asked.length)
    tokens = torch.randint(
        0, SIZES[asked.size][2], (asked.batch, asked.length + 1), generator=torch.Generator().manual_seed(1)
    )
    if world > 1 and asked.way != "replicated":
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    before, _ = memory()
    snapshot = diag.Snapshot(
        model,
        token_loss,
        (tokens[:, :-1], tokens[:, 1:]),
        ranks="by_layer" if world > 1 and asked.way == "by_layer" else world > 1,
        micro_batch=asked.micro,
    )
    hessian = snapshot.quantity("hessian")
    v = hessian.spread.drawn(hessian.size, normal(torch.Generator().manual_seed(2)))
    hessian.apply(v)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        hessian.apply(v)
        times.append(time.perf_counter() - began)
    del v
    found = spectrum(
        hessian, steps=asked.products, max_products=asked.products, largest=1, tolerance=0.5, trace_probes=2
    )
    _, peak = memory()
    basis = (asked.products + 1) * hessian.part_size * 4
    row = {
        "processes": world,
        "parameters": hessian.size,
        "product_seconds": min(times),
        "basis_bytes": basis,
        "peak_bytes": peak - before,
        "largest": float(found.extremes[1]),
    }
    if rank == 0:
        print(json.dumps(row), flush=True)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        # Threads of torch that still run while the interpreter is torn down have once ended a process with SIGABRT;
        # all that was measured is printed.
        os._exit(0)


def measured(world: int, arguments: list[str]) -> dict[str, Any]:
    """The row of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [
                    sys.executable,
                    __file__,
                    *arguments,
                    "--rank",
                    str(r),
                    "--world",
                    str(world),
                    "--store",
                    f"{folder}/store",
                ],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for r in range(world)
        ]
        texts = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit(f"{world} processes: exit statuses {[process.returncode for process in ranks]}")
    row: dict[str, Any] = json.loads(texts[0].splitlines()[-1])
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, beside the first of them."""
    first = rows[0]
    lines = ["processes  s a product  of one's   basis a rank  of one's   peak a rank   largest eigenvalue"]
    for row in rows:
        lines.append(
            f"{row['processes']:9}  {row['product_seconds']:11.3f}  "
            f"{row['product_seconds'] / first['product_seconds']:8.2f}"
            f"  {row['basis_bytes'] / 1e6:9.1f} MB  {row['basis_bytes'] / first['basis_bytes']:8.2f}"
            f"  {row['peak_bytes'] / 1e6:9.1f} MB   {row['largest']:.7g}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="10M")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--way", choices=("replicated", "fsdp", "by_layer"), default="replicated")
    parser.add_argument("--products", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--micro", type=int, default=2, help="texts in one pass")
    parser.add_argument("--json", type=Path)
    for name in ("--rank", "--world"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank is not None:
        one_rank(asked)
        return 0
    given = {n: getattr(asked, n) for n in ("size", "way", "products", "batch", "length", "micro")}
    rows = [measured(world, [x for n, v in given.items() for x in (f"--{n}", str(v))]) for world in asked.processes]
    print(f"GPT of {rows[0]['parameters']:,} parameters, {asked.batch} texts of {asked.length} tokens, {asked.way}")
    print(table(rows))
    if asked.json is not None:
        about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), **given}
        asked.json.write_text(json.dumps({**about, "rows": rows}, indent=1))
    values = [row["largest"] for row in rows]
    return 0 if max(values) - min(values) <= SAME_WITHIN * abs(values[0]) else 1


if __name__ == "__main__":
    if importlib.util.find_spec("torch") is None and PYTHON.exists():
        os.execv(PYTHON, [str(PYTHON), *sys.argv])
    sys.exit(main())
