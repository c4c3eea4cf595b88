"""Faults of the loop: what is trained, what gradients are made of, and in which order things happen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from calibration.fault import fault
from calibration.program import Program, change
from diag.instruments.causes import Cause as C
from diag.instruments.causes import Theme

LOOP = Theme.LOOP
# Told of a parameter that stands still, these say the same less precisely.
STILL = [C.WEIGHTS_UNCHANGED, C.GRADIENT_ABSENT]
TOO_LARGE_STEPS = [C.LEARNING_RATE_TOO_HIGH, C.GRADIENTS_EXPLODE, C.UNITS_DEAD, C.UNITS_SATURATED,
                   C.ATTENTION_ONE_HOT, C.ATTENTION_LOGITS_GROW, C.SOFTMAX_ROUNDING]  # fmt: skip
NO_GAN = "distributed two_optimizers"


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that hold parameters of their own, by name, in order."""
    return [(n, m) for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    before, _, last = name.rpartition(".")
    return model.get_submodule(before), last


def trained_layers(p: Program) -> list[tuple[str, nn.Module]]:
    found = layers_of(p.watched)
    return [(n, m) for n, m in found if all(q.requires_grad for q in m.parameters(recurse=False))]


def evaluate_averages(p: Program, back: Callable[[], None] | None = None) -> None:
    """Evaluate with a running mean of the weights; `back` replaces the exchange after the evaluation."""
    averages: dict[str, torch.Tensor] = {}

    def schedule_step(old: Any) -> None:
        old()
        with torch.no_grad():
            for name, q in p.model.named_parameters():
                averages.setdefault(name, q.clone()).lerp_(q, 0.1)

    def swap() -> None:
        with torch.no_grad():
            for name, q in p.model.named_parameters():
                kept = q.clone()
                q.copy_(averages[name])
                averages[name].copy_(kept)

    def evaluate(old: Any) -> None:
        swap()
        old()
        (back or swap)()

    change(p, "schedule_step", schedule_step)
    change(p, "evaluate", evaluate)


# Which parameters are trained


@fault(LOOP, [C.PARAMETER_IN_NO_OPTIMIZER], STILL, silent=True, without="distributed two_optimizers frozen")
def head_in_no_optimizer(p: Program) -> None:
    "The optimizer was given all layers but the last."
    last = lambda: {id(q) for q in trained_layers(p)[-1][1].parameters()}  # noqa: E731
    p.trained = lambda: [q for q in p.model.parameters() if id(q) not in last()]  # type: ignore[method-assign]


@fault(LOOP, [C.PARAMETER_IN_NO_OPTIMIZER], STILL, silent=True, without="distributed two_optimizers frozen")
def body_in_no_optimizer(p: Program) -> None:
    "The optimizer was given the last layer only."
    p.trained = lambda: list(trained_layers(p)[-1][1].parameters())  # type: ignore[method-assign]


@fault(LOOP, [C.OPTIMIZER_HOLDS_STALE_PARAMETERS, C.PARAMETER_IN_NO_OPTIMIZER], STILL, silent=True, without=NO_GAN)
def head_replaced_after_optimizer(p: Program) -> None:
    "The last layer was made again after the optimizer had been given its parameters."

    def prepare(old: Any) -> None:
        old()
        name, layer = [x for x in trained_layers(p) if isinstance(x[1], nn.Linear)][-1]
        parent, last = parent_of(p.model, name)
        setattr(parent, last, nn.Linear(layer.in_features, layer.out_features))

    p.optimizer_inside = False
    change(p, "prepare", prepare)


@fault(LOOP, [C.OPTIMIZER_HOLDS_STALE_PARAMETERS, C.PARAMETER_IN_NO_OPTIMIZER], [*STILL, C.STEP_MISSING],
       without="distributed two_optimizers")  # fmt: skip
def model_copied_after_optimizer(p: Program) -> None:
    "The model was copied after the optimizer had been made, and the copy is used."

    def prepare(old: Any) -> None:
        old()
        p.model = copy.deepcopy(p.model)

    p.optimizer_inside = False
    change(p, "prepare", prepare)


@fault(LOOP, [C.PARAMETER_FROZEN], STILL, silent=True, without="distributed two_optimizers frozen")
def middle_layer_frozen(p: Program) -> None:
    "A layer in the middle was left with requires_grad=False."

    def make_model(old: Any) -> nn.Module:
        model = old()
        found = [m for _, m in layers_of(model)]
        found[len(found) // 2].requires_grad_(False)
        return model

    change(p, "make_model", make_model)


@fault(LOOP, [C.PARAMETER_IN_NO_OPTIMIZER], STILL, silent=True, needs="plain_body", without="distributed")
def layers_in_a_list(p: Program) -> None:
    "Hidden layers are kept in a plain list, so that the module does not know them."

    class Hidden(nn.Module):
        def __init__(self, layers: list[nn.Module]) -> None:
            super().__init__()
            self.first, self.last = layers[0], layers[-1]
            self.middle = [[m] for m in layers[1:-1]]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for (layer,) in self.middle:
                x = layer(x)
            return self.last(x)

    change(p, "make_model", lambda old: Hidden([m for m in old() if not isinstance(m, nn.Dropout)]))


@fault(LOOP, [C.GRAPH_CUT], STILL, silent=True, needs="sequential", without="distributed frozen")
def activations_detached(p: Program) -> None:
    "A tensor in the middle of the network is detached."

    class Detach(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.detach()

    def make_model(old: Any) -> nn.Module:
        layers = list(old())
        at = len(layers) // 2
        return nn.Sequential(*layers[:at], Detach(), *layers[at:])

    change(p, "make_model", make_model)


@fault(LOOP, [C.GRAPH_CUT], STILL, silent=True, needs="blocks")
def block_without_gradient(p: Program) -> None:
    "A block is computed inside torch.no_grad()."

    def make_model(old: Any) -> nn.Module:
        model = old()
        blocks = [m for m in model.modules() if type(m).__name__ in ("Block", "Residual", "Mixer")]
        block = blocks[len(blocks) // 2]
        block.forward = torch.no_grad()(block.forward)
        return model

    change(p, "make_model", make_model)


@fault(LOOP, [C.MODULE_UNUSED], STILL, silent=True, without=NO_GAN)
def layer_forgotten(p: Program) -> None:
    "A block of layers was defined and its call forgotten in forward."

    def make_model(old: Any) -> nn.Module:
        model = old()
        model.refine = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        if isinstance(model, nn.Sequential):  # its forward would call it
            kept = list(model)[:-1]
            model.forward = lambda x: nn.Sequential(*kept)(x)
        return model

    change(p, "make_model", make_model)


@fault(LOOP, [C.PARAMETER_IN_TWO_OPTIMIZERS, C.STEP_REPEATED], TOO_LARGE_STEPS, silent=True, without=NO_GAN)
def two_optimizers_for_one_layer(p: Program) -> None:
    "A second optimizer for the head was added, and the first still holds the head."

    def prepare(old: Any) -> None:
        old()
        p.second = torch.optim.SGD(trained_layers(p)[-1][1].parameters(), lr=p.lr)  # type: ignore[attr-defined]

    def step(old: Any) -> None:
        old()
        p.second.step()  # type: ignore[attr-defined]

    change(p, "prepare", prepare)
    change(p, "step", step)


@fault(LOOP, [C.LAYERS_SHARED], silent=True, needs="blocks")
def blocks_are_one(p: Program) -> None:
    "All blocks are the same module: [block] * n."

    def make_model(old: Any) -> nn.Module:
        model = old()
        blocks = getattr(model, "blocks", None)
        if blocks is not None:
            for i in range(1, len(blocks)):
                blocks[i] = blocks[0]
            return model
        found = [(n, m) for n, m in model.named_modules() if type(m).__name__ in ("Residual", "Mixer")]
        if type(found[0][1]).__name__ == "Residual":  # of one width: the first, put in twice
            model.layer1 = nn.Sequential(*[model.layer1] * 2)
        else:
            parent, last = parent_of(model, found[1][0])
            setattr(parent, last, found[0][1])
        return model

    change(p, "make_model", make_model)


@fault(LOOP, [C.LAYERS_UNTIED], [C.LAYERS_START_EQUAL], silent=True, needs="tied")
def tied_weights_apart(p: Program) -> None:
    "The output's weights were copied from the embedding instead of shared with it."

    def make_model(old: Any) -> nn.Module:
        model = old()
        model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
        return model

    change(p, "make_model", make_model)


# What a step uses


@fault(LOOP, [C.GRADIENTS_NOT_ZEROED], TOO_LARGE_STEPS)
def gradients_never_zeroed(p: Program) -> None:
    "zero_grad() was forgotten."
    p.zero_grad = lambda: None  # type: ignore[method-assign]


@fault(LOOP, [C.GRADIENTS_NOT_ZEROED, C.STALE_GRADIENT], TOO_LARGE_STEPS, without=NO_GAN)
def only_head_zeroed(p: Program) -> None:
    "Only the last layer's gradients are zeroed."
    p.zero_grad = lambda: trained_layers(p)[-1][1].zero_grad()  # type: ignore[method-assign]


@fault(LOOP, [C.GRADIENTS_NOT_ZEROED], TOO_LARGE_STEPS, needs="epochs")
def zeroed_once_an_epoch(p: Program) -> None:
    "zero_grad() stands outside the loop over batches."
    zero = p.zero_grad

    def begin(old: Any) -> None:
        old()
        zero()

    p.zero_grad = lambda: None  # type: ignore[method-assign]
    change(p, "begin_epoch", begin)


@fault(LOOP, [C.GRADIENTS_ZEROED_BEFORE_STEP], STILL, without=NO_GAN)
def zeroed_between_backward_and_step(p: Program) -> None:
    "zero_grad() stands between backward() and step()."

    def clip(old: Any) -> None:
        old()
        p.optimizer.zero_grad(set_to_none=False)

    change(p, "clip", clip)


@fault(
    LOOP,
    [C.ACCUMULATION_NOT_DIVIDED],
    [*TOO_LARGE_STEPS, C.LOSS_SUMMED],
    silent=True,
    without=NO_GAN + " full_batch",
)
def accumulation_not_divided(p: Program) -> None:
    "Eight micro-batches are accumulated and the loss is not divided by eight."
    p.accumulate = 8
    p.batch = max(8, p.batch // 8)
    p.divided = lambda loss: loss  # type: ignore[method-assign]


@fault(LOOP, [C.ACCUMULATION_LOST], silent=True, without=NO_GAN + " full_batch")
def accumulation_zeroed(p: Program) -> None:
    "Four micro-batches are accumulated, and each begins with zero_grad()."
    p.accumulate = 4

    def train_batch(old: Any, batch: Any) -> Any:
        if p.number % 4:
            p.zero_grad()
        return old(batch)

    change(p, "train_batch", train_batch)


@fault(LOOP, [C.STEP_BEFORE_BACKWARD, C.GRADIENTS_ZEROED_BEFORE_STEP], [*STILL, C.STEP_MISSING],
       without=NO_GAN + " accumulation")  # fmt: skip
def step_before_backward(p: Program) -> None:
    "zero_grad(), step() and backward() in this order: the step has no gradient."

    def train_batch(batch: Any) -> Any:
        loss = p.loss(batch)
        p.zero_grad()
        p.update()
        p.backward(loss)
        return loss

    p.train_batch = train_batch  # type: ignore[method-assign]


@fault(LOOP, [C.STEP_MISSING], STILL, without=NO_GAN)
def step_forgotten(p: Program) -> None:
    "optimizer.step() was forgotten."
    p.step = lambda: None  # type: ignore[method-assign]


@fault(LOOP, [C.STEP_REPEATED], TOO_LARGE_STEPS, silent=True, without=NO_GAN)
def step_twice(p: Program) -> None:
    "optimizer.step() is called twice a batch."
    p.onset = 2  # of the optimizer's steps the first is as it should be

    def step(old: Any) -> None:
        old()
        old()

    change(p, "step", step)


@fault(LOOP, [C.OPTIMIZER_RECREATED], silent=True, needs="epochs adam", without=NO_GAN)
def optimizer_made_each_epoch(p: Program) -> None:
    "The optimizer is made inside the loop over epochs."

    def begin(old: Any) -> None:
        if p.epoch:
            p.mark()
            p.optimizer = p.make_optimizer()
        old()

    change(p, "begin_epoch", begin)


@fault(LOOP, [C.WEIGHTS_CHANGED_OUTSIDE], silent=True, needs="epochs", without=NO_GAN + " full_batch")
def weights_reloaded_each_epoch(p: Program) -> None:
    "Each epoch begins by loading the weights of the start again."
    kept: dict[str, Any] = {}

    def begin(old: Any) -> None:
        if not kept:
            kept.update(copy.deepcopy(p.model.state_dict()))
        elif p.epoch:
            p.mark()
            p.model.load_state_dict(kept)
        old()

    change(p, "begin_epoch", begin)


@fault(LOOP, [C.AVERAGED_WEIGHTS_LEFT, C.WEIGHTS_CHANGED_OUTSIDE], silent=True, needs="epochs",
       without=NO_GAN + " full_batch frozen")  # fmt: skip
def averages_left_in_place(p: Program) -> None:
    "Averaged weights are put in for the evaluation and not taken out again."
    evaluate_averages(p, back=p.mark)
