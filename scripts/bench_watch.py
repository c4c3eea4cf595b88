#!/usr/bin/env python
"""What watching costs: watched and unwatched training of three networks, step by step in turn.

    scripts/bench_watch.py [--model mlp conv transformer] [--steps 400] [--mode always-on everything]

The two trainings run in two processes (torch's hooks belong to a process), one block of steps at a time in turn,
in an order that alternates. `always-on` is the ratio of the median step times, with no expensive measurement;
`everything` is the ratio of the whole run's times with every instrument at budget=0.05, the end of the watch
included. Both are given by wall time and by processor time; always-on also by the first decile of the step times,
which other programs on the machine disturb least.
Bars: always-on <= 1.03, everything <= 1.07.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time

import torch
from torch import nn
from torch.nn import functional as F

import diag

BLOCK = 10


class Transformer(nn.Module):
    """A small language model that is trained by flattening its logits."""

    def __init__(self, vocabulary=256, width=128, layers=4, length=64):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens):
        x = self.embed(tokens) + self.position
        return self.head(self.blocks(x, mask=self.mask, is_causal=True))


def mlp():
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    x, y = torch.randn(4096, 784), torch.randint(0, 10, (4096,))
    return model, torch.optim.Adam(model.parameters(), 1e-3), x, y, 128, F.cross_entropy, None


def conv():
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(1600, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    x, y = torch.randn(2048, 1, 28, 28), torch.randint(0, 10, (2048,))
    return model, torch.optim.SGD(model.parameters(), 0.02, momentum=0.9), x, y, 64, nn.CrossEntropyLoss(), None


def transformer():
    model = Transformer()
    x = torch.randint(0, 256, (1024, 65))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def loss(logits, targets):
        return F.cross_entropy(logits.view(-1, 256), targets.reshape(-1))

    return model, optimizer, x[:, :-1], x[:, 1:], 16, loss, 1.0


MODELS = {"mlp": mlp, "conv": conv, "transformer": transformer}


def worker(name: str, watched: bool, mode: str, pipe) -> None:
    """Train on command: a number of steps, or None to end; replies with the (wall, processor) time of each."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, optimizer, x, y, batch, loss_fn, clip = MODELS[name]()
    watcher = None
    with tempfile.TemporaryDirectory() as folder:
        if watched:
            instruments = [] if mode == "always-on" else None
            watcher = diag.watch(model, run=os.path.join(folder, "run"), instruments=instruments)
        done = 0
        while (steps := pipe.recv()) is not None:
            times = []
            for _ in range(steps):
                rows = torch.randint(0, len(x), (batch,))
                wall, cpu = time.perf_counter(), time.process_time()
                optimizer.zero_grad()
                loss_fn(model(x[rows]), y[rows]).backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                times.append((time.perf_counter() - wall, time.process_time() - cpu))
                done += 1
            pipe.send(times)
        wall, cpu = time.perf_counter(), time.process_time()
        about = {}
        if watcher is not None:
            watcher.close()
            about = facts(watcher)
        pipe.send(((time.perf_counter() - wall, time.process_time() - cpu), about))


def facts(watcher) -> dict:
    """What the run says of itself: how often what was measured, and the share of time."""
    run = watcher.run
    counts = {name: len(run.series(name)) for name in run.instruments}
    extended = float((run.history.distance[:, 0] == run.history.distance[:, 0]).mean())
    errors = [e.text for e in run.events if e.kind == "internal error"]
    share = run.watch_seconds / run.wall_seconds
    return {"counts": counts, "share": share, "extended": extended, "rows": len(run.history), "errors": errors}


def compare(name: str, mode: str, steps: int) -> None:
    """Run both trainings in turn and print the ratios."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for watched in (False, True):
        ours, theirs = context.Pipe()
        process = context.Process(target=worker, args=(name, watched, mode, theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
    times: tuple[list, list] = ([], [])
    for block in range(-1, steps // BLOCK):
        for side in (0, 1) if block % 2 else (1, 0):
            pipes[side].send(BLOCK)
            got = pipes[side].recv()
            if block >= 0:  # the first block warms up
                times[side].extend(got)
    ends = []
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        ends.append(pipe.recv())
        process.join()
    report(name, mode, times, ends)


def report(name: str, mode: str, times, ends) -> None:
    """One line of results."""
    about = ends[1][1]
    ratios, quick = [], []
    for which in (0, 1):
        plain, watched = [t[which] for t in times[0]], [t[which] for t in times[1]]
        if mode == "always-on":
            ratios.append(statistics.median(watched) / statistics.median(plain))
            quick.append(statistics.quantiles(watched, n=10)[0] / statistics.quantiles(plain, n=10)[0])
        else:
            ratios.append((sum(watched) + ends[1][0][which]) / sum(plain))
    step = 1e3 * statistics.median(t[0] for t in times[0])
    print(
        f"{name:12s} {mode:11s} {step:7.2f} ms/step  wall {ratios[0]:.3f}  cpu {ratios[1]:.3f}  "
        f"{f'quickest tenth {quick[0]:.3f} / {quick[1]:.3f}  ' if quick else ''}"
        f"rows {about['rows']}, share {about['share']:.3f}, update norms at {about['extended']:.0%} of steps, "
        f"{about['counts'] or ''} {about['errors'] or ''}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--mode", nargs="+", choices=["always-on", "everything"], default=["always-on", "everything"]
    )
    parser.add_argument("--steps", type=int, default=400)
    chosen = parser.parse_args()
    versions = f"python {platform.python_version()}, torch {torch.__version__}, diag {diag.__version__}"
    print(f"{versions}; one thread; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    from diag.registry import instruments

    instruments()  # importing them is not part of a step
    for name in chosen.model:
        for mode in chosen.mode:
            compare(name, mode, chosen.steps)


if __name__ == "__main__":
    main()
