"""Which layers make the barrier between two networks: one layer on the path, all others at one end, both ways.

Also the angle at which two networks left a common ancestor. Sources: Singh et al. 2024 for layer-wise
barriers and the angle; the 0-1 form of a layer's barrier is not theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from diag.connectivity.fit import check_states_fit
from diag.connectivity.interpolation import Interpolation, NetworkState
from diag.connectivity.interpolation_profile import Profile
from diag.errors import InvalidInput
from diag.snapshot.parameters import layer_of


@dataclass(frozen=True)
class LayerBarrier:
    """The loss barrier of moving one layer: the others as in the first network, or as in the second."""

    from_first: float
    from_second: float


def layer_barriers(
    path: Interpolation,
    end: NetworkState,
    *,
    alphas: Sequence[float] = (0.25, 0.5, 0.75),
    norm_stats: str = "reset",
) -> dict[str, LayerBarrier]:
    """By module that owns parameters, in the model's order: max_a of the loss with that layer at `a`, over the
    chord between the two whole networks. Each costs two profiles of len(alphas) + 2 points.
    """
    whole = path.profile(end, [], norm_stats=norm_stats)
    first, last = float(whole.losses[0]), float(whole.losses[-1])
    found = {}
    for layer, names in parameters_by_layer(path.copy).items():
        forth = path.profile({**path.start, **{n: end[n] for n in names}}, alphas, norm_stats=norm_stats)
        hybrid = {**end, **{n: path.start[n] for n in names}}
        back = path.profile(end, alphas, norm_stats=norm_stats, start=hybrid)
        found[layer] = LayerBarrier(_excess(forth, first, last), _excess(back, first, last))
    return found


def _excess(profile: Profile, first: float, last: float) -> float:
    """Over the chord of the whole networks, which the profile itself may not end at."""
    return float((profile.losses - (first + profile.alphas * (last - first))).max())


def parameters_by_layer(model: nn.Module) -> dict[str, list[str]]:
    """Layer -> the names of its own parameters and buffers, for every layer that has parameters of its own."""
    kept = model.state_dict(keep_vars=True)
    found: dict[str, list[str]] = {}
    owners = {layer_of(n) for n, _ in model.named_parameters()}
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        owner = layer_of(name)
        if owner in owners and name in kept:
            found.setdefault(owner, []).append(name)
    return found


def angle(first: Mapping[str, Tensor], second: Mapping[str, Tensor], ancestor: Mapping[str, Tensor]) -> float:
    """The angle in degrees between theta_1 - theta_f and theta_2 - theta_f over all floating entries.

    NaN where a network has not left its ancestor. Raises InvalidInput where the states do not fit.
    """
    names = [n for n, t in first.items() if t.is_floating_point()]
    check_states_fit({n: first[n] for n in names}, {n: t for n, t in ancestor.items() if n in names},
                     names=("the network", "the ancestor"))  # fmt: skip
    inner, squares = 0.0, [0.0, 0.0]
    for name in names:
        origin = ancestor[name].double().flatten().cpu()
        x, y = (s[name].double().flatten().cpu() - origin for s in (first, second))
        inner += float(x @ y)
        squares = [squares[0] + float(x @ x), squares[1] + float(y @ y)]
    if min(squares) == 0:
        return math.nan
    return math.degrees(math.acos(max(-1.0, min(1.0, inner / math.sqrt(squares[0] * squares[1])))))


def first_stable_step(steps: Sequence[int], instabilities: Sequence[float], limit: float = 0.02) -> int | None:
    """The first step from which all forks stay connected: error instability below `limit` there and later.

    steps: at which the runs were forked, ascending; None where the last fork is not connected. The limit of
    2 % is Frankle et al. 2020's. Raises InvalidInput where the two do not match.
    """
    if len(steps) != len(instabilities) or list(steps) != sorted(set(steps)):
        raise InvalidInput(
            f"There are {len(steps)} steps and {len(instabilities)} instabilities; expected one of each, ascending."
        )
    stable = None
    for step, value in reversed(list(zip(steps, instabilities, strict=True))):
        if not value < limit:
            break
        stable = step
    return stable


def distance(first: NetworkState, second: NetworkState) -> float:
    """The Euclidean distance over all floating entries, in float64."""
    total = sum(
        float((t.double() - second[n].double().to(t.device)).square().sum())
        for n, t in first.items()
        if t.is_floating_point()
    )
    return math.sqrt(total)
