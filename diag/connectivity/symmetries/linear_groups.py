"""Linear symmetries beyond permutation: maps of a set of units that some weights absorb and others undo.

Where a linear map A acts on the units of one axis, a weight that writes them changes by A and one that reads them
by its inverse transposed. Which maps leave the function alone depends on what stands in between:

* "scale": a positive number for each unit (ReLU and its kin; a norm's gain and the weights that read it);
* "sign": plus or minus one for each unit (tanh and other odd functions);
* "orthogonal": a rotation of all units (a residual stream read through RMSNorm, once the gains are in the readers);
* "invertible": any invertible map (query and key, value and output of an attention head);
* "plane": a turn and a scale of two units that rotary positions turn (query and key).

A `Move` is one map of one group; several are carried out in order. Sources: Dinh et al. 2017 (arXiv:1703.04933)
for scale, Chen, Lu & Hecht-Nielsen 1993 for sign, Ashkboos et al. 2024 (arXiv:2401.15024) for the stream, Theus et
al. 2025 (arXiv:2506.22712) for all of them in transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diag.connectivity.symmetries.groups import Symmetries, UnitBlock, UnitGroup

LARGEST_LOG_SCALE = 1.0  # random scales are e to the power of at most this
MAP_SPREAD = 0.3  # of the logarithm of a random invertible map: condition numbers stay near one
SQUARE = ("orthogonal", "invertible", "plane")  # kinds whose maps are matrices


@dataclass(frozen=True)
class Slot:
    """One place where a block of a state entry carries the units of a group.

    place: the block's symbol; parents: its symbols for the group's parents. action: what a map A does there, A
    itself (1) or its inverse transposed (-1).
    """

    entry: str
    block: UnitBlock
    place: int
    parents: tuple[int, ...]
    action: int = 1

    def rows(self, state: Mapping[str, Tensor]) -> Tensor:
        """(*parents, units, rest): what the entry holds for each unit, float64."""
        values = self.block.take(state[self.entry].detach()).double()
        front = [*self.parents, self.place]
        sizes = [values.shape[i] for i in front]
        return values.movedim(front, list(range(len(front)))).reshape(*sizes, -1)

    def act(self, tensor: Tensor, map_: Tensor) -> None:
        """Carry out a map, (*parents, units) or (*parents, units, units), on the entry in place."""
        values = self.block.take(tensor)
        front = [*self.parents, self.place]
        moved = values.movedim(front, list(range(len(front))))
        rows = moved.reshape(*moved.shape[: len(front)], -1)
        map_ = map_.to(rows.device)
        if map_.ndim == len(front):
            factor = map_ if self.action == 1 else 1 / map_
            rows = rows.double() * factor[..., None]
        else:
            factor = map_ if self.action == 1 else torch.linalg.inv(map_).transpose(-1, -2)
            rows = factor @ rows.double()
        back = rows.reshape(moved.shape).movedim(list(range(len(front))), front)
        self.block.put(tensor, back.to(tensor.dtype))


def slots_of(found: Symmetries, name: str) -> list[Slot]:
    """Every place of the units `name`, in floating entries that are not another name of one before."""
    groups: Mapping[str, UnitGroup] = {**found.contracted, **found.groups}
    return [
        Slot(entry, block, k, tuple(block.parent_axes(groups, k)))
        for entry, blocks in found.layout.items()
        if entry not in found.tied
        for block in blocks
        for k, n in enumerate(block.names)
        if n == name
    ]


def one_each(slot: Slot) -> bool:
    """Whether the entry holds one number for each unit: a bias or a norm's gain."""
    return len(slot.block.sizes) == 1 + len(slot.parents)


def covered(slots: Iterable[Slot]) -> set[tuple[str, int, int]]:
    """The places of entries that these hold: (entry, axis, number)."""
    axes = ((s.entry, s.block.axis_of[s.place], s.block) for s in slots)
    return {(entry, axis, p) for entry, axis, block in axes for p in block.positions[axis].tolist()}


def with_idle(slots: Sequence[Slot], vector: Sequence[int], idle: set[int]) -> list[Slot]:
    """The slots with their actions; what has no influence goes with its own layer's other weights."""
    acting = [replace(s, action=e) for s, e in zip(slots, vector, strict=True) if e]
    layers = {s.entry.rpartition(".")[0]: s.action for s in acting}
    for j in sorted(idle):
        layer = slots[j].entry.rpartition(".")[0]
        if layer in layers:
            acting.append(replace(slots[j], action=layers[layer]))
    return acting


def written(acting: list[Slot]) -> list[Slot]:
    """With the actions of biases and gains, which are written as the units are, at 1."""
    vectors = sum(s.action for s in acting if one_each(s))
    return [replace(s, action=-s.action) for s in acting] if vectors < 0 else acting


def same_place(slot: Slot, gain: Slot | None) -> bool:
    """Whether a slot is that of the gain."""
    return gain is not None and (slot.entry, slot.place) == (gain.entry, gain.place) and slot.block is gain.block


