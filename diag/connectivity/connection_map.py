"""Many checkpoints: the barrier between every two of them, and who is connected with whom."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy
from numpy.typing import NDArray

from diag.build import Build
from diag.connectivity.checkpoint_files import loaded_networks, refuse_fewer_than_two, refuse_file_arguments
from diag.connectivity.connection import ALIGN, aligned_end
from diag.connectivity.interpolation import Interpolation
from diag.connectivity.interpolation_layers import angle, first_stable_step
from diag.conversion import converted
from diag.door import at_the_door
from diag.errors import CheckpointError, InvalidInput
from diag.ranges import GridPoints, Threshold
from diag.snapshot.snapshot import Snapshot

if TYPE_CHECKING:
    import networkx


READABLE = 12  # networks: numbers in the drawing of more would run into each other


@dataclass(frozen=True, repr=False)
class ConnectionMap:
    """Barriers between N networks; arrays (N, N), symmetric, with zeros on the diagonal.

    loss_barriers: over the chord. error_barriers: the same in the share of wrong answers, and
    error_standard_errors, paired over examples; NaN where targets are not class numbers. threshold: two networks
    are connected where their error barrier (else their loss barrier) is below it. notes: how files were read.
    """

    names: tuple[str, ...]
    loss_barriers: NDArray[numpy.float64]
    error_barriers: NDArray[numpy.float64]
    error_standard_errors: NDArray[numpy.float64]
    threshold: float
    align: str
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<ConnectionMap: {self.sentence()}>"

    @property
    def barriers(self) -> NDArray[numpy.float64]:
        """The error barriers where there are errors, else the loss barriers."""
        known = not numpy.isnan(self.error_barriers).any()
        return self.error_barriers if known else self.loss_barriers

    @cached_property
    def graph(self) -> networkx.Graph:
        """All networks, with an edge (attribute `barrier`) between every two that are connected."""
        return self._edges(lambda barrier: barrier < self.threshold)

    @property
    def components(self) -> list[list[str]]:
        """Groups of networks that are connected, directly or by way of others; the largest first."""
        import networkx

        found = [sorted(c, key=self.names.index) for c in networkx.connected_components(self.graph)]
        return sorted(found, key=lambda c: (-len(c), self.names.index(c[0])))

    @property
    def spanning_tree(self) -> networkx.Graph:
        """The tree over all networks with the least sum of barriers: the cheapest way between any two."""
        import networkx

        return networkx.minimum_spanning_tree(self._edges(lambda barrier: True), weight="barrier")

    def _edges(self, keep: Callable[[float], bool]) -> networkx.Graph:
        import networkx

        graph = networkx.Graph()
        graph.add_nodes_from(self.names)
        for i, j in zip(*numpy.triu_indices(len(self.names), 1), strict=True):
            barrier = float(self.barriers[i, j])
            if keep(barrier):
                graph.add_edge(self.names[i], self.names[j], barrier=barrier)
        return graph

    def sentence(self) -> str:
        """What was found, in one sentence."""
        groups = self.components
        what = "error" if self.barriers is self.error_barriers else "loss"
        after = f" after matching units by {self.align}" if self.align else ""
        parts = (
            "one group" if len(groups) == 1 else f"{len(groups)} groups of {', '.join(str(len(g)) for g in groups)}"
        )
        worst = float(self.barriers.max())
        return (
            f"The {len(self.names)} networks form {parts}, connected by {what} barriers below "
            f"{self.threshold:g}{after}; the largest barrier between any two is {worst:.3g}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that do not exist are None."""
        tree = sorted(self.spanning_tree.edges(data="barrier"), key=lambda e: e[2])
        return {
            "names": list(self.names),
            "loss_barriers": _plain(self.loss_barriers),
            "error_barriers": _plain(self.error_barriers),
            "error_standard_errors": _plain(self.error_standard_errors),
            "threshold": self.threshold,
            "align": self.align,
            "components": self.components,
            "spanning_tree": [[a, b, barrier] for a, b, barrier in tree],
        }

    def plot(self, ax: Any = None) -> Any:
        """A heat map of the barriers, networks in the order of their groups."""
        import seaborn

        order = [self.names.index(n) for group in self.components for n in group]
        labels = [self.names[i] for i in order]
        what = "error barrier (share)" if self.barriers is self.error_barriers else "loss barrier"
        seaborn.heatmap(
            self.barriers[numpy.ix_(order, order)],
            ax=ax,
            cmap="magma_r",
            vmin=0,
            annot=len(order) <= READABLE,
            fmt=".2g",
            square=True,
            xticklabels=labels,
            yticklabels=labels,
            cbar_kws={"label": what},
        )
        ax.set(xlabel="network", ylabel="network")


