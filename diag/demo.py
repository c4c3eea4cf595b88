"""The demo: a small convolutional network learns real digits, a tenth of them with a wrong label, watched.

The network first learns the digits (held-out accuracy about 97 %), then the wrong labels by heart, and its
held-out accuracy falls. `run` trains it; `setting` gives the data and says which labels are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diag import datasets
from diag.datasets import Examples
from diag.run.run import Run
from diag.watching.watcher import watch

TRAINING_EXAMPLES = 1297  # of 1,797
WRONG_SHARE = 0.1
DEMO_EPOCHS = 60
BATCH = 64
LEARNING_RATE = 0.05
BUDGET = 1.0  # the training takes seconds, so watching may take as long as the training
AT_THE_END = ("hessian_spectrum", "opposing_signals")  # too expensive for so short a training's budget
CHECKPOINTS = "checkpoints"

DemoProgress = Callable[[int, int], Any]


@dataclass(frozen=True)
class DemoData:
    """The demo's data: what is trained on (with wrong labels), what is held out, and the truth.

    wrong: which training examples, bool (n,), have a wrong label. true_labels: (n,) int64.
    """

    train: Examples
    held_out: Examples
    wrong: Tensor
    true_labels: Tensor


def setting(seed: int = 0) -> DemoData:
    """scikit-learn's digits, shuffled and split by `seed`; 10 % of the training labels are made wrong."""
    train, held_out = datasets.load_dataset("digits").shuffled(seed).split(TRAINING_EXAMPLES)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(train), generator=generator)[: round(WRONG_SHARE * len(train))]
    shift = torch.randint(1, 10, (len(rows),), generator=generator)
    labels, wrong = train.labels.clone(), torch.zeros(len(train), dtype=torch.bool)
    labels[rows], wrong[rows] = (labels[rows] + shift) % 10, True
    return DemoData(Examples(train.inputs, labels), held_out, wrong, train.labels)


def network(seed: int = 0) -> nn.Sequential:
    """Two convolutions and two linear layers, 38,282 parameters, initialised by `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def build() -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """(model, loss_fn, data) for `diag report runs/demo/checkpoints/*.pt --build diag.demo:build` (seed 0)."""
    train = setting().train
    return network(), nn.CrossEntropyLoss(), (train.inputs, train.labels)


def run(
    folder: str | Path,
    *,
    seed: int = 0,
    progress: DemoProgress | None = None,
    epochs: int = DEMO_EPOCHS,
    at_the_end: Sequence[str] = AT_THE_END,
) -> Run:
    """Train the demo's network by SGD with momentum, watched into `folder`; the record of the run.

    The same seed gives the same training. `progress(steps done, of how many)` is called after every step. States
    at the start, after a quarter of the training (near the best held-out accuracy) and at the end are kept in
    `folder/checkpoints`. The instruments `at_the_end` measure the final network whatever the budget.
    Raises RunError where the folder cannot be written.
    """
    # One thread: the order of sums, and with it a long training's course, depends on the number of threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(Path(folder), seed, epochs, progress or (lambda done, total: None), at_the_end)
    finally:
        torch.set_num_threads(threads)


def _train(folder: Path, seed: int, epochs: int, progress: DemoProgress, at_the_end: Sequence[str]) -> Run:
    made, model = setting(seed), network(seed)
    train, held_out = made.train, (made.held_out.inputs, made.held_out.labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    per_epoch = -(-len(train) // BATCH)
    kept = {0, per_epoch * (epochs // 4), per_epoch * epochs}
    with watch(model, run=folder, probe=(train.inputs, train.labels), held_out=held_out, budget=BUDGET) as watcher:
        keep(model, folder, 0)
        step = 0
        for _ in range(epochs):
            for rows in torch.randperm(len(train), generator=order).split(BATCH):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(train.inputs[rows]), train.labels[rows])
                loss.backward()
                optimizer.step()
                step += 1
                if step in kept:
                    keep(model, folder, step)
                progress(step, per_epoch * epochs)
        if at_the_end:
            watcher.measure(*at_the_end)
    return watcher.run


def keep(model: nn.Module, folder: Path, step: int) -> None:
    """Save the model's state as `folder/checkpoints/step-NNNNNN.pt`."""
    path = folder / CHECKPOINTS / f"step-{step:06d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
