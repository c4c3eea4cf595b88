"""Training loops with one fault each, and their healthy twins: `fault(model_and_data...)` trains for a few steps.

Each function takes nothing, builds what it needs and gives `(model, train)`; `train()` is run inside a watch. What
a fault must be called is in its decorator: any of the causes given counts."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from diag.instruments.causes import Cause

FAULTS, HEALTHY = {}, {}


def fault(*causes, within=None):
    def keep(function):
        FAULTS[function.__name__] = (function, {str(c) for c in causes}, within)
        return function

    return keep


def healthy(function):
    HEALTHY[function.__name__] = function
    return function


def data(n=64, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return x, x[:, :classes].argmax(1)


def mlp(width=12, classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )


def noisy(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(12, 12),
        nn.ReLU(),
        nn.Linear(12, 3),
    )


def batches(size=16, shuffle=True, n=64):
    return DataLoader(TensorDataset(*data(n)), size, shuffle=shuffle)


def endless(loader=None):
    loader = loader if loader is not None else batches()
    while True:
        yield from loader


def some(steps=8):
    return itertools.islice(endless(), steps)


def adam(model, rate=1e-2):
    return torch.optim.Adam(model.parameters(), rate)


def sgd(model, rate=0.05, **more):
    return torch.optim.SGD(model.parameters(), rate, **more)


def plain(model, optimizer, steps=8, loss=F.cross_entropy):
    for x, y in some(steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()


# Zeroing


@fault(Cause.GRADIENTS_NOT_ZEROED, within=3)
def never_zeroed():
    model = mlp()
    optimizer = adam(model)

    def train():
        for x, y in some():
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return model, train


def by_closure(zeroes):
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    x, y = data()

    def train():
        for _ in range(6):

            def closure():
                if zeroes:
                    optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y) + 1e-3 * sum(p.square().sum() for p in model.parameters())
                loss.backward()
                return loss

            optimizer.step(closure)

    return model, train


@fault(Cause.GRADIENTS_NOT_ZEROED, within=3)
def a_closure_that_never_zeroes():
    return by_closure(zeroes=False)


@healthy
def a_closure_that_zeroes():
    return by_closure(zeroes=True)


@fault(Cause.GRADIENTS_NOT_ZEROED, within=3)
def never_zeroed_and_clipped():
    model = mlp()
    optimizer = sgd(model, momentum=0.9)

    def train():
        for x, y in some():
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()

    return model, train


@fault(Cause.GRADIENTS_NOT_ZEROED, within=4)
def zeroed_once_an_epoch():
    model = mlp()
    optimizer = adam(model)

    def train():
        for _ in range(3):
            optimizer.zero_grad()
            for x, y in batches():
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

    return model, train


@fault(Cause.GRADIENTS_ZEROED_BEFORE_STEP, within=3)
def zeroed_between_backward_and_step():
    model = mlp()
    optimizer = adam(model)

    def train():
        for x, y in some():
            F.cross_entropy(model(x), y).backward()
            optimizer.zero_grad()
            optimizer.step()

    return model, train


@fault(Cause.GRADIENTS_ZEROED_BEFORE_STEP, within=3)
def zeroed_in_place_between_backward_and_step():
    model = mlp()
    optimizer = sgd(model, weight_decay=1e-3)

    def train():
        for x, y in some():
            F.cross_entropy(model(x), y).backward()
            model.zero_grad(set_to_none=False)
            optimizer.step()

    return model, train


@fault(Cause.STALE_GRADIENT)
def a_part_is_not_computed_and_not_zeroed():
    model = mlp()
    optimizer = adam(model)

    def train():
        for i, (x, y) in enumerate(some(12)):
            model[4].zero_grad()
            hidden = model[3](model[2](model[1](model[0](x))))
            F.cross_entropy(model[4](hidden if i == 0 else hidden.detach()), y).backward()
            optimizer.step()

    return model, train


# Order


@fault(Cause.STEP_BEFORE_BACKWARD, within=3)
def step_before_backward():
    model = mlp()
    optimizer = adam(model)

    def train():
        for x, y in some():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            optimizer.step()
            loss.backward()

    return model, train


@fault(Cause.STEP_BEFORE_BACKWARD, within=4)
def step_between_call_and_backward():
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = sgd(model)

    def train():
        for x, y in some():
            loss = F.cross_entropy(model(x), y)
            optimizer.step()
            optimizer.zero_grad()
            loss.backward()

    return model, train


@fault(Cause.STEP_REPEATED, within=4)
def stepped_twice():
    model = mlp()
    optimizer = adam(model)

    def train():
        for x, y in some():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.step()

    return model, train


@fault(Cause.STEP_MISSING)
def step_without_parentheses():
    model = mlp()
    optimizer = adam(model)

    def train():
        for x, y in some(12):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step  # noqa: B018

    return model, train


@fault(Cause.PARAMETER_IN_TWO_OPTIMIZERS, within=4)
def two_optimizers_on_one_gradient():
    model = mlp()
    first, second = adam(model), adam(model)

    def train():
        for x, y in some():
            first.zero_grad()
            F.cross_entropy(model(x), y).backward()
            first.step()
            second.step()

    return model, train


@fault(Cause.PARAMETER_IN_TWO_OPTIMIZERS, within=4)
def body_in_two_optimizers():
    model = mlp()
    whole, body = adam(model), sgd(model[0])

    def train():
        for x, y in some():
            whole.zero_grad()
            F.cross_entropy(model(x), y).backward()
            whole.step()
            body.step()

    return model, train


# What optimizers hold


@fault(Cause.PARAMETER_IN_NO_OPTIMIZER, within=3)
def a_layer_in_no_optimizer():
    model = mlp()
    optimizer = torch.optim.Adam([*model[0].parameters(), *model[4].parameters()], 1e-2)
    return model, lambda: plain(model, optimizer)


@fault(Cause.PARAMETER_IN_NO_OPTIMIZER, within=3)
def only_the_weights_in_the_optimizer():
    model = mlp()
    optimizer = sgd_of([p for p in model.parameters() if p.ndim > 1])
    return model, lambda: plain(model, optimizer)


def sgd_of(parameters):
    return torch.optim.SGD(parameters, 0.05)


@fault(Cause.OPTIMIZER_HOLDS_STALE_PARAMETERS, Cause.PARAMETER_IN_NO_OPTIMIZER, within=3)
def head_replaced_after_the_optimizer():
    model = mlp()
    optimizer = adam(model)
    model[4] = nn.Linear(12, 3)
    return model, lambda: plain(model, optimizer)


@fault(Cause.OPTIMIZER_HOLDS_STALE_PARAMETERS, Cause.PARAMETER_IN_NO_OPTIMIZER)
def head_replaced_while_watched():
    model = mlp()
    optimizer = adam(model)

    def train():
        plain(model, optimizer, 2)
        model[4] = nn.Linear(12, 3)
        plain(model, optimizer, 12)

    return model, train


@fault(Cause.OPTIMIZER_HOLDS_STALE_PARAMETERS, Cause.PARAMETER_IN_NO_OPTIMIZER)
def optimizer_of_another_copy():
    model = mlp()
    optimizer = adam(copy.deepcopy(model))
    return model, lambda: plain(model, optimizer)


@fault(Cause.OPTIMIZER_RECREATED, within=3)
def optimizer_made_at_every_step():
    model = mlp()

    def train():
        for x, y in some():
            optimizer = adam(model)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return model, train


@fault(Cause.OPTIMIZER_RECREATED)
def optimizer_made_every_epoch():
    model = mlp()

    def train():
        for _ in range(5):
            optimizer = sgd(model, momentum=0.9)
            plain(model, optimizer, 4)

    return model, train


# Gradients that do not come


class Cut(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.how = nn.Linear(6, 12), nn.Linear(12, 3), how

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                hidden = self.body(x)
        else:
            hidden = self.body(x)
            hidden = hidden.detach() if self.how == "detach" else hidden
        return self.head(hidden.relu())


@fault(Cause.GRAPH_CUT, within=3)
def detached():
    model = Cut("detach")
    optimizer = adam(model)
    return model, lambda: plain(model, optimizer)


@fault(Cause.GRAPH_CUT, within=3)
def body_under_no_grad():
    model = Cut("no_grad")
    optimizer = adam(model)
    return model, lambda: plain(model, optimizer)


@fault(Cause.GRAPH_CUT, within=3)
def loss_wrapped_again():
    model = mlp()
    optimizer = adam(model)

    def train():
        for x, y in some():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            torch.tensor(loss.item(), requires_grad=True).backward()
            optimizer.step()

    return model, train


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.extra, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.body(x).relu())


@fault(Cause.MODULE_UNUSED)
def a_module_is_never_called():
    model = Unused()
    optimizer = adam(model)
    return model, lambda: plain(model, optimizer, 12)


@fault(Cause.PARAMETER_FROZEN, within=3)
def middle_layer_frozen():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 12), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Linear(12, 12), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(12, 3))
    model[4].requires_grad_(False)
    optimizer = adam(model)
    return model, lambda: plain(model, optimizer)


@fault(Cause.PARAMETER_FROZEN)
def frozen_while_training():
    model = mlp()
    optimizer = adam(model)

    def train():
        plain(model, optimizer, 5)
        model[0].requires_grad_(False)
        plain(model, optimizer, 10)

    return model, train


# Weights that do not move


@fault(Cause.LEARNING_RATE_ZERO, within=3)
def a_group_without_learning_rate():
    model = mlp()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": list(model.parameters())[2:]}], 0.05
    )
    return model, lambda: plain(model, optimizer)


@fault(Cause.LEARNING_RATE_ZERO, within=3)
def no_learning_rate():
    model = mlp()
    optimizer = adam(model, 0.0)
    return model, lambda: plain(model, optimizer)


def half(model, optimizer):
    for x, y in some():
        optimizer.zero_grad()
        F.cross_entropy(model(x.bfloat16()).float(), y).backward()
        optimizer.step()


@fault(Cause.UPDATES_ROUND_TO_NOTHING, within=3)
def updates_round_to_nothing():
    model = mlp().to(torch.bfloat16)
    optimizer = sgd(model, 1e-7)
    return model, lambda: half(model, optimizer)


@fault(Cause.UPDATES_ROUND_TO_NOTHING, within=3)
def updates_round_to_nothing_until_the_schedule_ends():
    model = mlp().to(torch.bfloat16)
    optimizer = sgd(model, 1e-7)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: max(0.0, 1 - s / 10))

    def train():
        for x, y in some(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x.bfloat16()).float(), y).backward()
            optimizer.step()
            schedule.step()

    return model, train


@fault(Cause.LEARNING_RATE_ZERO, within=3)
def a_group_without_learning_rate_under_a_schedule_to_zero():
    model = mlp()
    optimizer = torch.optim.SGD(
        [{"params": list(model.parameters())[2:]}, {"params": model[0].parameters(), "lr": 0.0}], 0.05
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: max(0.0, 1 - s / 10))

    def train():
        for x, y in some(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()

    return model, train


# Schedules


@fault(Cause.SCHEDULE_ENDED_EARLY)
def schedule_in_epochs_stepped_in_batches():
    model = mlp()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=5)

    def train():
        for x, y in some(20):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()

    return model, train


@fault(Cause.SCHEDULE_TOO_FAST)
def cosine_in_epochs_stepped_in_batches():
    model = mlp()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)

    def train():
        for x, y in some(20):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()

    return model, train


@fault(Cause.SCHEDULE_TOO_FAST, within=4)
def scheduler_stepped_twice():
    model = mlp()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)

    def train():
        for x, y in some(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
            scheduler.step()

    return model, train


@fault(Cause.SCHEDULER_NEVER_STEPPED)
def scheduler_never_stepped():
    model = mlp()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def train():
        plain(model, optimizer, 24)
        assert scheduler is not None

    return model, train


@fault(Cause.SCHEDULER_OF_ANOTHER_OPTIMIZER, within=4)
def scheduler_of_a_stale_optimizer():
    model = mlp()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(adam(model), 0.9)
    optimizer = adam(model)

    def train():
        for x, y in some(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()

    return model, train


@fault(Cause.SCHEDULER_BEFORE_OPTIMIZER, within=4)
def scheduler_before_the_optimizer():
    model = mlp()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def train():
        for x, y in some(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            scheduler.step()
            optimizer.step()

    return model, train


# Modes


@fault(Cause.TRAINING_IN_EVAL_MODE, within=3)
def eval_mode_from_the_start():
    model = noisy().eval()
    optimizer = adam(model)
    return model, lambda: plain(model, optimizer)


def evaluate(model, restore=True, mode=True):
    if mode:
        model.eval()
    with torch.no_grad():
        for x, y in batches(shuffle=False):
            F.cross_entropy(model(x), y)
    if restore and mode:
        model.train()


@fault(Cause.TRAINING_IN_EVAL_MODE)
def eval_mode_left_by_an_evaluation():
    model = noisy()
    optimizer = adam(model)

    def train():
        plain(model, optimizer, 4)
        evaluate(model, restore=False)
        plain(model, optimizer, 4)

    return model, train


@fault(Cause.TRAINING_IN_EVAL_MODE)
def a_part_left_in_eval_mode():
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": noisy(), "head": nn.Linear(3, 3)})
    model = Chain(model["body"], model["head"])
    optimizer = adam(model)

    def train():
        plain(model, optimizer, 4)
        evaluate(model, restore=False)
        model.training = True
        plain(model, optimizer, 4)

    return model, train


class Chain(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


@fault(Cause.EVALUATION_IN_TRAIN_MODE)
def evaluated_in_train_mode():
    model = noisy()
    optimizer = adam(model)

    def train():
        for _ in range(2):
            plain(model, optimizer, 4)
            evaluate(model, mode=False)

    return model, train


# Batches


@fault(Cause.BATCH_REPEATED, within=4)
def the_first_batch_again_and_again():
    model = mlp()
    optimizer = adam(model)
    loader = batches(shuffle=False)

    def train():
        for _ in range(8):
            x, y = next(iter(loader))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return model, train


@fault(Cause.BATCH_REPEATED, within=4)
def the_wrong_variable():
    model = mlp()
    optimizer = adam(model)
    x, y = next(iter(batches()))

    def train():
        for _x, _y in batches(size=8):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return model, train


@fault(Cause.EPOCHS_NOT_RESHUFFLED)
def seeded_in_every_epoch():
    model = mlp()
    optimizer = adam(model)
    loader = DataLoader(TensorDataset(*data()), 16, shuffle=True)

    def train():
        for _ in range(3):
            torch.manual_seed(0)
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

    return model, train


# Loss


@fault(Cause.GRAPH_CUT, within=3)
def rounded_before_the_loss():
    model = nn.Sequential(mlp(classes=1), nn.Sigmoid())

    def loss(out, y):
        return F.mse_loss(out.round().squeeze(1), (y > 0).float())

    return model, lambda: plain(model, sgd(model), loss=loss)


@healthy
def rounded_with_the_gradient_passed_straight_through():
    model = nn.Sequential(mlp(classes=1), nn.Sigmoid())

    def loss(out, y):
        return F.mse_loss((out + (out.round() - out).detach()).squeeze(1), (y > 0).float())

    return model, lambda: plain(model, sgd(model), loss=loss)


@fault(Cause.DOUBLE_SOFTMAX, within=3)
def softmax_before_cross_entropy():
    model = nn.Sequential(mlp(), nn.Softmax(dim=1))
    optimizer = adam(model)
    return model, lambda: plain(model, optimizer)


@fault(Cause.DOUBLE_SIGMOID, within=3)
def sigmoid_before_bce_with_logits():
    model = nn.Sequential(mlp(classes=1), nn.Sigmoid())
    optimizer = adam(model)

    def loss(out, y):
        return F.binary_cross_entropy_with_logits(out.squeeze(1), (y > 0).float())

    return model, lambda: plain(model, optimizer, loss=loss)


@fault(Cause.LOGITS_INTO_PROBABILITY_LOSS, within=4)
def logits_into_nll():
    model = mlp()
    optimizer = sgd(model)
    return model, lambda: plain(model, optimizer, loss=F.nll_loss)


@fault(Cause.LOGITS_INTO_PROBABILITY_LOSS, within=4)
def probabilities_into_nll():
    model = nn.Sequential(mlp(), nn.Softmax(dim=1))
    optimizer = sgd(model)
    return model, lambda: plain(model, optimizer, loss=nn.NLLLoss())


@fault(Cause.WRONG_CLASS_AXIS, within=3)
def softmax_over_the_batch():
    model = nn.Sequential(mlp(), nn.LogSoftmax(dim=0))
    optimizer = adam(model)
    return model, lambda: plain(model, optimizer, loss=F.nll_loss)


@fault(Cause.TARGETS_BROADCAST, within=3)
def column_against_row():
    model = mlp(classes=1)
    optimizer = adam(model)
    return model, lambda: plain(model, optimizer, loss=lambda out, y: F.mse_loss(out, y.float()))


@fault(Cause.TARGETS_BROADCAST, within=3)
def column_against_row_by_hand():
    model = mlp(classes=1)
    optimizer = adam(model)
    return model, lambda: plain(model, optimizer, loss=lambda out, y: ((out - y.float()) ** 2).mean())


@fault(Cause.TARGETS_BROADCAST, within=3)
def row_against_column_by_hand():
    model = mlp(classes=1)
    optimizer = adam(model)

    def loss(out, y):
        return (out.squeeze(1) - y.float().unsqueeze(1)).abs().mean()

    return model, lambda: plain(model, optimizer, loss=loss)


@fault(Cause.TARGETS_CAST, within=3)
def fractions_cut():
    model = mlp(classes=1)
    optimizer = adam(model)
    x = torch.randn(64, 6)
    loader = DataLoader(TensorDataset(x, 2 * torch.rand(64)), 16, shuffle=True)

    def train():
        for a, y in itertools.islice(endless(loader), 8):
            optimizer.zero_grad()
            F.mse_loss(model(a).squeeze(1), y.long().float()).backward()
            optimizer.step()

    return model, train


@fault(Cause.TARGETS_CAST, within=3)
def fractions_made_classes():
    model = mlp(classes=2)
    optimizer = adam(model)
    x = torch.randn(64, 6)
    loader = DataLoader(TensorDataset(x, 2 * torch.rand(64)), 16, shuffle=True)

    def train():
        for a, y in itertools.islice(endless(loader), 8):
            optimizer.zero_grad()
            F.cross_entropy(model(a), y.long()).backward()
            optimizer.step()

    return model, train


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 8, padding_idx=0)
        self.head = nn.Linear(8, 9)

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def words(ignore):
    model = Words()
    optimizer = adam(model)
    tokens = torch.randint(1, 9, (32, 10), generator=torch.Generator().manual_seed(1))
    tokens[:, 6:] = 0

    def train():
        for i in range(8):
            part = tokens[4 * i : 4 * i + 4]
            optimizer.zero_grad()
            out = model(part[:, :-1])
            F.cross_entropy(out.flatten(0, 1), part[:, 1:].flatten(), **ignore).backward()
            optimizer.step()

    return model, train


@fault(Cause.IGNORED_LABELS_COUNTED, within=3)
def padding_counts():
    return words({})


# Accumulation


@fault(Cause.ACCUMULATION_NOT_DIVIDED)
def accumulated_without_dividing():
    model = mlp()
    optimizer = sgd(model)

    def train():
        for i, (x, y) in enumerate(some(24)):
            F.cross_entropy(model(x), y).backward()
            if i % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()

    return model, train


@fault(Cause.ACCUMULATION_LOST, within=4)
def zeroed_at_every_micro_batch():
    model = mlp()
    optimizer = sgd(model)

    def train():
        for i, (x, y) in enumerate(some(24)):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) / 4).backward()
            if i % 4 == 3:
                optimizer.step()

    return model, train


# Mixed precision


def scaled(step, clip=False, autocast=True, unscale=False):
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def train():
        for x, y in some():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(x).float(), y)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer) if step else optimizer.step()
            scaler.update() if step else None

    return model, train


@fault(Cause.GRADIENTS_STILL_SCALED, within=3)
def the_scaler_is_bypassed():
    return scaled(step=False)


@fault(Cause.CLIPPING_BEFORE_UNSCALING, within=3)
def clipped_before_unscaling():
    return scaled(step=True, clip=True)


@fault(Cause.AUTOCAST_OFF, within=4)
def autocast_is_off():
    return scaled(step=True, autocast=False)


@fault(Cause.SCALER_SKIPS_FOREVER)
def the_scaler_skips_for_ever():
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu")

    def train():
        for x, y in some(24):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x).float(), y)
            loss = loss + 0 * model[0].weight.flatten()[0].sub(model[0].weight.flatten()[0]).sqrt()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return model, train


# Clipping


@fault(Cause.CLIPPING_BEFORE_BACKWARD, within=4)
def clipped_after_the_step():
    model = mlp()
    optimizer = sgd(model)

    def train():
        for x, y in some():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    return model, train


@fault(Cause.CLIPPING_BEFORE_BACKWARD, within=4)
def clipped_before_backward():
    model = mlp()
    optimizer = sgd(model)

    def train():
        for x, y in some():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            loss.backward()
            optimizer.step()

    return model, train


@fault(Cause.CLIPPING_BEFORE_BACKWARD, within=4)
def clipped_by_a_spent_generator():
    model = mlp()
    parameters = (p for p in model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.05)

    def train():
        for x, y in some():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(parameters, 0.1)
            optimizer.step()

    return model, train


# Weights from outside


@fault(Cause.AVERAGED_WEIGHTS_LEFT)
def averaged_weights_left_in_place():
    model = noisy()
    optimizer = adam(model)
    average = copy.deepcopy(model.state_dict())

    def train():
        for _ in range(2):
            for x, y in some(5):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                for name, p in model.named_parameters():
                    average[name].lerp_(p.detach(), 0.1)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(average[name])
            evaluate(model)

    return model, train


def changed_after_each_step(change):
    """`change(model, state)` after each step; `state` holds copies of the first weights."""
    model = mlp()
    optimizer = adam(model)
    state = copy.deepcopy(model.state_dict())

    def train():
        for x, y in some(40):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    change(p, state[name])

    return model, train


@fault(Cause.WEIGHTS_CHANGED_OUTSIDE)
def average_copied_into_the_model_that_trains():
    return changed_after_each_step(lambda p, average: p.copy_(average.lerp_(p, 0.02)))


@fault(Cause.WEIGHTS_CHANGED_OUTSIDE)
def last_weights_mixed_in():
    return changed_after_each_step(lambda p, last: last.copy_(p.lerp_(last, 0.95)))


@healthy
def a_step_that_is_halved():
    return changed_after_each_step(lambda p, last: last.copy_(p.lerp_(last, 0.5)))


@healthy
def pruned_weights_masked():
    return changed_after_each_step(lambda p, first: p.mul_(first.abs() > 0.3))


@healthy
def rows_restored():
    return changed_after_each_step(lambda p, first: p[1:].copy_(first[1:]))


@fault(Cause.PARAMETER_FROZEN)
def optimizer_of_frozen_parameters():
    model = Gan()
    model.generator.requires_grad_(False)
    g, d = adam(model.generator), adam(model.critic)

    def train():
        for x, _ in some(20):
            d.zero_grad()
            (model.critic(model.generator(torch.randn(len(x), 4))).mean() - model.critic(x).mean()).backward()
            d.step()
            g.zero_grad()
            (-model(torch.randn(len(x), 4)).mean()).backward()
            g.step()

    return model, train


@healthy
def optimizer_of_parameters_thawed_soon():
    model = mlp()
    body, head = torch.optim.SGD(model[:2].parameters(), 1e-2), torch.optim.SGD(model[2:].parameters(), 1e-2)
    model[:2].requires_grad_(False)

    def train():
        for i, (x, y) in enumerate(some(20)):
            if i == 3:
                model[:2].requires_grad_(True)
            for o in (body, head):
                o.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for o in (body, head):
                o.step()

    return model, train


@fault(Cause.WEIGHTS_CHANGED_OUTSIDE)
def reloaded_every_epoch():
    model = mlp()
    optimizer = adam(model)
    start = copy.deepcopy(model.state_dict())

    def train():
        for _ in range(3):
            model.load_state_dict(start)
            plain(model, optimizer, 5)

    return model, train


@fault(Cause.WEIGHTS_CHANGED_OUTSIDE)
def initialised_again_through_data():
    model = mlp()
    optimizer = adam(model)

    def train():
        for _ in range(3):
            plain(model, optimizer, 5)
            for p in model.parameters():
                p.data.uniform_(-0.3, 0.3)

    return model, train


# Layers


@fault(Cause.LAYERS_SHARED, within=3)
def one_layer_many_times():
    torch.manual_seed(0)
    model = Chain(nn.Linear(6, 12), nn.Sequential(*[nn.Linear(12, 12)] * 3), nn.Linear(12, 3))
    optimizer = adam(model)
    return model, lambda: plain(model, optimizer)


class Tied(nn.Module):
    def __init__(self, tie):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.embedding.weight if tie else nn.Parameter(self.embedding.weight.detach().clone())

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def tied(tie):
    model = Tied(tie)
    optimizer = adam(model)

    def train():
        for i in range(8):
            tokens = torch.randint(9, (4, 10), generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()

    return model, train


@fault(Cause.LAYERS_UNTIED, within=3)
def tied_by_a_copy():
    return tied(False)


class Parallel(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.first(x) + self.second(x)


@fault(Cause.LAYERS_START_EQUAL)
def two_branches_that_are_copies():
    branch = mlp()
    model = Parallel(branch, copy.deepcopy(branch))
    optimizer = adam(model)
    return model, lambda: plain(model, optimizer, 12)


# Healthy twins


@healthy
def plain_adam():
    model = noisy()
    optimizer = adam(model)

    def train():
        for _ in range(3):
            plain(model, optimizer, 5)
            evaluate(model)

    return model, train


@healthy
def schedules_one_after_the_other():
    model = mlp()
    optimizer = adam(model)
    up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 4)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 21)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], milestones=[4])

    def train():
        for x, y in some(24):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()

    return model, train


@healthy
def zeroed_through_the_data():
    model = mlp()
    optimizer = adam(model)

    def train():
        for x, y in some():
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.data.zero_()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return model, train


@healthy
def zeroed_after_the_call():
    model = mlp()
    optimizer = adam(model)

    def train():
        for x, y in some():
            loss = F.cross_entropy(model(x), y)
            model.zero_grad(set_to_none=False)
            loss.backward()
            optimizer.step()

    return model, train


@healthy
def accumulated():
    model = mlp()
    optimizer = adam(model)

    def train():
        for i, (x, y) in enumerate(some(24)):
            (F.cross_entropy(model(x), y) / 4).backward()
            if i % 4 == 3:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    return model, train


@healthy
def frozen_body():
    model = noisy()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)

    def train():
        model[1].eval()
        plain(model, optimizer)

    return model, train


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 6))
        self.critic = nn.Sequential(nn.Linear(6, 12), nn.LeakyReLU(), nn.Dropout(0.1), nn.Linear(12, 1))

    def forward(self, noise):
        return self.critic(self.generator(noise))


def gan(detach, times=1):
    model = Gan()
    g, d = adam(model.generator), adam(model.critic)

    def train():
        for i, (x, _) in enumerate(some(24)):
            d.zero_grad()
            ones, zeros = torch.ones(len(x), 1), torch.zeros(len(x), 1)
            F.binary_cross_entropy_with_logits(model.critic(x), ones).backward()
            fake = model.generator(torch.randn(len(x), 4))
            fake = fake.detach() if detach else fake
            F.binary_cross_entropy_with_logits(model.critic(fake), zeros).backward()
            d.step()
            if i % times == 0:
                g.zero_grad()
                F.binary_cross_entropy_with_logits(model(torch.randn(len(x), 4)), ones).backward()
                g.step()

    return model, train


@healthy
def gan_detached():
    return gan(True)


@healthy
def gan_with_five_critic_steps():
    return gan(False, 5)


@healthy
def gan_critic_watched_alone():
    whole, train = gan(False)
    return whole.critic, train


@healthy
def gan_generator_watched_alone():
    whole, train = gan(True)
    return whole.generator, train


@healthy
def wasserstein_with_clamped_weights():
    model = Gan()
    g, d = adam(model.generator), torch.optim.RMSprop(model.critic.parameters(), 1e-3)

    def train():
        for i, (x, _) in enumerate(some(20)):
            d.zero_grad()
            with torch.no_grad():
                fake = model.generator(torch.randn(len(x), 4))
            (model.critic(fake).mean() - model.critic(x).mean()).backward()
            d.step()
            for p in model.critic.parameters():
                p.data.clamp_(-0.1, 0.1)
            if i % 3 == 0:
                g.zero_grad()
                (-model(torch.randn(len(x), 4)).mean()).backward()
                g.step()

    return model.critic, train


@healthy
def gradient_penalty():
    model = mlp(classes=1)
    optimizer = adam(model)

    def train():
        for x, y in some():
            x = x.requires_grad_()
            out = model(x).squeeze(1)
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            optimizer.zero_grad()
            (F.mse_loss(out, y.float()) + slope.square().sum(1).mean()).backward()
            optimizer.step()

    return model, train


@healthy
def lbfgs():
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

    def train():
        for x, y in some(6):

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)

    return model, train


@healthy
def optimizer_in_backward():
    model = mlp()
    optimizers = {p: torch.optim.SGD([p], 0.05, momentum=0.9) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)

    def train():
        for x, y in some():
            F.cross_entropy(model(x), y).backward()

    return model, train


@healthy
def averaged_weights_put_back():
    model = noisy()
    optimizer = adam(model)
    average = copy.deepcopy(model.state_dict())

    def train():
        for _ in range(3):
            for x, y in some(4):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                for name, p in model.named_parameters():
                    average[name].lerp_(p.detach(), 0.1)
            kept = copy.deepcopy(model.state_dict())
            model.load_state_dict(average)
            evaluate(model)
            model.load_state_dict(kept)

    return model, train


@healthy
def averaged_model():
    model = noisy()
    optimizer = adam(model)
    average = torch.optim.swa_utils.AveragedModel(model)

    def train():
        for _ in range(3):
            for x, y in some(4):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                average.update_parameters(model)
            evaluate(average)

    return model, train


@healthy
def tied_weights():
    return tied(True)


@healthy
def padding_ignored():
    return words({"ignore_index": 0})


@healthy
def classes_of_padded_texts():
    """Label 0 is a class: targets are no tokens, although the embedding pads with 0."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(9, 8, padding_idx=0), nn.Linear(8, 3)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), head)
    optimizer = adam(model)
    tokens = torch.randint(1, 9, (64, 6), generator=torch.Generator().manual_seed(1))
    labels = tokens[:, 0] % 3
    tokens[::2, 4:] = 0

    def train():
        for i in range(0, 64, 8):
            optimizer.zero_grad()
            F.cross_entropy(model(tokens[i : i + 8]), labels[i : i + 8]).backward()
            optimizer.step()

    return model, train


