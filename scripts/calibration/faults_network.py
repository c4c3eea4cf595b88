"""Faults of the network: depth, units, initialisation, collapse, attention, normalisation, values not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calibration import layers
from calibration.fault import fault
from calibration.faults_loop import TOO_LARGE_STEPS, layers_of, parent_of, trained_layers
from calibration.program import Program, change
from diag.instruments.causes import Cause as C
from diag.instruments.causes import Theme

NETWORK = Theme.NETWORK
SIGNALS = [C.GRADIENTS_EXPLODE, C.INITIAL_LOSS_HIGH, C.NORMALIZATION_MISSING, *TOO_LARGE_STEPS]


def start(p: Program, new: Any) -> None:
    """Before the optimizer is made, `new(weight)` is done in place to each weight of two or more axes."""

    def make_model(old: Any) -> nn.Module:
        model = old()
        with torch.no_grad():
            for _, m in layers_of(model):
                for q in m.parameters(recurse=False):
                    if q.dim() > 1 and q.requires_grad:
                        new(q)
        return model

    change(p, "make_model", make_model)


def replace(p: Program, kinds: tuple[type[nn.Module], ...], make: Any) -> None:
    """Each module of these kinds becomes `make(module)`."""

    def make_model(old: Any) -> nn.Module:
        model = old()
        for name, m in list(model.named_modules()):
            if isinstance(m, kinds):
                parent, last = parent_of(model, name)
                setattr(parent, last, make(m))
        return model

    change(p, "make_model", make_model)


@fault(
    NETWORK,
    [C.GRADIENTS_VANISH],
    [C.UNITS_SATURATED, C.LEARNING_RATE_TOO_LOW, C.NORMALIZATION_MISSING],
    needs="plain_body",
)
def deep_sigmoid(p: Program) -> None:
    "Ten hidden layers with sigmoids and no normalisation."

    def make_model(old: Any) -> nn.Module:
        linears = [m for m in old().modules() if isinstance(m, nn.Linear)]
        inside, outside = linears[0].in_features, linears[-1].out_features
        return nn.Sequential(nn.Flatten(), layers.mlp(inside, *[48] * 10, outside, activation=nn.Sigmoid))

    change(p, "make_model", make_model)


@fault(NETWORK, [C.INITIALIZATION_SCALE, C.GRADIENTS_EXPLODE], SIGNALS, needs="inputs",
       without="distributed frozen batch_norm reconstruction recurrent attention")  # fmt: skip
def starts_too_large(p: Program) -> None:
    "All weights start six times too large."
    start(p, lambda q: q.mul_(6))


@fault(NETWORK, [C.INITIALIZATION_SCALE, C.GRADIENTS_VANISH],
       [C.LEARNING_RATE_TOO_LOW, C.INITIALIZATION_CONSTANT, C.UNITS_DEAD],
       needs="plain_body")  # fmt: skip
def starts_too_small(p: Program) -> None:
    "All weights start a hundred times too small."
    start(p, lambda q: q.mul_(0.01))


@fault(NETWORK, [C.INITIALIZATION_CONSTANT],
       [C.GRADIENTS_VANISH, C.UNITS_DEAD, C.INITIALIZATION_SCALE, C.GRADIENT_ABSENT],
       needs="inputs", without="distributed frozen batch_norm attention recurrent")  # fmt: skip
def starts_at_zero(p: Program) -> None:
    "All weight matrices start at zero."
    start(p, lambda q: q.zero_())


@fault(NETWORK, [C.INITIALIZATION_CONSTANT], needs="plain_body")
def starts_alike(p: Program) -> None:
    "All weights of a layer start with the same number, so that its units stay copies."
    start(p, lambda q: q.fill_(0.5 / q.shape[1]))


@fault(NETWORK, [C.UNITS_DEAD], [C.GRADIENTS_VANISH, C.GRADIENT_ABSENT], needs="relu inputs sequential",
       without="distributed frozen batch_norm reconstruction dense")  # fmt: skip
def units_dead(p: Program) -> None:
    "A bias of -8 keeps most ReLU units of a layer at zero."

    def make_model(old: Any) -> nn.Module:
        model = old()
        first = next(m for m in model.modules() if isinstance(m, (nn.Linear, nn.GroupNorm)))
        with torch.no_grad():
            first.bias[len(first.bias) // 8 :] -= 8
        return model

    change(p, "make_model", make_model)


# What is done here is to start weights too large; that units saturate follows from it. Either names it.
@fault(
    NETWORK,
    [C.UNITS_SATURATED, C.INITIALIZATION_SCALE],
    [C.GRADIENTS_VANISH, C.INPUTS_NOT_NORMALIZED],
    needs="plain_body",
)
def units_saturated(p: Program) -> None:
    "Tanh units behind weights thirty times too large."
    replace(p, (nn.ReLU,), lambda m: nn.Tanh())

    def make_model(old: Any) -> nn.Module:
        model = old()
        hidden = [m for m in model.modules() if isinstance(m, nn.Linear)][:-1]
        with torch.no_grad():
            for m in hidden:
                m.weight.mul_(30)
        return model

    change(p, "make_model", make_model)


# That the model ends in a ReLU is the fault itself: OUTPUT_RANGE says so in these words.
@fault(NETWORK, [C.OUTPUT_CONSTANT, C.UNITS_DEAD, C.OUTPUT_RANGE], [C.GRADIENTS_VANISH, C.GRADIENT_ABSENT],
       needs="inputs sequential", without="distributed frozen dense reconstruction batch_norm")  # fmt: skip
def output_behind_relu(p: Program) -> None:
    "The model ends in a ReLU whose units are all at zero."

    def make_model(old: Any) -> nn.Module:
        model = old()
        with torch.no_grad():
            list(model)[-1].bias.sub_(5)
        return nn.Sequential(*model, nn.ReLU())

    change(p, "make_model", make_model)


@fault(
    NETWORK,
    [C.NOTHING_KEEPS_APART, C.EMBEDDINGS_COLLAPSED, C.OUTPUT_CONSTANT, C.MODE_COLLAPSE],
    silent=True,
    needs="self_supervised",
)
def embeddings_collapse(p: Program) -> None:
    "Only the likeness of the two views is trained; nothing keeps the embeddings apart."

    def criterion(outputs: Any, batch: Any) -> Tensor:
        a, b = (nn.functional.normalize(z, dim=1) for z in outputs)
        return (a - b).square().sum(1).mean()

    p.criterion = criterion  # type: ignore[method-assign]


@fault(NETWORK, [C.ATTENTION_UNIFORM], [C.LEARNING_RATE_TOO_LOW], silent=True, needs="attention blocks")
def attention_uniform(p: Program) -> None:
    "The products of queries and keys are divided by the width squared."
    attention(p, lambda m: setattr(m, "scale", m.scale**6))


@fault(
    NETWORK,
    [C.ATTENTION_ONE_HOT, C.ATTENTION_LOGITS_GROW],
    [C.INITIALIZATION_SCALE, C.GRADIENTS_VANISH],
    needs="attention blocks",
)
def attention_one_hot(p: Program) -> None:
    "Products of queries and keys are not scaled, and both start large."

    def sharpen(m: Any) -> None:
        m.scale = 1.0
        with torch.no_grad():
            m.qkv.weight[: 2 * len(m.qkv.weight) // 3] *= 12

    attention(p, sharpen)


def attention(p: Program, new: Any) -> None:
    """Do `new(module)` to each attention of ours."""

    def make_model(old: Any) -> nn.Module:
        model = old()
        for m in model.modules():
            if isinstance(m, layers.Attention):
                new(m)
        return model

    change(p, "make_model", make_model)


@fault(NETWORK, [C.ATTENTION_ONE_HOT, C.ATTENTION_LOGITS_GROW], [C.INITIALIZATION_SCALE, C.GRADIENTS_VANISH],
       needs="attention", without="distributed blocks")  # fmt: skip
def attention_one_hot_in_torch(p: Program) -> None:
    "The queries and keys of torch's own attention start twenty times too large."

    def make_model(old: Any) -> nn.Module:
        model = old()
        with torch.no_grad():
            for m in model.modules():
                if isinstance(m, nn.MultiheadAttention):
                    m.in_proj_weight[: 2 * m.embed_dim] *= 20
        return model

    change(p, "make_model", make_model)


@fault(NETWORK, [C.NORMALIZATION_MISSING, C.GRADIENTS_EXPLODE, C.INITIALIZATION_SCALE], SIGNALS, needs="sequential",
       without="distributed plain_body reconstruction full_batch frozen")  # fmt: skip
def deep_without_normalization(p: Program) -> None:
    "Sixteen residual blocks were put in, whose sums nothing normalises."

    class Deep(nn.Module):
        def __init__(self, head: nn.Linear) -> None:
            super().__init__()
            width = head.in_features
            self.blocks = nn.ModuleList([layers.mlp(width, 64, width) for _ in range(16)])
            for block in self.blocks:
                nn.init.kaiming_normal_(block[-1].weight)
            self.head = head

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    def make_model(old: Any) -> nn.Module:
        model = old()
        found = [m for m in model if not isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]
        if isinstance(found[-1], nn.Linear):
            return nn.Sequential(*found[:-1], Deep(found[-1]))
        conv = [nn.Conv2d(12, 12, 3, padding=1) for _ in range(6)]
        for m in conv:
            nn.init.normal_(m.weight, std=0.5)
        return nn.Sequential(*found[:-1], *conv, found[-1])

    change(p, "make_model", make_model)


@fault(NETWORK, [C.NORMALIZATION_STATISTICS_BAD], [C.EVALUATION_IN_TRAIN_MODE], silent=True, needs="batch_norm",
       without="distributed")  # fmt: skip
def statistics_too_slow(p: Program) -> None:
    "Batch normalisation's momentum is 0.0001, so that its running statistics stay at their start."

    def make_model(old: Any) -> nn.Module:
        model = old()
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.momentum = 1e-4
        return model

    change(p, "make_model", make_model)


@fault(NETWORK, [C.MODE_COLLAPSE, C.GRADIENTS_VANISH, C.OUTPUT_CONSTANT], needs="adversarial")
def critic_too_strong(p: Program) -> None:
    "The discriminator learns a hundred times faster than the generator."
    p.lr *= 0.1

    def make(old: Any) -> Any:
        optimizer = old()
        optimizer.param_groups[0]["lr"] = p.lr * 100
        return optimizer

    change(p, "make_critic_optimizer", make)


@fault(
    Theme.NUMERICS,
    [C.NOT_FINITE],
    [C.DATA_NOT_FINITE, C.WEIGHTS_UNCHANGED],
    needs="inputs",
    without="distributed frozen",
)
def root_of_zero(p: Program) -> None:
    "A penalty takes the square root of something that is zero, whose gradient is infinite."

    def criterion(old: Any, outputs: Any, batch: Any) -> Tensor:
        weight = trained_layers(p)[-1][1].weight
        return old(outputs, batch) + 1e-3 * (weight - weight.detach()).square().sum().sqrt()

    change(p, "criterion", criterion)


@fault(
    Theme.NUMERICS,
    [C.NOT_FINITE],
    [C.SOFTMAX_ROUNDING, C.DATA_NOT_FINITE],
    needs="classifier",
    without="distributed dense",
)
def logarithm_of_zero(p: Program) -> None:
    "Cross-entropy is written as log(softmax), which is infinite once a probability rounds to zero."
    p.lr *= 3

    def criterion(outputs: Any, batch: Any) -> Tensor:
        chosen = (40 * outputs).softmax(-1).gather(-1, batch[1][:, None])
        return -chosen.log().mean()

    p.criterion = criterion  # type: ignore[method-assign]
