"""Before training: one batch is tried out on copies of the model, and what will not work is reported.

`diag.preflight` and `diag.coordinate_check` are its entries. Nothing here touches the user's model, optimizer or
random numbers.
"""

__all__ = ["preflight"]
