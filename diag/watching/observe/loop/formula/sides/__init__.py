"""Losses between two sides: embeddings and those that they are compared with, a generator and what judges it."""

__all__ = ["contrast", "games", "likeness"]
