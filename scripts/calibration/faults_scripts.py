"""Mistakes as scripts have them: small, silent, and made by people who knew what they wanted."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from calibration.fault import fault
from calibration.faults_loop import LOOP, NO_GAN, STILL, TOO_LARGE_STEPS
from calibration.faults_modes import first_batch_only
from calibration.faults_schedule import LOW, give_schedule
from calibration.program import Program, change
from diag.instruments.causes import Cause as C
from diag.instruments.causes import Theme

LOSS = Theme.LOSS
WRONG_AIM = [*TOO_LARGE_STEPS, C.LABELS_SHUFFLED, C.INITIAL_LOSS_HIGH]


@fault(Theme.DATA, [C.LOADER_EMPTY], [C.STEP_MISSING], silent=True, needs="epochs rows", without=NO_GAN)
def loader_without_batches(p: Program) -> None:
    "drop_last=True with fewer rows than a batch, so that the loop's body never runs."

    def make_loader(old: Any, data: Any, training: bool) -> Any:
        return DataLoader(data, batch_size=len(data) + 1, drop_last=True) if training else old(data, training)

    change(p, "make_loader", make_loader)


@fault(LOOP, [C.SETTING_WITHOUT_EFFECT], silent=True, needs="epochs", without=NO_GAN)
def rate_set_on_the_optimizer(p: Program) -> None:
    "optimizer.lr = ... is set after each epoch, which the optimizer does not read."

    def begin(old: Any) -> None:
        old()
        if p.epoch:
            p.mark()
            p.optimizer.lr = p.lr * 0.5**p.epoch

    change(p, "begin_epoch", begin)


@fault(LOOP, [C.SCHEDULE_ENDED_EARLY, C.SCHEDULE_TOO_FAST], LOW, silent=True, needs="epochs rows",
       without=NO_GAN + " full_batch accumulation")  # fmt: skip
def milestones_stepped_each_batch(p: Program) -> None:
    "Milestones that are meant in epochs are passed in the first batches."
    give_schedule(p, lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.1))

    def begin(old: Any) -> None:
        old()
        if p.epoch == 2:  # a training may end with an epoch at a small rate
            p.mark()

    change(p, "begin_epoch", begin)


@fault(LOOP, [C.PARAMETER_IN_NO_OPTIMIZER, C.OPTIMIZER_HOLDS_STALE_PARAMETERS], STILL, silent=True,
       needs="sequential", without="distributed two_optimizers frozen")  # fmt: skip
def parameter_made_in_forward(p: Program) -> None:
    "A scale is wrapped into a new nn.Parameter in each call."

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            self.scale = nn.Parameter(self.scale.data.clamp(0.1, 10))
            return x * self.scale

    change(p, "make_model", lambda old: nn.Sequential(*old(), Scaled()))


@fault(LOOP, [C.GRAPH_CUT], STILL, silent=True, needs="sequential", without="distributed two_optimizers frozen")
def checkpointed_without_gradient(p: Program) -> None:
    "The first half is checkpointed by re-entry, and its inputs ask for no gradient."

    class Half(nn.Module):
        def __init__(self, layers: list[nn.Module]) -> None:
            super().__init__()
            self.first, self.rest = (
                nn.Sequential(*layers[: len(layers) // 2]),
                nn.Sequential(*layers[len(layers) // 2 :]),
            )

        def forward(self, x: Tensor) -> Any:
            return self.rest(checkpoint(self.first, x, use_reentrant=True))

    change(p, "make_model", lambda old: Half(list(old())))


@fault(LOOP, [C.LAYERS_UNTIED], [C.LAYERS_START_EQUAL], silent=True, needs="tied")
def tied_through_data(p: Program) -> None:
    "The head is tied by head.weight.data = embedding.weight.data: one memory, two parameters."

    def make_model(old: Any) -> nn.Module:
        model = old()
        model.head.weight = nn.Parameter(torch.empty_like(model.embedding.weight))
        model.head.weight.data = model.embedding.weight.data
        return model

    change(p, "make_model", make_model)


@fault(LOOP, [C.TRAINING_IN_EVAL_MODE, C.NORMALIZATION_STATISTICS_BAD], silent=True, needs="epochs dropout",
       without=NO_GAN)  # fmt: skip
def validated_within_the_epoch(p: Program) -> None:
    "An evaluation every few batches, and model.train() only at the beginning of the epoch."
    p.eval_every = 7
    begin, set_mode = p.begin_epoch, p.training_mode

    def begin_epoch() -> None:
        p.training_mode = set_mode  # type: ignore[method-assign]
        begin()
        p.training_mode = p.mark  # type: ignore[method-assign]

    p.begin_epoch = begin_epoch  # type: ignore[method-assign]


@fault(
    LOOP, [C.ACCUMULATION_LOST, C.STEP_MISSING], LOW, needs="epochs", without=NO_GAN + " full_batch accumulation"
)
def stepped_once_an_epoch(p: Program) -> None:
    "optimizer.step() is indented one level too little: it follows the loop over batches."
    update = p.update
    p.update = lambda: None  # type: ignore[method-assign]

    def end(old: Any) -> None:
        update()
        old()

    change(p, "end_epoch", end)


@fault(LOOP, [C.GRAPH_CUT, C.GRADIENT_ABSENT, C.STEP_MISSING], STILL, without=NO_GAN)
def backward_without_parentheses(p: Program) -> None:
    "loss.backward is named and not called."
    p.backward = lambda loss: None  # type: ignore[method-assign]


@fault(LOOP, [C.ACCUMULATION_NOT_DIVIDED], [*TOO_LARGE_STEPS, C.LOSS_SUMMED, C.INITIAL_LOSS_HIGH], silent=True,
       needs="classifier inputs rows", without=NO_GAN + " accumulation batch_norm")  # fmt: skip
def parts_of_a_batch_summed(p: Program) -> None:
    "A batch is cut into eight to save memory, and the means of the parts are summed."
    summed_parts(p, lambda loss, parts: loss)


def summed_parts(p: Program, divided: Any) -> None:
    """Each batch is used in eight parts; divided(loss, parts) is what backward() is called on."""

    def train_batch(batch: Any) -> Tensor:
        p.zero_grad()
        size = max(1, -(-len(batch[0]) // 8))
        parts = list(zip(*(t.split(size) for t in batch), strict=True))
        losses = []
        for part in parts:
            losses.append(p.loss(list(part)))
            p.backward(divided(losses[-1], len(parts)))
        p.update()
        return torch.stack([loss.detach() for loss in losses]).mean()

    p.train_batch = train_batch  # type: ignore[method-assign]


@fault(LOOP, [C.BATCH_REPEATED], [C.ROWS_DUPLICATED], silent=True, needs="epochs inputs rows",
       without=NO_GAN + " full_batch")  # fmt: skip
def one_batch_under_noise(p: Program) -> None:
    "next(iter(loader)) gives the first batch every time, and noise is added to it."
    first_batch_only(p, lambda batch: [batch[0] + 0.1 * torch.randn_like(batch[0]), *batch[1:]])


# Losses


@fault(LOSS, [C.TARGETS_OUT_OF_RANGE], [*WRONG_AIM, C.LOSS_ASCENDED], needs="classifier")
def mask_up_to_255(p: Program) -> None:
    "Binary cross-entropy on targets that are 0 and 255, as a mask is stored."

    def criterion(outputs: Any, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, 255.0 * F.one_hot(batch[1], outputs.shape[-1]))

    p.criterion = criterion  # type: ignore[method-assign]


@fault(LOSS, [C.TARGETS_OUT_OF_RANGE], WRONG_AIM, silent=True, needs="classifier")
def several_classes_in_a_softmax(p: Program) -> None:
    "Rows that have two classes each go into cross_entropy as zeros and ones."

    def criterion(outputs: Any, batch: Any) -> Tensor:
        first, second = (F.one_hot((batch[1] + i) % outputs.shape[-1], outputs.shape[-1]) for i in (0, 1))
        return F.cross_entropy(outputs, (first + second).float())

    p.criterion = criterion  # type: ignore[method-assign]


@fault(LOSS, [C.LOSS_ASCENDED], WRONG_AIM, needs="classifier")
def minus_sign_in_a_sum(p: Program) -> None:
    "The objective is written as a reward to be maximised, and descended."
    p.criterion = lambda outputs, batch: (  # type: ignore[method-assign]
        0.001 * outputs.square().mean() - F.cross_entropy(outputs, batch[1])
    )


@fault(LOSS, [C.LOGITS_INTO_PROBABILITY_LOSS], WRONG_AIM, needs="classifier")
def divergence_of_probabilities(p: Program) -> None:
    "kl_div is given probabilities where it expects their logarithms."
    p.criterion = lambda outputs, batch: F.kl_div(  # type: ignore[method-assign]
        outputs.softmax(-1), smoothed(batch[1], outputs.shape[-1]), reduction="batchmean"
    )


def smoothed(labels: Tensor, classes: int) -> Tensor:
    """Nine tenths on the class, the rest on all."""
    return 0.9 * F.one_hot(labels, classes) + 0.1 / classes
