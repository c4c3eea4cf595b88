"""A model at one moment: its data, forward pass, losses and the glossary of quantities.

Rule of the room: this is the only code that calls the user's model, and it leaves no trace in it.
"""

__all__ = [
    "activations",
    "autograd_graph",
    "batch",
    "call_at",
    "cutting",
    "example_losses",
    "external",
    "forward",
    "glossary",
    "history",
    "inside",
    "loop",
    "module_graph",
    "objective",
    "optimizer",
    "parameters",
    "pause",
    "picking",
    "preserve",
    "reading",
    "sharded",
    "snapshot",
    "state",
    "validation",
]
