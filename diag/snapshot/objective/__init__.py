"""What the user's own loss is: what it compares with the labels, how examples add up in it, each one's share.

Rule of the room: all of it is read from the loss itself, and checked against its value; nothing is assumed.
"""

__all__ = [
    "comparison",
    "counting",
    "coupling",
    "decisions",
    "examples",
    "loss_spy",
    "over_ranks",
    "own_loss",
    "same_rows",
    "shares",
]
