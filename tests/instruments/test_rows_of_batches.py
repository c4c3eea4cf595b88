"""What the batches of a watched training hold, which rows are drawn, and what they are asked for."""

import logging
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, Subset, TensorDataset, WeightedRandomSampler

import diag
from diag.instruments.causes import Cause
from diag.instruments.data.label_order import in_order
from diag.snapshot.loop.data import BatchFacts, DrawFacts, EvaluatedRows, TargetFacts
from diag.snapshot.loop.facts import Loop
from diag.watching.observe.loop.data.targets import first_position, shift_of

WATCHED = ["batch_rows", "rows_drawn", "held_out_rows", "classes_mixed", "token_targets", "target_scale"]


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("diag").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("diag").setLevel(logging.NOTSET)


def rows(n=240, classes=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator)
    return x, x[:, :classes].argmax(1)


def told(train_loader, *evaluations, epochs=2, change=lambda x: x):
    """{cause: sentence} of a classifier trained on the loader and evaluated on others after each epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with diag.watch(model, instruments=WATCHED) as watcher:
            for _ in range(epochs):
                for x, y in train_loader:
                    optimizer.zero_grad()
                    F.cross_entropy(model(change(x)), y).backward()
                    optimizer.step()
                for loader in evaluations:
                    with torch.no_grad():
                        for x, _ in loader:
                            model(x)
    assert not [e.text for e in watcher.run.events if e.kind == "internal error"]
    return {f.verdict.cause: f.verdict.sentence for f in watcher.run.findings() if f.verdict.cause}


def shuffled(dataset, size=24, **more):
    return DataLoader(dataset, size, shuffle=True, **more)


# Rows that are not like the others


@pytest.mark.parametrize("workers", [0, 1])
def test_large_rows_are_named_by_their_place_in_the_data_set(workers):
    x, y = rows()
    x[[17, 101]] *= 1e4
    sentence = told(shuffled(TensorDataset(x, y), num_workers=workers))[Cause.BATCHES_POISONED]
    assert "17" in sentence and "101" in sentence and "of the data set" in sentence


def test_rows_of_a_loop_without_a_loader_are_named_by_step_and_place():
    x, y = rows()
    x[30] = 1e5
    batches = [(x[i : i + 24], y[i : i + 24]) for i in range(0, 240, 24)]
    assert "row 6 of the batch at step 2" in told(batches)[Cause.BATCHES_POISONED]


def test_a_row_that_is_not_finite_is_an_alarm():
    x, y = rows()
    x[5, 2] = torch.nan
    assert "row 5 of the data set" in told(DataLoader(TensorDataset(x, y), 24))[Cause.DATA_NOT_FINITE]


def test_rows_that_are_all_one_before_they_are_augmented():
    x, y = rows()
    alike = TensorDataset(x[:1].expand(240, 6).clone(), y)
    assert Cause.INPUTS_CONSTANT in told(shuffled(alike), change=lambda x: x + torch.randn_like(x))


def test_batches_that_one_row_has_spoiled_are_told_as_batches():
    """Padding with the smallest number of the batch gives every row of it the corrupt one's size."""
    x, y = rows(480)
    x[17] *= 1e5
    found = told(shuffled(TensorDataset(x, y)), change=lambda a: F.pad(a[:, 1:], (1, 0), value=float(a.min())))
    assert set(found) == {Cause.BATCHES_POISONED}
    sentence = found[Cause.BATCHES_POISONED]  # it was met in each of two epochs
    assert sentence.startswith("In 2 of ") and "batches most inputs are a hundred times as large" in sentence


def test_a_scale_that_many_batches_have_is_how_the_data_is():
    x, y = rows()
    for i in (2, 5, 8):
        x[i::10] *= 1e4
    batches = [(x[i::10], y[i::10]) for i in range(10)]
    assert Cause.BATCHES_POISONED not in told(batches)


def test_usual_rows_draw_nothing():
    dataset = TensorDataset(*rows())
    assert not told(shuffled(Subset(dataset, range(180))), DataLoader(Subset(dataset, range(180, 240)), 24))


