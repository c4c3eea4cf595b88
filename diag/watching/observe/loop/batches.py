"""Which batches training sees, and in which order: the model's inputs, what DataLoaders give, and the labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, IterableDataset

from diag.snapshot.batch import tensors_in
from diag.snapshot.loop.data import BatchFacts
from diag.watching.observe.loop.data.stream import Stream, key_of_batch, out_of_order, sampled
from diag.watching.observe.loop.moment import Moment, due

PARTS, SMALL_PART = 4, 1 << 14  # tensors of a batch that are told apart, and bytes up to which by all numbers
SEVERAL_EPOCHS = 3  # of one loader, after which the schedule is looked at
PENDING = 64  # calls of the model before a backward pass that are kept
COUNTED_ALWAYS = 16  # batches whose labels are counted, then ever fewer
CLASSES_NEWS = (6, 12, 16)  # batches counted after which checks look at the classes
# Of torch: they give one row after the other.
SAMPLERS_OF_ROWS = ("RandomSampler", "SequentialSampler", "DistributedSampler", "WeightedRandomSampler")
CLASSES = 4096  # more distinct targets than these are no classes


class Batches:
    """Follows the inputs of training calls, the labels of loss calls and the DataLoaders."""

    def __init__(self, model: nn.Module, moment: Moment) -> None:
        self._model, self._moment = model, moment
        self._calls = 0
        self._inputs, self._raw = Stream(moment), Stream(moment)  # of the model, and as loaders give them
        self._raw_key: int | None = None
        self._pending: list[tuple[int, int | Tensor, bool, int | None, Any]] = []  # until a backward pass
        self._loader = 0  # the one whose epoch began last
        self._empty, self._empty_loader = 0, (0, 0)
        self._readers = 0  # workers that read one stream
        self.fetched = False  # a DataLoader gave a batch since the last call
        self._loaders = self._loader_batches = 0
        self._shuffled: bool | None = None
        self._begun: int | None = None  # the data set whose epoch began last, until a training call
        self._epochs: dict[int, int] = {}  # by data set, those with training calls
        self._batches_each = self._again = 0
        self._by_rows = self._begun_by_rows = False
        self._labels: dict[int, int] = {}
        self._counted = self._distinct = self._targets = 0
        self._labels_away: list[Tensor] = []
        self._label_calls = self._continued = self._followed = 0
        self._last_classes: tuple[int, set[int]] = (-1, set())

    # Inputs

    def training_call(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """The model was called in training."""
        self._calls += 1
        if not self._moment.attentive:
            return
        if self._begun is not None:
            epochs = self._epochs[self._begun] = self._epochs.get(self._begun, 0) + 1
            self._again = self._moment.step if epochs > 1 else self._again
            if epochs == SEVERAL_EPOCHS:
                self._moment.news("several epochs", "batches")
            self._by_rows = self._begun_by_rows
            self._batches_each, self._begun = self._loader_batches, None
        tensor = next((a for a in args if isinstance(a, Tensor)), None)
        if tensor is None:
            tensor = next((t for t in tensors_in((args, dict(kwargs)))), None)
        key = None if tensor is None else self._inputs.key(self._calls, tensor)
        fetched, self.fetched = self.fetched, False
        raw, self._raw_key = self._raw_key, None
        if key is not None and len(self._pending) < PENDING:
            self._pending.append((self._calls, key, fetched, raw, (self._model.training, self._loader)))

    def backward(self) -> None:
        """A backward pass reached the model: the calls before it were training. Those in another mode, or on
        another loader's batches, were not: an evaluation that keeps graphs without using them."""
        pending, self._pending = self._pending, []
        for call, key, fetched, raw, kind in pending:
            if kind == pending[-1][-1]:
                self._inputs.add(call, key, fetched)
                if raw is not None:
                    self._raw.add(call, raw, fetched)

    def batch_fetched(self, batch: Any) -> None:
        """A DataLoader gave this batch; what the loop makes of it may differ each time."""
        self.fetched = True
        parts = tensors_in(batch)[:PARTS] if torch.is_grad_enabled() else []
        usual = all(type(t) is Tensor and t.is_cpu and t.numel() and t.layout is torch.strided for t in parts)
        self._raw_key = hash(tuple(_key(t) for t in parts)) if parts and usual else None

    # DataLoaders

    def loader_started(self, loader: Any, dataset: Any) -> None:
        """An epoch of a DataLoader begins, over this data set: both may be made again for each."""
        self._loaders += 1
        self._look_for_batches(loader)
        self._begun, self._loader = id(loader if dataset is None else dataset), id(loader)
        try:
            self._loader_batches = len(loader)
        except TypeError:  # of a stream nobody knows the length
            self._loader_batches = 0
        sampler = type(getattr(loader, "sampler", None)).__name__
        batches = getattr(loader, "batch_sampler", None)
        # Of a loader that was given its batch sampler, batch_size is None.
        whole = type(batches) is BatchSampler and batches.batch_size > 1
        streams = isinstance(getattr(loader, "dataset", None), IterableDataset)
        self._readers = int(getattr(loader, "num_workers", 0)) if streams else 0
        self._begun_by_rows = whole and sampler in SAMPLERS_OF_ROWS
        self._shuffled = {"RandomSampler": True, "SequentialSampler": False}.get(sampler)

    def _look_for_batches(self, loader: Any) -> None:
        try:
            if len(loader):
                return
            rows = len(loader.dataset)
        except TypeError:  # of a stream nobody knows the length
            return
        self._empty, self._empty_loader = self._empty + 1, (rows, int(loader.batch_size or 0))
        self._moment.news("no batch", "batches")

    @property
    def loader_batches(self) -> int:
        """How many batches the loader has whose epoch began last, 0 where that is not known."""
        return self._loader_batches

    # Labels

    def targets(self, targets: Any) -> None:
        """A loss of a training call was computed with these targets, if they are class numbers."""
        self._label_calls += 1
        if self._label_calls > COUNTED_ALWAYS and not due(self._label_calls // COUNTED_ALWAYS):
            return
        if self._label_calls > COUNTED_ALWAYS and self._label_calls % COUNTED_ALWAYS:
            return
        if not isinstance(targets, Tensor) or targets.dtype.is_floating_point or targets.dtype.is_complex:
            return
        if targets.device.type == "cpu":
            self._count(targets)
        elif len(self._labels_away) < COUNTED_ALWAYS:
            self._labels_away.append(targets.detach().reshape(-1)[:CLASSES].clone())

    def _count(self, targets: Tensor) -> None:
        values, counts = targets.detach().reshape(-1)[:CLASSES].unique(return_counts=True)
        self._counted += 1
        self._distinct += len(values)
        self._targets += int(counts.sum())
        call, before = self._last_classes
        now = set(values.tolist())
        if self._label_calls == call + 1 and targets.is_cpu:
            self._followed += 1
            self._continued += bool(now & before)
        self._last_classes = (self._label_calls, now)
        if self._counted in CLASSES_NEWS:
            self._moment.news(("classes", self._counted), "batches")
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            if value in self._labels or len(self._labels) < CLASSES:
                self._labels[value] = self._labels.get(value, 0) + count

    # Facts

    def facts(self) -> BatchFacts:
        """As plain data; what is on a device is read now."""
        self._inputs.wait()
        stream = max((self._inputs, self._raw), key=lambda kept: kept.repeats)
        waiting, self._labels_away = self._labels_away, []
        for targets in waiting:
            self._count(targets.cpu())
        n = max(self._counted, 1)
        return BatchFacts(
            calls=self._inputs.hashed,
            lag=stream.lag,
            steps_apart=stream.steps_apart,
            repeats=stream.repeats,
            out_of_order=out_of_order(stream),
            since=stream.since,
            fetched=stream.fetched,
            loaders=self._loaders,
            empty=self._empty,
            empty_rows=self._empty_loader[0],
            empty_size=self._empty_loader[1],
            epochs=max(self._epochs.values(), default=0),
            again=self._again,
            loader_batches=self._batches_each or self._loader_batches,
            by_rows=self._by_rows,
            readers=self._readers,
            pairs=self._raw.pairs,
            equal_pairs=self._raw.equal,
            shuffled=self._shuffled,
            label_counts=dict(sorted(self._labels.items())),
            counted=self._counted,
            distinct=self._distinct / n,
            batch_size=self._targets / n,
            continued=self._continued / max(self._followed, 1),
        )


def _key(tensor: Tensor) -> int:
    small = tensor.numel() * tensor.element_size() <= SMALL_PART
    return key_of_batch(tensor if small else sampled(tensor), tensor.shape)
