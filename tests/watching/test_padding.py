"""Padding among targets, told from tokens that stand for something."""

import pytest
import torch

from diag.snapshot.inside.padding import padding_of
from diag.watching.observe.loop.data.padding import sequences_of

FILLED = torch.tensor([[1, 2, 3, 0, 0, 0], [2, 1, 2, 3, 1, 2], [3, 3, 0, 0, 0, 0], [1, 2, 1, 2, 0, 0]])


def test_what_fills_the_ends_is_found_with_its_share():
    assert padding_of(FILLED) == (0, 9 / 24)
    assert padding_of(FILLED.flip(1)) == (0, 9 / 24)


@pytest.mark.parametrize(
    "rows",
    [
        FILLED.index_fill(1, torch.tensor([0]), 0),  # it begins sequences, too
        torch.cat([FILLED[:, :4], torch.zeros(4, 2, dtype=torch.long)], 1)[1::2].repeat(2, 1),  # all alike
        torch.tensor([[1, 2, 3, 9]] * 3 + [[1, 2, 3, 4]]),  # an end of sentence, once
        torch.arange(24).reshape(4, 6),
    ],
)
def test_ends_that_are_no_padding(rows):
    assert padding_of(rows) is None


def test_sequences_are_found_again_where_the_loop_made_one_row_of_them():
    outputs = torch.randn(4, 6, 5, requires_grad=True)
    for flat in (outputs.reshape(-1, 5), outputs.flatten(0, 1)):
        assert torch.equal(sequences_of(flat, FILLED.reshape(-1)), FILLED)
    assert torch.equal(sequences_of(outputs.transpose(1, 2), FILLED), FILLED)


@pytest.mark.parametrize(
    "target", [torch.zeros(24), torch.zeros(24, dtype=torch.long), torch.zeros(4, 2, 3).long()]
)
def test_other_targets_are_no_sequences(target):
    assert sequences_of(torch.randn(24, 5, requires_grad=True) * 2, target) is None
