"""Checks of a training on several ranks: what must be equal on all of them and is not, and the other way round.

They judge facts that the watches of all ranks bring together; where one process trains they do not apply.
"""
