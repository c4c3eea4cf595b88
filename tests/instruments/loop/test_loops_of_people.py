"""Mistakes as people make them in their training loops, each beside a sound loop that looks like it."""

import importlib.util
import logging
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import diag
from diag.instruments.causes import Cause
from diag.registry import instruments

_spec = importlib.util.spec_from_file_location("faulty_loops", Path(__file__).with_name("faulty_loops.py"))
loops = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(loops)

CHECKS = [name for name, i in instruments().items() if "diag.instruments.loop." in i.function.__module__]
PAIRS = {}


def pair(*causes):
    """A loop that is wrong where it is given True, and what it must be called then."""

    def keep(function):
        PAIRS[function.__name__] = (function, set(causes))
        return function

    return keep


def told(model, train):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with diag.watch(model, instruments=CHECKS) as watcher:
            train()
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return {f.verdict.cause for f in watcher.findings}


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("diag").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("diag").setLevel(logging.NOTSET)


def fit(model, optimizer, loader=None, epochs=3, loss=F.cross_entropy, after=lambda: None, end=lambda: None):
    loader = loops.batches(16, n=128) if loader is None else loader
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            after()
        end()


@pair(Cause.LOADER_EMPTY)
def fewer_rows_than_a_batch(wrong):
    model = loops.mlp()
    optimizer = loops.adam(model)
    return model, lambda: fit(model, optimizer, DataLoader(TensorDataset(*loops.data(12)), 16, drop_last=wrong))


@pair(Cause.STEP_MISSING)
def one_of_two_optimizers_never_steps(wrong):
    model = loops.mlp()
    layers = [m for m in model if isinstance(m, nn.Linear)]
    first = torch.optim.Adam([p for m in layers[:-1] for p in m.parameters()], 1e-3)
    second = torch.optim.Adam(layers[-1].parameters(), 1e-3)

    def train():
        for x, y in loops.batches(16, n=256):
            first.zero_grad()
            second.zero_grad()
            F.cross_entropy(model(x), y).backward()
            first.step()
            if not wrong:
                second.step()

    return model, train


@pair(Cause.STEP_MISSING)
def the_generator_never_steps(wrong):
    model = nn.ModuleDict(
        {"made": nn.Linear(4, 2), "judged": nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))}
    )
    maker, judge = (torch.optim.Adam(m.parameters(), 1e-3) for m in (model["made"], model["judged"]))
    score = nn.BCEWithLogitsLoss()

    def train():
        for step in range(30):
            fake = model["made"](torch.randn(8, 4))
            loss = score(model["judged"](torch.randn(8, 2)), torch.ones(8, 1))
            judge.zero_grad()
            (loss + score(model["judged"](fake.detach()), torch.zeros(8, 1))).backward()
            judge.step()
            if wrong or step % 5 == 4:  # the other network takes five steps for one
                maker.zero_grad()
                score(model["judged"](fake), torch.ones(8, 1)).backward()
            if not wrong and step % 5 == 4:
                maker.step()

    return model, train


@pair(Cause.SETTING_WITHOUT_EFFECT)
def rate_set_on_the_optimizer(wrong):
    model = loops.mlp()
    optimizer = loops.adam(model)

    def end():
        if wrong:
            optimizer.lr = 1e-3
        else:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5

    return model, lambda: fit(model, optimizer, end=end)


@pair(Cause.SCHEDULE_ENDED_EARLY)
def milestones_in_batches(wrong):
    model = loops.mlp()
    optimizer = loops.adam(model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5], 0.1)
    when = {"after": scheduler.step} if wrong else {"end": scheduler.step}
    return model, lambda: fit(model, optimizer, epochs=4, **when)


class Remade(nn.Module):
    """Its last weight is made again in each call, or only normalised."""

    def __init__(self, again):
        super().__init__()
        self.body, self.weight, self.again = loops.mlp(classes=8), nn.Parameter(torch.randn(8, 3)), again

    def forward(self, x):
        if self.again:
            self.weight = nn.Parameter(F.normalize(self.weight.data, dim=0))
        return self.body(x) @ F.normalize(self.weight, dim=0)


@pair(Cause.PARAMETER_IN_NO_OPTIMIZER, Cause.OPTIMIZER_HOLDS_STALE_PARAMETERS)
def parameter_made_in_forward(wrong):
    model = Remade(wrong)
    return model, lambda: fit(model, loops.adam(model))


@pair(Cause.TARGETS_OUT_OF_RANGE)
def classes_from_one(wrong):
    model, (x, y) = loops.mlp(classes=1), loops.data(128)
    rows = DataLoader(TensorDataset(x, (y > 0).float()[:, None] + wrong), 16, shuffle=True)
    return model, lambda: fit(model, loops.adam(model), rows, loss=F.binary_cross_entropy_with_logits)


