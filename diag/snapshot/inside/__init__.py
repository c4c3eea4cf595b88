"""What happens inside a model in a forward pass: which module runs, the outputs of layers, the scores of attention.

Rule of the room: calls of functions are intercepted and never replaced; what is kept is bounded.
"""

__all__ = [
    "apart",
    "attention",
    "blocks",
    "chain",
    "denoiser",
    "earlier",
    "ignored",
    "later",
    "layers",
    "listener",
    "normalization",
    "padding",
    "quantised",
    "residual",
    "scores",
    "together",
]
