"""Faults that only the outcome shows: memorisation, and networks too small for what they should fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from calibration import layers
from calibration.fault import fault
from calibration.program import Program, change
from diag.instruments.causes import Cause as C
from diag.instruments.causes import Theme

OUTCOME = Theme.OUTCOME


@fault(OUTCOME, [C.OVERFITTING], needs="rows", without="distributed dense batch_norm images", held_out=True)
def few_examples_for_long(p: Program) -> None:
    "Sixty examples, no regularisation and many epochs: the held-out loss turns early."

    def make_data(old: Any) -> tuple[Any, Any]:
        train, held_out = old()
        return Subset(train, range(60)), held_out

    def make_model(old: Any) -> nn.Module:
        model = old()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        return model

    change(p, "make_data", make_data)
    change(p, "make_model", make_model)
    p.batch = 20
    p.epochs = 120


@fault(OUTCOME, [C.OVERFITTING], [C.LABELS_WRONG], needs="classifier inputs rows images",
       without="distributed dense batch_norm frozen", held_out=True)  # fmt: skip
def noisy_few_for_long(p: Program) -> None:
    "A hundred examples, a fifth of them mislabelled, until all are memorised."

    def make_data(old: Any) -> tuple[Any, Any]:
        train, held_out = old()
        few = torch.utils.data.TensorDataset(*(t[:100].clone() for t in train.tensors))
        few.tensors[1][::5] = (few.tensors[1][::5] + 3) % p.classes
        return few, held_out

    change(p, "make_data", make_data)
    p.batch = 25
    p.epochs = 60


@fault(OUTCOME, [C.UNDERFITTING], [C.UNITS_DEAD], needs="classifier plain_body")
def too_narrow(p: Program) -> None:
    "A single hidden unit."

    def make_model(old: Any) -> nn.Module:
        linears = [m for m in old().modules() if isinstance(m, nn.Linear)]
        return nn.Sequential(nn.Flatten(), layers.mlp(linears[0].in_features, 1, linears[-1].out_features))

    change(p, "make_model", make_model)


# Dropout multiplies what it leaves by fifty, so that the first loss is as high as it is said to be: 6.4 nats of ten
# classes on `conv_bn`, where guessing gives 2.3.
@fault(
    OUTCOME,
    [C.UNDERFITTING],
    [C.LEARNING_RATE_TOO_LOW, C.INITIAL_LOSS_HIGH],
    needs="dropout classifier",
    without="distributed attention recurrent",
)
def dropout_nearly_all(p: Program) -> None:
    "Dropout of 0.98."

    def make_model(old: Any) -> nn.Module:
        model = old()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.98
        return model

    change(p, "make_model", make_model)
