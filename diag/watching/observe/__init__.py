"""What a training loop shows of itself: micro-batches, losses, gradients, optimizer steps."""

__all__ = ["capture", "examples", "learning", "loop", "losses", "norms", "rows", "steps"]
