"""A snapshot whose data are split over the ranks of torch.distributed: how its loss is summed over them.

The loss of all the data is the mean of the ranks' losses with the weights of their shares: by the number of
examples, or by what the examples count where they do not count alike (see `counting`).
"""

from __future__ import annotations

from torch import Tensor

from diag.distributed.together import Together
from diag.errors import Unsupported
from diag.snapshot.batch import COUPLED
from diag.snapshot.objective.counting import counted_batches, example_counts
from diag.snapshot.snapshot import Snapshot

UNLIKE = (
    "On some ranks all examples count alike and on others they do not, or examples have other numbers of targets "
    "on some ranks, so that the weights of the shares are not known; give every rank data of one kind."
)
COUPLED_SHARES = f"{COUPLED}, so that shares of the data do not add up."


def weight_of(snapshot: Snapshot, together: Together) -> float:
    """What this rank's loss counts in that of all the data."""
    return snapshot.once("weight among ranks", lambda: _weight(snapshot, together))


def _weight(snapshot: Snapshot, together: Together) -> float:
    _ = snapshot.batches  # which the ranks agree on by themselves
    counts: list[Tensor] | None = None

    def count() -> None:
        nonlocal counts
        if any(batch.coupled for batch in counted_batches(snapshot)):
            raise Unsupported(COUPLED_SHARES)
        counts = example_counts(snapshot)

    together.all_succeed(count)
    targets = [b.targets for b in snapshot.batches if isinstance(b.targets, Tensor)]
    each = sum(t.numel() for t in targets) / max(sum(len(t) for t in targets if t.ndim), 1)
    kind = float(counts is None) + 2 * each * (counts is None)
    if together.most(kind) - together.least(kind) > 1e-9:
        raise Unsupported(UNLIKE)
    own = float(snapshot.num_examples if counts is None else sum(float(c.sum()) for c in counts))
    return own / together.total(own)


def scale_of(snapshot: Snapshot, together: Together) -> float:
    """What shares of this rank's loss are multiplied by, so that their mean over all ranks is the loss of all."""
    return weight_of(snapshot, together) * snapshot.all_examples / snapshot.num_examples
