"""The tools that people already use: trainers that start a watch, loggers of findings, logs that become a run.

Rule of the room: thin. A callback starts `diag.watch` and passes on what it is given; nothing is measured here, and
a library is imported only by the module that bears its name.
"""

__all__ = ["logs", "mcp"]
