"""What a training loop shows of itself: micro-batches, losses, gradients, optimizer steps."""
