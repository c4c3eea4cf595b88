"""Trainers that do something unusual between two steps: what is recorded is right, and training is the same."""

import contextlib
import copy
import math

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import diag

CHEAP = ["softmax_collapse", "gradient_coherence"]


def batches(helpers, size=16, epochs=3):
    x, y = helpers.images(64)
    return epochs * list(zip(x.split(size), y.split(size), strict=True))


# Bit-identity under unusual steps, measured at every one of them.


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation: up the gradient, a second gradient there, back and down with that one."""

    def __init__(self, parameters, base, rho=0.05):
        super().__init__(parameters, {"rho": rho})
        self.base = base(self.param_groups)

    @torch.no_grad()
    def first_step(self):
        parameters = [p for g in self.param_groups for p in g["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=self.param_groups[0]["rho"] / float(norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in (p for g in self.param_groups for p in g["params"]):
            p.copy_(self.state[p]["old"])
        self.base.step()
        self.zero_grad()

    def step(self, closure):
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()


def sam_by_hand(model, data, losses):
    optimizer = Sam(model.parameters(), lambda groups: torch.optim.SGD(groups, 0.05, momentum=0.9))
    for x, y in data:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.first_step()
        F.cross_entropy(model(x), y).backward()
        optimizer.second_step()
        losses.append(loss.item())


def sam_by_closure(model, data, losses):
    optimizer = Sam(model.parameters(), lambda groups: torch.optim.SGD(groups, 0.05, momentum=0.9))
    for x, y in data:

        def closure(x=x, y=y):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        losses.append(closure().item())
        optimizer.step(closure)


class EightBit(torch.optim.Optimizer):
    """Momentum kept in 8 bits with one scale a tensor, in an optimizer of its own."""

    def __init__(self, parameters, lr=0.05):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                kept = state["codes"].float() * state["scale"] if state else torch.zeros_like(p)
                momentum = 0.9 * kept + p.grad
                scale = momentum.abs().max() / 127 + 1e-12
                state["codes"], state["scale"] = (momentum / scale).round().to(torch.int8), scale
                p.add_(momentum, alpha=-group["lr"])


class ScheduleFree(torch.optim.Optimizer):
    """Trains at y, an interpolation of the iterates z and their average x, and evaluates at x (in eval mode)."""

    def __init__(self, parameters, lr=0.05, beta=0.9):
        super().__init__(parameters, {"lr": lr, "beta": beta, "k": 0, "at_average": False})

    @torch.no_grad()
    def _move(self, weight, at_average):
        for group in self.param_groups:
            if group["at_average"] != at_average:
                for p in (p for p in group["params"] if "z" in self.state[p]):
                    p.lerp_(self.state[p]["z"], weight(group["beta"]))
            group["at_average"] = at_average

    def eval(self):
        self._move(lambda beta: 1 - 1 / beta, True)

    def train(self):
        self._move(lambda beta: 1 - beta, False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, 1 / group["k"]).add_(
                    p.grad, alpha=group["lr"] * (group["beta"] * (1 - 1 / group["k"]) - 1)
                )
                z.sub_(p.grad, alpha=group["lr"])


def stepping(make, around=contextlib.nullcontext):
    def train(model, data, losses):
        optimizer = make(model.parameters())
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            with around():
                optimizer.step()
            losses.append(loss.item())

    return train


def schedule_free(model, data, losses):
    optimizer = ScheduleFree(model.parameters())
    for x, y in data:
        model.train()
        optimizer.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        model.eval()
        optimizer.eval()
        F.cross_entropy(model(x), y)


def scaled_half_precision(model, data, losses):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, foreach=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    for x, y in data:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())


def evaluated_average(model, data, losses):
    """A moving average of the model, evaluated by itself and in the model's place after every step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        losses.append(loss.item())
        F.cross_entropy(average(x), y)  # gradients are on, and nobody asks for them
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict(average.module.state_dict())
        model.eval()
        F.cross_entropy(model(x), y)
        model.load_state_dict(kept)
        model.train()


TRAININGS = {
    "SAM by hand": sam_by_hand,
    "SAM by closure": sam_by_closure,
    "8 bits": stepping(EightBit),
    "schedule-free": schedule_free,
    "fused": stepping(lambda p: torch.optim.AdamW(p, 1e-2, fused=True)),
    "foreach": stepping(lambda p: torch.optim.RMSprop(p, 1e-3, foreach=True)),
    "step without gradients": stepping(lambda p: torch.optim.Adam(p, 1e-2), torch.no_grad),
    "step in inference mode": stepping(lambda p: torch.optim.SGD(p, 1e-2), torch.inference_mode),
    "autocast and scaler": scaled_half_precision,
    "evaluated average": evaluated_average,
}


