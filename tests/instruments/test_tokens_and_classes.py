"""Tokens that are all one or all in one bag, and classes that are never asked for, in training's own batches."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diag
from diag.instruments.causes import Cause
from diag.instruments.data.classes_asked import classes_asked
from diag.snapshot.loop.asked import AskedFacts
from diag.snapshot.loop.data import BatchFacts
from diag.snapshot.loop.facts import Loop

WORDS, CLASSES, N = 50, 5, 24
CHECKED = ["tokens_differ", "classes_asked"]


class Bags(nn.Module):
    def __init__(self, classes=CLASSES):
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(WORDS, 8), nn.Linear(8, classes)

    def forward(self, tokens, offsets):
        return self.head(self.words(tokens, offsets))


def told(tokens=lambda t: t, offsets=lambda o: o, labels=lambda y: y, classes=CLASSES):
    """{instrument: verdict} of a training on bags of random words."""
    torch.manual_seed(0)
    model = Bags(classes)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=CHECKED) as watcher:
        for _ in range(30):
            lengths = torch.randint(3, 9, (N,))
            start = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]])
            z = model(tokens(torch.randint(0, WORDS, (int(lengths.sum()),))), offsets(start))
            optimizer.zero_grad()
            F.cross_entropy(z, labels(torch.randint(0, CLASSES, (N,)))).backward()
            optimizer.step()
    return {f.instrument: f.verdict for f in watcher.run.findings()}


def test_words_in_bags_are_quiet():
    verdicts = told()
    assert {v.level for v in verdicts.values()} == {"ok"}


def test_unknown_words_and_bags_without_words_are_alarms():
    unknown = told(tokens=torch.zeros_like)["tokens_differ"]
    assert unknown.level == "alarm" and unknown.cause == Cause.INPUTS_CONSTANT
    assert "are 0" in unknown.sentence
    empty = told(offsets=torch.zeros_like)["tokens_differ"]
    assert empty.level == "alarm" and "all bags but the last are empty" in empty.sentence


def test_a_class_that_never_occurs_is_told_and_labels_counted_from_one():
    missing = told(labels=lambda y: torch.where(y == 3, 1, y))["classes_asked"]
    assert missing.level == "warning" and missing.cause == Cause.CLASS_MISSING
    assert "1 of the 5 classes" in missing.sentence and missing.sentence.endswith(": 3.")
    from_one = told(labels=lambda y: y + 1, classes=CLASSES + 1)["classes_asked"]
    assert "from 1 to 5, as if counted from one" in from_one.sentence


ASKED = AskedFacts(
    function="cross_entropy", reduction="mean", looked=20, outputs_a_row=4, counts={0: 100, 1: 100, 3: 100}
)
MIXED_BATCHES = BatchFacts(batch_size=15.0, distinct=2.9, counted=20)


@pytest.mark.parametrize(
    ("change", "batches"),
    [
        ({"of_sequences": True}, MIXED_BATCHES),  # rare tokens are rare
        ({"counts": {0: 300}}, MIXED_BATCHES),  # the positive of a contrastive loss
        ({"looked": 5}, MIXED_BATCHES),
        ({"counts": {0: 20, 1: 20, 3: 20}}, MIXED_BATCHES),
        ({}, BatchFacts(batch_size=15.0, distinct=1.1, counted=20)),  # sorted by class
    ],
)
def test_labels_that_say_nothing_of_the_rest_are_refused(change, batches):
    verdict = classes_asked(Loop(step=30, asked=(dataclasses.replace(ASKED, **change),), batches=batches)).verdict()
    assert verdict.level == "not_applicable"
    whole = classes_asked(Loop(step=30, asked=(ASKED,), batches=MIXED_BATCHES)).verdict()
    assert whole.level == "warning"


class Mixed(nn.Module):
    """Of a category and numbers."""

    def __init__(self):
        super().__init__()
        self.category, self.layer = nn.Embedding(4, 4), nn.Linear(8, 3)

    def forward(self, category, numbers):
        return self.layer(torch.cat([self.category(category)[:, 0], numbers], 1))


def test_one_constant_input_of_several_is_not_called_all_inputs():
    torch.manual_seed(0)
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with diag.watch(model, instruments=["batch_rows", "tokens_differ"]) as watcher:
        for _ in range(8):
            optimizer.zero_grad()
            z = model(torch.zeros(16, 1, dtype=torch.int64), torch.randn(16, 4))
            F.cross_entropy(z, torch.randint(0, 3, (16,))).backward()
            optimizer.step()
    verdicts = {f.instrument: f.verdict for f in watcher.run.findings()}
    assert "The first of several inputs" in verdicts["batch_rows"].sentence
    assert verdicts["tokens_differ"].level == "not_applicable"
