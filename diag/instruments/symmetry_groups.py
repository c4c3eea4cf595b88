"""Symmetry groups: which units of a network may be permuted without changing its function, and its module graph.

A hidden unit has no place of its own: reordering the units of a layer, with the weights into and out of them,
gives the same function. Which weights must move together follows from the data flow (a residual stream moves as
one, attention heads as wholes). Two networks can only be compared weight by weight up to these groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diag.connectivity.symmetries import Symmetries
from diag.display import format_number
from diag.errors import named
from diag.registry import instrument
from diag.result import Confidence, Level, Result, Verdict, measured

if TYPE_CHECKING:
    import networkx

SOURCE = "Ainsworth et al. 2023, arXiv:2209.04836"
LABELS_UP_TO = 30  # nodes; with more, names in the drawing would cover each other


@dataclass(frozen=True, kw_only=True, eq=False)
class SymmetryGroups(Result):
    """The permutation groups and the module graph of one model."""

    groups: float = measured("groups of units that may be permuted", unit="count")
    units: float = measured("units in them, each counted once", unit="count")
    log10_arrangements: float = measured("log10 of the number of weight settings that are the same function")
    share_moved: float = measured("parameters that some group moves", unit="share")
    deviation: float = measured("largest relative change of the outputs when a random element was applied")
    sizes: dict[str, float] = measured(
        "units of each group, by the first weight axis that carries it", unit="count"
    )
    frozen: dict[str, str] = measured("weight axes that cannot be permuted, and why")
    unknown: dict[str, str] = measured("operations whose effect on units is not known, and where they were met")
    modules: tuple[str, ...] = measured("nodes of the module graph")
    parameters: tuple[float, ...] = measured("parameters of each node", unit="count")
    edges: tuple[tuple[int, int], ...] = measured("which node's output goes into which node")

    def verdict(self) -> Verdict:
        if not self.groups:
            return Verdict(
                Level.OK, "No units of this network may be permuted without changing its function.", source=SOURCE
            )
        missing = (
            f"; {len(self.unknown)} kinds of operation ({named(sorted(self.unknown))}) are not understood, "
            "so there may be more"
            if self.unknown
            else ""
        )
        return Verdict(
            Level.OK,
            f"{self.units:.0f} units in {self.groups:.0f} groups may be permuted without changing the function "
            f"(relative change of the outputs {format_number(self.deviation)}): every setting is one of about "
            f"10^{self.log10_arrangements:.0f} equal ones{missing}.",
            source=SOURCE,
            confidence=Confidence.THEOREM,
            value=self.deviation,
        )

    def plot(self, ax: Any = None) -> Any:
        """The module graph, from input (left) to output (right)."""
        import networkx

        graph = networkx.DiGraph()
        graph.add_nodes_from(range(len(self.modules)))
        graph.add_edges_from(self.edges)
        places = _places(graph)
        sizes = [20 + 20 * math.log10(1 + p) for p in self.parameters]
        networkx.draw_networkx_edges(
            graph, places, ax=ax, node_size=sizes, edge_color="grey", arrowsize=6, width=0.7,
            connectionstyle="arc3,rad=0.12",
        )  # fmt: skip
        networkx.draw_networkx_nodes(graph, places, ax=ax, node_size=sizes)
        if len(self.modules) <= LABELS_UP_TO:
            for node, (x, y) in places.items():
                ax.annotate(
                    self.modules[node],
                    (x, y),
                    xytext=(0, 6),
                    textcoords="offset points",
                    fontsize="xx-small",
                    rotation=45,
                )
        lowest = min((y for _, y in places.values()), default=0.0)
        ax.set_ylim(lowest - 0.5, 0.8 - 0.4 * lowest)  # room for the names above
        ax.set(xlabel="place on the longest way from the input", ylabel="branch", yticks=[])


def _places(graph: networkx.DiGraph) -> dict[int, tuple[float, float]]:
    """Columns by the longest way from the input; loops (a module called twice) do not count."""
    import networkx

    condensed = networkx.condensation(graph)
    column: dict[int, int] = {}
    for component in networkx.topological_sort(condensed):
        before = [column[p] for p in condensed.predecessors(component)]
        column[component] = max(before, default=-1) + 1
    places, used = {}, dict.fromkeys(column.values(), 0)
    for component, place in column.items():
        for node in sorted(condensed.nodes[component]["members"]):
            places[node] = (float(place), -float(used[place]))
            used[place] += 1
    return places


@instrument(
    source=SOURCE,
    kind="description",
    why="Units can change places without changing what a network computes; two networks can be compared or "
    "averaged only once theirs are in the same order.",
)
def symmetry_groups(symmetries: Symmetries, module_graph: Any) -> SymmetryGroups:
    """Which units may be permuted without changing the function, and which module feeds which.

    The groups are found from one traced forward pass, and checked: a random element of them must leave the
    outputs as they are (relative 1e-4 in float32, 1e-10 in float64), at the model's own weights and at perturbed
    ones. Raises Unsupported where the forward pass fails or its outputs are not finite.
    """
    names = list(module_graph)
    number = {name: i for i, name in enumerate(names)}
    found = symmetries
    counts = {n: math.prod(g.parent_sizes) for n, g in found.groups.items()}
    moved = sum(math.prod(found.shapes[n]) for n in found.blocks if n in found.parameters and n not in found.tied)
    total = sum(math.prod(found.shapes[n]) for n in found.parameters if n not in found.tied)
    return SymmetryGroups(
        groups=float(len(found.groups)),
        units=float(sum(g.size * counts[n] for n, g in found.groups.items())),
        log10_arrangements=sum(counts[n] * math.lgamma(g.size + 1) for n, g in found.groups.items()) / math.log(10),
        share_moved=moved / total if total else 0.0,
        deviation=found.deviation,
        sizes={n: float(g.size) for n, g in found.groups.items()},
        frozen=found.frozen,
        unknown=found.unknown,
        modules=tuple(names),
        parameters=tuple(float(module_graph.nodes[n]["parameters"]) for n in names),
        edges=tuple((number[a], number[b]) for a, b in module_graph.edges),
    )
