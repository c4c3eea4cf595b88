"""Faults of the optimisation: step sizes, decay, clipping, moments, noise."""

from __future__ import annotations

from typing import Any

import torch

from calibration.fault import fault
from calibration.faults_loop import NO_GAN, TOO_LARGE_STEPS
from calibration.program import Program, change
from diag.instruments.causes import Cause as C
from diag.instruments.causes import Theme

OPTIMIZATION = Theme.OPTIMIZATION


def each_group(p: Program, **settings: Any) -> None:
    """Set these in every group of the optimizer when it is made."""

    def make_optimizer(old: Any) -> Any:
        optimizer = old()
        for group in optimizer.param_groups:
            group.update(settings)
        return optimizer

    change(p, "make_optimizer", make_optimizer)


@fault(OPTIMIZATION, [C.LEARNING_RATE_TOO_HIGH], [*TOO_LARGE_STEPS, C.MOMENTUM_TOO_HIGH],
       without="distributed two_optimizers frozen")  # fmt: skip
def learning_rate_high(p: Program) -> None:
    "The learning rate is far too high: thirty times for SGD, a hundred times for adaptive optimizers."
    p.lr *= 30 if "sgd" in p.tags else 100


@fault(OPTIMIZATION, [C.LEARNING_RATE_TOO_LOW], [C.UPDATES_ROUND_TO_NOTHING], without="distributed two_optimizers")
def learning_rate_low(p: Program) -> None:
    "The learning rate is a thousand times too low."
    p.lr *= 1e-3


@fault(OPTIMIZATION, [C.WARMUP_MISSING, C.LEARNING_RATE_TOO_HIGH], TOO_LARGE_STEPS, needs="warmup")
def warmup_missing(p: Program) -> None:
    "The warm-up is missing, at eight times the learning rate and with normalisation after the residual sum."
    p.lr *= 8
    p.make_scheduler = lambda: None  # type: ignore[method-assign]
    p.schedule_step = lambda: None  # type: ignore[method-assign]

    def make_model(old: Any) -> Any:
        model = old()
        for m in model.modules():
            for name in ("post", "norm_first"):
                if hasattr(m, name):
                    setattr(m, name, name == "post")
        return model

    change(p, "make_model", make_model)


@fault(
    OPTIMIZATION,
    [C.WEIGHT_DECAY_TOO_STRONG],
    [C.UNITS_DEAD, C.GRADIENTS_VANISH],
    without="distributed two_optimizers frozen",
)
def weight_decay_strong(p: Program) -> None:
    "Weight decay shrinks the weights to nothing."

    def make_optimizer(old: Any) -> Any:
        old()
        if "sgd" in p.tags:
            return torch.optim.SGD(p.trained(), lr=p.lr, momentum=0.9, weight_decay=0.5)
        return torch.optim.AdamW(p.trained(), lr=p.lr, weight_decay=0.05 / p.lr)

    change(p, "make_optimizer", make_optimizer)


@fault(OPTIMIZATION, [C.CLIPPING_TOO_TIGHT], [C.LEARNING_RATE_TOO_LOW], needs="sgd", without=NO_GAN)
def clipped_to_nothing(p: Program) -> None:
    "Gradients are clipped to a norm of 0.001 at every step."
    p.max_norm = 1e-3


@fault(OPTIMIZATION, [C.ADAM_EPSILON_TOO_LARGE], [C.LEARNING_RATE_TOO_LOW], needs="adam", without=NO_GAN)
def epsilon_large(p: Program) -> None:
    "Adam's epsilon is 1."
    each_group(p, eps=1.0)


@fault(OPTIMIZATION, [C.SECOND_MOMENT_STALE], [C.LOSS_SPIKE, *TOO_LARGE_STEPS], needs="adam",
       without=NO_GAN + " full_batch reinforcement")  # fmt: skip
def second_moment_stale(p: Program) -> None:
    "The loss grows two hundredfold in the middle, while Adam's second moment forgets slowly and its first fast."
    each_group(p, betas=(0.5, 0.9999))

    def criterion(old: Any, outputs: Any, batch: Any) -> Any:
        late = p.number > p.total_steps * p.accumulate // 2
        if late and p.model.training:
            p.mark()
        return old(outputs, batch) * (1.0 if late else 0.005)

    change(p, "criterion", criterion)


@fault(OPTIMIZATION, [C.MOMENTUM_TOO_HIGH, C.LEARNING_RATE_TOO_HIGH], TOO_LARGE_STEPS, needs="sgd",
       without="distributed frozen")  # fmt: skip
def momentum_high(p: Program) -> None:
    "Momentum is 0.999 at the learning rate that was right for 0.9."
    each_group(p, momentum=0.999)


@fault(OPTIMIZATION, [C.GRADIENT_NOISE, C.LEARNING_RATE_TOO_HIGH], TOO_LARGE_STEPS, needs="classifier sgd",
       without="distributed frozen batch_norm")  # fmt: skip
def batch_of_two(p: Program) -> None:
    "Two examples a batch, at the learning rate that was right for many."
    p.batch = 2
    p.epochs = 1
