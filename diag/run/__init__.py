"""The record of a training run on disk and in memory.

Rule of the room: it knows no page and no terminal, and what a call has written survives the process.
"""

__all__ = [
    "checkpoints",
    "entries",
    "files",
    "folder",
    "opening",
    "reading",
    "rows",
    "run",
    "saved",
    "state_files",
    "stories",
    "writer",
]
