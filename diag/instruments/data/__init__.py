"""Checks of the data: what goes into the network, and what it is asked for."""
