"""Checks of the loss: what it says at the start, and what enters it."""