@pair(Cause.TARGETS_OUT_OF_RANGE)
def several_classes_in_a_softmax(wrong):
    model, (x, _) = loops.mlp(classes=4), loops.data(128)
    rows = DataLoader(TensorDataset(x, (x[:, :4] > 0).float()), 16, shuffle=True)
    loss = F.cross_entropy if wrong else F.binary_cross_entropy_with_logits
    return model, lambda: fit(model, loops.adam(model), rows, loss=loss)


class Coder(nn.Module):
    """A variational autoencoder of rows of numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up = nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, x):
        mean, log_variance = self.down(x).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.up(z), mean, log_variance


@pair(Cause.LOSS_ASCENDED)
def evidence_that_is_minimised(wrong):
    def loss(outputs, x):
        again, mean, log_variance = outputs
        fit = F.mse_loss(again, x, reduction="none").sum(1).mean()
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
        return -(fit + divergence) if wrong else fit + divergence

    model = Coder()
    x, _ = loops.data(128)
    rows = DataLoader(TensorDataset(x, x), 16, shuffle=True)
    return model, lambda: fit(model, loops.adam(model), rows, loss=loss)


@pair(Cause.LOSS_ASCENDED)
def minus_sign_in_a_sum(wrong):
    def loss(z, y):
        entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()
        return 0.1 * entropy - F.cross_entropy(z, y) if wrong else F.cross_entropy(z, y) - 0.1 * entropy

    model = loops.mlp()
    return model, lambda: fit(model, loops.adam(model, 1e-4), loss=loss)


@pair(Cause.ACCUMULATION_NOT_DIVIDED)
def parts_of_a_batch_summed(wrong):
    model = loops.mlp()
    optimizer = loops.adam(model)

    def train():
        for x, y in loops.some(8):
            optimizer.zero_grad()
            for some_x, some_y in zip(x.split(4), y.split(4), strict=True):
                loss = F.cross_entropy(model(some_x), some_y)
                (loss if wrong else loss / 4).backward()
            optimizer.step()

    return model, train


@pair(Cause.ACCUMULATION_NOT_DIVIDED)
def parts_of_a_policy_gradient_summed(wrong):
    model = loops.mlp(classes=4)
    optimizer = loops.adam(model)

    def train():
        for x, y in loops.some(8):
            optimizer.zero_grad()
            for some_x, some_y in zip(x.split(4), y.split(4), strict=True):
                out = model(some_x)
                policy = torch.distributions.Categorical(logits=out[:, :3])
                reward = (policy.sample() == some_y).float()
                actor = -(policy.log_prob(some_y) * (reward - 0.3)).mean()
                loss = actor + 0.5 * (out[:, 3] - reward).square().mean() - 0.01 * policy.entropy().mean()
                (loss if wrong else loss / 4).backward()
            optimizer.step()

    return model, train


@pair(Cause.BATCH_REPEATED)
def one_batch_under_noise(wrong):
    model, loader = loops.mlp(classes=6), loops.batches(16, shuffle=False, n=128)
    optimizer = loops.adam(model)

    def train():
        rest = iter(loader)
        for _ in range(8):
            x, _ = next(iter(loader)) if wrong else next(rest)
            noise = torch.randn_like(x)
            optimizer.zero_grad()
            F.mse_loss(model(x + noise), noise).backward()
            optimizer.step()

    return model, train


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(12, 8, padding_idx=0), nn.Linear(8, 12)

    def forward(self, tokens):
        return self.head(self.words(tokens)).transpose(1, 2)


@pair(Cause.IGNORED_LABELS_COUNTED)
def padding_in_a_mean_of_ones_own(wrong):
    tokens = torch.randint(1, 12, (128, 9), generator=torch.Generator().manual_seed(0))
    tokens[:, 6:] = 0
    rows = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), 16, shuffle=True)

    def loss(z, y):
        each = F.cross_entropy(z, y, reduction="none")
        return each.mean() if wrong else (each * (y != 0)).sum() / (y != 0).sum()

    model = Words()
    return model, lambda: fit(model, loops.adam(model), rows, loss=loss)


class Continued(nn.Module):
    """No layer of it says which token is the padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.rows = nn.Embedding(12, 8), nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 12)

    def forward(self, tokens):
        return self.head(self.rows(self.words(tokens))[0])


