"""How the per-example gradients of one kind of layer are found from its inputs and output gradients."""

__all__ = ["blocks", "by_user", "call", "closed_forms", "combination", "fallback", "layout", "recurrent"]
