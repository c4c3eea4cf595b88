"""What is asked of which row: targets, of functions of torch and of the loop's own arithmetic, beside the inputs of
the call that the loss is of.

Rule of the folder: a few calls are looked at, on the host alone; what is kept of a row is bounded.
"""

__all__ = ["compared", "pairing"]
