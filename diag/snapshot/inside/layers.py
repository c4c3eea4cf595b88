"""The output of every layer, example by example, pass by pass: for sums over all layers that keep no features.

A row is an example; where the labels are one a token it is a token, those with an ignored label left out. Features
at several positions of one example (pixels, tokens) are averaged over the positions, unless the labels are one
each; of tokens, those that a mask or the embedding's padding index says are padding are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diag.errors import InvalidInput, MissingQuantity
from diag.snapshot.batch import Batch, map_tensors
from diag.snapshot.explain import CALL_ERRORS, explained
from diag.snapshot.forward import comparisons, forward_pass
from diag.snapshot.inside.earlier import earlier
from diag.snapshot.inside.padding import tokens_that_count
from diag.snapshot.objective.comparison import Comparison, output_tensor
from diag.snapshot.objective.same_rows import matching_rows
from diag.snapshot.pass_quantities import labels as labels_of
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot

Take = Callable[[str, Tensor, int], None]
PASSING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity, nn.Flatten)
CHANNELS_FIRST = (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.InstanceNorm1d)


class LayerOutputs:
    """The outputs of the layers on the data; each call of `visit` passes over them once.

    visit(take, noise=0): one forward pass, in which `take(layer, rows (b, d), first row)` is called for every layer
    and batch, in order; `noise` is added to floating inputs, in units of their own standard deviation. labels: the
    class number of each row (n,), or None where the targets are none.
    """

    def __init__(self, visit: Callable[[Take, float], None], labels: Tensor | None) -> None:
        self._visit, self.labels = visit, labels

    def visit(self, take: Take, noise: float = 0.0) -> None:
        """Hand the outputs of every layer on each batch to `take`, with noise of this size on the inputs."""
        self._visit(take, noise)


def layer_outputs(snapshot: Snapshot) -> LayerOutputs:
    """The outputs of every leaf module of the model, and its inputs where they are one floating tensor."""
    rows = snapshot.once("rows of the layers", lambda: _rows_of(snapshot))
    labels = labels_of(snapshot) if any(r.labelled for r in rows) else None
    return LayerOutputs(lambda take, noise: _run(snapshot, rows, take, noise), labels)


def previous_layer_outputs(snapshot: Snapshot) -> LayerOutputs:
    """The same for the snapshot's `previous` state, on the same data."""
    return layer_outputs(earlier(snapshot))


def as_layer_outputs(
    layer_values: LayerOutputs | Mapping[str, Tensor] | Tensor, labels: Tensor | None = None
) -> LayerOutputs:
    """Features in memory as the outputs of layers: a tensor (n, d), or several of them by name."""
    if isinstance(layer_values, LayerOutputs):
        return layer_values
    named = layer_values if isinstance(layer_values, Mapping) else {"features": torch.as_tensor(layer_values)}

    def visit(take: Take, noise: float) -> None:
        for name, points in named.items():
            step = max(1, (1 << 22) // max(points.shape[1], 1))
            for start in range(0, len(points), step):
                take(name, points[start : start + step], start)

    return LayerOutputs(visit, labels)


def _rows_of(snapshot: Snapshot) -> list[_Rows]:
    """For each batch which rows of a layer's output are examples or tokens."""
    try:
        found = comparisons(snapshot)
    except MissingQuantity:
        return [_Rows(batch.size) for batch in snapshot.batches]
    looked = forward_pass(snapshot).looked
    return [
        _Rows(batch.size, comparison, seen.outputs)
        for batch, comparison, seen in zip(snapshot.batches, found, looked, strict=True)
    ]


def _run(snapshot: Snapshot, rows_of: list[_Rows], take: Take, noise: float) -> None:
    generator = torch.Generator().manual_seed(snapshot.seed)
    first = 0
    try:
        with preserved(snapshot.model), torch.no_grad():
            for batch, rows in zip(snapshot.batches, rows_of, strict=True):
                snapshot.deadline.check()
                noisy = _with_noise(batch, noise, generator)
                rows.counted = tokens_that_count(snapshot.model, batch)
                with _listening(snapshot.model, rows, take, first):
                    if len(noisy.args) == 1 and isinstance(noisy.args[0], Tensor):
                        rows.pass_on("input", None, noisy.args[0], take, first)
                    outputs = noisy.forward(snapshot.model)
                if isinstance(outputs, Tensor):
                    floating(outputs)
                first += rows.count
    except CALL_ERRORS as error:
        raise explained(snapshot.model, snapshot.batches, error) from error


def _with_noise(batch: Batch, noise: float, generator: torch.Generator) -> Batch:
    if not noise:
        return batch

    def add(t: Tensor) -> Tensor:
        if not t.is_floating_point() or t.numel() < 2:
            return t
        drawn = torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t)
        return t + noise * t.std() * drawn

    return replace(batch, args=map_tensors(add, batch.args), kwargs=map_tensors(add, batch.kwargs))


