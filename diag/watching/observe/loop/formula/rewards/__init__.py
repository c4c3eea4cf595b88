"""Losses of reinforcement learning: values of actions and what their targets are made of, gradients of policies,
and the calls of the model that acted."""

__all__ = ["actions", "next_values", "policy", "rollout"]
