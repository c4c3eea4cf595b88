"""Checks of the network: the outputs of its units, and how signals and gradients grow or vanish over its depth."""

__all__ = ["several"]
