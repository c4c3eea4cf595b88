"""When a watched model is measured, on what, and by which instruments.

Rule of the room: it is the only caller of instruments in a watch.
"""

__all__ = ["findings", "live", "measuring", "probe", "runner", "schedule", "training", "window"]
