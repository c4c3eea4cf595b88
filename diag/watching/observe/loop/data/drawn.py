"""Which rows of their data sets DataLoaders draw, and for what: training or evaluation.

A DataLoader draws the places of a batch before it fetches it; workers fetch several batches ahead, in their order.
A place in a Subset or a ConcatDataset is followed to the data set beneath.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset

from diag.snapshot.loop.data import DrawFacts, EvaluatedRows
from diag.watching.observe.loop.data.same import same_rows
from diag.watching.observe.loop.moment import Moment

ALWAYS = 4096  # batches of which each is counted, then those that are looked at closely
LOADERS, SETS = 8, 8
DRAWS_BEFORE_A_LOOK = 3  # of each row that came, on average, from which on checks look,
DRAWS_ENOUGH = 100  # and in all
LARGEST = 1 << 24  # rows of a data set that is followed
NONE: NDArray[numpy.int64] = numpy.zeros(0, numpy.int64)


class Drawn:
    """Follows the places that loaders draw. `current`: those of the batch that was fetched last."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._ahead: dict[int, tuple[Any, deque[Any]]] = {}
        self.current: NDArray[numpy.int64] = NONE
        self._dataset: Any = None
        self._dataset = self._stands_for = None  # the data set as the loop made it last, and the one that it is
        self._fresh = self._quiet = False  # no call of the model has used the batch; it was fetched under no_grad
        self._batches = 0
        self._sets: dict[int, TrainedRows] = {}
        self._known: dict[int, tuple[Any, Any]] = {}
        self._epoch = Epoch()
        self._evaluated: dict[int, tuple[Any, dict[int, set[int]]]] = {}  # kept, so that an id is one data set's
        self._training: dict[int, Any] = {}

    @property
    def dataset(self) -> Any:
        """The data set of the batch that was fetched last."""
        return self._dataset

    # What loaders do

    def indices_drawn(self, iterator: Any, indices: Any) -> None:
        """A DataLoader's iterator has drawn the places of a batch."""
        known = self._ahead.get(id(iterator))
        if known is None or known[0]() is not iterator:
            if len(self._ahead) >= LOADERS:
                del self._ahead[next(iter(self._ahead))]
            known = self._ahead[id(iterator)] = (weakref.ref(iterator), deque(maxlen=256))
        known[1].append(indices)

    def fetched(self, iterator: Any) -> None:
        """The iterator has given the batch of the places that it drew first."""
        known = self._ahead.get(id(iterator))
        drawn = known[1].popleft() if known is not None and known[0]() is iterator and known[1] else ()
        self._fresh, self._quiet = True, not torch.is_grad_enabled()
        self.current, self._dataset = NONE, self._known_as(getattr(iterator, "_dataset", None))
        self._batches += 1
        if self._batches > ALWAYS and not self._moment.attentive:
            return
        if isinstance(drawn, (list, tuple)) and drawn and isinstance(drawn[0], int):
            self.current = numpy.asarray(drawn, numpy.int64)

    def data_of(self, loader: Any) -> Any:
        """The data set of a DataLoader, or the one of training that has the same rows."""
        return self._known_as(getattr(loader, "dataset", None))

    def _known_as(self, dataset: Any) -> Any:
        """The data set, or the one of training that has the same rows where a loop makes it again each epoch."""
        if dataset is not self._dataset:
            known = id(dataset) in self._training or not torch.is_grad_enabled()
            training = () if known else self._training.values()
            self._dataset = dataset
            self._stands_for = next((one for one in training if same_rows(one, dataset)), dataset)
        return self._stands_for

    def epoch_begins(self) -> None:
        """A DataLoader begins an epoch."""
        self._epoch.close()

    # What the batch is used for

    def training_call(self) -> NDArray[numpy.int64]:
        """The model was called in training; the places of its rows in the loader's data set, none where they are
        not known."""
        places, dataset, fresh = self.current, self._dataset, self._fresh
        self._fresh = False
        if not fresh or self._quiet or not len(places) or dataset is None:
            return NONE
        if len(self._training) < SETS:
            self._training[id(dataset)] = dataset
        self._epoch.add(places, dataset)
        for base, rows in self._beneath(dataset, places):
            known = self._rows_of(base)
            if known is not None:
                known.trained[rows[rows < len(known.trained)]] = True
        if self._epoch.again >= DRAWS_BEFORE_A_LOOK:
            self._moment.news(("few rows", min(self._epoch.again, 2 * DRAWS_BEFORE_A_LOOK)), "drawn")
        return places

    def evaluated(self) -> bool:
        """The model was called without gradients; whether on rows of a loader that training does not use."""
        places, dataset, fresh = self.current, self._dataset, self._fresh
        self._fresh = False
        known = id(dataset) in self._evaluated or len(self._evaluated) < SETS
        if not fresh or dataset is None:
            return False
        if not len(places) or not known:
            return id(dataset) not in self._training
        _, found = self._evaluated.setdefault(id(dataset), (dataset, {}))
        for base, rows in self._beneath(dataset, places):
            if self._rows_of(base) is not None:
                found.setdefault(id(base), set()).update(rows.tolist())
        overlap = self._overlap(id(dataset), found)
        return not overlap.trained and not overlap.of_training

    def _rows_of(self, base: Any) -> TrainedRows | None:
        known = self._sets.get(id(base))
        if known is None and len(self._sets) < SETS and 0 < (size := _size(base)) <= LARGEST:
            known = self._sets[id(base)] = TrainedRows(base, numpy.zeros(size, bool))
        return known

    def _beneath(self, dataset: Any, places: NDArray[numpy.int64]) -> list[tuple[Any, NDArray[numpy.int64]]]:
        """The data sets that have the rows, and the rows' places there."""
        if type(dataset) is Subset:
            return self._beneath(dataset.dataset, self._places(dataset)[places])
        if type(dataset) is ConcatDataset:
            ends = numpy.asarray(dataset.cumulative_sizes)
            part = numpy.searchsorted(ends, places, side="right")
            starts = numpy.concatenate([[0], ends[:-1]])
            parts = [(dataset.datasets[i], places[part == i] - starts[i]) for i in numpy.unique(part)]
            return [found for d, rows in parts for found in self._beneath(d, rows)]
        return [(dataset, places)]

    def _places(self, subset: Any) -> NDArray[numpy.int64]:
        known = self._known.get(id(subset))
        if known is None or known[0] is not subset:
            if len(self._known) >= SETS:
                self._known.clear()
            known = self._known[id(subset)] = (subset, numpy.asarray(list(subset.indices), numpy.int64))
        return known[1]

    # Facts

    def facts(self) -> DrawFacts:
        """As plain data."""
        e = self._epoch.largest()
        total = _size(_bottom(e.dataset)) if e.dataset is not None else 0
        return DrawFacts(
            draws=e.draws,
            distinct=e.distinct,
            once=e.once,
            rows=total,
            evaluated=tuple(self._overlap(key, found) for key, (_, found) in self._evaluated.items()),
        )

    def _overlap(self, dataset: int, found: dict[int, set[int]]) -> EvaluatedRows:
        trained = comparable = 0
        for base, places_of in found.items():
            known = self._sets.get(base)
            if known is not None:
                comparable += len(places_of) if known.trained.any() else 0
                places = numpy.fromiter(places_of, numpy.int64, len(places_of))
                trained += int(known.trained[places[places < len(known.trained)]].sum())
        rows = sum(map(len, found.values()))
        return EvaluatedRows(rows, trained, dataset in self._training, comparable)


