"""The instruments, one file each. A file dropped in here appears everywhere: nothing lists them."""

__all__ = []
