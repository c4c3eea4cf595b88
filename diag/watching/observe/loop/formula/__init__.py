"""What a loss is made of between the model's outputs and the number that backward() is called on, read from the
autograd graph of a few backward passes and from what the graph keeps of the numbers. Nothing is computed again on a
device, and nothing is called that the loop did not call."""

__all__ = ["depth", "formula", "parts"]
