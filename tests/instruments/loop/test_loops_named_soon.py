"""What one look settles is told at the step after it could first be known, and not where it may be meant."""

import importlib.util
import itertools
import logging
import math
import random
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import diag
from diag.instruments.causes import Cause
from diag.instruments.loop.batches_repeated import beyond_chance
from diag.registry import instruments

_spec = importlib.util.spec_from_file_location("faulty_loops", Path(__file__).with_name("faulty_loops.py"))
loops = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(loops)

CHECKS = [name for name, i in instruments().items() if "diag.instruments.loop." in i.function.__module__]
ROWS, SIZE = 192, 16
EPOCH = ROWS // SIZE


def told(model, train):
    """{cause: the step at which it was told first}"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with diag.watch(model, instruments=CHECKS) as watcher:
            train()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return {f.verdict.cause: f.first_step for f in reversed(watcher.findings)}


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("diag").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("diag").setLevel(logging.NOTSET)


def held_out(n=48, size=16, seed=1):
    return DataLoader(TensorDataset(*loops.data(n, seed=seed)), size)


def an_epoch(model, optimizer, loader, change=lambda x: x, after=lambda: None):
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(change(x)), y).backward()
        optimizer.step()
        after()


def evaluate(model, loader, change=lambda x: x, times=1, mode=False):
    """The share of right answers, worked out by the user's own arithmetic: no loss is called."""
    model.train(mode)
    with torch.no_grad():
        for x, _ in loader:
            x = change(x)
            for _ in range(times):
                model(x)
    model.train()


def epochs(model, number=3, rows=None, **evaluation):
    """Train, and evaluate on `rows` after each epoch."""
    rows, loader = rows or held_out(), loops.batches(SIZE, n=ROWS)

    def train():
        optimizer = loops.adam(model)
        for _ in range(number):
            an_epoch(model, optimizer, loader)
            evaluate(model, rows, **evaluation)

    return train


# Evaluations


@pytest.mark.parametrize("loader", [held_out(), held_out(16)])
def test_the_first_evaluation_in_train_mode_is_told_at_the_next_step(loader):
    model = loops.noisy()
    assert told(model, epochs(model, 2, loader, mode=True))[Cause.EVALUATION_IN_TRAIN_MODE] == EPOCH + 1


def test_dropout_that_is_left_on_to_sample_answers_is_not_told_by_one_evaluation():
    model = loops.noisy()
    train = epochs(model, 2, mode=True, times=5)
    assert told(model, train).get(Cause.EVALUATION_IN_TRAIN_MODE, 99) > EPOCH + 1


def test_pseudo_labels_for_each_step_are_no_evaluation():
    model, unlabelled = loops.noisy(), loops.endless(held_out(ROWS, SIZE))

    def train():
        optimizer = loops.adam(model)
        for x, y in loops.batches(n=ROWS):
            more = next(unlabelled)[0]
            with torch.no_grad():
                guess = model(more).argmax(1)
            optimizer.zero_grad()
            F.cross_entropy(model(torch.cat([x, more])), torch.cat([y, guess])).backward()
            optimizer.step()

    assert Cause.EVALUATION_IN_TRAIN_MODE not in told(model, train)


def test_statistics_taken_again_from_the_training_rows_are_no_evaluation():
    model = loops.noisy()

    def train():
        loader, optimizer = loops.batches(n=ROWS), loops.adam(model)
        an_epoch(model, optimizer, loader)
        with torch.no_grad():
            for x, _ in loader:
                model(x)
        an_epoch(model, optimizer, loader)

    assert Cause.EVALUATION_IN_TRAIN_MODE not in told(model, train)


@pytest.mark.parametrize(
    "draw", [torch.randn_like, lambda x: torch.from_numpy(numpy.random.randn(*x.shape)).float()]
)
def test_augmented_held_out_rows_are_told_after_the_second_evaluation(draw):
    model = loops.mlp()
    found = told(model, epochs(model, change=lambda x: x + 0.1 * draw(x)))
    assert found == {Cause.AUGMENTATION_IN_EVALUATION: 2 * EPOCH + 1}


