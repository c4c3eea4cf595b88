"""Faults of the schedule, of resuming, and of low precision with its gradient scaler."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import lr_scheduler

from calibration.fault import fault
from calibration.faults_loop import LOOP, NO_GAN, STILL, TOO_LARGE_STEPS
from calibration.program import Program, change
from calibration.programs_images import warm_cosine
from diag.instruments.causes import Cause as C
from diag.instruments.causes import Theme

NUMERICS = Theme.NUMERICS
LOW = [C.LEARNING_RATE_TOO_LOW, C.LEARNING_RATE_ZERO, *STILL]


def give_schedule(p: Program, make: Any, each: str = "schedule_step") -> None:
    """The program's schedule is `make(optimizer)`, stepped in `each` and nowhere else."""
    p.make_scheduler = lambda: make(p.optimizer)  # type: ignore[method-assign]
    p.schedule_step = lambda: None  # type: ignore[method-assign]
    p.schedule_epoch = lambda: None  # type: ignore[method-assign]
    setattr(p, each, lambda: p.scheduler.step())  # type: ignore[union-attr]


# The schedule


@fault(LOOP, [C.SCHEDULE_TOO_FAST, C.SCHEDULE_ENDED_EARLY], LOW, silent=True, needs="epochs",
       without=NO_GAN + " full_batch accumulation")  # fmt: skip
def schedule_stepped_each_batch(p: Program) -> None:
    "A schedule over epochs is stepped after every batch."
    p.onset = 2  # the first step is at the rate that it should have
    give_schedule(p, lambda o: lr_scheduler.ExponentialLR(o, 0.5))


