"""The tools that people already use: trainers that start a watch, loggers that are told, logs that become a run.

Rule of the room: thin. A callback starts `diag.watch` and hands on what it is given; nothing is measured here, and
a library is imported by the module that bears its name and by no other.
"""

__all__ = ["logs", "mcp"]
