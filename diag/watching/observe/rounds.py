"""Which optimizers' steps make one round of the training, and so one row of the record.

The steps of several optimizers with no training pass of the model between them are one round; the same optimizer
stepping again begins the next. A round should be handed over as soon as its last optimizer has stepped, since only
then is nothing of the loop half done; which optimizer is the last is known from the rounds before.
"""

from __future__ import annotations

ROUNDS_REMEMBERED = 50  # rounds for which it counts that more optimizers took part
KINDS_OF_ROUNDS = 64  # different sets of optimizers that are remembered


class Rounds:
    """Follows rounds; optimizers are known by number (`id`)."""

    def __init__(self) -> None:
        self.stepped: set[int] = set()  # in the open round
        self.closed: set[int] = set()  # in the round that was handed over since the last training pass
        self._seen: dict[frozenset[int], int] = {}  # the rounds there were, and when last
        self._count = 0

    def is_again(self, optimizer: int) -> bool:
        """Whether this optimizer has stepped in the open round already, so that it begins the next."""
        return optimizer in self.stepped

    def is_late(self, optimizer: int) -> bool:
        """Whether its step belongs to a round that has been handed over: nothing else has happened since."""
        if self.stepped or not self.closed or optimizer in self.closed:
            return False
        self.closed.add(optimizer)
        self._remember(self.closed)
        return True

    def is_complete(self, optimizer: int, everything: bool) -> bool:
        """This optimizer has stepped; everything: all parameters have been stepped. Whether the round is over."""
        self.stepped.add(optimizer)
        if everything and len(self._seen) == 1 and frozenset(self.stepped) in self._seen:
            return True  # the usual case: one optimizer, and no other round was ever seen
        now = frozenset(self.stepped)
        recent = [kind for kind, when in self._seen.items() if self._count - when <= ROUNDS_REMEMBERED]
        return (everything or now in recent) and not any(now < kind for kind in recent)

    def close(self) -> None:
        """The open round is handed over."""
        self.closed, self.stepped = self.stepped, set()
        self._count += 1

    def gone_on(self) -> None:
        """A call of the model or a backward pass has followed, which ends the round that was handed over."""
        if self.closed:
            self._remember(self.closed)
            self.closed = set()

    def _remember(self, kind: set[int]) -> None:
        self._seen[frozenset(kind)] = self._count
        if len(self._seen) > KINDS_OF_ROUNDS:
            del self._seen[min(self._seen, key=self._seen.__getitem__)]
