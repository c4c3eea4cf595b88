"""Examples that depend on each other or on their place: sequences, masks, padding, and axes that may be time."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import diag
from diag.errors import MissingQuantity
from diag.snapshot.batch import Batch
from diag.snapshot.inside.apart import mixing, moved_by_order, other_examples

LENGTHS = torch.tensor([4, 9, 6, 7, 5, 8, 3, 6, 9])


class Tagger(nn.Module):
    """An LSTM on packed sequences; `undo`: the rows, sorted by length, are brought back in their order."""

    def __init__(self, undo=True):
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(20, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 4)
        self.undo = undo

    def forward(self, tokens, lengths):
        order = lengths.argsort(descending=True)
        packed = pack_padded_sequence(self.embed(tokens)[order], lengths[order], batch_first=True)
        out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(out[order.argsort()] if self.undo else out)


class Sequences(nn.Module):
    """Self-attention over positions, with positions added along an axis."""

    def __init__(self, over_batch=False, batch_first=True):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.register_buffer("places", torch.randn(64, 8, generator=torch.Generator().manual_seed(1)))
        self.over_batch = over_batch

    def forward(self, tokens, mask=None):
        h = self.embed(tokens)
        h = h + (self.places[: len(h), None] if self.over_batch else self.places[: h.shape[1]])
        return self.head(self.attend(h, h, h, attn_mask=mask)[0])


def tokens(rows=9, length=9):
    return torch.randint(1, 20, (rows, length), generator=torch.Generator().manual_seed(0))


def padded():
    return torch.where(torch.arange(9) < LENGTHS[:, None], tokens(), 0)


def found(model, *inputs, targets=None):
    """Both changes, of inputs whose first axis has nine rows."""
    torch.manual_seed(0)
    snapshot = diag.Snapshot(model, nn.functional.cross_entropy, [Batch(inputs, {}, targets, 9)])
    return other_examples(snapshot)


def causal(length=9):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def test_rows_that_are_not_brought_back_in_order_are_told():
    torch.manual_seed(0)
    right, wrong = found(Tagger(), padded(), LENGTHS), found(Tagger(undo=False), padded(), LENGTHS)
    assert max(right.mixing, right.order) < 1e-5
    assert wrong.order > 0.1


def test_positions_along_the_batch_are_a_matter_of_order():
    torch.manual_seed(0)
    x = tokens(8, 10)
    right, wrong = (
        [f(m, Batch((x, causal(10)), {}, None, 8)) for f in (mixing, moved_by_order)]
        for m in (Sequences(), Sequences(over_batch=True))
    )
    assert max(right) < 1e-5
    assert wrong[0] < 1e-5 < 0.1 < wrong[1]


@pytest.mark.parametrize("model", [Sequences(batch_first=False)])
def test_padding_says_which_axis_is_time(model):
    assert found(model, padded()).mixing > 0.1


@pytest.mark.parametrize("batch_first", [True, False])
def test_time_first_is_not_taken_for_a_batch(batch_first):
    """(time, examples): time steps see each other, examples do not, and nothing says that it is a mistake."""
    model = Sequences(batch_first=batch_first)
    x = tokens(9, 12)
    if batch_first:
        assert found(model, x).mixing < 1e-5
    else:
        with pytest.raises(MissingQuantity, match="first axis of the inputs may be time"):
            found(model, x)


def test_one_target_or_one_answer_a_row_says_that_rows_are_examples():
    class Last(Sequences):
        def forward(self, x):
            return super().forward(x)[:, -1]

    x = tokens(9, 12)
    assert found(Last(batch_first=False), x).mixing > 0.1
    with pytest.raises(MissingQuantity, match="may be time"):
        found(Sequences(batch_first=False), x, targets=torch.zeros(9, 2, dtype=torch.int64))
    assert found(Sequences(batch_first=False), x, targets=torch.zeros(9, dtype=torch.int64)).mixing > 0.1


def test_noise_is_no_matter_of_order():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    batch = Batch((torch.randn(7, 3),), {}, None, 7)
    assert math.isnan(moved_by_order(Noisy(), batch))
    assert mixing(Noisy(), batch) == 0


def test_an_order_that_the_network_needs_is_kept():
    class Sorted(Tagger):
        def forward(self, x, lengths):
            packed = pack_padded_sequence(self.embed(x), lengths, batch_first=True)
            return self.head(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])

    torch.manual_seed(0)
    batch = Batch((tokens(7), torch.tensor([9, 8, 7, 6, 5, 4, 3])), {}, None, 7)
    model = Sorted()
    assert math.isnan(moved_by_order(model, batch))
    assert mixing(model, batch) < 1e-5


def test_pairs_of_examples_are_meant_to_be_compared():
    class Pairs(nn.Module):
        def forward(self, x):
            return x @ x.T

    with pytest.raises(MissingQuantity, match="do not belong to single examples"):
        found(Pairs(), torch.randn(9, 3))


def test_a_square_that_is_no_mask_over_positions_is_refused():
    class Graph(nn.Module):
        def forward(self, x, adjacency):
            return (adjacency @ torch.ones(5, 3)).sum() + x

    with pytest.raises(MissingQuantity, match="do not belong to single examples"):
        found(Graph(), torch.randn(9, 3), torch.eye(5))


def test_what_is_said_of_order():
    from diag.snapshot.inside.apart import OtherExamples

    verdict = diag.examples_mixed(other_examples=OtherExamples(0.0, 7, 0.4)).verdict()
    assert verdict.level == "warning"
    assert "on its place in the batch" in verdict.sentence and "another order" in verdict.sentence
    assert diag.examples_mixed(other_examples=OtherExamples(0.0, 7)).verdict().level == "ok"
