"""Several runs on shared axes: which verdicts changed, numbers with their differences, a table for a sweep.

Rule of the room: it reads the evidence of each run as the report does, and judges nothing again.
"""

__all__ = ["compare", "sweep"]
