"""What training's own batches say of each row of the data: who a row is, and the course of its label's margin.

Rule of the folder: what is looked at is one number a row, made of what the loop has computed anyway; on a device it
stays there until somebody asks.
"""

__all__ = ["rows"]
