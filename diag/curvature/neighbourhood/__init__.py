"""Losses and outputs at parameters near the model's own."""
