"""The learning rate's schedule: `instrument` is the instrument, `too_fast` counts the steps of an epoch, too."""

__all__ = ["too_fast"]
