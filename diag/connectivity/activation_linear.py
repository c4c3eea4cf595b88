"""Activation matching beyond permutations: rotations, signs, scales and invertible maps by what the units do.

Both networks are brought into their standard forms as in weight matching (`linear_alignment`), where all that
is left to match is orthogonal. An orthogonal map moves activations as it moves the weights that write them, so
the same ascent runs on <X_A, g(X_B)> with X the centred activations on a probe set, of which the products of
every unit of A with every unit of B are all that is needed. How a map moves an activation is tried on a batch;
one that it moves in another way is left out. Units of which no activation is left are matched by weights
afterwards.

Sources: those of `linear_alignment`, with the evidence of Li et al. 2016 and Jordan et al. 2023 (arXiv:2211.08403).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diag.connectivity.activation_matching import Moments, moments_of
from diag.connectivity.alignment import Alignment, compose, result_of
from diag.connectivity.fit import check_states_fit
from diag.connectivity.linear_alignment import LinearAscent, StandardForms, visited
from diag.connectivity.symmetries.groups import Symmetries, UnitBlock, UnitGroup
from diag.connectivity.symmetries.linear_groups import LinearGroup, LinearSymmetries, Slot
from diag.errors import InvalidInput
from diag.snapshot.batch import Batch

AS_PREDICTED = 1e-3  # relative difference of an activation's products, in the model's own number format


def align_linear_activations(
    symmetries: Symmetries,
    linear: LinearSymmetries,
    model: nn.Module,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    seed: int = 0,
) -> Alignment:
    """Activation matching of B to A over permutations and the linear groups (in evaluation mode).

    `objective`, `before` and `limit` are those of the activations in the standard forms; `element` holds the
    permutations alone. Raises InvalidInput where the states do not fit or no activation is left, and Unsupported
    where the forward pass does other operations than at tracing.
    """
    check_states_fit(state_a, state_b, symmetries.shapes)
    forms = StandardForms.of(linear, state_a, state_b)
    seen = _Seen(symmetries, linear, model, forms, batches, seed)
    if not seen.blocks:
        raise InvalidInput(
            "Activation matching found no activation that the maps of the units move as they should; match by "
            "weights instead."
        )
    best = LinearAscent(*seen.evidence(), forms.gains).run(visited(symmetries, linear))
    own = {n: t for n, t in best.state.items() if n not in seen.blocks}
    unseen = [n for n in visited(symmetries, linear) if n not in seen.units()]
    rest = LinearAscent(symmetries, linear, forms.a, seen.flipped(own), forms.gains).run(unseen)
    best.element = compose(symmetries.groups, best.element, rest.element)
    return result_of(best, forms.back(rest.state, state_b), 1, "activations")


@dataclass
class _Seen:
    """The activations of two networks, as further entries of their states: of A one row a unit, of B its products
    with A's."""

    symmetries: Symmetries
    linear: LinearSymmetries
    model: nn.Module
    forms: StandardForms
    batches: Sequence[Batch]
    seed: int

    def __post_init__(self) -> None:
        self.blocks: dict[str, UnitBlock] = {}
        self.products: dict[str, Tensor] = {}
        self.moved: dict[str, list[Slot]] = {name: [] for name in self.linear.groups}
        self._add(self._moments(self.forms.a, self.forms.b, self.batches))
        firsts = list({b.size: b for b in reversed(self.batches)}.values())
        still = _named(self._moments(self.forms.a, self.forms.a, firsts))
        generator = torch.Generator().manual_seed(self.seed)
        for group in self.linear.of_kind("sign", "orthogonal", "invertible", "plane"):
            map_ = _orthogonal(group, generator)
            state = self.linear.apply([(group.name, map_)], self.forms.a)
            self._tell(group, map_, still, _named(self._moments(self.forms.a, state, firsts)))

    def _units(self) -> dict[str, UnitGroup]:
        return {**self.symmetries.contracted, **self.symmetries.groups}

    def _moments(
        self, a: Mapping[str, Tensor], b: Mapping[str, Tensor], batches: Sequence[Batch]
    ) -> dict[int, list[Moments]]:
        own = self.model.state_dict()
        first, second = ({n: t.to(own[n].dtype) if n in own else t for n, t in s.items()} for s in (a, b))
        return moments_of(self.model, first, second, batches, self._units())

    def _add(self, found: dict[int, list[Moments]]) -> None:
        for name, moment in _named(found).items():
            a, b, products = moment.covariances()
            scale, size = float(a.norm() * b.norm()), len(a)
            if scale > 0:
                self.products[name] = size * products.T / scale
                self.blocks[name] = _block(moment, size)

    def _tell(
        self, group: LinearGroup, map_: Tensor, still: Mapping[str, Moments], moved: Mapping[str, Moments]
    ) -> None:
        """Whether the map moves each activation, as it moves weights; what it moves otherwise is dropped."""
        for name, block in list(self.blocks.items()):
            before, after = (m[name].covariances()[2].T.contiguous() for m in (still, moved))
            if _alike(before, after):
                continue
            slots = _slots(name, block, group, self._units())
            expected = before.clone()
            for slot in slots:
                slot.act(expected, map_)
            if slots and _alike(expected, after):
                self.moved[group.name] += slots
            else:
                del self.blocks[name]

    def units(self) -> set[str]:
        """The units that an activation speaks of."""
        return {n for block in self.blocks.values() for n in block.names if n}

    def flipped(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """B after the signs that no activation shows, unit by unit as its weights say."""
        for group in self.linear.of_kind("sign"):
            if not any(s.entry in self.blocks for s in self.moved[group.name]):
                rows = [(s.rows(self.forms.a), s.rows(state)) for s in group.slots]
                same = torch.stack([(a * b).sum(-1) for a, b in rows]).sum(0)
                state = self.linear.apply([(group.name, torch.where(same < 0, -1.0, 1.0).double())], state)
        return state

    def evidence(self) -> tuple[Symmetries, LinearSymmetries, dict[str, Tensor], dict[str, Tensor]]:
        """What an ascent is given: the symmetries with the activations as the only entries that count."""
        entries = {n: (block,) for n, block in self.blocks.items()}
        sizes = {n: tuple(self.products[n].shape) for n in entries}
        symmetries = replace(
            self.symmetries,
            blocks={**self.symmetries.blocks, **entries},
            layout={**self.symmetries.layout, **entries},
            shapes={**self.symmetries.shapes, **sizes},
            parameters=tuple(entries),
        )
        groups = {
            n: replace(g, slots=(*g.slots, *(s for s in self.moved[n] if s.entry in entries)))
            for n, g in self.linear.groups.items()
            if g.kind != "plane"  # no activation shows the planes
        }
        first = {n: torch.eye(len(self.products[n]), dtype=torch.float64) for n in entries}
        second = {n: self.products[n].clone() for n in entries}
        return symmetries, replace(self.linear, groups=groups), self.forms.a | first, self.forms.b | second


def _named(found: Mapping[int, Sequence[Moments]]) -> dict[str, Moments]:
    return {
        f"activation {k} of batches of {size}": moment
        for size, held in found.items()
        for k, moment in enumerate(held)
        if moment.units
    }


def _block(moment: Moments, size: int) -> UnitBlock:
    names = [moment.capture.block.names[i] for i in moment.units]
    return UnitBlock(
        positions=(torch.arange(size), torch.arange(size)),
        names=(*names, ""),
        sizes=(*moment.sizes, size),
        axis_of=(*(0 for _ in names), 1),
    )


def _slots(name: str, block: UnitBlock, group: LinearGroup, units: Mapping[str, UnitGroup]) -> list[Slot]:
    places = [k for k, n in enumerate(block.names) if n == group.units]
    return [Slot(name, block, k, tuple(block.parent_axes(units, k))) for k in places]


def _orthogonal(group: LinearGroup, generator: torch.Generator) -> Tensor:
    draw = group.random(generator)
    return draw if group.kind == "sign" else group.closest(draw)


def _alike(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm()) <= AS_PREDICTED * float(a.norm())
