"""The only code that touches torch's own functions and the model's hooks."""