@healthy
def full_batch():
    model = mlp()
    optimizer = sgd(model)
    x, y = data()

    def train():
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                F.cross_entropy(model(x), y)

    return model, train


@healthy
def full_batch_from_a_loader():
    model = mlp()
    optimizer = sgd(model)
    loader = DataLoader(TensorDataset(*data()), 64)

    def train():
        for _ in range(10):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

    return model, train


@healthy
def teacher_and_student():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = mlp()
            self.teacher = copy.deepcopy(self.student)

        def forward(self, x):
            with torch.no_grad():
                target = self.teacher(x)
            return self.student(x + 0.1 * torch.randn_like(x)), target

    model = Both()
    optimizer = adam(model)

    def train():
        for x, _ in some(14):
            optimizer.zero_grad()
            F.mse_loss(*model(x)).backward()
            optimizer.step()
            with torch.no_grad():
                for p, q in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                    p.lerp_(q, 0.05)

    return model, train


@healthy
def acting_and_learning():
    model = mlp(classes=2)
    optimizer = adam(model)

    def train():
        for x, _ in some(12):
            with torch.no_grad():
                actions = [torch.distributions.Categorical(logits=model(row)).sample() for row in x]
            optimizer.zero_grad()
            chosen = torch.distributions.Categorical(logits=model(x)).log_prob(torch.stack(actions))
            (-chosen * x[:, 0]).mean().backward()
            optimizer.step()

    return model, train


