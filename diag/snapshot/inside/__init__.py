"""What passes inside a model in a forward pass: which module runs, what layers put out, the scores of attention.

Rule of the room: functions are heard as they are called and never replaced; what is kept is bounded.
"""

__all__ = [
    "attention",
    "chain",
    "denoiser",
    "earlier",
    "later",
    "layers",
    "names",
    "normalization",
    "quantised",
    "residual",
    "scores",
]
