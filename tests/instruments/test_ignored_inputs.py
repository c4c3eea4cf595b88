"""Inputs that a model is given and does not use."""

import dataclasses
import os

import pytest
import torch
from torch import nn

import diag
from diag.errors import MissingQuantity
from diag.instruments.causes import Cause
from diag.snapshot.batch import Batch
from diag.snapshot.history import empty_history
from diag.snapshot.inside.ignored import InputsTried, inputs_tried


class Two(nn.Module):
    """Of classes and numbers; `lost`: the classes are multiplied by zero."""

    def __init__(self, lost=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.linear, self.drop, self.lost = nn.Embedding(6, 4), nn.Linear(7, 3), nn.Dropout(0.5), lost

    def forward(self, classes, numbers):
        h = self.embed(classes * 0 if self.lost else classes)
        return self.drop(self.linear(torch.cat([h, numbers], 1)))


def tried(model, classes=None, numbers=None):
    generator = torch.Generator().manual_seed(1)
    classes = torch.randint(6, (20,), generator=generator) if classes is None else classes
    numbers = torch.randn(20, 3, generator=generator) if numbers is None else numbers
    batch = Batch((classes,), {"numbers": numbers}, torch.zeros(20, dtype=torch.int64), 20)
    return inputs_tried(diag.Snapshot(model, nn.functional.cross_entropy, [batch]))


@pytest.mark.parametrize("lost", [True, False])
def test_an_input_that_moves_nothing_is_found_with_dropout_on(lost):
    found = tried(Two(lost).train())
    assert found == InputsTried(("input 1", "numbers"), ("input 1",) if lost else (), 16)


class BesideNothing(Two):
    """Gives an empty tensor, too, as where there is no further loss."""

    def forward(self, classes, numbers):
        return super().forward(classes, numbers), numbers.new_zeros(0)


def test_an_empty_output_is_no_output_without_finite_numbers():
    assert tried(BesideNothing(lost=True)).ignored == ("input 1",)


def test_an_input_that_is_the_same_for_all_examples_is_not_tried():
    with pytest.raises(MissingQuantity, match="no two inputs that differ"):
        tried(Two(), classes=torch.zeros(20, dtype=torch.int64))


class Whole(nn.Module):
    """Takes a batch as it comes; of it, and of the keywords, two entries are its inputs."""

    def __init__(self):
        super().__init__()
        self.two = Two()

    def forward(self, batch, numbers=None, **others):
        return self.two(batch["classes"], batch["numbers"] if numbers is None else numbers)


@pytest.mark.parametrize("handed_over", ["as a dict", "as keywords"])
def test_what_comes_along_with_the_inputs_is_not_meant_for_the_model(handed_over):
    rows = {"classes": torch.arange(20) % 6, "numbers": torch.randn(20, 3), "mask": torch.arange(20) % 3}
    given = ((rows,), {}) if handed_over == "as a dict" else (({"classes": rows["classes"]},), rows)
    batch = Batch(*given, torch.zeros(20, dtype=torch.int64), 20)
    with pytest.raises(MissingQuantity, match="no two inputs that differ"):
        inputs_tried(diag.Snapshot(Whole(), nn.functional.cross_entropy, [batch]))


def test_targets_that_the_model_is_given_are_no_input():
    class WithTargets(Two):
        def forward(self, classes, numbers, targets=None):
            return super().forward(classes, numbers)

    targets = torch.arange(20) % 3
    batch = Batch((torch.arange(20) % 6, torch.randn(20, 3), targets), {}, targets, 20)
    found = inputs_tried(diag.Snapshot(WithTargets(), nn.functional.cross_entropy, [batch]))
    assert found == InputsTried(("input 1", "input 2"), (), 16)


def test_a_network_that_draws_its_own_numbers_is_refused():
    class Own(Two):
        def forward(self, classes, numbers):
            return super().forward(classes, numbers) + int.from_bytes(os.urandom(3))

    with pytest.raises(MissingQuantity, match="others each time"):
        tried(Own())


def verdict(ignored, steps=40):
    history = dataclasses.replace(empty_history({"w": 1}, steps))
    found = InputsTried(("input 1", "numbers"), ignored, 16)
    return diag.ignored_inputs(inputs_tried=found, history=history).verdict()


def test_what_is_said():
    told = verdict(("input 1",))
    assert (told.level, told.cause) == ("warning", Cause.INPUT_IGNORED)
    assert "given input 1 and does not use it" in told.sentence
    assert verdict(()).level == "ok"


def test_paths_that_start_at_zero_have_time_to_open():
    assert verdict(("input 1",), steps=20).level == "not_applicable"


@pytest.mark.parametrize("lost", [True, False])
def test_a_watch_tells_of_it(lost, caplog):
    model = Two(lost)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(0)
    with diag.watch(model, instruments=["ignored_inputs"]) as watcher:
        for _ in range(40):
            classes = torch.randint(6, (32,), generator=generator)
            loss = nn.functional.cross_entropy(model(classes, torch.randn(32, 3, generator=generator)), classes % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert [f.verdict.cause for f in watcher.findings] == [Cause.INPUT_IGNORED] * lost


class Reader(nn.Module):
    """Reads a sequence; `at`: the position of the recurrent layer's output that goes on."""

    def __init__(self, at):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.rnn, self.head, self.at = (
            nn.Embedding(9, 6),
            nn.GRU(6, 8, batch_first=True),
            nn.Linear(8, 3),
            at,
        )

    def forward(self, x):
        h = self.rnn(self.embed(x) if x.ndim == 2 else x)[0]
        return self.head(h.mean(1) if self.at is None else h[:, self.at])


def read(at, x):
    batch = Batch((x,), {}, torch.zeros(len(x), dtype=torch.int64), len(x))
    return inputs_tried(diag.Snapshot(Reader(at), nn.functional.cross_entropy, [batch]))


@pytest.mark.parametrize("kind", ["tokens", "numbers"])
@pytest.mark.parametrize(("at", "used"), [(0, range(1)), (6, range(7)), (14, range(15)), (29, None), (None, None)])
def test_positions_that_come_after_the_one_that_goes_on_move_nothing(kind, at, used):
    torch.manual_seed(1)
    x = torch.randint(0, 9, (20, 30)) if kind == "tokens" else torch.randn(20, 30, 6)
    found = read(at, x)
    assert found.ignored == ()
    assert [p.used for p in found.positions] == ([] if used is None else [tuple(used)])
    late = dataclasses.replace(empty_history({"w": 4}, 1), total_steps=40)
    verdict = diag.ignored_inputs(inputs_tried=found, history=late).verdict()
    assert (verdict.level == "warning") == (used is not None)
    if used is not None:
        which = "one only (number 1)" if at == 0 else f"at most {at + 1} (1 to {at + 1})"
        assert f"Of the 30 positions of input 1 the outputs depend on {which}: when" in verdict.sentence


def test_padding_that_is_alike_in_all_rows_and_short_sequences_are_no_positions():
    torch.manual_seed(1)
    x = torch.randint(1, 9, (20, 30))
    x[:, 6:] = 0
    for given in (x, x[:, :6]):
        with pytest.raises(MissingQuantity, match="no two inputs"):
            read(0, given)
