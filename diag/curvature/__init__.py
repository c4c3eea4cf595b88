"""Second derivatives of the loss: operators, products, their self-test, and what is stable at which step size.

Rule of the room: no number leaves without the self-test of the product that made it.
"""

__all__ = [
    "carry",
    "class_directions",
    "eigenvectors",
    "examples",
    "matrices",
    "memory",
    "neighbourhood",
    "operators",
    "stability",
]