def _listening(model: nn.Module, rows: _Rows, take: Take, first: int) -> ExitStack:
    calls: dict[str, int] = {}

    def hear(name: str, module: nn.Module, output: Any) -> None:
        number = calls[name] = calls.get(name, -1) + 1
        rows.pass_on(f"{name} #{number + 1}" if number else name, module, output, take, first)

    stack = ExitStack()
    for name, module in model.named_modules():
        if not any(module.children()) and not isinstance(module, PASSING):
            hook = module.register_forward_hook(lambda m, a, o, n=name: hear(n, m, o))
            stack.callback(hook.remove)
    return stack


def floating(output: Tensor) -> Tensor:
    """The model's output as it is. Raises InvalidInput for one that is not of floating-point numbers."""
    if output.is_floating_point() or output.is_complex():
        return output
    raise InvalidInput(f"The model returns a tensor of type {output.dtype}; expected floating-point outputs.")


class _Rows:
    """Which rows of a batch's outputs are examples, or tokens with a label each, and how positions are joined."""

    def __init__(self, size: int, comparison: Comparison | None = None, outputs: Any = None) -> None:
        self.size, self.labelled = size, comparison is not None
        self.kept: Tensor | None = None  # numbers of the rows to hand on; None: all
        self.positions: tuple[int, ...] | None = None  # axes that a token's row is counted by
        self.count = size
        self.counted: Tensor | None = None  # (examples, tokens): which are no padding
        self._channels_first: tuple[int, ...] = ()
        if comparison is not None:
            self.count = int(comparison.counted.sum())
            if len(comparison.labels) == size:
                self.kept = comparison.counted.nonzero()[:, 0]
            else:
                self._one_each(comparison, output_tensor(outputs))

    def _one_each(self, comparison: Comparison, z: Tensor) -> None:
        """The labels are one a position: their rows are found by the logits that stand there."""
        classes = comparison.logits.shape[-1]
        z = z.movedim(1, -1) if z.ndim > 2 and z.shape[-1] != classes and z.shape[1] == classes else z
        chosen = matching_rows(comparison.logits, z) if z.shape[-1] == classes else None
        if chosen is None:
            raise MissingQuantity("the labels are one a position, and which position each belongs to is not known.")
        self.positions = tuple(z.shape[:-1])
        self.kept = chosen[comparison.counted.to(chosen.device)]

    def pass_on(self, name: str, module: nn.Module | None, output: Any, take: Take, first: int) -> None:
        """Hand the output on as rows (b, d), where its axes say what they are."""
        if isinstance(output, (tuple, list)) and output:
            output = output[0]
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.numel() == 0:
            return
        if not output.ndim:  # a loss among the modules
            return
        if isinstance(module, CHANNELS_FIRST) and output.ndim == 3:
            self._channels_first = tuple(output.shape)
        rows = self._rows(output.detach())
        if rows is not None:
            take(name, rows if self.kept is None else rows[self.kept.to(rows.device)], first)

    def _rows(self, t: Tensor) -> Tensor | None:
        channels_first = t.ndim >= 4 or tuple(t.shape) == self._channels_first
        tokens = t.movedim(1, -1) if channels_first else t
        if self.positions is not None:
            return tokens.flatten(0, -2) if tuple(tokens.shape[:-1]) == self.positions else None
        if t.shape[0] != self.size:
            return None
        if t.ndim <= 2:
            return t.reshape(len(t), -1)
        if self.counted is not None and tokens.shape[:-1] == self.counted.shape:
            weights = self.counted.to(t.device)[..., None]
            return torch.where(weights, tokens, 0).sum(1) / weights.sum(1)  # padding may hold what is not finite
        return t.flatten(2).mean(2) if channels_first else t.flatten(1, -2).mean(1)