class Noisy(torch.utils.data.Dataset):
    """Each row is drawn with noise, by Python's own generator."""

    def __init__(self):
        self.x, self.y = loops.data(48, seed=1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + random.gauss(0, 0.1), self.y[i]


def test_held_out_rows_that_their_data_set_augments_are_told():
    model = loops.mlp()
    found = told(model, epochs(model, rows=DataLoader(Noisy(), 16)))
    assert found == {Cause.AUGMENTATION_IN_EVALUATION: 2 * EPOCH + 1}


def test_what_a_trained_network_makes_of_held_out_rows_may_differ():
    body, head = nn.Linear(6, 6), loops.mlp()

    def train():
        rows, loader = held_out(), loops.batches(SIZE, n=ROWS)
        optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], 1e-2)
        for _ in range(4):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(head(body(x)), y).backward()
                optimizer.step()
            evaluate(head, rows, change=body)

    assert not told(head, train)


def test_two_sets_of_held_out_rows_with_the_same_labels_may_differ():
    model, (x, y) = loops.mlp(), loops.data(48, seed=1)
    clean, blurred = (DataLoader(TensorDataset(rows, y), 16) for rows in (x, 0.5 * x))

    def train():
        loader, optimizer = loops.batches(SIZE, n=ROWS), loops.adam(model)
        for epoch in range(6):
            an_epoch(model, optimizer, loader)
            evaluate(model, blurred if epoch % 2 else clean, change=lambda x: (torch.rand(1), x)[1])

    assert not told(model, train)


def test_dropout_that_ignores_the_mode_is_told_by_one_batch():
    model = loops.AlwaysDropping()
    found = told(model, epochs(model, 2, held_out(16)))
    assert found == {Cause.DROPOUT_ALWAYS_ON: EPOCH + 1}


# Epochs


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_order_that_comes_again_is_told_by_three_batches(shuffle):
    model = loops.mlp()

    def train():
        optimizer = loops.adam(model)
        for _ in range(2):
            torch.manual_seed(0)
            an_epoch(model, optimizer, loops.batches(SIZE, shuffle, ROWS))

    assert told(model, train) == {Cause.EPOCHS_NOT_RESHUFFLED: EPOCH + 3}


def test_few_batches_that_are_shuffled_as_wholes_may_come_in_one_order():
    model, batches = loops.mlp(), list(loops.batches(n=64))

    def train():
        optimizer, generator = loops.adam(model), torch.Generator().manual_seed(0)
        for _ in range(40):
            an_epoch(model, optimizer, [batches[i] for i in torch.randperm(4, generator=generator)])

    assert not told(model, train)


@pytest.mark.parametrize("batches", [4, 5, 8, 21, 22, 1000])
def test_a_shuffle_of_batches_gives_the_order_again_less_than_once_in_ten_thousand_epochs(batches):
    needed = beyond_chance(batches)
    whole, part = divmod(needed, batches)
    assert needed >= 3
    assert math.factorial(batches) ** whole * math.perm(batches, part) >= 10_000
    whole, part = divmod(needed - 1, batches)
    assert needed == 3 or math.factorial(batches) ** whole * math.perm(batches, part) < 10_000


@pytest.mark.parametrize("rate", [1e-2, 1e-3])
def test_an_optimizer_made_for_the_second_epoch_is_told_there(rate):
    """With another learning rate it is another phase."""
    model, loader = loops.mlp(), loops.batches(SIZE, n=ROWS)

    def train():
        for lr in (1e-2, rate):
            an_epoch(model, torch.optim.Adam(model.parameters(), lr), loader)

    assert told(model, train) == ({Cause.OPTIMIZER_RECREATED: EPOCH + 1} if rate == 1e-2 else {})


@pytest.mark.parametrize("rate", [1e-2, 1e-3])
def test_an_optimizer_made_for_the_second_epoch_without_the_warm_up_of_the_first_is_told_there(rate):
    """The warm-up's first rate is not the one that the first optimizer was made with."""
    model, loader = loops.mlp(), loops.batches(SIZE, n=ROWS)

    def train():
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 5, 1.0))
        an_epoch(model, optimizer, loader, after=warmup.step)
        an_epoch(model, torch.optim.Adam(model.parameters(), rate), loader)

    assert told(model, train).get(Cause.OPTIMIZER_RECREATED) == (EPOCH + 1 if rate == 1e-2 else None)


