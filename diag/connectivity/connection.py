"""Everything that is measured between two networks, put together: the line, alignment, REPAIR, layers, a curve."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from diag.build import Build
from diag.connectivity.activation_linear import align_linear_activations
from diag.connectivity.activation_matching import align_activations
from diag.connectivity.alignment import Alignment, align_weights
from diag.connectivity.checkpoint_files import loaded_networks, refuse_file_arguments
from diag.connectivity.ends import Ends, check_same_ends, checked_ends
from diag.connectivity.interpolation import Interpolation, NetworkState
from diag.connectivity.interpolation_bezier import bezier, train_control_point
from diag.connectivity.interpolation_layers import LayerBarrier, angle, distance, layer_barriers
from diag.connectivity.interpolation_profile import Profile
from diag.connectivity.interpolation_repair import Repair
from diag.connectivity.linear_alignment import align_linear
from diag.door import at_the_door
from diag.errors import DiagError, InvalidInput, Unsupported
from diag.ranges import GridPoints
from diag.snapshot.batch import tensors_in
from diag.snapshot.call_at import call_at
from diag.snapshot.preserve import preserved
from diag.snapshot.snapshot import Snapshot

ALIGN = ("weights", "activations")


@dataclass(frozen=True, repr=False)
class Connection:
    """What `measure_connection` found; parts that were not asked for are None or empty.

    line, held_out: the networks as they are. ends: their own losses. aligned, aligned_held_out: after alignment.
    repaired: the aligned (else plain) line with REPAIR. curve: along the Bezier curve to the aligned (else plain)
    state. notes: how files were read.
    """

    line: Profile
    held_out: Profile | None = None
    aligned: Profile | None = None
    aligned_held_out: Profile | None = None
    repaired: Profile | None = None
    curve: Profile | None = None
    alignment: Alignment | None = None
    aligned_state: dict[str, Tensor] | None = None
    function_change: float = float("nan")
    distance: float = float("nan")
    aligned_distance: float = float("nan")
    angle: float = float("nan")
    ends: Ends | None = None
    chance_error: float = float("nan")
    variance_ratios: dict[str, float] = field(default_factory=dict)
    layers: dict[str, LayerBarrier] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Connection: {self.sentence()}>"

    def sentence(self) -> str:
        """The barrier and what alignment did to it, in one sentence."""
        if self.aligned is None or self.alignment is None:
            return f"The barrier of the loss on the straight line is {self.line.barrier:.3g}."
        errors = self.line.error_barrier, self.aligned.error_barrier
        known = not any(map(math.isnan, errors))
        before, after = errors if known else (self.line.barrier, self.aligned.barrier)
        moved = self.alignment.moved / self.alignment.units
        return (
            f"The barrier on the straight line {'in the share of wrong answers' if known else 'in the loss'} is "
            f"{before:.3g} as the networks are and {after:.3g} after {moved:.0%} of the second one's units moved, "
            f"which changed its outputs by a relative {self.function_change:.1e} and its distance from the first "
            f"from {self.distance:.4g} to {self.aligned_distance:.4g}."
        )


def measure_connection(
    path: Interpolation,
    end: NetworkState,
    *,
    points: int = 11,
    refine: int = 2,
    align: str | None = None,
    norm_stats: str = "reset",
    repair: bool = False,
    layers: bool = False,
    bezier_steps: int = 0,
    bezier_learning_rate: float = 1e-3,
    orders: int | None = None,
    beyond_permutations: bool = False,
    ancestor: Mapping[str, Tensor] | None = None,
) -> Connection:
    """Measure the line from `path.start` to `end`, and what else is asked for.

    Raises Unsupported where the model has no group of units to align, or alignment would change its function.
    """
    both = partial(_on_both_sets, path, [i / (points - 1) for i in range(points)], refine, norm_stats)
    found: dict[str, Any] = {"distance": distance(path.start, end), "chance_error": chance_error(path)}
    found["line"], found["held_out"] = both(end)
    found["ends"] = checked_ends(path, end, found["line"], norm_stats == "lerp" or not path.has_batch_norm)
    if ancestor is not None:
        found["angle"] = angle(path.start, end, ancestor)
    if align is not None:
        found |= aligned_end(path, end, align, orders, beyond_permutations)
        end = path.fit(found["aligned_state"])
        found["aligned"], found["aligned_held_out"] = both(end)
        check_same_ends(found["line"], found["aligned"])
        found["aligned_distance"] = distance(path.start, end)
    if repair:
        fixed = Repair(path, end)
        found["variance_ratios"] = fixed.variance_ratios()
        found["repaired"], _ = both(end, around=fixed.corrected)
    if layers:
        found["layers"] = layer_barriers(path, end, norm_stats=norm_stats)
    if bezier_steps:
        run: dict[str, Any] = {"norm_stats": norm_stats, "seed": path.snapshot.seed}
        control = train_control_point(path, end, steps=bezier_steps, learning_rate=bezier_learning_rate, **run)
        found["curve"], _ = both(end, write=bezier(path.start, control, end))
        check_same_ends(found["aligned"] if align else found["line"], found["curve"])
    return Connection(**found)


def _on_both_sets(
    path: Interpolation, grid: list[float], refine: int, norm_stats: str, end: NetworkState, **more: Any
) -> tuple[Profile, Profile | None]:
    """The losses from the start to `end` on the data, and at the same points on the held-out data, if any."""
    line = path.profile(end, grid, refine=refine, norm_stats=norm_stats, **more)
    if path.held_out is None:
        return line, None
    return line, path.profile(end, line.alphas.tolist(), norm_stats=norm_stats, held_out=True, **more)


@at_the_door
def align(
    snapshot: Snapshot | str | os.PathLike[str],
    other: Any,
    *,
    build: Build | None = None,
    key: str | None = None,
    options: Mapping[str, Any] | None = None,
    by: str = "weights",
    points: GridPoints = 11,
    beyond_permutations: bool = False,
) -> Connection:
    """The units of `other` permuted to where the matching units of the snapshot's network are.

    other: a state dict, a module, a Snapshot or a checkpoint's path. What comes back has `aligned_state`, and the
    line between the two before and after, on `points` points.
    build: both are paths of checkpoints, `diag.align("a.pt", "b.pt", build=build)`, and this gives `(model,
    loss_fn, data)`, or is its name. key: the entry of the files that holds the state dict. options: arguments of
    `Snapshot` in place of the build function's.
    by: "weights" or "activations". beyond_permutations: also signs, scales, rotations and invertible maps, where
    the model has such symmetries.
    Raises InvalidInput where `other` does not fit, Unsupported where the model has no group of units to align, or
    alignment would change its function, CheckpointError where a file cannot be read or does not fit.
    """
    if by not in ALIGN:
        raise InvalidInput(f"by is {by!r}; expected {' or '.join(map(repr, ALIGN))}.")
    notes: tuple[str, ...] = ()
    if build is not None:
        snapshot, states, notes = loaded_networks([snapshot, other], build, key, options, "align")
        other = list(states.values())[-1]
    else:
        refuse_file_arguments("align", snapshot, key=key, options=options)
    path = Interpolation(cast(Snapshot, snapshot))
    found = measure_connection(
        path, path.fit(other), align=by, points=points, beyond_permutations=beyond_permutations
    )
    return replace(found, notes=notes)


def aligned_end(
    path: Interpolation, end: NetworkState, method: str, orders: int | None = None, beyond: bool = False
) -> dict[str, Any]:
    """`end` aligned to `path.start`: the keys alignment, aligned_state and function_change of a Connection.

    beyond: over linear symmetries too.
    """
    groups = path.symmetries
    if not groups.groups:
        reasons = "; ".join(sorted(set(groups.frozen.values()))[:3])
        raise Unsupported(f"The model has no group of units that could be permuted ({reasons}); set align=None.")
    # Tied entries are in a state dict under all their names.
    first, second = ({**s, **{n: s[f] for n, f in groups.tied.items()}} for s in (path.start, end))
    if beyond and method == "activations":
        linear, batches = path.linear_symmetries, path.snapshot.batches
        seed = path.snapshot.seed
        result = align_linear_activations(groups, linear, path.copy, first, second, batches, seed=seed)
    elif beyond:
        linear, more = path.linear_symmetries, {} if orders is None else {"orders": orders}
        result = align_linear(groups, linear, first, second, seed=path.snapshot.seed, **more)
    elif method == "weights":
        result = align_weights(groups, first, second, orders=orders, seed=path.snapshot.seed)
    else:
        result = align_activations(groups, path.copy, first, second, path.snapshot.batches)
    change = _function_change(path, second, result.state)
    if not change <= groups.tolerance:
        raise Unsupported(
            f"Alignment changed the second network's outputs by a relative {change:.1e}, so it is not used; set "
            "align=None, and report the model's architecture."
        )
    return {"alignment": result, "aligned_state": result.state, "function_change": change}


def _function_change(path: Interpolation, before: NetworkState, after: NetworkState) -> float:
    """max |f(x) - f'(x)| / max |f(x)| on the first batch."""
    batch, model = path.snapshot.batches[0], path.copy
    own = {n for n, _ in [*model.named_parameters(), *model.named_buffers()]}
    with preserved(model), torch.no_grad():
        old, new = (
            tensors_in(call_at(model, {n: t for n, t in s.items() if n in own}, batch.args, batch.kwargs))
            for s in (before, after)
        )
    return max((_relative_change(a, b) for a, b in zip(old, new, strict=True)), default=0.0)


def _relative_change(old: Tensor, new: Tensor) -> float:
    if not (old.is_floating_point() or old.is_complex()) or not old.numel():
        return 0.0
    wide = torch.complex128 if old.is_complex() else torch.float64
    scale, change = float(old.abs().max()), float((old.to(wide) - new.to(wide)).abs().max())
    return change / scale if scale else change


def chance_error(path: Interpolation) -> float:
    """The error of always predicting the most frequent class; NaN where the targets are not class numbers."""
    try:
        flat = path.snapshot.quantity("labels")
    except DiagError:
        return float("nan")
    return 1 - float(flat.unique(return_counts=True)[1].max()) / len(flat) if len(flat) else float("nan")