@fault(LOOP, [C.SCHEDULE_ENDED_EARLY, C.SCHEDULE_TOO_FAST], LOW, silent=True, without=NO_GAN + " full_batch")
def schedule_too_short(p: Program) -> None:
    "The schedule was made for a quarter of the steps that are trained."
    total = lambda: max(2, p.total_steps // 4)  # noqa: E731
    give_schedule(p, lambda o: lr_scheduler.LambdaLR(o, lambda s: max(0.0, 1 - s / total())))

    def step(old: Any) -> None:
        if p.optimizer.param_groups[0]["lr"] == 0:  # until then nobody can know for how long training goes on
            p.mark()
        old()

    change(p, "step", step)


@fault(LOOP, [C.SCHEDULE_TOO_FAST, C.SCHEDULE_ENDED_EARLY], [C.SCHEDULE_JUMPED, *LOW], silent=True,
       without=NO_GAN + " full_batch")  # fmt: skip
def schedule_stepped_twice(p: Program) -> None:
    "scheduler.step() is called twice for each step of the optimizer."

    def twice(old: Any) -> None:
        old()
        p.scheduler.step()  # type: ignore[union-attr]

    give_schedule(p, lambda o: lr_scheduler.LambdaLR(o, lambda s: max(0.0, 1 - s / p.total_steps)))
    change(p, "schedule_step", twice)


@fault(LOOP, [C.SCHEDULE_TOO_SLOW, C.SCHEDULER_NEVER_STEPPED], LOW, needs="epochs",
       without=NO_GAN + " full_batch")  # fmt: skip
def warmup_stepped_each_epoch(p: Program) -> None:
    "A warm-up over steps is stepped once an epoch, so that the learning rate hardly leaves its start."
    give_schedule(p, lambda o: warm_cosine(o, p.total_steps // 3, p.total_steps), "schedule_epoch")


@fault(LOOP, [C.SCHEDULER_NEVER_STEPPED], LOW, without=NO_GAN)
def scheduler_never_stepped(p: Program) -> None:
    "A warm-up was made and never stepped."
    give_schedule(p, lambda o: lr_scheduler.LinearLR(o, 0.001, 1.0, 100))
    p.schedule_step = lambda: None  # type: ignore[method-assign]


@fault(LOOP, [C.SCHEDULER_OF_ANOTHER_OPTIMIZER, C.SCHEDULER_NEVER_STEPPED], silent=True, without=NO_GAN)
def scheduler_of_an_old_optimizer(p: Program) -> None:
    "The optimizer was made again after the scheduler, which goes on with the old one."
    give_schedule(p, lambda o: warm_cosine(o, 1, p.total_steps))

    def prepare(old: Any) -> None:
        old()
        p.optimizer = p.make_optimizer()

    change(p, "prepare", prepare)


@fault(LOOP, [C.SCHEDULER_BEFORE_OPTIMIZER], silent=True, without=NO_GAN + " full_batch")
def scheduler_before_optimizer(p: Program) -> None:
    "scheduler.step() stands before optimizer.step()."
    give_schedule(p, lambda o: lr_scheduler.LambdaLR(o, lambda s: 1.0 / (1 + 0.02 * s)))
    schedule = p.schedule_step
    p.schedule_step = lambda: None  # type: ignore[method-assign]

    def step(old: Any) -> None:
        schedule()
        old()

    change(p, "step", step)


@fault(LOOP, [C.LEARNING_RATE_ZERO], [*LOW, C.PARAMETER_FROZEN], silent=True, without=NO_GAN + " frozen")
def group_without_learning_rate(p: Program) -> None:
    "A group of parameters for the body has the learning rate 0."

    def trained() -> Any:
        every = [q for q in p.model.parameters() if q.requires_grad]
        half = len(every) // 2
        return [{"params": every[:half], "lr": 0.0}, {"params": every[half:]}]

    p.trained = trained  # type: ignore[method-assign]


# Resuming


@fault(LOOP, [C.SCHEDULE_JUMPED], silent=True, needs="epochs", without=NO_GAN + " full_batch")
def schedule_starts_over(p: Program) -> None:
    "Training is resumed and the schedule begins from its start."
    resumed(p)
    give_schedule(p, lambda o: lr_scheduler.LambdaLR(o, lambda s: 0.02 ** (s / p.total_steps)))
    p.restore = lambda state: _restore(p, state, scheduler=False)  # type: ignore[method-assign]


@fault(LOOP, [C.OPTIMIZER_STATE_NOT_RESTORED], [C.OPTIMIZER_RECREATED, C.SCHEDULE_JUMPED], silent=True,
       needs="epochs adam", without=NO_GAN + " full_batch")  # fmt: skip
def optimizer_state_forgotten(p: Program) -> None:
    "Training is resumed with the model's state and a new optimizer."
    resumed(p)

    def restore(state: dict[str, Any]) -> None:
        p.mark()
        p.model.load_state_dict(state["model"])

    p.restore = restore  # type: ignore[method-assign]


def resumed(p: Program) -> None:
    """The program trains in two lives."""
    p.optimizer_inside = False
    p.resume_after = max(1, p.epochs // 2)


def _restore(p: Program, state: dict[str, Any], scheduler: bool) -> None:
    p.mark()
    p.model.load_state_dict(state["model"])
    rates = [g["lr"] for g in p.optimizer.param_groups]
    p.optimizer.load_state_dict(state["optimizer"])
    if not scheduler:  # as a script that makes the schedule after loading does
        for group, rate in zip(p.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


# Low precision and its scaler


def halved(p: Program, dtype: torch.dtype = torch.float16) -> None:
    """Autocast in half precision with a gradient scaler, as a script for a GPU has it."""
    p.amp, p.scaled = dtype, True


@fault(NUMERICS, [C.CLIPPING_BEFORE_UNSCALING], [C.CLIPPING_TOO_TIGHT], silent=True,
       without=NO_GAN + " attention recurrent full_batch conv")  # fmt: skip
def clipped_before_unscaling(p: Program) -> None:
    "Gradients are clipped while they carry the loss scale."
    halved(p)
    p.max_norm = 1.0
    p.unscale = lambda: None  # type: ignore[method-assign]


@fault(LOOP, [C.CLIPPING_BEFORE_BACKWARD], silent=True, without=NO_GAN)
def clipped_after_step(p: Program) -> None:
    "Gradients are clipped after the step has used them."
    p.max_norm = p.max_norm or 0.5
    clip = p.clip
    p.clip = lambda: None  # type: ignore[method-assign]

    def step(old: Any) -> None:
        old()
        clip()

    change(p, "step", step)


@fault(NUMERICS, [C.GRADIENTS_STILL_SCALED], TOO_LARGE_STEPS, needs="sgd", without=NO_GAN + " conv")
def scaler_bypassed_sgd(p: Program) -> None:
    "The loss is scaled, and optimizer.step() is called instead of scaler.step()."
    scaler_bypassed(p)


@fault(NUMERICS, [C.GRADIENTS_STILL_SCALED], [C.ADAM_EPSILON_TOO_LARGE], silent=True, needs="adam",
       without=NO_GAN + " attention recurrent full_batch conv")  # fmt: skip
def scaler_bypassed(p: Program) -> None:
    "The loss is scaled, and optimizer.step() is called instead of scaler.step()."
    halved(p)
    p.step = lambda: p.optimizer.step()  # type: ignore[method-assign]


@fault(NUMERICS, [C.AUTOCAST_OFF], silent=True, without=NO_GAN)
def autocast_forgotten(p: Program) -> None:
    "A gradient scaler is used, and the forward pass does not run under autocast."
    p.scaled = True


@fault(NUMERICS, [C.UPDATES_ROUND_TO_NOTHING], [C.LEARNING_RATE_TOO_LOW, C.WEIGHTS_UNCHANGED], silent=True,
       needs="classifier inputs", without="distributed recurrent attention")  # fmt: skip
def weights_in_bfloat16(p: Program) -> None:
    "All of the model is in bfloat16, and updates are smaller than the spacing of its numbers."
    p.lr *= 0.02

    def transform(old: Any, batch: Any, training: bool) -> Any:
        batch = old(batch, training)
        return [batch[0].bfloat16(), *batch[1:]]

    change(p, "make_model", lambda old: old().bfloat16())
    change(p, "transform", transform)
    change(p, "forward", lambda old, batch: old(batch).float())


# A weight decay of 1e-4 beside a loss of 2e-6 is a penalty a thousand times the loss, and Adam follows the larger.
@fault(NUMERICS, [C.GRADIENT_UNDERFLOW],
       [C.LEARNING_RATE_TOO_LOW, C.GRADIENTS_VANISH, C.ADAM_EPSILON_TOO_LARGE, C.WEIGHT_DECAY_TOO_STRONG],
       needs="classifier sequential", without="distributed dense conv")  # fmt: skip
def underflow_without_scaler(p: Program) -> None:
    "Half precision without a scaler, and a loss that was multiplied by a small number."
    p.amp = torch.float16
    change(p, "criterion", lambda old, outputs, batch: 3e-6 * old(outputs, batch))


@fault(NUMERICS, [C.SCALER_SKIPS_FOREVER, C.NOT_FINITE], [C.STEP_MISSING, C.WEIGHTS_UNCHANGED], needs="epochs",
       without=NO_GAN + " attention recurrent full_batch conv")  # fmt: skip
def scaler_skips_every_step(p: Program) -> None:
    "One parameter's gradient is infinite at every step, so that the scaler takes none."
    halved(p)

    def make_model(old: Any) -> Any:
        model = old()
        next(q for q in model.parameters() if q.requires_grad).register_hook(lambda g: g / 0.0)
        return model

    change(p, "make_model", make_model)
