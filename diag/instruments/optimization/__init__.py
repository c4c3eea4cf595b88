"""Checks of the optimisation: how far steps go, what clipping and decay do to them, and what the loss does."""

__all__ = ["course"]