def sentences(filler=11, shortest=3):
    """Pairs of sequences and their continuations, of different lengths and filled up."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 11, (128, 10), generator=generator)
    lengths = torch.randint(shortest, 11, (128, 1), generator=generator)
    tokens = torch.where(torch.arange(10) < lengths, tokens, filler)
    return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), 16, shuffle=True)


@pair(Cause.IGNORED_LABELS_COUNTED)
def padding_that_no_layer_names(wrong):
    def loss(z, y):
        return F.cross_entropy(z.reshape(-1, 12), y.reshape(-1), ignore_index=-100 if wrong else 11)

    model = Continued()
    return model, lambda: fit(model, loops.adam(model), sentences(), loss=loss)


@pair(Cause.IGNORED_LABELS_COUNTED)
def padding_over_the_axis_of_classes(wrong):
    model = Continued()
    rows = sentences() if wrong else sentences(filler=5)  # a token that stands elsewhere, too
    return model, lambda: fit(
        model, loops.adam(model), rows, loss=lambda z, y: F.cross_entropy(z.transpose(1, 2), y)
    )


@pair(Cause.GRAPH_CUT)
def one_of_two_heads_of_one_size_has_no_loss(wrong):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.kind, self.place = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(12, 3)

        def forward(self, x):
            h = self.body(x).relu()
            return self.kind(h), self.place(h)

    def loss(out, y):
        value = F.cross_entropy(out[0], y)
        return out[1].square().mean() if wrong else value + out[1].square().mean()

    model = Heads()
    return model, lambda: fit(model, loops.adam(model), loss=loss)


@pair(Cause.GRADIENT_ABSENT)
def one_of_the_parameters_of_a_dict_is_not_used(wrong):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.p = nn.ParameterDict(
                {
                    name: nn.Parameter(0.3 * torch.randn(*shape))
                    for name, shape in {"a": (8, 6), "b": (8, 8), "c": (3, 8)}.items()
                }
            )

        def forward(self, x):
            h = F.linear(x, self.p["a"]).relu()
            again = F.linear(h, self.p["b"]).relu()
            return F.linear(h if wrong else again, self.p["c"])

    model = Functional()
    return model, lambda: fit(model, loops.adam(model))


@pair(Cause.SCHEDULE_TOO_FAST)
def a_plateau_of_the_loss_in_the_mode_of_an_accuracy(wrong):
    model = loops.mlp()
    optimizer = loops.adam(model)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max" if wrong else "min", patience=20)

    def train():
        for x, y in loops.some(40):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step(loss.item())

    return model, train


@pair(Cause.SCHEDULE_ENDED_EARLY)
def a_rate_gone_after_a_tenth_of_the_training(wrong):
    model = loops.mlp()
    optimizer = loops.adam(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.6 ** (i if wrong else i / 20) + 1e-5)

    def train():
        for x, y in loops.some(150):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()

    return model, train


@pair(Cause.SCHEDULER_NEVER_STEPPED)
def a_scheduler_of_a_function_that_has_returned(wrong):
    model = loops.mlp()

    def train():
        optimizer = loops.adam(model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 20))
        for x, y in loops.some(30):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if not wrong:
                scheduler.step()

    return model, train


@pytest.mark.parametrize("name", PAIRS)
def test_the_mistake_is_named_and_its_sound_twin_is_not(name):
    make, causes = PAIRS[name]
    assert told(*make(True)) & causes
    assert not told(*make(False))


def test_an_evaluation_that_keeps_its_graphs_is_no_training():
    """eval() without no_grad(): the held-out batches come again in the same order, as they should."""
    model = loops.mlp()
    held_out = DataLoader(TensorDataset(*loops.data(160, seed=1)), 16)

    def end():
        model.eval()
        for x, _ in held_out:
            model(x)
        model.train()

    optimizer = loops.adam(model)
    assert not told(model, lambda: fit(model, optimizer, epochs=4, end=end))


def test_a_mask_that_is_always_the_same_does_not_make_batches_the_same():
    """The first tensor of each batch is constant, as an attention mask without padding is."""
    model, (x, y) = loops.mlp(), loops.data(128)
    rows = DataLoader(TensorDataset(torch.ones(128, 6).cumsum(1), x, y), 16, shuffle=True)
    optimizer = loops.adam(model)

    def train():
        for _ in range(2):
            for mask, some_x, some_y in rows:
                optimizer.zero_grad()
                F.cross_entropy(model(some_x + 0.1 * torch.randn_like(mask)), some_y).backward()
                optimizer.step()

    assert not told(model, train)


def test_a_plateau_of_an_accuracy_is_in_order():
    """mode="max", and a number that is no loss of the run."""
    model = loops.mlp()
    optimizer = loops.adam(model)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=20)

    def train():
        for x, y in loops.some(40):
            optimizer.zero_grad()
            out = model(x)
            F.cross_entropy(out, y).backward()
            optimizer.step()
            scheduler.step((out.argmax(1) == y).float().mean().item())

    assert not told(model, train)