@dataclass(frozen=True)
class LinearGroup:
    """A set of maps of the units `units` (a group, or contracted units, of a `Symmetries`).

    slots: where they act. gain: the slot that holds a norm's gain, where this is the scale of one. first: the
    groups of gains that must be one before this group's maps leave the function alone. centred: the maps keep the
    sum of the units, and what is orthogonal to it (LayerNorm).
    """

    name: str
    kind: str
    units: str
    size: int
    parent_sizes: tuple[int, ...]
    slots: tuple[Slot, ...]
    gain: Slot | None = None
    first: tuple[str, ...] = ()
    centred: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one map."""
        matrix = (self.size, self.size) if self.kind in SQUARE else (self.size,)
        return (*self.parent_sizes, *matrix)

    @property
    def dimension(self) -> int:
        """How many continuous parameters its maps have."""
        copies, n = int(torch.Size(self.parent_sizes).numel()), self.size - self.centred
        of_one = {"scale": n, "sign": 0, "orthogonal": n * (n - 1) // 2, "invertible": n * n, "plane": 2}
        return copies * of_one[self.kind]

    def random(self, generator: torch.Generator) -> Tensor:
        """A random map, float64."""
        draw = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.kind == "scale":
            return (LARGEST_LOG_SCALE * draw.tanh()).exp()
        if self.kind == "sign":
            return torch.where(draw > 0, 1.0, -1.0).double()
        if self.kind == "invertible":
            return torch.linalg.matrix_exp(MAP_SPREAD * draw / self.size**0.5)
        if self.kind == "plane":
            return turn_part(draw) * (LARGEST_LOG_SCALE * draw[..., :1, :1].tanh()).exp()
        return orthogonal_part(draw, self.centred)

    def closest(self, matrix: Tensor) -> Tensor:
        """The orthogonal map Q of the group with the largest <Q, matrix>; (*parents, units, units)."""
        return turn_part(matrix) if self.kind == "plane" else orthogonal_part(matrix, self.centred)


def orthogonal_part(matrix: Tensor, centred: bool = False) -> Tensor:
    """The orthogonal matrix Q with the largest <Q, matrix>; centred: among those that keep a vector of ones."""
    if centred:
        basis = complement_of_ones(matrix.shape[-1])
        ones = torch.full_like(matrix, 1 / matrix.shape[-1])
        return basis @ orthogonal_part(basis.T @ matrix @ basis) @ basis.T + ones
    u, _, v = torch.linalg.svd(matrix)
    return u @ v


def turn_part(matrix: Tensor) -> Tensor:
    """The rotation Q of the plane with the largest <Q, matrix>, for matrices (..., 2, 2); 1 where all are alike."""
    cosine = matrix[..., 0, 0] + matrix[..., 1, 1]
    sine = matrix[..., 1, 0] - matrix[..., 0, 1]
    angle = torch.atan2(sine, cosine)
    rows = torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)
    return torch.stack(rows, -2)


def complement_of_ones(size: int) -> Tensor:
    """(size, size - 1): an orthonormal basis of what is orthogonal to the vector of ones."""
    full = torch.eye(size, dtype=torch.float64)
    full[:, 0] = 1.0
    return torch.linalg.qr(full)[0][:, 1:]


Move = tuple[str, Tensor]


@dataclass(frozen=True)
class LinearSymmetries:
    """The linear groups of one model, beyond its permutations.

    groups: by name. refused: units for which nothing could be found -> why. deviation: the largest relative change
    of the outputs under a random map of each group, at the model's own and at perturbed weights, float64.
    """

    groups: dict[str, LinearGroup]
    refused: dict[str, str] = field(default_factory=dict)
    deviation: float = 0.0
    tied: dict[str, str] = field(default_factory=dict)

    def apply(self, moves: Iterable[Move], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` after these moves; entries that no move reaches are passed on as they are."""
        out = dict(state)
        for name, map_ in moves:
            for slot in self.groups[name].slots:
                if out[slot.entry] is state[slot.entry]:
                    out[slot.entry] = state[slot.entry].detach().clone()
                slot.act(out[slot.entry], map_)
        return out | {n: out[first] for n, first in self.tied.items() if first in out}

    def unit_gains(self, state: Mapping[str, Tensor], names: Sequence[str]) -> list[Move]:
        """The moves that put these groups' gains into the weights that read them."""
        gains = [(n, self.groups[n].gain) for n in names]
        return [(n, 1 / gain.rows(state).squeeze(-1)) for n, gain in gains if gain is not None]

    def random(self, name: str, state: Mapping[str, Tensor], seed: int = 0) -> list[Move]:
        """A random map of one group, with what must come before it."""
        generator = torch.Generator().manual_seed(seed)
        group = self.groups[name]
        return [*self.unit_gains(state, group.first), (name, group.random(generator))]

    def of_kind(self, *kinds: str) -> list[LinearGroup]:
        """The groups of these kinds, in the order of the data flow."""
        return [g for g in self.groups.values() if g.kind in kinds]
