"""Tensors in, tensors out: symmetric operators, Lanczos, quadrature, traces, and the sums that instruments need.

Rule of the room: it imports nothing but the errors, and knows no model.
"""

__all__ = [
    "assignment",
    "class_geometry",
    "coherence",
    "deadline",
    "deflation",
    "growth",
    "lanczos",
    "margins",
    "mean_square",
    "operator",
    "reductions",
    "softmax_rounding",
    "spectrum",
    "trace",
    "warm",
]
