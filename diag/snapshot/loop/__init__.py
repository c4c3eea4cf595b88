"""What a watch saw of a training loop, as plain data.

Rule of the folder: facts only; whatever judges them is an instrument.
"""

__all__ = [
    "arithmetic",
    "asked",
    "contrast",
    "data",
    "evaluated",
    "facts",
    "games",
    "inputs",
    "network",
    "paired",
    "places",
    "ranks",
    "rows",
    "steps",
]
