"""Simulations with a known truth for every error that diag states."""
