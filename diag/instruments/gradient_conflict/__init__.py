"""Gradient conflict: `instrument` is the instrument, `cosines` what it computes from sums of products."""

__all__: list[str] = []
