"""Quantities that no snapshot has: a trial before training, a checkpoint file by itself.

Rule of the room: plain data that others make and give to instruments by name.
"""

__all__ = ["saved", "trial"]
