"""Sound loops that look like the mistakes in `faults_scripts`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler

from calibration.faults_loop import NO_GAN
from calibration.faults_schedule import give_schedule
from calibration.faults_scripts import smoothed, summed_parts
from calibration.healthy import healthy
from calibration.program import Program, change


@healthy(needs="epochs", without=NO_GAN)
def evaluated_with_graphs(p: Program) -> None:
    "model.eval() without torch.no_grad(): the held-out batches keep graphs that nobody uses."

    def evaluate() -> None:
        p.evaluation_mode()
        parts = [
            p.score(p.evaluation_forward(batch), batch).detach().float().reshape(-1)
            for batch in (p.transform(b, training=False) for b in p.held_out_loader)
        ]
        p.metrics.append(float(torch.cat(parts).mean()))

    p.evaluate = evaluate  # type: ignore[method-assign]


@healthy(needs="epochs", without=NO_GAN + " full_batch")
def rate_halved_by_hand(p: Program) -> None:
    "The learning rate is halved in the param_groups at the middle of the training."

    def begin(old: Any) -> None:
        old()
        if p.epoch == p.epochs // 2:
            for group in p.optimizer.param_groups:
                group["lr"] *= 0.5

    change(p, "begin_epoch", begin)


@healthy(needs="epochs", without=NO_GAN + " full_batch")
def milestones_in_epochs(p: Program) -> None:
    "A tenth of the rate from three quarters of the epochs on."
    give_schedule(p, lambda o: lr_scheduler.MultiStepLR(o, [3 * p.epochs // 4], 0.1), "schedule_epoch")


@healthy(needs="classifier inputs rows", without=NO_GAN + " accumulation batch_norm")
def parts_of_a_batch_averaged(p: Program) -> None:
    "A batch is cut into eight to save memory, and each part's loss is divided by their number."
    summed_parts(p, lambda loss, parts: loss / parts)


@healthy(needs="classifier")
def entropy_bonus(p: Program) -> None:
    "A small bonus on the entropy is subtracted from the loss."

    def criterion(outputs: Any, batch: Any) -> torch.Tensor:
        entropy = -(outputs.softmax(-1) * outputs.log_softmax(-1)).sum(-1).mean()
        return F.cross_entropy(outputs, batch[1]) - 0.01 * entropy

    p.criterion = criterion  # type: ignore[method-assign]


@healthy(needs="classifier")
def divergence_of_log_probabilities(p: Program) -> None:
    "kl_div on log_softmax and smoothed targets."
    p.criterion = lambda outputs, batch: F.kl_div(  # type: ignore[method-assign]
        outputs.log_softmax(-1), smoothed(batch[1], outputs.shape[-1]), reduction="batchmean"
    )


@healthy(needs="epochs dropout", without=NO_GAN)
def answers_sampled(p: Program) -> None:
    "Dropout is left on in one evaluation, at the end, to sample five answers to each row."

    def end(old: Any) -> None:
        old()
        if p.epoch == p.epochs - 2:
            p.training_mode()
            with torch.no_grad():
                for batch in p.held_out_loader:
                    batch = p.transform(batch, training=False)
                    torch.stack([torch.as_tensor(p.evaluation_forward(batch)) for _ in range(5)]).mean(0)

    change(p, "end_epoch", end)
