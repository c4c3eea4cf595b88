"""Checks of the network: what its units put out, and how signals and gradients fare over its depth."""
