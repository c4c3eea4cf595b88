"""The state of a model (tensors, hooks, Python objects), and how each part of it is restored after a measurement.

Rule of the room: what is put back is put back in place, to the bit, and what cannot be is said.
"""

__all__ = ["bits", "fresh", "hook_check", "hooks", "host", "modes", "moment", "python", "tensors", "unmade"]
