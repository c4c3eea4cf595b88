"""What training reads: the rows of its batches, which of them are drawn and in which order, what is asked of them
and with which axes, what evaluations give, and the source of the model's classes."""

__all__ = [
    "asked",
    "axes",
    "bounds",
    "contents",
    "drawn",
    "evaluated",
    "evaluations",
    "inputs",
    "masks",
    "own",
    "padding",
    "pairs",
    "sequences",
    "source",
    "stored",
    "stream",
    "targets",
    "tokens",
]