class TrainedRows:
    """The rows of a data set, and which of them training has used. It is kept, so that its id is its own."""

    def __init__(self, dataset: Any, trained: NDArray[numpy.bool_]) -> None:
        self.dataset, self.trained = dataset, trained


class Epoch:
    """How often each place was drawn in the epoch under way; of those that are over the one with most draws."""

    def __init__(self) -> None:
        self.dataset: Any = None
        self.times: NDArray[numpy.int32] = numpy.zeros(0, numpy.int32)
        self.draws = self.seen = self.distinct = self.once = 0
        self.again = 0
        self._best: Epoch | None = None

    def add(self, places: NDArray[numpy.int64], dataset: Any) -> None:
        """These places were drawn for training."""
        if dataset is not self.dataset:
            size = _size(dataset)
            self.dataset, self.draws, self.seen = dataset, 0, 0
            self.times = numpy.zeros(size if size <= LARGEST else 0, numpy.int32)
        if len(self.times) and places.max() < len(self.times):
            new = int((self.times[places] == 0).sum())  # a row twice in a batch counts twice
            self.seen = min(self.seen + new, len(self.times))
            numpy.add.at(self.times, places, 1)
            self.draws += len(places)
            self.again = self.draws // max(self.seen, 1) if self.draws >= DRAWS_ENOUGH else 0

    def close(self) -> None:
        """The epoch is over."""
        if self.draws and (self._best is None or self.draws > self._best.draws):
            self._best = self._summed()
        self.times[:] = 0
        self.draws = self.seen = 0

    def largest(self) -> Epoch:
        """The epoch with the most draws."""
        now = self._summed()
        return self._best if self._best is not None and self._best.draws >= now.draws else now

    def _summed(self) -> Epoch:
        found = Epoch()
        found.dataset, found.draws = self.dataset, self.draws
        found.distinct, found.once = int((self.times > 0).sum()), int((self.times == 1).sum())
        return found


def _size(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        return 0


def _bottom(dataset: Any) -> Any:
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset
