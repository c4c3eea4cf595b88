"""Checks of which row belongs to which: targets beside their inputs, in batches and in the data set."""
