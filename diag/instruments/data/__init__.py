"""Checks of the data: what goes into the network, and what it is asked for."""

__all__ = ["label_order", "labels_belong"]
