"""Gradient flow: `instrument` is the instrument, `statistics` what it computes from the record of the steps."""

__all__ = []
