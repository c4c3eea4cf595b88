"""Faults of the data: labels, classes, scale, what is in which set, and rows that are corrupt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, TensorDataset

from calibration.fault import fault
from calibration.faults_loop import TOO_LARGE_STEPS
from calibration.faults_modes import in_order
from calibration.program import Program, change
from diag.instruments.causes import Cause as C
from diag.instruments.causes import Theme

DATA = Theme.DATA


def change_rows(p: Program, new: Any, held_out: Any = None) -> None:
    """The training set's tensors become `new(*tensors)`, and the held-out set's `held_out(*tensors)`."""

    def make_data(old: Any) -> tuple[Any, Any]:
        train, rest = old()
        train = TensorDataset(*new(*train.tensors))
        return train, rest if held_out is None else TensorDataset(*held_out(*rest.tensors))

    change(p, "make_data", make_data)


def random(p: Program) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + p.seed)


@fault(DATA, [C.LABELS_SHUFFLED], [C.LABELS_WRONG], needs="classifier rows", without="distributed dense")
def labels_shuffled(p: Program) -> None:
    "The labels were shuffled without their inputs."
    change_rows(p, lambda x, y: (x, y[torch.randperm(len(y), generator=random(p))]))


@fault(DATA, [C.LABELS_SHUFFLED], [C.LABELS_WRONG], needs="regression rows")
def targets_shuffled(p: Program) -> None:
    "The targets were shuffled without their inputs."
    change_rows(p, lambda x, y: (x, y[torch.randperm(len(y), generator=random(p))]))


@fault(DATA, [C.LABELS_WRONG], needs="classifier rows", without="distributed dense")
def labels_partly_wrong(p: Program) -> None:
    "A quarter of the labels is drawn at random."

    def new(x: Tensor, y: Tensor) -> Any:
        wrong = torch.rand(y.shape, generator=random(p)) < 0.25
        return x, torch.where(wrong, torch.randint(p.classes, y.shape, generator=random(p)), y)

    change_rows(p, new)


@fault(DATA, [C.CLASSES_SORTED], [C.EPOCHS_NOT_RESHUFFLED, C.LOSS_SPIKE], needs="classifier rows",
       without="distributed dense")  # fmt: skip
def classes_sorted(p: Program) -> None:
    "The data is sorted by class and the loader does not shuffle."

    def new(x: Tensor, y: Tensor) -> Any:
        order = y.argsort(stable=True)
        return x[order], y[order]

    change_rows(p, new)
    in_order(p)


# Of two classes one is left: then all targets are the same.
@fault(
    DATA,
    [C.CLASS_MISSING],
    [C.TARGETS_ALL_EQUAL],
    silent=True,
    needs="classifier rows",
    without="distributed dense",
    held_out=True,
)
def class_missing(p: Program) -> None:
    "One class was lost on the way to the training set."
    change_rows(p, lambda x, y: (x[y != 1], y[y != 1]))


@fault(DATA, [C.CLASS_IMBALANCE], [C.CLASS_MISSING], silent=True, needs="classifier rows",
       without="distributed dense")  # fmt: skip
def classes_imbalanced(p: Program) -> None:
    "Half of the classes have a fiftieth of their rows."

    def new(x: Tensor, y: Tensor) -> Any:
        rare = (y >= p.classes / 2) & (torch.rand(y.shape, generator=random(p)) > 0.02)
        return x[~rare], y[~rare]

    change_rows(p, new)


@fault(
    DATA, [C.ANSWER_IN_INPUT], silent=True, needs="inputs rows", without="distributed images dense reconstruction"
)
def label_among_the_features(p: Program) -> None:
    "A column of the table is a copy of the target in other units."

    def new(x: Tensor, y: Tensor, *rest: Tensor) -> Any:
        flat = x.flatten(1).clone()
        flat[:, -1] = 0.5 * y.to(x.dtype).reshape(len(y), -1)[:, 0] - 1.0
        return flat.view_as(x), y, *rest

    change_rows(p, new, new)


def scaled(factor: float, add: float = 0.0) -> Any:
    return lambda x, *rest: (x * factor + add, *rest)


@fault(DATA, [C.INPUTS_NOT_NORMALIZED], [*TOO_LARGE_STEPS, C.INITIAL_LOSS_HIGH], needs="inputs",
       without="distributed recurrent reconstruction dense")  # fmt: skip
def inputs_not_normalized(p: Program) -> None:
    "Inputs are bytes from 0 to 255, as they were read."
    change_rows(p, scaled(60, 110), scaled(60, 110))


# Its size goes through the untrained layers: the first loss of two classes was 92 nats where guessing gives 0.69.
@fault(
    DATA,
    [C.INPUTS_NOT_NORMALIZED],
    [C.LEARNING_RATE_TOO_HIGH, C.INITIAL_LOSS_HIGH],
    needs="inputs plain_body",
    without="distributed images",
)
def one_feature_huge(p: Program) -> None:
    "One of the features is in units a thousand times too small."

    def new(x: Tensor, *rest: Tensor) -> Any:
        return torch.cat([x[:, :1] * 1000 + 5000, x[:, 1:]], 1), *rest

    change_rows(p, new, new)


# Behind a frozen body all examples have one large feature in common, along which the usual step is too large: on
# `frozen_body` the loss went from 1.6 to 14 in steps of half of the weights' size, where the program as it is
# learns.
@fault(DATA, [C.INPUTS_TOO_SMALL, C.INPUTS_NOT_NORMALIZED],
       [C.LEARNING_RATE_TOO_LOW, C.GRADIENTS_VANISH, C.INPUTS_CONSTANT, C.LEARNING_RATE_TOO_HIGH],
       needs="inputs", without="distributed batch_norm reconstruction")  # fmt: skip
def inputs_divided_twice(p: Program) -> None:
    "Inputs are divided by 255 twice."
    change_rows(p, scaled(1 / 255), scaled(1 / 255))


@fault(DATA, [C.INPUTS_CONSTANT, C.INPUT_IGNORED], [C.OUTPUT_CONSTANT, C.WORSE_THAN_TRIVIAL], needs="inputs",
       without="distributed reconstruction")  # fmt: skip
def inputs_constant(p: Program) -> None:
    "A slip in the data set returns the first input for every index."
    first = lambda x, *rest: (x[:1].expand(len(x), *x.shape[1:]).clone(), *rest)  # noqa: E731
    change_rows(p, first, first)


@fault(DATA, [C.INPUTS_CONSTANT], silent=True, needs="inputs plain_body", without="distributed images")
def features_constant(p: Program) -> None:
    "Seven tenths of the features were filled with a constant by a failed join."

    def new(x: Tensor, *rest: Tensor) -> Any:
        return torch.cat(
            [x[:, : len(x[0]) * 3 // 10], torch.ones(len(x), len(x[0]) - len(x[0]) * 3 // 10)], 1
        ), *rest

    change_rows(p, new, new)


@fault(DATA, [C.HELD_OUT_IN_TRAINING], silent=True, needs="rows", without="distributed", held_out=True)
def held_out_in_training(p: Program) -> None:
    "The training set was made of all rows, those of the held-out set among them."

    def make_data(old: Any) -> tuple[Any, Any]:
        train, held_out = old()
        return ConcatDataset([train, held_out]), held_out

    change(p, "make_data", make_data)


@fault(DATA, [C.HELD_OUT_DIFFERS], silent=True, needs="inputs rows", without="distributed", held_out=True)
def held_out_scaled_otherwise(p: Program) -> None:
    "Held-out inputs are not normalised, training inputs are."
    change_rows(p, lambda *t: t, scaled(4.0, 3.0))


@fault(DATA, [C.BATCHES_POISONED], [C.LOSS_SPIKE, C.SECOND_MOMENT_STALE, *TOO_LARGE_STEPS], needs="inputs rows",
       without="distributed frozen")  # fmt: skip
def some_rows_corrupt(p: Program) -> None:
    "Three rows of the training set hold values of ten thousand."

    def new(x: Tensor, *rest: Tensor) -> Any:
        x = x.clone()
        x[torch.randint(len(x), (3,), generator=random(p))] *= 1e4
        return x, *rest

    change_rows(p, new)


@fault(DATA, [C.BATCHES_POISONED], [C.LOSS_SPIKE, C.LABELS_WRONG], needs="classifier rows epochs",
       without="distributed dense full_batch")  # fmt: skip
def some_batches_mislabelled(p: Program) -> None:
    "In two stretches of five batches in the middle, all labels are moved by one."

    def train_batch(old: Any, batch: Any) -> Any:
        half = p.epochs * len(p.loader) // 2  # type: ignore[arg-type]
        if half <= p.number < half + 5 or half + 30 <= p.number < half + 35:
            p.mark()
            batch = [batch[0], (batch[1] + 1) % p.classes]
        return old(batch)

    change(p, "train_batch", train_batch)


@fault(DATA, [C.DATA_NOT_FINITE, C.NOT_FINITE], needs="inputs rows", without="distributed")
def one_row_not_finite(p: Program) -> None:
    "One value of one row is NaN."

    def new(x: Tensor, *rest: Tensor) -> Any:
        x = x.clone()
        x[len(x) // 2].view(-1)[3] = float("nan")
        return x, *rest

    change_rows(p, new)


@fault(DATA, [C.TARGETS_NOT_NORMALIZED], [*TOO_LARGE_STEPS, C.LEARNING_RATE_TOO_LOW, C.INITIAL_LOSS_HIGH],
       needs="regression rows")  # fmt: skip
def targets_not_normalized(p: Program) -> None:
    "Targets are in their own units, around 1,500 with a deviation of 400."
    scale = lambda x, y: (x, y * 400 + 1500)  # noqa: E731
    change_rows(p, scale, scale)
