"""Parts of a signed graph on cosines made up for it."""

import numpy

from diag.instruments.opposing_signals.signed_graph import agreeing_parts, signed_graph


def test_two_camps_and_a_loner():
    cosines = numpy.array(
        [[1.0, 0.9, -0.8, 0.1], [0.9, 1.0, -0.7, 0.0], [-0.8, -0.7, 1.0, 0.2], [0.1, 0.0, 0.2, 1.0]]
    )
    graph = signed_graph([7, 3, 5, 9], cosines, 0.3)
    assert set(graph) == {7, 3, 5, 9}
    assert {frozenset(edge): graph.edges[edge]["weight"] for edge in graph.edges} == {
        frozenset({7, 3}): 0.9,
        frozenset({7, 5}): -0.8,
        frozenset({3, 5}): -0.7,
    }
    assert agreeing_parts(graph) == [{7, 3}, {5}, {9}]
