"""Examples picked out of batches."""

import pytest
import torch

from diag.errors import InvalidInput
from diag.snapshot.batch import Batch
from diag.snapshot.picking import random_blocks_of


def test_blocks_are_disjoint_and_of_one_size():
    batches = [
        Batch((torch.arange(a, b).float()[:, None],), {}, torch.arange(a, b), b - a) for a, b in ((0, 9), (9, 23))
    ]
    blocks = random_blocks_of(batches, 5, seed=1)
    rows = [torch.cat([batch.targets for batch in block]).tolist() for block in blocks]
    assert [len(block) for block in rows] == [4] * 5  # of 23; three are left over
    assert len({row for block in rows for row in block}) == 20
    assert all(torch.equal(b.args[0][:, 0].long(), b.targets) for block in blocks for b in block)
    with pytest.raises(InvalidInput, match="30 blocks"):
        random_blocks_of(batches, 30, seed=1)
