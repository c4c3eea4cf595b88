"""What a training loop shows of itself: micro-batches, losses, gradients, optimizer steps."""

__all__ = ["capture", "examples", "loop", "losses", "rows", "steps"]