def test_heavy_tails_are_how_the_data_is():
    x, y = rows()
    assert not told(shuffled(TensorDataset((2 * x).exp(), y)))


def test_without_floating_inputs_there_is_nothing_to_judge():
    assert diag.batch_rows(loop=Loop(step=5)).verdict().level == diag.Level.NOT_APPLICABLE


# Rows drawn


def test_a_sampler_that_draws_from_a_tenth_is_told():
    first = Subset(TensorDataset(*rows()), range(24))
    loader = DataLoader(first, 24, sampler=RandomSampler(first, replacement=True, num_samples=240))
    sentence = told(loader)[Cause.ROWS_DUPLICATED]
    assert "240 draws were of 24 different rows" in sentence and "data set of 240" in sentence


def samplers(dataset):
    rare = torch.zeros(240, dtype=torch.long)
    rare[:12] = 1
    balanced = (1.0 / rare.bincount().float())[rare].tolist()
    yield RandomSampler(dataset, replacement=True)
    yield RandomSampler(dataset, replacement=True, num_samples=1200)
    yield WeightedRandomSampler(balanced, 240)
    yield WeightedRandomSampler(balanced, 960)


@pytest.mark.parametrize("which", range(4))
def test_samplers_that_reach_all_rows_are_not(which):
    dataset = TensorDataset(*rows())
    assert Cause.ROWS_DUPLICATED not in told(DataLoader(dataset, 24, sampler=list(samplers(dataset))[which]))


def test_a_small_part_of_a_data_set_may_be_trained_on():
    assert not told(shuffled(Subset(TensorDataset(*rows()), range(48))), epochs=8)


# Rows that are held out


def held_out():
    x, y = rows()
    return TensorDataset(x[:192], y[:192]), TensorDataset(x[192:], y[192:])


def test_held_out_rows_in_the_training_set():
    train, rest = held_out()
    sentence = told(shuffled(ConcatDataset([train, rest])), DataLoader(rest, 24))[Cause.HELD_OUT_IN_TRAINING]
    assert "48 of 48" in sentence


def test_parts_of_one_data_set_that_overlap():
    dataset = TensorDataset(*rows())
    train, rest = Subset(dataset, range(200)), Subset(dataset, range(180, 240))
    assert "20 of 60" in told(shuffled(train, 20), DataLoader(rest, 20))[Cause.HELD_OUT_IN_TRAINING]


@pytest.mark.parametrize("also", [True, False])
def test_the_training_loss_may_be_measured(also):
    train, rest = held_out()
    others = [DataLoader(rest, 24)] if also else []
    assert not told(shuffled(train), DataLoader(train, 24), *others)


def test_a_part_of_the_training_rows_may_be_evaluated_beside_others():
    train, rest = held_out()
    assert not told(shuffled(train), DataLoader(Subset(train, range(96)), 24), DataLoader(rest, 24))


def test_batches_cut_by_hand_are_not_taken_for_those_of_the_last_evaluation():
    train, rest = held_out()
    x, y = train.tensors
    assert not told([(x[i : i + 24], y[i : i + 24]) for i in range(0, 192, 24)], DataLoader(rest, 24))


@pytest.mark.parametrize(("comparable", "level"), [(0, diag.Level.NOT_APPLICABLE), (48, diag.Level.OK)])
def test_rows_of_other_data_sets_are_not_said_to_be_others(comparable, level):
    """Two objects may hold the same rows: only places in one data set can be compared."""
    drawn = DrawFacts(evaluated=(EvaluatedRows(rows=48, trained=0, comparable=comparable),))
    assert diag.held_out_rows(loop=Loop(step=9, drawn=drawn)).verdict().level == level


# Classes


def test_sorted_classes_are_told():
    x, y = rows(600)
    order = y.argsort()
    assert Cause.CLASSES_SORTED in told(DataLoader(TensorDataset(x[order], y[order]), 20))