def test_a_second_optimizer_for_other_rows_is_not_told():
    model = loops.mlp()

    def train():
        for seed in (0, 1):
            rows = DataLoader(TensorDataset(*loops.data(ROWS, seed=seed)), SIZE, shuffle=True)
            optimizer = loops.adam(model)
            for _ in range(2):
                an_epoch(model, optimizer, rows)

    assert not told(model, train)


@pytest.mark.parametrize("kind", ["ExponentialLR", "StepLR"])
def test_a_schedule_for_epochs_that_is_stepped_in_batches_is_told_soon(kind):
    model = loops.mlp()
    optimizer = loops.adam(model)
    settings = {"ExponentialLR": {"gamma": 0.5}, "StepLR": {"step_size": 2, "gamma": 0.3}}[kind]
    scheduler = getattr(torch.optim.lr_scheduler, kind)(optimizer, **settings)
    found = told(model, lambda: an_epoch(model, optimizer, loops.batches(n=ROWS), after=scheduler.step))
    assert found == {Cause.SCHEDULE_TOO_FAST: 4}


@pytest.mark.parametrize("each", [1, EPOCH])
def test_a_slow_decay_and_one_that_is_stepped_in_epochs_are_not_told(each):
    model = loops.mlp()
    optimizer = loops.adam(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98 if each == 1 else 0.5)
    loader, count = loops.batches(SIZE, n=ROWS), itertools.count(1)

    def train():
        for _ in range(4):
            an_epoch(model, optimizer, loader, after=lambda: next(count) % each or scheduler.step())

    assert not told(model, train)


def with_milestones(milestones, epochs=1, rows=ROWS, each=1, rate=1e-3):
    """{cause: step} of a training whose MultiStepLR steps after each `each` batches."""
    model = loops.mlp()
    optimizer = torch.optim.Adam(model.parameters(), rate)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    loader, count = loops.batches(SIZE, n=rows), itertools.count(1)

    def train():
        for _ in range(epochs):
            an_epoch(model, optimizer, loader, after=lambda: next(count) % each or scheduler.step())

    return told(model, train)


@pytest.mark.parametrize("rate", [1e-3, 3e-3, 1e-2])
def test_milestones_in_epochs_that_are_passed_in_batches_are_told_soon(rate):
    assert with_milestones([2, 4], rate=rate) == {Cause.SCHEDULE_TOO_FAST: 4}


def test_later_milestones_are_told_when_they_are_long_past():
    """Training may have been meant to end soon after them until four times as many batches were trained; then the
    next look tells, that of step 100."""
    assert with_milestones([12, 24], rows=SIZE * 100) == {Cause.SCHEDULE_TOO_FAST: 100}


@pytest.mark.parametrize(
    ("milestones", "epochs", "rows", "each"),
    [
        ([4, 8], 4, ROWS, EPOCH),  # stepped each epoch
        ([8, 11], 1, ROWS, 1),  # late in the only epoch
        ([24, 36], 4, ROWS, 1),  # counted in batches
        ([4], 4, ROWS, 1),  # a tenth is left
        ([26, 48], 1, SIZE * 100, 1),  # in the first half of one epoch, of which little comes after
    ],
)
def test_milestones_that_may_be_meant_are_not_told(milestones, epochs, rows, each):
    assert not with_milestones(milestones, epochs, rows, each)


def test_a_rate_of_zero_is_told_at_its_third_step():
    model = loops.mlp()
    optimizer = loops.adam(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 40))
    loader = loops.batches(SIZE, n=ROWS)

    def train():
        for _ in range(4):
            an_epoch(model, optimizer, loader, after=scheduler.step)

    assert told(model, train)[Cause.SCHEDULE_ENDED_EARLY] == 43