def _plain(values: NDArray[numpy.float64]) -> list[list[float | None]]:
    return [[float(x) if numpy.isfinite(x) else None for x in row] for row in values]


@at_the_door
def connect(
    snapshot: Snapshot | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    states: Any = None,
    *,
    build: Build | None = None,
    key: str | None = None,
    options: Mapping[str, Any] | None = None,
    points: GridPoints = 11,
    align: str | None = None,
    norm_stats: str = "reset",
    threshold: Threshold = 0.02,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> ConnectionMap:
    """The barriers between every two of `states` on the snapshot's data, and who is connected with whom.

    states: state dicts, modules, Snapshots or paths of checkpoints, by name or one after another. With `align` the
    later of two is aligned to the earlier first. Costs N (N-1) / 2 profiles of `points` passes.
    build: in place of a snapshot and states there are paths of checkpoints, `diag.connect(["a.pt", "b.pt"],
    build=build)`, and this gives `(model, loss_fn, data)`, or is its name. key: the entry of the files that holds
    the state dict. options: arguments of `Snapshot` in place of the build function's.

    Raises InvalidInput for fewer than 2 states, or where one does not fit, naming the first difference, and
    CheckpointError where a file cannot be read or does not fit.
    """
    if align not in (None, *ALIGN):
        raise InvalidInput(f"align is {align!r}; expected None, {' or '.join(map(repr, ALIGN))}.")
    notes: tuple[str, ...] = ()
    if build is None:
        refuse_file_arguments("connect", snapshot, key=key, options=options)
        named = _by_name(states)
    elif states is not None:
        raise InvalidInput(
            "connect was given states and build=; expected a snapshot and states, or paths and build=."
        )
    else:
        several = isinstance(snapshot, Iterable) and not isinstance(snapshot, (str, os.PathLike))
        files = list(cast(Iterable[Any], snapshot)) if several else [snapshot]
        snapshot, named, notes = loaded_networks(files, build, key, options, "connect")
    refuse_fewer_than_two(named)
    path = Interpolation(cast(Snapshot, snapshot))
    fitted = {name: _named(path, name, state) for name, state in named.items()}
    return _between_all(path, fitted, points, align, norm_stats, threshold, progress, notes)


def _between_all(
    path: Interpolation,
    states: Mapping[str, dict[str, Any]],
    points: int,
    align: str | None,
    norm_stats: str,
    threshold: float,
    progress: Callable[[int, int, str], None],
    notes: tuple[str, ...],
) -> ConnectionMap:
    """The barrier between every two states."""
    names, fitted = tuple(states), list(states.values())
    loss, error, spread = (numpy.zeros((len(names), len(names))) for _ in range(3))
    pairs: Sequence[tuple[int, int]] = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    for done, (i, j) in enumerate(pairs):
        progress(done, len(pairs), f"{names[i]} - {names[j]}")
        start = path.starting_at(fitted[i])
        end = fitted[j] if align is None else start.fit(aligned_end(start, fitted[j], align)["aligned_state"])
        line = start.profile(end, [k / (points - 1) for k in range(points)], norm_stats=norm_stats)
        loss[i, j] = loss[j, i] = line.barrier
        error[i, j] = error[j, i] = line.error_barrier
        spread[i, j] = spread[j, i] = line.error_standard_error
    progress(len(pairs), len(pairs), "")
    return ConnectionMap(names, loss, error, spread, threshold, align or "", notes)


def _by_name(states: Any) -> Mapping[str, Any]:
    """The states by name."""
    if states is None:
        raise InvalidInput("connect was called without states; expected at least 2 networks to compare.")
    kinds = Mapping[str, Any] | Sequence[Any]
    found = converted(states, kinds, inspect.Parameter.empty, "connect.states")
    return found if isinstance(found, Mapping) else _with_names(found)


def _named(path: Interpolation, name: str, state: Any) -> dict[str, Any]:
    try:
        return path.fit(state)
    except (InvalidInput, CheckpointError) as error:
        raise type(error)(f"{name}: {error}") from None


def _with_names(states: Sequence[Any]) -> dict[str, Any]:
    """Paths by themselves, other states by their place."""
    known = [str(s) if isinstance(s, (str, os.PathLike)) else f"network {i}" for i, s in enumerate(states, 1)]
    return dict(zip(known, states, strict=True))


@dataclass(frozen=True)
class ForkStability:
    """Stability to the noise of SGD along one run: at each step the run was forked into two.

    steps: of the forks, ascending. instabilities: error instability of each pair, (largest error on the line) -
    (mean error of the ends). stable_from: the first step from which all later forks are connected too, or None.
    loss_barriers: largest loss excess over the chord. peaks: largest loss on the line. fork_losses: loss of the
    network that was forked, and angles (degrees) between the two ways from it: NaN where it was not given.
    """

    steps: tuple[int, ...]
    instabilities: tuple[float, ...]
    stable_from: int | None
    loss_barriers: tuple[float, ...] = ()
    peaks: tuple[float, ...] = ()
    fork_losses: tuple[float, ...] = ()
    angles: tuple[float, ...] = ()

    @property
    def ridges(self) -> tuple[bool | None, ...]:
        """Whether the line between the two rises above the network that was forked; None where that is not known.

        Without a ridge, both came down one mountainside (Singh et al. 2024, arXiv:2406.16300, by our reading).
        """
        pairs = zip(self.peaks, self.fork_losses, strict=True)
        return tuple(None if math.isnan(start) else peak > start for peak, start in pairs)


@at_the_door
def fork_stability(
    snapshot: Snapshot,
    forks: Mapping[int, Sequence[Any]],
    *,
    points: GridPoints = 30,
    threshold: Threshold = 0.02,
    norm_stats: str = "reset",
) -> ForkStability:
    """The step from which forks of one run stay connected (Frankle et al. 2020, arXiv:1912.05671, figure 3).

    forks: step -> the end states (as `connect` takes them) of two runs that continued from it with different noise,
    and the state that was forked as a third, where it is at hand. Measured on the snapshot's held-out data where it
    has such data, else on its data; 30 points as in the paper.
    Raises InvalidInput without a fork, or where one has not two or three states or a state does not fit,
    CheckpointError for its file.
    """
    if not forks:
        raise InvalidInput("There are no forks; expected at least one step with the two ends of its runs.")
    if strange := [step for step in forks if not isinstance(step, int)]:
        raise InvalidInput(f"A fork is at step {strange[0]!r}; expected the number of the step.")
    path = Interpolation(snapshot)
    steps = sorted(forks)
    alphas = [k / (points - 1) for k in range(points)]
    found = [_fork(path, step, forks[step], alphas, norm_stats) for step in steps]
    instabilities, barriers, peaks, starts, angles = (tuple(column) for column in zip(*found, strict=True))
    stable = first_stable_step(steps, instabilities, threshold)
    return ForkStability(tuple(steps), instabilities, stable, barriers, peaks, starts, angles)


def _fork(
    path: Interpolation, step: int, states: Sequence[Any], alphas: Sequence[float], norm_stats: str
) -> tuple[float, float, float, float, float]:
    """Instability, loss barrier and largest loss of the line between two ends; loss and angle at their fork."""
    if len(states) not in (2, 3):
        raise InvalidInput(
            f"The fork at step {step} has {len(states)} states; expected two ends, and the forked network if it is "
            "known."
        )
    first, second, *fork = (_named(path, f"the fork at step {step}", state) for state in states)
    held_out = path.held_out is not None
    line = path.starting_at(first).profile(second, alphas, norm_stats=norm_stats, held_out=held_out)
    start, way = math.nan, math.nan
    if fork:
        start = float(path.evaluate(fork[0], held_out=held_out).losses.mean())
        way = angle(first, second, fork[0])
    return line.instability, line.barrier, float(line.losses.max()), start, way