@healthy
def scaler_used_right():
    return scaled(step=True, clip=True, unscale=True)


@healthy
def scheduled_by_epochs_and_steps():
    model = mlp()
    optimizer = adam(model)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 4, 1.0))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)

    def train():
        for _ in range(5):
            for x, y in batches():
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                warmup.step()
            plateau.step(1.0)

    return model, train


@healthy
def one_cycle_to_its_end():
    model = mlp()
    optimizer = sgd(model, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)

    def train():
        for x, y in some(20):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()

    return model, train


@healthy
def adversarial_training():
    model = mlp()
    optimizer = adam(model)

    def train():
        for x, y in some():
            x = x.clone().requires_grad_()
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            attacked = (x + 0.1 * x.grad.sign()).detach()
            optimizer.zero_grad()
            F.cross_entropy(model(attacked), y).backward()
            optimizer.step()

    return model, train


@healthy
def sharpness_aware():
    model = mlp()
    optimizer = sgd(model)

    def train():
        for x, y in some():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            moves = [0.05 * p.grad / (p.grad.norm() + 1e-9) for p in model.parameters()]
            with torch.no_grad():
                for p, move in zip(model.parameters(), moves, strict=True):
                    p.add_(move)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                for p, move in zip(model.parameters(), moves, strict=True):
                    p.sub_(move)
            optimizer.step()

    return model, train


