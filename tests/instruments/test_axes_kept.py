"""Reshapes where a transpose was meant, outputs and targets in different orders, rows of targets exchanged,
evaluations that are not numbers, several classes behind one softmax."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diag
from diag.instruments.causes import Cause
from diag.watching.observe.loop.data.axes import Axes, exchanged_axes
from diag.watching.observe.loop.data.targets import rows_exchanged
from diag.watching.observe.loop.moment import Moment

CHECKED = ["axes_kept", "finite_evaluation", "loss_call", "token_targets"]


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("diag").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("diag").setLevel(logging.NOTSET)


class Reader(nn.Module):
    """Scores (n, length, classes) of tokens (n, length)."""

    def __init__(self, classes=11):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.gru, self.head = nn.Embedding(11, 8), nn.GRU(8, 9, batch_first=True), nn.Linear(9, classes)

    def forward(self, tokens):
        return self.head(self.gru(self.embed(tokens))[0])


def told(loss_of, model=None, evaluate=None, steps=6):
    """{cause: verdict} and the levels of a training on random tokens (10, 13)."""
    model = model or Reader()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(0)
    with diag.watch(model, instruments=CHECKED) as watcher:
        for _ in range(steps):
            text = torch.randint(11, (10, 13), generator=generator)
            loss = loss_of(model, text)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if evaluate is not None:
                with torch.no_grad():
                    evaluate(model, text)
    levels = {n: str(watcher.run.series(n)[-1][1].verdict().level) for n in CHECKED}
    return {f.verdict.cause: f.verdict for f in watcher.findings}, levels


def next_tokens(model, text):
    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


# Reshapes


def exchanged(x, shape):
    return exchanged_axes((x * 2).reshape(shape).grad_fn)


def test_lengths_that_change_places_are_found_by_shape():
    x = torch.randn(4, 9, 5, requires_grad=True)
    assert exchanged(x, (4, 5, 9)) == ((4, 9, 5), (4, 5, 9))
    assert exchanged(torch.randn(6, 16, 16, 3, requires_grad=True), (6, 3, 16, 16))
    assert exchanged(x, (36, 5)) is None
    assert exchanged(x, (4, 9, 1, 5)) is None


@pytest.mark.parametrize("sizes", [(7, 4, 16), (5, 9, 10), (3, 8, 8)])
def test_splitting_heads_and_shifting_rows_are_left_out(sizes):
    """(t, n, h d) to (t, n h, d), with n = d, is how attention splits heads where time is first."""
    a, b, c = sizes
    assert exchanged(torch.randn(*sizes, requires_grad=True), (a, c, b)) is None


def test_rows_that_are_padded_first_are_shifted_on_purpose():
    x = F.pad(torch.randn(2, 5, 8, requires_grad=True), (0, 1, 0, 2))
    assert exchanged_axes(x.reshape(2, 9, 7).grad_fn) is None


@pytest.mark.parametrize(
    "module", [nn.MultiheadAttention(24, 3), nn.TransformerEncoderLayer(24, 3, batch_first=True)]
)
def test_layers_of_torch_are_quiet(module):
    x = torch.randn(13, 8, 24, requires_grad=True)
    out = module(x, x, x)[0] if isinstance(module, nn.MultiheadAttention) else module(x)

    axes = Axes(Moment())
    axes.backward_called(out.sum())
    assert axes.facts() == ()


def test_a_reshape_to_classes_first_is_told_and_a_transpose_is_not():
    """(n, length, classes) to (n, classes, length), as cross_entropy wants it."""
    targets = lambda text: text % 5  # noqa: E731
    wrong, levels = told(lambda m, t: F.cross_entropy(m(t).reshape(10, 5, 13), targets(t)), Reader(5))
    assert wrong[Cause.AXES_MIXED].level == "warning"
    assert "(10, 13, 5) to (10, 5, 13)" in wrong[Cause.AXES_MIXED].sentence
    right, levels = told(lambda m, t: F.cross_entropy(m(t).transpose(1, 2), targets(t)), Reader(5))
    assert Cause.AXES_MIXED not in right and levels["axes_kept"] == "ok"


# Outputs and targets of tokens


def test_outputs_in_another_order_than_targets_are_told():
    def turned(model, text):
        return F.cross_entropy(model(text[:, :-1]).transpose(0, 1).reshape(-1, 11), text[:, 1:].flatten())

    verdict = told(turned)[0][Cause.AXES_MIXED]
    assert verdict.level == "alarm" and "from (12, 10), the targets from (10, 12)" in verdict.sentence


def test_targets_that_are_flattened_position_by_position_are_told():
    def turned(model, text):
        return F.cross_entropy(model(text[:, :-1]).reshape(-1, 11), text[:, 1:].T.reshape(-1))

    verdict = told(turned)[0][Cause.AXES_MIXED]
    assert verdict.level == "alarm" and "from (10, 12), the targets from (12, 10)" in verdict.sentence


def test_targets_of_other_rows_are_told():
    def shuffled(model, text):
        return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].roll(3, 0).flatten())

    found, _ = told(shuffled)
    assert found[Cause.LABELS_SHUFFLED].level == "alarm"


def test_next_tokens_are_quiet():
    found, levels = told(next_tokens)
    assert not found
    assert levels["axes_kept"] == levels["token_targets"] == "ok"
    assert levels["finite_evaluation"] == "not_applicable"


def test_rows_are_exchanged_only_where_each_is_anothers():
    text = torch.randint(30, (12, 16), generator=torch.Generator().manual_seed(0))
    inputs, targets = text[:, :-1], text[:, 1:]
    assert rows_exchanged(inputs, targets.roll(1, 0), -100)
    assert not rows_exchanged(inputs, targets, -100)
    assert not rows_exchanged(inputs, torch.randint(30, (12, 15)), -100)
    assert not rows_exchanged(torch.ones_like(inputs), torch.ones_like(targets), -100)


# Evaluations


def test_an_evaluation_that_is_no_number_is_told():
    def nothing_counts(model, text):
        F.cross_entropy(model(text).flatten(0, 1), torch.full((130,), -100))

    found, _ = told(next_tokens, evaluate=nothing_counts)
    assert found[Cause.NOT_FINITE].level == "warning"
    assert "not a number" in found[Cause.NOT_FINITE].sentence
    found, levels = told(next_tokens, evaluate=next_tokens)
    assert not found and levels["finite_evaluation"] == "ok"


# One softmax for several classes


@pytest.mark.parametrize("several", [True, False])
def test_a_softmax_before_binary_cross_entropy_with_several_classes_a_row(several):
    class Last(Reader):
        def forward(self, tokens):
            return super().forward(tokens)[:, -1].softmax(1)

    def loss_of(model, text):
        ones = F.one_hot(text[:, :2] if several else text[:, :1], 11).sum(1).clamp(max=1).float()
        return F.binary_cross_entropy(model(text), ones)

    found, _ = told(loss_of, Last())
    assert (Cause.TARGETS_OUT_OF_RANGE in found) is several
