"""What the loop's own evaluations give the model, beside what training gave it (columns of numbers, and tokens),
and copies of the model that may be evaluated in its place.

Rule of the folder: a few calls are looked at, on the host alone; what is kept is bounded.
"""

__all__ = ["columns", "copies", "evaluated_targets", "novelty", "quiet"]
