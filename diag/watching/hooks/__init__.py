"""The only code that touches torch's own functions and the model's hooks."""

__all__ = ["hub", "model_hook"]
