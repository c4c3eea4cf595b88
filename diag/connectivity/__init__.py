"""Two or more networks: paths between them, barriers, symmetries, and bringing one into the other's order.

Rule of the room: a path's ends are the two networks themselves.
"""

__all__ = [
    "barrier_prediction",
    "connection",
    "connection_map",
    "interpolation",
    "interpolation_layers",
    "symmetries",
]
