"""Faults of a loop that show in what is called when: wrappers, schedules by epochs, resuming, evaluations."""

import itertools
import logging
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import diag
from diag.instruments.causes import Cause
from diag.snapshot.loop.facts import Loop
from diag.snapshot.loop.steps import WrapperFacts

WATCHED = [
    "gradient_accumulation", "gradients_reach", "learning_rate_schedule", "module_modes", "batches_repeated",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("diag").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("diag").setLevel(logging.NOTSET)


def data(n=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def net(dropout=0.0, depth=1):
    torch.manual_seed(0)
    inner = [layer for _ in range(depth) for layer in (nn.Linear(12, 12), nn.ReLU())]
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(dropout), *inner, nn.Linear(12, 3))


def loader(size=16, n=64):
    return DataLoader(TensorDataset(*data(n)), size, shuffle=True)


def causes(model, train, **given):
    """What a watched training is told: {cause: sentence}."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with diag.watch(model, instruments=WATCHED, **given) as watcher:
            train()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return {f.verdict.cause: f.verdict.sentence for f in watcher.findings}


def step(model, optimizer, x, y, loss=F.cross_entropy):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()


# A layer between two that train


@pytest.mark.parametrize(("frozen", "told"), [(3, True), (0, False), (5, False)])
def test_one_frozen_layer_of_three_is_told_where_it_stands_between_trained_ones(frozen, told):
    model = net()
    model[frozen].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)

    def train():
        for x, y in loader():
            step(model, optimizer, x, y)

    assert (Cause.PARAMETER_FROZEN in causes(model, train)) == told


def test_a_layer_is_followed_where_the_model_is_called_without_gradients_before_each_step():
    model = net()
    model.refine = nn.Linear(12, 12)
    model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train():
        for _ in range(8):
            for x, y in loader():
                with torch.no_grad():
                    model(x)
                step(model, optimizer, x, y)

    assert Cause.MODULE_UNUSED in causes(model, train)


# Accumulation of losses with several terms


def accumulated(divided):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def train():
        for _ in range(4):
            for i, (x, y) in enumerate(loader(8)):
                if i % 4 == 0:
                    optimizer.zero_grad()
                outputs = model(x)
                rows = F.cross_entropy(outputs, y, reduction="none") + 0.1 * outputs.square().sum(1)
                (rows.mean() / (4 if divided else 1)).backward()
                if i % 4 == 3:
                    optimizer.step()

    return model, train


def test_terms_that_are_summed_over_micro_batches_are_told_with_their_number():
    told = causes(*accumulated(divided=False))
    assert "gradients of 4 batches are summed" in told[Cause.ACCUMULATION_NOT_DIVIDED]


def test_terms_that_are_divided_are_not():
    assert not causes(*accumulated(divided=True))


# One call a whole evaluation


def full_batch(model, evaluate, before=False):
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train():
        for _ in range(12):
            if before:
                evaluate(model, x)
            step(model, optimizer, x, y)
            if not before:
                evaluate(model, x)

    return model, train


def asked_as_it_is(model, x):
    with torch.no_grad():
        model(x)


def asked_in_evaluation_mode(model, x):
    model.eval()
    asked_as_it_is(model, x)
    model.train()


def test_an_evaluation_on_the_training_inputs_with_dropout_on_is_told():
    assert Cause.EVALUATION_IN_TRAIN_MODE in causes(*full_batch(net(0.2), asked_as_it_is))


@pytest.mark.parametrize(
    ("dropout", "evaluate", "before"),
    [
        (0.2, asked_in_evaluation_mode, False),
        (0.0, asked_as_it_is, False),
        (0.2, lambda model, x: asked_as_it_is(model, torch.randn(64, 6)), False),  # an agent that acts
    ],
)
def test_other_single_calls_are_not(dropout, evaluate, before):
    assert not causes(*full_batch(net(dropout), evaluate, before))


def test_a_target_that_the_network_makes_itself_is_no_evaluation():
    model = net(0.2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train():
        for _ in range(3):
            for x, _ in loader():
                with torch.no_grad():
                    target = model(x).softmax(1)
                step(model, optimizer, x, target)

    assert not causes(model, train)


# Schedules


def scheduled(make, per_epoch, epochs=4):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = make(optimizer)

    def train():
        for _ in range(epochs):
            for x, y in loader(8):
                step(model, optimizer, x, y)
                if not per_epoch:
                    scheduler.step()
            if per_epoch:
                scheduler.step()

    return model, train


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.LinearLR(o, 0.01, 1.0, 20),
        lambda o: lr_scheduler.LambdaLR(o, lambda s: min(1.0, (s + 1) / 20)),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=32),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 32),
    ],
)
def test_a_schedule_in_steps_that_is_stepped_by_epochs_is_too_slow(make):
    told = causes(*scheduled(make, per_epoch=True))
    assert "stepped 4 times in 32 steps" in told[Cause.SCHEDULE_TOO_SLOW]
    assert not causes(*scheduled(make, per_epoch=False))


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, 3),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
        lambda o: lr_scheduler.StepLR(o, 1, 0.5),
        lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    ],
)
def test_a_schedule_in_epochs_is_not(make):
    assert not causes(*scheduled(make, per_epoch=True))


def resumed(folder, restore, make):
    """What is told of the second half of a training that keeps its schedule or begins it again."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = make(optimizer)

    def half():
        for x, y in itertools.islice(itertools.cycle(loader(8)), 10):
            step(model, optimizer, x, y)
            scheduler.step()

    causes(model, half, run=folder)
    kept = (optimizer.state_dict(), scheduler.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = make(optimizer)
    if restore:
        optimizer.load_state_dict(kept[0])
        scheduler.load_state_dict(kept[1])
    return causes(model, half, run=folder, resume=True)


def falling(optimizer):
    return lr_scheduler.ExponentialLR(optimizer, 0.9)


def test_a_schedule_that_begins_again_on_resuming_has_jumped(tmp_path):
    told = resumed(tmp_path, False, falling)
    assert "from 0.039 at step 10 back to 0.1" in told[Cause.SCHEDULE_JUMPED]  # 0.1 * 0.9 ** 9 = 0.0387


@pytest.mark.parametrize(
    ("restore", "make"), [(True, falling), (False, lambda o: lr_scheduler.ConstantLR(o, 1.0, 1))]
)
def test_one_that_goes_on_or_never_moved_has_not(tmp_path, restore, make):
    assert not resumed(tmp_path, restore, make)


# Data-parallel wrappers


def test_calls_past_the_wrapper_are_an_alarm():
    loop = Loop(step=5, calls=5, backwards=5, wrapper=WrapperFacts("DistributedDataParallel", 0, 4))
    verdict = diag.wrapper_called(loop=loop).verdict()
    assert (verdict.level, verdict.cause) == (diag.Level.ALARM, Cause.GRADIENTS_NOT_REDUCED)
    assert "5 calls in one of 4 processes" in verdict.sentence


def test_calls_of_the_wrapper_are_fine():
    loop = Loop(step=5, calls=5, backwards=5, wrapper=WrapperFacts("DistributedDataParallel", 5, 4))
    assert diag.wrapper_called(loop=loop).verdict().level == diag.Level.OK


@pytest.mark.parametrize("wrapper", [WrapperFacts("", 0, 4), WrapperFacts("DistributedDataParallel", 0, 1)])
def test_without_a_wrapper_or_in_one_process_there_is_nothing_to_judge(wrapper):
    loop = Loop(step=5, calls=5, backwards=5, wrapper=wrapper)
    assert diag.wrapper_called(loop=loop).verdict().level == diag.Level.NOT_APPLICABLE
