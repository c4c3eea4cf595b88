"""What the batches of training hold: rows that are far larger than the others or not finite, and batches whose rows
are all one.

Of each batch that is looked at the largest entry of each row is kept, on its device, and read when enough of them
have come together or the facts are asked for.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy
import torch
from torch import Tensor

from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.data import OUTLIER_ROW, ContentFacts, OddRow
from diag.watching.observe.loop.modes import is_dense
from diag.watching.observe.loop.moment import Moment

NUMBERS_OF_A_BATCH = 1 << 16  # of a batch that are looked at
BATCHES_READ_AT_ONCE = 16  # batches that are read at once
MOST_AWAY = 256  # batches on a device that wait
GAP_TO_OTHERS = 10.0  # times the largest row that is within that
ROWS_FOR_MEDIAN = 1024  # rows of which the median is taken
ROWS_BEFORE_JUDGING = 48  # rows before any is judged
ODD_ROWS_KEPT = 16
RAW = 8  # of a DataLoader's first batches whose rows are compared


class Contents:
    """Follows the inputs of training calls."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._waiting: deque[tuple[int, Any, Tensor]] = deque(maxlen=MOST_AWAY)
        self._usual: list[float] = []
        self._odd: dict[Any, OddRow] = {}
        self._rows = self._batches = self._large = self._whole = self._broken = 0
        self._raw = self._alike = 0

    def fetched(self, batch: Any) -> None:
        """A DataLoader gave a batch: are its rows, before the loop changes them, all one?"""
        if self._raw >= RAW:
            return
        x = next(iter(tensors_in(batch)), None)
        if x is None or not x.is_floating_point() or not _is_plain(x) or not x.is_cpu or not x.numel():
            return
        self._raw += 1
        self._alike += bool((x[: NUMBERS_OF_A_BATCH // max(x[0].numel(), 1) + 2] == x[:1]).all())
        if self._alike in (2, RAW):
            self._moment.news(("rows alike", self._alike), "contents")

    def training_call(self, args: Any, kwargs: Any, indices: Any) -> None:
        """The model was called in training with these rows of a data set, if that is known."""
        x = next((t for t in tensors_in((args, dict(kwargs))) if t.is_floating_point()), None)
        if x is None or not _is_plain(x) or not x.numel():
            return
        rows = x.detach().flatten(1)
        if rows.numel() > NUMBERS_OF_A_BATCH:
            rows = rows[:, :: -(-rows.numel() // NUMBERS_OF_A_BATCH)]
        self._batches += 1
        self._waiting.append((self._moment.step, indices if len(indices) == len(x) else (), rows.abs().amax(1)))
        if x.is_cpu and (len(self._waiting) >= BATCHES_READ_AT_ONCE or self._batches <= 3):
            self._read()

    def _read(self) -> None:
        if len(self._usual) + sum(len(s) for _, _, s in self._waiting) < ROWS_BEFORE_JUDGING:
            return  # they wait until it is known what is usual
        waiting, self._waiting = list(self._waiting), deque(maxlen=MOST_AWAY)
        if not waiting:
            return
        sizes = torch.cat([s.float() for _, _, s in waiting]).cpu()
        finite = sizes.isfinite()
        if len(self._usual) < ROWS_FOR_MEDIAN:
            self._usual += sizes[finite].tolist()[: ROWS_FOR_MEDIAN - len(self._usual)]
        self._rows += len(sizes)
        known = torch.tensor(self._usual, dtype=torch.float32)
        usual = float(known.median()) if self._usual else math.nan
        odd = ~finite
        if usual > 0:  # a heavy tail reaches far too, without a gap
            body = float(known[known <= OUTLIER_ROW * usual].max())
            odd |= sizes > max(OUTLIER_ROW * usual, GAP_TO_OTHERS * body)
        if odd.any():
            self._keep(odd.nonzero().flatten().tolist(), sizes, waiting, usual)

    def _keep(self, places: list[int], sizes: Tensor, waiting: list[Any], usual: float) -> None:
        starts = [0]
        for _, _, s in waiting:
            starts.append(starts[-1] + len(s))
        large = numpy.histogram([p for p in places if sizes[p].isfinite()], starts)[0]
        self._whole += int((2 * large >= numpy.diff(starts)).sum())
        for place in places:
            at = next(i for i in range(len(waiting)) if place < starts[i + 1])
            step, indices, _ = waiting[at]
            row = place - starts[at]
            size = float(sizes[place]) / usual
            self._large += math.isfinite(size)
            self._broken += not math.isfinite(size)
            index = int(indices[row]) if len(indices) else -1
            key = index if len(indices) else (step, row)
            if key not in self._odd and len(self._odd) < ODD_ROWS_KEPT:
                self._odd[key] = OddRow(step, row, index, size)
                self._moment.news(("odd rows", len(self._odd)), "contents")

    def facts(self) -> ContentFacts:
        """As plain data; what is on a device is read now."""
        self._read()
        return ContentFacts(
            batches=self._batches,
            rows=self._rows,
            large=self._large,
            whole=self._whole,
            broken=self._broken,
            odd=tuple(self._odd.values()),
            raw=self._raw,
            alike=self._alike,
        )


def _is_plain(x: Tensor) -> bool:
    """Whether it may hold rows of numbers, each of them in memory."""
    return type(x) is Tensor and is_dense(x) and x.ndim > 1 and len(x) > 1
