"""Linear freedom: which scales, signs, rotations and invertible maps of a network's units leave its function alone.

A ReLU unit's incoming weights may be doubled and its outgoing ones halved; an attention head's queries may be
mapped by any invertible matrix and its keys by the inverse transposed. Such directions carry no information:
weights, distances and curvature along them are a matter of the run. Two networks can be compared only up to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diag.connectivity.symmetries import LinearSymmetries
from diag.display import format_number
from diag.registry import instrument
from diag.result import Confidence, Level, Result, Verdict, measured

SOURCE = "Theus et al. 2025, arXiv:2506.22712"
KUNIN = "Kunin et al. 2021, arXiv:2012.04728"


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearFreedom(Result):
    """The linear symmetries of one model, beyond permutations."""

    directions: float = measured("directions in parameter space along which nothing changes", unit="count")
    scale: float = measured("sets of units that may be rescaled one by one", unit="count")
    sign: float = measured("sets of units whose sign may be turned one by one", unit="count")
    orthogonal: float = measured("sets of units that may be rotated (streams under RMSNorm)", unit="count")
    invertible: float = measured("sets of units that any invertible map may act on (QK, OV)", unit="count")
    plane: float = measured("layers whose rotary planes may be turned and scaled one by one (QK)", unit="count")
    deviation: float = measured("largest relative change of the outputs under a random map of each, float64")
    sizes: dict[str, float] = measured("units of each set, by kind and first weight axis", unit="count")
    places: dict[str, str] = measured("the weights that take part: written (+) or read (-)")
    refused: dict[str, str] = measured("units of which it could not be told, or that failed the check, and why")

    def verdict(self) -> Verdict:
        counts = {k: getattr(self, k) for k in ("scale", "sign", "orthogonal", "invertible", "plane")}
        found = ", ".join(f"{n:.0f} {k}" for k, n in counts.items() if n)
        if not found:
            return Verdict(
                Level.DESCRIPTION,
                "No linear map of this network's units beyond permutations was found to leave its function alone.",
                source=SOURCE,
            )
        return Verdict(
            Level.DESCRIPTION,
            f"Along {self.directions:.0f} directions in parameter space the function does not change (relative "
            f"change of the outputs {format_number(self.deviation)}); the groups of maps are {found}.",
            advice="Compare two such networks after aligning them with beyond_permutations=True.",
            source=f"{SOURCE}; {KUNIN}",
            confidence=Confidence.THEOREM,
            value=self.deviation,
        )

    def plot(self, ax: Any = None) -> Any:
        """Units of each set."""
        ax.barh(list(self.sizes), list(self.sizes.values()), height=0.6)
        ax.tick_params(axis="y", labelsize="xx-small")
        ax.set(xlabel="units", ylabel="set of units")


@instrument(
    source=SOURCE,
    title="Linear freedom",
    kind="description",
    formula="W, V -> D W, V D^-1 (scale, sign); W_Q, W_K -> A W_Q, A^-T W_K (invertible; with "
    "rotary positions A turns and scales each plane); W, V -> R W, V "
    "R^T (rotation)",
    why="Along these directions weights, distances and curvature can be anything: two networks that differ there "
    "only are the same function.",
)
def linear_freedom(linear_symmetries: LinearSymmetries) -> LinearFreedom:
    """Which linear maps of units leave the function alone, beyond permutations, and how many directions they span.

    Which weights carry the same units is traced; what maps they can take up follows from gradients of the
    outputs (a symmetry has no derivative), signs are tried. Each group is then moved at random, in float64 at
    the model's own and at perturbed weights: the outputs must stay within a relative 1e-9 (casts of the model's own
    to less are lifted to float64). Where rotary positions turn query and key, a turn and a scale of each plane is
    left of their freedom. Tied embeddings keep the final norm's gain from moving into what reads it: then the
    stream cannot rotate, and `refused` says so. Raises Unsupported where the forward pass fails or the model does
    not run in float64.
    """
    groups = linear_symmetries.groups.values()
    return LinearFreedom(
        directions=float(sum(g.dimension for g in groups)),
        scale=_count(linear_symmetries, "scale"),
        sign=_count(linear_symmetries, "sign"),
        orthogonal=_count(linear_symmetries, "orthogonal"),
        invertible=_count(linear_symmetries, "invertible"),
        plane=_count(linear_symmetries, "plane"),
        deviation=linear_symmetries.deviation,
        sizes={g.name: float(g.size) for g in groups},
        places={g.name: ", ".join(f"{s.entry} {'+' if s.action == 1 else '-'}" for s in g.slots) for g in groups},
        refused=linear_symmetries.refused,
    )


def _count(found: LinearSymmetries, kind: str) -> float:
    return float(len(found.of_kind(kind)))