@healthy
def log_softmax_and_nll():
    model = nn.Sequential(mlp(), nn.LogSoftmax(dim=1))
    optimizer = adam(model)
    return model, lambda: plain(model, optimizer, loss=F.nll_loss)


@healthy
def transformer_layers_that_start_as_copies():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
    model = Chain(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(6, 3))
    optimizer = adam(model)
    return model, lambda: plain(model, optimizer, 12)


@healthy
def two_phases():
    model = mlp()

    def train():
        plain(model, adam(model), 6)
        plain(model, sgd(model), 6)

    return model, train


@healthy
def actor_and_critic_with_a_shared_body():
    model = nn.ModuleDict({"body": nn.Linear(6, 12), "actor": nn.Linear(12, 3), "critic": nn.Linear(12, 1)})

    class Agent(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            hidden = model["body"](x).relu()
            return model["actor"](hidden), model["critic"](hidden)

    agent = Agent()
    actor = torch.optim.Adam([*model["body"].parameters(), *model["actor"].parameters()], 1e-2)
    critic = torch.optim.Adam([*model["body"].parameters(), *model["critic"].parameters()], 1e-2)

    def train():
        for x, y in some(10):
            critic.zero_grad()
            F.mse_loss(agent(x)[1].squeeze(1), y.float()).backward()
            critic.step()
            actor.zero_grad()
            F.cross_entropy(agent(x)[0], y).backward()
            actor.step()

    return agent, train


# Partial zeroing, unknown parameters, signs, sums, seeds, held-out data


@fault(Cause.GRADIENTS_NOT_ZEROED, within=4)
def only_the_last_layer_zeroed():
    model = mlp()
    optimizer = adam(model)

    def train():
        for x, y in some():
            model[-1].zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return model, train


class InAList(nn.Module):
    """Keeps its hidden layers where nn.Module does not look."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = [nn.Linear(6, 6), nn.Linear(6, 6)]
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.head(x)


@fault(Cause.PARAMETER_IN_NO_OPTIMIZER, within=4)
def layers_in_a_plain_list():
    model = InAList()
    optimizer = adam(model)
    return model, lambda: plain(model, optimizer)


@fault(Cause.LOSS_ASCENDED, within=3)
def the_sign_is_wrong():
    model = mlp()
    optimizer = adam(model)
    return model, lambda: plain(model, optimizer, loss=lambda z, y: -F.cross_entropy(z, y))


@fault(Cause.LOSS_SUMMED, within=3)
def a_sum_at_the_rate_of_a_mean():
    model = mlp()
    optimizer = sgd(model)
    return model, lambda: plain(model, optimizer, loss=lambda z, y: F.cross_entropy(z, y, reduction="sum"))


@healthy
def a_sum_at_its_own_rate():
    model = mlp()
    optimizer = sgd(model, 0.002)
    return model, lambda: plain(model, optimizer, loss=lambda z, y: F.cross_entropy(z, y, reduction="sum"))


@fault(Cause.AUGMENTATION_REPEATED, within=8)
def seeded_at_every_step():
    model = noisy()
    optimizer = adam(model)

    def train():
        for x, y in some():
            torch.manual_seed(3)
            optimizer.zero_grad()
            F.cross_entropy(model(x + 0.1 * torch.randn_like(x)), y).backward()
            optimizer.step()

    return model, train


def evaluated_on(model, noise, loss=F.cross_entropy):
    """Train epoch by epoch, and look at held-out rows to which `noise` is added."""
    optimizer, held_out = adam(model), DataLoader(TensorDataset(*data(48, seed=1)), 16)

    def train():
        for _ in range(4):
            model.train()
            for x, y in batches():
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                for x, _ in held_out:
                    model(x + noise * torch.randn_like(x))

    return model, train


@fault(Cause.AUGMENTATION_IN_EVALUATION)
def held_out_rows_augmented():
    return evaluated_on(mlp(), 0.1)


@healthy
def held_out_rows_as_they_are():
    return evaluated_on(mlp(), 0.0)


@healthy
def views_of_self_supervision():
    """The labels of the loader are in no loss, and each row is seen through random views."""
    return evaluated_on(mlp(classes=16), 0.1, lambda z, y: F.cross_entropy(z @ z.T, torch.arange(len(z)).roll(1)))


class AlwaysDropping(nn.Module):
    """Calls dropout without regard to the mode."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(F.dropout(x, 0.2))


@fault(Cause.DROPOUT_ALWAYS_ON)
def dropout_in_every_mode():
    return evaluated_on(AlwaysDropping(), 0.0)


@healthy
def one_batch_an_epoch_and_a_schedule_of_a_few():
    """An epoch of one batch, or a loader begun again at each step, is no epoch that a scheduler could wait for."""
    model = mlp()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data(256)), batch_size=64, shuffle=True)

    def train():
        for step in range(24):
            x, y = next(iter(loader))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step % 4 == 3:
                scheduler.step()

    return model, train
