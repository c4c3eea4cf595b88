"""Losses and outputs at parameters near the model's own."""

__all__ = ["divergence_at", "losses_at", "surroundings"]
