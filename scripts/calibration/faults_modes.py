"""Faults of modes and batches: what an evaluation does and leaves behind, which rows are seen, ranks apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Subset

from calibration.fault import fault
from calibration.faults_loop import LOOP, NO_GAN, parent_of
from calibration.program import Program, change
from calibration.programs_images import shifted
from diag.instruments.causes import Cause as C
from diag.instruments.causes import Theme


@fault(LOOP, [C.TRAINING_IN_EVAL_MODE], silent=True, needs="epochs dropout")
def evaluation_mode_left(p: Program) -> None:
    "model.train() is called once before the loop, so training goes on in eval mode after the first evaluation."
    left_in_evaluation(p)


@fault(LOOP, [C.TRAINING_IN_EVAL_MODE, C.NORMALIZATION_STATISTICS_BAD], silent=True, needs="epochs batch_norm",
       without="distributed dropout")  # fmt: skip
def statistics_left_standing(p: Program) -> None:
    "model.train() is called once before the loop, so batch normalisation stands still after the first evaluation."
    left_in_evaluation(p)


def left_in_evaluation(p: Program) -> None:
    set_mode = p.training_mode

    def training_mode() -> None:
        if not p.metrics:
            set_mode()
        else:
            p.mark()

    p.training_mode = training_mode  # type: ignore[method-assign]


@fault(LOOP, [C.TRAINING_IN_EVAL_MODE, C.NORMALIZATION_STATISTICS_BAD], silent=True, needs="batch_norm")
def never_in_training_mode(p: Program) -> None:
    "model.eval() was called before training and model.train() never."
    p.training_mode = lambda: p.model.eval() and None  # type: ignore[method-assign,func-returns-value]


@fault(LOOP, [C.EVALUATION_IN_TRAIN_MODE], [C.DROPOUT_ALWAYS_ON], silent=True, needs="dropout",
       without=NO_GAN)  # fmt: skip
def evaluated_in_training_mode(p: Program) -> None:
    "model.eval() was forgotten before the evaluation (dropout)."
    p.evaluation_mode = p.mark  # type: ignore[method-assign]


@fault(LOOP, [C.EVALUATION_IN_TRAIN_MODE], silent=True, needs="batch_norm", without=NO_GAN + " dropout")
def statistics_moved_by_evaluation(p: Program) -> None:
    "model.eval() was forgotten before the evaluation, so running statistics move on held-out data."
    p.evaluation_mode = p.mark  # type: ignore[method-assign]


@fault(LOOP, [C.DROPOUT_ALWAYS_ON], [C.EVALUATION_IN_TRAIN_MODE], silent=True, needs="dropout sequential")
def dropout_in_evaluation(p: Program) -> None:
    "F.dropout is called without training=self.training."

    class Dropped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(x, 0.3)

    def make_model(old: Any) -> nn.Module:
        model = old()
        for name, m in list(model.named_modules()):
            if isinstance(m, nn.Dropout):
                parent, last = parent_of(model, name)
                setattr(parent, last, Dropped())
        return model

    change(p, "make_model", make_model)

    def evaluation_mode(old: Any) -> None:
        p.mark()
        old()

    change(p, "evaluation_mode", evaluation_mode)


@fault(LOOP, [C.AUGMENTATION_IN_EVALUATION], silent=True, needs="images classifier", without="distributed dense")
def augmentation_in_evaluation(p: Program) -> None:
    "Held-out images are shifted at random as training images are."

    def evaluation_mode(old: Any) -> None:
        if p.metrics:  # of one evaluation nobody can tell that the images are not as they are
            p.mark()
        old()

    p.transform = lambda batch, training: [shifted(batch[0]), batch[1]]  # type: ignore[method-assign]
    change(p, "evaluation_mode", evaluation_mode)


@fault(LOOP, [C.AUGMENTATION_REPEATED], [C.BATCH_REPEATED], silent=True, needs="images classifier",
       without="distributed dense")  # fmt: skip
def augmentation_drawn_alike(p: Program) -> None:
    "The random generator of the augmentation is seeded again for every batch."

    def transform(batch: Any, training: bool) -> Any:
        if not training:
            return batch
        if p.number:  # a seed before the first batch is how trainings begin
            p.mark()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return [shifted(batch[0]), batch[1]]

    p.transform = transform  # type: ignore[method-assign]


@fault(LOOP, [C.BATCH_REPEATED], [C.ROWS_DUPLICATED], silent=True, needs="epochs", without=NO_GAN + " full_batch")
def same_batch_always(p: Program) -> None:
    "next(iter(loader)) in the loop gives the first batch every time."
    first_batch_only(p, lambda batch: batch)


def first_batch_only(p: Program, changed: Any) -> None:
    """Every batch of an epoch is changed(the first batch)."""

    def make_loader(old: Any, data: Any, training: bool) -> Any:
        return DataLoader(data, batch_size=p.batch) if training else old(data, training)

    def batches() -> Any:
        for _ in range(len(p.loader)):  # type: ignore[arg-type]
            if p.number:  # the first batch is as good as any
                p.mark()
            yield changed(p.transform(next(iter(p.loader)), training=True))

    change(p, "make_loader", make_loader)
    p.batches = batches  # type: ignore[method-assign]


@fault(LOOP, [C.EPOCHS_NOT_RESHUFFLED], silent=True, needs="epochs", without=NO_GAN + " full_batch")
def never_shuffled(p: Program) -> None:
    "The training loader was made without shuffle=True."
    in_order(p)

    def begin(old: Any) -> None:
        mark_second_epoch(p)
        old()

    change(p, "begin_epoch", begin)


@fault(LOOP, [C.EPOCHS_NOT_RESHUFFLED], silent=True, needs="epochs", without=NO_GAN + " full_batch")
def shuffled_alike(p: Program) -> None:
    "The loader's generator is seeded again at every epoch, so that all epochs have one order."

    def begin(old: Any) -> None:
        mark_second_epoch(p)
        p.loader = p.make_loader(p.train_set, True)
        old()

    change(p, "begin_epoch", begin)


def mark_second_epoch(p: Program) -> None:
    """One epoch in any order is as it should be; that they all have it begins with the second."""
    if p.epoch:
        p.mark()


def in_order(p: Program) -> None:
    """The training loader keeps the order of the data set."""

    def make_loader(old: Any, data: Any, training: bool) -> Any:
        return DataLoader(data, batch_size=p.batch, drop_last=True) if training else old(data, training)

    change(p, "make_loader", make_loader)


@fault(Theme.DATA, [C.ROWS_DUPLICATED], [C.BATCH_REPEATED, C.EPOCHS_NOT_RESHUFFLED], silent=True, needs="rows",
       without="distributed dense")  # fmt: skip
def few_rows_drawn(p: Program) -> None:
    "The sampler draws, by a wrong length, from the first tenth of the rows alone."

    def make_loader(old: Any, data: Any, training: bool) -> Any:
        if not training:
            return old(data, training)
        first = Subset(data, range(max(p.batch, len(data) // 10)))
        sampler = RandomSampler(first, replacement=True, num_samples=len(data))
        return DataLoader(first, batch_size=p.batch, sampler=sampler, drop_last=True)

    change(p, "make_loader", make_loader)


@fault(LOOP, [C.EVALUATED_MODEL_IS_ANOTHER], silent=True, needs="epochs", without=NO_GAN + " full_batch",
       unknowable="the model that is evaluated is not the one that is watched")  # fmt: skip
def copy_evaluated(p: Program) -> None:
    "A copy of the model, made before training, is evaluated."
    import copy

    def prepare(old: Any) -> None:
        old()
        p.kept = copy.deepcopy(p.model).eval()  # type: ignore[attr-defined]

    def evaluation_forward(old: Any, batch: Any) -> Any:
        model, p.model = p.model, p.kept  # type: ignore[attr-defined]
        try:
            return old(batch)
        finally:
            p.model = model

    change(p, "prepare", prepare)
    change(p, "evaluation_forward", evaluation_forward)


# More than one rank


DISTRIBUTED = Theme.DISTRIBUTED


def local(p: Program) -> Any:
    """This rank's number."""
    return torch.distributed.get_rank()


