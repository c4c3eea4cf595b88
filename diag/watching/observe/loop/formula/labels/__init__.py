"""What a loss says of its labels: log-probabilities and their signs, and which way it pulls the outputs."""

__all__ = ["likelihoods", "pulls"]
