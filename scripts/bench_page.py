#!/usr/bin/env python3
"""How large a page is, how long it takes to make and to open, and how many sheets it prints on.

    scripts/bench_page.py                # an ordinary run (the demo), and 100,000 steps of a network of 200 layers
    scripts/bench_page.py --run FOLDER   # this run in place of the demo

The long run is a real watch of a few steps whose record is drawn out to 100,000 steps. A page is made by
`diag.report` in a process of its own: its seconds of CPU, which are those of the clock on an idle machine, and its
peak memory, torch included. It is opened in a headless Chromium (`CHROMIUM` names another than /usr/bin/chromium):
until it is loaded and painted, the median of five. Exit status 1 where a page is beyond a limit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

import diag
from diag import demo
from diag.run.run import Run
from diag.run.writer import RunWriter
from diag.snapshot.history import empty_history

STEPS, LAYERS, WATCHED, AT_ONCE, OPENED = 100_000, 200, 30, 5_000, 5
# What may be, by run: megabytes of the page, seconds to make it, megabytes of memory, seconds to open, sheets.
LIMITS = {
    "ordinary": {"MB": 1.0, "made s": 10, "memory MB": 1000, "opened s": 1.0, "sheets": 8},
    "long": {"MB": 1.5, "made s": 10, "memory MB": 1000, "opened s": 1.0, "sheets": 8},
}
MAKE = """
import json, resource, sys, time
import diag
diag.report(sys.argv[1], sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
print(json.dumps({"made s": time.process_time(), "memory MB": peak}))
"""
PAINTED = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


class Deep(nn.Module):
    """A residual network of `LAYERS` linear layers on digits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 10)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(LAYERS - 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = h + 0.1 * torch.relu(block(h))
        return self.last(h)


def watched(folder: Path) -> Run:
    """A few steps of the deep network."""
    data = demo.setting()
    torch.manual_seed(0)
    model = Deep()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    held_out = (data.held_out.inputs, data.held_out.labels)
    with diag.watch(model, run=folder, held_out=held_out, budget=1.0) as watcher:
        for rows in torch.randperm(len(data.train)).split(32)[:WATCHED]:
            loss = nn.functional.cross_entropy(model(data.train.inputs[rows]), data.train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return watcher.run


def rows(layers: dict[str, int]) -> Iterator[Any]:
    """The record of a training, part by part: norms that wander, a loss that falls."""
    rng = numpy.random.default_rng(0)
    level = rng.normal(size=len(layers))
    for start in range(0, STEPS, AT_ONCE):
        part = empty_history(layers, AT_ONCE)
        part.steps[:] += start
        part.loss[:] = 2.3 * numpy.exp(-part.steps / 2e4) * rng.lognormal(0, 0.3, AT_ONCE)
        part.learning_rate[:] = 1e-3
        walk = level + numpy.cumsum(rng.normal(0, 0.02, (AT_ONCE, len(layers))), axis=0)
        level = 0.9 * walk[-1]
        part.gradient_norm[:] = numpy.exp(walk + rng.normal(0, 0.5, walk.shape))
        part.applied_gradient_norm[:] = numpy.linalg.norm(part.gradient_norm, axis=1)
        part.parameter_norm[:], part.distance[:] = 5 + 0.1 * walk, numpy.sqrt(part.steps)[:, None] / 50
        part.update_norm[:] = 1e-3 * part.gradient_norm
        yield part


def drawn_out(run: Run, folder: Path) -> Path:
    """The run as one of `STEPS` steps: its results at the steps that a watch would have taken, to the last one."""
    layers = dict(zip(run.history.layers, run.history.sizes, strict=True))
    at = sorted({int(k * 10**e) for e in range(5) for k in (1, 3)} | {STEPS, *range(5_000, STEPS, 5_000)})
    with RunWriter(folder, {**run.metadata, "layers": layers}) as writer:
        for part in rows(layers):
            writer.append_steps(part)
        for name in run.instruments:
            series = [result for _, result in run.series(name)]
            for i, step in enumerate(at):
                writer.append_outcome(step, series[min(i, len(series) - 1)], 0.05)
    return folder


def made(folder: Path, page: Path) -> dict[str, float]:
    """Seconds and peak memory of making a page, and its size."""
    done = subprocess.run([sys.executable, "-c", MAKE, folder, page], capture_output=True, text=True, check=True)
    return {"MB": page.stat().st_size / 1e6, **json.loads(done.stdout)}


def opened(page: Path) -> dict[str, float]:
    """Seconds until the page is painted, and the sheets that it prints on."""
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        times = [_opening(browser.new_page(), page) for _ in range(OPENED)]
        sheet = browser.new_page()
        sheet.goto(page.as_uri())
        pdf = sheet.pdf(format="A4")
        browser.close()
    return {"opened s": statistics.median(times), "sheets": len(re.findall(rb"/Type\s*/Page[^s]", pdf))}


def _opening(tab: Any, page: Path) -> float:
    tab.goto("about:blank")
    began = time.perf_counter()
    tab.goto(page.as_uri())
    tab.evaluate(PAINTED)
    seconds = time.perf_counter() - began
    tab.close()
    return seconds


def line(name: str, found: dict[str, float]) -> bool:
    """Print what was found beside its limits; whether all are kept."""
    limits = LIMITS[name]
    print(f"{name:9}", *(f"{what} {found[what]:.3g} (at most {most:g})" for what, most in limits.items()), sep="  ")
    return all(found[what] <= most for what, most in limits.items())


def main() -> None:
    """Measure both pages and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the folder of a run, in place of the demo's")
    parser.add_argument("--keep", type=Path, help="where pages and runs are written and kept")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        ordinary = asked.run or folder / "demo"
        if asked.run is None:
            demo.run(ordinary)
        runs = {"ordinary": ordinary, "long": drawn_out(watched(folder / "few"), folder / "long-run")}
        kept = []
        for name, run in runs.items():
            page = (folder / f"{name}.html").resolve()
            kept.append(line(name, made(run, page) | opened(page)))
    sys.exit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()