@pytest.mark.parametrize("name", TRAININGS)
def test_training_is_the_same_and_its_losses_are_recorded(name, helpers):
    def train(model):
        losses.clear()
        TRAININGS[name](model, batches(helpers), losses)

    losses = []
    unwatched, _ = helpers.final_state(train, watched=False)
    watched, run = helpers.final_state(train, True, budget=math.inf, instruments=CHEAP)
    helpers.assert_identical(watched, unwatched)
    numpy.testing.assert_allclose(run.history.loss, losses, rtol=1e-6)
    assert run.history.steps.tolist() == list(range(1, len(losses) + 1))
    assert numpy.isfinite(run.history.gradient_norm).all()
    assert set(run.instruments) == set(CHEAP) and not run.outcomes
    assert not [e for e in run.events if e.kind == "internal error"]
    moved = "The parameters were moved between two backward passes of one step" in helpers.texts(run)
    assert moved == name.startswith("SAM")


# Which losses belong to a step.


def test_each_half_of_a_gan_has_its_own_steps_and_losses():
    """The generator's step runs a backward pass through the discriminator, whose gradients are then thrown away."""
    real = torch.randn(6, 8, 2, generator=torch.Generator().manual_seed(2)) + 2

    def train(watched):
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        critic = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        optimizers = [torch.optim.Adam(net.parameters(), 1e-2) for net in (generator, critic)]
        seen = {"generator": [], "critic": []}
        settings = {"budget": math.inf, "instruments": ["gradient_flow", "gradient_coherence"]}
        with contextlib.ExitStack() as stack:
            watchers = [stack.enter_context(diag.watch(net, **settings)) for net in (generator, critic) if watched]
            for x in real:
                fake = generator(torch.randn(8, 3))
                optimizers[1].zero_grad()
                halves = [
                    F.binary_cross_entropy_with_logits(critic(x), torch.ones(8, 1)),
                    F.binary_cross_entropy_with_logits(critic(fake.detach()), torch.zeros(8, 1)),
                ]
                for half in halves:
                    half.backward()
                optimizers[1].step()
                seen["critic"].append(sum(half.item() for half in halves))  # the step descends both
                optimizers[0].zero_grad()
                loss = F.binary_cross_entropy_with_logits(critic(fake), torch.ones(8, 1))
                loss.backward()
                optimizers[0].step()
                seen["generator"].append(loss.item())
        return nn.ModuleList([generator, critic]).state_dict(), seen, watchers

    unwatched, _, _ = train(False)
    watched, seen, watchers = train(True)
    assert all(torch.equal(watched[name], unwatched[name]) for name in unwatched)
    for watcher, losses in zip(watchers, seen.values(), strict=True):
        numpy.testing.assert_allclose(watcher.run.history.loss, losses, rtol=1e-6)
        assert watcher.run.history.steps.tolist() == list(range(1, 7))


def test_a_step_that_is_given_up_leaves_no_loss_behind(tiny):
    model, x, y = tiny
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    with diag.watch(model, instruments=[]) as watcher:
        for i in range(6):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[i : i + 8]), y[i : i + 8])
            loss.backward()
            if i % 2:
                optimizer.step()
                losses.append(loss.item())
    numpy.testing.assert_allclose(watcher.run.history.loss, losses)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_sum_divided_by_a_count_adds_up_over_micro_batches(tiny, parts, helpers):
    """As in transformers' Trainer: the sum of every micro-batch over the number of items of the whole step."""
    model, x, y = tiny
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    with diag.watch(model, budget=math.inf, instruments=["softmax_collapse"]) as watcher:
        for _ in range(4):
            optimizer.zero_grad()
            losses.append(F.cross_entropy(model(x), y).item())
            for part in torch.arange(len(x)).chunk(parts):
                (F.cross_entropy(model(x[part]), y[part], reduction="sum") / len(x)).backward()
            optimizer.step()
    numpy.testing.assert_allclose(watcher.run.history.loss, losses, rtol=1e-6)
    assert "reduces cross_entropy by 'sum'; measurements use the mean" in helpers.texts(watcher.run)
    assert watcher.run.series("softmax_collapse")


def test_a_summed_loss_that_is_scaled_is_recorded_without_the_scale(tiny):
    model, x, y = tiny
    model, x = model.float(), x.float()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**6)
    with diag.watch(model, instruments=[]) as watcher:
        total = F.cross_entropy(model(x), y, reduction="sum")
        scaler.scale(total / len(x)).backward()
        scaler.step(optimizer)
    assert watcher.run.history.loss[0] == pytest.approx(total.item() / len(x), rel=1e-6)


# Models in unusual places.


def test_a_call_is_counted_once_however_the_model_is_wrapped(helpers):
    """The wrapper and the model under it are both looked at; first costs are estimated from the examples seen."""
    model = helpers.Net()
    wrapped = nn.DataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with diag.watch(wrapped, instruments=["softmax_collapse"]) as watcher:
        for x, y in batches(helpers, epochs=1)[:2]:
            F.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
        assert (watcher._training.calls, watcher._training.examples) == (2, 32)


