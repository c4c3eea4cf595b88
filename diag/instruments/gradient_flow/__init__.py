"""Gradient flow: `instrument` is the instrument, the other files hold what it alone needs."""

__all__ = []