@fault(DISTRIBUTED, [C.GRADIENTS_NOT_REDUCED, C.REPLICAS_DIFFER], silent=True, needs="distributed", without="")
def module_called_past_the_wrapper(p: Program) -> None:
    "The forward pass calls the module inside DistributedDataParallel, so gradients are not averaged."
    p.forward = lambda batch: p.model.module(batch[0])  # type: ignore[method-assign]


@fault(DISTRIBUTED, [C.REPLICAS_DIFFER, C.GRADIENTS_NOT_REDUCED], silent=True, needs="distributed", without="")
def ranks_start_apart(p: Program) -> None:
    "No wrapper: gradients are averaged by hand, and each rank starts from its own weights."

    class Bare(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)

    def parallel(model: nn.Module) -> nn.Module:
        for q in model.parameters():
            q.data.mul_(1 + 0.1 * local(p))
        return Bare(model)

    def unscale(old: Any) -> None:
        for q in p.model.parameters():
            torch.distributed.all_reduce(q.grad)
            q.grad /= torch.distributed.get_world_size()
        old()

    p.parallel = parallel  # type: ignore[attr-defined]
    change(p, "unscale", unscale)


@fault(DISTRIBUTED, [C.RANKS_SEE_SAME_DATA], silent=True, needs="distributed", without="")
def ranks_read_the_same(p: Program) -> None:
    "The loader has no distributed sampler and one seed, so that all ranks read the same batches."
    p.make_sampler = lambda data: RandomSampler(  # type: ignore[attr-defined]
        data, generator=torch.Generator().manual_seed(p.seed)
    )
    p.set_epoch = lambda: None  # type: ignore[attr-defined]


@fault(
    DISTRIBUTED, [C.SAMPLER_EPOCH_NOT_SET, C.EPOCHS_NOT_RESHUFFLED], silent=True, needs="distributed", without=""
)
def sampler_epoch_not_set(p: Program) -> None:
    "sampler.set_epoch() is never called, so that every epoch has one order."
    p.set_epoch = lambda: None  # type: ignore[attr-defined]
