"""Layers that are one object, parameters that are tied, and separate ones that start with equal numbers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from diag.distributed.placement import own_part
from diag.snapshot.loop.network import LayerFacts
from diag.watching.observe.loop.moment import Moment

ENTRIES_COMPARED_FIRST = 32  # entries that are compared first
STEPS_BEFORE_COMPARISON = 3  # after which equal parameters are compared again
MOST_PAIRS = 64

Pair = tuple[str, str]


class Layers:
    """Looks at the model when the watch begins and at its first sweeps."""

    def __init__(self, model: nn.Module, moment: Moment) -> None:
        self._model, self._moment = model, moment
        self._shared = shared_modules(model)
        self._tied = tied_names(model)
        self._equal = equal_parameters(model)
        self._embeddings = tuple(pair for pair in self._equal if is_embedding_and_head(model, pair))
        self._untied = untied_by_configuration(model)
        self._still: tuple[Pair, ...] = ()
        self._looks = 0
        if self._shared or self._untied:
            moment.news("layers", "layers")

    def sweep(self) -> None:
        """The model's parameters are swept, before a step."""
        self._looks += 1
        now = set(tied_names(self._model))
        for names in self._tied:
            if names not in now:
                self._untied = tuple({*self._untied, (names[0], names[1])})
                self._moment.news("untied", "layers")
        if self._looks > STEPS_BEFORE_COMPARISON and self._equal:
            parameters = dict(self._model.named_parameters())
            self._still = tuple(
                (a, b)
                for a, b in self._equal
                if a in parameters and b in parameters and is_equal(*(own_part(parameters[n]) for n in (a, b)))
            )
            if self._still:
                self._moment.news("still equal", "layers")

    def facts(self) -> LayerFacts:
        """As plain data."""
        return LayerFacts(
            self._shared, self._tied, self._untied, self._equal, self._still, self._embeddings, self._looks
        )


def shared_modules(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Modules with parameters that stand at several places of one container."""
    found = []
    for name, container in model.named_modules():
        if isinstance(container, (nn.ModuleList, nn.Sequential)):
            places: dict[int, list[str]] = defaultdict(list)
            for key, child in container._modules.items():
                if child is not None and next(child.parameters(), None) is not None:
                    places[id(child)].append(f"{name}.{key}".lstrip("."))
            found += [tuple(names) for names in places.values() if len(names) > 1]
    return tuple(found)


def tied_names(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        names[id(p)].append(name)
    return tuple(tuple(n) for n in names.values() if len(n) > 1)


def equal_parameters(model: nn.Module) -> tuple[Pair, ...]:
    """Pairs of separate trainable parameters that hold equal numbers which are not all the same number."""
    groups: dict[Any, list[str]] = defaultdict(list)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
    parameters = {n: own for n, p in trained.items() if (own := own_part(p)).numel() > 4}
    for name, p in parameters.items():
        groups[(tuple(p.shape), p.dtype)].append(name)
    pairs: list[Pair] = []
    for names in groups.values():
        if len(names) < 2:
            continue
        samples = torch.stack([_some(parameters[n]) for n in names]).cpu()
        kinds: dict[bytes, list[str]] = defaultdict(list)
        for name, row in zip(names, samples, strict=True):
            if bool((row != row[0]).any()):
                kinds[row.double().numpy().tobytes()].append(name)
        pairs += [(same[0], other) for same in kinds.values() for other in same[1:]]
    return tuple((a, b) for a, b in pairs[:MOST_PAIRS] if is_equal(parameters[a], parameters[b]))


def _some(p: torch.Tensor) -> torch.Tensor:
    flat = p.reshape(-1)
    return flat[:: max(len(flat) // ENTRIES_COMPARED_FIRST, 1)][:ENTRIES_COMPARED_FIRST]


def is_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two parameters hold the same numbers."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def is_embedding_and_head(model: nn.Module, pair: Pair) -> bool:
    """Whether one of the two belongs to an embedding and the other to a linear layer."""
    owners = [_owner(model, name) for name in pair]
    return any(isinstance(o, nn.Embedding) for o in owners) and any(isinstance(o, nn.Linear) for o in owners)


def _owner(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None


def untied_by_configuration(model: nn.Module) -> tuple[Pair, ...]:
    """Embedding and head of a model whose configuration ties them (as Hugging Face's do) and that are two
    tensors."""
    tie = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    ins, outs = getattr(model, "get_input_embeddings", None), getattr(model, "get_output_embeddings", None)
    if tie is not True or not callable(ins) or not callable(outs):
        return ()
    try:
        weights: list[Any] = [getattr(f(), "weight", None) for f in (ins, outs)]
    except Exception:  # the model's own code
        return ()
    if any(w is None for w in weights) or weights[0] is weights[1] or weights[0].shape != weights[1].shape:
        return ()
    names = {id(p): n for n, p in model.named_parameters()}
    return ((names.get(id(weights[0]), "embedding"), names.get(id(weights[1]), "head")),)
