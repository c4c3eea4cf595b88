"""Watching a training loop: `watch(model)` is one line around it.

Rule of the room: nothing raises into the loop, training stays bit-identical, and the time taken is counted.
"""

__all__ = ["watcher"]
