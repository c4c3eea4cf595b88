"""A program: a small training script whose places have names, so that a fault can change exactly one of them.

The loop reads as people write it: zero the gradients, forward, loss, backward, clip, step, schedule; at the end of
an epoch evaluate without gradients. A fault replaces one of these methods on the instance (`change`) or sets an
attribute. What a program looks like to `diag` is only what torch sees of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer
from torch.utils.data import DataLoader, Dataset

Batch = Any


class Program:
    """One training script. Subclasses give the data, the model and the loss; `tags` say which faults can be put in.

    epochs, batch, lr: what the script is run with. accumulate: micro-batches a step. amp: the dtype of autocast, or
    None. scaled: whether a GradScaler is used. max_norm: the clipping threshold, or None. optimizer_inside: the
    optimizer is made inside the watched function. eval_every: evaluate every so many steps besides each epoch.
    resume_after: stop after so many epochs and go on in a second process' life from a checkpoint.
    """

    name = ""
    family = ""
    tags: frozenset[str] = frozenset()
    classes = 0
    epochs, batch, lr = 8, 64, 0.1
    accumulate = 1
    amp: torch.dtype | None = None
    scaled = False
    max_norm: float | None = None
    optimizer_inside = False
    eval_every: int | None = None
    resume_after: int | None = None
    world = 1

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.onset: int | None = None
        self.number, self.epoch = 0, 0
        self.losses: list[float] = []
        self.metrics: list[float] = []
        self.optimizer: Any = None
        self.scheduler: LRScheduler | None = None
        self.scaler: Any = None

    # What the script is made of

    def make_data(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """The training set and the held-out set."""
        raise NotImplementedError

    def make_model(self) -> nn.Module:
        raise NotImplementedError

    def trained(self) -> Iterable[Any]:
        """What the optimizer is given: parameters, or groups of them."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def make_optimizer(self) -> Optimizer:
        return torch.optim.SGD(self.trained(), lr=self.lr, momentum=0.9)

    def make_scheduler(self) -> LRScheduler | None:
        """A scheduler that is stepped after every optimizer step (`schedule_step`) or epoch (`schedule_epoch`)."""
        return None

    def make_loader(self, data: Dataset[Any], training: bool) -> Iterable[Batch]:
        order = torch.Generator().manual_seed(self.seed + 1)
        return DataLoader(data, batch_size=self.batch, shuffle=training, drop_last=training, generator=order)

    def transform(self, batch: Batch, training: bool) -> Batch:
        """What is done to a batch before the model sees it: scaling, augmentation."""
        return batch

    # How one batch is used

    def forward(self, batch: Batch) -> Any:
        return self.model(batch[0])

    def criterion(self, outputs: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    def loss(self, batch: Batch) -> Tensor:
        with self.autocast():
            return self.criterion(self.forward(batch), batch)

    def score(self, outputs: Any, batch: Batch) -> Tensor:
        """What the evaluation reports of each example; higher is better."""
        return (outputs.argmax(-1) == batch[1]).float()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", self.amp) if self.amp is not None else contextlib.nullcontext()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def unscale(self) -> None:
        if self.scaler and self.max_norm is not None:
            self.scaler.unscale_(self.optimizer)

    def clip(self) -> None:
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)

    def step(self) -> None:
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def schedule_step(self) -> None:
        """After every optimizer step."""

    def schedule_epoch(self) -> None:
        """After every epoch."""

    def update(self) -> None:
        self.unscale()
        self.clip()
        self.step()
        self.schedule_step()

    def divided(self, loss: Tensor) -> Tensor:
        return loss / self.accumulate if self.accumulate > 1 else loss

    def train_batch(self, batch: Batch) -> Tensor:
        if self.number % self.accumulate == 0:
            self.zero_grad()
        loss = self.loss(batch)
        self.backward(self.divided(loss))
        if (self.number + 1) % self.accumulate == 0:
            self.update()
        return loss

    # The loop

    def batches(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield self.transform(batch, training=True)

    def begin_epoch(self) -> None:
        self.training_mode()

    def training_mode(self) -> None:
        self.model.train()

    def evaluation_mode(self) -> None:
        self.model.eval()

    def train_epoch(self) -> None:
        for batch in self.batches():
            loss = self.train_batch(batch)
            self.losses.append(float(loss.detach()))
            self.number += 1
            if self.eval_every is not None and self.number % self.eval_every == 0:
                self.evaluate()
                self.training_mode()

    def end_epoch(self) -> None:
        self.schedule_epoch()
        self.evaluate()

    def evaluate(self) -> None:
        self.evaluation_mode()
        with torch.no_grad():
            parts = []
            for batch in self.held_out_loader:
                batch = self.transform(batch, training=False)
                parts.append(self.score(self.evaluation_forward(batch), batch).float().reshape(-1))
        self.metrics.append(float(torch.cat(parts).mean()))

    def evaluation_forward(self, batch: Batch) -> Any:
        return self.forward(batch)

    def build(self) -> None:
        """Everything that a script does before it trains."""
        torch.manual_seed(self.seed)
        self.train_set, self.held_out_set = self.make_data()
        self.make_loaders()
        self.model = self.make_model()
        if not self.optimizer_inside:
            self.prepare()

    def make_loaders(self) -> None:
        self.loader = self.make_loader(self.train_set, True)
        self.held_out_loader = self.make_loader(self.held_out_set, False)

    def prepare(self) -> None:
        self.optimizer = self.make_optimizer()
        self.scheduler = self.make_scheduler()
        if self.scaled:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def train(self) -> None:
        """The function around which the user puts the watch."""
        if self.optimizer is None:
            self.prepare()
        self.train_epochs(range(self.epochs))

    def train_epochs(self, epochs: Iterable[int]) -> None:
        for self.epoch in epochs:
            self.begin_epoch()
            self.train_epoch()
            self.end_epoch()

    # A training in two lives

    def checkpoint(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What a script does at the beginning of its second life, with everything built again."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])

    def lives(self) -> Iterator[Callable[[], None]]:
        """What runs under one watch each: all of the training, or what came before and after a resumption."""
        if self.resume_after is None:
            yield self.train
            return
        self.optimizer_inside = False
        if self.optimizer is None:
            self.prepare()
        yield lambda: self.train_epochs(range(self.resume_after or 0))
        state = self.checkpoint()
        state = {k: _copied(v) for k, v in state.items()}
        self.model = self.make_model()
        self.prepare()
        self.restore(state)
        yield lambda: self.train_epochs(range(self.resume_after or 0, self.epochs))

    # For faults and runners

    def mark(self) -> None:
        """A fault says that it acts from the next step on; the first time counts."""
        if self.onset is None:
            self.onset = self.number // self.accumulate + 1

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.loader) // self.accumulate)  # type: ignore[arg-type]

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def watched(self) -> nn.Module:
        """What the user hands to `diag.watch`."""
        return self.model

    def held_out_data(self) -> Any:
        """What the user would give as held_out=, or None where the model's inputs are not rows of the data."""
        return [self.transform(b, training=False) for b in self.held_out_loader] if self.classes else None


def _copied(value: Any) -> Any:
    import copy

    return copy.deepcopy(value)


def change(program: Program, place: str, new: Callable[..., Any]) -> None:
    """Replace the method `place` of this program by `new(old, *arguments)`, where `old` is the method as it was."""
    old = getattr(program, place)
    setattr(program, place, lambda *args, **kwargs: new(old, *args, **kwargs))
