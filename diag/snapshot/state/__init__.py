"""What a model is besides its function, and how each part of it is as it was after a measurement.

Rule of the room: what is put back is put back in place, to the bit, and what cannot be is said.
"""

__all__ = ["bits", "hook_check", "hooks", "python", "tensors"]
