"""The curvature at which an optimizer stops being stable: full-batch rules, preconditioners, SGD on batches."""

__all__ = ["optimizer", "preconditioner", "sgd"]
