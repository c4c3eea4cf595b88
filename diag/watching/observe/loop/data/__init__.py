"""What training reads: the rows of its batches, which of them are drawn, and what is asked of them."""

__all__ = ["asked", "contents", "drawn", "evaluated", "inputs", "targets"]
