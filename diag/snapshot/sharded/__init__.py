"""Models whose parameters are spread over processes, as something that can be measured.

Rule of the folder: the sharded model is left alone; what is measured is a copy that each process holds whole.
"""

__all__ = ["whole"]
