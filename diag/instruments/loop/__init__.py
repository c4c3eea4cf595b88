"""Checks on the facts of the loop: a training that is not what its author thinks, though its loss looks fine.

They are arithmetic: what they say happened, happened, and no threshold is involved. A pattern that can be meant is
a warning at most; one that has a common use is silent."""

__all__ = ["findings"]
