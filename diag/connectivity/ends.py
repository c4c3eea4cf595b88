"""The ends of a path compared with the two networks themselves: their own losses, not those that the path has.

A line blends floating-point entries only. What else a network holds (codes, masks, attributes, buffers that its
state dict leaves out) stays the first one's, and BatchNorm statistics that are measured again are not the
networks' own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diag.checkpoints.unwrap import bare_model
from diag.connectivity.example_scores import Scores, score_examples
from diag.connectivity.interpolation import Interpolation, NetworkState
from diag.connectivity.interpolation_profile import Profile
from diag.errors import Unsupported, named
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot

SAME_LOSS_AT_END = 1e-3  # relative: of a loss at an end and the network's own
NOT_THERE = (
    "The path does not {} at the {} network: there the loss is {:.4g}, and {:.4g} is the network's own, as the two "
    "differ in {}; give two networks that differ in floating-point entries of their state dicts only."
)
NOT_IN_STATE_DICTS = "what their state dicts do not hold (attributes, buffers that are not saved)"


@dataclass(frozen=True)
class Ends:
    """The mean loss and error of each of the two networks as it is; errors are NaN where there are no classes."""

    losses: tuple[float, float]
    errors: tuple[float, float]


def checked_ends(path: Interpolation, end: NetworkState, line: Profile, blended: bool) -> Ends:
    """The two networks' own losses. blended: whether `line` has the entries at its ends that the networks have.

    Raises Unsupported where the straight line between them does not begin or end with these losses.
    """
    own = (_scores_of(path, path.snapshot.model), _own_scores_of_second(path, end))
    losses = tuple(_mean(s.losses) for s in own)
    at_ends = [float(line.losses[0]), float(line.losses[-1])]
    if not blended:
        at_ends = [_mean(path.on_line(end, alpha).losses) for alpha in (0.0, 1.0)]
    for which, verb, there, itself in zip(("first", "second"), ("begin", "end"), at_ends, losses, strict=True):
        if not _agree(there, itself):
            raise Unsupported(NOT_THERE.format(verb, which, there, itself, _differing(path.start, end)))
    errors = tuple(_mean(s.errors) for s in own)
    return Ends((losses[0], losses[1]), (errors[0], errors[1]))


def check_same_ends(line: Profile, other: Profile) -> None:
    """Raise Unsupported where another path between the two networks does not have the line's ends."""
    for which, verb, place in (("first", "begin", 0), ("second", "end", -1)):
        there, itself = float(other.losses[place]), float(line.losses[place])
        if not _agree(there, itself):
            raise Unsupported(NOT_THERE.format(verb, which, there, itself, NOT_IN_STATE_DICTS))


def _own_scores_of_second(path: Interpolation, end: NetworkState) -> Scores:
    other_network = path.snapshot.other
    other_network = other_network.model if isinstance(other_network, Snapshot) else other_network
    if isinstance(other_network, nn.Module):
        return _scores_of(path, bare_model(other_network))
    own = path.copy.state_dict()
    kept = {n: v for n, v in other_network.items() if n in own} if isinstance(other_network, Mapping) else {}
    if all(isinstance(value, Tensor) for value in kept.values()):
        return path.evaluate(end)
    second = copy.deepcopy(path.copy)  # what a module keeps in its state dict besides tensors is a part of it
    second.load_state_dict({**own, **kept})
    return _scores_of(path, second)


def _scores_of(path: Interpolation, model: nn.Module) -> Scores:
    with preserved(model), torch.no_grad():
        return score_examples(model, path.snapshot)


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _agree(a: float, b: float) -> bool:
    x, y = torch.tensor([a, b], dtype=torch.float64)
    return bool(torch.isclose(x, y, rtol=SAME_LOSS_AT_END, atol=1e-6, equal_nan=True))


def _differing(start: Mapping[str, Tensor], end: NetworkState) -> str:
    """The entries that differ and cannot be blended, by name."""
    whole = [n for n, t in start.items() if not t.is_floating_point() and not t.is_complex()]
    names = [n for n in whole if not torch.equal(start[n], end[n].to(start[n].device))]
    names = [n for n in names if not n.endswith("num_batches_tracked")]
    return f"entries that cannot be blended ({named(names)})" if names else NOT_IN_STATE_DICTS
