"""The user's data: `forms` brings what a loader gives into the normal form, `data` reads all of it once."""

__all__ = ["data", "forms"]
