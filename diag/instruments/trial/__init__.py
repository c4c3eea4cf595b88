"""Checks of a trial before training (`diag.preflight`): what became of one batch, and what the answers depend
on."""

__all__ = ["one_batch"]
