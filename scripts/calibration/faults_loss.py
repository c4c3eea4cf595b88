"""Faults of the loss: what goes into it, over which axis and with which targets."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibration.fault import fault
from calibration.faults_loop import NO_GAN, TOO_LARGE_STEPS, trained_layers
from calibration.program import Program, change
from diag.instruments.causes import Cause as C
from diag.instruments.causes import Theme

LOSS = Theme.LOSS


@fault(LOSS, [C.DOUBLE_SOFTMAX], [C.LEARNING_RATE_TOO_LOW], needs="classifier", without="distributed dense")
def softmax_twice(p: Program) -> None:
    "The model ends in a softmax and the loss is cross-entropy."
    change(p, "forward", lambda old, batch: old(batch).softmax(-1))


@fault(LOSS, [C.DOUBLE_SOFTMAX], [C.LEARNING_RATE_TOO_LOW], needs="language", without="distributed padded_index")
def softmax_twice_on_tokens(p: Program) -> None:
    "The language model ends in a softmax layer and the loss is cross-entropy."

    def make_model(old: Any) -> nn.Module:
        model = old()
        model.head = nn.Sequential(model.head, nn.Softmax(-1))
        return model

    change(p, "make_model", make_model)


@fault(LOSS, [C.DOUBLE_SIGMOID], [C.LEARNING_RATE_TOO_LOW, C.DOUBLE_SOFTMAX], needs="binary")
def sigmoid_twice(p: Program) -> None:
    "The model ends in a sigmoid and the loss applies another."
    change(p, "forward", lambda old, batch: old(batch).sigmoid())
    p.score = lambda outputs, batch: ((outputs > 0.5) == (batch[2] > 0.5)).float()  # type: ignore[method-assign]


@fault(LOSS, [C.LOGITS_INTO_PROBABILITY_LOSS], [*TOO_LARGE_STEPS, C.LOSS_ASCENDED], needs="classifier",
       without="distributed")  # fmt: skip
def logits_into_nll(p: Program) -> None:
    "nll_loss is given raw outputs instead of log-probabilities."
    p.criterion = lambda outputs, batch: F.nll_loss(outputs, batch[1])  # type: ignore[method-assign]


@fault(LOSS, [C.LOSS_SUMMED, C.LEARNING_RATE_TOO_HIGH], TOO_LARGE_STEPS, needs="classifier sgd")
def loss_summed(p: Program) -> None:
    "The loss has reduction='sum', with the learning rate of a mean."
    p.criterion = lambda outputs, batch: F.cross_entropy(  # type: ignore[method-assign]
        outputs, batch[1], reduction="sum"
    )


@fault(LOSS, [C.OUTPUT_RANGE], [C.UNITS_DEAD], silent=True, needs="classifier", without="distributed dense")
def relu_at_the_end(p: Program) -> None:
    "The last layer is followed by a ReLU like all others."
    change(p, "forward", lambda old, batch: old(batch).relu())


@fault(LOSS, [C.OUTPUT_RANGE], [C.LEARNING_RATE_TOO_LOW], needs="classifier", without="distributed dense")
def tanh_at_the_end(p: Program) -> None:
    "The logits go through a tanh before the loss."
    change(p, "forward", lambda old, batch: old(batch).tanh())


@fault(LOSS, [C.OUTPUT_RANGE], [C.INPUT_IGNORED, C.UNITS_SATURATED], needs="regression", without="distributed")
def sigmoid_before_numbers(p: Program) -> None:
    "The outputs of a regression go through a sigmoid, and the targets have both signs."
    change(p, "forward", lambda old, batch: old(batch).sigmoid())


@fault(LOSS, [C.WRONG_CLASS_AXIS], [C.LOGITS_INTO_PROBABILITY_LOSS, C.GRADIENTS_VANISH], needs="classifier",
       without="distributed dense")  # fmt: skip
def softmax_over_the_batch(p: Program) -> None:
    "log_softmax runs over the examples (dim=0) instead of the classes."
    p.criterion = lambda outputs, batch: F.nll_loss(outputs.log_softmax(0), batch[1])  # type: ignore[method-assign]


@fault(LOSS, [C.ANSWER_IN_INPUT, C.TARGETS_SHIFTED], silent=True, needs="classifier_tokens")
def targets_not_shifted(p: Program) -> None:
    "The language model is asked for the character that it sees, not for the next one."
    change(p, "transform", lambda old, batch, training: [batch[0], batch[0]])


@fault(LOSS, [C.ANSWER_IN_INPUT], silent=True, needs="attention", without="distributed classifier masked")
def no_causal_mask(p: Program) -> None:
    "The decoder attends to what it should predict."

    def make_model(old: Any) -> nn.Module:
        model = old()
        for m in model.modules():
            if hasattr(m, "causal"):
                m.causal = False
            if isinstance(m, nn.TransformerDecoderLayer):
                m._sa_block = _unmasked(m._sa_block)  # type: ignore[method-assign]
        return model

    change(p, "make_model", make_model)


def _unmasked(attend: Any) -> Any:
    return lambda x, mask, padding, is_causal=False: attend(x, None, padding, False)


@fault(LOSS, [C.TARGETS_SHIFTED], silent=True, needs="language", without="distributed masked padded")
def targets_a_window_away(p: Program) -> None:
    "Targets are taken ten characters too far on."

    def transform(old: Any, batch: Any, training: bool) -> Any:
        return [batch[0][:, :-10], batch[1][:, 10:]]

    change(p, "transform", transform)


@fault(LOSS, [C.IGNORED_LABELS_COUNTED], [C.CLASS_IMBALANCE], silent=True, needs="padded")
def padding_counted(p: Program) -> None:
    "Padding counts in the loss as a class of its own."
    if "masked" in p.tags:

        def transform(old: Any, batch: Any, training: bool) -> Any:
            return [batch[0], batch[1].masked_fill(batch[1] == -100, 0)]

        change(p, "transform", transform)
    else:
        p.ignored = -100  # type: ignore[attr-defined]


@fault(LOSS, [C.TARGETS_BROADCAST], [C.INPUT_IGNORED], silent=True, needs="regression column_targets")
def targets_flat(p: Program) -> None:
    "Targets (n,) meet outputs (n, 1), and the loss runs over all pairs."
    change(p, "criterion", lambda old, outputs, batch: old(outputs, [batch[0], batch[1].squeeze(1)]))


@fault(LOSS, [C.TARGETS_BROADCAST], [C.INPUT_IGNORED], silent=True, needs="regression flat_targets")
def outputs_column(p: Program) -> None:
    "Outputs (n, 1) meet targets (n,), and the loss runs over all pairs."
    p.forward = lambda batch: p.model(batch[0])  # type: ignore[method-assign]
    change(p, "score", lambda old, outputs, batch: old(outputs.squeeze(1), batch))


@fault(LOSS, [C.TARGETS_CAST], silent=True, needs="regression")
def targets_truncated(p: Program) -> None:
    "Standardised targets go through .long() on the way to the loss."
    change(p, "criterion", lambda old, outputs, batch: old(outputs, [batch[0], batch[1].long().float()]))


@fault(LOSS, [C.TARGETS_CAST, C.CLASS_MISSING], silent=True, needs="float_labels")
def labels_cut_off(p: Program) -> None:
    "Labels are scaled to 0.9 and cut to integers, so that all become 0."

    def criterion(old: Any, outputs: Any, batch: Any) -> Tensor:
        return old(outputs, [batch[0], batch[1], (0.9 * batch[2]).int().float()])

    change(p, "criterion", criterion)


@fault(
    LOSS, [C.LOSS_ASCENDED], [*TOO_LARGE_STEPS, C.LOGITS_INTO_PROBABILITY_LOSS], without=NO_GAN + " reinforcement"
)
def sign_wrong(p: Program) -> None:
    "The loss is maximised: its sign is wrong."
    change(p, "criterion", lambda old, outputs, batch: -old(outputs, batch))


@fault(LOSS, [C.LOSS_TERM_DOMINATES], [C.WEIGHT_DECAY_TOO_STRONG], needs="inputs", without="distributed frozen")
def penalty_dominates(p: Program) -> None:
    "A penalty on the weights was added with a factor a thousand times too large."

    def criterion(old: Any, outputs: Any, batch: Any) -> Tensor:
        return old(outputs, batch) + 3.0 * sum(q.abs().mean() for q in p.model.parameters()) * 10

    change(p, "criterion", criterion)


@fault(LOSS, [C.LOSS_TERM_DOMINATES], [C.EMBEDDINGS_COLLAPSED, C.OUTPUT_CONSTANT], needs="terms")
def divergence_dominates(p: Program) -> None:
    "The Kullback-Leibler term has a factor of 100, so that the code is ignored."

    def criterion(old: Any, outputs: Any, batch: Any) -> Tensor:
        _, mean, log_variance = outputs
        return old(outputs, batch) + 50 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()

    change(p, "criterion", criterion)


@fault(LOSS, [C.INITIAL_LOSS_HIGH, C.INITIALIZATION_SCALE], [C.SOFTMAX_ROUNDING], needs="classifier",
       without="distributed")  # fmt: skip
def head_starts_large(p: Program) -> None:
    "The last layer starts with weights thirty times too large."

    def prepare(old: Any) -> None:
        with torch.no_grad():
            for q in trained_layers(p)[-1][1].parameters():
                q.mul_(30)
        old()

    change(p, "prepare", prepare)
