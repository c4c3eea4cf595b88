"""The cross-entropy over many classes, and its curvature, in pieces of some rows.

Rule of the folder: of the logits, one number for each token and word, no more than the one tensor that the model
makes is held at any time.
"""

__all__ = ["jacobian", "loss"]
