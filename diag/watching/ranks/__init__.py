"""The watches of one training on all its ranks: what is put together of a step, and what must be equal on each.

Rule of the folder: a rank never waits for another inside a step; messages are sent and taken up when they come.
"""

__all__ = ["agreement", "company"]