def test_a_warm_up_from_zero_that_never_begins_has_a_rate_of_zero():
    model = loops.mlp()
    optimizer = loops.adam(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 40))
    loader = loops.batches(SIZE, n=ROWS)

    def train():
        for _ in range(4):
            an_epoch(model, optimizer, loader)

    assert Cause.LEARNING_RATE_ZERO in told(model, train)


# Modules that are not called


class Parts(nn.Module):
    """`extra` is called in the ways that `how` says."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.extra, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.how, self.calls = how, 0
        if how == "list":
            self.used = [self.body, self.extra, self.head]

    def forward(self, x):
        self.calls += 1
        x = self.body(x).relu()
        return self.head(self.middle(x))

    def middle(self, x):
        return x


class Late(Parts):
    def middle(self, x):
        return self.extra(x) if self.calls > 6 else x


class ByName(Parts):
    def middle(self, x):
        return getattr(self, self.how)(x) if self.calls > 6 else x


def train_parts(model):
    return lambda: loops.plain(model, loops.adam(model), 9)


def test_a_module_that_no_method_names_is_told_at_the_third_step():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.extra, self.head = nn.Linear(6, 12), nn.Sequential(nn.Linear(12, 12)), nn.Linear(12, 3)

        def forward(self, x):
            return self.head(self.body(x).relu())

    model = Named()
    assert told(model, train_parts(model)) == {Cause.MODULE_UNUSED: 3}


@pytest.mark.parametrize("model", [Late(""), ByName("extra"), Parts("list")])
def test_a_module_that_may_be_called_later_is_not_told_soon(model):
    assert not told(model, train_parts(model))


def test_layers_that_are_left_out_by_chance_are_not_told():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(12))
            self.head, self.generator = nn.Linear(6, 3), torch.Generator().manual_seed(0)

        def forward(self, x):
            for layer in self.layers:
                if torch.rand((), generator=self.generator) < 0.5:
                    x = x + layer(x).relu()
            return self.head(x)

    model = Dropped()
    assert not told(model, lambda: loops.plain(model, loops.adam(model), 12))


# What an instrument computes itself is none of the loop's


def test_an_evaluation_without_a_loss_is_not_said_to_have_computed_one():
    model = loops.noisy()
    optimizer, loader, others = loops.adam(model), loops.batches(n=96), held_out()
    with diag.watch(model) as watcher:  # all checks: some compute losses of their own when the watch is closed
        for _ in range(3):
            model.train()
            an_epoch(model, optimizer, loader)
            with torch.no_grad():
                for x, y in others:
                    (model(x).argmax(1) == y).sum()
    told = [f.verdict for f in watcher.findings if f.verdict.cause == Cause.EVALUATION_IN_TRAIN_MODE]
    assert told and all("held-out rows were given to the model" in v.sentence for v in told)


def test_eval_mode_from_the_start_is_said_to_be_so_after_many_steps():
    """Not every step is looked at, so the steps counted are not the steps since."""
    model = loops.noisy().eval()
    optimizer = loops.adam(model)
    with diag.watch(model, instruments=["module_modes"]) as watcher:
        for _ in range(16):
            an_epoch(model, optimizer, loops.batches())
    ((_, result),) = watcher.run.series("module_modes")[-1:]
    assert "from step 1 on" in result.verdict().sentence
    assert "dropout" in result.verdict().sentence and "batch norm" in result.verdict().sentence


def test_what_eval_mode_does_is_said_of_what_is_in_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3)).eval()
    with diag.watch(model, instruments=["module_modes"]) as watcher:
        an_epoch(model, loops.adam(model), loops.batches())
    (finding,) = watcher.findings
    assert "dropout" in finding.verdict.sentence and "batch norm" not in finding.verdict.sentence


def test_adapters_that_are_never_used_are_the_cause_of_their_equal_zeros():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    model.adapters = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(2))
    nn.init.zeros_(model.adapters[0].weight)
    nn.init.zeros_(model.adapters[1].weight)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    optimizer = loops.adam(model)
    with diag.watch(model, instruments=["unit_copies", "gradients_reach"]) as watcher:
        for _ in range(4):
            an_epoch(model, optimizer, loops.batches())
    (story,) = watcher.run.stories()
    assert story.finding.instrument == "gradients_reach"


def test_batches_of_equal_rows_have_no_order():
    model = loops.mlp()
    x, y = loops.data()
    loader = DataLoader(TensorDataset(x[:1].expand_as(x).clone(), y), 16, shuffle=True)
    causes = told(model, lambda: [an_epoch(model, loops.adam(model), loader) for _ in range(6)])
    assert Cause.EPOCHS_NOT_RESHUFFLED not in causes


# A stream that several workers read


class Rows(torch.utils.data.IterableDataset):
    def __init__(self, part):
        self.part, self.rows = part, list(zip(*loops.data(96), strict=True))

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        yield from self.rows[info.id :: info.num_workers] if self.part else self.rows


@pytest.mark.parametrize(("part", "workers"), [(False, 2), (True, 2)])
def test_a_stream_that_every_worker_reads_as_a_whole_is_told(part, workers):
    model = loops.mlp()
    loader = DataLoader(Rows(part), 8, num_workers=workers)
    causes = told(model, lambda: an_epoch(model, loops.adam(model), loader))
    assert (causes.get(Cause.ROWS_DUPLICATED, 99) <= 12) == (not part)


def test_several_steps_on_each_batch_of_a_stream_are_the_loops_own():
    model, loader = loops.mlp(), DataLoader(Rows(True), 8, num_workers=2)
    optimizer = loops.adam(model)

    def train():
        for x, y in loader:
            for _ in range(2):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

    assert Cause.ROWS_DUPLICATED not in told(model, train)


# Padding of the inputs beside targets of other classes


class Tags(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 8, padding_idx=0)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def test_a_class_with_the_number_of_the_padding_is_a_class_where_the_loss_ignores_others():
    model = Tags()
    optimizer = loops.adam(model)
    tokens = torch.randint(1, 9, (32, 10), generator=torch.Generator().manual_seed(1))
    tokens[:, 6:] = 0
    tags = torch.where(tokens == 0, -100, tokens % 4)

    def train():
        for x, y in zip(tokens.split(4), tags.split(4), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            optimizer.step()

    assert Cause.IGNORED_LABELS_COUNTED not in told(model, train)


# A rate of which nothing is left by the time that somebody looks


def test_a_rate_that_rounds_to_nothing_is_not_said_to_have_come_down_to_zero():
    model = loops.noisy()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)

    def train():
        for _ in range(3):
            an_epoch(model, optimizer, loops.batches())
            schedule.step()  # the last comes after all steps, and leaves a rate of zero

    assert not {Cause.SCHEDULE_ENDED_EARLY, Cause.WEIGHTS_UNCHANGED} & set(told(model, train))


def test_weights_at_rest_at_the_end_of_a_convergence_are_no_finding():
    torch.manual_seed(0)
    x = torch.randn(60, 5)
    y = x[:, :3].argmax(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)

    def closure():
        optimizer.zero_grad()
        penalty = 1e-3 * sum(p.square().sum() for p in model.parameters())
        loss = F.cross_entropy(model(x), y) + penalty
        loss.backward()
        return loss

    assert not told(model, lambda: [optimizer.step(closure) for _ in range(60)])


def test_a_dict_of_parameters_is_used_by_the_module_that_holds_it():
    """Of three weights in a ParameterDict one is left out; nobody ever calls the dict."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner.p = nn.ParameterDict({n: nn.Parameter(torch.randn(3, 3)) for n in "abc"})
            self.inner.forward = lambda x: x @ self.inner.p["a"] @ self.inner.p["b"]

        def forward(self, x):
            return self.inner(x)

    model = Own()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with diag.watch(model, instruments=["gradients_reach"]) as watcher:
        for _ in range(40):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().mean().backward()
            optimizer.step()
    (found,) = watcher.run.findings()
    assert found.verdict.layers == ("inner.p.c",)
    assert found.verdict.sentence == (
        "Parameter inner.p.c gets no gradient, while other parameters of the same module do, so it has not changed "
        "in 40 steps."
    )
