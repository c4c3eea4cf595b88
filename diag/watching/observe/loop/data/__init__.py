"""What training reads: the rows of its batches, which of them are drawn and in which order, what is asked of them,
and the source of the model's classes."""

__all__ = ["asked", "contents", "drawn", "evaluated", "inputs", "padding", "pairs", "source", "stream", "targets"]
