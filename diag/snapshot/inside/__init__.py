"""What passes inside a model in a forward pass: which module runs, the scores of its attention.

Rule of the room: functions are heard as they are called and never replaced; what is kept is bounded.
"""

__all__ = ["attention", "names", "scores"]
