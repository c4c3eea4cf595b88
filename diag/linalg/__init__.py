"""Tensors in, tensors out: symmetric operators, Lanczos, quadrature, traces, and the sums that instruments need.

Rule of the room: it imports nothing but the errors, and knows no model.
"""

__all__ = [
    "assignment",
    "coherence",
    "deadline",
    "deflation",
    "geometry",
    "growth",
    "lanczos",
    "margins",
    "mean_square",
    "operator",
    "reductions",
    "refine",
    "ritz",
    "softmax_rounding",
    "spectrum",
    "student",
    "trace",
    "warm",
]
