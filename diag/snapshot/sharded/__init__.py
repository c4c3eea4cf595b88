"""Models whose parameters are spread over processes, as something that can be measured.

Rule of the folder: the sharded model is left alone; what is measured is a copy that each process holds whole, or
one that gathers the weights of a layer at a time.
"""

__all__ = ["by_layer", "chosen_model", "quantities", "whole"]
