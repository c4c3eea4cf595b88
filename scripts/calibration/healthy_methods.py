"""Healthy kinds of optimizers, losses, networks and data."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, WeightedRandomSampler

from calibration.faults_data import change_rows, random
from calibration.faults_loop import NO_GAN, layers_of, trained_layers
from calibration.faults_network import replace
from calibration.healthy import healthy
from calibration.program import Program, change

PLAIN = "distributed dense"


def optimized_by(p: Program, make: Any) -> None:
    p.make_optimizer = lambda: make(p.trained())  # type: ignore[method-assign]


# Optimizers


@healthy(needs="classifier", without="distributed attention recurrent frozen")
def sgd_without_momentum(p: Program) -> None:
    "Plain SGD."
    optimized_by(p, lambda q: torch.optim.SGD(q, lr=0.1))


@healthy(without=NO_GAN + " reinforcement")
def adamw_with_decay(p: Program) -> None:
    "AdamW with a weight decay of 0.1."
    optimized_by(p, lambda q: torch.optim.AdamW(q, lr=2e-3, weight_decay=0.1))


@healthy(needs="classifier", without="distributed attention")
def adagrad(p: Program) -> None:
    "Adagrad, whose steps shrink by themselves."
    optimized_by(p, lambda q: torch.optim.Adagrad(q, lr=0.02))


@healthy(without=NO_GAN + " reinforcement attention")
def nadam(p: Program) -> None:
    "NAdam."
    optimized_by(p, lambda q: torch.optim.NAdam(q, lr=2e-3))


@healthy(needs="rows", without="distributed dense frozen")
def two_rates(p: Program) -> None:
    "The head learns ten times faster than the body."

    def trained() -> Any:
        head = list(trained_layers(p)[-1][1].parameters())
        ids = {id(q) for q in head}
        body = [q for q in p.model.parameters() if id(q) not in ids]
        return [{"params": body, "lr": p.lr * 0.3}, {"params": head, "lr": p.lr * 3}]

    p.trained = trained  # type: ignore[method-assign]


@healthy(needs="regression plain_body", without="distributed dropout")
def lbfgs(p: Program) -> None:
    "L-BFGS with a closure on all rows."
    newton(p)


@healthy(needs="classifier plain_body", without="distributed dropout")
def lbfgs_on_classes(p: Program) -> None:
    "L-BFGS with a closure on all rows of a classification."
    newton(p)


def newton(p: Program) -> None:
    p.batch, p.epochs = 10_000, 25
    change(p, "make_loader", lambda old, data, training: DataLoader(data, batch_size=p.batch))
    optimized_by(p, lambda q: torch.optim.LBFGS(q, max_iter=5, line_search_fn="strong_wolfe"))
    # A line search finds its own step. A scheduler that is made and never stepped would be a fault of its own.
    p.make_scheduler = lambda: None  # type: ignore[method-assign]
    p.schedule_epoch = lambda: None  # type: ignore[method-assign]

    def train_batch(batch: Any) -> Tensor:
        def closure() -> Tensor:
            p.zero_grad()
            loss = p.loss(batch)
            loss.backward()
            return loss

        return torch.as_tensor(p.optimizer.step(closure))

    p.train_batch = train_batch  # type: ignore[method-assign]


@healthy(needs="classifier rows", without="distributed dense attention accumulation recurrent frozen clip")
def sharpness_aware(p: Program) -> None:
    "Sharpness-aware minimisation: up along the gradient, a second backward pass, back, and a step."

    def train_batch(batch: Any) -> Tensor:
        p.zero_grad()
        loss = p.loss(batch)
        loss.backward()
        moves = []
        with torch.no_grad():
            norm = torch.stack([q.grad.norm() for q in p.model.parameters()]).norm()
            for q in p.model.parameters():
                moves.append(0.05 * q.grad / norm)
                q.add_(moves[-1])
        p.zero_grad()
        p.loss(batch).backward()
        with torch.no_grad():
            for q, move in zip(p.model.parameters(), moves, strict=True):
                q.sub_(move)
        p.update()
        return loss

    p.train_batch = train_batch  # type: ignore[method-assign]


@healthy(without=NO_GAN)
def clipping_usually_active(p: Program) -> None:
    "Gradients are clipped at a norm that most of them exceed."
    p.max_norm = 0.3 if "adam" in p.tags else 1.0
    if "adam" not in p.tags:
        p.lr *= 0.5


@healthy(without=NO_GAN)
def clipped_by_value(p: Program) -> None:
    "Gradients are clipped entry by entry."
    p.clip = lambda: nn.utils.clip_grad_value_(p.model.parameters(), 0.1)  # type: ignore[method-assign]


# Losses


@healthy(needs="classifier", without="distributed")
def label_smoothing(p: Program) -> None:
    "Cross-entropy with labels smoothed by 0.2."
    p.criterion = lambda outputs, batch: F.cross_entropy(  # type: ignore[method-assign]
        outputs, batch[1], label_smoothing=0.2
    )


@healthy(needs="classifier rows inputs", without=PLAIN)
def mixup(p: Program) -> None:
    "Pairs of examples and their labels are mixed."

    def loss(batch: Any) -> Tensor:
        share, other = float(torch.distributions.Beta(0.4, 0.4).sample()), torch.randperm(len(batch[0]))
        outputs = p.forward([share * batch[0] + (1 - share) * batch[0][other], batch[1]])
        first = F.cross_entropy(outputs, batch[1])
        return share * first + (1 - share) * F.cross_entropy(outputs, batch[1][other])

    p.loss = loss  # type: ignore[method-assign]


@healthy(needs="classifier", without=PLAIN)
def focal_loss(p: Program) -> None:
    "A focal loss of one's own."

    def criterion(outputs: Any, batch: Any) -> Tensor:
        logs = outputs.log_softmax(-1).gather(-1, batch[1][:, None]).squeeze(-1)
        return (-((1 - logs.exp()) ** 2) * logs).mean()

    p.criterion = criterion  # type: ignore[method-assign]


@healthy(needs="classifier", without=PLAIN)
def margin_loss(p: Program) -> None:
    "A multi-class hinge loss."
    p.criterion = lambda outputs, batch: F.multi_margin_loss(outputs, batch[1])  # type: ignore[method-assign]


@healthy(needs="classifier", without=PLAIN)
def one_against_all(p: Program) -> None:
    "Binary cross-entropy on one-hot labels."
    p.criterion = lambda outputs, batch: F.binary_cross_entropy_with_logits(  # type: ignore[method-assign]
        outputs, F.one_hot(batch[1], p.classes).float()
    )


@healthy(needs="classifier", without=PLAIN)
def log_probabilities(p: Program) -> None:
    "The model ends in log_softmax and the loss is nll_loss."
    change(p, "forward", lambda old, batch: old(batch).log_softmax(-1))
    p.criterion = lambda outputs, batch: F.nll_loss(outputs, batch[1])  # type: ignore[method-assign]


@healthy(without=NO_GAN + " reinforcement")
def small_penalty(p: Program) -> None:
    "A small penalty on the squared weights is a term of the loss."

    def criterion(old: Any, outputs: Any, batch: Any) -> Tensor:
        return old(outputs, batch) + 1e-4 * sum(q.square().sum() for q in p.model.parameters() if q.requires_grad)

    change(p, "criterion", criterion)


@healthy(needs="regression")
def absolute_error(p: Program) -> None:
    "The mean absolute error, which never gets small on noisy targets."

    def criterion(outputs: Any, batch: Any) -> Tensor:
        return F.l1_loss(outputs, batch[1])

    p.criterion = criterion  # type: ignore[method-assign]


# Networks and data


@healthy(needs="dropout", without="distributed")
def half_dropped(p: Program) -> None:
    "Dropout of 0.5: training loss above held-out loss."
    replace(p, (nn.Dropout,), lambda m: nn.Dropout(0.5))


@healthy(needs="relu sequential", without="distributed")
def leaky_units(p: Program) -> None:
    "Leaky ReLU instead of ReLU."
    replace(p, (nn.ReLU,), lambda m: nn.LeakyReLU(0.1))


@healthy(needs="inputs sequential", without="distributed frozen")
def checkpointed(p: Program) -> None:
    "Activations of the first half are computed again in the backward pass."

    class Checkpointed(nn.Module):
        def __init__(self, layers: nn.Sequential) -> None:
            super().__init__()
            self.first, self.rest = layers[: len(layers) // 2], layers[len(layers) // 2 :]

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.first, x, use_reentrant=False) if self.training else self.first(x)
            return self.rest(x)

    change(p, "make_model", lambda old: Checkpointed(old()))


@healthy(needs="inputs", without="distributed frozen recurrent attention")
def weights_normalized(p: Program) -> None:
    "Weight normalisation on every linear layer."

    def make_model(old: Any) -> nn.Module:
        model = old()
        for _, m in layers_of(model):
            if isinstance(m, nn.Linear):
                nn.utils.parametrizations.weight_norm(m)
        return model

    change(p, "make_model", make_model)


@healthy(needs="classifier rows inputs", without="distributed dense batch_norm frozen")
def one_layer_called_twice(p: Program) -> None:
    "A layer is shared on purpose: called twice in forward."

    class Twice(nn.Module):
        def __init__(self, body: nn.Module, classes: int) -> None:
            super().__init__()
            self.body, self.again, self.head = body, nn.Linear(classes, classes), nn.Linear(classes, classes)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            for _ in range(2):
                x = x + self.again(x).relu()
            return self.head(x)

    change(p, "make_model", lambda old: Twice(old(), p.classes))


@healthy(needs="classifier rows", without=PLAIN)
def imbalance_balanced(p: Program) -> None:
    "Half of the classes are five times rarer, and a weighted sampler evens that out."
    rarer(p)

    def make_loader(old: Any, data: Any, training: bool) -> Any:
        if not training:
            return old(data, training)
        labels = data.tensors[1]
        sampler = WeightedRandomSampler((1.0 / labels.bincount().float())[labels].tolist(), len(labels))
        return DataLoader(data, batch_size=p.batch, sampler=sampler, drop_last=True)

    change(p, "make_loader", make_loader)


@healthy(needs="classifier rows", without=PLAIN)
def mild_imbalance(p: Program) -> None:
    "Half of the classes have a third of their rows, as data in the wild does."
    rarer(p, 0.33)


def rarer(p: Program, share: float = 0.2) -> None:
    def new(x: Tensor, y: Tensor) -> Any:
        rare = (y >= p.classes / 2) & (torch.rand(y.shape, generator=random(p)) > share)
        return x[~rare], y[~rare]

    change_rows(p, new)


@healthy(needs="inputs rows", without="distributed recurrent")
def noisy_inputs(p: Program) -> None:
    "Gaussian noise is added to training inputs."

    def transform(old: Any, batch: Any, training: bool) -> Any:
        batch = old(batch, training)
        return [batch[0] + 0.5 * torch.randn_like(batch[0]), *batch[1:]] if training else batch

    change(p, "transform", transform)


@healthy(needs="rows", held_out=True)
def held_out_given(p: Program) -> None:
    "The program as it is, with the held-out data given to the watch."


@healthy(needs="rows images", without="distributed", held_out=True)
def held_out_and_long(p: Program) -> None:
    "Twice the epochs, with the held-out data given to the watch: a gap opens and nothing is lost by it."
    p.epochs *= 2


@healthy(needs="inputs images", without="distributed reconstruction dense")
def inputs_between_zero_and_one(p: Program) -> None:
    "Inputs are scaled to the range from 0 to 1 and not centred."

    def scale(x: Tensor, *rest: Tensor) -> Any:
        return (x - x.min()) / (x.max() - x.min()), *rest

    change_rows(p, scale, scale)
