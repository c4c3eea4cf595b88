"""Checks of the outcome: what has been learned, and whether it holds on data that was not trained on."""

__all__ = ["constant_answer", "gain"]
