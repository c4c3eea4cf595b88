"""Healthy kinds of schedules, batches and loops."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from calibration.faults_loop import NO_GAN, evaluate_averages, trained_layers
from calibration.faults_schedule import give_schedule, halved, resumed
from calibration.healthy import healthy
from calibration.program import Program, change
from calibration.programs_images import warm_cosine

STEADY = NO_GAN + " full_batch"


@healthy(needs="epochs", without=STEADY)
def rate_dropped_tenfold(p: Program) -> None:
    "The learning rate falls to a tenth at half of the training."
    give_schedule(p, lambda o: lr_scheduler.MultiStepLR(o, [p.epochs // 2], 0.1), "schedule_epoch")


@healthy(without=STEADY)
def warm_restarts(p: Program) -> None:
    "A cosine that restarts four times."
    restart = lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, max(2, p.total_steps // 4))  # noqa: E731
    give_schedule(p, restart)


@healthy(without=NO_GAN)
def cosine_to_zero(p: Program) -> None:
    "A warm-up and a cosine that reaches zero with the last step."
    give_schedule(p, lambda o: warm_cosine(o, p.total_steps // 20, p.total_steps))


@healthy(without=NO_GAN)
def long_warmup(p: Program) -> None:
    "A warm-up over a third of the training, then a straight line down."
    shape = lambda s: min(3 * s / p.total_steps + 1e-3, 1.5 * (1 - s / p.total_steps) + 1e-3, 1.0)  # noqa: E731
    give_schedule(p, lambda o: lr_scheduler.LambdaLR(o, shape))


@healthy(needs="epochs", without=STEADY)
def resumed_well(p: Program) -> None:
    "Training stops in the middle and goes on from a checkpoint with all of its state."
    resumed(p)


@healthy(needs="classifier inputs", without=STEADY + " frozen")
def curriculum_jump(p: Program) -> None:
    "Inputs get noisy from the middle of the training on, so that the loss jumps."

    def transform(old: Any, batch: Any, training: bool) -> Any:
        batch = old(batch, training)
        hard = training and p.epoch >= p.epochs // 2
        return [batch[0] + 1.2 * torch.randn_like(batch[0]), *batch[1:]] if hard else batch

    change(p, "transform", transform)


@healthy(needs="plain_body", without="distributed")
def edge_of_stability(p: Program) -> None:
    "Gradient descent on all rows at a rate at which the loss goes down in waves."
    p.batch, p.epochs, p.lr = 10_000, 150, 0.25
    loader = lambda old, data, training: DataLoader(data, batch_size=p.batch)  # noqa: E731
    change(p, "make_loader", loader)
    p.make_optimizer = lambda: torch.optim.SGD(p.trained(), lr=p.lr)  # type: ignore[method-assign]
    give_schedule(p, lambda o: lr_scheduler.ConstantLR(o, 1.0, 0))


@healthy(needs="classifier rows", without="distributed dense attention blocks")
def to_full_accuracy(p: Program) -> None:
    "Trained until every training example is right, and on."
    p.epochs *= 2


@healthy(without=NO_GAN + " full_batch accumulation")
def accumulated_well(p: Program) -> None:
    "Four micro-batches a step, each loss divided by four."
    p.batch = max(4, p.batch // 4)
    p.accumulate = 4


@healthy(needs="epochs", without=NO_GAN + " full_batch batch_norm accumulation self_supervised")
def tiny_batches(p: Program) -> None:
    "Eight examples a batch, the learning rate lowered with it."
    p.lr *= 8 / p.batch if "sgd" in p.tags else (8 / p.batch) ** 0.5
    p.batch, p.epochs = 8, max(1, p.epochs // 3)


@healthy(needs="epochs", without=STEADY + " self_supervised frozen")
def large_batches(p: Program) -> None:
    "A quarter of the data a batch, for more epochs."
    p.batch, p.epochs = 384, p.epochs * 2


@healthy(without=NO_GAN + " attention recurrent full_batch conv reinforcement")
def scaler_with_skips(p: Program) -> None:
    "Half precision whose scale starts so high that the first steps are skipped."
    halved(p)

    def prepare(old: Any) -> None:
        old()
        p.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)

    change(p, "prepare", prepare)


@healthy(without=NO_GAN + " recurrent")
def brain_floats(p: Program) -> None:
    "Autocast in bfloat16, no scaler."
    p.amp = torch.bfloat16
    change(p, "criterion", lambda old, outputs, batch: old(_floats(outputs), batch))
    change(p, "score", lambda old, outputs, batch: old(_floats(outputs), batch))


def _floats(outputs: Any) -> Any:
    return outputs.float() if isinstance(outputs, torch.Tensor) else tuple(o.float() for o in outputs)


@healthy(needs="epochs", without=NO_GAN + " full_batch frozen")
def averages_evaluated(p: Program) -> None:
    "A running mean of the weights is put in for each evaluation and taken out again."
    evaluate_averages(p)


@healthy(without=NO_GAN)
def evaluated_often(p: Program) -> None:
    "Evaluated every ten steps, with the modes set right."
    p.eval_every = 10


@healthy()
def never_evaluated(p: Program) -> None:
    "No evaluation at all."
    p.evaluate = lambda: p.metrics.append(0.0)  # type: ignore[method-assign]


@healthy(without=NO_GAN)
def gradients_kept_as_zeros(p: Program) -> None:
    "model.zero_grad(set_to_none=False) instead of the optimizer's."
    p.zero_grad = lambda: p.model.zero_grad(set_to_none=False)  # type: ignore[method-assign]


@healthy(without=NO_GAN + " accumulation")
def zeroed_after_the_step(p: Program) -> None:
    "zero_grad() stands after step() at the end of the loop's body."
    zero = p.zero_grad
    p.zero_grad = lambda: None  # type: ignore[method-assign]

    def update(old: Any) -> None:
        old()
        zero()

    change(p, "update", update)


@healthy(needs="rows", without="distributed")
def rows_drawn_by_hand(p: Program) -> None:
    "No DataLoader: a random permutation is cut into batches."

    def batches() -> Any:
        order = torch.randperm(len(p.train_set))  # type: ignore[arg-type]
        for rows in order.split(p.batch):
            yield p.transform(list(p.train_set[rows]), training=True)

    p.batches = batches  # type: ignore[method-assign]


@healthy(needs="rows", without="distributed")
def endless_loader(p: Program) -> None:
    "Steps are counted, not epochs: the loader is cycled over, shuffled each time."

    def train_epoch(old: Any) -> None:
        source = itertools.chain.from_iterable(iter(p.loader) for _ in itertools.count())
        p.batches = lambda: (  # type: ignore[method-assign]
            p.transform(b, training=True)
            for b in itertools.islice(source, len(p.loader))  # type: ignore[arg-type]
        )
        old()

    change(p, "train_epoch", train_epoch)


@healthy(needs="epochs", without=NO_GAN + " full_batch frozen")
def unfrozen_in_turn(p: Program) -> None:
    "The body is frozen for two epochs and then trained with the head."

    def begin(old: Any) -> None:
        old()
        last = {id(q) for q in trained[-1][1].parameters()}
        for q in p.model.parameters():
            q.requires_grad_(p.epoch >= 2 or id(q) in last)

    def build(old: Any) -> None:
        old()
        trained.extend(trained_layers(p))

    trained: list[Any] = []
    p.trained = lambda: list(p.model.parameters())  # type: ignore[method-assign]
    change(p, "begin_epoch", begin)
    change(p, "build", build)


@healthy()
def very_short(p: Program) -> None:
    "A quick look: an epoch or forty steps."
    p.epochs = min(p.epochs, 40 if "full_batch" in p.tags else 1)
    if hasattr(p, "steps"):
        p.steps = 40
    p.eval_every = None
