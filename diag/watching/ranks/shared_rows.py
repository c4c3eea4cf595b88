"""The numbers of one step put together over the ranks: one small sum of squares a step, in the background.

The 2-norm of a tensor is the root of the sum of its parts' squares; where several ranks hold the same part it
counts once. The loss is the mean over ranks, weighted with the examples that each trained on. What some rank did
not observe and no other can stand in for is left out, and never replaced by one rank's part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import nn

from diag.distributed.link import Link, Message
from diag.distributed.placement import Placement, gradient_lies_alike
from diag.watching.observe.rows import Columns, Row

FIELDS = ("gradient_norm", "parameter_norm", "update_norm", "distance", "applied")
# Number of the message; examples; loss x examples; ranks that saw a loss; ranks that skipped the step.
STEP_HEAD = 5
STEP_MESSAGES = "steps"
GRADIENTS_LOOKED = 3  # steps at which the placement of gradients is looked at
BEHIND_STEPS, BEHIND_SECONDS = 16, 60.0  # the others are this far behind: they make other steps than this rank
CLOSING = 5.0  # seconds
ENDED = (
    "From step {:,} on the ranks' numbers are not put together any more ({}): the loss, and the norms of what is "
    "sharded, are left out; those of what each rank holds whole are rank 0's."
)
LOSS_NOT_SEEN = "Not all ranks see their loss, so that no mean over ranks is recorded at such steps."


class SharedRows:
    """Asks for a row's numbers over the ranks and puts them in.

    placements: of each column. `link` None: there is nobody to ask. note(key, sentence): tell once.
    """

    def __init__(
        self,
        link: Link | None,
        placements: Sequence[Placement],
        parameters: Sequence[nn.Parameter],
        note: Callable[[str, str], None],
    ) -> None:
        self._link, self._parameters, self._note = link, parameters, note
        self._known = numpy.array([p.known for p in placements])
        self._sharded = numpy.array([p.sharded for p in placements])
        self._copies = numpy.array([max(p.copies, 1) for p in placements], float)
        self._gradient_known = self._known.copy()
        self._sent = self._taken = 0
        self._since = time.monotonic()

    def ask(self, row: Row) -> Message | _Nothing:
        """Send this rank's part of the row."""
        if self._link is None:
            return _Nothing()
        self._sent += 1
        try:
            return self._sent_to(self._link, row)
        except Exception as error:
            self._link.broke(error)  # the others would wait for this rank's part
            return _Nothing()

    def _sent_to(self, link: Link, row: Row) -> Message:
        if self._sent <= GRADIENTS_LOOKED:
            self._look_at_gradients()
        if self._sent - self._taken > BEHIND_STEPS and time.monotonic() - self._since > BEHIND_SECONDS:
            link.broke("the ranks do not make the same steps: another is far behind")
        return link.sum(STEP_MESSAGES, torch.from_numpy(self._vector(row)))

    def merge(self, row: Row, answer: Any) -> None:
        """Put the ranks' numbers into the row."""
        self._taken, self._since = self._taken + 1, time.monotonic()
        total = answer.result(CLOSING)
        if total is not None and self._link is not None:
            if total[0] == self._taken * self._link.world:
                self._put(row, total.numpy(), self._link.world)
                return
            self._link.broke("the ranks do not make the same steps")
        if self._link is not None:
            row.losses = []
            self._note("ranks ended", ENDED.format(self._taken, self._link.reason))
        self._leave_out(row)

    # This rank's part

    def _vector(self, row: Row) -> NDArray[numpy.float64]:
        width = len(self._parameters)
        vector = numpy.zeros(STEP_HEAD + 2 * len(FIELDS) * width)
        examples = max(row.examples, 1)
        vector[0], vector[1], vector[4] = self._sent, examples, float(bool(row.skipped))
        if row.losses:
            vector[2], vector[3] = examples * sum(row.losses) / len(row.losses), 1.0
        table = vector[STEP_HEAD:].reshape(len(FIELDS), 2, width)
        for name, columns, values in self._named(row):
            known = self._known_of(name)[columns]
            mine = columns[known]
            squares = numpy.square(numpy.asarray(values, float)[known])
            table[FIELDS.index(name), 0, mine] = squares / numpy.where(self._sharded, self._copies, 1.0)[mine]
            table[FIELDS.index(name), 1, mine] = 1.0
        return vector

    def _named(self, row: Row) -> list[tuple[str, Columns, Any]]:
        return [*row.norms, *(("applied", columns, values) for columns, values in row.applied)]

    def _known_of(self, name: str) -> NDArray[numpy.bool_]:
        return self._gradient_known if name in ("gradient_norm", "applied") else self._known

    def _look_at_gradients(self) -> None:
        """A gradient may lie in another way than its parameter: a sum that no rank has yet."""
        for column, p in enumerate(self._parameters):
            self._gradient_known[column] &= gradient_lies_alike(p) is not False

    # What the ranks have in common

    def _put(self, row: Row, total: NDArray[numpy.float64], world: int) -> None:
        if total[3] == world:
            row.losses = [float(total[2] / total[1])]
        elif total[3]:
            row.losses = [] if math.isfinite(total[2]) else [math.nan]
            self._note("loss over ranks", LOSS_NOT_SEEN)
        row.skipped = total[4] > 0
        table = total[STEP_HEAD:].reshape(len(FIELDS), 2, len(self._parameters))
        common = {name: self._norms(table[i, 0], table[i, 1], world) for i, name in enumerate(FIELDS)}
        row.norms = [(name, *self._covered(row, name, columns, common[name])) for name, columns, _ in row.norms]
        row.applied = [self._covered(row, "applied", columns, common["applied"]) for columns, _ in row.applied]
        row.clips = [self._clip(row, *clip) for clip in row.clips]

    def _norms(
        self, squares: NDArray[numpy.float64], seen: NDArray[numpy.float64], world: int
    ) -> NDArray[numpy.float64]:
        """The norm of each column; -1 where a part is missing."""
        found = numpy.full(len(squares), -1.0)
        whole = numpy.where(self._sharded, seen == world, seen > 0) | ~numpy.isfinite(squares)
        with numpy.errstate(invalid="ignore"):
            norms = numpy.sqrt(squares / numpy.where(self._sharded, 1.0, numpy.maximum(seen, 1.0)))
        found[whole] = norms[whole]
        return found

    def _covered(
        self, row: Row, name: str, columns: Columns, norms: NDArray[numpy.float64]
    ) -> tuple[Columns, NDArray[numpy.float64]]:
        kept = columns[norms[columns] != -1]
        row.partial |= len(kept) < len(columns) and name in ("gradient_norm", "applied")
        return kept, norms[kept]

    def _clip(self, row: Row, columns: Columns, limit: Any, total: Any) -> tuple[Columns, Any, Any]:
        """Where gradients are sharded this rank does not know their norm, but the ranks together do."""
        if self._sharded[columns].any():
            inside = [v[numpy.isin(c, columns)] for n, c, v in row.norms if n == "gradient_norm"]
            total = math.sqrt(sum(float(v @ v) for v in inside))
        return columns, limit, total

    def _leave_out(self, row: Row) -> None:
        """Nobody answers: only what this rank holds whole is known."""
        whole = self._known & ~self._sharded
        for name, columns, _ in row.norms:
            row.partial |= name == "gradient_norm" and not whole[columns].all()
        row.norms = [(n, c[whole[c]], numpy.asarray(v)[whole[c]]) for n, c, v in row.norms]
        row.applied = [(c[whole[c]], numpy.asarray(v)[whole[c]]) for c, v in row.applied]


class _Nothing:
    """The answer where nobody is asked."""

    def ready(self) -> bool:
        return True

    def result(self, seconds: float | None = None) -> None:
        return None