def test_a_compiled_wrapper_of_a_wrapped_model_is_found(helpers):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with diag.watch(model, budget=math.inf, instruments=["softmax_collapse"]) as watcher:
        call = torch.compile(nn.DataParallel(model), backend="eager")
        stepping(lambda p: torch.optim.SGD(p, 0.05))(call, batches(helpers, epochs=1), losses := [])
    numpy.testing.assert_allclose(watcher.run.history.loss, losses, rtol=1e-6)
    # The wrapper is found after the first step.
    assert watcher._training.calls == 3 and watcher.run.series("softmax_collapse")
    torch._dynamo.reset()


def test_a_sharded_model_is_not_measured_and_the_reason_is_given_once(tiny, helpers):
    model, x, y = tiny
    sharded = type("FullyShardedDataParallel", (nn.Sequential,), {})(*model)
    optimizer = torch.optim.SGD(sharded.parameters(), 0.1)
    with diag.watch(sharded, budget=math.inf, instruments=["softmax_collapse"]) as watcher:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(sharded(x), y).backward()
            optimizer.step()
    assert "The parameters are sharded over processes" in helpers.texts(watcher.run)
    assert not watcher.run.outcomes and len(watcher.run.history.steps) == 3


def test_a_part_of_a_model_is_watched_by_itself(tiny):
    model, x, y = tiny
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    with diag.watch(model, instruments=[]) as whole, diag.watch(model[:2], instruments=[]) as part:
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    for watcher in (whole, part):
        numpy.testing.assert_allclose(watcher.run.history.loss, losses)
    numpy.testing.assert_allclose(part.run.history.gradient_norm, whole.run.history.gradient_norm[:, :2], rtol=1e-6)


def test_an_encoder_whose_head_is_elsewhere_says_why_its_loss_is_not_known(tiny, helpers):
    model, x, y = tiny
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    encoder = nn.Sequential(*model[:2])
    with diag.watch(encoder, budget=math.inf, instruments=["softmax_collapse", "gradient_flow"]) as watcher:
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model[2](encoder(x)), y).backward()
            optimizer.step()
    assert "computed from the model's outputs in a way diag cannot repeat" in helpers.texts(watcher.run)
    assert len(watcher.run.history.steps) == 6 and numpy.isfinite(watcher.run.history.loss).all()


def test_a_model_of_which_only_parts_are_called_says_so(tiny, helpers):
    model, x, y = tiny
    outer = nn.ModuleDict({"net": model})
    optimizer = torch.optim.SGD(outer.parameters(), 0.1)
    with diag.watch(outer, instruments=["softmax_collapse"]) as watcher:
        F.cross_entropy(outer["net"](x), y).backward()
        optimizer.step()
    assert "only its parts are called); watch the part that is called" in helpers.texts(watcher.run)
    assert numpy.isfinite(watcher.run.history.loss).all()


def test_an_optimizer_that_is_none_of_torchs_is_said_not_to_be_seen(tiny, helpers):
    model, x, y = tiny
    with diag.watch(model, instruments=["softmax_collapse"]) as watcher:
        for _ in range(3):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.1)
    assert "No optimizer step on the model's parameters was seen" in helpers.texts(watcher.run)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(64, 16), nn.Dropout(0.2), nn.Linear(16, 4)
        self.reentrant = reentrant

    def forward(self, x):
        h = self.first(x.flatten(1)).requires_grad_()
        return self.last(checkpoint(lambda h: self.drop(torch.tanh(h)), h, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_inside_the_model(reentrant, helpers):
    def train(model):
        stepping(lambda p: torch.optim.AdamW(p, 1e-2))(model, batches(helpers), losses := [])
        recorded.append(losses)

    def make():
        return Checkpointed(reentrant)

    recorded = []
    unwatched, _ = helpers.final_state(train, False, make)
    watched, run = helpers.final_state(train, True, make, budget=math.inf, instruments=CHEAP)
    helpers.assert_identical(watched, unwatched)
    numpy.testing.assert_allclose(run.history.loss, recorded[-1], rtol=1e-6)
    assert run.series("softmax_collapse")
    assert not [e for e in run.events if e.kind == "internal error"]


def test_outputs_that_were_widened_after_the_loss(helpers):
    """Under accelerate's mixed precision a model computes its loss from outputs that are only then widened."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(64, 4)

        def forward(self, x, labels=None, num_items_in_batch=None):
            with torch.autocast("cpu", torch.bfloat16):
                z = self.net(x.flatten(1))
                total = F.cross_entropy(z.float(), labels, reduction="sum")
            return {"loss": total / num_items_in_batch, "logits": z.float()}

    torch.manual_seed(0)
    model = Own()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    with diag.watch(model, budget=math.inf, instruments=CHEAP) as watcher:
        for x, y in batches(helpers):
            optimizer.zero_grad()
            loss = model(x, labels=y, num_items_in_batch=len(y))["loss"]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    numpy.testing.assert_allclose(watcher.run.history.loss, losses, rtol=1e-6)
    assert "The loss was observed: cross_entropy()" in helpers.texts(watcher.run)
    assert "num_items_in_batch" not in watcher._probe.batches[0].kwargs