def test_alternating_batches_of_one_class_are_not_sorted():
    facts = BatchFacts(counted=16, distinct=1.0, batch_size=32, continued=0.0, label_counts={0: 256, 1: 256})
    assert diag.classes_mixed(loop=Loop(step=9, batches=facts)).verdict().level == diag.Level.OK


def test_classes_drawn_at_random_have_the_number_expected():
    facts = BatchFacts(counted=16, distinct=2.0, batch_size=8, continued=1.0, label_counts={0: 64, 1: 64})
    verdict = diag.classes_mixed(loop=Loop(step=9, batches=facts)).verdict()
    assert verdict.level == diag.Level.OK
    assert "1.99" in verdict.sentence  # 2 (1 - 0.5 ** 8)
    assert diag.classes_mixed(loop=Loop(step=9)).verdict().level == diag.Level.NOT_APPLICABLE


@pytest.mark.parametrize(("labels", "ordered"), [(torch.arange(256) // 64, True), (torch.arange(256) % 4, False)])
def test_labels_in_order(labels, ordered):
    assert in_order(labels) == ordered
    assert not in_order(labels[torch.randperm(256, generator=torch.Generator().manual_seed(0))])


def counts(x, y, **loop):
    return diag.class_counts(x, y, torch.zeros(len(y), 3), **loop).verdict()


def test_classes_of_labels_in_order_are_not_counted():
    labels = torch.arange(160) // 80
    assert counts(torch.zeros(160, 4), labels).level == diag.Level.NOT_APPLICABLE
    mixed = labels[torch.randperm(160, generator=torch.Generator().manual_seed(0))]
    assert counts(torch.zeros(160, 4), mixed).cause == Cause.CLASS_MISSING


def test_the_labels_of_all_batches_are_counted():
    labels = torch.arange(160) % 2
    many = Loop(step=9, batches=BatchFacts(label_counts={0: 1900, 1: 100}))
    verdict = counts(torch.zeros(160, 2), labels, loop=many)
    assert verdict.cause == Cause.CLASS_IMBALANCE
    assert verdict.value == pytest.approx(1900 / 121)  # two standard errors above 100 counts
    even = Loop(step=9, batches=BatchFacts(label_counts={0: 900, 1: 300}))
    assert counts(torch.zeros(160, 2), labels, loop=even).level == diag.Level.OK


# What is asked for


@pytest.mark.parametrize("shift", [-2, -1, 0, 1, 2, 11])
def test_targets_are_found_in_the_tokens(shift):
    codes = torch.randint(20, (4, 60), generator=torch.Generator().manual_seed(0))
    tokens, targets = codes[:, 15:45], codes[:, 15 + shift : 45 + shift]
    assert shift_of(tokens, targets, -100) == shift
    assert shift_of(tokens, targets.reshape(-1), -100) == shift
    assert shift_of(tokens, torch.where(torch.arange(30) < 5, -100, targets), -100) == shift


@pytest.mark.parametrize(
    ("outputs", "asked", "shift"),
    [
        (slice(None, -1), slice(1, None), 1),  # the next token
        (slice(1, None), slice(1, None), 0),
        (slice(1, None), slice(None, -1), -1),
        (slice(None, -2), slice(2, None), 2),
    ],
)
@pytest.mark.parametrize("form", ["flat", "moved", "copied"])
def test_targets_are_found_where_the_loss_leaves_out_the_ends(outputs, asked, shift, form):
    tokens = torch.randint(20, (4, 30), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(4, 30, 20, requires_grad=True) * 1.0
    cut, targets = logits[:, outputs], tokens[:, asked]
    given = {"flat": lambda: cut.flatten(0, 1), "moved": lambda: cut.transpose(1, 2),
             "copied": lambda: cut.contiguous().view(-1, 20)}[form]()  # fmt: skip
    assert shift_of(tokens, targets.reshape(-1), -100, first_position(given)) == shift


class Speaker(nn.Module):
    """Computes its loss itself, as language models do; `ahead`: how many places on it is asked for."""

    def __init__(self, ahead):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.ahead = nn.Embedding(20, 8), nn.Linear(8, 20), ahead

    def forward(self, input_ids, labels):
        logits, n = self.head(self.embedding(input_ids)), input_ids.shape[1]
        kept = n - self.ahead
        return F.cross_entropy(logits[:, :kept].flatten(0, 1), labels[:, self.ahead :].flatten())


@pytest.mark.parametrize(("ahead", "cause"), [(0, Cause.ANSWER_IN_INPUT), (1, ""), (2, Cause.TARGETS_SHIFTED)])
def test_a_loss_that_the_model_computes_itself_is_compared_with_its_own_input(ahead, cause):
    model = Speaker(ahead)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=["token_targets"]) as watcher:
        for _ in range(5):
            tokens = torch.randint(20, (4, 30))
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).backward()
            optimizer.step()
    assert watcher._loop.facts().targets.shifts == {ahead: 3}
    assert {f.verdict.cause for f in watcher.findings} == ({cause} if cause else set())


def test_targets_that_are_no_tokens_of_the_input():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randint(20, (4, 30), generator=generator) for _ in range(2))
    assert shift_of(one, other, -100) is None
    assert shift_of(torch.zeros_like(one), torch.zeros_like(one), -100) is None  # one token agrees with all
    assert shift_of(one, one[:2], -100) is None


@pytest.mark.parametrize(
    ("shifts", "cause"),
    [
        ({1: 3}, ""), ({1: 2, 4: 1}, ""), ({0: 3}, Cause.ANSWER_IN_INPUT), ({11: 3}, Cause.TARGETS_SHIFTED),
        ({-1: 3}, Cause.TARGETS_SHIFTED),
    ],
)  # fmt: skip
def test_other_targets_than_the_next_token(shifts, cause):
    loop = Loop(step=5, targets=TargetFacts(aligned=3, shifts=shifts))
    assert diag.token_targets(loop=loop).verdict().cause == cause
    assert diag.token_targets(loop=Loop(step=5)).verdict().level == diag.Level.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("size", "first", "cause"),
    [(1500.0, 0.2, Cause.TARGETS_NOT_NORMALIZED), (1500.0, 900.0, ""), (1.0, 0.2, "")],
)
def test_targets_far_from_what_the_network_puts_out(size, first, cause):
    facts = TargetFacts(function="mse_loss", looked=3, size=size, mean=size, deviation=1.0, first_output=first)
    assert diag.target_scale(loop=Loop(step=5, targets=facts)).verdict().cause == cause
    assert diag.target_scale(loop=Loop(step=5)).verdict().level == diag.Level.NOT_APPLICABLE


