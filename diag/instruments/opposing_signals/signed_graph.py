"""The signed graph of vectors that agree or oppose, and the parts of it that agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray


def signed_graph(names: Sequence[int], cosines: NDArray[numpy.float64], at_least: float) -> Any:
    """A networkx graph of `names` whose edges have `weight`, the cosines (m, m) of at least that size."""
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(names)
    strong = numpy.argwhere(numpy.triu(numpy.abs(cosines) >= at_least, 1))
    graph.add_edges_from((names[i], names[j], {"weight": float(cosines[i, j])}) for i, j in strong)
    return graph


def agreeing_parts(graph: Any) -> list[set[int]]:
    """The connected parts of the edges of positive weight, the largest first."""
    import networkx

    agreeing = networkx.Graph()
    agreeing.add_nodes_from(graph)
    agreeing.add_edges_from((a, b) for a, b, weight in graph.edges(data="weight") if weight > 0)
    return sorted(networkx.connected_components(agreeing), key=lambda part: (-len(part), min(part)))
