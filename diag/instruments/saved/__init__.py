"""Checks of checkpoint files by themselves (`diag report FILE...`): arithmetic facts, with no model and no data."""