def test_the_scale_of_targets_is_observed():
    model = nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)
    x, _ = rows()
    y = 300 + 40 * x[:, :1]
    with diag.watch(model, instruments=["target_scale"]) as watcher:
        for i in range(0, 240, 80):
            optimizer.zero_grad()
            F.mse_loss(model(x[i : i + 80]), y[i : i + 80]).backward()
            optimizer.step()
    facts = watcher._loop.facts().targets
    assert facts.mean == pytest.approx(y.mean().item(), rel=1e-5)
    assert Cause.TARGETS_NOT_NORMALIZED in {f.verdict.cause for f in watcher.findings}


# Copies in the data set


def test_a_data_set_of_copies_is_told():
    x, y = rows(30)
    again = torch.randint(30, (600,), generator=torch.Generator().manual_seed(1))
    sentence = told(shuffled(TensorDataset(x[again], y[again])))[Cause.ROWS_DUPLICATED]
    assert "holds the same inputs many times" in sentence
    assert re.search(r"only (28|29|30) different rows", sentence)  # of 30, those at the places looked at


def test_rows_of_classes_that_are_copied_and_numbers_of_few_values_are_quiet():
    x, y = rows(400)
    oversampled = torch.cat([torch.arange(400), torch.arange(40).repeat(5)])
    assert Cause.ROWS_DUPLICATED not in told(shuffled(TensorDataset(x[oversampled], y[oversampled])))
    corners = (x > 0).float()  # 64 of them
    assert Cause.ROWS_DUPLICATED not in told(shuffled(TensorDataset(corners, y)), epochs=3)
